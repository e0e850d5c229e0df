"""Invariant 13: no file of a checkpoint, data set, benchmark or cache makes a command run code or leave its folder."""

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import random_image
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file
from tiny_teachers import GRID, save_depth_anything
from training_helpers import llava_sample, write_llava
from transformers import ViTConfig, ViTModel

from ola_vlm.commands.table import parse
from ola_vlm.convert import model_card, push
from ola_vlm.eval import target_tasks
from ola_vlm.eval.benchmarks import load_questions, locate
from ola_vlm.eval.correlation import read_points
from ola_vlm.eval.dense import load_da2k
from ola_vlm.eval.during_training import read_questions
from ola_vlm.eval.target_tasks import coco_items, miniature_items
from ola_vlm.files.escapes import TerminalFormatter, code, markdown, mathtext, one_line, terminal
from ola_vlm.files.strangers import inside, read_finished, teachers_of_file
from ola_vlm.files.writing import only_one, whole_file, write_whole
from ola_vlm.probing import features, visualize
from ola_vlm.probing.features import find_run, find_teachers
from ola_vlm.probing.figures import curves_figure
from ola_vlm.probing.probes import load_probes
from ola_vlm.recipes.miniature import WEIGHTS, WORD_TEACHERS
from ola_vlm.targets.fill import Teacher
from ola_vlm.targets.images import ImageError, open_image
from ola_vlm.world import render

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
        {"batch_size": 0},
        {"size": True},
        {"bins": [1, float("nan")]},
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
    entry = {"encoder": "vision", "path": "org/name", "license": "mit", "size": 384, "revision": "refs/pr/1"}
    entry |= {"config": {"model_args": {"dynamic_img_size": True}}, "dtype": "bfloat16", "subfolder": "image_encoder"}
    assert teachers_of_file({"depth": entry}, "run.json") == {"depth": entry}


def test_the_words_teachers_of_our_own_runs_may_be_named(tmp_path):
    teachers = {"words": WORD_TEACHERS}  # whose depth has bins, which are no whole numbers
    assert teachers_of_file(teachers, "run.json") == teachers
    bins = WORD_TEACHERS | {"depth": WORD_TEACHERS["depth"] | {"bins": ["/etc/passwd"]}}
    with pytest.raises(ValueError, match="'bins', which a file may not set"):
        teachers_of_file({"words": bins}, "run.json")
    certain = {"words": {"class": {**WORD_TEACHERS["class"], "threshold": 0.5}}}
    assert teachers_of_file(certain, "run.json") == certain
    for threshold in (1, 1.5, float("nan"), "0.5", True):
        certain["words"]["class"]["threshold"] = threshold
        with pytest.raises(ValueError, match="'threshold', which a file may not set"):
            teachers_of_file(certain, "run.json")
    # A class of which nothing is said has no word; a class always has a name.
    for words in (["red", None], {"background": None}):
        named = {"words": {"class": {**WORD_TEACHERS["class"], "words": words}}}
        assert teachers_of_file(named, "run.json") == named
    for words in ([["red"]], {"background": 3}, "red"):
        named = {"words": {"class": {**WORD_TEACHERS["class"], "words": words}}}
        with pytest.raises(ValueError, match="'words', which a file may not set"):
            teachers_of_file(named, "run.json")


def test_a_shipped_checkpoints_teachers_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in ("llava", "ola_vlm"):
        teachers = find_run(WEIGHTS / method)["teachers"]
        paths = {task: entry["path"] for task, entry in teachers.items()}
        assert paths == {task: str(WEIGHTS / task) for task in ("gen", "depth", "seg")}


