"""The Space: chat with a checkpoint about images and look at what its layers see. `python space/app.py --help`.

Without arguments it shows the miniature that ships with the package. Each argument can be an environment variable
(a Space has no arguments): OLA_VLM_CHECKPOINT, OLA_VLM_COMPARE, OLA_VLM_RECIPE, OLA_VLM_UNCLIP, OLA_VLM_CODE. Gradio
has its own: GRADIO_SERVER_NAME, GRADIO_SERVER_PORT.

A visitor's conversation lives in their page, which sends it with every question; of each the server checks all that
is cheap (counts, files' headers, tokens) before it decodes a picture.
"""

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from html import escape, unescape
from importlib import metadata
from itertools import zip_longest
from mimetypes import guess_type
from pathlib import Path

try:
    # On ZeroGPU, the only place that has it, it must come before torch.
    import spaces  # pyright: ignore[reportMissingImports]
except ImportError:
    spaces = None

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import matplotlib
import numpy as np
from gradio.utils import get_space
from PIL import Image

from ola_vlm.commands.parsing import Parser
from ola_vlm.inference.chat import NO_IMAGE, Chat, has_image
from ola_vlm.inference.questions import option_words, without_option_words
from ola_vlm.probing.features import find_teachers
from ola_vlm.probing.pictures import NOTHING_SEEN as MEAN
from ola_vlm.probing.pictures import OUTSIDE, TARGET, LayerViewer, has_classes, note_of
from ola_vlm.recipes.miniature import WEIGHTS
from ola_vlm.targets.images import LONGEST_STRIP, DamagedImage, ImageError, open_image
from ola_vlm.world import language, render

MAX_FILE = "10mb"
MAX_PIXELS = 50_000_000  # a file
MAX_SIDE = 2048  # larger pictures are shrunk; no vision tower here sees more
MAX_IMAGES = 4  # a message
MAX_CHARACTERS = 4_000  # a message
MAX_CONVERSATION = 100_000  # characters, and
MAX_CONVERSATION_IMAGES = 16
MAX_CONVERSATION_PIXELS = 200_000_000  # of its different files
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what Pillow decodes by itself: no EPS, which runs Ghostscript
PICTURES_KEPT = 16  # decoded, of MAX_SIDE at most: 200 MB
KEPT = 3600  # seconds that uploads stay on the disk
QUEUE = 256  # events that wait
SESSIONS = 64  # pages of which Gradio remembers what they sent last
HEADINGS = {TARGET: "decoded", MEAN: "nothing seen"}  # as short as a phone needs it
TASKS = {"depth": "Depth", "seg": "Segmentation", "gen": "Image embedding (gen)"}
EXAMPLES = ("depth", "relation", "count", "distance")  # kinds of the miniature's questions, the surest first
LEGEND = 12  # classes
NOTE = "\u2139 "  # begins what the page says in an answer; the model doesn't read it
PAPER = "https://arxiv.org/abs/2412.09585"
CODE = "https://github.com/YOUR_NAME/ola_vlm"

ABOUT = """\
# OLA-VLM: layers that see
A LLaVA whose language-model layers learned to predict what vision encoders see: depth, segmentation, an embedding.
{model}

{links}"""
MINIATURE = """\
**This is its miniature**, trained on two CPU cores: it answers three in four questions like the examples, as LLaVA
does (guessing: 44 in 100), and nonsense to all else. What is better is what its layers see."""
SEEN = """\
### What each layer sees
of the image sent last, read by {by}. **teacher**: its own output. **decoded**: the teacher's features, drawn as
a layer's are: the best a layer can look like. **nothing seen**: the mean of the training images' features.
**layer 0**: the image as it enters the language model. The number: cosine to the image's own features, 0 for nothing
seen, 1 for all."""
NOTHING_SEEN = """\
### What each layer sees
can't be shown: {reason}."""
NOT_YET = "*Send an image or click an example: here its layers appear.*"

