"""The embedding losses beside a trainer's own: what `OlaVlmTrainer` and TRL's `SFTTrainer` (training.sft) share.

One process, several ranks and accumulated micro-batches give the same losses and gradients: every sum over images is
divided by the image count of the whole optimizer step, and the contrastive columns are all targets of that step. They
are known before the step begins, so they are collected where the Trainer collects a step's micro-batches.
"""

import math
from collections import defaultdict
from collections.abc import Sized
from typing import Any, cast

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_truncate
from transformers.utils import logging

from ..configuration_ola_vlm import target_shape
from .attach import AttachedPredictors
from .collator import PADDING_ROW, AttachedCollator, OlaVlmCollator
from .losses import StepTargets, task_loss
from .packing import PackedRows
from .saving import WholeCheckpoints, base_of
from .words import word_ids_of

logger = logging.get_logger(__name__)

# Numeric types of targets, the narrowest first, and that of words' numbers: on their way between ranks each is named
# by its place here.
TARGET_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32)


class EmbeddingLosses(WholeCheckpoints):
    """Mixed into a trainer's class before it. The trainer's collator is ours; its `__init__` calls `prepare_weights`
    and `set_tasks`, its `compute_loss` `add_embedding_losses` and `record_losses`."""

    # What transformers leaves open.
    data_collator: OlaVlmCollator
    processing_class: ProcessorMixin

    # Bad rows met in training are dropped up to this share of the run's rows.
    max_bad_rows = 0.01
    # The share of the steps after which a loss is off, whatever its task says; None: what the task says.
    losses_until: float | None = None

    def set_tasks(self, tasks: list[dict]) -> None:
        """Those whose losses train, after the trainer's own set-up. ValueError for words without a source of words,
        and for a collator that was made for other tasks."""
        # Before the first step, not at the first evaluation.
        self._check_metrics(self.eval_dataset)
        if isinstance(self.data_collator, OlaVlmCollator):
            check_targets(self.data_collator, tasks)
        self.tasks = tasks
        self.word_ids = word_ids_of(tasks, self.data_collator.target_sources, self.processing_class)
        # Of the losses since the last log: their sums, each times what it counts, and the sums of what they count: a
        # step in training; tokens or images in evaluation.
        self._sums: dict[str, defaultdict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._counts: dict[str, defaultdict[str, Any]] = {"train": defaultdict(int), "eval": defaultdict(int)}
        self._dropped = DroppedRows()
        self.add_callback(self._dropped)

    @property
    def bad_rows(self) -> int:
        """Rows dropped since the run began, interrupted or not; without those that were too long."""
        return self._dropped.bad_rows

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """All ranks', one after the other."""
        return cast(torch.Tensor, self.accelerator.gather(values))

    def _with_targets(self, batch: dict) -> dict:
        # A collator with `targets_later` leaves the teachers to this process: a worker has no GPU for them.
        if "samples" not in batch:
            return batch
        return self.data_collator.add_targets(batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        """The trainer's, of the rows alone: a collator adds one that is nobody's to a batch without images or rows,
        and what is predicted of it would shift all that follows. Dropped rows, which are logged, have no
        predictions."""
        batch = self._prepare_inputs(inputs)
        loss, logits, labels = super().prediction_step(model, batch, prediction_loss_only, ignore_keys)
        # Sequences of packed rows are none of these.
        if logits is None or "row_ids" not in batch or "position_ids" in batch:
            return loss, logits, labels
        num_rows = len(batch["row_ids"])
        # Metrics may ask for the rows' tokens, too, which transformers takes from what it gave.
        inputs["input_ids"] = batch["input_ids"][:num_rows]
        return loss, nested_truncate(logits, num_rows), nested_truncate(labels, num_rows)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
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
        found = torch.tensor([[0, 0], *map(report_bad_rows, batches)], device=device).sum(0, keepdim=True)
        bad, long = self._gather(found).sum(0).tolist()
        self._dropped.bad_rows += bad
        self._dropped.long_rows += long
        # Measured by the whole run's rows, not by those so far: one bad row in the first step is no reason to stop.
        rows = self.state.max_steps * self.get_total_train_batch_size(self.args)
        if isinstance(self.train_dataset, PackedRows):
            rows = round(rows * self.train_dataset.rows_per_sequence)
        if self.bad_rows > self.max_bad_rows * rows:
            share = f"max_bad_rows={self.max_bad_rows} of the run's {rows} rows"
            raise ValueError(
                f"stopped at step {self.state.global_step + 1}: {self.bad_rows} bad rows are over {share}"
            )

    def _attach_step_targets(self, batches: list[dict], device: torch.device) -> None:
        """Gives each micro-batch the contrastive columns of its step, its own first column and their number.

        Of two ranks with 3 images and 1 the columns are 4, and the second rank's image is column 3.
        """
        names = [task["name"] for task in self.tasks]
        # How many images each micro-batch has, the same for all tasks.
        sizes = [len(batch["targets"][names[0]]) for batch in batches]
        counts, dtypes = self._agree_on_targets(batches, sum(sizes), device)
        columns = {}
        for name in names:
            own = torch.cat([batch["targets"][name].to(device, dtypes[name]) for batch in batches])
            columns[name] = self._gather_columns(own, counts)
        # Where each micro-batch's own targets begin among them: the labels of the contrastive loss.
        offset = sum(counts[: self.accelerator.process_index])
        for batch, size in zip(batches, sizes, strict=True):
            batch["step_targets"] = {"columns": columns, "offset": offset, "num_images": sum(counts)}
            offset += size

    def _agree_on_targets(
        self, batches: list[dict], num_images: int, device: torch.device
    ) -> tuple[list[int], dict[str, torch.dtype]]:
        """How many images each rank has in this step, and in which type each task's targets are gathered: the one that
        they come in (the cache's), of which the loss makes float32."""
        names = [task["name"] for task in self.tasks]
        # A rank without an image doesn't know the targets' types: it takes the others'. One call gathers all.
        own = [num_images, *(_target_dtype(batches, name) for name in names)]
        by_rank = self._gather(torch.tensor([own], device=device))
        counts = by_rank[:, 0].tolist()
        places = by_rank[:, 1:].amax(0).tolist()
        return counts, {name: TARGET_DTYPES[place] for name, place in zip(names, places, strict=True)}

    def _gather_columns(self, own: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The targets (M, Q, E) of all ranks, which have `counts` of them, rank after rank."""
        if len(counts) == 1 or max(counts) == 0:
            return own
        # Gathering takes equally many rows of each rank: padded, and what is padding left out again.
        padded = self._gather(cast(torch.Tensor, self.accelerator.pad_across_processes(own)))
        parts = zip(padded.split(max(counts)), counts, strict=True)
        return torch.cat([rows[:count] for rows, count in parts])

    def add_embedding_losses(
        self, loss: torch.Tensor, outputs: Any, step: dict, targets: dict, parts: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The loss of the next tokens with those of all tasks. `outputs`: `predictions`, `logit_scales` and
        `word_embeddings`, as a model gives them; `parts`: takes what is logged."""
        # DDP averages gradients over ranks; all counts are global, so each rank's share counts in full.
        ranks = self.accelerator.num_processes
        for task in self.tasks:
            name = task["name"]
            # What is predicted, the same for all layers.
            task_targets = StepTargets.make(
                task,
                given=targets[name],
                columns=step["columns"][name],
                offset=step["offset"],
                num_images=step["num_images"],
                tables=outputs.word_embeddings.get(name, ()),
            )
            # In evaluation a loss always counts, so that evaluations of one run can be compared.
            weight = task["loss_weight"]
            if self.model.training:
                weight = self.loss_weight(task, self.state.global_step)
            for layer in task["layers"]:
                part = task_loss(
                    prediction_NQE=outputs.predictions[name][layer],
                    targets=task_targets,
                    logit_scale=outputs.logit_scales[name],
                    loss=task["loss"],
                    contrastive_weight=task["contrastive_weight"],
                )
                # A weight of 0 is no reason to skip it: every rank needs the same graph, and the log the loss.
                loss = loss + ranks * weight * part.total
                parts[f"loss/{name}/{layer}/{task['loss']}"] = ranks * part.distance.detach()
                parts[f"loss/{name}/{layer}/contrastive"] = ranks * part.contrastive.detach()
        return loss

    def record_losses(
        self,
        loss: torch.Tensor,
        parts: dict[str, torch.Tensor],
        row_ids: list[str] | None,
        num_tokens: int,
        num_images: int,
    ) -> None:
        """For the next log; in evaluation a text loss counts for its tokens, an embedding loss for its images.
        FloatingPointError, which names the rows, for a loss in training that isn't finite."""
        is_training = self.model.training
        if is_training and not torch.isfinite(loss):
            bad = [name for name, value in parts.items() if not torch.isfinite(value)]
            where = f"step {self.state.global_step + 1} on rank {self.accelerator.process_index}"
            raise FloatingPointError(f"non-finite loss at {where}: {', '.join(bad) or 'their sum'}; rows {row_ids}")
        for name, value in parts.items():
            if is_training:
                self._sums["train"][name] += value
                continue
            # The last batch may be short: a mean over batches would count its rows too much.
            count = num_images
            if name == "loss/ntp":
                count = num_tokens
            self._sums["eval"][name] += count * value
            self._counts["eval"][name] += count

    def loss_weight(self, task: dict, step: int) -> float:
        """A task's in the training step after `step` others."""
        share = self.losses_until
        if share is None:
            share = task["until"]
        is_over = share < 1 and step >= round(share * self.state.max_steps)
        if is_over:
            return 0.0
        return task["loss_weight"]

    def _add_means(self, metrics: dict, mode: str, prefix: str = "") -> None:
        # Taken out, so that the next log's begin anew.
        sums = self._sums[mode]
        counts = self._counts[mode]
        self._sums[mode] = defaultdict(float)
        self._counts[mode] = defaultdict(int)
        for name, value in sums.items():
            # A rank's part is times the number of ranks already, so the mean over ranks is their sum.
            total = cast(torch.Tensor, self.accelerator.reduce(value, "mean")).item()
            count = counts[name]
            if mode == "train":
                count = counts["steps"]
            mean = 0.0
            if count:
                mean = total / count
            metrics[prefix + name] = mean

    def _add_loss_weights(self, logs: dict) -> None:
        """Of tasks whose losses are off after a share of the steps."""
        last_step = self.state.max_steps - 1
        for task in self.tasks:
            if self.loss_weight(task, last_step) != task["loss_weight"]:
                logs[f"loss_weight/{task['name']}"] = self.loss_weight(task, self.state.global_step - 1)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            self._add_means(logs, "train")
            logs.update(vars(self._dropped))
            self._add_loss_weights(logs)
        super().log(logs, *args, **kwargs)

    def _prepare_inputs(self, inputs):
        # Evaluation's batches are without targets; training's have them since their step was collected.
        return super()._prepare_inputs(self._with_targets(inputs))

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        assert output.metrics is not None
        metrics = output.metrics
        self._add_means(metrics, "eval", f"{metric_key_prefix}_")
        # The loss is put together of these means: transformers' is the mean over batches, of which the last one may
        # be short.
        loss = metrics[f"{metric_key_prefix}_loss/ntp"]
        for task in self.tasks:
            for layer in task["layers"]:
                part = f"{metric_key_prefix}_loss/{task['name']}/{layer}"
                contrastive = task["contrastive_weight"] * metrics[f"{part}/contrastive"]
                loss += task["loss_weight"] * (metrics[f"{part}/{task['loss']}"] + contrastive)
        metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def _check_metrics(self, rows: Any) -> None:
        """ValueError for `compute_metrics` where a rank's last batch has fewer rows: its logits have another shape
        than the others', and can't be gathered."""
        ranks = self.accelerator.num_processes
        if self.compute_metrics is None or ranks == 1 or rows is None:
            return
        rows_at_once = self.args.eval_batch_size * ranks
        # Several sets by their names, as `evaluate` takes them.
        parts = [rows]
        if isinstance(rows, dict):
            parts = list(rows.values())
        for part in parts:
            if not isinstance(part, Sized) or len(part) % rows_at_once:
                remedy = f"evaluate on a multiple of {rows_at_once} rows, or on one process"
                raise ValueError(f"compute_metrics on {ranks} processes needs whole batches of all of them: {remedy}")

    def _get_dataloader(self, dataset, description, batch_size, **kwargs):
        if description == "Evaluation":
            self._check_metrics(dataset)
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


def check_collator(model: PreTrainedModel, collator: object) -> None:
    """ValueError for a collator that doesn't give the batches which the trainer and this model need."""
    needed = OlaVlmCollator
    if isinstance(base_of(model), AttachedPredictors):
        needed = AttachedCollator
    # A stand-in that says where its targets come from will do: benchmarks hand over batches of their own.
    is_stand_in = not isinstance(collator, OlaVlmCollator) and hasattr(collator, "target_sources")
    if not isinstance(collator, needed) and not is_stand_in:
        given = "none"
        if collator is not None:
            given = f"a {type(collator).__name__}"
        how = f"data_collator={needed.__name__}(processor, target_sources, model.config.tasks)"
        raise ValueError(
            f"this model trains on the batches of a {needed.__name__}, and data_collator is {given}: give {how}"
        )


def check_targets(collator: OlaVlmCollator, tasks: list[dict]) -> None:
    """ValueError for a task of which the collator gives no targets, or targets of another shape."""
    for task in tasks:
        name = task["name"]
        shape = collator.target_shapes.get(name)
        if name in collator.target_sources and shape == target_shape(task):
            continue
        lack = f"has no target_sources[{name!r}]"
        if name in collator.target_sources:
            lack = f"was made for targets {shape} of it, the model's are {target_shape(task)}"
            if shape is None:
                lack = "was made without it"
        how = f"data_collator={type(collator).__name__}(processor, target_sources, model.config.tasks)"
        raise ValueError(f"task {name!r} is trained, and data_collator {lack}: give {how}")


def _target_dtype(batches: list[dict], name: str) -> int:
    """The place in `TARGET_DTYPES` of the type of a task's targets; 0 if there are none."""
    places = [0]
    for batch in batches:
        targets = batch["targets"][name]
        if len(targets) > 0:
            places.append(TARGET_DTYPES.index(targets.dtype))
    return max(places)


def report_bad_rows(batch: dict) -> list[int]:
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
