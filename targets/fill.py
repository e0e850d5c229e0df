"""Filling the target cache from images: teachers loaded when needed, and an index that spares decoding."""

import json
import math
import os
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils import extract_commit_hash, logging

from .cache import OncePerBatch, TargetCache, image_key, is_key
from .encoders import ENCODERS, FEATURES_VERSION, TargetEncoder
from .files import as_hint, read_finished, write_json, write_whole
from .images import ImageError, open_image, source_name
from .loading import loading_from

logger = logging.get_logger(__name__)

BATCH = 32  # images decoded and encoded at a time


class Teacher:
    """A task's teacher as its recipe names it, loaded at the first use of `encoder`.

    Args:
        task: a task of the configuration, whose target's shape the teacher must have.
        entry: {"encoder": a name in ENCODERS, "path": name or folder, and more arguments of its `from_pretrained`}.
    """

    def __init__(self, task: dict, entry: dict, device="cpu"):
        self.task, self.device, self.shape = task, device, (task["target_length"], task["target_dim"])
        self.entry = {field: value for field, value in entry.items() if field != "motion"}
        if entry.get("encoder") not in ENCODERS or "path" not in entry:
            need = f"give its path, and as encoder one of {list(ENCODERS)}"
            raise ValueError(f"teachers[{task['name']!r}] is {entry}: {need}")

    @cached_property
    def encoder(self) -> TargetEncoder:
        encoder_class, path, options = self._parts()
        encoder = encoder_class.from_pretrained(path, **options)
        self._compare(encoder.target_length, encoder.target_dim)
        return encoder

    def check(self, folder: str | Path | None = None) -> None:
        """ValueError for a teacher that isn't there or whose targets have another shape; weights are not read. One
        that the cache in `folder` knows need not be there."""
        encoder_class, path, options = self._parts()
        if folder is not None and self._files() is None and self._note(folder).exists():
            return
        try:
            with loading_from(path, options.get("subfolder", "")):
                shape = encoder_class.target_shape(path, **options)
        except (NotImplementedError, RuntimeError) as error:  # a model that looks at values, of which there are none
            logger.info(f"{path}: its targets' shape is seen when it is loaded ({error})")
            return
        self._compare(*shape)

    def _parts(self) -> tuple[type[TargetEncoder], str, dict]:
        options = {"device": self.device, **self.entry, "grid": math.isqrt(self.task["target_length"])}
        return ENCODERS[options.pop("encoder")], options.pop("path"), options

    def _compare(self, length: int, width: int) -> None:
        if self.shape != (length, width):
            shapes = f"targets {(length, width)} from its teacher, {self.shape} from its configuration"
            name = self.task["name"]
            raise ValueError(f"task {name!r} has {shapes}: set target_length and target_dim to the teacher's")

    def fingerprint(self, folder: str | Path) -> str:
        """`encoder.fingerprint`, without loading the teacher if a note in the cache's folder tells it: a note for this
        entry (but for what changes no feature), `FEATURES_VERSION`, and these files of weights (their sizes and dates;
        their commit for a name on the Hub). Where the weights are not at all, as after a cache was moved, the note is
        believed."""
        note = self._note(folder)
        files = self._files()
        known = _read_note(note)
        if known is not None and (files is None or known.get("files") == files):
            return known["fingerprint"]
        known = {"teacher": self.entry, "files": files, "fingerprint": self.encoder.fingerprint}
        with as_hint():
            write_json(note, known)
        return known["fingerprint"]

    def _note(self, folder: str | Path) -> Path:
        entry = {field: self.entry[field] for field in self.entry.keys() - {"batch_size", "device", "licence"}}
        what = json.dumps([self.task["target_length"], entry, FEATURES_VERSION], sort_keys=True)
        digest = blake2b(what.encode(), digest_size=8).hexdigest()
        return Path(folder) / f"{self.entry['encoder']}-{digest}.json"

    def _files(self) -> list | str | None:
        """What tells whether the weights have changed; None if they are not here."""
        path = self.entry["path"]
        if os.path.isdir(path):
            files = [list(source_state(str(file))) for file in sorted(Path(path).rglob("*")) if file.is_file()]
            return files if any(name.endswith((".safetensors", ".bin")) for name, _, _ in files) else None
        config = str(Path(self.entry.get("subfolder", ""), "config.json"))
        with suppress(HFValidationError):  # no name on the Hub but a folder that isn't there
            found = try_to_load_from_cache(path, config, revision=self.entry.get("revision"))
            return extract_commit_hash(found if isinstance(found, str) else None, None)
        return None


