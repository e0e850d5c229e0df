"""Models of other families by command: attached, trained on rows or on images alone, resumed, used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_image
from safetensors.torch import load_file
from tiny_teachers import GRID, save_clip_image, save_depth_anything, save_oneformer
from tiny_vlms import FAMILIES
from training_helpers import Interrupt, llava_sample, losses, weights, write_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from ola_vlm import cli
from ola_vlm.inference.chat import Chat
from ola_vlm.inference.checkpoints import read_checkpoint
from ola_vlm.probing.features import find_teachers
from ola_vlm.probing.pictures import LayerViewer
from ola_vlm.recipes import RECIPES
from ola_vlm.recipes.attach import FAMILIES as FAMILIES_OF_RECIPES
from ola_vlm.train import train
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.attach import AttachedPredictors
from ola_vlm.training.collator import AttachedCollator
from ola_vlm.training.preflight import check_run

ATTACHED = ["qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "internvl"]
SMALL = {"num_task_tokens": 0, "predictor_heads": 2, "predictor_head_dim": 8}
DEPTH = {"name": "depth", "layers": [2, 4], "target_length": GRID**2, "target_dim": 32, **SMALL}
every_family = pytest.mark.parametrize("family", ATTACHED)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint of each family, a depth teacher, rows with images, and a folder of images alone."""
    folder = tmp_path_factory.mktemp("any_vlm")
    for family in ATTACHED:
        torch.manual_seed(0)
        for part in FAMILIES[family]():
            part.save_pretrained(folder / family)
    torch.manual_seed(1)
    save_depth_anything(folder / "teacher")
    save_clip_image(folder / "gen")
    save_oneformer(folder / "seg")
    write_llava(folder, [llava_sample(i, f"{i % 3}.png") for i in range(8)], ["0.png", "1.png", "2.png"])
    for i in range(6):
        (folder / "images" / "more").mkdir(parents=True, exist_ok=True)
        random_image(i, (32, 24)).save(folder / "images" / ("more" if i % 2 else "") / f"{i}.png")
    (folder / "images" / "notes.txt").write_text("no image")
    return folder


