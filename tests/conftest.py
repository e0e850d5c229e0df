"""Tiny real parts, models and rows that all tests share."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ola_vlm.convert.parts import build_ola_vlm

torch.set_num_threads(1)

WORDS = "what is this color of the cube sphere red green blue near far a b c d ( ) . ? : one two three left right"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    " assistant : {% generation %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    " {{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant : {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `WORDS` with a chat template that marks what the assistant says."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "system", "assistant", *WORDS.split()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_parts(folder: Path, tied: bool = False) -> SimpleNamespace:
    """Folders with a CLIP tower (32 px, 16 patches, 3 layers) and a Llama with its tokenizer (4 layers, width 32)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8, num_hidden_layers=3))
    tokenizer = make_tokenizer()
    text = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        num_hidden_layers=4,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision.save_pretrained(folder / "vision_tower")
    LlamaForCausalLM(text).save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    return SimpleNamespace(
        folder=folder, vision_tower=str(folder / "vision_tower"), language_model=str(folder / "language_model")
    )


def tiny_tasks() -> list[dict]:
    """The three tasks with 4x4 targets; fresh dicts, to be changed at will."""
    small = {"predictor_heads": 2, "predictor_head_dim": 8}
    return [
        {"name": "gen", "target_length": 1, "target_dim": 12, "num_task_tokens": 2, "layers": [2, 4], **small},
        {"name": "depth", "target_length": 16, "target_dim": 10, "num_task_tokens": 4, "layers": [1, 3], **small},
        {"name": "seg", "target_length": 16, "target_dim": 14, "num_task_tokens": 2, "layers": [2, 3], **small},
    ]


def table_rows(text: str) -> list[dict[str, str]]:
    """The rows of all Markdown tables of a text, as heading -> cell, whatever their widths and order."""
    rows = []
    headings = None
    for line in text.splitlines():
        if not line.startswith("|"):
            headings = None
            continue
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if headings is None:
            headings = cells
        elif not set("".join(cells)) <= set("-: "):
            rows.append(dict(zip(headings, cells, strict=True)))
    return rows


def random_image(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def random_rows(n: int, images: int | list[int] = 1, seed: int = 0) -> list[dict]:
    """`n` rows {"id", "images", "messages"}; `images`: how many each has (an int, or one number a row)."""
    counts = [images] * n if isinstance(images, int) else images
    words, rng = WORDS.split(), np.random.default_rng(seed)
    rows = []
    for i, count in enumerate(counts):
        question = " " + " ".join(rng.choice(words, 2 + i % 3))
        content = [{"type": "image"}] * count + [{"type": "text", "text": question}]
        answer = [{"type": "text", "text": " ".join(rng.choice(words, 1 + i % 4))}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        pictures = [random_image(1000 * seed + 10 * i + k) for k in range(count)]
        rows.append({"id": f"row-{i}", "images": pictures, "messages": messages})
    return rows


def encode(processor, rows: list[dict], padding_side: str = "right", **kwargs) -> dict:
    """The model's inputs for rows with their answers."""
    processor.tokenizer.padding_side = padding_side
    texts = [processor.apply_chat_template(row["messages"]) for row in rows]
    images = [image for row in rows for image in row["images"]]
    return processor(
        text=texts, images=images or None, padding=True, return_tensors="pt", add_special_tokens=False, **kwargs
    )


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory):
    """Nothing asks the Hub, in any process, whatever the environment says; but see `online`. Code that comes with a
    checkpoint is kept where no user's is, and so are the runs of Trackio, which reads it as it is imported."""
    # One folder for all tests of a process: Python looks for a package's modules where it found the package first.
    modules = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_MODULES_CACHE", modules)
        patched.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        patched.setenv("HF_HUB_OFFLINE", "1")
        patched.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture
def online(monkeypatch):
    """For tests that have a Hub of their own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory) -> SimpleNamespace:
    """`.vision_tower` and `.language_model` (with tokenizer): folders with tiny pretrained parts; `.folder` above."""
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def tied_parts(tmp_path_factory) -> SimpleNamespace:
    """The same with tied embeddings."""
    return make_parts(tmp_path_factory.mktemp("tied_parts"), tied=True)


@pytest.fixture(scope="session")
def make_model(tiny_parts):
    """Function (tasks=tiny_tasks(), parts=tiny_parts, **build_ola_vlm's) -> (model, processor), always the same."""

    def make(tasks: list[dict] | None = None, parts: SimpleNamespace = tiny_parts, seed: int = 0, **kwargs):
        torch.manual_seed(seed)
        tasks = tiny_tasks() if tasks is None else tasks
        return build_ola_vlm(parts.vision_tower, parts.language_model, tasks=tasks, **kwargs)

    return make
