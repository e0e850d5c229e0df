"""Two processes equal one: losses and, with SGD, weights; contrastive term on, image rows unequal among ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import BAD, RUNS, build, run, run_bad_rows, run_check, run_packed, run_sharded, run_stream
from training_helpers import IMAGES

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def two_processes(tiny_parts, tmp_path_factory):
    """The folder with what rank 0 of two saved; one launch for all runs."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(TESTS / "distributed_worker.py"), str(tiny_parts.folder), str(out)]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def assert_same(one: dict, two: dict):
    for expected, step in zip(one["losses"], two["losses"], strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name, value in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], value, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("stage", "accumulation"), RUNS)
def test_two_processes_equal_one(tiny_parts, two_processes, tmp_path, stage, accumulation):
    # Rows are dealt out in batches of 8 // 2 // accumulation, in turn to rank 0 and rank 1.
    size = 4 // accumulation
    dealt = [[sum(IMAGES[i : i + size]) for i in range(rank * size, 16, 2 * size)] for rank in range(2)]
    assert dealt[0] != dealt[1] and 0 in dealt[1]  # unequal, and a rank with text only

    run(tiny_parts.folder, tmp_path, stage, ranks=1, accumulation=1)
    one = torch.load(tmp_path / f"{stage}-1.pt")
    two = torch.load(two_processes / f"{stage}-{accumulation}.pt")
    assert len(one["losses"]) == len(two["losses"]) == 3
    assert_same(one, two)
    for step in two["losses"] if stage == "pretrain" else ():
        assert step["loss/depth/3/contrastive"] > 0 and step["loss/gen/2/smooth_l1"] > 0
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-5, abs=1e-6)
    # One prediction a row, in the rows' order, though the second rank's last batch is filled up.
    assert len(two["logits"]) == 11
    torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-5, atol=1e-5)


def test_a_rank_that_loses_all_its_rows_keeps_in_step(tiny_parts, two_processes, tmp_path):
    run_bad_rows(tiny_parts.folder, tmp_path, ranks=1)
    one, two = (torch.load(folder / "bad_rows.pt") for folder in (tmp_path, two_processes))
    assert_same(one, two)
    assert one["bad_rows"] == two["bad_rows"] == len(BAD)


def test_ranks_share_a_stream(tiny_parts, two_processes, tmp_path):
    run_stream(tiny_parts.folder, tmp_path, ranks=1)
    assert_same(*(torch.load(folder / "stream.pt") for folder in (tmp_path, two_processes)))


def test_ranks_share_packed_sequences(tiny_parts, two_processes, tmp_path):
    run_packed(tiny_parts.folder, tmp_path, ranks=1)
    one, two = (torch.load(folder / "packed.pt") for folder in (tmp_path, two_processes))
    assert_same(one, two)
    assert len(two["uneven"]) == 4
    # Of the step that isn't full, accelerate gives a rank without a sequence an earlier one again.
    for i in (0, 2):
        assert two["uneven"][i]["loss"] > 0 and two["uneven"][0] == pytest.approx(one["uneven"][0], rel=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_two_shards_equal_one_process(tiny_parts, two_processes, tmp_path, stage):
    """FSDP2: the same weights, the task tokens written (pre-training) or bit-frozen (fine-tuning)."""
    run_sharded(tiny_parts.folder, tmp_path, ranks=1, stage=stage)
    one, two = (torch.load(folder / f"sharded-{stage}.pt") for folder in (tmp_path, two_processes))
    assert_same(one, two)
    model, _ = build(tiny_parts.folder)
    rows, ids = model.get_input_embeddings().weight, model.config.task_token_ids
    now = two["weights"]["model.language_model.embed_tokens.weight"]
    moved, others_moved = not now[ids].equal(rows[ids]), not now[:10].equal(rows[:10])
    assert (moved, others_moved) == ((True, False) if stage == "pretrain" else (False, True))
    if stage == "pretrain":
        assert now[ids].equal(model.task_token_embeddings({n: two["weights"][f"queries.{n}"] for n in model.queries}))


def test_grouped_batches_are_resumed_by_all_ranks(two_processes):
    grouped = torch.load(two_processes / "grouped.pt")
    assert len(grouped["losses"]) == 10
    for step, expected in zip(grouped["losses"], grouped["whole"], strict=True):
        assert step == pytest.approx(expected, rel=1e-6)


def test_ranks_share_the_check_of_the_rows(tiny_parts, two_processes, tmp_path):
    run_check(tiny_parts.folder, tmp_path)
    alone, *ranks = (torch.load(p) for p in (tmp_path / "check-0.pt", *sorted(two_processes.glob("check-*.pt"))))
    assert alone["numbers"].shape == (5, 15) and len(ranks) == 2
    assert all(rank["numbers"].equal(alone["numbers"]) for rank in ranks)
    assert [bad["row"] for bad in alone["named"]] == ["row-4", "row-7"]
    assert all(rank["named"] == alone["named"] for rank in ranks)  # also those that the other one looked at
