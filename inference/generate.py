"""Answers in batches: to conversations, or to questions about images."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..targets.images import open_image


@torch.inference_mode()
def answer_chats(model, processor, chats: Sequence[list[dict]], **generation) -> list[str]:
    """The model's next turn in each of several conversations of messages, left-padded: an answer does not depend on
    its batch mates. `generation`: of `generate`."""
    # What pads is masked, so any token will do.
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    padding = {"padding": True, "padding_side": "left"}
    inputs = processor.apply_chat_template(chats, **template, processor_kwargs=padding)
    inputs = inputs.to(model.device, model.dtype)
    tokens = model.generate(**inputs, pad_token_id=processor.tokenizer.pad_token_id, **generation)
    # (B, T + answer): left-padded, so all answers begin behind the same column.
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def generate_answers(
    model,
    processor,
    questions: Sequence[dict],
    image_folder: str | Path = ".",
    batch_size: int = 64,
    max_new_tokens: int = 8,
    progress: Callable[[Iterable], Iterable] = iter,
    read_image: Callable[[dict], Any] | None = None,
    save: Callable[[list[dict]], object] = lambda answered: None,
    unreadable: Callable[[dict, Exception], object] | None = None,
) -> list[dict]:
    """The questions with the model's raw answer as `"output"`, in the given order, and `"prompt"`, the whole text.

    Greedy and left-padded, so that an answer does not depend on its batch mates. `progress` wraps the batches'
    iterator (`tqdm`); `read_image` gives a question's image (`open_image`'s source) instead of `image_folder`; `save`
    gets each batch as soon as it is answered. `unreadable` gets a question whose image can't be opened, and the error,
    and the question is left out; without it the error ends everything. The model's train/eval mode is put back
    afterwards.
    """
    # Evaluation in the middle of a training: dropout is off for the answers, and on again behind them.
    was_training = model.training
    model.eval()
    read_image = read_image or (lambda question: Path(image_folder) / question["image"])
    # Alike lengths side by side waste no padding; the sort is stable.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]["question"]))
    answered = {}
    try:
        for start in progress(range(0, len(order), batch_size)):
            # The batch's questions as conversations of one turn; images are opened only now.
            batch = []
            chats = []
            for i in order[start : start + batch_size]:
                try:
                    image = open_image(read_image(questions[i]))
                except (ValueError, OSError) as error:
                    if unreadable is None:
                        raise
                    unreadable(questions[i], error)
                    continue
                batch.append(i)
                content = [{"type": "image", "image": image}, {"type": "text", "text": questions[i]["question"]}]
                chats.append([{"role": "user", "content": content}])
            # No image of it can be opened.
            if not batch:
                continue
            answers = answer_chats(model, processor, chats, do_sample=False, max_new_tokens=max_new_tokens)
            prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
            for i, prompt, answer in zip(batch, prompts, answers, strict=True):
                answered[i] = {**questions[i], "prompt": prompt, "output": answer}
            save([answered[i] for i in batch])
    finally:
        model.train(was_training)
    # In the given order again, without those whose image can't be opened.
    return [answered[i] for i in range(len(questions)) if i in answered]
