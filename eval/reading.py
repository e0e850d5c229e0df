"""Which option an answer states, whatever stands around the statement: reasoning, tags, markup, excluded options.

A wrong reading is worse than none: a text that states no option, or several, is read as None. docs/evaluation.md.
"""

import itertools
import re
from collections.abc import Sequence
from string import ascii_uppercase

from .cleaning import final_answer, with_verdicts, without_markup
from .labels import IS_A_WORD, LABEL, LABEL_ONLY, LABELS_VERB, any_of, labels_in, letter_of
from .own_words import (
    names_an_option,
    only_option,
    plain_words,
    same_as,
    with_letters_for_words,
    without_idioms,
    without_letters_of_words,
    without_own_words,
    words_pattern,
)

# A speaker who changes their mind; what follows counts if it says anything of an option.
RESTART = re.compile(
    r"\b(?:wait|correction|hold\s+on|scratch\s+that|on\s+second\s+thought|on\s+reflection)\b"
    r"|\blet\s+me\s+(?:reconsider|(?:re|double)-?\s?check|check|re-?examine|re-?evaluate|(?:think|look)\s+again)\b"
    # "A is actually farther" changes nothing.
    r"|(?:^|(?<=[^\w\s]\s)|(?<=\n)|(?<=\bbut\s)|(?<=\bso\s))actually\b",
    re.IGNORECASE,
)
# "A... no, B", "A, or rather B": the letter is taken back.
TAKEN_BACK = re.compile(
    rf"{LABEL_ONLY}(?:\W{{1,6}}(?i:h+m+|uh|um|oh|well|ah)\b)?\W{{1,6}}(?i:"
    r"(?:no|nope)\b(?=\s*(?:[^\w\s]|$|\n)|\s+(?:it|that|the\s+answer|option|choice)\b)"
    rf"|(?:sorry|oops|i\s+mean|my\s+mistake|make\s+that|(?:or\s+)?rather|no|nope)\b(?=\W{{1,6}}"
    rf"(?:it'?s\s+|option\s+|choice\s+|the\s+answer\s+is\s+)?{LABEL_ONLY}))"
)
# On a line of its own.
ALONE = re.compile(rf"^[^\w\n]*?{LABEL}[^\w\n]*$", re.MULTILINE)
# The whole text is a small letter: "b", "b.", "option b".
SMALL_LETTER = re.compile(r"^(?:\W*(?i:option|choice)\s)?\W*([a-z])\W*$")
# An echo of how answers should look: "for example, if your answer is the option A, answer (A)". It ends where the
# sentence goes on: "By cues such as size, the answer is B".
GOES_ON = (
    r",\s+(?:(?i:so|therefore|thus|hence|the|this|it|it's|i|i'd|i'll|we|my|option)\b"
    r"|[^\w\n]{0,3}[A-Z][^\w\n]{0,3}(?:[.\n]|$|\sis\b)|[(\[][A-Z][)\]]\s+(?!(?:or|and)\b)\w)"
)
EXAMPLE = re.compile(
    rf"\b(?i:(?:for\s+(?:example|instance)|such\s+as)\b|e\.\s?g\.)[^\w\n]*[^.!?\n]*?(?={GOES_ON}|[.!?\n]|$)"
)

