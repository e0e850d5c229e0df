"""Is one model better than another on the same questions? Paired tests, because most gains in this field's tables
lie within two standard errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, sem
from scipy.stats import t as student_t

from .multiple_choice import is_correct

# Of bootstrap and permutation; a p can't be smaller than 1 / (DRAWS + 1).
DRAWS = 20_000


@dataclass
class Stratum:
    """Questions that are averaged together, and what their mean counts.

    wins: score of b minus that of a, (S, n).
    """

    wins: np.ndarray
    weight: float

    @property
    def seed_differences(self) -> np.ndarray:
        """(S,)"""
        return self.wins.mean(1) * self.weight

    def distinct_effects(self) -> tuple[np.ndarray, np.ndarray]:
        """What a question adds to the difference, each value once, and how many questions add it. Questions with the
        same sum over seeds are exchangeable: a test draws how often each sum occurs, not each question."""
        # (n,) sums over seeds -> (U,) different ones. Rounded: sums of thirds (VQA's scores) differ in the last bit.
        sums, counts = np.unique(self.wins.sum(0).round(9), return_counts=True)
        # Over S seeds and n questions: the effects of all questions add up to the difference of means.
        return sums * self.weight / self.wins.size, counts


def t_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of values that are drawn anew each (one a training seed), and its Student interval; NaN with one value."""
    drawn = np.asarray(values, float)
    mean = float(drawn.mean())
    # One seed says nothing of how far seeds lie apart.
    if len(drawn) < 2:
        return mean, float("nan"), float("nan")
    half = float(sem(drawn) * student_t.ppf((1 + level) / 2, len(drawn) - 1))
    return mean, mean - half, mean + half


def paired_t(differences: Sequence[float] | np.ndarray) -> dict:
    """Of one difference a seed: `difference`, their mean; `ci95`; `ci90`, outside of which an effect is excluded by
    two one-sided tests at 5%; `p`, two-sided; `n`; `positive`, how many are above 0. With one seed intervals and p are
    NaN."""
    differences = np.asarray(differences, float)
    mean, *ci95 = t_interval(differences, 0.95)
    _, *ci90 = t_interval(differences, 0.90)
    p = float("nan")
    if len(differences) > 1:
        # The floor: seeds that agree to the last digit would divide by 0, an infinite t.
        error = max(sem(differences), 1e-12)
        p = float(2 * student_t.sf(abs(mean) / error, len(differences) - 1))
    positive = int((differences > 0).sum())
    return {"difference": mean, "ci95": ci95, "ci90": ci90, "p": p, "n": len(differences), "positive": positive}


