"""Features decoded into pictures: depth maps, images that stand for embeddings, differences to the mean target.

N images, Q positions, E width, S side of the teacher's square in pixels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb, is_color_like, to_rgb
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..targets.encoders import (
    ClipImageEncoder,
    DepthAnythingEncoder,
    OneFormerEncoder,
    TargetEncoder,
)
from ..targets.fill import BATCH, make_teachers
from ..targets.images import open_image
from ..targets.loading import loading_from
from .features import (
    NAME_TEACHERS,
    Features,
    NearestNeighbors,
    images_of_run,
    local_folder,
    outside,
    predicted_tasks,
    predictor_features,
    probe_features,
    statistics_of,
)
from .probes import centered_cosine, flat_cosine, load_probes
from .states import PROMPT

# heading -> N pictures. What belongs under one, such as its score, is its `info["note"]`; None: there is no picture.
Pictures = dict[str, Sequence[Image.Image | None]]
TARGET = "decoded target"  # headings
NOTHING_SEEN = "mean target (nothing seen)"
OUTSIDE = "outside of what the\nprobes were fitted on"
# At most, unless asked otherwise.
DRAWN_LAYERS = 8


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


def note_of(picture: Image.Image | None) -> str:
    return "" if picture is None else picture.info.get("note", "")


def has_classes(picture: Image.Image | None) -> bool:
    """Whether a legend's colors mean classes in it."""
    # Only `draw_difference` marks its pictures: their colors are directions, not classes.
    return picture is not None and picture.info.get("has_classes", True)


def signed(score: float) -> str:
    """Two digits; no -0.00."""
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{round(score, 2) + 0.0:+.2f}"


def class_color(index: int, name: str) -> tuple[int, int, int]:
    """A class that is called after a color has it; others take hues far apart."""
    if is_color_like(name):
        color = to_rgb(name)
    else:
        # Steps of the golden ratio never come close to each other.
        hue = (index + 4) * 0.618034 % 1
        # Neighbors in the list of classes differ in these, too.
        saturation = (0.35, 0.75)[index % 2]
        value = (0.95, 0.7, 0.85)[index % 3]
        color = hsv_to_rgb([hue, saturation, value])
    red, green, blue = (round(255 * float(part)) for part in color)
    return red, green, blue


class NearestImages:
    """gen without a generator: the image of a set whose embedding is nearest. It shows what of the scene is in an
    embedding, not what could be drawn from it."""

    def __init__(self, images: Sequence, encoder: ClipImageEncoder):
        if not images:
            raise ValueError("no images to look up the nearest of")
        self.images = images
        self.caption = f"the nearest of {len(images):,} images by embedding, none is generated; near: its cosine"
        embeddings = []
        for start in tqdm(range(0, len(images), BATCH), desc="images for gen", unit="batch"):
            # Opened a batch at a time: of the whole set only the embeddings stay in memory.
            batch = [open_image(image) for image in images[start : start + BATCH]]
            # (N, 1, E) -> (N, E): gen has one embedding an image.
            embeddings.append(encoder.encode(batch)[:, 0])
        self.nearest = NearestNeighbors(torch.cat(embeddings))

    def __call__(self, embeddings_NE: Tensor) -> list[Image.Image]:
        cosines, indices = self.nearest(embeddings_NE)
        pictures = []
        for cosine, index in zip(cosines.tolist(), indices.tolist(), strict=True):
            # Opened anew for each use: a note is added to it.
            picture = square(open_image(self.images[index]))
            add_note(picture, f"near {signed(cosine)}")
            pictures.append(picture)
        return pictures


