"""Objectives other than the paper's: what patches and the projector's output are compared with, and when."""

import re
from functools import partial

import pytest
import torch
from conftest import encode, make_tokenizer, random_image, random_rows
from tiny_vlms import FAMILIES
from torch.nn import functional as F
from training_helpers import Interrupt, losses, make_trainer, target_source, weights
from transformers import AutoModelForCausalLM, GPT2Config, GraniteConfig

from ola_vlm.configuration_ola_vlm import normalize_task, target_shape
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.modeling_ola_vlm import PatchPredictor
from ola_vlm.targets.place_code import append_place_code, place_code
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.attach import attach_predictors, image_layout
from ola_vlm.training.collator import AttachedCollator
from ola_vlm.training.stages import apply_stage, part_of
from ola_vlm.training.trainer import OlaVlmTrainer

PATCH = {"name": "patch", "predictor": "patch", "layers": [2], "target_length": 16, "target_dim": 6}
WORDS = {"name": "words", "predictor": "none", "target": "words", "layers": [0], "target_length": 16, "loss": "mse"}
WORDS |= {"contrastive_weight": 0.0, "loss_weight": 1.0}
MOMENTS = {**WORDS, "name": "moments", "loss": "moments"}
PLACES = {**PATCH, "name": "places", "place_code": 8, "loss": "cosine", "predictor_depth": 2, "layers": [0, 3]}
RESAMPLER = {"name": "depth", "layers": [1], "target_length": 16, "target_dim": 6, "num_task_tokens": 4}
RESAMPLER |= {"predictor_heads": 2, "predictor_head_dim": 8}
KINDS = {"patch": [PATCH], "words": [WORDS], "moments": [MOMENTS], "places": [PLACES], "both": [RESAMPLER, WORDS]}
every_kind = pytest.mark.parametrize("kind", KINDS)


def predict(model, inputs: dict, **options):
    return model(**inputs, output_predictions=True, **options)


def image_columns(model, inputs: dict) -> list[tuple[int, torch.Tensor]]:
    """Row and columns of each image's tokens, in the order of images."""
    found = []
    for row, ids in enumerate(inputs["input_ids"]):
        columns = (ids == model.config.image_token_id).nonzero().flatten()
        found += [(row, part) for part in columns.split(16) if len(part) > 0]
    return found


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_patch_is_read_from_its_own_token(make_model, padding_side, depth):
    model, processor = make_model([{**PATCH, "predictor_depth": depth, "predictor_dim": 5}])
    inputs = encode(processor, random_rows(3, [2, 0, 1]), padding_side)
    output = predict(model, inputs, output_hidden_states=True)
    predictions = output.predictions["patch"][2]
    layers = model.predictors["patch"]["2"].layers
    assert [layer.out_features for layer in layers] == [5, 6][-depth:]
    for n, (row, columns) in enumerate(image_columns(model, inputs)):
        expected = layers[0](output.hidden_states[2][row, columns])
        if depth == 2:
            expected = layers[1](F.gelu(expected))
        torch.testing.assert_close(predictions[n], expected)


