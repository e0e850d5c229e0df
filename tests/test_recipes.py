"""Recipes say what the paper says: their fields, what trains and their losses, on tiny stand-ins of all parts."""

import dataclasses
import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer
from tiny_teachers import save_clip_image, save_depth_anything, save_oneformer, timm_model
from tokenizers import Tokenizer, models
from training_helpers import llava_sample, write_llava
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    SwinConfig,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from ola_vlm import cli, train
from ola_vlm.baselines import build
from ola_vlm.commands.table import parse
from ola_vlm.configuration_ola_vlm import TASK_FIELDS, default_tasks
from ola_vlm.convert import parts
from ola_vlm.files.strangers import entries_of
from ola_vlm.recipes import RECIPES, TABLES, attach, miniature, objectives, paper, show
from ola_vlm.recipes.arguments import make_arguments
from ola_vlm.recipes.paper import FUSIONS, METHODS, WEIGHTS
from ola_vlm.recipes.tables import Run, Table, make_recipes
from ola_vlm.targets.encoders import ENCODERS, ClipImageEncoder, DepthAnythingEncoder, OneFormerEncoder
from ola_vlm.train import load_model
from ola_vlm.training.arguments import OlaVlmArguments
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.stages import apply_stage, part_of
from ola_vlm.training.targets import target_sources
from ola_vlm.training.trainer import OlaVlmTrainer

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
LOCAL = ("miniature", "smollm2")
ADAPTERS = ("lora", "qlora")
ATTACHED = [name for name, recipe in RECIPES.items() if recipe.table is attach.TABLE]  # tests/test_any_vlm.py
BY_RUN = {}


def is_local(recipe) -> bool:
    """Whether it is none of the large runs, which need GPUs."""
    return recipe.run.name.split("_")[0] in (*LOCAL, *ADAPTERS) or recipe.table is attach.TABLE


for name, recipe in RECIPES.items():
    if not is_local(recipe) and recipe.table not in objectives.TABLES:  # which have their own tests
        BY_RUN.setdefault(recipe.run.name, []).append(name)
