"""The embedding loss against the reference's recorded tensors (golden c) and its own promises."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ola_vlm.training.losses import (
    DISTANCES,
    EPSILON,
    Moments,
    StepTargets,
    combine_words,
    embedding_loss,
    task_loss,
)

GOLDEN = Path(__file__).parent / "golden"
SCALE = 2.0  # the recorded logit scale


def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def leaf(tensor):
    return tensor.clone().requires_grad_()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("task", ["gen", "depth", "seg"])
def test_golden_all_images(task):
    data = golden(f"c_emb_loss_{task}")
    prediction, scale = leaf(data["preds"]), leaf(torch.tensor(SCALE))
    loss = embedding_loss(prediction, data["targets"], scale)
    assert_close(loss.distance, data["ones.sl1"])
    assert_close(0.3 * loss.contrastive, data["ones.contrastive"])
    assert_close(loss.total, data["ones.emb_loss"])
    assert_close(loss.contrastive, data["contrastive_per_sample"].mean())
    loss.total.backward()
    assert_close(prediction.grad, data["ones.grad_preds"])
    assert_close(scale.grad, data["ones.grad_logit_scale"])


@pytest.mark.parametrize("task", ["gen", "depth", "seg"])
def test_golden_no_images(task):
    data = golden(f"c_emb_loss_{task}")
    scale = leaf(torch.tensor(SCALE))
    for columns, offset in ((None, 0), (data["targets"], 4)):  # no image in the step; none on this rank
        prediction = leaf(data["preds"][:0])
        loss = embedding_loss(prediction, data["targets"][:0], scale, targets_MQE=columns, offset=offset)
        assert [part.item() for part in loss] == [0.0, 0.0, 0.0] == [data["zeros.emb_loss"].item()] * 3
        loss.total.backward()
        assert prediction.grad.shape == prediction.shape
        assert scale.grad == 0 == data["zeros.grad_logit_scale"]


def test_rows_without_image_are_left_out_altogether():
    # On purpose unlike the reference (mask 1010: .4001): the mean over the image rows, no text row as a negative.
    data = golden("c_emb_loss_depth")
    rows = [0, 2]
    loss = embedding_loss(data["preds"][rows], data["targets"][rows], torch.tensor(SCALE))
    assert loss.distance.item() == pytest.approx(0.8002, abs=1e-4)
    loss = embedding_loss(data["preds"][:3], data["targets"][:3], torch.tensor(SCALE))
    assert loss.distance.item() == pytest.approx(0.7468, abs=1e-4)


def test_golden_two_ranks():
    data = golden("c_contrastive_2ranks")
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        prediction, scale = leaf(data["preds"][rows]), leaf(torch.tensor(SCALE))
        loss = embedding_loss(
            prediction, data["targets"][rows], scale, targets_MQE=data["targets"], offset=2 * rank, num_images=2
        )
        assert_close(loss.contrastive, data[f"rank{rank}.loss"].mean())
        loss.contrastive.backward()
        assert_close(prediction.grad, data[f"rank{rank}.grad_preds"])
        assert_close(scale.grad, data[f"rank{rank}.grad_logit_scale"])


def test_micro_batches_of_unequal_size_add_up_to_one_batch():
    torch.manual_seed(0)
    targets, weights = torch.randn(7, 3, 5), torch.randn(7, 3, 5)

    def parts(splits):
        prediction, scale = leaf(weights), leaf(torch.tensor(SCALE))
        offset, total = 0, torch.zeros(3)
        for size in splits:
            rows = slice(offset, offset + size)
            loss = embedding_loss(
                prediction[rows], targets[rows], scale, targets_MQE=targets, offset=offset, num_images=7
            )
            loss.total.backward()
            total += torch.stack(loss).detach()
            offset += size
        return total, prediction.grad, scale.grad

    for one, several in zip(parts([7]), parts([4, 0, 2, 1]), strict=True):
        torch.testing.assert_close(several, one, rtol=1e-6, atol=1e-7)


def test_targets_of_another_sample_cost_more():
    torch.manual_seed(0)
    targets = torch.randn(6, 4, 8)
    prediction = targets + 0.1 * torch.randn_like(targets)
    right = embedding_loss(prediction, targets, torch.tensor(SCALE))
    wrong = embedding_loss(prediction, targets.roll(1, 0), torch.tensor(SCALE))
    assert wrong.distance > 5 * right.distance and wrong.contrastive > 2 * right.contrastive
    assert embedding_loss(prediction, targets, torch.tensor(SCALE), targets_MQE=targets, offset=0) == right


def test_bf16_predictions_are_compared_in_fp32():
    torch.manual_seed(0)
    prediction, target = leaf(torch.randn(4, 2, 8).bfloat16()), torch.randn(4, 2, 8)
    loss = embedding_loss(prediction, target, torch.tensor(SCALE, dtype=torch.bfloat16))
    assert all(part.dtype == torch.float32 for part in loss)
    torch.testing.assert_close(loss.total, embedding_loss(prediction.float(), target, torch.tensor(SCALE)).total)
    loss.total.backward()
    assert prediction.grad.abs().sum() > 0


def test_logit_scale_is_clamped_at_100():
    data = golden("c_emb_loss_depth")
    capped = embedding_loss(data["preds"], data["targets"], torch.tensor(50.0))
    assert_close(capped.contrastive, data["contrastive_per_sample_scale_clamped"].mean())


def distance(name: str, prediction, target, columns=None, offset=0, num_images=None):
    """The loss `name` without its contrastive term."""
    task = {"loss": name, "contrastive_weight": 0.0, "target": "features", "combine": "sum"}
    columns = target if columns is None else columns
    num_images = len(prediction) if num_images is None else num_images
    targets = StepTargets.make(task, target, columns, offset, num_images)
    return task_loss(prediction, targets, torch.tensor(SCALE), name, 0.0).distance


def test_cosine_by_hand():
    target = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 1.0]]])
    prediction = torch.tensor([[[5.0, 0.0], [0.0, -1.0]], [[0.0, 1.0], [1.0, 1.0]]])
    # 1 - cosine: 0 and 2, 1 and 1 - sqrt(.5).
    assert distance("cosine", prediction, target).item() == pytest.approx((0 + 2 + 1 + 1 - 0.5**0.5) / 4)


def test_squared_error_over_the_variance_by_hand():
    target = torch.tensor([[[0.0, 10.0], [2.0, 14.0]], [[4.0, 10.0], [6.0, 14.0]]])
    # Variances of the channels 5 and 4: 4.5.
    assert distance("mse", target + 3.0, target).item() == pytest.approx(9 / 4.5)
    mean = target.mean((0, 1)).expand_as(target)
    assert distance("mse", mean, target).item() == pytest.approx(1.0)


def test_moments_by_hand():
    target = torch.tensor([[[0.0], [2.0]], [[4.0], [6.0]]])
    # Mean 3, variance 5, deviation of an image's positions 1.
    prediction = torch.tensor([[[2.0], [8.0]], [[3.0], [3.0]]])  # means 5 and 3, deviations 3 and (nearly) 0
    none = (5 * EPSILON) ** 0.5
    expected = ((2**2 + (3 - 1) ** 2) / 5 + (0 + (none - 1) ** 2) / 5) / 2
    assert distance("moments", prediction, target).item() == pytest.approx(expected, rel=1e-5)


def test_moments_know_no_content():
    torch.manual_seed(0)
    prediction, target = torch.randn(4, 9, 5), torch.randn(4, 9, 5)
    expected = distance("moments", prediction, target)
    assert_close(distance("moments", prediction, target.roll(1, 0)), expected)  # other images' targets
    assert_close(distance("moments", prediction[:, torch.randperm(9)], target), expected)
    assert distance("mse", prediction, target.roll(1, 0)) != distance("mse", prediction, target)


@pytest.mark.parametrize("name", DISTANCES)
def test_every_loss_adds_up_over_micro_batches(name):
    torch.manual_seed(0)
    values, targets = torch.randn(7, 4, 5), torch.randn(7, 4, 5) + 2

    def run(sizes):
        prediction = leaf(values)
        offset, total = 0, 0.0
        for size in sizes:
            rows = slice(offset, offset + size)
            part = distance(name, prediction[rows], targets[rows], targets, offset, 7)
            part.backward()
            total += part.item()
            offset += size
        return torch.tensor(total), prediction.grad

    for one, several in zip(run([7]), run([4, 0, 2, 1]), strict=True):
        torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", DISTANCES)
def test_every_loss_is_zero_without_images_and_finite_without_variance(name):
    scale = leaf(torch.tensor(SCALE))
    for columns in (torch.zeros(0, 4, 5), torch.ones(3, 4, 5)):  # no image in the step; none on this rank
        prediction = leaf(torch.zeros(0, 4, 5))
        moments = Moments.of([columns])
        targets = StepTargets(torch.zeros(0, 4, 5), None, moments, 0, len(columns))
        loss = task_loss(prediction, targets, scale, name, 0.3)
        assert [part.item() for part in loss] == [0.0, 0.0, 0.0]
        loss.total.backward()
        assert prediction.grad.shape == (0, 4, 5) and scale.grad == 0
    prediction = leaf(torch.ones(2, 4, 5) * 2)  # all positions alike, in the targets, too
    loss = distance(name, prediction, torch.ones(2, 4, 5))
    loss.backward()
    assert loss.isfinite() and prediction.grad.isfinite().all()
    prediction.grad = None
    loss = distance(name, prediction, torch.zeros(2, 4, 5))  # no scale at all
    loss.backward()
    assert loss.isfinite() and prediction.grad.isfinite().all()


@pytest.mark.parametrize("name", ["mse", "moments"])
def test_targets_that_are_all_zero_leave_the_squared_error_as_it_is(name):
    prediction = leaf(torch.full((2, 4, 5), 0.5))
    assert distance(name, prediction, torch.zeros(2, 4, 5)).item() == pytest.approx(0.25, rel=1e-5)


def test_words_are_sums_or_means_of_their_tables_rows():
    colors, depths = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[10.0, 10.0], [20.0, 20.0], [30.0, 30.0]])
    numbers = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    expected = torch.tensor([[[30.0, 31.0], [11.0, 10.0]]])
    assert combine_words(numbers, [colors, depths], "sum").equal(expected)
    assert combine_words(numbers, [colors, depths], "mean").equal(expected / 2)
    with pytest.raises(IndexError):
        combine_words(torch.tensor([[[2.0, 0.0]]]), [colors, depths], "sum")


def test_a_word_that_is_missing_adds_nothing():
    colors, depths = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[10.0, 10.0], [20.0, 20.0]])
    numbers = torch.tensor([[[1, -1], [0, 1]]], dtype=torch.int16)
    assert combine_words(numbers, [colors, depths], "sum").equal(torch.tensor([[[0.0, 1.0], [21.0, 20.0]]]))
    assert combine_words(numbers, [colors, depths], "mean").equal(torch.tensor([[[0.0, 1.0], [10.5, 10.0]]]))
    none = torch.tensor([[[-1, -1]]], dtype=torch.int16)
    for combine in ("sum", "mean"):
        assert combine_words(none, [colors, depths], combine).equal(torch.zeros(1, 1, 2))


def test_the_columns_of_words_are_made_for_the_contrastive_term_only():
    tables = [torch.randn(3, 5), torch.randn(2, 5)]
    numbers = torch.zeros(4, 6, 2)
    task = {"loss": "mse", "contrastive_weight": 0.0, "target": "words", "combine": "sum"}
    assert StepTargets.make(task, numbers, numbers, 0, 4, tables).columns_MQE is None
    contrasted = StepTargets.make({**task, "contrastive_weight": 0.1}, numbers, numbers, 0, 4, tables)
    assert contrasted.columns_MQE.equal(contrasted.target_NQE) and contrasted.target_NQE.shape == (4, 6, 5)
