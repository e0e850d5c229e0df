"""What a run's arguments and its parts' configuration files tell before rows, images and weights are read: mistakes
that cost nothing to see are seen first."""

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

import torch
from huggingface_hub import get_token
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    Trainer,
    get_scheduler,
)
from transformers.activations import ACT2FN
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..baselines.configuration_multi_encoder import MultiEncoderLlavaConfig
from ..configuration_ola_vlm import PAPER_TASKS, TASK_FIELDS, OlaVlmConfig, normalize_task
from ..targets.encoders import load_vision_config
from ..targets.fill import Teacher, make_teachers
from ..targets.loading import check_code, check_place, find_file, loading_from, one_line, read_json_object
from .arguments import NO_DATA, NOTHING_TO_EVALUATE, OlaVlmArguments
from .attach import VIEW
from .collator import check_square
from .packing import check_keeps_rows_apart
from .stages import find_stage
from .words import check_alone, encode_words

OWN_TYPES = (OlaVlmConfig.model_type, MultiEncoderLlavaConfig.model_type)
FUSIONS = ("feature", "token")
# Teachers that the baseline can have as a part.
FUSED = ("clip_image", "depth_anything", "oneformer")
# Arguments of `build_ola_vlm` beside the configuration's fields -> their type, and all that they may be.
BUILDING: dict[str, tuple[type, tuple[str, ...]]] = {
    "chat_template": (str, ()),
    "dtype": (str, ("float32", "bfloat16", "float16")),
    "pad_vocab_to_multiple_of": (int, ()),
    "resize_mode": (str, ("pad", "reference")),
}
# Fields of the configuration that say how the parts are.
OF_PARTS = {
    "text_config",
    "vision_config",
    "image_token_index",
    "image_seq_length",
    "tie_word_embeddings",
    "tasks",
    "task_token_ids",
    "vocab_padding",
}
# Parts of the names of optimizers that transformers makes only with a model at hand, and what it says without one.
NEED_MODEL = ("galore", "apollo", "lomo")
NEEDS_MODEL = "You need to pass a"
# Models whose rows can be packed: others place images by rules of their own.
PACKABLE = (OlaVlmConfig.model_type, "llava", "multi_encoder_llava")
# Fields of a run that are for models of other families only.
VIEW_FIELDS = ("image_square", "image_side", "image_options")


def check_run(args: OlaVlmArguments) -> list[dict]:
    """The tasks whose embedding losses the run trains. ValueError, which names the field and the remedy, for what
    can't work: parts, checkpoint and teachers that are missing or don't fit, names that are unknown."""
    # Files and folders.
    if args.data is None:
        raise ValueError(NO_DATA)
    for name in ("data", "eval_data", "eval_questions"):
        file = getattr(args, name)
        # Other names are folders, or data sets on the Hub.
        if file and file.endswith((".json", ".jsonl")) and not os.path.isfile(file):
            raise ValueError(f"there is no file {file}: give {name}, rows as JSON or a Hugging Face dataset")
    for name in ("target_cache", "output_dir"):
        folder = getattr(args, name)
        if folder and os.path.isfile(folder):
            raise ValueError(f"{name} {folder} is a file: give a folder")
    _check_trainer_fields(args)

    # What is trained: a checkpoint, or parts that are put together.
    parts = [args.vision_tower, args.language_model]
    # Parts would be ignored without a word.
    if args.checkpoint and any([*parts, args.tokenizer, args.model_overrides, args.fusion]):
        raise ValueError("a checkpoint has its own parts: give either checkpoint or vision_tower etc.")
    if not args.checkpoint and not all(parts):
        raise ValueError("nothing to train: give checkpoint, or vision_tower and language_model")
    if args.checkpoint:
        tasks = _tasks_on_checkpoint(args)
    else:
        tasks = _tasks_of_parts(args)
    if args.fusion:
        _check_fusion(args)

    # The tasks whose losses train, and their teachers.
    stage = find_stage(args.stage, args.embedding_losses, args.task_tokens)
    trained = []
    if stage.embedding_losses:
        trained = tasks
    _check_losses(args, trained)
    if is_attached(args):
        check_square(view_of_images(args).get("square", True), trained)
    for task in trained:
        if task["place_code"] > 0 and (args.teachers or {}).get(task["name"], {}).get("motion"):
            raise ValueError(f"task {task['name']!r}: places don't move: give place_code 0 with a teacher's motion")
    # A program may leave them out and bring targets of its own.
    if args.teachers is not None:
        teachers = make_teachers(trained, args.teachers)
        for teacher in teachers.values():
            teacher.check(args.target_cache)
        _check_words(args, trained, teachers)
    _check_evaluation(args, trained)
    if args.packing:
        _check_packing(args)
    return trained


