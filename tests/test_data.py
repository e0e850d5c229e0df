"""Rows and collator: what is supervised, which image goes where, and whose target it gets."""

import copy
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_image, random_rows, tiny_tasks
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from training_helpers import llava_sample
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from ola_vlm.convert.parts import build_processor
from ola_vlm.recipes.paper import CHAT_TEMPLATES
from ola_vlm.targets.cache import image_key
from ola_vlm.targets.encoders import ClipImageEncoder, open_image
from ola_vlm.training.collator import IGNORE_INDEX, OlaVlmCollator
from ola_vlm.training.rows import BadRow, Rows, read_row
from ola_vlm.training.sampler import GroupedSampler

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 32}


def fingerprint_target(task):
    """A target source whose (Q, E) target says which image it was made from."""

    def source(images):
        pixels = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])
        return (pixels.float().mean(1) + pixels[:, 0])[:, None, None].expand(
            -1, task["target_length"], task["target_dim"]
        )

    return source


@pytest.fixture(scope="module")
def processor(make_model):
    return make_model()[1]


@pytest.fixture(scope="module")
def collator(processor):
    tasks = tiny_tasks()
    return OlaVlmCollator(processor, {task["name"]: fingerprint_target(task) for task in tasks}, tasks)


def conversation(turns, image=True):
    messages = []
    for i in range(turns):
        content = [{"type": "image"}] if image and i == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": " what is this ?"}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": "the red cube"}]})
    return messages


def test_a_loaders_workers_get_no_teacher(processor):
    """Its targets are computed here, where its GPU is; a worker that is started anew would get a copy of it."""
    task = tiny_tasks()[0]
    # A function within a function: there is no copy of it.
    sources = {task["name"]: fingerprint_target(task)}
    later = OlaVlmCollator(processor, sources, [task], targets_later=True)
    rows = random_rows(4)
    (batch,) = DataLoader(rows, 4, num_workers=1, collate_fn=later, multiprocessing_context="spawn")
    assert batch["input_ids"].equal(later(rows)["input_ids"]) and "targets" not in batch
    # Here they are all there.
    assert len(later.add_targets(batch)["targets"][task["name"]]) == len(batch["pixel_values"]) > 0


def test_ids_are_those_of_the_processor(collator, processor):
    for row in random_rows(4, images=[1, 0, 2, 1]):
        batch = collator([row])
        content = iter(row["images"])
        messages = [
            {**m, "content": [{**c, "image": next(content)} if c["type"] == "image" else c for c in m["content"]]}
            for m in row["messages"]
        ]
        expected = processor.apply_chat_template(
            [messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"return_tensors": "pt"},
        )
        assert batch["input_ids"].equal(torch.as_tensor(expected["input_ids"]))
        supervised = torch.as_tensor(expected["assistant_masks"]).bool()
        assert batch["labels"].equal(batch["input_ids"].where(supervised, -100))
        if row["images"]:
            assert batch["pixel_values"].equal(expected["pixel_values"])


def test_every_answer_is_supervised_with_its_end_of_turn(collator, processor):
    batch = collator([{"id": "x", "images": [random_image(0)], "messages": conversation(3)}])
    labels = batch["labels"][batch["labels"] != -100]
    assert processor.tokenizer.convert_ids_to_tokens(labels.tolist()) == ["the", "red", "cube", "</s>"] * 3


def test_batch_is_padded_on_the_right_and_padding_is_not_attended_to(collator, processor):
    batch = collator(random_rows(3, images=[1, 0, 2]))
    for i, row in enumerate(random_rows(3, images=[1, 0, 2])):
        alone = collator([row])
        length = alone["input_ids"].shape[1]
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert batch["input_ids"][i, :length].equal(alone["input_ids"][0])
        assert (batch["input_ids"][i, length:] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][i, length:] == -100).all()


def test_targets_belong_to_their_images(collator):
    # Fails for targets of another sample, a shuffled order, or images and targets in different orders.
    rows = random_rows(4, images=[1, 0, 2, 1])
    batch = collator(rows)
    images = [image for row in rows for image in row["images"]]
    for task in tiny_tasks():
        own = fingerprint_target(task)(images)
        assert batch["targets"][task["name"]].equal(own) and len(own[:, 0, 0].unique()) == 4
    for i, image in enumerate(images):
        assert batch["pixel_values"][i].equal(collator._pixel_values([image])[0])
    assert batch["row_ids"] == [row["id"] for row in rows]


