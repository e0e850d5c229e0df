"""`ola-vlm miniature` from end to end, shrunken: 4 steps a stage on a few scenes, with the shipped components."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ola_vlm.inference.checkpoints import load_checkpoint
from ola_vlm.miniature import ablations, components, study
from ola_vlm.probing.fit import batches
from ola_vlm.probing.probes import load_probes, score
from ola_vlm.recipes import miniature as recipe
from ola_vlm.targets.fill import make_teachers, open_caches
from ola_vlm.train import load_model
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.world import language, render


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "run"
    return out, study.main(["--shrunk", "--out", str(out)])


def test_report_has_every_field_of_every_method(run):
    out, results = run
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["methods"]) == list(recipe.METHODS)
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


def test_methods_share_their_start_and_differ_after_it(run):
    """Same data and same first projector: the text loss of the first step is that of the same captions."""
    losses = {method: found["seeds"][0]["losses"] for method, found in run[1]["methods"].items()}
    of_depth = "depth/2/smooth_l1"
    assert losses["ola_vlm"][of_depth] != losses["ola_vlm_shuffled"][of_depth]
    assert losses["ola_vlm"]["ntp"][0] == pytest.approx(losses["ola_vlm_shuffled"]["ntp"][0], rel=1e-4)


@pytest.mark.parametrize("method", ["ola_vlm", "llava"])
def test_runs_have_the_shapes_of_the_shipped_weights(method, tmp_path):
    """The vocabulary's tables among them, which are not padded."""
    fields = recipe.pretrain(method, root=tmp_path)
    model, _ = load_model(OlaVlmArguments(**fields))
    shipped = AutoModelForImageTextToText.from_pretrained(recipe.WEIGHTS / method, trust_remote_code=True)
    shapes = {name: value.shape for name, value in shipped.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert model.config.text_config.vocab_size == shipped.config.text_config.vocab_size


def test_figures_and_report_are_there(run):
    out, _ = run
    for name in ("summary", "accuracy", "probes", "probes_plain", "losses", "decoded_depth", "decoded_seg", "world"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 200
    assert "OLA-VLM" in (out / "report.md").read_text()


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
    assert not set(generated[0, inputs["input_ids"].shape[1] :].tolist()) & set(model.never_emitted)


def test_resume_does_nothing_twice_and_a_used_folder_is_refused(run):
    out, results = run
    stamp = (out / "ola_vlm" / "seed0" / "result.json").stat().st_mtime_ns
    again = study.main(["--shrunk", "--out", str(out), "--resume"])
    assert again["methods"] == results["methods"]
    assert (out / "ola_vlm" / "seed0" / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(SystemExit, match="is not empty: add --resume"):
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
        "2 of 3 arms done" in text
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


def test_failed_arm_shows_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)arm \('llava', 0\) failed.*Error"):
        study.run_arms(tmp_path, [("llava", 0)], {}, workers=1)


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
    assert all(size(method) < 8e6 for method in ("llava", "ola_vlm"))


@pytest.mark.parametrize("method", study.SHIPPED)
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
