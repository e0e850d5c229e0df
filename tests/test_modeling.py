"""The model: golden data of the reference, and the invariants of its design that are the model's own."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import encode, random_rows, tiny_tasks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from ola_vlm.configuration_ola_vlm import normalize_task
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.convert.reference import convert_reference, convert_state_dict
from ola_vlm.modeling_ola_vlm import EmbeddingPredictor, ImageKeys, ImageLayout, OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.training.losses import embedding_loss
from ola_vlm.training.stages import apply_stage

GOLDEN = Path(__file__).parent / "golden"
STRIDE = 16  # the golden files keep each 16th position of long sequences


def assert_close(actual, expected, relative=1e-5):
    """The largest difference is within `relative` of the largest expected value."""
    assert actual.shape == expected.shape
    bound = relative * expected.abs().max().clamp(min=1e-6)
    assert (actual.detach() - expected).abs().max() <= bound, f"{(actual - expected).abs().max() / bound:.3g} x bound"


def test_the_llms_layers_are_not_the_towers(tiny_parts):
    """Predictions at inference ask the LLM for a few layers' states; the tower has others (23 of 25 in CLIP-L)."""
    tasks = [{**tiny_tasks()[1], "layers": [1, 4]}]  # the tower's features are its state 2 of 0 to 3
    model, processor = build_ola_vlm(tiny_parts.vision_tower, tiny_parts.language_model, tasks=tasks)
    batch = encode(processor, random_rows(2))
    output = model(**batch, output_predictions=True)
    assert output.logits.equal(model(**batch).logits) and output.predictions["depth"][4].shape == (2, 16, 10)


# Golden a and b: resampler and heads, with gradients


def predictor_from_golden(weights: dict, cls: str, sizes: dict) -> EmbeddingPredictor:
    """Our predictor with the weights of a reference resampler (`a_*`) or head (`b_*`)."""
    task_tokens = "TaskToken" in cls
    hidden = sizes.get("embedding_dim") or sizes["llm_hidden_size"]
    task = {
        "name": "depth" if "Depth" in cls else "other",
        "layers": [1],
        "num_task_tokens": 1 if task_tokens else 0,
        "target_length": sizes.get("num_queries") or sizes["num_tokens"],
        "target_dim": sizes["output_dim"],
        "predictor_depth": sizes["depth"],
        "predictor_heads": sizes.get("heads") or sizes["num_heads"],
        "predictor_head_dim": sizes["dim_head"],
        "predictor_ffn_mult": sizes["ff_mult"],
        "predictor_dim": sizes.get("dim"),
        "output_mlp": "linear_1.0.weight" in weights,
    }
    predictor = EmbeddingPredictor(normalize_task(task, hidden, 1), hidden)
    predictor.load_state_dict(rename_predictor(weights))
    return predictor


def rename_predictor(weights: dict) -> dict:
    """Tensors of one head under our names; those of resamplers come without the heads' prefix."""
    named = {
        name if name.startswith(("projector.", "linear_")) else f"projector.{name}": w for name, w in weights.items()
    }
    named = {f"image_depth_heads.0.{name}": w for name, w in named.items()}
    renamed = convert_state_dict(named, {"depth": [1]})
    return {name.removeprefix("predictors.depth.1."): w for name, w in renamed.items()}


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("[ab]_*.safetensors")))
def test_golden_predictors(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}
    predictor = predictor_from_golden(weights, metadata["cls"], json.loads(metadata["sizes"]))
    inputs = {
        key.removeprefix("in."): value.requires_grad_() for key, value in tensors.items() if key.startswith("in.")
    }
    states = inputs.get("x", inputs.get("llm_feats"))
    everything = torch.ones(states.shape[:2], dtype=torch.bool)
    mlp, predictor.output_mlp = predictor.output_mlp, torch.nn.Identity()
    features = predictor(states, inputs.get("latents"), torch.arange(len(states)), everything)
    predictor.output_mlp = mlp
    outputs = [mlp(features)]
    if "out1" in tensors:  # the reference's twins of the MLP, which only its depth picture uses
        for twin in ["linear_2", "linear_3"]:
            first, last = ((weights[f"{twin}.{i}.weight"], weights[f"{twin}.{i}.bias"]) for i in (0, 2))
            outputs.append(F.linear(F.relu(F.linear(features, *first)), *last))
        outputs.append(features)
    expected = tensors.get("out", tensors.get("out0"))
    if expected.dim() == 4:  # seg comes as a map
        expected = expected.flatten(2).transpose(1, 2)
    assert_close(outputs[0], expected)
    for i, output in enumerate(outputs[1:], start=1):
        assert_close(output, tensors[f"out{i}"])

    sum(output.pow(2).sum() for output in outputs).backward()
    for key, value in inputs.items():
        assert_close(value.grad, tensors[f"grad.in.{key}"])
    gradients = {key.removeprefix("grad.w."): value for key, value in tensors.items() if key.startswith("grad.w.")}
    for key, value in rename_predictor(gradients).items():
        assert_close(predictor.get_parameter(key).grad, value)


