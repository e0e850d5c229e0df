"""The house's rules: which room may import which, what the hub files may need, what a checkout may weigh."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ola_vlm.recipes.miniature import METHODS

ROOT = Path(__file__).parents[1]
HUB = ["configuration_ola_vlm", "modeling_ola_vlm", "processing_ola_vlm"]
# Files that travel with a checkpoint: the hub files, and the baselines' own ones.
TRAVELLERS = [HUB, [f"baselines.{kind}_multi_encoder" for kind in ("configuration", "modeling", "processing")]]
# A room imports from its own level and the levels before it.
LEVELS = [
    [*HUB, "files", "targets", "world", "commands.parsing", "commands.running", "commands.table"],
    ["training", "baselines"],
    ["recipes", "inference"],
    ["probing"],
    ["eval", "convert", "space"],
    ["commands"],  # each command's arguments; the work is found by name when it is called
    ["train", "recipes.check_data", "recipes.fill_targets"],
    ["miniature"],
    ["cli"],
    ["ola_vlm"],  # the package's own __init__: the public names
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def level_of(name: str) -> int:
    """A module's own level, if it has one; else its room's."""
    return LEVEL[name] if name in LEVEL else LEVEL[name.split(".")[0]]


ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
FILES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
MEGABYTE = 2**20


def name_of(path: Path) -> str:
    """`training/losses.py` -> "training.losses", `eval/__init__.py` -> "eval"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "ola_vlm"


TREES = {name_of(path): ast.parse(path.read_text()) for path in FILES}


def imports(name: str) -> list[tuple[str, ast.AST]]:
    """(absolute module, node) for every import of a file, in functions too; our own modules start with "ola_vlm."."""
    if name == "ola_vlm":
        package = ["ola_vlm"]
    elif (ROOT / name.replace(".", "/") / "__init__.py").exists():
        package = ["ola_vlm", *name.split(".")]
    else:
        package = ["ola_vlm", *name.split(".")[:-1]]
    found = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import losses` and `from ola_vlm import train` import modules, not names
            names = [f"{module}.{alias.name}" for alias in node.names]
            own = [full for full in names if full.removeprefix("ola_vlm.") in TREES]
            found += [(full, node) for full in own or [module]]
    return found


def own_imports(name: str) -> set[str]:
    own = {module.removeprefix("ola_vlm.") for module, _ in imports(name) if module.startswith("ola_vlm.")}
    assert own <= TREES.keys(), f"{name} imports {own - TREES.keys()}, which does not exist"
    return own


def test_every_file_has_its_place():
    assert {name.split(".")[0] for name in TREES} <= LEVEL.keys()


@pytest.mark.parametrize(("name", "company"), [(name, company) for company in TRAVELLERS for name in company])
def test_hub_files_travel_alone(name, company):
    siblings = {other.rpartition(".")[2] for other in company}
    for module, node in imports(name):
        if module.startswith("ola_vlm"):
            # save_pretrained copies `from .sibling import x` only, from the same folder
            assert isinstance(node, ast.ImportFrom) and node.level == 1 and node.module in siblings, ast.unparse(node)
        else:
            # huggingface_hub comes with transformers, whose configs take `strict` from it
            allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
            assert module.split(".")[0] in allowed, f"{name} imports {module}"


@pytest.mark.parametrize("name", TREES)
def test_arrows_point_one_way(name):
    own_level = level_of(name)
    for other in own_imports(name):
        assert level_of(other) <= own_level, f"{name} imports {other}, which lies above it"


def test_no_import_cycles():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"import cycle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name not in done:
            open_.append(name)
            for other in own_imports(name):
                visit(other)
            open_.pop()
            done.add(name)

    for name in TREES:
        visit(name)


def test_diffusers_is_imported_in_one_file_and_lazily():
    importers = [
        (name, node) for name in TREES for module, node in imports(name) if module.split(".")[0] == "diffusers"
    ]
    assert len({name for name, _ in importers}) <= 1
    for name, node in importers:
        assert node not in TREES[name].body, f"{name} imports diffusers on import"


def test_importing_the_hub_files_imports_no_heavy_library():
    program = f"import sys, {', '.join(f'ola_vlm.{name}' for name in HUB)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"diffusers", "gradio", "trl", "datasets"} & set(run.stdout.split())


@pytest.mark.parametrize("name", TREES)
def test_no_bare_except_and_no_print_outside_the_commands(name):
    tree = TREES[name]
    commands = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "main"]
    speaking = (
        [tree]
        if name in {"cli", "train", "commands.running", "commands.fields"} or name.startswith("miniature")
        else commands
    )
    may_print = {node for part in speaking for node in ast.walk(part)}
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{name}:{node.lineno} bare except"
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not is_print or node in may_print, f"{name}:{node.lineno} prints; use a logger"


def test_the_root_is_the_package():
    """Every room is installed; a conftest.py in the root would land in the wheel."""
    assert not (ROOT / "conftest.py").exists()
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    expected = {"ola_vlm": ".", **{f"ola_vlm.{room}": room for room in ROOMS}}
    assert setuptools["package-dir"] == expected
    assert sorted(setuptools["packages"]) == sorted(expected)


def weight(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_a_checkout_weighs():
    assert weight(ROOT / "tests" / "golden") <= 12 * MEGABYTE
    shipped = {path.name: weight(path) for path in (ROOT / "miniature" / "weights").glob("*")}
    models = [shipped.pop(name, 0) for name in METHODS]
    assert min(models) > 0 and max(models) <= 8 * MEGABYTE
    assert sum(shipped.values()) <= 15 * MEGABYTE
