"""`ola-vlm SUBCOMMAND`: thin; each subcommand is a module's `main(argv)`, imported only when it is called."""

import importlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from ola_vlm.targets.escapes import log_to_terminal, one_line, terminal

COMMANDS = {
    "train": ("ola_vlm.train", "train one stage: --recipe NAME [--any_field value]"),
    "recipes": ("ola_vlm.recipes.show", "list the recipes, or print what one sets: [NAME]"),
    "targets": ("ola_vlm.fill_targets", "compute the teachers' targets in advance: --recipe NAME [--shard i/n]"),
    "check-data": ("ola_vlm.check_data", "count rows, images and answers, and find what can't be trained on"),
    "miniature": ("ola_vlm.miniature.study", "train LLaVA and OLA-VLM in miniature, probe both, compare them"),
    "study": ("ola_vlm.miniature.ablations", "the paper's ablations in miniature: study ablations"),
    "probe": ("ola_vlm.probe", "how well each layer of frozen models tells what teachers see: MODEL... --images DIR"),
    "target-tasks": ("ola_vlm.eval.target_tasks", "depth order, masks and images decoded from probes and predictors"),
    "correlation": ("ola_vlm.eval.correlation", "probe scores against benchmark scores, over several checkpoints"),
    "eval": ("ola_vlm.eval.run", "ask a checkpoint a benchmark's questions, score its answers"),
    "score": ("ola_vlm.eval.scoring", "score a file of answers"),
    "compare": ("ola_vlm.eval.compare", "compare two files of answers: paired tests, a page of the disagreements"),
    "visualize": ("ola_vlm.visualize", "pictures of what each layer of a checkpoint sees: CHECKPOINT IMAGE..."),
    "convert": ("ola_vlm.convert.reference", "turn a checkpoint of the reference implementation into ours"),
    "convert-tower": ("ola_vlm.convert.tower", "turn an open_clip model's ConvNeXt into a folder for vision_tower"),
    "chat": ("ola_vlm.chat", 'talk to a checkpoint about images in the terminal: [IMAGE ["question"]]'),
    "export": ("ola_vlm.convert.export", "write a checkpoint of ours as a plain LLaVA model"),
    "merge": ("ola_vlm.convert.merge", "merge an adapter into its base model: ADAPTER OUT"),
    "push": ("ola_vlm.publish", "publish a checkpoint or an adapter on the Hub with a model card made from its run"),
}


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


def usage() -> str:
    lines = [f"  {name:<13} {text}" for name, (_, text) in COMMANDS.items()]
    head = "usage: ola-vlm SUBCOMMAND [arguments]   (ola-vlm SUBCOMMAND --help says more)"
    return "\n".join([head, "", *lines, "", "OLA_VLM_TRACEBACK=1 shows where an error comes from."])


def main(argv: Sequence[str] | None = None) -> None:
    """Without `argv` as this process's command (`as_command`); else errors come as they are."""
    if argv is None:
        arguments = sys.argv[1:]
        name = arguments[0] if arguments else ""
        as_command(name, main, arguments)
        return
    argv = list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = argv
    if name not in COMMANDS:
        raise SystemExit(f"ola-vlm: unknown subcommand {name!r}\n{usage()}")
    importlib.import_module(COMMANDS[name][0]).main(rest)


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


if __name__ == "__main__":
    main()
