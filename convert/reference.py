"""
The reference implementation's checkpoints (Llama and Phi-3) -> OLA-VLM, and its probes -> ours, by a table of keys:
`ola-vlm convert` (commands/convert.py).

Nothing is guessed: a key of the checkpoint that the table doesn't know, and a weight of ours that no key provides, are
errors that list them. `DROPPED` says what is dropped, and why.
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, TimmWrapperConfig, TimmWrapperModel

from ..commands.running import command, tell
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..probing.probes import Probes
from ..probing.states import PROMPT
from ..processing_ola_vlm import OlaVlmProcessor, added_ids
from ..targets.encoders import load_vision_config
from ..targets.escapes import terminal
from ..targets.loading import (
    SETTINGS,
    TEXTS,
    check_place,
    loading_from,
    read_bin,
    read_json_object,
    read_safetensors,
    weight_files,
)
from .parts import build_config, build_processor, measure_tower, resize_embedding

QUERIES = re.compile(r"model\.special_(gen|depth|seg)_tokens")
LANGUAGE_MODELS = {"ola_llama": "llama", "llava_llama": "llama", "ola_phi3": "phi3", "llava_phi3": "phi3"}

# Our names of the checkpoint's parameters. A head of a task is renamed to its predictor before.
PREDICTOR = r"(predictors\.\w+\.\d+\.)"
KEYS = {
    r"(lm_head\.weight)": r"\1",
    r"model\.(embed_tokens\.weight|norm\.weight|layers\..+)": r"model.language_model.\1",
    r"model\.mm_projector\.0\.(weight|bias)": r"model.multi_modal_projector.linear_1.\1",
    r"model\.mm_projector\.2\.(weight|bias)": r"model.multi_modal_projector.linear_2.\1",
    r"model\.vision_tower\.vision_tower\.vision_model\.(.+)": r"model.vision_tower.\1",
    r"model\.vision_tower\.vision_tower\.((?:stem|stages|norm_pre|head)\..+)": r"model.vision_tower.timm_model.\1",
    r"model\.special_(gen|depth|seg)_tokens": r"queries.\1",
    r"(gen|depth|seg)_logit_scale": r"logit_scales.\1",
    PREDICTOR + r"projector\.(latents|(?:proj_in|proj_out|norm_out)\.(?:weight|bias))": r"\1\2",
    PREDICTOR + r"projector\.layers\.(\d+)\.0\.norm1\.(weight|bias)": r"\1layers.\2.norm_tokens.\3",
    PREDICTOR + r"projector\.layers\.(\d+)\.0\.norm2\.(weight|bias)": r"\1layers.\2.norm_queries.\3",
    PREDICTOR + r"projector\.layers\.(\d+)\.0\.(to_q|to_kv|to_out)\.weight": r"\1layers.\2.\3.weight",
    PREDICTOR + r"projector\.layers\.(\d+)\.1\.(\d)\.(weight|bias)": r"\1layers.\2.ffn.\3.\4",
    PREDICTOR + r"linear_1\.(\d)\.(weight|bias)": r"\1output_mlp.\2.\3",
}
TEACHER = "a frozen teacher: it is loaded from its own checkpoint where it is needed"
BUFFER = "a buffer, which is computed"
DROPPED = {
    r"predictors\.depth\.\d+\.linear_[23]\..+": "a twin of linear_1 that got no gradient; for the depth picture only",
    r"da_v2_head\..+": "the depth teacher's decoder: visualization takes the teacher's own",
    r"(dav2_backbone|oneformer|gen_encoder)\..+": TEACHER,
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": BUFFER,
    r"model\.vision_tower\.vision_tower\.vision_model\.embeddings\.position_ids": BUFFER,
}
EMBEDDINGS = "model.language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
HEAD = re.compile(r"image_(gen|depth|seg)_heads\.(\d+)\.")


def task_key(key: str, layers: dict[str, list[int]]) -> str:
    """The key with a known head's beginning as our predictor's; `layers[task][i]`: the layer of head i."""
    head = HEAD.match(key)
    if head is None:
        return key
    task, number = head[1], int(head[2])
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
        elif QUERIES.fullmatch(key) and not has_predictors:
            fate = "its groups' means, the task tokens' rows of the vocabulary"
        else:
            fate = rename_key(key, layers)
        assert fate is not None  # such a key is dropped
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
    files = weight_files(folder) or sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"no *.safetensors and no pytorch_model*.bin in {folder}")
    names = {file.name for file in files}
    for file in files:
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
        read = read_safetensors if file.suffix == ".safetensors" else read_bin
        state_dict.update(read(file))
    return state_dict


def find_checkpoint(reference: str | Path) -> Path:
    """The folder, or what is fetched of a repository. ValueError for what is no whole checkpoint."""
    check_place(reference)
    folder = Path(reference)
    if not folder.is_dir():
        files = [*SETTINGS, *TEXTS, "*.safetensors"]
        with loading_from(reference):
            folder = Path(snapshot_download(str(reference), allow_patterns=files))
            if not list(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(str(reference), allow_patterns=[*files, "pytorch_model*.bin*"]))
    if any((folder / name).exists() for name in ("adapter_config.json", "non_lora_trainables.bin")):
        what = f"{folder} is a LoRA, which needs its base model"
        raise ValueError(f"{what}: merge both by the reference's own code first, then convert the whole checkpoint")
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
        converted[name] = value.reshape(1) if "logit_scales" in name else value
    return converted


def read_task(config: dict, name: str, depth_mlp: bool) -> dict:
    """Our fields of a task from the reference's config; heads are numbered in the order of its `layers`."""
    prefix = "img" if name == "gen" else name
    fields = config[f"image_{name}"]
    contrastive = config.get("use_contrastive", True)
    return {
        "name": name,
        "layers": [int(layer) for layer in fields[f"{prefix}_layer_indices"].split("-")],
        "num_task_tokens": config["num_task_tokens"],
        "target_length": fields["num_tokens"],
        "target_dim": fields["output_dim"],
        "loss_weight": fields[f"{prefix}_loss_weight"],
        "contrastive_weight": config["contrastive_loss_weight"] if contrastive else 0.0,
        "predictor_depth": fields["depth"],
        "predictor_heads": fields["num_heads"],
        "predictor_head_dim": fields["dim_head"],
        "predictor_ffn_mult": fields["ff_mult"],
        "output_mlp": name == "depth" and depth_mlp,
    }


