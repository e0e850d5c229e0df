"""Scores of what is decoded from features: depth order (DA-2K), semantic masks (COCO), images (FID).

N points or images, C classes, F features; maps are (H, W).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg

from ..files.strangers import inside, read_object

# The label of pixels without a class, as most data sets of masks write it.
VOID = 255
# A covariance is divided by N - 1.
MIN_FEATURES = 2


def load_da2k(folder: str | Path) -> dict[str, list[dict]]:
    """annotations.json: image's path from the folder on (file names repeat between scenes) -> its pairs of points,
    `{"point1": [row, column], "point2": ..., "closer_point": "point1" or "point2"}`. ValueError for an image outside
    the folder, and for pairs that have another form."""
    file = Path(folder) / "annotations.json"
    annotations = read_object(file)
    for path, pairs in annotations.items():
        # A path of the file may not lead out of the folder; ValueError if it does.
        inside(folder, path)
        if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
            raise ValueError(f"{file}: {path!r} has no pairs of point1, point2 and closer_point: fetch it again")
    return annotations


def _is_whole(number: object) -> bool:
    # `bool` is an int, too, and no number of a file's.
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    return float(number).is_integer()


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, dict):
        return False
    for name in ("point1", "point2"):
        point = pair.get(name)
        if not isinstance(point, list) or len(point) != 2 or not all(map(_is_whole, point)):
            return False
    # Any other word would count as point2.
    return pair.get("closer_point") in ("point1", "point2")


def depth_order_correct(inverse_depth: np.ndarray, pairs: Sequence[dict]) -> np.ndarray:
    """(N,) bool: is the closer point's inverse depth the larger one? A tie is wrong: in DA-2K the closer point is
    always point1, so that a tie rule in its favor (the reference's) would give a constant map 100%.

    `inverse_depth`: (H, W) of the image's own size, floats: points are its pixels. ValueError for a point outside.
    """
    height, width = inverse_depth.shape
    # (N, 2 points, row and column); reshaped since no pairs at all would be of one dimension.
    points = np.array([[pair["point1"], pair["point2"]] for pair in pairs], int).reshape(-1, 2, 2)
    if (points < 0).any() or (points >= [height, width]).any():
        raise ValueError(f"a point lies outside the {height} x {width} map: resize the map to the image's own size")
    # (N, 2) values, one a point -> two of (N,).
    first, second = inverse_depth[points[..., 0], points[..., 1]].T
    is_first = np.array([pair["closer_point"] == "point1" for pair in pairs], bool)
    return np.where(is_first, first > second, second > first)


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) pixel counts, rows the truth's classes; pixels whose truth is `VOID` don't count. Add them up over the
    data set for `mean_iou`. A predicted class outside 0..C-1 is a column of its own, the last: (C, C + 1)."""
    known = truth != VOID
    truth = truth[known].astype(int)
    prediction = prediction[known].astype(int)
    # A guess outside of the classes (a teacher that knows more) is still a miss of the truth's class.
    is_class = (prediction >= 0) & (prediction < num_classes)
    column = np.where(is_class, prediction, num_classes)
    columns = num_classes + 1
    # A pair of classes is one number, so that one `bincount` counts all pairs.
    counts = np.bincount(truth * columns + column, minlength=num_classes * columns)
    return counts.reshape(num_classes, columns)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """(C,) IoU of each class by summed confusion matrices; nan for one that occurs neither in truth nor prediction."""
    hits = np.diagonal(confusion)
    # (C,): pixels of the class in the truth, and those of the prediction, less those counted twice.
    union = confusion.sum(1) + confusion[:, : len(confusion)].sum(0) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


def mean_iou(confusion: np.ndarray) -> float:
    """The standard data-set-level mIoU of summed confusion matrices: the mean over classes that occur in truth or
    prediction."""
    return float(np.nanmean(class_iou(confusion)))


def reference_mean_iou(truths: Iterable[np.ndarray], predictions: Iterable[np.ndarray]) -> float:
    """The reference implementation's variant: the mean over images of each image's mean IoU over the classes of its
    truth; void pixels count in the unions of predicted classes. Images without a class are an error there."""
    scores = []
    for truth, prediction in zip(truths, predictions, strict=True):
        ious = []
        # Void is no class to be scored, but its pixels count in the unions where a class is predicted there.
        for label in np.unique(truth):
            if label != VOID:
                is_true = truth == label
                is_predicted = prediction == label
                ious.append((is_true & is_predicted).sum() / (is_true | is_predicted).sum())
        scores.append(np.mean(ious))
    return float(np.mean(scores))


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """FID's distance between two sets of features (N, F): |mean difference|^2 + tr(A + B - 2 (A B)^1/2), A and B the
    covariances. The features (for FID Inception's pool3, 2048 wide) are the caller's: no package ships its weights.

    tr (A B)^1/2 is the sum of A^1/2 B^1/2's singular values; with the sets' own factors no root is needed: for
    N < F, too, it is exact. ValueError for a set of fewer than MIN_FEATURES, which has no covariance."""
    fewest = min(len(features_a), len(features_b))
    if fewest < MIN_FEATURES:
        raise ValueError(f"the distance is between sets of at least {MIN_FEATURES} features each, not {fewest}")
    # (F,). In float64: the distance is a small difference of large traces.
    shift = np.mean(features_a, axis=0, dtype=float) - np.mean(features_b, axis=0, dtype=float)
    a = _covariance_factor(features_a)
    b = _covariance_factor(features_b)
    cross = scipy.linalg.svdvals(a @ b.T).sum()  # pyright: ignore[reportAttributeAccessIssue] (its stub)
    # A sum of a factor's squares is its covariance's trace.
    return float(shift @ shift + (a**2).sum() + (b**2).sum() - 2 * cross)


def _covariance_factor(features: np.ndarray) -> np.ndarray:
    """R with R^T R the covariance of features (N, F); at most F x F."""
    features = np.asarray(features, float)
    # Of centered features X = QR the covariance is X^T X / (N - 1) = R^T R, up to the factor.
    centered = features - features.mean(0)
    # numpy's stubs take mode="r" for the mode with two results.
    factor: Any = np.linalg.qr(centered / np.sqrt(len(features) - 1), mode="r")
    return factor
