"""`ola-vlm study objectives`: which visual objective makes answers better, and at which number of labels?

docs/STUDY.md is its protocol; `commands/study_objectives.py` has its arguments.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from ..commands.running import command
from ..recipes import miniature as recipe
from ..recipes import study as design
from ..targets.files import only_one, read_object, write_json, write_whole
from ..targets.fill import fill, make_teachers, open_caches
from ..world import dataset
from .objective_report import write_report
from .objective_results import collect, pack, read_results, unpack
from .objective_trial import WORLD_FILE, Trial, identity, read_result, result_file, trial_folder
from .processes import Job, run_jobs
from .stored_vision import StoredVision, weights_hash
from .study import prepare as prepare_world
from .trial import read_json

COMPONENTS = ("language_model", "vision_tower", "gen", "depth", "seg")
FULL = {"sizes": dataset.SIZES, "questions": dataset.QUESTIONS, "scale": design.SCALE}
# Checks the chain in a minute or two; its numbers mean nothing.
SHRUNK = {
    "sizes": {"train": 96, "validation": 320, "test": 320},
    "questions": {"validation": 24, "test": 24},
    "scale": {
        "pretrain_steps": 2,
        "pretrain_batch": 4,
        "finetune_steps": {"8": 2, "24": 2},
        "finetune_batch": 4,
        "evaluations": 2,
        "patience": 2,
        "probe_splits": {"train": 16, "validation": 8, "test": 8},
    },
}

PACKED = """Results of the confirming runs (../STUDY.md), a file an arm and a line a trial and budget.

`ola-vlm study objectives --report --out docs/study` makes table and figures again.
"""


def prepare(root: Path, size: dict) -> None:
    """The world, its targets and vision features in `root`, and the hashes that results carry. ValueError if it was
    begun with another size."""
    options = {"sizes": size["sizes"], "questions": size["questions"]}
    overrides = {"probe_splits": size["scale"]["probe_splits"]}
    prepare_world(root, {**options, "overrides": overrides}, options)
    images = sorted((root / "data" / "images").glob("*.png"))
    StoredVision.prepare(root / "features", recipe.WEIGHTS / "vision_tower", images)
    fill_arms_targets(root)
    found = {"data": data_hash(root / "data", images)}
    for name in COMPONENTS:
        found[name] = weights_hash(recipe.WEIGHTS / name)
    write_json(root / WORLD_FILE, found)


def fill_arms_targets(root: Path) -> None:
    """Every target that some arm's training reads, computed once for all trials."""
    images = sorted(map(str, (root / "data" / "images").glob("train_*.png")))
    filled = []
    for arm in design.ARMS:
        fields = design.pretrain_fields(arm, 0, design.DEFAULT_SETTINGS, design.SCALE, root, root)
        teachers = make_teachers(fields["tasks"], fields["teachers"])
        if not teachers or fields["teachers"] in filled:
            continue
        caches = open_caches(root / "targets", teachers)
        report = fill(root / "targets", teachers, caches, images)
        if report.failed:
            raise ValueError(f"images without a target: {list(report.failed.values())}")
        filled.append(fields["teachers"])


def data_hash(folder: Path, images: Sequence[Path]) -> str:
    """Of what trials read: captions, questions, and images by their pixels."""
    digest = sha256()
    for name in ("pretrain", "finetune", "validation_questions", "test_questions"):
        digest.update((folder / f"{name}.json").read_bytes())
    for image in images:
        digest.update(image.read_bytes())
    return digest.hexdigest()[:16]


class Study:
    """A study's folder, its scale and how many processes may run at a time."""

    def __init__(self, root: Path, scale: dict, processes: int):
        self.root = root
        self.scale = scale
        self.processes = processes

    def run(self, stage: str, trials: Sequence[tuple[str, int, dict]], budgets: Sequence[int], done=lambda: None):
        """Trials (arm, seed, settings) as far as their results aren't there. ValueError for results of others."""
        jobs = {}
        finished = 0
        for arm, seed, settings in trials:
            wanted = {budget: identity(self.root, arm, seed, budget, settings, self.scale) for budget in budgets}
            files = {budget: result_file(self.root, stage, arm, seed, budget, settings) for budget in budgets}
            if all(read_result(files[budget], wanted[budget]) is not None for budget in budgets):
                finished += 1
                continue
            fields = {"root": str(self.root), "stage": stage, "arm": arm, "seed": seed, "budgets": list(budgets)}
            folder = trial_folder(self.root, stage, arm, seed, settings)
            argument = json.dumps({**fields, "settings": settings, "scale": self.scale})
            (folder / "progress").unlink(missing_ok=True)
            jobs[arm, seed, folder.name] = Job(folder, Trial.__module__, argument)
        run_jobs(jobs, self.processes, "trial", done, finished)

    def validated(self, arm: str, seed: int, budget: int, settings: dict) -> float:
        """Accuracy on the validation questions at the chosen step of a tuning trial."""
        result = read_json(result_file(self.root, "tune", arm, seed, budget, settings))
        (chosen,) = [point for point in result["validation"] if point["step"] == result["chosen_step"]]
        return chosen["accuracy"]["average"]

    def tune(self, arms: Sequence[str], seeds: Sequence[int], rounds=design.ROUNDS) -> dict:
        """Each arm's settings, one after the other, each at the best of the earlier ones; and all that was seen:
        {"settings": {arm: settings}, "scores": {arm: {setting: {value: mean accuracy}}}}. Of equals the first wins."""
        chosen = {arm: dict(design.DEFAULT_SETTINGS) for arm in arms}
        scores = {arm: {} for arm in arms}
        for setting, grid, budgets in rounds:
            candidates = {}
            for arm in arms:
                if setting != "weight" or design.has_weight(arm):
                    candidates[arm] = {value: {**chosen[arm], setting: value} for value in grid}
            trials = [
                (arm, seed, settings)
                for arm, by_value in candidates.items()
                for seed in seeds
                for settings in by_value.values()
            ]
            self.run("tune", trials, budgets)
            for arm, by_value in candidates.items():
                seen = {}
                for value, settings in by_value.items():
                    found = [self.validated(arm, seed, budget, settings) for seed in seeds for budget in budgets]
                    seen[value] = round(float(np.mean(found)), 5)
                scores[arm][setting] = {f"{value:g}": score for value, score in seen.items()}
                chosen[arm][setting] = max(seen, key=seen.__getitem__)
        return {"settings": chosen, "scores": scores}


