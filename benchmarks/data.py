"""The data pipeline alone: rows of LLaVA's JSON -> batches at 336 px. `python benchmarks/data.py`

Photographs of 640 x 427 (scikit-learn's two, cropped and flipped, as JPEG) with a caption each. In turn, in one
process: our collator; transformers' own way, `processor.apply_chat_template` with the opened images; our loader with
as many workers as cores. Then where the collator's time goes, what checking the rows before a run costs, and what a
JSON file with a tenth of LLaVA-665K's rows costs in memory: its rows' positions, and for comparison all its rows.
"""

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from ola_vlm.configuration_ola_vlm import default_tasks, normalize_task
from ola_vlm.convert.parts import build_processor
from ola_vlm.recipes.miniature import WEIGHTS
from ola_vlm.recipes.paper import CHAT_TEMPLATES
from ola_vlm.training.check import check_rows
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.rows import JsonRows, load_rows, open_source

BATCH = 16


def write_data(folder: Path, count: int) -> Path:
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        # Crops of 600 x 387 from up to (39, 39) on: they stay inside the photographs' 640 x 427.
        left, top = rng.integers(0, 40, 2)
        photo = photos[i % 2].crop((left, top, left + 600, top + 387)).resize((640, 427))
        if i % 4 < 2:
            photo = ImageOps.mirror(photo)
        photo.save(folder / f"{i}.jpg", quality=90)
        turns = [("human", "<image>\nRender a clear and concise summary of the photo."), ("gpt", "the red cube " * 15)]
        samples.append({"image": f"{i}.jpg", "conversations": [{"from": who, "value": text} for who, text in turns]})
    (folder / "data.json").write_text(json.dumps(samples))
    return folder / "data.json"


def library_way(processor, rows: list[dict]) -> dict:
    """What `apply_chat_template` makes of the same rows."""
    chats = []
    for row in rows:
        # The library wants the opened image in its place among the content's parts.
        images = iter(map(open_source, row["images"]))
        chat = []
        for message in row["messages"]:
            content = []
            for part in message["content"]:
                if part["type"] == "image":
                    part = {**part, "image": next(images)}
                content.append(part)
            chat.append({**message, "content": content})
        chats.append(chat)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    padding = {"padding": True, "return_tensors": "pt"}
    # With the assistant's mask, of which labels are made: the collator makes labels, too.
    return processor.apply_chat_template(chats, **options, processor_kwargs=padding)


def write_text_rows(path: Path, count: int) -> None:
    """Rows of 1.2 kB: several turns, captions and single words."""
    rng = np.random.default_rng(0)
    words = Path(__file__).read_text().split()
    with path.open("w") as file:
        for i in range(count):
            turns = []
            for k in range(rng.integers(1, 8)):
                # Questions of 12 words; answers from a single word to more than a caption.
                question, answer = (" ".join(rng.choice(words, n)) for n in (12, rng.choice([1, 3, 20, 60])))
                turns += [
                    {"from": "human", "value": "<image>\n" * (k == 0) + question},
                    {"from": "gpt", "value": answer},
                ]
            image = f"coco/train2017/{i:012d}.jpg"
            (path.parent / image).parent.mkdir(parents=True, exist_ok=True)
            # Empty: a row's check looks whether the file is there, not what is in it.
            (path.parent / image).touch()
            row = json.dumps({"id": str(i), "image": image, "conversations": turns})
            # Row by row: memory that a list of all rows leaves behind would hide what reading the file takes.
            file.write(f"{',' if i else '['}\n{row}")
        file.write("\n]")


