"""What trains when (paper, section 3.4; Tables 4 and 6)."""

from collections import Counter
from dataclasses import dataclass, replace

from torch import nn
from transformers.utils import logging

from .fields import TASK_TOKENS

logger = logging.get_logger(__name__)

# A component of a parameter's name -> the part of the model that it belongs to; the first one here counts, as a part's
# name may have several (Qwen's "visual.merger" is the projector in the tower). More than LLaVA's: of attached models.
PARTS = {
    "predictors": "predictors",
    "queries": "queries",
    "logit_scales": "logit_scales",
    "encoders": "encoders",  # of the multi-encoder baseline: no stage trains them
    "encoder_projectors": "projector",
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


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to. ValueError if its name says nothing."""
    components = name.split(".")
    part = next((part for component, part in PARTS.items() if component in components), None)
    if part is None:
        raise ValueError(f"which part is {name}? Add a component of its name to training.stages.PARTS")
    return part


def upcast_trained(model: nn.Module) -> None:
    """For mixed precision: what trains becomes float32, so that no update is lost to rounding; the rest stays as it
    was loaded."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def apply_stage(
    model: nn.Module, name: str, embedding_losses: bool | None = None, task_tokens: str | None = None
) -> Stage:
    """Sets what trains in a freshly loaded model (`find_stage`), and logs it with parameter counts.

    "frozen" task tokens' rows of the input embeddings get no gradient (the model's `task_tokens_frozen`; the head's
    rows never get one: they are no candidates of the loss). That alone is no freeze: the optimizer must not decay the
    vocabulary's tables either (`OlaVlmTrainer.get_decay_parameter_names`).
    """
    stage = find_stage(name, embedding_losses, task_tokens)
    needs_predictors = stage.embedding_losses or stage.task_tokens == "queries"
    if needs_predictors and not getattr(model.config, "has_predictors", True):
        raise ValueError(f"stage {name} trains predictors or query tables, and the checkpoint has none: take finetune")
    trained, frozen = Counter(), Counter()
    for parameter_name, parameter in model.named_parameters():
        part = part_of(parameter_name)
        parameter.requires_grad_(part in stage.trains and parameter.is_floating_point())  # not 4-bit ones
        (trained if parameter.requires_grad else frozen)[part] += parameter.numel()
    model.task_tokens_from_queries = stage.task_tokens == "queries"  # pyright: ignore[reportArgumentType]
    model.task_tokens_frozen = stage.task_tokens == "frozen"  # pyright: ignore[reportArgumentType]
    logger.info(f"stage {name}: trains {dict(trained)} parameters, frozen {dict(frozen)}")
    return stage
