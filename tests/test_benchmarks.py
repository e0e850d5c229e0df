"""The benchmarks: files in their own schema -> questions -> answers (batched, resumed, shared) -> scores -> pages."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_fixtures import WRITERS, cvbench_older, da2k, scenes
from conftest import CHAT_TEMPLATE, make_tokenizer, random_image
from PIL import Image
from safetensors.numpy import load_file
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from ola_vlm.convert import model_card
from ola_vlm.eval import compare, question_files, run, scoring, target_tasks
from ola_vlm.eval.benchmarks import BENCHMARKS, evenly, load_questions, locate
from ola_vlm.eval.compare import compare_records
from ola_vlm.eval.dense import (
    confusion_matrix,
    depth_order_correct,
    frechet_distance,
    load_da2k,
    mean_iou,
    reference_mean_iou,
)
from ola_vlm.eval.question_files import Row
from ola_vlm.eval.reading import parse_choice
from ola_vlm.eval.scoring import read_answers, score_records
from ola_vlm.eval.vqa import normalize_answer, vqa_accuracy
from ola_vlm.inference.questions import read_options
from ola_vlm.targets.encoders import open_image
from ola_vlm.targets.images import ImageError
from ola_vlm.world import render
from ola_vlm.world.dataset import write_questions

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Each benchmark's files."""
    root = tmp_path_factory.mktemp("benchmarks")
    for name, write in WRITERS.items():
        write(root / name)
    return {name: root / name for name in WRITERS}


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in make_model():
        part.save_pretrained(folder)
    return str(folder)


# Questions ----------------------------------------------------------------------------------------------------------
LETTER = "Answer with the option's letter from the given choices directly"
ONLY = "B. right\nPlease answer directly with only the letter of the correct option and nothing else."
EXPECTED = {  # what a question's prompt ends with, and how it is scored
    ("miniature", "official"): ("(B) right", "choice"),
    ("cvbench", "official"): (f"(B) right\n{LETTER}.", "choice"),
    ("cvbench", "paper"): (
        "(B) right\nOnly answer the option as the output. For example, if your answer is the option A, answer (A).",
        "choice",
    ),
    ("mmstar", "paper"): (f"B: right\n{LETTER}, such as answer letter 'A' only. \n", "choice"),
    ("realworldqa", "options"): (ONLY, "choice"),
    ("realworldqa", "paper"): (ONLY, "exact"),
    ("okvqa", "paper"): (
        "?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase.",
        "vqa",
    ),
    ("mmvp", "official"): ("far? (a) Near (b) Far away", "choice"),
    ("mmvp", "corrected"): ("far? (a) Near (b) Far away", "choice"),
    ("blink", "official"): ("(B) right", "choice"),
    ("3dsrbench", "official"): ("B. right\nPlease select the correct answer from the options above. \n", "choice"),
    ("3dsrbench_vanilla", "official"): (
        "B. right\nPlease select the correct answer from the options above. \n",
        "choice",
    ),
    ("vstar", "official"): (f"(B) right\n{LETTER}.", "choice"),
}
COUNTS = {"mmvp": 6, "blink": 4, "3dsrbench": 12, "3dsrbench_vanilla": 6}


@pytest.mark.parametrize(("name", "variant"), EXPECTED)
def test_questions_and_images(folders, name, variant):
    questions, read_image = load_questions(name, folders[name], variant)
    images, asked, _ = scenes()
    assert len(questions) == COUNTS.get(name, len(asked))
    ending, how = EXPECTED[name, variant]
    question = next(q for q in questions if q["question"].endswith(ending))
    assert question["scoring"] == how and question["id"] not in ("", None)
    if name == "mmvp":
        assert question["choices"] == ["Near", "Far away"]
        return
    found = [open_image(read_image(q)) for q in questions]
    scene = [next(i for i, image in enumerate(images) if image.tobytes() == one.tobytes()) for one in found]
    if name not in COUNTS:
        assert sorted(scene) == [q["scene"] for q in asked]
    for i, q in zip(scene, questions, strict=True):
        assert q["question"].startswith(
            tuple(q["question"].split(" (A)")[0].split("?")[0] for q in asked if q["scene"] == i)
        )


def test_both_layouts_of_cvbench_hold_the_same(folders, tmp_path):
    cvbench_older(tmp_path)
    new, old = (load_questions("cvbench", folder)[0] for folder in (folders["cvbench"], tmp_path))
    assert sorted(new, key=lambda q: q["id"]) == sorted(old, key=lambda q: q["id"])
    assert {q["task"] for q in new} == {"Count", "Relation", "Depth", "Distance"}
    assert {q["source"] for q in new} == {"ADE20K", "COCO", "Omni3D"}


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (
            "Which?\nOptions: A: on the book., B: beneath the cat., C: x, y, D: z",
            ["on the book.", "beneath the cat.", "x, y", "z"],
        ),
        ("Where to?\n\nA. Left\nB. Straight on\nC. Right\nPlease answer directly", ["Left", "Straight on", "Right"]),
        ("Choices:\n(A) 1\n(B) 2", ["1", "2"]),
        ("What is in Fig. A. and where?", []),
        ("How many?", []),
    ],
)
def test_read_options(question, options):
    assert read_options(question) == options


def test_mmvp_corrections_swap_the_two_pairs(folders):
    official, corrected = (load_questions("mmvp", folders["mmvp"], v)[0] for v in ("official", "corrected"))
    changed = [a["id"] for a, b in zip(official, corrected, strict=True) if a["answer"] != b["answer"]]
    assert changed == ["99", "100"]
    assert [q["pair"] for q in official] == [1, 1, 2, 2, 50, 50]


