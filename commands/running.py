"""What every command does: a user's mistake ends in one line, an interruption in one that says how to go on."""

import os
import shlex
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

from ..targets.escapes import log_to_terminal, one_line, terminal
from .table import parse

# Commands that can be interrupted without loss -> what their command line then needs, to go on where they were.
GOES_ON = {
    "train": ("--resume_from_checkpoint", "true"),
    "miniature": ("--resume",),
    "study": (),
    "targets": (),
    "probe": (),
    "eval": (),
    "target-tasks": (),
}


class Terminated(SystemExit):
    """SIGTERM: what a scheduler, a container or torchrun sends before it kills."""


@contextmanager
def mistakes_in_one_line(name: str) -> Iterator[None]:
    """A user's mistake becomes a SystemExit of one line, which names the command; a fault of ours stays what it is."""
    try:
        yield
    except Exception as error:
        if not is_mistake(error):
            raise
        raise SystemExit(f"ola-vlm {name}: {one_line(error)}") from error


def command(name: str) -> Callable[[Callable], Callable]:
    """Decorator: `main(args)` becomes `main(argv)`, which takes the command's arguments as text, or parsed already,
    and turns mistakes into one line."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def main(argv: Sequence[str] | Namespace | None = None):
            args = argv if isinstance(argv, Namespace) else parse(name, argv)
            with mistakes_in_one_line(name):
                return function(args)

        return main

    return decorate


def tell(*lines: str) -> None:
    """What a command says last: where its results are, what can be done next. On stderr: its output stays as it is."""
    if os.environ.get("RANK", "0") != "0":
        return
    for line in lines:
        print(terminal(line), file=sys.stderr)


def as_command(
    name: str,
    function: Callable[[Sequence[str]], object],
    argv: Sequence[str] | None = None,
    start: str = "ola-vlm",
) -> None:
    """Calls `function(argv)` as what this process is for: a user's mistake (of `command`) ends in one line and status
    1, Ctrl-C and SIGTERM in one that says how to go on, and 130 or 143. A fault of ours has its traceback.

    `start`: how this process was called, for the line to say.
    """
    argv = sys.argv[1:] if argv is None else argv
    log_to_terminal()
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, _end)
    shows_traceback = bool(os.environ.get("OLA_VLM_TRACEBACK"))
    try:
        function(argv)
        return
    except KeyboardInterrupt:
        if shows_traceback:
            traceback.print_exc()
        status = 128 + signal.SIGINT
    except Terminated:
        if shows_traceback:
            traceback.print_exc()
        status = 128 + signal.SIGTERM
    except SystemExit as error:
        if shows_traceback and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        if isinstance(error.code, str):
            error.code = terminal(error.code)
        raise
    # Here what the command had open is closed: its bars are drawn, its workers have ended.
    tell(f"ola-vlm {name}: {how_to_go_on(name, argv, start)}")
    sys.exit(status)


INTERRUPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


def _end(number: int, _) -> None:
    # The same signal ended the loader's workers, of which torch complains while their loader is deleted.
    sys.unraisablehook = _again
    raise INTERRUPTIONS[signal.Signals(number)](128 + number)


def _again(unraisable) -> None:
    """Of what is raised while an object is deleted Python only tells: an interruption there comes again, when the
    object is gone."""
    for number, kind in INTERRUPTIONS.items():
        if issubclass(unraisable.exc_type, kind):
            later = threading.Timer(0.1, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()


def how_to_go_on(name: str, argv: Sequence[str], start: str = "ola-vlm") -> str:
    if name not in GOES_ON:
        return "interrupted"
    words = list(argv)
    needed = GOES_ON[name]
    if needed and not any(word.split("=")[0] == needed[0] for word in words):
        words += needed
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1:
        start = f"torchrun --nproc_per_node {processes} -m ola_vlm.cli"
        words = words if words[:1] == [name] else [name, *words]
    return f"interrupted; go on by {start} {shlex.join(words)}"


def is_mistake(error: Exception) -> bool:
    """Whether its message is for the user: what we and the libraries raise for wrong input, files and networks."""
    # The subclasses of LookupError, KeyError and IndexError, are faults.
    if isinstance(error, (ValueError, OSError, ImportError)) or type(error) is LookupError:
        return True
    from huggingface_hub.errors import HTTPError  # of httpx: no OSError  # pyright: ignore[reportPrivateImportUsage]
    from safetensors import SafetensorError

    return isinstance(error, (HTTPError, SafetensorError))
