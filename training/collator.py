"""The collators: rows (`training.rows`) -> a batch for `OlaVlmTrainer`.

N images of the batch in the order of their placeholders, Q queries, E target width.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from transformers.utils import logging

from ..configuration_ola_vlm import target_shape, task_token_strings
from ..targets.encoders import Motion, rescale_factor
from .chat_template import PROBE, fit_chat_template, special_tokens_around
from .rows import BadRow, open_source

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
# To see what the processor makes of an image, and in place of one where a batch has none.
BLANK = Image.new("RGB", (64, 64))
# Of another size, of which a processor may make more tokens, or tiles.
LARGE_BLANK = Image.new("RGB", (1024, 1024))
# Types of targets that stay as they are; others become float32. 16 bits: half the memory, and half of what ranks
# exchange, and the loss makes float32 of them. Integers: numbers of words.
KEPT_DTYPES = (torch.bfloat16, torch.float16, torch.int32)
# Fills the last batch of an evaluation; it is left out as the batch is made.
PADDING_ROW = {"id": "", "is_padding": True}

# Images (and of a Motion the counts of samples) -> (N, Q, E).
TargetSource = Callable[..., torch.Tensor]
# Index of a sample -> why it can't be used.
Faults = dict[int, BadRow]


class Encoded(NamedTuple):
    """Token ids of a row, images expanded; its labels; how many of its images they hold; its length if it were not
    truncated; the chat as text, images not expanded."""

    ids: np.ndarray
    labels: np.ndarray
    num_images: int
    full_length: int
    text: str


class Sample(NamedTuple):
    """A row on its way into a batch: its images opened, `target_images` those whose targets it gets; `sequence`: of
    packed rows the number of the batch's sequence that it goes into."""

    id: str
    encoded: Encoded
    images: list[Image.Image]
    target_images: list[Image.Image]
    sequence: int | None = None


