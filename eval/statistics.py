"""Is one model better than another on the same questions? Paired tests, because most gains in this field's tables
lie within two standard errors."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student_t

from .multiple_choice import is_correct

DRAWS = 20_000


def paired_comparison(
    correct_a: np.ndarray, correct_b: np.ndarray, strata: Sequence | None = None, seed: int = 0
) -> dict:
    """Accuracy of b minus accuracy of a, both (S, N) or (N,) bool: S seeds, N questions in the same order.

    With `strata` (N labels, e.g. tasks) the accuracy is the mean of the strata's accuracies. Returns
    `difference`; `ci95`, a bootstrap over questions (within strata); `p`, two-sided: McNemar's exact test with one
    seed and stratum, else a sign-flip permutation over questions of the mean over seeds; `n` questions; `test`.

    All these speak of new questions for *these* trained models. Of new training seeds speak `seed_differences` (one
    a seed) and `p_seeds`, a paired t-test over seeds (None with one seed).
    """
    a, b = np.atleast_2d(np.asarray(correct_a, bool)), np.atleast_2d(np.asarray(correct_b, bool))
    if a.shape != b.shape or not a.size:
        raise ValueError(
            f"paired answers need equal, non-empty shapes (seeds, questions); got {a.shape} and {b.shape}"
        )
    num_seeds, num_questions = a.shape
    if strata is None:
        strata = [0] * num_questions
    if len(strata) != num_questions:
        raise ValueError(f"{len(strata)} strata for {num_questions} questions; give one label a question")
    labels, stratum_N = np.unique(np.asarray(strata), return_inverse=True)
    wins_SN = b.astype(int) - a.astype(int)
    rng = np.random.default_rng(seed)
    seed_differences = np.zeros(num_seeds)
    resampled, flipped = np.zeros(DRAWS), np.zeros(DRAWS)
    for stratum in range(len(labels)):
        wins = wins_SN[:, stratum_N == stratum]
        size = wins.shape[1] * num_seeds * len(labels)
        seed_differences += wins.sum(1) * num_seeds / size
        # Questions with the same sum over seeds are exchangeable: draw how often each sum occurs, not each question.
        sums, counts = np.unique(wins.sum(0), return_counts=True)
        resampled += rng.multinomial(counts.sum(), counts / counts.sum(), DRAWS) @ sums / size
        flipped += (2 * rng.binomial(counts, 0.5, (DRAWS, len(counts))) - counts) @ sums / size
    difference = seed_differences.mean()
    if num_seeds == len(labels) == 1:
        better, worse = int((wins_SN > 0).sum()), int((wins_SN < 0).sum())
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0
        test = "exact McNemar"
    else:
        p = (1 + (np.abs(flipped) >= abs(difference) - 1e-12).sum()) / (1 + DRAWS)
        test = "sign-flip permutation over questions" + (f", mean of {num_seeds} seeds" if num_seeds > 1 else "")
    return {
        "difference": float(difference),
        "ci95": [float(bound) for bound in np.quantile(resampled, [0.025, 0.975])],
        "p": float(p),
        "n": num_questions,
        "test": test,
        "p_seeds": _paired_t_test(seed_differences, grain=1 / num_questions),
        "seed_differences": [float(value) for value in seed_differences],
    }


def _paired_t_test(differences: np.ndarray, grain: float) -> float | None:
    """Two-sided p. `grain`, what one question weighs, is the least spread: seeds that agree exactly did so by luck."""
    if len(differences) < 2:
        return None
    error = max(differences.std(ddof=1), grain) / len(differences) ** 0.5
    return float(2 * student_t.sf(abs(differences.mean()) / error, len(differences) - 1))


def compare_answers(seeds_a: Sequence[Sequence[dict]], seeds_b: Sequence[Sequence[dict]]) -> dict[str, dict]:
    """`paired_comparison` (b minus a) for every task, and `"average"`: the mean over tasks.

    Each argument is a list over seeds of answered questions (`generate_answers`); all must answer the same questions.
    """
    if len(seeds_a) != len(seeds_b):
        raise ValueError(f"seeds are paired: got {len(seeds_a)} of one model and {len(seeds_b)} of the other")
    ids = [record["id"] for record in seeds_a[0]]
    for records in (*seeds_a, *seeds_b):
        if [record["id"] for record in records] != ids:
            raise ValueError("both models must answer the same questions in the same order in every seed")
    tasks = np.array([record["task"] for record in seeds_a[0]])
    a, b = (np.array([[is_correct(r) for r in records] for records in seeds]) for seeds in (seeds_a, seeds_b))
    compared = {
        str(task): paired_comparison(a[:, tasks == task], b[:, tasks == task]) for task in dict.fromkeys(tasks)
    }
    return {**compared, "average": paired_comparison(a, b, strata=tasks)}
