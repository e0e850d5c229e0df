"""The embedding losses beside TRL's own loss: `SFTTrainer` on a model with attached predictors (`training.attach`).

TRL's trainer doesn't call a model's `forward`: it goes from the backbone to a head of its own, and what a model
predicts would be lost. So the states that predictors read are taken where the backbone gives them, in the same pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from trl.trainer.sft_trainer import SFTTrainer

from .attach import AttachedPredictors, image_layout, predictors_of, write_predictors
from .collator import IGNORE_INDEX
from .embedding_losses import EmbeddingLosses, base_of, check_collator
from .stages import find_part


class AttachedSFTTrainer(EmbeddingLosses, SFTTrainer):
    """TRL's `SFTTrainer`, with `loss/ntp` and `loss/<task>/<layer>/...` in its logs, as `OlaVlmTrainer` has them.

    Args:
        model: with predictors (`attach_predictors`) whose tasks have no task tokens, not wrapped by peft yet.
        args: TRL's `SFTConfig`, with `remove_unused_columns=False`, `max_length=None` and no packing: rows are made to
            batches by the collator, which has a `max_length` of its own.
        data_collator: an `AttachedCollator`.
        kwargs: `SFTTrainer`'s; with `peft_config` predictors and logit scales train beside the adapters.

    What is frozen before stays so. ValueError for what doesn't fit.
    """

    def __init__(self, model, args, data_collator, **kwargs):
        if not isinstance(model, AttachedPredictors) or not model.config.tasks:
            raise ValueError(f"{type(model).__name__} has no predictors: attach_predictors(model, tasks) before")
        if model.config.task_token_ids:
            raise ValueError("TRL's loss takes task tokens for words to learn: give tasks with num_task_tokens 0")
        if args.remove_unused_columns or args.packing or args.max_length is not None:
            needed = "remove_unused_columns=False, packing=False and max_length=None"
            raise ValueError(f"the collator makes batches of rows as they are: give an SFTConfig with {needed}")
        # Before TRL's own set-up, which would make a collator of its own.
        check_collator(model, data_collator)
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        self.set_tasks(model.config.tasks)
        # peft freezes all but its adapters, and its file has no place for predictors: they train in full.
        if self.has_adapters:
            for name, parameter in model.named_parameters():
                if find_part(name) in ("predictors", "logit_scales"):
                    parameter.requires_grad_(True)

    @property
    def has_adapters(self) -> bool:
        return self.base_model is not self.model

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        whole = map(self._with_targets, epoch_iterator)
        batches, num_items_in_batch = super().get_batch_samples(whole, num_batches, device)
        if batches:
            self._counts["train"]["steps"] += 1
            self._attach_step_targets(batches, device)
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        if "step_targets" not in inputs:
            # Evaluation, where no step is collected: the columns are those of the batch on all ranks.
            self._attach_step_targets([inputs], self.args.device)

        # What is for the embedding losses and the log, and no argument of the model's forward.
        step = inputs.pop("step_targets")
        targets = inputs.pop("targets", None)
        row_ids = inputs.pop("row_ids", None)
        owner = inputs.pop("image_owner", None)
        inputs.pop("bad_rows", None)
        inputs.pop("long_rows", None)

        # TRL's own loss, and the hidden states of the predictors' layers that it passes by.
        base = cast(Any, base_of(self.accelerator.unwrap_model(model)))
        layers = set()
        for task in self.tasks:
            layers.update(task["layers"])
        inputs["output_hidden_states"] = sorted(layers)
        with _first_states(base.base_model) as found:
            of_trl = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs_of_trl = None
        if return_outputs:
            loss, outputs_of_trl = of_trl
        else:
            loss = of_trl
        loss = cast(torch.Tensor, loss)

        # And the embedding losses beside it.
        parts = {"loss/ntp": loss.detach().clone()}
        layout = image_layout(owner, inputs["input_ids"], inputs["attention_mask"], base.config)
        outputs = SimpleNamespace(**base.distill(found[0], layout, self.word_ids))
        loss = self.add_embedding_losses(loss, outputs, step, targets, parts)
        # The first label is never predicted.
        num_tokens = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        self.record_losses(loss, parts, row_ids, num_tokens, step["num_images"])
        return (loss, outputs_of_trl) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            self._add_means(logs, "train")
            self._add_loss_weights(logs)
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # Adapters' files have no place for predictors.
        if self.has_adapters and self.args.should_save:
            folder = output_dir
            if folder is None:
                folder = self.args.output_dir
            # TRL names one.
            assert folder is not None
            write_predictors(predictors_of(self.base_model.state_dict()), self.base_model.config, folder)


@contextmanager
def _first_states(backbone: nn.Module) -> Iterator[list]:
    """A list that gets the hidden states of each pass through the backbone: the first one is the loss's."""
    found = []
    hook = backbone.register_forward_hook(lambda module, args, output: found.append(output.hidden_states))
    try:
        yield found
    finally:
        hook.remove()
