"""FSDP2 by recipes/accelerate/fsdp2.yaml: what it makes of every kind of model is what one process makes."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from conftest import random_rows
from safetensors.torch import load_file
from sharded_worker import KINDS, MIXED, make_all_parts, prepare, run, run_resumed, run_whole
from test_remote_code import run_without_the_package
from torch import nn

from ola_vlm.convert.push import find_files
from ola_vlm.training.attach import predictors_of
from ola_vlm.training.sharding import block_classes, configure_fsdp2

ROOT = Path(__file__).parents[1]
RESUMED = ("ola_vlm", "ola_vlm_finetune", "ola_vlm_visual", "tied", "idefics3", "adapters", "predicting_adapters")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Folders of the parts that `sharded_worker.KINDS` are built of."""
    folder = tmp_path_factory.mktemp("parts")
    make_all_parts(folder)
    return folder


def launch(parts: Path, out: Path, *kinds: str, precision: str) -> Path:
    """Two ranks by the configuration that is shipped; "bf16" is its own precision."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"), "--num_processes", "2"]
    command += ["--mixed_precision", precision, "--main_process_port", "0"]
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command += [str(ROOT / "tests" / "sharded_worker.py"), str(parts), str(out), *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def sharded(parts, tmp_path_factory) -> Path:
    """The folder of all kinds' models and losses, in fp32, so that they can be compared."""
    return launch(parts, tmp_path_factory.mktemp("sharded"), *KINDS, precision="no")


@pytest.fixture(scope="module")
def resumed(parts, tmp_path_factory) -> Path:
    """The folder of runs by two ranks and alone ("whole", "alone"), and of those resumed by two ranks from either."""
    out = tmp_path_factory.mktemp("resumed")
    for kind in RESUMED:
        run_whole(kind, parts, out / f"{kind}_alone", ranks=1)
    return launch(parts, out, *[f"resumed:{kind}" for kind in RESUMED], precision="no")


@pytest.fixture(scope="module")
def sharded_bf16(parts, tmp_path_factory) -> Path:
    return launch(parts, tmp_path_factory.mktemp("bf16"), "ola_vlm", *MIXED, precision="bf16")


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    return weights


def assert_close(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


BLOCKS = {
    "ola_vlm": ["CLIPEncoderLayer", "EmbeddingPredictor", "LlamaDecoderLayer"],
    "llava": ["CLIPEncoderLayer", "LlamaDecoderLayer"],
    "convnext": ["ConvNeXtStage", "EmbeddingPredictor", "LlamaDecoderLayer"],
    "phi3": ["CLIPEncoderLayer", "EmbeddingPredictor", "Phi3DecoderLayer"],
    "qwen3": ["CLIPEncoderLayer", "EmbeddingPredictor", "Qwen3DecoderLayer"],
    "token": ["CLIPEncoderLayer", "Dinov2Layer", "LlamaDecoderLayer", "SwinStage"],
    "qwen2_5_vl": ["EmbeddingPredictor", "Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"],
    "idefics3": ["EmbeddingPredictor", "Idefics3EncoderLayer", "LlamaDecoderLayer"],
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_blocks_of_every_kind_are_named(parts, kind):
    make, _ = KINDS[kind]
    model, _ = make(parts)
    assert block_classes(model) == BLOCKS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_modules_run_whatever_the_rows_hold(parts, tmp_path, kind):
    """Sharded, each of them gathers its weights from all ranks: one that a rank leaves out makes others wait."""
    trainer = prepare(kind, parts, tmp_path, ranks=1)
    model = trainer.model.train()
    called = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: called.append(name))
    orders, gradients = [], []
    for images in (1, 0):
        called.clear()
        model.zero_grad()
        loss = trainer.compute_loss(model, trainer.data_collator(random_rows(2, images)))
        loss.backward()
        assert loss.isfinite()
        orders.append(list(called))
        gradients.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert orders[0] == orders[1]
    assert gradients[0] == gradients[1]


def test_gathered_weights_get_the_task_tokens_whatever_the_table_is_called(parts):
    for kind in ("ola_vlm", "tied", "qwen2_5_vl", "idefics3"):
        make, _ = KINDS[kind]
        model, _ = make(parts)
        for table in model.queries.values():  # as if trained
            torch.nn.init.normal_(table)
        gathered = {name: value.clone() for name, value in model.state_dict().items()}
        ids, expected = model.config.task_token_ids, model.task_token_embeddings().detach()
        names = [name for name, value in gathered.items() if name.endswith("embed_tokens.weight")]
        assert len(names) == 1
        assert not gathered[names[0]][ids].equal(expected)
        model.write_task_tokens(gathered)
        assert gathered[names[0]][ids].equal(expected)
        if kind in ("tied", "idefics3"):
            assert gathered["lm_head.weight"].equal(gathered[names[0]])


def test_a_checkpoint_without_its_optimizer_is_refused(parts, tmp_path):
    """As those of DeepSpeed are, whose runs have it in files of another form."""
    trainer = prepare("llava", parts, tmp_path, ranks=1, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no optimizer\.pt: resume it with the --deepspeed"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(("version", "state_dict"), [(1, "FULL_STATE_DICT"), (2, "SHARDED_STATE_DICT")])
def test_settings_whose_checkpoints_are_no_models_are_refused(parts, version, state_dict):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, state_dict_type=state_dict)
    with pytest.raises(ValueError, match=f"fsdp_version {version} with {state_dict} is not supported: take recipes/"):
        configure_fsdp2(plugin, nn.Linear(1, 1))


class ZeroShards:
    """Stands in for `deepspeed.zero`: weights marked by `ds_id` are empty but while they are gathered."""

    def __init__(self):
        self.whole = {}

    def spread(self, parameter: nn.Parameter) -> None:
        self.whole[id(parameter)] = parameter.data
        parameter.data = torch.empty(0)
        parameter.ds_id = len(self.whole)

    @contextmanager
    def GatheredParameters(self, parameters):
        for parameter in parameters:
            parameter.data = self.whole[id(parameter)]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)


