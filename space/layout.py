"""The page: its parts, where they stand, and which handler an event calls."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from html import escape

import gradio as gr
from gradio.utils import get_space

from ..files.escapes import markdown
from ..inference.chat import Chat
from ..probing.pictures import LayerViewer
from . import limits
from .galleries import depth_scale
from .handlers import TASKS, Handlers, ready
from .zero_gpu import on_gpu

TITLES = {"depth": "Depth", "seg": "Segmentation", "gen": "Image embedding (gen)"}

# How Gradio shows a row of layers; the page's style does the rest.
GALLERY = {
    "columns": 8,
    "height": "auto",
    "interactive": False,
    "buttons": [],
    "object_fit": "contain",
    "fit_columns": False,
}

ABOUT = """\
# OLA-VLM: layers that see
The layers of a vision-language model can learn in training what vision encoders see in an image: depth, segmentation,
an embedding. {model}

{links}"""
SEEN = """\
### What each layer sees
of the image sent last, read by {by}. **teacher**: its own output. **decoded**: the teacher's features, drawn as
a layer's are: the best a layer can look like. {scores}{notes}"""
# Where the mean target is known, and where it isn't.
CENTERED = """\
**nothing seen**: the mean of the training images' features. **layer 0**: the image as it enters the language model.
The number: cosine to the image's own features, 0 for nothing seen, 1 for all."""
PLAIN = """\
The number{of_tasks}: plain cosine to the image's own features, high even where nothing is seen, as no mean of the
training images' features is known."""
NOTHING_SEEN = """\
### What each layer sees
can't be shown: {reason}."""
NOT_YET = "*Send an image or click an example: here its layers appear.*"


@dataclass
class LayerParts:
    """What shows the layers; all are empty without a viewer."""

    galleries: list[gr.Gallery] = field(default_factory=list)
    legends: list[gr.HTML] = field(default_factory=list)
    galleries_of_others: list[gr.Gallery] = field(default_factory=list)


@dataclass
class ChatParts:
    """The chats' components that events read or write."""

    chatbots: list[gr.Chatbot]
    box: gr.MultimodalTextbox
    regenerate: gr.Button
    clear: gr.Button
    compare: gr.CheckboxGroup
    sampling: list[gr.Slider]


def build(
    chats: dict[str, Chat],
    examples: Sequence[dict] = (),
    about: str = "",
    viewer: LayerViewer | str = "there are no teachers",
    links: Mapping[str, str] | None = None,
    others: Mapping[str, LayerViewer | str] | None = None,
) -> gr.Blocks:
    """The page.

    Args:
        chats: title -> model; those after the first are asked beside it on demand.
        examples: messages `{"text", "files": [path]}`, with "display_text" (what their card says) and "truth" (the
            right answer) if they have them.
        about: what to say about the model, Markdown.
        viewer: of the first model's layers, or why there is none.
        links: title -> address.
        others: title -> viewer of another model's layers, shown above the first one's while they are compared, or why
            there is none.
    """
    handlers = Handlers(chats, examples, viewer, others)
    # Every 10 minutes Gradio deletes uploads older than SECONDS_KEPT.
    with gr.Blocks(title="OLA-VLM", analytics_enabled=False, delete_cache=(600, limits.SECONDS_KEPT)) as page:
        with gr.Row():
            linked = [f"[{title}]({address})" for title, address in (links or {}).items()]
            gr.Markdown(ABOUT.format(model=about, links=" ".join(linked)), elem_id="about")
            # It copies a Space, and so makes sense on the Hub only.
            gr.DuplicateButton(visible=get_space() is not None, min_width=120)
        with gr.Row():
            with gr.Column(scale=6, min_width=320):
                chat_parts = chat_column(chats, examples)
            with gr.Column(scale=7, min_width=320, elem_id="layers"):
                layer_parts = layers_column(handlers, others or {})
        connect(handlers, chat_parts, layer_parts)
    # The REST routes, too, wait in the queue.
    return page.queue(max_size=limits.QUEUE_LENGTH, api_open=False)


