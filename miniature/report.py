"""The study's report: report.json -> report.md and figures, a pure function of the files in its folder.

`python -m ola_vlm.miniature.report RUN_FOLDER` writes it again. docs/miniature.md lists the fields of report.json.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..eval.statistics import holm_adjusted
from ..probing.figures import METHODS, STYLE, method_styles
from ..targets.files import save_figure, write_whole

BASELINE, OURS, CONTROL = "llava", "ola_vlm", "ola_vlm_shuffled"
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
    results = json.loads((out_dir / "report.json").read_text())
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
    return lambda seed: {int(i): v[metric] for i, v in seed["probes"].get(stage, {}).get(task, {}).items()}


def over_seeds(method: dict, read: Reader) -> dict[object, tuple[float, float]]:
    """{x: (mean, sample standard deviation)} over the seeds that have x, x in order; 0 for a single seed."""
    values = defaultdict(list)
    for seed in method["seeds"]:
        for x, value in read(seed).items():
            values[x].append(value)
    return {x: (np.mean(v), np.std(v, ddof=1) if len(v) > 1 else 0.0) for x, v in sorted(values.items())}


def distinct(results: dict, read: Callable[[dict], list]) -> list:
    """What `read` finds in any seed's results, each once, in the order of its first appearance."""
    return list(dict.fromkeys(x for method in results["methods"].values() for s in method["seeds"] for x in read(s)))


def probed_tasks(results: dict) -> list[str]:
    return distinct(results, lambda seed: [task for probes in seed["probes"].values() for task in probes])


def chance_of(results: dict) -> dict[str, float]:
    """Chance in % for every task in order, the last one being "average"."""
    chance = {task: 100 * value for task, value in results["chance"].items() if task != "average"}
    return {**chance, "average": np.mean(list(chance.values()))}


def holm(p_values: dict[str, float]) -> dict[str, bool]:
    """Which hypotheses fall at ALPHA when all of them are asked at once (Holm's step-down procedure)."""
    return {name: p <= ALPHA for name, p in holm_adjusted(p_values).items()}


# ------------------------------------------------------------------------------------------------------------- text


def report_text(results: dict, figures: list[str]) -> str:
    """report.md: verdicts first, then tables and figures."""
    pictures = {name: ["", f"![{CAPTIONS[name]}]({name})", "", CAPTIONS[name]] for name in figures}
    seeds = ", ".join(f"{name} {len(method['seeds'])}" for name, method in results["methods"].items())
    lines = ["# LLaVA-1.5 and OLA-VLM in miniature", "", f"Seeds: {seeds}.", *pictures.pop("summary.png", [])]
    lines += ["", "## What is better, and what is not"]
    compared = {f"{OURS} - {BASELINE}": results.get("comparison"), **results.get("comparisons", {})}
    for pair, by_task in compared.items():
        if by_task:
            lines += ["", f"**{pair}**, accuracy at the last IFT step:", "", *verdicts(by_task)]
    lines += [*speed_and_probes(results), "", "## Accuracy at the last IFT step (%, mean ± sd over seeds)", ""]
    lines += [*accuracy_table(results), "", *headroom(results)]
    lines += [line for picture in pictures.values() for line in picture]
    lines += ["", "## Cost (mean over seeds)", "", *cost_table(results)]
    facts = {"machine": results.get("machine", "not recorded"), **results.get("world", {})}
    lines += ["", "## Machine, checks of the world and of the components", ""]
    return "\n".join([*lines, *(f"- {name}: {inline(value)}" for name, value in facts.items()), ""])


def verdicts(compared: dict[str, dict]) -> list[str]:
    """One plain sentence a task. "Better" has to stand Holm's correction over the tasks (the average aside), and, said
    without reserve, a test over training seeds too: questions alone judge only the models that were trained."""
    stands = holm({task: c["p"] for task, c in compared.items() if task != "average"})
    lines = []
    for task, c in compared.items():
        p_seeds, gains = c.get("p_seeds"), c.get("seed_differences", [])
        word = "better" if c["difference"] > 0 else "worse"
        if not stands.get(task, c["p"] <= ALPHA):
            word = "no difference shown"
        elif p_seeds is None or p_seeds > ALPHA:
            word += " for these trained models, not shown for new seeds"
        points, low, high = (f"{100 * value:+.1f}" for value in (c["difference"], *c["ci95"]))
        line = f"- {task}: **{word}**. {points} points [{low}, {high}], p = {c['p']:.2g} ({c['test']}, n = {c['n']})"
        if p_seeds is not None:
            line += f"; over seeds ± {100 * np.std(gains, ddof=1):.1f}, positive in {sum(d > 0 for d in gains)} of "
            line += f"{len(gains)}, p = {p_seeds:.2g} (t-test over seeds)"
        lines.append(line + ".")
    return lines


