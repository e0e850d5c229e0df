"""Build an OLA-VLM (or, with no tasks, a LLaVA) from a pretrained vision tower, LLM and tokenizer."""

import contextlib
import copy
import dataclasses

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..configuration_ola_vlm import OlaVlmConfig, normalize_task, task_token_strings
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..processing_ola_vlm import OlaVlmProcessor
from ..targets.encoders import OF_VISION_TOWER, has_preprocessing, load_vision_config, vision_preprocessing
from ..targets.loading import load_whole
from ..training.chat_template import IMAGE_TOKEN, default_template, fit_chat_template, taking_images


def build_processor(
    tokenizer,
    vision_config,
    tasks,
    statistics=None,
    chat_template=None,
    class_tokens=1,
    strategy="default",
    geometry="pad",
) -> OlaVlmProcessor:
    """
    Processor for a tower (`vision_config`: `measure_tower`'s): pads an image to a square with its mean colour, never
    crops (the teachers see the same square); with `geometry` "reference" it crops the middle square, as the reference
    implementation does. Adds `<image>` and the task tokens to the tokenizer. `statistics`: (mean, std) of the tower's
    pixel values, CLIP's by default. `class_tokens`: of the tower, one of which the `strategy` "default" leaves out.
    `chat_template`: the tokenizer's by default, or what can be trained with in its place (`fit_chat_template`).
    """
    if geometry not in ("pad", "reference"):
        raise ValueError(f'geometry {geometry!r} is unknown: choose "pad" or "reference"')
    mean, std = statistics or (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    side, pad = {"height": vision_config.image_size, "width": vision_config.image_size}, geometry == "pad"
    size = side if pad else {"shortest_edge": vision_config.image_size}
    image_processor = LlavaImageProcessor(
        do_pad=pad, size=size, crop_size=side, do_center_crop=not pad, image_mean=mean, image_std=std
    )
    task_tokens = task_token_strings(tasks)
    tokenizer.add_tokens([IMAGE_TOKEN, *task_tokens], special_tokens=True)
    if tokenizer.pad_token is None:  # Llama-3's has none; labels and masks go by position, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    class_token = {"num_additional_image_tokens": class_tokens, "vision_feature_select_strategy": strategy}
    template = chat_template or default_template(tokenizer.chat_template)
    template = taking_images(template, **tokenizer.special_tokens_map)
    options = {"chat_template": template, "task_tokens": task_tokens, **class_token}
    processor = OlaVlmProcessor(image_processor, tokenizer, patch_size=vision_config.patch_size, **options)
    with contextlib.suppress(ValueError):  # which training raises
        fit_chat_template(processor)
    return processor


def build_config(text_config, vision_config, tasks, token_ids: list[int], num_tokens: int, **fields) -> OlaVlmConfig:
    """`token_ids`: of `<image>` and the task tokens; `num_tokens`: the vocabulary's least size."""
    text_config, vision_config = copy.deepcopy(text_config), copy.deepcopy(vision_config)
    text_config.name_or_path = vision_config.name_or_path = ""  # no paths of this machine in the checkpoint
    text_config.vocab_size = max(num_tokens, text_config.vocab_size)
    return OlaVlmConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=token_ids[0],
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        tie_word_embeddings=text_config.tie_word_embeddings,
        tasks=tasks,
        task_token_ids=token_ids[1:],
        **fields,
    )


def grow_table(weight: Tensor, known: int, total: int) -> Tensor:
    """`weight` with rows `known` to `total` set to the mean of the known ones; padding rows beyond `total` stay."""
    mean = weight[:known].float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight[:known], mean.expand(total - known, -1), weight[total:]])


@torch.no_grad()
def check_logits(language_model: PreTrainedModel):
    """ValueError unless the logits are the head of the backbone's states, which is all that LLaVA computes."""
    training, ids = language_model.training, torch.arange(4, device=language_model.device)[None]
    own = language_model.eval()(input_ids=ids).logits
    states = language_model.base_model(inputs_embeds=language_model.get_input_embeddings()(ids)).last_hidden_state
    language_model.train(training)
    if not language_model.get_output_embeddings()(states).allclose(own, rtol=1e-4, atol=1e-4 * own.abs().max().item()):
        name = type(language_model).__name__
        raise ValueError(f"{name} computes its logits with more than a linear head: take another LLM.")


