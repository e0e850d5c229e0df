"""What trains when (paper, section 3.4; Tables 4 and 6)."""

from collections import Counter
from dataclasses import dataclass

from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A component of a parameter's name -> the part of the model that it belongs to.
PARTS = {
    "vision_tower": "vision_tower",
    "encoders": "encoders",  # of the multi-encoder baseline: no stage trains them
    "multi_modal_projector": "projector",
    "encoder_projectors": "projector",
    "language_model": "language_model",
    "lm_head": "language_model",
    "predictors": "predictors",
    "queries": "queries",
    "logit_scales": "logit_scales",
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

    In "finetune" the task tokens' rows of the input embeddings get no gradient (`OlaVlmModel.task_tokens_frozen`; the
    head's rows never get one: they are no candidates of the loss). That alone is no freeze: the optimiser must not
    decay the vocabulary's tables either (`OlaVlmTrainer.get_decay_parameter_names`).
    """
    if name not in STAGES:
        raise ValueError(f"stage {name!r} is unknown: choose one of {list(STAGES)}")
    stage = STAGES[name]
    trained, frozen = Counter(), Counter()
    for parameter_name, parameter in model.named_parameters():
        part = next(PARTS[component] for component in parameter_name.split(".") if component in PARTS)
        parameter.requires_grad_(part in stage.trains)
        (trained if parameter.requires_grad else frozen)[part] += parameter.numel()
    model.task_tokens_from_queries = stage.task_tokens == "queries"
    model.model.task_tokens_frozen = stage.task_tokens == "frozen"
    logger.info(f"stage {name}: trains {dict(trained)} parameters, frozen {dict(frozen)}")
    return stage
