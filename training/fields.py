"""The fields of a run that OLA-VLM adds to transformers' `TrainingArguments`, by group. Nothing heavy is imported, so
that the command line knows them at once; `training.arguments.OlaVlmArguments` checks their values.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# The keys of `training.stages.STAGES`, `targets.cache.STORAGE` and `training.arguments.DTYPES`, written again: those
# modules import torch.
STAGE_NAMES = ("pretrain", "visual_pretrain", "finetune")
# What task tokens' embeddings are: see `training.stages.Stage`.
TASK_TOKENS = ("queries", "frozen", "trained")
STORAGE_NAMES = ("float32", "float16", "bfloat16", "int8")
DTYPE_NAMES = ("float32", "bfloat16", "float16", "auto")


# The least and the greatest value of numbers, transformers' ones and ours; None: any. Checked at once: transformers
# would notice most of them only when the model is loaded.
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "per_device_train_batch_size": (1, None),
    "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "learning_rate": (0, None),
    "weight_decay": (0, None),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, None),
    "max_grad_norm": (0, None),
    "warmup_steps": (0, None),
    "neftune_noise_alpha": (0, None),
    # numpy takes seeds of 32 bits.
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "eval_accumulation_steps": (1, None),
    "dataloader_num_workers": (0, None),
    "dataloader_prefetch_factor": (1, None),
    "min_steps": (0, None),
    "num_encoder_tokens": (1, None),
    "image_side": (1, None),
    "max_length": (1, None),
    # A share of the run's rows.
    "max_bad_rows": (0, 1),
    "lora_rank": (0, None),
    "lora_dropout": (0, 1),
}


def check_bounds(name: str, value: object) -> None:
    """ValueError, which names the field, for a number that is out of its bounds or none at all."""
    # Texts and lists have no bounds; True is an int, too.
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    # Python reads "nan" and "inf" as numbers, too.
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: give a number")
    least, greatest = BOUNDS.get(name, (None, None))
    if least is not None and value < least:
        raise ValueError(f"{name} is {value:g}: give {least:g} or more")
    if greatest is not None and value > greatest:
        raise ValueError(f"{name} is {value:g}: give {greatest:g} or less")


# Fields that may be given as JSON -> what they hold, and how that is written.
JSON_FIELDS: dict[str, tuple[type, str]] = {
    "tasks": (list, '[{"name": "depth"}]'),
    "model_overrides": (dict, '{"resize_mode": "pad"}'),
    "teachers": (dict, '{"depth": {"encoder": "depth_anything", "path": "FOLDER"}}'),
    "image_options": (dict, '{"do_image_splitting": false}'),
}


def parse_json_field(name: str, value: object, kind: type, example: str) -> Any:
    """What a field holds that may be given as JSON; None for null. ValueError, which names the field, for no JSON and
    for something of another kind; it shows an `example`."""
    parsed = value
    # Words of a command line; recipes and files have the object itself.
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name} is {value!r:.60}, which is no JSON ({error}): write it as {example}") from error
    if parsed is not None and not isinstance(parsed, kind):
        raise ValueError(f"{name} is {parsed!r:.60}: write it as {example}")
    return parsed


def described(default, help: str, choices: Sequence[str] | None = None):
    """A field whose `help` is what the command line says of it; `choices`: all that it may be, but for None."""
    # Both parsers, transformers' and ours, read help and choices from here.
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
    task_tokens: str | None = described(
        None,
        "what task tokens are: means of the query tables (queries), or rows of the vocabulary, frozen or trained; the "
        "stage's by default, or one of",
        TASK_TOKENS,
    )
    min_steps: int = described(0, "as many epochs as make this many steps, if num_train_epochs makes fewer")
    eval_data: str | None = described(
        None, "evaluate on the rows of this file or data set, or on a share of `data`, such as 0.02"
    )
    eval_questions: str | None = described(
        None, "a JSON file of questions about images, which each evaluation answers (docs/recipes.md)"
    )


@dataclass
class ModelFields:
    checkpoint: str | None = described(
        None, "start from this folder or name: one of ours, or any image-text-to-text model of transformers"
    )
    trust_remote_code: bool = described(
        False, "run the code that comes with a checkpoint of a model which transformers doesn't have"
    )
    vision_tower: str | None = described(None, "without a checkpoint: vision encoder, name or folder")
    language_model: str | None = described(None, "without a checkpoint: language model, name or folder")
    tokenizer: str | None = described(None, "name or folder; the language model's by default")
    tasks: list | str | None = described(
        None,
        "the task dicts of the configuration, in token order, as JSON; none is plain LLaVA. With a checkpoint of "
        "another model, predictors are attached to it",
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
    image_square: bool | None = described(
        None, "of a model that isn't ours: pad its images to the square that teachers see; true by default"
    )
    image_side: int | None = described(None, "of a model that isn't ours: pixels to which that square is resized")
    image_options: dict | str | None = described(
        None, "of a model that isn't ours: arguments of its image processor in training, as JSON"
    )


@dataclass
class DataFields:
    data: str | None = described(
        None,
        "a .json or .jsonl file (LLaVA's or TRL's rows), a folder of images, or a folder or name that `datasets` "
        "loads",
    )
    image_folder: str | None = described(None, "where image paths begin; the data's own folder by default")
    data_config: str | None = described(None, "the dataset's configuration, if `datasets` loads it")
    data_split: str = described("train", "the dataset's split, if `datasets` loads it")
    eval_split: str | None = described(
        None,
        "the split of eval_data, if `datasets` loads it (train by default); to be given where eval_data and data are "
        "the same dataset",
    )
    streaming: bool = described(False, "read a dataset as it comes; needs max_steps")
    max_length: int | None = described(
        None, "tokens of a row, image tokens included; of a sequence, if rows are packed"
    )
    packing: bool = described(
        False, "put rows together into sequences of up to max_length tokens, which are what a batch then counts"
    )
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


# Title in a command's help -> its fields.
GROUPS = {
    "run": RunFields,
    "model": ModelFields,
    "data": DataFields,
    "teachers": TeacherFields,
    "adapters": AdapterFields,
}
