"""Rows packed into sequences that are nearly full, so that hardly any padding is computed.

A row in a packed sequence is computed as if it were alone: transformers' masks keep rows apart where positions begin
anew, and predictors see their image's own row. So losses and gradients are those of the same rows in a padded batch.
"""

import copy
from bisect import bisect_left, insort
from collections import defaultdict
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_flash_attn_2_available

from .rows import Rows

# Of the model that shows whether a language model keeps packed rows apart: lengths of two rows, of a window of
# attention, and how many layers it has if not one of each kind.
PROBE_LENGTHS = (7, 6)
PROBE_WINDOW = 3
PROBE_LAYERS = 2
TOLERANCE = 1e-3


def pack_lengths(lengths: np.ndarray, max_length: int, seed: int) -> list[np.ndarray]:
    """Which rows go into each sequence of at most `max_length` tokens, by best-fit decreasing: the longest row that is
    left goes where the least room remains. Equally long rows are taken in a random order of `seed`; rows of a sequence
    are in the order of the data. Some seconds for a million rows. ValueError for a row that is longer than a sequence.
    """
    if len(lengths) > 0 and lengths.max() > max_length:
        longest = int(lengths.argmax())
        raise ValueError(f"row {longest} has {lengths[longest]} tokens, more than a sequence of {max_length}")
    # Shuffled, then sorted stably: equally long rows keep their random order.
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    decreasing = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    sequences = []
    # Number of tokens -> sequences that have room for just as many.
    by_room = defaultdict(list)
    # Its keys in order, so that the least room that suffices is found by bisection: at most `max_length` of them,
    # however many rows there are.
    rooms = []
    for row, length in zip(decreasing.tolist(), lengths[decreasing].tolist(), strict=True):
        # The sequence with the least room that suffices, or a new one.
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room = max_length
            sequence = []
            sequences.append(sequence)
        else:
            room = rooms[place]
            sequence = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        # It goes back by the room that is left; a full one is done.
        sequence.append(row)
        left = room - length
        if left > 0:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(sequence)
    return [np.sort(sequence) for sequence in sequences]


class PackedRows(Dataset):
    """Rows, of which the lengths are known (`Rows.keep`), as sequences: each item is the list of its rows.

    Which rows are together depends on lengths and seed only, so every rank and a resumed run find the same, and is the
    same in every epoch; the trainer's sampler draws sequences as it draws rows. `padding_free`: the collator joins
    those of a batch without padding.
    """

    def __init__(self, rows: Rows, max_length: int, seed: int, padding_free: bool = False):
        # `check_rows` has counted them.
        assert rows.lengths is not None
        self.rows = rows
        self.max_length = max_length
        self.padding_free = padding_free
        self.tokens = int(rows.lengths.sum())
        sequences = pack_lengths(rows.lengths, max_length, seed)
        # As two arrays: loaders' workers share them, and copy nothing.
        self.order = np.concatenate(sequences)
        self.stops = np.cumsum([len(sequence) for sequence in sequences])

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, i: int) -> list[dict]:
        start = 0
        if i > 0:
            start = self.stops[i - 1]
        return [self.rows[row] for row in self.order[start : self.stops[i]].tolist()]

    @property
    def rows_per_sequence(self) -> float:
        """Their mean number."""
        return len(self.rows) / len(self)

    @property
    def padding(self) -> float:
        """The share of padding in sequences that are filled up to `max_length`."""
        if self.padding_free:
            return 0.0
        return 1 - self.tokens / (len(self) * self.max_length)

    def describe(self) -> str:
        """For a run's plan."""
        what = f"{len(self):,} of up to {self.max_length:,} tokens"
        return f"{what}, {self.rows_per_sequence:.1f} rows each, {100 * self.padding:.1f}% of them padding"


# ---------------------------------------------------------------------------------------------------------- attention
def check_keeps_rows_apart(config: PreTrainedConfig) -> None:
    """ValueError if a language model of this configuration lets packed rows see each other, or can't be told positions
    that begin anew. It is tried on a model of its class with random weights, a few of its layers and few words."""
    kind = config.model_type
    parameters = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in parameters:
        reason = "its positions have several dimensions, which a row alone determines"
        raise ValueError(f"packing: {kind} can't take packed rows ({reason}): set packing=false")
    config = _smaller(config)
    # The run's own random numbers are drawn as if this model had never been made.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # As they are made, weights are so small that another row's tokens would hardly count.
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        embeds_1TH = torch.randn(1, sum(PROBE_LENGTHS), config.hidden_size)
    position_ids = torch.cat([torch.arange(length) for length in PROBE_LENGTHS])[None]
    # Two rows packed must give the states that each gives alone.
    with torch.no_grad():
        packed_1TH = model(inputs_embeds=embeds_1TH, position_ids=position_ids, use_cache=False).last_hidden_state
        rows = zip(embeds_1TH.split(PROBE_LENGTHS, dim=1), packed_1TH.split(PROBE_LENGTHS, dim=1), strict=True)
        for row_1TH, packed_row_1TH in rows:
            alone_1TH = model(inputs_embeds=row_1TH, use_cache=False).last_hidden_state
            difference = (alone_1TH - packed_row_1TH).abs().max() / alone_1TH.abs().max()
            if not difference < TOLERANCE:
                raise ValueError(f"packing: in {kind}, packed rows would see each other: set packing=false")


def _smaller(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same with few layers, of each kind one, with few words and a narrow feed-forward net: made in a second."""
    config = copy.deepcopy(config)
    # Layers of one kind, such as those with a window, may keep rows apart while those of another don't.
    kinds = vars(config).get("layer_types")
    if kinds:
        config.layer_types = list(dict.fromkeys(kinds))
        config.num_hidden_layers = len(config.layer_types)
    else:
        config.num_hidden_layers = min(config.num_hidden_layers, PROBE_LAYERS)
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(config, name, None):
            # Smaller than a row, or the window would hide nothing here.
            setattr(config, name, PROBE_WINDOW)
    config.vocab_size = 8
    config.pad_token_id = None
    config.intermediate_size = min(getattr(config, "intermediate_size", 64), 64)
    return config


def choose_attention(model: PreTrainedModel, use_cpu: bool, is_half: bool) -> bool:
    """On a GPU, lets the language model skip what lies between packed rows: by flash attention, if it is installed and
    the run computes in 16 bits, else by flex attention. Elsewhere a mask says so, and what it hides is computed.
    Returns whether it is flash attention, for which no sequence need be padded."""
    if use_cpu or not torch.cuda.is_available():
        return False
    language_model = cast(PreTrainedModel, model.get_decoder())
    if is_half and is_flash_attn_2_available() and language_model._supports_flash_attn:
        model.set_attn_implementation({"text_config": "flash_attention_2"})
        return True
    if language_model._supports_flex_attn:
        model.set_attn_implementation({"text_config": "flex_attention"})
    return False


def flash_arguments(config: PreTrainedConfig, position_ids: Tensor) -> dict:
    """Where packed rows begin, for flash attention, which else looks for them in batches of one sequence only; nothing
    for other kinds of attention."""
    if not is_flash_attention_requested(config.get_text_config()):
        return {}
    (starts_q, starts_k), (longest_q, longest_k) = prepare_fa_kwargs_from_position_ids(position_ids)
    return {
        "cu_seq_lens_q": starts_q,
        "cu_seq_lens_k": starts_k,
        "max_length_q": int(longest_q),
        "max_length_k": int(longest_k),
    }
