"""The miniature's runs: minutes on one CPU core; `ola-vlm miniature` runs them for every method and seed.

Before them the study renders the data (`runs/miniature/data`); the parts are in `miniature/weights`.
"""

from pathlib import Path

from .paper import FUSIONS, SCHEDULE
from .tables import Run, Table

METHODS = ("llava", "ola_vlm", "words")
# Run when asked for, as other OBJECTIVES and FUSIONS.
CONTROL = "ola_vlm_shuffled"
WEIGHTS = Path(__file__).parents[1] / "miniature" / "weights"
# 8x8 image tokens; one task token a task keeps the paper's proportion (24 of 600). The LLM has 4 layers.
SMALL = {"num_task_tokens": 1, "predictor_heads": 4, "predictor_head_dim": 32}
TASKS = [
    {"name": "gen", "layers": [3], "target_length": 1, "target_dim": 64, **SMALL},
    {"name": "depth", "layers": [2], "target_length": 64, "target_dim": 128, **SMALL},
    {"name": "seg", "layers": [2], "target_length": 64, "target_dim": 192, **SMALL},
]
TEACHERS = {
    # All three are shipped, too: nothing is downloaded.
    "gen": {"encoder": "clip_image", "path": str(WEIGHTS / "gen")},
    "depth": {"encoder": "depth_anything", "path": str(WEIGHTS / "depth")},
    "seg": {"encoder": "oneformer", "path": str(WEIGHTS / "seg"), "task_inputs": [1, 1, 1, 1]},
}

# Objectives other than the paper's (docs/objectives.md). Words: as the language model was taught to read patches, a
# full stop for sky and floor, else the color of what a patch shows and its depth in the steps of the coordinate words:
# the teacher predicts 4 / depth, for which it has words from 3.5 to 9.5 meters.
WORDS = {
    "name": "words",
    "layers": [0],
    "predictor": "none",
    "target": "words",
    "target_length": 64,
    "alone": ["."],
    "loss": "mse",
    "loss_weight": 1.0,
    "contrastive_weight": 0.0,
}
MOMENTS = {**WORDS, "name": "moments", "loss": "moments"}
WORD_TEACHERS = {
    "class": {
        **TEACHERS["seg"],
        "encoder": "class_words",
        "words": [".", ".", "red", "blue", "green", "yellow", "purple", "cyan"],
    },
    "depth": {
        **TEACHERS["depth"],
        "encoder": "depth_words",
        "words": [f"z{i}" for i in range(12)],
        "bins": [4 / 3.5, 4 / 9.5],
    },
}
# gen is left out: it sees the whole image, and a patch has no target of its own.
PATCH = [
    {"name": "depth", "layers": [2], "predictor": "patch", "target_length": 64, "target_dim": 128},
    {"name": "seg", "layers": [2], "predictor": "patch", "target_length": 64, "target_dim": 192},
]

BY_LETTER = {task["name"][0]: task for task in TASKS}


# Helpers of ABLATIONS: what a row changes of pre-training, from which fine-tuning goes on.
def _every_task(**fields) -> dict:
    return {"pretrain": {"tasks": [{**task, **fields} for task in TASKS]}}


def _some_tasks(names: str) -> dict:
    tasks = [task for task in TASKS if task["name"] in names.split("_")]
    teachers = {task["name"]: TEACHERS[task["name"]] for task in tasks}
    return {"pretrain": {"tasks": tasks, "teachers": teachers}}


def _order(letters: str) -> dict:
    return {"pretrain": {"tasks": [BY_LETTER[letter] for letter in letters]}}


