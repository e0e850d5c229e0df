"""The paper's runs (arXiv 2412.09585, section 4 and Table 1), CLIP-ViT-L/14-336 as base encoder.

They need GPUs, LLaVA's data and the real weights, and have not been run by this project yet; the small local form of
each is in `recipes/miniature.py`. Expected: CV-Bench, MMStar, RealWorldQA and OK-VQA average 57.6 (Llama-3) and 57.7
(Phi-3) for OLA-VLM, 55.1 and 57.3 for LLaVA-1.5 (Table 1). The paper used 16 MI300X.
"""

from ..configuration_ola_vlm import default_tasks


def chat_template(first: str, head: str, end: str) -> str:
    """A template that marks answers as `{% generation %}`, which the models' own ones don't.

    `first`: text before the conversation; `head`: Jinja expression of a turn's head for a `role`; `end`: of a turn.
    """
    body = "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    template = (
        "{% macro head(role) %}{{ HEAD }}{% endmacro %}FIRST{% for message in messages %}{{ head(message['role']) }}"
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
LANGUAGE_MODELS = {"llama3": "meta-llama/Meta-Llama-3-8B-Instruct", "phi3": "microsoft/Phi-3-mini-4k-instruct"}
# Name -> encoder, weights and their licence, which is logged when they are loaded; docs/teachers.md has their widths.
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
METHODS = {  # -> tasks and teachers
    "ola_vlm": (default_tasks(), TEACHERS),
    "ola_vlm_commercial": (COMMERCIAL_TASKS, COMMERCIAL_TEACHERS),
    "llava": ([], {}),
    "feature_concat": ([], TEACHERS),
    "token_concat": ([], TEACHERS),
}
FUSIONS = {"feature_concat": "feature", "token_concat": "token"}  # Table 1's multi-encoder LLaVAs
# Of the miniature's runs, too; no weight decay is the default.
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "logging_steps": 10, "dataloader_drop_last": True}
# One epoch each, bf16; batches are for 16 devices.
COMMON = {
    **SCHEDULE,
    "num_train_epochs": 1,
    "bf16": True,
    "activation_checkpointing": True,
    "max_length": 2048,
    "on_long_rows": "truncate",
    "save_steps": 500,
    "save_total_limit": 2,
    "dataloader_num_workers": 4,
}


def pretrain(llm: str, method: str = "ola_vlm") -> dict:
    """PT: captions, next-token prediction and (but for `llava`) the embedding losses; batch 256, lr 1e-3.

    `feature_concat` and `token_concat` are LLaVA with the teachers as further encoders (Table 1: 56.8 and 56.7 with
    Llama-3), without embedding losses; their checkpoints hold the teachers. `ola_vlm_commercial` has a smaller depth
    teacher, whose licence allows commercial use; the paper's doesn't.

    torchrun --nproc_per_node 8 --nnodes 2 train.py --recipe llama3_vit_pretrain
    """
    tasks, teachers = METHODS[method]
    return COMMON | {
        "stage": "pretrain",
        "output_dir": f"runs/{llm}_vit_{method}/pretrain",
        "vision_tower": "openai/clip-vit-large-patch14-336",
        "language_model": LANGUAGE_MODELS[llm],
        "model_overrides": {"chat_template": CHAT_TEMPLATES[llm]},
        "tasks": tasks,
        "fusion": FUSIONS.get(method),
        "teachers": teachers,
        "target_cache": "runs/targets",
        "target_storage": "bfloat16",
        "data": "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "image_folder": "data/LLaVA-Pretrain/images",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
    }


def finetune(llm: str, method: str = "ola_vlm") -> dict:
    """IFT: LLaVA-665K, next-token prediction, task tokens frozen; batch 128, lr 2e-5.

    torchrun --nproc_per_node 8 --nnodes 2 train.py --recipe llama3_vit_finetune
    """
    return COMMON | {
        "stage": "finetune",
        "output_dir": f"runs/{llm}_vit_{method}/finetune",
        "checkpoint": f"runs/{llm}_vit_{method}/pretrain",
        "data": "data/LLaVA-Instruct/llava_v1_5_mix665k.json",
        "image_folder": "data/LLaVA-Instruct/images",
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "group_by_length",
    }
