"""The report of the study of visual objectives: tables in Markdown, and figures; a pure function of its results."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..files.writing import save_figure, write_whole
from ..probing.figures import STYLE
from ..recipes import study as design
from ..world import language
from .asking import CHANGES
from .report import ALPHA, table

FIGURE = "accuracy.png"
TASKS_FIGURE = "accuracy_by_task.png"
PROBES_FIGURE = "probes_and_answers.png"
ALONG_FIGURE = "along_finetuning.png"
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
# What the table of all comparisons has in its cells.
GLANCE = (
    "Bold: shown, with its p after Holm's correction within the family. Else the 90% interval: what lies outside is "
    "excluded by two one-sided tests at 5%, each by itself. What was not tested has neither."
)
# Where budget 0 stands on a logarithmic axis, which has no 0: at this share of the smallest budget.
NOTHING_IS_AT = 0.35


def write_report(folder: Path, numbers: dict) -> str:
    """report.md (returned), report.json and the figures, into `folder`."""
    write_whole(folder / "report.json", numbers_text(numbers))
    draw(folder / FIGURE, {"mean of the tasks": numbers["accuracy"]}, columns=1)
    draw(folder / TASKS_FIGURE, numbers["by_task"], columns=2)
    draw_along(folder / ALONG_FIGURE, numbers["along"])
    # Longer fine-tunings have no probes after pre-training.
    if any(row["probed_at"] == 0 for row in numbers["probes"]):
        draw_probes(folder / PROBES_FIGURE, numbers["probes"])
    text = report_text(numbers)
    write_whole(folder / "report.md", text)
    return text


def numbers_text(numbers: dict) -> str:
    """As JSON, which has no infinity and no NaN: null stands for both, in `labels` for more than were tried."""
    return json.dumps(finite(numbers), indent=1, allow_nan=False)


def finite(value):
    """The same with None for numbers that are infinite or NaN."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def report_text(numbers: dict) -> str:
    return "\n".join(report_lines(numbers)) + "\n"


def report_lines(numbers: dict) -> list[str]:
    # What was asked first, then why: where tokens lie, what answers depend on, what probes see, what it costs.
    lines = ["# Which visual objective makes answers better?", "", f"{numbers['trials']} results of confirming runs."]
    lines += ["", f"![accuracy against labels]({FIGURE})", ""]
    lines += ["## Accuracy on the test questions (%, mean of the tasks; 95% interval over seeds)", ""]
    lines += accuracy_lines(numbers["accuracy"])
    lines += ["", "## All comparisons at a glance (points over paired seeds)", "", GLANCE, ""]
    lines += glance_lines(numbers["comparisons"])
    # A section a family: Holm's correction is made within it.
    for family, rows in numbers["comparisons"].items():
        lines += ["", f"## {family}: difference in points over paired seeds", "", *comparison_lines(rows)]
    if numbers["labels"]:
        lines += ["", "## Scenes with questions that LLaVA needs for the same accuracy", ""]
        lines += labels_lines(numbers["labels"], numbers["labels_ranges"], numbers["labels_tried"])
        lines += ["", "In brackets: 95% of 1,000 resamples of the seeds, an arm's together with LLaVA's."]
    lines += ["", "## Where projected tokens lie (norm, largest cosine to a word's embedding)", ""]
    lines += placement_lines(numbers["placement"])
    lines += ["", f"![answers, and where projected tokens lie, along fine-tuning]({ALONG_FIGURE})"]
    lines += ["", "## When the best step of a fine-tuning came (mean of the most steps; seeds with the last one)", ""]
    lines += best_step_lines(numbers["best_steps"])
    lines += ["", "## What validation answers lose when something is taken away (points, 95% interval)", ""]
    lines += [*changes_lines(numbers["changes"]), "", chosen_sentence(numbers["chosen_minus_test"])]
    if numbers["probes"]:
        lines += ["", "## Ridge probes after pre-training (0) and after the most labels", ""]
        lines += ["Mean-centered cosine on test images, mean of the layers; 95% interval over seeds.", ""]
        lines += probe_score_lines(numbers["probe_scores"])
        lines += ["", "## Do better probes go with better answers? Pearson's r", ""]
        lines += probe_lines(numbers["probes"])
        if any(row["probed_at"] == 0 for row in numbers["probes"]):
            lines += ["", f"![probes against answers]({PROBES_FIGURE})"]
    lines += ["", "## Costs (medians over seeds; processor seconds of one thread)", "", *cost_lines(numbers["costs"])]
    lines += ["", "## Accuracy of each seed with the most labels", "", *seed_lines(numbers["by_seed"])]
    for task, by_arm in numbers["by_task"].items():
        lines += ["", f"## Accuracy: {task}", "", *accuracy_lines(by_arm)]
    lines += ["", f"![accuracy by task]({TASKS_FIGURE})"]
    return lines


