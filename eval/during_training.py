"""Answers to a file of questions at each evaluation of a training run (`eval_questions`), as a table for whatever
keeps the run's numbers (`report_to`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ..files.escapes import markdown
from ..files.strangers import inside
from ..files.writing import write_whole
from ..inference.generate import generate_answers
from ..targets.images import open_image
from ..training.arguments import OlaVlmArguments
from .multiple_choice import is_letter_of, score

logger = logging.get_logger(__name__)
# Answers that are shown in the log.
SHOWN = 5
# Answers in a tracker's table; all are in the file.
TABLE_ROWS = 50
COLUMNS = ("question", "image", "answer", "output")
TABLE = "eval/answers"


def read_questions(path: str | Path, image_folder: str | Path) -> list[dict]:
    """Of a JSON file: a list of `{"question", "image"}`, which may have `"choices"`, `"answer"` ("(A)") and more;
    images lie below `image_folder`. ValueError names what is wrong."""
    path = Path(path)
    folder = Path(image_folder)
    try:
        questions = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    # Before training begins: a run of days would otherwise end at its first evaluation.
    if not isinstance(questions, list) or not questions:
        raise ValueError(f'{path} has no questions: give a list of {{"question", "image"}}')
    # Several questions may be about one image.
    opened = set()
    for number, question in enumerate(questions):
        if not isinstance(question, dict) or not {"question", "image"} <= question.keys():
            raise ValueError(f'{path}, question {number}: give each a "question" and an "image"')
        for name in ("question", "image", "answer", "task"):
            if name in question and not isinstance(question[name], str):
                raise ValueError(f"{path}, question {number}: its {name} is {question[name]!r:.80}, it must be a text")
        _check_choices(question, f"{path}, question {number}")
        try:
            image = inside(folder, question["image"])
        except ValueError as error:
            raise ValueError(f"{path}, question {number}: its image: {error}") from error
        if not image.is_file():
            raise ValueError(f"{path}, question {number}: there is no image {image}")
        if image not in opened:
            try:
                open_image(image)
            except (ValueError, OSError) as error:
                raise ValueError(f"{path}, question {number}: its image can't be opened: {error}") from error
            opened.add(image)
    return questions


def _check_choices(question: dict, place: str) -> None:
    if "choices" not in question:
        return
    choices = question["choices"]
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{place}: its choices are {choices!r:.80}, they must be a list of texts")
    if len(choices) > len(ascii_uppercase):
        raise ValueError(f"{place}: it has {len(choices)} choices: give at most 26, as each needs a letter")
    # Only letters are compared with: the option's words would count as wrong whatever the model says.
    if "answer" in question and not is_letter_of(question["answer"], choices):
        what = f"its answer {question['answer']!r:.80} is the letter of none of its {len(choices)} choices"
        raise ValueError(f'{place}: {what}: give it as "(A)"')


class AnswerQuestions(TrainerCallback):
    """Writes output_dir/answers/step-N.jsonl, the questions with the model's `"output"`, and logs the first ones; the
    `trackers` get a table of them. If all have choices and an answer, `eval_accuracy` joins the metrics: the mean over
    their tasks.

    Every process answers all of them, since sharded weights are gathered by all.

    `trackers`: the trainer's callbacks, those of `report_to` among them; known when there is a trainer.
    """

    def __init__(self, questions: Sequence[dict], image_folder: str | Path, batch_size: int, max_new_tokens: int = 64):
        self.questions = list(questions)
        self.image_folder = image_folder
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.trackers: Sequence[TrainerCallback] = ()
        # One free question among them, and there is no accuracy that all answers are in.
        self.is_scored = all({"choices", "answer"} <= question.keys() for question in self.questions)

    def on_evaluate(self, args, state, control, metrics, model, processing_class, **kwargs):
        is_mixed = args.bf16 or args.fp16
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        # As in training: adapters and projector may be float32 in a model of bfloat16.
        with torch.autocast(args.device.type, dtype, enabled=is_mixed):
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
            # The trainer has logged its metrics before it calls this, and would leave this one out of its history.
            state.log_history.append({"step": state.global_step, "eval_accuracy": metrics["eval_accuracy"]})
        # All processes have answered; one writes.
        if not args.should_save:
            return
        file = Path(args.output_dir) / "answers" / f"step-{state.global_step}.jsonl"
        write_whole(file, "".join(json.dumps(record) + "\n" for record in answered).encode())
        numbers = {"eval/accuracy": metrics["eval_accuracy"]} if self.is_scored else {}
        report_answers(self.trackers, answered, numbers, state.global_step)
        shown = "".join(f"\n  {record['question']} -> {record['output']}" for record in answered[:SHOWN])
        accuracy = f", accuracy {metrics['eval_accuracy']:.3f}" if self.is_scored else ""
        logger.info(f"step {state.global_step}: {len(answered)} questions answered in {file}{accuracy}{shown}")


def report_answers(
    trackers: Sequence[TrainerCallback], answered: Sequence[dict], numbers: dict[str, float], step: int
) -> None:
    """The first answers as a table, and `numbers`, to Trackio, W&B and TensorBoard, if they are among the trackers.
    The others get neither."""
    rows = []
    for record in answered[:TABLE_ROWS]:
        rows.append([str(record.get(column, "")) for column in COLUMNS])
    for tracker in trackers:
        if isinstance(tracker, TrackioCallback):
            # Only whoever reports to a tracker has it installed.
            import trackio

            table = trackio.Table(columns=list(COLUMNS), data=rows)
            trackio.log({TABLE: table, **numbers, "train/global_step": step})
        elif isinstance(tracker, WandbCallback):
            import wandb  # pyright: ignore[reportMissingImports] (whoever logs to it has it)

            table = wandb.Table(columns=list(COLUMNS), data=rows)
            wandb.log({TABLE: table, **numbers, "train/global_step": step})
        # Before training begins, and in all processes but the first, there is no writer.
        elif isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
            tracker.tb_writer.add_text(TABLE, markdown_table(rows), step)
            for name, value in numbers.items():
                tracker.tb_writer.add_scalar(name, value, step)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Of `COLUMNS`; what a model says is no markup."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in rows:
        lines.append(" | ".join(markdown(cell) for cell in row))
    return "\n".join(f"| {line} |" for line in lines)


def answering_callbacks(args: OlaVlmArguments) -> list[TrainerCallback]:
    """Of a run with `eval_questions`; none without."""
    if args.eval_questions is None:
        return []
    # Without a folder of images they lie beside the file, as of a benchmark of your own.
    folder = args.image_folder or Path(args.eval_questions).parent
    return [AnswerQuestions(read_questions(args.eval_questions, folder), folder, args.per_device_eval_batch_size)]
