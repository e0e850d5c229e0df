"""The target cache: its sole writer and reader. A target is computed once, looked up by the image's content.

N images, Q positions, E width. On disk: folder/<encoder's fingerprint>-<storage>/<time>-<random>.safetensors. Such a
shard's header holds its rows' keys and checksums; it appears by an atomic rename, so that an interrupted fill leaves
whole shards only. Of two rows for one image the newer one counts. <random>.json beside them: keys of images that the
encoder has no usable target for, and why. checked/<random>.txt: shards that were found right, their size and date.
"""

import json
import math
import re
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.data import get_worker_info
from tqdm import tqdm
from transformers.utils import logging

from ..files.strangers import read_object
from ..files.writing import as_hint, write_whole
from .images import open_image
from .statistics import TargetStatistics

logger = logging.get_logger(__name__)

STORAGE = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int8")}
# Of words, exactly.
NUMBERS = {name: getattr(torch, name) for name in ("uint8", "int16")}
# int8: channels that share a scale, or the largest number below that divides the width.
BLOCK = 64


def image_key(image: Image.Image) -> str:
    """A hash of what the encoders see of an image: its size and RGB values."""
    image = open_image(image)
    # With the size: pictures of 2 x 8 and of 4 x 4 pixels may have the same bytes.
    return blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()


def _image_keys(images: list[Image.Image]) -> list[str]:
    return list(map(image_key, images))


class OncePerBatch:
    """A function of a batch, such as its keys, computed once for all tasks that ask for the same list one after the
    other. For one that asks again it is computed again: the images may have changed meanwhile."""

    def __init__(self, function: Callable[[list[Image.Image]], Any] = _image_keys):
        self.function = function
        self.images = None
        self.result = None
        # Ids of the tasks that have had the result.
        self.served: set[int] = set()

    def __call__(self, task: object, images: list[Image.Image]) -> Any:
        if images is not self.images or id(task) in self.served:
            self.images = images
            self.result = self.function(images)
            self.served = set()
        self.served.add(id(task))
        return self.result


class TargetCache:
    """Targets of one encoder, on disk; calling it with images is the same function as `encoder.encode`.

    Args:
        folder: may hold the caches of several encoders.
        fingerprint: `encoder.fingerprint`; a changed teacher or geometry gets a cache of its own.
        storage: a key of `STORAGE`, or of `NUMBERS` if the targets are numbers of words.
        shard_size: images a file; an interrupted fill loses fewer than that.
        batch_keys: shared by the caches that one collator asks.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str,
        storage: str = "float32",
        shard_size: int = 64,
        batch_keys: OncePerBatch | None = None,
    ):
        # A fingerprint may come from a note on disk: no path may get through, as damaged files are deleted there.
        if re.fullmatch(r"\w[\w.-]*", fingerprint) is None:
            raise ValueError(f"{fingerprint!r} is no encoder's fingerprint, which names a folder in {folder}")
        self.folder = Path(folder) / f"{fingerprint}-{storage}"
        self.fingerprint = fingerprint
        self.dtype = {**STORAGE, **NUMBERS}[storage]
        self.shard_size = shard_size
        self.batch_keys = batch_keys or OncePerBatch()
        # Of this process.
        self._notes = self.folder / "checked" / f"{uuid.uuid4().hex}.txt"
        # Shards since the last flush.
        self._written: list[Path] = []
        self.reload()

    def reload(self) -> None:
        """Reads the shards' headers. What is damaged is logged, and missing. OSError for a shard that can't be
        opened."""
        self._pending: list[tuple[str, dict[str, Tensor]]] = []
        # Keys stored since.
        self._new: set[str] = set()
        # Oldest first, so that a later row is a newer one.
        self._shards = sorted(self.folder.glob("*.safetensors"), key=_stamp)
        self._last = max(map(_stamp, self._shards), default=0)
        self._unreadable: list[Path] = []
        # Key -> why its target can't be used.
        self.failed: dict[str, str] = {}
        for path in self.folder.glob("*.json"):
            self.failed.update(self._read_failed(path))
        keys = []
        locations = []
        for shard, path in enumerate(self._shards):
            try:
                rows = _read_header(path)
            except (SafetensorError, FileNotFoundError, TypeError, KeyError, ValueError, AttributeError) as error:
                logger.warning(f"{path} is damaged or truncated ({error}): its targets count as missing")
                # Removed by another process.
                if not isinstance(error, FileNotFoundError):
                    self._unreadable.append(path)
                continue
            keys += rows
            locations += [(shard, row, checksum) for row, checksum in enumerate(rows.values())]
        # Arrays, not a dict: a loader's workers share them without copying.
        # Reversed, as the first of equal keys is kept: of two rows for one image the newer one counts. S32: a key has
        # at most 32 characters, all of ASCII (`is_key`).
        self._keys, newest = np.unique(np.array(keys[::-1], "S32"), return_index=True)
        self._locations = np.array(locations[::-1], np.int64).reshape(-1, 3)[newest]

    def _read_failed(self, path: Path) -> dict[str, str]:
        """A list of failed keys, which is a hint: without it they are tried again."""
        try:
            listed = read_object(path)
            if not all(is_key(key) and isinstance(reason, str) for key, reason in listed.items()):
                raise ValueError(f"{path} holds no keys and reasons")
            return listed
        except ValueError as error:
            self._unreadable.append(path)
            logger.warning(f"{error}: its images are tried again")
        except OSError as error:
            # It may be whole, only not ours to read: it is not deleted.
            logger.warning(f"{error}: its images are tried again")
        return {}

    def __len__(self) -> int:
        return len(self._keys)

    def _find(self, keys: Collection[str]) -> np.ndarray:
        """Each key's index, -1 for one that isn't there."""
        if not len(self):
            return np.full(len(keys), -1)
        # Where each would be among the sorted keys, and whether it is there.
        wanted = np.array(list(keys), "S32")
        indices = np.searchsorted(self._keys, wanted).clip(max=len(self) - 1)
        return np.where(self._keys[indices] == wanted, indices, -1)

    def _stored(self, index: int) -> dict[str, Tensor]:
        """A target as it is stored, mapped into memory."""
        shard, row, _ = self._locations[index].tolist()
        # Opened for each row: as fast as keeping thousands of shards open, and one that was cut short is noticed.
        with _open(self._shards[shard]) as file:
            return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 (it is no dict)

    def _row(self, index: int) -> dict[str, Tensor] | None:
        """The same if it is what was written, else None."""
        try:
            stored = self._stored(index)
        except (SafetensorError, FileNotFoundError, IndexError):
            # The last: fewer rows than its header says.
            return None
        if not stored:
            return None
        if _checksum(self._keys[index].decode(), stored) != self._locations[index, 2]:
            return None
        return stored

    def missing(self, keys: Collection[str]) -> set[str]:
        """Those keys that have no target, not even one that waits to be written, and haven't failed."""
        absent = {key for key, index in zip(keys, self._find(keys), strict=True) if index < 0}
        return absent - self._new - self.failed.keys()

    def check(self, index: int = 0, count: int = 1, progress: bool = False) -> list[str]:
        """Keys of the targets that aren't what was written, in every `count`-th shard from `index` on.

        A shard that was right once, and has the size and date that it had then, is not read again."""
        checked = self._checked()
        # What isn't known to be right already.
        states = {shard: _state(self._shards[shard]) for shard in range(index, len(self._shards), count)}
        unchecked = [shard for shard, state in states.items() if state not in checked]
        # Indices by shard and row: `order[starts[i] : starts[i + 1]]` are shard i's.
        order = np.lexsort((self._locations[:, 1], self._locations[:, 0]))
        starts = np.searchsorted(self._locations[order, 0], np.arange(len(self._shards) + 1))
        damaged = []
        for shard in tqdm(unchecked, f"checking {self.folder.name}", disable=not progress or not unchecked):
            indices = order[starts[shard] : starts[shard + 1]].tolist()
            bad = [bytes(self._keys[i]).decode() for i in indices if self._row(i) is None]
            if bad:
                logger.warning(f"{self._shards[shard]} is damaged: its damaged targets count as missing")
                # Without a note, so that the next check reads the shard again.
                damaged += bad
                continue
            state = states[shard]
            # None: it was removed meanwhile. Of a shard with a damaged header no rows are known, so none were checked.
            if state is not None and self._shards[shard] not in self._unreadable:
                self._note([state])
        return damaged

    def forget(self, keys: Collection[str]) -> None:
        """Counts those keys' targets as missing."""
        indices = sorted(set(self._find(keys).tolist()) - {-1})
        self._keys = np.delete(self._keys, indices)
        self._locations = np.delete(self._locations, indices, axis=0)

    def _checked(self) -> set[str]:
        """The states of shards that were right."""
        states = set()
        for file in self._notes.parent.glob("*.txt"):
            # A damaged line is no shard's state, and does no harm.
            states.update(file.read_text(encoding="utf-8", errors="replace").splitlines())
        return states

    def _note(self, states: list[str]) -> None:
        with as_hint():
            self._notes.parent.mkdir(parents=True, exist_ok=True)
            with self._notes.open("a", encoding="utf-8") as file:
                file.writelines(f"{state}\n" for state in states)

    def remove_remains(self) -> None:
        """Deletes damaged shards and lists, and what processes left that were killed while writing an hour ago."""
        for path in self._unreadable:
            path.unlink(missing_ok=True)
        # Of shards and notes.
        for path in [*self.folder.rglob("*.tmp"), *self.folder.parent.glob("*-*.*.tmp")]:
            # Another process has just finished it.
            with suppress(FileNotFoundError):
                # A younger one may be a shard that another process is writing.
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()

    def store(self, keys: Sequence[str], targets: Tensor) -> None:
        """Takes targets (n, Q, E) to be written when a shard is full, or by `flush`. Those that can't be used go to
        `failed`, which is kept, too: deleting its files lets them be tried again."""
        stored = _encode(targets, self.dtype)
        # As readers will get them: what overflows the storage's type is infinite here.
        decoded = _decode(stored)
        failed = {}
        # Told once, of the first batch. Numbers of words are exact.
        if not self._new and self.dtype not in NUMBERS.values():
            error = (1 - cosine_similarity(decoded.double(), targets.double(), dim=-1)).mean()
            # Equal ones differ by the cosine's own rounding, to either side.
            if error < 1e-12:
                exactness = "as exact as the teacher gave them"
            else:
                exactness = f"rounded for storage: 1 - cosine to the teacher's own is {error:.1e} (mean of a batch)"
            logger.info(f"{self.folder.name}: targets are stored {exactness}")
        for row, key in enumerate(keys):
            # First: as an integer, what isn't finite is some number.
            if not targets[row].isfinite().all():
                failed[key] = "its target is not finite"
            elif not decoded[row].isfinite().all():
                failed[key] = f"its target overflows {self.dtype}"
            else:
                self._pending.append((key, {name: part[row] for name, part in stored.items()}))
                self._new.add(key)
        while len(self._pending) >= self.shard_size:
            self._write(self._pending[: self.shard_size])
            del self._pending[: self.shard_size]
        if failed:
            self.failed.update(failed)
            write_whole(self.folder / f"{uuid.uuid4().hex}.json", json.dumps(failed, indent=2).encode())

    def flush(self) -> None:
        """Writes what waits for a full shard, and looks at the folder anew."""
        if self._pending:
            self._write(self._pending)
        if self._written:
            # A file system's clock ticks: what changes a shard from now on changes its date.
            time.sleep(0.02)
            states = map(_state, self._written)
            self._note([state for state in states if state is not None])
            self._written = []
        self.reload()

    def _write(self, rows: list[tuple[str, dict[str, Tensor]]]) -> None:
        header = json.dumps({key: _checksum(key, stored) for key, stored in rows})
        # All rows of a shard have the same parts: targets, and scales if they are int8.
        (_, first) = rows[0]
        tensors = {}
        for name in first:
            tensors[name] = torch.stack([stored[name] for _, stored in rows])
        # Later than all that is there, whatever the clock says: the newer one of two rows counts.
        self._last = max(time.time_ns(), self._last + 1)
        path = self.folder / f"{self._last:020d}-{uuid.uuid4().hex[:8]}.safetensors"
        write_whole(path, save(tensors, {"rows": header, "checksum": str(zlib.crc32(header.encode()))}))
        self._written.append(path)

    def read(self, keys: Sequence[str], dtype: torch.dtype = torch.float32) -> Tensor:
        """Targets (n, Q, E) in `dtype`; only their rows are read. LookupError for a key that isn't there and for a
        target that isn't what was written; it says what to do."""
        indices = self._find(keys)
        missing = (indices < 0).sum()
        if missing:
            raise LookupError(
                f"{missing} of {len(keys)} images are not in the target cache {self.folder}: run `ola-vlm targets`. "
                f"(If a file was changed but not its size and date, delete {self.folder.parent / 'images'} first.)"
            )
        targets = None
        for i, index in enumerate(indices):
            stored = self._row(index)
            is_cut = stored is None or "targets" not in stored
            if stored is None or is_cut or (targets is not None and stored["targets"].shape != targets.shape[1:]):
                path = self._shards[self._locations[index, 0]]
                remedy = "delete it and run `ola-vlm targets`, which computes its targets anew"
                raise LookupError(f"{path} is damaged: {remedy}")
            if targets is None:
                # The first row tells the shape of all.
                targets = _empty((len(keys), *stored["targets"].shape), dtype)
            # Straight into its place: a batch is never in memory twice.
            _decode(stored, out=targets[i])
        # None only of no keys.
        return cast(Tensor, targets)

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """The targets (N, Q, E), fp32, of one or more images, by what they show now."""
        return self.read(self.batch_keys(self, images))

    def as_stored(self, images: list[Image.Image]) -> Tensor:
        """The same values in the type that they are stored in, half the size in 16 bits; int8 is decoded to fp32."""
        dtype = torch.float32
        if self.dtype.is_floating_point:
            dtype = self.dtype
        return self.read(self.batch_keys(self, images), dtype)

    def statistics(self, keys: Sequence[str]) -> TargetStatistics:
        """Of those keys' targets, computed once: kept like a target, in a folder beside the shards."""
        # One row, whose key is the hash of all keys: other images have statistics of their own.
        known = TargetCache(self.folder, "statistics")
        name = blake2b("".join(keys).encode(), digest_size=16).hexdigest()
        (index,) = known._find([name])
        if index >= 0:
            stored = known._row(index)
            if stored is not None and stored.keys() == set(TargetStatistics._fields):
                return TargetStatistics(**stored)
        # A few at a time: the targets of a whole data set don't fit into memory.
        statistics = TargetStatistics.fit(self.read(keys[i : i + 32]) for i in range(0, len(keys), 32))
        with as_hint():
            known._write([(name, statistics._asdict())])
        return statistics


