"""Words as targets: teachers' maps to numbers, numbers in the cache, words to tokens, tokens to embeddings."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import WORDS, make_tokenizer, random_image, random_rows
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_teachers import SIZE, random_images, save_depth_anything, save_oneformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training_helpers import TEST_WORDS, llava_sample, losses, make_trainer, random_words, write_llava
from transformers import (
    BeitConfig,
    DPTConfig,
    DPTForDepthEstimation,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GLPNConfig,
    GLPNForDepthEstimation,
    GLPNImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    Trainer,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)
from transformers.integrations.neftune import activate_neftune
from transformers.utils.generic import ModelOutput

from ola_vlm import cli
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.recipes.miniature import WEIGHTS
from ola_vlm.targets.encoders import OneFormerEncoder, scores_of_masks
from ola_vlm.targets.fill import make_teachers, open_caches
from ola_vlm.targets.words import (
    DEPTH_WORDS,
    ClassWordsEncoder,
    DepthWordsEncoder,
    _larger_is_closer,
    class_words,
    speakable,
    storage_of,
)
from ola_vlm.train import train
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.losses import combine_words
from ola_vlm.training.words import WordSource, encode_word, encode_words

GRID = 4
TASK = {"name": "words", "predictor": "none", "target": "words", "layers": [0], "target_length": 16, "loss": "mse"}
TASK |= {"contrastive_weight": 0.0}
# A tiny segmenter that scores pixels.
SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [8, 16],
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}
COLORS = ["red", "green", "blue", "red", "near"]  # of five classes, two of them alike


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teachers")
    save_oneformer(folder / "seg")
    save_depth_anything(folder / "depth")
    return folder


def entries(folders: Path, **depth) -> dict:
    seg = {"encoder": "class_words", "path": str(folders / "seg"), "words": COLORS}
    depth = {"encoder": "depth_words", "path": str(folders / "depth"), "words": ["near", "far"], **depth}
    return {"words": {"class": seg, "depth": depth}}


def save_preprocessing(folder: Path, size: int = SIZE):
    fields = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


class OneMap:
    """A model whose scores are the same for each image."""

    def __init__(self, scores_CHW: torch.Tensor):
        self.scores = scores_CHW

    def __call__(self, pixels):
        return self.scores.expand(len(pixels), *self.scores.shape)


class DepthOf:
    """A depth model that predicts `depth` (1 or N, h, w), whatever it sees."""

    def __init__(self, model, depth_NHW: torch.Tensor):
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.depth = depth_NHW

    def __call__(self, pixels):
        return SimpleNamespace(predicted_depth=self.depth.expand(len(pixels), -1, -1))


def class_map(encoder: ClassWordsEncoder, classes_SS: torch.Tensor) -> torch.Tensor:
    """The numbers of words for a map of classes (size, size)."""
    scores = torch.nn.functional.one_hot(classes_SS, len(encoder.word_of_class)).permute(2, 0, 1).float()
    return encoder._words_of_patches(scores)


def test_the_most_frequent_word_of_a_patch(folders):
    encoder = ClassWordsEncoder.from_pretrained(folders / "seg", grid=GRID, words=COLORS)
    assert encoder.words == ["red", "green", "blue", "near"] and encoder.target_dim == 1
    classes = torch.ones(SIZE, SIZE, dtype=torch.long)
    # The first patch (16 x 16): 96 pixels of green, 80 each of two classes that are both red.
    classes[:5, :16] = 0
    classes[5:10, :16] = 3
    # The second: two words equally often.
    classes[:8, 16:32] = 4
    classes[8:16, 16:32] = 2
    numbers = class_map(encoder, classes)
    assert numbers.tolist() == [0, 2, *[1] * 14]


def test_patches_of_a_map_that_they_do_not_divide(folders):
    encoder = ClassWordsEncoder.from_pretrained(folders / "seg", grid=3, words=COLORS)
    classes = torch.zeros(SIZE, SIZE, dtype=torch.long)
    classes[22:43, 43:] = 2  # 64 pixels in 3 patches: the second begins at 22, the third at 43
    assert class_map(encoder, classes).tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0]


def test_oneformers_words_are_those_of_its_own_class_map():
    """The miniature's, which is trained."""
    options = {"grid": 8, "task_inputs": [1, 1, 1, 1]}
    words = ["sky", "floor", "red", "blue", "green", "yellow", "purple", "cyan"]
    encoder = ClassWordsEncoder.from_pretrained(WEIGHTS / "seg", words=words, batch_size=2, **options)
    images = random_images(5)
    classes = OneFormerEncoder.from_pretrained(WEIGHTS / "seg", **options).decode(None, images)
    expected = torch.stack([class_map(encoder, one) for one in classes])
    numbers = encoder.encode(images)
    assert numbers.shape == (5, 64, 1) and numbers[..., 0].equal(expected.float())
    assert len(numbers.unique()) > 3
    assert encoder.encode([]).shape == (0, 64, 1)


def test_scores_that_are_not_finite_are_no_word(folders, monkeypatch):
    """NaN counts as the largest score: it was its class's word."""
    encoder = ClassWordsEncoder.from_pretrained(folders / "seg", grid=GRID, words=COLORS)
    images = random_images(3)
    scores = encoder._scores(encoder.pixel_values(images))
    expected = encoder.encode(images)
    scores[1, 0, 5, 5] = math.nan
    scores[2, 3, 0, 0] = math.inf
    monkeypatch.setattr(encoder, "_scores", lambda pixels: scores)
    numbers = encoder.encode(images)
    assert numbers[0].equal(expected[0]) and numbers[1:].isnan().all()


def test_a_note_from_before_preprocessing_counted_is_not_believed(folders, tmp_path):
    """Its fingerprint may be that of another view of the picture: the teacher is asked again, once."""
    teacher = make_teachers([TASK], entries(folders))["words.class"]
    fingerprint = teacher.fingerprint(tmp_path)
    note = teacher._note(tmp_path)
    known = json.loads(note.read_text())
    assert known.pop("rescaling") is True
    former = make_teachers([TASK], entries(folders))["words.depth"].encoder.fingerprint
    assert former != fingerprint
    note.write_text(json.dumps({**known, "fingerprint": former}))
    assert teacher.fingerprint(tmp_path) == fingerprint
    assert json.loads(note.read_text())["fingerprint"] == fingerprint


