"""One trial of the study, a process of its own: pre-train, fine-tune, answer questions along the way, probe twice.

    python -m ola_vlm.miniature.trial '{"method": "ola_vlm", "seed": 0, "root": "runs/miniature", "overrides": {}}'

The study starts it; it leaves result.json in its folder. Run again, it goes on where it was interrupted.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, logging

from ..eval.multiple_choice import score
from ..files.writing import write_whole
from ..inference.generate import generate_answers
from ..probing.fit import batches, fit
from ..probing.probes import score as score_probes
from ..probing.ridge import ALPHAS, RidgeFit
from ..probing.states import StateReader
from ..recipes import miniature as recipe
from ..targets.fill import make_teachers, open_caches
from ..train import load_model, train
from ..training.arguments import OlaVlmArguments
from .processes import peak_memory_mb

STAGES = {"pretrain": recipe.pretrain, "finetune": recipe.finetune}
# Images that probes are fitted on, that choose alpha, and that give the scores.
PROBE_SPLITS = {"train": 1500, "validation": 300, "test": 500}
PROBE_BATCH = 50
# PT's prompt (`world.dataset`): probes read the layers of a model that is asked what it knows.
PROMPT = "describe the image ."
# How many times IFT pauses to answer the test questions.
CURVE_POINTS = 5


def read_json(path: Path):
    return json.loads(path.read_text())


def read_if_there(path: Path) -> dict:
    """A file's object; an empty one if there is no such file."""
    if not path.exists():
        return {}
    return read_json(path)


def probe_paths(root: Path, splits: dict[str, int]) -> dict[str, list[Path]]:
    """The first images of each split."""
    images = root / "data" / "images"
    return {split: sorted(images.glob(f"{split}_*.png"))[:count] for split, count in splits.items()}


