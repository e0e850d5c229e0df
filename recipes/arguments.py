"""A run's arguments from the command line (`commands.fields`): a recipe's or a file's fields, and what was given."""

import logging
from argparse import Namespace
from pathlib import Path

from transformers import HfArgumentParser

from ..targets.escapes import log_to_terminal
from ..training.arguments import OlaVlmArguments
from . import RECIPES, TABLES


class FieldValues(HfArgumentParser):
    """transformers' parser, whose mistakes are one line instead of a list of all fields."""

    def __init__(self, prog: str):
        super().__init__(OlaVlmArguments, prog=prog, allow_abbrev=False)  # pyright: ignore[reportArgumentType]

    def error(self, message: str):
        raise SystemExit(f"{self.prog}: {message}")


def make_arguments(args: Namespace, prog: str, **fields) -> OlaVlmArguments:
    """The fields of `args` (parsed by a `FieldParser`). `fields` come before the recipe's, after the given ones."""
    parser = FieldValues(prog)
    parser.set_defaults(**(args.values | fields))
    (made,) = parser.parse_args_into_dataclasses(args.words, look_for_args_file=False)
    made.teachers = made.teachers or {}  # of a command, tasks need some
    log_to_terminal()
    logging.getLogger("ola_vlm").setLevel("INFO" if made.should_log else "WARNING")
    return made


def check_data_is_made(args: OlaVlmArguments) -> None:
    """ValueError, which says what makes the data of a recipe that has data of its own, if they aren't there yet."""
    if args.data is None or Path(args.data).exists():
        return
    for table in TABLES:
        if not table.made_by:
            continue
        for name, recipe in RECIPES.items():
            if getattr(recipe, "table", None) is table and recipe.fields["data"] == args.data:
                raise ValueError(f"the data of {name}, {args.data}, isn't there yet: {table.made_by} makes it")
