"""What ola_vlm_miniature.yaml calls; a row is a line of the questions' file."""

from pathlib import Path

from PIL import Image

from ola_vlm.eval.multiple_choice import is_correct
from ola_vlm.files.strangers import inside
from ola_vlm.targets.images import open_image

# Where `ola-vlm eval` renders the questions; lmms-eval is run from the repository's folder.
FOLDER = Path("runs/benchmark_miniature")


def images(row: dict) -> list[Image.Image]:
    return [open_image(inside(FOLDER, row["filename"]))]


def question(row: dict, lmms_eval_specific_kwargs=None) -> str:
    return row["prompt"]


def score(row: dict, results: list[str]) -> dict[str, float]:
    return {"accuracy": float(is_correct({**row, "output": results[0]}))}