def test_layer_0_is_what_the_projector_gives(make_model):
    model, processor = make_model([WORDS])
    inputs = encode(processor, random_rows(2, [1, 2]))
    predictions = predict(model, inputs).predictions["words"][0]
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(predictions, torch.stack(list(features)))
    assert not [name for name in model.state_dict() if name.startswith("predictors")]


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(
            hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
            vocab_size=64, embedding_multiplier=12.0, logits_scaling=1.0,
        ),
        GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=64, tie_word_embeddings=False),
    ],
    ids=["granite", "gpt2"],
)  # fmt: skip
def test_layer_0_is_on_the_words_own_scale(tiny_parts, config):
    """Granite multiplies what enters it, images and words alike, and GPT-2 adds positions: a projected token that lies
    on a word has no loss whatever they do."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config)
    model, processor = build_ola_vlm(tiny_parts.vision_tower, llm, make_tokenizer(), tasks=[WORDS])
    inputs = encode(processor, random_rows(2, [1, 2]))
    word_ids = {"words": [torch.tensor([[7], [9]])]}
    output = predict(model.eval(), inputs, word_ids=word_ids, output_hidden_states=True)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(output.predictions["words"][0], torch.stack(list(features)))
    torch.testing.assert_close(output.word_embeddings["words"][0], model.get_input_embeddings().weight[[7, 9]])
    # What transformers calls layer 0 is still given as it is.
    row, columns = image_columns(model, inputs)[0]
    assert not torch.allclose(output.hidden_states[0][row, columns], features[0])


def test_several_tokens_of_a_targets_cell_are_averaged(make_model):
    model, processor = make_model([PATCH, {**PATCH, "name": "coarse", "target_length": 4}, {**PATCH, "name": "one"}])
    model.config.tasks[2]["target_length"] = 1
    model.predictors.load_state_dict(
        {
            name.replace("patch", other): value
            for other in ("patch", "coarse", "one")
            for name, value in model.predictors.state_dict().items()
            if name.startswith("patch")
        }
    )
    predictions = predict(model, encode(processor, random_rows(2, 1))).predictions
    grid = predictions["patch"][2].unflatten(1, (4, 4))
    for cell in range(4):
        row, column = 2 * (cell // 2), 2 * (cell % 2)
        expected = grid[:, row : row + 2, column : column + 2].mean((1, 2))
        torch.testing.assert_close(predictions["coarse"][2][:, cell], expected)
    torch.testing.assert_close(predictions["one"][2][:, 0], grid.mean((1, 2)))


def test_grids_that_do_not_fit_are_refused(make_model):
    model, processor = make_model([{**PATCH, "target_length": 5}])
    inputs = encode(processor, random_rows(1))
    with pytest.raises(
        ValueError, match=r"task 'patch': an image has 16 tokens, its target 5 .* set target_length to 16"
    ):
        predict(model, inputs)
    model, _ = make_model([{**WORDS, "target_length": 4}])
    with pytest.raises(ValueError, match=r"task 'words': images have \[16\] tokens, targets 4 positions: .*set"):
        predict(model, inputs)


@every_kind
def test_predictions_do_not_depend_on_batch_mates(make_model, kind):
    model, processor = make_model([dict(task) for task in KINDS[kind]])
    model.eval()
    rows = random_rows(4, [1, 0, 2, 1])
    together = predict(model, encode(processor, rows, "left")).predictions
    alone = predict(model, encode(processor, rows[2:3])).predictions
    for name, layers in alone.items():
        for layer, predicted in layers.items():
            assert predicted.shape[:2] == (2, 16)
            torch.testing.assert_close(together[name][layer][1:3], predicted, rtol=1e-4, atol=1e-5)


@every_kind
def test_where_gradients_go(make_model, tmp_path, kind):
    """By the embedding losses alone."""
    model, processor = make_model([dict(task) for task in KINDS[kind]])
    trainer = make_trainer(model, processor, tmp_path)
    batch = trainer.data_collator(random_rows(4, [1, 2, 0, 1]))
    loss = trainer.compute_loss(model.train(), batch)
    parts = {name: value.item() for name, value in trainer._sums["train"].items() if name != "steps"}
    expected = {
        f"loss/{task['name']}/{layer}/{part}"
        for task in model.config.tasks
        for layer in task["layers"]
        for part in (task["loss"], "contrastive")
    }
    assert parts.keys() == {"loss/ntp"} | expected
    total = parts["loss/ntp"]
    for task in model.config.tasks:
        for layer in task["layers"]:
            of_layer = parts[f"loss/{task['name']}/{layer}/{task['loss']}"]
            contrastive = parts[f"loss/{task['name']}/{layer}/contrastive"]
            assert of_layer > 0
            assert (contrastive > 0) == (task["contrastive_weight"] > 0)
            total += task["loss_weight"] * (of_layer + task["contrastive_weight"] * contrastive)
    assert loss.item() == pytest.approx(total, rel=1e-5)

    (loss - outputs_loss(trainer, model, batch)).backward()
    touched = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    reached = {part_of(name) for name in touched}
    assert {"projector"} <= reached <= {"projector", "predictors", "queries", "logit_scales"}
    with_gradient = {name for name, value in model.named_parameters() if value.grad is not None}
    assert {name for name in with_gradient if part_of(name) in ("vision_tower", "language_model")} == set()


def outputs_loss(trainer, model, batch: dict):
    """The next tokens' loss of the same batch."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")}
    return model(**inputs, use_cache=False).loss


