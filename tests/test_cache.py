"""The target cache: what is stored, damaged, interrupted or changed, its index of images, the targets' statistics."""

import errno
import importlib.util
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_teachers import GRID, random_images, save_depth_anything
from torch.utils.data import DataLoader

from ola_vlm.targets import cache as cache_module
from ola_vlm.targets import encoders
from ola_vlm.targets import fill as fill_module
from ola_vlm.targets.cache import BLOCK, STORAGE, OncePerBatch, TargetCache, image_key
from ola_vlm.targets.encoders import DepthAnythingEncoder
from ola_vlm.targets.fill import Teacher, fill, known_keys, make_teachers, open_caches
from ola_vlm.targets.statistics import TargetStatistics

TASK = {"name": "depth", "target_length": GRID * GRID, "target_dim": 32}


class FakeEncoder:
    """Targets (16, 8) that depend on the image's content; counts what it encodes."""

    fingerprint = "fake"

    def __init__(self, seconds: float = 0.0, stop_after: int | None = None):
        self.seconds, self.stop_after, self.encoded = seconds, stop_after, 0

    def encode(self, images):
        if self.stop_after is not None and self.encoded >= self.stop_after:
            raise KeyboardInterrupt
        time.sleep(self.seconds * len(images))
        self.encoded += len(images)
        seeds = [int(image_key(image)[:8], 16) for image in images]
        return torch.stack([torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.fixture
def paths(tmp_path):
    """10 image files of 32 x 32."""
    (tmp_path / "photos").mkdir()
    found = [str(tmp_path / "photos" / f"{i}.png") for i in range(10)]
    for path, image in zip(found, random_images(10, size=(32, 32)), strict=True):
        image.save(path)
    return found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "targets"


def fill_with(encoder, folder, paths, shard_size=4, **options) -> TargetCache:
    """The cache after a fill that nothing was refused in."""
    cache = TargetCache(folder, encoder.fingerprint, shard_size=shard_size)
    teacher = SimpleNamespace(encoder=encoder, entry={"path": "fake"})
    report = fill(folder, {"depth": teacher}, {"depth": cache}, paths, progress=False, **options)
    assert report.keys == known_keys(folder, paths) and not report.failed
    return cache


def opened(paths) -> list[Image.Image]:
    return [Image.open(path) for path in paths]


def assert_right(cache, paths):
    """What the cache gives is what the encoder would compute now."""
    torch.testing.assert_close(cache(opened(paths)), FakeEncoder().encode(opened(paths)), rtol=0, atol=0)


def shards(cache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


def test_image_key_is_the_content():
    image = random_images(1)[0]
    assert image_key(image) == image_key(image.copy()) == image_key(Image.fromarray(np.asarray(image)))
    assert image_key(image) == image_key(image.convert("RGBA"))
    changed = image.copy()
    changed.putpixel((5, 5), (1, 2, 3))
    assert image_key(changed) != image_key(image)
    flat = Image.new("RGB", (8, 2))
    assert image_key(flat) != image_key(Image.new("RGB", (2, 8)))  # the same bytes, another shape


def test_cached_equals_on_the_fly(paths, folder, tmp_path):
    torch.manual_seed(0)
    save_depth_anything(tmp_path / "teacher")
    teachers = make_teachers([TASK], {"depth": {"encoder": "depth_anything", "path": str(tmp_path / "teacher")}})
    caches = open_caches(folder, teachers)
    assert fill(folder, teachers, caches, paths, progress=False).failed == {}
    encoder = DepthAnythingEncoder.from_pretrained(tmp_path / "teacher", grid=GRID)
    order, images = [7, 0, 7, 3], opened(paths)
    expected = encoder.encode(images)[order]
    again = open_caches(folder, teachers)["depth"]
    for reader in (caches["depth"], again, pickle.loads(pickle.dumps(again))):
        assert reader.missing([image_key(image) for image in images]) == set()
        torch.testing.assert_close(reader([images[i] for i in order]), expected, rtol=1e-5, atol=1e-5)
        assert reader(images[:1]).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(64, 32\) from its teacher, \(64, 31\) from its configuration"):
        _ = Teacher(TASK | {"target_dim": 31}, teachers["depth"].entry).encoder
    mistyped = Teacher(TASK, teachers["depth"].entry | {"resize_mod": "pad"})
    with pytest.raises(
        ValueError, match=r"teachers\['depth'\] has the option 'resize_mod', which depth_anything does"
    ):
        _ = mistyped.encoder


def test_other_content_or_other_teacher_is_not_found(paths, folder):
    cache = fill_with(FakeEncoder(), folder, paths)
    changed = Image.open(paths[0])
    changed.putpixel((0, 0), (9, 9, 9))
    with pytest.raises(LookupError, match=r"1 of 2 images .*ola-vlm targets"):
        cache([Image.open(paths[1]), changed])
    assert len(cache) == 10 and len(TargetCache(folder, "another")) == 0
    assert len(TargetCache(folder, "fake")) == 10
    for storage in STORAGE:  # each numeric type has a cache of its own
        assert len(TargetCache(folder, "fake", storage)) == (10 if storage == "float32" else 0)
    with pytest.raises(ValueError, match=r"fake is not .*another.*'s teacher any more"):
        teacher = SimpleNamespace(encoder=FakeEncoder(), entry={"path": "fake"})
        fill(folder, {"depth": teacher}, {"depth": TargetCache(folder, "another")}, paths, progress=False)


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("float32", "targets are stored as exact as the teacher gave them"),
        ("int8", r"targets are stored rounded for storage: 1 - cosine to the teacher's own is \d\.\de-0\d"),
    ],
)
def test_how_exact_stored_targets_are_is_said_in_words(tmp_path, caplog, storage, said):
    targets = torch.randn(6, 16, 128, generator=torch.Generator().manual_seed(0))
    with caplog.at_level("INFO", logger="ola_vlm"):
        TargetCache(tmp_path, "fake", storage).store([f"{i:032x}" for i in range(6)], targets)
    assert re.search(said, caplog.text) and "cosine = -" not in caplog.text


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("width", [128, 12])
def test_storage(tmp_path, storage, width):
    """Errors and bytes; a few channels are far larger than the others, as in large vision transformers."""
    targets = torch.randn(6, 16, width, generator=torch.Generator().manual_seed(0))
    targets[:, :, 5] *= 100
    targets[1, 3] = 0
    cache = TargetCache(tmp_path, "fake", storage)
    keys = [f"{i:032x}" for i in range(6)]
    cache.store(keys, targets)
    assert not cache.failed
    cache.flush()
    read = cache.read(keys)
    assert read.dtype == torch.float32 and read[1, 3].equal(torch.zeros(width))
    as_stored = cache.read(keys, torch.float32 if storage == "int8" else STORAGE[storage])
    assert as_stored.dtype == (torch.float32 if storage == "int8" else STORAGE[storage])
    assert as_stored.float().equal(read)
    errors = 1 - torch.nn.functional.cosine_similarity(read.double(), targets.double(), dim=-1)[0]
    assert errors.max() < {"float32": 1e-12, "float16": 1e-6, "bfloat16": 1e-5, "int8": 1e-3}[storage]
    elsewhere = [channel for channel in range(width) if channel // BLOCK != 5 // BLOCK]
    if storage == "int8" and elsewhere:  # the large channel spoils its own block only
        part, exact = read[..., elsewhere], targets[..., elsewhere]
        assert ((part - exact).abs() <= exact.abs().amax(-1, keepdim=True) / 200).all()
    with safe_open(shards(cache)[0], "pt") as shard:
        stored = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (it is no dict)
    bits = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8 + 16 / min(64, 4 if width == 12 else 64)}[storage]
    assert sum(part.nbytes for part in stored.values()) == targets.numel() * bits / 8


def test_refused_targets_are_named_and_the_others_stored(paths, folder):
    class Bad(FakeEncoder):
        def encode(self, images):
            targets = super().encode(images)
            for target, image in zip(targets, images, strict=True):
                if image_key(image) == image_key(Image.open(paths[2])):
                    target[3, 4] = float("nan")
                if image_key(image) == image_key(Image.open(paths[5])):
                    target[0, 0] = 1e6
            return targets

    Path(paths[7]).write_bytes(Path(paths[7]).read_bytes()[:200])
    Path(paths[8]).write_bytes(Path(paths[2]).read_bytes())
    for storage, overflow in (("float16", {5}), ("bfloat16", set()), ("int8", set())):
        cache, encoder = TargetCache(folder, "fake", storage), Bad()
        for again in (False, True):  # what was refused is known from then on, also to those who only read
            teacher = SimpleNamespace(encoder=None if again else encoder, entry={})
            report = fill(folder, {"depth": teacher}, {"depth": cache}, paths, progress=False)
            failed = report.failed
            assert set(failed) == {2, 7, 8} | overflow and [i for i, key in enumerate(report.keys) if not key] == [7]
            assert f"{paths[2]}: depth: its target is not finite" in failed[2] and "OSError" in failed[7]
            assert not overflow or "overflows torch.float16" in failed[5]
            assert len(cache) == 10 - len(failed) and cache.read(cache_keys(cache)).isfinite().all()
            cache = TargetCache(folder, "fake", storage)
            assert cache.missing([key for key in report.keys if key]) == set()
        for path in cache.folder.glob("*.json"):
            path.write_text(path.read_text()[:-5])
        assert len(TargetCache(folder, "fake", storage).missing([key for key in report.keys if key])) == 1 + len(
            overflow
        )


@pytest.mark.parametrize("storage", ["uint8", "int16"])
def test_numbers_that_are_not_finite_are_refused(folder, storage):
    """As an integer NaN would be some word's number."""
    cache = TargetCache(folder, "fake", storage)
    numbers = torch.tensor([1.0, math.nan, 3.0])[:, None, None].expand(3, 4, 1)
    cache.store(["a", "b", "c"], numbers)
    cache.flush()
    assert cache.failed == {"b": "its target is not finite"} and len(cache) == 2
    assert cache.read(["a", "c"]).equal(numbers[[0, 2]])


def cache_keys(cache) -> list[str]:
    keys = []
    for path in shards(cache):
        with safe_open(path, "pt") as shard:
            keys += json.loads(shard.metadata()["rows"])
    return keys


def test_an_image_is_encoded_once(paths, folder):
    Image.open(paths[0]).save(paths[3])
    encoder = FakeEncoder()
    cache = fill_with(encoder, folder, paths)
    assert encoder.encoded == len(cache) == 9 and len(shards(cache)) == 3
    fill_with(encoder, folder, paths)
    assert encoder.encoded == 9


def test_interrupted_fill_resumes(paths, folder, monkeypatch):
    monkeypatch.setattr(fill_module, "BATCH", 2)
    with pytest.raises(KeyboardInterrupt):
        fill_with(FakeEncoder(stop_after=6), folder, paths)
    cache = TargetCache(folder, "fake")
    assert len(cache) == 4  # the whole shards
    old, young = cache.folder / "1.tmp", cache.folder / "2.tmp"  # of a killed process, of one that may be writing
    for path in (old, young):
        path.write_bytes(b"half a shard")
    os.utime(old, (time.time() - 7200,) * 2)
    encoder = FakeEncoder()
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 6 and young.exists() and not old.exists()


@pytest.fixture
def one_image_batches(monkeypatch):
    monkeypatch.setattr(fill_module, "BATCH", 1)


def start_writer(folder, paths, seconds: float):
    """A process that fills `folder`, one image a shard, `seconds` an image."""
    writer = multiprocessing.get_context("fork").Process(
        target=fill_with, args=(FakeEncoder(seconds), folder, paths), kwargs={"shard_size": 1}
    )
    writer.start()
    return writer


def test_killed_writer_loses_its_unfinished_shard_only(paths, folder, one_image_batches):
    writer = start_writer(folder, paths, seconds=0.1)
    while len(list(folder.glob("*/*.safetensors"))) < 3:
        assert writer.is_alive()
        time.sleep(0.01)
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    stored = len(TargetCache(folder, "fake"))
    assert 3 <= stored < 10
    encoder = FakeEncoder()
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 10 - stored


def test_two_writers_at_once(paths, folder, one_image_batches):
    writers = [start_writer(folder, paths, seconds=0.05) for _ in range(2)]
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    encoder = FakeEncoder()
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 0 and len(list(folder.rglob("*.tmp"))) == 0


def flip(path: Path, position: int):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x04
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["target", "key", "checksum", "shape", "length", "truncated", "emptied", "longer"])
def test_damaged_shard_is_never_read_and_recomputed(paths, folder, caplog, where):
    cache = fill_with(FakeEncoder(), folder, paths)
    shard = shards(cache)[1]
    content = shard.read_bytes()
    keys = json.loads(safe_open(shard, "pt").metadata()["rows"])
    if where in ("truncated", "emptied", "longer"):
        shard.write_bytes({"truncated": content[:-1], "emptied": b"", "longer": content + b"0"}[where])
    else:
        marks = {"key": next(iter(keys)), "checksum": str(next(iter(keys.values()))), "shape": "[4,16"}
        places = {name: content.index(mark.encode()) for name, mark in marks.items()}
        flip(shard, (places | {"target": len(content) - 5, "length": 1})[where])
    of_shard = [path for path in paths if image_key(Image.open(path)) in keys]
    for reader in (cache, TargetCache(folder, "fake")):  # that was open already, that is opened now
        good = 0
        for path in paths:
            try:
                assert_right(reader, [path])
                good += 1
            except LookupError as error:
                assert path in of_shard and "ola-vlm targets" in str(error)
        assert good == (9 if where == "target" else 6) or (reader is cache and where in ("key", "checksum"))
    caplog.clear()
    encoder = FakeEncoder()
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == (1 if where == "target" else 4)
    assert f"{shard} is damaged" in caplog.text and shard.exists() == (where == "target")
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == (1 if where == "target" else 4)


