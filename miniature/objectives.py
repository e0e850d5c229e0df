"""`ola-vlm study objectives`: which visual objective makes answers better, and at which number of labels?

docs/STUDY.md is its protocol; `commands/study_objectives.py` has its arguments.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np

from ..commands.running import command
from ..commands.study_objectives import SETTINGS_FILE
from ..files.strangers import read_object
from ..files.writing import only_one, write_json, write_whole
from ..recipes import miniature as recipe
from ..recipes import study as design
from ..targets.fill import fill, make_teachers, open_caches
from ..world import dataset
from .objective_numbers import chosen_point, collect, tuning_table
from .objective_report import write_report
from .objective_results import Key, pack, pack_tuning, read_results, read_tuning, unpack
from .objective_trial import WORLD_FILE, Trial, identity, read_result, result_file, trial_folder
from .processes import Job, run_jobs
from .report import table
from .stored_vision import StoredVision, weights_hash
from .study import prepare as prepare_world
from .trial import read_json

# Folders of `recipe.WEIGHTS`. Their hashes are a part of what makes a result comparable.
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

PACKED = """Results of `ola-vlm study objectives` (docs/STUDY.md), a file an arm and a line a trial and budget. A
folder tuning has those that settings.json was chosen from.

`ola-vlm study objectives --report --out FOLDER` makes tables and figures of a copy of this folder.
"""


def prepare(root: Path, size: dict) -> None:
    """The world, its targets and vision features in `root`, and the hashes that results carry. ValueError if it was
    begun with another size."""
    options = {"sizes": size["sizes"], "questions": size["questions"]}
    overrides = {"probe_splits": size["scale"]["probe_splits"]}
    # What is compared with an earlier start is `options`; the probes' splits only say which targets to fill.
    prepare_world(root, {**options, "overrides": overrides}, options)
    images = sorted((root / "data" / "images").glob("*.png"))
    # Before the trials start, which all read these files.
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
        # Only tasks and teachers are read of these fields: any seed, settings and folders will do.
        fields = design.pretrain_fields(arm, 0, design.DEFAULT_SETTINGS, design.SCALE, root, root)
        teachers = make_teachers(fields["tasks"], fields["teachers"])
        # An arm and its control have the same.
        if not teachers or fields["teachers"] in filled:
            continue
        caches = open_caches(root / "targets", teachers)
        report = fill(root / "targets", teachers, caches, images)
        if report.failed:
            raise ValueError(f"images without a target: {list(report.failed.values())}")
        filled.append(fields["teachers"])


def data_hash(folder: Path, images: Sequence[Path]) -> str:
    """Of what trials read: the files of captions, questions and images."""
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
            # A trial does all of its budgets that are missing: it pre-trains once for all of them.
            if all(read_result(files[budget], wanted[budget]) is not None for budget in budgets):
                finished += 1
                continue
            fields = {"root": str(self.root), "stage": stage, "arm": arm, "seed": seed, "budgets": list(budgets)}
            folder = trial_folder(self.root, stage, arm, seed, settings)
            argument = json.dumps({**fields, "settings": settings, "scale": self.scale})
            # A former attempt's would count as done.
            (folder / "progress").unlink(missing_ok=True)
            # In tuning an arm and seed have several trials, which differ in their folder's name.
            jobs[arm, seed, folder.name] = Job(folder, Trial.__module__, argument)
        run_jobs(jobs, self.processes, "trial", done, finished)

    def validated(self, arm: str, seed: int, budget: int, settings: dict) -> float:
        """Accuracy on the validation questions at the chosen step of a tuning trial."""
        result = read_json(result_file(self.root, "tune", arm, seed, budget, settings))
        return chosen_point(result)["accuracy"]["average"]

    def tune(self, arms: Sequence[str], seeds: Sequence[int], rounds=design.ROUNDS) -> dict:
        """Each arm's settings, one after the other, each at the best of the earlier ones; and all that was seen:
        {"settings": {arm: settings}, "scores": {arm: {setting: {value: mean accuracy}}}}. Of equals the first wins."""
        chosen = {arm: dict(design.DEFAULT_SETTINGS) for arm in arms}
        scores = {arm: {} for arm in arms}
        for setting, grid, budgets in rounds:
            # What each arm tries in this round: one setting changes.
            candidates = {}
            for arm in arms:
                # LLaVA has no losses to weigh: it keeps the default and skips that round.
                if setting != "weight" or design.has_weight(arm):
                    candidates[arm] = {value: {**chosen[arm], setting: value} for value in grid}
            trials = []
            for arm, by_value in candidates.items():
                trials += [(arm, seed, settings) for seed, settings in product(seeds, by_value.values())]
            # A value that an earlier round has chosen is among the candidates: its results are found, not run again.
            self.run("tune", trials, budgets)

            # The best one, by the mean over seeds and budgets, stays for the rounds that follow.
            for arm, by_value in candidates.items():
                seen = {}
                for value, settings in by_value.items():
                    pairs = product(seeds, budgets)
                    found = [self.validated(arm, seed, budget, settings) for seed, budget in pairs]
                    seen[value] = round(float(np.mean(found)), 5)
                scores[arm][setting] = {f"{value:g}": score for value, score in seen.items()}
                chosen[arm][setting] = max(seen, key=seen.__getitem__)
        return {"settings": chosen, "scores": scores}


def former_settings(file: Path, root: Path) -> dict:
    """What the settings file holds; nothing if there is none. ValueError for one that was tuned with other data or
    components: these settings hold there, and new ones would take their place."""
    if not file.exists():
        return {}
    former = read_object(file)
    if former.get("world") != read_json(root / WORLD_FILE):
        raise ValueError(f"{file} was tuned with other data or components: give --settings another file")
    return former


def write_settings(file: Path, root: Path, seeds: Sequence[int], found: dict) -> None:
    """The settings file: what was tuned before stays, other arms join. ValueError as of `former_settings`."""
    world = read_json(root / WORLD_FILE)
    former = former_settings(file, root)
    content = {"world": world, "seeds": list(seeds), "settings": {}, "scores": {}}
    for part in ("settings", "scores"):
        content[part] = {**former.get(part, {}), **found[part]}
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
    # An arm's own, or those of the arm that it is a variant of, such as its shuffled control.
    owners = {arm: design.SETTINGS_OF.get(arm, arm) for arm in arms}
    missing = [owner for owner in owners.values() if owner not in content["settings"]]
    if missing:
        raise ValueError(f"{file} has no settings of {', '.join(missing)}: {remedy}")
    return {arm: content["settings"][owner] for arm, owner in owners.items()}


def asked_rounds(asked: Sequence[int] | None) -> list[tuple]:
    """The rounds of tuning; with budgets that were `asked` for in place of their own, as far as the round's setting
    plays a part there. Rounds that have none are left out, which is told: all of their candidates would be equal."""
    if asked is None:
        return list(design.ROUNDS)
    rounds = []
    for setting, grid, _ in design.ROUNDS:
        budgets = [budget for budget in asked if plays_a_part(setting, budget)]
        if budgets:
            rounds.append((setting, grid, budgets))
        else:
            stays = f"it stays {design.DEFAULT_SETTINGS[setting]:g}"
            print(f"{setting} is not tuned, since it plays no part at --budgets {', '.join(map(str, asked))}: {stays}")
    return rounds


def plays_a_part(setting: str, budget: int) -> bool:
    """Whether some arm's results at this budget depend on the setting."""
    return any(setting in design.relevant_settings(design.DEFAULT_SETTINGS, arm, budget) for arm in design.ARMS)


