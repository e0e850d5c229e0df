"""`train(args)` from files to a loadable checkpoint, the command line, and the recipes."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import random_image, tiny_tasks
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny_teachers import GRID, save_clip_image, save_depth_anything, save_oneformer
from training_helpers import Interrupt, llava_sample, losses, weights, write_llava
from transformers import TrainerCallback

from ola_vlm import cli
from ola_vlm.configuration_ola_vlm import TASK_FIELDS
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.recipes import RECIPES
from ola_vlm.targets.encoders import ENCODERS, ClipImageEncoder, open_image
from ola_vlm.targets.fill import fill
from ola_vlm.targets.statistics import TargetStatistics
from ola_vlm.train import last_checkpoint, main, train
from ola_vlm.training import targets
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.rows import read_row

ROOT = Path(__file__).parents[1]
ONE_TASK = tiny_tasks()[:1]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_parts):
    """Fields of a pre-training run on 8 images in LLaVA's format, with tiny teachers."""
    folder = tmp_path_factory.mktemp("world")
    samples = []
    for i in range(8):
        (folder / "images").mkdir(exist_ok=True)
        random_image(i).save(folder / "images" / f"{i}.png")
        turns = []
        for k in range(3):
            turns.append({"from": "human", "value": "<image>\nwhat is this ?" if k == 0 else "what color ?"})
            turns.append({"from": "gpt", "value": f"the {['red', 'green', 'blue'][(i + k) % 3]} cube"})
        samples.append({"id": f"scene-{i}", "image": f"{i}.png", "conversations": turns})
    samples.append({"id": "text", "conversations": [{"from": "human", "value": "a ?"}, {"from": "gpt", "value": "b"}]})
    (folder / "data.json").write_text(json.dumps(samples))
    kinds = {"gen": "clip_image", "depth": "depth_anything", "seg": "oneformer"}
    teachers = {}
    for name, save in (("gen", save_clip_image), ("depth", save_depth_anything), ("seg", save_oneformer)):
        torch.manual_seed(1)
        save(folder / name)
        teachers[name] = {"encoder": kinds[name], "path": str(folder / name)}
    tasks = tiny_tasks()
    for task in tasks:
        encoder = ENCODERS[kinds[task["name"]]].from_pretrained(
            folder / task["name"], 1 if task["name"] == "gen" else GRID
        )
        task.update(target_length=encoder.target_length, target_dim=encoder.target_dim)
    return {
        "vision_tower": tiny_parts.vision_tower,
        "language_model": tiny_parts.language_model,
        "tasks": tasks,
        "teachers": teachers,
        "data": str(folder / "data.json"),
        "image_folder": str(folder / "images"),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def arguments(world, output_dir, **changes):
    return OlaVlmArguments(output_dir=str(output_dir), **(world | changes))


def test_pretrain_then_finetune(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", asked.append)  # nobody is asked about running a checkpoint's code
    cache = {"target_cache": str(tmp_path / "targets"), "target_fill": True, "standardize_targets": True}
    trainer = train(arguments(world, tmp_path / "pretrain", **cache))
    first = losses(trainer)[0]
    assert len(losses(trainer)) == 3 and len(first) == 14 and all(value > 0 for value in first.values())
    run = json.loads((tmp_path / "pretrain" / "run.json").read_text())
    assert run["learning_rate"] == 0.01 and [task["name"] for task in run["tasks"]] == ["gen", "depth", "seg"]
    statistics = TargetStatistics.load(tmp_path / "pretrain" / "target_statistics" / "depth.safetensors")
    assert statistics.mean.shape == (GRID * GRID, world["tasks"][1]["target_dim"])

    parts = dict.fromkeys(("vision_tower", "language_model", "tasks", "teachers"))
    finetune = {"stage": "finetune", "checkpoint": str(tmp_path / "pretrain"), **parts}
    trainer = train(arguments(world, tmp_path / "finetune", **finetune))
    assert all(sorted(step) == ["loss", "loss/ntp"] for step in losses(trainer))
    before = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "pretrain")
    after = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "finetune")
    processor = OlaVlmProcessor.from_pretrained(tmp_path / "finetune")
    assert not asked
    assert processor.task_token_ids == after.config.task_token_ids
    ids = after.config.task_token_ids
    assert before.get_input_embeddings().weight[ids].equal(before.task_token_embeddings())
    assert after.get_input_embeddings().weight[ids].equal(before.get_input_embeddings().weight[ids])
    assert not after.lm_head.weight.equal(before.lm_head.weight)
    # What the configuration calls for, and nothing of the teachers.
    before.save_pretrained(tmp_path / "alone")
    written, expected = (load_file(tmp_path / run / "model.safetensors").keys() for run in ("pretrain", "alone"))
    assert written == expected


