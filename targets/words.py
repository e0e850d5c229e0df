"""Teachers whose target for a patch is the number of a word: what their decoded output shows there.

N images, Q patches (grid * grid, row by row from the top left), S pixels a side. A number takes a byte, so that an
image of 576 patches takes 576 bytes a kind of word: a five-thousandth of its features. The words themselves are with
the teacher (`words`, a part of its fingerprint) and in its note beside the cache; what they are to a language model is
seen in training (`training.words`).
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_DEPTH_ESTIMATION_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
)

from .encoders import OneFormerEncoder, TargetEncoder, load_teacher, read_preprocessing
from .loading import loading_from

logger = logging.getLogger(__name__)

DEPTH_WORDS = ("very close", "close", "halfway", "far", "very far")
# Depth models by their type: whether what they predict is larger where it is closer. Of Depth-Anything and DPT the
# configuration tells (`_larger_is_closer`).
LARGER_IS_CLOSER = {"glpn": False, "zoedepth": False}
# "the task is semantic" by the tokenizer of all published OneFormers, which is CLIP's.
CLIP_TASK_IDS = (49406, 518, 10549, 533, 29119, 1550, 49407)
# What data sets append to a class's name that no speaker would: COCO has "tree-merged" and "wall-other-merged".
SUFFIXES = ("merged", "other", "stuff")
# What transformers calls a class that has no name.
UNNAMED = re.compile(r"LABEL_\d+")


def storage_of(words: Sequence[str]) -> str:
    """The numeric type in the cache that holds the words' numbers, and one more that stands for no word."""
    if len(words) < 256:
        return "uint8"
    return "int16"


def speakable(label: str) -> str:
    """A class's name as one would say it: of synonyms the first, "tree-merged" is a tree."""
    name = re.split("[,;(]", label)[0]
    words = re.split(r"[\s_-]+", name.strip())
    # A class that is called "other" and no more keeps its name.
    while len(words) > 1 and words[-1] in SUFFIXES:
        words.pop()
    return " ".join(words)


def class_words(
    path, config: PreTrainedConfig, given: Sequence[str | None] | Mapping[str, str | None] | None
) -> list[str | None]:
    """A word for each class: `given`, a list, or changes by a class's name; by default the names as they are said.
    None for a class of which nothing is to be said, such as a background. ValueError for what can't be said."""
    names = cast(dict[int, str], config.id2label)
    labels = [names[i] for i in range(len(names))]
    words = _given_class_words(path, labels, given)
    for label, word in zip(labels, words, strict=True):
        if word is not None and not (isinstance(word, str) and word.strip()):
            raise ValueError(f"{path}: class {label!r} has the word {word!r}: give text, or null to say nothing of it")
    if not any(words):
        raise ValueError(f"{path}: none of its classes has a word: give its teacher some")
    return words


def _given_class_words(
    path, labels: list[str], given: Sequence[str | None] | Mapping[str, str | None] | None
) -> list[str | None]:
    if isinstance(given, Sequence):
        if len(given) != len(labels):
            raise ValueError(f"{path}: {len(given)} words for {len(labels)} classes: give one for each, or a dict")
        return list(given)
    changes = given or {}
    unknown = sorted(set(changes) - set(labels))
    if unknown:
        raise ValueError(
            f"{path}: words for {unknown}, which are none of its classes: its config.json's id2label has them"
        )
    nameless = [label for label in labels if UNNAMED.fullmatch(label) and label not in changes]
    if nameless:
        raise ValueError(
            f"{path}: its classes have no names ({nameless[0]}): give its teacher words, one for each class"
        )
    return [changes.get(label, speakable(label)) for label in labels]