# "A, B, C".
LIST = re.compile(rf"{LABEL_ONLY}(?:\s*,\s*(?:and\s+|or\s+)?{LABEL_ONLY}){{2,}}")
# Commas of numbers and of "A, C and D are wrong" end no clause; that of "If one looks, I can say" does.
OF_A_LIST = rf"\s*(?:and\s+|or\s+)?(?!I\s+can\b){LABEL_ONLY}\s*(?:,|{any_of('and or are were can')})"
CLAUSE = re.compile(rf"(?:[^.,;!?\n。]|(?<=\d)[.,](?=\d)|,(?={OF_A_LIST}))+")
# Where a clause takes another direction: "Not A but B", "B and not A".
TURN = re.compile(
    any_of(
        r"(?<!all\s)(?<!anything\s)(?<!everything\s)but however so therefore thus hence leaving leaves "
        "sondern mais sino"
    )
    # Behind "A: " its own words may follow: "A: the cat is not on the left".
    + r"|:\s(?=(?:(?:the|my)\s+(?:\w+\s+){0,2})?(?:answer|choice|option|guess)\b|so\b)"
    + r"|(?=\b(?:not|rather\s+than|instead\s+of)\s+(?:option\s+|choice\s+)?\W?[A-Za-z]\b)",
    re.IGNORECASE,
)
# What somebody else would say, or nobody: "Many would answer A", "To answer, A is farther".
SAYS = "(?:answer|choose|pick|select|say|think|guess|opt|go|argue|assume|believe)s?"
WOULD = r"(?:would|might|could|may|can|will|often|usually|be\s+tempted\s+to)"
OF_OTHERS = (
    rf"\b(?:many|most|some|few|one)\s+(?:(?:of\s+)?\w+\s+)?{WOULD}\s+(?:{WOULD}\s+)*{SAYS}\b"
    rf"|\b(?:people|others?|someone|somebody|anyone|anybody|everyone|you|they)\s+(?:{WOULD}\s+)*{SAYS}\b"
    # "A child would choose A"; "I would choose A" is the speaker's own.
    rf"|(?<!\bi\s)(?<!\bwe\s){WOULD}\s+(?:\w+ly\s+)?(?!answer\s+(?:is|be)\b){SAYS}\b"
    r"|^\W*to\s+answer\b(?![^,]*:)"
)
EXCLUDES = re.compile(
    any_of(
        r"not cannot never neither nor wrong incorrect false mistaken exclud\w+ eliminat\w+ reject\w* discard\w* "
        r"unlikely less_likely least worst second_best improbable implausible impossible invalid inaccurate "
        r"instead_of rather_than rul\w+_(?:it_)?out out_of_the_question "
        r"(?:all|anything|everything)_but except other_than apart_from (?<!no\s)(?<!without\s)(?<!without\sa\s)doubt "
        r"(?:second|third|next|(?<!in\s)other|another|alternative|opposite|runner-up)(?:\s\w+)?\s"
        r"(?:choice|answer|option|guess)"
    )
    + rf"|n't\b|不|错|误|排除|\bне\b|ليس|नहीं|では(?:な|あ)|아니|아닙|{LABEL_ONLY}\W{{1,3}}no\b|{OF_OTHERS}",  # noqa: RUF001 (other scripts' letters are meant)
    re.IGNORECASE,
)
# A case that is only thought of: "if the answer is A".
SUPPOSED = re.compile(
    r"\b(?:if|whether|unless|(?<!\bi\s)(?:suppose|assume)|supposing|assuming|imagine|let(?=\s(?:the|it)\b)"
    # "The options provided" are given.
    r"|(?<!\bthe\s)(?<!those\s)(?<!options\s)(?<!choices\s)(?<!image\s)provided)\s",
    re.IGNORECASE,
)
# "A would be right if ...": neither side of the "if" is stated.
CONDITIONAL = re.compile(any_of("would could might"), re.IGNORECASE)
# A clause before "?" is a question only if it begins like one; "B, right?" states B.
QUESTION = re.compile(r"\W*(?:is|was|are|could|would|can|should|might|does|do)\b[^?]*$", re.IGNORECASE)
# "A?" is asked where another letter is said, too.
ASKED = re.compile(rf"\W*(?:(?:so|is\s+it|maybe|perhaps|option|choice)\s+)?{LABEL_ONLY}\W*", re.IGNORECASE)
# Behind these stands why an option is chosen, or what another one is like.
REASON = re.compile(any_of("because since as whereas while although though unlike") + "|因为", re.IGNORECASE)

