"""eval/: answers are read in every form in which models give them, and compared with honest statistics; lmms-eval."""

import importlib.util
import json
import sys
from itertools import groupby
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_image
from PIL import Image
from scipy import stats

from ola_vlm.eval.during_training import read_questions
from ola_vlm.eval.multiple_choice import is_correct, score
from ola_vlm.eval.reading import parse_choice
from ola_vlm.eval.statistics import compare_answers, paired_comparison
from ola_vlm.inference.chat import Chat
from ola_vlm.inference.generate import generate_answers
from ola_vlm.targets.encoders import open_image
from ola_vlm.training.collator import OlaVlmCollator

NUMBERS = ["2", "3", "10", "1"]
SIDES = ["left", "far left", "the blue box"]


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("(B)", NUMBERS, "(B)"),
        ("( B )", NUMBERS, "(B)"),
        ("(b)", NUMBERS, "(B)"),
        ("**(B)**", NUMBERS, "(B)"),
        ("B", NUMBERS, "(B)"),
        ("b.", NUMBERS, "(B)"),
        ("B.", NUMBERS, "(B)"),
        ("B) 3", NUMBERS, "(B)"),
        ("B: 3", NUMBERS, "(B)"),
        ("B 3", NUMBERS, "(B)"),
        ("(B) 3", NUMBERS, "(B)"),
        ("The answer is (B)", NUMBERS, "(B)"),
        ("The answer is B.", NUMBERS, "(B)"),
        ("The answer is (B), not (A)", NUMBERS, "(B)"),
        ("Answer: B", NUMBERS, "(B)"),
        ("The correct option is B because", NUMBERS, "(B)"),
        ("I would say (B).", NUMBERS, "(B)"),
        ("3", NUMBERS, "(B)"),
        ("There are 3 of them.", NUMBERS, "(B)"),
        ("10", NUMBERS, "(C)"),
        ("far left", SIDES, "(B)"),
        ("It is on the left.", SIDES, "(A)"),
        ("The blue box", SIDES, "(C)"),
        ("The answer is a blue box: the blue box", SIDES, "(C)"),
        ("", NUMBERS, None),
        ("   ", NUMBERS, None),
        ("(F)", NUMBERS, None),
        ("E", NUMBERS, None),
        ("a table", NUMBERS, None),
        ("(A) or (B)", NUMBERS, None),
        ("A and B", NUMBERS, None),
        ("2 or 3", NUMBERS, None),
        ("Either (A) is right or (C)", NUMBERS, None),
        ("same", ["same", "same"], None),
        ("I do not know", NUMBERS, None),
    ],
)
def test_parse_choice(text, choices, expected):
    assert parse_choice(text, choices) == expected


@pytest.fixture
def questions(tmp_path):
    """Two images with three questions each, of different lengths."""
    asked = []
    for i in range(6):
        random_image(i // 3).save(tmp_path / f"{i // 3}.png")
        text = " what is the color of the cube ?" + " red" * (i % 3)
        asked.append({"id": f"q{i}", "image": f"{i // 3}.png", "question": text, "choices": ["red", "blue"]})
    return [{**question, "answer": "(A)", "task": "depth"} for question in asked]


def test_batched_answers_equal_single_ones(make_model, questions, tmp_path):
    model, processor = make_model()
    model.train()
    batched = generate_answers(model, processor, questions, tmp_path, batch_size=4, max_new_tokens=5)
    assert model.training, "the model's mode is put back"
    assert [record["id"] for record in batched] == [question["id"] for question in questions]
    single = [generate_answers(model, processor, [q], tmp_path, max_new_tokens=5)[0] for q in questions]
    assert [record["output"] for record in batched] == [record["output"] for record in single]
    assert len({record["output"] for record in batched}) > 1, "answers of six prompts must not all be alike"
    assert all("output" not in question for question in questions)


def test_generate_answers_reports_progress_by_batch(make_model, questions, tmp_path):
    model, processor = make_model(tasks=[])
    batches = []

    def progress(iterator):
        for item in iterator:
            batches.append(item)
            yield item

    generate_answers(model, processor, questions, tmp_path, batch_size=4, max_new_tokens=1, progress=progress)
    assert batches == [0, 4]


def test_the_model_sees_pictures_as_in_training(make_model, questions, tmp_path, monkeypatch):
    model, processor = make_model()
    see_through = random_image(0)
    see_through.putalpha(random_image(1).convert("L"))
    see_through.save(tmp_path / "0.png")
    seen, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: seen.append(inputs["pixel_values"]) or generate(**inputs))
    generate_answers(model, processor, questions[:1], tmp_path, max_new_tokens=1)
    collate = OlaVlmCollator(processor)._pixel_values
    assert seen[0].equal(collate([open_image(see_through)])) and not seen[0].equal(collate([random_image(0)]))