def test_batch_without_images_has_zero_rows(collator):
    batch = collator(random_rows(2, images=0))
    assert batch["pixel_values"].shape == (0, 3, 32, 32)
    assert {name: tuple(target.shape) for name, target in batch["targets"].items()} == {
        "gen": (0, 1, 12),
        "depth": (0, 16, 10),
        "seg": (0, 16, 14),
    }


def test_targets_of_the_wrong_shape_are_refused(processor):
    tasks = tiny_tasks()
    collator = OlaVlmCollator(processor, {"depth": lambda images: torch.zeros(len(images), 9, 10)}, tasks)
    with pytest.raises(ValueError, match=r"'depth'.*\(1, 9, 10\).*\(1, 16, 10\).*target_length"):
        collator(random_rows(1))


def test_row_errors_name_the_row(collator):
    row = {"id": "lonely", "images": [random_image(0)], "messages": conversation(1)[:1]}
    with pytest.raises(ValueError, match=r"lonely.*supervised"):
        collator([row])


def test_tokenizer_without_padding_is_refused(processor):
    bare = copy.copy(processor)
    bare.tokenizer = copy.deepcopy(processor.tokenizer)
    bare.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad_token"):
        OlaVlmCollator(bare)


def picture_files(folder):
    """Image files that a plain conversion to RGB would spoil."""
    color, seen = random_image(0), random_image(1, (32, 32)).convert("L")
    rgba, gray = color.copy(), color.convert("L")
    rgba.putalpha(seen)
    gray.putalpha(seen)
    palette = color.quantize(16)
    palette.save(folder / "palette.png", transparency=3)
    rgba.save(folder / "rgba.png")
    gray.save(folder / "la.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    random_image(2, (32, 16)).save(folder / "rotated.png", exif=exif)
    return {name: folder / f"{name}.png" for name in ("rgba", "la", "palette", "rotated")}


@pytest.mark.parametrize("name", ["rgba", "la", "palette", "rotated"])
def test_training_sees_the_picture_of_inference(collator, processor, tmp_path, name):
    """Student in training, student at inference, teachers and their cache: whether they get the file or its image."""
    path = picture_files(tmp_path)[name]
    # transformers loads files upright, and puts transparent images on white
    source = str(path) if name == "rotated" else Image.open(path)
    expected = processor(text="<image>", images=[source], return_tensors="pt")["pixel_values"]
    encoder = ClipImageEncoder(CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY)), 8, 32, 1, [0.5] * 3, [0.5] * 3)
    right, naive = open_image(path), Image.open(path).convert("RGB")
    naive.info.clear()  # PIL remembers a palette's transparent color
    for image in (path, Image.open(path)):
        batch = collator([{"id": "x", "images": [image], "messages": conversation(1)}])
        assert batch["pixel_values"].equal(expected)
        assert encoder.pixel_values([image]).equal(encoder.pixel_values([right]))
        assert image_key(image) == image_key(right) != image_key(naive)
    assert not collator._pixel_values([naive]).equal(expected)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8), 1000).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=r"deep\.tiff.*convert it to 8 bits first"):
        open_image(tmp_path / "deep.tiff")


def test_images_become_rgb():
    assert open_image(random_image(0).convert("L")).mode == "RGB"
    assert open_image(random_image(0)).tobytes() == random_image(0).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2), (3, 3), (640, 480)])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_images_of_any_mode_and_size(collator, size, mode):
    image = random_image(0, size).convert("RGBA" if mode == "P" else "RGB").convert(mode)
    batch = collator([{"id": "x", "images": [image], "messages": conversation(1)}])
    assert batch["pixel_values"].shape == (1, 3, 32, 32) and batch["pixel_values"].isfinite().all()


# Truncation


