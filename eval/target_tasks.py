"""Target tasks (the paper's Table 8): what probes are worth once the teachers decode them: `ola-vlm target-tasks`
(commands/target_tasks.py, which says what the scores are).

Each for the probes of every layer, for the model's own predictors if it has some, and as bounds for the teacher
itself, its targets decoded the same way, and the mean target.
"""

import hashlib
import json
import operator
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from ..probing.features import NearestNeighbors, predicted_tasks, predictor_features, probe_features, statistics_of
from ..probing.probes import Probes, load_probes
from ..probing.states import StateReader
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

PAIRS = 8  # of points, in a scene of the miniature
RATIO = 1.1  # of a pair's depths, at least
DRAWS = 10_000  # of two points a scene, at most: a flat depth map has no such pair


def da2k_items(folder: Path) -> list[dict]:
    return [{"image": str(folder / path), "pairs": pairs} for path, pairs in load_da2k(folder).items()]


def coco_items(folder: Path) -> list[dict]:
    """COCO's panoptic val2017: panoptic_val2017.json, and folders panoptic_val2017 (masks) and val2017 (images). Its
    133 classes are numbered in the order of their ids, as OneFormer's are."""
    content = json.loads((folder / "panoptic_val2017.json").read_text(encoding="utf-8"))
    category_ids = sorted(category["id"] for category in content["categories"])
    numbers = {category_id: number for number, category_id in enumerate(category_ids)}
    file_names = {image["id"]: image["file_name"] for image in content["images"]}
    items = []
    for annotation in content["annotations"]:
        classes = {segment["id"]: numbers[segment["category_id"]] for segment in annotation["segments_info"]}
        mask = inside(folder, Path("panoptic_val2017", annotation["file_name"]))
        image = inside(folder, Path("val2017", file_names[annotation["image_id"]]))
        items.append({"image": str(image), "mask": (str(mask), classes)})
    return items


def miniature_items(root: Path) -> list[dict]:
    """The test scenes of a study's folder with their exact depth (as pairs of points, drawn by a fixed seed; fewer of
    a scene that hardly has any) and masks."""
    stored = load_file(root / "data" / "test.safetensors")
    rng = np.random.default_rng(0)
    items = []
    for i, (depth, mask) in enumerate(zip(stored["depth"].astype(float), stored["mask"], strict=True)):
        image = root / "data" / "images" / f"test_{i:05d}.png"
        items.append({"image": str(image), "pairs": draw_pairs(depth, rng), "mask": mask})
    return items


def draw_pairs(depth: np.ndarray, rng: np.random.Generator) -> list[dict]:
    """PAIRS pairs of points of a depth map whose depths differ enough, as DA-2K's are given."""
    pairs = []
    for _ in range(DRAWS):
        if len(pairs) == PAIRS:
            break
        point1, point2 = rng.integers(0, render.SIZE, (2, 2))
        depth1 = depth[tuple(point1)]
        depth2 = depth[tuple(point2)]
        if max(depth1, depth2) > RATIO * min(depth1, depth2):
            closer = "point1" if depth1 < depth2 else "point2"
            pairs.append({"point1": point1.tolist(), "point2": point2.tolist(), "closer_point": closer})
    return pairs


def read_mask(mask: np.ndarray | tuple[str, dict[int, int]]) -> np.ndarray:
    """Class indices (h, w), `VOID` where there is none."""
    if isinstance(mask, np.ndarray):
        return mask
    path, classes = mask
    colors = np.asarray(open_image(path)).astype(np.int64)
    # COCO writes a segment's id as a color, the lowest digit to the base of 256 first.
    ids, indices = np.unique(colors @ [1, 256, 256**2], return_inverse=True)
    class_of_id = np.array([classes.get(int(i), VOID) for i in ids])
    return class_of_id[indices.reshape(colors.shape[:2])]


def to_image(maps: Tensor, size: tuple[int, int], encoder: TargetEncoder, mode: str) -> np.ndarray:
    """A map (S, S) of the teacher's square at the image's own `size` (width, height), without the square's padding."""
    width, height = size
    whole = (height, width)
    top = 0
    left = 0
    if encoder.view["square"] == "pad":
        side = max(size)
        whole = (side, side)
        top = (side - height) // 2
        left = (side - width) // 2
    resized = F.interpolate(maps[None, None].double(), size=whole, mode=mode)[0, 0].numpy()
    return resized[top : top + height, left : left + width]


