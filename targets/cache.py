"""The target cache: its sole writer and reader. A target is computed once, looked up by the image's content.

N images, Q positions, E width. On disk: folder/<encoder's fingerprint>-<numeric type>/<hash of keys>.safetensors, all
with a tensor `targets` (n, Q, E) and its keys in the metadata. These shards appear by an atomic rename: an interrupted
fill leaves whole shards only, and what they hold is not computed again.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

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
        dtype: torch.float16 halves the space (relative error 5e-4); the default is exact.
    """

    def __init__(self, folder: str | Path, fingerprint: str, dtype: torch.dtype = torch.float32):
        self.fingerprint, self.dtype = fingerprint, dtype
        self.folder = Path(folder) / f"{fingerprint}-{str(dtype).removeprefix('torch.')}"
        self._rows: dict[str, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def _index(self, path: Path):
        with safe_open(path, "pt") as shard:
            keys = json.loads(shard.metadata()["keys"])
        self._rows |= {key: (path, row) for row, key in enumerate(keys)}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def fill(
        self,
        encoder: TargetEncoder,
        images: Iterable[Image.Image],
        batch_size: int = 32,
        progress: Callable[[int], object] = lambda count: None,
        shard_size: int = 512,
    ) -> int:
        """Compute and store the targets of those images that it doesn't hold yet.

        Args:
            images: read one batch at a time, so a generator of any length will do.
            progress: called with the number of images done since its last call (a progress bar's `update`).
            shard_size: images a file; an interruption loses one unfinished shard.
        Returns: the number of images encoded.
        """
        if encoder.fingerprint != self.fingerprint:
            raise ValueError(f"this cache belongs to {self.fingerprint}, not {encoder.fingerprint}: open another one")
        self.folder.mkdir(parents=True, exist_ok=True)
        pending: dict[str, Tensor] = {}
        before, images = len(self), iter(images)
        while batch := list(itertools.islice(images, batch_size)):
            new = {key: image for image in batch if (key := image_key(image)) not in self and key not in pending}
            if new:
                pending |= zip(new, encoder.encode(list(new.values()), batch_size).to(self.dtype), strict=True)
            if len(pending) >= shard_size:
                self._write(pending)
                pending = {}
            progress(len(batch))
        if pending:
            self._write(pending)
        return len(self) - before

    def _write(self, targets: dict[str, Tensor]):
        keys, tensor = list(targets), torch.stack(list(targets.values()))
        if not tensor.isfinite().all():
            raise ValueError(f"the targets of {self.fingerprint} are not finite in {self.dtype}: use torch.float32")
        # Named by its content: two processes that fill one cache don't overwrite each other.
        path = self.folder / f"{hashlib.blake2b(''.join(keys).encode(), digest_size=8).hexdigest()}.safetensors"
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"targets": tensor}, unfinished, metadata={"keys": json.dumps(keys)})
        os.replace(unfinished, path)
        self._index(path)

    def read(self, keys: list[str]) -> Tensor:
        """The targets of these keys, in their order: (N, Q, E), fp32. Only the rows asked for are read from disk."""
        missing = sum(key not in self for key in keys)
        if missing or not self._rows:
            raise KeyError(f"{missing} of {len(keys)} images are not in the target cache {self.folder}: fill() it")
        if not keys:  # a batch without images still has Q and E
            return self.read([next(iter(self._rows))])[:0]
        rows = []
        for path, row in (self._rows[key] for key in keys):
            with safe_open(path, "pt") as shard:  # maps the file into memory: as fast as keeping it open
                rows.append(shard.get_slice("targets")[row].float())
        return torch.stack(rows)

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """The images' targets: (N, Q, E), fp32. KeyError if it doesn't hold one of them."""
        return self.read([image_key(image) for image in images])


class TargetStatistics:
    """Mean per position and channel (Q, E) and standard deviation per channel (E,) of the training images' targets.

    Targets centred and scaled by them separate better in the contrastive term (a departure from the paper).
    """

    def __init__(self, mean_QE: Tensor, std_E: Tensor):
        self.mean_QE, self.std_E = mean_QE, std_E

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> "TargetStatistics":
        """From batches (N, Q, E), read once. The deviations are taken from each position's own mean."""
        count, total, squares = 0, 0.0, 0.0
        for batch in batches:
            count += len(batch)
            total = total + batch.double().sum(0)
            squares = squares + batch.double().square().sum(0)
        if count == 0:
            raise ValueError("no targets to take statistics of: pass those of the training images")
        mean_QE = total / count
        std_E = (squares / count - mean_QE**2).mean(0).clamp(min=0).sqrt()
        return cls(mean_QE.float(), torch.where(std_E > 1e-6, std_E, 1).float())  # a constant channel stays as it is

    def standardize(self, targets_NQE: Tensor) -> Tensor:
        return (targets_NQE - self.mean_QE.to(targets_NQE)) / self.std_E.to(targets_NQE)

    def restore(self, targets_NQE: Tensor) -> Tensor:
        """The inverse of `standardize`: what the encoder's `decode` understands."""
        return targets_NQE * self.std_E.to(targets_NQE) + self.mean_QE.to(targets_NQE)

    def save(self, path: str | Path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({"mean": self.mean_QE.contiguous(), "std": self.std_E.contiguous()}, path)

    @classmethod
    def load(cls, path: str | Path) -> "TargetStatistics":
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["std"])
