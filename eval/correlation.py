"""Do better probes go with better answers (paper, Figure 2)? `ola-vlm correlation OUT EVAL_DIR... --figure FILE`.

OUT: of `ola-vlm probe`, with several checkpoints. EVAL_DIRs: of `ola-vlm eval`, one a checkpoint, all of one
benchmark. A checkpoint's probe score is the mean over its layers. Prints Pearson's r by task and draws the points;
they tell little below a handful of checkpoints, and nothing about causes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import pearsonr

from ola_vlm.probing.figures import STYLE
from ola_vlm.targets.escapes import mathtext, one_line, terminal
from ola_vlm.targets.files import read_object, save_figure


def read_points(out: Path, folders: Sequence[Path], score: str, plain: bool) -> tuple[dict, str]:
    """{task: [(name, probe score, benchmark score, its standard error)]}, in checkpoints' order, and the benchmark's
    name. A checkpoint is found in both by the state of its weights. ValueError for fewer than 3, or several
    benchmarks."""
    probed = read_object(out / "probes.json")
    by_weights = {one["weights"]: one for one in probed["models"].values()}
    metric = probed["run"]["probe"] + ("_plain" if plain else "")
    points, benchmarks, unknown = {}, set(), []
    for folder in folders:
        results = read_object(folder / "results.json")
        run, model = results["run"], by_weights.get(results["run"]["weights"])
        if model is None:
            unknown.append(f"{folder} ({run['model']})")
            continue
        if score not in results["scores"]:
            raise ValueError(f"{folder} has no score {score!r}: choose of {', '.join(results['scores'])}")
        benchmarks.add(f"{run['benchmark']} ({run['variant']}), {score}")
        found = results["scores"][score]
        for task, layers in model["scores"].items():
            mean = np.mean([one[metric] for one in layers.values()])
            points.setdefault(task, []).append((model["name"], mean, found["score"], found["standard_error"]))
    if unknown:
        raise ValueError(f"{out} has no probes of the weights of {', '.join(unknown)}: probe them, or leave them out")
    if len(benchmarks) != 1 or len(next(iter(points.values()))) < 3:
        count = len(next(iter(points.values()), []))
        what = f"{count} checkpoints and {len(benchmarks)} benchmarks"
        raise ValueError(f"got {what}: give at least 3 checkpoints and one benchmark with one variant")
    return points, benchmarks.pop()


def draw(path: Path, points: dict, benchmark: str, plain: bool) -> dict[str, dict]:
    """Saves the figure; {task: {"r", "p", "n"}}. A score that is the same for all has no correlation: NaN."""
    found, names = {}, [name for name, *_ in next(iter(points.values()))]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(points) + 0.6, 4.6 + 0.3 * (len(names) // 3)), layout="constrained")
        axes = figure.subplots(1, len(points), squeeze=False, sharey=True)[0]
        for axis, (task, rows) in zip(axes, points.items(), strict=True):
            x, y = np.array([row[1] for row in rows]), 100 * np.array([row[2] for row in rows])
            varies = np.ptp(x) > 0 and np.ptp(y) > 0
            r, p = pearsonr(x, y) if varies else (np.nan, np.nan)
            found[task] = {"r": float(r), "p": float(p), "n": len(rows)}
            for i, row in enumerate(rows):
                style = {"color": f"C{i % 10}", "marker": "osD^v"[i // 10 % 5], "markersize": 8, "linestyle": ""}
                axis.errorbar(row[1], 100 * row[2], yerr=100 * row[3], label=mathtext(row[0]), capsize=3, **style)
            if varies:
                slope, level = np.polyfit(x, y, 1)
                ends = np.array([x.min(), x.max()])
                axis.plot(ends, slope * ends + level, color="0.5", linestyle="--", linewidth=1)
            axis.set_title(f"{mathtext(task)}: r = {r:+.2f} (p = {p:.2g}), n = {len(rows)}")
            axis.set_xlabel(f"probes, mean over layers:\n{'plain' if plain else 'mean-centred'} cosine")
        axes[0].set_ylabel(f"{mathtext(benchmark)} (%)\nbars: standard error")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        save_figure(figure, path, dpi=110)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="ola-vlm correlation", description=__doc__, formatter_class=layout)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("folders", type=Path, nargs="+", metavar="EVAL_DIR")
    parser.add_argument("--figure", type=Path, required=True, help="the .png to write")
    parser.add_argument("--score", default="overall", help="of results.json")
    parser.add_argument(
        "--plain", action="store_true", help="the paper's plain cosine instead of the mean-centred one"
    )
    args = parser.parse_args(argv)
    try:
        points, benchmark = read_points(args.out, args.folders, args.score, args.plain)
        found = draw(args.figure, points, benchmark, args.plain)
    except (ValueError, OSError) as error:
        raise SystemExit(f"ola-vlm correlation: {error}") from error
    for task, one in found.items():
        line = f"{one_line(task):<8} r = {one['r']:+.2f}, p = {one['p']:.2g}, n = {one['n']} checkpoints; {benchmark}"
        print(terminal(line))