# Golden f, f2 and k: the whole tiny model, converted from the reference's checkpoint


@pytest.fixture(scope="module")
def reference_model():
    model, *_ = convert_reference(str(GOLDEN / "reference_checkpoint"), str(GOLDEN / "clip_vit_336"))
    return model


def recorded_noise(seed: int, shape: tuple, check) -> torch.Tensor:
    """The first two rows of the recording's random input; only their ends are kept, as `check`."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[:2]
    assert noise.flatten(1)[:, -8:].equal(check), "this torch draws other random numbers than the recording's"
    return noise


def golden_batch(golden: dict, model) -> tuple[dict, dict]:
    """Inputs with placeholders expanded as our processor does, targets by task. The second row is right-padded."""
    config = model.config
    expansion = torch.tensor([config.image_token_id] * 576 + config.task_token_ids)
    rows, labels = [], []
    for ids, label in zip(golden["input_ids"], golden["labels"], strict=True):
        place = int((ids == -200).nonzero())
        rows.append(torch.cat([ids[:place], expansion, ids[place + 1 :]]))
        labels.append(torch.cat([label[:place], torch.full_like(expansion, -100), label[place + 1 :]]))
    labels = torch.stack(labels)
    mask = golden["attention_mask"].long()
    mask = torch.cat([torch.ones(2, len(expansion) - 1, dtype=torch.long), mask], dim=1)
    labels = labels.masked_fill(mask == 0, -100)
    images = recorded_noise(4, (3, 3, 336, 336), golden["first.images"])
    batch = {"input_ids": torch.stack(rows), "attention_mask": mask, "labels": labels, "pixel_values": images}
    shapes = {"gen": (5, (3, 1, 40)), "depth": (6, (3, 576, 48)), "seg": (7, (3, 56, 24, 24))}
    targets = {}
    for task, (seed, shape) in shapes.items():
        target = recorded_noise(seed, shape, golden[f"first.{task}_target"])
        targets[task] = target.flatten(2).transpose(1, 2) if target.dim() == 4 else target
    return batch, targets


def reference_losses(model, batch, targets):
    """
    Output, predictions and losses as the reference computes them: its predictors attend to right padding (ours don't,
    tested below), whose embeddings are zeros.
    """
    with torch.no_grad():  # id 0 is the padding only, nothing else of this batch has it
        model.get_input_embeddings().weight[0] = 0
    output = model(**batch, output_hidden_states=True)
    predictions = model.predict_embeddings(
        output.hidden_states, ImageLayout.find(batch["input_ids"], None, 2, model.config)
    )
    losses = {}
    for task in model.config.tasks:
        name = task["name"]
        for i, layer in enumerate(task["layers"]):
            scale, weight = model.logit_scales[name][0], task["contrastive_weight"]
            losses[name, i] = embedding_loss(predictions[name][layer], targets[name], scale, weight)
    total = output.loss + sum(model.config.tasks[0]["loss_weight"] * loss.total for loss in losses.values())
    return output, predictions, losses, total


def assert_golden_predictions(model, predictions, golden):
    for task in model.config.tasks:
        for i, layer in enumerate(task["layers"]):
            assert_close(predictions[task["name"]][layer][:, ::STRIDE], golden[f"prediction.{task['name']}.{i}"])


def test_golden_full_model(reference_model):
    golden = load_file(GOLDEN / "f_full_llama.safetensors")
    model = reference_model
    assert [task["name"] for task in model.config.tasks] == ["gen", "depth", "seg"]
    batch, targets = golden_batch(golden, model)
    model.zero_grad()
    model.task_tokens_from_queries = True
    output, predictions, losses, total = reference_losses(model, batch, targets)
    assert_close(output.hidden_states[0][:, ::STRIDE], golden["inputs_embeds"])
    for layer in range(1, 5):
        assert_close(output.hidden_states[layer][:, ::STRIDE], golden[f"hidden_states.{layer}"])
    assert_close(output.loss, golden["text_loss"])
    assert_golden_predictions(model, predictions, golden)
    for (name, i), loss in losses.items():
        assert_close(loss.distance, golden[f"loss.{name}.{i}.sl1"])
        assert_close(0.3 * loss.contrastive, golden[f"loss.{name}.{i}.con"])
    assert_close(total, golden["loss"])
    assert abs(total.item() - 9.261576) < 1e-4

    total.backward()
    recorded = {name.removeprefix("grad."): grad for name, grad in golden.items() if name.startswith("grad.")}
    layers = {task["name"]: task["layers"] for task in model.config.tasks}
    recorded = convert_state_dict(recorded, layers)
    assert {name.split(".")[0] for name in recorded} == {"logit_scales", "queries", "predictors", "model"}
    for name, grad in recorded.items():
        if name in (
            "logit_scales.depth",
            "logit_scales.seg",
        ):  # 3e-5 and 3e-4, left of terms of about 1: their rounding
            assert (model.get_parameter(name).grad - grad).abs() < 1e-8
        else:
            assert_close(model.get_parameter(name).grad, grad)

    # Ours without padding: the first row alone, through the public interface.
    first = {name: value[:1] for name, value in batch.items()}
    output = model(**first, output_predictions=True)
    model.task_tokens_from_queries = False
    for task in model.config.tasks:
        for i, layer in enumerate(task["layers"]):
            expected = golden[f"prediction.{task['name']}.{i}"][:1]
            assert_close(output.predictions[task["name"]][layer][:, ::STRIDE], expected)


def test_golden_without_task_tokens(reference_model, tmp_path):
    golden = load_file(GOLDEN / "f2_no_task_tokens.safetensors")
    recorded = load_file(GOLDEN / "f_full_llama.safetensors")
    config = json.loads((GOLDEN / "reference_checkpoint" / "config.json").read_text()) | {"num_task_tokens": 0}
    weights = load_file(GOLDEN / "reference_checkpoint" / "model.safetensors")
    weights = {name: value for name, value in weights.items() if "special_" not in name}
    weights |= {name.removeprefix("w."): value for name, value in golden.items() if name.startswith("w.")}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, *_ = convert_reference(str(tmp_path), str(GOLDEN / "clip_vit_336"))
    assert model.config.task_token_ids == []
    batch, targets = golden_batch(recorded, model)
    with torch.no_grad():
        _, predictions, losses, total = reference_losses(model, batch, targets)
    assert_golden_predictions(model, predictions, golden)
    for (name, i), loss in losses.items():
        assert_close(loss.total, golden[f"emb_loss.{name}.{i}"])
    assert_close(total, golden["loss"])


@torch.no_grad()
def test_golden_inference(reference_model):
    golden = load_file(GOLDEN / "k_llava_ift.safetensors")
    recorded = load_file(GOLDEN / "f_full_llama.safetensors")
    batch, _ = golden_batch(recorded, reference_model)
    ids = golden["input_ids"][0]
    assert ids.equal(recorded["input_ids"][0, : len(ids)])
    inputs = {"input_ids": batch["input_ids"][:1, :640], "pixel_values": batch["pixel_values"][:1]}
    output = reference_model(**inputs, output_hidden_states=True)
    assert_close(output.hidden_states[0][:, ::STRIDE], golden["inputs_embeds"])
    assert_close(output.logits[:, ::STRIDE, :512], golden["logits"])


# Invariants


def by_task(predictions: dict) -> dict:
    return {(task, layer): value for task, layers in predictions.items() for layer, value in layers.items()}


def sum_of_squares(predictions: dict) -> torch.Tensor:
    return sum(value.float().pow(2).sum() for value in by_task(predictions).values())


def answer_labels(batch: dict, processor) -> torch.Tensor:
    hidden = [processor.tokenizer.pad_token_id, processor.image_token_id, *processor.task_token_ids]
    return batch["input_ids"].masked_fill(torch.isin(batch["input_ids"], torch.tensor(hidden)), -100)


def states_for(model, batch, seed: int = 0) -> dict[int, torch.Tensor]:
    """Random hidden states, to see what predictors read without the LLM's own mixing of tokens."""
    generator, shape = torch.Generator().manual_seed(seed), (*batch["input_ids"].shape, 32)
    return {layer: torch.randn(shape, generator=generator) for layer in range(5)}