def megabytes_of(make) -> tuple[float, object]:
    # What is garbage already would be freed while `make` runs, and make its size look smaller.
    gc.collect()
    before = psutil.Process().memory_info().rss
    made = make()
    gc.collect()
    return (psutil.Process().memory_info().rss - before) / 1e6, made


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text_rows", type=int, default=66_500)
    args = parser.parse_args()
    # One thread here: the loader's workers have one each, too.
    torch.set_num_threads(1)
    cores = os.cpu_count()
    print(
        f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}, 1 thread"
    )
    # All that building a processor asks of a tower: no weights are needed.
    tower = SimpleNamespace(image_size=336, patch_size=14)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "language_model")
    # Sizes of the paper's language model: 4096 wide, 32 layers.
    tasks = [normalize_task(task, 4096, 32) for task in default_tasks()]
    processor = build_processor(tokenizer, tower, tasks, chat_template=CHAT_TEMPLATES["llama3"])
    collator = OlaVlmCollator(processor)
    with tempfile.TemporaryDirectory() as folder:
        rows = load_rows(str(write_data(Path(folder), args.images)))
        batches = [range(i, min(i + BATCH, len(rows))) for i in range(0, len(rows), BATCH)]
        loader = DataLoader(rows, BATCH, collate_fn=collator, num_workers=cores, persistent_workers=True)

        def of_batches(function: Callable[[list], object]) -> list:
            return [function([rows[i] for i in batch]) for batch in batches]

        # Each of them makes all batches of the data once.
        variants = {
            "collator": lambda: of_batches(collator),
            "apply_chat_template": lambda: of_batches(partial(library_way, processor)),
            f"loader, {cores} workers": lambda: list(loader),
        }
        # The workers start once and stay (`persistent_workers`): their start is no part of a round.
        list(loader)
        rates = {name: [] for name in variants}
        for _ in range(args.rounds):
            for name, run in variants.items():
                rates[name].append(args.images / seconds(run))
        # Ratios round by round, then their median: the machine's load in a round is the same for all.
        base = np.array(rates["collator"])
        for name, found in rates.items():
            ratio = np.median(np.array(found) / base)
            print(f"{name:<24} {np.median(found):7.1f} images/s   {ratio:5.2f} of the collator's")

        # The collator's work in its parts; each part gets its input ready-made, so that it is timed alone.
        images = [open_source(rows[i]["images"][0]) for i in range(args.images)]
        row_list = [rows[i] for i in range(len(rows))]
        image_batches = []
        for batch in batches:
            image_batches.append([images[i] for i in batch])
        parts = {
            "reading the row": lambda: [rows[i] for i in range(len(rows))],
            "JPEG -> RGB": lambda: [open_source(row["images"][0]) for row in row_list],
            "square, 336 px, tensor": lambda: list(map(collator._pixel_values, image_batches)),
            "text, tokens, labels": lambda: [collator.encode(row) for row in row_list],
        }
        for name, run in parts.items():
            spent = np.median([seconds(run) for _ in range(args.rounds)])
            print(f"  {name:<24} {1000 * spent / args.images:6.2f} ms an image")
        # Without decoding, a check reads rows and tokens, and whether the images are there.
        fast, whole = (args.images / seconds(check_rows, rows, collator, decode) for decode in (False, True))
        print(f"checking rows            {fast:7.0f} rows/s before a run, {whole:.0f} with decoding")

        path = Path(folder) / "rows.json"
        write_text_rows(path, args.text_rows)
        print(f"a JSON file of {args.text_rows} rows, {path.stat().st_size / 1e6:.0f} MB")
        for name, make in {
            "positions": lambda: JsonRows(path),
            "all rows": lambda: json.loads(path.read_bytes()),
        }.items():
            start = time.perf_counter()
            size, made = megabytes_of(make)
            spent = time.perf_counter() - start
            # A sample of the rows, spread over the file. `made=made`: the function must not see the next round's.
            read = seconds(lambda made=made: [made[i] for i in range(0, len(made), 37)]) / len(made) * 37
            print(f"  {name:<24} {size:6.0f} MB, read in {spent:.1f} s, {1e6 * read:.0f} us a row")
            # Or the next way's memory would be counted on top of it.
            del made
        text_rows = load_rows(str(path))
        for name in ("first", "second"):
            start = time.process_time()
            text_rows.sources()
            spent = time.process_time() - start
            print(f"  {name} pass for its images: {1e6 * spent / len(text_rows):.1f} us a row of processor time")


if __name__ == "__main__":
    main()
