"""A benchmark's files as rows and images: parquet, JSON lines, JSON, CSV and TSV, a little different in every copy.

What can't be read is named with its file, row (from 1) and column.
"""

import ast
import base64
import csv
import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import cast

from ..inference.questions import read_options
from ..targets.files import inside

IMAGE_COLUMNS = ("image", "image_path", "filename", "file_name")
SHORTER_THAN_AN_IMAGE = 64  # characters in base64; a shorter cell is the index of the row that has the image


class Row:
    """A row by its columns' names. Headers may be spelled otherwise: "correct_answer", "lndex" with a lower-case L.

    `row[name]` is the value; ValueError if the column is missing or empty. `get` gives the first of several columns
    that has a value, or None.
    """

    def __init__(self, values: dict, file: Path, number: int):
        self.values = values
        self.file = file
        self.number = number
        self.place = number - 1  # among the rows of all files
        self._spelled = {}
        for name in values:
            self._spelled.setdefault(_spelling(name), name)

    def get(self, *names: str):
        for name in names:
            column = name if name in self.values else self._spelled.get(_spelling(name))
            value = self.values.get(column)
            if value is not None and value != "":
                return value
        return None

    def __getitem__(self, name: str):
        value = self.get(name)
        if value is None:
            known = ", ".join(self.values)
            state = "is empty" if _spelling(name) in self._spelled else f"is missing (there are {known})"
            raise self.problem(name, state)
        return value

    def name(self, *columns: str) -> str:
        """The row's id by the first of these columns that it has, else its place among all rows."""
        value = self.get(*columns)
        return str(self.place if value is None else value)

    def is_blank(self) -> bool:
        return all(value is None or value == "" for value in self.values.values())

    def problem(self, column: str, what: str) -> ValueError:
        return ValueError(f"{self.file}, row {self.number}: column {column!r} {what}")

    def choices(self, column: str) -> list[str]:
        """A list, also one that is written as text: JSON, Python, "(A) near (B) far", one a line."""
        value = self[column]
        if isinstance(value, str):
            value = _parse_list(value)
        if isinstance(value, dict):
            value = list(value.values())
        if value is None or len(value) < 2:
            raise self.problem(column, f"holds {str(self[column])[:80]!r}: it must list two options or more")
        return [str(choice) for choice in value]

    def letter(self, column: str, choices: Sequence[str]) -> str:
        """The right option as "A", given as "a", "(A)", "A. near" or by the option's own words."""
        text = str(self[column]).strip()
        plain = [choice.strip().casefold() for choice in choices]
        label = re.fullmatch(r"\W*([A-Za-z])\W*", text) or re.match(r"\W*([A-Za-z])\s*[.:)\]]", text)
        if label and (not choices or label[1].upper() in ascii_uppercase[: len(choices)]):
            return label[1].upper()
        if plain.count(text.casefold()) == 1:
            return ascii_uppercase[plain.index(text.casefold())]
        raise self.problem(column, f"holds {text[:80]!r}, which is none of the {len(choices)} options")


def _spelling(header: str) -> str:
    """Alike for headers that look alike."""
    return re.sub(r"[\W_]", "", str(header).lower()).replace("l", "i").replace("1", "i")


def _parse_list(text: str):
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, (list, tuple, dict)):
            return value
    return read_options(text) or [line.strip() for line in text.split("\n") if line.strip()]


def read_rows(folder: Path, files: Sequence[Path], image_folder: Path | None = None) -> tuple[list[Row], Sequence]:
    """All rows, and each one's image: a source of `open_image`, or None where the row has none.

    ValueError for an image outside of `folder` (or of `image_folder`, where the files' paths begin if it is given).
    """
    rows = []
    images = []
    for file in files:
        if file.suffix == ".parquet":
            of_file, its_images = _parquet(file)
        else:
            of_file = [
                row for row in _text_rows(file) if any(value not in (None, "") for value in row.values.values())
            ]
            home = image_folder or folder
            place = Path() if image_folder else file.parent.relative_to(folder)
            its_images = _named_images(of_file, home, place)
        rows += of_file
        images += its_images
    return rows, images


def _parquet(file: Path) -> tuple[list[Row], list]:
    import datasets  # of the extra "eval"; takes a second

    data = datasets.Dataset.from_parquet(str(file))
    pictures = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    pictures = pictures or [name for name in data.column_names if name == "image"]
    if not pictures:
        raise ValueError(f"{file} has no column of images: {', '.join(data.column_names)}")
    for name in pictures:
        data = data.cast_column(name, datasets.Image(decode=False))
    rows = [Row(cast(dict, row), file, number) for number, row in enumerate(data.remove_columns(pictures), start=1)]
    # Several pictures a question (BLINK's image_1 to image_4): which rows have a second one, without decoding any.
    for name in pictures[1:]:
        filled = data.data.column(name).is_valid().to_pylist()
        for row, has_one in zip(rows, filled, strict=True):
            row.values[name] = has_one or None
    first = data.select_columns(pictures[:1])
    return rows, [partial(_cell, first, pictures[0], number) for number in range(len(rows))]


def _cell(data, column: str, number: int):
    """An image of a parquet file, which stays on disk until it is asked for."""
    return data[number][column]


def image_source(image):
    """What `open_image` takes of an entry of `read_rows`' images; None if the row has no image."""
    if callable(image):
        return image()
    if isinstance(image, str):
        return {"bytes": base64.b64decode(image)}
    return image


def _text_rows(file: Path) -> list[Row]:
    if file.suffix in (".csv", ".tsv"):
        csv.field_size_limit(sys.maxsize)  # images in base64
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, delimiter="\t" if file.suffix == ".tsv" else ",")
            return [Row(values, file, number) for number, values in enumerate(reader, start=1)]
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".json":
        content = _json(text, file, number=1)
        if not isinstance(content, list):
            raise ValueError(f"{file} must hold a list of questions")
        entries = list(enumerate(content, start=1))
    else:
        lines = enumerate(text.splitlines(), start=1)
        entries = [(number, _json(line, file, number)) for number, line in lines if line.strip()]
    for number, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{file}, row {number}: it must be an object of columns, not {str(entry)[:80]!r}")
    return [Row(entry, file, number) for number, entry in entries]


def _json(text: str, file: Path, number: int):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, row {number}: no JSON: {error}") from error


def _named_images(rows: Sequence[Row], folder: Path, place: Path) -> list:
    """Paths that are named, beginning at `place` in `folder`; MMVP's by its index; or images in base64."""
    by_index = {str(row.get("index")): row for row in rows}
    images = []
    for row in rows:
        name = row.get(*IMAGE_COLUMNS)
        if isinstance(name, list):
            name = name[0] if len(name) == 1 else None
        if name is None and row.file.name == "Questions.csv":
            name = f"MMVP Images/{row['index']}.jpg"
        elif row.file.suffix == ".tsv" and name is not None:
            shared = by_index.get(name) if len(name) < SHORTER_THAN_AN_IMAGE else None
            images.append((shared or row).get(*IMAGE_COLUMNS))
            continue
        images.append(None if name is None else inside(folder, place / str(name)))
    return images
