"""The objects of a JSON file, each read when it is asked for: a file of gigabytes is never in memory as a whole."""

import codecs
import json
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

# Bytes of a JSON file that are parsed at once: 16 MB.
CHUNK = 1 << 24
# Brackets of JSON, and whole strings, so that brackets in a text don't count.
BRACKETS = re.compile(r'"(?:[^"\\]|\\.?)*(?:"|\Z)|[{}\[\]]', re.DOTALL)
# What stands between objects: white space, commas, an array's brackets; it may be empty.
BETWEEN = re.compile(r"[ \t\r\n,\[\]]*")
# An int of thousands of digits is refused when it is a row: here it would end the whole file.
SCAN = json.JSONDecoder(parse_int=float).raw_decode


class JsonRows(Sequence):
    """The objects of a JSON array or of JSON lines, each read from the file when it is asked for.

    Only their positions are in memory, 16 bytes a row; the file's pages are shared by all processes of a machine.
    """

    def __init__(self, path: str | Path):
        self.path = path
        # An array, not a list: loaders' workers share it, and copy nothing.
        self.spans = np.array(list(_object_spans(path)), dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict:
        start, stop = map(int, self.spans[index])
        # Opened each time: workers that were forked would share an open file's position.
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(stop - start))

    def read(self, indices: Sequence[int] | np.ndarray) -> Iterator[dict | None]:
        """Those rows, one after the other, with the file opened once; None for one that can't be parsed."""
        spans = self.spans[indices].tolist()
        # An empty file can't be mapped.
        if not spans:
            return
        # Mapped, a row is taken without a call to the system; the next one asked for may lie anywhere.
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), length=0, access=mmap.ACCESS_READ) as text:
            for start, stop in spans:
                yield _parsed(text[start:stop])


def _parsed(text: bytes) -> dict | None:
    """A row; None if it can't be parsed."""
    # Three times as fast as `json`.
    try:
        return orjson.loads(text)
    except ValueError:
        pass
    # `json` takes what orjson refuses: NaN, and half a surrogate pair.
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        # Nested too deeply, a number of too many digits.
        return None


def _object_spans(path: str | Path) -> Iterator[tuple[int, int]]:
    """(start, stop) in bytes of every object of the file, read in pieces. ValueError for what is no object."""
    # What is read and not yet a row.
    text = ""
    with open(path, "rb") as file:
        # Where a row begins, in bytes of the file. Some editors put a byte order mark in front, which is no JSON.
        offset = 3
        if file.read(3) != codecs.BOM_UTF8:
            offset = file.seek(0)
        for piece in _decoded_pieces(file):
            text += piece
            # The same place as `offset`, in the text.
            position = 0
            while True:
                gap = BETWEEN.match(text, position)
                assert gap is not None
                offset += gap.end() - position
                position = gap.end()
                if text[position : position + 1] not in ("{", ""):
                    begin = text[position : position + 20]
                    raise ValueError(f"{path}, byte {offset}: {begin!r} is not an object, not a row")
                end = _end_of_object(text, position)
                # This piece is done; the object goes on in the next one.
                if end is None:
                    break
                size = _byte_length(text, position, end)
                yield offset, offset + size
                offset += size
                position = end
            text = text[position:]
    if text:
        raise ValueError(f"{path}, byte {offset}: not valid JSON, or cut off: {text[:20]!r}")


def _decoded_pieces(file: BinaryIO) -> Iterator[str]:
    """The rest of a file. ValueError if it is not UTF-8."""
    # Incremental, as a piece may end within a character.
    decode = codecs.getincrementaldecoder("utf-8")().decode
    while data := file.read(CHUNK):
        try:
            yield decode(data)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name} is not UTF-8, write it so: {error}") from error


def _end_of_object(text: str, start: int) -> int | None:
    """Where the object ends that begins at `start`; None if it isn't whole."""
    try:
        _, end = SCAN(text, start)
    except json.JSONDecodeError:
        return None
    except RecursionError:
        # Too deep for a row, which is refused later; those behind it are fine.
        return _end_of_nested(text, start)
    return end


def _byte_length(text: str, start: int, stop: int) -> int:
    # Characters are bytes, or else have to be encoded to be counted.
    if text.isascii():
        return stop - start
    return len(text[start:stop].encode())


def _end_of_nested(text: str, start: int) -> int | None:
    """Where the object ends that begins at `start` and is nested too deeply for `json`; None if it isn't whole."""
    depth = 0
    for token in BRACKETS.finditer(text, start):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return None
