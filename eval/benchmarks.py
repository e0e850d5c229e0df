"""The benchmarks: where their files are, how a row becomes a question, which prompts and scores they have by name.

A question: `{"id", "task", "source", "question": what is asked, "choices": [str], "answer", "scoring": a key of
scoring.SCORERS}`; MMVP's also a `"pair"`. Schemas, prompts and rules: docs/evaluation.md.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from ola_vlm.miniature.dataset import write_questions
from ola_vlm.targets.files import inside

LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_IN_PARENTHESES = (
    "\nOnly answer the option as the output. For example, if your answer is the option A, answer (A)."
)
LETTER_SUCH_AS = (
    "\nAnswer with the option's letter from the given choices directly, such as answer letter 'A' only. \n"
)
SHORT = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)
MINIATURE_FOLDER = "runs/benchmark_miniature"
MMVP_MISLABELLED = {"99", "100", "279", "280"}  # both pairs are swapped: github.com/tsb0601/MMVP/issues/30


@dataclass(frozen=True)
class Benchmark:
    """`files`: glob patterns; `read`: a row without its image -> a question; `variants`: name -> (suffix of the
    prompt, scoring), the first is the default; `headline`: name -> weights of tasks or sources (None: all rows)."""

    repo: str | None
    files: tuple[str, ...]
    read: Callable[[dict], dict]
    variants: dict[str, tuple[str, str]]
    headline: dict[str, dict[str, float] | None] = field(default_factory=lambda: {"overall": None})


def read_options(question: str) -> list[str]:
    """The options that a question lists as "A. ...", "A: ..., B: ..." or "(A) ...", at least two; else []."""
    found, expected = [], iter(ascii_uppercase)
    letter = next(expected)
    for match in re.finditer(r"(?:^|[\s,(])([A-Z])\s?[.:)]", question):
        if match[1] == letter:
            found.append(match)
            letter = next(expected)
    if len(found) < 2:
        return []
    ends = [match.start() for match in found[1:]] + [len(question)]
    return [question[match.end() : end].split("\n")[0].strip(" ,") for match, end in zip(found, ends, strict=True)]


def _cvbench(row: dict) -> dict:
    fields = {name: row[name] for name in ("task", "source", "answer")}
    return {"id": f"{row['type']}-{row['idx']}", **fields, "question": row["prompt"], "choices": list(row["choices"])}


def _choices(row: dict) -> list[str]:
    """The options that the question lists; four letters only if the answer's is not among them."""
    options = read_options(row["question"])
    return options if ascii_uppercase.index(row["answer"]) < len(options) else [""] * 4


def _mmstar(row: dict) -> dict:
    fields = {"id": str(row["index"]), "task": row["category"], "source": row["l2_category"]}
    return {**fields, "question": row["question"], "choices": _choices(row), "answer": row["answer"]}


def _realworldqa(row: dict) -> dict:
    is_letter = re.fullmatch("[A-D]", row["answer"]) is not None
    fields = {"id": str(row["row"]), "task": "choice" if is_letter else "short", "source": "RealWorldQA"}
    choices = _choices(row) if is_letter else []
    return {**fields, "question": row["question"], "choices": choices, "answer": row["answer"]}


def _okvqa(row: dict) -> dict:
    fields = {"id": str(row["question_id"]), "task": row["question_type"] or "all", "source": "OK-VQA"}
    return {**fields, "question": row["question"], "choices": [], "answer": list(row["answers"])}


