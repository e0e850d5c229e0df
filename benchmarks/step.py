"""A pre-training step of plain LLaVA, of OLA-VLM and of words: `python benchmarks/step.py`.

OLA-VLM has its targets from the cache, or ("with teachers") makes them in the step; words are from the cache. All
train in turns in one process, through the trainer's own loss; peak memory is measured in a process for each.
--hidden_size and --rows take another language model and batch; --cpu counts processor time instead of the clock's.
Prints times, FLOPs and memory and their ratios to LLaVA's, and where OLA-VLM's time goes; --json stores them.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from plan import count, count_step, student_config
from teachers import NARROW
from torch.profiler import profile, record_function

from ola_vlm.configuration_ola_vlm import default_tasks
from ola_vlm.files.writing import write_json
from ola_vlm.modeling_ola_vlm import OlaVlmForConditionalGeneration
from ola_vlm.processing_ola_vlm import OlaVlmProcessor
from ola_vlm.recipes.miniature import WEIGHTS
from ola_vlm.recipes.objectives import WORDS as WORDS_TASK
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.stages import apply_stage
from ola_vlm.training.trainer import OlaVlmTrainer
from ola_vlm.training.words import WordSource

LLM = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
# Of a batch; and tokens of a row beside the image's, of which the last ones have labels.
ROWS = 4
WORDS = 90
SUPERVISED = 30
MIB = 2**20
# The paper's layers of 32, divided by four, as this language model has 8.
LAYERS = {"gen": [3, 5], "depth": [2, 5], "seg": [3, 4]}
TASKS = [{**task, "layers": LAYERS[task["name"]]} for task in default_tasks()]
WITH_TEACHERS = "OLA-VLM, with teachers"
METHODS = {"LLaVA": [], "OLA-VLM": TASKS, WITH_TEACHERS: TASKS, "words": [{**WORDS_TASK, "num_task_tokens": 0}]}
# Kind -> its words, in the miniature's vocabulary: each patch has one of either kind.
KINDS = {"class": ["red", "blue", "green", "yellow", "purple", "cyan"], "depth": [f"z{i}" for i in range(12)]}


class Step:
    """One optimizer step of a method on a random batch."""

    def __init__(self, method: str, hidden_size: int = LLM["hidden_size"], rows: int = ROWS):
        torch.manual_seed(0)
        # 43 / 16 is the MLP's width over the hidden size in Llama-2-7B (11,008 / 4,096).
        widths = {"hidden_size": hidden_size, "intermediate_size": hidden_size * 43 // 16}
        self.config = config = student_config(LLM | widths, TOWER, METHODS[method])
        model = OlaVlmForConditionalGeneration(config)
        apply_stage(model, "pretrain")
        options = {"use_cpu": True, "report_to": "none", "output_dir": tempfile.gettempdir()}
        # Batches are made here; of words the trainer asks which tokens they are.
        collator = SimpleNamespace(target_sources={"words": WordSource(KINDS, dict.fromkeys(KINDS))})
        self.trainer = OlaVlmTrainer(
            model,
            OlaVlmArguments(**options),
            data_collator=collator,
            train_dataset=[{}],
            processing_class=OlaVlmProcessor.from_pretrained(WEIGHTS / "ola_vlm"),
        )
        self.trainer.create_optimizer()
        # A row: 40 words, the image and its task tokens, 50 words.
        special = torch.tensor([config.image_token_id] * config.image_seq_length + config.task_token_ids)
        words = torch.randint(1000, (rows, WORDS))
        ids = torch.cat([words[:, :40], special.expand(rows, -1), words[:, 40:]], 1)
        labels = torch.full_like(ids, -100)
        labels[:, -SUPERVISED:] = ids[:, -SUPERVISED:]
        side = config.vision_config.image_size
        targets = {task["name"]: make_targets(task, rows) for task in config.tasks}
        self.batch = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "targets": targets,
            "pixel_values": torch.randn(rows, 3, side, side), "row_ids": [],
        }  # fmt: skip
        # None where targets come from the cache.
        self.teachers = []
        if method == WITH_TEACHERS:
            self.teachers = [make() for make in NARROW.values()]
        self.images = [Image.new("RGB", (side, side), "gray")] * rows

    def __call__(self):
        self.trainer.model.train()
        # What they give is dropped: it is narrower than what the paper's predictors predict.
        # Named parts, which the profile at the end lists.
        with record_function("step: teachers"):
            for teacher in self.teachers:
                teacher.encode(self.images)
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
        # 4 bytes each: the weight, and of what trains its gradient and two moments.
        return sum(4 * n * (4 if trained else 1) for n, trained in numbers)


def make_targets(task: dict, rows: int) -> torch.Tensor:
    """As from the cache: (rows, Q, E) features, or (rows, Q, kinds) numbers of words."""
    if task["target"] == "words":
        # (rows, Q) numbers of each kind, stacked to (rows, Q, kinds); fp32, as the cache gives them.
        shape = (rows, task["target_length"])
        return torch.stack([torch.randint(len(words), shape).float() for words in KINDS.values()], dim=-1)
    return torch.randn(rows, task["target_length"], task["target_dim"])


def peak_memory(method: str, hidden_size: int, rows: int) -> int:
    """Bytes that two steps add to a fresh process, its libraries left out."""
    # Two steps: AdamW's moments are made at the end of the first, so only the second has all at once.
    make = f"Step({method!r}, {hidden_size}, {rows})"
    code = f"from step import *; base = peak(); step = {make}; step(); step(); print(peak() - base)"
    options = {"capture_output": True, "text": True, "check": True, "cwd": os.path.dirname(os.path.abspath(__file__))}
    return int(subprocess.run([sys.executable, "-c", code], **options).stdout)


def peak() -> int:
    """Bytes, since the process began; getrusage would also know its parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each method's step; they take turns, and the first round warms up."""
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for round_number in range(rounds + 1):
        for method, step in steps.items():
            start = clock()
            step()
            if round_number > 0:
                seconds[method].append(clock() - start)
    return {method: statistics.median(values) for method, values in seconds.items()}


