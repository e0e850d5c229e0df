"""Target tasks (the paper's Table 8): what probes (`ola-vlm probe`'s OUT) are worth once the teachers decode them.

    ola-vlm target-tasks OUT [--da2k FOLDER] [--coco FOLDER] [--miniature ROOT] [--gallery DIR]

depth: DA-2K accuracy, the share of point pairs whose closer point has the larger decoded inverse depth. seg: mIoU over
the data set, and the reference's variant (mean over images); teacher-assisted, as only the last stage of the teacher's
backbone is decoded from features. gen: Frechet distance between features of the images and of what is decoded from
their embeddings; here the image of --gallery with the nearest gen embedding stands in for unCLIP's, and --features
(the gen teacher by default) for Inception.

Each for the probes of every layer, for the model's own predictors if it has some, and as bounds for the teacher
itself, its targets decoded the same way, and the mean target. Writes OUT/target_tasks.json and prints a table; a model
that is done is not done again.
"""

import argparse
import json
from pathlib import Path

from .parsing import Parser, count


def extractor(text: str) -> dict:
    """An argument's type: an encoder as JSON, with at least its kind and its path."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from error
    if not isinstance(options, dict) or not all(isinstance(options.get(name), str) for name in ("encoder", "path")):
        raise argparse.ArgumentTypeError(f'{text!r}: give {{"encoder": KIND, "path": FOLDER_OR_NAME}}')
    return options


def parser() -> Parser:
    parser = Parser("target-tasks", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="of `ola-vlm probe`")
    # Images with known truth; at least one of these is needed.
    parser.add_argument("--da2k", type=Path, help="DA-2K's folder: annotations.json and the images it names")
    parser.add_argument("--coco", type=Path, help="folder of panoptic_val2017.json, panoptic_val2017 and val2017")
    parser.add_argument("--miniature", type=Path, help="a study's folder, whose test scenes have exact truth")
    # For gen: the pictures that embeddings are decoded to, and the features by which they are compared.
    parser.add_argument("--gallery", type=Path, help="images, the nearest of which stands for a generated one")
    parser.add_argument("--gallery_pattern", default="**/*", help='of its files ("train_*" in a study\'s data/images)')
    parser.add_argument(
        "--features",
        type=extractor,
        help="the extractor of the Frechet distance's features, as JSON like a recipe's teachers (the gen teacher)",
    )
    parser.add_argument(
        "--max_images", type=count, help="of each data set, the first ones; of the gallery, ten times that"
    )
    # How the models and teachers are loaded.
    parser.add_argument("--device_map", help="auto, cuda:1, ...")
    parser.add_argument("--model_dtype", default="auto", help="auto: the checkpoint's, float32 on a CPU")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run code that comes with a model, and with a teacher that probes.json names",
    )
    return parser
