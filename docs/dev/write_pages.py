"""The generated parts of docs/: `python docs/dev/write_pages.py` writes them, tests/test_pages.py compares them.

docs/api.md: the public names of `ola_vlm`, from their docstrings. docs/miniature.md, "What it asks": the miniature's
kinds of questions, from the world's own language.
"""

import ast
import inspect
import re
from pathlib import Path

import numpy as np

import ola_vlm
from ola_vlm.world import language, render

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api.md"
MINIATURE = ROOT / "docs" / "miniature.md"
GROUPS = {
    "Model": ["OlaVlmConfig", "OlaVlmForConditionalGeneration", "OlaVlmProcessor"],
    "Building and loading": ["build_ola_vlm", "load_checkpoint", "attach_predictors"],
    "Training": ["OlaVlmTrainer", "OlaVlmCollator", "embedding_loss"],
    "Probing": ["load_probes"],
}
API_HEAD = """# Python API

Written by `python docs/dev/write_pages.py` from the docstrings: don't edit it here. Everything below is imported as
`from ola_vlm import NAME`, and loaded when it is first used; `ola_vlm.__version__` is the version. What isn't on this
page may change without notice.
"""
# Methods that differ from those of transformers in what they take or give.
METHODS = {"OlaVlmForConditionalGeneration": ["forward"]}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef


# ------------------------------------------------------------------------------------------------------------ docs/api
def public_names() -> list[str]:
    return [name for name in ola_vlm.__all__ if not name.startswith("_")]


def find_definition(name: str) -> tuple[str, ast.ClassDef | Function]:
    """The file that defines a public name, from the root, and its node. Read, not imported: torch isn't needed."""
    file = ola_vlm._MODULES[name].lstrip(".").replace(".", "/") + ".py"
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and node.name == name:
            return file, node
    raise LookupError(f"{file} doesn't define {name}")


def signature(name: str, function: Function) -> str:
    """As it is called: without self or cls; one parameter a line where it would be too long."""
    arguments = function.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args = arguments.args[1:]
    returns = f" -> {ast.unparse(function.returns)}" if function.returns is not None else ""
    line = f"{name}({ast.unparse(arguments)}){returns}"
    if len(line) <= 100:
        return line
    parts = []
    for parameter in split_parameters(ast.unparse(arguments)):
        parts.append(f"    {parameter},\n")
    return f"{name}(\n{''.join(parts)}){returns}"


def split_parameters(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts = [""]
    depth = 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def as_markdown(docstring: str) -> str:
    """Google's sections become lists: `Args:` with entries `name: text`, `Returns...:` with a text."""
    lines = []
    in_section = False
    for line in inspect.cleandoc(docstring).splitlines():
        section = re.fullmatch(r"(Args|Raises|Attributes):", line)
        entry = re.match(r" {4}(\w+): (.*)", line)
        if section:
            in_section = True
            lines += [f"**{section[1]}**", ""]
        elif in_section and entry:
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif in_section and line.startswith(" "):
            lines.append("  " + line.strip())
        else:
            in_section = False
            lines.append(line)
    return "\n".join(lines)


def describe(name: str) -> str:
    file, node = find_definition(name)
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None:
        raise LookupError(f"{file}: {name} is public and has no docstring")
    methods: dict[str, Function] = {}
    if isinstance(node, ast.ClassDef):
        methods = {part.name: part for part in node.body if isinstance(part, FUNCTION)}
        called = methods.get("__init__")
    else:
        called = node
    text = f"### {name}\n\n`{file}`\n\n"
    if called is not None:
        text += f"```text\n{signature(name, called)}\n```\n\n"
    text += as_markdown(docstring) + "\n"
    for method in METHODS.get(name, []):
        docstring = ast.get_docstring(methods[method], clean=False)
        text += f"\n#### {name}.{method}\n\n```text\n{signature(method, methods[method])}\n```\n\n"
        text += as_markdown(docstring or "") + "\n"
    return text


def api_page() -> str:
    listed = [name for names in GROUPS.values() for name in names]
    missing = set(public_names()) ^ set(listed)
    if missing:
        raise LookupError(f"GROUPS in {Path(__file__).name} and the public names differ in {sorted(missing)}")
    parts = [API_HEAD]
    for group, names in GROUPS.items():
        parts.append(f"## {group}\n")
        parts += [describe(name) for name in names]
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------------------ docs/miniature
def example_questions() -> dict[str, dict]:
    """Task -> a question of the first test scene that has one of each task."""
    scenes = render.sample_scenes(50, seed=104)
    for i in range(len(scenes)):
        by_task = {}
        for question in language.questions(scenes, i):
            by_task.setdefault(question["task"], question)
        if by_task.keys() == set(language.TASKS):
            return by_task
    raise LookupError("no scene has a question of each task")


def questions_section() -> str:
    about = {
        "count": "how many objects of a shape there are, 0 to 3",
        "relation": "where one of the red, blue and green objects is with respect to another, in the image",
        "depth": "which of two is closer to the camera",
        "distance": "which of two is closer to a third, in space",
    }
    lines = [
        "Four kinds of questions, as CV-Bench has them. Every scene has a red, a blue and a green object, of which",
        f"relation, depth and distance ask. The colors are {', '.join(render.COLORS)}, the shapes",
        f"{', '.join(render.SHAPES)}. Write questions as they stand here: in lower case, with spaces around",
        "punctuation and the options in this order. The answer is a letter.",
        "",
        "| kind | asks | example | answer | chance |",
        "|---|---|---|---|---|",
    ]
    for task, question in example_questions().items():
        chance = f"{language.CHANCE[task]:.0%}"
        lines.append(f"| {task} | {about[task]} | `{question['question']}` | {question['answer']} | {chance} |")
    scenes = render.sample_scenes(1, seed=104)
    caption = language.caption(scenes, 0, np.random.default_rng(0))
    fetched = {question["task"]: question for question in language.fetch_questions(scenes, 0)}
    lines += [
        "",
        "Training also has captions and questions that look something up:",
        "",
        "| kind | example | answer |",
        "|---|---|---|",
        f"| caption (PT) | `describe the image .` | {caption} |",
    ]
    for task in ("locate", "shape"):
        lines.append(f"| {task} (IFT) | `{fetched[task]['question']}` | {fetched[task]['answer']} |")
    lines += [
        "",
        f"`x0` to `x{language.BINS - 1}` are columns from the left, `y0` to `y{language.BINS - 1}` rows from the top.",
    ]
    return "\n".join(lines)


def replace_part(page: str, name: str, content: str) -> str:
    """The page with what stands between the comments `begin: NAME...` and `end: NAME` replaced."""
    pattern = rf"(<!-- begin: {name}\b[^\n]*-->\n).*?(<!-- end: {name} -->)"
    replaced, count = re.subn(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", page, flags=re.S)
    if count != 1:
        raise LookupError(f"the page has {count} parts called {name}")
    return replaced


def pages() -> dict[Path, str]:
    """Every page that has generated parts, as it should be."""
    return {API: api_page(), MINIATURE: replace_part(MINIATURE.read_text(), "questions", questions_section())}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
