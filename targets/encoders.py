"""Target encoders: the frozen teachers whose features the LLM's layers are trained to predict (paper, section 3).

N images, Q positions of the target (grid * grid, row by row from the top left; 1 for gen), E width, S pixels a side.

Every encoder sees the student's square (`LlavaImageProcessor(do_pad=True)`: padded with its own mean colour, never
cropped or stretched), so that a grid cell means the same part of the picture to the student and to every teacher.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPVisionModelWithProjection,
    DepthAnythingForDepthEstimation,
    OneFormerForUniversalSegmentation,
    PreTrainedModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.llava import LlavaImageProcessor

# Fields of a config that change with its place or the library's version but not with the features.
_VOLATILE_FIELDS = {"_name_or_path", "_commit_hash", "architectures", "dtype", "transformers_version"}


def open_image(source: Image.Image | str | Path) -> Image.Image:
    """An image or file as RGB, upright and on white as transformers reads it: student and teachers see one picture.
    ValueError for more than 8 bits a channel, which would saturate, and for a square beyond Pillow's limit."""
    image = source if isinstance(source, Image.Image) else Image.open(source)
    if Image.MAX_IMAGE_PIXELS is not None and max(image.size) ** 2 > Image.MAX_IMAGE_PIXELS:
        # Pillow only warns; and a narrow image becomes a bomb when it is padded to a square.
        raise ValueError(f"{source} has {image.width} x {image.height} pixels: a decompression bomb? Shrink it first")
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"{source} has mode {image.mode}, whose values would saturate: convert it to 8 bits first")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _without_volatile(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name not in _VOLATILE_FIELDS}


def load_teacher(model_class: type[PreTrainedModel], path, dtype, device, **kwargs):
    """The model, and the side in pixels, mean and standard deviation in its folder's preprocessor_config.json."""
    values, _ = ImageProcessingMixin.get_image_processor_dict(path)
    if missing := {"image_mean", "image_std", "size"} - values.keys():
        raise ValueError(f"{path}: the image processor's configuration lacks {sorted(missing)}: add them there")
    size = values["size"]
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size["height"]
    model = model_class.from_pretrained(path, dtype=dtype, **kwargs).to(device)
    return model, size, values["image_mean"], values["image_std"]


class TargetEncoder(ABC):
    """A frozen teacher behind one small protocol: `encode`, `fingerprint`, `target_length` (Q), `target_dim` (E).

    Args:
        model: the teacher, already on its device.
        target_dim: width of its features.
        size: side in pixels of the square that the teacher sees.
        grid: side of the target's grid (24 in the paper: 576 positions), or 1 for an image embedding.
        image_mean, image_std: of the teacher's own preprocessing, in 0..1.
    """

    name: str

    def __init__(self, model: PreTrainedModel, target_dim: int, size: int, grid: int, image_mean, image_std):
        self.model = model.eval().requires_grad_(False)
        self.target_dim, self.size, self.grid = target_dim, size, grid
        mean, std, side = list(image_mean), list(image_std), {"height": size, "width": size}
        self.image_processor = LlavaImageProcessor(
            do_pad=True, do_center_crop=False, size=side, image_mean=mean, image_std=std
        )
        # What decides, besides weights and configuration, which features an image gets (a part of the cache key).
        self.geometry = {"square": "pad", "size": size, "grid": grid, "mean": mean, "std": std}
        self.geometry["resample"] = int(self.image_processor.resample)

    @property
    def target_length(self) -> int:
        return self.grid**2

    @cached_property
    def fingerprint(self) -> str:
        """A file-safe name that changes with the class, weights, configuration, numeric type, grid or geometry."""
        config = json.loads(self.model.config.to_json_string(), object_hook=_without_volatile)
        digest = hashlib.blake2b(json.dumps([config, self.geometry], sort_keys=True, default=str).encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).cpu().numpy())
        return f"{self.name}-grid{self.grid}-{digest.hexdigest()[:16]}"

    def pixel_values(self, images: list[Image.Image]) -> Tensor:
        """(N, 3, S, S) in the model's type and on its device."""
        pixels = self.image_processor(images=list(map(open_image, images)), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    # no_grad, not inference_mode: the targets take part in a loss, whose backward pass saves them.
    @torch.no_grad()
    def encode(self, images: list[Image.Image], batch_size: int = 32) -> Tensor:
        """The targets of `images`: (N, Q, E), fp32, on the CPU. No images give a tensor with N = 0."""
        parts = [torch.empty(0, self.target_length, self.target_dim)]
        for start in range(0, len(images), batch_size):
            parts.append(self._features(self.pixel_values(images[start : start + batch_size])).float().cpu())
        return torch.cat(parts)

    __call__ = encode  # on the fly: the same function of the images as a TargetCache

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, Q, E)."""


class DepthAnythingEncoder(TargetEncoder):
    """The mean of Depth-Anything's DINOv2 feature maps. One patch is one cell, so it sees grid * patch size pixels."""

    name = "depth_anything"

    def __init__(self, model, grid, image_mean, image_std):
        channels, size = model.backbone.channels[-1], grid * model.config.patch_size
        super().__init__(model, channels, size, grid, image_mean, image_std)

    @classmethod
    def from_pretrained(cls, path, grid: int = 24, dtype=torch.float32, device="cpu"):
        model, _, mean, std = load_teacher(DepthAnythingForDepthEstimation, path, dtype, device)
        return cls(model, grid, mean, std)

    def _features(self, pixels):
        return torch.stack(self.model.backbone(pixels).feature_maps).mean(0)[:, 1:]  # without the class token

    @torch.no_grad()
    def decode(self, features: Tensor, images=None, batch_size: int = 8) -> Tensor:
        """Depth pictures (inverse depth: larger is closer) of targets or predictions.

        The same feature is given to the teacher's head in place of each of its feature maps, as in the reference.

        Args:
            features: (N, Q, E).
            images: not needed (the segmentation teacher's `decode` needs them).
        Returns: (N, S, S), fp32, every picture stretched to 0..1.
        """
        depths = []
        for part in features.to(self.model.device, self.model.dtype).split(batch_size):
            tokens = F.pad(part, (0, 0, 1, 0))  # the neck drops the first token, which it takes for the class token
            neck = self.model.neck([tokens] * len(self.model.config.neck_hidden_sizes), self.grid, self.grid)
            depths.append(self.model.head(neck, self.grid, self.grid).float().cpu())
        depth = torch.cat(depths)
        depth = depth - depth.amin((1, 2), keepdim=True)
        return depth / depth.amax((1, 2), keepdim=True).clamp(min=torch.finfo(depth.dtype).tiny)


