"""Check data before training on it: `ola-vlm check-data --recipe NAME`, or `--data FILE --image_folder FOLDER`.

Counts rows, images and answers; finds images that are missing, undecodable or outside the image folder, and rows in no
known form. With a model's parts (a recipe's, or --checkpoint) also rows without a supervised token or beyond
max_length. No weights are loaded. Ends with status 1 if there are bad rows, unless --on_bad_rows is drop.
"""

from pathlib import Path

from .fields import FieldParser


def parser() -> FieldParser:
    takes = "[RUN.yaml | --recipe NAME | --data FILE] [--no_decode] [--out FILE]"
    parser = FieldParser("check-data", __doc__, shown=("model", "data"), takes=takes)
    parser.add_argument("--no_decode", action="store_true", help="look whether images are there, don't open them")
    parser.add_argument("--out", type=Path, help="a JSON file for the report and the names of all bad rows")
    return parser
