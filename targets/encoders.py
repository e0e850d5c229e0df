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
from PIL import Image
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


def _stable_config(value):
    if isinstance(value, dict):
        return {key: _stable_config(item) for key, item in value.items() if key not in _VOLATILE_FIELDS}
    return value


def _to_map(features_NQE: Tensor) -> Tensor:
    """(N, Q, E) -> (N, E, grid, grid)."""
    side = round(features_NQE.shape[1] ** 0.5)
    if side * side != features_NQE.shape[1]:
        raise ValueError(
            f"{features_NQE.shape[1]} positions are no square grid: pass features of shape (N, grid^2, E)"
        )
    return features_NQE.transpose(1, 2).unflatten(2, (side, side))


class TargetEncoder(ABC):
    """A frozen teacher behind one small protocol: `encode`, `fingerprint`, `target_length`, `target_dim`.

    Args:
        model: the teacher, already on its device.
        size: side in pixels of the square that the teacher sees.
        grid: side of the target's grid (24 in the paper: 576 positions), or 1 for an image embedding.
        image_mean, image_std: of the teacher's own preprocessing, in 0..1.
    """

    name: str

    def __init__(self, model: PreTrainedModel, size: int, grid: int, image_mean: list[float], image_std: list[float]):
        self.model = model.eval().requires_grad_(False)
        self.size, self.grid = size, grid
        self.image_processor = LlavaImageProcessor(
            do_pad=True,
            do_center_crop=False,
            size={"height": size, "width": size},
            image_mean=list(image_mean),
            image_std=list(image_std),
        )

    @staticmethod
    def _preprocessing(path: str | Path) -> tuple[list[float], list[float], int]:
        """Mean, standard deviation and side in pixels, from the preprocessor_config.json of a folder or Hub name."""
        values, _ = ImageProcessingMixin.get_image_processor_dict(path)
        if missing := {"image_mean", "image_std", "size"} - values.keys():
            raise ValueError(f"{path}: the image processor's configuration lacks {sorted(missing)}: add them there")
        size = values["size"]
        if isinstance(size, dict):
            size = size.get("shortest_edge") or size["height"]
        return values["image_mean"], values["image_std"], size

    @property
    def target_length(self) -> int:
        """Q."""
        return self.grid**2

    @property
    @abstractmethod
    def target_dim(self) -> int:
        """E."""

    @property
    def geometry(self) -> dict:
        """What decides, besides weights and configuration, which features an image gets (a part of the cache key)."""
        processor = self.image_processor
        return {
            "square": "pad",
            "size": self.size,
            "grid": self.grid,
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "resample": int(processor.resample),
        }

    @cached_property
    def fingerprint(self) -> str:
        """A file-safe name that changes with the class, weights, configuration, numeric type, grid or geometry."""
        config = _stable_config(self.model.config.to_diff_dict())
        digest = hashlib.blake2b(json.dumps([config, self.geometry], sort_keys=True, default=str).encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).cpu().numpy())
        return f"{self.name}-grid{self.grid}-{digest.hexdigest()[:16]}"

    def pixel_values(self, images: list[Image.Image]) -> Tensor:
        """(N, 3, S, S) in the model's type and on its device."""
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
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
    """Depth-Anything's DINOv2 features: `features="mean"` of its feature maps (the paper's training target), or
    `"last"` (the target of the paper's probes). One patch is one grid cell, so it sees grid * patch size pixels."""

    name = "depth_anything"

    def __init__(self, model, grid, image_mean, image_std, features: str = "mean"):
        if features not in ("mean", "last"):
            raise ValueError(f"features is {features!r}: use 'mean' or 'last'")
        super().__init__(model, grid * model.config.patch_size, grid, image_mean, image_std)
        self.features = features

    @classmethod
    def from_pretrained(cls, path, grid: int = 24, features: str = "mean", dtype=torch.float32, device="cpu"):
        model = DepthAnythingForDepthEstimation.from_pretrained(path, dtype=dtype).to(device)
        mean, std, _ = cls._preprocessing(path)
        return cls(model, grid, mean, std, features)

    @property
    def target_dim(self) -> int:
        return self.model.backbone.channels[-1]

    @property
    def geometry(self) -> dict:
        return super().geometry | {"features": self.features}

    def _features(self, pixels):
        maps = [feature[:, 1:] for feature in self.model.backbone(pixels).feature_maps]  # without the class token
        return maps[-1] if self.features == "last" else torch.stack(maps).mean(0)

    @torch.no_grad()
    def decode(self, features: Tensor, images=None, batch_size: int = 8, normalize: bool = True) -> Tensor:
        """Depth pictures (inverse depth: larger is closer) of targets or predictions.

        The same feature is given to the teacher's head in place of each of its feature maps, as in the reference.

        Args:
            features: (N, Q, E).
            images: not needed (the segmentation teacher's `decode` needs them).
            normalize: stretch every picture to 0..1; else the head's own units.
        Returns: (N, S, S), fp32.
        """
        depths = [torch.empty(0, self.size, self.size)]
        for part in features.to(self.model.device, self.model.dtype).split(batch_size):
            tokens = F.pad(part, (0, 0, 1, 0))  # the neck drops the first token, which it takes for the class token
            neck = self.model.neck([tokens] * len(self.model.config.neck_hidden_sizes), self.grid, self.grid)
            depths.append(self.model.head(neck, self.grid, self.grid).float().cpu())
        depth = torch.cat(depths)
        if normalize:
            depth = depth - depth.amin((1, 2), keepdim=True)
            depth = depth / depth.amax((1, 2), keepdim=True).clamp(min=torch.finfo(depth.dtype).tiny)
        return depth


