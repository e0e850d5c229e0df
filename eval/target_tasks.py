"""Target tasks (the paper's Table 8): what probes are worth once the teachers decode them: `ola-vlm target-tasks`
(commands/target_tasks.py, which says what the scores are).

Each for the probes of every layer, for the model's own predictors if it has some, and as bounds for the teacher
itself, its targets decoded the same way, and the mean target.
"""

import hashlib
import operator
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
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
from ..files.escapes import one_line, terminal
from ..files.strangers import inside, read_finished, read_object, teachers_of_file
from ..files.writing import only_one, write_json
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
from ..targets.fill import make_teachers
from ..targets.images import image_files, open_image
from ..targets.statistics import TargetStatistics
from ..training.attach import AttachedPredictors
from ..world import render
from .dense import (
    MIN_FEATURES,
    VOID,
    confusion_matrix,
    depth_order_correct,
    frechet_distance,
    load_da2k,
    mean_iou,
    reference_mean_iou,
)

# Pairs of points that are drawn in a scene of the miniature.
PAIRS = 8
# The farther point's depth is at least so many times the nearer one's.
RATIO = 1.1
# Tries a scene, at most: a flat depth map has no such pair, and they would never end.
DRAWS = 10_000


def da2k_items(folder: Path) -> list[dict]:
    return [{"image": str(folder / path), "pairs": pairs} for path, pairs in load_da2k(folder).items()]


def coco_items(folder: Path) -> list[dict]:
    """COCO's panoptic val2017: panoptic_val2017.json, and folders panoptic_val2017 (masks) and val2017 (images). Its
    133 classes are numbered in the order of their ids, as OneFormer's are."""
    file = folder / "panoptic_val2017.json"
    content = read_object(file)
    items = []
    try:
        # Ids have gaps (1 to 200 for 133 classes): sorted, their places are OneFormer's numbers.
        category_ids = sorted(category["id"] for category in content["categories"])
        numbers = {category_id: number for number, category_id in enumerate(category_ids)}
        file_names = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            classes = {segment["id"]: numbers[segment["category_id"]] for segment in annotation["segments_info"]}
            mask = inside(folder, Path("panoptic_val2017", annotation["file_name"]))
            image = inside(folder, Path("val2017", file_names[annotation["image_id"]]))
            items.append({"image": str(image), "mask": (str(mask), classes)})
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is not as COCO's panoptic annotations are ({what}): fetch it again") from error
    return items


def miniature_items(root: Path) -> list[dict]:
    """The test scenes of a study's folder with their exact depth (as pairs of points, drawn by a fixed seed; fewer of
    a scene that hardly has any) and masks."""
    stored = load_file(root / "data" / "test.safetensors")
    # Fixed, so that all models and all runs are asked about the same points.
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
        # Nearly the same depth has no clear order.
        if max(depth1, depth2) > RATIO * min(depth1, depth2):
            closer = "point2"
            if depth1 < depth2:
                closer = "point1"
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
    # Ids that the annotation doesn't list, 0 among them, are pixels without a class.
    class_of_id = np.array([classes.get(int(i), VOID) for i in ids])
    return class_of_id[indices.reshape(colors.shape[:2])]


def to_image(maps: Tensor, size: tuple[int, int], encoder: TargetEncoder, mode: str) -> np.ndarray:
    """A map (S, S) of the teacher's square at the image's own `size` (width, height), without the square's padding."""
    width, height = size
    whole = (height, width)
    top = 0
    left = 0
    # Padded evenly on both sides; else the image was stretched to the square, and is stretched back.
    if encoder.view["square"] == "pad":
        side = max(size)
        whole = (side, side)
        top = (side - height) // 2
        left = (side - width) // 2
    # (S, S) -> whole -> the image's own part of it.
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
        # An image without a labeled pixel has no score; the reference fails here.
        if not known.size:
            continue
        # Masks of another data set, or a teacher that was trained on one.
        if known.max() >= num_classes:
            raise ValueError(f"a mask has class {known.max()}, the seg teacher knows {num_classes} classes")
        # From 0 to (C, C + 1) by the first image.
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

    # What an image must come with.
    truth: str
    # A batch's sums.
    count: Callable[..., dict]
    # What the sums say; the first score is shown.
    scores: Callable[[dict], dict[str, float]]


