"""Recipes: functions that return fields of `OlaVlmArguments`; `ola-vlm train --recipe NAME` runs one."""

from functools import partial

from . import miniature, paper

RECIPES = {
    "llama3_vit_pretrain": partial(paper.pretrain, "llama3"),
    "llama3_vit_finetune": partial(paper.finetune, "llama3"),
    "phi3_vit_pretrain": partial(paper.pretrain, "phi3"),
    "phi3_vit_finetune": partial(paper.finetune, "phi3"),
    "llava_llama3_vit_pretrain": partial(paper.pretrain, "llama3", method="llava"),
    "llava_llama3_vit_finetune": partial(paper.finetune, "llama3", method="llava"),
    "llava_phi3_vit_pretrain": partial(paper.pretrain, "phi3", method="llava"),
    "llava_phi3_vit_finetune": partial(paper.finetune, "phi3", method="llava"),
    "miniature_pretrain": miniature.pretrain,
    "miniature_finetune": miniature.finetune,
}
