"""Decoding predictions into pictures, and the figure."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_teachers import GRID, random_images, save_tiny_teachers

from ola_vlm.targets.cache import TargetStatistics
from ola_vlm.targets.encoders import ENCODERS
from ola_vlm.visualize import VOID, comparison_figure, decode_predictions, pad_to_square, predictions_figure


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folders = save_tiny_teachers(tmp_path_factory.mktemp("teachers"))
    return {name: ENCODERS[name].from_pretrained(folders[name], grid=GRID) for name in ("depth_anything", "oneformer")}


@pytest.mark.parametrize("name", ["depth_anything", "oneformer"])
def test_decode_predictions(encoders, name):
    encoder, images = encoders[name], random_images(3)
    targets = encoder.encode(images)
    statistics = TargetStatistics.fit([targets])
    predictions = {2: statistics.standardize(targets).requires_grad_(), 4: torch.zeros_like(targets)}
    decoded = decode_predictions(encoder, predictions, images, statistics)
    assert set(decoded) == {2, 4} and decoded[4].shape == (3, 64, 64)
    expected = encoder.decode(targets, images).numpy()
    np.testing.assert_allclose(decoded[2], expected, rtol=1e-3, atol=1e-3)
    plain = decode_predictions(encoder, {2: targets}, images)
    np.testing.assert_allclose(plain[2], expected, rtol=1e-5, atol=1e-5)


def test_pad_to_square():
    squared = pad_to_square(np.ones((2, 5, 3)), 0)
    assert squared.shape == (5, 5, 3)
    assert squared[1:3].all() and not squared[0].any() and not squared[3:].any()


@pytest.mark.parametrize("name", ["depth_anything", "oneformer"])
def test_predictions_figure(encoders, name, tmp_path):
    encoder, images = encoders[name], random_images(2, size=(90, 30))
    truth = [np.random.default_rng(0).integers(0, 5, (30, 90)) for _ in images]
    path = tmp_path / "new" / f"{name}.png"
    predictions = {layer: torch.randn(2, 64, encoder.target_dim) for layer in (1, 2)}
    predictions_figure(path, encoder, images, predictions, truth, title="a title", class_names=list("abcde"))
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] > 6 * 200 and picture.shape[0] > 2 * 200  # 6 columns, 2 rows
    assert picture.std() > 20


def test_comparison_figure_colours(tmp_path):
    image = Image.new("RGB", (8, 8))
    labels = np.full((8, 8), VOID)
    labels[:, 4:] = 2
    comparison_figure(tmp_path / "seg.png", [image], {"truth": [labels]}, "seg", class_names=["a", "b", "c"])
    colours = {tuple(colour) for colour in np.asarray(Image.open(tmp_path / "seg.png").convert("RGB")).reshape(-1, 3)}
    assert (216, 216, 216) in colours  # void: grey
    assert (44, 160, 44) in colours and (31, 119, 180) not in colours  # class 2's colour but not class 0's
    comparison_figure(
        tmp_path / "own.png", [image], {"x": [labels]}, "seg", class_colors=["red", "#00ff00", "#0000ff"]
    )
    assert (0, 0, 255) in {tuple(one) for one in np.asarray(Image.open(tmp_path / "own.png").convert("RGB"))[150]}
    many = np.arange(64).reshape(8, 8)
    comparison_figure(tmp_path / "many.png", [image], {"truth": [many]}, "seg")


def test_comparison_figure_errors(tmp_path):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="use 'depth' or 'seg'"):
        comparison_figure(tmp_path / "x.png", [image], {}, "gen")
    with pytest.raises(ValueError, match="2 pictures for 1 images"):
        comparison_figure(tmp_path / "x.png", [image], {"truth": [np.zeros((2, 2))] * 2}, "depth")
