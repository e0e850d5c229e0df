"""What every command does: a user's mistake ends in one line, an interruption in one that says how to go on."""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from ..targets.escapes import log_to_terminal, one_line, terminal

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


def as_command(
    name: str,
    function: Callable[[Sequence[str]], object],
    argv: Sequence[str] | None = None,
    start: str = "ola-vlm",
) -> None:
    """Calls `function(argv)` as what this process is for: a user's mistake ends in one line and status 1, Ctrl-C and
    SIGTERM in one that says how to go on, and 130 or 143. A fault of ours has its traceback.

    `start`: how this process was called, for the line to say.
    """
    argv = sys.argv[1:] if argv is None else argv
    log_to_terminal()
    signal.signal(signal.SIGTERM, _terminate)
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
    except Exception as error:
        if shows_traceback or not is_mistake(error):
            raise
        message = f"ola-vlm {name}: {one_line(error)}"
        status = 1
    # Here what the command had open is closed: its bars are drawn, its workers have ended.
    if status != 1:
        message = f"ola-vlm {name}: {how_to_go_on(name, argv, start)}"
        # The same Ctrl-C ended the loader's workers, of which torch complains as this process ends.
        sys.unraisablehook = lambda unraisable: None
    if os.environ.get("RANK", "0") == "0" or status == 1:
        print(message, file=sys.stderr)
    sys.exit(status)


def _terminate(*_) -> None:
    raise Terminated(128 + signal.SIGTERM)


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
    from huggingface_hub.errors import HTTPError  # of httpx: no OSError
    from safetensors import SafetensorError

    kinds = (ValueError, OSError, ImportError, HTTPError, SafetensorError)
    is_lookup = type(error) is LookupError  # its subclasses, KeyError and IndexError, are faults
    return isinstance(error, kinds) or is_lookup