def processor_time() -> float:
    """Seconds of this process on all cores, with those of the processes that it has waited for, such as a pool's."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Timer:
    """Seconds by name, kept on disk so that an interrupted run adds up: of the wall, and of processors
    (`processor_time`), which other work on the machine lengthens little."""

    def __init__(self, path: Path):
        self.path = path
        self.processor_path = path.with_name(f"processor_{path.name}")
        self.seconds = read_if_there(path)
        self.processor_seconds = read_if_there(self.processor_path)
        self.last = time.time()
        self.processor_last = processor_time()

    def lap(self, name: str) -> None:
        now = time.time()
        processor_now = processor_time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.processor_seconds[name] = self.processor_seconds.get(name, 0.0) + processor_now - self.processor_last
        self.last = now
        self.processor_last = processor_now
        write_whole(self.path, json.dumps(self.seconds))
        write_whole(self.processor_path, json.dumps(self.processor_seconds))


def fit_ridge(root: Path, model, processor, splits: dict[str, int], describe: str | None = None):
    """Fits ridge probes of every layer on the training images; returns the fit, its StateReader and its targets."""
    # The study has filled the caches before its trials began.
    targets = open_caches(root / "targets", make_teachers(recipe.TASKS, recipe.TEACHERS))
    reader = StateReader(model, processor, PROMPT)
    about = {"prompt": reader.prompt, "square": reader.square}
    text_config = model.config.text_config
    # One more: layer 0 are the embeddings.
    layers = text_config.num_hidden_layers + 1
    fitter = RidgeFit(recipe.TASKS, layers, text_config.hidden_size, about)
    fit(fitter, reader, targets, probe_paths(root, splits)["train"], PROBE_BATCH, describe=describe)
    return fitter, reader, targets


class Trial(TrainerCallback):
    """A method with a seed; `overrides`: changes of the recipe's fields by stage, and `probe_splits`."""

    def __init__(self, method: str, seed: int, root: str | Path, overrides: dict):
        self.method = method
        self.seed = seed
        self.root = Path(root)
        self.overrides = overrides
        self.folder = recipe.run_folder(method, seed, root)
        self.timer = Timer(self.folder / "seconds.json")
        self.questions = read_json(self.root / "data" / "test_questions.json")

    def arguments(self, stage: str, **changes) -> OlaVlmArguments:
        fields = STAGES[stage](self.method, self.seed, self.root)
        fields.update(self.overrides.get(stage, {}))
        # The caller's changes come last: they win over the study's, and these over the recipe's.
        fields.update(changes)
        return OlaVlmArguments(**fields, disable_tqdm=True, report_to="none")

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        """Says how far the trial is (0 to 1) and, at CURVE_POINTS steps of fine-tuning, answers the test questions."""
        share = state.global_step / state.max_steps
        # Pre-training takes about 3 tenths of the time.
        if args.stage == "pretrain":
            done = 0.3 * share
        else:
            done = 0.3 + 0.7 * share
        write_whole(self.folder / "progress", str(done))
        # The answers along the way, and those at the end, which are the trial's result.
        steps_between = max(1, state.max_steps // CURVE_POINTS)
        at_point = state.global_step % steps_between == 0 or share == 1
        if args.stage == "finetune" and at_point:
            # Each lap ends what went before it: answering is no time of training's.
            self.timer.lap("finetune")
            images = self.root / "data" / "images"
            answers = generate_answers(model, processing_class, self.questions, images, batch_size=100)
            write_whole(self.folder / f"answers_{state.global_step}.json", json.dumps(answers))
            self.timer.lap("answering")

    def train(self, stage: str) -> list[dict]:
        """Runs a stage, or what is left of it; returns what the trainer logged."""
        path = self.folder / stage / "log_history.json"
        if not path.exists():
            # ola_vlm.train, a script too, names the package absolutely: to pyright its classes are others.
            args = self.arguments(stage, resume_from_checkpoint="true")
            name = recipe.recipe_name(self.method, stage)
            train(args, callbacks=[self], recipe=name)  # pyright: ignore[reportArgumentType] (see above)
            # Not what `train` returns: the run may have finished before.
            state = read_json(self.folder / stage / "trainer_state.json")
            write_whole(path, json.dumps(state["log_history"]))
            self.timer.lap(stage)
        return read_json(path)

    def probe(self, stage: str) -> None:
        """Scores of every alpha on validation and test; the study chooses the alpha for all methods."""
        path = self.folder / f"probe_{stage}.json"
        if path.exists():
            return
        model, processor = load_model(self.arguments("finetune", checkpoint=str(self.folder / stage)))  # pyright: ignore[reportArgumentType] (as in `train`)
        splits = self.overrides.get("probe_splits", PROBE_SPLITS)
        fitter, reader, targets = fit_ridge(self.root, model, processor, splits)
        paths = probe_paths(self.root, splits)
        # One pass over the images serves every alpha: only a linear system is solved for each.
        probes = {alpha: fitter.solve(dict.fromkeys(targets, alpha)) for alpha in ALPHAS}
        parts = {split: batches(reader, targets, paths[split], PROBE_BATCH) for split in ("validation", "test")}
        scores = {split: score_probes(part, probes)[0] for split, part in parts.items()}
        write_whole(path, json.dumps(scores))
        self.timer.lap("probing")

    def run(self) -> None:
        """All of the trial, up to result.json."""
        logs = {}
        for stage in STAGES:
            logs[stage] = self.train(stage)
            self.probe(stage)

        # Entries differ in what they hold: only every `logging_steps`th has losses, the last one run times.
        def logged(stage: str, name: str) -> list:
            return [[entry["step"], entry[name]] for entry in logs[stage] if name in entry]

        names = [name for name in logs["pretrain"][0] if name.startswith("loss/")]
        losses = {}
        for name in names:
            curve_of_loss = logged("pretrain", name)
            # A part without a weight is logged as 0.
            if any(value for _, value in curve_of_loss):
                losses[name.removeprefix("loss/")] = curve_of_loss
        losses["finetune ntp"] = logged("finetune", "loss")
        # By number: as texts, step 1000 comes before step 200.
        answers = {int(path.stem.split("_")[1]): path for path in self.folder.glob("answers_*.json")}
        curve = [{"step": step, "accuracy": score(read_json(answers[step]))} for step in sorted(answers)]
        result = {
            "seed": self.seed,
            "curve": curve,
            # The last point of the curve is at IFT's last step.
            "accuracy": curve[-1]["accuracy"],
            "losses": losses,
            "seconds": self.timer.seconds,
            "processor_seconds": self.timer.processor_seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        write_whole(self.folder / "result.json", json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    Trial(**json.loads(sys.argv[1])).run()
