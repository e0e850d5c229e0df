"""Scores of a file of answers: `ola-vlm score` (commands/score.py). It needs the file alone: no model, no data.

The benchmark's headline numbers, then every task's and source's, each with its standard error over questions.
"""

import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from ..commands.running import command, tell
from ..files.escapes import one_line, terminal
from ..files.writing import write_json
from .benchmarks import BENCHMARKS, MEAN_OF_TASKS, shown_name
from .cleaning import final_answer, is_cut_thought, scored_output
from .multiple_choice import is_correct, is_letter_of
from .reading import parse_choice
from .vqa import vqa_accuracy

logger = logging.getLogger(__name__)

# Tasks whose rows are pairs or groups of questions: `scored_rows` adds them, and means over questions leave them out.
OF_QUESTIONS = ("pair", "all variants")


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".")


# A question's "scoring" -> its score, 0 to 1.
SCORERS = {
    "choice": is_correct,
    "exact": lambda record: _plain(final_answer(scored_output(record))) == _plain(record["answer"]),
    "vqa": lambda record: vqa_accuracy(final_answer(scored_output(record)), record["answer"]),
}


def scored_rows(records: Sequence[dict]) -> list[dict]:
    """What a benchmark's mean runs over, `{"id", "task", "source", "score": 0 to 1}`: its questions; then MMVP's pairs
    as a task "pair", and 3DSRBench's groups as a task "all variants", whose score is the lowest of their questions'.
    Questions and groups are counted apart: what belongs to no source has None."""
    rows = []
    # Pair or group -> its questions' rows.
    pairs = {}
    groups = {}
    for record in records:
        row = {name: record[name] for name in ("id", "task", "source")}
        row["score"] = SCORERS[record["scoring"]](record)
        rows.append(row)
        if "pair" in record:
            pairs.setdefault(record["pair"], []).append(row)
        if "group" in record:
            # With its source: a group's own row is counted in it, its questions are in none.
            groups.setdefault((record["group"], record["group_source"]), []).append(row)
    for pair, of_pair in pairs.items():
        # Half of a pair can't be right as a whole, nor wrong.
        if len(of_pair) != 2:
            raise ValueError(f"pair {pair} has {len(of_pair)} answered questions instead of 2")
        rows.append({"id": f"pair {pair}", "task": "pair", "source": None, "score": _lowest(of_pair)})
    for (group, source), of_group in groups.items():
        rows.append({"id": f"group {group}", "task": "all variants", "source": source, "score": _lowest(of_group)})
    return rows


def _lowest(rows: Sequence[dict]) -> float:
    # Right if all are right.
    return min(row["score"] for row in rows)


def strata(rows: Sequence[dict], benchmark: str) -> dict[str, list[tuple[float, list[int]]]]:
    """What is reported -> its parts as (weight, indices of rows): headline numbers, task/..., source/....

    A headline number that lacks one of its parts is left out."""
    # Kind -> label -> indices of its rows.
    labels = {"task": {}, "source": {}}
    for i, row in enumerate(rows):
        for kind, of_kind in labels.items():
            if row[kind] is not None:
                of_kind.setdefault(row[kind], []).append(i)
    # A headline number may be made of tasks or of sources.
    members = {**labels["source"], **labels["task"]}
    questions = [i for i, row in enumerate(rows) if row["task"] not in OF_QUESTIONS]
    # Questions of your own, by their file's name, have one headline number: the mean of all.
    headline: dict = {"overall": None}
    if benchmark in BENCHMARKS:
        headline = BENCHMARKS[benchmark].headline
    reported = {}
    for name, weights in headline.items():
        if weights is None:
            reported[name] = [(1, questions)]
        elif weights == MEAN_OF_TASKS:
            reported[name] = [(1 / len(labels["task"]), indices) for indices in labels["task"].values()]
        # With `--limit`, or a file of one half, parts may be missing: half of a mean would be taken for the whole.
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
    scores = np.array([row["score"] for row in rows], float)
    found = {}
    for name, parts in strata(rows, benchmark).items():
        # Var(sum of w * mean) = sum of w^2 * var / n, as parts are of different questions.
        score = sum(weight * scores[i].mean() for weight, i in parts)
        variance = sum(weight**2 * scores[i].var() / len(i) for weight, i in parts)
        count = sum(len(i) for _, i in parts)
        found[name] = {"score": float(score), "standard_error": float(variance**0.5), "n": count}
    return found


# Of an answer, as `ola-vlm eval` writes it.
ANSWER_FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "task": str,
    "source": (str, type(None)),
    "question": str,
    "output": str,
    "choices": list,
    "scoring": str,
    "generation": dict,
}
# Of its run: what the results and a comparison name.
RUN_FIELDS = ("benchmark", "variant", "data", "revision", "model")


