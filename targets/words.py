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

from .encoders import OneFormerEncoder, TargetEncoder, load_teacher, read_preprocessing, scores_of_masks
from .images import open_image
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
# DPT's weights that checkpoints may lack: nothing comes before the first fusion layer, so it calls no such module.
UNUSED_OF_DPT = ("neck.fusion_stage.layers.0.residual_layer1.",)
# Depth models by their type that see whole patches only: not what is left behind the last one.
PATCHED = ("depth_anything", "dpt", "zoedepth")


def storage_of(words: Sequence[str]) -> str:
    """The numeric type in the cache that holds the words' numbers, and one more that stands for no word."""
    if len(words) < 256:
        return "uint8"
    return "int16"


def speakable(label: str) -> str:
    """A class's name as one would say it: of synonyms the first, "tree-merged" is a tree."""
    name = re.split("[,;(]", label)[0]
    # Marks at its begin and end leave empty parts.
    words = [word for word in re.split(r"[\s_-]+", name) if word]
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
    # Numbers may have gaps, as where 255 is void: the model has as many classes as there are names.
    labels = [names.get(i, f"LABEL_{i}") for i in range(len(names))]
    words = list(map(_stripped, _given_class_words(path, labels, given)))
    for label, word in zip(labels, words, strict=True):
        if word is not None and not (isinstance(word, str) and word):
            raise ValueError(f"{path}: class {label!r} has the word {word!r}: give text, or null to say nothing of it")
    if not any(words):
        raise ValueError(f"{path}: none of its classes has a word: give its teacher some")
    return words


def _stripped(word):
    """Blanks around a word are none of it; what is no text stays, and is refused later."""
    if isinstance(word, str):
        return word.strip()
    return word


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
    the patch's number is the one behind the last word's. `threshold`: a pixel whose likeliest class is less probable
    has none, as in a model of instances, which has no class for what lies between them. `task_inputs`: OneFormer's.
    """

    name = "class_words"

    def __init__(
        self,
        model,
        size,
        grid,
        image_mean,
        image_std,
        words,
        segmenter=None,
        threshold: float | None = None,
        **options,
    ):
        super().__init__(model, 1, size, grid, image_mean, image_std, **options)
        self.segmenter = segmenter
        self.threshold = threshold
        # In no fingerprint but of the teachers that have one: others' caches stay good.
        if threshold is not None:
            self.view["threshold"] = threshold
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
    def list_words(cls, path, words=None, revision="main", threshold=None, **options) -> list[str]:
        code = options.get("trust_remote_code", False)
        words = class_words(path, read_config(path, revision, code), words)
        _check_threshold(path, threshold, classes=len(words))
        return _different_words(words)

    @classmethod
    def _open(
        cls,
        path,
        grid: int = 24,
        words=None,
        size=None,
        task_inputs=None,
        threshold: float | None = None,
        resize_mode="pad",
        batch_size=8,
        revision="main",
        **loading,
    ):
        config = read_config(path, revision, loading.get("trust_remote_code", False))
        words = class_words(path, config, words)
        _check_threshold(path, threshold, classes=len(words))
        size, mean, std = read_preprocessing(path, size=size, revision=revision)
        options = {"resize_mode": resize_mode, "batch_size": batch_size}
        if config.model_type == "oneformer":
            # Its classes depend on a task in words, whose token ids this encoder finds.
            segmenter = OneFormerEncoder._open(path, grid, task_inputs, revision=revision, **options, **loading)
            model = segmenter.model
            return cls(model, size, grid, mean, std, words, segmenter=segmenter, threshold=threshold, **options)
        for mapping in (MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING, MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING):
            if type(config) in mapping:
                model = load_teacher(mapping[type(config)], path, config=config, revision=revision, **loading)
                return cls(model, size, grid, mean, std, words, threshold=threshold, **options)
        raise ValueError(f"{path} is a {config.model_type}, no segmentation model: take one as the teacher of words")

    def _scores(self, pixels: Tensor) -> Tensor:
        """(N, classes, h, w). What is held against a threshold are probabilities."""
        is_probability = self.threshold is not None
        if self.segmenter is not None:
            stages = list(self.model.model.pixel_level_module.encoder(pixels).feature_maps)
            return self.segmenter.class_scores(stages, of_one_query=is_probability)
        output = self.model(pixels)
        # Semantic segmentation gives scores of pixels; universal segmentation those of masks, which DETR, the first of
        # it, calls by names of its own.
        if "pred_masks" in output:
            return scores_of_masks(output.logits, output.pred_masks, of_one_query=is_probability)
        if "logits" in output:
            if is_probability:
                return _probabilities(output.logits)
            return output.logits
        masks = output.masks_queries_logits
        return scores_of_masks(output.class_queries_logits, masks, of_one_query=is_probability)

    def _features(self, pixels):
        # An image at a time: the scores of all classes at the picture's size are large.
        numbers = [self._words_or_nan(scores_CHW) for scores_CHW in self._scores(pixels)]
        return torch.stack(numbers)[..., None]

    def _words_or_nan(self, scores_CHW: Tensor) -> Tensor:
        """(Q,): `_words_of_patches` as floats; NaN, all of them, for scores that aren't finite."""
        # NaN would be the largest score, and its class would be a word like any other.
        if not bool(scores_CHW.isfinite().all()):
            return torch.full((self.target_length,), math.nan, device=scores_CHW.device)
        return self._words_of_patches(scores_CHW).float()

    def _words_of_patches(self, scores_CHW: Tensor) -> Tensor:
        """(Q,): for each patch the number of its most frequent word, of equally frequent ones the least."""
        # (classes, h, w) -> (1, classes, S, S) -> each pixel's word (S, S).
        scores = F.interpolate(scores_CHW[None].float(), size=self.size, mode="bilinear", align_corners=False)
        score_SS, class_SS = scores[0].max(dim=0)
        words_SS = self.word_of_class.to(scores.device)[class_SS]
        if self.threshold is not None:
            words_SS = words_SS.masked_fill(score_SS < self.threshold, len(self.words))
        # Each pixel's patch; then one number for patch and word together, of which a single histogram is made. No word
        # is one of the numbers.
        cell_S = torch.arange(self.size, device=scores.device) * self.grid // self.size
        cell_SS = cell_S[:, None] * self.grid + cell_S
        numbers = len(self.words) + 1
        counts = torch.bincount((cell_SS * numbers + words_SS).flatten(), minlength=self.target_length * numbers)
        return counts.view(self.target_length, numbers).argmax(1)


