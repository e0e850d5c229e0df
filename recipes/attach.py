"""Models of other families with predictors attached (docs/your_own_vlm.md). Give `--data`: rows or a folder of images.

Three objectives a family: the paper's, whose predictors own their queries, so that prompt and vocabulary stay the
model's; `patch`, the same teachers for each image token's own place, from one layer; `words`, for the projector.
Layers are the paper's in proportion to the language model's depth. Not run by this project yet: they need the real
weights.
"""

from dataclasses import dataclass, field

from .finetune import LORA
from .objectives import COMMERCIAL_WORD_TEACHERS, WORDS
from .paper import COMMERCIAL_TASKS, COMMERCIAL_TEACHERS
from .tables import Run, Table

PAPER_DEPTH = 32  # layers of the paper's language models
PATCH_LAYER = 16  # of them


@dataclass(frozen=True)
class Family:
    """`layers`: of the language model. `side`: of the grid of tokens that a square image becomes by `view`, fields of
    a run."""

    name: str
    checkpoint: str
    layers: int
    side: int
    view: dict = field(default_factory=dict)


FAMILIES = (
    # `side` and `view` belong together: they make the grid for which targets are computed.
    # A token is 28 pixels wide, Qwen3-VL's 32.
    Family("qwen2_5_vl", "Qwen/Qwen2.5-VL-3B-Instruct", layers=36, side=24, view={"image_side": 672}),
    Family("qwen3_vl", "Qwen/Qwen3-VL-2B-Instruct", layers=28, side=24, view={"image_side": 768}),
    # Without tiles: the whole picture alone, as 8 x 8 tokens.
    Family(
        "smolvlm",
        "HuggingFaceTB/SmolVLM-500M-Instruct",
        layers=32,
        side=8,
        view={"image_options": {"do_image_splitting": False}},
    ),
    Family(
        # Tiles off, too: 448 pixels a side become 16 x 16 tokens.
        "internvl3",
        "OpenGVLab/InternVL3-1B-hf",
        layers=24,
        side=16,
        view={"image_options": {"crop_to_patches": False}},
    ),
    Family("gemma3", "google/gemma-3-4b-it", layers=34, side=16),
)


def layers_of(family: Family, layers: list[int]) -> list[int]:
    """The paper's layers in proportion."""
    return [round(layer * family.layers / PAPER_DEPTH) for layer in layers]


def paper_tasks(family: Family) -> list[dict]:
    tasks = []
    for task in COMMERCIAL_TASKS:
        # Without task tokens nothing is added to the vocabulary, and predictors own their queries.
        tasks.append({**task, "layers": layers_of(family, task["layers"]), "num_task_tokens": 0})
    return tasks


def patch_tasks(family: Family) -> list[dict]:
    """Of the teachers that see places."""
    tasks = []
    for task in COMMERCIAL_TASKS:
        # One embedding of the whole image: it has no places.
        if task["name"] == "gen":
            continue
        tasks.append(
            {
                "name": task["name"],
                "layers": layers_of(family, [PATCH_LAYER]),
                "predictor": "patch",
                # A target for each image token, so that a patch is predicted from its own token.
                "target_length": family.side**2,
                "target_dim": task["target_dim"],
            }
        )
    return tasks


def runs_of(family: Family) -> list[Run]:
    # LORA's schedule without its adapters: only projector and predictors train. Rows can't be cut either, since the
    # processor expands images itself (`training.preflight` refuses it).
    schedule = {name: value for name, value in LORA.items() if name not in ("lora_rank", "max_length", "on_long_rows")}
    common = {
        **schedule,
        "stage": "pretrain",
        "output_dir": f"runs/attach_{family.name}/pretrain",
        "checkpoint": family.checkpoint,
        "tasks": paper_tasks(family),
        "teachers": COMMERCIAL_TEACHERS,
        # A tenth of the paper's, whose projector begins anew: this one has learned already.
        "learning_rate": 1e-4,
        **family.view,
    }
    # Each objective is a run of its own, which changes the first one's tasks and teachers.
    name = f"attach_{family.name}"
    patch = {
        "tasks": patch_tasks(family),
        "teachers": {name: COMMERCIAL_TEACHERS[name] for name in ("depth", "seg")},
    }
    # Of the projector's output, so no layer of the language model is chosen.
    words = {"tasks": [{**WORDS, "target_length": family.side**2}], "teachers": {"words": COMMERCIAL_WORD_TEACHERS}}
    return [
        Run(name, None, {"pretrain": common}, stage_in_name=False),
        Run(f"{name}_patch", name, {"pretrain": patch}, stage_in_name=False),
        Run(f"{name}_words", name, {"pretrain": words}, stage_in_name=False),
    ]


def all_runs() -> list[Run]:
    runs = []
    for family in FAMILIES:
        runs += runs_of(family)
    return runs


TABLE = Table(
    "Predictors attached to a model of another family (give --data: rows, or a folder of images): not run yet.",
    runs=all_runs(),
)
