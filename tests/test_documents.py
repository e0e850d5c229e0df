"""The README and docs/ keep their word: every Python block and every shell block runs, in order, a page in a folder
of its own where the repository's files are linked; runs/ begins with a shrunken study.

`<!-- not run: REASON -->` in the line before a block leaves it out; `<!-- run with: ola-vlm train --max_steps 2 -->`
adds the options to its lines that begin with those words.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ola_vlm.miniature import study

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
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


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=name_of)
def test_blocks_run(page, request, tmp_path):
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "build"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "runs").mkdir()
    if needs_study(page):
        (tmp_path / "runs" / "miniature").symlink_to(request.getfixturevalue("study_runs"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for block in to_run(page):
        command = [sys.executable, "-c", block.text]
        if block.language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", shortened(block)]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, f"{block.text}\n{run.stdout[-1000:]}\n{run.stderr[-3000:]}"
