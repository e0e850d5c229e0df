"""Rows (TRL's columns `images` and `messages`; LLaVA's JSON is read into them) and the collator that batches them.

N images of the batch in the order of their placeholders, Q queries, E target width.
"""

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..targets.encoders import open_image

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

TargetSource = Callable[[list[Image.Image]], torch.Tensor]  # images -> (N, Q, E) fp32


class LlavaRows(Dataset):
    """The rows of a LLaVA-format JSON file: `{"id", "images": [path, ...], "messages": [...]}`.

    Images stay paths until the collator (that is, a loader's worker) opens them. `<image>` is moved to the front of
    its turn, as LLaVA does. A row that can't be used is an error that names it: nothing is skipped.
    """

    def __init__(self, json_path: str | Path, image_folder: str | Path | None = None):
        self.image_folder = Path(os.path.abspath(image_folder or Path(json_path).parent))
        samples = json.loads(Path(json_path).read_text(encoding="utf-8"))
        self.samples = [{"id": index, **sample} for index, sample in enumerate(samples)]
        self.other_image: dict[str, str] | None = None
        for sample in self.samples:
            self._check(sample)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        paths = self._paths(sample)
        row = {"id": str(sample["id"]), "images": paths, "messages": [_message(t) for t in sample["conversations"]]}
        if self.other_image is not None:
            row["target_images"] = [self.other_image[path] for path in paths]
        return row

    def image_paths(self) -> list[str]:
        """Every image once, in the order of the file."""
        return list(dict.fromkeys(path for sample in self.samples for path in self._paths(sample)))

    def images(self) -> Iterator[Image.Image]:
        return map(open_image, self.image_paths())

    def shuffle_targets(self, seed: int) -> None:
        """The control: every image gets the targets of another one, by one fixed cycle through all images."""
        paths = self.image_paths()
        if len(paths) < 2:
            raise ValueError(f"shuffle_targets needs at least 2 different images, the data has {len(paths)}")
        random.Random(seed).shuffle(paths)
        self.other_image = dict(zip(paths, paths[1:] + paths[:1], strict=True))

    def drop_longer_than(self, max_length: int, collator: "OlaVlmCollator") -> None:
        """Drops the rows of more than `max_length` tokens, images and task tokens included, and logs their number."""
        keep = [sample for i, sample in enumerate(self.samples) if len(collator.encode(self[i])[0]) <= max_length]
        dropped = len(self.samples) - len(keep)
        if not keep:
            raise ValueError(f"all {dropped} rows are longer than max_length={max_length}: raise max_length")
        if dropped:
            logger.warning(f"dropped {dropped} of {len(self.samples)} rows: longer than max_length={max_length}")
        self.samples = keep

    def _paths(self, sample: dict) -> list[str]:
        names = sample.get("image") or []
        return [os.path.abspath(self.image_folder / name) for name in ([names] if isinstance(names, str) else names)]

    def _check(self, sample: dict) -> None:
        paths = self._paths(sample)
        for path in paths:
            if not Path(path).is_relative_to(self.image_folder):
                raise ValueError(f"row {sample['id']}: image {path} lies outside image_folder {self.image_folder}")
        for turn in sample["conversations"]:
            if turn["from"] not in ROLES:
                raise ValueError(f"row {sample['id']}: unknown speaker {turn['from']!r}, not one of {list(ROLES)}")
            if turn["from"] != "human" and "<image>" in turn["value"]:
                raise ValueError(f"row {sample['id']}: <image> may stand in the human's turns only")
        placeholders = sum(turn["value"].count("<image>") for turn in sample["conversations"])
        if placeholders != len(paths):
            raise ValueError(f"row {sample['id']}: {placeholders} <image> placeholders for {len(paths)} images")


def _message(turn: dict) -> dict:
    text = turn["value"].replace("<image>", "").strip()
    content = [{"type": "image"}] * turn["value"].count("<image>")
    return {"role": ROLES[turn["from"]], "content": [*content, {"type": "text", "text": text}]}


