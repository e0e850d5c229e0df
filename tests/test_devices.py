"""Every tensor of a computation is on one device: on a GPU that isn't there (`claimed_gpu`)."""

import pytest
import torch
from claimed_gpu import ClaimedGpu, MixedDevices, move, on_gpu
from conftest import encode, random_rows, tiny_tasks
from tiny_teachers import GRID, random_images, save_clip_image, save_depth_anything, save_oneformer
from training_helpers import make_trainer

from ola_vlm.probing.fit import fit
from ola_vlm.probing.resampler import ResamplerFit
from ola_vlm.probing.ridge import RidgeFit
from ola_vlm.probing.states import StateReader
from ola_vlm.targets.encoders import ENCODERS

ROWS = random_rows(4, [1, 0, 2, 1])


def sent(batch: dict) -> dict:
    return {name: on_gpu(value) for name, value in batch.items()}


def test_a_tensor_made_without_a_device_is_noticed():
    x = on_gpu(torch.ones(3))
    with ClaimedGpu():
        assert (x + torch.ones(3, device=x.device)).device == (x + torch.ones(3).to("cuda")).device == x.device
        assert (x * torch.tensor(2.0)).sum().item() == 6  # of no dimension: goes along
        assert x.cpu().device.type == x.to("cpu").device.type == "cpu"
        for mixed in (lambda: x + torch.arange(3), lambda: torch.cat([x, torch.ones(3)]), x.numpy):
            with pytest.raises(MixedDevices):
                mixed()


# A task whose targets are words, which the model looks up, beside the paper's.
WORDS = {"name": "words", "predictor": "none", "target": "words", "layers": [0], "target_length": 16, "loss": "mse"}


@pytest.mark.parametrize("tasks", [None, [WORDS], [{**WORDS, "loss": "moments"}]], ids=["paper", "words", "moments"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_forward_losses_and_backward(make_model, tmp_path, stage, tasks):
    model, processor = make_model(tasks)
    trainer = make_trainer(model, processor, tmp_path, stage=stage)
    batches = [trainer.data_collator(ROWS), trainer.data_collator(random_rows(2, 0))]  # the second one has no image
    exact = [trainer.compute_loss(model.train(), dict(batch)).item() for batch in batches]
    move(model)
    with ClaimedGpu():
        for batch, expected in zip(batches, exact, strict=True):
            batch = sent(batch)
            batch["targets"] = sent(batch["targets"])
            if trainer.tasks:
                trainer._attach_step_targets([batch], torch.device("cuda"))
            loss = trainer.compute_loss(model, batch)
            assert loss.device.type == "cuda" and loss.item() == pytest.approx(expected, rel=1e-6)
            loss.backward()
        model.eval().write_task_tokens()
        inputs = sent(encode(processor, ROWS))
        outputs = model(**inputs, labels=inputs["input_ids"], output_predictions=True)
        assert {x.device.type for by_layer in outputs.predictions.values() for x in by_layer.values()} == {"cuda"}


def test_generation(make_model):
    model, processor = make_model()
    inputs = encode(processor, ROWS, padding_side="left")
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.eval().generate(**inputs, **options)
    move(model)
    with ClaimedGpu():
        assert model.generate(**sent(inputs), **options).cpu().equal(expected)


@pytest.mark.parametrize("kind", ["ridge", "resampler"])
def test_probes(make_model, tmp_path, kind):
    """Fitted on the CPU half way, and to the end on the GPU: the statistics follow the model."""
    model, processor = make_model(tasks=[])
    images = random_images(8)
    tasks = tiny_tasks()[:2]
    targets = {task["name"]: lambda images, task=task: targets_of(task, images) for task in tasks}
    make = {"ridge": RidgeFit, "resampler": ResamplerFit}[kind]

    def fitter():
        torch.manual_seed(0)
        options = {} if kind == "ridge" else {"images": len(images), "epochs": 1, "step_images": 4}
        return make(tasks, 5, 32, **options)

    whole = fitter()
    fit(whole, StateReader(model, processor), targets, images, batch_size=4)
    half = fitter()
    half.plan = lambda count, batch_size: whole.plan(count, batch_size)[:1]
    fit(half, StateReader(model, processor), targets, images, batch_size=4, saved=tmp_path / "fit.safetensors")
    move(model)
    with ClaimedGpu():
        rest = fitter()
        if kind == "resampler":
            move(rest.probes.modules)
        fit(rest, StateReader(model, processor), targets, images, batch_size=4, saved=tmp_path / "fit.safetensors")


def targets_of(task: dict, images: list) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(images), task["target_length"], task["target_dim"], generator=generator)


@pytest.mark.parametrize("name", ["depth_anything", "oneformer", "clip_image"])
def test_teachers(tmp_path, name):
    save = {"depth_anything": save_depth_anything, "oneformer": save_oneformer, "clip_image": save_clip_image}[name]
    save(tmp_path)
    encoder = ENCODERS[name].from_pretrained(str(tmp_path), grid=GRID)
    images = random_images(2)
    expected = encoder.encode(images)
    pictures = encoder.decode(expected, images) if name != "clip_image" else None
    move(encoder.model)
    with ClaimedGpu():
        found = encoder.encode(images)
        assert found.device.type == "cpu" and found.equal(expected)
        if pictures is not None:
            assert torch.as_tensor(encoder.decode(found, images)).equal(torch.as_tensor(pictures))
