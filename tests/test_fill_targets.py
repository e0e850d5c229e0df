"""`ola-vlm targets` in two processes, and what it refuses. (Parts by --shard: test_train.)"""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
from conftest import random_image, tiny_tasks
from safetensors import safe_open
from tiny_teachers import save_clip_image

from ola_vlm import cli
from ola_vlm.commands.targets import shard
from ola_vlm.recipes import RECIPES
from ola_vlm.targets.fill import make_teachers, open_caches
from ola_vlm.training.preflight import tasks_of_teachers


@pytest.fixture
def fields(tmp_path):
    """Fields of a run on 9 images with one teacher."""
    samples = []
    for i in range(9):
        random_image(i).save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\na ?"}, {"from": "gpt", "value": "b"}]
        samples.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(samples))
    save_clip_image(tmp_path / "gen")
    return {
        "data": str(tmp_path / "data.json"),
        "tasks": json.dumps(tiny_tasks()[:1]),
        "teachers": json.dumps({"gen": {"encoder": "clip_image", "path": str(tmp_path / "gen")}}),
        "target_cache": str(tmp_path / "targets"),
        "output_dir": str(tmp_path / "run"),
        "use_cpu": "true",
    }


def argv(fields: dict) -> list[str]:
    return ["targets", *(f"--{name}={value}" for name, value in fields.items())]


@pytest.mark.slow
def test_two_processes_do_a_part_each(fields):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [*command, "-m", "ola_vlm.cli", *argv(fields | {"target_storage": "int8"})]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("gen: 9 images, ") and "1 - cosine" in done.stderr
    teachers = make_teachers(json.loads(fields["tasks"]), json.loads(fields["teachers"]))
    (cache,) = open_caches(fields["target_cache"], teachers, "int8").values()
    headers = [safe_open(path, "pt").metadata() for path in cache.folder.glob("*.safetensors")]
    assert len(cache) == 9 and sorted(len(json.loads(header["rows"])) for header in headers) == [4, 5]


