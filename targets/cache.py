"""The target cache: its sole writer and reader. A target is computed once, looked up by the image's content.

N images, Q positions, E width. On disk: folder/<encoder's fingerprint>/<hash of keys>.safetensors, all
with a tensor `targets` (n, Q, E) in fp32 and its keys in the metadata. These shards appear by an atomic rename: an
interrupted fill leaves whole shards only, and what they hold is not computed again.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .encoders import TargetEncoder, open_image


def image_key(image: Image.Image) -> str:
    """A hash of what the encoders see of an image: its size and RGB values."""
    image = open_image(image)
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()


class TargetCache:
    """Targets of one encoder, on disk; calling it with images is the same function as `encoder.encode`.

    Args:
        folder: may hold the caches of several encoders.
        fingerprint: `encoder.fingerprint`; a changed teacher or geometry gets a cache of its own.
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        self.folder = Path(folder) / fingerprint
        self.rows: dict[str, tuple[Path, int]] = {}  # an image's key -> its shard and row
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def _index(self, path: Path):
        with safe_open(path, "pt") as shard:
            keys = json.loads(shard.metadata()["keys"])
        self.rows |= {key: (path, row) for row, key in enumerate(keys)}

    def fill(self, encoder: TargetEncoder, images: Iterable[Image.Image], shard_size=128, progress=lambda count: None):
        """Compute and store the targets of those images that it doesn't hold yet.

        Args:
            encoder: the one with this cache's fingerprint.
            images: read one shard at a time, so a generator of any length will do.
            shard_size: images a file; an interruption loses one unfinished shard.
            progress: called with the number of images done since its last call (a progress bar's `update`).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        images = iter(images)
        while batch := list(itertools.islice(images, shard_size)):
            new = {key: image for image in batch if (key := image_key(image)) not in self.rows}
            if new:
                self._write(list(new), encoder.encode(list(new.values())))
            progress(len(batch))

    def _write(self, keys: list[str], targets: Tensor):
        # Named by its content: two processes that fill one cache don't overwrite each other.
        path = self.folder / f"{hashlib.blake2b(''.join(keys).encode(), digest_size=8).hexdigest()}.safetensors"
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"targets": targets}, unfinished, metadata={"keys": json.dumps(keys)})
        os.replace(unfinished, path)
        self._index(path)

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """The images' targets: (N, Q, E), fp32. Only their rows are read from disk. KeyError if it lacks one."""
        keys, rows = [image_key(image) for image in images], []
        if missing := sum(key not in self.rows for key in keys):
            raise KeyError(f"{missing} of {len(keys)} images are not in the target cache {self.folder}: fill() it")
        for path, row in (self.rows[key] for key in keys):
            with safe_open(path, "pt") as shard:  # maps the file into memory: as fast as keeping it open
                rows.append(shard.get_slice("targets")[row])
        return torch.stack(rows)


class TargetStatistics(NamedTuple):
    """Mean per position and channel (Q, E) and standard deviation per channel (E,) of the training images' targets.

    Targets centred and scaled by them separate better in the contrastive term (a departure from the paper).
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> "TargetStatistics":
        """From batches (N, Q, E), at least one, read once. The deviations are taken from each position's own mean."""
        count, total, squares = 0, 0.0, 0.0
        for batch in batches:
            count += len(batch)
            total = total + batch.double().sum(0)
            squares = squares + batch.double().square().sum(0)
        mean = total / count
        std = (squares / count - mean**2).mean(0).clamp(min=0).sqrt()
        return cls(mean.float(), torch.where(std > 1e-6, std, 1).float())  # a constant channel stays as it is

    def standardize(self, targets_NQE: Tensor) -> Tensor:
        return (targets_NQE - self.mean) / self.std

    def restore(self, targets_NQE: Tensor) -> Tensor:
        """The inverse of `standardize`: what the encoder's `decode` understands."""
        return targets_NQE * self.std + self.mean

    def save(self, path: str | Path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(self._asdict(), path)

    @classmethod
    def load(cls, path: str | Path) -> "TargetStatistics":
        return cls(**load_file(path))
