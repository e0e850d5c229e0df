"""A checkpoint's model card, made from its run's record and from results of evaluations: model_card.md filled in."""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from tokenizers import Tokenizer

from ..eval.benchmarks import shown_name
from ..files.escapes import code, markdown, one_line
from ..files.strangers import entries_of, read_object
from ..files.writing import write_whole
from ..targets.loading import loading_from
from ..training.run_record import read_run, steps_in

PARTS = ("vision_tower", "language_model")
PAPER = "arXiv:2412.09585"
CARD = Path(__file__).with_name("model_card.md")
# The picture that a card's example shows, and its question: of any model, and of the miniature.
PHOTOGRAPH = ("photograph.jpg", "What is in the picture?")
# The picture is that of docs/.
SCENE = ("scene.png", "which object is closer to the camera ? (A) red object (B) blue object")


def is_repository(name: str | None, local: Collection[str] = ()) -> bool:
    """Whether it is a repository's name, by the Hub's own rules: not a folder of this machine, nor one of the `local`
    paths of the machine that it was trained on."""
    # The Hub also takes names without an owner ("gpt2"), which a folder's name can't be told from.
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
        # "models/llama" looks like a repository's name: only the machine that trained knew it for a folder.
        paths.update(run.get("local_paths", []))
        paths.add(run.get("output_dir"))
    return paths


def shown(path: str | None, local: Collection[str] = ()) -> str:
    """A name on the Hub as it is; of a path its end alone, since the rest is a machine's own."""
    if not path:
        return ""
    if is_repository(path, local):
        return code(path)
    return code(Path(path).name)


def history(checkpoint: Path) -> list[dict]:
    """What `ola-vlm train` wrote of the run and of those that it began at, the first one first; none if unknown."""
    runs = []
    run = read_run(checkpoint)
    if run:
        # Of a run's checkpoint-1000 the record is the whole run's: the checkpoint's own steps go into it.
        run["finished_steps"] = steps_in(checkpoint, run)
    while run:
        # As planned it is -1 if the run went by epochs, and too many steps if it was stopped.
        if run.get("finished_steps") is not None:
            run["max_steps"] = run["finished_steps"]
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
    # What was trained, one row a stage, the first one first.
    heads = ["stage", "recipe", "data", "steps", "batch", "learning rate", "seed", "trained"]
    texts = [table(heads, [training_row(run, local) for run in runs])]
    # What it was built from: the parts, or a checkpoint.
    parts = [f"{name.replace('_', ' ')} {shown(runs[0].get(name), local)}" for name in PARTS if runs[0].get(name)]
    if parts:
        texts.append(f"Built from {' and '.join(parts)}.")
    elif runs[0].get("checkpoint"):
        texts.append(f"The first of these stages began at {shown(runs[0]['checkpoint'], local)}.")
    used = teachers(runs)
    if used:
        texts.append("Teachers of the embedding losses, whose weights are not in this checkpoint:")
        layers = {task["name"]: ", ".join(map(str, task["layers"])) for task in config.get("tasks") or []}
        rows = []
        for task, teacher in used.items():
            # Teachers of words are named "words.class": the layers are those of the task before the period.
            of_task = layers.get(task.partition(".")[0], "")
            names = [markdown(name) for name in (task, of_task, teacher.encoder)]
            rows.append([*names, shown(teacher.weights, local), markdown(teacher.license)])
        texts.append(table(["task", "layers of the LLM", "encoder", "weights", "their license"], rows))
    return "\n\n".join(texts)


def training_row(run: dict, local: Collection[str]) -> list[str]:
    """A run's row of the card's table."""
    numbers = ("max_steps", "num_train_epochs", "min_steps", "learning_rate", "seed", "per_device_train_batch_size")
    odd = [name for name in numbers if name in run and not isinstance(run[name], (int, float))]
    if odd:
        raise TypeError(f"{odd[0]} is {run[odd[0]]!r:.60}")
    # What an optimizer step sees, over all processes and accumulated batches.
    batch = run["per_device_train_batch_size"] * run["gradient_accumulation_steps"] * run.get("processes", 1)
    if run["max_steps"] > 0:
        steps = f"{run['max_steps']:d}"
    else:
        # A run that didn't come to its end: what was planned is all that is known.
        epochs = run["num_train_epochs"]
        steps = f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'}"
        if run.get("min_steps"):
            steps += f", at least {run['min_steps']:d} steps"
    method = "all of the stage's weights"
    if run.get("lora_rank"):
        method = f"adapters of rank {run['lora_rank']:d}"
    if run.get("load_in_4bit"):
        method += ", 4-bit language model"
    return [
        markdown(run["stage"]),
        markdown(run["recipe"] or "none"),
        shown(run["data"], local),
        steps,
        f"{batch:d}",
        f"{run['learning_rate']:g}",
        f"{run['seed']:d}",
        method,
    ]


