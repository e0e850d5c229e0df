"""
OLA-VLM (arXiv 2412.09585): a LLaVA whose chosen LLM layers predict the features of specialized vision encoders.

Shapes: B batch, T sequence, N images of the batch in order, V image tokens an image, K task tokens of a task,
Q queries of a task (= its target's length), R rows of its query table, H LLM width, D predictor width, E target width.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_ola_vlm import OlaVlmConfig

# Custom code gets no checkpoint key conversion of its own, and would silently load LLaVA files with a random lm_head.
for ours, theirs in {"ola_vlm": "llava", "OlaVlmModel": "LlavaModel"}.items():
    register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(theirs), overwrite=True)  # pyright: ignore[reportArgumentType] (LLaVA's is there)


@dataclass
class OlaVlmCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """
    LLaVA's output, and with `output_predictions=True`:
    `predictions[task][layer]`: predicted target embeddings (N, Q, E), images in the order of `pixel_values`.
    `logit_scales[task]`: the learnable log-temperature of the task's contrastive loss, a scalar.
    `word_embeddings[task]`: of `word_ids`, for each kind of word a table (words, H), fp32, without gradient.
    """

    predictions: dict[str, dict[int, Tensor]] | None = None
    logit_scales: dict[str, Tensor] | None = None
    word_embeddings: dict[str, list[Tensor]] | None = None


class Parameters(nn.ParameterDict):
    """Parameters by name that are read by a call: hooks which bring offloaded weights (accelerate's) run at calls."""

    # A ParameterDict refuses calls.
    __call__: Callable[[], dict[str, Tensor]] = nn.Module.__call__

    def forward(self) -> dict[str, Tensor]:
        # Copies: when the call is over, offloaded or sharded weights are taken away again.
        return {name: parameter.clone() for name, parameter in self.items()}


def float_dtype(module: nn.Module) -> torch.dtype | None:
    """The type that a module computes in: of its first parameter that isn't quantized, in 16 bits at least; None
    without one."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:
            return parameter.dtype
    return None


@dataclass
class ImageKeys:
    """The M tokens of row `sample_N[n]` that image n may attend to where `mask_NM[n]`: those in `columns_NM`, or, if
    it is None, all of the row."""

    sample_N: Tensor
    mask_NM: Tensor
    columns_NM: Tensor | None = None

    @classmethod
    def of_rows(cls, sample_N: Tensor, key_mask_NT: Tensor, rows: int) -> "ImageKeys":
        """Of a batch of that many rows. With more images than rows each image takes its own keys alone: else every
        image of a row would be given copies of all the others' tokens, and masked ones cost as much as others."""
        if len(sample_N) <= rows:
            return cls(sample_N, key_mask_NT)
        # M; an image with fewer keys than that gets columns which its mask then hides.
        most = int(key_mask_NT.sum(1).max())
        # The chosen ones in front, in their order.
        columns_NM = key_mask_NT.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        return cls(sample_N, key_mask_NT.gather(1, columns_NM), columns_NM)

    def take(self, tokens_BTD: Tensor) -> Tensor:
        """(N, M, D)"""
        if self.columns_NM is None:
            return tokens_BTD[self.sample_N]
        return tokens_BTD[self.sample_N[:, None], self.columns_NM]


class PredictorLayer(nn.Module):
    """Perceiver layer: the queries attend to the tokens and to themselves, then a feed-forward net."""

    def __init__(self, dim: int, heads: int, head_dim: int, ffn_mult: int):
        super().__init__()
        self.heads = heads
        self.norm_tokens = nn.LayerNorm(dim)
        self.norm_queries = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        up = nn.Linear(dim, dim * ffn_mult, bias=False)
        down = nn.Linear(dim * ffn_mult, dim, bias=False)
        self.ffn = nn.Sequential(nn.LayerNorm(dim), up, nn.GELU(), down)

    def forward(self, tokens_BTD: Tensor, queries: Tensor, keys: ImageKeys) -> Tensor:
        """`queries` (1 or N, Q, D); image n attends to those tokens that `keys` says."""
        images = len(keys.sample_N)
        length = queries.shape[1]
        queries_normed = self.norm_queries(queries)
        # Keys and values (N, M + Q, heads * head_dim) of an image's tokens and of the queries themselves. Tokens are
        # projected once a row and queries once if all images share them; only then copied to each image.
        kv_tokens = keys.take(self.to_kv(self.norm_tokens(tokens_BTD)))
        kv_queries = self.to_kv(queries_normed).expand(images, -1, -1)
        key, value = torch.cat([kv_tokens, kv_queries], dim=1).chunk(2, dim=-1)
        query = self.to_q(queries_normed).expand(images, -1, -1)
        # (N, 1, 1, M + Q): queries are never hidden, so that no row of attention is empty.
        mask = F.pad(keys.mask_NM, (0, length), value=True)[:, None, None]
        # (N, heads, Q or M + Q, head_dim)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        queries = queries + self.to_out(attended.transpose(1, 2).flatten(2))
        return queries + self.ffn(queries)


class EmbeddingPredictor(nn.Module):
    """
    P^l_task of the paper (section 3.2): a Perceiver resampler from a layer's states to one image's target embedding.

    Without task tokens it owns its queries (`latents`, in its own width); else it gets them in the LLM's width, and as
    many as the target is long are made of them by tiling, or, if that doesn't come out even, by repeating their mean.
    """

    def __init__(self, task: dict, hidden_size: int):
        super().__init__()
        dim = task["predictor_dim"]
        target_dim = task["target_dim"]
        sizes = (dim, task["predictor_heads"], task["predictor_head_dim"], task["predictor_ffn_mult"])
        self.target_length = task["target_length"]
        # Under one name in both cases: None says that queries come from outside.
        if task["num_task_tokens"] == 0:
            self.latents = nn.Parameter(torch.randn(1, self.target_length, dim) / math.sqrt(dim))
        else:
            self.register_parameter("latents", None)
        self.proj_in = nn.Linear(hidden_size, dim)
        self.layers = nn.ModuleList([PredictorLayer(*sizes) for _ in range(task["predictor_depth"])])
        self.proj_out = nn.Linear(dim, target_dim)
        self.norm_out = nn.LayerNorm(target_dim)
        mlp = [nn.Linear(target_dim, target_dim), nn.ReLU(), nn.Linear(target_dim, target_dim)]
        if task["output_mlp"]:
            self.output_mlp = nn.Sequential(*mlp)
        else:
            self.output_mlp = nn.Identity()

    def forward(self, states_BTH: Tensor, queries: Tensor | None, sample_N: Tensor, key_mask_NT: Tensor) -> Tensor:
        """`queries` (1 or N, R, H), None without task tokens; returns (N, Q, E)."""
        # A linear layer's may be quantized.
        dtype = self.norm_out.weight.dtype
        # (1 or N, Q, D), by one of two ways.
        if self.latents is not None:
            queries = self.latents
        else:
            assert queries is not None
            # A target of one position (gen) and several task tokens; `normalize_task` lets no other lengths by.
            if self.target_length % queries.shape[1] != 0:
                queries = queries.mean(1, keepdim=True)
            queries = self.proj_in(queries.repeat(1, self.target_length // queries.shape[1], 1).to(dtype))
        tokens_BTD = self.proj_in(states_BTH.to(dtype))
        keys = ImageKeys.of_rows(sample_N, key_mask_NT, rows=len(states_BTH))
        for layer in self.layers:
            queries = layer(tokens_BTD, queries, keys)
        return self.output_mlp(self.norm_out(self.proj_out(queries)))


class PatchPredictor(nn.Module):
    """A linear layer, or an MLP with GELUs, of an image's token for the target at that token's place."""

    def __init__(self, task: dict, hidden_size: int):
        super().__init__()
        inner = [task["predictor_dim"]] * (task["predictor_depth"] - 1)
        widths = [hidden_size, *inner, task["target_dim"]]
        self.layers = nn.ModuleList([nn.Linear(*both) for both in pairwise(widths)])

    def forward(self, tokens_H: Tensor) -> Tensor:
        """(any number of tokens, H) -> (as many, E)."""
        tokens_H = tokens_H.to(float_dtype(self) or tokens_H.dtype)
        for i, layer in enumerate(self.layers):
            # Between layers, not in front of the first one.
            if i > 0:
                tokens_H = F.gelu(tokens_H)
            tokens_H = layer(tokens_H)
        return tokens_H


def make_predictor(task: dict, hidden_size: int) -> nn.Module:
    """A task's predictor of one layer; one without parameters if it is the token itself."""
    if task["predictor"] == "none":
        return nn.Identity()
    # A predicted place code follows the features.
    task = {**task, "target_dim": task["target_dim"] + task["place_code"]}
    if task["predictor"] == "patch":
        return PatchPredictor(task, hidden_size)
    return EmbeddingPredictor(task, hidden_size)


def resize_grid(cells_VE: Tensor, length: int, name: str) -> Tensor:
    """An image's predictions, one a token, as many as its target is long: means over what lies in a target's cell.
    ValueError if the tokens of the task `name` make no square grid."""
    count = len(cells_VE)
    if count == length:
        return cells_VE
    if length == 1:
        return cells_VE.mean(0, keepdim=True)
    side = math.isqrt(count)
    target_side = math.isqrt(length)
    if side**2 != count or target_side**2 != length:
        sizes = f"an image has {count} tokens, its target {length} positions, and not both are squares"
        remedy = f"give square images (image_square), no tiles; or, if all are as long, set target_length to {count}"
        raise ValueError(f"task {name!r}: {sizes}: {remedy}")
    # (V, E) -> (E, side, side) -> (E, target_side, target_side) -> (Q, E)
    maps_EV = cells_VE.T.unflatten(1, (side, side))
    return F.adaptive_avg_pool2d(maps_EV[None], target_side)[0].flatten(1).T


@dataclass
class ImageLayout:
    """Where the images of a batch are: found by token id, whatever the prompt, the padding side and their number."""

    # The row of the batch that holds image n.
    sample_N: Tensor
    # For each of KEY_GROUPS but "task": which tokens of that row belong to it.
    groups_NT: dict[str, Tensor]
    # Columns of image n's own task tokens.
    task_columns_NK: dict[str, Tensor]
    # Which tokens of that row stand for image n's pixels.
    pixels_NT: Tensor

    @classmethod
    def find(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        num_images: int,
        config,
        packed_BT: Tensor | None = None,
    ) -> "ImageLayout":
        """`input_ids`, `attention_mask` (B, T). `packed_BT`: of rows packed into those of the batch, the number of the
        one that a token belongs to (`packed_rows`). Raises ValueError if the tokens don't fit to `num_images`."""
        mask_BT = attention_mask
        if mask_BT is None:
            mask_BT = torch.ones_like(input_ids)
        if mask_BT.shape != input_ids.shape:
            shapes = f"{tuple(mask_BT.shape)} and {tuple(input_ids.shape)}"
            raise ValueError(f"Predictions need a mask of the shape of input_ids, got {shapes}: pass whole sequences.")
        attended_BT = mask_BT.bool()
        is_image_BT = input_ids == config.image_token_id
        row_BT = number_rows(input_ids, packed_BT)
        sample_N, pixels_NT = find_images(is_image_BT, num_images)
        # Of packed rows the image's own: that of its first token. `argmax` of booleans is the first True.
        row_N = row_BT[sample_N, pixels_NT.int().argmax(1)]
        is_own_NT = row_BT[sample_N] == row_N[:, None]
        task_columns_NK, is_task_BT = find_task_tokens(input_ids, row_N, row_BT, config)
        groups_NT = group_tokens(attended_BT, is_image_BT, is_task_BT, sample_N, pixels_NT, is_own_NT)
        return cls(sample_N, groups_NT, task_columns_NK, pixels_NT)

    def key_mask(self, task: dict) -> Tensor:
        """(N, T): what the task's predictors see for image n; never padding, other images or other tasks' tokens."""
        mask_NT = torch.zeros_like(self.groups_NT["image"])
        for group in task["attends_to"]:
            if group == "task":
                mask_NT = mask_NT.scatter(1, self.task_columns_NK[task["name"]], True)
            else:
                mask_NT = mask_NT | self.groups_NT[group]
        return mask_NT

    def predict_patches(self, states_BTH: Tensor, predictor: nn.Module, task: dict) -> Tensor:
        """(N, Q, E): `predictor` of each of an image's tokens, resized to the target's grid. ValueError if the tokens
        don't make the target's grid."""
        device = states_BTH.device
        # All images' tokens, one after the other (here V is their number in the batch).
        image_V, column_V = self.pixels_NT.to(device).nonzero(as_tuple=True)
        # One call for the tokens of all images, though there may be none.
        predicted_VE = predictor(states_BTH[self.sample_N.to(device)[image_V], column_V])
        # And back to images, whose tokens may differ in number.
        counts = self.pixels_NT.sum(1).tolist()
        length = task["target_length"]
        if all(count == length for count in counts):
            return predicted_VE.view(len(counts), length, predicted_VE.shape[1])
        if task["predictor"] == "none":
            sizes = f"images have {sorted(set(counts))} tokens, targets {length} positions"
            remedy = "set target_length to an image's tokens"
            if len(set(counts)) > 1:
                remedy = "give images one size (image_side), and set target_length to their tokens"
            raise ValueError(f"task {task['name']!r}: {sizes}: without a predictor {remedy}")
        # A mean over all tokens needs no grid.
        if length > 1:
            self._check_in_one_piece(task["name"])
        grids = [resize_grid(cells_VE, length, task["name"]) for cells_VE in predicted_VE.split(counts)]
        return torch.stack(grids)

    def _check_in_one_piece(self, name: str) -> None:
        """ValueError if an image's tokens have others between them, as tiles have: they make no grid."""
        # A piece begins where the token before is none of the image's.
        starts_NT = self.pixels_NT[:, 1:] & ~self.pixels_NT[:, :-1]
        pieces_N = starts_NT.sum(1) + self.pixels_NT[:, 0]
        if bool((pieces_N > 1).any()):
            remedy = "set its processor's splitting of images to false"
            raise ValueError(f"task {name!r}: an image has {int(pieces_N.max())} tiles, which make no grid: {remedy}")


def packed_rows(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """The number (B, T) of the packed row that a token belongs to; None unless rows are packed. They are where
    transformers takes them to be: without a mask, positions (B, T) begin anew with each row. Padding is a row, too."""
    if attention_mask is not None or position_ids is None or position_ids.ndim != 2:
        return None
    return find_packed_sequence_indices(position_ids)


def number_rows(input_ids: Tensor, packed_BT: Tensor | None) -> Tensor:
    """The number (B, T) of a token's row, counted through the batch."""
    samples_B1 = torch.arange(len(input_ids), device=input_ids.device)[:, None]
    if packed_BT is None:
        return samples_B1.expand_as(input_ids)
    return samples_B1 * input_ids.shape[1] + packed_BT


def find_images(is_image_BT: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Each image's row of the batch (N,), and which tokens of it are the image's own (N, T). ValueError if the images
    don't have equally many tokens."""
    # Places in the batch, row after row.
    places = is_image_BT.flatten().nonzero().flatten()
    if num_images == 0:
        tokens_an_image, rest = 1, len(places)
    else:
        tokens_an_image, rest = divmod(len(places), num_images)
    if rest or tokens_an_image == 0:
        raise ValueError(f"{len(places)} image tokens don't divide among {num_images} images.")
    sample_N = places.view(num_images, tokens_an_image)[:, 0] // is_image_BT.shape[1]
    # A token's place among all image tokens says whose it is: of two images with three each, 0 1 2 | 3 4 5 are of the
    # images 0 0 0 | 1 1 1. Words have the place of the image token before them, or -1, which is no image's.
    place_BT = (is_image_BT.flatten().cumsum(0) - 1).view_as(is_image_BT)
    owner_BT = place_BT // tokens_an_image
    numbers_N1 = torch.arange(num_images).to(owner_BT)[:, None]
    return sample_N, is_image_BT[sample_N] & (owner_BT[sample_N] == numbers_N1)


def find_task_tokens(input_ids: Tensor, row_N: Tensor, row_BT: Tensor, config) -> tuple[dict[str, Tensor], Tensor]:
    """Each task's columns of each image's own tokens (N, K), and which tokens are any task's (B, T): the n-th
    occurrence of a task token belongs to the n-th image. ValueError if an image lacks one in its row, where `row_N`
    and `row_BT` are the numbers of the images' and the tokens' rows."""
    num_images = len(row_N)
    columns = input_ids.shape[1]
    # P = B * T places of the batch, row after row: so the n-th occurrence is the n-th image's.
    ids = torch.tensor(config.task_token_ids, device=input_ids.device, dtype=input_ids.dtype)
    is_token_KP = input_ids.flatten() == ids[:, None]
    # (K, P) -> (K,): how often each id occurs in the batch.
    found_K = is_token_KP.sum(1)
    places_KN = None
    if bool((found_K == num_images).all()):
        # `nonzero` goes row by row: for each id its places, in order.
        places_KN = is_token_KP.nonzero()[:, 1].view(len(ids), num_images)
    # As many as images, but one row may have two and another none.
    if places_KN is None or bool((row_BT.flatten()[places_KN] != row_N).any()):
        found = dict(zip(config.task_token_ids, found_K.tolist(), strict=True))
        what = f"Task tokens (id: how many) are {found} for {num_images} images"
        raise ValueError(f"{what}: every image needs all of them in its row, as the processor writes them.")
    # Ids are in the order of the tasks.
    counts = {task["name"]: task["num_task_tokens"] for task in config.tasks}
    columns_NK = (places_KN % columns).T.split(list(counts.values()), dim=1)
    return dict(zip(counts, columns_NK, strict=True)), is_token_KP.any(0).view_as(input_ids)


def group_tokens(
    attended_BT: Tensor,
    is_image_BT: Tensor,
    is_task_BT: Tensor,
    sample_N: Tensor,
    pixels_NT: Tensor,
    is_own_NT: Tensor,
) -> dict[str, Tensor]:
    """What predictors can attend to for each image (N, T): words before the row's first image, the image's own tokens,
    words after; never padding. `is_own_NT`: which tokens of the batch's row are of the image's own row."""
    words_NT = (attended_BT & ~is_image_BT & ~is_task_BT)[sample_N] & is_own_NT
    before_image_NT = (is_image_BT[sample_N] & is_own_NT).cumsum(1) == 0
    return {
        "system": words_NT & before_image_NT,
        "image": pixels_NT & attended_BT[sample_N],
        "text": words_NT & ~before_image_NT,
    }


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions (B, T) have a label as next token, and these labels."""
    # Position t predicts token t + 1; the last one predicts none.
    next_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    supervised = next_labels != -100
    return supervised, next_labels[supervised]


def resample(
    states_BTH: Tensor, predictor: nn.Module, task: dict, layout: ImageLayout, tables: Mapping[str, Tensor]
) -> Tensor:
    """(N, Q, E): a layer's resampler, whose queries are its own or the task's (`tables`, or its tokens' states)."""
    name = task["name"]
    # The layers of a model on several devices have their own.
    device = states_BTH.device
    sample_N = layout.sample_N.to(device)
    queries = None
    if task["num_task_tokens"] > 0 and task["target_length"] > 1:
        queries = tables[name][None]
    elif task["num_task_tokens"] > 0:
        # (N, K, H), of which the predictor takes the mean: a single query can't be tiled of several tokens.
        queries = states_BTH[sample_N[:, None], layout.task_columns_NK[name].to(device)]
    return predictor(states_BTH, queries, sample_N, layout.key_mask(task).to(device))


def as_tokens(projector: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The projector's input, in its own type (a frozen tower's may be another one): tokens, to which the maps
    (N, C, h, w) of a convolutional tower are flattened."""
    (features,) = inputs
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    return (features.to(float_dtype(projector) or features.dtype),)


class OlaVlmModel(LlavaModel):
    """LLaVA's backbone; in pre-training the task tokens' embeddings are passed in instead of looked up."""

    config: OlaVlmConfig

    def __init__(self, config: OlaVlmConfig):
        super().__init__(config)
        self.multi_modal_projector.register_forward_pre_hook(as_tokens)

    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # Where the packed rows of the LLM begin: flash attention in the tower would take them for the images'.
        options: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name not in FlashAttentionKwargs.__annotations__:
                options[name] = value
        # A list or a number names layers of the LLM, not of the tower.
        if not isinstance(options.get("output_hidden_states", True), bool):
            del options["output_hidden_states"]
        # In the signature by their names: `generate` hands on what it finds there.
        options["vision_feature_layer"] = vision_feature_layer
        options["vision_feature_select_strategy"] = vision_feature_select_strategy
        # timm's towers take none of the LLM's arguments.
        if self.config.vision_config.model_type == "timm_wrapper":
            own = ("vision_feature_layer", "vision_feature_select_strategy", "return_dict")
            options = {name: value for name, value in options.items() if name in own}
        # Not every tower takes sizes.
        elif image_sizes is not None:
            options["image_sizes"] = image_sizes
        if pixel_values.shape[0] > 0:
            return super().get_image_features(pixel_values=pixel_values, **options)
        # No image in the batch: a blank one, of which nothing is taken. Every rank of a training run gathers the same
        # sharded weights, whatever its rows hold, and has gradients, of zeros, for the same parameters.
        blank = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        features = super().get_image_features(pixel_values=blank, **options).pooler_output[0]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalSubscript] (an output, no tuple)
        return BaseModelOutputWithPooling(pooler_output=[features[:0]])  # pyright: ignore[reportArgumentType] (a list, as LLaVA's own)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        task_token_embeds: Tensor | None = None,
        freeze_task_tokens: bool = False,
        **kwargs,
    ):
        """`task_token_embeds` (all tasks' K, H) replace the vocabulary's rows of `config.task_token_ids`;
        `freeze_task_tokens` gives these rows no gradient."""
        no_images = pixel_values is None and input_ids is not None and kwargs.get("mm_encoder_outputs") is None
        if no_images and self.training and distributed.is_available() and distributed.is_initialized():
            # Others' collators leave pixels out; other ranks may have some.
            side = self.config.vision_config.image_size
            pixel_values = self.multi_modal_projector.linear_1.weight.new_zeros(0, 3, side, side)
        # Task tokens are ordinary rows: all is LLaVA's.
        if input_ids is None or (task_token_embeds is None and not freeze_task_tokens):
            return super().forward(
                input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs
            )

        # Else the embeddings are made here, with task tokens' replaced.
        ids = torch.tensor(self.config.task_token_ids, device=input_ids.device)
        match_BTK = input_ids[..., None] == ids
        embeds_BTH = self.get_input_embeddings()(input_ids)
        if task_token_embeds is None:
            replacement = embeds_BTH.detach()
        else:
            # Which of the K tokens it is; what isn't any of them takes row 0, and is left out below.
            replacement = task_token_embeds.to(embeds_BTH.dtype)[match_BTK.int().argmax(-1)]
        embeds_BTH = torch.where(match_BTK.any(-1, keepdim=True), replacement, embeds_BTH)

        # LLaVA puts images among embeddings by their ids, which it doesn't get now: it is done as it does it.
        if pixel_values is not None:
            vision = {k: kwargs.pop(k, None) for k in ["vision_feature_layer", "vision_feature_select_strategy"]}
            features = torch.cat(self.get_image_features(pixel_values, return_dict=True, **vision).pooler_output)
            features = features.to(embeds_BTH.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds=embeds_BTH, image_features=features)
            embeds_BTH = embeds_BTH.masked_scatter(mask, features)
        return super().forward(inputs_embeds=embeds_BTH, **kwargs)


@contextmanager
def inputs_kept(model: Any, wanted: bool = True) -> Iterator[list[Tensor]]:
    """A list that gets, if some task reads layer 0, what enters the language model in this block: (B, T, H), words as
    they are looked up and images as they are projected. `hidden_states[0]` is what it makes of them before its first
    block, which is something else in some families: Granite's multiplies, GPT-2's adds positions."""
    entered: list[Tensor] = []

    def keep(module, args, kwargs):
        # The first pass is the one that predictions are made of.
        if not entered and kwargs.get("inputs_embeds") is not None:
            entered.append(kwargs["inputs_embeds"])

    if not wanted or not any(0 in task["layers"] for task in model.config.tasks):
        yield entered
        return
    hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield entered
    finally:
        hook.remove()


@contextmanager
def states_kept(model: Any, layers: list[int]) -> Iterator[list[tuple]]:
    """A list that gets the hidden states of these layers, of the first pass through the language model in this block.
    It alone is asked for them: asked of the whole model, towers would keep their own layers of these numbers."""
    kept: list[tuple] = []

    def ask(module, args, kwargs):
        # Somebody who wants all layers gets them: ours are among them.
        if kwargs.get("output_hidden_states") is True:
            return args, kwargs
        return args, {**kwargs, "output_hidden_states": layers}

    def keep(module, args, output):
        if not kept:
            kept.append(output.hidden_states)

    language_model = model.get_decoder()
    hooks = [
        language_model.register_forward_pre_hook(ask, with_kwargs=True),
        language_model.register_forward_hook(keep),
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def layers_of(tasks: list[dict]) -> list[int]:
    """Those that some task's predictors read, each once, rising."""
    layers = set()
    for task in tasks:
        layers.update(task["layers"])
    return sorted(layers)


def from_inputs_on(entered: list[Tensor], states: tuple) -> tuple:
    """Hidden states of all layers, those of layer 0 being what `inputs_kept` kept, if it kept anything."""
    if not entered:
        return states
    return entered[0], *states[1:]


# GenerationMixin by name: transformers wraps a class of remote code that lacks it, and a wrapped one can't be pickled.
class OlaVlmForConditionalGeneration(LlavaForConditionalGeneration, GenerationMixin):
    """
    LLaVA with embedding predictors: `predictors[task][str(layer)]`, `queries[task]` (R, H), `logit_scales[task]` (1,).

    `task_tokens_from_queries`: True in pre-training, when the query tables produce the task tokens (group means) and
    learn from the LLM; False otherwise, when task tokens are ordinary rows of the vocabulary.
    `task_tokens_frozen`: these rows get no gradient. It is cut where they are looked up: a hook on the parameter would
    be lost when it is sharded.
    With no tasks it is LLaVA: same keys, same logits, same loss. Without predictors (`config.has_predictors`) its keys
    are LLaVA's, too, and `output_predictions` gives none.
    """

    config_class = OlaVlmConfig
    config: OlaVlmConfig

    def __init__(self, config: OlaVlmConfig):
        # Not LLaVA's own, which would build a LlavaModel and a head first that are then replaced.
        LlavaPreTrainedModel.__init__(self, config)
        text = config.text_config
        self.model = OlaVlmModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        # What a stage of training sets (`training.stages.apply_stage`).
        self.task_tokens_from_queries = False
        self.task_tokens_frozen = False
        predicted_tasks = []
        if config.has_predictors:
            predicted_tasks = config.tasks
        # No empty containers otherwise: they would show in FSDP plans and module listings.
        if predicted_tasks:
            self.predictors = nn.ModuleDict()
            self.queries = Parameters()
            self.logit_scales = Parameters()
        for task in predicted_tasks:
            layers = {str(layer): make_predictor(task, text.hidden_size) for layer in task["layers"]}
            self.predictors[task["name"]] = nn.ModuleDict(layers)
            # FSDP2 can't shard a scalar.
            self.logit_scales[task["name"]] = nn.Parameter(torch.full((1,), 2.0))
            if task["num_task_tokens"] > 0:
                # A group of queries for each task token, at least one.
                rows = max(task["target_length"], task["num_task_tokens"])
                self.queries[task["name"]] = nn.Parameter(torch.randn(rows, text.hidden_size))
        self._suppress_token_ids()
        self.post_init()

    def _suppress_token_ids(self):
        """Ids that are inputs only, and the vocabulary's padding rows, which stand for no token."""
        rows = self.config.text_config.vocab_size
        padding = range(rows - self.config.vocab_padding, rows)
        # What somebody else bans stays; of ours, rows that were padding may have become tokens.
        former = getattr(self, "suppressed_token_ids", [])
        banned = [i for i in self.generation_config.suppress_tokens or [] if i not in former and i < rows]
        self.suppressed_token_ids = [self.config.image_token_id, *self.config.task_token_ids, *padding]
        self.generation_config.suppress_tokens = [*self.suppressed_token_ids, *banned]

    def _suppressed_with(self, generation_config: GenerationConfig) -> list[int]:
        """`suppressed_token_ids`, and those that the generation config, or else the model's own, bans beside them."""
        banned = generation_config.suppress_tokens
        if banned is None:
            banned = self.generation_config.suppress_tokens or []
        return sorted({*banned, *self.suppressed_token_ids})

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """LLaVA's: all `new_num_tokens` rows are tokens, those that `pad_to_multiple_of` adds are padding. ValueError
        if an image or task token's row would be lost."""
        rows = self.config.text_config.vocab_size
        ids = [self.config.image_token_id, *self.config.task_token_ids]
        # The image's id may lie behind the table: 32,000 in LLaVA's default configuration, of 32,000 rows.
        largest_id = max([i for i in ids if i < rows], default=-1)
        if new_num_tokens is not None and new_num_tokens <= largest_id:
            needs = f"image and task tokens have ids up to {largest_id}: keep at least {largest_id + 1} rows"
            raise ValueError(f"new_num_tokens is {new_num_tokens}, but {needs}.")
        tokens = new_num_tokens
        if tokens is None:
            tokens = rows - self.config.vocab_padding
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.vocab_padding = self.config.text_config.vocab_size - tokens
        self._suppress_token_ids()
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module):
        # Only modules with parameters of their own come here, and not the backbone's: of the linear layers the head
        # and the predictors'. The latter start as torch initializes them (and the reference does).
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and module is not self.lm_head:
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, EmbeddingPredictor):
            init.normal_(module.latents, std=1 / math.sqrt(module.latents.shape[-1]))
        elif isinstance(module, nn.ParameterDict) and module is self.queries:
            for queries in module.values():
                init.normal_(queries)
        elif isinstance(module, nn.ParameterDict) and module is self.logit_scales:
            for logit_scale in module.values():
                init.constant_(logit_scale, 2.0)

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Also takes the names that `save_pretrained` writes: `Trainer` resumes from its files through this method."""
        renamings = [t for t in get_model_conversion_mapping(self) if isinstance(t, WeightRenaming)]
        renamed = {rename_source_key(name, renamings, [])[0]: value for name, value in state_dict.items()}
        return super().load_state_dict(renamed, strict=strict, assign=assign)

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args, **kwargs
    ):
        """LLaVA's, never emitting `suppressed_token_ids`, even with a generation config that came without ours."""
        if generation_config is None:
            kwargs.setdefault("suppress_tokens", self._suppressed_with(self.generation_config))
        elif "suppress_tokens" not in kwargs:
            # Into the config: transformers warns of arguments beside one.
            generation_config = copy.deepcopy(generation_config)
            generation_config.suppress_tokens = self._suppressed_with(generation_config)
        return super().generate(inputs, generation_config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] (GenerationMixin's, by another base)

    def task_token_embeddings(self, tables: Mapping[str, Tensor] | None = None) -> Tensor:
        """(all tasks' K, H): the task tokens' input embeddings, means of consecutive rows of the query tables. It is
        what the lookup gives, not what is in the vocabulary's rows: Gemma's module scales these (`lookup_scale`)."""
        if tables is None:
            tables = self.queries()
        # (R, H) -> (K, R / K, H) -> (K, H)
        counts = {task["name"]: task["num_task_tokens"] for task in self.config.tasks}
        return torch.cat([table.unflatten(0, (counts[name], -1)).mean(1) for name, table in tables.items()])

    def lookup_scale(self, dtype: torch.dtype) -> float:
        """What the embedding module multiplies a row of `dtype` by: 1, but for Gemma the root of the width, rounded.
        (transformers calls it `embed_scale` in all families.)"""
        scale = getattr(self.get_input_embeddings(), "embed_scale", 1.0)
        return torch.as_tensor(scale).to(dtype).item()

    @torch.no_grad()
    def word_embeddings(self, word_ids: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """For each task tables (words, H), fp32, of what the lookup gives for words: the means of their tokens.
        `word_ids[task]`: for each kind of word ids (words, tokens), -1 behind a word with fewer tokens."""
        lookup = self.get_input_embeddings()
        device = cast(Tensor, lookup.weight).device
        # NEFTune's hook adds noise to what is looked up in training: for inputs, while targets are the words' own.
        is_training = lookup.training
        lookup.eval()
        found = {}
        try:
            for name, kinds in word_ids.items():
                found[name] = []
                for ids_WT in kinds:
                    ids_WT = ids_WT.to(device)
                    is_token_WT1 = (ids_WT >= 0)[..., None]
                    # -1 can't be looked up: it takes token 0, which the sum then leaves out.
                    embeds_WTH = lookup(ids_WT.clamp(min=0)).float()
                    found[name].append((embeds_WTH * is_token_WT1).sum(1) / is_token_WT1.sum(1))
        finally:
            lookup.train(is_training)
        return found

    @torch.no_grad()
    def write_task_tokens(self, state_dict: dict[str, Tensor] | None = None):
        """
        Write into the vocabulary's rows (before every save in pre-training) what makes their lookup give
        `task_token_embeddings`: into the model's, or into those of a whole `state_dict` of it, which sharded training
        gathers to save it. KeyError if that lacks the vocabulary or a query table.
        """
        # The configuration of an attached model doesn't say: it always has some.
        has_tables = getattr(self.config, "has_predictors", True)
        if not self.config.task_token_ids or not has_tables:
            return
        table = cast(Tensor, self.get_input_embeddings().weight)
        tables = [table]
        queries = None
        if state_dict is not None:
            # A tied head has the same rows under a name of its own, which a state dict may leave out.
            names = [name for name, weight in self.named_parameters(remove_duplicate=False) if weight is table]
            tables = [state_dict[name] for name in names if name in state_dict]
            if not tables:
                raise KeyError(f"the state dict has none of {names}, into which the task tokens are written")
            queries = {name: state_dict[f"queries.{name}"] for name in self.queries}
        embeds_KH = self.task_token_embeddings(queries).float()
        for weight in tables:
            weight[self.config.task_token_ids] = (embeds_KH / self.lookup_scale(weight.dtype)).to(weight)

    def predict_embeddings(
        self, hidden_states: Mapping[int, Tensor] | tuple, layout: ImageLayout
    ) -> dict[str, dict[int, Tensor]]:
        """predictions[task][layer] (N, Q, E) from `hidden_states[layer]` (B, T, H), 1-based, 0 the language model's
        inputs (`inputs_kept`)."""
        tables = self.queries()
        predictions = {}
        for task in self.config.tasks:
            name = task["name"]
            predictions[name] = {}
            for layer in task["layers"]:
                predictor = cast(nn.ModuleDict, self.predictors[name])[str(layer)]
                if task["predictor"] == "resampler":
                    predicted = resample(hidden_states[layer], predictor, task, layout, tables)
                else:
                    predicted = layout.predict_patches(hidden_states[layer], predictor, task)
                predictions[name][layer] = predicted
        return predictions

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        output_predictions: bool = False,
        supervised_logits_only: bool = False,
        word_ids: dict[str, list[Tensor]] | None = None,
        **kwargs,
    ) -> OlaVlmCausalLMOutputWithPast:
        """
        LLaVA's forward (`kwargs` hold its cache, whose name differs between versions); `output_predictions=True` adds
        `predictions` and `logit_scales` and needs `input_ids` and a mask (B, T) of whole sequences; ValueError if
        image or task tokens don't fit to `pixel_values`. Without images predictions have zero rows but stay in the
        graph. With tasks, `labels` that are image or task tokens, which are never emitted, count as -100 (ignored).
        `supervised_logits_only=True` needs `labels`: the same loss, but `logits` (S, vocabulary) of those S
        positions only whose next token has a label: most of a caption's positions are the image's, and the head is
        the widest layer. `word_ids`: with predictions, `word_embeddings` of these. Without an `attention_mask`,
        `position_ids` (B, T) that begin anew within a row say that several rows of data are packed into it: each is
        computed as if it were alone, predictions included.
        """
        # What is asked for.
        wanted = kwargs.pop("output_hidden_states", None)
        if wanted is None:
            wanted = self.config.output_hidden_states
        output_predictions = output_predictions and len(self.config.tasks) > 0 and self.config.has_predictors
        if output_predictions and input_ids is None:
            raise ValueError("output_predictions=True finds images by token id: pass input_ids, not inputs_embeds.")
        if supervised_logits_only:
            if labels is None:
                raise ValueError("supervised_logits_only=True leaves no logits without labels: pass labels.")
            # None of LLaVA's: they are made below.
            logits_to_keep = torch.empty(0, dtype=torch.long)
        kept = self._hidden_states_to_keep(wanted, output_predictions, supervised_logits_only)
        if kept:
            kwargs["output_hidden_states"] = kept
        if self.training:
            # A cache would hold keys and values of all layers, which no training reads.
            kwargs.setdefault("use_cache", False)

        # LLaVA's own pass, without labels: its loss takes tokens that are never emitted for candidates.
        with inputs_kept(self, output_predictions) as entered:
            outputs = super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                logits_to_keep=logits_to_keep,
                image_sizes=image_sizes,
                mm_encoder_outputs=mm_encoder_outputs,
                return_dict=True,  # pyright: ignore[reportCallIssue] (its decorator takes it)
                **self._task_token_inputs(),
                **kwargs,
            )
        # Those that only predictors and head read are no output.
        states = outputs.hidden_states
        if not wanted:
            outputs["hidden_states"] = None

        # The loss of the next tokens.
        if labels is not None:
            labels = self._without_inputs_only(labels)
            if supervised_logits_only:
                supervised_BT, kwargs["shift_labels"] = supervised_positions(labels)
                last = self.config.text_config.num_hidden_layers
                outputs["logits"] = self.lm_head(states[last][supervised_BT])
            outputs["loss"] = self._next_token_loss(outputs.logits, labels, **kwargs)

        # What is predicted of each image's embeddings.
        distilled = {}
        if output_predictions:
            num_images = 0
            if pixel_values is not None:
                num_images = pixel_values.shape[0]
            assert input_ids is not None
            packed_BT = packed_rows(attention_mask, position_ids)
            layout = ImageLayout.find(input_ids, attention_mask, num_images, self.config, packed_BT)
            distilled = self.distill(from_inputs_on(entered, states), layout, word_ids)
        return OlaVlmCausalLMOutputWithPast(**outputs, **distilled)

    def _hidden_states_to_keep(
        self, wanted: bool | int | list[int] | None, output_predictions: bool, supervised_logits_only: bool
    ) -> bool | int | list[int] | None:
        """`output_hidden_states`: what the caller wants, and what predictors and head read; as few as can be."""
        if wanted:
            # True: all of them, with ours among them.
            if output_predictions or supervised_logits_only:
                return True
            return wanted
        layers = []
        if output_predictions:
            layers = layers_of(self.config.tasks)
        if supervised_logits_only:
            layers = sorted({*layers, self.config.text_config.num_hidden_layers})
        return layers

    def _task_token_inputs(self) -> dict:
        """What the backbone needs to know of task tokens that aren't ordinary rows."""
        if not self.config.task_token_ids:
            return {}
        if self.task_tokens_from_queries:
            return {"task_token_embeds": self.task_token_embeddings()}
        if self.task_tokens_frozen and self.training:
            return {"freeze_task_tokens": True}
        return {}

    def _without_inputs_only(self, labels: Tensor) -> Tensor:
        """With tasks: labels, which may be a copy of `input_ids`, without image and task tokens."""
        if not self.config.tasks:
            return labels
        # `_suppress_token_ids` puts padding rows last. Counted from the front, as [:-0] would leave nothing.
        inputs_only = self.suppressed_token_ids[: len(self.suppressed_token_ids) - self.config.vocab_padding]
        return labels.masked_fill(torch.isin(labels, torch.tensor(inputs_only, device=labels.device)), -100)

    def _next_token_loss(self, logits: Tensor, labels: Tensor, **kwargs) -> Tensor:
        if self.config.tasks:
            # Tokens that are never emitted are no candidates: their rows in the head neither learn nor disturb.
            never = torch.tensor(self.suppressed_token_ids, device=logits.device)
            logits = logits.index_fill(-1, never, torch.finfo(logits.dtype).min)
        vocab_size = self.config.text_config.vocab_size
        return self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)

    def distill(self, states: Mapping[int, Tensor] | tuple, layout: ImageLayout, word_ids: Mapping | None) -> dict:
        """The fields of an output that embedding losses need."""
        return {
            "predictions": self.predict_embeddings(states, layout),
            "logit_scales": {name: scale[0] for name, scale in self.logit_scales().items()},
            "word_embeddings": self.word_embeddings(word_ids or {}),
        }


OlaVlmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
__all__ = ["EmbeddingPredictor", "OlaVlmForConditionalGeneration", "OlaVlmModel"]
