"""A model's output without what stands around its answer: reasoning, tags, boxes, markup. `reading` reads the rest."""

import re
import unicodedata

from .labels import LABEL_ONLY

# Reasoning ends here; gpt-oss's last channel is named after its special tokens, which decoding may drop.
REASONING_ENDS = re.compile(
    r"</[^\w<]*(?:\w+:)?(?:think\w*|thought\w*|reason\w*|reflection|scratchpad)\W?>|◁/think▷|\[/think\w*\]"
    r"|<\|end_of_thought\|>|<unused95>"
    r"|<\|?channel\|?>\s*final\s*<\|?message\|?>|assistantfinal",
    re.IGNORECASE,
)
REASONING_BEGINS = re.compile(
    r"<(?:\w+:)?(?:think\w*|thought\w*|reason\w*|reflection|scratchpad)>|◁think▷|\[think\w*\]"
    r"|<\|begin_of_thought\|>|<unused94>"
    # gpt-oss's first channel, with its special tokens or without: "analysisThe user asks".
    r"|<\|?channel\|?>\s*analysis|\A\s*analysis(?=\w)",
    re.IGNORECASE,
)
# A chat template may begin the thought: then it is the prompt's end, and the output has none of it.
BEGUN_IN_PROMPT = re.compile(rf"(?:{REASONING_BEGINS.pattern})\Z", re.IGNORECASE)
# What a model was told to put its answer into. The last one counts; one that the token limit cut is open.
CONTAINERS = [
    re.compile(
        r"<((?:final_?)?(?:answer|ans|choice|option|output|solution|response|result|final))>(?P<content>.*?)(?:</\1>|$)",
        re.IGNORECASE | re.DOTALL,
    ),
    re.compile(r"(?:\\|\b)(?:boxed|fbox)\s*\{(?P<content>(?:[^{}]|\{[^{}]*\})*)(?:\}|$)"),
    re.compile(r"<\|begin_of_box\|>(?P<content>.*?)(?:<\|end_of_box\|>|$)", re.DOTALL),
]
# What may stand around or within a statement and says nothing: LaTeX, Markdown, HTML, quotation marks, special tokens;
# but not an apostrophe within a word, as in "isn't". A period of "vs." ends no clause.
MARKUP = re.compile(
    r"\\(?:text\w*|math\w+|operatorname|bf|rm|it|tt|sf|quad|boxed)\b|[*_`$#{}\"“”]"
    r"|</?(?:b|i|u|p|em|strong|br|div|span|code|li|s|h\d)\s*/?>|<\|[^|<>]{0,40}\|>"
    r"|</?(?:bos|eos|pad|(?:start|end)_of_(?:turn|utterance))>|(?<!\w)'|'(?!\w)|(?<=\bvs)\."
)
# "Option b": a small letter that is no article; written large, as other labels are.
SMALL_OPTION = re.compile(r"(\b(?i:option|choice)\s)([b-hj-z])\b(?!')")
# Written small, since its letters are no options.
NOT_APPLICABLE = re.compile(r"\bN/A\b")
STRUCK_OUT = re.compile(r"~~[^~\n]*~~|<(del|strike)>[^<]*</\1>")

# Verdicts: "A: ✗", "A [x]" at the end of a line, "❌ A" and "- [x] B" at the beginning of one that has no other.
TICK = r"[\u2611\u2705\u2713\u2714]\ufe0f?"
CROSS = r"[\u2610\u2715-\u2718\u274c]\ufe0f?"
CHECKED = rf"(?:{TICK}|[\[(][xX\u2713\u2714][\])])"
UNCHECKED = rf"(?:{CROSS}|\[\s?\]|\(\s?\))"
BEHIND = r"(?<=\S)[ \t:\u2013\u2014-]{0,3}"
BEFORE = r"^[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]*)?"
ONLY = rf"(?=\W*(?:[Oo]ption\s)?{LABEL_ONLY})(?!.*(?:{CHECKED}|{UNCHECKED}))(.+)$"
VERDICTS = [
    (re.compile(BEFORE + CHECKED + ONLY, re.MULTILINE), r"\1 is correct."),
    (re.compile(BEFORE + UNCHECKED + ONLY, re.MULTILINE), r"\1 is wrong."),
    (re.compile(rf"{BEHIND}(?:(?:{TICK})+|{CHECKED}(?=[ \t]*$))", re.MULTILINE), " is correct."),
    (re.compile(rf"{BEHIND}(?:(?:{CROSS})+|{UNCHECKED}(?=[ \t]*$))", re.MULTILINE), " is wrong."),
]


def is_cut_thought(record: dict) -> bool:
    """Whether an answered question's `"output"` ends within its reasoning, which it began or the end of its `"prompt"`
    (if it is there): the token limit cut it before an answer."""
    *before, rest = REASONING_ENDS.split(record["output"])
    if REASONING_BEGINS.match(rest.lstrip()):
        return True
    return not before and BEGUN_IN_PROMPT.search(record.get("prompt", "").rstrip()) is not None


def scored_output(record: dict) -> str:
    """An answered question's `"output"` as scorers read it: "" if its reasoning was cut before an answer."""
    if is_cut_thought(record):
        return ""
    return record["output"]


def final_answer(text: str) -> str:
    """What of an output is the answer: without the reasoning before it, out of its tag or box. "" where the output
    ends within its reasoning."""
    ends = list(REASONING_ENDS.finditer(text))
    if ends:
        text = text[ends[-1].end() :]
    # Reasoning that the token limit cut has no end: what stands behind its beginning is no answer.
    begin = REASONING_BEGINS.search(text)
    if begin:
        text = text[: begin.start()]
    # A box may be in a tag.
    for container in CONTAINERS:
        found = list(container.finditer(text))
        if found:
            text = found[-1]["content"]
    return text.strip()


def with_verdicts(text: str) -> str:
    """Words in place of signs, which the patterns of statements and of exclusions then find."""
    for mark, verdict in VERDICTS:
        text = mark.sub(verdict, text)
    return text


def with_plain_minus(text: str) -> str:
    """The text with a hyphen for U+2212, so that "-1" is one number however it is written."""
    return text.replace("\u2212", "-")


def without_markup(text: str) -> str:
    # Letters of one kind: full-width ones and typographic quotes are written otherwise and mean the same.
    plain = with_plain_minus(unicodedata.normalize("NFKC", text)).replace("’", "'")  # noqa: RUF001 (it is replaced)
    plain = NOT_APPLICABLE.sub("n/a", MARKUP.sub(" ", STRUCK_OUT.sub(" ", plain)))
    return SMALL_OPTION.sub(lambda match: match[1] + match[2].upper(), plain)
