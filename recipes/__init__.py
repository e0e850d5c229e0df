"""Recipes: fields of `OlaVlmArguments` by name. `ola-vlm recipes` lists them, `ola-vlm train --recipe NAME` trains.

Nothing heavy is imported here: recipes are data.
"""

from . import ablations, attach, finetune, miniature, objectives, paper, smollm2
from .tables import make_recipes

# As `ola-vlm recipes` lists them. A run's parent is looked up by name, so its table comes before the run's own.
TABLES = (
    miniature.TABLE,
    smollm2.TABLE,
    finetune.TABLE,
    attach.TABLE,
    *paper.TABLES,
    *ablations.TABLES,
    *objectives.TABLES,
)
RECIPES = make_recipes(TABLES)
