"""`transformers.Trainer` plus the embedding losses.

One process, several ranks and accumulated micro-batches give the same losses and gradients: every sum over images is
divided by the image count of the whole optimizer step, and the contrastive columns are all targets of that step. They
are known before the step begins, so they are collected where the Trainer collects a step's micro-batches.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..targets.files import write_whole
from .arguments import OlaVlmArguments
from .attach import AttachedPredictors
from .collator import OlaVlmCollator
from .losses import StepTargets, task_loss
from .rows import Rows
from .sampler import GroupedSampler
from .sharding import configure_fsdp2, gather_optimizer, load_optimizer, original_class, retie, takes_whole_weights
from .stages import find_stage, upcast_trained
from .words import word_ids_of

logger = logging.get_logger(__name__)

# Numeric types of targets, the narrowest first: on their way between ranks each is named by its place here.
TARGET_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class OlaVlmTrainer(Trainer):
    """Trains one stage (`args.stage`; apply it with `apply_stage` first).

    Logs `loss/ntp` and `loss/<task>/<layer>/{<the task's loss>,contrastive}` beside `loss`: means over the optimizer
    steps since the last log and over ranks; `loss` = ntp + sum over tasks of loss_weight * sum over layers (the task's
    loss + contrastive_weight * contrastive). Of a task that is off after a share of the steps (`until`; in evaluation
    it never is) also `loss_weight/<task>`, of the last step. `bad_rows`, `long_rows`: rows dropped so far, over all
    ranks. Their names are logged as they come; bad ones beyond `args.max_bad_rows` of the run's rows stop it.

    In mixed precision (`bf16`, `fp16`) what trains becomes float32, in whatever type it was loaded (`args.dtype`), and
    what is frozen stays as it is: half the memory for it, and no update is lost to rounding. Checkpoints to resume
    from hold all weights as they are; the model that is saved in the end has `args.dtype`.
    """

    # What transformers leaves open.
    model: PreTrainedModel
    args: OlaVlmArguments
    data_collator: OlaVlmCollator
    processing_class: ProcessorMixin
    optimizer: Optimizer
    lr_scheduler: LRScheduler

    def __init__(self, model, args, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        if args.n_gpu > 1:
            raise ValueError("several GPUs in one process are not supported: start with torchrun --nproc_per_node")
        if (args.bf16 or args.fp16) and not self.is_deepspeed_enabled:  # which keeps float32 copies of its own
            upcast_trained(model)
        if self.is_fsdp_enabled:
            assert self.accelerator.state.fsdp_plugin is not None
            configure_fsdp2(self.accelerator.state.fsdp_plugin, model)
        self.stage = find_stage(args.stage, args.embedding_losses, args.task_tokens)
        self.tasks = model.config.tasks if self.stage.embedding_losses else []
        self.word_ids = word_ids_of(self.tasks, self.data_collator.target_sources, self.processing_class)
        self.writes_task_tokens = len(model.config.task_token_ids) > 0 and self.stage.task_tokens == "queries"
        # Sums of the logged losses, and the number of their "steps", since the last log.
        self._sums: dict[str, defaultdict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
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
        rows = cast(Rows, self.train_dataset if train_dataset is None else train_dataset)
        assert rows.lengths is not None and rows.has_image is not None  # they are checked
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        self._grouped = GroupedSampler(rows.lengths, rows.has_image, batch_size, seed)
        return self._grouped

    def _get_eval_sampler(self, eval_dataset):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset)  # pyright: ignore[reportArgumentType]

    def train(self, *args, **kwargs):
        if self.model_wrapped is self.model and self.model in self.accelerator._models:
            # An evaluation before training marks the bare model as prepared: it would never be wrapped for DDP, and
            # every rank would silently train on its own gradients.
            self.accelerator._models.remove(self.model)
            self.model._is_accelerate_prepared = False  # pyright: ignore[reportArgumentType]
        return super().train(*args, **kwargs)

    def _run_epoch(self, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # Killed after its last checkpoint, before it ended: transformers would train one more step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._grouped is not None:  # resumed within an epoch, several ranks aren't told which one it is
            self._grouped.set_epoch(int(self.state.epoch))
        whole = map(self._with_targets, epoch_iterator)
        batches, num_items_in_batch = super().get_batch_samples(whole, num_batches, device)
        self._sums["train"]["steps"] += bool(batches)  # none at the end of data of unknown length
        self._count_bad_rows(batches, device)
        if self.tasks and batches:
            self._attach_step_targets(batches, device)
        return batches, num_items_in_batch

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """All ranks', one after the other."""
        return cast(torch.Tensor, self.accelerator.gather(values))

    def _with_targets(self, batch: dict) -> dict:
        return self.data_collator.add_targets(batch) if "samples" in batch else batch

    def _count_bad_rows(self, batches: list[dict], device: torch.device) -> None:
        """Names the rows that the collator dropped and counts those of all ranks; ValueError if they are too many."""
        found = torch.tensor([[0, 0], *map(_report_bad_rows, batches)], device=device).sum(0, keepdim=True)
        bad, long = self._gather(found).sum(0).tolist()
        self._dropped.bad_rows += bad
        self._dropped.long_rows += long
        rows = self.state.max_steps * self.get_total_train_batch_size(self.args)
        if self.bad_rows > self.args.max_bad_rows * rows:
            share = f"max_bad_rows={self.args.max_bad_rows} of the run's {rows} rows"
            raise ValueError(
                f"stopped at step {self.state.global_step + 1}: {self.bad_rows} bad rows are over {share}"
            )

    def _attach_step_targets(self, batches: list[dict], device: torch.device) -> None:
        """Gives each micro-batch the contrastive columns of its step, its own first column and their number.

        Columns are gathered in the type that the targets come in (the cache's): the loss makes float32 of them."""
        names = [task["name"] for task in self.tasks]
        sizes = [len(batch["targets"][names[0]]) for batch in batches]
        # A rank without an image doesn't know the targets' type: it takes the others'.
        own = [sum(sizes), *(_target_dtype(batches, name) for name in names)]
        by_rank = self._gather(torch.tensor([own], device=device))
        counts = by_rank[:, 0].tolist()
        dtypes = [TARGET_DTYPES[place] for place in by_rank[:, 1:].amax(0).tolist()]
        columns = {}
        for name, dtype in zip(names, dtypes, strict=True):
            columns[name] = torch.cat([batch["targets"][name].to(device, dtype) for batch in batches])
            if len(counts) > 1 and max(counts) > 0:
                padded = self._gather(cast(torch.Tensor, self.accelerator.pad_across_processes(columns[name])))
                parts = zip(padded.split(max(counts)), counts, strict=True)
                columns[name] = torch.cat([rows[:count] for rows, count in parts])
        offset = sum(counts[: self.accelerator.process_index])
        for batch, size in zip(batches, sizes, strict=True):
            batch["step_targets"] = {"columns": columns, "offset": offset, "num_images": sum(counts)}
            offset += size

    def compute_loss(self, model, inputs: dict, return_outputs=False, num_items_in_batch: torch.Tensor | None = None):
        inputs = dict(inputs)
        inputs["use_cache"] = False  # keys and values of all layers, which nobody reads
        if not isinstance(self.model, AttachedPredictors):  # whose model has a head of its own
            inputs["supervised_logits_only"] = model.training
        if self.tasks:
            if "step_targets" not in inputs:  # evaluation: the columns are those of the batch on all ranks
                self._attach_step_targets([inputs], self.args.device)
            inputs["output_predictions"] = True
            inputs["word_ids"] = self.word_ids
        step, targets, row_ids = (inputs.pop(key, None) for key in ("step_targets", "targets", "row_ids"))
        _report_bad_rows(inputs)  # evaluation's
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # all rows of a step may be bad
        of_model = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = cast(tuple[torch.Tensor, Any], of_model)
        # DDP averages gradients over ranks; all counts are global, so each rank's share counts in full.
        ranks = self.accelerator.num_processes
        parts = {"loss/ntp": loss.detach().clone()}
        for task in self.tasks:
            name = task["name"]
            place = step["columns"][name], step["offset"], step["num_images"]
            tables = outputs.word_embeddings.get(name, ())
            task_targets = StepTargets.make(task, targets[name], *place, tables)
            weight = self.loss_weight(task, self.state.global_step) if model.training else task["loss_weight"]
            for layer in task["layers"]:
                prediction, logit_scale = outputs.predictions[name][layer], outputs.logit_scales[name]
                part = task_loss(prediction, task_targets, logit_scale, task["loss"], task["contrastive_weight"])
                loss = loss + ranks * weight * part.total
                parts[f"loss/{name}/{layer}/{task['loss']}"] = ranks * part.distance.detach()
                parts[f"loss/{name}/{layer}/contrastive"] = ranks * part.contrastive.detach()
        if model.training and not torch.isfinite(loss):
            bad = [name for name, value in parts.items() if not torch.isfinite(value)]
            where = f"step {self.state.global_step + 1} on rank {self.accelerator.process_index}"
            raise FloatingPointError(f"non-finite loss at {where}: {', '.join(bad) or 'their sum'}; rows {row_ids}")
        sums = self._sums["train" if model.training else "eval"]
        sums["steps"] += not model.training  # a training step may have several micro-batches: counted elsewhere
        for name, value in parts.items():
            sums[name] += value
        return (loss, outputs) if return_outputs else loss

    def loss_weight(self, task: dict, step: int) -> float:
        """A task's in the training step after `step` others."""
        share = task["until"] if self.args.losses_until is None else self.args.losses_until
        is_over = share < 1 and step >= round(share * self.state.max_steps)
        return 0.0 if is_over else task["loss_weight"]

    def _add_means(self, metrics: dict, mode: str, prefix: str = "") -> None:
        sums, self._sums[mode] = self._sums[mode], defaultdict(float)
        steps = sums.pop("steps", 0)
        for name, value in sums.items():
            metrics[prefix + name] = cast(torch.Tensor, self.accelerator.reduce(value, "mean")).item() / steps

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            self._add_means(logs, "train")
            logs |= vars(self._dropped)
            last_step = self.state.max_steps - 1
            for task in self.tasks:
                if self.loss_weight(task, last_step) != task["loss_weight"]:
                    logs[f"loss_weight/{task['name']}"] = self.loss_weight(task, self.state.global_step - 1)
        super().log(logs, *args, **kwargs)

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(self._with_targets(inputs))  # evaluation's; training's have them

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        assert output.metrics is not None
        self._add_means(output.metrics, "eval", f"{metric_key_prefix}_")
        return output

    def get_decay_parameter_names(self, model):
        """Frozen task tokens are rows of the vocabulary's tables, and weight decay would move them: tables never decay
        (with or without task tokens, so that methods stay comparable)."""
        head = cast(nn.Linear, self.model.get_output_embeddings())
        tables = {id(self.model.get_input_embeddings().weight), id(head.weight)}
        names = {name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in tables}
        return [name for name in super().get_decay_parameter_names(model) if name not in names]

    def save_model(self, *args, **kwargs):
        """Every saved checkpoint carries the task tokens as vocabulary rows: it is a plain model."""
        if self.writes_task_tokens and not self.is_sharded:
            self.accelerator.unwrap_model(self.model).write_task_tokens()
        super().save_model(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        """`state_dict`: the gathered weights of a sharded run, which the first rank alone has."""
        if self.writes_task_tokens and self.args.should_save and state_dict is not None:
            self.accelerator.unwrap_model(self.model).write_task_tokens(state_dict)
        if state_dict is not None:
            retie(self.model, state_dict)
        output_dir = self.args.output_dir if output_dir is None else output_dir
        is_to_resume = Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR)
        dtype = self.args.torch_dtype
        is_cast = dtype is not torch.float32 and not is_to_resume and not self.args.lora_rank and state_dict != {}
        if is_cast:
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            state_dict = cast_floats(state_dict, dtype)
        with original_class(self.model):
            super()._save(output_dir, state_dict)
        if is_cast and self.args.should_save:
            # `save_pretrained` names the type of a parameter in memory, and "auto" would load in that.
            file = Path(output_dir) / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            config["dtype"] = str(dtype).removeprefix("torch.")
            write_whole(file, json.dumps(config, indent=2, sort_keys=True) + "\n")

    @contextmanager
    def _reads_as_unsharded(self) -> Iterator[None]:
        """A run that FSDP2 shards reads the files of an unsharded one, as it writes no others."""
        is_fsdp_enabled = self.is_fsdp_enabled
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

    def _load_best_model(self):
        with self._reads_as_unsharded():
            if isinstance(self.model, AttachedPredictors) and not self.is_deepspeed_enabled:
                assert self.state.best_model_checkpoint is not None
                self.model.load_checkpoint(self.state.best_model_checkpoint)
            else:
                super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir):
        """Of FSDP2, transformers would write the weights a second time, and states that no unsharded run can read."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
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


def _target_dtype(batches: list[dict], name: str) -> int:
    """The place in `TARGET_DTYPES` of the type of a task's targets; 0 if there are none."""
    places = [0]
    for batch in batches:
        targets = batch["targets"][name]
        if len(targets) > 0:
            places.append(TARGET_DTYPES.index(targets.dtype))
    return max(places)


def cast_floats(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same with its floating-point weights in `dtype`; tied ones stay one tensor."""
    cast = {}
    by_place = {}
    for name, value in state_dict.items():
        place = value.data_ptr(), value.shape, value.dtype
        if place not in by_place:
            by_place[place] = value.to(dtype) if value.is_floating_point() else value
        cast[name] = by_place[place]
    return cast


def _report_bad_rows(batch: dict) -> list[int]:
    """How many rows were dropped as bad, and how many as too long."""
    dropped = [batch.pop(name, ()) for name in ("bad_rows", "long_rows")]
    for named in (*dropped[0], *dropped[1]):
        logger.warning(f"dropped {named}")
    return [*map(len, dropped)]


class DroppedRows(TrainerCallback, ExportableState):
    """How many rows were dropped since the run began, over all ranks: goes into checkpoints and comes back."""

    def __init__(self):
        self.bad_rows = self.long_rows = 0

    def state(self) -> dict:
        return {"args": {}, "attributes": dict(vars(self))}

    def on_train_begin(self, args, state, control, **kwargs):
        if saved := state.stateful_callbacks.get(type(self).__name__):  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            vars(self).update(saved["attributes"])
