"""Recipes make valid arguments; methods differ in what they should."""

import pytest

from ola_vlm.recipes import RECIPES, miniature
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
    with pytest.raises(ValueError, match="'lava'"):
        miniature.finetune("lava")
