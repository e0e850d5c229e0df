"""Target encoders: the frozen teachers whose features the LLM's layers are trained to predict (paper, section 3).

N images, Q positions of the target (grid * grid, row by row from the top left; 1 for gen), E width, S pixels a side.

Every encoder sees the student's square (`LlavaImageProcessor(do_pad=True)`: padded with its own mean color, never
cropped or stretched), so that a grid cell means the same part of the picture to the student and to every teacher.
The variant `resize_mode="reference"` stretches the picture to the square, as the reference implementation does (whose
student crops: `build_ola_vlm(resize_mode="reference")`).
"""

import hashlib
import inspect
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPVisionModelWithProjection,
    DepthAnythingForDepthEstimation,
    OneFormerForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.llava import LlavaImageProcessor

from .images import open_image
from .loading import find_file, load_whole, loading_from

logger = logging.getLogger(__name__)

# Raise it when the code below gives other features for the same weights and view: stored targets are computed anew.
FEATURES_VERSION = 1

# Fields of a config that change with its place or the library's version but not with the features.
_VOLATILE_FIELDS = {"_name_or_path", "_commit_hash", "architectures", "dtype", "transformers_version"}


def _without_volatile(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name not in _VOLATILE_FIELDS}


# Beginnings of the names of image processors that have no mean: pixels stay from 0 to 1 unless their fields say else.
WITHOUT_MEAN = ("GLPN",)


def read_preprocessing(path, size: int | None = None, **where) -> tuple[int, list[float], list[float]]:
    """Side in pixels of what the model sees, mean and standard deviation of values from 0 to 1, from its
    preprocessor_config.json. `size`: a side to take in place of its own, which it may lack then.

    ValueError if it lacks them, or asks for what `LlavaImageProcessor` can't do."""
    with loading_from(path, weights=False):
        values, _ = ImageProcessingMixin.get_image_processor_dict(path, **where)
    if values.get("do_flip_channel_order"):
        raise ValueError(f"{path}: its image processor turns RGB into BGR, which isn't done here: take another model")
    # What the model sees is the crop, if there is one; its size is then the shorter side before it.
    own_size = (values.get("do_center_crop") and values.get("crop_size")) or values.get("size")
    if isinstance(own_size, dict):
        own_size = own_size.get("shortest_edge") or own_size.get("height")
    mean, std = values.get("image_mean"), values.get("image_std")
    if _stays_unnormalized(values):
        mean, std = [0.0] * 3, [1.0] * 3
    found = {"size": size or own_size, "image_mean": mean, "image_std": std}
    missing = [name for name, value in found.items() if not value]
    if missing:
        remedy = "add them there"
        if missing == ["size"]:
            remedy = "add it there, or to its teacher, if that takes a size"
        raise ValueError(f"{path}: the image processor's configuration lacks {missing}: {remedy}")
    # What mean and deviation are in units of: 255 where pixels stay from 0 to 255.
    unit = 255 * rescale_factor(values)
    if unit != 1:
        for name in ("image_mean", "image_std"):
            found[name] = [value / unit for value in found[name]]
    return tuple(found.values())


def _stays_unnormalized(values: Mapping) -> bool:
    """Whether no mean is subtracted from a pixel, by an image processor's fields."""
    if values.get("do_normalize") is not None or values.get("image_mean") is not None:
        return values.get("do_normalize") is False
    # Other classes have a mean of their own, which isn't known here where the fields lack it.
    name = values.get("image_processor_type") or values.get("feature_extractor_type") or ""
    return name.startswith(WITHOUT_MEAN)


def rescale_factor(values: Mapping) -> float:
    """What a pixel, 0 to 255, is multiplied by before the mean is subtracted, by an image processor's fields."""
    if values.get("do_rescale") is False:
        return 1.0
    factor = values.get("rescale_factor")
    # As 0.00392..., written with more or fewer digits.
    if factor is None or math.isclose(255 * factor, 1, rel_tol=1e-4):
        return 1 / 255
    return factor


# Where a vision encoder's weights are in a LLaVA-like model.
OF_VISION_TOWER = {r"^(model\.)?vision_tower\.": ""}


