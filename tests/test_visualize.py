"""Predicted embeddings decoded into pictures, the figures and the page, and the command that makes them."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_teachers import GRID, random_images, save_tiny_teachers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ola_vlm.probing import features as features_module
from ola_vlm.probing.features import find_teachers
from ola_vlm.probing.fit import fit
from ola_vlm.probing.pictures import (
    NOTHING_SEEN,
    TARGET,
    LayerViewer,
    NearestImages,
    UnclipImages,
    class_color,
    draw_depth,
    feature_decoder,
    note_of,
    square,
)
from ola_vlm.probing.probes import centered_cosine, load_probes
from ola_vlm.probing.ridge import RidgeFit
from ola_vlm.probing.states import StateReader
from ola_vlm.probing.visualize import compared, display_names, main, page, pictures_figure
from ola_vlm.targets.encoders import ENCODERS, open_image
from ola_vlm.targets.statistics import TargetStatistics
from ola_vlm.training.run_record import load_statistics

NAMES = {"gen": "clip_image", "depth": "depth_anything", "seg": "oneformer"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny_teachers(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def encoders(folders):
    return {task: ENCODERS[name].from_pretrained(folders[name], grid=GRID) for task, name in NAMES.items()}


@pytest.fixture(scope="module")
def checkpoint(make_model, encoders, folders, tmp_path_factory):
    """A model with predictors for the three teachers, its target statistics and run.json; images beside it."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"num_task_tokens": 1, "predictor_heads": 2, "predictor_head_dim": 8}
    layers = {"gen": [3], "depth": [2, 4], "seg": [1]}
    tasks = [
        {"name": task, "layers": layers[task], "target_length": one.target_length, "target_dim": one.target_dim}
        | sizes
        for task, one in encoders.items()
    ]
    model, processor = make_model(tasks)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for task, one in encoders.items():
        statistics = TargetStatistics.fit([one.encode(random_images(4))])
        statistics.save(folder / "target_statistics" / f"{task}.safetensors")
    teachers = {task: {"encoder": name, "path": str(folders[name])} for task, name in NAMES.items()}
    (folder / "run.json").write_text(json.dumps({"teachers": teachers, "tasks": tasks, "data": None}))
    (folder / "images").mkdir()
    for i, image in enumerate(random_images(5, seed=3)):
        image.save(folder / "images" / f"{i}.png")
    (folder / "images" / "notes.txt").write_text("no picture")
    return folder


def same(picture: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(picture), np.asarray(other))


def test_square():
    squared = np.asarray(square(Image.new("RGB", (5, 2), "white"), 0))
    assert squared.shape == (5, 5, 3)
    assert (squared[1:3] == 255).all() and not squared[0].any() and not squared[3:].any()


def test_draw_depth():
    picture = np.asarray(draw_depth(np.array([[0.0, 1.0], [2.0, 4.0]]))).astype(int).sum(-1)
    assert picture[0, 0] < picture[0, 1] < picture[1, 0] < picture[1, 1]  # closer is brighter
    assert same(draw_depth(np.full((2, 2), 3.0)), draw_depth(np.zeros((2, 2))))  # no range, no nan


def test_class_colors():
    assert class_color(3, "green") == (0, 128, 0)
    colors = {class_color(i, f"class {i}") for i in range(133)}
    assert len(colors) == 133


def test_decoders_show_what_the_teachers_decode(encoders):
    images = random_images(2, size=(90, 30))
    depth, seg = feature_decoder(encoders["depth"]), feature_decoder(encoders["seg"])
    target = encoders["depth"].encode(images)
    assert same(depth.decode(target, images)[1], draw_depth(encoders["depth"].decode(target)[1].numpy()))
    own = encoders["depth"].model(encoders["depth"].pixel_values(images)).predicted_depth.detach()
    assert same(depth.teacher_output(images)[0], draw_depth(own[0].numpy()))
    classes = encoders["seg"].decode(None, images)
    picture = np.asarray(seg.teacher_output(images)[0])
    for i, color in enumerate(seg.legend.values()):
        np.testing.assert_array_equal((picture == color).all(-1), classes[0].numpy() == i)
    assert "teacher-assisted" in seg.caption


