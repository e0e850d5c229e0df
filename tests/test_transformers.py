"""What users of transformers expect of any of its models and processors: of its common tests those that apply."""

import inspect
import json
import threading
from pathlib import Path

import pytest
import torch
from conftest import encode, random_image, random_rows
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, GenerationConfig, TextIteratorStreamer
from transformers.utils import logging as transformers_logging

from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor

EARLIER = Path(__file__).parent / "earlier_checkpoint"
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def built(make_model):
    return make_model()


@pytest.fixture(scope="module")
def batch(built):
    """Rows with one image, two, and none."""
    return dict(encode(built[1], random_rows(3, [1, 2, 0])))


def word_labels(model, batch) -> torch.Tensor:
    """Every word's: image and task tokens are never predicted."""
    ids = batch["input_ids"]
    return ids.masked_fill(torch.isin(ids, torch.tensor(model.suppressed_token_ids)), -100)


def conversation(images: list[int], *texts: str) -> list[dict]:
    """Turns of a user, whose n-th shows `images[n]` images, with answers between them."""
    messages, seed = [], 0
    for turn, (count, text) in enumerate(zip(images, texts, strict=True)):
        if turn:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": "the cube"}]})
        shown = [{"type": "image", "image": random_image(seed + i)} for i in range(count)]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
        seed += count
    return messages


CHATS = [
    conversation([1], " what is this ?"),
    conversation([2], " left or right ?"),
    conversation([1, 0, 1], " what is this ?", " color of the cube ?", " and this ?"),
    conversation([0], " one two three"),
]


def inputs_of(processor, chats, side="left", **options):
    processor.tokenizer.padding_side = side
    template = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(chats, **template, **options)


def new_tokens(model, inputs, **options) -> torch.Tensor:
    return model.generate(**inputs, **(GREEDY | options))[:, inputs["input_ids"].shape[1] :]


# Generation


def test_a_left_padded_batch_answers_as_each_alone(built):
    """One image, several, several turns with images among them, none."""
    model, processor = built
    together = new_tokens(model, inputs_of(processor, CHATS, padding=True))
    alone = [new_tokens(model, inputs_of(processor, [chat])) for chat in CHATS]
    assert together.equal(torch.cat(alone)) and len({tuple(row) for row in together.tolist()}) > 1


