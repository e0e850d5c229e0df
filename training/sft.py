"""The embedding losses beside TRL's own loss: `SFTTrainer` on a model with attached predictors (`training.attach`).

TRL's trainer has a `forward` of its own, which goes from the backbone to the head, and what a model predicts would be
lost. So the states that predictors read are taken where the backbone gives them, and predictions are made of them
before that `forward` ends: what wraps the model (DDP, FSDP2) sees all of its parameters at work.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import make_dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, cast

import datasets
import torch
from transformers.utils.generic import ModelOutput
from trl.trainer.sft_trainer import SFTTrainer

from ..modeling_ola_vlm import from_inputs_on, inputs_kept, layers_of, states_kept
from .attach import AttachedPredictors, image_layout
from .embedding_losses import EmbeddingLosses, check_collator, report_bad_rows
from .rows import Rows, read_row
from .stages import find_part


class AttachedSFTTrainer(EmbeddingLosses, SFTTrainer):
    """TRL's `SFTTrainer`, with `loss/ntp` and `loss/<task>/<layer>/...` in its logs, as `OlaVlmTrainer` has them, and
    its `bad_rows` and `long_rows`, whose names are logged as they come.

    Args:
        model: with predictors (`attach_predictors`) whose tasks have no task tokens, not wrapped by peft yet.
        args: TRL's `SFTConfig`, with `remove_unused_columns=False`, `max_length=None` and no packing: rows are made to
            batches by the collator, which has a `max_length` of its own.
        data_collator: an `AttachedCollator`; with `drop_bad_rows=True` bad rows are left out, else the first one ends
            the run.
        image_folder: where the paths of images begin, below which they must lie.
        max_bad_rows: the share of the run's rows up to which bad ones are dropped; more of them end it.
        kwargs: `SFTTrainer`'s; with `peft_config` predictors and logit scales train beside the adapters. Rows of its
            data sets may have any form of `training.rows.read_row`.

    What is frozen before stays so. In mixed precision (`bf16`, which is TRL's default, or `fp16`) what trains becomes
    float32, in whatever type it was loaded, so that no update is lost to rounding. ValueError for what doesn't fit.
    """

    def __init__(self, model, args, data_collator, image_folder: str = ".", max_bad_rows: float = 0.01, **kwargs):
        if not isinstance(model, AttachedPredictors) or not model.config.tasks:
            raise ValueError(f"{type(model).__name__} has no predictors: attach_predictors(model, tasks) before")
        if model.config.task_token_ids:
            raise ValueError("TRL's loss takes task tokens for words to learn: give tasks with num_task_tokens 0")
        if args.remove_unused_columns or args.packing or args.max_length is not None:
            needed = "remove_unused_columns=False, packing=False and max_length=None"
            raise ValueError(f"the collator makes batches of rows as they are: give an SFTConfig with {needed}")
        if not args.average_tokens_across_devices:
            raise ValueError("losses are sums over all ranks' counts: give average_tokens_across_devices=True")
        # Before TRL's own set-up, which would make a collator of its own.
        check_collator(model, data_collator)
        self.image_folder = image_folder
        self.max_bad_rows = max_bad_rows
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        # peft freezes all but its adapters, and its file has no place for predictors: they train in full.
        if self.has_adapters:
            for name, parameter in model.named_parameters():
                if find_part(name) in ("predictors", "logit_scales"):
                    parameter.requires_grad_(True)
        self.prepare_weights()
        self.set_tasks(model.config.tasks)

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn, **kwargs):
        def find_sampler(rows):
            # Training's looks at the columns of TRL's own data set, such as lengths, which its rows no longer have.
            if description == "Training":
                rows = dataset
            return sampler_fn(rows)

        rows = self._read_rows(dataset)
        return super()._get_dataloader(rows, description, batch_size, sampler_fn=find_sampler, **kwargs)

    def _read_rows(self, data: Any) -> Any:
        """The collator's rows of data in TRL's forms, whose texts may be no lists of parts and have no id."""
        if isinstance(data, datasets.IterableDataset):
            rows = data.decode(enable=False)
            return rows.map(partial(read_row, image_folder=self.image_folder), with_indices=True)
        # A transform of the user's own makes of images what it likes.
        is_plain = isinstance(data, datasets.Dataset) and data.format["type"] is None
        if is_plain:
            data = UndecodedRows(data)
        return Rows(cast(Any, data), self.image_folder)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        if "step_targets" not in inputs:
            # Evaluation, where no step is collected: the columns are those of the batch on all ranks.
            self._attach_step_targets([inputs], self.args.device)
        if num_items_in_batch is None:
            # Nor does TRL count tokens there: each rank would divide by its own.
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        # The model takes it, and there are labels.
        assert num_items_in_batch is not None

        # What is for the embedding losses and the log, and no argument of the model's forward.
        step = inputs.pop("step_targets")
        targets = inputs.pop("targets", None)
        row_ids = inputs.pop("row_ids", None)
        owner = inputs.pop("image_owner", None)
        # Evaluation's; training's were taken out, and counted, as the step was collected.
        report_bad_rows(inputs)

        # TRL's own loss, and the predictions that it passes by.
        with self._predictions(inputs, owner) as predicted:
            of_trl = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs_of_trl = None
        if return_outputs:
            loss, outputs_of_trl = of_trl
        else:
            loss = of_trl
        loss = cast(torch.Tensor, loss)

        # And the embedding losses beside it.
        parts = {"loss/ntp": loss.detach().clone()}
        outputs = SimpleNamespace(**predicted)
        loss = self.add_embedding_losses(loss, outputs, step, targets, parts)
        self.record_losses(loss, parts, row_ids, int(num_items_in_batch), step["num_images"])
        return (loss, outputs_of_trl) if return_outputs else loss

    @contextmanager
    def _predictions(self, inputs: dict, owner: torch.Tensor) -> Iterator[dict]:
        """A dict that gets what the model predicts (`distill`) in the first pass through it, which is the loss's."""
        base = cast(Any, self.base_model)
        layout = image_layout(owner, inputs["input_ids"], inputs["attention_mask"], base.config)
        predicted: dict = {}

        def predict(module, args, output):
            if predicted:
                return output
            # A hook of the outermost module runs beside its autocast.
            with self.accelerator.autocast():
                predicted.update(base.distill(from_inputs_on(entered, states[0]), layout, self.word_ids))
            # DDP looks in the output for what has been at work.
            return _with_predictions(type(output))(**output, distilled=predicted)

        # Before FSDP2's own, which lets gathered weights go.
        hook = base.register_forward_hook(predict, prepend=True)
        try:
            with inputs_kept(base) as entered, states_kept(base, layers_of(self.tasks)) as states:
                yield predicted
        finally:
            hook.remove()


@cache
def _with_predictions(kind: type[ModelOutput]) -> type[ModelOutput]:
    """The class of a model's output with one more field: DDP makes outputs anew, of the fields that a class has."""
    return make_dataclass(kind.__name__, [("distilled", dict | None, None)], bases=(kind,))


class UndecodedRows(Sequence):
    """A data set's rows with images as they are stored: they are decoded where a damaged one can be dropped, in the
    collator. No copy of the data set is written, as `cast_column` would."""

    def __init__(self, data: datasets.Dataset):
        self.tables = data.with_format("arrow")

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, index: int) -> dict:
        return cast(Any, self.tables[index]).to_pylist()[0]
