"""One rank of test_distributed: torchrun ... distributed_worker.py PARTS_FOLDER OUT_FOLDER."""

import sys
from pathlib import Path

import torch
from conftest import random_rows, tiny_tasks
from training_helpers import IMAGES, losses, make_trainer, weights

from ola_vlm.convert.parts import build_ola_vlm

RUNS = [("pretrain", 1), ("pretrain", 2), ("finetune", 1)]  # stage, accumulated micro-batches


def run(parts: Path, out: Path, stage: str, ranks: int, accumulation: int):
    """Three SGD steps on 8 rows each, however they are split; saves losses and weights."""
    torch.manual_seed(0)
    model, processor = build_ola_vlm(str(parts / "vision_tower"), str(parts / "language_model"), tasks=tiny_tasks())
    trainer = make_trainer(
        model,
        processor,
        out,
        rows=random_rows(16, IMAGES),
        stage=stage,
        max_steps=3,
        per_device_train_batch_size=8 // ranks // accumulation,
        per_device_eval_batch_size=8 // ranks,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        train_sampling_strategy="sequential",
    )
    metrics = trainer.evaluate(trainer.train_dataset[:8])  # before training: DDP must be set up nevertheless
    trainer.train()
    if trainer.args.should_save:
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval_loss")}
        results = {"losses": losses(trainer), "weights": weights(model), "eval": evaluated}
        torch.save(results, out / f"{stage}-{accumulation}.pt")


if __name__ == "__main__":
    for stage, accumulation in RUNS:
        run(Path(sys.argv[1]), Path(sys.argv[2]), stage, ranks=2, accumulation=accumulation)
    torch.distributed.destroy_process_group()
