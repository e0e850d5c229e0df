"""Probes on every layer of frozen models: `ola-vlm probe` (commands/probe.py).

A probe on every layer of the LLM, 0 (the embeddings) to the last, tells how well the layer's states predict the
features of the recipe's teachers, on images that were held out.
"""

import hashlib
import json
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from ..commands.running import command, tell
from ..configuration_ola_vlm import PAPER_TASKS
from ..inference.checkpoints import load_checkpoint, processes, weights_state
from ..recipes import RECIPES
from ..recipes.arguments import make_arguments
from ..targets.escapes import one_line, terminal
from ..targets.files import only_one, read_finished, write_json
from ..targets.fill import make_teachers
from ..targets.images import IMAGE_ENDINGS, image_files
from ..targets.statistics import TargetStatistics
from ..training.arguments import OlaVlmArguments
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
SETTINGS_FILE = "settings.json"
OLD_SETTINGS_FILE = "run.json"  # its name in an OUT of before


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


def find_images(name: str, args: OlaVlmArguments) -> Images:
    """The image files of a folder and those below it, else what the rows of a data set hold (`training.rows`), with
    words or without; each file once. ValueError if there are none."""
    if Path(name).is_dir():
        files = image_files(name)
        if files:
            return Images(files.__getitem__, np.arange(len(files)))
    elif not name.endswith((".json", ".jsonl")) and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name} is no folder, no .json or .jsonl file and no name of a data set")
    try:
        rows = load_rows(name, args.image_folder, args.data_config, args.data_split)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name} has no images ({', '.join(sorted(IMAGE_ENDINGS))}) and no rows: {error}") from error

    assert isinstance(rows, Rows)  # no stream
    source = rows.source
    image_folder = rows.image_folder

    def images_of(row: int) -> list:
        return row_images(source[row], image_folder)

    indices = {}  # a file, or an image that lies in a row -> (row, number of the image in it)
    for row in range(len(source)):
        for number, image in enumerate(images_of(row)):
            key = image if isinstance(image, str) else (row, number)
            indices[key] = (row, number)
    if not indices:
        raise ValueError(f"the rows of {name} have no images")
    return Images(lambda index: images_of(int(index[0]))[index[1]], np.array(list(indices.values())))


def split(count: int, seed: int, has_test: bool) -> dict[str, np.ndarray]:
    """Indices of training, validation and, unless they come apart, test images; the same for a seed."""
    order = np.random.default_rng(seed).permutation(count)
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


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def short_names(models: Sequence[str]) -> dict[str, str]:
    """What tells them apart: their paths without the parts that all share at the begin and the end."""
    paths = [re.split(r"[/\\]+", model.strip("/\\")) for model in models]
    if len(paths) == 1:
        return {models[0]: paths[0][-1]}
    while all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    while all(len(path) > 1 and path[-1] == paths[0][-1] for path in paths):
        paths = [path[:-1] for path in paths]
    return {model: "/".join(path) for model, path in zip(models, paths, strict=True)}


def find_tasks(options: Namespace, args: OlaVlmArguments) -> list[dict]:
    tasks = [{**PAPER_TASKS.get(task["name"], {}), **task} for task in args.tasks or []]
    if not tasks or not args.teachers:
        raise ValueError("the recipe has no tasks and teachers: name another one, or give --tasks and --teachers")
    names = [task["name"] for task in tasks]
    wanted = options.targets or names
    unknown = set(wanted) - set(names)
    if unknown:
        raise ValueError(f"the recipe has no task {', '.join(sorted(unknown))}: choose one of {', '.join(names)}")
    chosen = [task for task in tasks if task["name"] in wanted]
    of_words = [task["name"] for task in chosen if task.get("target") == "words"]
    if of_words and (options.targets or len(of_words) == len(chosen)):
        raise ValueError(f"{', '.join(of_words)}: words are no features that a probe predicts: name other --targets")
    return [task for task in chosen if task["name"] not in of_words]


@dataclass(frozen=True)
class ProbeRun:
    """What holds for all models of one OUT.

    options, args: of the command line; of `args` the recipe's fields.
    models: those that were asked for, then others that OUT has from before.
    settings: all that the probes depend on, JSON-ready; an OUT has probes of the same settings only.
    targets: task -> function of images that gives their targets (N, Q, E).
    splits: "train", "validation" and "test" -> their images.
    statistics: of the training images' targets, of tasks whose targets are standardized.
    """

    options: Namespace
    args: OlaVlmArguments
    models: list[str]
    tasks: list[dict]
    settings: dict
    targets: dict[str, Callable]
    splits: dict[str, Images]
    statistics: dict[str, TargetStatistics]

    @property
    def is_ridge(self) -> bool:
        return self.options.probe == "ridge"

    @property
    def fitted_file(self) -> str:
        return FITTED_FILES[self.options.probe]


