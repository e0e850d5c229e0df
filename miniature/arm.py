"""One arm of the study, a process of its own: pre-train, fine-tune, answer questions along the way, probe twice.

    python -m ola_vlm.miniature.arm --method ola_vlm --seed 0 --root runs/miniature

Started by the study; leaves result.json in its folder. Run again, it goes on where it was interrupted.
"""

import argparse
import json
import math
import resource
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import TrainerCallback, logging

from ola_vlm.eval.multiple_choice import generate_answers, score
from ola_vlm.probing.ridge import ModelProbe
from ola_vlm.recipes import miniature as recipe
from ola_vlm.targets.cache import TargetCache
from ola_vlm.targets.encoders import ENCODERS
from ola_vlm.train import load_model, train
from ola_vlm.training.arguments import OlaVlmArguments

PROBE_SPLITS = {"train": 1500, "validation": 300, "test": 500}
STRENGTHS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
PROMPT = "describe the image ."
CURVE_POINTS = 5


def teacher_caches(root: Path) -> dict[str, tuple]:
    """Task -> (its teacher, its target cache)."""
    found = {}
    for task in recipe.TASKS:
        teacher = dict(recipe.TEACHERS[task["name"]])
        encoder_class = ENCODERS[teacher.pop("encoder")]
        encoder = encoder_class.from_pretrained(teacher.pop("path"), grid=math.isqrt(task["target_length"]), **teacher)
        found[task["name"]] = encoder, TargetCache(root / "targets", encoder.fingerprint)
    return found


def probe_paths(root: Path, splits: dict[str, int]) -> dict[str, list[Path]]:
    """The first images of each split."""
    return {
        split: sorted((root / "data" / "images").glob(f"{split}_*.png"))[:count] for split, count in splits.items()
    }


class Clock:
    """Seconds by name, kept on disk so that an interrupted run adds up."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds = json.loads(path.read_text()) if path.exists() else {}
        self.last = time.time()

    def lap(self, name: str) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.time() - self.last
        self.last = time.time()
        self.path.write_text(json.dumps(self.seconds))


class Watch(TrainerCallback):
    """Tells the study how far the arm is and, in fine-tuning, answers the test questions at several steps."""

    def __init__(self, arm: "Arm", answer: bool):
        self.arm, self.answer = arm, answer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.arm.tell(f"{args.stage} {state.global_step}")
        every = max(1, state.max_steps // CURVE_POINTS)
        if self.answer and (state.global_step % every == 0 or state.global_step == state.max_steps):
            self.arm.clock.lap(args.stage)
            self.arm.evaluate(model, state.global_step)
            self.arm.clock.lap("answering")


class Arm:
    """A method with a seed; ``overrides``: changes of the recipe's fields by stage, as the study hands them down."""

    def __init__(self, method: str, seed: int, root: Path, overrides: dict | None = None):
        self.method, self.seed, self.root = method, seed, root
        self.overrides = overrides or {}
        self.folder = recipe.run_folder(method, seed, root)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clock = Clock(self.folder / "seconds.json")
        self.questions = json.loads((root / "data" / "test_questions.json").read_text())
        self.processor = None

    def tell(self, text: str) -> None:
        (self.folder / "progress").write_text(text)

    def evaluate(self, model, step: int) -> None:
        """Generates all test answers; keeps the raw outputs and a point of the curve."""
        answers = generate_answers(
            model, self.processor, self.questions, self.root / "data" / "images", batch_size=100
        )
        (self.folder / f"answers_{step}.json").write_text(json.dumps(answers))

    def probe(self, stage: str) -> None:
        """Scores of every strength on validation and test; the study chooses the strength for all methods."""
        path = self.folder / f"probe_{stage}.json"
        if path.exists():
            return
        self.tell(f"probe_{stage} 0")
        args = OlaVlmArguments(**self.arguments("finetune") | {"checkpoint": str(self.folder / stage)})
        model, processor = load_model(args)
        paths = probe_paths(self.root, self.overrides.get("probe_splits", PROBE_SPLITS))
        images = {split: [Image.open(p).convert("RGB") for p in files] for split, files in paths.items()}
        targets = {task: cache for task, (_, cache) in teacher_caches(self.root).items()}
        probe = ModelProbe(model, processor, targets, batch_size=50, prompt=PROMPT)
        probe.fit(images["train"], range(len(images["train"])))
        scores = {
            split: {
                str(strength): value
                for strength, value in probe.score(images[split], range(len(images[split])), STRENGTHS).items()
            }
            for split in ("validation", "test")
        }
        path.write_text(json.dumps(scores))
        self.clock.lap("probing")

    def arguments(self, stage: str) -> dict:
        fields = {"pretrain": recipe.pretrain, "finetune": recipe.finetune}[stage](self.method, self.seed, self.root)
        return fields | self.overrides.get(stage, {}) | {"disable_tqdm": True, "report_to": "none"}

    def run(self) -> dict:
        """All of the arm; returns what result.json holds."""
        for stage in ("pretrain", "finetune"):
            if not (self.folder / stage / "log_history.json").exists():
                self.clock.last = time.time()
                fields = self.arguments(stage) | {"resume_from_checkpoint": "true"}
                args = OlaVlmArguments(**fields)
                self.processor = self.processor or load_model(args)[1]
                trainer = train(args, callbacks=[Watch(self, stage == "finetune")])
                (self.folder / stage / "log_history.json").write_text(json.dumps(trainer.state.log_history))
                self.clock.lap(stage)
            self.probe(stage)
        history = json.loads((self.folder / "pretrain" / "log_history.json").read_text())
        fine = json.loads((self.folder / "finetune" / "log_history.json").read_text())
        losses: dict[str, list] = {}
        for entry in history:
            for name, value in entry.items():
                if name.startswith("loss/"):
                    losses.setdefault(name.removeprefix("loss/"), []).append([entry["step"], value])
        losses["finetune ntp"] = [[entry["step"], entry["loss"]] for entry in fine if "loss" in entry]
        steps = sorted(int(path.stem.split("_")[1]) for path in self.folder.glob("answers_*.json"))
        curve = [
            {"step": step, "accuracy": score(json.loads((self.folder / f"answers_{step}.json").read_text()))}
            for step in steps
        ]
        result = {
            "seed": self.seed,
            "curve": curve,
            "accuracy": curve[-1]["accuracy"],
            "losses": losses,
            "seconds": self.clock.seconds,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        (self.folder / "result.json").write_text(json.dumps(result))
        self.tell("done 0")
        return result


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ola_vlm.miniature.arm", description=__doc__)
    parser.add_argument("--method", required=True, choices=recipe.METHODS)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--overrides", type=json.loads, default={}, help="JSON: stage -> fields of OlaVlmArguments")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    Arm(args.method, args.seed, args.root, args.overrides).run()


if __name__ == "__main__":
    main()
