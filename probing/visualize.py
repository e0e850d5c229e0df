"""What each layer sees: `ola-vlm visualize` (commands/visualize.py; the paper's Figures 6 and VI).

The predictions are those of probes, which `ola-vlm probe` fits to every layer of any vision-language model
(`--probes`, or a checkpoint's own folder "probes"), else of the checkpoint's predictors, which learned to read the
states of pre-training: fine-tuning has changed these.
"""

import base64
import io
import textwrap
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ..commands.running import command, tell
from ..files.escapes import mathtext, one_line, terminal
from ..files.page_templates import render
from ..files.strangers import inside
from ..files.writing import check_is_of, save_figure, write_whole
from ..inference.checkpoints import check_is_no_file, load_checkpoint
from ..targets.images import image_files, open_image
from .features import find_teachers
from .figures import METHODS
from .pictures import (
    OUTSIDE,
    LayerViewer,
    Pictures,
    has_classes,
    note_of,
    square,
)
from .states import PROMPT

# Around a picture that is not square.
GRAY = 217
TEMPLATE = Path(__file__).with_name("layers_page.html")


def display_names(checkpoints: Sequence[str]) -> list[str]:
    """Methods by their name, others by their folder's or repository's, if that tells them apart."""
    names = [Path(checkpoint).name for checkpoint in checkpoints]
    if len(set(names)) == len(names):
        return [METHODS[name][0] if name in METHODS else name for name in names]
    if len(set(checkpoints)) == len(checkpoints):
        return list(checkpoints)
    # One checkpoint by several probes.
    return [f"{checkpoint} ({number})" for number, checkpoint in enumerate(checkpoints, start=1)]


def heading_order(heading: str) -> int:
    """Layers come last, by their number; the others stay in their order."""
    if heading.startswith("layer "):
        return 1 + int(heading.removeprefix("layer "))
    return 0


@dataclass
class TaskGrid:
    """A task's pictures of several models: heading -> a picture a row, and the rows' names."""

    columns: Pictures
    labels: list[str]


def compared(shown: Mapping[str, dict[str, Pictures]]) -> dict[str, TaskGrid]:
    """Several models' pictures in one, by task. All models' rows of an image stand together, in the order of `shown`
    (label -> its `LayerViewer.pictures`); a layer that a model lacks stays empty."""
    tasks = dict.fromkeys(chain.from_iterable(shown.values()))
    return {task: _compared_task(shown, task) for task in tasks}


def _compared_task(shown: Mapping[str, dict[str, Pictures]], task: str) -> TaskGrid:
    by_model = {label: pictures[task] for label, pictures in shown.items() if task in pictures}
    # Models differ in their layers: the columns are those that any of them has.
    headings = dict.fromkeys(chain.from_iterable(by_model.values()))
    grid = TaskGrid(columns={heading: [] for heading in sorted(headings, key=heading_order)}, labels=[])
    num_images = len(next(iter(by_model.values()))["image"])
    # By image first: rows that are to be compared stand together.
    for n in range(num_images):
        for label, pictures in by_model.items():
            grid.labels.append(label)
            for heading, column in grid.columns.items():
                column.append(pictures[heading][n] if heading in pictures else None)  # pyright: ignore[reportAttributeAccessIssue] (the columns are lists until here)
    return grid


def pictures_figure(
    path: str | Path, columns: Pictures, title: str, legend: Mapping[str, tuple], labels: Sequence[str] = ()
) -> None:
    """Saves a grid of pictures (.png, .pdf, ...) with their notes: a row an image, a column for each entry of
    `columns`.

    `legend`: class -> color; only colors that occur in a picture are listed. `labels`: the rows' names.
    """
    # All columns are equally long, or this fails.
    (num_rows,) = {len(column) for column in columns.values()}
    num_columns = len(columns)
    # About 16 characters of a title fit above a column.
    title_lines = textwrap.wrap(title, 16 * num_columns)
    # In inches: a picture, a line of the notes below it, a line of the title, the legend.
    cell = 1.5
    note_lines = 0
    for column in columns.values():
        notes = [note_of(picture) for picture in column]
        note_lines = max(note_lines, *(len(note.splitlines()) for note in notes))
    width = cell * num_columns + 0.1
    height = (cell + 0.17 * note_lines) * num_rows + 0.5 + 0.2 * len(title_lines)
    if labels:
        width += 0.3
    if legend:
        height += 0.35

    figure = Figure(figsize=(width, height), layout="constrained")
    # The pictures, each column under its heading.
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for index, (name, column) in enumerate(columns.items()):
        axes[0, index].set_title(mathtext(textwrap.fill(name, 16)), fontsize=10)
        for axis, picture in zip(axes[:, index], column, strict=True):
            if picture is not None:
                axis.imshow(square(picture, GRAY), interpolation="nearest")
            axis.set_xlabel(note_of(picture), fontsize=8)
    for axis in axes.flat:
        # Not axis("off"): that would hide the notes, which are labels of the x axis.
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, label in zip(axes[:, 0], labels, strict=False):
        # Without a comparison rows have no names.
        axis.set_ylabel(mathtext(label), fontsize=10)
    figure.suptitle(mathtext("\n".join(title_lines)), fontsize=11)
    if legend:
        # A legend of the classes that occur: COCO has 133.
        drawn = drawn_colors(columns)
        patches = []
        for name, color in legend.items():
            if color in drawn:
                patches.append(Patch(color=tuple(value / 255 for value in color), label=mathtext(name)))
        figure.legend(handles=patches, loc="outside lower center", ncols=2 * num_columns, fontsize=8, frameon=False)
    save_figure(figure, path, dpi=150)


