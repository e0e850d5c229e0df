"""Answers a second and peak memory of LLaVA, OLA-VLM and token concatenation: `python benchmarks/inference.py`.

Batch 1, greedy, as the paper measures (9.92, 9.86 and 5.32 samples/s on an A100): on the miniature and at hidden 512
with 576 image tokens, random weights. All take turns in one process, peak memory is measured in a process for each.
"LLaVA + K words" is LLaVA with as many more words in its prompt as OLA-VLM has task tokens: what OLA-VLM costs beyond
it would be its own. With --cpu the process's CPU time is counted instead of the clock's.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from step import LLM, TOWER, peak
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    logging,
)

from ola_vlm.baselines.build import build_multi_encoder, load_encoders
from ola_vlm.configuration_ola_vlm import default_tasks
from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.recipes.miniature import TASKS, TEACHERS, WEIGHTS

SIZES = ("miniature", "hidden 512")
METHODS = ("LLaVA", "LLaVA + words", "OLA-VLM", "token concat")
WORDS, NEW_TOKENS = 48, 16


def save_parts(folder: Path) -> tuple[str, str, dict]:
    """A tower of 24 x 24 tokens, a language model and three teachers about as large beside the tower as the paper's
    (ViT-L and Swin-L beside ViT-L, ViT-H), random."""
    vit = {"patch_size": 14, "image_size": 336}
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "language_model")
    stages = {"out_features": [f"stage{i}" for i in range(1, 5)]}
    dino = {name: TOWER[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    dino = Dinov2Config(**dino, patch_size=14, image_size=336, reshape_hidden_states=False, **stages)
    swin = json.loads((WEIGHTS / "seg" / "config.json").read_text())
    swin["backbone_config"] |= {"image_size": 384, "patch_size": 4, "embed_dim": 48, "window_size": 12}
    swin["backbone_config"] |= {"depths": [2, 2, 6, 2], "num_heads": [2, 4, 8, 16]}
    wide = CLIPVisionConfig(**(TOWER | {"hidden_size": 320, "num_hidden_layers": 8}), patch_size=14, image_size=224)
    parts = {
        "tower": CLIPVisionModel(CLIPVisionConfig(**TOWER, **vit)),
        "llm": LlamaForCausalLM(LlamaConfig(**(LLM | {"vocab_size": len(tokenizer)}))),
        "depth": DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=dino, patch_size=14)),
        "seg": OneFormerForUniversalSegmentation(OneFormerConfig(**swin)),
        "gen": CLIPVisionModelWithProjection(wide),
    }
    for name, model in parts.items():
        model.save_pretrained(folder / name)
        side = {"gen": 224, "seg": 384}.get(name, 336)
        view = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": side, "width": side}}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(view))
    tokenizer.save_pretrained(folder / "llm")
    return str(folder / "tower"), str(folder / "llm"), {n: e | {"path": str(folder / n)} for n, e in TEACHERS.items()}


class Answer:
    """One image and `WORDS` words in, `NEW_TOKENS` out."""

    def __init__(self, size: str, method: str):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            parts = str(WEIGHTS / "vision_tower"), str(WEIGHTS / "language_model"), TEACHERS
            tower, llm, teachers = parts if size == SIZES[0] else save_parts(Path(folder))
            paper = [task | {"layers": [2, 5], "num_task_tokens": 8} for task in default_tasks()]
            tasks = TASKS if size == SIZES[0] else paper
            self.model, processor = build_ola_vlm(tower, llm, tasks=tasks if method == "OLA-VLM" else [])
            if method == "token concat":
                encoders = load_encoders(teachers, self.model.config.image_seq_length)
                count = tasks[0]["num_task_tokens"]
                self.model, processor = build_multi_encoder(self.model, processor, encoders, "token", count)
        self.model.eval()
        more = sum(task["num_task_tokens"] for task in tasks) if method == "LLaVA + words" else 0
        text = "<image>" + " red" * (WORDS + more)
        image = Image.new("RGB", (336, 336), "gray")
        self.inputs = processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)
        self.tokens = self.inputs["input_ids"].shape[1]

    @torch.no_grad()
    def __call__(self):
        self.model.generate(**self.inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="CPU time")
    parser.add_argument("--memory", nargs=2, metavar=("SIZE", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.memory:
        answer = Answer(*args.memory)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building the parts
        answer()
        print(peak() / 2**20)
        return
    clock = time.process_time if args.cpu else time.perf_counter
    print(f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads{', CPU time' * args.cpu}")
    print(
        f"{NEW_TOKENS} tokens an answer, medians of {args.rounds} rounds; ratio: time over LLaVA's in the same round"
    )
    for size in SIZES:
        answers = {method: Answer(size, method) for method in METHODS}
        seconds = {method: [] for method in METHODS}
        for turn in range(args.rounds + 1):
            for method, answer in answers.items():
                start = clock()
                answer()
                if turn:  # the first one warms up
                    seconds[method].append(clock() - start)
        print(f"{size:<15}{'prompt':>8}{'million weights':>17}{'answers/s':>11}{'ratio':>8}{'peak MB':>9}")
        for method, answer in answers.items():
            command = [sys.executable, __file__, "--threads", str(args.threads), "--memory", size, method]
            most = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
            ratios = [own / base for own, base in zip(seconds[method], seconds["LLaVA"], strict=True)]
            rate, ratio = 1 / statistics.median(seconds[method]), statistics.median(ratios)
            weights = sum(p.numel() for p in answer.model.parameters()) / 1e6
            print(f"{method:<15}{answer.tokens:>8}{weights:>17.1f}{rate:>11.2f}{ratio:>8.3f}{most:>9.0f}", flush=True)
        own = [a / b for a, b in zip(seconds["OLA-VLM"], seconds["LLaVA + words"], strict=True)]
        print(f"OLA-VLM over LLaVA with as long a prompt: {statistics.median(own):.3f}", flush=True)


if __name__ == "__main__":
    main()
