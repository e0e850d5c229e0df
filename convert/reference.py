"""
The reference implementation's checkpoints (Llama and Phi-3) -> OLA-VLM, by a table of keys: `ola-vlm convert`.

Nothing is guessed: a key of the checkpoint that the table doesn't know, and a weight of ours that no key provides, are
errors that list them. `KEYS` also says what is dropped.
"""

import argparse
import json
import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..targets.encoders import load_vision_config
from .parts import build_config, build_processor, grow_table

LANGUAGE_MODELS = {"ola_llama": "llama", "llava_llama": "llama", "ola_phi3": "phi3", "llava_phi3": "phi3"}

# Our names of the checkpoint's parameters, None for what is dropped: the twins of linear_1, which have no gradient and
# serve the depth picture only, and the teacher's frozen decoder. A head of a task is renamed to its predictor before.
PREDICTOR = r"(predictors\.\w+\.\d+\.)"
KEYS = {
    r"(lm_head\.weight)": r"\1",
    r"model\.(embed_tokens\.weight|norm\.weight|layers\..+)": r"model.language_model.\1",
    r"model\.mm_projector\.0\.(weight|bias)": r"model.multi_modal_projector.linear_1.\1",
    r"model\.mm_projector\.2\.(weight|bias)": r"model.multi_modal_projector.linear_2.\1",
    r"model\.vision_tower\.vision_tower\.vision_model\.(.+)": r"model.vision_tower.\1",
    r"model\.special_(gen|depth|seg)_tokens": r"queries.\1",
    r"(gen|depth|seg)_logit_scale": r"logit_scales.\1",
    PREDICTOR + r"projector\.(latents|(?:proj_in|proj_out|norm_out)\.(?:weight|bias))": r"\1\2",
    PREDICTOR + r"projector\.layers\.(\d+)\.0\.norm1\.(weight|bias)": r"\1layers.\2.norm_tokens.\3",
    PREDICTOR + r"projector\.layers\.(\d+)\.0\.norm2\.(weight|bias)": r"\1layers.\2.norm_queries.\3",
    PREDICTOR + r"projector\.layers\.(\d+)\.0\.(to_q|to_kv|to_out)\.weight": r"\1layers.\2.\3.weight",
    PREDICTOR + r"projector\.layers\.(\d+)\.1\.(\d)\.(weight|bias)": r"\1layers.\2.ffn.\3.\4",
    PREDICTOR + r"linear_1\.(\d)\.(weight|bias)": r"\1output_mlp.\2.\3",
    r"predictors\.depth\.\d+\.linear_[23]\..+": None,
    r"da_v2_head\..+": None,
}


def rename_key(key: str, layers: dict[str, list[int]]) -> str | None:
    """Our name of a reference parameter, None if it is dropped, its own if unknown; `layers[task][i]`: of head i."""
    name, head = key, re.match(r"image_(gen|depth|seg)_heads\.(\d+)\.", key)
    if head and int(head[2]) < len(layers.get(head[1], [])):
        name = f"predictors.{head[1]}.{layers[head[1]][int(head[2])]}.{key[head.end() :]}"
    for pattern, ours in KEYS.items():
        if match := re.fullmatch(pattern, name):
            return ours and match.expand(ours)
    return key


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
    Model, and processor or None without a `tokenizer` folder. `vision_tower`: folder or repository with the tower's
    config, by default the one that the checkpoint names (a name, or a folder beside `reference`).
    Raises ValueError for an architecture that doesn't fit, RuntimeError listing missing and unknown weights.
    """
    folder = Path(reference)
    fields = json.loads((folder / "config.json").read_text())
    if fields["model_type"] not in LANGUAGE_MODELS:
        raise ValueError(f"model_type is {fields['model_type']!r}: only {list(LANGUAGE_MODELS)} can be converted.")
    if vision_tower is None:
        beside = folder.parent / fields["mm_vision_tower"]
        vision_tower = str(beside) if beside.is_dir() else fields["mm_vision_tower"]
    vision_config = load_vision_config(vision_tower)
    language_model = LANGUAGE_MODELS[fields["model_type"]]
    shared = {*AutoConfig.for_model(language_model).to_dict(), "rope_theta", "rope_scaling"} & fields.keys()
    shared -= {"model_type", "architectures", "transformers_version", "torch_dtype", "dtype"}
    text_config = AutoConfig.for_model(language_model, **{name: fields[name] for name in shared})

    state_dict = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state_dict |= load_file(shard)
    if not state_dict:
        raise ValueError(f"no *.safetensors in {folder}: save the checkpoint as safetensors first")
    names = fields["aux_mode"].split("-") if "aux_mode" in fields else []  # none: the reference's plain LLaVA baseline
    depth_mlp = any(".linear_1." in key for key in state_dict)
    tasks = [read_task(fields, name, depth_mlp) for name in names]
    converted = convert_state_dict(state_dict, {task["name"]: task["layers"] for task in tasks})

    processor, known = None, text_config.vocab_size
    num_tokens = known + 1 + sum(task["num_task_tokens"] for task in tasks)
    ids = list(range(known, num_tokens))
    if tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        known = min(len(tokenizer), known)
        processor = build_processor(tokenizer, vision_config, tasks)
        ids, num_tokens = [processor.image_token_id, *processor.task_token_ids], len(tokenizer)
    layer = fields["mm_vision_select_layer"]
    config = build_config(text_config, vision_config, tasks, ids, num_tokens, vision_feature_layer=layer)
    for name in {"lm_head.weight", "model.language_model.embed_tokens.weight"} & converted.keys():
        converted[name] = grow_table(converted[name], known, num_tokens)
    if config.tie_word_embeddings:
        converted["lm_head.weight"] = converted["model.language_model.embed_tokens.weight"]
    model = OlaVlmForConditionalGeneration(config).to(next(iter(converted.values())).dtype)
    model.load_state_dict(converted)  # an error lists the weights that are missing and those that are unknown
    model.write_task_tokens()
    for field in ["bos_token_id", "eos_token_id", "pad_token_id"]:
        setattr(model.generation_config, field, fields.get(field))
    return model.eval(), processor


def main(argv: list[str] | None = None):
    """`ola-vlm convert REFERENCE_DIR OUT [--vision-tower DIR] [--tokenizer DIR]`."""
    parser = argparse.ArgumentParser(prog="ola-vlm convert", description=__doc__)
    parser.add_argument("reference", metavar="REFERENCE_DIR", help="checkpoint of the reference implementation")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--vision-tower", help="folder or repository with the vision tower's config")
    parser.add_argument("--tokenizer", help="folder or repository with the LLM's tokenizer")
    args = parser.parse_args(argv)
    model, processor = convert_reference(args.reference, args.vision_tower, args.tokenizer)
    model.save_pretrained(args.out)
    if processor is None:
        print(f"Wrote the model alone to {args.out}: without --tokenizer there is no processor.")
    else:
        processor.save_pretrained(args.out)
        print(f"Wrote model and processor to {args.out}.")
