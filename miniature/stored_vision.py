"""The frozen vision tower's features of every image, computed once and read by all trials of a study.

A trial trains on images that it has seen in the trial before, through a tower that never learns: of a step of
pre-training that is a quarter of the time. Here a batch's `pixel_values` are the stored features, and the tower hands
them on. Rounding aside (batches of other sizes sum in another order) it is the same run.

N images, T the tower's tokens, W its width.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, TrainerCallback
from transformers.modeling_outputs import BaseModelOutput

from ..files.writing import whole_file, write_json
from ..targets.images import open_image
from ..training.collator import OlaVlmCollator, Sample

# The tower's layer that LLaVA reads.
LAYER = -2
# Images that go through the tower at a time.
BATCH = 100


def weights_hash(folder: Path) -> str:
    """Of a component's configuration, weights and tokenizer: its files, sorted by name."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        # A README changes no feature.
        if file.suffix in (".json", ".jinja", ".safetensors"):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class StoredVision:
    """Features by an image's file name, mapped from `folder`; every process of a machine shares the pages.

    `prepare` writes them: features_<hash of the tower>.npy (N, T, W) fp32, and .json, the names.
    """

    def __init__(self, folder: Path, names: Sequence[str], features_NTW: np.ndarray):
        self.folder = Path(folder)
        self.place = {name: place for place, name in enumerate(names)}
        self.features_NTW = features_NTW
        self.opened: dict[str, Image.Image] = {}

    @classmethod
    @torch.inference_mode()
    def prepare(cls, folder: Path, tower: Path, images: Sequence[Path]) -> "StoredVision":
        """Of `images`, whose names differ, computed unless they are there."""
        file = Path(folder) / f"features_{weights_hash(tower)}.npy"
        names = [path.name for path in images]
        listed = file.with_suffix(".json")
        # The same names in the same order: row n of the array is the nth image.
        if file.exists() and listed.exists() and json.loads(listed.read_text()) == names:
            return cls(folder, names, np.load(file, mmap_mode="r"))
        # As LLaVA's processor and tower do it, in float32.
        model = AutoModel.from_pretrained(tower, dtype=torch.float32).eval()
        processor = AutoImageProcessor.from_pretrained(tower)
        parts = []
        for start in tqdm(range(0, len(images), BATCH), desc="vision features", unit="batch"):
            opened = [open_image(path) for path in images[start : start + BATCH]]
            pixels = processor(images=opened, return_tensors="pt")["pixel_values"]
            parts.append(model(pixels, output_hidden_states=True).hidden_states[LAYER].numpy())
        with whole_file(file) as unfinished, unfinished.open("wb") as opened_file:
            np.save(opened_file, np.concatenate(parts))
        # The names last: without them the features don't count.
        write_json(listed, names)
        return cls(folder, names, np.load(file, mmap_mode="r"))

    def features(self, names: Sequence[str]) -> Tensor:
        """(N, T, W)."""
        places = [self.place[Path(name).name] for name in names]
        # Indexing by a list copies: the file is mapped read-only, and torch wants memory that it may write to.
        return torch.from_numpy(self.features_NTW[places])

    def open(self, path: str) -> Image.Image:
        """An image, for teachers and their caches; each file is decoded once."""
        # Kept for good: a study's images are small.
        if path not in self.opened:
            self.opened[path] = open_image(path)
        return self.opened[path]


class StoredCollator(OlaVlmCollator):
    """`OlaVlmCollator` whose `pixel_values` are the stored features (N, T, W). Images are opened for targets only."""

    def __init__(self, *arguments, store: StoredVision, **options):
        self.store = store
        super().__init__(*arguments, **options)

    def prepare(self, row: dict) -> Sample:
        # As in `OlaVlmCollator`, but the images stay paths, whose features are looked up.
        encoded = self.check_text(row)
        paths = row["images"][: encoded.num_images]
        # With shuffled targets the teachers see other images than the model.
        others = row.get("target_images", row["images"])[: encoded.num_images]
        target_images = []
        if self.target_sources:
            target_images = [self.store.open(path) for path in others]
        return Sample(str(row["id"]), encoded, paths, target_images)

    def _pixel_values(self, images: list) -> Tensor:
        # The blank image, by which the constructor finds out how many tokens an image becomes: it has real pixels.
        if isinstance(images[0], Image.Image):
            return super()._pixel_values(images)
        return self.store.features(images)


class EveryLayer:
    """The hidden states of a tower of which one layer is known: whichever is asked for is that one."""

    def __init__(self, features: Tensor):
        self.features = features

    # LLaVA asks for its own layer, which is the one that is stored.
    def __getitem__(self, layer: int) -> Tensor:
        return self.features


class StoredTower(nn.Module):
    """Stands in the tower's place: what it is given are the features already."""

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=pixel_values, hidden_states=EveryLayer(pixel_values))  # pyright: ignore[reportArgumentType] (indexed like the tuple of layers)


@contextmanager
def features_as_pixels(model) -> Iterator[None]:
    """Within the block the model's `pixel_values` are stored features."""
    tower = model.model.vision_tower
    model.model.vision_tower = StoredTower()
    try:
        yield
    finally:
        model.model.vision_tower = tower


class TrainOnFeatures(TrainerCallback):
    """The same for a training run; what it saves in the end has its tower again."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.tower = model.model.vision_tower
        model.model.vision_tower = StoredTower()

    def on_train_end(self, args, state, control, model, **kwargs):
        model.model.vision_tower = self.tower
