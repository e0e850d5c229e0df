"""The target cache and the targets' statistics."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_teachers import GRID, random_images, save_depth_anything

from ola_vlm.targets.cache import TargetCache, TargetStatistics, image_key
from ola_vlm.targets.encoders import DepthAnythingEncoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    torch.manual_seed(0)
    save_depth_anything(folder)
    return DepthAnythingEncoder.from_pretrained(folder, grid=GRID)


def test_image_key_is_the_content():
    image = random_images(1)[0]
    assert image_key(image) == image_key(image.copy()) == image_key(Image.fromarray(np.asarray(image)))
    assert image_key(image) == image_key(image.convert("RGBA"))
    changed = image.copy()
    changed.putpixel((5, 5), (1, 2, 3))
    assert image_key(changed) != image_key(image)
    flat = Image.new("RGB", (8, 2))
    assert image_key(flat) != image_key(Image.new("RGB", (2, 8)))  # the same bytes, another shape


def test_cached_equals_on_the_fly(encoder, tmp_path):
    images = random_images(10)
    done = []
    cache = TargetCache(tmp_path, encoder.fingerprint)
    assert cache.fill(encoder, iter(images), batch_size=4, progress=done.append, shard_size=4) == 10
    assert done == [4, 4, 2] and len(cache) == 10 and image_key(images[3]) in cache
    assert len(list(cache.folder.glob("*.safetensors"))) == 3
    for reader in (cache, TargetCache(tmp_path, encoder.fingerprint), pickle.loads(pickle.dumps(cache))):
        order = [7, 0, 7, 3]
        torch.testing.assert_close(
            reader([images[i] for i in order]), encoder.encode(images)[order], rtol=1e-5, atol=1e-5
        )
        assert reader([]).shape == (0, 64, 32)
    assert torch.equal(cache.read([image_key(images[2])]), cache([images[2]]))
    assert len(cache) == 10 and all(image_key(image) in cache for image in images)


def test_half_precision(encoder, tmp_path):
    images = random_images(3)
    cache = TargetCache(tmp_path, encoder.fingerprint, dtype=torch.float16)
    cache.fill(encoder, images)
    targets = cache(images)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets, encoder.encode(images), rtol=1e-3, atol=1e-4)
    assert len(TargetCache(tmp_path, encoder.fingerprint)) == 0  # another type is another cache


def test_other_content_or_other_teacher_is_not_found(encoder, tmp_path):
    images = random_images(2)
    cache = TargetCache(tmp_path, encoder.fingerprint)
    with pytest.raises(KeyError, match="0 of 0 images"):
        cache([])
    cache.fill(encoder, images)
    changed = images[0].copy()
    changed.putpixel((0, 0), (9, 9, 9))
    with pytest.raises(KeyError, match=r"1 of 2 images .* fill\(\) it"):
        cache([images[1], changed])
    other = DepthAnythingEncoder(encoder.model, 4, [0.5] * 3, [0.25] * 3)
    with pytest.raises(ValueError, match="belongs to"):
        cache.fill(other, images)
    assert len(TargetCache(tmp_path, other.fingerprint)) == 0


def test_interrupted_fill_resumes(encoder, tmp_path):
    images = random_images(10)

    def interrupted():
        yield from images[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TargetCache(tmp_path, encoder.fingerprint).fill(encoder, interrupted(), batch_size=2, shard_size=4)
    cache = TargetCache(tmp_path, encoder.fingerprint)
    assert len(cache) == 4  # the whole shards
    (cache.folder / "0123.99.tmp").write_bytes(b"half a shard")  # left by a killed process
    cache = TargetCache(tmp_path, encoder.fingerprint)
    assert cache.fill(encoder, images, batch_size=2, shard_size=4) == 6
    assert cache.fill(encoder, images) == 0
    torch.testing.assert_close(cache(images), encoder.encode(images), rtol=1e-5, atol=1e-5)


def test_an_image_is_encoded_once(encoder, tmp_path):
    images = random_images(2)
    cache = TargetCache(tmp_path, encoder.fingerprint)
    assert cache.fill(encoder, [images[0], images[1], images[0], images[0]], batch_size=3) == 2


def test_targets_that_half_precision_cannot_hold(encoder, tmp_path):
    class Loud:
        fingerprint = encoder.fingerprint

        def encode(self, images, batch_size):
            return torch.full((len(images), 1, 1), 1e6)

    with pytest.raises(ValueError, match=r"use torch\.float32"):
        TargetCache(tmp_path, encoder.fingerprint, torch.float16).fill(Loud(), random_images(1))


def test_statistics(tmp_path):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(40, 6, 5, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 10.0, 0.0])
    targets = targets + torch.randn(6, 5, generator=generator) * 30
    statistics = TargetStatistics.fit(targets.split(7))
    torch.testing.assert_close(statistics.mean_QE, targets.mean(0), rtol=1e-4, atol=1e-4)
    expected = (targets - targets.mean(0)).square().mean((0, 1)).sqrt()
    torch.testing.assert_close(statistics.std_E[:4], expected[:4], rtol=1e-4, atol=1e-4)
    assert statistics.std_E[4] == 1  # constant: left alone, never divided by zero

    standard = statistics.standardize(targets)
    torch.testing.assert_close(standard.mean(0), torch.zeros(6, 5), rtol=0, atol=1e-3)
    torch.testing.assert_close(standard.square().mean((0, 1)), torch.tensor([1.0, 1, 1, 1, 0]), rtol=1e-3, atol=1e-3)
    statistics.save(tmp_path / "new" / "depth.safetensors")
    loaded = TargetStatistics.load(tmp_path / "new" / "depth.safetensors")
    torch.testing.assert_close(loaded.restore(standard), targets, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no targets"):
        TargetStatistics.fit([])
