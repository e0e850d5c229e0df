"""Fitted probes, one for each task and layer: what they predict, how well, and their files.

N images, Q positions of the target, H LLM width, E target width.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..configuration_ola_vlm import normalize_task
from ..files.strangers import read_object
from ..files.writing import whole_file, write_json
from ..modeling_ola_vlm import EmbeddingPredictor
from ..targets.loading import one_line, read_safetensors
from ..targets.statistics import TargetStatistics
from .states import ImageStates, StateReader

# The paper's probe, as its predictor without task tokens; depth's has no further MLP either. "layers" is only there
# to pass the configuration's checks: every layer gets a probe.
RESAMPLER = {"layers": [1], "num_task_tokens": 0, "predictor_dim": None, "predictor_depth": 1, "output_mlp": False}
# Images whose mean states tell which others are like them.
SAMPLE = 1000
# Task -> layer -> {kind: centered cosine, kind_plain: the paper's}.
Scores = dict[str, dict[str, dict[str, float]]]


def flat_cosine(prediction_NQE: Tensor, target_NQE: Tensor) -> Tensor:
    """The paper's score: cosine similarity of each image's flattened embeddings, (N,)."""
    return F.cosine_similarity(prediction_NQE.flatten(1), target_NQE.flatten(1), dim=-1)


def centered_cosine(prediction_NQE: Tensor, target_NQE: Tensor, mean_QE: Tensor) -> Tensor:
    """Cosine similarity at each position after the training images' mean there is taken off, averaged: (N,).

    Plain cosines are high for any prediction near the mean (.93 for the mean itself); this one is 0 on average."""
    return F.cosine_similarity(prediction_NQE - mean_QE, target_NQE - mean_QE, dim=-1).mean(-1)


class Familiarity(NamedTuple):
    """How the images that probes were fitted on look to the model: by each image's mean state at layer 0, where the
    LLM gets it. Mean and standard deviation over the images (H,), and the `limit` (): 99 in 100 of them are nearer to
    the mean than that.

    What probes read from an image that lies farther out is not to be trusted: none was there to fit them on.
    """

    mean: Tensor
    std: Tensor
    limit: Tensor

    @classmethod
    def fit(cls, states_NH: Tensor) -> "Familiarity":
        """From the images' mean states."""
        mean = states_NH.mean(0)
        std = (states_NH - mean).square().mean(0).sqrt()
        # A channel that never varies says nothing of an image.
        std = torch.where(std > 1e-6, std, 1)
        # `distance` needs mean and deviation only; the limit follows from it.
        unfinished = cls(mean, std, torch.zeros(()))
        # "higher" takes a distance that occurs: of a few images even the farthest is inside.
        limit = torch.quantile(unfinished.distance(states_NH), 0.99, interpolation="higher")
        return cls(mean, std, limit)

    def distance(self, states_NH: Tensor) -> Tensor:
        """(N,): root mean square over channels, in standard deviations; about 1 for an image like the others."""
        return ((states_NH - self.mean) / self.std).square().mean(-1).sqrt()

    def is_outside(self, states: ImageStates) -> Tensor:
        """(N,) bool."""
        return self.distance(mean_states(states)) > self.limit


def mean_states(states: ImageStates) -> Tensor:
    """(N, H), fp32: each image's tokens at layer 0, averaged."""
    return states.positions(0, 1)[:, 0]


