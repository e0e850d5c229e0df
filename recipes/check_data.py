"""`ola-vlm check-data`: what is in the data, and what of it can't be trained on (commands/check_data.py)."""

from argparse import Namespace

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, ProcessorMixin

from ..baselines.build import multi_encoder_processor
from ..commands.running import command, tell
from ..configuration_ola_vlm import normalize_task
from ..convert.parts import build_processor, measure_tower
from ..files.escapes import one_line
from ..files.writing import write_json
from ..inference.checkpoints import read_processor
from ..targets.encoders import load_vision_config
from ..targets.loading import loading_from
from ..training.arguments import OlaVlmArguments
from ..training.check import check_rows
from ..training.collator import AttachedCollator, OlaVlmCollator
from ..training.preflight import is_attached
from ..training.rows import PROBLEMS, StreamRows
from .arguments import check_data_is_made, make_arguments

_measured_towers: dict[str, tuple[PreTrainedConfig, int]] = {}


def _measured(vision_config: PreTrainedConfig) -> tuple[PreTrainedConfig, int]:
    """`measure_tower` of that configuration, once a process: it takes a second."""
    key = vision_config.to_json_string(use_diff=False)
    if key not in _measured_towers:
        # Only shapes are asked for: no weights are made.
        with torch.device("meta"):
            _measured_towers[key] = measure_tower(AutoModel.from_config(vision_config))
    return _measured_towers[key]


def load_processor(args: OlaVlmArguments) -> ProcessorMixin | None:
    """The processor that a run would use; None if the arguments name no model."""
    # A checkpoint brings its own.
    if args.checkpoint:
        return read_processor(args.checkpoint, args.trust_remote_code, llava_as_ours=not args.tasks)
    if not args.language_model and not args.vision_tower:
        return None
    if not args.language_model or not args.vision_tower:
        what = "a row's tokens depend on both, vision_tower and language_model"
        raise ValueError(f"{what}: give the other one, too, or neither")
    # Else as `build_ola_vlm` would make it of the parts, from their configurations alone.
    with loading_from(args.language_model, weights=False):
        text_config = AutoConfig.from_pretrained(args.language_model, trust_remote_code=False)
    vision_config, class_tokens = _measured(load_vision_config(args.vision_tower))
    width = text_config.hidden_size
    layers = text_config.num_hidden_layers
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
        # "default" leaves out the class token, which a tower such as SigLIP's doesn't have.
        strategy=overrides.get("vision_feature_select_strategy", "default" if class_tokens else "full"),
    )
    # Joined by channel ("feature"), encoders add no tokens: images are as long as LLaVA's.
    if args.fusion != "token":
        return processor
    grid = vision_config.image_size // vision_config.patch_size
    appended = len(args.teachers or {}) * args.num_encoder_tokens
    return multi_encoder_processor(processor, grid**2 + appended)


def table(report: dict, with_text: bool, with_images: bool) -> str:
    """The report as lines of a name and a number, or that it wasn't looked at."""
    # Single numbers first; kinds of bad rows are counted in a dict of their own.
    counts = {name: number for name, number in report.items() if isinstance(number, int)}
    for kind, number in report["bad rows"].items():
        # It is looked for when targets are filled.
        if kind != "target":
            counts[f"bad: {PROBLEMS[kind]}"] = number
    shown = {name: f"{number:,}" for name, number in counts.items()}
    # A 0 would look like a result.
    unknown = []
    if not with_text:
        unknown += [name for name in counts if "token" in name or "truncated" in name]
        unknown.append(f"bad: {PROBLEMS['too_long']}")
    if not with_images:
        unknown.append(f"bad: {PROBLEMS['undecodable']}")
    shown.update(dict.fromkeys(unknown, "not checked"))
    return "\n".join(f"{name:<36} {text:>12}" for name, text in shown.items())


@command("check-data")
def main(options: Namespace) -> None:
    args = make_arguments(options, "ola-vlm check-data", use_cpu=True)
    check_data_is_made(args)
    rows = args.load_rows()
    if isinstance(rows, StreamRows):
        raise ValueError("a stream's rows are checked as they come: give --streaming false")
    processor = load_processor(args)
    collator = None
    if processor is not None:
        truncate = args.on_long_rows == "truncate"
        collator_class = AttachedCollator if is_attached(args) else OlaVlmCollator
        collator = collator_class(processor, max_length=args.max_length, truncate=truncate)
    # The check itself is the one that a run makes before it begins.
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
    # A run drops rows that are too long without being asked, so they are no failure here either.
    stops = args.on_bad_rows == "stop" and any(bad["problem"] != "too_long" for bad in report.named)
    if options.out is not None:
        tell(f"Results: {options.out}")
    if stops:
        tell("Next: mend or delete the bad rows, or train without them: --on_bad_rows drop")
        raise SystemExit(1)
    tell("Next: ola-vlm train with the same fields; with a recipe that has teachers, ola-vlm targets before")