def drawn_colors(columns: Pictures) -> set[tuple[int, int, int]]:
    """Those of all pictures of classes."""
    colors: set[tuple[int, int, int]] = set()
    for heading, column in columns.items():
        for picture in column:
            # A photograph may have any color.
            if heading != "image" and has_classes(picture):
                pixels = np.asarray(picture).reshape(-1, 3)
                colors.update(map(tuple, np.unique(pixels, axis=0).tolist()))
    return colors


def embedded_png(picture: Image.Image) -> str:
    """A URL that holds the picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def page(
    viewer: LayerViewer, shown: Mapping[str, Pictures], title: str, labels: Mapping[str, Sequence[str]] | None = None
) -> str:
    """One HTML file with all pictures inside. `labels`: task -> its rows' names."""
    sections = []
    for task, columns in shown.items():
        drawn = drawn_colors(columns)
        # COCO has 133 classes: those that occur.
        legend = {name: color for name, color in viewer.decoders[task].legend.items() if color in drawn}
        rows = []
        for n, pictures in enumerate(zip(*columns.values(), strict=True)):
            cells = []
            for heading, picture in zip(columns, pictures, strict=True):
                # A layer that this model lacks has no cell, so each cell says its heading itself.
                if picture is not None:
                    notes = note_of(picture).splitlines()
                    cells.append({"heading": heading, "source": embedded_png(picture), "notes": notes})
            rows.append({"label": labels[task][n] if labels else "", "cells": cells})
        sections.append(
            {
                "task": task,
                "caption": viewer.caption(task),
                "legend": legend,
                "rows": rows,
            }
        )
    return render(TEMPLATE, title=title, remark=viewer.remark, sections=sections, left_out=viewer.left_out)


def load_compared(args: Namespace, viewer: LayerViewer, run: Mapping) -> list[LayerViewer]:
    """Those of --compare, by the teachers of `viewer`."""
    # None: each checkpoint's own probes, or its predictors.
    folders = args.compare_probes or [None] * len(args.compare)
    viewers = []
    for checkpoint, probes in zip(args.compare, folders, strict=True):
        model, processor = load_checkpoint(checkpoint, args.dtype)
        viewers.append(
            LayerViewer.load(checkpoint, model, processor, run, prompt=args.prompt, probes=probes, like=viewer)
        )
    return viewers


def load_viewers(args: Namespace) -> list[LayerViewer]:
    """The viewers of --compare, then the checkpoint's. ValueError for what doesn't fit together."""
    run = find_teachers(args.recipe, args.probes, args.checkpoint, others=args.compare, trust=args.trust_run)
    images_for_gen = None
    if args.images_for_gen:
        images_for_gen = image_files(args.images_for_gen)
        # Else gen would be left out for want of a set, although one was named.
        if not images_for_gen:
            raise ValueError(f"{args.images_for_gen} has no images for gen")
    model, processor = load_checkpoint(args.checkpoint, args.dtype)
    viewer = LayerViewer.load(
        args.checkpoint,
        model,
        processor,
        run,
        layers=args.layers,
        prompt=args.prompt,
        probes=args.probes,
        images_for_gen=images_for_gen,
        unclip=args.unclip,
    )
    return [*load_compared(args, viewer, run), viewer]


@command("visualize")
def main(args: Namespace) -> None:
    if args.prompt is None:
        args.prompt = PROMPT
    checkpoints = [*args.compare, args.checkpoint]
    for checkpoint in checkpoints:
        check_is_no_file(checkpoint)
    check_is_of("visualize", args.out, "layers.html")
    # Opened before any model is loaded: a damaged file is said at once.
    images = [open_image(path) for path in args.images]
    viewers = load_viewers(args)
    names = display_names(checkpoints)
    by_model = {name: viewer.pictures(images) for name, viewer in zip(names, viewers, strict=True)}
    grids = compared(by_model)
    # Their names are the checkpoint's to say.
    files = {task: inside(args.out, f"{task}.png") for task in grids}
    # The checkpoint's own, after those of --compare.
    viewer = viewers[-1]
    if not grids:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in viewer.left_out.items())
        raise ValueError(f"nothing can be shown: {reasons}")

    # One page with all, first, as it says whose folder this is; and a file of pictures for each task.
    by = "; ".join(dict.fromkeys(one.by for one in viewers))
    labels = {task: grid.labels for task, grid in grids.items()} if args.compare else None
    title = f"What the layers of {' and '.join(checkpoints)} see, by {by}"
    html = page(viewer, {task: grid.columns for task, grid in grids.items()}, title, labels)
    write_whole(args.out / "layers.html", html)
    for task, grid in grids.items():
        title = f"{task}, by {by}: {viewer.caption(task)}"
        legend = viewer.decoders[task].legend
        pictures_figure(files[task], grid.columns, title, legend, grid.labels if args.compare else ())
        print(terminal(files[task]))
    print(args.out / "layers.html")

    # What isn't shown, and what to be careful about in what is.
    for task, reason in viewer.left_out.items():
        print(one_line(f"{task} is left out: {reason}"))
    for remark in dict.fromkeys(one.remark for one in viewers if one.remark):
        print(one_line(remark))
    for name, pictures in by_model.items():
        # An image has the same note in every task.
        squares = next((columns["image"] for columns in pictures.values()), [])
        for path, picture in zip(args.images, squares, strict=False):
            if note_of(picture):
                print(one_line(f"{path} is {' '.join(OUTSIDE.split())} of {name}"))
    tell(
        f"Next: open {args.out / 'layers.html'} in a browser, or look at the layers live:",
        f"python -m ola_vlm.space.app --checkpoint {args.checkpoint}",
    )