def describe(step: Step, method: str, args: argparse.Namespace) -> dict[str, float]:
    """FLOPs and memory of a step; for the methods that plan.py counts beside what it expects of them."""
    # Counted by running one more step.
    flops, kept = count(step, step.trainer.model.parameters())
    found = {
        "gflop": flops / 1e9,
        "peak_mib": peak_memory(method, args.hidden_size, args.rows) / MIB,
    }
    if method in ("LLaVA", "OLA-VLM"):
        found["expected_gflop"] = count_step(step.config, args.rows, WORDS, SUPERVISED)["flops"] / 1e9
        found["expected_mib"] = (kept + step.weights()) / MIB
    return found


def print_table(table: dict[str, dict[str, float]]) -> None:
    print(f"{'':<24}{'seconds':>9}{'GFLOP':>9}{'expected':>10}{'peak MiB':>10}{'expected':>10}   over LLaVA's:")
    base = table["LLaVA"]
    for method, found in table.items():
        # Of methods that the arithmetic knows.
        expected_gflop = ""
        if "expected_gflop" in found:
            expected_gflop = f"{found['expected_gflop']:.0f}"
        expected_mib = ""
        if "expected_mib" in found:
            expected_mib = f"{found['expected_mib']:.0f}"
        cells = f"{method:<24}{found['seconds']:>9.2f}{found['gflop']:>9.0f}{expected_gflop:>10}"
        cells += f"{found['peak_mib']:>10.0f}{expected_mib:>10}"
        time_ratio = found["seconds"] / base["seconds"]
        flop_ratio = found["gflop"] / base["gflop"]
        memory_ratio = found["peak_mib"] / base["peak_mib"]
        print(f"{cells}   time {time_ratio:.3f}, FLOPs {flop_ratio:.3f}, memory {memory_ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden_size", type=int, default=LLM["hidden_size"], help="of the language model")
    parser.add_argument("--rows", type=int, default=ROWS, help="of the batch")
    parser.add_argument("--cpu", action="store_true", help="processor time: other work on the machine counts less")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are stored, too")
    args = parser.parse_args()
    steps = {method: Step(method, args.hidden_size, args.rows) for method in METHODS}
    seconds = measure(steps, args.rounds, time.process_time if args.cpu else time.perf_counter)
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    clock = "processor time" if args.cpu else "the clock"
    machine = f"{platform.machine()}, {threads}, torch {torch.__version__}; {clock}"
    print(machine)
    print(f"{args.rows} rows of {WORDS} words and an image, language model {args.hidden_size} wide")
    table = {}
    for method, step in steps.items():
        table[method] = {"seconds": seconds[method], **describe(step, method, args)}
    print_table(table)
    if args.json is not None:
        size = {"rows": args.rows, "hidden_size": args.hidden_size}
        write_json(args.json, {"machine": machine, **size, "methods": table})
    # Last, as profiling slows a step.
    with profile() as profiler:
        steps["OLA-VLM"]()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=60))


if __name__ == "__main__":
    main()
