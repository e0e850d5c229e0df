"""The benchmarks' numbers against ones that are counted by hand: the plan's, packing's and density's."""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import density
import packing
import plan
from step import METHODS, Step

from ola_vlm.targets.cache import _encode

LLM = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
LLM |= {"num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
ROWS, WORDS, SUPERVISED, GRID, BATCH = 2, 20, 5, 4, 8
TASK = {"name": "depth", "target_length": 16, "target_dim": 8, "num_task_tokens": 4, "layers": [1, 2]}
TASK |= {"predictor_heads": 2, "predictor_head_dim": 8}
# Parameters by hand. The vocabulary has 64 rows more, for <image> and task tokens.
TABLE = (128 + 64) * 64
LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64  # q and o, k and v (half as wide), the MLP, two norms
LANGUAGE_MODEL = 2 * TABLE + 3 * LAYER + 64
PROJECTOR = 32 * 64 + 64 + 64 * 64 + 64
TOWER_LAYER = 4 * (32 * 32 + 32) + 32 * 64 + 64 + 64 * 32 + 32 + 2 * 2 * 32
VISION_TOWER = (
    3 * TOWER_LAYER + 32 + 3 * 14 * 14 * 32 + (GRID**2 + 1) * 32 + 2 * 2 * 32
)  # class, patches, places, norms


def step(tasks=(), dtype=torch.float32, **options) -> dict:
    config = plan.student_config(LLM, TOWER, list(tasks), grid=GRID)
    return plan.count_step(config, ROWS, WORDS, SUPERVISED, dtype, batch=BATCH, **options)


def test_no_weight_is_counted_as_an_activation():
    """What a linear layer keeps is its weight's transpose, a view."""
    with FakeTensorMode():
        first, second = nn.Linear(8, 6, bias=False), nn.Linear(6, 4, bias=False)
        x = torch.empty(5, 8)

        def run():
            second(F.relu(first(x))).sum().backward()

        flops, kept = plan.count(run, [*first.parameters(), *second.parameters()])
        _, with_weights = plan.count(run)
    assert kept == 4 * (5 * 8 + 5 * 6)  # the input, and once what the activation gives
    assert with_weights == kept + 4 * 6 * 4  # the first layer's input wants no gradient
    assert flops == 2 * 5 * (2 * 8 * 6 + 3 * 6 * 4)


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("pretrain", PROJECTOR),
        ("finetune", PROJECTOR + LANGUAGE_MODEL),
        ("visual_pretrain", PROJECTOR + LANGUAGE_MODEL + VISION_TOWER),
    ],
)
def test_parameters_by_stage(stage, trained):
    sizes = step(stage=stage)["sizes"]
    assert sizes.trained == trained
    assert sizes.trained + sizes.frozen == PROJECTOR + LANGUAGE_MODEL + VISION_TOWER
    assert sizes.block == LAYER
    assert sizes.root == PROJECTOR + LANGUAGE_MODEL + VISION_TOWER - 3 * LAYER - 3 * TOWER_LAYER


def test_columns_are_all_targets_of_the_step():
    """Of 8 rows on this GPU and others, once however many layers there are, and an fp32 copy while a loss is made."""
    values = BATCH * 16 * 8
    assert step([TASK])["columns"] == 4 * values
    assert step([TASK], torch.bfloat16)["columns"] == (2 + 4) * values
    wide = TASK | {"name": "seg", "target_dim": 12}
    assert step([TASK, wide], torch.bfloat16)["columns"] == 2 * (values + BATCH * 16 * 12) + 4 * BATCH * 16 * 12
    assert step([TASK], stage="finetune")["columns"] == step()["columns"] == 0
    # They aren't counted as activations, too.
    more = plan.student_config(LLM, TOWER, [TASK], grid=GRID)
    few, many = (plan.count_step(more, ROWS, WORDS, SUPERVISED, batch=batch) for batch in (8, 800))
    logits = 3 * 2 * ROWS * 792 * 4  # similarities of two layers, their scaling and their softmax
    assert 0 < many["kept"] - few["kept"] <= 2 * logits


