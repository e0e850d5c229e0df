"""The arguments of a run: transformers' own, and what OLA-VLM adds."""

import json
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from ..targets.cache import STORAGE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class OlaVlmArguments(TrainingArguments):
    """`TrainingArguments` (all of them) plus the fields below; dicts and lists may be given as JSON strings.

    A run starts from `checkpoint` (a folder of ours, or a plain LLaVA), or builds its model from `vision_tower`,
    `language_model`, `tokenizer` (names or folders), `tasks` and `model_overrides` (arguments of `build_ola_vlm`).
    `tasks`: list of task dicts in token order; none is plain LLaVA. `teachers`: task -> {"encoder": a name in
    `targets.encoders.ENCODERS`, "path": name or folder, and more arguments of its `from_pretrained`}. `target_cache`:
    folder of stored targets, in the numeric type `target_storage` (a key of `targets.cache.STORAGE`); what it lacks is
    an error, or computed at the start of a run with `target_fill`.
    """

    stage: str = "pretrain"
    checkpoint: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None
    tokenizer: str | None = None
    tasks: list | str | None = None
    model_overrides: dict | str | None = None
    dtype: str = "float32"
    data: str | None = None
    image_folder: str | None = None
    max_length: int | None = None
    teachers: dict | str | None = None
    target_cache: str | None = None
    target_storage: str = "float32"
    target_fill: bool = False
    standardize_targets: bool = False
    shuffle_targets: bool = False
    # The trainer needs `targets` and `row_ids`, which are no arguments of the model's forward.
    remove_unused_columns: bool = False

    def __post_init__(self):
        for field in ("tasks", "model_overrides", "teachers"):
            if isinstance(value := getattr(self, field), str):
                setattr(self, field, json.loads(value))
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown: choose one of {list(DTYPES)}")
        if self.target_storage not in STORAGE:
            raise ValueError(f"target_storage {self.target_storage!r} is unknown: choose one of {list(STORAGE)}")
        if self.ddp_find_unused_parameters is None:
            # Every rank runs the same graph, even without an image. Only a trained tower has blocks that are skipped:
            # those after the layer whose features LLaVA takes.
            self.ddp_find_unused_parameters = self.stage == "visual_pretrain"
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
