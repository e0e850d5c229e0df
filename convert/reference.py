"""
The reference implementation's checkpoints (Llama and Phi-3) -> OLA-VLM, and its probes -> ours, by a table of keys:
`ola-vlm convert` (commands/convert.py).

Nothing is guessed: a key of the checkpoint that the table doesn't know, and a weight of ours that no key provides, are
an error that names them. `DROPPED` says what is dropped, and why.
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, TimmWrapperConfig, TimmWrapperModel

from ..commands.running import command, tell
from ..configuration_ola_vlm import KEY_GROUPS
from ..files.escapes import terminal
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..probing.probes import Probes
from ..probing.states import PROMPT
from ..processing_ola_vlm import OlaVlmProcessor, added_ids
from ..recipes.paper import CHAT_TEMPLATES
from ..targets.encoders import load_vision_config
from ..targets.loading import (
    SETTINGS,
    TEXTS,
    check_place,
    loading_from,
    one_line,
    read_bin,
    read_json_object,
    read_safetensors,
    weight_files,
)
from ..training.chat_template import find_chat_template, stop_at_end_of_turn
from ..training.run_record import check_holds_no_model
from .parts import build_config, build_processor, measure_tower, resize_embedding

# The tables whose groups' means are the task tokens.
QUERIES = re.compile(r"model\.special_(gen|depth|seg)_tokens")
# model_type of the reference -> of transformers; "llava_..." is its baseline without tasks.
LANGUAGE_MODELS = {"ola_llama": "llama", "llava_llama": "llama", "ola_phi3": "phi3", "llava_phi3": "phi3"}
# Of transformers -> the conversation that the reference trains it with, and the token that ends a turn there.
CONVERSATIONS = {"llama": ("llama3", "<|eot_id|>"), "phi3": ("phi3", "<|end|>")}
# image_aspect_ratio of the reference -> `build_processor`'s resize_mode. Where nothing is said, it crops.
RESIZE_MODES = {"pad": "pad", "square": "reference", None: "reference"}

# Our names of the checkpoint's parameters. A head of a task is renamed to its predictor before.
PREDICTOR = r"(predictors\.\w+\.\d+\.)"
# The first pattern that matches a whole key counts.
KEYS = {
    r"(lm_head\.weight)": r"\1",
    r"model\.(embed_tokens\.weight|norm\.weight|layers\..+)": r"model.language_model.\1",
    # Its projector is a Sequential of linear (0), GELU (1) and linear (2).
    r"model\.mm_projector\.0\.(weight|bias)": r"model.multi_modal_projector.linear_1.\1",
    r"model\.mm_projector\.2\.(weight|bias)": r"model.multi_modal_projector.linear_2.\1",
    # A CLIP ViT, then timm's ConvNeXt with open_clip's weights.
    r"model\.vision_tower\.vision_tower\.vision_model\.(.+)": r"model.vision_tower.\1",
    r"model\.vision_tower\.vision_tower\.((?:stem|stages|norm_pre|head)\..+)": r"model.vision_tower.timm_model.\1",
    r"model\.special_(gen|depth|seg)_tokens": r"queries.\1",
    r"(gen|depth|seg)_logit_scale": r"logit_scales.\1",
    PREDICTOR + r"projector\.(latents|(?:proj_in|proj_out|norm_out)\.(?:weight|bias))": r"\1\2",
    # In a resampler's layer 0 is the attention and 1 the feed-forward net; norm1 is the tokens', norm2 the queries'.
    PREDICTOR + r"projector\.layers\.(\d+)\.0\.norm1\.(weight|bias)": r"\1layers.\2.norm_tokens.\3",
    PREDICTOR + r"projector\.layers\.(\d+)\.0\.norm2\.(weight|bias)": r"\1layers.\2.norm_queries.\3",
    PREDICTOR + r"projector\.layers\.(\d+)\.0\.(to_q|to_kv|to_out)\.weight": r"\1layers.\2.\3.weight",
    PREDICTOR + r"projector\.layers\.(\d+)\.1\.(\d)\.(weight|bias)": r"\1layers.\2.ffn.\3.\4",
    PREDICTOR + r"linear_1\.(\d)\.(weight|bias)": r"\1output_mlp.\2.\3",
}
TEACHER = "a frozen teacher: it is loaded from its own checkpoint where it is needed"
BUFFER = "a buffer, which is computed"
# Kinds of keys -> why nothing of ours takes them.
DROPPED = {
    r"predictors\.depth\.\d+\.linear_[23]\..+": "a twin of linear_1 that got no gradient; for the depth picture only",
    r"da_v2_head\..+": "the depth teacher's decoder: visualization takes the teacher's own",
    r"(dav2_backbone|oneformer|gen_encoder|pipe)\..+": TEACHER,
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": BUFFER,
    r"model\.vision_tower\.vision_tower\.vision_model\.embeddings\.position_ids": BUFFER,
}
EMBEDDINGS = "model.language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
HEAD = re.compile(r"image_(gen|depth|seg)_heads\.(\d+)\.")
# How many of many keys an error names.
NAMED = 5


def task_key(key: str, layers: dict[str, list[int]]) -> str:
    """The key with a known head's beginning as our predictor's; `layers[task][i]`: the layer of head i."""
    head = HEAD.match(key)
    if head is None:
        return key
    task = head[1]
    number = int(head[2])
    # A head that config.json doesn't name: its key stays, and is reported as unknown.
    if number >= len(layers.get(task, [])):
        return key
    return f"predictors.{task}.{layers[task][number]}.{key[head.end() :]}"


def reason_to_drop(key: str, layers: dict[str, list[int]]) -> str | None:
    """Why a reference parameter is dropped; None if it isn't."""
    name = task_key(key, layers)
    return next((why for pattern, why in DROPPED.items() if re.fullmatch(pattern, name)), None)