def test_a_note_with_other_words_is_not_believed(folders, tmp_path):
    """Which words a teacher gives may change with this package: the numbers in its old cache are of others."""
    for kind in ("class", "depth"):
        teacher = make_teachers([TASK], entries(folders))[f"words.{kind}"]
        fingerprint = teacher.fingerprint(tmp_path)
        note = teacher._note(tmp_path)
        known = json.loads(note.read_text())
        for former in (known["words"][::-1], None):
            note.write_text(json.dumps({**known, "words": former, "fingerprint": "former"}))
            assert teacher.fingerprint(tmp_path) == fingerprint
            assert json.loads(note.read_text()) == known
        # With today's words it is, without a look at the weights.
        note.write_text(json.dumps({**known, "fingerprint": "told"}))
        assert teacher.fingerprint(tmp_path) == "told"


def test_a_depth_teachers_note_from_before_ranks_counted_is_not_believed(folders, tmp_path):
    teacher = make_teachers([TASK], entries(folders))["words.depth"]
    fingerprint = teacher.fingerprint(tmp_path)
    note = teacher._note(tmp_path)
    known = json.loads(note.read_text())
    assert known.pop("alone") is False
    note.write_text(json.dumps({**known, "fingerprint": "former"}))
    assert teacher.fingerprint(tmp_path) == fingerprint


def test_oneformers_task_counts_for_its_class_words(tmp_path):
    """Other ids give other classes, so another cache; also where an older note says the old fingerprint. The usual ids
    are in no fingerprint, as they never were."""
    words = [".", ".", "red", "blue", "green", "yellow", "purple", "cyan"]
    task = {**TASK, "target_length": 64, "words": ["class"]}
    entry = {"encoder": "class_words", "path": str(WEIGHTS / "seg"), "words": words}

    def teacher(ids: list[int]):
        return make_teachers([task], {"words": {"class": {**entry, "task_inputs": ids}}})["words.class"]

    usual, other = teacher([1, 1, 1, 1]), teacher([0, 0, 0, 0])
    image = random_images(1)[0]
    scores = [one.encoder._scores(one.encoder.pixel_values([image])) for one in (usual, other)]
    assert not scores[0].equal(scores[1])
    assert "task_inputs" not in usual.encoder.view
    assert usual.fingerprint(tmp_path) != other.fingerprint(tmp_path)
    # What an earlier version left: no ids, and a fingerprint that doesn't have them.
    note = other._note(tmp_path)
    known = json.loads(note.read_text())
    assert known.pop("task_inputs") == [0, 0, 0, 0]
    note.write_text(json.dumps({**known, "fingerprint": usual.encoder.fingerprint}))
    assert teacher([0, 0, 0, 0]).fingerprint(tmp_path) == other.encoder.fingerprint


def test_a_teachers_tokenizer_counts_for_its_class_words(folders):
    """The task's ids are the tokenizer's; those that published OneFormers get are in no fingerprint."""
    encoder = ClassWordsEncoder.from_pretrained(folders / "seg", grid=GRID, words=COLORS)
    assert encoder.view["task_inputs"] == [2, 3, 4, 5, 0, 0, 0]  # the / task / is / semantic
    published = [49406, 518, 10549, 533, 29119, 1550, 49407]
    given = ClassWordsEncoder.from_pretrained(folders / "seg", grid=GRID, words=COLORS, task_inputs=published)
    assert "task_inputs" not in given.view and given.fingerprint != encoder.fingerprint


def test_any_segmenter_of_transformers(tmp_path):
    torch.manual_seed(0)
    labels = {0: "tree-merged", 1: "sky, heavens", 2: "dining table"}
    options = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    SegformerForSemanticSegmentation(SegformerConfig(**SEGFORMER, **options)).eval().save_pretrained(
        tmp_path / "semantic"
    )
    backbone = SwinConfig(
        image_size=SIZE, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"], drop_path_rate=0.0,
    )  # fmt: skip
    mask2former = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=6,
        encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=4,
        **options,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(mask2former).eval().save_pretrained(tmp_path / "universal")
    for kind in ("semantic", "universal"):
        save_preprocessing(tmp_path / kind)
        assert ClassWordsEncoder.list_words(tmp_path / kind) == ["tree", "sky", "dining table"]
        assert ClassWordsEncoder.target_shape(tmp_path / kind, grid=GRID) == (16, 1)
        encoder = ClassWordsEncoder.from_pretrained(tmp_path / kind, grid=GRID)
        images = random_images(3)
        numbers = encoder.encode(images)
        assert numbers.shape == (3, 16, 1) and numbers.max() < 3
        with torch.no_grad():
            output = encoder.model(encoder.pixel_values(images))
        # An untrained model is sure of nothing.
        sure = ClassWordsEncoder.from_pretrained(tmp_path / kind, grid=GRID, threshold=0.99)
        assert (sure.encode(images) == 3).all() and sure.words == encoder.words
        if kind == "semantic":
            maps = torch.nn.functional.interpolate(output.logits, size=SIZE, mode="bilinear").argmax(1)
            assert numbers[..., 0].equal(torch.stack([class_map(encoder, one) for one in maps]).float())


def test_classes_as_one_says_them():
    said = {
        "tree-merged": "tree",
        "wall-other-merged": "wall",
        "door-stuff": "door",
        "dining table": "dining table",
        "streetlight, street lamp": "streetlight",
        "floor-wood": "floor wood",
        "other": "other",
        "kite_(toy)": "kite",
        "__background__": "background",
        "wall-": "wall",
    }
    assert {label: speakable(label) for label in said} == said


def test_blanks_around_given_words_are_none_of_them(folders):
    encoder = ClassWordsEncoder.from_pretrained(
        folders / "seg", grid=GRID, words=[" red", "green", "red ", None, "\tblue\n"]
    )
    assert encoder.words == ["red", "green", "blue"] and encoder.word_of_class.tolist() == [0, 1, 0, 3, 2]
    assert DepthWordsEncoder.list_words(folders / "depth", words=["near ", " very far"]) == ["near", "very far"]
    with pytest.raises(ValueError, match="'LABEL_0' has the word '': give text, or null"):
        ClassWordsEncoder.list_words(folders / "seg", words=["  ", "a", "b", "c", "d"])
    for words in (["near", "near "], ["near", " "], ["near", 3], ["near", None]):
        with pytest.raises(ValueError, match="give two or more different ones"):
            DepthWordsEncoder.list_words(folders / "depth", words=words)


