"""Rows (TRL's columns `images` and `messages`; LLaVA's JSON is read into them) and the collator that batches them.

N images of the batch in the order of their placeholders, Q queries, E target width.
"""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

TargetSource = Callable[[list[Image.Image]], torch.Tensor]  # images -> (N, Q, E) fp32


def open_image(image: Image.Image | str | Path) -> Image.Image:
    """An image of a row as RGB; student and teachers get the very same picture."""
    return (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")


class LlavaRows(Dataset):
    """The rows of a LLaVA-format JSON file: `{"id", "images": [path, ...], "messages": [...]}`.

    Images stay paths until the collator (that is, a loader's worker) opens them. `<image>` is moved to the front of
    its turn, as LLaVA does. A row that can't be used is an error that names it: nothing is skipped.
    """

    def __init__(self, json_path: str | Path, image_folder: str | Path | None = None):
        self.image_folder = Path(os.path.abspath(image_folder or Path(json_path).parent))
        self.samples = json.loads(Path(json_path).read_text(encoding="utf-8"))
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

    def drop_longer_than(self, max_length: int, collator: "OlaVlmCollator") -> int:
        """Drops the rows of more than `max_length` tokens, images and task tokens included; returns their number."""
        keep = [sample for i, sample in enumerate(self.samples) if collator.length(self[i]) <= max_length]
        dropped = len(self.samples) - len(keep)
        if not keep:
            raise ValueError(f"all {dropped} rows are longer than max_length={max_length}: raise max_length")
        if dropped:
            logger.warning(f"dropped {dropped} of {len(self.samples)} rows: longer than max_length={max_length}")
        self.samples = keep
        return dropped

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
        processor: an `OlaVlmProcessor` (or `LlavaProcessor`) whose chat template marks `{% generation %}`.
        target_sources: task name -> function from N images to their (N, Q, E) targets: a cache or an encoder.
        tasks: `config.tasks`; says the shape of the targets.

    Returns of a call: input_ids, attention_mask, labels (B, T); pixel_values (N, 3, H, W), without any image 0 rows,
    so that all ranks run the same graph; targets: task -> (N, Q, E) fp32; row_ids: list of str.
    """

    def __init__(
        self, processor, target_sources: Mapping[str, TargetSource] | None = None, tasks: Sequence[dict] = ()
    ):
        tokenizer = processor.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token before training")
        self.chat_template = processor.chat_template or tokenizer.chat_template or ""
        if "generation" not in self.chat_template:
            raise ValueError("the chat template marks no {% generation %} span: no token could be supervised")
        self.processor = processor
        self.target_sources = dict(target_sources or {})
        self.target_shapes = {task["name"]: (task["target_length"], task["target_dim"]) for task in tasks}
        if unknown := set(self.target_sources) - set(self.target_shapes):
            raise ValueError(f"target sources {sorted(unknown)} belong to no task of {list(self.target_shapes)}")
        self._expansions: dict[str, list[int]] = {}
        # Knows the student's geometry: the shape of an empty batch of images and the usual expansion.
        self._blank = self._pixel_values([Image.new("RGB", (8, 8))])

    def __call__(self, rows: Sequence[dict]) -> dict:
        images = [open_image(image) for row in rows for image in row["images"]]
        pixel_values = self._pixel_values(images) if images else self._blank[:0]
        encoded, first = [], 0
        for row in rows:
            ids, supervised = self.encode(row, pixel_values[first : first + len(row["images"])])
            if not any(supervised):
                raise ValueError(f"row {row['id']} has no supervised token: it needs an assistant's answer")
            encoded.append((ids, supervised))
            first += len(row["images"])

        shape = len(rows), max(len(ids) for ids, _ in encoded)
        input_ids = torch.full(shape, self.processor.tokenizer.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for i, (ids, supervised) in enumerate(encoded):
            input_ids[i, : len(ids)] = ids = torch.tensor(ids)
            labels[i, : len(ids)] = ids.where(torch.tensor(supervised), IGNORE_INDEX)
            attention_mask[i, : len(ids)] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "pixel_values": pixel_values,
            "targets": self._targets(rows, images),
            "row_ids": [str(row["id"]) for row in rows],
        }

    def encode(self, row: dict, pixel_values: torch.Tensor) -> tuple[list[int], list[bool]]:
        """Token ids of a row, images expanded, and which of them are supervised."""
        tokenizer, image_id = self.processor.tokenizer, self.processor.image_token_id
        (text,), (spans,) = render_jinja_template(
            conversations=[row["messages"]],
            chat_template=self.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        # The processor's own rule, so that training sees the ids of inference.
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not has_bos)
        if encoding["input_ids"].count(image_id) != len(pixel_values):
            raise ValueError(
                f"row {row['id']}: {encoding['input_ids'].count(image_id)} {self.processor.image_token} placeholders "
                f"in its rendered messages for {len(pixel_values)} images"
            )
        ids, supervised, image, span = [], [], 0, 0
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            while span < len(spans) and spans[span][1] <= start:
                span += 1
            if token == image_id:
                expansion = self._expand(pixel_values, image)
                ids += expansion
                supervised += [False] * len(expansion)
                image += 1
            else:
                ids.append(token)
                supervised.append(span < len(spans) and spans[span][0] < end)
        return ids, supervised

    def length(self, row: dict) -> int:
        """Tokens of a row; needs no image opened, as the image processor gives all images the same size."""
        return len(self.encode(row, self._blank.expand(len(row["images"]), -1, -1, -1))[0])

    def _pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    def _expand(self, pixel_values: torch.Tensor, index: int) -> list[int]:
        text = self.processor.replace_image_token({"pixel_values": pixel_values}, index)
        if text not in self._expansions:
            self._expansions[text] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._expansions[text]

    def _targets(self, rows: Sequence[dict], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        if self.target_sources and any("target_images" in row for row in rows):
            images = [open_image(image) for row in rows for image in row["target_images"]]
        targets = {}
        for name, source in self.target_sources.items():
            expected = (len(images), *self.target_shapes[name])
            targets[name] = source(images).float() if images else torch.zeros(expected)
            if targets[name].shape != expected:
                raise ValueError(
                    f"task {name!r}: its teacher gave targets {tuple(targets[name].shape)}, the configuration says "
                    f"{expected}: set target_length and target_dim to the teacher's"
                )
        return targets
