"""Fine-tuning on data of your own by adapters; docs/finetune.md. Give `--checkpoint` and `--data`.

Rank and learning rate are LLaVA-1.5's for LoRA, without its second learning rate of the projector. Its batch of 128 is
for 665,000 rows: 16 rows a step and at least 100 steps let a few rows teach, too. Nothing of it is the paper's.
"""

from .paper import SCHEDULE
from .tables import Run, Table

LORA = {
    **SCHEDULE,
    "stage": "finetune",
    "output_dir": "runs/lora/finetune",
    "lora_rank": 128,
    # One epoch, or as many as make 100 steps.
    "num_train_epochs": 1,
    "min_steps": 100,
    # Rows are few: those of the last, smaller batch count, too.
    "dataloader_drop_last": False,
    # 16 bits on a GPU, where adapters train in float32.
    "dtype": "auto",
    "activation_checkpointing": True,
    "max_length": 2048,
    "on_long_rows": "truncate",
    "learning_rate": 2e-4,
    # 16 rows a step on one device.
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "save_total_limit": 2,
}
TABLE = Table(
    "Adapters on a checkpoint and rows of your own (give --checkpoint and --data); qlora: the LLM's blocks in 4 bits.",
    runs=[
        Run("lora", None, {"finetune": LORA}, stage_in_name=False),
        Run("qlora", "lora", {"finetune": {"load_in_4bit": True}}, stage_in_name=False),
    ],
)
