"""Each benchmark's rows as questions (`benchmarks`): its columns' names, its forms of options and answers."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from ..inference.questions import read_options
from .question_files import Row, written_list


def cvbench(row: Row) -> dict:
    choices = row.choices("choices")
    return {
        # With its type (2D, 3D), should both files number their rows from 0.
        "id": f"{row['type']}-{row['idx']}",
        "task": row.text("task"),
        "source": row.text("source"),
        "question": row.text("prompt"),
        "choices": choices,
        "answer": f"({row.letter('answer', choices)})",
    }


def _listed_options(row: Row) -> tuple[list[str], str]:
    """The options that the question lists, and the right one's letter; options without words, four or as many as
    the answer's letter takes, if that is not among those that could be read."""
    options = read_options(row.text("question"))
    # A letter alone says enough; more than that is compared with the options' words, too.
    is_one_letter = re.fullmatch(r"\W*[A-Za-z]\W*", str(row["answer"])) is not None
    letter = row.letter("answer", [] if is_one_letter else options)
    # Options in a form that can't be read: answers are then read by their letters alone, of the usual four; or more,
    # since the right one must be among them.
    if ascii_uppercase.index(letter) >= len(options):
        options = [""] * max(4, ascii_uppercase.index(letter) + 1)
    return options, letter


def mmstar(row: Row) -> dict:
    choices, letter = _listed_options(row)
    return {
        "id": str(row["index"]),
        "task": row.text("category"),
        "source": row.text("l2_category"),
        "question": row.text("question"),
        "choices": choices,
        "answer": letter,
    }


def realworldqa(row: Row) -> dict:
    # Without listed options a small letter may be a word, the article "a".
    letters = "[A-Da-d]" if read_options(row.text("question")) else "[A-D]"
    is_letter = re.match(rf"\W*{letters}\s*(?:[.:)\]]|$)", str(row["answer"])) is not None
    if is_letter:
        task = "choice"
        choices, answer = _listed_options(row)
    else:
        task = "short"
        choices = []
        answer = row.text("answer")
    return {
        "id": str(row.place),
        "task": task,
        "source": "RealWorldQA",
        "question": row.text("question"),
        "choices": choices,
        "answer": answer,
    }


def okvqa(row: Row) -> dict:
    answers = row["answers"]
    # Some copies write the ten answers as text.
    if isinstance(answers, str):
        answers = row.choices("answers")
    # Now: else scoring would find it, once all questions are answered.
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise row.problem("answers", f"holds {str(answers)[:80]!r}: it must be a list of texts")
    return {
        "id": str(row["question_id"]),
        "task": str(row.get("question_type") or "all"),
        "source": "OK-VQA",
        "question": row.text("question"),
        "choices": [],
        "answer": answers,
    }


def mmvp(row: Row) -> dict:
    try:
        index = int(row["Index"])
    except (ValueError, TypeError) as error:
        raise row.problem("Index", f"holds {row['Index']!r}: it must be a whole number") from error
    # "(a) Open (b) Closed": before the first label there is nothing, hence from the second piece on.
    choices = re.split(r"\s*\([a-z]\)\s*", row["Options"])[1:] or row.choices("Options")
    return {
        "id": str(index),
        "task": "question",
        "source": "MMVP",
        # Questions 1 and 2 are a pair, 3 and 4 the next.
        "pair": (index + 1) // 2,
        "question": f"{row['Question']} {row['Options']}",
        "choices": choices,
        "answer": f"({row.letter('Correct Answer', choices).lower()})",
    }


def blink(row: Row) -> dict | None:
    # About several pictures: None leaves the question out, and `load_questions` says how many are.
    if row.get("image_2"):
        return None
    choices = row.choices("choices")
    return {
        "id": str(row["idx"]),
        # In the Hub's copy each subtask has a folder of its own, named like it.
        "task": str(row.get("sub_task") or row.file.parent.name),
        "source": "BLINK",
        "question": row.text("prompt"),
        "choices": choices,
        "answer": f"({row.letter('answer', choices)})",
    }


def three_dsr(row: Row) -> dict:
    # Two options or four: the columns of the others are empty, or hold the text "nan" in lmms-eval's copy.
    letters = [letter for letter in "ABCD" if row.get(letter) is not None and str(row[letter]).lower() != "nan"]
    choices = [str(row[letter]) for letter in letters]
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    category = str(row["category"])
    return {
        "id": str(row["index"]),
        "task": category,
        # Variants differ in their id's end: the image is mirrored ("-flip"), the options are in another order ("-1").
        "group": re.sub(r"(-flip|-\d)+$", "", str(row["qid"])),
        # "height_higher" -> "height": the four groups that the benchmark reports.
        "group_source": category.split("_object")[0].split("_")[0],
        "source": None,
        "question": f"{row['question']}\n{options}",
        "choices": choices,
        "answer": row.letter("answer", choices),
    }


def three_dsr_vanilla(row: Row) -> dict:
    # Without variants each question counts by itself.
    return {name: value for name, value in three_dsr(row).items() if not name.startswith("group")}


