"""What a run says before it begins, which runs go on from which checkpoints, and what an evaluation leaves."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import datasets
import numpy as np
import pytest
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from conftest import CHAT_TEMPLATE
from huggingface_hub import constants
from training_helpers import Interrupt, llava_sample, losses, weights, write_llava
from transformers import GenerationConfig, TrainerCallback, trainer_optimizer
from transformers.integrations import TensorBoardCallback, WandbCallback

from ola_vlm import cli
from ola_vlm import train as train_module
from ola_vlm.convert.merge import record_file
from ola_vlm.eval.during_training import report_answers
from ola_vlm.recipes.miniature import WEIGHTS
from ola_vlm.train import train
from ola_vlm.training import arguments as arguments_module
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.preflight import check_run
from ola_vlm.training.rows import Rows, load_rows
from ola_vlm.training.run_record import (
    check_checkpoint,
    check_unused,
    data_fingerprint,
    differences,
    is_finished,
    last_checkpoint,
    read_run,
    run_identity,
    run_lock,
    write_run,
)

RECIPES_FOLDER = Path(train_module.__file__).parent / "recipes"
SAVED = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def fields(tiny_parts, tmp_path) -> dict:
    """Of a pre-training of the plain LLaVA: 8 rows, 2 steps an epoch."""
    samples = [llava_sample(i, f"{i % 6}.png" if i < 7 else None) for i in range(8)]
    data = write_llava(tmp_path / "data", samples, [f"{i}.png" for i in range(6)])
    return {
        "vision_tower": tiny_parts.vision_tower,
        "language_model": tiny_parts.language_model,
        "data": str(data),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def arguments(fields, output_dir, **changes) -> OlaVlmArguments:
    return OlaVlmArguments(output_dir=str(output_dir), **{**fields, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forbid(monkeypatch, place, name: str) -> None:
    def fail(*args, **kwargs):
        raise AssertionError(f"{name} came before the mistake was seen")

    monkeypatch.setattr(place, name, fail)


@pytest.mark.parametrize(
    "batch",
    [
        {"per_device_train_batch_size": 16},
        {"per_device_train_batch_size": 9, "max_steps": 5},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    ],
)
def test_fewer_rows_than_a_batch(fields, tmp_path, monkeypatch, batch):
    forbid(monkeypatch, train_module, "load_model")
    options = {"max_steps": -1, "dataloader_drop_last": True, **batch}
    device = batch["per_device_train_batch_size"]
    accumulated = batch.get("gradient_accumulation_steps", 1)
    numbers = rf"8 rows .* {device * accumulated} rows \({device} a device x {accumulated} accumulated x 1 processes\)"
    with pytest.raises(ValueError, match=f"{numbers}.*lower per_device_train_batch_size.*dataloader_drop_last=false"):
        train(arguments(fields, tmp_path / "out", **options))
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("nothing", [{"max_steps": 0}, {"max_steps": -1, "num_train_epochs": 0}])
def test_no_steps_at_all(fields, tmp_path, nothing):
    with pytest.raises(ValueError, match="train nothing: give more than 0"):
        arguments(fields, tmp_path, **nothing)


@pytest.mark.parametrize(
    ("changes", "steps", "remedy"),
    [
        ({"max_steps": 3}, 3, "raise max_steps"),
        ({"num_train_epochs": 1.5}, 3, "lower per_device_train_batch_size, or raise num_train_epochs"),
        (
            {"per_device_train_batch_size": 3, "dataloader_drop_last": True, "gradient_accumulation_steps": 2},
            3,
            "lower",
        ),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, 6, "lower gradient_accumulation_steps"),
        ({"per_device_train_batch_size": 1, "num_train_epochs": 1, "min_steps": 17}, 24, None),
    ],
)
def test_the_plan_is_what_the_trainer_does(fields, tmp_path, capsys, caplog, changes, steps, remedy):
    trainer = train(arguments(fields, tmp_path / "out", **{"max_steps": -1, **changes}))
    assert trainer.state.global_step == steps
    said = capsys.readouterr().out
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    batch = trainer.args.rows_per_step
    for pattern in ("rows: +8\n", f"steps: +{steps}\n", f"batch: +{batch} rows", f"parameters: +{trained:,} of"):
        assert re.search(pattern, said), pattern
    assert str(tmp_path / "out") in said and re.search(r"memory a device: +about [\d.e-]+ GB \(weights", said)
    assert ("hardly train anything" in caplog.text) == (remedy is not None)
    assert remedy is None or remedy in caplog.text


def test_a_run_goes_on_from_its_own_checkpoints_only(fields, tmp_path):
    folder = tmp_path / "run"
    train(arguments(fields, folder, **SAVED, max_steps=2))
    before = contents(folder)
    for resume in ("true", str(folder / "checkpoint-2")):
        with pytest.raises(ValueError, match=r"another run's \(learning_rate 0\.01 there, 0\.02 here\).*--checkpoint"):
            train(arguments(fields, folder, **SAVED, max_steps=2, learning_rate=0.02, resume_from_checkpoint=resume))
    with pytest.raises(ValueError, match=r"has checkpoint-2 of an earlier run.*--resume_from_checkpoint true"):
        train(arguments(fields, folder, max_steps=2))
    shutil.copytree(folder / "checkpoint-1", tmp_path / "foreign" / "checkpoint-1")
    (tmp_path / "data" / "0.png").unlink()
    rows = [llava_sample(i) for i in range(8)]
    write_llava(tmp_path / "data", rows, ["a.png"])  # the same fields, other rows
    with pytest.raises(ValueError, match=r"another run's \(data "):
        train(arguments(fields, tmp_path / "foreign", **SAVED, max_steps=2, resume_from_checkpoint="true"))
    assert contents(folder) == before


def test_what_makes_a_run_another_one(fields, tmp_path):
    """No run goes on from a checkpoint of another seed, schedule or objective; where it lies is its own affair."""
    rows = arguments(fields, tmp_path).load_rows()

    def identity(output_dir=tmp_path, **changes) -> dict:
        return run_identity(arguments(fields, output_dir, **changes), rows)

    own = identity()
    deciding = {
        "seed": 5,
        "data_seed": 5,
        "learning_rate": 0.02,
        "max_steps": 4,
        "warmup_steps": 1,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "group_by_length",
        "gradient_accumulation_steps": 2,
        "stage": "finetune",
        "embedding_losses": False,
        "task_tokens": "frozen",
        "shuffle_targets": True,
        "dtype": "bfloat16",
        "max_length": 99,
        "on_long_rows": "truncate",
        "target_storage": "float16",
        "tasks": [{"name": "depth", "layers": [2]}],
        "teachers": {"depth": {"encoder": "depth_anything", "path": "org/depth"}},
        "vision_tower": "another/tower",
        "eval_data": "0.25",
    }
    for name, value in deciding.items():
        assert identity(**{name: value}) != own, name
    free = {"logging_steps": 7, "save_steps": 9, "dataloader_num_workers": 1, "max_bad_rows": 0.5}
    for name, value in free.items():
        assert identity(**{name: value}) == own, name
    assert identity(tmp_path / "elsewhere") == own
    begun = []  # from one place, where another run has been meanwhile
    for seed in (1, 2):
        write_run(tmp_path / "before", {"identity": {"seed": seed}})
        begun.append(identity(checkpoint=str(tmp_path / "before")))
    assert begun[0] != begun[1]


def test_the_rows_to_evaluate_on_are_drawn_by_the_seed(fields, tmp_path):
    args = {seed: arguments(fields, tmp_path, seed=seed, eval_data="0.4") for seed in range(4)}
    splits = {}
    for seed, of_seed in args.items():
        parts = of_seed.split_eval_rows(of_seed.load_rows())
        splits[seed] = tuple(tuple(row["id"] for row in part) for part in parts)
        again = of_seed.split_eval_rows(of_seed.load_rows())
        assert splits[seed] == tuple(tuple(row["id"] for row in part) for part in again)
        trained, evaluated = splits[seed]
        assert sorted(trained + evaluated) == [str(i) for i in range(8)] and len(evaluated) < len(trained)
    assert len(set(splits.values())) > 1


def test_a_stream_is_shuffled_by_the_seed(fields, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(arguments_module, "load_rows", lambda *place, **how: asked.append(how["shuffle_seed"]))
    given = [{"seed": 3}, {"seed": 4}, {"seed": 3, "data_seed": 5}, {"train_sampling_strategy": "sequential"}]
    for changes in given:
        arguments(fields, tmp_path, streaming=True, **changes).load_rows()
    assert asked == [3, 4, 5, None]


def test_a_stream_read_by_other_workers_is_another_run(fields, tmp_path):
    """Each reads files of its own, so the rows come in another order; rows that are no stream don't."""
    for streaming in (True, False):
        several = [arguments(fields, tmp_path, streaming=streaming, dataloader_num_workers=n) for n in (0, 2)]
        identities = [run_identity(args, Rows([{}], tmp_path)) for args in several]
        assert differences(*identities) == ("stream_workers 0 there, 2 here" if streaming else "")
        # A run of an earlier version, which didn't say, goes on.
        del identities[0]["stream_workers"]
        assert differences(*identities) == differences(*reversed(identities)) == ""