def test_segmentation_is_drawn_from_the_features_alone(encoders):
    """OneFormer's decoder draws the objects whatever the features are; these pictures are gray for who sees nothing,
    the same for every image, and as colorful as the target only for the target."""
    images = random_images(2)
    seg = feature_decoder(encoders["seg"])
    targets = encoders["seg"].encode(images)
    mean = targets.mean(0) + 0.1
    nothing = seg.decode(mean.expand_as(targets), images, targets, mean)
    assert same(nothing[0], nothing[1]) and set(np.asarray(nothing[0]).ravel().tolist()) == {128}
    best = seg.decode(targets, images, targets, mean)
    assert not same(best[0], best[1]) and np.asarray(best[0]).std() > 20
    half = seg.decode(mean + (targets - mean) / 2, images, targets, mean)
    assert abs(np.asarray(half[0]).std() / np.asarray(best[0]).std() - 0.5) < 0.1
    assert same(best[0], seg.decode(targets, images[::-1], targets, mean)[0])  # nothing of the image itself
    assert same(seg.decode(targets, images)[0], seg.decode(targets, images, targets)[0])  # no mean target is known


def test_scores_are_under_the_pictures(encoders):
    images = random_images(2)
    targets = {task: encoder.encode(images) for task, encoder in encoders.items()}
    means = {task: target.mean(0) + 0.1 for task, target in targets.items()}
    noise = torch.Generator().manual_seed(0)
    guesses = {task: target + torch.randn(target.shape, generator=noise) for task, target in targets.items()}
    layers = {task: {2: guess} for task, guess in guesses.items()}
    viewer = LayerViewer(lambda images: layers, encoders, NearestImages(images, encoders["gen"]), means=means)
    shown = viewer.pictures(images)
    for task, columns in shown.items():
        cosines = centered_cosine(guesses[task], targets[task], means[task]).tolist()
        for n, cosine in enumerate(cosines):
            assert note_of(columns["layer 2"][n]).endswith(f"cosine {cosine:+.2f}")
            assert note_of(columns[NOTHING_SEEN][n]).endswith("cosine +0.00")
    assert list(shown["seg"]) == ["image", "teacher", TARGET, NOTHING_SEEN, "layer 2"]
    assert note_of(shown["depth"][TARGET][0]) == "cosine +1.00" and note_of(shown["depth"]["teacher"][0]) == ""
    assert note_of(shown["gen"]["teacher"][0]) == "near +1.00"  # the images themselves are among those
    assert "nothing seen" in viewer.caption("depth")
    unknown = LayerViewer(lambda images: layers, encoders)
    assert note_of(unknown.pictures(images)["depth"]["layer 2"][0]).startswith("plain cosine ")
    assert "no mean target is known" in unknown.caption("depth") and "can't be marked" in unknown.remark


def test_rows_of_several_models():
    def picture(n):
        return Image.new("L", (1, 1), n)

    shown = {
        "LLaVA": {"depth": {"image": [picture(1), picture(2)], "layer 2": [picture(3), picture(4)]}},
        "OLA-VLM": {"depth": {"image": [picture(1), picture(2)], "layer 10": [picture(5), picture(6)]}},
    }
    grid = compared(shown)["depth"]
    assert list(grid.columns) == ["image", "layer 2", "layer 10"]
    assert grid.labels == ["LLaVA", "OLA-VLM"] * 2
    values = {name: [one and one.getpixel((0, 0)) for one in column] for name, column in grid.columns.items()}
    assert values == {"image": [1, 1, 2, 2], "layer 2": [3, None, 4, None], "layer 10": [None, 5, None, 6]}
    assert display_names(["a/llava", "b/ola_vlm/"]) == ["LLaVA", "OLA-VLM"]
    assert display_names(["a/run", "b/run"]) == ["a/run", "b/run"]
    assert display_names(["a", "a"]) == ["a (1)", "a (2)"]


def test_nearest_images(encoders):
    images = random_images(6)
    nearest = NearestImages(images, encoders["gen"])
    embeddings = encoders["gen"].encode(images)[:, 0]
    mean = embeddings.mean(0)
    found = nearest(mean + 3 * (embeddings[[4, 1]] - mean))  # the length does not matter
    assert same(found[0], images[4]) and same(found[1], images[1])
    assert note_of(found[0]) == "near +1.00"
    away = nearest(2 * nearest.nearest.mean - embeddings[:1])  # nothing near it
    assert float(note_of(away[0]).split()[1]) < 0.9
    with pytest.raises(ValueError, match="no images"):
        NearestImages([], encoders["gen"])