def test_what_is_no_data_is_said(folders, tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor"):
        locate("mmstar", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"has no \*.parquet"):
        locate("mmstar", str(tmp_path))
    with pytest.raises(ValueError, match="no revision 'x'"):
        locate("mmstar", str(folders["mmstar"]), "x")
    with pytest.raises(ValueError, match="variants paper, not 'official'"):
        load_questions("mmstar", folders["mmstar"], "official")
    cvbench_older(tmp_path)
    (tmp_path / "test.jsonl").write_text(2 * (tmp_path / "test.jsonl").read_text())
    with pytest.raises(ValueError, match="two questions have the id"):
        load_questions("cvbench", tmp_path)


def test_a_local_copys_revision_is_its_contents(folders, tmp_path):
    cvbench_older(tmp_path)
    first = locate("cvbench", str(tmp_path))[1]
    assert first == locate("miniature", str(folders["miniature"]))[1]
    (tmp_path / "test.jsonl").write_text((tmp_path / "test.jsonl").read_text() + "\n")
    assert locate("cvbench", str(tmp_path))[1] != first
    shutil.copytree(folders["realworldqa"], tmp_path / "parts")
    before = locate("realworldqa", str(tmp_path / "parts"))[1]
    (tmp_path / "parts" / "data" / "test-00001-of-00002.parquet").write_bytes(b"another second part")
    assert locate("realworldqa", str(tmp_path / "parts"))[1] != before


def test_the_hub_is_asked_for_what_is_needed(folders, monkeypatch):
    def download(**kwargs):
        asked.append(kwargs)
        return str(folders["mmvp" if "MMVP" in kwargs["repo_id"] else "okvqa"])

    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("okvqa", revision="abc") == (folders["okvqa"], folders["okvqa"].name)
    repo = {"repo_type": "dataset", "repo_id": "lmms-lab/OK-VQA"}
    assert asked == [repo | {"revision": "abc", "allow_patterns": ["*val2014*.parquet"]}]
    assert locate("mmvp", "other/MMVP")[0] == folders["mmvp"]
    of_images = {"revision": "mmvp", "allow_patterns": ["*.jpg", "*.png"]}  # of the commit that was found
    assert asked[-1] == {"repo_type": "dataset", "repo_id": "other/MMVP"} | of_images


def test_the_miniatures_questions_are_the_studys_form(tmp_path):
    write_questions(tmp_path, scenes=240, per_task=24)
    questions, read_image = load_questions("miniature", tmp_path)
    assert {
        task: sum(q["task"] == task for q in questions) for task in ("Count", "Relation", "Depth", "Distance")
    } == {
        "Count": 16,
        "Relation": 24,
        "Depth": 24,
        "Distance": 24,
    }
    assert open_image(read_image(questions[0])).size == (render.SIZE, render.SIZE)


# Files that differ a little -----------------------------------------------------------------------------------------
def test_headers_and_answers_in_other_spellings(folders, tmp_path):
    text = (folders["mmvp"] / "Questions.csv").read_text()
    for spelling in ("lndex,Question,Options,Correct Answer", "index,question,options,correct_answer"):
        folder = tmp_path / spelling[:5]
        (folder / "MMVP Images").mkdir(parents=True)
        lines = text.replace("Index,Question,Options,Correct Answer", spelling).splitlines()
        lines[1] = lines[1].removesuffix("(a)") + "A. Near"
        lines[2] = lines[2].removesuffix("(b)") + "Far away"
        (folder / "Questions.csv").write_text("\n".join([*lines[:2], "", ",,,", *lines[2:]]) + "\n")
        assert load_questions("mmvp", folder)[0] == load_questions("mmvp", folders["mmvp"])[0]


def cvbench_line(**changes) -> dict:
    row = {"idx": 0, "type": "2D", "task": "Count", "source": "COCO", "choices": ["1", "2"], "answer": "(B)"}
    return {**row, "prompt": "how many ?", "filename": "img/a.png", **changes}


CHOICES = ['["1", "2"]', "['1', '2']", "(A) 1 (B) 2", "1\n2", ["1", "2"], ["A. 1", "B. 2"], {"B": "2", "A": "1"}]


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("answer", ["b", "B", "(B)", "B. 2", "2", "b) two"])
def test_choices_as_text_and_answers_in_any_form(choices, answer, tmp_path):
    line = json.dumps(cvbench_line(choices=choices, answer=answer))
    (tmp_path / "test.jsonl").write_text(f"\n{line}\n\n")
    (question,) = load_questions("cvbench", tmp_path)[0]
    assert question["choices"] == ["1", "2"] and question["answer"] == "(B)"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (cvbench_line(answer="E"), "row 2: column 'answer' holds 'E', which is none of the 2 options"),
        (cvbench_line(choices="one"), "row 2: column 'choices' holds 'one': it must list 2 to 26 options"),
        (cvbench_line(task=None), "row 2: column 'task' is empty"),
        ({"idx": 1, "type": "2D"}, r"row 2: column 'choices' is missing \(there are idx, type\)"),
        ([1], "row 2: it must be an object of columns"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_row_and_column(line, complaint, tmp_path):
    (tmp_path / "test.jsonl").write_text(f"{json.dumps(cvbench_line())}\n{json.dumps(line)}\n")
    with pytest.raises(ValueError, match=f"test.jsonl, {complaint}"):
        load_questions("cvbench", tmp_path)
    (tmp_path / "test.jsonl").write_text(json.dumps(cvbench_line(prompt="how \ud83d ?")) + "\n")
    with pytest.raises(ValueError, match=r"test.jsonl, row 1: it has half of a character"):
        load_questions("cvbench", tmp_path)
    (tmp_path / "test.jsonl").write_text(f"{json.dumps(cvbench_line())}\n{{\n")
    with pytest.raises(ValueError, match=r"test.jsonl, row 2: no JSON"):
        load_questions("cvbench", tmp_path)


def test_questions_about_several_pictures_are_left_out_and_counted(folders, caplog):
    questions, read_image = load_questions("blink", folders["blink"])
    assert {question["task"] for question in questions} == {"Counting"}
    assert "4 of 8 questions are left out" in caplog.text
    assert open_image(read_image(questions[0])).size == (render.SIZE, render.SIZE)


def test_a_group_counts_only_if_all_its_variants_are_right(folders):
    questions, _ = load_questions("3dsrbench", folders["3dsrbench"])
    assert {question["group"] for question in questions} == {"Q0", "Q1", "Q2"}
    records = [{**question, "output": question["answer"]} for question in questions]
    records[1]["output"] = "E"
    scores = score_records(records, "3dsrbench")
    assert scores["overall"]["score"] == pytest.approx(2 / 3) and scores["overall"]["n"] == 3
    assert scores["questions"]["score"] == pytest.approx(11 / 12) and scores["questions"]["n"] == 12
    assert scores["source/height"]["n"] == 2 and scores["source/multi"]["n"] == 1


def test_blink_is_the_mean_of_its_subtasks():
    records = [record("A", task="Counting", source="BLINK") for _ in range(3)]
    records.append(record("B", task="Spatial_Relation", source="BLINK"))
    assert score_records(records, "blink")["overall"]["score"] == 0.5


OWN = [
    {"image": "0.png", "question": "what ? (A) cube (B) ball", "choices": ["cube", "ball"], "answer": "(B)"},
    {"id": "x", "image": "0.png", "conversations": [{"from": "human", "value": "<image>\ncolor ?"}]},
    {"image": "0.png", "question": "which ?", "choices": ["red", "blue"], "answer": "blue", "task": "color"},
]
OWN[1]["conversations"].append({"from": "gpt", "value": "Red."})
# Of a longer chat the first question is asked.
OWN[1]["conversations"] += [{"from": "human", "value": "shape ?"}, {"from": "gpt", "value": "Ball."}]


def test_your_own_questions(checkpoint, tmp_path, capsys):
    scenes()[0][0].save(tmp_path / "0.png")
    (tmp_path / "mine.json").write_text(json.dumps(OWN))
    out = tmp_path / "out"
    run.main([checkpoint, "--benchmark", str(tmp_path / "mine.json"), "--out", str(out), "--max_new_tokens", "2"])
    records = read_answers(out)
    assert [(r["id"], r["task"], r["scoring"], r["answer"]) for r in records] == [
        ("0", "all", "choice", "(B)"),
        ("x", "all", "exact", "Red."),
        ("2", "color", "choice", "(B)"),
    ]
    assert records[1]["question"] == "color ?" and records[2]["question"] == "which ?\n(A) red\n(B) blue"
    assert "overall" in capsys.readouterr().out
    compare.main([str(out), str(out), "--out", str(tmp_path / "c")])
    assert "overall" in capsys.readouterr().out
    (tmp_path / "mine.json").write_text(json.dumps([{"image": "0.png", "question": "what ?"}]))
    with pytest.raises(ValueError, match="row 1: column 'answer' is missing"):
        load_questions(str(tmp_path / "mine.json"), tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "image,question,A,B,C,answer",
        "images;question;Option A;Option B;Option C;answer",
        "image,question,option1,option2,option3,answer",
        "image,question,Choice 0,Choice 1,Choice 2,answer",
        "image,question,opt_1,opt_2,opt_3,answer",
        "image,question,opt_a,opt_b,opt_c,answer",
    ],
)
def test_options_have_columns_of_their_own(header, tmp_path):
    row = "0.png,which ?,red,blue,,B".replace(",", header[len(header.split("question")[0]) - 1])
    (tmp_path / "mine.csv").write_text(f"\ufeff{header}\r\n{row}\r\n")
    ((question,), read_image) = load_questions(str(tmp_path / "mine.csv"), tmp_path)
    assert question["question"] == "which ?\n(A) red\n(B) blue" and question["answer"] == "(B)"
    assert read_image(question) == tmp_path / "0.png"


@pytest.mark.parametrize(
    ("question", "choices", "is_listed"),
    [
        ("Points (A) and (B) are marked. Which is closer?", ["left one", "right one"], False),
        ("A. Smith and B. Jones stand side by side. Who is left?", ["Smith", "Jones"], False),
        ("Which ? (A) Red, (B) blue.", ["red", "blue"], True),
        ("Is it A. red or B. blue?", ["red", "blue"], True),
        ("Which ?\nA. red\nB. blue\nAnswer with a letter.", ["red", "blue"], True),
        ("Which ? (A) red (B) blue Answer with a letter.", ["red", "blue"], True),
        ("Which ? (A) < (B) >", ["<", ">"], True),
        ("Which ? (A) > (B) <", ["<", ">"], False),
        ("Which ? (A) red (B) blue (C) pink", ["red", "blue"], False),
    ],
)
def test_options_are_shown_unless_the_question_lists_them(question, choices, is_listed, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps([OF_MINE | {"question": question, "choices": choices}]))
    ((read,), _) = load_questions(str(tmp_path / "mine.json"), tmp_path)
    shown = f"{question}\n(A) {choices[0]}\n(B) {choices[1]}"
    assert read["question"] == (question if is_listed else shown)


def test_numbered_options_are_in_the_order_of_their_numbers(tmp_path):
    columns = {"option_2": "blue", "option_10": "pink", "option_1": "red"}
    columns |= {f"option_{number}": str(number) for number in range(3, 10)}
    row = {"image": "0.png", "question": "Points (A) and (B): which ?", "answer": "J", **columns}
    (tmp_path / "mine.json").write_text(json.dumps([row]))
    ((question,), _) = load_questions(str(tmp_path / "mine.json"), tmp_path)
    assert question["choices"] == ["red", "blue", *map(str, range(3, 10)), "pink"] and question["answer"] == "(J)"
    assert question["scoring"] == "choice"


def test_a_hint_is_shown_before_its_question(tmp_path):
    lines = "image\thint\tquestion\tA\tB\tanswer\n0.png\tA. Red is warm.\twhich ?\tred\tblue\tA\n"
    (tmp_path / "mine.tsv").write_text(lines + "0.png\t\twhich ?\tred\tblue\tA\n")
    ((first, second), _) = load_questions(str(tmp_path / "mine.tsv"), tmp_path)
    assert first["question"] == "Hint: A. Red is warm.\nwhich ?\n(A) red\n(B) blue"
    assert second["question"] == "which ?\n(A) red\n(B) blue"


def test_a_quotation_mark_within_a_cell_is_read_as_it_is(tmp_path):
    (tmp_path / "mine.tsv").write_text('image\tquestion\tanswer\n0.png\twho says "hi" ?\t5"\n')
    ((question,), _) = load_questions(str(tmp_path / "mine.tsv"), tmp_path)
    assert question["question"] == 'who says "hi" ?' and question["answer"] == '5"'


@pytest.mark.parametrize("value", [None, 5, ["Red."]])
def test_an_answer_that_is_no_text_is_no_answer(value, tmp_path):
    turns = [{"from": "human", "value": "color ?"}, {"from": "gpt", "value": value}]
    (tmp_path / "mine.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}]))
    with pytest.raises(ValueError, match="row 1: column 'conversations' must hold a turn from human and one from gpt"):
        load_questions(str(tmp_path / "mine.json"), tmp_path)


@pytest.mark.parametrize("image", [{"path": "0.png"}, ["0.png"]])
def test_an_image_may_be_named_as_data_sets_do(image, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps([{**OF_MINE, "image": image}]))
    ((question,), read_image) = load_questions(str(tmp_path / "mine.json"), tmp_path)
    assert read_image(question) == tmp_path / "0.png"


def test_a_table_has_images_in_it_or_their_paths(tmp_path):
    """Also those of TSV: a path, base64, and the index of a row that has either."""
    (tmp_path / "pics").mkdir()
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    long_name = f"pics/{'scene' * 20}01.png"
    for name in ("pics/scene01.png", long_name):
        red.save(tmp_path / name)
    blue.save(buffer := io.BytesIO(), "PNG")
    images = ["pics/scene01.png", base64.b64encode(buffer.getvalue()).decode(), long_name, "0", "1"]
    lines = "".join(f"{number}\t{image}\twhich ?\tred\n" for number, image in enumerate(images))
    (tmp_path / "mine.tsv").write_text(f"index\timage\tquestion\tanswer\n{lines}")
    questions, read_image = load_questions(str(tmp_path / "mine.tsv"), tmp_path)
    seen = [open_image(read_image(question)).getpixel((4, 4)) for question in questions]
    assert seen == [(255, 0, 0), (0, 0, 255), (255, 0, 0), (255, 0, 0), (0, 0, 255)]


def test_what_a_table_has_for_an_image_and_is_none(tmp_path):
    file = tmp_path / "mine.tsv"
    file.write_text(f"image\tquestion\tanswer\n{'a' * 65}\twhich ?\tred\n")
    ((question,), read_image) = load_questions(str(file), tmp_path)
    with pytest.raises(ValueError, match="its image is neither a path nor base64"):
        read_image(question)
    for image, match in (("7", "column 'image' holds '7': no row has this index"), ("../0.png", "lies outside")):
        file.write_text(f"image\tquestion\tanswer\n{image}\twhich ?\tred\n")
        with pytest.raises(ValueError, match=f"row 1: .*{match}"):
            load_questions(str(file), tmp_path)


OF_MINE = {"image": "0.png", "question": "which ?", "choices": ["red", "blue"], "answer": "A"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"choices": 5}, "column 'choices' holds '5': it must list 2 to 26 options"),
        ({"choices": [str(n) for n in range(30)], "answer": "28"}, "it must list 2 to 26 options"),
        ({"choices": ["red", None]}, "it must list 2 to 26 options"),
        ({"choices": {"1": "red", "2": "blue"}}, "or give them by letter, A, B, ..."),
        ({"choices": {"text": ["red", "blue"], "label": ["A", "B"]}}, "it must list 2 to 26 options"),
        ({"answer": float("nan")}, "column 'answer' is missing"),
        ({"answer": ["red", "blue"], "choices": None}, "column 'answer' holds \"['red', 'blue']\": it must be a text"),
        ({"question": {"en": "which ?"}}, "it must be a text"),
        ({"answer": "['red', 'maroon']", "choices": None}, "no answer equals a list, give one text"),
        ({"choices": None, "option_b": "red", "option_c": "blue"}, "column 'option_b' looks like an option: give two"),
        ({"choices": None, "option1": "red", "option3": "blue"}, "column 'option1' looks like an option: give two"),
        ({"hint": ["warm"]}, "column 'hint' holds \"['warm']\": it must be a text"),
        ({"answer": 1}, "none of the 2 options: give its letter or words"),
        ({"choices": ["b", "a"], "answer": "a"}, "one option's letter and another's words"),
        ({"image": "../0.png"}, "its image: '../0.png' lies outside"),
        ({"image": "0\x00.png"}, "its image: embedded null byte"),
    ],
)
def test_what_is_wrong_with_a_question_is_said_with_its_place(tmp_path, changes, match):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([OF_MINE, OF_MINE | changes]))
    with pytest.raises(ValueError, match=re.escape(f"{file}, row 2: ") + f".*{re.escape(match)}"):
        load_questions(str(file), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("mine.csv", b"question,answer\nwhich ?,a,b\n", "row 1: it has more fields than the header"),
        ("mine.tsv", b'question\tanswer\nhow ?\ta\n"which ?\ta\nwhat ?\tb\n', "row 2: unexpected end of data"),
        ("mine.csv", b'question,answer\n"red" what ?,a\n', "row 1: .* quotation marks around the whole cell"),
        ("mine.csv", b"question,answer,question\nwhich ?,a,what ?\n", "has several columns 'question'"),
        ("mine.csv", "question,answer\ncafé ?,3\n".encode("latin-1"), "is no text in UTF-8"),
        ("mine.json", "[]".encode("utf-16"), "is no text in UTF-8"),
        ("mine.json", b"[]", "has no questions"),
        ("mine.csv", b"", "has no questions"),
    ],
)
def test_files_of_questions_that_are_none(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{match}"):
        load_questions(str(tmp_path / name), tmp_path)


def test_long_cells_of_tables(tmp_path, monkeypatch):
    """Longer than Python's own limit of 131,072 characters; with the longest one that Windows takes, too."""
    file = tmp_path / "mine.csv"
    file.write_text(f"question,answer\nhow ?,a\n{'?' * 200_000},a\n")
    limits = []
    limit = csv.field_size_limit

    def set_limit(size: int) -> int:
        limits.append(size)
        return limit(size)

    monkeypatch.setattr(csv, "field_size_limit", set_limit)
    rows, _ = question_files.read_rows(tmp_path, [file])
    assert [len(row["question"]) for row in rows] == [5, 200_000]
    assert limits == [2**31 - 1]
    monkeypatch.setattr(question_files, "LONGEST_CELL", 1_000)
    with pytest.raises(ValueError, match=r"mine.csv, row 2: a cell has more than 1,000 characters"):
        question_files.read_rows(tmp_path, [file])
    limit(2**31 - 1)


@pytest.mark.parametrize("answers", [["a", 3], [], [None], {"a": 1}, 5])
def test_peoples_answers_are_texts(answers):
    """Found at once: to score them would fail once all questions are answered."""
    row = {"question_id": 1, "question": "?", "answers": answers, "question_type": "x"}
    with pytest.raises(ValueError, match="column 'answers' "):
        BENCHMARKS["okvqa"].read(Row(row, Path("okvqa"), 1))


@pytest.mark.parametrize("missing", ["", None, float("nan"), "nan", "NaN"])
def test_3dsrbench_has_two_options_or_four(missing):
    row = {"index": 0, "qid": "Q0", "question": "?", "category": "height_higher", "answer": "B"}
    row |= {"A": "near", "B": "far", "C": missing, "D": missing}
    question = BENCHMARKS["3dsrbench"].read(Row(row, Path("3dsr.tsv"), 1))
    assert question["choices"] == ["near", "far"]
    assert question["question"] == "?\nA. near\nB. far"


@pytest.mark.parametrize("changes", [{"prompt": ["?"]}, {"source": ["x"]}, {"task": {"a": 1}}])
def test_a_benchmarks_texts_are_texts(tmp_path, changes):
    row = {"idx": 0, "type": "2D", "task": "Count", "source": "x", "prompt": "?", "choices": ["1", "2"], "answer": "A"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row | changes) + "\n")
    (column,) = changes
    with pytest.raises(ValueError, match=f"row 1: column '{column}' holds .* it must be a text"):
        load_questions("miniature", tmp_path)


