"""The benchmarks: where their files are, how a row becomes a question, which prompts and scores they have by name.

A question: `{"id", "task", "source", "question": what is asked, "choices": [str], "answer", "scoring": a key of
scoring.SCORERS}`; MMVP's also a `"pair"`, 3DSRBench's variants of one a `"group"`. Schemas, prompts and rules:
docs/evaluation.md.
"""

import difflib
import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..files.strangers import inside
from ..targets.images import ImageError
from . import schemas
from .question_files import Row, image_source, read_rows

logger = logging.getLogger(__name__)

# What the benchmarks' own code, or the paper's, writes behind a question.
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
SELECT = "\nPlease select the correct answer from the options above. \n"
# Where the miniature's questions are rendered by default.
MINIATURE_FOLDER = "runs/benchmark_miniature"
MEAN_OF_TASKS = "mean of tasks"
# Ids of questions. In both pairs the right answers are swapped: github.com/tsb0601/MMVP/issues/30.
MMVP_MISLABELLED = {"99", "100", "279", "280"}


@dataclass(frozen=True)
class Benchmark:
    """
    `files`: glob patterns; `read`: a row without its image -> a question, or None for one that is left out;
    `variants`: name -> (suffix of the prompt, scoring), the first is the default; `headline`: name -> weights of tasks
    or sources, None for the mean of all questions, MEAN_OF_TASKS.
    """

    repo: str | None
    files: tuple[str, ...]
    read: Callable[[Row], dict | None]
    variants: dict[str, tuple[str, str]]
    headline: dict[str, dict[str, float] | str | None] = field(default_factory=lambda: {"overall": None})


CHOICE = ("", "choice")
# By the names of `--benchmark`; docs/evaluation.md has a table of them.
BENCHMARKS = {
    "miniature": Benchmark(
        None,
        ("test.jsonl",),
        schemas.cvbench,
        {"official": CHOICE},
        {"overall": dict.fromkeys(("Count", "Relation", "Depth", "Distance"), 1 / 4)},
    ),
    "cvbench": Benchmark(
        "nyu-visionx/CV-Bench",
        # The Hub's two files; or its older form, a file of lines beside a folder of images.
        ("test_[23]d.parquet", "test.jsonl"),
        schemas.cvbench,
        {"official": (LETTER, "choice"), "paper": (LETTER_IN_PARENTHESES, "choice")},
        {
            # Its authors' weights: sources count alike, however many questions each has.
            "2D": {"ADE20K": 1 / 2, "COCO": 1 / 2},
            "3D": {"Omni3D": 1},
            "overall": {"ADE20K": 1 / 4, "COCO": 1 / 4, "Omni3D": 1 / 2},
            # The mean over all questions, which VIRAL and some harnesses report.
            "plain": None,
        },
    ),
    "mmstar": Benchmark("Lin-Chen/MMStar", ("*.parquet",), schemas.mmstar, {"paper": (LETTER_SUCH_AS, "choice")}),
    "realworldqa": Benchmark(
        "xai-org/RealworldQA", ("test*.parquet",), schemas.realworldqa, {"options": CHOICE, "paper": ("", "exact")}
    ),
    "okvqa": Benchmark("lmms-lab/OK-VQA", ("val2014*.parquet",), schemas.okvqa, {"paper": (SHORT, "vqa")}),
    "mmvp": Benchmark(
        "MMVP/MMVP",
        ("Questions.csv",),
        schemas.mmvp,
        {"official": CHOICE, "corrected": CHOICE},
        # Its score counts pairs of which both questions are right.
        {"overall": {"pair": 1}, "questions": {"question": 1}},
    ),
    "blink": Benchmark(
        "BLINK-Benchmark/BLINK", ("val-*.parquet",), schemas.blink, {"official": CHOICE}, {"overall": MEAN_OF_TASKS}
    ),
    "3dsrbench": Benchmark(
        "ccvl/3DSRBench",
        # Circular: every question in several orders of its options, and of its mirrored image.
        ("3dsrbench_v1_vlmevalkit_circular.tsv", "*circular*/*.parquet", "*circular*.parquet"),
        schemas.three_dsr,
        {"official": (SELECT, "choice")},
        {"overall": {"all variants": 1}, "questions": None},
    ),
    "3dsrbench_vanilla": Benchmark(
        "ccvl/3DSRBench",
        ("3dsrbench_v1_vlmevalkit.tsv", "3dsr/*.parquet"),
        schemas.three_dsr_vanilla,
        {"official": (SELECT, "choice")},
    ),
    "vstar": Benchmark(
        "lmms-lab-encoder/vstar-bench",
        ("*.parquet", "test_questions.jsonl"),
        schemas.vstar,
        {"official": (LETTER, "choice")},
    ),
}


