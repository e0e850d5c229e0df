"""What is in the data, and which rows can't be trained on: before a run, and for `ola-vlm check-data`."""

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils import logging

from .collator import OlaVlmCollator
from .rows import PROBLEMS, BadRow, Rows, open_source

logger = logging.get_logger(__name__)
# One behind the last problem.
FINE = len(PROBLEMS)


@dataclass
class RowCheck:
    """What a row has, and what is wrong with it, if anything."""

    # Index in `PROBLEMS`.
    problem: int = FINE
    tokens: int = 0
    truncated: bool = False
    images: int = 0
    answers: int = 0
    # A bad row as {"row", "problem", "reason"}.
    named: dict | None = None

    def numbers(self) -> list[int]:
        return [self.problem, self.tokens, int(self.truncated), self.images, self.answers]


# Of a row: `RowCheck.numbers`.
NUMBERS = 5


@dataclass
class DataReport:
    """Of every row, as arrays: `problem` (index in `PROBLEMS`, or FINE), tokens, whether truncated, images, answers;
    and `named`, all bad rows, as `{"row", "problem", "reason"}`."""

    problem: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    images: np.ndarray
    answers: np.ndarray
    named: list[dict]

    @property
    def is_fine(self) -> np.ndarray:
        return self.problem == FINE

    def summary(self) -> dict:
        """The report in numbers, JSON-ready; tokens are those of the rows that are fine."""
        tokens = self.tokens[self.is_fine]
        # By problem; what is behind the last one, the rows that are fine, is left out below.
        problems = np.bincount(self.problem, minlength=FINE).tolist()
        return {
            "rows": len(self.problem),
            "images": int(self.images.sum()),
            "rows without images": int((self.images == 0).sum()),
            "rows with several images": int((self.images > 1).sum()),
            "answers": int(self.answers.sum()),
            "tokens": int(tokens.sum()),
            "longest row in tokens": int(tokens.max(initial=0)),
            "truncated rows": int(self.truncated.sum()),
            "bad rows": dict(zip(PROBLEMS, problems[:FINE], strict=True)),
        }


class _Check(Dataset):
    """Every `step`-th row from `first` on, checked, one at a time, for a loader's workers."""

    def __init__(self, rows: Rows, collator: OlaVlmCollator | None, decode: bool, first: int, step: int):
        self.rows = rows
        self.collator = collator
        self.decode = decode
        self.indices = range(first, len(rows), step)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> RowCheck:
        row = self.rows[self.indices[i]]
        check = RowCheck(
            images=len(row.get("images", ())),
            answers=sum(message["role"] == "assistant" for message in row.get("messages", ())),
        )
        try:
            # Cheapest first: the row's form, then its text, then its images, which take longest.
            if "bad_row" in row:
                raise row["bad_row"]
            if self.collator is not None:
                encoded = self.collator.check_text(row)
                check.tokens = len(encoded.ids)
                check.truncated = len(encoded.ids) < encoded.full_length
            if self.decode:
                for image in row["images"]:
                    open_source(image)
        except BadRow as bad_row:
            check.problem = list(PROBLEMS).index(bad_row.kind)
            check.named = {"row": row["id"], "problem": bad_row.kind, "reason": str(bad_row)}
        return check


def check_rows(
    rows: Rows, collator: OlaVlmCollator | None = None, decode: bool = False, workers: int = 0
) -> DataReport:
    """Looks at every row, each rank at its share: form and image files; tokens and labels if there is a `collator`;
    `decode`: opens all images, which takes as long as an epoch's data loading."""
    # Rows are dealt out to ranks one by one: neighbors often take about the same time.
    state = PartialState()
    share = _Check(rows, collator, decode, first=state.process_index, step=state.num_processes)
    checks = []
    with tqdm(total=len(share), desc="checking rows", disable=None if state.is_main_process else True) as bar:
        # Lists of checks: there is nothing to stack.
        for batch in DataLoader(share, 64, num_workers=workers, collate_fn=list):
            checks += batch
            bar.update(len(batch))

    # Every rank's share has the same length, the last rows of some being padding, and row i is rank i % ranks's.
    longest = math.ceil(len(rows) / state.num_processes)
    numbers = torch.zeros(longest, NUMBERS, dtype=torch.int64)
    if checks:
        numbers[: len(checks)] = torch.tensor([check.numbers() for check in checks])
    # (ranks, rows of a rank, NUMBERS) -> (rows, NUMBERS), in the order of the data.
    by_rank = cast(torch.Tensor, gather(numbers.to(state.device))).cpu().view(state.num_processes, longest, NUMBERS)
    by_row = by_rank.transpose(0, 1).reshape(-1, NUMBERS)[: len(rows)].numpy()
    problem, tokens, truncated, images, answers = by_row.T

    # Texts are gathered as objects: bad rows are few.
    named = [(share.indices[i], check.named) for i, check in enumerate(checks) if check.named]
    named = sorted(gather_object(named), key=itemgetter(0))
    return DataReport(
        problem=problem,
        tokens=tokens,
        truncated=truncated,
        images=images,
        answers=answers,
        named=[bad_row for _, bad_row in named],
    )


