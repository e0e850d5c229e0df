"""Vision towers and language models of several families: from their checkpoints to two stages of training and back."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch
from conftest import encode, make_tokenizer, random_image, random_rows, tiny_tasks
from safetensors.torch import save_file
from test_data import byte_tokenizer
from tiny_teachers import VISION_MODELS, save_clip_image, save_vision
from tokenizers import Tokenizer, models, pre_tokenizers
from training_helpers import llava_sample, losses, target_source, weights, write_llava
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    FastVlmForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlamaModel,
    LlavaForConditionalGeneration,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from ola_vlm import cli, train
from ola_vlm.convert.export import export_llava
from ola_vlm.convert.parts import build_ola_vlm, measure_tower
from ola_vlm.convert.tower import convert_tower
from ola_vlm.inference.chat import Chat
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.targets import weights as target_weights
from ola_vlm.targets.encoders import ClipImageEncoder
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.rows import load_rows
from ola_vlm.training.stages import part_of

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 64,
}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LANGUAGE_MODELS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "smollm2": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "phi3": Phi3Config(**SIZES),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    # Their embedding modules multiply by the root of the width.
    "gemma": GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8),
    "gemma3": Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=32),
}
CHATML = (  # as Qwen and SmolLM2 have it: text only, answers not marked
    "{% for message in messages %}{{ ' user : ' if message['role'] == 'user' else ' assistant : ' }}"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %} assistant : {% endif %}"
)


def save_language_model(folder, name):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LANGUAGE_MODELS[name]).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_stages(tmp_path, monkeypatch, vision_tower, language_model):
    """A step of PT and one of IFT by `train`, checked; the folder of the second."""

    def sources(args, tasks, rows):
        return {task["name"]: target_source(task) for task in tasks}

    monkeypatch.setattr(train, "target_sources", sources)
    data = write_llava(tmp_path, [llava_sample(0), llava_sample(1, None), llava_sample(2), llava_sample(3)], ["a.png"])
    common = {"data": str(data), "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    common |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    parts = {"vision_tower": vision_tower, "language_model": language_model, "tasks": tiny_tasks()}
    folders = [str(tmp_path / stage) for stage in ("pretrain", "finetune")]
    pretrained = train.train(OlaVlmArguments(output_dir=folders[0], activation_checkpointing=True, **common, **parts))
    assert len(losses(pretrained)[0]) == 14 and all(value > 0 for value in losses(pretrained)[0].values())
    checkpoint = {"stage": "finetune", "checkpoint": folders[0]}
    finetuned = train.train(OlaVlmArguments(output_dir=folders[1], **common, **checkpoint))
    before, after = weights(pretrained.model), weights(finetuned.model)
    moved = {name for name, value in before.items() if not after[name].equal(value)}
    assert any("layers.0" in name for name in moved) and any("projector" in name for name in moved)
    assert not any("vision_tower" in name or "predictors" in name for name in moved)
    return folders[1]


@pytest.mark.parametrize("name", list(LANGUAGE_MODELS))
def test_any_causal_language_model(tiny_parts, tmp_path, monkeypatch, name):
    language_model = save_language_model(tmp_path / name, name)
    folder = run_stages(tmp_path, monkeypatch, tiny_parts.vision_tower, language_model)
    model = OlaVlmForConditionalGeneration.from_pretrained(folder)
    processor = OlaVlmProcessor.from_pretrained(folder)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == LANGUAGE_MODELS[name].tie_word_embeddings
    batch = encode(processor, random_rows(2))
    with torch.no_grad():
        answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert not set(answer[:, batch["input_ids"].shape[1] :].flatten().tolist()) & set(model.config.task_token_ids)
    # What pre-training ended with is what the lookup gives, and the plain LLaVA's logits are the same.
    with torch.no_grad():
        found = model.get_input_embeddings()(torch.tensor(model.config.task_token_ids))
        torch.testing.assert_close(found, model.task_token_embeddings(), rtol=1e-5, atol=1e-6)
        assert export_llava(model)(**batch).logits.equal(model(**batch).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_task_tokens_come_back_from_a_lookup_that_scales(tiny_parts, tmp_path, dtype):
    """Gemma's multiplies by the root of the width, in its own numeric type."""
    model, processor = build_ola_vlm(
        tiny_parts.vision_tower, save_language_model(tmp_path / "gemma", "gemma"), tasks=tiny_tasks(), dtype=dtype
    )
    embeddings, ids = model.get_input_embeddings(), torch.tensor(model.config.task_token_ids)
    batch = encode(processor, random_rows(2)).to(dtype)
    tolerance = {"rtol": 1e-2 if dtype is torch.bfloat16 else 1e-6, "atol": 1e-6}
    for _ in range(2):  # as it is built, and with other tables
        torch.testing.assert_close(embeddings(ids), model.task_token_embeddings(), **tolerance)
        model.task_tokens_from_queries = True
        from_queries = model(**batch).logits
        model.task_tokens_from_queries = False
        torch.testing.assert_close(model(**batch).logits, from_queries, rtol=0.05, atol=from_queries.std().item() / 20)
        for table in model.queries.values():
            table.normal_()
        # As sharded training saves: into a gathered state dict, whose names of the tied head may be there or not.
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.write_task_tokens(state)
        untied = {name: value for name, value in state.items() if name != "lm_head.weight"}
        model.write_task_tokens(untied)
        model.write_task_tokens()
        for saved in (state, untied):
            assert saved["model.language_model.embed_tokens.weight"].equal(embeddings.weight)
        assert state["lm_head.weight"].equal(embeddings.weight)
    with pytest.raises(
        KeyError, match=r"none of \['model\.language_model\.embed_tokens\.weight', 'lm_head\.weight'\]"
    ):
        model.write_task_tokens({"queries.gen": model.queries["gen"]})


