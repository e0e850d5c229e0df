"""The study's results as they lie on disk, and the numbers that they make.

A result is one (arm, seed, budget): a file of its own while the study runs, a line of <arm>.jsonl when it is packed.
Accuracies are in per cent from here on; "average" is the mean of the tasks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..eval.correlation import correlation
from ..eval.statistics import holm_adjusted, labels_needed, paired_t, t_interval
from ..recipes import study as design
from ..targets.files import read_object, write_json, write_whole

Key = tuple[str, int, int]  # arm, seed, budget


def read_results(folder: Path) -> dict[Key, dict]:
    """All confirming results of a study's folder, or of one with packed files. ValueError if there is none, or if they
    are of different data, components or versions."""
    found = [read_object(file) for file in sorted(folder.glob("results/confirm/*/*.json"))]
    for file in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in file.read_text().splitlines()]
    if not found:
        raise ValueError(f"{folder} has no results of confirming runs")
    results = {}
    for result in sorted(found, key=lambda one: (one["budget"], one["seed"])):
        results[result["arm"], result["seed"], result["budget"]] = result
    for name in ("version", "data", "language_model", "vision_tower", "gen", "depth", "seg"):
        values = {str(result["identity"].get(name)) for result in results.values()}
        if len(values) > 1:
            raise ValueError(f"{folder} mixes results of different {name}: {', '.join(sorted(values))}")
    order = list(design.ARMS)
    known = {key: result for key, result in results.items() if key[0] in order}
    return dict(sorted(known.items(), key=lambda item: (order.index(item[0][0]), item[0][1:])))


def pack(results: Mapping[Key, dict], folder: Path) -> None:
    """One <arm>.jsonl an arm, a line a result, to be kept in the repository."""
    for arm in dict.fromkeys(key[0] for key in results):
        lines = [json.dumps(result) for key, result in results.items() if key[0] == arm]
        write_whole(folder / f"{arm}.jsonl", "\n".join(lines) + "\n")


def unpack(root: Path) -> None:
    """Packed results that someone put into a study's folder become files of their own, where none is yet."""
    for packed in sorted(root.glob("*.jsonl")):
        for line in packed.read_text().splitlines():
            result = json.loads(line)
            file = root / "results" / "confirm" / result["arm"]
            file = file / f"seed{result['seed']}_budget{result['budget']}.json"
            if not file.exists():
                write_json(file, result, indent=None)


# ---------------------------------------------------------------------------------------------------------- numbers


def arms_of(results: Mapping[Key, dict]) -> list[str]:
    return list(dict.fromkeys(arm for arm, _, _ in results))


def budgets_of(results: Mapping[Key, dict]) -> list[int]:
    return sorted({budget for _, _, budget in results})


def per_seed(
    results: Mapping[Key, dict], arm: str, budget: int, read: Callable[[dict], float | None]
) -> dict[int, float]:
    """{seed: what `read` finds in its result}, where it finds something."""
    found = {}
    for (one_arm, seed, one_budget), result in results.items():
        if (one_arm, one_budget) == (arm, budget):
            value = read(result)
            if value is not None:
                found[seed] = value
    return found


def answers(result: dict, task: str = "average") -> float:
    """Accuracy on the test questions in per cent."""
    return 100 * result["accuracy"][task]


def paired(results: Mapping[Key, dict], arm: str, other: str, budget: int) -> list[float]:
    """`arm` minus `other`, points, for each seed that both have."""
    own = per_seed(results, arm, budget, answers)
    others = per_seed(results, other, budget, answers)
    return [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]


