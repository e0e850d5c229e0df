"""The main job: LLaVA-1.5 and OLA-VLM in miniature, compared. `ola-vlm miniature` = `make miniature`.

World -> components -> targets -> arms (a process each, one thread) -> report. Everything lands in --out; with
--resume a step that is done is not done again.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.numpy import load_file
from tqdm import tqdm
from transformers import logging

from ola_vlm.eval.statistics import compare_answers
from ola_vlm.miniature import dataset, world
from ola_vlm.miniature.arm import PROBE_SPLITS, PROMPT, Clock, probe_paths, teacher_caches
from ola_vlm.miniature.report import write_report
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.probing.ridge import choose_strength
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.recipes import miniature as recipe
from ola_vlm.targets.cache import TargetStatistics
from ola_vlm.visualize import predictions_figure

SHIPPED = ("llava", "ola_vlm")
# A run of a minute that checks the chain, not the numbers.
SHRUNK = {
    "sizes": {"train": 48, "validation": 24, "test": 320},
    "questions": {"test": 24},
    "arm": {
        "pretrain": {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1},
        "finetune": {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1},
        "probe_splits": {"train": 16, "validation": 8, "test": 8},
    },
}


def fill_targets(root: Path, probe_splits: dict[str, int]) -> None:
    """Every target that the arms will read, computed once: all training images, and the probes' held-out ones."""
    paths = sorted((root / "data" / "images").glob("train_*.png"))
    for split, files in probe_paths(root, probe_splits).items():
        paths += files if split != "train" else []
    for task, (encoder, cache) in teacher_caches(root).items():
        with tqdm(total=len(paths), desc=f"{task} targets", unit="image") as bar:
            cache.fill(encoder, (Image.open(path).convert("RGB") for path in paths), progress=bar.update)


def steps_of(overrides: dict) -> dict[str, int]:
    """Progress units of an arm by stage, for the bar."""
    return {
        stage: overrides.get(stage, {}).get("max_steps", fields()["max_steps"])
        for stage, fields in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune))
    }


def run_arms(root: Path, arms: list[tuple[str, int]], overrides: dict, workers: int) -> None:
    """Arms as parallel one-thread processes, their logs in their folders. Raises RuntimeError with the end of an
    arm's log when it fails; the other arms are stopped and can be resumed."""
    steps = steps_of(overrides)
    done_before = {"pretrain": 0, "probe_pretrain": steps["pretrain"], "finetune": steps["pretrain"]}
    total = sum(steps.values())
    waiting = [arm for arm in arms if not (recipe.run_folder(*arm, root) / "result.json").exists()]
    running: dict[tuple[str, int], subprocess.Popen] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def position(arm) -> int:
        folder = recipe.run_folder(*arm, root)
        if (folder / "result.json").exists():
            return total
        stage, _, count = (folder / "progress").read_text().partition(" ") if (folder / "progress").exists() else "   "
        return done_before.get(stage, 0 if not stage.strip() else total) + int(count.strip() or 0)

    with tqdm(total=total * len(arms), desc="arms (training steps)", unit="step") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    method, seed = arm = waiting.pop(0)
                    folder = recipe.run_folder(method, seed, root)
                    folder.mkdir(parents=True, exist_ok=True)
                    command = [sys.executable, "-m", "ola_vlm.miniature.arm", "--method", method, "--seed", str(seed)]
                    command += ["--root", str(root), "--overrides", json.dumps(overrides)]
                    with (folder / "log.txt").open("ab") as log:
                        running[arm] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                time.sleep(1)
                bar.n = sum(position(arm) for arm in arms)
                bar.set_postfix_str(", ".join(f"{method} {seed}" for method, seed in running))
                for arm, process in list(running.items()):
                    if process.poll() is not None:
                        del running[arm]
                        if process.returncode:
                            log = (recipe.run_folder(*arm, root) / "log.txt").read_text(errors="replace")
                            raise RuntimeError(f"arm {arm} failed; the end of its log:\n{log[-3000:]}")
        finally:
            for process in running.values():
                process.terminate()


def collect(root: Path, methods: list[str], seeds: int, seconds: dict, checks: dict) -> dict:
    """report.json's content from the arms' folders; one ridge strength a task for all arms, chosen on validation."""
    folders = {method: [recipe.run_folder(method, seed, root) for seed in range(seeds)] for method in methods}
    stages = ("pretrain", "finetune")
    probes = {
        (folder, stage): json.loads((folder / f"probe_{stage}.json").read_text())
        for of in folders.values()
        for folder in of
        for stage in stages
    }
    validation = [scores["validation"] for scores in probes.values()]
    strengths = {task: choose_strength(validation, task) for task in (t["name"] for t in recipe.TASKS)}
    found, answers = {}, {}
    for method, of in folders.items():
        results = []
        for folder in of:
            result = json.loads((folder / "result.json").read_text())
            result["probes"] = {
                stage: {task: probes[folder, stage]["test"][best][task] for task, best in strengths.items()}
                for stage in stages
            }
            results.append(result)
        found[method] = {"seeds": results}
        answers[method] = [
            json.loads((folder / f"answers_{result['curve'][-1]['step']}.json").read_text())
            for folder, result in zip(of, results, strict=True)
        ]
    pairs = [("llava", "ola_vlm"), ("llava", "ola_vlm_shuffled"), ("ola_vlm_shuffled", "ola_vlm")]
    compared = {f"{b} - {a}": compare_answers(answers[a], answers[b]) for a, b in pairs if {a, b} <= answers.keys()}
    main_pair = compared.pop("ola_vlm - llava", None)
    quality = recipe.WEIGHTS / "quality.json"
    return {
        "methods": found,
        "chance": world.CHANCE,
        **({"comparison": main_pair} if main_pair else {}),
        "comparisons": compared,
        "world": {**checks, "components": json.loads(quality.read_text()) if quality.exists() else {}},
        "ridge_strength": strengths,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "seconds": {name: round(value) for name, value in seconds.items()},
        },
    }


