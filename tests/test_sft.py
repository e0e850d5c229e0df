"""TRL's SFTTrainer with the embedding losses beside its own."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from safetensors.torch import load_file
from test_attach import IMAGES, make, make_collator, make_rows
from training_helpers import Interrupt, losses, weights
from transformers import TrainerCallback
from trl import SFTConfig

from ola_vlm.inference.checkpoints import read_checkpoint
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.attach import AttachedPredictors, detach_predictors
from ola_vlm.training.sft import AttachedSFTTrainer
from ola_vlm.training.stages import apply_stage
from ola_vlm.training.trainer import OlaVlmTrainer

OPTIONS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",  # Adam makes steps of roundings where a gradient is nearly 0
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
    "train_sampling_strategy": "sequential",
}


LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
TESTS = Path(__file__).parent


def make_trainer(
    family: str,
    folder,
    images=IMAGES * 3,
    rows: Dataset | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    peft_config=None,
    callbacks=(),
    drop_bad_rows: bool = False,
    max_bad_rows: float = 0.01,
    stage: str = "pretrain",
    **changes,
) -> AttachedSFTTrainer:
    model, processor = make(family)
    model.to(dtype)
    apply_stage(model, stage, embedding_losses=True)
    if seed:
        # As if another run had begun it; beside adapters the predictors alone train.
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (peft_config is None or name.startswith("predictors.")):
                torch.nn.init.normal_(parameter, std=0.02)
    if rows is None:
        rows = Dataset.from_list(make_rows(images))
    options = {"remove_unused_columns": False, "max_length": None, "bf16": False, "activation_checkpointing": False}
    args = SFTConfig(str(folder), **(OPTIONS | options | changes))
    return AttachedSFTTrainer(
        model,
        args,
        make_collator(model, processor, drop_bad_rows=drop_bad_rows),
        max_bad_rows=max_bad_rows,
        train_dataset=rows,
        eval_dataset=Dataset.from_list(make_rows([1, 0, 2], seed=1)),
        processing_class=processor,
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "qwen3_vl"])
def test_it_learns_what_our_trainer_learns(family, tmp_path):
    """The same losses, step by step, and the same weights; what is frozen stays equal to the last bit."""
    trainer = make_trainer(family, tmp_path / "trl")
    before = weights(trainer.model)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    trainer.train()

    model, processor = make(family)
    apply_stage(model, "pretrain")
    args = OlaVlmArguments(str(tmp_path / "ours"), **OPTIONS)
    ours = OlaVlmTrainer(
        model,
        args,
        data_collator=make_collator(model, processor),
        train_dataset=make_rows(IMAGES * 3),
        processing_class=processor,
    )
    ours.train()
    assert len(losses(trainer)) == len(losses(ours)) == 3
    for step, expected in zip(losses(trainer), losses(ours), strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)
    after = weights(trainer.model)
    for name, value in weights(model).items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4, msg=name)
        if name not in trained:
            assert after[name].equal(before[name]), name
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert any(name.startswith("predictors.") for name in moved) and moved <= trained
    metrics = trainer.evaluate()
    assert metrics["eval_loss/depth/1/smooth_l1"] > 0 and metrics["eval_loss"] > metrics["eval_loss/ntp"] > 0


# Metrics of logits go with TRL 2.
@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_a_batch_of_text_alone_predicts_no_row_that_is_nobodys(tmp_path):
    """As of our trainer (test_attach)."""
    trainer = make_trainer("qwen2_5_vl", tmp_path, per_device_eval_batch_size=2)
    rows = Dataset.from_list(make_rows([0, 0, 1, 2], seed=1))
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape[0] == predicted.label_ids.shape[0] == 4
    last = trainer.predict(rows.select([3]))
    length = last.label_ids.shape[1]
    assert np.array_equal(predicted.label_ids[3, :length], last.label_ids[0])


def test_with_adapters(tmp_path):
    trainer = make_trainer("qwen2_5_vl", tmp_path, peft_config=LoraConfig(r=2, target_modules=LAYERS))
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, value in weights(trainer.model).items() if not value.equal(before[name])}
    kinds = ("lora_", "predictors.", "logit_scales.")
    assert all(any(kind in name for kind in kinds) for name in moved), moved
    assert all(any(kind in name for name in moved) for kind in kinds)
    trainer.save_model()
    saved = weights(trainer.model.get_base_model())
    # An adapter names the folder that its base model came from.
    model, _ = make("qwen2_5_vl")
    detach_predictors(model).save_pretrained(tmp_path / "base")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    file.write_text(json.dumps(config))
    again, _ = read_checkpoint(tmp_path)
    assert isinstance(again, AttachedPredictors)
    for name, value in again.state_dict().items():
        if name.startswith(("predictors.", "logit_scales.")):
            assert value.equal(saved[name]), name


def adapters_or_none(adapters: bool) -> LoraConfig | None:
    if adapters:
        return LoraConfig(r=2, target_modules=LAYERS)
    return None


with_and_without_adapters = pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])


@with_and_without_adapters
def test_resumed_it_is_the_uninterrupted_run(adapters, tmp_path):
    """From a checkpoint whose names of weights are other than the model's (Qwen2.5-VL's), predictors among them."""
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer("qwen2_5_vl", tmp_path / "whole", peft_config=adapters_or_none(adapters), **options)
    whole.train()

    interrupted = make_trainer(
        "qwen2_5_vl",
        tmp_path / "cut",
        peft_config=adapters_or_none(adapters),
        callbacks=[Interrupt(3)],
        **options,
    )
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    # Other weights: all that trains must come from the checkpoint.
    resumed = make_trainer("qwen2_5_vl", tmp_path / "cut", seed=1, peft_config=adapters_or_none(adapters), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert len(losses(whole)) == 3 and losses(resumed) == losses(whole)
    expected = weights(whole.model)
    for name, value in weights(resumed.model).items():
        assert value.equal(expected[name]), name


class FirstIsBest(TrainerCallback):
    """A metric that falls from step to step; copies of the model's weights by the step in which they were saved."""

    def __init__(self):
        self.by_step = {}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_place"] = -state.global_step

    def on_save(self, args, state, control, model=None, **kwargs):
        self.by_step[state.global_step] = weights(model)