def test_cached_and_on_the_fly_targets_give_the_same_losses(world, tmp_path, monkeypatch, capsys):
    """Filled in two parts by `ola-vlm targets`; the training then loads no teacher."""
    computed = losses(train(arguments(world, tmp_path / "computed")))
    cache = {"target_cache": str(tmp_path / "targets"), "output_dir": str(tmp_path / "run")}
    monkeypatch.setitem(RECIPES, "tiny", lambda: world | cache)
    for part, missing in (("1/2", 8), ("2/2", 4)):
        with pytest.raises(
            ValueError, match=rf"{missing} of 8 images \({missing} of gen, {missing} of depth, .*`ola-vlm targets`"
        ):
            train(OlaVlmArguments(**world, **cache))
        cli.main(["targets", "--recipe", "tiny", "--shard", part])
    assert re.search(r"^depth: 8 images, [1-9]\d{2,4} bytes each, in ", capsys.readouterr().out, re.MULTILINE)
    for encoder in ENCODERS.values():
        monkeypatch.setattr(encoder, "from_pretrained", None)
    cached = losses(train(OlaVlmArguments(**world, **cache)))
    for with_cache, without in zip(cached, computed, strict=True):
        assert with_cache == pytest.approx(without, rel=1e-4)


@pytest.fixture
def spoilt_targets(world, tmp_path, monkeypatch):
    """Two images of ten rows have no target: one can't be decoded, of the other, which two rows show, gen's is NaN."""
    folder = tmp_path / "data"
    shutil.copytree(world["image_folder"], folder / "images")
    (folder / "images" / "2.png").write_bytes((folder / "images" / "2.png").read_bytes()[:100])
    rows, spoilt, encode = (
        json.loads(Path(world["data"]).read_text()),
        random_image(3).tobytes(),
        ClipImageEncoder.encode,
    )
    (folder / "data.json").write_text(json.dumps([*rows, rows[3] | {"id": "again"}]))

    def spoil(self, images):
        bad = torch.tensor([image.tobytes() == spoilt for image in images])
        return torch.where(bad[:, None, None], float("nan"), encode(self, images))

    monkeypatch.setattr(ClipImageEncoder, "encode", spoil)
    fields = {"data": str(folder / "data.json"), "image_folder": str(folder / "images"), "max_bad_rows": 0.0}
    return world | fields | {"target_cache": str(tmp_path / "targets"), "standardize_targets": True}