# Vocabularies


def tokenizer_with_holes(in_the_middle: bool, added: bool = True):
    """Of 37 words and marks; three more have ids from 40, of which `added` makes added tokens, as chat models do."""
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    words = [*make_tokenizer().get_vocab()][:34]
    ids = {word: i for i, word in enumerate(words)}
    if in_the_middle:
        del ids[words[12]]
    ids.update({mark: 40 + i for i, mark in enumerate(marks)})
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    if added:
        tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("in_the_middle", [False, True])
@pytest.mark.parametrize("rows", [64, 43, 40])
@torch.no_grad()
def test_a_tokenizer_with_holes(tiny_parts, rows, in_the_middle):
    """Only the added ids get new rows; a table that is too small for them grows."""
    tokenizer = tokenizer_with_holes(in_the_middle)
    assert max(tokenizer.get_vocab().values()) == 42 > len(tokenizer)
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "vocab_size": rows}))
    model, processor = build_ola_vlm(tiny_parts.vision_tower, llm, tokenizer, tasks=tiny_tasks())
    added = [model.config.image_token_id, *model.config.task_token_ids]
    assert added == list(range(43, 52)) == [processor.image_token_id, *processor.task_token_ids]
    kept = [i for i in range(rows) if i not in added]
    known = [i for i in tokenizer.get_vocab().values() if i < rows]
    pairs = [(model.get_input_embeddings(), llm.get_input_embeddings()), (model.lm_head, llm.lm_head)]
    for ours, theirs in pairs:
        assert len(ours.weight) == 64 and ours.weight[kept].equal(theirs.weight[kept])
        torch.testing.assert_close(ours.weight[added[0]], theirs.weight[known].mean(0))
    ids = torch.tensor([[2, 39, 5, 33]])
    torch.testing.assert_close(model(input_ids=ids).logits[..., kept], llm(input_ids=ids).logits[..., kept])