def _state(shard: Path) -> str | None:
    """What changes when the shard does; None if it isn't there any more."""
    with suppress(FileNotFoundError):
        stat = shard.stat()
        return f"{shard.name} {stat.st_size} {stat.st_mtime_ns}"
    return None


def _open(path: Path) -> safe_open:
    # The true OSError: safetensors takes every failure for a file that isn't there.
    path.open("rb").close()
    return safe_open(path, "pt")


def _stamp(path: Path) -> int:
    """When a shard was written (nanoseconds), from its name; 0 for a name that says nothing."""
    (digits, _, _) = path.name.partition("-")
    if digits.isascii() and digits.isdigit():
        return int(digits)
    return 0


def is_key(key: object) -> bool:
    """Whether it may be an image's or a list's: at most 32 letters of ASCII."""
    return isinstance(key, str) and key.isascii() and 0 < len(key) <= 32


def _read_header(path: Path) -> dict[str, int]:
    """A shard's keys and their rows' checksums. ValueError, TypeError or KeyError if they are none."""
    with _open(path) as file:
        header = file.metadata()
    if zlib.crc32(header["rows"].encode()) != int(header["checksum"]):
        raise ValueError("its keys were changed")
    rows = json.loads(header["rows"])
    are_keys = all(map(is_key, rows))
    are_checksums = all(type(checksum) is int and 0 <= checksum < 2**32 for checksum in rows.values())
    if not are_keys or not are_checksums:
        raise ValueError("its keys are none")
    return rows


