"""The paper's probes (section 4.1): a single-layer resampler on each LLM layer's state, trained with smooth-L1."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..targets.statistics import TargetStatistics
from .probes import Probes, StateSample
from .states import ImageStates


class ResamplerFit:
    """All layers' and tasks' resamplers, trained in the same passes over the images, which share the states.

    Each probe begins with the same random numbers and has a loss of its own, so a task's results don't depend on which
    other tasks are probed. AdamW without weight decay, 3% warm-up, cosine schedule (the paper gives epochs and batch
    only).

    Args:
        tasks, num_layers, hidden_size, about: as `Probes` takes them.
        images, epochs, step_images: how many images there are, how often each is seen, and how many make a step.
        statistics: of tasks whose targets are to be standardized; the probes restore what they predict.
    """

    def __init__(
        self,
        tasks: list[dict],
        num_layers: int,
        hidden_size: int,
        about: dict | None = None,
        *,
        images: int,
        epochs: int = 2,
        step_images: int = 256,
        learning_rate: float = 1e-3,
        seed: int = 0,
        statistics: dict[str, TargetStatistics] | None = None,
        device: str | torch.device = "cpu",
    ):
        self.images = images
        self.epochs = epochs
        self.seed = seed
        self.learning_rate = learning_rate
        # With fewer images than a step has, an epoch is one step.
        self.step_images = min(step_images, images)
        self.probes = Probes("resampler", tasks, num_layers, hidden_size, about, seed)
        self.probes.statistics = statistics or {}
        self.probes.to(device)
        self.optimizer = torch.optim.AdamW(self.probes.modules.parameters(), lr=learning_rate, weight_decay=0.0)
        # Optimizer steps.
        self.step = 0
        # Images, in all epochs.
        self.seen = 0
        self.sample = StateSample()
        # Task -> sum of the first epoch's targets (Q, E).
        self.totals: dict[str, Tensor] = {}
        # Task -> mean over layers, of the last batch.
        self.losses: dict[str, float] = {}

    def plan(self, count: int, batch_size: int) -> list[Tensor]:
        """The batches of all epochs, as indices of `count` images; another order in each epoch."""
        assert count == self.images
        self.sample.plan(count)
        batches = []
        # Steps first, then batches within them: how many images fit into memory doesn't change the steps.
        for epoch in range(self.epochs):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + epoch))
            for step in order.split(self.step_images):
                batches += step.split(batch_size)
        return batches

    @property
    def can_stop(self) -> bool:
        """Whether no gradients wait for the rest of a step."""
        return self.seen % self.images % self.step_images == 0

    def update(self, states: ImageStates, targets: Mapping[str, Tensor]) -> None:
        """One batch; an optimizer step when a step's images are through. Each probe's graph is freed before the next
        one's is made."""
        # Where the step begins in its epoch, and this batch's share of it: an epoch's last step may be smaller.
        start = self.seen % self.images // self.step_images * self.step_images
        share = len(states.grids) / min(self.step_images, self.images - start)
        # The second epoch's numbers are beyond those that are sampled.
        self.sample.update(states, self.seen)
        for name, target in targets.items():
            # The later epochs bring the same images again.
            if self.seen < self.images:
                self.totals[name] = self.totals.get(name, 0.0) + target.double().sum(0)
            if name in self.probes.statistics:
                target = self.probes.statistics[name].standardize(target)
            total = 0.0
            for layer in range(self.probes.num_layers):
                loss = F.smooth_l1_loss(self.probes.raw(states, name, layer).float(), target)
                # Each batch adds its share: together they are the gradients of the mean over the step's images.
                (share * loss).backward()
                total += loss.item()
            self.losses[name] = total / self.probes.num_layers
        self.seen += len(states.grids)
        if self.can_stop:
            self._optimizer_step()

    def _optimizer_step(self) -> None:
        steps = self.epochs * math.ceil(self.images / self.step_images)
        # A linear warm-up, then half a cosine toward 0. The + 1 below: no step is taken at a rate of 0.
        warm_up = math.ceil(0.03 * steps)
        decay = 0.5 * (1 + math.cos(math.pi * max(0, self.step - warm_up) / max(1, steps - warm_up)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (self.step + 1) / (warm_up + 1)) * decay
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def finish(self) -> Probes:
        """The probes, with the means of what they were trained on."""
        self.probes.means = {name: (total / self.images).float() for name, total in self.totals.items()}
        self.probes.familiarity = self.sample.familiarity()
        return self.probes

    def state(self) -> dict[str, Tensor]:
        """What an interrupted fit goes on from, exactly."""
        tensors = {f"total.{name}": total for name, total in self.totals.items()}
        for name, parameter in self.probes.modules.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            # AdamW's two moments and its step count: "optimizer.exp_avg.<name>".
            for part, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{part}.{name}"] = value
        tensors.update(self.sample.state())
        tensors["step"] = torch.tensor(self.step)
        tensors["seen"] = torch.tensor(self.seen)
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.step = int(tensors["step"])
        self.seen = int(tensors["seen"])
        self.sample.load_state(tensors)
        parameters = dict(self.probes.modules.named_parameters())
        device = next(iter(parameters.values())).device
        for key, value in tensors.items():
            # A parameter's name has dots of its own: only the first parts of a key are ours.
            kind, _, name = key.partition(".")
            if kind == "total":
                self.totals[name] = value.to(device)
            elif kind == "weight":
                parameters[name].copy_(value)
            elif kind == "optimizer":
                part, _, name = name.partition(".")
                # AdamW keeps its step count on the CPU.
                home = "cpu" if part == "step" else device
                self.optimizer.state[parameters[name]][part] = value.to(home)
