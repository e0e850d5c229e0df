"""Rows packed into sequences: computed as if each were alone; which go together; what can't take them."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_rows, tiny_tasks
from test_baselines import FUSIONS, GRID, TOKENS
from test_objectives import MOMENTS, PATCH, PLACES, WORDS
from tiny_teachers import save_clip_image
from tiny_vlms import qwen2_5_vl
from torch.nn import functional as F
from training_helpers import (
    IMAGES,
    GroupedRows,
    Interrupt,
    llava_sample,
    losses,
    make_trainer,
    target_source,
    weights,
    write_llava,
)
from transformers import AutoConfig, masking_utils
from transformers import modeling_flash_attention_utils as flash

from ola_vlm.baselines.build import build_multi_encoder, load_encoders
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.modeling_ola_vlm import ImageLayout, packed_rows
from ola_vlm.train import train
from ola_vlm.training import packing
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.attach import attach_predictors
from ola_vlm.training.collator import AttachedCollator, OlaVlmCollator
from ola_vlm.training.packing import PackedRows, check_keeps_rows_apart, pack_lengths
from ola_vlm.training.plan import Plan
from ola_vlm.training.rows import BadRow
from ola_vlm.training.run_record import differences
from ola_vlm.training.trainer import OlaVlmTrainer

TASKS = {"paper": tiny_tasks(), "patch": [PATCH], "words": [WORDS], "moments": [MOMENTS], "places": [PLACES]}
# Rows of `random_rows(16, IMAGES)`: several images in a row of data, several rows with and without images together.
PACKED = [[0, 1, 2], [3], [4, 5, 12, 6], [7, 8, 9], [15, 10]]


def packed_of(rows: list[dict], groups: list[list[int]] = PACKED) -> list[list[dict]]:
    return [[rows[i] for i in group] for group in groups]


def plain_of(rows: list[dict], groups: list[list[int]] = PACKED) -> list[dict]:
    return [rows[i] for group in groups for i in group]


def losses_and_gradients(trainer, given: list, parts: int = 1) -> tuple[dict, dict]:
    """Of one optimizer step of so many micro-batches, each a part of the rows or sequences that are given."""
    size = math.ceil(len(given) / parts)
    batches = [trainer.data_collator(given[i : i + size]) for i in range(0, len(given), size)]
    batches, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.model.train()
    trainer.model.zero_grad()
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
    found = {name: float(value) for name, value in trainer._sums["train"].items() if name != "steps"}
    trainer._sums["train"].clear()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return found, gradients


def assert_equal_steps(packed: tuple[dict, dict], plain: tuple[dict, dict], tolerance: float = 1e-5) -> None:
    assert packed[0] == pytest.approx(plain[0], rel=tolerance)
    assert packed[1].keys() == plain[1].keys() and len(plain[1]) > 0
    for name, gradient in plain[1].items():
        scale = gradient.abs().max()
        assert (packed[1][name] - gradient).abs().max() <= tolerance * max(scale, 1e-3), name


@pytest.mark.parametrize("kind", TASKS)
def test_losses_and_gradients_are_those_of_plain_rows(make_model, tmp_path, kind):
    model, processor = make_model(TASKS[kind])
    trainer = make_trainer(model, processor, tmp_path)
    rows = random_rows(16, IMAGES)
    packed = losses_and_gradients(trainer, packed_of(rows))
    plain = losses_and_gradients(trainer, plain_of(rows))
    assert all(value > 0 for name, value in plain[0].items() if "contrastive" not in name)
    assert_equal_steps(packed, plain)


@pytest.mark.parametrize("stage", ["finetune", "visual_pretrain"])
def test_in_every_stage(make_model, tmp_path, stage):
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path, stage=stage)
    rows = random_rows(16, IMAGES)
    assert_equal_steps(losses_and_gradients(trainer, packed_of(rows)), losses_and_gradients(trainer, plain_of(rows)))


def test_accumulated_in_unequal_parts(make_model, tmp_path):
    """The divisors are those of the whole step, tokens and images, however many rows a sequence has."""
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path)
    rows = random_rows(16, IMAGES)
    plain = losses_and_gradients(trainer, plain_of(rows))
    for parts in (2, 3, 5):
        assert_equal_steps(losses_and_gradients(trainer, packed_of(rows), parts), plain)


def test_text_only_and_activation_checkpointing(make_model, tmp_path):
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path)
    rows = random_rows(8)
    text = random_rows(8, 0)
    model.activation_checkpointing_enable()
    for some in (text, [*rows[:4], *text[4:]]):
        packed = losses_and_gradients(trainer, packed_of(some, [[0, 1], [2, 3, 4, 7], [5, 6]]))
        plain = losses_and_gradients(trainer, plain_of(some, [[0, 1], [2, 3, 4, 7], [5, 6]]))
        assert_equal_steps(packed, plain)
    assert losses_and_gradients(trainer, packed_of(text, [[0, 1]]))[0]["loss/depth/3/smooth_l1"] == 0


def test_in_16_bits_as_near_as_padding_is(make_model, tmp_path):
    """Rounding differs between batches of other shapes, packed or not."""
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path, bf16=True)
    rows = random_rows(16, IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        plain = losses_and_gradients(trainer, plain_of(rows))[0]
        packed = losses_and_gradients(trainer, packed_of(rows))[0]
    assert packed == pytest.approx(plain, rel=0.01)


def test_of_several_encoders(tmp_path, tiny_parts):
    save_clip_image(tmp_path / "gen")
    encoders = load_encoders({"gen": {"encoder": "clip_image", "path": str(tmp_path / "gen")}}, GRID)
    rows = random_rows(16, IMAGES)
    for fusion in FUSIONS:
        torch.manual_seed(0)
        llava, processor = build_ola_vlm(tiny_parts.vision_tower, tiny_parts.language_model)
        model, processor = build_multi_encoder(llava, processor, encoders, fusion, TOKENS)
        trainer = make_trainer(model, processor, tmp_path)
        packed = losses_and_gradients(trainer, packed_of(rows))
        assert_equal_steps(packed, losses_and_gradients(trainer, plain_of(rows)))


# ------------------------------------------------------------------------------------------------------ rows apart
def test_a_text_that_attends_across_rows_is_seen(make_model, tmp_path, monkeypatch):
    """By the comparison above, and by the check before a run, which is needed for any model."""
    model, processor = make_model()
    trainer = make_trainer(model, processor, tmp_path)
    rows = random_rows(16, IMAGES)
    plain = losses_and_gradients(trainer, plain_of(rows))
    check_keeps_rows_apart(model.config.text_config)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(AssertionError):
        assert_equal_steps(losses_and_gradients(trainer, packed_of(rows)), plain)
    with pytest.raises(ValueError, match="in llama, packed rows would see each other: set packing=false"):
        check_keeps_rows_apart(model.config.text_config)


def test_positions_begin_anew_with_each_row_and_with_padding(make_model):
    _, processor = make_model()
    rows = random_rows(16, IMAGES)
    collator = OlaVlmCollator(processor)
    batch = collator(packed_of(rows))
    alone = [collator([row]) for row in plain_of(rows)]
    assert "attention_mask" not in batch and batch["input_ids"].shape == batch["position_ids"].shape
    assert batch["row_ids"] == [row["id"] for row in plain_of(rows)]
    number = 0
    for i, group in enumerate(PACKED):
        start = 0
        for _ in group:
            length = alone[number]["input_ids"].shape[1]
            piece = slice(start, start + length)
            assert batch["input_ids"][i, piece].equal(alone[number]["input_ids"][0])
            assert batch["position_ids"][i, piece].tolist() == list(range(length))
            assert batch["labels"][i, start] == -100
            assert batch["labels"][i, start + 1 : start + length].equal(alone[number]["labels"][0, 1:])
            start += length
            number += 1
        rest = batch["position_ids"][i, start:]
        assert rest.tolist() == list(range(len(rest))) and (batch["labels"][i, start:] == -100).all()
        assert (batch["input_ids"][i, start:] == processor.tokenizer.pad_token_id).all()
    assert batch["pixel_values"].equal(torch.cat([one["pixel_values"] for one in alone]))


def test_predictors_do_not_see_other_rows(make_model):
    """Not the states of the row before, of the one behind, or of padding."""
    tasks = [{**task, "attends_to": ["system", "image", "task", "text"]} for task in tiny_tasks()]
    model, processor = make_model(tasks)
    batch = OlaVlmCollator(processor)(packed_of(random_rows(16, IMAGES)))
    packed_BT = packed_rows(None, batch["position_ids"])
    layout = ImageLayout.find(batch["input_ids"], None, len(batch["pixel_values"]), model.config, packed_BT)
    states = torch.randn(5, *batch["input_ids"].shape, 32)
    base = model.predict_embeddings(dict(enumerate(states)), layout)
    # Row 12, the third one of sequence 2, has three images: the batch's fifth to seventh.
    is_row_12 = packed_BT[2] == 2
    counts = [IMAGES[i] for group in PACKED for i in group]
    before = sum(counts[: [i for group in PACKED for i in group].index(12)])
    others = states.clone()
    others[:, 2, ~is_row_12] += 1
    others[:, [0, 1, 3, 4]] += 1
    of_others = model.predict_embeddings(dict(enumerate(others)), layout)
    own = states.clone()
    own[:, 2, is_row_12] += torch.randn(32)
    of_own = model.predict_embeddings(dict(enumerate(own)), layout)
    is_of_row_12 = torch.zeros(sum(counts), dtype=torch.bool)
    is_of_row_12[before : before + 3] = True
    for name, layers in base.items():
        for layer, predicted in layers.items():
            torch.testing.assert_close(of_others[name][layer][is_of_row_12], predicted[is_of_row_12])
            torch.testing.assert_close(of_own[name][layer][~is_of_row_12], predicted[~is_of_row_12])
            changed = (of_others[name][layer] - predicted).abs().amax((1, 2))
            assert (changed[~is_of_row_12] > 1e-3).all() and (changed[is_of_row_12] < 1e-5).all()


def test_task_tokens_belong_to_an_image_of_their_row(make_model):
    model, processor = make_model()
    ids = model.config.task_token_ids
    batch = OlaVlmCollator(processor)([random_rows(2, [1, 0])])
    packed_BT = packed_rows(None, batch["position_ids"])
    moved = batch["input_ids"].clone()
    (place,) = (moved[0] == ids[-1]).nonzero().flatten().tolist()
    moved[0, place] = 3
    moved[0, -2] = ids[-1]  # in the other row
    ImageLayout.find(moved, None, 1, model.config)  # as one row
    with pytest.raises(ValueError, match="every image needs all of them in its row"):
        ImageLayout.find(moved, None, 1, model.config, packed_BT)


def test_a_left_padded_batch_is_not_taken_for_a_packed_one(make_model):
    positions = torch.tensor([[1, 1, 0, 1, 2]])
    assert packed_rows(torch.tensor([[0, 0, 1, 1, 1]]), positions) is None
    assert packed_rows(None, None) is None and packed_rows(None, torch.arange(5)[None]) is None
    assert packed_rows(None, torch.tensor([[0, 1, 0, 1, 2]])).tolist() == [[0, 0, 1, 1, 1]]


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 64},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_keep_rows_apart(family):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **sizes, num_key_value_heads=2, **FAMILIES[family])
    before = config.to_dict()
    state = torch.get_rng_state()
    check_keeps_rows_apart(config)
    assert config.to_dict() == before and torch.get_rng_state().equal(state)


def test_families_that_do_not():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="in mamba, packed rows would see each other: set packing=false"):
        check_keeps_rows_apart(AutoConfig.for_model("mamba", **sizes))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    with pytest.raises(ValueError, match=r"qwen2_5_vl_text can't take packed rows \(its positions"):
        check_keeps_rows_apart(AutoConfig.for_model("qwen2_5_vl_text", **sizes, **heads, rope_parameters=rope))


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale=None, **options):
    """What flash attention computes of rows that begin where it is told, (tokens, heads, width) each."""
    assert causal and cu_seqlens_q.equal(cu_seqlens_k)
    assert int(cu_seqlens_q.diff().max()) == options["max_seqlen_q"]
    lengths = cu_seqlens_q.diff().tolist()
    parts = []
    for row in zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True):
        attended = F.scaled_dot_product_attention(*row, is_causal=True, scale=softmax_scale, enable_gqa=True)
        parts.append(attended)
    return torch.cat(parts, dim=1).transpose(0, 1)


def whole_attention(q, k, v, causal, softmax_scale=None, **options):
    """What flash attention computes of batches without padding, as the vision tower's are."""
    assert not causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)