def speed_and_probes(results: dict) -> list[str]:
    """Methods minus LLaVA along the curve (a method may learn faster and end nowhere better) and layer by layer."""
    if BASELINE not in results["methods"]:
        return []

    def gains(name: str, read: Reader, digits: int) -> str:
        base, own = (over_seeds(results["methods"][method], read) for method in (BASELINE, name))
        return ", ".join(f"{x}: {own[x][0] - base[x][0]:+.{digits}f}" for x in own if x in base) + "."

    lines = []
    for name in (name for name in results["methods"] if name not in (BASELINE, CONTROL)):
        lines += ["", f"**{name} - {BASELINE}** along IFT, mean of the tasks, points by step:", ""]
        lines += ["- " + gains(name, accuracy_curve("average"), 1)]
        lines += ["", f"**{name} - {BASELINE}**, probes (mean-centered cosine), by layer:", ""]
        for stage, when in STAGES.items():
            lines += [f"- {task} {when}: {gains(name, probe_curve(stage, task), 3)}" for task in probed_tasks(results)]
    return lines


def accuracy_table(results: dict) -> list[str]:
    chance = chance_of(results)
    rows = [["chance", *(f"{value:.1f}" for value in chance.values())]]
    for name, method in results["methods"].items():
        found, spread = over_seeds(method, final_accuracy), len(method["seeds"]) > 1
        cells = (found[task] for task in chance)
        rows.append([name, *(f"{mean:.1f} ± {sd:.1f}" if spread else f"{mean:.1f}" for mean, sd in cells)])
    return table(["method", *chance], rows)


def headroom(results: dict) -> list[str]:
    """Is there something to learn and something left to learn? A saturated or a chance-level task compares nothing."""
    if BASELINE not in results["methods"]:
        return []
    lines, found = [], over_seeds(results["methods"][BASELINE], final_accuracy)
    for task, chance in list(chance_of(results).items())[:-1]:
        mean, _ = found[task]
        if mean < chance + 10:
            lines.append(f"- {task}: {BASELINE} ends only {mean - chance:+.1f} points from chance.")
        elif mean > 92:
            lines.append(f"- {task}: {BASELINE} is saturated at {mean:.1f}%.")
    return lines or [f"On every task {BASELINE} ends at least 10 points above chance and at most at 92%."]


def cost_table(results: dict) -> list[str]:
    parts, rows = distinct(results, lambda seed: seed["seconds"]), []
    for name, method in results["methods"].items():
        seconds = [np.mean([seed["seconds"].get(part, 0) for seed in method["seeds"]]) for part in parts]
        memory = max(seed["peak_memory_mb"] for seed in method["seeds"])
        rows.append([name, *(f"{value:.0f}" for value in (*seconds, memory))])
    return table(["method", *(f"{part} (s)" for part in parts), "peak memory (MB)"], rows)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def inline(value) -> str:
    if isinstance(value, dict):
        parts = {key: f"({inline(item)})" if isinstance(item, dict) else inline(item) for key, item in value.items()}
        return ", ".join(f"{key} {part}" for key, part in parts.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------- figures


@rc_context(STYLE)
def draw_figures(results: dict, out_dir: Path) -> None:
    """Draw into `out_dir` what `results` hold data for."""
    accuracy, probe, loss = (partial(panel, results) for panel in (accuracy_panel, probe_panel, loss_panel))
    tasks, bands = probed_tasks(results), bands_of(results)
    save_grid(out_dir / "accuracy.png", 3, [partial(accuracy, task) for task in chance_of(results)], bands)
    if count := len(tasks):
        centered, plain = ([partial(probe, stage, t, metric) for stage in STAGES for t in tasks] for metric in METRICS)
        save_grid(out_dir / "probes.png", count, centered, bands, sharey="col")
        save_grid(out_dir / "probes_plain.png", count, plain, bands, sharey="col")
        summary = [partial(accuracy, "average"), *centered[:count], partial(gain_panel, results), *centered[count:]]
        note = f"{bands}; gain, bars: 95% intervals over questions"
        save_grid(out_dir / "summary.png", 1 + count, summary, note)
    if keys := distinct(results, lambda seed: [key for key in seed["losses"] if key.count("/") == 2]):
        save_grid(out_dir / "losses.png", 2, [partial(loss, key) for key in keys], bands)


def save_grid(path: Path, columns: int, panels: list[Callable[[Axes], None]], note: str, **shared) -> None:
    """Save panels row by row, 10 inches wide, the first one's legend above them all, `note` below."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10, 2.9 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flat
    for ax, panel in zip_longest(axes, panels, fillvalue=Axes.set_axis_off):
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
    if compared := results.get("comparison"):
        gain, low, high = 100 * np.array([[c["difference"], *c["ci95"]] for c in compared.values()]).T
        ax.errorbar(gain, list(compared), xerr=[gain - low, high - gain], fmt="o", color=METHODS[OURS][1], capsize=3)
        ax.invert_yaxis()
        ax.set(title="gain (points)", xlabel=f"{METHODS[OURS][0]} minus {METHODS[BASELINE][0]}")
    ax.axvline(0, color="black", linewidth=1)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
