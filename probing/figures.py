"""Probe scores as pictures, and what all figures share: their fonts, and one color and name for each method."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..files.escapes import mathtext
from ..files.writing import save_figure

# Fonts that can still be read at the width of a README.
STYLE: dict = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2,
}
# A run's folder -> the method's name, color and line style in every figure.
METHODS = {
    "llava": ("LLaVA", "#4c72b0", "-"),
    "ola_vlm": ("OLA-VLM", "#d1495b", "-"),
    "ola_vlm_shuffled": ("OLA-VLM, shuffled targets", "#8d8d8d", "--"),
    "words": ("words", "#2e7d32", "-"),
    "moments": ("moments", "#c2a000", "--"),
    "patch": ("patch", "#00897b", "-"),
    "feature_concat": ("LLaVA, feature concat", "#55a868", "-."),
    "token_concat": ("LLaVA, token concat", "#dd8452", "-."),
    "ola_vlm_losses_none": ("OLA-VLM, task tokens without losses", "#8172b3", ":"),
    "ola_vlm_losses_pt_ift": ("OLA-VLM, losses in IFT, too", "#937860", ":"),
}
# For models that are none of these, in their order.
OTHER_COLORS = ("#17becf", "#bcbd22", "#e377c2", "#1b4d3e", "#f0b400", "#6a0dad", "#a0522d", "#00a2ff")
# Tasks take colors that no method has.
TASK_COLORS = {"depth": "#2f9e9e", "seg": "#b5651d", "gen": "#7a4fb5"}
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "D", "^", "v")


def method_styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Label, color, line style and marker of each model, for matplotlib.

    A name is a method's, or a path with the method's folder in it ("llava/seed1"). Several of one method have its
    color and differ in line style and marker.
    """
    styles: dict[str, dict[str, str]] = {}
    others = 0
    for name in names:
        parts = name.split("/")
        method = next((part for part in parts if part in METHODS), None)
        if method is not None:
            label, color, line_style = METHODS[method]
            # What else the path says tells runs of one method apart: "llava/seed1" becomes "LLaVA, seed1".
            rest = [part for part in parts if part != method]
            label = ", ".join([label, *rest])
        else:
            label = name
            color = OTHER_COLORS[others % len(OTHER_COLORS)]
            # Once all colors are taken, they come again with the next line style.
            line_style = LINE_STYLES[others // len(OTHER_COLORS) % len(LINE_STYLES)]
            others += 1
        # How many earlier curves have this color.
        same_color = sum(style["color"] == color for style in styles.values())
        # A method's first curve keeps the line style that it has in every figure.
        if method is not None and same_color:
            line_style = LINE_STYLES[same_color % len(LINE_STYLES)]
        marker = MARKERS[same_color % len(MARKERS)]
        styles[name] = {"label": mathtext(label), "color": color, "linestyle": line_style, "marker": marker}
    return styles


def curves_figure(path: str | Path, results: dict) -> None:
    """All models' curves over the LLM's layers, a column a task; above the mean-centered cosine, below the plain one.
    `results`: probes.json's content. The dotted line is what the training images' mean target scores."""
    kind = results["run"]["probe"]
    tasks = [task["name"] for task in results["run"]["tasks"]]
    models = list(results["models"].values())
    styles = method_styles(model["name"] for model in models)
    # Score in probes.json -> what its row of panels is called.
    rows = {kind: "cosine similarity,\nmean-centered", f"{kind}_plain": "cosine similarity,\nplain (the paper's)"}
    with rc_context(STYLE):
        # In inches. The legend below the panels takes one more line for three models.
        figure = Figure(figsize=(4.2 * len(tasks) + 0.8, 7.2 + 0.3 * (len(models) // 3)), layout="constrained")
        axes = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
        for row, (score, label) in zip(axes, rows.items(), strict=True):
            row[0].set_ylabel(label)
            for axis, task in zip(row, tasks, strict=True):
                for model in models:
                    curve = {int(layer): scores[score] for layer, scores in model["scores"][task].items()}
                    axis.plot(curve.keys(), curve.values(), markersize=4, **styles[model["name"]])
                # Mean-centered, the mean target scores 0 by definition; its plain score was measured.
                zero = 0.0 if score == kind else results["zero"][task]
                axis.axhline(zero, color="0.35", linestyle=":", label="the mean target (nothing seen)")
                # Layers are whole numbers: no tick at 2.5.
                axis.xaxis.get_major_locator().set_params(integer=True)
        for axis, task in zip(axes[0], tasks, strict=True):
            axis.set_title(mathtext(task))
        for axis in axes[1]:
            axis.set_xlabel("LLM layer (0: its input)")
        counts = results["image_counts"]
        figure.suptitle(f"{kind} probes: {counts['train']:,} images to fit, {counts['test']:,} held out to score")
        # All panels show the same models: the first one's legend is everyone's.
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(handles)))
        save_figure(figure, path, dpi=110)
