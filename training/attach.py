"""The method on any image-text-to-text model of transformers: tasks and predictors attached to it, taken off again.

The model stays what it is: the same weights, names, logits and `generate`. Shapes as in `modeling_ola_vlm`; the number
of an image's tokens differs from image to image, so which token belongs to which image comes with the batch
(`image_owner`), from the processor itself.
"""

import json
from collections import defaultdict
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..configuration_ola_vlm import VOCAB_MULTIPLE, normalize_task, task_token_strings
from ..modeling_ola_vlm import (
    ImageLayout,
    OlaVlmCausalLMOutputWithPast,
    OlaVlmForConditionalGeneration,
    Parameters,
    from_inputs_on,
    inputs_kept,
    layers_of,
    make_predictor,
    states_kept,
)
from ..processing_ola_vlm import added_ids
from ..targets.loading import read_safetensors

PREDICTORS_FILE = "predictors.safetensors"
# What is added to the model, with the names of OLA-VLM's own.
OWN = ("predictors", "queries", "logit_scales")
# How predictors see an image: a field of the configuration, arguments of `AttachedCollator`.
VIEW = "image_view"


if TYPE_CHECKING:
    Mixed = PreTrainedModel
else:
    # Mixed into the class of a model.
    Mixed = object


class AttachedPredictors(Mixed):
    """Mixed into a model's class by `attach_predictors`: `output_predictions=True` in `forward`, and two files in a
    checkpoint, the model's own and `PREDICTORS_FILE`."""

    # The loss is ours, so that accumulated micro-batches count by their tokens.
    accepts_loss_kwargs = True
    # What a stage sets, as of OLA-VLM's own model, whose methods are used on any other.
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
        that a token belongs to, counted through the batch, -1 for none (`training.collator.AttachedCollator`).
        """
        # Predictors read the hidden states of their layers: these alone are kept.
        reading = nullcontext()
        if output_predictions:
            if image_owner is None or not kwargs.keys() >= {"input_ids", "attention_mask"}:
                needs = "input_ids, attention_mask and image_owner by name, as AttachedCollator gives them"
                raise ValueError(f"output_predictions=True needs {needs}")
            reading = states_kept(self, layers_of(self.config.tasks))
        if self.training:
            # A cache would hold keys and values of all layers, which no training reads.
            kwargs.setdefault("use_cache", False)

        # Only the hook of this one pass replaces task tokens' embeddings: the model's own code is never touched.
        hook = nullcontext()
        frozen = self.task_tokens_frozen and self.training
        if self.config.task_token_ids and (self.task_tokens_from_queries or frozen):
            hook = self.get_input_embeddings().register_forward_hook(self._task_tokens_hook())
        with hook, reading as states, inputs_kept(self, output_predictions) as entered:
            outputs = super().forward(*args, **kwargs)

        # The loss of the next tokens, over logits (B, T, vocabulary).
        if labels is not None:
            candidates = outputs.logits
            if self.config.task_token_ids:
                # Task tokens are inputs only: their rows in the head neither learn nor disturb.
                padding = padding_rows(self.config, candidates.shape[-1])
                never = torch.tensor([*self.config.task_token_ids, *padding], device=candidates.device)
                candidates = candidates.index_fill(-1, never, torch.finfo(candidates.dtype).min)
            count = {"vocab_size": candidates.shape[-1], "num_items_in_batch": num_items_in_batch}
            outputs["loss"] = self.loss_function(logits=candidates, labels=labels, **count)
        if not output_predictions:
            return outputs

        # What is predicted of each image's embeddings.
        assert image_owner is not None and states
        layout = image_layout(image_owner, kwargs["input_ids"], kwargs["attention_mask"], self.config)
        loss = None
        if labels is not None:
            loss = outputs["loss"]
        return OlaVlmCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            **self.distill(from_inputs_on(entered, states[0]), layout, word_ids),
        )

    def _task_tokens_hook(self):
        """The tables learn from the language model, or the rows get no gradient."""
        # (K, H), or nothing.
        table_KH = None
        if self.task_tokens_from_queries:
            table_KH = self.task_token_embeddings()

        def replace(module, args, embeds_BTH):
            ids_BT = args[0]
            match_BTK = ids_BT[..., None] == torch.tensor(self.config.task_token_ids, device=ids_BT.device)
            if table_KH is None:
                # Frozen rows: as they are looked up, without a gradient.
                own_BTH = embeds_BTH.detach()
            else:
                # Which of the K tokens it is; what isn't any of them takes row 0, and is left out below.
                own_BTH = table_KH.to(embeds_BTH.dtype)[match_BTK.int().argmax(-1)]
            return torch.where(match_BTK.any(-1, keepdim=True), own_BTH, embeds_BTH)

        return replace

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """A checkpoint of the model's own class, and `PREDICTORS_FILE` beside it."""
        if state_dict is None:
            state_dict = self.state_dict()
        # Apart, so that the model's own file loads without a word about unexpected weights.
        own = predictors_of(state_dict)
        plain = {name: value for name, value in state_dict.items() if name not in own}
        # First, as `push_to_hub=True` uploads the folder as it is when the model's own weights have been written.
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_predictors(own, self.config, save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=plain, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """The model's own: all `new_num_tokens` rows are tokens, those that `pad_to_multiple_of` adds are padding.
        ValueError if a task token's row would be lost."""
        largest_id = max(self.config.task_token_ids, default=-1)
        if new_num_tokens is not None and new_num_tokens <= largest_id:
            needs = f"task tokens have ids up to {largest_id}: keep at least {largest_id + 1} rows"
            raise ValueError(f"new_num_tokens is {new_num_tokens}, but {needs}")
        former = padding_rows(self.config, cast(nn.Embedding, self.get_input_embeddings()).num_embeddings)
        tokens = new_num_tokens
        if tokens is None:
            tokens = former.start
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        # Without task tokens there is no padding of ours.
        if self.config.task_token_ids:
            rows = cast(nn.Embedding, embeddings).num_embeddings
            self.config.vocab_padding = rows - tokens
            # Rows that were padding may have become tokens, and may be answered then.
            banned = {*(self.generation_config.suppress_tokens or [])} - {*former}
            self.generation_config.suppress_tokens = sorted({*banned, *padding_rows(self.config, rows)})
        return embeddings

    def load_checkpoint(self, folder: str | Path):
        """All weights from a folder that `save_pretrained` wrote. Its files are mapped into memory: no second model is
        made, and a rank that keeps a part of each weight reads little more."""
        mapping = get_model_conversion_mapping(self)
        renamings = [conversion for conversion in mapping if isinstance(conversion, WeightRenaming)]
        # Where files and model differ in names alone, no weight need be computed.
        if len(renamings) == len(mapping):
            weights = self._mapped_weights(Path(folder), renamings)
        else:
            # Weights of several names become one: its own class knows how. What trains is float32, though the rest may
            # have 16 bits.
            is_mixed = any(parameter.dtype is torch.float32 for parameter in self.parameters())
            dtype = self.dtype
            if is_mixed:
                dtype = torch.float32
            # The class before `_mix_in`: second of the two bases.
            weights = type(self).__bases__[1].from_pretrained(folder, dtype=dtype).state_dict()
        if self.config.tasks:
            weights.update(read_safetensors(Path(folder) / PREDICTORS_FILE))
        self.load_state_dict(weights)

    def _mapped_weights(self, folder: Path, renamings: list[WeightRenaming]) -> dict[str, Tensor]:
        """The weights of the model's own class by their names in it; one that the model ties by all of its names."""
        weights = {}
        for file in sorted(folder.glob("model*.safetensors")):
            for name, value in read_safetensors(file).items():
                own_name, *_ = rename_source_key(name, renamings, [])
                weights[own_name] = value
        # A file has a tied weight once, under one of its names; `load_state_dict` asks for all of them.
        same = defaultdict(list)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            same[id(parameter)].append(name)
        for names in same.values():
            saved = [weights[name] for name in names if name in weights]
            if not saved:
                continue
            for name in names:
                weights.setdefault(name, saved[0])
        return weights


def padding_rows(config: PreTrainedConfig, rows: int) -> range:
    """The last of a vocabulary's rows, which stand for no token."""
    return range(rows - config.vocab_padding, rows)


def load_predictors(model: PreTrainedModel, folder: str | Path) -> None:
    """Predictors, query tables and logit scales of a model that has some, attached or its own, from the folder of an
    adapter or of a checkpoint; nothing else changes."""
    own = read_safetensors(Path(folder) / PREDICTORS_FILE)
    for part in OWN:
        prefix = f"{part}."
        of_part = {name.removeprefix(prefix): value for name, value in own.items() if name.startswith(prefix)}
        getattr(model, part).load_state_dict(of_part)


def predictors_of(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a model's weights is of its predictors, query tables and logit scales."""
    return {name: value for name, value in state_dict.items() if name.split(".")[0] in OWN}


def write_predictors(weights: dict[str, Tensor], config: PreTrainedConfig, folder: str | Path) -> None:
    """`PREDICTORS_FILE` in the folder: what is added to a model, by its names there, and what `config` says of it (an
    adapter has no configuration of its own). No file without weights."""
    if not weights:
        return
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    # A safetensors file's metadata are texts.
    fields = {name: json.dumps(getattr(config, name)) for name in ("tasks", VIEW) if hasattr(config, name)}
    save_file(weights, Path(folder) / PREDICTORS_FILE, metadata={"format": "pt", **fields})


class PredictorFields(NamedTuple):
    """What a `PREDICTORS_FILE` says of its predictors; nothing if an earlier version wrote it, which said it in
    config.json alone. ValueError if it says something else."""

    tasks: list[dict]
    image_view: dict

    @classmethod
    def read(cls, file: str | Path) -> "PredictorFields":
        with safe_open(file, "pt") as opened:
            written = opened.metadata() or {}
        try:
            tasks = json.loads(written.get("tasks", "[]"))
            view = json.loads(written.get(VIEW, "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: its header is no JSON ({error}): fetch it again") from error
        if not isinstance(tasks, list) or not isinstance(view, dict):
            raise ValueError(f"{file}: its header must hold a list of tasks and an object of the view: fetch it again")
        return cls(tasks, view)


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
    # What can't be attached is refused before anything changes.
    text = model.config.get_text_config()
    _check_attachable(model)
    tasks = [normalize_task(task, text.hidden_size, text.num_hidden_layers) for task in tasks]
    names = [task["name"] for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"tasks are {names}: give one or more, each with its own name")
    token_ids = _add_task_tokens(model, processor, task_token_strings(tasks))

    # As `OlaVlmForConditionalGeneration` has them, under the same names.
    predictors = nn.ModuleDict()
    queries = Parameters()
    logit_scales = Parameters()
    own = nn.ModuleDict({"predictors": predictors, "queries": queries, "logit_scales": logit_scales})
    for task in tasks:
        layers = {str(layer): make_predictor(task, text.hidden_size) for layer in task["layers"]}
        predictors[task["name"]] = nn.ModuleDict(layers)
        # One element and not a scalar, which FSDP2 can't shard.
        logit_scales[task["name"]] = nn.Parameter(torch.full((1,), 2.0))
        if task["num_task_tokens"] > 0:
            # A group of queries for each task token, at least one.
            rows = max(task["target_length"], task["num_task_tokens"])
            queries[task["name"]] = nn.Parameter(torch.randn(rows, text.hidden_size))
    if checkpoint is not None:
        own.load_state_dict(read_safetensors(Path(checkpoint) / PREDICTORS_FILE))
    attached = _mix_in(model, own, tasks, token_ids)
    # Their rows begin as what the query tables stand for, also in a stage that keeps them as they are.
    if checkpoint is None and token_ids:
        cast(AttachedPredictors, attached).write_task_tokens()
    return attached


def without_predictors(model: PreTrainedModel) -> PreTrainedModel:
    """`attach_predictors` without a task, in place: the model itself, as the trainer and the collator of attached
    models take it. What it learns are next tokens alone: the baseline."""
    _check_attachable(model)
    own = nn.ModuleDict({"predictors": nn.ModuleDict(), "queries": Parameters(), "logit_scales": Parameters()})
    model.config.vocab_padding = getattr(model.config, "vocab_padding", 0)
    return _mix_in(model, own, tasks=[], token_ids=[])


def _check_attachable(model: PreTrainedModel) -> None:
    if isinstance(model, AttachedPredictors):
        raise ValueError("the model has predictors already: detach_predictors takes them off")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder for its text: take a decoder-only model")


def _mix_in(model: PreTrainedModel, own: nn.ModuleDict, tasks: list[dict], token_ids: list[int]) -> PreTrainedModel:
    """The model, of a class that also has `AttachedPredictors`, with the modules `own`."""
    base = type(model)
    for name, module in own.to(model.device, model.dtype).items():
        model.add_module(name, module)

    # With the signature of the model's own, which `generate` and the trainer look at.
    @wraps(base.forward)
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
    # A saved model that had predictors knows.
    model.config.image_view = getattr(model.config, VIEW, {})
    return model


def detach_predictors(model: PreTrainedModel) -> PreTrainedModel:
    """The model of its own class again, in place; with the rows of task tokens if there were any."""
    if AttachedPredictors not in type(model).__bases__:
        raise ValueError(f"{type(model).__name__} has no predictors, or is sharded")
    model.__class__ = type(model).__bases__[1]
    for name in OWN:
        delattr(model, name)
    for field in ("tasks", "task_token_ids", "vocab_padding", VIEW):
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
    # Into the chat template, behind each image. One that was saved with an attached model has them.
    image = processor.image_token
    joined = "".join(tokens)
    template = processor.chat_template or processor.tokenizer.chat_template or ""
    if joined not in template:
        if image not in template:
            raise ValueError(f"the chat template doesn't spell out {image}: write {joined} after each image in it")
        processor.chat_template = template.replace(image, image + joined)

    # Into the tokenizer; `added_ids` stops if they would take the rows of other tokens.
    known = processor.tokenizer.get_vocab()
    processor.tokenizer.add_tokens(tokens, special_tokens=True)
    added_ids(processor.tokenizer, known)
    ids = processor.tokenizer.convert_tokens_to_ids(tokens)

    # Into the model's tables, which often have spare rows: then nothing grows.
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if max(ids) >= rows:
        num_tokens = max(ids) + 1
        resized = model.resize_token_embeddings(num_tokens, pad_to_multiple_of=VOCAB_MULTIPLE, mean_resizing=False)
        rows = cast(nn.Embedding, resized).num_embeddings
        model.config.vocab_padding = rows - num_tokens

    # And never into an answer.
    never = {*(model.generation_config.suppress_tokens or []), *ids, *padding_rows(model.config, rows)}
    model.generation_config.suppress_tokens = sorted(never)
    return ids


def image_layout(image_owner: Tensor, input_ids: Tensor, attention_mask: Tensor, config) -> ImageLayout:
    """Where the images are, from `image_owner` (B, T); tokens beside the pixels' that belong to an image (tags of
    tiles) count as its own. ValueError if an image has no token or lacks its task tokens."""
    # P positions of the whole batch, row after row; `argmax` of booleans is the first True.
    numbers_N = torch.arange(int(image_owner.max()) + 1, device=image_owner.device)
    is_first_NP = image_owner.flatten() == numbers_N[:, None]
    if not bool(is_first_NP.any(1).all()):
        raise ValueError(f"image_owner names {len(numbers_N)} images, but not each of them has a token")
    # OLA-VLM's rules for words and task tokens, with one token standing for each image.
    ids = input_ids.masked_fill(image_owner >= 0, -1)
    ids.view(-1)[is_first_NP.int().argmax(1)] = -2
    stand_in = SimpleNamespace(image_token_id=-2, task_token_ids=config.task_token_ids, tasks=config.tasks)
    layout = ImageLayout.find(ids, attention_mask, len(numbers_N), stand_in)
    # Then the image's other tokens: out of the words, into the image.
    owner_NT = image_owner[layout.sample_N]
    for group in ("system", "text"):
        layout.groups_NT[group] &= owner_NT < 0
    layout.groups_NT["image"] = owner_NT == numbers_N[:, None]
    layout.pixels_NT = layout.groups_NT["image"] & (input_ids == config.image_token_id)[layout.sample_N]
    return layout
