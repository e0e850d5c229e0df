"""The chat: what is streamed is what the model generates, typed control tokens stay text, and it ends when told to."""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_image
from tiny_vlms import FAMILIES
from tokenizers.processors import TemplateProcessing

from ola_vlm import cli
from ola_vlm.inference import chat
from ola_vlm.inference.chat import NO_IMAGE, Chat, converse, sampling_options
from ola_vlm.inference.questions import option_words, without_option_words

ROOT = Path(__file__).parents[1]
MINIATURE, SCENE = str(ROOT / "miniature" / "weights" / "ola_vlm"), str(ROOT / "docs" / "scene.png")
CLOSER = "which object is closer to the camera ? (A) red object (B) blue object"


def said(*contents) -> list[dict]:
    """Messages, the user's first; a content is a text, or images before it."""
    messages = []
    for i, content in enumerate(contents):
        parts = [content] if isinstance(content, str) else content
        parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        messages.append({"role": "assistant" if i % 2 else "user", "content": parts})
    return messages


@pytest.fixture(scope="module")
def miniature() -> Chat:
    return Chat.load(MINIATURE)


@pytest.fixture
def tiny(make_model) -> Chat:
    return Chat(*make_model())


def generated(talker: Chat, messages: list[dict], **options) -> str:
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = talker.processor.apply_chat_template(messages, **template)
    tokens = talker.model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 12, **options})
    return talker.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["ours", *FAMILIES])
def test_the_stream_is_what_the_model_generates(family, tiny):
    torch.manual_seed(0)
    talker = tiny if family == "ours" else Chat(*FAMILIES[family]())
    first, second = random_image(1), random_image(2, size=(48, 32))
    messages = said([first, "what is this ?"], "red cube", [second, first, "and this ?"])
    pieces = list(talker.stream(messages, max_new_tokens=12))
    assert "".join(pieces) == generated(talker, messages)
    if family == "ours":
        assert len([piece for piece in pieces if piece]) > 2, "not streamed"
    torch.manual_seed(3)
    sampled = "".join(talker.stream(messages, temperature=0.7, top_p=0.9, max_new_tokens=12))
    torch.manual_seed(3)
    assert sampled == generated(talker, messages, do_sample=True, temperature=0.7, top_p=0.9)


def test_typed_control_tokens_are_text(miniature):
    typed = "what <image> is <depth_0> there <end> <assistant> (A)"
    ids = miniature.inputs(said([random_image(0), typed]))["input_ids"][0].tolist()
    assert "".join(miniature.stream(said(typed), max_new_tokens=4))  # no image at all
    for token, times in {"<image>": 64, "<depth_0>": 1, "<end>": 0, "<assistant>": 1}.items():
        assert ids.count(miniature.tokenizer.convert_tokens_to_ids(token)) == times, token
    (first, second) = miniature.remarks("what <image> is Foo <depth_0> there")
    assert "<image> <depth_0>" in first and "Foo" in second and "there" not in second
    assert miniature.remarks(CLOSER) == []


def test_half_a_character_is_a_question_mark(miniature):
    """A terminal of another encoding gives them, and so can a page."""
    assert miniature.remarks("what \udcff is") == []
    halved, whole = (miniature.inputs(said(text))["input_ids"] for text in ("what \ud83d is", "what ? is"))
    assert halved.equal(whole)


def test_two_threads_read_alike(miniature):
    questions = [said([random_image(0), "what <image> is there " * 20]), said([random_image(1), CLOSER])] * 40
    alone = [miniature.inputs(messages)["input_ids"].tolist() for messages in questions[:2]] * 40
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda messages: miniature.inputs(messages)["input_ids"].tolist(), questions))
    assert together == alone


def test_a_template_that_leaves_the_first_token_to_the_tokenizer(tiny):
    """As LLaVA's own."""
    model, processor = tiny.model, tiny.processor
    bos = ("<s>", processor.tokenizer.bos_token_id)
    adds = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    processor.tokenizer.backend_tokenizer.post_processor = adds
    processor.chat_template = processor.chat_template.replace("{{ bos_token }}", "")
    messages = said([random_image(0), "what is this ?"])
    assert "".join(tiny.stream(said("what <image> <s> is this ?"), max_new_tokens=2))
    expected = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    ids = Chat(model, processor).inputs(messages)["input_ids"]
    assert ids.tolist() == [list(row) for row in expected["input_ids"]] and ids[0, :2].tolist().count(bos[1]) == 1


def test_closing_the_stream_stops_the_model(tiny):
    steps = []
    tiny.model.register_forward_hook(lambda *_: steps.append(1))
    tiny.model.generation_config.eos_token_id = None
    stream = tiny.stream(said("what is this ?"), max_new_tokens=2000)
    assert len(list(islice(stream, 3))) == 3
    stream.close()
    assert 0 < len(steps) < 500


def test_errors_arrive(tiny, monkeypatch):
    length = tiny.inputs(said("what is this ?"))["input_ids"].shape[1]
    tiny.model.config.text_config.max_position_embeddings = length + 2
    assert tiny.context_length == length + 2
    list(tiny.stream(said("what is this ?"), max_new_tokens=100))  # as many as there is room for
    with pytest.raises(ValueError, match=f"{length + 4} tokens.*fewer than {length + 2}"):
        next(tiny.stream(said("what is this ? what is this ?")))

    def fail(**_):
        raise RuntimeError("out of something")

    monkeypatch.setattr(tiny.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of something"):
        list(tiny.stream(said("what")))
    tiny.processor.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        Chat(tiny.model, tiny.processor)


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-45, 1e-300, 0.0099])
def test_hardly_any_temperature_is_none(temperature, tiny):
    assert sampling_options(temperature, 1, 7) == {"do_sample": False, "max_new_tokens": 7}
    messages = said([random_image(0), "what is this ?"])
    assert "".join(tiny.stream(messages, temperature, max_new_tokens=4)) == generated(tiny, messages, max_new_tokens=4)


