"""Recipes: fields of `OlaVlmArguments` by name. `ola-vlm recipes` lists them, `ola-vlm train --recipe NAME` trains."""

import copy
from collections.abc import Callable
from typing import NamedTuple

from . import ablations, finetune, miniature, paper, smollm2


class Recipe(NamedTuple):
    """`table`: the function that says what it is; `parent`: the recipe of which `fields` are a change."""

    table: Callable
    parent: str | None
    run: str
    fields: dict

    def __call__(self) -> dict:
        return copy.deepcopy(self.fields)


RUNS = {  # of each table, but for those that it shares with one before it
    paper.table_1: "phi3_vit llama3_convnext phi3_convnext llava_llama3_vit llava_phi3_vit llava_llama3_convnext "
    "llava_phi3_convnext feature_concat_llama3_vit token_concat_llama3_vit commercial_llama3_vit commercial_phi3_vit",
    paper.table_2: "llama3_convnext_vpt phi3_convnext_vpt llava_llama3_convnext_vpt llava_phi3_convnext_vpt",
    ablations.layers: "llama3_vit_layers_d18_s18_g20 llama3_vit_layers_d20_s18_g20 "
    "llama3_vit_layers_d8.14_s10.16_g12.18 llama3_vit_layers_d18.20_s18.20_g16.20 "
    "llama3_vit_layers_d16.18.20_s16.18.20_g16.18.20",
    ablations.losses: "llama3_vit_losses_none llama3_vit_losses_pt_ift",
    ablations.tokens: "llama3_vit_tokens_0 llama3_vit_tokens_4 llama3_vit_tokens_12 llama3_vit_tokens_16 "
    "llama3_vit_tokens_24",
    ablations.learnable: "llama3_vit_learnable",
    ablations.data: "llava_llama3_convnext_data_allava",
    ablations.keys: "llama3_vit_keys_image_task llama3_vit_keys_system_image_task",
    ablations.tasks: "llama3_vit_tasks_depth llama3_vit_tasks_seg llama3_vit_tasks_gen llama3_vit_tasks_depth_seg "
    "llama3_vit_tasks_gen_depth llama3_vit_tasks_gen_seg",
    ablations.order: "llama3_vit_order_dsg llama3_vit_order_dgs llama3_vit_order_sdg llama3_vit_order_sgd "
    "llama3_vit_order_gsd",
    ablations.loss_weight: "llama3_vit_lambda_0.10 llama3_vit_lambda_0.25 llama3_vit_lambda_0.75 "
    "llama3_vit_lambda_1.00",
    ablations.loss_terms: "llama3_vit_smooth_l1",
}
MAKES_DATA = {  # recipes that begin so -> what makes their data
    "miniature": "`make miniature` (or `ola-vlm miniature`)",
    "smollm2": "`make smollm2` (or `python -m ola_vlm.miniature.smollm2`)",
}
RECIPES = {
    "miniature_pretrain": Recipe(miniature.pretrain, None, "miniature", miniature.pretrain()),
    "miniature_finetune": Recipe(miniature.finetune, None, "miniature", miniature.finetune()),
    "smollm2_pretrain": Recipe(smollm2.pretrain, None, "smollm2", smollm2.pretrain()),
    "smollm2_finetune": Recipe(smollm2.finetune, None, "smollm2", smollm2.finetune()),
    "lora": Recipe(finetune.lora, None, "lora", finetune.lora()),
    "qlora": Recipe(finetune.qlora, "lora", "qlora", finetune.qlora()),
    "llama3_vit_pretrain": Recipe(paper.table_1, None, "llama3_vit", paper.pretrain()),
    "llama3_vit_finetune": Recipe(paper.table_1, None, "llama3_vit", paper.finetune()),
}
for table, runs in RUNS.items():
    for run in runs.split():
        begin = {}  # at its parent's checkpoint; a run's later stages begin where the one before ended
        for stage, (parent, changes) in table(run).items():
            end = f"runs/{run}/{stage}"
            fields = RECIPES[parent].fields | changes | begin | {"output_dir": end}
            RECIPES[f"{run}_{stage}"] = Recipe(table, parent, run, fields)
            begin = {"checkpoint": end}
