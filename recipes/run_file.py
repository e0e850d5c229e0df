"""A run as a file: YAML with the fields that its recipe would have. `ola-vlm recipes NAME` writes one to begin from,
`ola-vlm train RUN.yaml` trains it. A file may name a `recipe`, too, whose fields it changes.
"""

import json
from pathlib import Path
from typing import NamedTuple

import yaml

from ..commands.parsing import there_is_no_recipe
from . import RECIPES

ENDINGS = (".yaml", ".yml")


class RunFields(NamedTuple):
    recipe: str | None
    fields: dict


def read_run_file(name: str) -> RunFields:
    """Of a recipe's name, or of a file. ValueError for what is neither, and for a file that holds no fields."""
    # A recipe first: a file needs an ending, which no recipe's name has.
    if name in RECIPES:
        return RunFields(name, RECIPES[name]())
    path = Path(name)
    if path.suffix not in ENDINGS:
        raise ValueError(there_is_no_recipe(name, RECIPES))
    if not path.is_file():
        raise ValueError(f"there is no file {name}: `ola-vlm recipes NAME > {name}` begins one")
    try:
        # Safe: a file may come from anywhere, and YAML's tags could run code.
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is no YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{name} holds no fields: give lines such as `learning_rate: 1.0e-3`")
    recipe = fields.pop("recipe", None)
    if recipe is None:
        return RunFields(None, fields)
    if recipe not in RECIPES:
        raise ValueError(f"{name}: {there_is_no_recipe(str(recipe), RECIPES)}")
    # What the file says is stronger than its recipe.
    return RunFields(recipe, RECIPES[recipe]() | fields)


def run_file_text(fields: dict) -> str:
    """The fields as YAML."""
    # Through JSON: parts that several tasks share are written out for each.
    plain = json.loads(json.dumps(fields))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
