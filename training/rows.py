"""Rows `{"id", "images", "messages"}` (TRL's columns) out of LLaVA's JSON, TRL-style JSON or a Hugging Face dataset.

A row that can't be read comes as `{"id", "bad_row": BadRow}`: who takes it decides whether to drop it or to stop.
"""

import copy
import hashlib
import itertools
import os
import random
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from huggingface_hub import constants
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.utils import logging

from ..targets.images import IMAGE_ENDINGS, ImageError, open_image, source_name
from ..targets.loading import check_place
from .json_rows import JsonRows

logger = logging.get_logger(__name__)

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
KINDS = {str: "a text", list: "a list", dict: "an object", (str, list): "a text or a list of parts"}
# What a turn may have beside its text that the model would not learn, or would be asked to do without.
NOT_TEXT = ("tool_calls", "reasoning_content", "thinking")
# Kind -> what a report calls it.
PROBLEMS = {
    "malformed": "not in a known form",
    "outside": "image outside image_folder",
    "missing": "image missing",
    "undecodable": "image undecodable",
    "unsupervised": "no supervised token",
    "too_long": "longer than max_length",
    "target": "no usable target",
}
# Endings of files that `datasets` reads.
DATA_ENDINGS = {".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tar", ".zip"}
# The user's words behind an image that comes alone.
PROMPT = "Describe the image."
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# base64 of PNG's, JPEG's, GIF's and WebP's first bytes, or of any; no path has a name of 1,000 characters.
INLINE = re.compile(r"data:|iVBORw0KGgo|/9j/|R0lGOD|UklGR|[A-Za-z0-9+/=\s]{1000}")
# Characters of a stranger's text in a message.
LONGEST = 400


def brief(value) -> str:
    """The value as one line of text, its middle left out if it is long: an image as base64, a whole chat."""
    text = str(value)
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} ... {text[-half:]} ({len(text):,} characters)"
    return " ".join(text.split())


class BadRow(ValueError):
    """A row that can't be trained on, and why; `kind` is one of `PROBLEMS`."""

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = brief(reason)

    def __str__(self) -> str:
        return self.reason


# What a row in no known form raises; a BadRow is a ValueError.
BAD_ROW_ERRORS = (AttributeError, KeyError, RecursionError, TypeError, ValueError)


class ImageFolder(Sequence):
    """The images in a folder and the folders in it, as rows in TRL's form that have no answer: nothing but embedding
    losses learns from them. Hidden files are left out.

    ValueError if there is no image; files that are none, by their endings, are counted in the log.
    """

    def __init__(self, folder: str | Path):
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        # Hidden is what the folder hides; the folder itself may lie in a hidden one.
        names = [path.relative_to(folder) for path in files]
        # Sorted: a folder lists its files in another order on another machine, and rows are known by their number.
        shown = sorted(str(name) for name in names if not _is_hidden(name))
        self.names = [name for name in shown if Path(name).suffix.lower() in IMAGE_ENDINGS]
        if not self.names:
            endings = ", ".join(sorted(IMAGE_ENDINGS))
            what = f"{folder} has no images ({endings}) and no data files that `datasets` reads"
            raise ValueError(f"{what}: give data, a folder of images, rows as JSON or a Hugging Face dataset")
        others = len(shown) - len(self.names)
        if others:
            logger.warning(f"{folder}: {others} files that are no images, by their endings, are left out")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        return {"id": name, "images": [name], "messages": [{"role": "user", "content": content}]}


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def has_data_files(folder: str | Path) -> bool:
    """Whether something in the folder is for `datasets` to read."""
    return any(path.suffix.lower() in DATA_ENDINGS for path in Path(folder).rglob("*"))


def has_one_split(data: str) -> bool:
    """Whether it is a file of rows or a folder of images, which have no splits to choose from."""
    if data.endswith((".json", ".jsonl")):
        return True
    return os.path.isdir(data) and not has_data_files(data)


