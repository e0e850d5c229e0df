"""Chat templates: every family's can be trained with, on answers and their ends of turn, from inference's prompts."""

import re
import sys
from importlib.resources import files
from types import SimpleNamespace

import pytest
from test_data import CHATML, byte_processor, byte_tokenizer, supervised_spans
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ola_vlm.convert.parts import build_processor
from ola_vlm.training import chat_template
from ola_vlm.training.chat_template import (
    check_chat_template,
    fit_chat_template,
    stop_at_end_of_turn,
    taking_images,
)
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
    "muse_glimmer.*": "<|eot|>",
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
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
HEADER_IN_MARKS = (  # SmolLM3's
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + message['content'].lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GLM4 = (  # an answer ends where the next question begins, and nothing is at the end of a chat
    "[GMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED_WITHOUT_END = GLM4.replace(
    "message['content'] }}",
    "'' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}",
)
PARTS_WITHOUT_END = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
EMPTY_THOUGHT = CHATML.replace(  # before every answer, and not in the prompt
    "message['content'] +",
    "('<think>\n</think>\n' if message['role'] == 'assistant' else '') + message['content'] +",
)
LAST_THOUGHT = (  # before the last answer only, and the prompt begins one: of thinking models that TRL doesn't know
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\nBEGUN' }}{% endif %}"
)
MARKED_LAST_THOUGHT = LAST_THOUGHT.replace(
    "{{ message['content'] + '<|im_end|>\n' }}",
    "{%- generation -%} {{ message['content'] + '<|im_end|>' }} {%- endgeneration -%} {{ '\n' }}",
)
STRUCTURES = {
    "last_thought": (LAST_THOUGHT.replace("BEGUN", ""), "<|im_end|>"),
    "last_thought_begun": (LAST_THOUGHT.replace("BEGUN", "<think>\n"), "<|im_end|>"),
    "last_thought_marked": (MARKED_LAST_THOUGHT.replace("BEGUN", ""), "<|im_end|>"),
    "glm4": (GLM4, "</s>"),
    "marked_without_end": (MARKED_WITHOUT_END, "</s>"),
    "parts_without_end": (PARTS_WITHOUT_END, "</s>"),
    "gemma1": (GEMMA, "<end_of_turn>"),
    "llama2": (LLAMA2, "</s>"),
    "zephyr": (ZEPHYR, "</s>"),
    "mistral": (MISTRAL, "</s>"),
    "phi4": (PHI4, "<|end|>"),
    "smollm2": (CHATML, "<|im_end|>"),
    "smollm3": (HEADER_IN_MARKS, "<|im_end|>"),
    "thoughts": (EMPTY_THOUGHT, "<|im_end|>"),
}
# TRL's templates that have the model write the thinking block or channel, if they are given as they are.
WRITES_OPENING = r"(glm4moe|gptoss|muse_glimmer|qwen3|qwen3_5_think|qwen3_6|qwen3_8)_training"


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


def test_a_template_without_end_of_turn_gets_the_end_of_sequence_and_says_so(caplog):
    processor = byte_processor(GLM4)
    text = OlaVlmCollator(processor).chat_template.prompt(chat("red")[:1])
    assert text.endswith("<|user|>\nquestion 0 ?<|assistant|>\n")
    assert caplog.text.count("which ends each answer with </s>") == 1 and "will not learn to end" not in caplog.text
    OlaVlmCollator(processor)
    assert caplog.text.count("which ends each answer with </s>") == 1


@pytest.mark.parametrize(
    ("ends", "then"), [(None, [9]), (2, [2, 9]), ([2, 4], [2, 4, 9]), (9, 9), ([2, 9], [2, 9]), ([7], [7, 9])]
)
def test_answers_stop_at_the_end_of_turn(ends, then):
    """Whatever else the model's generation stops at; ends of turn of words, which answers may have, change nothing."""
    processor = byte_processor(CHATML)
    fitted = fit_chat_template(processor)
    token = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=_numbered(ends, token)))
    stop_at_end_of_turn(model, fitted)
    assert model.generation_config.eos_token_id == _numbered(then, token)
    fitted.ends = ["###"]
    stop_at_end_of_turn(model, fitted)
    assert model.generation_config.eos_token_id == _numbered(then, token)


def test_answers_stop_at_each_end_of_turn_of_a_template():
    """gpt-oss ends its last answer otherwise than those before; the tokenizer's own end is added by the trainer."""
    template, ends = template_and_ends("gptoss_training")
    processor = byte_processor(template)
    processor.tokenizer.add_tokens(["<|return|>"], special_tokens=True)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    stop_at_end_of_turn(model, fit_chat_template(processor))
    stops = processor.tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert sorted(stops) == sorted(ends.split(" "))


def _numbered(ends, token: int):
    """With the end of turn in the place of 9, and a number that is no token in the others'."""
    if isinstance(ends, list):
        return [_numbered(end, token) for end in ends]
    return ends if ends is None else token if ends == 9 else 10**6 + ends


def test_a_template_that_fits_is_left_as_it_is(caplog):
    processor = byte_processor(CHATML)
    assert processor.chat_template == taking_images(CHATML)
    assert not caplog.text


