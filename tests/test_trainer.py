"""What trains, what stays bit-frozen, and that accumulation, resuming and evaluation change nothing."""

import copy
import logging
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import encode, random_rows, tiny_tasks
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from training_helpers import IMAGES, GroupedRows, Interrupt, losses, make_trainer, target_source, weights
from transformers import default_data_collator

from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.rows import BadRow
from ola_vlm.training.stages import STAGES, apply_stage, part_of
from ola_vlm.training.trainer import OlaVlmTrainer

PT_PARTS = ["loss/ntp"] + [
    f"loss/{task['name']}/{layer}/{part}"
    for task in tiny_tasks()
    for layer in task["layers"]
    for part in ("smooth_l1", "contrastive")
]


def moved_parts(before, after):
    """part -> names of its parameters that changed, and of those that did not."""
    moved, frozen = {}, {}
    for name, value in before.items():
        (frozen if after[name].equal(value) else moved).setdefault(part_of(name), []).append(name)
    return moved, frozen


def test_pretrain_losses_are_positive_and_move_what_they_should(make_model, tmp_path):
    model, processor = make_model()
    before = weights(model)
    trainer = make_trainer(model, processor, tmp_path)
    trainer.train()
    for step in losses(trainer):
        assert sorted(step) == sorted([*PT_PARTS, "loss"])
        assert all(value > 0 for value in step.values())  # masks zeroed before the loss would give exactly 0
        total = step["loss/ntp"]
        for task in model.config.tasks:
            for layer in task["layers"]:
                smooth_l1, contrastive = (
                    step[f"loss/{task['name']}/{layer}/{p}"] for p in ("smooth_l1", "contrastive")
                )
                total += task["loss_weight"] * (smooth_l1 + task["contrastive_weight"] * contrastive)
        assert step["loss"] == pytest.approx(total, rel=1e-5)
    moved, frozen = moved_parts(before, weights(model))
    assert set(moved) == set(STAGES["pretrain"].trains)
    assert set(frozen) == {"vision_tower", "language_model"}


def test_every_embedding_loss_moves_its_own_predictor(make_model, tmp_path):
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path)
    batch = trainer.data_collator(random_rows(4))
    trainer.compute_loss(model.train(), batch).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (part_of(name) in STAGES["pretrain"].trains), name
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("method", ["ola_vlm", "llava"])
def test_finetune_moves_projector_and_llm_only(make_model, tmp_path, method):
    model, processor = make_model(tasks=tiny_tasks() if method == "ola_vlm" else [])
    before = weights(model)
    trainer = make_trainer(model, processor, tmp_path, stage="finetune")
    trainer.train()
    assert all(sorted(step) == ["loss", "loss/ntp"] for step in losses(trainer))
    assert losses(trainer)[0]["loss"] == pytest.approx(losses(trainer)[0]["loss/ntp"])
    moved, frozen = moved_parts(before, weights(model))
    assert set(moved) == {"projector", "language_model"}
    assert set(frozen) == {"vision_tower", "predictors", "queries", "logit_scales"} - (
        {"predictors", "queries", "logit_scales"} if method == "llava" else set()
    )


def test_llava_pretrains_its_projector_by_next_token_prediction(make_model, tmp_path):
    model, processor = make_model(tasks=[])
    before = weights(model)
    trainer = make_trainer(model, processor, tmp_path)
    trainer.train()
    assert all(sorted(step) == ["loss", "loss/ntp"] for step in losses(trainer))
    moved, frozen = moved_parts(before, weights(model))
    assert set(moved) == {"projector"} and set(frozen) == {"vision_tower", "language_model"}


def test_visual_pretrain_trains_the_whole_llava(make_model, tmp_path):
    model, processor = make_model()
    before = weights(model)
    make_trainer(model, processor, tmp_path, stage="visual_pretrain").train()
    moved, frozen = moved_parts(before, weights(model))
    assert set(moved) == {"vision_tower", "projector", "language_model"}
    assert set(frozen) - set(moved) == {"predictors", "queries", "logit_scales"}
    # The task tokens are rows of the language model, which trains: they adapt to the tower that does, too.
    ids = model.config.task_token_ids
    table = before["model.language_model.embed_tokens.weight"]
    assert (model.get_input_embeddings().weight[ids] != table[ids]).any(1).all()


