"""`ola-vlm miniature` from end to end, shrunken: 4 steps a stage on a few scenes, with the shipped components."""

import copy
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from ola_vlm.commands.miniature import parser
from ola_vlm.inference.checkpoints import load_checkpoint, weights_state
from ola_vlm.miniature import ablations, components, processes, study, trial
from ola_vlm.probing.fit import batches
from ola_vlm.probing.probes import load_probes, score
from ola_vlm.recipes import miniature as recipe
from ola_vlm.targets.fill import make_teachers, open_caches
from ola_vlm.train import load_model
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.world import language, render

ALL = ["--methods", *recipe.METHODS, recipe.CONTROL]


def test_what_is_trained_without_being_asked_for():
    assert parser().parse_args([]).methods == ["llava", "ola_vlm", "words"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "run"
    return out, study.main(["--shrunk", "--out", str(out), *ALL])


@pytest.mark.slow
def test_report_has_every_field_of_every_method(run):
    out, results = run
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["methods"]) == [*recipe.METHODS, recipe.CONTROL]
    tasks = {*language.TASKS, "average"}
    assert set(results["chance"]) == set(results["comparison"]) == tasks
    for method, found in results["methods"].items():
        (seed,) = found["seeds"]
        assert [point["step"] for point in seed["curve"]] == [1, 2, 3, 4]
        assert seed["accuracy"] == seed["curve"][-1]["accuracy"]
        assert set(seed["accuracy"]) == tasks
        for stage in ("pretrain", "finetune"):
            assert set(seed["probes"][stage]) == {"gen", "depth", "seg"}
            for layers in seed["probes"][stage].values():
                assert list(layers) == ["0", "1", "2", "3", "4"]
                assert all(-1 <= score <= 1 for layer in layers.values() for score in layer.values())
        embedding = [name for name in seed["losses"] if name.count("/") == 2]
        assert bool(embedding) == (method != "llava")
        assert all(value > 0 for name in embedding for _, value in seed["losses"][name])
        assert seed["peak_memory_mb"] > 100
        assert {"pretrain", "finetune", "answering", "probing"} <= set(seed["seconds"])


@pytest.mark.slow
@torch.no_grad()
def test_probes_are_scored_on_test_images(run):
    """By hand: the published probes, which are the fine-tuned model's, on the first test images of the world."""
    out, results = run
    (seed,) = results["methods"]["ola_vlm"]["seeds"]
    probes = load_probes(out / "ola_vlm" / "probes")
    reader = probes.reader(*load_checkpoint(str(out / "ola_vlm")))
    targets = open_caches(out / "targets", make_teachers(recipe.TASKS, recipe.TEACHERS))
    count = study.SHRUNK["overrides"]["probe_splits"]["test"]
    images = sorted((out / "data" / "images").glob("test_*.png"))[:count]
    by_hand, _ = score(batches(reader, targets, images, 8), {0: probes})
    for task, layers in seed["probes"]["finetune"].items():
        for layer, values in layers.items():
            assert values == pytest.approx(by_hand[0][task][layer], abs=2e-3), (task, layer)


@pytest.mark.slow
def test_methods_share_their_start_and_differ_after_it(run):
    """Same data and same first projector: the text loss of the first step is that of the same captions."""
    losses = {method: found["seeds"][0]["losses"] for method, found in run[1]["methods"].items()}
    of_depth = "depth/2/smooth_l1"
    assert losses["ola_vlm"][of_depth] != losses["ola_vlm_shuffled"][of_depth]
    assert losses["ola_vlm"]["ntp"][0] == pytest.approx(losses["ola_vlm_shuffled"]["ntp"][0], rel=1e-4)
    assert losses["words"]["ntp"][0] == pytest.approx(losses["llava"]["ntp"][0], rel=1e-4)
    # By little: the shrunken run has made one step, in the warm-up.
    assert losses["words"]["ntp"][1] != losses["llava"]["ntp"][1]
    assert [name for name in losses["words"] if name.count("/") == 2] == ["words/0/mse"]


