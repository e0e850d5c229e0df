"""Runs beside the study's: what an arm answers when something that was the same for all, or was chosen, is another.
Each is shown next to the confirming results of the same seeds, as docs/STUDY.md has them. They describe, and test
nothing: their seeds are few, and they were planned because of what the study had shown."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..recipes import study as design
from .objective_numbers import answers, arms_of, budgets_of
from .objective_results import Key, most_steps
from .report import table

# Learning rates of PT, of IFT.
Rates = tuple[float, float]


def longer_lines(longer: Mapping[Key, dict], shorter: Sequence[Mapping[Key, dict]]) -> list[str]:
    """With the most labels, a row an arm and kind of fine-tuning: its steps and learning rate, each seed's accuracy,
    their mean and how far it is from LLaVA's with as many steps (least and largest of the seeds), the step that each
    was best at. Of the `shorter` ones those seeds that `longer` has, too."""
    budget = max(budgets_of(longer))
    seeds = seeds_of(longer)
    # Steps -> LLaVA's accuracies: its rows come first.
    baseline: dict[int, np.ndarray] = {}
    rows = []
    for arm in arms_of(longer):
        for results in (*shorter, longer):
            # One of the shorter ones is of a single arm.
            if arm not in arms_of(results):
                continue
            found = [results[arm, seed, budget] for seed in seeds]
            steps = most_steps(found[0])
            # Only right after pre-training there are none.
            assert steps is not None
            accuracies = np.array([answers(result) for result in found])
            gain = ""
            if arm == design.BASELINE:
                baseline[steps] = accuracies
            else:
                gain = gain_text(accuracies - baseline[steps])
            _, rate = rates(results, arm, budget)
            rows.append([
                arm,
                f"{steps:,}",
                f"{rate:g}",
                *(f"{accuracy:.1f}" for accuracy in accuracies),
                f"{accuracies.mean():.1f}",
                gain,
                "; ".join(f"{result['chosen_step']:,}" for result in found),
            ])  # fmt: skip
    seed_names = [f"seed {seed}" for seed in seeds]
    header = ["arm", "steps", "learning rate of IFT", *seed_names, "mean", "minus LLaVA", "best steps"]
    return table(header, rows)


def swapped_lines(swapped: Mapping[Key, dict], confirmed: Mapping[Key, dict], arm: str) -> list[str]:
    """LLaVA and `arm` with their own learning rates and with each other's: mean accuracy by labels, then the arm minus
    LLaVA where both have the same (mean over seeds; least and largest)."""
    seeds = seeds_of(swapped)
    budgets = budgets_of(swapped)
    # Learning rates -> arm -> budget -> accuracy of each seed.
    runs: dict[Rates, dict[str, dict[int, np.ndarray]]] = {}
    for results in (confirmed, swapped):
        for one in (design.BASELINE, arm):
            by_budget = {}
            for budget in budgets:
                by_budget[budget] = np.array([answers(results[one, seed, budget]) for seed in seeds])
            # An arm's learning rate of IFT is the same with all labels, or the table's column would not be true.
            (own_rates,) = {rates(results, one, budget) for budget in budgets if budget > 0}
            runs.setdefault(own_rates, {})[one] = by_budget

    rows = []
    differences = []
    for own_rates, by_arm in sorted(runs.items()):
        rate_texts = [f"{rate:g}" for rate in own_rates]
        for one, by_budget in sorted(by_arm.items()):
            means = [f"{by_budget[budget].mean():.1f}" for budget in budgets]
            rows.append([one, *rate_texts, *means])
        gains = [gain_text(by_arm[arm][budget] - by_arm[design.BASELINE][budget]) for budget in budgets]
        differences.append([f"{arm} - {design.BASELINE}", *rate_texts, *gains])
    header = ["arm", "learning rate of PT", "of IFT", *map(str, budgets)]
    return table(header, [*rows, *differences])


def seeds_of(results: Mapping[Key, dict]) -> list[int]:
    return sorted({seed for _, seed, _ in results})


def rates(results: Mapping[Key, dict], arm: str, budget: int) -> Rates:
    """Learning rates of PT and of IFT with so many labels."""
    first = next(result for key, result in results.items() if key[0] == arm and key[2] == budget)
    return first["identity"]["pretrain.learning_rate"], first["identity"]["finetune.learning_rate"]


def gain_text(gains: np.ndarray) -> str:
    return f"{gains.mean():+.1f} ({gains.min():+.1f} to {gains.max():+.1f})"
