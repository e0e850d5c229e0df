"""Publish a checkpoint or an adapter on the Hub, with a model card made from its run: `ola-vlm push`.

Goes up in one commit: weights, configurations, tokenizer, processor, generation configuration, code, statistics of the
targets, fitted probes if there are some, and a README.md. Stays here: run.json (it has paths of this machine),
checkpoints, optimizer states.
"""

import json
import logging
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING

from ..commands.running import command, tell
from ..files.escapes import terminal
from ..files.strangers import inside, read_object
from ..inference.checkpoints import OWN_CLASSES, read_checkpoint
from ..targets.loading import check_folder, indexed_files
from ..targets.statistics import TargetStatistics, own_statistics, statistics_in
from ..training.run_record import statistics_files
from .model_card import SCENE, evaluation, example_of, history, is_repository, local_paths, make_card

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
OUR_CODE = {f"{kind}_ola_vlm.py" for kind in ("configuration", "modeling", "processing")}
PUSHED = [
    # weights
    "config.json",
    "generation_config.json",
    # config.json of a model, adapter_config.json of an adapter (LoRA).
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "target_statistics/*.safetensors",
    # Fitted probes (`Probes.save`), if they were put there: probes.json and probes.safetensors.
    "probes/probes.*",
    # code
    "configuration_*.py",
    "modeling_*.py",
    "processing_*.py",
    # processor and tokenizer
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
]
# "model.safetensors", "adapter_model.safetensors", "model-00001-of-00003.safetensors".
SHARD = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")


def without_paths(fields):
    """JSON content whose paths of this machine are their ends alone."""
    if isinstance(fields, dict):
        return {name: without_paths(value) for name, value in fields.items()}
    if isinstance(fields, list):
        return [without_paths(value) for value in fields]
    # A relative path looks like any text; one that exists here is taken for a path.
    is_path = isinstance(fields, str) and (os.path.isabs(fields) or os.path.exists(fields))
    if is_path:
        return Path(fields).name
    return fields


def find_files(checkpoint: Path, statistics: Path | None = None) -> dict[str, Path]:
    """Name in the repository -> file: those of the folder, our code if it lacks it, and the targets' `statistics`, if
    they lie elsewhere. ValueError for a folder that others couldn't load, or with a link to what lies elsewhere: a
    file of a checkpoint must not choose what of this machine is published."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is no folder: give that of a checkpoint or an adapter")
    # Only what is known to belong to a checkpoint: a run's folder also holds logs, states and pickles.
    files = {}
    for pattern in PUSHED:
        for path in checkpoint.glob(pattern):
            name = path.relative_to(checkpoint)
            files[str(name)] = inside(checkpoint, name)
            # A pipe would be waited for.
            if not path.is_file():
                raise ValueError(f"{path} is no file: take it out of the folder")

    # What others need to load it.
    if "adapter_config.json" in files:
        # An adapter: its weights alone; the base model is named, not published.
        needed = ["adapter_model.safetensors"]
        if statistics is not None:
            raise ValueError("--statistics is for whole models, and CHECKPOINT is an adapter")
    elif "config.json" in files:
        index = "model.safetensors.index.json"
        needed = ["model.safetensors"]
        # Sharded weights: the index says which files they are.
        if index in files:
            needed = [str(path.relative_to(checkpoint)) for path in indexed_files(files[index])]
        for module in code_files(read_object(files["config.json"])):
            # Our own modules may be missing where a checkpoint was saved without its code; others' must be there.
            if module in OUR_CODE:
                files.setdefault(module, ROOT / module)
            needed.append(module)
    else:
        raise ValueError(f"{checkpoint} has no config.json and no adapter_config.json: it is no checkpoint")
    if "config.json" in files:
        for path in find_statistics(checkpoint, statistics):
            files[f"target_statistics/{path.name}"] = path

    # What is too much, and what is missing.
    # A larger model was saved here before: its shards would be gigabytes that nobody reads.
    stale = [name for name in files if SHARD.fullmatch(name) and name not in needed]
    if stale:
        left = f"{', '.join(stale)} of an earlier save, which the checkpoint's own weights don't use"
        raise ValueError(f"{checkpoint} has {left}: delete what is old")
    needed += ["processor_config.json", "tokenizer_config.json"]
    lacking = [name for name in needed if name not in files]
    if lacking:
        raise ValueError(f"{checkpoint} lacks {', '.join(lacking)}: save model and processor there by save_pretrained")
    # Cut files (an interrupted download, a pointer of Git LFS) and missing weights would be found by others only.
    check_folder(checkpoint)
    # An adapter's weights can be checked only in its base model, which may not be here.
    if "adapter_config.json" not in files:
        check_weights(checkpoint)
    return files


def check_weights(checkpoint: Path) -> None:
    """ValueError if a model lacks weights; only their names are read. A model that its own code alone could load isn't
    looked at."""
    fields = read_object(checkpoint / "config.json")
    kind = fields.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{checkpoint / 'config.json'} has the model_type {kind!r:.80}: it must be a name")
    # A foreign model with tasks has attached predictors in a file beside its weights: it isn't looked at either.
    if kind in OWN_CLASSES or (kind in CONFIG_MAPPING and not fields.get("tasks")):
        read_checkpoint(checkpoint, device_map="meta")


def code_files(config: dict) -> set[str]:
    """The modules that a configuration's auto_map names. ValueError for what is no name of one."""
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise ValueError(f"config.json: its auto_map is {auto_map!r:.60}: it must name classes")
    # Of a tokenizer there are two, the slow one and the fast one, and either may be null.
    classes = []
    for value in auto_map.values():
        classes += [name for name in value if name is not None] if isinstance(value, list) else [value]
    # A value is "module.Class", or "owner/name--module.Class" for code of another repository.
    modules = {str(name).split("--")[-1].split(".")[0] for name in classes}
    # The name becomes a file's: no path such as "../secret" may be made of it.
    strange = [module for module in modules if not module.isidentifier()]
    if strange:
        raise ValueError(f"config.json: its auto_map names the file {strange[0]!r}, which is no module")
    return {f"{module}.py" for module in modules}