@pytest.mark.parametrize(
    ("stage", "changes", "parts"),
    [  # Tables 4 and 6 of the paper, and what else can be combined
        ("pretrain", {"embedding_losses": False}, {"projector", "queries"}),
        ("pretrain", {"task_tokens": "frozen"}, {"projector", "predictors", "logit_scales"}),
        ("finetune", {"embedding_losses": True}, {"projector", "language_model", "predictors", "logit_scales"}),
        ("finetune", {"task_tokens": "trained"}, {"projector", "language_model"}),
        ("finetune", {"task_tokens": "queries"}, {"projector", "language_model", "queries"}),
    ],
)
def test_losses_and_task_tokens_by_choice(make_model, tmp_path, stage, changes, parts):
    model, processor = make_model()
    before, rows = weights(model), model.get_input_embeddings().weight
    table = rows.detach().clone()
    trainer = make_trainer(model, processor, tmp_path, stage=stage, weight_decay=0.1, **changes)
    trainer.train()
    with_losses = changes.get("embedding_losses", stage == "pretrain")
    for step in losses(trainer):
        assert sorted(step) == sorted([*PT_PARTS, "loss"] if with_losses else ["loss", "loss/ntp"])
        assert all(value > 0 for value in step.values())
    trainer.save_model()
    moved, frozen = moved_parts(before, weights(model))
    ids, way = model.config.task_token_ids, changes.get("task_tokens", "queries" if stage == "pretrain" else "frozen")
    if stage == "pretrain" and way == "queries":
        assert moved.pop("language_model") == ["model.language_model.embed_tokens.weight"]  # the tokens, by saving
    assert set(moved) == parts and not set(moved) & (set(frozen) - {"language_model"})
    assert (rows[ids] != table[ids]).any(1).tolist() == [way != "frozen"] * len(ids)
    if way == "queries":
        assert rows[ids].equal(model.task_token_embeddings())


def test_unknown_stages_and_choices_name_the_known_ones(make_model):
    for wrong, message in [
        (("pretraining",), r"'pretraining'.*pretrain"),
        (("finetune", None, "learnable"), r"task_tokens 'learnable' is unknown.*'trained'"),
        (("pretrain", None, "trained"), r"which pretrain freezes: take \"queries\""),
    ]:
        with pytest.raises(ValueError, match=message):
            apply_stage(make_model()[0], *wrong)


