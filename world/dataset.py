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
from ..files.strangers import read_finished
from ..files.writing import save_figure, write_json, write_whole
from ..targets.images import open_image
from . import language, render

# Scenes of each split.
SIZES = {"train": 6000, "validation": 600, "test": 1400}
# Of each split's scenes. 103 is left out: settings were chosen on its scenes, so they can't test (docs/dev/LOG.md).
SEEDS = {"train": 101, "validation": 102, "test": 104}
# Of each task.
QUESTIONS = {"validation": 144, "test": 400}
# To try the chain: its numbers mean nothing.
SHRUNK_SIZES = {"train": 48, "validation": 24, "test": 320}
SHRUNK_QUESTIONS = {"test": 24}
# A color for each class of the masks.
PALETTE = np.array([(0.75, 0.85, 0.95), (0.6, 0.55, 0.5), *render.COLORS.values()])
# Questions with answers an image in instruction tuning.
TURNS = 8


def llava_row(name: str, turns: list[tuple[str, str]], image: str | None = None) -> dict:
    """A row of LLaVA's JSON; the image stands before the first question."""
    chat = []
    for question, answer in turns:
        chat.append({"from": "human", "value": question})
        chat.append({"from": "gpt", "value": answer})
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

    images/<split>_<i>.png; <split>.safetensors (depth fp16 meters, mask uint8, scene.*); pretrain.json and
    finetune.json (LLaVA's format); <split>_questions.json (``id, image, question, choices, answer, task``);
    contact_sheet.png. Nothing is done again if world.json is there with the same sizes and differences; ValueError if
    it has others.
    """
    asked = describe(sizes, questions)
    done = folder / "world.json"
    checks = read_finished(done)
    # One without it is damaged, and made again.
    if checks is not None and "asked" in checks:
        # The images of two worlds have the same names: one would overwrite the other's.
        if checks["asked"] != asked:
            raise ValueError(f"{folder} has a world of another size or of other questions: choose another --out")
        return checks
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes = {}
    # Each split's images, exact depth and masks; and the rows to train on, or the questions.
    for split, count in sizes.items():
        scenes[split], arrays = render.make_scenes(count, SEEDS[split], desc=f"rendering {split}")
        for i, image in enumerate(tqdm(arrays["image"], desc=f"writing {split}", unit="image")):
            # The lowest compression: thousands of small files are written faster.
            Image.fromarray(image).save(folder / "images" / f"{split}_{i:05d}.png", compress_level=1)
        # float16 has steps of at most 1.6 cm up to the sky's 20 m.
        stored = {"depth": arrays["depth"].astype(np.float16), "mask": arrays["mask"]}
        render.save_scenes(folder / f"{split}.safetensors", scenes[split], stored)
        if split == "train":
            _write_training_rows(folder, scenes[split])
        elif split in questions:
            _write_questions(folder, split, scenes[split], questions[split])
    checks = {"asked": asked, **check(folder, scenes)}
    contact_sheet(folder)
    # Last: with it the world is whole.
    write_json(done, checks)
    return checks


def _write_training_rows(folder: Path, scenes: render.Scenes) -> None:
    """pretrain.json (captions) and finetune.json (conversations)."""
    rng = np.random.default_rng(5)
    # All captions are drawn before the first conversation: with another order the same seed gives other data.
    captions = []
    for i in range(len(scenes)):
        caption = language.caption(scenes, i, rng)
        captions.append([("describe the image .", caption)])
    chats = []
    for i in range(len(scenes)):
        asked = language.conversation(scenes, i, TURNS, rng)
        chats.append([(question["question"], question["answer"]) for question in asked])
    for stage, turns_of_images in {"pretrain": captions, "finetune": chats}.items():
        rows = []
        for i, turns in enumerate(turns_of_images):
            name = f"train_{i:05d}"
            rows.append(llava_row(name, turns, f"{name}.png"))
        write_whole(folder / f"{stage}.json", json.dumps(rows))


def _write_questions(folder: Path, split: str, scenes: render.Scenes, per_task: int) -> None:
    rows = language.balanced(scenes, per_task, SEEDS[split])
    for n, row in enumerate(rows):
        row["id"] = f"{split}_{n:05d}"
        row["image"] = f"{split}_{row['scene']:05d}.png"
    write_whole(folder / f"{split}_questions.json", json.dumps(rows))


def referents(scenes: render.Scenes, arrays: dict) -> np.ndarray:
    """(S, 3, 3): image column and row of the center and root of the area of the red, blue and green objects, as
    seen, in image widths."""
    # The pixels' centers, in image widths.
    grid = (np.arange(render.SIZE) + 0.5) / render.SIZE
    # Classes: sky, floor, and then the colors, the referents' first.
    seen = arrays["mask"][..., None] == 2 + np.arange(len(render.REFERENTS))
    # At least 1: an object that can't be seen would divide by 0.
    area = seen.sum((1, 2)).clip(min=1)
    # Means over an object's pixels: (S, W, 3) -> (S, 3, W) @ (W,) -> (S, 3); rows likewise, over H.
    column = seen.sum(1).transpose(0, 2, 1) @ grid / area
    row = seen.sum(2).transpose(0, 2, 1) @ grid / area
    size = np.sqrt(area) / render.SIZE
    return np.stack([column, row, size], -1)


def _features(row: dict, seen: np.ndarray) -> np.ndarray:
    """Positions and sizes of a question's referents, in the order of the question."""
    # "red object" -> "red"
    named = [choice.split()[0] for choice in row["choices"]]
    if row["task"] == "distance":
        # "which object is closer to the red object ? (A) ..." -> "red"
        (before, _, _) = row["question"].partition(" object ?")
        anchor = before.split()[-1]
        named.insert(0, anchor)
    indices = [render.REFERENTS.index(color) for color in named]
    return seen[row["scene"], indices].ravel()


def check(folder: Path, scenes: dict[str, render.Scenes]) -> dict:
    """What can be known without seeing. ``text_only``: accuracy by task of the best possible reader of the question
    alone (each text's most frequent training answer). ``position_size``: a logistic regression on the referents'
    image positions and sizes, per task; ``position_size_pairs``: the same with all squares and products, so that
    it also knows distances in the image."""
    # The readers learn from all questions of the training scenes, and answer those of the test.
    train = []
    for i in range(len(scenes["train"])):
        train += [{"scene": i, **question} for question in language.questions(scenes["train"], i)]
    asked = {"train": train, "test": json.loads((folder / "test_questions.json").read_text())}
    seen = {split: referents(scenes[split], load_file(folder / f"{split}.safetensors")) for split in asked}
    checks = {"text_only": _text_only(asked), "position_size": {}, "position_size_pairs": {}}
    # Not relation, which an object's place in the image answers, nor count, of whose shapes it tells nothing.
    for task in ("depth", "distance"):
        features = {}
        answers = {}
        for split, rows in asked.items():
            of_task = [row for row in rows if row["task"] == task]
            features[split] = [_features(row, seen[split]) for row in of_task]
            answers[split] = [row["answer"] for row in of_task]
        for name, degree in {"position_size": 1, "position_size_pairs": 2}.items():
            model = make_pipeline(PolynomialFeatures(degree), StandardScaler(), LogisticRegression(max_iter=2000))
            model.fit(features["train"], answers["train"])
            checks[name][task] = model.score(features["test"], answers["test"])
    return checks


def _text_only(asked: dict[str, list[dict]]) -> dict[str, float]:
    """task -> the share of test questions that the most frequent training answer to their text answers."""
    counts: defaultdict[str, Counter] = defaultdict(Counter)
    for row in asked["train"]:
        counts[row["question"]][row["answer"]] += 1
    best = {text: answers.most_common(1)[0][0] for text, answers in counts.items()}
    shares = {}
    for task in language.TASKS:
        hits = [best[row["question"]] == row["answer"] for row in asked["test"] if row["task"] == task]
        shares[task] = float(np.mean(hits))
    return shares


def contact_sheet(folder: Path, count: int = 6) -> None:
    """One row of test scenes with exact depth and masks, and a question of each task; contact_sheet.png."""
    arrays = load_file(folder / "test.safetensors")
    rows = json.loads((folder / "test_questions.json").read_text())
    chosen = []
    for i in range(count):
        task = language.TASKS[i % len(language.TASKS)]
        of_task = [row for row in rows if row["task"] == task]
        # Some of the questions, far from each other.
        chosen.append(of_task[i * 7 % len(of_task)])
    figure, axes = plt.subplots(3, count, figsize=(2.7 * count, 9.2), layout="constrained")
    for column, row in enumerate(chosen):
        i = row["scene"]
        # A reversed color map ("_r"): near things are bright.
        depth = axes[1, column].imshow(arrays["depth"][i].astype(float), cmap="viridis_r", vmin=3, vmax=render.SKY)
        axes[0, column].imshow(open_image(folder / "images" / row["image"]))
        axes[2, column].imshow(PALETTE[arrays["mask"][i]])
        title = f"{row['task']}: {row['question']} -> {row['answer']}"
        axes[0, column].set_title(textwrap.fill(title, 30), fontsize=10)
    for name, axes_of_row in zip(("image", "depth", "semantic mask"), axes, strict=True):
        axes_of_row[0].set_ylabel(name, fontsize=12)
        for axis in axes_of_row:
            axis.set(xticks=[], yticks=[])
    figure.colorbar(depth, ax=axes[1, :], label="meters (20: sky)")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in PALETTE]
    figure.legend(handles, render.CLASSES, loc="outside lower center", ncols=len(PALETTE), fontsize=10)
    save_figure(figure, folder / "contact_sheet.png", dpi=75)
    plt.close(figure)


def write_questions(folder: Path, scenes: int = SIZES["test"], per_task: int = QUESTIONS["test"]) -> None:
    """The test split's questions alone, in CV-Bench's form: `folder`/test.jsonl and the images it names. They are the
    study's own, unless there are fewer `scenes`. ValueError if those are too few for `per_task` questions."""
    sampled, arrays = render.make_scenes(scenes, SEEDS["test"], desc="rendering test scenes")
    asked = language.balanced(sampled, per_task, SEEDS["test"])
    # Task -> CV-Bench's name for its kind: questions about the image plane, and about space.
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
