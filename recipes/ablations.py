"""The paper's ablations (Tables 3 to 7 and I to V): each changes a field or two of `llama3_vit`, Table 7 of
`llava_llama3_convnext`. Where the paper's own choice is a row, it is the parent and has no recipe but its own.

A run with a pre-training of its own has a fine-tuning of its own, too, which begins there (`both`).
"""

from .paper import LLAMA3_VIT, TARGETS, TASKS, TEACHERS, both
from .tables import Run, Table

GEN = TASKS["gen"]
DEPTH = TASKS["depth"]
SEG = TASKS["seg"]


# Helpers: what a row changes of the paper's three tasks. All change the pre-training, so all are `both`.
def every_task(**changes) -> dict[str, dict]:
    return both(tasks=[{**task, **changes} for task in TASKS.values()])


def layers(gen: list[int], depth: list[int], seg: list[int]) -> dict[str, dict]:
    """The 1-based decoder blocks that learn from each teacher."""
    # In the paper's token order, whatever the order of the arguments.
    tasks = [{**GEN, "layers": gen}, {**DEPTH, "layers": depth}, {**SEG, "layers": seg}]
    return both(tasks=tasks)


def some_tasks(*names: str) -> dict[str, dict]:
    tasks = [TASKS[name] for name in names]
    teachers = {name: TEACHERS[name] for name in names}
    return both(tasks=tasks, teachers=teachers)


LAYERS = Table(
    "Table 3: the layers that learn from the depth (d), segmentation (s) and generation (g) teacher.",
    columns="2D, 3D, MMStar, average",
    runs=[
        Run(
            # Read: block 18 learns from depth (d), 18 from segmentation (s), 20 from generation (g).
            "llama3_vit_layers_d18_s18_g20",
            LLAMA3_VIT,
            layers(depth=[18], seg=[18], gen=[20]),
            scores=(58.9, 60.9, 37.9, 52.6),
        ),
        Run(
            "llama3_vit_layers_d20_s18_g20",
            LLAMA3_VIT,
            layers(depth=[20], seg=[18], gen=[20]),
            scores=(57.6, 60.8, 38.8, 52.4),
        ),
        Run(
            "llama3_vit_layers_d8.14_s10.16_g12.18",
            LLAMA3_VIT,
            layers(depth=[8, 14], seg=[10, 16], gen=[12, 18]),
            scores=(56.5, 56.4, 38.8, 50.6),
        ),
        # The paper's own, d8.20_s10.18_g12.20: 58.6 64.2 39.5 54.1.
        Run(
            "llama3_vit_layers_d18.20_s18.20_g16.20",
            LLAMA3_VIT,
            layers(depth=[18, 20], seg=[18, 20], gen=[16, 20]),
            scores=(55.8, 59.5, 40.8, 52.0),
        ),
        Run(
            "llama3_vit_layers_d16.18.20_s16.18.20_g16.18.20",
            LLAMA3_VIT,
            layers(depth=[16, 18, 20], seg=[16, 18, 20], gen=[16, 18, 20]),
            scores=(56.8, 61.3, 37.0, 51.7),
        ),
    ],
)

# "none" is task tokens only: our reading of that row. In fine-tuning with embedding losses predictors and logit scales
# go on training, with the targets of LLaVA-665K's images; the query tables stay, as the task tokens do, which are made
# of them (how the paper did it isn't said).
LOSSES = Table(
    "Table 4: the stages with embedding losses.",
    columns="2D, 3D, MMStar, RealWorldQA, average",
    runs=[
        Run(
            "llama3_vit_losses_none",
            LLAMA3_VIT,
            both(embedding_losses=False),
            scores=(57.7, 62.9, 38.8, 57.5, 54.2),
        ),
        # The paper's own, PT: 58.6 64.2 39.5 57.9 55.1.
        Run(
            "llama3_vit_losses_pt_ift",
            LLAMA3_VIT,
            # Fine-tuning alone changes: it begins at the pre-training of `llama3_vit` itself.
            {"finetune": {"embedding_losses": True, "teachers": TEACHERS, **TARGETS}},
            scores=(59.1, 58.3, 38.3, 56.2, 53.0),
        ),
    ],
)

# 4 to 24 all divide 576, the length of two targets: a token is the mean of equally many rows of its query table.
TOKENS = Table(
    "Table 5: N_seek, the number of task tokens a task.",
    columns="2D, 3D, MMStar, RealWorldQA, average",
    runs=[
        Run(
            "llama3_vit_tokens_0",
            LLAMA3_VIT,
            # Then each predictor owns its queries, and the prompt is plain LLaVA's.
            every_task(num_task_tokens=0),
            scores=(56.1, 62.0, 40.1, 56.3, 53.6),
        ),
        Run(
            "llama3_vit_tokens_4",
            LLAMA3_VIT,
            every_task(num_task_tokens=4),
            scores=(60.3, 57.9, 38.1, 56.6, 53.2),
        ),
        # The paper's own, 8: 58.6 64.2 39.5 57.9 55.1.
        Run(
            "llama3_vit_tokens_12",
            LLAMA3_VIT,
            every_task(num_task_tokens=12),
            scores=(58.7, 60.7, 37.9, 57.5, 53.7),
        ),
        Run(
            "llama3_vit_tokens_16",
            LLAMA3_VIT,
            every_task(num_task_tokens=16),
            scores=(56.6, 63.6, 37.1, 54.5, 52.9),
        ),
        Run(
            "llama3_vit_tokens_24",
            LLAMA3_VIT,
            every_task(num_task_tokens=24),
            scores=(55.7, 60.0, 39.3, 57.4, 53.1),
        ),
    ],
)

