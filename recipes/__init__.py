"""Recipes: fields of `OlaVlmArguments` by name. `ola-vlm recipes` lists them, `ola-vlm train --recipe NAME` trains.

Nothing heavy is imported here: recipes are data.
"""

from . import ablations, finetune, miniature, objectives, paper, smollm2
from .tables import make_recipes

TABLES = (
    miniature.TABLE,
    smollm2.TABLE,
    finetune.TABLE,
    *paper.TABLES,
    *ablations.TABLES,
    *objectives.TABLES,
)
RECIPES = make_recipes(TABLES)
