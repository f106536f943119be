"""What all commands share: one clear message and status 2 for every mistake, before anything heavy is imported."""

import errno
import subprocess
import sys

import pytest

from qdense.cli import COMMANDS, main
from tests.helpers import ROOT

DEMO = str(ROOT / "recipes" / "demo.toml")
HEAVY = {"torch", "transformers", "peft", "rich", "pydantic", "datasets", "numpy", "packaging", "openai", "matplotlib"}


def modules_after(arguments, status):
    """All modules that a separate process has imported after `qdense ARGUMENTS` ended with `status`, and its output."""
    script = (
        "import sys\nfrom qdense.cli import main\n"
        f"try: status = main({arguments!r})\nexcept SystemExit as stopped: status = stopped.code\n"
        "print(*sys.modules, file=sys.stderr)\nraise SystemExit(status)"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == status, outcome.stderr
    assert "Traceback" not in outcome.stderr
    return set(outcome.stderr.splitlines()[-1].split()), outcome.stdout


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_nothing_heavy(command):
    modules, printed = modules_after([*filter(None, [command]), "--help"], 0)
    assert "qdense.cli.train" in modules
    assert not HEAVY & modules
    assert f"usage: qdense {command or '[-h]'}" in printed
    if command is None:
        assert "qdense train demo" in printed
        assert all(f"\n    {name} " in printed for name in COMMANDS)


def test_a_typing_mistake_imports_nothing_heavy():
    modules, _ = modules_after(["evaluate", "gsm8k", "--limit", "0"], 2)
    assert not HEAVY & modules


def test_mistakes_in_a_recipe_import_no_model_library(tmp_path):
    (tmp_path / "r.toml").write_text('[model]\nname = "llama9"\n')
    modules, _ = modules_after(["train", str(tmp_path / "r.toml")], 2)
    assert "pydantic" in modules
    assert not {"torch", "transformers", "peft"} & modules


@pytest.mark.parametrize("command", [["-m", "qdense"], ["-c", "from qdense.cli import main; raise SystemExit(main())"]])
def test_as_a_module_and_as_a_script(command):
    outcome = subprocess.run(
        [sys.executable, *command, "params", "llama3-8b"], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "1,933,312" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.toml"], "no such file, and no built-in recipe"),
        (["train", "my-rowz.toml"], 'no such file; did you mean "my-rows.toml"? And no built-in recipe; known: '),
        (["train", "my-rows"], 'no such file; did you mean "my-rows.toml"? And no built-in recipe; known: '),
        (["train", "my-rowz.csv"], 'no such file; did you mean "my-rows.csv"?'),
        (["train", "."], ".: is a folder; name a recipe"),
        (["evaluate", "my-rowz.csv"], 'no such file; did you mean "my-rows.csv"?'),
        (["train", DEMO, "--set", "max_steps=8"], "did you mean --set training.max_steps=8?"),
        (["train", DEMO, "--set", "seed=8"], "did you mean --set data.seed=8 or --set training.seed=8?"),
        (["train", DEMO, "--set", "adapter.r=0"], "adapter.r = 0"),
        (["train", DEMO, "--fraction", "7"], "data.fraction = 7.0"),
        (["train", DEMO, "--set", "data.path=none.json", "--output", "OUT"], '"none.json": no such file'),
        (
            ["train", DEMO, "--set", "data.name=math10k", "--data-dir", "nowhere", "--output", "OUT"],
            "no such data folder",
        ),
        (["evaluate", "gsm9k"], 'did you mean "gsm8k"'),
        (["evaluate", "wordproblems"], "no finished run under runs/"),
        (["evaluate", "wordproblems", "--adapter", "nowhere"], "nowhere: no such run or adapter"),
        (["evaluate", "wordproblems", "--model", "llama9"], 'did you mean "llama'),
        (["evaluate", "wordproblems", "--model", "smollm2-135m", "--with-base"], "--with-base compares"),
        (["evaluate", "wordproblems", "--trained-on", "math10k"], "--trained-on: names the training set for --clean"),
        (["train", DEMO, "--output", "a\0b"], "a path contains a NUL character"),
        (["params", "gpt2"], "qdense does not know the sizes of this model"),
        (["params", "llama3-8b", "--method", "doro"], "unknown method"),
        (["params", "llama3-8b", "--r", "600"], "from 1 to 512"),
        (["params", "llama3-8b", "--target-modules", "XYZ"], "the letters are Q (q_proj)"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my-rows.toml", "my-rows.csv"):
        (tmp_path / name).touch()
    assert main([argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], 'did you mean "train"?'),
        (["evaluate", "gsm8k", "--decoding", "greddy"], 'did you mean "greedy"?'),
        (["plan", "demo", "--memroy", "24GiB"], "unrecognized arguments: --memroy 24GiB; did you mean --memory?"),
        (["plan", "demo", "--qqq"], "usage: qdense plan"),
        (["data", "show", "demo", "--jsn"], "usage: qdense data show"),
        (["train", "--max-steps", "8", "demo"], "values of a recipe are given as --set training.max_steps=8"),
        (["train", "demo", "--max-steps=8"], "values of a recipe are given as --set training.max_steps=8"),
        (["plan", "demo", "--seed"], "given as --set data.seed=VALUE or --set training.seed=VALUE"),
    ],
)
def test_misspelt_commands_and_options_are_guessed(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_without_a_gpu_says_what_it_is_for(capsys, monkeypatch):
    monkeypatch.setattr("qdense.cli.plan.has_gpu", lambda: False)
    assert main(["plan", "demo"]) == 0
    printed = capsys.readouterr()
    assert "no GPU here: planned for a 24 GiB card; name yours with --memory" in printed.err
    assert "tokens/s on any of these cards: RTX 3090, RTX 4090, H100, H200; each step has so little" in " ".join(
        printed.out.split()
    )
    assert main(["plan", "math10k", "--memory", "24GiB"]) == 0
    printed = capsys.readouterr()
    assert "no GPU" not in printed.err
    assert "tokens/s, predicted from shapes" in printed.out


@pytest.mark.parametrize("arguments", [["help"], ["help", "train"]])
def test_help_is_also_a_word(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert f"usage: qdense {arguments[-1] if len(arguments) > 1 else '[-h]'}" in capsys.readouterr().out


def test_without_a_command_all_are_shown(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "qdense train demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["evaluate", "gsm8k", "--limit", "0"], ["evaluate", "gsm8k", "--decoding", "x"]]
)
def test_usage_mistakes_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "with --resume"),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 2, "no space left on the disk while writing x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x: Permission denied"),
        (OutOfMemoryError("CUDA out of memory.\nmore"), 2, "out of GPU memory: CUDA out of memory.\nTraining has"),
    ],
)
def test_failures_of_the_machine_are_reported_plainly(error, status, message, capsys, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setattr("qdense.cli.params.run", fail)
    assert main(["params", "llama3-8b"]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("a bug"), OSError(errno.EIO, "I/O error")])
def test_bugs_keep_their_traceback(error, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setattr("qdense.cli.params.run", fail)
    with pytest.raises(type(error)) as caught:
        main(["params", "llama3-8b"])
    assert caught.value is error