def write_settings(file: Path, root: Path, seeds: Sequence[int], found: dict) -> None:
    """The settings file: what was tuned before and with the same data and components stays, other arms join."""
    world = read_json(root / WORLD_FILE)
    former = read_object(file) if file.exists() else {}
    content = {"world": world, "seeds": list(seeds), "settings": {}, "scores": {}}
    for part in ("settings", "scores"):
        kept = former.get(part, {}) if former.get("world") == world else {}
        content[part] = {**kept, **found[part]}
    write_json(file, content)


def read_settings(file: Path, root: Path, arms: Sequence[str]) -> dict[str, dict]:
    """{arm: settings}. ValueError if some arm was not tuned, or on other data or components."""
    remedy = "run --stage tune first, or give --settings"
    if not file.exists():
        raise ValueError(f"there is no {file}: {remedy}")
    content = read_object(file)
    world = read_json(root / WORLD_FILE)
    differing = [name for name in world if content["world"].get(name) != world[name]]
    if differing:
        raise ValueError(f"{file} was tuned with another {', '.join(differing)}: {remedy}")
    owners = {arm: design.SETTINGS_OF.get(arm, arm) for arm in arms}
    missing = [owner for owner in owners.values() if owner not in content["settings"]]
    if missing:
        raise ValueError(f"{file} has no settings of {', '.join(missing)}: {remedy}")
    return {arm: content["settings"][owner] for arm, owner in owners.items()}


def run_stage(args, root: Path, size: dict, report: Callable[[], str]) -> None:
    """Tunes, or confirms. ValueError as of its parts."""
    root.mkdir(parents=True, exist_ok=True)
    with only_one(root):
        unpack(root)
        prepare(root, size)
        study = Study(root, size["scale"], args.processes)
        if args.stage == "tune":
            rounds = [(name, grid, args.budgets or budgets) for name, grid, budgets in design.ROUNDS]
            tuned = [arm for arm in args.arms if arm not in design.SETTINGS_OF]
            write_settings(args.settings, root, args.seeds, study.tune(tuned, args.seeds, rounds))
            return
        settings = read_settings(args.settings, root, args.arms)
        trials = [(arm, seed, settings[arm]) for seed in args.seeds for arm in args.arms]
        study.run("confirm", trials, args.budgets, report)


def complete(args: Namespace, size: dict) -> None:
    """Fills in the stage's own seeds and budgets. ValueError for budgets that there aren't, and for seeds of tuning
    that should confirm."""
    possible = [0, *map(int, size["scale"]["finetune_steps"])]
    if args.budgets is not None and not set(args.budgets) <= set(possible):
        raise ValueError(f"--budgets {args.budgets}: choose from {possible}")
    if args.stage == "confirm":
        args.budgets = args.budgets or possible
        args.seeds = args.seeds or design.CONFIRMING_SEEDS
        mixed = set(args.seeds) & set(design.TUNING_SEEDS)
        if mixed:
            raise ValueError(f"--seeds {sorted(mixed)} are those of tuning: confirm with others")
        return
    args.seeds = args.seeds or design.TUNING_SEEDS
    if args.shrunk and args.budgets is None:
        args.budgets = possible[:2]  # a round's own are none of the shrunken world's


@command("study")
def main(args: Namespace) -> None:
    size = SHRUNK if args.shrunk else FULL
    root = args.out.resolve()
    complete(args, size)

    def report() -> str:
        return write_report(root, collect(read_results(root)))

    if not args.report:
        run_stage(args, root, size, report)
    if args.stage == "tune" and not args.report:
        print(args.settings.read_text())
        return
    print(report())
    if args.pack:
        pack(read_results(root), args.pack)
        write_whole(args.pack / "README.md", PACKED)