def rename_key(key: str, layers: dict[str, list[int]]) -> str | None:
    """Our name of a reference parameter, None if it is dropped, its own if unknown; `layers[task][i]`: of head i."""
    if reason_to_drop(key, layers) is not None:
        return None
    name = task_key(key, layers)
    for pattern, ours in KEYS.items():
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(ours)
    return key


def conversion_report(keys: Iterable[str], layers: dict[str, list[int]], has_predictors: bool = True) -> str:
    """A line for each kind of key (numbers are *): how many, and what became of them."""
    counts = Counter()
    dropped = Counter()
    for key in sorted(keys):
        reason = reason_to_drop(key, layers)
        if reason is not None:
            dropped[key] += 1
            fate = f"dropped: {reason}"
        # Without predictors our model has no query tables: what they say is in the vocabulary's rows.
        elif QUERIES.fullmatch(key) and not has_predictors:
            fate = "its groups' means, the task tokens' rows of the vocabulary"
        else:
            fate = rename_key(key, layers)
        # `rename_key` gives None for dropped keys only.
        assert fate is not None
        # Layers' and heads' numbers become *: a line for each kind, not hundreds.
        counts[re.sub(r"\d+", "*", key), re.sub(r"\d+", "*", fate)] += 1
    lines = [f"{count:>5}  {key}  ->  {fate}" for (key, fate), count in counts.items()]
    teachers = sum(reason_to_drop(key, layers) == TEACHER for key in dropped)
    if teachers:
        lines.append(f"{teachers} of the dropped are the frozen teachers', which were saved inside the checkpoint")
    if not has_predictors:
        lines.append("absent: predictors and logit scales, as in instruction-tuned checkpoints; answers need none")
    converted = sum(counts.values()) - len(dropped)
    made = "made: vocabulary rows of the image token and the task tokens"
    lines.append(f"{converted} converted, {len(dropped)} dropped, 0 missing, 0 unknown; {made}")
    return "\n".join(lines)


