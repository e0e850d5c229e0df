"""Scores of multiple-choice questions about an image (CV-Bench's form); `reading` finds the option an answer states.

A question is `{"id", "image": path, "question": prompt and options, "choices": [str], "answer": "(A)", "task": str}`.
"""

from collections import defaultdict
from collections.abc import Sequence
from string import ascii_uppercase

from .cleaning import scored_output
from .reading import parse_choice


def is_letter_of(answer: str, choices: Sequence[str]) -> bool:
    """Whether an `"answer"` names one of the options: "(A)", "(a)" or "a"."""
    # As a list: "AB", two letters, is part of the alphabet's text.
    return answer.strip("()").upper() in list(ascii_uppercase[: len(choices)])


def is_correct(record: dict) -> bool:
    """Whether an answered question's `"output"` names its `"answer"` ("(A)" or "a"); an unreadable output is wrong."""
    # None, for an output that names no option or several, equals no answer.
    return parse_choice(scored_output(record), record["choices"]) == f"({record['answer'].strip('()').upper()})"


def score(records: Sequence[dict]) -> dict[str, float]:
    """Accuracy (0 to 1) for every task, and `"average"`: the mean over tasks."""
    if not records:
        raise ValueError("no answers to score: generate_answers got an empty list of questions")
    by_task = defaultdict(list)
    for record in records:
        by_task[record["task"]].append(is_correct(record))
    accuracy = {task: sum(correct) / len(correct) for task, correct in by_task.items()}
    # Tasks count alike, however many questions each has.
    return {**accuracy, "average": sum(accuracy.values()) / len(accuracy)}
