"""Questions answered a second, batched against one by one: `python benchmarks/evaluation.py`.

The shipped miniature checkpoints on the world's own questions, by the harness's `generate_answers`. All batch sizes
take turns within one run, the best round counts; the answers must be equal. With --cpu the process's CPU time is
counted instead of the clock's: for one thread on a machine that others use, too.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch

from ola_vlm.eval.benchmarks import load_questions
from ola_vlm.inference.checkpoints import load_checkpoint
from ola_vlm.inference.generate import generate_answers
from ola_vlm.recipes.miniature import WEIGHTS
from ola_vlm.world.dataset import write_questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="CPU time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu else time.perf_counter
    print(f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads{', CPU time' * args.cpu}")
    # 1 is one by one, with which the others are compared.
    sizes = [1, *args.batch_sizes]
    print(f"questions/s in batches of {sizes}, and the ratio to 1")
    with tempfile.TemporaryDirectory() as folder:
        # 48 questions of each of four tasks, rendered here: none of the stored data is needed.
        write_questions(Path(folder), scenes=300, per_task=48)
        questions, read_image = load_questions("miniature", Path(folder))
        # Evenly spaced, so that every task is among them.
        questions = questions[:: max(1, len(questions) // args.questions)]
        for name in ("llava", "ola_vlm"):
            model, processor = load_checkpoint(str(WEIGHTS / name))
            best = dict.fromkeys(sizes, 0.0)
            answers = {}
            for _ in range(args.rounds):
                # One round of every size before the next round: a busy minute hits all.
                for size in sizes:
                    start = clock()
                    answered = generate_answers(model, processor, questions, batch_size=size, read_image=read_image)
                    best[size] = max(best[size], len(questions) / (clock() - start))
                    answers[size] = [record["output"] for record in answered]
            # Padding and batch mates must not change an answer.
            equal = all(answers[size] == answers[1] for size in sizes)
            rates = " ".join(f"{best[size]:8.1f}" for size in sizes)
            ratios = " ".join(f"{best[size] / best[1]:6.2f}" for size in sizes)
            print(f"{name:<10} {rates}   {ratios}   answers {'equal' if equal else 'DIFFER'}", flush=True)


if __name__ == "__main__":
    main()