def shard_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights, with an index or without. ValueError that names a missing shard."""
    # Files that an index or the usual name gives; else whatever looks like weights.
    files = weight_files(folder) or sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"no *.safetensors and no pytorch_model*.bin in {folder}")
    names = {file.name for file in files}
    for file in files:
        # "pytorch_model-00001-of-00003.bin" without its index: the name says how many there are.
        numbered = re.fullmatch(r"(.+-)(\d+)(-of-)(\d+)(\.\w+)", file.name)
        if numbered is None:
            continue
        stem, digits, of, total, suffix = numbered.groups()
        for number in range(1, int(total) + 1):
            name = f"{stem}{number:0{len(digits)}}{of}{total}{suffix}"
            if name not in names:
                raise ValueError(f"{folder} lacks {name}: fetch the whole checkpoint")
    return files


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, one file or several, safetensors or (`weights_only`) `.bin`."""
    state_dict = {}
    for file in shard_files(folder):
        if file.suffix == ".safetensors":
            of_file = read_safetensors(file)
        else:
            of_file = read_bin(file)
        state_dict.update(of_file)
    if not state_dict:
        raise ValueError(f"{folder} has files of weights with nothing in them: fetch the whole checkpoint")
    return state_dict


def find_checkpoint(reference: str | Path) -> Path:
    """The folder, or what is fetched of a repository. ValueError for what is no whole checkpoint."""
    check_place(reference)
    folder = Path(reference)
    # Of a repository's weights safetensors are fetched; pickles, which are as large, only if there are none.
    if not folder.is_dir():
        files = [*SETTINGS, *TEXTS, "*.safetensors"]
        with loading_from(reference):
            folder = Path(snapshot_download(str(reference), allow_patterns=files))
            if not list(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(str(reference), allow_patterns=[*files, "pytorch_model*.bin*"]))
    # LLaVA's scripts save a LoRA's other weights, the projector's, in non_lora_trainables.bin.
    if any((folder / name).exists() for name in ("adapter_config.json", "non_lora_trainables.bin")):
        what = f"{folder} is a LoRA, which needs its base model"
        raise ValueError(f"{what}: merge both by the reference's own code first, then convert the whole checkpoint")
    # LLaVA's pre-training saves the projector alone.
    if (folder / "mm_projector.bin").exists() and not list(folder.glob("*model*")):
        raise ValueError(f"{folder} holds a projector alone: give a whole checkpoint")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a reference checkpoint")
    return folder


def convert_state_dict(state_dict: dict[str, Tensor], layers: dict[str, list[int]]) -> dict[str, Tensor]:
    """All weights under our names; those that the table doesn't know keep theirs."""
    converted = {}
    for key, value in state_dict.items():
        name = rename_key(key, layers)
        if name is None:
            continue
        # () -> (1,): the reference's are scalars, which FSDP2 can't shard.
        if "logit_scales" in name:
            value = value.reshape(1)
        converted[name] = value
    return converted


def read_task(config: dict, name: str, depth_mlp: bool) -> dict:
    """Our fields of a task from the reference's config; heads are numbered in the order of its `layers`."""
    # Its generation task is "gen" in the group's name (image_gen) and "img" in the fields' (img_layer_indices).
    prefix = name
    if name == "gen":
        prefix = "img"
    fields = config[f"image_{name}"]
    # Without the contrastive term its weight stays in the config, unused.
    contrastive_weight = 0.0
    if config.get("use_contrastive", True):
        contrastive_weight = config["contrastive_loss_weight"]
    # Whether predictors attend to the words after the image.
    sees_text = config.get("pass_text_to_aux", True)
    return {
        "name": name,
        # "18-20": numbers of layers, joined by hyphens.
        "layers": [int(layer) for layer in fields[f"{prefix}_layer_indices"].split("-")],
        "num_task_tokens": config["num_task_tokens"],
        "target_length": fields["num_tokens"],
        "target_dim": fields["output_dim"],
        "loss_weight": fields[f"{prefix}_loss_weight"],
        "contrastive_weight": contrastive_weight,
        "predictor_depth": fields["depth"],
        "predictor_heads": fields["num_heads"],
        "predictor_head_dim": fields["dim_head"],
        "predictor_ffn_mult": fields["ff_mult"],
        "output_mlp": name == "depth" and depth_mlp,
        "attends_to": [group for group in KEY_GROUPS if group != "text" or sees_text],
    }


