"""Two models' answers to the same questions: `ola-vlm compare` (commands/compare.py).

B minus A for everything that `ola-vlm score` reports, with a 95% interval (bootstrap over questions) and a paired
two-sided test: McNemar's, exact, where answers are right or wrong; a sign-flip permutation of weighted means and of
VQA's scores. A page shows the questions on which one is better: image, question, both answers, truth.
"""

import base64
import io
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..commands.running import command, tell
from ..files.escapes import one_line
from ..files.page_templates import render
from ..files.writing import write_json, write_whole
from ..targets.images import open_image
from .benchmarks import load_questions, locate
from .scoring import SCORERS, read_answers, scored_rows, strata
from .statistics import paired_comparison

PAGE = Path(__file__).with_name("disagreements_page.html")

# What two files must agree in, or their difference is no difference between models: field -> what it is called.
SAME = {"question": "prompt", "answer": "truth", "choices": "options", "scoring": "scoring"}


def differences(records_a: Sequence[dict], records_b: Sequence[dict]) -> list[str]:
    """In what but the models the answers differ, so that their scores say nothing about these: variant, questions'
    texts, truths. Empty if nothing does. ValueError if they aren't answers to the same questions at all."""
    run_a = records_a[0]["run"]
    run_b = records_b[0]["run"]
    # Other questions: no option of the user's makes these comparable.
    for name in ("benchmark", "revision"):
        if run_a[name] != run_b[name]:
            raise ValueError(f"the answers differ in their {name}: {run_a[name]} and {run_b[name]}")
    if [record["id"] for record in records_a] != [record["id"] for record in records_b]:
        raise ValueError("both files must answer the same questions in the same order")
    notes = []
    if run_a.get("variant") != run_b.get("variant"):
        notes.append(f"variant: {run_a.get('variant')} and {run_b.get('variant')}")
    for field, name in SAME.items():
        differing = [a["id"] for a, b in zip(records_a, records_b, strict=True) if a.get(field) != b.get(field)]
        if differing:
            notes.append(f"{name}: of {len(differing):,} questions ({differing[0]} is the first)")
    return notes


def compare_records(records_a: Sequence[dict], records_b: Sequence[dict], anyway: bool = False) -> dict[str, dict]:
    """`paired_comparison` (b minus a) for everything that scoring reports. ValueError if the questions differ, or, but
    for `anyway`, if variant, prompt or truth do (`differences`)."""
    notes = differences(records_a, records_b)
    if notes and not anyway:
        remedy = "ask both models with the same variant, or add --anyway to compare all the same"
        raise ValueError(f"the answers differ in more than their models ({'; '.join(notes)}): {remedy}")
    rows_a = scored_rows(records_a)
    rows_b = scored_rows(records_b)
    # (N,) each; a row is a question, a pair or a group of variants.
    a = np.array([row["score"] for row in rows_a], float)
    b = np.array([row["score"] for row in rows_b], float)
    compared = {}
    for name, parts in strata(rows_a, records_a[0]["run"]["benchmark"]).items():
        # A question may count in several parts, so they are put one behind the other.
        indices = np.concatenate([i for _, i in parts])
        labels = np.repeat(range(len(parts)), [len(i) for _, i in parts])
        weights = [weight for weight, _ in parts]
        # Label i is part i's, with its weight: a sum of weighted means, as the score itself is.
        compared[name] = paired_comparison(a[indices], b[indices], strata=labels, weights=weights)
    return compared


def describe(compared: dict[str, dict]) -> list[list[str]]:
    """Rows of a table: what, difference, interval, p, questions, test; in percentage points."""
    rows = [["", "B - A, points", "95%", "p", "n", "test"]]
    for name, one in compared.items():
        # Scores are 0 to 1, the table is in points of 100.
        low, high = (f"{100 * bound:+.1f}" for bound in one["ci95"])
        difference = f"{100 * one['difference']:+.1f}"
        rows.append([name, difference, f"[{low}, {high}]", f"{one['p']:.2g}", f"{one['n']:,}", one["test"]])
    return rows


def comparison_table(compared: dict[str, dict]) -> str:
    """`describe`'s rows as the terminal shows them."""
    lines = []
    for name, *cells, test in describe(compared):
        lines.append(f"{one_line(name):<28}" + "".join(f"{cell:>16}" for cell in cells) + f"   {test}")
    return "\n".join(lines)