def fields(place: Path, family: str, output_dir: Path, **changes) -> OlaVlmArguments:
    given = {
        "checkpoint": str(place / family),
        "tasks": [DEPTH],
        "teachers": {"depth": {"encoder": "depth_anything", "path": str(place / "teacher")}},
        "data": str(place / "data.json"),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return OlaVlmArguments(output_dir=str(output_dir), **(given | changes))


def moved(model, untouched) -> set[str]:
    before = untouched.state_dict()
    return {name for name, value in model.state_dict().items() if name in before and not value.equal(before[name])}


@every_family
def test_a_checkpoint_of_any_family_is_trained(place, tmp_path, family):
    """Projector and predictors move, nothing else; the folder is the family's own checkpoint, predictors beside it."""
    trainer = train(fields(place, family, tmp_path / "out"))
    logged = losses(trainer)
    assert all(step["loss/ntp"] > 0 and step["loss/depth/2/smooth_l1"] > 0 for step in logged)
    untouched = AutoModelForImageTextToText.from_pretrained(place / family)
    projector = ("merger", "deepstack_merger_list", "connector", "multi_modal_projector")
    changed = moved(trainer.model, untouched)
    assert changed and all(any(f".{part}." in name for part in projector) for name in changed), changed
    own = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(own) is type(untouched)
    again, processor = read_checkpoint(tmp_path / "out", needs_processor=True)
    assert isinstance(again, AttachedPredictors) and again.config.tasks[0]["layers"] == [2, 4]
    for name, value in weights(trainer.model).items():
        assert value.equal(again.state_dict()[name]), name
    assert type(processor) is type(AutoProcessor.from_pretrained(place / family))


@every_family
def test_without_tasks_it_learns_text_alone(place, tmp_path, family):
    trainer = train(fields(place, family, tmp_path / "out", tasks=None, teachers={}, stage="finetune"))
    assert [*losses(trainer)[0]] == ["loss", "loss/ntp"]
    assert not (tmp_path / "out" / "predictors.safetensors").exists()
    untouched = AutoModelForImageTextToText.from_pretrained(place / family)
    changed = moved(trainer.model, untouched)
    assert any("layers.3." in name for name in changed)
    assert not any("vision" in name or "visual.blocks" in name for name in changed), changed


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_adapters_and_predictors_train_together(place, tmp_path, family):
    """With LoRA and embedding losses; what moves, what stays, and what is read from the folder again."""
    options = {"stage": "finetune", "embedding_losses": True, "lora_rank": 2}
    trainer = train(fields(place, family, tmp_path / "out", **options))
    assert losses(trainer)[0]["loss/depth/4/smooth_l1"] > 0
    base = trainer.model.get_base_model()
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    kinds = ("lora_A", "lora_B", "modules_to_save", "predictors.", "logit_scales.")
    assert trained and all(any(kind in name for kind in kinds) for name in trained), trained
    for kind in kinds:
        assert any(kind in name for name in trained), kind
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any("predictors" in name for name in written)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    merged, _ = read_checkpoint(tmp_path / "out")
    assert isinstance(merged, AttachedPredictors)
    for name, value in merged.state_dict().items():
        if name.startswith(("predictors.", "logit_scales.")):
            assert value.equal(base.state_dict()[name]), name
    cli.main(["merge", str(tmp_path / "out"), str(tmp_path / "merged")])
    again, _ = read_checkpoint(tmp_path / "merged", needs_processor=True)
    assert isinstance(again, AttachedPredictors)
    assert all(value.equal(again.state_dict()[name]) for name, value in merged.state_dict().items())
    untouched = AutoModelForImageTextToText.from_pretrained(place / family)
    changed = moved(merged, untouched)
    assert any("q_proj" in name for name in changed)
    assert not any("embed_tokens" in name or ("norm.weight" in name and "layers" in name) for name in changed), changed


@pytest.mark.parametrize("adapters", [pytest.param(False, marks=pytest.mark.slow), True], ids=["all", "lora"])
def test_interrupted_and_resumed(place, tmp_path, adapters):
    options = {"save_strategy": "steps", "save_steps": 1}
    if adapters:
        options |= {"stage": "finetune", "embedding_losses": True, "lora_rank": 2}
    whole = train(fields(place, "qwen2_5_vl", tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        train(fields(place, "qwen2_5_vl", tmp_path / "cut", **options), callbacks=[Interrupt(3)])
    resumed = train(fields(place, "qwen2_5_vl", tmp_path / "cut", resume_from_checkpoint="true", **options))
    assert losses(resumed) == losses(whole)
    for name, value in weights(resumed.model).items():
        assert value.equal(weights(whole.model)[name]), name


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_images_alone(place, tmp_path, family, capsys, caplog):
    """No question, no caption: the embedding losses train, and the plan says so."""
    options = {"data": str(place / "images"), "eval_data": "0.3", "eval_strategy": "steps", "eval_steps": 3}
    trainer = train(fields(place, family, tmp_path / "out", **options))
    assert "none: images alone, which embedding losses learn from" in capsys.readouterr().out
    assert "1 files that are no images, by their endings, are left out" in caplog.text
    for step in losses(trainer):
        assert step["loss/ntp"] == 0 < step["loss/depth/2/smooth_l1"]
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluation["eval_loss/ntp"] == 0 < evaluation["eval_loss"] < float("inf")
    changed = moved(trainer.model, AutoModelForImageTextToText.from_pretrained(place / family))
    assert changed and not any("layers" in name and "language" in name for name in changed)


def test_images_alone_that_cannot_be_used(place, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"empty has no images \(\.bmp, .*give data, a folder of images"):
        train(fields(place, "qwen2_5_vl", tmp_path / "out", data=str(tmp_path / "empty")))
    nothing = {"tasks": None, "teachers": {}, "stage": "finetune", "data": str(place / "images")}
    with pytest.raises(ValueError, match="has images alone, which only embedding losses learn from"):
        train(fields(place, "qwen2_5_vl", tmp_path / "out", **nothing))
    broken = tmp_path / "broken"
    broken.mkdir()
    random_image(0).save(broken / "fine.png")
    (broken / "cut.png").write_bytes((broken / "fine.png").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"bad rows: image undecodable \(1\); row cut.png: image .*on_bad_rows=drop"):
        train(fields(place, "qwen2_5_vl", tmp_path / "out", data=str(broken)))
    trainer = train(fields(place, "qwen2_5_vl", tmp_path / "out", data=str(broken), on_bad_rows="drop", max_steps=1))
    assert len(trainer.train_dataset) == 1


CODE = """
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

class NewConfig(Idefics3Config):
    model_type = "new_vlm"

class NewModel(Idefics3ForConditionalGeneration):
    config_class = NewConfig
"""


def test_a_model_whose_code_comes_with_it(place, tmp_path):
    """It is run where the command's own option says so, and only there."""
    folder = tmp_path / "new"
    shutil.copytree(place / "idefics3", folder)
    (folder / "new_vlm.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "new_vlm.NewConfig", "AutoModelForImageTextToText": "new_vlm.NewModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "new_vlm", "auto_map": classes}))
    options = {"checkpoint": str(folder), "max_steps": 1}
    message = "is a 'new_vlm', whose code comes with the checkpoint: read that code, then give --trust_remote_code"
    for tasks in ([DEPTH], None):
        with pytest.raises(ValueError, match=message):
            train(fields(place, "idefics3", tmp_path / "out", **options, tasks=tasks, data="never/read.csv"))
    with pytest.raises(SystemExit, match="trust_remote_code is nothing for a file, which may be a stranger's"):
        (tmp_path / "run.yaml").write_text("trust_remote_code: true\n")
        cli.main(["train", str(tmp_path / "run.yaml")])
    trainer = train(fields(place, "idefics3", tmp_path / "out", **options, trust_remote_code=True))
    assert losses(trainer)[0]["loss/depth/2/smooth_l1"] > 0
    again, _ = read_checkpoint(tmp_path / "out", trust_remote_code=True)
    assert isinstance(again, AttachedPredictors) and again.config.model_type == "new_vlm"


def test_what_does_not_fit(place, tmp_path):
    def refused(message: str, family: str = "qwen2_5_vl", **changes):
        with pytest.raises(ValueError, match=message):
            train(fields(place, family, tmp_path / "never", **changes))

    refused("choose from 1 to 4", tasks=[DEPTH | {"layers": [9]}])
    refused("so no row is cut: give drop", on_long_rows="truncate", max_length=100)
    with_tokens = {"lora_rank": 2, "stage": "finetune", "tasks": [DEPTH | {"num_task_tokens": 4}]}
    refused("give tasks with num_task_tokens 0", **with_tokens)
    refused("load_in_4bit is for our own models", lora_rank=2, stage="finetune", load_in_4bit=True)
    refused("image_side is 64, of a square", image_side=64, image_square=False)
    refused("max_length 15 has no room for an image", max_length=15, data="never/read.csv")
    assert not (tmp_path / "never" / "run.json").exists()


def test_predicted_places_are_those_of_the_teachers_square(place, tmp_path):
    """An image of its own form has other places, and perhaps as many: refused, given or remembered."""
    patch = {"name": "depth", "layers": [2], "predictor": "patch", "target_length": GRID**2, "target_dim": 32}
    message = r"image_square is false, and task 'depth' \(predictor patch\) predicts .*: set image_square to true"

    def check(**changes):
        return check_run(fields(place, "qwen2_5_vl", tmp_path, **{"tasks": [patch], **changes}))

    with pytest.raises(ValueError, match=message):
        check(image_square=False)
    remembered = tmp_path / "remembered"
    shutil.copytree(place / "qwen2_5_vl", remembered)
    config = json.loads((remembered / "config.json").read_text())
    (remembered / "config.json").write_text(json.dumps({**config, "image_view": {"square": False}}))
    with pytest.raises(ValueError, match=message):
        check(checkpoint=str(remembered))
    assert len(check(checkpoint=str(remembered), image_square=True)) == 1
    # What has no places, what may learn them, and what doesn't train.
    of_whole_image = {**patch, "target_length": 1}
    assert len(check(image_square=False, tasks=[of_whole_image], teachers=None)) == 1
    assert len(check(image_square=False, tasks=[DEPTH])) == 1
    assert check(image_square=False, stage="finetune") == []
    # In a program it is the collator that is told both.
    processor = AutoProcessor.from_pretrained(place / "qwen2_5_vl")
    with pytest.raises(ValueError, match=message):
        AttachedCollator(processor, tasks=[patch], square=False)


# Of the tests' tiny models: how many pixels a side make how many tokens a side.
VIEWS = {"qwen2_5_vl": ("qwen2_5_vl", 64, 4), "qwen3_vl": ("qwen3_vl", 64, 4)}
VIEWS |= {"smolvlm": ("idefics3", None, 2), "internvl3": ("internvl", None, 2), "gemma3": ("gemma3", None, 2)}
TARGET_DIMS = {"gen": 12, "depth": 32, "seg": 64}


def tiny_tasks_of(recipe: str, layers: int, side: int) -> list[dict]:
    """The recipe's tasks for a language model of 4 layers and for tiny teachers."""
    tasks = []
    for task in RECIPES[recipe]()["tasks"]:
        is_grid = task.get("predictor") in ("patch", "none")
        length = side**2 if is_grid else GRID**2
        task["target_length"] = 1 if task["target_length"] == 1 else length
        task["layers"] = sorted({round(4 * layer / layers) for layer in task["layers"]})
        if task["name"] in TARGET_DIMS:
            task["target_dim"] = TARGET_DIMS[task["name"]]
        tasks.append(task)
    return tasks


def tiny_teachers_of(recipe: str, place: Path) -> dict:
    paths = {"gen": "gen", "depth": "teacher", "seg": "seg"}
    if recipe.endswith("_words"):
        seg = {"encoder": "class_words", "path": str(place / "seg"), "words": ["red", "green", "blue", "red", "near"]}
        depth = {"encoder": "depth_words", "path": str(place / "teacher"), "words": ["near", "far"]}
        return {"words": {"class": seg, "depth": depth}}
    teachers = RECIPES[recipe]()["teachers"]
    for name, teacher in teachers.items():
        teacher.pop("subfolder", None)
        teacher["path"] = str(place / paths[name])
    return teachers


@pytest.mark.parametrize("objective", ["", "_patch", "_words"], ids=["paper", "patch", "words"])
@pytest.mark.parametrize("family", FAMILIES_OF_RECIPES, ids=lambda family: family.name)
def test_every_recipe_trains_a_tiny_model_of_its_family(place, tmp_path, family, objective):
    """As a user would: the recipe's name, and what is ours in place of what is on the Hub."""
    recipe = f"attach_{family.name}{objective}"
    folder, pixels, side = VIEWS[family.name]
    words = {
        "recipe": recipe,
        "checkpoint": str(place / folder),
        "tasks": json.dumps(tiny_tasks_of(recipe, family.layers, side)),
        "teachers": json.dumps(tiny_teachers_of(recipe, place)),
        "data": str(place / "images"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": "2",
        "logging_steps": "1",
        "gradient_accumulation_steps": "1",
        "use_cpu": "true",
    }
    if pixels is not None:
        words["image_side"] = str(pixels)
    cli.main(["train", *(word for name, value in words.items() for word in (f"--{name}", value))])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    logged = state["log_history"][0]
    losses = {name: value for name, value in logged.items() if name.startswith("loss/") and name != "loss/ntp"}
    assert losses and all(0 < value < float("inf") for name, value in losses.items() if "contrastive" not in name)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["recipe"] == recipe and run["image_options"] == RECIPES[recipe]().get("image_options")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    projector = ("merger", "deepstack_merger_list", "connector", "multi_modal_projector")
    changed = moved(saved, AutoModelForImageTextToText.from_pretrained(place / folder))
    assert changed and all(any(f".{part}." in name for part in projector) for name in changed), changed


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("idefics3", marks=pytest.mark.slow)])
def test_every_command_takes_what_was_trained(place, tmp_path, family, monkeypatch, capsys):
    """Chat, eval, export, probes, pictures of probes and of its own predictors, the card, the Space."""
    monkeypatch.chdir(tmp_path)
    view = {"image_options": {"do_image_splitting": False}} if family == "idefics3" else {"image_side": 64}
    train(fields(place, family, "out", target_cache="cache", target_fill=True, standardize_targets=True, **view))
    images = [str(path) for path in sorted((place / "images").rglob("*.png"))]

    def said(*words: str) -> str:
        capsys.readouterr()
        cli.main([str(word) for word in words])
        return capsys.readouterr().out

    assert said("chat", "out", images[0], "what is this ?")
    questions = [{"question": "what is this ?", "image": Path(path).name, "answer": "cube"} for path in images[:1]]
    Path("questions.json").write_text(json.dumps(questions))
    said("eval", "out", "--benchmark", "questions.json", "--data", place / "images", "--out", "eval")
    assert json.loads(Path("eval/answers.jsonl").read_text().splitlines()[0])["output"]

    said("export", "out", "plain")
    assert not (tmp_path / "plain" / "predictors.safetensors").exists()
    plain = AutoModelForImageTextToText.from_pretrained("plain").eval()
    assert not {"tasks", "task_token_ids", "image_view"} & plain.config.to_dict().keys()
    trained, processor = read_checkpoint("out")
    inputs = AttachedCollator(processor).inputs(processor.image_token + " what is this ?", [random_image(0)])
    with torch.no_grad():
        own = trained.eval()(**inputs).logits
        inputs.pop("image_owner")
        assert plain(**inputs).logits.equal(own)

    said("visualize", "out", images[0], "--out", "by_predictors")
    teachers = json.dumps({"depth": {"encoder": "depth_anything", "path": str(place / "teacher")}})
    probe = ["probe", "out", "--images", place / "images", "--out", "probes", "--batch_size", "2"]
    said(*probe, "--tasks", json.dumps([DEPTH]), "--teachers", teachers, "--use_cpu", "true")
    said("visualize", "out", images[0], "--probes", "probes/out", "--out", "by_probes")
    for folder in ("by_predictors", "by_probes"):
        assert (tmp_path / folder / "depth.png").exists() and (tmp_path / folder / "layers.html").exists()
    assert "predictors.safetensors" in said("push", "out", "me/attached", "--dry_run")
    with pytest.raises(SystemExit, match="teachers has none for gen, seg: give --targets depth"):
        cli.main([str(word) for word in (*probe, "--teachers", teachers, "--use_cpu", "true")])

    model = Chat.load("out")
    viewer = LayerViewer.load("out", model.model, model.processor, find_teachers(None, "out"))
    assert [*viewer.pictures([random_image(0)])] == ["depth"]  # what the Space shows
