"""The miniature's own pretrained parts, trained from nothing on rendered scenes, each in its transformers class.

    python -m ola_vlm.miniature.components [--only language_model ...]

Interrupted runs resume from ``--work``. Every part is measured on held-out scenes; the command fails below a floor.
"""

import itertools
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    LlamaConfig,
    LlamaForCausalLM,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
)

from ..commands.parsing import Parser
from ..eval.dense import class_iou, confusion_matrix, mean_iou
from ..files.writing import write_whole
from ..targets.encoders import OneFormerEncoder
from ..world import language, render

WEIGHTS = Path(__file__).parent / "weights"
GRID = render.GRID
# Pixels a side.
PATCH = render.SIZE // GRID
IMAGE_MEAN = [0.5] * 3
IMAGE_STD = [0.25] * 3
# Part -> (what is measured, bound, whether a smaller figure is better)
FLOORS = {
    "language_model": ("accuracy from patches", 0.90, False),
    "vision_tower": ("retrieval over chance", 5.0, False),
    "gen": ("retrieval over chance", 5.0, False),
    "depth": ("absolute relative error", 0.12, True),
    "seg": ("mIoU", 0.35, False),
}
# Part -> optimizer steps.
STEPS = {"language_model": 6000, "vision_tower": 1600, "gen": 500, "depth": 900, "seg": 1800}
# Beside the world's own.
WORDS = ("describe", "the", "image", ".", ",", "and", "a", "yes", "no", "not", "is", "it", "are")
WARM_UP = 0.03
SECONDS_BETWEEN_STATES = 60


def pooled(outputs) -> torch.Tensor:
    """CLIP's features of texts or images, in what transformers gives."""
    return outputs.pooler_output


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the world's whole language, with the chat template (assistant spans are marked)."""
    # The words are read off texts about 200 scenes; coordinates, which a sample may miss, are added below.
    scenes = render.sample_scenes(200, seed=99)
    rng = np.random.default_rng(0)
    words: set[str] = set(WORDS)
    for i in range(len(scenes)):
        texts = [language.caption(scenes, i, rng), language.description(scenes, i)]
        for question in language.questions(scenes, i) + language.fetch_questions(scenes, i):
            texts += [question["question"], question["answer"]]
        for text in texts:
            words.update(text.split())
    for axis in "xyz":
        words.update(f"{axis}{k}" for k in range(language.BINS))
    # transformers' CLIP reads an end token of id 2 as the mistake that early configs had: here 2 is another token.
    special = ["<pad>", "<s>", "<unk>", "<end>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(words)])}
    template = (WEIGHTS / "language_model" / "chat_template.jinja").read_text()
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # A token is an option's letter in brackets, a word, or a mark. Inverted, "removed" removes what lies between.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\([A-D]\)|\w+|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        chat_template=template,
    )


def preprocess(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> normalized (N, 3, H, W) fp32, as every part's saved preprocessor does."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - IMAGE_MEAN[0]) / IMAGE_STD[0]


def fit(model, loss_of_step, steps: int, lr: float, work: Path, desc: str, weight_decay: float = 0.01):
    """Adam with warm-up and cosine decay; a state is kept each minute in ``work`` and taken up again.

    ``loss_of_step``: a function of a step's random generator and the share of the steps that are done.
    """
    # Norms and biases, the vectors, don't decay.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_rate, steps=steps))
    trained = {"model": model, "optimizer": optimizer, "schedule": schedule}
    path = work / f"{desc}.pt"
    # A state of other settings is refused: its schedule, or its shapes, would be others.
    settings = [steps, lr, weight_decay, sum(parameter.numel() for parameter in model.parameters())]
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(f"{path} was begun with {state['settings']}, not {settings}: remove it")
        for name, part in trained.items():
            part.load_state_dict(state[name])
        start = state["step"]
        # A state of before doesn't have it: it goes on with other random numbers.
        if "generator" in state:
            torch.set_rng_state(state["generator"])
    model.train()
    saved = time.time()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=desc, mininterval=5)
    for step in bar:
        # A generator for each step: it draws the same scenes whether or not the run was interrupted before it.
        loss = loss_of_step(np.random.default_rng([7, step]), step / steps)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{desc}: the loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if time.time() - saved > SECONDS_BETWEEN_STATES or step + 1 == steps:
            state = {name: part.state_dict() for name, part in trained.items()}
            # torch's own generator draws dropout, and the points at which OneFormer's loss looks.
            state.update(step=step + 1, settings=settings, generator=torch.get_rng_state())
            # Renamed when it is whole: interrupted meanwhile, the former state stays.
            unfinished = path.with_suffix(".tmp")
            torch.save(state, unfinished)
            unfinished.replace(path)
            saved = time.time()
    return model.eval()


