"""Which visual objective makes answers better, and at which number of labels? docs/STUDY.md is the protocol.

`--stage tune` chooses each arm's settings on validation questions, with seeds of their own, and writes them to the
settings file; `--stage confirm` reads that file, trains with other seeds and asks the test questions once a trial. A
trial is a process of one thread; what is done is not done again: a stopped study goes on with the same command.
`--report` makes tables and figures again of the results that are there.
"""

import os
from pathlib import Path

from ..recipes.study import ARMS, BUDGETS, CONFIRMING_SEEDS, DEFAULT_ARMS, ON_REQUEST, TUNING_SEEDS
from .parsing import Parser, count, one_of, results_folder

# What this repository's own tuning chose.
SETTINGS_FILE = Path(__file__).parents[1] / "docs" / "study" / "settings.json"


def parser() -> Parser:
    parser = Parser("study objectives", __doc__)
    parser.add_argument(
        "--stage",
        type=one_of(("tune", "confirm"), "stage"),
        default="confirm",
        metavar="STAGE",
        help="tune or confirm",
    )
    # What is trained.
    parser.add_argument(
        "--arms",
        nargs="+",
        type=one_of(ARMS, "arm"),
        default=list(DEFAULT_ARMS),
        metavar="ARM",
        help=f"some of {', '.join(ARMS)}; default: all but {' and '.join(ON_REQUEST)}",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        help=f"default: {', '.join(map(str, TUNING_SEEDS))} to tune, 0 to {CONFIRMING_SEEDS[-1]} to confirm",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=int,
        help=f"scenes with questions; default: {', '.join(map(str, BUDGETS))}; to tune, those that choose a setting "
        "(one that plays no part at the budgets given is not tuned)",
    )
    # Where and how it runs, and which settings it takes.
    parser.add_argument("--processes", type=count, default=os.cpu_count() or 1, help="trials at a time (a core each)")
    parser.add_argument("--out", type=results_folder, default="runs/objectives", help="default: runs/objectives")
    parser.add_argument(
        "--settings",
        type=Path,
        default=SETTINGS_FILE,
        help="where tuning writes what it chose, and confirming reads it; default: docs/study/settings.json of a "
        "clone (an installed package has none: give one)",
    )
    # What else a run can be for.
    parser.add_argument(
        "--report",
        action="store_true",
        help="only report the results in --out (of confirming runs: of the arms, seeds and budgets given)",
    )
    parser.add_argument("--pack", type=Path, metavar="DIR", help="also put the results there, a small file an arm")
    parser.add_argument(
        "--longer",
        type=count,
        default=1,
        metavar="N",
        help="N times fine-tuning's steps and no early end, in an --out of its own: beyond the protocol",
    )
    parser.add_argument("--shrunk", action="store_true", help="2 steps on a few scenes: checks the chain only")
    return parser
