"""What is in the data, and which rows can't be trained on: before a run, and for `ola-vlm check-data`."""

from operator import itemgetter
from typing import NamedTuple

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


class Facts(NamedTuple):
    """Of every row: `problem` (place in `PROBLEMS`, or FINE), tokens, whether truncated, images, answers; and
    `named`, all bad rows, as `{"row", "problem", "reason"}`."""

    problem: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    images: np.ndarray
    answers: np.ndarray
    named: list[dict]

    def report(self) -> dict:
        """The facts in numbers, JSON-ready; tokens are those of the rows that are fine."""
        tokens, problems = self.tokens[self.problem == FINE], np.bincount(self.problem, minlength=FINE).tolist()
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
    """The facts of every `step`-th row from `first` on, one row at a time, for a loader's workers."""

    def __init__(self, rows: Rows, collator: OlaVlmCollator | None, decode: bool, first: int, step: int):
        self.rows, self.collator, self.decode = rows, collator, decode
        self.indices = range(first, len(rows), step)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[list[int], dict | None]:
        row = self.rows[self.indices[i]]
        answers = sum(message["role"] == "assistant" for message in row.get("messages", ()))
        counts, problem, named = [0, 0, len(row.get("images", ())), answers], FINE, None
        try:
            if "bad_row" in row:
                raise row["bad_row"]
            if self.collator is not None:
                encoded = self.collator.check_text(row)
                counts[:2] = len(encoded.ids), len(encoded.ids) < encoded.full_length
            for image in row["images"] if self.decode else ():
                open_source(image)
        except BadRow as bad_row:
            problem = list(PROBLEMS).index(bad_row.kind)
            named = {"row": row["id"], "problem": bad_row.kind, "reason": str(bad_row)}
        return [problem, *counts], named


def check_rows(rows: Rows, collator: OlaVlmCollator | None = None, decode: bool = False, workers: int = 0) -> Facts:
    """Looks at every row, each rank at its share: form and image files; tokens and labels if there is a `collator`;
    `decode`: opens all images, which takes as long as an epoch's data loading."""
    state = PartialState()
    check = _Check(rows, collator, decode, state.process_index, state.num_processes)
    loader, numbers, named = DataLoader(check, 64, num_workers=workers, collate_fn=list), [], []
    with tqdm(total=len(check), desc="checking rows", disable=None if state.is_main_process else True) as bar:
        for batch in loader:
            numbers += [row for row, _ in batch]
            named += [bad for _, bad in batch]
            bar.update(len(batch))
    share = -(-len(rows) // state.num_processes)
    padded = torch.zeros(share, 5, dtype=torch.int64)
    padded[: len(numbers)] = torch.tensor(numbers).view(-1, 5)
    by_rank = gather(padded.to(state.device)).cpu().view(state.num_processes, share, 5)
    named = sorted(gather_object([(check.indices[i], bad) for i, bad in enumerate(named) if bad]), key=itemgetter(0))
    return Facts(*by_rank.transpose(0, 1).reshape(-1, 5)[: len(rows)].numpy().T, [bad for _, bad in named])


def drop_bad_rows(
    rows: Rows, collator: OlaVlmCollator | None, on_bad_rows: str = "stop", workers: int = 0, decode: bool = False
) -> dict:
    """Before a run: drops rows that are too long and, if `on_bad_rows` is "drop", bad rows; logs and returns the
    report. ValueError for bad rows if it is "stop", and if none is left. Without a collator texts are not looked at.
    """
    facts = check_rows(rows, collator, decode, workers)
    fine, report = facts.problem == FINE, facts.report()
    bad = {kind: count for kind, count in report["bad rows"].items() if count}
    named = [f"row {row['row']}: {row['reason']}" for row in facts.named if row["problem"] != "too_long"]
    for problem in named[:20] if PartialState().is_main_process else ():
        logger.warning(f"bad {problem}")
    if bad.keys() - {"too_long"} and on_bad_rows == "stop":
        raise ValueError(f"bad rows: {bad}; {', '.join(named[:1])}. Mend the data, or set on_bad_rows=drop")
    if not fine.any():
        limit = f", max_length={collator.max_length}" if collator else ""
        raise ValueError(f"none of {len(rows)} rows can be trained on: {bad}{limit}")
    if bad:
        logger.warning(f"dropped {sum(bad.values())} of {len(rows)} rows: {bad}")
    logger.info(f"data: {report}")
    rows.keep(fine, facts.tokens, facts.images > 0)
    return report
