"""Data checked before a run, and by `ola-vlm check-data`: everything counted, nothing dropped without saying so."""

import json

import pytest
from conftest import random_image, tiny_tasks
from training_helpers import llava_sample, write_llava

from ola_vlm import cli
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.recipes import RECIPES, check_data
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.check import check_rows, drop_bad_rows
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.rows import load_rows

LONG = 30  # words that make a row too long
COUNTS = {"malformed": 1, "outside": 1, "missing": 1, "undecodable": 1, "unsupervised": 1, "too_long": 1, "target": 0}


@pytest.fixture
def mixed(tmp_path):
    """A LLaVA file with three rows that are fine (one text-only, one with two images) and one of each problem."""
    silent = llava_sample("silent", image=None)
    silent["conversations"] = silent["conversations"][:1]
    samples = [
        llava_sample("one"),
        llava_sample("malformed", value="what ?"),
        llava_sample("text", image=None),
        llava_sample("outside", image="../x.png"),
        llava_sample("missing", image="gone.png"),
        llava_sample("damaged", image="damaged.png"),
        silent,
        llava_sample("long", image=None, value="what is this ? " * LONG),
        llava_sample("two", image=["a.png", "b.png"], value="<image><image> what ?"),
    ]
    file = write_llava(tmp_path, samples, ["a.png", "b.png"])
    (tmp_path / "damaged.png").write_bytes(b"damaged")
    return file


@pytest.fixture
def collator(make_model):
    return OlaVlmCollator(make_model()[1], max_length=80)


@pytest.mark.parametrize("workers", [0, 2])
def test_report(mixed, collator, workers):
    rows = load_rows(str(mixed))
    found = check_rows(rows, collator, decode=True, workers=workers)
    report = found.summary()
    assert report["bad rows"] == COUNTS
    lengths = [len(collator.encode(rows[i]).ids) for i in (0, 2, 8)]
    assert report == {
        "rows": 9,
        "images": 4,  # of the rows that can be read
        "rows without images": 6,
        "rows with several images": 1,
        "answers": 5,
        "tokens": sum(lengths),
        "longest row in tokens": max(lengths),
        "truncated rows": 0,
        "bad rows": COUNTS,
    }
    names = [bad["row"] for bad in found.named]
    assert names == [
        "malformed",
        "outside",
        "missing",
        "damaged",
        "silent",
        "long",
    ]
    assert json.loads(json.dumps(found.named)) == found.named


def test_without_a_collator_only_the_images_are_looked_at(mixed):
    report = check_rows(load_rows(str(mixed)), decode=True).summary()
    assert report["bad rows"] == COUNTS | {"unsupervised": 0, "too_long": 0} and report["tokens"] == 0
    report = check_rows(load_rows(str(mixed))).summary()
    assert report["bad rows"] == COUNTS | {"unsupervised": 0, "too_long": 0, "undecodable": 0}


def test_bad_rows_stop_a_run_or_are_dropped(mixed, collator, caplog):
    rows = load_rows(str(mixed))
    with pytest.raises(ValueError, match=r"image missing \(1\).*row malformed: 0 <image>.*on_bad_rows=drop"):
        drop_bad_rows(rows, collator)
    assert len(rows) == 9
    caplog.set_level("INFO", logger="ola_vlm")
    report = drop_bad_rows(rows, collator, "drop")
    assert [row["id"] for row in rows] == ["one", "text", "damaged", "two"]  # opened in training only
    assert report["rows"] == 9 and rows.has_image.tolist() == [True, False, True, True]
    assert rows.lengths.tolist() == [len(collator.encode(row).ids) for row in rows]
    said = caplog.text
    assert "data: 9 rows, " in said and "{" not in said and "of the rows left out: not in a known form (1), " in said
    assert "dropped 5 of 9 rows" in said and all(
        f"bad row {row}: " in said for row in ("outside", "silent", "missing")
    )
    assert [path.rpartition("/")[2] for path in rows.sources()] == ["a.png", "damaged.png", "b.png"]


def test_if_no_row_is_left_the_reason_is_said_in_words(tmp_path, caplog):
    """As of a wrong image_folder: to drop the rows would help nobody."""
    file = write_llava(tmp_path, [llava_sample(str(i), image=f"{i}.png") for i in range(30)], [])
    for on_bad_rows in ("stop", "drop"):
        caplog.clear()
        with pytest.raises(
            ValueError, match=r"^all 30 rows: image missing; the first, row 0: .*image_folder"
        ) as error:
            drop_bad_rows(load_rows(str(file)), None, on_bad_rows)
        assert "on_bad_rows" not in str(error.value) and "{" not in str(error.value)
        assert caplog.text.count("bad row") == 2
    file = write_llava(tmp_path, [llava_sample("0", image="0.png"), llava_sample("1", image="../x.png")], [])
    with pytest.raises(
        ValueError, match=r"^none of 2 rows can be trained on: image outside .* \(1\), image missing \(1\)"
    ):
        drop_bad_rows(load_rows(str(file)), None)


