"""A run's arguments from the command line (`commands.fields`): a recipe's or a file's fields, and what was given."""

import logging
from argparse import Namespace
from pathlib import Path

from transformers import HfArgumentParser

from ..files.escapes import log_to_terminal
from ..training.arguments import OlaVlmArguments
from . import RECIPES, TABLES


class FieldValues(HfArgumentParser):
    """transformers' parser, whose mistakes are one line instead of a list of all fields."""

    def __init__(self, prog: str):
        super().__init__(OlaVlmArguments, prog=prog, allow_abbrev=False)  # pyright: ignore[reportArgumentType] (a dataclass, which its type can't say)

    def error(self, message: str):
        # argparse would print the usage first: hundreds of fields.
        raise SystemExit(f"{self.prog}: {message}")


def make_arguments(args: Namespace, prog: str, **fields) -> OlaVlmArguments:
    """The fields of `args` (parsed by a `FieldParser`). `fields` come before the recipe's, after the given ones."""
    parser = FieldValues(prog)
    # Defaults, so that `args.words`, what was given on the command line, is stronger than both.
    parser.set_defaults(**(args.values | fields))
    # Without the flag transformers would read more arguments from a file train.args beside the script.
    (made,) = parser.parse_args_into_dataclasses(args.words, look_for_args_file=False)
    # None says that a program brings targets of its own; on a command line, tasks need teachers.
    made.teachers = made.teachers or {}
    log_to_terminal()
    # One process of a machine says what all would say.
    logging.getLogger("ola_vlm").setLevel("INFO" if made.should_log else "WARNING")
    return made


def check_checkpoint_is_made(args: OlaVlmArguments, recipe: str | None) -> None:
    """ValueError, which names the recipe to train first, if this one goes on from a run that isn't there yet."""
    checkpoint = args.checkpoint
    if checkpoint is None or Path(checkpoint).exists():
        return
    for name, other in RECIPES.items():
        if other.fields["output_dir"] == checkpoint:
            what = f"{recipe or 'this run'} goes on from {checkpoint}, which isn't there yet"
            raise ValueError(f"{what}: train it first (`ola-vlm train --recipe {name}`), or give --checkpoint")


def check_data_is_made(args: OlaVlmArguments) -> None:
    """ValueError, which says what makes the data of a recipe that has data of its own, if they aren't there yet."""
    # Of the user's own data, what is missing is said where they are opened.
    if args.data is None or Path(args.data).exists():
        return
    for table in TABLES:
        if not table.made_by:
            continue
        for name, recipe in RECIPES.items():
            if getattr(recipe, "table", None) is table and recipe.fields["data"] == args.data:
                raise ValueError(f"the data of {name}, {args.data}, isn't there yet: {table.made_by} makes it")
