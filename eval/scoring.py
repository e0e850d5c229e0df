"""Scores of a file of answers: `ola-vlm score` (commands/score.py). It needs the file alone: no model, no data.

The benchmark's headline numbers, then every task's and source's, each with its standard error over questions.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..commands.running import command, tell
from ..targets.escapes import one_line, terminal
from ..targets.files import write_json
from .benchmarks import BENCHMARKS, MEAN_OF_TASKS
from .multiple_choice import is_correct
from .reading import final_answer, parse_choice
from .vqa import vqa_accuracy

OF_QUESTIONS = ("pair", "all variants")  # tasks whose rows are made of several questions


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".")


SCORERS = {
    "choice": is_correct,
    "exact": lambda record: _plain(final_answer(record["output"])) == _plain(record["answer"]),
    "vqa": lambda record: vqa_accuracy(final_answer(record["output"]), record["answer"]),
}


def scored_rows(records: Sequence[dict]) -> list[dict]:
    """What a benchmark's mean runs over, `{"id", "task", "source", "score": 0 to 1}`: its questions; then MMVP's pairs
    as a task "pair", and 3DSRBench's groups as a task "all variants", whose score is the lowest of their questions'.
    Questions and groups are counted apart: what belongs to no source has None."""
    rows = []
    pairs = {}
    groups = {}
    for record in records:
        row = {name: record[name] for name in ("id", "task", "source")}
        row["score"] = SCORERS[record["scoring"]](record)
        rows.append(row)
        if "pair" in record:
            pairs.setdefault(record["pair"], []).append(row)
        if "group" in record:
            groups.setdefault((record["group"], record["group_source"]), []).append(row)
    for pair, of_pair in pairs.items():
        if len(of_pair) != 2:
            raise ValueError(f"pair {pair} has {len(of_pair)} answered questions instead of 2")
        rows.append({"id": f"pair {pair}", "task": "pair", "source": None, "score": _lowest(of_pair)})
    for (group, source), of_group in groups.items():
        rows.append({"id": f"group {group}", "task": "all variants", "source": source, "score": _lowest(of_group)})
    return rows


def _lowest(rows: Sequence[dict]) -> float:
    return min(row["score"] for row in rows)


def strata(rows: Sequence[dict], benchmark: str) -> dict[str, list[tuple[float, list[int]]]]:
    """What is reported -> its parts as (weight, indices of rows): headline numbers, task/..., source/....

    A headline number that lacks one of its parts is left out."""
    labels = {"task": {}, "source": {}}
    for i, row in enumerate(rows):
        for kind, of_kind in labels.items():
            if row[kind] is not None:
                of_kind.setdefault(row[kind], []).append(i)
    members = {**labels["source"], **labels["task"]}
    questions = [i for i, row in enumerate(rows) if row["task"] not in OF_QUESTIONS]
    headline = BENCHMARKS[benchmark].headline if benchmark in BENCHMARKS else {"overall": None}  # your own questions
    reported = {}
    for name, weights in headline.items():
        if weights is None:
            reported[name] = [(1, questions)]
        elif weights == MEAN_OF_TASKS:
            reported[name] = [(1 / len(labels["task"]), indices) for indices in labels["task"].values()]
        elif isinstance(weights, dict) and weights.keys() <= members.keys():
            reported[name] = [(weight, members[label]) for label, weight in weights.items()]
    for kind, of_kind in labels.items():
        for label, indices in of_kind.items():
            reported[f"{kind}/{label}"] = [(1, indices)]
    return reported


def score_records(records: Sequence[dict], benchmark: str) -> dict[str, dict]:
    """`{"score", "standard_error", "n"}` of everything that `strata` names. The standard error is that of a weighted
    sum of means over questions: binomial where answers are right or wrong."""
    if not records:
        raise ValueError("no answers to score")
    rows = scored_rows(records)
    scores, found = np.array([row["score"] for row in rows], float), {}
    for name, parts in strata(rows, benchmark).items():
        score = sum(weight * scores[i].mean() for weight, i in parts)
        variance = sum(weight**2 * scores[i].var() / len(i) for weight, i in parts)
        count = sum(len(i) for _, i in parts)
        found[name] = {"score": float(score), "standard_error": float(variance**0.5), "n": count}
    return found


def read_answers(path: str | Path) -> list[dict]:
    """A file's answers (or those of its folder), all of one run and all there: else ValueError."""
    path = Path(path) / "answers.jsonl" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise ValueError(f"{path} is not there: `ola-vlm eval` writes it when all questions are answered")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
    if not records or any(record.get("run", {}) != records[0].get("run") for record in records):
        raise ValueError(f"{path} must hold the answers of one run, it has those of none or several")
    total = records[0]["run"]["questions"]
    if len({record["id"] for record in records}) != len(records) or len(records) != total:
        raise ValueError(f"{path} has {len(records)} lines for {total} questions: answer each exactly once")
    return records


def write_results(path: str | Path) -> dict:
    """Scores the file (or the folder's) and writes results.json beside it."""
    records = read_answers(path)
    unanswered = [record["id"] for record in records if "unanswered" in record]
    choices = [record for record in records if record["scoring"] == "choice" and "unanswered" not in record]
    unread = sum(parse_choice(record["output"], record["choices"]) is None for record in choices)
    run = records[0]["run"]
    scores = score_records(records, run["benchmark"])
    results = {
        "run": run,
        "generation": records[0]["generation"],
        "unreadable_choices": unread,
        "unanswered": unanswered,
        "scores": scores,
    }
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    write_json(folder / "results.json", results)
    return results


def table(results: dict) -> str:
    run, lines = results["run"], []
    lines.append(f"{run['benchmark']} ({run['variant']}), {run['model']}: per cent, standard error, questions")
    for name, one in results["scores"].items():
        lines.append(
            f"{one_line(name):<28} {100 * one['score']:6.1f} ± {100 * one['standard_error']:4.1f} {one['n']:>7,}"
        )
    lines.append(f"{results['unreadable_choices']} answers named no option, or several: wrong")
    if results["unanswered"]:
        lines.append(f"{len(results['unanswered'])} questions without a readable image: unanswered, wrong")
    return "\n".join(lines)


@command("score")
def main(args: Namespace) -> None:
    print(terminal(table(write_results(args.answers))))
    tell("Results: results.json beside the answers", f"Next: ola-vlm compare {args.answers} ANOTHER_MODELS_ANSWERS")
