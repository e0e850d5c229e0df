"""An open_clip checkpoint with a trunk of timm's -> a folder that is a vision tower: `ola-vlm convert-tower`.

The paper's ConvNeXt-XXL makes 24x24 tokens of 768 pixels (`recipes.paper.VISION_TOWERS`): `ola-vlm convert-tower
laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup weights/clip_convnext_xxl --image-size 768`.
"""

import argparse
from pathlib import Path

from transformers import TimmWrapperConfig, TimmWrapperModel
from transformers.utils.hub import cached_file

from ..targets.loading import find_file, loading_from, read_bin, read_json_object, read_safetensors

TRUNK = "visual.trunk."
WEIGHTS = {"open_clip_model.safetensors": read_safetensors, "open_clip_pytorch_model.bin": read_bin}


def convert_tower(checkpoint: str, image_size: int | None = None) -> TimmWrapperModel:
    """
    The trunk of an open_clip model's image half, without pooling and projection, as transformers wraps timm's models.

    `checkpoint`: folder or repository with open_clip_config.json and weights. `image_size`: pixels a side that the
    tower will see, by default those of its own training; a convolutional trunk takes any.
    Raises ValueError if there is no trunk of timm's, RuntimeError listing missing and unknown weights.
    """
    with loading_from(checkpoint, weights=False):
        fields = read_json_object(Path(cached_file(checkpoint, "open_clip_config.json")))
    vision, seen = fields["model_cfg"]["vision_cfg"], fields["preprocess_cfg"]
    if "timm_model_name" not in vision:
        raise ValueError(f"{checkpoint} has no trunk of timm's: a ViT's transformers checkpoint is a tower as it is")
    side = image_size or vision["image_size"]
    pretrained = {"input_size": [3, side, side], "mean": seen["mean"], "std": seen["std"]}
    config = TimmWrapperConfig(architecture=vision["timm_model_name"], do_pooling=False, pretrained_cfg=pretrained)
    files = {name: find_file(checkpoint, name) for name in WEIGHTS}
    name = next((name for name, file in files.items() if file is not None), None)
    if name is None:
        raise ValueError(f"{checkpoint} has none of the files {list(WEIGHTS)}")
    weights = WEIGHTS[name](files[name])
    model = TimmWrapperModel(config)
    model.timm_model.load_state_dict({k.removeprefix(TRUNK): v for k, v in weights.items() if k.startswith(TRUNK)})
    return model.eval()


def main(argv: list[str] | None = None):
    """`ola-vlm convert-tower OPEN_CLIP OUT [--image-size N]`."""
    parser = argparse.ArgumentParser(prog="ola-vlm convert-tower", description=__doc__)
    parser.add_argument("checkpoint", metavar="OPEN_CLIP", help="folder or repository of an open_clip model")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--image-size", type=int, help="pixels a side (its own training's by default)")
    args = parser.parse_args(argv)
    try:
        tower = convert_tower(args.checkpoint, args.image_size)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"ola-vlm convert-tower: {error}") from error
    tower.save_pretrained(args.out)
    print(f"Wrote the vision tower to {args.out}.")