def vision_preprocessing(
    path, config: PreTrainedConfig, size: int | None = None, **where
) -> tuple[int, list[float], list[float]]:
    """`read_preprocessing`, also of timm's models, whose configuration says it."""
    if config.model_type != "timm_wrapper":
        return read_preprocessing(path, size=size, **where)
    own = config.pretrained_cfg
    return size or own["input_size"][-1], own["mean"], own["std"]


def has_preprocessing(path, config: PreTrainedConfig) -> bool:
    """Whether `vision_preprocessing` finds something: a model may be saved without its image processor."""
    files = ("preprocessor_config.json", "processor_config.json")
    return config.model_type == "timm_wrapper" or any(find_file(path, name) for name in files)


# What fields were called when an older run.json was written.
OLD_NAMES = {"geometry": "resize_mode", "licence": "license"}


def current_names(entry: dict) -> dict:
    """An entry of a recipe's `teachers` with the fields' names of today."""
    return {OLD_NAMES.get(name, name): value for name, value in entry.items()}


def load_teacher(
    model_class,
    path,
    dtype: torch.dtype | str = torch.float32,
    device="cpu",
    license=None,
    weights: bool = True,
    **kwargs,
) -> PreTrainedModel:
    """`load_whole` on a device. `dtype`: of torch, or its name, "bfloat16". `license`: of the weights, logged.
    Without `weights` what its configuration alone tells: a model on the meta device."""
    if not weights:
        return _without_weights(model_class, path, **kwargs)
    if license:
        logger.info(f"teacher {path}: weights under {license}")
    hint = ' (if features need none, add the name to the teacher\'s "unused")'
    return load_whole(model_class, path, hint=hint, dtype=dtype, **kwargs).to(device)  # pyright: ignore[reportArgumentType] (its stub)


def _without_weights(model_class, path, config=None, revision="main", subfolder="", **_) -> PreTrainedModel:
    if config is None:
        config = model_class.config_class.from_pretrained(path, revision=revision, subfolder=subfolder)
    with torch.device("meta"):
        # The same constructor, which is private in the models' own classes.
        if model_class is AutoModel:
            return model_class.from_config(config)
        return model_class._from_config(config)


def load_vision_config(path, **where) -> PreTrainedConfig:
    """Of the vision encoder in a folder or repository; of a model of several towers, its vision half's."""
    with loading_from(path, weights=False):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **where)
    if "vision_config" in config.sub_configs:
        return config.vision_config
    return config


