"""The study's report: report.json -> report.md and figures, a pure function of the files in its folder.

`python -m ola_vlm.miniature.report RUN_FOLDER` writes it again; with `--summary FILE` it also stores what README
quotes. docs/miniature.md lists the fields of report.json.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..eval.statistics import holm_adjusted
from ..files.writing import save_figure, write_json, write_whole
from ..probing.figures import METHODS, STYLE, method_styles
from ..recipes import miniature as recipe

BASELINE = "llava"
OURS = "ola_vlm"
# A stage -> what the report calls its end.
STAGES = {"pretrain": "after PT", "finetune": "after IFT"}
# A probe's score in report.json -> its name on an axis.
METRICS = {"ridge": "mean-centered cosine", "ridge_plain": "plain cosine"}
# A figure -> its caption, in the order of the report.
CAPTIONS = {
    "summary.png": "Accuracy, its gain at the last IFT step (bars: 95% over questions), mean-centered "
    "cosine of the probes. Bands: sd over seeds.",
    "accuracy.png": "Accuracy on the test questions over IFT steps; bands: sd over seeds; dotted: chance.",
    "probes.png": "Ridge probes by layer, mean-centered cosine: predicting the mean scores 0. Bands: sd over seeds.",
    "probes_plain.png": "The same probes, plain cosine as in the paper: predicting the mean scores high too.",
    "losses.png": "Embedding losses during PT by task, layer and part. Bands: sd over seeds.",
    # Drawn by the study itself, not here; shown if they are there.
    "decoded_depth.png": "Depth decoded from the predictions after PT, beside the truth and the teacher's own.",
    "decoded_seg.png": "Segmentation features predicted after PT, as difference to the mean target (gray).",
    "world.png": "Scenes of the miniature world: image, depth, masks and questions.",
}
# The level of all tests.
ALPHA = 0.05


def write_report(out_dir: Path, results: dict | None = None) -> Path:
    """Write report.json (if `results` are given), figures and report.md into `out_dir`; returns report.md's path."""
    if results is not None:
        write_whole(out_dir / "report.json", json.dumps(results, indent=1))
    # Read back even if just written: in JSON all keys are texts, and a report made again must be the same.
    results = dict(json.loads((out_dir / "report.json").read_text()))
    draw_figures(results, out_dir)
    # The text last: it shows the figures that are there.
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
        # Layers are texts in JSON: as numbers, 10 comes after 9.
        return {int(layer): scores[metric] for layer, scores in by_layer.items()}

    return read


def over_seeds(method: dict, read: Reader) -> dict[object, tuple[float, float]]:
    """{x: (mean, sample standard deviation)} over the seeds that have x, x in order; 0 for a single seed."""
    # x -> what each seed has there.
    values = defaultdict(list)
    for seed in method["seeds"]:
        for x, value in read(seed).items():
            values[x].append(value)
    summary = {}
    for x, of_seeds in sorted(values.items()):
        deviation = 0.0
        if len(of_seeds) > 1:
            deviation = np.std(of_seeds, ddof=1)
        summary[x] = (np.mean(of_seeds), deviation)
    return summary


