"""Ask a checkpoint a benchmark's questions, score the answers: `ola-vlm eval CHECKPOINT --benchmark NAME --out DIR`.

CHECKPOINT: any image-text-to-text model of transformers, a folder or a name on the Hub. DIR gets answers.jsonl (each
line has its prompt, the raw answer and all that scoring needs) and results.json. Interrupted, the same command goes
on; when all is answered it only scores. Processes share the questions: `torchrun --nproc_per_node 8 -m ola_vlm.cli
eval ...`.
"""

from ..eval.benchmarks import BENCHMARKS
from .parsing import Parser, add_loading_options, count, results_folder, shipped


def parser() -> Parser:
    parser = Parser("eval", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=shipped, help="folder or name on the Hub")
    # Any word is taken: it may be the name of a file.
    parser.add_argument(
        "--benchmark",
        required=True,
        nargs="+",
        metavar="NAME",
        help=f"one or more of {', '.join(BENCHMARKS)}, or a file with your own questions (.json, .jsonl, .csv, .tsv)",
    )
    parser.add_argument(
        "--out", type=results_folder, required=True, help="with several benchmarks each has a folder of its own"
    )
    # Variants differ from benchmark to benchmark, and the command checks them: the help lists them all.
    names = "; ".join(f"{name}: {', '.join(benchmark.variants)}" for name, benchmark in BENCHMARKS.items())
    parser.add_argument("--variant", help=f"prompt and scoring by name, the first is the default ({names})")
    parser.add_argument(
        "--data",
        help="folder with the benchmark's files, or a name on the Hub (default: its own); of your own questions the "
        "images'",
    )
    parser.add_argument("--revision", help="of the data on the Hub, all 40 digits")
    parser.add_argument("--limit", type=int, help="ask about this many questions only, evenly spaced")
    parser.add_argument(
        "--count_unreadable",
        action="store_true",
        help="questions whose image can't be opened count as unanswered (default: they stop it in the end)",
    )
    # How answers are made. Benchmarks ask for a letter, a number or a few words: 16 tokens are enough.
    parser.add_argument("--batch_size", type=count, default=16, help="questions a batch (16)")
    parser.add_argument("--max_new_tokens", type=count, default=16, help="of an answer (16)")
    add_loading_options(parser)
    return parser