class TargetEncoder(ABC):
    """A frozen teacher behind one small protocol: `encode`, `fingerprint`, `target_length` (Q), `target_dim` (E).

    Args:
        model: the teacher, already on its device.
        target_dim: width of its features.
        size: side in pixels of the square that the teacher sees.
        grid: side of the target's grid (24 in the paper: 576 positions), or 1 for an image embedding.
        image_mean, image_std: of the teacher's own preprocessing, in 0..1.
        resize_mode: "pad", or "reference", which stretches.
        batch_size: images that `encode` gives to the model at once.

    `from_pretrained` of all takes `path` (name or folder), `grid`, `resize_mode`, `batch_size`, `revision`, and
    `load_teacher`'s `dtype`, `device`, `license` and `unused`: the fields of a recipe's `teachers`, which are JSON.
    A subclass defines `_open`, which `from_pretrained` calls.
    """

    name: str

    def __init__(
        self,
        model: PreTrainedModel,
        target_dim: int,
        size: int,
        grid: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        resize_mode: str = "pad",
        batch_size: int = 32,
    ):
        if resize_mode not in ("pad", "reference"):
            raise ValueError(f'resize_mode {resize_mode!r} is unknown: choose "pad" or "reference"')
        # Each teacher has parts of its own.
        self.model: Any = model.eval().requires_grad_(False)
        self.target_dim = target_dim
        self.size = size
        self.grid = grid
        self.batch_size = batch_size
        self.image_processor = LlavaImageProcessor(
            do_pad=resize_mode == "pad",
            do_center_crop=False,
            size={"height": size, "width": size},
            image_mean=list(image_mean),
            image_std=list(image_std),
        )
        # What decides, besides weights and configuration, which features an image gets (a part of the cache key).
        self.view = {
            "square": resize_mode,
            "size": size,
            "grid": grid,
            "mean": list(image_mean),
            "std": list(image_std),
            "resample": int(self.image_processor.resample),
        }

    @classmethod
    def _open(cls, path, *args, **options) -> Any:
        raise NotImplementedError

    def decode(self, features: Tensor | None, images: Sequence[Image.Image], batch_size: int = 8) -> Tensor:
        """What features show, of the teachers that have a picture to give."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, path, *args, **options) -> "TargetEncoder":
        return cls._open(path, *args, **options)

    @classmethod
    def target_shape(cls, path, grid: int, **options) -> tuple[int, int]:
        """(Q, E) of `from_pretrained(path, grid, **options)`, whose errors it has, too; it reads no weights."""
        encoder = cls._open(path, grid=grid, weights=False, **options)
        return encoder.target_length, encoder.target_dim

    @property
    def target_length(self) -> int:
        return self.grid**2

    @cached_property
    def fingerprint(self) -> str:
        """A file-safe name that changes with the class, weights, configuration, numeric type, view or version."""
        config = json.loads(self.model.config.to_json_string(), object_hook=_without_volatile)
        digest = hashlib.blake2b(json.dumps([config, self.view], sort_keys=True, default=str).encode())
        digest.update(f"version {FEATURES_VERSION}".encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            # As bytes: numpy has no bfloat16.
            digest.update(value.contiguous().flatten().view(torch.uint8).cpu().numpy())
        return f"{self.name}-grid{self.grid}-{digest.hexdigest()[:16]}"

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, 3, S, S) in the model's type and on its device."""
        pixels = self.image_processor(images=list(map(open_image, images)), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    # no_grad, not inference_mode: the targets take part in a loss, whose backward pass saves them.
    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """The targets of `images`: (N, Q, E), fp32, on the CPU. No images give a tensor with N = 0."""
        # So that the result has its shape even without images.
        parts = [torch.empty(0, self.target_length, self.target_dim)]
        for start in range(0, len(images), self.batch_size):
            parts.append(self._features_of(images[start : start + self.batch_size]).float().cpu())
        return torch.cat(parts)

    # On the fly: the same function of the images as a TargetCache.
    __call__ = encode

    def _features_of(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, Q, E) of a batch; a place for what a teacher has to know of a picture beside its square."""
        return self._features(self.pixel_values(images))

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, Q, E)."""


def _resize(maps: Tensor, side: int | Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=side, mode="bilinear", align_corners=False)


class DepthAnythingEncoder(TargetEncoder):
    """The "mean" of Depth-Anything's four DINOv2 feature maps, or the "last" one (`features`), which the reference's
    probes take. One patch is one cell, so it sees grid * patch size pixels."""

    name = "depth_anything"

    def __init__(self, model, grid, image_mean, image_std, features: str = "mean", **options):
        if features not in ("mean", "last"):
            raise ValueError(f'features {features!r} is unknown: choose "mean" or "last"')
        # All four maps of its ViT are of one width.
        channels = model.backbone.channels[-1]
        size = grid * model.config.patch_size
        super().__init__(model, channels, size, grid, image_mean, image_std, **options)
        self.view["features"] = features

    @classmethod
    def _open(
        cls, path, grid: int = 24, features="mean", resize_mode="pad", batch_size=32, revision="main", **loading
    ):
        _, mean, std = read_preprocessing(path, revision=revision)
        model = load_teacher(DepthAnythingForDepthEstimation, path, revision=revision, **loading)
        return cls(model, grid, mean, std, features, resize_mode=resize_mode, batch_size=batch_size)

    def _features(self, pixels):
        # (4, N, 1 + Q, E) -> (4, N, Q, E): without the class token.
        maps = torch.stack(self.model.backbone(pixels).feature_maps)[:, :, 1:]
        if self.view["features"] == "last":
            return maps[-1]
        return maps.mean(0)

    @torch.no_grad()
    def decode(self, features: Tensor | None, images: Sequence[Image.Image] = (), batch_size: int = 8) -> Tensor:
        """Depth pictures (larger is closer, of metric models too) of targets or predictions.

        The same feature is given to the teacher's head in place of each of its feature maps, as in the reference.

        Args:
            features: (N, Q, E), or None for the teacher's own picture of `images`, from its four feature maps.
            images: needed for that only (the segmentation teacher's `decode` always needs them).
        Returns: (N, S, S), fp32, every picture stretched to 0..1.
        """
        if features is None:
            parts = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
            depths = [self.model(self.pixel_values(part)).predicted_depth.float().cpu() for part in parts]
        else:
            depths = []
            for part in features.to(self.model.device, self.model.dtype).split(batch_size):
                # The neck drops the first token: the class token, it thinks.
                tokens = F.pad(part, (0, 0, 1, 0))
                neck = self.model.neck([tokens] * len(self.model.config.neck_hidden_sizes), self.grid, self.grid)
                depths.append(self.model.head(neck, self.grid, self.grid).float().cpu())
        depth = torch.cat(depths)
        # A metric model predicts a distance, which is larger where it is farther.
        if self.model.config.depth_estimation_type == "metric":
            depth = -depth
        # Relative depth has no scale of its own; a flat picture has no range to divide by.
        depth = depth - depth.amin((1, 2), keepdim=True)
        return depth / depth.amax((1, 2), keepdim=True).clamp(min=torch.finfo(depth.dtype).tiny)


def scores_of_masks(logits_NQC: Tensor, masks_NQHW: Tensor, of_one_query: bool = False) -> Tensor:
    """(N, classes, h, w) from a segmenter's queries, as its image processor makes them of class logits (the last is
    that of the null class) and mask logits: each query's mask times its class, added up over queries. Several queries
    that see the same make more than 1 of it. `of_one_query`: that of the query which is surest of it, a probability.
    """
    classes_NQC = logits_NQC.float().softmax(-1)[..., :-1]
    masks_NQHW = masks_NQHW.float().sigmoid()
    if not of_one_query:
        return torch.einsum("nqc,nqhw->nchw", classes_NQC, masks_NQHW)
    num_images, num_queries, num_classes = classes_NQC.shape
    scores_NCHW = masks_NQHW.new_zeros(num_images, num_classes, *masks_NQHW.shape[2:])
    # One query at a time: all at once would take as many times the memory.
    for q in range(num_queries):
        score_NCHW = classes_NQC[:, q, :, None, None] * masks_NQHW[:, q, None]
        torch.maximum(scores_NCHW, score_NCHW, out=scores_NCHW)
    return scores_NCHW


class _OneFormer(OneFormerForUniversalSegmentation):
    # It serves training only.
    _keys_to_ignore_on_load_unexpected = (r"text_mapper",)  # pyright: ignore[reportAssignmentType] (a list in the base class)


class OneFormerEncoder(TargetEncoder):
    """OneFormer's last backbone feature map, bilinearly resized to the grid (paper: Swin-L on COCO, 1536 wide).

    Decoding needs the token ids of "the task is semantic": from the teacher's tokenizer, or `task_inputs`.
    """

    name = "oneformer"
    # Checkpoints may lack them.
    unused = ("model.pixel_level_module.encoder.swin.layernorm.", "criterion.")

    def __init__(self, model, size, grid, image_mean, image_std, task_inputs: list[int] | None = None, **options):
        channels = model.model.pixel_level_module.encoder.channels[-1]
        super().__init__(model, channels, size, grid, image_mean, image_std, **options)
        self.task_inputs = task_inputs

    @classmethod
    def _open(
        cls, path, grid: int = 24, task_inputs=None, resize_mode="pad", batch_size=32, revision="main", **loading
    ):
        size, mean, std = read_preprocessing(path, revision=revision)
        # The pixel decoder's dropout depends on `is_training`, not on eval().
        loading = {"unused": cls.unused, "is_training": False, **loading}
        model = load_teacher(_OneFormer, path, revision=revision, **loading)
        # A folder without a tokenizer will do for `encode`, which needs no text.
        if task_inputs is None and (not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").exists()):
            code = {"trust_remote_code": loading.get("trust_remote_code", False)}
            with loading_from(path, weights=False):
                tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, **code)
            ids = tokenizer("the task is semantic")["input_ids"]
            # OneFormerProcessor's way: padding is id 0, whatever the tokenizer's padding token.
            task_inputs = ids + [0] * (model.config.task_seq_len - len(ids))
        return cls(model, size, grid, mean, std, task_inputs, resize_mode=resize_mode, batch_size=batch_size)

    def _features(self, pixels):
        # (N, E, h, w) -> (N, E, grid, grid) -> (N, Q, E)
        last = self.model.model.pixel_level_module.encoder(pixels).feature_maps[-1]
        return _resize(last, self.grid).flatten(2).transpose(1, 2)

    def class_and_mask_logits(self, stages: list[Tensor], task_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's class logits (N, queries, classes + 1) and mask logits (N, queries, h, w) for its backbone's
        `stages`, a list of (N, channels, h, w), and `task_inputs` (N, task_seq_len)."""
        model = self.model.model
        pixel = model.pixel_level_module.decoder(stages)
        task_token = model.task_encoder(task_inputs.to(self.model.device, self.model.dtype))
        decoded = model.transformer_module(pixel.multi_scale_features, pixel.mask_features, task_token)
        return decoded.prediction_class, decoded.prediction_masks

    def class_scores(self, stages: list[Tensor], of_one_query: bool = False) -> Tensor:
        """`scores_of_masks` (N, classes, h, w) from the backbone's `stages`."""
        if self.task_inputs is None:
            raise ValueError("no ids of 'the task is semantic': save a tokenizer with the teacher or pass task_inputs")
        task_inputs = torch.tensor([self.task_inputs]).expand(len(stages[-1]), -1)
        return scores_of_masks(*self.class_and_mask_logits(stages, task_inputs), of_one_query=of_one_query)

    @torch.no_grad()
    def decode(self, features: Tensor | None, images: list[Image.Image]) -> Tensor:
        """Class maps of targets or predictions. **Teacher-assisted**: the features replace the last backbone stage
        only; the finer stages are the teacher's own, computed from the images. Say so wherever it is shown.
        (The reference also shrinks the finer stages to the last one's size; we keep them as they are.)

        Args:
            features: (N, Q, E), or None for the teacher's own class map.
            images: the N images.
        Returns: (N, S, S) class indices, int64.
        """
        labels = []
        # One image at a time: the scores of 133 classes at the picture's size are large.
        for i, image in enumerate(images):
            stages = list(self.model.model.pixel_level_module.encoder(self.pixel_values([image])).feature_maps)
            if features is not None:
                # (1, Q, E) -> (1, E, grid, grid) -> the last stage's own size.
                grid = features[i : i + 1].to(stages[-1]).transpose(1, 2).unflatten(2, (self.grid, self.grid))
                stages[-1] = _resize(grid, stages[-1].shape[-2:])
            labels.append(_resize(self.class_scores(stages), self.size).argmax(1).cpu())
        return torch.cat(labels)


class ClipImageEncoder(TargetEncoder):
    """One projected image embedding of a CLIP vision tower (paper: the unCLIP image encoder, 1024 wide): Q = 1."""

    name = "clip_image"

    @classmethod
    def _open(cls, path, grid: int = 1, subfolder="", resize_mode="pad", batch_size=32, revision="main", **loading):
        """`path` may be a diffusers pipeline's with `subfolder` "image_encoder": the preprocessing is then read from
        its feature_extractor. `grid` is for all encoders to be called alike: there is one embedding an image."""
        beside = ""
        if subfolder:
            beside = "feature_extractor"
        # The side is the tower's own, as its position embeddings fit no other.
        _, mean, std = read_preprocessing(path, revision=revision, subfolder=beside)
        model = load_teacher(CLIPVisionModelWithProjection, path, revision=revision, subfolder=subfolder, **loading)
        config = model.config
        options = {"resize_mode": resize_mode, "batch_size": batch_size}
        return cls(model, config.projection_dim, config.image_size, 1, mean, std, **options)

    def _features(self, pixels):
        # (N, E) -> (N, 1, E).
        return self.model(pixels).image_embeds[:, None]


class VisionEncoder(TargetEncoder):
    """Any vision encoder that transformers' `AutoModel` loads, timm's among them: the grid of its last hidden state,
    bilinearly resized, or its pooled vector if `grid` is 1. Of a model of several towers, its vision half.

    In a sequence, class and register tokens come first: the patches are the last side * side tokens, where `side` is
    the largest that fits (right up to 2 * side further tokens; known models have at most a dozen).
    """

    name = "vision"

    def __init__(self, model, size, grid, image_mean, image_std, **options):
        super().__init__(model, 0, size, grid, image_mean, image_std, **options)
        if model.config.model_type == "timm_wrapper":
            # Its last_hidden_state has another layout in each family; intermediate maps are (N, E, h, w) in all.
            self.arguments = {"output_hidden_states": [-1], "norm": True}
        elif "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self.arguments = {"interpolate_pos_encoding": True}
        else:
            self.arguments = {}
        # How wide features are is seen: configurations say it in many ways.
        with torch.no_grad():
            blank = torch.zeros(1, 3, size, size, dtype=model.dtype, device=model.device)
            self.target_dim = self._features(blank).shape[-1]

    @classmethod
    def _open(
        cls, path, grid: int = 24, size=None, config=None, resize_mode="pad", batch_size=32, revision="main", **loading
    ):
        """`size`: pixels a side, that of its preprocessing by default; position embeddings are interpolated if the
        model can (a timm ViT can with `config={"model_args": {"dynamic_img_size": true}}`). `config`: fields of the
        model's configuration to change."""
        own = load_vision_config(path, revision=revision)
        own.update(config or {})
        size, mean, std = vision_preprocessing(path, own, size=size, revision=revision)
        options = {"revision": revision, "config": own, "trust_remote_code": False}
        options["key_mapping"] = OF_VISION_TOWER
        # A pooler gives one vector, which no grid is made of.
        options["unused"] = ()
        if grid > 1:
            options["unused"] = ("pooler.",)
        # The recipe's own words come last, and win.
        options.update(loading)
        model = load_teacher(AutoModel, path, **options)
        return cls(model, size, grid, mean, std, resize_mode=resize_mode, batch_size=batch_size)

    def _features(self, pixels):
        output = self.model(pixels, **self.arguments)
        if self.grid == 1:
            if output.pooler_output is None:
                raise ValueError(f"{type(self.model).__name__} pools nothing: give its task a grid as target_length")
            # Convolutional nets pool to (N, E, 1, 1).
            return output.pooler_output.flatten(1)[:, None]
        maps = output.last_hidden_state
        if "norm" in self.arguments:
            maps = output.hidden_states[-1]
        # A ViT's sequence (N, tokens, E); a convolutional net gives maps (N, E, h, w) already.
        if maps.ndim == 3:
            side = math.isqrt(maps.shape[1])
            maps = maps[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        return _resize(maps, self.grid).flatten(2).transpose(1, 2)


class Motion:
    """Targets from two frames: how the features of `source` change from a sample's previous image to each of its
    images; zero for the first one, and so for a single image.

    `source`: an encoder or a cache. Since it is the features of single images that are cached, tasks share them.
    """

    def __init__(self, source: Callable[[list[Image.Image]], Tensor]):
        self.source = source

    def __call__(self, images: list[Image.Image], counts: list[int]) -> Tensor:
        """The N images of several samples in order, `counts` of them a sample: (N, Q, E), fp32."""
        samples = self.source(images).float().split(counts)
        changes = []
        for frames in samples:
            # Nothing comes before the first frame.
            changes.append(torch.zeros_like(frames[:1]))
            changes.append(frames[1:] - frames[:-1])
        return torch.cat(changes)


ENCODERS = {one.name: one for one in (DepthAnythingEncoder, OneFormerEncoder, ClipImageEncoder, VisionEncoder)}