def test_truncation_never_cuts_an_image_span(processor):
    """Whatever the limit: the row's beginning, whole images only, something to learn; else it's a bad row."""
    row = {"id": "x", "images": [random_image(i) for i in range(2)], "messages": conversation(2)}
    row["messages"][2]["content"].insert(0, {"type": "image"})
    tasks = tiny_tasks()
    sources = {task["name"]: fingerprint_target(task) for task in tasks}
    whole = OlaVlmCollator(processor)([row])
    ids, labels = whole["input_ids"][0], whole["labels"][0]
    span = 16 + len(processor.task_tokens)
    starts = [
        i for i in range(len(ids)) if ids[i] == processor.image_token_id and ids[i - 1] != processor.image_token_id
    ]
    assert len(starts) == 2
    seen = set()
    for limit in range(1, len(ids) + 2):
        collate = OlaVlmCollator(processor, sources, tasks, max_length=limit, truncate=True)
        end = next((start for start in starts if start < limit < start + span), limit)  # never within a span
        if (labels[:end] == -100).all():
            with pytest.raises(BadRow, match=f"x: no supervised token within max_length={limit}"):
                collate([row])
            continue
        batch = collate([row])
        assert batch["input_ids"][0].equal(ids[:end]) and batch["labels"][0].equal(labels[:end])
        images = sum(start < end for start in starts)
        assert batch["pixel_values"].equal(whole["pixel_values"][:images])
        assert len(batch["targets"]["seg"]) == images
        seen.add(images)
    assert seen == {1, 2}


def test_a_row_of_max_length_stays_and_a_longer_one_is_bad(processor):
    row = {"id": "x", "images": [], "messages": conversation(1, image=False)}
    length = OlaVlmCollator(processor)([row])["input_ids"].shape[1]
    assert OlaVlmCollator(processor, max_length=length)([row])["input_ids"].shape[1] == length
    with pytest.raises(BadRow, match=f"row x: {length} tokens, more than max_length={length - 1}"):
        OlaVlmCollator(processor, max_length=length - 1)([row])


# Bad rows


def test_bad_rows_are_left_out_and_named(processor, tmp_path):
    tasks = tiny_tasks()
    rows = random_rows(6, images=[1, 0, 2, 1, 1, 0])
    poisoned, gone = (rows[i]["images"][0].tobytes() for i in (2, 3))
    own = fingerprint_target(tasks[1])

    def source(images):
        contents = [image.tobytes() for image in images]
        if gone in contents:
            raise KeyError("not in the cache")
        targets = own(images).clone()
        targets[[content == poisoned for content in contents], 3, 2] = math.nan
        return targets

    (tmp_path / "damaged.png").write_bytes(b"damaged")
    rows[4]["images"] = [str(tmp_path / "damaged.png")]
    rows[5]["messages"] = rows[5]["messages"][:1]
    rows.append({"id": "row-6", "bad_row": BadRow("malformed", "no form")})
    sources = {"depth": source}
    batch = OlaVlmCollator(processor, sources, tasks, drop_bad_rows=True)(rows)
    fine = OlaVlmCollator(processor, sources, tasks)(rows[:2])
    assert batch["row_ids"] == ["row-0", "row-1"]
    for name in ("input_ids", "labels", "attention_mask", "pixel_values"):
        assert batch[name].equal(fine[name])
    assert batch["targets"]["depth"].equal(fine["targets"]["depth"])
    problems = {named.split(":")[0].removeprefix("row row-"): named.split(": ", 1)[1] for named in batch["bad_rows"]}
    assert sorted(problems) == ["2", "3", "4", "5", "6"]
    for place, said in {
        "2": "not finite",
        "3": "not in the cache",
        "4": "damaged.png",
        "5": "no answer",
        "6": "form",
    }.items():
        assert said in problems[place]
    with pytest.raises(KeyError, match="cache"):
        OlaVlmCollator(processor, sources, tasks)(rows[3:4])


def test_a_passing_error_of_a_target_loses_no_row(processor):
    tasks, calls = tiny_tasks(), []
    own = fingerprint_target(tasks[1])

    def source(images):
        calls.append(len(images))
        if len(calls) == 1:
            raise OSError("a stale file handle")
        return own(images)

    rows = random_rows(3, images=[1, 0, 2])
    batch = OlaVlmCollator(processor, {"depth": source}, tasks, drop_bad_rows=True)(rows)
    assert batch["bad_rows"] == [] and len(calls) > 1
    assert batch["targets"]["depth"].equal(own([image for row in rows for image in row["images"]]))


