"""Tasks and predictors on models of other families, each sample with its own number of image tokens."""

import copy
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from claimed_gpu import ClaimedGpu, move, on_gpu
from conftest import encode, make_tokenizer, random_image, random_rows, tiny_tasks
from tiny_teachers import GRID, save_depth_anything
from tiny_vlms import FAMILIES, TEXT, VISION, idefics3
from tokenizers import Tokenizer
from training_helpers import Interrupt, llava_sample, losses, target_source, weights, write_llava
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ola_vlm.inference import checkpoints
from ola_vlm.inference.checkpoints import read_checkpoint
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.attach import AttachedPredictors, attach_predictors, detach_predictors, image_layout
from ola_vlm.training.collator import IGNORE_INDEX, AttachedCollator
from ola_vlm.training.rows import BadRow
from ola_vlm.training.stages import apply_stage
from ola_vlm.training.trainer import OlaVlmTrainer

IMAGES = [1, 0, 2, 1]
SIZES = [(32, 32), (96, 32), (24, 64), (64, 64)]
PROJECTORS = {
    "qwen2_5_vl": ["visual.merger"],
    "qwen3_vl": ["visual.merger", "visual.deepstack_merger_list"],
    "gemma3": ["multi_modal_projector"],
    "idefics3": ["connector"],
    "internvl": ["multi_modal_projector"],
    "llava_next": ["multi_modal_projector"],
}
EQUAL_IMAGES = {"gemma3"}  # as many tokens for each image, whatever its size
MERGED_TOKENS = {"gemma3": 1}  # the row's line break before an image becomes one token with the image's own
every_family = pytest.mark.parametrize("family", FAMILIES)
with_task_tokens = pytest.mark.parametrize("tokens", [False, True], ids=["latents", "task_tokens"])


def tasks_of(tokens: bool = False) -> list[dict]:
    return [task if tokens else {**task, "num_task_tokens": 0} for task in tiny_tasks()]


def make(family: str, tokens: bool = False, seed: int = 0):
    torch.manual_seed(seed)
    model, processor = FAMILIES[family]()
    return attach_predictors(model, tasks_of(tokens), processor), processor


def make_rows(images: list[int], seed: int = 0) -> list[dict]:
    """Rows whose images have different sizes."""
    rows = random_rows(len(images), images, seed)
    for i, row in enumerate(rows):
        row["images"] = [random_image(10 * i + k, SIZES[(i + k) % 4]) for k in range(len(row["images"]))]
    return rows


def make_collator(model, processor, **options) -> AttachedCollator:
    tasks = model.config.tasks
    return AttachedCollator(processor, {task["name"]: target_source(task) for task in tasks}, tasks, **options)


def forward(model, batch: dict, **options):
    inputs = {key: value for key, value in batch.items() if key not in ("targets", "row_ids", "bad_rows", "long_rows")}
    return model(**inputs, output_predictions=True, **options)


