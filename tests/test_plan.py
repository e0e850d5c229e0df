"""The plan's numbers against ones that are counted by hand."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import plan

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


def test_checkpoints_on_disk():
    """DeepSpeed's have the weights twice, for `from_pretrained` and for resuming."""
    sizes = plan.Sizes(trained=8_000_000_000, frozen=300_000_000, block=0, root=0)
    for strategy in ("DDP", "FSDP2"):
        on_disk = plan.checkpoint_bytes(strategy, sizes)
        assert on_disk == {"model": 16.6e9, "resume": 32.6e9 + 64e9, "save_only_model": 32.6e9}
    assert plan.checkpoint_bytes("ZeRO-2", sizes)["resume"] == 2 * 16.6e9 + 96e9
