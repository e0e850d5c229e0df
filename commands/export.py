"""Take the predictors off: `ola-vlm export CHECKPOINT OUT`. An OLA-VLM becomes a plain LLaVA (FastVLM if its tower is
a ConvNeXt), a model with attached predictors what it was.

Task tokens are rows of the vocabulary, so the logits stay the same.
"""

from .parsing import Parser, shipped


def parser() -> Parser:
    parser = Parser("export", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=shipped, help="folder or repository")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    return parser
