"""The collators: rows (`training.rows`) -> a batch for `OlaVlmTrainer`.

N images of the batch in the order of their placeholders, Q queries, E target width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence

from ..configuration_ola_vlm import task_token_strings
from ..targets.encoders import Motion
from .chat_template import PROBE, fit_chat_template
from .rows import BadRow, open_source

IGNORE_INDEX = -100
BLANK = Image.new("RGB", (64, 64))

TargetSource = Callable[[list[Image.Image]], torch.Tensor]  # images -> (N, Q, E)


class Encoded(NamedTuple):
    """Token ids of a row, images expanded; its labels; how many of its images they hold; its length if it were not
    truncated; the chat as text, images not expanded."""

    ids: np.ndarray
    labels: np.ndarray
    num_images: int
    full_length: int
    text: str


class Sample(NamedTuple):
    """A row on its way into a batch: its images opened, `target_images` those whose targets it gets."""

    id: str
    encoded: Encoded
    images: list[Image.Image]
    target_images: list[Image.Image]


class OlaVlmCollator:
    """Rows -> a batch, right-padded, its labels on the assistant's spans, end of turn included.

    It gives the ids that `processor.apply_chat_template` gives, 30 times faster: images are expanded on ids.
    `ChatTemplate` says where the assistant speaks.

    Args:
        processor: an `OlaVlmProcessor` (or `LlavaProcessor`) whose chat template takes content parts and whose image
            processor gives all images the same size. If its template can't be trained with, it gets one that can
            (`fit_chat_template`), so that what is saved with the model is what it was trained with.
        target_sources: task name -> function from N images to their (N, Q, E) targets: a cache or an encoder.
        tasks: `config.tasks`; says the shape of the targets.
        max_length: rows of more tokens are bad rows, or
        truncate: cut there: before an image that doesn't fit as a whole, never inside it.
        drop_bad_rows: leave bad rows out of the batch and name them in it, instead of raising `BadRow`.
        targets_later: the batch gets its targets by `add_targets`: a loader's worker can't run a teacher on a GPU.

    Returns of a call: input_ids, attention_mask, labels (B, T); pixel_values (N, 3, H, W), without any image 0 rows,
    so that all ranks run the same graph; targets: task -> (N, Q, E), in 16 bits if their source gives that, else
    fp32; row_ids: list of str; bad_rows and long_rows: lists of str, one for each row left out. A batch that lost all
    its rows has one of two padding tokens, unsupervised.
    """

    def __init__(
        self,
        processor,
        target_sources: dict[str, TargetSource] | None = None,
        tasks: Sequence[dict] = (),
        max_length: int | None = None,
        truncate: bool = False,
        drop_bad_rows: bool = False,
        targets_later: bool = False,
    ):
        tokenizer = processor.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token before training")
        self.processor, self.max_length, self.truncate = processor, max_length, truncate
        self.drop_bad_rows, self.targets_later = drop_bad_rows, targets_later
        self.target_sources = target_sources or {}
        self.target_shapes = {task["name"]: (task["target_length"], task["target_dim"]) for task in tasks}
        self.image_ids = self._expand_image()
        vocabulary, task_tokens = tokenizer.get_added_vocab(), task_token_strings(tasks)
        task_ids = [vocabulary[token] for token in task_tokens if token in vocabulary]
        self.reserved = np.unique([*self.image_ids, *task_ids])  # what only an image may put into the chat
        self.chat_template = fit_chat_template(processor)
        text, _ = self._render(PROBE)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        self.reserved_per_image = np.isin(ids, self.reserved).sum()

    def __call__(self, rows: Sequence[dict]) -> dict:
        samples, dropped = [], {"bad_rows": [], "long_rows": []}
        for row in rows:
            try:
                samples.append(self.prepare(row))
            except BadRow as bad_row:
                if not self.drop_bad_rows:
                    raise BadRow(bad_row.kind, f"row {row['id']}: {bad_row}") from bad_row
                _drop(dropped, row["id"], bad_row)
        return self._whole_batch(samples, dropped, self.targets_later)

    def add_targets(self, batch: dict) -> dict:
        """The batch of `targets_later` with its targets."""
        samples, dropped = batch.pop("samples"), {name: batch[name] for name in ("bad_rows", "long_rows")}
        targets, wrong = self._targets(samples)
        return self._whole_batch(_left(samples, wrong, dropped), dropped) if wrong else {**batch, "targets": targets}

    def _whole_batch(self, samples: list[Sample], dropped: dict[str, list[str]], targets_later: bool = False) -> dict:
        batch, wrong = self._batch(samples)
        last = {"samples": samples}
        if not (wrong or targets_later):
            targets, wrong = self._targets(samples)
            last = {"targets": targets}
        if wrong:
            return self._whole_batch(_left(samples, wrong, dropped), dropped, targets_later)
        return {**batch, **last, "row_ids": [sample.id for sample in samples], **dropped}

    def _batch(self, samples: list[Sample]) -> tuple[dict, dict[int, BadRow]]:
        """The tensors of a batch but for its targets, or which samples can't be used, and why."""
        pad = self.processor.tokenizer.pad_token_id
        ids = [sample.encoded.ids for sample in samples] or [np.array([pad, pad])]
        labels = [sample.encoded.labels for sample in samples] or [np.array([IGNORE_INDEX, IGNORE_INDEX])]
        images = [image for sample in samples for image in sample.images]
        tensors = {
            "input_ids": _pad(ids, pad),
            "attention_mask": _pad([np.ones_like(row) for row in ids], 0),
            "labels": _pad(labels, IGNORE_INDEX),
            "pixel_values": self._pixel_values(images) if images else self.no_pixel_values,
        }
        return tensors, {}

    def prepare(self, row: dict) -> Sample:
        """The row ready for a batch but for its targets. Raises `BadRow`."""
        encoded = self.check_text(row)
        images = [open_source(image) for image in row["images"][: encoded.num_images]]
        others = row.get("target_images")
        targets_of = images if others is None else [open_source(image) for image in others[: encoded.num_images]]
        return Sample(str(row["id"]), encoded, images, targets_of)

    def check_text(self, row: dict) -> Encoded:
        """The row's tokens. Opens no image. Raises `BadRow`."""
        if "bad_row" in row:
            raise row["bad_row"]
        try:
            encoded = self.encode(row)
        except BadRow:
            raise
        except (IndexError, TypeError, ValueError) as error:  # lone surrogates, turns without a part
            raise BadRow("malformed", f"{type(error).__name__}: {error}") from error
        if self.max_length and encoded.full_length > self.max_length and not self.truncate:
            raise BadRow("too_long", f"{encoded.full_length} tokens, more than max_length={self.max_length}")
        if (encoded.labels == IGNORE_INDEX).all():
            if encoded.full_length > len(encoded.ids):
                raise BadRow("too_long", f"no supervised token within max_length={self.max_length}")
            raise BadRow("unsupervised", "no supervised token: no answer")
        return encoded

    def encode(self, row: dict) -> Encoded:
        tokenizer = self.processor.tokenizer
        text, spans = self.chat_template.text_and_spans(row["messages"])
        # The processor's own rule, so that training sees the ids of inference.
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not has_bos)
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        begins, ends = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        firsts, lasts = np.array([*spans, (len(text), len(text))]).T
        next_span = np.searchsorted(
            lasts[:-1], begins, side="right"
        )  # the first one that ends behind the token's begin
        is_image = ids == self.processor.image_token_id
        images = sum(part["type"] == "image" for message in row["messages"] for part in message["content"])
        if is_image.sum() != images or np.isin(ids, self.reserved).sum() != images * self.reserved_per_image:
            raise BadRow("malformed", f"a text has {self.processor.image_token} or a task token in it")
        labels = np.where((firsts[next_span] < ends) & ~is_image, ids, IGNORE_INDEX)
        sizes = np.where(is_image, len(self.image_ids), 1)
        full_length = int(sizes.sum())
        if self.truncate and self.max_length:
            kept = np.searchsorted(sizes.cumsum(), self.max_length, side="right")
            ids, labels, is_image, sizes = ids[:kept], labels[:kept], is_image[:kept], sizes[:kept]
        ids, labels, num_images = ids.repeat(sizes), labels.repeat(sizes), int(is_image.sum())
        ids[is_image.repeat(sizes)] = np.tile(self.image_ids, num_images)
        return Encoded(ids, labels, num_images, full_length, text)

    def _expand_image(self) -> np.ndarray:
        """The ids that an image's placeholder becomes."""
        blank = self._pixel_values([Image.new("RGB", (8, 8))])
        self.no_pixel_values = blank[:0]
        expansion = self.processor.replace_image_token({"pixel_values": blank}, 0)
        return np.array(self.processor.tokenizer(expansion, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[dict], **options) -> tuple[str, list[tuple[int, int]]]:
        return self.chat_template.render(messages, **options)

    def _pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    def _targets(self, samples: list[Sample]) -> tuple[dict[str, torch.Tensor], dict[int, BadRow]]:
        """The targets of the samples' images, and which samples have none that can be used, and why."""
        images = [image for sample in samples for image in sample.target_images]
        owners = [i for i, sample in enumerate(samples) for _ in sample.target_images]
        counts, targets, wrong = [len(sample.target_images) for sample in samples], {}, {}
        for name, source in self.target_sources.items():
            given = (images, counts) if isinstance(source, Motion) else (images,)
            expected = (len(images), *self.target_shapes[name])
            try:
                targets[name] = source(*given) if images else torch.zeros(expected)
            except (LookupError, OSError) as error:  # not in the cache: the file has changed since
                if not self.drop_bad_rows:
                    raise
                if len(samples) == 1:
                    return {}, {0: BadRow("target", f"task {name!r}: {error}")}
                alone = [self._targets([sample]) for sample in samples]
                wrong = {i: reasons[0] for i, (_, reasons) in enumerate(alone) if reasons}
                parts = {} if wrong else self.target_sources  # a passing error: now there are all
                return {name: torch.cat([one[name] for one, _ in alone]) for name in parts}, wrong
            if targets[name].dtype not in (torch.bfloat16, torch.float16):
                targets[name] = targets[name].float()
            if targets[name].shape != expected:
                found = f"targets {tuple(targets[name].shape)} from its teacher, {expected} from its configuration"
                raise ValueError(f"task {name!r} has {found}: set target_length and target_dim to the teacher's")
            finite = targets[name].isfinite().flatten(1).all(1).tolist()
            # Later these would spoil the contrastive columns of the whole step, and innocent rows would be blamed.
            bad = [owner for owner, good in zip(owners, finite, strict=True) if not good]
            if bad and not self.drop_bad_rows:
                bad = [samples[owner].id for owner in bad]
                raise FloatingPointError(f"task {name!r}: its teacher's targets of the rows {bad} are not finite")
            wrong |= dict.fromkeys(bad, BadRow("target", f"task {name!r}: its teacher's targets are not finite"))
        return targets, wrong


class AttachedCollator(OlaVlmCollator):
    """Rows -> a batch for a model with attached predictors (`attach`), by the processor of any family.

    What the processor returns goes to the model as it is (`image_grid_thw`, `pixel_attention_mask`, `image_sizes`,
    ...), with `labels` and `image_owner` (B, T): the images are found where the processor says that it put them, so it
    does not matter how many runs of tokens, tags and tiles it makes of one. A batch without images has one more row,
    the last, of a blank image and without labels, so that all ranks run the same graph, vision tower included.
    `square`: pad each image to a square with the processor's mean colour before it is given to it, the square that the
    teachers see. The other arguments and results are `OlaVlmCollator`'s; `max_length` counts image
    tokens, but `check_text`, before images are opened, counts each image as one.
    """

    def __init__(self, processor, target_sources=None, tasks=(), max_length=None, square=True, **options):
        super().__init__(processor, target_sources, tasks, max_length, **options)
        self.square = square
        self.blank_text, _ = self._render(PROBE)
        for token in task_token_strings(tasks):  # they go with images that have targets
            self.blank_text = self.blank_text.replace(token, "")

    def _expand_image(self) -> np.ndarray:
        return np.array([self.processor.image_token_id])

    def _batch(self, samples: list[Sample]) -> tuple[dict, dict[int, BadRow]]:
        tokenizer, encoded = self.processor.tokenizer, [sample.encoded for sample in samples]
        texts = [row.text for row in encoded]
        images = [[self._view(image) for image in sample.images] for sample in samples]
        if not any(images):
            texts.append(self.blank_text)
            images.append([BLANK])
        batch = self.processor(
            text=texts,
            images=images,
            padding=True,
            add_special_tokens=not (tokenizer.bos_token and texts[0].startswith(tokenizer.bos_token)),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            text_kwargs={"padding_side": "right"},
            images_kwargs={"return_tensors": "pt"},
        )
        begins, ends = np.array(batch.pop("offset_mapping")).transpose(2, 0, 1)
        replaced = batch.pop("text_replacement_offsets", None) or [()] * len(texts)
        batch.convert_to_tensors("pt")
        ids, attended = batch["input_ids"].numpy(), batch["attention_mask"].numpy() == 1
        owner, labels, number = np.full_like(ids, -1), np.full_like(ids, IGNORE_INDEX), 0
        for i, row in enumerate(encoded):
            for start, stop in (one["new_span"] for one in replaced[i]):
                owner[i, (begins[i] < stop) & (ends[i] > start)], number = number, number + 1
            words, its_words = attended[i] & (owner[i] < 0), row.ids != self.processor.image_token_id
            if len(replaced[i]) != row.num_images or not np.array_equal(ids[i, words], row.ids[its_words]):
                name = type(self.processor).__name__
                raise ValueError(f"{name} changes more of a text than its images, or doesn't tell where it puts them")
            labels[i, words] = row.labels[its_words]
        lengths = attended.sum(1).tolist()
        too_long = {i: n for i, n in enumerate(lengths[: len(samples)]) if self.max_length and n > self.max_length}
        limit = f"more than max_length={self.max_length}"
        wrong = {i: BadRow("too_long", f"{n} tokens, {limit}") for i, n in too_long.items()}
        if wrong and not self.drop_bad_rows:
            raise BadRow("too_long", "; ".join(f"row {samples[i].id}: {reason}" for i, reason in wrong.items()))
        return {**batch, "image_owner": torch.from_numpy(owner), "labels": torch.from_numpy(labels)}, wrong

    def _view(self, image: Image.Image) -> Image.Image:
        colour = tuple(round(255 * mean) for mean in self.processor.image_processor.image_mean)
        return ImageOps.pad(image, (max(image.size),) * 2, color=colour) if self.square else image


def _drop(dropped: dict[str, list[str]], row_id, bad_row: BadRow) -> None:
    dropped["long_rows" if bad_row.kind == "too_long" else "bad_rows"].append(f"row {row_id}: {bad_row}")


def _left(samples: list[Sample], wrong: dict[int, BadRow], dropped: dict[str, list[str]]) -> list[Sample]:
    for i, bad_row in wrong.items():
        _drop(dropped, samples[i].id, bad_row)
    return [sample for i, sample in enumerate(samples) if i not in wrong]


def _pad(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)
