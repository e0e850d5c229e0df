"""Build an OLA-VLM (or, with no tasks, a LLaVA) from a pretrained vision tower, LLM and tokenizer."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..configuration_ola_vlm import VOCAB_MULTIPLE, OlaVlmConfig, normalize_task, task_token_strings
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..processing_ola_vlm import OlaVlmProcessor, added_ids
from ..targets.encoders import OF_VISION_TOWER, has_preprocessing, load_vision_config, vision_preprocessing
from ..targets.loading import load_whole, loading_from
from ..targets.weights import assemble, not_mapped
from ..training.chat_template import IMAGE_TOKEN, default_template, fit_chat_template, taking_images


def build_processor(
    tokenizer,
    vision_config,
    tasks,
    statistics=None,
    chat_template=None,
    class_tokens=1,
    strategy="default",
    resize_mode="pad",
) -> OlaVlmProcessor:
    """
    Processor for a tower (`vision_config`: `measure_tower`'s): pads an image to a square with its mean color, never
    crops (the teachers see the same square); with `resize_mode` "reference" it crops the middle square, as the
    reference implementation does. Adds `<image>` and the task tokens to the tokenizer. `statistics`: (mean, std) of
    the tower's pixel values, CLIP's by default. `class_tokens`: of the tower, one of which the `strategy` "default"
    leaves out.
    `chat_template`: the tokenizer's by default, or what can be trained with in its place (`fit_chat_template`).
    """
    if resize_mode not in ("pad", "reference"):
        raise ValueError(f'resize_mode {resize_mode!r} is unknown: choose "pad" or "reference"')
    mean, std = statistics or (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    square = {"height": vision_config.image_size, "width": vision_config.image_size}
    pads = resize_mode == "pad"
    image_processor = LlavaImageProcessor(
        do_pad=pads,
        size=square if pads else {"shortest_edge": vision_config.image_size},
        crop_size=square,
        do_center_crop=not pads,
        image_mean=mean,
        image_std=std,
    )
    task_tokens = task_token_strings(tasks)
    tokenizer.add_tokens([IMAGE_TOKEN, *task_tokens], special_tokens=True)
    if tokenizer.pad_token is None:  # Llama-3's has none; labels and masks go by position, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    template = chat_template or default_template(tokenizer.chat_template)
    processor = OlaVlmProcessor(
        image_processor,
        tokenizer,
        patch_size=vision_config.patch_size,
        chat_template=taking_images(template, **tokenizer.special_tokens_map),
        task_tokens=task_tokens,
        num_additional_image_tokens=class_tokens,
        vision_feature_select_strategy=strategy,
    )
    with contextlib.suppress(ValueError):  # which training raises
        fit_chat_template(processor)
    return processor


def build_config(
    text_config,
    vision_config,
    tasks,
    token_ids: list[int],
    num_tokens: int,
    pad_vocab_to_multiple_of: int = VOCAB_MULTIPLE,
    **fields,
) -> OlaVlmConfig:
    """`token_ids`: of `<image>` and the task tokens; `num_tokens`: the vocabulary's least size, that is the largest id
    and one, which is rounded up."""
    if pad_vocab_to_multiple_of < 1:
        raise ValueError(f"pad_vocab_to_multiple_of is {pad_vocab_to_multiple_of}: give 1 for no padding, or more")
    text_config = copy.deepcopy(text_config)
    vision_config = copy.deepcopy(vision_config)
    # No paths of this machine in the checkpoint.
    text_config.name_or_path = ""
    vision_config.name_or_path = ""
    num_tokens = max(num_tokens, text_config.vocab_size)
    text_config.vocab_size = math.ceil(num_tokens / pad_vocab_to_multiple_of) * pad_vocab_to_multiple_of
    return OlaVlmConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=token_ids[0],
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        tie_word_embeddings=text_config.tie_word_embeddings,
        tasks=tasks,
        task_token_ids=token_ids[1:],
        vocab_padding=text_config.vocab_size - num_tokens,
        **fields,
    )


def resize_embedding(
    weight: Tensor, known: Iterable[int], added: list[int], rows: int, stored: torch.dtype | None = None
) -> Tensor:
    """
    A table of the vocabulary with `rows` rows: those of the ids `added`, and all beyond the end of `weight`, are the
    mean of the `known` ids' rows; no other row changes. In place if `weight` has as many. The mean has no finer values
    than those that were `stored`, if they had another type than `weight`.
    """
    known = sorted(i for i in known if i < len(weight))
    contiguous = known == list(range(len(known)))  # a view is enough
    of_tokens = weight[: len(known)] if contiguous else weight[known]
    mean = of_tokens.mean(0, dtype=torch.float32).to(stored or weight.dtype).to(weight.dtype)
    if rows == len(weight):
        table = weight
    else:
        table = weight.new_empty(rows, weight.shape[1])
        table[: len(weight)] = weight
        table[len(weight) :] = mean
    table[added] = mean
    return table


# Fields of language models that LLaVA knows nothing of, since they act outside of embeddings, blocks and head.
SCALES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "embedding_multiplier",
    "embedding_scale",
    "scale_emb",
)


@torch.no_grad()
def check_logits(language_model: PreTrainedModel):
    """ValueError unless the states are made of nothing but what the embedding module gives, and the logits are the
    head of the states, which is all that LLaVA computes."""
    name = type(language_model).__name__
    config = language_model.config.to_dict()
    scales = {field: config[field] for field in SCALES if config.get(field) not in (None, 1)}
    because = f" (its configuration has {scales})" if scales else ""
    training = language_model.training
    language_model.eval()
    head = head_of(language_model)
    ids = torch.arange(4, device=language_model.device)[None]
    # A cap on logits shows only if they are large (too large for 16 bits).
    enlarge = head.register_forward_hook(lambda module, args, logits: logits.float() * 1000)
    with enlarge:
        logits = language_model(input_ids=ids).logits
        states = language_model.base_model(input_ids=ids).last_hidden_state
        embeds = language_model.get_input_embeddings()(ids)
        states_of_embeds = language_model.base_model(inputs_embeds=embeds).last_hidden_state
        expected = head(states)
    language_model.train(training)
    if not _close(states_of_embeds, states):
        raise ValueError(f"{name} changes embeddings outside of their module{because}: LLaVA can't, take another LLM.")
    if not _close(expected, logits):
        raise ValueError(f"{name} computes its logits with more than a linear head{because}: take another LLM.")


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.allclose(theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@torch.no_grad()
def measure_tower(vision_tower: PreTrainedModel) -> tuple[PreTrainedConfig, int]:
    """A tower's configuration, completed by what LLaVA asks for if it is a convolutional one of timm, and its tokens
    beyond its patches: CLIP's has one, SigLIP's none. ValueError for other layouts."""
    config = copy.deepcopy(vision_tower.config)
    name = type(vision_tower).__name__
    is_timm = config.model_type == "timm_wrapper"
    if is_timm:
        name = f"timm's {config.architecture}"
        config.image_size = config.pretrained_cfg["input_size"][-1]
    side = config.image_size
    if not isinstance(side, int):
        raise ValueError(f"{name} has an image_size of {side}, not one number: take another vision tower")
    blank = torch.zeros(1, 3, side, side, dtype=vision_tower.dtype, device=vision_tower.device)
    features = vision_tower(blank).last_hidden_state
    if is_timm != (features.ndim == 4):
        shape = tuple(features.shape)
        raise ValueError(f"{name} gives features {shape}: take a convolutional net of timm, or a ViT of transformers")
    if is_timm:
        config.hidden_size = features.shape[1]
        config.patch_size = side // features.shape[-1]
        return config, 0
    return config, features.shape[1] - (side // config.patch_size) ** 2


BACKBONE = "model.language_model."
HEAD = "lm_head.weight"
NEW_PARTS = ("model.multi_modal_projector.", "predictors.", "queries.", "logit_scales.")


def table_name(language_model: PreTrainedModel) -> str:
    """The input embeddings' name in the LLM's backbone."""
    table = language_model.get_input_embeddings().weight
    return next(name for name, parameter in language_model.base_model.named_parameters() if parameter is table)


def head_of(language_model: PreTrainedModel) -> torch.nn.Linear:
    return cast(torch.nn.Linear, language_model.get_output_embeddings())


def check_head(language_model: PreTrainedModel) -> None:
    """ValueError for a head that LLaVA has no place for: with a bias, or tied to a table of another name."""
    name = type(language_model).__name__
    if head_of(language_model).bias is not None:
        raise ValueError(f"{name}'s head has a bias, LLaVA's has none: take another LLM.")
    table = table_name(language_model)
    if language_model.config.tie_word_embeddings and table != "embed_tokens.weight":
        raise ValueError(f"{name} ties its head to {table}, LLaVA can't: take another LLM.")


def vocabulary_tables(language_model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The tables with a row for each token, by OLA-VLM's names: the embeddings and, unless it is tied, the head."""
    embeddings = cast(torch.nn.Embedding, language_model.get_input_embeddings())
    tables: dict[str, torch.nn.Parameter] = {
        BACKBONE + table_name(language_model): cast(torch.nn.Parameter, embeddings.weight)
    }
    if not language_model.config.tie_word_embeddings:
        tables[HEAD] = cast(torch.nn.Parameter, head_of(language_model).weight)
    return tables


def names_of(language_model: PreTrainedModel, parameter: torch.nn.Parameter) -> list[str]:
    """The names that a parameter has in the LLM."""
    named = language_model.named_parameters(remove_duplicate=False)
    return [name for name, candidate in named if candidate is parameter]


def parts_weights(vision_tower: PreTrainedModel, language_model: PreTrainedModel, copied: tuple[bool, bool]) -> dict:
    """All weights of the parts by OLA-VLM's names, those of a tied head left out."""
    copy_tower, copy_language_model = copied
    weights = {}
    for name, value in vision_tower.state_dict().items():
        weights["model.vision_tower." + name] = value.clone() if copy_tower else value
    for name, value in language_model.base_model.state_dict().items():
        weights[BACKBONE + name] = value.clone() if copy_language_model else value
    if not language_model.config.tie_word_embeddings:
        head = head_of(language_model).weight.data
        weights[HEAD] = head.clone() if copy_language_model else head
    return weights


def build_ola_vlm(
    vision_tower: str | PreTrainedModel,
    language_model: str | PreTrainedModel,
    tokenizer=None,
    tasks: Sequence[dict] = (),
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    resize_mode: str = "pad",
    pad_vocab_to_multiple_of: int = VOCAB_MULTIPLE,
    **config_overrides,
) -> tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]:
    """
    Model and processor from parts given as objects, folders or repositories (`tokenizer`: the LLM's by default).

    The parts keep their weights; projector, predictors and query tables are new. Only `<image>` and the task tokens
    get new rows in the vocabulary's tables, the mean of the known rows; the task tokens' input rows make their lookup
    the means of their query tables. The tables' length is a multiple of `pad_vocab_to_multiple_of`.
    Parts from folders and repositories are read once and not copied; those given as objects are, so that training
    doesn't change them.
    `dtype`: the LLM's by default. `resize_mode`: `build_processor`'s. `config_overrides`: more fields of the
    configuration.
    Raises ValueError for tasks that don't fit the LLM (`normalize_task`), for checkpoints that lack weights, for
    towers of another layout (`measure_tower`), for an LLM whose logits LLaVA can't give (`check_logits`) and for a
    tokenizer whose new tokens would take the rows of others (`added_ids`).
    """
    unknown = config_overrides.keys() - {field.name for field in dataclasses.fields(OlaVlmConfig)}
    if unknown:
        raise ValueError(f"config_overrides has {sorted(unknown)}: no fields of OlaVlmConfig")
    statistics = None
    tower_is_ours = isinstance(vision_tower, str)
    if tower_is_ours:
        vision_config = load_vision_config(vision_tower)
        if has_preprocessing(vision_tower, vision_config):
            _, *statistics = vision_preprocessing(vision_tower, vision_config)
        vision_tower = load_whole(
            AutoModel,
            vision_tower,
            trust_remote_code=False,
            config=vision_config,
            key_mapping=OF_VISION_TOWER,
            unused=["pooler."],
        )
    language_model_is_ours = isinstance(language_model, str)
    if language_model_is_ours:
        with loading_from(language_model):
            stored = AutoConfig.from_pretrained(language_model, trust_remote_code=False).dtype
        language_model = load_whole(AutoModelForCausalLM, language_model, dtype=dtype, trust_remote_code=False)
    else:
        stored = language_model.dtype
    if tokenizer is None or isinstance(tokenizer, str):
        words = tokenizer or language_model.name_or_path
        tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
    check_head(language_model)

    text_config = language_model.config
    generation_config = language_model.generation_config
    tasks = [normalize_task(task, text_config.hidden_size, text_config.num_hidden_layers) for task in tasks]
    tokenizer = copy.deepcopy(tokenizer)  # the caller's doesn't change
    known = tokenizer.get_vocab()
    vision_config, class_tokens = measure_tower(vision_tower)
    config_overrides.setdefault("vision_feature_select_strategy", "default" if class_tokens else "full")
    if vision_config.model_type == "timm_wrapper":  # whose other stages have other widths and grids
        config_overrides.setdefault("vision_feature_layer", -1)
    processor = build_processor(
        tokenizer,
        vision_config,
        tasks,
        statistics=statistics,
        chat_template=chat_template,
        class_tokens=class_tokens,
        strategy=config_overrides["vision_feature_select_strategy"],
        resize_mode=resize_mode,
    )
    added = added_ids(tokenizer, known)
    config = build_config(
        text_config,
        vision_config,
        tasks,
        token_ids=[processor.image_token_id, *processor.task_token_ids],
        num_tokens=max(tokenizer.get_vocab().values()) + 1,
        pad_vocab_to_multiple_of=pad_vocab_to_multiple_of,
        **config_overrides,
    )
    dtype = dtype or language_model.dtype
    tables = {}
    for name, parameter in vocabulary_tables(language_model).items():
        weight = parameter.data
        if language_model_is_ours:
            weight = not_mapped(weight, str(language_model.name_or_path), names_of(language_model, parameter))
        else:
            weight = weight.clone()
        tables[name] = resize_embedding(
            weight,
            known.values(),
            added=added,
            rows=config.text_config.vocab_size,
            stored=stored,  # pyright: ignore[reportArgumentType]
        )
        del weight
        if language_model_is_ours:
            # The LLM looks at the longer table from here on, so that each is in memory once.
            parameter.data = tables[name][: len(parameter)]
    check_logits(language_model)
    weights = parts_weights(vision_tower, language_model, copied=(not tower_is_ours, not language_model_is_ours))
    weights.update(tables)
    # From here on `weights` alone holds the parts.
    del vision_tower, language_model, parameter, tables
    model = assemble(OlaVlmForConditionalGeneration, config, weights, NEW_PARTS, dtype)
    model.write_task_tokens()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for field in ["bos_token_id", "eos_token_id"]:
        setattr(model.generation_config, field, getattr(generation_config, field))
    return model.eval(), processor
