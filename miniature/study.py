"""The main job: LLaVA-1.5, OLA-VLM and words in miniature, compared. `ola-vlm miniature` = `make miniature`.

World -> components -> targets -> trials (a process each, one thread) -> report. Everything lands in --out; with
--resume a step that is done is not done again.
"""

import json
import os
import platform
import shutil
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from safetensors.numpy import load_file
from transformers import logging

from ..commands.running import command, tell
from ..convert.model_card import SCENE, write_card
from ..eval import run as evaluate
from ..eval.statistics import compare_answers
from ..files.strangers import entries_of
from ..files.writing import write_whole
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..probing.features import find_run
from ..probing.pictures import LayerViewer
from ..probing.probes import Probes
from ..probing.ridge import choose_alpha
from ..probing.visualize import pictures_figure
from ..processing_ola_vlm import OlaVlmProcessor
from ..recipes import miniature as recipe
from ..targets.fill import fill, make_teachers, open_caches
from ..training.run_record import moved, record_in, write_run
from ..world import dataset, language
from .processes import Job, run_jobs
from .report import write_report
from .trial import PROBE_SPLITS, PROMPT, STAGES, Timer, fit_ridge, probe_paths, read_json

# Of what is shipped.
LICENSE = "apache-2.0"
# Changes of the recipe's fields; the shrunken run, of a minute, checks the chain and not the numbers.
FULL = {"sizes": dataset.SIZES, "questions": dataset.QUESTIONS, "overrides": {"probe_splits": PROBE_SPLITS}}
FOUR_STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}
SHRUNK = {
    "sizes": dataset.SHRUNK_SIZES,
    "questions": dataset.SHRUNK_QUESTIONS,
    "overrides": {
        "pretrain": FOUR_STEPS,
        "finetune": FOUR_STEPS,
        "probe_splits": {"train": 16, "validation": 8, "test": 8},
    },
}
# What `prepare` writes; data and targets are also left by `ola-vlm data miniature` and `ola-vlm targets`.
PREPARED = ("data", "targets", "settings.json", "seconds.json", "world.png")
# Methods that are compared, the second with the first.
PAIRS = [("llava", "ola_vlm"), ("llava", recipe.CONTROL), (recipe.CONTROL, "ola_vlm")]
PAIRS += [("llava", "words"), ("ola_vlm", "words")]
for _fusion in recipe.FUSIONS:
    PAIRS += [("llava", _fusion), (_fusion, "ola_vlm")]


def fill_targets(root: Path, probe_splits: dict[str, int]) -> None:
    """Every target that the trials will read, computed once: all training images, and the probes' held-out ones."""
    probed = probe_paths(root, probe_splits)
    paths = [*sorted((root / "data" / "images").glob("train_*.png")), *probed["validation"], *probed["test"]]
    teachers = make_teachers(recipe.TASKS, recipe.TEACHERS)
    caches = open_caches(root / "targets", teachers)
    report = fill(root / "targets", teachers, caches, list(map(str, paths)))
    if report.failed:
        raise ValueError(f"images without a target: {list(report.failed.values())}")


def run_trials(
    root: Path, trials: list[tuple[str, int]], overrides: dict, workers: int, done: Callable[[], object] = lambda: None
) -> None:
    """Trials as parallel one-thread processes, their logs in their folders; `done` is called as one has ended. Raises
    RuntimeError with the end of a trial's log when it fails; the other trials are stopped and can be resumed."""
    jobs = {}
    for method, seed in trials:
        folder = recipe.run_folder(method, seed, root)
        settings = {"method": method, "seed": seed, "root": str(root), "overrides": overrides}
        # Written at a trial's end: one that was interrupted has none, and goes on from what it left.
        if not (folder / "result.json").exists():
            jobs[method, seed] = Job(folder, "ola_vlm.miniature.trial", json.dumps(settings))
    run_jobs(jobs, workers, "trial", done, finished=len(trials) - len(jobs))


def read_trials(root: Path, trials: list[tuple[str, int]]) -> tuple[dict[str, list[dict]], dict[str, float]]:
    """Each method's results by seed, of those trials that are done, and the ridge alphas: one a task for all trials,
    chosen on validation images."""
    results = defaultdict(list)
    probes = []
    validation = []
    for method, seed in trials:
        folder = recipe.run_folder(method, seed, root)
        if not (folder / "result.json").exists():
            continue
        result = read_json(folder / "result.json")
        result["probes"] = {stage: read_json(folder / f"probe_{stage}.json") for stage in STAGES}
        results[method].append(result)
        probes.append(result["probes"])
        validation += [scores["validation"] for scores in result["probes"].values()]
    alphas = {}
    # One alpha for all methods: each with its own would be compared at its luckiest.
    if validation:
        alphas = {task["name"]: choose_alpha(validation, task["name"]) for task in recipe.TASKS}
    # Of the scores of all alphas, those of the chosen one stay.
    for by_stage in probes:
        for stage, scores in by_stage.items():
            by_stage[stage] = {task: scores["test"][alpha][task] for task, alpha in alphas.items()}
    return dict(results), alphas


