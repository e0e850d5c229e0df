"""Closed-form probes: how well does each LLM layer's image-token states tell a target encoder's features?

The paper trains a resampler probe per layer (section 4.1); a ridge regression is exact, takes seconds, and has one
strength, to be chosen on validation images once and used for all methods alike.

N images, V image tokens an image, Q positions of the target, H LLM width, E target width, R rows (N * Q).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..targets.encoders import open_image

Scores = dict[str, dict[str, dict[str, float]]]  # task -> layer -> {"ridge", "ridge_plain"}


class RidgeProbe:
    """Ridge regression with an intercept, from streamed rows; memory H * (H + E) in float64.

    Inputs are standardised to unit variance, so that a strength means the same for every layer and model (layers
    differ in scale, and a few channels of a large LLM in size by orders): it minimises
    mean |y - W x - b|^2 + strength * |W std(x)|^2. Try 1e-5 to 1.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0  # of the rows (x, y): (H + E,), and (H, H + E)
        self._solved: dict[float, tuple[Tensor, Tensor]] = {}

    def update(self, x_RH: Tensor, y_RE: Tensor):
        """Adds rows: scatter matrices around the mean so far, merged by the parallel variance formula."""
        width, rows = x_RH.shape[1], len(x_RH)
        both = torch.cat([x_RH.double(), y_RE.double()], dim=1)
        mean = both.mean(0)
        both, delta, share = both - mean, mean - self.mean, rows / (self.count + rows)
        between = self.count * share * torch.outer(delta[:width], delta)
        self.scatter = self.scatter + both[:, :width].T @ both + between
        self.mean = self.mean + share * delta
        self.count += rows
        self._solved.clear()

    def solve(self, strength: float) -> tuple[Tensor, Tensor]:
        """Weights (H, E) and intercept (E,), float64, for a positive strength."""
        if strength not in self._solved:
            width, covariance = len(self.scatter), self.scatter / self.count
            std = covariance.diagonal().sqrt()
            std = torch.where(std > 1e-9, std, 1)
            system = covariance[:, :width] / torch.outer(std, std)
            system.diagonal().add_(strength)
            weights = torch.linalg.solve(system, covariance[:, width:] / std[:, None]) / std[:, None]
            self._solved[strength] = (weights, self.mean[width:] - self.mean[:width] @ weights)
        return self._solved[strength]

    def predict(self, x_RH: Tensor, strength: float) -> Tensor:
        """(R, E), fp32."""
        weights, intercept = self.solve(strength)
        return (x_RH.double() @ weights + intercept).float()


def flat_cosine(prediction_NQE: Tensor, target_NQE: Tensor) -> Tensor:
    """The paper's score: cosine similarity of each image's flattened embeddings, (N,)."""
    return F.cosine_similarity(prediction_NQE.flatten(1), target_NQE.flatten(1), dim=-1)


def centred_cosine(prediction_NQE: Tensor, target_NQE: Tensor, mean_QE: Tensor) -> Tensor:
    """Cosine similarity at each position after the training images' mean there is taken off, averaged: (N,).

    Plain cosines are high for any prediction near the mean (.93 for the mean itself); this one is 0 on average."""
    return F.cosine_similarity(prediction_NQE - mean_QE, target_NQE - mean_QE, dim=-1).mean(-1)


def to_positions(states_NVH: Tensor, length: int) -> Tensor:
    """Image-token states as inputs for `length` target positions, (N, Q, H): token to token if the grids agree; else
    the grids, both square, are pooled or interpolated; their mean for one embedding an image."""
    tokens = states_NVH.shape[1]
    if tokens == length:
        return states_NVH
    if length == 1:
        return states_NVH.mean(1, keepdim=True)
    side, target_side = round(tokens**0.5), round(length**0.5)
    grid = states_NVH.transpose(1, 2).unflatten(2, (side, side))
    mode = "area" if side > target_side else "bilinear"
    return F.interpolate(grid, size=target_side, mode=mode).flatten(2).transpose(1, 2)


