"""The processor: placeholders, then task tokens in order; squares padded with the mean color; saved completely."""

import numpy as np
import pytest
import torch
from conftest import encode, make_tokenizer, random_image, random_rows, tiny_tasks
from PIL import Image
from transformers import AutoTokenizer

from ola_vlm.configuration_ola_vlm import task_token_strings
from ola_vlm.processing_ola_vlm import OlaVlmProcessor


def test_sequence_is_image_then_task_tokens_in_order(make_model):
    tasks = tiny_tasks()
    for order in [tasks, tasks[::-1]]:
        model, processor = make_model(tasks=order)
        names = task_token_strings(order)
        assert processor.task_tokens == names and processor.task_token_ids == model.config.task_token_ids
        batch = encode(processor, random_rows(2, [1, 2]))
        for row, images in zip(batch["input_ids"], [1, 2], strict=True):
            tokens = processor.tokenizer.convert_ids_to_tokens(row)
            first = tokens.index("<image>")
            one = ["<image>"] * 16 + names
            assert tokens[first : first + images * len(one)] == one * images
            assert "<image>" not in tokens[first + images * len(one) :]
        assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert names[:2] == ["<seg_0>", "<seg_1>"] and names[-2:] == ["<gen_0>", "<gen_1>"]


def test_tokenizer_without_a_pad_token_pads_with_its_end_token(make_model):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    _, processor = make_model(tokenizer=tokenizer)
    batch = encode(processor, [*random_rows(1, 1), *random_rows(1, 0)])
    assert processor.tokenizer.pad_token == "</s>"
    assert (batch["attention_mask"] == 0).any()


def test_text_alone(make_model):
    _, processor = make_model()
    batch = encode(processor, random_rows(2, 0))
    assert "pixel_values" not in batch
    assert not torch.isin(batch["input_ids"], torch.tensor(processor.task_token_ids)).any()


def test_assistant_mask_survives_the_expansion(make_model):
    _, processor = make_model()
    row = random_rows(1, 2)[0]
    for message in row["messages"]:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = row["images"][0]
    out = processor.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    spoken = out["input_ids"][out["assistant_masks"].bool()]
    answer = row["messages"][1]["content"][0]["text"]
    assert processor.decode(spoken).replace(" ", "") == (answer + "</s>").replace(" ", "")


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_pads_to_a_square_with_the_mean_color_and_never_crops(make_model, size):
    """A marker in the corner of a 3:1 image is seen, in the same cell as in the padded square."""
    _, processor = make_model()
    picture = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    picture[:10, :10] = 0
    pixels = processor.image_processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 32, 32)
    cells = pixels.mean(0).view(4, 8, 4, 8).mean((1, 3))  # the tower's 4x4 patches
    wide = size[0] > size[1]
    dark = pixels.mean(0)[12:13, 1:3] if wide else pixels.mean(0)[1:3, 12:13]
    assert dark.max() < -1  # the marker: top left corner of the strip that holds the picture
    border = cells[0] if wide else cells[:, 0]
    assert border.abs().max() < 0.02  # the mean color is 0 after normalization
    assert (cells[1:3] if wide else cells[:, 1:3]).flatten()[-1] > 1


def test_saved_and_loaded(make_model, tmp_path):
    _, processor = make_model()
    processor.save_pretrained(tmp_path)
    loaded = OlaVlmProcessor.from_pretrained(tmp_path)
    for name in ["task_tokens", "patch_size", "num_additional_image_tokens", "image_token_id", "chat_template"]:
        assert getattr(loaded, name) == getattr(processor, name)
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    rows = random_rows(2, [1, 2])
    ours, theirs = encode(processor, rows), encode(loaded, rows)
    assert ours["input_ids"].equal(theirs["input_ids"]) and ours["pixel_values"].equal(theirs["pixel_values"])


def test_missing_tokens_are_named(make_model):
    _, processor = make_model()
    with pytest.raises(ValueError, match="<gen_0>"):
        OlaVlmProcessor(processor.image_processor, make_tokenizer(), image_token="<unk>", task_tokens=["<gen_0>"])


def test_the_callers_tokenizer_is_not_changed(make_model, tiny_parts):
    tokenizer = AutoTokenizer.from_pretrained(tiny_parts.language_model)
    length = len(tokenizer)
    make_model(tokenizer=tokenizer)
    assert len(tokenizer) == length
    _, processor = make_model()
    assert len(processor.tokenizer) == length + 9
    assert processor(text="<image>", images=random_image(0))["input_ids"]
