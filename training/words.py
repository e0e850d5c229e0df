"""Words as targets: what teachers see in each patch, said by the language model's own embeddings.

A teacher gives each patch the number of a word (`targets.words`); a tokenizer says here which tokens the words are,
and the model at each step what their embeddings are. N images, Q patches, W kinds of words.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin


class WordSource:
    """A task's source that joins one teacher a kind of word: images -> the words' numbers (N, Q, W), int32, -1
    for none. If a teacher's aren't finite, as of an image that it can't see, all are floats, as they are: the collator
    names its row, or drops it and asks anew.

    Args:
        words: kind -> its words, by number; the number behind the last one says none.
        sources: kind -> function from images to its words' numbers (N, Q, 1).
        alone: words beside which those of other kinds don't count: sky has no depth worth saying.

    ValueError for a word of `alone` that no kind has.
    """

    def __init__(self, words: Mapping[str, list[str]], sources: Mapping[str, Callable], alone: Sequence[str] = ()):
        self.words = words
        self.sources = sources
        check_alone(words, alone)
        # For each kind, in the order of the last axis, the numbers of those words.
        self.alone = []
        for of_kind in words.values():
            self.alone.append([number for number, word in enumerate(of_kind) if word in alone])

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """ValueError for a number that stands for no word, and for a patch without any word."""
        given = {kind: source(images) for kind, source in self.sources.items()}
        if not all(bool(numbers.isfinite().all()) for numbers in given.values()):
            return torch.cat([numbers.float() for numbers in given.values()], dim=-1)
        # Integers: DeepSpeed's trainer casts a batch's floats to 16 bits, which would round numbers above 256. Signed,
        # as -1 stands for no word; of 32 bits, as neither NCCL nor gloo gathers 16.
        numbers = [self._numbers(kind, numbers_NQ1) for kind, numbers_NQ1 in given.items()]
        numbers_NQW = torch.cat(numbers, dim=-1)
        if any(self.alone):
            numbers_NQW = self._without_others(numbers_NQW)
        # Its target would be the zero vector, which says something.
        if bool((numbers_NQW < 0).all(dim=-1).any()):
            raise ValueError("a patch has no word of any kind, and so no target: give its class a word")
        return numbers_NQW

    def _numbers(self, kind: str, numbers_NQ1: Tensor) -> Tensor:
        """With -1 for none."""
        count = len(self.words[kind])
        # An empty batch has no largest number.
        if len(numbers_NQ1) > 0 and int(numbers_NQ1.max()) > count:
            largest = int(numbers_NQ1.max())
            raise ValueError(f"a teacher of {kind!r} words gives the number {largest}, but has {count} words")
        signed_NQ1 = numbers_NQ1.to(torch.int32)
        return signed_NQ1.masked_fill(signed_NQ1 == count, -1)

    def _without_others(self, numbers_NQW: Tensor) -> Tensor:
        """-1 for the words of other kinds beside one that is alone."""
        kept_NQW = numbers_NQW.clone()
        for kind, alone in enumerate(self.alone):
            is_alone_NQ = torch.isin(numbers_NQW[..., kind], torch.tensor(alone, dtype=numbers_NQW.dtype))
            for other in range(len(self.alone)):
                if other != kind:
                    kept_NQW[..., other].masked_fill_(is_alone_NQ, -1)
        return kept_NQW


def check_alone(words: Mapping[str, list[str]], alone: Sequence[str]) -> None:
    """ValueError for a word of `alone` that no kind has."""
    known = set()
    for of_kind in words.values():
        known.update(of_kind)
    unknown = sorted(set(alone) - known)
    if unknown:
        raise ValueError(f"alone are {unknown}, which are none of the words: choose from {sorted(known)}")


def encode_word(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """The ids of a word as it stands inside a sentence. ValueError if the tokenizer doesn't know it."""
    # " red" and "red" are different tokens to GPT-2's kind of tokenizer; Llama 2's puts a space before every text.
    alone = tokenizer(word, add_special_tokens=False)["input_ids"]
    # Behind itself, for what a tokenizer puts before a text, and a word's own space, differ between families.
    twice = tokenizer(f"{word} {word}", add_special_tokens=False)["input_ids"]
    is_prefix = twice[: len(alone)] == alone
    if is_prefix:
        ids = twice[len(alone) :]
    else:
        # Beside another word it becomes other tokens: it is asked for with a space of its own.
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError(f"the tokenizer can't say the word {word!r}: give another one in its teacher's words")
    return ids


def encode_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Tensor:
    """(words, tokens): ids, -1 behind a word with fewer tokens. ValueError for a word that can't be said."""
    ids = [encode_word(tokenizer, word) for word in words]
    # -1 is no token's id.
    longest = max(map(len, ids))
    return torch.tensor([[*word_ids, *[-1] * (longest - len(word_ids))] for word_ids in ids])


def word_ids_of(
    tasks: Sequence[dict], sources: Mapping[str, Callable], processor: ProcessorMixin | None
) -> dict[str, list[Tensor]]:
    """For each task whose targets are words, for each of its kinds `encode_words`. ValueError for a source that has
    no words."""
    found = {}
    for task in tasks:
        if task["target"] != "words":
            continue
        source = sources[task["name"]]
        if not isinstance(source, WordSource):
            raise ValueError(f"task {task['name']!r} has words as targets: give it a training.words.WordSource")
        # Words are said by its tokenizer.
        assert processor is not None
        found[task["name"]] = [encode_words(processor.tokenizer, source.words[kind]) for kind in task["words"]]
    return found