def test_tokens_that_would_take_the_rows_of_others_are_refused(tiny_parts):
    """The library numbers new tokens by how many there are, unless its largest id is of an added one."""
    tokenizer = tokenizer_with_holes(in_the_middle=False, added=False)
    llm = AutoModelForCausalLM.from_config(LANGUAGE_MODELS["llama"])
    with pytest.raises(ValueError, match=r"37 tokens with ids up to 42, gives <depth_0> the id 40 of '<\|user\|>'"):
        build_ola_vlm(tiny_parts.vision_tower, llm, tokenizer, tasks=tiny_tasks())


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_pad_the_vocabulary(make_model, tiny_parts, tied_parts, tied, tmp_path):
    """The same model as without them: losses, predictions; they are never emitted, also not by the plain LLaVA."""
    parts = tied_parts if tied else tiny_parts
    model, processor = make_model(parts=parts)
    plain, _ = make_model(parts=parts, pad_vocab_to_multiple_of=1)
    assert (len(model.lm_head.weight), len(plain.lm_head.weight)) == (64, 43)
    state = {name: value[:43] if len(value) == 64 else value for name, value in model.state_dict().items()}
    plain.load_state_dict(state)
    batch = encode(processor, random_rows(3))
    labels = batch["input_ids"]
    with torch.no_grad():
        model.lm_head.weight[43:] *= 1e3  # would win everywhere
    mine, other = (each(**batch, labels=labels, output_predictions=True) for each in (model, plain))
    torch.testing.assert_close(mine.loss, other.loss)
    torch.testing.assert_close(mine.logits[..., :43], other.logits)
    assert mine.predictions["seg"][2].equal(other.predictions["seg"][2])
    (gradient,) = torch.autograd.grad(mine.loss, model.lm_head.weight)
    assert gradient[43:].eq(0).all()
    model.save_pretrained(tmp_path / "ours")
    export_llava(model).save_pretrained(tmp_path / "plain")
    prompt = encode(processor, [{**row, "messages": row["messages"][:1]} for row in random_rows(2)], "left")
    for model_class, folder in [(OlaVlmForConditionalGeneration, "ours"), (LlavaForConditionalGeneration, "plain")]:
        again = model_class.from_pretrained(tmp_path / folder)
        assert not hasattr(again.config, "vocab_padding") or folder == "ours"
        answer = again.generate(**prompt, max_new_tokens=5, do_sample=False)[:, prompt["input_ids"].shape[1] :]
        assert (answer < 34).all()


def test_the_multiple_must_be_one(tiny_parts):
    with pytest.raises(ValueError, match="pad_vocab_to_multiple_of is 0: give 1 for no padding, or more"):
        build_ola_vlm(tiny_parts.vision_tower, tiny_parts.language_model, pad_vocab_to_multiple_of=0)


# The start


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_only_new_parts_are_drawn(tiny_parts, monkeypatch, dtype):
    """Of a large model; the parts' own weights are those of the files all the same."""
    monkeypatch.setattr(target_weights, "DRAWN_WHOLE", 0)
    drawn = []
    for name in ("normal_", "uniform_"):
        original = getattr(torch.Tensor, name)

        def draw(tensor, *args, original=original, **kwargs):
            if tensor.device.type != "meta":
                drawn.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, draw)
    model, _ = build_ola_vlm(tiny_parts.vision_tower, tiny_parts.language_model, tasks=tiny_tasks(), dtype=dtype)
    new = [
        value for name, value in model.named_parameters() if part_of(name) not in ("language_model", "vision_tower")
    ]
    # LLaVA's own function draws linear layers before ours does.
    assert 0 < sum(drawn) <= 2 * sum(value.numel() for value in new)
    assert {value.dtype for value in model.parameters()} == {dtype or torch.float32}
    tower = CLIPVisionModel.from_pretrained(tiny_parts.vision_tower).state_dict()
    for name, value in model.model.vision_tower.state_dict().items():
        assert value.equal(tower[name].to(value.dtype))
    assert 0.8 < model.queries["depth"].std() < 1.2 and model.logit_scales["gen"].item() == 2.0
    scale = model.predictors["depth"]["1"].proj_in.weight.float().std() * 3**0.5 * 32**0.5
    assert 0.9 < scale < 1.1 and model.predictors["depth"]["1"].norm_out.weight.eq(1).all()
    # It can be drawn anew, as `train.load_model` does with the projector.
    before = model.model.multi_modal_projector.linear_1.weight.clone()
    model.model.multi_modal_projector.apply(model._init_weights)
    assert not model.model.multi_modal_projector.linear_1.weight.equal(before)


def test_small_models_start_as_they_always_did(tiny_parts):
    """Numbers in docs/ come out again: new parts get the values that they have in a model that is drawn as a whole."""
    torch.manual_seed(0)
    model, _ = build_ola_vlm(tiny_parts.vision_tower, tiny_parts.language_model, tasks=tiny_tasks())
    after = torch.get_rng_state()
    torch.manual_seed(0)
    whole = OlaVlmForConditionalGeneration(model.config).state_dict()
    assert torch.get_rng_state().equal(after)
    new = [name for name in whole if part_of(name) not in ("language_model", "vision_tower")]
    assert len(new) > 50 and all(model.state_dict()[name].equal(whole[name]) for name in new)


