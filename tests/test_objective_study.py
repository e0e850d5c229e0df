"""`ola-vlm study objectives`: 2 steps a stage on a few scenes, with the shipped components; its trials run in this
process, one after the other."""

import copy
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import table_rows
from matplotlib.figure import Figure
from transformers import AutoModelForImageTextToText, AutoProcessor

from ola_vlm.eval.multiple_choice import is_correct
from ola_vlm.eval.statistics import holm_adjusted, labels_needed, paired_t, t_interval
from ola_vlm.inference.generate import generate_answers
from ola_vlm.miniature import (
    asking,
    explorations,
    objective_numbers,
    objective_report,
    objective_results,
    objective_trial,
    objectives,
    placement,
    processes,
)
from ola_vlm.miniature.asking import Questions, permuted, token_placement
from ola_vlm.miniature.objective_trial import Evaluations, Trial, labelled_scenes
from ola_vlm.miniature.stored_vision import StoredCollator, StoredVision, features_as_pixels, weights_hash
from ola_vlm.recipes import miniature as recipe
from ola_vlm.recipes import study as arms
from ola_vlm.training.arguments import OlaVlmArguments

SCALE = objectives.SHRUNK["scale"]
BUDGETS = [0, 8, 24]
TWO_ARMS = ["llava", "ola_vlm_shuffled"]
SETTINGS = dict(arms.DEFAULT_SETTINGS)


class Stopped(Exception):
    """An interruption."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A study's folder with its world, prepared once; nothing is trained in it."""
    root = tmp_path_factory.mktemp("objectives") / "study"
    objectives.prepare(root, objectives.SHRUNK)
    return root


@pytest.fixture
def root(world, tmp_path):
    """A study's folder of a test's own, over the prepared world."""
    folder = tmp_path / "study"
    folder.mkdir()
    for name in ("data", "targets", "features", "study.json", "settings.json", "seconds.json", "world.png"):
        (folder / name).symlink_to(world / name)
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Trials run here, not in processes of their own."""

    def run_jobs(jobs, workers, what, done=lambda: None, finished=0):
        for job in jobs.values():
            job.folder.mkdir(parents=True, exist_ok=True)
            Trial(**json.loads(job.argument)).run()
            done()

    monkeypatch.setattr(objectives, "run_jobs", run_jobs)
    monkeypatch.setattr(objectives, "prepare", lambda root, size: None)


@pytest.fixture
def seen(monkeypatch):
    """What trials do, in order: ("batch", row ids, targets' images) and ("asked", split, change)."""
    events = []
    call, correct = StoredCollator.__call__, Questions.correct

    def called(self, rows):
        if self.processor is not None:
            others = [row.get("target_images") for row in rows]
            events.append(("batch", [row["id"] for row in rows], others))
        return call(self, rows)

    def asked(self, model, change=None):
        events.append(("asked", self.questions[0]["id"].split("_")[0], change))
        return correct(self, model, change)

    monkeypatch.setattr(StoredCollator, "__call__", called)
    monkeypatch.setattr(Questions, "correct", asked)
    return events


def trial(root, arm="llava", seed=0, stage="confirm", budgets=BUDGETS, settings=SETTINGS) -> Trial:
    return Trial(str(root), stage, arm, seed, budgets, settings, SCALE)


def batches(events) -> list:
    return [ids for kind, ids, _ in events if kind == "batch"]


# ------------------------------------------------------------------------------------------------------ the whole


@pytest.mark.slow
def test_a_study_from_tuning_to_the_report(root, in_process, seen, capsys, tmp_path, monkeypatch):
    rounds = (("pretrain_lr", (1e-2, 1e-3), (0,)), ("weight", (1.0, 3.0), (0,)), ("finetune_lr_few", (1e-3,), (8,)))
    monkeypatch.setattr(arms, "ROUNDS", rounds)
    options = ["objectives", "--shrunk", "--out", str(root), "--settings", str(tmp_path / "settings.json")]
    objectives.main([*options, "--arms", "llava", "ola_vlm", "ola_vlm_shuffled", "--stage", "tune", "--seeds", "100"])
    options += ["--arms", *TWO_ARMS]
    tuned = json.loads((tmp_path / "settings.json").read_text())
    assert set(tuned["settings"]) == {"llava", "ola_vlm"}  # a control takes its arm's
    assert set(tuned["scores"]["llava"]) == {"pretrain_lr", "finetune_lr_few"}
    assert set(tuned["scores"]["ola_vlm"]["weight"]) == {"1", "3"}
    for arm, by_setting in tuned["scores"].items():
        for setting, scores in by_setting.items():
            assert scores[f"{tuned['settings'][arm][setting]:g}"] == max(scores.values())
    assert {split for kind, split, _ in seen if kind == "asked"} == {"validation"}

    capsys.readouterr()
    options += ["--budgets", "0", "24"]
    objectives.main([*options, "--seeds", "0", "1"])
    printed = capsys.readouterr().out
    assert "8 results of confirming runs" in printed and "ola_vlm_shuffled - llava" in printed
    files = sorted((root / "results" / "confirm").glob("*/*.json"))
    assert len(files) == 8
    result = json.loads((root / "results" / "confirm" / "llava" / "seed1_budget24.json").read_text())
    assert len(result["correct"]) == sum(result["questions"].values()) and set(result["correct"]) <= {"0", "1"}
    share = result["correct"][: result["questions"]["count"]].count("1") / result["questions"]["count"]
    assert result["accuracy"]["count"] == pytest.approx(share, abs=1e-5)
    assert result["identity"]["pretrain.learning_rate"] == tuned["settings"]["llava"]["pretrain_lr"]
    control = json.loads((root / "results" / "confirm" / "ola_vlm_shuffled" / "seed1_budget24.json").read_text())
    assert control["identity"]["pretrain.learning_rate"] == tuned["settings"]["ola_vlm"]["pretrain_lr"]
    assert result["peak_memory_mb"] > 100 and result["seconds"]["finetune"] > 0
    assert set(result["probes"]["test"]["0.1"]) == {"gen", "depth", "seg"}

    stamps = [file.stat().st_mtime_ns for file in files]
    seen.clear()
    objectives.main([*options, "--seeds", "0", "1"])
    assert [file.stat().st_mtime_ns for file in files] == stamps and not seen

    packed = tmp_path / "packed"
    objectives.main(["objectives", "--report", "--out", str(root), "--pack", str(packed)])
    assert sorted(path.name for path in packed.glob("*.jsonl")) == ["llava.jsonl", "ola_vlm_shuffled.jsonl"]
    first = (root / "report.md").read_text()
    objectives.main(["objectives", "--report", "--out", str(packed)])
    assert (packed / "report.md").read_text() == first and (packed / "accuracy.png").exists()
    with pytest.raises(SystemExit, match="no settings of moments"):
        objectives.main([*options, "--arms", "moments"])


@pytest.mark.slow
def test_an_interrupted_trial_goes_on(root, monkeypatch, seen):
    finetune = Trial.finetune

    def stopped(self, budget):
        if budget == 24:
            raise Stopped
        finetune(self, budget)

    monkeypatch.setattr(Trial, "finetune", stopped)
    with pytest.raises(Stopped):
        trial(root).run()
    done = [trial(root).result_file(budget) for budget in BUDGETS]
    assert [file.exists() for file in done] == [True, True, False]
    stamps = [file.stat().st_mtime_ns for file in done[:2]]
    monkeypatch.undo()
    trial(root).run()
    assert done[2].exists() and [file.stat().st_mtime_ns for file in done[:2]] == stamps

    other = root.parent / "whole"
    other.mkdir()
    for name in ("data", "targets", "features", "study.json"):
        (other / name).symlink_to(root / name)
    trial(other).run()
    again = json.loads(trial(other).result_file(24).read_text())
    went_on = json.loads(done[2].read_text())
    for name in ("correct", "validation", "chosen_step", "changes", "identity"):
        assert went_on[name] == again[name], name


def test_results_of_another_study_are_refused_by_name(root):
    trial(root, budgets=[0]).run()
    others = {**SETTINGS, "pretrain_lr": 3e-4}
    with pytest.raises(ValueError, match=r"seed0_budget0\.json is of another study: pretrain\.learning_rate 0\.001"):
        trial(root, budgets=[0], settings=others).run()
    file = trial(root).result_file(0)
    result = json.loads(file.read_text())
    result["identity"]["language_model"] = "another"
    file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="language_model another"):
        trial(root, budgets=[0]).run()
    file.with_name("seed1_budget0.json").write_text(json.dumps(json.loads(file.read_text()) | {"seed": 1}))
    result["identity"]["language_model"] = "a third"
    file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="mixes results of different language_model: a third, another"):
        objective_results.read_results(root)