@torch.no_grad()
def test_no_way_of_asking_emits_image_or_task_tokens(make_model, questions, tmp_path, monkeypatch):
    """In an evaluation, and in a chat."""
    model, processor = make_model()
    direction = 1e3 * torch.randn(model.lm_head.in_features, generator=torch.Generator().manual_seed(0))
    for i, token_id in enumerate(model.suppressed_token_ids):  # whatever the state is, half of them would win
        model.lm_head.weight[token_id] = direction if i % 2 else -direction
    emitted, generate = [], model.generate

    def generate_and_look(**inputs):
        tokens = generate(**inputs)
        emitted.append(tokens[:, inputs["input_ids"].shape[1] :])
        return tokens

    monkeypatch.setattr(model, "generate", generate_and_look)
    generate_answers(model, processor, questions[:2], tmp_path, max_new_tokens=3)
    content = [{"type": "image", "image": random_image(0)}, {"type": "text", "text": "what is this ?"}]
    for temperature in (0.0, 1.0):
        list(Chat(model, processor).stream([{"role": "user", "content": content}], temperature, max_new_tokens=3))
    assert len(emitted) == 3
    for tokens in emitted:
        assert tokens.numel() > 0 and not torch.isin(tokens, torch.tensor(model.suppressed_token_ids)).any()


def record(id, output, answer="(A)", task="depth"):
    return {"id": id, "output": output, "answer": answer, "task": task, "choices": ["2", "3"]}


def test_score_is_the_mean_over_tasks_not_over_questions():
    records = [record(i, "(A)") for i in range(3)] + [record(3, "(A)", "(B)", "count")]
    assert score(records) == {"depth": 1.0, "count": 0.0, "average": 0.5}


