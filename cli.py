"""`ola-vlm COMMAND`: finds it, has its arguments read, and only then imports the module that does the work."""

import importlib
import sys
from collections.abc import Sequence

from . import __version__
from .commands.parsing import did_you_mean
from .commands.running import as_command, mistakes_in_one_line
from .commands.table import COMMANDS, find_command, parse


def usage() -> str:
    lines = [
        "usage: ola-vlm COMMAND [arguments]   (ola-vlm COMMAND --help says more, ola-vlm --version which one it is)",
        "",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<13} {command.summary}")
    # For what looks like a fault of ours: a mistake ends in one line, without its traceback.
    lines += ["", "OLA_VLM_TRACEBACK=1 shows where an error comes from."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Without `argv` as this process's command (`as_command`)."""
    # `as_command` comes back here with `argv`, once it has seen to signals and exit codes.
    if argv is None:
        arguments = sys.argv[1:]
        name = ""
        if arguments:
            name = arguments[0]
        as_command(name, main, arguments)
        return
    word, *rest = argv or ["--help"]
    if word in ("-h", "--help"):
        print(usage())
        return
    if word == "--version":
        print(f"ola-vlm {__version__}")
        return
    name = find_command(word)
    if name is None:
        meant = did_you_mean(word.replace("_", "-"), COMMANDS)
        raise SystemExit(f"ola-vlm: unknown command {word!r}{meant} (`ola-vlm --help` lists all)")
    # Arguments first: a mistake in them costs no import of torch.
    args = parse(name, rest)
    with mistakes_in_one_line(name):
        importlib.import_module(COMMANDS[name].work).main(args)


if __name__ == "__main__":
    main()
