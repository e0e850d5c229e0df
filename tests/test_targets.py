"""The target encoders: shapes, the shared square, fingerprints, decoding, and the recorded reference (d, e)."""

import json
import logging
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_rows
from PIL import Image
from safetensors.torch import load_file, save_file
from test_modeling import assert_close
from tiny_teachers import GRID, VISION_MODELS, random_images, save_oneformer, save_tiny_teachers, save_vision
from torch.nn import functional as F
from training_helpers import make_trainer
from transformers import (
    DepthAnythingConfig,
    Dinov2Config,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    TimmWrapperModel,
)

from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.targets.encoders import ENCODERS, DepthAnythingEncoder, Motion, OneFormerEncoder, VisionEncoder
from ola_vlm.targets.fill import Teacher
from ola_vlm.targets.statistics import TargetStatistics
from ola_vlm.train import train
from ola_vlm.training.arguments import OlaVlmArguments

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny_teachers(tmp_path_factory.mktemp("teachers"))


def load(folders, name, **kwargs):
    return ENCODERS[name].from_pretrained(folders[name], grid=1 if name == "clip_image" else GRID, **kwargs)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("depth_anything", (64, 32)), ("oneformer", (64, 64)), ("clip_image", (1, 12)), ("vision", (64, 32))],
)
def test_encode(folders, name, shape):
    encoder = load(folders, name)
    images = random_images(5)
    targets = load(folders, name, batch_size=2).encode(images)
    assert targets.shape == (5, *shape) == (5, encoder.target_length, encoder.target_dim)
    assert targets.dtype == torch.float32 and not targets.requires_grad and targets.isfinite().all()
    assert not torch.allclose(targets[0], targets[1], atol=1e-3)
    torch.testing.assert_close(encoder(images), targets, rtol=1e-4, atol=1e-5)
    assert encoder.encode([]).shape == (0, *shape)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    # A target must be usable in a loss: an inference-mode tensor cannot be saved for backward.
    prediction = torch.zeros(5, *shape, requires_grad=True)
    F.smooth_l1_loss(prediction, targets).backward()
    assert prediction.grad.abs().sum() > 0


def test_encode_is_the_models_own_features(folders):
    images = random_images(2)
    depth = load(folders, "depth_anything")
    maps = depth.model.backbone(depth.pixel_values(images)).feature_maps
    assert len(maps) == 4
    torch.testing.assert_close(depth.encode(images), sum(one[:, 1:] for one in maps) / 4)

    seg = load(folders, "oneformer")
    last = seg.model.model.pixel_level_module.encoder(seg.pixel_values(images)).feature_maps[-1]
    expected = F.interpolate(last, size=(GRID, GRID), mode="bilinear")
    assert last.shape[-2:] == (4, 4)
    torch.testing.assert_close(seg.encode(images)[:, 8 * 3 + 5], expected[:, :, 3, 5])  # row by row


def test_depth_features_by_configuration(folders):
    images = random_images(2)
    mean, last = load(folders, "depth_anything", features="mean"), load(folders, "depth_anything", features="last")
    maps = last.model.backbone(last.pixel_values(images)).feature_maps
    torch.testing.assert_close(last.encode(images), maps[-1][:, 1:])
    assert mean.fingerprint == load(folders, "depth_anything").fingerprint != last.fingerprint
    torch.testing.assert_close(last.decode(mean.encode(images)), mean.decode(mean.encode(images)))
    with pytest.raises(ValueError, match="'first' is unknown"):
        load(folders, "depth_anything", features="first")


def test_batches_reach_the_model_whole(folders, monkeypatch):
    encoder, sizes = load(folders, "vision", batch_size=4), []
    features = encoder._features
    monkeypatch.setattr(encoder, "_features", lambda pixels: sizes.append(len(pixels)) or features(pixels))
    encoder.encode([*random_images(5), *random_images(4, size=(40, 30))])
    assert sizes == [4, 4, 1]


