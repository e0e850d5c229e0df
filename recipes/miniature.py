"""The miniature's runs: minutes on one CPU core; `ola-vlm miniature` runs them for every method and seed.

Before them the study renders the data (`runs/miniature/data`); the parts are in `miniature/weights`.
"""

from pathlib import Path

from .paper import FUSIONS, SCHEDULE

METHODS = ("llava", "ola_vlm", "ola_vlm_shuffled")  # and, when asked for, those of FUSIONS
WEIGHTS = Path(__file__).parents[1] / "miniature" / "weights"
# 8x8 image tokens; one task token a task keeps the paper's proportion (24 of 600). The LLM has 4 layers.
SMALL = {"num_task_tokens": 1, "predictor_heads": 4, "predictor_head_dim": 32}
TASKS = [
    {"name": "gen", "layers": [3], "target_length": 1, "target_dim": 64, **SMALL},
    {"name": "depth", "layers": [2], "target_length": 64, "target_dim": 128, **SMALL},
    {"name": "seg", "layers": [2], "target_length": 64, "target_dim": 192, **SMALL},
]
TEACHERS = {
    "gen": {"encoder": "clip_image", "path": str(WEIGHTS / "gen")},
    "depth": {"encoder": "depth_anything", "path": str(WEIGHTS / "depth")},
    "seg": {"encoder": "oneformer", "path": str(WEIGHTS / "seg"), "task_inputs": [1, 1, 1, 1]},
}


def run_folder(method: str, seed: int, root: str | Path = "runs/miniature") -> Path:
    return Path(root) / method / f"seed{seed}"


def _common(method: str, seed: int, root: str | Path, stage: str) -> dict:
    if method not in (known := (*METHODS, *FUSIONS)):
        raise ValueError(f"method {method!r} is unknown: choose one of {known}")
    return SCHEDULE | {
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


def pretrain(method: str = "ola_vlm", seed: int = 0, root: str | Path = "runs/miniature") -> dict:
    """PT on captions: python train.py --recipe miniature_pretrain."""
    return _common(method, seed, root, "pretrain") | {
        "vision_tower": str(WEIGHTS / "vision_tower"),
        "language_model": str(WEIGHTS / "language_model"),
        "tasks": [dict(task) for task in TASKS] if method.startswith("ola_vlm") else [],
        "fusion": FUSIONS.get(method),
        "num_encoder_tokens": 1,
        "teachers": TEACHERS,
        "target_cache": str(Path(root) / "targets"),
        "target_fill": True,
        "standardize_targets": True,
        "shuffle_targets": method == "ola_vlm_shuffled",
        "max_steps": 400,
        "per_device_train_batch_size": 32,
    }


def finetune(method: str = "ola_vlm", seed: int = 0, root: str | Path = "runs/miniature") -> dict:
    """IFT on questions, task tokens frozen: python train.py --recipe miniature_finetune."""
    return _common(method, seed, root, "finetune") | {
        "checkpoint": str(run_folder(method, seed, root) / "pretrain"),
        "max_steps": 450,
        "per_device_train_batch_size": 16,
    }