def test_nearest_is_measured_from_the_mean_of_the_set():
    """All embeddings lie close together; what tells them apart is their difference to the mean."""
    mean = torch.tensor([10.0, 0, 0])
    u = torch.tensor([0.0, 1, 0])
    w = torch.tensor([0.0, 0, 1])
    of_image = {0: mean + 0.01 * u, 1: mean - 0.01 * u, 2: mean + 3 * w, 3: mean - 3 * w}
    pictures = [Image.new("RGB", (4, 4), (10 * i, 0, 0)) for i in of_image]

    def encode(images):
        return torch.stack([of_image[image.getpixel((0, 0))[0] // 10] for image in images])[:, None]

    nearest = NearestImages(pictures, SimpleNamespace(encode=encode))
    # Measured from 0, image 2 would be nearer to it: both are far from the mean.
    (found,) = nearest((mean + 10 * (0.8 * u + 0.6 * w))[None])
    assert same(found, pictures[0]) and note_of(found) == "near +0.80"


@pytest.fixture(scope="module")
def unclip_folder(tmp_path_factory):
    """A random unCLIP pipeline in diffusers' own classes."""
    import diffusers
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=24,  # the embedding and its noise level's
        **blocks,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    words = {f"<{i}>": i for i in range(8)} | {"<|startoftext|>": 8, "<|endoftext|>": 9}
    folder = tmp_path_factory.mktemp("unclip")
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    from transformers import CLIPTokenizer

    diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=12)
        ),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=12),
        image_noising_scheduler=diffusers.DDPMScheduler(),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=10, max_position_embeddings=8)),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        vae=vae,
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def test_unclip_images(unclip_folder):
    draw = UnclipImages(str(unclip_folder), steps=2)
    assert type(draw.pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    embeddings = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    first, second = draw(embeddings)
    again = draw(embeddings[:1])
    assert same(first, again[0])  # the same noise for every embedding, whatever its batch mates
    assert first.size == second.size and not same(first, second)
    assert draw.caption == "images by unCLIP, 2 DPM-Solver steps"


def test_unclip_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"unCLIP \(some/pipeline\) needs diffusers: `pip install diffusers`"):
        UnclipImages("some/pipeline")


def test_viewer(encoders, checkpoint):
    images = random_images(2, size=(40, 64))

    def features(images):  # the teachers' own, at layers that a viewer must choose from
        return {task: dict.fromkeys(range(20), one.encode(images)) for task, one in encoders.items()}

    viewer = LayerViewer(features, encoders)
    assert list(viewer.left_out) == ["gen"] and "--images_for_gen" in viewer.left_out["gen"]
    shown = viewer.pictures(images)
    assert list(shown) == ["depth", "seg"]
    layers = [f"layer {i}" for i in (0, 3, 5, 8, 11, 14, 16, 19)]
    assert list(shown["depth"]) == ["image", "teacher", "decoded target", *layers]
    assert same(shown["seg"]["layer 3"][1], shown["seg"]["decoded target"][1])
    assert shown["depth"]["image"][0].size == (64, 64)
    chosen = LayerViewer(features, encoders, NearestImages(images, encoders["gen"]), layers=[7])
    shown = chosen.pictures(images)
    assert list(shown["gen"]) == ["image", "teacher", "layer 7"]
    assert same(shown["gen"]["layer 7"][0], square(images[0]))


def test_predictions_are_restored_before_they_are_decoded(encoders, checkpoint):
    from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
    from ola_vlm.processing_ola_vlm import OlaVlmProcessor

    model = OlaVlmForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = OlaVlmProcessor.from_pretrained(checkpoint)
    viewer = LayerViewer.load(checkpoint, model, processor, find_teachers(None, checkpoint))
    images = random_images(2)
    of_layer = viewer.features(images)["depth"][4]
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text] * 2, images=images, return_tensors="pt", add_special_tokens=False)
    raw = model(**inputs, output_predictions=True).predictions["depth"][4]
    statistics = TargetStatistics.load(checkpoint / "target_statistics" / "depth.safetensors")
    torch.testing.assert_close(of_layer, statistics.restore(raw).detach())
    assert not torch.allclose(of_layer, raw, atol=0.1)


