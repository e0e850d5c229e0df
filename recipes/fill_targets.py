"""`ola-vlm targets`: the teachers' targets of a recipe, computed in advance (commands/targets.py)."""

from argparse import Namespace

from ..commands.running import command, tell
from ..targets.fill import make_teachers
from ..training.check import drop_bad_rows
from ..training.preflight import tasks_of_checkpoint, tasks_of_teachers
from ..training.rows import Rows
from ..training.targets import fill_caches, find_images
from .arguments import check_data_is_made, make_arguments


@command("targets")
def main(options: Namespace) -> None:
    args = make_arguments(options, "ola-vlm targets")
    if not (args.data and args.teachers and args.target_cache and (args.tasks or args.checkpoint)):
        raise ValueError("nothing to fill: give data, target_cache, teachers, and tasks or a checkpoint that has some")
    check_data_is_made(args)
    # With a checkpoint its own, or those that are to be attached to it.
    tasks = tasks_of_checkpoint(args) if args.checkpoint else tasks_of_teachers(args.tasks or [])
    teachers = make_teachers(tasks, args.teachers, args.device)
    # What is missing, such as a folder of weights, is said before rows are read.
    for teacher in teachers.values():
        teacher.check(args.target_cache)
    rows = args.load_rows()
    # A share to evaluate on is a part of the rows; other rows have other images.
    if args.eval_share:
        parts = [rows]
    else:
        parts = [part for part in args.split_eval_rows(rows) if part is not None]
    for part in parts:
        # A stream has no target cache.
        assert isinstance(part, Rows)
        drop_bad_rows(part, None, args.on_bad_rows, args.dataloader_num_workers)
        images = find_images(args, part)[options.shard]
        caches = fill_caches(args, teachers, images, compute=True).caches
    # What the storage of these targets takes, for who plans a larger data set.
    for name, cache in caches.items():
        size = sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
        if args.should_log and len(cache):
            print(f"{name}: {len(cache)} images, {size / len(cache):.0f} bytes each, in {cache.folder}")
    if args.should_log:
        tell(
            f"Results: {args.target_cache}",
            f"Next: train with this cache, --target_cache {args.target_cache} (a recipe's own is known to it)",
        )