ABLATIONS = {  # what each ablation changes in its parent, apart from folders
    "losses_none_pretrain": {"embedding_losses": False},
    "losses_pt_ift_finetune": {"embedding_losses": True},
    "learnable_finetune": {"task_tokens": "trained"},
    "smooth_l1_pretrain": {"contrastive_weight": 0.0},
    "lambda_0.10_pretrain": {"loss_weight": 0.1},
    "lambda_1.00_pretrain": {"loss_weight": 1.0},
    "tokens_0_pretrain": {"num_task_tokens": 0},
    "tokens_24_pretrain": {"num_task_tokens": 24},
    "keys_image_task_pretrain": {"attends_to": ["image", "task"]},
    "keys_system_image_task_pretrain": {"attends_to": ["system", "image", "task"]},
    "layers_d20_s18_g20_pretrain": {"depth.layers": [20], "seg.layers": [18], "gen.layers": [20]},
    "layers_d8.14_s10.16_g12.18_pretrain": {"depth.layers": [8, 14], "seg.layers": [10, 16], "gen.layers": [12, 18]},
    "tasks_gen_seg_pretrain": {"tasks": ["gen", "seg"]},
    "order_sgd_pretrain": {"tasks": ["seg", "gen", "depth"]},
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, tiny_parts):
    """Function (recipe, folder) -> its arguments with tiny parts of the same kinds; all targets go into one cache."""
    folder = tmp_path_factory.mktemp("stand_ins")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 32}
    sizes |= {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    parts = {"openai/clip-vit-large-patch14-336": tiny_parts.vision_tower}
    for path, config in zip(paper.LANGUAGE_MODELS.values(), (LlamaConfig(**sizes), Phi3Config(**sizes)), strict=True):
        parts[path] = str(folder / config.model_type)
        AutoModelForCausalLM.from_config(config).save_pretrained(parts[path])
        make_tokenizer().save_pretrained(parts[path])
    parts[paper.VISION_TOWERS["convnext"]] = str(folder / "convnext")
    timm_model("convnext_atto", depths=[1, 1, 1, 1], dims=[4, 4, 4, 8]).save_pretrained(folder / "convnext")
    for name, save in {"gen": save_clip_image, "depth": save_depth_anything, "seg": save_oneformer}.items():
        save(folder / name)
    target_dims = {"gen": 12, "depth": 32, "seg": 64}
    data = write_llava(folder, [llava_sample(0), llava_sample(1, "b.png")], ["a.png", "b.png"])

    def arguments(name: str) -> OlaVlmArguments:
        fields = RECIPES[name]() | {"data": str(data), "image_folder": str(folder), "bf16": False, "use_cpu": True}
        fields["dtype"] = "float32"
        fields |= {"max_steps": 1, "per_device_train_batch_size": 2, "dataloader_num_workers": 0}
        fields |= {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "target_fill": True}
        fields["output_dir"] = str(folder / fields["output_dir"])
        for part in {"vision_tower", "language_model"} & fields.keys():
            fields[part] = parts[fields[part]]
        if "checkpoint" in fields:
            fields["checkpoint"] = str(folder / fields["checkpoint"])
        if "target_cache" in fields:
            fields["target_cache"] = str(folder / "targets")
        for task in fields.get("tasks", ()):  # a length that all numbers of task tokens divide
            length = 1 if task["target_length"] == 1 else 144
            task.update(target_length=length, target_dim=target_dims[task["name"]])
        for task, teacher in fields.get("teachers", {}).items():
            teacher.pop("subfolder", None)
            teacher["path"] = str(folder / task)
        return OlaVlmArguments(**fields)

    return arguments


def expected_parts(name: str, tasks: list[dict]) -> set[str]:
    """What the recipe trains, by the paper's section 3.4 and Tables 4 to 6."""
    stage = RECIPES[name].fields["stage"]
    trained = {"projector"} | ({"language_model"} if stage != "pretrain" else set())
    trained |= {"vision_tower"} if stage == "visual_pretrain" else set()
    if tasks and stage == "pretrain" and "tokens_0" not in name:
        trained |= {"queries"}
    if tasks and ((stage == "pretrain" and "losses_none" not in name) or "losses_pt_ift" in name):
        trained |= {"predictors", "logit_scales"}
    return trained


def by_part(model) -> dict[str, list]:
    parts = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(part_of(name), []).append(parameter)
    return parts


@pytest.fixture(scope="module")
def trained_models():
    """output_dir -> (model, processor) of the recipes so far: where later stages begin."""
    return {}


@pytest.mark.parametrize("run", list(BY_RUN))
def test_every_run_trains_what_it_should(stand_ins, trained_models, monkeypatch, run):
    """Each of its stages from parts or from the checkpoint that the recipe names, with its first batch's losses."""

    monkeypatch.setattr(train, "adapter_base", lambda path: None)
    monkeypatch.setattr(train, "read_checkpoint", lambda path, **options: trained_models[path])
    for name in BY_RUN[run]:
        args = stand_ins(name)
        model, processor = load_model(args)
        trained_models[args.output_dir] = model, processor
        stage = apply_stage(model, args.stage, args.embedding_losses, args.task_tokens)
        tasks, rows = model.config.tasks if stage.embedding_losses else [], args.load_rows()
        sources = target_sources(args, tasks, rows) if tasks else {}
        trainer = OlaVlmTrainer(model, args, data_collator=OlaVlmCollator(processor, sources, tasks))
        batch = trainer.data_collator([rows[0], rows[1]])
        trainer.compute_loss(model.train(), batch, num_items_in_batch=(batch["labels"] != -100).sum())

        parts = by_part(model)
        trained = {part for part in parts if all(parameter.requires_grad for parameter in parts[part])}
        assert {part for part in parts if any(parameter.requires_grad for parameter in parts[part])} == trained
        assert trained == expected_parts(name, model.config.tasks), name
        expected = {"loss/ntp"}
        for task in model.config.tasks if "predictors" in trained else ():
            pairs = [(layer, part) for layer in task["layers"] for part in ("smooth_l1", "contrastive")]
            expected |= {f"loss/{task['name']}/{layer}/{part}" for layer, part in pairs}
        losses = {part: value for part, value in trainer._sums["train"].items() if part != "steps"}
        assert set(losses) == expected and all(value > 0 for value in losses.values()), name


def test_every_recipe_differs_from_its_parent_in_what_its_name_says():
    assert set(show.changes("qlora")) == {"load_in_4bit", "output_dir"} and not show.changes("lora")
    for name in ATTACHED:
        what = {"output_dir", "tasks", "teachers"} if name.endswith(("_patch", "_words")) else set()
        assert {field for field in show.changes(name) if "." not in field} == what
    for name, recipe in RECIPES.items():
        if name in (*ADAPTERS, *ATTACHED) or recipe.table in objectives.TABLES:
            continue
        changed = show.changes(name)
        if recipe.parent is None:
            assert not changed and name in {
                f"{r}_{s}" for r in ("llama3_vit", *LOCAL) for s in ("pretrain", "finetune")
            }
            continue
        assert changed.pop("output_dir") == f"runs/{recipe.run.name}/{recipe.fields['stage']}"
        variant = name.removeprefix("llama3_vit_")
        begin = changed.pop("checkpoint", None)
        if begin is not None:  # its own earlier stage's end
            assert begin in {own.fields["output_dir"] for own in RECIPES.values() if own.run is recipe.run}
        if variant in ABLATIONS:
            own = {field.removeprefix("tasks."): value for field, value in changed.items() if field != "teachers"}
            ours = ABLATIONS[variant]
            if variant.split("_")[0] in ("lambda", "tokens", "keys", "smooth"):
                ((field, value),) = ours.items()
                ours = {f"{task}.{field}": value for task in ("gen", "depth", "seg")}
            assert {field: value for field, value in own.items() if not field.startswith("target_")} == ours, name
        elif recipe.table in paper.TABLES:
            method, _llm, encoder = ({word} & set(name.split("_")) for word in ("llava", "phi3", "convnext"))
            what = {"vision_tower"} if encoder else {"language_model", "model_overrides"}
            what = {"tasks", "teachers"} if method else what
            if "concat" in name:
                what = {"tasks", "fusion"}
            if name.startswith("commercial"):
                what = {"teachers", "tasks.depth.target_dim"}
            if "visual_pretrain" in name:
                what = {"stage", "data", "image_folder"}
            assert set(changed) == (what if recipe.fields["stage"] != "finetune" else set()), name
        elif name.endswith("pretrain"):
            assert len({field.rpartition(".")[2] for field in changed} - {"teachers", "image_folder"}) == 1, name
        else:
            assert not changed, name


def of_tasks(tasks: list[dict], field: str) -> set:
    """What the tasks have in a field, given or by default."""
    return {str(task.get(field, TASK_FIELDS.get(field))) for task in tasks}


def test_a_rows_value_is_the_one_in_its_name():
    """Of the paper's ablations, and of the miniature's."""
    fields = {"lambda": "loss_weight", "tokens": "num_task_tokens"}
    letters = {task["name"][0]: task["name"] for task in miniature.TASKS}
    seen = set()
    for name, recipe in RECIPES.items():
        match = re.fullmatch(r"llama3_vit_(lambda|tokens|layers|order|tasks)_(.+)_pretrain", name)
        if match is None:
            continue
        table, row = match.groups()
        tasks = recipe.fields["tasks"]
        layers = {task["name"]: task["layers"] for task in tasks}
        seen.add(table)
        if table in fields:
            assert {float(value) for value in of_tasks(tasks, fields[table])} == {float(row)}, name
        elif table == "layers":
            named = {letters[part[0]]: [int(layer) for layer in part[1:].split(".")] for part in row.split("_")}
            assert layers == named, name
        else:
            names = [letters[letter] for letter in row] if table == "order" else row.split("_")
            assert list(layers) == names and (table == "order" or set(recipe.fields["teachers"]) == set(names)), name
    assert seen == {"lambda", "tokens", "layers", "order", "tasks"}

    for table, rows in miniature.ABLATIONS.items():
        for row in rows:
            tasks = miniature.pretrain(miniature.ablation_run(table, row))["tasks"]
            if table in fields:
                assert {float(value) for value in of_tasks(tasks, fields[table])} == {float(row)}, (table, row)
            elif table == "layers" and not row.startswith("d"):
                assert of_tasks(tasks, "layers") == {str([int(layer) for layer in row.split(".")])}, row
            elif table == "order":
                assert "".join(task["name"][0] for task in tasks) == row
            elif table == "tasks" and row not in ("none", "all"):
                assert [task["name"] for task in tasks] == row.split("_")


def test_the_papers_recipes_load_bf16_and_shard_what_ddp_cannot_hold(capsys):
    """Frozen weights as the plan counts them (`benchmarks/plan.py`), and commands that fit GPUs of 80 GB."""
    for name, recipe in RECIPES.items():
        if is_local(recipe):
            assert show.start_command(name) == f"python train.py --recipe {name}"
            continue
        assert recipe.fields["dtype"] == "bfloat16" and recipe.fields["bf16"]
        sharded = recipe.fields["stage"] != "pretrain"
        words = show.start_command(name).split()
        assert words[:1] == (["accelerate"] if sharded else ["torchrun"]) and words[-2:] == ["--recipe", name]
        assert ("recipes/accelerate/fsdp2.yaml" in words) == sharded
    cli.main(["recipes", "llama3_convnext_vpt_visual_pretrain"])
    assert "# Start the recipe as it is:  accelerate launch --config_file" in capsys.readouterr().out


def test_every_run_of_the_paper_has_its_scores_and_hours():
    for name, recipe in RECIPES.items():
        if is_local(recipe):
            assert show.estimated_hours(name) is None and recipe.scores == ()
            continue
        assert 0.3 < show.estimated_hours(name) < 2.5, name
        if recipe.stage != "finetune":
            assert recipe.scores == (), name
        elif not name.startswith("commercial") and recipe.table not in objectives.TABLES:
            assert recipe.scores and all(40 < score < 80 for score in recipe.scores[-1:]), name
    assert RECIPES["llama3_vit_finetune"].scores[-1] == 57.6
    assert show.estimated_hours("llama3_vit_pretrain") == pytest.approx(0.755, abs=0.005)
    assert show.estimated_hours("phi3_vit_finetune") == pytest.approx(0.866, abs=0.005)
    assert show.estimated_hours("llama3_vit_losses_pt_ift_finetune") > show.estimated_hours("llama3_vit_finetune")


def test_scores_fit_their_columns():
    for table in TABLES:
        for run in table.runs:
            if not run.scores:
                continue
            columns = re.split(r", | and ", table.columns.removeprefix("CV-Bench's "))
            if len(run.scores) > 1:
                assert len(run.scores) == len(columns), run.name


def test_the_papers_tasks_are_those_of_the_configuration():
    assert list(paper.TASKS.values()) == default_tasks()


def test_recipes_are_data():
    """One name each; a run's parent comes before it; nobody can change a recipe by what it gave."""
    names = [run.name for table in TABLES for run in table.runs]
    assert len(names) == len(set(names))
    for run in (run for table in TABLES for run in table.runs):
        assert run.parent is None or names.index(run.parent) < names.index(run.name)
    RECIPES["llama3_vit_pretrain"]()["tasks"][0]["layers"].append(1)
    assert RECIPES["llama3_vit_pretrain"]()["tasks"][0]["layers"] == [12, 20]
    orphan = Table("", runs=[Run("child", "nobody", {"pretrain": {}})])
    with pytest.raises(ValueError, match="no run nobody"):
        make_recipes([orphan])


def test_the_command_lists_and_the_page_agrees(capsys):
    cli.main(["recipes"])
    listing = capsys.readouterr().out
    assert all(len(re.findall(rf"^  {re.escape(name)} ", listing + " ", re.M)) <= 1 for name in RECIPES)
    assert {line.split()[0] for line in listing.splitlines() if line.startswith("  ")} == set(RECIPES)
    assert listing.strip() in PAGE.read_text(), "docs/recipes.md: paste what `ola-vlm recipes` prints"
    with pytest.raises(SystemExit, match="no recipe 'llama3_vit_pretrian': did you mean llama3_vit_pretrain"):
        cli.main(["recipes", "llama3_vit_pretrian"])
    with pytest.raises(SystemExit):
        cli.main(["recipes", "--help"])
    assert "ola-vlm recipes" in capsys.readouterr().out


def test_a_recipe_says_what_it_changes(capsys):
    cli.main(["recipes", "llama3_vit_tokens_4_pretrain"])
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert "# What it changes in llama3_vit_pretrain:" in comments
    assert "#   tasks.gen.num_task_tokens: 4" in comments and not any("learning_rate" in line for line in comments)


def as_trained(argv: list[str]) -> dict:
    """The values of all fields for a command line."""
    args = make_arguments(parse("train", argv), "ola-vlm train", bf16=False, use_cpu=True)
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.name != "logging_dir"}