def test_classes_whose_numbers_have_gaps(folders):
    """Such as 255 for void: there are as many classes as names, and the last ones have none."""
    config = SegformerConfig(id2label={0: "road", 1: "sky", 255: "void"}, label2id={"road": 0, "sky": 1, "void": 255})
    assert config.num_labels == 3
    with pytest.raises(ValueError, match=r"a model: its classes have no names \(LABEL_2\): give its teacher words"):
        class_words("a model", config, None)
    assert class_words("a model", config, {"LABEL_2": None}) == ["road", "sky", None]
    assert class_words("a model", config, ["road", "sky", "nothing"]) == ["road", "sky", "nothing"]


def test_depth_words_by_value(folders):
    options = {"words": ["z0", "z1", "z2", "z3"], "bins": [8.0, 0.5]}
    encoder = DepthWordsEncoder.from_pretrained(folders / "depth", grid=2, **options)
    # 8 to .5 in four steps of a factor of 2; beyond it the first and last word.
    values = torch.tensor([[9.0, 7.9, 3.9, 1.9], [0.9, 0.4, 0.0, 4.1]])
    assert encoder._by_value(values).tolist() == [[0, 0, 1, 2], [3, 3, 3, 0]]
    far_first = DepthWordsEncoder.from_pretrained(folders / "depth", grid=2, words=options["words"], bins=[0.5, 8.0])
    assert far_first._by_value(values).tolist() == [[3, 3, 2, 1], [0, 0, 0, 3]]


def test_depth_words_by_quantiles(folders):
    encoder = DepthWordsEncoder.from_pretrained(folders / "depth", grid=2, words=["near", "far"])
    assert encoder.larger_is_closer
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    assert encoder._by_rank(torch.tensor([[0.1, 5.0, 4.0, 0.2]]), everywhere).tolist() == [[1, 0, 0, 1]]
    metric = DepthWordsEncoder.from_pretrained(
        folders / "depth", grid=2, words=["near", "far"], larger_is_closer=False
    )
    assert metric._by_rank(torch.tensor([[0.1, 5.0, 4.0, 0.2]]), everywhere).tolist() == [[0, 1, 1, 0]]
    numbers = encoder.encode(random_images(2))
    depth = encoder.model(encoder.pixel_values(random_images(2))).predicted_depth
    closest = torch.nn.functional.adaptive_avg_pool2d(depth[:, None], 2).flatten(1).argmax(1)
    assert (numbers[torch.arange(2), closest] == 0).all() and (numbers.sum((1, 2)) == 2).all()
    assert DepthWordsEncoder.list_words(folders / "depth") == list(DEPTH_WORDS)


