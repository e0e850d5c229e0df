"""The study's report: report.json -> report.md and figures, a pure function of the files in its folder.

`python -m ola_vlm.miniature.report RUN_FOLDER` writes it again. docs/miniature.md lists the fields of report.json.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..eval.statistics import holm_adjusted
from ..probing.figures import METHODS, STYLE, method_styles
from ..targets.files import save_figure, write_whole

BASELINE = "llava"
OURS = "ola_vlm"
CONTROL = "ola_vlm_shuffled"
STAGES = {"pretrain": "after PT", "finetune": "after IFT"}
METRICS = {"ridge": "mean-centered cosine", "ridge_plain": "plain cosine"}
CAPTIONS = {
    "summary.png": "Accuracy, its gain at the last IFT step (bars: 95% over questions), mean-centered "
    "cosine of the probes. Bands: sd over seeds.",
    "accuracy.png": "Accuracy on the test questions over IFT steps; bands: sd over seeds; dotted: chance.",
    "probes.png": "Ridge probes by layer, mean-centered cosine: predicting the mean scores 0. Bands: sd over seeds.",
    "probes_plain.png": "The same probes, plain cosine as in the paper: predicting the mean scores high too.",
    "losses.png": "Embedding losses during PT by task, layer and part. Bands: sd over seeds.",
    # drawn by the study, shown if they are there
    "decoded_depth.png": "Depth decoded from the predictions after PT, beside the truth and the teacher's own.",
    "decoded_seg.png": "Segmentation features predicted after PT, as difference to the mean target (gray).",
    "world.png": "Scenes of the miniature world: image, depth, masks and questions.",
}
ALPHA = 0.05


def write_report(out_dir: Path, results: dict | None = None) -> Path:
    """Write report.json (if `results` are given), figures and report.md into `out_dir`; returns report.md's path."""
    if results is not None:
        write_whole(out_dir / "report.json", json.dumps(results, indent=1))
    results = dict(json.loads((out_dir / "report.json").read_text()))
    draw_figures(results, out_dir)
    report = out_dir / "report.md"
    write_whole(report, report_text(results, [name for name in CAPTIONS if (out_dir / name).exists()]))
    return report


# ---------------------------------------------------------------------------------------------------------- numbers

# A reader maps one seed's results to {x: value}: a curve, or what is found at the end.
Reader = Callable[[dict], dict]


def final_accuracy(seed: dict) -> dict[str, float]:
    """{task: accuracy in % at the last IFT step}."""
    return {task: 100 * value for task, value in seed["accuracy"].items()}


def accuracy_curve(task: str) -> Reader:
    """{IFT step: accuracy in %}."""
    return lambda seed: {point["step"]: 100 * point["accuracy"][task] for point in seed["curve"]}


def probe_curve(stage: str, task: str, metric: str = "ridge") -> Reader:
    """{layer: the probe's cosine}."""

    def read(seed: dict) -> dict[int, float]:
        by_layer = seed["probes"].get(stage, {}).get(task, {})
        return {int(layer): scores[metric] for layer, scores in by_layer.items()}

    return read


def over_seeds(method: dict, read: Reader) -> dict[object, tuple[float, float]]:
    """{x: (mean, sample standard deviation)} over the seeds that have x, x in order; 0 for a single seed."""
    values = defaultdict(list)
    for seed in method["seeds"]:
        for x, value in read(seed).items():
            values[x].append(value)
    summary = {}
    for x, of_seeds in sorted(values.items()):
        deviation = np.std(of_seeds, ddof=1) if len(of_seeds) > 1 else 0.0
        summary[x] = (np.mean(of_seeds), deviation)
    return summary


def distinct(results: dict, read: Callable[[dict], list]) -> list:
    """What `read` finds in any seed's results, each once, in the order of its first appearance."""
    seen = {}  # a dict keeps the order
    for method in results["methods"].values():
        for seed in method["seeds"]:
            seen.update(dict.fromkeys(read(seed)))
    return list(seen)