def _checksum(key: str, stored: dict[str, Tensor]) -> int:
    """Of a row's key, numeric types, shapes and bytes."""
    value = zlib.crc32(key.encode())
    # Sorted: in which order a file lists its tensors doesn't matter.
    for name, part in sorted(stored.items()):
        value = zlib.crc32(f"{name} {part.dtype} {tuple(part.shape)}".encode(), value)
        value = zlib.crc32(part.contiguous().flatten().view(torch.uint8).numpy(), value)  # pyright: ignore[reportArgumentType] (an array is a buffer)
    return value


def _encode(targets: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    if dtype is not torch.int8:
        return {"targets": targets.to(dtype)}
    # A scale for each block of channels, as some channels are far larger than the others.
    blocks = targets.unflatten(-1, (-1, math.gcd(BLOCK, targets.shape[-1])))
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).bfloat16()
    # By the scale as it is stored, so that its rounding costs nothing. A block of zeros has the scale 0.
    steps = blocks / scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    # A scale that was rounded down gives more than 127 steps.
    return {"targets": steps.round().clamp(-127, 127).to(torch.int8).flatten(-2), "scales": scales}


def _empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """In a loader's worker it lies in shared memory, so that it is handed over without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(dtype.itemsize * math.prod(shape))
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue] (its stub lacks this form)


def _decode(stored: dict[str, Tensor], out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(stored["targets"].shape)
    out.copy_(stored["targets"])
    if "scales" in stored:
        scales = stored["scales"].float()
        out.unflatten(-1, (scales.shape[-2], -1)).mul_(scales)
    return out
