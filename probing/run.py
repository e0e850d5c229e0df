"""Probes on every layer of frozen models: `ola-vlm probe` (commands/probe.py).

A probe on every layer of the LLM, 0 (the embeddings) to the last, tells how well the layer's states predict the
features of the recipe's teachers, on images that were held out.
"""

import hashlib
import itertools
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..commands.running import command, tell
from ..files.escapes import one_line, terminal
from ..files.strangers import read_finished, read_object
from ..files.writing import only_one, write_json
from ..inference.checkpoints import load_checkpoint, processes, weights_state
from ..recipes import RECIPES
from ..recipes.arguments import make_arguments
from ..targets.fill import make_teachers
from ..targets.images import IMAGE_ENDINGS, image_files
from ..targets.statistics import TargetStatistics
from ..training.arguments import OlaVlmArguments
from ..training.preflight import tasks_of_teachers
from ..training.rows import Rows, load_rows, row_images
from ..training.targets import fill_caches
from .figures import curves_figure
from .fit import batches, fit
from .probes import load_probes, score
from .resampler import ResamplerFit
from .ridge import ALPHAS, RidgeFit, choose_alpha
from .states import PROMPT, StateReader

TEST_SHARE = 0.2  # of the images
VALIDATION_SHARE = 0.1
# What a model's folder has when its probes are fitted. (A ridge's alpha is still to be chosen then.)
FITTED_FILES = {"ridge": "validation.json", "resampler": "probes.safetensors"}
# A fit so far; of a ridge it stays, as its probes are made of it.
UNFINISHED_FILE = "fit.safetensors"
SETTINGS_FILE = "settings.json"
# Its name in an OUT of before.
OLD_SETTINGS_FILE = "run.json"


class Images(Sequence):
    """Of a folder, or of a data set's rows: by its number, or those that a slice or an array of numbers chooses."""

    def __init__(self, get: Callable, indices: np.ndarray):
        self.get = get
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i):
        if isinstance(i, (slice, np.ndarray)):
            return Images(self.get, self.indices[i])
        return self.get(self.indices[i])


class ImagesOfRows:
    """(Row, number of the image in it) -> the image. A class of its own: a loader's workers get a copy, where they
    are started anew, and of a function within a function there is none."""

    def __init__(self, rows: Rows):
        self.source = rows.source
        self.image_folder = rows.image_folder

    def images(self, row: int) -> list:
        return row_images(self.source[row], self.image_folder)

    def __call__(self, index: np.ndarray):
        row, number = index
        return self.images(int(row))[number]


def find_images(name: str, args: OlaVlmArguments, split: str | None = None) -> Images:
    """The image files of a folder and those below it, else what the rows of a data set hold (`training.rows`), with
    words or without; each picture once. `split`: of a data set, that of `args` by default. ValueError if there are
    none."""
    if Path(name).is_dir():
        # A folder without image files may still be a data set, of parquet files say: it is tried below.
        files = image_files(name)
        if files:
            return Images(files.__getitem__, np.arange(len(files)))
    elif not name.endswith((".json", ".jsonl")) and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        # Not even of the form owner/name: a mistyped folder is not looked up on the Hub.
        raise ValueError(f"{name} is no folder, no .json or .jsonl file and no name of a data set")
    try:
        rows = load_rows(name, args.image_folder, args.data_config, split or args.data_split)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name} has no images ({', '.join(sorted(IMAGE_ENDINGS))}) and no rows: {error}") from error

    assert isinstance(rows, Rows)  # no stream
    of_rows = ImagesOfRows(rows)
    # What a picture is known by -> (row, number of the image in it). A data set that has a row a question repeats the
    # picture in each: its copies would be split into those that are fitted and those that are held out.
    indices = {}
    for row in range(len(rows.source)):
        for number, image in enumerate(of_rows.images(row)):
            indices[_known_by(image)] = (row, number)
    if not indices:
        raise ValueError(f"the rows of {name} have no images")
    # Row and number are kept, not the picture: it is read from its row when its batch comes.
    return Images(of_rows, np.array(list(indices.values())))