def test_a_file_names_no_images_to_be_shown(tmp_path):
    """A page of layers would have them in it."""
    write_run(tmp_path, {"depth": {"encoder": "vision", "path": "x"}}, data=str(tmp_path), images=str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    assert features.images_of_run(find_run(tmp_path)) == []
    assert features.images_of_run(find_run(tmp_path, trust=True)) == [str(tmp_path / "private.png")]


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


def test_annotations_of_another_form_are_named(tmp_path):
    pair = {"point1": [0, 0], "point2": [1, 1], "closer_point": "point1"}
    (tmp_path / "annotations.json").write_text(json.dumps({"a.png": [pair]}))
    assert load_da2k(tmp_path) == {"a.png": [pair]}
    wrong = [{"closer_point": "Point1"}, {"point1": [0]}, {"point2": [0, 0.5]}, {"point2": 3}]
    for content in ({"a.png": 5}, {"a.png": [{"point1": [0, 0]}]}, *({"a.png": [pair | one]} for one in wrong)):
        (tmp_path / "annotations.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"annotations\.json: 'a\.png' has no pairs"):
            load_da2k(tmp_path)
    for content in ({}, {"categories": 5}, {"categories": [], "images": [], "annotations": [{}]}):
        (tmp_path / "panoptic_val2017.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"panoptic_val2017\.json is not as COCO's"):
            coco_items(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"tasks": 5}, {"num_layers": "x"}, {"about": [1]}, {"about": {"model": 5}}, {"hidden_size": 9}]
)
def test_probes_of_other_types_are_named(tmp_path, changes):
    """A checkpoint's own are looked at without being asked for."""
    shutil.copytree(WEIGHTS / "llava" / "probes", tmp_path / "probes")
    file = tmp_path / "probes" / "probes.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match="has no probes as `ola-vlm probe` writes them") as error:
        load_probes(tmp_path / "probes")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "is not as `ola-vlm probe` writes it"),
        ({"run": {"teachers": {}, "tasks": [5]}, "models": {}}, "is not as `ola-vlm probe` writes it"),
        ({"run": {"teachers": {}, "tasks": [{"name": "depth"}]}, "models": {}}, "names no teacher of"),
        ({"run": {"teachers": {}, "tasks": []}, "models": {}}, "has no models: run"),
        ({"run": {"teachers": {}, "tasks": []}, "models": {"m": {"folder": "m"}}}, r"writes it \(KeyError: 'name'\)"),
    ],
)
def test_results_of_probes_of_other_types_are_named(tmp_path, content, match):
    (tmp_path / "probes.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match):
        target_tasks.run(SimpleNamespace(out=tmp_path, trust_remote_code=False))


def test_points_of_files_of_another_form(tmp_path):
    """Of `ola-vlm correlation`."""
    model = {"weights": "w", "name": "m", "scores": {"depth": {"0": {"ridge": 0.5}}}}
    probed = {"run": {"probe": "ridge"}, "models": {"m": model}}
    run = {"weights": "w", "model": "m", "benchmark": "x", "variant": "y"}
    results = {"run": run, "scores": {"overall": {"score": 0.5, "standard_error": 0.1}}}
    form = r"is not as `ola-vlm probe` and `ola-vlm eval` write them \(\w+: "
    for of_probes, of_benchmark, plain, match in (
        ({}, results, False, form),
        ({**probed, "models": {"m": 5}}, results, False, form),
        (probed, {}, False, form),
        (probed, {**results, "scores": {"overall": 5}}, False, form),
        (probed, results, True, form),
        (probed, results, False, "got 1 checkpoints and 1 benchmarks"),
        ({**probed, "models": {"m": {**model, "scores": {}}}}, results, False, "got 0 checkpoints and 1 benchmarks"),
    ):
        (tmp_path / "probes.json").write_text(json.dumps(of_probes))
        (tmp_path / "results.json").write_text(json.dumps(of_benchmark))
        with pytest.raises(ValueError, match=match):
            read_points(tmp_path, [tmp_path], "overall", plain)


@pytest.mark.parametrize("text", ["x", "5", "{}", '{"encoder": "clip"}', '{"encoder": "clip", "path": 5}'])
def test_an_extractor_is_an_encoder_and_a_path(text):
    with pytest.raises(SystemExit, match=r"target-tasks: argument --features: .* (is no JSON|give \{)"):
        parse("target-tasks", ["out", "--features", text])
    given = {"encoder": "clip", "path": "x", "size": 8}
    assert parse("target-tasks", ["out", "--features", json.dumps(given)]).features == given


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
    if kind == "cut":
        random_image(0, (64, 64)).save(path)
        content = path.read_bytes()
        return content[: len(content) // 2]
    header = bytearray((folder / "small.png").read_bytes())
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    return bytes(header)


@pytest.mark.parametrize("kind", ["eps", "text", "empty", "cut", "bomb"])
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
    assert "0x" not in str(caught.value)


def exif_block(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_a_picture_is_turned_upright(tmp_path, name, orientation):
    random_image(0, (6, 4)).save(tmp_path / name, exif=exif_block(orientation))
    with Image.open(tmp_path / name) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    upright = open_image(tmp_path / name)
    assert upright.tobytes() == expected.tobytes()
    assert (expected.size == (4, 6)) == (orientation >= 5)
    # Teachers open again what the student was given.
    assert open_image(upright).size == expected.size and open_image(upright).tobytes() == expected.tobytes()


def test_a_picture_is_turned_whatever_else_its_exif_block_says(tmp_path):
    """Pillow reads a description that is a number, says its type, and can't write it back."""
    random_image(0, (6, 4)).save(tmp_path / "x.jpg", exif=exif_block(6))
    with Image.open(tmp_path / "x.jpg") as stored:
        expected = stored.transpose(Image.Transpose.ROTATE_270)
    content = bytearray((tmp_path / "x.jpg").read_bytes())
    content[content.index(b"Exif") + 17] = 7
    (tmp_path / "x.jpg").write_bytes(content)
    for source in (tmp_path / "x.jpg", {"bytes": bytes(content)}):
        assert open_image(source).tobytes() == expected.tobytes()


def odd_exif(kind: str) -> dict:
    """How a picture is saved with a block that isn't one, by what Pillow raises of it."""
    texts = PngInfo()
    if kind == "SyntaxError":
        return {"exif": b"no block"}
    if kind == "struct.error":
        return {"exif": exif_block(6)[:12]}
    if kind == "ValueError":
        texts.add_text("Raw profile type exif", "\nexif\n2\nno digits\n")
    if kind == "TypeError":
        texts.add_text("xmp", "a text")
    return {"pnginfo": texts}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.png", "SyntaxError"),
        ("x.webp", "SyntaxError"),
        ("x.png", "struct.error"),
        ("x.webp", "struct.error"),
        ("x.png", "ValueError"),
        ("x.png", "TypeError"),
    ],
)
def test_a_picture_with_an_odd_exif_block_is_whole(tmp_path, name, kind):
    random_image(0).save(tmp_path / name, lossless=True, **odd_exif(kind))
    assert open_image(tmp_path / name).tobytes() == random_image(0).tobytes()
    content = (tmp_path / name).read_bytes()
    with pytest.raises(ImageError, match="give a whole file"):
        open_image({"bytes": content[:1000]})


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    # Pillow would wait for someone to write into it, for ever.
    signal.alarm(20)
    try:
        with pytest.raises(ImageError, match=r"x\.png: it is no file"):
            open_image(tmp_path / "x.png")
    finally:
        signal.alarm(0)


def test_a_row_that_names_a_picture_and_has_none():
    with pytest.raises(ImageError, match=r"a/x\.png: the row has no bytes of it"):
        open_image({"bytes": None, "path": "a/x.png"})


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


def test_one_process_a_folder(tmp_path):
    with only_one(tmp_path):
        with pytest.raises(ValueError, match="another process is writing to"), only_one(tmp_path):
            pass
        with only_one(tmp_path / "nowhere"):
            assert not list(tmp_path.iterdir())
    with only_one(tmp_path):
        pass


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


def test_pushed_files_lie_in_the_checkpoint(checkpoint, tmp_path):
    """Not where a link, an auto_map or run.json leads."""
    secret = tmp_path / "secret"
    (secret / "target_statistics").mkdir(parents=True)
    (secret / "target_statistics" / "private.safetensors").write_bytes(b"private")
    run = json.loads((checkpoint / "run.json").read_text()) | {"teachers": None, "checkpoint": str(secret)}
    (checkpoint / "run.json").write_text(json.dumps(run))
    assert all(path.is_relative_to(checkpoint) for path in push.find_files(checkpoint).values())

    (secret / "notes.py").write_text("private")
    config = json.loads((checkpoint / "config.json").read_text())
    for module in (str(secret / "notes"), "../secret/notes", ""):
        (checkpoint / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": f"{module}.X"}}))
        with pytest.raises(ValueError, match="which is no module"):
            push.find_files(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "cli.X"}}))
    with pytest.raises(ValueError, match=r"lacks cli\.py"):
        push.find_files(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(config))

    for name in ("vocab.json", "model-2.safetensors", "target_statistics/depth.safetensors", "probes/probes.json"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).symlink_to(secret / "notes.py")
        with pytest.raises(ValueError, match=f"{name}' lies outside"):
            push.find_files(checkpoint)
        (checkpoint / name).unlink()
    (checkpoint / "probes").rmdir()
    (checkpoint / "probes").symlink_to(secret)
    (secret / "probes.json").write_text("{}")
    with pytest.raises(ValueError, match=r"probes\.json' lies outside"):
        push.find_files(checkpoint)


