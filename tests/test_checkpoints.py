"""One loader for all commands: what it takes, and the one line in which it refuses what isn't whole."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import encode, random_image, random_rows, tiny_tasks
from hub_server import serve
from huggingface_hub import HfApi, constants
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES
from training_helpers import llava_sample, write_llava
from transformers import LlavaForConditionalGeneration

from ola_vlm import cli
from ola_vlm.convert import model_card
from ola_vlm.convert.export import export_llava, export_processor
from ola_vlm.convert.merge import merge
from ola_vlm.inference.checkpoints import adapter_base, load_checkpoint, read_checkpoint, weights_state
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.probing.probes import load_probes
from ola_vlm.recipes import RECIPES
from ola_vlm.targets.loading import explain, load_whole, loading_from
from ola_vlm.training.attach import AttachedPredictors, PredictorFields, attach_predictors

WEIGHTS = Path(__file__).parents[1] / "miniature" / "weights"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "ours"
    for part in make_model():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoint) -> tuple[Path, torch.Tensor]:
    """Of blocks, projector and task tokens, with what it computes."""
    model, processor = read_checkpoint(checkpoint)
    lora = LoraConfig(
        r=2,
        task_type="CAUSAL_LM",
        target_modules=r".*language_model.*\.(q|k|v|o)_proj",
        modules_to_save=["linear_1", "linear_2"],
        trainable_token_indices=model.config.task_token_ids,
    )
    wrapped = get_peft_model(model, lora)
    torch.manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = checkpoint.parent / "adapter"
    wrapped.save_pretrained(folder)
    with torch.no_grad():
        return folder, wrapped.eval()(**encode(processor, random_rows(2))).logits


def change_json(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "norm.weight" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def shard(folder: Path) -> list[Path]:
    model = OlaVlmForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("model-*.safetensors"))


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def to_bin(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


DAMAGES = {
    "pointer": (
        lambda folder: (folder / "model.safetensors").write_text(LFS),
        r"model\.safetensors is a Git LFS pointer.*`git lfs pull`",
    ),
    "cut": (lambda folder: cut(folder / "model.safetensors"), r"model\.safetensors: it is damaged or half fetched"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors: .*half fetched"),
    "shard gone": (lambda folder: shard(folder)[1].unlink(), r"lacks model-00002-of-\d+\.safetensors, which"),
    "shard pointer": (
        lambda folder: shard(folder)[1].write_text(LFS),
        r"model-00002-of-\d+\.safetensors is a Git",
    ),
    "weights lacking": (drop_weight, r"has no weights for OlaVlm\w+'s .*norm\.weight"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no file named model\.safetensors"),
    "bin pointer": (lambda folder: to_bin(folder).write_text(LFS), r"pytorch_model\.bin is a Git LFS pointer"),
    "bin cut": (lambda folder: cut(to_bin(folder)), r"pytorch_model\.bin: it is damaged"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text(LFS), r"tokenizer\.json is a Git LFS pointer"),
    "no tokenizer's file": (
        lambda folder: change_json(folder / "tokenizer.json", model={"type": "of a later version"}),
        r"has a tokenizer\.json that can't be read \(.*fetch it again, or update tokenizers",
    ),
    "special tokens": (
        lambda folder: (folder / "special_tokens_map.json").write_text(LFS),
        r"special_tokens_map\.json is a Git LFS pointer",
    ),
    "a number for a token": (
        lambda folder: change_json(folder / "tokenizer_config.json", eos_token=5),
        r"has a setting that can't be used, TypeError: Special token eos_token has to be",
    ),
    "a number for a configuration": (
        lambda folder: change_json(folder / "config.json", vision_config=5),
        r"has a setting that can't be used, .*'vision_config'",
    ),
    "a number for code": (lambda folder: change_json(folder / "config.json", auto_map=5), r"auto_map is 5: give"),
    "a list for a dtype": (
        lambda folder: change_json(folder / "config.json", dtype=["x"]),
        r"has a setting that can't be used, IndexError",
    ),
    "a negative size": (
        lambda folder: change_json(
            folder / "config.json",
            text_config=json.loads((folder / "config.json").read_text())["text_config"] | {"intermediate_size": -1},
        ),
        r"has a setting that can't be used, RuntimeError: .*negative dimension",
    ),
    "a number for task tokens": (
        lambda folder: change_json(folder / "processor_config.json", task_tokens=5),
        r"task_tokens is 5: give the names of tokens",
    ),
    "a list for a type": (lambda folder: change_json(folder / "config.json", model_type=["x"]), r"it must be a name"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: it is damaged"),
    "deeply nested": (
        lambda folder: (folder / "config.json").write_text("[" * 50_000),
        r"config\.json: it is damaged",
    ),
    "a pipe": (
        lambda folder: [(folder / "config.json").unlink(), os.mkfifo(folder / "config.json")],
        r"config\.json is no file",
    ),
    "index": (
        lambda folder: [shard(folder), change_json(folder / "model.safetensors.index.json", weight_map={"a": "../a"})],
        r"names \.\./a, which is not in its folder",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_what_is_not_whole_is_refused_in_one_line(checkpoint, tmp_path, damage):
    change, message = DAMAGES[damage]
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value) and "://" not in str(error.value)


@pytest.fixture
def commands(tmp_path, tiny_parts):
    """Function (checkpoint) -> each command's arguments for it."""
    random_image(0).save(tmp_path / "a.png")
    data = str(write_llava(tmp_path, [llava_sample(0)], ["a.png"]))
    image, out = str(tmp_path / "a.png"), str(tmp_path / "out")
    training = ["--data", data, "--image_folder", str(tmp_path), "--use_cpu", "true", "--output_dir", out]

    def make(checkpoint: str) -> dict[str, list[str]]:
        return {
            "chat": [checkpoint, image, "what"],
            "eval": [checkpoint, "--benchmark", "miniature", "--data", str(tmp_path), "--out", out],
            "probe": [checkpoint, "--images", str(tmp_path), "--out", out],
            "visualize": [checkpoint, image, "--recipe", "miniature_pretrain", "--out", out],
            "export": [checkpoint, out],
            "merge": [checkpoint, out],
            "train": ["--stage", "finetune", "--checkpoint", checkpoint, *training],
            "check-data": ["--checkpoint", checkpoint, *training[:4]],
        }

    return make


