"""Publish a checkpoint or an adapter on the Hub, with a model card made from its run: `ola-vlm push`.

Goes up in one commit: weights, configurations, tokenizer, processor, generation configuration, code, statistics of the
targets, and a README.md. Stays here: run.json (it has paths of this machine), checkpoints, optimizer states.
"""

import json
import logging
import os
import re
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..commands.running import command, tell
from ..targets.escapes import code, markdown, terminal
from ..targets.files import inside, read_object, write_whole
from ..targets.loading import check_folder
from ..targets.statistics import own_statistics
from ..training.run_record import read_run, statistics_files

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
OUR_CODE = {f"{kind}_ola_vlm.py" for kind in ("configuration", "modeling", "processing")}
PARTS = ("vision_tower", "language_model")
PUSHED = [
    *("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("configuration_*.py", "modeling_*.py", "processing_*.py", "target_statistics/*.safetensors", "probes/probes.*"),
    *("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt"),
]
SHARD = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")
PAPER = "arXiv:2412.09585"
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## How to use

```python
{{ usage }}
```

## Training

{{ training }}

## Evaluation

{{ evaluation }}

## Limits

{{ limits }}

## Citation

```bibtex
@article{jain2024ola_vlm,
  title   = {OLA-VLM: Elevating Visual Perception in Multimodal LLMs with Auxiliary Embedding Distillation},
  author  = {Jitesh Jain and Zhengyuan Yang and Humphrey Shi and Jianfeng Gao and Jianwei Yang},
  journal = {arXiv:2412.09585},
  year    = {2024}
}
```
"""
USE_MODEL = """from transformers import pipeline

ask = pipeline("image-text-to-text", "{repo}"{code})
content = [{{"type": "image", "path": "photograph.jpg"}}, {{"type": "text", "text": "What is in the picture?"}}]
print(ask(text=[{{"role": "user", "content": content}}], return_full_text=False)[0]["generated_text"])"""
USE_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{repo}")
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)"""


def is_repository(name: str | None, local: Collection[str] = ()) -> bool:
    """Whether it is a repository's name, by the Hub's own rules: not a folder of this machine, nor one of the `local`
    paths of the machine that it was trained on."""
    if not name or name in local or name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def local_paths(runs: Sequence[dict]) -> set[str]:
    """What was a path where the runs trained: as they recorded it, and each one's own folder."""
    paths = set()
    for run in runs:
        paths.update(run.get("local_paths", []))
        paths.add(run.get("output_dir"))
    return paths


def shown(path: str | None, local: Collection[str] = ()) -> str:
    """A name on the Hub as it is; of a path its end alone, since the rest is a machine's own."""
    if not path:
        return ""
    return code(path if is_repository(path, local) else Path(path).name)


def without_paths(fields):
    """JSON content whose paths of this machine are their ends alone."""
    if isinstance(fields, dict):
        return {name: without_paths(value) for name, value in fields.items()}
    if isinstance(fields, list):
        return [without_paths(value) for value in fields]
    is_path = isinstance(fields, str) and (os.path.isabs(fields) or os.path.exists(fields))
    return Path(fields).name if is_path else fields


def find_files(checkpoint: Path, statistics: Path | None = None) -> dict[str, Path]:
    """Name in the repository -> file: those of the folder, our code if it lacks it, and the targets' `statistics`, if
    they lie elsewhere. ValueError for a folder that others couldn't load, or with a link to what lies elsewhere: a
    file of a checkpoint must not choose what of this machine is published."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is no folder: give that of a checkpoint or an adapter")
    names = [path.relative_to(checkpoint) for pattern in PUSHED for path in checkpoint.glob(pattern)]
    files = {str(name): inside(checkpoint, name) for name in names}
    if "adapter_config.json" in files:
        needed = ["adapter_model.safetensors"]
    elif "config.json" in files:
        index = "model.safetensors.index.json"
        needed = ["model.safetensors"]
        if index in files:
            needed = sorted(set(map(str, read_object(files[index])["weight_map"].values())))
        for module in code_files(read_object(files["config.json"])):
            if module in OUR_CODE:  # of a checkpoint that was saved without its code
                files.setdefault(module, ROOT / module)
            needed.append(module)
    else:
        raise ValueError(f"{checkpoint} has no config.json and no adapter_config.json: it is no checkpoint")
    if "config.json" in files:
        files |= {f"target_statistics/{path.name}": path for path in find_statistics(checkpoint, statistics)}
    shards = [name for name in files if SHARD.fullmatch(name)]
    if stale := [name for name in shards if name not in needed]:
        left = f"{', '.join(stale)} of an earlier save, which the checkpoint's own weights don't use"
        raise ValueError(f"{checkpoint} has {left}: delete what is old")
    needed += ["processor_config.json", "tokenizer_config.json"]
    if lacking := [name for name in needed if name not in files]:
        raise ValueError(f"{checkpoint} lacks {', '.join(lacking)}: save model and processor there by save_pretrained")
    check_folder(checkpoint)  # half-fetched weights would be others' trouble
    return files


def code_files(config: dict) -> set[str]:
    """The modules that a configuration's auto_map names. ValueError for what is no name of one."""
    classes = (config.get("auto_map") or {}).values()
    modules = {str(name).split("--")[-1].split(".")[0] for name in classes}
    if strange := [module for module in modules if not module.isidentifier()]:
        raise ValueError(f"config.json: its auto_map names the file {strange[0]!r}, which is no module")
    return {f"{module}.py" for module in modules}


def find_statistics(checkpoint: Path, folder: Path | None) -> list[Path]:
    """The checkpoint's own or, of one that was trained before stages took them along, those of a user's `folder`: that
    of the stage before, which run.json names, but a file has no say in it."""
    if folder is not None:
        return [inside(folder, path.relative_to(folder)) for path in sorted(folder.glob("*.safetensors"))]
    if found := own_statistics(checkpoint):
        return [inside(path.parent, path.name) for path in found]
    if elsewhere := statistics_files(checkpoint):
        place = elsewhere[0].parent
        logger.warning(
            f"without the targets' statistics, which run.json says are in {place}: give --statistics {place}"
        )
    return []


def history(checkpoint: Path) -> list[dict]:
    """What `ola-vlm train` wrote of the run and of those that it began at, the first one first; none if unknown."""
    runs = []
    run = read_run(checkpoint)
    if run and (checkpoint / "trainer_state.json").exists():
        run["max_steps"] = read_object(checkpoint / "trainer_state.json")["global_step"]
    while run:
        runs.insert(0, run)
        run = run.get("started_from")
    return runs


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def training_text(runs: list[dict], config: dict) -> str:
    if not runs:
        return "Not recorded: there was no run.json beside the checkpoint (`ola-vlm train` writes one)."
    local = local_paths(runs)
    rows, texts = [], []
    for run in runs:
        batch = run["per_device_train_batch_size"] * run["gradient_accumulation_steps"] * run.get("processes", 1)
        steps = f"{run['max_steps']:d}" if run["max_steps"] > 0 else f"{run['num_train_epochs']:g} epochs"
        method = f"adapters of rank {run['lora_rank']:d}" if run.get("lora_rank") else "all of the stage's weights"
        method += ", 4-bit language model" if run.get("load_in_4bit") else ""
        what = [
            markdown(run["stage"]),
            markdown(run["recipe"] or "none"),
            shown(run["data"], local),
            steps,
            f"{batch:d}",
        ]
        rows.append([*what, f"{run['learning_rate']:g}", f"{run['seed']:d}", method])
    heads = ["stage", "recipe", "data", "steps", "batch", "learning rate", "seed", "trained"]
    texts.append(table(heads, rows))
    if parts := [f"{name.replace('_', ' ')} {shown(runs[0].get(name), local)}" for name in PARTS if runs[0].get(name)]:
        texts.append(f"Built from {' and '.join(parts)}.")
    elif runs[0].get("checkpoint"):
        texts.append(f"The first of these stages began at {shown(runs[0]['checkpoint'], local)}.")
    if taught := teachers(runs):
        texts.append("Teachers of the embedding losses, which are no part of this repository:")
        layers = {task["name"]: ", ".join(map(str, task["layers"])) for task in config.get("tasks") or []}
        rows = []
        for task, (kind, path, license) in taught.items():
            weights = shown(path, local)
            rows.append([markdown(task), markdown(layers.get(task, "")), markdown(kind), weights, markdown(license)])
        texts.append(table(["task", "layers of the LLM", "encoder", "weights", "their license"], rows))
    return "\n\n".join(texts)


def teachers(runs: list[dict]) -> dict[str, tuple[str, str, str]]:
    """Task -> (encoder, weights, license) of the stages that used them."""
    used = [run["teachers"] for run in runs if run.get("teachers") and (run.get("tasks") or run.get("fusion"))]
    return {
        task: (teacher["encoder"], teacher["path"], teacher.get("license", teacher.get("licence", "not recorded")))
        for entries in used
        for task, teacher in entries.items()
    }


def evaluation(paths: Sequence[str]) -> tuple[str, list[EvalResult], dict[str, bytes]]:
    """Text, metadata (the model-index) and files for `.eval_results`, by name, from results.json (`ola-vlm eval`) and
    report.json (`ola-vlm miniature`), or their folders."""
    texts, metadata = [], []
    files = {}
    for path in map(Path, paths):
        there = [path / name for name in ("results.json", "report.json") if (path / name).exists()]
        if not path.exists():
            raise ValueError(f"{path} is not there")
        found = read_object(there[0] if there else path)
        if "scores" in found and "run" in found:
            text, entries = _of_benchmark(found)
            metadata += entries
            files |= _eval_results(found)
        elif "methods" in found:
            text = _of_study(found)
        else:
            raise ValueError(f"{path} is neither results.json of `ola-vlm eval` nor a study's report.json")
        texts.append(text)
    return "\n\n".join(texts) or "No results were given.", metadata, files


def _is_of_the_hub(run: dict) -> bool:
    """Whether a benchmark's data came from the Hub: a local copy's revision is a hash of its files."""
    return is_repository(run["data"]) and not str(run.get("revision", "")).startswith("sha256:")


def _eval_results(results: dict) -> dict[str, bytes]:
    """The file that the Hub makes a benchmark's leaderboard of; none for data that it doesn't have."""
    run = results["run"]
    if not _is_of_the_hub(run):
        return {}
    entries = []
    for name, score in results["scores"].items():
        if "/" in name:  # a task's or a source's
            continue
        error = 100 * score["standard_error"]
        entry = EvalResultEntry(
            dataset_id=run["data"],
            task_id=name,
            value=round(100 * score["score"], 1),
            dataset_revision=run.get("revision"),
            notes=f"variant {run['variant']}, greedy, standard error {error:.1f} over {score['n']} questions",
        )
        entries.append(entry)
    content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return {f".eval_results/{run['benchmark']}.yaml": content.encode()}


def _of_benchmark(results: dict) -> tuple[str, list[EvalResult]]:
    run, scores = results["run"], results["scores"]
    percent = {name: (100 * one["score"], 100 * one["standard_error"], one["n"]) for name, one in scores.items()}
    rows = [[markdown(name), f"{score:.1f} ± {error:.1f}", f"{n:d}"] for name, (score, error, n) in percent.items()]
    title = f"{markdown(run['benchmark'])} ({markdown(run['variant'])})"
    text = f"{title}: per cent ± standard error over questions, number of questions.\n\n"
    of = {"task_type": "image-text-to-text", "dataset_name": run["benchmark"], "metric_type": "accuracy"}
    of["dataset_type"] = run["data"] if _is_of_the_hub(run) else run["benchmark"]
    headline = [
        EvalResult(**of, metric_name=f"{name} (standard error {error:.1f})", metric_value=round(score, 1))
        for name, (score, error, _) in percent.items()
        if "/" not in name
    ]
    return text + table(["", "score", "questions"], rows), headline


def _of_study(report: dict) -> str:
    rows = []
    for method, of_method in report["methods"].items():
        accuracies = [seed["accuracy"] for seed in of_method["seeds"]]
        values = {task: [100 * accuracy[task] for accuracy in accuracies] for task in accuracies[0]}
        spread = [f"{mean(v):.1f} ± {stdev(v):.1f}" if len(v) > 1 else f"{v[0]:.1f}" for v in values.values()]
        rows.append([markdown(method), len(accuracies), *spread])
    head = ["method", "training seeds", *map(markdown, values)]
    text = "The study in miniature: per cent, mean ± standard deviation over training seeds."
    return f"{text}\n\n{table(head, rows)}"


def limits(runs: list[dict], results: Sequence[str], is_adapter: bool) -> Iterator[str]:
    licenses = {task: license for task, (_, _, license) in teachers(runs).items()}
    if restricted := [
        f"{markdown(task)} ({markdown(one)})"
        for task, one in licenses.items()
        if re.search(r"\bNC\b", one, re.IGNORECASE)
    ]:
        yield f"**Not for commercial use**, for its teachers' licenses: {', '.join(restricted)}."
    if "not recorded" in licenses.values():
        yield "A teacher's license was not recorded: see its own page before use."
    yield "The terms of the language model, the vision encoder and the data hold beside this repository's."
    yield "Answers may be wrong, and wrong without a sign of it. Nothing was done about harmful answers or biases."
    if not results:
        yield "Not evaluated, or the results were not given."
    if not is_adapter and any(run["stage"] != "pretrain" for run in runs) and teachers(runs):
        yield "The embedding predictors are those of pre-training: later stages change the states that they read."


def make_card(
    checkpoint: Path, repo: str, results: Sequence[str] = (), base: str | None = None, license: str | None = None
) -> ModelCard:
    """Of a checkpoint's folder; `base`: repository of an adapter's base model. ValueError for wrong `results`."""
    runs = history(checkpoint)
    local = local_paths(runs)
    measured, entries, _ = evaluation(results)
    is_adapter = (checkpoint / "adapter_config.json").exists()
    config = {} if is_adapter else read_object(checkpoint / "config.json")
    began = [base] if is_adapter else [runs[0].get(name) for name in (*PARTS, "checkpoint")] if runs else []
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["ola-vlm", *(["lora"] if is_adapter else []), PAPER.lower()],
        license=license,
        base_model=[name for name in began if name is not None and is_repository(name, local)] or None,
        datasets=sorted({run["data"] for run in runs if is_repository(run["data"], local)}) or None,
        model_name=repo.split("/")[-1],
        eval_results=entries or None,
    )
    tasks = [task["name"] for task in config.get("tasks") or []]
    kind = (
        f"An adapter (LoRA) for `{base}`" if is_adapter else f"A vision-language model ({code(config['model_type'])})"
    )
    names = ", ".join(map(markdown, tasks))
    taught = f", whose language model's layers were taught to predict the features of {names} encoders"
    trust = ", trust_remote_code=True" if config.get("auto_map") else ""
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=repo.split("/")[-1],
        summary=f"{kind}{taught if tasks else ''}. Made with OLA-VLM ({PAPER}).",
        usage=USE_ADAPTER.format(base=base, repo=repo) if is_adapter else USE_MODEL.format(repo=repo, code=trust),
        training=training_text(runs, config),
        evaluation=measured,
        limits="\n".join(f"- {line}" for line in limits(runs, results, is_adapter)),
    )


def write_adapter_card(folder: str | Path) -> None:
    """README.md of an adapter's folder: ours in place of peft's, which knows nothing of the run."""
    folder = Path(folder)
    base = read_object(folder / "adapter_config.json")["base_model_name_or_path"]
    if not is_repository(base, local_paths(history(folder))):
        base = Path(base).name
    write_whole(folder / "README.md", str(make_card(folder, folder.name, base=base)))


@command("push")
def main(args: Namespace) -> None:
    if args.repo.count("/") != 1:
        raise ValueError(f"REPO is {args.repo!r}: give owner/name")
    validate_repo_id(args.repo)
    files, base = find_files(args.checkpoint, args.statistics), None
    content: dict[str, str | bytes] = {name: str(path) for name, path in files.items()}
    if "probes/probes.json" in files:  # which names the model that they were fitted to
        fields = without_paths(read_object(files["probes/probes.json"]))
        content["probes/probes.json"] = json.dumps(fields, indent=2).encode()
    if "adapter_config.json" in files:
        fields = read_object(files["adapter_config.json"])
        base = args.base or fields["base_model_name_or_path"]
        if not is_repository(base, local_paths(history(args.checkpoint))):
            raise ValueError(f"the adapter's base model is the folder {base}: push that, then give its --base REPO")
        content["adapter_config.json"] = json.dumps(fields | {"base_model_name_or_path": base}, indent=2).encode()
    elif args.base:
        raise ValueError("--base is for adapters, and CHECKPOINT is a whole model")
    try:
        card = make_card(args.checkpoint, args.repo, args.results, base, args.license)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"run.json or the results are not as our commands write them ({what})") from error
    content |= evaluation(args.results)[2]
    if args.dry_run:
        print(*map(terminal, (card, *sorted(content))), sep="\n")
        return
    content["README.md"] = str(card).encode()
    api, added = HfApi(), [CommitOperationAdd(name, content[name]) for name in sorted(content)]
    api.create_repo(args.repo, private=args.private or None, exist_ok=True)
    commit = api.create_commit(args.repo, added, commit_message=f"{len(added)} files by ola-vlm push")
    print(f"{commit.repo_url}: {len(added)} files, revision {commit.oid}")
    tell(
        f"Next: look at its card on {commit.repo_url}; a Space that shows it: docs/space.md",
    )