@dataclass
class DroppedRows:
    """A line for each row that a batch was to have and hasn't: the row and why. The names are those in the batch."""

    bad_rows: list[str] = field(default_factory=list)
    long_rows: list[str] = field(default_factory=list)

    def add(self, row_id: str, bad_row: BadRow) -> None:
        line = f"row {row_id}: {bad_row}"
        if bad_row.kind == "too_long":
            self.long_rows.append(line)
        else:
            self.bad_rows.append(line)

    def take_out(self, samples: list[Sample], faults: Faults) -> list[Sample]:
        """The samples without fault; the others are added here."""
        for i, bad_row in faults.items():
            self.add(samples[i].id, bad_row)
        return [sample for i, sample in enumerate(samples) if i not in faults]


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
        padding_free: all packed rows of a batch become one row without padding, for attention that computes nothing
            between packed rows, as flash attention.

    Returns of a call: input_ids, attention_mask, labels (B, T); pixel_values (N, 3, H, W), without any image 0 rows,
    so that all ranks run the same graph; targets: task -> (N, Q, E), in 16 bits if their source gives that, numbers of
    words in int32, else fp32; row_ids: list of str; bad_rows and long_rows: lists of str, one for each row left out. A
    batch that lost all its rows has one of two padding tokens, unsupervised.

    Given lists of rows (`training.packing.PackedRows`), each becomes one row of the batch. There is no attention_mask
    then but position_ids (B, T), which begin anew with each row and with the padding, transformers' form of packing.
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
        padding_free: bool = False,
    ):
        tokenizer = processor.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token before training")
        self.processor = processor
        self.target_sources = target_sources or {}
        self.target_shapes = {task["name"]: target_shape(task) for task in tasks}
        self.max_length = max_length
        self.truncate = truncate
        self.drop_bad_rows = drop_bad_rows
        self.targets_later = targets_later
        self.padding_free = padding_free

        self.chat_template = fit_chat_template(processor)
        self._check_adds_nothing_behind()
        self.added_ids = np.array([*tokenizer.added_tokens_decoder], dtype=np.int64)
        self.image_ids = self._image_token_ids()
        # What only an image may put into the chat: were it in a text, images would be found where there are none.
        vocabulary = tokenizer.get_added_vocab()
        task_ids = [vocabulary[token] for token in task_token_strings(tasks) if token in vocabulary]
        # Gemma 3's expanded tokens are others than its template's mark; Qwen's models look for a video's, too.
        media_ids = [*processor.image_token_ids, *processor.video_token_ids, *processor.audio_token_ids]
        # Of a video's token that the vocabulary lacks the id is the unknown token's, which any text may have.
        media_ids = [token for token in media_ids if token not in (None, tokenizer.unk_token_id)]
        self.reserved_ids = np.unique([*self.image_ids, *media_ids, *task_ids])
        # The template itself may write some beside an image: so many are no fault of the text's.
        probe_text, _ = self._render(PROBE)
        probe_ids = tokenizer(probe_text, add_special_tokens=False)["input_ids"]
        self.reserved_per_image = np.isin(probe_ids, self.reserved_ids).sum()

    def __getstate__(self) -> dict:
        """What a loader's worker gets where it is started anew: with `targets_later` no teachers, which stay here."""
        state = self.__dict__.copy()
        if self.targets_later:
            state["target_sources"] = {}
        return state

    def __call__(self, rows: Sequence[dict] | Sequence[list[dict]]) -> dict:
        samples = []
        dropped = DroppedRows()
        for sequence, row in _with_sequences(rows):
            if row.get("is_padding"):
                continue
            # One bad row of millions need not end a long run: it can be named, counted and left out.
            try:
                samples.append(self.prepare(row)._replace(sequence=sequence))
            except BadRow as bad_row:
                if not self.drop_bad_rows:
                    raise BadRow(bad_row.kind, f"row {row['id']}: {bad_row}") from bad_row
                dropped.add(row["id"], bad_row)
        return self._make_batch(samples, dropped, with_targets=not self.targets_later)

    def add_targets(self, batch: dict) -> dict:
        """The batch of `targets_later` with its targets."""
        samples = batch.pop("samples")
        targets, faults = self._targets(samples)
        if not faults:
            batch["targets"] = targets
            return batch
        # A row whose image has no target takes its tokens and pixels along: the batch is put together anew.
        dropped = DroppedRows(bad_rows=batch["bad_rows"], long_rows=batch["long_rows"])
        return self._make_batch(dropped.take_out(samples, faults), dropped, with_targets=True)

    def prepare(self, row: dict) -> Sample:
        """The row ready for a batch but for its targets. Raises `BadRow`."""
        encoded = self.check_text(row)
        # Of a row that is cut, the images whose placeholders are left.
        images = [open_source(image) for image in row["images"][: encoded.num_images]]
        target_images = images
        # The control with shuffled targets: the model sees one image, its teachers another.
        if row.get("target_images") is not None:
            target_images = [open_source(image) for image in row["target_images"][: encoded.num_images]]
        return Sample(id=str(row["id"]), encoded=encoded, images=images, target_images=target_images)

    # ------------------------------------------------------------------------------------------------ a row's tokens
    def check_text(self, row: dict) -> Encoded:
        """The row's tokens. Opens no image. Raises `BadRow`."""
        if "bad_row" in row:
            raise row["bad_row"]
        try:
            encoded = self.encode(row)
        except BadRow:
            raise
        except (IndexError, TypeError, ValueError) as error:
            # What a template or a tokenizer refuses.
            raise BadRow("malformed", f"{type(error).__name__}: {error}") from error
        if self.max_length and encoded.full_length > self.max_length and not self.truncate:
            raise BadRow("too_long", f"{encoded.full_length} tokens, more than max_length={self.max_length}")
        # A folder of images has no answers, and needs none: embedding losses learn from it.
        if (encoded.labels == IGNORE_INDEX).all() and row.get("has_text", True):
            # The answer was cut off: the limit's doing, not the row's.
            if encoded.full_length > len(encoded.ids):
                raise BadRow("too_long", f"no supervised token within max_length={self.max_length}")
            raise BadRow("unsupervised", "no supervised token: no answer")
        return encoded

    def encode(self, row: dict) -> Encoded:
        """The row's tokens, whatever they are: `check_text` says whether one can train on them. `BadRow` for a text
        that has an image's or a task's token in it."""
        # The chat, its T tokens, and each token's characters.
        text, spans = self.chat_template.text_and_spans(row["messages"])
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise BadRow("malformed", f"a text has half a character, {half!r}: write it as UTF-8") from error
        encoding = self.processor.tokenizer(
            text,
            add_special_tokens=self._lacks_bos(text),
            return_offsets_mapping=True,
        )
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        is_image = ids == self.processor.image_token_id
        self._check_reserved(row, ids, num_placeholders=int(is_image.sum()))

        # Supervised is what the assistant says.
        is_supervised, begins_before = _overlap(spans, offsets, text_length=len(text))
        # Phi-3's marks take the white space behind them along, an answer's, too: they are the prompt's still.
        is_prompts = begins_before & np.isin(ids, self.added_ids)
        is_supervised &= ~is_image & ~is_prompts
        labels = np.where(is_supervised, ids, IGNORE_INDEX)

        # How many tokens each one becomes; cut where a whole one doesn't fit, so never inside an image.
        sizes = np.where(is_image, len(self.image_ids), 1)
        full_length = int(sizes.sum())
        if self.truncate and self.max_length:
            kept = np.searchsorted(sizes.cumsum(), self.max_length, side="right")
            ids = ids[:kept]
            labels = labels[:kept]
            is_image = is_image[:kept]
            sizes = sizes[:kept]

        # Each placeholder becomes the image's tokens.
        num_images = int(is_image.sum())
        expanded = ids.repeat(sizes)
        expanded[is_image.repeat(sizes)] = np.tile(self.image_ids, num_images)
        return Encoded(
            ids=expanded,
            labels=labels.repeat(sizes),
            num_images=num_images,
            full_length=full_length,
            text=text,
        )

    def _check_reserved(self, row: dict, ids: np.ndarray, num_placeholders: int) -> None:
        num_images = 0
        for message in row["messages"]:
            num_images += sum(part["type"] == "image" for part in message["content"])
        num_reserved = np.isin(ids, self.reserved_ids).sum()
        if num_placeholders != num_images or num_reserved != num_images * self.reserved_per_image:
            raise BadRow("malformed", f"a text has {self.processor.image_token} or a task token in it")

    def _lacks_bos(self, text: str) -> bool:
        """The processor's own rule, so that training sees the ids of inference."""
        bos_token = self.processor.tokenizer.bos_token
        return bos_token is None or not text.startswith(bos_token)

    def _check_adds_nothing_behind(self) -> None:
        """ValueError for a tokenizer that ends each text, prompts included, with a token of its own."""
        _, behind = special_tokens_around(self.processor.tokenizer)
        prompt = self.chat_template.prompt(PROBE[:1])
        if behind and self._lacks_bos(prompt):
            what = f"the tokenizer adds {''.join(behind)} behind each text, a question's prompt, too"
            raise ValueError(f"{what}: set its add_eos_token to false, or take it out of its post-processor")

    def _image_token_ids(self) -> np.ndarray:
        """The ids that an image's placeholder becomes."""
        pixel_values = self._pixel_values([BLANK])
        # Whatever the processor writes: LLaVA's tokens, ours with task tokens, another number with further encoders.
        expansion = self.processor.replace_image_token({"pixel_values": pixel_values}, 0)
        return np.array(self.processor.tokenizer(expansion, add_special_tokens=False)["input_ids"])

    def tokens_of_image(self, image_token_id: int) -> int | None:
        """How many of its tokens are the image itself; None where images differ in it. The model's id counts: Gemma
        3's processor calls the mark in front of them its image token."""
        return int((self.image_ids == image_token_id).sum())

    def check_tokens(self, tasks: Sequence[dict], image_token_id: int) -> None:
        """ValueError if an image's tokens, which are to be the targets themselves, are not as many."""
        tokens = self.tokens_of_image(image_token_id)
        for task in tasks:
            length = task["target_length"]
            if task["predictor"] == "none" and tokens not in (None, length):
                sizes = f"an image has {tokens} tokens, its targets {length} positions"
                raise ValueError(f"task {task['name']!r}: {sizes}: without a predictor set target_length to {tokens}")

    def _render(self, messages: list[dict], **options) -> tuple[str, list[tuple[int, int]]]:
        return self.chat_template.render(messages, **options)

    def check_max_length(self) -> None:
        """ValueError if `max_length` has no room for an image."""
        needed = self._shortest_question()
        if self.max_length and self.max_length < needed:
            what = f"max_length {self.max_length} has no room for an image, which with a word is {needed} tokens"
            raise ValueError(f"{what}: give more, or leave it out")

    def _shortest_question(self) -> int:
        """Tokens of a question of one word about an image."""
        return self.encode({"id": "", "messages": PROBE[:1]}).full_length

    # ------------------------------------------------------------------------------------------------------ a batch
    def _make_batch(self, samples: list[Sample], dropped: DroppedRows, with_targets: bool) -> dict:
        """The batch of those samples that can be used; the others go to `dropped`."""
        # Which rows are too long or have no target is known only when they are put together: then again without them.
        while True:
            batch, faults = self._tensors(samples)
            targets = {}
            if with_targets and not faults:
                targets, faults = self._targets(samples)
            if not faults:
                break
            samples = dropped.take_out(samples, faults)
        if with_targets:
            batch["targets"] = targets
        else:
            batch["samples"] = samples
        batch["row_ids"] = [sample.id for sample in samples]
        batch["bad_rows"] = dropped.bad_rows
        batch["long_rows"] = dropped.long_rows
        return batch

    def _tensors(self, samples: list[Sample]) -> tuple[dict, Faults]:
        """The tensors of a batch but for its targets, or which samples can't be used, and why."""
        pad = self.processor.tokenizer.pad_token_id
        is_packed = bool(samples) and samples[0].sequence is not None
        if is_packed:
            tensors = pack_tokens(samples, pad, self.padding_free)
        else:
            tensors = pad_tokens(samples, pad)
        images = list(itertools.chain.from_iterable(sample.images for sample in samples))
        if images:
            tensors["pixel_values"] = self._pixel_values(images)
        else:
            tensors["pixel_values"] = self.no_pixel_values
        return tensors, {}

    def _pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    @cached_property
    def no_pixel_values(self) -> torch.Tensor:
        return self._pixel_values([BLANK])[:0]

    # --------------------------------------------------------------------------------------------------- its targets
    def _targets(self, samples: list[Sample]) -> tuple[dict[str, torch.Tensor], Faults]:
        """The targets of the samples' images, or which samples have none that can be used, and why."""
        # All at once, which is fast; one by one only when that fails.
        try:
            targets = self._ask_sources(samples)
        except BadRow:
            targets, faults = self._ask_one_by_one(samples)
            if faults:
                return {}, faults
        return targets, self._not_finite(samples, targets)

    def _ask_sources(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Task -> (N, Q, E). `BadRow` if a source has no target of an image and bad rows are dropped."""
        images = list(itertools.chain.from_iterable(sample.target_images for sample in samples))
        counts = [len(sample.target_images) for sample in samples]
        targets = {}
        for name, source in self.target_sources.items():
            expected = (len(images), *self.target_shapes[name])
            if not images:
                targets[name] = torch.zeros(expected)
                continue
            try:
                if isinstance(source, Motion):
                    # Motion is between images of one sample.
                    target = source(images, counts)
                else:
                    target = source(images)
            except (LookupError, OSError) as error:
                # Not in the cache: the file has changed since it was filled.
                if not self.drop_bad_rows:
                    raise
                raise BadRow("target", f"task {name!r}: {error}") from error
            if target.shape != expected:
                shapes = f"targets {tuple(target.shape)} from its teacher, {expected} from its configuration"
                raise ValueError(f"task {name!r} has {shapes}: set target_length and target_dim to the teacher's")
            if target.dtype not in KEPT_DTYPES:
                target = target.float()
            targets[name] = target
        return targets

    def _ask_one_by_one(self, samples: list[Sample]) -> tuple[dict[str, torch.Tensor], Faults]:
        """The same, if a source failed for one of the samples, of which it didn't say."""
        by_sample = []
        faults = {}
        for i, sample in enumerate(samples):
            try:
                targets = self._ask_sources([sample])
            except BadRow as bad_row:
                faults[i] = bad_row
                continue
            by_sample.append(targets)
            not_finite = self._not_finite([sample], targets)
            if not_finite:
                faults[i] = not_finite[0]
        if faults:
            return {}, faults
        # A passing error: now there are all.
        joined = {}
        for name in self.target_sources:
            joined[name] = torch.cat([targets[name] for targets in by_sample])
        return joined, {}

    def _not_finite(self, samples: list[Sample], targets: dict[str, torch.Tensor]) -> Faults:
        """Samples with a target that isn't finite. Later it would spoil the contrastive columns of the whole step,
        and innocent rows would be blamed. FloatingPointError unless bad rows are dropped."""
        # For each image, the sample that it belongs to.
        owners = []
        for i, sample in enumerate(samples):
            owners += [i] * len(sample.target_images)
        faults = {}
        for name, target in targets.items():
            # (N, Q, E) -> (N,)
            is_finite = target.isfinite().flatten(1).all(1).tolist()
            bad = [owner for owner, good in zip(owners, is_finite, strict=True) if not good]
            if bad and not self.drop_bad_rows:
                row_ids = [samples[i].id for i in bad]
                raise FloatingPointError(f"task {name!r}: its teacher's targets of the rows {row_ids} are not finite")
            for i in bad:
                faults[i] = BadRow("target", f"task {name!r}: its teacher's targets are not finite")
        return faults


class AttachedCollator(OlaVlmCollator):
    """Rows -> a batch for a model with attached predictors (`attach`), by the processor of any family.

    What the processor returns goes to the model as it is (`image_grid_thw`, `pixel_attention_mask`, `image_sizes`,
    ...), with `labels` and `image_owner` (B, T): the images are found where the processor says that it put them, so it
    does not matter how many runs of tokens, tags and tiles it makes of one. A batch without images has one more row,
    the last, of a blank image and without labels, so that all ranks run the same graph, vision tower included.
    `square`: pad each image to a square with the processor's mean color before it is given to it, the square that the
    teachers see; tasks that predict each place of it from that place's token need it. `side`: and resize that square
    to so many pixels, so that all images have equally many tokens. `image_options`: more arguments of the image
    processor, such as `{"do_image_splitting": False}`. The other arguments and results are `OlaVlmCollator`'s;
    `max_length` counts image tokens, but `check_text`, before images are opened, counts each image as one.
    """

    def __init__(
        self,
        processor,
        target_sources=None,
        tasks=(),
        max_length=None,
        square: bool = True,
        side: int | None = None,
        image_options: dict | None = None,
        **options,
    ):
        check_square(square, tasks)
        super().__init__(processor, target_sources, tasks, max_length, **options)
        self.square = square
        self.side = side
        self.image_options = image_options or {}
        self.blank_text, _ = self._render(PROBE)
        # Task tokens go with images that have targets, and the blank one has none.
        for token in task_token_strings(tasks):
            self.blank_text = self.blank_text.replace(token, "")

    def _image_token_ids(self) -> np.ndarray:
        """The template's mark, which is one token until the processor expands it."""
        return np.array([self.processor.image_token_id])

    def tokens_of_image(self, image_token_id: int) -> int | None:
        # Without a side, an image has as many as its own size makes.
        if not self.square or self.side is None:
            return None
        return int(self._is_image(BLANK, image_token_id).sum())

    def _is_image(self, image: Image.Image, image_token_id: int) -> torch.Tensor:
        """Which tokens (T,) of a question about that image are the image itself."""
        text, _ = self._render(PROBE[:1])
        batch = self.inputs(text, [image])
        return ((batch["image_owner"] == 0) & (batch["input_ids"] == image_token_id))[0]

    def check_tokens(self, tasks: Sequence[dict], image_token_id: int) -> None:
        """ValueError also if images of any size become tiles where their tokens are to make the targets' grid; a
        warning if it depends on their size whether they fit."""
        super().check_tokens(tasks, image_token_id)
        # A resampler reads an image's tokens wherever they are, and a mean over all of them needs no grid.
        placed = [task for task in tasks if task["predictor"] != "resampler" and task["target_length"] > 1]
        if not placed:
            return
        of_sizes = [self._is_image(blank, image_token_id) for blank in (BLANK, LARGE_BLANK)]
        counts = [int(is_image.sum()) for is_image in of_sizes]
        # A piece begins where the token before is none of the image's.
        pieces = [int((is_image[1:] & ~is_image[:-1]).sum() + is_image[0]) for is_image in of_sizes]
        for task in placed:
            if min(pieces) > 1:
                what = f"an image has {max(pieces)} tiles, which make no grid"
                raise ValueError(f"task {task['name']!r}: {what}: set its processor's splitting of images to false")
            need = "one tile"
            is_needed = max(pieces) > 1
            if task["predictor"] == "none":
                need = "one tile of as many tokens as targets"
                is_needed = is_needed or len(set(counts)) > 1
            # It may be that all of the run's images are of one size.
            if is_needed:
                differ = f"images of {BLANK.width} and {LARGE_BLANK.width} pixels have {counts} tokens, {pieces} tiles"
                logger.warning(f"task {task['name']!r}: {differ}, and it needs {need}: give image_side unless all fit")

    def _shortest_question(self) -> int:
        text, _ = self._render(PROBE[:1])
        batch, *_ = self._process([text], [[BLANK]])
        return batch["input_ids"].shape[1]

    def _tensors(self, samples: list[Sample]) -> tuple[dict, Faults]:
        if samples and samples[0].sequence is not None:
            raise ValueError("packed rows are for OLA-VLM's own models, not for attached predictors: give plain rows")
        # The processor makes tokens and pixels; it may make of an image what it likes.
        texts = [sample.encoded.text for sample in samples]
        images = [sample.images for sample in samples]
        if not any(images):
            # One more row, so that the vision tower runs on every rank.
            texts.append(self.blank_text)
            images.append([BLANK])
        try:
            batch, offsets, replacements = self._process(texts, images)
        except ValueError:
            faults = self._refused(samples)
            # None of them alone: it's no row's fault.
            if not faults:
                raise
            return {}, faults
        ids = batch["input_ids"].numpy()
        is_attended = batch["attention_mask"].numpy() == 1

        # The blank image is nobody's: it has no target.
        owners = _image_owners(offsets, replacements[: len(samples)])
        # Labels were made of the text with one token an image: its words are found again among the processor's tokens.
        labels = np.full_like(ids, IGNORE_INDEX)
        for i, sample in enumerate(samples):
            is_word = is_attended[i] & (owners[i] < 0)
            labels[i, is_word] = self._labels_of_words(
                encoded=sample.encoded,
                ids=ids[i, is_word],
                offsets=offsets[i, is_word],
                replacements=replacements[i],
            )
        batch["image_owner"] = torch.from_numpy(owners)
        batch["labels"] = torch.from_numpy(labels)
        # Without the blank image's row.
        lengths = is_attended.sum(1).tolist()[: len(samples)]
        return dict(batch), self._too_long(samples, lengths)

    def _refused(self, samples: list[Sample]) -> Faults:
        """Samples that the processor can't take, such as of an image that is too long and narrow for Qwen's. BadRow
        unless bad rows are dropped."""
        faults = {}
        for i, sample in enumerate(samples):
            # No processor takes a call without any image.
            if not sample.images:
                continue
            try:
                self._process([sample.encoded.text], [sample.images])
            except ValueError as error:
                reason = f"{type(self.processor).__name__} refuses it: {error}"
                faults[i] = BadRow("undecodable", reason)
        self._raise_unless_dropped(samples, faults)
        return faults

    def _labels_of_words(
        self, encoded: Encoded, ids: np.ndarray, offsets: np.ndarray, replacements: Sequence[dict]
    ) -> np.ndarray:
        """The labels of the words (W,) that the processor left beside a row's images; `offsets` (W, 2): their
        characters in the text in which images are expanded.

        Gemma 3's puts line breaks around an image, and its tokenizer makes one token of them and of the line breaks
        that the row has there. Such white space is the image's then. ValueError if the words differ in anything else.
        """
        is_word = encoded.ids != self.processor.image_token_id
        if len(replacements) == encoded.num_images and not np.array_equal(ids, encoded.ids[is_word]):
            spans = _characters_before_expansion(offsets, replacements)
            is_word &= ~self._merged_white_space(encoded, kept=spans)
        if len(replacements) != encoded.num_images or not np.array_equal(ids, encoded.ids[is_word]):
            name = type(self.processor).__name__
            raise ValueError(f"{name} changes more of a text than its images, or doesn't tell where it puts them")
        return encoded.labels[is_word]

    def _merged_white_space(self, encoded: Encoded, kept: np.ndarray) -> np.ndarray:
        """(T,): which of a row's tokens are white space without a label, at other characters than `kept` (W, 2)."""
        encoding = self.processor.tokenizer(
            encoded.text,
            add_special_tokens=self._lacks_bos(encoded.text),
            return_offsets_mapping=True,
        )
        kept_spans = set(map(tuple, kept.tolist()))
        is_merged = encoded.labels == IGNORE_INDEX
        # A row that was cut has fewer tokens than its text.
        offsets = encoding["offset_mapping"][: len(is_merged)]
        for i, (begin, end) in enumerate(offsets):
            is_merged[i] &= encoded.text[begin:end].isspace() and (begin, end) not in kept_spans
        return is_merged

    def inputs(self, text: str, images: Sequence[Image.Image]) -> BatchFeature:
        """The model's for that prompt about each of the images, one a row, with `image_owner`."""
        batch, offsets, replacements = self._process([text] * len(images), [[image] for image in images])
        batch["image_owner"] = torch.from_numpy(_image_owners(offsets, replacements))
        return batch

    def _process(
        self, texts: list[str], images: list[list[Image.Image]]
    ) -> tuple[BatchFeature, np.ndarray, Sequence[Sequence[dict]]]:
        """What the processor makes of texts and each one's images, as tensors; the tokens' places in the text
        (B, T, 2); and of each row which characters stand for an image."""
        views = []
        for of_row in images:
            views.append([self._view(image) for image in of_row])
        batch = self.processor(
            text=texts,
            images=views,
            padding=True,
            add_special_tokens=self._lacks_bos(texts[0]),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            text_kwargs={"padding_side": "right"},
            images_kwargs={**self.image_options, "return_tensors": "pt"},
        )
        # Not for the model.
        offsets = np.array(batch.pop("offset_mapping"))
        replacements = batch.pop("text_replacement_offsets", None) or [()] * len(texts)
        return batch.convert_to_tensors("pt"), offsets, replacements

    def _too_long(self, samples: list[Sample], lengths: list[int]) -> Faults:
        """Samples of more than `max_length` tokens. BadRow unless bad rows are dropped."""
        faults = {}
        for i, length in enumerate(lengths):
            if self.max_length and length > self.max_length:
                faults[i] = BadRow("too_long", f"{length} tokens, more than max_length={self.max_length}")
        self._raise_unless_dropped(samples, faults)
        return faults

    def _raise_unless_dropped(self, samples: list[Sample], faults: Faults) -> None:
        """BadRow, which names the rows, for faults of one kind, unless bad rows are dropped."""
        if self.drop_bad_rows or not faults:
            return
        kind = next(iter(faults.values())).kind
        raise BadRow(kind, "; ".join(f"row {samples[i].id}: {reason}" for i, reason in faults.items()))

    def _view(self, image: Image.Image) -> Image.Image:
        if not self.square:
            return image
        # Without a `side`, the image's longer one: it is padded, not scaled.
        side = self.side or max(image.size)
        # The mean is 0 once it is normalized: padding says nothing.
        return ImageOps.pad(image, (side, side), color=self._mean_color())

    def _mean_color(self) -> tuple[int, ...]:
        """Gray, if the processor has none."""
        image_processor = self.processor.image_processor
        mean = image_processor.image_mean
        if mean is None:
            return (128, 128, 128)
        # One number may stand for all three.
        if isinstance(mean, (int, float)):
            mean = [mean] * 3
        # In units of a picture's own 0 to 255: a mean may be in these already.
        names = ("do_rescale", "rescale_factor")
        unit = 255 * rescale_factor({name: getattr(image_processor, name, None) for name in names})
        return tuple(round(255 * value / unit) for value in mean)


def check_square(square: bool, tasks: Sequence[dict]) -> None:
    """ValueError if images keep their own form (`square` is False) and a task's predictions, each made of an image's
    token, are compared place by place with a teacher's, who sees the padded square."""
    if square:
        return
    for task in tasks:
        predictor = task.get("predictor", "resampler")
        # A target of one position is of the whole image: it has no places.
        if predictor != "resampler" and task["target_length"] > 1:
            what = f"image_square is false, and task {task['name']!r} (predictor {predictor}) predicts places"
            remedy = "set image_square to true, or predictor to resampler"
            raise ValueError(f"{what} of the square that its teacher sees: {remedy}")


def _with_sequences(rows: Sequence[dict] | Sequence[list[dict]]) -> Iterator[tuple[int | None, dict]]:
    """Each row and, if they are packed, the number of the list that it is in."""
    for i, given in enumerate(rows):
        if isinstance(given, dict):
            yield None, given
            continue
        for row in given:
            yield i, row


def pad_tokens(samples: Sequence[Sample], pad: int) -> dict[str, torch.Tensor]:
    """A row of the batch for each sample."""
    ids = [sample.encoded.ids for sample in samples]
    labels = [sample.encoded.labels for sample in samples]
    if not samples:
        # A rank whose rows are all bad runs the same graph as the others: two tokens, as the loss compares each with
        # the one before it.
        ids = [np.array([pad, pad])]
        labels = [np.array([IGNORE_INDEX, IGNORE_INDEX])]
    return {
        "input_ids": _pad(ids, pad),
        "attention_mask": _pad([np.ones_like(row) for row in ids], 0),
        "labels": _pad(labels, IGNORE_INDEX),
    }


def pack_tokens(samples: Sequence[Sample], pad: int, padding_free: bool = False) -> dict[str, torch.Tensor]:
    """A row of the batch for the samples of each sequence, one behind the other; `padding_free`: one for all."""
    groups = [list(group) for _, group in itertools.groupby(samples, key=attrgetter("sequence"))]
    if padding_free:
        groups = [list(samples)]
    ids = []
    labels = []
    positions = []
    for group in groups:
        packed = [sample.encoded for sample in group]
        starts = np.cumsum([0, *(len(encoded.ids) for encoded in packed[:-1])])
        ids.append(np.concatenate([encoded.ids for encoded in packed]))
        packed_labels = np.concatenate([encoded.labels for encoded in packed])
        # No row's end predicts the next one's beginning.
        packed_labels[starts] = IGNORE_INDEX
        labels.append(packed_labels)
        positions.append(np.concatenate([np.arange(len(encoded.ids)) for encoded in packed]))
    # Padding is a row of its own, whose positions begin anew: else it would belong to the last row.
    longest = max(map(len, ids))
    positions = [np.concatenate([row, np.arange(longest - len(row))]) for row in positions]
    return {
        "input_ids": _pad(ids, pad),
        "position_ids": _pad(positions, 0),
        "labels": _pad(labels, IGNORE_INDEX),
    }


def _overlap(spans: list[tuple[int, int]], offsets: np.ndarray, text_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens, of `offsets` (T, 2) in the text, have a character in one of the spans, which are in order; and
    which begin before the span that ends next."""
    behind_all = (text_length, text_length)
    firsts, lasts = np.array([*spans, behind_all]).T
    begins, ends = offsets.T
    # The first span that ends behind a token's begin is the only one that can begin before the token's end.
    next_span = np.searchsorted(lasts[:-1], begins, side="right")
    return firsts[next_span] < ends, begins < firsts[next_span]


def _image_owners(offsets: np.ndarray, replacements: Sequence[Sequence[dict]]) -> np.ndarray:
    """(B, T): the number of the image that a token belongs to, counted through the batch, -1 for none.

    `offsets` (B, T, 2): the tokens' characters. `replacements`: of each row, which characters stand for an image.
    """
    # Each (B, T).
    begins, ends = offsets.transpose(2, 0, 1)
    owners = np.full(begins.shape, -1)
    number = 0
    for i, row in enumerate(replacements):
        for replacement in row:
            start, stop = replacement["new_span"]
            owners[i, (begins[i] < stop) & (ends[i] > start)] = number
            number += 1
    return owners


def _characters_before_expansion(offsets: np.ndarray, replacements: Sequence[dict]) -> np.ndarray:
    """(W, 2): where tokens at `offsets` (W, 2), none of them an image's, lie in the text without expanded images."""
    ends = []
    growths = [0]
    for replacement in replacements:
        old_start, old_stop = replacement["span"]
        new_start, new_stop = replacement["new_span"]
        ends.append(new_stop)
        # How much longer the text has become with this image.
        growths.append((new_stop - new_start) - (old_stop - old_start))
    num_before = np.searchsorted(ends, offsets[:, 0], side="right")
    return offsets - np.cumsum(growths)[num_before, None]


def _pad(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)