def test_what_a_pushed_folder_says_is_one_line(tmp_path):
    def copied(name: str) -> Path:
        shutil.copytree(WEIGHTS / "ola_vlm", tmp_path / name)
        return tmp_path / name

    os.mkfifo(copied("pipe") / "vocab.json")
    (copied("index") / "model.safetensors.index.json").write_text("{}")
    fields = json.loads((WEIGHTS / "ola_vlm" / "config.json").read_text())
    (copied("code") / "config.json").write_text(json.dumps(fields | {"auto_map": 5}))
    for name, message in [
        ("pipe", r"vocab\.json is no file"),
        ("index", "has no weight_map"),
        ("code", "its auto_map is 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            push.find_files(tmp_path / name)
    adapter = copied("adapter")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": 5}')
    with pytest.raises(SystemExit, match="names no base model: give its --base"):
        push.main([str(adapter), "me/x", "--dry-run"])
    run = json.loads((WEIGHTS / "ola_vlm" / "run.json").read_text())
    (copied("run") / "run.json").write_text(json.dumps(run | {"learning_rate": "<b>"}))
    with pytest.raises(SystemExit, match=r"not as our commands write them \(TypeError: learning_rate is '<b>'"):
        push.main([str(tmp_path / "run"), "me/x", "--dry-run"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "image": "../a.png"}, "question 0: its image: .*lies outside"),
        ({"question": "q", "image": 5}, "question 0: its image is 5, it must be a text"),
        ({"question": ["q"], "image": "a.png"}, "question 0: its question is .*must be a text"),
    ],
)
def test_questions_during_training_show_images_of_their_folder(tmp_path, row, message):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "questions.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "questions.json", tmp_path / "images")


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("model.safetensors.index.json", {}, r"index\.json has no weight_map of names to files: fetch it again"),
        ("model.safetensors.index.json", {"weight_map": ["x"]}, "has no weight_map of names to files"),
        ("config.json", {"auto_map": ["x"]}, r"its auto_map is \['x'\]: it must name classes"),
        ("config.json", {"auto_map": {"AutoModel": ["../x.A", None]}}, "names the file '', which is no module"),
        ("config.json", {"model_type": ["llava"]}, r"has the model_type \['llava'\]: it must be a name"),
        ("config.json", {"model_type": None}, "has the model_type None: it must be a name"),
        ("run.json", {"checkpoint": 5, "stage": "x"}, "run.json or the results are not as our commands write them"),
    ],
)
def test_what_would_be_pushed_is_looked_at(checkpoint, tmp_path, file, content, match):
    fields = {}
    if file == "config.json":
        fields = json.loads((checkpoint / file).read_text())
    (checkpoint / file).write_text(json.dumps(fields | content))
    with pytest.raises(SystemExit, match=match):
        push.main([str(checkpoint), "me/x", "--dry-run"])