@torch.no_grad()
def decoded_figures(root: Path, count: int = 4) -> None:
    """Depth and segmentation decoded from OLA-VLM's predictions right after pre-training, beside teacher and truth."""
    folder = recipe.run_folder("ola_vlm", 0, root) / "pretrain"
    model = OlaVlmForConditionalGeneration.from_pretrained(folder).eval()
    processor = OlaVlmProcessor.from_pretrained(folder)
    images = [Image.open(path).convert("RGB") for path in probe_paths(root, {"test": count})["test"]]
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text] * count, images=images, return_tensors="pt", add_special_tokens=False)
    predictions = model(**inputs, output_predictions=True).predictions
    truth = load_file(root / "data" / "test.safetensors")
    for task, (encoder, _) in teacher_caches(root).items():
        if task == "gen":
            continue
        truths = list(1 / truth["depth"][:count].astype(float) if task == "depth" else truth["mask"][:count])
        statistics = TargetStatistics.load(folder / "target_statistics" / f"{task}.safetensors")
        predictions_figure(
            root / f"decoded_{task}.png",
            encoder,
            images,
            predictions[task],
            truth=truths,
            statistics=statistics,
            title=f"{task}: decoded from the LLM's layers after pre-training",
            class_names=world.CLASSES if task == "seg" else (),
            class_colors=dataset.PALETTE.tolist() if task == "seg" else (),
        )


def publish(root: Path, methods: list[str], ship: bool = False) -> None:
    """The first seed's fine-tuned checkpoint becomes <out>/<method>/, ready for from_pretrained; ``ship`` also puts
    LLaVA and OLA-VLM, in half precision, where a clone finds them."""
    for method in methods:
        for path in (recipe.run_folder(method, 0, root) / "finetune").iterdir():
            if path.is_file() and path.name not in ("training_args.bin", "log_history.json"):
                shutil.copy2(path, root / method / path.name)
        statistics = recipe.run_folder(method, 0, root) / "pretrain" / "target_statistics"
        for folder in (root, recipe.WEIGHTS) if ship and method in SHIPPED else (root,):
            if statistics.exists():  # predictions are standardised: without these they can't be decoded
                shutil.copytree(statistics, folder / method / "target_statistics", dirs_exist_ok=True)
        if ship and method in SHIPPED:
            OlaVlmForConditionalGeneration.from_pretrained(root / method, dtype=torch.float16).save_pretrained(
                recipe.WEIGHTS / method
            )
            OlaVlmProcessor.from_pretrained(root / method).save_pretrained(recipe.WEIGHTS / method)


def main(argv=None) -> dict:
    """Runs the study and returns report.json's content."""
    parser = argparse.ArgumentParser(prog="ola-vlm miniature", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="seeds a method")
    parser.add_argument("--methods", nargs="+", choices=recipe.METHODS, default=list(recipe.METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--resume", action="store_true", help="go on with what an earlier run left in --out")
    parser.add_argument(
        "--workers", type=int, default=(os.cpu_count() or 1) + 1, help="arms at a time, one thread each"
    )
    parser.add_argument("--shrunk", action="store_true", help="4 steps on a few scenes: checks the chain only")
    parser.add_argument(
        "--ship", action="store_true", help="also write half-precision checkpoints to miniature/weights"
    )
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    root = args.out.resolve()
    if root.exists() and any(root.iterdir()) and not args.resume:
        parser.error(f"{args.out} is not empty: add --resume to go on with it, or choose another --out")
    root.mkdir(parents=True, exist_ok=True)
    settings = root / "settings.json"
    if settings.exists() and json.loads(settings.read_text()) != {"shrunk": args.shrunk}:
        parser.error(f"{args.out} was begun {'without' if args.shrunk else 'with'} --shrunk: choose another --out")
    settings.write_text(json.dumps({"shrunk": args.shrunk}))
    logging.set_verbosity_error()
    overrides = SHRUNK["arm"] if args.shrunk else {}
    clock = Clock(root / "seconds.json")
    sizes = SHRUNK["sizes"] if args.shrunk else dataset.SIZES
    questions = SHRUNK["questions"] if args.shrunk else dataset.QUESTIONS
    checks = dataset.write_world(root / "data", sizes, questions)
    shutil.copy2(root / "data" / "contact_sheet.png", root / "world.png")
    for name in ("text_only", "position_size", "position_size_pairs"):
        print(f"{name}: " + ", ".join(f"{task} {100 * value:.1f}%" for task, value in checks[name].items()))
    clock.lap("world")
    fill_targets(root, overrides.get("probe_splits", PROBE_SPLITS))
    clock.lap("targets")
    arms = [(method, seed) for seed in range(args.seeds) for method in args.methods]
    run_arms(root, arms, overrides, args.workers)
    clock.lap("arms")
    publish(root, args.methods, args.ship)
    if "ola_vlm" in args.methods:
        decoded_figures(root)
    results = collect(root, args.methods, args.seeds, clock.seconds, {k: v for k, v in checks.items() if k != "asked"})
    report = write_report(root, results)
    print(report.read_text())
    return results


if __name__ == "__main__":
    main()
