"""What a run costs and whether it fits, before it is paid for: `python benchmarks/plan.py [--gpus 16]`.

FLOPs and bytes are counted by torch on models without weights (fake tensors): a step of pre-training, with and without
the embedding losses, of fine-tuning and of visual pre-training, and the teachers' forward passes; time is FLOPs over
the GPUs' usable speed, which you give. For the paper's Llama-3-8B runs by default; nothing is downloaded and no GPU is
needed.
"""

import argparse
from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
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
from ola_vlm.modeling_ola_vlm import EmbeddingPredictor, OlaVlmForConditionalGeneration
from ola_vlm.recipes.objectives import WORD_TEACHERS, WORDS
from ola_vlm.targets.cache import BLOCK
from ola_vlm.training.losses import embedding_loss
from ola_vlm.training.stages import apply_stage

# Meta-Llama-3-8B and CLIP-ViT-L, as their configurations on the Hub say.
LLAMA3 = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# torch's counter knows attention on GPUs only, and fake tensors are on the CPU: it gets the same formulas.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}
# A number's size in the cache; int8 has a scale in bf16 for each block of channels.
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1 + 2 / BLOCK}
# Of the recipes: what is planned for is a batch of rows that are that long.
MAX_LENGTH = 2048
GPU_BYTES = 80e9
STRATEGIES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
# DeepSpeed's defaults, in numbers: `reduce_bucket_size` and `allgather_bucket_size`, `stage3_max_live_parameters`.
ZERO_BUCKET = 500_000_000
ZERO_LIVE = 1_000_000_000


class Sizes(NamedTuple):
    """Numbers of a model's parameters: those that are trained and the others; of the largest block that is sharded
    alone (a layer, a predictor), and of all that lies in no block."""

    trained: int
    frozen: int
    block: int
    root: int


def student_config(llm: dict, tower: dict, tasks: list[dict], patch_size: int = 14, grid: int = 24) -> OlaVlmConfig:
    # 24 x 24 patches of 14 pixels: 336 pixels a side, 576 image tokens.
    vision = CLIPVisionConfig(**tower, image_size=grid * patch_size, patch_size=patch_size)
    tokens = sum(task.get("num_task_tokens", 8) for task in tasks)
    first = llm["vocab_size"]
    # <image> and task tokens, in a multiple of 64.
    llm = {**llm, "vocab_size": first + 64}
    return OlaVlmConfig(
        text_config=LlamaConfig(**llm), vision_config=vision, image_token_index=first, image_seq_length=grid**2,
        tasks=tasks, task_token_ids=list(range(first + 1, first + 1 + tokens)), tie_word_embeddings=False,
    )  # fmt: skip