def share_of_rate(step: int, steps: int) -> float:
    """Of the peak learning rate: a cosine over all steps that the first WARM_UP of them climb to.

    The shipped parts were trained so. transformers' own begins its cosine where the warm-up ends.
    """
    # step + 1: the first step's rate is not 0.
    warm_up = (step + 1) / (WARM_UP * steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(warm_up, cosine)


def scene_arrays(work: Path, split: str = "train") -> tuple[render.Scenes, dict[str, np.ndarray]]:
    """Rendered scenes of a split, kept on disk between runs."""
    path = work / f"scenes_{split}.safetensors"
    if not path.exists():
        # Seeds that none of the study's splits has (`world.dataset.SEEDS`).
        count, seed = {"train": (12_000, 11), "held_out": (1000, 12)}[split]
        scenes, arrays = render.make_scenes(count, seed, desc=path.stem)
        render.save_scenes(path, scenes, arrays)
    return render.load_scenes(path)


# ---------------------------------------------------------------------------------------------------------------------
# Language model
# ---------------------------------------------------------------------------------------------------------------------
def _encode_chats(tokenizer, chats: list[tuple[str, list[tuple[str, str]]]], apart: bool = False) -> dict:
    """(description, turns) chats -> right-padded ids and labels (answers and end tokens only).

    ``apart``: each turn sees the description and itself only, at the positions of a first turn, so that one sequence
    holds many one-question chats about a scene (a mask (B, 1, T, T) and position ids say so).
    """
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<user>", "<assistant>", "<end>"])
    columns = {"ids": [], "labels": [], "block": [], "positions": []}
    for text, turns in chats:
        # <s> <user> description: the description stands where an image does, before the first question.
        ids = [tokenizer.bos_token_id, user, *tokenizer(text, add_special_tokens=False).input_ids]
        prefix = len(ids)
        labels = [-100] * prefix
        # Which turn a token is of; 0: the description.
        block = [0] * prefix
        positions = list(range(prefix))
        for j, (question, answer) in enumerate(turns):
            asked = [*tokenizer(question, add_special_tokens=False).input_ids, assistant]
            # In one causal conversation a later turn begins with its own <user>; apart, each turn is the first.
            if j > 0 and not apart:
                asked = [user, *asked]
            answered = [*tokenizer(answer, add_special_tokens=False).input_ids, end]
            length = len(asked) + len(answered)
            ids += asked + answered
            labels += [-100] * len(asked) + answered
            block += [j + 1] * length
            start = len(positions)
            if apart:
                start = prefix
            positions += range(start, start + length)
        for name, row in {"ids": ids, "labels": labels, "block": block, "positions": positions}.items():
            columns[name].append(row)
    # Right-padded, each column by what means nothing in it.
    longest = max(map(len, columns["ids"]))
    fillers = {"ids": tokenizer.pad_token_id, "labels": -100, "block": -1, "positions": 0}
    padded = {}
    for name, rows in columns.items():
        filled = [row + [fillers[name]] * (longest - len(row)) for row in rows]
        padded[name] = torch.tensor(filled)
    block = padded["block"]
    batch = {"input_ids": padded["ids"], "labels": padded["labels"], "attention_mask": (block >= 0).long()}
    if apart:
        # (B, T, T), [b, i, j]: whether token i sees j, which is before it, of its own turn or the description.
        sees = (block[:, None] == block[:, :, None]) | (block[:, None] == 0)
        sees &= torch.ones(longest, longest, dtype=torch.bool).tril()
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        batch["attention_mask"] = mask[:, None]
        batch["position_ids"] = padded["positions"]
    return batch


def _embed_patches(model, tokenizer, batch: dict, descriptions: list[list[list[str]]]) -> dict:
    """The batch with ``inputs_embeds``: a patch of a description (behind two special tokens) is the sum of its words'
    embeddings, of which the ids hold the first."""
    table = model.get_input_embeddings()
    embeds = table(batch.pop("input_ids"))
    for row, description in enumerate(descriptions):
        for position, (_, *more) in enumerate(description, start=2):
            if more:
                embeds[row, position] += table(torch.tensor(tokenizer.convert_tokens_to_ids(more))).sum(0)
    batch["inputs_embeds"] = embeds
    return batch


def _ordinal_start(model, tokenizer, rng):
    """Coordinate words start on a smooth curve, so that neighbors are alike: numbers are ordered in any real LLM."""
    width = model.config.hidden_size
    with torch.no_grad():
        for axis in "xyz":
            directions = torch.from_numpy(rng.normal(0, 1, (4, width))).float()
            for k in range(language.BINS):
                # Four smooth numbers of the place along the axis, times four random directions: (4,) @ (4, H) -> (H,).
                s = (k + 0.5) / language.BINS
                code = torch.tensor([2 * s - 1, math.cos(math.pi * s), math.cos(2 * math.pi * s), 1.0])
                row = (code @ directions) / 2
                # Half a curve, half its own: on the curve alone neighbors are too alike to be copied exactly.
                model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(f"{axis}{k}")] += 0.05 * row


