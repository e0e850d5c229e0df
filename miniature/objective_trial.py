"""One trial of the study of visual objectives, a process of its own: an arm with a seed, through all label budgets.

    python -m ola_vlm.miniature.objective_trial '{"root": ..., "stage": "confirm", "arm": "llava", "seed": 0, ...}'

`ola-vlm study objectives` starts it. It pre-trains once and fine-tunes once a budget; each budget that is done is one
small JSON file, which is not made again.
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, TrainerCallback, logging

from ..files.strangers import read_object
from ..files.writing import one_at_a_time, write_json, write_whole
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..probing.fit import batches
from ..probing.probes import score as score_probes
from ..probing.ridge import ALPHAS
from ..processing_ola_vlm import OlaVlmProcessor
from ..recipes import miniature as recipe
from ..recipes import study as design
from ..targets.fill import make_teachers, open_caches
from ..train import train
from ..training.arguments import OlaVlmArguments
from ..training.trainer import OlaVlmTrainer
from .asking import PLACED_IMAGES, Questions, changes_of, token_placement
from .objective_numbers import layers_mean
from .processes import peak_memory_mb
from .stored_vision import StoredCollator, StoredVision, TrainOnFeatures
from .trial import PROBE_BATCH, fit_ridge, probe_paths, read_json

# Counts changes of what a trial does: a result of another version is refused.
VERSION = 1
# Fields that change no result: where files lie, what is logged, saved and checked. `identity` leaves them out.
PLACES = {"output_dir", "data", "image_folder", "target_cache", "target_fill", "checkpoint", "disable_tqdm"}
PLACES |= {"report_to", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "check_images", "use_cpu"}
# Hashes of data and components, written by `objectives.prepare`.
WORLD_FILE = "study.json"


def result_file(root: Path, stage: str, arm: str, seed: int, budget: int, settings: dict) -> Path:
    """Where a result lies. Tuning has one for each settings, and names them."""
    name = f"seed{seed}_budget{budget}"
    if stage == "tune":
        name += f"_{label(design.relevant_settings(settings, arm, budget))}"
    return Path(root) / "results" / stage / arm / f"{name}.json"


def trial_folder(root: Path, stage: str, arm: str, seed: int, settings: dict) -> Path:
    """Where a trial works: its log, its progress, its fine-tuning."""
    name = f"seed{seed}"
    if stage == "tune":
        name += f"_{label(settings)}"
    return Path(root) / "runs" / stage / arm / name


def pretrain_folder(root: Path, stage: str, arm: str, seed: int, settings: dict) -> Path:
    """Where a pre-training lies; tuning's trials of the same pre-training share it."""
    name = f"seed{seed}"
    if stage == "tune":
        name = f"pretrain_seed{seed}_{label(design.relevant_settings(settings, arm, budget=0))}"
    return Path(root) / "runs" / stage / arm / name / "pretrain"


def label(settings: dict) -> str:
    """Of settings, as a part of a file's name."""
    return "_".join(f"{name}={value:g}" for name, value in settings.items())


def identity(root: Path, arm: str, seed: int, budget: int, settings: dict, scale: dict) -> dict:
    """What makes a result this one: seed, fields of both stages (lists and objects as hashes), how it is evaluated,
    and the hashes of data and components. Not: where files lie."""
    # In place of every folder: a result stays what it is when its study is moved.
    nowhere = Path("root")
    found = {"version": VERSION, "arm": arm, "seed": seed, "budget": budget}
    stages = {"pretrain": design.pretrain_fields(arm, seed, settings, scale, nowhere, nowhere)}
    # Budget 0 is the model right after pre-training: nothing is fine-tuned, so there is no step to choose.
    if budget > 0:
        arguments = arm, seed, budget, settings, scale, nowhere, nowhere, nowhere, nowhere
        stages["finetune"] = design.finetune_fields(*arguments)
        found["evaluations"] = scale["evaluations"]
        found["patience"] = scale["patience"]
    for stage, fields in stages.items():
        for name, value in fields.items():
            if name not in PLACES:
                found[f"{stage}.{name}"] = brief_value(value)
    return {**found, **read_json(Path(root) / WORLD_FILE)}


def brief_value(value):
    """A field's value; of a list or object, and of a place in the package, what does not depend on where it lies."""
    text = json.dumps(value).replace(str(recipe.WEIGHTS), "weights")
    if isinstance(value, (list, dict)) and value:
        return sha256(text.encode()).hexdigest()[:12]
    return json.loads(text)


