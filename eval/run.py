"""Ask a checkpoint a benchmark's questions, score the answers: `ola-vlm eval` (commands/eval.py).

The folder gets answers.jsonl (each line has its prompt, the raw answer and all that scoring needs) and results.json.
Interrupted, the same command goes on; when all is answered it only scores. Processes share the questions.
"""

import json
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path

from tqdm import tqdm
from transformers import __version__
from transformers.utils import logging

from ..commands.running import command, tell
from ..files.escapes import terminal
from ..files.writing import check_is_of, only_one, whole_file
from ..inference.checkpoints import load_checkpoint, processes, weights_state
from ..inference.generate import generate_answers
from ..targets.images import open_image
from .benchmarks import evenly, find_benchmark, find_variant, load_questions, locate
from .scoring import table, write_results

logger = logging.get_logger(__name__)


def _read_lines(out: Path) -> Iterator[dict]:
    """What is answered so far; the last line of a process that was killed may be torn."""
    # The joined file of a finished run, and what the processes of an interrupted one left.
    for file in [*out.glob("answers.jsonl"), *out.glob("answers.*.part")]:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if not isinstance(record, dict):
                    continue
                if isinstance(record.get("id"), str) and isinstance(record.get("run"), dict):
                    yield record


def is_unanswered(record: dict | None) -> bool:
    """Whether there is no answer, or one that stands for an image that couldn't be opened (`count_unreadable`)."""
    return record is None or "unanswered" in record


def _has_image(question: dict, read_image: Callable) -> bool:
    try:
        open_image(read_image(question))
    except (ValueError, OSError):
        return False
    return True


def _by_question(out: Path) -> dict[str, dict]:
    """What is there of each question: its answer, else that it could not be asked."""
    found = {}
    for record in _read_lines(out):
        if is_unanswered(found.get(record["id"])):
            found[record["id"]] = record
    return found


def answer(
    load: Callable,
    questions: list[dict],
    read_image: Callable,
    out: Path,
    run: dict,
    batch_size: int,
    count_unreadable: bool = False,
) -> None:
    """Leaves out/answers.jsonl with all questions answered, in their order; goes on with what is there.

    `load` gives (model, processor) and is called only if this process has something to do. Each of n processes answers
    every nth question into a file of its own; the first process joins them. `run` says what makes these answers and
    goes into every line. ValueError if `out` has another run's answers; and, once all others are answered, for
    questions whose image can't be opened, unless they count as unanswered (`count_unreadable`).
    """
    state = processes()
    out.mkdir(parents=True, exist_ok=True)
    done = _by_question(out)
    # Answers of another model or prompt are never mixed in: all that makes them is compared.
    for record in done.values():
        if record["run"] != run:
            differs = ", ".join(name for name in run if record["run"].get(name) != run[name])
            raise ValueError(f"{out} has answers of a run with another {differs}: choose another --out")
    # Sorted by length, of which each process takes every nth: all have questions of like lengths, and end together.
    order = sorted(questions, key=lambda question: len(question["question"]))
    share = order[state.process_index :: state.num_processes]
    # The share is taken of all questions: processes that see others' new answers still divide them alike.
    todo = []
    for question in share:
        record = done.get(question["id"])
        # One that had no image is asked again where its file has been mended since.
        if record is None or (is_unanswered(record) and _has_image(question, read_image)):
            todo.append(question)
    if todo:
        model, processor = load()
        greedy = {"do_sample": False, "max_new_tokens": run["max_new_tokens"]}
        # What an answer is made with, for the record: the checkpoint's own settings, and ours over them.
        generation = {**model.generation_config.to_diff_dict(), **greedy}
        quiet = not state.is_main_process
        bar = tqdm(total=len(todo), desc=f"answering {run['benchmark']}", unit="question", disable=quiet)
        # A file of this process's own: several may write at the same time, and one that is killed leaves its own.
        with (out / f"answers.{uuid.uuid4().hex}.part").open("w", encoding="utf-8") as lines, bar:

            def save(answered: list[dict]) -> None:
                for record in answered:
                    lines.write(json.dumps({**record, "generation": generation, "run": run}) + "\n")
                # On disk at once: an interrupted evaluation loses a batch at most.
                lines.flush()
                bar.update(len(answered))

            def unreadable(question: dict, error: Exception) -> None:
                if count_unreadable:
                    save([{**question, "prompt": "", "output": "", "unanswered": str(error)}])
                else:
                    logger.warning(f"question {question['id']} is left: {error}")

            generate_answers(
                model,
                processor,
                todo,
                batch_size=batch_size,
                max_new_tokens=run["max_new_tokens"],
                read_image=read_image,
                save=save,
                unreadable=unreadable,
            )

    # The first process joins what all have written, in the questions' order.
    state.wait_for_everyone()
    if state.is_main_process:
        done = _by_question(out)
        left = []
        for question in questions:
            record = done.get(question["id"])
            if record is None or (is_unanswered(record) and not count_unreadable):
                left.append(question["id"])
        if left:
            named = ", ".join(left[:5]) + ", ..." * (len(left) > 5)
            remedy = "mend the files and run this again, or add --count_unreadable to count them as wrong"
            raise ValueError(f"{len(left)} questions have no image that can be opened ({named}): {remedy}")
        with whole_file(out / "answers.jsonl") as unfinished, unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(done[question["id"]]) + "\n" for question in questions)
        # Only now that all answers are in the whole file.
        for part in out.glob("answers.*.part"):
            part.unlink()