@pytest.mark.parametrize("tied", [False, True])
def test_task_tokens_are_bit_frozen_in_finetuning(make_model, tiny_parts, tied_parts, tmp_path, tied):
    parts = tied_parts if tied else tiny_parts
    model, processor = make_model(parts=parts)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    options = {"stage": "finetune", "weight_decay": 0.1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tables = {"in": model.get_input_embeddings().weight, "out": model.get_output_embeddings().weight}
    before = {name: table.detach().clone() for name, table in tables.items()}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, processor, tmp_path, callbacks=[Interrupt(4)], **options).train()

    resumed, _ = make_model(parts=parts, seed=1)
    trainer = make_trainer(resumed, processor, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ids = model.config.task_token_ids
    assert len(ids) == 8
    seen = trainer.data_collator(trainer.train_dataset)["input_ids"].unique().tolist()
    # Words; <image> is replaced by pixels, </s> ends each row and padding is not attended to.
    neighbors = [i for i in seen if i not in [*ids, model.config.image_token_id, *processor.tokenizer.all_special_ids]]
    for after in (model, resumed):
        for name, table in {"in": after.get_input_embeddings(), "out": after.get_output_embeddings()}.items():
            assert table.weight[ids].equal(before[name][ids]), f"task tokens moved ({name}put embeddings)"
            moved = (table.weight != before[name]).any(1)
            assert moved[neighbors].all(), f"neighbors did not move ({name}put embeddings)"


def test_frozen_rows_are_the_right_ones_in_bf16(make_model):
    """bf16 holds no id above 256 exactly: the frozen rows must not be found through its type."""
    model, _ = make_model()
    model = model.bfloat16()
    model.resize_token_embeddings(400, mean_resizing=False)
    model.config.task_token_ids = [301, 303]
    apply_stage(model, "finetune")
    states = model.train()(input_ids=torch.arange(300, 306)[None], output_hidden_states=True).hidden_states[-1]
    states.float().sum().backward()
    gradient = model.get_input_embeddings().weight.grad[300:306]
    assert (gradient == 0).all(1).nonzero().flatten().tolist() == [1, 3]


def test_accumulated_micro_batches_equal_one_batch(make_model, tmp_path):
    # The second micro-batch of the first step has no image; the third differs from the first in its number of images.
    runs = {}
    for size, accumulation in ((16, 1), (4, 4), (2, 8)):
        model, processor = make_model()
        trainer = make_trainer(
            model,
            processor,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            train_sampling_strategy="sequential",
        )
        trainer.train()
        runs[size] = losses(trainer), weights(model)
    for size in (4, 2):
        for step, expected in zip(runs[size][0], runs[16][0], strict=True):
            assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)
        for name, value in runs[size][1].items():
            torch.testing.assert_close(value, runs[16][1][name], rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("stage", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_interrupted_and_resumed_equals_uninterrupted(make_model, tmp_path, stage):
    options = {
        "stage": stage,
        "max_steps": 6,  # one epoch has 4 steps
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    model, processor = make_model()
    whole = make_trainer(model, processor, tmp_path / "whole", **options)
    whole.train()
    for step in (3, 5, 6):
        folder = tmp_path / f"interrupted-{step}"
        first, _ = make_model()
        with pytest.raises(KeyboardInterrupt):
            make_trainer(first, processor, folder, callbacks=[Interrupt(step)], **options).train()
        second, _ = make_model(seed=1)  # other weights: all must come from the checkpoint
        resumed = make_trainer(second, processor, folder, **options)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step - 1}"))
        assert losses(resumed) == losses(whole)
        for name, value in weights(second).items():
            assert value.equal(weights(model)[name]), name
        states = (trainer.optimizer.state_dict()["state"] for trainer in (resumed, whole))
        for mine, other in zip(*(state.values() for state in states), strict=True):
            assert all(mine[key].equal(other[key]) for key in mine)


def test_pretrained_checkpoint_carries_the_task_tokens_as_rows(make_model, tmp_path):
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    for folder in ("checkpoint-1", "checkpoint-2"):
        loaded = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / folder)
        rows = loaded.get_input_embeddings().weight[loaded.config.task_token_ids]
        assert rows.equal(loaded.task_token_embeddings())
    assert weights(loaded)["queries.depth"].equal(weights(model)["queries.depth"])
    batch = trainer.data_collator(random_rows(2))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():  # the same function: from query tables in training, from the vocabulary afterwards
        torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=1e-5)


def test_nothing_of_a_teacher_is_in_the_checkpoint(make_model, tmp_path):
    model, processor = make_model()
    names = set(model.state_dict())

    class Teacher(torch.nn.Module):
        def __init__(self, task):
            super().__init__()
            self.weight, self.source = torch.nn.Parameter(torch.ones(1)), target_source(task)

        def forward(self, images):
            return self.source(images) * self.weight.detach()

    sources = {task["name"]: Teacher(task) for task in model.config.tasks}
    trainer = make_trainer(model, processor, tmp_path, sources=sources, max_steps=1)
    trainer.train()
    assert set(model.state_dict()) == names
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}


def test_steps_without_any_image_are_finite_and_embedding_losses_exactly_zero(make_model, tmp_path):
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path, rows=random_rows(16, 0))
    trainer.train()
    for step in losses(trainer):
        assert step["loss"] == pytest.approx(step["loss/ntp"]) and step["loss"] > 0
        assert all(step[name] == 0 for name in PT_PARTS[1:])


