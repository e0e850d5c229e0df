"""The report of the study of visual objectives: tables in Markdown, and figures; a pure function of its results."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..probing.figures import STYLE
from ..recipes import study as design
from ..targets.files import save_figure, write_whole
from ..world import language
from .asking import CHANGES
from .report import ALPHA, table

FIGURE = "accuracy.png"
TASKS_FIGURE = "accuracy_by_task.png"
# An arm and its control share a color; controls are dashed.
COLORS = {
    "llava": "#222222",
    "llava_longer": "#8d8d8d",
    "ola_vlm": "#d1495b",
    "patch": "#2f9e9e",
    "patch_half": "#1b6ca8",
    "words": "#3a7d2c",
    "words_ola_vlm": "#e08a1e",
    "moments": "#7a4fb5",
    "moments_ola_vlm": "#c77cff",
}
NOTHING_IS_AT = 0.35  # how far left of the smallest budget 0 stands, as a share of that budget


def write_report(folder: Path, numbers: dict) -> str:
    """report.md (returned), report.json and the figures, into `folder`."""
    write_whole(folder / "report.json", json.dumps(numbers, indent=1))
    draw(folder / FIGURE, {"mean of the tasks": numbers["accuracy"]}, columns=1)
    draw(folder / TASKS_FIGURE, numbers["by_task"], columns=2)
    text = "\n".join(report_lines(numbers)) + "\n"
    write_whole(folder / "report.md", text)
    return text


def report_lines(numbers: dict) -> list[str]:
    lines = ["# Which visual objective makes answers better?", "", f"{numbers['trials']} results of confirming runs."]
    lines += ["", f"![accuracy against labels]({FIGURE})", ""]
    lines += ["## Accuracy on the test questions (%, mean of the tasks; 95% interval over seeds)", ""]
    lines += accuracy_lines(numbers["accuracy"])
    for family, rows in numbers["comparisons"].items():
        lines += ["", f"## {family}: difference in points over paired seeds", "", *comparison_lines(rows)]
    if numbers["labels"]:
        lines += ["", "## Scenes with questions that LLaVA needs for the same accuracy", ""]
        lines += labels_lines(numbers["labels"])
    lines += ["", "## Where projected tokens lie (norm, largest cosine to a word's embedding)", ""]
    lines += placement_lines(numbers["placement"])
    lines += ["", "## What validation answers lose when something is taken away (points, 95% interval)", ""]
    lines += changes_lines(numbers["changes"])
    if numbers["probes"]:
        lines += ["", "## Probes after pre-training and answers: Pearson's r over the arms' means", ""]
        lines += probe_lines(numbers["probes"])
    lines += ["", "## Costs (means over seeds; processor seconds of one thread)", "", *cost_lines(numbers["costs"])]
    for task, by_arm in numbers["by_task"].items():
        lines += ["", f"## Accuracy: {task}", "", *accuracy_lines(by_arm)]
    lines += ["", f"![accuracy by task]({TASKS_FIGURE})"]
    return lines


def budgets_in(by_arm: Mapping[str, Mapping[int, object]]) -> list[int]:
    return sorted({budget for cells in by_arm.values() for budget in cells})


def accuracy_lines(by_arm: Mapping[str, Mapping[int, dict]]) -> list[str]:
    budgets = budgets_in(by_arm)
    rows = []
    for arm, cells in by_arm.items():
        row = [arm, seeds_text(cells)]
        for budget in budgets:
            row.append(interval_text(cells[budget]["mean"], *cells[budget]["ci95"]) if budget in cells else "-")
        rows.append(row)
    return table(["arm", "seeds", *map(str, budgets)], rows)


def seeds_text(cells: Mapping[int, dict]) -> str:
    """How many seeds the cells have; the range if they differ."""
    counts = sorted({cell["n"] for cell in cells.values()})
    return "-".join(str(count) for count in (counts[0], counts[-1])[: len(counts)])


def interval_text(mean: float, low: float, high: float) -> str:
    if math.isnan(low):
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {(high - low) / 2:.1f}"


def comparison_lines(rows: list[dict]) -> list[str]:
    header = ["arm - other", "labels", "difference", "95% interval", "p", "p (Holm)", "seeds", "verdict"]
    lines = []
    for row in rows:
        low, high = row["ci95"]
        lines.append([
            f"{row['arm']} - {row['other']}",
            str(row["budget"]),
            f"{row['difference']:+.1f}",
            "-" if math.isnan(low) else f"[{low:+.1f}, {high:+.1f}]",
            p_text(row["p"]),
            p_text(row["p_holm"]),
            f"{row['positive']} of {row['n']} above 0",
            verdict(row),
        ])  # fmt: skip
    return table(header, lines)


def p_text(p: float) -> str:
    if math.isnan(p):
        return "-"
    return f"{p:.2g}" if p >= 1e-4 else "< .0001"


def verdict(row: dict) -> str:
    """What is shown, at 5% for the whole family; else what two one-sided tests at 5% exclude."""
    if math.isnan(row["p"]):
        return "one seed says nothing"
    if row["p_holm"] <= ALPHA:
        return "better" if row["difference"] > 0 else "worse"
    low, high = row["ci90"]
    return f"not shown; excluded: above {high:+.1f}, below {low:+.1f}"


def labels_lines(needed: Mapping[str, Mapping[int, float]]) -> list[str]:
    budgets = budgets_in(needed)
    most = budgets[-1]
    rows = []
    for arm, cells in needed.items():
        row = [arm]
        for budget in budgets:
            value = cells.get(budget)
            row.append(labels_text(value, most))
        rows.append(row)
    return table(["arm at its own labels", *map(str, budgets)], rows)


def labels_text(value: float | None, most: int) -> str:
    if value is None:
        return "-"
    return f"more than {most}" if math.isinf(value) else f"{value:.0f}"


def placement_lines(placed: Mapping[str, Mapping[int, dict]]) -> list[str]:
    budgets = budgets_in(placed)
    rows = []
    for arm, cells in placed.items():
        row = [arm]
        for budget in budgets:
            cell = cells.get(budget)
            row.append(f"{cell['token_norm']:.1f}, {cell['largest_cosine']:.2f}" if cell else "-")
        any_cell = next(iter(cells.values()))
        rows.append([*row, f"{any_cell['embedding_norm']:.2f}"])
    return table(["arm", *map(str, budgets), "norm of an embedding"], rows)


def changes_lines(rows: list[dict]) -> list[str]:
    names = [name for name in CHANGES if any(name in row for row in rows)]
    lines = []
    for row in rows:
        cells = [interval_text(*row[name]) if name in row else "-" for name in names]
        lines.append([row["arm"], str(row["budget"]), *cells])
    return table(["arm", "labels", *(name.replace("_", " ") for name in names)], lines)


def probe_lines(rows: list[dict]) -> list[str]:
    cells = [[row["target"], str(row["budget"]), f"{row['r']:+.2f}", str(row["n"])] for row in rows]
    return table(["probe's target", "labels of the answers", "r", "arms"], cells)


def cost_lines(costs: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    names = list(next(iter(costs.values())))
    rows = []
    for arm, cells in costs.items():
        rows.append([arm, *("-" if cells[name] is None else f"{cells[name]:.0f}" for name in names)])
    return table(["arm", *names], rows)


# ---------------------------------------------------------------------------------------------------------- figures


@rc_context(STYLE)
def draw(path: Path, panels: Mapping[str, Mapping[str, Mapping[int, dict]]], columns: int) -> None:
    """Accuracy against scenes with questions, a panel a task; one line an arm, bars: 95% intervals over seeds."""
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(8.5 if columns == 1 else 12, 5.2 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (title, by_arm) in zip(axes, panels.items(), strict=False):
        draw_panel(axis, title, by_arm)
    handles, labels = axes[0].get_legend_handles_labels()
    place: dict = {"loc": "outside right center"} if columns == 1 else {"loc": "outside upper center", "ncols": 4}
    figure.legend(handles, labels, **place)
    figure.supxlabel(
        "scenes with questions (0: right after pre-training); bars: 95% intervals over seeds", fontsize=11
    )
    save_figure(figure, path, dpi=130)


def draw_panel(axis: Axes, title: str, by_arm: Mapping[str, Mapping[int, dict]]) -> None:
    budgets = budgets_in(by_arm)
    places = budget_places(budgets)
    for number, (arm, cells) in enumerate(by_arm.items()):
        style = line_style(arm)
        # Side by side, so that bars of arms of one height can be told apart.
        shift = 1.025 ** (number - (len(by_arm) - 1) / 2)
        x = [places[budget] * shift for budget in cells]
        mean = [cell["mean"] for cell in cells.values()]
        half = [half_width(cell["ci95"]) for cell in cells.values()]
        axis.errorbar(x, mean, yerr=half, capsize=2, elinewidth=1, markersize=5, label=arm_label(arm), **style)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(places.values())))
    axis.xaxis.set_minor_locator(NullLocator())
    names = {round(place, 6): f"{budget:,}" for budget, place in places.items()}
    axis.xaxis.set_major_formatter(FuncFormatter(lambda place, _: names.get(round(place, 6), "")))
    chance = language.CHANCE["average" if title not in language.CHANCE else title]
    axis.axhline(100 * chance, color="black", linestyle=":", linewidth=1, label="chance")
    axis.set(title=title, ylabel="accuracy on test questions (%)")


def budget_places(budgets: list[int]) -> dict[int, float]:
    """Where a budget stands on a logarithmic axis: 0 left of the smallest."""
    positive = [budget for budget in budgets if budget > 0]
    least = NOTHING_IS_AT * min(positive) if positive else 1.0
    return {budget: float(budget or least) for budget in budgets}


def half_width(ci95: list[float]) -> float:
    low, high = ci95
    return 0.0 if math.isnan(low) else (high - low) / 2


def arm_label(arm: str) -> str:
    return design.ARMS.get(arm, {}).get("label", arm)


def line_style(arm: str) -> dict:
    """A control is dashed, in the color of what it controls."""
    owner = next((own for own, control in design.CONTROLS.items() if control == arm), None)
    if owner is None:
        return {"color": COLORS.get(arm, "#555555"), "linestyle": "-", "marker": "o"}
    return {"color": COLORS.get(owner, "#555555"), "linestyle": "--", "marker": "s"}
