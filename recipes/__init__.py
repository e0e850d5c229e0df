"""Recipes: functions that return fields of `OlaVlmArguments`; `ola-vlm train --recipe NAME` runs one."""

from functools import partial

from . import miniature, paper, smollm2

RECIPES = {
    f"{prefix}{llm}_vit_{stage.__name__}": partial(stage, llm, method)
    for prefix, method in [("", "ola_vlm"), ("commercial_", "ola_vlm_commercial"), ("llava_", "llava")]
    for llm in paper.LANGUAGE_MODELS
    for stage in [paper.pretrain, paper.finetune]
}
RECIPES |= {"miniature_pretrain": miniature.pretrain, "miniature_finetune": miniature.finetune}
RECIPES |= {"smollm2_pretrain": smollm2.pretrain, "smollm2_finetune": smollm2.finetune}