@pytest.mark.parametrize(
    ("asked", "expected", "left_out"),
    [
        (["6000"], {"pretrain_lr": [6000], "weight": [6000], "finetune_lr_many": [6000]}, "finetune_lr_few"),
        (
            ["0", "300"],
            {"pretrain_lr": [0, 300], "weight": [0, 300], "finetune_lr_few": [300]},
            "finetune_lr_many",
        ),
    ],
)
def test_a_setting_is_tuned_where_it_plays_a_part(root, tmp_path, monkeypatch, capsys, asked, expected, left_out):
    """At other budgets all of its candidates are one result, of which the first would be chosen."""
    tuned = []
    found = {"settings": {"llava": SETTINGS}, "scores": {"llava": {}}}
    monkeypatch.setattr(objectives, "prepare", lambda root, size: None)
    monkeypatch.setattr(objectives, "read_tuning", lambda root: {})
    monkeypatch.setattr(objectives.Study, "tune", lambda self, names, seeds, rounds: tuned.extend(rounds) or found)
    options = ["objectives", "--stage", "tune", "--out", str(root), "--settings", str(tmp_path / "settings.json")]
    objectives.main([*options, "--arms", "llava", "--budgets", *asked])
    assert {setting: budgets for setting, _, budgets in tuned} == expected
    told = f"{left_out} is not tuned, since it plays no part at --budgets {', '.join(asked)}: it stays 0.001"
    assert told in capsys.readouterr().out
    tuned.clear()
    objectives.main([*options, "--arms", "llava"])
    assert tuned == list(arms.ROUNDS)


def test_tunings_trials_that_share_a_pretraining_train_it_once(root, monkeypatch):
    """They run side by side, as with --processes 2, and differ in fine-tuning alone."""
    trained = []

    def train(self, fields, callbacks):
        trained.append(fields["output_dir"])
        self.checkpoint.mkdir(parents=True)
        # Long enough for the other one to come.
        time.sleep(0.5)
        assert self.checkpoint.exists()
        return SimpleNamespace(state=SimpleNamespace(log_history=[]))

    monkeypatch.setattr(Trial, "train", train)
    both = [trial(root, stage="tune", settings={**SETTINGS, "finetune_lr_few": rate}) for rate in (1e-3, 3e-3)]
    assert both[0].checkpoint == both[1].checkpoint and both[0].folder != both[1].folder
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(Trial.pretrain, both))
    assert trained == [str(both[0].checkpoint)] and found[0] == found[1]
    assert both[0].checkpoint.exists()


