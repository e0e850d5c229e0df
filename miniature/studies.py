"""`ola-vlm study NAME` -> the study's own module."""

import importlib
from argparse import Namespace

from ..commands.running import command


@command("study")
def main(args: Namespace) -> None:
    # Imported only now: the other studies' modules aren't needed.
    importlib.import_module(f".{args.study}", __package__).main(args)
