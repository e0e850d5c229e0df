"""
The reference implementation's checkpoints (Llama and Phi-3) -> OLA-VLM, by a table of keys: `ola-vlm convert`.

Nothing is guessed: a key of the checkpoint that the table doesn't know, and a weight of ours that no key provides, are
errors that list them. What the reference fits to its depth picture only, and its frozen depth decoder, is `DROPPED`.
"""

import argparse
import json
import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from ..configuration_ola_vlm import OlaVlmConfig
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from .parts import build_processor, grow_table

LANGUAGE_MODELS = {"ola_llama": "llama", "llava_llama": "llama", "ola_phi3": "phi3", "llava_phi3": "phi3"}

# task: (its section of the config, its field for the layers there, its field for the loss weight)
TASK_CONFIGS = {
    "gen": ("image_gen", "img_layer_indices", "img_loss_weight"),
    "depth": ("image_depth", "depth_layer_indices", "depth_loss_weight"),
    "seg": ("image_seg", "seg_layer_indices", "seg_loss_weight"),
}

PREDICTOR_KEYS = {
    r"projector\.(latents|(?:proj_in|proj_out|norm_out)\.(?:weight|bias))": r"\1",
    r"projector\.layers\.(\d+)\.0\.norm1\.(weight|bias)": r"layers.\1.norm_tokens.\2",
    r"projector\.layers\.(\d+)\.0\.norm2\.(weight|bias)": r"layers.\1.norm_queries.\2",
    r"projector\.layers\.(\d+)\.0\.(to_q|to_kv|to_out)\.weight": r"layers.\1.\2.weight",
    r"projector\.layers\.(\d+)\.1\.(\d)\.(weight|bias)": r"layers.\1.ffn.\2.\3",
    r"linear_1\.(\d)\.(weight|bias)": r"output_mlp.\1.\2",
}
MODEL_KEYS = {
    r"(lm_head\.weight)": r"\1",
    r"model\.(embed_tokens\.weight|norm\.weight|layers\..+)": r"model.language_model.\1",
    r"model\.mm_projector\.0\.(weight|bias)": r"model.multi_modal_projector.linear_1.\1",
    r"model\.mm_projector\.2\.(weight|bias)": r"model.multi_modal_projector.linear_2.\1",
    r"model\.vision_tower\.vision_tower\.vision_model\.(.+)": r"model.vision_tower.\1",
    r"model\.special_(gen|depth|seg)_tokens": r"queries.\1",
    r"(gen|depth|seg)_logit_scale": r"logit_scales.\1",
}
DROPPED = [
    r"image_depth_heads\.\d+\.linear_[23]\..+",  # twins of linear_1 without a gradient, for the depth picture
    r"da_v2_head\..+",  # the teacher's frozen decoder
]


def rename_key(key: str, layers: dict[str, list[int]]) -> str | None:
    """Our name of a reference parameter, None if `DROPPED`; `layers[task][i]` is the layer of head i. Or KeyError."""
    if any(re.fullmatch(pattern, key) for pattern in DROPPED):
        return None
    head = re.fullmatch(r"image_(gen|depth|seg)_heads\.(\d+)\.(.+)", key)
    table, prefix, rest = MODEL_KEYS, "", key
    if head:
        task, index, rest = head.groups()
        if int(index) >= len(layers.get(task, [])):
            raise KeyError(key)
        table, prefix = PREDICTOR_KEYS, f"predictors.{task}.{layers[task][int(index)]}."
    for pattern, ours in table.items():
        match = re.fullmatch(pattern, rest)
        if match:
            return prefix + match.expand(ours)
    raise KeyError(key)


def convert_state_dict(state_dict: dict[str, Tensor], layers: dict[str, list[int]]) -> dict[str, Tensor]:
    """All weights under our names. Raises ValueError listing the keys that the table doesn't know."""
    converted, unknown = {}, []
    for key, value in state_dict.items():
        try:
            name = rename_key(key, layers)
        except KeyError:
            unknown.append(key)
            continue
        if name is not None:
            converted[name] = value.reshape(1) if name.startswith("logit_scales.") else value
    if unknown:
        raise ValueError(f"{len(unknown)} keys of the checkpoint are unknown: {sorted(unknown)}")
    return converted


