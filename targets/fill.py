"""Filling the target cache from images: teachers loaded when needed, and an index that spares decoding."""

import inspect
import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import extract_commit_hash

from ..configuration_ola_vlm import TASK_FIELDS
from ..files.strangers import read_finished
from ..files.writing import as_hint, write_json, write_whole
from .cache import OncePerBatch, TargetCache, image_key, is_key
from .encoders import ENCODERS, FEATURES_VERSION, TargetEncoder, current_names
from .images import ImageError, open_image, source_name
from .loading import loading_from
from .words import WORDS_ENCODERS, ClassWordsEncoder, DepthWordsEncoder, WordsEncoder, storage_of

logger = logging.get_logger(__name__)

# Images decoded and encoded at a time.
BATCH = 32


class Teacher:
    """A task's teacher as its recipe names it, loaded at the first use of `encoder`.

    Args:
        task: a task of the configuration, whose target's shape the teacher must have.
        entry: {"encoder": a name in ENCODERS, "path": name or folder, and more arguments of its `from_pretrained`}.
    """

    def __init__(self, task: dict, entry: dict, device: str | torch.device = "cpu"):
        self.task = task
        self.device = device
        self.shape = (task["target_length"], task["target_dim"])
        # "motion" says what is made of the features: a task with it shares its teacher with one without.
        self.entry = {name: value for name, value in current_names(entry).items() if name != "motion"}
        encoders = list(ENCODERS)
        if task.get("target") == "words":
            encoders = list(WORDS_ENCODERS)
        if entry.get("encoder") not in encoders or "path" not in entry:
            need = f"give its path, and as encoder one of {encoders}"
            raise ValueError(f"teachers[{task['name']!r}] is {entry}: {need}")

    @property
    def gives_words(self) -> bool:
        return self.entry["encoder"] in WORDS_ENCODERS

    @cached_property
    def encoder(self) -> TargetEncoder:
        encoder_class, path, options = self._parts()
        with self._naming_options():
            encoder = encoder_class.from_pretrained(path, **options)
        self._compare(encoder.target_length, encoder.target_dim)
        return encoder

    def check(self, folder: str | Path | None = None) -> None:
        """ValueError for a teacher that isn't there or whose targets have another shape; weights are not read. One
        that the cache in `folder` knows need not be there."""
        encoder_class, path, options = self._parts()
        # A cache that was moved without its teacher: the note tells all that training needs.
        if folder is not None and self._files() is None and self._note(folder).exists():
            return
        try:
            self._check_fields(encoder_class)
            with self._naming_options(), loading_from(path, options.get("subfolder", "")):
                shape = encoder_class.target_shape(path, **options)
        except (NotImplementedError, RuntimeError) as error:
            # A model that looks at values, of which there are none.
            logger.info(f"{path}: its targets' shape is seen when it is loaded ({error})")
            return
        self._compare(*shape)

    def _check_fields(self, encoder_class: type[TargetEncoder]) -> None:
        """ValueError for a field of other encoders that this one lacks: without weights nothing looks at it."""
        fields: set[str] = set()
        for encoder in (*ENCODERS.values(), *WORDS_ENCODERS.values()):
            fields |= inspect.signature(encoder._open).parameters.keys()
        # What transformers' loading takes is every encoder's.
        own = {*inspect.signature(encoder_class._open).parameters, "subfolder"}
        own |= inspect.signature(PreTrainedModel.from_pretrained).parameters.keys()
        for name in self.entry:
            if name in fields - own:
                raise self._unknown_option(name)

    def _unknown_option(self, name: str) -> ValueError:
        what = f"teachers[{self.task['name']!r}] has the option {name!r}"
        return ValueError(f"{what}, which {self.entry['encoder']} doesn't know: leave it out")

    @contextmanager
    def _naming_options(self) -> Iterator[None]:
        """An option that the encoder doesn't know is a ValueError that names it."""
        try:
            yield
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in self.entry:
                raise
            raise self._unknown_option(unknown[1]) from error

    def _parts(self) -> tuple[type[TargetEncoder], str, dict]:
        # A target's grid is square. An entry may name a device of its own.
        options = {"device": self.device, **self.entry, "grid": math.isqrt(self.task["target_length"])}
        encoder_class = {**ENCODERS, **WORDS_ENCODERS}[options.pop("encoder")]
        path = options.pop("path")
        return encoder_class, path, options

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
        return self._known(folder)["fingerprint"]

    def _known(self, folder: str | Path) -> dict:
        """The note's content, written if there is none that counts."""
        note = self._note(folder)
        files = self._files()
        known = _read_note(note)
        # Of a teacher that isn't here nothing else can be known.
        if known is not None and (files is None or (known.get("files") == files and self._counts(known))):
            return known
        known = {"teacher": self.entry, "files": files, "fingerprint": self.encoder.fingerprint, "rescaling": True}
        if isinstance(self.encoder, WordsEncoder):
            known["words"] = self.encoder.words
        if isinstance(self.encoder, ClassWordsEncoder):
            known["task_inputs"] = self.encoder.task_inputs
        if isinstance(self.encoder, DepthWordsEncoder):
            known["alone"] = self.encoder.is_alone
        with as_hint():
            write_json(note, known)
        return known

    def _counts(self, known: dict) -> bool:
        """Whether a note's fingerprint has all that it depends on, as it is today. Notes without `rescaling`, a class
        teacher's without its `task_inputs`, or a depth teacher's without `alone` are from before fingerprints had
        these (the last had no mark of how depths are ranked, either)."""
        if not known.get("rescaling"):
            return False
        of_encoder = {ClassWordsEncoder.name: "task_inputs", DepthWordsEncoder.name: "alone"}
        field_of_encoder = of_encoder.get(self.entry["encoder"])
        if field_of_encoder is not None and field_of_encoder not in known:
            return False
        # Which words an entry gives may change with this package: those of a class are made of its name.
        return not self.gives_words or known.get("words") == self.words()

    def words(self, folder: str | Path | None = None) -> list[str]:
        """What the numbers say that it gives as targets. ValueError if the teacher isn't there, and no cache in
        `folder` knows it."""
        if folder is not None and self._files() is None and self._note(folder).exists():
            words = self._known(folder).get("words")
            if isinstance(words, list) and all(isinstance(word, str) for word in words):
                return words
            raise ValueError(
                f"{self._note(folder)} doesn't say which words its cache has: the teacher has to be there"
            )
        encoder_class, path, options = self._parts()
        with loading_from(path, options.get("subfolder", "")):
            assert issubclass(encoder_class, WordsEncoder)
            return encoder_class.list_words(path, **options)

    def _note(self, folder: str | Path) -> Path:
        # With another batch size, say, the same note is found.
        change_nothing = {"batch_size", "device", "license"}
        entry = {name: value for name, value in self.entry.items() if name not in change_nothing}
        identity = json.dumps([self.task["target_length"], entry, FEATURES_VERSION], sort_keys=True)
        digest = blake2b(identity.encode(), digest_size=8).hexdigest()
        return Path(folder) / f"{self.entry['encoder']}-{digest}.json"

    def _files(self) -> list | str | None:
        """What tells whether the weights have changed; None if they are not here."""
        path = self.entry["path"]
        if os.path.isdir(path):
            paths = [str(file) for file in sorted(Path(path).rglob("*")) if file.is_file()]
            # A configuration alone, without its weights.
            if not any(name.endswith((".safetensors", ".bin")) for name in paths):
                return None
            # Lists, as JSON gives them back; empty for a file that was removed since it was listed.
            return [list(source_state(name) or ()) for name in paths]
        config = str(Path(self.entry.get("subfolder", ""), "config.json"))
        # No name on the Hub but a folder that isn't there.
        with suppress(HFValidationError):
            fetched = try_to_load_from_cache(path, config, revision=self.entry.get("revision"))
            # No text for a file that isn't fetched, or that is known not to exist.
            return extract_commit_hash(fetched if isinstance(fetched, str) else None, None)
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