@with_and_without_adapters
def test_the_best_checkpoint_is_loaded_with_its_predictors(adapters, tmp_path):
    kept = FirstIsBest()
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_place", "greater_is_better": True}
    trainer = make_trainer("qwen2_5_vl", tmp_path, peft_config=adapters_or_none(adapters), callbacks=[kept], **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    moved = set()
    for name, value in weights(trainer.model).items():
        assert value.equal(kept.by_step[1][name]), name
        if not value.equal(kept.by_step[3][name]):
            moved.add(name.rpartition("predictors.")[1])
    assert "predictors." in moved


@with_and_without_adapters
def test_weights_in_16_bits_train_in_float32(adapters, tmp_path):
    """At a usual learning rate most bfloat16 weights would stay where they are: steps are below half a rounding."""
    trainer = make_trainer(
        "qwen2_5_vl",
        tmp_path,
        dtype=torch.bfloat16,
        stage="finetune",
        peft_config=adapters_or_none(adapters),
        bf16=True,
        learning_rate=1e-5,
        optim="adamw_torch",
        max_steps=1,
    )
    before = weights(trainer.model)
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert {parameters[name].dtype for name in trained} == {torch.float32}
    assert {parameter.dtype for name, parameter in parameters.items() if name not in trained} == {torch.bfloat16}
    # A part that begins at 0 (LoRA's B) gives the other one no gradient in its first step.
    name = next(name for name in trained if "language_model" in name and "q_proj" in name and "lora_A" not in name)
    moved = parameters[name].detach() != before[name]
    assert moved.float().mean() > 0.9
    for name in parameters.keys() - trained:
        assert parameters[name].equal(before[name]), name
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_loss"] < float("inf")


def launch(launcher: list[str], out: Path, *options: str) -> Path:
    """Two ranks of sft_worker.py, which write to `out`."""
    command = [sys.executable, "-m", *launcher, str(TESTS / "sft_worker.py"), str(out), *options]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder with what each of two ranks saved."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return launch(launcher, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The folder of models and losses of two ranks, by the configuration that is shipped; in fp32."""
    config = TESTS.parent / "recipes" / "accelerate" / "fsdp2.yaml"
    launcher = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    launcher += ["--mixed_precision", "no", "--main_process_port", "0"]
    return launch(launcher, tmp_path_factory.mktemp("sharded"), "--sharded")


@pytest.mark.slow
@with_and_without_adapters
def test_two_processes_equal_one(two_processes, adapters, tmp_path):
    """Losses of an evaluation, each token and image counted once, though ranks have unequally many; of training; and
    the weights."""
    from sft_worker import run

    run(tmp_path, ranks=1, adapters=adapters)
    one = torch.load(tmp_path / f"1-{adapters}-0.pt")
    ranks = [torch.load(two_processes / f"2-{adapters}-{rank}.pt") for rank in range(2)]
    for rank in ranks:
        assert rank["evaluated"] == pytest.approx(one["evaluated"], rel=1e-4, abs=1e-5)
    assert len(one["losses"]) == len(ranks[0]["losses"]) == 3
    for step, expected in zip(ranks[0]["losses"], one["losses"], strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name, value in one["weights"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.slow
@with_and_without_adapters
def test_sharded_by_fsdp2_it_writes_what_one_process_writes(sharded, adapters, tmp_path):
    from sft_worker import run_sharded

    run_sharded(tmp_path, ranks=1, adapters=adapters)
    one = torch.load(tmp_path / f"1-{adapters}.pt")
    two = torch.load(sharded / f"2-{adapters}.pt")
    assert two["evaluated"] == pytest.approx(one["evaluated"], rel=1e-4, abs=1e-5)
    assert len(one["losses"]) == len(two["losses"]) == 3
    for step, expected in zip(two["losses"], one["losses"], strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)

    folder = sharded / f"2-{adapters}"
    expected_folder = tmp_path / f"1-{adapters}"
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected_folder.iterdir()}
    expected = saved_weights(expected_folder)
    saved = saved_weights(folder)
    resumed = saved_weights(sharded / f"2-{adapters}-resumed")
    assert expected.keys() == saved.keys() == resumed.keys()
    assert any(name.startswith("predictors.") for name in saved)
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert resumed[name].equal(saved[name]), name


def text_rows(number: int) -> list[dict]:
    """Rows as TRL's documents have them: texts in place of parts, no id."""
    rows = []
    for row in make_rows([1] * number):
        messages = [{"role": "user", "content": "what is this ?"}, {"role": "assistant", "content": "red cube"}]
        rows.append({"images": row["images"], "messages": messages})
    return rows


@pytest.mark.parametrize("streamed", [False, True], ids=["table", "stream"])
def test_rows_in_other_forms_of_trl(streamed, tmp_path):
    """They are trained on as the same rows with parts and an id are."""
    rows = Dataset.from_list(text_rows(12))
    if streamed:
        rows = rows.to_iterable_dataset()
    trainer = make_trainer("qwen2_5_vl", tmp_path / "trl", rows=rows)
    trainer.train()

    written = []
    for i, row in enumerate(text_rows(12)):
        question, answer = (message["content"] for message in row["messages"])
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        told = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        written.append({"id": f"row-{i}", "images": row["images"], "messages": [asked, told]})
    whole = make_trainer("qwen2_5_vl", tmp_path / "ours", rows=Dataset.from_list(written))
    whole.train()
    assert len(losses(whole)) == 3 and losses(trainer) == losses(whole)


def test_dropped_rows_are_named_and_counted(tmp_path, caplog):
    rows = text_rows(12)
    rows[5] = {**rows[5], "images": [{"bytes": b"no picture", "path": None}]}
    for i, row in enumerate(rows):
        row["id"] = f"row-{i}"
    data = Dataset.from_list(rows[:5] + rows[6:])
    # A table with an unreadable image among the others.
    damaged = Dataset.from_list([rows[5]], features=data.features)
    data = concatenate_datasets([data, damaged])
    trainer = make_trainer("qwen2_5_vl", tmp_path, rows=data, drop_bad_rows=True, max_bad_rows=0.1)
    with caplog.at_level(logging.WARNING, "ola_vlm"):
        trainer.train()
    named = [record.message for record in caplog.records if record.message.startswith("dropped row")]
    assert len(named) == 1 and named[0].startswith("dropped row row-5: image")
    counts = [entry["bad_rows"] for entry in trainer.state.log_history if "bad_rows" in entry]
    assert counts == [0, 0, 1] and trainer.bad_rows == 1

    trainer = make_trainer("qwen2_5_vl", tmp_path, rows=data, drop_bad_rows=True, max_bad_rows=0.01)
    with pytest.raises(ValueError, match=r"stopped at step 3: 1 bad rows are over max_bad_rows=0\.01 of the run's 12"):
        trainer.train()


def test_what_does_not_fit(tmp_path):
    model, processor = make("qwen2_5_vl")
    config = {"remove_unused_columns": False, "max_length": None, "bf16": False, "use_cpu": True}
    rows = Dataset.from_list(make_rows([1, 1]))
    collator = make_collator(model, processor)
    needed = {"train_dataset": rows, "processing_class": processor}
    with pytest.raises(ValueError, match="remove_unused_columns=False, packing=False and max_length=None"):
        AttachedSFTTrainer(model, SFTConfig(str(tmp_path), bf16=False, use_cpu=True), collator, **needed)
    alone = SFTConfig(str(tmp_path), **config, average_tokens_across_devices=False)
    with pytest.raises(ValueError, match="give average_tokens_across_devices=True"):
        AttachedSFTTrainer(model, alone, collator, **needed)
    with pytest.raises(ValueError, match="data_collator is none: give data_collator=AttachedCollator"):
        AttachedSFTTrainer(model, SFTConfig(str(tmp_path), **config), None, **needed)
    with_tokens, processor = make("qwen2_5_vl", tokens=True)
    with pytest.raises(ValueError, match="give tasks with num_task_tokens 0"):
        AttachedSFTTrainer(with_tokens, SFTConfig(str(tmp_path), **config), collator, **needed)
