"""The miniature's own pretrained parts, trained from nothing on rendered scenes, each in its transformers class.

    python -m ola_vlm.miniature.components [--only language_model ...]

Interrupted runs resume from ``--work``. Every part is measured on held-out scenes; the command fails below a floor.
"""

import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix
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
from ..targets.encoders import OneFormerEncoder
from ..targets.files import write_whole
from ..world import language, render

WEIGHTS = Path(__file__).parent / "weights"
GRID, PATCH = render.GRID, render.SIZE // render.GRID
IMAGE_MEAN, IMAGE_STD = [0.5] * 3, [0.25] * 3
FLOORS = {  # measure: (bound, whether a smaller figure is better)
    "language_model": ("accuracy from patches", 0.90, False),
    "vision_tower": ("retrieval over chance", 5.0, False),
    "gen": ("retrieval over chance", 5.0, False),
    "depth": ("absolute relative error", 0.12, True),
    "seg": ("mIoU", 0.35, False),
}
STEPS = {"language_model": 6000, "vision_tower": 1600, "gen": 500, "depth": 900, "seg": 1800}
WORDS = ("describe", "the", "image", ".", ",", "and", "a", "yes", "no", "not", "is", "it", "are")  # and the world's


def pooled(outputs) -> torch.Tensor:
    """CLIP's features of texts or images, in what transformers gives."""
    return outputs.pooler_output


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the world's whole language, with the chat template (assistant spans are marked)."""
    scenes = render.sample_scenes(200, seed=99)
    rng = np.random.default_rng(0)
    words: set[str] = set(WORDS)
    for i in range(len(scenes)):
        texts = [language.caption(scenes, i, rng), language.description(scenes, i)]
        for q in language.questions(scenes, i) + language.fetch_questions(scenes, i):
            texts += [q["question"], q["answer"]]
        words.update(word for text in texts for word in text.split())
    words.update(f"{axis}{k}" for axis in "xyz" for k in range(language.BINS))
    special = ["<pad>", "<s>", "<unk>", "<end>", "<user>", "<assistant>", "<system>"]  # CLIP takes id 2 for no end
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(words)])}
    template = (WEIGHTS / "language_model" / "chat_template.jinja").read_text()
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\([A-D]\)|\w+|[^\w\s]"), "removed", invert=True)
    names = {"bos_token": "<s>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names |= {"additional_special_tokens": special[4:], "chat_template": template}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def preprocess(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> normalized (N, 3, H, W) fp32, as every part's saved preprocessor does."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - IMAGE_MEAN[0]) / IMAGE_STD[0]


