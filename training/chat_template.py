"""Chat templates: messages -> text and where the assistant speaks in it, and a template that can be trained with.

A template can be trained with if the prompt of inference is what stands before each answer, so that nothing is
supervised but answers and their ends of turn, and nothing is asked of the model that it never learned.
"""

import copy
import functools
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Sequence

from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from .rows import BadRow, brief

logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<image>"
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Around answers, to find them again in the chat: code points that no text has.
BEGIN = "\ufdd0"
END = "\ufdd1"
MARKS = re.compile(f"[{BEGIN}{END}]")
# A chat of two turns, with an image: what a template does with it shows what it does with any.
PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "one"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    {"role": "user", "content": [{"type": "text", "text": "three"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "four"}]},
]
GIVE_ONE = "give a template of your own, model_overrides={'chat_template': ...}"
# A template is a stranger's file: what it may cost to render a chat of a few words, and write for any chat.
MAX_SECONDS = 3  # of a processor
MAX_BYTES = 1 << 29
MAX_CHARACTERS = 1 << 24

# Put before a template that takes text only: content parts become text, an image being its token and a line break.
PARTS_TO_TEXT = (
    "{% set chat = namespace(messages=[]) %}{% for message in messages %}"
    "{% set text = namespace(value=message['content']) %}{% if text.value is not string %}{% set text.value = '' %}"
    "{% for part in message['content'] %}{% set text.value = text.value ~ ('IMAGE\n' if part['type'] == 'image' else "
    "part['text']) %}{% endfor %}{% endif %}"
    "{% set chat.messages = chat.messages + [dict(message, content=text.value)] %}{% endfor %}"
    "{% set messages = chat.messages %}{{ '' }}"  # the last so that no line break after a tag is lost
).replace("IMAGE", IMAGE_TOKEN)


# Put before a template that writes nothing at the end of an answer, or only the next turn's beginning (GLM-4's): each
# answer ends with the end-of-sequence token, where generation stops.
END_ANSWERS = (
    "{% set ended = namespace(messages=[]) %}{% for message in messages %}"
    "{% if message['role'] != 'assistant' %}{% set said = message['content'] %}"
    "{% elif message['content'] is string %}{% set said = message['content'] ~ eos_token %}"
    "{% else %}{% set last = message['content'][-1] %}"
    "{% set said = message['content'][:-1] + [dict(last, text=last['text'] ~ eos_token)] %}{% endif %}"
    "{% set ended.messages = ended.messages + [dict(message, content=said)] %}{% endfor %}"
    "{% set messages = ended.messages %}{{ '' }}"
)


def taking_images(chat_template: str | None, **special_tokens: str) -> str | None:
    """The template, made to take content parts if it takes text only, as those of text-only LLMs do. ValueError if
    it costs too much (`check_chat_template`)."""
    if not chat_template:
        return chat_template
    _check_limits(chat_template)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}]
    try:
        text, _ = render(chat_template, chat, special_tokens)
    except BadRow:
        text = ""
    takes_parts = IMAGE_TOKEN in text and "probe" in text
    if takes_parts:
        return chat_template
    return PARTS_TO_TEXT + chat_template


def template_of(processor) -> str:
    """The chat template of a processor or of its tokenizer, "" if there is none; of several the default one."""
    template = processor.chat_template or processor.tokenizer.chat_template or ""
    return default_template(template) or ""


def default_template(chat_template: str | dict[str, str] | None) -> str | None:
    """Of named templates, which a tokenizer may have for tools and other uses, the default one."""
    if isinstance(chat_template, dict):
        return chat_template.get("default", "")
    return chat_template


def render(template: str, messages: Sequence[dict], special_tokens: dict, **options) -> tuple[str, list]:
    """The chat, and the (start, stop) of its `{% generation %}` marks if `return_assistant_tokens_mask` is given.
    BadRow if the template raises or writes more than `MAX_CHARACTERS`."""
    try:
        texts, marks = render_jinja_template([messages], chat_template=template, **special_tokens, **options)  # pyright: ignore[reportArgumentType] (any template's variables)
    except Exception as error:
        # Whatever a stranger's expressions may raise.
        raise BadRow("malformed", f"the chat template refuses it: {error or type(error).__name__}") from error
    if len(texts[0]) > MAX_CHARACTERS:
        raise BadRow("malformed", f"the chat template writes {len(texts[0]):,} characters")
    if not marks:
        return texts[0], []
    return texts[0], list(marks[0])