def split(count: int, seed: int, has_test: bool) -> dict[str, np.ndarray]:
    """Indices of training, validation and, unless they come apart, test images; the same for a seed."""
    order = np.random.default_rng(seed).permutation(count)
    # At least one image of each, however few there are.
    num_test = 0 if has_test else max(1, round(TEST_SHARE * count))
    num_validation = max(1, round(VALIDATION_SHARE * count))
    num_held_out = num_test + num_validation
    if count <= num_held_out:
        raise ValueError(f"{count} images are too few: at least 3, and thousands for a probe that means something")
    return {
        "train": np.sort(order[num_held_out:]),
        "validation": np.sort(order[num_test:num_held_out]),
        "test": np.sort(order[:num_test]),
    }


def short_names(models: Sequence[str]) -> dict[str, str]:
    """What tells them apart: their paths without the parts that all share at the begin and the end."""
    paths = [re.split(r"[/\\]+", model.strip("/\\")) for model in models]
    # A model alone shares all its parts with itself.
    if len(paths) == 1:
        return {models[0]: paths[0][-1]}
    # What all begin with, then what all end with; at least one part is left of each.
    while all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    while all(len(path) > 1 and path[-1] == paths[0][-1] for path in paths):
        paths = [path[:-1] for path in paths]
    return {model: "/".join(path) for model, path in zip(models, paths, strict=True)}


def find_tasks(options: Namespace, args: OlaVlmArguments) -> list[dict]:
    tasks = tasks_of_teachers(args.tasks or [])
    if not tasks or not args.teachers:
        raise ValueError("the recipe has no tasks and teachers: name another one, or give --tasks and --teachers")
    names = [task["name"] for task in tasks]
    wanted = options.targets or names
    unknown = set(wanted) - set(names)
    if unknown:
        raise ValueError(f"the recipe has no task {', '.join(sorted(unknown))}: choose one of {', '.join(names)}")
    chosen = [task for task in tasks if task["name"] in wanted]
    # Words that were asked for are refused; beside a recipe's other tasks they are left out.
    of_words = [task["name"] for task in chosen if task.get("target") == "words"]
    if of_words and (options.targets or len(of_words) == len(chosen)):
        raise ValueError(f"{', '.join(of_words)}: words are no features that a probe predicts: name other --targets")
    chosen = [task for task in chosen if task["name"] not in of_words]
    without_teacher = [task["name"] for task in chosen if task["name"] not in args.teachers]
    if without_teacher:
        known = ", ".join(args.teachers)
        raise ValueError(
            f"teachers has none for {', '.join(without_teacher)}: give --targets {known}, or more teachers"
        )
    return chosen


@dataclass(frozen=True)
class ProbeRun:
    """What holds for all models of one OUT.

    options, args: of the command line; of `args` the recipe's fields.
    models: those that were asked for, then others that OUT has from before.
    settings: all that the probes depend on, JSON-ready; an OUT has probes of the same settings only.
    targets: task -> function of images that gives their targets (N, Q, E).
    splits: "train", "validation" and "test" -> their images.
    images_hash: of which images of those that were given are in which split.
    statistics: of the training images' targets, of tasks whose targets are standardized.
    """

    options: Namespace
    args: OlaVlmArguments
    models: list[str]
    tasks: list[dict]
    settings: dict
    targets: dict[str, Callable]
    splits: dict[str, Images]
    images_hash: str
    statistics: dict[str, TargetStatistics]

    @property
    def is_ridge(self) -> bool:
        return self.options.probe == "ridge"

    @property
    def fitted_file(self) -> str:
        return FITTED_FILES[self.options.probe]


class LoadedModel:
    """The model that was asked for last, which stays in memory; another one takes its place."""

    def __init__(self, options: Namespace, trust_remote_code: bool):
        self.options = options
        self.trust_remote_code = trust_remote_code
        self.name: str | None = None
        self.state_reader: StateReader | None = None

    def reader(self, name: str) -> StateReader:
        if name != self.name or self.state_reader is None:
            # Freed before the next one is read.
            self.state_reader = None
            options = self.options
            model, processor = load_checkpoint(name, options.model_dtype, options.device_map, self.trust_remote_code)
            self.state_reader = StateReader(model, processor, options.prompt, square=not options.no_square)
            self.name = name
        return self.state_reader


