"""The study's results as they lie on disk: a result is one (arm, seed, budget), a file of its own while the study
runs, and a line of <arm>.jsonl when it is packed."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..files.strangers import read_object
from ..files.writing import write_json, write_whole
from ..recipes import study as design

# Arm, seed, budget.
Key = tuple[str, int, int]
# In a result's identity: what tells its seed from another of the same arm and budget.
SEED_FIELDS = ("seed", "pretrain.seed", "pretrain.data_seed", "finetune.seed", "finetune.data_seed")


def read_results(folder: Path) -> dict[Key, dict]:
    """All confirming results of a study's folder, or of one with packed files. ValueError if there is none, or if they
    can't be compared (`check_alike`)."""
    found = {}
    # As they are kept in the repository, and as the study leaves them: what a folder's own study computed counts.
    for file in sorted(folder.glob("*.jsonl")):
        for result in read_lines(file):
            found[key_of(result)] = result
    for file in sorted(folder.glob("results/confirm/*/*.json")):
        result = read_object(file)
        found[key_of(result)] = result
    if not found:
        raise ValueError(f"{folder} has no results of confirming runs")
    check_alike(found, folder)
    # In the order of the design; an arm that it no longer has is left out.
    order = list(design.ARMS)
    known = {key: result for key, result in found.items() if key[0] in order}
    return dict(sorted(known.items(), key=lambda item: (order.index(item[0][0]), item[0][1:])))


def key_of(result: dict) -> Key:
    return result["arm"], result["seed"], result["budget"]


def read_lines(file: Path) -> list[dict]:
    """The objects of a packed file. ValueError that names a line which is none."""
    found = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error}); is the file cut off?") from error
    return found


def check_alike(results: Mapping[Key, dict], folder: Path) -> None:
    """ValueError unless all results are of the same version, data and components, those of a budget of equally long
    fine-tunings (`--longer`), and those of an arm and budget of the same settings: they differ by their seed alone."""
    # Arms are compared: they must have had the same world, and begun with the same components.
    for name in ("version", "data", "language_model", "vision_tower", "gen", "depth", "seg"):
        values = {str(result["identity"].get(name)) for result in results.values()}
        if len(values) > 1:
            raise ValueError(f"{folder} mixes results of different {name}: {', '.join(sorted(values))}")

    # Which steps a budget has, and the first result of an arm and budget, that the others must be like.
    steps = {}
    first = {}
    for (arm, _, budget), result in results.items():
        steps.setdefault(budget, set()).add(str(most_steps(result)))
        if len(steps[budget]) > 1:
            mixed = f"{folder} mixes fine-tunings of {' and '.join(sorted(steps[budget]))} steps on {budget} scenes"
            raise ValueError(f"{mixed}: give each its own --out")
        one = first.setdefault((arm, budget), result)["identity"]
        other = result["identity"]
        for name in sorted(one.keys() | other.keys()):
            if name not in SEED_FIELDS and one.get(name) != other.get(name):
                mixed = f"{folder} mixes results of {arm} on {budget} scenes with different {name}"
                raise ValueError(f"{mixed} ({one.get(name)} and {other.get(name)}): give each its own --out")


def most_steps(result: dict) -> int | None:
    """That its fine-tuning could have; None right after pre-training."""
    return result["identity"].get("finetune.max_steps")


def pack(results: Mapping[Key, dict], folder: Path) -> None:
    """One <arm>.jsonl an arm, a line a result, to be kept in the repository."""
    for arm in dict.fromkeys(key[0] for key in results):
        lines = [json.dumps(result) for key, result in results.items() if key[0] == arm]
        write_whole(folder / f"{arm}.jsonl", "\n".join(lines) + "\n")


def read_tuning(folder: Path) -> dict[tuple[str, str], dict]:
    """{(arm, its file's name without ending): result} of the tuning trials in a study's folder. The name tells seed,
    budget and settings. ValueError if there is none."""
    files = sorted(folder.glob("results/tune/*/*.json"))
    if not files:
        raise ValueError(f"{folder} has no results of tuning")
    return {(file.parent.name, file.stem): read_object(file) for file in files}


def pack_tuning(results: Mapping[tuple[str, str], dict], folder: Path) -> None:
    """One tuning/<arm>.jsonl an arm, a line a result with its file's name."""
    for arm in dict.fromkeys(arm for arm, _ in results):
        lines = []
        for (one, name), result in results.items():
            if one == arm:
                lines.append(json.dumps({"file": name, "result": result}))
        write_whole(folder / "tuning" / f"{arm}.jsonl", "\n".join(lines) + "\n")


def unpack(root: Path) -> None:
    """Packed results that someone put into a study's folder become files of their own, where none is yet."""
    # A confirming result's file is named by what is in it.
    for packed in sorted(root.glob("*.jsonl")):
        for result in read_lines(packed):
            name = f"seed{result['seed']}_budget{result['budget']}"
            _restore(root / "results" / "confirm" / result["arm"] / f"{name}.json", result)
    # A tuning result's name also tells settings, so it is stored beside the result.
    for packed in sorted(root.glob("tuning/*.jsonl")):
        for one in read_lines(packed):
            _restore(root / "results" / "tune" / packed.stem / f"{one['file']}.json", one["result"])


def _restore(file: Path, result: dict) -> None:
    # What this folder's study has computed itself stays.
    if not file.exists():
        write_json(file, result, indent=None)
