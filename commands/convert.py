"""The reference implementation's checkpoints (Llama and Phi-3) -> OLA-VLM, and its probes -> ours, by a table of keys.

    ola-vlm convert REFERENCE_DIR OUT [--vision_tower DIR] [--tokenizer DIR]

Nothing is guessed: a key of the checkpoint that the table doesn't know, and a weight of ours that no key provides, are
an error that names them. `convert.reference.DROPPED` says what is dropped, and why.
"""

from .parsing import Parser


def parser() -> Parser:
    parser = Parser("convert", __doc__)
    parser.add_argument("reference", metavar="REFERENCE_DIR", help="folder or repository of a checkpoint of it")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--vision_tower", help="folder or repository with the vision tower's config")
    parser.add_argument("--tokenizer", help="of the LLM, folder or repository (default: the checkpoint's own)")
    return parser