def test_checkpointing_keeps_little_and_computes_a_forward_pass_more():
    plain, less = (
        step(stage="finetune", dtype=torch.bfloat16, is_sharded=True, checkpointing=c) for c in (False, True)
    )
    tokens = ROWS * (GRID**2 + WORDS)
    states = 3 * 2 * tokens * 64  # each layer's input
    assert states <= less["kept"] < plain["kept"] / 4
    layers = 2 * tokens * (LAYER - 2 * 64)
    attention = 3 * 4 * tokens * (GRID**2 + WORDS) * 64
    last = 3 * 2 * tokens * 64 * 96  # a layer's last product needs not be made again
    assert 3 * layers + attention - last <= less["flops"] - plain["flops"] <= 3 * layers + attention


def test_autocast_keeps_a_bf16_copy_of_what_trains():
    """By DDP; sharded weights are gathered as bf16. With checkpointing the layers' copies are made again."""
    by_ddp, sharded = (step(stage="finetune", dtype=torch.bfloat16, is_sharded=s) for s in (False, True))
    assert by_ddp["kept"] - sharded["kept"] >= 2 * (LANGUAGE_MODEL - 2 * TABLE - 7 * 64)


def test_memory_of_each_strategy():
    """8e9 trained parameters and 3e8 frozen ones on 16 GPUs, blocks of 2e8 and 1e9 outside of them; in GB."""
    sizes = plan.Sizes(trained=8_000_000_000, frozen=300_000_000, block=200_000_000, root=1_000_000_000)
    gigabytes = {
        strategy: {name: value / 1e9 for name, value in plan.training_memory(strategy, 16, sizes).items()}
        for strategy in plan.STRATEGIES
    }
    # fp32 weights, gradients, two moments: 16 bytes a parameter; buckets of gradients, bf16 copies of weights.
    ddp = {"weights": 32.6, "gradients": 32, "optimizer": 64, "in flight": 32 + 16}
    fsdp2 = {"weights": 32.6 / 16, "gradients": 2, "optimizer": 4, "in flight": 2 * 1.4 + 2 * 1.2 + 4 * 1.0}
    zero2 = {"weights": 16.6, "gradients": 1, "optimizer": 6, "in flight": 3}
    zero3 = {"weights": 16.6 / 16, "gradients": 1, "optimizer": 6, "in flight": 4}
    for strategy, expected in zip(plan.STRATEGIES, (ddp, fsdp2, zero2, zero3), strict=True):
        assert gigabytes[strategy] == pytest.approx(expected)
    with pytest.raises(ValueError, match="'FSDP3' is not one of"):
        plan.training_memory("FSDP3", 16, sizes)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch, capsys):
    """240 rows were counted as 256, and none at all on more GPUs than rows."""
    assert plan.rows_a_gpu(256, 16) == 16
    monkeypatch.setattr(plan, "count_teachers", None)
    for gpus, match in (
        ("24", "--batch 256 doesn't divide among --gpus 24: give a batch of 240 or 264"),
        ("300", "--batch 256 doesn't divide among --gpus 300: give a batch of 300"),
        ("0", "--gpus is 0: give at least 1"),
    ):
        monkeypatch.setattr("sys.argv", ["plan.py", "--gpus", gpus])
        with pytest.raises(SystemExit):
            plan.main()
        assert match in capsys.readouterr().err


