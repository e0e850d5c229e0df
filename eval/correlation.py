"""Do better probes go with better answers (paper, Figure 2)? `ola-vlm correlation` (commands/correlation.py).

A checkpoint's probe score is the mean over its layers. Pearson's r by task, with the range that is left of it when any
two checkpoints are taken out; the points tell nothing about causes.
"""

from argparse import Namespace
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..commands.running import command, tell
from ..files.escapes import mathtext, one_line, terminal
from ..files.strangers import read_object
from ..files.writing import save_figure
from ..probing.figures import STYLE, method_styles
from .benchmarks import shown_name

# Checkpoints that must remain without any two: r of three points is easily large by chance.
MIN_LEFT = 4


def read_points(out: Path, folders: Sequence[Path], score: str, plain: bool) -> tuple[dict, str]:
    """{task: [(name, probe score, benchmark score, its standard error)]}, in checkpoints' order, and the benchmark's
    name. A checkpoint is found in both by the state of its weights. ValueError for fewer than 3, for several
    benchmarks, and for files that our commands don't write."""
    try:
        return _read_points(out, folders, score, plain)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        files = f"{out / 'probes.json'} or a results.json"
        raise ValueError(f"{files} is not as `ola-vlm probe` and `ola-vlm eval` write them ({what})") from error


def _read_points(out: Path, folders: Sequence[Path], score: str, plain: bool) -> tuple[dict, str]:
    probed = read_object(out / "probes.json")
    # By the weights' state, not by name or path: a folder may have been trained anew in between.
    by_weights = {model["weights"]: model for model in probed["models"].values()}
    # Scores are named by the kind of probe: "resampler" is mean-centered, "resampler_plain" the paper's cosine.
    metric = probed["run"]["probe"]
    if plain:
        metric += "_plain"
    points = {}
    benchmarks = set()
    # All that can't be matched are named at once.
    unknown = []
    for folder in folders:
        results = read_object(folder / "results.json")
        run = results["run"]
        model = by_weights.get(run["weights"])
        if model is None:
            unknown.append(f"{folder} ({run['model']})")
            continue
        if score not in results["scores"]:
            raise ValueError(f"{folder} has no score {score!r}: choose from {', '.join(results['scores'])}")
        # Scores of two variants or benchmarks on one axis would show nothing.
        benchmarks.add(f"{shown_name(run)}, {score}")
        scored = results["scores"][score]
        for task, layers in model["scores"].items():
            # Layers count alike: the mean is the checkpoint's one score of a task.
            mean = np.mean([scores[metric] for scores in layers.values()])
            point = (model["name"], mean, scored["score"], scored["standard_error"])
            points.setdefault(task, []).append(point)
    if unknown:
        raise ValueError(f"{out} has no probes of the weights of {', '.join(unknown)}: probe them, or leave them out")
    # Each task has a point of each checkpoint; there may be no task at all.
    count = min((len(of_task) for of_task in points.values()), default=0)
    if len(benchmarks) != 1 or count < 3:
        what = f"{count} checkpoints and {len(benchmarks)} benchmarks"
        raise ValueError(f"got {what}: give at least 3 checkpoints and one benchmark with one variant")
    return points, benchmarks.pop()


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN where one of the two is the same for all."""
    # The largest value is the smallest: the deviation that r is divided by would be 0.
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def range_without_two(x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """The lowest and the highest r that are left when any two checkpoints are taken out; None if fewer than
    MIN_LEFT would remain. A range that crosses 0 says that one or two points make the correlation."""
    if len(x) - 2 < MIN_LEFT:
        return None
    left = []
    # n (n - 1) / 2 correlations of n - 2 points: cheap for any number of checkpoints.
    for pair in combinations(range(len(x)), 2):
        r = correlation(np.delete(x, pair), np.delete(y, pair))
        if not np.isnan(r):
            left.append(r)
    if not left:
        return None
    return min(left), max(left)


def describe(found: dict) -> str:
    """r, how many checkpoints it is of, and how far it depends on two of them."""
    text = f"r = {found['r']:+.2f} (n = {found['n']})"
    if found["without_two"] is None:
        return f"{text}, too few to say more"
    low, high = found["without_two"]
    return f"{text}, without any two: {low:+.2f} to {high:+.2f}"


def draw(path: Path, points: dict, benchmark: str, plain: bool) -> dict[str, dict]:
    """Saves the figure; {task: {"r", "n", "without_two"}}. There is no p-value: it takes each checkpoint for a fair
    draw, and those of a study are not. A line is drawn only where r keeps its sign without any two points."""
    found = {}
    names = [name for name, *_ in next(iter(points.values()))]
    styles = method_styles(names)
    with rc_context(STYLE):
        # Wider with each task, and higher with each row of the legend, which has three columns.
        figure = Figure(figsize=(4.4 * len(points) + 0.6, 4.8 + 0.3 * (len(names) // 3)), layout="constrained")
        axes = figure.subplots(1, len(points), squeeze=False, sharey=True)[0]
        for axis, (task, rows) in zip(axes, points.items(), strict=True):
            x = np.array([row[1] for row in rows])
            y = 100 * np.array([row[2] for row in rows])
            found[task] = {"r": correlation(x, y), "n": len(rows), "without_two": range_without_two(x, y)}
            for name, score, accuracy, error in rows:
                # The style that the checkpoint has in all figures, as a point.
                style = {**styles[name], "linestyle": ""}
                axis.errorbar(score, 100 * accuracy, yerr=100 * error, markersize=8, capsize=3, **style)
            left = found[task]["without_two"]
            # Both ends of the range have the same sign: then so has every r between them.
            if left is not None and left[0] * left[1] > 0:
                slope, level = np.polyfit(x, y, 1)
                ends = np.array([x.min(), x.max()])
                axis.plot(ends, slope * ends + level, color="0.5", linestyle="--", linewidth=1)
            title = f"{mathtext(task)}: {describe(found[task])}"
            # On two lines: the title is wider than its panel.
            axis.set_title(title.replace(", ", ",\n", 1), fontsize=12)
            metric = "plain" if plain else "mean-centered"
            axis.set_xlabel(f"probes, mean over layers:\n{metric} cosine")
        axes[0].set_ylabel(f"{mathtext(benchmark)} (%)\nbars: ± one standard error")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        save_figure(figure, path, dpi=110)
    return found


@command("correlation")
def main(args: Namespace) -> None:
    points, benchmark = read_points(args.out, args.folders, args.score, args.plain)
    found = draw(args.figure, points, benchmark, args.plain)
    for task, of_task in found.items():
        print(terminal(f"{one_line(task):<8} {describe(of_task)}; {benchmark}"))
    tell(f"Results: {args.figure}", "Next: more checkpoints make it say more: ola-vlm probe and ola-vlm eval them")