class StateSample:
    """Mean states of at most `SAMPLE` of the images that a fit sees, evenly spaced over the first `count`."""

    def __init__(self):
        # Number of an image -> (H,).
        self.rows: dict[int, Tensor] = {}
        self.chosen: set[int] = set()

    def plan(self, count: int) -> None:
        self.chosen = set(torch.linspace(0, count - 1, min(SAMPLE, count)).round().int().tolist())

    def update(self, states: ImageStates, start: int) -> None:
        """`start`: how many images came before."""
        numbers = range(start, start + len(states.grids))
        # Of a large fit most batches have no chosen image: their means aren't computed.
        if self.chosen.isdisjoint(numbers):
            return
        for number, row in zip(numbers, mean_states(states).cpu(), strict=True):
            if number in self.chosen:
                self.rows[number] = row

    def familiarity(self) -> Familiarity | None:
        if not self.rows:
            return None
        return Familiarity.fit(torch.stack(list(self.rows.values())))

    def state(self) -> dict[str, Tensor]:
        """What an interrupted fit goes on from; empty before the first image."""
        if not self.rows:
            return {}
        numbers = torch.tensor(list(self.rows))
        return {"sample.numbers": numbers, "sample.rows": torch.stack(list(self.rows.values()))}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Of a fit that was begun before there was a sample: the images that are still to come."""
        if "sample.numbers" in tensors:
            rows = tensors["sample.rows"].cpu()
            self.rows = dict(zip(tensors["sample.numbers"].tolist(), rows, strict=True))


class LinearProbe(nn.Module):
    """(..., H) -> (..., E), fp32. Inputs are centered first: some channels of a large LLM are far from 0 and hardly
    vary."""

    center: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, target_dim: int):
        super().__init__()
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("weight", torch.zeros(width, target_dim))
        self.register_buffer("bias", torch.zeros(target_dim))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.center) @ self.weight + self.bias


class Probes:
    """`modules[task][str(layer)]`, layers `first_layer` (0 are the embeddings) to the LLM's last.

    Args:
        kind: "ridge" (a `LinearProbe` of the states at each target position) or "resampler" (the paper's: an
            `EmbeddingPredictor` with its own queries, which attends to all tokens of the layer's state).
        tasks: dicts of tasks; name, target_length, target_dim and the size of the predictor count.
        num_layers: L + 1.
        about: more for probes.json, such as the model and its prompt.
        seed: of a resampler's first weights, the same for every layer.
    """

    def __init__(
        self,
        kind: str,
        tasks: list[dict],
        num_layers: int,
        hidden_size: int,
        about: dict | None = None,
        seed: int = 0,
        first_layer: int = 0,
    ):
        if kind not in ("ridge", "resampler"):
            raise ValueError(f'probe {kind!r} is unknown: choose "ridge" or "resampler"')
        self.kind = kind
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.about = about or {}
        self.tasks = {task["name"]: normalize_task({**task, **RESAMPLER}, hidden_size, 1) for task in tasks}
        # Task -> training images' mean target (Q, E).
        self.means: dict[str, Tensor] = {}
        # None: of probes from before it was kept.
        self.familiarity: Familiarity | None = None
        # Of standardized targets, which are what a probe predicts.
        self.statistics: dict[str, TargetStatistics] = {}

        def make(task: dict) -> nn.Module:
            # The same first weights in every layer: curves over layers show what the states hold.
            torch.manual_seed(seed)
            if kind == "ridge":
                return LinearProbe(hidden_size, task["target_dim"])
            return EmbeddingPredictor(task, hidden_size)

        # The reference's probes begin at layer 1.
        self.layers = range(first_layer, num_layers)
        self.modules = nn.ModuleDict()
        # `make` seeds torch's generator: the caller's random numbers go on as if it hadn't.
        with torch.random.fork_rng():
            for name, task in self.tasks.items():
                # torch takes only text for a module's name.
                self.modules[name] = nn.ModuleDict({str(layer): make(task) for layer in self.layers})

    def probe(self, task: str, layer: int) -> nn.Module:
        return cast(nn.ModuleDict, self.modules[task])[str(layer)]

    def raw(self, states: ImageStates, task: str, layer: int) -> Tensor:
        """(N, Q, E), standardized if the targets were."""
        probe = self.probe(task, layer)
        # A ridge reads the position's own state, a resampler all of the row's tokens.
        if self.kind == "ridge":
            return probe(states.positions(layer, self.tasks[task]["target_length"]))
        # Image n is in row n. None: without task tokens the queries are the probe's own.
        everyone = torch.arange(len(states.grids), device=states.attended_NT.device)
        return probe(states.hidden[layer], None, everyone, states.attended_NT)

    @torch.no_grad()
    def predict(self, states: ImageStates) -> Iterator[tuple[str, int, Tensor]]:
        """Task, layer and embeddings (N, Q, E) of each probe, fp32, for the teacher's `decode`."""
        for name in self.tasks:
            for layer in self.layers:
                prediction = self.raw(states, name, layer).float()
                if name in self.statistics:
                    prediction = self.statistics[name].restore(prediction)
                yield name, layer, prediction

    def to(self, device) -> "Probes":
        self.modules.to(device)
        self.means = {name: mean.to(device) for name, mean in self.means.items()}
        if self.familiarity is not None:
            self.familiarity = Familiarity._make(part.to(device) for part in self.familiarity)
        for name, statistics in self.statistics.items():
            self.statistics[name] = TargetStatistics._make(part.to(device) for part in statistics)
        return self

    def reader(self, model, processor) -> StateReader:
        """Of the states that the probes were fitted on: their prompt and shape."""
        return StateReader(model, processor, self.about["prompt"], self.about["square"])

    def save(self, folder: str | Path) -> None:
        """probes.safetensors and probes.json."""
        # One flat file of names such as "means.depth", which `_probes_of` takes apart again.
        tensors = {f"probes.{name}": value for name, value in self.modules.state_dict().items()}
        for name, mean in self.means.items():
            tensors[f"means.{name}"] = mean
        if self.familiarity is not None:
            for part, value in self.familiarity._asdict().items():
                tensors[f"familiarity.{part}"] = value
        for name, statistics in self.statistics.items():
            for part, value in statistics._asdict().items():
                tensors[f"statistics.{name}.{part}"] = value
        fields = {
            "kind": self.kind,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "first_layer": self.layers[0],
            "tasks": list(self.tasks.values()),
            "about": self.about,
        }
        write_json(Path(folder) / "probes.json", fields)
        # Last: where it is, the probes are whole.
        save_tensors(tensors, Path(folder) / "probes.safetensors")


def load_probes(folder: str | Path) -> Probes:
    """What `Probes.save` wrote: a model's folder below `ola-vlm probe`'s --out, or that itself if it has one model.
    ValueError if there are none or several."""
    folders = [path for path in (Path(folder), *Path(folder).glob("*")) if (path / "probes.safetensors").exists()]
    if len(folders) != 1:
        names = ", ".join(sorted(path.name for path in folders)) or "none"
        raise ValueError(f"{folder} should have the probes of one model, it has those of {names}: give its folder")
    tensors = read_safetensors(folders[0] / "probes.safetensors")
    try:
        return _probes_of(read_object(folders[0] / "probes.json"), tensors)
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        # A stranger's probes.json may hold anything: these are what its fields lead to further on.
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(
            f"{folders[0]} has no probes as `ola-vlm probe` writes them ({what}): fit them anew"
        ) from error


def _probes_of(fields: Mapping, tensors: Mapping[str, Tensor]) -> Probes:
    # An older file may lack some, first_layer say: these get their defaults.
    known = ("kind", "tasks", "num_layers", "hidden_size", "about", "first_layer")
    probes = Probes(**{name: fields[name] for name in known if name in fields})
    model = probes.about.get("model")
    if model is not None and not isinstance(model, str):
        raise TypeError(f"the model is {model!r}")
    weights = {}
    familiarity = {}
    statistics = defaultdict(dict)
    for name, value in tensors.items():
        match name.split("."):
            case ["probes", *names]:
                # Older files spell it "centre".
                weights[".".join(names).replace(".centre", ".center")] = value
            case ["means", task]:
                probes.means[task] = value
            case ["familiarity", part]:
                familiarity[part] = value
            case ["statistics", task, part]:
                statistics[task][part] = value
    probes.modules.load_state_dict(weights)
    if familiarity:
        probes.familiarity = Familiarity(**familiarity)
    for task, parts in statistics.items():
        probes.statistics[task] = TargetStatistics(**parts)
    return probes


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """As a whole or not at all; not by `write_whole`, which would hold a copy in memory."""
    with whole_file(path) as unfinished:
        save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished, metadata)