def make_trainer(model, processor, folder, images=IMAGES * 2, stage="pretrain", callbacks=(), **arguments):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1}
    defaults |= {"lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = OlaVlmArguments(output_dir=str(folder), stage=stage, **(defaults | arguments))
    options = {"data_collator": make_collator(model, processor, square=False), "processing_class": processor}
    options |= {"train_dataset": make_rows(images), "eval_dataset": make_rows([1, 0, 2], seed=1)}
    return OlaVlmTrainer(model, args, callbacks=list(callbacks), **options)


def run_ranks(out: Path, ranks: int):
    """Three SGD steps of 4 rows; the second of two ranks has text only."""
    model, processor = make("idefics3")
    apply_stage(model, "pretrain")
    options = {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
    options |= {"per_device_train_batch_size": 4 // ranks}
    trainer = make_trainer(model, processor, out, images=[1, 2, 0, 0] * 3, **options)
    trainer.train()
    if trainer.args.should_save:
        torch.save({"losses": losses(trainer), "weights": weights(model)}, out / f"{ranks}.pt")


def test_what_is_predicted_of_a_row_is_its_logits(tmp_path):
    """Also of a model whose own configuration knows nothing of predictors: metrics get these alone."""
    model, processor = make("qwen2_5_vl")
    apply_stage(model, "pretrain")
    trainer = make_trainer(model, processor, tmp_path)
    predicted = trainer.predict(make_rows([1, 0, 2], seed=1))
    assert isinstance(predicted.predictions, np.ndarray) and predicted.predictions.ndim == 3
    assert predicted.predictions.shape[:2] == predicted.label_ids.shape and predicted.predictions.shape[0] == 3


def test_a_batch_of_text_alone_predicts_no_row_that_is_nobodys(tmp_path):
    """The blank image's, which shifted all rows behind it; nor are its tokens among those that metrics ask for."""
    model, processor = make("qwen2_5_vl")
    apply_stage(model, "pretrain")
    trainer = make_trainer(model, processor, tmp_path, per_device_eval_batch_size=2, include_for_metrics=["inputs"])
    rows = make_rows([0, 0, 1, 2], seed=1)
    seen = {}
    trainer.compute_metrics = lambda asked: seen.update(inputs=asked.inputs) or {}
    batched = trainer.predict(rows)
    assert batched.predictions.shape[0] == batched.label_ids.shape[0] == 4
    for i, row in enumerate(rows):
        alone = trainer.predict([row])
        length = alone.predictions.shape[1]
        assert np.abs(batched.predictions[i, :length] - alone.predictions[0]).max() < 1e-4
        assert np.array_equal(batched.label_ids[i, :length], alone.label_ids[0])
    trainer.predict(rows)
    # Where a word is to be learned, its token is the label.
    is_learned = batched.label_ids != IGNORE_INDEX
    assert seen["inputs"].shape == batched.label_ids.shape
    assert np.array_equal(seen["inputs"][is_learned], batched.label_ids[is_learned])
    # An evaluation needs no logits.
    assert trainer.evaluate(rows)["eval_loss"] > 0


@every_family
@with_task_tokens
def test_losses_and_where_gradients_go(family, tokens, tmp_path):
    model, processor = make(family, tokens)
    apply_stage(model, "pretrain")
    trainer = make_trainer(model, processor, tmp_path)
    batch = trainer.data_collator(make_rows(IMAGES))
    counts = [(batch["image_owner"] == n).sum().item() for n in range(4)]
    assert len(set(counts)) > 1 or family in EQUAL_IMAGES, "the images should have different numbers of tokens"

    inputs = {}
    for i, layer in enumerate(model.get_decoder().layers, start=1):
        layer.register_forward_pre_hook(lambda _, args, i=i: args[0].retain_grad() or inputs.update({i: args[0]}))
    trainer.compute_loss(model, batch).backward()
    parts = {k: v.item() for k, v in trainer._sums["train"].items() if k.startswith("loss/") and k != "loss/ntp"}
    assert len(parts) == 12 and all(0 < value < float("inf") for value in parts.values())
    # To the inputs of the chosen layers by the embedding losses alone, at the images' tokens.
    for parameter in model.parameters():
        parameter.grad = None
    for task in model.config.tasks:
        for layer in task["layers"]:
            predictions = forward(model, batch).predictions[task["name"]][layer]
            assert predictions.shape == (4, task["target_length"], task["target_dim"])
            predictions.square().sum().backward()
            assert (inputs[layer].grad[batch["image_owner"] >= 0] != 0).any(-1).all()
    touched = {name: bool((p.grad != 0).any()) for name, p in model.named_parameters() if p.grad is not None}
    projector = {name for name in touched if any(f"{part}." in name for part in PROJECTORS[family])}
    assert projector
    assert all(touched[name] for name in touched if name in projector or name.startswith("predictors."))
    if tokens:
        assert touched["queries.gen"] and touched["queries.depth"]
    own = ("predictors.", "queries.", "logit_scales.", "model.image_newline")
    assert all(name.startswith(own) or name in projector for name in touched), "a frozen part has a gradient"
    model.requires_grad_(True)  # and on to the vision tower, if it trains
    forward(model, batch).predictions["depth"][3].square().sum().backward()
    first = [p.grad for name, p in model.named_parameters() if "patch_embed" in name and name.endswith("weight")]
    assert len(first) == 1 and (first[0] != 0).any()


@every_family
def test_without_an_image_the_losses_are_zero(family, tmp_path):
    model, processor = make(family)
    trainer = make_trainer(model, processor, tmp_path)
    batch = trainer.data_collator(make_rows([0, 0, 0]))
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    parts = {k: v.item() for k, v in trainer._sums["train"].items() if k.startswith("loss/")}
    assert parts.pop("loss/ntp") == loss.item() > 0
    assert set(parts.values()) == {0.0}
    for name, parameter in model.named_parameters():
        if name.startswith("predictors."):
            assert parameter.grad is not None and (parameter.grad == 0).all(), name


@every_family
def test_detached_it_is_the_model_that_it_was(family, tmp_path):
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    untouched, own_class = copy.deepcopy(model), type(model)
    attach_predictors(model, tasks_of())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("predictors.", "logit_scales.")))
    before = weights(model)
    trainer = make_trainer(model, processor, tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    moved = {name for name, value in weights(model).items() if not value.equal(before[name])}
    assert moved and all(name.startswith(("predictors.", "logit_scales.")) for name in moved)

    inputs = trainer.data_collator(make_rows(IMAGES))
    for extra in ("targets", "row_ids", "bad_rows", "long_rows", "image_owner", "labels"):
        inputs.pop(extra)
    untouched.eval()
    model.eval()
    with torch.no_grad():
        expected = untouched(**inputs).logits
        assert model(**inputs).logits.equal(expected)
        saved, report = own_class.from_pretrained(tmp_path / "checkpoint-3", output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert saved.eval()(**inputs).logits.equal(expected)
        assert detach_predictors(model) is model
        assert model(**inputs).logits.equal(expected)
    assert type(model) is own_class and not {"tasks", "task_token_ids"} & model.config.to_dict().keys()
    assert [*model.state_dict()] == [*untouched.state_dict()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]


@pytest.mark.parametrize(("family", "tokens"), [("qwen2_5_vl", True), ("idefics3", True), ("llava_next", False)])
def test_trained_saved_and_resumed(family, tokens, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    options |= {"gradient_accumulation_steps": 2}
    model, processor = make(family, tokens)
    before = weights(model)
    apply_stage(model, "pretrain")
    whole = make_trainer(model, processor, tmp_path / "whole", **options)
    whole.train()
    assert len(losses(whole)) == 3
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {name for name, value in weights(model).items() if not value.equal(before[name])}
    table = {"model.language_model.embed_tokens.weight", "model.text_model.embed_tokens.weight"}  # of task tokens
    assert moved >= {name for name in trainable if name.startswith("predictors.") and "gen" in name}
    assert moved - trainable <= (table if tokens else set())

    first, processor = make(family, tokens)
    apply_stage(first, "pretrain")
    with pytest.raises(KeyboardInterrupt):
        make_trainer(first, processor, tmp_path / "cut", callbacks=[Interrupt(3)], **options).train()
    second, processor = make(family, tokens, seed=1)  # other weights: all must come from the checkpoint
    apply_stage(second, "pretrain")
    resumed = make_trainer(second, processor, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for name, value in weights(second).items():
        assert value.equal(weights(model)[name]), name

    # From the checkpoint alone: the own class's, then the predictors.
    folder = tmp_path / "whole" / "checkpoint-3"
    again = type(detach_predictors(first)).from_pretrained(folder)
    saved = type(processor).from_pretrained(folder)
    attach_predictors(again, again.config.tasks, saved, checkpoint=folder)
    assert again.config.task_token_ids == model.config.task_token_ids
    batch = make_collator(again, saved)(make_rows(IMAGES))
    model.task_tokens_from_queries = False
    with torch.no_grad():
        mine, other = forward(again.eval(), batch).predictions, forward(model.eval(), batch).predictions
    for task in again.config.tasks:
        for layer in task["layers"]:
            assert mine[task["name"]][layer].equal(other[task["name"]][layer])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "llava_next"])
def test_a_resumed_model_is_read_without_a_second_one(family, tmp_path, monkeypatch):
    """Whatever its class calls the weights in files, and with those that it ties."""
    model, _ = make(family, tokens=True)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other, _ = make(family, tokens=True, seed=1)
    monkeypatch.setattr(type(other).__bases__[1], "from_pretrained", lambda *_, **__: pytest.fail("a second model"))
    other.load_checkpoint(tmp_path)
    for name, value in weights(model).items():
        assert value.equal(weights(other)[name]), name


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model, processor = make("idefics3", tokens=True)
    apply_stage(model, "pretrain")
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "greater_is_better": True}  # the loss: so the first one is best
    make_trainer(model, processor, tmp_path, **options).train()
    first, _ = make("idefics3", tokens=True, seed=1)
    first.load_checkpoint(tmp_path / "checkpoint-1")
    for name, value in weights(model).items():
        assert value.equal(weights(first)[name]), name


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])  # tables of their own, and tied ones
def test_task_tokens_stay_frozen_in_fine_tuning(family, tmp_path):
    model, processor = make(family, tokens=True)
    apply_stage(model, "finetune")
    before = [table.weight.clone() for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    trainer = make_trainer(model, processor, tmp_path, stage="finetune", weight_decay=0.1)
    trainer.train()
    assert [*losses(trainer)[0]] == ["loss", "loss/ntp"]
    ids, word = model.config.task_token_ids, processor.tokenizer.convert_tokens_to_ids("user")
    # From the start, without any pre-training, they are what the query tables stand for.
    assert before[0][ids].equal(model.task_token_embeddings().detach())
    assert len(ids) == 8 and max(ids) < len(before[0])
    for table, weight in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        assert table.weight[ids].equal(weight[ids]) and not table.weight[word].equal(weight[word])


def paligemma(**text):
    vision = {"model_type": "siglip_vision_model", **VISION, "image_size": 32, "patch_size": 8, "projection_dim": 32}
    text = {"model_type": "gemma", **TEXT, "head_dim": 8, **text}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(text_config=text, vision_config=vision))


