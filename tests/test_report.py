"""miniature/report.py: the report is a pure function of report.json, and says no more than the numbers do."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import table_rows
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from ola_vlm.eval import correlation
from ola_vlm.eval.correlation import describe, draw, range_without_two, read_points
from ola_vlm.miniature import report, study
from ola_vlm.miniature.ablations import numbers, row_label, table_text
from ola_vlm.miniature.report import (
    CAPTIONS,
    accuracy_panel,
    bands_of,
    draw_methods,
    gain_panel,
    holm,
    loss_panel,
    main,
    probe_panel,
    report_text,
    summarize,
    summary_tables,
    write_report,
)
from ola_vlm.probing.figures import METHODS, OTHER_COLORS, TASK_COLORS, method_styles
from ola_vlm.recipes import miniature as recipe

TASKS = ["count", "relation", "depth", "distance"]


def accuracy(value):
    return {**dict.fromkeys(TASKS, value), "average": value}


def seed_results(seed, gain, losses):
    probes = {"depth": {str(layer): {"ridge": 0.5 + gain, "ridge_plain": 0.9 + gain} for layer in range(3)}}
    return {
        "seed": seed,
        "curve": [{"step": step, "accuracy": accuracy(0.5 + step / 1000 + gain)} for step in (0, 100, 200)],
        "accuracy": accuracy(0.7 + gain),
        "probes": {"pretrain": probes, "finetune": probes},
        "losses": {f"depth/{i}/{part}": [[1, 2.0], [2, 1.0]] for i in (1, 2) for part in ("smooth_l1", "contrastive")}
        if losses
        else {"ntp": [[1, 3.0]]},
        "seconds": {"pretrain": 10.0, "finetune": 20.0},
        "processor_seconds": {"pretrain": 9.0, "finetune": 17.0},
        "peak_memory_mb": 512.0,
    }


def compared(difference, p, p_seeds=None, num_seeds=1):
    return {
        "difference": difference,
        "ci95": [difference - 0.02, difference + 0.02],
        "p": p,
        "n": 400,
        "test": "a test",
        "p_seeds": p_seeds,
        "seed_differences": [difference] * num_seeds,
    }


@pytest.fixture
def results():
    gains = {"llava": 0.0, "ola_vlm": 0.1, recipe.CONTROL: 0.01}
    return {
        "methods": {
            name: {"seeds": [seed_results(seed, gain + seed / 100, name != "llava") for seed in range(2)]}
            for name, gain in gains.items()
        },
        "chance": {**dict.fromkeys(TASKS, 0.5), "count": 0.25},
        "comparison": {
            "count": compared(0.1, 0.001, 0.01, 2),
            "relation": compared(-0.1, 0.001, 0.01, 2),
            "depth": compared(0.05, 0.04, 0.01, 2),
            "distance": compared(0.1, 0.001, 0.3, 2),
            "average": compared(0.1, 0.001, 0.01, 2),
        },
        "machine": "two cores",
        "world": {"text-only accuracy": {"count": 0.26, "depth": 0.51}, "components": {"seg": {"mIoU": 0.4}}},
    }


def test_the_report_is_a_pure_function_of_its_folder(results, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "decoded_depth.png")
    file = write_report(tmp_path, results)
    text = file.read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == results
    for name in CAPTIONS.keys() - {"world.png", "decoded_seg.png"}:
        assert f"({name})" in text
        with Image.open(tmp_path / name) as picture:
            assert name == "decoded_depth.png" or picture.width >= 1000
    assert "world.png" not in text
    file.unlink()
    assert write_report(tmp_path).read_text() == text


def line_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def gains_of(line: str) -> dict[int, float]:
    """x: +gain, of a line of the report."""
    return {int(x): float(gain) for x, gain in re.findall(r"(\d+): ([+-][\d.]*\d)", line)}


def test_verdicts_are_no_stronger_than_the_tests(results):
    text = report_text(results, [])
    assert "**better**. +10.0 points [+8.0, +12.0], p = 0.001" in line_of(text, "- count:")
    assert "**worse**. -10.0 points" in line_of(text, "- relation:")
    assert "**better for these trained models, not shown for new seeds**" in line_of(text, "- distance:")
    assert "positive in 2 of 2" in line_of(text, "- count:")
    assert "positive in 0 of 2" in line_of(text, "- relation:")
    results["comparison"]["count"]["seed_differences"] = [0.08, 0.12]
    assert "over seeds ± 2.8, " in line_of(report_text(results, []), "- count:")  # the sample's deviation
    # significant alone, but not as two of four
    results["comparison"]["depth"]["p"], results["comparison"]["relation"]["p"] = 0.04, 0.03
    text = report_text(results, [])
    assert "**no difference shown**" in line_of(text, "- depth:")
    assert "**no difference shown**" in line_of(text, "- relation:")
    for c in results["comparison"].values():
        c |= {"p_seeds": None, "seed_differences": [c["difference"]]}
    assert "**better for these trained models" in line_of(report_text(results, []), "- count:")


def test_holm_corrects_for_the_number_of_tasks():
    assert holm({"a": 0.04, "b": 0.02, "c": 0.5}) == {"b": False, "a": False, "c": False}
    assert holm({"a": 0.04, "b": 0.01, "c": 0.02}) == {"b": True, "c": True, "a": True}


def test_tables_and_checks(results):
    slower = results["methods"]["ola_vlm"]["seeds"][1]
    slower["seconds"]["finetune"] = 40.0
    slower["processor_seconds"]["finetune"] = 27.0
    slower["peak_memory_mb"] = 700.0
    text = report_text(results, [])
    rows = table_rows(text)
    accuracies = {row["method"]: row for row in rows if "average" in row}
    assert [float(accuracies["chance"][task]) for task in [*TASKS, "average"]] == [25, 50, 50, 50, 43.8]
    assert accuracies["llava"]["count"] == "70.5 ± 0.7"  # mean and standard deviation over seeds
    costs = {row["method"]: [float(cell) for cell in list(row.values())[1:]] for row in rows if "average" not in row}
    assert costs["ola_vlm"] == [10, 30, 31, 700]  # means over seeds, and the largest memory
    timer = SimpleNamespace(processor_seconds={"world": 50.0, "targets": 10.0, "trials": 900.0})
    assert study.processor_minutes(timer, results) == pytest.approx((60 + 6 * 26 + 10) / 60)  # of every trial
    assert gains_of(line_of(text, "- 0:")) == {0: 10, 100: 10, 200: 10}
    assert gains_of(line_of(text, "- depth after PT:")) == {0: 0.1, 1: 0.1, 2: 0.1}
    assert re.findall(r"[\d.]+", line_of(text, "- text-only accuracy:")) == ["0.26", "0.51"]
    assert "0.4" in line_of(text, "- components:")
    assert "at least 10 points above chance" in text
    for seed in results["methods"]["llava"]["seeds"]:
        seed["accuracy"] |= {"count": 0.95, "depth": 0.55}
    text = report_text(results, [])
    assert "- count: llava is saturated at 95.0%." in text
    assert "- depth: llava ends only +5.0 points from chance." in text


def test_what_readme_quotes_is_of_the_report(results, tmp_path, monkeypatch):
    """A study's folder -> the stored file -> README's tables: every figure by its place."""
    layers = {
        name: {"depth": {str(layer): {"ridge": 0.5 + gain, "ridge_plain": 0.0} for layer in range(5)}}
        for name, gain in {"llava": 0.0, "ola_vlm": -0.1, recipe.CONTROL: 0.01}.items()
    }
    for name, method in results["methods"].items():
        for seed in method["seeds"]:
            seed["probes"] = {"pretrain": layers[name], "finetune": layers["llava"]}
    write_report(tmp_path, results)
    stored = tmp_path / "stored.json"
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--summary", str(stored)])
    main()
    summary = json.loads(stored.read_text())
    assert summary == summarize(results) and summary["seeds"] == 2
    text = summary_tables(summary)
    accuracy, probes = text.split("\n\n")
    rows = {row["accuracy after IFT (%)"]: row for row in table_rows(accuracy)}
    assert rows["LLaVA"]["count"] == "70.5 ± 0.7" and rows["LLaVA"]["mean minus LLaVA's"] == ""
    assert rows["OLA-VLM"]["mean"] == "80.5 ± 0.7" and rows["OLA-VLM"]["mean minus LLaVA's"] == "+10.0 [+8.0, +12.0]"
    assert rows[METHODS[recipe.CONTROL][0]]["mean minus LLaVA's"] == "+1.0"  # no interval was computed
    assert rows["chance"]["count"] == "25.0"
    (row,) = table_rows(probes)  # a control is none of the paper's claims
    assert row["depth, PT"] == "-.100" and row["depth, IFT"] == "+.000"


def test_a_run_of_one_method_without_probes_or_losses_still_reports(results, tmp_path):
    seed = {**results["methods"]["llava"]["seeds"][0], "probes": {}, "losses": {}}
    text = write_report(tmp_path, {"methods": {"mine": {"seeds": [seed]}}, "chance": results["chance"]}).read_text()
    (row,) = (row for row in table_rows(text) if row.get("method") == "mine" and "average" in row)
    assert row["average"] == "70.0" and "(accuracy.png)" in text and "probes.png" not in text


def test_a_method_has_one_color_and_name_in_all_figures(results):
    colors = [color for _, color, _ in METHODS.values()]
    every = [*colors, *OTHER_COLORS, *TASK_COLORS.values()]
    assert len({to_rgb(color) for color in every}) == len(every)
    styles = method_styles(["mine", "ola_vlm/seed0", "llava", "ola_vlm/seed1"])
    assert styles["llava"] == method_styles(["llava"])["llava"] and styles["llava"]["label"] == "LLaVA"
    assert styles["ola_vlm/seed0"]["color"] == styles["ola_vlm/seed1"]["color"] == METHODS["ola_vlm"][1]
    assert styles["ola_vlm/seed0"]["linestyle"] != styles["ola_vlm/seed1"]["linestyle"]
    assert styles["ola_vlm/seed1"]["label"] == "OLA-VLM, seed1" and styles["mine"]["label"] == "mine"
    axis = Figure().subplots()
    draw_methods(axis, results, lambda seed: {1: seed["accuracy"]["count"], 2: 0.5})
    drawn = {line.get_label(): line.get_color() for line in axis.get_lines()}
    assert drawn == {METHODS[name][0]: METHODS[name][1] for name in results["methods"]}
    gain_panel(results, axis)
    assert axis.get_xlabel() == "minus LLaVA"
    assert row_label("losses", "pt") == "pt (OLA-VLM)" and row_label("losses", "llava") == "LLaVA"
    assert row_label("tasks", "gen_depth") == "gen depth"


def test_gains_are_ours_minus_the_baselines(results):
    axis = Figure().subplots()
    gain_panel(results, axis)
    bars = axis.containers[0]
    assert bars.lines[0].get_xdata() == pytest.approx([10, -10, 5, 10, 10])
    ends = np.array([segment[:, 0] for segment in bars.lines[2][0].get_segments()])
    assert ends[0] == pytest.approx([8, 12]) and ends[1] == pytest.approx([-12, -8])


def test_panels_show_what_they_are_named_after(results):
    """A task's accuracy with its chance, a stage's probes by the score that is asked for, a loss by its own name."""
    seeds = results["methods"]["llava"]["seeds"]
    for seed in seeds:
        for point in seed["curve"]:
            point["accuracy"]["count"] += 0.1
        seed["probes"]["finetune"] = {"depth": {"1": {"ridge": 0.3, "ridge_plain": 0.4}}}
    axis = Figure().subplots()
    accuracy_panel(results, "count", axis)
    lines = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    assert lines["LLaVA"] == pytest.approx([60.5, 70.5, 80.5])
    assert set(lines["chance"]) == {25}
    (band,) = [one for one in axis.collections if to_rgb(one.get_facecolor()[0][:3]) == to_rgb(METHODS["llava"][1])]
    ends = [y for x, y in band.get_paths()[0].vertices if x == 0]
    assert (min(ends), max(ends)) == pytest.approx((60.5 - 0.5**0.5, 60.5 + 0.5**0.5))  # one deviation
    for stage, metric, expected in (("pretrain", "ridge_plain", 0.905), ("finetune", "ridge", 0.3)):
        axis = Figure().subplots()
        probe_panel(results, stage, "depth", metric, axis)
        assert axis.get_lines()[0].get_ydata()[0] == pytest.approx(expected)
        assert axis.get_title() == f"depth, {'after PT' if stage == 'pretrain' else 'after IFT'}"
    for seed in results["methods"]["ola_vlm"]["seeds"]:
        seed["losses"]["depth/2/contrastive"] = [[1, 5.0], [2, 4.0]]
    axis = Figure().subplots()
    loss_panel(results, "depth/2/contrastive", axis)
    assert axis.get_lines()[0].get_ydata().tolist() == [5, 4]


def test_each_figure_has_the_panels_of_its_score_and_stage(results, monkeypatch):
    """In their order: the first stage's above the second one's."""
    drawn = {}

    def keep(path, columns, panels, note, **shared):
        axes = [Figure().subplots() for _ in panels]
        for axis, panel in zip(axes, panels, strict=True):
            panel(axis)
        drawn[path.name] = [(axis.get_title(), axis.get_ylabel()) for axis in axes]

    monkeypatch.setattr(report, "save_grid", keep)
    report.draw_figures(results, Path())
    for name, label in (("probes.png", "mean-centered cosine"), ("probes_plain.png", "plain cosine")):
        assert drawn[name] == [("depth, after PT", label), ("depth, after IFT", label)]
    titles = [title for title, _ in drawn["summary.png"]]
    assert titles == ["mean of the tasks", "depth, after PT", "gain (points)", "depth, after IFT"]
    assert [title for title, _ in drawn["accuracy.png"]] == [*TASKS, "mean of the tasks"]


def test_a_table_of_ablations_has_the_deviation_of_the_sample():
    text = "\n".join(table_text("terms", {"both": [{"average": 50.0}, {"average": 52.0}]}))
    (row,) = table_rows(text)
    assert row["average"] == "51.0 ± 1.4" and row["seeds"] == "2"


def test_gains_of_several_methods_stand_below_each_other(results):
    """Each in its own color; the control's and a difference between two of them are no gains."""
    by_task = results["comparison"]
    results["comparisons"] = {
        f"{recipe.CONTROL} - llava": by_task,
        "words - llava": {task: compared(0.2, 0.001) for task in by_task},
        "words - ola_vlm": by_task,
    }
    axis = Figure().subplots()
    gain_panel(results, axis)
    ours, words = axis.containers
    assert words.lines[0].get_xdata() == pytest.approx([20] * 5)
    assert (ours.lines[0].get_ydata() < words.lines[0].get_ydata()).all()
    assert [bars.lines[0].get_color() for bars in (ours, words)] == [METHODS[name][1] for name in ("ola_vlm", "words")]
    assert [label.get_text() for label in axis.get_yticklabels()] == list(by_task)


