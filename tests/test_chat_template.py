"""Chat templates: every family's can be trained with, on answers and their ends of turn, from inference's prompts."""

import re
import sys
from importlib.resources import files
from types import SimpleNamespace

import pytest
from test_data import CHATML, byte_processor, supervised_spans

from ola_vlm.convert.parts import build_processor
from ola_vlm.training import chat_template
from ola_vlm.training.chat_template import check_chat_template, fit_chat_template, taking_images
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.rows import BadRow, read_row

TRL = files("trl") / "chat_templates"
ENDS = {  # names of TRL's files -> the end of turn, first that of the last answer if it is another one
    "cohere(_training)?": "<|END_OF_TURN_TOKEN|>",
    "cohere2.*": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek.*": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "gemma3?(_training)?": "<end_of_turn>",
    "(diffusion_gemma|gemma4).*": "<turn|>",
    "glm4.*": "<|user|>",
    "gptoss.*": "<|return|> <|end|>",
    "(idefics|smolvlm).*": "<end_of_utterance>",
    "(lfm2|qwen|nemotron).*": "<|im_end|>",
    "llama3.*": "<|eot_id|>",
    "llava_next.*": "</s>",
    "phi3(_5)?": "<|end|>",
    "phi3.*_training": "<|end|>\n</s> <|end|>",  # which mark the end of the chat, too
}
# Versions of the same differ in how they write tools.
FILES = [file.name for file in sorted(TRL.iterdir(), key=str) if not re.search(r"_v\d", file.name)]
NAMES = [name.removesuffix(".jinja") for name in FILES if name.endswith(".jinja")]
# Of models whose templates TRL doesn't have: their structure.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}"
    "{% endfor %}"
)
PHI4 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
HEADER_IN_MARKS = (  # SmolLM3's
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + message['content'].lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EMPTY_THOUGHT = CHATML.replace(  # before every answer, and not in the prompt
    "message['content'] +",
    "('<think>\n</think>\n' if message['role'] == 'assistant' else '') + message['content'] +",
)
STRUCTURES = {
    "mistral": (MISTRAL, "</s>"),
    "phi4": (PHI4, "<|end|>"),
    "smollm2": (CHATML, "<|im_end|>"),
    "smollm3": (HEADER_IN_MARKS, "<|im_end|>"),
    "thoughts": (EMPTY_THOUGHT, "<|im_end|>"),
}
# TRL's templates that have the model write the thinking block or channel, if they are given as they are.
WRITES_OPENING = r"(glm4moe|gptoss|qwen3|qwen3_5_think|qwen3_6|qwen3_8)_training"


def chat(*answers, image=False, parts=True):
    messages = []
    for i, answer in enumerate(answers):
        content = [{"type": "text", "text": f"question {i} ?"}]
        if image and i == 0:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}] if parts else answer})
    return messages


def known(name):
    return next((ends for pattern, ends in ENDS.items() if re.fullmatch(pattern, name)), None)


def template_and_ends(name):
    if name in STRUCTURES:
        return STRUCTURES[name]
    return (TRL / f"{name}.jinja").read_text(encoding="utf-8"), known(name)


