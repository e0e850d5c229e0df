"""`ola-vlm SUBCOMMAND`: thin; each subcommand is a module's `main(argv)`, imported only when it is called."""

import importlib
import sys
from collections.abc import Sequence

from .recipes.command import as_command

COMMANDS = {
    "train": ("ola_vlm.train", "train one stage: --recipe NAME [--any_field value]"),
    "recipes": ("ola_vlm.recipes.show", "list the recipes, or print what one sets: [NAME]"),
    "targets": (
        "ola_vlm.recipes.fill_targets",
        "compute the teachers' targets in advance: --recipe NAME [--shard i/n]",
    ),
    "check-data": ("ola_vlm.recipes.check_data", "count rows, images and answers, and find what can't be trained on"),
    "miniature": ("ola_vlm.miniature.study", "train LLaVA and OLA-VLM in miniature, probe both, compare them"),
    "study": ("ola_vlm.miniature.ablations", "the paper's ablations in miniature: study ablations"),
    "probe": (
        "ola_vlm.probing.run",
        "how well each layer of frozen models tells what teachers see: MODEL... --images DIR",
    ),
    "target-tasks": ("ola_vlm.eval.target_tasks", "depth order, masks and images decoded from probes and predictors"),
    "correlation": ("ola_vlm.eval.correlation", "probe scores against benchmark scores, over several checkpoints"),
    "eval": ("ola_vlm.eval.run", "ask a checkpoint a benchmark's questions, score its answers"),
    "score": ("ola_vlm.eval.scoring", "score a file of answers"),
    "compare": ("ola_vlm.eval.compare", "compare two files of answers: paired tests, a page of the disagreements"),
    "visualize": (
        "ola_vlm.probing.visualize",
        "pictures of what each layer of a checkpoint sees: CHECKPOINT IMAGE...",
    ),
    "convert": ("ola_vlm.convert.reference", "turn a checkpoint of the reference implementation into ours"),
    "convert-tower": ("ola_vlm.convert.tower", "turn an open_clip model's ConvNeXt into a folder for vision_tower"),
    "chat": ("ola_vlm.inference.chat", 'talk to a checkpoint about images in the terminal: [IMAGE ["question"]]'),
    "export": ("ola_vlm.convert.export", "write a checkpoint of ours as a plain LLaVA model"),
    "merge": ("ola_vlm.convert.merge", "merge an adapter into its base model: ADAPTER OUT"),
    "push": (
        "ola_vlm.convert.push",
        "publish a checkpoint or an adapter on the Hub with a model card made from its run",
    ),
}


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


if __name__ == "__main__":
    main()