def _check_losses(args: OlaVlmArguments, trained: list[dict]) -> None:
    """ValueError for what a run asks of embedding losses that it doesn't have: it would train next tokens alone, and a
    control would be its arm."""
    if trained:
        return
    asked = []
    if args.embedding_losses:
        asked.append("embedding_losses")
    if args.losses_until is not None:
        asked.append("losses_until")
    if args.shuffle_targets:
        asked.append("shuffle_targets")
    if asked:
        what = f"{', '.join(asked)}: this run trains no embedding losses"
        raise ValueError(f"{what}; give tasks, or a checkpoint with some, and pre-train or set embedding_losses=true")


def _check_trainer_fields(args: OlaVlmArguments) -> None:
    """ValueError for trackers, an optimizer and a scheduler that the trainer couldn't make, and for a Hub that it
    couldn't push to: it would say so only when the model is loaded."""
    known = ["none", "all", *INTEGRATION_TO_CALLBACK]
    trackers = args.report_to
    if isinstance(trackers, str):
        trackers = [trackers]
    for tracker in trackers or []:
        if tracker not in known:
            raise ValueError(f"report_to {tracker!r} is unknown: choose one of {known}")
        if tracker not in ("none", "all", *get_available_reporting_integrations()):
            raise ValueError(f"report_to {tracker!r} is not installed: install it, or set report_to=none")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 needs a GPU: on a CPU take bf16, or leave it out")
    _check_optimizer(args)
    _check_deepspeed(args)
    # The first process alone pushes: other machines need no token.
    if args.push_to_hub and args.process_index == 0 and not (args.hub_token or get_token()):
        raise ValueError("push_to_hub: nobody is logged in, run `hf auth login`; or push later (`ola-vlm push`)")

    # Made once for a stand-in, of which the scheduler needs no more than a learning rate.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = {"num_warmup_steps": 1, "num_training_steps": 2, "scheduler_specific_kwargs": args.lr_scheduler_kwargs}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, **scheduler)
    except (TypeError, ValueError) as error:
        name = SchedulerType(args.lr_scheduler_type).value
        fields = f"lr_scheduler_type {name} with lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
        raise ValueError(f"{fields} doesn't work: {error}") from error


def _check_deepspeed(args: OlaVlmArguments) -> None:
    """ValueError for a configuration of DeepSpeed, given or accelerate's, that leaves checkpoints without a model."""
    if args.deepspeed_plugin is None:
        return
    config = args.deepspeed_plugin.hf_ds_config
    field = "stage3_gather_16bit_weights_on_model_save"
    if config.is_zero3() and not config.get_value(f"zero_optimization.{field}"):
        what = f"deepspeed: ZeRO-3 without {field} saves shards, and no model that could be loaded"
        raise ValueError(f"{what}: set it to true in zero_optimization, as recipes/accelerate/zero3.json does")


def _check_optimizer(args: OlaVlmArguments) -> None:
    """ValueError for an optimizer whose package is missing, or that misses or doesn't take its arguments."""
    name = OptimizerNames(args.optim).value
    given = f" with optim_args {args.optim_args!r}" if args.optim_args else ""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        # Without a model these stop at the very last, when all else is right.
        lacks_model_only = any(kind in name for kind in NEED_MODEL) and NEEDS_MODEL in str(error)
        if not lacks_model_only:
            raise ValueError(f"optim {name}{given} doesn't work: {one_line(error)}") from error


