"""A real language model on one CPU core, in an hour and a half: SmolLM2-135M-Instruct reads photographs and scenes.

`python -m ola_vlm.miniature.smollm2` (= `make smollm2`) runs both stages; before them it writes the language model and
the data. Tower and teachers are the miniature's.
"""

from pathlib import Path

from .miniature import TASKS, TEACHERS, WEIGHTS
from .paper import SCHEDULE
from .paper import TASKS as PAPER_TASKS
from .tables import Run, Table

DEPTH, PAPER_DEPTH = 30, 32  # layers of SmolLM2 and of the paper's LLMs, whose layers are taken in proportion


def _common(root: str | Path, stage: str) -> dict:
    return SCHEDULE | {
        "stage": stage,
        "output_dir": str(Path(root) / stage),
        "data": str(Path(root) / "data" / f"{stage}.json"),
        "image_folder": str(Path(root) / "data" / "images"),
        "train_sampling_strategy": "group_by_length",
        "save_steps": 50,
        "save_total_limit": 1,
        "use_cpu": True,
    }


def pretrain(root: str | Path = "runs/smollm2") -> dict:
    """PT on captions: python train.py --recipe smollm2_pretrain."""
    layers = {
        name: [round(layer * DEPTH / PAPER_DEPTH) for layer in task["layers"]] for name, task in PAPER_TASKS.items()
    }
    return _common(root, "pretrain") | {
        "vision_tower": str(WEIGHTS / "vision_tower"),
        "language_model": str(Path(root) / "language_model"),
        "model_overrides": {"pad_vocab_to_multiple_of": 1},  # as its published numbers were made
        "tasks": [task | {"layers": layers[task["name"]]} for task in TASKS],
        "teachers": TEACHERS,
        "target_cache": str(Path(root) / "targets"),
        "target_fill": True,
        "standardize_targets": True,
        "learning_rate": 1e-3,
        "max_steps": 300,
        "per_device_train_batch_size": 8,
    }


def finetune(root: str | Path = "runs/smollm2") -> dict:
    """IFT on questions and text-only rows, task tokens frozen: python train.py --recipe smollm2_finetune."""
    return _common(root, "finetune") | {
        "checkpoint": str(Path(root) / "pretrain"),
        "learning_rate": 1e-4,
        "max_steps": 240,
        "per_device_train_batch_size": 4,
    }


TABLE = Table(
    "SmolLM2-135M on photographs and scenes, on a CPU core.",
    runs=[Run("smollm2", None, {"pretrain": pretrain(), "finetune": finetune()})],
    made_by="`make smollm2` (or `python -m ola_vlm.miniature.smollm2`)",
)
