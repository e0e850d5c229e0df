"""The fields of a run as options: those of `OlaVlmArguments`, known by name before anything heavy is imported.

Our own come from `training.fields`. transformers' are read off the source of its `TrainingArguments`, whose import
takes seconds. `recipes.arguments.make_arguments` makes an `OlaVlmArguments` of what was given.
"""

import argparse
import ast
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..recipes.run_file import read_run_file
from ..training.fields import GROUPS, JSON_FIELDS, check_bounds, parse_json_field
from .parsing import Parser, did_you_mean, one_of, shipped

# Fields that may name a part that comes with the package (miniature/weights/...), which is found from any folder.
SHIPPED_PARTS = ("checkpoint", "vision_tower", "language_model")
# transformers takes these as a JSON object, or as the name of a file that holds one.
JSON_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
# Where transformers defines `TrainingArguments` and the enumerations that its fields are declared as.
ENUM_FILES = ("training_args.py", "trainer_utils.py", "debug_utils.py")
# A run's file may be a stranger's: that code of a model's author runs is allowed on the command line only.
BY_HAND_ONLY = ("trust_remote_code",)
# The words that transformers' `string_to_bool` knows, whatever their case.
TRUTHS = ("yes", "no", "true", "false", "t", "f", "y", "n", "1", "0")


class Option(NamedTuple):
    """`parts`: the types that the field is declared as. `taken`: the one as which a word is taken. `nargs`: how many
    words argparse takes for it. `has_no`: there is a --no_NAME, as its default is true. `choices`: all that it may be
    (but for None), if that is known."""

    parts: tuple[str, ...]
    taken: str
    nargs: str | None
    has_no: bool
    choices: tuple[str, ...]


def as_option(annotation: str, default: object, nargs: str | None = None, choices: Sequence[str] = ()) -> Option:
    """How transformers' HfArgumentParser takes a field of this type. `nargs`, `choices`: what the field itself asks
    for."""
    # The annotation is compared as text: its types may be classes of transformers, which isn't imported here.
    parts = tuple(annotation.split(" | "))
    taken = parts[0]
    if len(parts) > 1:
        # HfArgumentParser takes one type of a union: of `float | None` the first, of `dict | str | None` the second.
        # That is: the second, unless it is None or, in a union without None, str.
        is_first = parts[1] == "None" or ("None" not in parts and parts[1] == "str")
        taken = parts[0] if is_first else parts[1]
    has_no = False
    # A bool may stand without a value (--bf16), but for `bool | None = None`, of which transformers wants one.
    if taken == "bool" and (default is not None or "None" not in parts):
        nargs = "?"
        has_no = default is True
    elif taken.startswith("list["):
        nargs = "+"
    return Option(parts, taken, nargs, has_no, tuple(choices))


def fitted(name: str, option: Option, value: object) -> object:
    """The value of a field, from a word or a file, as the field takes it. ValueError, which names the field, for a
    value of another type or one that it can't have."""
    if value is None:
        if "None" not in option.parts:
            raise ValueError(f"{name} is null: give a value, or leave it out")
        return value
    # An object: JSON on the command line, a dict, a list or JSON in a file.
    if name in JSON_FIELDS or any(part.startswith("dict") for part in option.parts):
        return _fitted_object(name, value)
    # Of a file. Lists of the command line (--label_names a b) are looked at by transformers' parser alone.
    if isinstance(value, list):
        if not any(part.startswith("list") for part in option.parts):
            raise ValueError(f"{name} is a list, {value!r:.60}: give one value")
        return value
    # One value, taken as the type that transformers' parser would make of it.
    kinds = {"int": _whole_number, "float": _number, "bool": _truth}
    fitted_value = kinds.get(option.taken, _text)(name, value)
    if option.choices and fitted_value not in option.choices:
        meant = did_you_mean(str(fitted_value), option.choices) or f": choose one of {', '.join(option.choices)}"
        raise ValueError(f"{name} is {fitted_value!r:.60}, which is unknown{meant}")
    check_bounds(name, fitted_value)
    return fitted_value


