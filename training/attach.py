"""The method on any image-text-to-text model of transformers: tasks and predictors attached to it, taken off again.

The model stays what it is: the same weights, names, logits and `generate`. Shapes as in `modeling_ola_vlm`; the number
of an image's tokens differs from image to image, so which token belongs to which image comes with the batch
(`image_owner`), from the processor itself.
"""

from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from ..configuration_ola_vlm import VOCAB_MULTIPLE, normalize_task, task_token_strings
from ..modeling_ola_vlm import (
    ImageLayout,
    OlaVlmCausalLMOutputWithPast,
    OlaVlmForConditionalGeneration,
    Parameters,
    make_predictor,
)
from ..processing_ola_vlm import added_ids
from ..targets.loading import read_safetensors

PREDICTORS_FILE = "predictors.safetensors"
OWN = ("predictors", "queries", "logit_scales")  # what is added to the model, with the names of OLA-VLM's own


if TYPE_CHECKING:
    Mixed = PreTrainedModel
else:
    Mixed = object  # mixed into the class of a model


class AttachedPredictors(Mixed):
    """Mixed into a model's class by `attach_predictors`: `output_predictions=True` in `forward`, and two files in a
    checkpoint, the model's own and `PREDICTORS_FILE`."""

    accepts_loss_kwargs = True  # the loss is ours, so that accumulated micro-batches count by their tokens
    task_tokens_from_queries = task_tokens_frozen = False
    task_token_embeddings = OlaVlmForConditionalGeneration.task_token_embeddings
    lookup_scale = OlaVlmForConditionalGeneration.lookup_scale
    write_task_tokens = OlaVlmForConditionalGeneration.write_task_tokens
    predict_embeddings = OlaVlmForConditionalGeneration.predict_embeddings
    word_embeddings = OlaVlmForConditionalGeneration.word_embeddings
    distill = OlaVlmForConditionalGeneration.distill

    def forward(
        self,
        *args,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        image_owner: Tensor | None = None,
        output_predictions: bool = False,
        word_ids: dict[str, list[Tensor]] | None = None,
        **kwargs,
    ):
        """
        The model's own, with the loss of the next tokens. `output_predictions=True` returns an
        `OlaVlmCausalLMOutputWithPast` of `loss`, `logits`, `predictions`, `logit_scales` and the `word_embeddings` of
        `word_ids`; it needs, by name, `input_ids`, `attention_mask` and `image_owner` (B, T): the number of the image
        that a token belongs to, counted through the batch, -1 for none (`data.AttachedCollator`).
        """
        if output_predictions:
            if image_owner is None or not kwargs.keys() >= {"input_ids", "attention_mask"}:
                needs = "input_ids, attention_mask and image_owner by name, as AttachedCollator gives them"
                raise ValueError(f"output_predictions=True needs {needs}")
            layers = {layer for task in self.config.tasks for layer in task["layers"]}
            kwargs["output_hidden_states"] = sorted(layers)
        if self.training:
            kwargs.setdefault("use_cache", False)  # keys and values of all layers, which no training reads
        hook = nullcontext()
        frozen = self.task_tokens_frozen and self.training
        if self.config.task_token_ids and (self.task_tokens_from_queries or frozen):
            hook = self.get_input_embeddings().register_forward_hook(self._task_tokens_hook())
        with hook:
            outputs = super().forward(*args, **kwargs)
        if labels is not None:
            candidates = outputs.logits
            if self.config.task_token_ids:  # inputs only: their rows in the head neither learn nor disturb
                rows = candidates.shape[-1]
                padding = range(rows - self.config.vocab_padding, rows)
                never = torch.tensor([*self.config.task_token_ids, *padding], device=candidates.device)
                candidates = candidates.index_fill(-1, never, torch.finfo(candidates.dtype).min)
            count = {"vocab_size": candidates.shape[-1], "num_items_in_batch": num_items_in_batch}
            outputs["loss"] = self.loss_function(logits=candidates, labels=labels, **count)
        if not output_predictions:
            return outputs
        assert image_owner is not None  # checked above
        layout = image_layout(image_owner, kwargs["input_ids"], kwargs["attention_mask"], self.config)
        return OlaVlmCausalLMOutputWithPast(
            loss=outputs["loss"] if labels is not None else None,
            logits=outputs.logits,
            **self.distill(outputs.hidden_states, layout, word_ids),
        )

    def _task_tokens_hook(self):
        """The tables learn from the language model, or the rows get no gradient."""
        table = self.task_token_embeddings() if self.task_tokens_from_queries else None

        def replace(module, args, embeds_BTH):
            match_BTK = args[0][..., None] == torch.tensor(self.config.task_token_ids, device=args[0].device)
            own_BTH = embeds_BTH.detach() if table is None else table.to(embeds_BTH.dtype)[match_BTK.int().argmax(-1)]
            return torch.where(match_BTK.any(-1, keepdim=True), own_BTH, embeds_BTH)

        return replace

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """A checkpoint of the model's own class, and `PREDICTORS_FILE` beside it."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        own = {name: value for name, value in state_dict.items() if name.split(".")[0] in OWN}
        plain = {name: value for name, value in state_dict.items() if name not in own}
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=plain, **kwargs)
        if is_main_process:
            own = {name: value.cpu().contiguous() for name, value in own.items()}
            save_file(own, Path(save_directory) / PREDICTORS_FILE, metadata={"format": "pt"})

    def load_checkpoint(self, folder: str | Path):
        """All weights from a folder that `save_pretrained` wrote, by the model's own class, which knows the names in
        its files."""
        is_mixed = any(parameter.dtype is torch.float32 for parameter in self.parameters())
        dtype = torch.float32 if is_mixed else self.dtype  # what trains is float32, though the rest may have 16 bits
        plain = type(self).__bases__[1].from_pretrained(folder, dtype=dtype)
        self.load_state_dict(plain.state_dict() | read_safetensors(Path(folder) / PREDICTORS_FILE))


def attach_predictors(
    model: PreTrainedModel,
    tasks: list[dict],
    processor: ProcessorMixin | None = None,
    checkpoint: str | Path | None = None,
) -> PreTrainedModel:
    """
    Gives `model`, in place, an embedding predictor for each task and layer; returns it.

    Args:
        model: decoder-only, any that `AutoModelForImageTextToText` loads.
        tasks: `normalize_task`'s dicts; `config.tasks` from then on, also in the saved configuration.
        processor: needed for task tokens (`num_task_tokens` > 0) only, which join its tokenizer and its chat
            template, behind each image, and the model's vocabulary. Save it with the model.
        checkpoint: folder of `save_pretrained`, whose predictors are loaded; random ones without it.
    """
    base, text = type(model), model.config.get_text_config()
    if isinstance(model, AttachedPredictors):
        raise ValueError("the model has predictors already: detach_predictors takes them off")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{base.__name__} has an encoder for its text: take a decoder-only model")
    tasks = [normalize_task(task, text.hidden_size, text.num_hidden_layers) for task in tasks]
    names = [task["name"] for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"tasks are {names}: give one or more, each with its own name")
    token_ids = _add_task_tokens(model, processor, task_token_strings(tasks))

    predictors = nn.ModuleDict()
    queries = Parameters()
    logit_scales = Parameters()
    own = nn.ModuleDict({"predictors": predictors, "queries": queries, "logit_scales": logit_scales})
    for task in tasks:
        layers = {str(layer): make_predictor(task, text.hidden_size) for layer in task["layers"]}
        predictors[task["name"]] = nn.ModuleDict(layers)
        logit_scales[task["name"]] = nn.Parameter(torch.full((1,), 2.0))
        if task["num_task_tokens"] > 0:
            rows = max(task["target_length"], task["num_task_tokens"])
            queries[task["name"]] = nn.Parameter(torch.randn(rows, text.hidden_size))
    if checkpoint is not None:
        own.load_state_dict(read_safetensors(Path(checkpoint) / PREDICTORS_FILE))
    for name, module in own.to(model.device, model.dtype).items():
        model.add_module(name, module)

    @wraps(base.forward)  # its signature, which `generate` and the trainer look at
    def forward(self, *args, **kwargs):
        return AttachedPredictors.forward(self, *args, **kwargs)

    # The class of the model in hand is replaced, as torch's `fully_shard` does it. A wrapper would change the names of
    # its weights, and `generate`, the trainer and a sharded checkpoint would see another model; a hook can't add
    # arguments to `forward`. The name stays: it is written into checkpoints, and transformers looks up by it which
    # states a model records and how its files' names are converted.
    place = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    model.__class__ = type(base.__name__, (AttachedPredictors, base), {**place, "forward": forward})
    model.config.tasks = tasks
    model.config.task_token_ids = token_ids
    return model


def detach_predictors(model: PreTrainedModel) -> PreTrainedModel:
    """The model of its own class again, in place; with the rows of task tokens if there were any."""
    if AttachedPredictors not in type(model).__bases__:
        raise ValueError(f"{type(model).__name__} has no predictors, or is sharded")
    model.__class__ = type(model).__bases__[1]
    for name in OWN:
        delattr(model, name)
    for field in ("tasks", "task_token_ids", "vocab_padding"):
        delattr(model.config, field)
    return model


def _add_task_tokens(model: PreTrainedModel, processor: Any, tokens: list[str]) -> list[int]:
    """Their ids. In the chat template they follow the image's placeholder: as ordinary text between the image's
    tokens and what the template writes after it, so positions in several dimensions (M-RoPE) run on as for words.
    Sets `config.vocab_padding`: how many rows a vocabulary that had to grow has beyond its tokens."""
    # A saved model that had predictors knows.
    model.config.vocab_padding = getattr(model.config, "vocab_padding", 0)
    if not tokens:
        return []
    if processor is None:
        raise ValueError("task tokens need the processor, to write them after each image: give it")
    image, joined = processor.image_token, "".join(tokens)
    template = processor.chat_template or processor.tokenizer.chat_template or ""
    if joined not in template:  # saved with an attached model, it has them
        if image not in template:
            raise ValueError(f"the chat template doesn't spell out {image}: write {joined} after each image in it")
        processor.chat_template = template.replace(image, image + joined)
    known = processor.tokenizer.get_vocab()
    processor.tokenizer.add_tokens(tokens, special_tokens=True)
    added_ids(processor.tokenizer, known)  # or stops: they would take the rows of other tokens
    ids = processor.tokenizer.convert_tokens_to_ids(tokens)
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if max(ids) >= rows:
        num_tokens = max(ids) + 1
        resized = model.resize_token_embeddings(num_tokens, pad_to_multiple_of=VOCAB_MULTIPLE, mean_resizing=False)
        rows = cast(nn.Embedding, resized).num_embeddings
        model.config.vocab_padding = rows - num_tokens
    padding = range(rows - model.config.vocab_padding, rows)
    never = {*(model.generation_config.suppress_tokens or []), *ids, *padding}
    model.generation_config.suppress_tokens = sorted(never)
    return ids


def image_layout(image_owner: Tensor, input_ids: Tensor, attention_mask: Tensor, config) -> ImageLayout:
    """Where the images are, from `image_owner` (B, T); tokens beside the pixels' that belong to an image (tags of
    tiles) count as its own. ValueError if an image has no token or lacks its task tokens."""
    numbers_N = torch.arange(int(image_owner.max()) + 1, device=image_owner.device)
    is_first_NP = image_owner.flatten() == numbers_N[:, None]
    if not bool(is_first_NP.any(1).all()):
        raise ValueError(f"image_owner names {len(numbers_N)} images, but not each of them has a token")
    # OLA-VLM's rules for words and task tokens, with one token standing for each image.
    ids = input_ids.masked_fill(image_owner >= 0, -1)
    ids.view(-1)[is_first_NP.int().argmax(1)] = -2
    stand_in = SimpleNamespace(image_token_id=-2, task_token_ids=config.task_token_ids, tasks=config.tasks)
    layout = ImageLayout.find(ids, attention_mask, len(numbers_N), stand_in)
    owner_NT = image_owner[layout.sample_N]
    for group in ("system", "text"):
        layout.groups_NT[group] &= owner_NT < 0
    layout.groups_NT["image"] = owner_NT == numbers_N[:, None]
    layout.pixels_NT = layout.groups_NT["image"] & (input_ids == config.image_token_id)[layout.sample_N]
    return layout
