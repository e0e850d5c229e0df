"""The generated parts of docs/ are what docs/dev/write_pages.py writes."""

import importlib.util
import json
from pathlib import Path

import nbformat
import pytest
from test_objective_study import made_up

import ola_vlm
from ola_vlm import cli
from ola_vlm.miniature import objective_results
from ola_vlm.recipes.miniature import METHODS

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("write_pages", ROOT / "docs" / "dev" / "write_pages.py")
write_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_pages)


def test_pages_are_current():
    pages = write_pages.pages()
    names = {path.name for path in pages}
    assert {"api.md", "miniature.md", "tutorial.ipynb", "README.md", "evaluation.md", "performance.md"} <= names
    for path, text in pages.items():
        assert write_pages.is_current(path, text), f"{path.name}: run python docs/dev/write_pages.py"


def test_a_page_that_says_something_else_is_named(tmp_path, monkeypatch, capsys):
    """`make report` ends with status 1, and writes nothing."""
    page = tmp_path / "README.md"
    page.write_text(write_pages.README.read_text().replace("| LLaVA | 7", "| LLaVA | 8"))
    changed = page.read_text()
    assert changed != write_pages.README.read_text()
    monkeypatch.setattr(write_pages, "ROOT", tmp_path)
    monkeypatch.setattr(write_pages, "README", page)
    monkeypatch.setattr(write_pages, "pages", lambda: {page: write_pages.readme()})
    monkeypatch.setattr("sys.argv", ["write_pages.py", "--check"])
    with pytest.raises(SystemExit, match=r"^README.md: not what the code and docs/results say"):
        write_pages.main()
    assert page.read_text() == changed
    monkeypatch.setattr("sys.argv", ["write_pages.py"])
    # Nor is what is current written again: this wrote the study's report, in other last digits.
    monkeypatch.setattr(write_pages, "write_report", lambda *_: pytest.fail("the study's report was current"))
    write_pages.main()
    assert page.read_text() == (ROOT / "README.md").read_text()
    monkeypatch.setattr("sys.argv", ["write_pages.py", "--check"])
    write_pages.main()
    assert "1 pages are current" in capsys.readouterr().out


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


def test_a_page_that_lost_a_mark_is_no_current_page():
    """Else what it says would never be written again."""
    page = "a\n<!-- begin: x (generated) -->\nold\n<!-- end: x -->\nb\n<!-- begin: xy -->\n1\n<!-- end: xy -->\n"
    assert write_pages.replace_part(page, "x", r"n\1w") == page.replace("old", r"n\1w")
    for lost in (page.replace("<!-- end: x -->\n", ""), page.replace("<!-- begin: x ", "<!-- x "), page + page):
        with pytest.raises(LookupError, match="parts called x"):
            write_pages.replace_part(lost, "x", "new")


def test_a_public_name_has_a_docstring_and_a_place(tmp_path, monkeypatch):
    (tmp_path / "shown.py").write_text("def told(images: list, *, size: int = 3) -> str:\n    return ''\n")
    monkeypatch.setattr(write_pages, "ROOT", tmp_path)
    monkeypatch.setattr(ola_vlm, "_MODULES", {"told": ".shown"})
    with pytest.raises(LookupError, match=r"shown\.py: told is public and has no docstring"):
        write_pages.describe("told")
    (tmp_path / "shown.py").write_text('def told(images: list, *, size: int = 3) -> str:\n    """Tells."""\n')
    expected = "### told\n\n`shown.py`\n\n```text\ntold(images: list, *, size: int=3) -> str\n```\n\nTells.\n"
    assert write_pages.describe("told") == expected
    monkeypatch.setattr(ola_vlm, "__all__", [*ola_vlm.__all__, "told"])
    with pytest.raises(LookupError, match=r"GROUPS .* differ in \['told'\]"):
        write_pages.api_page()


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


def test_a_page_becomes_a_notebook_whose_cells_are_its_blocks():
    page = """# Title

Before.

```python
x = 1
```

## Shell

```sh
echo a
```

```text
a
```

<!-- not run: it installs -->
```sh
make install
```
"""
    made = nbformat.reads(write_pages.notebook(page), as_version=4)
    nbformat.validate(made)
    code = [cell["source"] for cell in made["cells"] if cell["cell_type"] == "code"]
    assert code == [write_pages.NOTEBOOK_START, "x = 1", "%%bash -eu\necho a"]
    text = [cell["source"] for cell in made["cells"] if cell["cell_type"] == "markdown"]
    assert text[:2] == ["# Title\n\nBefore.", "## Shell"]
    assert text[2].startswith("```text\na") and "make install" in text[2]
    assert made["cells"][0]["cell_type"] == "markdown"