def test_seeds_of_tuning_do_not_confirm(tmp_path):
    with pytest.raises(SystemExit, match=r"\[100\] are those of tuning"):
        objectives.main(["objectives", "--seeds", "0", "100", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"--budgets \[7\]: choose from \[0, 75, 300, 1000, 6000\]"):
        objectives.main(["objectives", "--budgets", "7", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_settings_of_other_components_are_refused(world, tmp_path):
    found = {"settings": {"llava": SETTINGS}, "scores": {"llava": {}}}
    file = tmp_path / "settings.json"
    objectives.write_settings(file, world, [100], found)
    objectives.write_settings(file, world, [100], {"settings": {"ola_vlm": SETTINGS}, "scores": {"ola_vlm": {}}})
    assert objectives.read_settings(file, world, ["llava", "ola_vlm"])["ola_vlm"] == SETTINGS
    content = json.loads(file.read_text())
    content["world"]["depth"] = "another"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tuned with another depth: run --stage tune"):
        objectives.read_settings(file, world, ["llava"])
    # Nor do new ones take their place.
    with pytest.raises(ValueError, match="was tuned with other data or components: give --settings another file"):
        objectives.write_settings(file, world, [100], found)
    assert json.loads(file.read_text()) == content


# -------------------------------------------------------------------------------------------------------- pairing


@pytest.mark.slow
def test_a_seed_pairs_all_arms(root, seen):
    by_arm = {}
    for arm, seed in [("llava", 0), ("ola_vlm_shuffled", 0), ("ola_vlm_shuffled", 1)]:
        seen.clear()
        trial(root, arm, seed, budgets=[8]).run()
        by_arm[arm, seed] = list(seen)
    llava, shuffled, of_seed_1 = by_arm.values()
    assert len(batches(llava)) == 5  # three of pre-training, the last one not used, and two of fine-tuning
    assert batches(llava) == batches(shuffled)
    assert batches(shuffled)[:3] != batches(of_seed_1)[:3]
    assert labelled(shuffled) != labelled(of_seed_1)
    assert all(other is None for others in targets_of(llava).values() for other in others)
    own, others = targets_of(shuffled), targets_of(of_seed_1)
    assert all(image is not None and name not in image[0] for name, (image,) in own.items())
    assert any(own[name] != others[name] for name in own.keys() & others.keys())


def labelled(events) -> set[str]:
    """The scenes that fine-tuning saw, in its two batches."""
    return {name for batch in batches(events)[-2:] for name in batch}


def targets_of(events) -> dict[str, list]:
    """Image -> whose targets it got in pre-training: its first three batches."""
    found = {}
    for _, names, others in [event for event in events if event[0] == "batch"][:3]:
        found.update({name: [of_name] for name, of_name in zip(names, others, strict=True)})
    return found


def test_arms_begin_with_the_same_projector(world, tmp_path):
    from ola_vlm.train import load_model

    projectors = []
    for arm, seed in [("llava", 0), ("ola_vlm", 0), ("llava", 1)]:
        fields = arms.pretrain_fields(arm, seed, SETTINGS, SCALE, world, tmp_path)
        model, _ = load_model(OlaVlmArguments(**fields))
        projectors.append(model.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(projectors[0], projectors[1]) and not torch.equal(projectors[0], projectors[2])


def test_labelled_scenes_are_nested_and_hang_on_the_seed():
    small, large = labelled_scenes(6000, 3, 75), labelled_scenes(6000, 3, 300)
    assert len(small) == 75 and set(small) < set(large)
    assert set(small) != set(labelled_scenes(6000, 4, 75))
    assert (small == labelled_scenes(6000, 3, 75)).all()


def test_probes_are_scored_on_held_out_scenes(root, monkeypatch):
    """Alphas on those of validation, what is reported on those of the test."""

    class Fitter:
        def solve(self, alphas):
            return alphas

    scored = []

    def score(names, probes):
        scored.append(names)
        return {alpha: {"depth": {1: {"ridge": float(len(scored))}}} for alpha in probes}, {}

    monkeypatch.setattr(objective_trial, "fit_ridge", lambda *how: (Fitter(), None, {"depth": None}))
    monkeypatch.setattr(objective_trial, "batches", lambda reader, targets, paths, size: [one.name for one in paths])
    monkeypatch.setattr(objective_trial, "score_probes", score)
    found = trial(root).probe(None, None)
    splits = [[name.split("_")[0] for name in names] for names in scored]
    assert splits == [["validation"] * 8, ["test"] * 8]
    assert found["validation"]["0.1"]["depth"] == 1 and found["test"]["0.1"]["depth"] == {"1": 2}


def test_tokens_are_placed_for_validation_scenes(root, monkeypatch):
    placed = []
    monkeypatch.setattr(objective_trial, "token_placement", lambda model, features, words: placed.append(features))
    one = trial(root)
    one.placement(None)
    names = [f"validation_{number:05d}.png" for number in range(asking.PLACED_IMAGES)]
    assert placed[0].equal(one.store.features(names))


def test_losses_of_a_run_are_those_that_it_logged_last():
    history = [{"loss": 3.0, "loss/ntp": 3.0}, {"loss": 1.0, "loss/ntp": 1.0}, {"train_loss": 2.0}]
    assert objective_trial.last_losses(history) == {"loss/ntp": 1}


def test_test_questions_are_asked_once_and_last(root, seen):
    trial(root, "ola_vlm", budgets=[0, 8]).run()
    asked = [(split, change) for kind, split, change in seen if kind == "asked"]
    ends = [("test", None), *(("validation", change) for change in asking.CHANGES)]
    assert asked == [("validation", None), *ends, ("validation", None), ("validation", None), *ends]


@pytest.mark.parametrize("arm", arms.ARMS)
def test_arms_are_known_fields(arm):
    """OlaVlmArguments raises for fields and values that it does not know."""
    for budget in arms.BUDGETS:
        settings = {**SETTINGS, "finetune_lr_few": 2e-3, "weight": 2.0}
        fields = arms.pretrain_fields(arm, 5, settings, arms.SCALE, "root", "out")
        args = OlaVlmArguments(**fields)
        weights = [task.get("loss_weight", 0.5) for task in arms.ARMS[arm]["pretrain"].get("tasks", [])]
        assert [task["loss_weight"] for task in args.tasks] == [2 * weight for weight in weights]
        assert set(args.teachers) == {task["name"] for task in args.tasks}
        if budget > 0:
            fields = arms.finetune_fields(arm, 5, budget, settings, arms.SCALE, "root", "out", "pt", "data.json")
            args = OlaVlmArguments(**fields)
            assert args.learning_rate == (2e-3 if budget <= arms.FEW else 1e-3)
            assert (args.seed, args.data_seed) == (5, 5)


def test_only_objectives_of_their_own_are_tuned():
    """A control differs from its arm in content alone: its settings are the arm's."""
    tuned = [arm for arm in arms.ARMS if arm not in arms.SETTINGS_OF]
    assert tuned == ["llava", "ola_vlm", "patch", "words", "moments"]
    assert set(arms.SETTINGS_OF.values()) <= set(tuned)
    for own, control in arms.CONTROLS.items():
        assert arms.SETTINGS_OF[control] == arms.SETTINGS_OF.get(own, own)
    for both, first in arms.ON_TOP.items():
        assert arms.SETTINGS_OF[both] == first


@pytest.mark.parametrize(("own", "control"), arms.CONTROLS.items())
def test_a_control_differs_by_whose_targets_it_gets(own, control):
    for stage in ("pretrain", "finetune"):
        former, latter = arms.ARMS[own][stage], arms.ARMS[control][stage]
        trains_losses = stage == "pretrain" or former.get("embedding_losses", False)
        assert latter == ({**former, "shuffle_targets": True} if trains_losses else former)


def test_settings_that_do_not_matter_change_no_identity(world):
    for changed, budget, same in [
        ({"finetune_lr_many": 9.0}, 24, True),
        ({"finetune_lr_few": 9.0}, 0, True),
        ({"finetune_lr_few": 9.0}, 24, False),
        ({"weight": 9.0}, 24, True),
    ]:
        found = [
            objective_trial.identity(world, "llava", 0, budget, settings, SCALE)
            for settings in (SETTINGS, {**SETTINGS, **changed})
        ]
        assert (found[0] == found[1]) == same, changed
    weights = [
        objective_trial.identity(world, "ola_vlm", 0, 0, {**SETTINGS, "weight": weight}, SCALE)
        for weight in (1.0, 2.0)
    ]
    assert weights[0]["pretrain.tasks"] != weights[1]["pretrain.tasks"]


SLOW_ARMS = [pytest.param(arm, marks=pytest.mark.slow) for arm in ("patch_half", "moments_ola_vlm")]


@pytest.mark.parametrize("arm", ["words_shuffled", *SLOW_ARMS])
def test_arms_train_what_they_say(root, arm):
    """The losses that their runs log, and whose targets lie on disk."""
    trial(root, arm, budgets=[0, 8]).run()
    results = [json.loads(trial(root, arm).result_file(budget).read_text()) for budget in (0, 8)]
    losses = [{name.split("/")[1] for name in result["losses"]} for result in results]
    tasks = {task["name"] for task in arms.ARMS[arm]["pretrain"]["tasks"]}
    assert losses[0] == {"ntp", *tasks}
    assert losses[1] == {"ntp", *(tasks if arm == "patch_half" else ())}
    assert results[0]["target_bytes"] > 0
    assert set(results[1]["changes"]) == (set(asking.CHANGES) if "ola_vlm" in arm else {"permuted_patches"})


# ---------------------------------------------------------------------------------------------------- evaluations


class Control:
    should_training_stop = False


def test_the_best_step_is_kept_and_patience_ends():
    model = torch.nn.Linear(1, 1, bias=False)
    scores = {2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6}

    class State:
        max_steps = 20
        global_step = 0

    evaluations = Evaluations(lambda _: {"accuracy": {"average": scores[State.global_step]}}, count=10, patience=2)
    control = Control()
    for step in range(1, 9):
        State.global_step = step
        with torch.no_grad():
            model.weight.fill_(step)
        evaluations.on_step_end(None, State, control, model)
        assert control.should_training_stop == (step == 8)
    assert [point["step"] for point in evaluations.curve] == [2, 4, 6, 8]
    assert evaluations.best["step"] == 4
    evaluations.restore(model)
    assert model.weight.item() == 4


# -------------------------------------------------------------------------------------------------------- asking


@pytest.fixture(scope="module")
def shipped(world):
    """The shipped OLA-VLM, its processor, a store and 20 validation questions, 5 a task."""
    model = AutoModelForImageTextToText.from_pretrained(recipe.WEIGHTS / "ola_vlm", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(recipe.WEIGHTS / "ola_vlm", trust_remote_code=True)
    images = sorted((world / "data" / "images").glob("*.png"))
    store = StoredVision.prepare(world / "features", recipe.WEIGHTS / "vision_tower", images)
    questions = json.loads((world / "data" / "validation_questions.json").read_text())
    few = [
        question for task in dict.fromkeys(q["task"] for q in questions) for question in of_task(questions, task)[:5]
    ]
    return model.float().eval(), processor, store, few


def of_task(questions, task):
    return [question for question in questions if question["task"] == task]


def test_answers_are_those_of_generate_answers(shipped, world):
    model, processor, store, questions = shipped
    answered = generate_answers(model, processor, questions, world / "data" / "images")
    right = [is_correct(record) for record in answered]
    assert Questions(questions, processor, store).correct(model) == right
    assert any(right) and not all(right)


def test_stored_features_are_the_towers(shipped, world):
    model, processor, store, questions = shipped
    names = [question["image"] for question in questions[:4]]
    images = [store.open(str(world / "data" / "images" / name)) for name in names]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        live = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
        with features_as_pixels(model):
            stored = torch.stack(list(model.model.get_image_features(store.features(names)).pooler_output))
    torch.testing.assert_close(stored, live, atol=1e-4, rtol=1e-4)
    assert model.model.vision_tower is not None and type(model.model.vision_tower).__name__ != "StoredTower"


def test_features_of_another_tower_are_made_anew(world, tmp_path):
    images = sorted((world / "data" / "images").glob("*.png"))[:3]
    tower = tmp_path / "tower"
    tower.mkdir()
    for file in (recipe.WEIGHTS / "vision_tower").iterdir():
        (tower / file.name).write_bytes(file.read_bytes())
    first = StoredVision.prepare(tmp_path, tower, images)
    backwards = StoredVision.prepare(tmp_path, tower, images[::-1])  # the file of before has others at these places
    names = [image.name for image in images]
    np.testing.assert_allclose(backwards.features(names), first.features(names), rtol=1e-4, atol=1e-5)
    config = tower / "config.json"
    config.write_text(config.read_text() + "\n")
    StoredVision.prepare(tmp_path, tower, images)
    assert len(list(tmp_path.glob("features_*.npy"))) == 2
    assert first.features([images[1].name]).shape == (1, 65, 128)


def test_what_a_component_is_known_by(tmp_path):
    """Its weights as well as its configuration."""
    hashes = []
    for name, content in [("config.json", b"{}"), ("model.safetensors", b"one"), ("model.safetensors", b"two")]:
        (tmp_path / name).write_bytes(content)
        hashes.append(weights_hash(tmp_path))
    (tmp_path / "quality.txt").write_bytes(b"of no effect")
    assert len(set(hashes)) == 3 and weights_hash(tmp_path) == hashes[-1]


def test_what_the_data_are_known_by(tmp_path):
    """Every file that trials read, and every image."""
    names = [f"{name}.json" for name in ("pretrain", "finetune", "validation_questions", "test_questions")]
    names += ["0.png", "1.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"before")
    images = [tmp_path / "0.png", tmp_path / "1.png"]
    hashes = {objectives.data_hash(tmp_path, images)}
    for name in names:
        (tmp_path / name).write_bytes(b"after")
        hashes.add(objectives.data_hash(tmp_path, images))
    assert len(hashes) == 1 + len(names)


def test_each_change_is_made_to_what_the_model_is_asked_with(shipped, monkeypatch):
    """The task tokens masked and nothing else; their states those of the image before; each batch's patches in an
    order of their own."""
    model, processor, store, questions = shipped
    monkeypatch.setattr(asking, "BATCH", 8)
    asked = Questions(questions, processor, store)
    made, given, seeds = [], [], []
    give, permute = asking.given_task_token_states, asking.permuted
    monkeypatch.setattr(
        asking,
        "given_task_token_states",
        lambda model, states, where: given.append(states) or give(model, states, where),
    )
    monkeypatch.setattr(asking, "permuted", lambda features, seed: seeds.append(seed) or permute(features, seed))
    monkeypatch.setattr(
        Questions, "_generate", lambda self, model, inputs: made.append(inputs) or [""] * len(inputs["input_ids"])
    )
    for change in (None, *asking.CHANGES):
        asked.correct(model, change)
    plain, permuted_, removed, swapped = made[:3], made[3:6], made[6:9], made[9:]
    assert len(set(seeds)) == 3
    task_ids = torch.tensor(model.config.task_token_ids)
    for number, before in enumerate(plain):
        is_task = torch.isin(before["input_ids"], task_ids)
        assert removed[number]["attention_mask"].equal(before["attention_mask"].masked_fill(is_task, 0))
        assert is_task.any() and not permuted_[number]["pixel_values"].equal(before["pixel_values"])
        for other in (removed, swapped):
            assert other[number]["pixel_values"].equal(before["pixel_values"])
        for other in (permuted_, swapped):
            assert other[number]["attention_mask"].equal(before["attention_mask"])
        with features_as_pixels(model):
            own = asking.task_token_states(model, before, is_task)
        for layer, states in enumerate(own):
            torch.testing.assert_close(given[number][layer], states.roll(1, 0))


def test_given_its_own_task_tokens_a_model_answers_the_same_and_given_others_not(shipped):
    model, processor, store, questions = shipped
    asked = Questions(questions, processor, store)
    ((chosen, encoded),) = asked.batches
    features = store.features([questions[i]["image"] for i in chosen])
    inputs = {**encoded, "pixel_values": features}
    is_task = torch.isin(encoded["input_ids"], torch.tensor(model.config.task_token_ids))
    assert is_task.sum(1).tolist() == [3] * len(questions)
    with torch.no_grad(), features_as_pixels(model):
        states = asking.task_token_states(model, inputs, is_task)
        assert [of_layer.shape for of_layer in states] == [(20, 3, 128)] * 4
        # Behind an image each has a state of its own; on entry they are all alike.
        assert torch.equal(states[0][0], states[0][1]) and not torch.allclose(states[1][0], states[1][1])
        plain = model(**inputs).logits[:, -1]
        with asking.given_task_token_states(model, states, is_task):
            own = model(**inputs).logits[:, -1]
        with asking.given_task_token_states(model, [of_layer.roll(1, 0) for of_layer in states], is_task):
            others = model(**inputs).logits[:, -1]
        after = model(**inputs).logits[:, -1]
    assert torch.equal(after, plain)
    torch.testing.assert_close(own, plain, atol=1e-3, rtol=1e-3)
    assert (others - plain).abs().max() > 1e-2


def test_patches_are_permuted_within_their_image():
    features = torch.arange(2 * 65 * 3, dtype=torch.float).view(2, 65, 3)
    moved = permuted(features, seed=0)
    assert torch.equal(moved[:, 0], features[:, 0]) and not torch.equal(moved, features)
    assert torch.equal(moved[:, 1:].sort(1).values, features[:, 1:])
    assert not torch.equal(moved[0, 1:] - features[0, 1:], moved[1, 1:] - features[1, 1:])
    assert torch.equal(permuted(features, seed=0), moved)


def test_only_task_tokens_can_be_swapped(shipped):
    model, *_ = shipped
    assert asking.changes_of(model) == ["permuted_patches", "removed_task_tokens", "swapped_task_tokens"]
    llava = AutoModelForImageTextToText.from_pretrained(recipe.WEIGHTS / "llava", trust_remote_code=True)
    assert asking.changes_of(llava) == ["permuted_patches"]


def test_placement_of_words_themselves():
    """A projector that gives twice a word's embedding: twice the norm, cosine 1."""
    table = torch.nn.Embedding(6, 4)
    with torch.no_grad():
        table.weight[5] = 100.0  # an image token's row, no word

    class Model:
        class model:
            multi_modal_projector = staticmethod(lambda features: 2 * features)

        get_input_embeddings = staticmethod(lambda: table)

    words = table.weight[:5].detach()
    found = token_placement(
        Model, torch.stack([torch.zeros(6, 4), torch.zeros(6, 4)]) + torch.cat([words[:1], words]), 5
    )
    assert found["token_norm"] == pytest.approx(2 * words.norm(dim=1).mean().item(), rel=1e-5)
    assert found["embedding_norm"] == pytest.approx(words.norm(dim=1).mean().item(), rel=1e-5)
    assert found["largest_cosine"] == pytest.approx(1, abs=1e-5)


def test_mixed_questions_are_refused(shipped):
    _, processor, store, questions = shipped
    with pytest.raises(ValueError, match="sort them by task"):
        Questions([questions[0], questions[-1], questions[1]], processor, store)


def test_the_table_of_placements_goes_from_the_start_to_the_end():
    looks = [{"step": 0, "token_norm": 3.0, "embedding_norm": 1.5, "largest_cosine": 0.1}]
    looks.append({"step": 400, "token_norm": 7.0, "embedding_norm": 1.5, "largest_cosine": 0.6})
    run = {"learning_rate": 1e-3, "start": 0.25, "seed": 0, "along": looks, "accuracy": 0.7}
    (row,) = table_rows("\n".join(placement.report_lines([run])))
    assert [float(cell) for cell in row.values()] == [1e-3, 0.25, 3, 7, 1.5, 0.1, 0.6, 70]


def test_a_scaled_start_scales_the_tokens_and_nothing_else(root, tmp_path, monkeypatch, seen):
    """Tokens leave a linear layer: with a quarter of its start they are a quarter as long and point where they did."""
    monkeypatch.setattr(placement, "EVERY", 1)
    whole = placement.pretrain(root, tmp_path, seed=0, learning_rate=1e-3, start=1.0, scale=SCALE)
    quarter = placement.pretrain(root, tmp_path, seed=0, learning_rate=1e-3, start=0.25, scale=SCALE)
    before, after = whole["along"][0], quarter["along"][0]
    assert after["token_norm"] == pytest.approx(before["token_norm"] / 4, rel=1e-3)
    assert after["largest_cosine"] == pytest.approx(before["largest_cosine"], abs=1e-3)
    assert after["embedding_norm"] == before["embedding_norm"]
    assert [look["step"] for look in quarter["along"]] == [0, 1, 2]
    assert quarter["along"][2]["token_norm"] != after["token_norm"]
    assert 0 <= quarter["accuracy"] <= 1 and not (tmp_path / "checkpoint").exists()
    assert {split for kind, split, _ in seen if kind == "asked"} == {"validation"}


# ------------------------------------------------------------------------------------------------ statistics, report


def test_t_interval_by_hand():
    """Of 1, 2, 3, 4: mean 2.5, standard error sqrt(5/3)/2 = .6455, t(.975, 3) = 3.1824."""
    mean, low, high = t_interval([1, 2, 3, 4])
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - 2.0543, 2.5 + 2.0543), abs=1e-3)
    mean, low, high = t_interval([3.0])
    assert mean == 3 and math.isnan(low) and math.isnan(high)


def test_paired_t_by_hand():
    """t = 2.5 / .6455 = 3.873 with 3 degrees of freedom: p = .0305; t(.95, 3) = 2.3534."""
    found = paired_t([1, 2, 3, 4])
    assert found["p"] == pytest.approx(0.0305, abs=1e-4)
    assert found["ci90"] == pytest.approx([2.5 - 1.5191, 2.5 + 1.5191], abs=1e-3)
    assert (found["n"], found["positive"]) == (4, 4)
    assert paired_t([-1, 1])["p"] == pytest.approx(1)
    assert paired_t([0.0, 0.0])["p"] == pytest.approx(1)
    assert math.isnan(paired_t([1.0])["p"])


def test_holm_by_hand():
    """.01 * 3, max(.03, .04 * 1), .02 * 2."""
    assert holm_adjusted({"a": 0.04, "b": 0.01, "c": 0.02}) == pytest.approx({"a": 0.04, "b": 0.03, "c": 0.04})
    found = holm_adjusted({"a": 0.6, "b": float("nan"), "c": 0.7})
    assert found["a"] == found["c"] == 1.0 and math.isnan(found["b"])


def test_labels_needed_by_hand():
    """Half-way in accuracy is half-way in the logarithm: sqrt(100 * 400) = 200."""
    assert labels_needed([100, 400, 1600], [50, 60, 70], 55) == pytest.approx(200)
    assert labels_needed([100, 400, 1600], [50, 60, 70], 70) == pytest.approx(1600)
    assert labels_needed([100, 400, 1600], [50, 60, 70], 40) == 100
    assert labels_needed([100, 400, 1600], [50, 60, 70], 71) == math.inf
    assert labels_needed([100, 400, 1600], [50, 49, 70], 60) == pytest.approx(800)


def made_up(gains: dict[str, float], seeds=8, budgets=(0, 75, 6000)) -> dict:
    """Results of arms that answer better than 50, 60 and 70% by so many points, with the same noise for a seed."""
    found = {}
    for arm, gain in gains.items():
        for seed in range(seeds):
            noise = np.random.default_rng([seed, len(arm)]).normal(0, 0.2) + seed
            for budget, level in zip(budgets, (50, 60, 70), strict=True):
                share = (level + gain + noise) / 100
                task = dict.fromkeys(("count", "relation", "depth", "distance", "average"), share)
                place = {"token_norm": 5.0, "embedding_norm": 1.3, "largest_cosine": 0.3}
                layers = {"0": 0.9, "1": share - 0.2, "2": share - 0.1}
                probes = {"test": {"0.1": {"depth": layers}, "10": {"depth": dict.fromkeys(layers, -0.5)}}}
                probes["validation"] = {"0.1": {"depth": 0.4}, "10": {"depth": 0.3}}
                found[arm, seed, budget] = {
                    "arm": arm, "seed": seed, "budget": budget, "accuracy": task, "identity": {},
                    "validation": [{"step": 7, "accuracy": {"average": share + 0.01}, "placement": place}],
                    "chosen_step": 7, "changes": {"permuted_patches": {"average": share - 0.04}},
                    "seconds": {"pretrain": 80.0, "finetune": 100.0}, "peak_memory_mb": 900, "target_bytes": 5e6,
                    "probes": probes,
                }  # fmt: skip
    return found


def test_report_says_what_is_shown_and_what_is_excluded(tmp_path):
    numbers = objective_numbers.collect(made_up({"llava": 0, "ola_vlm": 5, "ola_vlm_shuffled": 0.1}))
    assert numbers["accuracy"]["ola_vlm"][0]["mean"] == pytest.approx(58.5, abs=0.3)
    family = {(row["arm"], row["budget"]): row for row in numbers["comparisons"]["against LLaVA"]}
    assert set(family) == {("ola_vlm", budget) for budget in (0, 75, 6000)}
    row = family["ola_vlm", 75]
    assert row["difference"] == pytest.approx(5, abs=0.5) and row["p_holm"] == pytest.approx(3 * row["p"])
    (control,) = [row for row in numbers["comparisons"]["controls against LLaVA"] if row["budget"] == 0]
    text = objective_report.write_report(tmp_path, numbers)
    assert objective_report.verdict(row) == "better" and "| ola_vlm - llava | 75 | +" in text
    assert "not shown; excluded: above" in objective_report.verdict(control)
    assert 75 < numbers["labels"]["ola_vlm"][75] < 6000 and numbers["labels"]["ola_vlm"][6000] == math.inf
    assert "more than 6000" in text
    (change,) = [row for row in numbers["changes"] if (row["arm"], row["budget"]) == ("llava", 0)]
    assert change["permuted_patches"][0] == pytest.approx(5)
    assert {row["target"] for row in numbers["probes"]} == {"depth"}
    assert all(row["r"] > 0.9 for row in numbers["probes"])
    figures = ("accuracy.png", "accuracy_by_task.png", "probes_and_answers.png", "along_finetuning.png")
    for name in (*figures, "report.json"):
        assert (tmp_path / name).stat().st_size > 1000


def test_labels_of_an_arm_that_is_worse():
    """With none, it is behind LLaVA without labels; with 75, between LLaVA's with none and with 75."""
    numbers = objective_numbers.collect(made_up({"llava": 0, "patch": -5}))
    needed = numbers["labels"]["patch"]
    assert needed[0] == 0 and needed[75] == 75 and 75 < needed[6000] < 6000
    lines = objective_report.labels_lines(numbers["labels"], {}, numbers["labels_tried"])
    (row,) = [line for line in lines if line.startswith("| patch")]
    assert row.startswith("| patch | 0 | at most 75 | ")


def test_the_axis_ends_where_accuracies_do(monkeypatch, tmp_path):
    """Intervals over two seeds reach beyond."""
    drawn = []
    monkeypatch.setattr(objective_report, "save_figure", lambda figure, *place, **options: drawn.append(figure))
    cells = {0: {"mean": 50.0, "ci95": [-60.0, 160.0], "n": 2}, 75: {"mean": 60.0, "ci95": [50.0, 70.0], "n": 2}}
    objective_report.draw(tmp_path / "accuracy.png", {"mean of the tasks": {"llava": cells}}, columns=1)
    low, high = drawn[0].axes[0].get_ylim()
    assert low == 0 and high == 100


def test_each_seed_is_shown_with_the_most_labels():
    results = made_up({"llava": 0, "words": 5}, seeds=2)
    results["llava", 1, 6000]["accuracy"]["average"] = 0.612
    del results["words", 0, 6000]
    lines = objective_report.seed_lines(objective_numbers.collect(results)["by_seed"])
    assert lines[0] == "| arm | seed 0 | seed 1 |"
    assert lines[2].endswith(" | 61.2 |") and lines[3].startswith("| words | - | 7")


def test_seeds_are_paired_by_their_number():
    """Though one arm lacks the first one; what a seed is harder by (a point a seed) falls out."""
    results = made_up({"llava": 0, "ola_vlm": 5}, seeds=4)
    del results["ola_vlm", 0, 75]
    differences = objective_numbers.paired(results, "ola_vlm", "llava", 75)
    assert len(differences) == 3 and differences == pytest.approx([5, 5, 5], abs=0.9)


def test_an_arm_stands_before_what_it_is_compared_with():
    """A difference above 0 says that content, or what was added, helps."""
    asked = objective_numbers.families(list(arms.ARMS))
    assert ("ola_vlm", "llava") in asked["against LLaVA"]
    assert ("ola_vlm_shuffled", "llava") in asked["controls against LLaVA"]
    assert ("ola_vlm", "ola_vlm_shuffled") in asked["against its control"]
    assert ("words", "moments") in asked["against no content"]
    assert ("words_ola_vlm", "words") in asked["on top of another"]
    numbers = objective_numbers.collect(made_up({"llava": 0, "ola_vlm": 5, "ola_vlm_shuffled": 0.1}))
    assert all(row["difference"] > 4 for row in numbers["comparisons"]["against its control"])


def test_each_task_has_its_own_accuracies():
    results = made_up({"llava": 0})
    for result in results.values():
        result["accuracy"] = {**result["accuracy"], "count": 0.9}
    by_task = objective_numbers.collect(results)["by_task"]
    assert by_task["count"]["llava"][75]["mean"] == pytest.approx(90)
    assert by_task["depth"]["llava"][75]["mean"] < 70


def with_a_later_point(result: dict) -> dict:
    """A worse evaluation after the chosen one."""
    (chosen,) = result["validation"]
    later = copy.deepcopy(chosen)
    later["step"] += 7
    later["accuracy"]["average"] = 0.1
    later["placement"]["token_norm"] = 99.0
    return {**result, "validation": [chosen, later]}


def test_what_is_told_of_a_result_is_of_its_chosen_step(tmp_path):
    result = with_a_later_point(made_up({"llava": 0}, seeds=1)["llava", 0, 75])
    assert objective_numbers.placement(result)["token_norm"] == 5
    assert objective_numbers.placement(result)["validation"] > 50
    file = objective_trial.result_file(tmp_path, "tune", "llava", 100, 75, SETTINGS)
    objective_trial.write_json(file, result)
    study = objectives.Study(tmp_path, SCALE, processes=1)
    assert study.validated("llava", 100, 75, SETTINGS) == result["validation"][0]["accuracy"]["average"]


def test_costs_are_medians_beside_llavas_of_the_same_seed():
    """One seed's machine was busy: it lengthens neither the median nor the ratio of a seed that ran beside it. A step
    of IFT is of the steps that were made, though patience ended some early."""
    results = made_up({"llava": 0, "ola_vlm": 0}, seeds=3)
    for (arm, seed, budget), result in results.items():
        times = {"llava": 1.0, "ola_vlm": 1.5}[arm] * (4 if seed == 2 else 1)
        result["validation"] = [{**result["validation"][0], "step": 7 * (seed + 1)}]
        result["seconds"] = {"pretrain": 80.0 * times}
        if budget > 0:
            result["seconds"] = {"finetune": times * budget * (seed + 1)}
    costs = objective_numbers.cost_table(results)
    assert costs["llava"]["PT (s)"] == 80 and costs["ola_vlm"]["PT (s)"] == 120
    assert costs["ola_vlm"]["PT / LLaVA's"] == pytest.approx(1.5)
    assert costs["llava"]["a step of IFT (s)"] == pytest.approx(6000 / 7)
    assert costs["ola_vlm"]["a step of IFT / LLaVA's"] == pytest.approx(1.5)
    assert costs["ola_vlm"]["targets (MB)"] == 5
    assert "| ola_vlm | 120 | 1.5 | 1.29e+03 | 1.5 | 5 |" in objective_report.cost_lines(costs)


def test_peak_memory_is_this_process_own():
    """Of a process that a larger one started; getrusage would tell its parent's."""
    held = np.ones(80_000_000)  # 640 MB
    code = "from ola_vlm.miniature.processes import peak_memory_mb; print(peak_memory_mb())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    alone = float(printed)
    assert held.all() and 1 < alone < processes.peak_memory_mb() - 300


def test_what_is_excluded_lies_outside_of_the_90_percent_interval():
    row = {"p": 0.4, "p_holm": 1.0, "difference": 0.6, "ci90": [-1.0, 2.2], "ci95": [-1.4, 2.6]}
    assert objective_report.verdict(row) == "not shown; excluded: above +2.2, below -1.0"
    assert objective_report.verdict({**row, "p_holm": 0.04, "difference": -0.6}) == "worse"
    # No effect is excluded too, by a hypothesis that stood alone.
    row = {**row, "p": 0.013, "p_holm": 0.2, "ci90": [0.4, 2.2]}
    shown = "not shown with Holm's correction (p = 0.013 alone); excluded: above +2.2, below +0.4"
    assert objective_report.verdict(row) == shown


def test_the_table_of_all_comparisons_claims_what_the_tests_do():
    row = {"arm": "words", "other": "llava", "budget": 75, "difference": 1.3, "p": 0.01, "p_holm": 0.0498}
    row["ci90"] = [0.4, 2.2]
    rows = [
        row,
        {**row, "budget": 300, "p_holm": 0.051, "ci90": [-0.2, 2.8]},
        {**row, "budget": 1000, "p": math.nan, "p_holm": math.nan},
        {**row, "arm": "patch", "difference": -9.0, "p": 1e-7, "p_holm": 2e-6},
    ]
    lines = objective_report.glance_lines({"against LLaVA": rows[:3], "another": rows[3:]})
    assert lines[0] == "| arm - other | 75 | 300 | 1000 |"
    assert lines[2:] == [
        "| words - llava | **+1.3** (p = 0.0498) | +1.3 [-0.2, +2.8] | +1.3 |",
        "| patch - llava | **-9.0** (p < .0001) | - | - |",
    ]


def test_nothing_is_tested_before_all_seeds_are_there():
    """Of a whole family: its correction counts what will be asked."""
    results = made_up({"llava": 0, "words": 5, "patch": 1})
    rows = objective_numbers.collect(results)["comparisons"]["against LLaVA"]
    assert all(0 <= row["p"] <= row["p_holm"] <= 1 for row in rows)
    del results["patch", 7, 75]
    rows = objective_numbers.collect(results)["comparisons"]["against LLaVA"]
    assert len(rows) == 6 and all(math.isnan(row["p"]) and math.isnan(row["p_holm"]) for row in rows)
    lines = objective_report.comparison_lines(rows)
    assert all(" | - | - | " in line and "not tested (seeds: " in line for line in lines[2:])
    assert not any("better" in line or "excluded" in line for line in lines)


def test_families_are_those_of_the_protocol():
    """docs/STUDY.md, "What is tested": how many hypotheses each has, which Holm's correction counts."""
    asked = objective_numbers.families(arms.DEFAULT_ARMS)
    assert {name: len(pairs) for name, pairs in asked.items()} == {
        "against LLaVA": 7,
        "controls against LLaVA": 4,
        "against its control": 3,
        "against no content": 3,
        "on top of another": 2,
    }
    assert set(asked["against no content"]) == {(arm, "moments") for arm in ("words", "ola_vlm", "patch")}
    assert set(asked["on top of another"]) == {("words_ola_vlm", "words"), ("moments_ola_vlm", "moments")}


def test_the_range_of_saved_labels_resamples_seeds_in_pairs():
    """What makes a seed easy moves both arms: the range is narrow. Where LLaVA's seeds differ alone, it is wide."""
    results = made_up({"llava": 0, "words": 5})
    numbers = objective_numbers.collect(results)
    low, high = numbers["labels_ranges"]["words"][75]
    assert low <= numbers["labels"]["words"][75] <= high < 2 * low
    assert numbers["labels_ranges"]["words"][6000] == [math.inf, math.inf]
    for seed in range(4):
        results["llava", seed, 6000]["accuracy"] = {"average": 0.64}
    low, high = objective_numbers.labels_ranges(results)["words"][75]
    assert low < 1000 and high == math.inf
    lines = objective_report.labels_lines({"words": {75: 700.0}}, {"words": {75: [low, high]}}, [75, 6000])
    assert lines[-1] == f"| words | 700 ({low:.0f} to more than 6000) |"
    assert objective_numbers.labels_ranges(made_up({"llava": 0, "words": 5}, seeds=1)) == {}


def test_what_chose_a_step_is_told_to_be_too_good():
    """`made_up`: a point above the test answers."""
    differences = objective_numbers.chosen_minus_test(made_up({"llava": 0, "words": 5}))
    assert differences == pytest.approx(dict.fromkeys((0, 75, 6000), 1.0))
    assert "seeds: +1.0 with 0, +1.0 with 75, +1.0 with 6000." in objective_report.chosen_sentence(differences)


def test_correlations_over_arms_and_within_them():
    """Between three arms the better probes go with the worse answers; within each with the better ones."""
    points = {}
    for arm, (probe, answer) in {"a": (0.1, 90), "b": (0.2, 80), "c": (0.3, 70)}.items():
        points[arm] = [(probe - 0.01, answer - 1), (probe, answer), (probe + 0.01, answer + 1)]
    found = objective_numbers.correlations(points)
    assert found["r"] == pytest.approx(-1) and found["r_within"] == pytest.approx(1)
    assert found["n_within"] == 9 and "without_two" not in found
    more = {**points, **{name: [(probe, 50.0)] for name, probe in (("d", 0.1), ("e", 0.2), ("f", 0.4))}}
    low, high = objective_numbers.correlations(more)["without_two"]
    assert low == pytest.approx(-1) or low < objective_numbers.correlations(more)["r"] < high


def test_probes_of_both_stages_are_told():
    results = made_up({"llava": 0, "words": 5})
    found = objective_numbers.probe_table(results)
    assert set(found["words"]) == {"depth, 0", "depth, 75", "depth, 6000"}
    after = [result["accuracy"]["average"] - 0.15 for key, result in results.items() if key[0::2] == ("words", 6000)]
    assert found["words"]["depth, 6000"]["mean"] == pytest.approx(np.mean(after))
    (row,) = [line for line in objective_report.probe_score_lines(found) if line.startswith("| words")]
    assert f"{np.mean(after):.3f} ± " in row


def test_a_report_without_results_right_after_pretraining(tmp_path):
    """As longer fine-tunings leave them: one budget, with probes."""
    results = made_up({"llava": 0, "ola_vlm": 5, "words": 7}, seeds=3)
    results = {key: result for key, result in results.items() if key[2] == 6000}
    text = objective_report.write_report(tmp_path, objective_numbers.collect(results))
    assert "| depth, 6000 | 6000 | " in text and "depth, 0" not in text
    assert not (tmp_path / "probes_and_answers.png").exists() and "probes_and_answers.png" not in text


def with_rates(results: dict, pretrain: float, finetune: float, steps: int = 450) -> dict:
    """The same, as trained with these learning rates and so many steps of IFT."""
    results = copy.deepcopy(results)
    for (_, _, budget), result in results.items():
        result["identity"] = {"pretrain.learning_rate": pretrain}
        # Right after pre-training there was none.
        if budget > 0:
            result["identity"] |= {"finetune.learning_rate": finetune, "finetune.max_steps": steps}
    return results


def test_longer_fine_tunings_are_shown_beside_the_same_seeds_of_the_study():
    confirmed = with_rates(made_up({"llava": 0, "words": 5}, seeds=8), 3e-4, 3e-4)
    longer = with_rates(made_up({"llava": 2, "words": 5}, seeds=2), 3e-4, 1e-3, steps=1350)
    longer = {key: result for key, result in longer.items() if key[2] == 6000}
    longer["llava", 1, 6000]["chosen_step"] = 1350
    longer["words", 1, 6000]["accuracy"]["average"] += 0.04
    words = {key: result for key, result in confirmed.items() if key[0] == "words"}
    header, _, short, long, *others = explorations.longer_lines(longer, [confirmed, words])
    assert header == "| arm | steps | learning rate of IFT | seed 0 | seed 1 | mean | minus LLaVA | best steps |"
    first, second = (objective_numbers.answers(confirmed["llava", seed, 6000]) for seed in (0, 1))
    assert short == f"| llava | 450 | 0.0003 | {first:.1f} | {second:.1f} | {(first + second) / 2:.1f} |  | 7; 7 |"
    assert long.startswith(f"| llava | 1,350 | 0.001 | {first + 2:.1f} |") and long.endswith("| 7; 1,350 |")
    # Each beside LLaVA with as many steps: the same noise but for its arm's.
    assert [line.split(" | ")[1] for line in others] == ["450", "450", "1,350"]
    gains = [
        objective_numbers.answers(longer["words", seed, 6000]) - objective_numbers.answers(longer["llava", seed, 6000])
        for seed in (0, 1)
    ]
    assert gains[1] > 6
    assert f"| {np.mean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f}) |" in others[2]


def test_swapped_learning_rates_are_compared_where_they_are_equal():
    llava, words = (made_up({arm: gain}, seeds=3) for arm, gain in (("llava", 0), ("words", 8)))
    confirmed = with_rates(llava, 3e-4, 1e-3) | with_rates(words, 3e-3, 3e-4)
    slower = made_up({"words": 4}, seeds=2)
    swapped = with_rates(made_up({"llava": 1}, seeds=2), 3e-3, 3e-4) | with_rates(slower, 3e-4, 1e-3)
    lines = explorations.swapped_lines(swapped, confirmed, "words")
    assert lines[0] == "| arm | learning rate of PT | of IFT | 0 | 75 | 6000 |"
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[:3] for row in rows] == [
        ["llava", "0.0003", "0.001"],
        ["words", "0.0003", "0.001"],
        ["llava", "0.003", "0.0003"],
        ["words", "0.003", "0.0003"],
        ["words - llava", "0.0003", "0.001"],
        ["words - llava", "0.003", "0.0003"],
    ]
    # Two seeds of the study's, too.
    mean = np.mean([objective_numbers.answers(confirmed["words", seed, 75]) for seed in (0, 1)])
    assert rows[3][4] == f"{mean:.1f}"
    for row, (arm, other) in ((rows[4], (swapped, confirmed)), (rows[5], (confirmed, swapped))):
        differences = [
            objective_numbers.answers(arm["words", seed, 0]) - objective_numbers.answers(other["llava", seed, 0])
            for seed in (0, 1)
        ]
        expected = f"{np.mean(differences):+.1f} ({min(differences):+.1f} to {max(differences):+.1f})"
        assert row[3] == expected


def test_reports_numbers_are_json_of_the_standard(tmp_path):
    """Which knows no infinity (labels that LLaVA never reaches) and no NaN (one seed's interval)."""
    numbers = objective_numbers.collect(made_up({"llava": 0, "words": 5}, seeds=1))
    assert numbers["labels"]["words"][6000] == math.inf
    read = json.loads(objective_report.numbers_text(numbers), parse_constant=pytest.fail)
    assert read["labels"]["words"]["6000"] is None and read["accuracy"]["words"]["0"]["ci95"] == [None, None]


def test_results_of_other_settings_are_not_averaged(tmp_path):
    """One arm and budget with two learning rates; seeds alone may differ."""
    results = made_up({"llava": 0, "words": 1}, seeds=2)
    for (_, seed, _), result in results.items():
        result["identity"] = {"seed": seed, "pretrain.seed": seed, "pretrain.learning_rate": 1e-3}
    objective_results.pack(results, tmp_path)
    objective_results.read_results(tmp_path)
    results["words", 1, 75]["identity"]["pretrain.learning_rate"] = 3e-4
    objective_results.pack(results, tmp_path)
    mixed = r"mixes results of words on 75 scenes with different pretrain.learning_rate \(0.001 and 0.0003\)"
    with pytest.raises(ValueError, match=mixed):
        objective_results.read_results(tmp_path)


def test_a_folders_own_result_counts_and_a_cut_off_file_is_named(tmp_path):
    results = made_up({"llava": 0}, seeds=1)
    objective_results.pack(results, tmp_path)
    own = copy.deepcopy(results["llava", 0, 75])
    own["accuracy"]["average"] = 0.99
    objective_trial.write_json(tmp_path / "results" / "confirm" / "llava" / "seed0_budget75.json", own)
    assert objective_results.read_results(tmp_path)["llava", 0, 75] == own
    file = tmp_path / "llava.jsonl"
    file.write_text(file.read_text()[:-100])
    with pytest.raises(ValueError, match=r"llava.jsonl, line 3: no JSON .*; is the file cut off\?"):
        objective_results.read_results(tmp_path)


def test_a_report_is_of_what_is_asked_for(tmp_path, capsys):
    results = made_up({"llava": 0, "words": 5}, seeds=2)
    objective_results.pack(results, tmp_path)
    options = ["objectives", "--report", "--out", str(tmp_path)]
    objectives.main(options)
    assert "12 results" in capsys.readouterr().out
    objectives.main([*options, "--arms", "words", "--budgets", "0", "75", "75"])
    printed = capsys.readouterr().out
    assert "4 results" in printed and "llava" not in printed.lower().replace("that llava needs", "")
    with pytest.raises(SystemExit, match="no results of those arms, seeds and budgets"):
        objectives.main([*options, "--seeds", "5"])


def test_tuning_on_other_data_is_refused_before_anything_is_trained(root, in_process, seen, tmp_path):
    """Its settings would take the place of those in the file."""
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"world": {"data": "another"}, "seeds": [100], "settings": {}, "scores": {}}))
    options = ["objectives", "--shrunk", "--stage", "tune", "--arms", "llava", "--out", str(root)]
    with pytest.raises(SystemExit, match="tuned with other data or components: give --settings another file"):
        objectives.main([*options, "--settings", str(file)])
    assert not seen


