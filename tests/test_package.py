"""The package as others get it: a wheel, in a folder of its own, used from an empty one."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ola_vlm import cli
from ola_vlm.commands.parsing import shipped
from ola_vlm.eval.reading import parse_choice
from ola_vlm.recipes import show

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NOT_SHIPPED = ("tests", "benchmarks", "docs", "build", "runs", "layers", "ola_vlm.egg-info")
CLOSER = "which object is closer to the camera ? (A) red object (B) blue object"


def test_the_packages_own_files_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["chat", "miniature/weights/ola_vlm", "docs/scene.png", CLOSER])
    assert parse_choice(capsys.readouterr().out, ["red object", "blue object"])
    assert shipped("miniature/weights/nothing") == "miniature/weights/nothing"
    assert shipped("recipes/paper.py") == "recipes/paper.py"  # what nobody gives to a command
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "scene.png").touch()
    assert shipped("docs/scene.png") == "docs/scene.png"  # one's own comes first


def test_the_papers_commands_are_true_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert " recipes/accelerate/fsdp2.yaml " in show.start_command("llama3_vit_finetune")
    monkeypatch.chdir(tmp_path)
    words = show.start_command("llama3_vit_finetune").split()
    assert Path(words[words.index("--config_file") + 1]).is_file()
    assert words[-4:] == ["-m", "ola_vlm.train", "--recipe", "llama3_vit_finetune"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy, since building writes into the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "tests", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"]
    build = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(folder / "source")]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_every_room_and_its_files(wheel):
    names = {name.removeprefix("ola_vlm/") for name in zipfile.ZipFile(wheel).namelist()}
    expected = set()
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        is_hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        in_the_root = len(parts) == 1 and path.suffix != ".py"
        if path.is_file() and not is_hidden and not in_the_root and parts[0] not in NOT_SHIPPED:
            expected.add(path.relative_to(ROOT).as_posix())
    assert expected <= names, sorted(expected - names)
    assert {"py.typed", "docs/scene.png", "recipes/accelerate/fsdp2.yaml", "space/page.css"} <= names
    assert {"convert/model_card.md", "eval/disagreements_page.html", "probing/layers_page.html"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


@pytest.mark.slow
def test_the_readme_works_in_an_empty_folder(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", "-q"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True, capture_output=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{site / 'bin'}{os.pathsep}{environment['PATH']}"
    options = {"cwd": empty, "env": environment, "capture_output": True, "text": True}

    where = subprocess.run([sys.executable, "-c", "import ola_vlm; print(ola_vlm.__file__)"], **options)
    assert Path(where.stdout.strip()).parent == site / "ola_vlm"
    (asked,) = re.findall(r"^ola-vlm chat .*$", README, re.M)
    chat = subprocess.run(["bash", "-c", asked], **options)
    assert parse_choice(chat.stdout, ["red object", "blue object"]), chat.stderr
    # The snippet's paths begin at the package; transformers knows of no other folder.
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (checkpoint,) = re.findall(r"miniature/weights/\w+", example)
    for path in (checkpoint, "docs/scene.png"):
        assert path in example
        example = example.replace(path, str(site / "ola_vlm" / path))
    snippet = subprocess.run([sys.executable, "-c", example], **options)
    assert parse_choice(snippet.stdout, ["red object", "blue object"]), snippet.stderr
    assert list(empty.iterdir()) == []