def test_the_last_checkpoint_is_the_one_of_most_steps(tmp_path):
    for step in (9, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    (tmp_path / "checkpoint-100" / "trainer_state.json").unlink()  # killed as it wrote it
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


def test_weights_are_not_overwritten(fields, tmp_path):
    train(arguments(fields, tmp_path / "run", max_steps=1))
    with pytest.raises(ValueError, match=r"has model\.safetensors of an earlier run, which would be overwritten"):
        train(arguments(fields, tmp_path / "run", max_steps=1, learning_rate=0.5))


def test_a_run_that_goes_on_elsewhere_overwrites_no_other(fields, tmp_path):
    """From a checkpoint that lies in another folder than its output."""
    for name, seed in (("first", 1), ("second", 2)):
        train(arguments(fields, tmp_path / name, **SAVED, max_steps=2, seed=seed))
    before = contents(tmp_path / "second")
    options = {**SAVED, "max_steps": 2, "seed": 1}
    options["resume_from_checkpoint"] = str(tmp_path / "first" / "checkpoint-1")
    with pytest.raises(ValueError, match="second has checkpoint-2 of an earlier run"):
        train(arguments(fields, tmp_path / "second", **options))
    assert contents(tmp_path / "second") == before
    resumed = train(arguments(fields, tmp_path / "third", **options))
    assert resumed.state.global_step == 2 and len(losses(resumed)) == 2


def test_folders_that_only_sound_like_checkpoints(tmp_path):
    """They are none of a run's: neither a reason to stop, nor what a run goes on from, nor known by its record."""
    write_run(tmp_path, {"finished_steps": 7})
    for name in ("checkpoint-best", "checkpoints", "checkpoint-7b"):
        (tmp_path / name).mkdir()
        assert read_run(tmp_path / name) is None and record_file(str(tmp_path / name)) is None
    check_unused(tmp_path)
    assert last_checkpoint(tmp_path) is None
    for step in (1000, 7):
        (tmp_path / f"checkpoint-{step}").mkdir()
        assert read_run(tmp_path / f"checkpoint-{step}") == {"finished_steps": 7}
        assert record_file(str(tmp_path / f"checkpoint-{step}")) == tmp_path / "run.json"
    with pytest.raises(ValueError, match="has checkpoint-1000 of an earlier run"):
        check_unused(tmp_path)


def test_an_export_overwrites_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SystemExit, match=r"has model\.safetensors already: choose another folder"):
        cli.main(["export", "not/looked/at", str(tmp_path)])


