"""Each benchmark's rows as questions (`benchmarks`): its columns' names, its forms of options and answers."""

import re
from string import ascii_uppercase

from ..inference.questions import read_options
from .question_files import Row


def cvbench(row: Row) -> dict:
    choices = row.choices("choices")
    return {
        "id": f"{row['type']}-{row['idx']}",
        "task": row["task"],
        "source": row["source"],
        "question": row["prompt"],
        "choices": choices,
        "answer": f"({row.letter('answer', choices)})",
    }


def _listed_options(row: Row) -> tuple[list[str], str]:
    """The options that the question lists, and the right one's letter; four options without words if the answer's is
    not among those that could be read."""
    options = read_options(row["question"])
    is_one_letter = re.fullmatch(r"\W*[A-Za-z]\W*", str(row["answer"])) is not None
    letter = row.letter("answer", [] if is_one_letter else options)
    return (options if ascii_uppercase.index(letter) < len(options) else [""] * 4), letter


def mmstar(row: Row) -> dict:
    choices, letter = _listed_options(row)
    return {
        "id": str(row["index"]),
        "task": row["category"],
        "source": row["l2_category"],
        "question": row["question"],
        "choices": choices,
        "answer": letter,
    }


def realworldqa(row: Row) -> dict:
    letters = "[A-Da-d]" if read_options(row["question"]) else "[A-D]"
    is_letter = re.match(rf"\W*{letters}\s*(?:[.:)\]]|$)", str(row["answer"])) is not None
    choices, answer = _listed_options(row) if is_letter else ([], row["answer"])
    return {
        "id": str(row.place),
        "task": "choice" if is_letter else "short",
        "source": "RealWorldQA",
        "question": row["question"],
        "choices": choices,
        "answer": answer,
    }


def okvqa(row: Row) -> dict:
    answers = row["answers"]
    if isinstance(answers, str):
        answers = row.choices("answers")
    return {
        "id": str(row["question_id"]),
        "task": row.get("question_type") or "all",
        "source": "OK-VQA",
        "question": row["question"],
        "choices": [],
        "answer": list(answers),
    }


def mmvp(row: Row) -> dict:
    index = int(row["Index"])
    choices = re.split(r"\s*\([a-z]\)\s*", row["Options"])[1:] or row.choices("Options")
    return {
        "id": str(index),
        "task": "question",
        "source": "MMVP",
        "pair": (index + 1) // 2,
        "question": f"{row['Question']} {row['Options']}",
        "choices": choices,
        "answer": f"({row.letter('Correct Answer', choices).lower()})",
    }


def blink(row: Row) -> dict | None:
    if row.get("image_2"):  # questions about several pictures are left out
        return None
    choices = row.choices("choices")
    return {
        "id": str(row["idx"]),
        "task": row.get("sub_task") or row.file.parent.name,
        "source": "BLINK",
        "question": row["prompt"],
        "choices": choices,
        "answer": f"({row.letter('answer', choices)})",
    }


def three_dsr(row: Row) -> dict:
    letters = [letter for letter in "ABCD" if row.get(letter) is not None]
    choices = [str(row[letter]) for letter in letters]
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    category = str(row["category"])
    return {
        "id": str(row["index"]),
        "task": category,
        # a question's variants: the image mirrored ("-flip"), the options in another order ("-1")
        "group": re.sub(r"(-flip|-\d)+$", "", str(row["qid"])),
        "group_source": category.split("_object")[0].split("_")[0],
        "source": None,
        "question": f"{row['question']}\n{options}",
        "choices": choices,
        "answer": row.letter("answer", choices),
    }


def three_dsr_vanilla(row: Row) -> dict:
    return {name: value for name, value in three_dsr(row).items() if not name.startswith("group")}


def vstar(row: Row) -> dict:
    columns = {**row.values, "question": row["text"], "answer": row["label"]}
    choices, letter = _listed_options(Row(columns, row.file, row.number))
    return {
        "id": row.name("question_id", "index"),
        "task": row["category"],
        "source": "V*Bench",
        "question": row["text"],
        "choices": choices,
        "answer": letter,
    }


def your_own(row: Row) -> dict:
    """The miniature's form (question, choices, answer) or LLaVA's (conversations: the first question, its answer)."""
    turns = row.get("conversations")
    if turns:
        try:
            texts = {turn["from"]: turn["value"] for turn in reversed(turns)}
            question, answer = texts["human"], texts["gpt"]
        except (KeyError, TypeError) as error:
            raise row.problem(
                "conversations", "must hold a turn from human and one from gpt, each with a value"
            ) from error
    else:
        question = row.get("question", "text", "prompt") or row["question"]
        answer = row.get("answer", "label", "ground_truth")
        if answer is None:
            raise row.problem("answer", "is missing: without a right answer nothing can be scored")
    question = str(question).replace("<image>", "").strip()
    has_list = row.get("choices", "options") is not None
    choices = (
        row.choices("choices" if row.get("choices") is not None else "options") if has_list else read_options(question)
    )
    if has_list and len(read_options(question)) != len(choices):
        lines = (f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
        question = "\n".join([question, *lines])
    if choices:
        try:
            answer = f"({Row({'answer': answer}, row.file, row.number).letter('answer', choices)})"
        except ValueError:
            if has_list:
                raise
            choices = []  # a free answer to a text that happens to look like options
    return {
        "id": row.name("id", "question_id", "idx"),
        "task": str(row.get("task", "category") or "all"),
        "source": row.file.name,
        "question": question,
        "choices": choices,
        "answer": str(answer),
    }