def vstar(row: Row) -> dict:
    # Under the names that `_listed_options` asks for.
    columns = {**row.values, "question": row.text("text"), "answer": row["label"]}
    choices, letter = _listed_options(Row(columns, row.file, row.number))
    return {
        "id": row.name("question_id", "index"),
        "task": row.text("category"),
        "source": "V*Bench",
        "question": row.text("text"),
        "choices": choices,
        "answer": letter,
    }


# "option_a", "Option 1", "opt1".
OPTION_COLUMN = re.compile(r"(?:opt|option|choice)[_ -]?(?:(?P<number>\d{1,2})|[A-Za-z])", re.IGNORECASE)


def _options_in_columns(row: Row) -> tuple[str | None, Row]:
    """For a row whose options have a column each ("A", "B" or "option_a", "option_b" or "option1", "option2"): the
    name of a column that lists them, and the row with it; else None and the row. ValueError for columns that are
    called so and aren't all there."""
    for form in ("{}", "option_{}", "choice_{}", "opt_{}"):
        filled = [letter for letter in ascii_uppercase if row.get(form.format(letter)) is not None]
        if filled[:2] == ["A", "B"]:
            options = {letter: row.get(form.format(letter)) for letter in filled}
            return "choices", Row({**row.values, "choices": options}, row.file, row.number)
    # By their headers as they are: to `Row.get` "option_1" is another spelling of "option_i".
    matches = {column: OPTION_COLUMN.fullmatch(str(column).strip()) for column in row.values}
    filled = [column for column, match in matches.items() if match and row.get(column) is not None]
    numbered = {
        int(match["number"]): row.get(column) for column, match in matches.items() if match and match["number"]
    }
    numbers = sorted(number for number, option in numbered.items() if option is not None)
    # From 1 or from 0, without a gap.
    if len(numbers) > 1 and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        options = [numbered[number] for number in numbers]
        return "choices", Row({**row.values, "choices": options}, row.file, row.number)
    if filled:
        raise row.problem(filled[0], "looks like an option: give two or more, option_a, option_b, ... without a gap")
    return None, row


def _are_listed(choices: Sequence[str], in_question: Sequence[str]) -> bool:
    """Whether what looks like options in a question are its options, and not points (A) and (B) that it mentions: the
    words are the same, but for punctuation, an "or", and what the question says behind the last one."""
    if len(choices) != len(in_question):
        return False
    for number, (choice, listed) in enumerate(zip(choices, in_question, strict=True), start=1):
        words = _words(choice)
        listed_words = _words(listed)
        if number == len(choices):
            listed_words = listed_words[: len(words)]
        elif listed_words[len(words) :] == ["or"]:
            listed_words.pop()
        if words != listed_words:
            return False
    return True


def _words(text: str) -> list[str]:
    # Options may be signs alone: "<", ">".
    return re.findall(r"\w+", text.casefold()) or text.split()


TURNS = "must hold a turn from human and one from gpt, each with a value, which is a text"


def your_own(row: Row) -> dict:
    """The miniature's form (question, choices, answer), VLMEvalKit's (with a hint, options in columns) or LLaVA's
    (conversations: the first question, its answer)."""
    turns = row.get("conversations")
    if turns:
        try:
            # Reversed, so that the first turn of each speaker is the one that stays.
            texts = {turn["from"]: turn["value"] for turn in reversed(turns)}
            question = texts["human"]
            answer = texts["gpt"]
        except (KeyError, TypeError) as error:
            raise row.problem("conversations", TURNS) from error
        # An answer of null would be the word "None".
        if not isinstance(question, str) or not isinstance(answer, str):
            raise row.problem("conversations", TURNS)
    else:
        question = row.get("question", "text", "prompt") or row["question"]
        answer = row.get("answer", "label", "ground_truth")
        if answer is None:
            raise row.problem("answer", "is missing: without a right answer nothing can be scored")
    # As a text, a list of answers would be met by no answer.
    for column, value in {"question": question, "answer": answer}.items():
        if isinstance(value, (list, dict)):
            raise row.problem(column, f"holds {str(value)[:80]!r}: it must be a text")
    # LLaVA's rows mark the image's place; here the chat template does.
    question = str(question).replace("<image>", "").strip()
    in_question = read_options(question)
    column = next((name for name in ("choices", "options") if row.get(name) is not None), None)
    if column is None:
        column, row = _options_in_columns(row)
    choices = in_question if column is None else row.choices(column)
    # The question doesn't list its options, or other ones than there are: they are written below it.
    if not _are_listed(choices, in_question):
        lines = (f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
        question = "\n".join([question, *lines])
    if choices:
        try:
            answer = f"({Row({'answer': answer}, row.file, row.number).letter('answer', choices)})"
        except ValueError:
            if column is not None:
                raise
            # A free answer to a text that happens to look like options.
            choices = []
    # A list that a CSV has as text.
    listed = written_list(str(answer))
    if not choices and isinstance(listed, list) and any(isinstance(text, str) for text in listed):
        raise row.problem("answer", f"holds {str(answer)[:80]!r}: no answer equals a list, give one text")
    # VLMEvalKit's column of what one has to know for the question.
    if row.get("hint") is not None:
        question = f"Hint: {row.text('hint')}\n{question}"
    return {
        "id": row.name("id", "question_id", "idx"),
        "task": str(row.get("task", "category") or "all"),
        "source": row.file.name,
        "question": question,
        "choices": choices,
        "answer": str(answer),
    }
