"""The Space: chat with a checkpoint about images and look at what its layers see. `python space/app.py --help`.

Without arguments it shows the miniature that ships with the package. Each argument can be an environment variable
(a Space has no arguments): OLA_VLM_CHECKPOINT, OLA_VLM_COMPARE, OLA_VLM_RECIPE, OLA_VLM_UNCLIP, OLA_VLM_CODE. Gradio
has its own: GRADIO_SERVER_NAME, GRADIO_SERVER_PORT.

This is the one file that a Space on the Hub runs; the rest of the room comes with the installed package, and so its
imports are absolute.
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

# Before Gradio and torch: see there.
import ola_vlm.space

# isort: split
import gradio as gr
from huggingface_hub import constants

from ola_vlm.commands.parsing import Parser
from ola_vlm.files.escapes import log_to_terminal, one_line
from ola_vlm.inference.chat import Chat
from ola_vlm.probing.features import find_teachers
from ola_vlm.probing.pictures import LayerViewer
from ola_vlm.recipes.miniature import WEIGHTS
from ola_vlm.space import limits
from ola_vlm.space.examples import make_examples, render_scenes
from ola_vlm.space.layout import build
from ola_vlm.space.links import code_address, make_links

ARGUMENTS = {
    "checkpoint": "a folder or a name on the Hub",
    "compare": "others, to be asked beside it; several with spaces between them",
    "recipe": "whose teachers the layers' predictions are shown beside (default: those of the checkpoints' runs)",
    "unclip": "pipeline that makes images of gen embeddings: stabilityai/stable-diffusion-2-1-unclip",
    "code": "address of the code, for the page's links (default: the repository that it was installed from, if any)",
}
MINIATURE = """\
**This is its miniature**, trained on two CPU cores. *words*, whose projector learned to say what teachers see in the
language model's own words, answers 86 of 100 questions like the examples, LLaVA, trained beside it, as many with this
seed, OLA-VLM 76 (guessing: 44), and all three nonsense to all else."""
# The miniature's: the first is asked, the others beside it on demand.
MODELS = ("words", "llava", "ola_vlm")
# Cards on the page; of the miniature's scenes after them, the nearest shows what a gen embedding means.
EXAMPLES = 4
SCENES = 200
PACKAGE = Path(ola_vlm.space.__file__).parents[1]
# What a checkpoint may be that can't be shown: not there, damaged, or in need of a package that isn't installed.
MISTAKES = (OSError, ValueError, ImportError)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser("app.py", __doc__, start="python")
    for name, text in ARGUMENTS.items():
        variable = f"OLA_VLM_{name.upper()}"
        default = os.environ.get(variable)
        options: dict = {"default": default}
        if name == "compare":
            # A variable is one text, in which several checkpoints stand with spaces between them.
            options = {"nargs": "*", "default": (default or "").split()}
        parser.add_argument(f"--{name}", help=f"{text} (or {variable})", **options)
    return parser.parse_args(argv)


def titles_of(checkpoints: Sequence[str]) -> dict[str, str]:
    """Title -> checkpoint: its folder's name, with a number where several are called the same."""
    titles: dict[str, str] = {}
    for number, checkpoint in enumerate(checkpoints, start=1):
        title = Path(checkpoint).name
        if title in titles:
            title += f" ({number})"
        titles[title] = checkpoint
    return titles


def reason_for_visitors(error: Exception, checkpoints: Iterable[str]) -> str:
    """What the page says of an error: where any of the checkpoints lies is no visitor's business."""
    reason = str(error)
    # What is fetched from the Hub lies there.
    names = {f"{constants.HF_HUB_CACHE}/": ""}
    for checkpoint in checkpoints:
        # As it was given, and as a path says it: without a slash at its end or "./" before it, from the root on.
        places = (checkpoint, str(Path(checkpoint)), str(Path(checkpoint).resolve()))
        names.update(dict.fromkeys(places, Path(checkpoint).name))
    # The longest first: one's place may be the beginning of another's.
    for place in sorted(names, key=len, reverse=True):
        reason = reason.replace(place, names[place])
    return reason


def launch(page: gr.Blocks, **options):
    """`options`: of Gradio's `launch`. Files are served from the upload folder only; nothing is recorded."""
    system = ["system-ui", "-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
    monospace = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    theme = gr.themes.Soft(font=system, font_mono=monospace)  # pyright: ignore[reportPrivateImportUsage] (documented, though not in __all__)
    return page.launch(
        theme=theme,
        css_paths=PACKAGE / "space" / "page.css",
        max_file_size=limits.MAX_FILE_SIZE,
        # The folder of this file, and the package's.
        blocked_paths=[str(Path(__file__).parent), str(PACKAGE)],
        run_history=False,
        state_session_capacity=limits.SESSIONS_KEPT,
        footer_links=[],
        ssr_mode=False,
        **options,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    log_to_terminal()
    is_miniature = args.checkpoint is None
    # What is shown: the miniature and what is compared with it, or the checkpoint that was named.
    if is_miniature:
        first, *others = [str(WEIGHTS / method) for method in MODELS]
        others = args.compare or others
        recipe = args.recipe or "miniature_pretrain"
        about = MINIATURE
    else:
        first = args.checkpoint
        others = args.compare
        recipe = args.recipe
        about = f"Here you talk to {escape(Path(first).name)}."
    checkpoints = titles_of([first, *others])
    try:
        # All models, before the page: a visitor never waits for one to be read.
        chats = {title: Chat.load(checkpoint) for title, checkpoint in checkpoints.items()}
    except MISTAKES as error:
        raise SystemExit(one_line(f"app.py: {error}")) from error

    scenes, images = render_scenes(EXAMPLES + SCENES if is_miniature else EXAMPLES)
    asked = next(iter(chats.values()))
    # title -> viewer, or why there is none
    viewers_of_others: dict[str, LayerViewer | str] = {}
    try:
        # The layers' pictures. Without them one can still chat, and the page says why there are none.
        run = find_teachers(recipe, *checkpoints.values())
        images_for_gen = images[EXAMPLES:] if is_miniature else None
        options = {"images_for_gen": images_for_gen, "unclip": args.unclip}
        viewer = LayerViewer.load(first, asked.model, asked.processor, run, **options)
    except MISTAKES as error:
        viewer = reason_for_visitors(error, checkpoints.values())
    else:
        for title, chat in chats.items():
            if chat is asked:
                continue
            checkpoint = checkpoints[title]
            try:
                other = LayerViewer.load(checkpoint, chat.model, chat.processor, run, like=viewer)
            except MISTAKES as error:
                # The whole reason is for the log.
                print(one_line(f"app.py: the layers of {checkpoint} can't be compared: {error}"))
                other = reason_for_visitors(error, checkpoints.values())
            viewers_of_others[title] = other

    links = make_links(args.checkpoint, args.code or code_address())
    # The examples' files must be there as long as the page is: `launch` returns when it ends.
    with tempfile.TemporaryDirectory() as folder:
        examples = make_examples(scenes[:EXAMPLES], images[:EXAMPLES], Path(folder), own_words=is_miniature)
        page = build(chats, examples, about, viewer, links, viewers_of_others)
        launch(page)


if __name__ == "__main__":
    main()
