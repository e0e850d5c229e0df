"""Probes: ridge against a direct solution, the paper's resampler against the reference, which states they read, and
the command that fits them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_image
from safetensors.torch import load_file
from tiny_vlms import FAMILIES
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from ola_vlm.convert.reference import convert_state_dict
from ola_vlm.probing.fit import batches, fit
from ola_vlm.probing.probes import Probes, centred_cosine, flat_cosine, load_probes, score
from ola_vlm.probing.ridge import RidgeFit, RidgeProbe, choose_strength
from ola_vlm.probing.states import ImageStates, StateReader, to_positions

GOLDEN = Path(__file__).parent / "golden"


def planted(rows=200, width=6, target=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 1.0]) + 7
    weights = torch.randn(width, target, generator=generator)
    return x, x @ weights + 3, weights


def predict(probe: RidgeProbe, x, strength: float):
    weights, centre, bias = probe.solve(strength)
    return ((x.double() - centre) @ weights + bias).float()


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_ridge_equals_least_squares(strength):
    x, y, _ = planted()
    y = y + torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    probe = RidgeProbe()
    for start, stop in [(0, 64), (64, 65), (65, 200)]:
        probe.update(x[start:stop], y[start:stop])
    # Ridge as least squares with extra rows sqrt(n * strength) * std(x) that want a zero, on centred data.
    data, target = x.double().numpy(), y.double().numpy()
    centred, std = data - data.mean(0), data.std(0)
    extra = np.diag(np.sqrt(len(x) * strength) * std)
    rows, wanted = np.concatenate([centred, extra]), np.concatenate([target - target.mean(0), np.zeros((6, 4))])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    weights, centre, bias = probe.solve(strength)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6, atol=1e-8)
    intercept = (bias - centre @ weights).numpy()
    np.testing.assert_allclose(intercept, target.mean(0) - data.mean(0) @ expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(predict(probe, x, strength).numpy(), data @ expected + intercept, rtol=1e-5)


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
    assert centred_cosine(guess, target, mean).mean().abs() < 0.1
    torch.testing.assert_close(centred_cosine(mean + 5 * (target - mean), target, mean), torch.ones(50))
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


def probe_model(model, processor, targets, strength, batch_size=32, **options):
    """Scores on the test images of probes fitted on the training images."""
    fitter, reader = fit_ridge(model, processor, targets, batch_size, **options)
    probes = {0: fitter.solve(dict.fromkeys(targets, strength))}
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
    strengths = {"gen": 0.1, "depth": 1.0, "seg": 1e-3}
    probes = fitter.solve(strengths)
    probes.about |= {"prompt": reader.prompt, "square": True}
    probes.save(tmp_path / "model")
    loaded = load_probes(tmp_path)  # the folder above has those of one model
    predictions = {task: {} for task in targets}
    for task, layer, prediction in loaded.predict(loaded.reader(model, processor)(TEST)):
        predictions[task][layer] = prediction
    scores, zero = score(batches(reader, sources(targets), TEST, 3), {0: probes})
    assert predictions["depth"][3].shape == (4, 16, 10) and predictions["gen"][0].shape == (4, 1, 12)
    mean = targets["seg"][:16].mean(0)
    cosine = centred_cosine(predictions["seg"][4], targets["seg"][20:], mean).mean()
    assert cosine.item() == pytest.approx(scores[0]["seg"]["4"]["ridge"], abs=1e-5)
    assert zero["seg"] == pytest.approx(
        flat_cosine(mean.expand(4, 16, 14), targets["seg"][20:]).mean().item(), abs=1e-6
    )
    for task, strength in strengths.items():  # each has its own
        alone = score(batches(reader, sources(targets), TEST, 3), {0: fitter.solve(dict.fromkeys(targets, strength))})
        assert alone[0][0][task] == scores[0][task]
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    with pytest.raises(ValueError, match="those of model, other: give its folder"):
        load_probes(tmp_path)


def test_the_strength_is_chosen_on_validation(make_model):
    model, processor = make_model()
    strengths, targets = [1e-6, 1e3], random_targets()
    fitter, reader = fit_ridge(model, processor, targets)
    probes = {strength: fitter.solve(dict.fromkeys(SHAPES, strength)) for strength in strengths}
    validation, _ = score(batches(reader, sources(targets), VALIDATION, 32), probes)
    for task in SHAPES:
        means = {
            strength: np.mean([layer["ridge"] for layer in scores[task].values()])
            for strength, scores in validation.items()
        }
        assert choose_strength([validation], task) == max(means, key=means.get)
    one, two = {1.0: {"depth": {"0": {"ridge": 0.1}}}}, {2.0: {"depth": {"0": {"ridge": 0.3}}}}
    other = {1.0: {"depth": {"0": {"ridge": 0.6}}}, 2.0: two[2.0]}
    assert choose_strength([one | two], "depth") == 2.0 and choose_strength([one | two, other], "depth") == 1.0


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
    "idefics3": [(2, 2)] * 4,
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