def test_shrunken_tuning_leaves_the_settings_of_the_full_one(tmp_path):
    before = objectives.SETTINGS_FILE.read_bytes()
    with pytest.raises(SystemExit, match="--shrunk tunes nothing that means something: give --settings"):
        objectives.main(["objectives", "--shrunk", "--stage", "tune", "--out", str(tmp_path / "study")])
    assert objectives.SETTINGS_FILE.read_bytes() == before and not (tmp_path / "study").exists()


def test_figures_show_each_arms_own_numbers():
    """Bars are half an interval to each side, a panel's chance is its task's, lengths are in those of a word."""
    cells = {0: {"mean": 50.0, "ci95": [48.0, 52.0], "n": 2}, 75: {"mean": 60.0, "ci95": [57.0, 63.0], "n": 3}}
    axis = Figure().subplots()
    objective_report.draw_panel(axis, "count", {"llava": cells})
    (bars,) = axis.containers
    assert bars.lines[0].get_ydata().tolist() == [50, 60]
    ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert ends == [[48, 52], [57, 63]]
    (chance,) = [line for line in axis.get_lines() if line.get_label() == "chance"]
    assert set(chance.get_ydata()) == {25}
    assert objective_report.interval_text(50.0, 48.0, 52.0) == "50.0 ± 2.0"
    assert objective_report.seeds_text(cells) == "2-3"


