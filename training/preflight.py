"""What a run's arguments and its parts' configuration files tell before rows, images and weights are read: mistakes
that cost nothing to see are seen first."""

import os
from collections.abc import Sequence
from dataclasses import fields

from transformers import AutoConfig, AutoTokenizer

from ..configuration_ola_vlm import TASK_FIELDS, OlaVlmConfig, normalize_task
from ..targets.encoders import load_vision_config
from ..targets.fill import Teacher, make_teachers
from ..targets.loading import check_place, find_file, loading_from, read_json_object
from .arguments import OlaVlmArguments
from .stages import find_stage
from .words import encode_words

FUSIONS = ("feature", "token")
FUSED = ("clip_image", "depth_anything", "oneformer")  # teachers that the baseline can have as a part
RESIZE_MODES = ("pad", "reference")


def check_run(args: OlaVlmArguments) -> list[dict]:
    """The tasks whose embedding losses the run trains. ValueError, which names the field and the remedy, for what
    can't work: parts, checkpoint and teachers that are missing or don't fit, names that are unknown."""
    if args.data is None:
        raise ValueError("no data: give a LLaVA-format JSON file or a Hugging Face dataset")
    for name in ("data", "eval_data", "eval_questions"):
        file = getattr(args, name)
        if file and file.endswith((".json", ".jsonl")) and not os.path.isfile(file):
            raise ValueError(f"there is no file {file}: give {name}, rows as JSON or a Hugging Face dataset")
    parts = [args.vision_tower, args.language_model]
    if args.checkpoint and any([*parts, args.tokenizer, args.tasks, args.model_overrides, args.fusion]):
        raise ValueError("a checkpoint has its own parts and tasks: give either checkpoint or vision_tower etc.")
    if not args.checkpoint and not all(parts):
        raise ValueError("nothing to train: give checkpoint, or vision_tower and language_model")
    tasks = _tasks_of_checkpoint(args.checkpoint) if args.checkpoint else _tasks_of_parts(args)
    if args.fusion:
        _check_fusion(args)
    stage = find_stage(args.stage, args.embedding_losses, args.task_tokens)
    trained = tasks if stage.embedding_losses else []
    for task in trained:
        if task["place_code"] > 0 and (args.teachers or {}).get(task["name"], {}).get("motion"):
            raise ValueError(f"task {task['name']!r}: places don't move: give place_code 0 with a teacher's motion")
    if args.teachers is not None:  # a program may leave them out and bring targets of its own
        teachers = make_teachers(trained, args.teachers)
        for teacher in teachers.values():
            teacher.check(args.target_cache)
        _check_words(args, teachers)
    _check_evaluation(args, trained)
    return trained


def _check_words(args: OlaVlmArguments, teachers: dict[str, Teacher]) -> None:
    """ValueError for a teacher's word that the language model's tokenizer can't say."""
    words = [word for teacher in teachers.values() if teacher.gives_words for word in teacher.words(args.target_cache)]
    if not words:
        return
    path = args.tokenizer or args.checkpoint or args.language_model
    assert path is not None  # `check_run` has looked
    with loading_from(path, weights=False):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    encode_words(tokenizer, words)


def _tasks_of_checkpoint(checkpoint: str) -> list[dict]:
    with loading_from(checkpoint):
        if find_file(checkpoint, "adapter_config.json") is not None:
            raise ValueError(f"{checkpoint} holds adapters, not a model: merge them first (`ola-vlm merge`)")
        config = find_file(checkpoint, "config.json")
        if config is None:
            raise ValueError(f"{checkpoint} has no config.json: it is no checkpoint of a model")
        tasks = read_json_object(config).get("tasks") or []
        return [{**TASK_FIELDS, **task} for task in tasks]  # an older checkpoint's have fewer fields


def _tasks_of_parts(args: OlaVlmArguments) -> list[dict]:
    overrides = args.model_overrides or {}
    arguments = {"chat_template", "resize_mode", "dtype", "pad_vocab_to_multiple_of"}
    known = {*arguments, *(field.name for field in fields(OlaVlmConfig))}
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise ValueError(f"model_overrides has {unknown}: no arguments of build_ola_vlm and no fields of OlaVlmConfig")
    resize_mode = overrides.get("resize_mode", "pad")
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"model_overrides: resize_mode {resize_mode!r} is unknown: choose one of {RESIZE_MODES}")
    assert args.language_model is not None and args.vision_tower is not None  # `check_run` has looked
    with loading_from(args.language_model):
        text = AutoConfig.from_pretrained(args.language_model)
    with loading_from(args.vision_tower):
        vision = load_vision_config(args.vision_tower)
    if args.tokenizer:
        check_place(args.tokenizer)
    layer = overrides.get("vision_feature_layer")
    depth = getattr(vision, "num_hidden_layers", None)  # timm's have none
    if isinstance(layer, int) and depth and not -depth - 1 <= layer <= depth:
        raise ValueError(f"model_overrides: vision_feature_layer is {layer}: choose from {-depth - 1} to {depth}")
    tasks = [normalize_task(task, text.hidden_size, text.num_hidden_layers) for task in args.tasks or []]
    names = [task["name"] for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks is {names}: give each task its own name")
    return tasks


def _check_fusion(args: OlaVlmArguments) -> None:
    if args.fusion not in FUSIONS:
        raise ValueError(f"fusion {args.fusion!r} is unknown: choose one of {FUSIONS}")
    if not args.teachers:
        raise ValueError("fusion takes its encoders from teachers: give some")
    for name, entry in args.teachers.items():
        if entry.get("encoder") not in FUSED or "path" not in entry:
            raise ValueError(f"teachers[{name!r}] is {entry}: give its path, and for fusion an encoder of {FUSED}")


def _check_evaluation(args: OlaVlmArguments, tasks: Sequence[dict]) -> None:
    wanted = {
        "eval_strategy": args.eval_strategy != "no",
        "eval_questions": args.eval_questions is not None,
        "load_best_model_at_end": args.load_best_model_at_end,
        "metric_for_best_model": args.metric_for_best_model is not None,
        "eval_on_start": args.eval_on_start,
    }
    if args.eval_data is None:
        named = [name for name, is_wanted in wanted.items() if is_wanted]
        if named:
            remedy = "give eval_data, a file of rows or a share of the data such as 0.02"
            raise ValueError(f"{', '.join(named)}: there is nothing to evaluate on, {remedy}")
        return
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", "loss/ntp", *(["accuracy"] if args.eval_questions else [])]
    for task in tasks:
        for layer in task["layers"]:
            known += [f"loss/{task['name']}/{layer}/{part}" for part in (task["loss"], "contrastive")]
    if metric not in known:
        raise ValueError(f"metric_for_best_model {metric!r} is unknown: choose one of {known}")