def test_rows_longer_than_max_length_are_dropped_with_their_count_and_stop_nothing(tmp_path, collator, caplog):
    samples = [llava_sample(0, image=None), llava_sample(1, image=None, value="what is this ? " * LONG)]
    rows = load_rows(str(write_llava(tmp_path, samples)))
    drop_bad_rows(rows, collator)
    assert [row["id"] for row in rows] == ["0"] and "dropped 1 of 2 rows: longer than max_length (1)" in caplog.text
    short = OlaVlmCollator(collator.processor, max_length=3)
    with pytest.raises(ValueError, match=r"all 1 rows: longer than max_length \(max_length=3\)"):
        drop_bad_rows(rows, short)


def test_truncated_rows_stay_if_something_is_left_to_learn(tmp_path, collator):
    turns = [turn for i in range(LONG) for turn in llava_sample(i, image=None)["conversations"]]
    samples = [{"conversations": turns}, llava_sample(1, image=None, value="what is this ? " * LONG)]
    rows = load_rows(str(write_llava(tmp_path, samples)))
    report = drop_bad_rows(rows, OlaVlmCollator(collator.processor, max_length=80, truncate=True))
    assert [row["id"] for row in rows] == ["0"] and rows.lengths.tolist() == [80]
    assert report["truncated rows"] == 1 and report["bad rows"]["too_long"] == 1


def test_command(mixed, tmp_path, capsys, tiny_parts, make_model, monkeypatch):
    """With the parts of a recipe no weights are read; the report is what the run itself would find."""
    parts = {"vision_tower": tiny_parts.vision_tower, "language_model": tiny_parts.language_model}
    fields = {"data": str(mixed), "max_length": 80, "tasks": tiny_tasks(), **parts}
    monkeypatch.setitem(RECIPES, "tiny", lambda: fields)
    processor = check_data.load_processor(OlaVlmArguments(use_cpu=True, **fields))
    assert (
        processor.to_dict() == make_model()[1].to_dict() and processor.chat_template == make_model()[1].chat_template
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            ["check-data", "--recipe", "tiny", "--out", str(tmp_path / "report.json"), "--dataloader_num_workers", "1"]
        )
    assert stopped.value.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bad rows"] == COUNTS and report["rows"] == 9 and len(report["named"]) == 6
    out = capsys.readouterr().out
    assert "row damaged: image" in out and any(line.split() == ["rows", "9"] for line in out.splitlines())
    cli.main(["check-data", "--recipe", "tiny", "--on_bad_rows", "drop", "--max_length", "1000"])
    assert any(line.split()[-1] == "0" for line in capsys.readouterr().out.splitlines() if "longer than" in line)


def test_command_prints_no_image_in_full(tmp_path, capsys):
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "QUJD" * 5000}}
    samples = [llava_sample(i, image=image) for i, image in enumerate(["QUJD" * 5000, "https://host/a.png"])]
    samples.append({"id": "url", "messages": [{"role": "user", "content": [url]}]})
    samples.append({"id": "turn", "conversations": [{"from": "human"}]})
    with pytest.raises(SystemExit):
        cli.main(["check-data", "--data", str(write_llava(tmp_path, samples))])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
    assert len(lines) == 4 and max(map(len, lines)) < 200
    assert not any("KeyError" in line for line in lines)


def test_command_on_files_and_on_a_checkpoint(tmp_path, capsys, tiny_parts):
    (tmp_path / "images").mkdir()
    random_image(0).save(tmp_path / "images" / "a.png")
    file = str(write_llava(tmp_path, [llava_sample(0), llava_sample(1, image=None)]))
    place = ["--data", file, "--image_folder", str(tmp_path / "images")]
    cli.main(["check-data", *place])  # all is well: no exit
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["tokens", "not", "checked"] in out and ["bad:", "image", "missing", "0"] in out
    model, processor = build_ola_vlm(tiny_parts.vision_tower, tiny_parts.language_model)
    model.config.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    cli.main(["check-data", *place, "--checkpoint", str(tmp_path / "model")])
    assert "longest row in tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no data: give"):
        cli.main(["check-data"])
    # What a tower makes of an image isn't known, or what a text's tokens are.
    for name in ("language_model", "vision_tower"):
        with pytest.raises(SystemExit, match="depend on both, vision_tower and language_model: give") as stopped:
            cli.main(["check-data", *place, f"--{name}", str(getattr(tiny_parts, name))])
        assert "\n" not in str(stopped.value)
