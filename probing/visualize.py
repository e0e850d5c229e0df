"""What each layer sees: `ola-vlm visualize` (commands/visualize.py; the paper's Figures 6 and VI).

The predictions are those of probes, which `ola-vlm probe` fits to every layer of any vision-language model
(`--probes`, or a checkpoint's own folder "probes"), else of the checkpoint's predictors, which learned to read the
states of pre-training: fine-tuning has changed these.

N images, Q positions, E width, S side of the teacher's square in pixels.
"""

import base64
import io
import math
import textwrap
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import torch
from huggingface_hub import snapshot_download
from matplotlib.colors import hsv_to_rgb, is_color_like, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..commands.running import command, tell
from ..inference.checkpoints import ADAPTER, adapter_base, load_checkpoint
from ..recipes import RECIPES
from ..targets.encoders import (
    ClipImageEncoder,
    DepthAnythingEncoder,
    OneFormerEncoder,
    TargetEncoder,
)
from ..targets.escapes import mathtext, one_line, terminal
from ..targets.files import inside, read_object, save_figure, teachers_of_file, write_whole
from ..targets.fill import BATCH, make_teachers
from ..targets.images import image_files, open_image
from ..targets.loading import loading_from
from ..targets.statistics import TargetStatistics
from ..training.rows import load_rows
from ..training.run_record import load_statistics
from .figures import METHODS
from .probes import Familiarity, Probes, centered_cosine, flat_cosine, load_probes
from .states import PROMPT, StateReader

Features = dict[str, dict[int, Tensor]]  # task -> layer -> (N, Q, E) in the teacher's own units
# heading -> N pictures. What belongs under one, such as its score, is its `info["note"]`; None: there is no picture.
Pictures = dict[str, list[Image.Image | None]]
TARGET, NOTHING_SEEN = "decoded target", "mean target (nothing seen)"  # headings
OUTSIDE = "outside of what the\nprobes were fitted on"
GREY = 217  # around a picture that is not square
DRAWN_LAYERS, BANK = 8, 2000  # at most, unless asked otherwise


def square(image: Image.Image, fill: int = 128) -> Image.Image:
    """Padded to the square that the encoders see, so that pictures of any origin lie over each other."""
    side = max(image.size)
    padded = Image.new("RGB", (side, side), (fill, fill, fill))
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def add_note(picture: Image.Image, text: str) -> None:
    """Under those it has."""
    notes = [note for note in (picture.info.get("note"), text) if note]
    picture.info["note"] = "\n".join(notes)


def signed(score: float) -> str:
    """Two digits; no -0.00."""
    return f"{round(score, 2) + 0.0:+.2f}"


def class_color(index: int, name: str) -> tuple[int, int, int]:
    """A class that is called after a color has it; others take hues far apart."""
    hue, saturation, value = (index + 4) * 0.618034 % 1, (0.35, 0.75)[index % 2], (0.95, 0.7, 0.85)[index % 3]
    color = to_rgb(name) if is_color_like(name) else hsv_to_rgb([hue, saturation, value])
    return tuple(round(255 * float(part)) for part in color)


class NearestImages:
    """gen without a generator: the image of a set whose embedding is nearest. It shows what of the scene is in an
    embedding, not what could be drawn from it."""

    def __init__(self, images: Sequence, encoder: ClipImageEncoder):
        if not images:
            raise ValueError("no images to look up the nearest of")
        self.images = images
        self.caption = f"the nearest of {len(images):,} images by embedding, none is generated; nearest: its cosine"
        batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        bar = tqdm(batches, desc="images for gen", unit="batch")
        embeddings = torch.cat([encoder.encode(list(map(open_image, batch))) for batch in bar])[:, 0]
        self.mean = embeddings.mean(0)  # all embeddings lie close to it
        self.directions = F.normalize(embeddings - self.mean, dim=-1)

    def __call__(self, embeddings_NE: Tensor) -> list[Image.Image]:
        similarities = F.normalize(embeddings_NE - self.mean, dim=-1) @ self.directions.T
        pictures = []
        for nearness, i in zip(*(part.tolist() for part in similarities.max(-1)), strict=True):
            picture = square(open_image(self.images[i]))
            add_note(picture, f"nearest {signed(nearness)}")
            pictures.append(picture)
        return pictures