def find_statistics(checkpoint: Path, folder: Path | None) -> list[Path]:
    """The checkpoint's own or, of one that was trained before stages took them along, those of a user's `folder`: that
    of the stage before, which run.json names, but a file has no say in it."""
    # The user's own word on the command line.
    if folder is not None:
        # That of the statistics themselves, or the folder of the stage that they lie in.
        given = statistics_in(folder) or sorted(folder.glob("*.safetensors"))
        if not given:
            raise ValueError(f"--statistics {folder} has no statistics of targets: give a stage's target_statistics/")
        for path in given:
            # Or a ValueError: a model's own weights are no statistics.
            TargetStatistics.load(path)
        return [inside(folder, path.relative_to(folder)) for path in given]
    own = own_statistics(checkpoint)
    if own:
        return own
    # Only looked at, to tell the user what to give: run.json must not choose what is published.
    elsewhere = statistics_files(checkpoint)
    if elsewhere:
        place = elsewhere[0].parent
        logger.warning(
            f"without the targets' statistics, which run.json says are in {place}: give --statistics {place}"
        )
    return []


@contextmanager
def as_our_commands_write_them() -> Iterator[None]:
    """run.json and results may be of others, and their fields anything: ValueError for what isn't ours."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"run.json or the results are not as our commands write them ({what})") from error


@command("push")
def main(args: Namespace) -> None:
    # The Hub would take a name without an owner for the user's own.
    if args.repo.count("/") != 1:
        raise ValueError(f"REPO is {args.repo!r}: give owner/name")
    validate_repo_id(args.repo)
    files = find_files(args.checkpoint, args.statistics)
    base = None
    # Name in the repository -> a file's path (a text), or content that goes up in its place (bytes).
    content: dict[str, str | bytes] = {name: str(path) for name, path in files.items()}
    # It names the model that the probes were fitted to, which may be a path of this machine.
    if "probes/probes.json" in files:
        fields = without_paths(read_object(files["probes/probes.json"]))
        content["probes/probes.json"] = json.dumps(fields, indent=2).encode()
    if "adapter_config.json" in files:
        fields = read_object(files["adapter_config.json"])
        # Who loads the adapter gets the base model by this name.
        base = args.base or fields.get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise ValueError("adapter_config.json names no base model: give its --base REPO")
        with as_our_commands_write_them():
            local = local_paths(history(args.checkpoint))
        if not is_repository(base, local):
            raise ValueError(f"the adapter's base model is the folder {base}: push that, then give its --base REPO")
        fields["base_model_name_or_path"] = base
        content["adapter_config.json"] = json.dumps(fields, indent=2).encode()
    elif args.base:
        raise ValueError("--base is for adapters, and CHECKPOINT is a whole model")
    elif example_of(args.checkpoint) == SCENE:
        # The card's example asks about it.
        content[SCENE[0]] = str(ROOT / "docs" / SCENE[0])
    # Before anything is sent.
    with as_our_commands_write_them():
        card = make_card(args.checkpoint, args.repo, args.results, base, args.license)
    _, _, eval_results = evaluation(args.results)
    content.update(eval_results)
    if args.dry_run:
        print(*map(terminal, (card, *sorted(content))), sep="\n")
        return
    content["README.md"] = str(card).encode()
    # One commit: nobody ever sees a repository with half of a checkpoint.
    added = [CommitOperationAdd(name, content[name]) for name in sorted(content)]
    api = HfApi()
    # None: the owner's own default.
    api.create_repo(args.repo, private=args.private or None, exist_ok=True)
    commit = api.create_commit(args.repo, added, commit_message=f"{len(added)} files by ola-vlm push")
    print(f"{commit.repo_url}: {len(added)} files, revision {commit.oid}")
    tell(f"Next: look at its card on {commit.repo_url}; a Space that shows it: space/README.md")