def make_teachers(
    tasks: Sequence[dict], entries: Mapping[str, dict], device: str | torch.device = "cpu"
) -> dict[str, Teacher]:
    """Each task's, entries without a task are ignored; tasks whose entries differ in "motion" only share one. A task
    whose targets are words has one for each kind, "<task>.<kind>", from entries by kind."""
    names = [task["name"] for task in tasks]
    if not set(names) <= set(entries):
        raise ValueError(f"the tasks {names} need one teacher each, `teachers` has {list(entries)}")
    teachers: dict[str, Teacher] = {}
    parts = []
    for task in tasks:
        parts += _with_entries(task, entries[task["name"]])
    for task, entry in parts:
        teacher = Teacher(task, entry, device)
        # One model in memory for all tasks that take its features.
        for other in teachers.values():
            if other.entry == teacher.entry and other.shape == teacher.shape:
                teacher = other
                break
        teachers[task["name"]] = teacher
    return teachers


def _with_entries(task: dict, entry: dict) -> list[tuple[dict, dict]]:
    """A task and its teacher's entry; of words, a task and an entry for each kind."""
    if task.get("target") != "words":
        return [(task, entry)]
    kinds = task.get("words", TASK_FIELDS["words"])
    lacking = [kind for kind in kinds if not isinstance(entry.get(kind), dict)]
    if lacking:
        need = f"give entries for the kinds of words {list(kinds)}, each with an encoder of {list(WORDS_ENCODERS)}"
        raise ValueError(f"teachers[{task['name']!r}] has none for {lacking}: {need}")
    return [({**task, "name": f"{task['name']}.{kind}", "target_dim": 1}, entry[kind]) for kind in kinds]


