"""LoRA and QLoRA: adapters of the language model train in its place (`lora_rank`, `load_in_4bit`)."""

import re
from typing import cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from .arguments import OlaVlmArguments
from .stages import part_of

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
    the whole projector; with `task_tokens` "trained" also the task tokens' rows. Nothing else gets a gradient."""
    from peft import LoraConfig, get_peft_model

    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    blocks = {name for name in linear if part_of(name) == "language_model" and not name.endswith("lm_head")}
    kinds = sorted({name.rpartition(".")[2] for name in blocks})
    trains_tokens = args.task_tokens == "trained" and model.config.task_token_ids
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=args.lora_dropout,
        target_modules=rf".*language_model.*\.({'|'.join(map(re.escape, kinds))})",
        modules_to_save=sorted(name for name in linear if part_of(name) == "projector"),
        trainable_token_indices=model.config.task_token_ids if trains_tokens else None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    logger.info(f"adapters of rank {args.lora_rank}: {sum(p.numel() for p in trained)} parameters train instead")
    return cast(PreTrainedModel, adapted)  # it passes on what it lacks itself