@pytest.mark.parametrize(
    "name", ["miniature_pretrain", "smollm2_finetune", "qlora", "phi3_convnext_pretrain", "llama3_vit_finetune"]
)
def test_a_recipe_as_a_file_trains_the_same(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["recipes", name])
    Path("my_run.yaml").write_text(capsys.readouterr().out)
    more = ["--checkpoint", "a"] if name == "qlora" else []
    expected = as_trained(["--recipe", name, *more])
    assert as_trained(["my_run.yaml", *more]) == expected
    assert as_trained([*more, "--recipe", "my_run.yaml"]) == expected
    changed = as_trained(["my_run.yaml", *more, "--learning-rate", "0.5"])
    assert changed["learning_rate"] == 0.5 and {**changed, "learning_rate": 0} == {**expected, "learning_rate": 0}
    if name == "miniature_pretrain":
        assert expected["tasks"][1]["layers"] == [2] and expected["max_steps"] == 400


def test_a_file_may_change_a_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: miniature_pretrain\nlearning_rate: 2e-4\nmax_steps: 7\ncheck_images: no\n")
    changed = as_trained([str(file)])
    assert changed["learning_rate"] == 2e-4 and changed["max_steps"] == 7 and changed["check_images"] is False
    assert changed["tasks"] == RECIPES["miniature_pretrain"].fields["tasks"]
    assert parse("train", [str(file)]).recipe == "miniature_pretrain"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "mine.yaml: unknown field learning_rat: did you mean learning_rate"),
        ("- 1\n", "mine.yaml holds no fields"),
        ("a: [\n", "mine.yaml is no YAML"),
        ("recipe: lora2\n", "there is no recipe 'lora2': did you mean lora"),
        ("!!python/object/apply:os.getcwd []\n", "mine.yaml is no YAML"),
        ("max_steps: ten\n", "max_steps is 'ten': give a whole number"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit, match=message) as stopped:
        as_trained([str(file)])
    assert "\n" not in str(stopped.value)


