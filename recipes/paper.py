"""The paper's runs (arXiv 2412.09585, section 4): the stages of `llama3_vit`, and what Tables 1 and 2 change in them.

A run is named by its method ("ola_vlm" is not said), language model, base encoder and variant: `llava_phi3_convnext`,
`llama3_convnext_vpt`; a recipe by a run and a stage. They need GPUs, LLaVA's data and the real weights, and have not
been run by this project yet; the small local form of each is in `recipes/miniature.py`.
"""

from .tables import Run, Table

# The paper's three tasks in its token order (section 4.1 and Table III), as in `configuration_ola_vlm.PAPER_TASKS`.
TASKS = {
    "gen": {"name": "gen", "layers": [12, 20], "target_length": 1, "target_dim": 1024},
    "depth": {"name": "depth", "layers": [8, 20], "target_length": 576, "target_dim": 1024, "output_mlp": True},
    "seg": {"name": "seg", "layers": [10, 18], "target_length": 576, "target_dim": 1536},
}


def chat_template(first: str, head: str, end: str) -> str:
    """A template that marks answers as `{% generation %}`, which the models' own ones don't.

    `first`: text before a conversation without a system turn of its own; `head`: Jinja expression of a
    turn's head for a `role`; `end`: of a turn.
    """
    # An image is its token and a line break, as the reference writes it; text stands as it is.
    body = "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    template = (
        "{% macro head(role) %}{{ HEAD }}{% endmacro %}{% if messages[0]['role'] != 'system' %}FIRST{% endif %}"
        "{% for message in messages %}{{ head(message['role']) }}"
        "{% if message['role'] == 'assistant' %}{% generation %}BODY{% endgeneration %}{% else %}BODY{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
    )
    return template.replace("HEAD", head).replace("FIRST", first).replace("BODY", body + "{% endfor %}" + end)


# The reference's conversations (LLaVA's system prompt for Llama-3, Phi-3's own for Phi-3).
CHAT_TEMPLATES = {
    "llama3": chat_template(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nA chat between a curious user and an artificial "
        "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
        "<|eot_id|>",
        "'<|start_header_id|>' + role + '<|end_header_id|>\n\n'",
        "<|eot_id|>",
    ),
    "phi3": chat_template("<|system|>\nYou are a helpful AI assistant.<|end|>", "'\n<|' + role + '|>\n'", "<|end|>"),
}
VISION_TOWERS = {
    "vit": "openai/clip-vit-large-patch14-336",
    # written by `ola-vlm convert-tower`, see convert/tower.py
    "convnext": "weights/clip_convnext_xxl",
}
# Instruction-tuned ones, whose chats the templates above follow.
LANGUAGE_MODELS = {"llama3": "meta-llama/Meta-Llama-3-8B-Instruct", "phi3": "microsoft/Phi-3-mini-4k-instruct"}
# Name -> encoder, weights and their license, which is logged when they are loaded; docs/targets.md has their widths.
WEIGHTS = {
    name: {"encoder": encoder, "path": path, "license": license}
    for name, encoder, path, license in [
        ("depth_small", "depth_anything", "depth-anything/Depth-Anything-V2-Small-hf", "Apache-2.0"),
        ("depth_base", "depth_anything", "depth-anything/Depth-Anything-V2-Base-hf", "CC-BY-NC-4.0"),
        ("depth_large", "depth_anything", "depth-anything/Depth-Anything-V2-Large-hf", "CC-BY-NC-4.0"),
        ("oneformer_coco", "oneformer", "shi-labs/oneformer_coco_swin_large", "MIT"),
        ("unclip", "clip_image", "stabilityai/stable-diffusion-2-1-unclip", "CreativeML Open RAIL++-M"),
        ("siglip", "vision", "google/siglip-so400m-patch14-384", "Apache-2.0"),
        ("dinov2", "vision", "facebook/dinov2-large", "Apache-2.0"),
        ("dinov3", "vision", "facebook/dinov3-vitl16-pretrain-lvd1689m", "DINOv3 License"),
        ("clip", "vision", "openai/clip-vit-large-patch14-336", "MIT"),
    ]
}
WEIGHTS["unclip"]["subfolder"] = "image_encoder"
# The paper's are not for commercial use, because of the depth teacher.
TEACHERS = {"gen": WEIGHTS["unclip"], "depth": WEIGHTS["depth_large"], "seg": WEIGHTS["oneformer_coco"]}
COMMERCIAL_TEACHERS = {**TEACHERS, "depth": WEIGHTS["depth_small"]}
COMMERCIAL_TASKS = [TASKS["gen"], {**TASKS["depth"], "target_dim": 384}, TASKS["seg"]]
# Table 1's multi-encoder LLaVAs -> `fusion`: channels side by side, or tokens one after the other.
FUSIONS = {"feature_concat": "feature", "token_concat": "token"}
# Method -> fields of the pre-training
METHODS = {
    "ola_vlm": {"tasks": list(TASKS.values()), "teachers": TEACHERS},
    "commercial": {"tasks": COMMERCIAL_TASKS, "teachers": COMMERCIAL_TEACHERS},
    "llava": {"tasks": [], "teachers": {}},
}
# Their encoders are the teachers, of which nothing is distilled.
for _name, _fusion in FUSIONS.items():
    METHODS[_name] = {"tasks": [], "fusion": _fusion, "teachers": TEACHERS}