class _OneFormer(OneFormerForUniversalSegmentation):
    _keys_to_ignore_on_load_unexpected = (r"text_mapper",)  # serves its training only


class OneFormerEncoder(TargetEncoder):
    """OneFormer's last backbone feature map, bilinearly resized to the grid (paper: Swin-L on COCO, 1536 wide).

    Decoding needs the token ids of "the task is semantic": from the teacher's tokenizer, or `task_inputs`.
    """

    name = "oneformer"

    def __init__(self, model, size, grid, image_mean, image_std, task_inputs: list[int] | None = None):
        channels = model.model.pixel_level_module.encoder.channels[-1]
        super().__init__(model, channels, size, grid, image_mean, image_std)
        self.task_inputs = task_inputs

    @classmethod
    def from_pretrained(cls, path, grid: int = 24, task_inputs=None, dtype=torch.float32, device="cpu"):
        # The pixel decoder's dropout hangs on `is_training`, not on eval().
        model, size, mean, std = load_teacher(_OneFormer, path, dtype, device, is_training=False)
        if task_inputs is None and (not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").exists()):
            ids = AutoTokenizer.from_pretrained(path)("the task is semantic")["input_ids"]
            # OneFormerProcessor's way: padding is id 0, whatever the tokenizer's padding token.
            task_inputs = ids + [0] * (model.config.task_seq_len - len(ids))
        return cls(model, size, grid, mean, std, task_inputs)

    def _features(self, pixels):
        last = self.model.model.pixel_level_module.encoder(pixels).feature_maps[-1]
        return self._resize(last, (self.grid, self.grid)).flatten(2).transpose(1, 2)

    @staticmethod
    def _resize(maps: Tensor, size) -> Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    def class_and_mask_logits(self, stages: list[Tensor], task_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's class logits (N, queries, classes + 1) and mask logits (N, queries, h, w) for its backbone's
        `stages`, a list of (N, channels, h, w), and `task_inputs` (N, task_seq_len)."""
        model = self.model.model
        pixel = model.pixel_level_module.decoder(stages)
        task_token = model.task_encoder(task_inputs.to(self.model.device, self.model.dtype))
        decoded = model.transformer_module(pixel.multi_scale_features, pixel.mask_features, task_token)
        return decoded.prediction_class, decoded.prediction_masks

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
        if self.task_inputs is None:
            raise ValueError("no ids of 'the task is semantic': save a tokenizer with the teacher or pass task_inputs")
        labels = []
        for i, image in enumerate(images):
            stages = list(self.model.model.pixel_level_module.encoder(self.pixel_values([image])).feature_maps)
            if features is not None:
                grid = features[i : i + 1].to(stages[-1]).transpose(1, 2).unflatten(2, (self.grid, self.grid))
                stages[-1] = self._resize(grid, stages[-1].shape[-2:])
            classes, masks = self.class_and_mask_logits(stages, torch.tensor([self.task_inputs]))
            # As OneFormer's image processor: without the null class, masks weighted by their queries' classes.
            classes, masks = classes.float().softmax(-1)[..., :-1], masks.float().sigmoid()
            scores = torch.einsum("nqc,nqhw->nchw", classes, masks)
            labels.append(self._resize(scores, (self.size, self.size)).argmax(1).cpu())
        return torch.cat(labels)


class ClipImageEncoder(TargetEncoder):
    """One projected image embedding of a CLIP vision tower (paper: the unCLIP image encoder, 1024 wide): Q = 1."""

    name = "clip_image"

    @classmethod
    def from_pretrained(cls, path, grid: int = 1, dtype=torch.float32, device="cpu"):
        """`grid` is there for all encoders to be called alike: there is one embedding for the whole image."""
        model, _, mean, std = load_teacher(CLIPVisionModelWithProjection, path, dtype, device)
        return cls(model, model.config.projection_dim, model.config.image_size, 1, mean, std)

    def _features(self, pixels):
        return self.model(pixels).image_embeds[:, None]


ENCODERS = {encoder.name: encoder for encoder in (DepthAnythingEncoder, OneFormerEncoder, ClipImageEncoder)}