def check_steps(root: Path, scale: dict) -> None:
    """ValueError for results of fine-tunings with other steps, which can't be reported with those to come."""
    for file in sorted(root.glob("results/confirm/*/*.json")):
        result = read_object(file)
        steps = scale["finetune_steps"].get(str(result.get("budget")))
        found = result.get("identity", {}).get("finetune.max_steps")
        if steps is not None and found not in (None, steps):
            raise ValueError(
                f"{file} is of a fine-tuning of {found} steps, not {steps} (--longer): choose another --out"
            )


def run_stage(args, root: Path, size: dict, report: Callable[[], str]) -> None:
    """Tunes, or confirms. ValueError as of its parts."""
    root.mkdir(parents=True, exist_ok=True)
    with only_one(root):
        # Packed results that were copied here are done.
        unpack(root)
        prepare(root, size)
        study = Study(root, size["scale"], args.processes)
        if args.stage == "tune":
            # Before hours of tuning, whose outcome could not be written there.
            former_settings(args.settings, root)
            rounds = asked_rounds(args.budgets)
            tuned = [arm for arm in args.arms if arm not in design.SETTINGS_OF]
            write_settings(args.settings, root, args.seeds, study.tune(tuned, args.seeds, rounds))
            return
        settings = read_settings(args.settings, root, args.arms)
        check_steps(root, size["scale"])
        # Seed by seed: interrupted, all arms have come equally far.
        trials = [(arm, seed, settings[arm]) for seed, arm in product(args.seeds, args.arms)]
        study.run("confirm", trials, args.budgets, report)