def special_tokens_around(tokenizer) -> tuple[list[str], list[str]]:
    """The special tokens that a fast tokenizer adds in front of a text and behind it."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    tokens = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    words = [i for i, is_special in enumerate(encoding["special_tokens_mask"]) if not is_special]
    # It may have no token for the word.
    if not words:
        return tokens, []
    return tokens[: words[0]], tokens[words[-1] + 1 :]


# (start, stop) in a chat's text, in order.
Spans = list[tuple[int, int]]


def _between(text: str, answers: Spans, spans: Spans) -> list[str]:
    """What each span has behind its answer, white space left out."""
    return [text[stop:end].strip() for (_, stop), (_, end) in zip(answers, spans, strict=True)]


class ChatTemplate:
    """Chats as text, and where the assistant speaks in them.

    That is where the template marks it with `{% generation %}`, but for what the prompt already holds and for white
    space behind the end of turn. In a template without marks it is each answer and the end of turn after it: what the
    template always writes there. Where marks leave out an end of turn that is always written, it is supervised, too.

    `ends_turns`, known after `check`: whether the end of turn is among it; if not, a model never learns to stop.
    `ends`: what is supervised behind answers, the last one's end being another one with some templates.
    """

    def __init__(self, template: str, tokenizer, image_token: str):
        self.template = template
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.has_marks = GENERATION.search(template) is not None
        self.end_of_turn = ""
        # Of each marked span: what the prompt already holds.
        self.head = ""
        # Whether the marks hold answers alone.
        self.is_end_unmarked = False
        self.ends_turns = False
        self.ends: list[str] = []

    def check(self) -> "ChatTemplate":
        """Itself, if it can be trained with; else ValueError with the reason. It also finds out what `text_and_spans`
        goes by: `head`, `end_of_turn` and `is_end_unmarked`, in this order."""
        text, answers = self.find_answers(PROBE)
        spans = answers
        if self.has_marks:
            _, spans = self._marked_spans(PROBE)
        self._check_answers_are_supervised(text, answers, spans)
        self.head = self._find_head(text, spans)
        self.end_of_turn = self._find_end_of_turn(text, answers)
        self.is_end_unmarked = not any(_between(text, answers, spans))
        _, spans = self.text_and_spans(PROBE)
        ends = _between(text, answers, spans)
        self.ends_turns = all(ends)
        self.ends = [end for end in dict.fromkeys(ends) if end]
        return self

    def _check_answers_are_supervised(self, text: str, answers: Spans, spans: Spans) -> None:
        """ValueError if the probe's two answers aren't each within a span, or its image isn't in the text."""
        covered = [_covers(spans, start, stop) for start, stop in answers]
        if text.count(self.image_token) != 1 or covered != [True, True] or len(spans) != 2:
            needs = f"must write {self.image_token} for an image and mark (or write) 2 answers"
            raise ValueError(f"the chat template {needs} in this chat: {brief(text)}")

    def _find_head(self, text: str, spans: Spans) -> str:
        """What the marked spans hold of the prompt. ValueError if an answer doesn't begin where inference begins to
        write, or if the spans differ in it."""
        heads = set()
        for turn, (start, _) in zip((1, 3), spans, strict=True):
            prompt = self.prompt(PROBE[:turn])
            # A space before the answer may be left: tokenizers make it and the word one token.
            if not text.startswith(prompt) or text[len(prompt) : start].strip(" "):
                what = f"prompt {brief(repr(prompt))} is not what stands before the answer in {brief(repr(text))}"
                raise ValueError(f"the chat template's {what}: {GIVE_ONE}")
            heads.add(text[start : len(prompt)])
        if len(heads) > 1:
            raise ValueError(f"the chat template's marks begin differently before the prompt's end: {GIVE_ONE}")
        return heads.pop()

    def render(self, messages: Sequence[dict], **options) -> tuple[str, Spans]:
        return render(self.template, messages, self.tokenizer.special_tokens_map, **options)

    def prompt(self, messages: Sequence[dict]) -> str:
        """What inference gives the model to answer."""
        text, _ = self.render(messages, add_generation_prompt=True)
        return text

    def text_and_spans(self, messages: Sequence[dict]) -> tuple[str, Spans]:
        """The chat, and where in it the assistant speaks: (start, stop) of answers with their ends of turn, in order.
        BadRow for messages that the template refuses or changes."""
        if not self.has_marks:
            text, answers = self.find_answers(messages)
            return text, [(start, self._end_of_answer(text, stop)) for start, stop in answers]
        text, marked = self._marked_spans(messages)
        spans = []
        for start, stop in marked:
            if not text.startswith(self.head, start):
                begins = f"begins an answer with {brief(repr(text[start:stop]))}"
                raise BadRow("malformed", f"the chat template {begins}, the prompt ends {self.head!r}")
            said = text[start:stop].rstrip()
            if self.end_of_turn and said.endswith(self.end_of_turn):
                stop = start + len(said)
            elif self.is_end_unmarked:
                stop = self._end_of_answer(text, stop)
            spans.append((start + len(self.head), stop))
        return text, spans

    def end_tokens(self, end: str) -> list[int]:
        """The tokens of an end of turn that no text has; none if it is words."""
        ids = self.tokenizer(end, add_special_tokens=False)["input_ids"]
        return [i for i in ids if i in self.tokenizer.added_tokens_decoder]

    def openings(self) -> set[tuple[str, str]]:
        """What the prompt ends with in place of what stands before the answer, for each of two answers. ValueError if
        the prompt isn't the same chat."""
        text, answers = self.find_answers(PROBE)
        openings = set()
        for turn, (start, _) in zip((1, 3), answers, strict=False):
            prompt = self.prompt(PROBE[:turn])
            same = _common_length(prompt, text[:start])
            question = PROBE[turn - 1]["content"][-1]["text"]
            if question in text[same:start] or question not in prompt[:same]:
                raise ValueError("the chat template's prompt leaves out the question")
            openings.add((prompt[same:], text[same:start]))
        return openings

    def _marked_spans(self, messages: Sequence[dict]) -> tuple[str, Spans]:
        """The chat and what `{% generation %}` marks, adjacent marks as one: an end of turn may be marked apart."""
        text, marks = self.render(messages, return_assistant_tokens_mask=True)
        spans = []
        for start, stop in marks:
            if spans and spans[-1][1] == start:
                start, _ = spans.pop()
            if start < stop:
                spans.append((start, stop))
        return text, spans

    def find_answers(self, messages: Sequence[dict]) -> tuple[str, Spans]:
        """The chat and where the answers stand in it, found by marks of ours around them."""
        plain, _ = self.render(messages)
        # White space at an answer's ends is part of it, but where the template strips it: it would find other ends.
        for strips_begin, strips_end in itertools.product((False, True), repeat=2):
            marked, _ = self.render([_marked(message, strips_begin, strips_end) for message in messages])
            pieces = MARKS.split(marked)
            if "".join(pieces) == plain:
                break
        if "".join(pieces) != plain or len(pieces) % 2 == 0:
            raise BadRow("malformed", "the chat template changes the answers: mark them in it with {% generation %}")
        # Pieces are text and answers by turns: an answer lies between the ends of two pieces.
        ends = list(itertools.accumulate(map(len, pieces)))
        return plain, list(zip(ends[0:-1:2], ends[1::2], strict=True))

    def _end_of_answer(self, text: str, stop: int) -> int:
        """Where the turn ends whose answer ends at `stop`."""
        after = text[stop:].lstrip()
        if not self.end_of_turn or not after.startswith(self.end_of_turn):
            return stop
        return len(text) - len(after) + len(self.end_of_turn)

    def _find_end_of_turn(self, text: str, answers: Spans) -> str:
        """What follows an answer before a question, at the end, and before another answer has it in common."""
        (_, first), (_, last) = answers
        tails = [text[first:], text[last:], self.prompt(PROBE)[last:]]
        common = _common_length(*tails)
        # Whole tokens only: the common text may end within one, such as "<|im_" of two different marks.
        tokens = self.tokenizer(tails[0], add_special_tokens=False, return_offsets_mapping=True)
        whole = max((stop for _, stop in tokens["offset_mapping"] if stop <= common), default=0)
        return tails[0][:whole].strip()


