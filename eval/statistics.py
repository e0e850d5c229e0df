"""Is one model better than another on the same questions? Paired tests, because most gains in this field's tables
lie within two standard errors."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import binomtest, sem
from scipy.stats import t as student_t

from .multiple_choice import is_correct

DRAWS = 20_000


def paired_comparison(
    correct_a: np.ndarray,
    correct_b: np.ndarray,
    strata: Sequence | None = None,
    seed: int = 0,
    weights: Mapping | None = None,
) -> dict:
    """Accuracy of b minus accuracy of a, both (S, N) or (N,), bool or scores from 0 to 1: S seeds, N questions in the
    same order.

    With `strata` (N labels, e.g. tasks) the accuracy is the mean of the strata's accuracies, or their sum with
    `weights` (label -> weight). Returns `difference`; `ci95`, a bootstrap over questions (within strata); `p`,
    two-sided: McNemar's exact test with one seed and stratum and answers right or wrong, else a sign-flip permutation
    over questions of the mean over seeds; `n` questions; `test`.

    All these speak of new questions for *these* trained models. Of new training seeds speak `seed_differences` (one
    a seed) and `p_seeds`, a paired t-test over seeds (None with one seed).
    """
    a, b = np.atleast_2d(np.asarray(correct_a, float)), np.atleast_2d(np.asarray(correct_b, float))
    if a.shape != b.shape or not a.size:
        raise ValueError(f"paired answers need equal, non-empty shapes (seeds, questions): got {a.shape}, {b.shape}")
    num_seeds, num_questions = a.shape
    wins_SN = b - a
    labels, stratum_N = np.unique([0] * num_questions if strata is None else strata, return_inverse=True)
    rng = np.random.default_rng(seed)
    seed_differences, resampled, flipped = np.zeros(num_seeds), np.zeros(DRAWS), np.zeros(DRAWS)
    for stratum, label in enumerate(labels):
        wins, weight = wins_SN[:, stratum_N == stratum], 1 / len(labels) if weights is None else weights[label]
        seed_differences += wins.mean(1) * weight
        # Questions with the same sum over seeds are exchangeable: draw how often each sum occurs, not each question.
        sums, counts = np.unique(wins.sum(0).round(9), return_counts=True)
        effects = sums * weight / wins.size
        resampled += rng.multinomial(counts.sum(), counts / counts.sum(), DRAWS) @ effects
        flipped += (2 * rng.binomial(counts, 0.5, (DRAWS, len(counts))) - counts) @ effects
    difference, p_seeds = seed_differences.mean(), None
    if num_seeds == len(labels) == 1 and np.isin(wins_SN, [-1, 0, 1]).all():
        better, worse = int((wins_SN > 0).sum()), int((wins_SN < 0).sum())
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0
        test = "exact McNemar"
    else:
        p = (1 + (np.abs(flipped) >= abs(difference) - 1e-12).sum()) / (1 + DRAWS)
        test = "sign-flip permutation over questions" + (f", mean of {num_seeds} seeds" if num_seeds > 1 else "")
    if num_seeds > 1:
        # What one question weighs is the least spread: seeds that agree exactly did so by luck.
        error = max(sem(seed_differences), num_seeds**-0.5 / num_questions)
        p_seeds = float(2 * student_t.sf(abs(difference) / error, num_seeds - 1))
    return {
        "difference": float(difference),
        "ci95": np.quantile(resampled, [0.025, 0.975]).tolist(),
        "p": float(p),
        "n": num_questions,
        "test": test,
        "p_seeds": p_seeds,
        "seed_differences": seed_differences.tolist(),
    }


def compare_answers(seeds_a: Sequence[Sequence[dict]], seeds_b: Sequence[Sequence[dict]]) -> dict[str, dict]:
    """`paired_comparison` (b minus a) for every task, and `"average"`: the mean over tasks.

    Each argument is a list over seeds of answered questions (`generate_answers`); all must answer the same questions.
    """
    if len(seeds_a) != len(seeds_b):
        raise ValueError(f"seeds are paired: got {len(seeds_a)} of one model and {len(seeds_b)} of the other")
    ids = [[record["id"] for record in records] for records in (*seeds_a, *seeds_b)]
    if any(of_seed != ids[0] for of_seed in ids):
        raise ValueError("both models must answer the same questions in the same order in every seed")
    tasks = np.array([record["task"] for record in seeds_a[0]])
    a, b = (np.array([[is_correct(r) for r in records] for records in seeds]) for seeds in (seeds_a, seeds_b))
    compared = {str(t): paired_comparison(a[:, tasks == t], b[:, tasks == t]) for t in dict.fromkeys(tasks)}
    return {**compared, "average": paired_comparison(a, b, strata=tasks)}