def holm_adjusted(p_values: Mapping) -> dict:
    """p-values of hypotheses that are asked together, by Holm's step-down procedure: one that is at most 5% falls when
    the chance of any false finding is to be 5%. NaN stays NaN and counts as not asked."""
    asked = sorted((name for name in p_values if not np.isnan(p_values[name])), key=p_values.__getitem__)
    adjusted = dict(p_values)
    # Never smaller than that of a hypothesis that stands before it: else it could fall while a better one stands.
    largest = 0.0
    for rank, name in enumerate(asked):
        largest = max(largest, min(1.0, (len(asked) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def labels_needed(budgets: Sequence[float], accuracies: Sequence[float], wanted: float) -> float:
    """How many labels (above 0, rising) reach an accuracy, interpolated in the logarithm of the labels where the
    largest accuracy so far first reaches it. The least budget if that is enough; infinity if none is."""
    # More labels may by chance give less: what was reached once counts.
    reached = np.maximum.accumulate(np.asarray(accuracies, float))
    at = int(np.searchsorted(reached, wanted))
    # No budget is enough.
    if at == len(reached):
        return float("inf")
    # The least one is, and fewer labels were not tried.
    if at == 0:
        return float(budgets[0])
    # Between two budgets, on a line over the logarithm of the labels.
    share = (wanted - reached[at - 1]) / (reached[at] - reached[at - 1])
    low = np.log(budgets[at - 1])
    high = np.log(budgets[at])
    return float(np.exp(low + share * (high - low)))


def paired_comparison(
    correct_a: np.ndarray,
    correct_b: np.ndarray,
    strata: Sequence | np.ndarray | None = None,
    seed: int = 0,
    weights: Mapping | Sequence[float] | None = None,
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
    a = np.atleast_2d(np.asarray(correct_a, float))
    b = np.atleast_2d(np.asarray(correct_b, float))
    if a.shape != b.shape or not a.size:
        raise ValueError(f"paired answers need equal, non-empty shapes (seeds, questions): got {a.shape}, {b.shape}")
    # (S, N): what b has more of each question.
    wins = b - a
    num_seeds, num_questions = wins.shape
    parts = split_strata(wins, strata, weights)
    # (S,): a seed's difference is the sum of its strata's, weighted.
    seed_differences = sum((part.seed_differences for part in parts), np.zeros(num_seeds))
    difference = float(seed_differences.mean())
    resampled, flipped = draw_differences(parts, np.random.default_rng(seed))
    # The exact test where it can be asked, else the permutation.
    if num_seeds == len(parts) == 1 and np.isin(wins, [-1, 0, 1]).all():
        test = "exact McNemar"
        p = mcnemar(wins)
    else:
        test = "sign-flip permutation over questions"
        if num_seeds > 1:
            test += f", mean of {num_seeds} seeds"
        p = sign_flip(difference, flipped)
    p_seeds = None
    if num_seeds > 1:
        p_seeds = t_test_over_seeds(seed_differences, num_questions)
    return {
        "difference": difference,
        "ci95": np.quantile(resampled, [0.025, 0.975]).tolist(),
        "p": p,
        "n": num_questions,
        "test": test,
        "p_seeds": p_seeds,
        "seed_differences": seed_differences.tolist(),
    }


def split_strata(
    wins_SN: np.ndarray, strata: Sequence | np.ndarray | None, weights: Mapping | Sequence[float] | None
) -> list[Stratum]:
    if strata is None:
        strata = [0] * wins_SN.shape[1]
    # (N,): each question's stratum by its number.
    labels, stratum_N = np.unique(np.asarray(strata), return_inverse=True)
    parts = []
    for number, label in enumerate(labels):
        # Without weights strata count alike, however many questions each has.
        weight = 1 / len(labels)
        if weights is not None:
            weight = weights[label]
        parts.append(Stratum(wins=wins_SN[:, stratum_N == number], weight=weight))
    return parts


def draw_differences(parts: Sequence[Stratum], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(DRAWS,) differences of the bootstrap, and as many if each question's sign were a coin's."""
    resampled = np.zeros(DRAWS)
    flipped = np.zeros(DRAWS)
    for part in parts:
        # Drawn by how often each effect occurs: thousands of questions have a handful of different ones.
        effects, counts = part.distinct_effects()
        # (DRAWS, U) counts @ (U,) effects -> (DRAWS,).
        resampled += rng.multinomial(counts.sum(), counts / counts.sum(), DRAWS) @ effects
        # Of c questions h keep their sign and c - h lose it: h - (c - h).
        heads = rng.binomial(counts, 0.5, (DRAWS, len(counts)))
        flipped += (2 * heads - counts) @ effects
    return resampled, flipped


def mcnemar(wins: np.ndarray) -> float:
    """p of the exact test: of the questions on which the models differ, each is as likely to be the better one."""
    better = int((wins > 0).sum())
    worse = int((wins < 0).sum())
    # No question tells the models apart.
    if better + worse == 0:
        return 1.0
    return float(binomtest(better, better + worse).pvalue)


def sign_flip(difference: float, flipped: np.ndarray) -> float:
    """p of the permutation test. What was seen is one of the draws, so that p is never 0."""
    # The margin is for rounding: draws that equal what was seen must count.
    as_large = np.abs(flipped) >= abs(difference) - 1e-12
    return float((1 + as_large.sum()) / (1 + len(flipped)))


def t_test_over_seeds(seed_differences: np.ndarray, num_questions: int) -> float:
    """p of the paired t-test."""
    num_seeds = len(seed_differences)
    # The floor is one question's weight: seeds that agree exactly did so by luck, and a finer spread can't be seen.
    error = max(sem(seed_differences), num_seeds**-0.5 / num_questions)
    return float(2 * student_t.sf(abs(seed_differences.mean()) / error, num_seeds - 1))


def compare_answers(seeds_a: Sequence[Sequence[dict]], seeds_b: Sequence[Sequence[dict]]) -> dict[str, dict]:
    """`paired_comparison` (b minus a) for every task, and `"average"`: the mean over tasks.

    Each argument is a list over seeds of answered questions (`generate_answers`); all must answer the same questions.
    """
    if len(seeds_a) != len(seeds_b):
        raise ValueError(f"seeds are paired: got {len(seeds_a)} of one model and {len(seeds_b)} of the other")
    # Questions are paired by their place, in which ids must agree.
    ids = [record["id"] for record in seeds_a[0]]
    for records in (*seeds_a, *seeds_b):
        if [record["id"] for record in records] == ids:
            continue
        raise ValueError("both models must answer the same questions in the same order in every seed")
    tasks = np.array([record["task"] for record in seeds_a[0]])
    correct_a = _correct(seeds_a)
    correct_b = _correct(seeds_b)
    compared = {}
    for task in dict.fromkeys(tasks):
        chosen = tasks == task
        compared[str(task)] = paired_comparison(correct_a[:, chosen], correct_b[:, chosen])
    compared["average"] = paired_comparison(correct_a, correct_b, strata=tasks)
    return compared


def _correct(seeds: Sequence[Sequence[dict]]) -> np.ndarray:
    """(S, N) bool."""
    by_seed = []
    for records in seeds:
        by_seed.append([is_correct(record) for record in records])
    return np.array(by_seed)