# Kind of teacher -> how it is scored; gen's has no maps, and is scored by distance.
KINDS = {
    DepthAnythingEncoder: Kind(truth="pairs", count=depth_sums, scores=depth_scores),
    OneFormerEncoder: Kind(truth="mask", count=seg_sums, scores=seg_scores),
}
# gen's score: the less, the better.
DISTANCE = "Frechet distance"


class Gallery:
    """Images by their embeddings, to stand in for a generator of images; features (F,) of each by `extractor`."""

    def __init__(self, sources: Sequence[str], encoder: TargetEncoder, extractor: TargetEncoder, batch_size: int = 32):
        embeddings = []
        features = []
        for start in tqdm(range(0, len(sources), batch_size), desc="gallery", unit="batch"):
            images = [open_image(source) for source in sources[start : start + batch_size]]
            # (N, 1, E) -> (N, E): one embedding an image.
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


# Images -> task, row and embeddings (N, Q, E), None for the teacher's own map.
EmbeddingsOf = Callable[[list[Image.Image]], Iterator[tuple[str, str, Tensor | None]]]


class Tally:
    """The sums and features of a data set, as its batches come."""

    def __init__(self, teachers: dict[str, TargetEncoder], gallery: Gallery | None):
        self.teachers = teachers
        self.gallery = gallery
        # (task, row) -> name -> sum.
        self.sums: dict[tuple[str, str], dict] = defaultdict(dict)
        # (task, row) -> (N, F) of each batch.
        self.features: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        # The images' own features.
        self.real: list[Tensor] = []

    def add(self, items: Sequence[dict], images: list[Image.Image], embeddings_of: EmbeddingsOf) -> None:
        # Real images' features, once a batch, for all rows to be compared with.
        if self.gallery is not None:
            self.real.append(self.gallery.extractor.encode(images)[:, 0])
        for task, row, embeddings in embeddings_of(images):
            encoder = self.teachers[task]
            kind = KINDS.get(type(encoder))
            # DA-2K has pairs and no masks, COCO masks and no pairs: what has no truth is passed over.
            if kind is not None and kind.truth in items[0]:
                sums = self.sums[task, row]
                for name, value in kind.count(encoder.decode(embeddings, images), images, items, encoder).items():
                    sums[name] = sums.get(name, 0) + value
            # A teacher of one embedding an image; None would be its own picture, which it doesn't have.
            is_gen = kind is None and encoder.target_length == 1
            if is_gen and self.gallery is not None and embeddings is not None:
                self.features[task, row].append(self.gallery.nearest(embeddings[:, 0].cpu()))

    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """{task: {row: scores}}"""
        scores = defaultdict(dict)
        for (task, row), sums in self.sums.items():
            # Neither pairs nor labeled images: there was no truth to compare with.
            if sums.get("pairs") or sums.get("images"):
                scores[task][row] = KINDS[type(self.teachers[task])].scores(sums)
        for (task, row), features in self.features.items():
            # (N, F), of the data set's N images in both.
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
            # (Q, E) -> (N, Q, E).
            yield task, "the mean target, decoded", means[task].expand(len(images), -1, -1)

    return embeddings_of


def of_model(reader: StateReader, probes: Probes, statistics: dict[str, TargetStatistics]) -> EmbeddingsOf:
    """Embeddings from the probes and, of a model that has some, from its predictors."""
    model = reader.model
    sources = {"probe": probe_features(probes, model, reader.processor)}
    if isinstance(model, (OlaVlmForConditionalGeneration, AttachedPredictors)) and predicted_tasks(model):
        sources["predictor"] = predictor_features(model, reader.processor, statistics, reader.prompt)

    def embeddings_of(images):
        for kind, features in sources.items():
            for task, by_layer in features(images).items():
                # A model may have predictors of more tasks than were probed, and no teacher is loaded for these.
                if task not in probes.tasks:
                    continue
                for layer, embeddings in by_layer.items():
                    yield task, f"{kind} {layer}", embeddings

    return embeddings_of


