"""Train one stage: `python train.py --recipe NAME [--any_field value]` (= `ola-vlm train ...`).

A recipe is a dict of fields of `OlaVlmArguments` (recipes/); any field can be overridden on the command line. The
effective configuration goes to `output_dir/run.json`, model and processor to `output_dir`.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import HfArgumentParser, PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed

from ola_vlm.baselines.build import build_multi_encoder, load_encoders
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.inference.checkpoints import adapter_base, read_checkpoint
from ola_vlm.recipes import RECIPES
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.check import drop_bad_rows
from ola_vlm.training.data import OlaVlmCollator
from ola_vlm.training.lora import add_adapters, four_bits
from ola_vlm.training.rows import StreamRows
from ola_vlm.training.stages import apply_stage
from ola_vlm.training.targets import target_sources
from ola_vlm.training.trainer import OlaVlmTrainer

logger = logging.getLogger("ola_vlm.train")  # as a script the module is "__main__"


def load_model(args: OlaVlmArguments) -> tuple[PreTrainedModel, ProcessorMixin]:
    """From `checkpoint`, or built from parts."""
    parts = [args.vision_tower, args.language_model]
    if args.checkpoint and any([*parts, args.tokenizer, args.tasks, args.model_overrides, args.fusion]):
        raise ValueError("a checkpoint has its own parts and tasks: give either checkpoint or vision_tower etc.")
    if args.checkpoint:
        if adapter_base(args.checkpoint) is not None:
            raise ValueError(f"{args.checkpoint} holds adapters, not a model: merge them first (`ola-vlm merge`)")
        quantized = {"quantization_config": four_bits()} if args.load_in_4bit else {}
        options = {"llava_as_ours": True, "needs_processor": True, "dtype": args.torch_dtype}
        return read_checkpoint(args.checkpoint, **options, **quantized)
    if not all(parts):
        raise ValueError("nothing to train: give checkpoint, or vision_tower and language_model")
    overrides = {"dtype": args.torch_dtype, **(args.model_overrides or {})}
    model, processor = build_ola_vlm(*parts, args.tokenizer, args.tasks or [], **overrides)
    set_seed(args.seed)  # other tasks draw other numbers before: this way methods start from the same projector
    model.model.multi_modal_projector.apply(model._init_weights)
    if args.fusion:
        encoders = load_encoders(args.teachers or {}, model.config.image_seq_length)
        return build_multi_encoder(model, processor, encoders, args.fusion, args.num_encoder_tokens)
    return model, processor


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint: the trainer's state is what is written last."""
    folders = [str(state.parent) for state in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return max(folders, key=lambda folder: int(folder.rpartition("-")[2]), default=None)


def train(args: OlaVlmArguments, callbacks: Sequence[TrainerCallback] = (), recipe: str | None = None):
    """Runs one stage to its end and returns the `OlaVlmTrainer` (`.model`, `.state.log_history`)."""
    rows = args.load_rows()  # before a model is loaded: paths may be wrong
    set_seed(args.seed)
    model, processor = load_model(args)
    stage = apply_stage(model, args.stage, args.embedding_losses, args.task_tokens)
    tasks = model.config.tasks if stage.embedding_losses else []
    if args.lora_rank:
        model = add_adapters(model, args)

    lengths = {"max_length": args.max_length, "truncate": args.on_long_rows == "truncate"}
    if not isinstance(rows, StreamRows):  # whose rows are checked as they come
        decode = args.check_images and not (tasks and args.target_cache)  # filling the cache opens them all
        workers = args.dataloader_num_workers
        drop_bad_rows(rows, OlaVlmCollator(processor, **lengths), args.on_bad_rows, workers, decode)
    sources = target_sources(args, tasks, rows) if tasks else {}
    if tasks and args.shuffle_targets:
        rows.shuffle_targets(args.seed)

    options = {"processing_class": processor, "callbacks": list(callbacks)}
    lengths |= {"drop_bad_rows": True, "targets_later": not args.target_cache}
    collator = OlaVlmCollator(processor, sources, tasks, **lengths)
    trainer = OlaVlmTrainer(model, args, data_collator=collator, train_dataset=rows, **options)
    if args.should_save:
        before = Path(args.checkpoint or "") / "run.json"  # model cards tell the whole history
        started_from = json.loads(before.read_text(encoding="utf-8")) if args.checkpoint and before.exists() else None
        run = {"recipe": recipe, "processes": args.world_size, **args.to_dict(), "started_from": started_from}
        (Path(args.output_dir) / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
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


def parse_arguments(argv: Sequence[str] | None, prog: str, *parents: argparse.ArgumentParser, **fields):
    """A recipe's fields with the command line's changes: (OlaVlmArguments, a namespace of `recipe` and what `parents`
    add). `fields` go before the recipe's. SystemExit for an unknown field."""
    chooser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False, parents=parents)
    chooser.add_argument("--recipe", choices=list(RECIPES), metavar="NAME", help="one of `ola-vlm recipes`")
    own = chooser.parse_known_args(argv)[0]
    parser = HfArgumentParser(OlaVlmArguments, prog=prog, allow_abbrev=False, parents=[chooser])
    parser.set_defaults(**((RECIPES[own.recipe]() if own.recipe else {}) | fields))
    options = {"return_remaining_strings": True, "look_for_args_file": False}
    args, rest, unknown = parser.parse_args_into_dataclasses(argv, **options)
    if unknown := [*unknown, *(f"{own.recipe}.{name}" for name in vars(rest) if name not in vars(own))]:
        raise SystemExit(f"unknown field {', '.join(unknown)}: `{prog} --help` lists all")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ola_vlm").setLevel("INFO" if args.should_log else "WARNING")
    return args, own


def main(argv: Sequence[str] | None = None) -> None:
    args, own = parse_arguments(argv, "ola-vlm train")
    train(args, recipe=own.recipe)


if __name__ == "__main__":
    main()
