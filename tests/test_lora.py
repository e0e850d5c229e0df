"""Adapters by our trainer, by TRL and on 4-bit weights: what moves, what stays, what is on disk."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import encode, random_rows
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from training_helpers import Interrupt, llava_sample, losses, make_trainer, target_source, write_llava
from transformers import LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer

from ola_vlm.commands.table import parse
from ola_vlm.convert.export import export_llava
from ola_vlm.inference.checkpoints import read_checkpoint
from ola_vlm.inference.generate import generate_answers
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.recipes import RECIPES
from ola_vlm.recipes.arguments import make_arguments
from ola_vlm.train import train
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.attach import load_predictors
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.lora import add_adapters, four_bits
from ola_vlm.training.stages import apply_stage
from ola_vlm.training.trainer import OlaVlmTrainer

ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "miniature" / "weights" / "ola_vlm"  # 4 bits need a width of at least 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    samples = [llava_sample(i, f"{i % 3}.png" if i % 4 else None) for i in range(8)]
    return str(write_llava(tmp_path_factory.mktemp("data"), samples, ["0.png", "1.png", "2.png"]))


@pytest.fixture
def base(make_model, tmp_path):
    """Function (the parts' name, for `make_model`) -> the folder of a checkpoint."""

    def save(**kwargs) -> str:
        for part in make_model(**kwargs):
            part.save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return save


def arguments(checkpoint, data, output_dir, **changes) -> OlaVlmArguments:
    fields = {"stage": "finetune", "checkpoint": checkpoint, "data": data, "output_dir": str(output_dir)}
    fields |= {"lora_rank": 4, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    fields |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    return OlaVlmArguments(**(fields | changes))


def load(checkpoint, adapter=None, cls=OlaVlmForConditionalGeneration, **kwargs):
    model = cls.from_pretrained(checkpoint, **kwargs)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


@torch.no_grad()
def logits(model, processor) -> torch.Tensor:
    return model(**encode(processor, random_rows(3, [1, 2, 0]))).logits


@pytest.mark.parametrize(("tokens", "tied"), [("frozen", False), ("trained", True)])
def test_adapters_hold_all_that_was_trained(base, data, tiny_parts, tied_parts, tmp_path, tokens, tied):
    checkpoint = base(parts=tied_parts if tied else tiny_parts)
    trainer = train(arguments(checkpoint, data, tmp_path / "out", task_tokens=tokens, weight_decay=0.1))
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kinds = {re.sub(r"base_model\.model\.model\.|layers\.\d+\.|\.weight|\.bias", "", name) for name in written}
    projector = {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"}
    blocks = {kind for kind in kinds if re.fullmatch(r"language_model\.(self_attn|mlp)\.\w+_proj\.lora_[AB]", kind)}
    rest = kinds - projector - blocks
    assert projector <= kinds and len(blocks) == 2 * 7
    assert all("token" in name for name in rest) and bool(rest) == (tokens == "trained"), rest
    assert not list((tmp_path / "out").glob("model*.safetensors"))

    processor = OlaVlmProcessor.from_pretrained(tmp_path / "out")
    untouched, again = load(checkpoint), load(checkpoint, tmp_path / "out")
    trained = logits(trainer.model.eval(), processor)
    assert logits(again, processor).equal(trained)
    assert (trained - logits(untouched, processor)).abs().max() > 1e-3

    merged = again.merge_and_unload()
    assert (logits(merged, processor) - trained).abs().max() <= 1e-5 * trained.abs().max()
    before, after = untouched.state_dict(), merged.state_dict()
    moved = {name for name, value in before.items() if not after[name].equal(value)}
    ids, table = merged.config.task_token_ids, "model.language_model.embed_tokens.weight"
    tables = {table, "lm_head.weight"} if tied else {table}
    assert all("_proj.weight" in name or "projector" in name or name in tables for name in moved), moved
    assert (table in moved) == (tokens == "trained")
    changed = (before[table] != after[table]).any(1).nonzero().flatten().tolist()
    assert set(changed) == (set(ids) if tokens == "trained" else set())

    # The plain LLaVA takes the same adapter, and a merged checkpoint is an ordinary one.
    export_llava(untouched).save_pretrained(tmp_path / "plain")
    plain = load(tmp_path / "plain", tmp_path / "out", LlavaForConditionalGeneration)
    assert logits(plain, processor).equal(trained)
    merged.save_pretrained(tmp_path / "merged")
    assert logits(load(tmp_path / "merged"), processor).equal(logits(merged, processor))


@pytest.mark.parametrize(("given", "alpha"), [({}, 8), ({"lora_alpha": 3}, 3)])
def test_adapters_are_scaled_by_twice_their_rank_unless_told(make_model, tmp_path, given, alpha):
    model, _ = make_model()
    config = add_adapters(model, arguments("a checkpoint", "data.json", tmp_path, **given)).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, alpha, 0)


def test_an_interrupted_run_goes_on_exactly(base, data, tmp_path):
    checkpoint, options = base(), {"save_strategy": "steps", "save_steps": 1, "lora_dropout": 0.1}
    whole = train(arguments(checkpoint, data, tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        train(arguments(checkpoint, data, tmp_path / "cut", **options), callbacks=[Interrupt(3)])
    resumed = train(arguments(checkpoint, data, tmp_path / "cut", resume_from_checkpoint="true", **options))
    after = resumed.model.state_dict()
    assert all(value.equal(after[name]) for name, value in whole.model.state_dict().items())


def test_embedding_losses_beside_adapters(base, tmp_path):
    """Predictors train, too: they lie beside the adapter, and a resumed run has them."""
    checkpoint = base()
    options = {"stage": "finetune", "embedding_losses": True, "lora_rank": 4, "save_strategy": "steps"}
    options |= {"save_steps": 1, "max_steps": 3}

    def run(folder: str, resume: str | None = None, callbacks=()):
        torch.manual_seed(0)
        model, processor = read_checkpoint(checkpoint)
        trainer = make_trainer(model, processor, tmp_path / folder, callbacks=callbacks, **options)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return trainer

    whole = run("whole")
    assert all(step["loss/depth/1/smooth_l1"] > 0 for step in losses(whole))
    with pytest.raises(KeyboardInterrupt):
        run("cut", callbacks=[Interrupt(3)])
    resumed = run("cut", resume=str(tmp_path / "cut" / "checkpoint-2"))
    after = resumed.model.state_dict()
    assert all(value.equal(after[name]) for name, value in whole.model.state_dict().items())

    trained = whole.model.get_base_model().state_dict()
    before = load(checkpoint).state_dict()
    again, _ = read_checkpoint(tmp_path / "whole")
    moved = set()
    for name, value in again.state_dict().items():
        if name.startswith(("predictors.", "queries.", "logit_scales.")):
            assert value.equal(trained[name]), name
        if not value.equal(before[name]):
            moved.add(name.split(".")[0])
    assert moved == {"model", "predictors", "logit_scales"}


QUESTION = "which object is closer to the camera ? (A) red object (B) blue object"


def miniature_data(folder: Path, rows: int = 4, answer: str = "(A)") -> str:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
    samples = [{"id": str(i), "image": "a.png" if i else "b.png", "conversations": turns} for i in range(rows)]
    return str(write_llava(folder, samples, ["a.png", "b.png"]))


def test_adapters_on_4_bits(tmp_path):
    """On the CPU: trains, reloads exactly, generates; tower, projector and head keep their type."""
    args = arguments(str(MINIATURE), miniature_data(tmp_path), tmp_path / "out", load_in_4bit=True, dtype="bfloat16")
    trainer = train(args)
    quantized = {name for name, p in trainer.model.named_parameters() if p.dtype == torch.uint8}
    assert len(quantized) == 4 * 7 and all("language_model.layers" in name for name in quantized)
    processor = OlaVlmProcessor.from_pretrained(tmp_path / "out")
    again = load(MINIATURE, tmp_path / "out", quantization_config=four_bits(), dtype=torch.bfloat16)
    assert logits(again, processor).equal(logits(trainer.model.eval(), processor))
    batch = encode(processor, random_rows(2)).to(torch.bfloat16)
    new = again.generate(**batch, max_new_tokens=3, do_sample=False)
    assert new.shape[1] > batch["input_ids"].shape[1]
    base = load(MINIATURE, quantization_config=four_bits(), dtype=torch.bfloat16)
    assert not logits(base, processor).equal(logits(again, processor))


def by_recipe(recipe: str, *argv: str):
    options = parse("train", ["--recipe", recipe, "--disable_tqdm", "true", *argv])
    return train(make_arguments(options, "ola-vlm train"), recipe=options.recipe)


def test_the_recipe_from_the_command_line(base, data, tmp_path):
    argv = ["--checkpoint", base(), "--data", data, "--max_steps", "1", "--use_cpu", "true", "--lora_rank", "2"]
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"question": "what color ?", "image": "0.png"}]))
    evaluated = ["--eval_data", "0.3", "--eval_questions", str(questions), "--image_folder", str(Path(data).parent)]
    half = ["--dtype", "bfloat16", "--bf16", "true", "--output_dir", str(tmp_path / "half")]
    trainer = by_recipe("lora", *argv, *half, *evaluated)
    assert "output" in json.loads((tmp_path / "half" / "answers" / "step-1.jsonl").read_text())
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    trainer = by_recipe("lora", *argv, "--output_dir", str(tmp_path / "out"))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}  # a CPU's, by itself
    assert trainer.model.peft_config["default"].lora_alpha == 4
    assert set(RECIPES["qlora"].fields) - set(RECIPES["lora"].fields) == {"load_in_4bit"}
    with pytest.raises(ValueError, match="holds adapters, not a model: merge them"):
        train(arguments(str(tmp_path / "out"), data, tmp_path / "more"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lora", "qlora"])
def test_the_recipes_learn_twenty_rows(tmp_path, recipe):
    """On a CPU without further fields: the model then gives an answer that it never gave."""
    if torch.accelerator.is_available():
        pytest.skip("of machines without a GPU")
    answer = "blue object closer"
    data = miniature_data(tmp_path, rows=20, answer=answer)
    out = str(tmp_path / "out")
    trainer = by_recipe(recipe, "--checkpoint", str(MINIATURE), "--data", data, "--output_dir", out)
    assert trainer.state.global_step == 100
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged[-1] < 0.1 * logged[0], logged
    question = {"question": QUESTION, "image": "a.png"}
    (answered,) = generate_answers(trainer.model, trainer.processing_class, [question], tmp_path)
    assert answered["output"].strip() == answer
    kinds = {torch.float32, torch.uint8} if recipe == "qlora" else {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == kinds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"stage": "pretrain"}, "for stage finetune"),
        ({"task_tokens": "queries"}, "and query tables"),
        ({"lora_rank": 0, "load_in_4bit": True}, "give lora_rank and checkpoint"),
        ({"checkpoint": None, "load_in_4bit": True}, "give lora_rank and checkpoint"),
    ],
)
def test_what_adapters_cannot_do(tmp_path, changes, message):
    needed = {"stage": "finetune", "use_cpu": True}
    with pytest.raises(ValueError, match=message):
        OlaVlmArguments(**({"output_dir": str(tmp_path), "lora_rank": 4, "checkpoint": "base"} | needed | changes))