# "Answer B refers to the right box". Without a blank, which `_any` would split it at.
MENTION = (
    r"\s+(?:(?:option|choice)\s+)?[(\[]?(?-i:[A-Z])\b[)\]]?[^\S\n]+"
    r"(?!(?:so|because|since|as|with|for|due|based|given)\b)\w"
)
# "The answer to option A is unclear".
TO_AN_OPTION = r"\s+(?:to|of|for|in)\s+(?:the\s+)?(?:option|choice)\b"
# "The answer is most likely option (B)": a word for the answer, then fillers only, then the letter.
ANSWER = (
    any_of(
        # "Option A" alone is a mention, and "answer B" where words follow; but not "I answer B with ...".
        rf"answers?(?!{MENTION}|{TO_AN_OPTION}) (?:i|we|i'd|i'll|would|will)_answer ans "
        r"(?:option|choice|letter|decision|conclusion|verdict|selection)(?=\s*(?:is|was|would|should|must|seems|[:=]))"
        # "The right one" may be the one on the right.
        r" (?:correct|best)_(?:one|response|match|fit|statement|description)(?=\s*(?:is|would|should|must|seems|[:=]))"
        " choose chose pick picked select selected go_with going_with opt_for "
        r"vote respuesta réponse antwort risposta resposta ответ svaret? jawaban\w* cevap odpowied\w+ đáp_án"
    )
    + "|答案|答え|回答|正解|选择?|選択?|정답"
)
FILLER = (
    any_of(
        "is was are be to would should must has seems? appears? likely actually most probably clearly definitely "
        "therefore thus then the an? my this that question for in here as follows given by final correct right best "
        "true only options? choices? letters? answers? es la le el est ist è é ser it die der das het antwoord bonne "
        "juste richtige correcta correcte corretta correta lautet opción opção opzione letra lettera lettre buchstabe "
        "är adalah là jest"
    )
    + r"|'s\b"
    + r"|是|为|為|は|은|는|应|該|该|[\s:=>→\-\u2013\u2014',(]"
)
# "The correct answer from the options above is B": between the word for the answer and its verb stand words about
# where it is from or what it is for. "The option on the left is B" has only a place, and says nothing of an answer.
GOOD = (
    r"(?:(?:correct|best|right|proper|final)|(?:most|more)\s+"
    r"(?:likely|plausible|probable|appropriate|suitable|accurate|fitting))"
)
QUALIFIED = (
    rf"(?:\banswer|\b{GOOD}\s+(?:choice|option|response|match|selection)"
    r"|\b(?:correct|best)\s+(?:letter|one|fit|statement|description)"
    r"|\b(?:choice|option)(?=\s+(?:that|which)\s+(?:best|most|better)\b))\b"
)
DESCRIBES = any_of("fits matches describes answers reflects represents suits corresponds agrees aligns applies")
CHOSEN = any_of("give choose pick select see find get make think believe")
BEGINS = (
    # "The answer of a child".
    r"(?!(?:of|from)\s+(?:an?|my)\b)"
    + any_of("from among amongst out of for in to within given based according considering judging shown as per")
    + rf"|(?:that|which)\s+(?:(?:best|most|better|\w+ly)\s+)*{DESCRIBES}"
    + rf"|(?:(?:that|which)\s+)?(?:(?:i|we)\s+)?(?:(?:can|would|will)\s+)?{CHOSEN}"
)
# With one of these the words are about another answer or another case, or have a verb of their own.
OF_ANOTHER = any_of(
    r"is was are were be been isn't what(?!\s+(?:i|we|can|see)\b) who\w* whether if or nor not no neither than "
    "because while he she they you your their his her it people someone somebody everyone others? another some many "
    "previous earlier first second third last next examples? models? authors? users? left right says said claims "
    "depends requires lies remains"
)
# Another letter than the speaker's "I" is an option's.
QUALIFIER = rf"(?={BEGINS})(?:(?!{OF_ANOTHER}|(?-i:[A-HJ-Z])\b)[\w'-]+\s+){{0,11}}?(?!{OF_ANOTHER})[\w'-]*[^\W\d_]"
QUALIFIED_ANSWER = (
    rf"{QUALIFIED}(?:,?\s+)(?:{QUALIFIER})(?:\s*[:=]|,?\s+(?:is|(?:would|should|must|has\s+to|seems\s+to)\s+be)\b)"
)
IS_QUALIFIED = re.compile(QUALIFIED_ANSWER, re.IGNORECASE)
# The words of one that is for something: another thing may have another answer.
FOR = re.compile(
    rf"{QUALIFIED},?\s+((?:for|of|to|in)\s[^.:;!?\n]*?)\s*(?:[:=,]|\b(?:is|would|should|must|has|seems)\b)",
    re.IGNORECASE,
)
CLEARLY = any_of("the a my clearly definitely most_likely therefore thus actually really in_fact")
# "It's B", but not "if it is B".
IT_IS = (
    r"(?<!if\s)(?<!whether\s)\bit(?:'s|\s(?:is|must\sbe|should\sbe|would\sbe|has\sto\sbe))\s"
    rf"(?:{CLEARLY}\s)?(?:option\s|choice\s)?"
)
# The second line is for small letters, only at a sentence's end: "the answer is b.", not "the answer is a ball".
STATED_BEFORE = re.compile(
    rf"(?i:(?:{QUALIFIED_ANSWER}|{ANSWER})(?:{FILLER}){{0,30}}?|{IT_IS})(?<!question\s){LABEL}"
    rf"|(?i:(?:{QUALIFIED_ANSWER}|{ANSWER})(?:{FILLER}){{0,30}}?|{IT_IS}|\b(?:think|guess)\s)"
    r"(?P<small>(?<!\w)[a-z])(?=\W*(?:[.!\n]|$))"
)
# "B is the correct answer"; "B is right of C" is none.
IS = any_of("is was must_be would_be should_be seems looks appears_to_be")
RIGHT = (
    any_of("correct right true best only final")
    + r"(?=\W*$|\s?[.,;:!)\n]|\s(?:answer|choice|option|match|fit)\b|\sone\s*(?:$|[.,;:!)\n]))"
    + r"|correct(?=\s(?:and|but)\b)"
)
SAID_OF = re.compile(rf"{LABEL_ONLY}\s+{IS}\s+\w")
LIKELY = rf"(?:more|most)\s+{any_of('likely plausible probable appropriate suitable accurate')}"
STATED_BEHIND = re.compile(rf"{LABEL}(?i:\s+{IS}\s+(?:{CLEARLY}\s+)*(?:{RIGHT}|answer\b|{LIKELY}))")
# Behind a statement: why it is so, or what is said of the chosen option or another one; but no verdict on it.
WHY = re.compile(any_of("because since") + "|因为", re.IGNORECASE)
SUBJECT = rf"(?:{any_of('it this that there the option my we i')}|{LABEL_ONLY}\s+{IS})"
ON_IT = r"(?:it|this|that)(?:'s|\s+is)\s+(?:wrong|incorrect|false|not\s+(?:right|correct|the\s+(?:answer|right)))\b"
ADDED = re.compile(
    rf"(?:\b(?:as|whereas|while|although|though)\s+|\s[\u2013\u2014-]\s+|:\s+)(?={SUBJECT})(?!{ON_IT})|\((?=not\b)",
    re.IGNORECASE,
)
# What a clause may have besides the letter that it chooses: "So B", "I think it's B.", "Probably (B)". Other scripts'
# words aren't known, but for those that exclude.
LEADS = re.compile(
    r"(?!question)(?:"
    + any_of(
        "so i we that's you i'd i'll i'm we'd it's c'est think believe say guess mean conclude surely certainly maybe "
        "perhaps yes ok okay sondern mais sino"
    )
    + f"|{FILLER})",
    re.IGNORECASE,
)
WORD = re.compile(r"[A-Za-zÀ-ÿ][\w']*|\d+")
# "B) The right box", "(B) 3", "B - three": before an option's words. "Verdict: B": behind a heading.
TELLS = any_of("vs has does looks says said mentions states claims describes shows means")
BEFORE_WORDS = re.compile(rf"^\W*?{LABEL}(?:\s*[):\u2013\u2014-]|(?<=[)\]]))(?!\s*(?:{LABELS_VERB}|{TELLS}))")
BEHIND_HEADING = re.compile(rf"^\W*\w+(?:\s+\w+)?\s*:\W*?{LABEL}\W*$")
# Behind a statement: "or B", "/ B", "and possibly (B)", "(B)", or a last "B" with nothing between.
AND_ANOTHER = re.compile(
    # "B, and A is farther" doesn't choose A, too.
    rf"[\s)\]*.:]*(?!\s*(?:[,;]|and\b|,\s*and\b)\s*{LABEL_ONLY}\s+{IS})"
    rf"(?:(?:[,/&+|;]|{any_of('or and oder und ou et o y')}|或|和)\s*)+"
    rf"(?:option|choice|possibly|maybe|perhaps|even)?\s*{LABEL}"
    r"|[)\]]?\s*[(\[]\s*(?P<next>[A-Za-z])\s*[)\]]|[.;]?\s+(?P<last>[A-Z])(?:\s+[A-Z])*\s*\.?\s*$"
)
# Behind "the answer for the car is A": "and for the bus it is B".
AND_FOR_ANOTHER = re.compile(
    r"[^.!?\n]{0,200}?(?:\b(?:and|while|whereas|but)|[,;])\s+(?:(?:the|that)\s+(?:\w+\s+){0,2}|it\s+)?"
    rf"(?:for|of|to|in|from)\b[^.!?\n]{{0,200}}?{LABEL}"
)
# "A or" before "B is correct"; but not "Of A and B, B is correct".
ANOTHER_AND = re.compile(
    rf"(?:(?<!\band\s)(?<!\bor\s){LABEL_ONLY}\s*,|{LABEL_ONLY}\s*(?:[/&+]|{any_of('or and oder und ou et o y')}))\s*$"
)
SENTENCE_ENDS = re.compile(r"[.!?\n。]")
SENTENCE = re.compile(r"[^.!?\n。]+")
# What a text is drawn to: "Therefore, the closer car is option B".
CONCLUDES = re.compile(rf"\W*{any_of('so therefore thus hence consequently overall in_conclusion')}", re.IGNORECASE)
# "This corresponds to (B)"; of a subject with words of its own, "the closer car matches option B", "option" is needed.
CLOSELY = any_of("best most_closely closely clearly directly exactly therefore thus then")
CORRESPONDS = (
    rf"(?:{CLOSELY}\s+){{0,3}}(?:correspond(?:s|ing)\s+to|match(?:es|ing)(?:\s+with)?|(?:aligns|agrees)\s+with)"
    rf"(?:\s+{CLOSELY}){{0,3}}"
)
IS_CLEARLY = rf"is(?:\s+{CLOSELY}){{0,3}}"
OPTION = r"\s+(?:the\s+)?(?:option|choice|answer)\s*"
POINTED_AT = re.compile(
    rf"(?i:\W*(?:{any_of('and then clearly i think believe')}\W+){{0,4}}"
    rf"(?:(?:(?:this|that|it|which)\s+)?{CORRESPONDS}(?:{OPTION}|\s+)|(?:this|that|it|which)\s+{IS_CLEARLY}{OPTION}))"
    rf"{LABEL}\W*"
)
# Its only group without a name is the subject.
DESCRIBED = re.compile(rf"(?i:([^:]*\w)\s+(?:{CORRESPONDS}|{IS_CLEARLY}){OPTION}){LABEL}\W*")
# A subject that is nothing, not the one that was asked for, or another's words.
NOT_THE_ASKED = re.compile(
    any_of(
        "no none nothing nobody hardly barely partly partially scarcely what whatever who how first second third last "
        "others? another one_of options? choices? example question label letter title text said says claims asks "
        "would could might may"
    )
    # "The point that matches option A is far"; "Which one is option A".
    + r"|\b(?:that|which)$|^\W*which\b",
    re.IGNORECASE,
)
UNDER_A_CONDITION = re.compile(any_of("if when whenever otherwise else unless depends depending"), re.IGNORECASE)


