"""`transformers.Trainer` plus the embedding losses.

One process, several ranks and accumulated micro-batches give the same losses and gradients: every sum over images is
divided by the image count of the whole optimizer step, and the contrastive columns are all targets of that step. They
are known before the step begins, so they are collected where the Trainer collects a step's micro-batches.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME

from ..configuration_ola_vlm import OlaVlmConfig
from ..files.writing import write_whole
from .arguments import OlaVlmArguments
from .attach import AttachedPredictors
from .embedding_losses import EmbeddingLosses, check_collator, report_bad_rows
from .packing import PackedRows, flash_arguments
from .rows import Rows
from .run_record import is_checkpoint_name
from .sampler import GroupedSampler
from .stages import find_stage


class OlaVlmTrainer(EmbeddingLosses, Trainer):
    """Trains one stage (`args.stage`; apply it with `apply_stage` first).

    Logs `loss/ntp` and `loss/<task>/<layer>/{<the task's loss>,contrastive}` beside `loss`: means over the optimizer
    steps since the last log and over ranks; `loss` = ntp + sum over tasks of loss_weight * sum over layers (the task's
    loss + contrastive_weight * contrastive). In evaluation they are means over all supervised tokens and over all
    images, each counted once, however many processes there are. Of a task that is off after a share of the steps
    (`until`; in evaluation it never is) also `loss_weight/<task>`, of the last step. `bad_rows`, `long_rows`: rows
    dropped so far, over all ranks. Their names are logged as they come; bad ones beyond `args.max_bad_rows` of the
    run's rows stop it.

    In mixed precision (`bf16`, `fp16`) what trains becomes float32, in whatever type it was loaded (`args.dtype`), and
    what is frozen stays as it is: half the memory for it, and no update is lost to rounding. Checkpoints to resume
    from hold all weights as they are; the model that is saved in the end has `args.dtype`.
    """

    # What transformers leaves open.
    args: OlaVlmArguments

    def __init__(self, model, args, **kwargs):
        check_collator(model, kwargs.get("data_collator"))
        super().__init__(model=model, args=args, **kwargs)
        if args.n_gpu > 1:
            raise ValueError("several GPUs in one process are not supported: start with torchrun --nproc_per_node")
        if isinstance(self.train_dataset, PackedRows) and isinstance(model, AttachedPredictors):
            raise ValueError("packed rows are for OLA-VLM's own models, not for attached predictors: give plain rows")
        self.prepare_weights()
        self.stage = find_stage(args.stage, args.embedding_losses, args.task_tokens)
        self.losses_until = args.losses_until
        tasks = []
        if self.stage.embedding_losses:
            tasks = model.config.tasks
        self.set_tasks(tasks)
        # Query tables stand for the task tokens' rows while they train: the rows are written when something is saved.
        self.writes_task_tokens = len(model.config.task_token_ids) > 0 and self.stage.task_tokens == "queries"
        self.max_bad_rows = args.max_bad_rows
        self._grouped: GroupedSampler | None = None

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        args = self.args
        if train_dataset is None:
            train_dataset = self.train_dataset
        rows = cast(Rows, train_dataset)
        # `check_rows` has counted both.
        assert rows.lengths is not None and rows.has_image is not None
        # A group is an optimizer step's: the rows of all ranks and micro-batches.
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed
        if args.data_seed is not None:
            seed = args.data_seed
        self._grouped = GroupedSampler(rows.lengths, rows.has_image, batch_size, seed)
        return self._grouped

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._grouped is not None:
            # Resumed within an epoch on several ranks, nobody else tells the sampler which epoch it is.
            self._grouped.set_epoch(int(self.state.epoch))
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        if ignore_keys is None:
            # The configuration of an attached model doesn't know what its predictors give.
            known = getattr(self.base_model.config, "keys_to_ignore_at_inference", [])
            ignore_keys = [*known, *OlaVlmConfig.keys_to_ignore_at_inference]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(self, model, inputs: dict, return_outputs=False, num_items_in_batch: torch.Tensor | None = None):
        # What the model is asked for.
        inputs = dict(inputs)
        # A cache would hold keys and values of all layers, which nobody reads.
        inputs["use_cache"] = False
        # An attached model has a head of its own, which makes all logits.
        if not isinstance(self.base_model, AttachedPredictors):
            inputs["supervised_logits_only"] = model.training
        if self.tasks:
            if "step_targets" not in inputs:
                # Evaluation, where no step is collected: the columns are those of the batch on all ranks.
                self._attach_step_targets([inputs], self.args.device)
            inputs["output_predictions"] = True
            inputs["word_ids"] = self.word_ids
        # Packed rows have positions in place of a mask.
        if "position_ids" in inputs:
            inputs.update(flash_arguments(self.model.config, inputs["position_ids"]))

        # What is for the losses and the log, and no argument of the model's forward.
        step = inputs.pop("step_targets", None)
        targets = inputs.pop("targets", None)
        row_ids = inputs.pop("row_ids", None)
        # Evaluation's; training's were taken out, and counted, as the step was collected.
        report_bad_rows(inputs)

        # The loss of the next tokens, over the supervised tokens of the whole step.
        num_tokens = 0
        if num_items_in_batch is not None:
            num_tokens = int(num_items_in_batch)
            # All rows of a step may be bad: no division by zero.
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        of_model = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = cast(tuple[torch.Tensor, Any], of_model)

        # And the embedding losses beside it.
        parts = {"loss/ntp": loss.detach().clone()}
        loss = self.add_embedding_losses(loss, outputs, step, targets, parts)
        num_images = 0
        if step:
            num_images = step["num_images"]
        self.record_losses(loss, parts, row_ids, num_tokens, num_images)
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model):
        """Frozen task tokens are rows of the vocabulary's tables, and weight decay would move them: tables never decay
        (with or without task tokens, so that methods stay comparable)."""
        head = cast(nn.Linear, self.model.get_output_embeddings())
        # By identity, not by name: a tied table has two names, and families call theirs differently.
        tables = {id(self.model.get_input_embeddings().weight), id(head.weight)}
        names = {name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in tables}
        return [name for name in super().get_decay_parameter_names(model) if name not in names]

    def save_model(self, *args, **kwargs):
        """Every saved checkpoint carries the task tokens as vocabulary rows: it is a plain model."""
        # A sharded model's rows are written into the gathered weights: in `_save`.
        if self.writes_task_tokens and not self.is_sharded:
            self.accelerator.unwrap_model(self.model).write_task_tokens()
        super().save_model(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        """`state_dict`: the gathered weights of a sharded run, which the first rank alone has."""
        if self.writes_task_tokens and self.args.should_save and state_dict is not None:
            self.accelerator.unwrap_model(self.model).write_task_tokens(state_dict)
        if output_dir is None:
            output_dir = self.args.output_dir

        # To resume exactly, a checkpoint needs the float32 of what trains; the model in the end has `args.dtype`.
        is_the_end = Path(output_dir).resolve() == Path(self.args.output_dir).resolve()
        is_to_resume = is_checkpoint_name(Path(output_dir).name) and not is_the_end
        dtype = self.args.torch_dtype
        # `{}` is what the other ranks have of a sharded model.
        is_cast = dtype is not torch.float32 and not is_to_resume and not self.has_adapters and state_dict != {}
        if is_cast:
            if state_dict is None:
                state_dict = self.model.state_dict()
            state_dict = cast_floats(state_dict, dtype)
        super()._save(output_dir, state_dict)
        if is_cast and self.args.should_save:
            # `save_pretrained` names the type of a parameter in memory, and "auto" would load in that.
            file = Path(output_dir) / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            config["dtype"] = str(dtype).removeprefix("torch.")
            write_whole(file, json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """ValueError if DeepSpeed wrote it, whose optimizer states no other run can read."""
        if not (Path(resume_from_checkpoint) / OPTIMIZER_NAME).exists():
            remedy = "resume it with the --deepspeed it had, or start anew from its weights: --checkpoint"
            raise ValueError(f"{resume_from_checkpoint} has no {OPTIMIZER_NAME}: {remedy}")
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def cast_floats(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same with its floating-point weights in `dtype`; tied ones stay one tensor."""
    cast = {}
    by_place = {}
    for name, value in state_dict.items():
        # Tied weights lie at one place in memory; the shape tells apart a view that begins there.
        place = value.data_ptr(), value.shape, value.dtype
        if place not in by_place:
            if value.is_floating_point():
                value = value.to(dtype)
            by_place[place] = value
        cast[name] = by_place[place]
    return cast
