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
    # Of the multi-encoder baseline: no stage trains them.
    "encoders": "encoders",
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
        parts = [*self.llava]
        if self.embedding_losses:
            parts += ["predictors", "logit_scales"]
        if self.task_tokens == "queries":
            parts.append("queries")
        return tuple(parts)


# The paper's, in their order. Distillation is pre-training's alone; later stages leave the predictors as they are.
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
    # None leaves the stage's own.
    return replace(STAGES[name], **{field: value for field, value in changes.items() if value is not None})


def find_part(name: str) -> str | None:
    """The part of the model that a parameter or a module belongs to; None if its name says nothing."""
    # Whole components: "visual" is not in "visual_projection".
    components = name.split(".")
    return next((part for component, part in PARTS.items() if component in components), None)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to. ValueError if its name says nothing."""
    part = find_part(name)
    if part is None:
        raise ValueError(f"which part is {name}? Add a component of its name to training.stages.PARTS")
    return part


def upcast_trained(model: nn.Module) -> None:
    """For mixed precision: what trains becomes float32, so that no update is lost to rounding; the rest stays as it
    was loaded."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            # By `data`: the parameter stays the same object, so what is tied stays tied.
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
    trained = Counter()
    frozen = Counter()
    for parameter_name, parameter in model.named_parameters():
        part = part_of(parameter_name)
        # Weights in 4 bits are packed into integers, which have no gradient.
        is_trained = part in stage.trains and parameter.is_floating_point()
        parameter.requires_grad_(is_trained)
        if is_trained:
            trained[part] += parameter.numel()
        else:
            frozen[part] += parameter.numel()
    # What the model's forward does with task tokens, in training.
    model.task_tokens_from_queries = stage.task_tokens == "queries"  # pyright: ignore[reportArgumentType] (a plain attribute, no module or tensor)
    model.task_tokens_frozen = stage.task_tokens == "frozen"  # pyright: ignore[reportArgumentType] (the same)
    logger.info(f"stage {name}: trains {dict(trained)} parameters, frozen {dict(frozen)}")
    return stage
