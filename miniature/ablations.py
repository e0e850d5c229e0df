"""The paper's ablations in miniature: `ola-vlm study ablations`. Tables 3 to 6 and I to V, each with its rows and
seeds over the world of `ola-vlm miniature`.

Rows are trials, a process of one thread each; what is done is not done again, so that more tables, rows or seeds can
follow later, and an `--out` of `ola-vlm miniature` brings its llava and ola_vlm along. After each trial the report is
written of all that is done so far: ablations.md, ablations.json and a figure a table.
"""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..commands.running import command, tell
from ..files.writing import save_figure, write_json, write_whole
from ..probing.figures import METHODS, STYLE, TASK_COLORS
from ..recipes.miniature import ABLATIONS, TASKS, ablation_run
from ..world import language
from .report import STAGES as WHEN
from .report import table
from .study import FULL, SHRUNK, prepare, read_trials, run_trials
from .trial import STAGES, read_json

# Table of `ABLATIONS` -> where the paper has it, and what its rows vary.
TITLES = {
    "layers": ("Table 3", "layers with embedding losses"),
    "losses": ("Table 4", "stages with embedding losses"),
    "tokens": ("Table 5", "task tokens a task, N_seek"),
    "learnable": ("Table 6", "task tokens in IFT"),
    "keys": ("Table I", "what predictors attend to"),
    "tasks": ("Table II", "tasks"),
    "order": ("Table III", "order of the task tokens"),
    "lambda": ("Table IV", "weight of the embedding losses"),
    "terms": ("Table V", "terms of the embedding loss"),
}
# The columns of every table: accuracies, then a probe's score for each stage and teacher's task.
ACCURACIES = [*language.TASKS, "average"]
PROBES = [(task["name"], stage) for stage, task in product(STAGES, TASKS)]


def numbers(seed: dict) -> dict[str, float]:
    """A trial's: accuracies in per cent at the last IFT step; probes' mean-centered cosines, means over LLM layers."""
    numbers = {task: 100 * seed["accuracy"][task] for task in ACCURACIES}
    for task, stage in PROBES:
        layers = seed["probes"][stage][task]
        # Layer 0 is the embeddings, before the language model.
        scores = [layers[layer]["ridge"] for layer in layers if layer != "0"]
        numbers[f"{task}, {WHEN[stage]}"] = float(np.mean(scores))
    return numbers


