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
from itertools import chain
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import BatchFeature, TextIteratorStreamer

from ..commands.running import command
from ..files.escapes import terminal
from ..targets.images import open_image
from ..training.rows import brief
from .checkpoints import check_is_no_file, load_checkpoint
from .questions import option_words

HELP = """\
/image PATH   shows the model an image, with your next question; several may follow each other
/reset        forgets the conversation and its images
/help         says this
/quit         ends (so does Ctrl-D); Ctrl-C stops an answer"""

NO_IMAGE = "no image yet: a guess from the words alone"
# A smaller temperature makes logits infinite and changes no answer.
GREEDY_BELOW = 0.01


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
        # transformers takes floats only.
        options["temperature"] = float(temperature)
        options["top_p"] = float(top_p)
    return options


def has_image(messages: list[dict]) -> bool:
    parts = chain.from_iterable(message["content"] for message in messages)
    return any(part["type"] == "image" for part in parts)


def without_halves(text: str) -> str:
    """With "?" for halves of characters (lone surrogates), which a terminal of another encoding gives and no tokenizer
    takes."""
    return text.encode("utf-8", "replace").decode()


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
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        if not processor.chat_template:
            raise ValueError("the checkpoint has no chat template: add a chat_template.jinja to it")
        # What a user's words must not be taken for.
        names = []
        for token in self.tokenizer.added_tokens_decoder.values():
            name = str(token)
            # Not special, but written by the template: "<think>".
            is_control = token.special or name in processor.chat_template
            if is_control and len(name.strip()) > 1:
                names.append(name)
        # The longest first: one may begin as another does.
        names.sort(key=len, reverse=True)
        # "(?!)" matches nothing: of a tokenizer without such tokens.
        self._control = re.compile("|".join(map(re.escape, names)) or "(?!)")

    @classmethod
    def load(cls, checkpoint: str, **how) -> "Chat":
        """`how`: of `load_checkpoint`."""
        return cls(*load_checkpoint(str(checkpoint), **how))

    def remarks(self, text: str) -> list[str]:
        """Sentences on what the model can't read in a user's text as it was meant: control tokens, unknown words."""
        remarks = []
        # Each once, in their order.
        control = dict.fromkeys(self._control.findall(text))
        if control:
            remarks.append(f"{' '.join(control)} is read as plain text, not as a control token")
        unknown = self._unknown_words(self._control.sub(" ", text))
        if unknown:
            # A text in another script would list every word.
            remark = f"The model does not know {', '.join(unknown[:8])}"
            if len(unknown) > 8:
                remark += f" and {len(unknown) - 8} more"
            remarks.append(remark)
        return remarks

    def _unknown_words(self, text: str) -> list[str]:
        """Words that the vocabulary lacks, each once and cut short; none if it can spell everything."""
        unknown_id = self.tokenizer.unk_token_id
        if unknown_id is None:
            return []
        # A dict, whose keys keep their order as a set's don't.
        unknown = {}
        for word in without_halves(text).split():
            if unknown_id in self.tokenizer(word, add_special_tokens=False)["input_ids"]:
                unknown[word[:40]] = None
        return list(unknown)

    def inputs(self, messages: list[dict]) -> BatchFeature:
        """The model's inputs for an answer to `messages`, on the CPU. ValueError if they leave no room for one, or if
        the chat template refuses them."""
        plain = []
        for message in messages:
            content = [self._as_text(part) for part in message["content"]]
            plain.append({**message, "content": content})
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        try:
            inputs = self.processor.apply_chat_template(plain, **options)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {brief(error)}") from error
        # Known only now: images become tokens, too. Beyond its positions a model writes nonsense.
        length = inputs["input_ids"].shape[1]
        room = self.context_length
        if room is not None and length >= room:
            what = f"the conversation has {length} tokens with its images, the model takes fewer than {room}"
            raise ValueError(f"{what}: start anew, or ask with fewer words or images")
        return inputs

    def _as_text(self, part: dict) -> dict:
        if part["type"] != "text":
            return part

        def broken_up(found: re.Match) -> str:
            name = found[0]
            return f"{name[0]} {name[1:]}"

        text = self._control.sub(broken_up, part["text"])
        return {**part, "text": without_halves(text)}

    @property
    def context_length(self) -> int | None:
        return self.model.config.get_text_config().to_dict().get("max_position_embeddings")

    def stream(
        self, messages: list[dict], temperature: float = 0.0, top_p: float = 1.0, max_new_tokens: int = 256
    ) -> Generator[str, None, None]:
        """The answer, piece by piece. To close the iterator stops the model.

        ValueError as of `sampling_options` and `inputs`; what the model raises is raised here.
        """
        # What is asked of `generate`.
        options = sampling_options(temperature, top_p, max_new_tokens)
        inputs = self.inputs(messages).to(self.model.device, self.model.dtype)
        if self.context_length is not None:
            room = self.context_length - inputs["input_ids"].shape[1]
            options["max_new_tokens"] = min(options["max_new_tokens"], room)
        options["pad_token_id"] = self.tokenizer.pad_token_id
        if options["pad_token_id"] is None:
            options["pad_token_id"] = self.tokenizer.eos_token_id

        # `generate` looks after each token whether the reader has gone.
        stop = threading.Event()

        def is_stopped(ids, scores, **kwargs) -> torch.Tensor:
            return torch.full(ids.shape[:1], stop.is_set(), device=ids.device)

        # It writes in a thread of its own; this one hands on what is written. At the block's end the thread is waited
        # for, so nobody computes behind the reader's back.
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options["streamer"] = streamer
        options["stopping_criteria"] = [is_stopped]
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(self.model.generate, **inputs, **options)  # pyright: ignore[reportCallIssue] (its keys are the processor's own)
            # Also after an error, or the reader would wait.
            answer.add_done_callback(lambda _: streamer.end())
            try:
                yield from streamer
                # Raises what the model raised.
                answer.result()
            finally:
                stop.set()


