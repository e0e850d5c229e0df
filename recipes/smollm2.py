"""A real language model on one CPU core, in an hour and a half: SmolLM2-135M-Instruct reads photographs and scenes.

`python -m ola_vlm.miniature.smollm2` (= `make smollm2`) runs both stages of one or several methods; before them it
writes the language model and the data. Tower and teachers are the miniature's.
"""

from pathlib import Path

from . import miniature
from .miniature import TASKS, TEACHERS, WEIGHTS
from .paper import SCHEDULE
from .paper import TASKS as PAPER_TASKS
from .tables import Run, Table

# Layers of SmolLM2 and of the paper's LLMs; those that learn are taken in proportion.
DEPTH = 30
PAPER_DEPTH = 32
# The mean of a patch's words, which lies where words lie: of its class (sky, floor, or an object's color) and, but for
# the sky, of its depth, in the default's five words. The depth teacher predicts 4 / depth.
WORDS = {**miniature.WORDS, "alone": ["sky"], "combine": "mean"}
WORD_TEACHERS = {
    "class": {**TEACHERS["seg"], "encoder": "class_words"},
    "depth": {**TEACHERS["depth"], "encoder": "depth_words", "bins": [4 / 3.5, 4 / 9.5]},
}
# Method -> what it changes of pre-training.
METHODS = {
    "ola_vlm": {},
    "llava": {"tasks": []},
    "words": {"tasks": [WORDS], "teachers": {"words": WORD_TEACHERS}},
}
# Method -> whose model before PT it begins with, prompts included: OLA-VLM's have task tokens.
BEGUN_AS = {"ola_vlm": "ola_vlm", "llava": "llava", "words": "llava"}


def run_folder(method: str, root: str | Path = "runs/smollm2") -> Path:
    return Path(root) / method


def recipe_name(method: str, stage: str) -> str:
    if method == "ola_vlm":
        return f"smollm2_{stage}"
    return f"smollm2_{method}_{stage}"


def _common(method: str, root: str | Path, stage: str) -> dict:
    return {
        **SCHEDULE,
        "stage": stage,
        "output_dir": str(run_folder(method, root) / stage),
        "data": str(Path(root) / "data" / f"{stage}.json"),
        "image_folder": str(Path(root) / "data" / "images"),
        # Captions and rows of text alone differ in length: side by side they would be mostly padding.
        "train_sampling_strategy": "group_by_length",
        "save_steps": 50,
        "save_total_limit": 1,
        "use_cpu": True,
    }


def pretrain(method: str = "ola_vlm", root: str | Path = "runs/smollm2") -> dict:
    """PT on captions: python train.py --recipe smollm2_pretrain."""
    tasks = []
    for task in TASKS:
        # Tower and teachers are the miniature's, so a task keeps its shape; its layers are the paper's in proportion.
        of_paper = PAPER_TASKS[task["name"]]["layers"]
        layers = [round(layer * DEPTH / PAPER_DEPTH) for layer in of_paper]
        tasks.append({**task, "layers": layers})
    return {
        **_common(method, root, "pretrain"),
        "vision_tower": str(WEIGHTS / "vision_tower"),
        "language_model": str(Path(root) / "language_model"),
        # As its published numbers were made.
        "model_overrides": {"pad_vocab_to_multiple_of": 1},
        "tasks": tasks,
        "teachers": TEACHERS,
        "target_cache": str(Path(root) / "targets"),
        "target_fill": True,
        "standardize_targets": True,
        # Only what is new trains: projector, predictors and query tables.
        "learning_rate": 1e-3,
        "max_steps": 300,
        "per_device_train_batch_size": 8,
        **METHODS[method],
    }


def finetune(method: str = "ola_vlm", root: str | Path = "runs/smollm2") -> dict:
    """IFT on questions and text-only rows, task tokens frozen: python train.py --recipe smollm2_finetune."""
    return {
        **_common(method, root, "finetune"),
        "checkpoint": str(run_folder(method, root) / "pretrain"),
        "learning_rate": 1e-4,
        "max_steps": 240,
        "per_device_train_batch_size": 4,
    }


TABLE = Table(
    "SmolLM2-135M on photographs and scenes, on a CPU core.",
    runs=[
        Run("smollm2", None, {"pretrain": pretrain(), "finetune": finetune()}),
        Run("smollm2_llava", "smollm2", {"pretrain": METHODS["llava"], "finetune": {}}),
        Run("smollm2_words", "smollm2", {"pretrain": METHODS["words"], "finetune": {}}),
    ],
    made_by="`make smollm2` (or `python -m ola_vlm.miniature.smollm2`)",
)
