"""Files: ours are written whole, those of strangers stay in their folder and say only what a file may say.

A stranger's file is whatever comes with a checkpoint, a data set, a benchmark, a cache or an output folder: run.json,
probes.json, annotations. It is data. What it names may be looked at inside its own folder; what may run code, choose a
loader or lead elsewhere is the user's to say, on the command line.
"""

import errno
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

logger = logging.getLogger(__name__)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends, or nothing if it fails: "exists" is "done".

    OSError names `path` and says what helps.
    """
    path = Path(path)
    unfinished = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; what was written before stays good: make room and start again" if is_full else ""
        raise OSError(error.errno, f"{error.strerror or error}: not written{remedy}", str(path)) from error
    finally:
        with suppress(OSError):  # after a failure, or a Ctrl-C; renamed, it is gone
            unfinished.unlink()


def write_whole(path: str | Path, content: bytes | str) -> None:
    """The file is there as a whole or not at all. Texts are written in UTF-8."""
    if isinstance(content, str):
        content = content.encode()
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def write_json(path: str | Path, content, indent: int | None = 2) -> None:
    write_whole(path, json.dumps(content, indent=indent) + "\n")


def save_figure(figure, path: str | Path, **options) -> None:
    """matplotlib's `savefig`; the file's ending says its format."""
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format=Path(path).suffix[1:] or None, **options)


@contextmanager
def only_one(folder: str | Path) -> Iterator[None]:
    """While the block runs no other process may run one on this folder: ValueError there. It ends with the process,
    however that ends. Without a folder, or on a file system or system that can't lock, there is no lock."""
    if fcntl is None or not Path(folder).is_dir():
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                what = f"another process is writing to {folder}"
                raise ValueError(f"{what}: wait for it, or choose another folder") from error
        yield
    finally:
        os.close(opened)


@lru_cache
def _warn_once(text: str) -> None:
    logger.warning(text)


@contextmanager
def as_hint() -> Iterator[None]:
    """What is written here only spares work later: on a full or read-only disk one goes on without."""
    try:
        yield
    except OSError as error:
        _warn_once(f"{error}: it will be found out again next time")


def read_object(path: str | Path) -> dict:
    """A JSON file's object. ValueError names the file if it holds anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object")
    return content


def read_finished(path: str | Path) -> dict | None:
    """The JSON object that an earlier run left there, else None. A damaged one counts as none, and is named."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning(f"{error}: it is made anew")
        return None


def inside(folder: str | Path, name: str | Path) -> Path:
    """The path of what a file in `folder` names. ValueError if it lies elsewhere, by "..", by an absolute path or by a
    symbolic link. (The Hub's cache links to its folder "blobs" beside "snapshots": that is inside.)"""
    path = Path(folder, name)
    lexical = os.path.abspath(path)
    real = os.path.realpath(path)
    outer = os.path.abspath(folder)
    real_outer = os.path.realpath(folder)
    homes = [real_outer]
    for parent in (Path(real_outer), *Path(real_outer).parents):
        if parent.name == "snapshots" and parent.parent.name.startswith(("models--", "datasets--", "spaces--")):
            homes.append(str(parent.parent / "blobs"))
    is_inside = _is_below(lexical, outer) and any(_is_below(real, home) for home in homes)
    if not is_inside:
        what = f"{str(name)!r} lies outside {folder} (by '..', an absolute path or a symbolic link)"
        raise ValueError(f"{what}: only what lies in the folder is taken from it")
    return path


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_number(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 4096


def _is_plain_path(value) -> bool:
    """Of a subfolder or a revision: without a way out."""
    return (
        isinstance(value, str)
        and ".." not in value.split("/")
        and re.fullmatch(r"[\w./-]*", value) is not None
        and not value.startswith("/")
    )


def _is_view(value) -> bool:
    """Of a vision encoder's configuration only how timm fits its positions to a size."""
    names = {"dynamic_img_size", "dynamic_img_pad", "strict_img_size", "img_size"}
    if not isinstance(value, dict) or value.keys() != {"model_args"}:
        return False
    arguments = value["model_args"]
    return (
        isinstance(arguments, dict)
        and arguments.keys() <= names
        and all(isinstance(one, (bool, int)) for one in arguments.values())
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


# Field of a teacher -> whether a value is one that a stranger's file may give.
TEACHER_FIELDS = {
    "encoder": _is_text,
    "path": _is_text,
    "licence": _is_text,  # of files from before, as is "geometry"
    "license": _is_text,
    "motion": lambda value: isinstance(value, bool),
    "features": _is_text,
    "geometry": _is_text,
    "resize_mode": _is_text,
    "batch_size": _is_number,
    "grid": _is_number,
    "size": _is_number,
    "dtype": lambda value: value in ("auto", "float32", "float16", "bfloat16"),
    "attn_implementation": lambda value: value in ("eager", "sdpa"),  # others are fetched and run
    "task_inputs": lambda value: isinstance(value, list) and all(type(number) is int for number in value),
    "unused": _are_texts,
    "revision": _is_plain_path,
    "subfolder": _is_plain_path,
    "config": _is_view,
    "words": lambda value: _are_texts(value) or (isinstance(value, Mapping) and _are_texts([*value, *value.values()])),
    "bins": lambda value: value == "quantiles" or (isinstance(value, list) and all(map(_is_number, value))),
    "larger_is_closer": lambda value: isinstance(value, bool),
}


def teachers_of_file(teachers: object, file: str | Path) -> dict[str, dict]:
    """The teachers that a stranger's `file` names, task -> entry, with the fields of `TEACHER_FIELDS` only.

    Of the rest some run code (trust_remote_code), some choose how files are read (weights_only, use_safetensors) or
    where (cache_dir), and who knows what libraries will have next year. ValueError names such a field.
    """
    if not isinstance(teachers, Mapping) or not all(isinstance(entry, Mapping) for entry in teachers.values()):
        raise ValueError(f"{file}: its teachers are no objects by task: give --recipe")
    for task, entry in entries_of(teachers).items():
        refused = [
            name for name, value in entry.items() if name not in TEACHER_FIELDS or not TEACHER_FIELDS[name](value)
        ]
        if refused:
            what = f"{file}: the teacher of {task!r} has {', '.join(map(repr, refused))}, which a file may not set"
            raise ValueError(f"{what} to this: give the teachers yourself, by --recipe")
    return {str(task): dict(entry) for task, entry in teachers.items()}


def entries_of(teachers: Mapping) -> dict[str, Mapping]:
    """The entries of `teachers`, of a task that has one for each kind of word those, by "<task>.<kind>"."""
    entries = {}
    for task, entry in teachers.items():
        kinds = {kind: value for kind, value in entry.items() if isinstance(value, Mapping)}
        if kinds and len(kinds) == len(entry):
            entries.update({f"{task}.{kind}": value for kind, value in kinds.items()})
        else:
            entries[task] = entry
    return entries