def fit_chat_template(processor) -> ChatTemplate:
    """`find_chat_template`, which the processor then has; it is said if it is another one than before, and if it has
    no end of turn."""
    chat = find_chat_template(processor)
    if not chat.ends_turns:
        logger.warning("the chat template marks or writes no end of turn: the model will not learn to end its answers")
    own = template_of(processor)
    if chat.template == own:
        return chat
    processor.chat_template = chat.template
    if chat.template.startswith(END_ANSWERS):
        logger.warning(
            "the chat template writes no end of turn: training, and the model that it saves, take a variant of it, "
            f"which ends each answer with {processor.tokenizer.eos_token}"
        )
    elif chat.template == GENERATION.sub(_without_mark, own):
        logger.warning(
            "the chat template's {% generation %} marks aren't around each answer: training, and the model that it "
            "saves, take a variant of it without marks"
        )
    else:
        ends = brief(repr(chat.prompt(PROBE[:1])[-60:]))
        logger.warning(
            "answers don't begin where the chat template's prompt ends: training, and the model that it saves, take a "
            f"variant of it, whose prompt ends {ends}"
        )
    return chat


def stop_at_end_of_turn(model, chat: ChatTemplate) -> None:
    """Adds the ends of turn to the tokens at which the model's `generate` stops, as far as none of theirs is there."""
    generation = model.generation_config
    given = generation.eos_token_id
    stops = list(given) if isinstance(given, list) else [given]
    for end in chat.ends:
        tokens = chat.end_tokens(end)
        # The trainer adds the tokenizer's own.
        if tokens and not {*stops, chat.tokenizer.eos_token_id} & {*tokens}:
            stops.append(tokens[-1])
            generation.eos_token_id = [token for token in stops if token is not None]
            logger.warning(f"answers end with {end}: from now on the model's answers stop there, too")