def test_no_file_and_a_file_with_a_recipe(tmp_path):
    with pytest.raises(SystemExit, match=r"no file .*x\.yaml: `ola-vlm recipes NAME > .*x\.yaml` begins one"):
        parse("train", [str(tmp_path / "x.yaml")])
    with pytest.raises(SystemExit, match="give one of them"):
        parse("train", ["x.yaml", "--recipe", "lora"])


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_make_valid_arguments(name, tmp_path):
    values = RECIPES[name]()
    changes = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    changes |= {"checkpoint": "a folder"} if name in ADAPTERS else {}
    args = OlaVlmArguments(**(values | changes))
    assert args.stage in values["output_dir"] and args.weight_decay == 0


def test_miniature_methods_differ_in_what_they_should_only():
    llava, ola, words = (miniature.pretrain(method) for method in miniature.METHODS)
    shuffled = miniature.pretrain(miniature.CONTROL)
    pairs = [(ola, llava, {"tasks"}), (ola, shuffled, {"shuffle_targets"}), (llava, words, {"tasks", "teachers"})]
    for one, other, fields in pairs:
        assert {field for field in one if one[field] != other[field]} == {*fields, "output_dir"}
    assert shuffled["shuffle_targets"] and not ola["shuffle_targets"] and llava["tasks"] == []
    for name, fusion in FUSIONS.items():
        baseline = miniature.pretrain(name)
        assert {field for field in llava if llava[field] != baseline[field]} == {"fusion", "output_dir"}
        assert baseline["fusion"] == fusion and llava["fusion"] is None
    with pytest.raises(ValueError, match="'lava'"):
        miniature.finetune("lava")


