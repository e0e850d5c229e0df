"""Configuration of OLA-VLM: LLaVA's, and a list of distillation tasks (paper: arXiv 2412.09585, section 3)."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch.nn import ModuleDict
from transformers import LlavaConfig

# Rows of a vocabulary that grows: another number leaves rows of logits unaligned for tensor cores.
VOCAB_MULTIPLE = 64
# Groups of tokens that a predictor may attend to, in their order in a row: words before the first image, the image's
# own tokens, its task tokens, words after.
KEY_GROUPS = ["system", "image", "task", "text"]

# What a task needs beyond its name; None means that it has to be given (or is derived in `normalize_task`).
TASK_FIELDS = {
    "name": None,
    "layers": None,
    "num_task_tokens": 8,
    "target_length": None,
    "target_dim": None,
    "loss_weight": 0.5,
    "contrastive_weight": 0.3,
    "predictor_depth": 1,
    "predictor_heads": 4,
    "predictor_head_dim": 32,
    "predictor_ffn_mult": 1,
    "predictor_dim": None,
    "output_mlp": False,
    "attends_to": KEY_GROUPS,
    "predictor": "resampler",
    "loss": "smooth_l1",
    "target": "features",
    "place_code": 0,
    "words": ["class", "depth"],
    "combine": "sum",
    "alone": [],
    "until": 1.0,
}
# All that a field may be.
CHOICES = {
    "predictor": ("resampler", "patch", "none"),
    "loss": ("smooth_l1", "cosine", "mse", "moments"),
    "target": ("features", "words"),
    "combine": ("sum", "mean"),
}
# What a task has by default if one of its fields has this value.
IMPLIED = {
    ("predictor", "patch"): {"num_task_tokens": 0, "output_mlp": False},
    ("predictor", "none"): {"num_task_tokens": 0, "output_mlp": False},
    ("loss", "moments"): {"contrastive_weight": 0.0},
}
# What the paper's tasks have beyond `TASK_FIELDS` (section 4.1 and table III).
PAPER_TASKS = {
    "gen": {"layers": [12, 20], "target_length": 1, "target_dim": 1024},
    "depth": {"layers": [8, 20], "target_length": 576, "target_dim": 1024, "output_mlp": True},
    "seg": {"layers": [10, 18], "target_length": 576, "target_dim": 1536},
}


def default_tasks() -> list[dict]:
    """The paper's three tasks in its token order (section 4.1 and table III), for a 32-layer LLM and 24x24 targets."""
    return [{"name": name, **fields} for name, fields in PAPER_TASKS.items()]


def task_token_strings(tasks: Iterable[dict]) -> list[str]:
    """The vocabulary entries `<name_i>` of all tasks, in the order in which they follow an image's tokens."""
    tokens = []
    for task in tasks:
        tokens += [f"<{task['name']}_{i}>" for i in range(task["num_task_tokens"])]
    return tokens


def target_shape(task: dict) -> tuple[int, int]:
    """(Q, E) of what a task's source gives for an image: features and their place code, or the numbers of words."""
    if task.get("target") == "words":
        return task["target_length"], len(task["words"])
    return task["target_length"], task["target_dim"] + task.get("place_code", 0)


def _check(condition: bool, field: str, value, remedy: str):
    if not condition:
        raise ValueError(f"{field} is {value!r}: {remedy}.")


def _is_count(value, least: int = 1) -> bool:
    # Not `isinstance`: True is an int, too.
    return type(value) is int and value >= least


def current_task_fields(task: dict) -> dict:
    """A task of whatever version with today's names of fields."""
    task = dict(task)
    # Its name before; checkpoints from then keep loading.
    if "keys" in task and "attends_to" not in task:
        task["attends_to"] = task.pop("keys")
    return task