class Rows(Dataset):
    """The rows of a sequence of dicts in one of two forms (`read_row`).

    Images stay what they are, paths below `image_folder` or the `{"bytes", "path"}` of a Hugging Face dataset, until
    the collator, in a loader's worker, opens them. `lengths` (tokens) and `has_image` are known after `keep`.
    """

    def __init__(self, source: Sequence[dict], image_folder: str | Path):
        self.source = source
        self.image_folder = os.path.abspath(image_folder)
        # Those of `source` that are left: rows are dropped and split off without a copy of them.
        self.indices = np.arange(len(source))
        self.lengths: np.ndarray | None = None
        self.has_image: np.ndarray | None = None
        self.other_image: dict[str, str] | None = None

    @property
    def has_text(self) -> bool:
        """Whether there are answers to learn; a folder of images has none."""
        return not isinstance(self.source, ImageFolder)

    def names_images(self) -> bool:
        """Whether some row has an image. Reads up to the first that has one, all rows if they are text alone."""
        for sample in self.samples(np.arange(len(self))):
            if isinstance(sample, dict) and (sample.get("images") or sample.get("image")):
                return True
        return False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict:
        index = int(self.indices[i])
        try:
            sample = self.source[index]
        except (RecursionError, ValueError) as error:
            # Nested too deeply, a number of too many digits.
            return {"id": str(index), "bad_row": BadRow("malformed", f"it can't be parsed: {error}")}
        row = read_row(sample, index, self.image_folder)
        if not self.has_text:
            row["has_text"] = False
        if self.other_image is not None and "images" in row:
            row["target_images"] = [self.other_image[path] for path in row["images"]]
        return row

    def keep(self, chosen: np.ndarray, lengths: np.ndarray, has_image: np.ndarray) -> None:
        """Drops the rows where `chosen` is False; all three have one element for each row there is now."""
        self.indices = self.indices[chosen]
        self.lengths = lengths[chosen]
        self.has_image = has_image[chosen]

    def subset(self, chosen: np.ndarray) -> "Rows":
        """The rows where `chosen` is True, of those that there are now, as `Rows` of their own."""
        part = copy.copy(self)
        part.indices = self.indices[chosen]
        return part

    def split_by_image(self, share: float, seed: int) -> tuple["Rows", "Rows"]:
        """The rows without and with a random `share` of them, no image being in both. Rows that show an image
        together, also by way of other rows, stay together. ValueError if that leaves one side empty."""
        groups = self._groups_by_image()
        rng = np.random.default_rng(seed)
        wanted = max(1, round(share * len(self)))
        chosen = np.zeros(len(self), dtype=bool)
        # Groups in a random order, as long as they fit in: the share is met from below.
        for i in rng.permutation(len(groups)):
            if chosen.sum() + len(groups[i]) <= wanted:
                chosen[groups[i]] = True
        # All groups are larger than the share: then the smallest one.
        if not chosen.any():
            chosen[min(groups, key=len)] = True
        if chosen.all():
            raise ValueError(f"eval_data {share}: all {len(self)} rows share images, give a file of other rows")
        return self.subset(~chosen), self.subset(chosen)

    def _groups_by_image(self) -> list[list[int]]:
        """The rows, by their images: each group has all rows of its images."""
        # Union-find: `first` leads from a row to another one of its group, in the end to the one that stands for it.
        row_of = {}
        first = list(range(len(self)))

        def root(i: int) -> int:
            while first[i] != i:
                # Halving the way, so that the next search is shorter.
                first[i] = first[first[i]]
                i = first[i]
            return i

        for i in range(len(self)):
            for image in self[i].get("images", ()):
                key = image
                if not isinstance(image, str):
                    key = _content_key(image)
                first[root(i)] = root(row_of.setdefault(key, i))
        groups = defaultdict(list)
        for i in range(len(self)):
            groups[root(i)].append(i)
        return list(groups.values())

    def samples(self, indices: Sequence[int] | np.ndarray) -> Iterator[dict | None]:
        """What the data have of those rows, unchecked; None for what can't be parsed."""
        source_indices = self.indices[indices]
        if isinstance(self.source, JsonRows):
            return self.source.read(source_indices)
        return (self.source[i] for i in source_indices.tolist())

    def sources(self) -> "Sources":
        """Every image, each file once, in the order of the rows. What the rows say is not looked at."""
        return Sources(self, self.image_indices())

    def image_indices(self) -> np.ndarray:
        """(row, number of the image in it) of every image, each file once: (N, 2). Reads all rows."""
        numbers = []
        seen = set()
        bad_rows = 0
        for i, sample in enumerate(self.samples(np.arange(len(self)))):
            try:
                images = row_images(sample, self.image_folder)
            except BAD_ROW_ERRORS:
                bad_rows += 1
                continue
            for n, image in enumerate(images):
                if isinstance(image, str):
                    if image in seen:
                        continue
                    seen.add(image)
                # Flat: a tuple for each of millions of images would take twice the memory.
                numbers += (i, n)
        if bad_rows:
            logger.warning(f"{bad_rows} rows can't be read and give no image: `ola-vlm check-data` names them")
        return np.array(numbers, dtype=np.int64).reshape(-1, 2)

    def drop_images(self, sources: "Sources", failed: Collection[int]) -> int:
        """Drops the rows with one of those `sources`, given by their indices (`sources` is of no use afterwards), and
        says how many they are."""
        bad = set(sources.indices[list(failed), 0].tolist())
        # A file may lie in several rows, of which `sources` knows the first.
        images = [sources[i] for i in failed]
        files = {image for image in images if isinstance(image, str)}
        if files:
            for i in range(len(self)):
                names = [image for image in self[i].get("images", ()) if isinstance(image, str)]
                if not files.isdisjoint(names):
                    bad.add(i)
        fine = ~np.isin(np.arange(len(self)), list(bad))
        if not fine.any():
            raise ValueError("no row is left whose images have targets")
        self.indices = self.indices[fine]
        if self.lengths is not None:
            self.lengths = self.lengths[fine]
        if self.has_image is not None:
            self.has_image = self.has_image[fine]
        return len(bad)

    def shuffle_targets(self, seed: int) -> None:
        """The control: every image gets the targets of another one, by one fixed cycle through all images."""
        # One cycle through all of them: none is left with its own targets, and each is used once.
        paths = list(self.sources())
        if not all(isinstance(path, str) for path in paths):
            raise ValueError("these images lie in the rows: shuffle_targets needs image files")
        if len(paths) < 2:
            raise ValueError(f"shuffle_targets needs at least 2 different images, the data has {len(paths)}")
        random.Random(seed).shuffle(paths)
        self.other_image = dict(zip(paths, paths[1:] + paths[:1], strict=True))


