"""The study of visual objectives: its arms, label budgets, seeds and grids (docs/STUDY.md says why each).

An arm is what it changes of the miniature's LLaVA: fields of pre-training and of fine-tuning.
"""

import copy
from pathlib import Path

from . import miniature

TUNING_SEEDS = (100,)
# None of them was seen as settings were chosen.
CONFIRMING_SEEDS = tuple(range(8))
# 0: after pre-training alone.
BUDGETS = (0, 75, 300, 1000, 6000)  # scenes with questions
FEW = 1000  # up to so many scenes the smaller budgets' learning rate holds

# What every arm shares. `finetune_steps`: by budget, upper bounds: validation chooses the step.
SCALE = {
    # The miniature's own number, for every arm but the one of equal time.
    "pretrain_steps": 400,
    "pretrain_batch": 32,
    "finetune_steps": {"75": 60, "300": 120, "1000": 200, "6000": 450},
    "finetune_batch": 16,
    "evaluations": 8,  # of a fine-tuning, evenly spread over its steps
    "patience": 4,  # evaluations without a new best before it is stopped
    "probe_splits": {"train": 1500, "validation": 300, "test": 500},
}
DEFAULT_SETTINGS = {"pretrain_lr": 1e-3, "weight": 1.0, "finetune_lr_few": 1e-3, "finetune_lr_many": 1e-3}
# Settings are chosen one after the other: (setting, its grid, the budgets whose validation questions choose it).
ROUNDS = (
    ("pretrain_lr", (3e-4, 1e-3, 3e-3), (0, 300)),
    ("weight", (0.3, 1.0, 3.0), (0, 300)),
    ("finetune_lr_few", (3e-4, 1e-3, 3e-3), (300,)),
    ("finetune_lr_many", (3e-4, 1e-3), (6000,)),
)

PAPER = {"tasks": miniature.TASKS}
PAPER_WITH_MOMENTS = {
    "tasks": [*miniature.TASKS, miniature.MOMENTS],
    "teachers": {**miniature.TEACHERS, "moments": miniature.WORD_TEACHERS},
}


def _objective(name: str, label: str) -> dict:
    """An arm of the miniature's own objectives."""
    changes = miniature.OBJECTIVES[name]
    return {"label": label, "pretrain": changes["pretrain"], "finetune": changes.get("finetune", {})}


# `pretrain`, `finetune`: the fields that change. `pretrain_share`: how many times LLaVA's steps.
ARMS = {
    "llava": {"label": "LLaVA", "pretrain": {}, "finetune": {}},
    # As long as OLA-VLM's pre-training takes on a clock: its steps cost 1.5 times LLaVA's.
    "llava_longer": {"label": "LLaVA, equal time", "pretrain": {}, "finetune": {}, "pretrain_share": 1.5},
    "ola_vlm": {"label": "the paper's", "pretrain": PAPER, "finetune": {}},
    "ola_vlm_shuffled": {
        "label": "the paper's, other images'",
        "pretrain": {**PAPER, "shuffle_targets": True},
        "finetune": {},
    },
    "patch": _objective("patch", "patch"),
    "patch_shuffled": _objective("patch_shuffled", "patch, other images'"),
    "patch_half": _objective("patch_half", "patch, also half of IFT"),
    "patch_half_shuffled": _objective("patch_half_shuffled", "patch, half of IFT, other images'"),
    "words": _objective("words", "words"),
    "words_shuffled": _objective("words_shuffled", "words, other images'"),
    "words_ola_vlm": _objective("words_ola_vlm", "words + the paper's"),
    "words_ola_vlm_shuffled": _objective("words_ola_vlm_shuffled", "words + the paper's, other images'"),
    "moments": _objective("moments", "moments"),
    "moments_ola_vlm": {"label": "moments + the paper's", "pretrain": PAPER_WITH_MOMENTS, "finetune": {}},
}
# An arm -> its control: the same targets, of other images.
CONTROLS = {
    "ola_vlm": "ola_vlm_shuffled",
    "patch": "patch_shuffled",
    "patch_half": "patch_half_shuffled",
    "words": "words_shuffled",
    "words_ola_vlm": "words_ola_vlm_shuffled",
}
# Run when they are asked for: their parts have controls of their own.
ON_REQUEST = ("patch_half_shuffled", "words_ola_vlm_shuffled")
DEFAULT_ARMS = tuple(arm for arm in ARMS if arm not in ON_REQUEST)
# Arms that are not tuned -> whose settings they take: a control differs from its arm in content alone, and what is
# added to an objective leaves that as it was.
SETTINGS_OF = {
    "llava_longer": "llava",
    "ola_vlm_shuffled": "ola_vlm",
    "patch_shuffled": "patch",
    "patch_half": "patch",
    "patch_half_shuffled": "patch",
    "words_shuffled": "words",
    "words_ola_vlm": "words",
    "words_ola_vlm_shuffled": "words",
    "moments_ola_vlm": "moments",
}
# Two objectives together -> the one that the other is added to: compared, they show what the other one adds.
ON_TOP = {"words_ola_vlm": "words", "moments_ola_vlm": "moments"}
NO_CONTENT = "moments"
# What is compared with it: one arm of each kind of content.
CONTENT = ("ola_vlm", "patch", "words")
BASELINE = "llava"
EQUAL_TIME = "llava_longer"


