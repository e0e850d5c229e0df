"""VQA accuracy of a free answer against ten human ones (OK-VQA): normalized as the VQA challenge's evaluator does."""

import re
from collections.abc import Sequence

# Written forms whose apostrophe an answer may lack.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
NUMBERS = "zero one two three four five six seven eight nine ten"
# What an answer's word is replaced by.
WORDS = {"none": "0"}
# "dont" -> "don't"; of a form with two apostrophes each one may be missing.
for _form in CONTRACTIONS.split():
    for _place, _letter in enumerate(_form):
        if _letter == "'":
            WORDS[_form[:_place] + _form[_place + 1 :]] = _form
for _number, _word in enumerate(NUMBERS.split()):
    WORDS[_word] = str(_number)
# The challenge's evaluator has this one so, without its apostrophe.
WORDS["somebody'd"] = "somebodyd"
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalize_answer(text: str) -> str:
    """Lower case without articles, full stops and punctuation; digits for number words; apostrophes put back.

    As in the challenge, a punctuation mark vanishes if it stands beside a space anywhere in the text (and any does if
    there is a number like 1,000); others become spaces."""
    text = re.sub(r"\s", " ", text).strip()
    has_large_number = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in PUNCTUATION:
        vanishes = has_large_number or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if vanishes else " ")
    # Full stops go, but not the point of a decimal number.
    plain = re.sub(r"\.(?!\d)", "", plain)
    return " ".join(WORDS.get(word, word) for word in plain.lower().split() if word not in ARTICLES)


def vqa_accuracy(output: str, answers: Sequence[str]) -> float:
    """Mean over the answers left out one at a time of min(1, matches among the others / 3); 0 to 1."""
    given = normalize_answer(output)
    answers = [normalize_answer(answer) for answer in answers]
    matches = answers.count(given)
    total = 0
    for left_out in answers:
        # An answer that was left out can't match itself.
        among_others = matches - (left_out == given)
        total += min(1, among_others / 3)
    return total / len(answers)