def probed_tasks(results: dict) -> list[str]:

    def read(seed: dict) -> list[str]:
        tasks = []
        for probes in seed["probes"].values():
            tasks += probes
        return tasks

    return distinct(results, read)


def chance_of(results: dict) -> dict[str, float]:
    """Chance in % for every task in order, the last one being "average"."""
    chance = {task: 100 * value for task, value in results["chance"].items() if task != "average"}
    chance["average"] = np.mean(list(chance.values()))
    return chance


def holm(p_values: dict[str, float]) -> dict[str, bool]:
    """Which hypotheses fall at ALPHA when all of them are asked at once (Holm's step-down procedure)."""
    return {name: p <= ALPHA for name, p in holm_adjusted(p_values).items()}


# ------------------------------------------------------------------------------------------------------------- text


def report_text(results: dict, figures: list[str]) -> str:
    """report.md: verdicts first, then tables and figures."""
    seeds = ", ".join(f"{name} {len(method['seeds'])}" for name, method in results["methods"].items())
    lines = ["# LLaVA-1.5 and OLA-VLM in miniature", "", f"Seeds: {seeds}."]
    if "summary.png" in figures:
        lines += picture_lines("summary.png")
    lines += ["", "## What is better, and what is not"]
    compared = {f"{OURS} - {BASELINE}": results.get("comparison")}
    compared.update(results.get("comparisons", {}))
    for pair, by_task in compared.items():
        if by_task:
            lines += ["", f"**{pair}**, accuracy at the last IFT step:", "", *verdicts(by_task)]
    lines += [*speed_and_probes(results), "", "## Accuracy at the last IFT step (%, mean ± sd over seeds)", ""]
    lines += [*accuracy_table(results), "", *headroom(results)]
    for name in figures:
        if name != "summary.png":
            lines += picture_lines(name)
    lines += ["", "## Cost (mean over seeds)", "", *cost_table(results)]
    lines += ["", "## Machine, checks of the world and of the components", ""]
    lines += [f"- machine: {inline(results.get('machine', 'not recorded'))}"]
    lines += [f"- {name}: {inline(value)}" for name, value in results.get("world", {}).items()]
    return "\n".join([*lines, ""])


def picture_lines(name: str) -> list[str]:
    return ["", f"![{CAPTIONS[name]}]({name})", "", CAPTIONS[name]]


def verdicts(compared: dict[str, dict]) -> list[str]:
    """One plain sentence a task. "Better" has to stand Holm's correction over the tasks (the average aside), and, said
    without reserve, a test over training seeds too: questions alone judge only the models that were trained."""
    stands = holm({task: comparison["p"] for task, comparison in compared.items() if task != "average"})
    lines = []
    for task, comparison in compared.items():
        p = comparison["p"]
        is_shown = stands.get(task, bool(p <= ALPHA))  # the average is asked alone
        points, low, high = (f"{100 * value:+.1f}" for value in (comparison["difference"], *comparison["ci95"]))
        test = f"p = {p:.2g} ({comparison['test']}, n = {comparison['n']})"
        line = f"- {task}: **{verdict(comparison, is_shown)}**. {points} points [{low}, {high}], {test}"
        p_seeds = comparison.get("p_seeds")
        if p_seeds is not None:
            gains = np.array(comparison.get("seed_differences", []))
            line += f"; over seeds ± {100 * gains.std(ddof=1):.1f}, positive in {(gains > 0).sum()} of {len(gains)}, "
            line += f"p = {p_seeds:.2g} (t-test over seeds)"
        lines.append(line + ".")
    return lines


def verdict(comparison: dict, is_shown: bool) -> str:
    if not is_shown:
        return "no difference shown"
    word = "better" if comparison["difference"] > 0 else "worse"
    p_seeds = comparison.get("p_seeds")
    if p_seeds is None or p_seeds > ALPHA:
        word += " for these trained models, not shown for new seeds"
    return word