@torch.no_grad()
def measure_tower(vision_tower: PreTrainedModel) -> tuple[PreTrainedConfig, int]:
    """A tower's configuration, completed by what LLaVA asks for if it is a convolutional one of timm, and its tokens
    beyond its patches: CLIP's has one, SigLIP's none. ValueError for other layouts."""
    config, name = copy.deepcopy(vision_tower.config), type(vision_tower).__name__
    is_timm = config.model_type == "timm_wrapper"
    if is_timm:
        config.image_size, name = config.pretrained_cfg["input_size"][-1], f"timm's {config.architecture}"
    side = config.image_size
    if not isinstance(side, int):
        raise ValueError(f"{name} has an image_size of {side}, not one number: take another vision tower")
    blank = torch.zeros(1, 3, side, side, dtype=vision_tower.dtype, device=vision_tower.device)
    features = vision_tower(blank).last_hidden_state
    if is_timm != (features.ndim == 4):
        shape = tuple(features.shape)
        raise ValueError(f"{name} gives features {shape}: take a convolutional net of timm, or a ViT of transformers")
    if is_timm:
        config.hidden_size, config.patch_size = features.shape[1], side // features.shape[-1]
        return config, 0
    return config, features.shape[1] - (side // config.patch_size) ** 2


def build_ola_vlm(
    vision_tower: str | PreTrainedModel,
    language_model: str | PreTrainedModel,
    tokenizer=None,
    tasks: list[dict] = (),
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    geometry: str = "pad",
    **config_overrides,
) -> tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]:
    """
    Model and processor from parts given as objects, folders or repositories (`tokenizer`: the LLM's by default).

    The parts keep their weights; projector, predictors and query tables are new. The rows of `<image>` and of the task
    tokens start as the mean of the known rows; the task tokens' input rows as the means of their query tables.
    `dtype`: the LLM's by default. `geometry`: `build_processor`'s. `config_overrides`: more fields of `OlaVlmConfig`.
    Raises ValueError for tasks that don't fit the LLM (`normalize_task`), for checkpoints that lack weights, for
    towers of another layout (`measure_tower`) and for an LLM whose logits LLaVA can't give.
    """
    if unknown := config_overrides.keys() - {field.name for field in dataclasses.fields(OlaVlmConfig)}:
        raise ValueError(f"config_overrides has {sorted(unknown)}: no fields of OlaVlmConfig")
    statistics = None
    if isinstance(vision_tower, str):
        vision_config = load_vision_config(vision_tower)
        if has_preprocessing(vision_tower, vision_config):
            _, *statistics = vision_preprocessing(vision_tower, vision_config)
        options = {"config": vision_config, "key_mapping": OF_VISION_TOWER, "unused": ["pooler."]}
        vision_tower = load_whole(AutoModel, vision_tower, trust_remote_code=False, **options)
    if isinstance(language_model, str):
        language_model = load_whole(AutoModelForCausalLM, language_model, trust_remote_code=False)
    if tokenizer is None or isinstance(tokenizer, str):
        words = tokenizer or language_model.name_or_path
        tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
    text_config, head = language_model.config, language_model.get_output_embeddings()
    if head.bias is not None:
        raise ValueError(f"{type(language_model).__name__}'s head has a bias, LLaVA's has none: take another LLM.")
    embeddings, backbone = language_model.get_input_embeddings(), language_model.base_model
    name = next(name for name, parameter in backbone.named_parameters() if parameter is embeddings.weight)
    if text_config.tie_word_embeddings and name != "embed_tokens.weight":
        raise ValueError(f"{type(language_model).__name__} ties its head to {name}, LLaVA can't: take another LLM.")
    check_logits(language_model)

    tasks = [normalize_task(task, text_config.hidden_size, text_config.num_hidden_layers) for task in tasks]
    tokenizer = copy.deepcopy(tokenizer)  # the caller's doesn't change
    known = min(len(tokenizer), text_config.vocab_size)
    vision_config, class_tokens = measure_tower(vision_tower)
    config_overrides.setdefault("vision_feature_select_strategy", "default" if class_tokens else "full")
    if vision_config.model_type == "timm_wrapper":  # whose other stages have other widths and grids
        config_overrides.setdefault("vision_feature_layer", -1)
    options = statistics, chat_template, class_tokens, config_overrides["vision_feature_select_strategy"], geometry
    processor = build_processor(tokenizer, vision_config, tasks, *options)
    ids = [processor.image_token_id, *processor.task_token_ids]
    config = build_config(text_config, vision_config, tasks, ids, len(tokenizer), **config_overrides)
    model = OlaVlmForConditionalGeneration(config).to(dtype or language_model.dtype)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    grown = {name: grow_table(embeddings.weight.data, known, len(tokenizer))}
    model.model.language_model.load_state_dict(backbone.state_dict() | grown)
    if not config.tie_word_embeddings:
        model.lm_head.weight.data.copy_(grow_table(head.weight.data, known, len(tokenizer)))
    model.write_task_tokens()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for field in ["bos_token_id", "eos_token_id"]:
        setattr(model.generation_config, field, getattr(language_model.generation_config, field))
    return model.eval(), processor
