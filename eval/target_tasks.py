"""Target tasks (the paper's Table 8): what probes are worth once the teachers decode them: `ola-vlm target-tasks`
(commands/target_tasks.py, which says what the scores are).

Each for the probes of every layer, for the model's own predictors if it has some, and as bounds for the teacher
itself, its targets decoded the same way, and the mean target.
"""

import hashlib
import json
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..commands.running import command, tell
from ..inference.checkpoints import load_checkpoint, processes, weights_state
from ..modeling_ola_vlm import OlaVlmForConditionalGeneration
from ..probing.probes import Probes, load_probes
from ..probing.states import StateReader
from ..probing.visualize import predicted_tasks, predictor_features, probe_features, statistics_of
from ..targets.encoders import (
    ENCODERS,
    DepthAnythingEncoder,
    OneFormerEncoder,
    TargetEncoder,
)
from ..targets.escapes import one_line, terminal
from ..targets.files import inside, only_one, read_finished, read_object, teachers_of_file, write_json
from ..targets.fill import make_teachers
from ..targets.images import image_files, open_image
from ..targets.statistics import TargetStatistics
from ..world import render
from .dense import (
    VOID,
    confusion_matrix,
    depth_order_correct,
    frechet_distance,
    load_da2k,
    mean_iou,
    reference_mean_iou,
)

PAIRS, RATIO = 8, 1.1  # point pairs of a scene of the miniature, whose depths differ by this ratio at least
DRAWS = 10_000  # of two points a scene, at most: a flat depth map has no such pair


def da2k_items(folder: Path) -> list[dict]:
    return [{"image": str(folder / path), "pairs": pairs} for path, pairs in load_da2k(folder).items()]


def coco_items(folder: Path) -> list[dict]:
    """COCO's panoptic val2017: panoptic_val2017.json, and folders panoptic_val2017 (masks) and val2017 (images). Its
    133 classes are numbered in the order of their ids, as OneFormer's are."""
    content = json.loads((folder / "panoptic_val2017.json").read_text(encoding="utf-8"))
    numbers = {c: i for i, c in enumerate(sorted(category["id"] for category in content["categories"]))}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    items = []
    for one in content["annotations"]:
        classes = {segment["id"]: numbers[segment["category_id"]] for segment in one["segments_info"]}
        mask = inside(folder, Path("panoptic_val2017", one["file_name"]))
        image = inside(folder, Path("val2017", names[one["image_id"]]))
        items.append({"image": str(image), "mask": (str(mask), classes)})
    return items


def miniature_items(root: Path) -> list[dict]:
    """The test scenes of a study's folder with their exact depth (as pairs of points, drawn by a fixed seed; fewer of
    a scene that hardly has any) and masks."""
    stored, rng, items = load_file(root / "data" / "test.safetensors"), np.random.default_rng(0), []
    for i, (depth, mask) in enumerate(zip(stored["depth"].astype(float), stored["mask"], strict=True)):
        pairs = []
        for _ in range(DRAWS):
            if len(pairs) == PAIRS:
                break
            a, b = rng.integers(0, render.SIZE, (2, 2))
            near, far = sorted((depth[tuple(a)], depth[tuple(b)]))
            if far > RATIO * near:
                closer = "point1" if depth[tuple(a)] < depth[tuple(b)] else "point2"
                pairs.append({"point1": a.tolist(), "point2": b.tolist(), "closer_point": closer})
        items.append({"image": str(root / "data" / "images" / f"test_{i:05d}.png"), "pairs": pairs, "mask": mask})
    return items


def read_mask(mask: np.ndarray | tuple[str, dict[int, int]]) -> np.ndarray:
    """Class indices (h, w), `VOID` where there is none."""
    if isinstance(mask, np.ndarray):
        return mask
    path, classes = mask
    colours = np.asarray(open_image(path)).astype(np.int64)
    ids, places = np.unique(colours @ [1, 256, 256**2], return_inverse=True)
    return np.array([classes.get(int(i), VOID) for i in ids])[places.reshape(colours.shape[:2])]