K = TypeVar("K")


@torch.no_grad()
def score(
    batches: Iterable[tuple[ImageStates, dict[str, Tensor]]], probes: Mapping[K, Probes]
) -> tuple[dict[K, Scores], dict[str, float]]:
    """For each of `probes`, by its key, {task: {layer: {kind: centered cosine, kind_plain: the paper's}}}, means over
    images; and {task: the paper's score of the training images' mean target}, which is its zero."""
    count = 0
    # Both scores, summed over images.
    totals: dict[tuple[K, str, int], Any] = defaultdict(float)
    # (key, task) -> the mean target's score, summed.
    zero_totals = defaultdict(float)
    for states, targets in batches:
        count += len(states.grids)
        for key, probes_of_key in probes.items():
            for task, layer, prediction in probes_of_key.predict(states):
                # Prediction and target (N, Q, E), mean (Q, E).
                target = targets[task]
                mean = probes_of_key.means[task]
                # (2, N): centered, plain.
                cosines = torch.stack([centered_cosine(prediction, target, mean), flat_cosine(prediction, target)])
                totals[key, task, layer] += cosines.double().sum(1)
                # The mean target is the same for all layers: it is scored once.
                if layer == probes_of_key.layers[0]:
                    zero = flat_cosine(mean.expand_as(target), target)
                    zero_totals[key, task] += zero.double().sum().item()
    scores = {}
    for key, probes_of_key in probes.items():
        scores[key] = {task: {} for task in probes_of_key.tasks}
    for (key, task, layer), total in totals.items():
        centered, plain = (total / count).tolist()
        kind = probes[key].kind
        scores[key][task][str(layer)] = {kind: centered, f"{kind}_plain": plain}
    return scores, {task: total / count for (_, task), total in zero_totals.items()}