def parse_choice(text: str, choices: Sequence[str]) -> str | None:
    """The option that an output states, as "(A)", or None when it states none or several.

    Args:
        text: a model's raw output.
        choices: the options' own words, in the order of their letters.

    First the option's own words, if they are all that is said; then a letter that is called the answer, the last one
    if it is corrected; then the only letter on a line of its own; then the only one that is said alone or before an
    option's words; then, if no letter was said, the only option whose words occur. Other letters are mentions: what
    "A is impossible" or "B is farther" say of an option isn't that it is chosen.
    """
    # An option as it is given, whose signs or words would else be markup or a change of mind: "C++", "Wait".
    same = same_as(final_answer(text), choices)
    if same is not None:
        return f"({ascii_uppercase[same]})"
    text = without_markup(final_answer(with_verdicts(text)))
    # Alike on both sides: "20 m²", "stop_sign".
    choices = [without_markup(choice) for choice in choices]
    # What was said last counts, if it says anything of an option.
    for part in reversed(RESTART.split(text)):
        choice = _stated(part, choices)
        if choice is not None or labels_in(part, len(choices)):
            return choice
    return None


def _stated(text: str, choices: Sequence[str]) -> str | None:
    """`parse_choice` of a text without reasoning, markup and changes of mind."""
    # An option's own words, or a letter, and nothing else.
    offered = ascii_uppercase[: len(choices)]
    whole = only_option(text, choices, whole=True)
    if whole is not None:
        return f"({offered[whole]})"
    letter = SMALL_LETTER.search(text)
    if letter and letter[1].upper() in offered:
        return f"({letter[1].upper()})"

    # A letter that is called the answer; of several the last one, by which the earlier are corrected.
    text = without_own_words(_with_sentences_apart(text, choices), choices)
    as_said = TAKEN_BACK.sub(" ", EXAMPLE.sub(" ", text))
    text = with_letters_for_words(as_said, choices)
    # Commas of a list would end a clause: "Choose from A, B, C" would say C alone.
    kept = _without_excluded(LIST.sub(lambda match: match[0].replace(",", "&"), text))
    labels = IS_A_WORD.sub(" ", kept)
    statements = [*STATED_BEFORE.finditer(labels), *STATED_BEHIND.finditer(labels)]
    stated = [match for match in sorted(statements, key=re.Match.end) if letter_of(match) in offered]
    stated = [match for match in stated if not names_an_option(_what_for(match, labels), choices)]
    if stated:
        last = stated[-1]
        # "A or B" chooses none.
        others = AND_ANOTHER.match(labels, _label_end(last))
        if others and letter_of(others) in offered:
            return None
        is_second = last.re is STATED_BEHIND and ANOTHER_AND.search(labels, 0, last.start())
        is_one_case = IS_QUALIFIED.match(text, last.start()) and AND_FOR_ANOTHER.match(text, last.end())
        if is_second or is_one_case or _is_one_of_several(text, stated):
            return None
        return f"({letter_of(last)})"

    # The only letter on a line of its own, or that is said alone.
    on_a_line = {letter_of(match) for match in ALONE.finditer(labels)} & set(offered)
    clear = _without_conditions(labels, text, offered)
    letters = on_a_line or _said_alone(clear, choices) or _corresponding(clear, choices)
    if len(letters) > 1:
        return None
    if letters:
        return f"({letters.pop()})"
    # Letters are mentioned, but none is chosen.
    if labels_in(without_letters_of_words(as_said, choices), len(choices)):
        return None

    # No letter at all: the only option whose words occur.
    # "The left one is far. The answer is the right one": what follows the word counts.
    kept = without_idioms(_without_excluded(as_said), choices)
    last = re.split(f"(?i:{ANSWER})", kept)[-1]
    for part in (last, kept):
        named = only_option(part, choices)
        if named is not None:
            return f"({offered[named]})"
    return None


