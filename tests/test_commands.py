"""The command line: light until the arguments are known to be right, mistakes in one line, nearly right names."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ola_vlm import __version__, cli
from ola_vlm.commands import fields, running
from ola_vlm.commands import study as study_command
from ola_vlm.commands.parsing import Parser, count, one_of
from ola_vlm.commands.table import COMMANDS, parse
from ola_vlm.recipes import miniature, show
from ola_vlm.recipes import study as study_recipe
from ola_vlm.recipes.arguments import FieldValues
from ola_vlm.targets.cache import STORAGE
from ola_vlm.training.arguments import DTYPES, OlaVlmArguments
from ola_vlm.training.fields import DTYPE_NAMES, STAGE_NAMES, STORAGE_NAMES
from ola_vlm.training.stages import STAGES

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "accelerate", "sklearn", "scipy", "matplotlib", "datasets", "huggingface_hub"}


def heavy_modules_after(*command_lines: list[str]) -> set[str]:
    """Of a new process that has been given these command lines, one after the other."""
    program = f"""
import contextlib, io, sys
from ola_vlm import cli
for argv in {list(command_lines)!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(argv)
print(*sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return HEAVY & set(run.stdout.split())


def test_help_and_the_list_of_recipes_import_nothing_heavy():
    asked = [["--help"], ["--version"], ["recipes"], ["recipes", "llama3_vit_tokens_4_pretrain"]]
    assert heavy_modules_after(*asked, *([name, "--help"] for name in COMMANDS)) == set()


def test_mistakes_import_nothing_heavy(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rat: 1")
    wrong = [
        ["trian"],
        ["train", "--recipe", "miniature_pretrian"],
        ["train", "--learning-rat", "1"],
        ["train", "--stage", "pretrian"],
        ["train", str(tmp_path / "run.yaml")],
        ["recipes", "lora2"],
        ["targets", "--shard", "3/2"],
        ["check-data", "--nonsense"],
        ["probe", "model", "--images", "x", "--out", "y", "--probe", "rigde"],
        ["chat", "x", "--temperature", "-1"],
        ["visualize"],
        ["miniature", "--seeds", "0"],
    ]
    assert heavy_modules_after(*wrong) == set()


def test_chat_imports_no_library_that_it_does_not_need():
    program = "import sys, ola_vlm.inference.chat; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    unneeded = {"sklearn", "matplotlib", "datasets", "pandas", "trl", "peft", "gradio", "ola_vlm.world.dataset"}
    assert not unneeded & set(run.stdout.split())


def test_every_command_is_declared_where_its_work_is():
    """Its arguments' module is named as it is, and its work's `main` takes what was parsed."""
    commands = Path(cli.__file__).parent / "commands"
    files = {path.stem for path in commands.glob("*.py")} - {"__init__", "parsing", "running", "table", "fields"}
    studies = {f"study_{name}" for name in study_command.STUDIES}
    assert files == {name.replace("-", "_") for name in COMMANDS} | studies
    for name, command in COMMANDS.items():
        source = Path(*command.work.split(".")[1:]).with_suffix(".py")
        assert f'@command("{name}")\ndef main(' in (commands.parent / source).read_text(), name


def test_options_are_known_as_transformers_knows_them():
    """The fields that are read off its source: names, how many words each takes, and --no_NAME."""
    expected = {}
    for action in FieldValues("train")._actions:
        for option in action.option_strings:
            if option.startswith("--") and option != "--help" and "-" not in option[2:]:
                expected[option[2:]] = None if option.startswith("--no_") else action.nargs
    found = {}
    for name, option in fields.all_options().items():
        found[name] = option.nargs
        if option.has_no:
            found[f"no_{name}"] = None
    del found["no_remove_unused_columns"]  # its default is ours: false
    assert found == expected
    own = {name for group in fields.GROUPS.values() for name in group.__dataclass_fields__}
    assert own <= set(OlaVlmArguments.__dataclass_fields__) and len(own) > 30


def test_choices_are_those_of_the_code():
    assert tuple(STAGES) == STAGE_NAMES and tuple(STORAGE) == STORAGE_NAMES
    assert {*DTYPES, "auto"} == set(DTYPE_NAMES)


def test_words_of_fields_reach_transformers_parser():
    argv = ["--bf16", "--max-steps=-1", "--no_check_images", "--include_for_metrics", "loss", "inputs"]
    args = parse("train", argv)
    made = FieldValues("train").parse_args_into_dataclasses([word for word in args.words if word != "--bf16"])[0]
    assert args.words.count("--bf16") == 1
    assert made.max_steps == -1 and made.check_images is False and made.include_for_metrics == ["loss", "inputs"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_train_epochs", "abc"], "num_train_epochs is 'abc': give a number"),
        (["--num_train_epochs", "nan"], "num_train_epochs is 'nan': give a number"),
        (["--max_steps", "1.5"], "max_steps is '1.5': give a whole number"),
        (["--bf16", "maybe"], "bf16 is 'maybe': give true or false"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0: give 1 or more"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0: give 1 or more"),
        (["--learning_rate=-1"], "learning_rate is -1: give 0 or more"),
        (["--max_bad_rows", "7"], "max_bad_rows is 7: give 1 or less"),
        (["--lr_scheduler_type", "cosin"], "lr_scheduler_type is 'cosin', which is unknown: did you mean cosine?"),
        (["--optim", "adamw_torhc"], "optim is 'adamw_torhc', which is unknown: did you mean adamw_torch?"),
        (["--eval_strategy", "sometimes"], "eval_strategy is 'sometimes', which is unknown: choose one of no, steps"),
        (["--train_sampling_strategy", "foo"], "train_sampling_strategy is 'foo', which is unknown: choose one of"),
        (["--lr_scheduler_kwargs", "foo"], "lr_scheduler_kwargs is 'foo', which is no JSON"),
        (["--accelerator_config", "no.json"], "accelerator_config: there is no file 'no.json'"),
        (["--tasks", "{"], "tasks is '{', which is no JSON"),
        (["--teachers", "5"], 'teachers is 5: write it as {"depth"'),
    ],
)
def test_values_of_fields_that_do_not_fit_are_named_at_once(argv, message):
    """Without torch and transformers, which take seconds."""
    with pytest.raises(SystemExit) as stopped:
        parse("train", argv)
    assert str(stopped.value).startswith(f"ola-vlm train: {message}") and "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_steps: 1.5", "max_steps is 1.5: give a whole number"),
        ("learning_rate: [1]", "learning_rate is a list, [1]: give one value"),
        ("learning_rate: null", "learning_rate is null: give a value, or leave it out"),
        ("seed: true", "seed is True: give a whole number"),
        ("data: {a: 1}", "data is {'a': 1}: give a text"),
        ("model_overrides: [1]", "model_overrides is [1]: write it as"),
    ],
)
def test_values_in_a_file_are_looked_at_too(line, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(line + "\n")
    with pytest.raises(SystemExit, match=r"ola-vlm train: .*run\.yaml: ") as stopped:
        parse("train", [str(file)])
    assert message in str(stopped.value)


def test_values_in_a_file_may_lack_quotes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "eval_data: 0.02\nlearning_rate: 1e-3\nresume_from_checkpoint: true\nreport_to: [none]\nbf16: no\n"
    )
    values = parse("train", [str(file)]).values
    expected = {"eval_data": "0.02", "learning_rate": 1e-3, "resume_from_checkpoint": "True", "report_to": ["none"]}
    assert values == {**expected, "bf16": False}


