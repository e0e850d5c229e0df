"""report.md and losses.png of a run with SmolLM2, made of its report.json."""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..eval.statistics import t_interval
from ..files.writing import save_figure
from ..probing.figures import METHODS as METHOD_COLORS
from ..probing.figures import STYLE, TASK_COLORS, method_styles

STAGE_NAMES = {"pretrain": "after PT", "finetune": "after IFT"}
BASELINE = "llava"
TITLES = {
    "equal_answers": "answers that are equal to the last token",
    "equal_tokens": "equal tokens, place by place",
    "next_tokens": "equal next tokens after the plain model's own words",
    "max_logit_difference": "largest difference of a logit along these words",
}


def table(head: list[str], rows: list[list]) -> str:
    """Markdown; floats with three digits."""
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([cell_text(cell) for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def cell_text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return str(cell)


def mean_loss(losses: dict[str, list[float]], whose: str = "own") -> float:
    """The mean loss of a token over the rows of `row_losses`."""
    return sum(losses[whose]) / sum(losses["tokens"])


def each_stage(results: dict) -> dict[str, dict]:
    """What was found at all stages of all methods, by "words, after PT"; by "after PT" if there is one method."""
    found = {}
    for method, stages in results["methods"].items():
        for stage, of_stage in stages.items():
            name = stage
            if len(results["methods"]) > 1:
                name = f"{method}, {stage}"
            found[name] = of_stage
    return found


def embedding_losses(results: dict) -> dict[tuple[str, str, int, str], list]:
    """(method, task, layer, part) -> [[PT step, value], ...]."""
    found = {}
    for method, stages in results["methods"].items():
        for name, curve in stages["after PT"]["training_loss"].items():
            # A part without a weight is logged as 0.
            if name.count("/") == 3 and any(value for _, value in curve):
                _, task, layer, part = name.split("/")
                found[method, task, int(layer), part] = curve
    return found


def differences(results: dict, method: str, stage: str) -> list[list]:
    """Rows of a table: the mean over held-out rows of a method's loss minus the baseline's, with its 95% interval."""
    ours = results["methods"][method][stage]["held_out_loss"]
    theirs = results["methods"][BASELINE][stage]["held_out_loss"]
    rows = []
    for group, losses in ours.items():
        # Row by row: how hard a row is falls out of the difference.
        tokens = np.array(losses["tokens"])
        mean, low, high = t_interval((np.array(losses["own"]) - np.array(theirs[group]["own"])) / tokens)
        rows.append([f"{method}, {stage}", group, f"{mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]"])
    return rows


def compared(results: dict) -> list[list]:
    rows = []
    for method, stages in results["methods"].items():
        if method != BASELINE and BASELINE in results["methods"]:
            for stage in stages:
                rows += differences(results, method, stage)
    return rows


def report_text(results: dict) -> str:
    """report.md of report.json's content."""
    # Columns and rows of the tables.
    found = each_stage(results)
    trained = {name: of for name, of in found.items() if "text_only" in of}
    finetuned = {name: of for name, of in found.items() if "accuracy" in of}
    # All have the same groups, and all that were trained the same tasks: the first one's.
    groups = list(next(iter(found.values()))["held_out_loss"])
    tasks = list(next(iter(trained.values()))["chosen"])
    chance = ["chance", *(100 * results["chance"][task] for task in tasks)]
    steps = ", ".join(f"{name} {of['steps']}" for name, of in trained.items())
    prompts = next(iter(trained.values()))["text_only"]["prompts"]

    # The tables' content.
    held_out = []
    looked = []
    for name, of in found.items():
        losses = of["held_out_loss"]
        held_out.append([name, *(mean_loss(losses[group]) for group in groups)])
        looked.append([name, *(mean_loss(losses[group], "other") for group in groups)])
    chosen = []
    for name, of in trained.items():
        chosen.append([name, *(100 * of["chosen"][task] for task in tasks)])
    answered = []
    for name, of in finetuned.items():
        answered.append([name, *(100 * of["accuracy"][task] for task in tasks)])
    placed = [[name, *of["placement"].values()] for name, of in found.items()]
    kept = []
    for name, title in TITLES.items():
        kept.append([title, *(of["text_only"][name] for of in trained.values())])
    # The trainer logs every 10 steps: five entries are 50 steps.
    taught = []
    for key, curve in embedding_losses(results).items():
        values = np.array(curve)[:, 1]
        taught.append([*key, float(values[:5].mean()), float(values[-5:].mean())])
    # Sections without content are left out below: without IFT there are no answers.
    sections = {
        "Held-out next-token loss": table(["", *groups], held_out),
        "Held-out next-token loss, with another image of the group": table(["", *groups], looked),
        f"A row's loss minus {BASELINE}'s [95% over rows]": table(["", "group", "difference", ""], compared(results)),
        "Questions on scenes not seen, the likeliest choice, in %": table(["", *tasks], [chance, *chosen]),
        "Answers on scenes not seen, in %": table(["", *tasks], [chance, *answered]) if answered else "",
        "Where projected tokens lie": table(["", "token norm", "embedding norm", "largest cosine"], placed),
        f"Text-only greedy answers against the plain language model's, {prompts} prompts (shares)": table(
            ["", *trained], kept
        ),
        "Embedding losses in PT": table(
            ["method", "task", "layer", "part", "first 50 steps", "last 50 steps"], taught
        ),
    }
    text = (
        "# SmolLM2-135M-Instruct taught to look\n\n"
        f"Steps: {steps}. Rows: {results['rows']}. Seconds: {results['seconds']}.\n\n"
    )
    for title, content in sections.items():
        if content:
            text += f"## {title}\n\n{content}"
    text += "![losses](losses.png)\n\n"
    for name, of in finetuned.items():
        text += f"## Transcripts, {name}\n\n"
        for talk in of["transcripts"]:
            turns = [f"> **user:** {question}\n>\n> **model:** {answer}\n" for question, answer in talk["turns"]]
            text += f"{talk['group']}, `{talk['image']}`:\n\n" + ">\n".join(turns) + "\n"
    return text


def draw_losses(results: dict, path: Path) -> None:
    """Next-token loss over both stages, a line a method; the embedding losses over PT by part, a color a task, dashed
    for its later layer."""
    curves = embedding_losses(results)
    parts = list(dict.fromkeys(part for *_, part in curves))
    with rc_context(STYLE):
        figure = Figure(figsize=(5 * (1 + len(parts)), 4.2), layout="constrained")
        first, *others = figure.subplots(1, 1 + len(parts), squeeze=False)[0]
        for method, style in method_styles(results["methods"]).items():
            # IFT's steps behind PT's.
            points = []
            start = 0
            for stage in STAGE_NAMES.values():
                of_stage = results["methods"][method].get(stage)
                if of_stage is not None:
                    points += [(start + step, value) for step, value in of_stage["training_loss"]["loss/ntp"]]
                    start += of_stage["steps"]
            first.plot(*zip(*points, strict=True), **{**style, "marker": ""})
        first.set(title="next-token loss", xlabel="step")
        first.legend(fontsize=10)
        for part, axis in zip(parts, others, strict=True):
            seen = set()
            for (_, task, layer, of_part), curve in curves.items():
                if of_part == part:
                    line = "-"
                    if task in seen:
                        line = "--"
                    look: dict = {"linestyle": line, "label": f"{task}, layer {layer}"}
                    axis.plot(*zip(*curve, strict=True), color=task_color(task), **look)
                    seen.add(task)
            axis.set(title=f"{part.replace('_', ' ')}, PT", xlabel="step")
            axis.legend(fontsize=10)
        save_figure(figure, path, dpi=90)


def task_color(task: str) -> str:
    # A task that bears a method's name has its color.
    if task in METHOD_COLORS:
        return METHOD_COLORS[task][1]
    return TASK_COLORS[task]