def budgets_in(by_arm: Mapping[str, Mapping[int, object]]) -> list[int]:
    """In rising order."""
    return sorted(columns_in(by_arm))


def columns_in(by_arm: Mapping[str, Mapping]) -> list:
    """Those that some arm has, in their order: arms that joined later, or are still on their way, have fewer."""
    # A dict, whose keys keep their order.
    found = {}
    for cells in by_arm.values():
        found.update(dict.fromkeys(cells))
    return list(found)


def row_of(arm: str, cells: Mapping, columns: Sequence, text: Callable) -> list[str]:
    """A table's row: each of the arm's cells by `text`, "-" where it has none: it joined later, or is on its way."""
    row = [arm]
    for column in columns:
        cell = "-"
        if column in cells:
            cell = text(cells[column])
        row.append(cell)
    return row


def accuracy_lines(by_arm: Mapping[str, Mapping[int, dict]]) -> list[str]:
    def text(cell: dict) -> str:
        return interval_text(cell["mean"], *cell["ci95"])

    budgets = budgets_in(by_arm)
    rows = []
    for arm, cells in by_arm.items():
        arm, *texts = row_of(arm, cells, budgets, text)
        rows.append([arm, seeds_text(cells), *texts])
    return table(["arm", "seeds", *map(str, budgets)], rows)


def seed_lines(by_arm: Mapping[str, Mapping[int, float]]) -> list[str]:
    def text(accuracy: float) -> str:
        return f"{accuracy:.1f}"

    seeds = sorted(columns_in(by_arm))
    rows = [row_of(arm, cells, seeds, text) for arm, cells in by_arm.items()]
    return table(["arm", *(f"seed {seed}" for seed in seeds)], rows)


def seeds_text(cells: Mapping[int, dict]) -> str:
    """How many seeds the cells have; the range if they differ."""
    counts = sorted({cell["n"] for cell in cells.values()})
    # Counts that agree are one number; else the least and the largest, "3-8".
    return "-".join(str(count) for count in (counts[0], counts[-1])[: len(counts)])


def interval_text(mean: float, low: float, high: float) -> str:
    # One seed has no interval.
    if math.isnan(low):
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {(high - low) / 2:.1f}"


def comparison_lines(rows: list[dict]) -> list[str]:
    intervals = ["95% interval", "90% interval"]
    header = ["arm - other", "labels", "difference", *intervals, "p", "p (Holm)", "seeds", "verdict"]
    lines = []
    for row in rows:
        lines.append([
            f"{row['arm']} - {row['other']}",
            str(row["budget"]),
            f"{row['difference']:+.1f}",
            bounds_text(*row["ci95"]),
            bounds_text(*row["ci90"]),
            p_text(row["p"]),
            p_text(row["p_holm"]),
            f"{row['positive']} of {row['n']} above 0",
            verdict(row),
        ])  # fmt: skip
    return table(header, lines)


def glance_lines(families: Mapping[str, list[dict]]) -> list[str]:
    """A row a comparison, a column a budget, `GLANCE` says what is in it; the families' own tables have the rest."""
    by_pair: dict[str, dict[int, dict]] = {}
    for rows in families.values():
        for row in rows:
            by_pair.setdefault(f"{row['arm']} - {row['other']}", {})[row["budget"]] = row
    budgets = budgets_in(by_pair)
    lines = [row_of(pair, cells, budgets, glance_text) for pair, cells in by_pair.items()]
    return table(["arm - other", *map(str, budgets)], lines)


