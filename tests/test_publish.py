"""`ola-vlm push` to a Hub of this machine, and what others then load from it by name, without the package."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import table_rows
from hub_server import serve
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_remote_code import run_without_the_package
from training_helpers import llava_sample, write_llava

from ola_vlm.convert import model_card, push
from ola_vlm.eval.reading import parse_choice
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.recipes import miniature
from ola_vlm.train import train
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.run_record import moved

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "miniature/weights"
LOAD = """
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

saved, ours = torch.load(sys.argv[1]), {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained("me/x", **ours)
for repo, wrap in {"me/x": lambda m: m, "me/adapter": lambda m: PeftModel.from_pretrained(m, "me/adapter")}.items():
    model, processor = wrap(model).eval(), AutoProcessor.from_pretrained(repo, **ours)
    assert type(processor).__name__ == "OlaVlmProcessor"
    inputs = processor(text=["<image> what is this ?"], images=Image.new("RGB", (60, 20), "red"), return_tensors="pt")
    assert inputs["input_ids"].equal(saved["input_ids"])
    with torch.no_grad():
        assert model(**inputs).logits.equal(saved[repo])
print("the same")
"""


@pytest.fixture
def hub(monkeypatch, online):
    with serve() as server:
        monkeypatch.setattr(push, "HfApi", partial(HfApi, server.url, "hf_local"))
        yield server


@pytest.fixture(scope="module")
def runs(make_model, tmp_path_factory):
    """A fine-tuned checkpoint with the record of its two stages, and an adapter on it."""
    folder = tmp_path_factory.mktemp("runs")
    data = str(write_llava(folder, [llava_sample(i) for i in range(4)], ["a.png"]))
    fields = {"data": data, "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    model, processor = make_model()
    model.save_pretrained(folder / "pretrain")
    processor.save_pretrained(folder / "pretrain")
    teachers = {"depth": {"encoder": "depth_anything", "path": "org/depth", "license": "cc-by-nc-4.0"}}
    first = OlaVlmArguments(str(folder / "pretrain"), **fields).to_dict() | {"recipe": "llama3_vit_pretrain"}
    first |= {"teachers": teachers, "tasks": model.config.tasks, "language_model": "org/llm", "seed": 17}
    (folder / "pretrain" / "run.json").write_text(json.dumps(first | {"vision_tower": str(folder / "tower")}))
    for out, begin, more in [("finetune", "pretrain", {}), ("adapter", "finetune", {"lora_rank": 2})]:
        more |= {"stage": "finetune", "checkpoint": str(folder / begin), "save_strategy": "no", "learning_rate": 0.01}
        train(OlaVlmArguments(str(folder / out), **(fields | more)))
    statistics = folder / "finetune" / "target_statistics"
    statistics.mkdir()
    shutil.copy(WEIGHTS / "ola_vlm/target_statistics/gen.safetensors", statistics)
    return folder


def results(folder: Path) -> Path:
    run = {"benchmark": "cvbench", "variant": "official", "data": "nyu-visionx/CV-Bench"}
    scores = {"overall": {"score": 0.614, "standard_error": 0.0123, "n": 2638}}
    scores["task/Depth"] = {"score": 0.7, "standard_error": 0.02, "n": 600}
    (folder / "results.json").write_text(json.dumps({"run": run, "scores": scores}))
    return folder / "results.json"


@torch.no_grad()
def test_pushed_and_loaded_by_name(runs, hub, tmp_path, capsys):
    """A model, then an adapter on it; a fresh process without the package gets the same logits."""
    push.main([str(runs / "finetune"), "me/x", "--private", "--results", str(results(tmp_path))])
    out, repo = capsys.readouterr().out, hub.repos["me/x"]
    assert repo["private"] and f"{hub.url}/me/x: 13 files, revision {repo['sha']}" in out
    code = {f"{kind}_ola_vlm.py" for kind in ("configuration", "modeling", "processing")}
    more = {"README.md", "config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    more |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "target_statistics/gen.safetensors"}
    more.add(".eval_results/cvbench.yaml")
    assert set(repo["files"]) == code | more
    assert not [name for name, body in repo["files"].items() if str(runs).encode() in body]  # no path of this machine

    with pytest.raises(SystemExit, match="push that, then give its --base REPO"):
        push.main([str(runs / "adapter"), "me/adapter"])
    assert "me/adapter" not in hub.repos
    push.main([str(runs / "adapter"), "me/adapter", "--base", "me/x"])
    files = hub.repos["me/adapter"]["files"]
    assert not hub.repos["me/adapter"]["private"] and "model.safetensors" not in files
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "processing_ola_vlm.py"} <= set(files)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == ["me/x"] and card.data.library_name == "peft"

    model = OlaVlmForConditionalGeneration.from_pretrained(runs / "finetune")
    processor = OlaVlmProcessor.from_pretrained(runs / "finetune")
    image = Image.new("RGB", (60, 20), "red")
    inputs = processor(text=["<image> what is this ?"], images=image, return_tensors="pt")
    saved = {"input_ids": inputs["input_ids"], "me/x": model(**inputs).logits}
    saved["me/adapter"] = PeftModel.from_pretrained(model, runs / "adapter").eval()(**inputs).logits
    assert not saved["me/adapter"].equal(saved["me/x"])
    torch.save(saved, tmp_path / "saved.pt")
    assert run_without_the_package(LOAD, tmp_path, tmp_path / "saved.pt", hub=hub.url) == "the same"


def test_the_card_says_what_the_run_was(runs, tmp_path, capsys):
    push.main(
        [str(runs / "finetune"), "me/x", "--dry-run", "--license", "apache-2.0", "--results", str(results(tmp_path))]
    )
    text = capsys.readouterr().out
    assert "model.safetensors" in text.split("\n```\n")[-1]
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model == ["org/llm"] and "arxiv:2412.09585" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_value) == ("nyu-visionx/CV-Bench", 61.4)
    stages = {row["stage"]: row for row in table_rows(text) if "stage" in row}
    assert list(stages) == ["pretrain", "finetune"]
    recorded = {"pretrain": ("llama3_vit_pretrain", 5e-05, 17), "finetune": ("none", 0.01, 42)}
    for stage, (recipe, learning_rate, seed) in recorded.items():
        row = stages[stage]
        assert (row["recipe"], row["data"], row["steps"], row["batch"]) == (recipe, "`data.json`", "1", "2")
        assert (float(row["learning rate"]), int(row["seed"])) == (learning_rate, seed)
    (teacher,) = (row for row in table_rows(text) if row.get("task") == "depth")
    assert {"1, 3", "depth_anything", "`org/depth`", "cc-by-nc-4.0"} <= set(teacher.values())
    (scored,) = (row for row in table_rows(text) if "overall" in row.values())
    assert scored["questions"] == "2638" and re.findall(r"[\d.]+", scored["score"]) == ["61.4", "1.2"]
    limits = text.split("## Limits")[1]
    assert "Not for commercial use" in limits and "depth (cc-by-nc-4.0)" in limits
    assert "`tower`" in text and "`org/llm`" in text and "arXiv:2412.09585" in text
    assert 'pipeline("image-text-to-text", "me/x", trust_remote_code=True)' in text  # which is to be copied
    assert str(runs) not in text
    push.main([str(runs / "adapter"), "me/x", "--dry-run", "--base", "me/base"])
    text = capsys.readouterr().out
    stages = {row["stage"]: row for row in table_rows(text) if "stage" in row}
    assert "rank 2" in stages["finetune"]["trained"] and "rank" not in stages["pretrain"]["trained"]
    assert "No results were given." in text and 'from_pretrained("me/base"' in text


def test_the_card_tells_what_was_done_and_not_what_was_planned(tmp_path):
    """A run's steps, the batch of all its processes, and each stage's own fields, the first stage first."""
    fields = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 1.0}
    fields |= {"learning_rate": 0.001, "data": "org/data", "recipe": None, "lora_rank": 0}
    depth = {"depth": {"encoder": "depth_anything", "path": "org/first", "license": "mit"}}
    seg = {"seg": {"encoder": "oneformer", "path": "org/second", "license": "cc-by-nc-4.0"}}
    gen = {"gen": {"encoder": "clip_image", "path": "org/third"}}
    first = fields | {"stage": "pretrain", "seed": 1, "max_steps": 700, "language_model": "org/llm", "processes": 8}
    first |= {"teachers": depth | seg | gen, "tasks": [{"name": "depth"}], "data": "org/captions"}
    # It was given epochs, and stopped early.
    last = fields | {"stage": "finetune", "seed": 2, "max_steps": -1, "started_from": first, "processes": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (tmp_path / "run.json").write_text(json.dumps(last))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 345}))
    card = model_card.make_card(tmp_path, "me/x")
    rows = table_rows(str(card))
    stages = {row["stage"]: row for row in rows if "stage" in row}
    assert list(stages) == ["pretrain", "finetune"]
    counted = ("steps", "batch", "learning rate", "seed")
    assert [stages["pretrain"][name] for name in counted] == ["700", "48", "0.001", "1"]
    assert [stages["finetune"][name] for name in counted] == ["345", "24", "0.001", "2"]
    taught = {row["task"]: set(row.values()) for row in rows if "task" in row}
    assert {"`org/first`", "mit"} <= taught["depth"] and {"`org/second`", "cc-by-nc-4.0"} <= taught["seg"]
    assert card.data.base_model == ["org/llm"] and card.data.datasets == ["org/captions", "org/data"]
    # Whichever teacher it is that restricts the use, or says nothing of it; and fine-tuning came after the predictors.
    limits = str(card).split("## Limits")[1]
    assert "its teachers' licenses: seg (cc-by-nc-4.0)" in limits
    assert "A teacher's license was not recorded" in limits and "predictors are those of pre-training" in limits


def test_a_checkpoint_of_which_nothing_is_known(tmp_path, capsys):
    """The shipped LLaVA without its record, and a study's report as its results."""
    unknown = tmp_path / "unknown"
    shutil.copytree(WEIGHTS / "llava", unknown, ignore=shutil.ignore_patterns("run.json", "README.md"))
    seeds = [{"accuracy": {"count": 0.8, "average": 0.7}}, {"accuracy": {"count": 0.9, "average": 0.8}}]
    (tmp_path / "report.json").write_text(json.dumps({"methods": {"llava": {"seeds": seeds}}}))
    push.main([str(unknown), "me/x", "--dry-run", "--results", str(tmp_path)])
    text = capsys.readouterr().out
    assert "Not recorded: there was no run.json" in text and "taught to predict" not in text
    (row,) = (row for row in table_rows(text) if "llava" in row.values())
    assert row["training seeds"] == "2"
    assert [cell for cell in row.values() if "±" in cell] == ["85.0 ± 7.1", "75.0 ± 7.1"]


@pytest.mark.parametrize("method", miniature.METHODS)
def test_a_shipped_checkpoint_has_its_record_and_a_card_that_fits(method, capsys, monkeypatch):
    """Its runs are the recipe's, its paths the repository's own; its card's example is answered rightly."""
    monkeypatch.chdir(ROOT)
    record = json.loads((WEIGHTS / method / "run.json").read_text())
    stages = {"pretrain": record["started_from"], "finetune": record}
    for stage, run in stages.items():
        made = OlaVlmArguments(**getattr(miniature, stage)(method)).to_dict()
        for name in run["identity"].keys() & made.keys() - {"data", "teachers"}:
            made_elsewhere = json.loads(json.dumps(moved(made[name], {str(ROOT): ""})))
            assert run[name] == made_elsewhere, (stage, name)
        assert (run["recipe"], run["finished_steps"]) == (miniature.recipe_name(method, stage), run["max_steps"])
    text = (WEIGHTS / method / "README.md").read_text()
    for content in (json.dumps(record), text):
        assert not re.search(r'"(?:/|[A-Z]:)|/home/|/tmp/|/root/', content)
    push.main([f"miniature/weights/{method}", "me/x", "--dry-run", "--license", "apache-2.0"])
    card = capsys.readouterr().out
    assert "scene.png" in card.split("\n```\n")[-1].split()
    assert "world of rendered scenes" in text and "not recorded" not in text
    assert model_card.training_text(model_card.history(WEIGHTS / method), {"tasks": []})[:100] in text
    (usage,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(usage)
    assert parse_choice(capsys.readouterr().out, ["red object", "blue object"]) == "(A)"


@pytest.mark.parametrize(
    ("folder", "expected"), [("miniature/weights/llava", model_card.SCENE), ("", model_card.PHOTOGRAPH)]
)
def test_a_cards_example_asks_in_words_that_the_model_has(folder, expected, runs):
    assert model_card.example_of(ROOT / folder if folder else runs / "finetune") == expected


def test_wrong_input_is_refused_before_anything_is_sent(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(push, "HfApi", None)

    def refused(*arguments, match: str):
        with pytest.raises(SystemExit, match=match):
            push.main([*map(str, arguments)])

    shutil.copytree(runs / "finetune", tmp_path / "whole")
    refused(tmp_path / "nowhere", "me/x", match="nowhere is no folder")
    refused(tmp_path, "me/x", match=r"no config\.json and no adapter_config\.json")
    refused(runs / "finetune", "x", match="REPO is 'x': give owner/name")
    refused(runs / "finetune", "me/x", "--base", "me/y", match="--base is for adapters")
    refused(runs / "finetune", "me/x", "--results", tmp_path / "no.json", match=r"no\.json is not there")
    refused(runs / "finetune", "me/x", "--results", runs / "data.json", match=r"data\.json must hold an object")
    refused(runs / "finetune", "me/x", "--results", runs / "finetune/config.json", match="is neither results.json")
    for name in ("processor_config.json", "model.safetensors"):
        (tmp_path / "whole" / name).unlink()
    refused(tmp_path / "whole", "me/x", match=r"whole lacks model\.safetensors, processor_config\.json: save")
    shutil.copytree(runs / "finetune", tmp_path / "lacking")
    weights = load_file(tmp_path / "lacking" / "model.safetensors")
    del weights[next(name for name in weights if "layernorm" in name)]
    save_file(weights, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "lacking", "me/x", match="has no weights for OlaVlm.*layernorm.*: give a whole checkpoint")
    (tmp_path / "whole" / "config.json").write_text("{")
    refused(tmp_path / "whole", "me/x", match="is no JSON")


def test_what_was_a_path_in_training_is_no_repository(runs, tmp_path, monkeypatch):
    record = json.loads((runs / "finetune" / "run.json").read_text())
    assert record["local_paths"] == sorted([str(runs / "data.json"), str(runs / "pretrain")])
    shutil.copytree(runs / "finetune", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)  # where the relative paths of the training machine don't exist
    before = record["started_from"] | {"language_model": "org/llm", "vision_tower": "parts/tower"}
    record |= {"data": "data/rows", "local_paths": ["data/rows", "parts/tower"], "started_from": before}
    (tmp_path / "moved" / "run.json").write_text(json.dumps(record))
    card = model_card.make_card(tmp_path / "moved", "me/x")
    assert card.data.base_model == ["org/llm"] and card.data.datasets is None
    assert "vision tower `tower`" in card.text and "| `rows` |" in card.text
    before = {**before, "output_dir": "runs/first", "language_model": None, "vision_tower": None, "checkpoint": None}
    record |= {"checkpoint": "runs/first", "started_from": None, "output_dir": "runs/first"}
    (tmp_path / "moved" / "run.json").write_text(json.dumps(record))
    assert model_card.make_card(tmp_path / "moved", "me/x").data.base_model is None


def test_results_go_to_the_hubs_leaderboards(runs, tmp_path, hub, capsys):
    push.main([str(runs / "finetune"), "me/x", "--results", str(results(tmp_path))])
    (entry,) = yaml.safe_load(hub.repos["me/x"]["files"][".eval_results/cvbench.yaml"])
    assert entry["dataset"] == {"id": "nyu-visionx/CV-Bench", "task_id": "overall"} and entry["value"] == 61.4
    assert "standard error 1.2 over 2638 questions" in entry["notes"]
    record = json.loads((tmp_path / "results.json").read_text())
    record["run"] |= {"revision": "sha256:0", "data": "runs/cvbench"}  # of a local copy
    (tmp_path / "results.json").write_text(json.dumps(record))
    _, (entry,), files = model_card.evaluation([str(tmp_path)])
    assert files == {} and entry.dataset_type == "cvbench"
    # Its name would become a file's in the repository.
    for name in ("../../x", ".x", "a/b", ""):
        record["run"] |= {"revision": "main", "data": "nyu-visionx/CV-Bench", "benchmark": name}
        (tmp_path / "results.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=r"names a benchmark '.*', which `ola-vlm eval` doesn't have"):
            model_card.evaluation([str(tmp_path)])


def test_names_are_the_hubs_and_shards_the_checkpoints(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(push, "HfApi", None)
    for name in ("me/x--y", "me/x..y", "me/" + "x" * 97, "me/.x", "me/a/b"):
        with pytest.raises(SystemExit, match="ola-vlm push: "):
            push.main([str(runs / "finetune"), name])
    shutil.copytree(runs / "finetune", tmp_path / "stale")
    shutil.copy(runs / "finetune" / "model.safetensors", tmp_path / "stale" / "model-00001-of-00002.safetensors")
    with pytest.raises(SystemExit, match=r"has model-00001-of-00002\.safetensors of an earlier save.*delete"):
        push.main([str(tmp_path / "stale"), "me/x"])


def test_an_adapters_folder_has_our_card(runs):
    card = ModelCard((runs / "adapter" / "README.md").read_text())
    assert card.data.library_name == "peft" and "ola-vlm" in card.data.tags
    assert "adapters of rank 2" in card.text and str(runs) not in card.text


def test_an_unreachable_hub_is_said_so(runs, monkeypatch, online):
    monkeypatch.setattr(push, "HfApi", partial(HfApi, "http://127.0.0.1:9", "hf_local"))
    with pytest.raises(SystemExit, match=r"ola-vlm push: .*refused"):
        push.main([str(runs / "finetune"), "me/x"])


def test_code_that_was_not_saved_is_added(runs, tmp_path, caplog):
    """And the statistics of the stage before, without which the predictions can't be decoded."""
    shutil.copytree(runs / "finetune", tmp_path / "whole")
    (tmp_path / "before").mkdir()
    (tmp_path / "whole" / "target_statistics").rename(tmp_path / "before" / "target_statistics")
    run = json.loads((tmp_path / "whole" / "run.json").read_text()) | {"checkpoint": str(tmp_path / "before")}
    (tmp_path / "whole" / "run.json").write_text(json.dumps(run))
    for path in (tmp_path / "whole").glob("*.py"):
        path.unlink()
    files = push.find_files(tmp_path / "whole")
    assert all(files[f"{kind}_ola_vlm.py"].is_file() for kind in ("configuration", "modeling"))
    statistics = tmp_path / "before" / "target_statistics"
    assert not any("statistics" in name for name in files)  # run.json doesn't choose what is published
    assert f"give --statistics {statistics}" in caplog.text
    # Their own folder is given, or that of the stage, whose weights are none.
    (tmp_path / "before" / "model.safetensors").write_bytes((runs / "finetune" / "model.safetensors").read_bytes())
    for given in (statistics, tmp_path / "before"):
        files = push.find_files(tmp_path / "whole", given)
        assert files["target_statistics/gen.safetensors"].is_relative_to(statistics)
        assert "target_statistics/model.safetensors" not in files


def test_statistics_that_are_none(runs, tmp_path):
    """A folder that isn't there, one of weights alone, and an adapter, which has none."""
    shutil.copytree(runs / "finetune", tmp_path / "whole")
    (tmp_path / "weights").mkdir()
    shutil.copy(runs / "finetune" / "model.safetensors", tmp_path / "weights")
    with pytest.raises(ValueError, match="nowhere has no statistics of targets: give a stage's target_statistics/"):
        push.find_files(tmp_path / "whole", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"model\.safetensors has no statistics of targets, a mean and a std, but "):
        push.find_files(tmp_path / "whole", tmp_path / "weights")
    with pytest.raises(ValueError, match="--statistics is for whole models, and CHECKPOINT is an adapter"):
        push.find_files(runs / "adapter", tmp_path / "weights")
