"""What probes cost beside the forward passes that they need anyway: `python benchmarks/probes.py`.

A random LLaVA with the paper's 576 image tokens and its three targets' sizes. Forward passes alone, the same with the
ridge's statistics, and with the resamplers' training take turns in one process; prints times, their ratios, and FLOP
ratios, here and (counted, not run) at 8B. Solving the ridge comes once at the end and is printed apart.
"""

import argparse
import os
import platform
import statistics
import time

import torch
from plan import student_config
from torch.utils.flop_counter import FlopCounterMode

from ola_vlm.configuration_ola_vlm import default_tasks
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.probing.resampler import ResamplerFit
from ola_vlm.probing.ridge import RidgeFit
from ola_vlm.probing.states import ImageStates

# A small stand-in: widths count, as the ridge's work grows with their square.
LLM = {
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
IMAGES = 2
WORDS = 40
# "forward": FLOPs an image, 9705e9 of the blocks and CLIP-L's.
LLAMA3 = {"layers": 32, "hidden": 4096, "forward": 10_087e9}


class Turns:
    def __init__(self):
        torch.manual_seed(0)
        config = student_config(LLM, TOWER, [])
        self.model = OlaVlmForConditionalGeneration(config).eval()
        self.tokens = config.image_seq_length
        # (IMAGES, 576) image tokens between the two halves of the words.
        image = torch.full((IMAGES, self.tokens), config.image_token_id)
        words = torch.randint(10, 900, (IMAGES, WORDS))
        ids = torch.cat([words[:, : WORDS // 2], image, words[:, WORDS // 2 :]], 1)
        side = config.vision_config.image_size
        self.inputs = {"input_ids": ids, "pixel_values": torch.randn(IMAGES, 3, side, side)}
        tasks = default_tasks()
        self.targets = {}
        for task in tasks:
            self.targets[task["name"]] = torch.randn(IMAGES, task["target_length"], task["target_dim"])
        shape = (LLM["num_hidden_layers"] + 1, LLM["hidden_size"])
        self.ridge = RidgeFit(tasks, *shape)
        # Each batch is an optimizer step, of more epochs than are ever run: the fit must not come to its end.
        self.resampler = ResamplerFit(tasks, *shape, images=IMAGES, epochs=1000, step_images=IMAGES)

    @torch.no_grad()
    def forward(self) -> ImageStates:
        # Probes read hidden states: of the head's logits the last one is enough, and no cache is kept.
        hidden = self.model(**self.inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states
        # Where the image's tokens are in the row, and that they make a square grid.
        columns = [torch.arange(self.tokens) + WORDS // 2] * IMAGES
        attended = torch.ones_like(self.inputs["input_ids"], dtype=torch.bool)
        return ImageStates(hidden, attended, columns, [(round(self.tokens**0.5),) * 2] * IMAGES)

    def with_ridge(self) -> None:
        self.ridge.update(self.forward(), self.targets)

    def with_resampler(self) -> None:
        self.resampler.update(self.forward(), self.targets)


def flops(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def ridge_flops(tasks: list[dict], layers: int, hidden: int) -> int:
    """Of the statistics, an image: a product (Q, H) x (Q, H + E) for each target length and layer."""
    widths = {}
    # Tasks of one length share their inputs, and so the larger part of the product.
    for task in tasks:
        widths[task["target_length"]] = widths.get(task["target_length"], 0) + task["target_dim"]
    # One more than the layers: the embeddings have a probe, too.
    return sum(2 * length * hidden * (hidden + width) for length, width in widths.items()) * (layers + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="processor time instead of the clock's, on a busy machine")
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter
    turns = Turns()
    steps = {"forward alone": turns.forward, "ridge": turns.with_ridge, "resampler": turns.with_resampler}
    seconds = {name: [] for name in steps}
    for round_number in range(args.rounds + 1):
        for name, step in steps.items():
            start = clock()
            step()
            # The first round warms up.
            if round_number > 0:
                seconds[name].append(clock() - start)
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    what = (
        # A ridge for each pair of target length (1 and 576) and layer, hence halved.
        f"{IMAGES} images, {len(turns.ridge.probes) // 2} layers of {LLM['hidden_size']}, {turns.tokens} image tokens"
    )
    print(f"{platform.machine()}, {threads}, torch {torch.__version__}; {what}; gen, depth, seg")
    base = statistics.median(seconds["forward alone"])
    # Counted after the timing: the counter slows what it counts.
    base_flops = flops(turns.forward)
    for name, step in steps.items():
        took = statistics.median(seconds[name])
        count = flops(step)
        print(f"{name:<14}{took:>8.2f} s {took / base:>6.2f} x forward   FLOP ratio {count / base_flops:.2f}")
    start = clock()
    # The same alpha for all tasks: those of one length are solved as one system.
    turns.ridge.solve(dict.fromkeys(turns.targets, 1e-3))
    print(f"solving all ridge probes for one alpha: {clock() - start:.1f} s, once")
    share = ridge_flops(default_tasks(), LLAMA3["layers"], LLAMA3["hidden"]) / LLAMA3["forward"]
    print(f"ridge at 8B, counted: FLOP ratio {1 + share:.2f}, its part in float64")


if __name__ == "__main__":
    main()
