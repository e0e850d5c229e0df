"""
The reference implementation's checkpoints (Llama and Phi-3) -> OLA-VLM, and its probes -> ours, by a table of keys:
`ola-vlm convert`.

Nothing is guessed: a key of the checkpoint that the table doesn't know, and a weight of ours that no key provides, are
errors that list them. `DROPPED` says what is dropped, and why.
"""

import argparse
import json
import pickle  # its error alone
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, TimmWrapperModel

from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..probing.probes import Probes
from ..probing.states import PROMPT
from ..targets.encoders import load_vision_config
from .parts import build_config, build_processor, grow_table, measure_tower

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
DROPPED = {
    r"predictors\.depth\.\d+\.linear_[23]\..+": "a twin of linear_1 that got no gradient; for the depth picture only",
    r"da_v2_head\..+": "the depth teacher's decoder: visualisation takes the teacher's own",
}


def rename_key(key: str, layers: dict[str, list[int]]) -> str | None:
    """Our name of a reference parameter, None if it is dropped, its own if unknown; `layers[task][i]`: of head i."""
    name, head = key, re.match(r"image_(gen|depth|seg)_heads\.(\d+)\.", key)
    if head and int(head[2]) < len(layers.get(head[1], [])):
        name = f"predictors.{head[1]}.{layers[head[1]][int(head[2])]}.{key[head.end() :]}"
    for pattern, ours in KEYS.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return None if any(re.fullmatch(pattern, name) for pattern in DROPPED) else key


def fates(keys: Iterable[str], layers: dict[str, list[int]]) -> str:
    """A line for each kind of key (numbers are *): how many, and what became of them."""
    found, dropped, keys = Counter(), 0, sorted(keys)
    for key in keys:
        ours, fate = rename_key(key, layers), ""
        if ours is None:
            dropped += 1
            heads = re.sub(r"image_(\w+?)_heads", r"predictors.\1", key)
            fate = "dropped: " + next(why for pattern, why in DROPPED.items() if re.fullmatch(pattern, heads))
        found[re.sub(r"\d+", "*", key), re.sub(r"\d+", "*", fate or ours)] += 1
    lines = [f"{count:>5}  {key}  ->  {fate}" for (key, fate), count in found.items()]
    made = "made: vocabulary rows of the image token and the task tokens"
    return "\n".join([*lines, f"{len(keys) - dropped} converted, {dropped} dropped, 0 missing, 0 unknown; {made}"])


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, one file or several, safetensors or (`weights_only`) `.bin`."""
    state_dict = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state_dict |= load_file(shard)
    for shard in [] if state_dict else sorted(folder.glob("pytorch_model*.bin")):
        try:
            state_dict |= torch.load(shard, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{shard}: {error}") from error
    if not state_dict:
        raise ValueError(f"no *.safetensors and no pytorch_model*.bin in {folder}")
    return state_dict


def convert_state_dict(state_dict: dict[str, Tensor], layers: dict[str, list[int]]) -> dict[str, Tensor]:
    """All weights under our names; those that the table doesn't know keep theirs."""
    renamed = {rename_key(key, layers): value for key, value in state_dict.items()}
    renamed.pop(None, None)
    return {name: value.reshape(1) if "logit_scales" in name else value for name, value in renamed.items()}


def read_task(config: dict, name: str, depth_mlp: bool) -> dict:
    """Our fields of a task from the reference's config; heads are numbered in the order of its `layers`."""
    prefix, fields = "img" if name == "gen" else name, config[f"image_{name}"]
    return {
        "name": name,
        "layers": [int(layer) for layer in fields[f"{prefix}_layer_indices"].split("-")],
        "num_task_tokens": config["num_task_tokens"],
        "target_length": fields["num_tokens"],
        "target_dim": fields["output_dim"],
        "loss_weight": fields[f"{prefix}_loss_weight"],
        "contrastive_weight": config["contrastive_loss_weight"] if config["use_contrastive"] else 0.0,
        "predictor_depth": fields["depth"],
        "predictor_heads": fields["num_heads"],
        "predictor_head_dim": fields["dim_head"],
        "predictor_ffn_mult": fields["ff_mult"],
        "output_mlp": name == "depth" and depth_mlp,
    }