def test_equal_depths_have_one_word(folders):
    """As of a flat sky: the word of their mean rank, whichever rows they lie in."""
    encoder = DepthWordsEncoder.from_pretrained(folders / "depth", grid=2, words=["near", "far"])
    everywhere = torch.ones(3, 4, dtype=torch.bool)
    flat = torch.tensor([[1.0, 1, 1, 1], [0, 0, 7, 0], [9, 0, 0, 8]])
    assert encoder._by_rank(flat, everywhere).tolist() == [[0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 0]]
    # Without equal ones words are as frequent as each other, the ranks' own.
    encoder.words = ["a", "b", "c", "d", "e"]
    depth = torch.randn(4, 23, generator=torch.Generator().manual_seed(0))
    ranks = depth.argsort(dim=1, descending=True).argsort(dim=1)
    assert encoder._by_rank(depth, torch.ones(4, 23, dtype=torch.bool)).equal(ranks * 5 // 23)


def test_padding_takes_no_share_of_the_depth_words(folders, monkeypatch):
    """The picture's own patches have each word as often; the padding's get the words of what is as far."""
    encoder = DepthWordsEncoder.from_pretrained(folders / "depth", grid=GRID, words=["near", "far"])
    # Rows 1 and 2 are the picture, the second one farther; rows 0 and 3 are padding, which is nearer than both.
    depth = torch.tensor([9.0, 5.0, 1.0, 9.0])[:, None].expand(4, 4)[None]
    monkeypatch.setattr(encoder, "model", DepthOf(encoder.model, depth))
    wide, square = random_images(1, size=(64, 32))[0], random_images(1)[0]
    turned = Image.new("RGB", (32, 64))
    turned.getexif()[274] = 6  # a telephone's, whose pixels lie on their side
    assert encoder.encode([wide, turned])[..., 0].view(2, 4, 4)[:, :, 0].tolist() == [[0, 0, 1, 0]] * 2
    # In a square each row counts: half of the patches are as near as the outer rows.
    assert encoder.encode([square])[0, :, 0].view(4, 4)[:, 0].tolist() == [0, 1, 1, 0]
    monkeypatch.setattr(encoder, "model", DepthOf(encoder.model, depth.mT))
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert encoder.encode([tall])[0, :, 0].view(4, 4)[0].tolist() == [0, 0, 1, 0]
    # A picture that was stretched has no padding.
    encoder.view["square"] = "reference"
    assert encoder._is_picture((64, 32)).all()


def test_patches_of_a_picture_that_is_not_square(folders):
    encoder = DepthWordsEncoder.from_pretrained(folders / "depth", grid=GRID)
    rows = torch.tensor([[False], [True], [True], [False]]).expand(4, 4)
    assert encoder._is_picture((64, 32)).view(4, 4).equal(rows)
    assert encoder._is_picture((32, 64)).view(4, 4).equal(rows.T)
    assert encoder._is_picture((64, 64)).all() and encoder._is_picture((1, 1)).all()
    # 24 of 32 rows of a cell's 8, from row 20 to 44 of 64: the centers are in rows 8, 24, 40 and 56.
    assert encoder._is_picture((64, 24)).view(4, 4).equal(rows)
    # So narrow that no center is in it: the patches that it touches.
    assert encoder._is_picture((500, 1)).view(4, 4).equal(torch.tensor([[0], [1], [0], [0]]).bool().expand(4, 4))
    assert encoder._is_picture((500, 2)).view(4, 4).equal(rows)


def test_depth_that_is_not_finite_is_no_word(folders, monkeypatch):
    images = random_images(3)
    for bins in ("quantiles", [8.0, 0.5]):
        encoder = DepthWordsEncoder.from_pretrained(folders / "depth", grid=GRID, words=["near", "far"], bins=bins)
        expected = encoder.encode(images)
        depth = encoder.model(encoder.pixel_values(images)).predicted_depth
        depth[1, 5, 5] = math.nan
        depth[2, 0, 0] = math.inf
        monkeypatch.setattr(encoder, "model", DepthOf(encoder.model, depth))
        numbers = encoder.encode(images)
        assert numbers[0].equal(expected[0]) and numbers[1:].isnan().all()


def test_fixed_bins_are_in_the_view_as_they_always_were(folders):
    """Stored targets of such a teacher stay good."""
    common = {"square", "size", "grid", "mean", "std", "resample", "words", "bins", "larger_is_closer", "of_patch"}
    fixed = DepthWordsEncoder.from_pretrained(folders / "depth", grid=GRID, bins=[8.0, 0.5])
    assert set(fixed.view) == common
    assert set(DepthWordsEncoder.from_pretrained(folders / "depth", grid=GRID).view) == common | {"ranks"}


def test_an_images_depth_words_do_not_depend_on_its_batch(tmp_path):
    """A ZoeDepth of several heads chooses one for a whole batch."""
    torch.manual_seed(0)
    backbone = BeitConfig(
        image_size=SIZE, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=48, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
        use_relative_position_bias=True,
    )  # fmt: skip
    heads = [
        {"name": "nyu", "n_bins": 8, "min_depth": 1e-3, "max_depth": 10.0},
        {"name": "kitti", "n_bins": 8, "min_depth": 1e-3, "max_depth": 80.0},
    ]
    config = ZoeDepthConfig(
        backbone_config=backbone, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, bottleneck_features=16,
        num_relative_features=8, num_attractors=[4, 2, 2, 1], bin_embedding_dim=16, bin_configurations=heads,
        num_patch_transformer_layers=4, patch_transformer_hidden_size=128, patch_transformer_intermediate_size=32,
        patch_transformer_num_attention_heads=2,
    )  # fmt: skip
    model = ZoeDepthForDepthEstimation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    save_preprocessing(tmp_path)
    encoder = DepthWordsEncoder.from_pretrained(tmp_path, grid=GRID, bins=[0.1, 10.0])
    assert encoder.view["alone"] is True and "ranks" not in encoder.view
    images = random_images(2)
    pixels = encoder.pixel_values(images)
    # So that each image has a head of its own.
    with torch.no_grad():
        logits = encoder.model(pixels).domain_logits
        encoder.model.metric_head.mlp_classifier.linear2.bias -= logits.mean(0)
        single = torch.cat([encoder.model(one).predicted_depth for one in pixels.split(1)])
        assert not torch.allclose(encoder.model(pixels).predicted_depth, single, atol=0.001)
        torch.testing.assert_close(encoder._depth(pixels), single)
    # As wide as what is predicted, so that words tell the heads apart.
    encoder.bins = [single.min().item(), single.max().item()]
    assert encoder.encode(images).equal(torch.cat([encoder.encode([image]) for image in images]))


def test_glpn_whose_image_processor_says_no_size_nor_mean(tmp_path):
    torch.manual_seed(0)
    config = GLPNConfig(
        num_encoder_blocks=4, depths=[1] * 4, sr_ratios=[2, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2], mlp_ratios=[2] * 4, decoder_hidden_size=8,
    )  # fmt: skip
    GLPNForDepthEstimation(config).eval().save_pretrained(tmp_path)
    GLPNImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \['size'\]: add it there, or to its teacher, if that takes a size"):
        DepthWordsEncoder.from_pretrained(tmp_path, grid=GRID)
    encoder = DepthWordsEncoder.from_pretrained(tmp_path, grid=GRID, size=SIZE)
    assert not encoder.larger_is_closer and encoder.size == SIZE
    images = random_images(2)
    seen = GLPNImageProcessor()(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder.pixel_values(images), seen)
    assert len(encoder.encode(images).unique()) == len(DEPTH_WORDS)
    # As its older files call it.
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"feature_extractor_type": "GLPNFeatureExtractor", "size_divisor": 32}))
    older = DepthWordsEncoder.from_pretrained(tmp_path, grid=GRID, size=SIZE)
    assert older.pixel_values(images).equal(encoder.pixel_values(images))
    # Others have a mean, which isn't guessed.
    file.write_text(json.dumps({"image_processor_type": "DPTImageProcessor"}))
    with pytest.raises(ValueError, match=r"lacks \['image_mean', 'image_std'\]: add them there"):
        DepthWordsEncoder.from_pretrained(tmp_path, grid=GRID, size=SIZE)


def test_which_way_a_depth_model_counts():
    """Inverse depth is larger where it is closer, meters are smaller."""

    def is_closer(kind: str, **fields) -> bool:
        return _larger_is_closer("a model", SimpleNamespace(model_type=kind, **fields))

    assert is_closer("depth_anything", depth_estimation_type="relative")
    # MiDaS's DPTs predict inverse depth; DINOv2's heads, which have a projection, meters.
    assert is_closer("dpt", add_projection=False)
    with pytest.raises(ValueError, match="is a dpt: give its teacher larger_is_closer"):
        is_closer("dpt", add_projection=True)
    assert not is_closer("depth_anything", depth_estimation_type="metric")
    assert not is_closer("glpn") and not is_closer("zoedepth")
    with pytest.raises(ValueError, match="give its teacher larger_is_closer"):
        is_closer("another")


def test_a_byte_holds_255_words_and_none():
    assert [storage_of(["a"] * count) for count in (1, 255, 256)] == ["uint8", "uint8", "int16"]


def test_a_class_without_a_word_says_nothing(folders):
    """Its pixels count as all others do; where most of a patch has it, the patch gets no word of this kind."""
    words = ["red", None, "blue", "red", None]
    encoder = ClassWordsEncoder.from_pretrained(folders / "seg", grid=GRID, words=words)
    assert encoder.words == ["red", "blue"] == ClassWordsEncoder.list_words(folders / "seg", words=words)
    assert encoder.word_of_class.tolist() == [0, 2, 1, 0, 2]
    assert encoder.target_shape(folders / "seg", grid=GRID, words=words) == (16, 1)
    classes = torch.full((SIZE, SIZE), 2)
    # In the first patch most pixels have one of the two classes without a word, in the second some.
    classes[:6, :16] = 1
    classes[6:12, :16] = 4
    classes[:6, 16:32] = 4
    numbers = class_map(encoder, classes)
    assert numbers.tolist() == [2, 1, *[1] * 14]
    sources = {"class": lambda images: numbers[None, :, None], "depth": lambda images: torch.ones(1, 16, 1)}
    source = WordSource({"class": encoder.words, "depth": ["near", "far"]}, sources)
    assert source([])[0, :3].tolist() == [[-1, 1], [1, 1], [1, 1]]
    # Alone it would have the zero vector as its target.
    with pytest.raises(ValueError, match="a patch has no word of any kind, and so no target: give its class a word"):
        WordSource({"class": encoder.words}, {"class": sources["class"]})([])