def test_a_teacher_sees_what_its_own_preprocessing_makes(folders, tmp_path):
    """Pixels that stay from 0 to 255, are multiplied by another factor, or are not normalized at all."""
    images = random_images(2)
    usual = load(folders, "vision")
    mean, std = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]
    own = {"image_mean": mean, "image_std": std, "do_normalize": True}
    in_255 = {"image_mean": [255 * value for value in mean], "image_std": [255 * value for value in std]}
    folder = tmp_path / "teacher"
    shutil.copytree(folders["vision"], folder)
    file = folder / "preprocessor_config.json"
    before = json.loads(file.read_text())

    def seen(**changes) -> torch.Tensor:
        file.write_text(json.dumps({**before, **changes}))
        encoder = type(usual).from_pretrained(folder, grid=GRID)
        return encoder.pixel_values(images)

    plain = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 255
    statistics = [torch.tensor(values)[:, None, None] for values in (mean, std)]
    expected = (plain - statistics[0]) / statistics[1]
    for changes in (
        own,
        {**own, "do_rescale": True, "rescale_factor": 0.00392157},
        {**in_255, "do_rescale": False},
        {**in_255, "do_rescale": True, "rescale_factor": 1.0},
    ):
        torch.testing.assert_close(seen(**changes), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(seen(do_normalize=False, image_mean=None, image_std=None), plain, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="turns RGB into BGR"):
        seen(do_flip_channel_order=True)


def test_types_and_devices_by_their_names(folders):
    """As a recipe's JSON gives them."""
    encoder = load(folders, "vision", **json.loads('{"dtype": "bfloat16", "device": "cpu", "batch_size": 2}'))
    assert encoder.model.dtype == torch.bfloat16 and encoder.batch_size == 2
    assert encoder.fingerprint != load(folders, "vision").fingerprint
    assert load(folders, "vision", device="meta").model.device.type == "meta"
    with pytest.raises(ValueError, match="dtype"):
        load(folders, "vision", dtype="bfloat17")


def test_fields_names_of_before_are_understood():
    entry = {"encoder": "depth_anything", "path": "x", "geometry": "reference", "licence": "mit", "motion": True}
    teacher = Teacher({"name": "depth", "target_length": 4, "target_dim": 2}, entry)
    assert teacher.entry == {"encoder": "depth_anything", "path": "x", "resize_mode": "reference", "license": "mit"}


def test_licenses_are_logged(folders, caplog):
    with caplog.at_level(logging.INFO, "ola_vlm"):
        load(folders, "depth_anything", license="CC-BY-NC-4.0")
    (message,) = [record.getMessage() for record in caplog.records if record.name == "ola_vlm.targets.encoders"]
    assert str(folders["depth_anything"]) in message and "CC-BY-NC-4.0" in message


def test_bfloat16(folders):
    exact = load(folders, "depth_anything")
    encoder = load(folders, "depth_anything", dtype=torch.bfloat16)
    targets = encoder.encode(random_images(2))
    assert targets.dtype == torch.float32
    assert F.cosine_similarity(targets, exact.encode(random_images(2)), dim=-1).min() > 0.99
    assert encoder.decode(targets).dtype == torch.float32
    assert encoder.fingerprint != exact.fingerprint


def marked_cell(encode, grid):
    """The (row, column) of the grid cell that changes most when a marker is put in the top right corner of a 3:1
    image, 192 x 64. In the padded square, 192 x 192, the image fills the rows 64 to 128, the marker one cell of 8 x 8.
    """
    plain = np.full((64, 192, 3), 120, dtype=np.uint8)
    marked = plain.copy()
    marked[8:32, -24:] = 255
    before, after = encode([Image.fromarray(plain), Image.fromarray(marked)])
    change = (after - before).abs()
    pixels = change.ndim == 3  # (3, S, S), else (Q, E)
    cells = F.adaptive_avg_pool2d(change.mean(0)[None, None], grid).flatten() if pixels else change.mean(-1)
    return divmod(cells.argmax().item(), grid)


def student_pixels(processor):
    return lambda images: processor.image_processor(images=images, return_tensors="pt")["pixel_values"]


def test_student_and_teachers_see_the_same_square(folders, make_model):
    """Invariant 9."""
    _, processor = make_model()
    expected = (3, 7)
    assert marked_cell(student_pixels(processor), GRID) == expected
    for name in ENCODERS:
        assert marked_cell(load(folders, name).pixel_values, GRID) == expected, name
    for name in ("depth_anything", "vision"):
        assert marked_cell(load(folders, name).encode, GRID) == expected, name
    row, column = marked_cell(load(folders, "oneformer").encode, GRID)  # its own cells are twice as wide
    assert (row // 2, column // 2) == (1, 3)


def test_the_references_geometry(folders, make_model, tmp_path):
    """Teachers stretch, the student crops: a named variant with fingerprints of its own."""
    for name in ENCODERS:
        stretching, padding = load(folders, name, resize_mode="reference"), load(folders, name)
        assert marked_cell(stretching.pixel_values, GRID) == (1, 7), name
        assert stretching.fingerprint != padding.fingerprint
        square = random_images(1)
        torch.testing.assert_close(stretching.encode(square), padding.encode(square))
    _, processor = make_model(resize_mode="reference")
    processor.save_pretrained(tmp_path)
    crop = student_pixels(OlaVlmProcessor.from_pretrained(tmp_path))
    image = random_images(1, size=(96, 32))[0]
    torch.testing.assert_close(crop([image]), crop([image.crop((32, 0, 64, 32))]))
    torch.testing.assert_close(crop([image]), student_pixels(make_model()[1])([image.crop((32, 0, 64, 32))]))
    for build in (make_model, partial(load, folders, "vision")):
        with pytest.raises(ValueError, match="'crop' is unknown"):
            build(resize_mode="crop")


def test_padding_has_the_encoders_mean_color(folders):
    for name in ENCODERS:
        pixels = load(folders, name).pixel_values(random_images(1, size=(96, 32)))
        assert pixels.shape == (1, 3, 64, 64)
        assert pixels[0, :, :10].abs().max() < 2e-2  # a gray level off at most: 1 / 255 / .25
        assert pixels[0, :, 30:34].abs().max() > 0.2


def test_fingerprint(folders, tmp_path):
    encoder = load(folders, "oneformer")
    assert encoder.fingerprint.startswith("oneformer-grid8-")
    shutil.copytree(folders["oneformer"], tmp_path / "moved")
    assert OneFormerEncoder.from_pretrained(tmp_path / "moved", grid=GRID).fingerprint == encoder.fingerprint
    assert OneFormerEncoder.from_pretrained(tmp_path / "moved", grid=4).fingerprint != encoder.fingerprint

    values = json.loads((tmp_path / "moved" / "preprocessor_config.json").read_text())
    (tmp_path / "moved" / "preprocessor_config.json").write_text(json.dumps(values | {"image_mean": [0.4] * 3}))
    assert OneFormerEncoder.from_pretrained(tmp_path / "moved", grid=GRID).fingerprint != encoder.fingerprint

    assert load(folders, "oneformer", batch_size=1).fingerprint == encoder.fingerprint
    other = load(folders, "oneformer")
    with torch.no_grad():
        other.model.get_parameter("model.pixel_level_module.encoder.swin.embeddings.norm.bias")[0] += 1e-3
    assert other.fingerprint != encoder.fingerprint


def test_decode_depth(folders):
    encoder = load(folders, "depth_anything")
    images = random_images(3)
    with torch.no_grad():  # an untrained head is so faint that its last ReLU may hide it
        encoder.model.head.conv3.weight.mul_(1e5)  # else depths differ by less than their roundings
        encoder.model.head.conv3.bias.fill_(1)
    # With one feature four times, decoding equals the teacher itself if its four maps are that feature.
    features = encoder.encode(images)
    tokens = torch.cat([torch.randn(3, 1, 32), features], dim=1)  # the class token plays no part
    expected = encoder.model.head(encoder.model.neck([tokens] * 4, GRID, GRID), GRID, GRID)
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    depth = encoder.decode(features, batch_size=2)
    torch.testing.assert_close(depth, (expected - low) / (high - low), rtol=1e-4, atol=1e-4)
    assert depth.shape == (3, 64, 64)
    torch.testing.assert_close(depth.amin((1, 2)), torch.zeros(3))
    torch.testing.assert_close(depth.amax((1, 2)), torch.ones(3))
    assert encoder.decode(features[:0]).shape == (0, 64, 64)
    own = encoder.model(encoder.pixel_values(images)).predicted_depth  # of its four maps, which differ
    low, high = own.amin((1, 2), keepdim=True), own.amax((1, 2), keepdim=True)
    teachers = encoder.decode(None, images, batch_size=2)
    torch.testing.assert_close(teachers, (own - low) / (high - low), rtol=1e-4, atol=1e-4)
    assert (teachers - depth).abs().max() > 0.01
    # A metric model predicts a distance: the same numbers are drawn the other way round.
    encoder.model.config.depth_estimation_type = "metric"
    torch.testing.assert_close(encoder.decode(features, batch_size=2), 1 - depth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.decode(None, images, batch_size=2), 1 - teachers, rtol=1e-4, atol=1e-4)


def test_decode_segmentation(folders):
    encoder = load(folders, "oneformer")
    assert encoder.task_inputs == [2, 3, 4, 5, 0, 0, 0]  # the / task / is / semantic
    torch.manual_seed(0)
    with torch.no_grad():  # an untrained decoder says the same everywhere
        for parameter in encoder.model.model.transformer_module.parameters():
            if parameter.ndim > 1:
                parameter.normal_()
    images = random_images(3)
    own = encoder.decode(None, images)
    assert own.shape == (3, 64, 64) and own.dtype == torch.int64 and own.max() < 5
    assert len(own.unique()) > 1
    # The teacher's own map is what the whole model says.
    plain = OneFormerForUniversalSegmentation.from_pretrained(folders["oneformer"], is_training=False).eval()
    plain.load_state_dict(encoder.model.state_dict())
    with torch.no_grad():
        output = plain(encoder.pixel_values(images), task_inputs=torch.tensor([encoder.task_inputs] * 3))
    classes, masks = output.class_queries_logits.softmax(-1)[..., :-1], output.masks_queries_logits.sigmoid()
    scores = F.interpolate(torch.einsum("nqc,nqhw->nchw", classes, masks), size=(64, 64), mode="bilinear")
    assert (scores.argmax(1) == own).float().mean() > 0.999

    # The features replace the last stage: at its own size, its own features change nothing; others do.
    same = load(folders, "oneformer")
    same.grid, same.model = 4, encoder.model
    assert (same.decode(same.encode(images), images) == own).float().mean() > 0.999
    torch.manual_seed(1)
    assert (encoder.decode(torch.randn(3, 64, 64) * 5, images) != own).any()


def test_decoding_a_segmentation_needs_images_and_words(folders, tmp_path):
    with pytest.raises(TypeError, match="'images'"):
        load(folders, "oneformer").decode(torch.zeros(1, 64, 64))
    torch.manual_seed(0)
    save_oneformer(tmp_path, tokenizer=False)
    without = OneFormerEncoder.from_pretrained(tmp_path, grid=GRID)
    assert without.encode(random_images(1)).shape == (1, 64, 64)
    with pytest.raises(ValueError, match="save a tokenizer"):
        without.decode(torch.zeros(1, 64, 64), random_images(1))
    given = OneFormerEncoder.from_pretrained(tmp_path, grid=GRID, task_inputs=[2, 3, 4, 5, 0, 0, 0])
    assert given.decode(None, random_images(1)).shape == (1, 64, 64)


def test_wrong_values(folders, tmp_path):
    assert ENCODERS["clip_image"].from_pretrained(folders["clip_image"], grid=8).target_length == 1
    shutil.copytree(folders["clip_image"], tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="image_mean"):
        ENCODERS["clip_image"].from_pretrained(tmp_path / "clip")
    with pytest.raises(RuntimeError, match="multiply up"):
        load(folders, "oneformer").decode(torch.zeros(1, 60, 64), random_images(1))


def test_a_checkpoint_without_all_weights_is_refused(folders, tmp_path):
    shutil.copytree(folders["clip_image"], tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights = {name: value for name, value in weights.items() if "visual_projection" not in name}
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for CLIPVisionModelWithProjection's visual_projection\.weight"):
        ENCODERS["clip_image"].from_pretrained(tmp_path / "clip")
    lenient = ENCODERS["clip_image"].from_pretrained(tmp_path / "clip", unused=["visual_projection."])
    assert lenient.encode(random_images(1)).abs().max() == 0


def test_the_image_encoder_of_a_diffusers_folder(folders, tmp_path):
    shutil.copytree(folders["clip_image"], tmp_path / "image_encoder")
    (tmp_path / "feature_extractor").mkdir()
    shutil.move(tmp_path / "image_encoder" / "preprocessor_config.json", tmp_path / "feature_extractor")
    encoder = ENCODERS["clip_image"].from_pretrained(tmp_path, subfolder="image_encoder")
    assert encoder.fingerprint == load(folders, "clip_image").fingerprint
    torch.testing.assert_close(encoder.encode(random_images(2)), load(folders, "clip_image").encode(random_images(2)))


# ---- any other vision encoder ---------------------------------------------------------------------------------------

STRIDE = {"dinov3_convnext": 32, "timm_convnext": 32}  # of the others: 8 pixels, a cell of the grid


@pytest.fixture(scope="module", params=VISION_MODELS)
def vision(request, tmp_path_factory):
    """(kind, folder) of each."""
    if request.param.startswith("timm"):
        pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp(request.param)
    save_vision(folder, request.param)
    return request.param, folder


def own_patches(kind, model, pixels):
    """(N, patches, E), written out for each kind."""
    prefix = {"siglip": 0, "dinov2_registers": 5, "dinov3": 5}.get(kind, 1)
    if isinstance(model, TimmWrapperModel):
        states = model.timm_model.forward_features(pixels)
        return states.flatten(2).transpose(1, 2) if kind == "timm_convnext" else states[:, 5:]
    return model(pixels).last_hidden_state[:, prefix:]


def test_any_vision_encoder(vision):
    kind, folder = vision
    encoder, images = VisionEncoder.from_pretrained(folder, grid=GRID), random_images(3)
    targets = encoder.encode(images)
    assert targets.shape == (3, GRID**2, 32) == (3, encoder.target_length, encoder.target_dim)
    side = 64 // STRIDE.get(kind, 8)
    with torch.no_grad():
        own = own_patches(kind, encoder.model, encoder.pixel_values(images))
    assert own.shape == (3, side**2, 32)
    maps = own.transpose(1, 2).unflatten(2, (side, side))
    for grid in (GRID, 4):
        expected = F.interpolate(maps, size=(grid, grid), mode="bilinear").flatten(2).transpose(1, 2)
        torch.testing.assert_close(VisionEncoder.from_pretrained(folder, grid=grid).encode(images), expected)
    # The whole checkpoint was read, by the same name each time.
    assert VisionEncoder.from_pretrained(folder, grid=GRID).fingerprint == encoder.fingerprint
    assert encoder.view["mean"] == [0.55] * 3 and encoder.size == 64

    row, column = marked_cell(encoder.encode, GRID)
    coarse = GRID // side
    assert (row // coarse, column // coarse) == (3 // coarse, 7 // coarse)


def test_pooled_vector(vision):
    kind, folder = vision
    if kind == "internvl":
        with pytest.raises(ValueError, match="InternVLVisionModel pools nothing"):
            VisionEncoder.from_pretrained(folder, grid=1)
    elif kind == "vit_classifier":  # its checkpoint holds a head instead
        with pytest.raises(ValueError, match=r"no weights for ViTModel's pooler\.dense"):
            VisionEncoder.from_pretrained(folder, grid=1)
    else:
        encoder, images = VisionEncoder.from_pretrained(folder, grid=1), random_images(2)
        targets = encoder.encode(images)
        assert targets.shape == (2, 1, 32) and encoder.target_length == 1
        expected = encoder.model(encoder.pixel_values(images)).pooler_output
        torch.testing.assert_close(targets[:, 0], expected)


def test_another_size_interpolates_positions(vision):
    kind, folder = vision
    own = json.loads((folder / "config.json").read_text())
    options = {"config": {"model_args": own["model_args"] | {"dynamic_img_size": True}}} if kind == "timm_vit" else {}
    encoder = VisionEncoder.from_pretrained(folder, grid=GRID, size=96, **options)
    assert encoder.pixel_values(random_images(1)).shape == (1, 3, 96, 96)
    row, column = marked_cell(encoder.encode, GRID)
    coarse = {32: 3, 8: 1}[STRIDE.get(kind, 8)]
    assert abs(row - 3) <= coarse and abs(column - 7) <= coarse
    assert encoder.fingerprint != VisionEncoder.from_pretrained(folder, grid=GRID).fingerprint


def test_the_side_of_the_preprocessing(tmp_path):
    """DINOv2 is saved with a resize to 256 and a crop of 224: the crop is what it sees."""
    save_vision(tmp_path, "dinov2")
    path = tmp_path / "preprocessor_config.json"
    values = json.loads(path.read_text())
    for changes, size in [
        ({"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}, "do_center_crop": True}, 64),
        ({"size": {"shortest_edge": 72}, "crop_size": None}, 72),
        ({"size": 72, "crop_size": 64, "do_center_crop": True}, 64),
    ]:
        path.write_text(json.dumps(values | changes))
        assert VisionEncoder.from_pretrained(tmp_path, grid=GRID).size == size
    path.write_text(json.dumps(values | {"size": {"longest_edge": 64}}))
    with pytest.raises(ValueError, match=r"lacks \['size'\]"):
        VisionEncoder.from_pretrained(tmp_path, grid=GRID)


def test_a_further_task_by_configuration_alone(tiny_parts, tmp_path):
    """SigLIP, its grid and its pooled vector, beside a depth task: in training by JSON fields only."""
    folders = save_tiny_teachers(tmp_path / "teachers")
    small = {"layers": [2], "predictor_heads": 2, "predictor_head_dim": 8, "num_task_tokens": 2, "target_dim": 32}
    lengths = {"depth": 64, "siglip": 16, "summary": 1}
    tasks = [{"name": name, "target_length": length, **small} for name, length in lengths.items()]
    teachers = {name: {"encoder": "vision", "path": str(folders["vision"]), "dtype": "bfloat16"} for name in lengths}
    teachers["depth"] = {"encoder": "depth_anything", "path": str(folders["depth_anything"]), "features": "last"}
    samples = []
    for i, image in enumerate(random_images(4, size=(48, 32))):
        image.save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": "the red cube"}]
        samples.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(samples))
    args = OlaVlmArguments(
        output_dir=str(tmp_path / "run"), vision_tower=tiny_parts.vision_tower, data=str(tmp_path / "data.json"),
        language_model=tiny_parts.language_model, tasks=json.dumps(tasks), teachers=json.dumps(teachers), max_steps=2,
        per_device_train_batch_size=4, logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    logged = [entry for entry in train(args).state.log_history if "loss" in entry]
    names = [f"loss/{name}/2/{part}" for name in lengths for part in ("smooth_l1", "contrastive")]
    assert len(logged) == 2 and all(entry[name] > 0 for entry in logged for name in names)


# ---- frames of a video ----------------------------------------------------------------------------------------------


def moving_square(frames: int, start: int = 0) -> list[Image.Image]:
    """A white square that moves by one cell a frame, along the fourth row of the grid."""
    pictures = np.full((frames, 64, 64, 3), 100, dtype=np.uint8)
    for t in range(frames):
        pictures[t, 24:32, 8 * (start + t) : 8 * (start + t + 1)] = 255
    return [Image.fromarray(picture) for picture in pictures]


def test_motion_is_what_changes_between_frames(folders):
    encoder = load(folders, "vision")
    still, moving = moving_square(1) * 2, moving_square(4)
    counts = [2, 0, 4, 1]
    images = [*still, *moving, moving[0]]
    change, features = Motion(encoder)(images, counts), encoder.encode(images)
    assert change.shape == (7, 64, 32)
    assert change[[0, 2, 6]].abs().max() == 0  # no frame before, also if another sample's image is
    assert change[1].abs().max() < 1e-5
    for i in (3, 4, 5):
        torch.testing.assert_close(change[i], features[i] - features[i - 1])
        cells = change[i].norm(dim=-1).topk(2).indices.tolist()
        assert sorted(cells) == [24 + i - 3, 24 + i - 2]  # where the square was, and where it is
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        Motion(encoder)(images, [2, 0, 4])


def test_a_video_is_a_sample_with_several_images(tiny_parts, folders, tmp_path):
    """Frames in their order; one prediction a frame; a task that predicts the motion beside one that doesn't."""
    vision = load(folders, "vision")
    small = {"layers": [2], "predictor_heads": 2, "predictor_head_dim": 8, "num_task_tokens": 2}
    tasks = [{"name": name, "target_length": 64, "target_dim": 32, **small} for name in ("appearance", "motion")]
    model, processor = build_ola_vlm(tiny_parts.vision_tower, tiny_parts.language_model, tasks=tasks)
    rows = random_rows(3, [3, 0, 2])
    rows[0]["images"], rows[2]["images"] = moving_square(3), moving_square(2, start=4)
    sources = {"appearance": vision, "motion": partial(Motion(vision), counts=[3, 0, 2])}
    options = {"per_device_train_batch_size": 3, "seed": 0}
    trainer = make_trainer(model, processor, tmp_path, rows, sources, **options)
    batch = trainer.data_collator(rows)
    assert batch["targets"]["motion"].shape == batch["targets"]["appearance"].shape == (5, 64, 32)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert model(**inputs, output_predictions=True).predictions["motion"][2].shape == (5, 64, 32)
    loss = trainer.compute_loss(model.train(), batch)
    loss.backward()
    assert loss.isfinite() and all(
        parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
        for parameter in model.predictors["motion"].parameters()
    )


def test_motion_by_configuration(tiny_parts, folders, tmp_path, monkeypatch):
    """Videos of 3, 1, 2 and 3 frames and a text row, from encoders and from the cache that both tasks share; the
    teacher looks at a batch once."""
    encoded, encode = [], VisionEncoder.encode
    monkeypatch.setattr(VisionEncoder, "encode", lambda self, images: encoded.append(images) or encode(self, images))
    small = {"layers": [2], "predictor_heads": 2, "predictor_head_dim": 8, "num_task_tokens": 2}
    tasks = [{"name": name, "target_length": 64, "target_dim": 32, **small} for name in ("appearance", "motion")]
    teacher = {"encoder": "vision", "path": str(folders["vision"]), "device": "cpu"}
    samples = [
        {"id": "text", "conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]}
    ]
    for i, count in enumerate([3, 1, 2, 3]):
        names = [f"{i}-{t}.png" for t in range(count)]
        for name, frame in zip(names, moving_square(count, start=i), strict=True):
            frame.save(tmp_path / name)
        turns = [{"from": "human", "value": "<image>\n" * count + "what ?"}, {"from": "gpt", "value": "the red cube"}]
        samples.append({"id": i, "image": names, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(samples))
    cached = {"target_cache": str(tmp_path / "cache"), "target_fill": True, "standardize_targets": True}
    for options in ({}, cached):
        args = OlaVlmArguments(
            output_dir=str(tmp_path / ("run" if options else "computed")), vision_tower=tiny_parts.vision_tower,
            data=str(tmp_path / "data.json"), language_model=tiny_parts.language_model, tasks=tasks, max_steps=2,
            per_device_train_batch_size=5, logging_steps=1,
            teachers={"appearance": teacher, "motion": teacher | {"motion": True}},
            save_strategy="no", disable_tqdm=True, use_cpu=True, **options,
        )  # fmt: skip
        trainer = train(args)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 2 and all(entry["loss/motion/2/smooth_l1"] > 0 for entry in logged)
        assert sum(map(len, encoded)) == (6 if options else 18)  # all different frames, or all in both steps
        encoded.clear()
        rows = [trainer.train_dataset[i] for i in range(5)]
        change = trainer._with_targets(trainer.data_collator(rows))["targets"]["motion"].abs().amax((1, 2))
        assert change[[0, 3, 4, 6]].max() == 0 and change[[1, 2, 5, 7, 8]].min() > 0.1
        encoded.clear()
    appearance, motion = (
        TargetStatistics.load(tmp_path / "run" / "target_statistics" / f"{task['name']}.safetensors") for task in tasks
    )
    assert appearance.mean.abs().max() > 0 and motion.mean.abs().max() == 0 and motion.std.equal(appearance.std)
    assert len(list((tmp_path / "cache").glob("vision-grid8-*/"))) == 1


# ---- the recorded reference -----------------------------------------------------------------------------------------

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DEPTH_ANYTHING_KEYS = [  # Depth-Anything-V2's names -> those of its transformers checkpoints
    (r"^pretrained\.(cls_token|mask_token)$", r"backbone.embeddings.\1"),
    (r"^pretrained\.pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"^pretrained\.patch_embed\.proj", "backbone.embeddings.patch_embeddings.projection"),
    (r"^pretrained\.norm", "backbone.layernorm"),
    (r"^pretrained\.blocks", "backbone.encoder.layer"),
    (r"attn\.proj", "attention.output.dense"),
    (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
    (r"^depth_head\.projects\.(\d)", r"neck.reassemble_stage.layers.\1.projection"),
    (r"^depth_head\.resize_layers\.(\d)", r"neck.reassemble_stage.layers.\1.resize"),
    (r"^depth_head\.scratch\.layer(\d)_rn", lambda match: f"neck.convs.{int(match[1]) - 1}"),
    (r"^depth_head\.scratch\.refinenet(\d)", lambda match: f"neck.fusion_stage.layers.{4 - int(match[1])}"),
    (r"out_conv", "projection"),
    (r"resConfUnit(\d)\.conv(\d)", r"residual_layer\1.convolution\2"),
    (r"^depth_head\.scratch\.output_conv1", "head.conv1"),
    (r"^depth_head\.scratch\.output_conv2\.0", "head.conv2"),
    (r"^depth_head\.scratch\.output_conv2\.2", "head.conv3"),
]


def save_preprocessing(folder, size, mean, std):
    values = {"size": {"height": size, "width": size}, "image_mean": mean, "image_std": std}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def golden_depth(tmp_path_factory):
    golden, folder = load_file(GOLDEN / "d_depth_target.safetensors"), tmp_path_factory.mktemp("golden_depth")
    weights = {}
    for name, value in golden.items():
        if not name.startswith("dav2."):
            continue
        name = name.removeprefix("dav2.")
        for pattern, replacement in DEPTH_ANYTHING_KEYS:
            name = re.sub(pattern, replacement, name)
        if name.endswith("position_embeddings"):
            # The one known difference: DINOv2's own code interpolates its 37 x 37 positions by the *scale* 24.1 / 37,
            # transformers to the *size* 24 (features differ by up to .1, of a standard deviation of 1).
            grid = value[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, scale_factor=(24.1 / 37, 24.1 / 37), mode="bicubic")
            value = torch.cat([value[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        if "attn.qkv" in name:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            weights |= {name.replace("attn.qkv", f"attention.attention.{part}"): one for part, one in parts}
        else:
            weights[name] = value
    backbone = Dinov2Config(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=336, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=48, neck_hidden_sizes=[16, 24, 32, 32], fusion_hidden_size=32,
        head_hidden_size=32,
    )  # fmt: skip
    config.save_pretrained(folder)
    weights = {name: value.contiguous() for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_preprocessing(folder, 336, *IMAGENET)
    return DepthAnythingEncoder.from_pretrained(folder), golden


def test_golden_depth_target(golden_depth):
    encoder, golden = golden_depth
    swapped = golden["image0_resized336_uint8"].numpy()[..., ::-1]  # the reference swaps the color channels
    target = encoder.encode([Image.fromarray(np.ascontiguousarray(swapped))])
    assert_close(target, golden["ft_gt"])


@torch.no_grad()
def test_golden_last_depth_features(golden_depth):
    """What the reference's probes take."""
    encoder, golden = golden_depth
    encoder = DepthAnythingEncoder(encoder.model, 24, *IMAGENET, features="last")
    swapped = Image.fromarray(np.ascontiguousarray(golden["image0_resized336_uint8"].numpy()[..., ::-1]))
    assert_close(encoder.encode([swapped]), golden["image0_feat3"])


def test_golden_network_input(golden_depth):
    """Our channels are the picture's; the recorded input has them swapped. The reference stretches, as `resize_mode`
    "reference" does: within 2 gray levels in 0.3% of the values, as PIL's bicubic filter is not torchvision's."""
    encoder, golden = golden_depth
    resized = golden["image0_resized336_uint8"].numpy()
    ours = encoder.pixel_values([Image.fromarray(resized)])
    swapped = encoder.pixel_values([Image.fromarray(np.ascontiguousarray(resized[..., ::-1]))])
    assert_close(swapped[..., ::8, ::8], golden["image0_net_input_every8th"])
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    assert_close(ours[0] * std + mean, torch.tensor(resized).permute(2, 0, 1) / 255)

    stretching = DepthAnythingEncoder(encoder.model, 24, *IMAGENET, resize_mode="reference")
    picture = Image.fromarray(golden["image0_rgb_uint8"].numpy())
    assert picture.size == (250, 240)
    difference = (stretching.pixel_values([picture]) - ours).abs() * std * 255
    assert difference.max() < 2.01 and (difference > 0.01).float().mean() < 0.005
    target = stretching.encode([Image.fromarray(np.ascontiguousarray(golden["image0_rgb_uint8"].numpy()[..., ::-1]))])
    assert (target - golden["ft_gt"]).abs().max() < 0.01


def test_golden_depth_picture(golden_depth):
    encoder, golden = golden_depth
    # Stretching depths of .51 to .57 to 0..1 makes their rounding 9 times as large: 6e-6, the others are within 5e-7.
    picture = encoder.decode(golden["ft_gt"])
    assert_close(picture, golden["depth_gt_normalised"])


@pytest.fixture(scope="module")
def golden_seg(tmp_path_factory):
    golden, folder = load_file(GOLDEN / "e_oneformer_target.safetensors"), tmp_path_factory.mktemp("golden_seg")
    backbone = {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 3}
    backbone |= {"image_size": 96, "drop_path_rate": 0.0, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    OneFormerConfig(
        backbone_config=backbone, num_labels=5, num_queries=10, hidden_dim=32, conv_dim=32, mask_dim=32,
        dim_feedforward=32, encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=3, query_dec_layers=1,
        num_attention_heads=4, task_seq_len=7,
    ).save_pretrained(folder)  # fmt: skip
    weights = {f"model.{name.removeprefix('w.')}": value for name, value in golden.items() if name.startswith("w.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_preprocessing(folder, 96, [0.5] * 3, [0.5] * 3)
    return OneFormerEncoder.from_pretrained(folder), golden


@torch.no_grad()
def test_golden_seg_target_and_masks(golden_seg):
    encoder, golden = golden_seg
    target = encoder._features(golden["pixel_values"])
    assert_close(target, golden["features24"].flatten(2).transpose(1, 2))

    stages = list(encoder.model.model.pixel_level_module.encoder(golden["pixel_values"]).feature_maps)
    classes, masks = encoder.class_and_mask_logits(stages, golden["task_inputs"])
    assert_close(classes, golden["masks_plain.class"])
    assert_close(masks, golden["masks_plain.mask"])

    # The reference also shrinks the teacher's finer stages to the replaced one's size; `decode` doesn't.
    shrunk = [F.interpolate(one, (3, 4), mode="bilinear") for one in [*stages[:3], golden["replaced_last"]]]
    classes, masks = encoder.class_and_mask_logits(shrunk, golden["task_inputs"])
    assert_close(classes, golden["masks_replaced.class"])
    assert_close(masks, golden["masks_replaced.mask"])
