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
from transformers import BatchFeature

from ..commands.parsing import shipped
from ..files.strangers import entries_of, read_object, teachers_of_file
from ..inference.checkpoints import ADAPTER, adapter_base
from ..recipes import RECIPES
from ..targets.images import image_files
from ..targets.statistics import TargetStatistics
from ..training.attach import AttachedPredictors
from ..training.collator import AttachedCollator
from ..training.rows import Rows, load_rows
from ..training.run_record import RUN_FILE, load_statistics, record_in
from .probes import Familiarity, Probes
from .run import SETTINGS_FILE
from .states import StateReader

# Task -> layer -> (N, Q, E) in the teacher's own units.
Features = dict[str, dict[int, Tensor]]
# Images to look up the nearest of, at most: each goes through the teacher when a viewer is loaded.
BANK = 2000
NAME_TEACHERS = "give --recipe of a pre-training that has some (the shipped miniature's: miniature_pretrain)"


def predictor_features(
    model, processor, statistics: Mapping[str, TargetStatistics], prompt: str
) -> Callable[[Sequence[Image.Image]], Features]:
    """A function of images that gives `Features`: those that the model's own predictors predict."""
    # One prompt for all images; the processor expands its mark to the image's tokens.
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    collator = None
    # Attached predictors know one view of an image, that of their training; a square by default.
    if isinstance(model, AttachedPredictors):
        # Older configurations lack these fields: what is missing is None, and only False means no square.
        view = {name: model.config.image_view.get(name) for name in ("square", "side", "image_options")}
        view["square"] = view["square"] is not False
        collator = AttachedCollator(processor, **view)

    def inputs_of(images: Sequence[Image.Image]) -> BatchFeature:
        if collator is not None:
            return collator.inputs(text, images)
        return processor(
            text=[text] * len(images),
            images=list(images),
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )

    def restored(task: dict, prediction: Tensor) -> Tensor:
        # A predicted place code follows the features, which are all that the teacher knows.
        prediction = prediction[..., : task["target_dim"]].float().cpu()
        if task["name"] in statistics:
            return statistics[task["name"]].restore(prediction)
        return prediction

    @torch.no_grad()
    def features(images: Sequence[Image.Image]) -> Features:
        inputs = inputs_of(images).to(model.device, model.dtype)
        # No answer is wanted: of the logits, the widest tensor, only the last position's.
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
        # (M, E), each of length 1: a product with them is a cosine.
        self.directions = F.normalize(embeddings_ME - self.mean, dim=-1)

    def __call__(self, queries_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Each query's largest cosine (N,), and which of the M has it (N,)."""
        similarities_NM = F.normalize(queries_NE - self.mean, dim=-1) @ self.directions.T
        cosines, indices = similarities_NM.max(-1)
        return cosines, indices


def read_settings(folder: str | Path) -> tuple[Path, dict] | None:
    """The file beside or above a folder that says which run trained its predictors or fitted its probes, and what it
    says; None if there is none."""
    # A run's checkpoint-1000 has no record of its own: that of the run lies one folder above.
    for place in (Path(folder), Path(folder).parent):
        record = record_in(place)
        if record is not None:
            return place / RUN_FILE, record
    # What `ola-vlm probe` leaves in its own folder, in which each model's probes have one.
    for place in (Path(folder), Path(folder).parent):
        settings = place / SETTINGS_FILE
        if settings.exists():
            found = read_object(settings)
            # Many a program's settings have that name.
            if found.get("teachers"):
                return settings, found
    return None


def find_run(folder: str | Path, trust: bool = False) -> dict:
    """Of the run that trained a checkpoint's predictors, from its run.json (which has those of the runs that it began
    with; an adapter's base model has another), or of the run that fitted probes: its `teachers`; {} if there is none.

    The file may be a stranger's. ValueError if its teachers have fields that a file may not set, and none of its other
    fields is given, such as the folder of its images. `trust`: all fields of the run, as they are.
    """
    # The first run, from the checkpoint's own on back, that had teachers: fine-tuning has none.
    file, run = read_settings(folder) or (None, {})
    while run and not run.get("teachers"):
        run = run.get("started_from") or {}
        if not isinstance(run, dict):
            raise ValueError(f"{file}: its started_from is no object")
    # An adapter whose own runs had no teachers has the predictors of its base model.
    if not run and (Path(folder) / ADAPTER).is_file():
        return find_run(str(adapter_base(folder)), trust)
    if trust or not run:
        return run
    # The run was read from it.
    assert file is not None
    teachers = teachers_of_file(run["teachers"], file)
    for entry in entries_of(teachers).values():
        if "path" in entry:
            # Of the package's own checkpoints, whose teachers it has, too.
            entry["path"] = shipped(entry["path"])
    return {"teachers": teachers}


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
    # An adapter that trained no predictors has no statistics of its own.
    if not statistics and base is not None:
        return statistics_of(base)
    return statistics


def find_teachers(
    recipe: str | None, *folders: str | Path | None, others: Sequence[str] = (), trust: bool = False
) -> dict:
    """The fields (`teachers`, `data`, ...) of a recipe, or of the first run of `folders`, then of `others`, that names
    teachers, by `find_run`, with what the later ones name for further tasks. `trust` is for `folders`. ValueError if
    none names any."""
    if recipe and recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe}: choose one of `ola-vlm recipes`")
    places = [folder for folder in folders if folder is not None]
    if recipe:
        runs = [RECIPES[recipe]()]
        place = f"recipe {recipe}"
    else:
        # `others` are what something is compared with: asked last, and never trusted.
        runs = [find_run(folder, trust) for folder in places] + [find_run(folder) for folder in others]
        place = f"the run.json of {' and '.join(map(str, [*places, *others]))}"
    naming = [run for run in runs if run.get("teachers")]
    if not naming:
        raise ValueError(f"{place} names no teachers: {NAME_TEACHERS}")
    teachers = {}
    # The first run that names a task's teacher wins: it is the last to write.
    for run in reversed(naming):
        teachers.update(run["teachers"])
    return {**naming[0], "teachers": teachers}


def images_of_run(run: Mapping) -> list:
    """What it trained on, BANK images at most; none if they are not here, or if `find_run` kept them back."""
    # The latter of `ola-vlm probe`.
    data = run.get("data") or run.get("images")
    if not data or not Path(data).exists():
        return []
    if Path(data).is_dir():
        images = image_files(data)
    else:
        rows = load_rows(data, run.get("image_folder"))
        # A file's rows are no stream.
        assert isinstance(rows, Rows)
        images = rows.sources()
    # Evenly spaced: images of one kind often have neighboring names.
    indices = np.linspace(0, len(images) - 1, min(BANK, len(images))).round().astype(int)
    return [images[i] for i in indices]