def families(arms: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """The hypotheses that are asked together, as pairs (arm, what it is compared with), of those arms there are."""
    content = list(design.CONTROLS)
    no_objectives = [*design.CONTROLS.values(), design.EQUAL_TIME]
    objective_arms = [arm for arm in arms if arm not in (design.BASELINE, *no_objectives)]
    asked = {
        "against LLaVA": [(arm, design.BASELINE) for arm in objective_arms],
        "controls against LLaVA": [(arm, design.BASELINE) for arm in no_objectives],
        "against its control": list(design.CONTROLS.items()),
        "against no content": [(arm, design.NO_CONTENT) for arm in content],
        "on top of another": list(design.ON_TOP.items()),
    }
    there = set(arms)
    found = {name: [pair for pair in pairs if set(pair) <= there] for name, pairs in asked.items()}
    return {name: pairs for name, pairs in found.items() if pairs}


def compare_family(results: Mapping[Key, dict], pairs: Sequence[tuple[str, str]]) -> list[dict]:
    """`paired_t` over seeds for every pair and budget, with `p_holm` over all of them."""
    rows = []
    for arm, other in pairs:
        for budget in budgets_of(results):
            differences = paired(results, arm, other, budget)
            if differences:
                rows.append({"arm": arm, "other": other, "budget": budget, **paired_t(differences)})
    adjusted = holm_adjusted({number: row["p"] for number, row in enumerate(rows)})
    for number, row in enumerate(rows):
        row["p_holm"] = adjusted[number]
    return rows


def accuracy_table(results: Mapping[Key, dict], task: str = "average") -> dict[str, dict[int, dict]]:
    """{arm: {budget: mean, ci95, n}}."""
    table = {}
    for arm in arms_of(results):
        table[arm] = {}
        for budget in budgets_of(results):
            values = list(per_seed(results, arm, budget, lambda result: answers(result, task)).values())
            if values:
                mean, low, high = t_interval(values)
                table[arm][budget] = {"mean": mean, "ci95": [low, high], "n": len(values)}
    return table


def labels_table(table: Mapping[str, Mapping[int, dict]]) -> dict[str, dict[int, float]]:
    """{arm: {budget: scenes with questions that the baseline needs for the same mean accuracy}}."""
    baseline = {budget: cell["mean"] for budget, cell in table.get(design.BASELINE, {}).items() if budget > 0}
    if not baseline:
        return {}
    found = {}
    for arm, cells in table.items():
        if arm != design.BASELINE:
            needed = {}
            for budget, cell in cells.items():
                needed[budget] = labels_needed(list(baseline), list(baseline.values()), cell["mean"])
            found[arm] = needed
    return found


def mean_of(results: Mapping[Key, dict], arm: str, budget: int, read: Callable[[dict], float | None]) -> float | None:
    values = list(per_seed(results, arm, budget, read).values())
    return float(np.mean(values)) if values else None


def placement(result: dict) -> dict[str, float]:
    """At the chosen step."""
    (chosen,) = [point for point in result["validation"] if point["step"] == result["chosen_step"]]
    return {**chosen["placement"], "validation": 100 * chosen["accuracy"]["average"]}


def changes_table(results: Mapping[Key, dict]) -> list[dict]:
    """What answers to the validation questions lose, in points, when something is changed: a row each arm and budget,
    {change: t_interval over seeds}."""
    rows = []
    for arm in arms_of(results):
        for budget in budgets_of(results):
            row = {"arm": arm, "budget": budget}
            for change in distinct_changes(results):
                values = list(per_seed(results, arm, budget, lambda one, name=change: lost(one, name)).values())
                if values:
                    row[change] = t_interval(values)
            if len(row) > 2:
                rows.append(row)
    return rows


def distinct_changes(results: Mapping[Key, dict]) -> list[str]:
    return list(dict.fromkeys(name for result in results.values() for name in result["changes"]))


def lost(result: dict, change: str) -> float | None:
    """Points on the validation questions, unchanged minus changed."""
    if change not in result["changes"]:
        return None
    return placement(result)["validation"] - 100 * result["changes"][change]["average"]


def layers_mean(layers: Mapping[str, float]) -> float:
    """Of a probe's scores by layer, without layer 0, the embeddings."""
    return float(np.mean([value for layer, value in layers.items() if layer != "0"]))


def probe_scores(results: Mapping[Key, dict]) -> dict[Key, dict[str, float]]:
    """{result's key: {target: mean over the language model's layers of the test images' mean-centered cosine}}. The
    ridge alpha is one a target for all, the best on validation images over all results."""
    probed = {key: result["probes"] for key, result in results.items() if "probes" in result}
    if not probed:
        return {}
    first = next(iter(probed.values()))["validation"]
    targets = list(next(iter(first.values())))
    best = {}
    for target in targets:
        means = {}
        for alpha in first:
            means[alpha] = np.mean([probes["validation"][alpha][target] for probes in probed.values()])
        best[target] = max(means, key=means.__getitem__)
    found = {}
    for key, probes in probed.items():
        found[key] = {}
        for target in targets:
            found[key][target] = layers_mean(probes["test"][best[target]][target])
    return found


def probe_points(results: Mapping[Key, dict], probed_at: int, answered_at: int) -> dict[str, dict[str, tuple]]:
    """{target: {arm: (probe score at one budget, accuracy at another), means over seeds}}."""
    scores = probe_scores(results)
    found = {}
    for target in next(iter(scores.values()), {}):
        found[target] = {}
        for arm in arms_of(results):
            probes = [of[target] for (one, _, budget), of in scores.items() if (one, budget) == (arm, probed_at)]
            accuracy = mean_of(results, arm, answered_at, answers)
            if probes and accuracy is not None:
                found[target][arm] = (float(np.mean(probes)), accuracy)
    return found


def probe_correlations(results: Mapping[Key, dict]) -> list[dict]:
    """Pearson's r over arms between probes after pre-training and answers, for each target and budget."""
    rows = []
    for budget in budgets_of(results):
        for target, points in probe_points(results, 0, budget).items():
            if len(points) >= 3:
                x, y = np.array(list(points.values())).T
                rows.append({"target": target, "budget": budget, "r": correlation(x, y), "n": len(points)})
    return rows


def cost_table(results: Mapping[Key, dict]) -> dict[str, dict[str, float | None]]:
    """{arm: processor seconds of pre-training and of the largest fine-tuning, peak memory, stored targets}."""
    largest = budgets_of(results)[-1]
    found = {}
    for arm in arms_of(results):
        reads = {
            "pretrain seconds": (0, lambda one: one["seconds"].get("pretrain")),
            "finetune seconds": (largest, lambda one: one["seconds"].get("finetune")),
            "peak memory MB": (0, lambda one: one["peak_memory_mb"]),
            "targets MB": (0, lambda one: one["target_bytes"] / 1e6),
        }
        found[arm] = {name: mean_of(results, arm, budget, read) for name, (budget, read) in reads.items()}
    return found


def collect(results: Mapping[Key, dict]) -> dict:
    """All that the report says."""
    table = accuracy_table(results)
    tasks = [task for task in next(iter(results.values()))["accuracy"] if task != "average"]
    arms = arms_of(results)
    placed = {}
    for arm in arms:
        placed[arm] = {}
        for budget in budgets_of(results):
            values: list[Any] = list(per_seed(results, arm, budget, placement).values())  # pyright: ignore[reportArgumentType]
            if values:
                placed[arm][budget] = {name: float(np.mean([one[name] for one in values])) for name in values[0]}
    return {
        "trials": len(results),
        "accuracy": table,
        "by_task": {task: accuracy_table(results, task) for task in tasks},
        "comparisons": {name: compare_family(results, pairs) for name, pairs in families(arms).items()},
        "labels": labels_table(table),
        "placement": placed,
        "changes": changes_table(results),
        "probes": probe_correlations(results),
        "costs": cost_table(results),
    }
