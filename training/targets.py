"""The targets of a run: from its teachers or from the target cache, which all its processes fill together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import distributed
from transformers.utils import logging

from ..files.strangers import inside
from ..files.writing import write_whole
from ..targets.cache import OncePerBatch, TargetCache
from ..targets.encoders import Motion
from ..targets.fill import Teacher, fill, make_teachers, open_caches
from ..targets.place_code import append_place_code
from ..targets.statistics import FOLDER, TargetStatistics, own_statistics
from .arguments import OlaVlmArguments
from .collator import TargetSource
from .rows import Rows, Sources, StreamRows
from .words import WordSource

logger = logging.get_logger(__name__)

T = TypeVar("T")


def all_gather_object(compute: Callable[[], T]) -> list[T]:
    """What each process computes. The slowest one is waited for however long: the run's own group would time out."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [compute()]
    # gloo takes objects from CPUs: nothing has to fit into a GPU's memory.
    group = distributed.new_group(timeout=timedelta(days=365), backend="gloo")
    results: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(results, compute(), group=group)  # pyright: ignore[reportArgumentType] (its stub takes no new_group's result)
    # The group was for this one exchange.
    distributed.destroy_process_group(group)
    return results


def from_first_process(args: OlaVlmArguments, compute: Callable[[], T]) -> T:
    """What the first process computes, for all."""

    def compute_there() -> T | None:
        if args.process_index == 0:
            return compute()
        return None

    return cast(T, all_gather_object(compute_there)[0])


def find_images(args: OlaVlmArguments, rows: Rows) -> Sources:
    """`rows.sources()`, for which one process reads the rows for all."""
    return Sources(rows, from_first_process(args, rows.image_indices))


@dataclass
class FilledCaches:
    """The caches after each process has done its part of the images.

    caches: by task.
    keys: of the images that have targets, in order.
    failed: index of an image that has none -> its name and why.
    """

    caches: dict[str, TargetCache]
    keys: list[str]
    failed: dict[int, str]


def fill_caches(args: OlaVlmArguments, teachers: dict[str, Teacher], images: Sources, compute: bool) -> FilledCaches:
    """All images are looked at and, if asked, their targets computed, by each process a part. ValueError names images
    without a target unless bad rows are to be dropped, and says what helps if the caches lack some."""
    assert args.target_cache is not None
    # One process first: a teacher's fingerprint may have to be computed, a hash of gigabytes.
    with args.main_process_first(desc="target cache"):
        caches = open_caches(args.target_cache, teachers, args.target_storage)
    # Tasks may share one.
    distinct = list(dict.fromkeys(caches.values()))
    progress = args.should_log and not args.disable_tqdm
    # What is damaged is known to all processes before anybody computes, or it would be computed by none.
    if compute:
        for cache in distinct:
            check = partial(cache.check, args.process_index, args.world_size, progress)
            for damaged in all_gather_object(check):
                cache.forget(damaged)

    # Without teachers, images are only looked at.
    asked = {}
    if compute:
        asked = teachers
    keys, failed = _fill_together(args, asked, caches, images, progress)
    _report_failed(args, failed)
    usable = [cast(str, key) for i, key in enumerate(keys) if i not in failed]
    # Each process sees what the others stored, too.
    if compute:
        for cache in distinct:
            cache.reload()
    _check_complete(args, caches, usable, compute)
    return FilledCaches(caches=caches, keys=usable, failed=failed)


def _fill_together(
    args: OlaVlmArguments,
    teachers: dict[str, Teacher],
    caches: dict[str, TargetCache],
    images: Sources,
    progress: bool,
) -> tuple[list[str | None], dict[int, str]]:
    """Each image's key, and which failed and why, by their indices."""
    # Shuffled: of what an interrupted fill or one with --shard left, each process has about the same to do.
    shuffled = np.random.default_rng(0).permutation(len(images))
    part = np.sort(shuffled[args.process_index :: args.world_size])

    def fill_part():
        report = fill(
            str(args.target_cache),
            teachers,
            caches,
            images[part],
            args.dataloader_num_workers,
            progress,
        )
        return part.tolist(), report

    # Each process's results back at the places of its images.
    keys: list[str | None] = [None] * len(images)
    failed = {}
    for indices, report in all_gather_object(fill_part):
        for index, key in zip(indices, report.keys, strict=True):
            keys[index] = key
        for i, reason in report.failed.items():
            failed[indices[i]] = reason
    return keys, failed


def _report_failed(args: OlaVlmArguments, failed: dict[int, str]) -> None:
    if not failed:
        return
    # The first 20 show what kind of fault it is.
    first_ones = "\n".join(list(failed.values())[:20])
    count = f"{len(failed)} images have no target"
    if args.on_bad_rows == "stop":
        raise ValueError(f"{count}; drop their rows, or set on_bad_rows=drop. The first ones:\n{first_ones}")
    logger.warning(f"{count}, their rows are dropped. The first ones:\n{first_ones}")