def test_rows_that_are_too_long_are_no_bad_rows(processor):
    rows = random_rows(2, images=0)
    rows[1]["messages"] = rows[1]["messages"] * 9
    limit = len(OlaVlmCollator(processor).encode(rows[0]).ids)
    batch = OlaVlmCollator(processor, max_length=limit, drop_bad_rows=True)(rows)
    assert batch["row_ids"] == ["row-0"] and batch["bad_rows"] == [] and "row row-1: " in batch["long_rows"][0]


def test_targets_later_are_the_same_targets(processor):
    tasks, rows = tiny_tasks(), random_rows(4, images=[1, 0, 2, 1])
    own, poisoned = fingerprint_target(tasks[1]), rows[2]["images"][1].tobytes()

    def source(images):
        targets = own(images).clone()
        targets[[image.tobytes() == poisoned for image in images]] = math.nan
        return targets

    options = {"target_sources": {"depth": source}, "tasks": tasks, "drop_bad_rows": True}
    later = OlaVlmCollator(processor, targets_later=True, **options)
    batch, expected = later(rows), OlaVlmCollator(processor, **options)(rows)
    assert "targets" not in batch and batch["row_ids"] == [row["id"] for row in rows]
    batch = later.add_targets(batch)
    assert batch.keys() == expected.keys() and batch["bad_rows"] == expected["bad_rows"] != []
    assert batch["row_ids"] == expected["row_ids"] and batch["pixel_values"].equal(expected["pixel_values"])
    assert batch["targets"]["depth"].equal(expected["targets"]["depth"])


@pytest.mark.parametrize(
    ("question", "answer", "marked"),
    [
        ("what is <gen_0> ?", "the cube", True),
        ("<im<image>age> what ?", "the cube", True),
        ("what ?", "the <gen_0>", True),
        ("what ?", "red \ud83d", True),
        ("what ?", [], False),
        ("what ?", "a \ufdd0 b", False),  # our mark
    ],
)
def test_texts_that_would_stop_a_run_are_bad_rows(make_model, answer, question, marked):
    processor = make_model()[1]
    if not marked:
        processor.chat_template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", processor.chat_template)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = read_row({"images": [random_image(0)] * question.count("<image>"), "messages": turns}, 0, ".")
    with pytest.raises(BadRow) as error:
        OlaVlmCollator(processor).check_text(row)
    assert error.value.kind == "malformed"


def test_half_a_character_is_named(collator):
    turns = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "the \ud83d cube"}]
    with pytest.raises(BadRow, match=r"a text has half a character, '\\ud83d': write it as UTF-8"):
        collator.check_text(read_row({"messages": turns}, 0, "."))


def test_a_batch_that_lost_all_rows_has_no_image_and_nothing_to_learn(processor):
    tasks = tiny_tasks()
    sources = {task["name"]: fingerprint_target(task) for task in tasks}
    bad = [{"id": i, "bad_row": BadRow("missing", "gone")} for i in range(2)]
    batch = OlaVlmCollator(processor, sources, tasks, drop_bad_rows=True)(bad)
    assert batch["row_ids"] == [] and batch["bad_rows"] == ["row 0: gone", "row 1: gone"]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 2) and (batch["labels"] == -100).all()
    assert batch["pixel_values"].shape == (0, 3, 32, 32) and batch["targets"]["depth"].shape == (0, 16, 10)


# Labels come from the chat template, whichever it is

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]
SPECIAL += ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<s>", "</s>"]
CHATML = (  # the form of Qwen2.5's and SmolLM2's
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {  # name -> template, end-of-sequence token, what is supervised of the answer "It is."
    "chatml": (CHATML, "<|im_end|>", "It is.<|im_end|>"),
    "phi3": (  # ends with a token that a chat that goes on doesn't have
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}",
        "<|endoftext|>",
        "It is.<|end|>",
    ),
    "llama2": (  # no prompt, answers are stripped
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "It is. </s>",
    ),
    "parts": (  # takes content parts, no special tokens at all: an end of turn is added
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "</s>",
        "It is.</s>",
    ),
}


def byte_tokenizer(eos="</s>"):
    """A tokenizer whose tokens are single characters and special tokens, so that ids can be read."""
    characters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=characters, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


