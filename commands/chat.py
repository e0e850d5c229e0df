"""Talk to a checkpoint in the terminal: `ola-vlm chat CHECKPOINT [IMAGE ["question"]]`.

CHECKPOINT: any image-text-to-text model of transformers, a folder or a name on the Hub. With a question it answers
and ends; without one it converses: several turns, several images, Ctrl-C stops an answer.
"""

import argparse
import math

from .parsing import Parser, add_loading_options, count, shipped


def temperature(text: str) -> float:
    value = float(text)
    # float() takes "nan" and "inf", too.
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text}: choose --temperature >= 0")
    return value


def top_p(text: str) -> float:
    value = float(text)
    # A comparison with nan is false: it is refused here as well.
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: choose 0 < --top_p <= 1")
    return value


def parser() -> Parser:
    parser = Parser("chat", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=shipped, help="folder or name on the Hub")
    parser.add_argument("image", metavar="IMAGE", nargs="?", type=shipped, help="to begin with")
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="to be answered, once")
    # The defaults answer greedily: the same question gets the same answer.
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top_p", type=top_p, default=1.0, help="sample from this share of the probability (1)")
    parser.add_argument("--max_new_tokens", type=count, default=256, help="of an answer (256)")
    add_loading_options(parser)
    return parser
