"""`transformers.Trainer` plus the embedding losses.

One process, several ranks and accumulated micro-batches give the same losses and gradients: every sum over images is
divided by the image count of the whole optimizer step, and the contrastive columns are all targets of that step. They
are known before the step begins, so they are collected where the Trainer collects a step's micro-batches.
"""

import json
import math
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..files.writing import write_whole
from .arguments import OlaVlmArguments
from .attach import AttachedPredictors, load_predictors, predictors_of, write_predictors
from .collator import PADDING_ROW
from .embedding_losses import EmbeddingLosses, check_collator
from .packing import PackedRows, flash_arguments
from .rows import Rows
from .run_record import is_checkpoint_name
from .sampler import GroupedSampler
from .sharding import configure_fsdp2, gather_optimizer, load_optimizer, original_class, retie, takes_whole_weights
from .stages import find_stage, upcast_trained

logger = logging.get_logger(__name__)


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
    optimizer: Optimizer
    lr_scheduler: LRScheduler

    def __init__(self, model, args, **kwargs):
        check_collator(model, kwargs.get("data_collator"))
        super().__init__(model=model, args=args, **kwargs)
        if args.n_gpu > 1:
            raise ValueError("several GPUs in one process are not supported: start with torchrun --nproc_per_node")
        if isinstance(self.train_dataset, PackedRows) and isinstance(model, AttachedPredictors):
            raise ValueError("packed rows are for OLA-VLM's own models, not for attached predictors: give plain rows")
        # DeepSpeed keeps float32 copies of its own.
        if (args.bf16 or args.fp16) and not self.is_deepspeed_enabled:
            upcast_trained(model)
        if self.is_fsdp_enabled:
            assert self.accelerator.state.fsdp_plugin is not None
            configure_fsdp2(self.accelerator.state.fsdp_plugin, model)
        self.stage = find_stage(args.stage, args.embedding_losses, args.task_tokens)
        self.losses_until = args.losses_until
        tasks = []
        if self.stage.embedding_losses:
            tasks = model.config.tasks
        self.set_tasks(tasks)
        # Query tables stand for the task tokens' rows while they train: the rows are written when something is saved.
        self.writes_task_tokens = len(model.config.task_token_ids) > 0 and self.stage.task_tokens == "queries"
        self._dropped = DroppedRows()
        self.add_callback(self._dropped)
        self._grouped: GroupedSampler | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether weights may be spread over ranks: a checkpoint's are gathered, the model's own are shards."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def bad_rows(self) -> int:
        """Rows dropped since the run began, interrupted or not; without those that were too long."""
        return self._dropped.bad_rows

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

    def _get_dataloader(self, dataset, description, batch_size, **kwargs):
        if description == "Evaluation" and isinstance(dataset, Sized):
            # Where a rank lacks rows, the library would take the first ones once more.
            dataset = InWholeBatches(dataset, batch_size * self.accelerator.num_processes)
        return super()._get_dataloader(dataset, description, batch_size, **kwargs)

    def get_test_dataloader(self, test_dataset):
        """Warns where the losses that `predict` measures count some rows twice: a rank whose last batch lacks rows
        takes the first ones once more. What it predicts is cut to one prediction a row."""
        processes = self.accelerator.num_processes
        rows_at_once = self.args.eval_batch_size * processes
        if processes > 1 and (not isinstance(test_dataset, Sized) or len(test_dataset) % rows_at_once):
            what = f"predict on {processes} processes: its losses count some rows twice, its predictions do not"
            logger.warning(f"{what}. For losses take evaluate(), or rows in a multiple of {rows_at_once}")
        return super().get_test_dataloader(test_dataset)

    def _get_eval_sampler(self, eval_dataset):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        # transformers would group these, too, by the `input_ids` of each row, which the collator is yet to make.
        return SequentialSampler(eval_dataset)  # pyright: ignore[reportArgumentType] (rows have a length)

    def train(self, *args, **kwargs):
        if self.model_wrapped is self.model and self.model in self.accelerator._models:
            # An evaluation before training marks the bare model as prepared: it would never be wrapped for DDP, and
            # every rank would silently train on its own gradients.
            self.accelerator._models.remove(self.model)
            self.model._is_accelerate_prepared = False  # pyright: ignore[reportArgumentType] (a mark, no tensor)
        return super().train(*args, **kwargs)

    def _run_epoch(self, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # Killed after its last checkpoint, before it ended: transformers would train one more step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._grouped is not None:
            # Resumed within an epoch on several ranks, nobody else tells the sampler which epoch it is.
            self._grouped.set_epoch(int(self.state.epoch))
        # All micro-batches of one optimizer step, with their targets.
        whole = map(self._with_targets, epoch_iterator)
        batches, num_items_in_batch = super().get_batch_samples(whole, num_batches, device)
        # At the end of data of unknown length there is none.
        self._counts["train"]["steps"] += bool(batches)
        # Both gather: every rank takes part, whatever its rows hold.
        self._count_bad_rows(batches, device)
        if self.tasks and batches:
            self._attach_step_targets(batches, device)
        return batches, num_items_in_batch

    def _count_bad_rows(self, batches: list[dict], device: torch.device) -> None:
        """Names the rows that the collator dropped and counts those of all ranks; ValueError if they are too many."""
        # The zeros stand for a rank without a batch. (1, 2) on each rank: bad rows and long ones.
        found = torch.tensor([[0, 0], *map(_report_bad_rows, batches)], device=device).sum(0, keepdim=True)
        bad, long = self._gather(found).sum(0).tolist()
        self._dropped.bad_rows += bad
        self._dropped.long_rows += long
        # Measured by the whole run's rows, not by those so far: one bad row in the first step is no reason to stop.
        rows = self.state.max_steps * self.get_total_train_batch_size(self.args)
        if isinstance(self.train_dataset, PackedRows):
            rows = round(rows * self.train_dataset.rows_per_sequence)
        if self.bad_rows > self.args.max_bad_rows * rows:
            share = f"max_bad_rows={self.args.max_bad_rows} of the run's {rows} rows"
            raise ValueError(
                f"stopped at step {self.state.global_step + 1}: {self.bad_rows} bad rows are over {share}"
            )

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
        _report_bad_rows(inputs)

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

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            self._add_means(logs, "train")
            logs.update(vars(self._dropped))
            self._add_loss_weights(logs)
        super().log(logs, *args, **kwargs)

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
        if state_dict is not None:
            retie(self.model, state_dict)
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
        with original_class(self.model):
            super()._save(output_dir, state_dict)

        # What transformers and peft leave out, or say wrongly, beside the weights.
        if self.has_predictors_beside_adapters and self.args.should_save:
            write_predictors(predictors_of(self.base_model.state_dict()), self.base_model.config, output_dir)
        if is_cast and self.args.should_save:
            # `save_pretrained` names the type of a parameter in memory, and "auto" would load in that.
            file = Path(output_dir) / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            config["dtype"] = str(dtype).removeprefix("torch.")
            write_whole(file, json.dumps(config, indent=2, sort_keys=True) + "\n")

    @property
    def has_adapters(self) -> bool:
        """Whether adapters train: `lora_rank`'s, or others, which a program has put on the model."""
        return self.base_model is not self.model

    @property
    def has_predictors_beside_adapters(self) -> bool:
        """Whether predictors train beside adapters, whose file has no place for them."""
        return self.has_adapters and len(self.tasks) > 0

    @contextmanager
    def _reads_as_unsharded(self) -> Iterator[None]:
        """A run that FSDP2 shards reads the files of an unsharded one, as it writes no others."""
        is_fsdp_enabled = self.is_fsdp_enabled
        # By this field transformers chooses how files are read.
        self.is_fsdp_enabled = False
        try:
            with original_class(self.model), takes_whole_weights(self.model):
                yield
        finally:
            self.is_fsdp_enabled = is_fsdp_enabled

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """A foreign model's checkpoint has its own names for weights, and the predictors in a file of their own.
        ValueError if DeepSpeed wrote it, whose optimizer states no other run can read."""
        if not (Path(resume_from_checkpoint) / OPTIMIZER_NAME).exists():
            remedy = "resume it with the --deepspeed it had, or start anew from its weights: --checkpoint"
            raise ValueError(f"{resume_from_checkpoint} has no {OPTIMIZER_NAME}: {remedy}")
        with self._reads_as_unsharded():
            if isinstance(self.model, AttachedPredictors):
                self.model.load_checkpoint(resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                if self.has_predictors_beside_adapters:
                    load_predictors(self.base_model, resume_from_checkpoint)

    def _load_best_model(self):
        with self._reads_as_unsharded():
            if isinstance(self.model, AttachedPredictors) and not self.is_deepspeed_enabled:
                assert self.state.best_model_checkpoint is not None
                self.model.load_checkpoint(self.state.best_model_checkpoint)
            else:
                super()._load_best_model()
                if self.has_predictors_beside_adapters:
                    assert self.state.best_model_checkpoint is not None
                    load_predictors(self.base_model, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir):
        """Of FSDP2, transformers would write the weights a second time, and states that no unsharded run can read."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # All ranks take part in gathering; the first one alone writes.
        optimizer_state = gather_optimizer(self.optimizer)
        if self.args.should_save:
            torch.save(optimizer_state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


class InWholeBatches(Dataset):
    """The rows, and then as many that a batch leaves out as make whole batches of them all."""

    def __init__(self, rows, batch_size: int):
        self.rows = rows
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size) * self.batch_size

    def __getitem__(self, i: int) -> dict:
        if i < len(self.rows):
            return self.rows[i]
        return PADDING_ROW


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


def _report_bad_rows(batch: dict) -> list[int]:
    """How many rows were dropped as bad, and how many as too long."""
    bad_rows = batch.pop("bad_rows", ())
    long_rows = batch.pop("long_rows", ())
    for named in (*bad_rows, *long_rows):
        logger.warning(f"dropped {named}")
    return [len(bad_rows), len(long_rows)]


class DroppedRows(TrainerCallback, ExportableState):
    """How many rows were dropped since the run began, over all ranks: goes into checkpoints and comes back."""

    def __init__(self):
        self.bad_rows = 0
        self.long_rows = 0

    def state(self) -> dict:
        # The names that transformers wants of what goes into a checkpoint's trainer_state.json.
        return {"args": {}, "attributes": dict(vars(self))}

    def on_train_begin(self, args, state, control, **kwargs):
        saved_states = cast(dict[str, dict], state.stateful_callbacks)
        saved = saved_states.get(type(self).__name__)
        # None at a run's beginning.
        if saved:
            vars(self).update(saved["attributes"])