def gemma3(**text):
    vision = {"model_type": "siglip_vision_model", **VISION, "image_size": 32, "patch_size": 8}
    text = {"model_type": "gemma3_text", **TEXT, "head_dim": 8, **text}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [paligemma, gemma3, idefics3], ids=["paligemma", "gemma3", "idefics3"])
@torch.no_grad()
def test_task_tokens_are_written_where_the_lookup_finds_them(build):
    """Into the model and into a state dict, also where embeddings are scaled and where the table has another name."""
    if build is idefics3:
        model, processor = build()
    else:
        tokenizer = make_tokenizer()
        model = build(vocab_size=len(tokenizer))
        processor = SimpleNamespace(tokenizer=tokenizer, image_token="<image>", chat_template="<image>")
    known = len(processor.tokenizer)
    before = model.get_input_embeddings().weight.clone()
    attach_predictors(model, tasks_of(True), processor)
    embeddings, ids = model.get_input_embeddings(), model.config.task_token_ids
    rows = len(embeddings.weight)
    assert ids == list(range(known, known + 8)) and rows % 64 == 0 and embeddings.weight[:known].equal(before)
    assert model.config.vocab_padding == rows - known - 8
    assert model.generation_config.suppress_tokens == list(range(known, rows))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.write_task_tokens(state)
    model.write_task_tokens()
    torch.testing.assert_close(embeddings(torch.tensor(ids)), model.task_token_embeddings(), rtol=1e-5, atol=1e-6)
    assert embeddings.weight[:known].equal(before)
    for name, value in model.state_dict().items():
        assert state[name].equal(value), name