def _check_answer(record: dict, path: Path) -> None:
    """ValueError for a record that can't be scored."""
    wrong = [name for name, kind in ANSWER_FIELDS.items() if not isinstance(record.get(name), kind)]
    # A wrong field is looked into no further.
    if not {"choices", "scoring"} & set(wrong):
        wrong += unscorable(record)
    # It may begin a thought. Questions that were answered elsewhere have none.
    if not isinstance(record.get("prompt", ""), str):
        wrong.append("prompt")
    # MMVP's pairs have numbers, 3DSRBench's groups names.
    if "pair" in record and not isinstance(record["pair"], (int, str)):
        wrong.append("pair")
    if "group" in record:
        wrong += [name for name in ("group", "group_source") if not isinstance(record.get(name), str)]
    wrong += [f"{name} in its run" for name in RUN_FIELDS if not isinstance(record["run"].get(name), str)]
    if wrong:
        what = f"question {one_line(record.get('id'))[:80]} has no {', '.join(wrong)} as `ola-vlm eval` writes it"
        raise ValueError(f"{path}: {what}")


def unscorable(record: dict) -> list[str]:
    """The fields, of "choices" (a list), "scoring" (a text) and "answer", for which it can't be scored; if the first
    two are among them, the answer is not looked at."""
    wrong = []
    are_texts = all(isinstance(choice, str) for choice in record["choices"])
    # More than have a letter are none of ours.
    if not are_texts or len(record["choices"]) > len(ascii_uppercase):
        wrong.append("choices")
    if record["scoring"] not in SCORERS:
        wrong.append("scoring")
    if not wrong and not _is_answer(record.get("answer"), record):
        wrong.append("answer")
    return wrong


def _is_answer(answer: object, record: dict) -> bool:
    """Whether it is one that the record's scoring can compare with: texts of people, the letter of one of the options,
    or a text."""
    if record["scoring"] == "vqa":
        return isinstance(answer, list) and len(answer) > 0 and all(isinstance(text, str) for text in answer)
    if record["scoring"] == "choice":
        return isinstance(answer, str) and is_letter_of(answer, record["choices"])
    return isinstance(answer, str)


def read_answers(path: str | Path) -> list[dict]:
    """A file's answers (or those of its folder), all of one run and all there: else ValueError."""
    path = Path(path)
    if path.is_dir():
        path = path / "answers.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is not there: `ola-vlm eval` writes it when all questions are answered")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: it must hold answers as `ola-vlm eval` writes them") from error
    records = []
    # Not `splitlines`: an answer may have other line separators in it.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("run"), dict):
                raise ValueError(f"{path}, line {number}: it must be an answer as `ola-vlm eval` writes it")
            records.append(record)
    # Two runs' answers in one file would be a mean of two models.
    if not records or any(record["run"] != records[0]["run"] for record in records):
        raise ValueError(f"{path} must hold the answers of one run, it has those of none or several")
    total = records[0]["run"].get("questions")
    # By `repr`, since a damaged file's id may be a list, which no set takes.
    if len({repr(record.get("id")) for record in records}) != len(records) or len(records) != total:
        raise ValueError(f"{path} has {len(records)} lines for {total} questions: answer each exactly once")
    for record in records:
        _check_answer(record, path)
    return records


def write_results(path: str | Path) -> dict:
    """Scores the file (or the folder's) and writes results.json beside it."""
    records = read_answers(path)
    # Unanswered and unreadable both count as wrong; how many they are says how far the scores can be trusted.
    unanswered = [record["id"] for record in records if "unanswered" in record]
    choices = [record for record in records if record["scoring"] == "choice"]
    answered = [record for record in choices if "unanswered" not in record]
    # Free answers can't name an option: without questions that have some there is nothing to be counted.
    unread = None
    if choices:
        unread = sum(parse_choice(scored_output(record), record["choices"]) is None for record in answered)
    cut = sum(map(is_cut_thought, records))
    if cut:
        logger.warning(
            f"{cut} of {len(records)} answers end within their reasoning, which counts as wrong: evaluate anew with a "
            "larger --max_new_tokens"
        )
    run = records[0]["run"]
    scores = score_records(records, run["benchmark"])
    results = {
        "run": run,
        "generation": records[0]["generation"],
        "unreadable_choices": unread,
        "unanswered": unanswered,
        "scores": scores,
    }
    folder = Path(path)
    if not folder.is_dir():
        folder = folder.parent
    write_json(folder / "results.json", results)
    return results


def table(results: dict) -> str:
    run = results["run"]
    lines = [f"{shown_name(run)}, {run['model']}: per cent, standard error, questions"]
    for name, scored in results["scores"].items():
        score = 100 * scored["score"]
        error = 100 * scored["standard_error"]
        lines.append(f"{one_line(name):<28} {score:6.1f} ± {error:4.1f} {scored['n']:>7,}")
    if results["unreadable_choices"] is not None:
        lines.append(f"{results['unreadable_choices']} answers named no option, or several: wrong")
    if results["unanswered"]:
        lines.append(f"{len(results['unanswered'])} questions without a readable image: unanswered, wrong")
    return "\n".join(lines)


@command("score")
def main(args: Namespace) -> None:
    print(terminal(table(write_results(args.answers))))
    tell("Results: results.json beside the answers", f"Next: ola-vlm compare {args.answers} ANOTHER_MODELS_ANSWERS")