def find_chat_template(processor) -> ChatTemplate:
    """The processor's own chat template if it can be trained with, else one that can.

    Templates of thinking models write a thinking block before the last answer only, or ask for one in the prompt. The
    one of their family that TRL made for training writes it always; and where all answers begin with the same text, an
    empty thinking block or a channel, it becomes part of the prompt: inference asks for an answer right away.

    Raises ValueError with the reason if the processor's own template can't be trained with and no other fits.
    """
    own = template_of(processor)
    if not own:
        raise ValueError("no chat template: give one, model_overrides={'chat_template': ...}")
    _check_limits(own)
    if not processor.tokenizer.is_fast:
        name = type(processor.tokenizer).__name__
        raise ValueError(f"{name} doesn't tell where its tokens lie in a text: give a fast tokenizer")
    fitting = _fitting(own, processor)
    if fitting[-1].ends_turns:
        return fitting[-1]
    # None does: the first is the nearest to the user's own.
    return _ending(fitting[0]) or fitting[0]


def _fitting(own: str, processor) -> list[ChatTemplate]:
    """The candidates that can be trained with, up to the first that ends its turns. ValueError if there are none."""
    fitting = []
    reasons = []
    for candidate in _candidates(own, processor):
        try:
            candidate.check()
        except ValueError as error:
            reasons.append(error)
            continue
        fitting.append(candidate)
        if candidate.ends_turns:
            break
    if not fitting:
        # That of the user's own template.
        raise reasons[0]
    return fitting


