"""The Space: chat with a checkpoint about images and look at what its layers see. `python space/app.py --help`.

Without arguments it shows the miniature that ships with the package. Each argument can be an environment variable
(a Space has no arguments): OLA_VLM_CHECKPOINT, OLA_VLM_COMPARE, OLA_VLM_RECIPE, OLA_VLM_UNCLIP. Gradio has its own:
GRADIO_SERVER_NAME, GRADIO_SERVER_PORT.

Nobody's conversation is kept here: it lives in the visitor's page, which sends it with every question.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from html import escape, unescape
from itertools import zip_longest
from mimetypes import guess_type
from pathlib import Path

try:
    import spaces  # on ZeroGPU it must come before torch
except ImportError:
    spaces = None

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
from PIL import Image

from ola_vlm.chat import Chat
from ola_vlm.miniature import world
from ola_vlm.targets.images import DamagedImage, ImageError, open_image
from ola_vlm.visualize import LayerViewer, find_teachers

WEIGHTS = Path(world.__file__).parent / "weights"
MAX_FILE = "10mb"
MAX_PIXELS = 50_000_000
MAX_SIDE = 2048  # larger pictures are shrunk; no vision tower here sees more
MAX_IMAGES = 4  # a message
MAX_CHARACTERS = 4_000  # a message
MAX_CONVERSATION = 100_000  # characters, and
MAX_CONVERSATION_IMAGES = 16
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what Pillow decodes by itself: no EPS, which runs Ghostscript
KEPT = 3600  # seconds that uploads stay on the disk
HEADINGS = {"decoded target": "decoded"}  # as short as a phone needs it
TASKS = {"depth": "Depth", "seg": "Segmentation", "gen": "Image embedding (gen)"}

ABOUT = """\
# OLA-VLM: layers that see
A LLaVA whose language-model layers learnt, in pre-training, to predict what specialised vision encoders see: depth,
segmentation, an image embedding ([paper](https://arxiv.org/abs/2412.09585)). {model}"""
MINIATURE = """\
**This is its miniature**, trained on two CPU cores: it knows rendered 64-pixel scenes and questions like the examples,
in their exact words. Of those it answers three in four, as LLaVA does (guessing: 44 in 100); to anything else, and to
photographs, it answers nonsense. What is better than LLaVA's is what its layers see."""
SEEN = """\
### What each layer sees
of the image sent last, beside the teacher's own output and its features decoded in the same way (the best a layer can
look like). Read from the layers by {by}: the clearer, the more of it a layer holds."""
NOTHING_SEEN = """\
### What each layer sees
can't be shown: {reason}."""

CSS = """
.gradio-container {max-width: 1320px !important; margin: auto !important}
.prose h1 {font-size: 1.5rem; margin: 0 0 .2em} .prose h3 {margin: .3em 0 0} .prose p {margin: 0}
.message img, .example img, .grid-wrap img, .preview img {image-rendering: pixelated}
.message img {min-width: 128px; min-height: 128px; object-fit: contain}
.message-buttons-right, .message-buttons-left {display: none !important}
.caption-label {font-size: .75rem !important; padding: 0 .4em !important; max-width: 100% !important}
.example-image-container, .example-image {width: 72px !important; height: 72px !important}
.example {padding: .6em !important} #layers {gap: .5rem}
.layers .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
.layers .empty {min-height: 5rem !important} .layers .gallery-item, .layers .grid-wrap {min-height: 0 !important}
footer {display: none !important}
"""


def on_gpu(function: Callable) -> Callable:
    """On ZeroGPU the function gets a GPU for its time; elsewhere it stays as it is."""
    return spaces.GPU(function) if spaces else function


def read_image(path: str) -> Image.Image:
    """An uploaded file as RGB, at most MAX_SIDE pixels a side. ValueError tells the visitor what is wrong with it."""
    name = Path(path).name[-60:]
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                size = f"{file.width} x {file.height} pixels, more than {MAX_PIXELS // 10**6} million"
                raise ValueError(f"{name} has {size}: shrink it first")
            file.draft("RGB", (MAX_SIDE, MAX_SIDE))  # a large JPEG is decoded small
            image = open_image(file)
    except FileNotFoundError as error:
        raise ValueError(f"{name} is gone: images are kept for an hour. Clear the chat and send it again") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has far too many pixels: shrink it first") from error
    except (DamagedImage, OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name} can't be read as an image: send a whole {', '.join(FORMATS)} file") from error
    except ImageError as error:  # without the folder, which is no visitor's business
        raise ValueError(f"{name}: {error.reason}") from error
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def turn(role: str, text: str, files: Sequence[str] = ()) -> dict:
    """A message as the chat on the page shows it, which takes texts for HTML."""
    kinds = [guess_type(file)[0] or "image/png" for file in files]
    images = [{"type": "file", "file": {"path": f, "mime_type": kind}} for f, kind in zip(files, kinds, strict=True)]
    return {"role": role, "content": [*images, {"type": "text", "text": escape(text)}]}


def conversation(history: list[dict]) -> list[dict]:
    """The chat on the page as transformers' messages; what was stopped before a word came is asked with the next.
    ValueError tells the visitor what is wrong with it."""
    messages, characters, images = [], 0, 0
    for message in history:
        content = []
        for part in message["content"]:
            if message["role"] not in ("user", "assistant") or part["type"] not in ("text", "file"):
                raise ValueError("the chat has a part that is neither text nor an image: clear it")
            elif part["type"] == "file":
                images += 1
                content.append({"type": "image", "image": part["file"]["path"]})
            elif part["text"]:
                characters += len(part["text"])
                content.append({"type": "text", "text": unescape(part["text"])})
        if content and messages and messages[-1]["role"] == message["role"]:
            messages[-1]["content"] += content
        elif content:
            messages.append({"role": message["role"], "content": content})
    if characters > MAX_CONVERSATION or images > MAX_CONVERSATION_IMAGES:
        most = f"{MAX_CONVERSATION:,} characters or {MAX_CONVERSATION_IMAGES} images"
        raise ValueError(f"the chat has more than {most}: clear it")
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        part["image"] = read_image(part["image"])
    return messages


def refuse(error: Exception | str) -> gr.Error:
    return gr.Error(escape(f"{error}."), title="Not possible", print_exception=False)


def check_message(message: dict) -> None:
    """ValueError tells the visitor what is wrong with it."""
    text, files = message["text"].strip(), message["files"]
    if not text:
        raise ValueError("write a question, too" if files else "write a question first")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the question has {len(text):,} characters, more than {MAX_CHARACTERS:,}: shorten it")
    if len(files) > MAX_IMAGES:
        raise ValueError(f"{len(files)} images are more than the {MAX_IMAGES} that a message may have")


def render_scenes(count: int) -> tuple[world.Scenes, list[Image.Image]]:
    """About `count` scenes of the miniature's world all of whose objects can be seen."""
    drawn = world.sample_scenes(int(count * 1.2) + 4, seed=11)
    arrays = world.render(drawn)
    whole = np.flatnonzero(((arrays["visible"] >= 12) | (drawn.color < 0)).all(1))[:count]
    return drawn[whole], [Image.fromarray(arrays["image"][i]) for i in whole]


def make_examples(drawn: world.Scenes, images: list[Image.Image], folder: Path, own_words: bool) -> list[dict]:
    """A message for each image, with its file in `folder`; `own_words`: the miniature's own questions."""
    examples = []
    for i, image in enumerate(images):
        path = folder / f"scene_{i}.png"
        (image if own_words else image.resize((384, 384), Image.Resampling.BICUBIC)).save(path)
        asked = {question["task"]: question["question"] for question in world.questions(drawn, i)}
        kinds = [asked[task] for task in world.TASKS if task in asked]
        text = kinds[i % len(kinds)] if own_words else ["Describe the image.", "Which object is closest?"][i % 2]
        examples.append({"text": text, "files": [str(path)]})
    return examples


def build(
    chats: dict[str, Chat],
    examples: Sequence[dict] = (),
    about: str = "",
    viewer: LayerViewer | str = "there are no teachers",
) -> gr.Blocks:
    """The page.

    Args:
        chats: title -> model; a second one is asked beside the first on demand.
        examples: messages `{"text", "files": [path]}`.
        about: what to say about the model, Markdown.
        viewer: of the first model's layers, or why there is none.
    """
    first, *second = chats.values()
    painters = {} if isinstance(viewer, str) else viewer.painters
    shown = [task for task in TASKS if task in painters]

    def check(message: dict, compare: bool, *histories: list[dict]) -> None:
        try:
            check_message(message)
            asked = turn("user", message["text"].strip(), message["files"])
            for chat, history in zip(chats.values(), histories if compare else histories[:1], strict=False):
                chat.inputs(conversation([*history, asked]))
        except ValueError as error:
            raise refuse(error) from error
        for remark in first.remarks(message["text"]):
            gr.Info(escape(f"{remark}."), title="Note")

    def ask(message: dict, *histories: list[dict]) -> list:
        asked = turn("user", message["text"].strip(), message["files"])
        return [*([*history, asked] for history in histories), running]

    def check_again(history: list[dict]) -> None:
        if not any(message["role"] == "user" for message in history):
            raise refuse("there is no answer to generate again")

    def ask_again(*histories: list[dict]) -> list:
        last = max(i for i, message in enumerate(histories[0]) if message["role"] == "user")
        return [*(history[: last + 1] for history in histories), running]

    @on_gpu
    def answer(compare: bool, temperature: float, top_p: float, max_new_tokens: float, *histories) -> Iterator[list]:
        asked = histories if compare else histories[:1]
        rest = [gr.skip()] * (len(histories) - len(asked))
        sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": int(max_new_tokens)}
        try:
            with ExitStack() as stack:
                streams = [
                    chat.stream(conversation(history), **sampling)
                    for chat, history in zip(chats.values(), asked, strict=False)
                ]
                for stream in streams:
                    stack.callback(stream.close)  # stopped by the visitor, the model stops, too
                answers = [""] * len(streams)
                for pieces in zip_longest(*streams, fillvalue=""):
                    answers = [text + piece for text, piece in zip(answers, pieces, strict=True)]
                    pairs = zip(asked, answers, strict=True)
                    yield [*([*history, turn("assistant", text)] for history, text in pairs), *rest]
        except ValueError as error:
            raise refuse(error) from error

    @on_gpu
    def layers(history: list[dict]) -> list:
        files = [part["file"]["path"] for part in history[-1]["content"] if part["type"] == "file"]
        if not files:
            return [gr.skip()] * len(shown)
        pictures = viewer.pictures([read_image(files[-1])])
        return [
            [
                (picture, HEADINGS.get(heading, heading))
                for heading, (picture,) in pictures[task].items()
                if heading != "image"
            ]
            for task in shown
        ]

    def example(chosen: gr.SelectData) -> dict:
        return examples[chosen.index]

    running = gr.MultimodalTextbox(value=None, interactive=False, submit_btn=False, stop_btn=True)
    ready = gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False)
    with gr.Blocks(title="OLA-VLM", analytics_enabled=False, delete_cache=(600, KEPT)) as page:
        gr.Markdown(ABOUT.format(model=about), elem_id="about")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    options = {"height": 400, "min_width": 280, "render_markdown": False, "buttons": []}
                    chatbots = [
                        gr.Chatbot(label=name, visible=i == 0, examples=[] if i else deepcopy(examples), **options)
                        for i, name in enumerate(chats)
                    ]
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
                compare = gr.Checkbox(label=f"Compare with {list(chats)[-1]}", visible=bool(second), container=False)
                with gr.Accordion("Sampling", open=False):
                    temperature = gr.Slider(
                        0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest word always"
                    )
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="of the likeliest words, at T > 0")
                    max_new_tokens = gr.Slider(1, 1024, 256, step=1, label="Max new tokens")
            with gr.Column(scale=2, min_width=320, elem_id="layers"):
                seen = SEEN.format(by=viewer.by) if shown else NOTHING_SEEN.format(reason=escape(str(viewer)))
                gr.Markdown(seen, elem_id="seen")
                galleries = []
                for task in shown:
                    gr.Markdown(f"**{TASKS[task]}**: {painters[task].caption}")
                    options = {"columns": 4, "height": "auto", "interactive": False, "buttons": []}
                    galleries.append(
                        gr.Gallery(
                            object_fit="contain", fit_columns=False, show_label=False, elem_classes="layers", **options
                        )
                    )

        sampling = [compare, temperature, top_p, max_new_tokens]
        quiet = {"show_progress": "hidden"}
        model = {"concurrency_limit": 2, "concurrency_id": "model", "show_progress": "minimal"}
        # An error covers the outputs of its event: what checks has none. An example is known by its number: what else
        # the event says, files' paths too, is the visitor's word.
        chosen = chatbots[0].example_select(example, None, box, queue=False, **quiet)
        checks = [
            trigger(check, [box, compare, *chatbots], None, concurrency_limit=4)
            for trigger in (box.submit, chosen.success)
        ]
        asked = [checked.success(ask, [box, *chatbots], [*chatbots, box], queue=False, **quiet) for checked in checks]
        checked = regenerate.click(check_again, chatbots[0], None, queue=False)
        asked_again = checked.success(ask_again, chatbots, [*chatbots, box], queue=False, **quiet)
        answers = [event.success(answer, [*sampling, *chatbots], chatbots, **model) for event in (*asked, asked_again)]
        for event in answers:
            event.then(lambda: ready, None, box, queue=False, **quiet)
        if shown:
            for event in asked:
                event.success(layers, chatbots[0], galleries, concurrency_limit=1, show_progress="minimal")
        box.stop(lambda: ready, None, box, cancels=answers, queue=False, **quiet)

        def emptied(compared: bool) -> list:
            bots = [gr.Chatbot(value=[], visible=i == 0 or compared) for i in range(len(chatbots))]
            return [*bots, ready, *[[] for _ in shown]]

        # compare: a second model that joins later would not know the images
        for trigger in (clear.click, compare.change, *(chatbot.clear for chatbot in chatbots)):
            trigger(emptied, compare, [*chatbots, box, *galleries], cancels=answers, queue=False, **quiet)
    return page.queue(max_size=32)