def test_without_tasks_it_is_llava(make_model, tmp_path):
    model, processor = make_model(tasks=[])
    plain = LlavaForConditionalGeneration(model.config)
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict())
    plain.eval()
    batch = encode(processor, random_rows(3, [1, 2, 0]))
    labels = answer_labels(batch, processor)
    with torch.no_grad():
        ours, theirs = model(**batch, labels=labels, output_predictions=True), plain(**batch, labels=labels)
    assert ours.logits.equal(theirs.logits) and ours.loss.equal(theirs.loss)
    copied = {"labels": batch["input_ids"]}
    assert model(**batch, **copied).loss.equal(plain(**batch, **copied).loss)
    assert ours.predictions is None and ours.logit_scales is None
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ["ours", "plain"])
    assert ours.keys() == theirs.keys()


def test_predictions_only_on_demand(make_model):
    model, processor = make_model()
    batch = encode(processor, random_rows(2))
    calls = []
    for predictor in model.predictors.modules():
        predictor.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        silent = model(**batch)
        assert silent.predictions is None and silent.logit_scales is None and not calls
        loud = model(**batch, output_predictions=True)
        assert calls and loud.logits.equal(silent.logits) and loud.hidden_states is None
        both = model(**batch, output_predictions=True, output_hidden_states=True)
    assert len(both.hidden_states) == 5 and all(state is not None for state in both.hidden_states)
    shapes = {key: tuple(value.shape) for key, value in by_task(loud.predictions).items()}
    small, large, wide = (2, 1, 12), (2, 16, 10), (2, 16, 14)
    assert list(loud.predictions) == ["gen", "depth", "seg"]
    assert shapes == {
        ("gen", 2): small,
        ("gen", 4): small,
        ("depth", 1): large,
        ("depth", 3): large,
        ("seg", 2): wide,
        ("seg", 3): wide,
    }