@pytest.mark.parametrize("by_command", [True, False])
def test_images_without_a_target_are_dropped_at_the_start(spoilt_targets, tmp_path, monkeypatch, caplog, by_command):
    """And count neither as bad rows of the run nor in the statistics; filled in advance or by the run."""
    fields = spoilt_targets | {"target_fill": not by_command, "output_dir": str(tmp_path / "run")}
    if by_command:
        monkeypatch.setitem(RECIPES, "tiny", lambda: fields)
        cli.main(["targets", "--recipe", "tiny", "--on_bad_rows", "drop"])
        monkeypatch.setattr(ClipImageEncoder, "from_pretrained", None)
    with pytest.raises(
        ValueError, match=r"(?s)2 images have no target.*2\.png: .*3\.png: gen: its target is not finite"
    ):
        train(OlaVlmArguments(**fields))
    trainer = train(OlaVlmArguments(**fields, on_bad_rows="drop"))
    assert {row["id"] for row in trainer.train_dataset} == {"text", *(f"scene-{i}" for i in (0, 1, 4, 5, 6, 7))}
    assert trainer.bad_rows == 0 and "dropped 3 rows whose images have no target" in caplog.text
    assert len(trainer.train_dataset.lengths) == len(trainer.train_dataset.has_image) == 7
    (folder,) = (tmp_path / "targets").glob("clip_image-*/")
    statistics = TargetStatistics.load(tmp_path / "run" / "target_statistics" / "gen.safetensors")
    stored = torch.cat([load_file(path)["targets"] for path in folder.glob("*.safetensors")])
    assert len(stored) == 6
    torch.testing.assert_close(statistics.mean, stored.mean(0))


def test_targets_that_were_stored_elsewhere(world, tmp_path, monkeypatch):
    """As by another machine, with a disk of its own."""
    monkeypatch.setattr(targets, "fill", lambda folder, teachers, caches, sources, *_: fill(folder, {}, {}, sources))
    cache = {"target_cache": str(tmp_path / "targets"), "target_fill": True}
    with pytest.raises(ValueError, match=r"lacks targets of 8 of 8 images.*one folder for all machines\?"):
        train(arguments(world, tmp_path / "run", **cache))


def test_standardized_targets_of_text_alone(world, tmp_path):
    rows = [row for row in json.loads(Path(world["data"]).read_text()) if row["id"] == "text"]
    (tmp_path / "text.json").write_text(json.dumps(rows * 8))
    cache = {"target_cache": str(tmp_path / "targets"), "standardize_targets": True, "max_steps": 1}
    trainer = train(arguments(world, tmp_path / "run", data=str(tmp_path / "text.json"), **cache))
    assert trainer.state.global_step == 1


def test_shuffled_targets_are_a_different_run_of_the_same_model(world, tmp_path):
    steps = {}
    for shuffled in (False, True):
        trainer = train(arguments(world, tmp_path / f"{shuffled}", shuffle_targets=shuffled, max_steps=1))
        steps[shuffled] = losses(trainer)[0]
    assert steps[True]["loss/ntp"] == pytest.approx(steps[False]["loss/ntp"], rel=1e-6)
    for name in ("loss/depth/1/contrastive", "loss/seg/2/smooth_l1", "loss/gen/4/smooth_l1"):
        assert abs(steps[True][name] - steps[False][name]) > 1e-6


def test_each_seed_has_its_own_beginning_and_shuffle(world, tmp_path):
    """What training adds to the parts, and the control's targets; the parts themselves are nobody's to draw."""
    options = {"shuffle_targets": True, "max_steps": 1, "learning_rate": 0.0}
    begun, shuffles = {}, {}
    for name, seed in (("one", 1), ("two", 2), ("again", 1)):
        trainer = train(arguments(world, tmp_path / name, seed=seed, **options))
        begun[name] = weights(trainer.model)
        shuffles[name] = trainer.train_dataset.other_image
    assert shuffles["again"] == shuffles["one"] != shuffles["two"]
    drawn = ("multi_modal_projector", "predictors", "queries")
    for name, value in begun["one"].items():
        assert begun["again"][name].equal(value), name
        is_drawn = any(part in name for part in drawn)
        is_constant = value.unique().numel() == 1  # biases, norms
        # The task tokens are rows of the vocabulary, written by the query tables.
        if not is_constant and "embed_tokens" not in name:
            assert begun["two"][name].equal(value) != is_drawn, name