@every_kind
def test_without_images_losses_are_zero_and_finite(make_model, tmp_path, kind):
    model, processor = make_model([dict(task) for task in KINDS[kind]])
    trainer = make_trainer(model, processor, tmp_path)
    batch = trainer.data_collator(random_rows(2, 0))
    assert {name: value.shape for name, value in batch["targets"].items()} == {
        task["name"]: (0, *target_shape(task)) for task in model.config.tasks
    }
    loss = trainer.compute_loss(model.train(), batch)
    loss.backward()
    parts = {name: value.item() for name, value in trainer._sums["train"].items() if name.startswith("loss/")}
    assert parts.pop("loss/ntp") == loss.item() and set(parts.values()) == {0.0}
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.isfinite().all()), name


@every_kind
def test_accumulated_micro_batches_train_like_one_batch(make_model, tmp_path, kind):
    runs = []
    for size, accumulated in ((8, 1), (2, 4)):
        model, processor = make_model([dict(task) for task in KINDS[kind]])
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "optim": "sgd"}
        trainer = make_trainer(model, processor, tmp_path, learning_rate=0.1, **options)
        trainer.train()
        runs.append((losses(trainer), weights(model)))
    (expected_losses, expected), (found_losses, found) = runs
    for step, expected_step in zip(found_losses, expected_losses, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-4, abs=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


def test_a_loss_is_off_after_its_share_of_the_steps(make_model, tmp_path):
    """Exactly, and in a run that was interrupted after that."""

    def trainer_of(folder, callbacks=(), **options):
        model, processor = make_model([{**PATCH, "until": 0.5}, WORDS])
        schedule = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
        return make_trainer(model, processor, folder, callbacks=callbacks, **schedule, **options)

    whole = trainer_of(tmp_path / "whole")
    whole.train()
    step_losses = losses(whole)
    assert [step.pop("loss_weight/patch") for step in step_losses] == [0.5] * 3 + [0.0] * 3
    for i, step in enumerate(step_losses):
        weight = 0.5 if i < 3 else 0.0
        expected = step["loss/ntp"] + step["loss/words/0/mse"]
        expected += weight * (step["loss/patch/2/smooth_l1"] + 0.3 * step["loss/patch/2/contrastive"])
        assert step["loss"] == pytest.approx(expected, rel=1e-5)
    assert "loss_weight/words" not in step_losses[0]

    for stopped_at in (3, 6):
        folder = tmp_path / f"stopped_at_{stopped_at}"
        with pytest.raises(KeyboardInterrupt):
            trainer_of(folder, [Interrupt(stopped_at)]).train()
        resumed = trainer_of(folder)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{(stopped_at - 1) // 2 * 2}"))
        for name, value in weights(whole.model).items():
            assert value.equal(weights(resumed.model)[name]), name


def test_a_runs_own_share_counts_instead_of_the_tasks(make_model, tmp_path):
    model, processor = make_model([PATCH])
    trainer = make_trainer(model, processor, tmp_path, max_steps=4, losses_until=0.25)
    trainer.train()
    assert [step["loss_weight/patch"] for step in losses(trainer)] == [0.5, 0, 0, 0]
    assert trainer.evaluate()["eval_loss"] > trainer.evaluate()["eval_loss/ntp"] + 0.1  # in evaluation it is never off
    with pytest.raises(ValueError, match=r"losses_until is 1\.5: a share"):
        make_trainer(model, processor, tmp_path, losses_until=1.5)


def test_place_code_by_hand():
    code = place_code(4, 8)
    assert code.shape == (4, 8)
    angle = torch.tensor(0.75 * torch.pi)  # the third position: second row, first column
    row = [angle.sin(), (2 * angle).sin(), angle.cos(), (2 * angle).cos()]
    angle = torch.tensor(0.25 * torch.pi)
    column = [angle.sin(), (2 * angle).sin(), angle.cos(), (2 * angle).cos()]
    torch.testing.assert_close(code[2], torch.stack([*row, *column]))
    assert len({tuple(place.tolist()) for place in place_code(64, 8)}) == 64
    features = torch.randn(3, 4, 5, dtype=torch.bfloat16)
    joined = append_place_code(features, 8)
    assert joined.dtype == torch.bfloat16 and joined[..., :5].equal(features)
    assert joined[1, :, 5:].equal(code.bfloat16())


WRONG = [
    ({**PATCH, "predictor": "mlp"}, r"predictor is 'mlp': choose one of \['resampler', 'patch', 'none'\]"),
    ({**PATCH, "loss": "l2"}, r"loss is 'l2': choose one of"),
    ({**PATCH, "target": "boxes"}, r"target is 'boxes': choose one of \['features', 'words'\]"),
    ({**PATCH, "num_task_tokens": 4}, r"num_task_tokens is 4: give 0, predictor \"patch\" reads"),
    ({**PATCH, "output_mlp": True}, "output_mlp is True: give false, or predictor_depth"),
    ({**PATCH, "predictor": "none"}, "target_dim is 6: give 32, the width of a token"),
    ({**PATCH, "place_code": 6}, "place_code is 6: give a multiple of 4"),
    ({**PATCH, "place_code": 4, "target_length": 5}, "place_code is 4: give 0: only a square grid"),
    ({**PATCH, "until": 0}, "until is 0: give a share"),
    ({**PATCH, "until": 1.5}, "until is 1.5: give a share"),
    ({**PATCH, "layers": [5]}, "layers is .5.: choose from 1 to 4, the LLM's layers, or 0"),
    ({**WORDS, "target_dim": 8}, "target_dim is 8: give 32, the width of a word"),
    ({**WORDS, "place_code": 4}, "place_code is 4: give 0: words"),
    ({**WORDS, "words": []}, "words is .*: list one or more different names"),
    ({**WORDS, "words": ["class", "class"]}, "words is .*: list one or more different names"),
    ({**WORDS, "combine": "max"}, "combine is 'max': choose one of"),
    ({**MOMENTS, "contrastive_weight": 0.3}, 'contrastive_weight is 0.3: give 0: loss "moments"'),
    ({**MOMENTS, "target_length": 1}, "target_length is 1: a single position has no deviation"),
]


@pytest.mark.parametrize(("task", "message"), WRONG)
def test_fields_that_do_not_fit_are_refused(task, message):
    with pytest.raises(ValueError, match=rf"tasks\[{task['name']}\]\.{message}"):
        normalize_task(task, 32, 4)


def test_defaults_of_each_kind():
    patch = normalize_task({**PATCH, "name": "depth"}, 32, 4)  # for its name, the paper's has tokens and an MLP
    assert (patch["num_task_tokens"], patch["output_mlp"], patch["contrastive_weight"]) == (0, False, 0.3)
    assert normalize_task(WORDS, 32, 4)["target_dim"] == 32
    moments = normalize_task({**PATCH, "loss": "moments"}, 32, 4)
    assert moments["contrastive_weight"] == 0
    assert target_shape(normalize_task(PLACES, 32, 4)) == (16, 14)
    assert target_shape(normalize_task(WORDS, 32, 4)) == (16, 2)


def test_saved_and_loaded_again(make_model, tmp_path):
    model, processor = make_model([PATCH, PLACES, WORDS])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.tasks == model.config.tasks
    assert isinstance(loaded.predictors["patch"]["2"], PatchPredictor)
    inputs = encode(processor, random_rows(1))
    for name, layers in predict(loaded.eval(), inputs).predictions.items():
        for layer, predicted in layers.items():
            assert predicted.equal(predict(model.eval(), inputs).predictions[name][layer])


# Attached to models of other families


def attach(family: str, tasks: list[dict], **sizes):
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    for name, value in sizes.items():
        setattr(processor.image_processor, name, value)
    model = attach_predictors(model, tasks, processor)
    sources = {task["name"]: target_source(task) for task in model.config.tasks}
    return model, processor, AttachedCollator(processor, sources, model.config.tasks)


# Qwen2.5-VL: 64 x 64 pixels make 4 x 4 tokens. Idefics3 (as SmolVLM): without tiles 2 x 2.
ONE_SIZE = {
    "qwen2_5_vl": {"size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}},
    "idefics3": {"do_image_splitting": False},
}
TOKENS = {"qwen2_5_vl": 16, "idefics3": 4}


@pytest.mark.parametrize("family", TOKENS)
def test_words_and_moments_on_an_attached_models_projector(family, tmp_path):
    length = TOKENS[family]
    tasks = [{**task, "target_length": length} for task in (WORDS, MOMENTS, {**PATCH, "layers": [0, 2]})]
    model, processor, collator = attach(family, tasks, **ONE_SIZE[family])
    for name in ("words", "moments"):
        kinds = collator.target_sources[name].sources
        collator.target_sources[name].sources = {
            kind: partial(source, length=length) for kind, source in kinds.items()
        }
    apply_stage(model, "pretrain")
    args = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 0.01}
    args |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    trainer = OlaVlmTrainer(
        model,
        OlaVlmArguments(output_dir=str(tmp_path), **args),
        data_collator=collator,
        train_dataset=random_rows(8, [1, 0, 2, 1] * 2),
        processing_class=processor,
    )
    batch = collator(random_rows(3, [1, 0, 2]))
    inputs = {
        name: value for name, value in batch.items() if name not in ("targets", "row_ids", "bad_rows", "long_rows")
    }
    entering = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    predictions = model.eval()(**inputs, output_predictions=True).predictions
    owner, states = batch["image_owner"], entering[0]
    is_pixel = batch["input_ids"] == model.config.image_token_id
    for n in range(3):
        own = states[(owner == n) & is_pixel]
        assert predictions["words"][0][n].equal(own)
        torch.testing.assert_close(predictions["patch"][0][n], model.predictors["patch"]["0"](own))
    before = weights(model)
    trainer.train()
    steps = losses(trainer)
    assert len(steps) == 2 and all(
        step[f"loss/{name}"] > 0
        for step in steps
        for name in ("words/0/mse", "moments/0/moments", "patch/0/smooth_l1", "patch/2/smooth_l1")
    )
    moved = {part_of(name) for name, value in weights(model).items() if not value.equal(before[name])}
    assert moved == {"projector", "predictors", "logit_scales"}


def test_an_attached_models_tiles_make_no_grid():
    model, _, collator = attach("idefics3", [{**PATCH, "target_length": 4}])
    rows = random_rows(1, 1)
    rows[0]["images"] = [random_image(0, (64, 64))]  # four tiles and the whole
    batch = collator(rows)
    inputs = {
        name: value for name, value in batch.items() if name not in ("targets", "row_ids", "bad_rows", "long_rows")
    }
    with pytest.raises(
        ValueError, match="task 'patch': an image has 5 tiles, which make no grid: set its processor's"
    ):
        model(**inputs, output_predictions=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_how_many_tokens_an_image_becomes_is_known_before_training(family):
    """Of one size: as many as the model itself finds, whatever the processor calls an image's token."""
    model, processor, _ = attach(family, [RESAMPLER | {"num_task_tokens": 0}], **ONE_SIZE.get(family, {}))
    collator = AttachedCollator(processor, side=64)
    batch = AttachedCollator(processor, {}, [], side=64)(random_rows(1, [1]))
    layout = image_layout(batch["image_owner"], batch["input_ids"], batch["attention_mask"], model.config)
    tokens = collator.tokens_of_image(model.config.image_token_id)
    assert tokens == int(layout.pixels_NT.sum()) > 1
    collator.check_tokens([WORDS | {"target_length": tokens}], model.config.image_token_id)
    with pytest.raises(ValueError, match=f"an image has {tokens} tokens, its targets {tokens + 1} positions"):
        collator.check_tokens([WORDS | {"target_length": tokens + 1}], model.config.image_token_id)
    # Without a side images differ in it.
    assert AttachedCollator(processor).tokens_of_image(model.config.image_token_id) is None


def test_images_that_cannot_fit_their_targets_are_told_before_targets_are_made(caplog):
    """Tiles of any image are refused; where it depends on the images' sizes, it is said."""
    grid = [{"name": "depth", "predictor": "patch", "target_length": 16}]
    whole = {**PATCH, "name": "gen", "target_length": 1}
    model, processor, tiles = attach("idefics3", [RESAMPLER | {"num_task_tokens": 0}, whole])
    with pytest.raises(ValueError, match=r"'depth': an image has .* tiles, which make no grid: set its processor's"):
        tiles.check_tokens(grid, model.config.image_token_id)
    # A mean over all tokens has no places, and a resampler reads them in any order.
    tiles.check_tokens(model.config.tasks, model.config.image_token_id)
    batch = tiles(random_rows(1, [1]))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_owner")}
    assert predict(model, inputs).predictions["gen"][2].shape == (1, 1, 6)
    AttachedCollator(processor, image_options=ONE_SIZE["idefics3"]).check_tokens(grid, model.config.image_token_id)
    assert not caplog.records

    sizes = {"size": {"shortest_edge": 16 * 16, "longest_edge": 128 * 128}}
    model, processor, _ = attach("qwen2_5_vl", [RESAMPLER | {"num_task_tokens": 0}], **sizes)
    AttachedCollator(processor).check_tokens([WORDS | {"target_length": 16}], model.config.image_token_id)
    assert re.search(r"'words': images of 64 and 1024 pixels have \[16, 64\] tokens.*: give image_side", caplog.text)


def test_padding_has_the_processors_own_mean_color():
    """Whose mean may be in a picture's own units, 0 to 255."""
    _, processor = FAMILIES["qwen2_5_vl"]()
    image_processor = processor.image_processor
    for mean, rescaling in (([0.2, 0.4, 0.6], True), ([51.0, 102.0, 153.0], False)):
        image_processor.image_mean = mean
        image_processor.do_rescale = rescaling
        padded = AttachedCollator(processor)._view(random_image(0, (20, 40)))
        assert padded.size == (40, 40) and padded.getpixel((0, 0)) == (51, 102, 153)


def test_an_attached_models_images_of_any_size_have_the_targets_grid():
    """Qwen's have as many tokens as they have pixels."""
    model, _, collator = attach("qwen2_5_vl", [{**PATCH, "target_length": 4}])
    rows = random_rows(2, 1)
    rows[0]["images"] = [random_image(0, (64, 64))]
    rows[1]["images"] = [random_image(1, (32, 32))]
    batch = collator(rows)
    inputs = {
        name: value for name, value in batch.items() if name not in ("targets", "row_ids", "bad_rows", "long_rows")
    }
    assert [int((batch["image_owner"] == n).sum()) for n in range(2)] == [16, 4]
    assert model(**inputs, output_predictions=True).predictions["patch"][2].shape == (2, 4, 6)