def in_words(counts: dict[str, int]) -> str:
    """{"missing": 6000} -> "image missing (6,000)"."""
    return ", ".join(f"{PROBLEMS[kind]} ({count:,})" for kind, count in counts.items())


def _summary_in_words(summary: dict) -> str:
    """`DataReport.summary` as a sentence's part; what there is none of is left out, but for rows."""
    counts = {name: number for name, number in summary.items() if isinstance(number, int)}
    parts = [f"{number:,} {name}" for name, number in counts.items() if number and name != "longest row in tokens"]
    parts[:0] = [] if counts["rows"] else ["0 rows"]
    if counts["longest row in tokens"]:
        parts.append(f"the longest row has {counts['longest row in tokens']:,} tokens")
    bad = {kind: count for kind, count in summary["bad rows"].items() if count}
    if bad:
        parts.append(f"of the rows left out: {in_words(bad)}")
    return ", ".join(parts)


def _none_is_left(counts: dict[str, int], num_rows: int, named: list[str], collator: OlaVlmCollator | None) -> str:
    """Why no row can be trained on. To drop bad rows is no remedy."""
    if len(counts) == 1:
        (kind,) = counts
        text = f"all {num_rows:,} rows: {PROBLEMS[kind]}"
    else:
        text = f"none of {num_rows:,} rows can be trained on: {in_words(counts)}"
    if "too_long" in counts and collator:
        text += f" (max_length={collator.max_length})"
    if named:
        text += f"; the first, {named[0]}"
    if counts.keys() & {"missing", "outside"}:
        text += "; correct image_folder, where the rows' image paths begin, or the paths"
    return text


def drop_bad_rows(
    rows: Rows, collator: OlaVlmCollator | None, on_bad_rows: str = "stop", workers: int = 0, decode: bool = False
) -> dict:
    """Before a run: drops rows that are too long and, if `on_bad_rows` is "drop", bad rows; logs and returns the
    summary. ValueError for bad rows if it is "stop", and if none is left. Without a collator texts are not looked at.
    """
    report = check_rows(rows, collator, decode, workers)
    summary = report.summary()
    counts = {kind: count for kind, count in summary["bad rows"].items() if count}
    # Rows that are too long are counted and not named: they may be many, and are no fault.
    named = [f"row {row['row']}: {row['reason']}" for row in report.named if row["problem"] != "too_long"]
    none_is_left = not report.is_fine.any()
    # Where all are bad, the line that ends the run says why.
    shown = 20
    if none_is_left:
        shown = 2
    if PartialState().is_main_process:
        for bad_row in named[:shown]:
            logger.warning(f"bad {bad_row}")
    if none_is_left:
        raise ValueError(_none_is_left(counts, len(rows), named, collator))
    # A row that is too long is no fault of the data's: it is dropped without being asked about.
    if counts.keys() - {"too_long"} and on_bad_rows == "stop":
        what = f"bad rows: {in_words(counts)}; {', '.join(named[:1])}"
        raise ValueError(f"{what}. Mend the data, or set on_bad_rows=drop")
    if counts:
        logger.warning(f"dropped {sum(counts.values()):,} of {len(rows):,} rows: {in_words(counts)}")
    logger.info(f"data: {_summary_in_words(summary)}")
    # Lengths are kept, too: grouping and packing need them.
    rows.keep(report.is_fine, report.tokens, report.images > 0)
    return summary
