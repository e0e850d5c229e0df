"""What a checkpoint says of an image, layer by layer: read by probes, or predicted by its own predictors; and the run
whose teachers understand it.

N images, Q positions, E width.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..inference.checkpoints import ADAPTER, adapter_base
from ..recipes import RECIPES
from ..targets.files import read_object, teachers_of_file
from ..targets.images import image_files
from ..targets.statistics import TargetStatistics
from ..training.rows import Rows, load_rows
from ..training.run_record import RUN_FILE, load_statistics, record_in
from .probes import Familiarity, Probes
from .run import SETTINGS_FILE
from .states import StateReader

Features = dict[str, dict[int, Tensor]]  # task -> layer -> (N, Q, E) in the teacher's own units
BANK = 2000  # images to look up the nearest of, at most


def predictor_features(
    model, processor, statistics: Mapping[str, TargetStatistics], prompt: str
) -> Callable[[Sequence[Image.Image]], Features]:
    """A function of images that gives `Features`: those that the model's own predictors predict."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def restored(task: dict, prediction: Tensor) -> Tensor:
        prediction = prediction[..., : task["target_dim"]].float().cpu()  # without its place code
        if task["name"] in statistics:
            return statistics[task["name"]].restore(prediction)
        return prediction

    @torch.no_grad()
    def features(images: Sequence[Image.Image]) -> Features:
        inputs = processor(
            text=[text] * len(images),
            images=list(images),
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        inputs = inputs.to(model.device, model.dtype)
        predictions = model(**inputs, output_predictions=True, logits_to_keep=1).predictions
        restored_predictions: Features = {}
        for task in predicted_tasks(model):
            layers = predictions[task["name"]]
            restored_predictions[task["name"]] = {layer: restored(task, value) for layer, value in layers.items()}
        return restored_predictions

    return features


def probe_features(probes: Probes, model, processor) -> Callable[[Sequence[Image.Image]], Features]:
    """A function of images that gives `Features`: what the probes read from each layer."""
    reader = probes.to(model.device).reader(model, processor)

    def features(images: Sequence[Image.Image]) -> Features:
        predictions: Features = {}
        for task, layer, prediction in probes.predict(reader(images)):
            predictions.setdefault(task, {})[layer] = prediction.cpu()
        return predictions

    return features


def outside(familiarity: Familiarity, reader: StateReader, images: Sequence[Image.Image]) -> Tensor:
    """(N,) bool: whether each image is outside of what probes were fitted on."""
    familiarity = Familiarity._make(part.to(reader.model.device) for part in familiarity)
    return familiarity.is_outside(reader(images)).cpu()


class NearestNeighbors:
    """The most similar of embeddings (M, E), by cosine after their mean is taken off: all lie close to it, so that
    without it each would be similar to each."""

    def __init__(self, embeddings_ME: Tensor):
        self.mean = embeddings_ME.mean(0)
        self.directions = F.normalize(embeddings_ME - self.mean, dim=-1)

    def __call__(self, queries_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Each query's largest cosine (N,), and which of the M has it (N,)."""
        similarities_NM = F.normalize(queries_NE - self.mean, dim=-1) @ self.directions.T
        cosines, indices = similarities_NM.max(-1)
        return cosines, indices


def read_settings(folder: str | Path) -> tuple[Path, dict] | None:
    """The file beside or above a folder that says which run trained its predictors or fitted its probes, and what it
    says; None if there is none."""
    for place in (Path(folder), Path(folder).parent):
        record = record_in(place)
        if record is not None:
            return place / RUN_FILE, record
    settings = Path(folder).parent / SETTINGS_FILE  # of `ola-vlm probe`
    if settings.exists():
        return settings, read_object(settings)
    return None


def find_run(folder: str | Path, trust: bool = False) -> dict:
    """Of the run that trained a checkpoint's predictors, from its run.json (which has those of the runs that it began
    with; an adapter's base model has another), or of the run that fitted probes: its `teachers`; {} if there is none.

    The file may be a stranger's. ValueError if its teachers have fields that a file may not set, and none of its other
    fields is given, such as the folder of its images. `trust`: all fields of the run, as they are.
    """
    file, run = read_settings(folder) or (None, {})
    while run and not run.get("teachers"):
        run = run.get("started_from") or {}
        if not isinstance(run, dict):
            raise ValueError(f"{file}: its started_from is no object")
    if not run and (Path(folder) / ADAPTER).is_file():
        return find_run(str(adapter_base(folder)), trust)
    if trust or not run:
        return run
    assert file is not None  # the run is its
    return {"teachers": teachers_of_file(run["teachers"], file)}


def local_folder(checkpoint: str | Path) -> Path:
    """Where a checkpoint's probes and statistics are: it itself, or what is fetched of a name on the Hub."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    return Path(snapshot_download(str(checkpoint), allow_patterns=["probes/*", "target_statistics/*"]))


def predicted_tasks(model) -> list[dict]:
    """Those of features that a model has predictors for."""
    config = model.config
    if not getattr(config, "has_predictors", True):
        return []
    return [task for task in getattr(config, "tasks", []) if is_of_features(task)]


def is_of_features(task: dict) -> bool:
    """Whether predictions are features, which a teacher decodes: words aren't, nor what has no content."""
    # An attached model's, saved by an earlier version, lack these fields.
    return task.get("target", "features") == "features" and task.get("loss") != "moments"


def statistics_of(checkpoint: str | Path) -> dict[str, TargetStatistics]:
    """Of the targets of a checkpoint's predictors, which are the base model's if it is an adapter."""
    base = adapter_base(checkpoint)
    statistics = load_statistics(local_folder(checkpoint))
    if not statistics and base is not None:
        return statistics_of(base)
    return statistics


def find_teachers(recipe: str | None, *folders: str | Path | None, trust: bool = False) -> dict:
    """The fields (`teachers`, `data`, ...) of a recipe, or of the first run of `folders` that names teachers, by
    `find_run`. ValueError if none does."""
    if recipe and recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe}: choose one of `ola-vlm recipes`")
    places = [folder for folder in folders if folder is not None]
    if recipe:
        runs = [RECIPES[recipe]()]
        place = f"recipe {recipe}"
    else:
        runs = [find_run(folder, trust) for folder in places]
        place = f"the run.json of {' and '.join(map(str, places))}"
    for run in runs:
        if run.get("teachers"):
            return run
    remedy = "give --recipe of a pre-training that has some (the shipped miniature's: miniature_pretrain)"
    raise ValueError(f"{place} names no teachers: {remedy}")


def images_of_run(run: Mapping) -> list:
    """What it trained on, BANK images at most; none if they are not here, or if `find_run` kept them back."""
    data = run.get("data") or run.get("images")  # the latter of `ola-vlm probe`
    if not data or not Path(data).exists():
        return []
    if Path(data).is_dir():
        images = image_files(data)
    else:
        rows = load_rows(data, run.get("image_folder"))
        assert isinstance(rows, Rows)  # no stream
        images = rows.sources()
    indices = np.linspace(0, len(images) - 1, min(BANK, len(images))).round().astype(int)
    return [images[i] for i in indices]
