"""What a run says of itself: run.json (its one writer and reader), its identity, and who may write into its folder.

A run is what its identity says: the fields that decide what is trained on what, in which order and how. Each
checkpoint carries it, so that a run goes on from its own checkpoints only. What may change when a run goes on: where
its files lie, what it logs, saves and evaluates, the devices, and how a step's rows are divided among processes and
accumulated micro-batches.
"""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TextIO

import numpy as np
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..targets.files import entries_of, read_object, write_whole
from ..targets.statistics import TargetStatistics, statistics_in
from .arguments import OlaVlmArguments
from .rows import JsonRows, Rows, StreamRows

logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
LOCK_FILE = ".run.lock"
STATE_FILE = "trainer_state.json"  # of a checkpoint; what is written last
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
SAMPLED_ROWS = 1000
# Of transformers' own fields those that decide what is learned, but for the batch.
DECIDING = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "optim_target_modules",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "dataloader_drop_last",
    "train_sampling_strategy",
)
# Of our own fields those that decide nothing: data and images are known by their content, cached targets are those
# that teachers would give.
FREE = {
    "data",
    "image_folder",
    "target_cache",
    "target_fill",
    "check_images",
    "max_bad_rows",
    "eval_data",
    "eval_questions",
}
PLACES = ("checkpoint", "vision_tower", "language_model", "tokenizer")  # names, or folders
REMEDY = "choose another --output_dir, or move that run away"


def write_run(folder: str | Path, record: dict) -> None:
    """run.json, as a whole or not at all."""
    write_whole(Path(folder) / RUN_FILE, (json.dumps(record, indent=2) + "\n").encode())


def record_in(folder: str | Path) -> dict | None:
    """What the run.json in this very folder says; None if there is none. ValueError for a damaged one."""
    file = Path(folder) / RUN_FILE
    if not file.is_file():
        return None
    try:
        return read_object(file)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it") from error


def read_run(folder: str | Path) -> dict | None:
    """The record of the run that left a checkpoint in `folder` (or in one of its checkpoint-N); None if there is none.
    ValueError for a damaged one."""
    folder = Path(folder)
    record = record_in(folder)
    if record is None and folder.name.startswith("checkpoint-"):
        record = record_in(folder.parent)
    return record


def statistics_files(checkpoint: str | Path) -> list[Path]:
    """They lie in the folder of the run that trained the predictors: the checkpoint's own or, as fine-tuning leaves
    predictors as they are, that of the first stage before it that had teachers (runs since take them along). To look
    at only: it follows what a run.json says, so that nothing that is found by it may be given to others."""
    folder = Path(checkpoint)
    seen = set()
    while folder.resolve() not in seen:  # a run may have begun at a checkpoint in its own folder
        seen.add(folder.resolve())
        run = None
        for place in (folder, folder.parent):  # the latter of a run's checkpoint-1000
            files = statistics_in(place)
            if files:
                return files
            run = record_in(place)
            if run is not None:
                break
        if run is None or run.get("teachers") or not run.get("checkpoint"):
            return []
        folder = Path(run["checkpoint"])
    return []


def load_statistics(checkpoint: str | Path) -> dict[str, TargetStatistics]:
    """Of the targets that a checkpoint's predictors were trained on, by task; none if these weren't standardized."""
    return {file.stem: TargetStatistics.load(file) for file in statistics_files(checkpoint)}


def data_fingerprint(rows: Rows | StreamRows) -> str | None:
    """A hash of the rows' file, or of a data set's length and up to 1,000 of its rows; None for a stream."""
    if isinstance(rows, StreamRows):
        return None
    if isinstance(rows.source, JsonRows):
        with open(rows.source.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256(str(len(rows.source)).encode())
    indices = np.linspace(0, len(rows.source) - 1, min(SAMPLED_ROWS, len(rows.source))).round().astype(int)
    for index in indices.tolist():
        digest.update(repr(rows.source[index]).encode())
    return digest.hexdigest()


def run_identity(args: OlaVlmArguments, rows: Rows | StreamRows) -> dict:
    """What makes a run this one (JSON-ready). `rows`: all of the data, before some are split off or dropped."""
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(OlaVlmArguments)} - inherited - FREE
    values = args.to_dict()
    identity = {name: values[name] for name in (*DECIDING, *sorted(own))}
    for name in PLACES:
        if identity[name]:
            identity[name] = os.path.normpath(identity[name])
    identity["rows_per_step"] = args.rows_per_step
    identity["eval_share"] = args.eval_share
    identity["data"] = data_fingerprint(rows) or args.data
    before = read_run(args.checkpoint) if args.checkpoint else None
    identity["started_from"] = before.get("identity") if before else None
    return json.loads(json.dumps(identity))


def differences(theirs: dict, ours: dict) -> str:
    """The fields in which two identities differ, in words; empty if they don't."""
    names = sorted(theirs.keys() | ours.keys())
    parts = []
    for name in names:
        if theirs.get(name) != ours.get(name):
            parts.append(f"{name} {theirs.get(name)!r:.60} there, {ours.get(name)!r:.60} here")
    return "; ".join(parts)


class RunIdentity(TrainerCallback, ExportableState):
    """Puts the identity into each checkpoint's trainer_state.json."""

    def __init__(self, identity: dict):
        self.identity = identity

    def state(self) -> dict:
        return {"args": {"identity": self.identity}, "attributes": {}}