def depth_sums(maps: Tensor, images: list[Image.Image], items: list[dict], encoder: TargetEncoder) -> dict:
    sums = {"correct": 0, "pairs": 0}
    for depth_map, image, item in zip(maps, images, items, strict=True):
        correct = depth_order_correct(to_image(depth_map, image.size, encoder, "bilinear"), item["pairs"])
        sums["correct"] += int(correct.sum())
        sums["pairs"] += len(correct)
    return sums


def seg_sums(maps: Tensor, images: list[Image.Image], items: list[dict], encoder: TargetEncoder) -> dict:
    num_classes = encoder.model.config.num_labels
    sums = {"confusion": 0, "iou": 0.0, "images": 0}
    for class_map, image, item in zip(maps, images, items, strict=True):
        truth = read_mask(item["mask"])
        guess = to_image(class_map, image.size, encoder, "nearest").astype(int)
        known = truth[truth != VOID]
        if not known.size:
            continue
        if known.max() >= num_classes:
            raise ValueError(f"a mask has class {known.max()}, the seg teacher knows {num_classes} classes")
        sums["confusion"] = sums["confusion"] + confusion_matrix(truth, guess, num_classes)
        sums["iou"] += reference_mean_iou([truth], [guess])
        sums["images"] += 1
    return sums


def depth_scores(sums: dict) -> dict[str, float]:
    return {"accuracy": sums["correct"] / sums["pairs"], "n": sums["pairs"]}


def seg_scores(sums: dict) -> dict[str, float]:
    return {
        "mIoU": mean_iou(sums["confusion"]),
        "mIoU of images": sums["iou"] / sums["images"],
        "n": sums["images"],
    }


class Kind(NamedTuple):
    """How a kind of teacher's maps are scored."""

    truth: str  # what an image must come with
    count: Callable[..., dict]  # a batch's sums
    scores: Callable[[dict], dict[str, float]]  # what the sums say; the first score is shown


KINDS = {
    DepthAnythingEncoder: Kind(truth="pairs", count=depth_sums, scores=depth_scores),
    OneFormerEncoder: Kind(truth="mask", count=seg_sums, scores=seg_scores),
}
DISTANCE = "Frechet distance"  # gen's score: the less, the better


class Gallery:
    """Images by their embeddings, to stand in for a generator of images; features (F,) of each by `extractor`."""

    def __init__(self, sources: Sequence[str], encoder: TargetEncoder, extractor: TargetEncoder, batch_size: int = 32):
        embeddings = []
        features = []
        for start in tqdm(range(0, len(sources), batch_size), desc="gallery", unit="batch"):
            images = [open_image(source) for source in sources[start : start + batch_size]]
            embeddings.append(encoder.encode(images)[:, 0])
            features.append(extractor.encode(images)[:, 0])
        self.sources = sources
        self.nearest_neighbors = NearestNeighbors(torch.cat(embeddings))
        self.features = torch.cat(features)
        self.extractor = extractor

    def nearest(self, embeddings_NE: Tensor) -> Tensor:
        """Features (N, F) of the image whose embedding is most similar to each."""
        _, indices = self.nearest_neighbors(embeddings_NE)
        return self.features[indices]


# images -> task, row and embeddings (N, Q, E), None for the teacher's own map
EmbeddingsOf = Callable[[list[Image.Image]], Iterator[tuple[str, str, Tensor | None]]]


class Tally:
    """The sums and features of a data set, as its batches come."""

    def __init__(self, teachers: dict[str, TargetEncoder], gallery: Gallery | None):
        self.teachers = teachers
        self.gallery = gallery
        self.sums: dict[tuple[str, str], dict] = defaultdict(dict)  # (task, row) -> name -> sum
        self.features: dict[tuple[str, str], list[Tensor]] = defaultdict(list)  # (task, row) -> (N, F) of each batch
        self.real: list[Tensor] = []  # the images' own features

    def add(self, items: Sequence[dict], images: list[Image.Image], embeddings_of: EmbeddingsOf) -> None:
        if self.gallery is not None:
            self.real.append(self.gallery.extractor.encode(images)[:, 0])
        for task, row, embeddings in embeddings_of(images):
            encoder = self.teachers[task]
            kind = KINDS.get(type(encoder))
            if kind is not None and kind.truth in items[0]:
                sums = self.sums[task, row]
                for name, value in kind.count(encoder.decode(embeddings, images), images, items, encoder).items():
                    sums[name] = sums.get(name, 0) + value
            is_gen = kind is None and encoder.target_length == 1
            if is_gen and self.gallery is not None and embeddings is not None:
                self.features[task, row].append(self.gallery.nearest(embeddings[:, 0].cpu()))

    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """{task: {row: scores}}"""
        scores = defaultdict(dict)
        for (task, row), sums in self.sums.items():
            if sums.get("pairs") or sums.get("images"):  # else there is no truth to compare with
                scores[task][row] = KINDS[type(self.teachers[task])].scores(sums)
        for (task, row), features in self.features.items():
            decoded = torch.cat(features).numpy()
            distance = frechet_distance(decoded, torch.cat(self.real).numpy())
            scores[task][row] = {DISTANCE: distance, "n": len(decoded)}
        return dict(scores)