def chat_column(chats: dict[str, Chat], examples: Sequence[dict]) -> ChatParts:
    cards = [card(example) for example in examples]
    with gr.Row():
        chatbots = []
        for i, name in enumerate(chats):
            is_first = i == 0
            chatbot = gr.Chatbot(
                label=name,
                visible=is_first,
                # The other chats are hidden until they are compared.
                examples=cards if is_first else [],  # pyright: ignore[reportArgumentType] (dicts of such a form)
                height=360,
                min_width=240,
                # An answer may hold any text: as Markdown it could show pictures from anywhere.
                render_markdown=False,
                # On the Hub only it does something.
                buttons=["share"] if get_space() else [],
                elem_classes="chat",
            )
            # Else the copies that it has made of the cards' pictures would be deleted as uploads are.
            chatbot.keep_in_cache.update(chatbot.temp_files)
            chatbots.append(chatbot)
    box = gr.MultimodalTextbox(
        placeholder="Add an image and ask about it",
        show_label=False,
        file_types=["image"],
        file_count="multiple",
        # A longer text would be pasted as a file.
        max_plain_text_length=limits.MAX_CONVERSATION_CHARACTERS,
        elem_id="question",
    )
    with gr.Row():
        regenerate = gr.Button("Regenerate", size="sm", min_width=90)
        clear = gr.Button("Clear", size="sm", min_width=90, elem_id="clear")
    _, *others = chats
    # Without a container the group's label isn't shown: each box says what it is.
    choices = [(f"Compare with {title}", title) for title in others]
    compare = gr.CheckboxGroup(
        choices, label="Compare with", visible=len(others) > 0, container=False, elem_id="compare"
    )
    with gr.Accordion("Sampling", open=False):
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest word always")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="of the likeliest words, at T > 0")
        max_new_tokens = gr.Slider(1, 1024, 256, step=1, label="Max new tokens")
    return ChatParts(
        chatbots=chatbots,
        box=box,
        regenerate=regenerate,
        clear=clear,
        compare=compare,
        sampling=[temperature, top_p, max_new_tokens],
    )


def card(example: dict) -> dict:
    """An example as Gradio's chat shows it."""
    # Without the truth, which is told with the answer.
    return {name: deepcopy(example[name]) for name in ("text", "files", "display_text") if name in example}


def layers_column(handlers: Handlers, others: Mapping[str, LayerViewer | str]) -> LayerParts:
    """A gallery for each task, the other models' above it."""
    parts = LayerParts()
    viewer = handlers.viewer
    if isinstance(viewer, str):
        gr.Markdown(NOTHING_SEEN.format(reason=markdown(viewer)), elem_id="seen")
        return parts
    left_out = dict(viewer.left_out)
    for task in viewer.decoders:
        if task not in handlers.tasks:
            left_out[task] = f"the page shows {', '.join(TASKS)}"
    if not handlers.tasks:
        gr.Markdown(NOTHING_SEEN.format(reason=markdown(reasons(left_out))), elem_id="seen")
        return parts
    without_layers = {title: reason for title, reason in others.items() if isinstance(reason, str)}
    missing = reasons({**left_out, **without_layers})
    notes = ""
    if missing:
        notes += f" Not shown: {markdown(missing)}."
    if viewer.remark:
        notes += f" {markdown(viewer.remark)}"
    scores = explained_scores(handlers.tasks, viewer.means)
    gr.Markdown(SEEN.format(by=markdown(viewer.by), scores=scores, notes=notes), elem_id="seen")
    gr.Markdown(NOT_YET, elem_id="not-yet")
    for task in handlers.tasks:
        with gr.Column(elem_classes="task", min_width=300):
            scale = depth_scale() if task == "depth" else ""
            heading = f"<b>{TITLES[task]}</b>: {escape(handlers.decoders[task].caption)} {scale}"
            gr.HTML(heading, padding=False, elem_classes="heading")
            if task in handlers.legends:
                legend = gr.HTML(padding=False, elem_classes="heading")
                parts.legends.append(legend)
            # Above the first model's, as in `ola-vlm visualize`; hidden while they are not compared.
            for title in handlers.others:
                label = f"{title} (last row: {next(iter(handlers.chats))})"
                above = gr.Gallery(label=label, visible=False, elem_classes="layers other", **GALLERY)
                parts.galleries_of_others.append(above)
            gallery = gr.Gallery(show_label=False, elem_classes="layers", **GALLERY)
            parts.galleries.append(gallery)
    return parts