@pytest.mark.parametrize("command", ["chat", "visualize", "export", "merge", "train", "check-data"])
def test_each_command_says_so_in_one_line(commands, tmp_path, command, checkpoint, adapter):
    """A folder that isn't there, a name that nobody can look up, and a pointer."""
    shutil.copytree(checkpoint, tmp_path / "pointer")
    (tmp_path / "pointer" / "model.safetensors").write_text(LFS)
    pointer, file = str(tmp_path / "pointer"), r"model\.safetensors"
    if command == "merge":
        shutil.copytree(adapter[0], tmp_path / "adapter")
        (tmp_path / "adapter" / "adapter_model.safetensors").write_text(LFS)
        pointer, file = str(tmp_path / "adapter"), r"adapter_model\.safetensors"
    cases = {
        str(tmp_path / "nowhere"): r"there is no folder .*nowhere",
        "nobody/nothing": r"there is no folder nobody/nothing here, and the Hub can't be reached",
        pointer: rf"{file} is a Git LFS pointer.*`git lfs pull`",
    }
    if command == "check-data":  # which reads no weights
        del cases[pointer]
    for place, message in cases.items():
        with pytest.raises((SystemExit, ValueError), match=message) as error:
            cli.main([command, *commands(place)[command]])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chat", "PICTURE"], "PICTURE is a file, no checkpoint: CHECKPOINT comes first"),
        (["chat", "PICTURE", "FOLDER", "what?"], "PICTURE is a file, no checkpoint: CHECKPOINT comes first"),
        (["visualize", "PICTURE", "FOLDER"], "PICTURE is a file, no checkpoint: CHECKPOINT comes first"),
        (["export", "PICTURE", "OUT"], "PICTURE is a file, no checkpoint"),
        (["merge", "PICTURE", "OUT"], "PICTURE is a file, no checkpoint"),
        (["eval", "PICTURE", "--benchmark", "mmstar", "--out", "OUT"], "PICTURE is a file, no checkpoint"),
        # Where it isn't the first argument.
        (["train", "--checkpoint", "PICTURE", "--data", "DATA"], "PICTURE is a file: give a folder, or a name on the"),
        (["visualize", "FOLDER", "FOLDER"], "FOLDER is a folder, no image"),
        (["chat", "FOLDER", "OUT/gone.png"], "chat: there is no file OUT/gone.png"),
        (["visualize", "FOLDER", "OUT/gone.png"], "visualize: there is no file OUT/gone.png"),
    ],
)
def test_files_and_folders_in_each_others_place(argv, message, tmp_path):
    places = {
        "PICTURE": tmp_path / "scene.png",
        "FOLDER": tmp_path / "folder",
        "OUT": tmp_path / "out",
        "DATA": tmp_path / "data.json",
    }
    Image.new("RGB", (8, 8)).save(places["PICTURE"])
    places["FOLDER"].mkdir()
    places["DATA"].write_text("[]")
    for word, place in places.items():
        argv = [one.replace(word, str(place)) for one in argv]
        message = message.replace(word, str(place))
    # A chat takes its arguments alone; a run writes somewhere.
    if argv[0] == "train":
        argv += ["--stage", "finetune", "--output_dir", str(places["OUT"])]
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert message in stopped.value.code and "\n" not in stopped.value.code


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--recipe", "miniature_finetune"],
            "miniature_finetune goes on from runs/miniature/ola_vlm/seed0/pretrain, which isn't there yet: train it "
            "first (`ola-vlm train --recipe miniature_pretrain`), or give --checkpoint",
        ),
        (
            ["--recipe", "llama3_vit_finetune", "--data", "DATA"],
            "goes on from runs/llama3_vit/pretrain, which isn't there yet: train it first (`ola-vlm train --recipe "
            "llama3_vit_pretrain`)",
        ),
        # What is given is the user's own.
        (["--recipe", "miniature_finetune", "--checkpoint", "/nowhere/at/all"], "there is no folder /nowhere/at/all"),
    ],
)
def test_a_recipe_that_goes_on_from_a_run_names_that_one(argv, message, tmp_path, monkeypatch):
    # Neither data nor runs of the folder that the tests were started from.
    monkeypatch.chdir(tmp_path)
    Path("runs/miniature/data").mkdir(parents=True)
    data = Path(RECIPES["miniature_finetune"].fields["data"])
    data.write_text("[]")
    argv = [one.replace("DATA", str(data)) for one in argv]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *argv, "--use_cpu", "--bf16", "false"])
    assert message in stopped.value.code