def find_benchmark(name: str) -> Benchmark:
    """By its name in `BENCHMARKS`, or your own questions by their file. ValueError for neither."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    file = Path(name)
    if file.suffix in (".json", ".jsonl", ".csv", ".tsv"):
        if not file.exists():
            raise ValueError(f"there is no file {name}: give your own questions, or one of {', '.join(BENCHMARKS)}")
        return Benchmark(None, (file.name,), schemas.your_own, {"official": CHOICE})
    # Most likely a typing error.
    close = difflib.get_close_matches(name, BENCHMARKS, n=1)
    if close:
        meant = f"did you mean {close[0]}?"
    else:
        meant = f"choose one of {', '.join(BENCHMARKS)}, or give a file of questions"
    raise ValueError(f"there is no benchmark {name!r}: {meant}")


def shown_name(run: dict) -> str:
    """A benchmark's name and variant, for people. Your own questions have no variants to be told apart."""
    if run["benchmark"] in BENCHMARKS:
        return f"{run['benchmark']} ({run['variant']})"
    return run["benchmark"]


def find_variant(name: str, variant: str | None) -> str:
    """The variant, or the benchmark's first one. ValueError for one that it hasn't."""
    variants = find_benchmark(name).variants
    if variant is None:
        return next(iter(variants))
    if variant not in variants:
        raise ValueError(f"{name} has the variants {', '.join(variants)}, not {variant!r}")
    return variant


def locate(name: str, data: str | None = None, revision: str | None = None, make: bool = True) -> tuple[Path, str]:
    """The benchmark's folder, downloaded or made if need be, and its revision: the Hub's commit, or of a local copy
    the hash of the files with its questions.

    Args:
        name: of `BENCHMARKS`, or a file with your own questions.
        data: a folder or a name on the Hub, by default the benchmark's own; for your own questions where their images'
            paths begin, by default their file's folder.
        revision: of the data on the Hub.
        make: the miniature's questions may be written to `data`, which it is the user's to say.
    """
    benchmark = find_benchmark(name)
    # A file of your own questions: their images lie beside it, or where the user says.
    if name not in BENCHMARKS:
        folder = Path(data or Path(name).parent)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: give --data, where the images of {name} are")
        return folder, _hash([Path(name)])
    if name == "miniature" and data is None:
        data = MINIATURE_FOLDER
    if name == "miniature" and data is not None and not (Path(data) / "test.jsonl").exists():
        # `compare` takes the folder from a file of answers, which is no order to write there.
        if not make and data != MINIATURE_FOLDER:
            raise ValueError(f"{data} has no test.jsonl: give --data, a folder that has it or where it may be written")
        # Imported here: it brings along all that renders scenes, which other benchmarks don't need.
        from ..world.dataset import write_questions

        write_questions(Path(data))
    # A local copy has no commit: the hash of its questions tells whether two runs had the same.
    if data is not None and Path(data).is_dir():
        if revision is not None:
            raise ValueError(f"{data} is a folder, which has no revision {revision!r}: leave it out")
        return Path(data), _hash(question_files(Path(data), benchmark))
    if data is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        raise ValueError(f"{data} is neither a folder nor the name of a data set on the Hub")
    if revision is not None and re.fullmatch(r"[0-9a-f]{7,39}", revision):
        raise ValueError(f"revision {revision} is cut: the Hub wants all 40 digits of a commit")
    from huggingface_hub import snapshot_download

    repo = {"repo_id": data or benchmark.repo, "repo_type": "dataset"}
    # The Hub's patterns match whole paths, in which "*" also stands for folders.
    wanted = [f"*{pattern}" for pattern in benchmark.files]
    folder = Path(snapshot_download(**repo, revision=revision, allow_patterns=wanted))
    # Parquet and TSV files have the images in them; elsewhere these are files of their own.
    if question_files(folder, benchmark)[0].suffix not in (".parquet", ".tsv"):
        # A snapshot's folder is named by its commit: the images are those of the same one.
        snapshot_download(**repo, revision=folder.name, allow_patterns=["*.jpg", "*.png"])
    return folder, folder.name


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            # By content alone: a copy under another path is the same revision.
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def question_files(folder: Path, benchmark: Benchmark) -> list[Path]:
    """The files with questions, of the first pattern that has any; ValueError if there are none."""
    for pattern in benchmark.files:
        if files := sorted(folder.rglob(pattern)):
            return [inside(folder, file.relative_to(folder)) for file in files]
    raise ValueError(f"{folder} has no {' or '.join(benchmark.files)}")