def test_a_resized_vocabulary_has_its_new_tokens():
    """Rows that were padding become tokens that can be learned and answered; no task token is lost."""
    model, processor = idefics3()
    attach_predictors(model, tasks_of(True), processor)
    assert model.config.vocab_padding > 1
    processor.tokenizer.add_tokens(["<obj>"])
    new = processor.tokenizer.convert_tokens_to_ids("<obj>")
    assert new in model.generation_config.suppress_tokens
    model.resize_token_embeddings(len(processor.tokenizer))
    assert model.config.vocab_padding == 0 and len(model.get_input_embeddings().weight) == len(processor.tokenizer)
    assert model.generation_config.suppress_tokens == model.config.task_token_ids
    ids = torch.tensor([[new, 5, new]])
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss < 100

    model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64)
    rows = len(model.get_input_embeddings().weight)
    assert rows % 64 == 0 and model.config.vocab_padding == rows - len(processor.tokenizer)
    assert model.generation_config.suppress_tokens == [*model.config.task_token_ids, *range(new + 1, rows)]
    model.resize_token_embeddings(pad_to_multiple_of=128)
    rows = len(model.get_input_embeddings().weight)
    assert rows % 128 == 0 and model.config.vocab_padding == rows - len(processor.tokenizer)
    largest = max(model.config.task_token_ids)
    with pytest.raises(ValueError, match=f"task tokens have ids up to {largest}: keep at least {largest + 1} rows"):
        model.resize_token_embeddings(largest)


def test_a_checkpoint_without_its_predictors_is_refused(tmp_path, monkeypatch):
    """A download of `model*.safetensors` alone would train, and answer, without a word about its tasks."""
    model, processor = make("idefics3")
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    assert isinstance(read_checkpoint(tmp_path)[0], AttachedPredictors)
    (tmp_path / "predictors.safetensors").unlink()
    lacks = r"has tasks in config.json and no predictors.safetensors: fetch that file too, or take `tasks` out"
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=lacks):
        # It is said before the weights are read.
        patched.setattr(checkpoints, "load_whole", pytest.fail)
        read_checkpoint(tmp_path)
    # Another model's field of that name is nobody's business here.
    detach_predictors(model)
    model.config.tasks = ["ocr"]
    model.save_pretrained(tmp_path)
    assert not isinstance(read_checkpoint(tmp_path)[0], AttachedPredictors)