def test_each_shard_is_checked_once(paths, folder, monkeypatch):
    """A start reads none again that was right, and has the size and date that it had; damaged ones until they are of
    no use any more."""
    reads = []
    stored = TargetCache._stored
    monkeypatch.setattr(TargetCache, "_stored", lambda cache, at: reads.append(at) or stored(cache, at))

    def starts_and_reads() -> int:
        reads.clear()
        assert_right(fill_with(FakeEncoder(), folder, paths), paths)
        return len(reads) - len(paths)  # those of `assert_right` itself

    assert starts_and_reads() == 0 and starts_and_reads() == 0  # what a process wrote, it knows
    first, second, third = shards(TargetCache(folder, "fake"))
    os.utime(first)  # as by a copy
    assert starts_and_reads() == 4 and starts_and_reads() == 0
    flip(second, len(second.read_bytes()) - 5)
    assert starts_and_reads() == 4  # one of them is computed again, in a new shard
    assert starts_and_reads() == 3 and starts_and_reads() == 0
    for note in (folder / "fake-float32" / "checked").iterdir():
        note.write_bytes(note.read_bytes()[:-9] + b"\xff")  # as by a process that was killed
    assert starts_and_reads() > 0 and starts_and_reads() == 0

    # Of two processes each takes every second shard.
    for shard in shards(TargetCache(folder, "fake")):
        os.utime(shard)
    flip(third, len(third.read_bytes()) - 5)
    caches = [TargetCache(folder, "fake") for _ in range(2)]
    damaged = [key for index, cache in enumerate(caches) for key in cache.check(index, 2)]
    assert len(damaged) == 1
    for cache in caches:
        cache.forget(damaged)
        assert cache.missing(damaged) == set(damaged) and len(cache) == len(paths) - 1