def find_vision_tower(folder: Path, name: str) -> str:
    """Where the configuration of the tower is that a checkpoint names: beside it, or the name on the Hub."""
    is_name = not Path(name).is_absolute() and ".." not in Path(name).parts
    if is_name and (folder.parent / name).is_dir():
        return str(folder.parent / name)
    if "convnext" in name.lower():
        raise ValueError(f"{name} is a ConvNeXt: give vision_tower, a folder of `ola-vlm convert-tower`")
    if not is_name:
        raise ValueError(f"its vision tower is {name}, a path of another machine: give vision_tower")
    return name


def read_text_config(fields: dict) -> PreTrainedConfig:
    """The language model's configuration, whose fields the reference keeps among its own."""
    language_model = LANGUAGE_MODELS[fields["model_type"]]
    known = {*AutoConfig.for_model(language_model).to_dict(), "rope_theta", "rope_scaling"}
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
        tokenizer: folder or repository of the LLM's, by default the checkpoint's own, if it has one.
    Raises ValueError for an architecture that doesn't fit and for files that can't be read, RuntimeError listing
    missing and unknown weights.
    """
    folder = find_checkpoint(reference)
    fields = read_json_object(folder / "config.json")
    if fields.get("model_type") not in LANGUAGE_MODELS:
        kind = fields.get("model_type")
        raise ValueError(f"model_type is {kind!r}: only {list(LANGUAGE_MODELS)} can be converted.")
    try:
        return _convert(folder, fields, vision_tower, tokenizer)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error}, which the reference's checkpoints have") from error


@dataclass
class Tower:
    """What a vision tower's configuration says of the tokens of an image."""

    config: PreTrainedConfig
    strategy: str  # LLaVA's: "default" leaves the class token out
    class_tokens: int


