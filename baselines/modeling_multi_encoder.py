"""
The multi-encoder LLaVA: the paper's baselines *feature concat* and *token concat* (arXiv 2412.09585, Table 1).

It needs at inference what OLA-VLM needs in pre-training only: the target encoders, here frozen parts of the model.

Shapes: N images, V positions of the base grid, Q of an encoder's (V, or 1 for an embedding), E its width, C width of
the base features, S pixels a side, H LLM width.
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoBackbone,
    AutoConfig,
    CLIPVisionModelWithProjection,
    GenerationConfig,
    GenerationMixin,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaMultiModalProjector
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .configuration_multi_encoder import MultiEncoderLlavaConfig

# Custom code gets no checkpoint key conversion of its own.
for ours, theirs in {"multi_encoder_llava": "llava", "MultiEncoderLlavaModel": "LlavaModel"}.items():
    register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(theirs), overwrite=True)  # pyright: ignore[reportArgumentType] (LLaVA's is there)


class FrozenEncoder(nn.Module):
    """A target encoder's trunk, always in evaluation mode and without gradients."""

    def __init__(self, fields: dict, grid: int):
        """`fields`: an entry of `config.encoders`; `grid`: side of the base grid."""
        super().__init__()
        self.features = fields["features"]
        self.dim = fields["dim"]
        self.grid = grid
        config = AutoConfig.for_model(**fields["config"])
        # The class that has the projection to the embedding; a backbone gives feature maps alone.
        if self.features == "embedding":
            self.model = CLIPVisionModelWithProjection(config)  # pyright: ignore[reportArgumentType] (a CLIP's)
        else:
            self.model = AutoBackbone.from_config(config, trust_remote_code=False)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        # Some drop paths at random in training.
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        """(N, Q, E): what `targets.encoders` gives for the same pixels."""
        pixels = pixels_N3SS.to(self.model.dtype)
        if self.features == "embedding":
            return self.model(pixels).image_embeds[:, None]
        maps = self.model(pixels).feature_maps
        chosen = maps[-1]
        if self.features == "mean":
            chosen = torch.stack(maps).mean(0)
        # (N, Q + 1, E) of a ViT that keeps tokens, or maps (N, E, h, w).
        if chosen.ndim == 3:
            # Without the class token.
            return chosen[:, 1:]
        resized = F.interpolate(chosen, size=self.grid, mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)


def make_projector(config: MultiEncoderLlavaConfig, width: int) -> LlavaMultiModalProjector:
    """LLaVA's two layers for features of another width."""
    projector = LlavaMultiModalProjector(config)
    projector.linear_1 = nn.Linear(width, projector.linear_1.out_features, bias=config.multimodal_projector_bias)
    return projector


class MultiEncoderLlavaModel(LlavaModel):
    """
    LLaVA's backbone whose images go through several encoders.

    `pixel_values` (N, P) hold every encoder's own view of an image, flattened, one after the other, the base
    encoder's first: P is the sum of 3 * S * S. `MultiEncoderLlavaProcessor` makes them.
    """

    config_class = MultiEncoderLlavaConfig
    config: MultiEncoderLlavaConfig

    def __init__(self, config: MultiEncoderLlavaConfig):
        super().__init__(config)
        grid = math.isqrt(config.image_seq_length)
        self.encoders = nn.ModuleDict({fields["name"]: FrozenEncoder(fields, grid) for fields in config.encoders})
        widths = {fields["name"]: fields["dim"] for fields in config.encoders}
        # The width of the base features as LLaVA's projector takes them: of several layers, their widths in sum.
        self.base_dim = self.multi_modal_projector.linear_1.in_features
        if config.fusion == "feature":
            self.multi_modal_projector = make_projector(config, self.base_dim + sum(widths.values()))
        else:
            projectors = {name: make_projector(config, width) for name, width in widths.items()}
            self.encoder_projectors = nn.ModuleDict(projectors)
        self.post_init()

    def views(self, pixel_values: Tensor) -> list[Tensor]:
        """(N, 3, S, S) for the base encoder and each of the others. ValueError if the pixels aren't theirs."""
        sizes = [self.config.vision_config.image_size, *(encoder["size"] for encoder in self.config.encoders)]
        # Views of different sizes can't be stacked, so each is a piece of an image's row.
        lengths = [3 * size * size for size in sizes]
        if pixel_values.ndim != 2 or pixel_values.shape[1] != sum(lengths):
            expected = f"the views of encoders that see {sizes} pixels a side are (N, {sum(lengths)})"
            found = f"pixel_values have shape {tuple(pixel_values.shape)}"
            raise ValueError(f"{found}, {expected}: take the checkpoint's own processor.")
        parts = pixel_values.split(lengths, dim=1)
        return [part.unflatten(1, (3, size, size)) for part, size in zip(parts, sizes, strict=True)]

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """The vision tower's output; in its `pooler_output` each image's tokens for the LLM, a list of (T, H)."""
        num_images = len(pixel_values)
        if num_images == 0:
            # A blank one, of which nothing is taken: every rank of a training run gathers the same sharded weights,
            # whatever its rows hold, and has gradients, of zeros, for the same parameters.
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])

        # What each encoder sees: the base encoder V patches, C channels; the others (N, Q, E) each.
        base, *views = self.views(pixel_values)
        layers = vision_feature_layer
        if isinstance(layers, int):
            layers = [layers]
        # By default they are the configuration's.
        assert layers is not None
        outputs = self.vision_tower(base, output_hidden_states=layers, return_dict=True)
        # Without the class token.
        first = 0
        if vision_feature_select_strategy == "default":
            first = 1
        features_NVC = torch.cat([outputs.hidden_states[layer][:, first:] for layer in layers], dim=-1)
        others = {name: self.encoders[name](view) for name, view in zip(self.encoders, views, strict=True)}

        # Side by side in each token, or one after the other in the sequence.
        if self.config.fusion == "feature":
            repeated = [other_NQE.expand(-1, features_NVC.shape[1], -1) for other_NQE in others.values()]
            tokens_NTH = self.multi_modal_projector(torch.cat([features_NVC, *repeated], dim=-1))
        else:
            # (N, V, H), and behind it (N, num_encoder_tokens, H) of each encoder.
            tokens = [self.multi_modal_projector(features_NVC)]
            # Pooling also repeats a single embedding.
            for name, other_NQE in others.items():
                pooled = F.adaptive_avg_pool1d(other_NQE.transpose(1, 2), self.config.num_encoder_tokens)
                tokens.append(self.encoder_projectors[name](pooled.transpose(1, 2)))
            tokens_NTH = torch.cat(tokens, dim=1)
        if num_images == 0:
            return BaseModelOutputWithPooling(pooler_output=[tokens_NTH[:0]])  # pyright: ignore[reportArgumentType] (a list, as LLaVA's own)
        outputs.pooler_output = list(tokens_NTH)
        return outputs


