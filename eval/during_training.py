"""Answers to a file of questions at each evaluation of a training run (`eval_questions`)."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..inference.generate import generate_answers
from ..targets.files import write_whole
from ..training.arguments import OlaVlmArguments
from .multiple_choice import score

logger = logging.get_logger(__name__)
SHOWN = 5  # answers in the log


def read_questions(path: str | Path, image_folder: str | Path) -> list[dict]:
    """Of a JSON file: a list of `{"question", "image"}`, which may have `"choices"`, `"answer"` ("(A)") and more;
    images lie below `image_folder`. ValueError names what is wrong."""
    path = Path(path)
    folder = Path(image_folder)
    try:
        questions = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(questions, list) or not questions:
        raise ValueError(f'{path} has no questions: give a list of {{"question", "image"}}')
    for number, question in enumerate(questions):
        if not isinstance(question, dict) or not {"question", "image"} <= question.keys():
            raise ValueError(f'{path}, question {number}: give each a "question" and an "image"')
        if not (folder / question["image"]).is_file():
            raise ValueError(f"{path}, question {number}: there is no image {folder / question['image']}")
    return questions


class AnswerQuestions(TrainerCallback):
    """Writes output_dir/answers/step-N.jsonl, the questions with the model's `"output"`, and logs the first ones. If
    all have choices and an answer, `eval_accuracy` joins the metrics: the mean over their tasks.

    Every process answers all of them, since sharded weights are gathered by all.
    """

    def __init__(self, questions: Sequence[dict], image_folder: str | Path, batch_size: int, max_new_tokens: int = 64):
        self.questions = list(questions)
        self.image_folder = image_folder
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.is_scored = all({"choices", "answer"} <= question.keys() for question in self.questions)

    def on_evaluate(self, args, state, control, metrics, model, processing_class, **kwargs):
        is_mixed = args.bf16 or args.fp16
        # As in training: adapters and projector may be float32 in a model of bfloat16.
        with torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16, enabled=is_mixed):
            answered = generate_answers(
                model,
                processing_class,
                self.questions,
                self.image_folder,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
            )
        if self.is_scored:
            metrics["eval_accuracy"] = score([{"task": "all", **record} for record in answered])["average"]
            state.log_history.append({"step": state.global_step, "eval_accuracy": metrics["eval_accuracy"]})
        if not args.should_save:
            return
        file = Path(args.output_dir) / "answers" / f"step-{state.global_step}.jsonl"
        write_whole(file, "".join(json.dumps(record) + "\n" for record in answered).encode())
        shown = "".join(f"\n  {record['question']} -> {record['output']}" for record in answered[:SHOWN])
        accuracy = f", accuracy {metrics['eval_accuracy']:.3f}" if self.is_scored else ""
        logger.info(f"step {state.global_step}: {len(answered)} questions answered in {file}{accuracy}{shown}")


def answering_callbacks(args: OlaVlmArguments) -> list[TrainerCallback]:
    """Of a run with `eval_questions`; none without."""
    if args.eval_questions is None:
        return []
    folder = args.image_folder or Path(args.eval_questions).parent
    return [AnswerQuestions(read_questions(args.eval_questions, folder), folder, args.per_device_eval_batch_size)]
