"""What every command does: a user's mistake ends in one line, an interruption in one that says how to go on."""

import os
import select
import shlex
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import NoReturn

from ..files.escapes import log_to_terminal, one_line, terminal
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
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            raise
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
    # Said by one process: torchrun and accelerate number theirs in RANK, which no single process has.
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
    if argv is None:
        argv = sys.argv[1:]
    log_to_terminal()
    # By default SIGTERM ends Python at once, and no `finally` or `with` would leave things in order.
    signal.signal(signal.SIGTERM, _end)
    # It may be ignored, as by a script's `ola-vlm train ... &`: then it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    shows_traceback = bool(os.environ.get("OLA_VLM_TRACEBACK"))
    try:
        function(argv)
        # Here, not as Python ends: the reader of a pipe may be gone.
        sys.stdout.flush()
        return
    except BrokenPipeError:
        # `mistakes_in_one_line` lets it through only if the reader of our output is gone.
        _leave_closed_output()
    except KeyboardInterrupt:
        if shows_traceback:
            traceback.print_exc()
        # What shells give for a process that a signal has ended: 128 and the signal's number.
        status = 128 + signal.SIGINT
    except Terminated:
        if shows_traceback:
            traceback.print_exc()
        status = 128 + signal.SIGTERM
    except SystemExit as error:
        # Also what --help has printed may be read by nobody.
        if not error.code and _output_is_closed():
            _leave_closed_output()
        if shows_traceback and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        # The line may quote a stranger's file; control characters must not reach the terminal.
        if isinstance(error.code, str):
            error.code = terminal(error.code)
        raise
    # Here what the command had open is closed: its bars are drawn, its workers have ended.
    tell(f"ola-vlm {name}: {how_to_go_on(name, argv, start)}")
    sys.exit(status)


def _output_is_closed() -> bool:
    """Whether nobody reads our output any more, as after `... | head`; a pipe to another process may break, too."""
    try:
        output = sys.stdout.fileno()
    except ValueError:
        # No file of the system, as where a program keeps what is printed.
        return False
    # Asked of the system: what a failed write had to say may be gone, so that a second one would succeed.
    if not hasattr(select, "poll"):
        return False
    pipes = select.poll()
    pipes.register(output, 0)
    closed = select.POLLERR | select.POLLHUP
    return any(event & closed for _, event in pipes.poll(0))


def _leave_closed_output() -> NoReturn:
    """Ends without a word, with the status that a shell gives for it."""
    # Python writes what is left as it ends, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


INTERRUPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


def _end(number: int, _) -> None:
    # The same signal ended the loader's workers, of which torch complains while their loader is deleted...
    sys.unraisablehook = _again
    # ...and by an error as soon as it hears of it, which would take the interruption's place. Windows tells nobody.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, _ignore_worker)
    raise INTERRUPTIONS[signal.Signals(number)](128 + number)


def _ignore_worker(number: int, _) -> None:
    """Hears that a worker has ended, and does nothing: this process ends as well."""


def _again(unraisable) -> None:
    """Of what is raised while an object is deleted Python only tells: an interruption there comes again, when the
    object is gone."""
    for number, kind in INTERRUPTIONS.items():
        if issubclass(unraisable.exc_type, kind):
            # Raised right here it would be dropped as well: the process sends itself the signal, a moment later.
            later = threading.Timer(0.1, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()


def how_to_go_on(name: str, argv: Sequence[str], start: str = "ola-vlm") -> str:
    # Commands and options may be written with hyphens or underscores.
    needed = GOES_ON.get(name.replace("_", "-"))
    if needed is None:
        return "interrupted"
    # The same command line, with what makes it go on unless that was given already.
    words = list(argv)
    given = {word.partition("=")[0].replace("-", "_") for word in words}
    if needed and needed[0].replace("-", "_") not in given:
        words += needed
    # torchrun's number of processes on this machine: the command that began them isn't known here.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1:
        start = f"torchrun --nproc_per_node {processes} -m ola_vlm.cli"
        # `python train.py` has no command's name in front.
        if words[:1] != [name]:
            words = [name, *words]
    return f"interrupted; go on by {start} {shlex.join(words)}"


def is_mistake(error: Exception) -> bool:
    """Whether its message is for the user: what we and the libraries raise for wrong input, files and networks."""
    # The subclasses of LookupError, KeyError and IndexError, are faults.
    if isinstance(error, (ValueError, OSError, ImportError)) or type(error) is LookupError:
        return True
    # Imported here, as help and mistakes in arguments need neither. httpx's errors are no OSError.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (it is what they raise)
    from safetensors import SafetensorError

    return isinstance(error, (HTTPError, SafetensorError))