def test_a_model_that_nobody_knows(checkpoint, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(checkpoint, folder)
    change_json(folder / "config.json", model_type="new_vlm")
    with pytest.raises(ValueError, match=r"code comes with the checkpoint: read that code.*--trust_remote_code"):
        load_checkpoint(folder)
    change_json(folder / "config.json", auto_map={})
    with pytest.raises(ValueError, match="'new_vlm', which this version of transformers doesn't know"):
        load_checkpoint(folder)
    change_json(folder / "config.json", model_type="llava_llama")
    with pytest.raises(ValueError, match=r"of the reference implementation .*convert it first"):
        load_checkpoint(folder)
    (folder / "processor_config.json").unlink()
    change_json(folder / "config.json", model_type="ola_vlm")
    with pytest.raises(ValueError, match="has no processor"):
        load_checkpoint(folder)
    assert read_checkpoint(folder)[1] is None


@torch.no_grad()
def test_a_plain_llava(checkpoint, tmp_path):
    model, processor = load_checkpoint(checkpoint)
    export_llava(model).save_pretrained(tmp_path)
    export_processor(processor).save_pretrained(tmp_path)
    plain, plain_processor = load_checkpoint(tmp_path)
    assert type(plain) is LlavaForConditionalGeneration
    ours, _ = read_checkpoint(tmp_path, llava_as_ours=True)
    assert type(ours) is OlaVlmForConditionalGeneration and ours.config.tasks == []
    batch = encode(plain_processor, random_rows(2))
    assert plain(**batch).logits.equal(ours(**batch).logits)


@torch.no_grad()
def test_a_model_with_attached_predictors(tmp_path):
    torch.manual_seed(0)
    model, processor = next(iter(FAMILIES.values()))()
    attach_predictors(model, tiny_tasks(), processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load_checkpoint(tmp_path)
    assert isinstance(loaded, AttachedPredictors)
    assert all(value.equal(loaded.state_dict()[name]) for name, value in model.state_dict().items())
    weights = load_file(tmp_path / "predictors.safetensors")
    save_file(dict(list(weights.items())[1:]), tmp_path / "predictors.safetensors")
    with pytest.raises(ValueError, match=r"predictors\.safetensors doesn't fit to the tasks.*Missing key"):
        load_checkpoint(tmp_path)
    (tmp_path / "predictors.safetensors").write_text(LFS)
    with pytest.raises(ValueError, match=r"predictors\.safetensors is a Git LFS pointer"):
        load_checkpoint(tmp_path)


@torch.no_grad()
def test_an_adapter_is_a_model_everywhere(checkpoint, adapter, commands, tmp_path, capsys):
    folder, expected = adapter
    assert adapter_base(folder) == str(checkpoint) and adapter_base(checkpoint) is None
    model, processor = load_checkpoint(folder)  # the base model's processor: the adapter's folder has none
    batch = encode(processor, random_rows(2))
    assert type(model) is OlaVlmForConditionalGeneration
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert not load_checkpoint(checkpoint)[0](**batch).logits.allclose(expected, atol=0.1)

    (folder / "run.json").write_text('{"stage": "finetune"}')
    cli.main(["merge", str(folder), str(tmp_path / "merged")])
    merged, info = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.eval()(**batch).logits.equal(model(**batch).logits)
    assert (tmp_path / "merged" / "run.json").read_text() == '{"stage": "finetune"}'
    with pytest.raises(SystemExit, match="is not empty: choose another OUT"):
        cli.main(["merge", str(folder), str(tmp_path / "merged")])
    with pytest.raises(SystemExit, match="it is no adapter"):
        cli.main(["merge", str(checkpoint), str(tmp_path / "other")])

    cli.main(["export", str(folder), str(tmp_path / "plain")])
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain").eval()
    assert plain(**batch).logits.equal(model(**batch).logits)
    capsys.readouterr()
    cli.main(["chat", *commands(str(folder))["chat"]])
    asked = capsys.readouterr().out
    cli.main(["chat", *commands(str(tmp_path / "merged"))["chat"]])
    assert capsys.readouterr().out == asked


def test_a_merge_takes_the_statistics_of_the_adapters_own_folder_alone(adapter, tmp_path, caplog):
    """What lies in OUT is published later: neither run.json nor a link may choose it."""
    own, private = tmp_path / "adapter", tmp_path / "private" / "target_statistics"
    shutil.copytree(adapter[0], own)
    shutil.copytree(WEIGHTS / "ola_vlm" / "target_statistics", private)
    (own / "run.json").write_text(json.dumps({"checkpoint": str(private.parent)}))
    merge(own, tmp_path / "named")
    assert not (tmp_path / "named" / "target_statistics").exists()
    assert f"which run.json says are in {private}" in caplog.text
    (own / "target_statistics").symlink_to(private)
    with pytest.raises(ValueError, match="lies outside"):
        merge(own, tmp_path / "linked")
    (own / "target_statistics").unlink()
    shutil.copytree(private, own / "target_statistics")
    merge(own, tmp_path / "copied")
    names = {file.name for file in private.iterdir()}
    assert {file.name for file in (tmp_path / "copied" / "target_statistics").iterdir()} == names


def test_a_merge_of_an_adapter_on_a_local_model_takes_that_ones_statistics(checkpoint, adapter, tmp_path, caplog):
    """The predictors are the base model's, and all of its weights are merged: its folder is trusted as far."""
    base, own = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(checkpoint, base)
    shutil.copytree(adapter[0], own)
    shutil.copytree(WEIGHTS / "ola_vlm" / "target_statistics", base / "target_statistics")
    change_json(own / "adapter_config.json", base_model_name_or_path=str(base))
    (own / "run.json").write_text(json.dumps({"checkpoint": str(base)}))
    merge(own, tmp_path / "merged")
    names = {file.name for file in (base / "target_statistics").iterdir()}
    assert {file.name for file in (tmp_path / "merged" / "target_statistics").iterdir()} == names
    assert "statistics" not in caplog.text
    # But not what a link in it leads to.
    (base / "target_statistics").rename(tmp_path / "private")
    (base / "target_statistics").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="lies outside"):
        merge(own, tmp_path / "linked")
    # What lies elsewhere is named, with the command that adds it.
    (base / "target_statistics").unlink()
    shutil.copytree(tmp_path / "private", tmp_path / "elsewhere" / "target_statistics")
    (own / "run.json").write_text(json.dumps({"checkpoint": str(tmp_path / "elsewhere")}))
    merge(own, tmp_path / "told")
    assert (
        f"cp -r {tmp_path / 'elsewhere' / 'target_statistics'} {tmp_path / 'told' / 'target_statistics'}"
        in caplog.text
    )


@pytest.mark.parametrize("place", ["adapter", "adapter/checkpoint-40"])
def test_a_merged_checkpoints_card_has_the_steps_that_were_made(adapter, tmp_path, place):
    """run.json as a run by epochs leaves it: only the trainer's state has its steps, and that stays behind."""
    folder = tmp_path / place
    shutil.copytree(adapter[0], folder, ignore=shutil.ignore_patterns("run.json"))
    record = {"stage": "finetune", "recipe": "lora", "data": "rows.json", "max_steps": -1, "num_train_epochs": 1.0}
    record |= {"min_steps": 100, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    record |= {"learning_rate": 0.001, "seed": 0, "finished_steps": None}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(record))
    (folder / "trainer_state.json").write_text('{"global_step": 40}')
    merge(folder, tmp_path / "merged")
    (run,) = model_card.history(tmp_path / "merged")
    assert model_card.training_row(run, set())[3] == "40"
    # A finished run's record has them, of whichever stage.
    assert model_card.training_row(record, set())[3] == "1 epoch, at least 100 steps"
    finished = {**record, "finished_steps": 100}
    (tmp_path / "merged" / "run.json").write_text(json.dumps({**finished, "started_from": finished}))
    runs = model_card.history(tmp_path / "merged")
    assert [model_card.training_row(run, set())[3] for run in runs] == ["100", "100"]


def test_an_adapters_state_is_its_own_and_its_base_models(checkpoint, adapter, tmp_path):
    folder, _ = adapter
    shutil.copytree(checkpoint, tmp_path / "base")
    shutil.copytree(folder, tmp_path / "adapter")
    change_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    before = weights_state(tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").touch()
    touched = weights_state(tmp_path / "adapter")
    assert touched != before
    # Another prompt gives other answers.
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    prompted = weights_state(tmp_path / "adapter")
    assert prompted != touched
    # A log changes no answer, a vocabulary does.
    (tmp_path / "base" / "log.txt").write_text("step 1")
    assert weights_state(tmp_path / "adapter") == prompted
    (tmp_path / "base" / "merges.txt").write_text("a b")
    assert weights_state(tmp_path / "adapter") != prompted


def test_adapters_that_are_not_whole(checkpoint, adapter, tmp_path):
    folder, _ = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    lora = [name for name in weights if "lora_A" in name]
    without = {name: value for name, value in weights.items() if name != lora[0]}

    def as_bin(at: Path, content: dict) -> None:
        """As older versions of peft write it."""
        (at / "adapter_model.safetensors").unlink()
        torch.save(content, at / "adapter_model.bin")

    cases = {
        "less": (lambda at: save_file(without, at / "adapter_model.safetensors"), f"no weights for {lora[0]}"),
        "none": (lambda at: (at / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
        "less, as .bin": (lambda at: as_bin(at, without), f"no weights for {lora[0]}"),
        "more, as .bin": (
            lambda at: as_bin(at, weights | {"base_model.model.x.lora_A.weight": torch.ones(1)}),
            r"doesn't name, base_model\.model\.x\.lora_A\.weight",
        ),
        "gone": (
            lambda at: change_json(at / "adapter_config.json", base_model_name_or_path="/no/base"),
            "an adapter whose base model is missing: there is no folder /no/base",
        ),
        "unsaid": (
            lambda at: change_json(at / "adapter_config.json", base_model_name_or_path=None),
            "an adapter that names no base model",
        ),
        "chain": (
            lambda at: change_json(at / "adapter_config.json", base_model_name_or_path=str(folder)),
            "an adapter on another one",
        ),
        "shapes": (lambda at: change_json(at / "adapter_config.json", r=3), "lacks weights or doesn't fit"),
        "types": (lambda at: change_json(at / "adapter_config.json", r="x"), "lacks weights or doesn't fit"),
        "pattern": (
            lambda at: change_json(at / "adapter_config.json", target_modules="(("),
            "lacks weights or doesn't fit",
        ),
        "more": (
            lambda at: change_json(at / "adapter_config.json", modules_to_save=["linear_1"]),
            r"has weights that its adapter_config\.json doesn't name, .*linear_2",
        ),
    }
    for name, (change, message) in cases.items():
        shutil.copytree(folder, tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(ValueError, match=message) as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of this machine; what is fetched of it lies in a folder of its own."""
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("ola_vlm.targets.loading.HfApi", partial(HfApi, server.url))
        yield server


def test_a_name_that_is_no_repository(hub):
    with pytest.raises(ValueError, match="no folder me/x here, and no such repository on the Hub: correct the name"):
        load_checkpoint("me/x")


def test_no_network(monkeypatch, tmp_path):
    """Asked once, not five times with pauses; the same line offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ola_vlm.targets.loading.HfApi", partial(HfApi, "http://127.0.0.1:9"))
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ValueError, match=re.escape("the Hub can't be reached: correct the path, or fetch it")):
            load_checkpoint("me/x")


def test_faults_of_the_program_are_no_settings_of_a_file(checkpoint):
    with pytest.raises(TypeError, match="has no len"), loading_from(checkpoint):
        len(5)
    with pytest.raises(KeyError), loading_from(checkpoint):
        {}["x"]
    # Raised in the standard library, and in transformers for a keyword of ours.
    with pytest.raises(TypeError, match="must be str"), loading_from(checkpoint):
        json.loads(5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtpe'"):
        load_whole(OlaVlmForConditionalGeneration, checkpoint, dtpe="float32")


def test_faults_of_an_installed_program_are_its_own(checkpoint, tmp_path, monkeypatch):
    """Its files lie among the libraries' then, by whose folder theirs are known."""
    package = tmp_path / "site-packages" / "ola_vlm"
    monkeypatch.setattr("ola_vlm.targets.loading.PACKAGE", package)
    for place, error in (
        (package / "x.py", TypeError),
        (package / ".venv" / "site-packages" / "library" / "x.py", ValueError),
        (package.with_name("library") / "x.py", ValueError),
    ):
        with pytest.raises(error, match="has no len"), loading_from(checkpoint):
            exec(compile("len(5)", str(place), "exec"))


@pytest.mark.parametrize("tasks", ["{", "5", "[" * 50_000])
def test_a_header_of_predictors_that_says_something_else(tmp_path, tasks):
    save_file({"a": torch.zeros(1)}, tmp_path / "predictors.safetensors", {"tasks": tasks})
    with pytest.raises(ValueError, match=r"predictors\.safetensors: its header"):
        PredictorFields.read(tmp_path / "predictors.safetensors")


def test_a_folder_is_not_sent_to_a_page_on_the_hub(tmp_path):
    error = OSError(f"{tmp_path} lacks a file. Checkout\n'https://huggingface.co/{tmp_path}/tree/main' for files.")
    assert explain(error, tmp_path) == f"{tmp_path} lacks a file."


def test_other_files_that_were_not_fetched(checkpoint, tmp_path):
    """Of a pipeline's parts, of probes; and `ola-vlm push` sends none."""
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "pipeline" / "unet" / "diffusion.safetensors").write_text(LFS)
    named = pytest.raises(ValueError, match=r"unet/diffusion\.safetensors is a Git LFS pointer")
    with named, loading_from(tmp_path / "pipeline"):
        raise SafetensorError("header too large")
    shutil.copytree(WEIGHTS / "llava" / "probes", tmp_path / "probes")
    (tmp_path / "probes" / "probes.safetensors").write_text(LFS)
    with pytest.raises(ValueError, match=r"probes\.safetensors is a Git LFS pointer"):
        load_probes(tmp_path / "probes")
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text(LFS)
    with pytest.raises(SystemExit, match=r"model\.safetensors is a Git LFS pointer"):
        cli.main(["push", str(tmp_path / "model"), "me/x", "--dry-run"])