LEARNABLE = Table(
    "Table 6: task tokens in IFT, frozen or learnable.",
    columns="2D, 3D, MMStar, RealWorldQA, average",
    runs=[
        # The paper's own, frozen: 58.6 64.2 39.5 57.9 55.1.
        Run(
            "llama3_vit_learnable",
            LLAMA3_VIT,
            # Rows of the vocabulary, which train as a word's do.
            {"finetune": {"task_tokens": "trained"}},
            scores=(56.9, 56.1, 39.0, 57.3, 52.3),
        ),
    ],
)

# The data file is made of both data sets': jq -s '[(.[0][] | .image |= "LLaVA-Pretrain/images/" + .), (.[1][] | .image
# |= "ALLaVA/" + .)]' 558K.json 663K.json
DATA = Table(
    "Table 7: more PT data for LLaVA-1.5, against the embedding losses.",
    columns="2D, 3D, MMStar, OK-VQA, average",
    runs=[
        # Without: 60.0 56.3 37.4 56.0 52.4; OLA-VLM without: 60.8 62.2 38.5 59.0 55.1.
        Run(
            "llava_llama3_convnext_data_allava",
            "llava_llama3_convnext",
            # Its paths name their data set's folder first, so they begin one folder further up.
            both(data="data/LLaVA-558K-ALLaVA-663K.json", image_folder="data"),
            scores=(56.8, 60.8, 37.1, 57.5, 53.1),
        ),
    ],
)

# A predictor never sees other images' tokens, whatever is listed (`modeling_ola_vlm.ImageLayout.key_mask`).
KEYS = Table(
    "Table I: the tokens that a predictor attends to.",
    columns="Average",
    runs=[
        Run(
            "llama3_vit_keys_image_task",
            LLAMA3_VIT,
            every_task(attends_to=["image", "task"]),
            scores=(50.7,),
        ),
        Run(
            "llama3_vit_keys_system_image_task",
            LLAMA3_VIT,
            every_task(attends_to=["system", "image", "task"]),
            scores=(54.5,),
        ),
        # The paper's own, text, too: 55.1.
    ],
)

SOME_TASKS = Table(
    "Table II: the tasks.",
    columns="Average of 2D, 3D, MMStar",
    runs=[
        # None, which is llava_llama3_vit: 51.9; all, the paper's own: 54.1.
        Run("llama3_vit_tasks_depth", LLAMA3_VIT, some_tasks("depth"), scores=(53.6,)),
        Run("llama3_vit_tasks_seg", LLAMA3_VIT, some_tasks("seg"), scores=(50.7,)),
        Run("llama3_vit_tasks_gen", LLAMA3_VIT, some_tasks("gen"), scores=(53.8,)),
        Run("llama3_vit_tasks_depth_seg", LLAMA3_VIT, some_tasks("depth", "seg"), scores=(53.0,)),
        Run("llama3_vit_tasks_gen_depth", LLAMA3_VIT, some_tasks("gen", "depth"), scores=(51.4,)),
        Run("llama3_vit_tasks_gen_seg", LLAMA3_VIT, some_tasks("gen", "seg"), scores=(51.2,)),
    ],
)

# Letters: the tasks in the order of their tokens behind the image. Under the causal mask a later one sees the earlier.
ORDER = Table(
    "Table III: the order of the task tokens.",
    columns="CV-Bench overall",
    runs=[
        Run("llama3_vit_order_dsg", LLAMA3_VIT, both(tasks=[DEPTH, SEG, GEN]), scores=(59.9,)),
        Run("llama3_vit_order_dgs", LLAMA3_VIT, both(tasks=[DEPTH, GEN, SEG]), scores=(61.4,)),
        Run("llama3_vit_order_sdg", LLAMA3_VIT, both(tasks=[SEG, DEPTH, GEN]), scores=(58.5,)),
        Run("llama3_vit_order_sgd", LLAMA3_VIT, both(tasks=[SEG, GEN, DEPTH]), scores=(58.9,)),
        # The paper's own, gds: 61.4; llava_llama3_vit: 58.5.
        Run("llama3_vit_order_gsd", LLAMA3_VIT, both(tasks=[GEN, SEG, DEPTH]), scores=(59.2,)),
    ],
)

# It multiplies the whole loss of a task, its contrastive term, too, in each of the task's layers.
LOSS_WEIGHT = Table(
    "Table IV: lambda, the weight of each task's embedding loss.",
    columns="Average of 2D, 3D, MMStar",
    runs=[
        Run("llama3_vit_lambda_0.10", LLAMA3_VIT, every_task(loss_weight=0.1), scores=(53.4,)),
        Run("llama3_vit_lambda_0.25", LLAMA3_VIT, every_task(loss_weight=0.25), scores=(50.9,)),
        # The paper's own, 0.50: 54.1.
        Run("llama3_vit_lambda_0.75", LLAMA3_VIT, every_task(loss_weight=0.75), scores=(51.6,)),
        Run("llama3_vit_lambda_1.00", LLAMA3_VIT, every_task(loss_weight=1.0), scores=(51.9,)),
    ],
)

LOSS_TERMS = Table(
    "Table V: smooth-L1 without the contrastive term.",
    columns="Average of 2D, 3D, MMStar",
    runs=[
        # The paper's own, both: 54.1.
        Run("llama3_vit_smooth_l1", LLAMA3_VIT, every_task(contrastive_weight=0.0), scores=(52.5,)),
    ],
)

TABLES = (
    LAYERS,
    LOSSES,
    TOKENS,
    LEARNABLE,
    DATA,
    KEYS,
    SOME_TASKS,
    ORDER,
    LOSS_WEIGHT,
    LOSS_TERMS,
)