CSS = """
.gradio-container {max-width: 1400px !important; margin: auto !important}
.prose h1 {font-size: 1.5rem; margin: 0 0 .2em} .prose h3 {margin: 0} .prose p {margin: 0}
#about a {margin-right: 1em}
.message img, .example img, .grid-wrap img, .preview img {image-rendering: pixelated}
.message img {min-width: 128px; min-height: 128px; object-fit: contain}
.message-buttons-right, .message-buttons-left {display: none !important}
.example {padding: .6em !important}
.example-image-container, .example-image {width: 72px !important; height: 72px !important}
.toast-title {visibility: hidden} /* the message has a better one */
.toast-close {width: 40px !important; height: 40px !important}

#layers {gap: .4rem} #layers .task {gap: .1rem}
#layers .task:not(:has(.grid-wrap img)), #layers:has(.grid-wrap img) #not-yet {display: none}
#layers .heading, #layers .heading .html-container {padding: 0 !important} #layers .heading .prose {font-size: .8rem}
#compare input:not(:checked) {border-color: var(--body-text-color-subdued) !important}
.layers .grid-container {grid-template-columns: repeat(8, minmax(0, 1fr)) !important; gap: .3rem !important}
.layers .gallery-item, .layers .grid-wrap {min-height: 0 !important} .layers .grid-wrap {padding: 0 !important}
.layers .thumbnail-item {display: flex; flex-direction: column; height: auto !important; aspect-ratio: auto !important}
.layers .thumbnail-item img {width: 100% !important; height: auto !important; aspect-ratio: 1}
.layers .thumbnail-item .caption-label {position: static; width: 100%; max-width: 100%; font-size: .75rem; padding: 0;
  text-align: center; white-space: pre-line; line-height: 1.2; border: 0; border-radius: 0; box-shadow: none}
.scale, .swatch {display: inline-block; height: .8em; border: 1px solid gray; vertical-align: -.05em; margin: 0 .4em}
.scale {width: 8em} .swatch {width: .8em; margin: 0 .3em 0 .7em}

@media (max-width: 640px), (pointer: coarse) {
  .prose h1 {font-size: 1.2rem} .prose {font-size: .9rem}
  #about a {display: inline-block; min-width: 40px; padding: 13px 0; line-height: 1}
  .chat {height: 390px !important}
  .placeholder-content {padding: 36px 0 0 !important} .examples {padding: 0 !important; margin: 0 !important}
  .example {padding: .2em !important} .example-content {flex-direction: row !important; align-items: center; gap: .6em}
  .example-image-container, .example-image {width: 60px !important; height: 60px !important; flex: none}
  button, input:not([type=checkbox]), .checkbox-container {min-height: 40px !important; min-width: 40px !important}
  #question textarea {min-height: 40px !important}
  .label-wrap {align-items: center}
  .layers .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
}
footer {display: none !important}
"""


def on_gpu(function: Callable) -> Callable:
    """On ZeroGPU the function gets a GPU for its time; elsewhere it stays as it is."""
    return spaces.GPU(function) if spaces else function


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and conversations: what a visitor sends, checked
# ---------------------------------------------------------------------------------------------------------------------
decoding = threading.Lock()  # one at a time: a picture of MAX_PIXELS takes hundreds of megabytes


@contextmanager
def readable(path: str) -> Iterator[Image.Image]:
    """An uploaded file, of which only the header is read. ValueError tells the visitor what is wrong with it, also if
    that shows inside the block."""
    name = Path(path).name[-60:]
    try:
        with Image.open(path, formats=FORMATS) as file:
            yield file
    except FileNotFoundError as error:
        raise ValueError(f"{name} is gone: images are kept for an hour. Clear the chat and send it again") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has far too many pixels: shrink it first") from error
    except (DamagedImage, OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name} can't be read as an image: send a whole {', '.join(FORMATS)} file") from error
    except ImageError as error:  # without the folder, which is no visitor's business
        raise ValueError(f"{name}: {error.reason}") from error


def picture_size(path: str) -> tuple[int, int]:
    """Width and height in pixels by a file's header, for little of what `read_image` costs."""
    name = Path(path).name[-60:]
    with readable(path) as file:
        if file.width * file.height > MAX_PIXELS:
            size = f"{file.width} x {file.height} pixels, more than {MAX_PIXELS // 10**6} million"
            raise ValueError(f"{name} has {size}: shrink it first")
        return file.size