def test_an_empty_answer_is_wrong_and_takes_nothing_from_its_neighbor():
    assert [is_correct(r) for r in (record(0, "(A)"), record(1, ""), record(2, "(A)"))] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image": 3}, "its image is 3, it must be a text"),
        ({"question": None}, "its question is None, it must be a text"),
        ({"answer": 1}, "its answer is 1, it must be a text"),
        ({"task": ["x"]}, r"its task is \['x'\], it must be a text"),
        ({"choices": 5}, "its choices are 5, they must be a list of texts"),
        ({"choices": ["red", 2]}, "they must be a list of texts"),
        ({"answer": "blue"}, r"its answer 'blue' is the letter of none of its 2 choices: give it as \"\(A\)\""),
        ({"answer": "(C)"}, "is the letter of none of its 2 choices"),
        ({"choices": [str(n) for n in range(27)], "answer": "(A)"}, "it has 27 choices: give at most 26"),
        ({"image": "damaged.png"}, "its image can't be opened: .*damaged.png"),
    ],
)
def test_a_runs_questions_are_looked_at_before_it_begins(tmp_path, changes, match):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    random_image(0).save(tmp_path / "whole.png")
    picture = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "damaged.png").write_bytes(picture[: len(picture) // 2])
    question = {"question": "which ?", "image": "0.png", "choices": ["red", "blue"], "answer": "(b)"}
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([question, {"question": "what ?", "image": "0.png"}]))
    assert len(read_questions(file, tmp_path)) == 2
    file.write_text(json.dumps([question, question | changes]))
    with pytest.raises(ValueError, match=f"questions.json, question 1: .*{match}"):
        read_questions(file, tmp_path)


def test_score_refuses_an_empty_list():
    with pytest.raises(ValueError, match="no answers"):
        score([])


def test_mcnemar_of_one_seed_matches_the_binomial():
    a = np.array([True] * 50 + [False] * 10 + [True] * 2 + [False] * 38)
    b = np.array([True] * 50 + [True] * 10 + [False] * 2 + [False] * 38)
    result = paired_comparison(a, b)
    assert result["difference"] == pytest.approx(0.08)
    # two-sided binomial: 2 * (1 + 12 + 66) / 2**12
    assert result["p"] == pytest.approx(2 * 79 / 4096)
    assert result["test"] == "exact McNemar" and result["n"] == 100
    low, high = result["ci95"]
    # the bootstrap's normal approximation: .08 +- 1.96 * sqrt((.12 - .0064) / 100)
    assert low == pytest.approx(0.08 - 0.066, abs=0.015) and high == pytest.approx(0.08 + 0.066, abs=0.015)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_holds_95_percent(seeds):
    """Its ends are 1.96 standard errors from the difference; those of 90% would be 1.64 from it."""
    rng = np.random.default_rng(0)
    a = rng.random((seeds, 2000)) < 0.5
    b = rng.random((seeds, 2000)) < 0.6
    result = paired_comparison(a, b)
    wins = (b.astype(float) - a).mean(0)
    error = wins.std() / np.sqrt(2000)
    low, high = result["ci95"]
    assert (result["difference"] - low) / error == pytest.approx(1.96, rel=0.04)
    assert (high - result["difference"]) / error == pytest.approx(1.96, rel=0.04)


def test_b_minus_a_and_both_tests_are_two_sided():
    rng = np.random.default_rng(0)
    a = rng.random((4, 60)) < 0.6
    b = rng.random((4, 60)) < 0.4
    worse = paired_comparison(a, b)
    better = paired_comparison(b, a)
    assert worse["difference"] == pytest.approx(b.mean() - a.mean()) and worse["difference"] < 0
    assert worse["p"] < 0.05 and worse["p"] == pytest.approx(better["p"], rel=0.2, abs=1e-3)
    assert worse["p_seeds"] == pytest.approx(stats.ttest_rel(b.mean(1), a.mean(1)).pvalue)
    assert worse["n"] == 60  # questions, however many seeds answered them


def test_every_seed_counts():
    """Not the first one alone: what it gains the second one loses."""
    right = [record(i, "(A)") for i in range(10)]
    wrong = [record(i, "(B)") for i in range(10)]
    compared = compare_answers([wrong, right], [right, wrong])
    assert compared["depth"]["difference"] == 0
    assert compared["depth"]["seed_differences"] == [1, -1]


def test_equal_models_do_not_differ():
    same = np.ones((3, 20), bool)
    assert paired_comparison(same[0], same[0])["p"] == 1.0
    result = paired_comparison(same, same)
    assert result["difference"] == 0 and result["ci95"] == [0, 0] and result["p"] == 1.0


def test_sign_flips_agree_with_mcnemar_when_all_seeds_are_copies():
    rng = np.random.default_rng(0)
    a, b = rng.random(200) < 0.5, rng.random(200) < 0.6
    one, three = paired_comparison(a, b), paired_comparison(np.stack([a] * 3), np.stack([b] * 3))
    assert three["p"] == pytest.approx(one["p"], abs=0.02)
    assert three["ci95"] == pytest.approx(one["ci95"], abs=0.02)
    assert three["seed_differences"] == pytest.approx([one["difference"]] * 3)
    # Seeds that agree exactly differ by one question at least: t with 2 degrees of freedom.
    t = abs(one["difference"]) / (1 / 200 / 3**0.5)
    assert three["p_seeds"] == pytest.approx(2 * stats.t.sf(t, 2))


def test_p_values_of_the_null_are_uniform():
    rng = np.random.default_rng(1)
    ps = [paired_comparison(*(rng.random((2, 2, 100)) < 0.6), seed=i)["p"] for i in range(200)]
    assert 0.01 <= np.mean(np.array(ps) < 0.05) <= 0.1


def test_strata_weigh_alike_whatever_their_size():
    a, b = np.zeros((2, 100), bool), np.zeros((2, 100), bool)
    b[:, :10] = True  # everything in the small stratum, nothing in the large one
    result = paired_comparison(a, b, strata=["small"] * 10 + ["large"] * 90)
    assert result["difference"] == pytest.approx(0.5)
    assert result["ci95"] == pytest.approx([0.5, 0.5])  # questions are drawn within their stratum


def test_draws_are_by_the_seed():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 50)) < 0.5, rng.random((3, 50)) < 0.6
    drawn = [paired_comparison(a, b, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and drawn[0]["p"] != drawn[2]["p"]


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((1, 3), (2, 3)), ((0,), (0,))])
def test_unpaired_answers_are_refused(shapes):
    with pytest.raises(ValueError, match="equal, non-empty shapes"):
        paired_comparison(*(np.ones(shape, bool) for shape in shapes))


