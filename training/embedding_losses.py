"""The embedding losses beside a trainer's own: what `OlaVlmTrainer` and TRL's `SFTTrainer` (training.sft) share.

One process, several ranks and accumulated micro-batches give the same losses and gradients: every sum over images is
divided by the image count of the whole optimizer step, and the contrastive columns are all targets of that step. They
are known before the step begins, so they are collected where the Trainer collects a step's micro-batches.
"""

from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel, ProcessorMixin, Trainer
from transformers.utils.import_utils import is_peft_available

from .attach import AttachedPredictors
from .collator import AttachedCollator, OlaVlmCollator
from .losses import StepTargets, task_loss
from .words import word_ids_of

# Numeric types of targets, the narrowest first, and that of words' numbers: on their way between ranks each is named
# by its place here.
TARGET_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32)


if TYPE_CHECKING:
    Mixed = Trainer
else:
    # Mixed into a trainer's class.
    Mixed = object


class EmbeddingLosses(Mixed):
    """Mixed into a trainer's class before it. The trainer's collator is ours; its `compute_loss` calls
    `add_embedding_losses` and `record_losses`, its `get_batch_samples` `_attach_step_targets`."""

    # What transformers leaves open.
    model: PreTrainedModel
    data_collator: OlaVlmCollator
    processing_class: ProcessorMixin

    # The share of the steps after which a loss is off, whatever its task says; None: what the task says.
    losses_until: float | None = None

    def set_tasks(self, tasks: list[dict]) -> None:
        """Those whose losses train, after the trainer's own set-up. ValueError for words without a source of words."""
        self.tasks = tasks
        self.word_ids = word_ids_of(tasks, self.data_collator.target_sources, self.processing_class)
        # Of the losses since the last log: their sums, each times what it counts, and the sums of what they count: a
        # step in training; tokens or images in evaluation.
        self._sums: dict[str, defaultdict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._counts: dict[str, defaultdict[str, Any]] = {"train": defaultdict(int), "eval": defaultdict(int)}

    @property
    def base_model(self) -> PreTrainedModel:
        """The model that is trained, inside its adapters if it has some."""
        return base_of(self.model)

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """All ranks', one after the other."""
        return cast(torch.Tensor, self.accelerator.gather(values))

    def _with_targets(self, batch: dict) -> dict:
        # A collator with `targets_later` leaves the teachers to this process: a worker has no GPU for them.
        if "samples" not in batch:
            return batch
        return self.data_collator.add_targets(batch)

    def _attach_step_targets(self, batches: list[dict], device: torch.device) -> None:
        """Gives each micro-batch the contrastive columns of its step, its own first column and their number.

        Columns are gathered in the type that the targets come in (the cache's): the loss makes float32 of them."""
        # How many images each micro-batch has, the same for all tasks, and in sum on each rank.
        names = [task["name"] for task in self.tasks]
        sizes = [len(batch["targets"][names[0]]) for batch in batches]
        # A rank without an image doesn't know the targets' type: it takes the others'.
        own = [sum(sizes), *(_target_dtype(batches, name) for name in names)]
        by_rank = self._gather(torch.tensor([own], device=device))
        counts = by_rank[:, 0].tolist()
        dtypes = [TARGET_DTYPES[place] for place in by_rank[:, 1:].amax(0).tolist()]

        # Each task's columns (M, Q, E): the targets of all ranks and micro-batches, rank after rank.
        columns = {}
        for name, dtype in zip(names, dtypes, strict=True):
            columns[name] = torch.cat([batch["targets"][name].to(device, dtype) for batch in batches])
            if len(counts) > 1 and max(counts) > 0:
                # Gathering takes equally many rows of each rank: padded, and what is padding left out again.
                padded = self._gather(cast(torch.Tensor, self.accelerator.pad_across_processes(columns[name])))
                parts = zip(padded.split(max(counts)), counts, strict=True)
                columns[name] = torch.cat([rows[:count] for rows, count in parts])

        # Where each micro-batch's own targets begin among them: the labels of the contrastive loss.
        offset = sum(counts[: self.accelerator.process_index])
        for batch, size in zip(batches, sizes, strict=True):
            batch["step_targets"] = {"columns": columns, "offset": offset, "num_images": sum(counts)}
            offset += size

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


def base_of(model: Any) -> PreTrainedModel:
    """The model inside a `PeftModel`; any other one is itself."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()  # pyright: ignore[reportReturnType] (its stub says a module)
    return model


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


def _target_dtype(batches: list[dict], name: str) -> int:
    """The place in `TARGET_DTYPES` of the type of a task's targets; 0 if there are none."""
    places = [0]
    for batch in batches:
        targets = batch["targets"][name]
        if len(targets) > 0:
            places.append(TARGET_DTYPES.index(targets.dtype))
    return max(places)