@pytest.mark.slow
def test_a_record_that_is_shipped_has_no_path_of_this_machine(run, tmp_path):
    out, _ = run
    study.write_shipped_record(out, out / "ola_vlm", tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    pretrain = record["started_from"]
    assert record["recipe"] == "miniature_finetune" and record["finished_steps"] == 4
    assert record["checkpoint"] == record["identity"]["checkpoint"] == "runs/miniature/ola_vlm/seed0/pretrain"
    assert pretrain["language_model"] == "miniature/weights/language_model"
    assert pretrain["teachers"]["seg"]["path"] == "miniature/weights/seg"
    assert str(out) not in json.dumps(record) and str(recipe.WEIGHTS) not in json.dumps(record)


def test_what_is_shipped_again_is_asked_anew(make_model, tmp_path, monkeypatch):
    """Answers of the weights that were shipped before are gone: `ola-vlm eval` would refuse to go on with them."""
    method = recipe.METHODS[0]
    root = tmp_path / "study"
    finetuned = recipe.run_folder(method, 0, root) / "finetune"
    for part in make_model():
        part.save_pretrained(finetuned)
    monkeypatch.setattr(recipe, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(study, "fit_probes", lambda *what: SimpleNamespace(save=lambda folder: None))
    monkeypatch.setattr(study, "write_shipped_record", lambda *what: None)
    monkeypatch.setattr(study, "write_shipped_card", lambda *what: None)
    asked = []

    def answer(argv):
        """As `ola-vlm eval`: it goes on in a folder with answers of the same weights only."""
        shipped, _, _, _, out = argv
        asked.append(weights_state(shipped))
        Path(out).mkdir(parents=True, exist_ok=True)
        answers = Path(out) / "answers.txt"
        assert not answers.exists() or answers.read_text() == asked[-1], "another run's answers"
        answers.write_text(asked[-1])

    monkeypatch.setattr(study.evaluate, "main", answer)
    other = root / "shipped" / "other" / "answers.txt"
    other.parent.mkdir(parents=True)
    other.touch()
    for _ in range(2):
        study.publish(root, [method], {}, {}, ship=True)
    first, second = asked
    assert first != second and other.exists()


@pytest.mark.parametrize("method", recipe.METHODS)
def test_runs_have_the_shapes_of_the_shipped_weights(method, tmp_path):
    """The vocabulary's tables among them, which are not padded."""
    fields = recipe.pretrain(method, root=tmp_path)
    model, _ = load_model(OlaVlmArguments(**fields))
    shipped = AutoModelForImageTextToText.from_pretrained(recipe.WEIGHTS / method, trust_remote_code=True)
    shapes = {name: value.shape for name, value in shipped.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert model.config.text_config.vocab_size == shipped.config.text_config.vocab_size


@pytest.mark.slow
def test_figures_and_report_are_there(run):
    out, _ = run
    for name in ("summary", "accuracy", "probes", "probes_plain", "losses", "decoded_depth", "decoded_seg", "world"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 200
    assert "OLA-VLM" in (out / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", recipe.METHODS)
def test_checkpoints_load_as_remote_code(run, method):
    folder = run[0] / method
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image"}, {"type": "text", "text": "how many cubes are there ? (A) 0 (B) 1 (C) 2 (D) 3"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.new("RGB", (64, 64), (120, 40, 40))
    inputs = processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    assert not set(generated[0, inputs["input_ids"].shape[1] :].tolist()) & set(model.suppressed_token_ids)


def test_it_goes_on_from_the_world_that_other_commands_left(tmp_path, monkeypatch):
    """`ola-vlm data miniature` and `ola-vlm targets` need no --resume after them; whatever else is there needs it."""

    class Prepares(Exception):
        pass

    def prepare(root, size, settings):
        raise Prepares

    monkeypatch.setattr(study, "prepare", prepare)
    for name in ("data", "targets"):
        (tmp_path / name).mkdir()
    with pytest.raises(Prepares):
        study.main(["--out", str(tmp_path)])
    (tmp_path / "llava").mkdir()
    with pytest.raises(SystemExit, match="has llava in it: add --resume"):
        study.main(["--out", str(tmp_path)])
    with pytest.raises(Prepares):
        study.main(["--out", str(tmp_path), "--resume"])


@pytest.mark.slow
def test_resume_does_nothing_twice_and_a_used_folder_is_refused(run):
    out, results = run
    stamp = (out / "ola_vlm" / "seed0" / "result.json").stat().st_mtime_ns
    again = study.main(["--shrunk", "--out", str(out), "--resume", *ALL])
    assert again["methods"] == results["methods"]
    assert (out / "ola_vlm" / "seed0" / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(SystemExit, match=r"has \S+ in it: add --resume"):
        study.main(["--shrunk", "--out", str(out)])
    with pytest.raises(SystemExit, match="begun with shrunk True"):
        study.main(["--out", str(out), "--resume"])


@pytest.mark.slow
def test_ablations_go_on_from_the_study(run, capsys):
    out, results = run
    stamp = (out / "ola_vlm" / "seed0" / "result.json").stat().st_mtime_ns
    options = ["ablations", "--tables", "terms", "learnable", "--shrunk", "--out", str(out)]
    ablations.main([*options[:3], *options[4:]])  # Table V alone
    found = json.loads((out / "ablations.json").read_text())["tables"]
    assert list(found) == ["terms"] and list(found["terms"]) == ["smooth_l1", "both"]
    assert (out / "ola_vlm" / "seed0" / "result.json").stat().st_mtime_ns == stamp  # its row was there
    (seed,) = results["methods"]["ola_vlm"]["seeds"]
    (both,) = found["terms"]["both"]
    assert both["average"] == pytest.approx(100 * seed["accuracy"]["average"])
    scores = [seed["probes"]["finetune"]["seg"][layer]["ridge"] for layer in "1234"]
    assert both["seg, after IFT"] == pytest.approx(sum(scores) / 4)
    losses = json.loads((out / "ola_vlm_terms_smooth_l1" / "seed0" / "result.json").read_text())["losses"]
    with_both = seed["losses"]
    assert losses["depth/2/smooth_l1"][0] == pytest.approx(with_both["depth/2/smooth_l1"][0])  # before the first step
    assert losses["depth/2/smooth_l1"][-1] != pytest.approx(with_both["depth/2/smooth_l1"][-1], rel=1e-6)
    with Image.open(out / "ablation_terms.png") as picture:
        assert min(picture.size) > 200
    capsys.readouterr()
    ablations.main([*options, "--report"])  # trains nothing
    text = capsys.readouterr().out
    assert (
        "2 of 3 trials done" in text
        and "the numbers mean nothing" in text
        and "| both (ola_vlm) | 1 |" in text
        and "Not done yet: learnable." in text
    )
    with pytest.raises(SystemExit, match="begun with"):
        ablations.main([*options, "--steps", "2", "2"])


@pytest.mark.parametrize(("table", "row"), [(t, row) for t, rows in recipe.ABLATIONS.items() for row in rows])
def test_ablations_change_what_they_say(table, row):
    name = recipe.ablation_run(table, row)
    changed = {}
    for stage in (recipe.pretrain, recipe.finetune):
        parent, fields = stage("ola_vlm", 0, "root"), stage(name, 0, "root")
        OlaVlmArguments(**fields)  # raises for fields and values that it does not know
        changed |= {key: fields[key] for key in fields if key not in parent or fields[key] != parent[key]}
    for place in ("output_dir", "checkpoint"):
        assert (changed.pop(place, None) is None) == (name == "ola_vlm")
    known = {"layers": {"tasks"}, "tokens": {"tasks"}, "keys": {"tasks"}, "lambda": {"tasks"}, "terms": {"tasks"}}
    known |= {"order": {"tasks"}, "tasks": {"tasks", "teachers"}, "learnable": {"task_tokens"}}
    known["losses"] = {"embedding_losses", "tasks", "teachers", "target_cache", "target_fill", "standardize_targets"}
    assert set(changed) <= known[table]
    assert bool(changed) == (name != "ola_vlm")


def test_failed_trial_shows_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)trial \('llava', 0\) failed.*Error"):
        study.run_trials(tmp_path, [("llava", 0)], {}, workers=1)


@pytest.mark.parametrize("name", components.FLOORS)
def test_shipped_component_is_above_its_floor(name):
    measure, bound, smaller = components.FLOORS[name]
    quality = json.loads((components.WEIGHTS / "quality.json").read_text())[name][measure]
    assert quality <= bound if smaller else quality >= bound


@pytest.mark.parametrize("train_part", [components.train_depth, components.train_seg])
def test_a_component_is_measured_on_scenes_that_it_was_not_trained_on(train_part, tmp_path, monkeypatch):
    """What it is measured on changes the figures, what it would be trained on does not."""
    scenes = {}
    for seed in range(3):
        sampled = render.sample_scenes(12, seed)  # enough to show every class
        scenes[seed] = (sampled, render.render_scenes(sampled, seed))
    monkeypatch.setattr(components, "fit", lambda model, *how, **more: model.eval())  # as it begins

    def measured(train: int, held_out: int) -> dict:
        splits = {"train": scenes[train], "held_out": scenes[held_out]}
        monkeypatch.setattr(components, "scene_arrays", lambda work, split="train": splits[split])
        return train_part(tmp_path, tmp_path / "out", 1)

    first = measured(train=0, held_out=1)
    assert measured(train=2, held_out=1) == first != measured(train=0, held_out=2)


@pytest.mark.parametrize("dense", [True, False])
def test_image_encoders_are_measured_on_held_out_scenes(dense, tmp_path, monkeypatch):
    """By captions of what they weren't trained on."""
    sampled = render.sample_scenes(200, 0)
    scenes = sampled, render.render_scenes(sampled, 0)
    asked = []
    monkeypatch.setattr(components, "fit", lambda model, *how, **more: model.eval())
    monkeypatch.setattr(components, "scene_arrays", lambda work, split="train": asked.append(split) or scenes)
    monkeypatch.setattr(components, "_save", lambda *what: None)
    name = "vision_tower" if dense else "gen"
    figures = components.train_clip(tmp_path, tmp_path, 1, name, dense)
    assert asked == ["train", "held_out"] and ("patch phrase accuracy" in figures) == dense


def test_the_language_model_is_measured_on_scenes_of_their_own(monkeypatch):
    """Of another seed than those that it was trained on."""
    sample_scenes = render.sample_scenes
    seeds = {"before": [], "after": []}
    when = ["before"]

    def sample(count: int, seed: int):
        seeds[when[-1]].append(seed)
        if seeds["after"]:
            raise ZeroDivisionError
        return sample_scenes(min(count, 200), seed)

    monkeypatch.setattr(components.render, "sample_scenes", sample)
    monkeypatch.setattr(components, "fit", lambda *how, **more: when.append("after"))
    with pytest.raises(ZeroDivisionError):
        components.train_language_model(None, None, 1)
    assert seeds["before"] and not set(seeds["before"]) & set(seeds["after"])


def test_probes_are_fitted_on_training_images(tmp_path, monkeypatch):
    """The first ones; those of the test are for their scores."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        for number in range(4):
            (tmp_path / "data" / "images" / f"{split}_{number:05d}.png").touch()
    fitted = []
    monkeypatch.setattr(trial, "open_caches", lambda *what: {})
    monkeypatch.setattr(trial, "make_teachers", lambda *what: {})
    monkeypatch.setattr(
        trial, "StateReader", lambda model, processor, prompt: SimpleNamespace(prompt=prompt, square=True)
    )
    monkeypatch.setattr(trial, "RidgeFit", lambda *what: None)
    monkeypatch.setattr(trial, "fit", lambda fitter, reader, targets, paths, *how, **more: fitted.extend(paths))
    text_config = SimpleNamespace(num_hidden_layers=4, hidden_size=8)
    model = SimpleNamespace(config=SimpleNamespace(text_config=text_config))
    trial.fit_ridge(tmp_path, model, None, {"train": 3, "validation": 2, "test": 2})
    assert [path.name for path in fitted] == [f"train_{number:05d}.png" for number in range(3)]


def test_the_truth_beside_decoded_pictures_is_of_the_same_scenes(tmp_path, monkeypatch):
    (tmp_path / "data" / "images").mkdir(parents=True)
    for number, split in enumerate(("train", "test")):
        arrays = {"depth": np.full((5, 2, 2), 2.0 + number), "mask": np.full((5, 2, 2), number, dtype=np.uint8)}
        save_file(arrays, tmp_path / "data" / f"{split}.safetensors")
        for image in range(5):
            (tmp_path / "data" / "images" / f"{split}_{image:05d}.png").touch()

    class Viewer:
        decoders = dict.fromkeys(("depth", "seg"), SimpleNamespace(draw=lambda truth: truth, legend={}))

        def pictures(self, paths):
            assert [path.name for path in paths] == [f"test_{image:05d}.png" for image in range(4)]
            return {task: {"image": paths, "teacher": []} for task in self.decoders}

        def caption(self, task):
            return task

    drawn = {}
    for name in ("OlaVlmForConditionalGeneration", "OlaVlmProcessor"):
        loaded = SimpleNamespace(from_pretrained=lambda folder: SimpleNamespace(eval=lambda: None))
        monkeypatch.setattr(study, name, loaded)
    monkeypatch.setattr(study, "find_run", lambda *where, **how: {})
    monkeypatch.setattr(study.LayerViewer, "load", lambda *what, **how: Viewer())
    monkeypatch.setattr(study, "pictures_figure", lambda path, columns, *more: drawn.update({path.name: columns}))
    study.decoded_figures(tmp_path)
    assert list(drawn["decoded_depth.png"]) == ["image", "truth", "teacher"]
    assert all((truth == 1 / 3).all() for truth in drawn["decoded_depth.png"]["truth"])
    assert all((truth == 1).all() for truth in drawn["decoded_seg.png"]["truth"])


def test_a_failed_jobs_message_has_the_end_of_its_log(tmp_path, monkeypatch):
    def fail(command, stdout, **how):
        stdout.write(b"it began\n" + b"." * 5000 + b"\nwhy it failed")
        return SimpleNamespace(poll=lambda: 1, returncode=1)

    monkeypatch.setattr(processes.subprocess, "Popen", fail)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0)
    with pytest.raises(RuntimeError, match="why it failed") as failed:
        processes.run_jobs({("a",): processes.Job(tmp_path, "module", "argument")}, 1, "trial")
    assert "it began" not in str(failed.value)


def test_an_interrupted_component_goes_on_with_the_same_random_numbers(tmp_path, monkeypatch):
    """Those of torch's own generator, such as dropout's and the points at which OneFormer's loss looks."""
    monkeypatch.setattr(components, "SECONDS_BETWEEN_STATES", -1)

    def trained(work: Path, stop: int | None = None) -> torch.Tensor:
        work.mkdir(exist_ok=True)
        torch.manual_seed(4)
        model = torch.nn.Linear(3, 1)
        steps = iter(range(100))

        def loss(rng, share):
            if next(steps) == stop:
                raise KeyboardInterrupt
            return model(torch.rand(5, 3)).square().mean()

        return components.fit(model, loss, 6, 0.1, work, "part").weight.detach()

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", stop=4)
    assert trained(tmp_path / "stopped").equal(whole)


def test_held_out_scenes_of_the_components_are_others(tmp_path, monkeypatch):
    drawn = {}

    def make_scenes(count: int, seed: int, desc: str):
        drawn[desc] = seed
        sampled = render.sample_scenes(2, seed)
        return sampled, {"depth": sampled.z}

    monkeypatch.setattr(components.render, "make_scenes", make_scenes)
    parts = [components.scene_arrays(tmp_path, split)[0] for split in ("train", "held_out")]
    assert len(set(drawn.values())) == 2 and not np.array_equal(parts[0].z, parts[1].z)
    again = components.scene_arrays(tmp_path, "train")[0]  # from its own file
    assert np.array_equal(again.z, parts[0].z)


def test_shipped_weights_are_small():
    def size(name):
        return sum(path.stat().st_size for path in (components.WEIGHTS / name).iterdir())

    assert sum(map(size, components.FLOORS)) < 15e6
    assert all(size(method) < 8e6 for method in recipe.METHODS)


@pytest.mark.parametrize("method", recipe.METHODS)
def test_shipped_checkpoints_carry_todays_code(method):
    """They bring their own copies of the hub files; `ola-vlm miniature --resume --ship` writes them again."""
    for name in ("configuration", "modeling", "processing"):
        own = components.WEIGHTS / method / f"{name}_ola_vlm.py"
        assert own.read_text() == (components.WEIGHTS.parents[1] / own.name).read_text()


def test_the_language_models_curriculum():
    """(share that reads patches, share of these with coordinates): lookups in texts, then patches, then bare ones."""
    assert components._curriculum(0.0) == components._curriculum(0.099) == (0.0, 1.0)
    assert components._curriculum(0.1) == pytest.approx((0.5, 1.0))
    assert components._curriculum(0.325) == pytest.approx((0.7, 0.5))
    assert components._curriculum(0.55) == pytest.approx((0.9, 0.1))
    assert components._curriculum(0.999) == pytest.approx((0.9, 0.1))


def test_tokenizer_round_trip_and_assistant_spans():
    tokenizer = components.build_tokenizer()
    text = "where is the red object with respect to the blue object ? (A) left (B) right"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "(A)"}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.convert_ids_to_tokens(marked) == ["(A)", "<end>"]


@pytest.mark.slow
def test_components_are_made_from_nothing_and_a_second_call_goes_on(tmp_path, capsys):
    """Two steps each: every part's whole way to disk, though far below its floor (the exit code says so)."""
    arguments = ["--steps", "0.001", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert components.main(arguments) == 1
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in components.FLOORS) and "BELOW THE FLOOR" in printed
    assert set(json.loads((tmp_path / "out" / "quality.json").read_text())) == set(components.FLOORS)
    stored = (tmp_path / "work" / "depth.pt").stat().st_mtime_ns
    assert components.main([*arguments, "--only", "depth"]) == 1
    assert (tmp_path / "work" / "depth.pt").stat().st_mtime_ns == stored
    with pytest.raises(ValueError, match="remove it"):
        components.main(["--steps", "0.002", *arguments[2:], "--only", "seg"])


def quadratic_loss(model: torch.nn.Linear, rng: np.random.Generator, share: float) -> torch.Tensor:
    x = torch.from_numpy(rng.normal(size=(4, 3))).float()
    return (model(x) - 1).square().mean() * (1 + share)


def test_a_component_is_fitted_by_the_schedule_and_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """To the same last bit as AdamW with the learning rate set by hand."""
    steps = 70
    rate = 0.1
    expected = torch.nn.Linear(3, 2)
    fitted = copy.deepcopy(expected)
    begun = copy.deepcopy(expected)
    fresh = copy.deepcopy(expected)
    groups = [
        {"params": [expected.weight], "weight_decay": 0.01},
        {"params": [expected.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / (0.03 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.zero_grad()
        quadratic_loss(expected, np.random.default_rng([7, step]), step / steps).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
    components.fit(fitted, partial(quadratic_loss, fitted), steps, rate, tmp_path, "whole")
    assert torch.equal(fitted.weight, expected.weight) and torch.equal(fitted.bias, expected.bias)

    def interrupted(rng, share):
        if share == 40 / steps:
            raise KeyboardInterrupt
        return quadratic_loss(begun, rng, share)

    monkeypatch.setattr(components, "SECONDS_BETWEEN_STATES", -1)  # a state a step
    with pytest.raises(KeyboardInterrupt):
        components.fit(begun, interrupted, steps, rate, tmp_path, "part")
    components.fit(fresh, partial(quadratic_loss, fresh), steps, rate, tmp_path, "part")
    assert torch.equal(fresh.weight, expected.weight) and torch.equal(fresh.bias, expected.bias)
    with pytest.raises(ValueError, match="was begun with"):
        components.fit(fresh, partial(quadratic_loss, fresh), steps, 2 * rate, tmp_path, "part")


def test_processor_time_has_that_of_a_pools_processes(tmp_path):
    """The world is rendered in some: a run's report left them out."""
    timer = trial.Timer(tmp_path / "seconds.json")
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    timer.lap("world")
    assert timer.processor_seconds["world"] > 0.25
