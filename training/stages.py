"""What trains when (paper, section 3.4; Tables 4 and 6)."""

from collections import Counter
from dataclasses import dataclass, replace

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
    """`llava`: what it trains of the plain LLaVA. Predictors and logit scales train with the `embedding_losses`.
    `task_tokens`: "queries" (their embeddings are the group means of the query tables, which train), or rows of the
    vocabulary, "frozen" or "trained"; then the query tables, which a predictor may still take, are frozen."""

    llava: tuple[str, ...]
    embedding_losses: bool
    task_tokens: str

    @property
    def trains(self) -> tuple[str, ...]:
        heads = ("predictors", "logit_scales") if self.embedding_losses else ()
        return (*self.llava, *heads, *(("queries",) if self.task_tokens == "queries" else ()))


STAGES = {
    "pretrain": Stage(("projector",), True, "queries"),
    "visual_pretrain": Stage(("vision_tower", "projector", "language_model"), False, "trained"),
    "finetune": Stage(("projector", "language_model"), False, "frozen"),
}
TASK_TOKENS = ("queries", "frozen", "trained")


def find_stage(name: str, embedding_losses: bool | None = None, task_tokens: str | None = None) -> Stage:
    """The stage, with what is given changed. ValueError for unknown names and for rows that nothing trains."""
    if name not in STAGES:
        raise ValueError(f"stage {name!r} is unknown: choose one of {list(STAGES)}")
    if task_tokens not in (None, *TASK_TOKENS):
        raise ValueError(f"task_tokens {task_tokens!r} is unknown: choose one of {TASK_TOKENS}")
    if task_tokens == "trained" and "language_model" not in STAGES[name].llava:
        raise ValueError(f'task_tokens "trained" are rows of the language model, which {name} freezes: take "queries"')
    changes = {"embedding_losses": embedding_losses, "task_tokens": task_tokens}
    return replace(STAGES[name], **{field: value for field, value in changes.items() if value is not None})


def apply_stage(
    model: nn.Module, name: str, embedding_losses: bool | None = None, task_tokens: str | None = None
) -> Stage:
    """Sets what trains in a freshly loaded model (`find_stage`), and logs it with parameter counts.

    "frozen" task tokens' rows of the input embeddings get no gradient (`OlaVlmModel.task_tokens_frozen`; the head's
    rows never get one: they are no candidates of the loss). That alone is no freeze: the optimiser must not decay the
    vocabulary's tables either (`OlaVlmTrainer.get_decay_parameter_names`).
    """
    stage = find_stage(name, embedding_losses, task_tokens)
    trained, frozen = Counter(), Counter()
    for parameter_name, parameter in model.named_parameters():
        part = next(PARTS[component] for component in parameter_name.split(".") if component in PARTS)
        parameter.requires_grad_(part in stage.trains)
        (trained if parameter.requires_grad else frozen)[part] += parameter.numel()
    model.task_tokens_from_queries = stage.task_tokens == "queries"
    model.model.task_tokens_frozen = stage.task_tokens == "frozen"
    logger.info(f"stage {name}: trains {dict(trained)} parameters, frozen {dict(frozen)}")
    return stage