def test_layer_is_the_output_of_that_block(make_model):
    """Layers are 1-based decoder blocks; the last one's state is after the final norm."""
    model, processor = make_model()
    batch = encode(processor, random_rows(2))
    states = {}
    for layer, block in enumerate(model.model.language_model.layers, start=1):
        block.register_forward_hook(lambda _, __, output, layer=layer: states.__setitem__(layer, output))
    model.model.language_model.norm.register_forward_hook(lambda _, __, output: states.__setitem__(4, output))
    with torch.no_grad():
        output = model(**batch, output_predictions=True)
        layout = ImageLayout.find(batch["input_ids"], batch["attention_mask"], 2, model.config)
        for task in model.config.tasks:
            name, mask = task["name"], layout.key_mask(task)
            for layer in task["layers"]:  # the predictor itself, on the state that the block was seen to return
                columns = states[layer][layout.sample_N[:, None], layout.task_columns_NK[name]]
                queries = columns if name == "gen" else model.queries[name][None]
                expected = model.predictors[name][str(layer)](states[layer], queries, layout.sample_N, mask)
                assert output.predictions[name][layer].equal(expected), f"{name} {layer}"


@torch.no_grad()
def test_images_of_one_row_take_their_own_keys_alone(make_model, monkeypatch):
    """With as many keys for eight images as eight rows of one image have; the predictions are those of the masked
    whole row."""
    model, processor = make_model()
    for counts in ([8], [3, 0, 1]):
        batch = encode(processor, random_rows(len(counts), counts))
        states = states_for(model, batch)
        layout = ImageLayout.find(batch["input_ids"], batch["attention_mask"], sum(counts), model.config)
        keys = ImageKeys.of_rows(layout.sample_N, layout.key_mask(model.config.tasks[1]), rows=len(counts))
        own = layout.key_mask(model.config.tasks[1]).sum(1)
        assert keys.mask_NM.shape[1] == own.max() and keys.mask_NM.sum(1).equal(own)
        predictions = by_task(model.predict_embeddings(states, layout))
        with monkeypatch.context() as patched:
            patched.setattr(ImageKeys, "of_rows", classmethod(lambda cls, sample, mask, rows: cls(sample, mask)))
            of_whole_rows = by_task(model.predict_embeddings(states, layout))
        for name, prediction in predictions.items():
            torch.testing.assert_close(prediction, of_whole_rows[name], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_predictor_reads_its_own_tokens_only(make_model):
    """Neither other tasks' tokens, nor padding, nor other images' image and task tokens (invariants 5 and 11)."""
    model, processor = make_model()
    batch = encode(processor, random_rows(3, [2, 1, 0]))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    states = states_for(model, batch)
    base = by_task(model.predict_embeddings(states, ImageLayout.find(ids, mask, 3, model.config)))

    def changed_by(where: torch.Tensor) -> dict:
        """Which images' predictions change, for each task and layer, if the states at `where` (B, T) do."""
        other = {layer: state.where(~where[..., None], state + 1.7) for layer, state in states.items()}
        new = by_task(model.predict_embeddings(other, ImageLayout.find(ids, mask, 3, model.config)))
        return {key: [bool((new[key][n] != value[n]).any()) for n in range(3)] for key, value in base.items()}

    assert (mask == 0).any()
    assert set(map(tuple, changed_by(mask == 0).values())) == {(False, False, False)}
    assert set(map(tuple, changed_by(torch.arange(3)[:, None].expand_as(ids) == 2).values())) == {(False,) * 3}
    occurrence = lambda token, n: (ids == token) & ((ids == token).flatten().cumsum(0).view_as(ids) == n + 1)  # noqa: E731 (a name for one line)
    start = 0
    for task in model.config.tasks:
        for token in model.config.task_token_ids[start : start + task["num_task_tokens"]]:
            for n in range(3):
                for key, changed in changed_by(occurrence(token, n)).items():
                    assert changed == [key[0] == task["name"] and image == n for image in range(3)]
        start += task["num_task_tokens"]
    is_image = ids == model.config.image_token_id
    number = (is_image.flatten().cumsum(0).view_as(ids) - 1) // 16
    for n in range(3):
        changed = changed_by(is_image & (number == n))
        assert set(map(tuple, changed.values())) == {tuple(image == n for image in range(3))}
    words = mask.bool() & ~is_image & ~torch.isin(ids, torch.tensor(model.config.task_token_ids))
    for row, images in [(0, (True, True, False)), (1, (False, False, True))]:
        here = words & (torch.arange(3)[:, None] == row)
        assert set(map(tuple, changed_by(here).values())) == {images}


@pytest.mark.parametrize("keys", [["image", "task"], ["system", "image", "task"], ["text"]])
@torch.no_grad()
def test_keys_choose_what_the_predictor_sees(make_model, keys):
    tasks = [task | {"attends_to": keys} for task in tiny_tasks()]
    model, processor = make_model(tasks=tasks)
    batch = encode(processor, random_rows(2), padding_side="left")
    ids, mask, image = batch["input_ids"], batch["attention_mask"], model.config.image_token_id
    states = states_for(model, batch)
    base = model.predict_embeddings(states, ImageLayout.find(ids, mask, 2, model.config))
    before = ((ids == image).cumsum(1) == 0) & mask.bool()
    special = torch.isin(ids, torch.tensor([image, *model.config.task_token_ids]))
    groups = {"system": before, "image": ids == image, "text": mask.bool() & ~before & ~special}
    for group, where in groups.items():
        other = {layer: state.where(~where[..., None], state + 1.7) for layer, state in states.items()}
        new = model.predict_embeddings(other, ImageLayout.find(ids, mask, 2, model.config))
        same = [value.equal(by_task(base)[key]) for key, value in by_task(new).items()]
        assert not any(same) if group in keys else all(same)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_predictions_do_not_depend_on_batch_mates(make_model, padding_side):
    model, processor = make_model()
    rows = random_rows(4, [1, 3, 0, 2])
    together = model(**encode(processor, rows, padding_side), output_predictions=True)
    alone = [model(**encode(processor, [row]), output_predictions=True).predictions for row in rows if row["images"]]
    for key, value in by_task(together.predictions).items():
        assert_close(value, torch.cat([by_task(predictions)[key] for predictions in alone]))


@torch.no_grad()
def test_prompts_of_any_form(make_model):
    """A system prompt, images in several turns, text around them: every image is found, in order."""
    # Tokens that a later image can't reach.
    tasks = [task | {"attends_to": ["system", "image", "task"]} for task in tiny_tasks()]
    model, processor = make_model(tasks=tasks)
    pictures = [row["images"][0] for row in random_rows(3)]
    text = lambda words: {"type": "text", "text": words}  # noqa: E731 (a name for one line)
    messages = [
        {"role": "system", "content": [text("the red cube is near")]},
        {"role": "user", "content": [text("what is"), {"type": "image"}, text("and this"), {"type": "image"}]},
        {"role": "assistant", "content": [text("blue")]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
    ]
    batch = encode(processor, [{"messages": messages, "images": pictures}])
    swapped = dict(batch)
    swapped["pixel_values"] = batch["pixel_values"][[0, 1, 1]]
    first, second = (by_task(model(**inputs, output_predictions=True).predictions) for inputs in (batch, swapped))
    for key, value in first.items():
        assert value.shape[0] == 3
        assert value[:2].equal(second[key][:2]) and not value[2].equal(second[key][2])


def test_task_tokens_from_queries_and_from_the_vocabulary(make_model):
    model, processor = make_model()
    with torch.no_grad():
        for queries in model.queries.values():
            queries.normal_(generator=torch.Generator().manual_seed(1))
    depth = model.queries["depth"]
    assert depth.shape == (16, 32) and model.queries["gen"].shape == (2, 32)
    assert_close(model.task_token_embeddings()[2:6], depth.detach().view(4, 4, 32).mean(1))
    batch = encode(processor, random_rows(2))
    before = model.get_input_embeddings().weight.detach().clone()
    with torch.no_grad():
        from_rows = model(**batch).logits
        model.task_tokens_from_queries = True
        from_queries = model(**batch).logits
        assert (from_rows - from_queries).abs().max() > 1e-3
        model.write_task_tokens()
        model.task_tokens_from_queries = False
        assert model(**batch).logits.equal(from_queries)
    after, ids = model.get_input_embeddings().weight.detach(), model.config.task_token_ids
    others = [i for i in range(len(after)) if i not in ids]
    assert after[others].equal(before[others]) and after[ids].equal(model.task_token_embeddings().detach())
    assert len(set(ids)) == len(ids) == 8 and ids == processor.task_token_ids


def set_pretraining(model):
    model.requires_grad_(False)
    model.task_tokens_from_queries = True
    for part in [model.model.multi_modal_projector, model.predictors, model.queries, model.logit_scales]:
        part.requires_grad_(True)


def losses_of(output, model, targets) -> dict:
    return {
        (task["name"], layer): embedding_loss(
            output.predictions[task["name"]][layer], targets[task["name"]], output.logit_scales[task["name"]]
        )
        for task in model.config.tasks
        for layer in task["layers"]
    }


def random_targets(model, count: int) -> dict:
    generator = torch.Generator().manual_seed(3)
    shapes = {task["name"]: (count, task["target_length"], task["target_dim"]) for task in model.config.tasks}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_embedding_losses_reach_what_trains_and_nothing_frozen(make_model):
    """Each loss is above 0 and each alone reaches its predictor, its queries, its logit scale and the projector."""
    model, processor = make_model()
    set_pretraining(model)
    batch = encode(processor, random_rows(4, [1, 0, 2, 1]))
    losses = losses_of(model(**batch, output_predictions=True), model, random_targets(model, 4))
    for (task, layer), loss in losses.items():
        assert loss.distance > 0 and loss.contrastive > 0
        model.zero_grad()
        loss.total.backward(retain_graph=True)
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        own = {name for name, _ in model.named_parameters() if name.startswith(f"predictors.{task}.{layer}.")}
        assert own <= moved
        assert not any(name.startswith("predictors.") for name in moved - own)
        assert {f"queries.{task}", f"logit_scales.{task}"} <= moved
        assert {name for name in moved if name.startswith("logit_scales.")} == {f"logit_scales.{task}"}
        assert "model.multi_modal_projector.linear_1.weight" in moved
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert not moved & frozen and any("vision_tower" in name for name in frozen)


def test_batch_without_images_keeps_the_graph(make_model):
    """Losses are exactly 0 and finite, and every trained parameter has a gradient of zeros (what DDP needs)."""
    model, processor = make_model()
    set_pretraining(model)
    batch = encode(processor, random_rows(2, 0))
    batch["pixel_values"] = torch.zeros(0, 3, 32, 32)
    output = model(**batch, output_predictions=True)
    assert {value.shape[0] for value in by_task(output.predictions).values()} == {0}
    losses = losses_of(output, model, random_targets(model, 0))
    assert all(part.item() == 0.0 for loss in losses.values() for part in loss)
    text = model(**batch, labels=answer_labels(batch, processor)).loss
    (text + sum(loss.total for loss in losses.values())).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() == 0, name
    with torch.no_grad():
        without = model(**encode(processor, random_rows(2, 0)), output_predictions=True)
    assert without.logits.equal(output.logits) and without.predictions["depth"][1].shape == (0, 16, 10)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("images", [1, 0])
def test_logits_only_where_supervised_give_the_same_loss_and_gradients(make_model, stage, images):
    model, processor = make_model()
    apply_stage(model, stage)
    model.train()
    batch = encode(processor, random_rows(3, images))
    labels = answer_labels(batch, processor)
    options = {"labels": labels, "output_predictions": stage == "pretrain", "num_items_in_batch": torch.tensor(7)}
    results = []
    for only in (False, True):
        model.zero_grad()
        output = model(**batch, **options, supervised_logits_only=only)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((output, gradients))
    (whole, expected), (short, found) = results
    supervised = labels[:, 1:] != -100
    assert short.logits.shape == (supervised.sum(), whole.logits.shape[-1]) and short.hidden_states is None
    assert_close(short.logits, whole.logits[:, :-1][supervised])
    assert_close(short.loss, whole.loss)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    with pytest.raises(ValueError, match="pass labels"):
        model(**batch, supervised_logits_only=True)


def test_chosen_layers_of_the_llm_say_nothing_to_the_tower(make_model):
    """After pre-training the model takes LLaVA's path, which hands output_hidden_states to the tower, too."""
    model, processor = make_model()
    model.config.vision_feature_layer = -3  # the tower's embeddings; no task looks at layer 0
    batch = encode(processor, random_rows(2))
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True, output_predictions=True)
        found = model(**batch, output_predictions=True)
        several = [model(**batch, output_hidden_states=chosen) for chosen in ([4], 4)]
    assert found.logits.equal(expected.logits)
    for chosen in several:
        assert chosen.hidden_states[4].equal(expected.hidden_states[4])


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_are_never_emitted_are_no_candidates(make_model, tied_parts, tiny_parts, tied):
    """Their head rows get no gradient, and the loss is the one over the LLM's own vocabulary."""
    model, processor = make_model(parts=tied_parts if tied else tiny_parts)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    batch = encode(processor, random_rows(2))
    labels = answer_labels(batch, processor)
    output = model(**batch, labels=labels)
    own = output.logits[:, :-1, : model.config.image_token_id].flatten(0, 1)
    # Image and task tokens, and the rows that pad the vocabulary.
    assert model.suppressed_token_ids == list(range(own.shape[-1], 64)) and len(processor.tokenizer) == 43
    assert_close(output.loss, F.cross_entropy(own, labels[:, 1:].flatten()).detach())
    (gradient,) = torch.autograd.grad(output.loss, model.lm_head.weight)
    if not tied:
        assert gradient[model.suppressed_token_ids].abs().max() == 0 and gradient[:10].abs().max() > 0


def test_labels_that_are_never_emitted_are_ignored(make_model):
    """As whoever copies `input_ids` for labels makes them. Without tasks the loss is LLaVA's, see above."""
    model, processor = make_model()
    batch = encode(processor, random_rows(2))
    copied, answers = batch["input_ids"], batch["input_ids"].clone()
    answers[torch.isin(answers, torch.tensor(model.suppressed_token_ids))] = -100
    assert (answers != copied).any()
    expected = model(**batch, labels=answers).loss
    assert expected < 100 and model(**batch, labels=copied).loss.equal(expected)
    assert_close(model(**batch, labels=copied, supervised_logits_only=True).loss, expected)


def test_generation_emits_neither_image_nor_task_tokens(make_model):
    model, processor = make_model()
    with torch.no_grad():  # these tokens would win everywhere
        model.lm_head.weight[model.suppressed_token_ids] *= 1e3
    rows = random_rows(3, [1, 2, 0])
    for row in rows:
        row["messages"] = row["messages"][:1]
    batch = encode(processor, rows, padding_side="left")
    new = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert not torch.isin(new, torch.tensor(model.suppressed_token_ids)).any()
    again = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False)
    assert again[:, batch["input_ids"].shape[1] :].equal(new)


