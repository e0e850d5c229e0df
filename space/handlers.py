"""What the page's events do."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from html import escape
from itertools import zip_longest

import gradio as gr

from ..eval.reading import parse_choice
from ..inference.chat import NO_IMAGE, Chat, has_image
from ..inference.questions import option_words, read_options
from ..probing.pictures import OUTSIDE, LayerViewer, Pictures, has_classes, note_of
from .conversations import check_message, last_question, note_part, read_conversation, turn
from .galleries import gallery, legend
from .uploads import read_image

# The tasks whose layers are shown, in the page's order.
TASKS = ("depth", "seg", "gen")
# The box of the question, while an answer is written and else.
RUNNING: dict = {"value": None, "interactive": False, "submit_btn": False, "stop_btn": True}
READY: dict = {"interactive": True, "submit_btn": True, "stop_btn": False}


class Handlers:
    """What each event of the page does; for the arguments see `build`. `histories`: the chats on the page, a model
    each; `compare`: the titles of those that are asked beside the first. All of these can be called by anybody, with
    anything."""

    def __init__(
        self,
        chats: dict[str, Chat],
        examples: Sequence[dict],
        viewer: LayerViewer | str,
        others: Mapping[str, LayerViewer | str] | None = None,
    ):
        self.chats = chats
        self.examples = examples
        self.viewer = viewer
        self.others = {title: other for title, other in (others or {}).items() if not isinstance(other, str)}
        self.decoders = {} if isinstance(viewer, str) else viewer.decoders
        self.tasks = [task for task in TASKS if task in self.decoders]
        # task -> the classes' colors, of decoders that draw classes
        self.legends = {}
        for task in self.tasks:
            colors = getattr(self.decoders[task], "legend", {})
            if colors:
                self.legends[task] = colors
        # (question, pixels of its image) -> the right answer
        self.truths = {}
        for example in examples:
            if "truth" in example:
                picture = read_image(example["files"][0])
                # By its pixels: the page may send the file back under another path.
                self.truths[example["text"], picture.tobytes()] = example["truth"]

    def example(self, chosen: gr.SelectData) -> dict:
        example = self.examples[chosen.index]
        return {"text": example["text"], "files": example["files"]}

    def _asked(self, compare: list[str]) -> list[int]:
        """The places of the models that are asked."""
        return [place for place, title in enumerate(self.chats) if place == 0 or title in compare]

    def check(self, message: dict, compare: list[str], *histories: list[dict]) -> None:
        try:
            check_message(message)
            asked = turn("user", message["text"].strip(), message["files"])
            chats = list(self.chats.values())
            # As if the question had been asked: what the models have no room for isn't even shown.
            for place in self._asked(compare):
                read_conversation([*histories[place], asked], chats[place])
        except ValueError as error:
            raise refuse(error) from error
        first = next(iter(self.chats.values()))
        for remark in first.remarks(message["text"]):
            gr.Info(escape(f"Note: {remark}."), title="Note")

    def ask(self, message: dict, *histories: list[dict]) -> list:
        asked = turn("user", message["text"].strip(), message["files"])
        # In all chats, so that they stay alike but for the answers.
        chatbots = [[*history, asked] for history in histories]
        return [*chatbots, gr.update(**RUNNING)]

    def check_again(self, history: list[dict]) -> None:
        if not any(message["role"] == "user" for message in history):
            raise refuse("there is no answer yet to generate again: ask a question first")

    def ask_again(self, *histories: list[dict]) -> list:
        last = max(i for i, message in enumerate(histories[0]) if message["role"] == "user")
        # What follows the last question is to be written anew.
        chatbots = [history[: last + 1] for history in histories]
        return [*chatbots, gr.update(**RUNNING)]

    def answer(
        self, compare: list[str], temperature: float, top_p: float, max_new_tokens: float, *histories: list[dict]
    ) -> Iterator[list]:
        """The chats with the answers, after each piece of them."""
        places = self._asked(compare)
        chats = [chat for place, chat in enumerate(self.chats.values()) if place in places]
        asked = [histories[place] for place in places]
        sampling: dict = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        try:
            conversations = []
            for chat, history in zip(chats, asked, strict=True):
                # Checked once more: this event can be called without `check` before it.
                conversations.append(read_conversation(history, chat))
            with ExitStack() as stack:
                streams = []
                for chat, messages in zip(chats, conversations, strict=True):
                    stream = chat.stream(messages, **sampling)
                    # Stopped by the visitor, the model stops, too.
                    stack.callback(stream.close)
                    streams.append(stream)
                # A model may end without a word: then there is no piece below.
                answers = [""] * len(streams)
                for answers in joined(streams):
                    partial = map(self._partial, conversations, answers)
                    yield self._shown(places, with_answers(asked, partial))
            whole = map(self._whole, conversations, answers)
            yield self._shown(places, with_answers(asked, whole))
        except ValueError as error:
            raise refuse(error) from error

    def _shown(self, places: list[int], chatbots: list[list[dict]]) -> list:
        """For all models' chats: those that were not asked stay as they are."""
        shown: list = [gr.skip()] * len(self.chats)
        for place, chatbot in zip(places, chatbots, strict=True):
            shown[place] = chatbot
        return as_outputs(shown)

    def _partial(self, messages: list[dict], text: str) -> dict:
        """An answer while it is written."""
        message = turn("assistant", text)
        if not has_image(messages):
            message["content"].insert(0, note_part(NO_IMAGE))
        return message

    def _whole(self, messages: list[dict], text: str) -> dict:
        """An answer with the option's words and, of an example, the truth."""
        question = last_question(messages)
        message = self._partial(messages, text + option_words(question, text))
        truth = self._truth(messages)
        if truth is not None:
            options = read_options(question)
            is_right = parse_choice(text, options) == parse_choice(truth, options)
            verdict = "right" if is_right else "wrong"
            note = f"{verdict}: the truth is {truth}{option_words(question, truth)}"
            message["content"].append(note_part(note))
        return message

    def _truth(self, messages: list[dict]) -> str | None:
        """The right answer to the last question, if it is an example's about the example's image."""
        question = last_question(messages)
        # Other questions are most: of their pictures no copy is made.
        if not any(question == text for text, _ in self.truths):
            return None
        pictures = []
        for message in messages:
            pictures += [part["image"] for part in message["content"] if part["type"] == "image"]
        if not pictures:
            return None
        return self.truths.get((question, pictures[-1].tobytes()))

    def layers(self, history: list[dict]) -> list:
        """Galleries, and after them the legends, for the image of the last message."""
        files = file_paths(history[-1:])
        if not files:
            # A question without an image: the pictures of the one before stay.
            return as_outputs([gr.skip()] * (len(self.tasks) + len(self.legends)))
        pictures = layer_pictures(self.viewer, files[-1])
        image = next(iter(pictures.values()))["image"][0]
        # The only note of the image itself is that it is unlike those that the probes were fitted on.
        if note_of(image):
            gr.Info(f"This image is {' '.join(OUTSIDE.split())}: don't trust its layers.", title="Note")
        galleries = [gallery(pictures[task]) for task in self.tasks]
        legends = []
        for task, colors in self.legends.items():
            drawn = [column[0] for heading, column in pictures[task].items() if heading != "image"]
            # The teacher's own map: differences to the mean have colors, but no classes.
            with_classes = [picture for picture in drawn if picture is not None and has_classes(picture)]
            legends.append(legend(colors, with_classes))
        return as_outputs([*galleries, *legends])

    def layers_of_others(self, compare: list[str], history: list[dict]) -> list:
        """The other models' galleries, task by task, for the image sent last; hidden for those not compared."""
        files = file_paths(history)
        pictures = {}
        for title, viewer in self.others.items():
            if title in compare and files:
                pictures[title] = layer_pictures(viewer, files[-1])
        galleries = []
        # In the order in which `layers_column` makes them.
        for task in self.tasks:
            for title in self.others:
                of_task = pictures.get(title, {}).get(task)
                shown = [] if of_task is None else gallery(of_task)
                galleries.append(gr.update(value=shown, visible=of_task is not None))
        return as_outputs(galleries)

    def compared(self, compare: list[str], *histories: list[dict]) -> list:
        """Shows or hides the other chats. One that was not asked all along takes over the conversation so far."""
        first, *others = histories
        name, *other_names = self.chats
        chatbots = [gr.skip()]
        for title, history in zip(other_names, others, strict=True):
            is_compared = title in compare
            if is_compared and count_answers(history) != count_answers(first):
                history = take_over(first, name, title)
            chatbots.append(gr.update(value=history, visible=is_compared))
        return [*chatbots, gr.update(**READY)]

    def others_emptied(self) -> list:
        return as_outputs([gr.update(value=[], visible=False) for _ in self.tasks for _ in self.others])

    def emptied(self, compare: list[str]) -> list:
        asked = self._asked(compare)
        chatbots = [gr.update(value=[], visible=place in asked) for place in range(len(self.chats))]
        galleries = [[] for _ in self.tasks]
        return [*chatbots, gr.update(**READY), *galleries]