def shrunk_size(size: tuple[int, int]) -> tuple[int, int]:
    """Of a picture as the models get it: at most MAX_SIDE pixels a side."""
    scale = min(1, MAX_SIDE / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height


def read_image(path: str) -> Image.Image:
    """An uploaded file as RGB, at most MAX_SIDE pixels a side. ValueError tells the visitor what is wrong with it."""
    with readable(path):  # gone, it is not shown again
        changed = Path(path).stat().st_mtime_ns
    with decoding:
        return decode(path, changed)


@lru_cache(PICTURES_KEPT)
def decode(path: str, changed: int) -> Image.Image:
    """`read_image`, once for each file; `changed` is part of the cache's key."""
    picture_size(path)
    with readable(path) as file:
        file.draft("RGB", (MAX_SIDE, MAX_SIDE))  # a large JPEG is decoded small
        file.load()
        return open_image(shrink(file))


def shrink(file: Image.Image) -> Image.Image:
    """A large picture, smaller but otherwise as it was, before conversions make several copies of it."""
    is_strip = max(file.size) > LONGEST_STRIP * min(file.size)
    if max(file.size) <= MAX_SIDE or is_strip or file.mode.startswith("I"):
        return file  # small enough, or refused by `open_image`
    if file.mode in ("P", "1") or (file.has_transparency_data and file.mode not in ("RGBA", "LA")):
        file = file.convert("RGBA" if file.has_transparency_data else "RGB")
    file.thumbnail((MAX_SIDE, MAX_SIDE))
    return file


def turn(role: str, text: str, files: Sequence[str] = ()) -> dict:
    """A message as the chat on the page shows it."""
    content = []
    for file in files:
        kind = guess_type(file)[0] or "image/png"
        content.append({"type": "file", "file": {"path": file, "mime_type": kind}})
    content.append(text_part(text))
    return {"role": role, "content": content}


def text_part(text: str) -> dict:
    """The page takes texts for HTML."""
    return {"type": "text", "text": escape(text)}


def note_part(text: str) -> dict:
    return text_part(NOTE + text)


def is_note(message: dict, part: dict) -> bool:
    return message["role"] == "assistant" and part["type"] == "text" and part["text"].startswith(NOTE)


def check_history(history: list[dict]) -> None:
    """ValueError if the chat on the page has what no page sends, or too much."""
    texts = []
    images = 0
    for message in history:
        for part in message["content"]:
            if message["role"] not in ("user", "assistant") or part["type"] not in ("text", "file"):
                raise ValueError("the chat has a part that is neither text nor an image: clear it")
            if part["type"] == "file":
                images += 1
            else:
                texts.append(part["text"])
    characters = sum(map(len, texts))
    # each text costs time, however short
    if max(characters, 100 * len(texts)) > MAX_CONVERSATION or images > MAX_CONVERSATION_IMAGES:
        most = f"{MAX_CONVERSATION:,} characters or {MAX_CONVERSATION_IMAGES} images"
        raise ValueError(f"the chat has more than {most}: clear it")


def as_messages(history: list[dict]) -> list[dict]:
    """The chat on the page as transformers' messages, each image still a file's path; what was stopped before a word
    came is asked with the next."""
    messages = []
    question = ""
    for message in history:
        content = []
        for part in message["content"]:
            if part["type"] == "file":
                content.append({"type": "image", "image": part["file"]["path"]})
                continue
            text = unescape(part["text"])
            if message["role"] == "user":
                question = text
            else:
                text = without_option_words(question, text)
            if text and not is_note(message, part):
                content.append({"type": "text", "text": text})
        if content and messages and messages[-1]["role"] == message["role"]:
            messages[-1]["content"] += content
        elif content:
            messages.append({"role": message["role"], "content": content})
    return messages


def last_question(messages: list[dict]) -> str:
    """The user's last text; "" without one."""
    texts = [""]
    for message in messages:
        if message["role"] == "user":
            texts += [part["text"] for part in message["content"] if part["type"] == "text"]
    return texts[-1]


def with_pictures(messages: list[dict], pictures: Mapping[str, Image.Image]) -> list[dict]:
    """`as_messages`' with the pictures of their paths."""
    filled = []
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                part = {"type": "image", "image": pictures[part["image"]]}
            content.append(part)
        filled.append({"role": message["role"], "content": content})
    return filled


def conversation(history: list[dict], chat: Chat | None = None) -> list[dict]:
    """The chat on the page as transformers' messages. ValueError tells the visitor what is wrong with it: what is
    cheap to check comes first, also whether `chat` has room for so many tokens; then each file is decoded once."""
    check_history(history)
    messages = as_messages(history)
    parts = [part for message in messages for part in message["content"]]
    paths = dict.fromkeys(part["image"] for part in parts if part["type"] == "image")
    sizes = {path: picture_size(path) for path in paths}
    pixels = sum(width * height for width, height in sizes.values())
    if pixels > MAX_CONVERSATION_PIXELS:
        most = f"more than {MAX_CONVERSATION_PIXELS // 10**6} million"
        raise ValueError(f"the chat's images have {pixels // 10**6} million pixels, {most}: clear it or shrink them")
    if chat is not None:
        # white pictures take as many tokens as those of their sizes do
        blanks = {size: Image.new("RGB", shrunk_size(size)) for size in set(sizes.values())}
        chat.inputs(with_pictures(messages, {path: blanks[size] for path, size in sizes.items()}))
    return with_pictures(messages, {path: read_image(path) for path in sizes})


def refuse(error: Exception | str) -> gr.Error:
    # the title is in the message, too: Gradio 6.31's page shows "Error" whatever the title
    return gr.Error(escape(f"Not possible: {error}."), title="Not possible", print_exception=False)


def check_message(message: dict) -> None:
    """ValueError tells the visitor what is wrong with it."""
    text = message["text"].strip()
    files = message["files"]
    if not text:
        raise ValueError("write a question, too" if files else "write a question first")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the question has {len(text):,} characters, more than {MAX_CHARACTERS:,}: shorten it")
    if len(files) > MAX_IMAGES:
        raise ValueError(f"{len(files)} images are more than the {MAX_IMAGES} that a message may have")


# ---------------------------------------------------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------------------------------------------------
def render_scenes(count: int) -> tuple[render.Scenes, list[Image.Image]]:
    """About `count` scenes of the miniature's world all of whose objects can be seen."""
    drawn = render.sample_scenes(int(count * 1.2) + 4, seed=11)
    arrays = render.render_scenes(drawn)
    whole = np.flatnonzero(((arrays["visible"] >= 12) | (drawn.color < 0)).all(1))[:count]
    return drawn[whole], [Image.fromarray(arrays["image"][i]) for i in whole]


def make_examples(drawn: render.Scenes, images: list[Image.Image], folder: Path, own_words: bool) -> list[dict]:
    """A message for each image, with its file in `folder`, what a card shows of it and the right answer; `own_words`:
    the miniature's own questions, else LLaVA's multiple-choice form and, for every second image, a description."""
    examples = []
    for i, image in enumerate(images):
        path = folder / f"scene_{i}.png"
        if not own_words:
            image = image.resize((384, 384), Image.Resampling.BICUBIC)
        image.save(path)
        asked = {question["task"]: question for question in language.questions(drawn, i)}
        kinds = [kind for kind in EXAMPLES if kind in asked]
        question = asked[kinds[i % len(kinds)]]
        (shown, _, _) = question["question"].partition(" ?")
        example = {"files": [str(path)], "display_text": f"{shown.capitalize()}?"}
        if own_words:
            example["text"] = question["question"]
            example["truth"] = question["answer"]
        elif i % 2:
            example["text"] = "Describe the image."
            example["display_text"] = "Describe the image."
        else:
            lines = [f"{letter}. {option}" for letter, option in zip("ABCD", question["choices"], strict=False)]
            how = "Answer with the option's letter from the given choices directly."
            example["text"] = "\n".join([example["display_text"], *lines, how])
            example["truth"] = question["answer"].strip("()")
        examples.append(example)
    return examples


# ---------------------------------------------------------------------------------------------------------------------
# What the page's events do
# ---------------------------------------------------------------------------------------------------------------------
RUNNING: dict = {"value": None, "interactive": False, "submit_btn": False, "stop_btn": True}  # the question's box
READY: dict = {"interactive": True, "submit_btn": True, "stop_btn": False}


class Handlers:
    """What each event of the page does; for the arguments see `build`. `histories`: the chats on the page, a model
    each. All of these can be called by anybody, with anything."""

    def __init__(
        self,
        chats: dict[str, Chat],
        examples: Sequence[dict],
        viewer: LayerViewer | str,
        other: LayerViewer | None = None,
    ):
        self.chats = chats
        self.examples = examples
        self.viewer = viewer
        self.other = other
        self.decoders = {} if isinstance(viewer, str) else viewer.decoders
        self.tasks = [task for task in TASKS if task in self.decoders]
        # a decoder's colors: class -> color
        legends = {task: getattr(self.decoders[task], "legend", {}) for task in self.tasks}
        self.legends = {task: legend for task, legend in legends.items() if legend}
        self.truths = {}
        for example in examples:
            if "truth" in example:
                picture = read_image(example["files"][0])
                self.truths[example["text"], picture.tobytes()] = example["truth"]

    def example(self, chosen: gr.SelectData) -> dict:
        example = self.examples[chosen.index]
        return {"text": example["text"], "files": example["files"]}

    def check(self, message: dict, compare: bool, *histories: list[dict]) -> None:
        try:
            check_message(message)
            asked = turn("user", message["text"].strip(), message["files"])
            checked = histories if compare else histories[:1]
            for chat, history in zip(self.chats.values(), checked, strict=False):
                conversation([*history, asked], chat)
        except ValueError as error:
            raise refuse(error) from error
        first = next(iter(self.chats.values()))
        for remark in first.remarks(message["text"]):
            gr.Info(escape(f"Note: {remark}."), title="Note")

    def ask(self, message: dict, *histories: list[dict]) -> list:
        asked = turn("user", message["text"].strip(), message["files"])
        return [*([*history, asked] for history in histories), gr.update(**RUNNING)]

    def check_again(self, history: list[dict]) -> None:
        if not any(message["role"] == "user" for message in history):
            raise refuse("there is no answer yet to generate again: ask a question first")

    def ask_again(self, *histories: list[dict]) -> list:
        last = max(i for i, message in enumerate(histories[0]) if message["role"] == "user")
        return [*(history[: last + 1] for history in histories), gr.update(**RUNNING)]

    def answer(
        self, compare: bool, temperature: float, top_p: float, max_new_tokens: float, *histories: list[dict]
    ) -> Iterator[list]:
        asked = histories if compare else histories[:1]
        rest = [gr.skip()] * (len(histories) - len(asked))
        sampling: dict = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        try:
            pairs = list(zip(self.chats.values(), asked, strict=False))
            conversations = [conversation(history, chat) for chat, history in pairs]
            with ExitStack() as stack:
                streams = []
                for (chat, _), messages in zip(pairs, conversations, strict=True):
                    stream = chat.stream(messages, **sampling)
                    stack.callback(stream.close)  # stopped by the visitor, the model stops, too
                    streams.append(stream)
                answers = [""] * len(streams)
                for pieces in zip_longest(*streams, fillvalue=""):
                    answers = [text + piece for text, piece in zip(answers, pieces, strict=True)]
                    shown = zip(asked, conversations, answers, strict=True)
                    yield [*([*history, self._partial(messages, text)] for history, messages, text in shown), *rest]
            shown = zip(asked, conversations, answers, strict=True)
            yield [*([*history, self._whole(messages, text)] for history, messages, text in shown), *rest]
        except ValueError as error:
            raise refuse(error) from error

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
            verdict = "right" if text.strip() == truth else "wrong"
            message["content"].append(note_part(f"{verdict}: the truth is {truth}{option_words(question, truth)}"))
        return message

    def _truth(self, messages: list[dict]) -> str | None:
        """The right answer to the last question, if it is an example's about the example's image."""
        question = last_question(messages)
        pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        if not pictures or not any(question == text for text, _ in self.truths):
            return None
        return self.truths.get((question, pictures[-1].tobytes()))

    def layers(self, history: list[dict]) -> list:
        """Galleries, and after them the legends."""
        last = history[-1]["content"] if history else []
        files = [part["file"]["path"] for part in last if part["type"] == "file"]
        if not files:
            return [gr.skip()] * (len(self.tasks) + len(self.legends))
        assert not isinstance(self.viewer, str)  # there are galleries
        try:
            pictures = self.viewer.pictures([read_image(files[-1])])
        except ValueError as error:
            raise refuse(error) from error
        (image, *_) = next(iter(pictures.values()))["image"]
        if note_of(image):
            gr.Info(f"This image is {' '.join(OUTSIDE.split())}: don't trust its layers.", title="Note")
        legends = []
        for task, colors in self.legends.items():
            drawn = [column[0] for heading, column in pictures[task].items() if heading != "image"]
            with_classes = [picture for picture in drawn if picture is not None and has_classes(picture)]
            legends.append(legend(colors, with_classes))
        return [*(gallery(pictures[task]) for task in self.tasks), *legends]  # pyright: ignore[reportArgumentType]

    def layers_of_other(self, compare: bool, history: list[dict]) -> list:
        """The second model's galleries, for the image sent last; hidden unless it is compared."""
        hidden = [gr.update(value=[], visible=False)] * len(self.tasks)
        if not compare:
            return hidden
        content = [part for message in history for part in message["content"]]
        files = [part["file"]["path"] for part in content if part["type"] == "file"]
        if not files:
            return hidden
        assert self.other is not None  # there are galleries
        try:
            pictures = self.other.pictures([read_image(files[-1])])
        except ValueError as error:
            raise refuse(error) from error
        return [gr.update(value=gallery(pictures.get(task, {})), visible=task in pictures) for task in self.tasks]  # pyright: ignore[reportArgumentType]

    def compared(self, compare: bool, *histories: list[dict]) -> list:
        """Shows or hides the second chat. One that was not asked all along takes over the conversation so far."""
        first, *others = histories
        chatbots = [gr.skip()]
        for history in others:
            if compare and count_answers(history) != count_answers(first):
                history = taken_over(first, next(iter(self.chats)))
            chatbots.append(gr.update(value=history, visible=compare))
        return [*chatbots, gr.update(**READY)]

    def other_emptied(self) -> list:
        return [gr.update(value=[], visible=False) for _ in self.tasks]

    def emptied(self, compare: bool) -> list:
        chatbots = [gr.update(value=[], visible=i == 0 or compare) for i in range(len(self.chats))]
        galleries = [[] for _ in self.tasks]
        return [*chatbots, gr.update(**READY), *galleries]


def count_answers(history: list[dict]) -> int:
    return sum(message["role"] == "assistant" for message in history)


def taken_over(history: list[dict], name: str) -> list[dict]:
    """Another model's conversation; its answers say whose they are."""
    copied = []
    for message in history:
        content = message["content"]
        if message["role"] == "assistant":
            content = [note_part(f"{name}'s answer"), *content]
        copied.append({"role": message["role"], "content": content})
    return copied


def gallery(columns: Mapping[str, list]) -> list[tuple[Image.Image, str]]:
    """One image's pictures, each with its heading and note."""
    captioned = []
    for heading, (picture, *_) in columns.items():
        if heading != "image":
            note = note_of(picture).replace("cosine ", "")
            captioned.append((picture, f"{HEADINGS.get(heading, heading)}\n{note}".strip()))
    return captioned


def legend(colors: Mapping[str, tuple], pictures: Sequence[Image.Image]) -> str:
    """The classes that are drawn in the pictures, the largest first, as HTML."""
    pixels = np.concatenate([np.asarray(picture).reshape(-1, 3) for picture in pictures])
    drawn, counts = np.unique(pixels, axis=0, return_counts=True)
    areas = dict(zip(map(tuple, drawn.tolist()), counts.tolist(), strict=True))
    names = sorted((name for name, color in colors.items() if color in areas), key=lambda name: -areas[colors[name]])
    entries = [f'<i class="swatch" style="background:rgb{colors[name]}"></i>{escape(name)}' for name in names[:LEGEND]]
    if len(names) > LEGEND:
        entries.append(f" and {len(names) - LEGEND} more")
    return "".join(entries)


def depth_scale() -> str:
    """The colors of `pictures.draw_depth` from far to close, as HTML."""
    steps = matplotlib.colormaps["inferno"](np.linspace(0, 1, 9), bytes=True)[:, :3].tolist()
    colors = ", ".join(f"rgb{tuple(color)}" for color in steps)
    return f'far<i class="scale" style="background:linear-gradient(to right, {colors})"></i>close'


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Parts:
    """The page's components that events read or write."""

    chatbots: list[gr.Chatbot]
    box: gr.MultimodalTextbox
    regenerate: gr.Button
    clear: gr.Button
    compare: gr.Checkbox
    sampling: list[gr.Slider]


def build(
    chats: dict[str, Chat],
    examples: Sequence[dict] = (),
    about: str = "",
    viewer: LayerViewer | str = "there are no teachers",
    links: Mapping[str, str] | None = None,
    other: LayerViewer | None = None,
) -> gr.Blocks:
    """The page.

    Args:
        chats: title -> model; a second one is asked beside the first on demand.
        examples: messages `{"text", "files": [path]}`, with "display_text" (what their card says) and "truth" (the
            right answer) if they have them.
        about: what to say about the model, Markdown.
        viewer: of the first model's layers, or why there is none.
        links: title -> address.
        other: of the second model's layers, shown above the first one's while both are compared.
    """
    handlers = Handlers(chats, examples, viewer, other)
    with gr.Blocks(title="OLA-VLM", analytics_enabled=False, delete_cache=(600, KEPT)) as page:
        with gr.Row():
            listed = " ".join(f"[{title}]({address})" for title, address in (links or {}).items())
            gr.Markdown(ABOUT.format(model=about, links=listed), elem_id="about")
            # both do something on the Hub only
            gr.DuplicateButton(visible=get_space() is not None, min_width=120)
        with gr.Row():
            with gr.Column(scale=6, min_width=320):
                parts = chat_column(chats, examples)
            with gr.Column(scale=7, min_width=320, elem_id="layers"):
                galleries, legends, galleries_of_other = layers_column(handlers)
        connect(handlers, parts, galleries, legends, galleries_of_other)
    # the REST routes, too, wait in the queue
    return page.queue(max_size=QUEUE, api_open=False)


def chat_column(chats: dict[str, Chat], examples: Sequence[dict]) -> Parts:
    with gr.Row():
        chatbots = []
        for i, name in enumerate(chats):
            chatbot = gr.Chatbot(
                label=name,
                visible=i == 0,
                examples=[] if i else [card(example) for example in examples],  # pyright: ignore[reportArgumentType]
                height=360,
                min_width=240,
                render_markdown=False,
                buttons=["share"] if get_space() else [],
                elem_classes="chat",
            )
            chatbots.append(chatbot)
    box = gr.MultimodalTextbox(
        placeholder="Add an image and ask about it",
        show_label=False,
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=MAX_CONVERSATION,  # longer ones would be pasted as a file
        elem_id="question",
    )
    with gr.Row():
        regenerate = gr.Button("Regenerate", size="sm", min_width=90)
        clear = gr.Button("Clear", size="sm", min_width=90, elem_id="clear")
    compare = gr.Checkbox(
        label=f"Compare with {list(chats)[-1]}", visible=len(chats) > 1, container=False, elem_id="compare"
    )
    with gr.Accordion("Sampling", open=False):
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest word always")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="of the likeliest words, at T > 0")
        max_new_tokens = gr.Slider(1, 1024, 256, step=1, label="Max new tokens")
    return Parts(chatbots, box, regenerate, clear, compare, [temperature, top_p, max_new_tokens])


def card(example: dict) -> dict:
    """An example as Gradio's chat shows it."""
    return {name: deepcopy(example[name]) for name in ("text", "files", "display_text") if name in example}


def layers_column(handlers: Handlers) -> tuple[list[gr.Gallery], list[gr.HTML], list[gr.Gallery]]:
    galleries = []
    galleries_of_other = []
    legends = {}
    if not handlers.tasks:
        gr.Markdown(NOTHING_SEEN.format(reason=escape(str(handlers.viewer))), elem_id="seen")
    else:
        assert not isinstance(handlers.viewer, str)  # of which there are no tasks
        gr.Markdown(SEEN.format(by=handlers.viewer.by), elem_id="seen")
        gr.Markdown(NOT_YET, elem_id="not-yet")
    for task in handlers.tasks:
        with gr.Column(elem_classes="task", min_width=300):
            key = depth_scale() if task == "depth" else ""
            heading = f"<b>{TASKS[task]}</b>: {escape(handlers.decoders[task].caption)} {key}"
            gr.HTML(heading, padding=False, elem_classes="heading")
            if task in handlers.legends:
                legends[task] = gr.HTML(padding=False, elem_classes="heading")
            options = {
                "columns": 8,
                "height": "auto",
                "interactive": False,
                "buttons": [],
                "object_fit": "contain",
                "fit_columns": False,
            }
            if handlers.other is not None:
                name = f"{list(handlers.chats)[-1]}, and below {next(iter(handlers.chats))}"
                galleries_of_other.append(
                    gr.Gallery(label=name, visible=False, elem_classes="layers other", **options)
                )
            galleries.append(gr.Gallery(show_label=False, elem_classes="layers", **options))
    return galleries, [legends[task] for task in handlers.legends], galleries_of_other


def connect(
    handlers: Handlers,
    parts: Parts,
    galleries: list[gr.Gallery],
    legends: list[gr.HTML],
    galleries_of_other: list[gr.Gallery],
) -> None:
    """The events. An error covers the outputs of its event: what checks has none."""
    chatbots, box = parts.chatbots, parts.box
    quiet = {"queue": False, "show_progress": "hidden"}
    model = {"concurrency_limit": 2, "concurrency_id": "model", "show_progress": "minimal"}

    # An example is known by its number: what else the event says, files' paths too, is the visitor's word.
    chosen = chatbots[0].example_select(handlers.example, None, box, **quiet)
    asked = []
    for trigger in (box.submit, chosen.success):
        checked = trigger(handlers.check, [box, parts.compare, *chatbots], None, concurrency_limit=4)
        asked.append(checked.success(handlers.ask, [box, *chatbots], [*chatbots, box], **quiet))
    # in the queue, whose errors reach the page
    checked = parts.regenerate.click(handlers.check_again, chatbots[0], None, concurrency_limit=4)
    asked_again = checked.success(handlers.ask_again, chatbots, [*chatbots, box], **quiet)

    answers = []
    for event in (*asked, asked_again):
        inputs = [parts.compare, *parts.sampling, *chatbots]
        answer = event.success(on_gpu(handlers.answer), inputs, chatbots, **model)
        answer.then(ready, None, box, **quiet)
        answers.append(answer)
    if galleries:
        for event in asked:
            outputs = [*galleries, *legends]
            event.success(on_gpu(handlers.layers), chatbots[0], outputs, concurrency_limit=1, show_progress="minimal")
    if galleries_of_other:
        for event in (*(event.success for event in asked), parts.compare.change):
            inputs = [parts.compare, chatbots[0]]
            of_other = on_gpu(handlers.layers_of_other)
            event(of_other, inputs, galleries_of_other, concurrency_limit=1, show_progress="minimal")
        for trigger in (parts.clear.click, *(chatbot.clear for chatbot in chatbots)):
            trigger(handlers.other_emptied, None, galleries_of_other, **quiet)

    box.stop(ready, None, box, cancels=answers, **quiet)
    for trigger in (parts.clear.click, *(chatbot.clear for chatbot in chatbots)):
        trigger(handlers.emptied, parts.compare, [*chatbots, box, *galleries], cancels=answers, **quiet)
    parts.compare.change(handlers.compared, [parts.compare, *chatbots], [*chatbots, box], cancels=answers, **quiet)


def ready() -> dict:
    return gr.update(**READY)


def launch(page: gr.Blocks, **options):
    """`options`: of gradio's `launch`. Files are served from the upload folder only; nothing is recorded."""
    system = ["system-ui", "-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
    theme = gr.themes.Soft(font=system, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"])  # pyright: ignore[reportPrivateImportUsage]
    return page.launch(
        theme=theme,
        css=CSS,
        max_file_size=MAX_FILE,
        blocked_paths=[str(Path(__file__).parent), str(WEIGHTS.parents[1])],
        run_history=False,
        state_session_capacity=SESSIONS,
        footer_links=[],
        ssr_mode=False,
        **options,
    )


def code_address() -> str:
    """Where the package was installed from, at its commit, if that was a repository on the web; else CODE."""
    try:
        origin = json.loads(metadata.distribution("ola-vlm").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {}
    if "vcs_info" not in origin or not origin["url"].startswith("https://"):
        return CODE
    return f"{origin['url'].removesuffix('.git')}/tree/{origin['vcs_info']['commit_id']}"


def make_links(checkpoint: str | None, code: str) -> dict[str, str]:
    """Title -> address; `checkpoint`: a folder or a name on the Hub, None for the miniature."""
    folder = code if "/tree/" in code else f"{code}/tree/main"
    links = {"Code": code, "Paper": PAPER}
    if checkpoint is None:
        links["Checkpoint"] = f"{folder}/miniature/weights/ola_vlm"
    elif not Path(checkpoint).exists():
        links["Checkpoint"] = f"https://huggingface.co/{checkpoint}"
    links["Docs"] = f"{folder}/docs"
    return links


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("app.py", __doc__, start="python")
    for name, text in {
        "checkpoint": "a folder or a name on the Hub",
        "compare": "a second one, to be asked beside it",
        "recipe": "whose teachers the layers' predictions are shown beside (default: those of the checkpoint's run)",
        "unclip": "pipeline that makes images of gen embeddings: stabilityai/stable-diffusion-2-1-unclip",
        "code": "address of the code, for the page's links (default: where the package was installed from)",
    }.items():
        variable = f"OLA_VLM_{name.upper()}"
        parser.add_argument(f"--{name}", default=os.environ.get(variable), help=f"{text} (or {variable})")
    args = parser.parse_args(argv)
    own = args.checkpoint is None
    first = args.checkpoint or str(WEIGHTS / "ola_vlm")
    recipe = args.recipe or ("miniature_pretrain" if own else None)
    second = args.compare or (str(WEIGHTS / "llava") if own else None)
    try:
        chats = {Path(first).name: Chat.load(first)}
        if second:
            title = Path(second).name
            chats[title if title not in chats else f"{title} (second)"] = Chat.load(second)
    except (OSError, ValueError) as error:
        raise SystemExit(f"app.py: {error}") from error
    drawn, images = render_scenes(204 if own else 4)
    talker = next(iter(chats.values()))
    of_gen = {"images_for_gen": images[4:] if own else None, "unclip": args.unclip}
    try:
        run = find_teachers(recipe, first)
        viewer = LayerViewer.load(first, talker.model, talker.processor, run, **of_gen)
    except (OSError, ValueError) as error:
        viewer = str(error).replace(first, Path(first).name)  # no visitor's business where it lies
    other = None
    if second and not isinstance(viewer, str):
        compared = list(chats.values())[-1]
        try:
            other = LayerViewer.load(second, compared.model, compared.processor, run, like=viewer)
        except (OSError, ValueError) as error:
            print(f"app.py: the layers of {second} can't be compared: {error}")
    about = MINIATURE if own else f"Here you talk to {escape(Path(first).name)}."
    links = make_links(args.checkpoint, args.code or code_address())
    with tempfile.TemporaryDirectory() as folder:
        examples = make_examples(drawn[:4], images[:4], Path(folder), own)
        launch(build(chats, examples, about, viewer, links, other))


if __name__ == "__main__":
    main()