def test_statistics_are_those_of_the_training_images(world, tmp_path):
    """Not of those that the run is evaluated on, though the cache has these, too."""
    cache = {"target_cache": str(tmp_path / "targets"), "target_fill": True, "standardize_targets": True}
    args = arguments(world, tmp_path / "run", **cache)
    train_rows, eval_rows = args.load_rows().split_by_image(0.3, seed=0)
    targets.target_sources(args, [{**TASK_FIELDS, **task} for task in world["tasks"]], train_rows, eval_rows)
    found = TargetStatistics.load(tmp_path / "run" / "target_statistics" / "depth.safetensors")
    encoder = ENCODERS["depth_anything"].from_pretrained(world["teachers"]["depth"]["path"], GRID)
    seen = {}
    for name, part in (("train", train_rows), ("both", args.load_rows())):
        images = [open_image(image) for row in part for image in row.get("images", ())]
        seen[name] = TargetStatistics.fit([encoder.encode(images)])
    torch.testing.assert_close(found.mean, seen["train"].mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.std, seen["train"].std, rtol=1e-4, atol=1e-5)
    assert not found.mean.allclose(seen["both"].mean, rtol=1e-4, atol=1e-5)


def test_methods_start_from_the_same_projector(world, tmp_path):
    projectors = []
    for tasks in (world["tasks"], []):
        folder = tmp_path / f"{len(tasks)} tasks"
        trainer = train(arguments(world, folder, tasks=tasks, max_steps=1, learning_rate=0.0))
        projectors.append({k: v for k, v in weights(trainer.model).items() if "projector" in k})
    assert all(projectors[1][name].equal(value) for name, value in projectors[0].items())


