"""A visitor's conversation: as the page shows it, as the models read it, and what is refused of it.

A conversation lives in its page, which sends it with every question. Of each the server checks all that is cheap
(counts, files' headers, tokens) before it decodes a picture.
"""

from collections.abc import Mapping, Sequence
from html import escape, unescape
from mimetypes import guess_type

from PIL import Image

from ..inference.chat import Chat
from ..inference.questions import without_option_words
from . import limits
from .uploads import picture_size, read_image, shrunk_size

# Begins what the page says in an answer; the model doesn't read it.
NOTE = "\u2139 "


def turn(role: str, text: str, files: Sequence[str] = ()) -> dict:
    """A message as the chat on the page shows it."""
    content = []
    for file in files:
        # The chat wants some type even of a file without an ending; what it is, `read_image` finds out.
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
    # In answers only: what a visitor writes is a question, however it begins.
    return message["role"] == "assistant" and part["type"] == "text" and part["text"].startswith(NOTE)


def check_history(history: list[dict]) -> None:
    """ValueError if the chat on the page has what no page sends, or too much."""
    texts = []
    images = 0
    for message in history:
        for part in message["content"]:
            # Anybody can send anything: nothing below may meet another kind of part.
            if message["role"] not in ("user", "assistant") or part["type"] not in ("text", "file"):
                raise ValueError("the chat has a part that is neither text nor an image: clear it")
            if part["type"] == "file":
                images += 1
            else:
                texts.append(part["text"])
    # Each text costs time, however short: it counts as 100 characters at least.
    characters = max(sum(map(len, texts)), 100 * len(texts))
    if characters > limits.MAX_CONVERSATION_CHARACTERS or images > limits.MAX_CONVERSATION_IMAGES:
        most = f"{limits.MAX_CONVERSATION_CHARACTERS:,} characters or {limits.MAX_CONVERSATION_IMAGES} images"
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
            # `text_part` escaped it for the page.
            text = unescape(part["text"])
            if message["role"] == "user":
                question = text
            else:
                # The page writes the option's words behind its letter; the model gets its own answer back.
                text = without_option_words(question, text)
            if text and not is_note(message, part):
                content.append({"type": "text", "text": text})
        # Chat templates want roles in turn: two questions in a row become one.
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


def read_conversation(history: list[dict], chat: Chat | None = None) -> list[dict]:
    """The chat on the page as transformers' messages. ValueError tells the visitor what is wrong with it: what is
    cheap to check comes first, also whether `chat` has room for so many tokens; then each file is decoded once."""
    check_history(history)
    messages = as_messages(history)
    # By the files' headers.
    sizes = {path: picture_size(path) for path in image_paths(messages)}
    check_pixels(sizes)
    if chat is not None:
        check_tokens(chat, messages, sizes)
    pictures = {path: read_image(path) for path in sizes}
    return with_pictures(messages, pictures)


def image_paths(messages: list[dict]) -> list[str]:
    """The different files, in their order."""
    paths = []
    for message in messages:
        paths += [part["image"] for part in message["content"] if part["type"] == "image"]
    return list(dict.fromkeys(paths))


def check_pixels(sizes: Mapping[str, tuple[int, int]]) -> None:
    """ValueError if the files have too many pixels together; `sizes`: path -> width and height."""
    pixels = sum(width * height for width, height in sizes.values())
    if pixels > limits.MAX_CONVERSATION_PIXELS:
        most = f"more than {limits.MAX_CONVERSATION_PIXELS // 10**6} million"
        raise ValueError(f"the chat's images have {pixels // 10**6} million pixels, {most}: clear it or shrink them")


def check_tokens(chat: Chat, messages: list[dict], sizes: Mapping[str, tuple[int, int]]) -> None:
    """ValueError if the model has no room for so many tokens."""
    # Blank pictures take as many tokens as those of their sizes do, and nothing has to be decoded.
    blank_of_size = {size: Image.new("RGB", shrunk_size(size)) for size in set(sizes.values())}
    blanks = {path: blank_of_size[size] for path, size in sizes.items()}
    chat.inputs(with_pictures(messages, blanks))


def check_message(message: dict) -> None:
    """ValueError tells the visitor what is wrong with it."""
    text = message["text"].strip()
    files = message["files"]
    if not text:
        raise ValueError("write a question, too" if files else "write a question first")
    if len(text) > limits.MAX_CHARACTERS:
        raise ValueError(f"the question has {len(text):,} characters, more than {limits.MAX_CHARACTERS:,}: shorten it")
    if len(files) > limits.MAX_IMAGES:
        raise ValueError(f"{len(files)} images are more than the {limits.MAX_IMAGES} that a message may have")
