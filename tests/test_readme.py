"""The README keeps its word: its example runs, its tree is the tree; so do the other files in the root."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

import ola_vlm
from ola_vlm.eval.reading import parse_choice

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_answers():
    """In a fresh process that cannot import the package: the checkpoint brings its own code."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    forget = "import sys; sys.modules['ola_vlm'] = None\n"
    run = subprocess.run([sys.executable, "-c", forget + example], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert parse_choice(run.stdout, ["red object", "blue object"]), f"no answer in {run.stdout!r}"


def test_the_tree_is_the_tree():
    house = README.split("## The house")[1].split("```text")[1].split("```")[0]
    named = {line.split()[0].rstrip("/") for line in house.strip().splitlines()}
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {path.name for path in ROOT.glob("*.py")}
    assert named == rooms | {"docs", "space", "tests"}


def test_the_numbers_prose_says_what_its_tables_say():
    """Figures with a decimal point; the tables are docs/results' (tests/test_pages.py)."""
    section = README.split("## The miniature's numbers")[1].split("\n## ")[0]
    prose, generated = split_generated(section)
    assert "| LLaVA |" in generated
    machine = json.loads((ROOT / "docs" / "results" / "miniature.json").read_text())["machine"]
    for figure in re.findall(r"\d+\.\d+", prose):
        assert figure in generated or figure in machine, f"{figure} stands in no table"


def test_the_studys_prose_says_what_its_report_says():
    """Figures with a decimal point, as whole numbers: the report, and the tables of its page and of README's."""
    page = (ROOT / "docs" / "STUDY.md").read_text()
    prose, _ = split_generated(page.split("\n## Results\n")[1])
    tables = (ROOT / "docs" / "study" / "report.md").read_text()
    tables += split_generated(page)[1] + split_generated(README)[1]
    known = set(re.findall(r"\d+\.\d+", tables))
    figures = re.findall(r"\d+\.\d+", prose)
    assert len(figures) > 100
    for figure in figures:
        assert figure in known, f"{figure} stands in no table"


def split_generated(text: str) -> tuple[str, str]:
    """What is written by hand, and what docs/dev/write_pages.py writes (tests/test_pages.py)."""
    mark = r"<!-- begin.*?<!-- end"
    return re.sub(mark, "", text, flags=re.S), "".join(re.findall(mark, text, re.S))


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
            if link.startswith("https://"):
                continue
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or page.name in index, f"docs/README.md doesn't say what is in {page.name}"


def test_architecture_names_what_exists():
    """Every `module.name` in the index is a file and a name in it; every bare name stands somewhere in the code."""
    index = (ROOT / "docs" / "architecture.md").read_text()
    sources = {path: path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]}
    everything = "\n".join(text for path, text in sources.items() if path.parent.name != "tests")
    for name in re.findall(r"`([A-Za-z_.]+)(?:\[[^`]*)?`", index):
        parts = name.split(".")
        files = [ROOT.joinpath(*parts[:depth]).with_suffix(".py") for depth in range(1, len(parts))]
        text = next((file.read_text() for file in files if file.is_file()), everything)
        missing = [part for part in parts if not re.search(rf"\b{part}\b", text + "".join(map(str, files)))]
        assert not missing, f"{name}: {missing}"


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == ola_vlm.__version__ == citation["version"]
    assert f"## {ola_vlm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_agents_names_what_exists():
    """Every path in AGENTS.md's tables is there; in a cell of several, later files stand in the first one's folder."""
    for row in re.findall(r"^\| (?!looking|---)(.*) \|$", (ROOT / "AGENTS.md").read_text(), re.M):
        for cell in row.split(" | ")[1:]:
            folder = ROOT
            for name in re.findall(r"`([^`]+)`", cell):
                path = ROOT / name if "/" in name else folder / name
                assert path.exists(), f"AGENTS.md: {name}"
                folder = path.parent


def test_issue_templates_ask_what_they_should():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert form["name"] and form["description"], path
        fields = [field["id"] for field in form["body"]]
        assert len(fields) == len(set(fields)), path
        assert any(field.get("validations", {}).get("required") for field in form["body"]), path