# GenerationMixin by name: transformers wraps a class of remote code that lacks it, and a wrapped one can't be pickled.
class MultiEncoderLlavaForConditionalGeneration(LlavaForConditionalGeneration, GenerationMixin):
    """LLaVA with several encoders. Generation, loss and cache are LLaVA's."""

    config_class = MultiEncoderLlavaConfig
    config: MultiEncoderLlavaConfig

    def __init__(self, config: MultiEncoderLlavaConfig):
        # Not LLaVA's own, which would build a backbone first that is then replaced.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = MultiEncoderLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._suppress_token_ids()
        self.post_init()

    def _suppress_token_ids(self):
        """The image's, and the vocabulary's padding rows, which stand for no token."""
        rows = self.config.text_config.vocab_size
        # What somebody else bans stays; of ours, rows that were padding may have become tokens.
        former = getattr(self, "suppressed_token_ids", [])
        banned = [i for i in self.generation_config.suppress_tokens or [] if i not in former and i < rows]
        self.suppressed_token_ids = [self.config.image_token_id, *range(rows - self.config.vocab_padding, rows)]
        self.generation_config.suppress_tokens = [*self.suppressed_token_ids, *banned]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """LLaVA's: all `new_num_tokens` rows are tokens, those that `pad_to_multiple_of` adds are padding."""
        tokens = new_num_tokens
        if tokens is None:
            tokens = self.config.text_config.vocab_size - self.config.vocab_padding
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.vocab_padding = self.config.text_config.vocab_size - tokens
        self._suppress_token_ids()
        return embeddings

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Also takes the names that `save_pretrained` writes: `Trainer` resumes from its files through this method."""
        renamings = [t for t in get_model_conversion_mapping(self) if isinstance(t, WeightRenaming)]
        renamed = {rename_source_key(name, renamings, [])[0]: value for name, value in state_dict.items()}
        return super().load_state_dict(renamed, strict=strict, assign=assign)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | Tensor = 0,
        supervised_logits_only: bool = False,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        """LLaVA's forward. `supervised_logits_only=True`, as OLA-VLM's, needs `labels`: the same loss, but `logits`
        (S, vocabulary) of those S positions only whose next token has a label."""
        kwargs.update(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        if not supervised_logits_only:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **kwargs)  # pyright: ignore[reportReturnType] (no tuple: return_dict is not given)
        if labels is None:
            raise ValueError("supervised_logits_only=True leaves no logits without labels: pass labels.")
        # Position t predicts token t + 1; the last one predicts none.
        states = self.model(**kwargs).last_hidden_state
        next_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        has_label = next_labels != -100
        logits = self.lm_head(states[has_label])
        kwargs.update(vocab_size=self.config.text_config.vocab_size, shift_labels=next_labels[has_label])
        loss = self.loss_function(logits, labels, **kwargs)
        return LlavaCausalLMOutputWithPast(loss=loss, logits=logits)

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args, **kwargs
    ):
        """LLaVA's, never emitting `suppressed_token_ids`, even with a generation config that came without ours."""
        # What the given configuration bans, or else the model's own, is banned, too.
        banned = self.generation_config.suppress_tokens or []
        if generation_config is not None and generation_config.suppress_tokens is not None:
            banned = generation_config.suppress_tokens
        suppressed = sorted({*banned, *self.suppressed_token_ids})
        if generation_config is None:
            kwargs.setdefault("suppress_tokens", suppressed)
        elif "suppress_tokens" not in kwargs:
            # As an argument beside a generation config, transformers would warn of it.
            generation_config = copy.deepcopy(generation_config)
            generation_config.suppress_tokens = suppressed
        return super().generate(inputs, generation_config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] (GenerationMixin's, by another base)


MultiEncoderLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
__all__ = ["MultiEncoderLlavaForConditionalGeneration", "MultiEncoderLlavaModel"]
