"""Recipes make valid arguments; the paper's prompts are those of the reference."""

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ola_vlm.recipes import RECIPES, miniature
from ola_vlm.recipes.paper import CHAT_TEMPLATES, METHODS, WEIGHTS
from ola_vlm.targets.encoders import ENCODERS
from ola_vlm.training.arguments import OlaVlmArguments

PROMPTS = json.loads((Path(__file__).parent / "golden" / "h_prompts.json").read_text())
TURNS = [
    ("What are the colors of the bus in the image?", "The bus in the image is white and red."),
    ("What feature can be seen on the back of the bus?", "The back of the bus features an advertisement."),
    ("Is it day?", "Yes."),
]
CAPTION = "Render a clear and concise summary of the photo."
CONVERSATIONS = {
    "caption": [(CAPTION, "select luxury furniture 3 - inch gel memory foam mattress topper")],
    "instr2": TURNS[:2],
    "instr3": TURNS,
    "textonly": [("Hi, who are you?", "An assistant.")],
}


@pytest.mark.parametrize("name", list(PROMPTS))
def test_paper_prompts_are_the_reference_ones(name):
    llm, conversation = name.split(".")
    messages = []
    for i, (question, answer) in enumerate(CONVERSATIONS[conversation]):
        image = [{"type": "image"}] if i == 0 and conversation != "textonly" else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    (text,), (spans,) = render_jinja_template(
        [messages], chat_template=CHAT_TEMPLATES[llm], return_assistant_tokens_mask=True, bos_token=""
    )
    assert text == PROMPTS[name]["prompt"]
    end = "<|eot_id|>" if llm == "llama3" else "<|end|>"
    # Unlike the reference, whose spans begin with the header's line break: the answer and its end of turn.
    assert [text[start:stop] for start, stop in spans] == [answer + end for _, answer in CONVERSATIONS[conversation]]
    if llm == "llama3":
        recorded = PROMPTS[name]["supervised_spans"]
        assert [text[start:stop] for start, stop in spans] == [span.removeprefix("\n\n") for span in recorded]
    prompt = render_jinja_template(
        [messages[:1]], chat_template=CHAT_TEMPLATES[llm], add_generation_prompt=True, bos_token=""
    )[0][0]
    assert text.startswith(prompt)


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


def test_every_preset_says_its_licence_and_one_may_be_used_commercially():
    licences = {name: preset["licence"] for name, preset in WEIGHTS.items()}
    page = (Path(__file__).parents[1] / "docs" / "teachers.md").read_text()
    for name, preset in WEIGHTS.items():
        assert preset["encoder"] in ENCODERS
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        assert preset["path"] in line and licences[name] in line
    assert {name for name, licence in licences.items() if "NC" in licence} == {"depth_base", "depth_large"}
    for method, (tasks, teachers) in METHODS.items():
        assert [task["name"] for task in tasks] == list(teachers)
        commercial = not any("NC" in teacher["licence"] for teacher in teachers.values())
        assert commercial == (method != "ola_vlm")
        recorded = {name: teacher["path"] for name, teacher in teachers.items()}
        for task in tasks:
            (line,) = [line for line in page.splitlines() if f"`{recorded[task['name']]}`" in line]
            assert line.split("|")[4].strip() == str(task["target_dim"])