@command("eval")
def main(args: Namespace) -> None:
    for results in _evaluate(args):
        print(terminal(table(results)))
    tell(
        f"Results: {args.out} (answers.jsonl, results.json; with several benchmarks in a folder each)",
        f"Next: ola-vlm compare {args.out} ANOTHER_MODELS_OUT",
    )


def _evaluate(args: Namespace) -> Iterator[dict]:
    """Each benchmark's results, as soon as they are there; in the first process only."""
    # What costs nothing to see is seen before anything is downloaded, rendered or loaded.
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}: give a number of questions")
    if len(args.benchmark) > 1 and (args.data or args.revision):
        raise ValueError("--data and --revision are one benchmark's: give one --benchmark with them")
    variants = {name: find_variant(name, args.variant) for name in args.benchmark}
    # One benchmark's results lie in the folder itself, several ones' in a folder each.
    folders: dict[str, Path] = {}
    for name in variants:
        folders[name] = args.out
        if len(variants) > 1:
            folders[name] = args.out / Path(name).stem
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"two benchmarks would share a folder: {', '.join(map(str, folders.values()))}")
    for folder in folders.values():
        check_is_of("eval", folder, "answers.jsonl", "answers.*.part")
    # Now, since the checkpoint may be written over while it is asked; and one that isn't there is said at once.
    weights = weights_state(args.checkpoint)

    # The model is loaded once for all benchmarks, and only if there is something left to be answered.
    @cache
    def load():
        return load_checkpoint(args.checkpoint, args.dtype, args.device_map, args.trust_remote_code)

    state = processes()
    for name, variant in variants.items():
        # The first process downloads or renders; the others wait, and find it done.
        with state.main_process_first():
            folder, revision = locate(name, args.data, args.revision)
        questions, read_image = load_questions(name, folder, variant)
        questions = evenly(questions, args.limit)
        # What makes these answers: a folder with another one's is refused.
        run = {
            "benchmark": name,
            "variant": variant,
            "data": args.data or find_benchmark(name).repo or str(folder),
            "revision": revision,
            "questions": len(questions),
            "model": args.checkpoint,
            "weights": weights,
            "dtype": args.dtype,
            "max_new_tokens": args.max_new_tokens,
            "transformers": __version__,
        }
        if args.limit is not None:
            run["limit"] = args.limit
        # The first process locks the folder for all of this run: a second run on it is refused.
        folders[name].mkdir(parents=True, exist_ok=True)
        lock = nullcontext()
        if state.is_main_process:
            lock = only_one(folders[name])
        with lock:
            answer(load, questions, read_image, folders[name], run, args.batch_size, args.count_unreadable)
        if state.is_main_process:
            yield write_results(folders[name])
