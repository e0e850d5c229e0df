"""Recipes of other objectives: what each changes, and a step of each on the miniature's own parts."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from training_helpers import losses
from transformers import AutoTokenizer

from ola_vlm.configuration_ola_vlm import TASK_FIELDS, normalize_task
from ola_vlm.recipes import RECIPES, miniature, objectives, show
from ola_vlm.targets.fill import make_teachers
from ola_vlm.targets.words import class_words
from ola_vlm.train import train
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.stages import part_of
from ola_vlm.training.words import encode_words
from ola_vlm.world import language, render

LOSSES = {
    "words": {"words/0/mse"},
    "moments": {"moments/0/moments"},
    "patch": {"depth/2/smooth_l1", "seg/2/smooth_l1"},
    "patch_half": {"depth/2/smooth_l1", "seg/2/smooth_l1"},
    "words_ola_vlm": {"gen/3/smooth_l1", "depth/2/smooth_l1", "seg/2/smooth_l1", "words/0/mse"},
}


def test_every_recipe_changes_tasks_and_teachers_alone():
    found = {recipe.run.name for recipe in RECIPES.values() if recipe.table is objectives.MINIATURE}
    assert found == {f"miniature_{name}" for name in LOSSES}
    for name, recipe in RECIPES.items():
        if recipe.table not in objectives.TABLES:
            continue
        changed = set(show.changes(name)) - {"output_dir", "checkpoint"}
        changed = {field for field in changed if not field.startswith("tasks.")}  # of tasks that both have
        expected = {"tasks", "teachers"} if recipe.stage == "pretrain" else set()
        if name == "miniature_patch_half_finetune":
            expected = {"embedding_losses", "losses_until", "standardize_targets"}
            expected |= {"teachers", "target_cache", "target_fill"}
        if name == "words_qwen3_vit_pretrain":
            expected = {"language_model", "model_overrides"}
        assert changed == expected, name
        for task in recipe.fields.get("tasks", []):
            normalize_task(task, 4096 if recipe.table is objectives.LARGE else 128, 32)


def test_every_objective_has_its_control():
    for name, changes in miniature.OBJECTIVES.items():
        fields = {stage: getattr(miniature, stage)(name, seed=3, root="here") for stage in ("pretrain", "finetune")}
        assert fields["pretrain"]["shuffle_targets"] == name.endswith("_shuffled")
        assert fields["finetune"]["checkpoint"] == fields["pretrain"]["output_dir"] == f"here/{name}/seed3/pretrain"
        assert fields["pretrain"]["target_cache"] == "here/targets"
        if "finetune" in changes:
            assert fields["finetune"]["target_cache"] == "here/targets" and fields["finetune"]["losses_until"] == 0.5
    llava = miniature.pretrain("llava")
    words = miniature.pretrain("words")
    assert {field for field in words if words[field] != llava[field]} == {"tasks", "teachers", "output_dir"}


def test_the_miniatures_words_are_the_worlds():
    classes = miniature.WORD_TEACHERS["class"]["words"]
    assert [word for word in classes if word != "."] == list(render.COLORS) == list(render.CLASSES[2:])
    depth = miniature.WORD_TEACHERS["depth"]
    assert depth["words"] == [f"z{i}" for i in range(language.BINS)]
    assert depth["bins"] == [4 / render.NEAR, 4 / render.FAR]
    tokenizer = AutoTokenizer.from_pretrained(miniature.WEIGHTS / "language_model")
    assert encode_words(tokenizer, [*classes, *depth["words"]]).shape == (20, 1)


def test_cocos_classes_are_words():
    labels = {0: "person", 1: "wall-other-merged", 2: "dining table"}
    assert "words" not in objectives.WORD_TEACHERS["class"]
    config = SimpleNamespace(id2label=labels, num_labels=3)
    assert class_words("here", config, None) == ["person", "wall", "dining table"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of four rendered scenes with captions, as a run's data."""
    folder = tmp_path_factory.mktemp("scenes")
    sampled = render.sample_scenes(4, seed=5)
    pictures = render.render_scenes(sampled)["image"]
    rows = []
    for i in range(4):
        Image.fromarray(pictures[i]).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\ndescribe the image ."}, {"from": "gpt", "value": "a red cube"}]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_of_each(scenes, tmp_path, name):
    short = {"data": str(scenes / "data.json"), "image_folder": str(scenes), "max_steps": 2, "logging_steps": 1}
    short |= {"per_device_train_batch_size": 2, "target_cache": str(scenes / "targets"), "disable_tqdm": True}
    stages = {}
    for stage in ("pretrain", "finetune"):
        fields = RECIPES[f"miniature_{name}_{stage}"]() | short | {"output_dir": str(tmp_path / stage)}
        if stage == "finetune":
            fields["checkpoint"] = str(tmp_path / "pretrain")
        stages[stage] = train(OlaVlmArguments(**fields))
    expected = {f"loss/{loss}" for loss in LOSSES[name]}
    assert all(step[loss] > 0 for step in losses(stages["pretrain"]) for loss in expected)
    steps = losses(stages["finetune"])
    assert all((loss in step) == (name == "patch_half") for step in steps for loss in expected)
    if name == "patch_half":
        assert [step["loss_weight/depth"] for step in steps] == [0.5, 0.0]
    names = [parameter for parameter, _ in stages["pretrain"].model.named_parameters()]
    has_predictors = any(part_of(parameter) == "predictors" for parameter in names)
    assert has_predictors == (name not in ("words", "moments"))


def test_the_pages_examples_are_tasks_and_teachers():
    text = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text()
    examples = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.S)]
    tasks = [normalize_task(example, 4096, 32) for example in examples if "name" in example]
    assert [(task["predictor"], task["loss"]) for task in tasks] == [
        ("resampler", "smooth_l1"),
        ("patch", "cosine"),
        ("none", "mse"),
        ("none", "moments"),
    ]
    (teachers,) = [example for example in examples if "name" not in example]
    assert list(make_teachers(tasks[2:3], teachers)) == ["words.class", "words.depth"]
    for field in TASK_FIELDS.keys() - {"name", "num_task_tokens", "target_length", "target_dim"}:
        is_the_resamplers = field in ("predictor_heads", "predictor_head_dim", "predictor_ffn_mult", "output_mlp")
        assert is_the_resamplers or f"`{field}`" in text, field
