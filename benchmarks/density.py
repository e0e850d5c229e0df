"""How much a line asks of its reader: `python benchmarks/density.py [FILE...]` prints a row a room and the total.

Counted in the product's Python files (tests and the files that travel with the shipped weights aside), per 1,000 code
lines: what packs several steps into one line. Beside it the share of comments that have a line of their own, the mean
length of a code line, and the ninetieth percentile of the functions' lengths. A code line has something on it that is
no comment; lines of docstrings count. For looking at, and for comparing two states (docs/dev/density.md), not a gate.
"""

import argparse
import ast
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Kind of packing -> what it is called in the table.
KINDS = {
    "merges": "dict merges",
    "tuples": "a, b = x, y",
    "nested": "nested comprehensions",
    "conditionals": "conditional expressions",
    "walruses": "assignments in expressions",
    "splats": "positional splats",
}


@dataclass
class Density:
    # A file's counts, or the sums over several files'.
    code_lines: int = 0
    characters: int = 0
    comment_lines: int = 0
    packings: Counter = field(default_factory=Counter)
    function_lengths: list[int] = field(default_factory=list)

    def add(self, other: "Density") -> None:
        self.code_lines += other.code_lines
        self.characters += other.characters
        self.comment_lines += other.comment_lines
        self.packings.update(other.packings)
        self.function_lengths += other.function_lengths

    def row(self) -> list[float]:
        """The table's numbers: `KINDS` per 1,000 code lines, comments in %, characters a line, length of functions."""
        lines = max(self.code_lines, 1)
        lengths = sorted(self.function_lengths) or [0]
        # Nine of ten functions are at most that long.
        percentile = lengths[int(0.9 * (len(lengths) - 1))]
        rates = [round(1000 * self.packings[kind] / lines, 1) for kind in KINDS]
        comments = round(100 * self.comment_lines / lines, 1)
        characters = round(self.characters / lines, 1)
        return [self.code_lines, *rates, comments, characters, percentile]


def packing(node: ast.AST) -> str | None:
    """What kind of packing a node is."""
    match node:
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            # `|` also joins sets and types (`int | None`): a merge is known by a literal dict beside it.
            is_merge = isinstance(left, (ast.Dict, ast.DictComp)) or isinstance(right, (ast.Dict, ast.DictComp))
            return "merges" if is_merge else None
        # `x |= {...}`; of a call the type isn't known, it counts as a dict.
        case ast.AugAssign(op=ast.BitOr(), value=ast.Dict() | ast.DictComp() | ast.Call() | ast.GeneratorExp()):
            return "merges"
        # A tuple on both sides; unpacking one value, `a, b = f()`, is one step.
        case ast.Assign(targets=[ast.Tuple(), *_], value=ast.Tuple()):
            return "tuples"
        case ast.IfExp():
            return "conditionals"
        case ast.NamedExpr():
            return "walruses"
    if isinstance(node, COMPREHENSIONS) and is_nested(node):
        return "nested"
    return None


def is_nested(comprehension: ast.AST) -> bool:
    """Over several loops, or with another comprehension in it."""
    if len(comprehension.generators) > 1:
        return True
    inner = [node for node in ast.walk(comprehension) if isinstance(node, COMPREHENSIONS)]
    # The first one is itself.
    return len(inner) > 1


def measure(file: Path) -> Density:
    text = file.read_text(encoding="utf-8")
    density = Density()
    # By lines: comments aren't in the syntax tree.
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            density.comment_lines += 1
        elif stripped:
            density.code_lines += 1
            density.characters += len(line)
    # By nodes: a packing may span lines, and a text may look like one.
    for node in ast.walk(ast.parse(text)):
        kind = packing(node)
        if kind is not None:
            density.packings[kind] += 1
        if isinstance(node, ast.Call):
            # `f(*args)` hides which parameter gets what; `**options` names them.
            density.packings["splats"] += sum(isinstance(argument, ast.Starred) for argument in node.args)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            density.function_lengths.append(node.end_lineno - node.lineno + 1)
    return density


def product_files() -> list[Path]:
    # Of git, so that the environment, caches and what a run wrote don't count.
    listed = subprocess.run(
        ["git", "ls-files", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # miniature/weights/ has copies of the hub files: they would count for each checkpoint.
    names = [name for name in listed.stdout.splitlines() if not name.startswith(("tests/", "miniature/weights/"))]
    return [ROOT / name for name in names]


def room_of(file: Path) -> str:
    """The folder of the repository that a file lies in."""
    parts = file.resolve().relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else "(root)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all of the product, by room")
    args = parser.parse_args()
    densities = defaultdict(Density)
    total = Density()
    for file in args.files or product_files():
        density = measure(file)
        densities[str(file) if args.files else room_of(file)].add(density)
        total.add(density)
    headings = ["code lines", *KINDS.values(), "own-line comments, %", "characters a line", "function length, p90"]
    print("| | " + " | ".join(headings) + " |")
    print("|---" * (len(headings) + 1) + "|")
    for name, density in [*sorted(densities.items()), ("**all**", total)]:
        print(f"| {name} | " + " | ".join(f"{number:g}" for number in density.row()) + " |")


if __name__ == "__main__":
    main()
