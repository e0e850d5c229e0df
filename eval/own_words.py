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
# Number words that count. "One" is a pronoun as well ("the one on the left"), and counts only behind what leads to a
# count, or alone: "There is one chair", "The answer is one.", "One chair is visible".
NUMBER = any_of(NUMBERS.replace("one ", ""))
LEADS_TO_ONE = (
    r"there\s(?:is|was)|there's|i\s(?:can\s)?(?:only\s)?(?:see|count)"
    r"|(?:image|picture|photo|scene)\s(?:has|shows|contains)"
)
ONE = (
    r"(?:(?<=\bis\s)|(?<=\bit's\s)|(?<=:\s)|\A\W*)one\b(?=\W*(?:[.,;!\n]|\Z))|\A\W*one(?=\s(?!another\b)[\w-]+\W*\Z)"
    r"|\bone(?=\s[\w-]+(?:\s[\w-]+)?\s(?:is|was)\s(?:visible|present|shown|seen|there|in)\b)"
)
COUNTED = re.compile(
    rf"(?P<lead>\b(?:{LEADS_TO_ONE})\s(?:(?:only|just|exactly)\s)?|(?<!\bthe\s)\b(?:only|just|exactly)\s)"
    r"one\b(?!-|\sof\b)"
    rf"|(?P<one>{ONE})|(?P<number>{NUMBER})",
    re.IGNORECASE,
)
# Numbers that are no count: "twenty two", "two hundred", "two thirds", "at least two", "option two".
NO_COUNT = re.compile(
    rf"\b(?:{any_of('twenty thirty forty fifty sixty seventy eighty ninety hundred thousand point another other')}"
    r"|additional|option|choice|at\s+(?:least|most)|(?:more|less|fewer|other)\s+than|up\s+to|over|under)"
    rf"\s+(?:and\s+)?(?:one\b|{NUMBER})"
    rf"|(?:\bone\b|{NUMBER})(?=\s+(?:and\s+a\s+half"
    rf"|{any_of('hundred thousand million dozen half halves thirds? quarters? fifths? tenths? point more others?')}))",
    re.IGNORECASE,
)
# "Two on the left and one on the right".
ONE_MORE = re.compile(
    r"(?:\b(?:and|plus)|[,;+&])\s+(?:\w+ly\s+)?(?:another|one|some|several)\b(?!\s+of\b)|\A\W*one\s+(?:is|on|in|at)\b",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]?")


def same_as(text: str, choices: Sequence[str]) -> int | None:
    """The only option that the text equals but for case and a full stop; None for a letter, which is a label."""

    def plain(text: str) -> str:
        return with_plain_minus(text).strip().removesuffix(".").casefold()

    said = plain(text)
    same = [i for i, choice in enumerate(choices) if plain(choice) == said]
    if len(same) != 1 or not said or re.fullmatch(r"[(\[]?[a-z][)\]]?", said):
        return None
    return same[0]


def names_an_option(text: str, choices: Sequence[str]) -> bool:
    """Whether any option's words occur in the text."""
    words = f" {plain_words(text)} "
    return any(plain_words(choice) and f" {plain_words(choice)} " in words for choice in choices)


def without_own_words(text: str, choices: Sequence[str]) -> str:
    """The text without an option's words right behind its letter, which may sound like a verdict: "(C) None is
    right", "B. No". "D. The sofa is closest" becomes "(D): closest", and "The nearest is (D) the sofa" ends
    with "option (D)"."""
    for letter, choice in zip(ascii_uppercase, choices, strict=False):
        words = words_pattern(choice)
        if words:
            label = rf"[(\[]\s?{letter}\s?[)\]]\s?[:.,-]?|(?<![{WORDLIKE}]){letter}\s?[).:,\u2013-]"
            label = rf"{label}|(?<=\b[Aa]nswer\s){letter}"
            own = rf"(?:{label})\s*(?i:{words})(?![\w'])"
            # A line that begins with an option goes on about it; "(D) is closest" would only mention D.
            text = re.sub(rf"(?m:^)([^\w\n]*?){own}\s+{ABOUT_IT}(?=\s+\w)", rf"\1({letter}):", text)
            # A clause that ends with both tells which one its subject is.
            text = re.sub(rf"(?<=\bis\s){own}(?=\s*(?:[.,;!\n]|$))", f"option ({letter})", text)
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
        # "The one on the left" doesn't name the option "one".
        if not named or [options[i] for i in named] == [" one "]:
            named = _named_in_digits(text, choices)
    # "left" is inside "far left": an option that another named option contains does not count.
    longest = []
    for i in named:
        others = [options[j] for j in named if j != i]
        if not any(options[i] in other for other in others):
            longest.append(i)
    if len(longest) != 1:
        return None
    return longest[0]


def _named_in_digits(text: str, choices: Sequence[str]) -> list[int]:
    """The options that a text names with other signs for their numbers: "There are three chairs" for the option "3" or
    "3 chairs", "2 chairs" for the option "two"."""
    words = f" {plain_words(_with_digits(text))} "
    options = [plain_words(_with_digits(choice)) for choice in choices]
    # "Two on the left, three on the right": only a number that is told alone is the count.
    numbers = {word for word in words.split() if word.isdecimal()}
    return [
        i
        for i, option in enumerate(options)
        if option and f" {option} " in words and (not option.isdecimal() or len(numbers) == 1)
    ]


def _with_digits(text: str) -> str:
    """The text with digits for the number words that count something; but not in a sentence whose numbers are parts of
    a sum: "two on the left and another one"."""

    def digits(count: re.Match) -> str:
        if count["number"]:
            return _in_digits(count[0].lower())
        return f"{count['lead'] or ''}1"

    def counted(sentence: re.Match) -> str:
        counts = NO_COUNT.sub("some", sentence[0])
        numbers = [(count["number"] or "one").lower() for count in COUNTED.finditer(counts)]
        # "Two on the left and two on the right".
        if len(numbers) > len(set(numbers)) or ONE_MORE.search(counts):
            return sentence[0]
        return COUNTED.sub(digits, counts)

    return SENTENCE.sub(counted, text.strip())


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