def rows_of(name: str, results: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Row -> its seeds' numbers, for the rows of a table that are done."""
    # A row that changes nothing is ola_vlm itself, one without tasks is llava: such rows share a run.
    runs = {row: ablation_run(name, row) for row in ABLATIONS[name]}
    return {row: list(map(numbers, results[run])) for row, run in runs.items() if run in results}


def table_text(name: str, rows: dict[str, list[dict]]) -> list[str]:
    """Markdown: mean ± sd over seeds, where there are several."""
    # All trials have the same columns: the first row's first seed tells them.
    columns = list(next(iter(rows.values()))[0])
    lines = []
    for row, seeds in rows.items():
        cells = []
        for column in columns:
            values = [seed[column] for seed in seeds]
            # Per cent, or cosines.
            digits = 3
            if column in ACCURACIES:
                digits = 1
            cell = f"{np.mean(values):.{digits}f}"
            if len(values) > 1:
                cell += f" ± {np.std(values, ddof=1):.{digits}f}"
            cells.append(cell)
        label = row
        # The unchanged method stands in several tables, each time with the same trials: its row says so.
        if ablation_run(name, row) == "ola_vlm":
            label += " (ola_vlm)"
        lines.append([label, str(len(seeds)), *cells])
    return table([name, "seeds", *columns], lines)


def row_label(name: str, row: str) -> str:
    """A row as a figure names it: a method by its own name, else what differs from OLA-VLM."""
    method = ablation_run(name, row)
    words = row.replace("_", " ")
    if method not in METHODS:
        return words
    label = METHODS[method][0]
    if method == "ola_vlm":
        return f"{words} ({label})"
    return label


@rc_context(STYLE)
def draw_table(path: Path, name: str, rows: dict[str, list[dict]]) -> None:
    """Rows from top to bottom; left accuracy, right probes: a dot a seed, a line for the mean."""
    # A panel of accuracies and one of probes for each stage; all have the same rows.
    figure = Figure(figsize=(11, 1.9 + 0.42 * len(rows)), layout="constrained")
    accuracy, *probes = figure.subplots(1, 1 + len(STAGES), sharey=True)
    # Upward is an axis's direction: the first row has the largest number.
    places = np.arange(len(rows))[::-1]
    accuracy.set_yticks(places, [row_label(name, row) for row in rows])

    # `shift` keeps the dots of several tasks in one row apart.
    def draw(axis, column: str, color, label: str, shift: float):
        for place, seeds in zip(places + shift, rows.values(), strict=True):
            values = [seed[column] for seed in seeds]
            axis.plot(values, [place] * len(values), "o", color=color, markersize=5, alpha=0.6)
            axis.plot([np.mean(values)], [place], "|", color=color, markersize=14, markeredgewidth=2.5)
        # An empty line for the legend: with a label, the dots would appear there once a row.
        axis.plot([], [], "o", color=color, label=label)

    draw(accuracy, "average", "0.25", "mean of the tasks", 0)
    accuracy.axvline(100 * language.CHANCE["average"], color="black", linestyle=":", label="chance")
    accuracy.set(xlabel="accuracy after IFT (%)", title="answers", ylim=(-0.6, len(rows) - 0.4))
    # The tasks of a row above each other: 0.2 up, in place, 0.2 down.
    for axis, stage in zip(probes, STAGES, strict=True):
        for i, task in enumerate(task["name"] for task in TASKS):
            draw(axis, f"{task}, {WHEN[stage]}", TASK_COLORS[task], task, 0.2 * (1 - i))
        axis.set(xlabel="mean-centered cosine", title=f"probes {WHEN[stage]}, layers 1 to 4")
    accuracy.legend(fontsize=9, loc="best")
    probes[-1].legend(fontsize=9, loc="best")
    where, what = TITLES[name]
    figure.suptitle(f"{what} ({where} in the paper); dots: seeds, vertical bars: their means")
    save_figure(figure, path, dpi=130)


def write_report(root: Path, names: Sequence[str], trials: list[tuple[str, int]]) -> str:
    """ablations.md (returned), ablations.json and a figure a table, of what is done so far."""
    # What is not done yet is left out: this is also called while trials are on their way.
    results, alphas = read_trials(root, trials)
    done = sum(map(len, results.values()))
    about = (
        f"{done} of {len(trials)} trials done. Accuracies in per cent after IFT; probes: mean-centered cosine, mean "
        "over LLM layers 1 to 4; ± sd over seeds."
    )
    lines = ["# Ablations in miniature", "", about]
    settings = read_json(root / "settings.json")
    if settings["shrunk"]:
        lines += ["", "**Shrunken to check the chain: the numbers mean nothing.**"]
    elif "steps" in settings:
        lines += ["", "A short sweep: {} steps of PT and {} of IFT.".format(*settings["steps"])]
    tables = {}
    for name in names:
        rows = rows_of(name, results)
        if not rows:
            continue
        tables[name] = rows
        where, what = TITLES[name]
        draw_table(root / f"ablation_{name}.png", name, rows)
        lines += ["", f"## {where}: {what}", "", *table_text(name, rows), "", f"![{what}](ablation_{name}.png)"]
        missing = [row for row in ABLATIONS[name] if row not in rows]
        if missing:
            lines += ["", f"Not done yet: {', '.join(missing)}."]
    write_json(root / "ablations.json", {"tables": tables, "ridge_alpha": alphas}, indent=1)
    write_whole(root / "ablations.md", "\n".join(lines) + "\n")
    return "\n".join(lines)


@command("study")
def main(args: Namespace) -> None:
    root = args.out.resolve()
    size = FULL
    if args.shrunk:
        size = SHRUNK
    # The runs of all tables that are asked for.
    runs = []
    for name in args.tables:
        runs += [ablation_run(name, row) for row in ABLATIONS[name]]
    # A run may be a row of several tables. Seed by seed: interrupted, all runs have come equally far.
    trials = [(run, seed) for seed, run in product(range(args.seeds), dict.fromkeys(runs))]
    # A report trains nothing: it neither renders a world nor compares settings.
    if args.report:
        if not root.exists():
            raise ValueError(f"{args.out} does not exist: nothing is done yet")
        print(write_report(root, args.tables, trials))
        return
    # Other lengths of the stages are a part of the settings: their results need a folder of their own.
    overrides = dict(size["overrides"])
    settings = {"shrunk": args.shrunk}
    if args.steps:
        settings["steps"] = args.steps
        for stage, count in zip(STAGES, args.steps, strict=True):
            overrides[stage] = {**overrides.get(stage, {}), "max_steps": count}
    prepare(root, size, settings)
    run_trials(root, trials, overrides, args.workers, partial(write_report, root, args.tables, trials))
    print(write_report(root, args.tables, trials))
    tell(
        f"Results: {args.out} (ablations.md, ablations.json, a figure a table)",
        "Next: the same command with more --tables or --seeds; what is done is not done again",
    )
