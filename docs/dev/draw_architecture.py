"""The picture of docs/architecture.md: `python docs/dev/draw_architecture.py` writes docs/architecture.png."""

from pathlib import Path

import matplotlib

# Before pyplot is imported: it draws into files only, on machines without a screen, too.
matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).parents[1] / "architecture.png"
# Boxes' colors, by what a box stands for; INK is that of lines and letters.
FROZEN = "#d8e2ec"
TRAINED = "#f6c98f"  # in pre-training
DATA = "#ffffff"
LOSS = "#e7b3b3"
INK = "#22303c"
# The tasks with the paper's layers, and the color of their tokens.
TASKS = {"gen": ([12, 20], "#c9a7d8"), "depth": ([8, 20], "#9fd0a8"), "seg": ([10, 18], "#a9c6ee")}


def box(axes, x, y, width, height, text, color, size=8, style="round,pad=0,rounding_size=0.08"):
    # pad=0: the box ends exactly at its width and height, so that arrows meet its edge.
    patch = FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=0.9)
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes, start, end, **options):
    options = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0, **options}
    axes.annotate("", xy=end, xytext=start, arrowprops=options)


def note(axes, x, y, text, **options):
    axes.text(x, y, text, **{"fontsize": 8, "color": INK, "ha": "center", "va": "center", **options})


def draw_inputs(axes):
    """The picture and the question become one row of embeddings."""
    box(axes, 0.2, 0.3, 1.5, 0.8, "image, padded\nto a square", DATA)
    box(axes, 2.1, 0.3, 1.6, 0.8, "vision tower\nCLIP", FROZEN)
    box(axes, 4.1, 0.3, 1.4, 0.8, "projector\n2-layer MLP", TRAINED)
    arrow(axes, (1.7, 0.7), (2.1, 0.7))
    arrow(axes, (3.7, 0.7), (4.1, 0.7))
    arrow(axes, (4.8, 1.1), (2.6, 1.75))
    box(axes, 6.0, 0.3, 2.1, 0.8, "query tables Q\nof each task", TRAINED)
    arrow(axes, (6.6, 1.1), (5.2, 1.75))
    note(axes, 6.55, 1.44, "task tokens: means of groups of rows", ha="left", fontsize=7.5)


def draw_sequence(axes):
    """The row: system, image tokens, every task's tokens, text."""
    x = 0.2
    # (text, width, color) from the left. Widths are not to scale: an image has 576 tokens, a task 8.
    parts = [("system", 0.9, DATA), ("image tokens", 3.4, FROZEN)]
    parts += [(name, 0.65, color) for name, (_, color) in TASKS.items()]
    parts += [("text", 1.65, DATA)]
    for name, width, color in parts:
        box(axes, x, 1.75, width, 0.5, name, color, style="square,pad=0")
        x += width
    note(axes, 8.35, 2.0, "(B, T)", ha="left")


def draw_language_model(axes):
    box(axes, 0.2, 2.65, 7.9, 3.1, "", FROZEN)
    arrow(axes, (4.15, 2.25), (4.15, 2.65))
    note(axes, 0.45, 5.5, "language model: 32 blocks", ha="left", fontsize=9)
    # Layer -> height of its line, where the arrows to its predictors begin.
    heights = {}
    for layer in (8, 10, 12, 18, 20):
        # Of 26 rather than 32 blocks: no predictor is beyond layer 20, and the lines below get more room.
        y = 2.65 + 3.1 * layer / 26
        heights[layer] = y
        axes.plot([0.2, 8.1], [y, y], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        note(axes, 0.35, y + 0.12, f"layer {layer}", ha="left", fontsize=7.5)
    box(axes, 2.6, 6.15, 2.2, 0.5, "head", FROZEN)
    box(axes, 5.4, 6.15, 2.7, 0.5, "next-token loss", LOSS)
    arrow(axes, (3.7, 5.75), (3.7, 6.15))
    arrow(axes, (4.8, 6.4), (5.4, 6.4))
    return heights


def draw_predictors(axes, heights):
    """From a layer's states to a prediction, which is compared with what the teacher says."""
    # Heights of the tasks' boxes, in the order of the tasks' first layers: few arrows cross.
    rows = {"depth": 2.75, "seg": 4.0, "gen": 5.25}
    # (N, Q, E) of a prediction and of its target.
    shapes = {"depth": "(N, 576, 1024)", "seg": "(N, 576, 1536)", "gen": "(N, 1, 1024)"}
    teachers = {"depth": "Depth-Anything\nV2", "seg": "OneFormer", "gen": "unCLIP's image\nencoder"}
    for name, y in rows.items():
        layers, color = TASKS[name]
        for layer in layers:
            arrow(axes, (8.1, heights[layer]), (9.2, y + 0.35), color=color, linewidth=2)
        box(axes, 9.2, y, 1.6, 0.7, f"{name} predictors\none a layer", TRAINED)
        box(axes, 11.5, y, 1.6, 0.7, f"loss of {name}", LOSS)
        arrow(axes, (10.8, y + 0.35), (11.5, y + 0.35))
        note(axes, 11.15, y - 0.12, shapes[name], fontsize=7.5)
        box(axes, 13.7, y, 1.8, 0.7, teachers[name], FROZEN)
        arrow(axes, (13.7, y + 0.35), (13.1, y + 0.35))
    note(axes, 11.15, 6.4, "smooth L1 + 0.3 contrastive,\nweighted by 0.5, summed over tasks and layers")
    note(axes, 14.6, 6.4, "teachers: once an image,\nkept in the target cache")
    # What exists in pre-training only.
    frame = FancyBboxPatch(
        (9.0, 2.3), 6.7, 4.5, boxstyle="round,pad=0,rounding_size=0.1", facecolor="none", edgecolor=INK, linestyle=":"
    )
    axes.add_patch(frame)
    note(axes, 12.3, 2.05, "training only: answers need neither predictors nor teachers")


def draw_legend(axes):
    box(axes, 9.2, 0.75, 0.35, 0.3, "", TRAINED)
    note(axes, 9.7, 0.9, "trained in pre-training (PT)", ha="left")
    box(axes, 9.2, 0.3, 0.35, 0.3, "", FROZEN)
    note(axes, 9.7, 0.45, "frozen in PT. Fine-tuning (IFT): projector and language model train", ha="left")


def main() -> None:
    figure, axes = plt.subplots(figsize=(13.2, 5.8))
    # All coordinates above are in these units, from the lower left corner.
    axes.set_xlim(0, 15.9)
    axes.set_ylim(0.1, 7.0)
    axes.axis("off")
    draw_inputs(axes)
    draw_sequence(axes)
    heights = draw_language_model(axes)
    draw_predictors(axes, heights)
    draw_legend(axes)
    # Software: None keeps matplotlib's version out of the file, which would change it with every update.
    figure.savefig(OUT, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
