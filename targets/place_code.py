"""A place code: where a position of a target's grid is, said beside the teacher's features."""

import math

import torch
from torch import Tensor


def place_code(length: int, width: int) -> Tensor:
    """(length, width) for a square grid, row by row: of `width` / 4 frequencies sine and cosine of the row, then of
    the column. Rows and columns go from 0 to 1, the k-th frequency is half a turn times 2 to the k."""
    side = math.isqrt(length)
    # (S,): the middle of each row, or column, between 0 and 1.
    centers_S = (torch.arange(side) + 0.5) / side
    angles_SK = centers_S[:, None] * math.pi * 2.0 ** torch.arange(width // 4)
    # (S, 2K): the sines, then the cosines.
    code_SC = torch.cat([angles_SK.sin(), angles_SK.cos()], dim=1)
    # The row's code is the same along the row, the column's along the column: (S, S, 2K) each.
    rows = code_SC[:, None].expand(side, side, -1)
    columns = code_SC[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def append_place_code(features_NQE: Tensor, width: int) -> Tensor:
    """(N, Q, E + width)."""
    code_QC = place_code(features_NQE.shape[1], width).to(features_NQE)
    return torch.cat([features_NQE, code_QC.expand(len(features_NQE), -1, -1)], dim=2)