def speed_and_probes(results: dict) -> list[str]:
    """Methods minus LLaVA along the curve (a method may learn faster and end nowhere better) and layer by layer."""
    if BASELINE not in results["methods"]:
        return []

    def gains(name: str, read: Reader, digits: int) -> str:
        baseline = over_seeds(results["methods"][BASELINE], read)
        parts = []
        for x, (mean, _) in over_seeds(results["methods"][name], read).items():
            if x in baseline:
                parts.append(f"{x}: {mean - baseline[x][0]:+.{digits}f}")
        return ", ".join(parts) + "."

    lines = []
    for name in results["methods"]:
        if name in (BASELINE, CONTROL):
            continue
        lines += ["", f"**{name} - {BASELINE}** along IFT, mean of the tasks, points by step:", ""]
        lines += ["- " + gains(name, accuracy_curve("average"), 1)]
        lines += ["", f"**{name} - {BASELINE}**, probes (mean-centered cosine), by layer:", ""]
        for stage, when in STAGES.items():
            for task in probed_tasks(results):
                lines.append(f"- {task} {when}: {gains(name, probe_curve(stage, task), 3)}")
    return lines


def accuracy_table(results: dict) -> list[str]:
    chance = chance_of(results)
    rows = [["chance", *(f"{value:.1f}" for value in chance.values())]]
    for name, method in results["methods"].items():
        accuracy = over_seeds(method, final_accuracy)
        row = [name]
        for task in chance:
            mean, deviation = accuracy[task]
            cell = f"{mean:.1f}"
            if len(method["seeds"]) > 1:
                cell += f" ± {deviation:.1f}"
            row.append(cell)
        rows.append(row)
    return table(["method", *chance], rows)


def headroom(results: dict) -> list[str]:
    """Is there something to learn and something left to learn? A saturated or a chance-level task compares nothing."""
    if BASELINE not in results["methods"]:
        return []
    lines = []
    accuracy = over_seeds(results["methods"][BASELINE], final_accuracy)
    for task, chance in chance_of(results).items():
        if task == "average":
            continue
        mean, _ = accuracy[task]
        if mean < chance + 10:
            lines.append(f"- {task}: {BASELINE} ends only {mean - chance:+.1f} points from chance.")
        elif mean > 92:
            lines.append(f"- {task}: {BASELINE} is saturated at {mean:.1f}%.")
    return lines or [f"On every task {BASELINE} ends at least 10 points above chance and at most at 92%."]


def cost_table(results: dict) -> list[str]:
    parts = distinct(results, lambda seed: seed["seconds"])
    rows = []
    for name, method in results["methods"].items():
        seconds = [np.mean([seed["seconds"].get(part, 0) for seed in method["seeds"]]) for part in parts]
        memory = max(seed["peak_memory_mb"] for seed in method["seeds"])
        rows.append([name, *(f"{value:.0f}" for value in (*seconds, memory))])
    return table(["method", *(f"{part} (s)" for part in parts), "peak memory (MB)"], rows)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def inline(value) -> str:
    if isinstance(value, dict):
        parts = []
        for key, item in value.items():
            text = f"({inline(item)})" if isinstance(item, dict) else inline(item)
            parts.append(f"{key} {text}")
        return ", ".join(parts)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------- figures


@rc_context(STYLE)
def draw_figures(results: dict, out_dir: Path) -> None:
    """Draw into `out_dir` what `results` hold data for."""
    bands = bands_of(results)
    accuracy_panels = [partial(accuracy_panel, results, task) for task in chance_of(results)]
    save_grid(out_dir / "accuracy.png", 3, accuracy_panels, bands)
    tasks = probed_tasks(results)
    if tasks:
        centered = probe_panels(results, "ridge")
        save_grid(out_dir / "probes.png", len(tasks), centered, bands, sharey="col")
        plain = probe_panels(results, "ridge_plain")
        save_grid(out_dir / "probes_plain.png", len(tasks), plain, bands, sharey="col")
        # A row a stage, each beginning with what all tasks' answers come to.
        after_pretraining = [partial(accuracy_panel, results, "average"), *centered[: len(tasks)]]
        after_finetuning = [partial(gain_panel, results), *centered[len(tasks) :]]
        note = f"{bands}; gain, bars: 95% intervals over questions"
        save_grid(out_dir / "summary.png", 1 + len(tasks), [*after_pretraining, *after_finetuning], note)
    loss_keys = distinct(results, lambda seed: [key for key in seed["losses"] if key.count("/") == 2])
    if loss_keys:
        save_grid(out_dir / "losses.png", 2, [partial(loss_panel, results, key) for key in loss_keys], bands)