def find_vision_tower(folder: Path, name: str) -> str:
    """Where the configuration of the tower is that a checkpoint names: beside it, or the name on the Hub."""
    if not name or not isinstance(name, str):
        raise ValueError(f"its config.json names no vision tower, mm_vision_tower is {name!r}: give vision_tower")
    # The config is a stranger's: it may name a folder beside the checkpoint or one on the Hub, no path elsewhere.
    is_name = not Path(name).is_absolute() and ".." not in Path(name).parts
    if is_name and (folder.parent / name).is_dir():
        return str(folder.parent / name)
    # On the Hub these are open_clip's files, which are no tower until they are converted.
    if "convnext" in name.lower():
        raise ValueError(f"{name} is a ConvNeXt: give vision_tower, a folder of `ola-vlm convert-tower`")
    if not is_name:
        raise ValueError(f"its vision tower is {name}, a path of another machine: give vision_tower")
    return name


def read_text_config(fields: dict) -> PreTrainedConfig:
    """The language model's configuration, whose fields the reference keeps among its own."""
    language_model = LANGUAGE_MODELS[fields["model_type"]]
    # Every field of this kind of model; newer versions of transformers have the two of RoPE under another name.
    known = {*AutoConfig.for_model(language_model).to_dict(), "rope_theta", "rope_scaling"}
    # These are of the reference's own class and file, or were the type in which it was saved.
    known -= {"model_type", "architectures", "transformers_version", "torch_dtype", "dtype"}
    return AutoConfig.for_model(language_model, **{name: fields[name] for name in sorted(known & fields.keys())})


def convert_reference(reference: str | Path, vision_tower: str | None = None, tokenizer: str | None = None):
    """
    Model, processor or None without a tokenizer, and what became of each key (`conversion_report`).

    Args:
        reference: folder or repository of a checkpoint. An instruction-tuned one has no heads: the model keeps the
            task tokens, whose rows are the means of their tables, and has no predictors (`config.has_predictors`).
        vision_tower: folder or repository with the tower's config, by default the one that the checkpoint names (a
            name, or a folder beside `reference`); of a ConvNeXt, which it names without one, a folder of
            `ola-vlm convert-tower`.
        tokenizer: folder or repository of the LLM's, by default the checkpoint's own, if it has one. The processor
            asks by the reference's prompt, and makes pictures square in its way.
    Raises ValueError for an architecture that doesn't fit, for files that can't be read, and for weights that are
    missing, unknown or of another shape.
    """
    folder = find_checkpoint(reference)
    fields = read_json_object(folder / "config.json")
    kind = fields.get("model_type")
    # As a list, since a damaged file's may be an object, which no dictionary takes.
    if kind not in list(LANGUAGE_MODELS):
        raise ValueError(f"model_type is {kind!r}: only {list(LANGUAGE_MODELS)} can be converted.")
    with fields_of(folder / "config.json"):
        return _convert(folder, fields, vision_tower, tokenizer)


@contextmanager
def fields_of(file: Path) -> Iterator[None]:
    """Fields are read where they are needed: one that is missing or of another type is said of the file."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{file} has a field of another type: {one_line(error)}") from error
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}, which the reference's checkpoints have") from error


@dataclass
class Tower:
    """What a vision tower's configuration says of the tokens of an image."""

    config: PreTrainedConfig
    # LLaVA's: "default" leaves the class token out.
    strategy: str
    class_tokens: int