def read_tower(name: str) -> Tower:
    config = load_vision_config(name)
    if config.model_type != "timm_wrapper":
        return Tower(config=config, strategy="default", class_tokens=1)
    assert isinstance(config, TimmWrapperConfig)
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


def read_vocabulary(
    folder: Path, tokenizer: str | None, text_config: PreTrainedConfig, tower: Tower, tasks: list[dict]
) -> Vocabulary:
    """The checkpoint's tokenizer, or another one, with our tokens. Without any they come after the LLM's."""
    if tokenizer is None and (folder / "tokenizer_config.json").is_file():
        tokenizer = str(folder)
    if tokenizer is None:
        known = range(text_config.vocab_size)
        num_tokens = len(known) + 1 + sum(task["num_task_tokens"] for task in tasks)
        ids = list(range(len(known), num_tokens))
        return Vocabulary(processor=None, ids=ids, known=known, added=ids, num_tokens=num_tokens)
    with loading_from(tokenizer, weights=False):
        loaded = AutoTokenizer.from_pretrained(tokenizer, config=text_config, trust_remote_code=False)
    vocabulary = loaded.get_vocab()
    processor = build_processor(loaded, tower.config, tasks, strategy=tower.strategy, class_tokens=tower.class_tokens)
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
    depth_mlp = any(".linear_1." in key for key in state_dict)
    return [read_task(fields, name, depth_mlp) for name in fields["aux_mode"].split("-")]


def _convert(folder: Path, fields: dict, vision_tower: str | None, tokenizer: str | None):
    tower = read_tower(vision_tower or find_vision_tower(folder, fields["mm_vision_tower"]))
    text_config = read_text_config(fields)
    state_dict = read_weights(folder)
    has_heads = any(HEAD.match(key) for key in state_dict)
    tasks = read_tasks(fields, state_dict, has_heads)
    has_predictors = has_heads or not tasks
    layers = {task["name"]: task["layers"] for task in tasks}
    converted = convert_state_dict(state_dict, layers)
    if has_heads and not fields.get("use_contrastive", True):
        # Ours always has the scales, which nothing then uses.
        for task in tasks:
            converted[f"logit_scales.{task['name']}"] = torch.full((1,), 2.0)

    vocabulary = read_vocabulary(folder, tokenizer, text_config, tower, tasks)
    config = build_config(
        text_config,
        tower.config,
        tasks,
        vocabulary.ids,
        vocabulary.num_tokens,
        # A ConvNeXt's last map is taken, whatever layer the reference's configuration says.
        vision_feature_layer=fields["mm_vision_select_layer"] if tower.class_tokens else -1,
        vision_feature_select_strategy=tower.strategy,
        has_predictors=has_predictors,
    )
    dtype = converted.get(EMBEDDINGS, next(iter(converted.values()))).dtype
    rows = config.text_config.vocab_size
    for name in (EMBEDDINGS, OUTPUT):
        if name in converted:
            converted[name] = resize_embedding(converted[name], vocabulary.known, added=vocabulary.added, rows=rows)
    if config.tie_word_embeddings:
        converted[OUTPUT] = converted[EMBEDDINGS]
    tables = {}
    if not has_predictors:
        # The tables have no other place than the rows that are made of them.
        tables = take_tables(converted, tasks)

    model = OlaVlmForConditionalGeneration(config).to(dtype)  # pyright: ignore[reportArgumentType]
    model.load_state_dict(converted)  # an error lists the weights that are missing and those that are unknown
    model.write_task_tokens()
    if tables:
        with torch.no_grad():
            task_rows = model.task_token_embeddings(tables)
            cast(Tensor, model.get_input_embeddings().weight)[config.task_token_ids] = task_rows.to(dtype)
    set_end_tokens(model, fields, vocabulary.processor)
    return model.eval(), vocabulary.processor, conversion_report(state_dict, layers, has_predictors)


