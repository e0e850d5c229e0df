"""A benchmark's files as rows and images: parquet, JSON lines, JSON, CSV and TSV, a little different in every copy.

What can't be read is named with its file, row (from 1) and column.
"""

import ast
import base64
import csv
import io
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import cast

from ..files.escapes import one_line
from ..files.strangers import inside
from ..inference.questions import read_options
from ..targets.images import IMAGE_ENDINGS

# Columns that name a row's image, or hold it; the first one that has a value counts.
IMAGE_COLUMNS = ("image", "image_path", "filename", "file_name", "images")
# Characters in base64; a shorter cell of a TSV is a path, or the index of the row that has the image.
SHORTER_THAN_AN_IMAGE = 64
# What `csv` takes everywhere: its limit is a C long, which has 32 bits on Windows.
LONGEST_CELL = 2**31 - 1


class Row:
    """A row by its columns' names. Headers may be spelled otherwise: "correct_answer", "lndex" with a lower-case L.

    `row[name]` is the value; ValueError if the column is missing or empty. `get` gives the first of several columns
    that has a value, or None.
    """

    def __init__(self, values: dict, file: Path, number: int):
        self.values = values
        self.file = file
        self.number = number
        # Its place among the rows of all files, from 0; `load_questions` sets it where there are several.
        self.place = number - 1
        # Spelling -> the first column of it.
        self._spelled = {}
        for name in values:
            self._spelled.setdefault(_spelling(name), name)

    def get(self, *names: str):
        for name in names:
            if name in self.values:
                spelled = name
            else:
                spelled = self._spelled.get(_spelling(name))
            if spelled is None:
                continue
            value = self.values[spelled]
            if not _is_empty(value):
                return value
        return None

    def __getitem__(self, name: str):
        value = self.get(name)
        if value is None:
            # An empty cell is another mistake than a missing column, and is mended elsewhere.
            if _spelling(name) in self._spelled:
                raise self.problem(name, "is empty")
            raise self.problem(name, f"is missing (there are {', '.join(self.values)})")
        return value

    def text(self, name: str) -> str:
        """The value as text; ValueError for lists and objects."""
        value = self[name]
        if isinstance(value, (list, dict)):
            raise self.problem(name, f"holds {str(value)[:80]!r}: it must be a text")
        return str(value)

    def name(self, *columns: str) -> str:
        """The row's id by the first of these columns that it has, else its place among all rows."""
        value = self.get(*columns)
        if value is None:
            value = self.place
        return str(value)

    def is_blank(self) -> bool:
        return all(_is_empty(value) for value in self.values.values())

    def problem(self, column: str, what: str) -> ValueError:
        return ValueError(f"{self.file}, row {self.number}: column {column!r} {what}")

    def choices(self, column: str) -> list[str]:
        """A list, also one that is written as text: JSON, Python, "(A) near (B) far", one a line; or options by their
        letters. Letters before all options' words are dropped."""
        value = self[column]
        if isinstance(value, str):
            value = _parse_list(value)
        if isinstance(value, dict):
            # {"a": "near", "B": "far"}, in any order.
            by_letter = {str(letter).strip().upper(): choice for letter, choice in value.items()}
            letters = ascii_uppercase[: len(value)]
            # Other keys than A, B, ... without a gap are no options: the list stays empty, which is an error below.
            value = []
            if set(by_letter) == set(letters):
                value = [by_letter[letter] for letter in letters]
        choices = value if isinstance(value, (list, tuple)) else []
        is_odd = any(_is_empty(choice) or isinstance(choice, (list, dict)) for choice in choices)
        if is_odd or not 2 <= len(choices) <= len(ascii_uppercase):
            what = f"holds {str(self[column])[:80]!r}"
            raise self.problem(column, f"{what}: it must list 2 to 26 options, or give them by letter, A, B, ...")
        choices = [str(choice) for choice in choices]
        # ["A. near", "B. far"] -> ["near", "far"], only if the labels are A, B, ... in order: "A. Smith" is a name.
        labelled = [re.fullmatch(r"\W*([A-Z])\s*[.:)\]]\s*(\S.*)", choice) for choice in choices]
        if [match and match[1] for match in labelled] == list(ascii_uppercase[: len(choices)]):
            return [match[2] for match in labelled if match]
        return choices

    def letter(self, column: str, choices: Sequence[str]) -> str:
        """The right option as "A", given as "a", "(A)", "A. near" or by the option's own words."""
        text = str(self[column]).strip()
        plain = [choice.strip().casefold() for choice in choices]
        # "a", "(A)", "A."; or "A. near", the letter with the option's words.
        label = re.fullmatch(r"\W*([A-Za-z])\W*", text) or re.match(r"\W*([A-Za-z])\s*[.:)\]]", text)
        # A letter beyond the options' own ("X" of three) may be one's words: options can be letters themselves.
        if label and (not choices or label[1].upper() in ascii_uppercase[: len(choices)]):
            letter = label[1].upper()
            # Options ["B", "A"], answer "A": the first option by its letter, the second by its words.
            if text in choices and choices[ascii_uppercase.index(letter)] != text:
                raise self.problem(
                    column, f"holds {text!r}, one option's letter and another's words: give a letter as (A)"
                )
            return letter
        # Two options of the same words: these don't say which.
        if plain.count(text.casefold()) == 1:
            return ascii_uppercase[plain.index(text.casefold())]
        raise self.problem(
            column, f"holds {text[:80]!r}, which is none of the {len(choices)} options: give its letter or words"
        )


