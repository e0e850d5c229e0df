"""The embedding loss against the reference's recorded tensors (golden c) and its own promises."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ola_vlm.training.losses import embedding_loss

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
    assert_close(loss.smooth_l1, data["ones.sl1"])
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
    assert loss.smooth_l1.item() == pytest.approx(0.8002, abs=1e-4)
    loss = embedding_loss(data["preds"][:3], data["targets"][:3], torch.tensor(SCALE))
    assert loss.smooth_l1.item() == pytest.approx(0.7468, abs=1e-4)


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
    assert wrong.smooth_l1 > 5 * right.smooth_l1 and wrong.contrastive > 2 * right.contrastive
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
