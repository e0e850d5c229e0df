"""Kills a training run again and again, and asks whether the weights suffer: `python benchmarks/kill.py [--kills 20]`.

A short pre-training of the miniature is killed (SIGKILL) at random moments: every other time at any moment from its
start on, while it loads, computes targets or trains; else as it writes a checkpoint. Each time it is started again
with --resume_from_checkpoint true. In the end its weights must equal, bit by bit, those of an undisturbed run.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

from ola_vlm.miniature.study import SHRUNK
from ola_vlm.world.dataset import write_world


def command(folder: Path, name: str, steps: int) -> list[str]:
    fields = {
        "data": folder / "data" / "pretrain.json", "image_folder": folder / "data" / "images", "max_steps": steps,
        "output_dir": folder / name, "target_cache": folder / f"{name}_targets", "per_device_train_batch_size": 8,
        "save_steps": 2, "save_total_limit": 2, "resume_from_checkpoint": "true", "disable_tqdm": "true",
    }  # fmt: skip
    options = (f"--{field}={value}" for field, value in fields.items())
    return [sys.executable, "-m", "ola_vlm.train", "--recipe", "miniature_pretrain", *options]


def checkpoints(run: Path) -> set[str]:
    return {path.name for path in run.glob("checkpoint-*")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_world(folder / "data", SHRUNK["sizes"], SHRUNK["questions"])
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
        start, whole = time.time(), subprocess.Popen(command(folder, "whole", args.steps), **options)
        while whole.poll() is None and not checkpoints(folder / "whole"):
            time.sleep(0.1)
        first = time.time() - start  # loading, and two steps
        if whole.wait():
            raise SystemExit("the undisturbed run failed")
        run, torn = folder / "killed", 0
        for kill in tqdm(range(args.kills), desc="kills"):
            process, before = subprocess.Popen(command(folder, "killed", args.steps), **options), checkpoints(run)
            seen, while_saving, until = set(before), kill % 2 == 1, time.time() + rng.uniform(0, 1.5 * first)
            number = len(seen) + rng.randint(1, 3)  # of the checkpoint that it dies with
            while process.poll() is None and (len(seen) < number if while_saving else time.time() < until):
                time.sleep(0.001)
                seen |= checkpoints(run)
            if while_saving:
                time.sleep(rng.uniform(0, 0.1))  # at its beginning, in the middle or just after it
            if process.poll() is not None:
                raise SystemExit(f"the run ended by itself after {kill} kills: give more --steps")
            process.kill()
            process.wait()
            whole = {state.parent.name for state in run.glob("checkpoint-*/trainer_state.json")}
            torn += bool(checkpoints(run) - before - whole)
        subprocess.run(command(folder, "killed", args.steps), check=True, **options)
        expected, found = (load_file(folder / name / "model.safetensors") for name in ("whole", "killed"))
        different = [name for name, value in expected.items() if not value.equal(found[name])]
    print(f"{args.steps} steps, killed {args.kills} times, {torn} times with a checkpoint half written")
    print(f"tensors that differ from the undisturbed run's: {len(different)} of {len(expected)} {different[:3]}")
    if different or expected.keys() != found.keys():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