def collect(root: Path, methods: list[str], seeds: int, seconds: dict, checks: dict) -> dict:
    """report.json's content from the trials' folders."""
    results, alphas = read_trials(root, list(product(methods, range(seeds))))
    # The answers themselves are paired, question by question, not their means.
    answers = defaultdict(list)
    for method, of_method in results.items():
        for result in of_method:
            folder = recipe.run_folder(method, result["seed"], root)
            answers[method].append(read_json(folder / f"answers_{result['curve'][-1]['step']}.json"))
    compared = {}
    for first, second in PAIRS:
        if first in methods and second in methods:
            compared[f"{second} - {first}"] = compare_answers(answers[first], answers[second])
    return {
        "methods": {method: {"seeds": of_method} for method, of_method in results.items()},
        "chance": language.CHANCE,
        # The main comparison has a field of its own (docs/miniature.md).
        "comparison": compared.pop("ola_vlm - llava", {}),
        "comparisons": compared,
        "world": {**checks, "components": read_json(recipe.WEIGHTS / "quality.json")},
        "ridge_alpha": alphas,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "seconds": {name: round(value) for name, value in seconds.items()},
        },
    }


def processor_minutes(timer: Timer, results: dict) -> float:
    """Of this process and all trials: what a study takes by the clock, on two quiet cores, is half of it and more."""
    # Trials are processes that this one has waited for, but in other sessions, too: each has its own record.
    seconds = sum(value for name, value in timer.processor_seconds.items() if name != "trials")
    for method in results["methods"].values():
        seconds += sum(sum(seed["processor_seconds"].values()) for seed in method["seeds"])
    return seconds / 60


def decoded_figures(root: Path, count: int = 4) -> None:
    """Depth and segmentation decoded from OLA-VLM's predictions right after pre-training, beside teacher and truth."""
    folder = recipe.run_folder("ola_vlm", 0, root) / "pretrain"
    model = OlaVlmForConditionalGeneration.from_pretrained(folder).eval()
    processor = OlaVlmProcessor.from_pretrained(folder)
    viewer = LayerViewer.load(folder, model, processor, find_run(folder, trust=True), prompt=PROMPT)
    # The teacher's depth is inverse, near things being bright: so is the truth, to be looked at beside it.
    stored = load_file(root / "data" / "test.safetensors")
    truths = {"depth": 1 / stored["depth"][:count].astype(float), "seg": stored["mask"][:count].astype(int)}
    images = probe_paths(root, {"test": count})["test"]
    for task, pictures in viewer.pictures(images).items():
        decoder = viewer.decoders[task]
        # The truth stands behind the image, before the teacher's.
        columns = {"image": pictures.pop("image")}
        if task in truths:
            columns["truth"] = [decoder.draw(truth) for truth in truths[task]]
        columns.update(pictures)
        title = f"{task}, right after pre-training: {viewer.caption(task)}"
        pictures_figure(root / f"decoded_{task}.png", columns, title, decoder.legend)


def fit_probes(root: Path, checkpoint: Path, splits: dict[str, int], alphas: dict[str, float]) -> Probes:
    """Every layer's, as the trials fit them, for whoever wants to see what the layers see."""
    model = OlaVlmForConditionalGeneration.from_pretrained(checkpoint)
    processor = OlaVlmProcessor.from_pretrained(checkpoint)
    fitter, *_ = fit_ridge(root, model, processor, splits, describe=f"probes of {checkpoint.name}")
    # Keys of a JSON file: alphas are texts until here.
    return fitter.solve({task: float(alpha) for task, alpha in alphas.items()})


def write_shipped_record(root: Path, checkpoint: Path, shipped: Path) -> None:
    """The run.json of a `checkpoint` of the study in `root`, for a clone: no path is this machine's, they begin at the
    repository's folder, as the recipes' own do."""
    package = str(recipe.WEIGHTS.parents[1])
    # Training wrote it.
    record = record_in(checkpoint)
    assert record is not None
    # The first folder that fits is replaced: the study's own may lie inside the package.
    record = moved(record, {str(root): "runs/miniature", package: ""})
    for teacher in entries_of(record["started_from"]["teachers"] or {}).values():
        # The teachers are ours, too.
        teacher["license"] = LICENSE
    write_run(shipped, record)


def write_shipped_card(method: str, results: Path) -> None:
    """README.md of what is shipped; `results`: what `ola-vlm eval` left of it."""
    shipped = recipe.WEIGHTS / method
    name = shipped.relative_to(recipe.WEIGHTS.parents[1]).as_posix()
    example = ("docs/scene.png", SCENE[1])
    write_card(shipped, name, results=[str(results)], license=LICENSE, example=example)


