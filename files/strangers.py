"""Files of strangers stay in their folder and say only what a file may say.

A stranger's file is whatever comes with a checkpoint, a data set, a benchmark, a cache or an output folder: run.json,
probes.json, annotations. It is data. What it names may be looked at inside its own folder; what may run code, choose a
loader or lead elsewhere is the user's to say, on the command line.
"""

import copy
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)


def read_object(path: str | Path) -> dict:
    """A JSON file's object. ValueError names the file if it holds anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    # A list or a number is JSON, too; callers ask for fields.
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
    # By its name, "a/../../b" resolved but links not followed; and by what it is once all links are followed.
    lexical = os.path.abspath(path)
    real = os.path.realpath(path)
    outer = os.path.abspath(folder)
    real_outer = os.path.realpath(folder)
    # Where its links may lead: into the folder, or into the blobs of the cache that the folder is in.
    homes = [real_outer]
    # In the cache "models--owner--name/snapshots/COMMIT/file" is a link to "models--owner--name/blobs/HASH".
    # The folder may lie below the snapshot, such as a checkpoint in a subfolder.
    for parent in (Path(real_outer), *Path(real_outer).parents):
        if parent.name == "snapshots" and parent.parent.name.startswith(("models--", "datasets--", "spaces--")):
            homes.append(str(parent.parent / "blobs"))
    is_inside = _is_below(lexical, outer) and any(_is_below(real, home) for home in homes)
    if not is_inside:
        what = f"{str(name)!r} lies outside {folder} (by '..', an absolute path or a symbolic link)"
        raise ValueError(f"{what}: only what lies in the folder is taken from it")
    return path


def _is_below(path: str, folder: str) -> bool:
    # Part by part: as texts "/data" would be the beginning of "/data_of_others".
    return os.path.commonpath([path, folder]) == folder


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_number(value) -> bool:
    # True is an int in Python. The bound keeps a file from asking for a batch or an image of all the memory.
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 4096


def _are_bins(value) -> bool:
    """Of depths, for which there are words: "quantiles", or the values of the nearest and the farthest."""
    if not isinstance(value, list):
        return value == "quantiles"
    return all(type(edge) in (int, float) and math.isfinite(edge) for edge in value)


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


def _are_words(value: object) -> bool:
    """A word for each class, or changes by a class's name; none is a class of which nothing is said."""
    if isinstance(value, Mapping):
        return _are_texts(list(value)) and _are_words(list(value.values()))
    return isinstance(value, list) and _are_texts([word for word in value if word is not None])


# Field of a teacher -> whether a value is one that a stranger's file may give.
TEACHER_FIELDS = {
    "encoder": _is_text,
    "path": _is_text,
    # Older files write "licence" for "license", and "geometry" for "resize_mode".
    "licence": _is_text,
    "license": _is_text,
    "motion": lambda value: isinstance(value, bool),
    "features": _is_text,
    "geometry": _is_text,
    "resize_mode": _is_text,
    "batch_size": _is_number,
    "grid": _is_number,
    "size": _is_number,
    "dtype": lambda value: value in ("auto", "float32", "float16", "bfloat16"),
    # Others may name kernels on the Hub, which transformers fetches and runs.
    "attn_implementation": lambda value: value in ("eager", "sdpa"),
    "task_inputs": lambda value: isinstance(value, list) and all(type(number) is int for number in value),
    # Beginnings of the names of weights that a checkpoint may lack.
    "unused": _are_texts,
    "revision": _is_plain_path,
    "subfolder": _is_plain_path,
    "config": _is_view,
    "words": _are_words,
    "bins": _are_bins,
    "larger_is_closer": lambda value: isinstance(value, bool),
    "threshold": lambda value: isinstance(value, float) and 0 < value < 1,
}


def teachers_of_file(teachers: object, file: str | Path) -> dict[str, dict]:
    """The teachers that a stranger's `file` names, task -> entry, with the fields of `TEACHER_FIELDS` only.

    Of the rest some run code (trust_remote_code), some choose how files are read (weights_only, use_safetensors) or
    where (cache_dir), and who knows what libraries will have next year. ValueError names such a field.
    """
    # A damaged file may hold a list, or a name in place of an entry.
    if not isinstance(teachers, Mapping) or not all(isinstance(entry, Mapping) for entry in teachers.values()):
        raise ValueError(f"{file}: its teachers are no objects by task: give --recipe")
    for task, entry in entries_of(teachers).items():
        # A list of what is allowed, not of what is forbidden: no library's future options slip through.
        refused = [
            name for name, value in entry.items() if name not in TEACHER_FIELDS or not TEACHER_FIELDS[name](value)
        ]
        if refused:
            what = f"{file}: the teacher of {task!r} has {', '.join(map(repr, refused))}, which a file may not set"
            raise ValueError(f"{what} to this: give the teachers yourself, by --recipe")
    return copy.deepcopy({str(task): entry for task, entry in teachers.items()})


def entries_of(teachers: Mapping) -> dict[str, dict]:
    """The entries of `teachers`, of a task that has one for each kind of word those, by "<task>.<kind>"."""
    entries = {}
    for task, entry in teachers.items():
        # One teacher's entry may have an object among its fields ("config", "words"), but never objects alone.
        kinds = {kind: value for kind, value in entry.items() if isinstance(value, Mapping)}
        if kinds and len(kinds) == len(entry):
            entries.update({f"{task}.{kind}": value for kind, value in kinds.items()})
        else:
            entries[task] = entry
    return entries