class Sources(Sequence):
    """The images of rows as they hold them: a path, or `{"bytes", "path"}`, read when it is asked for. A slice of it
    is one, too, and what an array of numbers chooses.

    Args:
        indices: (row, number of the image in it) of each, (N, 2).
    """

    def __init__(self, rows: Rows, indices: np.ndarray):
        self.rows = rows
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i) -> Any:
        if isinstance(i, (slice, np.ndarray)):
            return Sources(self.rows, self.indices[i])
        (image,) = Sources(self.rows, self.indices[[i]])
        return image

    def __iter__(self) -> Iterator[str | dict | Image.Image]:
        samples = self.rows.samples(self.indices[:, 0])
        for sample, (row, n) in zip(samples, self.indices.tolist(), strict=True):
            image = row_images(sample, self.rows.image_folder)[n]
            if isinstance(image, dict):
                image = {**image, "path": f"{n + 1} of row {_row_id(sample, int(self.rows.indices[row]))}"}
            yield image


class StreamRows(IterableDataset):
    """The same for rows that come one after the other, of unknown number (a streaming Hugging Face dataset), over and
    over: the trainer takes it for one epoch of max_steps, so a resumed run finds its place by counting batches.

    `shuffle_seed`: another order in every pass, the same on all ranks.
    """

    has_text = True

    def __init__(self, source: Any, image_folder: str | Path, shuffle_seed: int | None = None):
        self.source = source
        self.image_folder = os.path.abspath(image_folder)
        self.shuffle_seed = shuffle_seed

    def names_images(self) -> bool:
        """Taken for granted: a stream isn't looked through."""
        return True

    def __iter__(self) -> Iterator[dict]:
        # Each worker has its own files of the data set, if there are enough, and counts its own rows.
        worker = get_worker_info()
        prefix = ""
        if worker:
            prefix = f"{worker.id}."
        return (read_row(sample, f"{prefix}{i}", self.image_folder) for i, sample in enumerate(self._samples()))

    def _samples(self) -> Iterator[dict]:
        for number in itertools.count():
            source = self.source
            if self.shuffle_seed is not None:
                # Of a stream only what a buffer holds can be shuffled, and the order of its files.
                source = source.shuffle(self.shuffle_seed + number, buffer_size=1000)
            sample = None
            for sample in source:
                yield sample
            # A worker without a file of its own would go round forever.
            if sample is None:
                return


