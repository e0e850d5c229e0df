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
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..configuration_ola_vlm import current_task_fields
from ..files.strangers import entries_of, read_object
from ..files.writing import check_no_file, write_whole
from ..targets.encoders import current_names
from ..targets.loading import check_file
from ..targets.statistics import TargetStatistics, statistics_in
from .arguments import OlaVlmArguments
from .rows import JsonRows, Rows, StreamRows

logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
LOCK_FILE = ".run.lock"
# The file of a checkpoint that is written last: with it, the checkpoint is complete.
STATE_FILE = "trainer_state.json"
# A folder with one of these holds a model or an adapter.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# A checkpoint's files that are looked into before a run goes on from it.
STATE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json")
GO_BACK = "or delete that checkpoint: --resume_from_checkpoint true then takes the one before it"
# So many rows of a data set stand for all of them.
SAMPLED_ROWS = 1000
# Those of transformers' fields that decide what is learned. The batch is not here: `rows_per_step` stands for it.
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
# Those of our own fields that decide nothing: data are known by their content, and cached targets are those that
# teachers would give.
FREE = {
    "data",
    "image_folder",
    "target_cache",
    "target_fill",
    "check_images",
    "trust_remote_code",
    "max_bad_rows",
    "eval_data",
    "eval_split",
    "eval_questions",
}
_inherited = {field.name for field in fields(TrainingArguments)}
OWN_DECIDING = {field.name for field in fields(OlaVlmArguments)} - _inherited - FREE
# Fields that hold a name on the Hub or a folder.
PLACES = ("checkpoint", "vision_tower", "language_model", "tokenizer")
REMEDY = "choose another --output_dir, or move that run away"


def write_run(folder: str | Path, record: dict) -> None:
    """run.json, as a whole or not at all."""
    write_whole(Path(folder) / RUN_FILE, (json.dumps(record, indent=2) + "\n").encode())


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of that name is one that a run saves to go on from: not "checkpoints" or "checkpoint-best"."""
    return re.fullmatch(r"checkpoint-[0-9]+", name) is not None


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """A run's folders of that kind, whole or not, by their steps."""
    checkpoints = [path for path in Path(output_dir).glob("checkpoint-*") if is_checkpoint_name(path.name)]
    # By number: as texts, checkpoint-900 would come behind checkpoint-1000.
    return sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))


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
    # run.json lies in the run's folder, not in its checkpoints.
    if record is None and is_checkpoint_name(folder.name):
        record = record_in(folder.parent)
    return record


def steps_in(checkpoint: str | Path, record: dict) -> int | None:
    """The optimizer steps that a checkpoint has seen: by its trainer's state, else by its run's `record`, which has
    them once the run is finished. None if neither says."""
    file = Path(checkpoint) / STATE_FILE
    if file.exists():
        return read_object(file).get("global_step")
    return record.get("finished_steps")


def statistics_files(checkpoint: str | Path) -> list[Path]:
    """They lie in the folder of the run that trained the predictors: the checkpoint's own or, as fine-tuning leaves
    predictors as they are, that of the first stage before it that had teachers (runs since take them along). To look
    at only: it follows what a run.json says, so that nothing that is found by it may be given to others."""
    folder = Path(checkpoint)
    seen = set()
    # From run to run before it, but never in a circle: a run may have begun at a checkpoint in its own folder.
    while folder.resolve() not in seen:
        seen.add(folder.resolve())
        run = None
        # The parent is that of a run's checkpoint-1000.
        for place in (folder, folder.parent):
            files = statistics_in(place)
            if files:
                return files
            run = record_in(place)
            if run is not None:
                break
        if run is None or run.get("teachers"):
            return []
        before = run.get("checkpoint")
        # None: the run built its model from parts. The record may also be a stranger's, and hold anything there.
        if not before or not isinstance(before, str):
            return []
        folder = Path(before)
    return []


