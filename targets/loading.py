"""Models from folders and from the Hub: whole, or refused in one line that says what to do.

Teachers, vision towers, language models and checkpoints are all loaded through `load_whole`.
"""

import json
import pickle  # its error alone
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (of httpx)
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from .files import read_object
from .weights import load_pretrained

LFS_POINTER = b"version https://git-lfs"
ZIP = b"PK\x03\x04"  # how a file of torch.save begins
# Files of these names are read whenever a model, a processor or an adapter is loaded.
SETTINGS = ("config.json", "*_config.json", "*.index.json", "tokenizer.json", "vocab.json", "added_tokens.json")
TEXTS = ("tokenizer.model", "merges.txt", "*.jinja")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # transformers takes the first that is there
MORE_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "predictors.safetensors")
UNREACHABLE = (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# Files


def check_file(file: Path) -> None:
    """ValueError that names a file which is a Git LFS pointer, cut off or no JSON."""
    with file.open("rb") as opened:
        beginning = opened.read(len(LFS_POINTER))
    if beginning == LFS_POINTER:
        raise ValueError(f"{file} is a Git LFS pointer, its content was not fetched: run `git lfs pull` in its folder")
    remedy = "it is damaged or half fetched: fetch it again (`git lfs pull`, or a new download)"
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: {remedy}; {one_line(error)}") from error
    is_cut = beginning.startswith(ZIP) and not zipfile.is_zipfile(file)
    if is_cut or not beginning:
        raise ValueError(f"{file}: {remedy}")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: one, or those that an index names; none if there are none.
    ValueError for an index that names a file which is missing or lies elsewhere."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            check_file(index)
            return indexed_files(index)
    return []


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names; ValueError if one is missing or lies outside its folder."""
    fields = json.loads(index.read_text(encoding="utf-8"))
    shards = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} has no weight_map of names to files: fetch it again")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{index} names {name}, which is not in its folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        listed = ", ".join(missing[:5])
        raise ValueError(f"{index.parent} lacks {listed}, which {index.name} names: fetch the whole checkpoint")
    return [index.parent / name for name in names]


def check_folder(folder: Path, weights: bool = True) -> None:
    """ValueError that names a file of a model's, processor's or adapter's folder which can't be read; fast.
    `weights`: whether they will be read."""
    files = [file for pattern in (*SETTINGS, *TEXTS) for file in sorted(folder.glob(pattern))]
    if weights:
        files += [folder / name for name in MORE_WEIGHTS if (folder / name).is_file()]
        files += weight_files(folder)
    for file in files:
        check_file(file)


def read_json_object(file: Path) -> dict:
    """ValueError that names a file which holds something else or can't be read."""
    check_file(file)
    return read_object(file)


def read_safetensors(file: str | Path) -> dict[str, Tensor]:
    """safetensors' `load_file`; ValueError that names a file which is missing, a Git LFS pointer or cut off."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is not there")
    check_file(file)
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def read_bin(file: str | Path) -> dict[str, Tensor]:
    """A file of torch.save, by `weights_only`: no code of a pickle runs. ValueError that names a file which would need
    some, holds no tensors, or can't be read."""
    check_file(Path(file))
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file}: {one_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} must hold tensors by name")
    return tensors


# Places


def no_network(place: str | Path) -> str:
    fetch = f"fetch it where there is a network (`hf download {place}`)"
    return f"there is no folder {place} here, and the Hub can't be reached: correct the path, or {fetch}"


def explain(error: BaseException, place: str | Path) -> str:
    """One line on why nothing could be loaded from `place`, and what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return f"{place} is gated: ask for access on its page on the Hub, then run `hf auth login`"
        if isinstance(cause, RepositoryNotFoundError):
            remedy = "correct the name, or run `hf auth login` if it is private"
            return f"there is no folder {place} here, and no such repository on the Hub: {remedy}"
        if isinstance(cause, RevisionNotFoundError):
            return f"{place} has no such revision on the Hub: correct it"
        if isinstance(cause, UNREACHABLE) or (
            isinstance(cause, HTTPError) and not isinstance(cause, (HfHubHTTPError, EntryNotFoundError))
        ):
            return no_network(place)
    text = one_line(error)
    if Path(place).is_dir():  # transformers names pages on the Hub that a folder doesn't have
        sentences = re.split(r"(?<=\.) ", text)
        text = " ".join(sentence for sentence in sentences if "://" not in sentence) or text
    if text.startswith(str(place)):
        return text
    return f"{place}: {text}"


def check_place(name: str | Path) -> None:
    """ValueError for what is neither a folder nor a repository on the Hub that can be reached or was fetched."""
    if Path(name).is_dir():
        return
    name = str(name)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"there is no folder {name} (and a name on the Hub is owner/name)") from error
    if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")).is_dir():
        return
    if constants.is_offline_mode():
        raise ValueError(no_network(name))
    try:
        # Asked once: a download would try again for half a minute before it says that there is no network.
        HfApi().model_info(name, timeout=10)
    except (HTTPError, OSError) as error:
        raise ValueError(explain(error, name)) from error


@contextmanager
def loading_from(place: str | Path, subfolder: str = "", weights: bool = True) -> Iterator[None]:
    """Whatever is wrong with `place`, a folder or a name on the Hub, is a ValueError of one line. A folder's files
    (with or without its `weights`) are looked at before anything slow begins."""
    check_place(place)
    if Path(place).is_dir():
        check_folder(Path(place) / subfolder, weights)
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError) as error:
        check_all_files(place)
        raise ValueError(f"{place} has a damaged file of weights, fetch it again: {one_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ValueError(explain(error, place)) from error
    except RuntimeError as error:
        # transformers' report lists the names.
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"{place} has weights of other shapes than its config.json says: fetch it again") from error


def check_all_files(place: str | Path) -> None:
    """ValueError that names a damaged file anywhere in a folder, or in what was fetched of a repository."""
    folder = Path(place)
    if not folder.is_dir():
        names = ("config.json", "model_index.json", "adapter_config.json")
        fetched = [file.parent for name in names if (file := find_file(place, name)) is not None]
        if not fetched:
            return
        folder = fetched[0]
    for suffix in (".json", ".safetensors", ".bin"):
        for file in sorted(folder.rglob(f"*{suffix}")):
            check_file(file)


def find_file(place: str | Path, name: str) -> Path | None:
    """A file of a folder, or of a repository (then it is fetched); None if there is none of this name."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(str(place), name, **options)
    return Path(file) if file else None


def load_whole(model_class, path, unused: Sequence[str] = (), hint: str = "", **kwargs) -> PreTrainedModel:
    """
    The model of `load_pretrained` (which see for `kwargs`), all of whose weights come from the checkpoint.

    `unused`: beginnings of names that checkpoints may lack, since features need none of them; they become 0.
    `hint`: what else to do if a weight is missing.
    Raises ValueError, one line, for missing weights (which would be random) and whatever `loading_from` finds.
    """
    with loading_from(path, kwargs.get("subfolder") or ""):
        model, report = load_pretrained(model_class, path, **kwargs)
    missing = sorted(report["missing_keys"])
    needed = [name for name in missing if not name.startswith(tuple(unused))]
    if needed:
        listed = ", ".join(needed[:5])
        more = f" and {len(needed) - 5} more" if len(needed) > 5 else ""
        remedy = f"give a whole checkpoint, with the weights of the whole model{hint}"
        raise ValueError(f"{path} has no weights for {type(model).__name__}'s {listed}{more}: {remedy}")
    for name in missing:
        model.state_dict()[name].zero_()
    return model