def test_attached_predictors_have_commercial_teachers():
    """docs/your_own_vlm.md says so of all of them."""
    names = [name for name in RECIPES if name.startswith("attach_")]
    assert len(names) == 15
    for name in names:
        for entry in entries_of(RECIPES[name]()["teachers"]).values():
            assert "NC" not in entry["license"], name


def test_every_preset_says_its_license_and_one_may_be_used_commercially():
    licenses = {name: preset["license"] for name, preset in WEIGHTS.items()}
    page = (Path(__file__).parents[1] / "docs" / "targets.md").read_text()
    for name, preset in WEIGHTS.items():
        assert preset["encoder"] in ENCODERS
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        assert preset["path"] in line and licenses[name] in line
    assert {name for name, license in licenses.items() if "NC" in license} == {"depth_base", "depth_large"}
    for method, fields in METHODS.items():
        tasks, teachers = fields["tasks"], fields["teachers"]
        if method in FUSIONS:  # in the paper's order, too
            assert tasks == [] and list(teachers) == [task["name"] for task in METHODS["ola_vlm"]["tasks"]]
            continue
        assert [task["name"] for task in tasks] == list(teachers)
        commercial = not any("NC" in teacher["license"] for teacher in teachers.values())
        assert commercial == (method != "ola_vlm")
        recorded = {name: teacher["path"] for name, teacher in teachers.items()}
        for task in tasks:
            (line,) = [line for line in page.splitlines() if f"`{recorded[task['name']]}`" in line]
            assert line.split("|")[4].strip() == str(task["target_dim"])


