"""The embedding loss between a predictor's output and its target (paper, section 3.3; Objective).

N images of this micro-batch, M images of the whole optimizer step, Q queries, E target width.

Each loss is a sum over images, divided by the step's image count, and takes of other images no more than their
targets, which are known before the step: so micro-batches and ranks add up to one big batch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

# CLIP's bound of the contrastive temperature.
MAX_LOGIT_SCALE = 100.0
# Of the targets' mean square: the least variance that a squared error is divided by. A single image may have none.
LEAST_VARIANCE = 0.01
# Of the variance, beside which it doesn't count: the root of 0 has no gradient.
EPSILON = 1e-6
# float32 copies of so many targets are made at a time.
IMAGES_AT_ONCE = 16


class EmbeddingLoss(NamedTuple):
    """Scalars in fp32; `distance`: the task's `loss`; `total` = distance + contrastive_weight * contrastive."""

    distance: torch.Tensor
    contrastive: torch.Tensor
    total: torch.Tensor


class Moments(NamedTuple):
    """Of the targets of a step, by channel (E,): their mean over images and positions, and the deviation of an image's
    positions from that image's mean; `variance`: a scalar, of all positions around `mean`, mean over channels."""

    mean: torch.Tensor
    deviation: torch.Tensor
    variance: torch.Tensor

    @classmethod
    def of(cls, batches: Iterable[torch.Tensor]) -> "Moments":
        """From batches (n, Q, E), read once; at least one, which may be empty."""
        # Sums first: a batch may be empty, and the last one short.
        count = 0
        total = squares = squared_means = torch.zeros(())
        for batch in batches:
            count += batch.shape[0]
            targets = batch.float()
            total = total + targets.mean(1).sum(0)
            squares = squares + targets.square().mean(1).sum(0)
            squared_means = squared_means + targets.mean(1).square().sum(0)
        # Each (E,): means over images and positions.
        mean = total / max(count, 1)
        squares = squares / max(count, 1)
        # Variance = mean of squares - square of means; rounding may leave a little less than 0.
        within = (squares - squared_means / max(count, 1)).clamp(min=0)
        variance = (squares - mean.square()).mean().clamp(min=LEAST_VARIANCE * squares.mean())
        # Targets that are all 0 (motion between equal frames) have no scale: their squared error counts as it is.
        variance = torch.where(variance > 0, variance, torch.ones_like(variance))
        return cls(mean, within.sqrt(), variance)


def combine_words(numbers_NQW: torch.Tensor, tables: Sequence[torch.Tensor], combine: str) -> torch.Tensor:
    """The targets (N, Q, H) of positions that have a word of each of W kinds, or -1 for none of this kind.

    They are the "sum" or "mean" of the rows of the kinds' `tables`. IndexError if a table has no such row."""
    numbers_NQW = numbers_NQW.long()
    is_word_NQW = numbers_NQW >= 0
    target_NQH = torch.zeros(())
    for kind, table in enumerate(tables):
        # -1, no word, would be the table's last row: it takes the first one, and counts as nothing.
        rows_NQH = table[numbers_NQW[..., kind].clamp(min=0)]
        target_NQH = target_NQH + rows_NQH * is_word_NQW[..., kind, None]
    if combine == "mean":
        # A position without any word stays 0.
        target_NQH = target_NQH / is_word_NQW.sum(dim=-1, keepdim=True).clamp(min=1)
    return target_NQH


class StepTargets(NamedTuple):
    """What a task's predictions of a micro-batch are compared with: its targets (N, Q, E); for the contrastive term
    the columns (M, Q, E), None without it, of which the micro-batch's begin at `offset`; what the step's targets
    have in common, for losses that need it; the step's image count."""

    target_NQE: torch.Tensor
    columns_MQE: torch.Tensor | None
    moments: Moments | None
    offset: int
    num_images: int

    @classmethod
    def make(
        cls,
        task: dict,
        given: torch.Tensor,
        columns: torch.Tensor,
        offset: int,
        num_images: int,
        tables: Sequence[torch.Tensor] = (),
    ) -> "StepTargets":
        """From what a task's source gives for the micro-batch, and for all images of the step: features, or numbers of
        words, whose embeddings are in `tables`."""

        def embed(part: torch.Tensor) -> torch.Tensor:
            if task["target"] == "words":
                return combine_words(part, tables, task["combine"])
            return part

        # Of the whole step, so that a loss doesn't depend on how its images are divided into micro-batches.
        moments = None
        if task["loss"] in ("mse", "moments"):
            moments = Moments.of(embed(part) for part in columns.split(IMAGES_AT_ONCE))
        # Of features it is logged whatever its weight; made of words, the columns would be a table as wide as the LLM.
        is_contrasted = task["contrastive_weight"] > 0 or task["target"] == "features"
        if task["loss"] == "moments" or not is_contrasted:
            return cls(embed(given), None, moments, offset, num_images)
        return cls(embed(given), embed(columns), moments, offset, num_images)