@pytest.mark.parametrize("tasks", [None, []])
def test_flash_attention_is_told_where_rows_begin(make_model, tmp_path, monkeypatch, tasks):
    """In batches of several sequences, where it would not look for them; and the vision tower is not told."""
    model, processor = make_model(tasks)
    rows = random_rows(16, IMAGES)
    trainer = make_trainer(model, processor, tmp_path)
    plain = losses_and_gradients(trainer, plain_of(rows))

    def kernels(*args, **kwargs):
        def options(query_length, key_length, is_causal, softmax_scale=None, max_seqlen_q=None, **_):
            return {"causal": is_causal, "softmax_scale": softmax_scale, "max_seqlen_q": max_seqlen_q}

        return (whole_attention, varlen_attention, None, None, None), (options, None)

    monkeypatch.setattr(flash, "lazy_import_flash_attention", kernels)
    for part in (model.config.text_config, model.config.vision_config):
        part._attn_implementation_internal = "flash_attention_2"
    assert_equal_steps(losses_and_gradients(trainer, packed_of(rows)), plain)
    trainer.data_collator.padding_free = True
    batch = trainer.data_collator(packed_of(rows))
    needed = sum(len(trainer.data_collator.check_text(row).ids) for row in plain_of(rows))
    assert batch["input_ids"].shape == (1, needed) and (batch["position_ids"] == 0).sum() == 13
    assert_equal_steps(losses_and_gradients(trainer, packed_of(rows)), plain)


