"""Compute the teachers' targets in advance: `ola-vlm targets --recipe NAME [--any_field value] [--shard i/n]`.

It computes what the recipe's target cache lacks, and goes on when it is called again. Several processes take a part
each: `torchrun --nproc_per_node 8 -m ola_vlm.cli targets --recipe NAME`; so do several machines, by --shard.
"""

import argparse

from .fields import FieldParser


def shard(text: str) -> slice:
    """The second of eight parts, from "2/8"."""
    # "2" without a slash leaves `total` empty, which is no decimal number.
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"{text!r}: give i/n, such as 2/8 for the second of eight parts")
    # Every n-th image, not a run of them: all shards are equally long, but for one image.
    return slice(int(number) - 1, None, int(total))


def parser() -> FieldParser:
    parser = FieldParser(
        "targets", __doc__, shown=("data", "teachers"), takes="[RUN.yaml | --recipe NAME] [--shard i/n]"
    )
    # argparse converts a default that is a text: of 1/1 it makes the slice of all images.
    parser.add_argument("--shard", type=shard, default="1/1", metavar="i/n", help="the i-th of n parts of the images")
    return parser
