"""Recipes make valid arguments; methods differ in what they should."""

from pathlib import Path

import pytest

from ola_vlm.recipes import RECIPES, miniature
from ola_vlm.recipes.paper import FUSIONS, METHODS, WEIGHTS
from ola_vlm.targets.encoders import ENCODERS
from ola_vlm.training.arguments import OlaVlmArguments


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_make_valid_arguments(name, tmp_path):
    values = RECIPES[name]()
    changes = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    args = OlaVlmArguments(**(values | changes))
    assert args.stage in values["output_dir"] and args.weight_decay == 0


def test_miniature_methods_differ_in_what_they_should_only():
    llava, ola, shuffled = (miniature.pretrain(method) for method in miniature.METHODS)
    for other, fields in ((llava, {"tasks", "output_dir"}), (shuffled, {"shuffle_targets", "output_dir"})):
        assert {field for field in ola if ola[field] != other[field]} == fields
    assert shuffled["shuffle_targets"] and not ola["shuffle_targets"] and llava["tasks"] == []
    for name, fusion in FUSIONS.items():
        baseline = miniature.pretrain(name)
        assert {field for field in llava if llava[field] != baseline[field]} == {"fusion", "output_dir"}
        assert baseline["fusion"] == fusion and llava["fusion"] is None
    with pytest.raises(ValueError, match="'lava'"):
        miniature.finetune("lava")


def test_every_preset_says_its_licence_and_one_may_be_used_commercially():
    licences = {name: preset["licence"] for name, preset in WEIGHTS.items()}
    page = (Path(__file__).parents[1] / "docs" / "teachers.md").read_text()
    for name, preset in WEIGHTS.items():
        assert preset["encoder"] in ENCODERS
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        assert preset["path"] in line and licences[name] in line
    assert {name for name, licence in licences.items() if "NC" in licence} == {"depth_base", "depth_large"}
    for method, (tasks, teachers) in METHODS.items():
        if method in FUSIONS:  # in the paper's order, too
            assert tasks == [] and list(teachers) == [task["name"] for task in METHODS["ola_vlm"][0]]
            continue
        assert [task["name"] for task in tasks] == list(teachers)
        commercial = not any("NC" in teacher["licence"] for teacher in teachers.values())
        assert commercial == (method != "ola_vlm")
        recorded = {name: teacher["path"] for name, teacher in teachers.items()}
        for task in tasks:
            (line,) = [line for line in page.splitlines() if f"`{recorded[task['name']]}`" in line]
            assert line.split("|")[4].strip() == str(task["target_dim"])