def take_tables(converted: dict[str, Tensor], tasks: list[dict]) -> dict[str, Tensor]:
    """Each task's query table, out of `converted`. RuntimeError for missing ones."""
    missing = [task["name"] for task in tasks if f"queries.{task['name']}" not in converted]
    if missing:
        raise RuntimeError(f"Missing key(s): the tables of task tokens of {', '.join(missing)}")
    return {task["name"]: converted.pop(f"queries.{task['name']}") for task in tasks}


def set_end_tokens(model: OlaVlmForConditionalGeneration, fields: dict, processor: OlaVlmProcessor | None) -> None:
    for field in ["bos_token_id", "eos_token_id", "pad_token_id"]:
        setattr(model.generation_config, field, fields.get(field))
    if processor is None or processor.tokenizer.eos_token_id is None:
        return
    # Llama-3's chats end with another token than its texts.
    given = fields.get("eos_token_id")
    ends = {end for end in (given if isinstance(given, list) else [given]) if end is not None}
    ends.add(processor.tokenizer.eos_token_id)
    model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else ends.pop()


def convert_probes(reference: str | Path) -> tuple[Probes, str]:
    """The resampler probes of one of its probing runs (`probe_mode` in config.json: one task, a head for every LLM
    layer, the first head for layer 1), and what became of each key. ValueError for missing or unknown ones."""
    folder = find_checkpoint(reference)
    fields = read_json_object(folder / "config.json")
    task = fields["probe_mode"]
    num_layers = fields["num_hidden_layers"] + 1
    if task not in ("gen", "depth", "seg"):
        raise ValueError(f"probe_mode is {task!r}: only gen, depth and seg are known")
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
    probes = Probes("resampler", [task], num_layers, fields["hidden_size"], about, first_layer=1)
    layers = {task["name"]: list(probes.layers)}
    state_dict = read_weights(folder)
    heads = {key: value for key, value in state_dict.items() if key.startswith(f"image_{task['name']}_heads.")}
    converted = convert_state_dict(heads, layers)
    try:
        weights = {name.removeprefix("predictors."): value.float() for name, value in converted.items()}
        probes.modules.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{reference}: {error}") from error
    # The runs don't record their images' mean target; without it only the plain cosine is a score.
    probes.means = {task["name"]: torch.zeros(task["target_length"], task["target_dim"])}
    others = len(state_dict) - len(heads)
    return (
        probes,
        f"{conversion_report(heads, layers)}\n{others} dropped: of the model that was probed, which was frozen",
    )


@command("convert")
def main(args: Namespace) -> None:
    folder = find_checkpoint(args.reference)
    try:
        if "probe_mode" in read_json_object(folder / "config.json"):
            probes, report = convert_probes(folder)
            print(terminal(report))
            probes.save(args.out)
            print(f"Wrote probes to {args.out}: for `ola-vlm visualize --probes` and `load_probes`.")
            return
        model, processor, report = convert_reference(folder, args.vision_tower, args.tokenizer)
    except RuntimeError as error:  # keys that are missing or unknown
        raise ValueError(error) from error
    print(terminal(report))
    model.save_pretrained(args.out)
    if processor is None:
        print(f"Wrote the model alone to {args.out}: without --tokenizer there is no processor.")
        return
    processor.save_pretrained(args.out)
    print(f"Wrote model and processor to {args.out}.")
    tell(f"Next: ola-vlm chat {args.out} IMAGE, or ola-vlm export {args.out} OUT for serving engines")
