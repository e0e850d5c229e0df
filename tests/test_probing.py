"""Probes: ridge against a direct solution, the paper's resampler against the reference, which states they read, and
the command that fits them."""

import json
import pickle
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import benchmark_fixtures
import numpy as np
import pytest
import torch
from conftest import random_image
from datasets import Dataset
from datasets import Image as HfImage
from PIL import Image
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from tiny_teachers import random_images, save_tiny_teachers
from tiny_vlms import FAMILIES
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from ola_vlm.convert import reference
from ola_vlm.convert.reference import convert_state_dict
from ola_vlm.eval import correlation, target_tasks
from ola_vlm.inference.checkpoints import load_checkpoint, weights_state
from ola_vlm.probing import figures, run
from ola_vlm.probing import probes as probes_module
from ola_vlm.probing.fit import batches, fit
from ola_vlm.probing.probes import (
    Familiarity,
    Probes,
    centered_cosine,
    flat_cosine,
    load_probes,
    mean_states,
    score,
)
from ola_vlm.probing.resampler import ResamplerFit
from ola_vlm.probing.ridge import RidgeFit, RidgeProbe, choose_alpha
from ola_vlm.probing.states import ImageStates, StateReader, to_positions
from ola_vlm.targets.encoders import ENCODERS, DepthAnythingEncoder, open_image
from ola_vlm.targets.statistics import TargetStatistics
from ola_vlm.training.arguments import OlaVlmArguments

GOLDEN = Path(__file__).parent / "golden"


def planted(rows=200, width=6, target=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 1.0]) + 7
    weights = torch.randn(width, target, generator=generator)
    return x, x @ weights + 3, weights


def predict(probe: RidgeProbe, x, alpha: float):
    weights, center, bias = probe.solve(alpha)
    return ((x.double() - center) @ weights + bias).float()


@pytest.mark.parametrize("alpha", [1e-3, 1.0])
def test_ridge_equals_least_squares(alpha):
    x, y, _ = planted()
    y = y + torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    probe = RidgeProbe()
    for start, stop in [(0, 64), (64, 65), (65, 200)]:
        probe.update(x[start:stop], y[start:stop])
    # Ridge as least squares with extra rows sqrt(n * alpha) * std(x) that want a zero, on centerd data.
    data, target = x.double().numpy(), y.double().numpy()
    centerd, std = data - data.mean(0), data.std(0)
    extra = np.diag(np.sqrt(len(x) * alpha) * std)
    rows, wanted = np.concatenate([centerd, extra]), np.concatenate([target - target.mean(0), np.zeros((6, 4))])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    weights, center, bias = probe.solve(alpha)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6, atol=1e-8)
    intercept = (bias - center @ weights).numpy()
    np.testing.assert_allclose(intercept, target.mean(0) - data.mean(0) @ expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(predict(probe, x, alpha).numpy(), data @ expected + intercept, rtol=1e-5)


def test_ridge_recovers_a_planted_map():
    x, y, weights = planted()
    probe = RidgeProbe()
    probe.update(x, y)
    torch.testing.assert_close(probe.solve(1e-12)[0].float(), weights, rtol=1e-3, atol=1e-3)
    new_x = planted(seed=2)[0]
    torch.testing.assert_close(predict(probe, new_x, 1e-12), new_x @ weights + 3, rtol=1e-4, atol=1e-3)


def test_ridge_does_not_depend_on_batches_scale_or_dead_channels():
    x, y, _ = planted()
    whole, pieces, scaled = RidgeProbe(), RidgeProbe(), RidgeProbe()
    whole.update(x, y)
    for a, b in zip(x.split(7), y.split(7), strict=True):
        pieces.update(a, b)
    wide = torch.cat([x.double() * 1024, torch.full((200, 1), 5.0, dtype=torch.double)], dim=1)
    scaled.update(wide, y)
    expected = predict(whole, x, 0.1)
    torch.testing.assert_close(predict(pieces, x, 0.1), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(predict(scaled, wide, 0.1), expected, rtol=1e-4, atol=1e-4)


def test_ridge_needs_a_target_for_every_input():
    with pytest.raises(RuntimeError, match="Expected size 3 but got size 2"):
        RidgeProbe().update(torch.zeros(3, 2), torch.zeros(2, 2))


def test_cosines():
    torch.manual_seed(0)
    mean = torch.randn(4, 3) * 10
    target = mean + torch.randn(50, 4, 3)
    guess = mean + 0.1 * torch.randn(50, 4, 3)  # knows the mean only
    assert flat_cosine(guess, target).mean() > 0.95
    assert centered_cosine(guess, target, mean).mean().abs() < 0.1
    torch.testing.assert_close(centered_cosine(mean + 5 * (target - mean), target, mean), torch.ones(50))
    torch.testing.assert_close(
        flat_cosine(guess, target)[3], F.cosine_similarity(guess[3].flatten(), target[3].flatten(), dim=0)
    )


def test_to_positions():
    states = torch.arange(2 * 16 * 3.0).view(2, 16, 3)
    assert to_positions(states, 16) is states
    torch.testing.assert_close(to_positions(states, 1), states.mean(1, keepdim=True))
    torch.testing.assert_close(to_positions(states, 4)[:, 1], states[:, [2, 3, 6, 7]].mean(1))  # top right quarter
    assert to_positions(states, 64).shape == (2, 64, 3)
    with pytest.raises(RuntimeError, match="multiply up"):
        to_positions(states[:, :15], 4)


def test_grids_that_are_not_square_lie_in_the_teachers_square():
    """A wide image's two rows are the middle two of its square's four; the rest repeats the border."""
    states = torch.arange(8.0).view(1, 8, 1)  # rows 0 1 2 3 and 4 5 6 7
    expected = [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]
    assert to_positions(states, 16, (2, 4))[0, :, 0].view(4, 4).tolist() == expected
    turned = states.view(2, 4).T.reshape(1, 8, 1)
    assert to_positions(turned, 16, (4, 2))[0, :, 0].view(4, 4).T.tolist() == expected
    assert to_positions(states, 1, (2, 4)).flatten().tolist() == [3.5]
    # 16 tokens that are no square are not taken for one
    assert to_positions(torch.arange(16.0).view(1, 16, 1), 16, (2, 8)).shape == (1, 16, 1)
    assert not to_positions(torch.arange(16.0).view(1, 16, 1), 16, (2, 8)).flatten().equal(torch.arange(16.0))


IMAGES = [random_image(i) for i in range(24)]
TRAIN, VALIDATION, TEST = IMAGES[:16], IMAGES[16:20], IMAGES[20:]
SHAPES = {"gen": (1, 12), "depth": (16, 10), "seg": (16, 14)}


def random_targets():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(24, *shape, generator=generator) for name, shape in SHAPES.items()}


def sources(targets):
    """Functions from images to their targets, which are in the order of IMAGES."""
    order = {image.tobytes(): i for i, image in enumerate(IMAGES)}
    return {
        task: lambda images, target=target: target[[order[image.tobytes()] for image in images]]
        for task, target in targets.items()
    }


def tasks_of(targets):
    size = {"predictor_heads": 2, "predictor_head_dim": 8}
    return [
        {"name": name, "target_length": target.shape[1], "target_dim": target.shape[2], **size}
        for name, target in targets.items()
    ]


def fit_ridge(model, processor, targets, batch_size=32, **options) -> tuple[RidgeFit, StateReader]:
    reader = StateReader(model, processor, **options)
    fitter = RidgeFit(tasks_of(targets), 5, 32)
    fit(fitter, reader, sources(targets), TRAIN, batch_size)
    return fitter, reader


def probe_model(model, processor, targets, alpha, batch_size=32, **options):
    """Scores on the test images of probes fitted on the training images."""
    fitter, reader = fit_ridge(model, processor, targets, batch_size, **options)
    probes = {0: fitter.solve(dict.fromkeys(targets, alpha))}
    return score(batches(reader, sources(targets), TEST, batch_size), probes)[0][0]


def test_states_are_the_image_tokens_only(make_model):
    model, processor = make_model()
    model.generation_config.suppress_tokens = None
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        reader = StateReader(model, processor, prompt="what color")
        states = reader(IMAGES[:3])
        assert states.num_layers == 5 and all(states.of_grid(layer).shape == (3, 16, 32) for layer in range(5))
    rotated = IMAGES[0].copy()
    rotated.getexif()[0x0112] = 6  # the teachers see it upright, so must the student
    assert reader([rotated]).of_grid(4).equal(reader([IMAGES[0].rotate(-90)]).of_grid(4))
    inputs = processor(text=[reader.text], images=IMAGES[1:2], return_tensors="pt", add_special_tokens=False)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16 < inputs["input_ids"].shape[1] - 8
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    torch.testing.assert_close(states.of_grid(0)[1], features)  # what the projector put in their place
    first = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0].item()
    for layer in range(5):
        expected = output.hidden_states[layer][0, first : first + 16]
        torch.testing.assert_close(states.of_grid(layer)[1], expected, rtol=1e-4, atol=1e-4)
    # What follows the image is not seen: neither the words nor the task tokens change the states.
    longer = StateReader(model, processor, prompt="what is this color of the cube")(IMAGES[:3])
    for layer in range(5):
        torch.testing.assert_close(states.of_grid(layer), longer.of_grid(layer), rtol=1e-4, atol=1e-4)


