"""Train one stage: `python train.py --recipe NAME [--any_field value]` (= `ola-vlm train ...`).

A recipe is a dict of fields of `OlaVlmArguments` (recipes/); any field can be overridden on the command line. The
effective configuration goes to `output_dir/run.json`, model and processor to `output_dir`.
"""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainerCallback, set_seed

from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.recipes import RECIPES
from ola_vlm.targets.cache import TargetCache, TargetStatistics, image_key
from ola_vlm.targets.encoders import ENCODERS
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.check import drop_bad_rows
from ola_vlm.training.data import OlaVlmCollator, TargetSource
from ola_vlm.training.rows import Rows, StreamRows, load_rows
from ola_vlm.training.stages import apply_stage
from ola_vlm.training.trainer import OlaVlmTrainer

logger = logging.getLogger("ola_vlm.train")  # as a script the module is "__main__"


def load_model(args: OlaVlmArguments) -> tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]:
    """From `checkpoint`, or built from parts."""
    parts = [args.vision_tower, args.language_model]
    if args.checkpoint and any([*parts, args.tokenizer, args.tasks, args.model_overrides]):
        raise ValueError("a checkpoint has its own parts and tasks: give either checkpoint or vision_tower etc.")
    if args.checkpoint:
        model = OlaVlmForConditionalGeneration.from_pretrained(args.checkpoint, dtype=args.torch_dtype)
        return model, OlaVlmProcessor.from_pretrained(args.checkpoint)
    if not all(parts):
        raise ValueError("nothing to train: give checkpoint, or vision_tower and language_model")
    overrides = {"dtype": args.torch_dtype, **(args.model_overrides or {})}
    model, processor = build_ola_vlm(*parts, args.tokenizer, args.tasks or [], **overrides)
    set_seed(args.seed)  # other tasks draw other numbers before: this way methods start from the same projector
    model.model.multi_modal_projector.apply(model._init_weights)
    return model, processor


def target_sources(args: OlaVlmArguments, tasks: Sequence[dict], rows: Rows) -> dict[str, TargetSource]:
    """Each task's teacher; with `target_cache`, read from there after filling it with what it lacks."""
    teachers, names = args.teachers or {}, [task["name"] for task in tasks]
    if set(names) != set(teachers):
        raise ValueError(f"the tasks {names} need one teacher each, `teachers` has {list(teachers)}")
    for name, teacher in teachers.items():
        if teacher.get("encoder") not in ENCODERS or "path" not in teacher:
            raise ValueError(f"teachers[{name!r}] is {teacher}: give its path, and as encoder one of {list(ENCODERS)}")
    keys = [image_key(image) for image in rows.images()] if args.target_cache else []
    sources = {}
    for task in tasks:
        name, teacher = task["name"], dict(teachers[task["name"]])
        load = ENCODERS[teacher.pop("encoder")].from_pretrained
        encoder = load(teacher.pop("path"), grid=math.isqrt(task["target_length"]), device=args.device, **teacher)
        source = encoder.encode
        if args.target_cache:
            with args.main_process_first(desc=f"targets of {name}"):
                source = TargetCache(args.target_cache, encoder.fingerprint)
                if any(key not in source.rows for key in keys):
                    source.fill(encoder, rows.images())
        if args.standardize_targets:
            # By the training images' statistics, which go with the run: predictions are restored before decoding.
            statistics = TargetStatistics.fit(source([image]) for image in rows.images())
            if args.should_save:
                statistics.save(Path(args.output_dir) / "target_statistics" / f"{name}.safetensors")
            source = partial(_standardized, source, statistics)
        sources[name] = source
    return sources


def _standardized(source: TargetSource, statistics: TargetStatistics, images: list) -> torch.Tensor:
    return statistics.standardize(source(images))


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint: the trainer's state is what is written last."""
    folders = [str(state.parent) for state in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return max(folders, key=lambda folder: int(folder.rpartition("-")[2]), default=None)


def train(args: OlaVlmArguments, callbacks: Sequence[TrainerCallback] = (), recipe: str | None = None):
    """Runs one stage to its end and returns the `OlaVlmTrainer` (`.model`, `.state.log_history`)."""
    if args.data is None:
        raise ValueError("nothing to train on: give data, a LLaVA-format JSON file or a Hugging Face data set")
    set_seed(args.seed)
    model, processor = load_model(args)
    stage = apply_stage(model, args.stage)
    tasks = model.config.tasks if stage.embedding_losses else []

    shuffle_seed = None if args.train_sampling_strategy == "sequential" else args.seed
    place = args.image_folder, args.data_config, args.data_split, args.streaming
    rows = load_rows(args.data, *place, shuffle_seed=shuffle_seed)
    lengths = {"max_length": args.max_length, "truncate": args.on_long_rows == "truncate"}
    if not isinstance(rows, StreamRows):  # whose rows are checked as they come
        drop_bad_rows(rows, OlaVlmCollator(processor, **lengths), args.on_bad_rows, args.dataloader_num_workers)
    sources = target_sources(args, tasks, rows) if tasks else {}
    if tasks and args.shuffle_targets:
        rows.shuffle_targets(args.seed)

    options = {"processing_class": processor, "callbacks": list(callbacks)}
    collator = OlaVlmCollator(processor, sources, tasks, **lengths, drop_bad_rows=True)
    trainer = OlaVlmTrainer(model, args, data_collator=collator, train_dataset=rows, **options)
    if args.should_save:
        run = json.dumps({"recipe": recipe, **args.to_dict()}, indent=2)
        (Path(args.output_dir) / "run.json").write_text(run + "\n", encoding="utf-8")
    resume = args.resume_from_checkpoint
    if str(resume).lower() == "true":
        resume = last_checkpoint(args.output_dir)
        logger.info(f"resuming from {resume or 'the beginning: there is no checkpoint yet'}")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    if trainer.bad_rows:
        logger.warning(f"{trainer.bad_rows} bad rows were dropped in training; they are named above")
    model.task_tokens_from_queries = False  # save_model has just written them into the vocabulary
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--recipe", choices=list(RECIPES), help="where the fields' values come from")
    recipe = chooser.parse_known_args(argv)[0].recipe
    parser = HfArgumentParser(OlaVlmArguments, prog="ola-vlm train", allow_abbrev=False, parents=[chooser])
    parser.set_defaults(**(RECIPES[recipe]() if recipe else {}))
    options = {"return_remaining_strings": True, "look_for_args_file": False}
    args, rest, unknown = parser.parse_args_into_dataclasses(argv, **options)
    if unknown := [*unknown, *(f"{recipe}.{name}" for name in vars(rest) if name != "recipe")]:
        raise SystemExit(f"unknown field {', '.join(unknown)}: `ola-vlm train --help` lists all")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ola_vlm").setLevel("INFO" if args.should_log else "WARNING")
    train(args, recipe=recipe)


if __name__ == "__main__":
    main()