@pytest.mark.parametrize(
    "words",
    [["export", "x"], ["eval", "x", "--benchmark", "miniature", "--out"], ["visualize", "x", "x.png", "--out"]],
)
def test_results_are_not_mixed_with_other_files(tmp_path, words):
    (tmp_path / "notes.txt").touch()
    told = "is not empty" if words[0] == "export" else f"has notes.txt and nothing of `ola-vlm {words[0]}`"
    with pytest.raises(SystemExit, match=f"{told}: choose another"):
        cli.main([*words, str(tmp_path)])
    # Its own results there make it the command's; then the next mistake is told.
    own = {"eval": "answers.jsonl", "visualize": "layers.html"}
    if words[0] in own:
        (tmp_path / own[words[0]]).touch()
        with pytest.raises(SystemExit, match=r"x(\.png)?\b(?!.*notes)"):
            cli.main([*words, str(tmp_path)])


@pytest.mark.parametrize(
    "command",
    [
        "eval x --benchmark miniature --out",
        "visualize x x.png --out",
        "compare x x --out",
        "probe x --images x --out",
        "data miniature --out",
        "miniature --out",
        "study ablations --out",
        "study objectives --out",
        "merge ADAPTER",
        "export x",
        "convert x",
        "convert-tower x",
    ],
)
def test_a_file_is_no_folder_for_results(tmp_path, command):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "README.md"
    file.touch()
    words = [str(adapter) if word == "ADAPTER" else word for word in command.split()]
    for out in (file, file / "below"):
        with pytest.raises(SystemExit, match=f"{file} is a file, and results go into a folder: give"):
            cli.main([*words, str(out)])


def test_a_file_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, and results go into a folder"), run_lock(tmp_path / "file"):
        pass


def test_a_finished_run_changes_nothing(fields, tmp_path, caplog):
    options = {**SAVED, "max_steps": 2, "resume_from_checkpoint": "true"}
    train(arguments(fields, tmp_path / "run", **options))
    assert read_run(tmp_path / "run")["finished_steps"] == 2
    before = contents(tmp_path / "run")
    assert train(arguments(fields, tmp_path / "run", **options)) is None
    assert "this run has finished" in caplog.text
    assert contents(tmp_path / "run") == before


class StopAfterOneStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_the_record_tells_the_steps_that_were_done(fields, tmp_path):
    """Of a run that was stopped early, not those that it was to make."""
    train(arguments(fields, tmp_path / "run"), callbacks=[StopAfterOneStep()])
    assert read_run(tmp_path / "run")["finished_steps"] == 1


