"""TRL's SFTTrainer with the embedding losses beside its own."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_attach import IMAGES, make, make_collator, make_rows
from training_helpers import losses, weights
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


def make_trainer(family: str, folder, **changes):
    model, processor = make(family)
    apply_stage(model, "pretrain")
    options = {"remove_unused_columns": False, "max_length": None, "bf16": False, "activation_checkpointing": False}
    args = SFTConfig(str(folder), **OPTIONS, **options)
    return AttachedSFTTrainer(
        model,
        args,
        make_collator(model, processor),
        train_dataset=Dataset.from_list(make_rows(IMAGES * 3)),
        eval_dataset=Dataset.from_list(make_rows([1, 0, 2], seed=1)),
        processing_class=processor,
        **changes,
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


def test_with_adapters(tmp_path):
    layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    trainer = make_trainer("qwen2_5_vl", tmp_path, peft_config=LoraConfig(r=2, target_modules=layers))
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


def test_what_does_not_fit(tmp_path):
    model, processor = make("qwen2_5_vl")
    config = {"remove_unused_columns": False, "max_length": None, "bf16": False, "use_cpu": True}
    rows = Dataset.from_list(make_rows([1, 1]))
    collator = make_collator(model, processor)
    needed = {"train_dataset": rows, "processing_class": processor}
    with pytest.raises(ValueError, match="remove_unused_columns=False, packing=False and max_length=None"):
        AttachedSFTTrainer(model, SFTConfig(str(tmp_path), bf16=False, use_cpu=True), collator, **needed)
    with pytest.raises(ValueError, match="data_collator is none: give data_collator=AttachedCollator"):
        AttachedSFTTrainer(model, SFTConfig(str(tmp_path), **config), None, **needed)
    with_tokens, processor = make("qwen2_5_vl", tokens=True)
    with pytest.raises(ValueError, match="give tasks with num_task_tokens 0"):
        AttachedSFTTrainer(with_tokens, SFTConfig(str(tmp_path), **config), collator, **needed)
