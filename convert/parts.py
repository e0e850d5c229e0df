"""Build an OLA-VLM (or, with no tasks, a LLaVA) from a pretrained vision tower, LLM and tokenizer."""

import copy

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaImageProcessor,
    PreTrainedModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..configuration_ola_vlm import OlaVlmConfig, normalize_task, task_token_strings
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..processing_ola_vlm import OlaVlmProcessor

IMAGE_TOKEN = "<image>"


def load_vision_tower(path: str) -> PreTrainedModel:
    """The vision tower in a folder or repository; of a CLIP-like pair of towers, its vision half."""
    config = AutoConfig.from_pretrained(path)
    if "vision_config" in config.sub_configs:
        config = config.vision_config
    return AutoModel.from_pretrained(path, config=config)


def build_processor(tokenizer, image_config, tasks, image_size=None, statistics=None, chat_template=None):
    """
    Processor for a ViT tower with the config `image_config`: pads an image to a square with its mean colour, never
    crops (the teachers see the same square), resizes it to `image_size`. Adds `<image>` and the task tokens to the
    tokenizer. `statistics`: (mean, std) of the tower's pixel values, CLIP's by default.
    """
    image_mean, image_std = statistics or (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    side = {"height": image_size or image_config.image_size, "width": image_size or image_config.image_size}
    image_processor = LlavaImageProcessor(
        do_pad=True, size=side, crop_size=side, do_center_crop=False, image_mean=image_mean, image_std=image_std
    )
    task_tokens = task_token_strings(tasks)
    tokenizer.add_tokens([IMAGE_TOKEN, *task_tokens], special_tokens=True)
    if tokenizer.pad_token is None:  # Llama-3's has none; labels and masks go by position, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return OlaVlmProcessor(
        image_processor,
        tokenizer,
        patch_size=image_config.patch_size,
        vision_feature_select_strategy="default",
        chat_template=chat_template or tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        task_tokens=task_tokens,
    )


def grow_table(weight: Tensor, known: int, total: int) -> Tensor:
    """`weight` with rows `known` to `total` set to the mean of the known ones; padding rows beyond `total` stay."""
    mean = weight[:known].float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight[:known], mean.expand(total - known, -1), weight[total:]])


def build_ola_vlm(
    vision_tower: str | PreTrainedModel,
    language_model: str | PreTrainedModel,
    tokenizer=None,
    tasks: list[dict] = (),
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    **config_overrides,
) -> tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]:
    """
    Model and processor from parts given as objects, folders or repositories (`tokenizer`: the LLM's by default).

    The parts keep their weights; projector, predictors and query tables are new. The rows of `<image>` and of the task
    tokens start as the mean of the known rows; the task tokens' input rows as the means of their query tables.
    `dtype`: the LLM's by default. `config_overrides`: further fields of `OlaVlmConfig`.
    Raises ValueError for tasks that don't fit the LLM (`normalize_task`) and for an LLM head with a bias.
    """
    statistics = None
    if isinstance(vision_tower, str):
        try:
            own = AutoImageProcessor.from_pretrained(vision_tower)
            statistics = (own.image_mean, own.image_std)
        except OSError:  # a tower saved without its processor
            statistics = None
        vision_tower = load_vision_tower(vision_tower)
    if tokenizer is None:
        tokenizer = language_model if isinstance(language_model, str) else language_model.name_or_path
    if isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if isinstance(language_model, str):
        language_model = AutoModelForCausalLM.from_pretrained(language_model)
    head = language_model.get_output_embeddings()
    if head.bias is not None:
        raise ValueError(
            f"The head of {type(language_model).__name__} has a bias, LLaVA's has none: take another LLM."
        )

    text_config, vision_config = copy.deepcopy(language_model.config), copy.deepcopy(vision_tower.config)
    text_config.name_or_path = vision_config.name_or_path = ""  # no paths of this machine in the checkpoint
    tasks = [normalize_task(task, text_config.hidden_size, text_config.num_hidden_layers) for task in tasks]
    tokenizer = copy.deepcopy(tokenizer)  # the caller's doesn't change
    known = min(len(tokenizer), text_config.vocab_size)
    processor = build_processor(tokenizer, vision_config, tasks, image_size, statistics, chat_template)
    side = processor.image_processor.size["height"]
    text_config.vocab_size = max(len(tokenizer), text_config.vocab_size)
    config = OlaVlmConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=processor.image_token_id,
        image_seq_length=(side // vision_config.patch_size) ** 2,
        tie_word_embeddings=text_config.tie_word_embeddings,
        tasks=tasks,
        task_token_ids=processor.task_token_ids,
        **config_overrides,
    )
    model = OlaVlmForConditionalGeneration(config).to(dtype or language_model.dtype)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    embeddings, backbone = language_model.get_input_embeddings().weight, language_model.base_model
    name = next(name for name, parameter in backbone.named_parameters() if parameter is embeddings)
    grown = {name: grow_table(embeddings.data, known, len(tokenizer))}
    model.model.language_model.load_state_dict(backbone.state_dict() | grown)
    if not config.tie_word_embeddings:
        model.lm_head.weight.data.copy_(grow_table(head.weight.data, known, len(tokenizer)))
    model.write_task_tokens()
    for field in ["bos_token_id", "eos_token_id", "pad_token_id"]:
        setattr(model.generation_config, field, getattr(language_model.generation_config, field))
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor
