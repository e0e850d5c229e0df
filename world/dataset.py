"""The world on disk, in the formats that real data has: PNG images, LLaVA JSON, multiple-choice questions; and the
checks that its questions must be *seen* to be answered."""

import json
import textwrap
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from tqdm import tqdm

from ..commands.running import command, tell
from ..targets.files import read_object, save_figure, write_json, write_whole
from ..targets.images import open_image
from . import language, render

SIZES = {"train": 6000, "validation": 600, "test": 1400}
SEEDS = {"train": 101, "validation": 102, "test": 104}
QUESTIONS = {"validation": 144, "test": 400}  # a task
# To try the chain: its numbers mean nothing.
SHRUNK_SIZES = {"train": 48, "validation": 24, "test": 320}
SHRUNK_QUESTIONS = {"test": 24}
PALETTE = np.array([(0.75, 0.85, 0.95), (0.6, 0.55, 0.5), *render.COLORS.values()])  # a color for each class
TURNS = 8  # question-answer turns an image in instruction tuning


def llava_row(name: str, turns: list[tuple[str, str]], image: str | None = None) -> dict:
    """A row of LLaVA's JSON; the image stands before the first question."""
    chat = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    if image is None:
        return {"id": name, "conversations": chat}
    chat[0]["value"] = "<image>\n" + chat[0]["value"]
    return {"id": name, "image": image, "conversations": chat}


def describe(sizes: dict[str, int], questions: dict[str, int]) -> dict:
    """What makes a world another one: how many scenes and questions, and how much the objects asked about differ."""
    differences = {name: list(within) for name, within in asdict(language.ASKED).items()}
    return {"sizes": sizes, "questions": questions, "differences": differences}


def write_world(folder: Path, sizes: dict[str, int] = SIZES, questions: dict[str, int] = QUESTIONS) -> dict:
    """Render all splits into ``folder``; returns the checks, which are also in ``world.json``.

    images/<split>_<i>.png; <split>.safetensors (depth fp16 metres, mask uint8, scene.*); pretrain.json and
    finetune.json (LLaVA's format); <split>_questions.json (``id, image, question, choices, answer, task``);
    contact_sheet.png. Nothing is done again if world.json is there with the same sizes and differences.
    """
    asked = describe(sizes, questions)
    done = folder / "world.json"
    if done.exists() and (checks := json.loads(done.read_text()))["asked"] == asked:
        return checks
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, scenes = np.random.default_rng(5), {}
    for split, count in sizes.items():
        scenes[split], arrays = render.make_scenes(count, SEEDS[split], desc=f"rendering {split}")
        for i, image in enumerate(tqdm(arrays["image"], desc=f"writing {split}", unit="image")):
            Image.fromarray(image).save(folder / "images" / f"{split}_{i:05d}.png", compress_level=1)
        stored = {"depth": arrays["depth"].astype(np.float16), "mask": arrays["mask"]}
        render.save_scenes(folder / f"{split}.safetensors", scenes[split], stored)
        if split == "train":
            captions = [[("describe the image .", language.caption(scenes[split], i, rng))] for i in range(count)]
            chats = [language.conversation(scenes[split], i, TURNS, rng) for i in range(count)]
            chats = [[(turn["question"], turn["answer"]) for turn in chat] for chat in chats]
            for name, turns in (("pretrain", captions), ("finetune", chats)):
                names = [f"{split}_{i:05d}" for i in range(count)]
                rows = [llava_row(name, row, f"{name}.png") for name, row in zip(names, turns, strict=True)]
                write_whole(folder / f"{name}.json", json.dumps(rows))
        elif split in questions:
            rows = language.balanced(scenes[split], questions[split], SEEDS[split])
            for n, row in enumerate(rows):
                row.update(id=f"{split}_{n:05d}", image=f"{split}_{row['scene']:05d}.png")
            write_whole(folder / f"{split}_questions.json", json.dumps(rows))
    checks = {"asked": asked, **check(folder, scenes)}
    contact_sheet(folder)
    write_json(done, checks)
    return checks


def referents(scenes: render.Scenes, arrays: dict) -> np.ndarray:
    """(S, 3, 3): image column and row of the center and root of the area of the red, blue and green objects, as
    seen, in image widths."""
    grid = (np.arange(render.SIZE) + 0.5) / render.SIZE
    seen = arrays["mask"][..., None] == 2 + np.arange(len(render.REFERENTS))
    area = seen.sum((1, 2)).clip(min=1)
    column, row = seen.sum(1).transpose(0, 2, 1) @ grid / area, seen.sum(2).transpose(0, 2, 1) @ grid / area
    return np.stack([column, row, np.sqrt(area) / render.SIZE], -1)


def _features(row: dict, seen: np.ndarray) -> np.ndarray:
    """Positions and sizes of a question's referents, in the order of the question."""
    index = {color: k for k, color in enumerate(render.REFERENTS)}
    anchor = [] if row["task"] == "depth" else [row["question"].split(" object ?")[0].split()[-1]]
    named = anchor + [choice.split()[0] for choice in row["choices"]]
    return seen[row["scene"], [index[color] for color in named]].ravel()