def glance_text(row: dict) -> str:
    difference = f"{row['difference']:+.1f}"
    if math.isnan(row["p"]):
        return difference
    if not is_shown(row):
        return f"{difference} {bounds_text(*row['ci90'])}"
    p = p_text(row["p_holm"])
    # "< .0001" brings its own sign.
    if not p.startswith("<"):
        p = f"= {p}"
    return f"**{difference}** (p {p})"


def is_shown(row: dict) -> bool:
    """At 5% for the whole family. NaN, of what was not tested, is at most nothing."""
    return row["p_holm"] <= ALPHA


def bounds_text(low: float, high: float) -> str:
    # One seed has no interval.
    if math.isnan(low):
        return "-"
    return f"[{low:+.1f}, {high:+.1f}]"


def p_text(p: float) -> str:
    if math.isnan(p):
        return "-"
    if p < 1e-4:
        return "< .0001"
    # Three digits: of two, 0.0498 would be 0.05.
    return f"{p:.3g}"


def verdict(row: dict) -> str:
    """What is shown, at 5% for the whole family; else what two one-sided tests at 5% exclude."""
    if math.isnan(row["p"]):
        # Each hypothesis of the family must have them, not only this one.
        return f"not tested (seeds: {row['n']} of {len(design.CONFIRMING_SEEDS)})"
    if is_shown(row):
        if row["difference"] > 0:
            return "better"
        return "worse"
    # Two one-sided tests at 5% are an interval of 90%.
    low, high = row["ci90"]
    excluded = f"excluded: above {high:+.1f}, below {low:+.1f}"
    # Without the correction no effect would be excluded, too: both are said.
    if not low <= 0 <= high:
        return f"not shown with Holm's correction (p = {p_text(row['p'])} alone); {excluded}"
    return f"not shown; {excluded}"


def labels_lines(
    needed: Mapping[str, Mapping[int, float]],
    ranges: Mapping[str, Mapping[int, list[float]]],
    tried: list[int],
) -> list[str]:
    """`tried`: the baseline's own budgets above 0, between the least and the largest of which its curve goes."""

    def text(scenes: float) -> str:
        return labels_text(scenes, least=tried[0], most=tried[-1])

    budgets = budgets_in(needed)
    rows = []
    for arm, cells in needed.items():
        arm, *texts = row_of(arm, cells, budgets, text)
        row = [arm]
        for budget, shown in zip(budgets, texts, strict=True):
            # One seed has no range.
            ends = [text(end) for end in ranges.get(arm, {}).get(budget, ())]
            # Both are the value itself where no resample says otherwise.
            if len(set(ends)) > 1:
                shown += f" ({ends[0]} to {ends[1]})"
            row.append(shown)
        rows.append(row)
    return table(["arm at its own labels", *map(str, budgets)], rows)


def labels_text(value: float, least: int, most: int) -> str:
    # The baseline is as good without labels.
    if value == 0:
        return "0"
    # It is as good with the least budget, and fewer labels were not tried.
    if value <= least:
        return f"at most {least}"
    # The baseline never gets there, with as many labels as there are.
    if math.isinf(value):
        return f"more than {most}"
    return f"{value:.0f}"


def placement_lines(placed: Mapping[str, Mapping[int, dict]]) -> list[str]:
    def text(cell: dict) -> str:
        return f"{cell['token_norm']:.1f}, {cell['largest_cosine']:.2f}"

    budgets = budgets_in(placed)
    rows = []
    for arm, cells in placed.items():
        # The language model's own embeddings hardly move: one figure stands for all.
        any_cell = next(iter(cells.values()))
        rows.append([*row_of(arm, cells, budgets, text), f"{any_cell['embedding_norm']:.2f}"])
    return table(["arm", *map(str, budgets), "norm of an embedding"], rows)


def best_step_lines(found: Mapping[str, Mapping[int, dict]]) -> list[str]:
    def text(cell: dict) -> str:
        return f"{cell['mean']:.0f} of {cell['most']} ({cell['last']} of {cell['n']})"

    budgets = budgets_in(found)
    rows = [row_of(arm, cells, budgets, text) for arm, cells in found.items()]
    return table(["arm", *map(str, budgets)], rows)