class _Similarity(torch.autograd.Function):
    """`rows_NF` @ `columns_MF`.T and the columns' norms, in fp32.

    For the backward pass the columns are kept in the type that they come in, one tensor for all layers of a task: an
    fp32 copy for each layer would be 0.9 GB at the paper's sizes."""

    @staticmethod
    def forward(ctx, rows_NF: torch.Tensor, columns_MF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # F = Q * E.
        ctx.save_for_backward(columns_MF)
        columns = columns_MF.float()
        norms_M = columns.norm(dim=1)
        ctx.mark_non_differentiable(norms_M)
        return rows_NF @ columns.T, norms_M

    @staticmethod
    def backward(ctx, gradient_NM: torch.Tensor, _) -> tuple[torch.Tensor, None]:
        (columns_MF,) = ctx.saved_tensors
        # Targets are constants: no gradient for the columns.
        return gradient_NM @ columns_MF.float(), None


def _smooth_l1(prediction_NQE: torch.Tensor, target_NQE: torch.Tensor, moments: Moments | None) -> torch.Tensor:
    """(N,): with beta 1, mean over positions and channels."""
    losses_NF = F.smooth_l1_loss(prediction_NQE.flatten(1), target_NQE.flatten(1), reduction="none")
    return losses_NF.mean(dim=1)


def _cosine(prediction_NQE: torch.Tensor, target_NQE: torch.Tensor, moments: Moments | None) -> torch.Tensor:
    """(N,): 1 - cosine of each position, their mean."""
    return 1 - F.cosine_similarity(prediction_NQE, target_NQE, dim=2).mean(dim=1)


def _mse(prediction_NQE: torch.Tensor, target_NQE: torch.Tensor, moments: Moments) -> torch.Tensor:
    """(N,): the squared error over the targets' variance. Whoever predicts their mean has 1."""
    return (prediction_NQE - target_NQE).square().flatten(1).mean(dim=1) / moments.variance


def _moments(prediction_NQE: torch.Tensor, target_NQE: torch.Tensor, moments: Moments) -> torch.Tensor:
    """(N,): how far an image's mean over positions, and the deviation from it, are from those of the step's targets:
    squared errors of both, over the targets' variance. What the image shows doesn't count."""
    mean_NE = prediction_NQE.mean(dim=1)
    variance_NE = (prediction_NQE - mean_NE[:, None]).square().mean(dim=1)
    deviation_NE = (variance_NE + EPSILON * moments.variance).sqrt()
    # Both moments count alike.
    errors_NE = (mean_NE - moments.mean).square() + (deviation_NE - moments.deviation).square()
    return errors_NE.mean(dim=1) / moments.variance


DISTANCES: dict[str, Callable] = {"smooth_l1": _smooth_l1, "cosine": _cosine, "mse": _mse, "moments": _moments}


def embedding_loss(
    prediction_NQE: torch.Tensor,
    target_NQE: torch.Tensor,
    logit_scale: torch.Tensor,
    contrastive_weight: float = 0.3,
    targets_MQE: torch.Tensor | None = None,
    offset: int = 0,
    num_images: int | None = None,
) -> EmbeddingLoss:
    """The paper's: smooth-L1 (beta 1) plus InfoNCE of one predictor, in fp32 whatever the inputs' dtype.

    Rows are images; samples without an image have no row, so they are neither anchors nor negatives. With N = 0 every
    part is exactly 0 and still connected to the graph, so that all ranks run the same backward pass.

    Args:
        prediction_NQE: this micro-batch's predictions.
        target_NQE: their targets, of the same shape (`OlaVlmCollator` sees to it).
        logit_scale: learnable scalar s; similarities are multiplied by min(exp(s), 100).
        contrastive_weight: weight of the contrastive part in `total`.
        targets_MQE: the contrastive columns in any floating-point type, all targets of the optimizer step (all ranks
            and micro-batches); targets are constants, so gathering them is exact, unlike gathering predictions.
            Default: `target_NQE`.
        offset: the column of this micro-batch's first target.
        num_images: divisor of both sums, the step's image count; the losses of its micro-batches then add up to the
            loss of one big batch. Default: N.
    """
    columns_MQE = targets_MQE
    if columns_MQE is None:
        columns_MQE = target_NQE
    if num_images is None:
        num_images = len(prediction_NQE)
    targets = StepTargets(target_NQE, columns_MQE, None, offset, num_images)
    return task_loss(prediction_NQE, targets, logit_scale, "smooth_l1", contrastive_weight)


def task_loss(
    prediction_NQE: torch.Tensor,
    targets: StepTargets,
    logit_scale: torch.Tensor,
    loss: str,
    contrastive_weight: float,
) -> EmbeddingLoss:
    """`embedding_loss` with any of `DISTANCES` in place of smooth-L1."""
    # Without an image the sums are 0, and so are the losses.
    divisor = max(targets.num_images, 1)
    prediction = prediction_NQE.float()
    target = targets.target_NQE.float()
    distance = DISTANCES[loss](prediction, target, targets.moments).sum() / divisor
    if targets.columns_MQE is None:
        # Connected to the graph: every rank has gradients for the same parameters.
        contrastive = 0.0 * logit_scale.float()
    else:
        contrastive = _contrastive(prediction, targets.columns_MQE, logit_scale, targets.offset) / divisor
    return EmbeddingLoss(distance, contrastive, distance + contrastive_weight * contrastive)


def _contrastive(
    prediction_NQE: torch.Tensor, columns_MQE: torch.Tensor, logit_scale: torch.Tensor, offset: int
) -> torch.Tensor:
    """InfoNCE, the sum over images."""
    scale = logit_scale.float().exp().clamp(max=MAX_LOGIT_SCALE)
    # Dividing the logits by the columns' norms spares a normalized copy of all targets.
    rows_NF = F.normalize(prediction_NQE.flatten(1), dim=1)
    # (N, F) x (M, F) -> (N, M), and (M,).
    similarity_NM, norms_M = _Similarity.apply(rows_NF, columns_MQE.flatten(1))
    cosine_NM = similarity_NM / norms_M.clamp(min=1e-12)
    # Row n's own target is column offset + n; every other column is a negative.
    labels = offset + torch.arange(len(rows_NF), device=rows_NF.device)
    return F.cross_entropy(scale * cosine_NM, labels, reduction="sum")