def publish(
    root: Path, methods: list[str], splits: dict[str, int], alphas: dict[str, float], ship: bool = False
) -> None:
    """The first seed's fine-tuned checkpoint becomes <out>/<method>/, ready for from_pretrained, those of
    `recipe.METHODS` with probes; `ship` also puts these, in half precision, where a clone finds them, with record and
    card."""
    # training_args.bin is a pickle, which nobody should be asked to load.
    unneeded = shutil.ignore_patterns("checkpoint-*", "training_args.bin", "log_history.json")
    for method in methods:
        folder = recipe.run_folder(method, 0, root)
        own = root / method
        # With --resume an earlier copy is overwritten.
        shutil.copytree(folder / "finetune", own, ignore=unneeded, dirs_exist_ok=True)
        targets = [own]
        shipped = recipe.WEIGHTS / method
        is_shipped = ship and method in recipe.METHODS
        if is_shipped:
            OlaVlmForConditionalGeneration.from_pretrained(own, dtype=torch.float16).save_pretrained(shipped)
            OlaVlmProcessor.from_pretrained(own).save_pretrained(shipped)
            targets.append(shipped)
        if method in recipe.METHODS:
            probes = fit_probes(root, own, splits, alphas)
            for target in targets:
                probes.save(target / "probes")
        # Predictions are standardized: without these they can't be decoded.
        statistics = folder / "pretrain" / "target_statistics"
        if statistics.exists():
            for target in targets:
                shutil.copytree(statistics, target / "target_statistics", dirs_exist_ok=True)
        if is_shipped:
            write_shipped_record(root, own, shipped)
            results = root / "shipped" / method
            # Of weights that were shipped before: `ola-vlm eval` refuses to go on with another model's answers.
            if results.exists():
                shutil.rmtree(results)
            # In half precision, as it is shipped: these are the numbers that its card tells.
            evaluate.main([str(shipped), "--benchmark", "miniature", "--out", str(results)])
            write_shipped_card(method, results)


def prepare(root: Path, size: dict, settings: dict) -> tuple[Timer, dict]:
    """The world and its targets in `root`, and its checks. ValueError if it was begun with other `settings`."""
    root.mkdir(parents=True, exist_ok=True)
    # Results of other settings lie side by side with these, and nothing would tell them apart.
    begun = root / "settings.json"
    former = settings
    if begun.exists():
        former = read_json(begun)
    if former != settings:
        names = [name for name in former.keys() | settings if former.get(name) != settings.get(name)]
        differences = ", ".join(f"{name} {former.get(name)}" for name in names)
        raise ValueError(f"{root} was begun with {differences}: choose another --out, or the same options")
    logging.set_verbosity_error()
    timer = Timer(root / "seconds.json")
    # It refuses a world of another size: the settings are written only when it is there.
    checks = dataset.write_world(root / "data", size["sizes"], size["questions"])
    write_whole(begun, json.dumps(settings))
    # Its settings are no checks.
    del checks["asked"]
    shutil.copy2(root / "data" / "contact_sheet.png", root / "world.png")
    timer.lap("world")
    fill_targets(root, size["overrides"]["probe_splits"])
    timer.lap("targets")
    return timer, checks


@command("miniature")
def main(args: Namespace) -> dict:
    """Runs the study and returns report.json's content."""
    # Each once.
    args.methods = list(dict.fromkeys(args.methods))
    root = args.out.resolve()
    if root.exists() and not args.resume:
        # The world and its targets, which other commands leave there, are checked and used: nothing else is.
        others = sorted(path.name for path in root.iterdir() if path.name not in PREPARED)
        if others:
            has = f"{args.out} has {others[0]} in it"
            raise ValueError(f"{has}: add --resume to go on with an earlier run, or choose another --out")
    size = FULL
    if args.shrunk:
        size = SHRUNK
    overrides = size["overrides"]
    timer, checks = prepare(root, size, {"shrunk": args.shrunk})
    # Seed by seed: interrupted, all methods have come equally far.
    trials = [(method, seed) for seed, method in product(range(args.seeds), args.methods)]
    run_trials(root, trials, overrides, args.workers)
    timer.lap("trials")
    # Now that all trials are done: alphas are chosen over all of them.
    _, alphas = read_trials(root, list(product(args.methods, range(args.seeds))))
    publish(root, args.methods, overrides["probe_splits"], alphas, args.ship)
    timer.lap("probes")
    if "ola_vlm" in args.methods:
        decoded_figures(root)
    results = collect(root, args.methods, args.seeds, timer.seconds, checks)
    results["machine"]["processor_minutes"] = round(processor_minutes(timer, results), 1)
    print(write_report(root, results).read_text())
    checkpoint = args.out / args.methods[-1] / "seed0" / "finetune"
    tell(
        f"Results: {args.out} (report.md, report.json, figures; each trial's checkpoints in METHOD/seedN)",
        f"Next: ola-vlm chat {checkpoint}, or ola-vlm study ablations --out {args.out}",
    )
    return results
