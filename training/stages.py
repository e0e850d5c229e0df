"""What trains when (paper, section 3.4; Tables 4 and 6)."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A component of a parameter's name -> the part of the model that it belongs to; the first one here counts, as a part's
# name may have several (Qwen's "visual.merger" is the projector in the tower). More than LLaVA's: of attached models.
PARTS = {
    "predictors": "predictors",
    "queries": "queries",
    "logit_scales": "logit_scales",
    "multi_modal_projector": "projector",
    "connector": "projector",
    "merger": "projector",
    "deepstack_merger_list": "projector",
    "image_newline": "projector",
    "vision_tower": "vision_tower",
    "vision_model": "vision_tower",
    "visual": "vision_tower",
    "language_model": "language_model",
    "text_model": "language_model",
    "lm_head": "language_model",
}


@dataclass(frozen=True)
class Stage:
    """`task_tokens`: "queries" (their embeddings are the query tables' group means), "frozen" or "trained" rows."""

    trains: tuple[str, ...]
    embedding_losses: bool
    task_tokens: str


STAGES = {
    "pretrain": Stage(("projector", "predictors", "queries", "logit_scales"), True, "queries"),
    "visual_pretrain": Stage(("vision_tower", "projector", "language_model"), False, "trained"),
    "finetune": Stage(("projector", "language_model"), False, "frozen"),
}


def apply_stage(model: nn.Module, name: str) -> Stage:
    """Sets what trains in a freshly loaded model, and logs it with parameter counts.

    In "finetune" the task tokens' rows of the input embeddings get no gradient (the head's rows never get one: they
    are no candidates of the loss). That alone is no freeze: the optimiser must not decay the vocabulary's tables
    either (`OlaVlmTrainer.get_decay_parameter_names`).
    """
    if name not in STAGES:
        raise ValueError(f"stage {name!r} is unknown: choose one of {list(STAGES)}")
    stage = STAGES[name]
    trained, frozen = Counter(), Counter()
    for parameter_name, parameter in model.named_parameters():
        components = parameter_name.split(".")
        part = next((part for component, part in PARTS.items() if component in components), None)
        if part is None:
            raise ValueError(f"which part is {parameter_name}? Add a component of its name to training.stages.PARTS")
        parameter.requires_grad_(part in stage.trains)
        (trained if parameter.requires_grad else frozen)[part] += parameter.numel()
    model.task_tokens_from_queries = stage.task_tokens == "queries"
    task_token_ids = model.config.task_token_ids
    if stage.task_tokens == "frozen" and task_token_ids:
        rows = model.get_input_embeddings().weight
        ids = torch.tensor(task_token_ids)  # not of the gradient's type: bf16 holds no id above 256 exactly
        rows.register_hook(lambda grad: grad.index_fill(0, ids.to(grad.device), 0))
    logger.info(f"stage {name}: trains {dict(trained)} parameters, frozen {dict(frozen)}")
    return stage