# The language model's curriculum, in shares of its steps: first it only looks attributes up, then it also compares
# them, more and more from patches, whose coordinate words go: without them a patch's place has to tell where it is.
LOOKUPS_ONLY_UNTIL = 0.1
ALL_CHATS_APART_UNTIL = 0.8
# Shares of the steps.
PATCHES_AT_FIRST = 0.5
PATCHES_AT_LAST = 0.9
# Share of the scenes; at first it is all.
COORDINATES_AT_LAST = 0.1
# A step.
CHATS = 16


def _curriculum(share: float) -> tuple[float, float]:
    """After this share of the steps: how many read patches, and how many of the patches' scenes tell coordinates."""
    if share < LOOKUPS_ONLY_UNTIL:
        return 0.0, 1.0
    # 0 where lookups end; 1 halfway from there to the end, and beyond.
    progress = min(1.0, (share - LOOKUPS_ONLY_UNTIL) / (1 - LOOKUPS_ONLY_UNTIL) / 0.5)
    patches = PATCHES_AT_FIRST + (PATCHES_AT_LAST - PATCHES_AT_FIRST) * progress
    return patches, max(COORDINATES_AT_LAST, 1 - progress)


def _turns(pool: render.Scenes, i: int, rng, lookups_only: bool, reads_patches: bool) -> list[tuple[str, str]]:
    """A conversation about scene i: questions, and now and then a list of all objects and a caption among them."""
    if lookups_only:
        turns = language.conversation(pool, i, 4, rng, fetch_share=1.0, ranges=True)
    else:
        # Many turns, and the list (below) in a quarter of the chats: docs/dev/LOG.md tells what fewer turns did.
        count = 18
        if reads_patches:
            count = 14
        turns = language.conversation(pool, i, count, rng, fetch_share=0.3, ranges=True)
    chat = [(turn["question"], turn["answer"]) for turn in turns]
    # Writing the list takes a lookup by name for each object (`language.listing`).
    if lookups_only or rng.random() < 0.25:
        chat.insert(int(rng.integers(len(chat))), ("what is where ?", language.listing(pool, i)))
    if rng.random() < 0.25:
        chat.insert(int(rng.integers(len(chat))), ("describe the image .", language.caption(pool, i, rng)))
    return chat