def _thumbnail(read_image: Callable, record: dict, side: int = 256) -> str:
    try:
        image = open_image(read_image(record))
    except (ValueError, OSError):
        # It is gone or damaged by now, or was when one of the models was asked: the card is shown with a blank.
        image = Image.new("RGB", (side, side), "white")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _truth(record: dict) -> str:
    # Ten people's answers, each once.
    if record["scoring"] == "vqa":
        return ", ".join(dict.fromkeys(record["answer"]))
    if record["scoring"] == "exact":
        return record["answer"]
    # Benchmarks write "(A)", "(a)" or "A".
    letter = record["answer"].strip("()").upper()
    return f"({letter}) {record['choices'][ord(letter) - ord('A')]}"


def page(
    records_a: Sequence[dict],
    records_b: Sequence[dict],
    compared: dict[str, dict],
    read_image: Callable,
    limit: int,
    notes: Sequence[str] = (),
) -> str:
    """The disagreements as an HTML page that needs no other file; at most about `limit` of them, equally many of each
    task and spread evenly over it. `notes`: in what but the models they differ, said on top."""
    by_task: dict[str, list] = {}
    for a, b in zip(records_a, records_b, strict=True):
        by_task.setdefault(a["task"], []).append(Pair(a, b))
    # Tasks share the page alike, so that a large one doesn't fill it.
    most = max(1, limit // len(by_task))
    tasks = []
    for task, pairs in by_task.items():
        disagreements = [pair for pair in pairs if pair.score_a != pair.score_b]
        # Evenly spread over the file, which is often sorted by source.
        places = np.linspace(0, len(disagreements) - 1, min(len(disagreements), most)).round().astype(int)
        section = {
            "name": task,
            "questions": len(pairs),
            "disagreements": len(disagreements),
            "a_better": sum(pair.score_a > pair.score_b for pair in disagreements),
            "cards": [disagreements[i].card(read_image) for i in places],
        }
        tasks.append(section)
    return render(
        PAGE,
        benchmark=records_a[0]["run"]["benchmark"],
        models=[records_a[0]["run"]["model"], records_b[0]["run"]["model"]],
        notes=notes,
        comparison=describe(compared),
        tasks=tasks,
    )


class Pair:
    """Two models' answers to a question, and their scores."""

    def __init__(self, record_a: dict, record_b: dict):
        self.record_a = record_a
        self.record_b = record_b
        self.score_a = SCORERS[record_a["scoring"]](record_a)
        self.score_b = SCORERS[record_b["scoring"]](record_b)

    def card(self, read_image: Callable) -> dict:
        """What the page shows of a question on which the models disagree."""
        return {
            "id": self.record_a["id"],
            "image": _thumbnail(read_image, self.record_a),
            "question": self.record_a["question"].strip(),
            "truth": _truth(self.record_a),
            "a": self.record_a["output"] or "(nothing)",
            "b": self.record_b["output"] or "(nothing)",
            "a_is_better": self.score_a > self.score_b,
        }


@command("compare")
def main(args: Namespace) -> None:
    records_a = read_answers(args.a)
    records_b = read_answers(args.b)
    compared = compare_records(records_a, records_b, args.anyway)
    notes = differences(records_a, records_b)
    run = records_a[0]["run"]
    # A commit can be downloaded again; a local copy's revision is a hash of its files, which can't.
    known = run["revision"]
    if known.startswith("sha256:"):
        known = None
    if args.data:
        folder, revision = locate(run["benchmark"], data=args.data)
    else:
        folder, revision = locate(run["benchmark"], data=run["data"], revision=known, make=False)
    # What --data names in place of the answers' commit can't be compared with that: it is taken on trust.
    if revision != run["revision"] and not (known and args.data):
        raise ValueError(f"{folder} holds other questions ({revision}) than those answered ({run['revision']})")
    questions, read_image = load_questions(run["benchmark"], folder, run["variant"])
    known_ids = {question["id"] for question in questions}
    unknown = [record["id"] for record in records_a if record["id"] not in known_ids]
    if unknown:
        what = f"{folder} has no question {one_line(unknown[0])[:80]}, which was answered"
        raise ValueError(f"{what}: give --data, the folder that the questions came from")
    text = page(records_a, records_b, compared, read_image, args.limit, notes)
    comparison = {"A": run, "B": records_b[0]["run"], "differ_in": notes, "B - A": compared}
    write_json(args.out / "comparison.json", comparison)
    write_whole(args.out / "disagreements.html", text)
    for note in notes:
        print(one_line(f"they differ in more than the model: {note}"))
    print(comparison_table(compared))
    print(f"disagreements: {args.out / 'disagreements.html'}")
    tell(f"Results: {args.out} (comparison.json, disagreements.html)", "Next: open the page in a browser")
