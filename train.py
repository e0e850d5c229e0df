"""Train one stage: `python train.py --recipe NAME [--any_field value]` (= `ola-vlm train ...`).

A recipe is a dict of fields of `OlaVlmArguments` (recipes/); any field can be overridden on the command line. The
effective configuration goes to `output_dir/run.json`, model and processor to `output_dir`.
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed

from ola_vlm.baselines.build import build_multi_encoder, load_encoders
from ola_vlm.commands.running import as_command, command, tell
from ola_vlm.convert.model_card import write_adapter_card
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.eval.during_training import AnswerQuestions, answering_callbacks
from ola_vlm.inference.checkpoints import PROCESSOR_FILES, adapter_base, read_checkpoint
from ola_vlm.recipes.arguments import check_checkpoint_is_made, check_data_is_made, make_arguments
from ola_vlm.recipes.check_data import load_processor
from ola_vlm.training import run_record
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.attach import AttachedPredictors, attach_predictors, without_predictors
from ola_vlm.training.chat_template import find_chat_template, stop_at_end_of_turn
from ola_vlm.training.check import drop_bad_rows
from ola_vlm.training.collator import AttachedCollator, OlaVlmCollator
from ola_vlm.training.lora import add_adapters, four_bits
from ola_vlm.training.packing import PackedRows, choose_attention
from ola_vlm.training.plan import Plan
from ola_vlm.training.preflight import OWN_TYPES, check_run, given_view, is_attached, view_of_images
from ola_vlm.training.rows import Rows, StreamRows
from ola_vlm.training.run_record import last_checkpoint
from ola_vlm.training.stages import apply_stage, upcast_trained
from ola_vlm.training.targets import no_targets, target_sources
from ola_vlm.training.trainer import OlaVlmTrainer

# By name: as a script the module is "__main__".
logger = logging.getLogger("ola_vlm.train")


def load_model(args: OlaVlmArguments) -> tuple[PreTrainedModel, ProcessorMixin]:
    """From `checkpoint`, with predictors attached to a model of another class, or built from parts."""
    if args.checkpoint:
        if adapter_base(args.checkpoint) is not None:
            raise ValueError(f"{args.checkpoint} holds adapters, not a model: merge them first (`ola-vlm merge`)")
        options: dict = {"llava_as_ours": not args.tasks, "needs_processor": True, "dtype": args.torch_dtype}
        options["trust_remote_code"] = args.trust_remote_code
        if args.load_in_4bit:
            options["quantization_config"] = four_bits(args.torch_dtype)
        model, processor = read_checkpoint(args.checkpoint, **options)
        # `needs_processor` asks for it.
        assert processor is not None
        is_attached = isinstance(model, AttachedPredictors)
        if not is_attached and model.config.model_type not in OWN_TYPES:
            # Predictors begin the same, whatever was drawn before.
            set_seed(args.seed)
            if args.tasks:
                model = attach_predictors(model, args.tasks, processor)
            else:
                model = without_predictors(model)
        return model, processor

    # Without a checkpoint: from parts; `check_run` has seen to it that they are given.
    assert args.vision_tower is not None and args.language_model is not None
    overrides: dict = {"dtype": args.torch_dtype, **(args.model_overrides or {})}
    model, processor = build_ola_vlm(
        args.vision_tower, args.language_model, args.tokenizer, args.tasks or [], **overrides
    )
    # Other tasks draw other numbers before: this way methods start from the same projector.
    set_seed(args.seed)
    model.model.multi_modal_projector.apply(model._init_weights)
    if args.fusion:
        encoders = load_encoders(args.teachers or {}, model.config.image_seq_length)
        return build_multi_encoder(model, processor, encoders, args.fusion, args.num_encoder_tokens)
    return model, processor


def read_collator(args: OlaVlmArguments) -> OlaVlmCollator:
    """The run's collator without targets, which tells what text and images become before rows and weights are read.
    ValueError for a chat template that can't be trained with."""
    processor = load_processor(args)
    if processor is None:
        raise ValueError(
            f"{args.checkpoint} has no processor ({PROCESSOR_FILES[0]}): save it there by save_pretrained"
        )
    processor.chat_template = find_chat_template(processor).template
    if not is_attached(args):
        return OlaVlmCollator(processor, max_length=args.max_length)
    return AttachedCollator(processor, max_length=args.max_length, **view_of_images(args))


