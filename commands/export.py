"""OLA-VLM -> plain LLaVA, FastVLM if its tower is a ConvNeXt: `ola-vlm export CHECKPOINT OUT`.

Task tokens are rows of the vocabulary, so the logits stay the same.
"""

from .parsing import Parser, shipped


def parser() -> Parser:
    parser = Parser("export", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=shipped, help="folder or repository of an OLA-VLM")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    return parser
