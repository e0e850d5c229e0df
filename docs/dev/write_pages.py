"""The generated parts of README.md and docs/: `python docs/dev/write_pages.py` (`make pages`) writes them. With
--check (`make report`) it compares them, and ends with status 1 if one differs; so does tests/test_pages.py.

docs/api.md: the public names of `ola_vlm`, from their docstrings. docs/miniature.md, "What it asks": the miniature's
kinds of questions, from the world's own language. docs/tutorial.ipynb: docs/tutorial.md as a notebook.
README.md, docs/evaluation.md, docs/performance.md, docs/smollm2.md, docs/STUDY.md: figures of what docs/results
holds, which commands wrote (docs/results/README.md); in docs/STUDY.md also the settings that tuning chose, the
confirming runs' accuracies and comparisons, some of which README.md shows, too, and what was run beside them.
docs/study: the report of the results that are packed there, its numbers and its figures. (Figures are not compared, as
matplotlib's versions draw a little differently: they are drawn anew with a report that differs, or if one is missing.)
"""

import argparse
import ast
import inspect
import json
import math
import re
import sys
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import ola_vlm
from ola_vlm.eval.compare import comparison_table
from ola_vlm.eval.scoring import table
from ola_vlm.miniature import placement, smollm2_report
from ola_vlm.miniature.explorations import longer_lines, swapped_lines
from ola_vlm.miniature.objective_numbers import collect
from ola_vlm.miniature.objective_report import (
    GLANCE,
    accuracy_lines,
    arm_label,
    glance_lines,
    labels_lines,
    numbers_text,
    report_text,
    write_report,
)
from ola_vlm.miniature.objective_results import read_results
from ola_vlm.miniature.report import summary_tables
from ola_vlm.miniature.report import table as markdown_table
from ola_vlm.probing import figures
from ola_vlm.recipes import miniature as recipe
from ola_vlm.recipes import study as design
from ola_vlm.world import language, render

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api.md"
MINIATURE = ROOT / "docs" / "miniature.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
README = ROOT / "README.md"
EVALUATION = ROOT / "docs" / "evaluation.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
SMOLLM2 = ROOT / "docs" / "smollm2.md"
RESULTS = ROOT / "docs" / "results"
PROTOCOL = ROOT / "docs" / "STUDY.md"
STUDY = ROOT / "docs" / "study"
# What README shows of the study: the arms and the comparisons that its text speaks of.
SHOWN_ARMS = ("llava", "ola_vlm", "ola_vlm_shuffled", "words", "words_shuffled", "moments")
SHOWN_PAIRS = (("ola_vlm", "llava"), ("words", "llava"), ("words", "words_shuffled"))
# Whose saved labels docs/STUDY.md shows.
LABELED_ARMS = ("words", "words_shuffled", "moments", "ola_vlm")
# docs/api.md's headings and the names beneath them: all public names, which `api_page` checks.
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
    # ".training.losses" is "training/losses.py": the root folder is the package.
    file = ola_vlm._MODULES[name].lstrip(".").replace(".", "/") + ".py"
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and node.name == name:
            return file, node
    raise LookupError(f"{file} doesn't define {name}")