def test_compare_answers_by_task_and_on_average():
    wrong = [[record(i, "(B)", task="depth" if i < 5 else "count") for i in range(20)] for _ in range(2)]
    better = [[{**r, "output": "(A)" if r["task"] == "depth" else "(B)"} for r in seed] for seed in wrong]
    compared = compare_answers(wrong, better)
    assert {task: result["difference"] for task, result in compared.items()} == {
        "depth": 1,
        "count": 0,
        "average": 0.5,
    }
    with pytest.raises(ValueError, match="same questions in the same order"):
        compare_answers(wrong, [seed[::-1] for seed in better])
    with pytest.raises(ValueError, match="seeds are paired"):
        compare_answers(wrong, better[:1])


# lmms-eval ----------------------------------------------------------------------------------------------------------
# It has an environment of its own: here stands what eval/lmms.py takes of it.
class Collator:
    """lmms-eval's, as its documentation says: batches of requests of one group, the longest way round; answers go back
    into the order of the requests."""

    def __init__(self, requests, sort_fn, group_fn, grouping):
        assert grouping
        self.requests = requests
        numbers = sorted(range(len(requests)), key=lambda i: (repr(group_fn(requests[i])), sort_fn(requests[i])))
        self.groups = [list(group) for _, group in groupby(numbers, key=lambda i: repr(group_fn(requests[i])))]

    def get_batched(self, n, batch_fn):
        for numbers in self.groups:
            for start in range(0, len(numbers), n):
                yield [self.requests[i] for i in numbers[start : start + n]]

    def get_original(self, answers):
        numbers = [i for group in self.groups for i in group]
        return [answer for _, answer in sorted(zip(numbers, answers, strict=True))]


class BaseModel:
    @property
    def rank(self):
        return self._rank


class ChatMessages(SimpleNamespace):
    def extract_media(self):
        kinds = ("image", "video", "audio")
        return [[part for part in self.messages if part["type"] == kind] for kind in kinds]

    def to_hf_messages(self):
        return self.messages