def test_flex_attention_gets_the_blocks(make_model, tmp_path):
    """On a CPU torch has its forward pass only."""
    model, processor = make_model()
    rows = random_rows(16, IMAGES)
    trainer = make_trainer(model, processor, tmp_path)
    plain = trainer.data_collator(plain_of(rows))
    packed = trainer.data_collator(packed_of(rows))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = trainer.compute_loss(model, plain)
        model.set_attn_implementation({"text_config": "flex_attention"})
        assert model.model.vision_tower.config._attn_implementation == "sdpa"
        torch.testing.assert_close(trainer.compute_loss(model, packed), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("gpu", "use_cpu", "is_half", "has_flash", "chosen"),
    [
        (False, False, True, True, "sdpa"),
        (True, True, True, True, "sdpa"),
        (True, False, True, True, "flash_attention_2"),
        (True, False, False, True, "flex_attention"),
        (True, False, True, False, "flex_attention"),
    ],
)
def test_which_attention_is_chosen(make_model, monkeypatch, gpu, use_cpu, is_half, has_flash, chosen):
    model, _ = make_model()
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: has_flash)
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, names: asked.append(names))
    assert packing.choose_attention(model, use_cpu, is_half) == (chosen == "flash_attention_2")
    assert asked == ([] if chosen == "sdpa" else [{"text_config": chosen}])


