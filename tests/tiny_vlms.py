"""Tiny random image-text-to-text models of other families, and their processors, built in code."""

import torch
from conftest import make_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "initializer_range": 0.2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
# As most families' templates: no {% generation %} around what the assistant says.
CHAT_TEMPLATE = (
    "{% for message in messages %} {{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} assistant : {% endif %}"
)


def tokenizer_and_template(image: str, *special: str) -> tuple[PreTrainedTokenizerFast, str]:
    """`image`: what the template writes for an image; `special`: more tokens of the vocabulary."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.chat_template = None
    return tokenizer, CHAT_TEMPLATE.replace("IMAGE", image)


def text_config(tokenizer, **fields) -> dict:
    ids = {name: getattr(tokenizer, name) for name in ["bos_token_id", "eos_token_id", "pad_token_id"]}
    return {**TEXT, **ids, "vocab_size": len(tokenizer), **fields}


def qwen2_5_vl():
    """As many tokens as the image has pixels, at its own aspect ratio; rotary positions in three dimensions."""
    marks = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    tokenizer, template = tokenizer_and_template("".join(marks[:3]), *marks)
    start, image, end, video = tokenizer.convert_tokens_to_ids(marks)
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    image_processor = Qwen2VLImageProcessor(size=size, patch_size=8, merge_size=2)
    processor = Qwen2_5_VLProcessor(
        image_processor, tokenizer, Qwen2VLVideoProcessor(patch_size=8), chat_template=template
    )
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 8, "fullatt_block_indexes": [2], "window_size": 32}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2_5_VLConfig(
        text_config=text_config(tokenizer, rope_parameters=rope),
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def idefics3():
    """Tiles, each with tokens before it that name its row and column, and the whole image."""
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles]
    tokenizer, template = tokenizer_and_template("<image>", *marks)
    image_processor = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=template)
    config = Idefics3Config(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        image_token_id=processor.image_token_id,
        scale_factor=2,
        tie_word_embeddings=True,
    )
    return Idefics3ForConditionalGeneration(config), processor


def llava_next():
    """The whole image, then its tiles without their padding, a line break's embedding after each row of patches."""
    tokenizer, template = tokenizer_and_template("<image>", "<image>")
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    side = {"height": 32, "width": 32}
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=pinpoints
    )
    strategy = {"vision_feature_select_strategy": "default"}
    processor = LlavaNextProcessor(
        image_processor, tokenizer, patch_size=8, num_additional_image_tokens=1, chat_template=template, **strategy
    )
    config = LlavaNextConfig(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 32, "patch_size": 8},
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=pinpoints,
        **strategy,
    )
    return LlavaNextForConditionalGeneration(config), processor


def qwen3_vl():
    """As Qwen2.5-VL, with states of earlier layers of the tower that are added behind the LLM's first ones."""
    marks = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    tokenizer, template = tokenizer_and_template("".join(marks[:3]), *marks)
    start, image, end, video = tokenizer.convert_tokens_to_ids(marks)
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    image_processor = Qwen2VLImageProcessor(size=size, patch_size=8, merge_size=2)
    processor = Qwen3VLProcessor(image_processor, tokenizer, Qwen3VLVideoProcessor(), chat_template=template)
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 8, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen3VLConfig(
        text_config=text_config(tokenizer, rope_parameters=rope, head_dim=8),
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def internvl():
    """Tiles and the whole image in one run of tokens."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer, template = tokenizer_and_template("<IMG_CONTEXT>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map, extra_special_tokens=names
    )
    side = {"height": 32, "width": 32}
    image_processor = GotOcr2ImageProcessor(size=side, max_patches=4)
    processor = InternVLProcessor(
        image_processor, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=template
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config), processor


def gemma3():
    """A template's mark that becomes line breaks, tokens of another id, and line breaks, which the tokenizer makes one
    token of with those of the row; image tokens that see each other in both directions; embeddings that the lookup
    scales."""
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer, template = tokenizer_and_template("{{ '\\n' }}<start_of_image>")
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), behavior="isolated"),
            pre_tokenizers.Split(Regex(" +"), behavior="removed"),
        ]
    )
    backend.add_tokens(["\n", "\n\n", "\n\n\n"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **tokenizer.special_tokens_map, extra_special_tokens=names
    )
    image_processor = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = Gemma3Processor(image_processor, tokenizer, image_seq_length=4, chat_template=template)
    config = Gemma3Config(
        text_config=text_config(tokenizer, head_dim=8, sliding_window=64),
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # zero until read
    return model, processor


FAMILIES = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "internvl": internvl,
    "llava_next": llava_next,
}
