"""Compare two models' answers to the same questions: `ola-vlm compare A B --out DIR`.

A and B are files of answers (or their folders) of one benchmark. Prints and writes (DIR/comparison.json) B minus A for
everything that `ola-vlm score` reports, with a 95% interval (bootstrap over questions) and a paired two-sided test:
McNemar's, exact, where answers are right or wrong; a sign-flip permutation of weighted means and of VQA's scores.
DIR/disagreements.html shows the questions on which one is better: image, question, both answers, truth.
"""

from .parsing import Parser, results_folder


def parser() -> Parser:
    parser = Parser("compare", __doc__)
    parser.add_argument("a", metavar="A", help="answers.jsonl, or the folder with it")
    parser.add_argument("b", metavar="B", help="another model's")
    parser.add_argument("--out", type=results_folder, default="comparison", help="default: comparison")
    parser.add_argument("--data", help="where the images are, if not where A found them")
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="answers of two variants, prompts or truths, too; table and page say in what they differ",
    )
    parser.add_argument("--limit", type=int, default=48, help="questions on the page at most (2.5 to 10 kB each)")
    return parser