def test_a_lines_end_is_the_only_one_between_questions(tmp_path):
    """JSON may have other separators inside of a text."""
    question = OF_MINE | {"question": "which\u2028one ?"}
    lines = json.dumps(question, ensure_ascii=False) + "\n" + json.dumps(OF_MINE) + "\n"
    (tmp_path / "mine.jsonl").write_text(lines)
    questions, _ = load_questions(str(tmp_path / "mine.jsonl"), tmp_path)
    assert len(questions) == 2 and questions[0]["question"].startswith("which\u2028one ?")


def test_mmvps_index_is_a_number(tmp_path):
    (tmp_path / "Questions.csv").write_text("lndex,Question,Options,Correct Answer\nx,Open?,(a) Open (b) Closed,(a)\n")
    with pytest.raises(ValueError, match="row 1: column 'Index' holds 'x': it must be a whole number"):
        load_questions("mmvp", tmp_path)


def test_a_limit_keeps_tasks_and_pairs():
    questions = [{"id": str(n), "pair": n // 2} for n in range(20)]
    chosen = evenly(questions, 6)
    assert [q["id"] for q in chosen] == ["0", "1", "8", "9", "18", "19"]
    assert evenly(questions, None) == evenly(questions, 50) == questions


# Answers ------------------------------------------------------------------------------------------------------------
def ask(checkpoint, name, folder, out, *more):
    run.main(
        [checkpoint, "--benchmark", name, "--data", str(folder), "--out", str(out), "--max_new_tokens", "4", *more]
    )
    return read_answers(out)


def test_every_benchmark_from_files_to_scores(folders, checkpoint, tmp_path, capsys):
    for name in BENCHMARKS:
        records = ask(checkpoint, name, folders[name], tmp_path / name)
        questions, _ = load_questions(name, folders[name])
        assert [{k: r[k] for k in q} for r, q in zip(records, questions, strict=True)] == questions
        assert all(record["question"].split()[0] in record["prompt"] for record in records)
        first = records[0]
        assert first["run"]["model"] == checkpoint and first["run"]["revision"].startswith("sha256:")
        assert first["generation"]["do_sample"] is False and first["generation"]["max_new_tokens"] == 4
        printed = capsys.readouterr().out
        assert f"{name} ({next(iter(BENCHMARKS[name].variants))})" in printed and "overall" in printed
        results = json.loads((tmp_path / name / "results.json").read_text())
        os.remove(tmp_path / name / "results.json")
        scoring.main([str(tmp_path / name / "answers.jsonl")])  # the file alone
        assert capsys.readouterr().out == printed
        assert json.loads((tmp_path / name / "results.json").read_text()) == results
        assert results["scores"]["overall"]["n"] > 0


def test_several_benchmarks_in_one_command(folders, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        scenes()[0][0].save(tmp_path / name / "0.png")
        (tmp_path / f"{name}/{name}.json").write_text(json.dumps(OWN))
    loads = []
    load = run.load_checkpoint
    monkeypatch.setattr(run, "load_checkpoint", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs))
    arguments = [checkpoint, "--benchmark", "a/a.json", "b/b.json", "--out", "out", "--max_new_tokens", "2"]
    run.main([*arguments, "--limit", "2"])
    assert [len(read_answers(f"out/{name}")) for name in ("a", "b")] == [2, 2]
    assert loads == [1]
    with pytest.raises(SystemExit, match="there is no benchmark 'mvp': did you mean mmvp"):
        run.main([*arguments[:1], "--benchmark", "mvp", "--out", "out"])
    monkeypatch.setattr(run, "locate", lambda *args: pytest.fail("nothing is looked up before the rest is right"))
    with pytest.raises(SystemExit, match="there is no folder /no/such"):
        run.main(["/no/such", "--benchmark", "cvbench", "--out", "out"])
    with pytest.raises(SystemExit, match="cvbench has the variants official, paper, not 'x'"):
        run.main([checkpoint, "--benchmark", "cvbench", "--out", "out", "--variant", "x"])


def test_an_image_that_cannot_be_opened_never_ends_a_long_run(checkpoint, tmp_path, capsys):
    scenes()[0][0].save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    rows = [*OWN, {**OWN[0], "image": "1.png"}, {**OWN[0], "image": None}]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    arguments = [checkpoint, "--benchmark", str(tmp_path / "mine.json"), "--out", str(tmp_path / "out")]
    arguments += ["--max_new_tokens", "2", "--batch_size", "2"]
    with pytest.raises(SystemExit, match=r"2 questions have no image that can be opened \(3, 4\): .*count_unreadable"):
        run.main(arguments)
    run.main([*arguments, "--count_unreadable"])  # the others' answers are kept
    assert "2 questions without a readable image: unanswered, wrong" in capsys.readouterr().out
    records = read_answers(tmp_path / "out")
    assert [record["id"] for record in records if "unanswered" in record] == ["3", "4"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["unanswered"] == ["3", "4"]
    asked = [r for r in records if r["scoring"] == "choice" and "unanswered" not in r]
    assert results["unreadable_choices"] == sum(parse_choice(r["output"], r["choices"]) is None for r in asked)
    # One file is mended: its question is asked, and the other one is no answer without the flag.
    before = read_answers(tmp_path / "out")[:3]
    scenes()[0][1].save(tmp_path / "1.png")
    with pytest.raises(SystemExit, match=r"1 questions have no image that can be opened \(4\): mend the files"):
        run.main(arguments)
    run.main([*arguments, "--count_unreadable"])
    records = read_answers(tmp_path / "out")
    assert [record["id"] for record in records if "unanswered" in record] == ["4"]
    assert records[3]["id"] == "3" and records[3]["prompt"] and records[:3] == before


def test_results_of_ones_own_questions_say_only_what_applies(checkpoint, tmp_path, capsys):
    """A file has no variants, and free answers name no options."""
    scenes()[0][0].save(tmp_path / "0.png")
    file = tmp_path / "mine.json"
    for rows, options in ((OWN[1:2], False), (OWN, True)):
        file.write_text(json.dumps(rows))
        out = tmp_path / str(len(rows))
        run.main([checkpoint, "--benchmark", str(file), "--out", str(out), "--max_new_tokens", "2"])
        printed = capsys.readouterr().out
        assert printed.startswith(f"{file}, {checkpoint}: per cent") and "official" not in printed
        assert ("named no option" in printed) == options
        results = json.loads((out / "results.json").read_text())
        assert (results["unreadable_choices"] is not None) == options
        assert "official" not in model_card.evaluation([str(out)])[0]


def test_interrupted_and_resumed_equals_uninterrupted(folders, checkpoint, tmp_path, monkeypatch):
    whole = ask(checkpoint, "cvbench", folders["cvbench"], tmp_path / "whole")
    answered, generate = [], run.generate_answers

    def interrupted(model, processor, questions, save, **kwargs):
        def save_two(records):
            save(records)
            answered.extend(records)
            if len(answered) >= 4:
                raise KeyboardInterrupt

        return generate(model, processor, questions, save=save_two, **kwargs)

    monkeypatch.setattr(run, "generate_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(checkpoint, "cvbench", folders["cvbench"], tmp_path / "cut", "--batch_size", "2")
    (part,) = (tmp_path / "cut").glob("*.part")
    part.write_text(part.read_text() + part.read_text().splitlines()[0][:100])  # killed while writing
    with pytest.raises(ValueError, match="is not there"):
        read_answers(tmp_path / "cut")
    asked = []
    monkeypatch.setattr(
        run, "generate_answers", lambda m, p, questions, **k: asked.extend(questions) or generate(m, p, questions, **k)
    )
    resumed = ask(checkpoint, "cvbench", folders["cvbench"], tmp_path / "cut", "--batch_size", "3")
    assert resumed == whole
    assert len(asked) == len(whole) - 4 and not {q["id"] for q in asked} & {r["id"] for r in answered}
    assert not list((tmp_path / "cut").glob("*.part"))


def test_what_is_answered_is_not_asked_again_and_no_other_run_is_mixed_in(folders, checkpoint, tmp_path, monkeypatch):
    records = ask(checkpoint, "mmvp", folders["mmvp"], tmp_path / "out")
    monkeypatch.setattr(run, "load_checkpoint", lambda *args: pytest.fail("nothing is left to answer"))
    assert ask(checkpoint, "mmvp", folders["mmvp"], tmp_path / "out") == records
    for more, differs in [(["--variant", "corrected"], "variant"), (["--dtype", "bfloat16"], "dtype")]:
        with pytest.raises(SystemExit, match=f"another {differs}: choose another --out"):
            ask(checkpoint, "mmvp", folders["mmvp"], tmp_path / "out", *more)
    config = Path(checkpoint) / "generation_config.json"
    before = config.stat()
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    with pytest.raises(SystemExit, match="there is no folder /no/such"):
        ask("/no/such", "mmvp", folders["mmvp"], tmp_path / "none")
    with pytest.raises(SystemExit, match="another weights"):
        ask(checkpoint, "mmvp", folders["mmvp"], tmp_path / "out")
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
def test_two_processes_share_the_questions(folders, checkpoint, tmp_path):
    alone = ask(checkpoint, "miniature", folders["miniature"], tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["ola_vlm.cli", "eval", checkpoint, "--benchmark", "miniature", "--data", str(folders["miniature"])]
    command += ["--out", str(tmp_path / "two"), "--max_new_tokens", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("overall") == 1
    assert f"{len(alone) // 2}/{len(alone) // 2} " in done.stderr  # the first process's bar: it had half of them
    assert read_answers(tmp_path / "two") == alone


def test_a_file_of_answers_must_be_whole(tmp_path):
    line = {"id": "a", "run": {"questions": 2, "benchmark": "mmstar"}}
    for lines, complaint in [
        ([], "those of none or several"),
        ([line, line | {"id": "b", "run": {"questions": 2}}], "those of none or several"),
        ([line], "1 lines for 2 questions"),
        ([line, line], "2 lines for 2 questions: answer each exactly once"),
    ]:
        (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        with pytest.raises(ValueError, match=complaint):
            read_answers(tmp_path)
    (tmp_path / "answers.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"answers\.jsonl is no text in UTF-8"):
        read_answers(tmp_path)


RUN = {"questions": 1, "benchmark": "mmstar", "variant": "paper", "data": "x", "revision": "y", "model": "z"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": {"a": 1}}, "has no task as"),
        ({"choices": "AB", "output": None}, "has no output, choices as"),
        ({"choices": [1, 2]}, "has no choices as"),
        ({"choices": ["x"] * 27, "answer": "(A)"}, "has no choices as"),  # no letter for the last
        ({"scoring": "rm"}, "has no scoring as"),
        ({"answer": 5}, "has no answer as"),
        ({"answer": "(C)"}, "has no answer as"),
        ({"answer": ""}, "has no answer as"),
        ({"answer": [], "scoring": "vqa"}, "has no answer as"),
        ({"answer": ["a", 1], "scoring": "vqa"}, "has no answer as"),
        ({"generation": None}, "has no generation as"),
        ({"prompt": ["?"]}, "has no prompt as"),
        ({"pair": [1]}, "has no pair as"),
        ({"group": "Q1"}, "has no group_source as"),
        ({"group": [1], "group_source": "height"}, "has no group as"),
        ({"run": {**RUN, "variant": None}}, "has no variant in its run as"),
        ({"run": {name: RUN[name] for name in RUN if name != "model"}}, "has no model in its run as"),
        ({"run": 5}, "line 1: it must be an answer"),
        ({"run": {**RUN, "benchmark": []}}, "has no benchmark in its run as"),
    ],
)
def test_a_strangers_answers_have_the_types_that_are_scored(tmp_path, changes, complaint):
    line = {"question": "?", "run": RUN, "generation": {}, **record("(A)")}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    assert scoring.write_results(tmp_path)["scores"]["overall"]["score"] == 1
    (tmp_path / "answers.jsonl").write_text(json.dumps(line | changes) + "\n")
    with pytest.raises(ValueError, match=complaint):
        read_answers(tmp_path)


def test_lines_of_another_form_are_no_answers(tmp_path):
    lines = [[1], {"id": [1], "run": {}}, {"id": "a", "run": [1]}, {"id": "b", "run": {}}]
    (tmp_path / "answers.x.part").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["id"] for record in run._read_lines(tmp_path)] == ["b"]


# Scores -------------------------------------------------------------------------------------------------------------
def record(output, answer="(A)", task="Count", source="ADE20K", how="choice", **more):
    more = {"id": f"{task} {source} {output} {answer}", "choices": ["2", "3"], "output": output} | more
    return {"answer": answer, "task": task, "source": source, "scoring": how, **more}


def test_cvbench_weighs_sources_as_its_authors_do():
    records = [record("(A)") for _ in range(3)] + [record("B", task="Relation", source="COCO")]
    records += [record("B", task="Depth", source="Omni3D"), record("(A)", task="Distance", source="Omni3D")]
    scores = score_records(records, "cvbench")
    assert {name: one["score"] for name, one in scores.items()} == {
        "2D": 0.5,  # by source, where the mean over questions would be 3 / 4
        "3D": 0.5,
        "overall": 0.5,
        "plain": 4 / 6,
        "task/Count": 1,
        "task/Relation": 0,
        "task/Depth": 0,
        "task/Distance": 1,
        "source/ADE20K": 1,
        "source/COCO": 0,
        "source/Omni3D": 0.5,
    }
    # var = 1/4 * 1/4 / 2 for 3D's half of the score, the rest is certain
    assert scores["overall"]["standard_error"] == pytest.approx((1 / 4 * 1 / 4 / 2) ** 0.5)
    assert scores["3D"]["standard_error"] == pytest.approx((0.25 / 2) ** 0.5)  # binomial
    assert scores["overall"]["n"] == 6 and scores["2D"]["n"] == 4
    assert not {"2D", "overall"} & score_records(records[-2:], "cvbench").keys()  # a part is missing


def test_a_pair_counts_only_if_both_are_right():
    records = [
        record(output, answer, "question", "MMVP", pair=pair, id=str(n))
        for n, (output, answer, pair) in enumerate(
            [("(a)", "(a)", 1), ("(b)", "(b)", 1), ("a", "(a)", 2), ("a", "(b)", 2)]
        )
    ]
    scores = score_records(records, "mmvp")
    assert scores["overall"]["score"] == 0.5 and scores["overall"]["n"] == 2
    assert scores["questions"]["score"] == 0.75 and scores["questions"]["n"] == 4
    with pytest.raises(ValueError, match="pair 2 has 1 answered"):
        score_records(records[:3], "mmvp")


@pytest.mark.parametrize(
    ("how", "output", "answer", "right"),
    [
        ("exact", "b.", "B", True),
        ("exact", " YES", "Yes", True),
        ("exact", "B. Straight", "B", False),
        ("exact", "", "B", False),
        ("choice", "B. 3", "B", True),
        ("choice", "The answer is (B)", "(b)", True),
        ("choice", "", "B", False),
        ("choice", "\x00\ufffd{}%s(Z)", "B", False),
    ],
)
def test_exact_and_option_scoring(how, output, answer, right):
    assert score_records([record(output, answer, how=how)], "realworldqa")["overall"]["score"] == right


@pytest.mark.parametrize(
    ("output", "is_cut", "right"),
    [
        ("Near", True, False),
        ("The near one is", True, False),
        ("It is far.</think>Near", False, True),
        ("It is near.</think>\n\nFar", False, False),
        ("It is near.</think>\n<think>Near", True, False),
    ],
)
@pytest.mark.parametrize(
    ("how", "answer", "choices"),
    [("choice", "(A)", ["Near", "Far"]), ("exact", "near", []), ("vqa", ["near"] * 10, [])],
)
def test_a_thought_that_the_prompt_began_is_no_answer(output, is_cut, right, how, answer, choices, tmp_path, caplog):
    prompt = "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    line = record(output, answer, how=how, choices=choices, prompt=prompt)
    line |= {"question": "Which?", "run": RUN, "generation": {}}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    results = scoring.write_results(tmp_path)
    assert results["scores"]["overall"]["score"] == right
    assert (results["unreadable_choices"] == 1) == (is_cut and how == "choice")
    assert ("1 of 1 answers end within their reasoning" in caplog.text) == is_cut


@pytest.mark.parametrize("prompt", ["assistant\n<think>\n\n</think>\n\n", "Which? I think", ""])
def test_no_thought_is_begun_in_a_prompt_without_one(prompt):
    assert score_records([record("(A)", prompt=prompt)], "realworldqa")["overall"]["score"] == 1


def test_letters_are_read_where_the_options_are_not():
    assert score_records([record("B", "B", choices=[""] * 4)], "mmstar")["overall"]["score"] == 1
    for garbage in ("???", "", " ", "E"):
        assert score_records([record(garbage, "B", choices=[""] * 4)], "mmstar")["overall"]["score"] == 0
    row = {"index": 0, "question": "Which?", "answer": "C", "category": "math", "l2_category": "x"}
    assert BENCHMARKS["mmstar"].read(Row(row, Path("mmstar"), 1))["choices"] == [""] * 4
    # The right one is always among them.
    question = BENCHMARKS["mmstar"].read(Row({**row, "answer": "F"}, Path("mmstar"), 1))
    assert (
        question["choices"] == [""] * 6
        and score_records([record("F", question["answer"], choices=question["choices"])], "mmstar")["overall"]["score"]
        == 1
    )


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Dog.", "dog"),
        ("  two\ncats ", "2 cats"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # the evaluator knows it with one apostrophe missing only
        ("couldnt've", "couldn't've"),
        ("yes, it is", "yes it is"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("somebody'd", "somebodyd"),
        ("a", ""),
        ("", ""),
    ],
)
def test_vqa_normalization(text, plain):
    assert normalize_answer(text) == plain


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_out(matches, accuracy):
    # m answers match: min(1, (m - 1) / 3) for the m times a matching one is left out, min(1, m / 3) for the others
    assert vqa_accuracy("The dogs.", ["dogs"] * matches + ["cat"] * (10 - matches)) == pytest.approx(accuracy)


def test_a_metric_of_evaluate_gives_the_same_scores(folders, checkpoint, tmp_path):
    evaluate = pytest.importorskip("evaluate")
    for name in ("mmvp", "okvqa", "3dsrbench"):
        records = ask(checkpoint, name, folders[name], tmp_path / name)
        references = [
            {"answers": [r["answer"]] if isinstance(r["answer"], str) else r["answer"], "pair": r.get("pair", -1)}
            | {field: r[field] for field in ("choices", "task", "scoring")}
            | {"source": r["source"] or ""}
            | {field: r[field] for field in ("group", "group_source") if field in r}
            for r in records
        ]
        metric = evaluate.load(str(TESTS.parent / "eval" / "answer_score"), name, cache_dir=str(tmp_path / "cache"))
        found = metric.compute(predictions=[r["output"] for r in records], references=references)
        for what, one in score_records(records, name).items():
            assert found[what] == one["score"] and found[f"{what}/standard_error"] == one["standard_error"]
        assert "overall" in found


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"answers": ["C"]}, "reference 1 can't be scored by its answer 'C'"),
        ({"answers": ["near"]}, "reference 1 can't be scored by its answer 'near'"),
        ({"answers": []}, r"reference 1 can't be scored by its answer \[\]"),
        ({"answers": ["A", "B"]}, r"reference 1 can't be scored by its answer \['A', 'B'\]"),
        ({"scoring": "letters"}, "reference 1 can't be scored by its scoring 'letters'"),
        ({"choices": ["x"] * 27}, r"reference 1 can't be scored by its choices \['x'"),
        ({"group": "Q1"}, "reference 1 has answers, .*group: give it answers, .*pair"),
    ],
)
def test_a_metrics_references_are_looked_at_as_answers_are(changes, match, tmp_path):
    evaluate = pytest.importorskip("evaluate")
    metric = evaluate.load(str(TESTS.parent / "eval" / "answer_score"), "mmvp", cache_dir=str(tmp_path / "cache"))
    reference = {
        "answers": ["A"],
        "choices": ["near", "far"],
        "task": "question",
        "source": "MMVP",
        "scoring": "choice",
    }
    reference["pair"] = 1
    assert metric.compute(predictions=["A", "B"], references=[reference] * 2)["questions"] == 0.5
    with pytest.raises(ValueError, match=match):
        metric.compute(predictions=["A", "B"], references=[reference, reference | changes])


# Depth, masks, images -----------------------------------------------------------------------------------------------
GOLDEN = load_file(TESTS / "golden" / "i_metrics.safetensors")
EXPECT = json.loads((TESTS / "golden" / "i_metrics.json").read_text())


def test_depth_order_as_the_reference_but_for_ties():
    pairs = [dict(zip(("point1", "point2", "closer_point"), p, strict=True)) for p in EXPECT["da2k_points"]]
    assert depth_order_correct(GOLDEN["depth_map"], pairs).tolist() == EXPECT["da2k_correct"]
    assert EXPECT["tie"] == [True, False]  # the reference: a tie means point1
    assert not depth_order_correct(np.ones((20, 30)), pairs).any()  # so a constant map would score 100% on DA-2K
    with pytest.raises(ValueError, match="resize the map"):
        depth_order_correct(GOLDEN["depth_map"].T, pairs)


def test_da2k_from_its_file(tmp_path):
    truth = da2k(tmp_path)
    annotations = load_da2k(tmp_path)
    assert annotations.keys() == truth.keys()  # the same file names in two scenes
    closer = {pair["closer_point"] for pairs in annotations.values() for pair in pairs}
    assert closer == {"point1", "point2"}
    for path, pairs in annotations.items():
        assert depth_order_correct(truth[path], pairs).all()
        assert not depth_order_correct(-truth[path], pairs).any()


def test_mean_iou_of_the_data_set_and_the_references():
    truth, prediction = GOLDEN["seg_gt"], GOLDEN["seg_pred"]
    assert reference_mean_iou([truth], [prediction]) == pytest.approx(EXPECT["mask_iou"], rel=1e-6)
    a, b = np.array([[0, 0, 1, 255]]), np.array([[1, 1, 1, 1]])
    guess_a, guess_b = np.array([[0, 1, 1, 0]]), np.array([[1, 1, 255, 7]])
    confusion = confusion_matrix(a, guess_a, 3) + confusion_matrix(b, guess_b, 3)
    # class 0: 1 of 2; class 1: 3 of 6 pixels in the union; class 2 occurs nowhere
    assert mean_iou(confusion) == pytest.approx((1 / 2 + 3 / 6) / 2)
    # its way: (1/3 + 1/2) / 2 in the first image, where void counts, and 1/2 in the second
    assert reference_mean_iou([a, b], [guess_a, guess_b]) == pytest.approx(((1 / 3 + 1 / 2) / 2 + 1 / 2) / 2)


@pytest.mark.parametrize("count", [4, 60])  # fewer and more rows than features
def test_frechet_distance_is_the_closed_form(count):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(count, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(count, 6)) + 2
    mean, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real.clip(0)
    expected = mean @ mean + np.trace(cov_a + cov_b) - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # two Gaussians with diagonal covariances: |m|^2 + sum (s - t)^2
    s, t, units = (
        np.array([1, 2, 3.0]),
        np.array([2, 2, 1.0]),
        np.concatenate([np.eye(3), -np.eye(3)]) * 5**0.5 / 2**0.5,
    )
    assert frechet_distance(units * s + 1, units * t) == pytest.approx(3 + ((s - t) ** 2).sum())


def test_one_image_has_no_distance(tmp_path):
    """Said before teachers and models are loaded."""
    with pytest.raises(ValueError, match="sets of at least 2 features each, not 1"):
        frechet_distance(np.ones((1, 4)), np.ones((3, 4)))
    da2k(tmp_path)
    for path in load_da2k(tmp_path):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    args = Namespace(da2k=tmp_path, coco=None, miniature=None, gallery=None, max_images=1)
    assert len(target_tasks.read_data(args)["da2k"]) == 1
    with pytest.raises(ValueError, match=r"--gallery compares sets of images, and of --da2k there are 1: take at l"):
        target_tasks.read_data(Namespace(**{**vars(args), "gallery": tmp_path}))


def test_answers_of_another_run_are_not_taken_for_this_ones(folders, checkpoint, tmp_path):
    """Whatever makes other answers: the numeric type, the length, the questions, the weights."""
    out = tmp_path / "out"
    ask(checkpoint, "vstar", folders["vstar"], out)
    before = (out / "answers.jsonl").read_bytes()
    changes = {
        "max_new_tokens": ["--max_new_tokens", "3"],
        "dtype": ["--dtype", "bfloat16"],
        "questions": ["--limit", "1"],
    }
    for name, more in changes.items():
        with pytest.raises(SystemExit, match=rf"answers of a run with another .*\b{name}\b"):
            ask(checkpoint, "vstar", folders["vstar"], out, *more)
    (Path(checkpoint) / "model.safetensors").touch()
    with pytest.raises(SystemExit, match=r"answers of a run with another .*\bweights\b"):
        ask(checkpoint, "vstar", folders["vstar"], out)
    assert (out / "answers.jsonl").read_bytes() == before


# Comparison ---------------------------------------------------------------------------------------------------------
def as_run(records, model):
    about = {"benchmark": "cvbench", "revision": "sha256:0", "model": model, "questions": len(records), "variant": "x"}
    return [one | {"id": str(n), "question": "how <many> ?", "run": about} for n, one in enumerate(records)]


def test_compare_names_its_test_and_weighs_like_the_score():
    def records(outputs):
        sources = ["ADE20K"] * 20 + ["COCO"] * 5 + ["Omni3D"] * 5
        return [record(output, source=source, task=source) for output, source in zip(outputs, sources, strict=True)]

    a, b = as_run(records(["B"] * 30), "a"), as_run(records(["A"] * 20 + ["B"] * 10), "b")
    compared = compare_records(a, b)
    overall = score_records(b, "cvbench")["overall"]["score"] - score_records(a, "cvbench")["overall"]["score"]
    assert compared["overall"]["difference"] == pytest.approx(overall) == 0.25
    assert compared["2D"]["difference"] == pytest.approx(0.5)
    assert compared["source/ADE20K"]["test"] == "exact McNemar" and compared["source/ADE20K"]["p"] == 2 / 2**20
    assert compared["overall"]["test"].startswith("sign-flip") and compared["overall"]["p"] < 0.01
    vqa = [
        as_run([record("dog", answers, how="vqa", task="t", source="ADE20K") for _ in range(9)], "v")
        for answers in (["dog"] * 2 + ["cat"] * 8, ["dog"] * 10)
    ]
    soft = compare_records(*vqa, anyway=True)["source/ADE20K"]  # other truths
    assert soft["difference"] == pytest.approx(0.4) and soft["test"].startswith("sign-flip")
    assert soft["p"] == pytest.approx(2 / 2**9, rel=0.6)
    with pytest.raises(ValueError, match="same questions in the same order"):
        compare_records(a, b[::-1])
    with pytest.raises(ValueError, match="differ in their revision"):
        compare_records(a, [r | {"run": r["run"] | {"revision": "sha256:1"}} for r in b])


def test_answers_to_other_prompts_are_no_difference_between_models():
    a = as_run([record("A"), record("B")], "a")
    for change, complaint in [
        ({"answer": "(B)"}, r"truth: of 2 questions \(0 is the first\)"),
        ({"question": "how many ?"}, "prompt: of 2 questions"),
        ({"choices": ["3", "2"]}, "options: of 2 questions"),
    ]:
        b = [{**one, **change} for one in a]
        with pytest.raises(ValueError, match=complaint):
            compare_records(a, b)
        assert compare_records(a, b, anyway=True)["plain"]["n"] == 2
    b = [{**one, "run": {**one["run"], "variant": "paper"}} for one in a]
    with pytest.raises(ValueError, match=r"variant: x and paper.*--anyway"):
        compare_records(a, b)
    page = compare.page(a, b, compare_records(a, b, anyway=True), None, 8, compare.differences(a, b))
    assert "They differ in more than the model: variant: x and paper" in page


def test_a_pair_is_not_counted_among_its_questions():
    records = [record("(a)", "(a)", "question", "MMVP", pair=n // 2, id=str(n)) for n in range(4)]
    scores = score_records(records, "mmvp")
    assert {name: one["n"] for name, one in scores.items()} == {
        "overall": 2,
        "questions": 4,
        "task/question": 4,
        "task/pair": 2,
        "source/MMVP": 4,
    }


def test_the_page_shows_where_two_models_disagree(folders, checkpoint, tmp_path, capsys):
    records = ask(checkpoint, "cvbench", folders["cvbench"], tmp_path / "a")
    better = [
        r | {"output": r["answer"] + " <script>", "run": r["run"] | {"model": "better & bigger"}} for r in records
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in better))
    capsys.readouterr()
    compare.main([str(tmp_path / "a"), str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c"), "--limit", "8"])
    printed, page = capsys.readouterr().out, (tmp_path / "c" / "disagreements.html").read_text()
    assert "overall" in printed and "exact McNemar" in printed
    compared = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert (compared["A"]["model"], compared["B"]["model"]) == (checkpoint, "better & bigger")
    assert compared["B - A"]["overall"]["difference"] > 0
    assert page.count('<img src="data:image/jpeg;base64,') == 8 and 'src="http' not in page
    assert "<script>" not in page and "&lt;script&gt;" in page and "better &amp; bigger" in page
    assert page.count('class="right">B') == 8 and page.count('class="wrong">A') == 8
    cvbench_older(tmp_path / "other")  # other files, other revision
    with pytest.raises(SystemExit, match="holds other questions"):
        compare.main([str(tmp_path / "a"), str(tmp_path / "b.jsonl"), "--data", str(tmp_path / "other")])
    # Of a commit, --data is taken on trust, and may be another benchmark's folder after all.
    lines = [r | {"id": f"x{r['id']}", "run": r["run"] | {"revision": "0" * 40}} for r in records]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match=r"other has no question x\S+, which was answered"):
        compare.main([str(tmp_path / "x.jsonl")] * 2 + ["--data", str(tmp_path / "other"), "--out", str(tmp_path)])


def test_a_question_whose_image_is_gone_is_shown_without():
    def read_image(question):
        raise ImageError(question["id"], "its row has no image")

    page = compare.Pair({**record("A"), "question": "?"}, {**record("B"), "question": "?"}).card(read_image)
    white = Image.open(io.BytesIO(base64.b64decode(page["image"])))
    assert white.getpixel((0, 0)) == (255, 255, 255) and page["a_is_better"]


def test_the_page_says_who_is_better_and_how_often():
    """A is right on 3 of 10 questions that B gets wrong, B on 1 that A gets wrong; both are right on the rest."""
    outputs = {"a": "AAABAAAAAA", "b": "BBBAAAAAAA"}
    records = {name: as_run([record(one) for one in text], name) for name, text in outputs.items()}
    compared = compare_records(records["a"], records["b"])
    assert compared["overall" if "overall" in compared else "plain"]["difference"] == pytest.approx(-0.2)
    page = compare.page(records["a"], records["b"], compared, lambda _: random_image(0), limit=48)
    counts = re.search(r"on (\d+) of (\d+) questions: A is better on (\d+), B on (\d+)", page)
    assert counts.groups() == ("4", "10", "3", "1")
    for card, count in {'right">A: A': 3, 'wrong">B: B': 3, 'wrong">A: B': 1, 'right">B: A': 1}.items():
        assert page.count(f'class="{card}</p>') == count
    assert "<p>A: a<br>B: b</p>" in page
    few = compare.page(records["a"], records["b"], compared, lambda _: random_image(0), limit=2)
    assert re.findall(r"<small>(\d+)</small>", few) == ["0", "3"]  # from its beginning to its end
    difference, p = compared["plain"]["difference"], compared["plain"]["p"]
    low, high = compared["plain"]["ci95"]
    cells = [f"{100 * difference:+.1f}", f"[{100 * low:+.1f}, {100 * high:+.1f}]", f"{p:.2g}", "10"]
    assert "".join(f"<td>{cell}</td>" for cell in ["plain", *cells]) in page


def test_no_benchmark_or_variant_goes_untested():
    assert WRITERS.keys() == BENCHMARKS.keys()
    assert set(EXPECTED) == {(name, variant) for name in BENCHMARKS for variant in BENCHMARKS[name].variants}


# Other models -------------------------------------------------------------------------------------------------------
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}


def tokenizer_with(*tokens):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<image>", tokens[0])
    return tokenizer


def tiny_llava(make_model):
    model, processor = make_model(tasks=[])
    config = LlavaConfig(**{name: getattr(model.config, name) for name in ("vision_config", "text_config")})
    config.image_token_id = model.config.image_token_id
    fields = ("image_processor", "tokenizer", "patch_size", "vision_feature_select_strategy", "chat_template")
    options = {name: getattr(processor, name) for name in fields} | {"num_additional_image_tokens": 1}
    return LlavaForConditionalGeneration(config), LlavaProcessor(**options)


def tiny_qwen2_vl(_):
    pad, start, end = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
    tokenizer = tokenizer_with(f"{start}{pad}{end}", pad, "<|video_pad|>", start, end)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
    kinds = {"image": pad, "video": "<|video_pad|>", "vision_start": start, "vision_end": end}
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(token) for kind, token in kinds.items()}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    images = Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096})
    return model, Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template)