def load_statistics(checkpoint: str | Path) -> dict[str, TargetStatistics]:
    """Of the targets that a checkpoint's predictors were trained on, by task; none if these weren't standardized."""
    return {file.stem: TargetStatistics.load(file) for file in statistics_files(checkpoint)}


def data_fingerprint(rows: Rows | StreamRows) -> str | None:
    """A hash of the rows' file, or of a data set's length and up to 1,000 of its rows; None for a stream."""
    if isinstance(rows, StreamRows):
        return None
    if isinstance(rows.source, JsonRows):
        # Images aren't looked at: their names are in the file.
        with open(rows.source.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    # Rows of a data set may hold images: a sample, evenly spread, tells another data set just as well.
    digest = hashlib.sha256(str(len(rows.source)).encode())
    indices = np.linspace(0, len(rows.source) - 1, min(SAMPLED_ROWS, len(rows.source))).round().astype(int)
    for index in indices.tolist():
        digest.update(repr(rows.source[index]).encode())
    return digest.hexdigest()


def run_identity(args: OlaVlmArguments, rows: Rows | StreamRows) -> dict:
    """What makes a run this one (JSON-ready). `rows`: all of the data, before some are split off or dropped."""
    values = args.to_dict()
    identity = {name: values[name] for name in (*DECIDING, *sorted(OWN_DECIDING))}
    for name in PLACES:
        if identity[name]:
            identity[name] = os.path.normpath(identity[name])
    # The product of batch, accumulation and processes: how a step is divided among them changes nothing.
    identity["rows_per_step"] = args.rows_per_step
    # A stream's rows come in another order from more or fewer workers, each of which reads files of its own.
    identity["stream_workers"] = None
    if args.streaming:
        identity["stream_workers"] = args.dataloader_num_workers
    identity["eval_share"] = args.eval_share
    # A stream is known by its name.
    identity["data"] = data_fingerprint(rows) or args.data
    identity["started_from"] = None
    # Whose weights it begins with, by the identity of the run that made them.
    if args.checkpoint:
        before = read_run(args.checkpoint)
        if before:
            identity["started_from"] = before.get("identity")
    # As it will be read again: tuples are lists then.
    return json.loads(json.dumps(identity))


def differences(theirs: dict, ours: dict) -> str:
    """The fields in which two identities differ, in words; empty if they don't."""
    # A stream of an earlier version, which didn't write them, may go on with any number.
    is_told = "stream_workers" in theirs and "stream_workers" in ours
    theirs = _comparable(theirs)
    ours = _comparable(ours)
    names = theirs.keys() | ours.keys()
    if not is_told:
        names -= {"stream_workers"}
    parts = []
    for name in sorted(names):
        if theirs.get(name) != ours.get(name):
            parts.append(f"{name} {theirs.get(name)!r:.60} there, {ours.get(name)!r:.60} here")
    return "; ".join(parts)


def _comparable(identity: dict) -> dict:
    """An identity as this version would write it here: fields that an earlier one didn't know are at their defaults,
    teachers have today's names of fields and no license, and folders that are there are known by where they lie."""
    compared: dict[str, Any] = {"stream_workers": None}
    for field in fields(OlaVlmArguments):
        if field.name in OWN_DECIDING and field.default is not MISSING:
            compared[field.name] = field.default
    # Over the defaults, what it says.
    compared.update(identity)
    for name in PLACES:
        compared[name] = _here(compared[name])
    if compared["teachers"]:
        compared["teachers"] = _comparable_teacher(compared["teachers"])
    if compared.get("tasks"):
        compared["tasks"] = [current_task_fields(task) for task in compared["tasks"]]
    if compared.get("started_from"):
        compared["started_from"] = _comparable(compared["started_from"])
    return compared


def _comparable_teacher(entry: dict) -> dict:
    """Of a teacher, or of several by their names."""
    compared = {}
    for name, value in current_names(entry).items():
        if isinstance(value, dict):
            compared[name] = _comparable_teacher(value)
        elif name == "path":
            compared[name] = _here(value)
        elif name != "license":
            compared[name] = value
    return compared


def _here(place: str | None) -> str | None:
    """A folder's real path, if it is there; a name on the Hub as it is."""
    if place and os.path.exists(place):
        return os.path.realpath(place)
    return place


class RunIdentity(TrainerCallback, ExportableState):
    """Puts the identity into each checkpoint's trainer_state.json."""

    def __init__(self, identity: dict):
        self.identity = identity

    def state(self) -> dict:
        return {"args": {"identity": self.identity}, "attributes": {}}


def _saved_state(checkpoint: Path) -> dict | None:
    """A checkpoint's trainer state; None if it isn't there or not whole: the run was killed as it wrote it."""
    # What can't be read counts as not there.
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        return read_object(checkpoint / STATE_FILE)
    return None


def _identity_in(state: dict) -> dict | None:
    """Of the run that wrote a checkpoint's trainer state; None if it doesn't say."""
    try:
        identity = state["stateful_callbacks"][RunIdentity.__name__]["args"]["identity"]
    except (KeyError, TypeError):
        return None
    return identity if isinstance(identity, dict) else None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint: the trainer's state is what is written last."""
    newest_first = reversed(checkpoints_in(output_dir))
    return next((str(path) for path in newest_first if _saved_state(path) is not None), None)


def weights_in(folder: str | Path) -> str | None:
    """The file of a model's or an adapter's weights that lies in the folder, if one does."""
    return next((name for name in WEIGHTS if (Path(folder) / name).exists()), None)


def check_holds_no_model(out: str | Path) -> None:
    """ValueError if a command that writes a model would overwrite one."""
    check_no_file(out)
    weights = weights_in(out)
    if weights is not None:
        raise ValueError(f"{out} has {weights} already: choose another folder")


def check_unused(output_dir: str | Path) -> None:
    """ValueError if a new run would overwrite what is in the folder."""
    folder = Path(output_dir)
    checkpoints = checkpoints_in(folder)
    if checkpoints:
        go_on = "go on with it by --resume_from_checkpoint true, "
        raise ValueError(f"{folder} has {checkpoints[-1].name} of an earlier run: {go_on}{REMEDY}")
    weights = weights_in(folder)
    if weights is not None:
        raise ValueError(f"{folder} has {weights} of an earlier run, which would be overwritten: {REMEDY}")


def check_checkpoint(checkpoint: str | Path, identity: dict) -> None:
    """ValueError unless a run of this identity can go on from the checkpoint exactly."""
    # Is it whole, and this run's own?
    state = _saved_state(Path(checkpoint))
    if state is None:
        raise ValueError(f"{checkpoint} is no complete checkpoint of a run: it has no readable {STATE_FILE}")
    saved = _identity_in(state)
    begin = "a new run can begin with its weights: --checkpoint, and an --output_dir of its own"
    if saved is None:
        raise ValueError(f"{checkpoint} doesn't say which run wrote it, so this one can't go on from it; {begin}")
    changed = differences(saved, identity)
    if changed:
        raise ValueError(f"{checkpoint} is another run's ({changed}): give its fields to go on with it; {begin}")

    # Does it hold all that going on exactly takes? DeepSpeed's states lie in a folder global_step1000.
    names = [path.name for path in Path(checkpoint).iterdir()]
    if not any(name.startswith(("optimizer", "global_step")) for name in names):
        what = "has no optimizer state (save_only_model), so the run can't go on from it exactly"
        if any(is_checkpoint_name(name) for name in names):
            what = "is a run's folder, its end: give true, or one of the checkpoints in it"
        raise ValueError(f"{checkpoint} {what}; {begin}")
    if "optimizer.pt" in names and "scheduler.pt" not in names:
        what = "has no scheduler.pt, so learning rates would begin anew: put it back"
        raise ValueError(f"{checkpoint} {what}, {GO_BACK}")

    # Can it be read? A file that is cut off would be noticed only after the model is loaded.
    for file in sorted(Path(checkpoint).iterdir()):
        if file.suffix in STATE_SUFFIXES:
            try:
                check_file(file)
            except ValueError as error:
                raise ValueError(f"{error}; {GO_BACK}") from error


def is_this_run(output_dir: str | Path, identity: dict) -> bool:
    """Whether the folder's run.json is of a run of this identity."""
    record = read_run(output_dir)
    theirs = record.get("identity") if record else None
    return isinstance(theirs, dict) and not differences(theirs, identity)


def is_finished(output_dir: str | Path, identity: dict) -> bool:
    """Whether a run of this identity has come to its end in the folder."""
    record = read_run(output_dir)
    return record is not None and is_this_run(output_dir, identity) and record.get("finished_steps") is not None


def check_start(args: OlaVlmArguments, checkpoint: str | None, identity: dict) -> None:
    """ValueError, which says how to go on, unless a run of this identity may go on from `checkpoint`, or, if that is
    None, may begin, and may write into `args.output_dir`."""
    is_at_home = False
    if checkpoint is not None:
        check_checkpoint(checkpoint, identity)
        # Its run's own folder, perhaps moved and without a run.json.
        is_at_home = Path(checkpoint).absolute().parent.resolve() == Path(args.output_dir).resolve()
    # A run that was killed before its first checkpoint has left a run.json, and begins anew in its own folder.
    if not is_at_home and not (args.resume_from_checkpoint and is_this_run(args.output_dir, identity)):
        check_unused(args.output_dir)
    if args.resume_from_checkpoint:
        logger.info(f"resuming from {checkpoint or 'the beginning: there is no checkpoint yet'}")
    # Before the first process writes, all have seen the folder as it was.
    PartialState().wait_for_everyone()


def describe_run(args: OlaVlmArguments, identity: dict, recipe: str | None) -> dict:
    """What goes into run.json as a run begins; `finished_steps` are added at its end."""
    # Model cards tell the whole history.
    started_from = None
    if args.checkpoint:
        started_from = read_run(args.checkpoint)
        if started_from is not None:
            started_from["finished_steps"] = steps_in(args.checkpoint, started_from)
    return {
        "recipe": recipe,
        "processes": args.world_size,
        **args.to_dict(),
        "identity": identity,
        "local_paths": local_paths(args),
        "finished_steps": None,
        "started_from": started_from,
    }


def local_paths(args: OlaVlmArguments) -> list[str]:
    """What of the run's fields is a path of this machine: somewhere else it would look like a name on the Hub."""
    values = [args.data, args.image_folder, args.target_cache, *(getattr(args, name) for name in PLACES)]
    # Of words, teachers are entries in an entry.
    values += [teacher.get("path") for teacher in entries_of(args.teachers or {}).values()]
    return sorted({value for value in values if value and Path(value).exists()})


def moved(value: Any, places: Mapping[str, str]) -> Any:
    """JSON content with its paths as they are elsewhere: what begins with a folder of `places` begins with that
    folder's new name, the first one that fits."""
    if isinstance(value, dict):
        return {name: moved(one, places) for name, one in value.items()}
    if isinstance(value, list):
        return [moved(one, places) for one in value]
    if isinstance(value, str):
        for before, after in places.items():
            if value == before:
                return after
            # Whole names only: runs/a is not where runs/ab begins.
            if value.startswith(before + os.sep):
                return os.path.join(after, value[len(before) + 1 :])
    return value


# Folders that this process trains in: a process's own locks don't stop itself.
_held: set[Path] = set()


@contextmanager
def run_lock(output_dir: str | Path) -> Iterator[None]:
    """The folder is this process's: ValueError if another run trains in it. The system frees the lock when its process
    ends, however it ends; so a killed run's leaves nothing behind that blocks."""
    check_no_file(output_dir)
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if folder in _held:
        raise ValueError(f"{folder}: this process trains in it already; choose another --output_dir")
    with _locked_file(folder) as file:
        # Whoever is refused reads here whose lock it is.
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
        # Not "w", which would empty the holder's line before it is known whether the lock is free.
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