def test_a_data_set_is_known_by_its_rows(tmp_path):
    """Not by how many they are."""
    samples = [llava_sample(i, image=None) for i in range(5)]
    fingerprints = [data_fingerprint(Rows(part, tmp_path)) for part in (samples[:4], samples[:4], samples[1:])]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


class KillAtTheEnd(TrainerCallback):
    def on_train_end(self, *args, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 2}])
def test_killed_after_the_last_checkpoint(fields, tmp_path, length):
    """In the middle of an epoch or at its end: what is left to do is to save."""
    whole = train(arguments(fields, tmp_path / "whole", **length))
    with pytest.raises(KeyboardInterrupt):
        train(arguments(fields, tmp_path / "cut", **SAVED, **length), callbacks=[KillAtTheEnd()])
    resumed = train(arguments(fields, tmp_path / "cut", **SAVED, **length, resume_from_checkpoint="true"))
    assert resumed.state.global_step == whole.state.global_step
    assert losses(resumed) == losses(whole)
    for name, value in weights(whole.model).items():
        assert value.equal(weights(resumed.model)[name]), name
    assert (tmp_path / "cut" / "model.safetensors").exists()


def test_what_may_change_when_a_run_goes_on(fields, tmp_path):
    """Its folder and its data's, the division of a batch, logging; a checkpoint whose state is torn is passed over."""
    whole = train(arguments(fields, tmp_path / "whole", max_steps=4))
    with pytest.raises(KeyboardInterrupt):
        train(arguments(fields, tmp_path / "cut", **SAVED, max_steps=4), callbacks=[Interrupt(4)])
    shutil.move(tmp_path / "cut", tmp_path / "moved")
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    state = tmp_path / "moved" / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_checkpoint(tmp_path / "moved").endswith("checkpoint-2")
    divided = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3}
    data = {"data": str(tmp_path / "elsewhere" / "data.json"), "resume_from_checkpoint": "true"}
    resumed = train(arguments(fields, tmp_path / "moved", **{**SAVED, **divided}, **data, max_steps=4))
    assert [step["loss"] for step in losses(resumed)] == pytest.approx(
        [step["loss"] for step in losses(whole)], rel=1e-4
    )
    for name, value in weights(whole.model).items():
        np.testing.assert_allclose(weights(resumed.model)[name], value, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_without_optimizer_state(fields, tmp_path):
    options = {**SAVED, "save_only_model": True, "max_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        train(arguments(fields, tmp_path / "run", **options), callbacks=[Interrupt(3)])
    with pytest.raises(ValueError, match=r"checkpoint-2 has no optimizer state \(save_only_model\).*--checkpoint"):
        train(arguments(fields, tmp_path / "run", **options, resume_from_checkpoint="true"))
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        train(arguments(fields, tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9")))


def test_a_checkpoint_with_damaged_or_missing_files(fields, tmp_path):
    """They are named before the model is loaded."""
    with pytest.raises(KeyboardInterrupt):
        train(arguments(fields, tmp_path / "run", **SAVED, max_steps=3), callbacks=[Interrupt(3)])
    resumed = arguments(fields, tmp_path / "run", **SAVED, max_steps=3, resume_from_checkpoint="true")
    checkpoint = Path(last_checkpoint(tmp_path / "run"))
    for name in ("optimizer.pt", "model.safetensors", "rng_state.pth"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:100])
        with pytest.raises(ValueError, match=rf"{name}: it is damaged.*or delete that checkpoint"):
            train(resumed)
        (checkpoint / name).write_bytes(whole)
    (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"has no scheduler\.pt, so learning rates would begin anew"):
        train(resumed)
    with pytest.raises(ValueError, match="is a run's folder, its end: give true, or one of the checkpoints in it"):
        state = (checkpoint / "trainer_state.json").read_text()
        (tmp_path / "run" / "trainer_state.json").write_text(state)
        train(arguments(fields, tmp_path / "run", **SAVED, max_steps=3, resume_from_checkpoint=str(tmp_path / "run")))


@pytest.mark.parametrize("said", [5, {}, {"RunIdentity": 5}, {"RunIdentity": {"args": {"identity": [1]}}}])
def test_a_checkpoint_and_a_record_that_say_of_no_run(tmp_path, said):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": said}))
    with pytest.raises(ValueError, match="doesn't say which run wrote it"):
        check_checkpoint(checkpoint, {"seed": 1})
    for record in ({"identity": 5, "finished_steps": 1}, {}):
        write_run(tmp_path, record)
        assert not is_finished(tmp_path, {"seed": 1})
    (checkpoint / "trainer_state.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no complete checkpoint of a run"):
        check_checkpoint(checkpoint, {"seed": 1})


def test_two_runs_in_one_folder(tmp_path):
    """Another process's lock is seen, with who has it; a killed one leaves none."""
    code = "import sys, time\nfrom ola_vlm.training.run_record import run_lock\n"
    code += "with run_lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        holder = rf"another run trains in .* \(process {process.pid} on .*--output_dir"
        with pytest.raises(ValueError, match=holder), run_lock(tmp_path):
            pass
        process.kill()
    again = pytest.raises(ValueError, match="this process trains in it already")
    with run_lock(tmp_path), again, run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


def test_rows_are_split_by_image(tmp_path):
    """60 rows of 20 images: pairs of rows share one, some rows show two, some none."""
    samples = []
    for i in range(60):
        image = None if i % 6 == 0 else f"{i % 20}.png"
        if i % 15 == 7:
            image = [f"{i % 20}.png", f"{(i + 3) % 20}.png"]
        samples.append(llava_sample(i, image))
        if isinstance(image, list):
            samples[-1]["conversations"][0]["value"] = "<image><image> what ?"
    rows = load_rows(str(write_llava(tmp_path, samples, [f"{i}.png" for i in range(20)])))
    train_rows, eval_rows = rows.split_by_image(0.2, seed=0)
    sides = [{image for row in part for image in row["images"]} for part in (train_rows, eval_rows)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20
    assert len(train_rows) + len(eval_rows) == 60 and 8 <= len(eval_rows) <= 12
    again = rows.split_by_image(0.2, seed=0)[1]
    assert [row["id"] for row in again] == [row["id"] for row in eval_rows]
    assert [row["id"] for row in rows.split_by_image(0.2, seed=1)[1]] != [row["id"] for row in eval_rows]
    one = write_llava(tmp_path, [llava_sample(i, "0.png") for i in range(4)])
    with pytest.raises(ValueError, match="all 4 rows share images"):
        load_rows(str(one)).split_by_image(0.5, seed=0)


def write_questions(folder: Path) -> str:
    """Three with choices."""
    asked = []
    for i in range(3):
        question = {"question": f"what color ? (A) red ({i})", "image": "0.png", "choices": ["red"], "answer": "(A)"}
        asked.append(question)
    (folder / "questions.json").write_text(json.dumps(asked))
    return str(folder / "questions.json")


@pytest.fixture
def no_network(monkeypatch):
    """A connection to anywhere is an error."""

    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_trackio_has_losses_and_answers(fields, tmp_path, no_network):
    """Each log and each evaluation, the answers as a table; all on this machine."""
    pytest.importorskip("trackio", reason="pip install ola_vlm[track]")
    from trackio.sqlite_storage import SQLiteStorage

    options = {"eval_data": "0.25", "eval_questions": write_questions(tmp_path / "data"), "eval_strategy": "steps"}
    tracked = {"report_to": "trackio", "project": "ola-vlm-test", "run_name": tmp_path.name, "eval_steps": 1}
    train(arguments(fields, tmp_path / "run", **options, **tracked, max_steps=2))
    logs = SQLiteStorage.get_logs("ola-vlm-test", tmp_path.name)
    assert len([log for log in logs if "train/loss/ntp" in log]) == 2
    assert len([log for log in logs if "eval/loss/ntp" in log]) == 2
    tables = [log for log in logs if "eval/answers" in log]
    assert len(tables) == 2 and all(0 <= log["eval/accuracy"] <= 1 for log in tables)
    written = (tmp_path / "run" / "answers" / "step-2.jsonl").read_text().splitlines()
    rows = tables[-1]["eval/answers"]["_value"]
    for row, line in zip(rows, map(json.loads, written), strict=True):
        assert row == {"question": line["question"], "image": "0.png", "answer": "(A)", "output": line["output"]}


class Recorder:
    """Stands for a module or a writer: keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_other_trackers_get_the_table_too(monkeypatch):
    """W&B and TensorBoard, which aren't installed here: what they are called with."""
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    board = object.__new__(TensorBoardCallback)
    board.tb_writer = Recorder()
    trackers = [object.__new__(WandbCallback), board, Interrupt(1)]
    answered = [{"question": "what | is ?", "image": "a.png", "answer": "(A)", "output": "<b>"}]
    answered += [{**answered[0], "question": f"{number} ?"} for number in range(1, 60)]
    report_answers(trackers, answered, {"eval/accuracy": 0.5}, step=7)
    table, log = wandb.calls
    assert table[2]["columns"] == ["question", "image", "answer", "output"] and len(table[2]["data"]) == 50
    assert [row[0] for row in table[2]["data"][:2]] == ["what | is ?", "1 ?"]  # the first ones
    assert log[1][0]["eval/accuracy"] == 0.5 and log[1][0]["train/global_step"] == 7
    text, scalar = board.tb_writer.calls
    assert text[1][0] == "eval/answers" and text[1][2] == 7 and scalar[1] == ("eval/accuracy", 0.5, 7)
    assert text[1][1].splitlines()[2] == r"| what \| is ? | a.png | (A) | &lt;b&gt; |"


def test_only_the_best_checkpoint_is_saved(fields, tmp_path):
    """By evaluations, of which a share to evaluate on calls for one an epoch."""
    best = {"eval_data": "0.25", "save_strategy": "best", "load_best_model_at_end": True}
    args = arguments(fields, tmp_path / "run", **best)
    assert args.eval_strategy == "epoch"
    trainer = train(args)
    measured = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert len(measured) == 2
    assert trainer.state.best_global_step == min(measured, key=measured.get)


def test_evaluation_with_answers(fields, tmp_path):
    """On a share; its losses, and answers of all questions; the best checkpoint is what is saved."""
    options = {"eval_data": "0.25", "eval_questions": write_questions(tmp_path / "data")}
    best = {**SAVED, "load_best_model_at_end": True, "metric_for_best_model": "loss/ntp"}
    trainer = train(arguments(fields, tmp_path / "run", **options, **best))
    assert len(trainer.train_dataset) + len(trainer.eval_dataset) == 8 and len(trainer.eval_dataset) == 2
    measured = {log["step"]: log["eval_loss/ntp"] for log in trainer.state.log_history if "eval_loss/ntp" in log}
    assert sorted(measured) == [1, 2, 3]
    assert trainer.state.best_global_step == min(measured, key=measured.get)
    assert trainer.evaluate()["eval_loss/ntp"] == pytest.approx(min(measured.values()), rel=1e-5)
    assert any("eval_accuracy" in log for log in trainer.state.log_history)
    for step in measured:
        lines = (tmp_path / "run" / "answers" / f"step-{step}.jsonl").read_text().splitlines()
        assert [json.loads(line)["question"] for line in lines] == [f"what color ? (A) red ({i})" for i in range(3)]
        assert all("output" in json.loads(line) for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_strategy": "steps"}, "eval_strategy: there is nothing to evaluate on, give eval_data"),
        ({"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}, "load_best_model_at_end"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model.*give eval_data"),
        ({"eval_questions": "questions.json"}, r"no file questions\.json: give eval_questions"),
        ({"eval_data": "not/there.json"}, r"no file not/there\.json: give eval_data"),
        ({"eval_data": "1.5"}, r"eval_data 1\.5: a share"),
        ({"data": "me/a", "eval_data": "me/a"}, "eval_data me/a is the data of the run itself: name another split"),
        ({"data": "me/a", "eval_data": "me/a", "eval_split": "train"}, "eval_data me/a is the data of the run itself"),
        ({"data": "a.json", "eval_data": "a.json"}, r"a\.json is the data of the run itself: give other rows"),
        ({"data": "a.json", "eval_data": "a.json", "eval_split": "test"}, "eval_split is for data sets"),
        ({"eval_data": "0.5", "eval_split": "test"}, "eval_split is for data sets"),
        ({"eval_data": "0.5", "metric_for_best_model": "bleu"}, r"metric_for_best_model 'bleu' is unknown.*loss/ntp"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor must stay 0\.0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must stay false"),
        ({"tasks": [{"name": "depth", "layers": [9]}]}, r"tasks\[depth\]\.layers is \[9\]: choose from 1 to 4"),
        ({"tasks": [{"name": "depth"}] * 2}, "give each task its own name"),
        ({"model_overrides": {"resize_mode": "crop"}}, "resize_mode 'crop' is unknown"),
        ({"model_overrides": {"geomtry": "pad"}}, r"model_overrides has \['geomtry'\]"),
        ({"model_overrides": {"vision_feature_layer": "last"}}, "Field 'vision_feature_layer' with value 'last'"),
        ({"model_overrides": {"projector_hidden_act": "foo"}}, "projector_hidden_act 'foo' is unknown"),
        ({"model_overrides": {"chat_template": 5}}, "chat_template is 5: give a value of type str"),
        ({"model_overrides": {"dtype": "fp8"}}, "dtype 'fp8' is unknown"),
        ({"model_overrides": {"image_seq_length": 5}}, r"model_overrides has \['image_seq_length'\]"),
        ({"teachers": {"depth": 5}}, r"teachers\['depth'\] is 5: write it as"),
        ({"report_to": "wandbb"}, "report_to 'wandbb' is unknown: choose one of"),
        ({"lr_scheduler_kwargs": {"a": 1}}, r"lr_scheduler_kwargs \{'a': 1\} doesn't work"),
        ({"optim_args": "a"}, "optim_args 'a' doesn't work"),
        ({"optim": "lomo"}, "optim lomo doesn't work: You need to install `lomo_optim`"),
        ({"optim": "galore_adamw"}, "optim galore_adamw doesn't work: You need to install `galore_torch`"),
        ({"optim": "apollo_adamw_layerwise"}, "optim apollo_adamw_layerwise doesn't work: You need to install"),
        ({"optim": "grokadamw"}, "optim grokadamw doesn't work: Please install grokadamw"),
        ({"optim_args": {"a": 1}}, r"optim_args \{'a': 1\} doesn't work"),
        ({"use_liger_kernel": True}, "use_liger_kernel must stay false: its kernels take the place of the forward"),
        ({"fp16": True}, "fp16 needs a GPU: on a CPU take bf16"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must stay false: a run is known by the rows"),
        ({"log_level": "foo"}, "log_level 'foo' is unknown: choose one of .*'warning'"),
        ({"train_sampling_strategy": "foo"}, "train_sampling_strategy 'foo' is unknown: choose one of .*'sequential'"),
        ({"push_to_hub": True}, "push_to_hub: nobody is logged in, run `hf auth login`"),
        ({"model_overrides": {"chat_template": "{{ messages[0] }}"}}, "chat template must write <image> for an image"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"save_strategy": "best"}, "save_strategy best: there is nothing to evaluate on"),
        ({"eval_data": "0.5", "load_best_model_at_end": True}, "no checkpoint is saved that it could load"),
        ({"target_cache": __file__}, r"target_cache .*test_runs\.py is a file"),
        ({"model_overrides": {"vision_feature_layer": -7}}, "vision_feature_layer is -7: choose from -4 to 3"),
        ({"language_model": "nobody/nothing"}, "there is no folder nobody/nothing"),
        ({"vision_tower": "/not/there"}, "there is no folder /not/there"),
        ({"fusion": "sum", "teachers": {"a": {}}}, "fusion 'sum' is unknown"),
        ({"fusion": "token", "teachers": {"a": {"encoder": "clip", "path": "x"}}}, "for fusion an encoder of"),
        (
            {"checkpoint": "runs/nobody/pretrain", "vision_tower": None, "language_model": None},
            "no folder runs/nobody",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(fields, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forbid(monkeypatch, OlaVlmArguments, "load_rows")
    if "tasks" in changes:
        for task in changes["tasks"]:
            task.setdefault("layers", [1])
    with pytest.raises(ValueError, match=message):
        train(arguments(fields, tmp_path / "out", **changes))


def test_a_data_set_is_evaluated_on_the_split_that_is_named(tmp_path):
    """Its training rows aren't both; of another data set it is the only one that most have."""
    for folder, splits in (("two", ("train", "validation")), ("other", ("train",))):
        for split in splits:
            turns = [[{"from": "human", "value": "what"}, {"from": "gpt", "value": split}]] * 3
            rows = datasets.Dataset.from_dict(
                {"id": [f"{folder}-{split}-{i}" for i in range(3)], "conversations": turns}
            )
            (tmp_path / folder).mkdir(exist_ok=True)
            rows.to_parquet(str(tmp_path / folder / f"{split}-00000.parquet"))
    data = str(tmp_path / "two")

    def ids(**changes) -> list[list[str]]:
        args = OlaVlmArguments(output_dir=str(tmp_path / "out"), data=data, use_cpu=True, **changes)
        return [[row["id"] for row in rows] for rows in args.split_eval_rows(args.load_rows())]

    trained = [f"two-train-{i}" for i in range(3)]
    assert ids(eval_data=data, eval_split="validation") == [trained, [f"two-validation-{i}" for i in range(3)]]
    assert ids(eval_data=data, data_split="train[:2]", eval_split="train[2:]") == [trained[:2], trained[2:]]
    assert ids(eval_data=str(tmp_path / "other")) == [trained, [f"other-train-{i}" for i in range(3)]]


def test_a_max_length_without_room_for_an_image_is_refused_before_weights_are_read(fields, tmp_path, monkeypatch):
    """Rows tell whether there are images; text alone may be as short."""
    forbid(monkeypatch, train_module, "load_model")
    with pytest.raises(ValueError, match="max_length 19 has no room for an image, which with a word is 20 tokens"):
        train(arguments(fields, tmp_path / "out", max_length=19))


def test_answers_stop_where_training_ended_them(fields, tmp_path):
    """The template's end of turn is another token than the tokenizer's end of sequence."""
    overrides = {"chat_template": CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ unk_token }}")}
    train(arguments(fields, tmp_path / "out", max_steps=1, model_overrides=overrides))
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 3]


def test_only_the_process_that_pushes_needs_a_token(fields, tmp_path, monkeypatch):
    args = arguments(fields, tmp_path / "out", push_to_hub=True)
    monkeypatch.setattr(OlaVlmArguments, "process_index", 1)
    assert check_run(args) == []


@pytest.mark.parametrize(("optimizer", "module"), [("galore_adamw", "galore_torch"), ("lomo", "lomo_optim")])
def test_an_optimizer_that_is_made_for_a_model_at_hand(fields, tmp_path, monkeypatch, optimizer, module):
    """Its package is there (here a stand-in): what else it lacks is seen, the model alone is not missed."""
    monkeypatch.setitem(sys.modules, module, MagicMock())
    monkeypatch.setattr(trainer_optimizer, "is_galore_torch_available", lambda: True)
    monkeypatch.setattr(trainer_optimizer, "is_lomo_available", lambda: True)
    args = arguments(fields, tmp_path / "out", optim=optimizer)
    if optimizer == "galore_adamw":
        with pytest.raises(ValueError, match="You need to define `optim_target_modules`"):
            check_run(args)
        args.optim_target_modules = "all-linear"
    assert check_run(args) == []


def test_zero3_that_saves_no_model_is_refused(fields, tmp_path):
    """DeepSpeed itself isn't needed: what is read is its configuration."""
    args = arguments(fields, tmp_path / "out")
    for name in ("zero2.json", "zero3.json"):
        config = HfDeepSpeedConfig(str(RECIPES_FOLDER / "accelerate" / name))
        args.deepspeed_plugin = SimpleNamespace(hf_ds_config=config)
        assert check_run(args) == []
    field = "stage3_gather_16bit_weights_on_model_save"
    for value in ({}, {field: False}):
        config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3, **value}})
        args.deepspeed_plugin = SimpleNamespace(hf_ds_config=config)
        with pytest.raises(ValueError, match=f"deepspeed: ZeRO-3 without {field} saves shards.*: set it to true"):
            check_run(args)


@pytest.mark.parametrize("command", ["train", "targets", "check-data"])
def test_a_recipe_without_its_data_says_what_makes_it(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for name, maker in (("miniature_pretrain", "make miniature"), ("smollm2_pretrain", "make smollm2")):
        with pytest.raises(SystemExit, match=maker):
            cli.main([command, "--recipe", name])


def test_identity_of_an_earlier_version(fields, tmp_path, monkeypatch):
    """Fields that it called otherwise or didn't know yet, and folders by another path, make no other run."""
    teachers = {
        "depth": {"encoder": "depth_anything", "path": str(tmp_path / "data"), "resize_mode": "pad", "license": "mit"},
        "words": {"class": {"encoder": "class_words", "path": "x", "words": ["a"], "license": "mit"}},
    }
    args = arguments(fields, tmp_path / "run", teachers=teachers)
    ours = run_identity(args, args.load_rows())
    earlier = json.loads(json.dumps(ours))
    monkeypatch.chdir(tmp_path)
    depth = earlier["teachers"]["depth"]
    depth.update(geometry=depth.pop("resize_mode"), licence=depth.pop("license"), path="data/")
    del (
        earlier["teachers"]["words"]["class"]["license"],
        earlier["losses_until"],
        earlier["max_length"],
        earlier["stream_workers"],
    )
    earlier["vision_tower"] += "/"
    assert differences(earlier, ours) == differences(ours, earlier) == ""
    assert differences({**ours, "started_from": earlier}, {**ours, "started_from": ours}) == ""
    tasks = {name: {**ours, "tasks": [{"name": "depth", name: ["image"]}]} for name in ("keys", "attends_to")}
    assert differences(tasks["keys"], tasks["attends_to"]) == ""
    depth["geometry"] = "reference"
    assert "teachers" in differences(earlier, ours)
    assert differences({**ours, "max_length": 5}, ours).startswith("max_length 5 there, None here")


@pytest.mark.parametrize(
    ("part", "given", "message"),
    [
        ("language_model", "vision_tower", "is a clip_vision_model, which is no language model"),
        ("vision_tower", "language_model", "is a llama, which is no vision encoder"),
        ("language_model", "ola_vlm", "is a 'ola_vlm', which transformers doesn't have.*given as checkpoint"),
        ("vision_tower", "ola_vlm", "is a 'ola_vlm', which transformers doesn't have.*given as checkpoint"),
    ],
)
def test_parts_in_each_others_place_are_refused(fields, tmp_path, monkeypatch, part, given, message):
    """Nobody is asked whether a part's code may run."""
    forbid(monkeypatch, OlaVlmArguments, "load_rows")
    with pytest.raises(ValueError, match=f"{part} .*{message}"):
        train(arguments(fields, tmp_path / "out", **{part: str(WEIGHTS / given)}))
