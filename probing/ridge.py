"""Closed-form probes: how well does each LLM layer's image-token states tell a target encoder's features?

The paper trains a resampler probe per layer (section 4.1); a ridge regression is exact, takes seconds, and has one
strength, to be chosen on validation images once and used for all methods alike.

N images, V image tokens an image, Q positions of the target, H LLM width, E target width, R rows (N * Q).
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

Targets = Mapping[str, Tensor | Callable[[list], Tensor]]
Scores = dict[str, dict[str, dict[str, float]]]  # task -> layer -> {"ridge", "ridge_plain"}


class RidgeProbe:
    """Ridge regression with an intercept, from streamed rows; memory H * (H + E) in float64.

    Inputs are standardised to unit variance, so that a strength means the same for every layer and model (layers
    differ in scale, and a few channels of a large LLM in size by orders): it minimises
    mean |y - W x - b|^2 + strength * |W std(x)|^2. Try 1e-5 to 1.
    """

    def __init__(self):
        self.count = 0
        self.mean_x = self.mean_y = self.xx = self.xy = 0.0
        self._solved: dict[float, tuple[Tensor, Tensor]] = {}

    def update(self, x_RH: Tensor, y_RE: Tensor):
        """Adds rows: scatter matrices around the mean so far, merged by the parallel variance formula."""
        x, y, rows = x_RH.double(), y_RE.double(), len(x_RH)
        if len(y) != rows:
            raise ValueError(f"{rows} inputs for {len(y)} targets: they must correspond row by row")
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        delta_x, delta_y = mean_x - self.mean_x, mean_y - self.mean_y
        weight, share = self.count * rows / (self.count + rows), rows / (self.count + rows)
        self.xx = self.xx + x.T @ x + weight * torch.outer(delta_x, delta_x)
        self.xy = self.xy + x.T @ y + weight * torch.outer(delta_x, delta_y)
        self.mean_x, self.mean_y = self.mean_x + share * delta_x, self.mean_y + share * delta_y
        self.count += rows
        self._solved.clear()

    def solve(self, strength: float) -> tuple[Tensor, Tensor]:
        """Weights (H, E) and intercept (E,), float64."""
        if strength <= 0:
            raise ValueError(f"strength is {strength}: it must be positive (states may be linearly dependent)")
        if self.count == 0:
            raise ValueError("no rows to fit: call update() first")
        if strength not in self._solved:
            std = (self.xx.diagonal() / self.count).sqrt()
            std = torch.where(std > 1e-9, std, 1)
            system = self.xx / self.count / torch.outer(std, std)
            system.diagonal().add_(strength)
            weights = torch.linalg.solve(system, self.xy / self.count / std[:, None]) / std[:, None]
            self._solved[strength] = (weights, self.mean_y - self.mean_x @ weights)
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
    the grid is pooled or interpolated; their mean for one embedding an image."""
    tokens = states_NVH.shape[1]
    if tokens == length:
        return states_NVH
    if length == 1:
        return states_NVH.mean(1, keepdim=True)
    side, target_side = round(tokens**0.5), round(length**0.5)
    if side**2 != tokens or target_side**2 != length:
        raise ValueError(f"{tokens} image tokens, {length} positions: token-to-token probes need square grids of both")
    grid = states_NVH.transpose(1, 2).unflatten(2, (side, side))
    if side > target_side:
        grid = F.adaptive_avg_pool2d(grid, target_side)
    else:
        grid = F.interpolate(grid, size=(target_side, target_side), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2)


