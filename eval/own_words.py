"""Options by their own words: which of them a text names, and their words behind their letters."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from .cleaning import with_plain_minus
from .labels import LABEL_ONLY, WORDLIKE, any_of, labels_in
from .vqa import NUMBERS

# Scripts that put no spaces between words: Chinese, Japanese, Thai. One letter is part of too many words.
WITHOUT_SPACES = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]{2,}")
# Vowels and tones above and below letters, which `\w` leaves out.
THAI_MARKS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
# Options' words that don't name them: "You're right", "So far, I see two".
IDIOMS = re.compile(
    r"\byou(?:'re|\s+are)\s+(?:\w+ly\s+)?right\b(?!\s+of\b)|\bright\s+(?:now|away)\b|\ball\s+right\b"
    r"|\bso\s+far,?\s+so\s+good\b|(?:^|(?<=[.!?]\s))so\s+far\b(?=\s*,)",
    re.IGNORECASE | re.MULTILINE,
)
# "There is no image"; but "No, ...", "I'd say no.", "No it is far".
OF_A_NOUN = re.compile(
    rf"\bno\b(?![ \t]*(?:[^\w\s-]|-\s|\n|$))(?!\s+{any_of('is it he she they we i the there this that')})|没有(?=\w)",
    re.IGNORECASE,
)
NONE_OF = re.compile(r"\bnone\s+of\b[^.,;!?\n]*", re.IGNORECASE)
ABOUT_IT = any_of("is was are were has looks seems appears")


def same_as(text: str, choices: Sequence[str]) -> int | None:
    """The only option that the text equals but for case and a full stop; None for a letter, which is a label."""

    def plain(text: str) -> str:
        return with_plain_minus(text).strip().removesuffix(".").casefold()

    said = plain(text)
    same = [i for i, choice in enumerate(choices) if plain(choice) == said]
    if len(same) != 1 or not said or re.fullmatch(r"[(\[]?[a-z][)\]]?", said):
        return None
    return same[0]


def without_own_words(text: str, choices: Sequence[str]) -> str:
    """The text without an option's words right behind its letter, which may sound like a verdict: "(C) None is
    right", "B. No". "D. The sofa is closest" becomes "(D): closest"."""
    for letter, choice in zip(ascii_uppercase, choices, strict=False):
        words = words_pattern(choice)
        if words:
            label = rf"[(\[]\s?{letter}\s?[)\]]\s?[:.,-]?|(?<![{WORDLIKE}]){letter}\s?[).:,\u2013-]"
            label = rf"{label}|(?<=\b[Aa]nswer\s){letter}"
            own = rf"(?:{label})\s*(?i:{words})(?![\w'])"
            # A line that begins with an option goes on about it; "(D) is closest" would only mention D.
            text = re.sub(rf"(?m:^)([^\w\n]*?){own}\s+{ABOUT_IT}(?=\s+\w)", rf"\1({letter}):", text)
            text = re.sub(own, f"({letter})", text)
    return text


def with_letters_for_words(text: str, choices: Sequence[str]) -> str:
    """The text with an option's own letter in place of words that have a letter in them: with options ["Box B", "Box
    A"], "The answer is Box B" becomes "The answer is (A)"."""
    with_letters = _of_words_with_letters(choices)
    if not with_letters:
        return text
    return re.sub(with_letters, lambda match: f"({ascii_uppercase[int(str(match.lastgroup)[1:])]})", text)


def without_letters_of_words(text: str, choices: Sequence[str]) -> str:
    """The text without the letters that belong to an option's words: within them ("Box B"), or in brackets behind them
    ("the right box (B)")."""
    with_letters = _of_words_with_letters(choices)
    if with_letters:
        text = re.sub(with_letters, " ", text)
    for letter, choice in zip(ascii_uppercase, choices, strict=False):
        words = words_pattern(choice)
        if words:
            behind = rf"\s*[(\[]\s*(?i:(?:option|choice|answer)\s+)?{letter}\s*[)\]]"
            text = re.sub(rf"(?<![\w'-])((?i:{words})){behind}", r"\1", text)
    return text


def _of_words_with_letters(choices: Sequence[str]) -> str:
    """A pattern of the options whose words have a label among them, each a group named after its number; "" if there
    are none."""
    words = [words_pattern(choice) for choice in choices]
    # A letter alone is a label, and of two options of the same words these don't say which.
    of_several = [i for i, choice in enumerate(choices) if len(plain_words(choice)) > 1 and words.count(words[i]) == 1]
    with_letters = [i for i in of_several if labels_in(choices[i], len(choices))]
    if not with_letters:
        return ""
    # The longest first: one may begin as another does.
    with_letters.sort(key=lambda i: len(words[i]), reverse=True)
    groups = "|".join(f"(?P<n{i}>{words[i]})" for i in with_letters)
    # What it is compared with is no label, either: "B is closer to us than A".
    return rf"(?<![\w'-])(?i:{groups})(?![\w'-])(?:\s+(?:\w+\s+){{0,3}}?than\s+(?:\w+\s+){{0,2}}?{LABEL_ONLY})?"


def without_idioms(text: str, choices: Sequence[str]) -> str:
    """The text without options' words that don't name them: of "I have no idea" and "So far so good"."""
    options = {plain_words(choice) for choice in choices}
    text = IDIOMS.sub(" ", text)
    if options & {"no", "没有"}:
        text = OF_A_NOUN.sub(" ", text)
    if not any("none of" in option for option in options):
        text = NONE_OF.sub(" ", text)
    return text


def only_option(text: str, choices: Sequence[str], whole: bool = False) -> int | None:
    """The only option whose words occur in the text; with `whole`, that are the text, behind their letter or alone (if
    they are more than a letter)."""
    # Spaces make whole words: "1" is not named by "10".
    words = f" {plain_words(text)} "
    options = [f" {plain_words(choice)} " for choice in choices]
    if whole:
        # A text of one letter is a label ("A"), unless its option's letter stands before it ("(B) A").
        alone = [i for i, option in enumerate(options) if option == words and len(option.strip()) > 1]
        named = alone or [i for i, option in enumerate(options) if words == f" {ascii_uppercase[i].lower()}{option}"]
        # "two" for the option "2".
        named = named or [i for i, option in enumerate(options) if _in_digits(option) == _in_digits(words) != ""]
    else:
        options = [option.strip() if WITHOUT_SPACES.fullmatch(option.strip()) else option for option in options]
        named = [i for i, option in enumerate(options) if option.strip() and option in words]
    # "left" is inside "far left": an option that another named option contains does not count.
    longest = []
    for i in named:
        others = [options[j] for j in named if j != i]
        if not any(options[i] in other for other in others):
            longest.append(i)
    if len(longest) != 1:
        return None
    return longest[0]


def _in_digits(words: str) -> str:
    """A number word as its digits; "" for anything else."""
    number = words.strip()
    if number in NUMBERS.split():
        return str(NUMBERS.split().index(number))
    return number if number.isdecimal() else ""


def words_pattern(choice: str) -> str:
    """Of an option's words with anything else between them; "" if it has none."""
    return r"\W+".join(map(re.escape, plain_words(choice).split()))


def plain_words(text: str) -> str:
    # The look behind keeps a long line of dashes from being tried at each.
    return " ".join(re.findall(rf"(?<![.-])(?:[.-]*[\w{THAI_MARKS}]+)+", text.lower()))
