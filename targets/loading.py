"""Models from folders and from the Hub: whole, or refused in one line that says what to do.

Teachers, vision towers, language models and checkpoints are all loaded through `load_whole`.
"""

import json
import pickle  # its error alone
import re
import traceback
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
    StrictDataclassError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.utils.hub import cached_file

from ..files.strangers import read_object
from .weights import load_pretrained

# What stands in a file whose content Git LFS has not fetched.
LFS_POINTER = b"version https://git-lfs"
# How a file of torch.save begins.
ZIP = b"PK\x03\x04"
# Files of these names are read whenever a model, a processor or an adapter is loaded.
SETTINGS = (
    "config.json",
    "*_config.json",
    "*.index.json",
    "tokenizer.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
)
# These are not parsed, only looked at for being empty or a pointer.
TEXTS = ("tokenizer.model", "merges.txt", "*.jinja")
# transformers takes the first that is there.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Beside a model's own: of an adapter, and of predictors.
MORE_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "predictors.safetensors")
# No network, or one that the user has switched off.
# What torch says of a tensor whose sides a configuration gives.
IMPOSSIBLE_SIZE = re.compile("negative dimension|overflow")
PACKAGE = Path(__file__).parents[1]
UNREACHABLE = (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# Files


def check_file(file: Path) -> None:
    """ValueError that names a file which is a Git LFS pointer, cut off, no JSON or no file at all."""
    # A pipe would be waited for.
    if not file.is_file():
        raise ValueError(f"{file} is no file: fetch it again")
    with file.open("rb") as opened:
        beginning = opened.read(len(LFS_POINTER))
    if beginning == LFS_POINTER:
        raise ValueError(f"{file} is a Git LFS pointer, its content was not fetched: run `git lfs pull` in its folder")
    remedy = "it is damaged or half fetched: fetch it again (`git lfs pull`, or a new download)"
    try:
        if file.suffix == ".safetensors":
            # Reads the header, which must fit the file's size; no weights.
            with safe_open(file, "pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {remedy}; {one_line(error)}") from error
    # The table of a zip file stands at its end, so one that is cut off has none.
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
            return indexed_files(index)
    return []


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names; ValueError if one is missing or lies outside its folder."""
    check_file(index)
    fields = json.loads(index.read_text(encoding="utf-8"))
    shards = None
    if isinstance(fields, dict):
        shards = fields.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} has no weight_map of names to files: fetch it again")
    names = sorted(set(shards.values()))
    for name in names:
        # An index may be a stranger's: it can't have files read from elsewhere.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{index} names {name}, which is not in its folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        listed = ", ".join(missing[:5])
        raise ValueError(f"{index.parent} lacks {listed}, which {index.name} names: fetch the whole checkpoint")
    return [index.parent / name for name in names]


def check_folder(folder: Path, weights: bool = True) -> None:
    """ValueError that names a file of a model's, processor's or adapter's folder which can't be read; fast.
    `weights`: whether they will be read."""
    files = []
    for pattern in (*SETTINGS, *TEXTS):
        files += sorted(folder.glob(pattern))
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
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)


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


def no_network(place: str | Path, repo_type: str = "model") -> str:
    command = f"hf download {place}"
    if repo_type != "model":
        command += f" --repo-type {repo_type}"
    fetch = f"fetch it where there is a network (`{command}`)"
    return f"there is no folder {place} here, and the Hub can't be reached: correct the path, or {fetch}"


def explain(error: BaseException, place: str | Path, repo_type: str = "model") -> str:
    """One line on why nothing could be loaded from `place`, and what to do."""
    # Libraries wrap what happened in errors of their own: the reason is one of those below.
    causes = [error]
    while True:
        cause = causes[-1].__cause__ or causes[-1].__context__
        if cause is None or cause in causes:
            break
        causes.append(cause)
    for cause in causes:
        # First, as it is a RepositoryNotFoundError, too.
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
            # The connection failed; what the Hub answers is an HfHubHTTPError.
            return no_network(place, repo_type)
    text = one_line(error)
    # transformers names pages on the Hub that a folder doesn't have.
    if Path(place).is_dir():
        sentences = re.split(r"(?<=\.) ", text)
        text = " ".join(sentence for sentence in sentences if "://" not in sentence) or text
    if text.startswith(str(place)):
        return text
    return f"{place}: {text}"


def check_place(name: str | Path, repo_type: str = "model") -> None:
    """ValueError for what is neither a folder nor a repository on the Hub that can be reached or was fetched."""
    if Path(name).is_dir():
        return
    if Path(name).is_file():
        raise ValueError(f"{name} is a file: give a folder, or a name on the Hub")
    name = str(name)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"there is no folder {name} (and a name on the Hub is owner/name)") from error
    # Fetched before: it can be loaded without a network.
    if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=repo_type)).is_dir():
        return
    if constants.is_offline_mode():
        raise ValueError(no_network(name, repo_type))
    try:
        # Asked once: a download would try again for half a minute before it says that there is no network.
        HfApi().repo_info(name, repo_type=repo_type, timeout=10)
    except (HTTPError, OSError) as error:
        raise ValueError(explain(error, name, repo_type)) from error


def check_code(checkpoint: str | Path, fields: dict, trust_remote_code: bool) -> None:
    """ValueError for a model that transformers has no class of its own for, unless the code that comes with it may be
    run. `fields`: what its config.json says."""
    kind = fields.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if not fields.get("auto_map"):
        raise ValueError(f"{checkpoint} is a {kind!r}, which this version of transformers doesn't know: update it")
    if not trust_remote_code:
        what = f"{checkpoint} is a {kind!r}, whose code comes with the checkpoint"
        takers = "train, chat, eval, probe and target-tasks take"
        raise ValueError(f"{what}: read that code, then give --trust_remote_code to run it, which {takers}")


@contextmanager
def loading_from(place: str | Path, subfolder: str = "", weights: bool = True) -> Iterator[None]:
    """Whatever is wrong with `place`, a folder or a name on the Hub, is a ValueError of one line; a fault of the
    program's own stays what it is. A folder's files (with or without its `weights`) are looked at before anything slow
    begins."""
    check_place(place)
    if Path(place).is_dir():
        check_folder(Path(place) / subfolder, weights)
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError) as error:
        # Names the file, if it can be found.
        check_all_files(place)
        raise ValueError(f"{place} has a damaged file of weights, fetch it again: {one_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ValueError(explain(error, place)) from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, StrictDataclassError) as error:
        # Libraries look at few fields' types and values.
        if _is_our_fault(error, place):
            raise
        raise ValueError(_unusable(place, error)) from error
    except RuntimeError as error:
        # transformers names this option when shapes differ, and its report lists the weights.
        if "ignore_mismatched_sizes" in str(error):
            what = f"{place} has weights of other shapes than its config.json says"
            raise ValueError(f"{what}: fetch it again") from error
        if IMPOSSIBLE_SIZE.search(str(error)) and not _is_our_fault(error, place):
            raise ValueError(_unusable(place, error)) from error
        # Too little memory, say: no fault of the files.
        raise
    except Exception as error:
        # The tokenizers library has no kind of its own for what isn't its file, or is one of a later version.
        if type(error) is not Exception:
            raise
        what = f"{place} has a tokenizer.json that can't be read ({one_line(error)})"
        raise ValueError(f"{what}: fetch it again, or update tokenizers") from error


def _unusable(place: str | Path, error: Exception) -> str:
    what = f"{place} has a setting that can't be used, {type(error).__name__}: {one_line(error)}"
    return f"{what}: correct it in its .json files, or fetch them again"


def _is_our_fault(error: BaseException, place: str | Path) -> bool:
    """Whether an error of a wrong type or name is a fault of the program, which has to be seen as such, and not of a
    file's setting that a library has tried to use."""
    if isinstance(error, StrictDataclassError):
        return False
    # A keyword that the files of the folder don't have comes from the caller.
    keyword = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if keyword and Path(place).is_dir():
        files = Path(place).rglob("*.json")
        return not any(f'"{keyword[1]}"' in file.read_text(encoding="utf-8", errors="replace") for file in files)
    # Where it was raised, the standard library and others' scripts aside.
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        is_below = file.is_relative_to(PACKAGE)
        # The package may be installed among the libraries, and these may lie below it, in .venv.
        parts = file.relative_to(PACKAGE).parts if is_below else file.parts
        if {"site-packages", "dist-packages"} & set(parts):
            return False
        if is_below:
            return True
    return True


def check_all_files(place: str | Path) -> None:
    """ValueError that names a damaged file anywhere in a folder, or in what was fetched of a repository."""
    folder = Path(place)
    if not folder.is_dir():
        names = ("config.json", "model_index.json", "adapter_config.json")
        fetched = [find_file(place, name) for name in names]
        folders = [file.parent for file in fetched if file is not None]
        if not folders:
            return
        folder = folders[0]
    for suffix in (".json", ".safetensors", ".bin"):
        for file in sorted(folder.rglob(f"*{suffix}")):
            check_file(file)


def find_file(place: str | Path, name: str) -> Path | None:
    """A file of a folder, or of a repository (then it is fetched); None if there is none of this name."""
    # Offline, a file that was never fetched counts as one that isn't there.
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
        more = ""
        if len(needed) > 5:
            more = f" and {len(needed) - 5} more"
        remedy = f"give a whole checkpoint, with the weights of the whole model{hint}"
        raise ValueError(f"{path} has no weights for {type(model).__name__}'s {listed}{more}: {remedy}")
    # No feature needs them, but a fingerprint has them: random ones would be another teacher's at each start.
    for name in missing:
        model.state_dict()[name].zero_()
    return model
