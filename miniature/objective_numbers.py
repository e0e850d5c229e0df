"""The numbers that the study's results make. Accuracies are in per cent from here on; "average" is the mean of the
tasks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..eval.correlation import correlation, range_without_two
from ..eval.statistics import holm_adjusted, labels_needed, paired_t, t_interval
from ..recipes import study as design
from .objective_results import Key, most_steps

# Resamples of the seeds, for the range of the labels that an arm saves.
DRAWS = 1000


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
    # A seed decides which scenes have questions, so both have seen the same.
    own = per_seed(results, arm, budget, answers)
    others = per_seed(results, other, budget, answers)
    return [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]


def families(arms: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """The hypotheses that are asked together, as pairs (arm, what it is compared with), of those arms there are."""
    # What has no objective to be tested: other images' targets, and LLaVA trained as long as OLA-VLM takes.
    no_objectives = [*design.CONTROLS.values(), design.EQUAL_TIME]
    objective_arms = [arm for arm in arms if arm not in (design.BASELINE, *no_objectives)]
    asked = {
        "against LLaVA": [(arm, design.BASELINE) for arm in objective_arms],
        "controls against LLaVA": [(arm, design.BASELINE) for arm in no_objectives],
        "against its control": list(design.CONTROLS.items()),
        "against no content": [(arm, design.NO_CONTENT) for arm in design.CONTENT],
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
    """`paired_t` over seeds for every pair and budget, with `p_holm` over all of them. Nothing is tested, and each p
    is NaN, before every one of them has the protocol's seeds."""
    rows = []
    for arm, other in pairs:
        for budget in budgets_of(results):
            differences = paired(results, arm, other, budget)
            if differences:
                rows.append({"arm": arm, "other": other, "budget": budget, **paired_t(differences)})
    # A look at a study on its way is no test.
    if any(row["n"] < len(design.CONFIRMING_SEEDS) for row in rows):
        for row in rows:
            row["p"] = math.nan
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


def seed_table(results: Mapping[Key, dict]) -> dict[str, dict[int, float]]:
    """{arm: {seed: accuracy with the most labels}}: a mean may stand for seeds that learned and seeds that did not."""
    most = max(budgets_of(results))
    return {arm: dict(sorted(per_seed(results, arm, most, answers).items())) for arm in arms_of(results)}


def labels_tried(results: Mapping[Key, dict]) -> list[int]:
    """The budgets above 0 that the baseline has: between these the labels that it needs are interpolated."""
    return sorted({budget for arm, _, budget in results if arm == design.BASELINE and budget > 0})


def scenes_needed(baseline: Mapping[int, float], accuracy: float) -> float:
    """Scenes with questions at which the baseline, {budget: accuracy}, is as accurate; 0 if it is without any, and
    infinity if it never is."""
    if 0 in baseline and accuracy <= baseline[0]:
        return 0.0
    # Without budget 0: labels are interpolated in their logarithm.
    tried = [budget for budget in baseline if budget > 0]
    return labels_needed(tried, [baseline[budget] for budget in tried], accuracy)


def labels_table(table: Mapping[str, Mapping[int, dict]]) -> dict[str, dict[int, float]]:
    """{arm: {budget: scenes with questions that the baseline needs for the same mean accuracy}}."""
    baseline = {budget: cell["mean"] for budget, cell in table.get(design.BASELINE, {}).items()}
    # Right after pre-training alone there is nothing to interpolate.
    if not any(budget > 0 for budget in baseline):
        return {}
    found = {}
    for arm, cells in table.items():
        if arm != design.BASELINE:
            found[arm] = {budget: scenes_needed(baseline, cell["mean"]) for budget, cell in cells.items()}
    return found


def labels_ranges(results: Mapping[Key, dict]) -> dict[str, dict[int, list[float]]]:
    """{arm: {budget: the least and the most scenes of 95% of the resamples}}: seeds are drawn again, an arm's together
    with the baseline's, as they are paired. Of those that have every budget; nothing with fewer than two."""
    rng = np.random.default_rng(0)
    budgets = budgets_of(results)
    found = {}
    for arm in arms_of(results):
        own = seeds_by_budgets(results, arm, budgets)
        base = seeds_by_budgets(results, design.BASELINE, budgets)
        common = sorted(own.keys() & base.keys())
        if arm == design.BASELINE or len(common) < 2 or not labels_tried(results):
            continue
        # (DRAWS, seeds) -> (DRAWS, seeds, budgets) -> (DRAWS, budgets)
        drawn = rng.integers(len(common), size=(DRAWS, len(common)))
        own_means = np.array([own[seed] for seed in common])[drawn].mean(1)
        base_means = np.array([base[seed] for seed in common])[drawn].mean(1)
        needed = []
        for own_mean, base_mean in zip(own_means, base_means, strict=True):
            baseline = dict(zip(budgets, base_mean, strict=True))
            needed.append([scenes_needed(baseline, accuracy) for accuracy in own_mean])
        # Members of the sample, not between two of them: some are infinite.
        ordered = np.sort(needed, axis=0)
        least = ordered[round(0.025 * (DRAWS - 1))]
        most = ordered[round(0.975 * (DRAWS - 1))]
        found[arm] = {budget: [float(least[i]), float(most[i])] for i, budget in enumerate(budgets)}
    return found


def seeds_by_budgets(results: Mapping[Key, dict], arm: str, budgets: Sequence[int]) -> dict[int, list[float]]:
    """{seed: its accuracies by budget}, of the arm's seeds that have all of them."""
    by_budget = [per_seed(results, arm, budget, answers) for budget in budgets]
    common = set.intersection(*(set(found) for found in by_budget))
    return {seed: [found[seed] for found in by_budget] for seed in common}


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