def read_result(file: Path, wanted: dict) -> dict | None:
    """A result that is there; None if there is none. ValueError if it is of other settings, data or components."""
    if not file.exists():
        return None
    result = read_object(file)
    found = result.get("identity", {})
    differing = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    if differing:
        named = ", ".join(f"{name} {found.get(name)} (now {wanted.get(name)})" for name in sorted(differing))
        raise ValueError(f"{file} is of another study: {named}. Choose another --out, or move that file away")
    return result


def labelled_scenes(count: int, seed: int, budget: int) -> np.ndarray:
    """Which of `count` scenes have questions: a smaller budget's are among a larger one's, the same for all arms."""
    # The first ones of one permutation a seed, so budgets are nested. 11 sets it apart from the seed's other uses.
    return np.sort(np.random.default_rng([11, seed]).permutation(count)[:budget])


class Evaluations(TrainerCallback):
    """Answers the validation questions at even intervals of a fine-tuning and keeps the best step's weights; stops it
    after `patience` evaluations without a new best."""

    def __init__(self, validate, count: int, patience: int):
        self.validate = validate
        self.count = count
        self.patience = patience
        self.curve: list[dict] = []
        self.best: dict | None = None
        self.weights: dict[str, torch.Tensor] = {}
        self.seconds = 0.0

    def on_step_end(self, args, state, control, model, **kwargs):
        # The last one is the last step.
        steps = {round(state.max_steps * (i + 1) / self.count) for i in range(self.count)}
        if state.global_step not in steps:
            return
        start = time.process_time()
        point = {"step": state.global_step, **self.validate(model)}
        self.curve.append(point)
        # Of equal steps the earlier one stays.
        if self.best is None or point["accuracy"]["average"] > self.best["accuracy"]["average"]:
            self.best = point
            # In memory: on disk it would be a checkpoint for each new best.
            trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
            self.weights = {name: value.detach().clone() for name, value in trained}
        # Evaluations since the best one.
        since = len(self.curve) - 1 - self.curve.index(self.best)
        if since >= self.patience:
            control.should_training_stop = True
        self.seconds += time.process_time() - start

    @torch.no_grad()
    def restore(self, model) -> None:
        """The model as it was at the best step."""
        # What is frozen hasn't moved: the trained parameters are enough.
        parameters = dict(model.named_parameters())
        for name, value in self.weights.items():
            parameters[name].copy_(value)