class Teacher(NamedTuple):
    """`weights`: a name on the Hub, or a path where the run trained."""

    encoder: str
    weights: str
    license: str


def teachers(runs: list[dict]) -> dict[str, Teacher]:
    """Task (and kind of word, "words.class") -> its teacher, of the stages that used them."""
    used = {}
    for run in runs:
        # Without tasks, and without the multi-encoder baseline's fusion, a stage's teachers were named but not asked.
        if not (run.get("tasks") or run.get("fusion")):
            continue
        for task, teacher in entries_of(run.get("teachers") or {}).items():
            # Earlier versions wrote "licence".
            license = teacher.get("license", teacher.get("licence", "not recorded"))
            used[task] = Teacher(teacher["encoder"], teacher["path"], license)
    return used


def evaluation(paths: Sequence[str]) -> tuple[str, list[EvalResult], dict[str, bytes]]:
    """Text, metadata (the model-index) and files for `.eval_results`, by name, from results.json (`ola-vlm eval`) and
    report.json (`ola-vlm miniature`), or their folders."""
    texts = []
    metadata = []
    files = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} is not there")
        in_folder = [path / name for name in ("results.json", "report.json") if (path / name).exists()]
        file = path
        if in_folder:
            file = in_folder[0]
        results = read_object(file)
        # A benchmark's results can also be entered on the Hub's leaderboards; a study's go into the text alone.
        if "scores" in results and "run" in results:
            text, entries = _of_benchmark(results)
            metadata += entries
            files.update(_eval_results(results))
        elif "methods" in results:
            text = _of_study(results)
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
    # It becomes a file's name, and results.json may be a stranger's.
    if re.fullmatch(r"\w[\w.-]*", run["benchmark"]) is None:
        name = one_line(run["benchmark"])[:80]
        raise ValueError(f"results.json names a benchmark {name!r}, which `ola-vlm eval` doesn't have")
    entries = []
    for name, score in results["scores"].items():
        # "task/Count", "source/COCO": parts of the benchmark, which has no leaderboard for them.
        if "/" in name:
            continue
        error = 100 * score["standard_error"]
        # It has no field for a standard error, which goes into the notes.
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
    run = results["run"]
    dataset = run["benchmark"]
    if _is_of_the_hub(run):
        dataset = run["data"]
    rows = []
    headline = []
    for name, scored in results["scores"].items():
        score = 100 * scored["score"]
        error = 100 * scored["standard_error"]
        rows.append([markdown(name), f"{score:.1f} ± {error:.1f}", f"{scored['n']:d}"])
        # The metadata has headline numbers only, not "task/Count" or "source/COCO".
        if "/" not in name:
            entry = EvalResult(
                task_type="image-text-to-text",
                dataset_type=dataset,
                dataset_name=run["benchmark"],
                metric_type="accuracy",
                metric_name=f"{name} (standard error {error:.1f})",
                metric_value=round(score, 1),
            )
            headline.append(entry)
    text = f"{markdown(shown_name(run))}: per cent ± standard error over questions, number of questions."
    return f"{text}\n\n{table(['', 'score', 'questions'], rows)}", headline


def _of_study(report: dict) -> str:
    rows = []
    tasks = []
    for method, of_method in report["methods"].items():
        accuracies = [seed["accuracy"] for seed in of_method["seeds"]]
        # All methods answer the same tasks.
        tasks = list(accuracies[0])
        cells = []
        for task in tasks:
            values = [100 * accuracy[task] for accuracy in accuracies]
            cell = f"{mean(values):.1f}"
            # One seed has no deviation.
            if len(values) > 1:
                cell += f" ± {stdev(values):.1f}"
            cells.append(cell)
        rows.append([markdown(method), len(accuracies), *cells])
    head = ["method", "training seeds", *map(markdown, tasks)]
    text = "The study in miniature: per cent, mean ± standard deviation over training seeds."
    return f"{text}\n\n{table(head, rows)}"


def limits(runs: list[dict], results: Sequence[str], is_adapter: bool, is_of_miniature: bool) -> Iterator[str]:
    if is_of_miniature:
        yield "It knows nothing but a world of rendered scenes and about a hundred words, those of its own questions."
    used = teachers(runs)
    restricted = []
    for task, teacher in used.items():
        # Creative Commons' "NC", non-commercial: Depth Anything V2's large model is CC-BY-NC-4.0.
        if re.search(r"\bNC\b", teacher.license, re.IGNORECASE):
            restricted.append(f"{markdown(task)} ({markdown(teacher.license)})")
    if restricted:
        yield f"**Not for commercial use**, for its teachers' licenses: {', '.join(restricted)}."
    if any(teacher.license == "not recorded" for teacher in used.values()):
        yield "A teacher's license was not recorded: see its own page before use."
    yield "The terms of the language model, the vision encoder and the data hold beside this repository's."
    yield "Answers may be wrong, and wrong without a sign of it. Nothing was done about harmful answers or biases."
    if not results:
        yield "Not evaluated, or the results were not given."
    # Predictors train in pre-training only, on the states that the language model had then.
    if not is_adapter and used and any(run["stage"] != "pretrain" for run in runs):
        yield "The embedding predictors are those of pre-training: later stages change the states that they read."