class UnclipImages:
    """gen by the image encoder's own generator, unCLIP Stable Diffusion 2.1 in the paper: `steps` of DPM-Solver, the
    same noise for every embedding, so that only the embedding makes a difference."""

    def __init__(self, path: str, steps: int = 25, seed: int = 0, device="cpu", size: int | None = None):
        from diffusers import DPMSolverMultistepScheduler, StableUnCLIPImg2ImgPipeline

        with loading_from(path):
            pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(path, use_safetensors=True)
        self.pipeline = pipeline.to(device)
        self.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps, self.seed, self.size = steps, seed, size
        self.caption = f"images by unCLIP, {steps} DPM-Solver steps"

    def __call__(self, embeddings_NE: Tensor) -> list[Image.Image]:
        images = []
        for one in embeddings_NE.to(self.pipeline.device, self.pipeline.image_encoder.dtype):
            noise = torch.Generator(self.pipeline.device).manual_seed(self.seed)
            options = {"num_inference_steps": self.steps, "generator": noise, "height": self.size, "width": self.size}
            images += self.pipeline(image_embeds=one[None], prompt="", **options).images
        return images


def predictor_features(model, processor, statistics: Mapping[str, TargetStatistics], prompt: str) -> Callable:
    """A function of images that gives `Features`: those that the model's own predictors predict."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @torch.no_grad()
    def features(images: Sequence[Image.Image]) -> Features:
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
        inputs = processor(text=[text] * len(images), images=list(images), **options).to(model.device, model.dtype)
        predictions = model(**inputs, output_predictions=True, logits_to_keep=1).predictions

        found: Features = {}
        for task in predicted_tasks(model):
            name = task["name"]
            found[name] = {}
            for layer, prediction in predictions[name].items():
                prediction = prediction[..., : task["target_dim"]].float().cpu()  # without its place code
                if name in statistics:
                    prediction = statistics[name].restore(prediction)
                found[name][layer] = prediction
        return found

    return features


def probe_features(probes: Probes, model, processor) -> Callable:
    """A function of images that gives `Features`: what the probes read from each layer."""
    reader = probes.to(model.device).reader(model, processor)

    def features(images: Sequence[Image.Image]) -> Features:
        found: Features = {}
        for task, layer, prediction in probes.predict(reader(images)):
            found.setdefault(task, {})[layer] = prediction.cpu()
        return found

    return features


def find_run(folder: str | Path, trust: bool = False) -> dict:
    """Of the run that trained a checkpoint's predictors, from its run.json (which has those of the runs that it began
    with; an adapter's base model has another), or of the run that fitted probes: its `teachers`; {} if there is none.

    The file may be a stranger's. ValueError if its teachers have fields that a file may not set, and none of its other
    fields is given, such as the folder of its images. `trust`: all fields of the run, as they are.
    """
    files = [file for file in (Path(folder) / "run.json", Path(folder).parent / "run.json") if file.exists()]
    run = read_object(files[0]) if files else {}
    while run and not run.get("teachers"):
        run = run.get("started_from") or {}
        if not isinstance(run, dict):
            raise ValueError(f"{files[0]}: its started_from is no object")
    if not run and (Path(folder) / ADAPTER).is_file():
        return find_run(adapter_base(folder), trust)
    if trust or not run:
        return run
    return {"teachers": teachers_of_file(run["teachers"], files[0])}


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
    runs = [RECIPES[recipe]()] if recipe else [find_run(folder, trust) for folder in folders if folder is not None]
    for run in runs:
        if run.get("teachers"):
            return run
    where = f"recipe {recipe}" if recipe else f"the run.json of {' and '.join(str(one) for one in folders if one)}"
    what = "give --recipe of a pre-training that has some (the shipped miniature's: miniature_pretrain)"
    raise ValueError(f"{where} names no teachers: {what}")


def images_of_run(run: Mapping) -> list:
    """What it trained on, BANK images at most; none if they are not here, or if `find_run` kept them back."""
    place = run.get("data") or run.get("images") or ""  # the latter of `ola-vlm probe`
    if not place or not Path(place).exists():
        return []
    is_folder = Path(place).is_dir()
    images = image_files(place) if is_folder else load_rows(place, run.get("image_folder")).sources()
    places = np.linspace(0, len(images) - 1, min(BANK, len(images))).round().astype(int)
    return [images[i] for i in places]


def draw_depth(inverse_depth: np.ndarray) -> Image.Image:
    """(h, w), larger is closer; each picture has its own range."""
    values = np.asarray(inverse_depth, float)
    shares = (values - values.min()) / max(np.ptp(values), 1e-12)
    return Image.fromarray(matplotlib.colormaps["inferno"](shares, bytes=True)[..., :3].copy())


def draw_difference(features_QE: Tensor, target_QE: Tensor, mean_QE: Tensor, size: int) -> Image.Image:
    """What features have of the difference between an image's target and the mean target, `size` pixels a side.

    The difference's three main directions in this image are red, green and blue, each in units of its own root mean
    square over positions. Gray is no difference: who sees nothing sees gray everywhere.
    """
    difference = target_QE - mean_QE
    directions = torch.linalg.svd(difference, full_matrices=False)[2][:3]
    # A direction has no sign of its own: its largest part is made positive.
    largest = directions.abs().argmax(1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    spread = (difference @ directions.T).square().mean(0).sqrt().clamp(min=1e-6)
    values = (features_QE - mean_QE) @ directions.T / spread
    values = F.pad(values, (0, 3 - values.shape[1]))
    side = math.isqrt(len(values))
    colors = (255 * (0.5 + values / 5).clamp(0, 1)).round().byte().reshape(side, side, 3)
    picture = Image.fromarray(colors.numpy()).resize((size, size), Image.Resampling.NEAREST)
    picture.info["has_classes"] = False
    return picture


class Painter:
    """How a task's features are shown.

    Args:
        encoder: the task's teacher, whose own decoder makes the maps.
        decode_gen: see `LayerViewer`.
    `caption` says what must be said of the pictures, `legend` each class's color. ValueError for a teacher that can't
    be decoded.

    Segmentation features are not decoded: OneFormer's decoder takes the finer stages from the image itself, and with
    them draws the objects whatever the features are (mean target or random model). `draw_difference` shows what the
    features alone hold.
    """

    def __init__(self, encoder: TargetEncoder, decode_gen: Callable | None = None):
        self.encoder, self.decode_gen, self.legend, self.draw = encoder, decode_gen, {}, draw_depth
        if isinstance(encoder, DepthAnythingEncoder):
            self.caption = "inverse depth, bright is close; every picture has its own range"
        elif isinstance(encoder, OneFormerEncoder):
            self.caption = (
                "the teacher's classes; of features (not teacher-assisted) the difference to the mean, which is gray"
            )
            names = sorted(encoder.model.config.id2label.items())
            palette = np.array([class_color(i, name) for i, name in names], np.uint8)
            self.legend = {name: class_color(i, name) for i, name in names}
            self.draw = lambda classes: Image.fromarray(palette[np.asarray(classes)])
        elif not isinstance(encoder, ClipImageEncoder):
            raise ValueError(f"{type(encoder).__name__} has no decoder")
        elif decode_gen is None:
            raise ValueError("its embeddings want unCLIP (--unclip) or a set of images (--images_for_gen)")
        else:
            self.caption = decode_gen.caption

    @torch.no_grad()
    def __call__(
        self,
        features_NQE: Tensor | None,
        images: Sequence[Image.Image],
        targets_NQE: Tensor | None = None,
        mean_QE: Tensor | None = None,
    ) -> list[Image.Image]:
        """N pictures of features, or (None) of the teacher's own output, for N images.

        `targets_NQE`: the images' own, `mean_QE`: the mean target (by default the targets' mean over positions). Both
        are for segmentation only.
        """
        if isinstance(self.encoder, ClipImageEncoder):
            return self.decode_gen((self.encoder.encode(images) if features_NQE is None else features_NQE)[:, 0])
        if features_NQE is None or not isinstance(self.encoder, OneFormerEncoder):
            return list(map(self.draw, self.encoder.decode(features_NQE, images).numpy()))
        targets_NQE = self.encoder.encode(images) if targets_NQE is None else targets_NQE
        pictures = []
        for features, target in zip(features_NQE, targets_NQE, strict=True):
            mean = target.mean(0, keepdim=True) if mean_QE is None else mean_QE
            pictures.append(draw_difference(features, target, mean, self.encoder.size))
        return pictures


class LayerViewer:
    """Pictures of what each layer sees.

    Args:
        features: a function of N images that gives `Features`: `predictor_features`, or probes.
        encoders: task -> its teacher; tasks whose teacher can't be decoded are in `left_out`, with the reason.
        decode_gen: embeddings (N, E) -> N images, with a `caption`: `NearestImages` or `UnclipImages`.
        layers: those to show; by default all, or DRAWN_LAYERS of them, evenly spaced.
        by: what the features come from, for captions.
        means: task -> the training images' mean target (Q, E), which is what one predicts who sees nothing.
        is_outside: a function of N images that gives (N,) bool: whether each is unlike those that the features were
            fitted on; None if that is not known.
    """

    def __init__(
        self,
        features: Callable[[Sequence[Image.Image]], Features],
        encoders: Mapping[str, TargetEncoder],
        decode_gen: NearestImages | UnclipImages | None = None,
        layers: Sequence[int] | None = None,
        by: str = "",
        means: Mapping[str, Tensor] | None = None,
        is_outside: Callable[[Sequence[Image.Image]], Tensor] | None = None,
    ):
        self.features, self.layers, self.by = features, layers, by
        self.means, self.is_outside = means or {}, is_outside
        self.encoders, self.decode_gen = encoders, decode_gen
        self.painters, self.left_out = {}, {}
        for task, encoder in encoders.items():
            try:
                self.painters[task] = Painter(encoder, decode_gen)
            except ValueError as error:
                self.left_out[task] = str(error)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        model,
        processor,
        run: Mapping,
        layers: Sequence[int] | None = None,
        prompt: str = PROMPT,
        probes: str | Path | None = None,
        images_for_gen: Sequence | None = None,
        unclip: str | None = None,
        like: "LayerViewer | None" = None,
    ) -> "LayerViewer":
        """Of a checkpoint, which is loaded as `model` and `processor`, by the teachers of `run` (`find_teachers`).
        ValueError if it has neither probes nor predictors.

        `probes`: a folder of `ola-vlm probe`; by default the checkpoint's own one, "probes"; without it, or with
        "none", its predictors. `prompt`: for predictors; probes have theirs.
        `images_for_gen`: for `NearestImages`; by default BANK of the run's training images, if `run` names them and
        they are there.
        `unclip`: instead, a pipeline's folder or name.
        `like`: take the teachers, the images for gen and the layers of this one, to be compared with it.
        """
        place = checkpoint
        checkpoint = local_folder(place)
        own = checkpoint / "probes"
        probes = own if probes is None and own.exists() else None if probes == "none" else probes
        fitted = load_probes(probes) if probes else None
        tasks = list(fitted.tasks.values()) if fitted else predicted_tasks(model)
        if not tasks:
            raise ValueError(f"{checkpoint} has no predictors: fit probes with `ola-vlm probe`, give --probes")
        if lacking := [task["name"] for task in tasks if task["name"] not in run["teachers"]]:
            raise ValueError(f"no teacher decodes {', '.join(lacking)}: give a --recipe that has one")
        if like is None:
            encoders, decode_gen = load_decoders(tasks, run, model.device, images_for_gen, unclip)
        else:
            encoders, decode_gen, layers = like.encoders, like.decode_gen, like.layers
        for task in tasks:
            encoder = encoders.get(task["name"])
            shape = (task["target_length"], task["target_dim"])
            if encoder is not None and shape != (encoder.target_length, encoder.target_dim):
                other = (encoder.target_length, encoder.target_dim)
                raise ValueError(
                    f"{checkpoint} has {task['name']} targets of {shape}, what it is compared with {other}"
                )
        is_outside = None
        if fitted:
            features, by = probe_features(fitted, model, processor), f"{fitted.kind} probes of every layer"
            of = fitted.about.get("model")
            if of and Path(of).resolve() != checkpoint.resolve():
                by += f", fitted to {of}"
            # The reference's runs don't record their mean target: probes converted from them have zeros.
            means = {task: mean.cpu() for task, mean in fitted.means.items() if mean.any()}
            if fitted.familiarity is not None:
                is_outside = partial(outside, fitted.familiarity, fitted.reader(model, processor))
        else:
            statistics = statistics_of(place)
            features = predictor_features(model, processor, statistics, prompt)
            means = {task: of_task.mean for task, of_task in statistics.items()}
            by = "the predictors of pre-training"
        return cls(features, encoders, decode_gen, layers, by, means, is_outside)

    def pictures(self, images: Sequence[Image.Image]) -> dict[str, Pictures]:
        """task -> heading ("image", "teacher", TARGET, NOTHING_SEEN, "layer 2", ...) -> N pictures, with notes: their
        scores, and whether the image lies outside of what the probes were fitted on."""
        images, shown = list(map(open_image, images)), {}
        features = self.features(images)
        for layer in self.layers or ():
            if not any(layer in of_layers for of_layers in features.values()):
                known = {task: sorted(of_layers) for task, of_layers in features.items()}
                raise ValueError(f"no task has layer {layer}: choose from {known}")
        are_outside = self.are_outside(images)
        for task, of_layers in features.items():
            if task not in self.painters:
                continue
            layers = sorted(of_layers) if self.layers is None else [one for one in self.layers if one in of_layers]
            if self.layers is None and len(layers) > DRAWN_LAYERS:
                layers = [layers[i] for i in np.linspace(0, len(layers) - 1, DRAWN_LAYERS).round().astype(int)]
            squares = list(map(square, images))
            for picture, is_outside in zip(squares, are_outside, strict=True):
                if is_outside:
                    add_note(picture, OUTSIDE)
            of_layers = {f"layer {layer}": of_layers[layer] for layer in layers}
            shown[task] = {"image": squares, **self._decoded(task, of_layers, images)}
        return shown

    def are_outside(self, images: Sequence[Image.Image]) -> list[bool]:
        """Which of the images are unlike those that the probes were fitted on; none where that is not known."""
        if self.is_outside is None:
            return [False] * len(images)
        return self.is_outside(images).tolist()

    def _decoded(self, task: str, of_layers: Mapping[str, Tensor], images: Sequence[Image.Image]) -> Pictures:
        """The task's columns but the image: the teacher's, and everything that is decoded from features."""
        paint = self.painters[task]
        targets = paint.encoder.encode(images)
        mean = self.means.get(task)
        features = {}
        if not isinstance(paint.encoder, ClipImageEncoder):  # whose own output is just that
            features[TARGET] = targets
        if mean is not None:
            features[NOTHING_SEEN] = mean.expand_as(targets)
        features.update(of_layers)
        columns = {"teacher": paint(None, images)}
        for heading, predicted in features.items():
            columns[heading] = paint(predicted, images, targets, mean)
            cosines = flat_cosine(predicted, targets) if mean is None else centered_cosine(predicted, targets, mean)
            for n, cosine in enumerate(cosines.tolist()):
                kind = "plain cosine" if mean is None else "cosine"
                add_note(columns[heading][n], f"{kind} {signed(cosine)}")
        return columns

    def caption(self, task: str) -> str:
        """What must be said of a task's pictures and of the notes below them."""
        if task in self.means:
            score = "cosine: mean-centered, to the image's target: 0 is nothing seen, 1 all of it"
        else:
            score = "no mean target is known: plain cosines are high even where nothing is seen"
        return f"{self.painters[task].caption}; {score}"

    @property
    def remark(self) -> str:
        """What can't be said of the images; "" if nothing."""
        if self.is_outside is not None:
            return ""
        return "whether an image is like those that this was fitted on is not known: `ola-vlm probe` keeps that"