def test_right_targets_are_learnt_and_those_of_another_sample_are_not(make_model, tmp_path):
    # Trained on the right targets, the predictors tell images apart: swapped targets cost more.
    task = tiny_tasks()[0] | {"target_length": 1, "contrastive_weight": 1.0}
    model, processor = make_model(tasks=[task])
    rows = random_rows(8)
    trainer = make_trainer(model, processor, tmp_path, rows=rows, max_steps=60, learning_rate=5e-3)
    trainer.train()
    assert losses(trainer)[-1]["loss/gen/4/contrastive"] < 0.6 * losses(trainer)[0]["loss/gen/4/contrastive"]
    right = trainer.evaluate(rows)
    swapped = [{**row, "target_images": rows[i - 1]["images"]} for i, row in enumerate(rows)]
    assert trainer.evaluate(swapped)["eval_loss"] > right["eval_loss"] + 0.2


@pytest.mark.parametrize("bad", ["depth", "ntp"])
def test_non_finite_loss_halts_before_the_step_and_names_it_and_its_rows(make_model, tmp_path, bad):
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path, rows=random_rows(16), train_sampling_strategy="sequential")
    before = {}

    class Watch(Interrupt):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                spoilt = model.lm_head if bad == "ntp" else model.predictors["depth"]["1"].proj_in
                spoilt.weight.data.fill_(math.inf)
            before.update(weights(model))

    trainer.add_callback(Watch(0))
    with pytest.raises(FloatingPointError, match=r"at step 2 on rank 0: .*") as error:
        trainer.train()
    assert ("depth/1/smooth_l1" if bad == "depth" else "loss/ntp") in str(error.value)
    assert all(f"'row-{i}'" in str(error.value) for i in range(8, 16)) and "'row-7'" not in str(error.value)
    assert trainer.state.global_step == 1
    for name, value in weights(model).items():
        if part_of(name) in STAGES["pretrain"].trains:
            assert value.equal(before[name])


def test_a_non_finite_target_names_its_row_only(make_model, tmp_path):
    """Neither the other rows of its micro-batch nor those of the step's other one, whose columns it would spoil."""
    model, processor = make_model()
    rows = random_rows(16)
    sources = {task["name"]: target_source(task) for task in model.config.tasks}
    right, poisoned = sources["depth"], rows[5]["images"][0].tobytes()

    def source(images):
        targets = right(images)
        targets[[image.tobytes() == poisoned for image in images], 3, 2] = math.nan
        return targets

    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    options |= {"train_sampling_strategy": "sequential", "sources": sources | {"depth": source}}
    with pytest.raises(FloatingPointError, match=r"task 'depth'.* rows \['row-5'\] are not finite"):
        make_trainer(model, processor, tmp_path, rows=rows, **options).train()


def bad_rows(*places):
    rows = random_rows(16, IMAGES)
    for i in places:
        rows[i] = {"id": f"row-{i}", "bad_row": BadRow("missing", "no image")}
    return rows