def make_card(
    checkpoint: Path,
    repo: str,
    results: Sequence[str] = (),
    base: str | None = None,
    license: str | None = None,
    example: tuple[str, str] | None = None,
) -> ModelCard:
    """Of a checkpoint's folder; `base`: repository of an adapter's base model; `example`: picture and question, by
    default those of `example_of`. ValueError for wrong `results`."""
    runs = history(checkpoint)
    local = local_paths(runs)

    # What it is.
    measured, entries, _ = evaluation(results)
    is_adapter = (checkpoint / "adapter_config.json").exists()
    tags = ["ola-vlm", PAPER.lower()]
    if is_adapter:
        config = {}
        tags.insert(1, "lora")
        summary = f"An adapter (LoRA) for `{base}`"
        began = [base]
    else:
        config = read_object(checkpoint / "config.json")
        summary = f"A vision-language model ({code(config['model_type'])})"
        # The Hub shows a model below those that it began at.
        began = []
        if runs:
            began = [runs[0].get(name) for name in (*PARTS, "checkpoint")]
    tasks = config.get("tasks") or []
    # A task's targets are a teacher's features, or the words for what it sees.
    of_features = [markdown(task["name"]) for task in tasks if task.get("target") != "words"]
    if of_features:
        names = ", ".join(of_features)
        summary += f", whose language model's layers were taught to predict the features of {names} encoders"
    if len(of_features) < len(tasks):
        summary += ", whose image tokens were taught to lie where the words for what teachers see in them lie"

    # What the Hub reads of it, and what people do.
    library_name = "transformers"
    if is_adapter:
        library_name = "peft"
    data = ModelCardData(
        library_name=library_name,
        pipeline_tag="image-text-to-text",
        tags=tags,
        license=license,
        # Names on the Hub only: a path is a machine's own, and no link can be made of it.
        base_model=[name for name in began if name is not None and is_repository(name, local)] or None,
        datasets=sorted({run["data"] for run in runs if is_repository(run["data"], local)}) or None,
        model_name=repo.split("/")[-1],
        eval_results=entries or None,
    )
    image, question = example or example_of(checkpoint)
    is_of_miniature = not is_adapter and example_of(checkpoint) == SCENE
    return ModelCard.from_template(
        data,
        template_path=str(CARD),
        title=repo.split("/")[-1],
        summary=f"{summary}. Made with OLA-VLM ({PAPER}).",
        repo=repo,
        base=base if is_adapter else None,
        has_code=bool(config.get("auto_map")),
        image=image,
        question=question,
        training=training_text(runs, config),
        evaluation=measured,
        limits=list(limits(runs, results, is_adapter, is_of_miniature)),
    )


def example_of(checkpoint: Path) -> tuple[str, str]:
    """The picture and the question of a card's example: the miniature's if the checkpoint's tokenizer has those words
    and no others."""
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        return PHOTOGRAPH
    with loading_from(checkpoint, weights=False):
        tokenizer = Tokenizer.from_file(str(file))
    # Byte-level tokenizers have none, and know every word.
    unknown = getattr(tokenizer.model, "unk_token", None)

    def is_known(question: str) -> bool:
        return unknown not in tokenizer.encode(question, add_special_tokens=False).tokens

    if is_known(SCENE[1]) and not is_known(PHOTOGRAPH[1]):
        return SCENE
    return PHOTOGRAPH


def write_card(folder: str | Path, repo: str, **options) -> None:
    """README.md of a checkpoint's folder; `repo` and `options` of `make_card`."""
    write_whole(Path(folder) / "README.md", str(make_card(Path(folder), repo, **options)) + "\n")


def write_adapter_card(folder: str | Path) -> None:
    """README.md of an adapter's folder: ours in place of peft's, which knows nothing of the run."""
    folder = Path(folder)
    # peft writes down where the base model was loaded from: a name on the Hub, or a folder of this machine.
    base = read_object(folder / "adapter_config.json")["base_model_name_or_path"]
    if not is_repository(base, local_paths(history(folder))):
        base = Path(base).name
    write_card(folder, folder.name, base=base)
