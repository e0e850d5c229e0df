"""The paper's runs (arXiv 2412.09585, section 4): the stages of `llama3_vit`, and what Tables 1 and 2 change in them.

A run is named by its method ("ola_vlm" is not said), language model, base encoder and variant: `llava_phi3_convnext`,
`llama3_convnext_vpt`; a recipe by a run and a stage. The function of a table gives, for each stage that a run does not
share with another one, the recipe that it changes and the changed fields. They need GPUs, LLaVA's data and the real
weights, and have not been run by this project yet; the small local form of each is in `recipes/miniature.py`.
"""

from ..configuration_ola_vlm import default_tasks


def chat_template(first: str, head: str, end: str) -> str:
    """A template that marks answers as `{% generation %}`, which the models' own ones don't.

    `first`: text before a conversation without a system turn of its own; `head`: Jinja expression of a
    turn's head for a `role`; `end`: of a turn.
    """
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
VISION_TOWERS = {  # the second is written by `ola-vlm convert-tower`, see convert/tower.py
    "vit": "openai/clip-vit-large-patch14-336",
    "convnext": "weights/clip_convnext_xxl",
}
LANGUAGE_MODELS = {"llama3": "meta-llama/Meta-Llama-3-8B-Instruct", "phi3": "microsoft/Phi-3-mini-4k-instruct"}
# Name -> encoder, weights and their licence, which is logged when they are loaded; docs/targets.md has their widths.
WEIGHTS = {
    name: {"encoder": encoder, "path": path, "licence": licence}
    for name, encoder, path, licence in [
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
COMMERCIAL_TEACHERS = TEACHERS | {"depth": WEIGHTS["depth_small"]}
COMMERCIAL_TASKS = [task | ({"target_dim": 384} if task["name"] == "depth" else {}) for task in default_tasks()]
FUSIONS = {"feature_concat": "feature", "token_concat": "token"}  # Table 1's multi-encoder LLaVAs
METHODS = {  # -> fields of the pre-training
    "ola_vlm": {"tasks": default_tasks(), "teachers": TEACHERS},
    "commercial": {"tasks": COMMERCIAL_TASKS, "teachers": COMMERCIAL_TEACHERS},
    "llava": {"tasks": [], "teachers": {}},
}
METHODS |= {name: {"tasks": [], "fusion": fusion, "teachers": TEACHERS} for name, fusion in FUSIONS.items()}
# Of the miniature's runs, too; no weight decay is the default.
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "logging_steps": 10, "dataloader_drop_last": True}
TARGETS = {"target_cache": "runs/targets", "target_storage": "bfloat16"}
# How a stage is started on two machines of 8 GPUs with 80 GB each (`benchmarks/plan.py` counts what it takes): where
# the language model trains, its weights, gradients and moments are sharded. docs/scale.md has other configurations.
DDP = "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500"
FSDP2 = (
    "accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_machines 2 --num_processes 16 "
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


Changes = dict[str, tuple[str, dict]]  # stage -> (the recipe that is changed, the fields that are)


def pretrain() -> dict:
    """PT of `llama3_vit`: captions, next-token prediction and the embedding losses; batch 256, lr 1e-3.

    torchrun --nproc_per_node 8 --nnodes 2 ... train.py --recipe llama3_vit_pretrain (`LAUNCHERS`)
    """
    return COMMON | {
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
        "per_device_train_batch_size": 16,
    }


def finetune() -> dict:
    """IFT of `llama3_vit`: LLaVA-665K, next-token prediction, task tokens frozen; batch 128, lr 2e-5.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml ... train.py --recipe llama3_vit_finetune
    """
    return COMMON | {
        "stage": "finetune",
        "output_dir": "runs/llama3_vit/finetune",
        "checkpoint": "runs/llama3_vit/pretrain",
        "data": "data/LLaVA-Instruct/llava_v1_5_mix665k.json",
        "image_folder": "data/LLaVA-Instruct/images",
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "group_by_length",
    }


def table_1(run: str) -> Changes:
    """Table 1: methods, language models and base encoders.

    torchrun ... train.py --recipe RUN_pretrain, then, sharded, accelerate launch ... train.py --recipe RUN_finetune
    (`ola-vlm recipes` has both commands in full).
    On 16 MI300X, estimated (`recipes.show.estimated_hours`): Llama-3 PT 0.7 h to 0.8 h, IFT 1.7 h; Phi-3
    0.4 h to 0.5 h and 0.9 h to 1.0 h.
    `commercial`, not in the paper, has a smaller depth teacher, whose licence allows commercial use. `feature_concat`
    and `token_concat` are LLaVA with the teachers as further encoders; their checkpoints hold the teachers.

    CV-Bench's Count, Depth, Relation and Distance, MMStar, RealWorldQA, OK-VQA, their average:
        llava_phi3_vit              52.4 67.2 75.2 56.3 36.5 57.1 56.7 57.3
        phi3_vit                    52.4 68.7 76.0 56.7 36.0 58.0 56.4 57.7
        llava_phi3_convnext         51.8 70.8 74.0 55.3 36.4 58.0 55.9 57.4
        phi3_convnext               49.4 72.5 77.2 60.3 38.4 58.4 56.5 58.9
        llava_llama3_vit            50.4 73.3 64.9 48.7 38.8 57.8 56.9 55.1
        feature_concat_llama3_vit   45.3 75.5 70.9 54.3 36.1 57.5 58.3 56.8
        token_concat_llama3_vit     45.9 75.7 68.9 52.7 37.8 56.5 59.3 56.7
        llama3_vit                  51.3 74.2 69.4 54.3 39.5 57.9 56.6 57.6
        llava_llama3_convnext       54.1 62.8 69.5 49.8 37.4 57.5 56.3 55.3
        llama3_convnext             57.4 71.5 66.8 52.8 38.5 55.0 59.0 57.3
    """
    *method, llm, encoder = run.split("_")
    if method:
        parent, changes = f"{llm}_{encoder}", METHODS["_".join(method)]
    elif encoder != "vit":
        parent, changes = f"{llm}_vit", {"vision_tower": VISION_TOWERS[encoder]}
    else:
        template = {"chat_template": CHAT_TEMPLATES[llm]}
        parent, changes = "llama3_vit", {"language_model": LANGUAGE_MODELS[llm], "model_overrides": template}
    return {"pretrain": (f"{parent}_pretrain", changes), "finetune": (f"{parent}_finetune", {})}


def table_2(run: str) -> Changes:
    """Table 2: visual pre-training of the whole model between PT and IFT, on ALLaVA-Caption-663K.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml ... train.py --recipe RUN_visual_pretrain, then
    --recipe RUN_finetune in the same way (`ola-vlm recipes` has the command in full); before it the PT of the run
    without `_vpt`. The data are ALLaVA's two files of captions in one: jq -s add A.json B.json
    On 16 MI300X, estimated (`recipes.show.estimated_hours`): Llama-3 VPT 1.8 h, IFT 1.7 h; Phi-3 1.1 h and
    1.0 h.

    CV-Bench's Count, Depth, Relation and Distance, their average:
        llava_phi3_convnext_vpt     49.7 70.0 72.6 58.7 61.8
        phi3_convnext_vpt           53.7 72.0 73.1 58.5 63.4
        llava_llama3_convnext_vpt   56.3 76.8 73.1 50.3 63.3
        llama3_convnext_vpt         60.0 75.0 70.8 55.2 64.6
    """
    parent = f"{run.removesuffix('_vpt')}_finetune"
    data = {"data": "data/ALLaVA/ALLaVA-Caption-663K.json", "image_folder": "data/ALLaVA"}
    return {"visual_pretrain": (parent, {"stage": "visual_pretrain", **data}), "finetune": (parent, {})}