def _check_complete(args: OlaVlmArguments, caches: dict[str, TargetCache], keys: list[str], computed: bool) -> None:
    missing = {name: cache.missing(keys) for name, cache in caches.items()}
    missing = {name: missing_keys for name, missing_keys in missing.items() if missing_keys}
    if not missing:
        return
    by_task = ", ".join(f"{len(missing_keys)} of {name}" for name, missing_keys in missing.items())
    # An image may lack targets of several tasks: it counts once.
    count = len(set[str]().union(*missing.values()))
    images = f"{count} of {len(set(keys))} images ({by_task})"
    remedy = "compute them by `ola-vlm targets` with this run's --recipe and fields, or by --target_fill true"
    if computed:
        remedy = "computed just now. Is it one folder for all machines? If it is, start again"
    raise ValueError(f"the cache {args.target_cache} lacks targets of {images}: {remedy}")


def target_sources(
    args: OlaVlmArguments, tasks: Sequence[dict], rows: Rows | StreamRows, *others: Rows | StreamRows
) -> dict[str, TargetSource]:
    """Each task's function of images: its teacher or, with `target_cache`, what is stored of it; then no teacher is
    loaded, and rows with an image that can't be used are dropped. `others`: rows that aren't trained on.
    ValueError as of `fill_caches`."""
    # From the cache, or from the teachers themselves.
    teachers = make_teachers(tasks, args.teachers or {}, args.device)
    if args.target_cache:
        filled = _fill_for_rows(args, teachers, [*others, rows])
        given: dict[str, TargetSource] = {name: cache.as_stored for name, cache in filled.caches.items()}
    else:
        filled = None
        given = {name: teacher.encoder.encode for name, teacher in teachers.items()}
    sources = _shared(given, teachers)
    for name, teacher in teachers.items():
        # Numbers of words can't be scaled, nor subtracted.
        if teacher.gives_words:
            continue
        is_motion = (args.teachers or {})[name].get("motion", False)
        if args.standardize_targets and filled is not None and filled.keys:
            # The training images' statistics, which go with the run: predictions are restored before decoding.
            compute = partial(filled.caches[name].statistics, filled.keys)
            statistics = from_first_process(args, compute)
            sources[name] = partial(_standardized, sources[name], statistics)
            _save_statistics(args, name, statistics, is_motion)
        if is_motion:
            sources[name] = Motion(sources[name])
    return {task["name"]: _source_of_task(task, sources, teachers, args.target_cache) for task in tasks}


def _source_of_task(
    task: dict, sources: dict[str, TargetSource], teachers: dict[str, Teacher], folder: str | None
) -> TargetSource:
    """From its teachers' sources: features and their place code, or words of several kinds."""
    name = task["name"]
    if task["target"] == "words":
        by_kind = {kind: f"{name}.{kind}" for kind in task["words"]}
        words = {kind: teachers[part].words(folder) for kind, part in by_kind.items()}
        of_kinds = {kind: sources[part] for kind, part in by_kind.items()}
        return WordSource(words, of_kinds, task["alone"])
    if task["place_code"] > 0:
        return partial(_with_place_code, sources[name], task["place_code"])
    return sources[name]


def _fill_for_rows(
    args: OlaVlmArguments, teachers: dict[str, Teacher], parts: Sequence[Rows | StreamRows]
) -> FilledCaches:
    """The caches filled for each of the parts, one after the other, whose rows without targets are dropped."""
    # The training images come last: their keys are those of the statistics, and their caches know all that is stored.
    for rows in parts:
        # A stream has no target cache.
        assert isinstance(rows, Rows)
        images = find_images(args, rows)
        filled = fill_caches(args, teachers, images, args.target_fill)
        if filled.failed:
            dropped = rows.drop_images(images, filled.failed)
            logger.warning(f"dropped {dropped} rows whose images have no target")
    return filled


def _shared(sources: dict[str, TargetSource], teachers: dict[str, Teacher]) -> dict[str, TargetSource]:
    """The same sources; tasks of one teacher ask it once a batch."""
    once = {teacher: OncePerBatch(sources[name]) for name, teacher in teachers.items()}
    shared = dict(sources)
    for name, teacher in teachers.items():
        # Such as a teacher's features and their motion.
        if list(teachers.values()).count(teacher) > 1:
            shared[name] = partial(once[teacher], name)
    return shared


def _save_statistics(args: OlaVlmArguments, task: str, statistics: TargetStatistics, is_motion: bool) -> None:
    if not args.should_save:
        return
    # Motion is differences of features, whose mean is 0.
    if is_motion:
        statistics = statistics._replace(mean=torch.zeros_like(statistics.mean))
    statistics.save(inside(Path(args.output_dir) / FOLDER, f"{task}.safetensors"))


def no_targets(args: OlaVlmArguments) -> dict[str, TargetSource]:
    """Of a run without embedding losses. Its predictors are those of the checkpoint that it begins with, and so are
    the statistics that decode what they predict: they go along, into the run's folder."""
    if args.should_save and args.checkpoint and not args.lora_rank:
        for file in own_statistics(args.checkpoint):
            write_whole(Path(args.output_dir) / FOLDER / file.name, file.read_bytes())
    return {}


def _with_place_code(source: TargetSource, width: int, images: list) -> torch.Tensor:
    return append_place_code(source(images), width)


def _standardized(source: TargetSource, statistics: TargetStatistics, images: list) -> torch.Tensor:
    return statistics.standardize(source(images))