@pytest.fixture
def lmms(monkeypatch):
    modules = {
        "lmms_eval": {"utils": SimpleNamespace(Collator=Collator)},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": BaseModel},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ola_vlm.eval.lmms", raising=False)
    yield importlib.import_module("ola_vlm.eval.lmms")
    sys.modules.pop("ola_vlm.eval.lmms", None)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"max_new_tokens": 8, "do_sample": False}, {"max_new_tokens": 8, "do_sample": False}),
        ({"max_new_tokens": None, "temperature": 0, "top_p": None}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0.7}, {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7}),
        ({"top_p": 0.5, "do_sample": True}, {"max_new_tokens": 1024, "do_sample": True, "top_p": 0.5}),
        ({"num_beams": 3, "image_aspect_ratio": "pad"}, {"max_new_tokens": 1024, "do_sample": False, "num_beams": 3}),
    ],
)
def test_a_task_of_lmms_eval_samples_only_if_it_says_so(lmms, settings, options):
    assert lmms.generation_options(settings) == options


def test_lmms_eval_gets_each_requests_own_answer(lmms, monkeypatch):
    """Batches are of one task's settings; the row is the split's; an answer ends where the first of "until" begins."""
    loaded = []

    def load(*how):
        loaded.append(how)
        return SimpleNamespace(eval=lambda: None), "processor"

    def answer(model, processor, chats, **options):
        batches.append((len(chats), options["max_new_tokens"]))
        return [f"{chat[0]['text']} END and\n\nmore" for chat in chats]

    batches = []
    monkeypatch.setattr(lmms, "load_checkpoint", load)
    monkeypatch.setattr(lmms, "answer_chats", answer)
    model = lmms.OlaVlm("here", batch_size="2", dtype="bfloat16", device_map="cpu", trust_remote_code=True)
    assert loaded == [("here", "bfloat16", "cpu", True)]
    model.task_dict = {
        task: {split: [f"{task} {split} {row}" for row in range(3)] for split in ("val", "test")} for task in "ab"
    }

    def request(task, split, row, **settings):
        as_messages = lambda text: [{"type": "text", "text": text}]  # noqa: E731
        return SimpleNamespace(args=("context" * (3 - row), as_messages, settings, row, task, split))

    asked = [
        request("a", "test", 2, max_new_tokens=4, until=["\n\n", " END"]),
        request("b", "val", 0, max_new_tokens=9, until="more"),
        request("a", "test", 0, max_new_tokens=4, until=["\n\n", " END"]),
        request("b", "test", 1, until=None),
        request("a", "val", 1, max_new_tokens=4, until=["\n\n", " END"]),
    ]
    answers = model.generate_until(asked)
    assert answers == [
        "a test 2",
        "b val 0 END and\n\n",
        "a test 0",
        "b test 1 END and\n\nmore",
        "a val 1",
    ]
    assert sorted(batches) == [(1, 4), (1, 9), (1, 1024), (2, 4)]
    for kind in ("video", "audio"):
        with pytest.raises(ValueError, match="a: videos and sound can't be shown"):
            model._messages(lambda _, kind=kind: [{"type": kind}], 0, "a", "test")
    with pytest.raises(ValueError, match="batch_size 'auto': give a number"):
        lmms.OlaVlm("here", batch_size="auto")


def test_the_miniature_as_a_task_of_lmms_eval(tmp_path, monkeypatch):
    file = Path(__file__).parents[1] / "eval" / "lmms_tasks" / "miniature.py"
    spec = importlib.util.spec_from_file_location("lmms_task", file)
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    monkeypatch.setattr(task, "FOLDER", tmp_path / "benchmark")
    (tmp_path / "benchmark").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "benchmark" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    row = {"filename": "a.png", "prompt": "which ? (A) red (B) blue", "choices": ["red", "blue"], "answer": "(B)"}
    assert [image.getpixel((0, 0)) for image in task.images(row)] == [(255, 0, 0)]
    with pytest.raises(ValueError, match="lies outside"):
        task.images(row | {"filename": "../private.png"})
    assert task.question(row) == row["prompt"]
    assert [task.score(row, [text]) for text in ("B.", "(A)", "blue", "")] == [
        {"accuracy": accuracy} for accuracy in (1.0, 0.0, 1.0, 0.0)
    ]
