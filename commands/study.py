"""Studies in miniature, each with its own arguments (`ola-vlm study NAME --help`):

ablations    the paper's, Tables 3 to 6 and I to V
objectives   which visual objective makes answers better, and at which number of labels (docs/STUDY.md)
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from . import study_ablations, study_objectives
from .parsing import Parser, one_of

# Name -> what makes its parser.
STUDIES = {"ablations": study_ablations.parser, "objectives": study_objectives.parser}


class StudyParser(Parser):
    """The first word chooses the study, whose parser reads the others."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Namespace | None = None):
        # The study's own parser takes all that follows its name, `--help` too.
        words = list(sys.argv[1:] if args is None else args)
        if words and words[0] in STUDIES:
            name, *others = words
            return STUDIES[name]().parse_args(others, Namespace(study=name))
        # No study's name comes first: it is --help, or a mistake that this parser reports.
        return super().parse_args(words, namespace)


def parser() -> Parser:
    parser = StudyParser("study", __doc__)
    parser.add_argument("study", type=one_of(STUDIES, "study"), metavar="NAME", help=" or ".join(STUDIES))
    return parser
