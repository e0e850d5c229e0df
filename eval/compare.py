"""Two models' answers to the same questions: `ola-vlm compare` (commands/compare.py).

B minus A for everything that `ola-vlm score` reports, with a 95% interval (bootstrap over questions) and a paired
two-sided test: McNemar's, exact, where answers are right or wrong; a sign-flip permutation of weighted means and of
VQA's scores. A page shows the questions on which one is better: image, question, both answers, truth.
"""

import base64
import io
from argparse import Namespace
from collections.abc import Callable, Sequence
from html import escape

import numpy as np
from PIL import Image

from ..commands.running import command, tell
from ..targets.escapes import one_line
from ..targets.files import write_json, write_whole
from ..targets.images import open_image
from .benchmarks import load_questions, locate
from .scoring import SCORERS, read_answers, scored_rows, strata
from .statistics import paired_comparison

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, td:last-child { text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 1em }
.card { display: flex; gap: .8em; border: 1px solid #ddd; border-radius: 6px; padding: .7em }
.card img { width: 128px; height: 128px; object-fit: contain; background: #f4f4f4; flex: none }
.card p { margin: 0 0 .4em; white-space: pre-line; overflow-wrap: anywhere }
.right { color: #116329 } .wrong { color: #a40e26 } .truth, small { color: #555 }
.right::after { content: " \\2713" } .wrong::after { content: " \\2717" }"""


# What two files must agree in, or their difference is no difference between models: field -> what it is called.
SAME = {"question": "prompt", "answer": "truth", "choices": "options", "scoring": "scoring"}


def differences(records_a: Sequence[dict], records_b: Sequence[dict]) -> list[str]:
    """In what but the models the answers differ, so that their scores say nothing about these: variant, questions'
    texts, truths. Empty if nothing does. ValueError if they aren't answers to the same questions at all."""
    runs = [records[0]["run"] for records in (records_a, records_b)]
    for name in ("benchmark", "revision"):
        if runs[0][name] != runs[1][name]:
            raise ValueError(f"the answers differ in their {name}: {runs[0][name]} and {runs[1][name]}")
    if [record["id"] for record in records_a] != [record["id"] for record in records_b]:
        raise ValueError("both files must answer the same questions in the same order")
    notes = []
    if runs[0].get("variant") != runs[1].get("variant"):
        notes.append(f"variant: {runs[0].get('variant')} and {runs[1].get('variant')}")
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
    a = np.array([row["score"] for row in rows_a], float)
    b = np.array([row["score"] for row in rows_b], float)
    compared = {}
    for name, parts in strata(rows_a, records_a[0]["run"]["benchmark"]).items():
        indices = np.concatenate([i for _, i in parts])
        labels = np.repeat(range(len(parts)), [len(i) for _, i in parts])
        weights = [weight for weight, _ in parts]
        compared[name] = paired_comparison(a[indices], b[indices], strata=labels, weights=weights)
    return compared


def describe(compared: dict[str, dict]) -> list[list[str]]:
    """Rows of a table: what, difference, interval, p, questions, test; in percentage points."""
    rows = [["", "B - A, points", "95%", "p", "n", "test"]]
    for name, one in compared.items():
        low, high = (f"{100 * bound:+.1f}" for bound in one["ci95"])
        difference = f"{100 * one['difference']:+.1f}"
        rows.append([name, difference, f"[{low}, {high}]", f"{one['p']:.2g}", f"{one['n']:,}", one["test"]])
    return rows


def _thumbnail(source, side: int = 256) -> str:
    try:
        image = open_image(source)
    except (ValueError, OSError):  # counted as unanswered by both
        image = Image.new("RGB", (side, side), "white")
    image.thumbnail((side, side))
    image.save(buffer := io.BytesIO(), "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _truth(record: dict) -> str:
    if record["scoring"] == "vqa":
        return ", ".join(dict.fromkeys(record["answer"]))
    if record["scoring"] == "exact":
        return record["answer"]
    letter = record["answer"].strip("()").upper()
    return f"({letter}) {record['choices'][ord(letter) - ord('A')]}"


CARD = """<div class="card"><img src="data:image/jpeg;base64,{image}" alt=""><div><p>{question}</p>
<p class="{class_a}">A: {a}</p><p class="{class_b}">B: {b}</p><p class="truth">truth: {truth}</p>
<small>{id}</small></div></div>"""


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
    by_task = {record["task"]: [] for record in records_a}
    for pair in zip(records_a, records_b, strict=True):
        by_task[pair[0]["task"]].append((*pair, *(SCORERS[record["scoring"]](record) for record in pair)))
    run, models = records_a[0]["run"], [records[0]["run"]["model"] for records in (records_a, records_b)]
    parts = [f"<h1>{escape(run['benchmark'])}: where two models disagree</h1>"]
    parts.append("<p>A: {}<br>B: {}</p>".format(*map(escape, models)))
    for note in notes:
        parts.append(f"<p class='wrong'>They differ in more than the model: {escape(note)}</p>")
    parts.append("<table>")
    for row in describe(compared):
        parts.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    parts.append("</table>")
    for task, answered in by_task.items():
        pairs = [pair for pair in answered if pair[2] != pair[3]]
        places = np.linspace(0, len(pairs) - 1, min(len(pairs), max(1, limit // len(by_task)))).round().astype(int)
        a_better = sum(pair[2] > pair[3] for pair in pairs)
        counts = f"on {len(pairs):,} of {len(answered):,} questions: A is better on {a_better:,}, B on"
        shown = f"{len(pairs) - a_better:,}. Shown: {len(places)}."
        parts.append(f"<h2>{escape(task)}</h2><p>They disagree {counts} {shown}</p><div class='cards'>")
        for a, b, score_a, score_b in (pairs[i] for i in places):
            texts = {"id": a["id"], "question": a["question"].strip(), "truth": _truth(a)}
            texts |= {"a": a["output"] or "(nothing)", "b": b["output"] or "(nothing)"}
            texts = {name: escape(str(text)) for name, text in texts.items()}
            classes = {"class_a": "right" if score_a > score_b else "wrong"}
            classes["class_b"] = "right" if score_b > score_a else "wrong"
            parts.append(CARD.format(image=_thumbnail(read_image(a)), **texts, **classes))
        parts.append("</div>")
    head = f"<meta charset='utf-8'><title>{escape(run['benchmark'])}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


@command("compare")
def main(args: Namespace) -> None:
    records_a, records_b = read_answers(args.a), read_answers(args.b)
    compared = compare_records(records_a, records_b, args.anyway)
    notes = differences(records_a, records_b)
    run = records_a[0]["run"]
    known = None if run["revision"].startswith("sha256:") else run["revision"]
    place = {"data": args.data} if args.data else {"data": run["data"], "revision": known, "make": False}
    folder, revision = locate(run["benchmark"], **place)
    if revision != run["revision"] and not (known and args.data):
        raise ValueError(f"{folder} holds other questions ({revision}) than those answered ({run['revision']})")
    read_image = load_questions(run["benchmark"], folder, run["variant"])[1]
    text = page(records_a, records_b, compared, read_image, args.limit, notes)
    models = {letter: records[0]["run"] for letter, records in zip("AB", (records_a, records_b), strict=True)}
    write_json(args.out / "comparison.json", {**models, "differ_in": notes, "B - A": compared})
    write_whole(args.out / "disagreements.html", text)
    for note in notes:
        print(f"they differ in more than the model: {note}")
    for name, *cells, test in describe(compared):
        print(f"{one_line(name):<28}" + "".join(f"{cell:>16}" for cell in cells) + f"   {test}")
    print(f"disagreements: {args.out / 'disagreements.html'}")
    tell(f"Results: {args.out} (comparison.json, disagreements.html)", "Next: open the page in a browser")