def test_figure_and_legend(tmp_path):
    image, red = Image.new("RGB", (8, 4)), Image.new("RGB", (8, 4), (255, 0, 0))
    legend = {"a": (255, 0, 0), "b": (0, 0, 255)}
    pictures_figure(tmp_path / "new" / "seg.png", {"image": [image], "layer 2": [red]}, "a title " * 20, legend)
    drawn = np.asarray(Image.open(tmp_path / "new" / "seg.png").convert("RGB")).reshape(-1, 3)
    drawn = set(map(tuple, drawn.tolist()))
    assert (255, 0, 0) in drawn and (0, 0, 255) not in drawn  # only what occurs is in the legend
    with pytest.raises(ValueError):  # 2 pictures for 1 image
        pictures_figure(tmp_path / "x.png", {"image": [image], "layer 2": [red, red]}, "", {})


def test_command(checkpoint, tmp_path, capsys):
    images = [str(checkpoint / "images" / f"{i}.png") for i in (0, 2)]
    main([str(checkpoint), *images, "--out", str(tmp_path), "--images_for_gen", str(checkpoint / "images")])
    assert {file.name for file in tmp_path.iterdir()} == {"gen.png", "depth.png", "seg.png", "layers.html"}
    text = (tmp_path / "layers.html").read_text()
    assert text.count("data:image/png;base64,") == 2 * (4 + 6 + 5)
    assert text.count("mean target (nothing seen)<br><small>") == 2 * 3 and "cosine +1.00" in text
    assert "the nearest of 5 images by embedding" in text and "teacher-assisted" in text
    assert np.asarray(open_image(tmp_path / "depth.png")).std() > 20
    main([str(checkpoint), images[0], "--out", str(tmp_path / "two")])
    assert "gen is left out: its embeddings want" in capsys.readouterr().out


def test_probes_show_every_layer(checkpoint, make_model, encoders, tmp_path, capsys):
    """A plain LLaVA, which has no predictors; its probes lie beside it."""
    model, processor = make_model([])
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    tasks = [
        {"name": task, "target_length": one.target_length, "target_dim": one.target_dim}
        for task, one in encoders.items()
    ]
    fitter = RidgeFit(tasks, 5, 32, {"prompt": "what is this", "square": True})
    images = random_images(5, seed=3)
    fit(fitter, StateReader(model, processor, "what is this"), encoders, images, batch_size=2)
    probes = fitter.solve(dict.fromkeys(encoders, 1e-3))
    probes.save(tmp_path / "llava" / "probes")
    kept = load_probes(tmp_path / "llava" / "probes").familiarity
    assert all(torch.equal(a, b) for a, b in zip(kept, probes.familiarity, strict=True))
    viewer = LayerViewer.load(
        tmp_path / "llava", model, processor, find_teachers(None, checkpoint), images_for_gen=images
    )
    shown = viewer.pictures(images[:1])
    assert [name for name in shown["depth"] if name.startswith("layer")] == [f"layer {i}" for i in range(5)]
    assert viewer.by == "ridge probes of every layer"
    assert NOTHING_SEEN in shown["depth"] and viewer.remark == ""
    blue = Image.new("RGB", (300, 200), (40, 90, 200))
    shown = viewer.pictures([images[0], blue])
    assert note_of(shown["seg"]["image"][0]) == "" and note_of(shown["seg"]["image"][1]).startswith("outside of what")
    assert "outside of what the<br>probes" in page(viewer, shown, "a title")
    shown = viewer.pictures(images[:1])
    probes.familiarity = None  # of older probes
    probes.about["model"] = "another/model\x1b[2J"
    probes.save(tmp_path / "others")
    others = LayerViewer.load(
        tmp_path / "llava", model, processor, find_teachers(None, checkpoint), probes=tmp_path / "others"
    )
    assert others.by == "ridge probes of every layer, fitted to another/model\x1b[2J"
    assert others.are_outside([blue]) == [False] and "can't be marked" in others.remark
    assert "ridge probes of every layer, fitted to another/model\x1b[2J came without a record" in others.remark
    expected = {(task, layer): one for task, layer, one in probes.predict(probes.reader(model, processor)(images[:1]))}
    torch.testing.assert_close(viewer.features(images[:1])["seg"][3], expected["seg", 3])
    assert same(shown["depth"]["layer 3"][0], viewer.decoders["depth"].decode(expected["depth", 3], images[:1])[0])
    out, image = str(tmp_path / "out"), str(checkpoint / "images" / "0.png")
    (tmp_path / "llava" / "run.json").write_text((checkpoint / "run.json").read_text())
    main([str(tmp_path / "llava"), image, "--out", out])  # by the probes beside it
    assert "depth.png" in capsys.readouterr().out
    blue.save(tmp_path / "blue.png")
    other = [str(tmp_path / "blue.png"), "--compare", str(tmp_path / "llava"), "--out", out]
    main([str(checkpoint), image, *other])
    told = capsys.readouterr().out
    assert f"{tmp_path / 'blue.png'} is outside of what the probes were fitted on of LLaVA" in told
    text = (tmp_path / "out" / "layers.html").read_text()
    rows = [text.index(f"<b>{label}</b>") for label in ("LLaVA", checkpoint.name)]
    assert rows[0] < rows[1] and text.count("<b>LLaVA</b>") == 2 * 2  # depth and seg of two images
    # A compared checkpoint is shown by the probes that are named for it, whatever this one is shown by.
    its_own = ["--probes", "none", "--compare", str(tmp_path / "llava"), "--compare_probes", str(tmp_path / "others")]
    main([str(checkpoint), image, *its_own, "--out", str(tmp_path / "own")])
    assert "fitted to another/model" in (tmp_path / "own" / "layers.html").read_text()
    # Its name is a file's to say.
    told = capsys.readouterr().out
    assert "fitted to another/model" in told and "\x1b" not in told
    with pytest.raises(SystemExit, match="2 --compare_probes for 1 --compare"):
        main([str(checkpoint), image, *other, "--compare_probes", out, out])
    with pytest.raises(SystemExit, match="has no predictors"):
        main([str(tmp_path / "llava"), image, "--out", out, "--probes", "none"])