def test_a_damaged_shard_of_the_future_is_mended(paths, folder):
    """A clock went back: what is computed anew must count as the newer one."""
    cache = fill_with(FakeEncoder(), folder, paths)
    shard = shards(cache)[1]
    later = shard.with_name(f"{time.time_ns() + 10**18:020d}-00000000.safetensors")
    shard.rename(later)
    flip(later, -5)
    encoder = FakeEncoder()
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 1
    last = max(shards(cache))
    last.rename(last.with_name(f"{'9' * 20}-ffffffff.safetensors"))  # one digit more comes after it
    flip(max(shards(cache)), -5)
    assert_right(fill_with(encoder, folder, paths), paths)
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 2


ODD_HEADERS = [
    [1, 2],
    {"key": "text"},
    {"key": True},
    {"key": -1},
    {"key": 2**64},
    {"k\u00e9y": 1},
    {"": 1},
    "text",
    None,
]


@pytest.mark.parametrize("rows", ODD_HEADERS)
def test_a_shard_that_is_valid_but_odd(paths, folder, caplog, rows):
    cache = fill_with(FakeEncoder(), folder, paths)
    text = json.dumps(rows)
    odd = cache.folder / "odd.safetensors"
    save_file({"targets": torch.zeros(1)}, odd, {"rows": text, "checksum": str(zlib.crc32(text.encode()))})
    encoder = FakeEncoder()
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 0 and f"{odd} is damaged" in caplog.text and not odd.exists()


