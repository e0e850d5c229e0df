"""Build an OLA-VLM (or, with no tasks, a LLaVA) from a pretrained vision tower, LLM and tokenizer."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from tokenizers.processors import TemplateProcessing
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
from ..training.chat_template import (
    IMAGE_TOKEN,
    default_template,
    fit_chat_template,
    special_tokens_around,
    taking_images,
)


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
    # A tower that is given as an object, or was saved without a preprocessing, says none.
    mean, std = statistics or (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    square = {"height": vision_config.image_size, "width": vision_config.image_size}
    # "pad": padded to a square, then resized as one. "reference": resized by the shorter edge, then cropped.
    pads = resize_mode == "pad"
    size = square
    if not pads:
        size = {"shortest_edge": vision_config.image_size}
    image_processor = LlavaImageProcessor(
        do_pad=pads,
        size=size,
        crop_size=square,
        do_center_crop=not pads,
        image_mean=mean,
        image_std=std,
    )
    task_tokens = task_token_strings(tasks)
    # Special tokens are never split, and left out of decoded answers.
    tokenizer.add_tokens([IMAGE_TOKEN, *task_tokens], special_tokens=True)
    # Llama-3's tokenizer has none. Labels and masks go by position, not by id, so that any token can pad.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    # A slow one, which is only refused where it is trained with, has no such settings.
    if tokenizer.is_fast:
        _leave_prompts_alone(tokenizer)
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
    # A template that can't be trained with is an error of training, not of building: answers only need the prompt.
    with contextlib.suppress(ValueError):
        fit_chat_template(processor)
    return processor


def _leave_prompts_alone(tokenizer) -> None:
    """In place: the tokenizer neither cuts nor fills a text, as one does that was saved in the middle of a training,
    and adds nothing behind it, where a prompt's answer goes; what it adds in front stays."""
    for name in ("max_length", "truncation_strategy", "stride", "pad_to_multiple_of"):
        tokenizer.init_kwargs.pop(name, None)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    front, behind = special_tokens_around(tokenizer)
    if not behind:
        return
    # Reset first: it puts another post-processor in place.
    if getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in front]
    backend.post_processor = TemplateProcessing(single=[*front, "$A"], special_tokens=ids)


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
    # Zero would be a division by zero below.
    if pad_vocab_to_multiple_of < 1:
        raise ValueError(f"pad_vocab_to_multiple_of is {pad_vocab_to_multiple_of}: give 1 for no padding, or more")
    text_config = copy.deepcopy(text_config)
    vision_config = copy.deepcopy(vision_config)
    # Parts from folders have a path of this machine there, which would be saved in the checkpoint.
    text_config.name_or_path = ""
    vision_config.name_or_path = ""
    # An LLM may have more rows than its tokenizer has tokens (Phi-3, Qwen2): none of them is cut off.
    num_tokens = max(num_tokens, text_config.vocab_size)
    text_config.vocab_size = math.ceil(num_tokens / pad_vocab_to_multiple_of) * pad_vocab_to_multiple_of
    return OlaVlmConfig(
        text_config=text_config,
        vision_config=vision_config,
        # `<image>` comes first, then the task tokens in the order of the sequence.
        image_token_index=token_ids[0],
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        tie_word_embeddings=text_config.tie_word_embeddings,
        tasks=tasks,
        task_token_ids=token_ids[1:],
        # The padding rows stand for no token; the model never emits them.
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
    # A tokenizer may know more ids than the table has rows, and its ids may have holes.
    known = sorted(i for i in known if i < len(weight))
    if known == list(range(len(known))):
        # Ids without holes are a view of the first rows; a list of indices would copy the table, a gigabyte.
        of_tokens = weight[: len(known)]
    else:
        of_tokens = weight[known]
    # (V, H) -> (H,). Summed in float32: in 16 bits the later ones of a hundred thousand rows would be rounded away.
    mean = of_tokens.mean(0, dtype=torch.float32).to(stored or weight.dtype).to(weight.dtype)
    if rows == len(weight):
        table = weight
    else:
        table = weight.new_empty(rows, weight.shape[1])
        table[: len(weight)] = weight
        table[len(weight) :] = mean
    table[added] = mean
    return table


# Fields of language models that act outside of embeddings, blocks and head, where LLaVA has nothing: Gemma 2's cap on
# logits, Cohere's, Granite's and Falcon-H1's scales of logits and embeddings, ...
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
    # None and 1 change nothing. Fields only explain a failure: what counts is what the model computes.
    scales = {field: config[field] for field in SCALES if config.get(field) not in (None, 1)}
    because = ""
    if scales:
        because = f" (its configuration has {scales})"
    # Dropout would make two passes differ.
    training = language_model.training
    language_model.eval()
    head = head_of(language_model)
    # (1, 4): any few tokens will do.
    ids = torch.arange(4, device=language_model.device)[None]
    # A cap such as Gemma 2's 30 * tanh(x / 30) hardly changes small logits: enlarged, it shows. Float32, since float16
    # ends at 65,504.
    enlarge = head.register_forward_hook(lambda module, args, logits: logits.float() * 1000)
    # The LLM as a whole, from tokens; then LLaVA's two steps: states from embeddings, logits from states.
    with enlarge:
        logits = language_model(input_ids=ids).logits
        backbone = backbone_of(language_model)
        states = backbone(input_ids=ids).last_hidden_state
        embeds = language_model.get_input_embeddings()(ids)
        try:
            states_of_embeds = backbone(inputs_embeds=embeds).last_hidden_state
            # As an image's features are, no token's: Gemma 4 looks for the tokens, by which it reads further tables.
            backbone(inputs_embeds=embeds.mean(1, keepdim=True))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{name} takes no embeddings but those of tokens: take another LLM.") from error
        expected = head(states)
    language_model.train(training)
    if not _close(states_of_embeds, states):
        raise ValueError(f"{name} changes embeddings outside of their module{because}: LLaVA can't, take another LLM.")
    if not _close(expected, logits):
        raise ValueError(f"{name} computes its logits with more than a linear head{because}: take another LLM.")


def _close(ours: Tensor, theirs: Tensor) -> bool:
    # Relative to the largest value: in 16 bits, and by other kernels, equal computations differ a little.
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
        # timm's configurations say the size as (channels, height, width).
        config.image_size = config.pretrained_cfg["input_size"][-1]
    side = config.image_size
    if not isinstance(side, int):
        raise ValueError(f"{name} has an image_size of {side}, not one number: take another vision tower")
    # What a tower gives is measured: no field says alike for all whether there is a class token.
    # (1, 3, S, S) -> (1, T, E) of a ViT, (1, E, h, w) of a convolutional net.
    blank = torch.zeros(1, 3, side, side, dtype=vision_tower.dtype, device=vision_tower.device)
    try:
        features = vision_tower(blank).last_hidden_state
    except TypeError as error:
        # SigLIP 2's NaFlex takes patches, and where they lie.
        raise ValueError(f"{name} takes more than an image's pixels: take another vision tower") from error
    if is_timm != (features.ndim == 4):
        shape = tuple(features.shape)
        raise ValueError(f"{name} gives features {shape}: take a convolutional net of timm, or a ViT of transformers")
    if is_timm:
        # A ViT's configuration says both already.
        config.hidden_size = features.shape[1]
        config.patch_size = side // features.shape[-1]
        return config, 0
    return config, features.shape[1] - (side // config.patch_size) ** 2


# Beginnings of names in OLA-VLM's state dict; `NEW_PARTS` are those that no part brings along.
BACKBONE = "model.language_model."
HEAD = "lm_head.weight"
NEW_PARTS = ("model.multi_modal_projector.", "predictors.", "queries.", "logit_scales.")


def backbone_of(language_model: PreTrainedModel) -> PreTrainedModel:
    """The LLM without its head."""
    backbone = language_model.base_model
    if isinstance(backbone, PreTrainedModel) and backbone is not language_model:
        return backbone
    # Llama 4's is called otherwise than its class says.
    return next(module for module in language_model.children() if isinstance(module, PreTrainedModel))


def table_name(language_model: PreTrainedModel) -> str:
    """The input embeddings' name in the LLM's backbone."""
    table = language_model.get_input_embeddings().weight
    # Found by identity, since families name it differently: "embed_tokens.weight", GPT-2's "wte.weight".
    return next(name for name, parameter in backbone_of(language_model).named_parameters() if parameter is table)


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
    # A tied head is the same parameter under a second name, and a file may have either.
    named = language_model.named_parameters(remove_duplicate=False)
    return [name for name, candidate in named if candidate is parameter]


def parts_weights(vision_tower: PreTrainedModel, language_model: PreTrainedModel, copied: tuple[bool, bool]) -> dict:
    """All weights of the parts by OLA-VLM's names, those of a tied head left out."""
    copy_tower, copy_language_model = copied
    weights = {}
    for name, value in vision_tower.state_dict().items():
        if copy_tower:
            value = value.clone()
        weights["model.vision_tower." + name] = value
    for name, value in backbone_of(language_model).state_dict().items():
        if copy_language_model:
            value = value.clone()
        weights[BACKBONE + name] = value
    if not language_model.config.tie_word_embeddings:
        head = head_of(language_model).weight.data
        if copy_language_model:
            head = head.clone()
        weights[HEAD] = head
    return weights


def read_tower(name: str) -> tuple[PreTrainedModel, list | None]:
    """A vision tower from a folder or a repository, and mean and deviation of its pixels, if these are on record."""
    config = load_vision_config(name)
    statistics = None
    if has_preprocessing(name, config):
        _, *statistics = vision_preprocessing(name, config)
    tower = load_whole(
        AutoModel,
        name,
        trust_remote_code=False,
        config=config,
        key_mapping=OF_VISION_TOWER,
        # A pooler's vector isn't used, and some checkpoints lack it.
        unused=["pooler."],
    )
    return tower, statistics


def read_language_model(name: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, torch.dtype | None]:
    """A language model from a folder or a repository, and the type that its rows had there, before they were converted
    to `dtype`."""
    with loading_from(name):
        stored = AutoConfig.from_pretrained(name, trust_remote_code=False).dtype
    return load_whole(AutoModelForCausalLM, name, dtype=dtype, trust_remote_code=False), cast(Any, stored)


def features_read(vision_config: PreTrainedConfig, class_tokens: int) -> dict:
    """LLaVA's fields that say which of the tower's features are read, if nothing else is asked for."""
    # LLaVA's "default" drops the first token, which would be a patch if there is no class token.
    fields: dict = {"vision_feature_select_strategy": "default" if class_tokens else "full"}
    # Of a convolutional net the last stage: the others have other widths and grids than were measured.
    if vision_config.model_type == "timm_wrapper":
        fields["vision_feature_layer"] = -1
    return fields


def longer_tables(
    language_model: PreTrainedModel, resize: Callable[[Tensor], Tensor], is_ours: bool
) -> dict[str, Tensor]:
    """The vocabulary's tables, by name, each made longer by `resize`. Those of a language model that `is_ours` alone
    become views of the longer ones, so that each is in memory once; another's stay as they are."""
    tables = {}
    for name, parameter in vocabulary_tables(language_model).items():
        weight = parameter.data
        if is_ours:
            # Its pages in the mapped file would stay in memory beside the longer table.
            weight = not_mapped(weight, str(language_model.name_or_path), names_of(language_model, parameter))
        else:
            weight = weight.clone()
        tables[name] = resize(weight)
        # Else the old table would be held while the next one is made.
        del weight
        if is_ours:
            parameter.data = tables[name][: len(parameter)]
    return tables


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
    # A configuration takes any field: a misspelled one would be kept there, and do nothing.
    unknown = config_overrides.keys() - {field.name for field in dataclasses.fields(OlaVlmConfig)}
    if unknown:
        raise ValueError(f"config_overrides has {sorted(unknown)}: no fields of OlaVlmConfig")

    # The parts: tower, language model and tokenizer. Those that are read here are nobody else's.
    statistics = None
    tower_is_ours = isinstance(vision_tower, str)
    if tower_is_ours:
        vision_tower, statistics = read_tower(vision_tower)
    language_model_is_ours = isinstance(language_model, str)
    if language_model_is_ours:
        language_model, stored = read_language_model(language_model, dtype)
    else:
        stored = language_model.dtype
    if tokenizer is None or isinstance(tokenizer, str):
        # A loaded LLM remembers where it came from.
        words = tokenizer or language_model.name_or_path
        tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
    # Cheap: it looks at the LLM's modules, while `check_logits` below computes with them.
    check_head(language_model)

    # Processor and configuration, which say how many rows the vocabulary's tables need.
    text_config = language_model.config
    generation_config = language_model.generation_config
    tasks = [normalize_task(task, text_config.hidden_size, text_config.num_hidden_layers) for task in tasks]
    # Tokens will be added to it, and the caller's must not change.
    tokenizer = copy.deepcopy(tokenizer)
    known = tokenizer.get_vocab()
    vision_config, class_tokens = measure_tower(vision_tower)
    config_overrides = features_read(vision_config, class_tokens) | config_overrides
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
    # By then the processor has added `<image>` and the task tokens to this tokenizer.
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

    # The tables, longer by the new tokens' rows.
    dtype = dtype or language_model.dtype
    resize = partial(
        resize_embedding,
        known=known.values(),
        added=added,
        rows=config.text_config.vocab_size,
        stored=stored,  # pyright: ignore[reportArgumentType] (what it has no value for stays as it is)
    )
    tables = longer_tables(language_model, resize, is_ours=language_model_is_ours)

    # One model of all weights; what is new in it is made as a new model's.
    # Not before: it computes with the tables, and would have read the mapped ones into memory beside the new.
    check_logits(language_model)
    weights = parts_weights(vision_tower, language_model, copied=(not tower_is_ours, not language_model_is_ours))
    weights.update(tables)
    # From here on `weights` alone holds the parts.
    del vision_tower, language_model, tables
    model = assemble(OlaVlmForConditionalGeneration, config, weights, NEW_PARTS, dtype)
    # Until here the task tokens' rows are the known rows' mean: their query tables are drawn by `assemble`.
    model.write_task_tokens()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # The LLM's own ends, which may be several: Llama-3 has one of texts and one of turns.
    for field in ["bos_token_id", "eos_token_id"]:
        setattr(model.generation_config, field, getattr(generation_config, field))
    return model.eval(), processor