# ------------------------------------------------------------------------- what is done before any model is loaded
def prepare(options: Namespace, args: OlaVlmArguments) -> ProbeRun:
    """Finds tasks, images and targets. ValueError for what can't work, before anything slow."""
    # What is probed, on which images; held-out ones may be given.
    tasks = find_tasks(options, args)
    images = find_images(options.images, args)
    if options.max_images:
        chosen = np.random.default_rng(args.seed).permutation(len(images))[: options.max_images]
        images = images[np.sort(chosen)]
    test_images = None
    if options.test_images:
        test_images = find_images(options.test_images, args, options.test_split)
        check_held_out(test_images, images)
    has_test = test_images is not None
    # Fails if they are too few.
    split(len(images), args.seed, has_test)

    # Does it fit to what OUT has?
    settings = make_settings(options, args, tasks, images, test_images or ())
    models = find_models(options)
    for model in models:
        check_weights(options.out, model)
    begin(options.out, settings)

    # The targets; images that have none drop out before the rest is split.
    targets, images, keys = open_targets(tasks, images, args)
    indices = split(len(images), args.seed, has_test)
    splits = {name: images[chosen] for name, chosen in indices.items()}
    if has_test:
        # The caches are opened anew: those from before don't know these images.
        targets, splits["test"], _ = open_targets(tasks, test_images, args)
    images_hash = hash_of_splits(splits)
    for model in models:
        check_images(options.out, model, images_hash)
    statistics = {}
    # Ridges predict targets as they are: no channel's scale changes what another channel learns.
    if options.probe == "resampler" and args.standardize_targets:
        # Of training images only: held-out ones must not shape what is learned.
        train_keys = [keys[i] for i in indices["train"]]
        statistics = {name: cache.statistics(train_keys) for name, cache in targets.items()}
    return ProbeRun(
        options=options,
        args=args,
        models=models,
        tasks=tasks,
        settings=settings,
        targets=targets,
        splits=splits,
        images_hash=images_hash,
        statistics=statistics,
    )


def find_models(options: Namespace) -> list[str]:
    """Those that were asked for, then those that OUT has fitted probes of."""
    # Alphas are chosen over all models of OUT: those of earlier calls take part again.
    models = list(options.models)
    for path in sorted(options.out.glob(f"*/{FITTED_FILES[options.probe]}")):
        model = model_of(path.parent)
        # None: a folder that is no model's.
        if model is not None and model not in models:
            models.append(model)
    return models


def check_held_out(test_images: Images, images: Images) -> None:
    fitted = set(map(_known_by, images))
    both = [place for place, image in enumerate(test_images) if _known_by(image) in fitted]
    if both:
        first = test_images[both[0]]
        if not isinstance(first, str):
            first = f"the one in place {both[0] + 1}"
        remedy = "held out means others (of a data set another --test_split)"
        raise ValueError(f"{len(both)} of --test_images are among --images ({first}): {remedy}")


def _known_by(image: str | dict) -> str:
    """What is the same of the same picture: a picture inside a row is known by its bytes. A file has several names, of
    a folder's as it was typed, of rows' from the root on, or through a link."""
    if isinstance(image, str):
        return os.path.realpath(image)
    return hashlib.blake2b(image["bytes"], digest_size=16).hexdigest()


def teachers_of(tasks: list[dict], args: OlaVlmArguments) -> dict[str, dict]:
    given = args.teachers or {}
    return {task["name"]: given[task["name"]] for task in tasks}


def make_settings(
    options: Namespace, args: OlaVlmArguments, tasks: list[dict], images: Sequence, test_images: Sequence
) -> dict:
    # Of files their names: gigabytes of pictures would be read for it. One after the other: of a data set each is read
    # from its row, and all would not fit into memory.
    digest = hashlib.blake2b(digest_size=8)
    for image in itertools.chain(images, test_images):
        if isinstance(image, str):
            digest.update(image.encode())
        else:
            digest.update(image["bytes"])
    settings = {
        "probe": options.probe,
        "tasks": tasks,
        "teachers": teachers_of(tasks, args),
        "images": options.images,
        "test_images": options.test_images,
        "images_hash": digest.hexdigest(),
        "seed": args.seed,
        "prompt": options.prompt,
        "square": not options.no_square,
        "batch_size": options.batch_size,
        "model_dtype": options.model_dtype,
    }
    if options.probe == "resampler":
        # A ridge doesn't depend on these: an OUT of ridges takes any.
        settings["epochs"] = options.epochs
        settings["step_images"] = options.step_images
        settings["learning_rate"] = args.learning_rate
        settings["standardized"] = args.standardize_targets
    return settings


