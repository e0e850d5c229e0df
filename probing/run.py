"""Probe a frozen model's layers: `ola-vlm probe MODEL... --images DIR --out OUT [--recipe NAME] [--any_field value]`.

MODEL: any image-text-to-text model of transformers, folders or names on the Hub. A probe on every layer of the LLM, 0
(the embeddings) to the last, tells how well the layer's states predict the features of the recipe's teachers, on
images that were held out. OUT gets probes.json (all scores), probes.png (all curves), and a folder a model with its
probes (`probing.probes.load_probes`). Interrupted, the same command goes on; more models can be added to an OUT. Of a
recipe (llama3_vit_pretrain, the paper's) its tasks, teachers, target cache, seed, and for resamplers learning_rate and
standardize_targets matter here.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from ..configuration_ola_vlm import PAPER_TASKS
from ..inference.checkpoints import load_checkpoint, processes, weights_state
from ..recipes.command_line import parse_arguments
from ..targets.escapes import one_line, terminal
from ..targets.files import only_one, read_finished, write_json
from ..targets.fill import make_teachers
from ..targets.images import IMAGE_ENDINGS, image_files
from ..training.arguments import OlaVlmArguments
from ..training.rows import load_rows, row_images
from ..training.targets import fill_caches
from .figures import curves_figure
from .fit import batches, fit
from .probes import load_probes, score
from .resampler import ResamplerFit
from .ridge import STRENGTHS, RidgeFit, choose_strength
from .states import PROMPT, StateReader

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1  # of the images


class Images(Sequence):
    """Of a folder, or of a data set's rows: by its number, or those that a slice or an array of numbers chooses."""

    def __init__(self, get: Callable, places: np.ndarray):
        self.get, self.places = get, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i):
        return Images(self.get, self.places[i]) if isinstance(i, (slice, np.ndarray)) else self.get(self.places[i])


def find_images(place: str, args: OlaVlmArguments) -> Images:
    """The image files of a folder and those below it, else what the rows of a data set hold (`training.rows`), with
    words or without; each file once. ValueError if there are none."""
    if Path(place).is_dir():
        if files := image_files(place):
            return Images(files.__getitem__, np.arange(len(files)))
    elif not place.endswith((".json", ".jsonl")) and not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        raise ValueError(f"{place} is no folder, no .json or .jsonl file and no name of a data set")
    try:
        rows = load_rows(place, args.image_folder, args.data_config, args.data_split)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{place} has no images ({', '.join(sorted(IMAGE_ENDINGS))}) and no rows: {error}") from error

    def images_of(i: int) -> list:
        return row_images(rows.source[i], rows.image_folder)

    places = [(i, n, image) for i in range(len(rows.source)) for n, image in enumerate(images_of(i))]
    once = {image if isinstance(image, str) else (i, n): (i, n) for i, n, image in places}
    if not once:
        raise ValueError(f"the rows of {place} have no images")
    return Images(lambda at: images_of(int(at[0]))[at[1]], np.array(list(once.values())))


def split(count: int, seed: int, has_test: bool) -> dict[str, np.ndarray]:
    """Places of training, validation and, unless they come apart, test images; the same for a seed."""
    order = np.random.default_rng(seed).permutation(count)
    test = 0 if has_test else max(1, round(TEST_SHARE * count))
    stop = test + max(1, round(VALIDATION_SHARE * count))
    if count <= stop:
        raise ValueError(f"{count} images are too few: at least 3, and thousands for a probe that means something")
    return {"train": np.sort(order[stop:]), "validation": np.sort(order[test:stop]), "test": np.sort(order[:test])}


