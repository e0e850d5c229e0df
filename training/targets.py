"""The targets of a run: from its teachers or from the target cache, which all its processes fill together."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from transformers.utils import logging

from ..targets.cache import OncePerBatch, TargetCache, TargetStatistics, own_statistics
from ..targets.encoders import Motion
from ..targets.files import inside, write_whole
from ..targets.fill import Teacher, fill, make_teachers, open_caches
from ..targets.place_code import append_place_code
from .arguments import OlaVlmArguments
from .collator import TargetSource
from .rows import Rows, Sources, StreamRows

logger = logging.get_logger(__name__)


def gathered(compute: Callable, *args) -> list:
    """What each process computes. The slowest one is waited for however long: the run's own group would time out."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [compute(*args)]
    group = distributed.new_group(timeout=timedelta(days=365), backend="gloo")
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, compute(*args), group=group)
    distributed.destroy_process_group(group)
    return found


def find_images(args: OlaVlmArguments, rows: Rows) -> Sources:
    """`rows.sources()`, for which one process reads the rows for all."""

    def places() -> np.ndarray | None:
        return rows.image_places() if args.process_index == 0 else None

    return Sources(rows, gathered(places)[0])


def filled_caches(
    args: OlaVlmArguments, teachers: dict[str, Teacher], images: Sources, compute: bool
) -> tuple[dict[str, TargetCache], list[str], dict[int, str]]:
    """The caches after each process has done its part of the images: looked at them and, if asked, computed targets;
    the keys of images that can be used; and why others can't, by their place. ValueError names those unless bad rows
    are to be dropped, and says what helps if targets are missing."""
    with args.main_process_first(desc="target cache"):  # a teacher's fingerprint may have to be computed
        caches = open_caches(args.target_cache, teachers, args.target_storage)
    show = args.should_log and not args.disable_tqdm
    to_fill = dict.fromkeys(caches.values()) if compute else {}  # tasks may share one
    for cache in to_fill:
        by_process = gathered(cache.check, args.process_index, args.world_size, show)
        cache.forget([key for damaged in by_process for key in damaged])
    # Shuffled: of what an interrupted fill or one with --shard left, each process has about the same to do.
    part = np.sort(np.random.default_rng(0).permutation(len(images))[args.process_index :: args.world_size])
    todo = args.target_cache, teachers if compute else {}, caches, images[part], args.dataloader_num_workers
    keys, refused = {}, {}
    for places, found, why in gathered(lambda: (part.tolist(), *fill(*todo, show))):
        keys |= zip(places, found, strict=True)
        refused |= {places[i]: reason for i, reason in why.items()}
    if refused:
        named, what = "\n".join(list(refused.values())[:20]), f"{len(refused)} images have no target"
        if args.on_bad_rows == "stop":
            raise ValueError(f"{what}; drop their rows, or set on_bad_rows=drop. The first ones:\n{named}")
        logger.warning(f"{what}, their rows are dropped. The first ones:\n{named}")
    usable = [keys[i] for i in range(len(images)) if i not in refused]
    for cache in caches.values() if compute else ():
        cache.reload()  # what the other processes stored
    if lacking := {name: missing for name, cache in caches.items() if (missing := cache.missing(usable))}:
        counts = ", ".join(f"{len(missing)} of {name}" for name, missing in lacking.items())
        counts = f"{len(set[str]().union(*lacking.values()))} of {len(set(usable))} images ({counts})"
        by_run = "computed just now. Is it one folder for all machines? If it is, start again"
        by_command = "compute them by `ola-vlm targets` with this run's --recipe and fields, or by --target_fill true"
        remedy = by_run if compute else by_command
        raise ValueError(f"the cache {args.target_cache} lacks targets of {counts}: {remedy}")
    return caches, usable, refused


def target_sources(
    args: OlaVlmArguments, tasks: Sequence[dict], rows: Rows | StreamRows, *others: Rows
) -> dict[str, TargetSource]:
    """Each task's function of images: its teacher or, with `target_cache`, what is stored of it; then no teacher is
    loaded, and rows with an image that can't be used are dropped. `others`: rows that aren't trained on.
    ValueError as of `filled_caches`."""
    teachers = make_teachers(tasks, args.teachers or {}, args.device)
    if not args.target_cache:
        caches, keys = {}, []
        sources = {name: teacher.encoder.encode for name, teacher in teachers.items()}
    else:
        # The training images last: their keys are those of the statistics, and their caches know all that is stored.
        for part in (*others, rows):
            images = find_images(args, part)
            caches, keys, refused = filled_caches(args, teachers, images, args.target_fill)
            if refused:
                logger.warning(f"dropped {part.drop_images(images, refused)} rows whose images have no target")
        sources = {name: cache.as_stored for name, cache in caches.items()}
    once = {teacher: OncePerBatch(sources[name]) for name, teacher in teachers.items()}
    for name, teacher in teachers.items():
        is_motion = args.teachers[name].get("motion", False)
        if list(teachers.values()).count(teacher) > 1:
            sources[name] = partial(once[teacher], name)
        if args.standardize_targets and keys:
            # By the training images' statistics, which go with the run: predictions are restored before decoding.
            statistics = gathered(caches[name].statistics if args.process_index == 0 else len, keys)[0]
            sources[name] = partial(_standardized, sources[name], statistics)
            if args.should_save:
                zero = {"mean": torch.zeros_like(statistics.mean)} if is_motion else {}  # of differences
                folder = Path(args.output_dir) / "target_statistics"
                statistics._replace(**zero).save(inside(folder, f"{name}.safetensors"))
        if is_motion:
            sources[name] = Motion(sources[name])
    for task in tasks:
        if task["place_code"] > 0:
            sources[task["name"]] = partial(_with_place_code, sources[task["name"]], task["place_code"])
    return sources


def no_targets(args: OlaVlmArguments) -> dict[str, TargetSource]:
    """Of a run without embedding losses. Its predictors are those of the checkpoint that it begins with, and so are
    the statistics that decode what they predict: they go along, into the run's folder."""
    if args.should_save and args.checkpoint and not args.lora_rank:
        for file in own_statistics(args.checkpoint):
            write_whole(Path(args.output_dir) / "target_statistics" / file.name, file.read_bytes())
    return {}


def _with_place_code(source: TargetSource, width: int, images: list) -> torch.Tensor:
    return append_place_code(source(images), width)


def _standardized(source: TargetSource, statistics: TargetStatistics, images: list) -> torch.Tensor:
    return statistics.standardize(source(images))
