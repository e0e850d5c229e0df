"""What a run is going to do, in numbers, before it begins."""

import math
from typing import NamedTuple

from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from .arguments import OlaVlmArguments
from .attach import AttachedPredictors
from .packing import PackedRows
from .rows import Rows, StreamRows

logger = logging.get_logger(__name__)

# Fewer teach nothing: warm-up takes some, and adapters start at zero.
FEW_STEPS = 20


class Plan(NamedTuple):
    """`steps` of the optimizer; the rest is None for a stream, whose rows nobody has counted."""

    steps: int
    epochs: float | None
    rows: int | None
    # Of a batch, in tokens, once rows are checked.
    longest_row: int | None
    packed: PackedRows | None = None
    has_text: bool = True

    @classmethod
    def make(cls, args: OlaVlmArguments, rows: Rows | StreamRows | PackedRows) -> "Plan":
        """By the trainer's own arithmetic. ValueError if the rows, or the sequences that they are packed into, don't
        fill a single batch and dataloader_drop_last drops what doesn't."""
        # Its length is what was asked for, since it has no other.
        if isinstance(rows, StreamRows):
            return cls(args.max_steps, None, None, args.max_length)
        # No batch would be whole, and nothing trained.
        if args.dataloader_drop_last and len(rows) < args.rows_per_step:
            items = "rows"
            if isinstance(rows, PackedRows):
                items = "packed sequences"
            fewer = f"{len(rows)} {items} are fewer than a batch of {batch_text(args)}"
            fields = "per_device_train_batch_size or gradient_accumulation_steps"
            raise ValueError(
                f"{fewer}, and an incomplete one is dropped: lower {fields}, or set dataloader_drop_last=false"
            )

        # Batches of a process in an epoch, then steps, as the trainer counts them.
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

        if isinstance(rows, PackedRows):
            return cls(steps, epochs, len(rows.rows), rows.max_length, rows, rows.rows.has_text)
        longest = None
        if rows.lengths is not None:
            longest = int(rows.lengths.max())
        return cls(steps, epochs, len(rows), longest, has_text=rows.has_text)

    def warn_if_short(self, args: OlaVlmArguments) -> None:
        """Logs what to change if the optimizer makes hardly a step."""
        if self.steps >= FEW_STEPS:
            return
        if args.max_steps > 0:
            remedy = "raise max_steps"
        # A step has rows to give away: a smaller batch makes more steps of the same data.
        elif args.rows_per_step > args.world_size:
            fields = ["gradient_accumulation_steps", "per_device_train_batch_size"]
            lower = [name for name in fields if getattr(args, name) > 1]
            remedy = f"lower {' or '.join(lower)}, or raise num_train_epochs"
        else:
            remedy = "raise num_train_epochs"
        logger.warning(f"only {self.steps} optimizer steps, which hardly train anything: {remedy}")

    def text(self, args: OlaVlmArguments, model: PreTrainedModel) -> str:
        """The plan as lines to print."""
        # The stage and adapters are applied already: this is what will train.
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        rows = "a stream"
        if self.rows is not None:
            rows = f"{self.rows:,}"
        epochs = "a stream"
        if self.epochs is not None:
            epochs = f"{self.epochs:.3g}"
        text = "the rows' answers"
        if not self.has_text:
            text = "none: images alone, which embedding losses learn from"
        saved = "at the end"
        if args.save_strategy == "steps":
            # Below 1 it is a share of the run's steps.
            interval = args.save_steps
            if interval < 1:
                interval = math.ceil(self.steps * interval)
            # A run that is shorter is saved at its end alone.
            if interval < self.steps:
                saved += f", checkpoints every {interval:g} steps"
        elif args.save_strategy != "no":
            saved += f", checkpoints by {SaveStrategy(args.save_strategy).value}"
        lines = {"rows": rows, "text": text}
        if self.packed is not None:
            lines["packed sequences"] = self.packed.describe()
        lines["steps"] = f"{self.steps:,}"
        lines["epochs"] = epochs
        lines["batch"] = batch_text(args)
        lines["trained parameters"] = f"{trained:,} of {total:,}"
        lines["memory a device"] = memory_text(args, model, self.longest_row or 0)
        lines["saves to"] = f"{args.output_dir} ({saved})"
        return "\n".join(["plan of this run", *(f"  {name + ':':<20} {value}" for name, value in lines.items())])


def batch_text(args: OlaVlmArguments) -> str:
    """The rows, or packed sequences, of a step, and what they are the product of."""
    device = args.per_device_train_batch_size
    accumulated = args.gradient_accumulation_steps
    factors = f"{device} a device x {accumulated} accumulated x {args.world_size} processes"
    items = "rows"
    if args.packing:
        items = "packed sequences"
    return f"{args.rows_per_step} {items} ({factors})"


def estimate_memory(args: OlaVlmArguments, model: PreTrainedModel, longest_row: int) -> dict[str, int]:
    """Bytes of a process that shards nothing. Activations: what the LLM's blocks keep of a batch of the longest rows;
    with activation checkpointing their inputs, and one block's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    # AdamW's two; of other optimizers it is an upper bound.
    moments = 2
    if args.optim == "sgd":
        moments = 0
    text = model.config.get_text_config()
    tokens = args.per_device_train_batch_size * longest_row
    # Some configurations don't say it.
    inner_size = getattr(text, "intermediate_size", 4 * text.hidden_size)
    # Norms, queries, keys, values, attention's result and the residual sums; gate, up, activation and their product.
    kept_by_block = 10 * text.hidden_size + 4 * inner_size
    # Numbers that a token leaves behind for the backward pass.
    values = text.num_hidden_layers * kept_by_block
    if args.activation_checkpointing:
        values = text.num_hidden_layers * text.hidden_size + kept_by_block
    bytes_a_value = 4
    if args.bf16 or args.fp16 or args.dtype != "float32":
        bytes_a_value = 2
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": trained_bytes,
        "optimizer": moments * trained_bytes,
        "activations": tokens * values * bytes_a_value,
    }


def memory_text(args: OlaVlmArguments, model: PreTrainedModel, longest_row: int) -> str:
    parts = estimate_memory(args, model, longest_row)
    named = ", ".join(f"{name} {size / 1e9:.2g}" for name, size in parts.items())
    left_out = "without teachers, vision tower's activations, logits and sharding"
    if isinstance(model, AttachedPredictors):
        # How many tokens an image has is known only when the processor has seen it.
        left_out = f"without images' tokens, {left_out.removeprefix('without ')}"
    return f"about {sum(parts.values()) / 1e9:.2g} GB ({named}; {left_out})"