def tiny_idefics3(_):
    """SmolVLM's architecture (its own processor wants one more package)."""
    tokenizer = tokenizer_with("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = {name: TEXT[name] for name in sizes} | {"image_size": 32, "patch_size": 8}
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)}
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": 0}
    config = Idefics3Config(text_config=text, vision_config=vision, scale_factor=2, **ids)
    size = {"longest_edge": 32}
    images = Idefics3ImageProcessor(do_image_splitting=False, size=size, max_image_size=size)
    options = {"image_seq_len": 4, "chat_template": tokenizer.chat_template}
    return Idefics3ForConditionalGeneration(config), Idefics3Processor(images, tokenizer, **options)


@pytest.mark.parametrize("build", [tiny_llava, tiny_qwen2_vl, tiny_idefics3])
def test_any_image_text_model_answers_alike_one_by_one_and_batched(build, make_model, folders, tmp_path):
    torch.manual_seed(0)
    for part in build(make_model):
        part.save_pretrained(tmp_path / "model")
    answers = [
        ask(str(tmp_path / "model"), "cvbench", folders["cvbench"], tmp_path / size, "--batch_size", size)
        for size in ("1", "5")
    ]
    assert answers[0] == answers[1]
    assert len({record["output"] for record in answers[0]}) > 1
