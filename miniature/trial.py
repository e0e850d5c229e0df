"""One arm of the study, a process of its own: pre-train, fine-tune, answer questions along the way, probe twice.

    python -m ola_vlm.miniature.trial '{"method": "ola_vlm", "seed": 0, "root": "runs/miniature", "overrides": {}}'

The study starts it; it leaves result.json in its folder. Run again, it goes on where it was interrupted.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, logging

from ..eval.multiple_choice import score
from ..inference.generate import generate_answers
from ..probing.fit import batches, fit
from ..probing.probes import score as score_probes
from ..probing.ridge import ALPHAS, RidgeFit
from ..probing.states import StateReader
from ..recipes import miniature as recipe
from ..targets.files import write_whole
from ..targets.fill import make_teachers, open_caches
from ..train import load_model, train
from ..training.arguments import OlaVlmArguments

STAGES = {"pretrain": recipe.pretrain, "finetune": recipe.finetune}
PROBE_SPLITS = {"train": 1500, "validation": 300, "test": 500}
PROBE_BATCH = 50
PROMPT = "describe the image ."
CURVE_POINTS = 5


def read_json(path: Path):
    return json.loads(path.read_text())


def probe_paths(root: Path, splits: dict[str, int]) -> dict[str, list[Path]]:
    """The first images of each split."""
    images = root / "data" / "images"
    return {split: sorted(images.glob(f"{split}_*.png"))[:count] for split, count in splits.items()}


class Clock:
    """Seconds by name, kept on disk so that an interrupted run adds up."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds = read_json(path) if path.exists() else {}
        self.last = time.time()

    def lap(self, name: str) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.time() - self.last
        self.last = time.time()
        write_whole(self.path, json.dumps(self.seconds))


def fit_ridge(root: Path, model, processor, splits: dict[str, int], describe: str | None = None):
    """(RidgeFit on the training images, the StateReader and targets that it had): every layer's probes."""
    targets = open_caches(root / "targets", make_teachers(recipe.TASKS, recipe.TEACHERS))
    reader, text = StateReader(model, processor, PROMPT), model.config.text_config
    about = {"prompt": reader.prompt, "square": reader.square}
    fitter = RidgeFit(recipe.TASKS, text.num_hidden_layers + 1, text.hidden_size, about)
    fit(fitter, reader, targets, probe_paths(root, splits)["train"], PROBE_BATCH, describe=describe)
    return fitter, reader, targets


class Arm(TrainerCallback):
    """A method with a seed; `overrides`: changes of the recipe's fields by stage, and `probe_splits`."""

    def __init__(self, method: str, seed: int, root: str | Path, overrides: dict):
        self.method, self.seed, self.root, self.overrides = method, seed, Path(root), overrides
        self.folder = recipe.run_folder(method, seed, root)
        self.clock = Clock(self.folder / "seconds.json")
        self.questions = read_json(self.root / "data" / "test_questions.json")

    def arguments(self, stage: str, **changes) -> OlaVlmArguments:
        fields = STAGES[stage](self.method, self.seed, self.root) | self.overrides.get(stage, {}) | changes
        return OlaVlmArguments(**fields, disable_tqdm=True, report_to="none")

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        """Says how far the arm is (0 to 1) and, at CURVE_POINTS steps of fine-tuning, answers the test questions."""
        share = state.global_step / state.max_steps
        done = 0.3 * share if args.stage == "pretrain" else 0.3 + 0.7 * share
        write_whole(self.folder / "progress", str(done))
        at_point = state.global_step % max(1, state.max_steps // CURVE_POINTS) == 0 or share == 1
        if args.stage == "finetune" and at_point:
            self.clock.lap("finetune")
            images = self.root / "data" / "images"
            answers = generate_answers(model, processing_class, self.questions, images, batch_size=100)
            write_whole(self.folder / f"answers_{state.global_step}.json", json.dumps(answers))
            self.clock.lap("answering")

    def train(self, stage: str) -> list[dict]:
        """Runs a stage, or what is left of it; returns what the trainer logged."""
        path = self.folder / stage / "log_history.json"
        if not path.exists():
            # ola_vlm.train, a script too, names the package absolutely: to pyright its classes are others.
            train(self.arguments(stage, resume_from_checkpoint="true"), callbacks=[self])  # pyright: ignore[reportArgumentType]
            state = read_json(self.folder / stage / "trainer_state.json")  # also where the run had finished
            write_whole(path, json.dumps(state["log_history"]))
            self.clock.lap(stage)
        return read_json(path)

    def probe(self, stage: str) -> None:
        """Scores of every strength on validation and test; the study chooses the strength for all methods."""
        path = self.folder / f"probe_{stage}.json"
        if path.exists():
            return
        model, processor = load_model(self.arguments("finetune", checkpoint=str(self.folder / stage)))  # pyright: ignore[reportArgumentType]
        splits = self.overrides.get("probe_splits", PROBE_SPLITS)
        fitter, reader, targets = fit_ridge(self.root, model, processor, splits)
        paths = probe_paths(self.root, splits)
        probes = {strength: fitter.solve(dict.fromkeys(targets, strength)) for strength in ALPHAS}
        parts = {split: batches(reader, targets, paths[split], PROBE_BATCH) for split in ("validation", "test")}
        scores = {split: score_probes(part, probes)[0] for split, part in parts.items()}
        write_whole(path, json.dumps(scores))
        self.clock.lap("probing")

    def run(self) -> None:
        """All of the arm, up to result.json."""
        logs = {}
        for stage in STAGES:
            logs[stage] = self.train(stage)
            self.probe(stage)

        def logged(stage: str, name: str) -> list:
            return [[entry["step"], entry[name]] for entry in logs[stage] if name in entry]

        names = [name for name in logs["pretrain"][0] if name.startswith("loss/")]
        losses = {name.removeprefix("loss/"): logged("pretrain", name) for name in names}
        losses["finetune ntp"] = logged("finetune", "loss")
        answers = {int(path.stem.split("_")[1]): path for path in self.folder.glob("answers_*.json")}
        curve = [{"step": step, "accuracy": score(read_json(answers[step]))} for step in sorted(answers)]
        result = {
            "seed": self.seed,
            "curve": curve,
            "accuracy": curve[-1]["accuracy"],
            "losses": losses,
            "seconds": self.clock.seconds,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        write_whole(self.folder / "result.json", json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    Arm(**json.loads(sys.argv[1])).run()