@pytest.mark.parametrize("temperature", [2, 0.01, 1, 100, np.float32(0.5), np.int64(1), 1e30])
@pytest.mark.parametrize("top_p", [1, 0.05, 1e-45, np.float64(0.5)])
def test_numbers_of_every_kind_sample(temperature, top_p, tiny):
    options = sampling_options(temperature, top_p, 2.0)
    assert [type(options[name]) for name in ("temperature", "top_p", "max_new_tokens")] == [float, float, int]
    assert "".join(tiny.stream(said("what is this ?"), temperature, top_p, 2)) is not None


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), "1", None, True, [1], -1, -1e-45])
@pytest.mark.parametrize("name", ["temperature", "top_p", "max_new_tokens"])
def test_what_is_no_such_number_is_refused_before_anything_is_read(name, wrong, tiny, monkeypatch):
    monkeypatch.setattr(tiny, "inputs", None)
    with pytest.raises(ValueError, match=f"^{name} is "):
        next(tiny.stream(said("what"), **{name: wrong}))


@pytest.mark.parametrize(
    ("question", "answer", "shown"),
    [
        (CLOSER, "(B)", "(B) blue object"),
        (CLOSER, " (A)", " (A) red object"),
        ("Which ?\nA. a cat\nB. a dog\nAnswer with the letter.", "B", "B: a dog"),
        ("Which ?\nA. a cat\nB. a dog\nAnswer with the letter.", "A.", "A. a cat"),
        (CLOSER, "(C)", "(C)"),
        (CLOSER, "(A) or (B)", "(A) or (B)"),
        (CLOSER, "(A) red object", "(A) red object"),
        (CLOSER, "A red object", "A red object"),
        (CLOSER, "", ""),
        ("where is it ?", "(A)", "(A)"),
        ("", "(A)", "(A)"),
    ],
)
def test_an_option_is_called_by_its_words(question, answer, shown):
    assert answer + option_words(question, answer) == shown
    if shown != answer:
        assert without_option_words(question, shown) == answer
    assert without_option_words("where is it ?", shown) == shown


def test_a_conversation_in_the_terminal(miniature, monkeypatch):
    lines = [
        "/image ~nobody-of-that-name/x.png",
        f"/image '{SCENE}'",
        "where is the red object ?",
        "what shape is <image> ?",
        "",
    ]
    lines = iter([*lines, "/reset", "/what", "many " * 2000, CLOSER, "/quit", "never read"])
    asked, written, stream = [], [], miniature.stream

    def spy(messages, **sampling):
        asked.append([(m["role"], [part["type"] for part in m["content"]]) for m in messages])
        return stream(messages, **sampling)

    monkeypatch.setattr(miniature, "stream", spy)
    converse(miniature, lambda prompt: next(lines), written.append, max_new_tokens=5)
    question, answer = ("user", ["text"]), ("assistant", ["text"])
    shown = ("user", ["image", "text"])
    assert asked == [[shown], [shown, answer, question], [question], [question]]  # the long one left no trace
    text = "".join(written)
    assert "no image" in text and "<image> is read as plain text" in text and "start anew" in text
    assert text.count(chat.HELP) == 2 and next(lines) == "never read"
    assert text.count(NO_IMAGE) == 2, "after /reset"
    assert text.endswith(("(A) red object\n", "(B) blue object\n")) and text.index(NO_IMAGE) < text.rindex("(")


def test_ctrl_c_stops_an_answer_and_keeps_it(tiny):
    lines, written = iter(["what is this ?", "and this ?"]), []

    def read(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    def write(text):
        written.append(text)
        if len(written) == 4:  # in the first answer
            raise KeyboardInterrupt

    tiny.model.generation_config.eos_token_id = None
    converse(tiny, read, write, max_new_tokens=20)
    assert written[4:6] == [" (stopped)", "\n"] and len(written) > 10


def test_one_shot(capsys, tmp_path):
    cli.main(["chat", MINIATURE, SCENE, CLOSER])
    assert capsys.readouterr().out.strip() in ("(A) red object", "(B) blue object")
    (tmp_path / "text.png").write_text("no image")
    for arguments, match in {
        (MINIATURE, str(tmp_path / "text.png"), "what"): "cannot identify image",
        (str(tmp_path / "nothing"), SCENE, "what"): "nothing",
    }.items():
        with pytest.raises(SystemExit, match=match):
            chat.main(arguments)
    with pytest.raises(SystemExit, match="--temperature >= 0"):
        chat.main([MINIATURE, SCENE, "what", "--temperature", "-1"])


def test_what_the_template_refuses_is_said_in_one_line(tiny):
    late = "{% if messages | length > 1 %}{{ raise_exception('one\nquestion only') }}{% endif %}"
    tiny.processor.chat_template = late + tiny.processor.chat_template
    said = [{"type": "text", "text": "what ?"}]
    messages = [{"role": role, "content": said} for role in ("user", "assistant", "user")]
    tiny.inputs(messages[:1])
    with pytest.raises(ValueError, match="the chat template refuses it: one question only"):
        tiny.inputs(messages)
