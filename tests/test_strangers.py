"""Invariant 13: no file of a checkpoint, data set, benchmark or cache makes a command run code or leave its folder."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_teachers import GRID, save_depth_anything
from transformers import ViTConfig, ViTModel

from ola_vlm import visualize
from ola_vlm.eval.benchmarks import load_questions, locate
from ola_vlm.eval.dense import load_da2k
from ola_vlm.eval.target_tasks import coco_items
from ola_vlm.targets.files import inside, read_finished, teachers_of_file, whole_file, write_whole
from ola_vlm.targets.fill import Teacher
from ola_vlm.targets.images import ImageError, open_image
from ola_vlm.visualize import find_run, find_teachers

TASK = {"name": "depth", "layers": [2], "target_length": GRID**2, "target_dim": 32}


def save_evil_teacher(folder: Path, marker: Path) -> None:
    """A ViT that transformers knows, and code of its own for it, which leaves `marker` when it is imported."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**sizes, image_size=64, patch_size=8))
    model.save_pretrained(folder)
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import ViTModel\n"
    (folder / "evil.py").write_text(code + "class EvilModel(ViTModel):\n    pass\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.EvilModel"}}))
    preprocessing = {"size": 64, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))


@pytest.fixture
def checkpoint(make_model, tmp_path):
    """Of a stranger: its run.json names a teacher with code."""
    sizes = {"num_task_tokens": 1, "predictor_heads": 2, "predictor_head_dim": 8}
    model, processor = make_model([TASK | sizes])
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_evil_teacher(tmp_path / "teacher", tmp_path / "marker")
    entry = {"encoder": "vision", "path": str(tmp_path / "teacher"), "trust_remote_code": True}
    write_run(folder, {"depth": entry})
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    return folder


def write_run(folder: Path, teachers: dict, **fields) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"teachers": teachers, "tasks": [TASK], **fields}))


