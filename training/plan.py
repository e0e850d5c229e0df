"""What a run is going to do, in numbers, before it begins."""

import math
from typing import NamedTuple

from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from .arguments import OlaVlmArguments
from .rows import Rows, StreamRows

logger = logging.get_logger(__name__)

FEW_STEPS = 20  # fewer teach nothing: warm-up takes some, and adapters start at zero


class Plan(NamedTuple):
    """`steps` of the optimizer; the rest is None for a stream, whose rows nobody has counted."""

    steps: int
    epochs: float | None
    rows: int | None
    longest_row: int | None  # in tokens, once rows are checked

    @classmethod
    def make(cls, args: OlaVlmArguments, rows: Rows | StreamRows) -> "Plan":
        """By the trainer's own arithmetic. ValueError if the rows don't fill a single batch and
        dataloader_drop_last drops what doesn't."""
        if isinstance(rows, StreamRows):
            return cls(args.max_steps, None, None, args.max_length)
        if args.dataloader_drop_last and len(rows) < args.rows_per_step:
            what = f"{len(rows)} rows are fewer than a batch of {batch_text(args)}, and an incomplete one is dropped"
            fields = "per_device_train_batch_size or gradient_accumulation_steps"
            raise ValueError(f"{what}: lower {fields}, or set dataloader_drop_last=false")
        if args.dataloader_drop_last:
            batches = len(rows) // args.per_device_train_batch_size // args.world_size
        else:
            batches = math.ceil(math.ceil(len(rows) / args.per_device_train_batch_size) / args.world_size)
        steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
        if args.max_steps > 0:
            steps = args.max_steps
            epochs = steps / steps_per_epoch
        else:
            epochs = max(args.num_train_epochs, math.ceil(args.min_steps / steps_per_epoch))
            steps = math.ceil(epochs * steps_per_epoch)
        longest = None if rows.lengths is None else int(rows.lengths.max())
        return cls(steps, epochs, len(rows), longest)

    def warn_if_short(self, args: OlaVlmArguments) -> None:
        """Logs what to change if the optimizer makes hardly a step."""
        if self.steps >= FEW_STEPS:
            return
        if args.max_steps > 0:
            remedy = "raise max_steps"
        elif args.rows_per_step > args.world_size:
            fields = ["gradient_accumulation_steps", "per_device_train_batch_size"]
            lower = [name for name in fields if getattr(args, name) > 1]
            remedy = f"lower {' or '.join(lower)}, or raise num_train_epochs"
        else:
            remedy = "raise num_train_epochs"
        logger.warning(f"only {self.steps} optimizer steps, which hardly train anything: {remedy}")

    def text(self, args: OlaVlmArguments, model: PreTrainedModel) -> str:
        """The plan as lines to print."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        epochs = "a stream" if self.epochs is None else f"{self.epochs:.3g}"
        saved = "at the end"
        if args.save_strategy == "steps":
            saved += f", checkpoints every {args.save_steps:g} steps"
        elif args.save_strategy != "no":
            saved += f", checkpoints by {SaveStrategy(args.save_strategy).value}"
        lines = {
            "rows": "a stream" if self.rows is None else f"{self.rows:,}",
            "steps": f"{self.steps:,}",
            "epochs": epochs,
            "batch": batch_text(args),
            "trained parameters": f"{trained:,} of {total:,}",
            "memory a device": memory_text(args, model, self.longest_row or 0),
            "saves to": f"{args.output_dir} ({saved})",
        }
        return "\n".join(["plan of this run", *(f"  {name + ':':<20} {value}" for name, value in lines.items())])


def batch_text(args: OlaVlmArguments) -> str:
    """The rows of a step, and what they are the product of."""
    device, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    factors = f"{device} a device x {accumulated} accumulated x {args.world_size} processes"
    return f"{args.rows_per_step} rows ({factors})"


def estimate_memory(args: OlaVlmArguments, model: PreTrainedModel, longest_row: int) -> dict[str, int]:
    """Bytes of a process that shards nothing. Activations: what the LLM's blocks keep of a batch of the longest rows;
    with activation checkpointing their inputs, and one block's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    moments = 0 if args.optim == "sgd" else 2
    text = model.config.get_text_config()
    tokens = args.per_device_train_batch_size * longest_row
    # Norms, queries, keys, values, attention's result and the residual sums; gate, up, activation and their product.
    inner_size = getattr(text, "intermediate_size", 4 * text.hidden_size)  # some configurations don't say it
    kept_by_block = 10 * text.hidden_size + 4 * inner_size
    values = text.num_hidden_layers * kept_by_block
    if args.activation_checkpointing:
        values = text.num_hidden_layers * text.hidden_size + kept_by_block
    is_half = args.bf16 or args.fp16 or args.dtype != "float32"
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": trained_bytes,
        "optimizer": moments * trained_bytes,
        "activations": tokens * values * (2 if is_half else 4),
    }


def memory_text(args: OlaVlmArguments, model: PreTrainedModel, longest_row: int) -> str:
    parts = estimate_memory(args, model, longest_row)
    named = ", ".join(f"{name} {size / 1e9:.2g}" for name, size in parts.items())
    left_out = "without teachers, vision tower's activations, logits and sharding"
    return f"about {sum(parts.values()) / 1e9:.2g} GB ({named}; {left_out})"