# Of the miniature's runs, too; no weight decay is the default.
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "logging_steps": 10, "dataloader_drop_last": True}
# bfloat16 halves the cache: 576 positions of 1,024 and 1,536 numbers are megabytes an image.
TARGETS = {"target_cache": "runs/targets", "target_storage": "bfloat16"}
# How a stage is started on two machines of 8 GPUs with 80 GB each (`benchmarks/plan.py` counts what it takes): where
# the language model trains, its weights, gradients and moments are sharded. docs/scale.md has other configurations.
DDP = "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500"
FSDP2_CONFIG = "recipes/accelerate/fsdp2.yaml"
FSDP2 = (
    f"accelerate launch --config_file {FSDP2_CONFIG} --num_machines 2 --num_processes 16 "
    "--machine_rank RANK --main_process_ip HOST --main_process_port 29500"
)
LAUNCHERS = {"pretrain": DDP, "finetune": FSDP2, "visual_pretrain": FSDP2}
# One epoch each; batches are for 16 devices. Weights are loaded and saved in bf16; what trains is fp32 meanwhile.
COMMON = {
    **SCHEDULE,
    "num_train_epochs": 1,
    "bf16": True,
    "dtype": "bfloat16",
    "activation_checkpointing": True,
    "max_length": 2048,
    "on_long_rows": "truncate",
    "save_steps": 500,
    "save_total_limit": 2,
    "dataloader_num_workers": 4,
}


def pretrain() -> dict:
    """PT of `llama3_vit`: captions, next-token prediction and the embedding losses; batch 256, lr 1e-3."""
    return {
        **COMMON,
        "stage": "pretrain",
        "output_dir": "runs/llama3_vit/pretrain",
        "vision_tower": VISION_TOWERS["vit"],
        "language_model": LANGUAGE_MODELS["llama3"],
        "model_overrides": {"chat_template": CHAT_TEMPLATES["llama3"]},
        **METHODS["ola_vlm"],
        **TARGETS,
        "data": "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "image_folder": "data/LLaVA-Pretrain/images",
        "learning_rate": 1e-3,
        # 256 rows a step on 16 devices.
        "per_device_train_batch_size": 16,
    }


def finetune() -> dict:
    """IFT of `llama3_vit`: LLaVA-665K, next-token prediction, task tokens frozen; batch 128, lr 2e-5."""
    return {
        **COMMON,
        "stage": "finetune",
        "output_dir": "runs/llama3_vit/finetune",
        "checkpoint": "runs/llama3_vit/pretrain",
        "data": "data/LLaVA-Instruct/llava_v1_5_mix665k.json",
        "image_folder": "data/LLaVA-Instruct/images",
        "learning_rate": 2e-5,
        # 128 rows a step on 16 devices.
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "group_by_length",
    }


def both(**changes) -> dict[str, dict]:
    """A pre-training of its own, and therefore a fine-tuning of its own, which begins there."""
    return {"pretrain": changes, "finetune": {}}


LLAMA3_VIT = "llama3_vit"
PHI3 = {"language_model": LANGUAGE_MODELS["phi3"], "model_overrides": {"chat_template": CHAT_TEMPLATES["phi3"]}}
CONVNEXT = {"vision_tower": VISION_TOWERS["convnext"]}
# Captions, on which tower, projector and language model train.
ALLAVA = {"stage": "visual_pretrain", "data": "data/ALLaVA/ALLaVA-Caption-663K.json", "image_folder": "data/ALLaVA"}
# A stage between the parent's two; fine-tuning then begins at its end instead of at the parent's.
VPT = {"visual_pretrain": ALLAVA, "finetune": {}}