def test_detrs_panoptic_models_are_segmenters():
    """Its outputs have names of their own, and scores of queries where others have those of pixels."""
    encoder = ClassWordsEncoder.__new__(ClassWordsEncoder)
    encoder.segmenter = None
    encoder.threshold = None
    logits = torch.tensor([[[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 0, 9]]])  # two classes are seen, and nothing
    masks = torch.full((1, 3, 2, 2), -9.0)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 2] = 9
    output = ModelOutput(logits=logits, pred_boxes=torch.zeros(1, 3, 4), pred_masks=masks)
    encoder.model = lambda pixels: output
    scores = encoder._scores(torch.zeros(1, 3, 8, 8))
    assert scores.shape == (1, 3, 2, 2) and scores[0].argmax(0).tolist() == [[0, 0], [1, 1]]


def test_a_model_of_instances_says_nothing_of_what_lies_between_them(folders):
    """It has no class for that: each pixel had the likeliest of what it doesn't see there."""
    encoder = ClassWordsEncoder.from_pretrained(folders / "seg", grid=GRID, words=COLORS, threshold=0.5)
    scores = torch.full((5, SIZE, SIZE), 0.01)
    scores[2, :, :32] = 0.9
    # In half of the columns nothing is likely; in the second row of patches what is, is just not likely enough.
    scores[1, :, 32:] = 0.02
    scores[2, 16:32, :32] = 0.49
    none = len(encoder.words)
    numbers = encoder._words_of_patches(scores).reshape(GRID, GRID)
    expected = torch.full((GRID, GRID), none)
    expected[[0, 2, 3], :2] = encoder.words.index("blue")
    assert numbers.equal(expected)
    # Without one all patches have a word.
    plain = ClassWordsEncoder.from_pretrained(folders / "seg", grid=GRID, words=COLORS)
    assert plain._words_of_patches(scores).max() < none
    assert "threshold" not in plain.view
    other = ClassWordsEncoder.from_pretrained(folders / "seg", grid=GRID, words=COLORS, threshold=0.4)
    assert len({plain.fingerprint, encoder.fingerprint, other.fingerprint}) == 3


def test_scores_of_pixels_are_held_against_a_threshold_as_probabilities(tmp_path):
    """Logits as they are would all pass 0.5, or none."""
    torch.manual_seed(0)
    for labels in (["cat"], ["cat", "dog"]):
        names = dict(enumerate(labels))
        config = SegformerConfig(**SEGFORMER, id2label=names, label2id={label: i for i, label in names.items()})
        folder = tmp_path / str(len(labels))
        SegformerForSemanticSegmentation(config).eval().save_pretrained(folder)
        save_preprocessing(folder)
        encoder = ClassWordsEncoder.from_pretrained(folder, grid=GRID, threshold=0.5)
        logits = torch.zeros(1, len(labels), GRID, GRID)
        # Of one class these are the odds of being there; of two, beside the other's, which are even.
        logits[0, 0, 0] = 2.0
        logits[0, 0, 1] = -2.0
        encoder.model = lambda pixels, logits=logits: ModelOutput(logits=logits)
        pixels = torch.zeros(1, 3, SIZE, SIZE)
        numbers = encoder._features(pixels).reshape(GRID, GRID)
        below = 1  # no word, or the second class
        assert numbers[:2, 0].tolist() == [0, below]
        # What has overflowed is no certainty.
        logits[0, 0, 3, 3] = math.inf
        assert encoder._features(pixels).isnan().all()
    # A class that has no other beside it would be each pixel's.
    with pytest.raises(ValueError, match=r"it has a single class, which .* a threshold, as 0\.5"):
        ClassWordsEncoder.from_pretrained(tmp_path / "1", grid=GRID)
    with pytest.raises(ValueError, match="it has a single class"):
        ClassWordsEncoder.list_words(tmp_path / "1")


def test_a_threshold_is_held_against_the_surest_query():
    """Scores of queries add up: many that are unsure of the same thing passed together."""
    unsure = math.log(0.3 / 0.7)
    # Four queries over two columns of pixels; of two classes the last logit is that of nothing.
    logits = torch.tensor([[[unsure, -99.0, 0.0]] * 3 + [[-99.0, 9.0, 0.0]]])
    masks = torch.full((1, 4, 2, 2), 99.0)
    masks[0, :3, :, 1] = -99  # the three unsure ones see the left column, the sure one the right
    masks[0, 3, :, 0] = -99
    summed = scores_of_masks(logits, masks)
    assert summed[0, 0, 0, 0] == pytest.approx(0.9) and summed[0, 1, 0, 1] > 0.99
    surest = scores_of_masks(logits, masks, of_one_query=True)
    assert surest[0, 0, 0, 0] == pytest.approx(0.3) and surest[0, 1, 0, 1] > 0.99
    assert surest.max() <= 1 and surest[0, 0, 0, 1] < 1e-6

    # In the miniature's OneFormer, and in a model of queries by transformers' names.
    words = ["sky", "floor", "red", "blue", "green", "yellow", "purple", "cyan"]
    options = {"grid": 8, "task_inputs": [1, 1, 1, 1], "words": words}
    encoder = ClassWordsEncoder.from_pretrained(WEIGHTS / "seg", threshold=0.999999, **options)
    assert (encoder.encode(random_images(2)) == len(words)).any()
    assert encoder._scores(encoder.pixel_values(random_images(2))).max() <= 1
    encoder = ClassWordsEncoder.__new__(ClassWordsEncoder)
    encoder.segmenter = None
    encoder.threshold = 0.5
    output = ModelOutput(class_queries_logits=logits, masks_queries_logits=masks)
    encoder.model = lambda pixels: output
    assert encoder._scores(torch.zeros(1, 3, 8, 8)).equal(surest)