def train_language_model(work: Path, out: Path, steps: int):
    """A small Llama that answers the world's questions from a textual description; returns accuracy by task.

    A large LLM reads projected patches (several words in one vector, in a grid of rows) without having seen any, which
    is why LLaVA's pre-training with a frozen LLM works. A small one learns that here, from pictures made of words. Its
    rope_theta of 48 gives each head a frequency whose period is the grid's 8 columns (48 ** (-1 / 16) = 2 pi / 8)."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig.from_pretrained(WEIGHTS / "language_model", vocab_size=len(tokenizer))
    # Its initializer_range is about 1 / sqrt(width): with 0.02 nothing was learned.
    model = LlamaForCausalLM(config)
    _ordinal_start(model, tokenizer, np.random.default_rng(0))
    pool = render.sample_scenes(20_000, seed=21)

    def loss(rng, share):
        patches_share, coordinates_share = _curriculum(share)
        reads_patches = rng.random() < patches_share
        chats = []
        descriptions = []
        for i in rng.integers(0, len(pool), CHATS):
            chat = _turns(pool, i, rng, share < LOOKUPS_ONLY_UNTIL, reads_patches)
            if reads_patches:
                # Task tokens or other text may stand between patches and question: no answer may depend on how many.
                filler = [["."]] * int(rng.integers(9))
                coordinates = rng.random() < coordinates_share
                descriptions.append(language.patches(pool, i, rng, places=coordinates) + filler)
                text = " ".join(words[0] for words in descriptions[-1])
            else:
                text = language.description(pool, i)
            chats.append((text, chat))
        # At inference all turns are one causal sequence: towards the end half of the chats are, too.
        apart = share < ALL_CHATS_APART_UNTIL or rng.random() < 0.5
        batch = _encode_chats(tokenizer, chats, apart=apart)
        if reads_patches:
            batch = _embed_patches(model, tokenizer, batch, descriptions)
        return model(**batch).loss

    fit(model, loss, steps, 2e-3, work, "language_model")
    figures = _measure_language_model(model, tokenizer)
    model.half().save_pretrained(out / "language_model")
    tokenizer.save_pretrained(out / "language_model")
    return figures


def _measure_language_model(model, tokenizer) -> dict[str, float]:
    """Accuracy on new scenes by task, from descriptions and (" from patches") from patches."""
    # Other scenes than training's, whose seed is 21.
    scenes = render.sample_scenes(2000, seed=22)
    asked = language.balanced(scenes, 400, seed=0)
    figures = {}
    for reads_patches in (False, True):
        hits: dict[str, list[bool]] = {task: [] for task in language.TASKS}
        for start in range(0, len(asked), 100):
            part = asked[start : start + 100]
            correct = _answer_first_tokens(model, tokenizer, scenes, part, reads_patches)
            for question, is_right in zip(part, correct, strict=True):
                hits[question["task"]].append(is_right)
        accuracy = {task: float(np.mean(of_task)) for task, of_task in hits.items()}
        suffix = ""
        if reads_patches:
            suffix = " from patches"
        figures[f"accuracy{suffix}"] = float(np.mean([*accuracy.values()]))
        for task, share in accuracy.items():
            figures[f"{task}{suffix}"] = share
    return figures


@torch.no_grad()
def _answer_first_tokens(model, tokenizer, scenes, questions: list[dict], reads_patches: bool) -> list[bool]:
    """Whether each answer's first token, which is its letter, is the likeliest."""
    indices = [question["scene"] for question in questions]
    if reads_patches:
        patches = [language.patches(scenes, i, np.random.default_rng(i), places=False) for i in indices]
        # Ids hold each patch's first word; `_embed_patches` adds the others.
        texts = []
        for of_scene in patches:
            texts.append(" ".join(words[0] for words in of_scene))
    else:
        patches = []
        texts = [language.description(scenes, i) for i in indices]
    turns = [[(question["question"], question["answer"])] for question in questions]
    batch = _encode_chats(tokenizer, list(zip(texts, turns, strict=True)))
    labels = batch.pop("labels")
    # `argmax` of booleans is the first True; what predicts that token stands one place before it.
    first = (labels >= 0).int().argmax(1)
    if reads_patches:
        batch = _embed_patches(model, tokenizer, batch, patches)
    row = torch.arange(len(questions))
    guess = model(**batch).logits.argmax(-1)[row, first - 1]
    return (guess == labels[row, first]).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# CLIP: the base vision tower (dense captions keep its patches local) and the gen teacher (whole captions only)