def test_bad_rows_are_dropped_counted_and_named_also_when_resumed(make_model, tmp_path, caplog):
    """The second step (of micro-batches of 2) loses one micro-batch, the fourth all its rows."""
    rows, options = bad_rows(5, 6, 7, 12, 13, 14, 15), {"max_steps": 5, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "optim": "sgd"}
    options |= {"max_bad_rows": 0.4, "drop_bad_rows": True, "save_strategy": "steps", "save_steps": 1}
    model, processor = make_model()
    whole = make_trainer(model, processor, tmp_path / "whole", rows=rows, **options)
    with caplog.at_level(logging.WARNING, "ola_vlm"):
        whole.train()
    named = [r.message for r in caplog.records if r.message.startswith("dropped row")]
    assert named == [f"dropped row row-{i}: no image" for i in (5, 6, 7, 12, 13, 14, 15)]
    counts = [entry["bad_rows"] for entry in whole.state.log_history if "bad_rows" in entry]
    assert counts == [0, 3, 3, 7, 7] and whole.bad_rows == 7
    assert losses(whole)[3]["loss"] == 0 and all(step["loss"] > 0 for i, step in enumerate(losses(whole)) if i != 3)

    first, _ = make_model()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(first, processor, tmp_path / "cut", rows=rows, callbacks=[Interrupt(3)], **options).train()
    resumed = make_trainer(make_model(seed=1)[0], processor, tmp_path / "cut", rows=rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert losses(resumed) == losses(whole) and resumed.bad_rows == 7
    for name, value in weights(resumed.model).items():
        assert value.equal(weights(model)[name]), name

    # Fewer rows are one smaller batch of those that are left.
    alone, _ = make_model()
    left = [row for i, row in enumerate(rows[:8]) if "bad_row" not in row]
    options |= {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = make_trainer(alone, processor, tmp_path / "alone", rows=left, **options)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(losses(whole)[0], rel=1e-5, abs=1e-6)
    assert losses(trainer)[1] == pytest.approx(losses(whole)[1], rel=1e-5, abs=1e-6)


def test_counts_of_dropped_rows_are_saved_when_nothing_is_logged(make_model, tmp_path):
    rows = bad_rows(1, 2)
    rows[3] = {"id": "long", "bad_row": BadRow("too_long", "900 tokens")}
    options = {"rows": rows, "max_steps": 4, "logging_steps": 3, "save_strategy": "steps", "save_steps": 1}
    options |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4, "drop_bad_rows": True}
    model, processor = make_model()
    options |= {"max_bad_rows": 2 / 16}  # the long one is not counted
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, processor, tmp_path, callbacks=[Interrupt(3)], **options).train()
    resumed = make_trainer(model, processor, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.bad_rows == 2
    assert [(e["bad_rows"], e["long_rows"]) for e in resumed.state.log_history if "bad_rows" in e] == [(2, 1)]


def test_logged_losses_are_those_of_the_steps_also_where_the_data_end(make_model, tmp_path):
    """Data of unknown length end with a step without a batch."""

    class Once(IterableDataset):
        def __iter__(self):
            return iter(random_rows(16, IMAGES))

    model, processor = make_model(tasks=[])
    trainer = make_trainer(model, processor, tmp_path, rows=Once(), max_steps=6)
    trainer.train()
    assert len(losses(trainer)) == 6  # three passes
    for step in losses(trainer):
        assert step["loss"] == pytest.approx(step["loss/ntp"], rel=1e-5)


def test_too_many_bad_rows_stop_the_run(make_model, tmp_path):
    model, processor = make_model()
    options = {"per_device_train_batch_size": 4, "max_steps": 4, "max_bad_rows": 0.2, "drop_bad_rows": True}
    trainer = make_trainer(
        model, processor, tmp_path, rows=bad_rows(*range(4, 9)), train_sampling_strategy="sequential", **options
    )
    with pytest.raises(ValueError, match=r"stopped at step 2: 4 bad rows are over max_bad_rows=0.2 of the run's 16"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_evaluation_drops_and_names_bad_rows(make_model, tmp_path, caplog):
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path, drop_bad_rows=True, per_device_eval_batch_size=8)
    with caplog.at_level(logging.WARNING, "ola_vlm"):
        metrics = trainer.evaluate(bad_rows(*range(8, 16)))
    assert math.isfinite(metrics["eval_loss"]) and sum("dropped row" in r.message for r in caplog.records) == 8


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 6])
def test_grouped_batches_are_resumed_exactly(make_model, tmp_path, step):
    rows = GroupedRows(random_rows(16, IMAGES))
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "save_steps": 1}
    options |= {"train_sampling_strategy": "group_by_length", "save_strategy": "steps", "rows": rows}
    model, processor = make_model()
    whole = make_trainer(model, processor, tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(make_model()[0], processor, tmp_path, callbacks=[Interrupt(step)], **options).train()
    resumed = make_trainer(make_model(seed=1)[0], processor, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step - 1}"))
    assert losses(resumed) == losses(whole)
    assert math.isfinite(resumed.evaluate(rows)["eval_loss"])


def test_grouped_batches_are_drawn_by_data_seed_and_else_by_seed(make_model, tmp_path):
    model, processor = make_model(tasks=[])
    rows = GroupedRows(random_rows(16, IMAGES))
    options = {"rows": rows, "train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2}

    def order(**seeds) -> list[str]:
        batches = make_trainer(model, processor, tmp_path, **options, **seeds).get_train_dataloader()
        return [row_id for batch in batches for row_id in batch["row_ids"]]

    first = order(seed=1)
    assert sorted(first) == sorted(row["id"] for row in rows)
    assert order(seed=2) != first
    assert order(seed=2, data_seed=1) == first
    assert order(seed=1, data_seed=2) != first
    assert order(seed=1, data_seed=0) == order(seed=0)  # 0 is a seed, too


def test_evaluation_logs_the_same_losses_and_changes_nothing(make_model, tmp_path):
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path, max_steps=1, per_device_eval_batch_size=16)
    before = weights(model)
    metrics = trainer.evaluate(trainer.train_dataset)
    assert all(value.equal(before[name]) for name, value in weights(model).items())
    trainer = make_trainer(model, processor, tmp_path, max_steps=1, per_device_train_batch_size=16)
    trainer.train()
    for name, value in losses(trainer)[0].items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5)