def read_tower(name: str) -> Tower:
    config = load_vision_config(name)
    # A ViT of the reference is CLIP's: one class token before the patches.
    if config.model_type != "timm_wrapper":
        return Tower(config=config, strategy="default", class_tokens=1)
    assert isinstance(config, TimmWrapperConfig)
    # Shapes alone are asked for: no weights are made.
    with torch.device("meta"):
        config, class_tokens = measure_tower(TimmWrapperModel(config))
    return Tower(config=config, strategy="full", class_tokens=class_tokens)


@dataclass
class Vocabulary:
    """ids: of the image token and the task tokens; known: of the LLM's own tokens; added: of new rows."""

    processor: OlaVlmProcessor | None
    ids: list[int]
    known: Iterable[int]
    added: list[int]
    num_tokens: int


def conversation_template(kind: str, vocabulary: Mapping[str, int]) -> str | None:
    """The chat template by which the reference asks this kind of language model; None if the tokenizer lacks its
    marks: then its own holds."""
    name, end_of_turn = CONVERSATIONS[kind]
    # Of a Llama before version 3, say.
    if end_of_turn not in vocabulary:
        return None
    return CHAT_TEMPLATES[name]


def read_resize_mode(fields: dict) -> str:
    """How the reference makes a picture square, by our name. ValueError for a way that we don't have."""
    ratio = fields.get("image_aspect_ratio")
    # As a list, since a damaged file's may be an object, which no dictionary takes.
    if ratio not in list(RESIZE_MODES):
        remedy = "set it to one of these"
        raise ValueError(f"its config.json has the image_aspect_ratio {ratio!r}: ours are pad and square, {remedy}")
    return RESIZE_MODES[ratio]


def read_vocabulary(
    folder: Path, tokenizer: str | None, fields: dict, text_config: PreTrainedConfig, tower: Tower, tasks: list[dict]
) -> Vocabulary:
    """The checkpoint's tokenizer, or another one, with our tokens. Without any they come after the LLM's."""
    if tokenizer is None and (folder / "tokenizer_config.json").is_file():
        tokenizer = str(folder)
    if tokenizer is None:
        # Which rows are tokens can't be known without a tokenizer: all are taken for known.
        known = range(text_config.vocab_size)
        # One of it is `<image>`.
        num_tokens = len(known) + 1 + sum(task["num_task_tokens"] for task in tasks)
        ids = list(range(len(known), num_tokens))
        return Vocabulary(processor=None, ids=ids, known=known, added=ids, num_tokens=num_tokens)
    with loading_from(tokenizer, weights=False):
        loaded = AutoTokenizer.from_pretrained(tokenizer, config=text_config, trust_remote_code=False)
    # Before `build_processor` adds our tokens to it.
    vocabulary = loaded.get_vocab()
    # It is asked as it was trained: by the reference's prompt, about a picture that was made square in its way.
    processor = build_processor(
        loaded,
        tower.config,
        tasks,
        chat_template=conversation_template(text_config.model_type, vocabulary),
        class_tokens=tower.class_tokens,
        strategy=tower.strategy,
        resize_mode=read_resize_mode(fields),
    )
    return Vocabulary(
        processor=processor,
        ids=[processor.image_token_id, *processor.task_token_ids],
        known=vocabulary.values(),
        added=added_ids(loaded, vocabulary),
        num_tokens=max(loaded.get_vocab().values()) + 1,
    )


def read_tasks(fields: dict, state_dict: dict[str, Tensor], has_heads: bool) -> list[dict]:
    """None of the reference's plain LLaVA baseline."""
    if "aux_mode" not in fields or not (has_heads or fields.get("num_task_tokens")):
        return []
    # The reference's depth heads end with an MLP (linear_1): whether they do, the weights tell and the config doesn't.
    depth_mlp = any(".linear_1." in key for key in state_dict)
    try:
        return [read_task(fields, name, depth_mlp) for name in fields["aux_mode"].split("-")]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"its config.json describes tasks as the reference never does ({error}): correct it"
        ) from error