class LoadedModel:
    """The model that was asked for last, which stays in memory; another one takes its place."""

    def __init__(self, options: Namespace):
        self.options = options
        self.name: str | None = None
        self.state_reader: StateReader | None = None

    def reader(self, name: str) -> StateReader:
        if name != self.name or self.state_reader is None:
            self.state_reader = None  # freed before the next one is read
            options = self.options
            model, processor = load_checkpoint(
                name, options.model_dtype, options.device_map, options.trust_remote_code
            )
            self.state_reader = StateReader(model, processor, options.prompt, square=not options.no_square)
            self.name = name
        return self.state_reader


# ------------------------------------------------------------------------- what is done before any model is loaded
def prepare(options: Namespace, args: OlaVlmArguments) -> ProbeRun:
    """Finds tasks, images and targets. ValueError for what can't work, before anything slow."""
    tasks = find_tasks(options, args)
    images = find_images(options.images, args)
    if options.max_images:
        chosen = np.random.default_rng(args.seed).permutation(len(images))[: options.max_images]
        images = images[np.sort(chosen)]
    test_images = None
    if options.test_images:
        test_images = find_images(options.test_images, args)
        check_held_out(test_images, images)
    has_test = test_images is not None
    split(len(images), args.seed, has_test)  # fails if they are too few
    settings = make_settings(options, args, tasks, [*images, *(test_images or [])])
    models = find_models(options)
    for model in models:
        check_weights(options.out, model)
    check_settings(options.out, settings)

    targets, images, keys = open_targets(tasks, images, args)
    indices = split(len(images), args.seed, has_test)
    splits = {name: images[chosen] for name, chosen in indices.items()}
    if has_test:
        # The caches are opened anew: those from before don't know these images.
        targets, splits["test"], _ = open_targets(tasks, test_images, args)
    statistics = {}
    if options.probe == "resampler" and args.standardize_targets:
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
        statistics=statistics,
    )


def find_models(options: Namespace) -> list[str]:
    """Those that were asked for, then those that OUT has fitted probes of."""
    models = list(options.models)
    for path in sorted(options.out.glob(f"*/{FITTED_FILES[options.probe]}")):
        model = read_json(path.parent / "model.json")["model"]
        if model not in models:
            models.append(model)
    return models


def check_held_out(test_images: Images, images: Images) -> None:
    fitted = {image for image in images if isinstance(image, str)}
    both = [image for image in test_images if isinstance(image, str) and image in fitted]
    if both:
        raise ValueError(f"{len(both)} of --test_images are among --images ({both[0]}): held out means others")


def teachers_of(tasks: list[dict], args: OlaVlmArguments) -> dict[str, dict]:
    given = args.teachers or {}
    return {task["name"]: given[task["name"]] for task in tasks}


def make_settings(options: Namespace, args: OlaVlmArguments, tasks: list[dict], images: list) -> dict:
    digest = hashlib.blake2b(digest_size=8)
    for image in images:
        digest.update(image.encode() if isinstance(image, str) else image["bytes"])
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
        settings["epochs"] = options.epochs
        settings["step_images"] = options.step_images
        settings["learning_rate"] = args.learning_rate
        settings["standardized"] = args.standardize_targets
    return settings


def check_settings(out: Path, settings: dict) -> None:
    """ValueError if `out` was begun with others."""
    files = [out / name for name in (SETTINGS_FILE, OLD_SETTINGS_FILE) if (out / name).exists()]
    if not files:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty and not of `ola-vlm probe`: choose another --out")
        write_json(out / SETTINGS_FILE, settings)
        return
    settings = json.loads(json.dumps(settings))  # lists for tuples, as in the file
    other = read_json(files[0])
    different = sorted(name for name in settings.keys() | other.keys() if settings.get(name) != other.get(name))
    if different:
        raise ValueError(f"{out} has probes with another {', '.join(different)}: choose another --out")


def open_targets(tasks: list[dict], images: Images, args: OlaVlmArguments) -> tuple[dict, Images, list[str]]:
    """Each task's function of images, the images that have targets, and their keys in the cache, if there is one."""
    teachers = make_teachers(tasks, teachers_of(tasks, args), args.device)
    if not args.target_cache:
        return {name: teacher.encoder.encode for name, teacher in teachers.items()}, images, []
    filled = fill_caches(args, teachers, images, compute=True)  # pyright: ignore[reportArgumentType]
    usable = np.setdiff1d(np.arange(len(images)), list(filled.failed))
    return filled.caches, images[usable], filled.keys