def test_an_adapter_that_names_no_base(tmp_path):
    for name in ("adapter_config.json", "processor_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SystemExit, match=r"adapter_config\.json names no base model: give its --base REPO"):
        push.main([str(tmp_path), "me/x", "--dry-run"])
    (tmp_path / "run.json").write_text(json.dumps({"started_from": "x"}))
    with pytest.raises(SystemExit, match=r"run\.json or the results are not as our commands write them"):
        push.main([str(tmp_path), "me/x", "--base", "me/y", "--dry-run"])


def test_paths_of_this_machine_are_not_pushed(tmp_path):
    about = {"model": str(tmp_path / "mine"), "prompt": "what / is this", "base": "org/name"}
    expected = {"model": "mine", "prompt": "what / is this", "base": "org/name"}
    assert push.without_paths({"about": [about], "seed": 0}) == {"about": [expected], "seed": 0}


NASTY = "a|b\nc <img src=x onerror=alert(1)> `d` [e](http://f) $x$ *g* \x1b]0;h\x07 _i"


def test_a_card_shows_texts_as_they_are(checkpoint, tmp_path):
    entry = {"encoder": NASTY, "path": NASTY, "license": NASTY}
    fields = {"stage": NASTY, "recipe": NASTY, "data": NASTY, "learning_rate": 0.1, "seed": 0, "max_steps": 1}
    fields |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "language_model": NASTY}
    write_run(checkpoint, {NASTY: entry}, **fields)
    run = {"benchmark": NASTY, "variant": NASTY, "data": NASTY}
    scores = {f"task/{NASTY}": {"score": 0.5, "standard_error": 0.1, "n": 3}}
    (tmp_path / "results.json").write_text(json.dumps({"run": run, "scores": scores}))
    report = {"methods": {NASTY: {"seeds": [{"accuracy": {NASTY: 0.5}}]}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    results = [str(tmp_path / name) for name in ("results.json", "report.json")]
    text = model_card.make_card(checkpoint, "me/x", results).text
    assert "<img" not in text and "\x1b" not in text and "](http" not in text.replace("\\](", "")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    heads = {line.replace("\\|", "").count("|") for line in tables}
    assert heads == {9, 6, 4} and not any(line.strip() == "c" for line in text.splitlines())
    (checkpoint / "run.json").write_text(json.dumps({"stage": 1}))
    with pytest.raises(SystemExit, match=r"run\.json or the results are not as our commands write them"):
        push.main([str(checkpoint), "me/x", "--dry-run"])


def test_escapes():
    assert terminal("a\x1b[2Jb\u202ec\td\ne\x9b") == "a\\x1b[2Jb\\u202ec\td\ne\\x9b"
    assert terminal("Größe 東京 🙂") == "Größe 東京 🙂"
    assert one_line("a\n b\x1b") == "a b\\x1b"
    assert markdown("snake_case 61.4 ± 1.2, a.b-c/d (x)") == "snake_case 61.4 ± 1.2, a.b-c/d (x)"
    assert markdown("# _a_ <b>|`c`") == "\\# \\_a\\_ &lt;b&gt;\\|\\`c\\`"
    assert code("a`b|c\n") == "`a'b¦c`"
    assert terminal("a\u2066b\u2069c") == "a\\u2066b\\u2069c", "isolates turn what follows"
    # Each letter that means more than itself, and an entity that would become one.
    assert markdown("a\\b `c` *d* [e] f|g ~h~ $i$ &lt;") == r"a\\b \`c\` \*d\* \[e\] f\|g \~h\~ \$i\$ &amp;lt;"
    assert [markdown(text)[0] for text in ("# a", "> a", "+ a", "- a")] == ["\\", "&", "\\", "\\"]
    # GitHub makes links of bare addresses.
    parted = {
        "see https://evil.example/x": "see https:<!-- -->//evil.example/x",
        "_www.evil.example": "\\_www<!-- -->.evil.example",
        "WWW.evil.example": "WWW<!-- -->.evil.example",
        "FTP://evil.example, mailto:me@evil.example": "FTP:<!-- -->//evil.example, mailto:me@<!-- -->evil.example",
        "at 3 @ 4, a: b, //": "at 3 @ 4, a: b, //",
    }
    assert {text: markdown(text) for text in parted} == parted


def test_a_figure_shows_texts_as_they_are(tmp_path):
    """ "$" opens no formula (of a wrong one matplotlib raises an error), and "_" hides no entry of a legend."""
    figure = Figure()
    axis = figure.subplots()
    for name in ("_hidden", r"$\frac{$", "$a$"):
        axis.plot([0, 1], label=mathtext(name))
    legend = axis.legend()
    axis.set_title(mathtext("$_$ $^"))
    figure.savefig(tmp_path / "x.png")
    assert len(legend.get_texts()) == 3
    pictures = {"image": [Image.new("RGB", (8, 8))], r"$\frac{$": [Image.new("RGB", (8, 8), "red")]}
    visualize.pictures_figure(tmp_path / "y.png", pictures, r"$\frac{$ \x1b", {"_red $_$": (255, 0, 0)})
    results = {"run": {"probe": "ridge", "tasks": [{"name": "$_$"}]}, "image_counts": {"train": 1, "test": 1}}
    scores = {"$_$": {"0": {"ridge": 0.5, "ridge_plain": 0.5}}}
    results |= {"models": {"m": {"name": r"_$\frac{$", "scores": scores}}, "zero": {"$_$": 0.1}}
    curves_figure(tmp_path / "z.png", results)


def test_logs_are_escaped(capsys):
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TerminalFormatter("%(message)s"))
    handler.handle(logging.LogRecord("x", logging.WARNING, "", 1, "row %s", ("a\x1b[2J",), None))
    assert capsys.readouterr().err == "row a\\x1b[2J\n"


def test_point_pairs_of_flat_depth(tmp_path):
    (tmp_path / "data").mkdir()
    depth = np.full((3, render.SIZE, render.SIZE), 2, np.float16)
    depth[1, : render.SIZE // 2] = 1
    depth[2] = np.nan
    mask = np.zeros((3, render.SIZE, render.SIZE), np.uint8)
    save_file({"depth": depth, "mask": mask}, tmp_path / "data" / "test.safetensors")
    assert [len(item["pairs"]) for item in miniature_items(tmp_path)] == [0, 8, 0]


def heed_interrupts() -> None:
    """In a new process: it inherits that they are ignored if it, or a parent, was started in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def as_process(body: str, *arguments: str, environment: dict | None = None, wait_for: str = "") -> subprocess.Popen:
    """`ola-vlm train ARGUMENTS` in a process, with a module in train's place that does `body`."""
    program = f"""
import os, sys, time, types
from ola_vlm import cli
from ola_vlm.commands.table import Command
def main(argv):
{textwrap.indent(textwrap.dedent(body), "    ")}
sys.modules["stand_in"] = types.SimpleNamespace(main=main)
cli.COMMANDS["train"] = cli.COMMANDS["chat"] = Command("stand_in", "")
cli.main()
"""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heed_interrupts}
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], env={**clean, **(environment or {})}, **options
    )
    if wait_for:
        assert process.stdout.readline().strip() == wait_for
    return process


WAIT = """
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_one_line_that_says_how_to_go_on(number, status):
    process = as_process(WAIT, "train", "--output_dir", "a b", wait_for="ready")
    process.send_signal(number)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == status
    command = "ola-vlm train --output_dir 'a b' --resume_from_checkpoint true"
    assert err == f"ola-vlm train: interrupted; go on by {command}\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["train", "--resume_from_checkpoint=x"], {}, "go on by ola-vlm train --resume_from_checkpoint=x\n"),
        (["train", "--resume-from-checkpoint", "x"], {}, "go on by ola-vlm train --resume-from-checkpoint x\n"),
        (["train", "--resume-from-checkpoint=x"], {}, "go on by ola-vlm train --resume-from-checkpoint=x\n"),
        (["train", "--output-dir", "x"], {}, "ola-vlm train --output-dir x --resume_from_checkpoint true\n"),
        (["chat", "x"], {}, "ola-vlm chat: interrupted\n"),
        (["train"], {"RANK": "1", "LOCAL_WORLD_SIZE": "2"}, ""),
        (["train"], {"RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc_per_node 2 -m ola_vlm.cli train --res"),
    ],
)
def test_how_to_go_on(arguments, environment, line):
    process = as_process("raise KeyboardInterrupt", *arguments, environment=environment)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and line in err and err.count("\n") == bool(line)


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("ValueError('a\\n b \\x1b[2J')", "ola-vlm train: a b \\x1b[2J\n"),
        ("FileNotFoundError(2, 'not there', 'x')", "ola-vlm train: [Errno 2] not there: 'x'\n"),
        ("LookupError('run ola-vlm targets')", "ola-vlm train: run ola-vlm targets\n"),
        ("__import__('safetensors').SafetensorError('cut')", "ola-vlm train: cut\n"),
        ("SystemExit('ola-vlm train: \\x1b')", "ola-vlm train: \\x1b\n"),
    ],
)
def test_a_mistake_is_one_line(raised, line):
    process = as_process(f"raise {raised}", "train")
    assert process.communicate(timeout=30)[1] == line and process.returncode == 1
    process = as_process(f"raise {raised} from OSError('why')", "train", environment={"OLA_VLM_TRACEBACK": "1"})
    assert "OSError: why" in process.communicate(timeout=30)[1] and process.returncode == 1


def test_a_fault_has_its_traceback():
    process = as_process("{}['x']", "train")
    assert "KeyError: 'x'" in process.communicate(timeout=30)[1] and process.returncode == 1


DELETING = """
import signal, sys, time
from ola_vlm.commands.running import as_command