def distinct(results: dict, read: Callable[[dict], list]) -> list:
    """What `read` finds in any seed's results, each once, in the order of its first appearance."""
    # A dict keeps the order.
    seen = {}
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
    # Put in last: tables and figures end with the mean.
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
    # The picture that says most, before the text.
    if "summary.png" in figures:
        lines += picture_lines("summary.png")
    lines += ["", "## What is better, and what is not"]
    compared = {f"{OURS} - {BASELINE}": results.get("comparison")}
    compared.update(results.get("comparisons", {}))
    for pair, by_task in compared.items():
        if by_task:
            lines += ["", f"**{pair}**, accuracy at the last IFT step:", "", *verdicts(by_task)]
    # Then what the verdicts rest on.
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
    # Each task is one more chance to be lucky.
    stands = holm({task: comparison["p"] for task, comparison in compared.items() if task != "average"})
    lines = []
    for task, comparison in compared.items():
        p = comparison["p"]
        # The average is tested alone.
        is_shown = stands.get(task, bool(p <= ALPHA))
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
    word = "worse"
    if comparison["difference"] > 0:
        word = "better"
    # A test over questions judges the models at hand; one over seeds what training again would give.
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
        # Where both have a point.
        for x, (mean, _) in over_seeds(results["methods"][name], read).items():
            if x in baseline:
                parts.append(f"{x}: {mean - baseline[x][0]:+.{digits}f}")
        return ", ".join(parts) + "."

    lines = []
    for name in results["methods"]:
        # LLaVA has no gain over itself, and the control is no method.
        if name in (BASELINE, recipe.CONTROL):
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
        # Nearer to chance than 10 points, or above 92%, methods have no room to differ.
        if mean < chance + 10:
            lines.append(f"- {task}: {BASELINE} ends only {mean - chance:+.1f} points from chance.")
        elif mean > 92:
            lines.append(f"- {task}: {BASELINE} is saturated at {mean:.1f}%.")
    return lines or [f"On every task {BASELINE} ends at least 10 points above chance and at most at 92%."]


def cost_table(results: dict) -> list[str]:
    parts = distinct(results, lambda seed: seed["seconds"])
    rows = []
    for name, method in results["methods"].items():
        seeds = method["seeds"]
        cells = []
        for part in parts:
            # A method that has no such part spent no time on it.
            seconds = np.mean([seed["seconds"].get(part, 0) for seed in seeds])
            cells.append(f"{seconds:.0f}")
        # The largest seed's: it is what a machine needs.
        memory = max(seed["peak_memory_mb"] for seed in seeds)
        rows.append([name, *cells, processor_seconds(method), f"{memory:.0f}"])
    return table(["method", *(f"{part} (s)" for part in parts), "processor (s)", "peak memory (MB)"], rows)


def processor_seconds(method: dict) -> str:
    """Of all parts, mean over seeds; "?" for what an earlier version left."""
    known = [sum(seed["processor_seconds"].values()) for seed in method["seeds"] if "processor_seconds" in seed]
    if not known:
        return "?"
    return f"{np.mean(known):.0f}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def inline(value) -> str:
    if isinstance(value, dict):
        # {"a": {"b": 1}, "c": 2} -> "a (b 1), c 2"
        parts = []
        for key, item in value.items():
            text = inline(item)
            if isinstance(item, dict):
                text = f"({text})"
            parts.append(f"{key} {text}")
        return ", ".join(parts)
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


# ---------------------------------------------------------------------------------------------------------- summary
# The language model's last layer.
SUMMARY_LAYER = 4


def summarize(results: dict) -> dict:
    """What README quotes, in the digits that it prints: accuracies in per cent as [mean, sd] over seeds, their
    differences to LLaVA with a 95% interval over questions where one was computed, and the probes' differences."""
    summary = {
        "seeds": max(len(method["seeds"]) for method in results["methods"].values()),
        "machine": results.get("machine", "not recorded"),
        "chance": {task: round(value, 1) for task, value in chance_of(results).items()},
        "accuracy": {},
        "minus_llava": {},
        "probes_layer": SUMMARY_LAYER,
        "probes_minus_llava": {},
    }
    # In report.json OLA-VLM's comparison has a field of its own.
    compared = {f"{OURS} - {BASELINE}": results.get("comparison", {}), **results.get("comparisons", {})}
    averages = {}
    for name, method in results["methods"].items():
        accuracy = over_seeds(method, final_accuracy)
        averages[name] = accuracy["average"][0]
        summary["accuracy"][name] = {}
        for task, (mean, deviation) in accuracy.items():
            summary["accuracy"][name][task] = [round(float(mean), 1), round(float(deviation), 1)]
    for name in results["methods"]:
        if name == BASELINE:
            continue
        gain: dict[str, float | list[float]] = {"points": round(float(averages[name] - averages[BASELINE]), 1)}
        comparison = compared.get(f"{name} - {BASELINE}", {}).get("average")
        if comparison is not None:
            gain["ci95"] = [round(100 * bound, 1) for bound in comparison["ci95"]]
        summary["minus_llava"][name] = gain
        # The control's targets were other images': its probes say nothing to be quoted.
        if name != recipe.CONTROL:
            summary["probes_minus_llava"][name] = probe_gains(results, name)
    return summary