def changes_lines(rows: list[dict]) -> list[str]:
    def text(interval: Sequence[float]) -> str:
        return interval_text(*interval)

    # Those that some arm has: without task tokens there are none to be changed.
    known = set().union(*rows)
    names = [name for name in CHANGES if name in known]
    lines = []
    for row in rows:
        arm, *texts = row_of(row["arm"], row, names, text)
        lines.append([arm, str(row["budget"]), *texts])
    return table(["arm", "labels", *(name.replace("_", " ") for name in names)], lines)


def chosen_sentence(differences: Mapping[int, float]) -> str:
    """How far validation answers may be too good at the step that they chose."""
    parts = [f"{difference:+.1f} with {budget}" for budget, difference in differences.items()]
    return (
        "Steps were chosen by these answers, so part of a loss may be the choice's. Points by which they lie above "
        f"the test answers, by labels, over all arms and seeds: {', '.join(parts)}."
    )


def probe_score_lines(by_arm: Mapping[str, Mapping[str, dict]]) -> list[str]:
    def text(cell: dict) -> str:
        # Cosines: hundredths of them differ.
        return f"{cell['mean']:.3f} ± {half_width(cell['ci95']):.3f}"

    columns = columns_in(by_arm)
    rows = [row_of(arm, cells, columns, text) for arm, cells in by_arm.items()]
    return table(["arm", *columns], rows)


def probe_lines(rows: list[dict]) -> list[str]:
    cells = []
    for row in rows:
        cells.append([
            f"{row['target']}, {row['probed_at']}",
            str(row["budget"]),
            r_text(row.get("r")),
            " to ".join(r_text(r) for r in row.get("without_two", [None])),
            str(row["n"]),
            r_text(row.get("r_within")),
            str(row.get("n_within", "-")),
        ])  # fmt: skip
    over_arms = ["r over the arms' means", "without any two of them", "arms"]
    return table(["probe", "labels of the answers", *over_arms, "r of seeds within arms", "results"], cells)


def r_text(r: float | None) -> str:
    if r is None or math.isnan(r):
        return "-"
    return f"{r:+.2f}"


def cost_lines(costs: Mapping[str, Mapping[str, float]]) -> list[str]:
    def text(value: float) -> str:
        # Of seconds and megabytes three digits; 0 stays 0.
        return f"{value:.3g}"

    columns = columns_in(costs)
    rows = [row_of(arm, cells, columns, text) for arm, cells in costs.items()]
    return table(["arm", *columns], rows)


# ---------------------------------------------------------------------------------------------------------- figures


@rc_context(STYLE)
def draw(path: Path, panels: Mapping[str, Mapping[str, Mapping[int, dict]]], columns: int) -> None:
    """Accuracy against scenes with questions, a panel a task; one line an arm, bars: 95% intervals over seeds."""
    rows = math.ceil(len(panels) / columns)
    # A single panel has room for the legend at its side.
    width = 12
    place: dict = {"loc": "outside upper center", "ncols": 4}
    if columns == 1:
        width = 8.5
        place = {"loc": "outside right center"}
    figure = Figure(figsize=(width, 5.2 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    # Not strict: the last row of the grid may have a place more than there are panels.
    for axis, (title, by_arm) in zip(axes, panels.items(), strict=False):
        draw_panel(axis, title, by_arm)
    # All panels have the same arms: the first one's legend is that of all.
    handles, labels = axes[0].get_legend_handles_labels()
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
    # Ticks are found again by their place, as a formatter gets nothing else.
    names = {round(place, 6): f"{budget:,}" for budget, place in places.items()}
    axis.xaxis.set_major_formatter(FuncFormatter(lambda place, _: names.get(round(place, 6), "")))
    # A panel has a task's name; the one for their mean has none, and gets the average's chance.
    chance = language.CHANCE.get(title, language.CHANCE["average"])
    axis.axhline(100 * chance, color="black", linestyle=":", linewidth=1, label="chance")
    axis.set(title=title, ylabel="accuracy on test questions (%)")
    # An interval over two seeds may be wider than accuracies can be.
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, 0), min(high, 100))


def budget_places(budgets: list[int]) -> dict[int, float]:
    """Where a budget stands on a logarithmic axis: 0 left of the smallest."""
    positive = [budget for budget in budgets if budget > 0]
    least = 1.0
    if positive:
        least = NOTHING_IS_AT * min(positive)
    return {budget: float(budget or least) for budget in budgets}


