"""DeepSpeed's ZeRO-2 and ZeRO-3 against one process: `python benchmarks/zero.py`, after `pip install deepspeed`.

Three steps and an evaluation of the tests' tiny models with recipes/accelerate/zero*.json, two gloo processes on CPUs
(it compiles DeepSpeed's operator for them first, some minutes); prints the largest relative difference of any loss.
The second process has no image in the first batch, and ZeRO-3 gathers every tensor where it is used: by default it
keeps those of less than 100,000 elements, all of a tiny model, on each process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The same models and rows as tests/test_sharding.py, which runs FSDP2.
sys.path.insert(0, str(ROOT / "tests"))

from sharded_worker import make_all_parts, prepare  # noqa: E402 (found by the path above)
from training_helpers import losses  # noqa: E402 (the same)

# OLA-VLM in its three stages, a multi-encoder baseline, and another family with attached predictors.
KINDS = ("ola_vlm", "ola_vlm_finetune", "ola_vlm_visual", "feature", "idefics3")
# Configuration -> what is changed in its "zero_optimization".
CONFIGS = {
    "zero2.json": {},
    "zero3.json": {"stage3_param_persistence_threshold": 0},
}


def run(folder: Path, kind: str, config: str, ranks: int) -> None:
    """This process's part; the first one writes what was logged."""
    options = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01}
    # Without one: one process without DeepSpeed, the run to compare with.
    if config:
        deepspeed = json.loads((ROOT / "recipes" / "accelerate" / config).read_text())
        deepspeed["zero_optimization"] |= CONFIGS[config]
        options["deepspeed"] = deepspeed
    out = folder / "runs" / f"{kind}{config}"
    trainer = prepare(kind, folder, out, ranks, **options)
    trainer.train()
    # On every process, like saving: ZeRO-3 gathers weights from all of them.
    metrics = trainer.evaluate(trainer.train_dataset[:8])
    trainer.save_model()
    # One process writes for all.
    if trainer.args.process_index == 0:
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval_loss")}
        (out / "losses.json").write_text(json.dumps([*losses(trainer), evaluated]))


def launch(folder: Path, kind: str, config: str = "", ranks: int = 1) -> tuple[list[dict], list[str]]:
    """The losses of each step and of the evaluation, and the names of the files that were saved."""
    # torchrun starts this file again, as a worker (`--worker`), once a process.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [__file__, "--worker", str(folder), kind, config, str(ranks)]
    # DeepSpeed looks for a GPU unless it is told.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} {config}: {done.stderr[-3000:]}")
    out = folder / "runs" / f"{kind}{config}"
    return json.loads((out / "losses.json").read_text()), sorted(path.name for path in out.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="models and stages; all by default")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, kind, config, ranks = args.worker
        run(Path(folder), kind, config, int(ranks))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_all_parts(folder)
        for kind in args.kinds:
            expected, expected_files = launch(folder, kind)
            for config in CONFIGS:
                logged, files = launch(folder, kind, config, ranks=2)
                # A sharded run must save the folder that an unsharded one saves.
                if files != expected_files:
                    raise SystemExit(f"{kind} {config}: it saves {files}, one process {expected_files}")
                differences = []
                for step, expected_step in zip(logged, expected, strict=True):
                    for loss, value in expected_step.items():
                        # Relative to one process's loss, which may be exactly 0.
                        differences.append(abs(step[loss] - value) / max(abs(value), 1e-9))
                # The last entry is the evaluation's.
                steps = len(logged) - 1
                print(f"{kind:<16} {config}: {steps} steps, largest relative difference {max(differences):.1e}")


if __name__ == "__main__":
    main()
