"""The study's report: report.json -> report.md and figures, a pure function of the files in its folder.

`python -m ola_vlm.miniature.report RUN_FOLDER` writes it again. docs/report.md lists the fields of report.json.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

BASELINE, OURS, CONTROL = "llava", "ola_vlm", "ola_vlm_shuffled"
LABELS = {BASELINE: "LLaVA", OURS: "OLA-VLM", CONTROL: "OLA-VLM, shuffled targets"}
COLORS = {BASELINE: "#4c72b0", OURS: "#d1495b", CONTROL: "#8d8d8d"}
STAGES = {"pretrain": "after PT", "finetune": "after IFT"}
# fonts that survive the width of a README
STYLE = {"font.size": 12, "axes.titlesize": 13, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2}
CAPTIONS = {
    "summary.png": "Accuracy, its gain at the last IFT step (95% over questions), mean-centred cosine of the probes.",
    "accuracy.png": "Accuracy on the test questions over IFT steps; bands: sd over seeds; dotted: chance.",
    "probes.png": "Ridge probes by layer, mean-centred cosine: predicting the mean scores 0. Bands: sd over seeds.",
    "probes_plain.png": "The same probes, plain cosine as in the paper: predicting the mean scores high too.",
    "losses.png": "Embedding losses during PT; solid: a task's first layer, dashed: its second.",
    # drawn by the study, shown if they are there
    "decoded_depth.png": "Depth decoded from the predictions after PT, beside the truth and the teacher's own.",
    "decoded_seg.png": "Segmentation decoded from the predictions after PT (the teacher's earlier stages help).",
    "world.png": "Scenes of the miniature world: image, depth, masks and questions.",
}
ALPHA = 0.05


def write_report(out_dir: str | Path, results: dict | None = None) -> Path:
    """Write report.json (if `results` are given), figures and report.md into `out_dir`; returns report.md's path."""
    out_dir = Path(out_dir)
    if results is not None:
        (out_dir / "report.json").write_text(json.dumps(results, indent=1))
    results = json.loads((out_dir / "report.json").read_text())
    draw_figures(results, out_dir)
    report = out_dir / "report.md"
    report.write_text(report_text(results, [name for name in CAPTIONS if (out_dir / name).exists()]))
    return report


# ---------------------------------------------------------------------------------------------------------- numbers