def _ending(chat: ChatTemplate) -> ChatTemplate | None:
    """The template with the end-of-sequence token as the end of turn; None if there is no such token, or if the
    template doesn't write it behind every answer."""
    if not chat.tokenizer.eos_token:
        return None
    ending = ChatTemplate(END_ANSWERS + chat.template, chat.tokenizer, chat.image_token)
    try:
        ending.check()
    except ValueError:
        return None
    return ending if ending.ends_turns else None


def _candidates(own: str, processor) -> Iterator[ChatTemplate]:
    """Templates to try, the best first."""
    yield ChatTemplate(own, processor.tokenizer, processor.image_token)
    for template in (own, training_template(own, processor.tokenizer)):
        if template is None:
            continue
        chat = ChatTemplate(template, processor.tokenizer, processor.image_token)
        try:
            changed = _with_openings(chat)
        except ValueError:
            # Why the processor's own doesn't fit is what the user will read.
            continue
        yield ChatTemplate(changed, processor.tokenizer, processor.image_token)
    # Some mark the last answer alone.
    plain = ChatTemplate(GENERATION.sub(_without_mark, own), processor.tokenizer, processor.image_token)
    if _marks_some(own, processor):
        yield plain
    # Of a family that TRL doesn't know.
    try:
        thinking = ChatTemplate(_with_thoughts(plain), processor.tokenizer, processor.image_token)
        changed = _with_openings(thinking)
    except ValueError:
        return
    yield ChatTemplate(changed, processor.tokenizer, processor.image_token)


def _marks_some(template: str, processor) -> bool:
    """Whether the template marks anything in a chat."""
    try:
        _, marks = render(template, PROBE, processor.tokenizer.special_tokens_map, return_assistant_tokens_mask=True)
    except BadRow:
        return False
    return any(start < stop for start, stop in marks)


def training_template(chat_template: str, tokenizer) -> str | None:
    """TRL's template for training in place of one that TRL knows, else None."""
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        # It comes with what training asks for: pip install ola_vlm[train].
        return None
    # TRL knows templates by their exact text.
    preamble = ""
    if chat_template.startswith(PARTS_TO_TEXT):
        preamble = PARTS_TO_TEXT
    stand_in = copy.copy(tokenizer)
    stand_in.chat_template = chat_template.removeprefix(preamble)
    try:
        template = get_training_chat_template(stand_in)
    except Exception:
        # It renders a stranger's template, which may raise anything.
        return None
    if not template:
        return None
    return preamble + template


def _without_mark(mark: re.Match) -> str:
    """A tag that marks nothing, but still strips the white space beside it."""
    return mark[0].replace("endgeneration", "endif").replace("generation", "if true")


def _with_thoughts(chat: ChatTemplate) -> str:
    """The template with what it writes before the last answer only, an empty thinking block, before every answer.
    ValueError if that isn't how its answers differ."""
    # What stands between a question and its answer: before the last one a header and a thought, else a header.
    text, answers = chat.find_answers(PROBE)
    befores = []
    for turn, (start, _) in zip((1, 3), answers, strict=True):
        question = PROBE[turn - 1]["content"][-1]["text"]
        _, _, before = text[:start].rpartition(question)
        befores.append(before)
    header, with_thought = befores
    if not header.strip() or header == with_thought or not with_thought.startswith(header):
        raise ValueError("the chat template's last answer doesn't differ by a text before it")
    # Jinja leaves out a line break at a template's end, and only there.
    template = chat.template.removesuffix("\n")
    # As JSON: a Jinja string has the same escapes.
    header = json.dumps(header, ensure_ascii=False)
    with_thought = json.dumps(with_thought, ensure_ascii=False)
    # First out, so that no answer gets it twice.
    everywhere = f"chat_text.replace({with_thought}, {header}).replace({header}, {with_thought})"
    return f"{{% set chat_text %}}{template}{{% endset %}}{{{{ {everywhere} }}}}"


