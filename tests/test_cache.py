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


class Counting:
    """An encoder that counts the images it encodes."""

    def __init__(self, encoder):
        self.encoder, self.encoded = encoder, 0

    def encode(self, images):
        self.encoded += len(images)
        return self.encoder.encode(images)


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
    cache.fill(encoder, iter(images), shard_size=4, progress=done.append)
    assert done == [4, 4, 2] and len(cache.rows) == 10 and image_key(images[3]) in cache.rows
    assert len(list(cache.folder.glob("*.safetensors"))) == 3
    for reader in (cache, TargetCache(tmp_path, encoder.fingerprint), pickle.loads(pickle.dumps(cache))):
        order = [7, 0, 7, 3]
        torch.testing.assert_close(
            reader([images[i] for i in order]), encoder.encode(images)[order], rtol=1e-5, atol=1e-5
        )
        assert reader(images[:1]).dtype == torch.float32
    assert set(cache.rows) == {image_key(image) for image in images}


def test_other_content_or_other_teacher_is_not_found(encoder, tmp_path):
    images = random_images(2)
    cache = TargetCache(tmp_path, encoder.fingerprint)
    cache.fill(encoder, images)
    changed = images[0].copy()
    changed.putpixel((0, 0), (9, 9, 9))
    with pytest.raises(KeyError, match=r"1 of 2 images .* fill\(\) it"):
        cache([images[1], changed])
    other = DepthAnythingEncoder(encoder.model, 4, [0.5] * 3, [0.25] * 3)
    assert not TargetCache(tmp_path, other.fingerprint).rows


def test_interrupted_fill_resumes(encoder, tmp_path):
    images = random_images(10)

    def interrupted():
        yield from images[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TargetCache(tmp_path, encoder.fingerprint).fill(encoder, interrupted(), shard_size=4)
    cache = TargetCache(tmp_path, encoder.fingerprint)
    assert len(cache.rows) == 4  # the whole shards
    (cache.folder / "0123.99.tmp").write_bytes(b"half a shard")  # left by a killed process
    cache = TargetCache(tmp_path, encoder.fingerprint)
    counting = Counting(encoder)
    cache.fill(counting, images, shard_size=4)
    assert counting.encoded == 6
    cache.fill(counting, images)
    assert counting.encoded == 6
    torch.testing.assert_close(cache(images), encoder.encode(images), rtol=1e-5, atol=1e-5)


def test_an_image_is_encoded_once(encoder, tmp_path):
    images = random_images(2)
    cache = TargetCache(tmp_path, encoder.fingerprint)
    counting = Counting(encoder)
    cache.fill(counting, [images[0], images[1], images[0], images[0]], shard_size=3)
    assert counting.encoded == len(cache.rows) == 2


def test_statistics(tmp_path):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(40, 6, 5, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 10.0, 0.0])
    targets = targets + torch.randn(6, 5, generator=generator) * 30
    statistics = TargetStatistics.fit(targets.split(7))
    torch.testing.assert_close(statistics.mean, targets.mean(0), rtol=1e-4, atol=1e-4)
    expected = (targets - targets.mean(0)).square().mean((0, 1)).sqrt()
    torch.testing.assert_close(statistics.std[:4], expected[:4], rtol=1e-4, atol=1e-4)
    assert statistics.std[4] == 1  # constant: left alone, never divided by zero

    standard = statistics.standardize(targets)
    torch.testing.assert_close(standard.mean(0), torch.zeros(6, 5), rtol=0, atol=1e-3)
    torch.testing.assert_close(standard.square().mean((0, 1)), torch.tensor([1.0, 1, 1, 1, 0]), rtol=1e-3, atol=1e-3)
    statistics.save(tmp_path / "new" / "depth.safetensors")
    loaded = TargetStatistics.load(tmp_path / "new" / "depth.safetensors")
    torch.testing.assert_close(loaded.restore(standard), targets, rtol=1e-4, atol=1e-4)
