"""The targets of a run: from its teachers or from the target cache, which all its processes fill together."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import distributed
from transformers.utils import logging

from ..targets.cache import TargetCache
from ..targets.encoders import Motion
from ..targets.fill import Teacher, fill, make_teachers, open_caches, refused_targets
from .arguments import OlaVlmArguments
from .data import TargetSource
from .rows import Rows, Sources, StreamRows

logger = logging.get_logger(__name__)
T = TypeVar("T")


def gathered(compute: Callable[[], T]) -> list[T]:
    """What each process computes. The slowest one is waited for however long: the run's own group would time out."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [compute()]
    group, found = (
        distributed.new_group(backend="gloo", timeout=timedelta(days=365)),
        [None] * torch.distributed.get_world_size(),
    )
    distributed.all_gather_object(found, compute(), group=group)
    distributed.destroy_process_group(group)
    return found


def filled_caches(
    args: OlaVlmArguments, teachers: dict[str, Teacher], images: Sources, compute: bool
) -> tuple[dict[str, TargetCache], list[str | None], dict[int, str]]:
    """The caches after each process has done its part of the images: looked at them and, if asked, computed targets;
    all images' keys; and those that can't be used, place in `images` -> name and reason, which are logged.

    ValueError names them unless bad rows are to be dropped, and if targets are missing otherwise."""
    with args.main_process_first(desc="target cache"):  # a teacher's fingerprint may have to be computed
        caches = open_caches(args.target_cache, teachers, args.target_storage)
    # Shuffled: of an interrupted fill, or one with --shard, each process has about the same left to do.
    order = np.random.default_rng(0).permutation(len(images))
    parts = [np.sort(order[rank :: args.world_size]) for rank in range(args.world_size)]
    part, show = images[parts[args.process_index]], args.should_log and not args.disable_tqdm
    done = gathered(
        lambda: fill(args.target_cache, teachers, caches if compute else {}, part, args.dataloader_num_workers, show)
    )
    keys, refused = [None] * len(images), {}
    for places, (found, why) in zip(parts, done, strict=True):
        refused |= {int(places[i]): reason for i, reason in why.items()}
        for i, key in zip(places, found, strict=True):
            keys[i] = key
    for cache in caches.values():
        cache.reload()
    if refused := refused | refused_targets(caches, keys, images):
        named, what = "\n".join(list(refused.values())[:20]), f"{len(refused)} images have no target"
        if args.on_bad_rows == "stop":
            raise ValueError(f"{what}; drop their rows, or set on_bad_rows=drop. The first ones:\n{named}")
        logger.warning(f"{what}, their rows are dropped. The first ones:\n{named}")
    usable = {key for key in keys if key}
    if lacking := {name: missing for name, cache in caches.items() if (missing := cache.missing(usable))}:
        counts = ", ".join(f"{len(missing)} of {name}" for name, missing in lacking.items())
        count = f"{len(set[str]().union(*lacking.values()))} of {len(usable)} images ({counts})"
        what = f"the cache {args.target_cache} lacks targets of {count}"
        if compute:
            raise ValueError(
                f"{what} that were computed just now: is it one folder for all machines? If it is, start again"
            )
        raise ValueError(
            f"{what}: compute them by `ola-vlm targets` with this run's --recipe and fields, or as the run starts by "
            "--target_fill true"
        )
    return caches, keys, refused


def target_sources(args: OlaVlmArguments, tasks: Sequence[dict], rows: Rows | StreamRows) -> dict[str, TargetSource]:
    """Each task's function of images: its teacher or, with `target_cache`, what is stored of it; then no teacher is
    loaded, and rows with an image that no target can be had of are dropped. ValueError: as `filled_caches`'s."""
    teachers = make_teachers(tasks, args.teachers or {}, args.device)
    if not args.target_cache:
        sources, keys = {name: teacher.encoder.encode for name, teacher in teachers.items()}, []
    elif isinstance(rows, StreamRows):
        raise ValueError("a stream's images can't be counted for a target cache: give none, or set streaming=false")
    else:
        images = rows.sources()
        sources, keys, refused = filled_caches(args, teachers, images, args.target_fill)
        keys = [key for i, key in enumerate(keys) if i not in refused]
        if refused:
            logger.warning(f"dropped {rows.drop_images(images, refused)} rows of images without a target")
            if not len(rows):
                raise ValueError("no row is left whose images have targets")
    found, once = {}, {teacher: Once(sources[name]) for name, teacher in teachers.items()}
    for name, teacher in teachers.items():
        is_motion, source = args.teachers[name].get("motion", False), sources[name]
        if list(teachers.values()).count(teacher) > 1:
            source = once[teacher]
        if args.standardize_targets and keys:
            # By the training images' statistics, which go with the run: predictions are restored before decoding.
            is_main, cache = args.process_index == 0, sources[name]
            statistics = gathered(partial(cache.statistics, keys) if is_main else lambda: None)[0]
            source = partial(_standardized, source, statistics)
            if args.should_save:
                if is_motion:  # a difference has no mean
                    statistics = statistics._replace(mean=torch.zeros_like(statistics.mean))
                statistics.save(Path(args.output_dir) / "target_statistics" / f"{name}.safetensors")
        found[name] = Motion(source) if is_motion else source
    return found


class Once:
    """A source that several tasks ask for the same batch of images, one after the other: the targets are made once."""

    def __init__(self, source: TargetSource):
        self.source, self.images, self.targets = source, None, None

    def __call__(self, images: list) -> torch.Tensor:
        if images is not self.images:
            self.images, self.targets = images, self.source(images)
        return self.targets


def _standardized(source: TargetSource, statistics, images: list) -> torch.Tensor:
    return statistics.standardize(source(images))