# --------------------------------------------------------------------------------------------- which rows go together
def test_every_row_is_in_one_sequence_that_is_not_too_long():
    rng = np.random.default_rng(0)
    for lengths in (
        rng.integers(1, 101, 3000),
        np.full(10, 100),
        np.array([60, 50, 40, 50]),
        rng.integers(60, 90, 50),
    ):
        sequences = pack_lengths(lengths, 100, seed=0)
        assert sorted(np.concatenate(sequences).tolist()) == list(range(len(lengths)))
        filled = [lengths[sequence].sum() for sequence in sequences]
        assert max(filled) <= 100
        # Best fit: no two sequences could have been one, but for those that are more than half full.
        assert sum(sorted(filled)[:2]) > 100 or len(filled) == 1
    assert len(pack_lengths(np.array([60, 50, 40, 50]), 100, seed=0)) == 2
    lengths = rng.integers(1, 101, 3000)
    assert len(pack_lengths(lengths, 100, seed=0)) <= 1.01 * math.ceil(lengths.sum() / 100)


def test_rows_go_together_by_lengths_and_seed():
    lengths = np.random.default_rng(0).integers(10, 40, 500)

    def as_lists(seed: int) -> list[list[int]]:
        return [sequence.tolist() for sequence in pack_lengths(lengths, 100, seed)]

    assert as_lists(1) == as_lists(1) != as_lists(2)
    with pytest.raises(ValueError, match="row 1 has 120 tokens, more than a sequence of 100"):
        pack_lengths(np.array([100, 120]), 100, seed=0)


