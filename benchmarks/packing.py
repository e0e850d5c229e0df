"""Packed rows against random and grouped batches, on LLaVA-665K's lengths: `python benchmarks/packing.py`.

Prints how many tokens are computed for each that is needed, the arithmetic that they cost at Llama-3-8B's sizes, and
how long steps of fine-tuning take, in turns: processor time for each token that is needed, of a small language model,
which no GPU helps.

The lengths are made up (`SOURCES`), from what is published: how many rows each source has (LLaVA-1.5's mixture, whose
file has 665,298 rows, 40,688 without an image), the sizes of LLaVA's own three files, and how many questions VQAv2,
GQA and OCR-VQA ask about an image. What is not published is assumed: tokens a question, and how lengths spread around
their mean (log-normal).
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from plan import LLAMA3, student_config
from step import LLM, TOWER

from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.collator import Encoded, Sample, pack_tokens, pad_tokens
from ola_vlm.training.packing import pack_lengths
from ola_vlm.training.sampler import GroupedSampler
from ola_vlm.training.stages import apply_stage
from ola_vlm.training.trainer import OlaVlmTrainer


class Source(NamedTuple):
    """Rows of one kind: how many, the mean tokens of their text, the standard deviation of the text's logarithm."""

    rows: int
    tokens: int
    spread: float
    has_image: bool = True


SOURCES = {
    # LLaVA's own: 126, 20.5 and 79.6 MB of JSON for 58, 23 and 77 thousand rows.
    "conversation": Source(57829, 370, 0.4),
    "detail": Source(23240, 155, 0.4),
    "complex reasoning": Source(76643, 190, 0.4),
    # Short answers. The numbers behind are the questions about an image, where they are published.
    "VQAv2": Source(82783, 90, 0.3),  # 5.4 questions an image
    "GQA": Source(72140, 200, 0.3),  # 13
    "OKVQA": Source(8998, 30, 0.3),
    "OCR-VQA": Source(80000, 105, 0.3),  # 5
    "A-OKVQA": Source(66160, 75, 0.3),
    "TextCaps": Source(21953, 110, 0.4),
    # Regions with coordinates, and in ShareGPT conversations without images: assumed to spread more.
    "RefCOCO": Source(48447, 280, 0.6),
    "VG": Source(86417, 400, 0.6),
    "ShareGPT": Source(40688, 1400, 0.8, has_image=False),
}
IMAGE_TOKENS, SYSTEM_TOKENS = 576, 35
MAX_LENGTH = 2048  # longer rows are cut there, as in LLaVA
PAD, SUPERVISED = 0, 0.3  # the share of a row's text that is answers