@pytest.mark.parametrize("name", [*filter(known, NAMES), *STRUCTURES])
def test_inferences_prompt_then_the_answer_and_its_end_of_turn_and_nothing_else(name):
    template, ends = template_and_ends(name)
    processor = byte_processor(template)
    collator = OlaVlmCollator(processor)
    messages = chat("red cube", "a  near\nsphere", "left\n", " two", "\tone\n \n")
    text, spans = collator.chat_template.text_and_spans(messages)
    assert len(spans) == 5
    for i, (start, stop) in enumerate(spans):
        answer = messages[2 * i + 1]["content"][0]["text"].strip()
        prompt = processor.apply_chat_template(messages[: 2 * i + 1], add_generation_prompt=True)
        assert text[:start] in (prompt, prompt + " ")
        end = next(end for end in ends.split(" ") if text[start:stop].endswith(end))
        said = text[start:stop].removesuffix(end).strip()
        if re.fullmatch(WRITES_OPENING, name):
            said = said.rpartition(">")[2].lstrip()
        assert said == answer
    # Training sees the tokens of inference, and its labels are those spans.
    row = {"id": "x", "images": [], "messages": messages}
    ids = processor.apply_chat_template([messages], tokenize=True, return_dict=True)["input_ids"][0]
    assert list(ids) == collator.encode(row).ids.tolist()
    runs, _ = supervised_spans(collator, row)
    assert runs == [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize("name", ["qwen3", "deepseekv3", "nemotron_3_nano", "gptoss", "thoughts"])
def test_another_template_is_said_and_saved_and_stays(name, tmp_path, caplog):
    template, _ = template_and_ends(name)
    processor = byte_processor(template)
    assert caplog.text.count("take a variant of it, whose prompt ends") == 1
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    row = {"id": "x", "images": [], "messages": chat("red", "blue\n")}
    encoded, again = (OlaVlmCollator(one).encode(row) for one in (processor, loaded))
    assert loaded.chat_template == processor.chat_template
    assert encoded.ids.tolist() == again.ids.tolist() and encoded.labels.tolist() == again.labels.tolist()
    assert caplog.text.count("take a variant of it") == 1


def test_a_template_that_fits_is_left_as_it_is(caplog):
    processor = byte_processor(CHATML)
    assert processor.chat_template == taking_images(CHATML)
    assert not caplog.text


def test_without_trl_a_thinking_template_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    template, _ = template_and_ends("qwen3")
    with pytest.raises(ValueError, match="is not what stands before the answer"):
        OlaVlmCollator(byte_processor(template))


def test_an_answer_with_a_thought_of_its_own_is_a_bad_row_where_the_prompt_has_an_empty_one():
    template, _ = template_and_ends("qwen3")
    chat_of = fit_chat_template(byte_processor(template))
    with pytest.raises(BadRow, match="begins an answer with"):
        chat_of.text_and_spans(chat("<think>\nhm\n</think>\n\nred"))


def test_the_default_one_of_named_templates():
    processor = byte_processor(CHATML)
    processor.tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ raise_exception('tools') }}"}
    tower = SimpleNamespace(image_size=32, patch_size=8)
    processor = build_processor(processor.tokenizer, tower, [])
    assert processor.chat_template == taking_images(CHATML)
    assert fit_chat_template(processor).end_of_turn == "<|im_end|>"


# The end of turn of answers that end in white space

ANSWERS = ["red cube", "red cube\n", " red cube", "  red cube", "red cube\n\n\n", "red cube \t", "\n red cube\n", "\n"]


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("marks", [True, False])
def test_the_end_of_turn_is_supervised_whatever_white_space_an_answer_ends_in(parts, answer, marks):
    template = CHATML
    if marks:
        template = HEADER_IN_MARKS.replace(".lstrip('\n')", "")
    collator = OlaVlmCollator(byte_processor(template))
    row = read_row({"messages": chat(answer, "blue", answer, parts=parts)}, 0, ".")
    spans, _ = supervised_spans(collator, row)
    kept = answer if parts else answer.strip()  # strings are read as LLaVA's
    assert spans == [kept + "<|im_end|>", "blue<|im_end|>", kept + "<|im_end|>"]


# A template is a stranger's file

LONG = "{{ 'x' * 100000 }}"
BOMBS = [
    "{{ 'x' * 1000000000 }}",
    "{% set text = namespace(value='x') %}{% for i in range(40) %}{% set text.value = text.value ~ text.value %}"
    "{% endfor %}{{ text.value }}",
    "{% for i in range(30000) %}{{ 'x' * 10000 }}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("template", BOMBS)
def test_a_template_that_takes_all_memory_or_time_ends_in_one_line(template, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1)
    with pytest.raises(ValueError, match="takes more than 1 seconds, 512 MB or 16,777,216 characters") as error:
        byte_processor(template)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('x\ny' * 5000) }}",
        "{{ 1 / 0 }}",
        "{{ messages['x'].y.z }}",
        "{% if %}",
        "{{ 'x' * 100000 }}",
    ],
)
def test_a_template_that_raises_or_writes_nonsense_ends_in_one_short_line(template):
    processor = byte_processor(CHATML)
    processor.chat_template = template
    with pytest.raises(ValueError) as error:
        OlaVlmCollator(processor)
    assert len(str(error.value)) < 1000 and len(str(error.value).splitlines()) == 1
    if template != LONG:
        with pytest.raises(ValueError, match="the chat template refuses it"):
            check_chat_template(processor)


def test_a_template_that_writes_too_much_of_a_row_makes_it_a_bad_row(monkeypatch):
    collator = OlaVlmCollator(byte_processor(CHATML))
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 200)
    with pytest.raises(BadRow, match=r"writes 1,1\d\d characters"):
        collator.check_text({"id": "x", "images": [], "messages": chat("red " * 250)})
