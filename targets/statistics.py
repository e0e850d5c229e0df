"""Mean and deviation of a task's targets, by which they are standardized; and where a run keeps them.

N images, Q positions, E width.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files.escapes import one_line
from ..files.strangers import inside
from ..files.writing import whole_file
from .loading import read_safetensors

# In a run's folder, a file a task.
FOLDER = "target_statistics"


class TargetStatistics(NamedTuple):
    """Mean per position and channel (Q, E) and standard deviation per channel (E,) of the training images' targets.

    Targets centered and scaled by them separate better in the contrastive term (a departure from the paper).
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> "TargetStatistics":
        """From batches (N, Q, E), at least one, read once. The deviations are taken from each position's own mean."""
        count = 0
        total = torch.zeros(())
        squares = torch.zeros(())
        for batch in batches:
            count += len(batch)
            # In float64: a mean of squares minus the mean's square loses most digits in float32.
            total = total + batch.double().sum(0)
            squares = squares + batch.double().square().sum(0)
        mean = total / count
        # (Q, E) -> (E,): variances averaged over positions. Rounding may leave one just below 0.
        std = (squares / count - mean**2).mean(0).clamp(min=0).sqrt()
        # A constant channel stays as it is.
        std = torch.where(std > 1e-6, std, 1)
        return cls(mean=mean.float(), std=std.float())

    def standardize(self, targets_NQE: Tensor) -> Tensor:
        return (targets_NQE - self.mean) / self.std

    def restore(self, targets_NQE: Tensor) -> Tensor:
        """The inverse of `standardize`: what the encoder's `decode` understands."""
        return targets_NQE * self.std + self.mean

    def save(self, path: str | Path) -> None:
        with whole_file(path) as unfinished:
            save_file(self._asdict(), unfinished)

    @classmethod
    def load(cls, path: str | Path) -> "TargetStatistics":
        """ValueError for a file of anything else, such as a model's weights."""
        tensors = read_safetensors(path)
        if set(tensors) != set(cls._fields):
            names = ", ".join(map(one_line, sorted(tensors)[:3]))
            raise ValueError(f"{path} has no statistics of targets, a mean and a std, but {names or 'nothing'}")
        return cls(**tensors)


def statistics_in(folder: str | Path) -> list[Path]:
    """The files of statistics that a folder has."""
    return sorted((Path(folder) / FOLDER).glob("*.safetensors"))


def own_statistics(checkpoint: str | Path) -> list[Path]:
    """Those of a checkpoint's run: in its folder or, of a run's checkpoint-1000, in that one's parent. They may be
    copied and published, so a link to what lies elsewhere is a ValueError."""
    for folder in (Path(checkpoint), Path(checkpoint).parent):
        files = statistics_in(folder)
        if files:
            return [inside(folder, file.relative_to(folder)) for file in files]
    return []
