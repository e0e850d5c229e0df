"""One rank of test_sharding: accelerate launch ... sharded_worker.py PARTS_FOLDER OUT_FOLDER KIND..."""

import inspect
import sys
import textwrap
from pathlib import Path

import accelerate.state
import torch
from conftest import make_parts, make_tokenizer, random_rows, tiny_tasks
from test_attach import make as make_attached
from test_attach import make_trainer as make_attached_trainer
from tiny_teachers import save_tiny_teachers
from training_helpers import IMAGES, losses, make_trainer
from transformers import AutoModelForCausalLM, Phi3Config, Qwen3Config, TimmWrapperConfig, TimmWrapperModel

from ola_vlm.baselines.build import build_multi_encoder, load_encoders
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.training.stages import apply_stage

TEACHERS = {"gen": "clip_image", "depth": "depth_anything", "seg": "oneformer"}


def shard_on_cpus():
    """accelerate turns to FSDP on GPUs only; CPUs join their list here."""
    state = accelerate.state
    source = textwrap.dedent(inspect.getsource(state.AcceleratorState.__init__))
    last = "DistributedType.MULTI_NEURON,"
    if last not in source:
        raise RuntimeError(
            "accelerate's list of devices that FSDP runs on has another form now: mend the test's patch"
        )
    names = {}
    exec(source.replace(last, f"{last} DistributedType.MULTI_CPU,"), vars(state), names)
    state.AcceleratorState.__init__ = names["__init__"]


def make_all_parts(folder: Path) -> None:
    """Folders of the parts that `KINDS` are built of."""
    make_parts(folder)
    make_parts(folder / "tied", tied=True)
    save_tiny_teachers(folder / "teachers")
    seen = {"input_size": [3, 128, 128], "mean": [0.4] * 3, "std": [0.2] * 3}
    convnext = TimmWrapperConfig(architecture="convnext_atto", do_pooling=False, pretrained_cfg=seen)
    TimmWrapperModel(convnext).save_pretrained(folder / "convnext")
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": len(tokenizer)}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    sizes |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, config in {"phi3": Phi3Config(**sizes), "qwen3": Qwen3Config(**sizes, head_dim=8)}.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def build(parts: Path, tower: str = "vision_tower", words: str = "language_model", tasks=None, **options):
    torch.manual_seed(0)
    tasks = tiny_tasks() if tasks is None else tasks
    return build_ola_vlm(str(parts / tower), str(parts / words), tasks=tasks, **options)


def fused(parts: Path, fusion: str):
    entries = {name: {"encoder": kind, "path": str(parts / "teachers" / kind)} for name, kind in TEACHERS.items()}
    model, processor = build(parts, tasks=[])
    return build_multi_encoder(
        model, processor, load_encoders(entries, model.config.image_seq_length), fusion, num_tokens=2
    )


PATCH = {"name": "patch", "predictor": "patch", "layers": [2], "target_length": 16, "target_dim": 6, "loss": "mse"}
WORDS = {"name": "words", "predictor": "none", "target": "words", "layers": [0], "target_length": 16, "loss": "mse"}
WORDS |= {"contrastive_weight": 0.1}
MOMENTS = {**WORDS, "name": "moments", "loss": "moments", "contrastive_weight": 0.0}