def explained_scores(tasks: Sequence[str], means: Mapping[str, object]) -> str:
    """What the number below a picture is: a task whose mean target is not known has another one."""
    plain = [task for task in tasks if task not in means]
    if not plain:
        return CENTERED
    if len(plain) == len(tasks):
        return PLAIN.format(of_tasks="")
    return f"{CENTERED} {PLAIN.format(of_tasks=' of ' + ' and '.join(plain))}"


def reasons(left_out: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in left_out.items())


def connect(handlers: Handlers, parts: ChatParts, layer_parts: LayerParts) -> None:
    """The events. An error covers the outputs of its event: what checks has none."""
    box = parts.box
    chatbots = parts.chatbots
    clears = [parts.clear.click, *(chatbot.clear for chatbot in chatbots)]
    quiet = {"queue": False, "show_progress": "hidden"}

    # An example is known by its number: what else the event says, files' paths too, is the visitor's word.
    chosen = chatbots[0].example_select(handlers.example, None, box, **quiet)
    asked = []
    # Typed or chosen: first checked, then shown, and only then answered.
    for trigger in (box.submit, chosen.success):
        checked = trigger(handlers.check, [box, parts.compare, *chatbots], None, concurrency_limit=4)
        asked.append(checked.success(handlers.ask, [box, *chatbots], [*chatbots, box], **quiet))
    # In the queue, whose errors reach the page.
    checked = parts.regenerate.click(handlers.check_again, chatbots[0], None, concurrency_limit=4)
    asked_again = checked.success(handlers.ask_again, chatbots, [*chatbots, box], **quiet)

    # Two answers at a time, whoever asks.
    model = {"concurrency_limit": 2, "concurrency_id": "model", "show_progress": "minimal"}
    answers = []
    for event in (*asked, asked_again):
        inputs = [parts.compare, *parts.sampling, *chatbots]
        answer = event.success(on_gpu(handlers.answer), inputs, chatbots, **model)
        # Not `success`: after an error the box must come back, too.
        answer.then(ready, None, box, **quiet)
        answers.append(answer)

    one_at_a_time = {"concurrency_limit": 1, "show_progress": "minimal"}
    galleries = layer_parts.galleries
    if galleries:
        outputs = [*galleries, *layer_parts.legends]
        # Beside the answer, not after it. An answer that is written anew has the same image: its layers are there.
        for event in asked:
            event.success(on_gpu(handlers.layers), chatbots[0], outputs, **one_at_a_time)
    galleries_of_others = layer_parts.galleries_of_others
    if galleries_of_others:
        inputs = [parts.compare, chatbots[0]]
        for trigger in [*(event.success for event in asked), parts.compare.change]:
            trigger(on_gpu(handlers.layers_of_others), inputs, galleries_of_others, **one_at_a_time)
        for trigger in clears:
            trigger(handlers.others_emptied, None, galleries_of_others, **quiet)

    # A canceled answer closes its streams, and so stops the models.
    box.stop(ready, None, box, cancels=answers, **quiet)
    for trigger in clears:
        trigger(handlers.emptied, parts.compare, [*chatbots, box, *galleries], cancels=answers, **quiet)
    parts.compare.change(handlers.compared, [parts.compare, *chatbots], [*chatbots, box], cancels=answers, **quiet)
