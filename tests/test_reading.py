"""Which option an output states."""

import pytest

from ola_vlm.eval.reading import final_answer, parse_choice
from ola_vlm.eval.scoring import SCORERS

BOXES = ["The left box", "The right box", "Near", "Far"]
STATED = {
    "(B)": [
        "b.",
        "**(B)**",
        "B) The right box",
        "(B) 3",
        "The answer is b.",
        "The answer is (B), not (A)",
        "Answer: B",
        "answer: b",
        "ANSWER - B",
        "### Answer\nB",
        "The correct option is most likely (b)",
        "The answer cannot be A, so it must be B",
        "I would go with option B",
        "I choose B.",
        "B is correct",
        "B is the right choice because A is left",
        "B because option A is farther",
        "(B), since (A) is behind",
        "B\n\nA is farther away",
        "A. The left box\nB. The right box\n\nAnswer: B",
        "Option A is wrong. The answer is B.",
        "Choice A can be excluded. Answer: B",
        "We can rule out A. B.",
        "It's not A, it's B.",
        "The answer is B and not A",
        "Between option A and option B, the answer is B",
        "A. No wait, the answer is B",
        "The answer is A. Wait, the answer is B.",
        "<think>Option A says left. That is not right.</think>\n\nB",
        "<THINKING>A</THINKING>(B)",
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B",
        "<answer>B</answer>",
        "<answer>The right box",
        "I see A first. \\boxed{\\text{B}}",
        '{"reasoning": "A is left", "answer": "B"}',
        "答案：B",  # noqa: RUF001
        "正确答案是B",
        "答えはB",
        "La respuesta es B",
        "Die Antwort ist B.",
        "Ответ: B",
        "the right box",
        "The left box is far. The answer is the right box.",
        "The left box is excluded. It is the right box.",
    ],
    "(A)": ["A", "a", "(a)", "The answer is a", "Answer (A)", "A is right"],
    None: [
        "",
        "(A) (B)",
        "A. B.",
        "(A) or (B)",
        "A/B",
        "neither A nor B",
        "Both A and B are correct",
        "The answer is A or B",
        "Answer: A, B",
        "(A) The left box (B) The right box",
        "Option A is wrong.",
        "The answer is not A.",
        "A red ball",
        "I think so",
        "E",
        "<think>it may be B",
        "The left box or the right box",
    ],
}


@pytest.mark.parametrize(
    ("expected", "output"), [(letter, text) for letter, texts in STATED.items() for text in texts]
)
def test_the_stated_answer_counts(expected, output):
    assert parse_choice(output, BOXES) == expected


def test_options_that_are_letters_themselves():
    choices = ["B is closer", "A is closer"]
    assert parse_choice("A is closer", choices) == "(B)"
    assert parse_choice("(A) B is closer", choices) == "(A)"
    assert parse_choice("B", choices) == "(B)"
    assert parse_choice("10", ["1", "2"]) is None and parse_choice("There are 2.", ["1", "2"]) == "(B)"


def test_free_answers_are_read_behind_the_reasoning():
    assert final_answer("<think>two? no</think> <answer>three</answer>") == "three"
    assert final_answer("<think>no end") == ""
    assert SCORERS["exact"]({"output": "<think>no</think>\nYes.", "answer": "yes"})
    assert SCORERS["vqa"]({"output": "<think>cat</think>dog", "answer": ["dog"] * 10}) == 1


def test_long_outputs_are_read_in_passing():
    for text in ("answer is " * 5_000, "(A " * 5_000, "<answer>" * 5_000, "\\boxed{" * 5_000, "not A, " * 5_000):
        assert parse_choice(text, BOXES) in (None, "(A)")
