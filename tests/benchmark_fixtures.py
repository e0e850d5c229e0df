"""Every benchmark's files in its own schema, made from a few scenes of the miniature."""

import base64
import csv
import io
import json
from functools import cache
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ola_vlm.world import language, render

SCENES = 6


@cache
def scenes() -> tuple[list[Image.Image], list[dict], np.ndarray]:
    """Images, a question of each task for every scene that has one, depths (S, H, W)."""
    sampled = render.sample_scenes(SCENES, 7)
    arrays = render.render_scenes(sampled, 7)
    asked = [q | {"scene": i} for i in range(SCENES) for q in _one_a_task(language.questions(sampled, i))]
    return [Image.fromarray(image) for image in arrays["image"]], asked, arrays["depth"]


def _one_a_task(questions: list[dict]) -> list[dict]:
    return list({question["task"]: question for question in questions}.values())


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(str(path))


def cvbench_rows() -> list[dict]:
    images, asked, _ = scenes()
    rows = []
    for n, q in enumerate(asked):
        flat = q["task"] in ("count", "relation")
        row = {"idx": n, "type": "2D" if flat else "3D", "task": q["task"].capitalize(), "image": images[q["scene"]]}
        row |= {"choices": q["choices"], "answer": q["answer"], "prompt": q["question"]}
        row["filename"] = f"img/{row['type']}/{q['task']}/{n}.png"
        rows.append(row | {"source": ("ADE20K", "COCO")[n % 3 == 0] if flat else "Omni3D"})
    return rows


def cvbench(folder: Path) -> None:
    for kind in ("2D", "3D"):
        write_parquet(folder / f"test_{kind.lower()}.parquet", [row for row in cvbench_rows() if row["type"] == kind])


def cvbench_older(folder: Path) -> None:
    """test.jsonl and img/."""
    lines = []
    for row in cvbench_rows():
        image = row.pop("image")
        (folder / row["filename"]).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / row["filename"])
        lines.append(json.dumps(row) + "\n")
    (folder / "test.jsonl").write_text("".join(lines))


def mmstar(folder: Path) -> None:
    images, asked, _ = scenes()
    categories = ["coarse perception", "math"]
    rows = []
    for n, q in enumerate(asked):
        options = ", ".join(f"{letter}: {choice}" for letter, choice in zip("ABCD", q["choices"], strict=False))
        row = {"index": n, "question": f"{q['question'].split(' (A)')[0]}\nOptions: {options}"}
        row |= {"image": images[q["scene"]], "answer": q["answer"][1], "category": categories[n % 2]}
        rows.append(row | {"l2_category": f"l2 {n % 2}", "meta_info": {"source": "world", "split": "val"}})
    write_parquet(folder / "mmstar.parquet", rows)


def realworldqa(folder: Path) -> None:
    images, asked, _ = scenes()
    rows = []
    for n, q in enumerate(asked):
        text, options = q["question"].split(" (A)")[0], list(zip("ABCD", q["choices"], strict=False))
        if n % 3:
            lines = "\n".join(f"{letter}. {choice}" for letter, choice in options)
            only = "Please answer directly with only the letter of the correct option and nothing else."
            text, answer = f"{text}\n\n{lines}\n{only}", q["answer"][1]
        else:
            text += "\nPlease answer directly with a single word or number."
            answer = dict(options)[q["answer"][1]].capitalize()
        rows.append({"image": images[q["scene"]], "question": text, "answer": answer})
    for part in range(2):
        write_parquet(folder / "data" / f"test-0000{part}-of-00002.parquet", rows[part * 5 : 5 + part * len(rows)])


def okvqa(folder: Path) -> None:
    images, asked, _ = scenes()
    rows = []
    for n, q in enumerate(asked):
        right, *wrong = sorted(
            q["choices"], key=lambda choice, q=q: q["choices"].index(choice) != "AB".find(q["answer"])
        )
        answers = [right] * (10 - 3 * (n % 3)) + [wrong[0]] * (3 * (n % 3))
        row = {"question_id": f"{n}7", "image": images[q["scene"]], "question": q["question"].split(" (A)")[0] + "?"}
        rows.append(row | {"answers": answers, "question_type": f"type {n % 2}", "answer_type": "other"})
    write_parquet(folder / "data" / "val2014-00000-of-00001.parquet", rows)