def _convert(folder: Path, fields: dict, vision_tower: str | None, tokenizer: str | None):
    tower = read_tower(vision_tower or find_vision_tower(folder, fields["mm_vision_tower"]))
    text_config = read_text_config(fields)
    state_dict = read_weights(folder)
    has_heads = any(HEAD.match(key) for key in state_dict)
    tasks = read_tasks(fields, state_dict, has_heads)
    # Tasks without heads: an instruction-tuned checkpoint. Without tasks there is nothing to lack.
    has_predictors = has_heads or not tasks
    layers = {task["name"]: task["layers"] for task in tasks}
    converted = convert_state_dict(state_dict, layers)
    if has_heads and not fields.get("use_contrastive", True):
        # Ours has logit scales in any case. Nothing uses them where the contrastive weight is 0.
        for task in tasks:
            # 2.0 is what a new model begins with.
            converted[f"logit_scales.{task['name']}"] = torch.full((1,), 2.0)

    # The configuration, and tables with rows for our tokens.
    vocabulary = read_vocabulary(folder, tokenizer, fields, text_config, tower, tasks)
    # A ConvNeXt's last map is taken, whatever layer the reference's configuration says.
    feature_layer = -1
    if tower.class_tokens:
        feature_layer = fields["mm_vision_select_layer"]
    config = build_config(
        text_config,
        tower.config,
        tasks,
        vocabulary.ids,
        vocabulary.num_tokens,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=tower.strategy,
        has_predictors=has_predictors,
    )
    # The checkpoint's own; of a damaged one without embeddings that of any weight, until `check_weights` names it.
    dtype = converted.get(EMBEDDINGS, next(iter(converted.values()))).dtype
    rows = config.text_config.vocab_size
    # (V, H) -> (V', H): rows for `<image>` and the task tokens, and padding.
    for name in (EMBEDDINGS, OUTPUT):
        if name not in converted:
            continue
        if len(converted[name]) != text_config.vocab_size:
            what = f"{len(converted[name])} rows of the vocabulary, its config.json says {text_config.vocab_size}"
            raise ValueError(f"{folder} has {what}: correct vocab_size there, or give a whole checkpoint")
        converted[name] = resize_embedding(converted[name], vocabulary.known, added=vocabulary.added, rows=rows)
    # A tied head is saved once, and our model's state dict has it under both names.
    if config.tie_word_embeddings:
        converted[OUTPUT] = converted[EMBEDDINGS]
    tables = {}
    if not has_predictors:
        # The model has no place for the tables: what they say goes into the task tokens' rows, below.
        tables = take_tables(folder, converted, tasks)

    model = OlaVlmForConditionalGeneration(config).to(dtype)  # pyright: ignore[reportArgumentType] (its stub)
    # By our names and the checkpoint's, so that the error names the keys that its files have.
    check_weights(folder, converted, model.state_dict(), {rename_key(key, layers): key for key in state_dict})
    model.load_state_dict(converted)
    # With predictors from the model's own query tables; without them from those of the checkpoint, below.
    model.write_task_tokens()
    if tables:
        with torch.no_grad():
            task_rows = model.task_token_embeddings(tables)
            cast(Tensor, model.get_input_embeddings().weight)[config.task_token_ids] = task_rows.to(dtype)
    set_end_tokens(model, folder, fields, vocabulary.processor)
    return model.eval(), vocabulary.processor, conversion_report(state_dict, layers, has_predictors)