# At their real sizes


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def convnext_config() -> TimmWrapperConfig:
    seen = {"input_size": [3, 768, 768], "mean": [0.5] * 3, "std": [0.5] * 3}
    return TimmWrapperConfig(architecture="convnext_xxlarge", do_pooling=False, pretrained_cfg=seen)


# Name in the recipes -> class, configuration as published. Tokens of the tokenizers.
REAL_PARTS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        Phi3ForCausalLM,
        Phi3Config(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=32,
            num_attention_heads=32,
            vocab_size=32064,
            pad_token_id=32000,
        ),
    ),
    "openai/clip-vit-large-patch14-336": (
        CLIPVisionModel,
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
    ),
    "weights/clip_convnext_xxl": (TimmWrapperModel, convnext_config()),
}
NUM_TOKENS = {"meta-llama/Meta-Llama-3-8B-Instruct": 128256, "microsoft/Phi-3-mini-4k-instruct": 32011}
# Millions of parameters, as published; a language model's without the rows that are new.
MILLIONS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8030.261,
    "microsoft/Phi-3-mini-4k-instruct": 3821.080,
    "openai/clip-vit-large-patch14-336": 303.507,
    "weights/clip_convnext_xxl": 843.4,
    "gen": 7.9,  # predictors of a layer, for Llama-3
    "depth": 58.8,
    "seg": 14.2,
}