def test_lengths_of_tokens_are_in_those_of_a_word(monkeypatch):
    """Along fine-tuning, and along pre-trainings of other starts."""
    drawn = []
    for module in (objective_report, placement):
        monkeypatch.setattr(module, "save_figure", lambda figure, *place, **options: drawn.append(figure))
    looks = [{"step": 0, "token_norm": 6.0, "embedding_norm": 1.5, "largest_cosine": 0.3, "validation": 61.0}]
    objective_report.draw_along(Path("along.png"), {"llava": looks})
    placement.draw(Path("placement.png"), [{"learning_rate": 1e-3, "start": 1.0, "along": looks}])
    for figure in drawn:
        # The study's figure has the answers in front of them.
        lengths, cosines = (axis.get_lines()[0].get_ydata()[0] for axis in figure.axes[-2:])
        assert (lengths, cosines) == (4, 0.3)
    assert drawn[0].axes[0].get_lines()[0].get_ydata()[0] == 61


def test_the_correlation_is_one_over_the_arms_means():
    """Probed right after pre-training, whatever the answers' labels."""
    results = made_up({"llava": 0, "ola_vlm": 5, "words": 10})
    for (arm, seed, budget), result in results.items():
        if budget > 0:
            result["probes"]["test"]["0.1"]["depth"] = {"1": float(seed)}
        elif seed == 0:
            # A seed that tells the opposite of the others.
            score = {"llava": 0.4, "ola_vlm": 0.3, "words": 0.2}[arm]
            result["probes"]["test"]["0.1"]["depth"] = {"1": score}
    rows = [row for row in objective_numbers.probes_and_answers(results) if row["probed_at"] == 0]
    assert len(rows) == 3
    for row in rows:
        means = np.array([np.mean(points, axis=0) for points in row["points"].values()])
        assert row["r"] == pytest.approx(np.corrcoef(means.T)[0, 1]) and row["r"] > 0
        assert all(probe < 1 for points in row["points"].values() for probe, _ in points)


