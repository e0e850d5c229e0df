"""The README and docs/ keep their word: every Python block and every shell block runs, in order, a page in a folder
of its own where the repository's files are linked; runs/ begins with a shrunken study.

A page that is also a notebook (`make pages` writes it, cell by cell the page's blocks) runs as one, in a kernel.

`<!-- not run: REASON -->` in the line before a block leaves it out; `<!-- run with: ola-vlm train --max_steps 2 -->`
adds the options to its lines that begin with those words.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from hub_server import serve
from nbclient import NotebookClient
from packaging.requirements import Requirement

from ola_vlm.miniature import study

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SCRIPT = ROOT / "docs" / "your_images.py"
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>not run|run with): (?P<value>.+?) -->\n)?```(?P<language>.*)\n(?P<text>(?s:.*?))^```$", re.M
)
LANGUAGES = {"python", "sh", "json", "yaml", "text"}  # text: output, and what is no language


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    language: str
    text: str
    not_run: str | None
    options: str


def blocks_of(page: Path) -> list[Block]:
    found = []
    for match in FENCE.finditer(page.read_text()):
        marks = {match["mark"]: match["value"]}
        found.append(Block(match["language"], match["text"], marks.get("not run"), marks.get("run with", "")))
    return found


def to_run(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in ("python", "sh") and not block.not_run]


def shortened(block: Block) -> str:
    """Without comments, and with `block.options` behind the commands that they are for."""
    text = re.sub(r"\s+#.*", "", block.text).replace("\\\n", " ")
    command, separator, options = block.options.partition(" --")
    if not separator:
        return text
    return "\n".join(f"{line} --{options}" if line.startswith(command) else line for line in text.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are(page):
    text = page.read_text()
    assert len(re.findall(r"^```", text, re.M)) == 2 * len(blocks_of(page)), "a fence is open"
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"```{block.language}: choose one of {LANGUAGES}"
        assert block.not_run or not re.search(r"^(make|pip|apt-get) ", block.text, re.M) or block.language != "sh", (
            f"{block.text}: tests install nothing, say why it is not run"
        )
    marks = re.findall(r"<!-- (?:not run|run with):", text)
    assert len(marks) == sum(bool(block.not_run or block.options) for block in blocks_of(page)), "a mark has no block"


def needs_study(page: Path) -> bool:
    return bool(re.search(r"runs/miniature|recipes? miniature_", "".join(block.text for block in to_run(page))))


@pytest.fixture(scope="module")
def study_runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("documents") / "miniature"
    study.main(["--shrunk", "--out", str(out)])
    return out


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A folder where the repository's files are linked, and the environment's commands are found."""
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "build"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if to_run(page) and page.with_suffix(".ipynb") not in NOTEBOOKS], ids=name_of
)
def test_blocks_run(page, request, clone):
    if needs_study(page):
        (clone / "runs" / "miniature").symlink_to(request.getfixturevalue("study_runs"))
    for block in to_run(page):
        command = [sys.executable, "-c", block.text]
        if block.language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", shortened(block)]
        run = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, f"{block.text}\n{run.stdout[-1000:]}\n{run.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_run(path, clone):
    """Every cell in a new kernel; what the page says that a command prints is printed."""
    page = path.with_suffix(".md")
    assert not any(block.options for block in to_run(page)), "a notebook's cells run as they stand"
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs aren't kept"
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": clone}}).execute()
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )
    expected = [block.text.strip() for block in blocks_of(page) if block.language == "text"]
    for text in expected:
        # Figures differ a little with the processor, words don't.
        pattern = r"\s+".join(r"[\d.]+" if re.fullmatch(r"[\d.]+", word) else re.escape(word) for word in text.split())
        assert re.search(pattern, printed), f"{text!r} isn't in\n{printed}"


# The script ---------------------------------------------------------------------------------------------------------
def test_the_scripts_needs_are_the_packages():
    """PEP 723: what `uv run` reads, against pyproject.toml."""
    text = SCRIPT.read_text()
    (block,) = re.findall(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", text, re.M)
    needs = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert needs["requires-python"] == project["requires-python"]
    (requirement,) = [Requirement(needed) for needed in needs["dependencies"]]
    assert requirement.name == project["name"] and requirement.extras <= project["optional-dependencies"].keys()
    for extra in requirement.extras:
        assert any(Requirement(needed).name == "peft" for needed in project["optional-dependencies"][extra])
    # The package is on no index: without its source uv would take whatever has this name there.
    source = needs["tool"]["uv"]["sources"][requirement.name]
    assert (SCRIPT.parent / source["path"]).resolve() == ROOT
    imported = {
        name.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for name in node.names
    } | {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


@pytest.mark.slow
def test_the_script_runs_the_tutorials_commands(clone):
    (drawing,) = [block.text for block in blocks_of(SCRIPT.with_name("tutorial.md")) if block.language == "python"]
    subprocess.run([sys.executable, "-c", drawing], cwd=clone, check=True)
    made = clone / "runs" / "tutorial"
    out = clone / "runs" / "script"
    command = [sys.executable, str(SCRIPT), "--checkpoint", "miniature/weights/ola_vlm", "--out", str(out)]
    command += ["--questions", str(made / "questions.json"), "--image_folder", str(made / "pictures")]
    with serve() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_local",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(clone / "hub_cache"),
        }
        options = {"cwd": clone, "env": environment, "capture_output": True, "text": True}
        fields = ["--data", str(made / "training.json"), "--push_to", "me/drawings", "--lora_rank", "4"]
        run = subprocess.run([*command, *fields, "--max_steps", "2"], **options)
        assert run.returncode == 0, f"{run.stdout[-1000:]}\n{run.stderr[-3000:]}"
        pushed = hub.repos["me/drawings"]["files"]
        assert {"README.md", "config.json", "model.safetensors"} <= pushed.keys()
        mistaken = subprocess.run([*command, "--data", "nowhere.json"], **options)
    assert re.findall(r"^\$ ola-vlm (\S+)", run.stdout, re.M) == [
        "check-data",
        "eval",
        "train",
        "eval",
        "compare",
        "merge",
        "push",
    ]
    assert (out / "merged" / "config.json").exists() and (out / "comparison" / "disagreements.html").exists()
    # The first command that fails ends the script, with its own line.
    assert mistaken.returncode != 0 and "nowhere.json" in mistaken.stderr and "Traceback" not in mistaken.stderr
    assert re.findall(r"^\$ ola-vlm (\S+)", mistaken.stdout, re.M) == ["check-data"]
