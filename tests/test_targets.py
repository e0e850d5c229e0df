"""The target encoders: shapes, the shared square, fingerprints, decoding, and the recorded reference (d, e)."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_modeling import assert_close
from tiny_teachers import GRID, random_images, save_oneformer, save_tiny_teachers
from torch.nn import functional as F
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
)
from transformers.models.llava import LlavaImageProcessor

from ola_vlm.targets.encoders import ENCODERS, DepthAnythingEncoder, OneFormerEncoder

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny_teachers(tmp_path_factory.mktemp("teachers"))


def load(folders, name, **kwargs):
    return ENCODERS[name].from_pretrained(folders[name], grid=1 if name == "clip_image" else GRID, **kwargs)


@pytest.mark.parametrize(
    ("name", "shape"), [("depth_anything", (64, 32)), ("oneformer", (64, 64)), ("clip_image", (1, 12))]
)
def test_encode(folders, name, shape):
    encoder = load(folders, name)
    images = random_images(5)
    targets = encoder.encode(images, batch_size=2)
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
    image, 192 x 64. In the padded square, 192 x 192, the image fills the rows 64 to 128."""
    plain = np.full((64, 192, 3), 120, dtype=np.uint8)
    marked = plain.copy()
    marked[:24, -24:] = 255
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
    assert marked_cell(load(folders, "depth_anything").encode, GRID) == expected
    row, column = marked_cell(load(folders, "oneformer").encode, GRID)  # its own cells are twice as wide
    assert (row // 2, column // 2) == (1, 3)
    # That the marker tells a cropping student from a padding one:
    processor.image_processor = LlavaImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    assert marked_cell(student_pixels(processor), GRID) != expected


def test_padding_has_the_encoders_mean_colour(folders):
    for name in ENCODERS:
        pixels = load(folders, name).pixel_values(random_images(1, size=(96, 32)))
        assert pixels.shape == (1, 3, 64, 64)
        assert pixels[0, :, :10].abs().max() < 2e-2  # a grey level off at most: 1 / 255 / .25
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

    other = load(folders, "oneformer")
    with torch.no_grad():
        other.model.get_parameter("model.pixel_level_module.encoder.swin.embeddings.norm.bias")[0] += 1e-3
    assert other.fingerprint != encoder.fingerprint


def test_decode_depth(folders):
    encoder = load(folders, "depth_anything")
    images = random_images(3)
    with torch.no_grad():  # an untrained head is so faint that its last ReLU may hide it
        encoder.model.head.conv3.weight.mul_(100)
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


# ---- the recorded reference -----------------------------------------------------------------------------------------

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
    model = DepthAnythingForDepthEstimation.from_pretrained(folder)
    return DepthAnythingEncoder(model, 24, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), golden


def test_golden_depth_target(golden_depth):
    encoder, golden = golden_depth
    swapped = golden["image0_resized336_uint8"].numpy()[..., ::-1]  # the reference swaps the colour channels
    target = encoder.encode([Image.fromarray(np.ascontiguousarray(swapped))])
    assert_close(target, golden["ft_gt"])


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
    model = OneFormerForUniversalSegmentation.from_pretrained(folder)
    return OneFormerEncoder(model, 96, 24, [0.5] * 3, [0.5] * 3), golden


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