def test_probes_stand_beside_the_answers_of_their_own_seed():
    """Seed 2 of LLaVA, probed right after pre-training and asked after 6,000 labels."""
    results = made_up({"llava": 0, "ola_vlm": 5}, seeds=4)
    probed = objective_numbers.probe_scores(results)["llava", 2, 0]["depth"]
    answered = 100 * results["llava", 2, 6000]["accuracy"]["average"]
    found = objective_numbers.probes_and_answers(results)
    (row,) = [row for row in found if (row["probed_at"], row["budget"]) == (0, 6000)]
    assert row["points"]["llava"][2] == (probed, answered) and len(row["points"]["ola_vlm"]) == 4
    assert row["n"] == 2 and "r" not in row  # two points make any line


def test_what_is_seen_along_fine_tuning_begins_with_pretrainings_end():
    results = made_up({"llava": 0}, seeds=2)
    for seed, norm in ((0, 8.0), (1, 6.0)):
        results["llava", seed, 0]["validation"][0]["placement"]["token_norm"] = norm
    later = copy.deepcopy(results["llava", 1, 6000]["validation"][0])
    later["step"] = 14
    later["placement"]["token_norm"] = 4.5
    later["accuracy"]["average"] = 0.9
    results["llava", 1, 6000]["validation"].append(later)
    along = objective_numbers.along_finetuning(results)["llava"]
    assert [round(point["validation"]) for point in along] == [52, 72, 90]
    assert [(point["step"], point["token_norm"], point["n"]) for point in along] == [
        (0, 7, 2),
        (7, 5, 2),
        (14, 4.5, 1),
    ]


