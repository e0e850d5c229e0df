"""Two processes equal one: losses and, with SGD, weights; contrastive term on, image rows unequal among ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import RUNS, run
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
    for expected, step in zip(one["losses"], two["losses"], strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)
        if stage == "pretrain":
            assert step["loss/depth/3/contrastive"] > 0 and step["loss/gen/2/smooth_l1"] > 0
    for name, value in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], value, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-5, abs=1e-6)
