"""The targets of a run: from its teachers or from the target cache, which all its processes fill together."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from ..targets.cache import TargetCache, TargetStatistics
from ..targets.encoders import Motion
from ..targets.fill import Teacher, fill, known_keys, make_teachers, open_caches
from .arguments import OlaVlmArguments
from .data import TargetSource
from .rows import Rows, Sources, StreamRows

logger = logging.get_logger(__name__)


def filled_caches(
    args: OlaVlmArguments, teachers: dict[str, Teacher], images: Sources, compute: bool
) -> dict[str, TargetCache]:
    """The caches after each process has done its part of the images: looked at them and, if asked, computed targets.
    ValueError names the images that can't be used, or they are logged if bad rows are to be dropped."""
    with args.main_process_first(desc="target cache"):  # a teacher's fingerprint may have to be computed
        caches = open_caches(args.target_cache, teachers, args.target_storage)
    part, show = images[args.process_index :: args.world_size], args.should_log and not args.disable_tqdm
    workers = args.dataloader_num_workers
    if refused := fill(args.target_cache, teachers, caches if compute else {}, part, workers, show):
        named = "\n".join(f"{name}: {reason}" for name, reason in list(refused.items())[:20])
        if args.on_bad_rows == "stop":
            what = f"{len(refused)} images have no target; drop their rows, or set on_bad_rows=drop"
            raise ValueError(f"{what}. The first ones:\n{named}")
        logger.warning(f"{len(refused)} images have no target, their rows will be dropped. The first ones:\n{named}")
    args.distributed_state.wait_for_everyone()
    for cache in caches.values():
        cache.reload()
    return caches


def target_sources(args: OlaVlmArguments, tasks: Sequence[dict], rows: Rows | StreamRows) -> dict[str, TargetSource]:
    """Each task's function of images: its teacher or, with `target_cache`, what is stored of it; then no teacher is
    loaded. ValueError, with the command that helps, if targets are missing and `target_fill` is false."""
    teachers = make_teachers(tasks, args.teachers or {}, args.device)
    if args.target_cache:
        images = rows.sources()
        sources = filled_caches(args, teachers, images, args.target_fill)
        keys = [key for key in known_keys(args.target_cache, images) if key]
        lacking = {name: missing for name, cache in sources.items() if (missing := cache.missing(keys))}
        if lacking and not args.target_fill:
            counts = ", ".join(f"{len(missing)} of {name}" for name, missing in lacking.items())
            raise ValueError(
                f"the cache {args.target_cache} lacks targets of {len(set(keys))} images ({counts}): compute them by "
                "`ola-vlm targets` with this run's --recipe and fields, or as the run starts by --target_fill true"
            )
    else:
        sources = {name: teacher.encoder.encode for name, teacher in teachers.items()}
    standardized = {}
    for name, source in sources.items() if args.standardize_targets else ():
        # By the training images' statistics, which go with the run: predictions are restored before decoding.
        if args.target_cache:
            with args.main_process_first(desc=f"statistics of {name}"):
                statistics = source.statistics([key for key in keys if key not in lacking.get(name, ())])
        else:
            statistics = TargetStatistics.fit(source([image]) for image in rows.images())
        if args.should_save:
            statistics.save(Path(args.output_dir) / "target_statistics" / f"{name}.safetensors")
        standardized[name] = partial(_standardized, source, statistics)
    sources |= standardized
    return {name: Motion(source) if teachers[name].motion else source for name, source in sources.items()}


def _standardized(source: TargetSource, statistics: TargetStatistics, images: list) -> torch.Tensor:
    return statistics.standardize(source(images))