def test_checkpoints_on_disk():
    """DeepSpeed's have the weights twice, for `from_pretrained` and for resuming."""
    sizes = plan.Sizes(trained=8_000_000_000, frozen=300_000_000, block=0, root=0)
    for strategy in ("DDP", "FSDP2"):
        on_disk = plan.checkpoint_bytes(strategy, sizes)
        assert on_disk == {"model": 16.6e9, "resume": 32.6e9 + 64e9, "save_only_model": 32.6e9}
    assert plan.checkpoint_bytes("ZeRO-2", sizes)["resume"] == 2 * 16.6e9 + 96e9


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_that_the_step_benchmark_times_learns(method):
    """Its losses are there, and its projector moves; the language model doesn't, as in pre-training."""
    measured = Step(method, hidden_size=64, rows=1)
    model = measured.trainer.model
    projector = model.model.multi_modal_projector.linear_1.weight
    language_model = model.model.language_model.layers[0].mlp.up_proj.weight
    before = projector.detach().clone(), language_model.detach().clone()
    measured()
    assert not projector.equal(before[0]) and language_model.equal(before[1])
    sums = measured.trainer._sums["train"]
    assert sums["loss/ntp"] > 0
    for task in model.config.tasks:
        assert sums[f"loss/{task['name']}/{task['layers'][0]}/{task['loss']}"] > 0
    assert len(measured.teachers) == (3 if method == "OLA-VLM, with teachers" else 0)


# What the plan prints -----------------------------------------------------------------------------------------------
ONE_BILLION = plan.Sizes(trained=1_000_000_000, frozen=0, block=0, root=0)


def test_hours_and_memory_of_pretraining(monkeypatch, capsys):
    """4 GPUs at half of 100 TFLOP/s take 20 s for 1 PFLOP each; 3,200 images are 100 steps of 32."""
    asked = []

    def count_step(config, rows, words, supervised, dtype, checkpointing, batch):
        asked.append((rows, words, supervised, batch))
        return {"flops": 1e15, "kept": 1e9, "columns": 2e9, "sizes": ONE_BILLION}

    monkeypatch.setattr(plan, "count_step", count_step)
    args = Namespace(gpus=4, peak_tflops=100, utilization=0.5, images=3200, words=9, supervised=3, batch=32)
    plan.print_pretraining(args)
    assert set(asked) == {(8, 9, 3, 32)} and len(asked) == 6
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("  LLaVA", "  OLA-VLM"))]
    hours = round(20 * 100 / 3600, 2)
    for line in lines:
        title, numbers = line[:34], line[34:].split()
        # Weights, gradients, moments, and copies in flight: 4 + 4 + 8 + 6 bytes a parameter.
        assert list(map(float, numbers)) == [4.0, 20.0, hours, 1.0, 2.0, 22.0, 25.0], title
    assert len(lines) == 6


def test_memory_of_finetuning_is_of_the_strategys_own_step(monkeypatch, capsys):
    """Only DDP's products cast the weights; what doesn't fit is said."""

    def count_step(config, rows, words, supervised, dtype, stage, checkpointing, is_sharded):
        # An image's tokens, the task tokens and the words are a row as long as they come.
        assert config.image_seq_length + len(config.task_token_ids) + words == 2048
        return {"kept": 5e9 if is_sharded else 70e9, "sizes": ONE_BILLION}

    monkeypatch.setattr(plan, "count_step", count_step)
    plan.print_finetuning(Namespace(gpus=10, finetune_rows=8, finetune_supervised=700))
    starts = tuple(f"  {strategy} " for strategy in plan.STRATEGIES)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(starts)]
    assert len(lines) == 8
    for line in lines:
        strategy, *numbers = line.replace("more than 80", "").split()
        *_, kept, whole = map(float, numbers)
        assert kept == (70 if strategy == "DDP" else 5)
        assert whole == pytest.approx(sum(map(float, numbers[:-1])), abs=0.3)
        assert ("more than 80" in line) == (strategy == "DDP")


def test_the_cache_takes_as_many_bytes_a_number_as_planned():
    for storage, size in plan.BYTES.items():
        stored = _encode(torch.randn(3, 4, 1024), getattr(torch, storage))
        assert sum(part.nbytes for part in stored.values()) == 3 * 4 * 1024 * size