def to_image(maps: Tensor, size: tuple[int, int], encoder: TargetEncoder, mode: str) -> np.ndarray:
    """A map (S, S) of the teacher's square at the image's own `size` (width, height), without the square's padding."""
    width, height = size
    is_padded = encoder.view["square"] == "pad"
    whole = (max(size), max(size)) if is_padded else (height, width)
    big = F.interpolate(maps[None, None].double(), size=whole, mode=mode)[0, 0].numpy()
    top, left = ((whole[0] - height) // 2, (whole[1] - width) // 2) if is_padded else (0, 0)
    return big[top : top + height, left : left + width]


def depth_sums(maps: Tensor, images: list[Image.Image], items: list[dict], encoder: TargetEncoder) -> dict:
    sums = {"correct": 0, "pairs": 0}
    for one, image, item in zip(maps, images, items, strict=True):
        correct = depth_order_correct(to_image(one, image.size, encoder, "bilinear"), item["pairs"])
        sums = {"correct": sums["correct"] + int(correct.sum()), "pairs": sums["pairs"] + len(correct)}
    return sums


def seg_sums(maps: Tensor, images: list[Image.Image], items: list[dict], encoder: TargetEncoder) -> dict:
    sums, classes = {"confusion": 0, "iou": 0.0, "images": 0}, encoder.model.config.num_labels
    for one, image, item in zip(maps, images, items, strict=True):
        truth, guess = read_mask(item["mask"]), to_image(one, image.size, encoder, "nearest").astype(int)
        if (truth == VOID).all():
            continue
        if (truth[truth != VOID] >= classes).any():
            raise ValueError(f"a mask has class {truth[truth != VOID].max()}, the seg teacher knows {classes} classes")
        sums["confusion"] = sums["confusion"] + confusion_matrix(truth, guess, classes)
        sums["iou"] += reference_mean_iou([truth], [guess])
        sums["images"] += 1
    return sums


def depth_scores(sums: dict) -> dict[str, float]:
    return {"accuracy": sums["correct"] / sums["pairs"], "n": sums["pairs"]}


def seg_scores(sums: dict) -> dict[str, float]:
    of_images = sums["iou"] / sums["images"]
    return {"mIoU": mean_iou(sums["confusion"]), "mIoU of images": of_images, "n": sums["images"]}


# Kind of teacher -> what an image must come with, how a batch counts, what the sums say. The first score is shown.
KINDS = {DepthAnythingEncoder: ("pairs", depth_sums, depth_scores), OneFormerEncoder: ("mask", seg_sums, seg_scores)}


class Gallery:
    """Images by their embeddings, to stand in for a generator of images; features (F,) of each by `extractor`."""

    def __init__(self, sources: Sequence[str], encoder: TargetEncoder, extractor: TargetEncoder, batch_size: int = 32):
        parts, features = [], []
        starts = tqdm(range(0, len(sources), batch_size), desc="gallery", unit="batch")
        for images in (list(map(open_image, sources[i : i + batch_size])) for i in starts):
            parts.append(encoder.encode(images)[:, 0])
            features.append(extractor.encode(images)[:, 0])
        self.embeddings, self.features, self.extractor = torch.cat(parts), torch.cat(features), extractor

    def nearest(self, embeddings_NE: Tensor) -> Tensor:
        """Features (N, F) of the image whose embedding is most similar to each."""
        similarity = F.normalize(embeddings_NE, dim=-1) @ F.normalize(self.embeddings, dim=-1).T
        return self.features[similarity.argmax(1)]


def scores_of(
    items: Sequence[dict],
    teachers: dict[str, TargetEncoder],
    gallery: Gallery | None,
    embeddings: Callable[[list[Image.Image]], Iterator[tuple[str, str, Tensor | None]]],
    describe: str,
    batch_size: int = 16,
) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {row: scores}} over `items`, of tasks for which these have truth. `embeddings(images)` gives task, row
    and embeddings (N, Q, E), None for the teacher's own map."""
    sums, features, real = defaultdict(dict), defaultdict(list), []
    for start in tqdm(range(0, len(items), batch_size), desc=one_line(describe), unit="batch"):
        batch = items[start : start + batch_size]
        images = [open_image(item["image"]) for item in batch]
        if gallery is not None:
            real.append(gallery.extractor.encode(images)[:, 0])
        for task, row, found in embeddings(images):
            encoder = teachers[task]
            if type(encoder) in KINDS:
                needed, add, _ = KINDS[type(encoder)]
                if needed in batch[0]:
                    before = sums[task, row]
                    new = add(encoder.decode(found, images), images, batch, encoder)
                    sums[task, row] = {name: before.get(name, 0) + value for name, value in new.items()}
            elif gallery is not None and encoder.target_length == 1 and found is not None:
                features[task, row].append(gallery.nearest(found[:, 0].cpu()))
    scores = defaultdict(dict)
    for (task, row), total in sums.items():
        if total.get("pairs") or total.get("images"):  # else there is no truth to compare with
            scores[task][row] = KINDS[type(teachers[task])][2](total)
    for (task, row), parts in features.items():
        distance = frechet_distance(torch.cat(parts).numpy(), torch.cat(real).numpy())
        scores[task][row] = {"Frechet distance": distance, "n": sum(map(len, parts))}
    return dict(scores)