def test_a_layer_that_holds_the_target_scores_one(make_model):
    model, processor = make_model()
    states = StateReader(model, processor)(IMAGES)
    mixing = torch.randn(32, 10, generator=torch.Generator().manual_seed(0))
    targets = {"depth": states.of_grid(2) @ mixing, "seg": random_targets()["seg"]}
    scores = probe_model(model, processor, targets, 1e-9, batch_size=8)
    assert set(scores) == {"depth", "seg"} and set(scores["depth"]) == {"0", "1", "2", "3", "4"}
    assert scores["depth"]["2"]["ridge"] > 0.999 and scores["depth"]["2"]["ridge_plain"] > 0.999
    assert all(scores["depth"][layer]["ridge"] < 0.98 for layer in "0134")
    assert all(abs(one["ridge"]) < 0.2 for one in scores["seg"].values())  # noise


def test_batches_and_grouping_do_not_matter(make_model):
    model, processor = make_model()
    targets = random_targets()
    expected = probe_model(model, processor, targets, 0.1, batch_size=24)
    alone = {}
    for task in targets:
        alone |= probe_model(model, processor, {task: targets[task]}, 0.1, batch_size=5)
    for task in targets:
        for layer in "01234":
            assert alone[task][layer] == pytest.approx(expected[task][layer], rel=1e-4, abs=1e-5)


def test_predictions_have_the_score(make_model, tmp_path):
    model, processor = make_model()
    targets = random_targets()
    fitter, reader = fit_ridge(model, processor, targets, batch_size=3)
    alphas = {"gen": 0.1, "depth": 1.0, "seg": 1e-3}
    probes = fitter.solve(alphas)
    probes.about |= {"prompt": reader.prompt, "square": True}
    probes.save(tmp_path / "model")
    loaded = load_probes(tmp_path)  # the folder above has those of one model
    predictions = {task: {} for task in targets}
    for task, layer, prediction in loaded.predict(loaded.reader(model, processor)(TEST)):
        predictions[task][layer] = prediction
    scores, zero = score(batches(reader, sources(targets), TEST, 3), {0: probes})
    assert predictions["depth"][3].shape == (4, 16, 10) and predictions["gen"][0].shape == (4, 1, 12)
    mean = targets["seg"][:16].mean(0)
    cosine = centered_cosine(predictions["seg"][4], targets["seg"][20:], mean).mean()
    assert cosine.item() == pytest.approx(scores[0]["seg"]["4"]["ridge"], abs=1e-5)
    assert zero["seg"] == pytest.approx(
        flat_cosine(mean.expand(4, 16, 14), targets["seg"][20:]).mean().item(), abs=1e-6
    )
    for task, alpha in alphas.items():  # each has its own
        alone = score(batches(reader, sources(targets), TEST, 3), {0: fitter.solve(dict.fromkeys(targets, alpha))})
        assert alone[0][0][task] == scores[0][task]
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    with pytest.raises(ValueError, match="those of model, other: give its folder"):
        load_probes(tmp_path)


def test_the_alpha_is_chosen_on_validation(make_model):
    model, processor = make_model()
    alphas, targets = [1e-6, 1e3], random_targets()
    fitter, reader = fit_ridge(model, processor, targets)
    probes = {alpha: fitter.solve(dict.fromkeys(SHAPES, alpha)) for alpha in alphas}
    validation, _ = score(batches(reader, sources(targets), VALIDATION, 32), probes)
    for task in SHAPES:
        means = {
            alpha: np.mean([layer["ridge"] for layer in scores[task].values()]) for alpha, scores in validation.items()
        }
        assert choose_alpha([validation], task) == max(means, key=means.get)
    one, two = {1.0: {"depth": {"0": {"ridge": 0.1}}}}, {2.0: {"depth": {"0": {"ridge": 0.3}}}}
    other = {1.0: {"depth": {"0": {"ridge": 0.6}}}, 2.0: two[2.0]}
    assert choose_alpha([one | two], "depth") == 2.0 and choose_alpha([one | two, other], "depth") == 1.0


def test_one_alpha_is_the_best_of_all_models_together(tmp_path):
    """Not the first one's, though it is the best there."""
    of_models = {"one": (0.50, 0.49), "two": (0.1, 0.4)}
    for model, scores in of_models.items():
        by_alpha = {
            alpha: {"depth": {"0": {"ridge": score}}} for alpha, score in zip(("0.1", "1.0"), scores, strict=True)
        }
        (tmp_path / model).mkdir()
        (tmp_path / model / "validation.json").write_text(json.dumps(by_alpha))
    options = SimpleNamespace(out=tmp_path)
    probed = {"is_ridge": True, "fitted_file": "validation.json", "tasks": [{"name": "depth"}], "options": options}
    assert run.choose_alphas(SimpleNamespace(models=list(of_models), **probed)) == {"depth": 1.0}
    assert run.choose_alphas(SimpleNamespace(models=["one"], **probed)) == {"depth": 0.1}


def test_99_of_100_images_are_like_those_that_probes_were_fitted_on():
    """By their states where the language model gets them."""
    states = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    familiarity = Familiarity.fit(states)
    assert (familiarity.distance(states) > familiarity.limit).sum() == 2
    hidden = [torch.full((2, 5, 3), float(layer)) for layer in (7, 8, 9)]
    columns = [torch.arange(4)] * 2
    at_entry = ImageStates(hidden, torch.ones(2, 5, dtype=torch.bool), columns, [(2, 2)] * 2)
    assert mean_states(at_entry).equal(torch.full((2, 3), 7.0))


