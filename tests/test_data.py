"""Rows and collator: what is supervised, which image goes where, and whose target it gets."""

import copy
import json

import pytest
import torch
from conftest import random_image, random_rows, tiny_tasks
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ola_vlm.targets.cache import image_key
from ola_vlm.targets.encoders import ClipImageEncoder, open_image
from ola_vlm.training.data import LlavaRows, OlaVlmCollator

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


def write_llava(folder, samples, images=()):
    for name in images:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(sum(name.encode())).save(path)
    (folder / "data.json").write_text(json.dumps(samples))
    return folder / "data.json"


def sample(i, image="a.png", value="<image>\nwhat is this ?"):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "the cube"}]
    return {"id": str(i), "conversations": turns} | ({"image": image} if image else {})


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


def test_template_without_generation_is_refused(processor):
    bare = copy.copy(processor)
    bare.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match=r"no supervised token.*generation"):
        OlaVlmCollator(bare)(random_rows(1, images=0))


def test_llava_json(tmp_path, collator):
    samples = [
        sample(0, value="what is this ?\n<image>"),
        sample(1, image=None, value="what is this ?"),
        sample(2, image=["a.png", "sub/b.png"], value="<image><image>\nwhat is this ?"),
    ]
    rows = LlavaRows(write_llava(tmp_path, samples, ["a.png", "sub/b.png"]), tmp_path)
    question = {"type": "text", "text": "what is this ?"}
    assert [row["messages"][0]["content"] for row in rows] == [
        [{"type": "image"}, question],  # moved to the front of its turn
        [question],
        [{"type": "image"}, {"type": "image"}, question],
    ]
    assert [len(row["images"]) for row in rows] == [1, 0, 2]
    assert rows[0]["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": "the cube"}]}
    assert [path.removeprefix(f"{tmp_path}/") for path in rows.image_paths()] == ["a.png", "sub/b.png"]
    batch = collator([rows[i] for i in range(3)])
    assert len(batch["pixel_values"]) == 3 and batch["row_ids"] == ["0", "1", "2"]


def test_rows_without_an_id_are_named_by_their_place(tmp_path, collator):
    nameless = {"image": "a.png", "conversations": sample(0)["conversations"]}
    rows = LlavaRows(write_llava(tmp_path, [sample("x"), nameless], ["a.png"]))
    assert collator([rows[0], rows[1]])["row_ids"] == ["x", "1"]
    with pytest.raises(ValueError, match="row 1: 1 <image> placeholders for 0 images"):
        LlavaRows(write_llava(tmp_path, [sample("x"), nameless | {"image": []}]))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (sample("bad", image="../a.png"), "bad.*outside image_folder"),
        (sample("bad", image="/etc/a.png"), "bad.*outside image_folder"),
        (sample("bad", image=None), "bad: 1 <image> placeholders for 0 images"),
        (sample("bad", value="what ?"), "bad: 0 <image> placeholders for 1 images"),
        ({"id": "bad", "conversations": [{"from": "robot", "value": "x"}]}, "bad: unknown speaker 'robot'"),
        ({"id": "bad", "conversations": [{"from": "gpt", "value": "<image>"}]}, "bad: <image> may stand"),
    ],
)
def test_llava_row_errors_name_the_row(tmp_path, broken, message):
    with pytest.raises(ValueError, match=message):
        LlavaRows(write_llava(tmp_path, [sample(0), broken], ["a.png"]), tmp_path)


def test_shuffled_targets_are_always_those_of_another_image(tmp_path, collator):
    names = [f"{i}.png" for i in range(7)]
    rows = LlavaRows(write_llava(tmp_path, [sample(i, name) for i, name in enumerate([*names, "0.png"])], names))
    own = collator([rows[i] for i in range(8)])["targets"]["depth"][:, 0, 0]
    rows.shuffle_targets(seed=1)
    other = collator([rows[i] for i in range(8)])["targets"]["depth"][:, 0, 0]
    assert (own != other).all()  # no image keeps its own
    assert other[0] == other[7]  # fixed: the same image, the same wrong targets
    assert set(other[:7].tolist()) == set(own.tolist())  # a permutation
    again = LlavaRows(tmp_path / "data.json")
    again.shuffle_targets(seed=1)
    assert again.other_image == rows.other_image


def test_rows_longer_than_max_length_are_dropped_with_their_count(tmp_path, collator):
    samples = [sample(0), sample(1, value="<image>\n" + "what is this ? " * 9)]
    rows = LlavaRows(write_llava(tmp_path, samples, ["a.png"]))
    lengths = [len(collator.encode(row)[0]) for row in rows]
    assert lengths == [int(collator([row])["attention_mask"].sum()) for row in rows]
    rows.drop_longer_than(lengths[0], collator)
    assert [row["id"] for row in rows] == ["0"]
    with pytest.raises(ValueError, match=r"all 1 rows.*max_length"):
        rows.drop_longer_than(3, collator)


def picture_files(folder):
    """Image files that a plain conversion to RGB would spoil."""
    colour, seen = random_image(0), random_image(1, (32, 32)).convert("L")
    rgba, grey = colour.copy(), colour.convert("L")
    rgba.putalpha(seen)
    grey.putalpha(seen)
    palette = colour.quantize(16)
    palette.save(folder / "palette.png", transparency=3)
    rgba.save(folder / "rgba.png")
    grey.save(folder / "la.png")
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
    naive.info.clear()  # PIL remembers a palette's transparent colour
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