def real_encoders(entries: dict, length: int) -> dict:
    """The paper's teachers without weights."""
    clip_h = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=1024,
    )
    dinov2 = Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=518,
        patch_size=14,
        out_indices=[5, 12, 18, 24],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    depth = DepthAnythingConfig(backbone_config=dinov2, neck_hidden_sizes=[256, 512, 1024, 1024])
    swin = SwinConfig(
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        image_size=384,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    grid = round(length**0.5)
    statistics = ([0.5] * 3, [0.5] * 3)
    return {
        "gen": ClipImageEncoder(on_meta(CLIPVisionModelWithProjection, clip_h), 1024, 224, 1, *statistics),
        "depth": DepthAnythingEncoder(on_meta(DepthAnythingForDepthEstimation, depth), grid, *statistics),
        "seg": OneFormerEncoder(
            on_meta(OneFormerForUniversalSegmentation, OneFormerConfig(backbone_config=swin)), 800, grid, *statistics
        ),
    }


def millions(parameters) -> float:
    return sum(parameter.numel() for parameter in parameters) / 1e6


def assemble_on_meta(model_class, config, weights: dict, new: tuple, dtype):
    """Without memory for a single weight; each has its place, and none is missing but the new ones."""
    model = on_meta(model_class, config).to(dtype)
    places = model.state_dict()
    for name, weight in weights.items():
        assert places[name].shape == weight.shape, name
    assert all(name.startswith(new) for name in places.keys() - weights.keys())
    return model


@pytest.fixture
def real_sizes(monkeypatch):
    """What `train.load_model` loads has the published sizes, and no weights."""

    @cache
    def tokenizer(name, **options):
        words = {f"word{i}": i for i in range(NUM_TOKENS[name])}
        backend = Tokenizer(models.WordLevel(words, unk_token="word0"))
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="word0", eos_token="word1")

    def load(model_class, path, **options):
        model = on_meta(*REAL_PARTS[path])
        model.name_or_path = path
        return model

    monkeypatch.setattr(parts, "load_whole", load)
    monkeypatch.setattr(parts, "load_vision_config", lambda path: REAL_PARTS[path][1])
    monkeypatch.setattr(parts, "has_preprocessing", lambda *tower: False)
    monkeypatch.setattr(parts, "loading_from", lambda path: nullcontext())
    monkeypatch.setattr(
        parts, "AutoConfig", SimpleNamespace(from_pretrained=lambda path, **options: REAL_PARTS[path][1])
    )
    monkeypatch.setattr(parts, "AutoTokenizer", SimpleNamespace(from_pretrained=tokenizer))
    monkeypatch.setattr(parts, "check_logits", lambda language_model: None)  # looks at values
    for module in (parts, build):
        monkeypatch.setattr(module, "assemble", assemble_on_meta)
    monkeypatch.setattr(train, "load_encoders", real_encoders)


TABLE_1 = [name for name, recipe in RECIPES.items() if recipe.table is paper.TABLE_1 and name.endswith("_pretrain")]


# The vocabularies are as large as the real ones: one model in the fast tests, all in the slow ones.
FAST = "phi3_vit_pretrain"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TABLE_1 if name != FAST]


@pytest.mark.parametrize("name", [FAST, *SLOW])
def test_the_papers_models_have_their_sizes(name, real_sizes, tmp_path):
    recipe = RECIPES[name]()
    # Towers are measured by a forward pass; the mixed precision needs a GPU.
    model, _ = load_model(OlaVlmArguments(**{**recipe, "output_dir": str(tmp_path), "bf16": False, "use_cpu": True}))
    assert all(parameter.is_meta for parameter in model.parameters())
    found = by_part(model)
    llm, tower = recipe["language_model"], recipe["vision_tower"]
    tokens = 1 + sum(task["num_task_tokens"] for task in model.config.tasks)
    rows = max(REAL_PARTS[llm][1].vocab_size, NUM_TOKENS[llm] + tokens)
    rows = -(-rows // 64) * 64
    assert model.config.text_config.vocab_size == len(model.lm_head.weight) == rows
    new = (rows - REAL_PARTS[llm][1].vocab_size) * model.config.text_config.hidden_size * 2 / 1e6
    assert millions(found.pop("language_model")) == pytest.approx(MILLIONS[llm] + new, abs=0.001)
    assert millions(found.pop("vision_tower")) == pytest.approx(MILLIONS[tower], abs=0.05)
    assert model.config.image_seq_length == 576
    if recipe.get("fusion"):
        assert found.keys() == {"encoders", "projector"}
        # CLIP-H, Dinov2-L and Swin-L.
        assert millions(found["encoders"]) == pytest.approx(632.1 + 304.4 + 195.2, abs=1.0)
    elif not model.config.tasks:
        assert found.keys() == {"projector"}
    elif "llama3" in name and "commercial" not in name:
        for task in model.config.tasks:
            for layer in task["layers"]:
                predictor = model.predictors[task["name"]][str(layer)]
                assert millions(predictor.parameters()) == pytest.approx(MILLIONS[task["name"]], abs=0.05)
