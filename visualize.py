"""Predicted embeddings as pictures: decoded by the teachers, beside the teacher's own and the truth.

N images, Q positions, E width, S side of the teacher's square in pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from .targets.cache import TargetStatistics
from .targets.encoders import DepthAnythingEncoder, OneFormerEncoder

VOID = -1  # a pixel without a class


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
    decoded = {}
    for layer, prediction in predictions.items():
        features = prediction.detach().float().cpu()
        if statistics is not None:
            features = statistics.restore(features)
        decoded[layer] = encoder.decode(features, list(images)).numpy()
    return decoded


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
        kind: "depth" (inverse depth, larger is closer; each picture has its own range) or "seg" (class indices;
            negative ones are void).
        class_names: for the legend of a segmentation; only classes that occur are listed.
        class_colors: one matplotlib colour a class, if the classes' names call for it.
    """
    if kind not in ("depth", "seg"):
        raise ValueError(f"kind is {kind!r}: use 'depth' or 'seg'")
    maps = {name: [np.asarray(one) for one in column] for name, column in columns.items()}
    for name, column in maps.items():
        if len(column) != len(images):
            raise ValueError(f"column {name!r} has {len(column)} pictures for {len(images)} images")
    shown = np.unique(np.concatenate([one.ravel() for column in maps.values() for one in column]).astype(float))
    count = max(int(shown.max()) + 1, len(class_names), len(class_colors), 1) if kind == "seg" else 0
    name = "tab10" if count <= 10 else "tab20" if count <= 20 else "gist_ncar"
    palette = matplotlib.colormaps[name].resampled(count) if count > 20 else matplotlib.colormaps[name]
    colours = ListedColormap(class_colors or [palette(i) for i in range(max(count, 1))]).with_extremes(under="0.85")

    cell, wide, legend = 1.5, 1 + len(maps), 0.35 if kind == "seg" else 0.0
    figure = Figure(figsize=(cell * wide + 0.1, cell * len(images) + 0.75 + legend), layout="constrained")
    axes = figure.subplots(len(images), wide, squeeze=False)
    for row, image in zip(axes, images, strict=True):
        row[0].imshow(pad_to_square(np.asarray(image.convert("RGB")), 128))
    for place, (name, column) in enumerate(maps.items(), start=1):
        axes[0, place].set_title(name, fontsize=10)
        for row, one in zip(axes, column, strict=True):
            if kind == "depth":
                row[place].imshow(pad_to_square(one.astype(float), np.nan), cmap="inferno")
            else:
                norm = BoundaryNorm(np.arange(count + 1) - 0.5, count)
                row[place].imshow(pad_to_square(one, VOID), cmap=colours, norm=norm, interpolation="nearest")
    axes[0, 0].set_title("image", fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], facecolor="0.85")
        axis.spines[:].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    if kind == "seg" and class_names:
        patches = [Patch(color=colours(i), label=name) for i, name in enumerate(class_names) if i in shown]
        figure.legend(
            handles=patches, loc="outside lower center", ncols=min(len(patches), 2 * wide), fontsize=8, frameon=False
        )
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
    class_names: Sequence[str] = (),
    class_colors: Sequence = (),
) -> None:
    """`comparison_figure` of image | truth | teacher | decoded target | one column a layer.

    "decoded target" is the teacher's target through the same decoding: the best a prediction can look like. For depth
    the teacher's own picture is made from its four different feature maps, the decoded ones from one of them.
    """
    images = list(images)
    columns = {} if truth is None else {"truth": truth}
    target = encoder.encode(images)
    if isinstance(encoder, DepthAnythingEncoder):
        kind = "depth"
        columns["teacher"] = encoder.model(encoder.pixel_values(images)).predicted_depth.float().cpu()
    else:
        kind, title = (
            "seg",
            f"{title}\n(only the last stage is decoded from features, finer ones are the teacher's own)",
        )
        columns["teacher"] = encoder.decode(None, images)
    columns["decoded target"] = encoder.decode(target, images)
    decoded = decode_predictions(encoder, predictions, images, statistics)
    columns |= {f"layer {layer}": pictures for layer, pictures in decoded.items()}
    comparison_figure(path, images, columns, kind, title.strip(), class_names, class_colors)
