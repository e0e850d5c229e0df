"""Which option an answer states, whatever stands around the statement: reasoning, tags, markup, excluded options.

A wrong reading is worse than none: a text that states no option, or several, is read as None. docs/evaluation.md.
"""

import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase


def _any(words: str) -> str:
    """A pattern of whole words; "must_be" has any white space for its underscore."""
    return rf"\b(?:{'|'.join(words.split())})\b".replace("_", r"\s+")


# Reasoning ends here; gpt-oss's last channel is named after its special tokens, which decoding may drop.
REASONING_ENDS = re.compile(
    r"</\W*(?:\w+:)?(?:think\w*|thought\w*|reason\w*)\W?>|◁/think▷"
    r"|<\|?channel\|?>\s*final\s*<\|?message\|?>|assistantfinal",
    re.IGNORECASE,
)
REASONING_BEGINS = re.compile(r"<(?:\w+:)?(?:think\w*|thought\w*|reason\w*)>|◁think▷", re.IGNORECASE)
# What a model was told to put its answer into. The last one counts; one that the token limit cut is open.
CONTAINERS = [
    re.compile(r"<(?:final_?)?answer>(.*?)(?:</(?:final_?)?answer>|$)", re.IGNORECASE | re.DOTALL),
    re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)(?:\}|$)"),
    re.compile(r"<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|$)", re.DOTALL),
]
MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathsf)\b|[*_`$#{}\"“”]")

# An option's letter as a label: "(B)", "[b]", "B"; a lower-case one only in brackets (it may be the article "a").
WORDLIKE = "A-Za-zÀ-ÿ0-9_'-"
LABEL = rf"(?:[(\[]\s*(?P<in_brackets>[A-Za-z])\s*[)\]]|(?<![{WORDLIKE}])(?P<bare>[A-Z])(?![{WORDLIKE}]))"
ALONE = re.compile(rf"^[^\w\n]*?{LABEL}[^\w\n]*$", re.MULTILINE)  # on a line of its own
SMALL_LETTER = re.compile(r"^\W*([a-z])\W*$")
# "A ball", "I think": capital letters that are words. A label's own verb may follow ("A is right", "A or B").
LABELS_VERB = _any("is was are or and would must should can seems looks appears")
IS_A_WORD = re.compile(rf"(?<!\w)[AI] +(?!{LABELS_VERB})[^\W\d_]+")

CLAUSE = re.compile(r"(?:[^.,;!?\n。]|[.,](?=\w))+")
# Where a clause takes another direction: "Not A but B", "B and not A".
TURN = re.compile(
    _any("but however so therefore thus hence")
    + r"|(?=\b(?:not|rather\s+than|instead\s+of)\s+(?:option\s+|choice\s+)?\W?[A-Za-z]\b)",
    re.IGNORECASE,
)
EXCLUDES = re.compile(
    _any(
        r"not cannot never neither nor wrong incorrect false mistaken exclud\w+ eliminat\w+ reject\w* discard\w* "
        r"unlikely implausible instead_of rather_than rul\w+_(?:it_)?out out_of_the_question"
    )
    + r"|n't\b|不|错|误|排除",
    re.IGNORECASE,
)
REASON = re.compile(_any("because since as whereas while although though unlike") + "|因为", re.IGNORECASE)

# "The answer is most likely option (B)": a word for the answer, then fillers only, then the letter.
ANSWER = (
    _any(
        "answers? ans option choice choose chose pick picked select selected go_with going_with opt_for "
        "respuesta réponse antwort risposta resposta ответ"
    )
    + "|答案|答え|回答|正解|选择?|選択?|정답"
)
FILLER = (
    _any(
        "is was are be to would should must seems? appears? likely most probably clearly definitely therefore thus "
        "then the an? my this that question for in here as follows given by final correct right best true only "
        "options? choices? letters? answers? es la est ist è é ser it"
    )
    + r"|是|为|為|は|은|는|应|該|该|[\s:=>→\-\u2013\u2014',(]"
)
STATED_BEFORE = re.compile(
    rf"(?i:(?:{ANSWER})(?:{FILLER}){{0,30}}?){LABEL}"
    rf"|(?i:(?:{ANSWER})(?:{FILLER}){{0,30}}?)(?P<small>(?<!\w)[a-z])(?=\W*(?:[.!\n]|$))"
)
# "B is the correct answer"; "B is right of C" is none.
IS = _any("is was must_be would_be should_be seems looks appears_to_be")
CLEARLY = _any("the a clearly definitely most_likely therefore thus")
RIGHT = _any("correct right true best only final") + r"(?=\W*$|\s?[.,;:!)\n]|\s(?:answer|choice|option|one)\b)"
STATED_BEHIND = re.compile(rf"{LABEL}(?i:\s+{IS}\s+(?:{CLEARLY}\s+)*(?:{RIGHT}|answer\b))")
AND_ANOTHER = re.compile(
    rf"[\s)\]*.:]*(?:[,/&+]|{_any('or and oder und ou et o y')}|或|和)\s*(?:option|choice)?\s*{LABEL}"
)


def final_answer(text: str) -> str:
    """What of an output is the answer: without the reasoning before it, out of its tag or box. "" where the output
    ends within its reasoning."""
    if ends := list(REASONING_ENDS.finditer(text)):
        text = text[ends[-1].end() :]
    if begin := REASONING_BEGINS.search(text):
        text = text[: begin.start()]
    for container in CONTAINERS:
        if contents := container.findall(text):
            return contents[-1].strip()
    return text.strip()


def parse_choice(text: str, choices: Sequence[str]) -> str | None:
    """The option that an output states, as "(A)", or None when it states none or several.

    Args:
        text: a model's raw output.
        choices: the options' own words, in the order of their letters.

    First the option's own words, if they are all that is said; then a letter that is called the answer, the last one
    if it is corrected; then the only letter on a line of its own; then the only one that isn't excluded; then the only
    option whose words occur.
    """
    offered = ascii_uppercase[: len(choices)]
    text = MARKUP.sub(" ", unicodedata.normalize("NFKC", final_answer(text)).replace("’", "'"))  # noqa: RUF001
    if (whole := _only_option(text, choices, whole=True)) is not None:
        return f"({offered[whole]})"
    if (letter := SMALL_LETTER.search(text)) and letter[1].upper() in offered:
        return f"({letter[1].upper()})"
    kept = _without_excluded(text)
    labels = IS_A_WORD.sub(lambda match: " " * len(match[0]), kept)
    statements = [*STATED_BEFORE.finditer(labels), *STATED_BEHIND.finditer(labels)]
    for statement in sorted(statements, key=lambda match: match.end(), reverse=True):
        if _letter(statement) in offered:
            others = AND_ANOTHER.match(labels, _label_end(statement))
            return None if others and _letter(others) in offered else f"({_letter(statement)})"
    alone = {_letter(match) for match in ALONE.finditer(labels)} & set(offered)
    letters = {_letter(match) for match in re.finditer(LABEL, labels)} & set(offered)
    letters = alone or letters
    if letters:
        return f"({letters.pop()})" if len(letters) == 1 else None
    # "The left one is far. The answer is the right one": what follows the word counts
    last = re.split(f"(?i:{ANSWER})", kept)[-1]
    for part in (last, kept):
        if (named := _only_option(part, choices)) is not None:
            return f"({offered[named]})"
    return None


def _without_excluded(text: str) -> str:
    """The text with blanks for clauses that exclude an option ("A is wrong", "not (A)") and for the reasons behind a
    statement ("B, because A is far")."""

    def kept(clause: re.Match) -> str:
        parts = []
        start = 0
        for turn in [*TURN.finditer(clause[0]), None]:
            end = turn.start() if turn else len(clause[0])
            part = clause[0][start:end]
            if EXCLUDES.search(part):
                part = " " * len(part)
            reason = REASON.search(part)
            if reason and (re.search(LABEL, part[: reason.start()]) or not part[: reason.start()].strip()):
                part = part[: reason.start()].ljust(len(part))
            parts.append(part)
            start = end
        return "".join(parts)

    return CLAUSE.sub(kept, text)


def _letter(match: re.Match) -> str:
    groups = match.groupdict()
    return (groups["in_brackets"] or groups["bare"] or groups["small"]).upper()


def _label_end(match: re.Match) -> int:
    """Where the letter of a statement ends."""
    return max(match.end(name) for name in match.groupdict() if match.group(name))


def _only_option(text: str, choices: Sequence[str], whole: bool = False) -> int | None:
    """The only option whose words occur in the text; with `whole`, that are the text, behind their letter or alone (if
    they are more than a letter)."""
    # Spaces make whole words: "1" is not named by "10".
    words = f" {_plain(text)} "
    options = [f" {_plain(choice)} " for choice in choices]
    if whole:
        alone = [i for i, option in enumerate(options) if option == words and len(option.strip()) > 1]
        named = alone or [i for i, option in enumerate(options) if words == f" {ascii_uppercase[i].lower()}{option}"]
    else:
        named = [i for i, option in enumerate(options) if option.strip() and option in words]
    # "left" is inside "far left": an option that another named option contains does not count.
    named = [i for i in named if not any(i != j and options[i] in options[j] for j in named)]
    return named[0] if len(named) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[\w.-]*\w", text.lower()))