def _is_one_of_several(text: str, stated: list[re.Match]) -> bool:
    """Whether the last statement takes back none of the earlier ones, which state another letter: "maybe it's A, maybe
    it's B", "if it's left, the answer is A; if it's right, it's B"."""
    last = stated[-1]
    earlier = [match for match in stated if letter_of(match) != letter_of(last)]
    if not earlier:
        return False
    between = text[earlier[-1].end() : last.start()]
    # "The answer for the cat is A. The answer for the dog is B."
    cases = {_what_for(match, text) for match in (earlier[-1], last)}
    if len(cases) > 1 and "" not in cases and not TURN.search(between):
        return True
    both_behind = last.re is STATED_BEHIND and earlier[-1].re is STATED_BEHIND
    if not TURN.search(between) and (both_behind or not SENTENCE_ENDS.search(between)):
        return True
    begin = max((end.end() for end in SENTENCE_ENDS.finditer(text, 0, last.start())), default=0)
    end = SENTENCE_ENDS.search(text, last.end())
    return UNDER_A_CONDITION.search(text, begin, end.start() if end else len(text)) is not None


def _with_sentences_apart(text: str, choices: Sequence[str]) -> str:
    """The text in which a sentence about a stated option doesn't begin with its words: of "The answer is A. The lamp
    is not behind it" the first sentence states A, where "A. The lamp" would be the option itself."""
    offered = ascii_uppercase[: len(choices)]
    # From the last one, so that places before it stay what they are.
    for statement in reversed(list(STATED_BEFORE.finditer(text))):
        if letter_of(statement) not in offered:
            continue
        words = words_pattern(choices[offered.index(letter_of(statement))])
        end = _label_end(statement)
        about_it = re.compile(rf"([)\]]?\.\s+)(?i:{words})(?=\s+\w)(?!\s+{LABEL_ONLY})").match(text, end)
        if words and about_it:
            text = f"{text[:end]}{about_it[1]}It{text[about_it.end() :]}"
    return text