def _read_note(note: Path) -> dict | None:
    """A note with a fingerprint, or None. It is a hint: what is damaged is found out anew. A fingerprint names a
    folder, in which damaged files are deleted: a path isn't believed."""
    try:
        known = read_finished(note)
    except OSError as error:
        logger.warning(f"{error}: the teacher's fingerprint is computed anew")
        return None
    if known is None:
        return None
    fingerprint = known.get("fingerprint")
    if isinstance(fingerprint, str) and re.fullmatch(r"\w[\w.-]*", fingerprint):
        return known
    logger.warning(f"{note} holds no fingerprint: it is computed anew")
    return None


def make_teachers(tasks: Sequence[dict], entries: dict[str, dict], device="cpu") -> dict[str, Teacher]:
    """Each task's, entries without a task are ignored; tasks whose entries differ in "motion" only share one."""
    names = [task["name"] for task in tasks]
    if not set(names) <= set(entries):
        raise ValueError(f"the tasks {names} need one teacher each, `teachers` has {list(entries)}")
    teachers = {}
    for task in tasks:
        made = Teacher(task, entries[task["name"]], device)
        same = (one for one in teachers.values() if (one.entry, one.shape) == (made.entry, made.shape))
        teachers[task["name"]] = next(same, made)
    return teachers


def open_caches(folder: str | Path, teachers: dict[str, Teacher], storage: str = "float32") -> dict[str, TargetCache]:
    fingerprints = {name: teacher.fingerprint(folder) for name, teacher in teachers.items()}
    keys = OncePerBatch()  # tasks of one teacher share its cache
    caches = {value: TargetCache(folder, value, storage, batch_keys=keys) for value in fingerprints.values()}
    return {name: caches[value] for name, value in fingerprints.items()}


def source_state(source: str | dict) -> tuple[str, int, int] | None:
    """What changes when the image does: of a file its path, size and date, of `{"bytes"}` their hash."""
    if isinstance(source, dict):
        return blake2b(source["bytes"], digest_size=16).hexdigest(), len(source["bytes"]), 0
    with suppress(FileNotFoundError):
        stat = os.stat(source)
        return source, stat.st_size, stat.st_mtime_ns
    return None


def known_keys(folder: str | Path, sources: Sequence[str | dict]) -> list[str | None]:
    """Each source's key, if `fill` saw it as it is now (`source_state`), else None.

    From folder/images/, where each process that fills keeps a file of its own. It spares decoding all images at each
    start, no more: training looks targets up by the decoded image.
    """
    seen = {}
    for file in (Path(folder) / "images").glob("*.jsonl"):
        seen.update(_read_index(file))
    return [seen.get(source_state(source)) for source in sources]


def _read_index(file: Path) -> dict[tuple[str, int, int], str]:
    """`source_state` -> key, from the lines that say so. The others are a process's that was killed, or damage: their
    number is logged, and they are taken out of a file that no process has written to for an hour."""
    seen = {}
    good = []
    bad = 0
    try:
        lines = file.read_bytes().splitlines(keepends=True)
        is_old = time.time() - file.stat().st_mtime > 3600
    except OSError as error:
        logger.warning(f"{error}: its images are decoded again")
        return {}
    for line in lines:
        try:
            path, size, date, key = json.loads(line)
            if not isinstance(path, str) or type(size) is not int or type(date) is not int or not is_key(key):
                raise ValueError("no state and key of an image")
        except (ValueError, TypeError, RecursionError):
            bad += 1
            continue
        seen[path, size, date] = key
        good.append(line)
    if bad:
        logger.warning(f"{file} has {bad} damaged lines: their images are decoded again")
    if bad and is_old:
        with as_hint():
            write_whole(file, b"".join(good))
    return seen