def test_streaming_gives_the_same_text_in_pieces(built):
    model, processor = built
    inputs = inputs_of(processor, CHATS[:1])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert len(pieces) > 1
    assert "".join(pieces) == processor.decode(new_tokens(model, inputs)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
        {"do_sample": True, "num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_ways_to_generate(built, options):
    model, processor = built
    inputs = inputs_of(processor, CHATS[:1])
    torch.manual_seed(0)
    found = new_tokens(model, inputs, **options)
    assert found.shape == (options.get("num_return_sequences", 1), 6)
    assert not set(found.flatten().tolist()) & set(model.suppressed_token_ids)
    if {"cache_implementation", "use_cache", "prompt_lookup_num_tokens"} & options.keys():  # no other result
        assert found.equal(new_tokens(model, inputs))


def test_assisted_generation_gives_the_models_own_answer(built, make_model):
    """The assistant is a smaller matter: the same model with other random weights."""
    model, processor = built
    inputs, (assistant, _) = inputs_of(processor, CHATS[:1]), make_model(seed=1)
    assert new_tokens(model, inputs, assistant_model=assistant).equal(new_tokens(model, inputs))


def test_generation_from_embeddings_and_with_scores(built):
    model, processor = built
    inputs = inputs_of(processor, CHATS[3:])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **GREEDY)
    assert found.equal(new_tokens(model, inputs))
    wanted = {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True}
    output = model.generate(**inputs, **GREEDY, **wanted)
    assert len(output.scores) == 6 and len(output.hidden_states[0]) == 5
    assert output.scores[0][:, model.suppressed_token_ids].eq(-torch.inf).all()


def test_a_generation_config_is_taken_without_a_warning(built, caplog):
    """And keeps what it suppresses; ours are added to it."""
    model, processor = built
    inputs = inputs_of(processor, CHATS[:1])
    given = GenerationConfig(**GREEDY)
    own = new_tokens(model, inputs)
    with caplog.at_level("WARNING", "transformers"):
        transformers_logging.enable_propagation()
        found = model.generate(**inputs, generation_config=given)[:, inputs["input_ids"].shape[1] :]
        transformers_logging.disable_propagation()
    assert found.equal(own) and not caplog.records and given.suppress_tokens is None
    first = own[0, 0].item()
    other = GenerationConfig(**GREEDY, suppress_tokens=[first])
    found = model.generate(**inputs, generation_config=other)[:, inputs["input_ids"].shape[1] :]
    assert not {first, *model.suppressed_token_ids} & set(found.flatten().tolist())


def test_what_the_models_own_generation_config_bans_stays_banned(make_model, tmp_path):
    """Beside what is never emitted anyway; through a save, and when the vocabulary grows."""
    model, processor = make_model()
    inputs = inputs_of(processor, CHATS[:1])
    first = new_tokens(model, inputs)[0, 0].item()
    model.generation_config.suppress_tokens = [*model.generation_config.suppress_tokens, first]
    assert first not in model.suppressed_token_ids
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    grown = type(model).from_pretrained(tmp_path).eval()
    grown.resize_token_embeddings(grown.config.text_config.vocab_size + 8)
    for banning in (model, loaded, grown):
        assert first in banning.generation_config.suppress_tokens
        for options in ({}, {"generation_config": GenerationConfig(**GREEDY)}):
            found = banning.generate(**inputs, **(options or GREEDY))[:, inputs["input_ids"].shape[1] :]
            assert not {first, *banning.suppressed_token_ids} & set(found.flatten().tolist())


def test_generation_reads_the_tower_as_it_is_asked_to(make_model):
    """`vision_feature_layer` and the strategy reach the tower in generation as they do in a forward pass."""
    model, processor = make_model([])
    inputs = inputs_of(processor, CHATS[:1])
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    usual = model.generate(**inputs, **GREEDY, **wanted).logits[0]
    asked = {"vision_feature_layer": -1}
    other = model.generate(**inputs, **GREEDY, **wanted, **asked).logits[0]
    expected = model(**inputs, **asked).logits[:, -1]
    torch.testing.assert_close(other, expected.float())
    assert not torch.allclose(other, usual)


# Forward


@torch.no_grad()
def test_hidden_states_and_attentions(built, batch, tmp_path):
    model, _ = built
    model.save_pretrained(tmp_path)
    eager = OlaVlmForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    output = eager(**batch, output_hidden_states=True, output_attentions=True)
    B, T = batch["input_ids"].shape
    assert [tuple(states.shape) for states in output.hidden_states] == [(B, T, 32)] * 5
    assert [tuple(weights.shape) for weights in output.attentions] == [(B, 4, T, T)] * 4
    sums = output.attentions[0].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(output.logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].equal(model(**batch).logits)
    assert model(**batch, logits_to_keep=2).logits.equal(model(**batch).logits[:, -2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(built, batch, tmp_path, dtype):
    """dtype="auto" is the checkpoint's own."""
    model, processor = built
    OlaVlmForConditionalGeneration(model.config).to(dtype).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "whole")
    assert OlaVlmForConditionalGeneration.from_pretrained(tmp_path, dtype="auto").dtype == dtype
    half = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=dtype, device_map="auto").eval()
    pixels = {"pixel_values": batch["pixel_values"].to(dtype)}
    logits, attended = half(**{**batch, **pixels}).logits, batch["attention_mask"].bool()
    assert logits.dtype == dtype and logits[attended].isfinite().all()
    precise = model(**batch).logits[attended]
    assert (logits[attended].float() - precise).abs().mean() < 0.05 * precise.abs().mean()
    inputs = inputs_of(processor, CHATS[:1]).to(dtype)
    assert new_tokens(half, inputs).shape == (1, 6)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
@pytest.mark.slow
def test_compiled(built, batch, backend):
    """Few layers, since each is traced; the slow test below has them all."""
    fields = built[0].config.to_dict() | {"tasks": [], "task_token_ids": []}
    fields["text_config"]["num_hidden_layers"], fields["vision_config"]["num_hidden_layers"] = 1, 2
    model = OlaVlmForConditionalGeneration(type(built[0].config).from_dict(fields)).eval()
    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend=backend)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_with_predictions_and_gradients(built, batch):
    model, _ = built
    torch.compiler.reset()
    compiled, gradients = torch.compile(model.forward, backend="aot_eager"), []
    for forward in (compiled, model):
        output = forward(**batch, labels=word_labels(model, batch), output_predictions=True)
        (output.loss + output.predictions["depth"][3].square().sum()).backward()
        named = model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        model.zero_grad(set_to_none=True)
    ours, own = gradients
    assert "queries.depth" in own and own.keys() <= ours.keys()
    for name, gradient in ours.items():  # compiled, what has no part in the loss gets zeros
        expected = own.get(name, torch.zeros_like(gradient))
        assert (gradient - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-6, name


# Weights and files


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_embeddings_of_another_size(make_model, tiny_parts, tied_parts, tmp_path, tied):
    """Task token ids stay, and what they stand for; so do tied weights, also on disk."""
    model, processor = make_model(parts=tied_parts if tied else tiny_parts)
    batch = encode(processor, random_rows(2))
    before = model(**batch, output_predictions=True)
    size = model.config.text_config.vocab_size
    ids = [model.config.image_token_id, *model.config.task_token_ids]
    assert model.suppressed_token_ids == [*ids, *range(max(ids) + 1, size)] and model.config.vocab_padding == 21
    model.resize_token_embeddings(size + 7, mean_resizing=False)  # all of them tokens
    model.save_pretrained(tmp_path)
    for resized in (model, OlaVlmForConditionalGeneration.from_pretrained(tmp_path).eval()):
        assert resized.config.text_config.vocab_size == resized.lm_head.out_features == size + 7
        assert [resized.config.image_token_id, *resized.config.task_token_ids] == resized.suppressed_token_ids == ids
        assert resized.generation_config.suppress_tokens == ids
        after = resized(**batch, output_predictions=True)
        torch.testing.assert_close(after.logits[..., :size], before.logits)
        torch.testing.assert_close(after.predictions["seg"][2], before.predictions["seg"][2])
        assert (resized.lm_head.weight is resized.get_input_embeddings().weight) == tied
        assert resized(**batch, labels=word_labels(resized, batch)).loss.isfinite()
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("language_model.lm_head.weight" in names) != tied
    model.resize_token_embeddings(size + 8, pad_to_multiple_of=64, mean_resizing=False)
    assert model.suppressed_token_ids == [*ids, *range(size + 8, 2 * size)]


def test_task_tokens_keep_their_rows(make_model, tmp_path):
    """A vocabulary that would lose one is refused before anything is lost, and as a checkpoint's configuration."""
    model, _ = make_model()
    last = model.config.task_token_ids[-1]
    rows = model.get_input_embeddings().weight.detach().clone()
    with pytest.raises(ValueError, match=f"new_num_tokens is {last}, .* ids up to {last}: keep at least {last + 1}"):
        model.resize_token_embeddings(last)
    assert model.get_input_embeddings().weight.equal(rows)
    model.resize_token_embeddings(last + 1)
    assert len(model.lm_head.weight) == last + 1 and model.config.vocab_padding == 0
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = last
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"give different ids within the {last} embeddings"):
        OlaVlmForConditionalGeneration.from_pretrained(tmp_path)