def of_teachers(teachers: dict[str, TargetEncoder], means: dict[str, Tensor]) -> Callable:
    """The upper bounds, and the lower one: the training images' mean target, which knows nothing of the image."""

    def embeddings(images):
        for task, encoder in teachers.items():
            if type(encoder) in KINDS:
                yield task, "target encoder", None
            yield task, "its targets, decoded", encoder.encode(images)
            yield task, "the mean target, decoded", means[task].expand(len(images), -1, -1)

    return embeddings


def of_model(reader: StateReader, probes: Probes, statistics: dict[str, TargetStatistics]) -> Callable:
    """Embeddings from the probes and, of an OLA-VLM, from its predictors."""
    model, sources = reader.model, {"probe": probe_features(probes, reader.model, reader.processor)}
    if isinstance(model, OlaVlmForConditionalGeneration) and predicted_tasks(model):
        sources["predictor"] = predictor_features(model, reader.processor, statistics, reader.prompt)

    def embeddings(images):
        for kind, features in sources.items():
            for task, of_layers in features(images).items():
                if task in probes.tasks:
                    yield from ((task, f"{kind} {layer}", found) for layer, found in of_layers.items())

    return embeddings


def table(results: dict) -> str:
    """Of each model's probes and predictors the best layer; all are in target_tasks.json."""
    lines = [f"{'':<36}{'task':<8}{'data':<12}{'row':<26}score"]
    for name, data in results["scores"].items():
        for data_name, tasks in data.items():
            for task, rows in tasks.items():
                shown = {}
                for row, scores in rows.items():
                    kind, (score, value) = row.rstrip("0123456789 "), next(iter(scores.items()))
                    better = min if score == "Frechet distance" else max
                    if kind not in shown or better(value, shown[kind][2]) == value:
                        shown[kind] = (row, score, value, scores["n"])
                for row, score, value, n in shown.values():
                    value = f"{value:.3f}" if score == "Frechet distance" else f"{100 * value:.1f}%"
                    lines.append(
                        f"{one_line(name):<36}{one_line(task):<8}{data_name:<12}{row:<26}{score} {value} (n = {n:,})"
                    )
    return "\n".join(lines)