class _Images(Dataset):
    """Decoded in a loader's workers: (index, name, state, key, image), or (index, name, None, why not, None)."""

    def __init__(self, sources: Sequence[str | dict], indices: list[int]):
        self.sources, self.indices = sources, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple:
        index, source = self.indices[i], self.sources[self.indices[i]]
        try:
            state = source_state(source)  # before the image is read: it may change meanwhile
            image = open_image(source)
            return index, source_name(source), state, image_key(image), image
        except ImageError as error:
            return index, source_name(source), None, error.reason, None
        except OSError as error:  # gone, or no right to read it
            return index, source_name(source), None, f"{type(error).__name__}: {error}", None


def fill(
    folder: str | Path,
    teachers: dict[str, Teacher],
    caches: dict[str, TargetCache],
    sources: Sequence[str | dict],
    workers: int = 0,
    progress: bool = True,
) -> tuple[list[str | None], dict[int, str]]:
    """Computes and stores what the caches lack of the images (paths, or `{"bytes", "path": what to call them}`), and
    brings the index of images up to date.

    What they have is compared with its checksums, each shard once (`TargetCache.check`). Without teachers only the
    index is made.
    Returns the sources' keys, None for what can't be decoded, and what is refused: place in `sources` -> name and
    reason (can't be decoded, a target that isn't finite or overflows the storage).
    """
    keys, refused, bar = known_keys(folder, sources), {}, partial(tqdm, unit="image", disable=not progress)
    known = [key for key in keys if key]
    caches = {cache.fingerprint: (name, cache) for name, cache in caches.items()}  # tasks may share one
    to_fill = list(caches.values()) if teachers else []
    for _, cache in to_fill:
        cache.forget(cache.check(progress=progress))
        cache.remove_remains()
    lacking = set[str]().union(*(cache.missing(known) for _, cache in to_fill))
    todo = [i for i, key in enumerate(keys) if key is None or key in lacking]
    index = Path(folder) / "images" / f"{uuid.uuid4().hex}.jsonl"
    with bar(total=len(keys), initial=len(keys) - len(todo), desc="targets" if teachers else "images") as done:
        for batch in DataLoader(_Images(sources, todo), BATCH, num_workers=workers, collate_fn=list):
            done.update(len(batch))
            refused |= {i: f"{name}: {reason}" for i, name, state, reason, _ in batch if state is None}
            batch = [image for image in batch if image[2] is not None]
            found = {key: image for _, _, _, key, image in batch}
            for name, cache in to_fill:
                if new := sorted(cache.missing(found)):
                    encoder = teachers[name].encoder
                    if encoder.fingerprint != cache.fingerprint:
                        raise ValueError(f"{teachers[name].entry['path']} is not {cache.folder}'s teacher any more")
                    cache.store(new, encoder.encode([found[key] for key in new]))
            if lines := [f"{json.dumps([*state, key])}\n" for i, _, state, key, _ in batch if keys[i] != key]:
                with as_hint():
                    index.parent.mkdir(parents=True, exist_ok=True)
                    with index.open("a", encoding="utf-8") as file:
                        file.writelines(lines)
            for i, _, _, key, _ in batch:
                keys[i] = key
    for _, cache in to_fill:
        cache.flush()
    for name, cache in caches.values():
        why = ((i, cache.refused[key]) for i, key in enumerate(keys) if key in cache.refused)
        refused |= {i: f"{source_name(sources[i])}: {name}: {reason}" for i, reason in why}
    return keys, refused