def test_processor_seconds_of_an_earlier_version_are_not_known(results):
    for seed in results["methods"]["llava"]["seeds"]:
        del seed["processor_seconds"]
    costs = {row["method"]: row for row in table_rows(report_text(results, [])) if "processor (s)" in row}
    assert costs["llava"]["processor (s)"] == "?" and costs["ola_vlm"]["processor (s)"] == "26"


def arm_on_disk(root, method, seed, points, probes):
    """The folder that a trial leaves: `points`: step -> whether its answers are right."""
    folder = recipe.run_folder(method, seed, root)
    folder.mkdir(parents=True)
    question = {"task": "depth", "choices": ["a", "b"], "answer": "(A)"}
    for step, is_right in points.items():
        answered = [question | {"id": str(i), "output": "(A)" if is_right else "(B)"} for i in range(4)]
        (folder / f"answers_{step}.json").write_text(json.dumps(answered))
    curve = [{"step": step, "accuracy": accuracy(float(is_right))} for step, is_right in points.items()]
    result = {"seed": seed, "curve": curve, "accuracy": curve[-1]["accuracy"]}
    (folder / "result.json").write_text(json.dumps(result))
    for stage in ("pretrain", "finetune"):
        (folder / f"probe_{stage}.json").write_text(json.dumps(probes))


