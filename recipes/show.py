"""`ola-vlm recipes`: all recipes, a line each, or one of them as a file to train from."""

from argparse import Namespace
from pathlib import Path

from ..commands.running import command, tell
from . import RECIPES, TABLES, paper
from .paper import LANGUAGE_MODELS, VISION_TOWERS
from .run_file import run_file_text
from .tables import Recipe

PACKAGE = Path(__file__).parents[1]
# For the estimate. Forward passes in GFLOP: of a token through the LLM's blocks (2 x parameters), of an image through
# the tower (CLIP-L: measured in the reference; ConvNeXt: 9 times timm's 396 at 256 pixels) and of a predictor.
TOKEN_GFLOP = {LANGUAGE_MODELS["llama3"]: 13.96, LANGUAGE_MODELS["phi3"]: 7.25, "Qwen/Qwen3-8B": 13.89}
IMAGE_GFLOP = {VISION_TOWERS["vit"]: 382.0, VISION_TOWERS["convnext"]: 3565.0}
PREDICTOR_GFLOP = {"gen": 6.0, "depth": 96.0, "seg": 26.0}
# Rows of each data set and, assumed, its tokens a row: an image's 576, task tokens, prompt and answers.
DATA = {
    "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": (558_128, 700),
    "data/LLaVA-558K-ALLaVA-663K.json": (558_128 + 663_000, 780),
    "data/ALLaVA/ALLaVA-Caption-663K.json": (663_000, 850),
    "data/LLaVA-Instruct/llava_v1_5_mix665k.json": (665_298, 1000),
}
# 16 MI300X: their peak in dense bf16, 30% of it used.
RATE = 16 * 1307e12 * 0.3


def first_stage(recipe: Recipe) -> Recipe:
    """The stage that builds the model from parts, before this one or itself."""
    # A stage names the folder that it begins with, not the recipe that wrote it.
    by_output = {other.fields["output_dir"]: other for other in RECIPES.values()}
    while "language_model" not in recipe.fields:
        recipe = by_output[recipe.fields["checkpoint"]]
    return recipe


def estimated_hours(name: str) -> float | None:
    """Hours of a recipe of the paper on 16 MI300X with targets in the cache: floating-point operations by `RATE`.

    Activations are recomputed; a frozen LLM passes gradients on to the projector: 3 forward passes' worth, 4 where it
    is trained. None for data of other runs."""
    recipe = RECIPES[name]
    fields = recipe.fields
    if fields.get("data") not in DATA:
        return None
    # What a row costs: language model, tower and, while they train, predictors.
    rows, tokens = DATA[fields["data"]]
    parts = first_stage(recipe).fields
    is_pretraining = fields["stage"] == "pretrain"
    llm_passes = 3 if is_pretraining else 4
    # A frozen tower runs forward once; nothing is recomputed for it.
    tower_passes = 4 if fields["stage"] == "visual_pretrain" else 1
    gflop = llm_passes * tokens * TOKEN_GFLOP[parts["language_model"]]
    gflop += tower_passes * IMAGE_GFLOP[parts["vision_tower"]]
    if fields.get("embedding_losses", is_pretraining):
        # A resampler for each layer of each task; without a predictor the token itself is compared.
        for task in parts["tasks"]:
            if task.get("predictor") != "none":
                gflop += 3 * PREDICTOR_GFLOP[task["name"]] * len(task["layers"])
    return rows * gflop * 1e9 / RATE / 3600


def from_here(launcher: str) -> str:
    """The launcher and the training script, as they are found from the working directory."""
    # In a clone of the repository names are short; from anywhere else, paths are whole and the module is named.
    if Path("train.py").exists() and Path(paper.FSDP2_CONFIG).exists():
        return f"{launcher} train.py"
    launcher = launcher.replace(paper.FSDP2_CONFIG, str(PACKAGE / paper.FSDP2_CONFIG))
    return f"{launcher} -m ola_vlm.train"


def start_command(name: str) -> str:
    """How the recipe is started: those of the paper on two machines of 8 GPUs, the others on this one."""
    launcher = "python"
    if RECIPES[name].fields.get("data") in DATA:
        launcher = paper.LAUNCHERS[RECIPES[name].stage]
    return f"{from_here(launcher)} --recipe {name}"


def listing() -> str:
    lines = ["The paper's runs on two machines of 8 GPUs with 80 GB each (docs/scale.md has other configurations):"]
    for stage, launcher in paper.LAUNCHERS.items():
        lines.append(f"{from_here(launcher)} --recipe RUN_{stage}")
    for table in TABLES:
        lines += ["", f"{table.title} {table.columns}".rstrip()]
        for name, recipe in RECIPES.items():
            if recipe.table is not table:
                continue
            hours = estimated_hours(name)
            time = "" if hours is None else f"{hours:.1f} h"
            scores = " ".join(f"{score:.1f}" for score in recipe.scores)
            lines.append(f"  {name:<58} {time:>6}  {scores}".rstrip())
    return "\n".join(lines)


def _flat(fields: dict, shared: set[str]) -> dict:
    """The fields, those of the tasks in `shared` as `tasks.NAME.FIELD`; `tasks` are all names, in order."""
    tasks = fields.get("tasks") or []
    # Tasks are a list: compared whole, a change of one number would show all of their fields.
    flat = dict(fields)
    flat["tasks"] = [task["name"] for task in tasks]
    for task in tasks:
        if task["name"] in shared:
            for field, value in task.items():
                flat[f"tasks.{task['name']}.{field}"] = value
    return flat


def changes(name: str) -> dict:
    """Field -> the recipe's value, where its parent has another one; of a task that both have, `tasks.NAME.FIELD`."""
    recipe = RECIPES[name]
    if recipe.parent is None:
        return {}
    old = RECIPES[recipe.parent].fields
    new = recipe.fields
    # Of a task that only one of them has, its name in the list says all.
    shared = {task["name"] for task in old.get("tasks") or []} & {task["name"] for task in new.get("tasks") or []}
    old_values = _flat(old, shared)
    return {field: value for field, value in _flat(new, shared).items() if old_values.get(field) != value}


def as_file(name: str) -> str:
    """The recipe as YAML to train from, with what it is as comments above."""
    recipe = RECIPES[name]
    start = start_command(name)
    from_file = "ola-vlm train FILE.yaml"
    # On one machine the command does; the paper's runs need their launcher.
    if recipe.fields.get("data") in DATA:
        from_file = start.replace(f"--recipe {name}", "FILE.yaml")
    comments = [
        f"{name}. {recipe.table.title}",
        f"Start the recipe as it is:  {start}",
        f"Start this file, changed:   {from_file} --any_field value",
    ]
    # The whole recipe is below: above it, what makes it another one than its parent.
    if recipe.parent is not None:
        comments.append(f"What it changes in {recipe.parent}:")
        comments += [f"  {field}: {value!r}" for field, value in changes(name).items()]
    return "".join(f"# {comment}\n" for comment in comments) + run_file_text(recipe.fields)


@command("recipes")
def main(args: Namespace) -> None:
    if args.name is None:
        print(listing())
        tell("Next: ola-vlm recipes NAME > my_run.yaml, or ola-vlm train --recipe NAME")
        return
    print(as_file(args.name), end="")
    tell(f"Next: ola-vlm recipes {args.name} > my_run.yaml, change it, then ola-vlm train my_run.yaml")
