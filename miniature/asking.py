"""Questions asked of the miniature, over stored vision features; and asked again with something taken away: are patch
places, or task tokens, what an answer depends on?

B questions of a batch, S their tokens, T the tower's tokens of an image, K task tokens, H LLM width.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from PIL import Image
from torch import Tensor

from ..eval.multiple_choice import is_correct
from .stored_vision import StoredVision, features_as_pixels

# Questions at a time.
BATCH = 96
# As `generate_answers` has it.
MAX_NEW_TOKENS = 8
# Images whose projected tokens `token_placement` compares with the embeddings.
PLACED_IMAGES = 64


class Questions:
    """Multiple-choice questions as a processor makes prompts of them, encoded once for all checkpoints of a trial.

    The prompts, their left-padding and the greedy decoding are those of `inference.generate.generate_answers`.
    `per_task`: how many questions a task has, task by task in their order; ValueError if they come mixed.
    """

    def __init__(self, questions: Sequence[dict], processor, store: StoredVision):
        self.questions = questions
        self.processor = processor
        self.store = store
        self.per_task = dict(Counter(question["task"] for question in questions))
        # `objective_trial.accuracy` expects the answers of one task to stand together.
        in_order = []
        for task, count in self.per_task.items():
            in_order += [task] * count
        if in_order != [question["task"] for question in questions]:
            raise ValueError("questions of a task must stand together: sort them by task")
        # Alike lengths side by side waste no padding.
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]["question"]))
        self.batches = []
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            self.batches.append((chosen, self._encode([questions[i] for i in chosen])))

    def _encode(self, questions: Sequence[dict]) -> dict[str, Tensor]:
        # Which image it is makes no difference to the prompt.
        blank = Image.new("RGB", (8, 8))
        chats = []
        for question in questions:
            content = [{"type": "image", "image": blank}, {"type": "text", "text": question["question"]}]
            chats.append([{"role": "user", "content": content}])
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        padding = {"padding": True, "padding_side": "left"}
        encoded = self.processor.apply_chat_template(chats, **template, processor_kwargs=padding)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    @torch.inference_mode()
    def correct(self, model, change: str | None = None) -> list[bool]:
        """Whether each question is answered right. `change`: one of `CHANGES`, made to what the model sees.

        Swapped states are those of the question before it in its batch. Where that asks about the same image, and in a
        batch of one, nothing changes, which understates the loss a little; of the study's 576 validation questions
        that is none.
        """
        was_training = model.training
        model.eval()
        # With a type: of an empty list, a model's without task tokens, torch would make floats.
        task_ids = torch.tensor(model.config.task_token_ids, dtype=torch.long)
        right = [False] * len(self.questions)
        with features_as_pixels(model):
            for number, (chosen, encoded) in enumerate(self.batches):
                inputs = dict(encoded)
                features_BTW = self.store.features([self.questions[i]["image"] for i in chosen])
                is_task_BS = torch.isin(inputs["input_ids"], task_ids)
                # What is taken away: from the features, from the mask, or from the states of each layer. There the
                # batch is rolled by one: each question gets the states of the one before it.
                changed = nullcontext()
                if change == "permuted_patches":
                    features_BTW = permuted(features_BTW, seed=number)
                elif change == "removed_task_tokens":
                    inputs["attention_mask"] = inputs["attention_mask"].masked_fill(is_task_BS, 0)
                elif change == "swapped_task_tokens":
                    states = task_token_states(model, {**inputs, "pixel_values": features_BTW}, is_task_BS)
                    changed = given_task_token_states(model, [of_layer.roll(1, 0) for of_layer in states], is_task_BS)
                inputs["pixel_values"] = features_BTW
                with changed:
                    outputs = self._generate(model, inputs)
                # Batches are sorted by length: each answer goes back to its question's place.
                for i, output in zip(chosen, outputs, strict=True):
                    right[i] = is_correct({**self.questions[i], "output": output})
        model.train(was_training)
        return right

    def _generate(self, model, inputs: dict[str, Tensor], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        pad = self.processor.tokenizer.pad_token_id
        tokens = model.generate(**inputs, pad_token_id=pad, do_sample=False, max_new_tokens=max_new_tokens)
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# What can be changed of an image's tokens -> what it tests.
CHANGES = {
    "permuted_patches": "an image's patches in random order: does the answer need places?",
    "removed_task_tokens": "task tokens masked: does the answer read them?",
    "swapped_task_tokens": "task tokens' states in all layers are another image's: does it read what they say?",
}


def changes_of(model) -> list[str]:
    """Those that the model has tokens for."""
    if model.config.task_token_ids:
        return list(CHANGES)
    return ["permuted_patches"]


def permuted(features_BTW: Tensor, seed: int) -> Tensor:
    """Each image's patches in an order of its own; the first token is the tower's class token and stays."""
    generator = torch.Generator().manual_seed(seed)
    # T - 1 patches, at the places from 1 on.
    count = features_BTW.shape[1] - 1
    orders = [torch.randperm(count, generator=generator) for _ in features_BTW]
    order_BT = 1 + torch.stack(orders)
    # (B, T - 1) -> (B, T - 1, W): a patch moves with all of its channels.
    patches = features_BTW.gather(1, order_BT[..., None].expand(-1, -1, features_BTW.shape[2]))
    return torch.cat([features_BTW[:, :1], patches], dim=1)


def task_token_states(model, inputs: dict[str, Tensor], is_task_BS: Tensor) -> list[Tensor]:
    """The task tokens' states (B, K, H) on entry into each layer. They come before the question and after the image:
    they depend on the image alone."""
    states = []

    def keep(layer, arguments):
        hidden_BSH = arguments[0]
        # (B, S, H)[mask] -> (B * K, H) -> (B, K, H): each row has the same K task tokens, in their order.
        states.append(hidden_BSH[is_task_BS].unflatten(0, (len(hidden_BSH), -1)))

    with layer_hooks(model, [keep] * len(model.model.language_model.layers)):
        # One token: the prompt goes through the layers once, and each hook keeps one tensor.
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
    return states


@contextmanager
def given_task_token_states(model, states: Sequence[Tensor], is_task_BS: Tensor) -> Iterator[None]:
    """Within the block the task tokens enter each layer with the given states (B, K, H)."""

    def hook_of(given_BKH: Tensor):
        def give(layer, arguments):
            hidden_BSH, *others = arguments
            # A generated token comes alone: the task tokens are in the cache, as they were given.
            if hidden_BSH.shape[:2] != is_task_BS.shape:
                return None
            # A copy: the tensor is also what the layer before has returned.
            hidden_BSH = hidden_BSH.clone()
            hidden_BSH[is_task_BS] = given_BKH.flatten(0, 1)
            return (hidden_BSH, *others)

        return give

    with layer_hooks(model, [hook_of(of_layer) for of_layer in states]):
        yield


@contextmanager
def layer_hooks(model, hooks: Sequence) -> Iterator[None]:
    """Within the block a hook before each of the language model's layers."""
    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(hook) for layer, hook in zip(layers, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def token_placement(model, features_NTW: Tensor, words: int) -> dict[str, float]:
    """Where projected image tokens lie among the language model's embeddings, of which the first `words` stand for
    words: means of the tokens' norms, of the embeddings' norms, and of a token's largest cosine to an embedding."""
    # Without the class token, which LLaVA leaves out.
    tokens = model.model.multi_modal_projector(features_NTW[:, 1:]).flatten(0, 1)
    table = model.get_input_embeddings().weight[:words].detach()
    # (N * (T - 1), H) @ (H, words): every token with every word.
    cosines = torch.nn.functional.normalize(tokens, dim=-1) @ torch.nn.functional.normalize(table, dim=-1).T
    return {
        "token_norm": tokens.norm(dim=-1).mean().item(),
        "embedding_norm": table.norm(dim=-1).mean().item(),
        "largest_cosine": cosines.max(-1).values.mean().item(),
    }