def open_caches(folder: str | Path, teachers: dict[str, Teacher], storage: str = "float32") -> dict[str, TargetCache]:
    """Each teacher's, with targets in `storage`; of words, in the type that their number needs."""
    # Shared by all caches: an image is hashed once, not once a task.
    batch_keys = OncePerBatch()
    # Tasks of one teacher share its cache.
    by_fingerprint: dict[str, TargetCache] = {}
    caches = {}
    for name, teacher in teachers.items():
        fingerprint = teacher.fingerprint(folder)
        if fingerprint not in by_fingerprint:
            numeric_type = storage
            if teacher.gives_words:
                numeric_type = storage_of(teacher.words(folder))
            by_fingerprint[fingerprint] = TargetCache(folder, fingerprint, numeric_type, batch_keys=batch_keys)
        caches[name] = by_fingerprint[fingerprint]
    return caches


class SourceState(NamedTuple):
    """What changes when an image does: of a file its path, size and date, of `{"bytes"}` their hash."""

    name: str
    size: int
    # Nanoseconds.
    date: int


def source_state(source: str | dict) -> SourceState | None:
    """None for a file that isn't there."""
    if isinstance(source, dict):
        digest = blake2b(source["bytes"], digest_size=16).hexdigest()
        return SourceState(name=digest, size=len(source["bytes"]), date=0)
    with suppress(FileNotFoundError):
        stat = os.stat(source)
        return SourceState(name=source, size=stat.st_size, date=stat.st_mtime_ns)
    return None


def known_keys(folder: str | Path, sources: Sequence[str | dict]) -> list[str | None]:
    """Each source's key, if `fill` saw it as it is now (`source_state`), else None.

    From folder/images/, where each process that fills keeps a file of its own. It spares decoding all images at each
    start, no more: training looks targets up by the decoded image.
    """
    keys: dict = {}
    for file in (Path(folder) / "images").glob("*.jsonl"):
        keys.update(_read_index(file))
    return [keys.get(source_state(source)) for source in sources]


def _read_index(file: Path) -> dict[SourceState, str]:
    """State -> key, from the lines that say so. The others are a process's that was killed, or damage: their number is
    logged, and they are taken out of a file that no process has written to for an hour."""
    keys = {}
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
        keys[SourceState(path, size, date)] = key
        good.append(line)
    if bad:
        logger.warning(f"{file} has {bad} damaged lines: their images are decoded again")
    if bad and is_old:
        with as_hint():
            write_whole(file, b"".join(good))
    return keys


@dataclass
class DecodedImage:
    """An image as a loader's worker found it: `index` among the sources; without `image`, `error` says why."""

    index: int
    name: str
    state: SourceState | None = None
    key: str = ""
    image: Image.Image | None = None
    error: str = ""


