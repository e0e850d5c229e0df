"""Train one stage: `python train.py --recipe NAME [--any_field value]` (= `ola-vlm train ...`).

A recipe is a dict of fields of `OlaVlmArguments` (recipes/); any field can be overridden on the command line. The
effective configuration goes to `output_dir/run.json`, model and processor to `output_dir`.
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed

from ola_vlm.baselines.build import build_multi_encoder, load_encoders
from ola_vlm.commands.running import as_command, command, tell
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.convert.push import write_adapter_card
from ola_vlm.eval.during_training import answering_callbacks
from ola_vlm.inference.checkpoints import adapter_base, read_checkpoint
from ola_vlm.recipes.arguments import check_data_is_made, make_arguments
from ola_vlm.training import run_record
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.check import drop_bad_rows
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.lora import add_adapters, four_bits
from ola_vlm.training.plan import Plan
from ola_vlm.training.preflight import check_run
from ola_vlm.training.rows import Rows, StreamRows
from ola_vlm.training.run_record import last_checkpoint
from ola_vlm.training.stages import apply_stage, upcast_trained
from ola_vlm.training.targets import no_targets, target_sources
from ola_vlm.training.trainer import OlaVlmTrainer

logger = logging.getLogger("ola_vlm.train")  # as a script the module is "__main__"


def load_model(args: OlaVlmArguments) -> tuple[PreTrainedModel, ProcessorMixin]:
    """From `checkpoint`, or built from parts."""
    if args.checkpoint:
        if adapter_base(args.checkpoint) is not None:
            raise ValueError(f"{args.checkpoint} holds adapters, not a model: merge them first (`ola-vlm merge`)")
        options: dict = {"llava_as_ours": True, "needs_processor": True, "dtype": args.torch_dtype}
        if args.load_in_4bit:
            options["quantization_config"] = four_bits(args.torch_dtype)
        model, processor = read_checkpoint(args.checkpoint, **options)
        assert processor is not None  # it is needed
        return model, processor
    assert args.vision_tower is not None and args.language_model is not None  # `check_run` has looked
    overrides: dict = {"dtype": args.torch_dtype, **(args.model_overrides or {})}
    model, processor = build_ola_vlm(
        args.vision_tower, args.language_model, args.tokenizer, args.tasks or [], **overrides
    )
    set_seed(args.seed)  # other tasks draw other numbers before: this way methods start from the same projector
    model.model.multi_modal_projector.apply(model._init_weights)
    if args.fusion:
        encoders = load_encoders(args.teachers or {}, model.config.image_seq_length)
        return build_multi_encoder(model, processor, encoders, args.fusion, args.num_encoder_tokens)
    return model, processor


def train(
    args: OlaVlmArguments,
    callbacks: Sequence[TrainerCallback] = (),
    recipe: str | None = None,
    make_collator: Callable[..., OlaVlmCollator] = OlaVlmCollator,
) -> OlaVlmTrainer | None:
    """Runs one stage to its end and returns the `OlaVlmTrainer` (`.model`, `.state.log_history`); None if the run that
    is to be resumed has finished already. `make_collator` takes the arguments of `OlaVlmCollator`."""
    check_run(args)
    callbacks = [*callbacks, *answering_callbacks(args)]
    with run_record.run_lock(args.output_dir) if args.process_index == 0 else nullcontext():
        rows = args.load_rows()
        identity = run_record.run_identity(args, rows)
        if args.resume_from_checkpoint and run_record.is_finished(args.output_dir, identity):
            logger.warning(f"{args.output_dir}: this run has finished, nothing is left to do")
            return None
        checkpoint = args.resume_from_checkpoint
        if checkpoint == "true":
            checkpoint = last_checkpoint(args.output_dir)
        run_record.check_start(args, checkpoint, identity)
        rows, eval_rows = args.split_eval_rows(rows)
        Plan.make(args, rows)  # before the model is loaded: rows may be too few
        record = run_record.describe_run(args, identity, recipe)
        callbacks = [*callbacks, run_record.RunIdentity(identity)]
        return run_stage(args, rows, eval_rows, checkpoint, record, callbacks, make_collator)


def run_stage(
    args: OlaVlmArguments,
    rows: Rows | StreamRows,
    eval_rows: Rows | StreamRows | None,
    checkpoint: str | None,
    record: dict,
    callbacks: Sequence[TrainerCallback],
    make_collator: Callable[..., OlaVlmCollator] = OlaVlmCollator,
) -> OlaVlmTrainer:
    """From the rows to the saved model; from `checkpoint` on if there is one. `record`: run.json's."""
    set_seed(args.seed)
    model, processor = load_model(args)
    stage = apply_stage(model, args.stage, args.embedding_losses, args.task_tokens)
    tasks = model.config.tasks if stage.embedding_losses else []
    if args.lora_rank:
        model = add_adapters(model, args)
    if (args.bf16 or args.fp16) and not args.deepspeed:
        upcast_trained(model)  # the trainer would do it, too late for the plan
    lengths = {"max_length": args.max_length, "truncate": args.on_long_rows == "truncate"}
    decode = args.check_images and not (tasks and args.target_cache)  # filling the cache opens them all
    parts = [part for part in (rows, eval_rows) if part is not None]
    for part in parts:
        if isinstance(part, Rows):  # a stream's are checked as they come
            collator = make_collator(processor, **lengths)
            drop_bad_rows(part, collator, args.on_bad_rows, args.dataloader_num_workers, decode)
    sources = target_sources(args, tasks, *parts) if tasks else no_targets(args)
    if tasks and args.shuffle_targets:
        assert isinstance(rows, Rows)  # no stream
        rows.shuffle_targets(args.seed)
    plan = Plan.make(args, rows)
    if args.max_steps <= 0:
        args.num_train_epochs = plan.epochs
    if args.should_log:
        print(plan.text(args, model), flush=True)
        plan.warn_if_short(args)

    options = {**lengths, "drop_bad_rows": True, "targets_later": not args.target_cache}
    trainer = OlaVlmTrainer(
        model,
        args,
        data_collator=make_collator(processor, sources, tasks, **options),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        callbacks=list(callbacks),
    )
    if args.should_save:
        run_record.write_run(args.output_dir, record)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if args.should_save:
        run_record.write_run(args.output_dir, {**record, "finished_steps": trainer.state.global_step})
        if args.lora_rank:
            write_adapter_card(args.output_dir)
    if trainer.bad_rows:
        logger.warning(f"{trainer.bad_rows} bad rows were dropped in training; they are named above")
    if not trainer.is_sharded:
        model.task_tokens_from_queries = False  # save_model has just written them into the vocabulary  # pyright: ignore[reportArgumentType]
    return trainer


@command("train")
def main(options: Namespace) -> None:
    args = make_arguments(options, "ola-vlm train")
    check_data_is_made(args)
    train(args, recipe=options.recipe)
    tell(
        f"Results: {args.output_dir} (model, processor, run.json)",
        f"Next: ola-vlm chat {args.output_dir} IMAGE, ola-vlm eval {args.output_dir} --benchmark NAME --out DIR, or "
        f"the next stage: ola-vlm train --recipe NAME --checkpoint {args.output_dir}",
    )


if __name__ == "__main__":
    as_command("train", main, start="python train.py")
