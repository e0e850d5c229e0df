"""DeepSpeed's ZeRO-2 and ZeRO-3 against one process: `python benchmarks/zero.py`, after `pip install deepspeed`.

Three steps of each stage of the tests' tiny model with recipes/accelerate/zero*.json, two gloo processes on CPUs (it
compiles DeepSpeed's operator for them first, some minutes); prints the largest relative difference of any loss.
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

from conftest import make_parts  # noqa: E402
from distributed_worker import build  # noqa: E402
from training_helpers import losses, make_trainer  # noqa: E402

ZERO = {"": 1, "zero2.json": 2, "zero3.json": 2}  # configuration -> processes


def run(folder: Path, stage: str, config: str) -> None:
    """This process's part; the first one writes what was logged."""
    model, processor = build(folder)
    options = {"deepspeed": str(ROOT / "recipes" / "accelerate" / config)} if config else {}
    options |= {"per_device_train_batch_size": 8 // ZERO[config], "max_steps": 3, "optim": "adamw_torch"}
    trainer = make_trainer(model, processor, folder / f"{stage}{config}", stage=stage, **options)
    trainer.train()
    trainer.save_model()
    if trainer.args.process_index == 0:
        (folder / f"{stage}{config}.json").write_text(json.dumps(losses(trainer)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, stage, config = args.worker
        run(Path(folder), stage, config)
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as name:
        make_parts(folder := Path(name))
        for stage in ("pretrain", "finetune"):
            logged = {}
            for config, processes in ZERO.items():
                launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
                command = [sys.executable, *launch, __file__, "--worker", name, stage, config]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                logged[config] = json.loads((folder / f"{stage}{config}.json").read_text())
            for config in list(ZERO)[1:]:
                pairs = zip(logged[config], logged[""], strict=True)
                worst = max(abs(two[k] - one[k]) / max(abs(one[k]), 1e-9) for two, one in pairs for k in one)
                print(f"{stage:<9} {config}: {len(logged[config])} steps, largest relative difference {worst:.1e}")


if __name__ == "__main__":
    main()