def check_weights(
    place: str | Path, converted: Mapping[str, Tensor], expected: Mapping[str, Tensor], keys: Mapping[str | None, str]
) -> None:
    """ValueError, one line, for weights that the model has no place for, that are missing, or of another shape.
    `keys`: our names of the checkpoint's keys -> these."""
    unknown = sorted(keys.get(name, name) for name in converted.keys() - expected.keys())
    missing = sorted(expected.keys() - converted.keys())
    shapes = []
    for name in sorted(converted.keys() & expected.keys()):
        if converted[name].shape != expected[name].shape:
            found = f"{tuple(converted[name].shape)} for {tuple(expected[name].shape)}"
            shapes.append(f"{keys.get(name, name)} ({found})")
    # All at once: mended one by one, a checkpoint of many gigabytes would be read for each.
    problems = []
    if unknown:
        problems.append(f"has weights that the table of keys doesn't know ({len(unknown)}): {_listed(unknown)}")
    if missing:
        problems.append(f"lacks weights ({len(missing)}): {_listed(missing)}")
    if shapes:
        problems.append(f"has weights of another shape than its config.json says ({len(shapes)}): {_listed(shapes)}")
    if problems:
        remedy = "give a whole checkpoint as the reference saves it, with nothing in it of other models"
        raise ValueError(f"{place} {'; '.join(problems)}. Nothing was written: {remedy}")


def _listed(names: Sequence[str]) -> str:
    more = ""
    if len(names) > NAMED:
        more = f" and {len(names) - NAMED} more"
    return f"{', '.join(names[:NAMED])}{more}"


def take_tables(place: str | Path, converted: dict[str, Tensor], tasks: list[dict]) -> dict[str, Tensor]:
    """Each task's query table, out of `converted`. ValueError for missing ones."""
    missing = [f"model.special_{task['name']}_tokens" for task in tasks if f"queries.{task['name']}" not in converted]
    if missing:
        raise ValueError(f"{place} lacks the tables of task tokens, {', '.join(missing)}: give a whole checkpoint")
    return {task["name"]: converted.pop(f"queries.{task['name']}") for task in tasks}


def read_end_tokens(file: Path, fields: dict) -> set[int]:
    """Those that a configuration names: one, several or none. ValueError for what is no token."""
    ends = fields.get("eos_token_id")
    if ends is None:
        return set()
    if not isinstance(ends, list):
        ends = [ends]
    if not all(isinstance(end, int) for end in ends):
        what = f"{file} has the eos_token_id {fields['eos_token_id']!r}"
        raise ValueError(f"{what}: it must be a number or a list of numbers")
    return set(ends)


def set_end_tokens(
    model: OlaVlmForConditionalGeneration, folder: Path, fields: dict, processor: OlaVlmProcessor | None
) -> None:
    """Where answers stop: at each token by which any of the checkpoint's files ends a text or a turn."""
    generation = model.generation_config
    # The reference keeps them in config.json; transformers generates by the generation config.
    for field in ["bos_token_id", "pad_token_id"]:
        setattr(generation, field, fields.get(field))
    # config.json's token ends a text, the tokenizer's in Llama-3 a turn of a chat. In Phi-3 both end a text, and the
    # end of a turn is named in generation_config.json alone.
    ends = read_end_tokens(folder / "config.json", fields)
    file = folder / "generation_config.json"
    if file.is_file():
        ends |= read_end_tokens(file, read_json_object(file))
    if processor is not None and processor.tokenizer.eos_token_id is not None:
        ends.add(processor.tokenizer.eos_token_id)
    generation.eos_token_id = sorted(ends)
    # That file may be lacking; but what ends an answer in the chat template is what the model has learned to write.
    if processor is not None:
        # There may be no template, or one that doesn't tell: then the files' own must do.
        with suppress(ValueError):
            stop_at_end_of_turn(model, find_chat_template(processor))
    stops = sorted(generation.eos_token_id)
    # A list is for several; a single one is a number, as most models have it.
    if len(stops) > 1:
        generation.eos_token_id = stops
    else:
        generation.eos_token_id = next(iter(stops), None)