def launch(page: gr.Blocks, **options):
    """`options`: of gradio's `launch`. Files are served from the upload folder only; nothing is recorded."""
    system = ["system-ui", "-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
    return page.launch(
        theme=gr.themes.Soft(font=system, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"]),
        css=CSS,
        max_file_size=MAX_FILE,
        blocked_paths=[str(Path(__file__).parent), str(WEIGHTS.parents[1])],
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        **options,
    )


def main(argv: Sequence[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    for name, text in {
        "checkpoint": "a folder or a name on the Hub",
        "compare": "a second one, to be asked beside it",
        "recipe": "whose teachers the layers' predictions are shown beside (default: those of the checkpoint's run)",
        "unclip": "pipeline that makes images of gen embeddings: stabilityai/stable-diffusion-2-1-unclip",
    }.items():
        variable = f"OLA_VLM_{name.upper()}"
        parser.add_argument(f"--{name}", default=os.environ.get(variable), help=f"{text} (or {variable})")
    args = parser.parse_args(argv)
    own = args.checkpoint is None
    first, recipe = args.checkpoint or str(WEIGHTS / "ola_vlm"), args.recipe or ("miniature_pretrain" if own else None)
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
        viewer = LayerViewer.load(first, talker.model, talker.processor, find_teachers(recipe, first), **of_gen)
    except (OSError, ValueError) as error:
        viewer = str(error).replace(first, Path(first).name)  # no visitor's business where it lies
    about = MINIATURE if own else f"Here you talk to {escape(Path(first).name)}."
    with tempfile.TemporaryDirectory() as folder:
        launch(build(chats, make_examples(drawn[:4], images[:4], Path(folder), own), about, viewer))


if __name__ == "__main__":
    main()