def test_what_is_pushed_as_it_is_saved_has_the_predictors(tmp_path, monkeypatch):
    """`save_pretrained(push_to_hub=True)` uploads the folder as it is when the model's own weights are written."""
    model, _ = make("idefics3")
    uploaded = []

    def upload(self, folder, *args, **options):
        uploaded.extend(path.name for path in Path(folder).iterdir())

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    hub = SimpleNamespace(create_repo=lambda *args, **options: SimpleNamespace(repo_id="me/x"))
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: hub)
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *args, **options: card)
    model.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert {"predictors.safetensors", "model.safetensors", "config.json"} <= set(uploaded)


def test_a_tokenizer_with_holes():
    """New ids come after all others, however few tokens there are; no known row changes."""
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    last = sorted(vocabulary, key=vocabulary.get)[-2:]
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"].update({word: 60 + i for i, word in enumerate(last)})
    holes = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    model = paligemma(vocab_size=62)
    before = model.get_input_embeddings().weight.detach().clone()
    processor = SimpleNamespace(tokenizer=holes, image_token="<image>", chat_template="<image>")
    with pytest.raises(ValueError, match=f"tokens with ids up to 61, gives <.*> the id 6[01] of '({'|'.join(last)})'"):
        attach_predictors(model, many_tokens(28), processor)
    holes = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    holes.add_tokens(last)
    processor = SimpleNamespace(tokenizer=holes, image_token="<image>", chat_template="<image>")
    attach_predictors(model, many_tokens(28), processor)
    assert model.config.task_token_ids == list(range(62, 90))
    model.write_task_tokens()
    assert len(model.get_input_embeddings().weight) == 128 and model.config.vocab_padding == 128 - 90
    assert model.get_input_embeddings().weight[:62].equal(before)


def many_tokens(count: int) -> list[dict]:
    return [{**tiny_tasks()[0], "num_task_tokens": count}]


@every_family
@with_task_tokens
@pytest.mark.parametrize("square", [True, False])
def test_predictions_do_not_depend_on_batch_mates(family, tokens, square):
    model, processor = make(family, tokens)
    model.eval()
    rows, collator = make_rows(IMAGES), make_collator(model, processor, square=square)
    with torch.no_grad():
        together = forward(model, collator(rows)).predictions
        alone = [forward(model, collator([row])).predictions for row in rows]
    for task in model.config.tasks:
        for layer in task["layers"]:
            one_by_one = torch.cat([predictions[task["name"]][layer] for predictions in alone])
            torch.testing.assert_close(one_by_one, together[task["name"]][layer], rtol=1e-4, atol=1e-4)
            assert one_by_one.std(0).max() > 1e-3, "all images have the same predictions"


@every_family
@with_task_tokens
def test_keys_leave_out_other_images(family, tokens):
    model, processor = make(family, tokens)
    batch = make_collator(model, processor)(make_rows([2, 1]))
    ids, owner = batch["input_ids"], batch["image_owner"]
    layout = image_layout(owner, ids, batch["attention_mask"], model.config)
    assert layout.sample_N.tolist() == [0, 0, 1]
    assert (owner[ids == processor.image_token_id] >= 0).all()
    for task in model.config.tasks:
        keys = layout.key_mask(task)
        for n, row in enumerate([0, 0, 1]):
            seen = owner[row][keys[n]]
            assert set(seen.tolist()) == {n, -1}, "keys are the image's own tokens and words"
            assert (seen == n).sum() == (owner == n).sum()
            assert not (keys[n] & (batch["attention_mask"][row] == 0)).any()
            if tokens:
                found = [i for i in ids[row][keys[n]].tolist() if i in model.config.task_token_ids]
                own = processor.tokenizer.convert_tokens_to_ids(
                    [f"<{task['name']}_{k}>" for k in range(task["num_task_tokens"])]
                )
                assert found == own
    if family == "idefics3":  # tiles' tags and the separators are the image's
        tag = processor.tokenizer.convert_tokens_to_ids("<row_1_col_1>")
        assert (owner[ids == tag] >= 0).all() and (ids == tag).sum() == 3