def test_parts_given_as_objects_stay_the_callers(tiny_parts):
    llm = AutoModelForCausalLM.from_pretrained(tiny_parts.language_model)
    tower = CLIPVisionModel.from_pretrained(tiny_parts.vision_tower)
    tokenizer = make_tokenizer()
    before = [value.clone() for part in (llm, tower) for value in part.parameters()]
    model, _ = build_ola_vlm(tower, llm, tokenizer, tasks=tiny_tasks())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    after = [value for part in (llm, tower) for value in part.parameters()]
    assert all(value.equal(old) for value, old in zip(after, before, strict=True))


def test_files_of_another_numeric_type(tiny_parts, tmp_path, monkeypatch):
    """They are read tensor by tensor, to the same weights as by transformers, whole files or shards."""
    llm = AutoModelForCausalLM.from_pretrained(tiny_parts.language_model, dtype=torch.bfloat16)
    for name, options in {"whole": {}, "shards": {"max_shard_size": "20KB"}}.items():
        llm.save_pretrained(tmp_path / name, **options)
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        model, report = target_weights.load_pretrained(AutoModelForCausalLM, tmp_path / name, dtype=torch.float32)
        assert target_weights.tensors_on_demand(tmp_path / name).keys() == llm.state_dict().keys()
        assert type(model) is type(expected) and not report["missing_keys"]
        assert model.dtype == torch.float32 and model.name_or_path == str(tmp_path / name)
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
        for key, value in expected.state_dict().items():
            assert model.state_dict()[key].equal(value)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def test_new_rows_are_as_fine_as_the_stored_ones(tiny_parts, tmp_path):
    """Whatever type they are kept in: the miniature's language model is stored in 16 bits."""
    llm = AutoModelForCausalLM.from_pretrained(tiny_parts.language_model, dtype=torch.float16)
    llm.save_pretrained(tmp_path)
    build = {"tokenizer": make_tokenizer(), "tasks": tiny_tasks(), "dtype": torch.float32}
    model, _ = build_ola_vlm(tiny_parts.vision_tower, str(tmp_path), **build)
    mean = llm.lm_head.weight.float().mean(0).half().float()
    assert model.lm_head.weight[model.config.image_token_id].equal(mean)


@pytest.mark.slow
def test_memory_at_the_start():
    """The benchmark, of a third of its size: below 1.2 times the weights kept, whatever type they are kept in."""
    script = Path(__file__).parents[1] / "benchmarks" / "start.py"
    command = [sys.executable, str(script), "--layers", "5"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("parts", "checkpoint"))]
    assert len(rows) == 4 and all(0.9 < float(row[-1]) < 1.2 for row in rows), done.stdout


