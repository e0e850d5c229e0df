"""Make data to begin with: `ola-vlm data miniature` renders the miniature's world, without training.

About a minute of one core. OUT/data gets images, pretrain.json and finetune.json (LLaVA's rows), questions for tests,
exact depth and masks, and contact_sheet.png. The recipes miniature_... read it from runs/miniature, and
`ola-vlm miniature` goes on with it.
"""

from .parsing import Parser, one_of, results_folder


def parser() -> Parser:
    parser = Parser("data", __doc__)
    parser.add_argument("name", type=one_of(["miniature"], "world"), metavar="NAME", help="miniature")
    parser.add_argument("--out", type=results_folder, default="runs/miniature", help="default: runs/miniature")
    parser.add_argument("--shrunk", action="store_true", help="a few scenes: to try the commands that read them")
    return parser
