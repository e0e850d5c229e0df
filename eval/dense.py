"""Scores of what is decoded from features: depth order (DA-2K), semantic masks (COCO), images (FID).

N points or images, C classes, F features; maps are (H, W).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import scipy.linalg

from ..targets.files import inside, read_object

VOID = 255


def load_da2k(folder: str | Path) -> dict[str, list[dict]]:
    """annotations.json: image's path from the folder on (file names repeat between scenes) -> its pairs of points,
    `{"point1": [row, column], "point2": ..., "closer_point": "point1" or "point2"}`. ValueError for an image outside
    the folder."""
    annotations = read_object(Path(folder) / "annotations.json")
    for path in annotations:
        inside(folder, path)
    return annotations


def depth_order_correct(inverse_depth: np.ndarray, pairs: Sequence[dict]) -> np.ndarray:
    """(N,) bool: is the closer point's inverse depth the larger one? A tie is wrong: in DA-2K the closer point is
    always point1, so that a tie rule in its favour (the reference's) would give a constant map 100%.

    `inverse_depth`: (H, W) of the image's own size, floats: points are its pixels. ValueError for a point outside.
    """
    height, width = inverse_depth.shape
    points = np.array([[pair["point1"], pair["point2"]] for pair in pairs], int).reshape(-1, 2, 2)
    if (points < 0).any() or (points >= [height, width]).any():
        raise ValueError(f"a point lies outside the {height} x {width} map: resize the map to the image's own size")
    first, second = inverse_depth[points[..., 0], points[..., 1]].T
    is_first = np.array([pair["closer_point"] == "point1" for pair in pairs], bool)
    return np.where(is_first, first > second, second > first)


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) pixel counts, rows the truth's classes; pixels whose truth is `VOID` don't count. Add them up over the
    data set for `mean_iou`. A predicted class outside 0..C-1 is a column of its own, the last: (C, C + 1)."""
    known = truth != VOID
    truth, prediction = truth[known].astype(int), prediction[known].astype(int)
    prediction = np.where((prediction >= 0) & (prediction < num_classes), prediction, num_classes)
    counts = np.bincount(truth * (num_classes + 1) + prediction, minlength=num_classes * (num_classes + 1))
    return counts.reshape(num_classes, num_classes + 1)


def mean_iou(confusion: np.ndarray) -> float:
    """The standard data-set-level mIoU of summed confusion matrices: the mean over classes that occur in truth or
    prediction."""
    hits = np.diagonal(confusion)
    union = confusion.sum(1) + confusion[:, : len(confusion)].sum(0) - hits
    return float((hits[union > 0] / union[union > 0]).mean())


def reference_mean_iou(truths: Iterable[np.ndarray], predictions: Iterable[np.ndarray]) -> float:
    """The reference implementation's variant: the mean over images of each image's mean IoU over the classes of its
    truth; void pixels count in the unions of predicted classes. Images without a class are an error there."""
    scores = []
    for truth, prediction in zip(truths, predictions, strict=True):
        masks = [(truth == label, prediction == label) for label in np.unique(truth) if label != VOID]
        scores.append(np.mean([(a & b).sum() / (a | b).sum() for a, b in masks]))
    return float(np.mean(scores))


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """FID's distance between two sets of features (N, F): |mean difference|^2 + tr(A + B - 2 (A B)^1/2), A and B the
    covariances. The features (for FID Inception's pool3, 2048 wide) are the caller's: no package ships its weights.

    tr (A B)^1/2 is the sum of A^1/2 B^1/2's singular values; with the sets' own factors no root is needed: for
    N < F, too, it is exact."""
    a, b = (np.asarray(features, float) for features in (features_a, features_b))
    shift = a.mean(0) - b.mean(0)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    a, b = (np.linalg.qr(x, mode="r") for x in (a, b))  # F x F at most
    # numpy's stubs take mode="r" for the mode with two results
    cross = scipy.linalg.svdvals(a @ b.T).sum()  # pyright: ignore[reportAttributeAccessIssue]
    return float(shift @ shift + (a**2).sum() + (b**2).sum() - 2 * cross)  # pyright: ignore[reportOperatorIssue]
