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
TEACHERS = {
    # The folder image_encoder of stabilityai/stable-diffusion-2-1-unclip, with its feature_extractor's configuration.
    "gen": {"encoder": "clip_image", "path": "models/stable-diffusion-2-1-unclip/image_encoder"},
    "depth": {"encoder": "depth_anything", "path": "depth-anything/Depth-Anything-V2-Large-hf"},
    "seg": {"encoder": "oneformer", "path": "shi-labs/oneformer_coco_swin_large"},
}
# Of the miniature's runs, too; no weight decay is the default.
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "logging_steps": 10, "dataloader_drop_last": True}
# One epoch each, bf16; batches are for 16 devices.
COMMON = {
    **SCHEDULE,
    "num_train_epochs": 1,
    "bf16": True,
    "activation_checkpointing": True,
    "max_length": 2048,
    "save_steps": 500,
    "save_total_limit": 2,
    "dataloader_num_workers": 4,
}


def pretrain(llm: str, method: str = "ola_vlm") -> dict:
    """PT: captions, next-token prediction and (`ola_vlm`) the embedding losses; batch 256, lr 1e-3.

    torchrun --nproc_per_node 8 --nnodes 2 train.py --recipe llama3_vit_pretrain
    """
    return COMMON | {
        "stage": "pretrain",
        "output_dir": f"runs/{llm}_vit_{method}/pretrain",
        "vision_tower": "openai/clip-vit-large-patch14-336",
        "language_model": LANGUAGE_MODELS[llm],
        "model_overrides": {"chat_template": CHAT_TEMPLATES[llm]},
        "tasks": default_tasks() if method == "ola_vlm" else [],
        "teachers": TEACHERS,
        "target_cache": "runs/targets",
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