def probe_gains(results: dict, name: str) -> dict[str, dict[str, float]]:
    """{stage: {teacher's task: mean-centered cosine at SUMMARY_LAYER minus LLaVA's}}."""
    gains: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        gains[stage] = {}
        for task in probed_tasks(results):
            read = probe_curve(stage, task)
            ours = over_seeds(results["methods"][name], read)[SUMMARY_LAYER][0]
            baseline = over_seeds(results["methods"][BASELINE], read)[SUMMARY_LAYER][0]
            gains[stage][task] = round(float(ours - baseline), 3)
    return gains


def summary_tables(summary: dict) -> str:
    """README's two tables, of `summarize`'s content."""
    return "\n".join([*summary_accuracy(summary), "", *summary_probes(summary)])


def summary_accuracy(summary: dict) -> list[str]:
    rows = [["chance", *(f"{value:.1f}" for value in summary["chance"].values()), ""]]
    for name, accuracy in summary["accuracy"].items():
        row = [METHODS[name][0]]
        for task in summary["chance"]:
            mean, deviation = accuracy[task]
            cell = f"{mean:.1f}"
            if summary["seeds"] > 1:
                cell += f" ± {deviation:.1f}"
            row.append(cell)
        # LLaVA itself has none.
        gain = ""
        if name in summary["minus_llava"]:
            gain = gain_text(summary["minus_llava"][name])
        row.append(gain)
        rows.append(row)
    tasks = []
    for task in summary["chance"]:
        if task == "average":
            task = "mean"
        tasks.append(task)
    return table(["accuracy after IFT (%)", *tasks, "mean minus LLaVA's"], rows)


def gain_text(gain: dict) -> str:
    text = f"{gain['points']:+.1f}"
    if "ci95" in gain:
        low, high = gain["ci95"]
        text += f" [{low:+.1f}, {high:+.1f}]"
    return text


def summary_probes(summary: dict) -> list[str]:
    header: list[str] = []
    rows = []
    for name, by_stage in summary["probes_minus_llava"].items():
        header = [f"probes of LLM layer {summary['probes_layer']}, mean-centered cosine"]
        row = [f"{METHODS[name][0]} minus {METHODS[BASELINE][0]}"]
        for stage, gains in by_stage.items():
            name_of_stage = STAGES[stage].removeprefix("after ")
            for task, gain in gains.items():
                header.append(f"{task}, {name_of_stage}")
                # "+0.035" -> "+.035"
                row.append(f"{gain:+.3f}".replace("0.", ".", 1))
        rows.append(row)
    return table(header, rows)


# ---------------------------------------------------------------------------------------------------------- figures


