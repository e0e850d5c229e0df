"""A short training run on random rows, shared by the training tests and by the processes of test_distributed."""

import json
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from conftest import random_image, random_rows
from transformers import TrainerCallback

from ola_vlm.configuration_ola_vlm import target_shape
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.lora import add_adapters
from ola_vlm.training.stages import apply_stage
from ola_vlm.training.trainer import OlaVlmTrainer
from ola_vlm.training.words import WordSource

# Images of 16 rows: none, one and several; with 4 rows a rank or micro-batch, the second one has text only.
IMAGES = [1, 0, 2, 1, 0, 0, 0, 0, 1, 1, 0, 1, 3, 0, 0, 1]

# Of the tests' tokenizer; one of them has two tokens.
TEST_WORDS = {"class": ["red", "green", "blue cube"], "depth": ["near", "far"]}


def target_source(task: dict, value: float | None = None):
    """Random targets that depend on the image's content only (or a constant `value`)."""

    def source(images):
        shape = target_shape(task)
        seeds = [zlib.crc32(image.tobytes()) for image in images]
        targets = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return targets if value is None else torch.full_like(targets, value)

    if task["target"] == "words":
        return WordSource(TEST_WORDS, {kind: partial(random_words, kind) for kind in task["words"]})
    return source


def random_words(kind: str, images: list, length: int = 16) -> torch.Tensor:
    """Numbers of words of `TEST_WORDS` that depend on the image's content only (N, length, 1)."""
    numbers = []
    for image in images:
        generator = torch.Generator().manual_seed(zlib.crc32(image.tobytes()) + len(kind))
        numbers.append(torch.randint(len(TEST_WORDS[kind]), (length, 1), generator=generator).float())
    return torch.stack(numbers)


def make_trainer(
    model, processor, output_dir, rows=None, sources=None, callbacks=(), drop_bad_rows=False, **arguments
) -> OlaVlmTrainer:
    defaults = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01, "logging_steps": 1}
    defaults |= {"lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = OlaVlmArguments(output_dir=str(output_dir), **(defaults | arguments))
    stage = apply_stage(model, args.stage, args.embedding_losses, args.task_tokens)
    tasks = model.config.tasks if stage.embedding_losses else []
    if args.lora_rank:
        model = add_adapters(model, args)
    if sources is None:
        sources = {task["name"]: target_source(task) for task in tasks}
    return OlaVlmTrainer(
        model,
        args,
        data_collator=OlaVlmCollator(processor, sources, tasks, drop_bad_rows=drop_bad_rows),
        train_dataset=random_rows(16, IMAGES) if rows is None else rows,
        eval_dataset=random_rows(8, IMAGES[:8]),
        processing_class=processor,
        callbacks=list(callbacks),
    )


def losses(trainer: OlaVlmTrainer) -> list[dict]:
    """The logged losses, step by step."""
    return [
        {name: value for name, value in entry.items() if name.startswith("loss")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Interrupt(TrainerCallback):
    """Kills a run in the middle of `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise KeyboardInterrupt


def llava_sample(i, image: str | list[str] | None = "a.png", value: str | None = None) -> dict:
    """A row of LLaVA's JSON."""
    value = value or ("<image>\n" if image else "") + "what is this ?"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "the cube"}]
    return {"id": str(i), "conversations": turns} | ({"image": image} if image else {})


def write_llava(folder: Path, samples: list[dict], images: Sequence[str] = ()) -> Path:
    """A LLaVA JSON file, and images that depend on their name, in `folder`."""
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(sum(name.encode())).save(folder / name)
    (folder / "data.json").write_text(json.dumps(samples))
    return folder / "data.json"


class GroupedRows(list):
    """Rows with what `GroupedSampler` and a run's plan need to know of them."""

    has_text = True

    def __init__(self, rows: list[dict]):
        super().__init__(rows)
        self.lengths = np.array([len(str(row["messages"])) for row in rows])
        self.has_image = np.array([len(row["images"]) > 0 for row in rows])


class ListStream:
    """A stream of samples, as a streaming data set gives them."""

    def __init__(self, order: Sequence[int] = range(16)):
        self.order = order

    def shuffle(self, seed: int, buffer_size: int) -> "ListStream":
        return ListStream(np.random.default_rng(seed).permutation(16))

    def __iter__(self):
        rows = random_rows(16, IMAGES)
        for i in self.order:
            yield {name: rows[i][name] for name in ("id", "images", "messages")}