class ModelProbe:
    """A probe per layer and task on a frozen LLaVA-like model, memory bounded by a batch and the probes.

    Args:
        model, processor: OLA-VLM or any LLaVA of transformers with its processor.
        targets: for each task, the targets of all images (all, Q, E), or a function of a list of images such as a
            TargetCache. Tasks of the same Q share one probe a layer (ridge solves each target channel by itself).
        prompt: the user's words after the image. Image tokens don't see what follows them.
    """

    def __init__(self, model, processor, targets: Targets, batch_size: int = 32, prompt: str = "Describe the image."):
        self.model, self.processor, self.targets, self.batch_size = model.eval(), processor, targets, batch_size
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        self.text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        bos = processor.tokenizer.bos_token  # some chat templates write it, others leave it to the tokenizer
        self.add_special_tokens = not (bos and self.text.startswith(bos))
        self.probes: dict[tuple[int, int], RidgeProbe] = {}  # (Q, layer)
        self.means: dict[str, Tensor] = {}  # task -> training images' mean target (Q, E)
        self.groups: dict[int, list[str]] = {}  # Q -> its tasks

    @torch.no_grad()
    def states(self, images: Sequence) -> list[Tensor]:
        """The image tokens' states (N, V, H) at every layer: 0 (the embeddings) to the last."""
        inputs = self.processor(
            text=[self.text] * len(images),
            images=list(images),
            padding=True,
            return_tensors="pt",
            add_special_tokens=self.add_special_tokens,
        ).to(self.model.device, self.model.dtype)
        hidden = self.model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states
        is_image_BT = inputs["input_ids"] == self.model.config.image_token_id
        return [states[is_image_BT].unflatten(0, (len(images), -1)).float() for states in hidden]

    def _batches(self, images: Sequence, indices: Iterable[int]) -> Iterator[tuple[list[Tensor], dict[str, Tensor]]]:
        indices = iter(indices)
        while rows := list(itertools.islice(indices, self.batch_size)):
            batch = [images[i] for i in rows]
            targets = {
                task: source(batch) if callable(source) else source[rows] for task, source in self.targets.items()
            }
            yield self.states(batch), {task: target.to(self.model.device).float() for task, target in targets.items()}

    def fit(self, images: Sequence, indices: Iterable[int]) -> "ModelProbe":
        """Fits all probes in one pass over `images[i]` for i in `indices`."""
        count, totals = 0, dict.fromkeys(self.targets, 0)
        self.probes, self.groups = {}, {}
        for states, targets in self._batches(images, indices):
            if count == 0:
                for task, target in targets.items():
                    self.groups.setdefault(target.shape[1], []).append(task)
            for length, tasks in self.groups.items():
                y = torch.cat([targets[task] for task in tasks], dim=-1).flatten(0, 1)
                for layer, state in enumerate(states):
                    probe = self.probes.setdefault((length, layer), RidgeProbe())
                    probe.update(to_positions(state, length).flatten(0, 1), y)
            count += len(states[0])
            totals = {task: totals[task] + target.double().sum(0) for task, target in targets.items()}
        self.means = {task: (total / count).float() for task, total in totals.items()}
        return self

    def _predict(self, states: list[Tensor], strength: float) -> Iterator[tuple[str, int, Tensor]]:
        for length, tasks in self.groups.items():
            widths = [self.means[task].shape[-1] for task in tasks]
            for layer, state in enumerate(states):
                x = to_positions(state, length)
                y = self.probes[length, layer].predict(x.flatten(0, 1), strength).unflatten(0, x.shape[:2])
                for task, prediction in zip(tasks, y.split(widths, -1), strict=True):
                    yield task, layer, prediction

    def predict(self, images: Sequence, strength: float) -> dict[str, dict[int, Tensor]]:
        """Probed embeddings, predictions[task][layer] (N, Q, E), to be decoded like a predictor's."""
        predictions: dict[str, dict[int, Tensor]] = {task: {} for task in self.means}
        for start in range(0, len(images), self.batch_size):
            for task, layer, value in self._predict(self.states(images[start : start + self.batch_size]), strength):
                predictions[task].setdefault(layer, []).append(value.cpu())
        return {task: {layer: torch.cat(parts) for layer, parts in of.items()} for task, of in predictions.items()}

    def score(self, images: Sequence, indices: Iterable[int], strengths: Sequence[float]) -> dict[float, Scores]:
        """For each strength {task: {layer: {"ridge": centred cosine, "ridge_plain": the paper's}}}, image means."""
        totals: dict[tuple, Tensor] = {}
        count = 0
        for states, targets in self._batches(images, indices):
            count += len(states[0])
            for strength in strengths:
                for task, layer, prediction in self._predict(states, strength):
                    centred = centred_cosine(prediction, targets[task], self.means[task]).double().sum()
                    plain = flat_cosine(prediction, targets[task]).double().sum()
                    key = (strength, task, str(layer))
                    totals[key] = totals.get(key, 0) + torch.stack([centred, plain])
        scores: dict[float, Scores] = {}
        for (strength, task, layer), total in totals.items():
            ridge, plain = (total / count).tolist()
            scores.setdefault(strength, {}).setdefault(task, {})[layer] = {"ridge": ridge, "ridge_plain": plain}
        return scores


def choose_strength(validation: Iterable[dict[float, Scores]], task: str | None = None) -> float:
    """The strength with the highest mean centred cosine over all methods given and layers, of one task or of all."""
    totals: dict[float, list[float]] = {}
    for method in validation:
        for strength, scores in method.items():
            chosen = scores.values() if task is None else [scores[task]]
            totals.setdefault(strength, []).extend(layer["ridge"] for layers in chosen for layer in layers.values())
    return max(totals, key=lambda strength: sum(totals[strength]) / len(totals[strength]))


def probe_model(
    model,
    processor,
    images: Sequence,
    targets: Targets,
    splits: Mapping[str, Sequence[int]],
    strengths: Sequence[float],
    batch_size: int = 32,
    prompt: str = "Describe the image.",
) -> Scores:
    """Probes on the states of every layer, fitted on `splits["train"]`, scored on `splits["test"]`.

    Pass the one strength that was chosen for all methods; of several, the best on `splits["validation"]` is taken.
    Splits are indices into `images`. Returns {task: {"<layer>": {"ridge": f, "ridge_plain": f}}}, layers from 0.
    """
    probe = ModelProbe(model, processor, targets, batch_size, prompt).fit(images, splits["train"])
    strength = strengths[0]
    if len(strengths) > 1:
        strength = choose_strength([probe.score(images, splits["validation"], strengths)])
        logger.info("ridge strength %g of %s, chosen on validation", strength, list(strengths))
    return probe.score(images, splits["test"], [strength])[strength]