def mmvp(folder: Path) -> None:
    images = scenes()[0]
    (folder / "MMVP Images").mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Index", "Question", "Options", "Correct Answer"])
        for index in (*range(1, 5), 99, 100):
            images[index % SCENES].save(folder / "MMVP Images" / f"{index}.jpg")
            answer = "(a)" if index % 2 else "(b)"
            writer.writerow([index, "Is the cube near, or far?", "(a) Near (b) Far away", answer])


def da2k(folder: Path) -> dict[str, np.ndarray]:
    """annotations.json with the closer point first or second at random; returns the true inverse depths by path."""
    _, _, depth = scenes()
    rng, annotations = np.random.default_rng(0), {}
    truth = {f"images/{('indoor', 'outdoor')[i % 2]}/{i // 2}.jpg": 1 / depth[i] for i in range(SCENES)}
    for path, inverse in truth.items():
        annotations[path] = []
        for _ in range(5):
            a, b = rng.integers(0, render.SIZE, (2, 2)).tolist()
            if inverse[tuple(a)] != inverse[tuple(b)]:
                closer = "point1" if inverse[tuple(a)] > inverse[tuple(b)] else "point2"
                annotations[path].append({"point1": a, "point2": b, "closer_point": closer})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return truth


def some_questions(count: int) -> list[dict]:
    """One about left and right first."""
    return sorted(scenes()[1], key=lambda q: q["choices"][-1] != "right")[:count]


def blink(folder: Path) -> None:
    images = scenes()[0]
    for task in ("Counting", "Jigsaw"):
        rows = []
        for n, q in enumerate(some_questions(4)):
            image = images[q["scene"]]
            row = {"idx": f"val_{task}_{n}", "sub_task": task, "question": "?", "image_1": image}
            row["image_2"] = image if task == "Jigsaw" else None
            row |= {"image_3": None, "image_4": None, "choices": q["choices"], "answer": q["answer"]}
            rows.append(row | {"prompt": q["question"]})
        path = folder / task / "val-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        data = datasets.Dataset.from_list(rows)
        for name in ("image_1", "image_2", "image_3", "image_4"):
            data = data.cast_column(name, datasets.Image())
        data.to_parquet(str(path))


def _base64(image: Image.Image) -> str:
    image.save(buffer := io.BytesIO(), "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def three_dsr_rows(variants: tuple[str, ...]) -> list[dict]:
    """VLMEvalKit's form: an image that an earlier row has is the index of that row."""
    images = scenes()[0]
    rows = []
    for n, q in enumerate(some_questions(3)):
        first = len(rows)
        for variant in variants:
            image = _base64(images[q["scene"]]) if len(rows) == first else str(first)
            row = {"index": len(rows), "image": image, "question": q["question"].split(" (A)")[0] + "?"}
            row |= dict.fromkeys("ABCD", "") | dict(zip("ABCD", q["choices"], strict=False))
            row["answer"] = q["answer"][1]
            row["category"] = ("height_higher", "multi_object_facing")[n % 2]
            rows.append(row | {"qid": f"Q{n}{variant}"})
    return rows


def _tsv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def three_dsr(folder: Path) -> None:
    _tsv(folder / "3dsrbench_v1_vlmevalkit_circular.tsv", three_dsr_rows(("", "-1", "-flip", "-flip-1")))


def three_dsr_vanilla(folder: Path) -> None:
    _tsv(folder / "3dsrbench_v1_vlmevalkit.tsv", three_dsr_rows(("", "-flip")))


def vstar(folder: Path) -> None:
    images, asked, _ = scenes()
    rows = []
    for n, q in enumerate(asked):
        options = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", q["choices"], strict=False))
        row = {"image": images[q["scene"]], "text": f"{q['question'].split(' (A)')[0]}?\n{options}"}
        category = ("direct_attributes", "relative_position")[n % 2]
        rows.append(row | {"label": q["answer"][1], "category": category, "question_id": f"{n}"})
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)


WRITERS = {
    "miniature": cvbench_older,
    "cvbench": cvbench,
    "mmstar": mmstar,
    "realworldqa": realworldqa,
    "okvqa": okvqa,
    "mmvp": mmvp,
    "blink": blink,
    "3dsrbench": three_dsr,
    "3dsrbench_vanilla": three_dsr_vanilla,
    "vstar": vstar,
}