def _without_excluded(text: str) -> str:
    """The text with blanks for clauses that exclude an option ("A is wrong", "not (A)"), ask or suppose, and for the
    reasons behind a statement ("B, because A is far"): places in the text stay what they are."""

    def kept(clause: re.Match) -> str:
        is_before_mark = text.startswith("?", clause.end())
        others = text[: clause.start()] + text[clause.end() :]
        parts = []
        for part in _parts_at_turns(clause[0]):
            if is_before_mark and _is_question(part, others):
                parts.append(" " * len(part))
                continue
            # Before exclusions are looked for: a reason may exclude the other options.
            part = _without_reason(_without_supposition(part))
            if EXCLUDES.search(part):
                part = " " * len(part)
            parts.append(_without_comparison(part))
        return "".join(parts)

    return CLAUSE.sub(kept, text)


def _parts_at_turns(clause: str) -> list[str]:
    """ "Not A but B" -> "Not A ", "but B"."""
    places = [0, *(turn.start() for turn in TURN.finditer(clause)), len(clause)]
    return [clause[start:end] for start, end in itertools.pairwise(places)]


def _is_question(part: str, others: str) -> bool:
    """Whether what stands before a "?" asks: "Is it A?"; "A?" does, where a letter is said among the `others`."""
    if QUESTION.match(part):
        return True
    return ASKED.fullmatch(part) is not None and re.search(LABEL, others) is not None


