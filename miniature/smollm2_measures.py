"""What is measured of a SmolLM2 that was taught to look: losses, choices, placement, its text-only answers, talks."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ..targets.images import open_image
from ..training.collator import IGNORE_INDEX, OlaVlmCollator
from ..training.rows import load_rows
from .asking import token_placement
from .smollm2_data import CAPTION_PROMPT
from .trial import read_json

# Tokens that a text-only answer may have.
ANSWER_LENGTH = 48
# Rows whose losses are computed at a time.
LOSS_BATCH = 8
# Images whose projected tokens are compared with all embeddings.
PLACED_IMAGES = 16


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