def best_rows(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of the layers of one kind ("probe 3", "probe 4") the best row."""
    # Kind -> row.
    best = {}
    for row, scores in rows.items():
        # "probe 3" -> "probe".
        kind = row.rstrip("0123456789 ")
        score = next(iter(scores))
        # The first score counts: larger is better, but for a distance.
        is_better = operator.gt
        if score == DISTANCE:
            is_better = operator.lt
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
                    shown = f"{100 * value:.1f}%"
                    if score == DISTANCE:
                        shown = f"{value:.3f}"
                    columns = f"{one_line(name):<36}{one_line(task):<8}{data_name:<12}{row:<26}"
                    lines.append(f"{columns}{score} {shown} (n = {scores['n']:,})")
    return "\n".join(lines)


# Option -> how its data are read.
READERS = {"da2k": da2k_items, "coco": coco_items, "miniature": miniature_items}


def read_data(args: Namespace) -> dict[str, list[dict]]:
    """Name of a data set -> its images with their truth. ValueError if images are missing."""
    data = {}
    for name, read in READERS.items():
        folder = getattr(args, name)
        if folder is not None:
            data[name] = read(folder)[: args.max_images]
    if not data:
        raise ValueError("no data: give --da2k, --coco or --miniature")
    for name, items in data.items():
        if args.gallery is not None and len(items) < MIN_FEATURES:
            what = f"--gallery compares sets of images, and of --{name} there are {len(items)}"
            raise ValueError(f"{what}: take at least {MIN_FEATURES} (--max_images), or leave --gallery out")
    # Before teachers and models are loaded, which takes long.
    missing = [image for image in images_of(data) if not Path(image).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} images are not there, the first is {missing[0]}")
    return data


def images_of(data: dict[str, list[dict]]) -> list[str]:
    return [item["image"] for item in chain.from_iterable(data.values())]


def load_gallery(
    args: Namespace, teachers: dict[str, TargetEncoder], asked: Sequence[str], device
) -> tuple[Gallery | None, str]:
    """The images that stand for generated ones, if they are asked for and a teacher is gen's; and whose features are
    compared, in words. `asked`: images that must not stand for themselves."""
    # One position: an embedding of the whole image, as only gen's are.
    gen = next((encoder for encoder in teachers.values() if encoder.target_length == 1), None)
    if args.gallery is None or gen is None:
        return None, "none, without --gallery"
    extractor = gen
    features = "the gen teacher's, not Inception's"
    if args.features:
        # One feature vector an image, by the encoder that the user names; FID itself has Inception's.
        options = {"grid": 1, "device": device, **args.features}
        encoder = options.pop("encoder")
        path = options.pop("path")
        features = f"{encoder} {path}"
        extractor = ENCODERS[encoder].from_pretrained(path, **options)
    files = sorted(set(image_files(args.gallery, args.gallery_pattern)) - set(asked))
    if args.max_images:
        # Ten images to choose from for each that is asked about.
        files = files[: 10 * args.max_images]
    if not files:
        raise ValueError(f"{args.gallery} has no images {args.gallery_pattern} but those that are asked about")
    return Gallery(files, gen, extractor), features


class Probed(NamedTuple):
    """What `ola-vlm probe` left: its settings; each model's folder and the name that it is shown by; the alphas of the
    ridges (None in files of before)."""

    settings: dict
    folders: dict[str, Path]
    names: dict[str, str]
    alphas: dict | None


def read_probed(args: Namespace) -> Probed:
    """ValueError if there is no probes.json, or another than `ola-vlm probe` writes."""
    file = args.out / "probes.json"
    if not file.exists():
        raise ValueError(f"{args.out} has no probes.json: `ola-vlm probe` writes it")
    probed = read_object(file)
    try:
        settings = probed["run"]
        teachers = settings["teachers"]
        tasks = [task["name"] for task in settings["tasks"]]
        folders = {model: inside(args.out, about["folder"]) for model, about in probed["models"].items()}
        names = {model: str(about["name"]) for model, about in probed["models"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is not as `ola-vlm probe` writes it ({what})") from error
    # probes.json may be a stranger's: it may name teachers, but set no option that runs code.
    if not args.trust_remote_code:
        settings["teachers"] = teachers_of_file(teachers, file)
    without = [task for task in tasks if task not in settings["teachers"]]
    if without:
        raise ValueError(f"{file} names no teacher of {one_line(without)}: run `ola-vlm probe` anew")
    if not folders:
        raise ValueError(f"{file} has no models: run `ola-vlm probe` anew")
    # "strengths" in older files.
    alphas = probed.get("alphas", probed.get("strengths"))
    return Probed(settings, folders, names, alphas)


@dataclass
class Scorer:
    """Scores whoever gives embeddings on all data. `about`: what the scores depend on, besides who gives them."""

    data: dict[str, list[dict]]
    teachers: dict[str, TargetEncoder]
    gallery: Gallery | None
    about: dict

    def scores_in(self, folder: Path, name: str, by: dict, make_embeddings: Callable[[], EmbeddingsOf]) -> dict:
        """Of all data, by data set; from the folder, if they were computed there of the same data, teachers and
        embeddings (`by`: what these depend on)."""
        file = folder / "target_tasks.json"
        about = {**self.about, **by}
        known = read_finished(file) or {}
        # An interrupted run goes on behind them.
        if known.get("about") == about and isinstance(known.get("scores"), dict):
            return known["scores"]
        embeddings_of = make_embeddings()
        scores = {}
        for data_name, items in self.data.items():
            title = f"{name}: {data_name}"
            scores[data_name] = scores_of(items, self.teachers, self.gallery, embeddings_of, title)
        write_json(file, {"about": about, "scores": scores}, indent=1)
        return scores


def about_data(args: Namespace, data: dict[str, list[dict]], gallery: Gallery | None, features: str) -> dict:
    """What scores depend on, of the data. `features`: whose the gallery compares, in words."""
    gallery_images = gallery.sources if gallery is not None else []
    # The hash tells other images from the same number of them; the empty line parts both lists.
    names = "\n".join([*images_of(data), "", *gallery_images])
    return {
        "data": {name: len(items) for name, items in data.items()},
        "features": features,
        "images_hash": hashlib.blake2b(names.encode(), digest_size=8).hexdigest(),
        "gallery": str(args.gallery),
    }


def load_model(args: Namespace, model: str, folder: Path) -> EmbeddingsOf:
    """What a model's probes in `folder` and its own predictors say of images."""
    probes = load_probes(folder)
    loaded, processor = load_checkpoint(model, args.model_dtype, args.device_map, args.trust_remote_code)
    return of_model(probes.reader(loaded, processor), probes, statistics_of(model))


def run(args: Namespace) -> dict:
    """target_tasks.json's content."""
    probed = read_probed(args)
    data = read_data(args)
    if args.features and args.features["encoder"] not in ENCODERS:
        raise ValueError(f"--features has the encoder {args.features['encoder']!r}: choose one of {list(ENCODERS)}")

    # What is asked, and who judges.
    device = processes().device
    assert device is not None
    teachers = {}
    for task, teacher in make_teachers(probed.settings["tasks"], probed.settings["teachers"], device).items():
        teachers[task] = teacher.encoder
    gallery, features = load_gallery(args, teachers, images_of(data), device)
    about = {**about_data(args, data, gallery, features), "teachers": probed.settings["teachers"]}
    scorer = Scorer(data, teachers, gallery, about)

    # The teachers themselves, then each model. The training images' means are the same in all models' probes: they
    # are the teachers'.
    means = load_probes(next(iter(probed.folders.values()))).means
    name = "target encoders"
    scores = {name: scorer.scores_in(args.out / "teachers", name, {}, partial(of_teachers, teachers, means))}
    for model, name in probed.names.items():
        folder = probed.folders[model]
        by = {"weights": weights_state(model), "alphas": probed.alphas}
        scores[name] = scorer.scores_in(folder, name, by, partial(load_model, args, model, folder))
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
