"""`transformers.Trainer` plus the embedding losses.

One process, several ranks and accumulated micro-batches give the same losses and gradients: every sum over images is
divided by the image count of the whole optimiser step, and the contrastive columns are all targets of that step. They
are known before the step begins, so they are collected where the Trainer collects a step's micro-batches.
"""

from collections import defaultdict

import torch
from transformers import Trainer

from .losses import embedding_loss
from .stages import STAGES


class OlaVlmTrainer(Trainer):
    """Trains one stage (`args.stage`; apply it with `apply_stage` first).

    Logs `loss/ntp` and `loss/<task>/<layer>/{smooth_l1,contrastive}` beside `loss`: means over the optimiser steps
    since the last log and over ranks; `loss` = ntp + sum over tasks of loss_weight * sum over layers (smooth_l1 +
    contrastive_weight * contrastive).
    """

    def __init__(self, model, args, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        if args.n_gpu > 1:
            raise ValueError("several GPUs in one process are not supported: start with torchrun --nproc_per_node")
        if not args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices must stay true: losses are sums over all ranks' counts")
        self.stage = STAGES[args.stage]
        self.tasks = model.config.tasks if self.stage.embedding_losses else []
        # Sums of the logged losses, and the number of their "steps", since the last log.
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}

    def train(self, *args, **kwargs):
        if self.model_wrapped is self.model and self.model in self.accelerator._models:
            # An evaluation before training marks the bare model as prepared: it would never be wrapped for DDP, and
            # every rank would silently train on its own gradients.
            self.accelerator._models.remove(self.model)
            self.model._is_accelerate_prepared = False
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._sums["train"]["steps"] += 1
        if self.tasks and batches:
            self._attach_step_targets(batches, device)
        return batches, num_items_in_batch

    def _attach_step_targets(self, batches: list[dict], device: torch.device) -> None:
        """Gives each micro-batch the contrastive columns of its step, its own first column and their number."""
        columns, sizes = {}, [len(batch["pixel_values"]) for batch in batches]
        counts = self.accelerator.gather(torch.tensor([sum(sizes)], device=device)).tolist()
        for task in self.tasks:
            columns[task["name"]] = torch.cat([batch["targets"][task["name"]].to(device) for batch in batches])
            if len(counts) > 1 and max(counts) > 0:
                padded = self.accelerator.gather(self.accelerator.pad_across_processes(columns[task["name"]]))
                by_rank = zip(padded.split(max(counts)), counts, strict=True)
                columns[task["name"]] = torch.cat([rows[:count] for rows, count in by_rank])
        offset = sum(counts[: self.accelerator.process_index])
        for batch, size in zip(batches, sizes, strict=True):
            batch["step_targets"] = {"columns": columns, "offset": offset, "num_images": sum(counts)}
            offset += size

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        if self.tasks:
            if "step_targets" not in inputs:  # evaluation: the columns are those of the batch on all ranks
                self._attach_step_targets([inputs], self.args.device)
            inputs["output_predictions"] = True
        step, targets, row_ids = (inputs.pop(key, None) for key in ("step_targets", "targets", "row_ids"))
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # DDP averages gradients over ranks; all counts are global, so each rank's share counts in full.
        ranks = self.accelerator.num_processes
        parts = {"loss/ntp": loss.detach().clone()}
        for task in self.tasks:
            name, weight = task["name"], task["contrastive_weight"]
            columns = step["columns"][name], step["offset"], step["num_images"]
            for layer in task["layers"]:
                prediction, logit_scale = outputs.predictions[name][layer], outputs.logit_scales[name]
                part = embedding_loss(prediction, targets[name], logit_scale, weight, *columns)
                loss = loss + ranks * task["loss_weight"] * part.total
                parts[f"loss/{name}/{layer}/smooth_l1"] = ranks * part.smooth_l1.detach()
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

    def _add_means(self, metrics: dict, mode: str, prefix: str = "") -> None:
        sums, self._sums[mode] = self._sums[mode], defaultdict(float)
        steps = sums.pop("steps", 0)
        for name, value in sums.items():
            metrics[prefix + name] = self.accelerator.reduce(value, "mean").item() / steps

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            self._add_means(logs, "train")
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._add_means(output.metrics, "eval", f"{metric_key_prefix}_")
        return output

    def get_decay_parameter_names(self, model):
        """Frozen task tokens are rows of the vocabulary's tables, and weight decay would move them: tables never decay
        (with or without task tokens, so that methods stay comparable)."""
        tables = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        names = {name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in tables}
        return [name for name in super().get_decay_parameter_names(model) if name not in names]

    def save_model(self, *args, **kwargs):
        """In pre-training every saved checkpoint carries the task tokens as vocabulary rows: it is a plain model."""
        if self.stage.task_tokens == "queries":
            self.accelerator.unwrap_model(self.model).write_task_tokens()
        super().save_model(*args, **kwargs)
