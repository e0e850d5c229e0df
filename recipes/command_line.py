"""The command line of whatever takes a recipe: `ola-vlm train`, `targets` and `check-data`."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import HfArgumentParser

from ..targets.escapes import log_to_terminal
from ..training.arguments import OlaVlmArguments
from . import MAKES_DATA, RECIPES


def parse_arguments(argv: Sequence[str] | None, prog: str, *parents: argparse.ArgumentParser, **fields):
    """A recipe's fields with the command line's changes: (OlaVlmArguments, a namespace of `recipe` and what `parents`
    add). `fields` go before the recipe's. SystemExit for an unknown field."""
    chooser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False, parents=parents)
    chooser.add_argument("--recipe", choices=list(RECIPES), metavar="NAME", help="one of `ola-vlm recipes`")
    own = chooser.parse_known_args(argv)[0]
    parser = HfArgumentParser(OlaVlmArguments, prog=prog, allow_abbrev=False, parents=[chooser])
    parser.set_defaults(**((RECIPES[own.recipe]() if own.recipe else {}) | fields))
    options = {"return_remaining_strings": True, "look_for_args_file": False}
    args, rest, unknown = parser.parse_args_into_dataclasses(argv, **options)
    if unknown := [*unknown, *(f"{own.recipe}.{name}" for name in vars(rest) if name not in vars(own))]:
        raise SystemExit(f"unknown field {', '.join(unknown)}: `{prog} --help` lists all")
    args.teachers = args.teachers or {}  # of a command, tasks need some
    log_to_terminal()
    logging.getLogger("ola_vlm").setLevel("INFO" if args.should_log else "WARNING")
    return args, own


def check_data_is_made(args: OlaVlmArguments, recipe: str | None) -> None:
    """SystemExit, which says what makes the data of a recipe that has data of its own, if they aren't there yet."""
    made_by = MAKES_DATA.get(str(recipe).partition("_")[0])
    if made_by and args.data == RECIPES[recipe]()["data"] and not Path(args.data).exists():
        raise SystemExit(f"the data of {recipe}, {args.data}, isn't there yet: {made_by} makes it")