def half_width(ci95: list[float]) -> float:
    low, high = ci95
    # One seed: a bar without length.
    if math.isnan(low):
        return 0.0
    return (high - low) / 2


def arm_label(arm: str) -> str:
    return design.ARMS.get(arm, {}).get("label", arm)


def line_style(arm: str) -> dict:
    """A control is dashed, in the color of what it controls."""
    # CONTROLS, read from a control to its arm.
    owner = next((own for own, control in design.CONTROLS.items() if control == arm), None)
    if owner is None:
        return {"color": COLORS.get(arm, "#555555"), "linestyle": "-", "marker": "o"}
    return {"color": COLORS.get(owner, "#555555"), "linestyle": "--", "marker": "s"}


@rc_context(STYLE)
def draw_along(path: Path, along: Mapping[str, list[dict]]) -> None:
    """Answers to the validation questions, how long projected tokens are, in embeddings' norms, and how near to a
    word's embedding: after pre-training (step 0) and while an arm is fine-tuned on the most labels."""
    figure = Figure(figsize=(15, 5.6), layout="constrained")
    answered, norms, cosines = figure.subplots(1, 3)
    for arm, points in along.items():
        style = {"markersize": 4, **line_style(arm)}
        steps = [point["step"] for point in points]
        answered.plot(steps, [point["validation"] for point in points], label=arm_label(arm), **style)
        # In units of an embedding's mean length: 1 is as long as a word.
        norms.plot(steps, [point["token_norm"] / point["embedding_norm"] for point in points], **style)
        cosines.plot(steps, [point["largest_cosine"] for point in points], **style)
    norms.axhline(1, color="black", linestyle=":", linewidth=1)
    answered.set(title="answers", ylabel="accuracy on validation questions (%)")
    norms.set(title="length of a projected token (dotted: a word's)", ylabel="in mean norms of an embedding")
    cosines.set(title="nearness to a word", ylabel="largest cosine to an embedding")
    for axis in (answered, norms, cosines):
        axis.set_xlabel("steps of fine-tuning (0: right after pre-training)")
    figure.legend(*answered.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save_figure(figure, path, dpi=130)


@rc_context(STYLE)
def draw_probes(path: Path, rows: list[dict]) -> None:
    """Answers against probes after pre-training: a column a target, a row for answers right after pre-training and one
    for those with the most labels; small points are seeds, large ones an arm's mean."""
    rows = [row for row in rows if row["probed_at"] == 0]
    budgets = sorted({row["budget"] for row in rows})
    # One row if there are results of one budget only.
    shown = list(dict.fromkeys((budgets[0], budgets[-1])))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure(figsize=(4 * len(targets) + 1, 3.8 * len(shown) + 0.8), layout="constrained")
    axes = figure.subplots(len(shown), len(targets), squeeze=False)
    for row in rows:
        if row["budget"] in shown:
            axis = axes[shown.index(row["budget"])][targets.index(row["target"])]
            draw_probes_panel(axis, row)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supxlabel("ridge probe after pre-training: mean-centered cosine, mean of the layers", fontsize=11)
    save_figure(figure, path, dpi=130)


def draw_probes_panel(axis: Axes, row: dict) -> None:
    for arm, points in row["points"].items():
        style = line_style(arm)
        seeds_x, seeds_y = zip(*points, strict=True)
        axis.scatter(seeds_x, seeds_y, s=8, alpha=0.35, color=style["color"], marker=style["marker"])
        # A control's mean is hollow.
        face = style["color"]
        if style["linestyle"] == "--":
            face = "none"
        # The arm's mean over its seeds.
        mean = (sum(seeds_x) / len(points), sum(seeds_y) / len(points))
        axis.scatter(
            *mean, s=60, facecolor=face, edgecolor=style["color"], marker=style["marker"], label=arm_label(arm)
        )
    r = ""
    if "r" in row:
        r = f", r = {row['r']:+.2f}"
    axis.set(title=f"{row['target']}, {row['budget']:,} labels{r}", ylabel="accuracy on test questions (%)")
