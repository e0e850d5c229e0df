"""Do better probes go with better answers (paper, Figure 2)? `ola-vlm correlation OUT EVAL_DIR... --figure FILE`.

OUT: of `ola-vlm probe`, with several checkpoints. EVAL_DIRs: of `ola-vlm eval`, one a checkpoint, all of one
benchmark. A checkpoint's probe score is the mean over its layers. Prints Pearson's r by task, with the range that is
left of it when any two checkpoints are taken out, and draws the points; they tell nothing about causes.
"""

from pathlib import Path

from .parsing import Parser


def parser() -> Parser:
    parser = Parser("correlation", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="of `ola-vlm probe`")
    parser.add_argument("folders", type=Path, nargs="+", metavar="EVAL_DIR", help="of `ola-vlm eval`")
    parser.add_argument("--figure", type=Path, required=True, help="the .png to write")
    parser.add_argument("--score", default="overall", help="of results.json (overall)")
    parser.add_argument(
        "--plain", action="store_true", help="the paper's plain cosine instead of the mean-centered one"
    )
    return parser
