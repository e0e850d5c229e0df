"""The arguments of a run: transformers' own, and what OLA-VLM adds."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import IntervalStrategy, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .fields import (
    JSON_FIELDS,
    AdapterFields,
    DataFields,
    ModelFields,
    RunFields,
    TeacherFields,
    check_bounds,
    parse_json_field,
)
from .rows import Rows, StreamRows, has_one_split, load_rows
from .stages import find_stage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_DATA = (
    "no data: give --recipe NAME (`ola-vlm recipes` lists all), or data: rows as JSON (LLaVA's format), a Hugging "
    "Face dataset or a folder of images"
)
NOTHING_TO_EVALUATE = (
    "there is nothing to evaluate on, give eval_data, a file of rows or a share of the data such as 0.02"
)
# Fields of transformers that can't have another value here: -> (the value, why).
FIXED = {
    "label_smoothing_factor": (0.0, "transformers' smoothed loss counts tokens that are never emitted"),
    "average_tokens_across_devices": (True, "losses are sums over all ranks' counts"),
    "remove_unused_columns": (False, "the rows' columns are no arguments of the model's forward"),
    "auto_find_batch_size": (False, "a run is known by the rows of its steps, which would change within it"),
    "batch_eval_metrics": (False, "an evaluation gives losses and answers, no metrics of logits"),
    "use_liger_kernel": (False, "its kernels take the place of the forward that makes predictions and losses"),
}


@dataclass
class OlaVlmArguments(RunFields, ModelFields, DataFields, TeacherFields, AdapterFields, TrainingArguments):
    """`TrainingArguments` (all of them) plus the fields of `training.fields`; dicts and lists may be given as JSON
    strings."""

    # The trainer needs `targets` and `row_ids`, which are no arguments of the model's forward.
    remove_unused_columns: bool = False

    # What `__post_init__` leaves of fields that may be given in another form.
    if TYPE_CHECKING:
        output_dir: str = ""
        num_train_epochs: Any = 3.0
        tasks: list[dict] | None = None
        model_overrides: dict | None = None
        image_options: dict | None = None
        teachers: dict[str, dict] | None = None

    def __post_init__(self):
        # Each field for itself, then those that must fit together: a mistake costs no loading.
        for one in fields(self):
            check_bounds(one.name, getattr(self, one.name))
        self._parse_json_fields()
        find_stage(self.stage, self.embedding_losses, self.task_tokens)
        self._choose_dtype()
        self._check_choices()
        self._check_fixed_fields()
        self._check_targets()
        self._check_adapters()
        self._check_view()
        self._check_stream()
        self._check_packing()
        # What one field says of others, before transformers draws its own conclusions.
        self._set_loading()
        self._set_evaluation()
        self._set_resuming()
        super().__post_init__()
        # And what is known only after it.
        self._check_length()

    def _parse_json_fields(self) -> None:
        for name, (kind, example) in JSON_FIELDS.items():
            setattr(self, name, parse_json_field(name, getattr(self, name), kind, example))
        # Only the form is looked at here: `targets.fill` knows which teachers there are.
        for name, entry in (self.teachers or {}).items():
            if not isinstance(entry, dict):
                raise ValueError(f"teachers[{name!r}] is {entry!r:.60}: write it as {JSON_FIELDS['teachers'][1]}")
        # The name that it had before, in run files that are still around.
        if self.model_overrides and "geometry" in self.model_overrides:
            self.model_overrides["resize_mode"] = self.model_overrides.pop("geometry")

    def _choose_dtype(self) -> None:
        if self.dtype != "auto":
            return
        on_gpu = torch.accelerator.is_available() and not self.use_cpu
        if not on_gpu:
            self.dtype = "float32"
            return
        self.dtype = "bfloat16"
        # Who asks for fp16 keeps it: transformers refuses both.
        if not self.fp16:
            self.bf16 = True

    def _check_choices(self) -> None:
        """Of transformers' own fields, too, which it looks at as the trainer is made."""
        for one in fields(self):
            value = getattr(self, one.name)
            choices = one.metadata.get("choices")
            # A field whose default is None may be None: nobody has set it.
            if choices and value not in choices and not (value is None and one.default is None):
                raise ValueError(f"{one.name} {value!r} is unknown: choose one of {list(choices)}")

    def _check_fixed_fields(self) -> None:
        for name, (value, reason) in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must stay {str(value).lower()}: {reason}")

    def _check_targets(self) -> None:
        if self.standardize_targets and not self.target_cache:
            raise ValueError("standardize_targets takes its statistics from stored targets: give target_cache, too")
        if self.losses_until is not None and not 0 < self.losses_until <= 1:
            raise ValueError(f"losses_until is {self.losses_until}: a share is more than 0 and at most 1")
        if self.fusion and self.tasks:
            raise ValueError("the multi-encoder baseline distils nothing: give either fusion or tasks")

    def _check_adapters(self) -> None:
        # Adapters train in place of the language model, which pretrain freezes and visual_pretrain trains in full.
        if self.lora_rank and (self.stage != "finetune" or self.task_tokens == "queries"):
            what = 'adapters (lora_rank) are for stage finetune, and query tables (task_tokens "queries")'
            raise ValueError(f"{what} for a run without them")
        if self.load_in_4bit and not (self.lora_rank and self.checkpoint):
            raise ValueError("load_in_4bit is for adapters on a checkpoint: give lora_rank and checkpoint")

    def _check_view(self) -> None:
        # Without the square, images have sides of their own.
        if self.image_side is not None and self.image_square is False:
            raise ValueError(f"image_side is {self.image_side}, of a square: leave it out, or image_square")

    def _check_stream(self) -> None:
        if not self.streaming:
            return
        # These need all rows before the run.
        wrong = [name for name in ("target_cache", "target_fill", "shuffle_targets") if getattr(self, name)]
        if self.train_sampling_strategy == "group_by_length":
            wrong.append("train_sampling_strategy")
        if wrong:
            reason = "a stream has no target cache, and its rows aren't known in advance"
            raise ValueError(f"{reason}: leave out {', '.join(wrong)}, or set streaming=false")
        if self.max_steps <= 0:
            raise ValueError("a stream has no end: give max_steps")

    def _check_packing(self) -> None:
        if not self.packing:
            return
        if self.streaming:
            raise ValueError("packing needs to know how long rows are, and a stream doesn't tell: set packing=false")
        if self.max_length is None:
            raise ValueError("packing fills sequences of max_length tokens: give max_length")
        if self.train_sampling_strategy != "random":
            reason = "packed sequences are about equally long, and in no order of the data"
            strategy = f"train_sampling_strategy={self.train_sampling_strategy}"
            raise ValueError(f"{strategy} and packing exclude each other, {reason}: leave one of them out")

    def _set_loading(self) -> None:
        if self.streaming and not self.accelerator_config:
            # Each rank reads the stream; handed out by the first one, rows of other ranks would lose their images.
            self.accelerator_config = {"dispatch_batches": False}
        if self.ddp_find_unused_parameters is None:
            # Every rank runs the same graph, even without an image. Only a trained tower has blocks that are skipped:
            # those after the layer whose features LLaVA takes.
            self.ddp_find_unused_parameters = self.stage == "visual_pretrain"
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()

    def _set_evaluation(self) -> None:
        """What `eval_data` calls for where nothing else is said."""
        share = self.eval_share
        if share is not None and not 0 < share < 1:
            raise ValueError(f"eval_data {self.eval_data}: a share is more than 0 and less than 1")
        if share is not None and self.streaming:
            raise ValueError("eval_data: no share can be split off a stream; give a file of rows")
        has_splits = bool(self.eval_data) and share is None and not has_one_split(self.eval_data)
        if self.eval_split and not has_splits:
            raise ValueError(f"eval_split is for data sets, which have splits: eval_data is {self.eval_data}")
        if self.eval_data and self.eval_data == self.data and self.eval_split in (None, self.data_split):
            remedy = "give other rows, or a share such as 0.02"
            if has_splits:
                remedy = "name another split of it (eval_split), or give a share such as 0.02"
            raise ValueError(f"eval_data {self.eval_data} is the data of the run itself: {remedy}")
        if (
            self.load_best_model_at_end
            and not self.eval_data
            and IntervalStrategy(self.eval_strategy) == IntervalStrategy.NO
        ):
            raise ValueError(f"load_best_model_at_end: {NOTHING_TO_EVALUATE}")
        # Data to evaluate on are there to be used: transformers' own default is never to evaluate.
        if self.eval_data and IntervalStrategy(self.eval_strategy) == IntervalStrategy.NO:
            # An epoch's end is the end of training, too; the best checkpoint is one of those that are saved.
            self.eval_strategy = "epoch"
            # But for those of "best", which are saved at evaluations, whenever these are.
            if self.load_best_model_at_end and SaveStrategy(self.save_strategy) != SaveStrategy.BEST:
                self.eval_strategy = self.save_strategy
            self.eval_steps = self.eval_steps or self.save_steps
        if self.load_best_model_at_end and SaveStrategy(self.save_strategy) == SaveStrategy.NO:
            raise ValueError("load_best_model_at_end: no checkpoint is saved that it could load, set save_strategy")
        # "best" needs a measure, and transformers has no default for it here.
        if self.eval_data and SaveStrategy(self.save_strategy) == SaveStrategy.BEST:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if self.metric_for_best_model and self.greater_is_better is None:
            # transformers looks at the name's end, and ours are loss/ntp, loss/depth/8/smooth_l1.
            self.greater_is_better = not self.metric_for_best_model.removeprefix("eval_").startswith("loss")

    def _set_resuming(self) -> None:
        """`resume_from_checkpoint` is "true", a folder, or None; "false" would be taken for a folder's name."""
        # On the command line it is text, in a program it may be True.
        answer = str(self.resume_from_checkpoint or "false").lower()
        if answer == "true":
            self.resume_from_checkpoint = "true"
        elif answer in ("none", "false"):
            self.resume_from_checkpoint = None

    def _check_length(self) -> None:
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            steps = f"max_steps {self.max_steps} and num_train_epochs {self.num_train_epochs:g}"
            raise ValueError(f"{steps} train nothing: give more than 0 of one of them")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def rows_per_step(self) -> int:
        """Of an optimizer step: all processes' and micro-batches'."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def eval_share(self) -> float | None:
        """`eval_data` as a share of `data`; None if it is none."""
        if self.eval_data is None:
            return None
        try:
            return float(self.eval_data)
        except ValueError:
            # The name of a file or a data set.
            return None

    def split_eval_rows(self, rows: Rows | StreamRows) -> tuple[Rows | StreamRows, Rows | StreamRows | None]:
        """The rows to train on, and those of `eval_data`: None, a share of these, or others."""
        if self.eval_data is None:
            return rows, None
        if self.eval_share is not None:
            # No share of a stream: `_set_evaluation`.
            assert isinstance(rows, Rows)
            return rows.split_by_image(self.eval_share, self.seed)
        # Other rows, whose image paths begin in the run's `image_folder`, too, if one is given. A configuration is one
        # of its data set.
        config = None
        if self.eval_data == self.data:
            config = self.data_config
        return rows, load_rows(self.eval_data, self.image_folder, config, self.eval_split or "train")

    def load_rows(self) -> Rows | StreamRows:
        """The rows of `data`; a stream's are shuffled unless `train_sampling_strategy` is "sequential"."""
        if self.data is None:
            raise ValueError(NO_DATA)
        shuffle_seed = self.seed
        if self.data_seed is not None:
            shuffle_seed = self.data_seed
        if self.train_sampling_strategy == "sequential":
            shuffle_seed = None
        return load_rows(
            self.data,
            self.image_folder,
            self.data_config,
            self.data_split,
            self.streaming,
            shuffle_seed=shuffle_seed,
        )