def packed_rows_of(processor, rows: list[dict], max_length: int = 100, seed: int = 0) -> PackedRows:
    collator = OlaVlmCollator(processor)
    known = GroupedRows(rows)
    known.lengths = np.array([len(collator.check_text(row).ids) for row in rows])
    return PackedRows(known, max_length, seed)


def test_sequences_of_rows(make_model, tmp_path):
    model, processor = make_model()
    rows = random_rows(16, IMAGES)
    packed = packed_rows_of(processor, rows, 100)
    found = [row["id"] for i in range(len(packed)) for row in packed[i]]
    assert sorted(found) == sorted(row["id"] for row in rows) and len(packed) < 16
    lengths = [packed.rows.lengths[[rows.index(row) for row in packed[i]]].sum() for i in range(len(packed))]
    assert max(lengths) <= 100
    assert packed.rows_per_sequence == 16 / len(packed)
    assert packed.padding == pytest.approx(1 - sum(lengths) / (100 * len(packed)))
    options = {"output_dir": str(tmp_path), "packing": True, "max_length": 100, "use_cpu": True, "max_steps": 4}
    args = OlaVlmArguments(**options, per_device_train_batch_size=2)
    plan = Plan.make(args, packed)
    assert plan.rows == 16 and plan.longest_row == 100
    assert plan.epochs == pytest.approx(4 / math.ceil(len(packed) / 2))
    text = plan.text(args, model)
    assert PackedRows(packed.rows, 100, 0, padding_free=True).describe().endswith("0.0% of them padding")
    assert f"saves to:            {tmp_path} (at the end)" in text
    for steps, saved in {1: "1 steps", 3: "3 steps", 0.5: "2 steps", 4: None, 45: None}.items():
        often = OlaVlmArguments(**options, per_device_train_batch_size=2, save_strategy="steps", save_steps=steps)
        (line,) = [one for one in plan.text(often, model).splitlines() if "saves to" in one]
        assert line.endswith("(at the end)" if saved is None else f"(at the end, checkpoints every {saved})")
    share = 100 * packed.padding
    assert f"packed sequences:    {len(packed)} of up to 100 tokens, {16 / len(packed):.1f} rows each" in text
    assert f"{share:.1f}% of them padding" in text and "2 packed sequences (2 a device x 1" in text
    args = OlaVlmArguments(**options, per_device_train_batch_size=99, dataloader_drop_last=True)
    with pytest.raises(ValueError, match=f"{len(packed)} packed sequences are fewer than a batch of 99 packed"):
        Plan.make(args, packed)


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)])
def test_the_order_of_sequences_is_resumed_exactly(make_model, tmp_path, step):
    """Within the first epoch, at the beginning of the second and within it; the last batch has one sequence."""
    model, processor = make_model()
    rows = random_rows(16, IMAGES)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 1}
    packed = packed_rows_of(processor, rows)
    assert len(packed) % 2 == 1
    whole = make_trainer(model, processor, tmp_path / "whole", rows=packed, **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        interrupted = make_model()[0]
        make_trainer(interrupted, processor, tmp_path, callbacks=[Interrupt(step)], rows=packed, **options).train()
    again = packed_rows_of(processor, rows)
    resumed = make_trainer(make_model(seed=1)[0], processor, tmp_path, rows=again, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step - 1}"))
    assert losses(resumed) == losses(whole)
    trained = weights(whole.model)
    assert all(value.equal(trained[name]) for name, value in weights(resumed.model).items())
    assert math.isfinite(resumed.evaluate()["eval_loss"])


def test_bad_rows_leave_their_sequence(make_model, tmp_path):
    """One of several, all of a sequence, all of the batch: as they leave a batch of plain rows."""
    model, processor = make_model()
    rows = random_rows(16, IMAGES)
    trainer = make_trainer(model, processor, tmp_path, drop_bad_rows=True)
    trainer.state.max_steps = 1000
    bad = [{"id": row["id"], "bad_row": BadRow("missing", "gone")} for row in rows]
    some = [bad[i] if i in (1, 3, 12) else row for i, row in enumerate(rows)]
    packed = losses_and_gradients(trainer, packed_of(some))
    assert_equal_steps(packed, losses_and_gradients(trainer, plain_of(some)))
    assert trainer.bad_rows == 6
    assert trainer.data_collator(packed_of(some))["input_ids"].shape[0] == len(PACKED) - 1
    none = trainer.data_collator(packed_of(bad))
    assert none["input_ids"].shape == (1, 2) and len(none["bad_rows"]) == 13 and "position_ids" not in none


def test_targets_that_come_later(make_model):
    """Teachers run in the training process: a row without a target leaves its sequence then."""
    model, processor = make_model()
    tasks = model.config.tasks
    rows = random_rows(16, IMAGES)
    sources = {task["name"]: target_source(task) for task in tasks}
    at_once = OlaVlmCollator(processor, sources, tasks)(packed_of(rows))
    later = OlaVlmCollator(processor, sources, tasks, targets_later=True)
    batch = later.add_targets(later(packed_of(rows)))
    assert batch["targets"]["depth"].equal(at_once["targets"]["depth"])
    bad = rows[2]["images"][0]

    def failing(images):
        target = target_source(tasks[0])(images)
        target[[image is bad or image.tobytes() == bad.tobytes() for image in images]] = math.nan
        return target

    later = OlaVlmCollator(processor, {**sources, "gen": failing}, tasks, drop_bad_rows=True, targets_later=True)
    batch = later.add_targets(later(packed_of(rows)))
    assert batch["row_ids"] == [row["id"] for row in plain_of(rows) if row is not rows[2]]
    assert len(batch["bad_rows"]) == 1 and batch["input_ids"].shape[0] == len(PACKED)
    assert (batch["position_ids"][0] == 0).sum() >= 2


# ----------------------------------------------------------------------------------------------------------- a run
@pytest.fixture
def fields(tiny_parts, tmp_path) -> dict:
    samples = [llava_sample(i, None if i % 3 == 0 else "a.png") for i in range(24)]
    data = write_llava(tmp_path / "data", samples, ["a.png"])
    run = {"vision_tower": tiny_parts.vision_tower, "language_model": tiny_parts.language_model, "data": str(data)}
    run |= {"packing": True, "max_length": 80, "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1}
    return run | {"use_cpu": True, "report_to": "none", "save_strategy": "no", "output_dir": str(tmp_path / "run")}


def test_a_run(fields, tmp_path, capsys):
    options = {"eval_data": "0.2", "gradient_accumulation_steps": 2, "tasks": []}
    trainer = train(OlaVlmArguments(**{**fields, **options}))
    rows = trainer.train_dataset
    assert isinstance(rows, PackedRows) and rows.rows_per_sequence > 2
    assert all(step["loss"] > 0 for step in losses(trainer)) and trainer.state.global_step == 3
    assert "of up to 80 tokens" in capsys.readouterr().out
    assert math.isfinite(trainer.state.log_history[-2].get("eval_loss", 1.0))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["packing"] is True and record["identity"]["packing"] is True


def test_sequences_are_drawn_by_data_seed_and_else_by_seed(fields, monkeypatch):
    drawn = []
    monkeypatch.setattr("ola_vlm.train.PackedRows", lambda rows, length, seed, *more: drawn.append(seed) or 1 / 0)
    for seeds in ({"seed": 3}, {"seed": 3, "data_seed": 5}, {"seed": 3, "data_seed": 0}):
        with pytest.raises(ZeroDivisionError):
            train(OlaVlmArguments(**{**fields, **seeds}))
    assert drawn == [3, 5, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": None}, "packing fills sequences of max_length tokens: give max_length"),
        ({"streaming": True}, "a stream doesn't tell: set packing=false"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy=group_by_length and packing exclude",
        ),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy=sequential and packing exclude"),
    ],
)
def test_wrong_fields_are_named(fields, changes, message):
    with pytest.raises(ValueError, match=message):
        OlaVlmArguments(**{**fields, **changes})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "packing is for ola_vlm, llava, multi_encoder_llava, not for qwen2_5_vl"),
        (
            {"model_type": "llava", "text_config": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}},
            "in mamba, packed rows would see each other",
        ),
    ],
)
def test_models_are_refused_before_anything_is_loaded(fields, tmp_path, monkeypatch, config, message):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(OlaVlmArguments, "load_rows", None)
    changes = {"vision_tower": None, "language_model": None, "checkpoint": str(folder)}
    with pytest.raises(ValueError, match=message):
        train(OlaVlmArguments(**{**fields, **changes}))


