"""An adapter (LoRA) and its base model -> one checkpoint without adapters: `ola-vlm merge ADAPTER OUT`.

An adapter that was trained on 4-bit weights is merged into the base model's own, unquantized ones.
"""

from .parsing import Parser


def parser() -> Parser:
    parser = Parser("merge", __doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or repository of an adapter")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    return parser