@command("target-tasks")
def main(args: Namespace) -> None:
    with only_one(args.out):
        results = run(args)
    print(terminal(table(results)))
    features = one_line(results["features"])
    print(f"Frechet features: {features}; seg is teacher-assisted: finer stages are the teacher's own")
    tell(f"Results: {args.out / 'target_tasks.json'}", "Next: ola-vlm visualize shows what was scored")


def run(args: Namespace) -> dict:
    """target_tasks.json's content."""
    if not (args.out / "probes.json").exists():
        raise ValueError(f"{args.out} has no probes.json: `ola-vlm probe` writes it")
    probed = read_object(args.out / "probes.json")
    if not args.trust_remote_code:
        probed["run"]["teachers"] = teachers_of_file(probed["run"]["teachers"], args.out / "probes.json")
    folders = {one["folder"]: inside(args.out, one["folder"]) for one in probed["models"].values()}
    readers = {"da2k": da2k_items, "coco": coco_items, "miniature": miniature_items}
    data = {name: read(vars(args)[name])[: args.max_images] for name, read in readers.items() if vars(args)[name]}
    if not data:
        raise ValueError("no data: give --da2k, --coco or --miniature")
    if missing := [item["image"] for items in data.values() for item in items if not Path(item["image"]).is_file()]:
        raise ValueError(f"{len(missing)} images are not there, the first is {missing[0]}")
    device = processes().device
    made = make_teachers(probed["run"]["tasks"], probed["run"]["teachers"], device)
    teachers = {name: teacher.encoder for name, teacher in made.items()}
    asked = [item["image"] for items in data.values() for item in items]
    gallery, features, files = None, "none, without --gallery", []
    gen = next((encoder for encoder in teachers.values() if encoder.target_length == 1), None)
    if args.gallery and gen is not None:
        extractor, features = gen, "the gen teacher's, not Inception's"
        if args.features:
            options = {"grid": 1, "device": device, **args.features}
            features = f"{options['encoder']} {options['path']}"
            extractor = ENCODERS[options.pop("encoder")].from_pretrained(options.pop("path"), **options)
        files = image_files(args.gallery, args.gallery_pattern)
        files = sorted(set(files) - set(asked))  # an image must not stand for itself
        files = files[: args.max_images and 10 * args.max_images]
        if not files:
            raise ValueError(f"{args.gallery} has no images {args.gallery_pattern} but those that are asked about")
        gallery = Gallery(files, gen, extractor)
    about = {"data": {name: len(items) for name, items in data.items()}, "features": features}
    about["images_hash"] = hashlib.blake2b("\n".join([*asked, "", *files]).encode(), digest_size=8).hexdigest()
    about |= {"gallery": str(args.gallery), "teachers": probed["run"]["teachers"]}
    scores = {}

    def score_all(name: str, folder: Path, what: dict, make: Callable[[], Callable]) -> None:
        file = folder / "target_tasks.json"
        known = read_finished(file) or {}
        if known.get("about") == about | what:
            scores[name] = known["scores"]
            return
        embeddings = make()
        scores[name] = {
            data_name: scores_of(items, teachers, gallery, embeddings, f"{name}: {data_name}")
            for data_name, items in data.items()
        }
        write_json(file, {"about": about | what, "scores": scores[name]}, indent=1)

    means = load_probes(next(iter(folders.values()))).means
    score_all("target encoders", args.out / "teachers", {}, lambda: of_teachers(teachers, means))
    for model, one in probed["models"].items():
        folder = folders[one["folder"]]

        def make(model=model, folder=folder):
            probes = load_probes(folder)
            loaded = load_checkpoint(model, args.model_dtype, args.device_map, args.trust_remote_code)
            return of_model(probes.reader(*loaded), probes, statistics_of(model))

        what = {"weights": weights_state(model), "alphas": probed.get("alphas", probed.get("strengths"))}
        score_all(one["name"], folder, what, make)
    results = {**about, "scores": scores}
    write_json(args.out / "target_tasks.json", results, indent=1)
    return results