def byte_processor(template, eos="</s>"):
    tower = SimpleNamespace(image_size=32, patch_size=8)
    return build_processor(byte_tokenizer(eos), tower, tiny_tasks(), chat_template=template)


def supervised_spans(collator, row):
    """The runs of supervised tokens, and the whole row, as text; images are <image>."""
    encoded, tokenizer = collator.encode(row), collator.processor.tokenizer
    text = tokenizer.decode(encoded.ids).replace(tokenizer.decode(collator.image_ids), "<image>")
    supervised = np.flatnonzero(encoded.labels != -100)
    runs = np.split(supervised, np.flatnonzero(np.diff(supervised) > 1) + 1)
    assert (encoded.labels[supervised] == encoded.ids[supervised]).all()
    return [tokenizer.decode(encoded.ids[run]) for run in runs], text


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_templates_without_marks(name, tmp_path):
    template, eos, expected = TEMPLATES[name]
    processor = byte_processor(template, eos)
    turns = llava_sample(0, value="Is it?\n<image>")["conversations"] + llava_sample(0, image=None)["conversations"]
    for turn in turns[1::2]:
        turn["value"] = "It is."
    (tmp_path / "a.png").touch()
    row = Rows([{"image": "a.png", "conversations": turns}], tmp_path)[0]
    spans, text = supervised_spans(OlaVlmCollator(processor), row)
    assert spans == [expected] * 2
    # What is rendered is what the model's own template makes of strings (or parts), images before their question.
    flat = [{"role": "user", "content": "<image>\nIs it?"}, {"role": "assistant", "content": "It is."}]
    flat += [{"role": "user", "content": "what is this ?"}, flat[1]]
    if name != "parts":
        (own,), _ = render_jinja_template([flat], chat_template=template, **processor.tokenizer.special_tokens_map)
        assert text == own
        (ours,), _ = render_jinja_template(
            [flat], chat_template=processor.chat_template, **processor.tokenizer.special_tokens_map
        )
        assert ours == own  # strings are still taken
    # Training sees what inference sees.
    row["messages"][0]["content"][0]["image"] = random_image(0)
    ids = processor.apply_chat_template([row["messages"]], tokenize=True, return_dict=True)["input_ids"][0]
    assert list(ids) == OlaVlmCollator(processor).encode(row).ids.tolist()


def test_marks_and_no_marks_agree(processor):
    """The same template with its {% generation %} marks and without."""
    bare = copy.copy(processor)
    bare.chat_template = re.sub(r"\{% (end)?generation %\}", "", processor.chat_template)
    assert bare.chat_template != processor.chat_template
    for row in [*random_rows(6, images=[1, 0, 2, 1, 0, 3]), {"id": "x", "images": [], "messages": conversation(4)}]:
        marked, unmarked = (OlaVlmCollator(p).encode(row) for p in (processor, bare))
        assert marked.ids.tolist() == unmarked.ids.tolist()
        assert marked.labels.tolist() == unmarked.labels.tolist()


def before_the_last_answer(text: str) -> str:
    """A template that writes something before the last answer only, which no prompt has."""
    last = f"('{text}' if loop.last and message['role'] == 'assistant' else '')"
    return CHATML.replace("message['content'] + '<|im_end|>'", f"{last} + message['content'] + '<|im_end|>'")


NUMBERED = CHATML.replace("message['content'] + '<|im_end|>'", "loop.index ~ message['content'] ~ '<|im_end|>'")


def test_an_empty_thinking_block_of_any_template_becomes_part_of_the_prompt():
    processor = byte_processor(before_the_last_answer("<think></think>"))
    collator = OlaVlmCollator(processor)
    for row in random_rows(4, images=[1, 0, 2, 1]):
        encoded = collator.encode(row)
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        written = processor.tokenizer.decode(encoded.ids)
        assert written.count("<think></think>") == len(answers)
        supervised = processor.tokenizer.decode(encoded.ids[encoded.labels != IGNORE_INDEX])
        assert "think" not in supervised and supervised.count("<|im_end|>") == len(answers)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NUMBERED, "is not what stands before the answer"),
        ("{{ messages }}", "changes the answers"),
        (CHATML.replace("message['content'] + ", ""), "must write <image>"),
        (CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}", "mark .or write. 2 answers"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_templates_that_cannot_be_trained_with_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        OlaVlmCollator(byte_processor(template))