def test_in_evaluation_each_token_and_each_image_counts_once(make_model, tmp_path):
    """However they are spread over batches: the first of these has all images, the last one a single row."""
    model, processor = make_model()
    rows = random_rows(9, [3, 1, 1, 2, 0, 0, 0, 0, 0])
    for row in rows[4:]:
        row["messages"] = row["messages"] * 3
    found = []
    for size in (16, 4):
        trainer = make_trainer(model, processor, tmp_path, per_device_eval_batch_size=size)
        found.append(trainer.evaluate(rows))
    for part in PT_PARTS:
        if "contrastive" not in part:  # its columns are a batch's
            assert found[1][f"eval_{part}"] == pytest.approx(found[0][f"eval_{part}"], rel=1e-4), part


def test_metrics_of_logits_need_whole_batches_of_all_processes(make_model, tmp_path, monkeypatch):
    """Ranks' logits differ in shape where one lacks rows: it would end at the first evaluation, or hang there."""
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path, per_device_eval_batch_size=4)
    trainer.compute_metrics = lambda predicted: {"rows": len(predicted.predictions)}
    assert trainer.evaluate()["eval_rows"] == 8
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    # Two batches of 4, one a rank.
    trainer.set_tasks(model.config.tasks)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 3))
    told = "compute_metrics on 3 processes needs whole batches of all of them: evaluate on a multiple of 12 rows"
    with pytest.raises(ValueError, match=told):
        trainer.set_tasks(model.config.tasks)
    with pytest.raises(ValueError, match=told):
        trainer.get_eval_dataloader(random_rows(4))


@pytest.mark.parametrize("fault", ["no_tasks", "no_source", "another_shape"])
def test_a_collator_of_other_tasks_is_refused_by_name(fault, make_model, tmp_path):
    """Before the first batch, where a worker would end with a KeyError."""
    model, processor = make_model()
    tasks = copy.deepcopy(model.config.tasks)
    sources = {task["name"]: target_source(task) for task in tasks}
    says = r"was made without it"
    if fault == "no_tasks":
        tasks = []
    elif fault == "no_source":
        del sources["depth"]
        says = r"has no target_sources\['depth'\]"
    else:
        tasks[1]["target_dim"] += 1
        says = r"was made for targets \(\d+, \d+\) of it, the model's are \(\d+, \d+\)"
    apply_stage(model, "pretrain")
    args = OlaVlmArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    collator = OlaVlmCollator(processor, sources, tasks)
    how = r"give data_collator=OlaVlmCollator\(processor, target_sources, model.config.tasks\)"
    with pytest.raises(ValueError, match=rf"is trained, and data_collator {says}: {how}"):
        OlaVlmTrainer(model, args, data_collator=collator, processing_class=processor, train_dataset=random_rows(2))


def test_a_batch_that_lost_all_its_rows_predicts_none(make_model, tmp_path):
    """The row that stands in for them shifted all rows behind it."""
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path, per_device_eval_batch_size=2, drop_bad_rows=True)
    rows = bad_rows(0, 1)[:4]
    predicted = trainer.predict(rows)
    expected = trainer.predict(rows[2:])
    assert predicted.predictions.shape[0] == 2
    length = expected.label_ids.shape[1]
    assert np.array_equal(predicted.label_ids[:, :length], expected.label_ids)