# ------------------------------------------------------------------------ a model's steps, which are not done again
def model_folder(out: Path, model: str) -> Path:
    return out / re.sub(r"[^\w.-]+", "_", model.strip("/"))


def check_weights(out: Path, model: str) -> None:
    """ValueError if there is no such model, or if it was probed with other weights."""
    folder = model_folder(out, model)
    weights = weights_state(model)
    if (folder / "model.json").exists() and read_json(folder / "model.json")["weights"] != weights:
        raise ValueError(f"{model} was probed in {folder} with other weights: choose another --out")


def make_fit(run: ProbeRun, loaded: LoadedModel, model: str) -> RidgeFit | ResamplerFit:
    """A fit that has seen nothing yet. The model's shape is that in its folder."""
    known = read_json(model_folder(run.options.out, model) / "model.json")
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
    text_config = reader.model.config.get_text_config()
    about = {
        "num_layers": text_config.num_hidden_layers + 1,
        "hidden_size": text_config.hidden_size,
        "model": model,
        "weights": weights_state(model),
        "class": type(reader.model).__name__,
    }
    write_json(folder / "model.json", about)
    fitter = make_fit(run, loaded, model)
    unfinished = folder / "fit.safetensors"
    fit(
        fitter,
        reader,
        run.targets,
        run.splits["train"],
        run.options.batch_size,
        workers=run.args.dataloader_num_workers,
        describe=f"{short_names(run.models)[model]}: fit",
        saved=unfinished,
    )
    if isinstance(fitter, ResamplerFit):
        fitter.finish().save(folder)
        unfinished.unlink()
        return
    probes = {alpha: fitter.solve(dict.fromkeys(run.targets, alpha)) for alpha in ALPHAS}
    scores, _ = score(split_batches(run, loaded, model, "validation"), probes)
    write_json(folder / run.fitted_file, scores)


def choose_alphas(run: ProbeRun) -> dict[str, float]:
    """A task's, the same for all models and layers; none for resamplers."""
    if not run.is_ridge:
        return {}
    validation = [read_json(model_folder(run.options.out, model) / run.fitted_file) for model in run.models]
    return {task["name"]: float(choose_alpha(validation, task["name"])) for task in run.tasks}


def score_model(run: ProbeRun, loaded: LoadedModel, model: str, alphas: dict[str, float]) -> dict:
    """Scores on the test images of the probes with these alphas, which are saved."""
    folder = model_folder(run.options.out, model)
    known = read_finished(folder / "scores.json") or {}
    if known.get("alphas", known.get("strengths")) == alphas:  # the latter: its name before
        return known
    device = loaded.reader(model).model.device
    if run.is_ridge:
        fitter = make_fit(run, loaded, model)
        assert isinstance(fitter, RidgeFit)
        fitter.load_state(load_file(folder / "fit.safetensors", device=str(device)))
        fitter.solve(alphas).save(folder)
    probes = load_probes(folder).to(device)
    scores, zero = score(split_batches(run, loaded, model, "test"), {model: probes})
    results = {"alphas": alphas, "scores": scores[model], "zero": zero}
    write_json(folder / "scores.json", results)
    return results


def compute_results(run: ProbeRun) -> dict:
    """probes.json's content, of all models that OUT has; all are fitted, and tested where need be."""
    loaded = LoadedModel(run.options)
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
            "weights": read_json(folder / "model.json")["weights"],
            "scores": tested[model]["scores"],
        }
    return {
        "run": run.settings,
        "image_counts": {name: len(images) for name, images in run.splits.items()},
        "alphas": alphas,
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
        options.values = RECIPES["llama3_vit_pretrain"]()
    if options.prompt is None:
        options.prompt = PROMPT
    # Nothing is trained in bf16 here, and a recipe's wish for it would fail on a CPU.
    args = make_arguments(options, "ola-vlm probe", bf16=False)
    if processes().num_processes > 1:
        raise ValueError("it runs in one process; give --device_map auto for a model on several GPUs")
    options.models = list(dict.fromkeys(options.models))
    run = prepare(options, args)
    with only_one(options.out):
        results = compute_results(run)
        write_json(options.out / "probes.json", results)
        curves_figure(options.out / "probes.png", results)
    print(terminal(table(results)))
    first = options.models[0]
    tell(
        f"Results: {options.out} (probes.json, probes.png, a folder of probes a model)",
        f"Next: ola-vlm visualize {first} IMAGE --probes {model_folder(options.out, first)}",
    )