def test_no_template_is_refused(processor):
    bare = copy.copy(processor)
    bare.chat_template, bare.tokenizer = None, copy.deepcopy(processor.tokenizer)
    bare.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        OlaVlmCollator(bare)


def test_rows_that_the_template_refuses_are_bad(processor):
    strict = copy.copy(processor)
    raising = "{% if loop.first and message['role'] == 'assistant' %}{{ raise_exception('user first') }}{% endif %}"
    strict.chat_template = re.sub("(in messages %})", rf"\1{raising}", processor.chat_template, count=1)
    row = {"id": "x", "images": [], "messages": conversation(1)[1:]}
    with pytest.raises(BadRow, match="row x: the chat template refuses it: user first"):
        OlaVlmCollator(strict)([row])


GOLDEN = json.loads((Path(__file__).parent / "golden" / "h_prompts.json").read_text())
TURNS = [
    ("What are the colors of the bus in the image?", "The bus in the image is white and red."),
    ("What feature can be seen on the back of the bus?", "The back of the bus features an advertisement."),
    ("Is it day?", "Yes."),
]
CAPTION = "Render a clear and concise summary of the photo."
CONVERSATIONS = {
    "caption": [(CAPTION, "select luxury furniture 3 - inch gel memory foam mattress topper")],
    "instr2": TURNS[:2],
    "instr3": TURNS,
    "textonly": [("Hi, who are you?", "An assistant.")],
}


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_a_system_turn_takes_the_place_of_the_papers(name):
    chat = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *conversation(1)]
    text = render_jinja_template([chat], chat_template=CHAT_TEMPLATES[name], bos_token="")[0][0]
    assert "Be brief." in text and "assistant.<" not in text and "helpful" not in text


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_prompts_and_supervised_spans(name, tmp_path):
    """From LLaVA's JSON to ids and labels. The reference's spans begin with the header's line break, ours don't:
    they are the answer and its end of turn."""
    llm, conversation = name.split(".")
    image = {} if conversation == "textonly" else {"image": "a.png"}
    turns, (first, *_) = [], CONVERSATIONS[conversation]
    for question, answer in CONVERSATIONS[conversation]:
        value = f"{question}\n<image>" if image and question == first[0] else question
        turns += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    random_image(0).save(tmp_path / "a.png")
    row = Rows([image | {"conversations": turns}], tmp_path)[0]
    collator = OlaVlmCollator(byte_processor(CHAT_TEMPLATES[llm]))
    spans, text = supervised_spans(collator, row)
    assert text.removeprefix("<s>") == GOLDEN[name]["prompt"]
    end = "<|eot_id|>" if llm == "llama3" else "<|end|>"
    assert spans == [answer + end for _, answer in CONVERSATIONS[conversation]]
    if llm == "llama3":
        assert spans == [span.removeprefix("\n\n") for span in GOLDEN[name]["supervised_spans"]]
    prompt, _ = collator._render(row["messages"][:1], add_generation_prompt=True)
    assert text.startswith(prompt)


# Batches of alike rows


def test_batches_are_grouped_by_length_and_modality():
    rng = np.random.default_rng(0)
    lengths, has_image = rng.integers(5, 500, 1003), rng.random(1003) < 0.6
    sampler = GroupedSampler(lengths, has_image, batch_size=8, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(1003)) and len(sampler) == 1003
    assert orders[0] == orders[2] != orders[1]
    batches = [orders[0][i : i + 8] for i in range(0, 1003, 8)]
    pure = [batch for batch in batches if len({bool(has_image[i]) for i in batch}) == 1]
    assert len(pure) >= len(batches) - 2  # but for what is left over of both
    spread = np.mean([np.ptp(lengths[batch]) for batch in pure])
    assert spread < 0.2 * np.mean([np.ptp(lengths[i : i + 8]) for i in range(0, 1000, 8)])
    kinds = [bool(has_image[batch[0]]) for batch in pure]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 10  # in random order
    assert sorted(GroupedSampler(lengths[:5], has_image[:5], 8, 0)) == list(range(5))
