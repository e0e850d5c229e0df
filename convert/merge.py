"""An adapter (LoRA) and its base model -> one checkpoint without adapters: `ola-vlm merge` (commands/merge.py)."""

import logging
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

from ..commands.running import command, tell
from ..files.strangers import inside, read_object
from ..files.writing import check_empty
from ..inference.checkpoints import adapter_base, read_checkpoint
from ..targets.statistics import FOLDER, own_statistics, statistics_in
from ..training.run_record import RUN_FILE, is_checkpoint_name, statistics_files, steps_in, write_run

logger = logging.getLogger(__name__)


def merge(adapter: str | Path, out: str | Path) -> None:
    """Writes model, processor, the run's record and its targets' statistics to `out`. ValueError, one line, if
    `adapter` is none, if `out` is not empty, or if the adapter or its base model can't be loaded whole."""
    adapter = str(adapter)
    out = Path(out)
    base = adapter_base(adapter)
    if base is None:
        raise ValueError(f"{adapter} has no adapter_config.json: it is no adapter")
    # Wrong arguments are refused before the base model is read, which may take minutes.
    check_empty(out)
    record = record_file(adapter)
    own = own_statistics(adapter)
    # It merges: what it gives for an adapter is a model of the base's class.
    model, processor = read_checkpoint(adapter, dtype="auto")
    model.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)
    if record is not None:
        write_record(record, adapter, out)
    # What predictors of standardized targets give can be decoded with these alone.
    if getattr(model.config, "tasks", None) and getattr(model.config, "has_predictors", True):
        copy_statistics(own or statistics_of_base(base), adapter, out)


def record_file(adapter: str) -> Path | None:
    """The training run's run.json, from which model cards tell the history. It lies in the run's folder, not in its
    checkpoints."""
    folder = Path(adapter)
    if not (folder / RUN_FILE).is_file() and is_checkpoint_name(folder.name):
        folder = folder.parent
    if not (folder / RUN_FILE).is_file():
        return None
    return inside(folder, RUN_FILE)


def write_record(file: Path, adapter: str, out: Path) -> None:
    """With the steps that the adapter has seen: the trainer's state, which has them, stays behind."""
    record = read_object(file)
    steps = steps_in(adapter, record)
    if steps == record.get("finished_steps"):
        shutil.copyfile(file, out / RUN_FILE)
    else:
        write_run(out, {**record, "finished_steps": steps})


def statistics_of_base(base: str) -> list[Path]:
    """Those in the base model's own folder, if it is a local one: of predictors that the adapter left as they were.
    They may be copied, since all of that folder's weights go into the merged model, too; its links are not followed
    to elsewhere."""
    return [inside(base, file.relative_to(base)) for file in statistics_in(base)]


def copy_statistics(files: list[Path], adapter: str, out: Path) -> None:
    for file in files:
        (out / FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(file, out / FOLDER / file.name)
    if files:
        return
    # Only looked at: what is merged is published later, and run.json must not choose that.
    elsewhere = statistics_files(adapter)
    if elsewhere:
        place = elsewhere[0].parent
        copy = shlex.join(["cp", "-r", str(place), str(out / FOLDER)])
        logger.warning(
            f"{out} lacks the targets' statistics, which run.json says are in {place}: with them its predictors' "
            f"output gets its units and can be drawn (`ola-vlm visualize`); answers don't need them. If that folder "
            f"is yours, add them: {copy}"
        )


@command("merge")
def main(args: Namespace) -> None:
    merge(args.adapter, args.out)
    print(f"Wrote the merged checkpoint to {args.out}.")
    tell(f"Next: ola-vlm chat {args.out} IMAGE, or ola-vlm push {args.out} OWNER/NAME")
