"""The arguments of a run: transformers' own, and what OLA-VLM adds."""

import json
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class OlaVlmArguments(TrainingArguments):
    """`TrainingArguments` (all of them) plus the fields below; dicts and lists may be given as JSON strings.

    A run starts from `checkpoint` (a folder of ours, or a plain LLaVA), or builds its model from `vision_tower`,
    `language_model`, `tokenizer` (names or folders), `tasks` and `model_overrides` (arguments of `build_ola_vlm`).
    `tasks`: list of task dicts in token order; none is plain LLaVA. `teachers`: task -> {"encoder": a name in
    `targets.encoders.ENCODERS`, "path": name or folder, and more arguments of its `from_pretrained`}.

    `data`: a .json or .jsonl file (LLaVA's or TRL's rows), or a folder or name that `datasets` loads (`data_config`,
    `data_split`; `streaming` needs `max_steps`). Rows longer than `max_length` are dropped, or truncated if
    `on_long_rows` is "truncate". Bad rows at the start stop the run, or are dropped if `on_bad_rows` is "drop"; those
    met in training are dropped and counted until they are over `max_bad_rows`, a share of the run's rows.
    `train_sampling_strategy="group_by_length"` also groups by modality (`training.data.GroupedSampler`).
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
    data_config: str | None = None
    data_split: str = "train"
    streaming: bool = False
    image_folder: str | None = None
    max_length: int | None = None
    on_long_rows: str = "drop"
    on_bad_rows: str = "stop"
    max_bad_rows: float = 0.01
    teachers: dict | str | None = None
    target_cache: str | None = None
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
        for field, choices in {"on_long_rows": ("drop", "truncate"), "on_bad_rows": ("stop", "drop")}.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} {getattr(self, field)!r} is unknown: choose one of {choices}")
        if self.streaming:
            # Each rank reads the stream; handed out by the first one, rows of other ranks would lose their images.
            self.accelerator_config = self.accelerator_config or {"dispatch_batches": False}
        if self.ddp_find_unused_parameters is None:
            # Every rank runs the same graph, even without an image. Only a trained tower has blocks that are skipped:
            # those after the layer whose features LLaVA takes.
            self.ddp_find_unused_parameters = self.stage == "visual_pretrain"
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