@pytest.mark.parametrize("tensors", [{}, {"targets": torch.zeros(0, 16, 8)}, {"other": torch.zeros(3)}])
def test_a_shard_without_the_rows_that_it_names(paths, folder, tensors):
    cache = fill_with(FakeEncoder(), folder, paths)
    text = json.dumps({image_key(Image.open(paths[0])): 1})
    odd = cache.folder / f"{time.time_ns() + 10**18:020d}-0.safetensors"
    save_file(tensors, odd, {"rows": text, "checksum": str(zlib.crc32(text.encode()))})
    with pytest.raises(LookupError, match="is damaged"):
        TargetCache(folder, "fake").read([image_key(Image.open(paths[0]))])
    assert_right(fill_with(FakeEncoder(), folder, paths), paths)


@pytest.mark.parametrize("content", [b"[1]", b"5", b"{", b"\xff", b'{"key": 1}', b'{"k": null}', b"[" * 100_000])
def test_odd_hints_are_noticed_and_mended(paths, folder, caplog, content):
    """A list of refused images, the index of images."""
    cache = fill_with(FakeEncoder(), folder, paths)
    listed, index = cache.folder / "0.json", folder / "images" / "0.jsonl"
    (written,) = folder.glob("images/*.jsonl")
    listed.write_bytes(content)
    index.write_bytes(written.read_bytes() + content + b'\n[[1], 2, 3, "key"]\n["a", 1, 2, "k\\u00e9y"]\n')
    os.utime(index, (1, 1))
    written.unlink()
    encoder = FakeEncoder()
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 0 and str(listed) in caplog.text and f"{index} has 3 damaged lines" in caplog.text
    caplog.clear()
    fill_with(encoder, folder, paths)
    assert not listed.exists() and len(index.read_bytes().splitlines()) == 10 and "damaged" not in caplog.text


