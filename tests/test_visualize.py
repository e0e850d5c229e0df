"""Decoding predictions into pictures, and the figure."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_teachers import GRID, random_images, save_tiny_teachers

from ola_vlm import visualize
from ola_vlm.targets.cache import TargetStatistics
from ola_vlm.targets.encoders import ENCODERS
from ola_vlm.visualize import VOID, comparison_figure, pad_to_square

COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folders = save_tiny_teachers(tmp_path_factory.mktemp("teachers"))
    return {name: ENCODERS[name].from_pretrained(folders[name], grid=GRID) for name in ("depth_anything", "oneformer")}


def test_pad_to_square():
    squared = pad_to_square(np.ones((2, 5, 3)), 0)
    assert squared.shape == (5, 5, 3)
    assert squared[1:3].all() and not squared[0].any() and not squared[3:].any()


@pytest.mark.parametrize("name", ["depth_anything", "oneformer"])
def test_predictions_figure(encoders, name, tmp_path, monkeypatch):
    encoder, images = encoders[name], random_images(2, size=(90, 30))
    truth = [np.random.default_rng(0).integers(0, 5, (30, 90)) for _ in images]
    path, shown = tmp_path / "new" / f"{name}.png", {}

    def spy(path, images, columns, *args, **options):
        shown.update(columns)
        comparison_figure(path, images, columns, *args, **options)

    monkeypatch.setattr(visualize, "comparison_figure", spy)
    targets = encoder.encode(images)
    statistics = TargetStatistics.fit([targets])
    predictions = {1: statistics.standardize(targets).requires_grad_(), 2: torch.zeros_like(targets)}
    classes = {"class_names": list("abcde"), "class_colors": COLORS}
    visualize.predictions_figure(path, encoder, images, predictions, truth, statistics, title="a title", **classes)
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] > 6 * 200 and picture.shape[0] > 2 * 200  # 6 columns, 2 rows
    assert picture.std() > 20
    assert list(shown) == ["truth", "teacher", "decoded target", "layer 1", "layer 2"]
    assert shown["layer 2"].shape == (2, 64, 64)
    torch.testing.assert_close(shown["decoded target"], encoder.decode(targets, images))
    torch.testing.assert_close(shown["layer 1"], shown["decoded target"], rtol=1e-3, atol=1e-3)


def test_comparison_figure_colours(tmp_path):
    image = Image.new("RGB", (8, 8))
    labels = np.full((8, 8), VOID)
    labels[:, 4:] = 2
    comparison_figure(tmp_path / "seg.png", [image], {"truth": [labels]}, "seg", ["a", "b", "c"], COLORS)
    colours = {tuple(colour) for colour in np.asarray(Image.open(tmp_path / "seg.png").convert("RGB")).reshape(-1, 3)}
    assert (216, 216, 216) in colours  # void: grey
    assert (44, 160, 44) in colours and (31, 119, 180) not in colours  # class 2's colour but not class 0's


def test_comparison_figure_errors(tmp_path):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="zip"):  # 2 pictures for 1 image
        comparison_figure(tmp_path / "x.png", [image], {"truth": [np.zeros((2, 2))] * 2}, "depth", [], [])