def test_the_documented_qwen3_command(tiny_parts, tmp_path):
    """Qwen3's own template writes a thinking block before the last answer only. From the command to an answer."""
    folder = tmp_path / "qwen3"
    tokenizer = byte_tokenizer("<|im_end|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 8}
    AutoModelForCausalLM.from_config(Qwen3Config(**sizes, tie_word_embeddings=True)).save_pretrained(folder)
    sample = llava_sample("0")
    sample["conversations"] += llava_sample("0", image=None)["conversations"]
    data = write_llava(tmp_path, [sample] * 4, ["a.png"])

    save_clip_image(tmp_path / "teacher")
    teacher = {"encoder": "clip_image", "path": str(tmp_path / "teacher")}
    encoder = ClipImageEncoder.from_pretrained(teacher["path"], 1)
    task = {**tiny_tasks()[0], "target_length": encoder.target_length, "target_dim": encoder.target_dim}
    command = ["train", "--recipe", "llama3_vit_pretrain", "--language_model", str(folder), "--model_overrides", "{}"]
    command += ["--tasks", json.dumps([task]), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    command += ["--vision_tower", tiny_parts.vision_tower, "--data", str(data), "--image_folder", str(tmp_path)]
    command += ["--teachers", json.dumps({"gen": teacher}), "--target_cache", ""]
    command += ["--bf16", "false", "--dataloader_num_workers", "0", "--per_device_train_batch_size", "2"]
    cli.main([*command, "--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true"])

    chat = Chat.load(tmp_path / "out")
    trained = OlaVlmCollator(chat.processor)
    row = load_rows(str(data))[0]
    text = trained.encode(row).text
    opening = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for turn in (1, 3):
        messages = row["messages"][:turn]
        prompt = chat.processor.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt.endswith(opening) and text.startswith(prompt + "the cube<|im_end|>")
    labels = trained([row])["labels"]
    assert chat.tokenizer.decode(labels[labels != -100]) == "the cube<|im_end|>" * 2
    question = [{"type": "image", "image": random_image(0)}, {"type": "text", "text": "what is this ?"}]
    ids = chat.inputs([{"role": "user", "content": question}])["input_ids"]
    assert chat.tokenizer.decode(ids[0]).endswith(opening)


def save_open_clip(folder, file_name="open_clip_pytorch_model.bin", without=()):
    """What open_clip's repositories hold: its configuration, and weights of both halves; returns timm's trunk."""
    torch.manual_seed(0)
    trunk = timm.create_model("convnext_atto", num_classes=0).eval()
    weights = {f"visual.trunk.{name}": value.clone() for name, value in trunk.state_dict().items()}
    weights |= {"visual.head.proj.weight": torch.ones(8, 320), "logit_scale": torch.ones(1), "text.a": torch.ones(2)}
    weights = {name: value for name, value in weights.items() if name not in without}
    folder.mkdir()
    save = save_file if file_name.endswith("safetensors") else torch.save
    save(weights, folder / file_name)
    vision = {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    fields = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(fields))
    return trunk


def test_convnext_of_open_clip(tiny_parts, tmp_path, monkeypatch, capsys):
    """From open_clip's checkpoint through both stages to transformers' FastVLM, with the same logits."""
    trunk = save_open_clip(tmp_path / "open_clip")
    tower = str(tmp_path / "tower")
    cli.main(["convert-tower", str(tmp_path / "open_clip"), tower, "--image-size", "128"])
    assert f"Wrote the vision tower to {tower}" in capsys.readouterr().out
    folder = run_stages(tmp_path, monkeypatch, tower, tiny_parts.language_model)
    model = OlaVlmForConditionalGeneration.from_pretrained(folder)
    processor = OlaVlmProcessor.from_pretrained(folder)
    assert (processor.patch_size, processor.num_additional_image_tokens) == (32, 0)
    assert processor.image_processor.size == {"height": 128, "width": 128}
    assert (*processor.image_processor.image_mean, *processor.image_processor.image_std) == (0.4,) * 3 + (0.2,) * 3
    config = model.config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")
    assert config.image_seq_length == 16 and config.vision_config.hidden_size == 320
    batch = encode(processor, random_rows(2))
    assert (batch["input_ids"] == config.image_token_id).sum(1).tolist() == [16, 16]
    with torch.no_grad():
        output = model(**batch, output_predictions=True)
        assert output.predictions["seg"][2].shape == (2, 16, 14)
        features = trunk.forward_features(batch["pixel_values"])  # one map; a token is a place, row by row
        tokens = model.model.multi_modal_projector(features.flatten(2).transpose(1, 2))
        torch.testing.assert_close(torch.stack(model.get_image_features(batch["pixel_values"]).pooler_output), tokens)
        cli.main(["export", folder, str(tmp_path / "plain")])
        plain, info = FastVlmForConditionalGeneration.from_pretrained(tmp_path / "plain", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert plain(**batch).logits.equal(output.logits)


def test_the_papers_convnext_has_the_papers_grid():
    """24x24 tokens of 768 pixels, without memory for its 843 million weights (and as `ola-vlm check-data` does it)."""
    seen = {"input_size": [3, 768, 768], "mean": [0.5] * 3, "std": [0.5] * 3}
    with torch.device("meta"):
        tower = TimmWrapperModel(
            TimmWrapperConfig(architecture="convnext_xxlarge", do_pooling=False, pretrained_cfg=seen)
        )
        config, class_tokens = measure_tower(tower)
    assert (config.hidden_size, config.image_size, config.patch_size, class_tokens) == (3072, 768, 32, 0)


def test_open_clip_checkpoints_that_do_not_fit(tmp_path):
    save_open_clip(tmp_path / "good", "open_clip_model.safetensors")
    assert convert_tower(str(tmp_path / "good")).config.pretrained_cfg["input_size"] == [3, 32, 32]
    save_open_clip(tmp_path / "less", without=["visual.trunk.stages.1.blocks.0.norm.weight"])
    with pytest.raises(RuntimeError, match=r"Missing key.*stages\.1\.blocks\.0\.norm\.weight"):
        convert_tower(str(tmp_path / "less"))
    (tmp_path / "good" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"none of the files \['open_clip_model.safetensors'"):
        convert_tower(str(tmp_path / "good"))
    fields = {"model_cfg": {"vision_cfg": {"image_size": 32, "patch_size": 16}}, "preprocess_cfg": {}}
    (tmp_path / "good" / "open_clip_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="no trunk of timm's"):
        convert_tower(str(tmp_path / "good"))
    vision = {"timm_model_name": "convnext_atto"}
    without_std = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"mean": [0.4] * 3}}
    for fields in ({}, {"model_cfg": 5}, without_std):
        (tmp_path / "good" / "open_clip_config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=r"open_clip_config\.json is not as open_clip writes it \(\w+: .*fetch"):
            convert_tower(str(tmp_path / "good"))


def test_siglip_pair_as_tower(tiny_parts, tmp_path, monkeypatch):
    """As Google's checkpoints come: two towers, half a patch over (a side of 27 patches at 384 pixels)."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    vision = {**small, "image_size": 36, "patch_size": 8}
    pair = SiglipModel(SiglipConfig(vision_config=vision, text_config={**small, "vocab_size": 64}))
    pair.save_pretrained(tmp_path / "siglip")
    (tmp_path / "siglip" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 36, "width": 36}})
    )
    folder = run_stages(tmp_path, monkeypatch, str(tmp_path / "siglip"), tiny_parts.language_model)
    model, processor = OlaVlmForConditionalGeneration.from_pretrained(folder), OlaVlmProcessor.from_pretrained(folder)
    embedding = model.model.vision_tower.embeddings.patch_embedding.weight
    assert embedding.equal(pair.vision_model.embeddings.patch_embedding.weight)
    assert tuple(processor.image_processor.image_mean) == (0.5,) * 3
    assert (encode(processor, random_rows(1))["input_ids"] == model.config.image_token_id).sum() == 16


def test_checkpoints_that_lack_weights_are_refused(tiny_parts, make_model, tmp_path):
    """They would be random, with a warning only."""
    with pytest.raises(ValueError, match=r"InternVL.*image_size of \[64, 64\], not one number"):
        save_vision(tmp_path / "internvl", "internvl")
        build_ola_vlm(str(tmp_path / "internvl"), tiny_parts.language_model)
    save_vision(tmp_path / "siglip")
    fields = json.loads((tmp_path / "siglip" / "config.json").read_text())
    fields["num_hidden_layers"] = 3
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"no weights for SiglipVisionModel's .*layers\.2.*of the whole model"):
        build_ola_vlm(str(tmp_path / "siglip"), tiny_parts.language_model)
    LlamaModel(LANGUAGE_MODELS["llama"]).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"headless has no weights for LlamaForCausalLM's lm_head\.weight"):
        build_ola_vlm(tiny_parts.vision_tower, str(tmp_path / "headless"), make_tokenizer())
    with pytest.raises(ValueError, match=r"timm's vit_small\w+ gives features \(1, 69, 32\): take a convolutional"):
        build_ola_vlm(VISION_MODELS["timm_vit"](), tiny_parts.language_model)
    # The tower of a whole LLaVA is found in it.
    llava, _ = make_model()
    export_llava(llava).save_pretrained(tmp_path / "llava")
    model, _ = build_ola_vlm(str(tmp_path / "llava"), tiny_parts.language_model)
    for name, value in llava.model.vision_tower.state_dict().items():
        assert model.model.vision_tower.state_dict()[name].equal(value)


def test_a_tower_that_takes_more_than_pixels_is_refused():
    """SigLIP 2's NaFlex takes patches, a mask and their places."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = Siglip2VisionConfig(**sizes, patch_size=8)
    config.image_size = 32
    with pytest.raises(ValueError, match="Siglip2VisionModel takes more than an image's pixels: take another"):
        measure_tower(Siglip2VisionModel(config))