def make_rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row, in a random order, and whether it has an image."""
    rng = np.random.default_rng(seed)
    lengths = []
    has_image = []
    for source in SOURCES.values():
        # A log-normal's mean is exp(mu + sigma^2 / 2): this mu gives the source's mean tokens.
        mean = np.log(source.tokens) - source.spread**2 / 2
        texts = rng.lognormal(mean, source.spread, source.rows).round().astype(int)
        images = IMAGE_TOKENS if source.has_image else 0
        lengths.append(np.minimum(SYSTEM_TOKENS + images + texts, MAX_LENGTH))
        has_image.append(np.full(source.rows, source.has_image))
    # The same order for both arrays.
    order = rng.permutation(sum(source.rows for source in SOURCES.values()))
    return np.concatenate(lengths)[order], np.concatenate(has_image)[order]


class Batches(NamedTuple):
    """Of each batch of a device: of each of its sequences the tokens of its rows. `is_packed`: several rows each;
    `padding_free`: the sequences of a batch are joined."""

    batches: list[list[list[int]]]
    is_packed: bool = False
    padding_free: bool = False

    @property
    def needed(self) -> int:
        """Tokens."""
        return sum(sum(map(sum, batch)) for batch in self.batches)

    @property
    def computed(self) -> int:
        """Tokens, padding included: each sequence of a batch is as long as the longest one."""
        if self.padding_free:
            return self.needed
        return sum(len(batch) * max(map(sum, batch)) for batch in self.batches)

    def flops(self, skips: bool) -> float:
        """Of Llama-3-8B's blocks in a forward pass. `skips`: attention is computed within rows only, and no later
        tokens, as by flash attention; else of every token to every token of its sequence."""
        width, inner, layers = LLAMA3["hidden_size"], LLAMA3["intermediate_size"], LLAMA3["num_hidden_layers"]
        # Grouped-query attention: keys and values are narrower than the hidden states.
        kv_width = width * LLAMA3["num_key_value_heads"] // LLAMA3["num_attention_heads"]
        # 2 FLOPs a weight and token: queries and output, keys and values, the three matrices of the MLP.
        linear = 2 * (2 * width * width + 2 * width * kv_width + 3 * width * inner) * self.computed
        pairs = 0
        for batch in self.batches:
            longest = max(map(sum, batch))
            # Causal attention needs half of a row's pairs; under a mask all pairs of the padded length are computed.
            for rows in batch:
                pairs += sum(length**2 for length in rows) / 2 if skips else longest**2
        # Each pair costs 2 * width FLOPs for its score and as many for its share of the values.
        return layers * (linear + 4 * width * pairs)


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def one_row_each(lengths: np.ndarray, order: Sequence, rows: int) -> Batches:
    """Batches of so many sequences, in that order, of a row each."""
    batches = []
    for some in chunks(order, rows):
        batches.append([[int(lengths[i])] for i in some])
    return Batches(batches)


def random_batches(lengths: np.ndarray, rows: int, seed: int = 0) -> Batches:
    order = np.random.default_rng(seed).permutation(len(lengths))
    return one_row_each(lengths, order, rows)


def grouped_batches(
    lengths: np.ndarray, has_image: np.ndarray, rows: int, rows_per_step: int, seed: int = 0
) -> Batches:
    order = list(GroupedSampler(lengths, has_image, rows_per_step, seed))
    return one_row_each(lengths, order, rows)


def packed_batches(lengths: np.ndarray, max_length: int, sequences: int, seed: int = 0) -> Batches:
    packed = pack_lengths(lengths, max_length, seed)
    # Sequences in a random order, as a sampler draws them: packed, those with the longest rows come first.
    order = np.random.default_rng(seed).permutation(len(packed))
    packed = [lengths[packed[i]].tolist() for i in order]
    return Batches([list(some) for some in chunks(packed, sequences)], is_packed=True)


class Steps:
    """Fine-tuning steps of a small LLaVA, through the trainer's own loss."""

    def __init__(self, hidden_size: int, layers: int):
        torch.manual_seed(0)
        # 43 / 16 is the MLP's width over the hidden size in Llama-2-7B (11,008 / 4,096).
        widths = {"hidden_size": hidden_size, "intermediate_size": hidden_size * 43 // 16, "num_hidden_layers": layers}
        # The vision tower does the same for each kind of batch: few layers are enough.
        self.config = student_config(LLM | widths, TOWER | {"num_hidden_layers": 2}, [])
        model = OlaVlmForConditionalGeneration(self.config)
        apply_stage(model, "finetune")
        options = {"use_cpu": True, "report_to": "none", "output_dir": tempfile.gettempdir()}
        collator = SimpleNamespace(target_sources={})  # batches are made here
        self.trainer = OlaVlmTrainer(model, OlaVlmArguments(**options), data_collator=collator, train_dataset=[{}])
        self.trainer.create_optimizer()

    def batch(self, lengths: list[list[int]], is_packed: bool) -> dict:
        """Of the rows of each sequence; one that is longer than an image's tokens has an image."""
        # Each row becomes a `Sample` as the collator makes it, without text and pictures.
        samples = []
        for number, rows in enumerate(lengths):
            for length in rows:
                encoded = self._row(length)
                sequence = None
                if is_packed:
                    sequence = number
                images = [None] * encoded.num_images
                samples.append(Sample("", encoded, images, images, sequence))  # pyright: ignore[reportArgumentType] (only their number counts)
        if is_packed:
            # The collator's own functions: positions that begin anew, or an attention mask.
            tensors = pack_tokens(samples, PAD)
        else:
            tensors = pad_tokens(samples, PAD)
        side = self.config.vision_config.image_size
        num_images = sum(sample.encoded.num_images for sample in samples)
        return {**tensors, "pixel_values": torch.randn(num_images, 3, side, side), "row_ids": []}

    def _row(self, length: int) -> Encoded:
        # Drawn by the row's length: the same row is the same in every kind of batch.
        ids = np.random.default_rng(length).integers(1000, 2000, length)
        # 1 or 0: a long text without an image counts as one with an image here.
        images = int(length > SYSTEM_TOKENS + IMAGE_TOKENS)
        ids[SYSTEM_TOKENS : SYSTEM_TOKENS + images * IMAGE_TOKENS] = self.config.image_token_id
        labels = np.full_like(ids, -100)
        answers = int(SUPERVISED * (length - images * IMAGE_TOKENS - SYSTEM_TOKENS))
        if answers > 0:
            labels[-answers:] = ids[-answers:]
        return Encoded(ids, labels, images, length, "")

    def __call__(self, batch: dict) -> None:
        self.trainer.model.train()
        self.trainer.compute_loss(self.trainer.model, batch).backward()
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()


def make_epochs(lengths: np.ndarray, has_image: np.ndarray, rows: int, ranks: int) -> dict[str, Batches]:
    """By name. Of packed rows, as many sequences as hold about as many rows."""
    # LLaVA groups rows by length over the whole step, all devices together.
    epochs = {
        f"random, {rows} rows": random_batches(lengths, rows),
        f"grouped, {rows} rows of {rows * ranks}": grouped_batches(lengths, has_image, rows, rows * ranks),
    }
    for max_length in (MAX_LENGTH, 2 * MAX_LENGTH):
        # So that a batch has about as many needed tokens as one of `rows` rows.
        sequences = max(1, round(rows * lengths.mean() / max_length))
        start = time.process_time()
        epochs[f"packed, {sequences} of {max_length:,}"] = packed_batches(lengths, max_length, sequences)
        print(f"packed into sequences of {max_length:,} in {time.process_time() - start:.1f} processor seconds")
    return epochs


def print_tokens(epochs: dict[str, Batches]) -> None:
    print(f"{'an epoch in batches':<28}{'computed/needed':>16}{'padding':>9}{'FLOPs/needed':>14}")
    for name, epoch in epochs.items():
        ratio = epoch.computed / epoch.needed
        # The least that these rows need: no padding, and attention within rows only.
        least = epoch._replace(padding_free=True).flops(skips=True)
        print(f"{name:<28}{ratio:>16.3f}{1 - 1 / ratio:>9.1%}{epoch.flops(skips=False) / least:>14.3f}")
        if epoch.is_packed:  # nothing is left that isn't needed
            print(f"{'  by flash attention':<28}{1:>16.3f}{0:>9.1%}{1:>14.3f}")


def evenly(epoch: Batches, count: int) -> Batches:
    """So many of its batches, of few needed tokens to many."""
    # The middle of each of `count` equally large parts, so that few batches stand for the epoch.
    by_need = sorted(epoch.batches, key=lambda batch: sum(map(sum, batch)))
    places = [(2 * i + 1) * len(by_need) // (2 * count) for i in range(count)]
    return epoch._replace(batches=[by_need[place] for place in places])


def print_times(epochs: dict[str, Batches], hidden_size: int, layers: int, batches: int, rounds: int) -> None:
    step = Steps(hidden_size, layers)
    # Batches differ between kinds, hence times are compared by the tokens that are needed.
    chosen = {name: evenly(epoch, batches) for name, epoch in epochs.items()}
    seconds = {name: [] for name in chosen}
    step(step.batch([[MAX_LENGTH]], is_packed=False))  # warms up
    for _ in range(rounds):
        for name, some in chosen.items():
            start = time.process_time()
            for batch in some.batches:
                step(step.batch(batch, some.is_packed))
            seconds[name].append(time.process_time() - start)
    print(f"steps of {batches} batches each, language model {hidden_size} wide, {layers} layers, attention by mask")
    print(f"{'':<28}{'needed':>9}{'computed/needed':>17}{'ms a token':>12}{'of random':>11}{'of grouped':>12}")
    by_token = {name: statistics.median(seconds[name]) / some.needed for name, some in chosen.items()}
    # In the order of `make_epochs`.
    random, grouped, *_ = by_token.values()
    for name, some in chosen.items():
        ratio = some.computed / some.needed
        print(f"{name:<28}{some.needed:>9,}{ratio:>17.3f}{1000 * by_token[name]:>12.3f}", end="")
        print(f"{by_token[name] / random:>11.3f}{by_token[name] / grouped:>12.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="of a device's batch, where they aren't packed")
    parser.add_argument("--ranks", type=int, default=8, help="devices of a step, whose rows are grouped together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=3, help="of each kind that are timed; 0: none")
    parser.add_argument("--hidden_size", type=int, default=256, help="of the language model that is timed")
    parser.add_argument("--layers", type=int, default=2, help="of the language model that is timed")
    args = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"{platform.machine()}, {threads}, torch {torch.__version__}")
    lengths, has_image = make_rows()
    mean = lengths.mean()
    print(f"{len(lengths):,} rows, {int(lengths.sum()):,} tokens, {mean:.0f} a row, {(~has_image).sum():,} text only")
    epochs = make_epochs(lengths, has_image, args.rows, args.ranks)
    print_tokens(epochs)
    if args.batches > 0:
        print_times(epochs, args.hidden_size, args.layers, args.batches, args.rounds)


if __name__ == "__main__":
    main()