SLOW = """
import sys, time
from datetime import timedelta
from torch import distributed
from ola_vlm import cli
from ola_vlm.training import targets

def slow(*args, fill=targets.fill):
    distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), distributed.group.WORLD)
    time.sleep(3 * distributed.get_rank())
    return fill(*args)

targets.fill = slow
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_the_slowest_process_is_waited_for_before_all_stop(fields, tmp_path):
    """Longer than a collective may take; also by one that has met an image without a target."""
    order = np.random.default_rng(0).permutation(9)
    (tmp_path / f"{order[0]}.png").write_bytes(b"no picture")  # the first process's
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [*command, str(tmp_path / "slow.py"), *argv(fields)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode != 0 and f"{order[0]}.png: UnidentifiedImageError" in done.stderr, done.stderr[-4000:]
    teachers = make_teachers(json.loads(fields["tasks"]), json.loads(fields["teachers"]))
    (cache,) = open_caches(fields["target_cache"], teachers).values()
    assert len(cache) == 8


def test_images_in_a_dataset_are_cached_by_what_they_show(fields, tmp_path, capsys):
    """The same pictures in a parquet file need no teacher any more; of a damaged one the row is dropped."""
    cli.main(argv(fields))
    files = [{"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None} for i in range(9)]
    files.append({"bytes": files[0]["bytes"][:50], "path": None})
    samples = [json.loads((tmp_path / "data.json").read_text())[0] | {"image": file} for file in files]
    features = datasets.Features.from_dict(
        {**datasets.Dataset.from_list(samples).features.to_dict(), "image": {"_type": "Image"}}
    )
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list(samples, features=features).to_parquet(tmp_path / "rows" / "train.parquet")
    (tmp_path / "gen" / "model.safetensors").rename(tmp_path / "moved.safetensors")
    of_dataset = fields | {"data": str(tmp_path / "rows")}
    with pytest.raises(SystemExit, match=r"1 images have no target.* 1 of row 0: OSError"):
        cli.main(argv(of_dataset))
    capsys.readouterr()
    cli.main(argv(of_dataset | {"on_bad_rows": "drop"}))
    assert capsys.readouterr().out.startswith("gen: 9 images, ")
    with pytest.raises(SystemExit, match=r"no target cache.*leave out target_cache"):
        cli.main(argv(of_dataset | {"streaming": "true", "max_steps": 1}))


def test_refusals(fields, tmp_path):
    with pytest.raises(SystemExit, match="nothing to fill"):
        cli.main(argv({name: value for name, value in fields.items() if name != "target_cache"}))
    with pytest.raises(SystemExit, match="nothing to fill"):
        cli.main(["targets", "--recipe", "miniature_finetune"])
    for wrong in ("0/2", "3/2", "half"):
        with pytest.raises(SystemExit):
            cli.main([*argv(fields), "--shard", wrong])
    with pytest.raises(SystemExit, match=r"field --shards: did you mean --shard\? `ola-vlm targets --help` lists"):
        cli.main([*argv(fields), "--shards=1/2"])
    with pytest.raises(SystemExit, match="no target_storage 'int4': did you mean int8"):
        cli.main(argv(fields | {"target_storage": "int4"}))
    (tmp_path / "4.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"1 images have no target.*4\.png: UnidentifiedImageError"):
        cli.main(argv(fields))
    (tmp_path / "4.png").unlink()
    with pytest.raises(SystemExit, match=r"bad rows: image missing \(1\); .*4\.png"):
        cli.main(argv(fields))
    cli.main(argv(fields | {"on_bad_rows": "drop"}))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"name": "dino", "layers": [8]}], r"tasks\[dino\]\.target_length is None: give an integer of at least 1"),
        ([{"layers": [8]}], r"tasks\[\]\.name is None: give each task an identifier"),
        (["depth"], r"tasks\[\] is 'depth': give each task as a dict"),
        ([{"name": "gen", "laiers": [8]}], r"tasks\[gen\] is \['laiers'\]: unknown fields"),
        ([{"name": "gen"}] * 2, "give each task its own name"),
    ],
)
@pytest.mark.parametrize("command", ["targets", "probe x --images x --out x"])
def test_tasks_that_cannot_be_are_named(fields, tmp_path, command, tasks, message):
    """By commands that know no language model."""
    (tmp_path / "x.png").touch()
    teachers = json.dumps({"dino": {"encoder": "vision", "path": "x"}})
    given = argv(fields | {"tasks": json.dumps(tasks), "teachers": teachers})[1:]
    with pytest.raises(SystemExit, match=message) as stopped:
        cli.main([*command.split(), *given])
    assert "\n" not in str(stopped.value)


def test_tasks_whose_language_model_is_not_known():
    """All recipes', and those that leave out what predicts the targets."""
    for recipe in RECIPES.values():
        tasks = recipe().get("tasks") or []
        assert [task["name"] for task in tasks_of_teachers(tasks)] == [task["name"] for task in tasks]
    shape = {"target_length": 49, "target_dim": 384}
    for fields in ({}, {"predictor": "patch"}, {"predictor": "none", "place_code": 8}):
        task = {"name": "dino", **shape, **fields}
        assert tasks_of_teachers([task]) == [task]
    words = {"name": "words", "target": "words", "predictor": "none", "target_length": 49}
    assert tasks_of_teachers([words]) == [words]
    (depth,) = tasks_of_teachers([{"name": "depth", "predictor": "patch"}])
    assert depth["target_length"] == 576


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["targets", "--help"])
    out = capsys.readouterr().out
    assert "usage: ola-vlm targets" in out and "--shard i/n" in out and "--target_storage" in out


def test_parts_of_the_images_cover_each_exactly_once():
    images = list(range(23))
    for total in (1, 4, 23):
        parts = [images[shard(f"{number}/{total}")] for number in range(1, total + 1)]
        assert sorted(image for part in parts for image in part) == images
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
