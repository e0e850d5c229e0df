"""What a pre-training run costs, before it is paid for: `python benchmarks/plan.py [--gpus 16] [--peak_tflops 400]`.

FLOPs and bytes are counted by torch on models without weights (fake tensors): the student's step, with and without the
embedding losses, and the teachers' forward passes; time is FLOPs over the GPUs' usable speed, which you give. For the
paper's Llama-3-8B run on LLaVA-558K by default; nothing is downloaded and no GPU is needed.
"""

import argparse
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Backbone,
    Dinov2Config,
    LlamaConfig,
    PreTrainedConfig,
    SwinBackbone,
    SwinConfig,
)

from ola_vlm.configuration_ola_vlm import OlaVlmConfig, default_tasks
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.targets.cache import BLOCK
from ola_vlm.training.stages import apply_stage

LLAMA3 = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA3 |= {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# Attention on a CPU has no formula in torch.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1 + 2 / BLOCK}


def student_config(llm: dict, tower: dict, tasks: list[dict], patch_size: int = 14, grid: int = 24) -> OlaVlmConfig:
    vision = CLIPVisionConfig(**tower, image_size=grid * patch_size, patch_size=patch_size)
    tokens = sum(task.get("num_task_tokens", 8) for task in tasks)
    llm = llm | {"vocab_size": llm["vocab_size"] + 64}  # <image> and task tokens, in a multiple of 64
    first = llm["vocab_size"] - 64
    return OlaVlmConfig(
        text_config=LlamaConfig(**llm), vision_config=vision, image_token_index=first, image_seq_length=grid**2,
        tasks=tasks, task_token_ids=list(range(first + 1, first + 1 + tokens)), tie_word_embeddings=False,
    )  # fmt: skip


def count(run: Callable[[], None]) -> tuple[float, float]:
    """FLOPs of `run`, and bytes that autograd keeps in it for the backward pass, parameters left out."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    with (
        FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter,
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        run()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def count_step(
    config: OlaVlmConfig, rows: int, words: int, supervised: int, dtype=torch.float32, checkpointing=False
) -> dict[str, float]:
    """A pre-training step on `rows` rows of an image and `words` other tokens, `supervised` of them with a label:
    FLOPs, bytes kept for the backward pass, bytes of all weights, and parameters that are trained."""
    with FakeTensorMode():
        model = OlaVlmForConditionalGeneration._from_config(config, dtype=dtype)
        apply_stage(model, "pretrain")
        model.train().config.text_config.use_cache = False
        if checkpointing:
            model.activation_checkpointing_enable()
        tokens = config.image_seq_length + len(config.task_token_ids) + words
        side, sizes = config.vision_config.image_size, {task["name"]: task for task in config.tasks}

        def step():
            features = torch.cat(
                model.model.get_image_features(torch.empty(rows, 3, side, side, dtype=dtype)).pooler_output
            )
            features = features.view(rows, config.image_seq_length, -1)
            rest = torch.empty(rows, tokens - features.shape[1], features.shape[-1], dtype=dtype)
            layers = sorted({layer for task in config.tasks for layer in task["layers"]})
            mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)  # else values would be looked at
            options = {"output_hidden_states": layers or None, "attention_mask": mask}
            states = model.model.language_model(inputs_embeds=torch.cat([features, rest], 1), **options)
            total = model.lm_head(states.last_hidden_state[:, :supervised]).float().logsumexp(-1).sum()
            everything = torch.ones(rows, tokens, dtype=torch.bool)
            for name, by_layer in model.predictors.items() if config.tasks else ():
                for layer, predictor in by_layer.items():
                    state, queries = states.hidden_states[int(layer)], None
                    if sizes[name]["num_task_tokens"] > 0:
                        own = state[:, : sizes[name]["num_task_tokens"]]
                        queries = own if sizes[name]["target_length"] == 1 else model.queries[name][None]
                    predicted = predictor(state, queries, torch.arange(rows), everything)
                    total = total + predicted.float().square().sum()
            total.backward()

        flops, kept = count(step)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"flops": flops, "kept": kept, "weights": weights, "trained": trained}


def count_teachers() -> dict[str, float]:
    """FLOPs of the paper's teachers on one image each; of OneFormer its backbone, which is all that targets need."""

    def forward(model_class, config: PreTrainedConfig, size: int) -> float:
        with torch.device("meta"), torch.no_grad():
            model = model_class(config)
            return count(lambda: model(torch.empty(1, 3, size, size)))[0]

    clip_h = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    swin_l = SwinConfig(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12, image_size=384)
    dinov2 = Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14,
        out_indices=[5, 12, 18, 24], reshape_hidden_states=False,
    )  # fmt: skip
    return {
        "gen": forward(CLIPVisionModelWithProjection, CLIPVisionConfig(**clip_h, patch_size=14), 224),
        "depth": forward(Dinov2Backbone, dinov2, 336),
        "seg": forward(SwinBackbone, swin_l, 800),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=16)
    parser.add_argument("--peak_tflops", type=float, default=989, help="of a GPU in bf16: 989 is an H100's")
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of it that is reached")
    parser.add_argument("--images", type=int, default=558_128)
    parser.add_argument("--words", type=int, default=90, help="tokens a row that are no image's: prompt and caption")
    parser.add_argument("--supervised", type=int, default=30, help="of these, the caption's")
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    speed, rows = args.gpus * args.peak_tflops * 1e12 * args.utilisation, args.batch // args.gpus
    print(f"{args.gpus} GPUs of {args.peak_tflops:g} TFLOP/s at {args.utilisation:.0%}, {args.images:,} images")

    print("\nteachers, one pass over the images      TFLOPs an image   hours")
    for name, flops in count_teachers().items():
        print(f"  {name:<36} {flops / 1e12:>16.3f} {flops * args.images / speed / 3600:>7.2f}")

    print("\ntarget cache                            MB an image       TB")
    values = sum(task["target_length"] * task["target_dim"] for task in default_tasks())
    for storage, size in BYTES.items():
        print(f"  {storage:<36} {values * size / 1e6:>12.2f} {values * size * args.images / 1e12:>8.2f}")

    title = f"pre-training step, {rows} rows a GPU, bf16"
    print(f"\n{title:<39}PFLOPs   seconds   hours   GB a GPU: weights  kept  optimiser")
    found = {}
    without_tokens = [task | {"num_task_tokens": 0} for task in default_tasks()]
    methods = {"LLaVA": [], "OLA-VLM, N_seek 0": without_tokens, "OLA-VLM": default_tasks()}
    for name, tasks in methods.items():
        config = student_config(LLAMA3, CLIP_L, tasks)
        for checkpointing in (False, True):
            step = count_step(config, rows, args.words, args.supervised, torch.bfloat16, checkpointing)
            found[name, checkpointing] = step
            flops = step["flops"] * args.gpus
            seconds = flops / speed
            hours = seconds * args.images / args.batch / 3600
            memory = step["weights"], step["kept"], step["trained"] * 12  # fp32 gradient and two moments
            what = f"{name}, checkpointing" if checkpointing else name
            gigabytes = "".join(f"{value / 1e9:>9.1f}" for value in memory)
            print(f"  {what:<36} {flops / 1e15:>10.1f} {seconds:>9.2f} {hours:>7.2f}          {gigabytes}")
    whole, predictors = (found[name, False]["flops"] / found["LLaVA", False]["flops"] for name in list(methods)[:0:-1])
    print(f"\nFLOPs of OLA-VLM over LLaVA, teachers left out: {whole:.3f}; without task tokens {predictors:.3f}")


if __name__ == "__main__":
    main()