def fit(model, loss_of_step, steps: int, lr: float, work: Path, desc: str, weight_decay: float = 0.01):
    """Adam with warm-up and cosine decay; a state is kept each minute in ``work`` and taken up again."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    state, start, saved = work / f"{desc}.pt", 0, time.time()
    settings = [steps, lr, weight_decay, sum(p.numel() for p in model.parameters())]
    if state.exists():
        kept_state = torch.load(state, weights_only=True)
        if kept_state["settings"] != settings:
            raise ValueError(f"{state} was begun with {kept_state['settings']}, not {settings}: remove it")
        model.load_state_dict(kept_state["model"])
        optimizer.load_state_dict(kept_state["optimizer"])
        start = kept_state["step"]
    model.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=desc, mininterval=5)
    for step in bar:
        share = min((step + 1) / (0.03 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        loss = loss_of_step(np.random.default_rng([7, step]), step / steps)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{desc}: the loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if time.time() - saved > 60 or step + 1 == steps:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**parts, "step": step + 1, "settings": settings}, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
            saved = time.time()
    return model.eval()


def scene_arrays(work: Path, split: str = "train") -> tuple[render.Scenes, dict[str, np.ndarray]]:
    """Rendered scenes of a split, kept on disk between runs."""
    path = work / f"scenes_{split}.safetensors"
    if not path.exists():
        count, seed = {"train": (12_000, 11), "held_out": (1000, 12)}[split]
        render.save_scenes(path, *render.make_scenes(count, seed, desc=path.stem))
    return render.load_scenes(path)


# ---------------------------------------------------------------------------------------------------------------------
# Language model
# ---------------------------------------------------------------------------------------------------------------------
def _encode_chats(tokenizer, chats: list[tuple[str, list[tuple[str, str]]]], apart: bool = False) -> dict:
    """(description, turns) chats -> right-padded ids and labels (answers and end tokens only).

    ``apart``: each turn sees the description and itself only, at the positions of a first turn, so that one sequence
    holds many one-question chats about a scene (a mask (B, 1, T, T) and position ids say so).
    """
    rows = []
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<user>", "<assistant>", "<end>"])
    for text, turns in chats:
        ids = [tokenizer.bos_token_id, user, *tokenizer(text, add_special_tokens=False).input_ids]
        prefix, labels, block, positions = len(ids), [-100] * len(ids), [0] * len(ids), list(range(len(ids)))
        for j, (question, answer) in enumerate(turns):
            q = tokenizer(question, add_special_tokens=False).input_ids
            a = [*tokenizer(answer, add_special_tokens=False).input_ids, end]
            q = q if j == 0 or apart else [user, *q]
            ids += [*q, assistant, *a]
            labels += [-100] * (len(q) + 1) + a
            block += [j + 1] * (len(q) + 1 + len(a))
            start = prefix if apart else len(positions)
            positions += range(start, start + len(q) + 1 + len(a))
        rows.append((ids, labels, block, positions))
    longest = max(len(row[0]) for row in rows)
    columns = zip((tokenizer.pad_token_id, -100, -1, 0), zip(*rows, strict=True), strict=True)
    padded = ([row + [fill] * (longest - len(row)) for row in column] for fill, column in columns)
    ids, labels, block, positions = map(torch.tensor, padded)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": (block >= 0).long()}
    if apart:
        sees = (block[:, None] == block[:, :, None]) | (block[:, None] == 0)
        sees &= torch.ones(longest, longest, dtype=torch.bool).tril()
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
        batch |= {"attention_mask": mask, "position_ids": positions}
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
    return batch | {"inputs_embeds": embeds}


def _ordinal_start(model, tokenizer, rng):
    """Coordinate words start on a smooth curve, so that neighbors are alike: numbers are ordered in any real LLM."""
    width = model.config.hidden_size
    with torch.no_grad():
        for axis in "xyz":
            directions = torch.from_numpy(rng.normal(0, 1, (4, width))).float()
            for k in range(language.BINS):
                s = (k + 0.5) / language.BINS
                code = torch.tensor([2 * s - 1, math.cos(math.pi * s), math.cos(2 * math.pi * s), 1.0])
                row = (code @ directions) / 2
                # half a curve, half its own: on the curve alone neighbors are too alike to be copied exactly
                model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(f"{axis}{k}")] += 0.05 * row


# The language model's curriculum, in shares of its steps: first it only looks attributes up, then it also compares
# them, more and more from patches, whose coordinate words go: without them a patch's place has to tell where it is.
LOOKUPS_ONLY_UNTIL = 0.1
ALL_CHATS_APART_UNTIL = 0.8
PATCHES_AT_FIRST = 0.5  # share of the steps
PATCHES_AT_LAST = 0.9
COORDINATES_AT_LAST = 0.1  # share of the scenes, of all at first
CHATS = 16  # a step


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
        turns = language.conversation(pool, i, 14 if reads_patches else 18, rng, fetch_share=0.3, ranges=True)
    chat = [(turn["question"], turn["answer"]) for turn in turns]
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
    model = LlamaForCausalLM(config)  # its initializer_range is about 1 / sqrt(width): with .02 nothing was learned
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
        apart = share < ALL_CHATS_APART_UNTIL or rng.random() < 0.5
        batch = _encode_chats(tokenizer, chats, apart=apart)
        if reads_patches:
            batch = _embed_patches(model, tokenizer, batch, descriptions)
        return model(**batch).loss

    fit(model, loss, steps, 2e-3, work, "language_model")
    scenes, figures = render.sample_scenes(2000, seed=22), {}
    asked = language.balanced(scenes, 400, seed=0)
    for suffix in ("", " from patches"):
        right = {task: [] for task in language.TASKS}
        for start in range(0, len(asked), 100):
            part = asked[start : start + 100]
            patches = [language.patches(scenes, q["scene"], np.random.default_rng(q["scene"]), False) for q in part]
            texts = [" ".join(words[0] for words in of_scene) for of_scene in patches]
            texts = texts if suffix else [language.description(scenes, q["scene"]) for q in part]
            chats = [(text, [(q["question"], q["answer"])]) for text, q in zip(texts, part, strict=True)]
            batch = _encode_chats(tokenizer, chats)
            labels, row = batch.pop("labels"), torch.arange(len(part))
            first = (labels >= 0).int().argmax(1)
            with torch.no_grad():
                batch = _embed_patches(model, tokenizer, batch, patches) if suffix else batch
                guess = model(**batch).logits.argmax(-1)[row, first - 1]
            for q, correct in zip(part, (guess == labels[row, first]).tolist(), strict=True):
                right[q["task"]].append(correct)
        accuracy = {task: float(np.mean(found)) for task, found in right.items()}
        accuracy = {"accuracy": float(np.mean([*accuracy.values()])), **accuracy}
        figures |= {f"{name}{suffix}": value for name, value in accuracy.items()}
    model.half().save_pretrained(out / "language_model")
    tokenizer.save_pretrained(out / "language_model")
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# CLIP: the base vision tower (dense captions keep its patches local) and the gen teacher (whole captions only)
# ---------------------------------------------------------------------------------------------------------------------
HAZE_WORDS = ("clear", "pale", "faint")


def _region_phrases(scenes: render.Scenes, arrays: dict, index: np.ndarray):
    """Dense captions: each patch's share of each object (B, GRID**2, K) and each object's phrase id (B, K)."""
    clear = np.exp(-scenes.haze[index, 3:] * (scenes.z[index] - 2.5))
    haze = (clear < 0.62).astype(int) + (clear < 0.42)
    phrase = (haze * len(render.COLORS) + scenes.color[index]) * len(render.SHAPES) + scenes.shape[index]
    mask = arrays["mask"][index].reshape(-1, GRID, PATCH, GRID, PATCH)
    of_color = scenes.color[index][:, None, None, None, None] + 2
    share = (mask[..., None] == of_color).mean((2, 4)).reshape(len(index), GRID * GRID, render.SLOTS)
    alone = (scenes.color[index][:, :, None] == scenes.color[index][:, None]).sum(2) == 1
    return share * (alone & (scenes.color[index] >= 0))[:, None], phrase


def train_clip(work: Path, out: Path, steps: int, name: str, dense: bool):
    """CLIP on image-caption pairs; ``dense`` adds region-phrase pairs on the features LLaVA reads (layer -2)."""
    torch.manual_seed(1 if dense else 2)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(HAZE_WORDS))
    vision = CLIPVisionConfig.from_pretrained(WEIGHTS / name, dtype="float32")
    text = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {f"{special}_token_id": getattr(tokenizer, f"{special}_token_id") for special in ("bos", "eos", "pad")}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
    sizes = {"text_config": text, "vision_config": vision.to_dict(), "projection_dim": vision.projection_dim}
    model = CLIPModel(CLIPConfig(**sizes))
    region_projection = torch.nn.Linear(vision.hidden_size, vision.projection_dim, bias=False)
    model.region_projection = region_projection  # it trains with the rest
    scenes, arrays = scene_arrays(work)

    def encode_text(texts):
        texts = [f"<s> {text} <end>" for text in texts]
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        return F.normalize(pooled(model.get_text_features(**batch)), dim=-1)

    kinds = itertools.product(HAZE_WORDS if dense else (), render.COLORS, render.SHAPES)
    phrases = [f"a {haze} {color} {shape}" for haze, color, shape in kinds]

    def loss(rng, share):
        index = rng.integers(0, len(scenes), 64)
        vision_out = model.vision_model(preprocess(arrays["image"][index]), output_hidden_states=True)
        image = F.normalize(model.visual_projection(vision_out.pooler_output), dim=-1)
        captions = [language.caption(scenes, i, rng) for i in index]
        written, phrase = encode_text(captions + phrases).split([len(captions), len(phrases)])
        logits = model.logit_scale.exp().clamp(max=100) * image @ written.T
        total = sum(F.cross_entropy(part, torch.arange(len(index))) for part in (logits, logits.T)) / 2
        if dense:
            cover, wanted = _region_phrases(scenes, arrays, index)
            b, p, k = np.nonzero(cover > 0.35)  # patch-level pairs: a patch that shows mostly one object
            regions = F.normalize(region_projection(vision_out.hidden_states[-2][:, 1:])[b, p], dim=-1)
            total = 0.3 * total + F.cross_entropy(20 * regions @ phrase.T, torch.from_numpy(wanted[b, k]))
        return total

    fit(model, loss, steps, 1e-3, work, name)
    held, pictures = scene_arrays(work, "held_out")
    with torch.no_grad():
        seen = pooled(model.get_image_features(pixel_values=preprocess(pictures["image"][:200])))
        rng = np.random.default_rng(0)
        right = F.normalize(seen, dim=-1) @ encode_text([language.caption(held, i, rng) for i in range(200)]).T
        top1 = (right.argmax(1) == torch.arange(200)).float().mean().item()
        figures = {"retrieval over chance": top1 * 200, "retrieval at 1 of 200": top1}
        if dense:
            cover, wanted = _region_phrases(held, pictures, np.arange(len(held)))
            b, p, k = np.nonzero(cover > 0.35)
            hidden = model.vision_model(preprocess(pictures["image"]), output_hidden_states=True).hidden_states[-2]
            patches = F.normalize(model.region_projection(hidden[:, 1:])[b, p], dim=-1)
            guess = (patches @ encode_text(phrases).T).argmax(1).numpy()
            figures["patch phrase accuracy"] = float((guess == wanted[b, k]).mean())
    if dense:
        tower = CLIPVisionModel(vision)
        tower.load_state_dict(model.vision_model.state_dict())
    else:
        tower = CLIPVisionModelWithProjection(vision)
        tower.vision_model, tower.visual_projection = model.vision_model, model.visual_projection
    _save(tower, out / name)
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Depth and segmentation teachers
# ---------------------------------------------------------------------------------------------------------------------
def train_depth(work: Path, out: Path, steps: int):
    """Depth-Anything: predicts 4 / depth (relative inverse depth); returns the mean absolute relative error."""
    torch.manual_seed(3)
    model = DepthAnythingForDepthEstimation(DepthAnythingConfig.from_pretrained(WEIGHTS / "depth"))
    torch.nn.init.constant_(cast(torch.Tensor, model.head.conv3.bias), 0.6)
    scenes, arrays = scene_arrays(work)

    def loss(rng, share):
        index = rng.integers(0, len(scenes), 24)
        predicted = model(preprocess(arrays["image"][index])).predicted_depth.clamp(min=0.02)
        error = (predicted.log() - torch.from_numpy(4 / arrays["depth"][index]).log()).abs()
        weight = 1 + 2 * torch.from_numpy(arrays["mask"][index] >= 2)  # objects are a tenth of the pixels
        return (weight * error).sum() / weight.sum()

    fit(model, loss, steps, 1e-3, work, "depth")
    _, held = scene_arrays(work, "held_out")
    with torch.no_grad():
        parts = [model(pixels).predicted_depth for pixels in preprocess(held["image"]).split(100)]
        depth = 4 / torch.cat(parts).clamp(min=0.02)
    truth = torch.from_numpy(held["depth"])
    relative, things = ((depth - truth).abs() / truth), torch.from_numpy(held["mask"] >= 2)
    _save(model, out / "depth")
    name = "absolute relative error"
    return {name: relative.mean().item(), f"{name} on objects": relative[things].mean().item()}


def train_seg(work: Path, out: Path, steps: int):
    """OneFormer, semantic task: classes are sky, floor and the object colors; returns the mIoU of a data set."""
    torch.manual_seed(4)
    config = OneFormerConfig.from_pretrained(WEIGHTS / "seg")
    model = OneFormerForUniversalSegmentation(config)
    scenes, arrays = scene_arrays(work)

    def loss(rng, share):
        index = rng.integers(0, len(scenes), 8)
        masks = torch.from_numpy(arrays["mask"][index]).long()
        labels = [mask.unique() for mask in masks]
        wanted = [(mask[None] == label[:, None, None]).float() for mask, label in zip(masks, labels, strict=True)]
        given = {"task_inputs": torch.ones(len(index), config.task_seq_len), "class_labels": labels}
        return model(preprocess(arrays["image"][index]), mask_labels=wanted, **given).loss.squeeze()

    fit(model, loss, steps, 1e-3, work, "seg", weight_decay=0.05)
    _, held = scene_arrays(work, "held_out")
    encoder = OneFormerEncoder(model, render.SIZE, GRID, IMAGE_MEAN, IMAGE_STD, [1] * config.task_seq_len)
    guess = encoder.decode(None, [Image.fromarray(image) for image in held["image"]]).numpy()
    confusion = confusion_matrix(held["mask"].ravel(), guess.ravel())
    iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    _save(model, out / "seg")
    return {"mIoU": float(iou.mean()), **{name: float(x) for name, x in zip(render.CLASSES, iou, strict=True)}}


def _save(model, folder: Path):
    """Half precision on disk, with the preprocessor that every part shares. (The configs in `WEIGHTS` are where the
    parts' sizes are written, and what they are made from again.)"""
    model.half().save_pretrained(folder)
    sizes = {"size": dict.fromkeys(("height", "width"), render.SIZE), "do_center_crop": False}
    CLIPImageProcessor(**sizes, image_mean=IMAGE_MEAN, image_std=IMAGE_STD).save_pretrained(folder)


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
        measure, bound, smaller = FLOORS[name]
        passed = figures[measure] <= bound if smaller else figures[measure] >= bound
        failed += [] if passed else [name]
        shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
        verdict = "ok" if passed else f"BELOW THE FLOOR ({measure} {bound})"
        print(f"{name}: {shown}; {time.time() - start:.0f} s; {verdict}", flush=True)
        path = args.out / "quality.json"
        quality = json.loads(path.read_text()) if path.exists() else {}
        write_whole(path, json.dumps({**quality, name: figures}, indent=2, sort_keys=True) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
