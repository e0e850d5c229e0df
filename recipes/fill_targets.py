"""Compute the teachers' targets in advance: `ola-vlm targets --recipe NAME [--any_field value] [--shard i/n]`.

It computes what the recipe's target cache lacks, and goes on when it is called again. Several processes take a part
each: `torchrun --nproc_per_node 8 -m ola_vlm.cli targets --recipe NAME`; so do several machines, by --shard.
"""

import argparse
from collections.abc import Sequence

from ..configuration_ola_vlm import PAPER_TASKS, OlaVlmConfig
from ..targets.fill import make_teachers
from ..targets.loading import loading_from
from ..training.check import drop_bad_rows
from ..training.targets import fill_caches, find_images
from .command_line import check_data_is_made, parse_arguments


def shard(text: str) -> slice:
    """The second of eight parts, from "2/8"."""
    number, total = map(int, text.split("/"))
    if not 1 <= number <= total:
        raise ValueError(text)
    return slice(number - 1, None, total)


def main(argv: Sequence[str] | None = None) -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--shard", type=shard, default="1/1", metavar="i/n", help="the i-th of n parts of the images")
    args, options = parse_arguments(argv, "ola-vlm targets", own)
    if not (args.data and args.teachers and args.target_cache and (args.tasks or args.checkpoint)):
        raise SystemExit("nothing to fill: give data, target_cache, teachers, and tasks or a checkpoint that has some")
    check_data_is_made(args, options.recipe)
    tasks = args.tasks
    if not tasks:
        with loading_from(args.checkpoint, weights=False):
            tasks = OlaVlmConfig.from_pretrained(args.checkpoint).tasks
    teachers = make_teachers([PAPER_TASKS.get(task["name"], {}) | task for task in tasks], args.teachers, args.device)
    for teacher in teachers.values():
        teacher.check(args.target_cache)
    rows = args.load_rows()
    # A share to evaluate on is a part of the rows; other rows have other images.
    parts = [rows] if args.eval_share else [part for part in args.split_eval_rows(rows) if part is not None]
    for part in parts:
        drop_bad_rows(part, None, args.on_bad_rows, args.dataloader_num_workers)
        images = find_images(args, part)[options.shard]
        caches = fill_caches(args, teachers, images, compute=True).caches
    for name, cache in caches.items():
        size = sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
        if args.should_log and len(cache):
            print(f"{name}: {len(cache)} images, {size / len(cache):.0f} bytes each, in {cache.folder}")


if __name__ == "__main__":
    main()
