"""Processor time of one question in a new process: `ola-vlm chat CHECKPOINT IMAGE QUESTION` against plain transformers
code that does the same, and of every command's --help.

    python benchmarks/one_shot.py [--rounds 5] [--json FILE]

The checkpoint is the shipped miniature, exported as plain LLaVA, so that both load the same classes. Processes take
turns, one thread each; user and system time are added.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ola_vlm.commands.table import COMMANDS
from ola_vlm.files.writing import write_json
from ola_vlm.recipes.miniature import WEIGHTS

SCENE = Path(__file__).parents[1] / "docs" / "scene.png"
QUESTION = "which object is closer to the camera ? (A) red object (B) blue object"
CLI = [sys.executable, "-m", "ola_vlm.cli"]
# What a user of transformers would write; greedy and with the same limit as `ola-vlm chat`.
PLAIN = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, image, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
content = [{"type": "image", "image": Image.open(image).convert("RGB")}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
ids = model.generate(**inputs.to(model.device, model.dtype), do_sample=False, max_new_tokens=256)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def processor_seconds(command: list[str]) -> float:
    """User and system time of a process that ends well."""
    # Offline: no time is spent on asking the Hub for newer files.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Of all children that have ended: the difference is this one's, as one runs at a time.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are stored, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain_llava = str(Path(folder) / "llava")
        # Exported, it is a plain LLaVA: both commands load transformers' own class.
        subprocess.run([*CLI, "export", str(WEIGHTS / "llava"), plain_llava], check=True, capture_output=True)
        asked = [plain_llava, str(SCENE), QUESTION]
        commands = {
            "ola-vlm chat": [*CLI, "chat", *asked],
            "plain transformers": [sys.executable, "-c", PLAIN, *asked],
        }
        for command in commands.values():
            # Once untimed: libraries and weights are then in the page cache for both.
            processor_seconds(command)
        seconds = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                seconds[name].append(processor_seconds(command))
    for name, values in seconds.items():
        print(f"{name:<20} {statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f})")
    # Round by round: what else the machine does changes both.
    ratios = [ours / plain for ours, plain in zip(*seconds.values(), strict=True)]
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    # Once each: a command's help imports little, and takes a tenth of a second.
    helps = {name: processor_seconds([*CLI, name, "--help"]) for name in COMMANDS}
    slowest = max(helps, key=lambda name: helps[name])
    print(f"--help: {min(helps.values()):.2f} to {helps[slowest]:.2f} s ({slowest})")
    if args.json is not None:
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        limits = {"shortest": min(helps.values()), "longest": helps[slowest]}
        write_json(args.json, {"seconds": medians, "ratio": statistics.median(ratios), "help_seconds": limits})


if __name__ == "__main__":
    main()