@torch.no_grad()
def test_shards_and_loading_by_auto_class(built, batch, tmp_path):
    """Any shard size, and `dtype`/`device_map` as users give them."""
    model, _ = built
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    options = {"trust_remote_code": True, "device_map": "auto", "dtype": "auto"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **options).eval()
    assert loaded.dtype == torch.float32
    assert loaded(**batch).logits.equal(model(**batch).logits)


@torch.no_grad()
def test_a_checkpoint_of_an_earlier_version_still_loads():
    """Written by the first version in this repository's history (bc784c6), with what it computed."""
    saved = load_file(EARLIER / "expected.safetensors")
    logits, prediction = saved.pop("logits"), saved.pop("prediction")
    model, info = OlaVlmForConditionalGeneration.from_pretrained(
        EARLIER, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    output = model.eval()(**saved, output_predictions=True)
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.predictions["depth"][1], prediction, rtol=1e-5, atol=1e-5)
    processor = OlaVlmProcessor.from_pretrained(EARLIER)
    again = encode(processor, random_rows(2, [1, 2]))
    assert all(again[name].equal(value) for name, value in saved.items())


# Processor


def test_a_checkpoint_is_loaded_without_a_warning(built, tmp_path, caplog):
    """transformers' "model of type ola_vlm to instantiate a model of type ``" looked like a fault."""
    for part in built:
        part.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "transformers"):
        transformers_logging.enable_propagation()
        OlaVlmForConditionalGeneration.from_pretrained(tmp_path)
        processor = OlaVlmProcessor.from_pretrained(tmp_path)
        transformers_logging.disable_propagation()
    assert not caplog.records and type(processor.tokenizer) is type(built[1].tokenizer)


