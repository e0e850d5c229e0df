"""The fields of a run that OLA-VLM adds to transformers' `TrainingArguments`, by group. Nothing heavy is imported, so
that the command line knows them at once; `training.arguments.OlaVlmArguments` checks their values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

STAGE_NAMES = ("pretrain", "visual_pretrain", "finetune")
TASK_TOKENS = ("queries", "frozen", "trained")
STORAGE_NAMES = ("float32", "float16", "bfloat16", "int8")
DTYPE_NAMES = ("float32", "bfloat16", "float16", "auto")


def described(default, help: str, choices: Sequence[str] | None = None):
    """A field whose `help` is what the command line says of it; `choices`: all that it may be, but for None."""
    metadata: dict = {"help": help}
    if choices is not None:
        metadata["help"] = f"{help}: {', '.join(choices)}"
        metadata["choices"] = tuple(choices)
    return field(default=default, metadata=metadata)


@dataclass
class RunFields:
    stage: str = described("pretrain", "what trains, one of", STAGE_NAMES)
    embedding_losses: bool | None = described(None, "train predictors; by default in pretrain only")
    losses_until: float | None = described(
        None, "the share of the steps after which embedding losses are off; the tasks' `until` by default"
    )
    task_tokens: str | None = described(None, "rows of the vocabulary; the stage's by default, or one of", TASK_TOKENS)
    min_steps: int = described(0, "as many epochs as make this many steps, if num_train_epochs makes fewer")
    eval_data: str | None = described(
        None, "evaluate on the rows of this file or data set, or on a share of `data`, such as 0.02"
    )
    eval_questions: str | None = described(
        None, "a JSON file of questions about images, which each evaluation answers (docs/recipes.md)"
    )


@dataclass
class ModelFields:
    checkpoint: str | None = described(None, "start from this folder or name: one of ours or a plain LLaVA")
    vision_tower: str | None = described(None, "without a checkpoint: vision encoder, name or folder")
    language_model: str | None = described(None, "without a checkpoint: language model, name or folder")
    tokenizer: str | None = described(None, "name or folder; the language model's by default")
    tasks: list | str | None = described(
        None, "the task dicts of the configuration, in token order, as JSON; none is plain LLaVA"
    )
    model_overrides: dict | str | None = described(None, "more arguments of convert.parts.build_ola_vlm, as JSON")
    dtype: str = described(
        "float32",
        "of the weights as they are loaded, and saved in the end; with bf16 or fp16 what trains is float32 meanwhile; "
        "auto is bfloat16 and bf16 on a GPU, else float32",
        DTYPE_NAMES,
    )
    fusion: str | None = described(None, "the multi-encoder baseline, its encoders being `teachers`: feature or token")
    num_encoder_tokens: int = described(8, "tokens of each of its encoders, if fusion is token")


@dataclass
class DataFields:
    data: str | None = described(
        None, "a .json or .jsonl file (LLaVA's or TRL's rows), or a folder or name that `datasets` loads"
    )
    image_folder: str | None = described(None, "where image paths begin; the data's own folder by default")
    data_config: str | None = described(None, "the dataset's configuration, if `datasets` loads it")
    data_split: str = described("train", "the dataset's split, if `datasets` loads it")
    streaming: bool = described(False, "read a dataset as it comes; needs max_steps")
    max_length: int | None = described(None, "tokens of a row, image tokens included")
    on_long_rows: str = described("drop", "longer rows", ("drop", "truncate"))
    on_bad_rows: str = described("stop", "rows that can't be trained on, found before the run", ("stop", "drop"))
    check_images: bool = described(True, "open every image before the run, unless a target cache does it")
    max_bad_rows: float = described(0.01, "bad rows met in training are dropped up to this share of the run's rows")


@dataclass
class TeacherFields:
    teachers: dict | str | None = described(
        None,
        'task -> {"encoder": one of targets.encoders.ENCODERS, "path", more arguments of its from_pretrained}, '
        "as JSON",
    )
    target_cache: str | None = described(None, "folder of stored targets; teachers run in training if there is none")
    target_storage: str = described("float32", "numeric type in the cache", STORAGE_NAMES)
    target_fill: bool = described(False, "compute what the cache lacks as the run starts, else that is an error")
    standardize_targets: bool = described(
        False, "center and scale targets by the training images' statistics; needs target_cache"
    )
    shuffle_targets: bool = described(False, "the control: each image gets the targets of another one")


@dataclass
class AdapterFields:
    lora_rank: int = described(0, "train adapters of this rank and the projector (finetune); 0: all weights")
    lora_alpha: float | None = described(None, "their scale times the rank, twice the rank by default")
    lora_dropout: float = described(0.0, "of the adapters' input")
    load_in_4bit: bool = described(False, "QLoRA: the language model's blocks in 4 bits (bitsandbytes)")


GROUPS = {
    "run": RunFields,
    "model": ModelFields,
    "data": DataFields,
    "teachers": TeacherFields,
    "adapters": AdapterFields,
}