def load_rows(
    data: str,
    image_folder: str | Path | None = None,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    shuffle_seed: int | None = None,
) -> Rows | StreamRows:
    """Rows of a .json or .jsonl file; of the images alone of a folder without data files (`ImageFolder`); else of what
    `datasets.load_dataset(data, config, split=split)` finds: a folder of parquet files or a name on the Hub.
    `image_folder`: where image paths begin; the data's own folder by default, and always for a folder of images.
    `shuffle_seed`: a stream's rows are shuffled, 1,000 at a time.
    """
    # Not through `datasets`, which parses such a file as a whole, in memory, and writes a copy of it first.
    if data.endswith((".json", ".jsonl")):
        if not os.path.isfile(data):
            raise ValueError(f"there is no file {data}: give data, rows as JSON or a Hugging Face dataset")
        if streaming:
            raise ValueError(f"{data} is read row by row anyway: streaming is for Hugging Face datasets")
        if image_folder and not os.path.isdir(image_folder):
            raise ValueError(
                f"there is no folder {image_folder}: give image_folder, where the rows' image paths begin"
            )
        found = JsonRows(data)
        if len(found) == 0:
            raise ValueError(f"{data} has no rows")
        # Such as {"data": [...]}: a file that wraps its rows.
        if len(found) == 1:
            _check_alone(next(found.read([0])) or {}, data)
        return Rows(found, image_folder or Path(data).parent)
    if os.path.isfile(data):
        raise ValueError(f"{data} is no .json or .jsonl file: write its rows as one, or give the folder of a data set")
    if os.path.isdir(data) and not has_data_files(data):
        if streaming:
            raise ValueError(f"{data} is a folder of images, which is no stream: leave out streaming")
        return Rows(ImageFolder(data), data)
    check_data_name(data)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{data} is no .json or .jsonl file, and a data set needs `pip install datasets`") from error
    found = datasets.load_dataset(data, config, split=split, streaming=streaming)
    # Decoded where a damaged one can be dropped: in the collator.
    as_bytes = datasets.Image(decode=False)
    for name, feature in (found.features or {}).items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, as_bytes)
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            found = found.cast_column(name, datasets.List(as_bytes))
    if image_folder is None:
        image_folder = data
        if not os.path.isdir(data):
            image_folder = _cache_of_files(None if streaming else found)
    if not streaming:
        return Rows(cast(Sequence[dict], found), image_folder)
    return StreamRows(found, image_folder, shuffle_seed)


def _cache_of_files(found: Any) -> str:
    """The cache in which the image files of a data set on the Hub lie: the Hub's own, or that of `datasets` where it
    has unpacked an archive. The first row tells."""
    from datasets import config

    caches = [os.path.abspath(constants.HF_HUB_CACHE), os.path.abspath(config.HF_DATASETS_CACHE)]
    if found is not None and len(found) > 0:
        images = found[0].get("images") or found[0].get("image") or []
        if not isinstance(images, list):
            images = [images]
        paths = [image["path"] for image in images if isinstance(image, dict) and image.get("path")]
        for cache in caches:
            if any(_lies_in(os.path.dirname(path), cache) for path in paths):
                return cache
    return caches[0]


