"""The commands of `ola-vlm`: what each is called, and which module does its work.

A command has a module in this room, whose `parser()` declares its arguments and whose docstring is its help: importing
it is light. The work is done by `main` of another module (`@command(NAME)`), imported when the arguments are known to
be right.
"""

import importlib
from argparse import Namespace
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    # The module whose `main` does it.
    work: str
    summary: str


# In the order in which `ola-vlm --help` lists them.
COMMANDS = {
    # Training, and what it needs before.
    "train": Command("ola_vlm.train", "train one stage: --recipe NAME, or RUN.yaml [--any_field value]"),
    "recipes": Command("ola_vlm.recipes.show", "list the recipes, or print one as a file to train from: [NAME]"),
    "targets": Command(
        "ola_vlm.recipes.fill_targets", "compute the teachers' targets in advance: --recipe NAME [--shard i/n]"
    ),
    "check-data": Command(
        "ola_vlm.recipes.check_data", "count rows, images and answers, and find what can't be trained on"
    ),
    "data": Command("ola_vlm.world.dataset", "make data to begin with: data miniature"),
    # Studies in miniature.
    "miniature": Command(
        "ola_vlm.miniature.study", "train LLaVA, OLA-VLM and words in miniature, probe and compare them"
    ),
    "study": Command(
        "ola_vlm.miniature.studies", "the paper's ablations, and visual objectives: study ablations | objectives"
    ),
    # What layers hold.
    "probe": Command(
        "ola_vlm.probing.run", "how well each layer of frozen models tells what teachers see: MODEL... --images DIR"
    ),
    "target-tasks": Command(
        "ola_vlm.eval.target_tasks", "depth order, masks and images decoded from probes and predictors"
    ),
    "correlation": Command(
        "ola_vlm.eval.correlation", "probe scores against benchmark scores, over several checkpoints"
    ),
    # How well a model answers.
    "eval": Command("ola_vlm.eval.run", "ask a checkpoint a benchmark's questions, score its answers"),
    "score": Command("ola_vlm.eval.scoring", "score a file of answers"),
    "compare": Command(
        "ola_vlm.eval.compare", "compare two files of answers: paired tests, a page of the disagreements"
    ),
    # A checkpoint: to look at, to convert, to talk to, to hand on.
    "visualize": Command(
        "ola_vlm.probing.visualize", "pictures of what each layer of a checkpoint sees: CHECKPOINT IMAGE..."
    ),
    "convert": Command("ola_vlm.convert.reference", "turn a checkpoint of the reference implementation into ours"),
    "convert-tower": Command(
        "ola_vlm.convert.tower", "turn an open_clip model's ConvNeXt into a folder for vision_tower"
    ),
    "chat": Command(
        "ola_vlm.inference.chat", 'talk to a checkpoint about images in the terminal: CHECKPOINT [IMAGE ["question"]]'
    ),
    "export": Command(
        "ola_vlm.convert.export", "write a checkpoint without its predictors: an OLA-VLM as a plain LLaVA"
    ),
    "merge": Command("ola_vlm.convert.merge", "merge an adapter into its base model: ADAPTER OUT"),
    "push": Command(
        "ola_vlm.convert.push", "publish a checkpoint or an adapter on the Hub with a model card made from its run"
    ),
}


def find_command(word: str) -> str | None:
    """The command's name, from a name with hyphens or underscores; None if there is none."""
    name = word.replace("_", "-")
    return name if name in COMMANDS else None


def parse(name: str, argv: Sequence[str] | None = None) -> Namespace:
    """The command's arguments. SystemExit, one line, for a mistake; after --help, too."""
    # "target-tasks" is commands/target_tasks.py.
    module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    return module.parser().parse_args(argv)