def empty_probes(fields: dict, folder: Path) -> Probes:
    """As a probing run's config.json describes them, without its weights."""
    task = fields["probe_mode"]
    if task not in ("gen", "depth", "seg"):
        raise ValueError(f"probe_mode is {task!r}: only gen, depth and seg are known")
    # States are those of all layers and, as number 0, the embeddings, for which the reference has no head.
    try:
        num_layers = fields["num_hidden_layers"] + 1
        size = fields[f"image_{task}"]
        task = {
            "name": task,
            "target_length": size["num_tokens"],
            "target_dim": size["output_dim"],
            "predictor_heads": size["num_heads"],
            "predictor_head_dim": size["dim_head"],
            "predictor_ffn_mult": size["ff_mult"],
        }
        about = {"prompt": PROMPT, "square": True, "model": folder.name}
        return Probes("resampler", [task], num_layers, fields["hidden_size"], about, first_layer=1)
    except TypeError as error:
        what = f"{folder / 'config.json'} describes probes as the reference never does ({error})"
        raise ValueError(f"{what}: correct it") from error


def convert_probes(reference: str | Path) -> tuple[Probes, str]:
    """The resampler probes of one of its probing runs (`probe_mode` in config.json: one task, a head for every LLM
    layer, the first head for layer 1), and what became of each key. ValueError for missing or unknown ones."""
    folder = find_checkpoint(reference)
    with fields_of(folder / "config.json"):
        probes = empty_probes(read_json_object(folder / "config.json"), folder)
    (task,) = probes.tasks.values()
    # Head i is that of layer i + 1 (`first_layer`).
    layers = {task["name"]: list(probes.layers)}
    state_dict = read_weights(folder)
    heads = {key: value for key, value in state_dict.items() if key.startswith(f"image_{task['name']}_heads.")}
    converted = convert_state_dict(heads, layers)
    # A resampler probe has a predictor's parts. Probes compute in float32.
    weights = {name.removeprefix("predictors."): value.float() for name, value in converted.items()}
    keys: dict[str | None, str] = {}
    for key in heads:
        keys[(rename_key(key, layers) or "").removeprefix("predictors.")] = key
    check_weights(reference, weights, probes.modules.state_dict(), keys)
    probes.modules.load_state_dict(weights)
    # (Q, E) of zeros: the runs don't record their images' mean target, so that only the plain cosine is a score.
    probes.means = {task["name"]: torch.zeros(task["target_length"], task["target_dim"])}
    others = len(state_dict) - len(heads)
    return (
        probes,
        f"{conversion_report(heads, layers)}\n{others} dropped: of the model that was probed, which was frozen",
    )


@command("convert")
def main(args: Namespace) -> None:
    check_holds_no_model(args.out)
    folder = find_checkpoint(args.reference)
    # The reference's probing runs save the whole frozen model with the probes in it.
    if "probe_mode" in read_json_object(folder / "config.json"):
        # A run of the reference has probes of one task, and so has a folder of ours.
        if (Path(args.out) / "probes.safetensors").exists():
            raise ValueError(f"{args.out} has probes already: choose another folder for each")
        probes, report = convert_probes(folder)
        print(terminal(report))
        probes.save(args.out)
        print(f"Wrote probes to {args.out}: for `ola-vlm visualize --probes` and `load_probes`.")
        return
    model, processor, report = convert_reference(folder, args.vision_tower, args.tokenizer)
    print(terminal(report))
    model.save_pretrained(args.out)
    if processor is None:
        print(f"Wrote the model alone to {args.out}: without --tokenizer there is no processor.")
        return
    processor.save_pretrained(args.out)
    print(f"Wrote model and processor to {args.out}.")
    tell(f"Next: ola-vlm chat {args.out} IMAGE, or ola-vlm export {args.out} OUT for serving engines")