def _is_empty(value) -> bool:
    """Also NaN, which is what pandas writes for an empty cell."""
    # Only NaN differs from itself.
    return value is None or (isinstance(value, (str, float)) and (value == "" or value != value))


def _spelling(header: str) -> str:
    """Alike for headers that look alike."""
    # "Correct Answer" and "correct_answer"; "lndex" and "index", a small L for a capital i.
    return re.sub(r"[\W_]", "", str(header).lower()).replace("l", "i").replace("1", "i")


def written_list(text: str) -> list | tuple | dict | None:
    """What a text is if it is a list or an object, in JSON or in Python; else None."""
    # JSON has double quotes; a list that Python wrote into a CSV has single ones. Neither runs anything.
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, (list, tuple, dict)):
            return value
    return None


def _parse_list(text: str):
    value = written_list(text)
    if value is not None:
        return value
    return read_options(text) or [line.strip() for line in text.split("\n") if line.strip()]


def read_rows(folder: Path, files: Sequence[Path], image_folder: Path | None = None) -> tuple[list[Row], Sequence]:
    """All rows, and each one's image: a source of `open_image`, or None where the row has none.

    ValueError for an image outside of `folder` (or of `image_folder`, where the files' paths begin if it is given).
    """
    rows = []
    images = []
    for file in files:
        # Parquet files have their images inside; the others name them, or have them in base64.
        if file.suffix == ".parquet":
            of_file, its_images = _parquet(file)
        else:
            of_file = [row for row in _text_rows(file) if not row.is_blank()]
            if image_folder:
                its_images = _named_images(of_file, image_folder, Path())
            else:
                its_images = _named_images(of_file, folder, file.parent.relative_to(folder))
        rows += of_file
        images += its_images
    return rows, images


def _parquet(file: Path) -> tuple[list[Row], list]:
    # Imported here: it is of the extra "eval", and takes a second.
    import datasets

    data = datasets.Dataset.from_parquet(str(file))
    pictures = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    # A copy that was saved without the type: bytes and path in a column of this name.
    pictures = pictures or [name for name in data.column_names if name == "image"]
    if not pictures:
        raise ValueError(f"{file} has no column of images: {', '.join(data.column_names)}")
    for name in pictures:
        data = data.cast_column(name, datasets.Image(decode=False))
    # Without the pictures' columns, so that reading the rows reads no image.
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
    # A parquet file's, a cell that is read now; then a TSV's in base64; a path is as it is.
    if callable(image):
        return image()
    if isinstance(image, str):
        try:
            return {"bytes": base64.b64decode(image)}
        except ValueError as error:
            raise ValueError(f"its image is neither a path nor base64 ({error}): {one_line(image)[:40]}...") from error
    return image


