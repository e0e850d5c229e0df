"""The fields of a run as options: those of `OlaVlmArguments`, known by name before anything heavy is imported.

Our own come from `training.fields`. transformers' are read off the source of its `TrainingArguments`, whose import
takes seconds. `recipes.arguments.make_arguments` makes an `OlaVlmArguments` of what was given.
"""

import argparse
import ast
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..recipes.run_file import read_run_file
from ..training.fields import GROUPS
from .parsing import Parser, did_you_mean, one_of, shipped

SHIPPED_PARTS = ("checkpoint", "vision_tower", "language_model")  # the package has some of its own


class Option(NamedTuple):
    """`nargs`: how many words argparse takes for it. `has_no`: there is a --no_NAME, as its default is true."""

    nargs: str | None
    has_no: bool


def as_option(annotation: str, default: object, nargs: str | None = None) -> Option:
    """How transformers' HfArgumentParser takes a field of this type. `nargs`: what the field itself asks for."""
    parts = annotation.split(" | ")
    taken = parts[0]
    if len(parts) > 1:
        # Of a union it takes one: the second, unless that is None or, where None is no part, str.
        is_first = parts[1] == "None" or ("None" not in parts and parts[1] == "str")
        taken = parts[0] if is_first else parts[1]
    if taken == "bool" and (default is not None or "None" not in parts):
        return Option("?", has_no=default is True)
    if taken.startswith("list["):
        return Option("+", has_no=False)
    return Option(nargs, has_no=False)


@cache
def own_options() -> dict[str, Option]:
    found = {}
    for group in GROUPS.values():
        for one in fields(group):
            found[one.name] = as_option(inspect.formatannotation(one.type), one.default)
    return found


@cache
def transformers_options() -> dict[str, Option]:
    """Of transformers' `TrainingArguments`, from its source."""
    package = find_spec("transformers")
    assert package is not None and package.submodule_search_locations  # it is installed
    source = Path(package.submodule_search_locations[0]) / "training_args.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    (declared,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"]
    found = {}
    for node in declared.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
        if "init" in keywords:  # it is computed, and nobody's to give
            continue
        value = keywords.get("default")
        default = value.value if isinstance(value, ast.Constant) else MISSING
        metadata = keywords["metadata"]
        assert isinstance(node.target, ast.Name) and isinstance(metadata, ast.Dict)
        found[node.target.id] = as_option(ast.unparse(node.annotation), default, _asked_nargs(metadata))
    return found


def _asked_nargs(metadata: ast.Dict) -> str | None:
    for key, value in zip(metadata.keys, metadata.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "nargs":
            return ast.literal_eval(value)
    return None


def all_options() -> dict[str, Option]:
    return transformers_options() | own_options()


def check_names(values: Mapping, where: str) -> None:
    """ValueError for a key that is no field, with the one that was nearly meant."""
    known = all_options()
    for name in values:
        if name not in known:
            raise ValueError(f"{where}: unknown field {name}{did_you_mean(str(name), known)}")


class ShowAll(argparse.Action):
    """--help_all: transformers' fields, too, which takes seconds."""

    def __call__(self, parser, namespace, values, option_string=None):
        from ..recipes.arguments import FieldValues

        print(FieldValues(parser.prog).format_help())
        parser.exit()


class FieldParser(Parser):
    """A parser that takes every field of a run beside the command's own options.

    Args:
        shown: the groups of fields that its help has.
        takes: the command's own arguments, for the first line of its help.
        takes_file: whether a run as a file may be given in a recipe's place.

    What it parses has `recipe` (the name; None), `values` (the fields that the recipe or the file sets) and `words`
    (the fields given on the command line, for transformers' parser).
    """

    noun = "field"

    def __init__(
        self,
        name: str,
        text: str | None,
        shown: Collection[str] = tuple(GROUPS),
        takes: str = "[RUN.yaml | --recipe NAME]",
        takes_file: bool = True,
    ):
        super().__init__(name, text)
        self.usage = f"{self.prog} {takes} [--any_field VALUE]"
        self.takes_file = takes_file
        if takes_file:
            self.add_argument("run_file", metavar="RUN.yaml", nargs="?", help="a run as a file, instead of --recipe")
        self.add_argument("--recipe", metavar="NAME", help="one of `ola-vlm recipes`, or a run as a file")
        self.add_argument(
            "--help_all", nargs=0, action=ShowAll, help="this with all fields of transformers' TrainingArguments"
        )
        for title, group in GROUPS.items():
            section = self.add_argument_group(f"fields: {title}")
            for one in fields(group):
                choices = one.metadata.get("choices")
                taken_as = shipped if one.name in SHIPPED_PARTS else str
                self._add_field(
                    section,
                    one.name,
                    own_options()[one.name],
                    help=one.metadata["help"].replace("%", "%%") if title in shown else argparse.SUPPRESS,
                    type=one_of(choices, one.name) if choices else taken_as,
                )
        for field_name, option in transformers_options().items():
            if field_name not in own_options():
                self._add_field(self, field_name, option, help=argparse.SUPPRESS)

    @staticmethod
    def _add_field(section, name: str, option: Option, **declared) -> None:
        section.add_argument(f"--{name}", nargs=option.nargs, metavar="VALUE", default=argparse.SUPPRESS, **declared)
        if option.has_no:
            section.add_argument(
                f"--no_{name}", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        parsed.words = self._take_words(parsed)
        self._read_run(parsed)
        return parsed, unknown

    @staticmethod
    def _take_words(parsed: argparse.Namespace) -> list[str]:
        """The given fields as words again, taken out of `parsed`."""
        words = []
        for name, option in all_options().items():
            given = vars(parsed)
            if option.has_no and given.pop(f"no_{name}", False):
                words.append(f"--no_{name}")
            if name not in given:
                continue
            value = given.pop(name)
            if isinstance(value, list):
                words += [f"--{name}", *value]
            elif value is None:  # a bare --bf16
                words.append(f"--{name}")
            else:
                words.append(f"--{name}={value}")
        return words

    def _read_run(self, parsed: argparse.Namespace) -> None:
        """Sets `recipe` and `values` by what --recipe or the first argument names."""
        place = parsed.recipe
        if self.takes_file:
            if parsed.run_file is not None and parsed.recipe is not None:
                self.error(f"both a run as a file, {parsed.run_file}, and --recipe {parsed.recipe}: give one of them")
            place = parsed.run_file or parsed.recipe
            vars(parsed).pop("run_file")
        parsed.recipe = None
        parsed.values = {}
        if place is None:
            return
        try:
            parsed.recipe, parsed.values = read_run_file(place)
            check_names(parsed.values, where=place)
        except ValueError as error:
            self.error(str(error))
