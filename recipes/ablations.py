"""The paper's ablations (Tables 3 to 7 and I to V): each changes a field or two of `llama3_vit`, Table 7 of
`llava_llama3_convnext`. What is varied stands in the run's name; where the paper's own choice is a row, it is named
with its numbers and has no recipe but its own.

Every row is trained by torchrun ... train.py --recipe RUN_pretrain, then, sharded, accelerate launch ... train.py
--recipe RUN_finetune; `ola-vlm recipes` has both commands in full (Table 6, and `losses_pt_ift` of Table 4: the latter
only). Scores are CV-Bench 2D, CV-Bench 3D,
MMStar, RealWorldQA (not in all tables) and their average, unless said otherwise.
"""

from ..configuration_ola_vlm import default_tasks
from .paper import TARGETS, TEACHERS, Changes

TASKS = {task["name"]: task for task in default_tasks()}
BY_LETTER = {name[0]: name for name in TASKS}


def values(run: str) -> list[str]:
    """What follows language model, encoder and the name of what is varied."""
    return run.split("_")[3:]


def both(parent: str = "llama3_vit", **changes) -> Changes:
    """A run with a PT of its own, and therefore an IFT of its own."""
    return {"pretrain": (f"{parent}_pretrain", changes), "finetune": (f"{parent}_finetune", {})}


def every_task(**fields) -> Changes:
    return both(tasks=[task | fields for task in TASKS.values()])


def layers(run: str) -> Changes:
    """Table 3: the layers that learn from the depth (d), segmentation (s) and generation (g) teacher.

    Command: RUN_pretrain, RUN_finetune (top of this file). On 16 MI300X, estimated: PT 0.7 h to 0.8 h, IFT 1.7 h.

    2D, 3D, MMStar, average:
        llama3_vit_layers_d18_s18_g20                       58.9 60.9 37.9 52.6
        llama3_vit_layers_d20_s18_g20                       57.6 60.8 38.8 52.4
        llama3_vit_layers_d8.14_s10.16_g12.18               56.5 56.4 38.8 50.6
        llama3_vit (d8.20_s10.18_g12.20)                    58.6 64.2 39.5 54.1
        llama3_vit_layers_d18.20_s18.20_g16.20              55.8 59.5 40.8 52.0
        llama3_vit_layers_d16.18.20_s16.18.20_g16.18.20     56.8 61.3 37.0 51.7
    """
    chosen = {BY_LETTER[value[0]]: [int(layer) for layer in value[1:].split(".")] for value in values(run)}
    return both(tasks=[task | {"layers": chosen[name]} for name, task in TASKS.items()])


def losses(run: str) -> Changes:
    """Table 4: the stages with embedding losses; "none": task tokens only (our reading of that row).

    In IFT with embedding losses predictors and logit scales go on training, with the targets of LLaVA-665K's images;
    the query tables stay, as the task tokens do, which are made of them (how the paper did it isn't said).
    Command: RUN_pretrain, RUN_finetune (top of this file). On 16 MI300X, estimated: PT 0.7 h, IFT 1.7 h.

    2D, 3D, MMStar, RealWorldQA, average:
        llava_llama3_vit            56.0 61.0 38.8 57.8 53.4
        llama3_vit_losses_none      57.7 62.9 38.8 57.5 54.2
        llama3_vit (PT)             58.6 64.2 39.5 57.9 55.1
        llama3_vit_losses_pt_ift    59.1 58.3 38.3 56.2 53.0
    """
    if values(run) == ["none"]:
        return both(embedding_losses=False)
    return {"finetune": ("llama3_vit_finetune", {"embedding_losses": True, "teachers": TEACHERS, **TARGETS})}


def tokens(run: str) -> Changes:
    """Table 5: N_seek, the number of task tokens a task.

    Command: RUN_pretrain, RUN_finetune (top of this file). On 16 MI300X, estimated: PT 0.8 h, IFT 1.7 h.

    2D, 3D, MMStar, RealWorldQA, average:
        llama3_vit_tokens_0     56.1 62.0 40.1 56.3 53.6
        llama3_vit_tokens_4     60.3 57.9 38.1 56.6 53.2
        llama3_vit (8)          58.6 64.2 39.5 57.9 55.1
        llama3_vit_tokens_12    58.7 60.7 37.9 57.5 53.7
        llama3_vit_tokens_16    56.6 63.6 37.1 54.5 52.9
        llama3_vit_tokens_24    55.7 60.0 39.3 57.4 53.1
    """
    return every_task(num_task_tokens=int(values(run)[0]))