def test_dpo_moves_the_adapter(make_model, tmp_path):
    """Two steps of TRL's DPOTrainer on `images`, `prompt`, `chosen`, `rejected`."""
    model, processor = make_model()
    rows = []
    for row, other in zip(random_rows(4), random_rows(4, seed=1), strict=True):
        sides = {"chosen": row["messages"][1:], "rejected": other["messages"][1:]}
        rows.append({"images": row["images"], "prompt": row["messages"][:1], **sides})
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=r".*language_model.*\.(q|k|v|o)_proj")
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "logging_steps": 1}
    options |= {"max_length": None, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    args = DPOConfig(str(tmp_path), disable_tqdm=True, **options)
    trainer = DPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=processor, peft_config=lora
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not value.equal(before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert {"lora_A", "lora_B"} == {re.search("lora_[AB]", name)[0] for name in moved}
    first, second = (log["loss"] for log in trainer.state.log_history[:2])
    assert abs(first - 0.6931) < 1e-3 and second != first  # log 2: policy and reference begin alike


def test_a_programs_own_adapters_are_saved_with_their_predictors(make_model, tmp_path):
    """Of other kinds than `lora_rank` makes, in another type than the weights': an adapter's folder, no model's."""
    model, processor = make_model(dtype=torch.bfloat16)
    apply_stage(model, "finetune", embedding_losses=True)
    config = LoraConfig(r=2, use_dora=True, use_rslora=True, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, config)
    for parameter in model.predictors.parameters():
        parameter.requires_grad_(True)
    fields = {"stage": "finetune", "embedding_losses": True, "dtype": "bfloat16", "bf16": True, "max_steps": 1}
    args = OlaVlmArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **fields)
    sources = {task["name"]: target_source(task) for task in model.config.tasks}
    collator = OlaVlmCollator(processor, sources, model.config.tasks)
    trainer = OlaVlmTrainer(
        adapted, args, data_collator=collator, train_dataset=random_rows(8), processing_class=processor
    )
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    again, _ = make_model(dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(again, tmp_path)
    load_predictors(again, tmp_path)
    trained = {name: value.to(torch.bfloat16) for name, value in adapted.state_dict().items()}
    read = {name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()}
    assert read.keys() == trained.keys()
    assert all(value.equal(trained[name]) for name, value in read.items())