def test_the_study_collects_the_last_answers_and_the_test_images_probes(tmp_path):
    """Strengths are chosen on validation images, and what is reported was measured on others."""

    def scores(value):
        return {task["name"]: {"0": {"ridge": value, "ridge_plain": value}} for task in recipe.TASKS}

    # On the test images the other alpha is the better one.
    probes = {"validation": {"weak": scores(0.8), "strong": scores(0.7)}}
    probes["test"] = {"weak": scores(0.1), "strong": scores(0.9)}
    for seed in range(2):
        arm_on_disk(tmp_path, "llava", seed, {5: True, 10: False}, probes)
        arm_on_disk(tmp_path, "ola_vlm", seed, {5: False, 10: True}, probes)
    results = study.collect(tmp_path, ["llava", "ola_vlm"], 2, {}, {})
    assert results["comparison"]["depth"]["difference"] == 1  # OLA-VLM's minus LLaVA's, at the last point
    assert results["comparison"]["depth"]["seed_differences"] == [1, 1]
    assert results["ridge_alpha"] == dict.fromkeys(("gen", "depth", "seg"), "weak")
    for method in results["methods"].values():
        for seed in method["seeds"]:
            for of_stage in seed["probes"].values():
                assert of_stage["depth"]["0"]["ridge"] == 0.1