def as_outputs(values: list):
    """What an event's function returns for `values`, one for each of its outputs.

    Of an event with a single output (a page with one model, a model with one task) Gradio takes whatever is returned
    for that output's value, a list, too.
    """
    if len(values) == 1:
        return values[0]
    return values


def joined(streams: Sequence[Iterator[str]]) -> Iterator[list[str]]:
    """Several answers as far as they are written, after each further piece of them."""
    answers = [""] * len(streams)
    # A piece of each in turn, until the longest answer ends.
    for pieces in zip_longest(*streams, fillvalue=""):
        answers = [text + piece for text, piece in zip(answers, pieces, strict=True)]
        yield answers


def with_answers(histories: Sequence[list[dict]], answers: Iterable[dict]) -> list[list[dict]]:
    return [[*history, answer] for history, answer in zip(histories, answers, strict=True)]


def file_paths(history: list[dict]) -> list[str]:
    """The images of a chat on the page."""
    paths = []
    for message in history:
        paths += [part["file"]["path"] for part in message["content"] if part["type"] == "file"]
    return paths


def layer_pictures(viewer: LayerViewer | str | None, path: str) -> dict[str, Pictures]:
    """task -> heading -> the picture of an uploaded image, in a list."""
    assert viewer is not None and not isinstance(viewer, str), "without a viewer there are no galleries"
    try:
        return viewer.pictures([read_image(path)])
    except ValueError as error:
        raise refuse(error) from error


def count_answers(history: list[dict]) -> int:
    return sum(message["role"] == "assistant" for message in history)


def take_over(history: list[dict], name: str, title: str) -> list[dict]:
    """The conversation of the model `name` for the model `title`; its answers say whose they are."""
    # New dicts: the first model's chat on the page stays as it is.
    copied = []
    for message in history:
        content = message["content"]
        if message["role"] == "assistant":
            content = [note_part(f"answered by {name}"), *content]
        copied.append({"role": message["role"], "content": content})
    if copied and copied[-1]["role"] == "assistant":
        copied[-1]["content"][0] = note_part(f"answered by {name}; Regenerate asks {title}, too")
    return copied


def ready() -> dict:
    return gr.update(**READY)


def refuse(error: Exception | str) -> gr.Error:
    """A ValueError's words as the page's message."""
    # The title is in the message, too: Gradio 6.31's page shows "Error" whatever the title.
    return gr.Error(escape(f"Not possible: {error}."), title="Not possible", print_exception=False)