def test_the_studys_report_is_made_of_its_packed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(write_pages, "STUDY", tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"settings": {}, "scores": {}}))
    # Nothing was run beside these.
    monkeypatch.setattr(write_pages, "exploration_tables", dict)
    shown = dict.fromkeys(write_pages.SHOWN_ARMS, 0)
    objective_results.pack(made_up({**shown, "words": 5}, seeds=2), tmp_path)
    report = tmp_path / "report.md"
    made = write_pages.pages()
    text = made[report]
    assert "| words - llava |" in text
    monkeypatch.setattr(write_pages, "ROOT", tmp_path.parent)
    of_study = {path: made[path] for path in (report, tmp_path / "report.json")}
    monkeypatch.setattr(write_pages, "pages", lambda: of_study)
    monkeypatch.setattr("sys.argv", ["write_pages.py"])
    write_pages.main()
    assert report.read_text() == text and (tmp_path / "accuracy.png").exists()

    # --check names whatever differs, and writes nothing.
    monkeypatch.setattr("sys.argv", ["write_pages.py", "--check"])
    numbers = json.loads(of_study[tmp_path / "report.json"])
    numbers["trials"] += 1

    def contents():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}

    before = contents()
    write_pages.main()
    assert contents() == before
    for name, other in (
        ("report.md", text.replace("words - llava", "llava - words")),
        ("report.json", json.dumps(numbers)),
        ("accuracy.png", None),
    ):
        whole = (tmp_path / name).read_bytes()
        if other is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(other)
        before = contents()
        with pytest.raises(SystemExit, match=r"report\.json:" if name == "report.json" else r"report\.md:"):
            write_pages.main()
        assert contents() == before
        (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("folder", "changed"),
    [
        ("longer", {"finetune.max_steps", "finetune.learning_rate", "patience"}),
        ("faster", {"finetune.learning_rate"}),
        ("swapped", {"pretrain.learning_rate", "finetune.learning_rate"}),
    ],
)
def test_what_was_run_beside_the_study_differs_in_what_its_page_says(folder, changed):
    confirmed = objective_results.read_results(write_pages.STUDY)
    for key, result in objective_results.read_results(write_pages.STUDY / folder).items():
        own, other = result["identity"], confirmed[key]["identity"]
        differing = {name for name in own.keys() | other.keys() if own.get(name) != other.get(name)}
        assert differing and differing <= changed, key


def test_numbers_that_another_processor_rounds_otherwise_are_the_same():
    stored = {"a": [0.1 + 0.2, 3, None, "x"], "b": float("nan")}
    assert write_pages.same_content(stored, {"b": float("nan"), "a": [0.3, 3, None, "x"]})
    for other in ({"a": [0.30001, 3, None, "x"]}, {"a": [0.3, 3, None]}, {"a": [0.3, True, None, "x"]}, {"a": 1}, {}):
        assert not write_pages.same_content({"a": stored["a"]}, other)


def test_chosen_settings_are_shown_with_the_score_that_chose_them(tmp_path, monkeypatch):
    monkeypatch.setattr(write_pages, "STUDY", tmp_path)
    llava = {"pretrain_lr": 3e-4, "weight": 1.0, "finetune_lr_few": 1e-3, "finetune_lr_many": 1e-3}
    tried = {
        "pretrain_lr": {"0.0003": 0.5, "0.001": 0.4},
        "finetune_lr_few": {"0.0003": 0.6, "0.001": 0.625},
        "finetune_lr_many": {"0.0003": 0.7, "0.001": 0.75},
    }
    tuned = {"settings": {"llava": llava}, "scores": {"llava": tried}}
    (tmp_path / "settings.json").write_text(json.dumps(tuned))
    # An end of the grid is marked, but where the grid has no other values.
    assert write_pages.settings_table()[-1] == "| `llava` | 0.0003 (50.0, edge) |  | 0.001 (62.5) | 0.001 (75.0) |"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_stored_scores_are_the_shipped_checkpoints(name, tmp_path, monkeypatch):
    """Other weights or other questions, and README would quote what nobody can see again. Processors round otherwise,
    which decides a near tie between two letters here and there."""
    monkeypatch.chdir(tmp_path)
    cli.main(["eval", str(ROOT / "miniature" / "weights" / name), "--benchmark", "miniature", "--out", "out"])
    found = json.loads(Path("out/results.json").read_text())
    stored = write_pages.read_stored(f"shipped/{name}/results.json")
    assert found["run"]["revision"] == stored["run"]["revision"]
    assert found["scores"]["overall"]["score"] == pytest.approx(stored["scores"]["overall"]["score"], abs=0.005)
