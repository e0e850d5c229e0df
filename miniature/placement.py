"""Why do a LLaVA projector's tokens lie where they lie? Norms and directions along pre-training, for learning rates
and for starts of other sizes.

    python -m ola_vlm.miniature.placement --study runs/objectives --out runs/placement

`--study`: a folder that `ola-vlm study objectives` has prepared, whose scenes and stored vision features are used.
Each run is LLaVA's pre-training of docs/STUDY.md; its last linear layer is scaled before the first step, which scales
the tokens alike. What is done is kept in `--out` and not done again. Prints a table, writes placement.json and .png.
"""

import argparse
import shutil
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from transformers import AutoConfig, TrainerCallback, logging

from ..files.writing import save_figure, write_json
from ..probing.figures import STYLE
from ..processing_ola_vlm import OlaVlmProcessor
from ..recipes import miniature as recipe
from ..recipes import study as design
from ..train import train
from ..training.arguments import OlaVlmArguments
from .asking import PLACED_IMAGES, Questions, token_placement
from .objective_trial import accuracy, rounded
from .report import table
from .stored_vision import StoredCollator, StoredVision, TrainOnFeatures
from .trial import read_json

# Steps between two looks.
EVERY = 40
# (learning rate, factor on the projector's last layer at the start)
RUNS = ((3e-4, 1.0), (1e-3, 1.0), (3e-3, 1.0), (1e-3, 0.25), (1e-3, 4.0))


class Looks(TrainerCallback):
    """Scales the projector's start, and notes where projected tokens lie every `EVERY` steps."""

    def __init__(self, start: float, look):
        self.start = start
        self.look = look
        self.seen: list[dict] = []

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model, **kwargs):
        # Weight and bias of the last linear layer: all tokens become `start` times as long and keep their directions.
        last = model.model.multi_modal_projector.linear_2
        last.weight.mul_(self.start)
        last.bias.mul_(self.start)
        self.seen.append({"step": 0, **self.look(model)})

    def on_step_end(self, args, state, control, model, **kwargs):
        # The last step, too, which need not be a multiple of EVERY.
        if state.global_step % EVERY == 0 or state.global_step == state.max_steps:
            self.seen.append({"step": state.global_step, **self.look(model)})


def pretrain(
    study: Path, out: Path, seed: int, learning_rate: float, start: float, scale: dict = design.SCALE
) -> dict:
    """One run: {learning_rate, start, seed, along: [{step, token_norm, embedding_norm, largest_cosine}], accuracy}.
    Accuracy: on the validation questions, right after it."""
    images = sorted((study / "data" / "images").glob("*.png"))
    store = StoredVision.prepare(study / "features", recipe.WEIGHTS / "vision_tower", images)
    # The images that the study's trials look at, too.
    names = [name for name in store.place if name.startswith("validation_")][:PLACED_IMAGES]
    # Rows behind the language model's own vocabulary, `<image>` and task tokens, are no words.
    words = AutoConfig.from_pretrained(recipe.WEIGHTS / "language_model").vocab_size
    checkpoint = out / "checkpoint"
    settings = {**design.DEFAULT_SETTINGS, "pretrain_lr": learning_rate}
    fields = design.pretrain_fields(
        arm=design.BASELINE, seed=seed, settings=settings, scale=scale, root=study, output=checkpoint
    )

    def look(model) -> dict[str, float]:
        return rounded(token_placement(model, store.features(names), words))

    looks = Looks(start, look)

    def make_collator(*arguments, **options):
        return StoredCollator(*arguments, store=store, **options)

    # Of an interrupted run: it begins anew.
    shutil.rmtree(checkpoint, ignore_errors=True)
    # ola_vlm.train, a script too, names the package absolutely: to pyright its classes are others.
    trainer = train(OlaVlmArguments(**fields), [looks, TrainOnFeatures()], make_collator=make_collator)  # pyright: ignore[reportArgumentType] (see above)
    # It is None only for a resumed run that has finished already.
    assert trainer is not None
    questions = read_json(study / "data" / "validation_questions.json")
    asked = Questions(questions, OlaVlmProcessor.from_pretrained(checkpoint), store)
    right = accuracy(asked, asked.correct(trainer.model))
    # The numbers are all that is asked for.
    shutil.rmtree(checkpoint)
    head = {"learning_rate": learning_rate, "start": start, "seed": seed}
    return {**head, "along": looks.seen, "accuracy": round(right["average"], 5)}


def report_lines(runs: list[dict]) -> list[str]:
    rows = []
    for run in runs:
        first = run["along"][0]
        last = run["along"][-1]
        rows.append([
            f"{run['learning_rate']:g}",
            f"{run['start']:g}",
            f"{first['token_norm']:.2f}",
            f"{last['token_norm']:.2f}",
            f"{last['embedding_norm']:.2f}",
            f"{first['largest_cosine']:.2f}",
            f"{last['largest_cosine']:.2f}",
            f"{100 * run['accuracy']:.1f}",
        ])  # fmt: skip
    return table(
        ["learning rate", "factor on the start", "norm at the start", "norm after PT", "norm of an embedding",
         "cosine at the start", "cosine after PT", "validation answers (%)"],
        rows,
    )  # fmt: skip


@rc_context(STYLE)
def draw(path: Path, runs: list[dict]) -> None:
    """Length in embeddings' norms, and nearness to a word, along pre-training; one line a run."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    lengths, cosines = figure.subplots(1, 2)
    for run in runs:
        steps = [look["step"] for look in run["along"]]
        label = f"learning rate {run['learning_rate']:g}, start x {run['start']:g}"
        # In units of an embedding's mean length: 1 is as long as a word.
        lengths.plot(steps, [look["token_norm"] / look["embedding_norm"] for look in run["along"]], label=label)
        cosines.plot(steps, [look["largest_cosine"] for look in run["along"]])
    lengths.axhline(1, color="black", linestyle=":", linewidth=1, label="as long as a word")
    lengths.set(title="length of a projected token", ylabel="mean norms of an embedding")
    # The runs' lengths differ by a factor of ten and more.
    lengths.set_yscale("log")
    cosines.set(title="nearness to a word", ylabel="largest cosine to an embedding")
    for axis in (lengths, cosines):
        axis.set_xlabel("steps of pre-training")
    figure.legend(*lengths.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save_figure(figure, path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="a prepared folder of `ola-vlm study objectives`")
    parser.add_argument("--out", type=Path, default=Path("runs/placement"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.study / "study.json").exists():
        parser.error(f"{args.study} has no study.json: run `ola-vlm study objectives --stage tune --out {args.study}`")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    runs = []
    for learning_rate, start in RUNS:
        # A file a run: called again, the command goes on with the first one that is missing.
        file = args.out / f"seed{args.seed}_{learning_rate:g}_{start:g}.json"
        if not file.exists():
            write_json(file, pretrain(args.study.resolve(), args.out, args.seed, learning_rate, start))
        runs.append(read_json(file))
    write_json(args.out / "placement.json", runs)
    draw(args.out / "placement.png", runs)
    print("\n".join(report_lines(runs)))


if __name__ == "__main__":
    main()
