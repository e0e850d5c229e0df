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
sys.path.insert(0, str(ROOT / "tests"))

from sharded_worker import make_all_parts, prepare  # noqa: E402
from training_helpers import losses  # noqa: E402

KINDS = ("ola_vlm", "ola_vlm_finetune", "ola_vlm_visual", "feature", "idefics3")
CONFIGS = {  # configuration -> what is changed in its "zero_optimization"
    "zero2.json": {},
    "zero3.json": {"stage3_param_persistence_threshold": 0},
}


def run(folder: Path, kind: str, config: str, ranks: int) -> None:
    """This process's part; the first one writes what was logged."""
    options = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01}
    if config:
        deepspeed = json.loads((ROOT / "recipes" / "accelerate" / config).read_text())
        deepspeed["zero_optimization"] |= CONFIGS[config]
        options["deepspeed"] = deepspeed
    out = folder / "runs" / f"{kind}{config}"
    trainer = prepare(kind, folder, out, ranks, **options)
    trainer.train()
    metrics = trainer.evaluate(trainer.train_dataset[:8])
    trainer.save_model()
    if trainer.args.process_index == 0:
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval_loss")}
        (out / "losses.json").write_text(json.dumps([*losses(trainer), evaluated]))


def launch(folder: Path, kind: str, config: str = "", ranks: int = 1) -> tuple[list[dict], list[str]]:
    """The losses of each step and of the evaluation, and the names of the files that were saved."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [__file__, "--worker", str(folder), kind, config, str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
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
                if files != expected_files:
                    raise SystemExit(f"{kind} {config}: it saves {files}, one process {expected_files}")
                differences = []
                for step, expected_step in zip(logged, expected, strict=True):
                    for loss, value in expected_step.items():
                        differences.append(abs(step[loss] - value) / max(abs(value), 1e-9))
                steps = len(logged) - 1
                print(f"{kind:<16} {config}: {steps} steps, largest relative difference {max(differences):.1e}")


if __name__ == "__main__":
    main()
