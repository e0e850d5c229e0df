"""Ridge probes: against a direct solution, planted maps, and which states they read."""

import numpy as np
import pytest
import torch
from conftest import random_image
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from ola_vlm.probing.ridge import (
    ModelProbe,
    RidgeProbe,
    centred_cosine,
    choose_strength,
    flat_cosine,
    to_positions,
)


def planted(rows=200, width=6, target=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 1.0]) + 7
    weights = torch.randn(width, target, generator=generator)
    return x, x @ weights + 3, weights


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
    weights, intercept = probe.solve(strength)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(intercept.numpy(), target.mean(0) - data.mean(0) @ expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(probe.predict(x, strength).numpy(), data @ expected + intercept.numpy(), rtol=1e-5)


def test_ridge_recovers_a_planted_map():
    x, y, weights = planted()
    probe = RidgeProbe()
    probe.update(x, y)
    torch.testing.assert_close(probe.solve(1e-12)[0].float(), weights, rtol=1e-3, atol=1e-3)
    new_x = planted(seed=2)[0]
    torch.testing.assert_close(probe.predict(new_x, 1e-12), new_x @ weights + 3, rtol=1e-4, atol=1e-3)


def test_ridge_does_not_depend_on_batches_scale_or_dead_channels():
    x, y, _ = planted()
    whole, pieces, scaled = RidgeProbe(), RidgeProbe(), RidgeProbe()
    whole.update(x, y)
    for a, b in zip(x.split(7), y.split(7), strict=True):
        pieces.update(a, b)
    scaled.update(torch.cat([x.double() * 1024, torch.full((200, 1), 5.0, dtype=torch.double)], dim=1), y)
    expected = whole.predict(x, 0.1)
    torch.testing.assert_close(pieces.predict(x, 0.1), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        scaled.predict(torch.cat([x.double() * 1024, torch.full((200, 1), 5.0, dtype=torch.double)], dim=1), 0.1),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )


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


IMAGES = [random_image(i) for i in range(24)]
SPLITS = {"train": range(16), "validation": range(16, 20), "test": range(20, 24)}


SHAPES = {"gen": (1, 12), "depth": (16, 10), "seg": (16, 14)}


def random_targets():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(24, *shape, generator=generator) for name, shape in SHAPES.items()}


def sources(targets):
    """Functions from images to their targets, which are in the order of IMAGES."""
    order = {id(image): i for i, image in enumerate(IMAGES)}
    return {
        task: lambda images, target=target: target[[order[id(image)] for image in images]]
        for task, target in targets.items()
    }


def probe_model(model, processor, targets, strength, **options):
    """Scores on the test images of probes fitted on the training images."""
    probe = ModelProbe(model, processor, sources(targets), **options).fit(IMAGES, SPLITS["train"])
    return probe.score(IMAGES, SPLITS["test"], [strength])[strength]


def test_states_are_the_image_tokens_only(make_model):
    model, processor = make_model()
    model.generation_config.suppress_tokens = None
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        probe = ModelProbe(model, processor, {}, prompt="what color")
        states = probe.states(IMAGES[:3])
        assert len(states) == 5 and all(state.shape == (3, 16, 32) for state in states)
    rotated = IMAGES[0].copy()
    rotated.getexif()[0x0112] = 6  # the teachers see it upright, so must the student
    assert probe.states([rotated])[-1].equal(probe.states([IMAGES[0].rotate(-90)])[-1])
    inputs = processor(text=[probe.text], images=IMAGES[1:2], return_tensors="pt", add_special_tokens=False)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16 < inputs["input_ids"].shape[1] - 8
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    torch.testing.assert_close(states[0][1], features)  # what the projector put in their place
    first = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0].item()
    for layer in range(5):
        expected = output.hidden_states[layer][0, first : first + 16]
        torch.testing.assert_close(states[layer][1], expected, rtol=1e-4, atol=1e-4)
    # What follows the image is not seen: neither the words nor the task tokens change the states.
    longer = ModelProbe(model, processor, {}, prompt="what is this color of the cube").states(IMAGES[:3])
    for one, other in zip(states, longer, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_layer_that_holds_the_target_scores_one(make_model):
    model, processor = make_model()
    states = ModelProbe(model, processor, {}).states(IMAGES)
    mixing = torch.randn(32, 10, generator=torch.Generator().manual_seed(0))
    targets = {"depth": states[2] @ mixing, "seg": random_targets()["seg"]}
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


def test_predictions_have_the_score(make_model):
    model, processor = make_model()
    targets = random_targets()
    probe = ModelProbe(model, processor, sources(targets), batch_size=3).fit(IMAGES, SPLITS["train"])
    predictions = {task: {} for task in targets}
    for task, layer, prediction in probe.predict(probe.states(IMAGES[20:]), 0.1):
        predictions[task][layer] = prediction
    score = probe.score(IMAGES, SPLITS["test"], [0.1])[0.1]
    assert predictions["depth"][3].shape == (4, 16, 10) and predictions["gen"][0].shape == (4, 1, 12)
    cosine = centred_cosine(predictions["seg"][4], targets["seg"][20:], targets["seg"][:16].mean(0)).mean()
    assert cosine.item() == pytest.approx(score["seg"]["4"]["ridge"], abs=1e-5)


def test_the_strength_is_chosen_on_validation(make_model):
    model, processor = make_model()
    strengths = [1e-6, 1e3]
    probe = ModelProbe(model, processor, sources(random_targets())).fit(IMAGES, SPLITS["train"])
    validation = probe.score(IMAGES, SPLITS["validation"], strengths)
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