def test_task_tokens_are_words_to_rotary_positions():
    """In three dimensions the positions of what follows an image run on, task tokens or not."""
    model, processor = make("qwen2_5_vl", tokens=True)
    batch = make_collator(model, processor)(make_rows([2]))
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions, _ = model.model.get_rope_index(**{name: batch[name] for name in names})
    ids = torch.tensor(model.config.task_token_ids)
    for start in (batch["input_ids"][0] == ids[0]).nonzero().flatten().tolist():
        steps = positions[:, 0, start : start + len(ids) + 2]
        assert batch["input_ids"][0, start : start + len(ids)].equal(ids)
        assert (steps.diff() == 1).all() and (steps == steps[:1]).all()


@pytest.mark.parametrize("layers", [[1, 2], [4]], ids=["as_the_towers", "others"])
def test_llava_with_attached_predictors_predicts_as_ola_vlm(layers, make_model):
    """Also where predictors read no layer of the language model whose number is that of the tower's: LLaVA hands what
    it is asked for to its tower."""
    tasks = [{**task, "layers": layers} for task in tasks_of()]
    ola, processor = make_model(tasks)
    plain = LlavaForConditionalGeneration(ola.config)
    state, own = ola.state_dict(), ("predictors.", "logit_scales.", "queries.")
    plain.load_state_dict({name: value for name, value in state.items() if not name.startswith(own)})
    attach_predictors(plain, tasks, processor)
    plain.load_state_dict(state)
    rows = make_rows(IMAGES)
    batch = make_collator(plain, processor, square=False)(rows)  # LLaVA's processor pads by itself
    with torch.no_grad():
        expected = ola.eval()(**encode(processor, rows), output_predictions=True)
        mine = forward(plain.eval(), batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")}
        assert mine.loss.equal(detach_predictors(plain)(**inputs).loss)
    assert mine.logits.equal(expected.logits)
    for name, layers in expected.predictions.items():
        for layer, prediction in layers.items():
            torch.testing.assert_close(mine.predictions[name][layer], prediction, rtol=1e-5, atol=1e-6)
            assert len(prediction) == sum(IMAGES)


@every_family
def test_accumulated_micro_batches_equal_one_batch(family, tmp_path):
    runs = []
    for size, accumulation in ((4, 1), (1, 4)):
        model, processor = make(family)
        apply_stage(model, "pretrain")
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        trainer = make_trainer(
            model, processor, tmp_path, learning_rate=0.1, train_sampling_strategy="sequential", **options
        )
        trainer.train()
        runs.append((losses(trainer), weights(model)))
    (whole, expected), (parts, values) = runs
    for one, step in zip(whole, parts, strict=True):
        assert step == pytest.approx(one, rel=1e-4, abs=1e-5)
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@every_family
def test_it_generates_as_before(family):
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    row = make_rows([2])[0]
    text = processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
    inputs = processor(text=[text], images=[row["images"]], return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.eval().generate(**inputs, **options)
    assert attach_predictors(model, tasks_of()).generate(**inputs, **options).equal(expected)
    detach_predictors(model)
    attach_predictors(model, tasks_of(True), processor)
    # And the rows without a token, which fill the table up to a multiple of 64.
    rows = model.get_input_embeddings().num_embeddings
    padding = range(rows - model.config.vocab_padding, rows)
    assert rows % 64 == 0
    assert model.generation_config.suppress_tokens == [*model.config.task_token_ids, *padding]
    with torch.no_grad():  # they would win everywhere
        model.get_output_embeddings().weight[model.generation_config.suppress_tokens] *= 1e3
    tokens = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert not torch.isin(tokens, torch.tensor([*model.config.task_token_ids, *padding])).any()
    assert inspect.signature(model.forward) == inspect.signature(type(model).__bases__[1].forward.__get__(model))


@every_family
def test_labels_are_the_answers(family):
    model, processor = make(family, tokens=True)
    rows, collator = make_rows(IMAGES), make_collator(model, processor)
    batch, n = collator(rows), 0
    for i, row in enumerate(rows):
        own = 1 + MERGED_TOKENS.get(family, 0)  # tokens of the row that an image's stand for
        shorter = sum((batch["image_owner"] == n + k).sum() - own for k in range(IMAGES[i]))
        assert len(collator.check_text(row).ids) == batch["attention_mask"][i].sum() - shorter
        n += IMAGES[i]
        spoken = batch["labels"][i][batch["labels"][i] != -100]
        answer = row["messages"][1]["content"][0]["text"] + " </s>"
        assert processor.tokenizer.decode(spoken) == answer


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_a_text_that_has_an_images_or_a_videos_token(token):
    model, processor = make("qwen2_5_vl")
    rows = make_rows([1])
    rows[0]["messages"][0]["content"].append({"type": "text", "text": f"what is <|vision_start|>{token} ?"})
    with pytest.raises(BadRow, match="a text has"):
        make_collator(model, processor).check_text(rows[0])


def test_a_vocabulary_without_a_videos_token_still_has_unknown_words():
    model, processor = make("qwen2_5_vl")
    processor.video_token_id = processor.tokenizer.convert_tokens_to_ids("<video of another family>")
    assert processor.video_token_id == processor.tokenizer.unk_token_id is not None
    rows = make_rows([1])
    rows[0]["messages"][0]["content"].append({"type": "text", "text": " all of it unheard-of"})
    make_collator(model, processor).check_text(rows[0])


@pytest.mark.parametrize(("mean", "color"), [(None, 128), (0.25, 64), ([0.25, 0.5, 1.0], (64, 128, 255))])
def test_a_square_is_filled_with_the_processors_color_whatever_its_form(mean, color, monkeypatch):
    model, processor = make("qwen2_5_vl")
    collator = make_collator(model, processor)
    monkeypatch.setattr(processor.image_processor, "image_mean", mean)
    corner = collator._view(random_image(0, (48, 16))).getpixel((0, 0))
    assert corner == (color if isinstance(color, tuple) else (color,) * 3)


def test_rows_that_are_too_long():
    model, processor = make("llava_next")
    rows = make_rows(IMAGES)
    whole = make_collator(model, processor)(rows)
    lengths = whole["attention_mask"].sum(1).tolist()
    limit = sorted(lengths)[-2]
    with pytest.raises(BadRow, match=f"row row-2: {lengths[2]} tokens, more than max_length={limit}"):
        make_collator(model, processor, max_length=limit)(rows)
    batch = make_collator(model, processor, max_length=limit, drop_bad_rows=True)(rows)
    assert batch["row_ids"] == ["row-0", "row-1", "row-3"] and len(batch["long_rows"]) == 1
    assert len(batch["targets"]["gen"]) == 2 == batch["image_owner"].max() + 1
    nothing = make_collator(model, processor, max_length=3, drop_bad_rows=True)(rows)
    assert nothing["row_ids"] == [] and len(nothing["long_rows"]) == 4
    assert forward(model, nothing).predictions["gen"][2].shape[0] == 0


def test_an_image_that_the_processor_refuses_is_a_bad_row():
    """Qwen's takes none that is more than 200 times as long as wide; padded to a square it does."""
    model, processor = make("qwen2_5_vl")
    rows = make_rows([1, 1, 0, 1])
    rows[1]["images"] = [random_image(0, (3000, 10))]
    refused = "row row-1: Qwen2_5_VLProcessor refuses it: absolute aspect ratio must be smaller than 200"
    with pytest.raises(BadRow, match=refused):
        make_collator(model, processor, square=False)(rows)
    batch = make_collator(model, processor, square=False, drop_bad_rows=True)(rows)
    assert batch["row_ids"] == ["row-0", "row-2", "row-3"] and len(batch["targets"]["gen"]) == 2
    assert len(batch["bad_rows"]) == 1 and re.match(refused, batch["bad_rows"][0])
    assert len(make_collator(model, processor)(rows)["row_ids"]) == 4


def test_the_student_sees_the_teachers_square():
    """A 3:1 image has as many tokens as its square, and its pixels are in the middle; unless this is turned off."""
    model, processor = make("qwen2_5_vl")
    rows = make_rows([1])
    rows[0]["images"] = [random_image(0, (48, 16))]
    square = make_collator(model, processor)(rows)
    assert square["image_grid_thw"].tolist() == [[1, 6, 6]]
    patches = square["pixel_values"].abs().amax(-1).view(3, 3, 4)  # of each cell of 2 x 2 patches
    assert (patches[[0, 2]] < 0.02).all() and (patches[1] > 0.5).all()
    assert make_collator(model, processor, square=False)(rows)["image_grid_thw"].tolist() == [[1, 2, 6]]


@pytest.mark.parametrize("fault", ["rewrites", "does not tell"])
def test_a_processor_that_does_as_it_likes_is_refused(fault, monkeypatch):
    model, processor = make("qwen2_5_vl")
    own = type(processor).get_text_with_replacements

    def replace(self, *args, **kwargs):
        texts, offsets = own(self, *args, **kwargs)
        return ([text + " b" for text in texts], offsets) if fault == "rewrites" else (texts, [])

    monkeypatch.setattr(type(processor), "get_text_with_replacements", replace)
    with pytest.raises(ValueError, match="Qwen2_5_VLProcessor changes more of a text than its images, or"):
        make_collator(model, processor)(make_rows([1]))


def test_what_it_refuses():
    model, processor = make("qwen2_5_vl")
    with pytest.raises(ValueError, match="has predictors already"):
        attach_predictors(model, tasks_of())
    batch = make_collator(model, processor)(make_rows([1]))
    with pytest.raises(ValueError, match="image_owner by name"):
        model(input_ids=batch["input_ids"], output_predictions=True)
    with pytest.raises(ValueError, match="not each of them has a token"):
        image_layout(batch["image_owner"] + (batch["image_owner"] >= 0), *[batch["input_ids"]] * 2, model.config)
    detach_predictors(model)
    with pytest.raises(ValueError, match="has no predictors"):
        detach_predictors(model)
    with pytest.raises(ValueError, match="give one or more, each with its own name"):
        attach_predictors(model, [])
    with pytest.raises(ValueError, match="choose from 1 to 4"):
        attach_predictors(model, [{"name": "depth", "layers": [5]}])
    with pytest.raises(ValueError, match="need the processor"):
        attach_predictors(model, tasks_of(True))
    model.aligner = torch.nn.Linear(2, 2)
    attach_predictors(model, tasks_of())
    with pytest.raises(ValueError, match="which part is aligner"):
        apply_stage(model, "pretrain")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 300, "env": environment}
    done = subprocess.run([*command, __file__, str(tmp_path)], **options)
    assert done.returncode == 0, done.stderr[-4000:]
    run_ranks(tmp_path, ranks=1)
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    for step, expected in zip(two["losses"], one["losses"], strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name, value in two["weights"].items():
        torch.testing.assert_close(value, one["weights"][name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_documents_example_runs(tmp_path, monkeypatch):
    model, processor = FAMILIES["qwen2_5_vl"]()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    save_depth_anything(tmp_path / "teacher")
    samples = [llava_sample(0), llava_sample(1, image=None), llava_sample(2, image="b.png")]
    write_llava(tmp_path, samples, ["a.png", "b.png"])
    page = (Path(__file__).parents[1] / "docs" / "your_own_vlm.md").read_text()
    example, _ = re.findall(r"```python\n(.*?)```", page, re.S)
    smaller = {"Qwen/Qwen2.5-VL-3B-Instruct": "model", "depth-anything/Depth-Anything-V2-Small-hf": "teacher"}
    smaller |= {"[12, 24]": "[2, 4]", "576": str(GRID**2), "384": "32", "max_steps=1000": "max_steps=2, use_cpu=True"}
    for old, new in smaller.items():
        assert old in example
        example = example.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert type(names["model"]) is type(model)
    assert len(losses(names["trainer"])) == 0 < names["trainer"].state.global_step == 2
    assert (tmp_path / "runs" / "qwen" / "predictors.safetensors").exists()
    config = json.loads((tmp_path / "runs" / "qwen" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] and config["tasks"][0]["layers"] == [2, 4]


if __name__ == "__main__":
    run_ranks(Path(sys.argv[1]), ranks=2)
    torch.distributed.destroy_process_group()


# Gemma 3's mask of both directions is made by `torch.vmap`, through which the claim of a device doesn't pass.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3"])
def test_all_tensors_of_a_step_are_on_one_device(family, tmp_path):
    """Losses and gradients on a GPU that isn't there, and training keeps no keys and values."""
    model, processor = make(family, True)
    apply_stage(model, "pretrain")
    trainer = make_trainer(model, processor, tmp_path)
    batch = trainer.data_collator(make_rows([1, 2]))
    expected, outputs = trainer.compute_loss(model.train(), dict(batch), return_outputs=True)
    assert getattr(outputs, "past_key_values", None) is None and model.config.get_text_config().use_cache
    move(model)
    with ClaimedGpu():
        batch = {name: on_gpu(value) for name, value in batch.items()}
        batch["targets"] = {name: on_gpu(target) for name, target in batch["targets"].items()}
        trainer._attach_step_targets([batch], torch.device("cuda"))
        loss = trainer.compute_loss(model, batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