# ---------------------------------------------------------------------------------------------------------------------
HAZE_WORDS = ("clear", "pale", "faint")
# The share of a patch that an object must cover to be what the patch shows.
MOSTLY = 0.35


def _region_phrases(scenes: render.Scenes, arrays: dict, index: np.ndarray):
    """Dense captions: each patch's share of each object (B, GRID**2, K) and each object's phrase id (B, K)."""
    # What is left of an object's own color at its distance, in the three grades of HAZE_WORDS.
    clear = np.exp(-scenes.haze[index, 3:] * (scenes.z[index] - 2.5))
    haze = (clear < 0.62).astype(int) + (clear < 0.42)
    # The number of (haze, color, shape), the shape running fastest: the order of `train_clip`'s phrases.
    phrase = (haze * len(render.COLORS) + scenes.color[index]) * len(render.SHAPES) + scenes.shape[index]
    # (B, GRID, PATCH, GRID, PATCH): masks number classes by color, behind sky and floor.
    mask = arrays["mask"][index].reshape(-1, GRID, PATCH, GRID, PATCH)
    of_color = scenes.color[index][:, None, None, None, None] + 2
    share = (mask[..., None] == of_color).mean((2, 4)).reshape(len(index), GRID * GRID, render.SLOTS)
    # Of two objects of one color a mask doesn't tell which is which.
    alone = (scenes.color[index][:, :, None] == scenes.color[index][:, None]).sum(2) == 1
    # (B, GRID**2, K) * (B, 1, K): a slot without an object, or with a shared color, covers nothing.
    return share * (alone & (scenes.color[index] >= 0))[:, None], phrase