def _without_supposition(part: str) -> str:
    """What is stated under a condition is stated, but for "A would be right if ..."."""
    supposed = SUPPOSED.search(part)
    if not supposed:
        return part
    before = part[: supposed.start()]
    if CONDITIONAL.search(before):
        before = ""
    return before.ljust(len(part))


def _without_comparison(part: str) -> str:
    """Behind a label, or at the beginning, blanks for what another option is like: "B, whereas A is far"."""
    reason = REASON.search(part)
    if not reason:
        return part
    before = part[: reason.start()]
    if before.strip() and not re.search(LABEL, before):
        return part
    return before.ljust(len(part))


def _without_reason(part: str) -> str:
    """A part of a clause with blanks for what is added to its statement: "B because A is not near", "The answer is B -
    it's not left"."""
    for pattern in (WHY, ADDED):
        added = pattern.search(part)
        if not added:
            continue
        before = part[: added.start()]
        is_stated = STATED_BEFORE.search(before) or STATED_BEHIND.search(before)
        # "A - it is not near" only says something of A.
        if is_stated or (pattern is WHY and re.search(LABEL, before)):
            part = before.ljust(len(part))
    return part


def _without_conditions(labels: str, text: str, offered: str) -> str:
    """`labels` with blanks for the text's sentences that say several letters for several cases: "A if it's left, B if
    it's right"."""
    for sentence in SENTENCE.finditer(text):
        # Of those offered: "If I had to guess, I would say C" has but one.
        letters = {letter_of(match) for match in re.finditer(LABEL, sentence[0])} & set(offered)
        if len(letters) > 1 and UNDER_A_CONDITION.search(sentence[0]):
            labels = labels[: sentence.start()].ljust(sentence.end()) + labels[sentence.end() :]
    return labels