def outside(familiarity: Familiarity, reader: StateReader, images: Sequence[Image.Image]) -> Tensor:
    """(N,) bool: whether each image is outside of what probes were fitted on."""
    familiarity = Familiarity(*(part.to(reader.model.device) for part in familiarity))
    return familiarity.is_outside(reader(images)).cpu()


def load_decoders(
    tasks: list[dict], run: Mapping, device, images_for_gen: Sequence | None, unclip: str | None
) -> tuple[dict[str, TargetEncoder], NearestImages | UnclipImages | None]:
    """The teachers of `tasks`, and what shows gen; see `LayerViewer.load`."""
    entries = {task["name"]: run["teachers"][task["name"]] for task in tasks}
    encoders = {name: teacher.encoder for name, teacher in make_teachers(tasks, entries, device).items()}
    if unclip:
        return encoders, UnclipImages(unclip, device=device)
    of_images = [encoder for encoder in encoders.values() if isinstance(encoder, ClipImageEncoder)]
    if not of_images:
        return encoders, None
    if images_for_gen is None:
        images_for_gen = images_of_run(run)
    return encoders, NearestImages(images_for_gen, of_images[0]) if images_for_gen else None


def display_names(checkpoints: Sequence[str]) -> list[str]:
    """Methods by their name, others by their folder's or repository's, if that tells them apart."""
    names = [Path(checkpoint).name for checkpoint in checkpoints]
    if len(set(names)) == len(names):
        return [METHODS[name][0] if name in METHODS else name for name in names]
    if len(set(checkpoints)) == len(checkpoints):
        return list(checkpoints)
    # One checkpoint by several probes.
    return [f"{checkpoint} ({number})" for number, checkpoint in enumerate(checkpoints, start=1)]


