"""Talk to a checkpoint about images: `ola-vlm chat` (commands/chat.py) in the terminal, the Space (space/app.py) in a
browser, both through `Chat`.
"""

import math
import numbers
import re
import threading
from argparse import Namespace
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import BatchFeature, TextIteratorStreamer

from ..commands.running import command
from ..targets.escapes import terminal
from ..targets.images import open_image
from ..training.rows import brief
from .checkpoints import load_checkpoint
from .questions import option_words

HELP = """\
/image PATH   shows the model an image, with your next question; several may follow each other
/reset        forgets the conversation and its images
/help         says this
/quit         ends (so does Ctrl-D); Ctrl-C stops an answer"""

NO_IMAGE = "no image yet: a guess from the words alone"
GREEDY_BELOW = 0.01  # a smaller temperature makes logits infinite and changes no answer


def check_number(name: str, value: float) -> None:
    """ValueError for what is no finite number: text, NaN, True, ..."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: give a number")


def sampling_options(temperature: float = 0.0, top_p: float = 1.0, max_new_tokens: int = 256) -> dict:
    """Options of `generate`, greedy below GREEDY_BELOW. ValueError for what can't be sampled with."""
    check_number("temperature", temperature)
    check_number("top_p", top_p)
    check_number("max_new_tokens", max_new_tokens)
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: choose 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: choose more than 0 and at most 1")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: choose at least 1")
    options = {"do_sample": temperature >= GREEDY_BELOW, "max_new_tokens": int(max_new_tokens)}
    if options["do_sample"]:
        # transformers takes floats only
        options["temperature"] = float(temperature)
        options["top_p"] = float(top_p)
    return options


def has_image(messages: list[dict]) -> bool:
    return any(part["type"] == "image" for message in messages for part in message["content"])


