"""The generated parts of docs/ are what docs/dev/write_pages.py writes."""

import importlib.util
from pathlib import Path

import pytest

import ola_vlm

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("write_pages", ROOT / "docs" / "dev" / "write_pages.py")
write_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_pages)


@pytest.mark.parametrize("name", ["api.md", "miniature.md"])
def test_pages_are_current(name):
    (text,) = [text for path, text in write_pages.pages().items() if path.name == name]
    assert (ROOT / "docs" / name).read_text() == text, "run: python docs/dev/write_pages.py"


def test_api_page_has_the_public_names_and_no_other():
    headings = [line[4:] for line in write_pages.api_page().splitlines() if line.startswith("### ")]
    assert sorted(headings) == sorted(write_pages.public_names())
    for name in headings:
        assert getattr(ola_vlm, name).__name__ == name


def test_example_questions_are_the_worlds_and_show_each_kind():
    examples = write_pages.example_questions()
    assert examples.keys() == set(write_pages.language.TASKS)
    for question in examples.values():
        assert question["answer"] in question["question"]


def test_google_sections_become_lists():
    docstring = """Says.

    Args:
        images: N of them,
            in order.
        size: pixels.

    Returns of a call: all."""
    assert write_pages.as_markdown(docstring).splitlines() == [
        "Says.", "", "**Args**", "", "- `images`: N of them,", "  in order.", "- `size`: pixels.", "",
        "Returns of a call: all.",
    ]  # fmt: skip
    assert write_pages.split_parameters("a: dict[str, int] = {}, *b, c=(1, 2)") == [
        "a: dict[str, int] = {}",
        "*b",
        "c=(1, 2)",
    ]
