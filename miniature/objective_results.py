"""The study's results as they lie on disk, and the numbers that they make.

A result is one (arm, seed, budget): a file of its own while the study runs, a line of <arm>.jsonl when it is packed.
Accuracies are in per cent from here on; "average" is the mean of the tasks.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..eval.correlation import correlation
from ..eval.statistics import holm_adjusted, labels_needed, paired_t, t_interval
from ..files.strangers import read_object
from ..files.writing import write_json, write_whole
from ..recipes import study as design

# Arm, seed, budget.
Key = tuple[str, int, int]


def read_results(folder: Path) -> dict[Key, dict]:
    """All confirming results of a study's folder, or of one with packed files. ValueError if there is none, or if they
    are of different data, components or versions, or those of one budget of different steps (`--longer`)."""
    # As the study leaves them, and as they are kept in the repository.
    found = [read_object(file) for file in sorted(folder.glob("results/confirm/*/*.json"))]
    for file in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in file.read_text().splitlines()]
    if not found:
        raise ValueError(f"{folder} has no results of confirming runs")
    results = {}
    # Of two results with one key the packed one, which was found later, counts.
    for result in sorted(found, key=lambda one: (one["budget"], one["seed"])):
        results[result["arm"], result["seed"], result["budget"]] = result
    # Arms are compared: they must have had the same world, and begun with the same components.
    for name in ("version", "data", "language_model", "vision_tower", "gen", "depth", "seg"):
        values = {str(result["identity"].get(name)) for result in results.values()}
        if len(values) > 1:
            raise ValueError(f"{folder} mixes results of different {name}: {', '.join(sorted(values))}")
    for budget in budgets_of(results):
        steps = {most_steps(result) for (_, _, one), result in results.items() if one == budget}
        if len(steps) > 1:
            named = " and ".join(map(str, sorted(steps, key=str)))
            mixed = f"{folder} mixes fine-tunings of {named} steps on {budget} scenes"
            raise ValueError(f"{mixed}: give each its own --out")
    # In the order of the design; an arm that it no longer has is left out.
    order = list(design.ARMS)
    known = {key: result for key, result in results.items() if key[0] in order}
    return dict(sorted(known.items(), key=lambda item: (order.index(item[0][0]), item[0][1:])))


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


def tuning_table(results: Mapping[tuple[str, str], dict]) -> list[list[str]]:
    """Rows: arm, what was tried (the file's name), accuracy on the validation questions at the chosen step in %."""
    return [[arm, name, f"{placement(result)['validation']:.2f}"] for (arm, name), result in results.items()]


def unpack(root: Path) -> None:
    """Packed results that someone put into a study's folder become files of their own, where none is yet."""
    # A confirming result's file is named by what is in it.
    for packed in sorted(root.glob("*.jsonl")):
        for line in packed.read_text().splitlines():
            result = json.loads(line)
            name = f"seed{result['seed']}_budget{result['budget']}"
            _restore(root / "results" / "confirm" / result["arm"] / f"{name}.json", result)
    # A tuning result's name also tells settings, so it is stored beside the result.
    for packed in sorted(root.glob("tuning/*.jsonl")):
        for line in packed.read_text().splitlines():
            one = json.loads(line)
            _restore(root / "results" / "tune" / packed.stem / f"{one['file']}.json", one["result"])


def _restore(file: Path, result: dict) -> None:
    # What this folder's study has computed itself stays.
    if not file.exists():
        write_json(file, result, indent=None)


# ---------------------------------------------------------------------------------------------------------- numbers


def arms_of(results: Mapping[Key, dict]) -> list[str]:
    return list(dict.fromkeys(arm for arm, _, _ in results))


def budgets_of(results: Mapping[Key, dict]) -> list[int]:
    return sorted({budget for _, _, budget in results})


def of_whole_seeds(
    results: Mapping[Key, dict],
    arms: Sequence[str] = design.DEFAULT_ARMS,
    budgets: Sequence[int] = design.BUDGETS,
) -> dict[Key, dict]:
    """Those of the seeds that have every arm and budget: while a study runs, all arms have these in common."""
    seeds = {seed for _, seed, _ in results}
    whole = [seed for seed in seeds if all((arm, seed, budget) in results for arm in arms for budget in budgets)]
    return {key: result for key, result in results.items() if key[0] in arms and key[1] in whole}


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
    # A seed decides which scenes have questions, so both have seen the same.
    own = per_seed(results, arm, budget, answers)
    others = per_seed(results, other, budget, answers)
    return [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]


def families(arms: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """The hypotheses that are asked together, as pairs (arm, what it is compared with), of those arms there are."""
    content = list(design.CONTROLS)
    # What has no objective to be tested: other images' targets, and LLaVA trained as long as OLA-VLM takes.
    no_objectives = [*design.CONTROLS.values(), design.EQUAL_TIME]
    objective_arms = [arm for arm in arms if arm not in (design.BASELINE, *no_objectives)]
    asked = {
        "against LLaVA": [(arm, design.BASELINE) for arm in objective_arms],
        "controls against LLaVA": [(arm, design.BASELINE) for arm in no_objectives],
        "against its control": list(design.CONTROLS.items()),
        "against no content": [(arm, design.NO_CONTENT) for arm in content],
        "on top of another": list(design.ON_TOP.items()),
    }
    # Holm's correction counts the hypotheses of a family: those that can be asked.
    there = set(arms)
    found = {}
    for name, pairs in asked.items():
        possible = [pair for pair in pairs if set(pair) <= there]
        if possible:
            found[name] = possible
    return found


def compare_family(results: Mapping[Key, dict], pairs: Sequence[tuple[str, str]]) -> list[dict]:
    """`paired_t` over seeds for every pair and budget, with `p_holm` over all of them."""
    rows = []
    for arm, other in pairs:
        for budget in budgets_of(results):
            differences = paired(results, arm, other, budget)
            if differences:
                rows.append({"arm": arm, "other": other, "budget": budget, **paired_t(differences)})
    # Each pair at each budget is a hypothesis of its own, and counts.
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
    # Without budget 0: labels are interpolated in their logarithm.
    baseline = {budget: cell["mean"] for budget, cell in table.get(design.BASELINE, {}).items() if budget > 0}
    if not baseline:
        return {}
    without_labels = table[design.BASELINE].get(0, {"mean": -math.inf})["mean"]
    found = {}
    for arm, cells in table.items():
        if arm != design.BASELINE:
            needed = {}
            for budget, cell in cells.items():
                if cell["mean"] <= without_labels:
                    needed[budget] = 0.0
                else:
                    needed[budget] = labels_needed(list(baseline), list(baseline.values()), cell["mean"])
            found[arm] = needed
    return found


def mean_of(results: Mapping[Key, dict], arm: str, budget: int, read: Callable[[dict], float | None]) -> float | None:
    values = list(per_seed(results, arm, budget, read).values())
    if not values:
        return None
    return float(np.mean(values))


def chosen_point(result: dict) -> dict:
    """What was seen on the validation questions at the chosen step."""
    # Exactly one, as every step is evaluated once.
    (chosen,) = [point for point in result["validation"] if point["step"] == result["chosen_step"]]
    return chosen


def seen_at(point: dict) -> dict[str, float]:
    """Where projected tokens lie at an evaluation, and what it found on the validation questions (%)."""
    return {**point["placement"], "validation": 100 * point["accuracy"]["average"]}


def placement(result: dict) -> dict[str, float]:
    """At the chosen step."""
    return seen_at(chosen_point(result))


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
            # More than its two keys: an arm that hasn't come to this budget has no row.
            if len(row) > 2:
                rows.append(row)
    return rows


def distinct_changes(results: Mapping[Key, dict]) -> list[str]:
    # A dict, whose keys keep their order.
    found = {}
    for result in results.values():
        found.update(dict.fromkeys(result["changes"]))
    return list(found)


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

    # The alpha of each target, one for all arms: one for each would favor those that were luckier in choosing.
    first = next(iter(probed.values()))["validation"]
    targets = list(next(iter(first.values())))
    best = {}
    for target in targets:
        means = {}
        # Validation scores are means over layers already (`objective_trial.Trial.probe`).
        for alpha in first:
            means[alpha] = np.mean([probes["validation"][alpha][target] for probes in probed.values()])
        best[target] = max(means, key=means.__getitem__)

    # What it comes to on test images.
    found = {}
    for key, probes in probed.items():
        found[key] = {}
        for target in targets:
            found[key][target] = layers_mean(probes["test"][best[target]][target])
    return found


def probe_points(
    results: Mapping[Key, dict], probed_at: int, answered_at: int
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{target: {arm: [(probe score at one budget, accuracy at another), one a seed that has both]}}."""
    scores = probe_scores(results)
    found = {}
    # Without any probes there are no targets, and so no rows.
    for target in next(iter(scores.values()), {}):
        found[target] = {}
        for arm in arms_of(results):
            accuracies = per_seed(results, arm, answered_at, answers)
            points = []
            for seed, accuracy in accuracies.items():
                # Probed and answered at different budgets: a trial on its way may have one and not the other.
                if (arm, seed, probed_at) in scores:
                    points.append((scores[arm, seed, probed_at][target], accuracy))
            if points:
                found[target][arm] = points
    return found


def probes_and_answers(results: Mapping[Key, dict]) -> list[dict]:
    """Does a better probe after pre-training go with a better answer (the paper's Figure 2)? For each target and each
    budget of the answers: the arms' points, and Pearson's r over the arms' means."""
    rows = []
    for budget in budgets_of(results):
        for target, points in probe_points(results, 0, budget).items():
            row = {"target": target, "budget": budget, "n": len(points), "points": points}
            # Two points always lie on a line.
            if len(points) >= 3:
                means = [np.mean(of_arm, axis=0) for of_arm in points.values()]
                # (arms, 2) -> (arms,) probe scores and (arms,) accuracies.
                probes, accuracies = np.array(means).T
                row["r"] = correlation(probes, accuracies)
            rows.append(row)
    return rows


def along_finetuning(results: Mapping[Key, dict]) -> dict[str, list[dict]]:
    """{arm: [{step, validation, token_norm, largest_cosine, embedding_norm, n}]}: answers to the validation questions
    (%), and where projected tokens lie, while an arm is fine-tuned on the most labels; step 0 is the end of
    pre-training. Means over the seeds that reached a step."""
    largest = budgets_of(results)[-1]
    found = {}
    for arm in arms_of(results):
        by_step: dict[int, list[dict]] = {}
        for (one, _, budget), result in results.items():
            # Right after pre-training, and along the fine-tuning on the most labels.
            if one != arm or budget not in (0, largest):
                continue
            for point in result["validation"]:
                # The result of budget 0 has one point, right after pre-training.
                step = 0
                if budget == largest:
                    step = point["step"]
                by_step.setdefault(step, []).append(seen_at(point))
        along = []
        for step, places in sorted(by_step.items()):
            along.append({"step": step, "n": len(places), **means_by_name(places)})
        found[arm] = along
    return found


def best_steps(results: Mapping[Key, dict]) -> dict[str, dict[int, dict]]:
    """{arm: {budget: {mean, most, last, n}}}: the mean best step of fine-tuning, the most steps that it could have,
    and how many of its n seeds were best at the last one: these may not have come to their end."""
    found = {}
    for arm in arms_of(results):
        found[arm] = {}
        for budget in budgets_of(results):
            steps = list(per_seed(results, arm, budget, lambda result: result["chosen_step"]).values())
            # Right after pre-training there is no step to choose.
            most = [value for value in per_seed(results, arm, budget, most_steps).values() if value]
            if most:
                last = sum(step == most[0] for step in steps)
                found[arm][budget] = {"mean": float(np.mean(steps)), "most": most[0], "last": last, "n": len(steps)}
    return found


def most_steps(result: dict) -> int | None:
    return result["identity"].get("finetune.max_steps")


def means_by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name's values; all rows have the same names."""
    means = {}
    for name in rows[0]:
        means[name] = float(np.mean([row[name] for row in rows]))
    return means


def cost_table(results: Mapping[Key, dict]) -> dict[str, dict[str, float | None]]:
    """{arm: processor seconds of pre-training and of the largest fine-tuning, peak memory, stored targets}."""
    largest = budgets_of(results)[-1]
    found = {}
    for arm in arms_of(results):
        # What is told -> (the budget whose results tell it, how it is read from one).
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
            values: list[Any] = list(per_seed(results, arm, budget, placement).values())  # pyright: ignore[reportArgumentType] (a result has several forms)
            if values:
                placed[arm][budget] = means_by_name(values)
    return {
        "trials": len(results),
        "accuracy": table,
        "by_task": {task: accuracy_table(results, task) for task in tasks},
        "comparisons": {name: compare_family(results, pairs) for name, pairs in families(arms).items()},
        "labels": labels_table(table),
        "placement": placed,
        "changes": changes_table(results),
        "along": along_finetuning(results),
        "best_steps": best_steps(results),
        "probes": probes_and_answers(results),
        "costs": cost_table(results),
    }
