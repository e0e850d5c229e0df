"""Publish a checkpoint or an adapter on the Hub, with a model card made from its run: `ola-vlm push CHECKPOINT REPO`.

Goes up in one commit: weights, configurations, tokenizer, processor, generation configuration, code, statistics of the
targets, fitted probes if there are some, and a README.md. Stays here: run.json (it has paths of this machine),
checkpoints, optimizer states.
"""

from pathlib import Path

from .parsing import Parser, shipped


def _folder(path: str) -> Path:
    # argparse calls one function for a type, and the package's own weights must be found from any folder.
    return Path(shipped(path))


def parser() -> Parser:
    parser = Parser("push", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=_folder, help="folder of a model or of an adapter")
    parser.add_argument("repo", metavar="REPO", help="name/name on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="if it is made: for its owner only")
    # What the model card says beyond the run's own record.
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="results.json of `ola-vlm eval`, report.json of a study, or their folders",
    )
    parser.add_argument(
        "--base", metavar="REPO", help="of an adapter: the base model's repository, if it is local here"
    )
    parser.add_argument(
        "--license", metavar="ID", help="of this repository, such as apache-2.0; none is stated otherwise"
    )
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="DIR",
        help="folder of the targets' statistics, if they are not in CHECKPOINT but with the stage before",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the card and the files, and send nothing")
    return parser