def test_tasks_without_task_tokens(make_model):
    tasks = tiny_tasks()
    tasks[1]["num_task_tokens"] = 0
    model, processor = make_model(tasks=tasks)
    assert list(model.queries) == ["gen", "seg"] and len(model.config.task_token_ids) == 4
    assert model.predictors["depth"]["1"].latents.shape == (1, 16, 10)
    output = model(**encode(processor, random_rows(2)), output_predictions=True)
    sum_of_squares(output.predictions).backward()
    assert model.predictors["depth"]["1"].latents.grad.abs().max() > 0
    tasks = [task | {"num_task_tokens": 0} for task in tiny_tasks()]
    model, processor = make_model(tasks=tasks)
    assert processor.task_tokens == [] and len(model.queries) == 0
    model.task_tokens_from_queries = True
    rows = random_rows(2, [2, 1])  # two images side by side with nothing between them
    together = by_task(model(**encode(processor, rows), output_predictions=True).predictions)
    alone = by_task(model(**encode(processor, rows[1:]), output_predictions=True).predictions)
    for key, value in together.items():
        assert_close(value[2:], alone[key].detach())


def test_bf16_throughout(make_model):
    model, processor = make_model(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    set_pretraining(model)
    batch = encode(processor, random_rows(2)).to(torch.bfloat16)
    output = model(**batch, labels=answer_labels(batch, processor), output_predictions=True)
    assert {value.dtype for value in by_task(output.predictions).values()} == {torch.bfloat16}
    losses = losses_of(output, model, random_targets(model, 2))
    assert {loss.total.dtype for loss in losses.values()} == {torch.float32}
    (output.loss + sum(loss.total for loss in losses.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    precise, _ = make_model()
    fp32 = precise(**encode(processor, random_rows(2)), output_predictions=True)
    for key, value in by_task(output.predictions).items():
        assert_close(value.float(), by_task(fp32.predictions)[key].detach(), relative=0.1)


def test_autocast_and_activation_checkpointing(make_model):
    model, processor = make_model()
    set_pretraining(model)
    batch = encode(processor, random_rows(2))
    model.train()
    gradients = []
    for checkpointing in [False, True]:
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        output = model(**batch, labels=answer_labels(batch, processor), output_predictions=True, use_cache=False)
        (output.loss + sum_of_squares(output.predictions)).backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch, output_predictions=True, use_cache=False)
    sum_of_squares(output.predictions).backward()


def test_errors_say_what_is_wrong(make_model):
    model, processor = make_model()
    batch = encode(processor, random_rows(2))
    ids = batch["input_ids"].clone()
    ids[ids == model.config.task_token_ids[0]] = 5
    with pytest.raises(ValueError, match=r"\{35: 0, 36: 2,.*for 2 images"):
        model(**{**batch, "input_ids": ids}, output_predictions=True)
    ids = batch["input_ids"].clone()
    ids[0, (ids[0] == model.config.image_token_id).nonzero()[0]] = 5
    with pytest.raises(ValueError, match="tokens do not match, tokens: 31"):
        model(**{**batch, "input_ids": ids}, output_predictions=True)
    with pytest.raises(ValueError, match="pass input_ids"):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], output_predictions=True)
    with pytest.raises(ValueError, match="whole sequences"):
        model.predict_embeddings(
            {}, ImageLayout.find(batch["input_ids"], batch["attention_mask"][:, 1:], 2, model.config)
        )