# The paper's ablations here: table -> row -> what it changes of `ola_vlm`'s stages ({}: that is the row; None: llava).
ABLATIONS = {
    # Table 3: of all tasks but in ola_vlm itself, on 4 LLM layers
    "layers": {
        "d2_s2_g3": {},
        "1": _every_task(layers=[1]),
        "2": _every_task(layers=[2]),
        "3": _every_task(layers=[3]),
        "4": _every_task(layers=[4]),
        "1.3": _every_task(layers=[1, 3]),
        "2.4": _every_task(layers=[2, 4]),
    },
    # Table 4: the stages with embedding losses; none: task tokens only
    "losses": {
        "llava": None,
        "none": {"pretrain": {"embedding_losses": False}},
        "pt": {},
        "pt_ift": {"finetune": {"embedding_losses": True}},
    },
    # Table 5: N_seek
    "tokens": {
        "0": _every_task(num_task_tokens=0),
        "1": {},
        "2": _every_task(num_task_tokens=2),
        "4": _every_task(num_task_tokens=4),
        "8": _every_task(num_task_tokens=8),
    },
    # Table 6: the task tokens in fine-tuning
    "learnable": {
        "frozen": {},
        "learnable": {"finetune": {"task_tokens": "trained"}},
    },
    # Table I: what predictors attend to
    "keys": {
        "image_task": _every_task(attends_to=["image", "task"]),
        "system_image_task": _every_task(attends_to=["system", "image", "task"]),
        "all": {},
    },
    # Table II
    "tasks": {
        "none": None,
        "depth": _some_tasks("depth"),
        "seg": _some_tasks("seg"),
        "gen": _some_tasks("gen"),
        "depth_seg": _some_tasks("depth_seg"),
        "gen_depth": _some_tasks("gen_depth"),
        "gen_seg": _some_tasks("gen_seg"),
        "all": {},
    },
    # Table III: the order of the task tokens
    "order": {
        "dsg": _order("dsg"),
        "dgs": _order("dgs"),
        "sdg": _order("sdg"),
        "sgd": _order("sgd"),
        "gds": {},
        "gsd": _order("gsd"),
    },
    # Table IV: the weight of the embedding losses
    "lambda": {
        "0.10": _every_task(loss_weight=0.10),
        "0.25": _every_task(loss_weight=0.25),
        "0.50": {},
        "0.75": _every_task(loss_weight=0.75),
        "1.00": _every_task(loss_weight=1.00),
    },
    # Table V: the terms of the embedding loss
    "terms": {
        "smooth_l1": _every_task(contrastive_weight=0.0),
        "both": {},
    },
}


def ablation_run(table: str, row: str) -> str:
    """The run of a row: ola_vlm_<table>_<row>, or the method that it is."""
    changes = ABLATIONS[table][row]
    if changes is None:
        return "llava"
    if not changes:
        return "ola_vlm"
    return f"ola_vlm_{table}_{row}"


# Rows that are the method itself share its name, so that nothing is trained twice.
VARIANTS = {}
for _table, _rows in ABLATIONS.items():
    for _row, _changes in _rows.items():
        VARIANTS[ablation_run(_table, _row)] = _changes


# Of the stages that they begin with; the others are `miniature`'s.
_WORDS = {"tasks": [WORDS], "teachers": {"words": WORD_TEACHERS}}
_PATCH = {"tasks": PATCH, "teachers": {name: TEACHERS[name] for name in ("depth", "seg")}}
_MOMENTS = {"tasks": [MOMENTS], "teachers": {"moments": WORD_TEACHERS}}
_BOTH = {"tasks": [*TASKS, WORDS], "teachers": {**TEACHERS, "words": WORD_TEACHERS}}
_IN_HALF_OF_FINETUNING = {
    "embedding_losses": True,
    "losses_until": 0.5,
    "teachers": _PATCH["teachers"],
}
_SHUFFLED = {"shuffle_targets": True}
OBJECTIVES = {
    "words": {"pretrain": _WORDS},
    "words_shuffled": {"pretrain": {**_WORDS, **_SHUFFLED}},
    "moments": {"pretrain": _MOMENTS},
    "patch": {"pretrain": _PATCH},
    "patch_shuffled": {"pretrain": {**_PATCH, **_SHUFFLED}},
    "patch_half": {"pretrain": _PATCH, "finetune": _IN_HALF_OF_FINETUNING},
    "patch_half_shuffled": {
        "pretrain": {**_PATCH, **_SHUFFLED},
        "finetune": {**_IN_HALF_OF_FINETUNING, **_SHUFFLED},
    },
    "words_ola_vlm": {"pretrain": _BOTH},
    "words_ola_vlm_shuffled": {"pretrain": {**_BOTH, **_SHUFFLED}},
}
VARIANTS.update(OBJECTIVES)


