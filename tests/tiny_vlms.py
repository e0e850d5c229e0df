"""Tiny random image-text-to-text models of other families, and their processors, built in code."""

from conftest import make_tokenizer
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
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


FAMILIES = {"qwen2_5_vl": qwen2_5_vl, "idefics3": idefics3, "llava_next": llava_next}