def normalize_task(task: dict, hidden_size: int, num_layers: int) -> dict:
    """
    One task with every field filled in and checked against the LLM (`hidden_size` wide, `num_layers` deep).

    Fields (see `TASK_FIELDS` and `IMPLIED` for defaults; gen, depth and seg have the paper's); docs/objectives.md has
    examples:
    `layers`: decoder blocks, counted from 1, whose output is read; 0 is what enters the first one, so that an image's
    tokens are what the projector gives.
    `predictor`: "resampler", the paper's; "patch", a linear layer of an image's token for that token's place (an MLP
    of `predictor_depth` layers, `predictor_dim` wide, if that is more than 1); "none", the token itself.
    `predictor_*`, `output_mlp` (a Linear-ReLU-Linear on the output) and `attends_to` (groups of tokens, `KEY_GROUPS`)
    are the resampler's.
    `target`: "features", (`target_length`, `target_dim`) an image, to which `place_code` numbers are appended that
    say a position's row and column; or "words": the LLM's embeddings of the `words` that teachers have for a position,
    which are combined by their "sum" or "mean"; beside a word that is `alone` a position's others don't count.
    `loss`: "smooth_l1", "cosine", "mse" (over the targets' variance) or "moments" (`training.losses`). The task's loss
    is `loss_weight` * sum over layers of (it + `contrastive_weight` * contrastive); it is off after a share `until` of
    the training steps.
    Raises ValueError naming the field and the remedy.
    """
    # A name first, by which the rest can be complained about. The modules of a task are an attribute of that name.
    _check(isinstance(task, dict), "tasks[]", task, 'give each task as a dict such as {"name": "depth"}')
    name = task.get("name")
    usable = isinstance(name, str) and name.isidentifier() and not hasattr(ModuleDict, name)
    _check(
        usable, "tasks[].name", name, "give each task an identifier as name, and no attribute of torch's ModuleDict"
    )
    task = current_task_fields(task)
    unknown = sorted(set(task) - set(TASK_FIELDS))
    _check(not unknown, f"tasks[{name}]", unknown, f"unknown fields, the known ones are {list(TASK_FIELDS)}")
    task = _with_defaults(task, hidden_size)

    def check(field, condition, remedy):
        _check(condition, f"tasks[{name}].{field}", task[field], remedy)

    # Each field for itself.
    for field, values in CHOICES.items():
        check(field, task[field] in values, f"choose one of {list(values)}")
    _check_sizes(task, check)
    layers = task["layers"]
    is_list = isinstance(layers, (list, tuple)) and len(layers) > 0 and all(type(layer) is int for layer in layers)
    check("layers", is_list and len(set(layers)) == len(layers), "list one or more different layers")
    in_range = min(layers) >= 0 and max(layers) <= num_layers
    check("layers", in_range, f"choose from 1 to {num_layers}, the LLM's layers, or 0, what enters the first one")
    for field in ["loss_weight", "contrastive_weight"]:
        is_weight = isinstance(task[field], (int, float)) and 0 <= task[field] < math.inf
        check(field, is_weight, "give a finite number of at least 0")
    until = task["until"]
    is_share = isinstance(until, (int, float)) and 0 < until <= 1
    check("until", is_share, "give a share of the training steps, more than 0 and at most 1")
    check("output_mlp", isinstance(task["output_mlp"], bool), "give true or false")
    groups = task["attends_to"]
    known = isinstance(groups, (list, tuple)) and len(groups) > 0 and all(group in KEY_GROUPS for group in groups)
    check("attends_to", known, f"list one or more of {KEY_GROUPS}")

    # Then those that have to fit together.
    _check_target(task, hidden_size, check)
    _check_predictor(task, hidden_size, check)

    # One form for what means the same: a configuration that is written and read again is equal.
    task["layers"] = sorted(layers)
    task["attends_to"] = [group for group in KEY_GROUPS if group in groups]
    task["words"] = list(task["words"])
    task["alone"] = list(task["alone"])
    return task


def _with_defaults(given: dict, hidden_size: int) -> dict:
    task = {**TASK_FIELDS, **PAPER_TASKS.get(given["name"], {})}
    for (field, value), implied in IMPLIED.items():
        if given.get(field) == value:
            task.update(implied)
    task.update(given)
    if task["target"] == "words" and "target_dim" not in given:
        task["target_dim"] = hidden_size
    # The reference's sizes: only depth with task tokens is as wide as the LLM.
    if task["predictor_dim"] is None:
        task["predictor_dim"] = task["target_dim"]
        if task["name"] == "depth" and task["num_task_tokens"] != 0:
            task["predictor_dim"] = hidden_size
    return task


def _check_sizes(task: dict, check) -> None:
    least = {"target_length": 1, "target_dim": 1, "num_task_tokens": 0, "predictor_dim": 1}
    least.update({f"predictor_{part}": 1 for part in ["depth", "heads", "head_dim", "ffn_mult"]})
    for field, number in least.items():
        check(field, _is_count(task[field], number), f"give an integer of at least {number}")
    code = task["place_code"]
    check("place_code", _is_count(code, 0) and code % 4 == 0, "give a multiple of 4, or 0 for none")
    is_grid = math.isqrt(task["target_length"]) ** 2 == task["target_length"]
    check("place_code", code == 0 or is_grid, "give 0: only a square grid, by its target_length, has rows and columns")


def _check_predictor(task: dict, hidden_size: int, check) -> None:
    tokens = task["num_task_tokens"]
    if task["predictor"] == "resampler":
        # Query tables have a row for each target position: a token is the mean of as many rows as every other.
        length = task["target_length"]
        divisible = tokens == 0 or length == 1 or length % tokens == 0
        check(
            "num_task_tokens", divisible, f"choose a divisor of target_length {length} (each token stands for a group)"
        )
        has_key = tokens > 0 or any(group != "task" for group in task["attends_to"])
        check("attends_to", has_key, "add image: without task tokens there is nothing to attend to")
        return
    predictor = f'predictor "{task["predictor"]}"'
    check("num_task_tokens", tokens == 0, f"give 0, {predictor} reads the image's own tokens")
    check("output_mlp", not task["output_mlp"], f"give false, or predictor_depth for an MLP: {predictor} has none")
    if task["predictor"] == "none":
        width = task["target_dim"] + task["place_code"]
        check("target_dim", width == hidden_size, f"give {hidden_size}, the width of a token, which is the prediction")