def _number(name: str, value: object) -> float:
    # Whatever is no number stays nan, which the last check refuses together with infinities.
    number = math.nan
    # `True` is an int to Python, but `learning_rate: true` in a file is a mistake and not 1.
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r:.60}: give a number")
    return number


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    raise ValueError(f"{name} is {value!r:.60}: give a whole number")


def _truth(name: str, value: object) -> bool:
    if str(value).lower() not in TRUTHS:
        raise ValueError(f"{name} is {value!r:.60}: give true or false")
    # Of TRUTHS, the words that begin like this are the true ones.
    return str(value).lower()[0] in "yt1"


def _text(name: str, value: object) -> str:
    # YAML reads `eval_data: 0.02` as a number, though the field is a text: it needs no quotes there.
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{name} is {value!r:.60}: give a text")
    return str(value)


def _fitted_object(name: str, value: object) -> object:
    # What doesn't begin like an object is a file's name, as in `--deepspeed recipes/accelerate/zero2.json`.
    if name in JSON_FILES and isinstance(value, str) and not value.lstrip().startswith("{"):
        if not Path(value).is_file():
            raise ValueError(f"{name}: there is no file {value!r:.100}; give one, or its object as JSON")
        return value
    kind, example = JSON_FIELDS.get(name, (dict, '{"name": "value"}'))
    # Parsed to see mistakes; the value stays as it was given, since transformers' parser parses it again.
    parse_json_field(name, value, kind, example)
    return value


@cache
def own_options() -> dict[str, Option]:
    found = {}
    for group in GROUPS.values():
        for one in fields(group):
            choices = one.metadata.get("choices", ())
            # Not `one.type`: once HfArgumentParser has read the class, that is the one type which it takes of a union.
            declared = group.__annotations__[one.name]
            found[one.name] = as_option(inspect.formatannotation(declared), one.default, choices=choices)
    return found


@cache
def transformers_options() -> dict[str, Option]:
    """Of transformers' `TrainingArguments`, from its source."""
    # `find_spec` finds the package and doesn't run it. Importing it takes seconds, and help should take none.
    package = find_spec("transformers")
    assert package is not None and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0])
    classes = {}
    for file in ENUM_FILES:
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        classes.update({node.name: node for node in tree.body if isinstance(node, ast.ClassDef)})
    declared = classes["TrainingArguments"]
    found = {}
    for node in declared.body:
        # A field looks like `seed: int = field(default=42, metadata={...})`; docstrings and methods are passed over.
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
        # It is computed, and nobody's to give.
        if "init" in keywords:
            continue
        value = keywords.get("default")
        # A default that is no literal, such as a call, is as good as none: `as_option` looks for None and True only.
        default = value.value if isinstance(value, ast.Constant) else MISSING
        metadata = keywords["metadata"]
        assert isinstance(node.target, ast.Name) and isinstance(metadata, ast.Dict)
        option = as_option(
            ast.unparse(node.annotation), default, _asked(metadata, "nargs"), _asked(metadata, "choices") or ()
        )
        # Declared as an enumeration, such as `SchedulerType | str`: its values are the choices.
        if option.taken in classes:
            option = option._replace(choices=_values_of(classes[option.taken]))
        found[node.target.id] = option
    return found


