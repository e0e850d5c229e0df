"""One rank of test_sft: torchrun ... sft_worker.py OUT_FOLDER, or with --sharded by accelerate launch."""

import sys
from pathlib import Path

import torch
from conftest import random_image
from datasets import Dataset
from peft import LoraConfig
from sharded_worker import shard_on_cpus
from test_sft import LAYERS, make_trainer
from training_helpers import losses, weights

from ola_vlm.training.sft import AttachedSFTTrainer

# Tokens of the answers of three rows: over two ranks one is left for the second batch.
ANSWERS = [2, 20, 5]


def rows_to_evaluate() -> Dataset:
    rows = []
    for i, length in enumerate(ANSWERS):
        question = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
        answer = [{"type": "text", "text": " ".join(["red"] * length)}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"row-{i}", "images": [random_image(i)], "messages": messages})
    return Dataset.from_list(rows)


def prepare(folder: Path, ranks: int, adapters: bool, **options) -> AttachedSFTTrainer:
    """The trainer of three steps of 4 rows; of the first of them the second of two ranks has no image."""
    peft_config = None
    if adapters:
        peft_config = LoraConfig(r=2, target_modules=LAYERS)
    return make_trainer(
        "qwen2_5_vl",
        folder,
        images=[1, 2, 0, 0] * 3,
        peft_config=peft_config,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=2 // ranks,
        **options,
    )


def eval_losses(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name.startswith("eval_loss")}


def run(out: Path, ranks: int, adapters: bool) -> None:
    name = f"{ranks}-{adapters}"
    trainer = prepare(out / name, ranks, adapters)
    # Before training: DDP must be set up nevertheless.
    evaluated = eval_losses(trainer.evaluate(rows_to_evaluate()))
    trainer.train()
    found = {"evaluated": evaluated, "losses": losses(trainer), "weights": weights(trainer.model)}
    torch.save(found, out / f"{name}-{trainer.args.process_index}.pt")


def run_sharded(out: Path, ranks: int, adapters: bool) -> None:
    """Saves the model in a folder, and losses beside it; and again resumed from the second step."""
    name = f"{ranks}-{adapters}"
    trainer = prepare(out / name, ranks, adapters, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate(rows_to_evaluate())
    if trainer.args.should_save:
        torch.save({"evaluated": eval_losses(metrics), "losses": losses(trainer)}, out / f"{name}.pt")
    resumed = prepare(out / f"{name}-resumed", ranks, adapters, seed=1)
    resumed.train(resume_from_checkpoint=str(out / name / "checkpoint-2"))
    resumed.save_model()


if __name__ == "__main__":
    run_kind = run
    if "--sharded" in sys.argv:
        shard_on_cpus()
        run_kind = run_sharded
    for adapters in (False, True):
        run_kind(Path(sys.argv[1]), ranks=2, adapters=adapters)
    torch.distributed.destroy_process_group()
