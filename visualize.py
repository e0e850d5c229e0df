"""Predicted embeddings as pictures: decoded by the teachers, beside the teacher's own and the truth.

N images, Q positions, E width, S side of the teacher's square in pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from .targets.cache import TargetStatistics
from .targets.encoders import DepthAnythingEncoder, OneFormerEncoder, open_image

VOID, VOID_COLOR = -1, "0.85"  # a pixel without a class


def pad_to_square(picture: np.ndarray, fill: float) -> np.ndarray:
    """(h, w, ...) -> (side, side, ...): the encoders' square, so that pictures of any origin lie over each other."""
    height, width = picture.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padding = [(top, side - height - top), (left, side - width - left)] + [(0, 0)] * (picture.ndim - 2)
    return np.pad(picture, padding, constant_values=fill)


def comparison_figure(
    path: str | Path,
    images: Sequence[Image.Image],
    columns: Mapping[str, Sequence[np.ndarray] | np.ndarray | Tensor],
    kind: str,
    class_names: Sequence[str],
    class_colors: Sequence,
    title: str = "",
) -> None:
    """Saves a grid of pictures: a row an image; the image, then one column for each entry of `columns`.

    Args:
        path: of the file to write (.png, .pdf, ...).
        columns: heading -> N maps (h, w) of any size, in the order to be shown; for example
            {"truth": ..., "teacher": ..., "layer 2": ...}.
        kind: "depth" (inverse depth, larger is closer; each picture has its own range) or "seg" (class indices
            or `VOID`); only the latter need the following.
        class_names: for the legend; only classes that occur are listed.
        class_colors: one matplotlib colour a class.
    """
    dtype = float if kind == "depth" else int
    maps = {name: [np.asarray(one).astype(dtype) for one in column] for name, column in columns.items()}
    palette = to_rgba_array([*class_colors, VOID_COLOR])  # VOID is its last row
    cell, wide, legend = 1.5, 1 + len(maps), 0.35 if kind == "seg" else 0.0
    figure = Figure(figsize=(cell * wide + 0.1, cell * len(images) + 0.75 + legend), layout="constrained")
    axes = figure.subplots(len(images), wide, squeeze=False)
    for row, image in zip(axes, images, strict=True):
        row[0].imshow(pad_to_square(np.asarray(open_image(image)), 128))
    for place, (name, column) in enumerate(maps.items(), start=1):
        axes[0, place].set_title(name, fontsize=10)
        for row, one in zip(axes, column, strict=True):
            if kind == "depth":
                row[place].imshow(pad_to_square(one, np.nan), cmap="inferno")
            else:
                row[place].imshow(palette[pad_to_square(one, VOID)], interpolation="nearest")
    axes[0, 0].set_title("image", fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], facecolor=VOID_COLOR)
        axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11)
    if kind == "seg":
        shown = {value for column in maps.values() for one in column for value in np.unique(one)}
        patches = [Patch(color=palette[i], label=name) for i, name in enumerate(class_names) if i in shown]
        ncols = min(len(patches), 2 * wide)
        figure.legend(handles=patches, loc="outside lower center", ncols=ncols, fontsize=8, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


@torch.no_grad()
def predictions_figure(
    path: str | Path,
    encoder: DepthAnythingEncoder | OneFormerEncoder,
    images: Sequence[Image.Image],
    predictions: Mapping[int, Tensor],
    truth: Sequence[np.ndarray],
    statistics: TargetStatistics,
    title: str,
    **options,
) -> None:
    """`comparison_figure` (`options` are its own) of image | truth | teacher | decoded target | one column a layer.

    `predictions`: layer -> (N, Q, E), of the model's predictors or of probes trained on targets standardised by
    `statistics`; the `encoder` is the task's teacher, whose `decode` makes the pictures.
    "decoded target" is the teacher's target through the same decoding: the best a prediction can look like. For depth
    the teacher's own picture is made from its four different feature maps, the decoded ones from one of them.
    """
    columns, kind = {"truth": truth}, "depth" if isinstance(encoder, DepthAnythingEncoder) else "seg"
    if kind == "depth":
        columns["teacher"] = encoder.model(encoder.pixel_values(images)).predicted_depth.float().cpu()
    else:
        title += "\n(only the last stage is decoded from features, finer ones are the teacher's own)"
        columns["teacher"] = encoder.decode(None, images)
    columns["decoded target"] = encoder.decode(encoder.encode(images), images)
    for layer, prediction in predictions.items():
        columns[f"layer {layer}"] = encoder.decode(statistics.restore(prediction.float().cpu()), images)
    comparison_figure(path, images, columns, kind, title=title, **options)
