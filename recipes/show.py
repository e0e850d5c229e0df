"""All recipes, a line each, by table of the paper; or one of them in full: `ola-vlm recipes [NAME]`."""

import argparse
import inspect
import json
import re
from dataclasses import fields as fields_of

from transformers import TrainingArguments

from ..configuration_ola_vlm import TASK_FIELDS
from ..training.arguments import OlaVlmArguments
from . import RECIPES, paper

# For the estimate. Forward passes in GFLOP: of a token through the LLM's blocks (2 x parameters), of an image through
# the tower (CLIP-L: measured in the reference; ConvNeXt: 9 times timm's 396 at 256 pixels) and of a predictor.
GFLOP = {"llama3": 13.96, "phi3": 7.25, "vit": 382.0, "convnext": 3565.0, "gen": 6.0, "depth": 96.0, "seg": 26.0}
# Rows of each data set and, assumed, its tokens a row: an image's 576, task tokens, prompt and answers.
DATA = {
    "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": (558_128, 700),
    "data/LLaVA-558K-ALLaVA-663K.json": (558_128 + 663_000, 780),
    "data/ALLaVA/ALLaVA-Caption-663K.json": (663_000, 850),
    "data/LLaVA-Instruct/llava_v1_5_mix665k.json": (665_298, 1000),
}
RATE = 16 * 1307e12 * 0.3  # 16 MI300X: their peak in dense bf16, 30% of it used


def estimated_hours(name: str) -> float | None:
    """Hours of a recipe of the paper on 16 MI300X with targets in the cache: floating-point operations by `RATE`.

    Activations are recomputed; a frozen LLM passes gradients on to the projector: 3 forward passes' worth, 4 where it
    is trained. None for data of other runs."""
    fields = RECIPES[name].fields
    if fields.get("data") not in DATA:
        return None
    (rows, tokens), words = DATA[fields["data"]], name.split("_")
    (llm,), (encoder,) = (GFLOP.keys() & words & {"llama3", "phi3"}), (GFLOP.keys() & words & {"vit", "convnext"})
    trained = fields["stage"] != "pretrain"
    gflop = (4 if trained else 3) * tokens * GFLOP[llm]
    gflop += (4 if fields["stage"] == "visual_pretrain" else 1) * GFLOP[encoder]
    if fields.get("embedding_losses", not trained):
        tasks = fields.get("tasks") or RECIPES["llama3_vit_pretrain"].fields["tasks"] * trained
        gflop += 3 * sum(GFLOP[task["name"]] * len(task["layers"]) for task in tasks)
    return rows * gflop * 1e9 / RATE / 3600


def scores(name: str) -> str:
    """The paper's numbers for the run that the recipe completes, from its table's docstring."""
    recipe = RECIPES[name]
    found = re.search(rf"^ *{re.escape(recipe.run)}\b[^_\n]*? {{2,}}(.+)$", inspect.getdoc(recipe.table), re.M)
    return found[1] if found and recipe.fields["stage"] == "finetune" else ""


def command(name: str) -> str:
    """How the recipe is started: those of the paper on two machines of 8 GPUs, the others on this one."""
    launcher = "python"
    if RECIPES[name].fields.get("data") in DATA:
        launcher = paper.LAUNCHERS[RECIPES[name].fields["stage"]]
    return f"{launcher} train.py --recipe {name}"


def listing() -> str:
    lines = [
        "",
        "The paper's runs on two machines of 8 GPUs with 80 GB each (docs/scale.md has other configurations):",
    ]
    for stage in paper.LAUNCHERS:
        lines.append(f"{paper.LAUNCHERS[stage]} train.py --recipe RUN_{stage}")
    table = None
    for name, recipe in RECIPES.items():
        if recipe.table is not table:
            table, doc = recipe.table, inspect.getdoc(recipe.table)
            columns = re.findall(r"^(\S.*):$", doc, re.M)
            lines += ["", " ".join([doc.splitlines()[0], *columns[-1:]])]
        hours = estimated_hours(name)
        time = "" if hours is None else f"{hours:.1f} h"
        lines.append(f"  {name:<58} {time:>6}  {scores(name)}".rstrip())
    return "\n".join(lines[1:])


def changes(name: str) -> dict[str, list]:
    """Field -> [the parent's value, the recipe's own] where they differ; of a task that both have, `tasks.NAME.FIELD`,
    and `tasks` alone says the names in order."""
    recipe = RECIPES[name]
    if recipe.parent is None:
        return {}

    def flat(fields: dict) -> dict:
        tasks = {task["name"]: TASK_FIELDS | task for task in fields.get("tasks") or [] if task["name"] in shared}
        parts = {f"tasks.{name}.{field}": value for name, task in tasks.items() for field, value in task.items()}
        return fields | parts | {"tasks": [task["name"] for task in fields.get("tasks") or []]}

    both = RECIPES[recipe.parent].fields, recipe.fields
    shared = set.intersection(*({task["name"] for task in fields.get("tasks") or []} for fields in both))
    old, new = map(flat, both)
    return {key: [old.get(key), new.get(key)] for key in old | new if old.get(key) != new.get(key)}


def effective(name: str) -> dict:
    """The recipe's fields, and the defaults of those that OLA-VLM adds to transformers' `TrainingArguments`."""
    known = {field.name for field in fields_of(TrainingArguments)}
    fields = {field.name: field.default for field in fields_of(OlaVlmArguments) if field.name not in known}
    fields |= RECIPES[name]()
    fields["tasks"] = fields["tasks"] and [TASK_FIELDS | task for task in fields["tasks"]]
    return fields


def main(argv: list[str] | None = None) -> None:
    """`ola-vlm recipes [NAME]`."""
    parser = argparse.ArgumentParser(prog="ola-vlm recipes", description=__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this recipe's effective configuration as JSON")
    args = parser.parse_args(argv)
    if args.name is None:
        print(listing())
    elif args.name not in RECIPES:
        raise SystemExit(f"there is no recipe {args.name}: `ola-vlm recipes` lists all")
    else:
        shown = {
            "recipe": args.name,
            "command": command(args.name),
            "parent": RECIPES[args.name].parent,
            "changes": changes(args.name),
            "fields": effective(args.name),
        }
        print(json.dumps(shown, indent=2))