def read_config(path, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedConfig:
    with loading_from(path, weights=False):
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


class WordsEncoder(TargetEncoder):
    """A teacher whose features are numbers of `words`: E is 1."""

    words: list[str]

    @classmethod
    def list_words(cls, path, words=None, revision="main", **options) -> list[str]:
        """What `words` would be; it reads the configuration alone."""
        raise NotImplementedError

    def _know_words(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.view["words"] = self.words


def usual_task_inputs(length: int) -> list[int]:
    """Those that a OneFormer with a `task_seq_len` of `length` gets unless its tokenizer or its entry says otherwise:
    CLIP's ids of "the task is semantic", or where they have no room, in the miniature's, ones."""
    if length < len(CLIP_TASK_IDS):
        return [1] * length
    return [*CLIP_TASK_IDS, *[0] * (length - len(CLIP_TASK_IDS))]


class ClassWordsEncoder(WordsEncoder):
    """The word of the class that most of a patch's pixels have, by any semantic or universal segmentation model of
    transformers; OneFormer decodes with its own features.

    `words` (`class_words`): classes with the same word count together; where most pixels have a class without a word,
    the patch's number is the one behind the last word's. `task_inputs`: OneFormer's.
    """

    name = "class_words"

    def __init__(self, model, size, grid, image_mean, image_std, words, segmenter=None, **options):
        super().__init__(model, 1, size, grid, image_mean, image_std, **options)
        self.segmenter = segmenter
        # Classes with the same word share its number.
        self._know_words(_different_words(words))
        # (classes,): the number of each class's word, of those without one that behind the last.
        none = len(self.words)
        self.word_of_class = torch.tensor([none if word is None else self.words.index(word) for word in words])
        self.view["word_of_class"] = self.word_of_class.tolist()
        # OneFormer's alone: its class scores depend on them.
        self.task_inputs: list[int] | None = None
        if segmenter is not None:
            self.task_inputs = segmenter.task_inputs
            # The usual ones are left out: caches from before they counted stay good.
            if self.task_inputs != usual_task_inputs(model.config.task_seq_len):
                self.view["task_inputs"] = self.task_inputs

    @classmethod
    def list_words(cls, path, words=None, revision="main", **options) -> list[str]:
        code = options.get("trust_remote_code", False)
        return _different_words(class_words(path, read_config(path, revision, code), words))

    @classmethod
    def _open(
        cls,
        path,
        grid: int = 24,
        words=None,
        size=None,
        task_inputs=None,
        resize_mode="pad",
        batch_size=8,
        revision="main",
        **loading,
    ):
        config = read_config(path, revision, loading.get("trust_remote_code", False))
        words = class_words(path, config, words)
        own_size, mean, std = read_preprocessing(path, revision=revision)
        options = {"resize_mode": resize_mode, "batch_size": batch_size}
        size = size or own_size
        if config.model_type == "oneformer":
            # Its classes depend on a task in words, whose token ids this encoder finds.
            segmenter = OneFormerEncoder._open(path, grid, task_inputs, revision=revision, **options, **loading)
            return cls(segmenter.model, size, grid, mean, std, words, segmenter, **options)
        for mapping in (MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING, MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING):
            if type(config) in mapping:
                model = load_teacher(mapping[type(config)], path, config=config, revision=revision, **loading)
                return cls(model, size, grid, mean, std, words, **options)
        raise ValueError(f"{path} is a {config.model_type}, no segmentation model: take one as the teacher of words")

    def _scores(self, pixels: Tensor) -> Tensor:
        """(N, classes, h, w)."""
        if self.segmenter is not None:
            stages = list(self.model.model.pixel_level_module.encoder(pixels).feature_maps)
            return self.segmenter.class_scores(stages)
        output = self.model(pixels)
        # Semantic segmentation gives scores of pixels; universal segmentation those of masks, which DETR, the first of
        # it, calls by names of its own.
        if "pred_masks" in output:
            return _scores_of_masks(output.logits, output.pred_masks)
        if "logits" in output:
            return output.logits
        return _scores_of_masks(output.class_queries_logits, output.masks_queries_logits)

    def _features(self, pixels):
        # An image at a time: the scores of all classes at the picture's size are large.
        numbers = [self._words_of_patches(scores_CHW) for scores_CHW in self._scores(pixels)]
        return torch.stack(numbers)[..., None].float()

    def _words_of_patches(self, scores_CHW: Tensor) -> Tensor:
        """(Q,): for each patch the number of its most frequent word, of equally frequent ones the least."""
        # (classes, h, w) -> (1, classes, S, S) -> each pixel's word (S, S).
        scores = F.interpolate(scores_CHW[None].float(), size=self.size, mode="bilinear", align_corners=False)
        words_SS = self.word_of_class.to(scores.device)[scores[0].argmax(0)]
        # Each pixel's patch; then one number for patch and word together, of which a single histogram is made. No word
        # is one of the numbers.
        cell_S = torch.arange(self.size, device=scores.device) * self.grid // self.size
        cell_SS = cell_S[:, None] * self.grid + cell_S
        numbers = len(self.words) + 1
        counts = torch.bincount((cell_SS * numbers + words_SS).flatten(), minlength=self.target_length * numbers)
        return counts.view(self.target_length, numbers).argmax(1)


def _different_words(words: Sequence[str | None]) -> list[str]:
    return list(dict.fromkeys(word for word in words if word is not None))


def _scores_of_masks(logits_NQC: Tensor, masks_NQHW: Tensor) -> Tensor:
    """(N, classes, h, w), as these models' image processors do it: without the null class, the last one, masks
    weighted by their queries' classes."""
    classes_NQC = logits_NQC.float().softmax(-1)[..., :-1]
    return torch.einsum("nqc,nqhw->nchw", classes_NQC, masks_NQHW.float().sigmoid())


class DepthWordsEncoder(WordsEncoder):
    """The word of a patch's depth, by any depth estimation model of transformers.

    Args:
        words: from near to far; `DEPTH_WORDS` by default.
        bins: "quantiles", which give each word the same share of an image's patches; or [value of the nearest, value
            of the farthest], what the model predicts there, between which words are as wide as each other on a log
            scale (for a model whose predictions mean the same in all images).
        larger_is_closer: what the model predicts, as inverse depth; for quantiles, and known of `LARGER_IS_CLOSER`.
        size: pixels a side that the model sees; its preprocessing's by default.
    """

    name = "depth_words"

    def __init__(self, model, size, grid, image_mean, image_std, words, bins, larger_is_closer, **options):
        super().__init__(model, 1, size, grid, image_mean, image_std, **options)
        self._know_words(words)
        self.bins = bins
        self.larger_is_closer = larger_is_closer
        self.view.update(bins=bins, larger_is_closer=larger_is_closer, of_patch="median")

    @classmethod
    def list_words(cls, path, words=None, revision="main", **options) -> list[str]:
        words = list(DEPTH_WORDS if words is None else words)
        if len(words) < 2 or len(set(words)) < len(words):
            raise ValueError(f"{path}: depth words {words}: give two or more different ones, from near to far")
        return words  # pyright: ignore[reportReturnType] (text, as the recipe gives it)

    @classmethod
    def _open(
        cls,
        path,
        grid: int = 24,
        words=None,
        bins: str | list[float] = "quantiles",
        larger_is_closer: bool | None = None,
        size=None,
        resize_mode="pad",
        batch_size=8,
        revision="main",
        **loading,
    ):
        words = cls.list_words(path, words)
        config = read_config(path, revision, loading.get("trust_remote_code", False))
        if type(config) not in MODEL_FOR_DEPTH_ESTIMATION_MAPPING:
            raise ValueError(f"{path} is a {config.model_type}, no depth model: take one as the teacher of words")
        # On a log scale both ends must be positive, and apart.
        is_range = isinstance(bins, list | tuple) and len(bins) == 2 and min(bins) > 0 and bins[0] != bins[1]
        if bins != "quantiles" and not is_range:
            need = '"quantiles", or [value of the nearest, value of the farthest], two positive numbers'
            raise ValueError(f"{path}: bins are {bins!r}: give {need}")
        # A range tells by its order which end is near.
        if larger_is_closer is None and bins == "quantiles":
            larger_is_closer = _larger_is_closer(path, config)
        own_size, mean, std = read_preprocessing(path, revision=revision)
        model_class = MODEL_FOR_DEPTH_ESTIMATION_MAPPING[type(config)]
        model = load_teacher(model_class, path, config=config, revision=revision, **loading)
        options = {"resize_mode": resize_mode, "batch_size": batch_size}
        return cls(model, size or own_size, grid, mean, std, words, bins, larger_is_closer, **options)

    def _features(self, pixels):
        value_NQ = self._median_of_patches(self.model(pixels).predicted_depth.float())
        if self.bins == "quantiles":
            number_NQ = self._by_rank(value_NQ)
        else:
            number_NQ = self._by_value(value_NQ)
        return number_NQ[..., None].float()

    def _median_of_patches(self, depth_NHW: Tensor) -> Tensor:
        """(N, Q): where a patch shows the edge of an object, that of what covers more of it; a mean is of neither."""
        # Of a patch, rounded up.
        side = math.ceil(max(depth_NHW.shape[1:]) / self.grid)
        depth_N1SS = F.interpolate(depth_NHW[:, None], size=side * self.grid, mode="nearest")
        # (N, 1, S, S) -> (N, side * side, Q) -> (N, Q).
        return F.unfold(depth_N1SS, kernel_size=side, stride=side).median(dim=1).values

    def _by_rank(self, value_NQ: Tensor) -> Tensor:
        # The order's own order is each patch's rank, from the nearest on. Stable: equal depths, as of a flat sky, get
        # the same ranks each time.
        order_NQ = value_NQ.argsort(dim=1, descending=self.larger_is_closer, stable=True)
        rank_NQ = order_NQ.argsort(dim=1)
        # Ranks 0 to Q - 1 in as many equal parts as there are words.
        return rank_NQ * len(self.words) // value_NQ.shape[1]

    def _by_value(self, value_NQ: Tensor) -> Tensor:
        # 0 at the nearest, 1 at the farthest; what lies beyond gets the first or the last word.
        nearest, farthest = torch.tensor(self.bins, device=value_NQ.device).log()
        tiny = torch.finfo(value_NQ.dtype).tiny
        share_NQ = (value_NQ.clamp(min=tiny).log() - nearest) / (farthest - nearest)
        return (share_NQ * len(self.words)).floor().clamp(0, len(self.words) - 1)


def _larger_is_closer(path, config: PreTrainedConfig) -> bool:
    if config.model_type == "depth_anything":
        # The relative ones predict inverse depth, the metric ones a distance.
        return config.depth_estimation_type == "relative"
    if config.model_type == "dpt" and not config.add_projection:
        # MiDaS's predict inverse depth. Those with a projection are DINOv2's heads, which predict meters.
        return True
    if config.model_type not in LARGER_IS_CLOSER:
        need = "true if what it predicts is larger where it is closer, else false"
        raise ValueError(f"{path} is a {config.model_type}: give its teacher larger_is_closer, {need}")
    return LARGER_IS_CLOSER[config.model_type]


WORDS_ENCODERS = {encoder.name: encoder for encoder in (ClassWordsEncoder, DepthWordsEncoder)}