def _check_target(task: dict, hidden_size: int, check) -> None:
    if task["loss"] == "moments":
        check("contrastive_weight", task["contrastive_weight"] == 0, 'give 0: loss "moments" knows no image\'s target')
        check("target_length", task["target_length"] > 1, 'a single position has no deviation for loss "moments"')
    words = task["words"]
    is_list = isinstance(words, (list, tuple)) and len(words) > 0 and len(set(words)) == len(words)
    named = is_list and all(isinstance(word, str) and word.isidentifier() for word in words)
    check("words", named, 'list one or more different names, such as "class" and "depth", of entries in teachers')
    alone = task["alone"]
    is_list = isinstance(alone, (list, tuple)) and all(isinstance(word, str) for word in alone)
    check("alone", is_list, 'list words of the teachers, such as "sky"; [] for none')
    if task["target"] == "words":
        check(
            "target_dim",
            task["target_dim"] == hidden_size,
            f"give {hidden_size}, the width of a word, or leave it out",
        )
        check("place_code", task["place_code"] == 0, "give 0: words are vectors of the language model's own")


@strict
class OlaVlmConfig(LlavaConfig):
    """
    `tasks`: list of task dicts in token order (`normalize_task`), none by default, which is plain LLaVA.
    `task_token_ids`: vocabulary ids of all task tokens in sequence order, as many as the tasks' `num_task_tokens`.
    `has_predictors`: False for a checkpoint that keeps its tasks' tokens alone, which is all that answers need.
    `vocab_padding`: how many of the vocabulary's last rows stand for no token. They are never emitted, and with tasks
    they are no candidates of the loss.
    """

    model_type = "ola_vlm"
    # Trainer's evaluation needs a list here.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "cache",
        "hidden_states",
        "attentions",
        "image_hidden_states",
        "image_outputs",
        "predictions",
        "logit_scales",
        "word_embeddings",
    ]

    tasks: list | None = None  # pyright: ignore[reportRedeclaration] (the field, typed below as it is read)
    task_token_ids: list | None = None  # pyright: ignore[reportRedeclaration] (the same)
    has_predictors: bool = True
    vocab_padding: int = 0

    # What `__post_init__` leaves: configurations and lists, never dicts or None.
    if TYPE_CHECKING:
        text_config: Any = None
        vision_config: Any = None
        tasks: Any = None
        task_token_ids: Any = None

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "OlaVlmConfig":
        """ValueError for the configuration of another model, which would load as a random LLaVA."""
        found = config_dict.get("model_type", cls.model_type)
        _check(found in (cls.model_type, "llava"), "model_type", found, "give a checkpoint of OLA-VLM or plain LLaVA")
        # A plain LLaVA's configuration becomes ours: by its own model type its files' keys would not be converted.
        return super().from_dict({**config_dict, "model_type": cls.model_type}, **kwargs)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Tasks, checked against the language model, and an id for each of their tokens.
        text = self.text_config
        self.tasks = [normalize_task(task, text.hidden_size, text.num_hidden_layers) for task in self.tasks or []]
        names = [task["name"] for task in self.tasks]
        _check(len(set(names)) == len(names), "tasks", names, "give each task its own name")
        self.task_token_ids = ids = list(self.task_token_ids or [])
        count = sum(task["num_task_tokens"] for task in self.tasks)
        _check(len(ids) == count, "task_token_ids", ids, f"the tasks need {count} ids, build_ola_vlm finds them")
        # Rows of the vocabulary, none of them twice and none the image's.
        within = all(_is_count(i, 0) and i < text.vocab_size for i in ids)
        usable = within and len({*ids, self.image_token_id}) == count + 1
        _check(not ids or usable, "task_token_ids", ids, f"give different ids within the {text.vocab_size} embeddings")
        # Padding lies behind all of these rows.
        padding = self.vocab_padding
        fits = 0 <= padding < text.vocab_size - max([*ids, self.image_token_id])
        _check(padding == 0 or fits, "vocab_padding", padding, "give how many of the last rows stand for no token")
        # One class can register for one Auto class only; all names lead to the same model.
        auto_map = self.__dict__.get("auto_map") or {}
        _check(isinstance(auto_map, dict), "auto_map", auto_map, "give a dict such as {'AutoModel': 'module.Class'}")
        auto_map = dict(auto_map)
        for name in ("AutoModel", "AutoModelForMultimodalLM"):
            auto_map.setdefault(name, "modeling_ola_vlm.OlaVlmForConditionalGeneration")
        self.auto_map = auto_map


OlaVlmConfig.register_for_auto_class()