def test_without_trl_a_thinking_template_gets_the_empty_block_before_every_answer(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    template, _ = template_and_ends("qwen3")
    chat_of = fit_chat_template(byte_processor(template))
    text, spans = chat_of.text_and_spans(chat("red", "blue"))
    assert text.count("<|im_start|>assistant\n<think>\n\n</think>\n\n") == text.count("<think>") == 2
    assert [text[start:stop] for start, stop in spans] == ["red<|im_end|>", "blue<|im_end|>"]


def test_a_template_whose_answers_differ_otherwise_is_refused_with_the_reason():
    template = LAST_THOUGHT.replace("BEGUN", "<think>\n").replace(
        "'<|im_start|>' +", "('[LAST]' if loop.last else '') +"
    )
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


def test_a_mark_that_takes_an_answers_white_space_along_is_the_prompts():
    """Phi-3's do."""
    processor = byte_processor(CHATML)
    marks = [AddedToken(mark, rstrip=True, special=True) for mark in ("<|user|>", "<|assistant|>", "<|end|>")]
    processor.tokenizer.add_tokens(marks)
    processor.chat_template = taking_images(PHI4)
    spans, _ = supervised_spans(OlaVlmCollator(processor), {"id": "x", "messages": chat(" red", "\nblue ")})
    assert spans == ["red<|end|>", "blue <|end|>"]


# What stands around texts


def marked(template: str, condition: str, marks_end: bool) -> str:
    """The template with marks around what it writes under a condition, with the end of turn or without."""
    end = "'<|im_end|>'"
    inside, outside = (f"message['content'] + {end}", "''") if marks_end else ("message['content']", end)
    answer = f"{{% generation %}}{{{{ {inside} }}}}{{% endgeneration %}}{{{{ {outside} }}}}"
    other = f"{{{{ message['content'] + {end} }}}}"
    written = f"{{% if {condition} %}}{answer}{{% else %}}{other}{{% endif %}}"
    assert "message['content'] + '<|im_end|>'" in template
    return template.replace("message['content'] + '<|im_end|>'", "'' }}" + written + "{{ ''")


@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
def test_marks_that_leave_out_an_end_of_turn_that_is_written(eos, caplog):
    processor = byte_processor(marked(CHATML, "message['role'] == 'assistant'", marks_end=False), eos)
    spans, text = supervised_spans(OlaVlmCollator(processor), {"id": "x", "messages": chat("red\n", "blue")})
    assert spans == ["red\n<|im_end|>", "blue<|im_end|>"]
    plain = byte_processor(CHATML)
    assert text == plain.apply_chat_template(chat("red\n", "blue")) and not caplog.text


def test_marks_of_the_last_answer_alone_are_left_out(caplog):
    processor = byte_processor(marked(CHATML, "message['role'] == 'assistant' and loop.last", marks_end=True))
    assert caplog.text.count("take a variant of it without marks") == 1
    spans, text = supervised_spans(OlaVlmCollator(processor), {"id": "x", "messages": chat("red", "blue")})
    assert spans == ["red<|im_end|>", "blue<|im_end|>"]
    assert text == byte_processor(CHATML).apply_chat_template(chat("red", "blue"))
    assert caplog.text.count("without marks") == 1


def tokenizer_that_adds(*single: str, **fields):
    tokenizer = byte_tokenizer("</s>")
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=list(single), special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize("front", [[], ["<s>"]])
def test_nothing_stands_between_the_prompt_and_the_answer(front, tmp_path):
    """A tokenizer that was saved in the middle of a training ends each text with its end of sequence."""
    tokenizer = tokenizer_that_adds(*front, "$A", "</s>")
    processor = build_processor(tokenizer, SimpleNamespace(image_size=32, patch_size=8), [], chat_template=CHATML)
    processor.save_pretrained(tmp_path)
    for one in (processor, type(processor).from_pretrained(tmp_path)):
        ids = OlaVlmCollator(one).encode({"id": "x", "messages": chat("red", "blue")}).ids.tolist()
        for turn in (1, 3):
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            prompt = one.apply_chat_template([chat("red", "blue")[:turn]], **options)["input_ids"][0]
            assert ids[: len(prompt)] == list(prompt)
        assert one.tokenizer.convert_ids_to_tokens(ids[: len(front)]) == front


def test_a_processors_tokenizer_that_ends_each_prompt_is_refused():
    processor = byte_processor(CHATML)
    processor.tokenizer.backend_tokenizer.post_processor = tokenizer_that_adds(
        "$A", "</s>"
    ).backend_tokenizer.post_processor
    with pytest.raises(ValueError, match=r"adds </s> behind each text, .*: set its add_eos_token to false"):
        OlaVlmCollator(processor)


def test_a_tokenizer_that_was_saved_while_it_cut_and_filled(tmp_path):
    tokenizer = byte_tokenizer("<|im_end|>")
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|im_end|>")
    processor = build_processor(loaded, SimpleNamespace(image_size=32, patch_size=8), [], chat_template=CHATML)
    (ids,) = processor.apply_chat_template([chat("red")], tokenize=True, return_dict=True)["input_ids"]
    assert processor.tokenizer.decode(ids).endswith("question 0 ?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n")


def test_a_tokenizer_without_any_special_token():
    """Padding goes by position: any token will do."""
    tokenizer = byte_tokenizer("<|im_end|>")
    tokenizer.bos_token = tokenizer.eos_token = None
    processor = build_processor(tokenizer, SimpleNamespace(image_size=32, patch_size=8), [], chat_template=CHATML)
    batch = OlaVlmCollator(processor)([{"id": str(i), "images": [], "messages": chat("red" * i)} for i in (1, 2)])
    assert batch["attention_mask"].sum(1).diff() == 3 and batch["labels"][0, -3:].tolist() == [-100] * 3


def test_a_slow_tokenizer_is_refused():
    tower = SimpleNamespace(image_size=32, patch_size=8)
    processor = build_processor(ByT5Tokenizer(), tower, [], chat_template=PARTS_WITHOUT_END)
    with pytest.raises(ValueError, match=r"ByT5Tokenizer doesn't tell where .*: give a fast tokenizer"):
        OlaVlmCollator(processor)


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