def test_hints_that_cannot_be_read(paths, folder, caplog):
    cache = fill_with(FakeEncoder(), folder, paths)
    (cache.folder / "0.json").mkdir()
    (folder / "images" / "0.jsonl").mkdir()
    assert_right(fill_with(FakeEncoder(), folder, paths), paths)
    assert "0.json" in caplog.text and "0.jsonl" in caplog.text and (cache.folder / "0.json").exists()


@pytest.mark.parametrize("fingerprint", ["../elsewhere", "/tmp/x", "a/b", "", ".hidden"])
def test_a_cache_lies_in_its_folder(folder, fingerprint):
    with pytest.raises(ValueError, match="is no encoder's fingerprint"):
        TargetCache(folder, fingerprint)


def test_changed_images_are_noticed(paths, folder):
    cache, encoder = fill_with(FakeEncoder(), folder, paths), FakeEncoder()
    stat = os.stat(paths[3])
    Image.open(paths[0]).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(paths[3])
    assert known_keys(folder, paths)[3] is None
    with pytest.raises(LookupError, match="1 of 10 images"):
        cache(opened(paths))
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 1
    # Again, and so that its size and date say nothing: the index is wrong, what is read is never wrong.
    for changed in (Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")):
        changed.save(paths[3], format="bmp")
        os.utime(paths[3], ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if changed.getpixel((0, 0))[0]:
            fill_with(encoder, folder, paths)
    cache = fill_with(encoder, folder, paths)
    assert encoder.encoded == 2 and None not in known_keys(folder, paths)
    with pytest.raises(LookupError, match=rf"not its size and date, delete {folder / 'images'} first"):
        cache(opened(paths))
    for file in (folder / "images").iterdir():
        file.unlink()
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 3


def test_full_disk_is_an_error_that_leaves_a_usable_cache(paths, folder, monkeypatch, caplog):
    """Also the first batch's notes are too much for it: those are done without."""
    append = Path.open

    def full(path, *mode, **options):
        if mode == ("a",):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return append(path, *mode, **options)

    def write_bytes(path, content):
        if len(list(path.parent.glob("*.safetensors"))) == 2:
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        with path.open("wb") as file:
            file.write(content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        patch.setattr(Path, "open", full)
        with pytest.raises(
            OSError, match=r"No space left on device: not written; .*make room and.*safetensors"
        ) as caught:
            fill_with(FakeEncoder(), folder, paths)
    assert caught.value.errno == errno.ENOSPC and "it will be found out again" in caplog.text
    cache, encoder = TargetCache(folder, "fake"), FakeEncoder()
    assert len(cache) == 8 and sorted(cache.folder.iterdir()) == shards(cache)
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 2


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC])
def test_a_cache_that_can_only_be_read(paths, folder, monkeypatch, caplog, tmp_path, error):
    """Its images at another place, its statistics not computed yet, its teacher's note not written."""
    fill_with(FakeEncoder(), folder, paths)
    save_depth_anything(tmp_path / "teacher")

    def refuse(path, *mode, **options):
        raise OSError(error, os.strerror(error), str(path))

    moved = [path.replace("photos", "moved") for path in paths]
    (tmp_path / "photos").rename(tmp_path / "moved")
    cache, append = TargetCache(folder, "fake"), Path.open
    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **k: refuse(path) if mode == "a" else append(path, mode, **k)
    )
    report = fill(folder, {}, {}, moved, progress=False)
    assert (
        not report.failed and cache.statistics(report.keys).mean.isfinite().all() and "found out again" in caplog.text
    )
    teacher = Teacher(TASK, {"encoder": "depth_anything", "path": str(tmp_path / "teacher")})
    assert teacher.fingerprint(folder) == teacher.encoder.fingerprint
    with pytest.raises(OSError, match="make room" if error == errno.ENOSPC else "not written: ") as caught:
        cache.store(["0" * 32] * 64, torch.zeros(64, 16, 8))
    assert caught.value.errno == error