def probe_panels(results: dict, metric: str) -> list[Callable[[Axes], None]]:
    """A panel for each task after each stage."""
    panels = []
    for stage in STAGES:
        panels += [partial(probe_panel, results, stage, task, metric) for task in probed_tasks(results)]
    return panels


def hide(ax: Axes) -> None:
    ax.set_axis_off()


def save_grid(path: Path, columns: int, panels: list[Callable[[Axes], None]], note: str, **shared) -> None:
    """Save panels row by row, 10 inches wide, the first one's legend above them all, `note` below."""
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(10, 2.9 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flat
    for ax, panel in zip(axes, [*panels, *[hide] * (rows * columns - len(panels))], strict=True):
        panel(ax)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    # On the figure itself: it is also shown where its caption isn't.
    figure.supxlabel(note, fontsize=11, color="0.3")
    save_figure(figure, path, dpi=130)


def bands_of(results: dict) -> str:
    """What a line and its band are."""
    counts = {len(method["seeds"]) for method in results["methods"].values()}
    if max(counts) == 1:
        return "lines: one seed"
    seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return f"lines: means over {seeds} seeds, bands: ± one standard deviation"


def draw_methods(ax, results: dict, read: Reader) -> None:
    """For each method a line of means over seeds with a band of one sd."""
    styles = method_styles(results["methods"])
    for name, method in results["methods"].items():
        curve = over_seeds(method, read)
        if not curve:
            continue
        steps = list(curve)
        mean, sd = np.transpose(list(curve.values()))
        ax.plot(steps, mean, markersize=4, **styles[name])
        ax.fill_between(steps, mean - sd, mean + sd, color=styles[name]["color"], alpha=0.15, linewidth=0)
    ax.xaxis.get_major_locator().set_params(integer=True)


def accuracy_panel(results: dict, task: str, ax) -> None:
    draw_methods(ax, results, accuracy_curve(task))
    ax.axhline(chance_of(results)[task], color="black", linestyle=":", label="chance")
    ax.set(title="mean of the tasks" if task == "average" else task, xlabel="IFT step", ylabel="accuracy (%)")


def probe_panel(results: dict, stage: str, task: str, metric: str, ax) -> None:
    draw_methods(ax, results, probe_curve(stage, task, metric))
    ax.set(title=f"{task}, {STAGES[stage]}", xlabel="LLM layer", ylabel=METRICS[metric])


def loss_panel(results: dict, key: str, ax) -> None:
    task, layer, part = key.split("/")
    draw_methods(ax, results, lambda seed: dict(seed["losses"].get(key, [])))
    ax.set(title=f"{task}, layer {layer}", xlabel="PT step", ylabel=part.replace("_", "-"))


def gain_panel(results: dict, ax) -> None:
    """OLA-VLM minus LLaVA with its interval, for every task."""
    compared = results.get("comparison")
    if compared:
        gain, low, high = 100 * np.array([[one["difference"], *one["ci95"]] for one in compared.values()]).T
        ax.errorbar(gain, list(compared), xerr=[gain - low, high - gain], fmt="o", color=METHODS[OURS][1], capsize=3)
        ax.invert_yaxis()
        ax.set(title="gain (points)", xlabel=f"{METHODS[OURS][0]} minus {METHODS[BASELINE][0]}")
    ax.axvline(0, color="black", linewidth=1)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
