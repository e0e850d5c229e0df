"""Probe a frozen model's layers: `ola-vlm probe MODEL... --images DIR --out OUT [--recipe NAME] [--any_field value]`.

MODEL: any image-text-to-text model of transformers, folders or names on the Hub. A probe on every layer of the LLM, 0
(the embeddings) to the last, tells how well the layer's states predict the features of the recipe's teachers, on
images that were held out. OUT gets probes.json (all scores), probes.png (all curves), and a folder a model with its
probes (`probing.probes.load_probes`). Interrupted, the same command goes on; more models can be added to an OUT. Of a
recipe (llama3_vit_pretrain, the paper's) its tasks, teachers, target cache, seed, and for resamplers learning_rate and
standardize_targets matter here.
"""

from .fields import FieldParser
from .parsing import count, one_of, results_folder, shipped


def parser() -> FieldParser:
    takes = "MODEL... --images DIR --out OUT [--recipe NAME]"
    parser = FieldParser("probe", __doc__, shown=("teachers", "trust_remote_code"), takes=takes, takes_file=False)
    parser.add_argument("models", nargs="+", metavar="MODEL", type=shipped, help="folders or names on the Hub")
    # Which images, how many of them, and against which of the recipe's teachers.
    parser.add_argument(
        "--images", required=True, help="a folder of images, a .json of rows, or a Hugging Face data set"
    )
    parser.add_argument("--out", type=results_folder, required=True, help="folder of the results")
    parser.add_argument("--targets", nargs="+", metavar="TASK", help="tasks of the recipe; all by default")
    # The ridge is solved exactly, from sums over the images; a resampler is trained, as the paper's probes are.
    parser.add_argument(
        "--probe", type=one_of(["ridge", "resampler"], "probe"), default="ridge", help="ridge (default) or resampler"
    )
    parser.add_argument("--test_images", help="held-out images of their own; by default a fifth of --images")
    parser.add_argument("--test_split", help="their split, if `datasets` loads them; data_split by default")
    parser.add_argument("--max_images", type=count, help="of --images, drawn by the seed; all by default")
    parser.add_argument("--batch_size", type=count, default=16, help="images a forward pass")
    parser.add_argument("--epochs", type=count, default=2, help="of a resampler")
    parser.add_argument("--step_images", type=count, default=256, help="images an optimizer step of a resampler")
    # What the models get of an image, and how they are loaded.
    parser.add_argument("--prompt", help='the words after the image (default: "Describe the image.")')
    parser.add_argument("--no_square", action="store_true", help="don't pad images to the square that teachers see")
    parser.add_argument("--model_dtype", default="auto", help="auto: the checkpoint's, float32 on a CPU")
    parser.add_argument("--device_map", help="auto, cuda:1, ...")
    return parser
