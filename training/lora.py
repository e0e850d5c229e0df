"""LoRA and QLoRA: adapters of the language model train in its place (`lora_rank`, `load_in_4bit`)."""

import re
from typing import cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from .arguments import OlaVlmArguments
from .stages import PARTS, find_part, part_of

logger = logging.get_logger(__name__)

# bitsandbytes ignores bare names. The head would never be a gain: it makes logits only where a token is supervised.
WHOLE = ["vision_tower", "multi_modal_projector", "encoders", "encoder_projectors"]
WHOLE = [*(f"model.{name}" for name in WHOLE), "predictors", "lm_head"]


def four_bits(dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """QLoRA's (arXiv 2305.14314) for the language model's blocks, which compute in `dtype`; everything else keeps its
    numeric type."""
    kinds = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=WHOLE, **kinds)


def add_adapters(model: PreTrainedModel, args: OlaVlmArguments) -> PreTrainedModel:
    """The model as a `PeftModel` that trains adapters of rank `lora_rank` on each linear layer of the LLM's blocks and
    the whole projector; with `task_tokens` "trained" also the task tokens' rows, with `embedding_losses` predictors
    and logit scales, too. Nothing else gets a gradient."""
    from peft import LoraConfig, get_peft_model

    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    # Predictors have linear layers of their own, which no adapter is for.
    blocks = {name for name in linear if part_of(name) == "language_model" and not name.endswith("lm_head")}
    # What the layers are called in a block ("q_proj"), and what holds the blocks ("language_model"): the tower's
    # layers have the same names as the language model's.
    kinds = sorted({name.rpartition(".")[2] for name in blocks})
    places = set()
    for name in blocks:
        places.update(part for part in name.split(".") if PARTS.get(part) == "language_model")
    alpha = args.lora_alpha
    if alpha is None:
        alpha = 2 * args.lora_rank
    trained_token_ids = None
    if args.task_tokens == "trained" and model.config.task_token_ids:
        trained_token_ids = model.config.task_token_ids
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (peft takes fractions, too)
        lora_dropout=args.lora_dropout,
        target_modules=rf".*{_one_of(sorted(places))}.*\.({'|'.join(map(re.escape, kinds))})",
        modules_to_save=projector_modules(model),
        trainable_token_indices=trained_token_ids,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    # peft takes no dictionary of modules: predictors are saved beside the adapter.
    if args.embedding_losses:
        for name, parameter in model.named_parameters():
            if part_of(name) in ("predictors", "logit_scales") and parameter.is_floating_point():
                parameter.requires_grad_(True)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    logger.info(f"adapters of rank {args.lora_rank}: {sum(p.numel() for p in trained)} parameters train instead")
    # It is none, but passes on what it lacks itself.
    return cast(PreTrainedModel, adapted)


def _one_of(words: list[str]) -> str:
    """A regular expression of the words."""
    if len(words) == 1:
        return words[0]
    return f"({'|'.join(words)})"


def projector_modules(model: nn.Module) -> list[str]:
    """The names of the modules that hold the projector's parameters, none of them inside another one. What is no
    module's but the model's own, such as LLaVA-NeXT's embedding of a line break, can't be saved in an adapter."""
    found: list[str] = []
    for name, module in model.named_modules():
        holds_some = any(True for _ in module.parameters(recurse=False))
        is_inside = any(name.startswith(f"{other}.") for other in found)
        if holds_some and not is_inside and find_part(name) == "projector":
            found.append(name)
    return sorted(found)