def test_every_evaluation_names_its_own_losses(make_model, tmp_path):
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path, per_device_eval_batch_size=4)
    sets = {"one": random_rows(4), "other": random_rows(6, seed=1)}
    alone = {name: trainer.evaluate(rows) for name, rows in sets.items()}
    predicted = trainer.predict(sets["one"])
    assert predicted.predictions.shape[0] == 4 and predicted.label_ids.shape == predicted.predictions.shape[:2]
    together = trainer.evaluate(sets)  # after a prediction, which must leave nothing behind
    for part in ["loss", *PT_PARTS]:
        assert predicted.metrics[f"test_{part}"] == pytest.approx(alone["one"][f"eval_{part}"])
        for name, metrics in alone.items():
            assert together[f"eval_{name}_{part}"] == pytest.approx(metrics[f"eval_{part}"])
    assert any("eval_other_loss/ntp" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(("count", "is_told"), [(3, True), (6, True), (8, False)])
def test_predict_says_when_its_losses_count_rows_twice(make_model, tmp_path, monkeypatch, caplog, count, is_told):
    """On several processes a last batch that lacks rows takes the first ones once more."""
    trainer = make_trainer(*make_model(), tmp_path, per_device_eval_batch_size=2)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert len(trainer.get_test_dataloader(random_rows(count)).dataset) == count
    assert ("rows in a multiple of 4" in caplog.text) == is_told


def test_logged_losses_are_means_over_the_steps_since_the_last_log(make_model, tmp_path):
    runs = []
    for every in (1, 2):
        model, processor = make_model()
        trainer = make_trainer(model, processor, tmp_path, max_steps=4, logging_steps=every)
        trainer.train()
        runs.append(losses(trainer))
    for k, entry in enumerate(runs[1]):
        for name, value in entry.items():
            assert value == pytest.approx((runs[0][2 * k][name] + runs[0][2 * k + 1][name]) / 2, rel=1e-4)


def test_bf16_weights_train_and_losses_stay_fp32(make_model, tmp_path):
    model, processor = make_model(dtype=torch.bfloat16)
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)
    trainer.train()
    assert all(value > 0 for value in losses(trainer)[0].values())
    loss = trainer.compute_loss(model.train(), trainer.data_collator(random_rows(2)))
    assert loss.dtype == torch.float32


def test_methods_see_the_same_rows_in_the_same_order(make_model, tmp_path):
    orders = []
    for tasks in ([], tiny_tasks()):
        model, processor = make_model(tasks=tasks)
        trainer = make_trainer(model, processor, tmp_path, seed=3)
        seen = []
        collate = trainer.data_collator
        trainer.data_collator = lambda rows, seen=seen, collate=collate: (
            seen.append([r["id"] for r in rows]) or collate(rows)
        )
        trainer.train()
        orders.append(seen)
    assert orders[0] == orders[1] and len(IMAGES) == 16


@pytest.mark.parametrize("stage", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_mixed_precision_keeps_what_trains_in_float32_and_the_rest_as_loaded(make_model, tmp_path, stage):
    """Weights loaded in bf16: half the memory of what is frozen, updates that aren't rounded away, and at the end a
    checkpoint in bf16 again."""
    model, processor = make_model(dtype=torch.bfloat16)
    before = weights(model)
    options = {"stage": stage, "bf16": True, "dtype": "bfloat16", "learning_rate": 1e-4, "save_strategy": "steps"}
    trainer = make_trainer(model, processor, tmp_path, save_steps=1, **options)
    for name, parameter in model.named_parameters():
        trains = part_of(name) in STAGES[stage].trains
        assert parameter.dtype == (torch.float32 if trains else torch.bfloat16), name
    trainer.train()
    trainer.save_model()
    for step in losses(trainer):
        assert sorted(step) == sorted([*PT_PARTS, "loss"] if stage == "pretrain" else ["loss", "loss/ntp"])
        assert all(value > 0 for value in step.values())
    moved, frozen = moved_parts(before, {name: value.to(before[name]) for name, value in weights(model).items()})
    assert set(frozen) >= {"vision_tower"} and "projector" in moved

    # What a run goes on from holds every bit of what trains, the model that is used in the end 16 bits of it.
    resumable = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert {value.dtype for value in resumable.values()} == {torch.float32, torch.bfloat16}
    final = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in final.values()} == {torch.bfloat16}
    loaded = OlaVlmForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(dict(model.named_parameters())[name].bfloat16()), name

    # Without autocast: of one type after loading, of two in the trained model itself.
    batch = encode(processor, random_rows(3, [1, 2, 0]))
    for one in (loaded, trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)):
        one.eval().task_tokens_from_queries = False
        outputs = one(**batch, output_predictions=True)
        predictions = [outputs.predictions[task["name"]][layer] for task in tiny_tasks() for layer in task["layers"]]
        assert outputs.logits.isfinite().all() and all(x.isfinite().all() for x in predictions)

    with pytest.raises(KeyboardInterrupt):
        again, _ = make_model(dtype=torch.bfloat16)
        options["output_dir"] = tmp_path / "cut"
        make_trainer(again, processor, save_steps=1, callbacks=[Interrupt(2)], **options).train()
    resumed, _ = make_model(dtype=torch.bfloat16, seed=1)
    make_trainer(resumed, processor, save_steps=1, **options).train(resume_from_checkpoint=True)
    after = weights(resumed)
    different = [name for name, value in weights(model).items() if not after[name].equal(value)]
    table = "model.language_model.embed_tokens.weight"  # task tokens' rows, which `save_model` wrote above
    assert set(different) <= ({table} if stage == "pretrain" else set()), different


