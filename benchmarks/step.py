"""A pre-training step of OLA-VLM with cached targets against plain LLaVA's: `python benchmarks/step.py`.

Both train in turns in one process, through the trainer's own loss; peak memory is measured in a process for each.
--hidden_size and --rows take another language model and batch; --cpu counts processor time instead of the clock's.
Prints times and FLOPs and their ratios, memory beside what autograd keeps by count, and where OLA-VLM's time goes.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from plan import count, count_step, student_config
from torch.profiler import profile, record_function

from ola_vlm.configuration_ola_vlm import default_tasks
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.stages import apply_stage
from ola_vlm.training.trainer import OlaVlmTrainer

LLM = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
LLM |= {"num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False}
TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
ROWS, WORDS, SUPERVISED, MIB = 4, 90, 30, 2**20
LAYERS = {"gen": [3, 5], "depth": [2, 5], "seg": [3, 4]}  # a quarter of the paper's
METHODS = {"LLaVA": [], "OLA-VLM": [task | {"layers": LAYERS[task["name"]]} for task in default_tasks()]}


class Step:
    """One optimizer step of a method on a random batch; the targets are there, as from the cache."""

    def __init__(self, method: str, hidden_size: int = LLM["hidden_size"], rows: int = ROWS):
        torch.manual_seed(0)
        widths = {"hidden_size": hidden_size, "intermediate_size": hidden_size * 43 // 16}
        self.config = config = student_config(LLM | widths, TOWER, METHODS[method])
        model = OlaVlmForConditionalGeneration(config)
        apply_stage(model, "pretrain")
        options = {"use_cpu": True, "report_to": "none", "output_dir": tempfile.gettempdir()}
        collator = SimpleNamespace(target_sources={})  # batches are made here
        self.trainer = OlaVlmTrainer(model, OlaVlmArguments(**options), data_collator=collator, train_dataset=[{}])
        self.trainer.create_optimizer()
        special = torch.tensor([config.image_token_id] * config.image_seq_length + config.task_token_ids)
        words = torch.randint(1000, (rows, WORDS))
        ids = torch.cat([words[:, :40], special.expand(rows, -1), words[:, 40:]], 1)
        labels = torch.full_like(ids, -100)
        labels[:, -SUPERVISED:] = ids[:, -SUPERVISED:]
        side = config.vision_config.image_size
        targets = {t["name"]: torch.randn(rows, t["target_length"], t["target_dim"]) for t in config.tasks}
        self.batch = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "targets": targets,
            "pixel_values": torch.randn(rows, 3, side, side), "row_ids": [],
        }  # fmt: skip

    def __call__(self):
        self.trainer.model.train()
        with record_function("step: losses"):
            loss = self.trainer.compute_loss(self.trainer.model, self.batch)
        with record_function("step: backward"):
            loss.backward()
        with record_function("step: optimizer"):
            self.trainer.optimizer.step()
            self.trainer.optimizer.zero_grad()

    def weights(self) -> int:
        """Bytes of weights, of gradients, and of AdamW's two moments."""
        numbers = [(p.numel(), p.requires_grad) for p in self.trainer.model.parameters()]
        return sum(4 * n * (4 if trained else 1) for n, trained in numbers)


def peak_memory(method: str, hidden_size: int, rows: int) -> int:
    """Bytes that two steps add to a fresh process, its libraries left out."""
    make = f"Step({method!r}, {hidden_size}, {rows})"
    code = f"from step import *; base = peak(); step = {make}; step(); step(); print(peak() - base)"
    options = {"capture_output": True, "text": True, "check": True, "cwd": os.path.dirname(os.path.abspath(__file__))}
    return int(subprocess.run([sys.executable, "-c", code], **options).stdout)


def peak() -> int:
    """Bytes, since the process began; getrusage would also know its parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden_size", type=int, default=LLM["hidden_size"], help="of the language model")
    parser.add_argument("--rows", type=int, default=ROWS, help="of the batch")
    parser.add_argument("--cpu", action="store_true", help="processor time: other work on the machine counts less")
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter
    steps = {method: Step(method, args.hidden_size, args.rows) for method in METHODS}
    seconds = {method: [] for method in METHODS}
    for round_number in range(args.rounds + 1):
        for method, step in steps.items():
            start = clock()
            step()
            if round_number > 0:  # the first one warms up
                seconds[method].append(clock() - start)
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(
        f"{platform.machine()}, {threads}, torch {torch.__version__}; {'processor time' if args.cpu else 'the clock'}"
    )
    print(f"{args.rows} rows of {WORDS} words and an image, language model {args.hidden_size} wide")
    print(f"{'':<10}{'seconds':>9}{'GFLOP':>9}{'expected':>10}{'peak MiB':>10}{'expected':>10}")
    table = {}
    for method, step in steps.items():
        flops, kept = count(step, step.trainer.model.parameters())
        expected = count_step(step.config, args.rows, WORDS, SUPERVISED)["flops"]
        memory = (
            statistics.median(seconds[method]),
            flops / 1e9,
            expected / 1e9,
            peak_memory(method, args.hidden_size, args.rows) / MIB,
        )
        table[method] = (*memory, (kept + step.weights()) / MIB)
        print(f"{method:<10}{table[method][0]:>9.2f}" + "".join(f"{value:>10.0f}" for value in table[method][1:]))
    time_ratio, flop_ratio, _, memory_ratio, expected = (
        b / a for a, b in zip(table["LLaVA"], table["OLA-VLM"], strict=True)
    )
    print(f"time ratio   {time_ratio:.3f} = {time_ratio / flop_ratio:.2f} x the FLOP ratio {flop_ratio:.3f}")
    print(f"memory ratio {memory_ratio:.3f} = {memory_ratio / expected:.2f} x the expected ratio {expected:.3f}")
    with profile() as profiler:
        steps["OLA-VLM"]()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=60))


if __name__ == "__main__":
    main()