def count(run: Callable[[], None], left_out: Iterable[Tensor] = ()) -> tuple[float, float]:
    """FLOPs of `run`, and bytes that autograd keeps in it for the backward pass; without those of `left_out` (weights)
    and of their views: what a linear layer keeps is its weight's transpose."""
    # Storages by address: several tensors may be views of one. Keeping it keeps its address from being used again.
    kept = {}
    known = {tensor.untyped_storage()._cdata for tensor in left_out}

    # Called for every tensor that autograd saves; it is saved as it is.
    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with (
        FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter,
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        run()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def sizes_of(model: OlaVlmForConditionalGeneration) -> Sizes:
    def numbers(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    # What FSDP2 shards and gathers as a unit; the rest, such as embeddings and head, is the root.
    blocks = [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]
    blocks += [module for module in model.modules() if isinstance(module, EmbeddingPredictor)]
    by_block = list(map(numbers, blocks))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = numbers(model)
    return Sizes(trained, whole - trained, max(by_block), whole - sum(by_block))


def count_step(
    config: OlaVlmConfig,
    rows: int,
    words: int,
    supervised: int,
    dtype=torch.float32,
    checkpointing=False,
    stage: str = "pretrain",
    batch: int | None = None,
    is_sharded: bool = False,
) -> dict[str, float | Sizes]:
    """A step on `rows` rows of an image and `words` other tokens, `supervised` of them with a label.

    Args:
        dtype: in 16 bits, mixed precision as by the trainer: what trains is fp32, matrix products cast it.
        batch: rows of the whole step, whose targets are the contrastive columns; `rows` by default.
        is_sharded: weights are cast as they are gathered (FSDP2, ZeRO), not by each product.

    Returns: "flops"; "kept", bytes kept for the backward pass, without weights and columns; "columns", bytes of the
    contrastive columns and of the fp32 copy of one task's that a loss makes for a moment; "sizes".
    """
    # The whole step's rows; by default this GPU's alone.
    batch = batch or rows
    with FakeTensorMode():
        model = OlaVlmForConditionalGeneration._from_config(config, dtype=dtype)
        # Decides what trains, and whether this stage has embedding losses at all.
        has_losses = apply_stage(model, stage).embedding_losses
        tasks = config.tasks if has_losses else []
        # As the trainer upcasts what trains, for mixed precision; autocast then casts it in each product.
        if not is_sharded:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        tokens = config.image_seq_length + len(config.task_token_ids) + words
        side = config.vision_config.image_size
        shapes = {task["name"]: (task["target_length"], task["target_dim"]) for task in tasks}
        # Task -> the targets of the whole step, with which the contrastive term compares each prediction.
        columns = {name: torch.empty(batch, *shape, dtype=dtype) for name, shape in shapes.items()}

        def forward() -> Tensor:
            pixels = torch.empty(rows, 3, side, side, dtype=dtype)
            # The model's forward by hand: with fake tensors it can't look for image tokens among the ids.
            # The tower and the projector: (rows, 576, H).
            features = torch.cat(model.model.get_image_features(pixels).pooler_output)
            features = features.view(rows, config.image_seq_length, -1)
            # Task tokens and words are looked up alike; where in the row the image stands makes no difference.
            ids = torch.zeros(rows, tokens - config.image_seq_length, dtype=torch.long)
            embeds = model.get_input_embeddings()(ids)
            embeds = torch.cat([features.to(embeds.dtype), embeds], 1)
            # Layers that some predictor reads, each once.
            layers = sorted(set(chain.from_iterable(task["layers"] for task in tasks)))
            # Given, as transformers would look at a mask's values to make one, and fake tensors have none.
            mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
            options = {"output_hidden_states": layers or None, "attention_mask": mask, "use_cache": False}
            states = model.model.language_model(inputs_embeds=embeds, **options)
            # Only supervised positions get logits, as in the trainer: (rows * supervised, vocabulary).
            logits = model.lm_head(states.last_hidden_state[:, :supervised].flatten(0, 1))
            labels = torch.zeros(len(logits), dtype=torch.long)
            total = F.cross_entropy(logits.float(), labels)
            # Predictors look at all tokens of the row: an upper bound, as `attends_to` may leave some out.
            everything = torch.ones(rows, tokens, dtype=torch.bool)
            for task in tasks:
                name = task["name"]
                targets = torch.empty(rows, *shapes[name], dtype=dtype)
                for layer in task["layers"]:
                    state = states.hidden_states[layer]
                    queries = None
                    # As the model: query tables for a grid, the layer's own task tokens for one embedding.
                    if task["num_task_tokens"] > 0 and task["target_length"] > 1:
                        queries = model.queries[name][None]
                    elif task["num_task_tokens"] > 0:
                        queries = state[:, : task["num_task_tokens"]]
                    predictor = model.predictors[name][str(layer)]
                    predicted = predictor(state, queries, torch.arange(rows), everything)
                    scale = model.logit_scales[name][0]
                    # 0.3 is the paper's weight of the contrastive term.
                    total = total + embedding_loss(predicted, targets, scale, 0.3, columns[name]).total
            return total

        def step():
            # For fp32 autocast is off; the backward pass is outside, as in the trainer.
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                total = forward()
            total.backward()

        flops, kept = count(step, [*model.parameters(), *columns.values()])
        sizes = sizes_of(model)
    # The loss makes an fp32 copy of one task's columns at a time: the largest counts.
    numbers = [value.numel() for value in columns.values()]
    copy = 4 * max(numbers, default=0) if dtype is not torch.float32 else 0
    return {"flops": flops, "kept": kept, "columns": dtype.itemsize * sum(numbers) + copy, "sizes": sizes}


def training_memory(strategy: str, gpus: int, sizes: Sizes) -> dict[str, float]:
    """Bytes a GPU of "weights", "gradients", "optimizer" (AdamW's moments, and the fp32 weights that DeepSpeed keeps
    beside) and "in flight" (what is gathered, cast or copied for a moment), in mixed precision with bf16. Of sharded
    training the layers' weights are there one after the other, those outside of layers all the time."""
    trained, frozen, block, root = sizes
    match strategy:
        case "DDP":
            # What trains is fp32, with two moments of 4 bytes each; what is frozen stays bf16 and has neither.
            weights = 4 * trained + 2 * frozen
            gradients = 4 * trained
            optimizer = 8 * trained
            # Buckets are copies of the gradients; autocast holds a bf16 copy of what trains.
            in_flight = 4 * trained + 2 * trained
        case "FSDP2":
            weights = (4 * trained + 2 * frozen) / gpus
            gradients = 4 * trained / gpus
            optimizer = 8 * trained / gpus
            # Weights of the root, of the block at work and of the next one; gradients of the root and of a block, of
            # which one at a time is summed over ranks in fp32.
            in_flight = 2 * (root + 2 * block) + 2 * (root + block) + 4 * max(root, block)
        case "ZeRO-2":
            # DeepSpeed trains bf16 weights, and keeps fp32 ones (4) beside the two moments (8).
            weights = 2 * (trained + frozen)
            gradients = 2 * trained / gpus
            optimizer = 12 * trained / gpus
            # Two buckets of gradients (`overlap_comm`), one of weights.
            in_flight = 2 * 3 * ZERO_BUCKET
        case "ZeRO-3":
            weights = 2 * (trained + frozen) / gpus
            gradients = 2 * trained / gpus
            optimizer = 12 * trained / gpus
            # In bf16: gathered weights that may be there at once, and two buckets.
            in_flight = 2 * (ZERO_LIVE + 2 * ZERO_BUCKET)
        case _:
            raise ValueError(f"{strategy!r} is not one of {STRATEGIES}")
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "in flight": in_flight}


def checkpoint_bytes(strategy: str, sizes: Sizes) -> dict[str, float]:
    """On disk: the "model" of a run's end in bf16; a checkpoint to "resume" from, which has fp32 of what trains and
    the optimizer's moments; and one with `save_only_model`. DeepSpeed's has the weights twice: for `from_pretrained`
    and for the resumed run.
    """
    whole = sizes.trained + sizes.frozen
    if strategy.startswith("ZeRO"):
        weights = 2 * whole
        state = 2 * whole + 12 * sizes.trained
    else:
        weights = 4 * sizes.trained + 2 * sizes.frozen
        state = 8 * sizes.trained
    return {"model": 2 * whole, "resume": weights + state, "save_only_model": weights}


def count_teachers() -> dict[str, float]:
    """FLOPs of the paper's teachers on one image each; of OneFormer its backbone, which is all that targets need."""

    def forward(model_class, config: PreTrainedConfig, size: int) -> float:
        # No backward pass: teachers are frozen.
        with torch.device("meta"), torch.no_grad():
            model = model_class(config)
            return count(lambda: model(torch.empty(1, 3, size, size)), model.parameters())[0]

    clip_h = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    swin_l = SwinConfig(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12, image_size=384)
    dinov2 = Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14,
        out_indices=[5, 12, 18, 24], reshape_hidden_states=False,
    )  # fmt: skip
    return {
        # Sides in pixels at which each teacher sees an image.
        "gen": forward(CLIPVisionModelWithProjection, CLIPVisionConfig(**clip_h, patch_size=14), 224),
        "depth": forward(Dinov2Backbone, dinov2, 336),
        "seg": forward(SwinBackbone, swin_l, 800),
    }