@rc_context(STYLE)
def draw_figures(results: dict, out_dir: Path) -> None:
    """Draw into `out_dir` what `results` hold data for."""
    bands = bands_of(results)
    # Accuracy along IFT: a panel a task.
    accuracy_panels = [partial(accuracy_panel, results, task) for task in chance_of(results)]
    save_grid(out_dir / "accuracy.png", 3, accuracy_panels, bands)
    tasks = probed_tasks(results)
    if tasks:
        # Probes by layer: a row a stage, a column a task, which shares its axis.
        centered = probe_panels(results, "ridge")
        save_grid(out_dir / "probes.png", len(tasks), centered, bands, sharey="col")
        plain = probe_panels(results, "ridge_plain")
        save_grid(out_dir / "probes_plain.png", len(tasks), plain, bands, sharey="col")
        # A row a stage, each beginning with what all tasks' answers come to.
        after_pretraining = [partial(accuracy_panel, results, "average"), *centered[: len(tasks)]]
        after_finetuning = [partial(gain_panel, results), *centered[len(tasks) :]]
        note = f"{bands}; gain, bars: 95% intervals over questions"
        save_grid(out_dir / "summary.png", 1 + len(tasks), [*after_pretraining, *after_finetuning], note)
    # Embedding losses by "task/layer/part"; the text loss has no slashes.
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
    # Places of the grid that no panel fills are hidden.
    for ax, panel in zip(axes, [*panels, *[hide] * (rows * columns - len(panels))], strict=True):
        panel(ax)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    # On the figure itself: it is also shown where its caption isn't.
    figure.supxlabel(note, fontsize=11, color="0.3")
    save_figure(figure, path, dpi=130)


def bands_of(results: dict) -> str:
    """What a line and its band are."""
    # Methods may have different numbers of seeds while a study is on its way.
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
        # [(mean, sd), ...] -> means, deviations.
        mean, sd = np.transpose(list(curve.values()))
        ax.plot(steps, mean, markersize=4, **styles[name])
        ax.fill_between(steps, mean - sd, mean + sd, color=styles[name]["color"], alpha=0.15, linewidth=0)
    ax.xaxis.get_major_locator().set_params(integer=True)


def accuracy_panel(results: dict, task: str, ax) -> None:
    draw_methods(ax, results, accuracy_curve(task))
    ax.axhline(chance_of(results)[task], color="black", linestyle=":", label="chance")
    title = task
    if task == "average":
        title = "mean of the tasks"
    ax.set(title=title, xlabel="IFT step", ylabel="accuracy (%)")


def probe_panel(results: dict, stage: str, task: str, metric: str, ax) -> None:
    draw_methods(ax, results, probe_curve(stage, task, metric))
    ax.set(title=f"{task}, {STAGES[stage]}", xlabel="LLM layer", ylabel=METRICS[metric])


def loss_panel(results: dict, key: str, ax) -> None:
    task, layer, part = key.split("/")
    draw_methods(ax, results, lambda seed: dict(seed["losses"].get(key, [])))
    ax.set(title=f"{task}, layer {layer}", xlabel="PT step", ylabel=part.replace("_", "-"))


def gain_panel(results: dict, ax) -> None:
    """What each method but the control has more than LLaVA, with its interval, for every task, one below the other."""
    compared = {OURS: results.get("comparison")}
    # Pairs are "method - other": those with LLaVA as the other.
    for pair, by_task in results.get("comparisons", {}).items():
        name, _, other = pair.partition(" - ")
        if other == BASELINE and name != recipe.CONTROL:
            compared[name] = by_task
    shown = {name: by_task for name, by_task in compared.items() if by_task}
    for number, (name, by_task) in enumerate(shown.items()):
        # (tasks, 3) -> a row of differences, of lower and of upper bounds.
        gain, low, high = 100 * np.array([[one["difference"], *one["ci95"]] for one in by_task.values()]).T
        # Methods beside each other, around the task's own place.
        rows = np.arange(len(by_task)) + 0.25 * (number - (len(shown) - 1) / 2)
        ax.errorbar(gain, rows, xerr=[gain - low, high - gain], fmt="o", color=METHODS[name][1], capsize=3)
        ax.set_yticks(np.arange(len(by_task)), list(by_task))
    if shown:
        # The first task is the uppermost.
        ax.invert_yaxis()
        ax.set(title="gain (points)", xlabel=f"minus {METHODS[BASELINE][0]}")
    ax.axvline(0, color="black", linewidth=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the study: report.json is there")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="docs/results/miniature.json, for README")
    args = parser.parse_args()
    write_report(args.folder)
    if args.summary is not None:
        results = json.loads((args.folder / "report.json").read_text())
        write_json(args.summary, summarize(results))


if __name__ == "__main__":
    main()