def has_weight(arm: str) -> bool:
    """Whether the arm has losses that a weight could scale."""
    return bool(ARMS[arm]["pretrain"].get("tasks"))


def relevant_settings(settings: dict, arm: str, budget: int) -> dict:
    """Those that a result at this budget depends on."""
    names = ["pretrain_lr"]
    # LLaVA's one setting of pre-training is its learning rate.
    if has_weight(arm):
        names.append("weight")
    # Without questions nothing is fine-tuned.
    if budget > 0:
        names.append("finetune_lr_few" if budget <= FEW else "finetune_lr_many")
    return {name: settings[name] for name in names}


def weighted(tasks: list[dict], weight: float) -> list[dict]:
    """The tasks with their losses' weights scaled (0.5 is a task's own by default)."""
    # The tables above are shared by all runs of a process.
    scaled = copy.deepcopy(tasks)
    for task in scaled:
        task["loss_weight"] = weight * task.get("loss_weight", 0.5)
    return scaled


def pretrain_fields(arm: str, seed: int, settings: dict, scale: dict, root: Path, output: Path) -> dict:
    """Of the arm's pre-training: all images with their captions."""
    # LLaVA's run, what the arm changes of it, then what was tuned and what the study's scale sets.
    fields = miniature.pretrain("llava", seed, root)
    fields.update(copy.deepcopy(ARMS[arm]["pretrain"]))
    fields["tasks"] = weighted(fields["tasks"], settings["weight"])
    # `miniature.pretrain` gives all teachers: those of the arm's tasks stay.
    names = [task["name"] for task in fields["tasks"]]
    fields["teachers"] = {name: teacher for name, teacher in fields["teachers"].items() if name in names}
    fields["learning_rate"] = settings["pretrain_lr"]
    fields["max_steps"] = round(scale["pretrain_steps"] * ARMS[arm].get("pretrain_share", 1))
    fields["per_device_train_batch_size"] = scale["pretrain_batch"]
    return with_places(fields, seed, output)


def finetune_fields(
    arm: str,
    seed: int,
    budget: int,
    settings: dict,
    scale: dict,
    root: Path,
    output: Path,
    checkpoint: Path,
    data: Path,
) -> dict:
    """Of the arm's fine-tuning from `checkpoint` on `data`, the questions of `budget` scenes."""
    fields = miniature.finetune("llava", seed, root)
    changes = copy.deepcopy(ARMS[arm]["finetune"])
    # The arm's own teachers, which its pre-training has: the same targets go on in fine-tuning.
    if changes.get("embedding_losses"):
        teachers = pretrain_fields(arm, seed, settings, scale, root, output)["teachers"]
        fields.update(miniature.stored_targets(root))
        fields["teachers"] = teachers
    fields.update(changes)
    # One pre-training serves all budgets and learning rates of its seed.
    fields["checkpoint"] = str(checkpoint)
    fields["data"] = str(data)
    fields["learning_rate"] = settings["finetune_lr_few" if budget <= FEW else "finetune_lr_many"]
    fields["max_steps"] = scale["finetune_steps"][str(budget)]
    fields["per_device_train_batch_size"] = scale["finetune_batch"]
    return with_places(fields, seed, output)


def with_places(fields: dict, seed: int, output: Path) -> dict:
    """With what all of the study's runs have: an order of the data that depends on the seed alone; nothing is saved on
    the way, and images are not opened."""
    fields["output_dir"] = str(output)
    fields["data_seed"] = seed
    fields["logging_steps"] = max(1, fields["max_steps"] // 10)
    fields["save_strategy"] = "no"
    fields["check_images"] = False
    fields["disable_tqdm"] = True
    fields["report_to"] = "none"
    return fields