def test_predictors_beside_adapters_are_gathered_from_zero3(parts, tmp_path, monkeypatch):
    """As transformers saves there: what trains is gathered, frozen query tables are not. (DeepSpeed itself compiles
    an operator first: benchmarks/zero.py.)"""
    trainer = prepare("predicting_adapters", parts, tmp_path, ranks=1)
    trainer.is_deepspeed_enabled = True
    expected = {name: value.clone() for name, value in predictors_of(trainer.base_model.state_dict()).items()}
    assert any(name.startswith("queries.") for name in expected)
    gathered = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            gathered[name] = parameter.detach().clone()
    zero = ZeroShards()
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    for parameter in trainer.base_model.parameters():
        zero.spread(parameter)

    trainer._save(str(tmp_path), gathered)
    saved = load_file(tmp_path / "predictors.safetensors")
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert saved[name].equal(value), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_write_what_one_process_writes(parts, sharded, tmp_path, kind):
    run(kind, parts, tmp_path, ranks=1)
    expected, logged = (torch.load(folder / f"{kind}.pt") for folder in (tmp_path, sharded))
    assert len(logged["train"]) == 2
    for step, expected_step in zip(logged["train"], expected["train"], strict=True):
        assert step == pytest.approx(expected_step, rel=1e-4, abs=1e-5)
    assert logged["eval"] == pytest.approx(expected["eval"], rel=1e-4, abs=1e-5)

    assert files_of(sharded / kind) == files_of(tmp_path / kind)
    for name in files_of(tmp_path / kind):
        if name.endswith((".json", ".py", ".jinja")):
            assert (sharded / kind / name).read_text() == (tmp_path / kind / name).read_text(), name
    assert_close(weights_of(sharded / kind), weights_of(tmp_path / kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_ends_as_an_uninterrupted_one(resumed, kind):
    whole, again = (weights_of(resumed / f"{kind}_{name}") for name in ("whole", "resumed_whole"))
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert again[name].equal(value), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_ranks_go_on_from_what_one_process_left_and_it_from_what_they_left(parts, resumed, tmp_path, kind):
    whole = weights_of(resumed / f"{kind}_whole")
    run_resumed(kind, parts, tmp_path, ranks=1, checkpoint=resumed / f"{kind}_whole" / "checkpoint-2")
    for folder in (resumed / f"{kind}_alone", resumed / f"{kind}_resumed_alone", tmp_path):
        assert_close(weights_of(folder), whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_a_checkpoint_to_resume_from_is_an_unsharded_ones(resumed, kind):
    folder, expected_folder = (resumed / f"{kind}_{name}" / "checkpoint-2" for name in ("whole", "alone"))
    ranks_states = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert {*files_of(folder)} - ranks_states == {*files_of(expected_folder)} - ranks_states
    assert_close(weights_of(folder), weights_of(expected_folder))
    state, expected = (torch.load(path / "optimizer.pt", weights_only=True) for path in (folder, expected_folder))
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for place, values in expected["state"].items():
        assert_close(state["state"][place], values)


LOAD = """
import torch
from transformers import AutoModel, AutoModelForImageTextToText, pipeline

folder = sys.argv[1]
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "OlaVlmForConditionalGeneration"
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
ids = model.config.task_token_ids
assert model.get_input_embeddings().weight[ids].equal(model.task_token_embeddings())
ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "text", "text": " what is this ?"}]}]
assert isinstance(ask(messages, max_new_tokens=2, return_full_text=False)[0]["generated_text"], str)
print("loaded")
"""


@pytest.mark.slow
def test_a_checkpoint_of_the_shipped_configuration_is_whole(parts, sharded_bf16, tmp_path):
    """It is loaded where the package isn't, and can be pushed; in bf16 its weights are kept in fp32, as its losses
    are, which are one process's."""
    folder = sharded_bf16 / "ola_vlm"
    assert run_without_the_package(LOAD, tmp_path, folder) == "loaded"
    assert {"config.json", "model.safetensors", "modeling_ola_vlm.py"} <= find_files(folder).keys()
    assert {value.dtype for value in weights_of(folder).values()} == {torch.float32}

    run("ola_vlm", parts, tmp_path, ranks=1)
    expected, logged = (torch.load(path / "ola_vlm.pt") for path in (tmp_path, sharded_bf16))
    for step, expected_step in zip(logged["train"], expected["train"], strict=True):
        assert step == pytest.approx(expected_step, rel=0.02, abs=0.01)
        for name, value in step.items():
            assert torch.tensor(value).bfloat16().item() != value, f"{name} is rounded"


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXED)
def test_bf16_weights_are_sharded_beside_those_that_train(parts, sharded_bf16, tmp_path, kind):
    run(kind, parts, tmp_path, ranks=1)
    expected, logged = (torch.load(path / f"{kind}.pt") for path in (tmp_path, sharded_bf16))
    for step, expected_step in zip(logged["train"], expected["train"], strict=True):
        assert step == pytest.approx(expected_step, rel=0.02, abs=0.01)
    assert files_of(sharded_bf16 / kind) == files_of(tmp_path / kind)
    weights, expected_weights = weights_of(sharded_bf16 / kind), weights_of(tmp_path / kind)
    assert {name: value.dtype for name, value in weights.items()} == {
        name: value.dtype for name, value in expected_weights.items()
    }