def test_a_checkpoints_teacher_runs_no_code(checkpoint, tmp_path):
    command = [str(checkpoint), str(tmp_path / "image.png"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="'trust_remote_code', which a file may not set to this: give the teachers"):
        visualize.main(command)
    run = json.loads((checkpoint / "run.json").read_text())
    (checkpoint / "run.json").write_text(json.dumps({"teachers": None, "started_from": run}))
    with pytest.raises(SystemExit, match="'trust_remote_code'"):
        visualize.main(command)
    del run["teachers"]["depth"]["trust_remote_code"]
    (checkpoint / "run.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit, match="VisionEncoder has no decoder"):  # it is loaded, by transformers' class
        visualize.main(command)
    assert not (tmp_path / "marker").exists()


def test_the_teacher_would_run_code_where_the_user_says_so(tmp_path):
    """Else the test above could not fail."""
    save_evil_teacher(tmp_path / "teacher", tmp_path / "marker")
    entry = {"encoder": "vision", "path": str(tmp_path / "teacher"), "trust_remote_code": True}
    write_run(tmp_path / "checkpoint", {"depth": entry})
    trusted = find_teachers(None, tmp_path / "checkpoint", trust=True)["teachers"]["depth"]
    with pytest.raises(ValueError, match="has no weights"):  # of the class's names; it has been imported
        Teacher(TASK, trusted).encoder.encode([])
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "field",
    [
        {"trust_remote_code": False},
        {"weights_only": False},
        {"use_safetensors": False},
        {"pickle_module": "dill"},
        {"cache_dir": "/tmp"},
        {"code_revision": "evil"},
        {"gguf_file": "x.gguf"},
        {"attn_implementation": "evil/kernel"},
        {"subfolder": "../../somewhere"},
        {"subfolder": "/somewhere"},
        {"revision": "../x"},
        {"batch_size": 10**9},
        {"dtype": {"": "float32"}},
        {"config": {"auto_map": {}}},
        {"config": {"model_args": {"checkpoint_path": "x.pth"}}},
    ],
)
def test_what_a_file_may_not_say_of_a_teacher(tmp_path, field):
    write_run(tmp_path, {"depth": {"encoder": "vision", "path": "org/name", **field}})
    with pytest.raises(ValueError, match=f"{next(iter(field))}', which a file may not set"):
        find_run(tmp_path)


def test_what_a_file_may_say_of_a_teacher(tmp_path):
    entry = {"encoder": "vision", "path": "org/name", "licence": "mit", "size": 384, "revision": "refs/pr/1"}
    entry |= {"config": {"model_args": {"dynamic_img_size": True}}, "dtype": "bfloat16", "subfolder": "image_encoder"}
    assert teachers_of_file({"depth": entry}, "run.json") == {"depth": entry}


def test_a_file_names_no_images_to_be_shown(tmp_path):
    """A page of layers would have them in it."""
    write_run(tmp_path, {"depth": {"encoder": "vision", "path": "x"}}, data=str(tmp_path), images=str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    assert visualize.images_of_run(find_run(tmp_path)) == []
    assert visualize.images_of_run(find_run(tmp_path, trust=True)) == [str(tmp_path / "private.png")]


@pytest.mark.parametrize("content", ["[1]", "{", '{"teachers": [1]}', '{"teachers": {"depth": 1}}', "\xff"])
def test_a_run_that_is_none(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"run\.json"):
        find_run(tmp_path)


class TestInside:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "folder" / "deeper").mkdir(parents=True)
        (tmp_path / "secret").write_text("")
        return tmp_path / "folder"

    @pytest.mark.parametrize("name", ["../secret", "deeper/../../secret", "/etc/passwd", "link", "linked/x", "..", ""])
    def test_outside(self, folder, name):
        (folder / "link").symlink_to("../secret")
        (folder / "linked").symlink_to(folder.parent)
        if name:
            with pytest.raises(ValueError, match="lies outside"):
                inside(folder, name)
        assert inside(folder, "deeper/x.png") == folder / "deeper" / "x.png"
        assert inside(folder, "deeper/../x.png").name == "x.png"

    def test_a_folder_that_is_a_link_itself(self, folder):
        (folder.parent / "short").symlink_to(folder)
        assert inside(folder.parent / "short", "deeper/x.png")

    def test_the_hubs_cache(self, tmp_path):
        repo = tmp_path / "datasets--org--name"
        snapshot = repo / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir()
        (repo / "blobs" / "4567").write_text("")
        (snapshot / "x.png").symlink_to("../../blobs/4567")
        (snapshot / "y.png").symlink_to("../../../secret")
        assert inside(snapshot, "x.png").exists()
        with pytest.raises(ValueError, match="lies outside"):
            inside(snapshot, "y.png")


def test_a_benchmarks_images_lie_in_its_folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    folder = tmp_path / "benchmark"
    (folder / "img").mkdir(parents=True)
    line = {"idx": 0, "type": "2D", "task": "Count", "source": "x", "prompt": "?", "choices": ["a"], "answer": "(A)"}
    for name in ("img/../../private.png", str(tmp_path / "private.png"), "img/link.png"):
        (folder / "test.jsonl").write_text(json.dumps(line | {"filename": name}) + "\n")
        if not (folder / "img" / "link.png").exists():
            (folder / "img" / "link.png").symlink_to(tmp_path / "private.png")
        with pytest.raises(ValueError, match="lies outside"):
            load_questions("miniature", folder)
    (folder / "annotations.json").write_text(json.dumps({"../private.png": []}))
    with pytest.raises(ValueError, match="lies outside"):
        load_da2k(folder)
    (folder / "Questions.csv").write_text("Index,Question,Options,Correct Answer\n../../private,?,(a) x (b) y,(a)\n")
    with pytest.raises(ValueError, match="lies outside"):
        load_questions("mmvp", folder)
    segments = {"image_id": 1, "segments_info": []}
    for file, mask in (("../../private.png", "x.png"), ("x.png", "../../private.png")):
        images = [{"id": 1, "file_name": file}]
        content = {"categories": [], "images": images, "annotations": [segments | {"file_name": mask}]}
        (folder / "panoptic_val2017.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="lies outside"):
            coco_items(folder)


def test_an_answers_file_makes_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"has no test\.jsonl: give --data"):
        locate("miniature", str(tmp_path / "anywhere"), make=False)
    assert not (tmp_path / "anywhere").exists()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


def damaged(kind: str, folder: Path) -> bytes:
    path = folder / "fine.jpg"
    if kind == "eps":
        return EPS
    if kind == "text":
        return b"no picture"
    if kind == "empty":
        return b""
    exif = Image.Exif()
    exif[0x010E] = "a description"
    exif[0x0112] = 6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(path, exif=exif.tobytes())
    content = bytearray(path.read_bytes())
    if kind == "cut":
        return bytes(content[: len(content) // 2])
    if kind == "exif":  # the description is a number, says its type
        content[content.index(b"Exif") + 17] = 7
        return bytes(content)
    header = bytearray((folder / "small.png").read_bytes())
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    return bytes(header)


@pytest.mark.parametrize("kind", ["eps", "text", "empty", "cut", "exif", "bomb"])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_one_error_for_every_picture_that_is_none(tmp_path, kind, as_bytes, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # it would be called
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    content = damaged(kind, tmp_path)
    (tmp_path / "x.png").write_bytes(content)
    source = {"bytes": content, "path": "x.png"} if as_bytes else str(tmp_path / "x.png")
    with pytest.raises(ImageError, match=r"x\.png: ") as caught:
        open_image(source)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_a_picture_that_another_opened_as_eps(tmp_path):
    (tmp_path / "x.eps").write_bytes(EPS)
    with Image.open(tmp_path / "x.eps") as opened, pytest.raises(ImageError, match="it is EPS"):
        open_image(opened)


def test_a_file_that_is_not_there_is_no_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "x.png")
    with pytest.raises(IsADirectoryError):
        open_image(tmp_path)


def test_whole_files(tmp_path):
    write_whole(tmp_path / "new" / "x.json", "ä")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "new" / "x.json") as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "new" / "x.json").read_bytes() == "ä".encode()
    assert os.listdir(tmp_path / "new") == ["x.json"]


def test_exists_is_not_done(tmp_path, caplog):
    assert read_finished(tmp_path / "x.json") is None and not caplog.text
    (tmp_path / "x.json").write_text('{"a": ')
    assert read_finished(tmp_path / "x.json") is None and "x.json is no JSON" in caplog.text


def test_a_tiny_teacher_of_a_file_is_loaded(tmp_path):
    """The rule keeps out fields, not teachers."""
    save_depth_anything(tmp_path / "teacher")
    write_run(tmp_path, {"depth": {"encoder": "depth_anything", "path": str(tmp_path / "teacher")}})
    entry = find_run(tmp_path)["teachers"]["depth"]
    assert Teacher(TASK, entry).encoder.target_dim == 32