def test_another_depth_model(tmp_path):
    torch.manual_seed(0)
    config = DPTConfig(
        image_size=SIZE, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=48, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    DPTForDepthEstimation(config).eval().save_pretrained(tmp_path)
    save_preprocessing(tmp_path)
    encoder = DepthWordsEncoder.from_pretrained(tmp_path, grid=GRID)
    assert encoder.larger_is_closer
    numbers = encoder.encode(random_images(2)).long()
    assert [sorted(one.bincount().tolist()) for one in numbers[..., 0]] == [[3, 3, 3, 3, 4]] * 2
    # Published ones lack weights of a layer that is never called.
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "fusion_stage.layers.0.residual_layer1." not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert DepthWordsEncoder.from_pretrained(tmp_path, grid=GRID).encode(random_images(2)).equal(numbers.float())
    kept.pop("neck.fusion_stage.layers.0.residual_layer2.convolution1.weight")
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for .*layers\.0\.residual_layer2\.convolution1\.weight"):
        DepthWordsEncoder.from_pretrained(tmp_path, grid=GRID)


def test_a_teachers_fields_that_do_not_fit_are_refused(folders, tmp_path):
    seg, depth = folders / "seg", folders / "depth"
    for path, encoder, options, message in [
        (seg, ClassWordsEncoder, {}, r"its classes have no names \(LABEL_0\): give its teacher words"),
        (seg, ClassWordsEncoder, {"words": ["a"]}, "1 words for 5 classes: give one for each"),
        (seg, ClassWordsEncoder, {"words": ["a", "b", "", "d", "e"]}, "'LABEL_2' has the word '': give text, or null"),
        (seg, ClassWordsEncoder, {"words": ["a", 3, "c", "d", "e"]}, "'LABEL_1' has the word 3: give text, or null"),
        (seg, ClassWordsEncoder, {"words": [None] * 5}, "none of its classes has a word"),
        (seg, ClassWordsEncoder, {"words": COLORS, "threshold": 50}, "threshold 50: give a probability between 0 and"),
        (seg, ClassWordsEncoder, {"words": COLORS, "threshold": True}, "threshold True: give a probability"),
        (seg, ClassWordsEncoder, {"words": {"cat": "pet"}}, r"words for \['cat'\], which are none of its classes"),
        (depth, ClassWordsEncoder, {"words": {}}, "no names|depth_anything, no segmentation model"),
        (seg, DepthWordsEncoder, {}, "is a oneformer, no depth model"),
        (depth, DepthWordsEncoder, {"words": ["near"]}, "give two or more different ones"),
        (depth, DepthWordsEncoder, {"bins": [1.0, 0.0]}, 'give "quantiles", or'),
        (depth, DepthWordsEncoder, {"bins": "log"}, 'give "quantiles", or'),
        (depth, DepthWordsEncoder, {"size": 60}, "size 60 is no multiple of its patches' 8 pixels: give 56 or 64"),
        (depth, DepthWordsEncoder, {"size": 5}, "size 5 is no multiple of its patches' 8 pixels: give 8$"),
    ]:
        with pytest.raises(ValueError, match=message):
            encoder.from_pretrained(path, grid=GRID, **options)
    # Before weights are read.
    foreign = {"words": {**entries(folders)["words"], "depth": entries(folders, threshold=0.5)["words"]["depth"]}}
    with pytest.raises(ValueError, match="has the option 'threshold', which depth_words doesn't know: leave it out"):
        make_teachers([TASK], foreign)["words.depth"].check()
    with pytest.raises(ValueError, match=r"teachers\['words'\] has none for \['depth'\]: give entries for the kinds"):
        make_teachers([TASK], {"words": {"class": entries(folders)["words"]["class"]}})
    wrong = {"class": {"encoder": "oneformer", "path": str(seg)}, "depth": entries(folders)["words"]["depth"]}
    with pytest.raises(
        ValueError, match=r"teachers\['words\.class'\] is .* as encoder one of \['class_words', 'depth"
    ):
        make_teachers([TASK], {"words": wrong})


@pytest.fixture
def fields(folders, tiny_parts, tmp_path) -> dict:
    """Of a run on six images with words from two teachers."""
    names = [f"{i}.png" for i in range(6)]
    data = write_llava(tmp_path, [llava_sample(i, name) for i, name in enumerate(names)], names)
    return {
        "data": str(data),
        "vision_tower": tiny_parts.vision_tower,
        "language_model": tiny_parts.language_model,
        "tasks": [TASK],
        "teachers": entries(folders),
        "target_cache": str(tmp_path / "targets"),
        "target_fill": True,
        "output_dir": str(tmp_path / "run"),
        "stage": "pretrain",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def run(fields: dict, **changes):
    return train(OlaVlmArguments(**{**fields, **changes}))


def test_cached_words_train_as_teachers_do_and_are_small(fields, folders, tmp_path):
    cached = losses(run(fields))
    assert len(cached) == 2 and all(step["loss/words/0/mse"] > 0 for step in cached)
    on_the_fly = losses(run(fields, target_cache=None, target_fill=False, output_dir=str(tmp_path / "other")))
    for step, expected in zip(cached, on_the_fly, strict=True):
        assert step == pytest.approx(expected, rel=1e-5)
    assert losses(run(fields, output_dir=str(tmp_path / "third"), target_fill=False)) == cached

    caches = open_caches(fields["target_cache"], make_teachers([TASK], fields["teachers"]))
    assert list(caches) == ["words.class", "words.depth"]
    for cache in caches.values():
        assert cache.dtype == torch.uint8 and len(cache) == 6 and cache.folder.name.endswith("-uint8")
    notes = [json.loads(path.read_text()) for path in Path(fields["target_cache"]).glob("*_words-*.json")]
    assert sorted(note["words"] for note in notes) == [["near", "far"], ["red", "green", "blue", "near"]]


def test_an_image_of_the_papers_grid_takes_less_than_two_kilobytes(folders, tmp_path):
    task = {**TASK, "target_length": 576}
    caches = open_caches(tmp_path, make_teachers([task], entries(folders)))
    size = 0
    for cache in caches.values():
        cache.store([f"{i:032x}" for i in range(64)], torch.randint(2, (64, 576, 1)).float())
        cache.flush()
        size += sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
        assert cache.read([f"{5:032x}"]).shape == (1, 576, 1)
    assert size / 64 < 2000


def test_beside_a_word_that_is_alone_others_do_not_count():
    words = {"class": ["red", ".", "sky"], "depth": ["near", "far"]}
    numbers = {
        "class": torch.tensor([[[0], [1], [2], [0]]], dtype=torch.uint8),
        "depth": torch.tensor([[[1], [1], [0], [0]]], dtype=torch.uint8),
    }
    sources = {kind: (lambda images, kind=kind: numbers[kind]) for kind in words}
    assert WordSource(words, sources)([]).tolist() == [[[0, 1], [1, 1], [2, 0], [0, 0]]]
    assert WordSource(words, sources, alone=["."])([]).tolist() == [[[0, 1], [1, -1], [2, 0], [0, 0]]]
    assert WordSource(words, sources, alone=[".", "sky"])([]).tolist() == [[[0, 1], [1, -1], [2, -1], [0, 0]]]
    assert WordSource(words, sources, alone=["near"])([]).tolist() == [[[0, 1], [1, 1], [-1, 0], [-1, 0]]]
    with pytest.raises(ValueError, match=r"night.*none of the words"):
        WordSource(words, sources, alone=["night"])


def test_a_patch_has_the_depth_of_what_covers_most_of_it():
    encoder = DepthWordsEncoder.__new__(DepthWordsEncoder)
    encoder.grid = 2
    depth = torch.tensor([[[1.0, 1, 5, 5], [1, 9, 5, 5], [2, 2, 3, 3], [2, 2, 3, 7]]])
    assert encoder._median_of_patches(depth).tolist() == [[1.0, 5.0, 2.0, 3.0]]


def test_words_of_a_teacher_that_fails_name_their_row_only(make_model, tmp_path):
    """As features that aren't finite do, and bad rows are dropped."""
    model, processor = make_model([TASK])
    rows = random_rows(16)
    poisoned = rows[5]["images"][0].tobytes()

    def depth(images):
        numbers = random_words("depth", images)
        numbers[[image.tobytes() == poisoned for image in images]] = math.nan
        return numbers

    source = WordSource(TEST_WORDS, {"class": lambda images: random_words("class", images), "depth": depth})
    trainer = make_trainer(model, processor, tmp_path, rows=rows, sources={"words": source})
    with pytest.raises(FloatingPointError, match=r"task 'words'.* rows \['row-5'\] are not finite"):
        trainer.data_collator(rows[4:8])
    lenient = make_trainer(
        model, processor, tmp_path, rows=rows, sources={"words": source}, drop_bad_rows=True
    ).data_collator
    batch = lenient(rows[4:8])
    assert batch["row_ids"] == ["row-4", "row-6", "row-7"]
    assert batch["bad_rows"] == ["row row-5: task 'words': its teacher's targets are not finite"]
    assert batch["targets"]["words"].dtype == torch.int32
    assert batch["targets"]["words"].equal(lenient([rows[4], *rows[6:8]])["targets"]["words"])


def test_another_list_of_words_is_refused(fields):
    run(fields)
    other = {**fields["teachers"]["words"]["class"], "words": ["red", "green", "blue", "near", "far"]}
    changed = {"words": {**fields["teachers"]["words"], "class": other}}
    with pytest.raises(ValueError, match=r"lacks targets of 6 of 6 images \(6 of words\.class\): compute them by"):
        run(fields, teachers=changed, target_fill=False, output_dir=fields["output_dir"] + "2")
    source = WordSource({"class": ["red"]}, {"class": lambda images: torch.full((1, 4, 1), 2)})
    with pytest.raises(ValueError, match="a teacher of 'class' words gives the number 2, but has 1 words"):
        source([random_image(0)])


def test_a_cache_that_was_moved_knows_its_words(fields, folders, tmp_path):
    run(fields)
    gone = json.loads(json.dumps(fields["teachers"]).replace(str(folders), str(tmp_path / "gone")))
    for kind in ("class", "depth"):
        (note,) = Path(fields["target_cache"]).glob(f"{kind}_words-*.json")
        before = make_teachers([TASK], fields["teachers"])[f"words.{kind}"]
        after = make_teachers([TASK], gone)[f"words.{kind}"]
        note.rename(after._note(fields["target_cache"]))
        assert after.words(fields["target_cache"]) == before.words()
    again = run(fields, teachers=gone, target_fill=False, output_dir=fields["output_dir"] + "2")
    assert losses(again)[0]["loss/words/0/mse"] > 0


def test_a_word_that_the_tokenizer_does_not_know_is_refused_before_anything_slow(fields, monkeypatch):
    monkeypatch.setattr("ola_vlm.train.load_model", None)
    depth = {**fields["teachers"]["words"]["depth"], "words": ["near", "distant"]}
    changed = {"words": {**fields["teachers"]["words"], "depth": depth}}
    with pytest.raises(ValueError, match="the tokenizer can't say the word 'distant': give another one"):
        run(fields, teachers=changed)


def test_words_that_do_not_fit_are_refused_before_anything_slow(fields, monkeypatch):
    """Known from the configurations: a word of `alone` that nobody says, motion of words."""
    monkeypatch.setattr("ola_vlm.train.load_model", None)
    with pytest.raises(ValueError, match=r"alone are \['sky'\], which are none of the words: choose from"):
        run(fields, tasks=[{**TASK, "alone": ["sky"]}])
    seg = {**fields["teachers"]["words"]["class"], "motion": True}
    with pytest.raises(ValueError, match=r"teachers\.words\.class: words have no motion"):
        run(fields, teachers={"words": {**fields["teachers"]["words"], "class": seg}})
    # Beside another kind of words a class may have none; alone its patches would have no target.
    seg = {**fields["teachers"]["words"]["class"], "words": ["red", None, "blue", "red", "near"]}
    with pytest.raises(ValueError, match=r"teachers\.words: a patch may get no word at all: give a word in place"):
        run(fields, tasks=[{**TASK, "words": ["class"]}], teachers={"words": {"class": seg}})


def test_another_number_of_tokens_is_refused_before_targets_are_computed(fields, monkeypatch):
    monkeypatch.setattr("ola_vlm.train.target_sources", None)
    told = r"an image has 16 tokens, its targets 64 positions: .* set target_length to 16"
    with pytest.raises(ValueError, match=told):
        run(fields, tasks=[{**TASK, "target_length": 64}])


def test_shuffled_words_are_another_images(fields, tmp_path):
    mine = losses(run(fields))
    others = losses(run(fields, shuffle_targets=True, output_dir=str(tmp_path / "shuffled")))
    assert mine[0]["loss/ntp"] == others[0]["loss/ntp"]
    assert mine[0]["loss/words/0/mse"] != others[0]["loss/words/0/mse"]


def test_the_command_fills_words_and_says_what_they_take(fields, capsys):
    shown = {name: fields[name] for name in ("data", "target_cache", "output_dir")}
    shown |= {"tasks": json.dumps([TASK]), "teachers": json.dumps(fields["teachers"]), "use_cpu": "true"}
    cli.main(["targets", *(f"--{name}={value}" for name, value in shown.items())])
    printed = capsys.readouterr().out
    assert "words.class: 6 images, " in printed and "words.depth: 6 images, " in printed


# Words to tokens


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A BPE whose words begin with a mark, also at a text's begin."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([WORDS * 3, "very close"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([WORDS * 3, "a very close cube and a far cube"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("make", [sentencepiece_like, byte_level, make_tokenizer])
@pytest.mark.parametrize("word", ["cube", "near far", "."])
def test_a_word_has_the_tokens_that_it_has_inside_a_sentence(make, word):
    tokenizer = make()
    ids = encode_word(tokenizer, word)
    sentence = tokenizer(f"the {word}", add_special_tokens=False)["input_ids"]
    assert ids == sentence[len(tokenizer("the", add_special_tokens=False)["input_ids"]) :]


def test_words_of_different_lengths_are_padded():
    tokenizer = make_tokenizer()
    red, blue, cube = tokenizer.convert_tokens_to_ids(["red", "blue", "cube"])
    assert encode_words(tokenizer, ["red", "blue cube"]).tolist() == [[red, -1], [blue, cube]]
    with pytest.raises(ValueError, match="can't say the word 'elephant'"):
        encode_words(tokenizer, ["red", "elephant"])


# Tokens to embeddings


def test_targets_are_sums_of_the_language_models_own_embeddings(make_model, tmp_path):
    """By hand, from the vocabulary's rows."""
    model, processor = make_model([TASK])
    trainer = make_trainer(model, processor, tmp_path)
    rows = random_rows(3, [1, 0, 2])
    batch = trainer.data_collator(rows)
    table = model.get_input_embeddings().weight.detach()
    ids = processor.tokenizer.convert_tokens_to_ids
    words = {kind: torch.stack([table[ids(word.split())].mean(0) for word in TEST_WORDS[kind]]) for kind in TASK_KINDS}
    images = [image for row in rows for image in row["images"]]
    target = sum(words[kind][random_words(kind, images)[..., 0].long()] for kind in TASK_KINDS)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    prediction = model(**inputs, output_predictions=True).predictions["words"][0]
    variance = target.flatten(0, 1).var(0, correction=0).mean()
    expected = (prediction - target).square().mean() / variance
    trainer.compute_loss(model, batch)
    # Of evaluation, where a loss counts for its images.
    assert not model.training and trainer._counts["eval"]["loss/words/0/mse"] == 3
    found = trainer._sums["eval"]["loss/words/0/mse"] / 3
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)


TASK_KINDS = ("class", "depth")


def test_scaled_embeddings_count_as_the_lookup_gives_them(tiny_parts):
    """Gemma multiplies rows by the root of the width."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer)}
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**sizes))
    model, _ = build_ola_vlm(tiny_parts.vision_tower, gemma, tokenizer, tasks=[TASK])
    ids = encode_words(tokenizer, ["red", "blue cube"])
    rows = model.get_input_embeddings().weight.detach()
    rows[0] = 1.0  # padding's, which is zero: it must not count for a shorter word
    (table,) = model.word_embeddings({"words": [ids]})["words"]
    assert model.lookup_scale(rows.dtype) == pytest.approx(32**0.5, rel=1e-3)
    torch.testing.assert_close(table[0], rows[ids[0, 0]] * 32**0.5, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(table[1], rows[ids[1]].mean(0) * 32**0.5, rtol=1e-3, atol=1e-6)
    assert not table.requires_grad


def test_noise_that_training_adds_to_embeddings_is_none_of_the_targets(make_model):
    """NEFTune's, which acts where words are looked up."""
    model, processor = make_model([TASK])
    ids = encode_words(processor.tokenizer, ["red", "blue cube"])
    (expected,) = model.eval().word_embeddings({"words": [ids]})["words"]
    activate_neftune(model, neftune_noise_alpha=5.0)
    model.train()
    lookup = model.get_input_embeddings()
    assert not lookup(ids[1:]).equal(lookup.weight[ids[1:]])
    (found,) = model.word_embeddings({"words": [ids]})["words"]
    assert found.equal(expected)
    assert lookup.training


class CastByDeepSpeed:
    """What transformers' trainer does to a batch if DeepSpeed trains in bf16."""

    _prepare_input = Trainer._prepare_input
    args = SimpleNamespace(device="cpu")
    is_deepspeed_enabled = True
    config = SimpleNamespace(dtype=lambda: torch.bfloat16)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=config)))


