"""Rows from all kinds of data: read alike, images where they belong, and nothing outside the image folder."""

import builtins
import io
import json
import os
import pickle
from functools import partial
from itertools import islice
from unittest.mock import MagicMock

import datasets
import numpy as np
import pytest
from conftest import random_image
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from torch.utils.data import DataLoader
from training_helpers import ListStream, llava_sample, write_llava

from ola_vlm.training import rows as rows_module
from ola_vlm.training.rows import BadRow, JsonRows, Rows, StreamRows, load_rows, open_source, read_row

QUESTION, ANSWER = {"type": "text", "text": "what is this ?"}, {"type": "text", "text": "the cube"}
IMAGE = {"type": "image"}


def contents(row):
    return [message["content"] for message in row["messages"]]


def test_llava_json(tmp_path):
    samples = [
        llava_sample(0, value="what is this ?\n<image>"),
        llava_sample(1, image=None),
        llava_sample(2, image=["a.png", "sub/b.png"], value="<image><image>\nwhat is this ?"),
        # ALLaVA's and the 665K's: more fields, several turns, an id that is a number
        {**llava_sample(3), "id": 3, "url": "x"},
    ]
    samples[3]["conversations"] += llava_sample(4, image=None)["conversations"]
    rows = load_rows(str(write_llava(tmp_path, samples, ["a.png", "sub/b.png"])), tmp_path)
    assert [contents(row) for row in rows] == [
        [[IMAGE, QUESTION], [ANSWER]],  # moved to the front of its turn
        [[QUESTION], [ANSWER]],
        [[IMAGE, IMAGE, QUESTION], [ANSWER]],
        [[IMAGE, QUESTION], [ANSWER], [QUESTION], [ANSWER]],
    ]
    assert [message["role"] for message in rows[3]["messages"]] == ["user", "assistant"] * 2
    assert [len(row["images"]) for row in rows] == [1, 0, 2, 1] and [row["id"] for row in rows] == list("0123")
    assert [path.removeprefix(f"{tmp_path}/") for path in rows.sources()] == ["a.png", "sub/b.png"]
    assert [image.tobytes() for image in map(open_source, rows.sources())] == [
        random_image(sum(n.encode())).tobytes() for n in ("a.png", "sub/b.png")
    ]


def test_rows_without_an_id_are_named_by_their_place(tmp_path):
    nameless = llava_sample(0) | {"id": None}
    rows = load_rows(str(write_llava(tmp_path, [llava_sample("x"), nameless], ["a.png"])))
    assert [row["id"] for row in rows] == ["x", "1"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "what is this ?"},
        {"role": "user", "content": [QUESTION]},
        {"role": "user", "content": [IMAGE, QUESTION]},
        {"role": "user", "content": [{"type": "image", "text": None}, {**QUESTION, "image": None}]},  # out of parquet
        {"role": "user", "content": "<image> what is this ?"},
    ],
)
def test_trl_rows(tmp_path, message):
    random_image(0).save(tmp_path / "a.png")
    row = {"images": ["a.png"], "messages": [message, {"role": "assistant", "content": "the cube"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    rows = load_rows(str(tmp_path / "data.jsonl"))
    assert len(rows) == 2 and contents(rows[1]) == [[IMAGE, QUESTION], [ANSWER]]
    assert rows[1]["images"] == [str(tmp_path / "a.png")]


def test_interleaved_parts_keep_their_order(tmp_path):
    random_image(0).save(tmp_path / "a.png")
    parts = [{"type": "text", "text": "left"}, IMAGE, {"type": "text", "text": "right"}, IMAGE]
    turns = [{"role": "system", "content": "see"}, {"role": "user", "content": parts}]
    row = Rows([{"images": ["a.png", "a.png"], "messages": turns}], tmp_path)[0]
    assert contents(row) == [[{"type": "text", "text": "see"}], parts]


@pytest.mark.parametrize("chunk", [3, 50, 1 << 20])
@pytest.mark.parametrize("form", ["array", "indented", "lines", "escaped lines"])
def test_json_is_indexed_in_pieces(tmp_path, monkeypatch, chunk, form):
    rows = [
        {"id": i, "text": 'a "quoted" } ] , \\ é 语 🦙' * (i % 3), "deep": [{"x": [1, {"y": 2}]}]} for i in range(20)
    ]
    text = {
        "array": json.dumps(rows, ensure_ascii=False),
        "indented": json.dumps(rows, indent=2, ensure_ascii=False),
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "escaped lines": "\r\n".join(json.dumps(row) for row in rows) + "\r\n",
    }[form]
    (tmp_path / "data.json").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr("ola_vlm.training.json_rows.CHUNK", chunk)
    found = JsonRows(tmp_path / "data.json")
    assert list(found) == rows
    assert list(pickle.loads(pickle.dumps(found))) == rows  # goes to a loader's workers


def test_a_byte_order_mark_is_skipped_and_another_encoding_refused(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "data.json").write_text('[{"id": "é"}, {"id": 2}]', encoding=encoding)
        assert list(JsonRows(tmp_path / "data.json")) == [{"id": "é"}, {"id": 2}]
    (tmp_path / "data.json").write_text('[{"id": "é"}]', encoding="latin-1")
    with pytest.raises(ValueError, match=r"data\.json is not UTF-8"):
        JsonRows(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}, {"id": 2', "byte 12: not valid JSON, or cut off"),
        ('[{"id": 1}, 7]', "byte 12: '7]' is not an object"),
        ("", "no rows"),
        ("[]", "no rows"),
    ],
)
def test_files_that_are_not_rows_are_refused(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / "data.json"))


@pytest.mark.parametrize(
    ("broken", "kind", "message"),
    [
        (llava_sample(0, image="../a.png"), "outside", "outside image_folder"),
        (llava_sample(0, image="/etc/passwd"), "outside", "outside image_folder"),
        (llava_sample(0, image="link.png"), "outside", "outside image_folder"),
        (llava_sample(0, image="linked/a.png"), "outside", "outside image_folder"),
        (llava_sample(0, image="gone.png"), "missing", "no image .*gone.png"),
        (llava_sample(0, image=None, value="<image>"), "malformed", "1 <image> placeholders for 0 images"),
        (llava_sample(0, value="what ?"), "malformed", "0 <image> placeholders for 1 images"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "malformed", "unknown speaker 'robot'"),
        ({"conversations": [{"from": "gpt", "value": "<image>"}]}, "malformed", "<image> may stand"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "malformed", "value is null: give a text"),
        ({"conversations": "hello"}, "malformed", "conversations is 'hello': give a list"),
        ({"question": "x"}, "malformed", "nor TRL's messages, but .*question"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "malformed",
            "has tool_calls, which",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "thinking": "y"}]}, "malformed", "has thinking, which"),
        (llava_sample(0, image=[None]), "malformed", "image is None"),
        (llava_sample(0, image=5), "malformed", "image is 5"),
        (llava_sample(0, image={"bytes": None, "path": None}), "malformed", "image is None"),
        (llava_sample(0, image={"bytes": "x"}), "malformed", "image is None"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "malformed", "content part"),
        ({"conversations": [{"from": "gpt"}]}, "malformed", "a turn or a content part has no 'value'$"),
        ({"messages": [{"content": "x"}]}, "malformed", "a turn or a content part has no 'role'$"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "malformed", "has no 'type'$"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "malformed", "has no 'text'$"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "malformed",
            "content is null: give a text or a list of parts",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "malformed", r"role is \['user'\].*give a text"),
        ({"messages": [None]}, "malformed", "a turn is null: give an object"),
        ({"messages": None, "conversations": None}, "malformed", "nor TRL's messages, but"),
        ({"messages": {"role": ["user"]}}, "malformed", "messages is {'role'.*give a list"),
        (llava_sample(0, image="https://host/a.png"), "malformed", "is a URL, https://host/a.png: nothing is downl"),
        (llava_sample(0, image="data:image/png;base64,iVBO"), "malformed", "is inline, as text .*save it as a file"),
        (llava_sample(0, image="iVBORw0KGgoAAAANSU"), "malformed", "is inline, as text"),
        (llava_sample(0, image="QUJD" * 1000), "malformed", "is inline, as text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:" * 9999}}]}]},
            "malformed",
            'list its file under "images"',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
            "malformed",
            '1 <image> placeholders for 0 images: the row lists their files under "images"',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}]},
            "malformed",
            "content part",
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(tmp_path, broken, kind, message):
    folder = tmp_path / "images"
    folder.mkdir()
    random_image(0).save(tmp_path / "a.png")
    random_image(0).save(folder / "a.png")
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    (folder / "linked").symlink_to(tmp_path)
    row = Rows([{"id": "bad", **broken}], folder)[0]
    assert row["bad_row"].kind == kind and not row.keys() & {"images", "messages"}
    with pytest.raises(BadRow, match=message):
        raise row["bad_row"]
    assert len(str(row["bad_row"])) < 500 and "not iterable" not in str(row["bad_row"])


@pytest.mark.parametrize("sample", [None, [], "x", 5])
def test_a_row_that_is_no_object(tmp_path, sample):
    row = Rows([sample], tmp_path)[0]
    assert row["id"] == "0" and str(row["bad_row"]) == f"a row is {sample!r}: give an object"


@pytest.mark.parametrize("chunk", [2000, 1 << 20])
@pytest.mark.parametrize(
    "value", ["[" * 5000 + '"]"' + "]" * 5000, '{"a":' * 5000 + r'"}\"" ' + "}" * 5000, "9" * 5000, "-" + "9" * 5000]
)
@pytest.mark.parametrize("lines", [True, False])
def test_values_that_json_cannot_read_make_a_bad_row(tmp_path, monkeypatch, chunk, value, lines):
    monkeypatch.setattr("ola_vlm.training.json_rows.CHUNK", chunk)
    fine = json.dumps(llava_sample("fine", image=None))
    odd = f'{{"id": "odd", "conversations": [], "more": {value}}}'
    joined = "\n".join([fine, odd, fine]) if lines else f"[{fine}, {odd}, {fine}]"
    (tmp_path / "data.json").write_text(joined)
    rows = load_rows(str(tmp_path / "data.json"))
    assert len(rows) == 3 and [row["id"] for row in rows] == ["fine", "1", "fine"]
    bad_row = rows[1]["bad_row"]
    assert bad_row.kind == "malformed" and "it can't be parsed: " in str(bad_row) and len(str(bad_row)) < 500


def test_brackets_without_end_are_said_with_the_file(tmp_path):
    (tmp_path / "data.json").write_text('[{"id": ' + "[" * 5000)
    with pytest.raises(ValueError, match=r"data\.json, byte 1: not valid JSON, or cut off"):
        load_rows(str(tmp_path / "data.json"))


def test_links_within_the_image_folder_and_to_it_are_fine(tmp_path):
    (tmp_path / "images").mkdir()
    random_image(0).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").symlink_to("a.png")
    (tmp_path / "linked").symlink_to("images")
    assert "bad_row" not in Rows([llava_sample(0, image="b.png")], tmp_path / "linked")[0]


def test_images_in_the_rows(tmp_path):
    buffer = io.BytesIO()
    random_image(3).save(buffer, "PNG")
    sources = [{"bytes": buffer.getvalue(), "path": None}, random_image(3)]
    rows = Rows([llava_sample(i) | {"image": source} for i, source in enumerate(sources)], tmp_path)
    assert [image.tobytes() for image in map(open_source, rows.sources())] == [random_image(3).tobytes()] * 2
    with pytest.raises(ValueError, match=r"lie in the rows.*needs image files"):
        rows.shuffle_targets(0)
    random_image(4).save(tmp_path / "a.png")
    row = Rows([llava_sample(0) | {"image": {"bytes": None, "path": "a.png"}}], tmp_path)[0]
    assert row["images"] == [str(tmp_path / "a.png")]


class Asked(Exception):
    """`datasets` was asked."""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("./nothere", r"there is no folder \./nothere \(and a name on the Hub is owner/name\)"),
        ("/nowhere/nothere", "there is no folder /nowhere/nothere"),
        ("other/data/nothere", "there is no folder other/data/nothere"),
        ("runs/nothere", "there is no folder runs/nothere here, and no such repository on the Hub"),
        ("nobody/nothing", "there is no folder nobody/nothing here, and no such repository on the Hub"),
        # Also where a folder of the user's has the owner's name.
        ("runs/on_the_hub", None),
        ("imagenet", None),
        ("runs/fetched", None),
        ("runs/written", None),
        ("hf://datasets/somebody/something/file.parquet", None),
    ],
)
def test_a_name_of_data_is_looked_up_before_datasets_tries_for_long(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "datasets--runs--fetched").mkdir(parents=True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "tables"))
    (tmp_path / "tables" / "runs___written").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def repo_info(api, name, repo_type, timeout):
        assert repo_type == "dataset" and timeout <= 10
        if name not in ("runs/on_the_hub", "imagenet"):
            raise RepositoryNotFoundError("404", response=MagicMock())

    def ask(*arguments, **options):
        raise Asked

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    monkeypatch.setattr(datasets, "load_dataset", ask)
    expected = Asked if message is None else ValueError
    with pytest.raises(expected, match=message):
        load_rows(data)


@pytest.mark.parametrize("offline", [False, True])
def test_data_without_a_network(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("ola_vlm.targets.loading.HfApi", partial(HfApi, "http://127.0.0.1:9"))
    with pytest.raises(ValueError, match=r"can't be reached.*`hf download me/rows --repo-type dataset`"):
        load_rows("me/rows")


def test_undecodable_images_are_named(tmp_path, caplog):
    random_image(0, (64, 64)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "flipped.png").write_bytes(data[:60] + bytes([data[60] ^ 255]) + data[61:])
    (tmp_path / "text.jpg").write_text("not found")
    for name in ("cut.png", "flipped.png", "text.jpg"):
        with pytest.raises(BadRow, match=rf"{name}: ") as error:
            open_source(str(tmp_path / name))
        assert error.value.kind == "undecodable"
    with pytest.raises(BadRow, match="no image") as error:
        open_source(str(tmp_path / "gone.png"))
    assert error.value.kind == "missing"
    rows = Rows([llava_sample(0, image=name) for name in ("cut.png", "whole.png", "gone.png")], tmp_path)
    assert len(rows.sources()) == 2 and "1 rows can't be read" in caplog.text


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    """Where Pillow only warns, and where padding to a square would make one."""
    Image.new("L", (60, 60)).save(tmp_path / "bomb.png")
    Image.new("L", (60, 2)).save(tmp_path / "strip.png")
    Image.new("L", (50, 50)).save(tmp_path / "fine.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)
    for name in ("bomb.png", "strip.png"):
        with pytest.raises(BadRow, match="decompression bomb"):
            open_source(str(tmp_path / name))
    assert open_source(str(tmp_path / "fine.png")).size == (50, 50)
    Image.new("L", (1, 501)).save(tmp_path / "thread.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadRow, match="strip of 1 x 501 pixels"):
        open_source(str(tmp_path / "thread.png"))


def test_shuffled_targets_are_always_those_of_another_image(tmp_path):
    names = [f"{i}.png" for i in range(7)]
    file = write_llava(tmp_path, [llava_sample(i, name) for i, name in enumerate([*names, "0.png"])], names)
    rows, again = load_rows(str(file)), load_rows(str(file))
    rows.shuffle_targets(seed=1)
    images, targets = ([row[key] for row in rows] for key in ("images", "target_images"))
    assert all(own != other for own, other in zip(images, targets, strict=True))  # no image keeps its own
    assert targets[0] == targets[7]  # fixed: the same image, the same wrong targets
    assert sorted(targets[:7]) == sorted(images[:7])  # a permutation
    again.shuffle_targets(seed=1)
    assert again.other_image == rows.other_image
    again.shuffle_targets(seed=2)
    assert again.other_image != rows.other_image  # each seed has a shuffle of its own


def test_streamed_rows_are_the_same_rows(tmp_path):
    random_image(0).save(tmp_path / "a.png")
    samples = [llava_sample(0), llava_sample(1, image="gone.png"), llava_sample(2, image=None)]
    rows, stream = Rows(samples, tmp_path), StreamRows(samples, tmp_path)
    two_passes = list(islice(stream, 6))
    assert [row["id"] for row in two_passes] == ["0", "1", "2"] * 2
    assert [list(row) for row in two_passes[3:]] == [list(rows[i]) for i in range(3)]
    assert next(iter(stream)) == rows[0]


def test_every_pass_of_a_stream_has_another_order(tmp_path):
    rows = [row["id"] for row in islice(StreamRows(ListStream(), tmp_path, shuffle_seed=3), 48)]
    passes = rows[:16], rows[16:32], rows[32:]
    assert len({tuple(one) for one in passes}) == 3 and {*map(frozenset, passes)} == {frozenset(rows)}
    assert rows == [row["id"] for row in islice(StreamRows(ListStream(), tmp_path, shuffle_seed=3), 48)]
    assert list(StreamRows([], tmp_path)) == []


def test_nameless_rows_of_a_stream_have_names_of_their_own_in_loader_workers(tmp_path):
    rows = StreamRows([llava_sample(0, image=None) | {"id": None}], tmp_path)
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    names = [row["id"] for row in islice(loader, 6)]
    assert sorted(names) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]


def test_streaming_is_for_data_sets(tmp_path):
    with pytest.raises(ValueError, match="row by row"):
        load_rows(str(write_llava(tmp_path, [])), streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_folder(tmp_path, streaming):
    """Images as a feature, in a list or alone; a damaged one only shows when it is opened."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    buffer = io.BytesIO()
    random_image(1).save(buffer, "PNG")
    good, bad = {"bytes": buffer.getvalue(), "path": None}, {"bytes": b"damaged", "path": None}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "the cube"}]}
    question = {
        "role": "user",
        "content": [{"type": "image", "text": None}, {"type": "text", "text": "what is this ?"}],
    }
    for name, images, feature in (
        ("list", [[good], [bad]], datasets.List(datasets.Image())),
        ("alone", [good, bad], datasets.Image()),
    ):
        column = "images" if name == "list" else "image"
        table = datasets.Dataset.from_dict({column: images, "messages": [[question, answer]] * 2})
        table.cast_column(column, feature).to_parquet(folder / "train.parquet")
        rows = list(islice(load_rows(str(folder), streaming=streaming), 2))
        assert [contents(row) for row in rows] == [[[IMAGE, QUESTION], [ANSWER]]] * 2
        assert open_source(rows[0]["images"][0]).tobytes() == random_image(1).tobytes()
        with pytest.raises(BadRow):
            open_source(rows[1]["images"][0])


def test_a_data_set_of_image_files_on_the_hub(tmp_path, monkeypatch):
    """Its images are paths in the Hub's cache, or where `datasets` has unpacked an archive; nothing outside of it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "elsewhere" / "datasets"))
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a cube"}]
    monkeypatch.setattr(rows_module, "check_data_name", lambda data: None)
    for folder in ("hub/datasets--me--photos/snapshots/0", "elsewhere/datasets/extracted"):
        files = [f"{folder}/{number}.png" for number in range(2)]
        for number, name in enumerate([*files, "0.png"]):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            random_image(number).save(tmp_path / name)
        images = [{"bytes": None, "path": str(tmp_path / name)} for name in [*files, "0.png"]]
        found = datasets.Dataset.from_dict({"image": images, "messages": [messages] * 3})
        found = found.cast_column("image", datasets.Image())
        monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, found=found, **options: found)
        rows = list(load_rows("me/photos"))
        for number in (0, 1):
            assert open_source(rows[number]["images"][0]).tobytes() == random_image(number).tobytes()
        assert "lies outside image_folder" in str(rows[2]["bad_row"])
    # Streamed, they are addresses.
    row = read_row({"image": {"bytes": None, "path": "hf://datasets/me/photos/0.png"}, "messages": messages}, 0, "/x")
    assert "is a file on the Hub" in str(row["bad_row"]) and "leave out streaming" in str(row["bad_row"])


def test_sources_read_the_file_once_and_resolve_few_folders(tmp_path, monkeypatch):
    """Half a million rows are looked through in seconds: neither a file nor a folder is opened for each."""
    names = [f"{i % 3}/{i}.png" for i in range(30)]
    samples = [llava_sample(i, [name, "shared.png"], "<image><image>what") for i, name in enumerate(names)]
    data = write_llava(tmp_path, [*samples, llava_sample(30, "gone.png")], ["shared.png", *names])
    (tmp_path / "link.png").symlink_to(tmp_path / "shared.png")
    rows = load_rows(str(data))
    expected = [str(tmp_path / names[0]), str(tmp_path / "shared.png"), *(str(tmp_path / name) for name in names[1:])]
    rows_module._lies_in.cache_clear()
    calls = {"open": 0, "realpath": 0}
    for owner, name in ((builtins, "open"), (os.path, "realpath")):
        original = getattr(owner, name)

        def counted(*args, original=original, name=name, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    sources = rows.sources()
    assert calls["open"] == 1 and calls["realpath"] <= 2 * 4 + 3  # four folders; the image that isn't there
    assert list(sources) == expected and calls["open"] == 2
    monkeypatch.undo()
    assert sources[4] == expected[4] and list(sources[3:5]) == expected[3:5]
    assert list(sources[np.array([5, 1])]) == [expected[5], expected[1]]
    outside = Rows([llava_sample(0, "../outside.png"), llava_sample(1, "link.png")], tmp_path)
    (tmp_path.parent / "outside.png").write_bytes(b"")
    assert list(outside.sources()) == [str(tmp_path / "link.png")]
    inner = Rows([llava_sample(0, "way/out.png")], tmp_path)
    (tmp_path / "way").symlink_to(tmp_path.parent)
    (tmp_path.parent / "out.png").write_bytes(b"")
    assert inner[0]["bad_row"].kind == "outside"


def test_data_that_are_something_else_are_named(tmp_path):
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps({"version": 1, "data": [llava_sample(0), llava_sample(1)]}))
    with pytest.raises(ValueError, match="is one object, which has 2 rows in 'data': write that list alone"):
        load_rows(str(whole))
    one = tmp_path / "one.json"
    one.write_text(json.dumps(llava_sample(0)))
    assert len(load_rows(str(one))) == 1
    with pytest.raises(ValueError, match="there is no folder nowhere: give image_folder"):
        load_rows(str(one), "nowhere")
    table = tmp_path / "rows.csv"
    table.write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"rows\.csv is no \.json or \.jsonl file"):
        load_rows(str(table))