def test_killed_run_resumes_from_its_last_complete_checkpoint(world, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = train(arguments(world, tmp_path / "whole", **saved))
    with pytest.raises(KeyboardInterrupt):
        train(arguments(world, tmp_path / "killed", **saved), callbacks=[Interrupt(3)])
    (tmp_path / "killed" / "checkpoint-3").mkdir()  # killed while saving: no trainer state yet
    assert last_checkpoint(tmp_path / "killed").endswith("checkpoint-2")
    resumed = train(arguments(world, tmp_path / "killed", **saved, resume_from_checkpoint="true"))
    assert losses(resumed) == losses(whole)
    for name, value in weights(whole.model).items():
        assert value.equal(weights(resumed.model)[name]), name
    assert last_checkpoint(tmp_path / "nothing") is None


def spoilt_data(world, folder) -> dict:
    """The world's data with two more rows, the last of which has no image; and its images."""
    folder.mkdir()
    shutil.copytree(world["image_folder"], folder / "images")
    shutil.copy(folder / "images" / "0.png", folder / "images" / "late.png")
    rows = json.loads(Path(world["data"]).read_text())
    rows += [{**rows[0], "id": name, "image": f"{name}.png"} for name in ("late", "gone")]
    (folder / "data.json").write_text(json.dumps(rows))
    return {"data": str(folder / "data.json"), "image_folder": str(folder / "images"), "num_train_epochs": 1}


class Damage(TrainerCallback):
    """After the data is checked and the targets are there, an image is spoilt."""

    def __init__(self, path):
        self.path = Path(path)

    def on_train_begin(self, *args, **kwargs):
        self.path.write_bytes(self.path.read_bytes()[:100])


def test_bad_rows_stop_at_the_start_or_are_dropped_then_and_later(world, tmp_path, caplog):
    """One image is missing from the start; another is damaged in training, hours in as it were."""
    spoilt = spoilt_data(world, tmp_path / "data")
    with pytest.raises(ValueError, match=r"bad rows: image missing \(1\); row gone: there is no image .*gone.png"):
        train(arguments(world, tmp_path / "stop", **spoilt))
    spoilt |= {"on_bad_rows": "drop", "max_bad_rows": 0.1, "max_steps": -1, "per_device_train_batch_size": 5}
    late = Damage(tmp_path / "data" / "images" / "late.png")
    trainer = train(arguments(world, tmp_path / "drop", **spoilt), callbacks=[late])
    assert trainer.state.global_step == 2 and trainer.bad_rows == 1
    assert all(step["loss"] > 0 for step in losses(trainer))
    assert "dropped 1 of 11 rows: image missing (1)" in caplog.text
    assert "dropped row late: image " in caplog.text and "1 bad rows were dropped in training" in caplog.text
    spoilt["max_bad_rows"] = 0.01  # the damaged one is found at the start, or in training if nobody looked
    assert train(arguments(world, tmp_path / "strict", **spoilt)).bad_rows == 0
    assert "dropped 2 of 11 rows: image missing (1), image undecodable (1)" in caplog.text
    with pytest.raises(ValueError, match=r"1 bad rows are over max_bad_rows=0\.01 of the run's 10 rows"):
        train(arguments(world, tmp_path / "unseen", **spoilt, check_images=False))


def test_rows_are_truncated_and_grouped_by_choice(world, tmp_path):
    options = {"max_length": 58, "on_long_rows": "truncate", "train_sampling_strategy": "group_by_length"}
    trainer = train(arguments(world, tmp_path / "run", **options))
    rows = trainer.train_dataset
    assert len(rows) == 9 and rows.lengths.max() == 58 and rows.has_image.sum() == 8
    assert all(step["loss"] > 0 for step in losses(trainer))
    with pytest.raises(ValueError, match="max_length 3 has no room for an image"):
        train(arguments(world, tmp_path / "too_short", max_length=3))
    # Without tasks images may be in the rows or not.
    llava = {"stage": "finetune", "tasks": None, "teachers": {}, "max_length": 15}
    with pytest.raises(ValueError, match="max_length 15 has no room for an image"):
        train(arguments(world, tmp_path / "shows", **llava))
    text = write_llava(tmp_path, [llava_sample(i, image=None) for i in range(8)])
    trainer = train(arguments(world, tmp_path / "says", data=str(text), **llava))
    assert trainer.train_dataset.lengths is None or trainer.train_dataset.lengths.max() <= 15
    assert all(step["loss"] > 0 for step in losses(trainer))


def parquet(world, folder) -> dict:
    """The fields that name the world's data as a data set, images in its rows."""
    samples = [read_row(sample, 0, world["image_folder"]) for sample in json.loads(Path(world["data"]).read_text())]
    for sample in samples:
        sample["images"] = [{"bytes": Path(path).read_bytes(), "path": None} for path in sample["images"]]
        for message in sample["messages"]:
            message["content"] = [{"type": part["type"], "text": part.get("text")} for part in message["content"]]
    folder.mkdir()
    table = datasets.Dataset.from_list(samples).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(folder / "train.parquet")
    return {"data": str(folder), "image_folder": None}


def test_a_stream_is_resumed_exactly_after_its_first_pass(world, tmp_path, monkeypatch):
    """Of 9 rows; teachers run in this process, not in the loader's workers, and not for the batches gone by."""
    encoded, encode = [], ENCODERS["clip_image"].encode

    def counted(self, images):
        encoded.append((os.getpid(), len(images)))
        return encode(self, images)

    monkeypatch.setattr(ENCODERS["clip_image"], "encode", counted)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # seconds, after every pass
    options = parquet(world, tmp_path / "parquet") | {"streaming": True, "max_steps": 5, "dataloader_num_workers": 1}
    options |= {"save_strategy": "steps", "save_steps": 1, "tasks": world["tasks"][:1]}
    options |= {"teachers": {"gen": world["teachers"]["gen"]}}
    whole = train(arguments(world, tmp_path / "whole", **options))
    assert len(encoded) == 5 and {pid for pid, _ in encoded} == {os.getpid()}
    with pytest.raises(KeyboardInterrupt):
        train(arguments(world, tmp_path / "cut", **options), callbacks=[Interrupt(5)])
    encoded.clear()
    resumed = train(arguments(world, tmp_path / "cut", **options, resume_from_checkpoint="true"))
    assert losses(resumed) == losses(whole) and len(encoded) == 1


def test_streaming_a_parquet_folder(world, tmp_path):
    """The same rows from a stream of a data set: images in the rows, no length, nothing known in advance."""
    data = parquet(world, tmp_path / "parquet") | {
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 3,
    }
    runs = [train(arguments(world, tmp_path / f"{streams}", **data, streaming=streams)) for streams in (False, True)]
    same = {name: data[name] for name in ("train_sampling_strategy", "per_device_train_batch_size")}
    expected = train(arguments(world, tmp_path / "run", **same))
    for trainer in runs:
        for step, same in zip(losses(trainer), losses(expected), strict=True):
            assert step == pytest.approx(same, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_long_rows": "cut"}, r"on_long_rows 'cut' is unknown.*'truncate'"),
        ({"on_bad_rows": "skip"}, r"on_bad_rows 'skip' is unknown.*'drop'"),
        ({"standardize_targets": True}, "give target_cache"),
        ({"vision_tower": None}, "vision_tower and language_model"),
        ({"checkpoint": "somewhere"}, "either checkpoint or"),
        ({"teachers": {"depth": {}}}, r"need one teacher each.*\['depth'\]"),
        ({"tasks": ONE_TASK, "teachers": {"gen": {"path": "x"}}}, r"\['gen'\] is .*encoder one of \['depth_anything'"),
        ({"tasks": ONE_TASK, "teachers": {"gen": {"encoder": "clip", "path": "x"}}}, r"'clip'.*'clip_image'"),
        ({"tasks": ONE_TASK, "teachers": {"gen": {"encoder": "clip_image"}}}, r"\['gen'\] is .*give its path"),
        ({"stage": "posttrain"}, "'posttrain' is unknown"),
        ({"dtype": "float64"}, r"dtype 'float64' is unknown.*'float32', 'bfloat16'"),
        ({"data": None, "vision_tower": "not looked at"}, "no data: give --recipe NAME .* a folder of images"),
        ({"data": "not/there.json", "vision_tower": "not looked at"}, r"no file not/there\.json: give data"),
        (
            {"streaming": True, "shuffle_targets": True, "train_sampling_strategy": "group_by_length"},
            "leave out shuffle_targets, train_sampling_strategy, or set streaming=false",
        ),
        ({"streaming": True, "max_steps": -1}, "give max_steps"),
        ({"streaming": True, "target_cache": "x"}, "leave out target_cache, or"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"tasks": [], "embedding_losses": True}, "embedding_losses: this run trains no embedding losses; give tasks"),
        (
            {"stage": "finetune", "losses_until": 0.5},
            "losses_until: this run trains no embedding losses; give tasks, or a checkpoint",
        ),
        (
            {"embedding_losses": False, "losses_until": 0.5, "shuffle_targets": True},
            "losses_until, shuffle_targets: this run trains no embedding losses",
        ),
    ],
)
def test_wrong_arguments_name_the_field(world, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(arguments(world, tmp_path, **changes))


@pytest.mark.parametrize(
    ("teacher", "task", "message"),
    [
        ({"encoder": "clip"}, {}, "as encoder one of"),
        ({"path": "/not/there"}, {}, "there is no folder /not/there"),
        ({"path": "no/body"}, {}, "there is no folder no/body"),
        ({"features": "first"}, {}, "features 'first' is unknown"),
        ({"resize_mode": "crop"}, {}, "resize_mode 'crop' is unknown"),
        (
            {},
            {"target_dim": 99},
            r"'depth' has targets \(64, \d+\) from its teacher, \(64, 99\) from its",
        ),
        ({}, {"target_length": 15, "num_task_tokens": 5}, r"targets \(9, \d+\) from its teacher, \(15, "),
    ],
)
@pytest.mark.parametrize("cached", [True, False])
def test_teachers_that_do_not_fit_are_seen_first(world, tmp_path, monkeypatch, teacher, task, message, cached):
    """Before rows are read, and without their weights."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(OlaVlmArguments, "load_rows", None)
    monkeypatch.setattr(ENCODERS["depth_anything"], "from_pretrained", None)
    teachers = {**world["teachers"], "depth": {**world["teachers"]["depth"], **teacher}}
    tasks = [{**known, **task} if known["name"] == "depth" else known for known in world["tasks"]]
    cache = {"target_cache": str(tmp_path / "cache"), "target_fill": True} if cached else {}
    with pytest.raises(ValueError, match=message):
        train(arguments(world, tmp_path / "run", teachers=teachers, tasks=tasks, **cache))


def test_evaluation_by_task(world, tmp_path):
    """Of images that aren't trained on: the same losses with a cache and without, and an unused teacher is ignored."""
    (tmp_path / "questions.json").write_text(json.dumps([{"question": "what color ?", "image": "0.png"}]))
    options = {"tasks": world["tasks"][1:], "eval_data": "0.3", "eval_strategy": "steps", "eval_steps": 3}
    options["eval_questions"] = str(tmp_path / "questions.json")
    cache = {"target_cache": str(tmp_path / "cache"), "target_fill": True}
    measured = []
    for name, fields in (("computed", {}), ("cached", cache)):
        trainer = train(arguments(world, tmp_path / name, **options, **fields))
        logged = [log for log in trainer.state.log_history if "eval_loss" in log]
        measured.append({key: value for key, value in logged[-1].items() if key.startswith("eval_loss")})
    expected = {"eval_loss", "eval_loss/ntp"}
    for task in options["tasks"]:
        for layer in task["layers"]:
            expected |= {f"eval_loss/{task['name']}/{layer}/{part}" for part in ("smooth_l1", "contrastive")}
    (answer,) = (tmp_path / "cached" / "answers" / "step-3.jsonl").read_text().splitlines()
    assert json.loads(answer)["question"] == "what color ?" and "output" in json.loads(answer)
    assert measured[0].keys() == expected and all(value > 0 for value in measured[0].values())
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


def test_command_line(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's: a command starts without
    monkeypatch.setitem(RECIPES, "tiny", lambda: world | {"output_dir": str(tmp_path / "from_recipe")})
    one_task = json.dumps(world["tasks"][1:2])
    teachers = json.dumps({"depth": world["teachers"]["depth"]})
    changes = ["--tasks", one_task, "--teachers", teachers, "--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    cli.main(["train", "--recipe", "tiny", *changes, "--weight-decay=0.25"])
    errors = capsys.readouterr().err
    assert errors.count("stage pretrain: trains {'projector': ") == 1 and "[transformers] stage" not in errors
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["recipe"] == "tiny" and run["max_steps"] == 1 and run["weight_decay"] == 0.25
    assert [task["name"] for task in run["tasks"]] == ["depth"] and run["learning_rate"] == 0.01
    model = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert list(model.predictors) == ["depth"]
    assert not (tmp_path / "from_recipe").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        # No abbreviations either.
        (["--max_step", "1"], "unknown field --max_step: did you mean --max_steps.*--help` lists all"),
        (["--recipe", "miniature_pretrain", "--nonsense=3"], "unknown field --nonsense: .*--help` lists all"),
        (["--recipe", "miniature_pretrian"], "no recipe 'miniature_pretrian': did you mean miniature_pretrain"),
        (["--stage", "pretrian"], "no stage 'pretrian': did you mean pretrain"),
    ],
)
def test_unknown_fields_are_errors(argv, message):
    with pytest.raises(SystemExit, match=message):
        main(argv)


def test_unknown_fields_of_a_recipe_are_errors(monkeypatch):
    monkeypatch.setitem(RECIPES, "broken", lambda: {"learning_rat": 1.0})
    with pytest.raises(SystemExit, match=r"broken: unknown field learning_rat: did you mean learning_rate"):
        main(["--recipe", "broken"])


def test_subcommands(capsys):
    with pytest.raises(SystemExit, match="unknown command 'dance'"):
        cli.main(["dance"])
    with pytest.raises(SystemExit, match="unknown command 'trian': did you mean train"):
        cli.main(["trian"])
    cli.main([])
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "check-data", "miniature", "convert", "export"))


def test_train_runs_as_a_script():
    command = [sys.executable, "train.py", "--recipe", "miniature_pretrain", "--unknown", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "unknown field --unknown" in done.stderr