def check(folder: Path, scenes: dict[str, render.Scenes]) -> dict:
    """What can be known without seeing. ``text_only``: accuracy by task of the best possible reader of the question
    alone (each text's most frequent training answer). ``position_size``: a logistic regression on the referents'
    image positions and sizes, per task; ``position_size_pairs``: the same with all squares and products, so that
    it also knows distances in the image."""
    asked = {
        "train": [
            {"scene": i, **q} for i in range(len(scenes["train"])) for q in language.questions(scenes["train"], i)
        ],
        "test": json.loads((folder / "test_questions.json").read_text()),
    }
    tally: defaultdict[str, Counter] = defaultdict(Counter)
    for row in asked["train"]:
        tally[row["question"]][row["answer"]] += 1
    best = {text: counts.most_common(1)[0][0] for text, counts in tally.items()}
    text_only = {
        task: float(np.mean([best[q["question"]] == q["answer"] for q in asked["test"] if q["task"] == task]))
        for task in language.TASKS
    }
    seen = {split: referents(scenes[split], load_file(folder / f"{split}.safetensors")) for split in asked}
    found = {"text_only": text_only, "position_size": {}, "position_size_pairs": {}}
    for task in ("depth", "distance"):
        rows = {
            split: list(zip(*[(_features(q, seen[split]), q["answer"]) for q in qs if q["task"] == task], strict=True))
            for split, qs in asked.items()
        }
        for name, degree in (("position_size", 1), ("position_size_pairs", 2)):
            model = make_pipeline(PolynomialFeatures(degree), StandardScaler(), LogisticRegression(max_iter=2000))
            found[name][task] = model.fit(*rows["train"]).score(*rows["test"])
    return found


def contact_sheet(folder: Path, count: int = 6) -> None:
    """One row of test scenes with exact depth and masks, and a question of each task; contact_sheet.png."""
    arrays = load_file(folder / "test.safetensors")
    rows = json.loads((folder / "test_questions.json").read_text())
    per_task = [[q for q in rows if q["task"] == task] for task in language.TASKS]
    chosen = [per_task[i % 4][i * 7 % len(per_task[i % 4])] for i in range(count)]
    figure, axes = plt.subplots(3, count, figsize=(2.7 * count, 9.2), layout="constrained")
    for column, q in enumerate(chosen):
        i = q["scene"]
        depth = axes[1, column].imshow(arrays["depth"][i].astype(float), cmap="viridis_r", vmin=3, vmax=render.SKY)
        axes[0, column].imshow(open_image(folder / "images" / q["image"]))
        axes[2, column].imshow(PALETTE[arrays["mask"][i]])
        axes[0, column].set_title(textwrap.fill(f"{q['task']}: {q['question']} -> {q['answer']}", 30), fontsize=10)
    for name, row in zip(("image", "depth", "semantic mask"), axes, strict=True):
        row[0].set_ylabel(name, fontsize=12)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    figure.colorbar(depth, ax=axes[1, :], label="metres (20: sky)")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in PALETTE]
    figure.legend(handles, render.CLASSES, loc="outside lower center", ncols=len(PALETTE), fontsize=10)
    save_figure(figure, folder / "contact_sheet.png", dpi=75)
    plt.close(figure)


def write_questions(folder: Path, scenes: int = SIZES["test"], per_task: int = QUESTIONS["test"]) -> None:
    """The test split's questions alone, in CV-Bench's form: `folder`/test.jsonl and the images it names. They are the
    study's own, unless there are fewer `scenes`. ValueError if those are too few for `per_task` questions."""
    sampled, arrays = render.make_scenes(scenes, SEEDS["test"], desc="rendering test scenes")
    asked = language.balanced(sampled, per_task, SEEDS["test"])
    kinds = {"count": "2D", "relation": "2D", "depth": "3D", "distance": "3D"}
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for i in sorted({row["scene"] for row in asked}):
        Image.fromarray(arrays["image"][i]).save(folder / "img" / f"{i:05d}.png", compress_level=1)
    lines = [
        {
            "idx": n,
            "type": kinds[row["task"]],
            "task": row["task"].capitalize(),
            "prompt": row["question"],
            "choices": row["choices"],
            "answer": row["answer"],
            "filename": f"img/{row['scene']:05d}.png",
            "source": "miniature",
        }
        for n, row in enumerate(asked)
    ]
    write_whole(folder / "test.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


@command("data")
def main(args: Namespace) -> None:
    sizes = SHRUNK_SIZES if args.shrunk else SIZES
    questions = SHRUNK_QUESTIONS if args.shrunk else QUESTIONS
    folder = args.out / "data"
    done = folder / "world.json"
    if done.exists() and read_object(done)["asked"] != describe(sizes, questions):
        raise ValueError(f"{folder} has a world of another size or of other questions: choose another --out")
    checks = write_world(folder, sizes, questions)
    for split, count in sizes.items():
        print(f"{split:<12} {count:>6} images")
    for task, share in checks["text_only"].items():
        print(f"{task:<12} {100 * share:>6.1f}% of the test questions can be answered without the image")
    recipe = "--recipe miniature_pretrain"
    if args.out != Path("runs/miniature"):  # where the recipe looks
        recipe += f" --data {folder / 'pretrain.json'} --image_folder {folder / 'images'}"
        recipe += f" --target_cache {args.out / 'targets'}"
    tell(
        f"Results: {folder} (images, pretrain.json, finetune.json, contact_sheet.png to look at)",
        f"Next: ola-vlm check-data {recipe}",
        f"then: ola-vlm train {recipe} --output_dir runs/mine",
    )