def _different_words(words: Sequence[str | None]) -> list[str]:
    return list(dict.fromkeys(word for word in words if word is not None))


def _check_threshold(path, threshold: float | None, classes: int) -> None:
    """ValueError for a threshold that is no probability, or for none where a class has no other beside it."""
    if threshold is not None and not (isinstance(threshold, float) and 0 < threshold < 1):
        raise ValueError(f"{path}: threshold {threshold!r}: give a probability between 0 and 1")
    if threshold is None and classes == 1:
        raise ValueError(f"{path}: it has a single class, which each pixel would get: give it a threshold, as 0.5")


def _probabilities(logits_NCHW: Tensor) -> Tensor:
    """Of classes that exclude each other; a single class is there or not. NaN for what isn't finite."""
    logits_NCHW = logits_NCHW.float()
    if logits_NCHW.shape[1] == 1:
        probabilities = logits_NCHW.sigmoid()
    else:
        probabilities = logits_NCHW.softmax(dim=1)
    # Of infinity a sigmoid makes 1, which would pass.
    return probabilities.masked_fill(~logits_NCHW.isfinite(), math.nan)


class DepthWordsEncoder(WordsEncoder):
    """The word of a patch's depth, by any depth estimation model of transformers.

    Args:
        words: from near to far; `DEPTH_WORDS` by default.
        bins: "quantiles", which give each word the same share of a picture's patches (those whose center lies in it;
            the padding's get the words of what is as far); or [value of the nearest, value of the farthest], what the
            model predicts there, between which words are as wide as each other on a log scale (for a model whose
            predictions mean the same in all images).
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
        # Each of the two is in no fingerprint but those of the teachers that it changed: others' caches stay good.
        if bins == "quantiles":
            self.view["ranks"] = "of the picture, equal ones together"
        # ZoeDepth chooses one of its heads for a whole batch: an image's depth must not depend on the others.
        self.is_alone = len(getattr(model.config, "bin_configurations", None) or ()) > 1
        if self.is_alone:
            self.view["alone"] = True

    @classmethod
    def list_words(cls, path, words=None, revision="main", **options) -> list[str]:
        words = list(map(_stripped, DEPTH_WORDS if words is None else words))
        are_text = all(isinstance(word, str) and word for word in words)
        if not are_text or len(words) < 2 or len(set(words)) < len(words):
            raise ValueError(f"{path}: depth words {words}: give two or more different ones, from near to far")
        return words

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
        if size is not None:
            _check_size(path, size, config)
        size, mean, std = read_preprocessing(path, size=size, revision=revision)
        if config.model_type == "dpt":
            loading = {"unused": UNUSED_OF_DPT, **loading}
        model_class = MODEL_FOR_DEPTH_ESTIMATION_MAPPING[type(config)]
        model = load_teacher(model_class, path, config=config, revision=revision, **loading)
        options = {"resize_mode": resize_mode, "batch_size": batch_size}
        return cls(model, size, grid, mean, std, words, bins, larger_is_closer, **options)

    def _features_of(self, images):
        # Upright, as their sizes count.
        images = list(map(open_image, images))
        is_picture_NQ = torch.stack([self._is_picture(image.size) for image in images])
        return self._features(self.pixel_values(images), is_picture_NQ)

    def _features(self, pixels, is_picture_NQ=None):
        """`is_picture_NQ`: the patches whose center lies in the picture; all by default."""
        depth_NHW = self._depth(pixels)
        value_NQ = self._median_of_patches(depth_NHW)
        if is_picture_NQ is None:
            is_picture_NQ = torch.ones_like(value_NQ, dtype=torch.bool)
        if self.bins == "quantiles":
            number_NQ = self._by_rank(value_NQ, is_picture_NQ.to(value_NQ.device))
        else:
            number_NQ = self._by_value(value_NQ)
        # NaN has no place among depths. Infinity has one, but no model of transformers means it: none divides by what
        # may be 0, so a type of 16 bits has overflowed, and what is around is spoiled, too.
        is_finite_N = depth_NHW.isfinite().flatten(1).all(dim=1)
        return number_NQ.float().masked_fill(~is_finite_N[:, None], math.nan)[..., None]

    def _depth(self, pixels: Tensor) -> Tensor:
        """(N, h, w), fp32, as the model predicts it."""
        batches = [pixels]
        if self.is_alone:
            batches = pixels.split(1)
        return torch.cat([self.model(batch).predicted_depth.float() for batch in batches])

    def _is_picture(self, size: tuple[int, int]) -> Tensor:
        """(Q,): whether a patch's center lies in a picture of that width and height, not in the padding around it."""
        # Stretched, it is all of the square.
        if self.view["square"] != "pad":
            return torch.ones(self.target_length, dtype=torch.bool)
        is_column_G, is_row_G = (_cells_within(length, side=max(size), grid=self.grid) for length in size)
        return (is_row_G[:, None] & is_column_G).flatten()

    def _median_of_patches(self, depth_NHW: Tensor) -> Tensor:
        """(N, Q): where a patch shows the edge of an object, that of what covers more of it; a mean is of neither."""
        # Of a patch, rounded up.
        side = math.ceil(max(depth_NHW.shape[1:]) / self.grid)
        depth_N1SS = F.interpolate(depth_NHW[:, None], size=side * self.grid, mode="nearest")
        # (N, 1, S, S) -> (N, side * side, Q) -> (N, Q).
        return F.unfold(depth_N1SS, kernel_size=side, stride=side).median(dim=1).values

    def _by_rank(self, value_NQ: Tensor, is_picture_NQ: Tensor) -> Tensor:
        """(N, Q): ranks of the picture's patches, 0 to their number - 1, in as many equal parts as there are words;
        the padding's patches go where they would lie among these."""
        # From the nearest on.
        far_NQ = -value_NQ if self.larger_is_closer else value_NQ
        numbers = []
        for far_Q, is_picture_Q in zip(far_NQ, is_picture_NQ, strict=True):
            of_picture = far_Q[is_picture_Q].sort().values
            before_Q = torch.searchsorted(of_picture, far_Q)
            up_to_Q = torch.searchsorted(of_picture, far_Q, right=True)
            # Equal depths, as of a flat sky, have their mean rank, and so one word. Twice it, which is whole; that of
            # a patch nearer than the whole picture is -1.
            twice_rank_Q = (before_Q + up_to_Q - 1).clamp(min=0)
            numbers.append(twice_rank_Q * len(self.words) // (2 * len(of_picture)))
        return torch.stack(numbers)

    def _by_value(self, value_NQ: Tensor) -> Tensor:
        # 0 at the nearest, 1 at the farthest; what lies beyond gets the first or the last word.
        nearest, farthest = torch.tensor(self.bins, device=value_NQ.device).log()
        tiny = torch.finfo(value_NQ.dtype).tiny
        share_NQ = (value_NQ.clamp(min=tiny).log() - nearest) / (farthest - nearest)
        return (share_NQ * len(self.words)).floor().clamp(0, len(self.words) - 1)


def _cells_within(length: int, side: int, grid: int) -> Tensor:
    """(grid,): which cells of a square's side have their center in the `length` pixels in its middle, where
    `LlavaImageProcessor` puts the picture."""
    begin = (side - length) // 2
    end = begin + length
    cell_G = torch.arange(grid)
    # In units of which a pixel has 2 * grid, so that all are whole.
    center_G = (2 * cell_G + 1) * side
    is_within_G = (center_G >= 2 * grid * begin) & (center_G < 2 * grid * end)
    if not bool(is_within_G.any()):
        # A strip between two cells' centers: those that it touches.
        is_within_G = ((cell_G + 1) * side > grid * begin) & (cell_G * side < grid * end)
    return is_within_G


def _check_size(path, size: int, config: PreTrainedConfig) -> None:
    """ValueError for pixels a side that aren't whole patches: words would lie beside what they are of."""
    # A backbone of its own has the patches.
    config_of_patches = getattr(config, "backbone_config", None) or config
    patch = getattr(config_of_patches, "patch_size", None)
    if config.model_type not in PATCHED or not isinstance(patch, int) or size % patch == 0:
        return
    lower = size // patch * patch
    fitting = str(patch)
    if lower > 0:
        fitting = f"{lower} or {lower + patch}"
    raise ValueError(f"{path}: size {size} is no multiple of its patches' {patch} pixels: give {fitting}")


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
