"""An adapter (LoRA) and its base model -> one checkpoint without adapters: `ola-vlm merge` (commands/merge.py)."""

import shutil
from argparse import Namespace
from pathlib import Path

from ..commands.running import command, tell
from ..inference.checkpoints import adapter_base, read_checkpoint
from ..training.run_record import statistics_files

RECORD = "run.json"  # model cards tell the history from it


def merge(adapter: str | Path, out: str | Path) -> None:
    """Writes model, processor and the run's record to `out`. ValueError, one line, if `adapter` is none, if `out` is
    not empty, or if the adapter or its base model can't be loaded whole."""
    adapter, out = str(adapter), Path(out)
    if adapter_base(adapter) is None:
        raise ValueError(f"{adapter} has no adapter_config.json: it is no adapter")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: choose another OUT")
    model, processor = read_checkpoint(adapter, dtype="auto")
    model.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)
    if (Path(adapter) / RECORD).is_file():
        shutil.copyfile(Path(adapter) / RECORD, out / RECORD)
    for file in statistics_files(adapter):
        (out / file.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(file, out / file.parent.name / file.name)


@command("merge")
def main(args: Namespace) -> None:
    merge(args.adapter, args.out)
    print(f"Wrote the merged checkpoint to {args.out}.")
    tell(f"Next: ola-vlm chat {args.out} IMAGE, or ola-vlm push {args.out} OWNER/NAME")