def _said_alone(text: str, choices: Sequence[str]) -> set[str]:
    """The letters that are the only ones of their clause, with nothing else but what introduces them and the option's
    own words; or of their line, with words behind or a heading before."""
    letters = set()
    for clause in CLAUSE.finditer(text):
        for part in TURN.split(clause[0]):
            said = labels_in(part, len(choices))
            # "A is left" says something of A.
            if len(said) == 1 and not SAID_OF.search(part):
                (letter,) = said
                choice = choices[ascii_uppercase.index(letter)]
                # Of another option's letter they say nothing: ["Box B", "Box A"].
                known = [] if labels_in(choice, len(choices)) else plain_words(choice).split()
                words = WORD.findall(re.sub(LABEL, " ", part))
                if all(LEADS.fullmatch(word) or word.lower() in known for word in words):
                    letters.add(letter)
    # Whole lines, whose words behind the letter may be many: "(B) The right box is farther away".
    for line in text.splitlines():
        match = BEFORE_WORDS.search(line) or BEHIND_HEADING.search(line)
        if match and labels_in(line, len(choices)) == {letter_of(match)}:
            letters.add(letter_of(match))
    return letters


def _corresponding(text: str, choices: Sequence[str]) -> set[str]:
    """The letters that a text is drawn to without a word for the answer: "This corresponds to (B)", "Therefore, the
    closer car is option B". Without "therefore" the latter may be one of several, and must be the only letter."""
    pointed_at = set()
    described = set()
    for sentence in SENTENCE.finditer(text):
        concludes = CONCLUDES.match(sentence[0])
        for clause in CLAUSE.finditer(sentence[0]):
            for part in TURN.split(clause[0]):
                if not labels_in(part, len(choices)):
                    continue
                match = POINTED_AT.fullmatch(part)
                # At a sentence's beginning "which" asks.
                if match and (clause.start() > 0 or not part.lower().strip().startswith("which")):
                    pointed_at.add(letter_of(match))
                    continue
                match = DESCRIBED.fullmatch(part)
                if not match or NOT_THE_ASKED.search(match[1]) or re.search(LABEL, match[1]):
                    continue
                if concludes:
                    pointed_at.add(letter_of(match))
                else:
                    described.add(letter_of(match))
    if not pointed_at and labels_in(text, len(choices)) == described:
        return described
    return pointed_at


def _what_for(statement: re.Match, text: str) -> str:
    """What the answer of a statement is for: "for the car" of "The answer for the car is B"; "" if it isn't said."""
    words = FOR.match(text, statement.start())
    return words[1].lower() if words else ""


def _label_end(match: re.Match) -> int:
    """Where the letter of a statement ends."""
    # A letter has one of several groups; the pattern may go on behind it.
    return max(match.end(name) for name in match.groupdict() if match.group(name))
