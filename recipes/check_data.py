"""`ola-vlm check-data`: what is in the data, and what of it can't be trained on (commands/check_data.py)."""

from argparse import Namespace
from typing import cast

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlavaProcessor

from ..baselines.build import multi_encoder_processor
from ..commands.running import command, tell
from ..configuration_ola_vlm import normalize_task
from ..convert.parts import build_processor, measure_tower
from ..inference.checkpoints import read_processor
from ..targets.encoders import load_vision_config
from ..targets.escapes import one_line
from ..targets.files import write_json
from ..targets.loading import loading_from
from ..training.arguments import OlaVlmArguments
from ..training.check import check_rows
from ..training.collator import OlaVlmCollator
from ..training.rows import PROBLEMS, StreamRows
from .arguments import check_data_is_made, make_arguments


def load_processor(args: OlaVlmArguments) -> LlavaProcessor | None:
    """The processor that a run would use; None if the arguments name no model."""
    if args.checkpoint:
        return cast(LlavaProcessor | None, read_processor(args.checkpoint, llava_as_ours=True))
    if not args.language_model:
        return None
    with loading_from(args.language_model, weights=False):
        text_config = AutoConfig.from_pretrained(args.language_model, trust_remote_code=False)
    with torch.device("meta"):
        tower = AutoModel.from_config(load_vision_config(args.vision_tower))
        vision_config, class_tokens = measure_tower(tower)
    width, layers = text_config.hidden_size, text_config.num_hidden_layers
    words = args.tokenizer or args.language_model
    with loading_from(words, weights=False):
        tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
    overrides = args.model_overrides or {}
    processor = build_processor(
        tokenizer,
        vision_config,
        [normalize_task(task, width, layers) for task in args.tasks or []],
        chat_template=overrides.get("chat_template"),
        class_tokens=class_tokens,
        strategy=overrides.get("vision_feature_select_strategy", "default" if class_tokens else "full"),
    )
    if args.fusion != "token":
        return processor
    grid, appended = vision_config.image_size // vision_config.patch_size, len(args.teachers or {})
    return multi_encoder_processor(processor, grid**2 + appended * args.num_encoder_tokens)


def table(report: dict, with_text: bool, with_images: bool) -> str:
    """The report as lines of a name and a number, or that it wasn't looked at."""
    counts = {name: number for name, number in report.items() if isinstance(number, int)}
    counts |= {f"bad: {PROBLEMS[kind]}": n for kind, n in report["bad rows"].items() if kind != "target"}
    unknown = [] if with_text else [name for name in counts if "token" in name or "truncated" in name]
    unknown += [] if with_text else [f"bad: {PROBLEMS['too_long']}"]
    unknown += [] if with_images else [f"bad: {PROBLEMS['undecodable']}"]
    shown = {name: f"{number:,}" for name, number in counts.items()} | dict.fromkeys(unknown, "not checked")
    return "\n".join(f"{name:<36} {text:>12}" for name, text in shown.items())


@command("check-data")
def main(options: Namespace) -> None:
    args = make_arguments(options, "ola-vlm check-data", use_cpu=True)
    check_data_is_made(args)
    rows = args.load_rows()
    if isinstance(rows, StreamRows):
        raise ValueError("a stream's rows are checked as they come: give --streaming false")
    processor, collator = load_processor(args), None
    if processor is not None:
        truncate = args.on_long_rows == "truncate"
        collator = OlaVlmCollator(processor, max_length=args.max_length, truncate=truncate)
    report = check_rows(rows, collator, not options.no_decode, args.dataloader_num_workers)
    summary = report.summary()
    if options.out is not None and args.process_index == 0:
        write_json(options.out, {**summary, "named": report.named}, indent=1)
    if args.process_index == 0:
        print(table(summary, collator is not None, not options.no_decode))
        if collator is None:
            print("answers' tokens and lengths: give --recipe or --checkpoint, whose tokenizer they need")
        for bad in report.named[:20]:
            print(one_line(f"row {bad['row']}: {bad['reason']}"))
        if len(report.named) > 20:
            print(f"... and {len(report.named) - 20} more: --out FILE names all")
    stops = args.on_bad_rows == "stop" and any(bad["problem"] != "too_long" for bad in report.named)
    if options.out is not None:
        tell(f"Results: {options.out}")
    if stops:
        tell("Next: mend or delete the bad rows, or train without them: --on_bad_rows drop")
        raise SystemExit(1)
    tell("Next: ola-vlm train with the same fields; with a recipe that has teachers, ola-vlm targets before")