def test_hyphens_are_accepted(monkeypatch):
    hyphens = parse("convert", ["a", "b", "--vision-tower", "c-d"])
    assert hyphens == parse("convert", ["a", "b", "--vision_tower", "c-d"]) and hyphens.vision_tower == "c-d"
    called = []
    monkeypatch.setitem(sys.modules, COMMANDS["convert-tower"].work, Namespace(main=called.append))
    for name in ("convert-tower", "convert_tower"):
        cli.main([name, "a", "out", "--image-size=64"])
    assert called == [Namespace(checkpoint="a", out="out", image_size=64)] * 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chek-data"], "ola-vlm: unknown command 'chek-data': did you mean check-data"),
        (
            ["chat", "x", "--max-new-token", "3"],
            "chat: unknown option --max-new-token: did you mean --max_new_tokens",
        ),
        (["score", "a", "b"], "ola-vlm score: nothing takes b: `ola-vlm score --help` lists all"),
        (["miniature", "--seeds", "0"], "'0': give a whole number of at least 1"),
        (["miniature", "--methods", "lava"], "no method 'lava': did you mean llava"),
        (["study", "ablations", "--tables", "term"], "no table 'term': did you mean terms"),
        (["visualize", "c", "i", "--compare_probes", "a"], "1 --compare_probes for 0 --compare: give one for each"),
        (["train", "--learning_rate"], "--learning_rate: expected one argument"),
        (["eval", "c"], "required: --benchmark, --out"),
        # Recipes are listed by a command of their own, and not by --help.
        (
            ["train", "--recipe", "miniature_pretrian"],
            "ola-vlm train: there is no recipe 'miniature_pretrian': did you mean miniature_pretrain? "
            "`ola-vlm recipes` lists all",
        ),
        (["train", "--recipe", "nonsense"], "no recipe 'nonsense': `ola-vlm recipes` lists all"),
        (
            ["recipes", "mini"],
            "no recipe 'mini': did you mean miniature_pretrain or miniature_finetune? `ola-vlm recipes` lists all",
        ),
        (["recipes", "nonsense"], "no recipe 'nonsense': `ola-vlm recipes` lists all"),
    ],
)
def test_a_mistake_is_one_line_with_what_was_nearly_meant(argv, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert message in stopped.value.code and "\n" not in stopped.value.code
    assert "recipes` lists all" not in message or stopped.value.code.endswith(message)


def test_errors_of_a_command_are_named_alike(monkeypatch):
    """From its own module, and from the import of it."""

    def fail(args):
        raise ValueError("two\nlines")

    monkeypatch.setitem(sys.modules, COMMANDS["score"].work, Namespace(main=fail))
    with pytest.raises(SystemExit, match="ola-vlm score: two lines") as stopped:
        cli.main(["score", "x"])
    assert isinstance(stopped.value.__cause__, ValueError)
    with pytest.raises(SystemExit, match="ola-vlm score: two lines"):
        running.command("score")(fail)(["x"])
    with pytest.raises(KeyError):  # a fault
        running.command("score")(lambda args: {}["x"])(["x"])


def test_version_and_usage(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"ola-vlm {__version__}\n"
    cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert 'in the terminal: CHECKPOINT [IMAGE ["question"]]' in out


@pytest.mark.parametrize("argv", [["recipes"], ["recipes", "miniature_pretrain"], ["--help"], ["chat", "--help"]])
def test_output_that_nobody_reads_ends_a_command_quietly(argv):
    """As by `ola-vlm recipes | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-m", "ola_vlm.cli", *argv], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert run.stderr == b"" and run.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("miniature_pretrain", "# Start this file, changed:   ola-vlm train FILE.yaml --any_field value"),
        ("llama3_vit_pretrain", "train FILE.yaml --any_field value"),
    ],
)
def test_a_recipe_as_a_file_says_how_it_is_started(recipe, line):
    text = show.as_file(recipe)
    (start,) = [one for one in text.splitlines() if "FILE.yaml" in one]
    assert line.removeprefix("train ") in start and "--recipe" not in start
    # The paper's runs keep their launcher.
    assert ("accelerate" in start or "torchrun" in start) == recipe.startswith("llama3")


def test_help_of_train_has_the_projects_own_fields(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    places = [out.index(f"fields: {group}") for group in ("run", "model", "data", "teachers", "adapters")]
    assert places == sorted(places) and out.count("    ola-vlm ") == 3 and out.index("    ola-vlm ") < places[0]
    assert "--lora_rank" in out and "--adam_beta1" not in out
    with pytest.raises(SystemExit):
        cli.main(["train", "--help_all"])
    assert "--adam_beta1" in capsys.readouterr().out


def test_where_the_results_are_goes_to_stderr(capsys, monkeypatch):
    running.tell("Results: here", "Next: \x1b[2J")
    said = capsys.readouterr()
    assert said.out == "" and said.err == "Results: here\nNext: \\x1b[2J\n"
    monkeypatch.setenv("RANK", "1")
    running.tell("Results: here")
    assert capsys.readouterr().err == ""


def test_parts_of_a_parser():
    parser = Parser("score", "Text.")
    parser.add_argument("--some_number", type=count)
    parser.add_argument("--kind", type=one_of(["one", "two"], "kind"))
    assert parser.parse_args(["--some-number", "3"]).some_number == 3
    with pytest.raises(SystemExit, match="no kind 'xyz': choose one of one, two"):
        parser.parse_args(["--kind", "xyz"])
    with pytest.raises(SystemExit, match="unknown option --some"):  # nothing is abbreviated
        parser.parse_args(["--some", "3"])


def test_a_flag_takes_no_model_for_its_value():
    from ola_vlm.commands import probe

    given = ["--images", "x", "--out", "y"]
    for words in (["--trust_remote_code", "model", *given], ["model", *given, "--trust_remote_code"]):
        parsed = probe.parser().parse_args(words)
        assert parsed.models == ["model"] and "--trust_remote_code=true" in parsed.words
    assert not any("trust" in word for word in probe.parser().parse_args(["model", *given]).words)


def test_a_commands_log_has_no_line_that_looks_like_a_fault():
    """bitsandbytes, which training imports, misses a kernel at every start."""
    start = "from ola_vlm.files.escapes import log_to_terminal\nlog_to_terminal()\nimport bitsandbytes"
    process = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and "Failed to load" not in process.stderr


@pytest.mark.parametrize(
    ("line", "start", "processes", "expected"),
    [
        ("miniature --seeds 2", "ola-vlm", 1, "ola-vlm miniature --seeds 2 --resume"),
        ("miniature --resume", "ola-vlm", 1, "ola-vlm miniature --resume"),
        ("study objectives", "ola-vlm", 1, "ola-vlm study objectives"),
        ("targets --recipe x", "ola-vlm", 1, "ola-vlm targets --recipe x"),
        ("probe x --out y", "ola-vlm", 1, "ola-vlm probe x --out y"),
        ("eval x", "ola-vlm", 2, "torchrun --nproc_per_node 2 -m ola_vlm.cli eval x"),
        ("target-tasks x", "ola-vlm", 1, "ola-vlm target-tasks x"),
        ("target_tasks x", "ola-vlm", 1, "ola-vlm target_tasks x"),
        ("train --resume-from-checkpoint x", "ola-vlm", 1, "ola-vlm train --resume-from-checkpoint x"),
        ("push x me/x", "ola-vlm", 1, None),
    ],
)
def test_how_each_command_goes_on(line, start, processes, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    words = line.split()
    said = running.how_to_go_on(words[0], words, start)
    assert said == ("interrupted" if expected is None else f"interrupted; go on by {expected}")


def test_how_a_script_goes_on(monkeypatch):
    """`python train.py` has no command's name among its words; torchrun's line needs it."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    said = running.how_to_go_on("train", ["--recipe", "x"], "python train.py")
    assert said == "interrupted; go on by python train.py --recipe x --resume_from_checkpoint true"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = running.how_to_go_on("train", ["--recipe", "x"], "python train.py")
    line = "torchrun --nproc_per_node 2 -m ola_vlm.cli train --recipe x --resume_from_checkpoint true"
    assert said == f"interrupted; go on by {line}"


def options_of(name: str) -> list:
    """A command's options, a study's own ones with it."""
    module = importlib.import_module(f"ola_vlm.commands.{name.replace('-', '_')}")
    return module.parser()._actions


@pytest.mark.parametrize("name", [*COMMANDS, "study_ablations", "study_objectives"])
def test_defaults_are_those_that_the_help_names(name):
    """ "(16)" or "default: runs/miniature" at the end."""
    for action in options_of(name):
        said = re.search(r"\((\d[\d.]*)\)$|default: ([\w./]+)$", action.help or "")
        if said and action.option_strings and not isinstance(action.default, list):
            shown = str(action.default).replace(str(ROOT) + "/", "")
            assert shown in (said[1] or said[2], f"{said[1]}.0"), action.option_strings


def test_paper_and_protocol_decide_defaults():
    """A resampler's two epochs, in steps of 256 images; the study's arms without those that were added on request."""
    probing = parse("probe", ["model", "--images", "x", "--out", "y"])
    assert (probing.probe, probing.epochs, probing.step_images) == ("ridge", 2, 256)
    objectives = parse("study", ["objectives"])
    assert (objectives.study, objectives.stage) == ("objectives", "confirm")
    assert objectives.arms == list(study_recipe.DEFAULT_ARMS) and "words_ola_vlm_shuffled" not in objectives.arms
    assert parse("miniature", []).methods == list(miniature.METHODS)
    assert parse("targets", []).shard == slice(0, None, 1)


@pytest.mark.parametrize(
    ("option", "allowed", "refused"),
    [
        ("--temperature", ["0", "0.7", "2"], ["-0.1", "nan", "inf", "hot"]),
        ("--top_p", ["0.01", "1"], ["0", "-1", "1.1", "nan"]),
        ("--max_new_tokens", ["1", "300"], ["0", "-1", "1.5"]),
    ],
)
def test_how_a_chat_may_sample(option, allowed, refused):
    for word in allowed:
        assert getattr(parse("chat", ["x", f"{option}={word}"]), option[2:]) == json.loads(word)
    for word in refused:
        with pytest.raises(SystemExit, match=option[2:]):
            parse("chat", ["x", f"{option}={word}"])


def test_truths_in_a_file_are_read_as_transformers_reads_them(tmp_path):
    for written, value in {"1": True, "yes": True, "'t'": True, "true": True, "0": False, "'n'": False}.items():
        (tmp_path / "run.yaml").write_text(f"bf16: {written}\n")
        assert parse("train", [str(tmp_path / "run.yaml")]).values == {"bf16": value}, written
