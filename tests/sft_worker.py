"""One rank of test_sft: torchrun ... sft_worker.py OUT_FOLDER."""

import sys
from pathlib import Path

import torch
from conftest import random_image
from datasets import Dataset
from peft import LoraConfig
from test_sft import LAYERS, make_trainer
from training_helpers import losses, weights

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


def run(out: Path, ranks: int, adapters: bool) -> None:
    """Evaluates, and then trains three steps of 4 rows; of the first of them the second of two ranks has no image."""
    peft_config = None
    if adapters:
        peft_config = LoraConfig(r=2, target_modules=LAYERS)
    name = f"{ranks}-{adapters}"
    trainer = make_trainer(
        "qwen2_5_vl",
        out / name,
        images=[1, 2, 0, 0] * 3,
        peft_config=peft_config,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=2 // ranks,
    )
    # Before training: DDP must be set up nevertheless.
    metrics = trainer.evaluate(rows_to_evaluate())
    evaluated = {key: value for key, value in metrics.items() if key.startswith("eval_loss")}
    trainer.train()
    found = {"evaluated": evaluated, "losses": losses(trainer), "weights": weights(trainer.model)}
    torch.save(found, out / f"{name}-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    for adapters in (False, True):
        run(Path(sys.argv[1]), ranks=2, adapters=adapters)
    torch.distributed.destroy_process_group()