class Trial:
    """`settings`: learning rates and weight; `scale`: steps, batches, evaluations (`recipes.study.SCALE`)."""

    def __init__(
        self, root: str, stage: str, arm: str, seed: int, budgets: Sequence[int], settings: dict, scale: dict
    ):
        self.root = Path(root)
        self.stage = stage
        self.arm = arm
        self.seed = seed
        self.budgets = sorted(budgets)
        self.settings = settings
        self.scale = scale
        self.folder = trial_folder(self.root, stage, arm, seed, settings)
        self.checkpoint = pretrain_folder(self.root, stage, arm, seed, settings)
        images = sorted((self.root / "data" / "images").glob("*.png"))
        self.store = StoredVision.prepare(self.root / "features", recipe.WEIGHTS / "vision_tower", images)
        # The model's own vocabulary is larger: `<image>` and task tokens are no words.
        self.words = AutoConfig.from_pretrained(recipe.WEIGHTS / "language_model").vocab_size
        self.asked: dict[str, Questions] = {}

    def result_file(self, budget: int) -> Path:
        return result_file(self.root, self.stage, self.arm, self.seed, budget, self.settings)

    def identity(self, budget: int) -> dict:
        return identity(self.root, self.arm, self.seed, budget, self.settings, self.scale)

    def questions(self, split: str, processor) -> Questions:
        if split not in self.asked:
            asked = read_json(self.root / "data" / f"{split}_questions.json")
            self.asked[split] = Questions(asked, processor, self.store)
        return self.asked[split]

    def run(self) -> None:
        """Every budget that has no result yet."""
        # The others are there after an interruption, or when more budgets are asked for later.
        missing = []
        for budget in self.budgets:
            if read_result(self.result_file(budget), self.identity(budget)) is None:
                missing.append(budget)
        for number, budget in enumerate(missing):
            self.progress(number / len(missing))
            # Runs once: for every further budget it is found on disk.
            pretrained = self.pretrain()
            if budget == 0:
                self.right_after_pretraining(pretrained)
            else:
                self.finetune(budget)
        self.progress(1.0)

    def progress(self, share: float) -> None:
        write_whole(self.folder / "progress", str(share))

    def pretrain(self) -> dict:
        """What is known of the pre-training, which is run unless its checkpoint is there."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        # Tuning's trials that share it may run side by side: the first one trains, and the others find it done.
        with one_at_a_time(self.checkpoint.parent):
            return self.pretrain_alone()

    def pretrain_alone(self) -> dict:
        done = self.checkpoint.with_name("pretrained.json")
        found = read_result(done, self.identity(0))
        if found is not None:
            return found
        # Of an interrupted trial: it begins anew.
        if self.checkpoint.exists():
            shutil.rmtree(self.checkpoint)
        arguments = self.arm, self.seed, self.settings, self.scale, self.root, self.checkpoint
        fields = design.pretrain_fields(*arguments)
        # Processor time, which other work on the machine lengthens little.
        start = time.process_time()
        trainer = self.train(fields, [])
        found = {"identity": self.identity(0), "seconds": time.process_time() - start}
        found["losses"] = last_losses(trainer.state.log_history)
        found["target_bytes"] = self.target_bytes(fields)
        write_json(done, found)
        return found

    def train(self, fields: dict, callbacks: list[TrainerCallback]) -> OlaVlmTrainer:
        make_collator = partial(StoredCollator, store=self.store)
        # ola_vlm.train, a script too, names the package absolutely: to pyright its classes are others.
        trainer = train(OlaVlmArguments(**fields), [*callbacks, TrainOnFeatures()], make_collator=make_collator)  # pyright: ignore[reportArgumentType] (see above)
        # It is None only for a resumed run that has finished already.
        assert trainer is not None
        return trainer  # pyright: ignore[reportReturnType] (see above)

    def target_bytes(self, fields: dict) -> int:
        """On disk, of all stored targets of the arm's tasks."""
        if not fields["tasks"]:
            return 0
        caches = open_caches(self.root / "targets", make_teachers(fields["tasks"], fields["teachers"]))
        # Tasks may share a cache.
        total = 0
        for folder in {cache.folder for cache in caches.values()}:
            total += sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return total

    def validate(self, model, processor) -> dict:
        """Accuracy on the validation questions, and where the projected tokens lie."""
        questions = self.questions("validation", processor)
        return {
            "accuracy": rounded(accuracy(questions, questions.correct(model))),
            "placement": rounded(self.placement(model)),
        }

    def placement(self, model) -> dict[str, float]:
        # The same images each time: arms and steps are compared.
        names = [name for name in self.store.place if name.startswith("validation_")][:PLACED_IMAGES]
        return token_placement(model, self.store.features(names), self.words)

    def right_after_pretraining(self, pretrained: dict) -> None:
        """The result of budget 0."""
        model = OlaVlmForConditionalGeneration.from_pretrained(self.checkpoint, dtype=torch.float32)
        processor = OlaVlmProcessor.from_pretrained(self.checkpoint)
        start = time.process_time()
        curve = [{"step": 0, **self.validate(model, processor)}]
        seconds = {"pretrain": pretrained["seconds"], "validation": time.process_time() - start}
        result = {"validation": curve, "chosen_step": 0}
        for name in ("losses", "target_bytes"):
            result[name] = pretrained[name]
        self.conclude(0, model, processor, result, seconds)

    def finetune(self, budget: int) -> None:
        """The result of a budget: the best step on the validation questions answers the test questions."""
        folder = self.folder / f"finetune_{budget}"
        # Of an interrupted trial: it begins anew, as the best step's weights were in memory only.
        if folder.exists():
            shutil.rmtree(folder)
        data = self.labelled_data(budget)
        arguments = self.arm, self.seed, budget, self.settings, self.scale, self.root, folder, self.checkpoint, data
        fields = design.finetune_fields(*arguments)
        processor = OlaVlmProcessor.from_pretrained(self.checkpoint)

        def validate(model) -> dict:
            return self.validate(model, processor)

        evaluations = Evaluations(validate, self.scale["evaluations"], self.scale["patience"])
        start = time.process_time()
        trainer = self.train(fields, [evaluations])
        # What evaluating took is no cost of the method's.
        spent = time.process_time() - start
        seconds = {"finetune": spent - evaluations.seconds, "validation": evaluations.seconds}
        evaluations.restore(trainer.model)
        # The last step is evaluated in any case.
        assert evaluations.best is not None
        result = {"validation": evaluations.curve, "chosen_step": evaluations.best["step"]}
        result["losses"] = last_losses(trainer.state.log_history)
        self.conclude(budget, trainer.model, processor, result, seconds)
        # What is kept of a fine-tuning is its result.
        shutil.rmtree(folder)

    def labelled_data(self, budget: int) -> Path:
        """The rows of the seed's labelled scenes."""
        whole = self.root / "data" / "finetune.json"
        rows = read_json(whole)
        # With all scenes labelled there is nothing to choose.
        if budget >= len(rows):
            return whole
        file = self.folder / f"finetune_{budget}.json"
        write_whole(file, json.dumps([rows[i] for i in labelled_scenes(len(rows), self.seed, budget)]))
        return file

    def conclude(self, budget: int, model, processor, result: dict, seconds: dict) -> None:
        """Asks what is asked of the chosen step, once, and writes the result. In tuning no test question is asked."""
        head = {"stage": self.stage, "arm": self.arm, "seed": self.seed, "budget": budget}
        if self.stage == "confirm":
            validation = self.questions("validation", processor)
            test = self.questions("test", processor)
            start = time.process_time()
            correct = test.correct(model)
            result["accuracy"] = rounded(accuracy(test, correct))
            # A digit a question, 1 for right: arms can be paired question by question.
            result["correct"] = "".join(str(int(right)) for right in correct)
            result["questions"] = test.per_task
            seconds["test"] = time.process_time() - start
            # What answers depend on is asked of the validation images, which chose the step: the report says how far
            # that makes the unchanged answers too good.
            start = time.process_time()
            changed = {change: validation.correct(model, change) for change in changes_of(model)}
            result["changes"] = {name: rounded(accuracy(validation, right)) for name, right in changed.items()}
            seconds["changes"] = time.process_time() - start
            # Probes are slow: right after pre-training, and with the most labels.
            if budget in (0, max(map(int, self.scale["finetune_steps"]))):
                start = time.process_time()
                result["probes"] = self.probe(model, processor)
                seconds["probes"] = time.process_time() - start
        result["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
        result["peak_memory_mb"] = round(peak_memory_mb())
        write_json(self.result_file(budget), {**head, **result, "identity": self.identity(budget)}, indent=None)

    def probe(self, model, processor) -> dict:
        """Ridge probes of every layer: {split: {alpha: {task: {layer: mean-centered cosine}}}}."""
        splits = self.scale["probe_splits"]
        fitter, reader, targets = fit_ridge(self.root, model, processor, splits)
        paths = probe_paths(self.root, splits)
        probes = {alpha: fitter.solve(dict.fromkeys(targets, alpha)) for alpha in ALPHAS}
        found = {}
        for split in ("validation", "test"):
            scores, _ = score_probes(batches(reader, targets, paths[split], PROBE_BATCH), probes)
            found[split] = {f"{alpha:g}": centered(by_task) for alpha, by_task in scores.items()}
        # Validation scores only choose the alpha: their mean over layers will do.
        for by_task in found["validation"].values():
            for task, layers in by_task.items():
                by_task[task] = round(layers_mean(layers), 4)
        return found


def centered(by_task: dict) -> dict:
    """Of a probe's scores the mean-centered cosines, rounded."""
    found = {}
    for task, layers in by_task.items():
        found[task] = {str(layer): round(scores["ridge"], 4) for layer, scores in layers.items()}
    return found


def accuracy(questions: Questions, correct: Sequence[bool]) -> dict[str, float]:
    """Shares by task, and `average`: their mean."""
    # Questions of a task stand together, in this order.
    found = {}
    start = 0
    for task, count in questions.per_task.items():
        found[task] = sum(correct[start : start + count]) / count
        start += count
    return {**found, "average": sum(found.values()) / len(found)}


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}


def last_losses(history: list[dict]) -> dict[str, float]:
    """The losses that a run logged last."""
    logged = [entry for entry in history if "loss" in entry]
    if not logged:
        return {}
    return {name: round(value, 5) for name, value in logged[-1].items() if name.startswith("loss/")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    Trial(**json.loads(sys.argv[1])).run()