# Packing ------------------------------------------------------------------------------------------------------------
def test_tokens_and_flops_of_batches():
    """Two sequences, of two rows and of one, and a batch of a single row; a layer of Llama-3-8B has 218,103,808
    weights."""
    batches = packing.Batches([[[3, 2], [2]], [[1]]], is_packed=True)
    assert (batches.needed, batches.computed) == (8, 2 * 5 + 1)
    joined = batches._replace(padding_free=True)
    assert (joined.needed, joined.computed) == (8, 8)
    within_rows = (3**2 + 2**2 + 2**2 + 1) / 2
    of_sequences = 5**2 + 5**2 + 1
    assert batches.flops(skips=True) == 32 * (2 * 218_103_808 * 11 + 4 * 4096 * within_rows)
    assert batches.flops(skips=False) == 32 * (2 * 218_103_808 * 11 + 4 * 4096 * of_sequences)
    assert joined.flops(skips=True) == 32 * (2 * 218_103_808 * 8 + 4 * 4096 * within_rows)


def test_every_row_is_in_one_batch():
    lengths = np.random.default_rng(0).integers(10, 60, 50)
    packed = packing.packed_batches(lengths, max_length=100, sequences=4)
    assert packed.is_packed and all(len(batch) == 4 for batch in packed.batches[:-1])
    sequences = [rows for batch in packed.batches for rows in batch]
    assert max(map(sum, sequences)) <= 100
    assert sorted(length for rows in sequences for length in rows) == sorted(lengths)
    one_each = packing.random_batches(lengths, rows=8)
    assert sorted(rows for batch in one_each.batches for rows in batch) == [[length] for length in sorted(lengths)]
    assert not one_each.is_packed and one_each.needed == packed.needed == lengths.sum()


def test_made_up_lengths_are_as_long_as_published(monkeypatch):
    """The mixture's rows, how many have no image, and a source's mean, which the spread doesn't move."""
    lengths, has_image = packing.make_rows()
    assert (len(lengths), int((~has_image).sum()), lengths.max()) == (665_298, 40_688, packing.MAX_LENGTH)
    monkeypatch.setattr(packing, "SOURCES", {"one": packing.Source(20_000, 300, 0.4)})
    lengths, has_image = packing.make_rows()
    assert lengths.mean() - 576 - 35 == pytest.approx(300, rel=0.01) and has_image.all()


def test_batches_to_time_are_of_all_sizes():
    epoch = packing.Batches([[[need]] for need in (5, 3, 6, 1, 4, 2)], is_packed=True)
    chosen = packing.evenly(epoch, 3)
    assert chosen.batches == [[[2]], [[4]], [[6]]] and chosen.is_packed


# Density ------------------------------------------------------------------------------------------------------------
SOURCE = """\
# a comment of its own

x = {"a": 1} | y
m |= {"a": 1}
flags = first | second
a, b = 1, 2
c = d if e else f
g = [[i for i in row] for row in rows]
h = [i for row in rows for i in row]
k = [i for i in row]
print(n := 3)
call(*a, *b, c)
def f():
    # why
    return 1
"""


def test_what_is_packed_into_lines_is_counted(tmp_path):
    (tmp_path / "x.py").write_text(SOURCE)
    found = density.measure(tmp_path / "x.py")
    code = [line for line in SOURCE.splitlines() if line and not line.strip().startswith("#")]
    assert (found.code_lines, found.comment_lines, found.characters) == (12, 2, sum(map(len, code)))
    # Neither bits that are joined, nor the inner comprehension once more, nor one over a single loop.
    expected = {"merges": 2, "tuples": 1, "nested": 2, "conditionals": 1, "walruses": 1, "splats": 2}
    assert found.packings == expected and found.function_lengths == [3]


def test_a_row_of_the_density_table():
    """Rates are per 1,000 code lines; of ten functions of 1 to 10 lines the ninth marks 90%."""
    first = density.Density(150, 6000, 20, density.Counter(merges=1), [10, 1, 9, 2, 8])
    first.add(density.Density(50, 2000, 10, density.Counter(merges=1, splats=3), [3, 7, 4, 6, 5]))
    assert first.row() == [200, 10, 0, 0, 0, 0, 15, 15, 40, 9]
    assert density.Density().row() == [0] * 10


def test_density_is_of_the_product():
    rooms = {density.room_of(file) for file in density.product_files()}
    assert {"(root)", "training", "space", "benchmarks", "docs"} <= rooms and "tests" not in rooms
    assert not any("weights" in file.parts for file in density.product_files())
