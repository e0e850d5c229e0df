"""How a command declares its arguments. Nothing heavy is imported: help and mistakes cost no second."""

import argparse
import difflib
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ..targets.escapes import one_line

PACKAGE = Path(__file__).parents[1]
SHIPPED = ("miniature/weights/", "docs/scene.png")  # where the package's own files begin that a command may be given


def did_you_mean(word: str, known: Collection[str]) -> str:
    """`": did you mean x?"` for the nearest of the known words; nothing where none is near."""
    nearest = difflib.get_close_matches(word, known, n=1)
    if not nearest:
        return ""
    return f": did you mean {nearest[0]}?"


class Parser(argparse.ArgumentParser):
    """The arguments of the command `name`; `text` begins its help.

    Options are written --with_underscores, hyphens are accepted, nothing is abbreviated. A mistake is a SystemExit of
    one line.
    """

    noun = "option"

    def __init__(self, name: str, text: str | None, start: str = "ola-vlm"):
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
        words = sys.argv[1:] if args is None else args
        parsed = argparse.Namespace() if namespace is None else namespace
        return super().parse_known_args([self._with_underscores(word) for word in words], parsed)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return parsed

    def _with_underscores(self, word: str) -> str:
        """`--weight-decay=0.1` -> `--weight_decay=0.1`, if there is such an option."""
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            return word
        spelled = "--" + name[2:].replace("-", "_")
        if spelled not in self._option_string_actions:
            return word
        return spelled + equals + value

    def refuse(self, words: Sequence[str]) -> None:
        """SystemExit for words that nothing takes."""
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        if not options:
            self.error(f"nothing takes {', '.join(words)}")
        meant = did_you_mean(options[0].replace("-", "_").replace("__", "--", 1), self.options)
        self.error(f"unknown {self.noun} {', '.join(options)}{meant}")

    def error(self, message: str):
        remedy = f"`{self.prog} --help` lists all"
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


def shipped(path: str) -> str:
    """An argument's type: a path. Those of the package's own weights and scene are found from any folder."""
    if Path(path).exists() or not path.startswith(SHIPPED):
        return path
    own = PACKAGE / path
    return str(own) if own.exists() else path


def count(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
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