class Loader:
    def __del__(self):
        signal.raise_signal(int(sys.argv[1]))
        time.sleep(0)

def work(argv):
    loader = Loader()
    del loader
    time.sleep(30)

as_command("train", work, [])
"""


WORKER_ENDS = """
import signal, sys
from ola_vlm.commands.running import as_command

def as_torch_does(number, frame):
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal")

def work(argv):
    signal.signal(signal.SIGCHLD, as_torch_does)
    try:
        signal.raise_signal(int(sys.argv[1]))
    finally:
        signal.raise_signal(signal.SIGCHLD)

as_command("train", work, [])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", [DELETING, WORKER_ENDS], ids=["deleting", "worker_ends"])
def test_an_interruption_is_not_lost(script, number):
    """Of exceptions in `__del__` Python only tells. When a worker has ended, torch raises an error wherever the
    process is: here as it leaves."""
    command = [sys.executable, "-c", script, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=25, preexec_fn=heed_interrupts)
    assert done.returncode == 128 + number
    assert done.stderr.startswith("ola-vlm train: interrupted; go on by") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_by_the_command_that_it_says(tiny_parts, tmp_path, number):
    """With a loader's workers, which a terminal's Ctrl-C reaches, too."""
    data = write_llava(tmp_path, [llava_sample(i) for i in range(8)], ["a.png"])
    fields = {"vision_tower": tiny_parts.vision_tower, "language_model": tiny_parts.language_model, "data": data}
    fields |= {"output_dir": tmp_path / "my run", "max_steps": 200, "save_steps": 2, "save_total_limit": 2}
    fields |= {"dataloader_num_workers": 2, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2}
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "ola_vlm.cli", "train", *options]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, preexec_fn=heed_interrupts)
    while not list(tmp_path.glob("my run/checkpoint-*/trainer_state.json")) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    assert process.wait(60) == 128 + number
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text and text.count("interrupted; go on by") == 1, text[-3000:]
    said = shlex.split(text.rpartition("go on by ola-vlm ")[2])
    assert said == ["train", *options, "--resume_from_checkpoint", "true"]
    done = subprocess.run([sys.executable, "-m", "ola_vlm.cli", *said], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming from" in done.stderr and (tmp_path / "my run" / "model.safetensors").exists()
