# /// script
# requires-python = ">=3.11"
# dependencies = ["ola-vlm[train]"]
#
# # ola-vlm is on no package index: it comes from the folder above this file. Where there is none, as on HF Jobs, write
# # ola-vlm = { git = "https://..." } with the address of a repository that has it.
# [tool.uv.sources]
# ola-vlm = { path = ".." }
# ///
"""docs/tutorial.md as one file: rows are checked, an adapter is trained, asked and compared, merged, and pushed.

    uv run docs/your_images.py --checkpoint CHECKPOINT --data ROWS --questions QUESTIONS --out FOLDER

makes an environment for itself; `python docs/your_images.py` takes the one that is there. Each step is a command of
`ola-vlm`, printed before it runs; the last, `push`, wants --push_to ME/NAME. Fields of training that aren't named
below may follow, as in `ola-vlm train --recipe lora`: --learning_rate 1e-3.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path


def run(*words: object) -> None:
    """A command of ola-vlm, in a process of its own, so that its memory is free again for the next."""
    command = [sys.executable, "-m", "ola_vlm.cli", *map(str, words)]
    print("\n$ ola-vlm", shlex.join(command[3:]), flush=True)
    status = subprocess.run(command).returncode
    if status != 0:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="the model to begin with: a folder, or a name on the Hub")
    parser.add_argument("--data", required=True, help="rows to train on: docs/data.md has the forms")
    parser.add_argument("--questions", type=Path, required=True, help="a file of questions with their answers")
    parser.add_argument("--image_folder", type=Path, help="of rows and questions; default: the questions' own")
    parser.add_argument("--out", type=Path, required=True, help="for everything that is written")
    parser.add_argument("--push_to", metavar="ME/NAME", help="the Hub's repository, after `hf auth login`")
    args, fields = parser.parse_known_args()

    images = args.image_folder or args.questions.parent
    rows = ["--data", args.data, "--image_folder", images, "--checkpoint", args.checkpoint]
    ask = ["--benchmark", args.questions, "--data", images]
    adapter = args.out / "adapter"
    merged = args.out / "merged"
    before = args.out / "before"
    after = args.out / "after"

    run("check-data", *rows)
    run("eval", args.checkpoint, *ask, "--out", before)
    run("train", "--recipe", "lora", *rows, "--output_dir", adapter, *fields)
    run("eval", adapter, *ask, "--out", after)
    run("compare", before, after, "--out", args.out / "comparison")
    run("merge", adapter, merged)
    if args.push_to:
        run("push", merged, args.push_to, "--results", after)
    print(f"\nNext: ola-vlm chat {merged}")


if __name__ == "__main__":
    main()