def _check_words(args: OlaVlmArguments, tasks: Sequence[dict], teachers: dict[str, Teacher]) -> None:
    """ValueError for a teacher's word that the language model's tokenizer can't say, for a word of `alone` that no
    teacher says, and for motion of words, which can't be subtracted."""
    words = {name: teacher.words(args.target_cache) for name, teacher in teachers.items() if teacher.gives_words}
    if not words:
        return
    for task in tasks:
        if task["target"] != "words":
            continue
        # A teacher for each kind.
        kinds = (args.teachers or {})[task["name"]]
        for kind in task["words"]:
            if kinds[kind].get("motion"):
                raise ValueError(f"teachers.{task['name']}.{kind}: words have no motion: leave it out")
        # A position without any word has no target.
        if all(_leaves_out(kinds[kind].get("words")) for kind in task["words"]):
            raise ValueError(f"teachers.{task['name']}: a patch may get no word at all: give a word in place of null")
        check_alone({kind: words[f"{task['name']}.{kind}"] for kind in task["words"]}, task["alone"])
    # Where the run will find its tokenizer; `check_run` has seen to it that there is one.
    path = args.tokenizer or args.checkpoint or args.language_model
    assert path is not None
    with loading_from(path, weights=False):
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=bool(args.checkpoint and args.trust_remote_code)
        )
    encode_words(tokenizer, list(itertools.chain.from_iterable(words.values())))


def _leaves_out(words: object) -> bool:
    """Whether a teacher's `words` say nothing of some class."""
    if isinstance(words, dict):
        words = list(words.values())
    return isinstance(words, list) and None in words


def tasks_of_teachers(tasks: Sequence[dict]) -> list[dict]:
    """Tasks with the paper's fields where they lack them, for commands that know teachers and no language model.
    ValueError, as of `normalize_task`, for what can't be whatever the language model is."""
    completed = []
    for task in tasks:
        width = 1
        checked = task
        if isinstance(task, dict):
            # A recipe may name gen, depth and seg without their sizes.
            complete = {**PAPER_TASKS.get(str(task.get("name")), {}), **task}
            completed.append(complete)
            # Of a language model as wide as the task needs it, and deep enough. What predicts the targets may be left
            # out: it plays no part.
            sizes = [complete.get("target_dim"), complete.get("place_code")]
            width = max(1, sum(size for size in sizes if type(size) is int))
            checked = {"layers": [0], "num_task_tokens": 0, **task}
        normalize_task(checked, width, sys.maxsize)
    _check_names(completed)
    return completed


def tasks_of_checkpoint(args: OlaVlmArguments) -> list[dict]:
    """The checkpoint's own tasks, or those that are to be attached to it. ValueError for a checkpoint that can't be
    read, that has tasks while others are given, or to whose language model these don't fit."""
    # The caller has looked.
    checkpoint = args.checkpoint
    assert checkpoint is not None
    fields = _config_fields(checkpoint)
    # The checkpoint's own tasks, or given ones for a checkpoint without.
    tasks = fields.get("tasks") or []
    if not args.tasks:
        # Tasks of a checkpoint that an earlier version wrote have fewer fields.
        return [{**TASK_FIELDS, **task} for task in tasks]
    if tasks:
        names = [task["name"] for task in tasks]
        raise ValueError(f"{checkpoint} has tasks of its own, {names}: leave out tasks")
    if fields.get("model_type") in OWN_TYPES:
        kind = fields["model_type"]
        raise ValueError(f"{checkpoint} is a {kind} without tasks, which are given as it is built: leave out tasks")
    check_code(checkpoint, fields, args.trust_remote_code)
    with loading_from(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=args.trust_remote_code)
    text = config.get_text_config()
    return _normalized(args.tasks, text)


def _config_fields(checkpoint: str) -> dict:
    """What config.json says. ValueError for a folder or name that holds no model."""
    with loading_from(checkpoint):
        if find_file(checkpoint, "adapter_config.json") is not None:
            raise ValueError(f"{checkpoint} holds adapters, not a model: merge them first (`ola-vlm merge`)")
        config = find_file(checkpoint, "config.json")
        if config is None:
            raise ValueError(f"{checkpoint} has no config.json: it is no checkpoint of a model")
        return read_json_object(config)


