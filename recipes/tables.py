"""What a recipe is made of: a table of runs, each of which says what it changes in its parent.

To add one, write a `Run` into a table of `recipes/`; `recipes/__init__.py` lists the tables.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """A row of a table: one way to train, in one or several stages.

    Args:
        name: of the run; a recipe's is NAME_STAGE.
        parent: the run that it changes; None if `changes` has all fields.
        changes: stage -> the fields that differ from the parent's, for each stage that isn't the parent's own. A stage
            that the parent hasn't got changes the parent's fine-tuning.
        scores: of the finished run, in the order of the table's `columns`; empty if nobody has measured them.
        stage_in_name: False for a run of one stage whose recipe is called as the run is.
    """

    name: str
    parent: str | None
    changes: dict[str, dict]
    scores: tuple[float, ...] = ()
    stage_in_name: bool = True

    def recipe_name(self, stage: str) -> str:
        # "llama3_vit_finetune", but "lora".
        return f"{self.name}_{stage}" if self.stage_in_name else self.name


@dataclass(frozen=True)
class Table:
    """`columns`: what the scores are. `made_by`: what makes the runs' data, if they have data of their own."""

    title: str
    runs: Sequence[Run]
    columns: str = ""
    made_by: str = ""


@dataclass(frozen=True)
class Recipe:
    """One stage of a run: `fields` of `OlaVlmArguments`. `parent`: the recipe that they are a change of."""

    run: Run
    stage: str
    table: Table
    parent: str | None
    fields: dict

    def __call__(self) -> dict:
        """Its fields, the caller's to change."""
        # Deep: recipes share tasks and teachers, and a caller may change a layer.
        return copy.deepcopy(self.fields)

    @property
    def scores(self) -> tuple[float, ...]:
        """The run's, if this stage completes it."""
        # The paper measures after fine-tuning.
        return self.run.scores if self.stage == "finetune" else ()


def make_recipes(tables: Sequence[Table]) -> dict[str, Recipe]:
    """Name -> recipe, in the tables' order. A run's output goes to runs/NAME/STAGE; a later stage begins where the one
    before it ended."""
    recipes = {}
    for table in tables:
        for run in table.runs:
            # The first stage begins where the parent's does, each later one where the run's stage before it ended.
            start = {}
            for stage, changes in run.changes.items():
                output = {"output_dir": f"runs/{run.name}/{stage}"}
                parent = None
                fields = changes
                if run.parent is not None:
                    parent = _parent_recipe(run.parent, stage, recipes)
                    # The last one wins: a stage's beginning and its output are the run's own, whatever its parent has.
                    fields = recipes[parent].fields | changes | start | output
                recipes[run.recipe_name(stage)] = Recipe(run, stage, table, parent, fields)
                start = {"checkpoint": output["output_dir"]}
    return recipes


def _parent_recipe(parent: str, stage: str, recipes: dict[str, Recipe]) -> str:
    # The same stage; else a run of one stage, named without it; else a stage that the parent hasn't got.
    for name in (f"{parent}_{stage}", parent, f"{parent}_finetune"):
        if name in recipes:
            return name
    raise ValueError(f"no run {parent} comes before the one that changes it")