class _OneFormer(OneFormerForUniversalSegmentation):
    _keys_to_ignore_on_load_unexpected = (r"text_mapper",)  # serves its training only


class OneFormerEncoder(TargetEncoder):
    """OneFormer's last backbone feature map, bilinearly resized to the grid (paper: Swin-L on COCO, 1536 wide).

    Decoding needs the token ids of "the task is semantic": from the teacher's tokenizer, or `task_inputs`.
    """

    name = "oneformer"

    def __init__(self, model, size, grid, image_mean, image_std, task_inputs: list[int] | None = None):
        super().__init__(model, size, grid, image_mean, image_std)
        self.task_inputs = task_inputs

    @classmethod
    def from_pretrained(cls, path, grid: int = 24, task_inputs=None, dtype=torch.float32, device="cpu"):
        # The pixel decoder's dropout hangs on `is_training`, not on eval().
        model = _OneFormer.from_pretrained(path, dtype=dtype, is_training=False).to(device)
        mean, std, size = cls._preprocessing(path)
        if task_inputs is None and (not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").exists()):
            length = model.config.task_seq_len
            tokenizer = AutoTokenizer.from_pretrained(path)
            tokens = tokenizer("the task is semantic", padding="max_length", max_length=length, truncation=True)
            # OneFormerProcessor's way: padding is id 0, whatever the tokenizer's padding token.
            task_inputs = [i * m for i, m in zip(tokens["input_ids"], tokens["attention_mask"], strict=True)]
        return cls(model, size, grid, mean, std, task_inputs)

    @property
    def target_dim(self) -> int:
        return self.model.model.pixel_level_module.encoder.channels[-1]

    def _features(self, pixels):
        last = self.model.model.pixel_level_module.encoder(pixels).feature_maps[-1]
        return self._resize(last, (self.grid, self.grid)).flatten(2).transpose(1, 2)

    @staticmethod
    def _resize(maps: Tensor, size) -> Tensor:
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)

    def class_and_mask_logits(self, stages: list[Tensor], task_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's class logits (N, queries, classes + 1) and mask logits (N, queries, h, w) for its backbone's
        `stages`, a list of (N, channels, h, w), and `task_inputs` (N, task_seq_len)."""
        model = self.model.model
        pixel = model.pixel_level_module.decoder(stages)
        task_token = model.task_encoder(task_inputs.to(self.model.device, self.model.dtype))
        decoded = model.transformer_module(pixel.multi_scale_features, pixel.mask_features, task_token)
        return decoded.prediction_class, decoded.prediction_masks

    @torch.no_grad()
    def decode(self, features: Tensor | None, images: list[Image.Image] | None = None, batch_size: int = 8) -> Tensor:
        """Class maps of targets or predictions. **Teacher-assisted**: the features replace the last backbone stage
        only; the finer stages are the teacher's own, computed from the images. Say so wherever it is shown.
        (The reference also shrinks the finer stages to the last one's size; we keep them as they are.)

        Args:
            features: (N, Q, E), or None for the teacher's own class map.
            images: the N images.
        Returns: (N, S, S) class indices, int64.
        """
        if images is None:
            raise ValueError("decoding a segmentation is teacher-assisted: pass the images of the features")
        if self.task_inputs is None:
            raise ValueError(
                "no token ids for 'the task is semantic': save a tokenizer with the teacher or pass task_inputs"
            )
        labels = [torch.empty(0, self.size, self.size, dtype=torch.int64)]
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            stages = list(self.model.model.pixel_level_module.encoder(self.pixel_values(images[rows])).feature_maps)
            if features is not None:
                replacement = _to_map(features[rows].to(stages[-1].device, stages[-1].dtype))
                stages[-1] = self._resize(replacement, stages[-1].shape[-2:])
            task_inputs = torch.tensor([self.task_inputs]).expand(len(stages[-1]), -1)
            classes, masks = self.class_and_mask_logits(stages, task_inputs)
            # As OneFormer's image processor: without the null class, masks weighted by their queries' classes.
            classes, masks = classes.float().softmax(-1)[..., :-1], masks.float().sigmoid()
            scores = torch.einsum("nqc,nqhw->nchw", classes, masks)
            # One image at a time: scores at full size are classes * S * S numbers an image.
            labels += [self._resize(one, (self.size, self.size)).argmax(1).cpu() for one in scores.split(1)]
        return torch.cat(labels)


class ClipImageEncoder(TargetEncoder):
    """One projected image embedding of a CLIP vision tower (paper: the unCLIP image encoder, 1024 wide): Q = 1."""

    name = "clip_image"

    @classmethod
    def from_pretrained(cls, path, grid: int = 1, dtype=torch.float32, device="cpu"):
        """`grid` must be 1: there is one embedding for the whole image."""
        if grid != 1:
            raise ValueError(f"grid is {grid}, but clip_image has one embedding for the whole image: leave grid at 1")
        model = CLIPVisionModelWithProjection.from_pretrained(path, dtype=dtype).to(device)
        mean, std, _ = cls._preprocessing(path)
        return cls(model, model.config.image_size, 1, mean, std)

    @property
    def target_dim(self) -> int:
        return self.model.config.projection_dim

    def _features(self, pixels):
        return self.model(pixels).image_embeds[:, None]


ENCODERS: dict[str, type[TargetEncoder]] = {
    "depth_anything": DepthAnythingEncoder,
    "oneformer": OneFormerEncoder,
    "clip_image": ClipImageEncoder,
}