def test_attached_models_take_plain_rows(tmp_path):
    model, processor = qwen2_5_vl()
    task = {"name": "depth", "layers": [1], "target_length": 16, "target_dim": 6, "num_task_tokens": 0}
    attach_predictors(model, [{**task, "predictor_heads": 2, "predictor_head_dim": 8}], processor)
    rows = random_rows(4, 1)
    collator = AttachedCollator(processor)
    with pytest.raises(ValueError, match="not for attached predictors: give plain rows"):
        collator([rows])
    known = GroupedRows(rows)
    args = OlaVlmArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="not for attached predictors: give plain rows"):
        OlaVlmTrainer(model, args, data_collator=collator, train_dataset=PackedRows(known, 10**6, 0))


def test_the_share_of_bad_rows_is_one_of_rows(make_model, tmp_path):
    model, processor = make_model()
    packed = packed_rows_of(processor, random_rows(16, IMAGES), 300)
    trainer = make_trainer(model, processor, tmp_path, rows=packed, max_steps=1, per_device_train_batch_size=1)
    trainer.state = SimpleNamespace(max_steps=1, global_step=0)
    trainer.max_bad_rows = 0.5
    assert packed.rows_per_sequence > 4
    trainer._count_bad_rows([{"bad_rows": ["row 1"], "long_rows": []}], torch.device("cpu"))  # 1 of more than 4
    assert trainer.bad_rows == 1


def test_earlier_runs_did_not_pack():
    """A field that a checkpoint's version did not know does not make it another run's."""
    assert differences({"seed": 1}, {"seed": 1, "packing": False}) == ""
    assert differences({"seed": 1}, {"seed": 1, "packing": True}) == "packing False there, True here"