def train(
    args: OlaVlmArguments,
    callbacks: Sequence[TrainerCallback] = (),
    recipe: str | None = None,
    make_collator: Callable[..., OlaVlmCollator] = OlaVlmCollator,
) -> OlaVlmTrainer | None:
    """Runs one stage to its end and returns the `OlaVlmTrainer` (`.model`, `.state.log_history`); None if the run that
    is to be resumed has finished already. `make_collator` takes the arguments of `OlaVlmCollator`."""
    # Everything that can be wrong and is quickly seen, before anything slow.
    trained_tasks = check_run(args)
    collator = read_collator(args)
    if trained_tasks:
        # They need images, whatever the rows are.
        collator.check_max_length()
    callbacks = [*callbacks, *answering_callbacks(args)]
    # One process holds the folder for all of the run's.
    lock = nullcontext()
    if args.process_index == 0:
        lock = run_record.run_lock(args.output_dir)
    with lock:
        rows = args.load_rows()
        if rows.names_images():
            collator.check_max_length()
        if not rows.has_text and not trained_tasks:
            what = f"{args.data} has images alone, which only embedding losses learn from, and this run has none"
            raise ValueError(f"{what}: give tasks and teachers, and a stage or embedding_losses that trains them")

        # Is it a new run, one that goes on, or one that is done?
        identity = run_record.run_identity(args, rows)
        if args.resume_from_checkpoint and run_record.is_finished(args.output_dir, identity):
            logger.warning(f"{args.output_dir}: this run has finished, nothing is left to do")
            return None
        checkpoint = args.resume_from_checkpoint
        if checkpoint == "true":
            checkpoint = last_checkpoint(args.output_dir)
        run_record.check_start(args, checkpoint, identity)

        # Once before the model is loaded: rows may be too few.
        rows, eval_rows = args.split_eval_rows(rows)
        Plan.make(args, rows)
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
    # The model, and what of it trains.
    set_seed(args.seed)
    model, processor = load_model(args)
    padding_free = False
    if args.packing:
        padding_free = choose_attention(model, args.use_cpu, args.bf16 or args.fp16 or args.dtype != "float32")
    stage = apply_stage(model, args.stage, args.embedding_losses, args.task_tokens)
    tasks = []
    if stage.embedding_losses:
        tasks = model.config.tasks
    if isinstance(model, AttachedPredictors):
        # What isn't given stays as the run before had it.
        model.config.image_view.update(given_view(args))
        make_collator = partial(AttachedCollator, **model.config.image_view)
    if args.lora_rank:
        model = add_adapters(model, args)
    if (args.bf16 or args.fp16) and not args.deepspeed:
        # The trainer would do it, too late for the plan.
        upcast_trained(model)

    # The rows that can be trained on; a stream's are checked as they come.
    lengths = {"max_length": args.max_length, "truncate": args.on_long_rows == "truncate"}
    # Before targets are computed, which takes longest.
    if tasks:
        make_collator(processor, **lengths).check_tokens(tasks, model.config.image_token_id)
    # Filling the cache opens all images anyway.
    decode = args.check_images and not (tasks and args.target_cache)
    parts = [part for part in (rows, eval_rows) if part is not None]
    for part in parts:
        if isinstance(part, Rows):
            collator = make_collator(processor, **lengths)
            drop_bad_rows(part, collator, args.on_bad_rows, args.dataloader_num_workers, decode)

    # Their targets, which may drop more of them.
    if tasks:
        sources = target_sources(args, tasks, *parts)
    else:
        sources = no_targets(args)
    if tasks and args.shuffle_targets:
        # No stream: the arguments exclude it.
        assert isinstance(rows, Rows)
        rows.shuffle_targets(args.seed)

    # Only now it is known which rows there are to be packed.
    items: Rows | StreamRows | PackedRows = rows
    if args.packing:
        assert isinstance(rows, Rows) and args.max_length is not None
        seed = args.seed
        if args.data_seed is not None:
            seed = args.data_seed
        items = PackedRows(rows, args.max_length, seed, padding_free)
    plan = Plan.make(args, items)
    if args.max_steps <= 0:
        args.num_train_epochs = plan.epochs
    if args.should_log:
        print(plan.text(args, model), flush=True)
        plan.warn_if_short(args)

    # With a cache the loader's workers read targets; a teacher is asked by this process, which has the GPU.
    options = {**lengths, "drop_bad_rows": True, "targets_later": not args.target_cache, "padding_free": padding_free}
    trainer = OlaVlmTrainer(
        model,
        args,
        data_collator=make_collator(processor, sources, tasks, **options),
        train_dataset=items,
        eval_dataset=eval_rows,
        processing_class=processor,
        callbacks=list(callbacks),
    )
    stop_at_end_of_turn(trainer.base_model, trainer.data_collator.chat_template)  # pyright: ignore[reportAttributeAccessIssue] (ours)
    for callback in callbacks:
        if isinstance(callback, AnswerQuestions):
            callback.trackers = trainer.callback_handler.callbacks

    # run.json first: a run that is killed says what it was.
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
    # `save_model` has just written the task tokens into the vocabulary: the model in hand is the one that is saved.
    if not trainer.is_sharded:
        model.task_tokens_from_queries = False  # pyright: ignore[reportArgumentType] (a plain attribute, no module or tensor)
    return trainer


@command("train")
def main(options: Namespace) -> None:
    args = make_arguments(options, "ola-vlm train")
    check_data_is_made(args)
    check_checkpoint_is_made(args, options.recipe)
    train(args, recipe=options.recipe)
    tell(
        f"Results: {args.output_dir} (model, processor, run.json)",
        f"Next: ola-vlm chat {args.output_dir} IMAGE, ola-vlm eval {args.output_dir} --benchmark NAME --out DIR, or "
        f"the next stage: ola-vlm train --recipe NAME --checkpoint {args.output_dir}",
    )


if __name__ == "__main__":
    as_command("train", main, start="python train.py")
