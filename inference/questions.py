"""The options that a question lists, and an answer shown with the words of the one that it chose."""

import re
from string import ascii_uppercase


def read_options(question: str) -> list[str]:
    """The options that a question lists as "A. ...", "A: ..., B: ..." or "(A) ...", at least two; else []."""
    # Labels count only in the order of the alphabet: other letters before a period are initials, or abbreviations.
    labels = []
    for match in re.finditer(r"(?:^|[\s,(])([A-Z])\s?[.:)]", question):
        if match[1] == ascii_uppercase[len(labels)]:
            labels.append(match)
        if len(labels) == len(ascii_uppercase):
            break
    # One label is no list: it may be an initial, "A. Smith".
    if len(labels) < 2:
        return []
    # An option ends where the next label begins, or with its line.
    ends = [match.start() for match in labels[1:]] + [len(question)]
    options = []
    for match, end in zip(labels, ends, strict=True):
        option, *_ = question[match.end() : end].split("\n")
        options.append(option.strip(" ,"))
    return options


def option_words(question: str, answer: str) -> str:
    """The words of the option that an answer names by its letter alone ("(B)"), behind which they can be written:
    " blue object". Empty for any other answer."""
    letter = re.fullmatch(r"\W*([A-Z])\W*", answer)
    # Letter -> words; not strict, as there are fewer options than letters.
    options = dict(zip(ascii_uppercase, read_options(question), strict=False))
    if not letter or letter[1] not in options:
        return ""
    # "B: blue object", but "(B) blue object".
    separator = " "
    if answer.endswith(letter[1]):
        separator = ": "
    return f"{separator}{options[letter[1]]}"


def without_option_words(question: str, shown: str) -> str:
    """An answer as the model gave it, whether `option_words` were written behind it or not."""
    for option in read_options(question):
        answer = shown.removesuffix(option).rstrip(": ")
        if answer != shown and answer + option_words(question, answer) == shown:
            return answer
    return shown
