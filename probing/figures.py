"""Probe scores as pictures."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..targets.escapes import mathtext
from ..targets.files import save_figure

STYLE = {"font.size": 12, "axes.titlesize": 13, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2}
LINES = ("-", "--", "-.", ":")


def curves_figure(path: str | Path, results: dict) -> None:
    """All models' curves over the LLM's layers, a column a task; above the mean-centred cosine, below the plain one.
    `results`: probes.json's content. The dotted line is what the training images' mean target scores."""
    kind, tasks = results["run"]["probe"], [task["name"] for task in results["run"]["tasks"]]
    models = list(results["models"].values())
    rows = {kind: "cosine similarity,\nmean-centred", f"{kind}_plain": "cosine similarity,\nplain (the paper's)"}
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(tasks) + 0.8, 7.2 + 0.3 * (len(models) // 3)), layout="constrained")
        axes = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
        for row, (score, label) in zip(axes, rows.items(), strict=True):
            row[0].set_ylabel(label)
            for axis, task in zip(row, tasks, strict=True):
                for i, model in enumerate(models):
                    curve = {int(layer): one[score] for layer, one in model["scores"][task].items()}
                    line = {"color": f"C{i % 10}", "linestyle": LINES[i // 10 % 4], "marker": "o", "markersize": 4}
                    axis.plot(curve.keys(), curve.values(), label=mathtext(model["name"]), **line)
                zero = 0.0 if score == kind else results["zero"][task]
                axis.axhline(zero, color="0.35", linestyle=":", label="the mean target (nothing seen)")
                axis.xaxis.get_major_locator().set_params(integer=True)
        for axis, task in zip(axes[0], tasks, strict=True):
            axis.set_title(mathtext(task))
        for axis in axes[1]:
            axis.set_xlabel("LLM layer (0: its input)")
        counts = results["image_counts"]
        figure.suptitle(f"{kind} probes: {counts['train']:,} images to fit, {counts['test']:,} held out to score")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(handles)))
        save_figure(figure, path, dpi=110)