class OlaVlmCollator:
    """Rows -> a batch for `OlaVlmTrainer`, right-padded, its labels on the assistant's spans, end of turn included.

    It gives the ids that `processor.apply_chat_template` gives, 30 times faster: images are expanded on ids.

    Args:
        processor: an `OlaVlmProcessor` (or `LlavaProcessor`) whose chat template marks `{% generation %}` and whose
            image processor gives all images the same size.
        target_sources: task name -> function from N images to their (N, Q, E) targets: a cache or an encoder.
        tasks: `config.tasks`; says the shape of the targets.

    Returns of a call: input_ids, attention_mask, labels (B, T); pixel_values (N, 3, H, W), without any image 0 rows,
    so that all ranks run the same graph; targets: task -> (N, Q, E) fp32; row_ids: list of str.
    """

    def __init__(self, processor, target_sources: dict[str, TargetSource] | None = None, tasks: Sequence[dict] = ()):
        tokenizer = processor.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token before training")
        self.chat_template = processor.chat_template or tokenizer.chat_template or ""
        self.processor = processor
        self.target_sources = target_sources or {}
        self.target_shapes = {task["name"]: (task["target_length"], task["target_dim"]) for task in tasks}
        blank = self._pixel_values([Image.new("RGB", (8, 8))])
        self.no_pixel_values = blank[:0]
        expansion = processor.replace_image_token({"pixel_values": blank}, 0)
        self.image_ids: list[int] = tokenizer(expansion, add_special_tokens=False)["input_ids"]

    def __call__(self, rows: Sequence[dict]) -> dict:
        images = [open_image(image) for row in rows for image in row["images"]]
        input_ids, labels = zip(*(self.encode(row) for row in rows), strict=True)
        for row, row_labels in zip(rows, labels, strict=True):
            if set(row_labels) <= {IGNORE_INDEX}:
                raise ValueError(f"row {row['id']} has no supervised token: no answer, or no {{% generation %}} mark")
        return {
            "input_ids": _pad(input_ids, self.processor.tokenizer.pad_token_id),
            "attention_mask": _pad([[1] * len(ids) for ids in input_ids], 0),
            "labels": _pad(labels, IGNORE_INDEX),
            "pixel_values": self._pixel_values(images) if images else self.no_pixel_values,
            "targets": self._targets(rows, images),
            "row_ids": [str(row["id"]) for row in rows],
        }

    def encode(self, row: dict) -> tuple[list[int], list[int]]:
        """Token ids of a row, images expanded, and its labels. Opens no image."""
        tokenizer, image_id = self.processor.tokenizer, self.processor.image_token_id
        options = {"chat_template": self.chat_template, **tokenizer.special_tokens_map}
        (text,), (spans,) = render_jinja_template([row["messages"]], return_assistant_tokens_mask=True, **options)
        # The processor's own rule, so that training sees the ids of inference.
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not has_bos)
        ids, labels = [], []
        for token, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            if token == image_id:
                ids += self.image_ids
                labels += [IGNORE_INDEX] * len(self.image_ids)
            else:
                ids.append(token)
                supervised = any(first < stop and start < last for first, last in spans)
                labels.append(token if supervised else IGNORE_INDEX)
        return ids, labels

    def _pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    def _targets(self, rows: Sequence[dict], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        if self.target_sources and any("target_images" in row for row in rows):
            images = [open_image(image) for row in rows for image in row["target_images"]]
        targets, owners = {}, [row["id"] for row in rows for _ in row["images"]]
        for name, source in self.target_sources.items():
            expected = (len(images), *self.target_shapes[name])
            targets[name] = source(images).float() if images else torch.zeros(expected)
            if targets[name].shape != expected:
                found = f"targets {tuple(targets[name].shape)} from its teacher, {expected} from its configuration"
                raise ValueError(f"task {name!r} has {found}: set target_length and target_dim to the teacher's")
            finite = targets[name].isfinite().flatten(1).all(1).tolist()
            # Later these would spoil the contrastive columns of the whole step, and innocent rows would be blamed.
            if bad := [owner for owner, good in zip(owners, finite, strict=True) if not good]:
                raise FloatingPointError(f"task {name!r}: its teacher's targets of the rows {bad} are not finite")
        return targets


def _pad(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
