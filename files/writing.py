"""Files of ours are written whole, or not at all, by one process at a time."""

import errno
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows has no such module: nothing is locked there.
    fcntl = None

logger = logging.getLogger(__name__)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends, or nothing if it fails: "exists" is "done".

    OSError names `path` and says what helps.
    """
    path = Path(path)
    # In the same folder: a rename across file systems is a copy, which can be cut short.
    unfinished = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        # On one file system a rename is atomic: readers see the old file or the new one.
        os.replace(unfinished, path)
    except OSError as error:
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "; what was written before stays good: make room and start again"
        raise OSError(error.errno, f"{error.strerror or error}: not written{remedy}", str(path)) from error
    finally:
        # What a failure or a Ctrl-C left; after the rename there is nothing of this name.
        with suppress(OSError):
            unfinished.unlink()


def write_whole(path: str | Path, content: bytes | str) -> None:
    """The file is there as a whole or not at all. Texts are written in UTF-8."""
    if isinstance(content, str):
        content = content.encode()
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def check_no_file(folder: str | Path) -> None:
    """ValueError if a command's folder of results is a file, or would lie below one."""
    for place in (Path(folder), *Path(folder).parents):
        # A link to nowhere isn't there, and no folder can be made of its name.
        if os.path.lexists(place) and not place.is_dir():
            raise ValueError(f"{place} is a file, and results go into a folder: give the name of a folder")


def check_empty(folder: str | Path) -> None:
    """ValueError if what a command writes as a whole would be mixed with what is there already."""
    check_no_file(folder)
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise ValueError(f"{folder} is not empty: choose another OUT")


def check_is_of(command: str, folder: str | Path, *own: str) -> None:
    """ValueError if a command's results would be mixed with others' files. A folder is the command's if it has one of
    its `own` files (patterns), or no files at all."""
    check_no_file(folder)
    folder = Path(folder)
    if not folder.exists() or any(any(folder.glob(pattern)) for pattern in own):
        return
    # Hidden files are a system's own, such as .DS_Store.
    others = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if others:
        raise ValueError(f"{folder} has {others[0]} and nothing of `ola-vlm {command}`: choose another --out")


def write_json(path: str | Path, content, indent: int | None = 2) -> None:
    write_whole(path, json.dumps(content, indent=indent) + "\n")


def save_figure(figure, path: str | Path, **options) -> None:
    """matplotlib's `savefig`; the file's ending says its format."""
    with whole_file(path) as unfinished:
        # Its format is named, since the unfinished file ends with .tmp.
        figure.savefig(unfinished, format=Path(path).suffix[1:] or None, **options)


@contextmanager
def one_at_a_time(folder: str | Path) -> Iterator[None]:
    """While the block runs, other processes wait where they would begin one on this folder. Where nothing can be
    locked (`only_one`), none waits."""
    if fcntl is None:
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


@contextmanager
def only_one(folder: str | Path) -> Iterator[None]:
    """While the block runs no other process may run one on this folder: ValueError there. It ends with the process,
    however that ends. Without a folder, or on a file system or system that can't lock, there is no lock."""
    if fcntl is None or not Path(folder).is_dir():
        yield
        return
    # The folder itself is locked: a lock file would be left behind by a process that is killed.
    opened = os.open(folder, os.O_RDONLY)
    try:
        # A file system that can't lock (some network ones) raises another OSError: then there is no lock.
        with suppress(OSError):
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                what = f"another process is writing to {folder}"
                raise ValueError(f"{what}: wait for it, or choose another folder") from error
        yield
    finally:
        # Closing the descriptor gives the lock back, as the end of the process does.
        os.close(opened)


# Once for each text: a full disk would say the same at every file.
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
