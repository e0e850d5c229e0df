"""The command line: light until the arguments are known to be right, mistakes in one line, nearly right names."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ola_vlm import __version__, cli
from ola_vlm.commands import fields, running
from ola_vlm.commands.parsing import Parser, count, one_of
from ola_vlm.commands.study import STUDIES
from ola_vlm.commands.table import COMMANDS, parse
from ola_vlm.recipes.arguments import FieldValues
from ola_vlm.targets.cache import STORAGE
from ola_vlm.training.arguments import DTYPES, OlaVlmArguments
from ola_vlm.training.fields import DTYPE_NAMES, STAGE_NAMES, STORAGE_NAMES
from ola_vlm.training.stages import STAGES

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
    studies = {f"study_{name}" for name in STUDIES}
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
    argv = ["--bf16", "--learning-rate=-1", "--no_check_images", "--include_for_metrics", "loss", "inputs"]
    args = parse("train", argv)
    made = FieldValues("train").parse_args_into_dataclasses([word for word in args.words if word != "--bf16"])[0]
    assert args.words.count("--bf16") == 1
    assert made.learning_rate == -1.0 and made.check_images is False and made.include_for_metrics == ["loss", "inputs"]


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
    ],
)
def test_a_mistake_is_one_line_with_what_was_nearly_meant(argv, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert message in stopped.value.code and "\n" not in stopped.value.code


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
