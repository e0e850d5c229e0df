"""Teachers' images a second, batched against one by one: `python benchmarks/teachers.py [--paper] [--device cuda]`.

The miniature's three teachers with their weights, and Depth-Anything-V2-Small and SigLIP-base at their real sizes with
random ones (`--paper`: Depth-Anything-V2-Large, OneFormer's Swin-L and CLIP-H instead: GPU advised). Both ways encode
the same pictures from PIL images to targets, in turns within one run; the best round counts.
"""

import argparse
import platform
import time
from functools import partial

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
)

from ola_vlm.recipes.miniature import TASKS, TEACHERS
from ola_vlm.targets.encoders import (
    ENCODERS,
    ClipImageEncoder,
    DepthAnythingEncoder,
    OneFormerEncoder,
    TargetEncoder,
    VisionEncoder,
)

# Mean and standard deviation of the channels; the speed doesn't depend on them.
HALF = [0.5] * 3, [0.5] * 3


def depth_anything(width: int, layers: int, heads: int) -> DepthAnythingEncoder:
    # Depth-Anything reads the backbone at four depths; evenly spaced here.
    taps = [layers * part // 4 for part in (1, 2, 3, 4)]
    size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    backbone = Dinov2Config(**size, image_size=518, patch_size=14, out_indices=taps, reshape_hidden_states=False)
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=width)
    return DepthAnythingEncoder(DepthAnythingForDepthEstimation(config), 24, *HALF)


def siglip() -> VisionEncoder:
    return VisionEncoder(SiglipVisionModel(SiglipVisionConfig(image_size=224, patch_size=16)), 224, 24, *HALF)


def oneformer(width: int, depths: list[int], heads: list[int], size: int) -> OneFormerEncoder:
    stages = {"depths": depths, "num_heads": heads, "out_features": [f"stage{i}" for i in range(1, 5)]}
    backbone = SwinConfig(image_size=384, embed_dim=width, window_size=12, **stages)
    model = OneFormerForUniversalSegmentation(OneFormerConfig(backbone_config=backbone, is_training=False))
    # 24: the grid to which the backbone's features are resized, 576 positions.
    return OneFormerEncoder(model, size, 24, *HALF)


def clip(width: int, layers: int, heads: int) -> ClipImageEncoder:
    size = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**size, patch_size=14, projection_dim=1024))
    return ClipImageEncoder(model, 1024, 224, 1, *HALF)


# Built when their turn comes: all at once would take gigabytes.
SMALL = {"Depth-Anything-V2-Small": lambda: depth_anything(384, 12, 6), "SigLIP-base": siglip}
PAPER = {
    "Depth-Anything-V2-Large": lambda: depth_anything(1024, 24, 16),
    "OneFormer Swin-L": lambda: oneformer(192, [2, 2, 18, 2], [6, 12, 24, 48], size=800),
    "CLIP-H": lambda: clip(1280, 32, 16),
}
# As large beside step.py's vision tower as the paper's are beside ViT-L.
NARROW = {
    "depth": lambda: depth_anything(256, 6, 4),
    "seg": lambda: oneformer(48, [2, 2, 6, 2], [2, 4, 8, 16], size=384),
    "gen": lambda: clip(320, 8, 4),
}


def miniature(name: str) -> TargetEncoder:
    # The side of the task's grid; 1 for an embedding of the whole image.
    (grid,) = [round(task["target_length"] ** 0.5) for task in TASKS if task["name"] == name]
    # A copy, as entries are taken out: what is left are arguments of `from_pretrained`.
    teacher = dict(TEACHERS[name])
    return ENCODERS[teacher.pop("encoder")].from_pretrained(teacher.pop("path"), grid=grid, **teacher)


def images_per_second(encoder: TargetEncoder, images: list, batch_sizes: list[int], rounds: int) -> list[float]:
    """The best of `rounds` for each batch size."""
    best = [0.0] * len(batch_sizes)
    # Warms up.
    encoder.encode(images[:2])
    for _ in range(rounds):
        # The loop sets the encoder's own batch size, by which `encode` divides the images.
        for i, encoder.batch_size in enumerate(batch_sizes):
            start = time.perf_counter()
            # Ends on the CPU: it has waited for the device.
            encoder.encode(images)
            best[i] = max(best[i], len(images) / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--paper", action="store_true", help="the paper's teachers at their sizes, random weights")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (360, 480, 3), dtype=np.uint8)) for _ in range(args.images)]
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()} {platform.system()}, torch {torch.__version__}, {device}, {args.dtype}")
    print(f"{args.images} images of 480 x 360, images/s:   one by one   batches of {args.batch_size}   ratio")
    teachers = {**PAPER}
    if not args.paper:
        teachers = {f"miniature {name}": partial(miniature, name) for name in TEACHERS}
        teachers.update(SMALL)
    for name, build in teachers.items():
        encoder = build()
        encoder.model.to(args.device, getattr(torch, args.dtype))
        single, batched = images_per_second(encoder, images, [1, args.batch_size], args.rounds)
        print(f"{name:<26} {encoder.size:>4} px {single:>18.1f} {batched:>15.1f} {batched / single:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
