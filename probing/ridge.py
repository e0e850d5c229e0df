"""Closed-form probes: how well does each LLM layer's image-token states tell a target encoder's features?

The paper trains a resampler probe per layer (section 4.1, `probing.resampler`); a ridge regression is exact, takes
seconds, and has one number to choose, alpha, the factor of its penalty: on validation images, once for all methods.

Q positions of the target, H LLM width, E target width, R rows (images * Q).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from .probes import Probes, Scores, StateSample
from .states import ImageStates

# Tried on validation images; for `RidgeProbe`, whose inputs have unit variance, they mean the same in each layer.
ALPHAS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class RidgeProbe:
    """Ridge regression with an intercept, from streamed rows; memory H * (H + E) in float64.

    Inputs are standardized to unit variance, so that an alpha means the same for every layer and model (layers
    differ in scale, and a few channels of a large LLM in size by orders): it minimizes
    mean |y - W x - b|^2 + alpha * |W std(x)|^2.
    """

    def __init__(self):
        self.count = 0
        # Of the rows (x, y), (H + E,). Both zeros get their shape when the first rows are added.
        self.mean = torch.zeros(())
        # (H, H + E)
        self.scatter = torch.zeros(())

    def update(self, x_RH: Tensor, y_RE: Tensor):
        """Adds rows: scatter matrices around the mean so far, merged by the parallel variance formula. The statistics
        follow the rows to their device: a fit may go on at another one."""
        width = x_RH.shape[1]
        rows = len(x_RH)
        if self.count > 0:
            self.mean = self.mean.to(x_RH.device)
            self.scatter = self.scatter.to(x_RH.device)
        # In float64: a sum of squares minus the mean's square loses most digits in float32.
        both = torch.cat([x_RH.double(), y_RE.double()], dim=1)
        mean = both.mean(0)
        centered = both - mean
        # The first rows have share 1, and nothing lies between them and what was before.
        delta = mean - self.mean
        share = rows / (self.count + rows)
        between = self.count * share * torch.outer(delta[:width], delta)
        self.scatter = self.scatter + centered[:, :width].T @ centered + between
        self.mean = self.mean + share * delta
        self.count += rows

    def solve(self, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (H, E), center (H,) and bias (E,), float64, of `(x - center) @ weights + bias`; alpha > 0."""
        # (C_xx + alpha I) W = C_xy for x of unit variance, and W back to x as it is.
        width = len(self.scatter)
        covariance = self.scatter / self.count
        std = covariance.diagonal().sqrt()
        # A channel that never varies has no covariance with anything: its weights become 0.
        std = torch.where(std > 1e-9, std, 1)
        system = covariance[:, :width] / torch.outer(std, std)
        system.diagonal().add_(alpha)
        weights = torch.linalg.solve(system, covariance[:, width:] / std[:, None]) / std[:, None]
        return weights, self.mean[:width], self.mean[width:]


class RidgeFit:
    """All layers' and tasks' ridge statistics, in one pass. Tasks of one target length share a layer's inputs, and so
    the largest part of the work.

    The order of images does not matter but for rounding; nothing is drawn at random.
    """

    def __init__(self, tasks: list[dict], num_layers: int, hidden_size: int, about: dict | None = None):
        self.args = (tasks, num_layers, hidden_size, about)
        self.num_layers = num_layers
        # Target length -> its tasks.
        self.groups = defaultdict(list)
        for task in tasks:
            self.groups[task["target_length"]].append(task["name"])
        self.probes = {key: RidgeProbe() for key in product(self.groups, range(num_layers))}
        self.sample = StateSample()
        # Images.
        self.count = 0
        # Task -> their targets' sum (Q, E).
        self.totals: dict[str, Tensor] = {}
        # After any batch.
        self.can_stop = True

    def plan(self, count: int, batch_size: int) -> list[Tensor]:
        """The batches, as indices of `count` images."""
        self.sample.plan(count)
        return list(torch.arange(count).split(batch_size))

    def update(self, states: ImageStates, targets: Mapping[str, Tensor]) -> None:
        self.sample.update(states, self.count)
        self.count += len(states.grids)
        for name, target in targets.items():
            total = target.double().sum(0)
            if name in self.totals:
                total = total + self.totals[name].to(total.device)
            self.totals[name] = total
        for length, names in self.groups.items():
            # (N, Q, sum of E) -> (R, sum of E): a system is solved once for all of these tasks.
            together = torch.cat([targets[name] for name in names], dim=-1).flatten(0, 1)
            for layer in range(self.num_layers):
                inputs = states.positions(layer, length).flatten(0, 1)
                self.probes[length, layer].update(inputs, together)

    def solve(self, alphas: Mapping[str, float]) -> Probes:
        """The probes with an alpha for each task."""
        probes = Probes("ridge", *self.args)
        probes.about["alphas"] = dict(alphas)
        probes.means = {name: (total / self.count).float() for name, total in self.totals.items()}
        probes.familiarity = self.sample.familiarity()
        for (length, layer), ridge in self.probes.items():
            # Tasks with the same alpha share the solution, each having columns of its own in it.
            solved = {}
            start = 0
            for name in self.groups[length]:
                alpha = alphas[name]
                if alpha not in solved:
                    solved[alpha] = ridge.solve(alpha)
                weights, center, bias = solved[alpha]
                stop = start + probes.tasks[name]["target_dim"]
                state = {
                    "center": center.float(),
                    "weight": weights[:, start:stop].float(),
                    "bias": bias[start:stop].float(),
                }
                probes.probe(name, layer).load_state_dict(state)
                start = stop
        return probes.to(next(iter(self.totals.values())).device)

    def state(self) -> dict[str, Tensor]:
        """What an interrupted fit goes on from, exactly."""
        tensors = {f"total.{name}": total for name, total in self.totals.items()}
        for (length, layer), ridge in self.probes.items():
            tensors[f"{length}.{layer}.mean"] = ridge.mean
            tensors[f"{length}.{layer}.scatter"] = ridge.scatter
        tensors.update(self.sample.state())
        tensors["count"] = torch.tensor(self.count)
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.count = int(tensors["count"])
        self.sample.load_state(tensors)
        for name, value in tensors.items():
            match name.split("."):
                case ["sample", _]:
                    pass
                case ["total", task]:
                    self.totals[task] = value
                case [length, layer, part]:
                    ridge = self.probes[int(length), int(layer)]
                    setattr(ridge, part, value)
                    # Rows: an image has as many as its target positions.
                    ridge.count = self.count * int(length)


def choose_alpha(validation: Sequence[dict[float, Scores]], task: str) -> float:
    """The alpha with a task's highest mean centered cosine over all methods given and layers."""

    def total(alpha: float) -> float:
        cosines = 0.0
        for scores in validation:
            cosines += sum(layer["ridge"] for layer in scores[alpha][task].values())
        return cosines

    return max(validation[0], key=total)