def read_tasks(config: dict, depth_mlp: bool) -> list[dict]:
    """Our task list from the reference's config; heads are numbered in the order of each task's `layers`."""
    tasks = []
    if "aux_mode" not in config:  # the reference's plain LLaVA baseline
        return tasks
    for name in config["aux_mode"].split("-"):
        section, layers, loss_weight = TASK_CONFIGS[name]
        fields = config[section]
        tasks.append(
            {
                "name": name,
                "layers": [int(layer) for layer in fields[layers].split("-")],
                "num_task_tokens": config["num_task_tokens"],
                "target_length": fields["num_tokens"],
                "target_dim": fields["output_dim"],
                "loss_weight": fields[loss_weight],
                "contrastive_weight": config["contrastive_loss_weight"] if config["use_contrastive"] else 0.0,
                "predictor_depth": fields["depth"],
                "predictor_heads": fields["num_heads"],
                "predictor_head_dim": fields["dim_head"],
                "predictor_ffn_mult": fields["ff_mult"],
                "output_mlp": name == "depth" and depth_mlp,
            }
        )
    return tasks


def convert_reference(reference: str, vision_tower: str | None = None, tokenizer: str | None = None):
    """
    Model, and processor or None without a `tokenizer` folder. `vision_tower`: folder or repository with the tower's
    config, by default the one that the checkpoint names (a name, or a folder beside `reference`).
    Raises ValueError for an architecture, or keys, that don't fit.
    """
    folder = Path(reference)
    fields = json.loads((folder / "config.json").read_text())
    if fields["model_type"] not in LANGUAGE_MODELS:
        raise ValueError(f"model_type is {fields['model_type']!r}: only {list(LANGUAGE_MODELS)} can be converted.")
    if vision_tower is None:
        beside = folder.parent / fields["mm_vision_tower"]
        vision_tower = str(beside) if beside.is_dir() else fields["mm_vision_tower"]
    vision_config = AutoConfig.from_pretrained(vision_tower)
    if "vision_config" in vision_config.sub_configs:
        vision_config = vision_config.vision_config
    vision_config.name_or_path = ""
    language_model = LANGUAGE_MODELS[fields["model_type"]]
    known = set(AutoConfig.for_model(language_model).to_dict()) | {"rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "transformers_version", "torch_dtype", "dtype"}
    text_config = AutoConfig.for_model(language_model, **{k: v for k, v in fields.items() if k in known})

    state_dict = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state_dict |= load_file(shard)
    if not state_dict:
        raise ValueError(f"no *.safetensors in {folder}: save the checkpoint as safetensors first")
    tasks = read_tasks(fields, any(".linear_1." in key for key in state_dict))
    converted = convert_state_dict(state_dict, {task["name"]: task["layers"] for task in tasks})

    processor, count = None, sum(task["num_task_tokens"] for task in tasks)
    first = text_config.vocab_size  # the first id without an old meaning
    ids = list(range(first, first + 1 + count))
    if tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        first = min(len(tokenizer), first)
        processor = build_processor(tokenizer, vision_config, tasks)
        ids = [processor.image_token_id, *processor.task_token_ids]
    text_config.vocab_size = max(text_config.vocab_size, *(i + 1 for i in ids))
    config = OlaVlmConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=ids[0],
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        vision_feature_layer=fields["mm_vision_select_layer"],
        tie_word_embeddings=text_config.tie_word_embeddings,
        tasks=tasks,
        task_token_ids=ids[1:],
    )
    for name in ["lm_head.weight", "model.language_model.embed_tokens.weight"]:
        if name in converted:
            converted[name] = grow_table(converted[name], first, max(ids) + 1)
    model = OlaVlmForConditionalGeneration(config).to(next(iter(converted.values())).dtype)
    given = set(converted) | ({"lm_head.weight"} if config.tie_word_embeddings else set())
    names = set(model.state_dict())
    missing, unknown = sorted(names - given), sorted(set(converted) - names)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing in the checkpoint: {missing}")
    if unknown:
        raise ValueError(f"{len(unknown)} weights of the checkpoint have no place in ours: {unknown}")
    model.load_state_dict(converted, strict=not config.tie_word_embeddings)
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
