"""What a run saves, and goes on from: checkpoints hold the whole model, whatever shards it, and the predictors, also
where they train beside adapters. `OlaVlmTrainer` and TRL's `SFTTrainer` (training.sft) share it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils.import_utils import is_peft_available

from .attach import AttachedPredictors, load_predictors, predictors_of, write_predictors
from .sharding import (
    configure_fsdp2,
    gather_optimizer,
    gather_whole,
    load_optimizer,
    original_class,
    retie,
    takes_whole_weights,
)
from .stages import upcast_trained

if TYPE_CHECKING:
    Mixed = Trainer
else:
    # Mixed into a trainer's class.
    Mixed = object


class WholeCheckpoints(Mixed):
    """Mixed into a trainer's class before it; the trainer's `__init__` calls `prepare_weights`."""

    # What transformers leaves open.
    model: PreTrainedModel
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    # Those whose losses train.
    tasks: list[dict]

    def prepare_weights(self) -> None:
        """After the trainer's own set-up, when it is known what trains: in mixed precision that becomes float32, and
        FSDP2 gets the settings that depend on the model. ValueError for those of FSDP that aren't supported."""
        # DeepSpeed keeps float32 copies of its own.
        if (self.args.bf16 or self.args.fp16) and not self.is_deepspeed_enabled:
            upcast_trained(self.model)
        if self.is_fsdp_enabled:
            assert self.accelerator.state.fsdp_plugin is not None
            configure_fsdp2(self.accelerator.state.fsdp_plugin, self.model)

    @property
    def base_model(self) -> PreTrainedModel:
        """The model that is trained, inside its adapters if it has some."""
        return base_of(self.model)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters train: `lora_rank`'s, or others, which a program has put on the model."""
        return self.base_model is not self.model

    @property
    def has_predictors_beside_adapters(self) -> bool:
        """Whether predictors train beside adapters, whose file has no place for them."""
        return self.has_adapters and len(self.tasks) > 0

    @property
    def is_sharded(self) -> bool:
        """Whether weights may be spread over ranks: a checkpoint's are gathered, the model's own are shards."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

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

    def _save(self, output_dir=None, state_dict=None):
        """`state_dict`: the gathered weights of a sharded run, which the first rank alone has."""
        if output_dir is None:
            output_dir = self.args.output_dir
        if state_dict is not None:
            retie(self.model, state_dict)
        # An adapter's file has no place for them. All ranks gather them, whoever writes.
        beside = {}
        if self.has_predictors_beside_adapters:
            beside = self._whole_predictors(state_dict)
        with original_class(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            # TRL's arguments name a folder if the program doesn't.
            assert output_dir is not None
            write_predictors(beside, self.base_model.config, output_dir)

    def _whole_predictors(self, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Those of the model inside the adapters, by their names in it. A sharded model's own are shards: they come
        from `state_dict`, the gathered weights, on the rank that has them."""
        base = self.base_model
        if not self.is_sharded:
            return predictors_of(base.state_dict())
        if state_dict == {}:
            # Another rank's; or DeepSpeed was told to gather nothing, and transformers says where its weights are.
            return {}
        # "base_model.model" in a model with LoRA.
        place = next(name for name, module in self.model.named_modules() if module is base)
        weights = {name.removeprefix(f"{place}."): value for name, value in (state_dict or {}).items()}
        own = predictors_of(weights)
        if self.is_deepspeed_enabled:
            # Beside adapters transformers has ZeRO-3 gather what trains, and no frozen query tables.
            frozen: dict[str, torch.Tensor] = {}
            for name, parameter in base.named_parameters():
                if not parameter.requires_grad:
                    frozen[name] = parameter
            own.update(gather_whole(predictors_of(frozen)))
        return own

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
        """A foreign model's checkpoint has its own names for weights, and the predictors in a file of their own."""
        with self._reads_as_unsharded():
            if isinstance(self.model, AttachedPredictors):
                self.model.load_checkpoint(resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                if self.has_predictors_beside_adapters:
                    load_predictors(self.base_model, resume_from_checkpoint)

    def _load_best_model(self):
        folder = self.state.best_model_checkpoint
        assert folder is not None
        if self.is_deepspeed_enabled:
            # From files of its own, which hold all that trains, predictors, too.
            super()._load_best_model()
            return
        with self._reads_as_unsharded():
            if isinstance(self.model, AttachedPredictors):
                self.model.load_checkpoint(folder)
            else:
                super()._load_best_model()
                if self.has_predictors_beside_adapters:
                    load_predictors(self.base_model, folder)

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


def base_of(model: Any) -> PreTrainedModel:
    """The model inside a `PeftModel`; any other one is itself."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()  # pyright: ignore[reportReturnType] (its stub says a module)
    return model