def heading_order(heading: str) -> int:
    """Layers come last, by their number; the others stay in their order."""
    return 1 + int(heading.removeprefix("layer ")) if heading.startswith("layer ") else 0


def compared(shown: Mapping[str, dict[str, Pictures]]) -> dict[str, tuple[Pictures, list[str]]]:
    """Several models' pictures in one: task -> columns and the rows' labels. All models' rows of an image stand
    together, in the order of `shown` (label -> its `LayerViewer.pictures`); a layer that a model lacks stays empty."""
    together = {}
    for task in dict.fromkeys(task for pictures in shown.values() for task in pictures):
        of_models = {label: pictures[task] for label, pictures in shown.items() if task in pictures}
        headings = dict.fromkeys(heading for columns in of_models.values() for heading in columns)
        columns = {heading: [] for heading in sorted(headings, key=heading_order)}
        labels = []
        for n in range(len(next(iter(of_models.values()))["image"])):
            for label, pictures in of_models.items():
                labels.append(label)
                for heading, column in columns.items():
                    column.append(pictures[heading][n] if heading in pictures else None)
        together[task] = (columns, labels)
    return together


def pictures_figure(
    path: str | Path, columns: Pictures, title: str, legend: Mapping[str, tuple], labels: Sequence[str] = ()
) -> None:
    """Saves a grid of pictures (.png, .pdf, ...) with their notes: a row an image, a column for each entry of
    `columns`.

    `legend`: class -> color; only colors that occur in a picture are listed. `labels`: the rows' names.
    """
    (rows,) = {len(column) for column in columns.values()}
    cell, wide, lines = 1.5, len(columns), textwrap.wrap(title, 16 * len(columns))
    notes = [note_of(picture) for column in columns.values() for picture in column]
    below = 0.17 * max(note.count("\n") + bool(note) for note in notes)
    height = (cell + below) * rows + 0.5 + 0.2 * len(lines) + 0.35 * bool(legend)
    figure = Figure(figsize=(cell * wide + 0.1 + 0.3 * bool(labels), height), layout="constrained")
    axes = figure.subplots(rows, wide, squeeze=False)
    for place, (name, column) in enumerate(columns.items()):
        axes[0, place].set_title(mathtext(textwrap.fill(name, 16)), fontsize=10)
        for row, picture in zip(axes, column, strict=True):
            if picture is not None:
                row[place].imshow(square(picture, GREY), interpolation="nearest")
            row[place].set_xlabel(note_of(picture), fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, label in zip(axes, labels, strict=False):
        row[0].set_ylabel(mathtext(label), fontsize=10)
    figure.suptitle(mathtext("\n".join(lines)), fontsize=11)
    if legend:
        drawn = drawn_colors(columns)
        shown = {name: color for name, color in legend.items() if color in drawn}
        patches = [Patch(color=np.divide(color, 255), label=mathtext(name)) for name, color in shown.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=2 * wide, fontsize=8, frameon=False)
    save_figure(figure, path, dpi=150)


def note_of(picture: Image.Image | None) -> str:
    return "" if picture is None else picture.info.get("note", "")


def has_classes(picture: Image.Image | None) -> bool:
    """Whether a legend's colors mean classes in it."""
    return picture is not None and picture.info.get("has_classes", True)


def drawn_colors(columns: Pictures) -> set[tuple[int, int, int]]:
    """Those of all pictures of classes."""
    colors: set[tuple[int, int, int]] = set()
    for heading, column in columns.items():
        for picture in column:
            if heading != "image" and has_classes(picture):
                pixels = np.asarray(picture).reshape(-1, 3)
                colors.update(map(tuple, np.unique(pixels, axis=0).tolist()))
    return colors


STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:1.5em;color:#222;background:#fff}h2{margin:1.2em 0 0}
p{margin:.2em 0 .6em;color:#555}.row{display:flex;gap:6px;overflow-x:auto;margin:6px 0}figure{margin:0;flex:none}
i{display:inline-block;width:1em;height:1em;vertical-align:-.1em;margin:0 .3em 0 .6em}
img{width:128px;height:128px;display:block;image-rendering:pixelated}figcaption{font-size:13px;text-align:center}
"""


def html_figure(heading: str, picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    picture.save(buffer := io.BytesIO(), "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="" src="data:image/png;base64,{data}">'
    note = escape(note_of(picture)).replace("\n", "<br>")
    return f"<figure>{image}<figcaption>{escape(heading)}<br><small>{note}</small></figcaption></figure>"


def page(
    viewer: LayerViewer, shown: Mapping[str, Pictures], title: str, labels: Mapping[str, Sequence[str]] | None = None
) -> str:
    """One HTML file with all pictures inside. `labels`: task -> its rows' names."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{escape(title)}</h1>")
    if viewer.remark:
        parts.append(f"<p>{escape(viewer.remark)}</p>")
    for task, columns in shown.items():
        painter = viewer.painters[task]
        swatches = [f"<i style='background:rgb{color}'></i>{escape(name)} " for name, color in painter.legend.items()]
        parts.append(f"<h2>{escape(task)}</h2><p>{escape(viewer.caption(task))}<br>{''.join(swatches)}</p>")
        for n, row in enumerate(zip(*columns.values(), strict=True)):
            label = f"<b>{escape(labels[task][n])}</b>" if labels else ""
            figures = [html_figure(heading, picture) for heading, picture in zip(columns, row, strict=True)]
            parts.append(f"{label}<div class=row>{''.join(figures)}</div>")
    parts += [f"<p>{escape(task)} is left out: {escape(why)}</p>" for task, why in viewer.left_out.items()]
    return "\n".join(parts) + "\n"


def load_compared(args: Namespace, viewer: LayerViewer, run: Mapping) -> list[LayerViewer]:
    """Those of --compare, by the teachers of `viewer`."""
    folders = args.compare_probes or [None] * len(args.compare)
    viewers = []
    for checkpoint, probes in zip(args.compare, folders, strict=True):
        model, processor = load_checkpoint(checkpoint, args.dtype)
        options = {"prompt": args.prompt, "probes": probes, "like": viewer}
        viewers.append(LayerViewer.load(checkpoint, model, processor, run, **options))
    return viewers


@command("visualize")
def main(args: Namespace) -> None:
    if args.prompt is None:
        args.prompt = PROMPT
    images = [open_image(path) for path in args.images]
    fields = find_teachers(args.recipe, args.probes, args.checkpoint, trust=args.trust_run)
    bank = image_files(args.images_for_gen) if args.images_for_gen else None
    if args.images_for_gen and not bank:
        raise ValueError(f"{args.images_for_gen} has no images for gen")
    model, processor = load_checkpoint(args.checkpoint, args.dtype)
    options = {"layers": args.layers, "prompt": args.prompt, "probes": args.probes}
    options |= {"images_for_gen": bank, "unclip": args.unclip}
    viewer = LayerViewer.load(args.checkpoint, model, processor, fields, **options)
    viewers = [*load_compared(args, viewer, fields), viewer]
    checkpoints = [*args.compare, args.checkpoint]
    names = display_names(checkpoints)
    of_models = {name: of.pictures(images) for name, of in zip(names, viewers, strict=True)}
    shown = compared(of_models)
    # Their names are of the checkpoint.
    files = {task: inside(args.out, f"{task}.png") for task in shown}
    if not shown:
        reasons = "; ".join(f"{task}: {why}" for task, why in viewer.left_out.items())
        raise ValueError(f"nothing can be shown: {reasons}")
    by = "; ".join(dict.fromkeys(of.by for of in viewers))
    remarks = dict.fromkeys(of.remark for of in viewers if of.remark)
    labels = {}
    for task, (columns, names_of_rows) in shown.items():
        if args.compare:
            labels[task] = names_of_rows
        title = f"{task}, by {by}: {viewer.caption(task)}"
        pictures_figure(files[task], columns, title, viewer.painters[task].legend, labels.get(task, ()))
        print(terminal(files[task]))
    columns_of = {task: columns for task, (columns, _) in shown.items()}
    seen_by = " and ".join(map(str, checkpoints))
    html = page(viewer, columns_of, f"What the layers of {seen_by} see, by {by}", labels)
    write_whole(args.out / "layers.html", html)
    print(args.out / "layers.html")
    for task, why in viewer.left_out.items():
        print(one_line(f"{task} is left out: {why}"))
    for remark in remarks:
        print(remark)
    for name, pictures in of_models.items():
        squares = next((columns["image"] for columns in pictures.values()), [])
        for path, picture in zip(args.images, squares, strict=False):
            if note_of(picture):
                print(one_line(f"{path} is {' '.join(OUTSIDE.split())} of {name}"))
    tell(f"Next: open {args.out / 'layers.html'} in a browser, or python space/app.py --checkpoint {args.checkpoint}")
