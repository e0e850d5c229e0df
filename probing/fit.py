"""Passes over images: each batch goes through the frozen model once, for all layers and tasks."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..targets.images import open_image
from .probes import save_tensors
from .resampler import ResamplerFit
from .ridge import RidgeFit
from .states import ImageStates, StateReader

# Task -> images -> targets (N, Q, E), such as a TargetCache.
TargetSources = Mapping[str, Callable[[list], Tensor]]
# Between saves: a ridge's statistics of an 8B model are about 13 GB.
SAVE_SECONDS = 300.0


# Decoding alone is left to the loader's workers; the model runs in the main process.
class _Images(Dataset):
    def __init__(self, sources: Sequence):
        self.sources = sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, i: int):
        return open_image(self.sources[i])


def batches(
    reader: StateReader,
    targets: TargetSources,
    sources: Sequence,
    plan: Sequence[Tensor] | int,
    workers: int = 0,
    describe: str | None = None,
    skip: int = 0,
) -> Iterator[tuple[ImageStates, dict[str, Tensor]]]:
    """States and targets of `sources` (images, paths, `{"bytes"}`), in batches of one size in their order or as a list
    of indices says, whose first `skip` are left out. `describe`: shows progress under this name."""
    if isinstance(plan, int):
        indices = [list(range(start, min(start + plan, len(sources)))) for start in range(0, len(sources), plan)]
    else:
        indices = [list(map(int, batch)) for batch in plan]
    # Skipped batches are not even decoded. A batch stays a list: the pictures in it may differ in size.
    loader = DataLoader(_Images(sources), batch_sampler=indices[skip:], num_workers=workers, collate_fn=list)
    # In images. The progress bar begins where an interrupted fit stopped.
    done = sum(map(len, indices[:skip]))
    total = done + sum(map(len, indices[skip:]))
    device = reader.model.device
    with tqdm(total=total, initial=done, desc=describe, unit="image", disable=describe is None) as bar:
        for images in loader:
            yield reader(images), {task: source(images).to(device) for task, source in targets.items()}
            bar.update(len(images))


def fit(
    fitter: RidgeFit | ResamplerFit,
    reader: StateReader,
    targets: TargetSources,
    sources: Sequence,
    batch_size: int = 32,
    workers: int = 0,
    describe: str | None = None,
    saved: Path | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> None:
    """All probes in one go over the `sources`. `saved`: a file that holds the fit so far, each `save_seconds` and at
    its end; with it there, the fit goes on from it, to the same result."""
    # The plan depends on the seed at most, so the number of finished batches says where to go on.
    plan = fitter.plan(len(sources), batch_size)
    done = 0
    if saved is not None and saved.exists():
        with safe_open(saved, "pt") as file:
            # In the header of the same file: the count can't disagree with the tensors.
            done = int(file.metadata()["batches"])
        # Where the model is: a ridge is solved where its statistics lie.
        state = load_file(saved)
        fitter.load_state({name: value.to(reader.model.device) for name, value in state.items()})
    last_save = time.monotonic()
    for states, of_images in batches(reader, targets, sources, plan, workers, describe, skip=done):
        fitter.update(states, of_images)
        done += 1
        # Also after the last batch: a ridge is solved from this file again when its alphas are chosen.
        is_due = time.monotonic() - last_save >= save_seconds or done == len(plan)
        # In the middle of a resampler's step gradients wait, which the file doesn't hold.
        if saved is not None and is_due and fitter.can_stop:
            save_tensors(fitter.state(), saved, {"batches": str(done)})
            last_save = time.monotonic()
