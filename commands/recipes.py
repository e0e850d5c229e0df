"""All recipes, a line each, by table of the paper; or one of them as a file to train from.

ola-vlm recipes
ola-vlm recipes llama3_vit_pretrain > my_run.yaml
"""

from ..recipes import RECIPES
from .parsing import Parser, recipe_of


def parser() -> Parser:
    parser = Parser("recipes", __doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", type=recipe_of(RECIPES), help="print this one as YAML")
    return parser