def convert_reference(reference: str, vision_tower: str | None = None, tokenizer: str | None = None):
    """
    Model, processor or None without a `tokenizer` folder, and what became of each key (`fates`). `vision_tower`:
    folder or repository with the tower's config, by default the one that the checkpoint names (a name, or a folder
    beside `reference`); of a ConvNeXt, which it names without one, a folder of `ola-vlm convert-tower`.
    Raises ValueError for an architecture that doesn't fit, RuntimeError listing missing and unknown weights.
    """
    folder = Path(reference)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a reference checkpoint")
    fields = json.loads((folder / "config.json").read_text())
    if fields["model_type"] not in LANGUAGE_MODELS:
        raise ValueError(f"model_type is {fields['model_type']!r}: only {list(LANGUAGE_MODELS)} can be converted.")
    if vision_tower is None:
        beside = folder.parent / fields["mm_vision_tower"]
        vision_tower = str(beside) if beside.is_dir() else fields["mm_vision_tower"]
        if "convnext" in vision_tower.lower() and not beside.is_dir():
            raise ValueError(f"{vision_tower} is a ConvNeXt: give vision_tower, a folder of `ola-vlm convert-tower`")
    vision_config = load_vision_config(vision_tower)
    tower = {"strategy": "default", "class_tokens": 1}
    if vision_config.model_type == "timm_wrapper":
        with torch.device("meta"):
            vision_config, class_tokens = measure_tower(TimmWrapperModel(vision_config))
        tower = {"strategy": "full", "class_tokens": class_tokens}
    language_model = LANGUAGE_MODELS[fields["model_type"]]
    shared = {*AutoConfig.for_model(language_model).to_dict(), "rope_theta", "rope_scaling"} & fields.keys()
    shared -= {"model_type", "architectures", "transformers_version", "torch_dtype", "dtype"}
    text_config = AutoConfig.for_model(language_model, **{name: fields[name] for name in shared})

    state_dict = read_weights(folder)
    names = fields["aux_mode"].split("-") if "aux_mode" in fields else []  # none: the reference's plain LLaVA baseline
    depth_mlp = any(".linear_1." in key for key in state_dict)
    tasks = [read_task(fields, name, depth_mlp) for name in names]
    layers = {task["name"]: task["layers"] for task in tasks}
    converted = convert_state_dict(state_dict, layers)

    processor, known = None, text_config.vocab_size
    num_tokens = known + 1 + sum(task["num_task_tokens"] for task in tasks)
    ids = list(range(known, num_tokens))
    if tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        known = min(len(tokenizer), known)
        processor = build_processor(tokenizer, vision_config, tasks, **tower)
        ids, num_tokens = [processor.image_token_id, *processor.task_token_ids], len(tokenizer)
    # A ConvNeXt's last map is taken, whatever layer the reference's configuration says.
    features = {"vision_feature_layer": fields["mm_vision_select_layer"] if tower["class_tokens"] else -1}
    features["vision_feature_select_strategy"] = tower["strategy"]
    config = build_config(text_config, vision_config, tasks, ids, num_tokens, **features)
    for name in {"lm_head.weight", "model.language_model.embed_tokens.weight"} & converted.keys():
        converted[name] = grow_table(converted[name], known, num_tokens)
    if config.tie_word_embeddings:
        converted["lm_head.weight"] = converted["model.language_model.embed_tokens.weight"]
    model = OlaVlmForConditionalGeneration(config).to(next(iter(converted.values())).dtype)
    model.load_state_dict(converted)  # an error lists the weights that are missing and those that are unknown
    model.write_task_tokens()
    for field in ["bos_token_id", "eos_token_id", "pad_token_id"]:
        setattr(model.generation_config, field, fields.get(field))
    return model.eval(), processor, fates(state_dict, layers)


def convert_probes(reference: str | Path) -> tuple[Probes, str]:
    """The resampler probes of one of its probing runs (`probe_mode` in config.json: one task, a head for every LLM
    layer, the first head for layer 1), and what became of each key. ValueError for missing or unknown ones."""
    fields = json.loads((Path(reference) / "config.json").read_text(encoding="utf-8"))
    task, count = fields["probe_mode"], fields["num_hidden_layers"]
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
    about = {"prompt": PROMPT, "square": True, "model": Path(reference).name}
    probes = Probes("resampler", [task], count + 1, fields["hidden_size"], about, first_layer=1)
    layers = {task["name"]: list(probes.layers)}
    state_dict = read_weights(Path(reference))
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
    return probes, f"{fates(heads, layers)}\n{others} dropped: of the model that was probed, which was frozen"


def main(argv: list[str] | None = None):
    """`ola-vlm convert REFERENCE_DIR OUT [--vision-tower DIR] [--tokenizer DIR]`."""
    parser = argparse.ArgumentParser(prog="ola-vlm convert", description=__doc__)
    parser.add_argument("reference", metavar="REFERENCE_DIR", help="checkpoint of the reference implementation")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--vision-tower", help="folder or repository with the vision tower's config")
    parser.add_argument("--tokenizer", help="folder or repository with the LLM's tokenizer")
    args = parser.parse_args(argv)
    try:
        config = Path(args.reference) / "config.json"
        if config.is_file() and "probe_mode" in json.loads(config.read_text(encoding="utf-8")):
            probes, became = convert_probes(args.reference)
            probes.save(args.out)
            print(f"{became}\nWrote probes to {args.out}: for `ola-vlm visualize --probes` and `load_probes`.")
            return
        model, processor, became = convert_reference(args.reference, args.vision_tower, args.tokenizer)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"ola-vlm convert: {error}") from error
    print(became)
    model.save_pretrained(args.out)
    if processor is None:
        print(f"Wrote the model alone to {args.out}: without --tokenizer there is no processor.")
    else:
        processor.save_pretrained(args.out)
        print(f"Wrote model and processor to {args.out}.")