def check_data_name(data: str) -> None:
    """ValueError for what is neither here nor a data set on the Hub that can be reached or was fetched. `datasets`
    would try for half a minute before it says so."""
    if "://" not in data and not _has_tables(data):
        check_place(data, repo_type="dataset")


def _has_tables(data: str) -> bool:
    """Whether `datasets` has written the tables of this name, from which it reads without a network."""
    # Asked for without `datasets`, which may not be installed.
    written = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    return (written / data.replace("/", "___")).is_dir()


def _check_alone(sample: dict, data: str) -> None:
    """ValueError for a file whose one object holds the rows."""
    holders = [name for name, value in sample.items() if isinstance(value, list) and len(value) > 0]
    if "conversations" in sample or "messages" in sample:
        return
    for name in holders:
        if all(isinstance(row, dict) for row in sample[name]):
            raise ValueError(
                f"{data} is one object, which has {len(sample[name])} rows in {name!r}: write that list alone"
            )


def read_row(sample: dict, index: int | str, image_folder: str) -> dict:
    """`{"id", "images", "messages"}` of a row in one of these forms, or `{"id", "bad_row"}`:

    - LLaVA's `{"id", "image": path or paths, "conversations": [{"from": "human" or "gpt", "value": text}]}`, whose
      `<image>` are moved to the front of their turn;
    - TRL's `{"images", "messages": [{"role": "user" or "assistant", "content": text or parts}]}`, whose images stand
      before the first question if no part says where.
    """
    name = str(index)
    try:
        if not isinstance(sample, Mapping):
            raise BadRow("malformed", f"a row is {sample!r:.50}: give an object")
        # First: what is wrong with the rest is said under this name.
        name = _row_id(sample, index)
        images = row_images(sample, image_folder)
        return {"id": name, "images": images, "messages": _messages(sample, len(images))}
    except BadRow as bad_row:
        return {"id": name, "bad_row": bad_row}
    except KeyError as error:
        return {"id": name, "bad_row": BadRow("malformed", f"a turn or a content part has no {error}")}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        return {"id": name, "bad_row": BadRow("malformed", f"{type(error).__name__}: {error}")}


def _row_id(sample: Any, index: int | str) -> str:
    if sample.get("id") is None:
        return str(index)
    return str(sample["id"])


def row_images(sample: Any, image_folder: str) -> list[str | dict | Image.Image]:
    """The images of a row, whatever else it has: paths made absolute, or as they are. BadRow for one that isn't."""
    found = sample.get("images") or sample.get("image") or []
    if not isinstance(found, list):
        found = [found]
    return [_source(image, image_folder) for image in found]


def _source(image, folder: str) -> str | dict | Image.Image:
    """The image as a row holds it: a path is checked, and made absolute."""
    if not isinstance(image, str):
        if isinstance(image, Image.Image) or (isinstance(image, dict) and isinstance(image.get("bytes"), bytes)):
            return image
        if isinstance(image, dict):
            image = image.get("path")
    if not isinstance(image, str):
        raise BadRow("malformed", f"an image is {image!r:.50}: give its path, or its bytes in a data set")
    # What begins with "/" stays as it is; for the others, of which there are millions, this is faster than `join`.
    path = f"{folder}/{image}"
    if image.startswith("/"):
        path = os.path.join(folder, image)
    parent = path.rpartition("/")[0]
    # An ordinary file lies where its folder does: of millions of images a few folders have to be resolved.
    if not (_is_ordinary_file(path) and _lies_in(parent, folder)):
        if INLINE.match(image):
            raise BadRow(
                "malformed", f"an image is inline, as text ({image:.30}...): save it as a file, give its path"
            )
        if image.startswith("hf://"):
            raise BadRow("malformed", f"an image is a file on the Hub, {image}: leave out streaming, which fetches it")
        if URL.match(image):
            raise BadRow("malformed", f"an image is a URL, {image}: nothing is downloaded, give the path of a file")
        # Links are resolved: one may lead out of the folder, to any file of the machine.
        real = os.path.realpath(path)
        # Past the cache, which is for folders: single files would drive these out.
        if not _lies_in.__wrapped__(real, folder):
            raise BadRow("outside", f"image {path} lies outside image_folder {folder}")
        if not os.path.isfile(real):
            raise BadRow("missing", f"there is no image {path}")
    return os.path.normpath(path)


