"""What each layer sees: `ola-vlm visualize CHECKPOINT IMAGE... --out DIR` (the paper's Figures 6 and VI).

A layer's predicted embeddings are decoded by the teachers: depth maps, and for gen either images that unCLIP makes of
them or the nearest of a set of images; of segmentation features the difference to the mean target is drawn. DIR gets a
PNG for each task and layers.html with all of them in one file. A row is an image: the image, the teacher's own output,
its target decoded as the layers are (the best that one of them can look like), the mean target (what one sees who sees
nothing), then a column a layer, each with its score. With `--compare` other checkpoints' rows stand above, such as a
LLaVA's above an OLA-VLM's.

The predictions are those of probes, which `ola-vlm probe` fits to every layer of any vision-language model
(`--probes`, or a checkpoint's own folder "probes"), else of the checkpoint's predictors, which learned to read the
states of pre-training: fine-tuning has changed these.
"""

import argparse

from ..recipes import RECIPES
from .parsing import Parser, recipe_of, results_folder, shipped


class VisualizeParser(Parser):
    def parse_known_args(self, args=None, namespace=None):
        parsed, unknown = super().parse_known_args(args, namespace)
        # Now, not in the command's work, whose import takes seconds.
        check(self, parsed)
        return parsed, unknown


def check(parser: Parser, args: argparse.Namespace) -> None:
    # They are matched by their order.
    if args.compare_probes is not None and len(args.compare_probes) != len(args.compare):
        parser.error(
            f"{len(args.compare_probes)} --compare_probes for {len(args.compare)} --compare: give one for each"
        )


def parser() -> Parser:
    parser = VisualizeParser("visualize", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=shipped, help="folder or name on the Hub")
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=shipped, help="files")
    parser.add_argument("--out", type=results_folder, default="layers", help="default: layers")
    # What makes pictures of embeddings (the teachers), and what predicts the embeddings (probes).
    parser.add_argument(
        "--recipe",
        type=recipe_of(RECIPES),
        metavar="NAME",
        help="whose teachers decode (default: those of the runs that trained the checkpoints)",
    )
    parser.add_argument(
        "--probes",
        metavar="DIR",
        help="folder of `ola-vlm probe`, or none (default: the checkpoint's own probes, else its predictors)",
    )
    # Other checkpoints to compare with; --compare_probes says for each of them what --probes says for the first.
    parser.add_argument(
        "--compare",
        nargs="+",
        type=shipped,
        default=[],
        metavar="CHECKPOINT",
        help="other checkpoints, whose rows stand above, by their own probes or --compare_probes",
    )
    parser.add_argument(
        "--compare_probes", nargs="+", metavar="DIR", help="folders of `ola-vlm probe`, one for each of --compare"
    )
    parser.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help="default: all, or 8 of them")
    # An embedding of gen has no picture of its own: the nearest image's is shown, or unCLIP draws one.
    parser.add_argument(
        "--images_for_gen",
        metavar="DIR",
        help="gen: show the nearest image of this folder (default: of the recipe's training images)",
    )
    parser.add_argument("--unclip", help="gen: let this unCLIP pipeline draw, folder or name")
    parser.add_argument(
        "--prompt", help='for predictors: the user\'s words behind the image (default: "Describe the image.")'
    )
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ...")
    parser.add_argument(
        "--trust_run",
        action="store_true",
        help="believe all of the checkpoint's run.json: its teachers' code runs, its training images are shown for "
        "gen",
    )
    return parser