def train_clip(work: Path, out: Path, steps: int, name: str, dense: bool):
    """CLIP on image-caption pairs; ``dense`` adds region-phrase pairs on the features LLaVA reads (layer -2)."""
    seed = 2
    if dense:
        seed = 1
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(HAZE_WORDS))
    vision = CLIPVisionConfig.from_pretrained(WEIGHTS / name, dtype="float32")
    text = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 40,
    }
    projection_dim = vision.projection_dim
    config = CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=projection_dim)
    model = CLIPModel(config)
    region_projection = torch.nn.Linear(vision.hidden_size, projection_dim, bias=False)
    # As a part of the model it trains with the rest.
    model.region_projection = region_projection
    scenes, arrays = scene_arrays(work)

    def encode_text(texts):
        texts = [f"<s> {text} <end>" for text in texts]
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        return F.normalize(pooled(model.get_text_features(**batch)), dim=-1)

    phrases = []
    if dense:
        kinds = itertools.product(HAZE_WORDS, render.COLORS, render.SHAPES)
        phrases = [f"a {haze} {color} {shape}" for haze, color, shape in kinds]

    def loss(rng, share):
        index = rng.integers(0, len(scenes), 64)
        vision_out = model.vision_model(preprocess(arrays["image"][index]), output_hidden_states=True)
        image = F.normalize(model.visual_projection(vision_out.pooler_output), dim=-1)
        # Captions and phrases in one pass through the text model.
        captions = [language.caption(scenes, i, rng) for i in index]
        written, phrase = encode_text(captions + phrases).split([len(captions), len(phrases)])
        logits = model.logit_scale.exp().clamp(max=100) * image @ written.T
        pair = torch.arange(len(index))
        total = (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2
        if dense:
            cover, wanted = _region_phrases(scenes, arrays, index)
            # Patch-level pairs: a patch that shows mostly one object.
            b, p, k = np.nonzero(cover > MOSTLY)
            # Of the layer that LLaVA reads, without the class token.
            hidden = vision_out.hidden_states[-2][:, 1:]
            regions = F.normalize(region_projection(hidden)[b, p], dim=-1)
            # 20 is a fixed inverse temperature. Regions count more than captions: LLaVA reads patches.
            total = 0.3 * total + F.cross_entropy(20 * regions @ phrase.T, torch.from_numpy(wanted[b, k]))
        return total

    fit(model, loss, steps, 1e-3, work, name)

    # How often is a held-out image nearest to its own caption, of 200?
    held, pictures = scene_arrays(work, "held_out")
    with torch.no_grad():
        seen = pooled(model.get_image_features(pixel_values=preprocess(pictures["image"][:200])))
        rng = np.random.default_rng(0)
        captions = encode_text([language.caption(held, i, rng) for i in range(200)])
        similarity = F.normalize(seen, dim=-1) @ captions.T
        top1 = (similarity.argmax(1) == torch.arange(200)).float().mean().item()
        figures = {"retrieval over chance": top1 * 200, "retrieval at 1 of 200": top1}
        if dense:
            # And a patch to the phrase of what it shows?
            cover, wanted = _region_phrases(held, pictures, np.arange(len(held)))
            b, p, k = np.nonzero(cover > MOSTLY)
            hidden = model.vision_model(preprocess(pictures["image"]), output_hidden_states=True).hidden_states[-2]
            patches = F.normalize(model.region_projection(hidden[:, 1:])[b, p], dim=-1)
            guess = (patches @ encode_text(phrases).T).argmax(1).numpy()
            figures["patch phrase accuracy"] = float((guess == wanted[b, k]).mean())

    # What is used of it: the tower alone, or with its projection.
    if dense:
        tower = CLIPVisionModel(vision)
        tower.load_state_dict(model.vision_model.state_dict())
    else:
        tower = CLIPVisionModelWithProjection(vision)
        tower.vision_model = model.vision_model
        tower.visual_projection = model.visual_projection
    _save(tower, out / name)
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Depth and segmentation teachers
# ---------------------------------------------------------------------------------------------------------------------
def train_depth(work: Path, out: Path, steps: int):
    """Depth-Anything: predicts 4 / depth (relative inverse depth); returns the mean absolute relative error."""
    torch.manual_seed(3)
    model = DepthAnythingForDepthEstimation(DepthAnythingConfig.from_pretrained(WEIGHTS / "depth"))
    # Behind it is a ReLU: where that begins at 0, no gradient comes through.
    torch.nn.init.constant_(cast(torch.Tensor, model.head.conv3.bias), 0.6)
    scenes, arrays = scene_arrays(work)

    def loss(rng, share):
        index = rng.integers(0, len(scenes), 24)
        predicted = model(preprocess(arrays["image"][index])).predicted_depth.clamp(min=0.02)
        # The difference of logarithms: an error is relative, for near and far pixels alike.
        error = (predicted.log() - torch.from_numpy(4 / arrays["depth"][index]).log()).abs()
        # Objects are a tenth of the pixels: each of theirs counts three times.
        weight = 1 + 2 * torch.from_numpy(arrays["mask"][index] >= 2)
        return (weight * error).sum() / weight.sum()

    fit(model, loss, steps, 1e-3, work, "depth")
    _, held = scene_arrays(work, "held_out")
    with torch.no_grad():
        parts = [model(pixels).predicted_depth for pixels in preprocess(held["image"]).split(100)]
        depth = 4 / torch.cat(parts).clamp(min=0.02)
    truth = torch.from_numpy(held["depth"])
    relative = (depth - truth).abs() / truth
    is_object = torch.from_numpy(held["mask"] >= 2)
    _save(model, out / "depth")
    name = "absolute relative error"
    return {name: relative.mean().item(), f"{name} on objects": relative[is_object].mean().item()}


def train_seg(work: Path, out: Path, steps: int):
    """OneFormer, semantic task: classes are sky, floor and the object colors; returns the mIoU of a data set."""
    torch.manual_seed(4)
    config = OneFormerConfig.from_pretrained(WEIGHTS / "seg")
    model = OneFormerForUniversalSegmentation(config)
    scenes, arrays = scene_arrays(work)

    def loss(rng, share):
        index = rng.integers(0, len(scenes), 8)
        # For each image the classes that it shows, and the mask of each.
        masks = torch.from_numpy(arrays["mask"][index]).long()
        labels = [mask.unique() for mask in masks]
        wanted = [(mask[None] == label[:, None, None]).float() for mask, label in zip(masks, labels, strict=True)]
        # The text of the task is constant, as there is one task; `recipes.miniature` asks with the same ids.
        outputs = model(
            preprocess(arrays["image"][index]),
            task_inputs=torch.ones(len(index), config.task_seq_len),
            mask_labels=wanted,
            class_labels=labels,
        )
        return outputs.loss.squeeze()

    fit(model, loss, steps, 1e-3, work, "seg", weight_decay=0.05)
    _, held = scene_arrays(work, "held_out")
    encoder = OneFormerEncoder(model, render.SIZE, GRID, IMAGE_MEAN, IMAGE_STD, [1] * config.task_seq_len)
    guess = encoder.decode(None, [Image.fromarray(image) for image in held["image"]]).numpy()
    confusion = confusion_matrix(held["mask"], guess, len(render.CLASSES))
    figures = {"mIoU": mean_iou(confusion)}
    for name, share in zip(render.CLASSES, class_iou(confusion), strict=True):
        figures[name] = float(share)
    _save(model, out / "seg")
    return figures


def _save(model, folder: Path):
    """Half precision on disk, with the preprocessor that every part shares. (The configs in `WEIGHTS` are where the
    parts' sizes are written, and what they are made from again.)"""
    model.half().save_pretrained(folder)
    size = {"height": render.SIZE, "width": render.SIZE}
    preprocessor = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=IMAGE_MEAN, image_std=IMAGE_STD)
    preprocessor.save_pretrained(folder)


