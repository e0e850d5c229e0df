"""The order of rows in an epoch."""

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class GroupedSampler(Sampler[int]):
    """Batches of rows of similar length, with images or without as LLaVA does, in random order.

    A batch is an optimizer step's: all ranks and micro-batches. Rows that fill none come last, mixed. The order
    depends on seed and epoch only, so every rank and a resumed run draw the same.

    Args:
        lengths, has_image: one a row.
    """

    def __init__(self, lengths: np.ndarray, has_image: np.ndarray, batch_size: int, seed: int):
        self.lengths = lengths
        self.has_image = has_image
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        # Of its own, so that nothing else that draws random numbers changes the order.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches = []
        rest = []
        # Rows with images and rows without share no whole batch: a step of text alone costs no vision tower.
        for modality in (True, False):
            rows = np.flatnonzero(self.has_image == modality)
            if len(rows) > 0:
                lengths = self.lengths[rows].tolist()
                rows = rows[get_length_grouped_indices(lengths, self.batch_size, generator=generator)]
            whole = len(rows) // self.batch_size
            if whole:
                batches += np.split(rows[: whole * self.batch_size], whole)
            # The last ones, too few for a whole batch.
            rest.append(rows[whole * self.batch_size :])
        # Within a batch rows are in order of length; the batches themselves are not.
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter(np.concatenate([*(batches[i] for i in order), *rest]).tolist())