def test_ablations_are_means_over_the_llms_layers():
    """Layer 0 is its input, which no method trains differently."""
    layers = {"0": {"ridge": 9.0}, "1": {"ridge": 0.2}, "2": {"ridge": 0.4}}
    probes = {task["name"]: layers for task in recipe.TASKS}
    seed = {"accuracy": accuracy(0.5), "probes": {"pretrain": probes, "finetune": probes}}
    found = numbers(seed)
    assert found["depth, after PT"] == pytest.approx(0.3)
    assert found["average"] == 50


def test_a_run_of_the_study_has_its_own_seed_and_beginning(tmp_path):
    for method in (*recipe.METHODS, recipe.CONTROL):
        for stage in (recipe.pretrain, recipe.finetune):
            fields = stage(method, 3, tmp_path)
            assert fields["seed"] == 3
            assert str(recipe.run_folder(method, 3, tmp_path)) in fields["output_dir"]
        assert fields["checkpoint"] == recipe.pretrain(method, 3, tmp_path)["output_dir"]
        assert recipe.pretrain(method, 3, tmp_path)["shuffle_targets"] == (method == recipe.CONTROL)


def test_bands_are_explained(results):
    assert bands_of(results) == "lines: means over 2 seeds, bands: ± one standard deviation"
    results["methods"]["llava"]["seeds"].pop()
    assert "means over 1 to 2 seeds" in bands_of(results)