def test_what_probes_were_fitted_on_is_kept_through_an_interruption(make_model, encoders):
    """Evenly spaced images stand for all; a fit that goes on has the same ones."""
    model, processor = make_model([])
    reader = StateReader(model, processor)
    tasks = [{"name": "gen", "target_length": 1, "target_dim": encoders["gen"].target_dim}]
    images = random_images(6, seed=3)
    whole, begun, resumed = (RidgeFit(tasks, 5, 32, {}) for _ in range(3))
    for fitter in (whole, begun, resumed):
        fitter.plan(6, 2)
    for start in (0, 2, 4):
        states, targets = reader(images[start : start + 2]), {"gen": encoders["gen"].encode(images[start : start + 2])}
        whole.update(states, targets)
        if start == 0:
            begun.update(states, targets)
            resumed.load_state(begun.state())
        else:
            resumed.update(states, targets)
    familiarity = whole.solve({"gen": 1e-3}).familiarity
    for part, other in zip(familiarity, resumed.solve({"gen": 1e-3}).familiarity, strict=True):
        torch.testing.assert_close(part, other)
    assert not familiarity.is_outside(reader(images)).any()
    assert familiarity.is_outside(reader([Image.new("RGB", (64, 64), "blue")])).all()


def test_nothing_to_show_is_said(checkpoint, tmp_path, monkeypatch):
    """A run whose only task can't be decoded: no empty page, no missing folder."""
    load = LayerViewer.load

    def gen_alone(*args, **options):
        viewer = load(*args, **options)
        viewer.decoders.clear()
        return viewer

    monkeypatch.setattr(LayerViewer, "load", gen_alone)
    with pytest.raises(SystemExit, match="nothing can be shown: gen: its embeddings want unCLIP"):
        main([str(checkpoint), str(checkpoint / "images" / "0.png"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_run_of_a_fine_tuned_checkpoint_is_that_of_its_beginning(checkpoint, tmp_path):
    began = json.loads((checkpoint / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({"teachers": None, "started_from": began}))
    assert set(find_teachers(None, tmp_path)["teachers"]) == set(NAMES)
    assert load_statistics(tmp_path) == {}
    run = {"teachers": None, "checkpoint": str(checkpoint), "started_from": began}
    (tmp_path / "run.json").write_text(json.dumps(run))
    for folder in (tmp_path, tmp_path / "checkpoint-3"):  # whose predictions would not be restored else
        found = load_statistics(folder)
        assert set(found) == set(NAMES)
    assert found["seg"].std.equal(load_statistics(checkpoint)["seg"].std)
    (tmp_path / "run.json").write_text(json.dumps(run | {"checkpoint": str(tmp_path)}))  # trained in place
    assert load_statistics(tmp_path) == {}
    assert find_teachers("miniature_pretrain", tmp_path)["teachers"]["seg"]["encoder"] == "oneformer"


def test_the_first_run_that_names_teachers_decodes(tmp_path):
    """The probes' own comes before the checkpoint's; a recipe before both."""
    teachers = {}
    for name in ("probes", "checkpoint", "nothing"):
        (tmp_path / name).mkdir()
        teachers[name] = {"gen": {"encoder": "clip_image", "path": f"org/{name}"}} if name != "nothing" else None
        (tmp_path / name / "run.json").write_text(json.dumps({"teachers": teachers[name]}))
    places = {name: tmp_path / name for name in teachers}
    assert find_teachers(None, places["probes"], places["checkpoint"])["teachers"] == teachers["probes"]
    assert find_teachers(None, None, places["checkpoint"], places["probes"])["teachers"] == teachers["checkpoint"]
    assert find_teachers(None, places["nothing"], places["checkpoint"])["teachers"] == teachers["checkpoint"]
    # What it lacks, compared checkpoints have; theirs are never trusted.
    more = {"gen": {"encoder": "clip_image", "path": "org/more"}, "depth": {"encoder": "depth_anything"}}
    (tmp_path / "nothing" / "run.json").write_text(json.dumps({"teachers": more}))
    merged = {**teachers["probes"], "depth": more["depth"]}
    assert find_teachers(None, places["probes"], others=[places["nothing"]], trust=True)["teachers"] == merged
    more["depth"]["trust_remote_code"] = True
    (tmp_path / "nothing" / "run.json").write_text(json.dumps({"teachers": more}))
    with pytest.raises(ValueError, match="'trust_remote_code', which a file may not set"):
        find_teachers(None, places["probes"], others=[places["nothing"]], trust=True)


def test_probes_are_decoded_by_the_teachers_that_they_were_fitted_to(tmp_path):
    """settings.json of `ola-vlm probe`: OUT itself is given, or a model's folder in it."""
    names = {name: {"depth": {"encoder": "depth_anything", "path": f"org/{name}"}} for name in ("probes", "run")}
    for folder in ("out/llava", "checkpoint"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "out" / "settings.json").write_text(json.dumps({"teachers": names["probes"]}))
    (tmp_path / "checkpoint" / "run.json").write_text(json.dumps({"teachers": names["run"]}))
    # Of another program.
    (tmp_path / "settings.json").write_text('{"theme": "dark"}')
    for place in (tmp_path / "out", tmp_path / "out" / "llava"):
        assert find_teachers(None, place, tmp_path / "checkpoint")["teachers"] == names["probes"]
    assert find_teachers(None, tmp_path / "checkpoint")["teachers"] == names["run"]


def test_of_a_checkpoint_on_the_hub_probes_and_statistics_are_fetched(checkpoint, monkeypatch):
    monkeypatch.setattr(features_module, "snapshot_download", lambda name, allow_patterns: str(checkpoint))
    assert features_module.local_folder("me/not-here") == checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--layers", "9"], "no task has layer 9"),
        (["--recipe", "miniature_finetune"], "names no teachers"),
        (["--images_for_gen", "nowhere"], "nowhere has no images"),
    ],
)
def test_wrong_input(checkpoint, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        main([str(checkpoint), str(checkpoint / "images" / "0.png"), "--out", str(tmp_path), *change])


def test_images_and_models_that_cannot_be_shown(checkpoint, make_model, tmp_path):
    with pytest.raises(SystemExit, match="cannot identify image"):
        main([str(checkpoint), str(checkpoint / "images" / "notes.txt"), "--out", str(tmp_path)])
    model, processor = make_model([])
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    image = str(checkpoint / "images" / "0.png")
    with pytest.raises(SystemExit, match="names no teachers"):
        main([str(tmp_path / "llava"), image])
    with pytest.raises(SystemExit, match="has no predictors: fit probes"):
        main([str(tmp_path / "llava"), image, "--recipe", "miniature_pretrain", "--out", str(tmp_path)])