def options() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("models", nargs="+", metavar="MODEL", help="folders or names on the Hub")
    own.add_argument("--images", required=True, help="a folder of images, a .json of rows, or a Hugging Face data set")
    own.add_argument("--out", type=Path, required=True)
    own.add_argument("--targets", nargs="+", metavar="TASK", help="tasks of the recipe; all by default")
    own.add_argument("--probe", choices=["ridge", "resampler"], default="ridge")
    own.add_argument("--test_images", help="held-out images of their own; by default a fifth of --images")
    own.add_argument("--max_images", type=int, help="of --images, drawn by the seed; all by default")
    own.add_argument("--batch_size", type=int, default=16, help="images a forward pass")
    own.add_argument("--epochs", type=int, default=2, help="of a resampler")
    own.add_argument("--step_images", type=int, default=256, help="images an optimiser step of a resampler")
    own.add_argument("--prompt", default=PROMPT, help="the words after the image")
    own.add_argument("--own_geometry", action="store_true", help="don't pad images to the square that teachers see")
    own.add_argument("--model_dtype", default="auto", help="auto: the checkpoint's, float32 on a CPU")
    own.add_argument("--device_map", help="auto, cuda:1, ...")
    own.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a checkpoint")
    return own


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def short_names(models: Sequence[str]) -> dict[str, str]:
    """What tells them apart: their paths without the parts that all share at the begin and the end."""
    parts = [re.split(r"[/\\]+", model.strip("/\\")) for model in models]
    while len(parts) > 1 and all(len(one) > 1 and one[0] == parts[0][0] for one in parts):
        parts = [one[1:] for one in parts]
    while len(parts) > 1 and all(len(one) > 1 and one[-1] == parts[0][-1] for one in parts):
        parts = [one[:-1] for one in parts]
    return dict(zip(models, ["/".join(one if len(parts) > 1 else one[-1:]) for one in parts], strict=True))


def find_tasks(own: argparse.Namespace, args: OlaVlmArguments) -> list[dict]:
    known = [{**PAPER_TASKS.get(task["name"], {}), **task} for task in args.tasks or []]
    if not known or not args.teachers:
        raise ValueError("the recipe has no tasks and teachers: name another one, or give --tasks and --teachers")
    names = [task["name"] for task in known]
    if unknown := set(own.targets or []) - set(names):
        raise ValueError(f"the recipe has no task {', '.join(sorted(unknown))}: choose of {', '.join(names)}")
    return [task for task in known if task["name"] in (own.targets or names)]


def check_settings(out: Path, settings: dict) -> None:
    """ValueError if `out` was begun with others."""
    file = out / "run.json"
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty and not of `ola-vlm probe`: choose another --out")
        write_json(file, settings)
    settings, other = json.loads(json.dumps(settings)), read_json(file)
    if differs := sorted(name for name in settings.keys() | other.keys() if settings.get(name) != other.get(name)):
        raise ValueError(f"{out} has probes with another {', '.join(differs)}: choose another --out")


def open_targets(tasks: list[dict], images: Images, args: OlaVlmArguments) -> tuple[dict, Images, list[str]]:
    """Each task's function of images, the images that have targets, and their keys in the cache, if there is one."""
    teachers = make_teachers(tasks, {task["name"]: args.teachers[task["name"]] for task in tasks}, args.device)
    if not args.target_cache:
        return {name: teacher.encoder.encode for name, teacher in teachers.items()}, images, []
    filled = fill_caches(args, teachers, images, compute=True)
    usable = np.setdiff1d(np.arange(len(images)), list(filled.failed))
    return filled.caches, images[usable], filled.keys