# Files


def test_saved_and_loaded_is_the_same(make_model, tmp_path):
    model, _ = make_model()
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    # LLaVA's own names and the training-only ones: no teacher, nothing else
    allowed = {"language_model", "vision_tower", "multi_modal_projector", "predictors", "queries", "logit_scales"}
    assert {key.split(".")[0] for key in keys} == allowed
    assert len(keys) == len(model.state_dict())
    loaded, info = OlaVlmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].equal(value)
    assert loaded.generation_config.suppress_tokens == model.suppressed_token_ids
    assert loaded.config.tasks == model.config.tasks and not loaded.task_tokens_from_queries
    # Trainer resumes by load_state_dict with the names on disk
    other, _ = make_model(seed=1)
    assert not other.queries["gen"].equal(model.queries["gen"])
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    for name, value in model.state_dict().items():
        assert other.state_dict()[name].equal(value)


@torch.no_grad()
def test_starts_from_a_plain_llava_checkpoint(make_model, tmp_path):
    """No weight of LLaVA's is lost, the head least of all; what is new is initialized."""
    plain_like, processor = make_model(tasks=[])
    LlavaForConditionalGeneration(plain_like.config).save_pretrained(tmp_path)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    model, full_processor = make_model()
    ours = OlaVlmForConditionalGeneration.from_pretrained(tmp_path, config=plain_like.config).eval()
    batch = encode(processor, random_rows(2))
    assert ours(**batch).logits.equal(plain(**batch).logits)
    config = model.config
    plain.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=False)
    plain.save_pretrained(tmp_path)
    ours, info = OlaVlmForConditionalGeneration.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"predictors", "queries", "logit_scales"}
    batch = encode(full_processor, random_rows(2))
    assert ours(**batch).logits.equal(plain(**batch).logits)
    assert ours.logit_scales["gen"].item() == 2.0 and 0.8 < ours.queries["depth"].std() < 1.2
    scale = ours.predictors["depth"]["1"].proj_in.weight.std() * 3**0.5 * 32**0.5
    assert 0.9 < scale < 1.1  # torch's uniform initialization, the reference's