class Chat:
    """A model to talk to, (model, processor) of any image-text-to-text checkpoint; several threads may do so at once.

    Messages are those of transformers: `{"role", "content": [{"type": "image", "image": PIL image}, {"type": "text",
    "text": str}]}`. Control tokens in their texts, such as `<image>` or a task token, are broken up ("< image>"), so
    that they are read as text. (transformers' `sanitize_control_tokens` fails with some processors, Idefics3's among
    them, and with templates that leave the first token to the tokenizer, as LLaVA's does; and it switches a setting of
    the tokenizer to and fro, which threads share.)
    ValueError if the checkpoint has no chat template.
    """

    def __init__(self, model, processor):
        self.model, self.processor, self.tokenizer = model.eval(), processor, processor.tokenizer
        if not processor.chat_template:
            raise ValueError("the checkpoint has no chat template: add a chat_template.jinja to it")
        added = self.tokenizer.added_tokens_decoder.values()  # not special, but written by the template: "<think>"
        names = [str(token) for token in added if token.special or str(token) in processor.chat_template]
        names = sorted((name for name in names if len(name.strip()) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or "(?!)")

    @classmethod
    def load(cls, checkpoint: str, **how) -> "Chat":
        """`how`: of `load_checkpoint`."""
        return cls(*load_checkpoint(str(checkpoint), **how))

    def remarks(self, text: str) -> list[str]:
        """Sentences on what the model can't read in a user's text as it was meant: control tokens, unknown words."""
        control = dict.fromkeys(self._control.findall(text))
        found = [f"{' '.join(control)} is read as plain text, not as a control token"] if control else []
        if (unknown_id := self.tokenizer.unk_token_id) is not None:
            words = dict.fromkeys(self._control.sub(" ", text).split())
            read = {word[:40]: self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words}
            unknown = [word for word, ids in read.items() if unknown_id in ids]
            if unknown:
                more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
                found.append(f"The model does not know {', '.join(unknown[:8])}{more}")
        return found

    def inputs(self, messages: list[dict]) -> BatchFeature:
        """The model's inputs for an answer to `messages`, on the CPU. ValueError if they leave no room for one, or if
        the chat template refuses them."""
        messages = [
            {**message, "content": [self._as_text(part) for part in message["content"]]} for message in messages
        ]
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        try:
            inputs = self.processor.apply_chat_template(messages, **template)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {brief(error)}") from error
        length, room = inputs["input_ids"].shape[1], self.context_length
        if room is not None and length >= room:
            what = f"the conversation has {length} tokens with its images, the model takes fewer than {room}"
            raise ValueError(f"{what}: start anew, or ask with fewer words or images")
        return inputs

    def _as_text(self, part: dict) -> dict:
        if part["type"] != "text":
            return part
        return {**part, "text": self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", part["text"])}

    @property
    def context_length(self) -> int | None:
        return self.model.config.get_text_config().to_dict().get("max_position_embeddings")

    def stream(
        self, messages: list[dict], temperature: float = 0.0, top_p: float = 1.0, max_new_tokens: int = 256
    ) -> Generator[str, None, None]:
        """The answer, piece by piece. To close the iterator stops the model.

        ValueError as of `sampling_options` and `inputs`; what the model raises is raised here.
        """
        options = sampling_options(temperature, top_p, max_new_tokens)
        inputs = self.inputs(messages).to(self.model.device, self.model.dtype)
        if self.context_length is not None:
            room = self.context_length - inputs["input_ids"].shape[1]
            options["max_new_tokens"] = min(options["max_new_tokens"], room)
        pad = self.tokenizer.pad_token_id
        stop = threading.Event()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options["pad_token_id"] = self.tokenizer.eos_token_id if pad is None else pad
        options["streamer"] = streamer
        options["stopping_criteria"] = [
            lambda ids, _, **kw: torch.full(ids.shape[:1], stop.is_set(), device=ids.device)
        ]
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(self.model.generate, **inputs, **options)  # pyright: ignore[reportCallIssue]
            answer.add_done_callback(lambda _: streamer.end())  # also after an error
            try:
                yield from streamer
                answer.result()
            finally:
                stop.set()


def converse(chat: Chat, read: Callable[[str], str], write: Callable[[str], object], images=(), **sampling) -> None:
    """Questions from `read` (a prompt -> a line; EOFError ends), answers to `write`; `images` are shown first."""
    messages, shown = [], list(images)
    write(f"{HELP}\n")
    while True:
        try:
            line = read(f"{len(shown)} image(s) > " if shown else "> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/reset":
            messages, shown = [], []
        elif command == "/image":
            try:
                shown.append(open_image(Path(argument.strip().strip("\"'")).expanduser()))
            except (OSError, ValueError) as error:
                write(f"! no image: {error}\n")
        elif line.startswith("/"):
            write(f"{HELP}\n")
        elif line:
            content = [{"type": "image", "image": image} for image in shown]
            content.append({"type": "text", "text": line})
            asked = [*messages, {"role": "user", "content": content}]
            remarks = chat.remarks(line)
            if not has_image(asked):
                remarks.append(f"{NO_IMAGE} (/image PATH shows one)")
            write("".join(f"! {remark}\n" for remark in remarks))
            answer = ""
            try:
                with closing(chat.stream(asked, **sampling)) as pieces:
                    for piece in pieces:
                        answer += piece
                        write(piece)
                write(option_words(line, answer))
            except KeyboardInterrupt:
                write(" (stopped)")
            except ValueError as error:
                write(f"! {error}\n")
                continue
            write("\n")
            shown = []
            messages = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


@command("chat")
def main(args: Namespace) -> None:
    sampling = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
    }
    images = [open_image(args.image)] if args.image else []
    chat = Chat.load(
        args.checkpoint,
        dtype=args.dtype,
        device_map=args.device_map,
        trust_remote_code=args.trust_remote_code,
    )

    def write(text: str) -> None:
        print(terminal(text), end="", flush=True)  # the model's words, too, are a stranger's

    if args.question is not None:
        write("".join(f"! {remark}\n" for remark in chat.remarks(args.question)))
        content = [{"type": "image", "image": images[0]}, {"type": "text", "text": args.question}]
        answer = ""
        for piece in chat.stream([{"role": "user", "content": content}], **sampling):
            answer += piece
            write(piece)
        write(option_words(args.question, answer))
        write("\n")
        return
    with suppress(ImportError):  # not on every system; lines can then be edited and called back
        import readline  # noqa: F401
    converse(chat, input, write, images, **sampling)