def test_two_of_seven_points_make_no_correlation(tmp_path):
    x, y = np.array([0.1, 0.11, 0.12, 0.13, 0.14, 0.8, 0.9]), np.array([76, 77, 75, 77, 76.5, 73, 72]) / 100
    low, high = range_without_two(x, y)
    assert low < -0.9 and high > 0
    clear = np.linspace(0, 1, 7)
    assert range_without_two(clear, 1 - clear) == pytest.approx((-1, -1))
    assert range_without_two(x[:5], y[:5]) is None  # too few are left
    assert range_without_two(clear, np.ones(7)) is None  # no correlation at all
    rows = [(f"model {i}", x[i], y[i], 0.01) for i in range(7)]
    found = draw(tmp_path / "figure.png", {"depth": rows}, "a benchmark", plain=False)
    assert found["depth"]["r"] == pytest.approx(np.corrcoef(x, y)[0, 1]) and "p" not in found["depth"]
    text = describe(found["depth"])
    assert text.startswith("r = -0.9") and f"without any two: {low:+.2f} to {high:+.2f}" in text


def test_points_are_means_over_layers_and_one_standard_error(tmp_path, monkeypatch):
    """The centered score unless the plain one is asked for; each checkpoint's own benchmark score."""
    models = {}
    for i in range(7):
        layers = {str(layer): {"ridge": 0.1 * i + layer, "ridge_plain": 5.0 - i + layer} for layer in range(3)}
        models[f"m{i}"] = {"name": f"m{i}", "weights": f"w{i}", "scores": {"depth": layers}}
        (tmp_path / str(i)).mkdir()
        run = {"benchmark": "cvbench", "variant": "official", "model": f"m{i}", "weights": f"w{i}"}
        scores = {"overall": {"score": 0.5 + 0.01 * i, "standard_error": 0.02, "n": 100}}
        (tmp_path / str(i) / "results.json").write_text(json.dumps({"run": run, "scores": scores}))
    (tmp_path / "probes.json").write_text(json.dumps({"run": {"probe": "ridge"}, "models": models}))
    folders = [tmp_path / str(i) for i in reversed(range(7))]
    drawn = []
    monkeypatch.setattr(correlation, "save_figure", lambda figure, *place, **options: drawn.append(figure))
    for plain, first, r in ((False, 0.6 + 1, 1), (True, 5 - 6 + 1, -1)):
        points, _ = read_points(tmp_path, folders, "overall", plain)
        assert points["depth"][0] == pytest.approx(("m6", first, 0.56, 0.02))
        assert draw(tmp_path / "figure.png", points, "a benchmark", plain)["depth"]["r"] == pytest.approx(r)
        (axis,) = drawn[-1].axes
        (bar,) = axis.containers[0].lines[2][0].get_segments()
        assert bar[:, 1] == pytest.approx([54, 58])
        # A line is drawn where the sign stands without any two points.
        assert sum(len(line.get_xdata()) == 2 for line in axis.get_lines()) == 1
    places = [(1, 5), (2, 6), (3, 5), (4, 6), (5, 5), (9, 9), (10, 1)]
    unclear = [(f"m{i}", x, y, 0.01) for i, (x, y) in enumerate(places)]
    draw(tmp_path / "figure.png", {"depth": unclear}, "a benchmark", plain=False)
    assert not any(len(line.get_xdata()) == 2 for line in drawn[-1].axes[0].get_lines())
