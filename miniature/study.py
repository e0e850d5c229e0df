"""The main job: LLaVA-1.5 and OLA-VLM in miniature, compared. `ola-vlm miniature` = `make miniature`.

World -> components -> targets -> arms (a process each, one thread) -> report. Everything lands in --out; with
--resume a step that is done is not done again.
"""

import json
import os
import platform
import shutil
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.numpy import load_file
from transformers import logging

from ..commands.running import command, tell
from ..eval.statistics import compare_answers
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..probing.features import find_run
from ..probing.pictures import LayerViewer
from ..probing.probes import Probes
from ..probing.ridge import choose_alpha
from ..probing.visualize import pictures_figure
from ..processing_ola_vlm import OlaVlmProcessor
from ..recipes import miniature as recipe
from ..targets.files import write_whole
from ..targets.fill import fill, make_teachers, open_caches
from ..world import dataset, language
from .processes import Job, run_jobs
from .report import write_report
from .trial import PROBE_SPLITS, PROMPT, STAGES, Clock, fit_ridge, probe_paths, read_json

SHIPPED = ("llava", "ola_vlm")
# Changes of the recipe's fields; the shrunken run, of a minute, checks the chain and not the numbers.
FULL = {"sizes": dataset.SIZES, "questions": dataset.QUESTIONS, "overrides": {"probe_splits": PROBE_SPLITS}}
FOUR_STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}
SHRUNK = {
    "sizes": dataset.SHRUNK_SIZES,
    "questions": dataset.SHRUNK_QUESTIONS,
    "overrides": dict.fromkeys(STAGES, FOUR_STEPS) | {"probe_splits": {"train": 16, "validation": 8, "test": 8}},
}
PAIRS = [("llava", "ola_vlm"), ("llava", "ola_vlm_shuffled"), ("ola_vlm_shuffled", "ola_vlm")]
PAIRS += [pair for name in recipe.FUSIONS for pair in (("llava", name), (name, "ola_vlm"))]


def fill_targets(root: Path, probe_splits: dict[str, int]) -> None:
    """Every target that the arms will read, computed once: all training images, and the probes' held-out ones."""
    probed = probe_paths(root, probe_splits)
    paths = [*sorted((root / "data" / "images").glob("train_*.png")), *probed["validation"], *probed["test"]]
    teachers = make_teachers(recipe.TASKS, recipe.TEACHERS)
    caches = open_caches(root / "targets", teachers)
    report = fill(root / "targets", teachers, caches, list(map(str, paths)))
    if report.failed:
        raise ValueError(f"images without a target: {list(report.failed.values())}")


def run_arms(
    root: Path, arms: list[tuple[str, int]], overrides: dict, workers: int, done: Callable[[], object] = lambda: None
) -> None:
    """Arms as parallel one-thread processes, their logs in their folders; `done` is called as one has ended. Raises
    RuntimeError with the end of an arm's log when it fails; the other arms are stopped and can be resumed."""
    jobs = {}
    for method, seed in arms:
        folder = recipe.run_folder(method, seed, root)
        settings = {"method": method, "seed": seed, "root": str(root), "overrides": overrides}
        if not (folder / "result.json").exists():
            jobs[method, seed] = Job(folder, "ola_vlm.miniature.trial", json.dumps(settings))
    run_jobs(jobs, workers, "arm", done, finished=len(arms) - len(jobs))


def read_arms(root: Path, arms: list[tuple[str, int]]) -> tuple[dict[str, list[dict]], dict[str, float]]:
    """Each method's results by seed, of those arms that are done, and the ridge strengths: one a task for all arms,
    chosen on validation images."""
    results = defaultdict(list)
    for method, seed in arms:
        folder = recipe.run_folder(method, seed, root)
        if (folder / "result.json").exists():
            result = read_json(folder / "result.json")
            result["probes"] = {stage: read_json(folder / f"probe_{stage}.json") for stage in STAGES}
            results[method].append(result)
    probes = [result["probes"] for of_method in results.values() for result in of_method]
    validation = [scores["validation"] for of_arm in probes for scores in of_arm.values()]
    strengths = {task["name"]: choose_alpha(validation, task["name"]) for task in recipe.TASKS} if validation else {}
    for of_arm in probes:
        for stage, scores in of_arm.items():
            of_arm[stage] = {task: scores["test"][strength][task] for task, strength in strengths.items()}
    return dict(results), strengths


def collect(root: Path, methods: list[str], seeds: int, seconds: dict, checks: dict) -> dict:
    """report.json's content from the arms' folders."""
    results, strengths = read_arms(root, [(method, seed) for method in methods for seed in range(seeds)])
    answers = defaultdict(list)
    for method, of_method in results.items():
        for result in of_method:
            folder = recipe.run_folder(method, result["seed"], root)
            answers[method].append(read_json(folder / f"answers_{result['curve'][-1]['step']}.json"))
    compared = {f"{b} - {a}": compare_answers(answers[a], answers[b]) for a, b in PAIRS if {a, b} <= set(methods)}
    return {
        "methods": {method: {"seeds": of_method} for method, of_method in results.items()},
        "chance": language.CHANCE,
        "comparison": compared.pop("ola_vlm - llava", {}),
        "comparisons": compared,
        "world": {**checks, "components": read_json(recipe.WEIGHTS / "quality.json")},
        "ridge_strength": strengths,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "seconds": {name: round(value) for name, value in seconds.items()},
        },
    }