def longer(size: dict, times: int) -> dict:
    """The size with so many times the steps of each fine-tuning, none of which ends early: what is not learned then
    is not a matter of steps."""
    scale = size["scale"]
    steps = {budget: times * number for budget, number in scale["finetune_steps"].items()}
    # With as much patience as there are evaluations, the last one is always reached.
    return {**size, "scale": {**scale, "finetune_steps": steps, "patience": scale["evaluations"]}}


def complete(args: Namespace, size: dict) -> None:
    """Fills in the stage's own arms, seeds and budgets. ValueError for budgets that there aren't, for seeds of tuning
    that should confirm, for tuning with more steps than the confirming runs have, and for shrunken tuning that would
    write to the settings of the full one."""
    if args.longer > 1 and args.stage == "tune":
        raise ValueError("--longer goes with --stage confirm: settings are those of the protocol's steps")
    if args.stage == "tune" and args.shrunk and not args.report and args.settings == SETTINGS_FILE:
        raise ValueError(
            f"--shrunk tunes nothing that means something: give --settings a file other than {SETTINGS_FILE}"
        )
    # Named twice, a trial would be run once, and a budget asked twice.
    for name in ("arms", "seeds", "budgets"):
        given = getattr(args, name)
        if given is not None:
            setattr(args, name, list(dict.fromkeys(given)))
    # 0 is the model right after pre-training.
    possible = [0, *map(int, size["scale"]["finetune_steps"])]
    if args.budgets is not None and not set(args.budgets) <= set(possible):
        raise ValueError(f"--budgets {args.budgets}: choose from {possible}")
    # A report is of what is there, or of what was asked for.
    if args.report:
        return
    if args.stage == "confirm":
        args.budgets = args.budgets or possible
        args.seeds = args.seeds or design.CONFIRMING_SEEDS
        # Settings are at their luckiest with the seeds that chose them.
        mixed = set(args.seeds) & set(design.TUNING_SEEDS)
        if mixed:
            raise ValueError(f"--seeds {sorted(mixed)} are those of tuning: confirm with others")
        return
    args.seeds = args.seeds or design.TUNING_SEEDS
    if args.shrunk and args.budgets is None:
        # A round's own are none of the shrunken world's.
        args.budgets = possible[:2]


def asked_results(results: dict[Key, dict], args: Namespace) -> dict[Key, dict]:
    """Those of the arms, seeds and budgets that a report was asked for. ValueError if there is none."""
    # None stands for all of them, as do the arms that are run by default: others may have been run on request.
    arms = args.arms
    if arms == list(design.DEFAULT_ARMS):
        arms = None
    asked = (arms, args.seeds, args.budgets)
    found = {}
    for key, result in results.items():
        if all(names is None or part in names for part, names in zip(key, asked, strict=True)):
            found[key] = result
    if not found:
        raise ValueError(f"{args.out} has no results of those arms, seeds and budgets")
    return found


@command("study")
def main(args: Namespace) -> None:
    size = FULL
    if args.shrunk:
        size = SHRUNK
    if args.longer > 1:
        size = longer(size, args.longer)
    root = args.out.resolve()
    complete(args, size)

    def report() -> str:
        results = read_results(root)
        # After a stage the report is of all that the folder has.
        if args.report:
            results = asked_results(results, args)
        return write_report(root, collect(results))

    if not args.report:
        run_stage(args, root, size, report)
    if args.stage == "tune":
        tried = read_tuning(root)
        if args.report:
            print("\n".join(table(["arm", "tried", "validation answers (%)"], tuning_table(tried))))
        else:
            print(args.settings.read_text())
        if args.pack:
            pack_tuning(tried, args.pack)
        return
    print(report())
    if args.pack:
        pack(read_results(root), args.pack)
        write_whole(args.pack / "README.md", PACKED)