def test_every_argument_of_the_processor_is_saved(built, tmp_path):
    _, processor = built
    given = {"patch_size": 4, "num_additional_image_tokens": 3, "vision_feature_select_strategy": "full"}
    given |= {"task_tokens": ["<depth_0>", "<gen_1>"], "chat_template": "{{ 'other' }}"}
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer, "image_token": "<image>"}
    assert set(inspect.signature(OlaVlmProcessor.__init__).parameters) == {"self", "kwargs", *given, *parts}
    OlaVlmProcessor(**parts, **given).save_pretrained(tmp_path)
    loaded = OlaVlmProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in given} == given
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_chats(built, side):
    """The template with tokenisation: a batch is its members, padded on the side that was asked for."""
    _, processor = built
    together = inputs_of(processor, CHATS, side, padding=True)
    assert set(together) == {"input_ids", "attention_mask", "pixel_values"}
    assert set(together) <= set(processor.model_input_names)
    alone = [inputs_of(processor, [chat]) for chat in CHATS]
    assert together["pixel_values"].equal(torch.cat([one["pixel_values"] for one in alone if "pixel_values" in one]))
    for ids, mask, one in zip(together["input_ids"], together["attention_mask"], alone, strict=True):
        own = one["input_ids"][0]
        assert ids[mask.bool()].equal(own)
        padding = mask[: len(mask) - len(own)] if side == "left" else mask[len(own) :]
        assert not padding.any()
    images = (together["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert images == [16, 32, 32, 0]
    text = processor.apply_chat_template(CHATS[0], add_generation_prompt=True)
    assert text.count("<image>") == 1 and "<gen_0>" not in text
    assert processor.post_process_image_text_to_text(together["input_ids"][3:])[0].endswith(
        "one two three assistant :"
    )


def test_ways_to_give_text_and_images(built):
    _, processor = built
    image, other = random_image(0), random_image(1)
    one = processor(text="<image> what", images=image, return_tensors="pt")
    for images in ([image], [[image]]):
        again = processor(text=["<image> what"], images=images, return_tensors="pt")
        assert again["input_ids"].equal(one["input_ids"]) and again["pixel_values"].equal(one["pixel_values"])
    nested = processor(text=["<image> a", "<image> <image> b"], images=[[image], [other, image]], padding=True)
    assert len(nested["pixel_values"]) == 3
    assert processor(text="what is this", return_tensors="pt")["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError):
        processor(text=["<image> <image> a"], images=[image])
    with pytest.raises(ValueError):
        processor(images=None, text=None)