def signature(name: str, function: Function) -> str:
    """As it is called: without self or cls; one parameter a line where it would be too long."""
    arguments = function.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        # The node was parsed for this page alone: it may be changed.
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
        # A section's heading, and one of its entries, such as `    images: N of them`.
        section = re.fullmatch(r"(Args|Raises|Attributes):", line)
        entry = re.match(r" {4}(\w+): (.*)", line)
        if section:
            in_section = True
            lines += [f"**{section[1]}**", ""]
        elif in_section and entry:
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif in_section and line.startswith(" "):
            # What goes on with an entry stays in its list item.
            lines.append("  " + line.strip())
        else:
            # All else, an empty line too, ends the section.
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
    listed = list(chain.from_iterable(GROUPS.values()))
    # In both directions: names without a place here, and places of names that are gone.
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
    # The seed of the world's test scenes (`world.dataset.SEEDS`).
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
    # A function, not a text: a backslash in the content would be read as a reference to a group.
    replaced, count = re.subn(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", page, flags=re.S)
    if count != 1:
        raise LookupError(f"the page has {count} parts called {name}")
    return replaced


# ------------------------------------------------------------------------------------------------------- docs/tutorial
# What a shell has and a notebook's kernel hasn't: the repository's folder, and the commands of its environment.
NOTEBOOK_START = """import os
import sys
from pathlib import Path

here = Path.cwd()
os.chdir(next(folder for folder in (here, *here.parents) if (folder / "docs" / "tutorial.ipynb").is_file()))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])"""
# A block to run, with the mark before it that says when it isn't; other fences stay in the text.
RUN_BLOCK = re.compile(
    r"^(?P<not_run><!-- not run: [^\n]*-->\n)?```(?P<language>python|sh)\n(?P<code>.*?)\n```$", flags=re.M | re.S
)


def notebook(page: str) -> str:
    """A page as a Jupyter notebook without outputs: blocks become cells that run, a shell's stop at a mistake."""
    cells = [new_code_cell(NOTEBOOK_START)]
    end_of_last = 0
    for block in RUN_BLOCK.finditer(page):
        if block["not_run"]:
            continue
        cells += text_cells(page[end_of_last : block.start()])
        # -eu: as a cell of Python, one of a shell fails at its first mistake and at a variable that isn't set.
        first_line = "%%bash -eu\n" if block["language"] == "sh" else ""
        cells.append(new_code_cell(first_line + block["code"]))
        end_of_last = block.end()
    cells += text_cells(page[end_of_last:])
    # The page begins with its title: the cell that looks for the repository's folder comes beneath.
    cells.insert(1, cells.pop(0))
    for number, cell in enumerate(cells):
        # nbformat draws ids at random: numbered, the same page is the same file.
        cell["id"] = f"cell-{number}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.writes(new_notebook(cells=cells, metadata=kernel)) + "\n"


def text_cells(text: str) -> list[nbformat.NotebookNode]:
    """One for each section."""
    sections = re.split(r"^(?=## )", text, flags=re.M)
    return [new_markdown_cell(section.strip()) for section in sections if section.strip()]


# ------------------------------------------------------------------------------------------------------ docs/results
def read_stored(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def shipped_sentence() -> str:
    """What the shipped checkpoints answer, as `ola-vlm eval` stored it."""
    scores = []
    for name in recipe.METHODS:
        score = 100 * read_stored(f"shipped/{name}/results.json")["scores"]["overall"]["score"]
        scores.append(f"{figures.METHODS[name][0]} {score:.1f}")
    return f"The shipped checkpoints are seed 0: {', '.join(scores)}."


def readme() -> str:
    page = replace_part(README.read_text(), "miniature", summary_tables(read_stored("miniature.json")))
    page = replace_part(page, "shipped", shipped_sentence())
    return replace_part(page, "study", "\n".join(shown_lines()))


def shown_lines() -> list[str]:
    """README's tables of the study."""
    numbers = study_numbers(STUDY)
    accuracy = {arm_label(arm): numbers["accuracy"][arm] for arm in SHOWN_ARMS}
    families = {}
    for family, rows in numbers["comparisons"].items():
        shown = [row for row in rows if (row["arm"], row["other"]) in SHOWN_PAIRS]
        # By the names of the table above.
        families[family] = [{**row, "arm": arm_label(row["arm"]), "other": arm_label(row["other"])} for row in shown]
    return [*accuracy_lines(accuracy), "", GLANCE, "", *glance_lines(families)]


@cache
def study_numbers(folder: Path) -> dict:
    """What the report is made of: several pages show parts of it."""
    return collect(read_results(folder))


def evaluation_page() -> str:
    """What the page's commands print."""
    page = EVALUATION.read_text()
    for name in recipe.METHODS:
        scores = table(read_stored(f"shipped/{name}/results.json"))
        page = replace_part(page, name, f"```text\n{scores}\n```")
    compared = read_stored("shipped/comparison/comparison.json")["B - A"]
    return replace_part(page, "comparison", f"```text\n{comparison_table(compared)}\n```")


def study_page() -> str:
    """Where LLaVA's tokens lie, as `ola_vlm.miniature.placement` stored it; the settings that tuning chose; the
    confirming runs' accuracies and comparisons."""
    lines = placement.report_lines(read_stored("placement.json"))
    page = replace_part(PROTOCOL.read_text(), "placement", "\n".join(lines))
    page = replace_part(page, "settings", "\n".join(settings_table()))
    numbers = study_numbers(STUDY)
    page = replace_part(page, "accuracy", "\n".join(accuracy_lines(numbers["accuracy"])))
    page = replace_part(page, "comparisons", "\n".join([GLANCE, "", *glance_lines(numbers["comparisons"])]))
    needed = {arm: numbers["labels"][arm] for arm in LABELED_ARMS}
    lines = labels_lines(needed, numbers["labels_ranges"], numbers["labels_tried"])
    page = replace_part(page, "labels", "\n".join(lines))
    for name, lines in exploration_tables().items():
        page = replace_part(page, name, "\n".join(lines))
    return page


def exploration_tables() -> dict[str, list[str]]:
    """What was run beside the study, next to the study's own results of the same seeds."""
    confirmed = read_results(STUDY)
    return {
        "longer": longer_lines(read_results(STUDY / "longer"), [confirmed, read_results(STUDY / "faster")]),
        "swapped": swapped_lines(read_results(STUDY / "swapped"), confirmed, "words"),
    }


def settings_table() -> list[str]:
    """Each tuned arm's settings, and the validation accuracy (%) by which the last of its round was chosen. A value at
    an end of a grid of three or more is marked."""
    grids = {name: grid for name, grid, _ in design.ROUNDS}
    tuned = json.loads((STUDY / "settings.json").read_text())
    rows = []
    for arm, settings in tuned["settings"].items():
        row = [f"`{arm}`"]
        for name, value in settings.items():
            # Value -> score; JSON has no numbers as keys, so values are written as `:g` does.
            scores = tuned["scores"][arm].get(name)
            # LLaVA has no embedding loss, so no weight was tuned.
            if scores is None:
                row.append("")
                continue
            # Of two values either is an end.
            ends = {grids[name][0], grids[name][-1]} if len(grids[name]) > 2 else set()
            mark = ", edge" if value in ends else ""
            row.append(f"{value:g} ({100 * scores[f'{value:g}']:.1f}{mark})")
        rows.append(row)
    header = ["arm", "learning rate of PT", "factor on weights", "of IFT, up to 1,000 scenes", "of IFT, 6,000 scenes"]
    return markdown_table(header, rows)


def smollm2_page() -> str:
    """The tables that words and LLaVA before SmolLM2 left, one level lower than in their report."""
    report = smollm2_report.report_text(read_stored("smollm2_words.json"))
    # The tables alone: what stands between the report's title and its figure.
    tables = report[report.index("## ") : report.index("![losses]")]
    return replace_part(SMOLLM2.read_text(), "words", tables.replace("## ", "### ").rstrip())


# What benchmarks call a method -> what the page calls it.
METHOD_NAMES = {
    "LLaVA + words": "LLaVA with as long a prompt as OLA-VLM's",
    "OLA-VLM": "OLA-VLM, targets from the cache",
    "OLA-VLM, with teachers": "OLA-VLM, its teachers in the step",
    "words": "words, from the cache",
    "token concat": "LLaVA with the teachers as encoders (token concat)",
}


def performance_table() -> str:
    """Of one machine: steps of PT, answers, and a question in a new process, each beside LLaVA's."""
    rows = []
    # Of benchmarks/step.py: a file for each width.
    for path in sorted((RESULTS / "performance").glob("step_*.json")):
        stored = json.loads(path.read_text())
        count = f"{stored['rows']} row{'s' * (stored['rows'] > 1)}"
        rows += step_rows(f"PT step, {stored['hidden_size']} wide, {count}", stored["methods"])
    # Of benchmarks/inference.py.
    answers = read_stored("performance/inference.json")
    for size, methods in answers["sizes"].items():
        rows += answer_rows(f"answer of {answers['new_tokens']} tokens, {size}", methods)
    # Of benchmarks/one_shot.py, whose ratio is that to plain transformers.
    once = read_stored("performance/one_shot.json")
    for name, seconds in once["seconds"].items():
        ratio = f"{once['ratio']:.2f}" if name == "ola-vlm chat" else ""
        rows.append([f"one question in a new process: {name}", f"{seconds:.2f}", ratio, "", "", ""])
    header = ["what", "seconds", "ratio", "ratio of FLOPs", "peak memory, MiB", "ratio"]
    return "\n".join(markdown_table(header, rows))


def step_rows(what: str, methods: dict[str, dict]) -> list[list[str]]:
    base = methods["LLaVA"]
    rows = []
    for method, found in methods.items():
        ratios = {field: found[field] / base[field] for field in ("seconds", "gflop", "peak_mib")}
        rows.append([
            f"{what}: {METHOD_NAMES.get(method, method)}",
            f"{found['seconds']:.2f}",
            f"{ratios['seconds']:.2f}",
            f"{ratios['gflop']:.2f}",
            f"{found['peak_mib']:,.0f}",
            f"{ratios['peak_mib']:.2f}",
        ])  # fmt: skip
    return rows


def answer_rows(what: str, methods: dict[str, dict]) -> list[list[str]]:
    base = methods["LLaVA"]
    rows = []
    for method, found in methods.items():
        # `METHOD_NAMES` says where targets come from, and an answer needs none.
        name = "OLA-VLM" if method == "OLA-VLM" else METHOD_NAMES.get(method, method)
        seconds = f"{1 / found['answers_a_second']:.3f}"
        memory = f"{found['peak_mb']:,.0f}"
        memory_ratio = f"{found['peak_mb'] / base['peak_mb']:.2f}"
        rows.append([f"{what}: {name}", seconds, f"{found['time_ratio']:.2f}", "", memory, memory_ratio])
    return rows


def performance_page() -> str:
    return replace_part(PERFORMANCE.read_text(), "measured", performance_table())


# ------------------------------------------------------------------------------------------------------------- all
def pages() -> dict[Path, str]:
    """Every page that has generated parts, as it should be."""
    written = {
        API: api_page(),
        MINIATURE: replace_part(MINIATURE.read_text(), "questions", questions_section()),
        NOTEBOOK: notebook(TUTORIAL.read_text()),
        README: readme(),
        EVALUATION: evaluation_page(),
        PROTOCOL: study_page(),
        PERFORMANCE: performance_page(),
        SMOLLM2: smollm2_page(),
    }
    numbers = study_numbers(STUDY)
    written[STUDY / "report.md"] = report_text(numbers)
    written[STUDY / "report.json"] = numbers_text(numbers)
    return written


def is_current(path: Path, text: str) -> bool:
    """Whether a page is there and says this; of JSON, whether it holds this, and the figures that a report shows are
    there."""
    if not path.exists():
        return False
    stored = path.read_text()
    if path.suffix == ".json":
        return same_content(json.loads(stored), json.loads(text))
    if path.parent == STUDY and not all((STUDY / name).exists() for name in re.findall(r"!\[[^]]*\]\((\S+)\)", text)):
        return False
    return stored == text


def same_content(one: Any, other: Any) -> bool:
    """Whether two JSON contents are the same but for the last digits of numbers, which another processor rounds
    otherwise."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_content(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_content, one, other))
    if isinstance(one, float) and isinstance(other, float):
        # NaN, which JSON of Python's may hold, differs from itself.
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(one) and math.isnan(other))
    return type(one) is type(other) and one == other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the texts, and write none")
    args = parser.parse_args()
    made = pages()
    differing = [path for path, text in made.items() if not is_current(path, text)]
    names = ", ".join(str(path.relative_to(ROOT)) for path in differing)
    if args.check and differing:
        sys.exit(f"{names}: not what the code and docs/results say; run: make pages")
    # Those that are current stay as they are, last digits of numbers included.
    for path in differing:
        path.write_text(made[path])
    # With its figures.
    if any(path.parent == STUDY for path in differing):
        write_report(STUDY, study_numbers(STUDY))
    print(f"new: {names}" if differing else f"{len(made)} pages are current")


if __name__ == "__main__":
    main()
