"""An option's letter as a label in a text: "(B)", "B"; and the capital letters that are words."""

import re
from string import ascii_uppercase


def any_of(words: str) -> str:
    """A pattern of whole words; "must_be" has any white space for its underscore."""
    return rf"\b(?:{'|'.join(words.split())})\b".replace("_", r"\s+")


# An option's letter as a label: "(B)", "[b]", "B"; a lower-case one only in brackets (it may be the article "a").
# A letter beside one of these is part of a word or a number, such as "A4", "vitamin-C", "A's".
WORDLIKE = "A-Za-zÀ-ÿ0-9_'-"
LABEL = rf"(?:[(\[]\s*(?P<in_brackets>[A-Za-z])\s*[)\]]|(?<![{WORDLIKE}])(?P<bare>[A-Z])(?![+#{WORDLIKE}]))"
# Without its names, which a pattern can have only once.
LABEL_ONLY = re.sub(r"\?P<\w+>", "?:", LABEL)
# "A ball", "I think": capital letters that are words. A label's own verb may follow ("A is right", "A or B").
LABELS_VERB = any_of("is was are or and would must should can seems looks appears")
TO_ANOTHER = r"(?:to|through|over|versus|than)\s+[A-Z]\b"
IS_A_WORD = re.compile(
    r"(?<!\w)(?<!\b[Oo]ption\s)(?<!\b[Cc]hoice\s)(?<!\b[Aa]nswer\s)"
    rf"[AI](?= +(?!{LABELS_VERB}|{TO_ANOTHER})[^\W\d_]{{2}})"
)


def letter_of(match: re.Match) -> str:
    """Of a match of `LABEL`, or of a pattern that has it among others."""
    return next(letter for letter in match.groupdict().values() if letter).upper()


def labels_in(text: str, count: int) -> set[str]:
    """The letters of the first `count` options that occur as labels."""
    # Letters that are words would be labels else: "A ball is closer" names no option A.
    labels = IS_A_WORD.sub(" ", text)
    return {letter_of(match) for match in re.finditer(LABEL, labels)} & set(ascii_uppercase[:count])