def converse(chat: Chat, read: Callable[[str], str], write: Callable[[str], object], images=(), **sampling) -> None:
    """Questions from `read` (a prompt -> a line; EOFError ends), answers to `write`; `images` are shown first."""
    messages = []
    shown = list(images)
    write(f"{HELP}\n")
    while True:
        prompt = "> "
        if shown:
            prompt = f"{len(shown)} image(s) > "
        try:
            # Ctrl-D or Ctrl-C while nothing is being answered ends the conversation.
            line = read(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        # A line is a command, or a question about what has been shown.
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/reset":
            messages = []
            shown = []
        elif command == "/image":
            try:
                shown.append(open_image(Path(argument.strip().strip("\"'")).expanduser()))
            # RuntimeError: "~name" of somebody who has no folder here.
            except (OSError, ValueError, RuntimeError) as error:
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
                # Closed whatever happens, as after Ctrl-C: that stops the model.
                with closing(chat.stream(asked, **sampling)) as pieces:
                    for piece in pieces:
                        answer += piece
                        write(piece)
                write(option_words(line, answer))
            except KeyboardInterrupt:
                write(" (stopped)")
            except ValueError as error:
                # Nothing was said: question and images can be given again.
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
    # Before the image is opened: of a checkpoint in its place only that would be said.
    check_is_no_file(args.checkpoint)
    # Before the model is loaded, which takes longer than to see that there is no such file.
    images = []
    if args.image:
        images.append(open_image(args.image))
    chat = Chat.load(
        args.checkpoint,
        dtype=args.dtype,
        device_map=args.device_map,
        trust_remote_code=args.trust_remote_code,
    )

    def write(text: str) -> None:
        # The model's words, too, are a stranger's.
        print(terminal(text), end="", flush=True)

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
    # With it lines can be edited and called back. Not every system has it.
    with suppress(ImportError):
        import readline  # noqa: F401 (to import it is to use it)
    converse(chat, input, write, images, **sampling)
