"""The embedding loss between a predictor's output and its teacher's features (paper, section 3.3; Objective).

N images of this micro-batch, M images of the whole optimiser step, Q queries, E target width.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

MAX_LOGIT_SCALE = 100.0


class EmbeddingLoss(NamedTuple):
    """Scalars in fp32; `total` = smooth_l1 + contrastive_weight * contrastive."""

    smooth_l1: torch.Tensor
    contrastive: torch.Tensor
    total: torch.Tensor


class _Similarity(torch.autograd.Function):
    """`rows_NF` @ `columns_MF`.T and the columns' norms, in fp32.

    For the backward pass the columns are kept in the type that they come in, one tensor for all layers of a task: an
    fp32 copy for each layer would be 0.9 GB at the paper's sizes."""

    @staticmethod
    def forward(ctx, rows_NF: torch.Tensor, columns_MF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(columns_MF)
        columns = columns_MF.float()
        norms_M = columns.norm(dim=1)
        ctx.mark_non_differentiable(norms_M)
        return rows_NF @ columns.T, norms_M

    @staticmethod
    def backward(ctx, gradient_NM: torch.Tensor, _) -> tuple[torch.Tensor, None]:
        (columns_MF,) = ctx.saved_tensors
        return gradient_NM @ columns_MF.float(), None


def embedding_loss(
    prediction_NQE: torch.Tensor,
    target_NQE: torch.Tensor,
    logit_scale: torch.Tensor,
    contrastive_weight: float = 0.3,
    targets_MQE: torch.Tensor | None = None,
    offset: int = 0,
    num_images: int | None = None,
) -> EmbeddingLoss:
    """Smooth-L1 (beta 1) plus InfoNCE of one predictor, in fp32 whatever the inputs' dtype.

    Rows are images; samples without an image have no row, so they are neither anchors nor negatives. With N = 0 every
    part is exactly 0 and still connected to the graph, so that all ranks run the same backward pass.

    Args:
        prediction_NQE: this micro-batch's predictions.
        target_NQE: their targets, of the same shape (`OlaVlmCollator` sees to it).
        logit_scale: learnable scalar s; similarities are multiplied by min(exp(s), 100).
        contrastive_weight: weight of the contrastive part in `total`.
        targets_MQE: the contrastive columns in any floating-point type, all targets of the optimiser step (all ranks
            and micro-batches); targets are constants, so gathering them is exact, unlike gathering predictions.
            Default: `target_NQE`.
        offset: the column of this micro-batch's first target.
        num_images: divisor of both sums, the step's image count; the losses of its micro-batches then add up to the
            loss of one big batch. Default: N.
    """
    divisor = max(len(prediction_NQE) if num_images is None else num_images, 1)
    prediction = prediction_NQE.float().flatten(1)
    target = target_NQE.float().flatten(1)
    columns_MF = (target_NQE if targets_MQE is None else targets_MQE).flatten(1)

    smooth_l1 = F.smooth_l1_loss(prediction, target, reduction="none").mean(dim=1).sum() / divisor

    scale = logit_scale.float().exp().clamp(max=MAX_LOGIT_SCALE)
    # Dividing the logits by the columns' norms spares a normalised copy of all targets.
    similarity_NM, norms_M = _Similarity.apply(F.normalize(prediction, dim=1), columns_MF)
    cosine_NM = similarity_NM / norms_M.clamp(min=1e-12)
    labels = offset + torch.arange(len(prediction), device=prediction.device)
    contrastive = F.cross_entropy(scale * cosine_NM, labels, reduction="sum") / divisor
    return EmbeddingLoss(smooth_l1, contrastive, smooth_l1 + contrastive_weight * contrastive)
