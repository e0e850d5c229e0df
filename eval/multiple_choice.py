"""Multiple-choice questions about an image (CV-Bench's form).

A question is `{"id", "image": path, "question": prompt and options, "choices": [str], "answer": "(A)", "task": str}`.
"""

from collections import defaultdict
from collections.abc import Sequence

from .reading import parse_choice


def is_correct(record: dict) -> bool:
    """Whether an answered question's `"output"` names its `"answer"` ("(A)" or "a"); an unreadable output is wrong."""
    return parse_choice(record["output"], record["choices"]) == f"({record['answer'].strip('()').upper()})"


def score(records: Sequence[dict]) -> dict[str, float]:
    """Accuracy (0 to 1) for every task, and `"average"`: the mean over tasks."""
    if not records:
        raise ValueError("no answers to score: generate_answers got an empty list of questions")
    by_task = defaultdict(list)
    for record in records:
        by_task[record["task"]].append(is_correct(record))
    accuracy = {task: sum(correct) / len(correct) for task, correct in by_task.items()}
    return {**accuracy, "average": sum(accuracy.values()) / len(accuracy)}
