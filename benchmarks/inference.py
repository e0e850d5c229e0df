"""Answers a second and peak memory of LLaVA, OLA-VLM and token concatenation: `python benchmarks/inference.py`.

Batch 1, greedy, as the paper measures (9.92, 9.86 and 5.32 samples/s on an A100): on the miniature and at hidden 512
with 576 image tokens, random weights. All take turns in one process, peak memory is measured in a process for each.
"LLaVA + K words" is LLaVA with as many more words in its prompt as OLA-VLM has task tokens: what OLA-VLM costs beyond
it would be its own. With --cpu the process's CPU time is counted instead of the clock's; --json stores the figures.
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
from ola_vlm.files.writing import write_json
from ola_vlm.recipes.miniature import TASKS, TEACHERS, WEIGHTS

SIZES = ("miniature", "hidden 512")
METHODS = ("LLaVA", "LLaVA + words", "OLA-VLM", "token concat")
# Of the prompt, beside the image; and tokens of every answer, whatever the model says.
WORDS = 48
NEW_TOKENS = 16


def save_parts(folder: Path) -> tuple[str, str, dict]:
    """A tower of 24 x 24 tokens, a language model and three teachers about as large beside the tower as the paper's
    (ViT-L and Swin-L beside ViT-L, ViT-H), random."""
    # 336 / 14 = 24: an image of 24 x 24 = 576 tokens, as in the paper.
    vit = {"patch_size": 14, "image_size": 336}
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "language_model")
    # Depth-Anything's decoder reads four of the backbone's stages.
    stages = {"out_features": [f"stage{i}" for i in range(1, 5)]}
    dino = {name: TOWER[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    dino = Dinov2Config(**dino, patch_size=14, image_size=336, reshape_hidden_states=False, **stages)
    # The miniature's OneFormer with a larger backbone: all else of its configuration is needed, too.
    swin = json.loads((WEIGHTS / "seg" / "config.json").read_text())
    swin["backbone_config"].update(
        image_size=384,
        patch_size=4,
        embed_dim=48,
        window_size=12,
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 8, 16],
    )
    # Wider and deeper than the tower, as CLIP-H is beside CLIP-L.
    larger = {**TOWER, "hidden_size": 320, "num_hidden_layers": 8}
    wide = CLIPVisionConfig(**larger, patch_size=14, image_size=224)
    parts = {
        "tower": CLIPVisionModel(CLIPVisionConfig(**TOWER, **vit)),
        "llm": LlamaForCausalLM(LlamaConfig(**{**LLM, "vocab_size": len(tokenizer)})),
        "depth": DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=dino, patch_size=14)),
        "seg": OneFormerForUniversalSegmentation(OneFormerConfig(**swin)),
        "gen": CLIPVisionModelWithProjection(wide),
    }
    for name, model in parts.items():
        model.save_pretrained(folder / name)
        # The size at which a part sees images is in its image processor's configuration.
        side = {"gen": 224, "seg": 384}.get(name, 336)
        view = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": side, "width": side}}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(view))
    tokenizer.save_pretrained(folder / "llm")
    teachers = {name: {**entry, "path": str(folder / name)} for name, entry in TEACHERS.items()}
    return str(folder / "tower"), str(folder / "llm"), teachers


class Answer:
    """One image and `WORDS` words in, `NEW_TOKENS` out."""

    def __init__(self, size: str, method: str):
        # The same random parts for every method: they are what is drawn first.
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            # The miniature's own parts, or random ones as large as `LLM` and `TOWER` say.
            parts = str(WEIGHTS / "vision_tower"), str(WEIGHTS / "language_model"), TEACHERS
            tower, llm, teachers = parts if size == SIZES[0] else save_parts(Path(folder))
            # The paper's tasks on layers that a model of 8 layers has.
            paper = [{**task, "layers": [2, 5], "num_task_tokens": 8} for task in default_tasks()]
            tasks = TASKS if size == SIZES[0] else paper
            self.model, processor = build_ola_vlm(tower, llm, tasks=tasks if method == "OLA-VLM" else [])
            # The multi-encoder baseline keeps the teachers, and gets as many tokens of each as OLA-VLM has for a task.
            if method == "token concat":
                encoders = load_encoders(teachers, self.model.config.image_seq_length)
                count = tasks[0]["num_task_tokens"]
                self.model, processor = build_multi_encoder(self.model, processor, encoders, "token", count)
        self.model.eval()
        # As many more words as OLA-VLM's prompt has task tokens: the same length of prompt.
        more = sum(task["num_task_tokens"] for task in tasks) if method == "LLaVA + words" else 0
        # "red" is one token of the miniature's vocabulary, so a word is a token.
        text = "<image>" + " red" * (WORDS + more)
        image = Image.new("RGB", (336, 336), "gray")
        self.inputs = processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)
        self.tokens = self.inputs["input_ids"].shape[1]

    @torch.no_grad()
    def __call__(self):
        # min_new_tokens: an end of turn, which may come at any time, must not make one answer cheaper.
        self.model.generate(**self.inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)


def ratio_of(own: list[float], base: list[float]) -> float:
    """The median of the rounds' ratios."""
    # Of each round, in which both had the same load beside them: steadier than a ratio of medians.
    return statistics.median([a / b for a, b in zip(own, base, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="CPU time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are stored, too")
    parser.add_argument("--memory", nargs=2, metavar=("SIZE", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.memory:
        answer = Answer(*args.memory)
        # Linux: 5 sets the process's peak memory (VmHWM) back to what it has now, without that of building the parts.
        Path("/proc/self/clear_refs").write_text("5")
        answer()
        print(peak() / 2**20)
        return
    clock = time.process_time if args.cpu else time.perf_counter
    machine = f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads{', CPU time' * args.cpu}"
    print(machine)
    print(
        f"{NEW_TOKENS} tokens an answer, medians of {args.rounds} rounds; ratio: time over LLaVA's in the same round"
    )
    stored = {"machine": machine, "new_tokens": NEW_TOKENS, "rounds": args.rounds, "sizes": {}}
    for size in SIZES:
        of_size = stored["sizes"][size] = {}
        answers = {method: Answer(size, method) for method in METHODS}
        seconds = {method: [] for method in METHODS}
        for turn in range(args.rounds + 1):
            for method, answer in answers.items():
                start = clock()
                answer()
                # The first one warms up.
                if turn:
                    seconds[method].append(clock() - start)
        print(f"{size:<15}{'prompt':>8}{'million weights':>17}{'answers/s':>11}{'ratio':>8}{'peak MB':>9}")
        for method, answer in answers.items():
            # A peak never falls, so every method is measured in a process of its own.
            command = [sys.executable, __file__, "--threads", str(args.threads), "--memory", size, method]
            most = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
            weights = sum(p.numel() for p in answer.model.parameters()) / 1e6
            found = of_size[method] = {
                "prompt": answer.tokens,
                "million_weights": weights,
                "answers_a_second": 1 / statistics.median(seconds[method]),
                "time_ratio": ratio_of(seconds[method], seconds["LLaVA"]),
                "peak_mb": most,
            }
            columns = f"{answer.tokens:>8}{weights:>17.1f}{found['answers_a_second']:>11.2f}"
            print(f"{method:<15}{columns}{found['time_ratio']:>8.3f}{most:>9.0f}", flush=True)
        # What task tokens cost beyond the longer prompt: about nothing, if this is 1.
        own = of_size["OLA-VLM"]["time_ratio_to_as_long_a_prompt"] = ratio_of(
            seconds["OLA-VLM"], seconds["LLaVA + words"]
        )
        print(f"OLA-VLM over LLaVA with as long a prompt: {own:.3f}", flush=True)
    if args.json is not None:
        write_json(args.json, stored)


if __name__ == "__main__":
    main()
