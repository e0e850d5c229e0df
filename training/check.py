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
FINE = len(PROBLEMS)


@dataclass
class RowCheck:
    """What a row has, and what is wrong with it, if anything."""

    problem: int = FINE  # index in `PROBLEMS`
    tokens: int = 0
    truncated: bool = False
    images: int = 0
    answers: int = 0
    named: dict | None = None  # a bad row as {"row", "problem", "reason"}

    def numbers(self) -> list[int]:
        return [self.problem, self.tokens, int(self.truncated), self.images, self.answers]


NUMBERS = 5  # of a row


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
    state = PartialState()
    share = _Check(rows, collator, decode, first=state.process_index, step=state.num_processes)
    checks = []
    with tqdm(total=len(share), desc="checking rows", disable=None if state.is_main_process else True) as bar:
        for batch in DataLoader(share, 64, num_workers=workers, collate_fn=list):
            checks += batch
            bar.update(len(batch))

    # Every rank's share has the same length, the last rows of some being padding, and row i is rank i % ranks's.
    longest = math.ceil(len(rows) / state.num_processes)
    numbers = torch.zeros(longest, NUMBERS, dtype=torch.int64)
    if checks:
        numbers[: len(checks)] = torch.tensor([check.numbers() for check in checks])
    by_rank = cast(torch.Tensor, gather(numbers.to(state.device))).cpu().view(state.num_processes, longest, NUMBERS)
    by_row = by_rank.transpose(0, 1).reshape(-1, NUMBERS)[: len(rows)].numpy()
    problem, tokens, truncated, images, answers = by_row.T

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


def drop_bad_rows(
    rows: Rows, collator: OlaVlmCollator | None, on_bad_rows: str = "stop", workers: int = 0, decode: bool = False
) -> dict:
    """Before a run: drops rows that are too long and, if `on_bad_rows` is "drop", bad rows; logs and returns the
    summary. ValueError for bad rows if it is "stop", and if none is left. Without a collator texts are not looked at.
    """
    report = check_rows(rows, collator, decode, workers)
    summary = report.summary()
    counts = {kind: count for kind, count in summary["bad rows"].items() if count}
    named = [f"row {row['row']}: {row['reason']}" for row in report.named if row["problem"] != "too_long"]
    if PartialState().is_main_process:
        for bad_row in named[:20]:
            logger.warning(f"bad {bad_row}")
    if counts.keys() - {"too_long"} and on_bad_rows == "stop":
        raise ValueError(f"bad rows: {counts}; {', '.join(named[:1])}. Mend the data, or set on_bad_rows=drop")
    if not report.is_fine.any():
        limit = f", max_length={collator.max_length}" if collator else ""
        raise ValueError(f"none of {len(rows)} rows can be trained on: {counts}{limit}")
    if counts:
        logger.warning(f"dropped {sum(counts.values())} of {len(rows)} rows: {counts}")
    logger.info(f"data: {summary}")
    rows.keep(report.is_fine, report.tokens, report.images > 0)
    return summary