def begin(out: Path, settings: dict) -> None:
    """Leaves the settings in `out`. ValueError if its probes have others, if it is no folder of probes, or if another
    process is writing there."""
    check_settings(out, settings)
    # Before anything slow it is seen whether it can be written to.
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out):
        write_settings(out, settings)


def check_settings(out: Path, settings: dict) -> None:
    """ValueError if `out` has probes with others, or is no folder of probes."""
    files = [out / name for name in (SETTINGS_FILE, OLD_SETTINGS_FILE) if (out / name).exists()]
    if not files:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty and not of `ola-vlm probe`: choose another --out")
        return
    # What a call has left that failed before it fitted anything binds none after it.
    if not any(has_fit(folder) for folder in out.iterdir()):
        return
    # Lists for tuples, as in the file.
    settings = json.loads(json.dumps(settings))
    other = read_object(files[0])
    # Names of both: what only one of them has is a difference, too, unless it is null.
    different = sorted(name for name in settings.keys() | other.keys() if settings.get(name) != other.get(name))
    if different:
        raise ValueError(f"{out} has probes with another {', '.join(different)}: choose another --out")


def write_settings(out: Path, settings: dict) -> None:
    """Only while no other process writes to `out`, which may have begun since it was looked at: ValueError if it has
    probes with others."""
    check_settings(out, settings)
    # An OUT of before keeps its own file.
    if not any(has_fit(folder) for folder in out.iterdir()):
        write_json(out / SETTINGS_FILE, settings)


def open_targets(tasks: list[dict], images: Images, args: OlaVlmArguments) -> tuple[dict, Images, list[str]]:
    """Each task's function of images, the images that have targets, and their keys in the cache, if there is one."""
    teachers = make_teachers(tasks, teachers_of(tasks, args), args.device)
    if not args.target_cache:
        # Computed with each pass, and without keys: nothing is stored.
        return {name: teacher.encoder.encode for name, teacher in teachers.items()}, images, []
    filled = fill_caches(args, teachers, images, compute=True)  # pyright: ignore[reportArgumentType] (has the fields that are read)
    # In the order of `filled.keys`, which has the same images.
    usable = np.setdiff1d(np.arange(len(images)), list(filled.failed))
    return filled.caches, images[usable], filled.keys


# ------------------------------------------------------------------------ a model's steps, which are not done again
def model_folder(out: Path, model: str) -> Path:
    """The folder that says it is this model's, else a new one."""
    # A path's slashes, or that of owner/name, can't be in a folder's name.
    folder = out / re.sub(r"[^\w.-]+", "_", model.strip("/"))
    if model_of(folder) in (None, model):
        return folder
    # Of a model with another path that becomes the same name, as runs/a_b and runs_a/b do.
    digest = hashlib.blake2b(model.encode(), digest_size=4).hexdigest()
    return folder.with_name(f"{folder.name}-{digest}")


def model_of(folder: Path) -> str | None:
    """The model that a folder says it is of, if it does."""
    known = read_finished(folder / "model.json") or {}
    model = known.get("model")
    return plain_name(model) if isinstance(model, str) else None


def plain_name(model: str) -> str:
    """A folder with or without a slash at its end is the same one."""
    return model.rstrip("/") or model


def has_fit(folder: Path) -> bool:
    """Whether something of a model was fitted there, be it unfinished."""
    return any((folder / name).exists() for name in (UNFINISHED_FILE, *FITTED_FILES.values()))


def check_weights(out: Path, model: str) -> None:
    """ValueError if there is no such model, or if it was probed with other weights."""
    folder = model_folder(out, model)
    weights = weights_state(model)
    known = read_finished(folder / "model.json") or {}
    if has_fit(folder) and known.get("weights") != weights:
        raise ValueError(f"{model} was probed in {folder} with other weights: choose another --out")