def gigabytes(values: Iterable[float]) -> str:
    return "".join(f"{value / 1e9:>11.1f}" for value in values)


def rows_a_gpu(batch: int, gpus: int) -> int:
    """ValueError if the step's rows can't be divided among the GPUs: what is left over would be neither counted nor
    paid for."""
    if gpus < 1:
        raise ValueError(f"--gpus is {gpus}: give at least 1")
    if batch < gpus or batch % gpus:
        # The multiples below and above, each at least a row a GPU.
        fitting = sorted({gpus * max(1, batch // gpus), gpus * (batch // gpus + 1)})
        given = " or ".join(map(str, fitting))
        raise ValueError(f"--batch {batch} doesn't divide among --gpus {gpus}: give a batch of {given}")
    return batch // gpus


def print_pretraining(args: argparse.Namespace) -> None:
    # FLOP/s of all GPUs together.
    speed = args.gpus * args.peak_tflops * 1e12 * args.utilization
    rows = rows_a_gpu(args.batch, args.gpus)
    print(f"\npre-training step by DDP, {rows} rows a GPU")
    print(f"{'':<34}PFLOPs seconds  hours; GB a GPU:{'kept':>7}{'columns':>11}{'states':>11}{'whole':>11}")
    flops = {}
    # Predictors with queries of their own: what task tokens cost shows in the difference.
    without_tokens = [{**task, "num_task_tokens": 0} for task in default_tasks()]
    methods = {"LLaVA": [], "OLA-VLM, N_seek 0": without_tokens, "OLA-VLM": default_tasks()}
    for name, tasks in methods.items():
        config = student_config(LLAMA3, CLIP_L, tasks)
        for checkpointing in (False, True):
            step = count_step(
                config, rows, args.words, args.supervised, torch.bfloat16, checkpointing, batch=args.batch
            )
            flops[name, checkpointing] = step["flops"]
            seconds = step["flops"] * args.gpus / speed
            hours = seconds * args.images / args.batch / 3600
            # Weights, gradients, optimizer and what is in flight: none of it depends on the batch.
            states = sum(training_memory("DDP", args.gpus, step["sizes"]).values())
            memory = [step["kept"], step["columns"], states]
            title = f"{name}, checkpointing" if checkpointing else name
            line = f"  {title:<32}{step['flops'] * args.gpus / 1e15:>6.1f} {seconds:>7.2f} {hours:>6.2f}           "
            print(line + gigabytes([*memory, sum(memory)]))
    # Without checkpointing, which computes the forward pass twice.
    whole = flops["OLA-VLM", False] / flops["LLaVA", False]
    predictors = flops["OLA-VLM, N_seek 0", False] / flops["LLaVA", False]
    print(f"FLOPs of OLA-VLM over LLaVA, teachers left out: {whole:.3f}; without task tokens {predictors:.3f}")


def print_finetuning(args: argparse.Namespace) -> None:
    """Both stages that train the language model, with activation checkpointing, on rows of `MAX_LENGTH` tokens."""
    config = student_config(LLAMA3, CLIP_L, default_tasks())
    # Rows of full length, the longest that a batch can have: what must fit.
    words = MAX_LENGTH - config.image_seq_length - len(config.task_token_ids)
    for stage in ("finetune", "visual_pretrain"):
        title = f"{stage} step, {args.finetune_rows} rows of {MAX_LENGTH} tokens a GPU, checkpointing"
        print(f"\n{title}: GB a GPU of {args.gpus}")
        print(f"  {'':<10}{'weights':>11}{'gradients':>11}{'optimizer':>11}{'in flight':>11}{'kept':>11}{'whole':>11}")
        steps = {}
        for is_sharded in (False, True):
            options = {"stage": stage, "checkpointing": True, "is_sharded": is_sharded}
            size = args.finetune_rows, words, args.finetune_supervised
            # A step is counted twice only: all sharded strategies keep the same for the backward pass.
            steps[is_sharded] = count_step(config, *size, torch.bfloat16, **options)
        for strategy in STRATEGIES:
            step = steps[strategy != "DDP"]
            parts = [*training_memory(strategy, args.gpus, step["sizes"]).values(), step["kept"]]
            fits = "" if sum(parts) < GPU_BYTES else f"  more than {GPU_BYTES / 1e9:.0f}"
            print(f"  {strategy:<10}{gigabytes([*parts, sum(parts)])}{fits}")


def print_checkpoints() -> None:
    print(f"\n{'GB on disk':<32}{'the model':>11}{'checkpoint':>16}{'save_only_model':>17}")
    config = student_config(LLAMA3, CLIP_L, default_tasks())
    for stage, strategies in {
        "pretrain": ["DDP"],
        "finetune": ["FSDP2", "ZeRO-2"],
        "visual_pretrain": ["FSDP2"],
    }.items():
        with FakeTensorMode():
            # Which parameters train decides what a checkpoint holds of the optimizer.
            model = OlaVlmForConditionalGeneration._from_config(config)
            apply_stage(model, stage)
            sizes = sizes_of(model)
        for strategy in strategies:
            on_disk = checkpoint_bytes(strategy, sizes)
            model_size, resume, only = (f"{value / 1e9:.1f}" for value in on_disk.values())
            print(f"  {stage + ', ' + strategy:<30}{model_size:>11}{resume:>16}{only:>17}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=16)
    parser.add_argument("--peak_tflops", type=float, default=989, help="of a GPU in bf16: 989 is an H100's")
    parser.add_argument("--utilization", type=float, default=0.35, help="share of it that is reached")
    parser.add_argument("--images", type=int, default=558_128)
    parser.add_argument("--words", type=int, default=90, help="tokens a row that are no image's: prompt and caption")
    parser.add_argument("--supervised", type=int, default=30, help="of these, the caption's")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--finetune_rows", type=int, default=8, help="rows a GPU of fine-tuning")
    parser.add_argument("--finetune_supervised", type=int, default=700, help="tokens with a label of its longest rows")
    args = parser.parse_args()
    try:
        # Now: counting takes a while.
        rows_a_gpu(args.batch, args.gpus)
    except ValueError as error:
        parser.error(str(error))
    speed = args.gpus * args.peak_tflops * 1e12 * args.utilization
    print(f"{args.gpus} GPUs of {args.peak_tflops:g} TFLOP/s at {args.utilization:.0%}, {args.images:,} images")

    print("\nteachers, one pass over the images      TFLOPs an image   hours")
    for name, flops in count_teachers().items():
        print(f"  {name:<36} {flops / 1e12:>16.3f} {flops * args.images / speed / 3600:>7.2f}")

    print("\ntarget cache                            MB an image       TB")
    # Numbers of an image's targets, of all three tasks.
    values = sum(task["target_length"] * task["target_dim"] for task in default_tasks())
    for storage, size in BYTES.items():
        print(f"  {storage:<36} {values * size / 1e6:>12.2f} {values * size * args.images / 1e12:>8.2f}")
    numbers = WORDS["target_length"] * len(WORD_TEACHERS)  # a byte each
    print(f"  {'words of two kinds':<36} {numbers / 1e6:>12.4f} {numbers * args.images / 1e12:>8.4f}")

    print_pretraining(args)
    print_finetuning(args)
    print_checkpoints()


if __name__ == "__main__":
    main()