class Run:
    """One --out: what holds for all its models, and each model's steps, which are not done again."""

    def __init__(self, own: argparse.Namespace, args: OlaVlmArguments):
        self.own, self.args, self.tasks = own, args, find_tasks(own, args)
        images, tests = find_images(own.images, args), None
        if own.max_images:
            images = images[np.sort(np.random.default_rng(args.seed).permutation(len(images))[: own.max_images])]
        if own.test_images:
            tests = find_images(own.test_images, args)
            fitted = {image for image in images if isinstance(image, str)}
            if both := [image for image in tests if isinstance(image, str) and image in fitted]:
                raise ValueError(f"{len(both)} of --test_images are among --images ({both[0]}): held out means others")
        split(len(images), args.seed, tests is not None)  # before any work
        names = hashlib.blake2b(digest_size=8)
        for image in (*images, *(tests or [])):
            names.update(image.encode() if isinstance(image, str) else image["bytes"])
        self.settings = {
            "probe": own.probe,
            "tasks": self.tasks,
            "teachers": {task["name"]: args.teachers[task["name"]] for task in self.tasks},
            "images": own.images,
            "test_images": own.test_images,
            "images_hash": names.hexdigest(),
            "seed": args.seed,
            "prompt": own.prompt,
            "square": not own.own_geometry,
            "batch_size": own.batch_size,
            "model_dtype": own.model_dtype,
        }
        if own.probe == "resampler":
            self.settings |= {"epochs": own.epochs, "step_images": own.step_images}
            self.settings |= {"learning_rate": args.learning_rate, "standardized": args.standardize_targets}
        for model in own.models:
            self.folder(model)
        check_settings(own.out, self.settings)
        self.targets, images, keys = open_targets(self.tasks, images, args)
        places = split(len(images), args.seed, tests is not None)
        self.splits = {name: images[chosen] for name, chosen in places.items()}
        if tests is not None:
            # The caches are opened anew: those from before don't know these images.
            self.targets, self.splits["test"], _ = open_targets(self.tasks, tests, args)
        self.statistics = {}
        if own.probe == "resampler" and args.standardize_targets:
            trained = [keys[i] for i in places["train"]]
            self.statistics = {name: targets.statistics(trained) for name, targets in self.targets.items()}

    def folder(self, model: str) -> Path:
        """The model's. ValueError if there is no such model, or if it was probed with other weights."""
        folder = self.own.out / re.sub(r"[^\w.-]+", "_", model.strip("/"))
        known = folder / "model.json"
        weights = weights_state(model)
        if known.exists() and read_json(known)["weights"] != weights:
            raise ValueError(f"{model} was probed in {folder} with other weights: choose another --out")
        return folder

    @lru_cache(maxsize=1)  # noqa: B019
    def reader(self, model: str) -> StateReader:
        own = self.own
        loaded = load_checkpoint(model, own.model_dtype, own.device_map, own.trust_remote_code)
        return StateReader(*loaded, own.prompt, not own.own_geometry)

    def batches(self, model: str, part: str):
        describe = f"{short_names(self.own.models)[model]}: {part}"
        workers = self.args.dataloader_num_workers
        return batches(self.reader(model), self.targets, self.splits[part], self.own.batch_size, workers, describe)

    def fitter(self, about: dict) -> RidgeFit | ResamplerFit:
        shape = (self.tasks, about["num_layers"], about["hidden_size"])
        about = {"model": about["model"], "prompt": self.own.prompt, "square": not self.own.own_geometry}
        if self.own.probe == "ridge":
            return RidgeFit(*shape, about)
        return ResamplerFit(
            *shape,
            about,
            images=len(self.splits["train"]),
            epochs=self.own.epochs,
            step_images=self.own.step_images,
            learning_rate=self.args.learning_rate,
            seed=self.args.seed,
            statistics=self.statistics,
            device=self.reader(about["model"]).model.device,
        )

    def fit(self, model: str) -> None:
        """Leaves the ridge's statistics and scores of each strength on validation images, or the resamplers."""
        folder = self.folder(model)
        done = folder / ("validation.json" if self.own.probe == "ridge" else "probes.safetensors")
        if done.exists():
            return
        reader = self.reader(model)
        text = reader.model.config.get_text_config()
        about = {"num_layers": text.num_hidden_layers + 1, "hidden_size": text.hidden_size}
        about |= {"model": model, "weights": weights_state(model), "class": type(reader.model).__name__}
        write_json(folder / "model.json", about)
        fitter, saved = self.fitter(about), folder / "fit.safetensors"
        describe, workers = f"{short_names(self.own.models)[model]}: fit", self.args.dataloader_num_workers
        train = self.splits["train"]
        fit(fitter, reader, self.targets, train, self.own.batch_size, workers, describe, saved)
        if self.own.probe == "resampler":
            fitter.finish().save(folder)
            saved.unlink()
            return
        probes = {strength: fitter.solve(dict.fromkeys(self.targets, strength)) for strength in STRENGTHS}
        write_json(done, score(self.batches(model, "validation"), probes)[0])

    def test(self, model: str, strengths: dict[str, float]) -> dict:
        """Scores on the test images of the probes with these strengths, which are saved."""
        folder = self.folder(model)
        done = folder / "scores.json"
        known = read_finished(done) or {}
        if known.get("strengths") == strengths:
            return known
        if strengths:
            about = read_json(folder / "model.json")
            fitter = self.fitter(about)
            fitter.load_state(load_file(folder / "fit.safetensors", device=str(self.reader(model).model.device)))
            fitter.solve(strengths).save(folder)
        probes = load_probes(folder).to(self.reader(model).model.device)
        scores, zero = score(self.batches(model, "test"), {0: probes})
        scores = {"strengths": strengths, "scores": scores[0], "zero": zero}
        write_json(done, scores)
        return scores

    def results(self) -> dict:
        """probes.json's content, of all models that OUT has; all are fitted, and tested where need be."""
        for model in self.own.models:
            self.fit(model)
        finished = "validation.json" if self.own.probe == "ridge" else "probes.safetensors"
        folders = [path.parent for path in sorted(self.own.out.glob(f"*/{finished}"))]
        models = [read_json(folder / "model.json")["model"] for folder in folders]
        models = [*self.own.models, *(model for model in models if model not in self.own.models)]
        self.own.models, strengths = models, {}
        if self.own.probe == "ridge":
            validation = [read_json(self.folder(model) / "validation.json") for model in models]
            strengths = {task["name"]: float(choose_strength(validation, task["name"])) for task in self.tasks}
        # The last one that was fitted is still loaded.
        tested = {model: self.test(model, strengths) for model in reversed(models)}
        counts, names = {name: len(images) for name, images in self.splits.items()}, short_names(models)
        return {
            "run": self.settings,
            "image_counts": counts,
            "strengths": strengths,
            "zero": tested[models[0]]["zero"],
            "models": {
                model: {
                    "name": names[model],
                    "folder": self.folder(model).name,
                    "weights": read_json(self.folder(model) / "model.json")["weights"],
                    "scores": tested[model]["scores"],
                }
                for model in models
            },
        }