def _saved_state(checkpoint: Path) -> dict | None:
    """A checkpoint's trainer state; None if it isn't there or not whole: the run was killed as it wrote it."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint: the trainer's state is what is written last."""
    checkpoints = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit()]
    newest_first = sorted(checkpoints, key=lambda path: int(path.name[11:]), reverse=True)
    return next((str(path) for path in newest_first if _saved_state(path) is not None), None)


def weights_in(folder: str | Path) -> str | None:
    """The file of a model's or an adapter's weights that lies in the folder, if one does."""
    return next((name for name in WEIGHTS if (Path(folder) / name).exists()), None)


def check_unused(output_dir: str | Path) -> None:
    """ValueError if a new run would overwrite what is in the folder."""
    folder = Path(output_dir)
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
    if checkpoints:
        go_on = "go on with it by --resume_from_checkpoint true, "
        raise ValueError(f"{folder} has {checkpoints[-1]} of an earlier run: {go_on}{REMEDY}")
    weights = weights_in(folder)
    if weights is not None:
        raise ValueError(f"{folder} has {weights} of an earlier run, which would be overwritten: {REMEDY}")


def check_checkpoint(checkpoint: str | Path, identity: dict) -> None:
    """ValueError unless a run of this identity can go on from the checkpoint exactly."""
    state = _saved_state(Path(checkpoint))
    if state is None:
        raise ValueError(f"{checkpoint} is no complete checkpoint of a run: it has no readable {STATE_FILE}")
    saved = state.get("stateful_callbacks", {}).get(RunIdentity.__name__)
    begin = "a new run can begin with its weights: --checkpoint, and an --output_dir of its own"
    if saved is None:
        raise ValueError(f"{checkpoint} doesn't say which run wrote it, so this one can't go on from it; {begin}")
    changed = differences(saved["args"]["identity"], identity)
    if changed:
        raise ValueError(f"{checkpoint} is another run's ({changed}): give its fields to go on with it; {begin}")
    names = [path.name for path in Path(checkpoint).iterdir()]
    if not any(name.startswith(("optimizer", "global_step")) for name in names):  # the latter DeepSpeed's
        what = "has no optimizer state (save_only_model), so the run can't go on from it exactly"
        raise ValueError(f"{checkpoint} {what}; {begin}")


def is_this_run(output_dir: str | Path, identity: dict) -> bool:
    """Whether the folder's run.json is of a run of this identity."""
    record = read_run(output_dir)
    return record is not None and not differences(record.get("identity") or {}, identity)


def is_finished(output_dir: str | Path, identity: dict) -> bool:
    """Whether a run of this identity has come to its end in the folder."""
    record = read_run(output_dir)
    return record is not None and is_this_run(output_dir, identity) and record["finished_steps"] is not None


def check_start(args: OlaVlmArguments, checkpoint: str | None, identity: dict) -> None:
    """ValueError, which says how to go on, unless a run of this identity may go on from `checkpoint`, or, if that is
    None, may begin in `args.output_dir`."""
    if checkpoint is not None:
        check_checkpoint(checkpoint, identity)
    elif not (args.resume_from_checkpoint and is_this_run(args.output_dir, identity)):
        check_unused(args.output_dir)
    if args.resume_from_checkpoint:
        logger.info(f"resuming from {checkpoint or 'the beginning: there is no checkpoint yet'}")
    PartialState().wait_for_everyone()  # before the first process writes, all have seen the folder as it was


def describe_run(args: OlaVlmArguments, identity: dict, recipe: str | None) -> dict:
    """What goes into run.json as a run begins; `finished_steps` are added at its end."""
    return {
        "recipe": recipe,
        "processes": args.world_size,
        **args.to_dict(),
        "identity": identity,
        "local_paths": local_paths(args),
        "finished_steps": None,
        # Model cards tell the whole history.
        "started_from": read_run(args.checkpoint) if args.checkpoint else None,
    }


def local_paths(args: OlaVlmArguments) -> list[str]:
    """What of the run's fields is a path of this machine: somewhere else it would look like a name on the Hub."""
    values = [args.data, args.image_folder, args.target_cache, *(getattr(args, name) for name in PLACES)]
    values += [teacher.get("path") for teacher in entries_of(args.teachers or {}).values()]
    return sorted({value for value in values if value and Path(value).exists()})


_held: set[Path] = set()  # a process's own locks don't stop itself


@contextmanager
def run_lock(output_dir: str | Path) -> Iterator[None]:
    """The folder is this process's: ValueError if another run trains in it. The system frees the lock when its process
    ends, however it ends; so a killed run's leaves nothing behind that blocks."""
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if folder in _held:
        raise ValueError(f"{folder}: this process trains in it already; choose another --output_dir")
    with _locked_file(folder) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        _held.add(folder)
        try:
            yield
        finally:
            _held.discard(folder)
            (folder / LOCK_FILE).unlink(missing_ok=True)


def _locked_file(folder: Path) -> TextIO:
    path = folder / LOCK_FILE
    while True:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (its end frees the lock)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            holder = path.read_text(encoding="utf-8").strip()
            what = f"another run trains in {folder} ({holder})"
            raise ValueError(f"{what}: wait for its end, or choose another --output_dir") from error
        except OSError as error:
            logger.warning(f"{folder} can't be locked ({error}): see to it that no other run trains in it")
            return file
        # A run that ended in between has taken its file away: a lock on that one keeps nobody out.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
        file.close()