def decoded_figures(root: Path, count: int = 4) -> None:
    """Depth and segmentation decoded from OLA-VLM's predictions right after pre-training, beside teacher and truth."""
    folder = recipe.run_folder("ola_vlm", 0, root) / "pretrain"
    model = OlaVlmForConditionalGeneration.from_pretrained(folder).eval()
    processor = OlaVlmProcessor.from_pretrained(folder)
    viewer = LayerViewer.load(folder, model, processor, find_run(folder, trust=True), prompt=PROMPT)
    stored = load_file(root / "data" / "test.safetensors")
    truths = {"depth": 1 / stored["depth"][:count].astype(float), "seg": stored["mask"][:count].astype(int)}
    for task, columns in viewer.pictures(probe_paths(root, {"test": count})["test"]).items():
        decoder = viewer.decoders[task]
        truth = {"truth": list(map(decoder.draw, truths[task]))} if task in truths else {}
        columns = {"image": columns.pop("image"), **truth, **columns}
        title = f"{task}, right after pre-training: {viewer.caption(task)}"
        pictures_figure(root / f"decoded_{task}.png", columns, title, decoder.legend)


def fit_probes(root: Path, checkpoint: Path, splits: dict[str, int], strengths: dict[str, float]) -> Probes:
    """Every layer's, as the arms fit them, for whoever wants to see what the layers see."""
    model, processor = (one.from_pretrained(checkpoint) for one in (OlaVlmForConditionalGeneration, OlaVlmProcessor))
    fitter, *_ = fit_ridge(root, model, processor, splits, describe=f"probes of {checkpoint.name}")
    return fitter.solve({task: float(strength) for task, strength in strengths.items()})


def publish(
    root: Path, methods: list[str], splits: dict[str, int], strengths: dict[str, float], ship: bool = False
) -> None:
    """The first seed's fine-tuned checkpoint becomes <out>/<method>/, ready for from_pretrained, LLaVA's and OLA-VLM's
    with probes; `ship` also puts these two, in half precision, where a clone finds them."""
    unneeded = shutil.ignore_patterns("checkpoint-*", "training_args.bin", "log_history.json")
    for method in methods:
        folder, own, shipped = recipe.run_folder(method, 0, root), root / method, recipe.WEIGHTS / method
        ship_this = ship and method in SHIPPED
        shutil.copytree(folder / "finetune", own, ignore=unneeded, dirs_exist_ok=True)
        if ship_this:
            OlaVlmForConditionalGeneration.from_pretrained(own, dtype=torch.float16).save_pretrained(shipped)
            OlaVlmProcessor.from_pretrained(own).save_pretrained(shipped)
        if method in SHIPPED:
            probes = fit_probes(root, own, splits, strengths)
            for target in [own, shipped] if ship_this else [own]:
                probes.save(target / "probes")
        # predictions are standardized: without these they can't be decoded
        if (statistics := folder / "pretrain" / "target_statistics").exists():
            for target in [own, shipped] if ship_this else [own]:
                shutil.copytree(statistics, target / "target_statistics", dirs_exist_ok=True)


def prepare(root: Path, size: dict, settings: dict) -> tuple[Clock, dict]:
    """The world and its targets in `root`, and its checks. ValueError if it was begun with other `settings`."""
    root.mkdir(parents=True, exist_ok=True)
    begun = root / "settings.json"
    if begun.exists() and (former := read_json(begun)) != settings:
        how = [
            f"{name} {former.get(name)}" for name in former.keys() | settings if former.get(name) != settings.get(name)
        ]
        raise ValueError(f"{root} was begun with {', '.join(how)}: choose another --out, or the same options")
    write_whole(begun, json.dumps(settings))
    logging.set_verbosity_error()
    clock = Clock(root / "seconds.json")
    checks = dataset.write_world(root / "data", size["sizes"], size["questions"])
    del checks["asked"]  # its settings
    shutil.copy2(root / "data" / "contact_sheet.png", root / "world.png")
    clock.lap("world")
    fill_targets(root, size["overrides"]["probe_splits"])
    clock.lap("targets")
    return clock, checks


@command("miniature")
def main(args: Namespace) -> dict:
    """Runs the study and returns report.json's content."""
    args.methods = list(dict.fromkeys(args.methods))  # each once
    root = args.out.resolve()
    if root.exists() and any(root.iterdir()) and not args.resume:
        raise ValueError(f"{args.out} is not empty: add --resume to go on with it, or choose another --out")
    size = SHRUNK if args.shrunk else FULL
    clock, checks = prepare(root, size, {"shrunk": args.shrunk})
    run_arms(root, [(m, seed) for seed in range(args.seeds) for m in args.methods], size["overrides"], args.workers)
    clock.lap("arms")
    arms = [(method, seed) for method in args.methods for seed in range(args.seeds)]
    publish(root, args.methods, size["overrides"]["probe_splits"], read_arms(root, arms)[1], args.ship)
    if "ola_vlm" in args.methods:
        decoded_figures(root)
    results = collect(root, args.methods, args.seeds, clock.seconds, checks)
    print(write_report(root, results).read_text())
    tell(
        f"Results: {args.out} (report.md, report.json, figures; each trial's checkpoints in METHOD/seedN)",
        f"Next: ola-vlm chat {args.out}/ola_vlm/seed0/finetune, or ola-vlm study ablations --out {args.out}",
    )
    return results