def _asked(metadata: ast.Dict, name: str) -> Any:
    """What a field's metadata say under this name; None if they don't, or say it by more than a literal."""
    for key, value in zip(metadata.keys, metadata.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == name:
            try:
                # Some are expressions: the choices of `log_level` are `trainer_log_levels.keys()`. They stay unknown.
                return ast.literal_eval(value)
            except ValueError:
                return None
    return None


def _values_of(enumeration: ast.ClassDef) -> tuple[str, ...]:
    """The values of an enumeration of texts."""
    assigned = [node.value for node in enumeration.body if isinstance(node, ast.Assign)]
    return tuple(value.value for value in assigned if isinstance(value, ast.Constant) and isinstance(value.value, str))


def all_options() -> dict[str, Option]:
    # Ours last: they win where both declare a field.
    return transformers_options() | own_options()


def fitted_fields(values: Mapping, where: str) -> dict:
    """The fields of a recipe or of a file as the run takes them. ValueError for a key that is no field, with the one
    that was nearly meant, and for a value that doesn't fit."""
    known = all_options()
    taken = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}: unknown field {name}{did_you_mean(str(name), known)}")
        # To forbid it (`trust_remote_code: false`) is any file's right.
        if name in BY_HAND_ONLY and value:
            raise ValueError(f"{where}: {name} is nothing for a file, which may be a stranger's: give --{name}")
        try:
            taken[name] = fitted(name, known[name], value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return taken


class ShowAll(argparse.Action):
    """--help_all: transformers' fields, too, which takes seconds."""

    def __call__(self, parser, namespace, values, option_string=None):
        # Imported for this option alone, as it imports transformers.
        from ..recipes.arguments import FieldValues

        print(FieldValues(parser.prog).format_help())
        parser.exit()


class FieldParser(Parser):
    """A parser that takes every field of a run beside the command's own options.

    Args:
        shown: the groups of fields, and the single ones, that its help has.
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
        # `probe` has no place for a run's file: its positional arguments are models.
        self.takes_file = takes_file
        if takes_file:
            self.add_argument("run_file", metavar="RUN.yaml", nargs="?", help="a run as a file, instead of --recipe")
        self.add_argument("--recipe", metavar="NAME", help="one of `ola-vlm recipes`, or a run as a file")
        self.add_argument(
            "--help_all", nargs=0, action=ShowAll, help="this with all fields of transformers' TrainingArguments"
        )
        # All of our fields are taken; the help has those that are `shown`, by their group's title or their own name.
        for title, group in GROUPS.items():
            section = self.add_argument_group(f"fields: {title}")
            for one in fields(group):
                choices = one.metadata.get("choices")
                taken_as: Callable[[str], str] = str
                if choices:
                    taken_as = one_of(choices, one.name)
                elif one.name in SHIPPED_PARTS:
                    taken_as = shipped
                # argparse takes "%" for the beginning of a value's name.
                text_of_field = argparse.SUPPRESS
                if {title, one.name} & set(shown):
                    text_of_field = one.metadata["help"].replace("%", "%%")
                if one.name in BY_HAND_ONLY and not takes_file:
                    # No value may follow it: in `ola-vlm probe --trust_remote_code MODEL` that would be the model.
                    section.add_argument(
                        f"--{one.name}",
                        action="store_const",
                        const="true",
                        default=argparse.SUPPRESS,
                        help=text_of_field,
                    )
                    continue
                self._add_field(section, one.name, own_options()[one.name], help=text_of_field, type=taken_as)
        # transformers' fields, about a hundred, are in the help of --help_all only.
        for field_name, option in transformers_options().items():
            if field_name not in own_options():
                self._add_field(self, field_name, option, help=argparse.SUPPRESS)

    @staticmethod
    def _add_field(section, name: str, option: Option, **declared) -> None:
        # SUPPRESS: a field that isn't given leaves no trace, so the recipe's value and then the default count.
        section.add_argument(f"--{name}", nargs=option.nargs, metavar="VALUE", default=argparse.SUPPRESS, **declared)
        if option.has_no:
            section.add_argument(
                f"--no_{name}", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        # Words again, because transformers' parser reads them: it makes values of them (`make_arguments`).
        parsed.words = self._take_words(parsed)
        self._read_run(parsed)
        return parsed, unknown

    def _check_word(self, name: str, option: Option, word: str) -> None:
        try:
            fitted(name, option, word)
        except ValueError as error:
            self.error(str(error))

    def _take_words(self, parsed: argparse.Namespace) -> list[str]:
        """The given fields as words again, taken out of `parsed`."""
        words = []
        for name, option in all_options().items():
            given = vars(parsed)
            if option.has_no and given.pop(f"no_{name}", False):
                words.append(f"--no_{name}")
            if name not in given:
                continue
            value = given.pop(name)
            if isinstance(value, str):
                self._check_word(name, option, value)
            if isinstance(value, list):
                words += [f"--{name}", *value]
            elif value is None:
                # A bare --bf16.
                words.append(f"--{name}")
            else:
                # One word: by itself, a value that begins with a hyphen would be taken for an option.
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
            parsed.recipe, values = read_run_file(place)
            parsed.values = fitted_fields(values, where=place)
        except ValueError as error:
            self.error(str(error))
