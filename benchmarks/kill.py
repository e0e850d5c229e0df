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
        # Checkpoints come often, so that a random moment hits one being written.
        "save_steps": 2, "save_total_limit": 2, "resume_from_checkpoint": "true", "disable_tqdm": "true",
    }  # fmt: skip
    options = (f"--{field}={value}" for field, value in fields.items())
    return [sys.executable, "-m", "ola_vlm.train", "--recipe", "miniature_pretrain", *options]


def checkpoints(run: Path) -> set[str]:
    # Complete ones, and one that is being written or was when the run was killed.
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
        start = time.time()
        # The run to compare with; it also shows how long a start takes.
        whole = subprocess.Popen(command(folder, "whole", args.steps), **options)
        while whole.poll() is None and not checkpoints(folder / "whole"):
            time.sleep(0.1)
        # Seconds of loading, of computing targets and of two steps: until then there is nothing to resume from.
        first = time.time() - start
        if whole.wait():
            raise SystemExit("the undisturbed run failed")
        run = folder / "killed"
        torn = 0
        for kill in tqdm(range(args.kills), desc="kills"):
            process = subprocess.Popen(command(folder, "killed", args.steps), **options)
            before = checkpoints(run)
            # Grows only, while the run deletes old checkpoints (`save_total_limit`).
            seen = set(before)
            # Every other kill waits for a checkpoint to appear, the others for a random time.
            while_saving = kill % 2 == 1
            until = time.time() + rng.uniform(0, 1.5 * first)
            # Of the checkpoint that it dies with.
            number = len(seen) + rng.randint(1, 3)
            while process.poll() is None:
                is_time = len(seen) >= number if while_saving else time.time() >= until
                if is_time:
                    break
                # Looked at often: a small model's checkpoint is soon written.
                time.sleep(0.001)
                seen.update(checkpoints(run))
            if while_saving:
                # At its beginning, in the middle or just after it.
                time.sleep(rng.uniform(0, 0.1))
            if process.poll() is not None:
                raise SystemExit(f"the run ended by itself after {kill} kills: give more --steps")
            process.kill()
            process.wait()
            # trainer_state.json is written last: a checkpoint that lacks it was cut short, and isn't resumed from.
            whole = {state.parent.name for state in run.glob("checkpoint-*/trainer_state.json")}
            torn += bool(checkpoints(run) - before - whole)
        # At last undisturbed, to its end.
        subprocess.run(command(folder, "killed", args.steps), check=True, **options)
        expected, found = (load_file(folder / name / "model.safetensors") for name in ("whole", "killed"))
        different = [name for name, value in expected.items() if not value.equal(found[name])]
    print(f"{args.steps} steps, killed {args.kills} times, {torn} times with a checkpoint half written")
    print(f"tensors that differ from the undisturbed run's: {len(different)} of {len(expected)} {different[:3]}")
    if different or expected.keys() != found.keys():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