def test_best_steps_tell_who_may_not_have_come_to_the_end():
    """Seeds that were best at the last step, of those of a budget; nothing is said right after pre-training."""
    results = made_up({"llava": 0}, seeds=3)
    for (_, seed, budget), result in results.items():
        if budget > 0:
            result["identity"] = {"finetune.max_steps": 14}
            result["chosen_step"] = (7, 14, 14)[seed]
    found = objective_numbers.best_steps(results)["llava"]
    assert found == {budget: {"mean": 35 / 3, "most": 14, "last": 2, "n": 3} for budget in (75, 6000)}
    (row,) = objective_report.best_step_lines({"llava": found})[2:]
    assert row == "| llava | 12 of 14 (2 of 3) | 12 of 14 (2 of 3) |"


def test_longer_fine_tunings_take_all_their_steps_and_are_not_mixed_in(root, in_process, seen, capsys, tmp_path):
    """Three times as many, and beside results of the protocol's steps they are refused."""
    options = ["objectives", "--shrunk", "--out", str(root), "--arms", "llava", "--seeds", "0", "--longer", "3"]
    settings = tmp_path / "tuned.json"
    objectives.write_settings(settings, root, [100], {"settings": {"llava": SETTINGS}, "scores": {}})
    options += ["--settings", str(settings)]
    objectives.main([*options, "--budgets", "8"])
    file = objective_trial.result_file(root, "confirm", "llava", 0, 8, SETTINGS)
    result = json.loads(file.read_text())
    assert [point["step"] for point in result["validation"]] == [3, 6]
    assert result["identity"]["finetune.max_steps"] == 6
    assert result["identity"]["pretrain.max_steps"] == SCALE["pretrain_steps"]
    assert "of 6 (" in capsys.readouterr().out
    # With as many evaluations, none of which can be the last one that is waited for.
    scale = objectives.longer(objectives.FULL, 3)["scale"]
    assert scale["finetune_steps"] == {"75": 180, "300": 360, "1000": 600, "6000": 1350}
    assert scale["patience"] == scale["evaluations"] == objectives.FULL["scale"]["evaluations"]
    with pytest.raises(SystemExit, match="--longer goes with --stage confirm"):
        objectives.main([*options, "--stage", "tune"])
    result["seed"] = 1
    result["identity"]["finetune.max_steps"] = 2
    objective_trial.write_json(file.with_name("seed1_budget8.json"), result)
    with pytest.raises(ValueError, match="mixes fine-tunings of 2 and 6 steps on 8 scenes"):
        objective_results.read_results(root)
    # Before anything is trained that could not be reported.
    seen.clear()
    with pytest.raises(SystemExit, match=r"is of a fine-tuning of 2 steps, not 6 \(--longer\): choose another --out"):
        objectives.main([*options, "--seeds", "2", "--budgets", "8"])
    assert not seen


