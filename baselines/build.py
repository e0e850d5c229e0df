"""A multi-encoder LLaVA from a plain LLaVA and target encoders; checkpoints told apart."""

from collections.abc import Sequence
from typing import cast

import torch
from transformers import PreTrainedModel

from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..processing_ola_vlm import OlaVlmProcessor
from ..targets.encoders import (
    ENCODERS,
    ClipImageEncoder,
    DepthAnythingEncoder,
    OneFormerEncoder,
    TargetEncoder,
    current_names,
)
from ..targets.weights import assemble
from .configuration_multi_encoder import MultiEncoderLlavaConfig
from .modeling_multi_encoder import MultiEncoderLlavaForConditionalGeneration
from .processing_multi_encoder import MultiEncoderLlavaProcessor

# Fields of an OLA-VLM's configuration that the baseline's hasn't, or has values of its own for.
OURS = {"model_type", "tasks", "task_token_ids", "has_predictors", "auto_map", "architectures", "transformers_version"}
# What the baseline keeps of an encoder's preprocessing.
VIEW_FIELDS = ("do_pad", "do_center_crop", "size", "image_mean", "image_std")
FIRST_LAYER = "model.multi_modal_projector.linear_1.weight"


def multi_encoder_processor(
    processor: OlaVlmProcessor, num_image_tokens: int, views: Sequence[dict] = ()
) -> MultiEncoderLlavaProcessor:
    return MultiEncoderLlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_image_tokens=num_image_tokens,
        views=views,
    )


def load_encoders(entries: dict[str, dict], length: int) -> dict[str, TargetEncoder]:
    """The teachers of a recipe, for a base grid of `length` positions, in the recipe's order."""
    encoders = {}
    for name, entry in entries.items():
        options = current_names(entry)
        kind = options.pop("encoder", None)
        path = options.pop("path", None)
        # `check_run` says the same before; a program may come here without it.
        if kind not in ENCODERS or path is None:
            raise ValueError(f"teachers[{name!r}] is {entry}: give its path, and as encoder one of {list(ENCODERS)}")
        # At the base grid's resolution, so that positions of all encoders are the same places of the image.
        encoders[name] = ENCODERS[kind].from_pretrained(path, grid=round(length**0.5), **options)
    return encoders


def trunk(encoder: TargetEncoder) -> tuple[PreTrainedModel, str]:
    """The part of a teacher that its features are computed with, and which of its outputs they are."""
    match encoder:
        case ClipImageEncoder():
            # One embedding of the whole image.
            return encoder.model, "embedding"
        case DepthAnythingEncoder():
            # Without the head that estimates depth.
            return cast(PreTrainedModel, encoder.model.backbone), encoder.view["features"]
        case OneFormerEncoder():
            # The backbone alone: OneFormer's decoders make masks, which nobody asks for here.
            return encoder.model.model.pixel_level_module.encoder, "last"
    raise ValueError(f"{encoder.name} can't be a part of the model: take clip_image, depth_anything or oneformer")


def encoder_fields(name: str, encoder: TargetEncoder) -> dict:
    """An entry of `config.encoders`."""
    model, features = trunk(encoder)
    config = {}
    # Only what differs from the library's defaults: it travels in config.json and makes the same model again.
    for field, value in model.config.to_diff_dict().items():
        if field not in OURS and field != "dtype":
            config[field] = value
    config["model_type"] = model.config.model_type
    return {
        "name": name,
        "config": config,
        "size": encoder.view["size"],
        "features": features,
        "dim": encoder.target_dim,
    }


@torch.no_grad()
def build_multi_encoder(
    llava: OlaVlmForConditionalGeneration,
    processor: OlaVlmProcessor,
    encoders: dict[str, TargetEncoder],
    fusion: str,
    num_tokens: int = 8,
) -> tuple[MultiEncoderLlavaForConditionalGeneration, MultiEncoderLlavaProcessor]:
    """
    The multi-encoder LLaVA of `build_ola_vlm`'s model and processor without tasks, and target encoders in order.

    Everything of LLaVA keeps its weights, its projector too, so that methods start alike; new are the columns of its
    first layer for the encoders' channels (`fusion` "feature") or the encoders' own projectors ("token").
    `num_tokens`: of each encoder, for "token". ValueError for tasks, no encoders or encoders that can't be a part.
    """
    if llava.config.tasks or not encoders:
        raise ValueError("the multi-encoder baseline takes a LLaVA without tasks and at least one encoder (teachers)")
    # The configuration: LLaVA's, and an entry for each encoder.
    fields = {name: value for name, value in llava.config.to_dict().items() if name not in OURS}
    parts = [encoder_fields(name, encoder) for name, encoder in encoders.items()]
    config = MultiEncoderLlavaConfig(**fields, fusion=fusion, encoders=parts, num_encoder_tokens=num_tokens)
    # The weights: LLaVA's, and the encoders'.
    weights = llava.state_dict()
    # A tied head is the input table under another name.
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    # The first layer gets columns for the encoders' channels: it is made anew, and LLaVA's columns are put into it.
    base = weights.pop(FIRST_LAYER) if fusion == "feature" else None
    for name, encoder in encoders.items():
        model, _ = trunk(encoder)
        for key, value in model.state_dict().items():
            weights[f"model.encoders.{name}.model.{key}"] = value
    new = (FIRST_LAYER, "model.encoder_projectors.")
    model = assemble(MultiEncoderLlavaForConditionalGeneration, config, weights, new, llava.dtype)
    if base is not None:
        model.state_dict()[FIRST_LAYER][:, : base.shape[1]] = base
    # How it writes and what it sees: LLaVA's settings of generation, and each encoder's own preprocessing.
    model.generation_config = llava.generation_config
    views = []
    for encoder in encoders.values():
        preprocessing = encoder.image_processor.to_dict()
        views.append({field: preprocessing[field] for field in VIEW_FIELDS})
    return model.eval(), multi_encoder_processor(processor, config.num_image_tokens, views)
