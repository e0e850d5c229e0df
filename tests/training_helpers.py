"""A short training run on random rows, shared by the training tests and by the processes of test_distributed."""

import zlib

import torch
from conftest import random_rows
from transformers import TrainerCallback

from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.data import OlaVlmCollator
from ola_vlm.training.stages import apply_stage
from ola_vlm.training.trainer import OlaVlmTrainer

# Images of 16 rows: none, one and several; with 4 rows a rank or micro-batch, the second one has text only.
IMAGES = [1, 0, 2, 1, 0, 0, 0, 0, 1, 1, 0, 1, 3, 0, 0, 1]


def target_source(task: dict, value: float | None = None):
    """Random targets that depend on the image's content only (or a constant `value`)."""

    def source(images):
        shape = (task["target_length"], task["target_dim"])
        seeds = [zlib.crc32(image.tobytes()) for image in images]
        targets = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return targets if value is None else torch.full_like(targets, value)

    return source


def make_trainer(model, processor, output_dir, rows=None, sources=None, callbacks=(), **arguments) -> OlaVlmTrainer:
    defaults = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01, "logging_steps": 1}
    defaults |= {"lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = OlaVlmArguments(output_dir=str(output_dir), **(defaults | arguments))
    stage = apply_stage(model, args.stage)
    tasks = model.config.tasks if stage.embedding_losses else []
    if sources is None:
        sources = {task["name"]: target_source(task) for task in tasks}
    return OlaVlmTrainer(
        model,
        args,
        data_collator=OlaVlmCollator(processor, sources, tasks),
        train_dataset=random_rows(16, IMAGES) if rows is None else rows,
        processing_class=processor,
        callbacks=list(callbacks),
    )


def losses(trainer: OlaVlmTrainer) -> list[dict]:
    """The logged losses, step by step."""
    return [
        {name: value for name, value in entry.items() if name.startswith("loss")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Interrupt(TrainerCallback):
    """Kills a run in the middle of `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise KeyboardInterrupt