def test_one_seed_says_nothing(tmp_path):
    numbers = objective_numbers.collect(made_up({"llava": 0, "ola_vlm": 5}, seeds=1))
    text = objective_report.write_report(tmp_path, numbers)
    assert "not tested (seeds: 1 of 8)" in text and "nan" not in text


def test_packed_results_come_back(tmp_path):
    results = made_up({"llava": 0, "ola_vlm": 1}, seeds=2)
    objective_results.pack(results, tmp_path)
    assert objective_results.read_results(tmp_path) == copy.deepcopy(results)
    objective_results.unpack(tmp_path)
    file = tmp_path / "results" / "confirm" / "ola_vlm" / "seed1_budget75.json"
    assert json.loads(file.read_text()) == results["ola_vlm", 1, 75]


def test_packed_tuning_comes_back_and_is_not_run_again(tmp_path, capsys, monkeypatch):
    """What an interrupted tuning has found goes on elsewhere."""
    first, second = tmp_path / "first", tmp_path / "second"
    result = made_up({"ola_vlm": 0}, seeds=1)["ola_vlm", 0, 75]
    file = objective_trial.result_file(first, "tune", "ola_vlm", 100, 75, SETTINGS)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(result))
    objectives.main(["objectives", "--stage", "tune", "--report", "--out", str(first), "--pack", str(second)])
    shown = f"| ola_vlm | {file.stem} | {100 * result['validation'][0]['accuracy']['average']:.2f} |"
    assert shown in capsys.readouterr().out
    objective_results.unpack(second)
    back = objective_trial.result_file(second, "tune", "ola_vlm", 100, 75, SETTINGS)
    assert objective_trial.read_result(back, {}) == result


def test_probes_take_the_alpha_that_validation_chose_and_no_embeddings():
    scores = objective_numbers.probe_scores(made_up({"llava": 0}, seeds=1))
    share = 0.50 + np.random.default_rng([0, 5]).normal(0, 0.2) / 100
    assert scores["llava", 0, 0]["depth"] == pytest.approx(share - 0.15)