def _mmvp(row: dict) -> dict:
    index, options = int(row["Index"]), re.split(r"\s*\([a-z]\)\s*", row["Options"])[1:]
    fields = {"id": str(index), "task": "question", "source": "MMVP", "pair": (index + 1) // 2}
    question = f"{row['Question']} {row['Options']}"
    return {**fields, "question": question, "choices": options, "answer": row["Correct Answer"].strip()}


CHOICE = ("", "choice")
BENCHMARKS = {
    "miniature": Benchmark(
        None,
        ("test.jsonl",),
        _cvbench,
        {"official": CHOICE},
        {"overall": dict.fromkeys(("Count", "Relation", "Depth", "Distance"), 1 / 4)},
    ),
    "cvbench": Benchmark(
        "nyu-visionx/CV-Bench",
        ("test_[23]d.parquet", "test.jsonl"),
        _cvbench,
        {"official": (LETTER, "choice"), "paper": (LETTER_IN_PARENTHESES, "choice")},
        {
            "2D": {"ADE20K": 1 / 2, "COCO": 1 / 2},
            "3D": {"Omni3D": 1},
            "overall": {"ADE20K": 1 / 4, "COCO": 1 / 4, "Omni3D": 1 / 2},
        },
    ),
    "mmstar": Benchmark("Lin-Chen/MMStar", ("*.parquet",), _mmstar, {"paper": (LETTER_SUCH_AS, "choice")}),
    "realworldqa": Benchmark(
        "xai-org/RealworldQA", ("test*.parquet",), _realworldqa, {"options": CHOICE, "paper": ("", "exact")}
    ),
    "okvqa": Benchmark("lmms-lab/OK-VQA", ("val2014*.parquet",), _okvqa, {"paper": (SHORT, "vqa")}),
    "mmvp": Benchmark(
        "MMVP/MMVP",
        ("Questions.csv",),
        _mmvp,
        {"official": CHOICE, "corrected": CHOICE},
        {"overall": {"pair": 1}, "questions": {"question": 1}},
    ),
}


def locate(name: str, data: str | None = None, revision: str | None = None, make: bool = True) -> tuple[Path, str]:
    """The benchmark's folder, downloaded or made if need be, and its revision: the Hub's commit, or of a local copy
    the hash of the files with its questions. `data`: a folder or a name on the Hub, by default the benchmark's own.
    `make`: the miniature's questions may be written to `data`, which it is the user's to say."""
    benchmark = BENCHMARKS[name]
    if name == "miniature" and data is None:
        data = MINIATURE_FOLDER
    if name == "miniature" and not (Path(data) / "test.jsonl").exists():
        if not make and data != MINIATURE_FOLDER:
            raise ValueError(f"{data} has no test.jsonl: give --data, a folder that has it or where it may be written")
        write_questions(Path(data))
    if data is not None and Path(data).is_dir():
        if revision is not None:
            raise ValueError(f"{data} is a folder, which has no revision {revision!r}: leave it out")
        files = question_files(Path(data), benchmark)
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return Path(data), f"sha256:{digest.hexdigest()[:16]}"
    if data is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        raise ValueError(f"{data} is neither a folder nor the name of a data set on the Hub")
    from huggingface_hub import snapshot_download

    repo = {"repo_id": data or benchmark.repo, "repo_type": "dataset"}
    wanted = [f"*{pattern}" for pattern in benchmark.files]
    folder = Path(snapshot_download(**repo, revision=revision, allow_patterns=wanted))
    if question_files(folder, benchmark)[0].suffix != ".parquet":  # images in files of their own
        snapshot_download(**repo, revision=folder.name, allow_patterns=["*.jpg", "*.png"])
    return folder, folder.name


def question_files(folder: Path, benchmark: Benchmark) -> list[Path]:
    """The files with questions, of the first pattern that has any; ValueError if there are none."""
    found = (sorted(folder.rglob(pattern)) for pattern in benchmark.files)
    if not (files := next(filter(None, found), None)):
        raise ValueError(f"{folder} has no {' or '.join(benchmark.files)}")
    return [inside(folder, file.relative_to(folder)) for file in files]


def load_questions(
    name: str, folder: Path, variant: str | None = None
) -> tuple[list[dict], Callable[[dict], str | Path | dict]]:
    """All questions of a benchmark in its folder, and a function from a question to its image (`open_image`'s
    source). Images of parquet files stay on disk until they are asked for."""
    benchmark = BENCHMARKS[name]
    variant = variant or next(iter(benchmark.variants))
    if variant not in benchmark.variants:
        raise ValueError(f"{name} has the variants {', '.join(benchmark.variants)}, not {variant!r}")
    suffix, scoring = benchmark.variants[variant]
    rows, images = _rows(folder, question_files(folder, benchmark))
    questions, places = [], {}
    for number, row in enumerate(rows):
        question = benchmark.read({**row, "row": number})
        question["question"] += suffix
        question["scoring"] = "exact" if scoring == "choice" and not question["choices"] else scoring
        if variant == "corrected" and question["id"] in MMVP_MISLABELLED:
            question["answer"] = "(a)" if question["answer"] == "(b)" else "(b)"
        if question["id"] in places:
            raise ValueError(f"{folder}: two questions have the id {question['id']!r}")
        places[question["id"]] = number
        questions.append(question)
    return questions, lambda question: images[places[question["id"]]]


def _rows(folder: Path, files: Sequence[Path]) -> tuple[Sequence[dict], Sequence]:
    """Rows without their images, and the images. ValueError for an image outside `folder`."""
    if files[0].suffix == ".parquet":
        import datasets  # of the extra "eval"; takes a second

        data = datasets.Dataset.from_parquet(list(map(str, files)))
        images = data.select_columns("image").cast_column("image", datasets.Image(decode=False))["image"]  # lazy
        return data.remove_columns("image"), images
    (file,) = files
    if file.suffix == ".csv":
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened))
        names = [f"MMVP Images/{row['Index']}.jpg" for row in rows]
    else:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        names = [row["filename"] for row in rows]
    place = file.parent.relative_to(folder)
    return rows, [inside(folder, place / name) for name in names]
