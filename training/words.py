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
    """A task's source that joins one teacher a kind of word: images -> the words' numbers (N, Q, W).

    Args:
        words: kind -> its words, by number.
        sources: kind -> function from images to its words' numbers (N, Q, 1).
    """

    def __init__(self, words: Mapping[str, list[str]], sources: Mapping[str, Callable]):
        self.words, self.sources = words, sources

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """ValueError for a number that stands for no word."""
        numbers = {kind: source(images) for kind, source in self.sources.items()}
        for kind, numbers_NQ1 in numbers.items():
            largest = int(numbers_NQ1.max()) if len(numbers_NQ1) > 0 else 0
            count = len(self.words[kind])
            if largest >= count:
                raise ValueError(f"a teacher of {kind!r} words gives the number {largest}, but has {count} words")
        return torch.cat(list(numbers.values()), dim=-1)


def encode_word(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """The ids of a word as it stands inside a sentence. ValueError if the tokenizer doesn't know it."""
    alone = tokenizer(word, add_special_tokens=False)["input_ids"]
    # Behind itself, for what a tokenizer puts before a text, and a word's own space, differ between families.
    twice = tokenizer(f"{word} {word}", add_special_tokens=False)["input_ids"]
    is_prefix = twice[: len(alone)] == alone
    ids = twice[len(alone) :] if is_prefix else tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError(f"the tokenizer can't say the word {word!r}: give another one in its teacher's words")
    return ids


def encode_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Tensor:
    """(words, tokens): ids, -1 behind a word with fewer tokens. ValueError for a word that can't be said."""
    ids = [encode_word(tokenizer, word) for word in words]
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
        found[task["name"]] = [encode_words(processor.tokenizer, source.words[kind]) for kind in task["words"]]
    return found
