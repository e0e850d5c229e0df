"""Score a file of answers: `ola-vlm score answers.jsonl`. It needs the file alone: no model, no data.

Prints and writes (results.json beside it) the benchmark's headline numbers, then every task's and source's, each with
its standard error over questions.
"""

from .parsing import Parser


def parser() -> Parser:
    parser = Parser("score", __doc__)
    parser.add_argument("answers", metavar="ANSWERS", help="answers.jsonl, or the folder with it")
    return parser
