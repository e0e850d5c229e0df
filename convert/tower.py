"""An open_clip checkpoint with a trunk of timm's -> a folder that is a vision tower: `ola-vlm convert-tower`
(commands/convert_tower.py).
"""

from argparse import Namespace
from pathlib import Path

from transformers import TimmWrapperConfig, TimmWrapperModel
from transformers.utils.hub import cached_file

from ..commands.running import command, tell
from ..targets.loading import find_file, loading_from, read_bin, read_json_object, read_safetensors
from ..training.run_record import check_holds_no_model

# open_clip's names of the image half's weights begin so where it is one of timm's models.
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
        file = cached_file(checkpoint, "open_clip_config.json")
    # A missing file is an error of `cached_file`, never None.
    assert file is not None
    fields = read_json_object(Path(file))
    try:
        vision = fields["model_cfg"]["vision_cfg"]
        seen = fields["preprocess_cfg"]
        if "timm_model_name" not in vision:
            what = f"{checkpoint} has no trunk of timm's"
            raise ValueError(f"{what}: a ViT's transformers checkpoint is a tower as it is")
        # timm's models keep their preprocessing in `pretrained_cfg`, where `vision_preprocessing` reads it.
        side = image_size or vision["image_size"]
        pretrained = {"input_size": [3, side, side], "mean": seen["mean"], "std": seen["std"]}
    except (KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is not as open_clip writes it ({what}): fetch it again") from error
    config = TimmWrapperConfig(architecture=vision["timm_model_name"], do_pooling=False, pretrained_cfg=pretrained)  # pyright: ignore[reportCallIssue] (its fields are made by `strict`)
    found = {name: find_file(checkpoint, name) for name in WEIGHTS}
    files = {name: file for name, file in found.items() if file is not None}
    if not files:
        raise ValueError(f"{checkpoint} has none of the files {list(WEIGHTS)}")
    # Of both files safetensors' is read, which comes first in `WEIGHTS`: the other one is a pickle.
    name = next(iter(files))
    weights = WEIGHTS[name](files[name])
    model = TimmWrapperModel(config)
    # The text half, open_clip's projection and the logit scale stay behind.
    trunk = {name.removeprefix(TRUNK): value for name, value in weights.items() if name.startswith(TRUNK)}
    model.timm_model.load_state_dict(trunk)
    return model.eval()


@command("convert-tower")
def main(args: Namespace) -> None:
    check_holds_no_model(args.out)
    try:
        tower = convert_tower(args.checkpoint, args.image_size)
    except RuntimeError as error:
        # torch lists the weights that are missing or unknown: a wrong checkpoint, not a fault of the program.
        raise ValueError(error) from error
    tower.save_pretrained(args.out)
    print(f"Wrote the vision tower to {args.out}.")
    tell(f"Next: ola-vlm train with --vision_tower {args.out}")