class UnclipImages:
    """gen by the image encoder's own generator, unCLIP Stable Diffusion 2.1 in the paper: `steps` of DPM-Solver, the
    same noise for every embedding, so that only the embedding makes a difference."""

    def __init__(self, path: str, steps: int = 25, seed: int = 0, device="cpu", size: int | None = None):
        # Imported here: it is an optional dependency, which only --unclip needs.
        try:
            from diffusers import DPMSolverMultistepScheduler, StableUnCLIPImg2ImgPipeline  # pyright: ignore[reportPrivateImportUsage] (public; it loads lazily)
        except ModuleNotFoundError as error:
            raise ValueError(f"unCLIP ({path}) needs diffusers: `pip install diffusers`") from error

        with loading_from(path):
            pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(path, use_safetensors=True)
        self.pipeline: Any = pipeline.to(device)
        # In place of the pipeline's own sampler: the paper takes 25 steps of this one.
        self.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps = steps
        self.seed = seed
        self.size = size
        self.caption = f"images by unCLIP, {steps} DPM-Solver steps"

    def __call__(self, embeddings_NE: Tensor) -> list[Image.Image]:
        pictures = []
        for embedding in embeddings_NE.to(self.pipeline.device, self.pipeline.image_encoder.dtype):
            output = self.pipeline(
                image_embeds=embedding[None],
                # No words: what is drawn comes from the embedding alone.
                prompt="",
                num_inference_steps=self.steps,
                # A new one for each picture, so that all begin with the same noise.
                generator=torch.Generator(self.pipeline.device).manual_seed(self.seed),
                # None: the size that the pipeline was trained for.
                height=self.size,
                width=self.size,
            )
            pictures += output.images
        return pictures


def draw_depth(inverse_depth: np.ndarray) -> Image.Image:
    """(h, w), larger is closer; each picture has its own range."""
    values = np.asarray(inverse_depth, float)
    # A flat map has no range to divide by: it becomes all dark.
    shares = (values - values.min()) / max(np.ptp(values), 1e-12)
    # (h, w, RGBA) -> (h, w, RGB).
    return Image.fromarray(matplotlib.colormaps["inferno"](shares, bytes=True)[..., :3].copy())