def _with_openings(chat: ChatTemplate) -> str:
    """The template with a prompt that ends as what it writes before answers does. ValueError if answers begin
    differently."""
    openings = chat.openings()
    if len(openings) != 1:
        raise ValueError("the chat template begins answers differently")
    ((surplus, opening),) = openings
    if not surplus and not opening.strip(" "):
        return chat.template
    # Jinja leaves out a line break at a template's end, and only there.
    template = chat.template.removesuffix("\n")
    opening = json.dumps(opening, ensure_ascii=False)
    # The prompt only lacks what answers begin with, or it ends otherwise and is cut there first.
    if not surplus:
        return f"{template}{{% if add_generation_prompt %}}{{{{ {opening} }}}}{{% endif %}}"
    surplus = json.dumps(surplus, ensure_ascii=False)
    asking = f"{{% set chat_text %}}{template}{{% endset %}}{{{{ chat_text.removesuffix({surplus}) ~ {opening} }}}}"
    # Twice, because marks lose their places in a block.
    return f"{{% if add_generation_prompt %}}{asking}{{% else %}}{template}{{% endif %}}"


def check_chat_template(processor) -> None:
    """ValueError in one line for a chat template that can't ask a question about an image."""
    template = template_of(processor)
    if template:
        _check_limits(template)
        render(template, PROBE[:1], processor.tokenizer.special_tokens_map, add_generation_prompt=True)


@functools.lru_cache
def _check_limits(chat_template: str) -> None:
    """ValueError for a template that takes more than `MAX_SECONDS` or `MAX_BYTES` to write a short chat, or makes more
    than `MAX_CHARACTERS` of it. It is tried in a process of its own, which is all that it can bring down."""
    # Elsewhere a process doesn't start as a copy of this one, or can't be limited; a worker may not start one.
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return
    child = multiprocessing.get_context("fork").Process(target=_render_within_limits, args=(chat_template,))
    child.start()
    # Its own limit counts its processor's seconds, which take longer on a machine with other work.
    child.join(20 * MAX_SECONDS)
    status = child.exitcode
    child.kill()
    child.join()
    if status != 0:
        limits = f"{MAX_SECONDS} seconds, {MAX_BYTES >> 20} MB or {MAX_CHARACTERS:,} characters"
        raise ValueError(f"the chat template takes more than {limits} for a chat of four words: give another one")


def _render_within_limits(chat_template: str) -> None:
    """Ends the process, with status 0 if the template keeps within the limits. It may raise: who uses it says so."""
    # Here, as Windows has no such module.
    import resource

    # What this process holds as a copy of its parent is no cost of the template's.
    with open("/proc/self/statm", encoding="ascii") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_BYTES, in_use + MAX_BYTES))
    status = 0
    for turns, asks in ((1, True), (3, True), (4, False)):
        options = {"add_generation_prompt": asks, "bos_token": "", "eos_token": ""}
        try:
            texts, _ = render_jinja_template([PROBE[:turns]], chat_template=chat_template, **options)
        except MemoryError:
            status = 1
        except Exception:
            # A stranger's expressions may raise anything.
            continue
        else:
            status = max(status, int(len(texts[0]) > MAX_CHARACTERS))
    # At once: what the parent would do at its end is not this copy's to do.
    os._exit(status)


def _marked(message: dict, strips_begin: bool, strips_end: bool) -> dict:
    """An answer between marks, with the white space at its ends or without; another message as it is."""
    if message["role"] != "assistant":
        return message
    texts = [part["text"] for part in message["content"]]
    if not texts:
        raise BadRow("malformed", "an answer has no text")
    # Marks go next to what the template keeps, so that white space which it strips stays outside of them.
    first = texts[0]
    if strips_begin:
        first = first.lstrip()
    texts[0] = texts[0].removesuffix(first) + BEGIN + first
    last = texts[-1]
    if strips_end:
        last = last.rstrip()
    texts[-1] = last + END + texts[-1].removeprefix(last)
    return {**message, "content": [{"type": "text", "text": text} for text in texts]}


def _covers(spans: Sequence[tuple[int, int]], start: int, stop: int) -> bool:
    return any(first <= start and stop <= last for first, last in spans)


def _common_length(*texts: str) -> int:
    """How many characters all texts begin with."""
    shortest = min(texts, key=len)
    for i, character in enumerate(shortest):
        if any(text[i] != character for text in texts):
            return i
    return len(shortest)