def _text_rows(file: Path) -> list[Row]:
    if file.suffix in (".csv", ".tsv"):
        # Images in base64 may be longer than the 131,072 characters that Python allows a field.
        csv.field_size_limit(LONGEST_CELL)
        text = _text(file)
        header = text.split("\n", 1)[0]
        delimiter = ","
        if file.suffix == ".tsv":
            delimiter = "\t"
        # Spreadsheets separate by semicolons where a comma is the decimal point.
        if delimiter not in header and ";" in header:
            delimiter = ";"
        rows = []
        # Strict, since a quotation mark that stays open would take the rows below it into its cell.
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            names = [name for name in reader.fieldnames or () if name]
            if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise ValueError(f"{file} has several columns {', '.join(map(repr, repeated))}: keep one of each name")
            # DictReader puts fields beyond the header's under None.
            for number, values in enumerate(reader, start=1):
                if None in values:
                    what = "it has more fields than the header: quote those with a comma"
                    raise ValueError(f"{file}, row {number}: {what}")
                rows.append(Row(values, file, number))
        except csv.Error as error:
            what = f"{error}: put quotation marks around the whole cell, and double those within it"
            if "field limit" in str(error):
                what = f"a cell has more than {LONGEST_CELL:,} characters: close its quotation mark, or split the file"
            raise ValueError(f"{file}, row {len(rows) + 1}: {what}") from error
        return rows
    text = _text(file)
    if file.suffix == ".json":
        content = _json(text, file, number=1)
        if not isinstance(content, list):
            raise ValueError(f"{file} must hold a list of questions")
        entries = list(enumerate(content, start=1))
    else:
        # Not `splitlines`: a question may have other line separators in it (U+2028), which JSON leaves as they are.
        lines = enumerate(text.split("\n"), start=1)
        entries = [(number, _json(line, file, number)) for number, line in lines if line.strip()]
    for number, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{file}, row {number}: it must be an object of columns, not {str(entry)[:80]!r}")
    return [Row(entry, file, number) for number, entry in entries]


def _text(file: Path) -> str:
    try:
        # Excel begins UTF-8 files with a byte order mark, which would be part of the first header.
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no text in UTF-8 ({error.reason} at byte {error.start}): save it as such"
        ) from error


def _json(text: str, file: Path, number: int):
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, row {number}: no JSON: {error}") from error
    # Half of a pair can be written ("\ud83d"), though no tokenizer takes it.
    if "\\ud" in text.lower() and re.search("[\ud800-\udfff]", json.dumps(content, ensure_ascii=False)):
        raise ValueError(f"{file}, row {number}: it has half of a character (a lone surrogate): write it anew")
    return content


def _named_images(rows: Sequence[Row], folder: Path, place: Path) -> list:
    """Paths that are named, beginning at `place` in `folder`; MMVP's by its index; or a TSV's images in base64."""
    by_index = {}
    for row in rows:
        index = row.get("index")
        if index is not None:
            by_index[str(index)] = row
    images = []
    for row in rows:
        name = row.get(*IMAGE_COLUMNS)
        if isinstance(name, list):
            # Of several images none is taken: the question then is one without a readable image.
            if len(name) == 1:
                name = name[0]
            else:
                name = None
        if isinstance(name, dict):
            # As Hugging Face's data sets write one.
            name = name.get("path")
        # MMVP's table doesn't name its images: their numbers are its rows'.
        if name is None and row.file.name == "Questions.csv":
            name = f"MMVP Images/{row['index']}.jpg"
        elif name is not None and row.file.suffix == ".tsv":
            name = _image_of_its_row(row, name, by_index)
            if name is not None and _is_base64(name):
                images.append(name)
                continue
        if name is None:
            images.append(None)
        else:
            try:
                images.append(inside(folder, place / str(name)))
            except ValueError as error:
                raise ValueError(f"{row.file}, row {row.number}: its image: {error}") from error
    return images


def _image_of_its_row(row: Row, cell: str, by_index: dict[str, Row]) -> str | None:
    """A TSV's cell of an image, or what it stands for: MMBench's rows about one image have it once, in one of them,
    and its index in the others."""
    if _is_base64(cell):
        return cell
    if cell in by_index:
        return by_index[cell].get(*IMAGE_COLUMNS)
    # A file would have an ending.
    if cell.isdecimal():
        raise row.problem("image", f"holds {cell!r}: no row has this index")
    return cell


def _is_base64(cell: str) -> bool:
    # Its letters have no period among them, so that nothing in base64 ends like an image's name.
    return len(cell) >= SHORTER_THAN_AN_IMAGE and Path(cell).suffix.lower() not in IMAGE_ENDINGS