def draw_difference(features_QE: Tensor, target_QE: Tensor, mean_QE: Tensor, size: int) -> Image.Image:
    """What features have of the difference between an image's target and the mean target, `size` pixels a side.

    The difference's three main directions in this image are red, green and blue, each in units of its own root mean
    square over positions. Gray is no difference: who sees nothing sees gray everywhere.
    """
    difference = target_QE - mean_QE
    # (Q, E) -> (3, E): the right singular vectors, the largest first.
    directions = torch.linalg.svd(difference, full_matrices=False)[2][:3]
    # A direction has no sign of its own: its largest part is made positive.
    largest = directions.abs().argmax(1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    # By the target's spread, not the features' own: a weak prediction then looks pale.
    spread = (difference @ directions.T).square().mean(0).sqrt().clamp(min=1e-6)
    values = (features_QE - mean_QE) @ directions.T / spread
    # (Q, 3). A grid of fewer than three cells has fewer directions: the colors that are left stay at gray's value.
    values = F.pad(values, (0, 3 - values.shape[1]))
    side = math.isqrt(len(values))
    # Half of the colors' range is two and a half times the spread; what lies beyond is cut off.
    colors = (255 * (0.5 + values / 5).clamp(0, 1)).round().byte().reshape(side, side, 3)
    picture = Image.fromarray(colors.numpy()).resize((size, size), Image.Resampling.NEAREST)
    picture.info["has_classes"] = False
    return picture


class FeatureDecoder:
    """How a task's features are shown: by its teacher's own decoder, a map of depth by default.

    `caption` says what must be said of the pictures, `legend` each class's color.
    """

    caption = "inverse depth, bright is close; every picture has its own range"

    def __init__(self, encoder: TargetEncoder):
        self.encoder = encoder
        self.legend: dict[str, tuple[int, int, int]] = {}

    def draw(self, values: np.ndarray) -> Image.Image:
        """A map (h, w) of the teacher's values."""
        return draw_depth(values)

    @torch.no_grad()
    def teacher_output(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The teacher's own output for N images."""
        return [self.draw(values) for values in self.encoder.decode(None, images).numpy()]

    @torch.no_grad()
    def decode(
        self,
        features_NQE: Tensor,
        images: Sequence[Image.Image],
        targets_NQE: Tensor | None = None,
        mean_QE: Tensor | None = None,
    ) -> list[Image.Image]:
        """N pictures of features.

        `targets_NQE`: the images' own, `mean_QE`: the mean target (by default the targets' mean over positions). Both
        are for segmentation only.
        """
        return [self.draw(values) for values in self.encoder.decode(features_NQE, images).numpy()]


class SegmentationDecoder(FeatureDecoder):
    """Segmentation features are not decoded: OneFormer's decoder takes the finer stages from the image itself, and
    with them draws the objects whatever the features are (mean target or random model). `draw_difference` shows what
    the features alone hold."""

    caption = "the teacher's classes; of features (not teacher-assisted) the difference to the mean, which is gray"

    def __init__(self, encoder: OneFormerEncoder):
        super().__init__(encoder)
        # By number: row i of the palette is the color of class i. JSON has the numbers as text.
        names = sorted((int(index), name) for index, name in (encoder.model.config.id2label or {}).items())
        self.legend = {name: class_color(index, name) for index, name in names}
        self.palette = np.array([class_color(index, name) for index, name in names], np.uint8)

    def draw(self, values: np.ndarray) -> Image.Image:
        # (h, w) of class numbers -> (h, w, RGB).
        return Image.fromarray(self.palette[np.asarray(values)])

    @torch.no_grad()
    def decode(self, features_NQE, images, targets_NQE=None, mean_QE=None) -> list[Image.Image]:
        if targets_NQE is None:
            targets_NQE = self.encoder.encode(images)
        pictures = []
        for features_QE, target_QE in zip(features_NQE, targets_NQE, strict=True):
            # (1, E) of the image itself or (Q, E) of the training images.
            mean = target_QE.mean(0, keepdim=True) if mean_QE is None else mean_QE
            pictures.append(draw_difference(features_QE, target_QE, mean, self.encoder.size))
        return pictures


class EmbeddingDecoder(FeatureDecoder):
    """gen's: what an embedding shows is drawn, or looked up, by `decode_gen`."""

    def __init__(self, encoder: ClipImageEncoder, decode_gen: NearestImages | UnclipImages):
        super().__init__(encoder)
        self.decode_gen = decode_gen
        self.caption = decode_gen.caption

    @torch.no_grad()
    def teacher_output(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        # This teacher has no picture of its own: its embedding is shown as a predicted one is.
        return self.decode_gen(self.encoder.encode(images)[:, 0])

    def decode(self, features_NQE, images, targets_NQE=None, mean_QE=None) -> list[Image.Image]:
        return self.decode_gen(features_NQE[:, 0])


def feature_decoder(encoder: TargetEncoder, decode_gen: NearestImages | UnclipImages | None = None) -> FeatureDecoder:
    """The decoder of a task by its teacher. ValueError for a teacher that can't be decoded."""
    match encoder:
        case DepthAnythingEncoder():
            return FeatureDecoder(encoder)
        case OneFormerEncoder():
            return SegmentationDecoder(encoder)
        case ClipImageEncoder():
            if decode_gen is None:
                raise ValueError("its embeddings want unCLIP (--unclip) or a set of images (--images_for_gen)")
            return EmbeddingDecoder(encoder, decode_gen)
    raise ValueError(f"{type(encoder).__name__} has no decoder")


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
        self.features = features
        self.layers = layers
        self.by = by
        self.means = means or {}
        self.is_outside = is_outside
        self.encoders = encoders
        self.decode_gen = decode_gen
        self.decoders: dict[str, FeatureDecoder] = {}
        self.left_out: dict[str, str] = {}
        # A task that can't be decoded doesn't keep the others from being shown.
        for task, encoder in encoders.items():
            try:
                self.decoders[task] = feature_decoder(encoder, decode_gen)
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
        folder = local_folder(checkpoint)
        # Probes, given or beside the weights, come before the model's own predictors.
        if probes is None and (folder / "probes").exists():
            probes = folder / "probes"
        fitted = load_probes(probes) if probes and probes != "none" else None
        tasks = list(fitted.tasks.values()) if fitted else predicted_tasks(model)
        if not tasks:
            raise ValueError(f"{checkpoint} has no predictors: fit probes with `ola-vlm probe`, give --probes")
        without_teacher = [task["name"] for task in tasks if task["name"] not in run["teachers"]]
        if without_teacher:
            raise ValueError(f"no teacher decodes {', '.join(without_teacher)}: {NAME_TEACHERS}")
        # Models are compared by the same teachers, which are loaded once.
        if like is None:
            encoders, decode_gen = load_decoders(tasks, run, model.device, images_for_gen, unclip)
        else:
            encoders = like.encoders
            decode_gen = like.decode_gen
            layers = like.layers
        check_shapes(checkpoint, tasks, encoders)
        if fitted is None:
            # A mean target is on record only where targets were standardized.
            statistics = statistics_of(checkpoint)
            return cls(
                predictor_features(model, processor, statistics, prompt),
                encoders,
                decode_gen,
                layers,
                by="the predictors of pre-training",
                means={task: statistics_of_task.mean for task, statistics_of_task in statistics.items()},
            )
        by = f"{fitted.kind} probes of every layer"
        fitted_to = fitted.about.get("model")
        # They may have been fitted to another checkpoint, such as an earlier stage: the caption says so.
        if fitted_to and Path(fitted_to).resolve() != folder.resolve():
            by += f", fitted to {fitted_to}"
        is_outside = None
        if fitted.familiarity is not None:
            is_outside = partial(outside, fitted.familiarity, fitted.reader(model, processor))
        return cls(
            probe_features(fitted, model, processor),
            encoders,
            decode_gen,
            layers,
            by,
            # The reference's runs don't record their mean target: probes converted from them have zeros.
            means={task: mean.cpu() for task, mean in fitted.means.items() if mean.any()},
            is_outside=is_outside,
        )

    def pictures(self, images: Sequence[Image.Image | Path]) -> dict[str, Pictures]:
        """task -> heading ("image", "teacher", TARGET, NOTHING_SEEN, "layer 2", ...) -> N pictures, with notes: their
        scores, and whether the image lies outside of what the probes were fitted on."""
        opened = [open_image(image) for image in images]
        features = self.features(opened)
        # A layer that no task has is a mistake; where only some tasks have it, the others leave it out.
        for layer in self.layers or ():
            if not any(layer in layers for layers in features.values()):
                known = {task: sorted(layers) for task, layers in features.items()}
                raise ValueError(f"no task has layer {layer}: choose from {known}")
        are_outside = self.are_outside(opened)
        pictures = {}
        for task, by_layer in features.items():
            if task not in self.decoders:
                continue
            # New ones for each task: a note that is added to a picture stays on it.
            squares = [square(image) for image in opened]
            for picture, is_outside in zip(squares, are_outside, strict=True):
                if is_outside:
                    add_note(picture, OUTSIDE)
            predicted = {f"layer {layer}": by_layer[layer] for layer in self._drawn_layers(by_layer)}
            pictures[task] = {"image": squares}
            pictures[task].update(self._decoded(task, predicted, opened))
        return pictures

    def _drawn_layers(self, by_layer: Mapping[int, Tensor]) -> list[int]:
        """Those that were asked for, else DRAWN_LAYERS of them, evenly spaced."""
        if self.layers is not None:
            return [layer for layer in self.layers if layer in by_layer]
        layers = sorted(by_layer)
        if len(layers) <= DRAWN_LAYERS:
            return layers
        # The first and the last layer are always among them.
        return [layers[i] for i in np.linspace(0, len(layers) - 1, DRAWN_LAYERS).round().astype(int)]

    def are_outside(self, images: Sequence[Image.Image]) -> list[bool]:
        """Which of the images are unlike those that the probes were fitted on; none where that is not known."""
        if self.is_outside is None:
            return [False] * len(images)
        return self.is_outside(images).tolist()

    def _decoded(self, task: str, predicted: Mapping[str, Tensor], images: Sequence[Image.Image]) -> Pictures:
        """The task's columns but the image: the teacher's, and everything that is decoded from features."""
        decoder = self.decoders[task]
        targets = decoder.encoder.encode(images)
        mean = self.means.get(task)
        features = {}
        # An embedding's teacher output is its decoded target already: one column is enough.
        if not isinstance(decoder, EmbeddingDecoder):
            features[TARGET] = targets
        if mean is not None:
            features[NOTHING_SEEN] = mean.expand_as(targets)
        features.update(predicted)
        columns: Pictures = {"teacher": decoder.teacher_output(images)}
        for heading, features_NQE in features.items():
            decoded = decoder.decode(features_NQE, images, targets, mean)
            columns[heading] = decoded
            if mean is None:
                # Nothing to take off: the paper's score, high for anything near the mean.
                kind = "plain cosine"
                cosines = flat_cosine(features_NQE, targets)
            else:
                kind = "cosine"
                cosines = centered_cosine(features_NQE, targets, mean)
            for picture, cosine in zip(decoded, cosines.tolist(), strict=True):
                add_note(picture, f"{kind} {signed(cosine)}")
        return columns

    def caption(self, task: str) -> str:
        """What must be said of a task's pictures and of the notes below them."""
        if task in self.means:
            score = "cosine: mean-centered, to the image's target: 0 is nothing seen, 1 all of it"
        else:
            score = "no mean target is known: plain cosines are high even where nothing is seen"
        return f"{self.decoders[task].caption}; {score}"

    @property
    def remark(self) -> str:
        """What can't be said of the images; "" if nothing."""
        if self.is_outside is not None:
            return ""
        # No record of how the images looked that predictors, or probes of an earlier version, learned from.
        return (
            "Images of another kind than the training images can't be marked here, and their pictures may mislead: "
            f"{self.by or 'these features'} came without a record of what the training images were like (probes by "
            "`ola-vlm probe` keep one)."
        )


def check_shapes(checkpoint: str | Path, tasks: Sequence[dict], encoders: Mapping[str, TargetEncoder]) -> None:
    """ValueError if a checkpoint's features are not those of the teachers that decode them."""
    for task in tasks:
        encoder = encoders.get(task["name"])
        # Compared by the first model's teachers: a task without one is not shown.
        if encoder is None:
            continue
        shape = (task["target_length"], task["target_dim"])
        other = (encoder.target_length, encoder.target_dim)
        if shape != other:
            raise ValueError(f"{checkpoint} has {task['name']} targets of {shape}, what it is compared with {other}")


def load_decoders(
    tasks: list[dict], run: Mapping, device, images_for_gen: Sequence | None, unclip: str | None
) -> tuple[dict[str, TargetEncoder], NearestImages | UnclipImages | None]:
    """The teachers of `tasks`, and what shows gen; see `LayerViewer.load`."""
    entries = {task["name"]: run["teachers"][task["name"]] for task in tasks}
    encoders = {name: teacher.encoder for name, teacher in make_teachers(tasks, entries, device).items()}
    # gen is shown by a generator if one is named, else by the nearest images, else left out.
    if unclip:
        return encoders, UnclipImages(unclip, device=device)
    image_encoders = [encoder for encoder in encoders.values() if isinstance(encoder, ClipImageEncoder)]
    if not image_encoders:
        return encoders, None
    if images_for_gen is None:
        images_for_gen = images_of_run(run)
    if not images_for_gen:
        return encoders, None
    return encoders, NearestImages(images_for_gen, image_encoders[0])
