"""The target cache at the paper's sizes: reading speed, disk need, error of each storage. `python benchmarks/cache.py`

Speed: two loader workers read the targets of all three tasks for images of 640 x 480 from the page cache, as in
training: hashing, checksums, conversion to fp32 and the way to the main process included. Beside it, in turn, the
floor: the same bytes read from the shards, converted and handed over, nothing looked up or checked.
Error: of the miniature's teachers on its rendered scenes.
"""

import argparse
import os
import platform
import resource
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader

from ola_vlm.configuration_ola_vlm import default_tasks
from ola_vlm.recipes import miniature as recipe
from ola_vlm.targets.cache import STORAGE, OncePerBatch, TargetCache, _decode, _empty, image_key
from ola_vlm.targets.fill import make_teachers
from ola_vlm.world import render

LLAVA_558K = 558_128  # images
BATCH = 16
WORKERS = 2
# Times that all images are read.
ROUNDS = 6
# Images that the loader has its workers fetch as it starts: two batches each, by default.
START = 2 * WORKERS * BATCH


def write_caches(folder: Path, images: list[Image.Image], storage: str) -> dict[str, TargetCache]:
    """Random targets of the paper's shapes."""
    # Shared by the three tasks' caches, as in training: each image is hashed once a batch.
    keys = OncePerBatch()
    generator = torch.Generator().manual_seed(0)
    caches = {task["name"]: TargetCache(folder, task["name"], storage, batch_keys=keys) for task in default_tasks()}
    for task in default_tasks():
        for image in images:
            # (1, Q, E): random, as a target's values make no difference to the speed.
            targets = torch.randn(1, task["target_length"], task["target_dim"], generator=generator)
            caches[task["name"]].store([image_key(image)], targets)
        caches[task["name"]].flush()
    return caches


class Checked:
    """A collator's way: look up by content, compare checksums."""

    def __init__(self, images: list[Image.Image], caches: dict[str, TargetCache]):
        self.images = images
        self.caches = caches

    def __call__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        batch = [self.images[i] for i in indices]
        return {task: cache(batch) for task, cache in self.caches.items()}


class Floor(Checked):
    """The rows of those places, whatever they are."""

    def __call__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        targets = {}
        for task, cache in self.caches.items():
            # `_stored` and `_decode` are what reading needs at least; `Checked` adds keys, look-up and checksums.
            rows = [cache._stored(at) for at in indices]
            # In shared memory, as the cache's own way: handing over costs both the same.
            targets[task] = _empty((len(rows), *rows[0]["targets"].shape))
            for row, target in zip(rows, targets[task], strict=True):
                _decode(row, out=target)
        return targets


def images_per_second(reader: Checked, rounds: int = ROUNDS) -> tuple[float, float]:
    """Of two loader workers, without their start: by the clock, and by the seconds that they had a core for. The
    images, all rounds together, must be more than START."""
    order = []
    for _ in range(rounds):
        order += torch.randperm(len(reader.images)).tolist()
    # Usage of children counts those that have ended, so the loader must be gone before it is asked again.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    loader = iter(DataLoader(order, BATCH, num_workers=WORKERS, collate_fn=reader))
    # The workers' start isn't counted.
    for _ in range(START // BATCH):
        next(loader)
    start = time.perf_counter()
    # The last batch may be a short one: (N, Q, E) of each task.
    count = sum(len(next(iter(batch.values()))) for batch in loader)
    seconds = time.perf_counter() - start
    # Ends the workers and waits for them.
    del loader
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # Processor seconds include the workers' start: the second number is low rather than high.
    return count / seconds, WORKERS * len(order) / cores


def size_of_words(images: list[Image.Image]) -> float:
    """Bytes an image of numbers of words of two kinds, checksums and keys included, at the paper's 576 positions."""
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        # uint8 holds a word's number: there are far fewer than 256 words of a kind.
        for kind in ("class", "depth"):
            cache = TargetCache(folder, kind, "uint8")
            cache.store(list(map(image_key, images)), torch.randint(12, (len(images), 576, 1)).float())
            cache.flush()
            size += sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
    return size / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.images * ROUNDS <= START:
        parser.error(f"--images {args.images}: give at least {START // ROUNDS + 1}, as the first {START} aren't timed")
    # One thread, as each worker has: more would compete with the workers for the cores.
    torch.set_num_threads(1)
    machine = platform.processor() or platform.machine()
    print(f"{os.cpu_count()} cores ({machine}), load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")

    # Noise: cost depends on an image's size, not on what it shows; all keys differ.
    pixels = np.random.default_rng(0).integers(0, 256, (args.images, 480, 640, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    with tempfile.TemporaryDirectory() as folder:
        caches = {storage: write_caches(Path(folder), images, storage) for storage in STORAGE}
        rates = {pair: [] for pair in product(STORAGE, (Checked, Floor))}
        # All take turns, so that a busy minute of the machine hits every variant.
        for _ in range(args.rounds):
            for storage, side in rates:
                rates[storage, side].append(images_per_second(side(images, caches[storage])))
        print("\nimages/s of two workers, and what it would be if they had two cores to themselves")
        print(f"{'storage':10}{'read':>14}{'floor':>14}{'ratio':>7}{'bytes/image':>13}{'LLaVA-558K':>12}")
        for storage in STORAGE:
            read = np.array(rates[storage, Checked])
            floor = np.array(rates[storage, Floor])
            files = []
            for cache in caches[storage].values():
                files += cache.folder.glob("*.safetensors")
            size = sum(path.stat().st_size for path in files) / len(images)
            # By the clock, and in brackets by processor time.
            pairs = ["{:.0f} ({:.0f})".format(*np.median(side, axis=0)) for side in (read, floor)]
            # Of processor time, as on a busy machine the clock tells more of the other work.
            ratio = np.median(read[:, 1] / floor[:, 1])
            total = size * LLAVA_558K / 1e9
            print(f"{storage:10}{pairs[0]:>14}{pairs[1]:>14}{ratio:7.2f}{size:13.0f}{total:9.0f} GB")

    size = size_of_words(images)
    print(f"{'words':10}{'':35}{size:13.0f}{size * LLAVA_558K / 1e9:9.1f} GB")

    print("\n1 - cosine of stored and exact targets, mean over positions (after taking the mean target off)")
    scenes = [Image.fromarray(image) for image in render.render_scenes(render.sample_scenes(64, seed=0))["image"]]
    keys = list(map(image_key, scenes))
    for task, teacher in make_teachers(recipe.TASKS, recipe.TEACHERS).items():
        # (N, Q, E) as the teacher gives it, before any storage rounds it.
        exact = teacher.encoder.encode(scenes).double()
        for storage in STORAGE:
            with tempfile.TemporaryDirectory() as folder:
                cache = TargetCache(folder, task, storage)
                cache.store(keys, exact.float())
                cache.flush()
                read = cache.read(keys).double()
            plain = 1 - cosine_similarity(read, exact, dim=-1).mean()
            # Without the mean target, which all images share, an error counts by what tells images apart.
            centered = 1 - cosine_similarity(read - exact.mean(0), exact - exact.mean(0), dim=-1).mean()
            print(f"{task:8}{storage:10}{plain:9.1e}  ({centered:.1e})")


if __name__ == "__main__":
    main()