def test_numbers_of_words_are_never_rounded(make_model, tmp_path):
    """bf16 has no 257: it would be another word."""
    numbers = torch.arange(250, 266)
    words = [" ".join(pair) for pair in itertools.product(WORDS.split(), repeat=2)]
    source = WordSource({"class": words}, {"class": lambda images: numbers.float().expand(len(images), 16)[..., None]})
    model, processor = make_model([{**TASK, "words": ["class"]}])
    trainer = make_trainer(model, processor, tmp_path, sources={"words": source})
    batch = trainer.data_collator(random_rows(3, [1, 0, 2]))
    empty = trainer.data_collator(random_rows(1, 0))
    trainer._attach_step_targets([empty, batch], torch.device("cpu"))
    cast = CastByDeepSpeed()._prepare_input(batch)
    assert cast["pixel_values"].dtype == torch.bfloat16
    table = torch.randn(len(words), 4)
    for found in (cast["targets"]["words"], cast["step_targets"]["columns"]["words"]):
        assert combine_words(found, [table], "sum").equal(table[numbers].expand(3, -1, -1))


def test_a_source_without_words_is_refused(make_model, tmp_path):
    model, processor = make_model([TASK])
    with pytest.raises(ValueError, match=r"task .words. has words as targets: give it a .*WordSource"):
        make_trainer(model, processor, tmp_path, sources={"words": lambda images: torch.zeros(len(images), 16, 2)})