def test_shards_that_cannot_be_opened_are_never_deleted(paths, folder, monkeypatch):
    """As without the right to, or with too many files open."""
    cache, really = fill_with(FakeEncoder(), folder, paths), Path.open
    stored = shards(cache)

    def refuse(path, *mode, **options):
        if path == stored[1]:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return really(path, *mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        for attempt in (lambda: cache(opened(paths)), lambda: fill_with(FakeEncoder(), folder, paths)):
            with pytest.raises(OSError, match="Too many open files"):
                attempt()
    encoder = FakeEncoder()
    assert_right(fill_with(encoder, folder, paths), paths)
    assert encoder.encoded == 0 and shards(cache) == stored


def test_remains_that_another_process_has_just_finished(paths, folder, monkeypatch):
    cache, stat = fill_with(FakeEncoder(), folder, paths), Path.stat
    old = [folder / "fake-1234.0.tmp", cache.folder / "1.tmp", cache.folder / "statistics-float32" / "1.tmp"]
    old[2].parent.mkdir()
    others, finished = folder / "notes.tmp", cache.folder / "2.tmp"
    for path in [*old, others, finished]:
        path.write_bytes(b"half")
        os.utime(path, (1, 1))

    def gone(path, **options):
        if path == finished:
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", gone)
    cache.remove_remains()
    assert sorted(folder.rglob("*.tmp")) == [others]


def test_index_spares_decoding(paths, folder, monkeypatch):
    decoded = []
    open_image = fill_module.open_image
    monkeypatch.setattr(fill_module, "open_image", lambda path: decoded.append(path) or open_image(path))
    encoder = FakeEncoder()
    fill_with(encoder, folder, paths[:7])
    assert decoded == paths[:7]
    os.utime(paths[1])  # looks changed
    fill_with(encoder, folder, paths)
    assert decoded[7:] == [paths[1], *paths[7:]] and encoder.encoded == 10
    assert fill(folder, {}, {}, paths, progress=False).failed == {} and len(decoded) == 11
    (lines,) = [file for file in (folder / "images").iterdir() if len(file.read_text().splitlines()) == 7]
    lines.write_text(lines.read_text()[:-20])  # cut off by a kill
    assert known_keys(folder, paths).count(None) == 1
    assert known_keys(folder, ["nowhere.png"]) == [None]


def test_workers_decode(paths, folder):
    encoder = FakeEncoder()
    assert_right(fill_with(encoder, folder, paths, workers=2), paths)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_read_by_a_loaders_workers(paths, folder, method):
    cache = fill_with(FakeEncoder(), folder, paths)
    loader = DataLoader(opened(paths), 5, num_workers=1, collate_fn=cache, multiprocessing_context=method)
    batches = list(loader)
    assert torch.cat(batches).equal(FakeEncoder().encode(opened(paths))) and batches[0].is_contiguous()


def test_reading_keeps_no_file_open_and_maps_no_shard_for_good(paths, folder):
    cache = fill_with(FakeEncoder(), folder, paths, shard_size=1)
    targets = cache(opened(paths))
    assert len(targets) == 10
    opened_files = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    assert not any(str(folder) in file for file in [*opened_files, Path("/proc/self/maps").read_text()])


def test_images_are_hashed_once_for_all_tasks(paths, folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(cache_module, "image_key", lambda image: hashed.append(image) or image_key(image))
    fill_with(FakeEncoder(), folder, paths)
    keys = OncePerBatch()
    tasks = [TargetCache(folder, "fake", batch_keys=keys) for _ in range(3)]
    images = opened(paths)
    assert all(cache(images).equal(FakeEncoder().encode(images)) for cache in tasks) and len(hashed) == 10
    tasks[0](list(images))
    assert len(hashed) == 20
    images = [image.copy() for image in images]
    tasks[0](images)
    images[2].putpixel((0, 0), (1, 2, 3))
    with pytest.raises(LookupError):
        tasks[0](images)


class TestTeacher:
    """Its fingerprint is known without loading it, until anything of it changes."""

    @pytest.fixture
    def entry(self, tmp_path):
        torch.manual_seed(0)
        save_depth_anything(tmp_path / "teacher")
        return {"encoder": "depth_anything", "path": str(tmp_path / "teacher")}

    @pytest.fixture
    def known(self, entry, folder):
        return Teacher(TASK, entry).fingerprint(folder)

    @pytest.fixture
    def loads(self, known, monkeypatch):
        """Teachers loaded from now on."""
        loaded, load = [], DepthAnythingEncoder.from_pretrained
        monkeypatch.setattr(DepthAnythingEncoder, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k))
        return loaded

    def test_unchanged(self, entry, known, loads, folder):
        assert Teacher(TASK, entry).fingerprint(folder) == known and not loads

    def test_moved_without_its_weights(self, entry, known, loads, folder):
        (Path(entry["path"]) / "model.safetensors").unlink()
        assert Teacher(TASK, entry).fingerprint(folder) == known and not loads

    def test_touched(self, entry, known, loads, folder):
        os.utime(Path(entry["path"]) / "model.safetensors", (1, 1))
        assert Teacher(TASK, entry).fingerprint(folder) == known and len(loads) == 1
        assert Teacher(TASK, entry).fingerprint(folder) == known and len(loads) == 1

    def test_what_changes_no_feature(self, entry, known, loads, folder):
        other = entry | {"batch_size": 2, "device": "cpu", "license": "none"}
        assert Teacher(TASK, other).fingerprint(folder) == known and not loads

    def test_other_version(self, entry, known, loads, folder, monkeypatch):
        for module in (encoders, fill_module):
            monkeypatch.setattr(module, "FEATURES_VERSION", 2)
        assert Teacher(TASK, entry).fingerprint(folder) != known and len(loads) == 1

    def test_tasks_that_differ_in_motion_share_one(self, entry):
        tasks = [TASK | {"name": name} for name in ("depth", "motion", "other")]
        entries = {"depth": entry, "motion": entry | {"motion": True}, "other": entry | {"dtype": "bfloat16"}}
        teachers = make_teachers(tasks, entries)
        assert teachers["depth"] is teachers["motion"] is not teachers["other"]

    def test_tasks_of_two_grids_share_none(self, entry):
        tasks = [TASK, TASK | {"name": "same"}, TASK | {"name": "coarse", "target_length": 4}]
        teachers = make_teachers(tasks, {task["name"]: entry for task in tasks})
        assert teachers["depth"] is teachers["same"] is not teachers["coarse"]

    def test_damaged_note(self, entry, known, loads, folder):
        (note,) = folder.glob("*.json")
        note.write_text(note.read_text()[:-5])
        assert Teacher(TASK, entry).fingerprint(folder) == known and len(loads) == 1

    @pytest.mark.parametrize("fingerprint", ["../elsewhere", "/elsewhere", "", 5, None])
    def test_odd_note(self, entry, known, loads, folder, fingerprint):
        """A fingerprint names a folder, in which damaged files are deleted."""
        (note,) = folder.glob("*.json")
        content = json.loads(note.read_text())
        for odd in ({**content, "fingerprint": fingerprint}, [fingerprint]):
            note.write_text(json.dumps(odd))
            assert Teacher(TASK, entry).fingerprint(folder) == known
        assert len(loads) == 2

    def test_other_weights(self, entry, known, loads, folder):
        torch.manual_seed(1)
        save_depth_anything(Path(entry["path"]))
        other = Teacher(TASK, entry).fingerprint(folder)
        assert other != known and Teacher(TASK, entry).fingerprint(folder) == other and len(loads) == 1

    def test_other_preprocessing(self, entry, known, loads, folder):
        values = Path(entry["path"]) / "preprocessor_config.json"
        values.write_text(values.read_text().replace("0.25", "0.26"))
        assert Teacher(TASK, entry).fingerprint(folder) != known

    def test_other_grid(self, entry, known, loads, folder):
        """A note of the same teacher's targets on another grid isn't believed, whichever came first."""
        coarse = TASK | {"target_length": 4}
        other = Teacher(coarse, entry).fingerprint(folder)
        assert other != known and other == Teacher(coarse, entry).encoder.fingerprint
        assert Teacher(TASK, entry).fingerprint(folder) == known == Teacher(TASK, entry).encoder.fingerprint

    def test_other_task_words(self, entry, known, loads, folder):
        """Whatever a recipe says of a teacher, but for what changes no feature, has a note of its own."""
        fields = {"resize_mode": "reference", "dtype": "bfloat16", "revision": "abc", "subfolder": "x", "layers": [1]}
        teacher = Teacher(TASK, entry)
        notes = {teacher._note(folder)}
        for name, value in fields.items():
            notes.add(Teacher(TASK, entry | {name: value})._note(folder))
        assert len(notes) == 1 + len(fields)

    def test_other_arguments(self, entry, known, loads, folder):
        assert Teacher(TASK, entry | {"dtype": "bfloat16"}).fingerprint(folder) != known

    def test_name_on_the_hub(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
        made = []
        entry = {"encoder": "clip_image", "path": "some/teacher", "subfolder": "image_encoder"}
        teacher = Teacher(TASK, entry)
        for commit in ("1" * 40, "2" * 40):
            repository = tmp_path / "hub" / "models--some--teacher"
            (repository / "snapshots" / commit / "image_encoder").mkdir(parents=True)
            (repository / "snapshots" / commit / "image_encoder" / "config.json").write_text("{}")
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text(commit)
            teacher.encoder = SimpleNamespace(fingerprint=f"depth-{commit[:4]}")
            made += [teacher.fingerprint(folder)]
            teacher.encoder = None
            assert teacher.fingerprint(folder) == made[-1]
        assert made == ["depth-1111", "depth-2222"]


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


def test_statistics_are_kept_with_the_cache(paths, folder, monkeypatch):
    cache = fill_with(FakeEncoder(), folder, paths)
    keys = [image_key(image) for image in opened(paths)]
    first = cache.statistics(keys)
    expected = TargetStatistics.fit([FakeEncoder().encode(opened(paths))])
    for one, other in zip(first, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not cache.statistics(keys[:5]).mean.equal(first.mean)
    assert not cache.statistics(keys[:5]).mean.equal(cache.statistics(keys[5:]).mean)  # as many, of other images
    with monkeypatch.context() as patch:
        patch.setattr(TargetCache, "read", None)
        assert all(map(torch.equal, TargetCache(folder, "fake").statistics(keys), first))
    kept = next(iter(sorted((cache.folder / "statistics-float32").iterdir())))
    flip(kept, len(kept.read_bytes()) - 5)
    assert all(map(torch.equal, TargetCache(folder, "fake").statistics(keys), first))
    assert len(TargetCache(folder, "fake")) == 10  # they are no targets


def test_the_benchmark_counts_the_images_of_a_short_batch(monkeypatch):
    """78 images in batches of 16: of the last one, which alone is timed, there are 14."""
    file = Path(__file__).parents[1] / "benchmarks" / "cache.py"
    spec = importlib.util.spec_from_file_location("cache_benchmark", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    class Reader(benchmark.Checked):
        def __call__(self, indices):
            return {"gen": torch.zeros(len(indices), 1, 2), "depth": torch.zeros(len(indices), 4, 3)}

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=iter([5, 7]).__next__))
    by_the_clock, _ = benchmark.images_per_second(Reader(images=[None] * 13, caches={}))
    assert by_the_clock == 14 / 2
    monkeypatch.setattr("sys.argv", ["cache.py", "--images", "10"])
    with pytest.raises(SystemExit):
        benchmark.main()