def learnable(run: str) -> Changes:
    """Table 6: task tokens in IFT, frozen or learnable.

    Command: RUN_finetune, after llama3_vit_pretrain. On 16 MI300X, estimated: IFT 1.7 h.

    2D, 3D, MMStar, RealWorldQA, average:
        llama3_vit (frozen)     58.6 64.2 39.5 57.9 55.1
        llama3_vit_learnable    56.9 56.1 39.0 57.3 52.3
    """
    return {"finetune": ("llama3_vit_finetune", {"task_tokens": "trained"})}


def data(run: str) -> Changes:
    """Table 7: more PT data for LLaVA-1.5, against the embedding losses.

    Command: RUN_pretrain, RUN_finetune (top of this file), after data/LLaVA-558K-ALLaVA-663K.json is made of both:
    jq -s '[(.[0][] | .image |= "LLaVA-Pretrain/images/" + .), (.[1][] | .image |= "ALLaVA/" + .)]' 558K.json 663K.json
    On 16 MI300X, estimated: PT 2.0 h, IFT 1.7 h.

    2D, 3D, MMStar, OK-VQA, average:
        llava_llama3_convnext               60.0 56.3 37.4 56.0 52.4
        llava_llama3_convnext_data_allava   56.8 60.8 37.1 57.5 53.1
        llama3_convnext                     60.8 62.2 38.5 59.0 55.1
    """
    return both("llava_llama3_convnext", data="data/LLaVA-558K-ALLaVA-663K.json", image_folder="data")


def keys(run: str) -> Changes:
    """Table I: the tokens that a predictor attends to.

    Command: RUN_pretrain, RUN_finetune (top of this file). On 16 MI300X, estimated: PT 0.8 h, IFT 1.7 h.

    Average:
        llama3_vit_keys_image_task          50.7
        llama3_vit_keys_system_image_task   54.5
        llama3_vit (and text)               55.1
    """
    return every_task(keys=values(run))


def tasks(run: str) -> Changes:
    """Table II: the tasks.

    Command: RUN_pretrain, RUN_finetune (top of this file). On 16 MI300X, estimated: PT 0.7 h to 0.8 h, IFT 1.7 h.

    Average of 2D, 3D, MMStar:
        llava_llama3_vit (none)         51.9
        llama3_vit_tasks_depth          53.6
        llama3_vit_tasks_seg            50.7
        llama3_vit_tasks_gen            53.8
        llama3_vit_tasks_depth_seg      53.0
        llama3_vit_tasks_gen_depth      51.4
        llama3_vit_tasks_gen_seg        51.2
        llama3_vit (all)                54.1
    """
    names = values(run)
    return both(tasks=[TASKS[name] for name in names], teachers={name: TEACHERS[name] for name in names})


def order(run: str) -> Changes:
    """Table III: the order of the task tokens.

    Command: RUN_pretrain, RUN_finetune (top of this file). On 16 MI300X, estimated: PT 0.8 h, IFT 1.7 h.

    CV-Bench overall:
        llama3_vit_order_dsg    59.9
        llama3_vit_order_dgs    61.4
        llama3_vit_order_sdg    58.5
        llama3_vit_order_sgd    58.9
        llama3_vit (gds)        61.4
        llama3_vit_order_gsd    59.2
        llava_llama3_vit        58.5
    """
    return both(tasks=[TASKS[BY_LETTER[letter]] for letter in values(run)[0]])


def loss_weight(run: str) -> Changes:
    """Table IV: lambda, the weight of each task's embedding loss.

    Command: RUN_pretrain, RUN_finetune (top of this file). On 16 MI300X, estimated: PT 0.8 h, IFT 1.7 h.

    Average of 2D, 3D, MMStar:
        llama3_vit_lambda_0.10  53.4
        llama3_vit_lambda_0.25  50.9
        llama3_vit (0.50)       54.1
        llama3_vit_lambda_0.75  51.6
        llama3_vit_lambda_1.00  51.9
    """
    return every_task(loss_weight=float(values(run)[0]))


def loss_terms(run: str) -> Changes:
    """Table V: smooth-L1 without the contrastive term.

    Command: RUN_pretrain, RUN_finetune (top of this file). On 16 MI300X, estimated: PT 0.8 h, IFT 1.7 h.

    Average of 2D, 3D, MMStar:
        llama3_vit_smooth_l1    52.5
        llama3_vit (both)       54.1
    """
    return every_task(contrastive_weight=0.0)