def table(results: dict) -> str:
    """Each model's scores by task: mean over layers, best layer, last layer."""
    kind = results["run"]["probe"]
    lines = [f"{kind} probes on {results['image_counts']['test']} images: mean-centred cosine, plain in brackets"]
    lines.append(f"{'model':<28}{'task':<8}{'mean over layers':>20}{'best layer':>24}{'last layer':>18}")
    for one in results["models"].values():
        for task, layers in one["scores"].items():
            both = np.array([[layer[kind], layer[f"{kind}_plain"]] for layer in layers.values()])
            best = int(both[:, 0].argmax())
            cells = [f"{a:.3f} ({b:.3f})" for a, b in (both.mean(0), both[best], both[-1])]
            name = one_line(one["name"])
            line = f"{name:<28}{one_line(task):<8}{cells[0]:>20}{f'{best}: {cells[1]}':>24}{cells[2]:>18}"
            lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[2:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):  # without the training arguments' seven hundred lines
        layout = argparse.RawDescriptionHelpFormatter
        recipe = argparse.ArgumentParser(
            "ola-vlm probe", description=__doc__, formatter_class=layout, parents=[options()]
        )
        recipe.add_argument("--recipe", metavar="NAME", help="whose tasks and teachers (llama3_vit_pretrain)")
        recipe.print_help()
        return
    if not any(one.split("=")[0] == "--recipe" for one in argv):
        argv += ["--recipe", "llama3_vit_pretrain"]
    # Nothing is trained in bf16 here, and a recipe's wish for it would be refused on a CPU.
    args, own = parse_arguments(argv, "ola-vlm probe", options(), bf16=False)
    if processes().num_processes > 1:
        raise SystemExit("ola-vlm probe: it runs in one process; give --device_map auto for a model on several GPUs")
    own.models = list(dict.fromkeys(own.models))
    try:
        run = Run(own, args)
        with only_one(own.out):
            results = run.results()
            write_json(own.out / "probes.json", results)
            curves_figure(own.out / "probes.png", results)
        print(terminal(table(results)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"ola-vlm probe: {error}") from error