@pytest.mark.parametrize("folder", ["checkpoints", "checkpoint-7"])
def test_the_final_model_has_its_type_however_its_folder_is_called(make_model, tmp_path, folder):
    model, processor = make_model(dtype=torch.bfloat16)
    options = {"bf16": True, "dtype": "bfloat16", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(model, processor, tmp_path / folder, **options)
    trainer.train()
    trainer.save_model()
    final = load_file(tmp_path / folder / "model.safetensors")
    assert {value.dtype for value in final.values()} == {torch.bfloat16}
    resumable = load_file(tmp_path / folder / "checkpoint-1" / "model.safetensors")
    assert {value.dtype for value in resumable.values()} == {torch.float32, torch.bfloat16}


def test_training_keeps_no_keys_and_values(make_model, tmp_path):
    model, processor = make_model()
    assert model.config.text_config.use_cache
    trainer = make_trainer(model, processor, tmp_path)
    batch = trainer.data_collator(random_rows(2))
    for mode in (model.train(), model.eval()):
        _, outputs = trainer.compute_loss(mode, batch, return_outputs=True)
        assert outputs.past_key_values is None
    inputs = encode(processor, random_rows(2))
    assert model.train()(**inputs).past_key_values is None and model.eval()(**inputs).past_key_values is not None
    assert model.config.text_config.use_cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_columns_stay_in_the_targets_type_and_change_no_loss(make_model, tmp_path, dtype):
    """A step's targets in 16 bits, as the cache holds them: half the memory, the same loss and gradients."""
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path)
    exact = trainer.data_collator(random_rows(4, [1, 0, 2, 1]))
    exact["targets"] = {name: target.to(dtype).float() for name, target in exact["targets"].items()}
    sources = {name: lambda images, given=given: given.to(dtype) for name, given in exact["targets"].items()}
    trainer.data_collator.target_sources = sources
    results = []
    for batch in (exact, trainer.data_collator(random_rows(4, [1, 0, 2, 1]))):
        empty = trainer.data_collator(random_rows(1, 0))  # has none, and so no say in their type
        trainer._attach_step_targets([empty, batch], torch.device("cpu"))
        model.zero_grad()
        loss = trainer.compute_loss(model.train(), batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    kept = torch.float32 if dtype is torch.float64 else dtype
    assert {columns.dtype for columns in batch["step_targets"]["columns"].values()} == {kept}
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_without_our_collator(make_model, tmp_path):
    """One line that says what to give; before it was an AttributeError."""
    model, _ = make_model()
    args = OlaVlmArguments(str(tmp_path), use_cpu=True)
    needed = r"give data_collator=OlaVlmCollator\(processor, target_sources, model.config.tasks\)"
    with pytest.raises(ValueError, match=f"data_collator is none: {needed}"):
        OlaVlmTrainer(model, args)
    with pytest.raises(ValueError, match=f"data_collator is a function: {needed}"):
        OlaVlmTrainer(model, args, data_collator=default_data_collator)
