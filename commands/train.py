"""Train one stage: `ola-vlm train --recipe NAME [--any_field value]` (= `python train.py ...`).

    ola-vlm train --recipe miniature_pretrain --output_dir runs/mine
    ola-vlm train --recipe lora --checkpoint CHECKPOINT --data rows.json --output_dir runs/lora
    ola-vlm recipes llama3_vit_pretrain > my_run.yaml && ola-vlm train my_run.yaml --learning_rate 5e-4

A recipe (`ola-vlm recipes` lists them) or a run as a file sets fields; those on the command line come after. Besides
the fields below there are all of transformers' TrainingArguments (--help_all): --output_dir, --learning_rate,
--max_steps, --num_train_epochs, --per_device_train_batch_size, --gradient_accumulation_steps, --bf16, --save_steps,
--report_to, --resume_from_checkpoint true, ... The effective configuration goes to `output_dir/run.json`, model and
processor to `output_dir`.
"""

from .fields import FieldParser


def parser() -> FieldParser:
    return FieldParser("train", __doc__)
