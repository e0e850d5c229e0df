"""Predicted embeddings as pictures: decoded by the teachers, beside the teacher's own and the truth.

N images, Q positions, E width, S side of the teacher's square in pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
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


def decode_predictions(
    encoder: DepthAnythingEncoder | OneFormerEncoder,
    predictions: Mapping[int, Tensor],
    images: Sequence[Image.Image],
    statistics: TargetStatistics | None = None,
) -> dict[int, np.ndarray]:
    """The pictures of one task's predictions.

    Args:
        encoder: the task's teacher; its `decode` makes the pictures (segmentation is teacher-assisted: see there).
        predictions: layer -> (N, Q, E), of the model's predictors or of probes.
        statistics: if the targets of training were standardised by them.
    Returns: layer -> (N, S, S): inverse depth in 0..1, or class indices.
    """
    features = {layer: prediction.detach().float().cpu() for layer, prediction in predictions.items()}
    if statistics is not None:
        features = {layer: statistics.restore(feature) for layer, feature in features.items()}
    return {layer: encoder.decode(feature, list(images)).numpy() for layer, feature in features.items()}


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
    title: str = "",
    class_names: Sequence[str] = (),
    class_colors: Sequence = (),
) -> None:
    """Saves a grid of pictures: a row an image; the image, then one column for each entry of `columns`.

    Args:
        path: of the file to write (.png, .pdf, ...).
        columns: heading -> N maps (h, w) of any size, in the order to be shown; for example
            {"truth": ..., "teacher": ..., "layer 2": ...}.
        kind: "depth" (inverse depth, larger is closer; each picture has its own range) or "seg" (class indices
            or `VOID`).
        class_names: for the legend of a segmentation; only classes that occur are listed.
        class_colors: one matplotlib colour a class, if the classes' names call for it.
    """
    if kind not in ("depth", "seg"):
        raise ValueError(f"kind is {kind!r}: use 'depth' or 'seg'")
    dtype = float if kind == "depth" else int
    maps = {name: [np.asarray(one).astype(dtype) for one in column] for name, column in columns.items()}
    for name, column in maps.items():
        if len(column) != len(images):
            raise ValueError(f"column {name!r} has {len(column)} pictures for {len(images)} images")
    if kind == "seg":
        shown = set(np.concatenate([one.ravel() for column in maps.values() for one in column]).tolist())
        count = max(len(class_names), 1 + max(shown))
        colormap = matplotlib.colormaps["tab10"] if count <= 10 else matplotlib.colormaps["gist_ncar"].resampled(count)
        palette = to_rgba_array([*(class_colors or colormap(np.arange(count))), VOID_COLOR])  # VOID is its last row

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
    if kind == "seg" and class_names:
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
    truth: Sequence[np.ndarray] | None = None,
    statistics: TargetStatistics | None = None,
    title: str = "",
    **options,
) -> None:
    """`comparison_figure` (`options` are its own) of image | truth | teacher | decoded target | one column a layer.

    "decoded target" is the teacher's target through the same decoding: the best a prediction can look like. For depth
    the teacher's own picture is made from its four different feature maps, the decoded ones from one of them.
    """
    images, kind = list(images), "depth" if isinstance(encoder, DepthAnythingEncoder) else "seg"
    columns = {} if truth is None else {"truth": truth}
    if kind == "depth":
        columns["teacher"] = encoder.model(encoder.pixel_values(images)).predicted_depth.float().cpu()
    else:
        title += "\n(only the last stage is decoded from features, finer ones are the teacher's own)"
        columns["teacher"] = encoder.decode(None, images)
    columns["decoded target"] = encoder.decode(encoder.encode(images), images)
    for layer, pictures in decode_predictions(encoder, predictions, images, statistics).items():
        columns[f"layer {layer}"] = pictures
    comparison_figure(path, images, columns, kind, title.strip(), **options)
