"""The paper's ablations in miniature: `ola-vlm study ablations`. Tables 3 to 6 and I to V, each with its rows and
seeds over the world of `ola-vlm miniature`.

Rows are trials, a process of one thread each; what is done is not done again, so that more tables, rows or seeds can
follow later, and an `--out` of `ola-vlm miniature` brings its llava and ola_vlm along. After each trial the report is
written of all that is done so far: ablations.md, ablations.json and a figure a table.
"""

import os

from ..recipes.miniature import ABLATIONS
from .parsing import Parser, count, one_of, results_folder


def parser() -> Parser:
    parser = Parser("study ablations", __doc__)
    # Tables are named by what they vary.
    parser.add_argument(
        "--tables",
        nargs="+",
        type=one_of(ABLATIONS, "table"),
        default=list(ABLATIONS),
        metavar="TABLE",
        help=f"some of {', '.join(ABLATIONS)}; default: all",
    )
    parser.add_argument("--seeds", type=count, default=1, help="seeds a row (1)")
    parser.add_argument(
        "--steps",
        type=count,
        nargs=2,
        metavar=("PT", "IFT"),
        help="steps of PT and of IFT, for a short sweep (default: the miniature's own)",
    )
    # How it runs: trials that --out has already aren't trained again.
    parser.add_argument("--out", type=results_folder, default="runs/ablations", help="default: runs/ablations")
    parser.add_argument("--workers", type=count, default=os.cpu_count() or 1, help="trials at a time (a core each)")
    parser.add_argument("--report", action="store_true", help="only report what is done so far")
    parser.add_argument("--shrunk", action="store_true", help="4 steps on a few scenes: checks the chain only")
    return parser
