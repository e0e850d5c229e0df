"""The main job: LLaVA-1.5, OLA-VLM and words in miniature, compared. `ola-vlm miniature` = `make miniature`.

World -> components -> targets -> trials (a process each, one thread) -> report. Everything lands in --out; with
--resume a step that is done is not done again.
"""

import os

from ..recipes.miniature import CONTROL, METHODS, OBJECTIVES
from ..recipes.paper import FUSIONS
from .parsing import Parser, count, one_of, results_folder


def parser() -> Parser:
    parser = Parser("miniature", __doc__)
    parser.add_argument("--seeds", type=count, default=1, help="seeds a method (1)")
    # Some stand in several of these lists; each is named once, the default ones first.
    known = list(dict.fromkeys([*METHODS, CONTROL, *FUSIONS, *OBJECTIVES]))
    parser.add_argument(
        "--methods",
        nargs="+",
        type=one_of(known, "method"),
        default=list(METHODS),
        metavar="METHOD",
        help=f"some of {', '.join(known)}; by default {', '.join(METHODS)}",
    )
    parser.add_argument("--out", type=results_folder, default="runs/miniature", help="default: runs/miniature")
    parser.add_argument("--resume", action="store_true", help="go on with what an earlier run left in --out")
    parser.add_argument("--workers", type=count, default=(os.cpu_count() or 1) + 1, help="trials at a time")
    parser.add_argument("--shrunk", action="store_true", help="4 steps on a few scenes: checks the chain only")
    parser.add_argument("--ship", action="store_true", help="put half-precision checkpoints into miniature/weights")
    return parser
