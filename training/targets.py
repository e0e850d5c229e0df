"""The targets of a run: from its teachers or from the target cache, which all its processes fill together."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..targets.cache import TargetCache, TargetStatistics
from ..targets.fill import Teacher, fill, known_keys, make_teachers, open_caches
from .arguments import OlaVlmArguments
from .data import LlavaRows, TargetSource


def filled_caches(
    args: OlaVlmArguments, teachers: dict[str, Teacher], paths: list[str], compute: bool
) -> dict[str, TargetCache]:
    """The caches after each process has done its part of the images: looked at them and, if asked, computed targets.
    ValueError names the images that can't be used."""
    with args.main_process_first(desc="target cache"):  # a teacher's fingerprint may have to be computed
        caches = open_caches(args.target_cache, teachers, args.target_storage)
    part, show = paths[args.process_index :: args.world_size], args.should_log and not args.disable_tqdm
    workers = args.dataloader_num_workers
    if refused := fill(args.target_cache, teachers, caches if compute else {}, part, workers, show):
        named = "\n".join(f"{path}: {reason}" for path, reason in list(refused.items())[:20])
        raise ValueError(f"{len(refused)} images have no target; drop their rows. The first ones:\n{named}")
    args.distributed_state.wait_for_everyone()
    for cache in caches.values():
        cache.reload()
    return caches


def target_sources(args: OlaVlmArguments, tasks: Sequence[dict], rows: LlavaRows) -> dict[str, TargetSource]:
    """Each task's function of images: its teacher or, with `target_cache`, what is stored of it; then no teacher is
    loaded. ValueError, with the command that helps, if targets are missing and `target_fill` is false."""
    teachers = make_teachers(tasks, args.teachers or {}, args.device)
    if args.target_cache:
        paths = rows.image_paths()
        sources = filled_caches(args, teachers, paths, args.target_fill)
        keys = list(known_keys(args.target_cache, paths).values())
        lacking = {name: len(missing) for name, cache in sources.items() if (missing := cache.missing(keys))}
        if lacking:
            counts = ", ".join(f"{count} of {name}" for name, count in lacking.items())
            raise ValueError(
                f"the cache {args.target_cache} lacks targets of {len(set(keys))} images ({counts}): compute them by "
                "`ola-vlm targets` with this run's --recipe and fields, or as the run starts by --target_fill true"
            )
    else:
        sources = {name: teacher.encoder.encode for name, teacher in teachers.items()}
    if not args.standardize_targets:
        return sources
    standardized = {}
    for name, source in sources.items():
        # By the training images' statistics, which go with the run: predictions are restored before decoding.
        if args.target_cache:
            with args.main_process_first(desc=f"statistics of {name}"):
                statistics = source.statistics(keys)
        else:
            statistics = TargetStatistics.fit(source([image]) for image in rows.images())
        if args.should_save:
            statistics.save(Path(args.output_dir) / "target_statistics" / f"{name}.safetensors")
        standardized[name] = partial(_standardized, source, statistics)
    return standardized


def _standardized(source: TargetSource, statistics: TargetStatistics, images: list) -> torch.Tensor:
    return statistics.standardize(source(images))