def scores_of(
    items: Sequence[dict],
    teachers: dict[str, TargetEncoder],
    gallery: Gallery | None,
    embeddings_of: EmbeddingsOf,
    describe: str,
    batch_size: int = 16,
) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {row: scores}} over `items`, of tasks for which these have truth."""
    tally = Tally(teachers, gallery)
    for start in tqdm(range(0, len(items), batch_size), desc=one_line(describe), unit="batch"):
        batch = items[start : start + batch_size]
        images = [open_image(item["image"]) for item in batch]
        tally.add(batch, images, embeddings_of)
    return tally.scores()


def of_teachers(teachers: dict[str, TargetEncoder], means: dict[str, Tensor]) -> EmbeddingsOf:
    """The upper bounds, and the lower one: the training images' mean target, which knows nothing of the image."""

    def embeddings_of(images):
        for task, encoder in teachers.items():
            if type(encoder) in KINDS:
                yield task, "target encoder", None
            yield task, "its targets, decoded", encoder.encode(images)
            yield task, "the mean target, decoded", means[task].expand(len(images), -1, -1)

    return embeddings_of


def of_model(reader: StateReader, probes: Probes, statistics: dict[str, TargetStatistics]) -> EmbeddingsOf:
    """Embeddings from the probes and, of an OLA-VLM, from its predictors."""
    model = reader.model
    sources = {"probe": probe_features(probes, model, reader.processor)}
    if isinstance(model, OlaVlmForConditionalGeneration) and predicted_tasks(model):
        sources["predictor"] = predictor_features(model, reader.processor, statistics, reader.prompt)

    def embeddings_of(images):
        for kind, features in sources.items():
            for task, by_layer in features(images).items():
                if task not in probes.tasks:
                    continue
                for layer, embeddings in by_layer.items():
                    yield task, f"{kind} {layer}", embeddings

    return embeddings_of