# Kind -> function of the parts' folder that builds a model and its processor, and the stage that trains it.
KINDS = {
    "ola_vlm": (build, "pretrain"),
    "ola_vlm_finetune": (build, "finetune"),
    "ola_vlm_visual": (build, "visual_pretrain"),
    "tied": (lambda parts: build(parts / "tied"), "pretrain"),
    "llava": (lambda parts: build(parts, tasks=[]), "pretrain"),
    "convnext": (lambda parts: build(parts, tower="convnext"), "pretrain"),
    "phi3": (lambda parts: build(parts, words="phi3"), "finetune"),
    "qwen3": (lambda parts: build(parts, words="qwen3"), "pretrain"),
    "feature": (lambda parts: fused(parts, "feature"), "pretrain"),
    "token": (lambda parts: fused(parts, "token"), "finetune"),
    "qwen2_5_vl": (lambda parts: make_attached("qwen2_5_vl", tokens=True), "pretrain"),
    "idefics3": (lambda parts: make_attached("idefics3", tokens=True), "pretrain"),
    "llava_next": (lambda parts: make_attached("llava_next"), "visual_pretrain"),
    "adapters": (build, "finetune"),
    "predicting_adapters": (build, "finetune"),
    "patch": (lambda parts: build(parts, tasks=[PATCH]), "pretrain"),
    "words": (lambda parts: build(parts, tasks=[WORDS, MOMENTS]), "pretrain"),
}
# As the paper's recipes load them: what is frozen stays bf16 beside what trains, in the same blocks (LoRA) or others.
MIXED = {
    "bf16": (lambda parts: build(parts, dtype=torch.bfloat16), "pretrain"),
    "bf16_finetune": (lambda parts: build(parts, dtype=torch.bfloat16), "finetune"),
    "bf16_adapters": (lambda parts: build(parts, dtype=torch.bfloat16), "finetune"),
}
ATTACHED = ("qwen2_5_vl", "idefics3", "llava_next")


def prepare(kind: str, parts: Path, out: Path, ranks: int, **options):
    """The trainer of two SGD steps of 8 rows, in the first of which the second of two ranks has no image."""
    make, stage = {**KINDS, **MIXED}[kind]
    model, processor = make(parts)
    defaults = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 8 // ranks}
    defaults |= {"per_device_eval_batch_size": 8 // ranks, "train_sampling_strategy": "sequential", "stage": stage}
    options = defaults | options
    if kind in ATTACHED:
        apply_stage(model, stage)
        return make_attached_trainer(model, processor, out, images=IMAGES, **options)
    if kind in MIXED:
        options["bf16"] = True
        options["dtype"] = "bfloat16"
    if kind.endswith("adapters"):
        options["lora_rank"] = 4
    if kind == "predicting_adapters":
        options["embedding_losses"] = True
    return make_trainer(model, processor, out, rows=random_rows(16, IMAGES), **options)


def run(kind: str, parts: Path, out: Path, ranks: int):
    """Saves the model in `out`, and its losses in training and evaluation in a file beside it."""
    trainer = prepare(kind, parts, out / kind, ranks)
    trainer.train()
    metrics = trainer.evaluate(trainer.train_dataset[:11])  # of the second batch the second of two ranks has no row
    trainer.save_model()
    if trainer.args.should_save:
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval_loss")}
        torch.save({"train": losses(trainer), "eval": evaluated}, out / f"{kind}.pt")


def prepare_resumed(kind: str, parts: Path, out: Path, ranks: int):
    """The trainer of four steps with a checkpoint in the middle; the best checkpoint is loaded. Adam's large epsilon
    keeps its steps in proportion to gradients, so that those of other numbers of ranks can be compared."""
    options = {"max_steps": 4, "optim": "adamw_torch", "adam_epsilon": 0.1, "save_strategy": "steps"}
    options |= {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = prepare(kind, parts, out, ranks, **options)
    trainer.eval_dataset = trainer.train_dataset[:11]
    return trainer


def run_whole(kind: str, parts: Path, out: Path, ranks: int):
    trainer = prepare_resumed(kind, parts, out, ranks)
    trainer.train()
    trainer.save_model()


def run_resumed(kind: str, parts: Path, out: Path, ranks: int, checkpoint: Path):
    """The last two of the steps again, from the checkpoint between them."""
    trainer = prepare_resumed(kind, parts, out, ranks)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    trainer.save_model()


if __name__ == "__main__":
    parts, out = Path(sys.argv[1]), Path(sys.argv[2])
    shard_on_cpus()
    for kind in sys.argv[3:]:
        if kind.startswith("resumed:"):
            kind = kind.removeprefix("resumed:")
            run_whole(kind, parts, out / f"{kind}_whole", ranks=2)
            for before in ("whole", "alone"):
                checkpoint = out / f"{kind}_{before}" / "checkpoint-2"
                run_resumed(kind, parts, out / f"{kind}_resumed_{before}", ranks=2, checkpoint=checkpoint)
        else:
            run(kind, parts, out, ranks=2)
    torch.distributed.destroy_process_group()