def test_initialization(make_model):
    model, _ = make_model()
    assert {scale.item() for scale in model.logit_scales.values()} == {2.0}
    assert 0.9 < model.queries["depth"].std() < 1.1
    predictor = model.predictors["depth"]["1"]
    assert predictor.norm_out.weight.eq(1).all()
    assert 0.9 < predictor.proj_in.weight.std() * 3**0.5 * 32**0.5 < 1.1  # torch's uniform one
    assert 0.18 < model.model.multi_modal_projector.linear_1.weight.std() < 0.22  # the LLM's initializer_range
    wide = {"name": "depth", "layers": [1], "target_length": 64, "target_dim": 10, "num_task_tokens": 0}
    latents = make_model(tasks=[wide | {"predictor_dim": 100}])[0].predictors["depth"]["1"].latents
    assert latents.shape == (1, 64, 100) and 0.095 < latents.std() < 0.105  # 1 / sqrt(100)


def predictions_of(model, processor) -> list[torch.Tensor]:
    batch = encode(processor, random_rows(3, [1, 2, 0])).to(model.dtype)
    with torch.no_grad():
        outputs = model.eval()(**batch, output_predictions=True)
    scales = list(outputs.logit_scales.values())
    return scales + [outputs.predictions[task["name"]][layer] for task in tiny_tasks() for layer in task["layers"]]


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_predictions_of_an_offloaded_model(make_model, tmp_path, place):
    """accelerate's hooks load weights when a module is called: queries and logit scales as well."""
    model, processor = make_model()
    expected = predictions_of(model, processor)
    if place == "cpu":
        cpu_offload(model, execution_device="cpu", offload_buffers=False)
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert all(a.equal(b) for a, b in zip(predictions_of(model, processor), expected, strict=True))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own int8 is
@pytest.mark.parametrize("kind", ["4-bit", "8-bit", "int8"])
def test_predictions_of_a_quantized_model(kind):
    """All its linear layers, the predictors' too: states are never cast to the type of a quantized weight."""
    folder = Path(__file__).parents[1] / "miniature" / "weights" / "ola_vlm"
    options = {"dtype": torch.float32}
    if kind == "4-bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"])
    elif kind == "8-bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    model = OlaVlmForConditionalGeneration.from_pretrained(folder, **options).eval()
    exact = OlaVlmForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if kind == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    processor = OlaVlmProcessor.from_pretrained(folder)
    batch = encode(processor, random_rows(2))
    with torch.no_grad():
        found = model(**batch, output_predictions=True).predictions
        expected = exact(**batch, output_predictions=True).predictions
    assert not any(type(module) is torch.nn.Linear for module in model.predictors.modules())
    for name, layers in expected.items():
        for layer, prediction in layers.items():
            similarity = torch.nn.functional.cosine_similarity(found[name][layer].float(), prediction, dim=-1)
            assert similarity.mean() > 0.9, (name, layer, similarity.mean())