def load_questions(
    name: str, folder: Path, variant: str | None = None
) -> tuple[list[dict], Callable[[dict], str | Path | dict]]:
    """All questions of a benchmark in its folder, and a function from a question to its image (`open_image`'s
    source; ImageError if it has none). Images of parquet files stay on disk until they are asked for."""
    benchmark = find_benchmark(name)
    variant = find_variant(name, variant)
    suffix, scoring = benchmark.variants[variant]
    if name in BENCHMARKS:
        rows, images = read_rows(folder, question_files(folder, benchmark))
    else:
        # The images' paths begin in `folder`, which the user may have named: not at the questions' file.
        rows, images = read_rows(Path(name).parent, [Path(name)], image_folder=folder)
    questions = []
    image_of = {}
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        # Among the rows of all files: some benchmarks' rows have no id but this.
        row.place = number
        question = benchmark.read(row)
        if question is None:
            continue
        # Copies of a benchmark may have the prompt in their questions already.
        if suffix.strip() not in question["question"]:
            question["question"] += suffix
        question["scoring"] = scoring
        # Free answers among multiple-choice questions: RealWorldQA's, or your own.
        if scoring == "choice" and not question["choices"]:
            question["scoring"] = "exact"
        if variant == "corrected" and question["id"] in MMVP_MISLABELLED:
            question["answer"] = "(a)" if question["answer"] == "(b)" else "(b)"
        # An interrupted run goes on by ids: of two questions with the same one only one would be answered.
        if question["id"] in image_of:
            raise ValueError(f"{row.file}, row {row.number}: two questions have the id {question['id']!r}")
        image_of[question["id"]] = image
        questions.append(question)
    if not questions:
        raise ValueError(f"{folder if name in BENCHMARKS else name} has no questions")
    if len(questions) < len(rows):
        logger.warning(
            f"{name}: {len(rows) - len(questions):,} of {len(rows):,} questions are left out: several images"
        )

    def read_image(question: dict) -> Any:
        # Only now: an image of a parquet file or in base64 is read when its batch is due.
        source = image_source(image_of[question["id"]])
        if source is None:
            raise ImageError(f"question {question['id']}", "its row has no image")
        return source

    return questions, read_image


def evenly(questions: Sequence[dict], limit: int | None) -> list[dict]:
    """About `limit` of the questions, evenly spaced through the file, so that every task is among them; pairs and
    groups, which count as a whole, stay whole."""
    # A unit is what is right or wrong as a whole: a pair, a group of variants or a single question.
    units = {}
    for question in questions:
        units.setdefault(question.get("pair", question.get("group", question["id"])), []).append(question)
    units = list(units.values())
    if limit is None or limit >= len(questions):
        return list(questions)
    # As large a share of the units as `limit` is of the questions.
    wanted = max(1, limit * len(units) // len(questions))
    places = np.linspace(0, len(units) - 1, wanted).round().astype(int)
    return list(chain.from_iterable(units[place] for place in places))