class _Images(Dataset):
    """The sources of those indices, decoded in a loader's workers."""

    def __init__(self, sources: Sequence[str | dict], indices: list[int]):
        self.sources = sources
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> DecodedImage:
        index = self.indices[i]
        source = self.sources[index]
        name = source_name(source)
        try:
            # Before the image is read: it may change meanwhile.
            state = source_state(source)
            image = open_image(source)
        except ImageError as error:
            return DecodedImage(index, name, error=error.reason)
        except OSError as error:
            # Gone, or no right to read it.
            return DecodedImage(index, name, error=f"{type(error).__name__}: {error}")
        return DecodedImage(index, name, state=state, key=image_key(image), image=image)


@dataclass
class FillReport:
    """What `fill` found of each source."""

    # None for one that can't be decoded.
    keys: list[str | None]
    # Index of a source -> its name and why it has no target: not decoded, not finite, beyond the storage's range.
    failed: dict[int, str] = field(default_factory=dict)


def fill(
    folder: str | Path,
    teachers: dict[str, Teacher],
    caches: dict[str, TargetCache],
    sources: Sequence[str | dict],
    workers: int = 0,
    progress: bool = True,
) -> FillReport:
    """Computes and stores what the caches lack of the images (paths, or `{"bytes", "path": what to call them}`), and
    brings the index of images up to date.

    What they have is compared with its checksums, each shard once (`TargetCache.check`). Without teachers only the
    index is made.
    """
    report = FillReport(keys=known_keys(folder, sources))
    # Tasks may share a cache.
    names = {id(cache): name for name, cache in caches.items()}
    caches = {name: caches[name] for name in names.values()}
    to_fill = {}
    what = "images"
    if teachers:
        to_fill = caches
        what = "targets"
    # What is damaged is computed anew, like what is missing.
    for cache in to_fill.values():
        cache.forget(cache.check(progress=progress))
        cache.remove_remains()

    # The images to be opened: those that the index doesn't know, or whose targets some cache lacks.
    known = [key for key in report.keys if key]
    lacking = set[str]().union(*(cache.missing(known) for cache in to_fill.values()))
    todo = [i for i, key in enumerate(report.keys) if key is None or key in lacking]
    index_file = Path(folder) / "images" / f"{uuid.uuid4().hex}.jsonl"
    loader = DataLoader(_Images(sources, todo), BATCH, num_workers=workers, collate_fn=list)
    with tqdm(
        total=len(sources),
        initial=len(sources) - len(todo),
        desc=what,
        unit="image",
        disable=not progress,
    ) as bar:
        for batch in loader:
            bar.update(len(batch))
            decoded = [image for image in batch if not image.error]
            for image in batch:
                if image.error:
                    report.failed[image.index] = f"{image.name}: {image.error}"
            # By key: a picture under two names is encoded once.
            _store_targets(teachers, to_fill, {image.key: image.image for image in decoded})
            # Only what the index doesn't say already.
            _write_index(index_file, [image for image in decoded if report.keys[image.index] != image.key])
            for image in decoded:
                report.keys[image.index] = image.key
    for cache in to_fill.values():
        cache.flush()

    # Also those that failed in a fill before this one.
    for name, cache in caches.items():
        for i, key in enumerate(report.keys):
            if key in cache.failed:
                report.failed[i] = f"{source_name(sources[i])}: {name}: {cache.failed[key]}"
    return report


def _store_targets(
    teachers: dict[str, Teacher], caches: dict[str, TargetCache], images: dict[str, Image.Image]
) -> None:
    """Computes what the caches lack of those images, by their keys."""
    for name, cache in caches.items():
        lacking = sorted(cache.missing(images))
        if not lacking:
            continue
        encoder = teachers[name].encoder
        # The weights may have been replaced since the note was written.
        if encoder.fingerprint != cache.fingerprint:
            raise ValueError(f"{teachers[name].entry['path']} is not {cache.folder}'s teacher any more")
        cache.store(lacking, encoder.encode([images[key] for key in lacking]))


def _write_index(file: Path, images: list[DecodedImage]) -> None:
    if not images:
        return
    with as_hint():
        file.parent.mkdir(parents=True, exist_ok=True)
        # A line an image: a process that is killed spoils its last line at most.
        with file.open("a", encoding="utf-8") as lines:
            for image in images:
                # It was there to be decoded.
                assert image.state is not None
                lines.write(f"{json.dumps([*image.state, image.key])}\n")