def _normalized(tasks: list[dict], text: PreTrainedConfig) -> list[dict]:
    tasks = [normalize_task(task, text.hidden_size, text.num_hidden_layers) for task in tasks]
    _check_names(tasks)
    return tasks


def _check_names(tasks: Sequence[dict]) -> None:
    names = [task["name"] for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks is {names}: give each task its own name")


def _tasks_on_checkpoint(args: OlaVlmArguments) -> list[dict]:
    """`tasks_of_checkpoint`; ValueError for fields that don't fit to its kind of model."""
    tasks = tasks_of_checkpoint(args)
    if not is_attached(args):
        given = [name for name in VIEW_FIELDS if getattr(args, name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: our own models see images as their processor says, leave it out")
        return tasks
    if args.on_long_rows == "truncate" and args.max_length is not None:
        raise ValueError("on_long_rows: a model that isn't ours expands images itself, so no row is cut: give drop")
    if args.load_in_4bit:
        raise ValueError("load_in_4bit is for our own models: leave it out, adapters train on a model of 16 bits, too")
    if args.lora_rank and args.tasks and any(task["num_task_tokens"] for task in tasks):
        raise ValueError("adapters (lora_rank) don't hold task tokens' rows: give tasks with num_task_tokens 0")
    return tasks


def is_attached(args: OlaVlmArguments) -> bool:
    """Whether the run trains a model of another class than ours, by `training.attach`."""
    if args.checkpoint is None:
        return False
    fields = _config_fields(args.checkpoint)
    kind = fields.get("model_type")
    if kind in OWN_TYPES:
        return False
    # A plain LLaVA without tasks is an OLA-VLM without tasks.
    return kind not in (None, "llava") or bool(args.tasks or fields.get("tasks"))


def given_view(args: OlaVlmArguments) -> dict:
    """How a model that isn't ours sees images, as far as the run says it: arguments of `AttachedCollator`."""
    view = {"square": args.image_square, "side": args.image_side, "image_options": args.image_options}
    return {name: value for name, value in view.items() if value is not None}


def view_of_images(args: OlaVlmArguments) -> dict:
    """The same with what the run before had, for fields that aren't given."""
    # A checkpoint of another class (`is_attached`).
    assert args.checkpoint is not None
    remembered = _config_fields(args.checkpoint).get(VIEW)
    if not isinstance(remembered, dict):  # none, or a stranger's mistake
        remembered = {}
    return {**remembered, **given_view(args)}


def _check_packing(args: OlaVlmArguments) -> None:
    """ValueError for a model that can't take packed rows."""
    if args.checkpoint:
        fields = _config_fields(args.checkpoint)
        kind = fields.get("model_type")
        if kind not in PACKABLE or is_attached(args):
            what = kind
            if kind in PACKABLE:
                what = "predictors that are attached"
            raise ValueError(f"packing is for {', '.join(PACKABLE)}, not for {what}: set packing=false")
        # The language model's part of config.json; LLaVA's own leaves out its type.
        text = dict(fields.get("text_config") or {})
        config = AutoConfig.for_model(text.pop("model_type", "llama"), **text)
    else:
        # `check_run` has looked.
        assert args.language_model is not None
        with loading_from(args.language_model):
            config = AutoConfig.from_pretrained(args.language_model)
    check_keeps_rows_apart(config)


def _tasks_of_parts(args: OlaVlmArguments) -> list[dict]:
    # Names and types of what is to be changed.
    overrides = args.model_overrides or {}
    # What may be changed: not what the parts themselves decide.
    known = {*BUILDING, *(field.name for field in fields(OlaVlmConfig))} - OF_PARTS
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise ValueError(f"model_overrides has {unknown}: no arguments of build_ola_vlm and no fields of OlaVlmConfig")
    for name, (kind, choices) in BUILDING.items():
        value = overrides.get(name)
        if value is None:
            continue
        if choices and value not in choices:
            raise ValueError(f"model_overrides: {name} {value!r} is unknown: choose one of {choices}")
        if not isinstance(value, kind):
            raise ValueError(f"model_overrides: {name} is {value!r:.60}: give a value of type {kind.__name__}")

    # The parts themselves, by their configurations; `check_run` has seen to it that they are given.
    assert args.language_model is not None and args.vision_tower is not None
    text = _text_config(args.language_model)
    vision = _vision_config(args.vision_tower)
    if args.tokenizer:
        check_place(args.tokenizer)
    _check_config(text, vision, {name: value for name, value in overrides.items() if name not in BUILDING})
    return _normalized(args.tasks or [], text)


def _text_config(language_model: str) -> PreTrainedConfig:
    """ValueError for what is no language model alone."""
    _check_kind("language_model", language_model)
    with loading_from(language_model):
        text = AutoConfig.from_pretrained(language_model, trust_remote_code=False)
    what = f"language_model {language_model} is a {text.model_type}"
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{what}, which is no language model")
    if text.get_text_config() is not text:
        remedy = "give a language model alone, or attach predictors to this one (docs/your_own_vlm.md)"
        raise ValueError(f"{what}, which reads images itself: {remedy}")
    return text


def _vision_config(vision_tower: str) -> PreTrainedConfig:
    """ValueError for what is no vision encoder."""
    _check_kind("vision_tower", vision_tower)
    with loading_from(vision_tower):
        vision = load_vision_config(vision_tower)
    if vision.model_type != "timm_wrapper" and not hasattr(vision, "image_size"):
        raise ValueError(f"vision_tower {vision_tower} is a {vision.model_type}, which is no vision encoder")
    return vision


def _check_kind(field: str, place: str) -> None:
    """ValueError for a model that transformers has no class of its own for: a whole OLA-VLM, above all."""
    with loading_from(place, weights=False):
        file = find_file(place, "config.json")
        kind = None
        if file:
            kind = read_json_object(file).get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING:
        remedy = "code that comes with a part is not run; a whole model of ours is given as checkpoint"
        raise ValueError(f"{field} {place} is a {kind!r}, which transformers doesn't have: {remedy}")


def _check_config(text: PreTrainedConfig, vision: PreTrainedConfig, overrides: dict) -> None:
    """ValueError for fields of the configuration whose values can't be."""
    try:
        OlaVlmConfig(text_config=text, vision_config=vision, **overrides)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"model_overrides is {overrides}: {error.__cause__ or error}") from error
    activation = overrides.get("projector_hidden_act", "gelu")
    if activation not in ACT2FN:
        raise ValueError(
            f"model_overrides: projector_hidden_act {activation!r} is unknown: give gelu, relu, silu, ..."
        )
    layer = overrides.get("vision_feature_layer")
    # timm's towers don't say how many layers they have. -1 is the last one, -depth - 1 the embeddings.
    depth = getattr(vision, "num_hidden_layers", None)
    if isinstance(layer, int) and depth and not -depth - 1 <= layer <= depth:
        raise ValueError(f"model_overrides: vision_feature_layer is {layer}: choose from {-depth - 1} to {depth}")


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
        "save_strategy best": args.save_strategy == "best",
        "eval_strategy": args.eval_strategy != "no",
        "eval_questions": args.eval_questions is not None,
        "load_best_model_at_end": args.load_best_model_at_end,
        "metric_for_best_model": args.metric_for_best_model is not None,
        "eval_on_start": args.eval_on_start,
    }
    if args.eval_data is None:
        named = [name for name, is_wanted in wanted.items() if is_wanted]
        if named:
            raise ValueError(f"{', '.join(named)}: {NOTHING_TO_EVALUATE}")
        return
    # The names that `OlaVlmTrainer` logs: a wrong one would be missed at the first evaluation, hours from now.
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", "loss/ntp"]
    if args.eval_questions:
        known.append("accuracy")
    for task in tasks:
        for layer in task["layers"]:
            known += [f"loss/{task['name']}/{layer}/{part}" for part in (task["loss"], "contrastive")]
    if metric not in known:
        raise ValueError(f"metric_for_best_model {metric!r} is unknown: choose one of {known}")