def run_folder(method: str, seed: int, root: str | Path = "runs/miniature") -> Path:
    return Path(root) / method / f"seed{seed}"


def recipe_name(method: str, stage: str) -> str:
    """Of the recipe that a method's stage is, but for seed and folders; LLaVA's is OLA-VLM's without tasks."""
    return f"miniature_{method}_{stage}" if method in OBJECTIVES else f"miniature_{stage}"


def _common(method: str, seed: int, root: str | Path, stage: str) -> dict:
    # A dict keeps their order, and a row that is a method isn't listed twice.
    known = list(dict.fromkeys([*METHODS, CONTROL, *FUSIONS, *VARIANTS]))
    if method not in known:
        raise ValueError(f"method {method!r} is unknown: choose one of {known}")
    return {
        **SCHEDULE,
        "stage": stage,
        "seed": seed,
        "output_dir": str(run_folder(method, seed, root) / stage),
        "data": str(Path(root) / "data" / f"{stage}.json"),
        "image_folder": str(Path(root) / "data" / "images"),
        "learning_rate": 1e-3,
        "save_steps": 45,
        "save_total_limit": 1,
        "use_cpu": True,
    }


def stored_targets(root: str | Path = "runs/miniature") -> dict:
    """Where targets are stored and what makes them."""
    return {
        "teachers": TEACHERS,
        "target_cache": str(Path(root) / "targets"),
        "target_fill": True,
        "standardize_targets": True,
    }


def pretrain(method: str = "ola_vlm", seed: int = 0, root: str | Path = "runs/miniature") -> dict:
    """PT on captions: python train.py --recipe miniature_pretrain."""
    fields = {
        **_common(method, seed, root, "pretrain"),
        **stored_targets(root),
        "vision_tower": str(WEIGHTS / "vision_tower"),
        "language_model": str(WEIGHTS / "language_model"),
        # As its published numbers were made; and there are no tensor cores to align rows for.
        "model_overrides": {"pad_vocab_to_multiple_of": 1},
        # LLaVA's, with or without further encoders.
        "tasks": [],
        "fusion": FUSIONS.get(method),
        "num_encoder_tokens": 1,
        "shuffle_targets": method == CONTROL,
        "max_steps": 400,
        "per_device_train_batch_size": 32,
    }
    # Its control and its ablations, too. Other objectives get their tasks by `_changes_of`.
    if method.startswith("ola_vlm"):
        fields["tasks"] = [dict(task) for task in TASKS]
    fields.update(_changes_of(method, "pretrain"))
    return fields


def finetune(method: str = "ola_vlm", seed: int = 0, root: str | Path = "runs/miniature") -> dict:
    """IFT on questions, task tokens frozen: python train.py --recipe miniature_finetune."""
    changes = _changes_of(method, "finetune")
    fields = {
        **_common(method, seed, root, "finetune"),
        # Tasks come with it: they are in its configuration.
        "checkpoint": str(run_folder(method, seed, root) / "pretrain"),
        "max_steps": 450,
        "per_device_train_batch_size": 16,
    }
    # Plain fine-tuning has no targets.
    if changes.get("embedding_losses"):
        fields.update(stored_targets(root))
    fields.update(changes)
    return fields


def _changes_of(method: str, stage: str) -> dict:
    """What a variant changes of `ola_vlm`'s stage; nothing for other methods."""
    by_stage = VARIANTS.get(method) or {}
    return by_stage.get(stage, {})


TABLE = Table(
    "The miniature, minutes on a CPU core.",
    runs=[Run("miniature", None, {"pretrain": pretrain(), "finetune": finetune()})],
    made_by="`ola-vlm data miniature` (or the study, `make miniature`)",
)