def tuning_table(results: Mapping[tuple[str, str], dict]) -> list[list[str]]:
    """Rows: arm, what was tried (the file's name), accuracy on the validation questions at the chosen step in %."""
    return [[arm, name, f"{placement(result)['validation']:.2f}"] for (arm, name), result in results.items()]


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


def chosen_minus_test(results: Mapping[Key, dict]) -> dict[int, float]:
    """{budget: mean over all arms and seeds of the validation accuracy at the chosen step minus the test accuracy}:
    what a loss of validation answers may owe to their having chosen the step."""
    found = {}
    for budget in budgets_of(results):
        of_budget = [result for key, result in results.items() if key[2] == budget]
        found[budget] = float(np.mean([placement(result)["validation"] - answers(result) for result in of_budget]))
    return found


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


def probe_table(results: Mapping[Key, dict]) -> dict[str, dict[str, dict]]:
    """{arm: {"target, budget": mean, ci95, n}} of the ridge probes."""
    scores = probe_scores(results)
    found = {}
    for arm in arms_of(results):
        by_column: dict[str, list[float]] = {}
        for (one, _, budget), by_target in scores.items():
            if one == arm:
                for target, score in by_target.items():
                    by_column.setdefault(f"{target}, {budget}", []).append(score)
        if by_column:
            found[arm] = {}
        for column, values in by_column.items():
            mean, low, high = t_interval(values)
            found[arm][column] = {"mean": mean, "ci95": [low, high], "n": len(values)}
    return found


def probes_and_answers(results: Mapping[Key, dict]) -> list[dict]:
    """Does a better probe go with a better answer (the paper's Figure 2)? A row for each target, of the probes after
    pre-training with the answers at each budget, and of the probes after the most labels with the answers there:
    the arms' points and `correlations` of them."""
    budgets = budgets_of(results)
    # (probed at, answered at): both of one checkpoint in the first and the last.
    pairs = [(0, budget) for budget in budgets]
    if budgets[-1] > 0:
        pairs.append((budgets[-1], budgets[-1]))
    rows = []
    for probed_at, answered_at in pairs:
        for target, points in probe_points(results, probed_at, answered_at).items():
            # Longer fine-tunings may have no results right after pre-training.
            if points:
                row = {"target": target, "probed_at": probed_at, "budget": answered_at, "n": len(points)}
                rows.append({**row, "points": points, **correlations(points)})
    return rows


def correlations(points: Mapping[str, Sequence[tuple[float, float]]]) -> dict:
    """Pearson's r of {arm: [(probe score, accuracy), one a seed]}: `r` over the arms' means, `without_two`, its range
    without any two arms, and `r_within`, over seeds about their arm's mean, with `n_within` of them. What can't be
    said of so few points is left out."""
    found = {}
    means = [np.mean(of_arm, axis=0) for of_arm in points.values()]
    # Two points always lie on a line.
    if len(means) >= 3:
        # (arms, 2) -> (arms,) probe scores and (arms,) accuracies.
        probes, accuracies = np.array(means).T
        found["r"] = correlation(probes, accuracies)
        without_two = range_without_two(probes, accuracies)
        if without_two is not None:
            found["without_two"] = list(without_two)
    # Arms differ in what they are trained for; about their means only chance is left.
    within = np.concatenate([np.array(of_arm) - mean for of_arm, mean in zip(points.values(), means, strict=True)])
    if len(within) - len(means) >= 3:
        found["r_within"] = correlation(*within.T)
        found["n_within"] = len(within)
    return found


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


def means_by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name's values; all rows have the same names."""
    means = {}
    for name in rows[0]:
        means[name] = float(np.mean([row[name] for row in rows]))
    return means


def cost_table(results: Mapping[Key, dict]) -> dict[str, dict[str, float]]:
    """{arm: processor seconds of pre-training and of a step of the largest fine-tuning, each also over LLaVA's of the
    same seed, and stored targets}. Medians over seeds: what else a machine does lengthens some."""
    largest = budgets_of(results)[-1]
    # What is told -> (the budget whose results tell it, how it is read from one).
    reads = {
        "PT (s)": (0, lambda one: one["seconds"].get("pretrain")),
        "a step of IFT (s)": (largest, step_seconds),
    }
    found = {}
    for arm in arms_of(results):
        found[arm] = {}
        for name, (budget, read) in reads.items():
            own = per_seed(results, arm, budget, read)
            base = per_seed(results, design.BASELINE, budget, read)
            ratios = [own[seed] / base[seed] for seed in own.keys() & base.keys()]
            if own:
                found[arm][name] = float(np.median(list(own.values())))
            if ratios:
                found[arm][f"{name[:-4]} / LLaVA's"] = float(np.median(ratios))
        stored = per_seed(results, arm, 0, lambda one: one["target_bytes"] / 1e6)
        if stored:
            found[arm]["targets (MB)"] = float(np.median(list(stored.values())))
    return found


def step_seconds(result: dict) -> float | None:
    """Processor seconds of a step of fine-tuning; None right after pre-training."""
    if "finetune" not in result["seconds"]:
        return None
    # The last evaluation was at the step where it ended, which patience may have made an early one.
    return result["seconds"]["finetune"] / result["validation"][-1]["step"]


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
        "by_seed": seed_table(results),
        "comparisons": {name: compare_family(results, pairs) for name, pairs in families(arms).items()},
        "labels": labels_table(table),
        "labels_ranges": labels_ranges(results),
        "labels_tried": labels_tried(results),
        "placement": placed,
        "changes": changes_table(results),
        "chosen_minus_test": chosen_minus_test(results),
        "along": along_finetuning(results),
        "best_steps": best_steps(results),
        "probe_scores": probe_table(results),
        "probes": probes_and_answers(results),
        "costs": cost_table(results),
    }