TRAINERS = {
    "language_model": train_language_model,
    "vision_tower": lambda work, out, steps: train_clip(work, out, steps, "vision_tower", dense=True),
    "gen": lambda work, out, steps: train_clip(work, out, steps, "gen", dense=False),
    "depth": train_depth,
    "seg": train_seg,
}


def main(argv=None) -> int:
    """Train the chosen parts, print and write their quality; 1 when one lies below its floor."""
    parser = Parser("ola_vlm.miniature.components", __doc__, start="python -m")
    parser.add_argument("--only", nargs="+", choices=list(TRAINERS), default=list(TRAINERS), help="parts to train")
    parser.add_argument("--work", type=Path, default=Path("runs/components"), help="training states and scenes")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the finished parts go")
    parser.add_argument("--steps", type=float, default=1.0, help="multiplies every part's number of steps")
    args = parser.parse_args(argv)
    failed = []
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        start = time.time()
        figures = TRAINERS[name](args.work, args.out, max(1, int(STEPS[name] * args.steps)))
        measure, bound, smaller_is_better = FLOORS[name]
        if smaller_is_better:
            passed = figures[measure] <= bound
        else:
            passed = figures[measure] >= bound
        if passed:
            verdict = "ok"
        else:
            failed.append(name)
            verdict = f"BELOW THE FLOOR ({measure} {bound})"
        shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(f"{name}: {shown}; {time.time() - start:.0f} s; {verdict}", flush=True)
        # Beside the figures of parts that aren't made now.
        path = args.out / "quality.json"
        quality = {}
        if path.exists():
            quality = json.loads(path.read_text())
        write_whole(path, json.dumps({**quality, name: figures}, indent=2, sort_keys=True) + "\n")
    return int(len(failed) > 0)


if __name__ == "__main__":
    sys.exit(main())