class ModelProbe:
    """A probe per layer and task on a frozen LLaVA-like model, memory bounded by a batch and the probes.

    Args:
        model, processor: OLA-VLM or any LLaVA of transformers with its processor.
        targets: for each task, a function from a list of images to their targets (N, Q, E), such as a TargetCache.
        prompt: the user's words after the image. Image tokens don't see what follows them.
        grid_tokens: how many of an image's tokens are probed, the first ones; all by default. The baseline
            `fusion="token"` has others behind its grid.
    """

    def __init__(
        self,
        model,
        processor,
        targets: Mapping[str, Callable],
        batch_size=32,
        prompt="Describe the image.",
        grid_tokens: int | None = None,
    ):
        self.model, self.processor, self.targets, self.batch_size = model.eval(), processor, targets, batch_size
        self.grid_tokens = grid_tokens
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        self.text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        bos = processor.tokenizer.bos_token  # some chat templates write it, others leave it to the tokenizer
        self.add_special_tokens = not (bos and self.text.startswith(bos))
        self.probes: dict[tuple[str, int], RidgeProbe] = {}  # (task, layer)
        self.means: dict[str, Tensor] = {}  # task -> training images' mean target (Q, E)

    @torch.no_grad()
    def states(self, images: Sequence) -> list[Tensor]:
        """The image tokens' states (N, V, H) at every layer: 0 (the embeddings) to the last."""
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": self.add_special_tokens}
        inputs = self.processor(text=[self.text] * len(images), images=list(map(open_image, images)), **options)
        inputs = inputs.to(self.model.device, self.model.dtype)
        hidden = self.model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states
        is_image_BT = inputs["input_ids"] == self.model.config.image_token_id
        of_images = [states[is_image_BT].unflatten(0, (len(images), -1)) for states in hidden]
        return [states[:, : self.grid_tokens].float() for states in of_images]

    def _batches(self, images: Sequence, indices: Iterable[int]) -> Iterator[tuple[list[Tensor], dict[str, Tensor]]]:
        for rows in torch.tensor(list(indices)).split(self.batch_size):
            batch, device = [images[i] for i in rows.tolist()], self.model.device
            yield self.states(batch), {task: source(batch).to(device) for task, source in self.targets.items()}

    def fit(self, images: Sequence, indices: Iterable[int]) -> "ModelProbe":
        """Fits all probes in one pass over `images[i]` for i in `indices`."""
        count, totals = 0, defaultdict(float)
        self.probes = {}
        for states, targets in self._batches(images, indices):
            count += len(states[0])
            for task, target in targets.items():
                totals[task] += target.double().sum(0)
                for layer, state in enumerate(states):
                    inputs = to_positions(state, target.shape[1]).flatten(0, 1)
                    self.probes.setdefault((task, layer), RidgeProbe()).update(inputs, target.flatten(0, 1))
        self.means = {task: (total / count).float() for task, total in totals.items()}
        return self

    def predict(self, states: list[Tensor], strength: float) -> Iterator[tuple[str, int, Tensor]]:
        """Task, layer and embeddings (N, Q, E), to be decoded like a predictor's, for each probe; of `states()`."""
        for (task, layer), probe in self.probes.items():
            inputs = to_positions(states[layer], len(self.means[task]))
            yield task, layer, probe.predict(inputs.flatten(0, 1), strength).unflatten(0, inputs.shape[:2])

    def score(self, images: Sequence, indices: Iterable[int], strengths: Sequence[float]) -> dict[float, Scores]:
        """For each strength {task: {layer: {"ridge": centred cosine, "ridge_plain": the paper's}}}, image means."""
        count, totals = 0, defaultdict(float)
        for states, targets in self._batches(images, indices):
            count += len(states[0])
            for strength in strengths:
                for task, layer, prediction in self.predict(states, strength):
                    centred = centred_cosine(prediction, targets[task], self.means[task])
                    both = torch.stack([centred, flat_cosine(prediction, targets[task])])
                    totals[strength, task, layer] += both.double().sum(1)
        scores = {strength: {task: {} for task in self.means} for strength in strengths}
        for (strength, task, layer), total in totals.items():
            ridge, plain = (total / count).tolist()
            scores[strength][task][str(layer)] = {"ridge": ridge, "ridge_plain": plain}
        return scores


def choose_strength(validation: Sequence[dict[float, Scores]], task: str) -> float:
    """The strength with a task's highest mean centred cosine over all methods given and layers."""

    def total(strength):
        return sum(layer["ridge"] for scores in validation for layer in scores[strength][task].values())

    return max(validation[0], key=total)