def test_plain_llava(make_model, tmp_path):
    model, processor = make_model(tasks=[])
    model.save_pretrained(tmp_path)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    expected = probe_model(model, processor, random_targets(), 0.1)
    scores = probe_model(plain, processor, random_targets(), 0.1)
    assert scores["depth"]["3"] == pytest.approx(expected["depth"]["3"], rel=1e-4, abs=1e-5)


# Other families -----------------------------------------------------------------------------------------------------
SIZES = [(32, 32), (96, 32), (24, 64), (64, 64)]
GRIDS = {  # with the student's own geometry
    "qwen2_5_vl": [(2, 2), (2, 6), (4, 2), (4, 4)],
    "qwen3_vl": [(2, 2), (2, 6), (4, 2), (4, 4)],
    "gemma3": [(2, 2)] * 4,
    "idefics3": [(2, 2)] * 4,
    "internvl": [(2, 2)] * 4,
    "llava_next": [(4, 4)] * 4,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_their_own_numbers_of_tokens(family):
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    pictures = [random_image(i, SIZES[i % 4]) for i in range(8)]
    reader = StateReader(model, processor, square=False)
    states = reader(pictures[:4])
    assert states.grids == GRIDS[family] and states.num_layers == 5
    for n, picture in enumerate(pictures[:4]):  # batch mates and padding change nothing
        alone = reader([picture])
        assert alone.grids[0] == states.grids[n]
        torch.testing.assert_close(states.positions(3, 16)[n], alone.positions(3, 16)[0], rtol=1e-4, atol=1e-4)
    square = StateReader(model, processor)
    assert all(rows == columns for rows, columns in square(pictures[:4]).grids)
    # What the first layer's tokens hold is found at their places: those of the whole picture are told apart by a
    # target that is made of them.
    targets = {"seg": lambda images: square(images).positions(2, 16) @ torch.eye(32, 14)}
    fitter = RidgeFit([{"name": "seg", "target_length": 16, "target_dim": 14}], 5, 32)
    fit(fitter, square, targets, pictures, batch_size=3)
    scores, _ = score(batches(square, targets, pictures, 3), {0: fitter.solve({"seg": 1e-9})})
    assert scores[0]["seg"]["2"]["ridge"] > 0.999


def test_the_whole_pictures_tokens_are_the_right_ones():
    """A change in a corner of the picture changes that corner's token of the grid's input most, in every family."""
    for make in FAMILIES.values():
        torch.manual_seed(0)
        model, processor = make()
        reader, before = StateReader(model, processor), random_image(0, (64, 64))
        for token, (column, row) in {0: (0, 0), -1: (48, 48)}.items():
            after = before.copy()
            after.paste((255, 0, 0), (column, row, column + 16, row + 16))
            moved = (reader([after]).of_grid(0) - reader([before]).of_grid(0)).norm(dim=-1)[0]
            assert moved.argmax() == (token if token == 0 else len(moved) - 1)


# The paper's resampler ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["gen", "depth", "seg"])
def test_golden_probe(task):
    """Prediction, loss and score of the reference's probe, on all tokens of a layer's state."""
    data = load_file(GOLDEN / f"i_probe_{task}.safetensors")
    (layer,) = {int(name.split(".")[1]) for name in data if name.startswith("layer_state.")}
    whole = data[f"layer_state.{layer}"]
    states = ImageStates([whole], torch.ones(whole.shape[:2], dtype=torch.bool), [None] * 2, [None] * 2)
    target = data["target"]
    target = target.flatten(2).transpose(1, 2) if target.dim() == 4 else target
    fields = {"target_length": target.shape[1], "target_dim": target.shape[2]}
    fields |= {"name": task, "predictor_heads": 2, "predictor_head_dim": 8}
    probes = Probes("resampler", [fields], 1, 64)
    weights = {name.removeprefix("head."): w for name, w in data.items() if name.startswith("head.")}
    renamed = convert_state_dict({f"image_{task}_heads.0.{name}": w for name, w in weights.items()}, {task: [0]})
    probes.modules.load_state_dict({name.removeprefix("predictors."): w for name, w in renamed.items()})
    probes.means = {task: torch.zeros(target.shape[1:])}
    ((_, _, prediction),) = probes.predict(states)
    torch.testing.assert_close(prediction[:, ::16], data["emb"], rtol=1e-4, atol=1e-5)  # what the file keeps
    torch.testing.assert_close(flat_cosine(prediction, target), data["cosine"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(F.smooth_l1_loss(prediction, target), data["smooth_l1"], rtol=1e-5, atol=0)
    scores, _ = score([(states, {task: target})], {0: probes})
    assert scores[0][task]["0"]["resampler_plain"] == pytest.approx(data["cosine"].mean().item(), rel=1e-4)


@pytest.mark.parametrize("task", ["gen", "depth", "seg"])
def test_the_references_probes_are_converted(task, tmp_path, capsys):
    """A checkpoint in its form (one layer's head is what the golden files keep): the recorded predictions."""
    data = load_file(GOLDEN / f"i_probe_{task}.safetensors")
    weights = {f"image_{task}_heads.0.{n.removeprefix('head.')}": w for n, w in data.items() if n.startswith("head.")}
    (whole,) = (value for name, value in data.items() if name.startswith("layer_state."))
    (source := tmp_path / "reference").mkdir()
    length, dim = {"gen": (1, 40), "depth": (576, 48), "seg": (576, 56)}[task]
    size = {"depth": 1, "dim_head": 8, "ff_mult": 1, "num_heads": 2, "num_tokens": length, "output_dim": dim}
    config = {"model_type": "probe_dsg_llava_llama", "probe_mode": task, "num_hidden_layers": 1, "hidden_size": 64}
    (source / "config.json").write_text(json.dumps(config | {f"image_{task}": size}))
    save_file(weights | {"model.norm.weight": torch.ones(64)}, source / "model.safetensors")
    reference.main([str(source), str(tmp_path / "out")])
    assert "1 dropped: of the model that was probed" in capsys.readouterr().out
    probes = load_probes(tmp_path / "out")
    states = ImageStates([whole * 0, whole], torch.ones(whole.shape[:2], dtype=torch.bool), [None] * 2, [None] * 2)
    ((name, layer, prediction),) = probes.predict(states)
    assert (name, layer) == (task, 1)
    torch.testing.assert_close(prediction[:, ::16], data["emb"], rtol=1e-4, atol=1e-5)
    # Another task's would take their place.
    with pytest.raises(SystemExit, match="out has probes already: choose another folder for each"):
        reference.main([str(source), str(tmp_path / "out")])
    save_file(weights | {f"image_{task}_heads.1.projector.latents": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(SystemExit, match=r"image_\w+_heads.1.projector.latents"):  # a head without a layer
        reference.main([str(source), str(tmp_path / "again")])
    for fields, match in (
        (config, f"lacks 'image_{task}', which the reference's checkpoints have"),
        ({"probe_mode": task}, "lacks 'num_hidden_layers', which"),
        (config | {f"image_{task}": 5}, "as the reference never does"),
        (config | {"num_hidden_layers": "1", f"image_{task}": size}, "as the reference never does"),
        (config | {"probe_mode": [task]}, "only gen, depth and seg are known"),
    ):
        (source / "config.json").write_text(json.dumps(fields))
        with pytest.raises(SystemExit, match=match):
            reference.main([str(source), str(tmp_path / "again")])


def resampler_fit(
    model, processor, targets, saved=None, batch_size=3, seed=0, statistics=None, stop=None, train=TRAIN, **options
):
    reader = StateReader(model, processor)
    options = {"images": len(train), "epochs": 2, "step_images": 6, "learning_rate": 0.01, "seed": seed} | options
    fitter = ResamplerFit(tasks_of(targets), 5, 32, statistics=statistics, **options)
    if stop is not None:  # killed in the middle of a batch
        update, count = fitter.update, iter(range(100))
        fitter.update = lambda *args: update(*args) if next(count) < stop else 1 / 0
    fit(fitter, reader, sources(targets), train, batch_size, saved=saved, save_seconds=0)
    return fitter


def same(one: Probes, other: Probes) -> bool:
    pairs = zip(one.modules.state_dict().items(), other.modules.state_dict().items(), strict=True)
    means = all(one.means[task].equal(other.means[task]) for task in one.tasks)
    return means and all(a == b and x.equal(y) for (a, x), (b, y) in pairs)


def test_resamplers_are_those_of_a_plain_training_loop(make_model):
    """One probe of them all, trained by hand on the states of one batch a step."""
    model, processor = make_model()
    targets = {"depth": random_targets()["depth"]}
    fitted = resampler_fit(model, processor, targets, step_images=16, batch_size=5, epochs=3).finish()
    states, target = StateReader(model, processor)(TRAIN), targets["depth"][:16]
    by_hand = Probes("resampler", tasks_of(targets), 5, 32)
    probe = by_hand.modules["depth"]["2"]
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=0.0)
    for lr in (0.01 / 2, 0.01, 0.01 / 2):  # one step of warm-up, then half a cosine over two
        optimizer.param_groups[0]["lr"] = lr
        F.smooth_l1_loss(by_hand.raw(states, "depth", 2), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in probe.state_dict().items():
        torch.testing.assert_close(fitted.modules["depth"]["2"].get_parameter(name), value, rtol=1e-3, atol=1e-4)
    assert not fitted.modules["depth"]["1"].proj_in.weight.equal(probe.proj_in.weight)
    torch.testing.assert_close(fitted.means["depth"], target.mean(0))


def test_every_epoch_has_an_order_of_its_own():
    def epochs(seed: int) -> list[list[int]]:
        tasks = tasks_of({"gen": random_targets()["gen"]})
        fitter = ResamplerFit(tasks, 2, 8, images=16, epochs=3, step_images=6, seed=seed)
        return torch.cat(fitter.plan(16, 5)).view(3, 16).tolist()

    orders = epochs(seed=0)
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert epochs(seed=0) == orders
    assert epochs(seed=7)[0] != orders[0]


def test_an_interrupted_fit_goes_on_to_the_same_result(make_model, tmp_path):
    model, processor = make_model()
    targets = {task: random_targets()[task] for task in ("gen", "seg")}
    nine = {"train": TRAIN[:9]}  # steps of 6 and 3 images, in batches of 3
    whole = resampler_fit(model, processor, targets, **nine).finish()
    assert not same(resampler_fit(model, processor, targets, seed=1, **nine).finish(), whole)
    for stop in (1, 4):  # in the first step, and in the second epoch's
        saved = tmp_path / f"{stop}.safetensors"
        with pytest.raises(ZeroDivisionError):
            resampler_fit(model, processor, targets, saved, stop=stop, **nine)
        assert saved.exists() == (stop > 1)
        assert same(resampler_fit(model, processor, targets, saved, **nine).finish(), whole)
    alone = resampler_fit(model, processor, {"seg": targets["seg"]}, **nine).finish()  # other tasks change nothing
    assert alone.modules["seg"]["3"].latents.equal(whole.modules["seg"]["3"].latents)

    reader, options = StateReader(model, processor), {"batch_size": 3, "saved": tmp_path / "ridge", "save_seconds": 0}
    fits = [RidgeFit(tasks_of(targets), 5, 32) for _ in range(3)]
    fit(fits[0], reader, sources(targets), TRAIN, 3)
    update, count = fits[1].update, iter(range(100))
    fits[1].update = lambda *args: update(*args) if next(count) < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(fits[1], reader, sources(targets), TRAIN, **options)
    fit(fits[2], reader, sources(targets), TRAIN, **options)
    alphas = dict.fromkeys(targets, 0.1)
    assert fits[2].count == 16 and same(fits[2].solve(alphas), fits[0].solve(alphas))


def test_standardized_targets_are_restored(make_model, tmp_path):
    """A resampler learns standardized targets, and predicts the teacher's own."""
    model, processor = make_model()
    targets = {"depth": 100 + 20 * random_targets()["depth"]}
    statistics = {"depth": TargetStatistics.fit([targets["depth"][:16]])}
    fitter = resampler_fit(model, processor, targets, statistics=statistics)
    assert fitter.losses["depth"] < 2  # in deviations of the targets
    probes = fitter.finish()
    probes.save(tmp_path)
    states = StateReader(model, processor)(TEST)
    for one in (probes, load_probes(tmp_path)):
        prediction = next(found for _, layer, found in one.predict(states) if layer == 2)
        expected = probes.raw(states, "depth", 2) * statistics["depth"].std + statistics["depth"].mean
        torch.testing.assert_close(prediction, expected.detach())
        assert (prediction.mean() - 100).abs() < 10


# The command --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def study(tmp_path_factory, make_model) -> SimpleNamespace:
    """A folder in the form of a study's, two checkpoints, and the fields of a recipe with tiny teachers."""
    root = tmp_path_factory.mktemp("study")
    teachers, (scenes, _, depth) = save_tiny_teachers(root / "teachers"), benchmark_fixtures.scenes()
    (root / "data" / "images").mkdir(parents=True)
    for i, image in enumerate(scenes):
        image.save(root / "data" / "images" / f"test_{i:05d}.png")
    masks = np.tile(np.arange(64) // 13, (len(scenes), 64, 1)).astype(np.uint8)  # five stripes
    save_numpy({"depth": depth.astype(np.float16), "mask": masks}, root / "data" / "test.safetensors")
    for i in range(12):
        random_images(1, seed=i, size=(64, 48))[0].save(root / "data" / "images" / f"train_{i:05d}.png")
    tasks = [
        {"name": "gen", "target_length": 1, "target_dim": 12},
        {"name": "depth", "target_length": 64, "target_dim": 32},
        {"name": "seg", "target_length": 64, "target_dim": 64},
    ]
    encoders = {"gen": "clip_image", "depth": "depth_anything", "seg": "oneformer"}
    entries = {name: {"encoder": encoder, "path": str(teachers[encoder])} for name, encoder in encoders.items()}
    for name, seed in (("one", 0), ("two", 1), ("three", 2)):
        model, processor = make_model([{**task, "layers": [2], "num_task_tokens": 1} for task in tasks], seed=seed)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    sizes = [{**task, "predictor_heads": 2, "predictor_head_dim": 8} for task in tasks]
    recipe = ["--tasks", json.dumps(sizes), "--teachers", json.dumps(entries), "--target_cache", str(root / "targets")]
    recipe += ["--images", str(root / "data" / "images"), "--use_cpu", "true", "--batch_size", "4"]
    recipe += ["--dataloader_num_workers", "0"]
    return SimpleNamespace(root=root, recipe=recipe, models=[str(root / name) for name in ("one", "two", "three")])


def run_probe(study, out, *more, models=None):
    run.main([*(models or study.models[:2]), *study.recipe, "--out", str(out), *more])
    return json.loads((out / "probes.json").read_text())


@pytest.fixture(scope="module")
def probed(study, tmp_path_factory) -> tuple[Path, dict]:
    """An OUT with all three models, of which two came later, and its probes.json."""
    out = tmp_path_factory.mktemp("probed") / "out"
    run_probe(study, out, models=study.models[:1])
    return out, run_probe(study, out, models=study.models[1:])


def test_help_is_the_commands_own(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = capsys.readouterr().out
    assert "--step_images" in text and "--recipe NAME" in text and "--adam_beta1" not in text


def test_the_command(study, probed, tmp_path, monkeypatch, capsys):
    out, found = probed
    assert found["image_counts"] == {"train": 12, "validation": 2, "test": 4}
    assert {model: one["name"] for model, one in found["models"].items()} == {
        model: Path(model).name for model in study.models
    }
    for one in found["models"].values():
        assert set(one["scores"]) == set(SHAPES) and all(list(one["scores"][task]) == list("01234") for task in SHAPES)
        saved = json.loads((out / one["folder"] / "probes.json").read_text())
        assert saved["about"]["alphas"] == found["alphas"]  # one for all models
    assert (out / "probes.png").stat().st_size > 10_000

    with monkeypatch.context() as patched:  # what is done is not done again
        patched.setattr(run, "load_checkpoint", None)
        again = run_probe(study, out, models=study.models)
    assert again["models"] == found["models"] and again["alphas"] == found["alphas"]
    assert "three" in capsys.readouterr().out
    alone = run_probe(study, tmp_path, "--targets", "gen", models=study.models[:1])  # the same without the others
    if alone["alphas"]["gen"] == found["alphas"]["gen"]:
        scores = (one["models"][study.models[0]]["scores"]["gen"]["2"] for one in (alone, found))
        assert next(scores) == pytest.approx(next(scores), rel=1e-4)


def images_of(study, found: dict, part: str) -> list[str]:
    """Those of a part of the split that the command made."""
    files = [str(path) for path in sorted((study.root / "data" / "images").iterdir())]
    places = run.split(len(files), found["run"]["seed"], found["run"]["test_images"] is not None)
    return [files[i] for i in places[part]]


def open_encoders(study) -> dict:
    kinds = {"gen": ("clip_image", 1), "depth": ("depth_anything", 8), "seg": ("oneformer", 8)}
    folder = study.root / "teachers"
    return {name: ENCODERS[kind].from_pretrained(folder / kind, grid=grid) for name, (kind, grid) in kinds.items()}


def assert_is_mean_of_trained(study, found: dict, mean: torch.Tensor) -> None:
    """Of the depth targets of the images that the probes were fitted on, but for bfloat16 of the cache; not of all."""
    encoder = open_encoders(study)["depth"]
    trained = encoder.encode(list(map(open_image, images_of(study, found, "train"))))
    others = encoder.encode(list(map(open_image, images_of(study, found, "validation"))))
    error = (mean - trained.mean(0)).norm()
    assert error < 0.1 * (mean - torch.cat([trained, others]).mean(0)).norm()


def scores_by_hand(study, model: str, probes: Probes, images: list[str]) -> dict:
    sources = {name: encoder.encode for name, encoder in open_encoders(study).items()}
    reader = probes.reader(*load_checkpoint(model))
    return score(batches(reader, sources, images, 4), {0: probes})[0][0]


def test_images_are_split_by_the_seed_and_each_is_in_one_part():
    parts, others = run.split(200, 0, False), run.split(200, 1, False)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(200))
    assert {name: len(places) for name, places in parts.items()} == {"train": 140, "validation": 20, "test": 40}
    for name, places in run.split(200, 0, False).items():
        assert np.array_equal(places, parts[name]) and not np.array_equal(places, others[name])
    assert len(run.split(200, 0, True)["test"]) == 0


def test_scores_are_of_held_out_images_and_alphas_of_validation_images(study, probed):
    """Each number by hand: a probe scores far better on what it was fitted on."""
    out, found = probed
    model = study.models[1]
    folder = out / found["models"][model]["folder"]
    probes = load_probes(folder)
    validation = json.loads((folder / "validation.json").read_text())
    expected = {"test": found["models"][model]["scores"], "validation": {}}
    for task, alpha in found["alphas"].items():
        expected["validation"][task] = validation[str(alpha)][task]
    for part, of_part in expected.items():
        by_hand = scores_by_hand(study, model, probes, images_of(study, found, part))
        for task, layers in of_part.items():
            for layer, values in layers.items():
                assert values == pytest.approx(by_hand[task][layer], abs=5e-3), (part, task, layer)
    # What the scores are centered by is the mean of the images that the probes were fitted on.
    assert_is_mean_of_trained(study, found, probes.means["depth"])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--prompt", "something else"], "prompt"),
        (["--no_square"], "square"),
        (["--max_images", "9"], "images_hash"),
        (["--test_images", "."], "test_images"),
        (["--seed", "5"], "seed"),
        (["--batch_size", "2"], "batch_size"),
        (["--model_dtype", "bfloat16"], "model_dtype"),
        (["--probe", "resampler"], "probe"),
    ],
)
def test_an_out_has_probes_of_one_setting(study, probed, tmp_path, change, name):
    """What is there would else be taken for what is asked for."""
    random_image(0).save(tmp_path / "other.png")
    change = [str(tmp_path) if one == "." else one for one in change]
    with pytest.raises(SystemExit, match=rf"has probes with another .*\b{name}\b"):
        run.main([study.models[0], *study.recipe, "--out", str(probed[0]), *change])


def test_resamplers_and_chosen_images_are_drawn_by_the_seed(study, tmp_path):
    more = ["--probe", "resampler", "--targets", "gen", "--epochs", "1", "--learning_rate", "0", "--max_images", "6"]
    hashes = []
    for seed in (3, 4):
        found = run_probe(study, tmp_path / str(seed), *more, "--seed", str(seed), models=study.models[:1])
        hashes.append(found["run"]["images_hash"])
        probes = load_probes(tmp_path / str(seed))
        begun = Probes("resampler", found["run"]["tasks"], 5, 32, seed=seed)  # nothing was learned
        assert all(x.equal(begun.modules.state_dict()[name]) for name, x in probes.modules.state_dict().items())
    assert hashes[0] != hashes[1]


def test_curves_and_counts_are_those_of_the_results(probed, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, *place, **options: drawn.append(figure))
    _, found = probed
    figures.curves_figure("curves.png", found)
    (figure,) = drawn
    assert re.findall(r"\d+", figure.get_suptitle()) == ["12", "4"]  # fitted on, and held out
    for column, task in enumerate(SHAPES):
        for row, kind in ((0, "ridge"), (1, "ridge_plain")):
            lines = figure.axes[3 * row + column].get_lines()
            for line, one in zip(lines[:-1], found["models"].values(), strict=True):
                assert line.get_xdata().tolist() == [0, 1, 2, 3, 4]
                assert line.get_ydata().tolist() == [one["scores"][task][layer][kind] for layer in "01234"]
            zero = 0 if kind == "ridge" else found["zero"][task]
            assert set(lines[-1].get_ydata()) == {zero}


def test_the_best_layer_is_the_best_by_the_centered_score():
    values = {"0": (0.1, 0.9), "1": (0.5, 0.2), "2": (0.3, 0.4)}
    layers = {layer: {"ridge": centered, "ridge_plain": plain} for layer, (centered, plain) in values.items()}
    one = {"name": "m", "scores": {"depth": layers}}
    text = run.table({"run": {"probe": "ridge"}, "image_counts": {"test": 4}, "models": {"m": one}})
    numbers = re.findall(r"[\d.]+", text.splitlines()[-1])
    assert numbers == ["0.300", "0.500", "1", "0.500", "0.200", "0.300", "0.400"]  # mean, best (layer 1), last


def test_the_command_with_resamplers_and_images_of_their_own_to_test(study, tmp_path):
    more = ["--probe", "resampler", "--targets", "depth", "--step_images", "4", "--standardize_targets", "true"]
    for i in range(3):
        random_images(1, seed=100 + i)[0].save(tmp_path / f"test_{i}.JPG")
    more += ["--test_images", str(tmp_path)]  # which the cache doesn't have yet
    tmp_path = tmp_path / "out"
    found = run_probe(study, tmp_path, *more, models=study.models[:1])
    assert found["image_counts"] == {"train": 16, "validation": 2, "test": 3}
    (one,) = found["models"].values()
    assert list(one["scores"]) == ["depth"] and set(one["scores"]["depth"]["3"]) == {"resampler", "resampler_plain"}
    assert not list(tmp_path.glob("*/fit.safetensors"))
    probes = load_probes(tmp_path)
    assert_is_mean_of_trained(study, found, probes.statistics["depth"].mean)
    assert_is_mean_of_trained(study, found, probes.means["depth"])
    held_out = [str(path) for path in sorted(tmp_path.parent.glob("*.JPG"))]
    by_hand = scores_by_hand(study, study.models[0], probes, held_out)
    assert one["scores"]["depth"]["3"] == pytest.approx(by_hand["depth"]["3"], abs=1e-4)
    with pytest.raises(SystemExit, match="18 of --test_images are among --images"):
        run_probe(
            study, tmp_path / "again", "--test_images", str(study.root / "data" / "images"), models=study.models[:1]
        )


def test_held_out_images_are_others_whatever_they_are_called(study, tmp_path, monkeypatch):
    """By a path from the root on, by one from here, and through a link."""
    monkeypatch.chdir(study.root)
    (tmp_path / "link").symlink_to(study.root / "data" / "images")
    for place in ("data/images", str(tmp_path / "link")):
        with pytest.raises(SystemExit, match="of --test_images are among --images"):
            run_probe(study, tmp_path / "out", "--test_images", place, models=study.models[:1])


def test_probes_are_whole_where_their_weights_are(make_model, tmp_path, monkeypatch):
    """The file by which a fit counts as done is written last."""
    model, processor = make_model()
    probes = resampler_fit(model, processor, random_targets(), step_images=16).finish()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(probes_module, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            probes.save(tmp_path)
    assert not (tmp_path / "probes.safetensors").exists()
    probes.save(tmp_path)
    assert load_probes(tmp_path).kind == "resampler"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--images", "EMPTY"], "has no images .* and no data files"),
        (["--images", "nowhere/at/all"], "is no folder"),
        (["--targets", "depth", "motion"], "no task motion: choose one of gen, depth, seg"),
        (["--out", "EMPTY/.."], "is not empty and not of `ola-vlm probe`"),
        (["--max_images", "2"], "2 images are too few"),
    ],
)
def test_the_command_says_what_is_wrong(study, tmp_path, change, message):
    (tmp_path / "EMPTY").mkdir()
    change = [one.replace("EMPTY", str(tmp_path / "EMPTY")) for one in change]
    with pytest.raises(SystemExit, match=message):
        run.main([study.models[0], *study.recipe, "--out", str(tmp_path / "out"), *change])
    assert not list(tmp_path.glob("out/*/*"))


def test_the_command_refuses_other_models_and_settings(study, tiny_parts, tmp_path):
    with pytest.raises(SystemExit, match="is a llama, which does not read images"):
        run_probe(study, tmp_path / "text", models=[tiny_parts.language_model])
    changed = tmp_path / "model"
    shutil.copytree(study.models[0], changed)
    run_probe(study, tmp_path / "out", "--targets", "gen", models=[str(changed)])
    with pytest.raises(SystemExit, match="has probes with another seed, tasks, teachers: choose another --out"):
        run_probe(study, tmp_path / "out", "--targets", "gen", "depth", "--seed", "5", models=[str(changed)])
    (changed / "model.safetensors").touch()
    with pytest.raises(SystemExit, match="with other weights: choose another --out"):
        run_probe(study, tmp_path / "out", "--targets", "gen", models=[str(changed)])


def test_models_whose_paths_become_one_name_have_folders_of_their_own(study, tmp_path, monkeypatch):
    """runs/a_b and runs_a/b; the one that is there keeps the plain name, as folders of earlier calls have it."""
    names = ["runs/a_b", "runs_a/b"]
    for name, model in zip(names, study.models, strict=False):
        shutil.copytree(model, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = run_probe(study, Path("out"), "--targets", "gen", models=names)["models"]
    assert found[names[0]]["folder"] == "runs_a_b" != found[names[1]]["folder"]
    for name in names:
        assert found[name]["weights"] == weights_state(name)
        assert load_probes(Path("out", found[name]["folder"])).about["model"] == name
    assert found[names[0]]["scores"] != found[names[1]]["scores"]
    with monkeypatch.context() as patched:
        patched.setattr(run, "load_checkpoint", None)
        # A slash at the end makes no other model.
        again = run_probe(study, Path("out"), "--targets", "gen", models=[f"{names[1]}/"])["models"]
    assert again == found


def test_a_call_that_failed_before_it_fitted_anything_binds_none_after_it(study, tmp_path):
    """The teacher's path was mistyped."""
    out = tmp_path / "out"
    wrong = [one.replace('/clip_image"', '/clip_imag"') for one in study.recipe]
    with pytest.raises(SystemExit, match=r"there is no folder .*clip_imag "):
        run.main([study.models[0], *wrong, "--out", str(out), "--targets", "gen"])
    found = run_probe(study, out, "--targets", "gen", models=study.models[:1])
    assert found["run"] == json.loads((out / "settings.json").read_text())
    # From then on it has probes.
    with pytest.raises(SystemExit, match="has probes with another seed"):
        run.main([study.models[0], *study.recipe, "--out", str(out), "--targets", "gen", "--seed", "5"])


def test_an_out_has_probes_of_one_split(study, tmp_path):
    """An image without a target drops out, and all others are split otherwise: some that were fitted would be held
    out."""
    images = tmp_path / "images"
    shutil.copytree(study.root / "data" / "images", images)
    options = ["--images", str(images), "--targets", "gen", "--on_bad_rows", "drop"]
    run_probe(study, tmp_path / "new", *options, models=study.models[:1])
    next(images.glob("train_*")).write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"was probed in .* when other images had no target: choose another --out"):
        run_probe(study, tmp_path / "new", *options, models=study.models[:1])


def test_statistics_that_were_deleted_are_made_again_if_an_alpha_changes(study, probed, tmp_path):
    """As docs/probing.md promises; scores made with another alpha are made anew."""
    before, out = probed[1], tmp_path / "out"
    shutil.copytree(probed[0], out)
    folder = out / before["models"][study.models[0]]["folder"]
    (folder / "fit.safetensors").unlink()
    scores = json.loads((folder / "scores.json").read_text())
    scores["alphas"]["gen"] *= 10
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "probes.safetensors").unlink()
    after = run_probe(study, out, models=study.models[:1])
    assert after["alphas"] == before["alphas"]
    for task, layers in before["models"][study.models[0]]["scores"].items():
        for layer, values in layers.items():
            assert after["models"][study.models[0]]["scores"][task][layer] == pytest.approx(values, abs=1e-6)
    assert (folder / "fit.safetensors").exists()


def test_rows_of_a_data_set_give_images(study, tmp_path):
    """With words or without, each file once."""
    images = [str(path) for path in sorted((study.root / "data" / "images").glob("train_*.png"))[:4]]
    rows = [{"id": i, "image": Path(path).name} for i, path in enumerate([*images, images[0]])]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    args = OlaVlmArguments(output_dir=str(tmp_path), image_folder=str(study.root / "data" / "images"), use_cpu=True)
    assert list(run.find_images(str(tmp_path / "rows.json"), args)) == images
    data = Dataset.from_dict({"image": images}).cast_column("image", HfImage())
    data.to_parquet(str(tmp_path / "data" / "a.parquet"))
    found = run.find_images(str(tmp_path / "data"), args)
    assert len(found[np.array([1, 3])]) == 2
    assert np.array_equal(open_image(found[1]), open_image(images[1]))
    # A loader's workers get a copy where they are started anew.
    assert list(pickle.loads(pickle.dumps(run.find_images(str(tmp_path / "rows.json"), args)))) == images
    (tmp_path / "words.json").write_text(json.dumps([{"id": "a", "messages": []}]))
    with pytest.raises(ValueError, match="have no images"):
        run.find_images(str(tmp_path / "words.json"), args)


def test_a_picture_that_several_rows_hold_is_one(tmp_path):
    """As in a data set that has a row a question: a copy would be fitted, and the other held out."""
    pictures = []
    for seed in (0, 1, 0, 2, 1, 0):
        random_image(seed).save(tmp_path / f"{seed}.png")
        pictures.append({"bytes": (tmp_path / f"{seed}.png").read_bytes(), "path": f"question-{len(pictures)}.png"})
    data = Dataset.from_dict({"image": pictures}).cast_column("image", HfImage())
    data.to_parquet(str(tmp_path / "data" / "a.parquet"))
    found = run.find_images(str(tmp_path / "data"), OlaVlmArguments(output_dir=str(tmp_path), use_cpu=True))
    assert [image["bytes"] for image in found] == [(tmp_path / f"{seed}.png").read_bytes() for seed in range(3)]


def test_held_out_pictures_that_lie_in_rows_are_others(tmp_path):
    """They have no names: the same picture is known by its bytes, and another split can be named."""
    for split, seeds in (("train", range(4)), ("test", range(4, 6))):
        pictures = []
        for seed in seeds:
            random_image(seed).save(tmp_path / f"{seed}.png")
            pictures.append({"bytes": (tmp_path / f"{seed}.png").read_bytes(), "path": None})
        data = Dataset.from_dict({"image": pictures}).cast_column("image", HfImage())
        data.to_parquet(str(tmp_path / "data" / f"{split}-0.parquet"))
    args = OlaVlmArguments(output_dir=str(tmp_path), use_cpu=True)
    fitted = run.find_images(str(tmp_path / "data"), args)
    with pytest.raises(
        ValueError, match=r"4 of --test_images are among --images \(the one in place 1\).*--test_split"
    ):
        run.check_held_out(run.find_images(str(tmp_path / "data"), args), fitted)
    held_out = run.find_images(str(tmp_path / "data"), args, split="test")
    assert len(held_out) == 2 and np.array_equal(open_image(held_out[0]), open_image(str(tmp_path / "4.png")))
    run.check_held_out(held_out, fitted)


def test_images_that_lie_in_rows_are_not_held_all_at_once():
    """As their hash is taken: a data set's pictures are many gigabytes."""
    alive = weakref.WeakSet()
    most = []

    class Picture(dict):
        __hash__ = object.__hash__

    def read(number) -> Picture:
        picture = Picture(bytes=bytes([number]))
        alive.add(picture)
        most.append(len(alive))
        return picture

    images = run.Images(read, np.arange(20))
    options = SimpleNamespace(
        probe="ridge", images="", test_images="", prompt="", no_square=False, batch_size=1, model_dtype=None
    )
    args = SimpleNamespace(seed=0, teachers={})
    settings = run.make_settings(options, args, [], images, images)
    assert max(most) <= 2 and len(most) == 40
    assert settings["images_hash"] == run.make_settings(options, args, [], [*images, *images], [])["images_hash"]


def test_target_tasks(study, probed, tmp_path, capsys, monkeypatch):
    """Table 8's scores of probes, predictors and teacher; and Figure 2's correlation."""
    (out, _), images = probed, study.root / "data" / "images"
    options = ["--gallery", str(images), "--gallery_pattern", "train_*", "--max_images", "2"]
    target_tasks.main([str(out), "--miniature", str(study.root), *options])
    found = json.loads((out / "target_tasks.json").read_text())
    teacher, ours = found["scores"]["target encoders"]["miniature"], found["scores"]["one"]["miniature"]
    rows = {"target encoder", "its targets, decoded", "the mean target, decoded"}
    assert teacher["depth"].keys() == rows == teacher["seg"].keys() and len(teacher["gen"]) == 2
    probed = {f"probe {layer}" for layer in range(5)} | {"predictor 2"}
    assert all(ours[task].keys() == probed for task in SHAPES)
    assert ours["depth"]["probe 3"]["n"] == 8 * 2
    # The teacher's own map, scored by hand.
    encoder = DepthAnythingEncoder.from_pretrained(study.root / "teachers" / "depth_anything", grid=8)
    items, correct = target_tasks.miniature_items(study.root)[:2], []
    for item in items:
        depth = encoder.model(encoder.pixel_values([open_image(item["image"])])).predicted_depth[0].detach().numpy()
        for pair in item["pairs"]:
            other = {"point1": "point2", "point2": "point1"}[pair["closer_point"]]
            correct.append(depth[tuple(pair[pair["closer_point"]])] > depth[tuple(pair[other])])
    assert teacher["depth"]["target encoder"]["accuracy"] == np.mean(correct)
    closer = {pair["closer_point"] for item in items for pair in item["pairs"]}  # in both orders
    assert closer == {"point1", "point2"}
    assert "teacher-assisted" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(target_tasks, "load_checkpoint", lambda *how: pytest.fail("loaded"))
        target_tasks.main([str(out), "--miniature", str(study.root), *options])  # what is done is not done again
        with pytest.raises(pytest.fail.Exception, match="loaded"):  # unless of other images
            target_tasks.main(
                [str(out), "--miniature", str(study.root), *options, "--gallery_pattern", "train_*[1-9].png"]
            )
        content = (out / "probes.json").read_text()
        other = json.loads(content)
        other["alphas"] = dict.fromkeys(other["alphas"], 0.5)
        (out / "probes.json").write_text(json.dumps(other))
        with pytest.raises(pytest.fail.Exception, match="loaded"):  # or of other probes
            target_tasks.main([str(out), "--miniature", str(study.root), *options])
        (out / "probes.json").write_text(content)
    folders = []
    for i, model in enumerate(study.models):
        folders.append(tmp_path / f"eval{i}")
        folders[-1].mkdir()
        run = {"benchmark": "miniature", "variant": "official", "model": model, "weights": weights_state(model)}
        scores = {"overall": {"score": 0.5 + 0.1 * i, "standard_error": 0.01, "n": 100}}
        (folders[-1] / "results.json").write_text(json.dumps({"run": run, "scores": scores}))
    correlation.main([str(out), *map(str, folders), "--figure", str(tmp_path / "figure.png")])
    content = json.loads((out / "probes.json").read_text())["models"]
    means = [np.mean([one["ridge"] for one in content[model]["scores"]["depth"].values()]) for model in study.models]
    r = np.corrcoef(means, [0.5, 0.6, 0.7])[0, 1]
    assert f"depth    r = {r:+.2f}" in capsys.readouterr().out and (tmp_path / "figure.png").exists()
    with pytest.raises(SystemExit, match="give at least 3 checkpoints"):
        correlation.main([str(out), *map(str, folders[:2]), "--figure", str(tmp_path / "figure.png")])


def test_the_closer_point_is_the_one_of_less_depth(study):
    stored = load_numpy(study.root / "data" / "test.safetensors")
    items = target_tasks.miniature_items(study.root)
    assert len(items) == len(stored["depth"])
    for item, depth, mask in zip(items, stored["depth"], stored["mask"], strict=True):
        assert np.array_equal(item["mask"], mask) and item["pairs"]
        for pair in item["pairs"]:
            far = {"point1": "point2", "point2": "point1"}[pair["closer_point"]]
            assert depth[tuple(pair[pair["closer_point"]])] < depth[tuple(pair[far])]


def test_the_most_similar_image_of_the_gallery_stands_for_an_embedding():
    """By direction and not by length; what is compared then are the extractor's features of it."""
    embeddings = torch.tensor([[1.0, 0], [-1, 0], [0, 10], [0, -10]])
    pictures = [Image.new("RGB", (4, 4), (10 * i, 0, 0)) for i in range(4)]

    def number(image) -> int:
        return image.getpixel((0, 0))[0] // 10

    encoder = SimpleNamespace(encode=lambda images: embeddings[[number(image) for image in images]][:, None])
    extractor = SimpleNamespace(encode=lambda images: torch.tensor([[[100.0 + number(image)]] for image in images]))
    gallery = target_tasks.Gallery(pictures, encoder, extractor, batch_size=3)
    assert gallery.nearest(torch.tensor([[2.0, 1], [-3, 1], [1, -2]])).tolist() == [[100], [101], [103]]


def test_decoded_images_are_compared_with_those_that_were_asked_about(monkeypatch):
    """And not with the gallery, which has others."""
    pictures = [Image.new("RGB", (4, 4), (10 * i, 0, 0)) for i in range(6)]

    def features(images) -> torch.Tensor:
        return torch.tensor([[[float(image.getpixel((0, 0))[0])]] for image in images])

    sides = []
    monkeypatch.setattr(target_tasks, "frechet_distance", lambda *both: sides.append(both) or 1.0)
    gallery = SimpleNamespace(
        extractor=SimpleNamespace(encode=features),
        features=torch.full((4, 1), 99.0),
        nearest=lambda embeddings: embeddings + 5,
    )
    tally = target_tasks.Tally({"gen": SimpleNamespace(target_length=1)}, gallery)
    for start in (0, 3):
        images = pictures[start : start + 3]
        tally.add([{"image": ""}], images, lambda images: [("gen", "probe 1", features(images))])
    assert tally.scores()["gen"]["probe 1"] == {"Frechet distance": 1, "n": 6}
    ((decoded, real),) = sides
    assert decoded[:, 0].tolist() == [5, 15, 25, 35, 45, 55] and real[:, 0].tolist() == [0, 10, 20, 30, 40, 50]


def test_each_models_predictors_are_restored_by_its_own_statistics(study, probed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(probed[0], out)
    asked = []
    monkeypatch.setattr(target_tasks, "statistics_of", lambda model: {"of": model})
    monkeypatch.setattr(target_tasks, "load_checkpoint", lambda model, *how: (model, None))
    monkeypatch.setattr(Probes, "reader", lambda self, model, processor: model)
    monkeypatch.setattr(target_tasks, "of_model", lambda *parts: asked.append(parts) or (lambda images: []))
    monkeypatch.setattr(target_tasks, "of_teachers", lambda *parts: lambda images: [])
    target_tasks.main([str(out), "--miniature", str(study.root), "--max_images", "1"])
    assert len(asked) == len(probed[1]["models"]) > 1
    assert all(statistics["of"] == model for model, _, statistics in asked)


def test_no_image_stands_for_itself(study, probed, monkeypatch):
    """The gallery may be the folder with the images that are asked about."""
    asked = []
    monkeypatch.setattr(target_tasks, "Gallery", lambda sources, *how: asked.extend(sources) or 1 / 0)
    images = study.root / "data" / "images"
    with pytest.raises(ZeroDivisionError):
        target_tasks.main([str(probed[0]), "--miniature", str(study.root), "--gallery", str(images)])
    assert asked == [str(path) for path in sorted(images.glob("train_*"))]


def test_the_best_layer_has_the_highest_accuracy_or_the_lowest_distance():
    depth = {f"probe {layer}": {"accuracy": value, "n": 9} for layer, value in enumerate((0.6, 0.8, 0.7))}
    gen = {f"probe {layer}": {"Frechet distance": value, "n": 3} for layer, value in enumerate((7.0, 5.0, 9.0))}
    text = target_tasks.table({"scores": {"m": {"data": {"depth": depth, "gen": gen}}}})
    rows = [line.split() for line in text.splitlines()[1:]]
    assert [row[1] for row in rows] == ["depth", "gen"]
    assert rows[0][3:5] == ["probe", "1"] and "80.0%" in rows[0]
    assert rows[1][3:5] == ["probe", "1"] and "5.000" in rows[1]


def test_maps_lie_on_the_image_and_not_on_its_padding():
    """A map of the padded square, at the image's own size; DA-2K's points and COCO's masks are the image's."""
    encoder = SimpleNamespace(view={"square": "pad"})
    square = torch.arange(16.0).view(4, 4)
    wide = target_tasks.to_image(square, (8, 4), encoder, "nearest")
    assert wide.shape == (4, 8) and wide[0].tolist() == [4, 4, 5, 5, 6, 6, 7, 7] and wide[3, 0] == 8
    tall = target_tasks.to_image(square, (4, 8), encoder, "nearest")
    assert tall.shape == (8, 4) and tall[:, 0].tolist() == [1, 1, 5, 5, 9, 9, 13, 13]
    encoder.view["square"] = "reference"
    assert target_tasks.to_image(square, (8, 4), encoder, "nearest")[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_coco_panoptic_masks(tmp_path):
    """Ids are R + 256 G + 65536 B; classes are numbered in the order of their ids; without a segment it is void."""
    (tmp_path / "panoptic_val2017").mkdir()
    ids = np.array([[7, 7, 300], [0, 70000, 300]])
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(
        tmp_path / "panoptic_val2017" / "a.png"
    )
    segments = [{"id": 7, "category_id": 200}, {"id": 300, "category_id": 1}, {"id": 70000, "category_id": 92}]
    content = {
        "categories": [{"id": 92}, {"id": 1}, {"id": 200}],
        "images": [{"id": 5, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 5, "file_name": "a.png", "segments_info": segments}],
    }
    (tmp_path / "panoptic_val2017.json").write_text(json.dumps(content))
    (item,) = target_tasks.coco_items(tmp_path)
    assert item["image"].endswith("val2017/a.jpg")
    assert target_tasks.read_mask(item["mask"]).tolist() == [[2, 2, 0], [255, 1, 0]]