def best_rows(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of the layers of one kind ("probe 3", "probe 4") the best row."""
    best = {}  # kind -> row
    for row, scores in rows.items():
        kind = row.rstrip("0123456789 ")
        score = next(iter(scores))
        is_better = operator.lt if score == DISTANCE else operator.gt
        if kind not in best or is_better(scores[score], rows[best[kind]][score]):
            best[kind] = row
    return {row: rows[row] for row in best.values()}


def table(results: dict) -> str:
    """Of each model's probes and predictors the best layer; all are in target_tasks.json."""
    lines = [f"{'':<36}{'task':<8}{'data':<12}{'row':<26}score"]
    for name, by_data in results["scores"].items():
        for data_name, tasks in by_data.items():
            for task, rows in tasks.items():
                for row, scores in best_rows(rows).items():
                    score, value = next(iter(scores.items()))
                    shown = f"{value:.3f}" if score == DISTANCE else f"{100 * value:.1f}%"
                    columns = f"{one_line(name):<36}{one_line(task):<8}{data_name:<12}{row:<26}"
                    lines.append(f"{columns}{score} {shown} (n = {scores['n']:,})")
    return "\n".join(lines)


READERS = {"da2k": da2k_items, "coco": coco_items, "miniature": miniature_items}  # option -> how its data are read


def read_data(args: Namespace) -> dict[str, list[dict]]:
    """Name of a data set -> its images with their truth. ValueError if images are missing."""
    data = {}
    for name, read in READERS.items():
        folder = getattr(args, name)
        if folder is not None:
            data[name] = read(folder)[: args.max_images]
    if not data:
        raise ValueError("no data: give --da2k, --coco or --miniature")
    missing = [image for image in images_of(data) if not Path(image).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} images are not there, the first is {missing[0]}")
    return data


def images_of(data: dict[str, list[dict]]) -> list[str]:
    return [item["image"] for items in data.values() for item in items]


def load_gallery(
    args: Namespace, teachers: dict[str, TargetEncoder], asked: Sequence[str], device
) -> tuple[Gallery | None, str]:
    """The images that stand for generated ones, if they are asked for and a teacher is gen's; and whose features are
    compared, in words. `asked`: images that must not stand for themselves."""
    gen = next((encoder for encoder in teachers.values() if encoder.target_length == 1), None)
    if args.gallery is None or gen is None:
        return None, "none, without --gallery"
    extractor = gen
    features = "the gen teacher's, not Inception's"
    if args.features:
        options = {"grid": 1, "device": device, **args.features}
        encoder = options.pop("encoder")
        path = options.pop("path")
        features = f"{encoder} {path}"
        extractor = ENCODERS[encoder].from_pretrained(path, **options)
    files = sorted(set(image_files(args.gallery, args.gallery_pattern)) - set(asked))
    if args.max_images:
        files = files[: 10 * args.max_images]
    if not files:
        raise ValueError(f"{args.gallery} has no images {args.gallery_pattern} but those that are asked about")
    return Gallery(files, gen, extractor), features


def run(args: Namespace) -> dict:
    """target_tasks.json's content."""
    if not (args.out / "probes.json").exists():
        raise ValueError(f"{args.out} has no probes.json: `ola-vlm probe` writes it")
    probed = read_object(args.out / "probes.json")
    settings = probed["run"]
    if not args.trust_remote_code:
        settings["teachers"] = teachers_of_file(settings["teachers"], args.out / "probes.json")
    folders = {model: inside(args.out, about["folder"]) for model, about in probed["models"].items()}
    data = read_data(args)
    device = processes().device
    assert device is not None
    teachers = {}
    for task, teacher in make_teachers(settings["tasks"], settings["teachers"], device).items():
        teachers[task] = teacher.encoder
    asked = images_of(data)
    gallery, features = load_gallery(args, teachers, asked, device)
    gallery_images = gallery.sources if gallery is not None else []
    names = "\n".join([*asked, "", *gallery_images])
    about = {
        "data": {name: len(items) for name, items in data.items()},
        "features": features,
        "images_hash": hashlib.blake2b(names.encode(), digest_size=8).hexdigest(),
        "gallery": str(args.gallery),
        "teachers": settings["teachers"],
    }

    def scores_in(folder: Path, name: str, about: dict, make_embeddings: Callable[[], EmbeddingsOf]) -> dict:
        """Of all data, from the folder if they were computed there of the same `about`."""
        file = folder / "target_tasks.json"
        known = read_finished(file) or {}
        if known.get("about") == about:
            return known["scores"]
        embeddings_of = make_embeddings()
        scores = {}
        for data_name, items in data.items():
            scores[data_name] = scores_of(items, teachers, gallery, embeddings_of, f"{name}: {data_name}")
        write_json(file, {"about": about, "scores": scores}, indent=1)
        return scores

    def load_model(model: str) -> EmbeddingsOf:
        probes = load_probes(folders[model])
        loaded, processor = load_checkpoint(model, args.model_dtype, args.device_map, args.trust_remote_code)
        return of_model(probes.reader(loaded, processor), probes, statistics_of(model))

    means = load_probes(next(iter(folders.values()))).means
    name = "target encoders"
    scores = {name: scores_in(args.out / "teachers", name, about, partial(of_teachers, teachers, means))}
    alphas = probed.get("alphas", probed.get("strengths"))  # the latter: their name before
    for model, about_model in probed["models"].items():
        name = about_model["name"]
        about_scores = {**about, "weights": weights_state(model), "alphas": alphas}
        scores[name] = scores_in(folders[model], name, about_scores, partial(load_model, model))
    results = {**about, "scores": scores}
    write_json(args.out / "target_tasks.json", results, indent=1)
    return results


@command("target-tasks")
def main(args: Namespace) -> None:
    with only_one(args.out):
        results = run(args)
    print(terminal(table(results)))
    features = one_line(results["features"])
    print(f"Frechet features: {features}; seg is teacher-assisted: finer stages are the teacher's own")
    tell(f"Results: {args.out / 'target_tasks.json'}", "Next: ola-vlm visualize shows what was scored")