def hash_of_splits(splits: dict[str, Images]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, images in splits.items():
        digest.update(f"{name} {images.indices.tolist()}".encode())
    return digest.hexdigest()


def check_images(out: Path, model: str, images_hash: str) -> None:
    """ValueError if it was probed when other images had no target: with one image less all are split otherwise, and
    some that were fitted would be held out."""
    folder = model_folder(out, model)
    known = read_finished(folder / "model.json") or {}
    # Files of before don't say it.
    if has_fit(folder) and known.get("images_hash") not in (None, images_hash):
        raise ValueError(f"{model} was probed in {folder} when other images had no target: choose another --out")


def make_fit(run: ProbeRun, loaded: LoadedModel, model: str) -> RidgeFit | ResamplerFit:
    """A fit that has seen nothing yet. The model's shape is that in its folder."""
    known = read_object(model_folder(run.options.out, model) / "model.json")
    about = {"model": model, "prompt": run.options.prompt, "square": not run.options.no_square}
    if run.is_ridge:
        return RidgeFit(run.tasks, known["num_layers"], known["hidden_size"], about)
    return ResamplerFit(
        run.tasks,
        known["num_layers"],
        known["hidden_size"],
        about,
        images=len(run.splits["train"]),
        epochs=run.options.epochs,
        step_images=run.options.step_images,
        learning_rate=run.args.learning_rate,
        seed=run.args.seed,
        statistics=run.statistics,
        device=loaded.reader(model).model.device,
    )


def split_batches(run: ProbeRun, loaded: LoadedModel, model: str, part: str):
    """States and targets of the images of a split."""
    return batches(
        loaded.reader(model),
        run.targets,
        run.splits[part],
        run.options.batch_size,
        workers=run.args.dataloader_num_workers,
        describe=f"{short_names(run.models)[model]}: {part}",
    )


def fit_model(run: ProbeRun, loaded: LoadedModel, model: str) -> None:
    """Leaves the ridge's statistics and scores of each alpha on validation images, or the resamplers."""
    folder = model_folder(run.options.out, model)
    if (folder / run.fitted_file).exists():
        return
    reader = loaded.reader(model)
    # The LLM's part of the configuration. One layer more than it has blocks: the embeddings.
    text_config = reader.model.config.get_text_config()
    about = {
        "num_layers": text_config.num_hidden_layers + 1,
        "hidden_size": text_config.hidden_size,
        "model": model,
        "weights": weights_state(model),
        "class": type(reader.model).__name__,
        "images_hash": run.images_hash,
    }
    # Before the fit: `make_fit` takes the shape from it, a later call compares the weights.
    write_json(folder / "model.json", about)
    fitter = make_fit(run, loaded, model)
    fit_training_images(run, loaded, model, fitter)
    if isinstance(fitter, ResamplerFit):
        fitter.finish().save(folder)
        # The optimizer's state is of no use once the probes are saved.
        (folder / UNFINISHED_FILE).unlink()
        return
    # A ridge's statistics stay: its probes are made of them when alpha is chosen, after all models are fitted.
    probes = {alpha: fitter.solve(dict.fromkeys(run.targets, alpha)) for alpha in ALPHAS}
    scores, _ = score(split_batches(run, loaded, model, "validation"), probes)
    write_json(folder / run.fitted_file, scores)


def fit_training_images(run: ProbeRun, loaded: LoadedModel, model: str, fitter: RidgeFit | ResamplerFit) -> None:
    """From what is kept in the model's folder on; it goes through no image again if that is all."""
    fit(
        fitter,
        loaded.reader(model),
        run.targets,
        run.splits["train"],
        run.options.batch_size,
        workers=run.args.dataloader_num_workers,
        describe=f"{short_names(run.models)[model]}: fit",
        saved=model_folder(run.options.out, model) / UNFINISHED_FILE,
    )


def choose_alphas(run: ProbeRun) -> dict[str, float]:
    """A task's, the same for all models and layers; none for resamplers."""
    if not run.is_ridge:
        return {}
    validation = [read_object(model_folder(run.options.out, model) / run.fitted_file) for model in run.models]
    return {task["name"]: float(choose_alpha(validation, task["name"])) for task in run.tasks}


def score_model(run: ProbeRun, loaded: LoadedModel, model: str, alphas: dict[str, float]) -> dict:
    """Scores on the test images of the probes with these alphas, which are saved."""
    folder = model_folder(run.options.out, model)
    known = read_finished(folder / "scores.json") or {}
    # Scored with these alphas before ({} for resamplers). Older files call them strengths.
    if known.get("alphas", known.get("strengths")) == alphas:
        return known
    device = loaded.reader(model).model.device
    # The probes of the alphas that were chosen; resamplers are saved already.
    if run.is_ridge:
        fitter = make_fit(run, loaded, model)
        assert isinstance(fitter, RidgeFit)
        # Its statistics may have been deleted to save room, or be unfinished since.
        fit_training_images(run, loaded, model, fitter)
        fitter.solve(alphas).save(folder)
    probes = load_probes(folder).to(device)
    scores, zero = score(split_batches(run, loaded, model, "test"), {model: probes})
    results = {"alphas": alphas, "scores": scores[model], "zero": zero}
    write_json(folder / "scores.json", results)
    return results


def compute_results(run: ProbeRun) -> dict:
    """probes.json's content, of all models that OUT has; all are fitted, and tested where need be."""
    loaded = LoadedModel(run.options, run.args.trust_remote_code)
    # All fits come first: an alpha is one for all models.
    for model in run.models:
        fit_model(run, loaded, model)
    alphas = choose_alphas(run)
    # The last one that was fitted is still loaded.
    tested = {model: score_model(run, loaded, model, alphas) for model in reversed(run.models)}

    names = short_names(run.models)
    by_model = {}
    for model in run.models:
        folder = model_folder(run.options.out, model)
        by_model[model] = {
            "name": names[model],
            "folder": folder.name,
            "weights": read_object(folder / "model.json")["weights"],
            "scores": tested[model]["scores"],
        }
    return {
        "run": run.settings,
        "image_counts": {name: len(images) for name, images in run.splits.items()},
        "alphas": alphas,
        # Targets and their mean are the same for all models, so one zero is enough.
        "zero": tested[run.models[0]]["zero"],
        "models": by_model,
    }


def table(results: dict) -> str:
    """Each model's scores by task: mean over layers, best layer, last layer."""
    kind = results["run"]["probe"]
    lines = [
        f"{kind} probes on {results['image_counts']['test']} images: mean-centered cosine, plain in brackets",
        f"{'model':<28}{'task':<8}{'mean over layers':>20}{'best layer':>24}{'last layer':>18}",
    ]

    def cell(scores: np.ndarray) -> str:
        return f"{scores[0]:.3f} ({scores[1]:.3f})"

    for model in results["models"].values():
        for task, layers in model["scores"].items():
            # (layers, 2): centered, plain. The best layer is the best one by the centered score.
            scores = np.array([[layer[kind], layer[f"{kind}_plain"]] for layer in layers.values()])
            best = int(scores[:, 0].argmax())
            mean_cell = cell(scores.mean(0))
            best_cell = f"{best}: {cell(scores[best])}"
            last_cell = cell(scores[-1])
            name = one_line(model["name"])
            lines.append(f"{name:<28}{one_line(task):<8}{mean_cell:>20}{best_cell:>24}{last_cell:>18}")
    return "\n".join(lines)


@command("probe")
def main(options: Namespace) -> None:
    if not options.values:
        # The paper's tasks and teachers, if the user names no recipe.
        options.values = RECIPES["llama3_vit_pretrain"]()
    if options.prompt is None:
        options.prompt = PROMPT
    # Nothing is trained in bf16 here, and a recipe's wish for it would fail on a CPU.
    args = make_arguments(options, "ola-vlm probe", bf16=False)
    if processes().num_processes > 1:
        raise ValueError("it runs in one process; give --device_map auto for a model on several GPUs")
    options.models = list(dict.fromkeys(map(plain_name, options.models)))
    run = prepare(options, args)
    with only_one(options.out):
        # Another process may have been here since.
        write_settings(options.out, run.settings)
        results = compute_results(run)
        write_json(options.out / "probes.json", results)
        curves_figure(options.out / "probes.png", results)
    print(terminal(table(results)))
    first = options.models[0]
    tell(
        f"Results: {options.out} (probes.json, probes.png, a folder of probes a model)",
        f"Next: ola-vlm visualize {first} IMAGE --probes {model_folder(options.out, first)}",
    )