def _is_ordinary_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        # Nothing there; a name that can't be one.
        return False


@lru_cache(maxsize=1 << 16)
def _lies_in(place: str, folder: str) -> bool:
    real = os.path.realpath(place)
    real_folder = os.path.realpath(folder)
    return os.path.commonpath([real, real_folder]) == real_folder


def _messages(sample: dict, num_images: int) -> list[dict]:
    is_llava = sample.get("conversations") is not None
    if not is_llava and sample.get("messages") is None:
        raise BadRow("malformed", f"neither LLaVA's conversations nor TRL's messages, but {sorted(sample)}")
    # What the two forms call the same.
    turns = "messages"
    speaks = "role"
    says = "content"
    if is_llava:
        turns = "conversations"
        speaks = "from"
        says = "value"
    messages = []
    placeholders = 0
    for turn in _checked(sample[turns], list, turns):
        speaker = _checked(turn, dict, "a turn")[speaks]
        if _checked(speaker, str, speaks) not in ROLES:
            raise BadRow("malformed", f"unknown speaker {speaker!r}, not one of {list(ROLES)}")
        unused = [name for name in NOT_TEXT if turn.get(name)]
        if unused:
            raise BadRow("malformed", f"a turn has {unused[0]}, which would be left out: write it into the text")
        parts = _parts(_checked(turn[says], (str, list), says))
        count = sum(part["type"] == "image" for part in parts)
        if count and ROLES[speaker] != "user":
            raise BadRow("malformed", "<image> may stand in the human's turns only")
        messages.append({"role": ROLES[speaker], "content": parts})
        placeholders += count
    questions = [message for message in messages if message["role"] == "user"]
    # TRL's rows may list images without saying where they stand: before the first question.
    if not is_llava and not placeholders and questions:
        questions[0]["content"][:0] = [{"type": "image"}] * num_images
    elif placeholders != num_images:
        where = ""
        if not is_llava:
            where = ': the row lists their files under "images"'
        raise BadRow("malformed", f"{placeholders} <image> placeholders for {num_images} images{where}")
    return messages


def _checked(value, kind: type | tuple[type, ...], name: str):
    """The value, if it is of the kind. BadRow that says what it is."""
    if not isinstance(value, kind):
        found = f"{value!r:.50}"
        if value is None:
            found = "null"
        raise BadRow("malformed", f"{name} is {found}: give {KINDS[kind]}")
    return value


def _parts(content: str | list[dict]) -> list[dict]:
    # LLaVA's: images go to the front of their turn, wherever the text has them.
    if isinstance(content, str):
        text = {"type": "text", "text": content.replace("<image>", "").strip()}
        return [{"type": "image"}] * content.count("<image>") + [text]
    parts = []
    for part in content:
        kind = _checked(part, dict, "a content part")["type"]
        if kind == "image_url":
            where = 'list its file under "images", the part is {"type": "image"}'
            raise BadRow("malformed", f"a content part is an image_url: {where}")
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and "<image>" not in _checked(part["text"], str, "the text of a content part"):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise BadRow("malformed", f"content part {part!r:.100}: parts are images, or texts without <image>")
    return parts


def _content_key(image: dict | Image.Image) -> str:
    """Of an image that lies in its row."""
    if isinstance(image, dict):
        content = image["bytes"]
    else:
        content = image.tobytes()
    return hashlib.sha256(content).hexdigest()


def open_source(image: str | dict | Image.Image) -> Image.Image:
    """The image of a row in RGB (`open_image`); BadRow if that can't be done."""
    try:
        return open_image(image)
    except FileNotFoundError as error:
        raise BadRow("missing", f"there is no image {source_name(image)}") from error
    except ImageError as error:
        raise BadRow("undecodable", f"image {error}") from error
    except IsADirectoryError as error:
        raise BadRow("undecodable", str(error)) from error
    except OSError as error:
        # No right to read it.
        raise BadRow("undecodable", f"image {source_name(image)}: {error}") from error