# `commercial`, not in the paper, has a smaller depth teacher, whose license allows commercial use. `feature_concat`
# and `token_concat` are LLaVA with the teachers as further encoders; their checkpoints hold the teachers.
TABLE_1 = Table(
    "Table 1: methods, language models and base encoders.",
    columns="CV-Bench's Count, Depth, Relation and Distance, MMStar, RealWorldQA, OK-VQA, their average",
    runs=[
        Run(
            LLAMA3_VIT,
            None,
            {"pretrain": pretrain(), "finetune": finetune()},
            scores=(51.3, 74.2, 69.4, 54.3, 39.5, 57.9, 56.6, 57.6),
        ),
        Run(
            "phi3_vit",
            LLAMA3_VIT,
            both(**PHI3),
            scores=(52.4, 68.7, 76.0, 56.7, 36.0, 58.0, 56.4, 57.7),
        ),
        Run(
            "llama3_convnext",
            LLAMA3_VIT,
            both(**CONVNEXT),
            scores=(57.4, 71.5, 66.8, 52.8, 38.5, 55.0, 59.0, 57.3),
        ),
        Run(
            "phi3_convnext",
            "phi3_vit",
            both(**CONVNEXT),
            scores=(49.4, 72.5, 77.2, 60.3, 38.4, 58.4, 56.5, 58.9),
        ),
        Run(
            "llava_llama3_vit",
            LLAMA3_VIT,
            both(**METHODS["llava"]),
            scores=(50.4, 73.3, 64.9, 48.7, 38.8, 57.8, 56.9, 55.1),
        ),
        Run(
            "llava_phi3_vit",
            "phi3_vit",
            both(**METHODS["llava"]),
            scores=(52.4, 67.2, 75.2, 56.3, 36.5, 57.1, 56.7, 57.3),
        ),
        Run(
            "llava_llama3_convnext",
            "llama3_convnext",
            both(**METHODS["llava"]),
            scores=(54.1, 62.8, 69.5, 49.8, 37.4, 57.5, 56.3, 55.3),
        ),
        Run(
            "llava_phi3_convnext",
            "phi3_convnext",
            both(**METHODS["llava"]),
            scores=(51.8, 70.8, 74.0, 55.3, 36.4, 58.0, 55.9, 57.4),
        ),
        Run(
            "feature_concat_llama3_vit",
            LLAMA3_VIT,
            both(**METHODS["feature_concat"]),
            scores=(45.3, 75.5, 70.9, 54.3, 36.1, 57.5, 58.3, 56.8),
        ),
        Run(
            "token_concat_llama3_vit",
            LLAMA3_VIT,
            both(**METHODS["token_concat"]),
            scores=(45.9, 75.7, 68.9, 52.7, 37.8, 56.5, 59.3, 56.7),
        ),
        Run("commercial_llama3_vit", LLAMA3_VIT, both(**METHODS["commercial"])),
        Run("commercial_phi3_vit", "phi3_vit", both(**METHODS["commercial"])),
    ],
)

# Before it comes the PT of the run without `_vpt`. The data are ALLaVA's two files of captions in one:
# jq -s add A.json B.json
TABLE_2 = Table(
    "Table 2: visual pre-training of the whole model between PT and IFT, on ALLaVA-Caption-663K.",
    columns="CV-Bench's Count, Depth, Relation and Distance, their average",
    runs=[
        Run("llama3_convnext_vpt", "llama3_convnext", VPT, scores=(60.0, 75.0, 70.8, 55.2, 64.6)),
        Run("phi3_convnext_vpt", "phi3_convnext", VPT, scores=(53.7, 72.0, 73.1, 58.5, 63.4)),
        Run("llava_llama3_convnext_vpt", "llava_llama3_convnext", VPT, scores=(56.3, 76.8, 73.1, 50.3, 63.3)),
        Run("llava_phi3_convnext_vpt", "llava_phi3_convnext", VPT, scores=(49.7, 70.0, 72.6, 58.7, 61.8)),
    ],
)
TABLES = (TABLE_1, TABLE_2)
