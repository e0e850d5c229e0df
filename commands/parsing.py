"""How a command declares its arguments. Nothing heavy is imported: help and mistakes cost no second."""

import argparse
import difflib
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ..files.escapes import one_line
from ..files.writing import check_no_file

PACKAGE = Path(__file__).parents[1]
# How the paths begin of the package's own files that a command may be given.
SHIPPED = ("miniature/weights/", "docs/scene.png")
# Not by a command's --help, which lists its options.
RECIPES_ARE_LISTED = "`ola-vlm recipes` lists all"


def did_you_mean(word: str, known: Collection[str]) -> str:
    """`": did you mean x?"` for the nearest of the known words, or for two that begin with `word`; nothing where none
    is near."""
    nearest = difflib.get_close_matches(word, known, n=1)
    if not nearest and len(word) > 2:
        nearest = [one for one in known if one.startswith(word)][:2]
    if not nearest:
        return ""
    return f": did you mean {' or '.join(nearest)}?"


def there_is_no_recipe(name: str, known: Collection[str]) -> str:
    """What is said of a name that no recipe has."""
    # Behind "did you mean x?" no colon follows.
    meant = did_you_mean(name, known) or ":"
    return f"there is no recipe {name!r}{meant} {RECIPES_ARE_LISTED}"


class Parser(argparse.ArgumentParser):
    """The arguments of the command `name`; `text` begins its help.

    Options are written --with_underscores, hyphens are accepted, nothing is abbreviated. A mistake is a SystemExit of
    one line.
    """

    noun = "option"

    def __init__(self, name: str, text: str | None, start: str = "ola-vlm"):
        # Descriptions are modules' docstrings, whose lines are laid out already.
        # No abbreviations: a new option could make one that is in somebody's script ambiguous.
        super().__init__(
            prog=f"{start} {name}",
            description=(text or "").strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    @property
    def options(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if args is None:
            args = sys.argv[1:]
        if namespace is None:
            namespace = argparse.Namespace()
        words = [self._with_underscores(word) for word in args]
        return super().parse_known_args(words, namespace)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        # argparse's own `parse_args` would refuse them, too, but wouldn't name the option that was nearly meant.
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return parsed

    def _with_underscores(self, word: str) -> str:
        """`--weight-decay=0.1` -> `--weight_decay=0.1`, if there is such an option."""
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            return word
        # Only for an option that there is: a value may begin with hyphens, too.
        spelled = "--" + name[2:].replace("-", "_")
        if spelled not in self._option_string_actions:
            return word
        return spelled + equals + value

    def refuse(self, words: Sequence[str]) -> None:
        """SystemExit for words that nothing takes."""
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        # Words behind an unknown option are probably its values: the option alone is named.
        if not options:
            self.error(f"nothing takes {', '.join(words)}")
        # Spelled as the known ones are before they are compared: --weight-decai -> --weight_decai.
        meant = did_you_mean(options[0].replace("-", "_").replace("__", "--", 1), self.options)
        self.error(f"unknown {self.noun} {', '.join(options)}{meant}")

    def error(self, message: str):
        # argparse's own `error` prints the usage first, which with a run's fields would fill the screen.
        if message.endswith(RECIPES_ARE_LISTED):
            raise SystemExit(one_line(f"{self.prog}: {message}"))
        remedy = f"`{self.prog} --help` lists all"
        # Behind "did you mean --seed?" no colon follows.
        separator = " " if message.endswith("?") else ": "
        raise SystemExit(one_line(f"{self.prog}: {message}{separator}{remedy}"))


def one_of(known: Collection[str], what: str) -> Callable[[str], str]:
    """An argument's type: one of the known words, else the nearest is named."""

    def find(word: str) -> str:
        if word not in known:
            meant = did_you_mean(word, known) or f": choose one of {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"there is no {what} {word!r}{meant}")
        return word

    return find


def recipe_of(known: Collection[str]) -> Callable[[str], str]:
    """An argument's type: the name of a recipe. There are hundreds, so a mistake doesn't list them."""

    def find(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(there_is_no_recipe(name, known))
        return name

    return find


def shipped(path: str) -> str:
    """An argument's type: a path. Those of the package's own weights and scene are found from any folder."""
    # What lies in the user's own folder comes first, even if it is called like something of the package's.
    if Path(path).exists() or not path.startswith(SHIPPED):
        return path
    own = PACKAGE / path
    if own.exists():
        return str(own)
    return path


def results_folder(path: str) -> Path:
    """An argument's type: a folder for results, which need not be there yet."""
    try:
        check_no_file(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(path)


def count(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        # 0 is refused below, in the same words as what is no number.
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return number


def add_loading_options(parser: Parser) -> None:
    """How a checkpoint is loaded."""
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ... (auto: the checkpoint's, float32 on a CPU)"
    )
    parser.add_argument("--device_map", help="auto, cuda:1, ... (default: each process its own device)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
