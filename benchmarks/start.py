"""The start of a run: a rank's peak memory over the weights that it keeps. `python benchmarks/start.py`

A made-up Llama of about a billion parameters, stored in bf16, a small tower and the paper's tasks: built from parts,
and loaded from the checkpoint that this gives, each in bf16 (the files' type) and in fp32, in a process of its own.
Peak memory is the process' resident set at its largest, without what Python and its libraries take before. All weights
are read in the end: those that were only mapped from their file would not count otherwise. No GPU is needed; it takes
some ten gigabytes of memory and of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ola_vlm.configuration_ola_vlm import default_tasks
from ola_vlm.train import load_model
from ola_vlm.training.arguments import OlaVlmArguments

# 61 million parameters a layer; with 16 layers and the vocabulary about a billion.
LANGUAGE_MODEL = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 4}


def memory(field: str) -> int:
    """Bytes of this process, of Linux's /proc: VmRSS, now, or VmHWM, at most."""
    # A line is `VmHWM:    123456 kB`.
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def write_parts(folder: Path, layers: int, vocab_size: int) -> int:
    """The made-up parts; returns the language model's parameters."""
    from tokenizers import Tokenizer, models

    config = LlamaConfig(**LANGUAGE_MODEL, num_hidden_layers=layers, vocab_size=vocab_size)
    # Made without memory, then allocated in bf16 at once: a fp32 model first would take twice as much.
    with torch.device("meta"):
        language_model = LlamaForCausalLM(config).to(torch.bfloat16)
    language_model.to_empty(device="cpu")
    for parameter in language_model.parameters():
        parameter.data.normal_(std=0.02)
    # A folder as of a published model: weights, configuration and tokenizer.
    language_model.save_pretrained(folder / "language_model")
    words = {f"word{i}": i for i in range(vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word0")), unk_token="word0", eos_token="word1"
    )
    tokenizer.save_pretrained(folder / "language_model")
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=336, patch_size=14))
    tower.save_pretrained(folder / "vision_tower")
    return sum(parameter.numel() for parameter in language_model.parameters())


def measure(folder: Path, source: str, dtype: str, save: bool) -> dict[str, float]:
    """In this process: bytes of the weights kept, and of the peak above what was there before."""
    options = {"output_dir": str(folder / "run"), "dtype": dtype, "use_cpu": True, "report_to": "none"}
    if source == "parts":
        options["vision_tower"] = str(folder / "vision_tower")
        options["language_model"] = str(folder / "language_model")
        options["tasks"] = [{**task, "layers": [1]} for task in default_tasks()]
    else:
        options["checkpoint"] = str(folder / "checkpoint")
    args = OlaVlmArguments(**options)
    # Python and libraries are loaded by now, and no weight is.
    before = memory("VmRSS")
    # `load_model` is what `ola-vlm train` calls at a run's start.
    model, processor = load_model(args)
    for parameter in model.parameters():
        # Reads it: a weight that is mapped from its file takes no memory until then.
        parameter.detach().sum()
    peak = memory("VmHWM") - before
    # After the measurement: the checkpoint that the other two runs load.
    if save:
        model.save_pretrained(folder / "checkpoint")
        processor.save_pretrained(folder / "checkpoint")
    kept = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"kept": kept, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="of the language model, 61 million parameters each")
    parser.add_argument("--vocab_size", type=int, default=32001)
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "SOURCE", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        folder, source, dtype = args.measure
        # One of the four runs writes the checkpoint, in the type that the parts have.
        save = source == "parts" and dtype == "bfloat16"
        print(json.dumps(measure(Path(folder), source, dtype, save)))
        return
    with tempfile.TemporaryDirectory() as folder:
        count = write_parts(Path(folder), args.layers, args.vocab_size)
        print(f"a language model of {count:,} parameters, stored in bf16 (torch {torch.__version__})\n")
        print(f"{'from':<12}{'kept in':<10}{'weights kept, GB':>18}{'peak, GB':>10}{'ratio':>8}")
        for source in ("parts", "checkpoint"):
            for dtype in ("bfloat16", "float32"):
                # A process each: the peak of one would hide that of the next.
                command = [sys.executable, __file__, "--measure", folder, source, dtype]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                sizes = f"{found['kept'] / 1e9:>18.2f}{found['peak'] / 1e9:>10.2f}"
                print(f"{source:<12}{dtype:<10}{sizes}{found['peak'] / found['kept']:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
