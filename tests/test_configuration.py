"""The configuration: defaults by task, errors that name the field, and files that keep everything."""

import json

import pytest
from conftest import tiny_tasks
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from ola_vlm.configuration_ola_vlm import KEY_GROUPS, OlaVlmConfig, default_tasks, normalize_task, task_token_strings


def make_config(tasks=None, **kwargs) -> OlaVlmConfig:
    text = LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=100)
    count = sum(task.get("num_task_tokens", 8) for task in tasks or [])
    kwargs = {"image_token_index": 50, "task_token_ids": list(range(51, 51 + count)), **kwargs}
    vision = CLIPVisionConfig(hidden_size=32, num_attention_heads=4)
    return OlaVlmConfig(text_config=text, vision_config=vision, tasks=tasks, **kwargs)


def test_paper_defaults():
    text = LlamaConfig(hidden_size=64, num_hidden_layers=32, vocab_size=32064)
    config = OlaVlmConfig(text_config=text, tasks=default_tasks(), task_token_ids=list(range(32001, 32025)))
    gen, depth, seg = config.tasks
    assert [task["name"] for task in config.tasks] == ["gen", "depth", "seg"]
    assert gen["layers"] == [12, 20] and depth["layers"] == [8, 20] and seg["layers"] == [10, 18]
    lengths = [(task["target_length"], task["target_dim"], task["predictor_dim"]) for task in config.tasks]
    assert lengths == [(1, 1024, 1024), (576, 1024, 64), (576, 1536, 1536)]
    for task in config.tasks:
        assert task["num_task_tokens"] == 8 and task["attends_to"] == KEY_GROUPS
        assert (task["loss_weight"], task["contrastive_weight"]) == (0.5, 0.3)
        assert [task[f"predictor_{part}"] for part in ["depth", "heads", "head_dim", "ffn_mult"]] == [1, 4, 32, 1]
        assert task["output_mlp"] == (task["name"] == "depth")
    assert task_token_strings(config.tasks)[7:10] == ["<gen_7>", "<depth_0>", "<depth_1>"]
    assert normalize_task({**default_tasks()[1], "num_task_tokens": 0}, 64, 32)["predictor_dim"] == 1024


def test_another_models_configuration_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type is 'llama'.*OLA-VLM or plain LLaVA"):
        OlaVlmConfig.from_pretrained(tmp_path)


def test_plain_llava_by_default():
    config = OlaVlmConfig()
    assert config.tasks == [] and config.task_token_ids == []
    fields = LlavaConfig().to_dict()
    ours = config.to_dict()
    assert {key for key in fields if ours[key] != fields[key]} == {"model_type"}


def test_saved_and_loaded(tmp_path):
    """The order of tasks is kept (JSON sorts keys), and a new version's files name their classes."""
    tasks = tiny_tasks()[::-1]
    config = make_config(tasks)
    config.save_pretrained(tmp_path)
    loaded = OlaVlmConfig.from_pretrained(tmp_path)
    assert loaded.tasks == config.tasks and loaded.task_token_ids == config.task_token_ids
    assert [task["name"] for task in loaded.tasks] == ["seg", "depth", "gen"]
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_ola_vlm.OlaVlmConfig"
    assert auto_map["AutoModel"] == "modeling_ola_vlm.OlaVlmForConditionalGeneration"
    assert tasks == tiny_tasks()[::-1]  # the caller's dicts are not changed


WRONG = {
    "layers": [([], "list one or more"), ([5], "choose from 1 to 4"), ([-1, 1], "from 1 to 4"), ([2, 2], "different")],
    "num_task_tokens": [(-1, "at least 0"), (3, "divisor of target_length 16"), (32, "divisor"), (2.0, "integer")],
    "target_length": [(0, "at least 1"), (None, "integer")],
    "target_dim": [("10", "integer"), (None, "integer")],
    "loss_weight": [(-0.5, "at least 0"), ("high", "number"), (float("inf"), "finite")],
    "contrastive_weight": [(None, "number")],
    "predictor_depth": [(0, "at least 1")],
    "predictor_heads": [(0, "at least 1")],
    "predictor_head_dim": [(0, "at least 1")],
    "predictor_ffn_mult": [(0, "at least 1")],
    "predictor_dim": [(0, "at least 1")],
    "output_mlp": [("yes", "true or false")],
    "attends_to": [
        ([], "list one or more of"),
        ([["image"]], "list one"),
        (["image", "words"], r"'system', 'image', 'task', 'text'"),
    ],
}


@pytest.mark.parametrize(("field", "value", "remedy"), [(f, v, r) for f, cases in WRONG.items() for v, r in cases])
def test_wrong_task_fields(field, value, remedy):
    task = {**tiny_tasks()[1], "name": "other", field: value}
    with pytest.raises(ValueError, match=rf"tasks\[other\]\.{field} is .*{remedy}"):
        normalize_task(task, 32, 4)


def test_a_tasks_field_of_an_earlier_name():
    """`keys` in a checkpoint of before; a task that has both names is refused."""
    task = normalize_task({**tiny_tasks()[1], "keys": ["task", "image"]}, 32, 4)
    assert task["attends_to"] == ["image", "task"] and "keys" not in task
    with pytest.raises(ValueError, match=r"\['keys'\]: unknown fields"):
        normalize_task({**task, "keys": ["text"]}, 32, 4)


def test_wrong_task_lists():
    with pytest.raises(ValueError, match=r"tasks\[\]\.name is None"):
        make_config([{"layers": [1]}])
    with pytest.raises(ValueError, match=r"tasks\[\] is 'depth': give each task as a dict"):
        normalize_task("depth", 32, 4)
    with pytest.raises(ValueError, match=r"tasks\[\]\.name is 'keys': .* no attribute of"):
        make_config([{"name": "keys", "layers": [1], "target_length": 1, "target_dim": 8}])
    with pytest.raises(ValueError, match=r"tasks\[depth\]\.attends_to .* there is nothing to attend to"):
        make_config([{**tiny_tasks()[1], "num_task_tokens": 0, "attends_to": ["task"]}])
    with pytest.raises(ValueError, match=r"task_token_ids .* give different ids"):
        make_config(tiny_tasks(), task_token_ids=[f"<depth_{i}>" for i in range(8)])
    with pytest.raises(ValueError, match=r"tasks\[depth\] is \['layer'\]: unknown fields"):
        make_config([{"name": "depth", "layer": 3}])
    with pytest.raises(ValueError, match=r"tasks\[motion\]\.target_length is None"):
        make_config([{"name": "motion", "layers": [1]}])
    with pytest.raises(ValueError, match="own name"):
        make_config(tiny_tasks() + tiny_tasks()[:1])
    with pytest.raises(ValueError, match="the tasks need 8 ids"):
        make_config(tiny_tasks(), task_token_ids=[51])
    with pytest.raises(ValueError, match="different ids within the 100 embeddings"):
        make_config(tiny_tasks(), task_token_ids=list(range(93, 101)))
    with pytest.raises(ValueError, match="different ids"):
        make_config(tiny_tasks(), task_token_ids=list(range(50, 58)))  # 50 is the image token
