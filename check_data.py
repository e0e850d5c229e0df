"""Check data before training on it: `ola-vlm check-data --recipe NAME`, or `--data FILE --image_folder FOLDER`.

Counts rows, images and answers; finds images that are missing, undecodable or outside the image folder, and rows in no
known form. With a model's parts (a recipe's, or --checkpoint) also rows without a supervised token or beyond
max_length. No weights are loaded.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ola_vlm.configuration_ola_vlm import normalize_task
from ola_vlm.convert.parts import build_processor, count_class_tokens, load_vision_config
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.recipes import RECIPES
from ola_vlm.training.check import check_rows
from ola_vlm.training.data import OlaVlmCollator
from ola_vlm.training.rows import PROBLEMS, load_rows


def load_processor(fields: dict) -> OlaVlmProcessor | None:
    """The processor that a run with these fields would use; None if they name no model."""
    if fields.get("checkpoint"):
        return OlaVlmProcessor.from_pretrained(fields["checkpoint"])
    if not fields.get("language_model"):
        return None
    text_config = AutoConfig.from_pretrained(fields["language_model"])
    vision_config = load_vision_config(fields["vision_tower"])
    with torch.device("meta"):
        class_tokens = count_class_tokens(AutoModel.from_config(vision_config))
    tasks = [
        normalize_task(t, text_config.hidden_size, text_config.num_hidden_layers) for t in fields.get("tasks") or []
    ]
    overrides = fields.get("model_overrides") or {}
    return build_processor(
        AutoTokenizer.from_pretrained(fields.get("tokenizer") or fields["language_model"]),
        vision_config,
        tasks,
        chat_template=overrides.get("chat_template"),
        class_tokens=class_tokens,
        strategy=overrides.get("vision_feature_select_strategy", "default" if class_tokens else "full"),
    )


def table(report: dict) -> str:
    """The report as lines of a name and a number."""
    counts = {name: number for name, number in report.items() if isinstance(number, int)}
    counts |= {f"bad: {PROBLEMS[kind]}": number for kind, number in report["bad rows"].items()}
    return "\n".join(f"{name:<36} {number:>12,}" for name, number in counts.items())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("ola-vlm check-data", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--recipe", choices=list(RECIPES), help="where these fields come from, unless given below")
    for name in ("data", "data_config", "data_split", "image_folder", "checkpoint"):
        parser.add_argument(f"--{name}", help="the field of `ola-vlm train`")
    parser.add_argument("--max_length", type=int, help="the field of `ola-vlm train`")
    parser.add_argument("--on_long_rows", choices=["drop", "truncate"], help="the field of `ola-vlm train`")
    parser.add_argument(
        "--on_bad_rows", choices=["stop", "drop"], default="stop", help="stop: end with status 1 if there are any"
    )
    parser.add_argument("--no_decode", action="store_true", help="look whether images are there, don't open them")
    parser.add_argument("--workers", type=int, default=0, help="processes")
    parser.add_argument("--out", type=Path, help="a JSON file for the report and the names of all bad rows")
    args = parser.parse_args(argv)
    fields = RECIPES[args.recipe]() if args.recipe else {}
    fields |= {name: value for name, value in vars(args).items() if value is not None}
    if not fields.get("data"):
        parser.error("give --recipe or --data")
    rows = load_rows(
        fields["data"], fields.get("image_folder"), fields.get("data_config"), fields.get("data_split") or "train"
    )
    processor = load_processor(fields)
    collator = None
    if processor is not None:
        truncate = fields.get("on_long_rows") == "truncate"
        collator = OlaVlmCollator(processor, max_length=fields.get("max_length"), truncate=truncate)
    facts = check_rows(rows, collator, not args.no_decode, args.workers)
    report = facts.report() | {"named": facts.named}
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    for bad in facts.named[:20]:
        print(f"row {bad['row']}: {bad['reason']}")
    if len(facts.named) > 20:
        print(f"... and {len(facts.named) - 20} more: --out FILE names all")
    if args.on_bad_rows == "stop" and any(bad["problem"] != "too_long" for bad in facts.named):
        raise SystemExit(1)