def mean_sd(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def over_seeds(method: dict, read: Callable[[dict], dict]) -> dict:
    """`read` maps one seed's results to {x: value}; returns {x: (mean, sd)} over the seeds that have x, x in order."""
    per_seed = [read(seed) for seed in method["seeds"]]
    xs = sorted({x for values in per_seed for x in values})
    return {x: mean_sd(values[x] for values in per_seed if x in values) for x in xs}


def accuracy_curve(method: dict, task: str) -> dict:
    """{IFT step: (mean, sd) of the task's accuracy in %}."""
    return over_seeds(method, lambda seed: {p["step"]: 100 * p["accuracy"][task] for p in seed["curve"]})


def probe_curve(method: dict, stage: str, task: str, metric: str = "ridge") -> dict:
    """{layer: (mean, sd) of the probe's cosine}."""
    return over_seeds(
        method, lambda seed: {int(i): v[metric] for i, v in seed["probes"].get(stage, {}).get(task, {}).items()}
    )


def loss_curve(method: dict, key: str) -> dict:
    """{PT step: (mean, sd) of the loss "task/layer/part"}; empty for a method without embedding losses."""
    return over_seeds(method, lambda seed: dict(seed["losses"].get(key, [])))


def loss_keys(results: dict) -> list[str]:
    return list(dict.fromkeys(key for seed in seeds_of(results) for key in seed["losses"] if key.count("/") == 2))


def seeds_of(results: dict) -> list[dict]:
    return [seed for method in results["methods"].values() for seed in method["seeds"]]


def probed_tasks(results: dict) -> list[str]:
    return list(dict.fromkeys(t for seed in seeds_of(results) for probes in seed["probes"].values() for t in probes))


def chance_of(results: dict) -> dict[str, float]:
    """Chance in % for every task in order, the last one being "average"."""
    chance = {task: 100 * value for task, value in results["chance"].items() if task != "average"}
    return {**chance, "average": statistics.fmean(chance.values())}


def comparisons(results: dict) -> dict[str, dict]:
    """{"b - a": {task: paired comparison}}: `comparison` is OLA-VLM minus LLaVA; `comparisons` may hold more."""
    named = {f"{OURS} - {BASELINE}": results["comparison"]} if results.get("comparison") else {}
    return {**named, **results.get("comparisons", {})}


def holm(p_values: dict[str, float]) -> dict[str, bool]:
    """Which hypotheses fall at ALPHA when all of them are asked at once (Holm's step-down procedure)."""
    rejected, falling = {}, True
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        falling = falling and p <= ALPHA / (len(p_values) - rank)
        rejected[name] = falling
    return rejected


# ------------------------------------------------------------------------------------------------------------- text


def report_text(results: dict, figures: list[str]) -> str:
    """report.md: verdicts first, then tables and figures."""
    pictures = {name: ["", f"![{CAPTIONS[name]}]({name})", "", CAPTIONS[name]] for name in figures}
    lines = ["# LLaVA-1.5 and OLA-VLM in miniature", ""]
    lines += [f"Machine: {inline(results['machine'])}."] if "machine" in results else []
    lines += ["Seeds: " + ", ".join(f"{name} {len(m['seeds'])}" for name, m in results["methods"].items()) + "."]
    lines += [*pictures.pop("summary.png", []), "", "## What is better, and what is not"]
    for pair, compared in comparisons(results).items():
        lines += ["", f"**{pair}**, accuracy at the last IFT step:", "", *verdicts(compared)]
    lines += [*speed_and_probes(results), "", "## Accuracy at the last IFT step (%, mean ± sd over seeds)", ""]
    lines += [*accuracy_table(results), "", *headroom(results)]
    lines += [line for picture in pictures.values() for line in picture]
    lines += ["", "## Cost (mean over seeds)", "", *cost_table(results), ""]
    if "world" in results:
        lines += ["## Checks of the world and of the components", ""]
        lines += [*(f"- {name}: {inline(value)}" for name, value in results["world"].items()), ""]
    return "\n".join(lines)


def verdicts(compared: dict[str, dict]) -> list[str]:
    """One plain sentence a task. "Better" has to stand Holm's correction over the tasks (the average aside), and, said
    without reserve, a test over training seeds too: questions alone judge only the models that were trained."""
    stands = holm({task: c["p"] for task, c in compared.items() if task != "average"})
    lines = []
    for task, c in compared.items():
        word = "better" if c["difference"] > 0 else "worse"
        if not stands.get(task, c["p"] <= ALPHA):
            word = "no difference shown"
        elif c["p_seeds"] is None or c["p_seeds"] > ALPHA:
            word += " for these trained models, not shown for new seeds"
        low, high = c["ci95"]
        line = f"- {task}: **{word}**. {100 * c['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], "
        line += f"p = {c['p']:.2g} ({c['test']}, n = {c['n']})"
        if c["p_seeds"] is not None:
            gains = c["seed_differences"]
            line += f"; over seeds ± {100 * mean_sd(gains)[1]:.1f}, positive in {sum(d > 0 for d in gains)} of "
            line += f"{len(gains)}, p = {c['p_seeds']:.2g} (t-test over seeds)"
        lines.append(line + ".")
    return lines


def speed_and_probes(results: dict) -> list[str]:
    """OLA-VLM minus LLaVA along the curve (a method may learn faster and end nowhere better) and layer by layer."""
    if not {BASELINE, OURS} <= results["methods"].keys():
        return []
    base, ours = (results["methods"][name] for name in (BASELINE, OURS))
    gains = paired_gains(accuracy_curve(base, "average"), accuracy_curve(ours, "average"))
    lines = ["", f"**{OURS} - {BASELINE}** along IFT, mean of the tasks, points by step:", ""]
    lines += ["- " + ", ".join(f"{step}: {gain:+.1f}" for step, gain in gains.items()) + "."]
    lines += ["", f"**{OURS} - {BASELINE}**, probes (mean-centred cosine), by layer:", ""]
    for stage, when in STAGES.items():
        for task in probed_tasks(results):
            gains = paired_gains(probe_curve(base, stage, task), probe_curve(ours, stage, task))
            lines.append(
                f"- {task} {when}: " + ", ".join(f"{layer}: {gain:+.3f}" for layer, gain in gains.items()) + "."
            )
    return lines


def paired_gains(base: dict, ours: dict) -> dict:
    return {x: ours[x][0] - base[x][0] for x in ours if x in base}


def accuracy_table(results: dict) -> list[str]:
    chance = chance_of(results)
    rows = [["chance", *(f"{value:.1f}" for value in chance.values())]]
    for name, method in results["methods"].items():
        cells = [mean_sd(100 * seed["accuracy"][task] for seed in method["seeds"]) for task in chance]
        spread = len(method["seeds"]) > 1
        rows.append([name, *(f"{mean:.1f} ± {sd:.1f}" if spread else f"{mean:.1f}" for mean, sd in cells)])
    return table(["method", *chance], rows)


def headroom(results: dict) -> list[str]:
    """Is there something to learn and something left to learn? A saturated or a chance-level task compares nothing."""
    if BASELINE not in results["methods"]:
        return []
    lines = []
    for task, chance in list(chance_of(results).items())[:-1]:
        mean, _ = mean_sd(100 * seed["accuracy"][task] for seed in results["methods"][BASELINE]["seeds"])
        if mean < chance + 10:
            lines.append(f"- {task}: {BASELINE} ends only {mean - chance:+.1f} points from chance.")
        elif mean > 92:
            lines.append(f"- {task}: {BASELINE} is saturated at {mean:.1f}%.")
    return lines or [f"On every task {BASELINE} ends at least 10 points above chance and at most at 92%."]


def cost_table(results: dict) -> list[str]:
    stages = list(dict.fromkeys(stage for seed in seeds_of(results) for stage in seed["seconds"]))
    rows = []
    for name, method in results["methods"].items():
        seconds = over_seeds(method, lambda seed: seed["seconds"])
        memory = max(seed["peak_memory_mb"] for seed in method["seeds"])
        rows.append([name, *(f"{seconds[s][0]:.0f}" if s in seconds else "" for s in stages), f"{memory:.0f}"])
    return table(["method", *(f"{stage} (s)" for stage in stages), "peak memory (MB)"], rows)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def inline(value) -> str:
    if isinstance(value, dict):
        parts = {key: f"({inline(item)})" if isinstance(item, dict) else inline(item) for key, item in value.items()}
        return ", ".join(f"{key} {part}" for key, part in parts.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------- figures


def draw_figures(results: dict, out_dir: Path) -> None:
    """Draw into `out_dir` what `results` hold data for."""
    from matplotlib import rc_context

    figures = {"accuracy.png": draw_accuracy}
    if probed_tasks(results):
        figures |= {"summary.png": draw_summary, "probes.png": draw_probes}
        figures["probes_plain.png"] = partial(draw_probes, metric="ridge_plain")
    if loss_keys(results):
        figures["losses.png"] = draw_losses
    with rc_context(STYLE):
        for name, draw in figures.items():
            draw(results).savefig(out_dir / name, dpi=130)


def grid(rows: int, columns: int, **kwargs):
    """A figure 10 inches wide and its (rows, columns) axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.9 * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def with_legend(figure, axes):
    """The figure with one legend for all its panels, above them."""
    entries = {}
    for ax in axes.flat:
        entries = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)) | entries
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4)
    return figure


def draw_methods(ax, results: dict, curve_of: Callable[[dict], dict], **style) -> None:
    """For each method a line of means with a band of one sd."""
    for i, (name, method) in enumerate(results["methods"].items()):
        color, curve = COLORS.get(name, f"C{i + 4}"), curve_of(method)
        if curve:
            low, middle, high = zip(*((mean - sd, mean, mean + sd) for mean, sd in curve.values()), strict=True)
            style = {"linestyle": "--" if name == CONTROL else "-"} | style
            ax.plot(list(curve), middle, color=color, label=LABELS.get(name, name), **style)
            ax.fill_between(list(curve), low, high, color=color, alpha=0.15, linewidth=0)


def accuracy_panel(ax, results: dict, task: str) -> None:
    draw_methods(ax, results, lambda method: accuracy_curve(method, task), marker=".")
    ax.axhline(chance_of(results)[task], color="black", linestyle=":", label="chance")
    ax.set(title="mean of the tasks (%)" if task == "average" else f"{task} (%)", xlabel="IFT step")


def probe_panel(ax, results: dict, stage: str, task: str, metric: str = "ridge") -> None:
    draw_methods(ax, results, lambda method: probe_curve(method, stage, task, metric), marker=".")
    ax.set(title=f"{task}, {STAGES[stage]}", xlabel="LLM layer")
    ax.xaxis.get_major_locator().set_params(integer=True)


def gain_panel(ax, results: dict) -> None:
    """The difference and its interval for every task of the first comparison."""
    for pair, compared in list(comparisons(results).items())[:1]:
        middle = [100 * c["difference"] for c in compared.values()]
        ends = [[100 * abs(c["ci95"][i] - c["difference"]) for c in compared.values()] for i in (0, 1)]
        ax.errorbar(middle, list(compared), xerr=ends, fmt="o", color=COLORS[OURS], capsize=3)
        ax.invert_yaxis()
        ax.set(title="gain (points)", xlabel=pair)
    ax.axvline(0, color="black", linewidth=1)


def draw_accuracy(results: dict):
    tasks = list(chance_of(results))
    figure, axes = grid(-(-len(tasks) // 3), 3)
    for ax, task in zip(axes.flat, tasks, strict=False):
        accuracy_panel(ax, results, task)
    for ax in axes.flat[len(tasks) :]:
        ax.set_axis_off()
    return with_legend(figure, axes)


def draw_probes(results: dict, metric: str = "ridge"):
    tasks = probed_tasks(results)
    figure, axes = grid(len(STAGES), len(tasks), sharey="col")
    for row, stage in zip(axes, STAGES, strict=True):
        row[0].set_ylabel("mean-centred cosine" if metric == "ridge" else "plain cosine")
        for ax, task in zip(row, tasks, strict=True):
            probe_panel(ax, results, stage, task, metric)
    return with_legend(figure, axes)


def draw_summary(results: dict):
    """The README's picture: the tasks' mean over IFT steps, the gains at its end, the probes of both stages."""
    tasks = probed_tasks(results)
    figure, axes = grid(len(STAGES), 1 + len(tasks))
    accuracy_panel(axes[0, 0], results, "average")
    gain_panel(axes[1, 0], results)
    for row, stage in zip(axes, STAGES, strict=True):
        for ax, task in zip(row[1:], tasks, strict=True):
            probe_panel(ax, results, stage, task)
    return with_legend(figure, axes)


def draw_losses(results: dict):
    """One row a part of the loss, one column a task, line styles for layers."""
    keys = loss_keys(results)
    tasks, parts = (list(dict.fromkeys(key.split("/")[i] for key in keys)) for i in (0, 2))
    layers = {task: sorted({int(key.split("/")[1]) for key in keys if key.startswith(task + "/")}) for task in tasks}
    figure, axes = grid(len(parts), len(tasks), sharex=True)
    for key in keys:
        task, layer, part = key.split("/")
        ax = axes[parts.index(part), tasks.index(task)]
        style = ["-", "--", ":", "-."][layers[task].index(int(layer)) % 4]
        draw_methods(ax, results, lambda method, key=key: loss_curve(method, key), linestyle=style)
        names = " and ".join(str(layer) for layer in layers[task])
        ax.set(title=f"{task}, layers {names}", ylabel=part.replace("_", "-"), xlabel="PT step")
    return with_legend(figure, axes)


if __name__ == "__main__":
    write_report(sys.argv[1])
