"""The command line as a user types it: one clear message and status 2 for every mistake."""

import errno
import json
import subprocess
import sys

import pytest

from qdense import cli
from qdense.cli import main
from qdense.methods import METHODS
from tests.helpers import ROOT

DEMO = str(ROOT / "recipes" / "demo.toml")


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom qdense.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'rich', 'pydantic', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert "qdense train recipes/demo.toml" in outcome.stdout


def test_mistakes_in_the_recipe_import_nothing_heavy(tmp_path):
    (tmp_path / "r.toml").write_text('[model]\nname = "llama9"\n')
    script = (
        f"import sys\nfrom qdense.cli import main\nassert main(['train', {str(tmp_path / 'r.toml')!r}]) == 2\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_params_as_json(capsys):
    assert main(["params", "llama3-8b", "--r", "16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"method", "model", "r", "trainable_parameters", "base_parameters", "percent", "by_module"}
    assert (printed["trainable_parameters"], printed["r"], printed["method"]) == (925_696, 16, "denselora")
    assert sum(printed["by_module"].values()) == 925_696


def test_params_of_all_methods(capsys):
    assert main(["params", "llama3-8b", "--r", "32", "--method", "all", "--json"]) == 0
    counts = {count["method"]: count["trainable_parameters"] for count in json.loads(capsys.readouterr().out)}
    assert list(counts) == list(METHODS)
    assert (counts["denselora"], counts["lora"], counts["red"], counts["none"]) == (1_933_312, 56_623_104, 262_144, 0)
    assert main(["params", DEMO, "--method", "all"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)


def test_params_of_a_recipe_with_changes(capsys):
    assert main(["params", DEMO, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == 374_784
    assert main(["params", DEMO, "--method", "lora", "--r", "8", "--target-modules", "QKVOGUD", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["method"], printed["r"], len(printed["by_module"])) == ("lora", 8, 7)
    assert main(["params", "llama3-8b"]) == 0
    assert "1,933,312" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.toml"], "no such recipe"),
        (["train", DEMO, "--set", "adapter.r=0"], "adapter.r = 0"),
        (["train", DEMO, "--fraction", "7"], "data.fraction = 7.0"),
        (["train", DEMO, "--set", "data.path=none.json", "--output", "OUT"], "none.json: no such file"),
        (
            ["train", DEMO, "--set", "data.name=math10k", "--data-dir", "nowhere", "--output", "OUT"],
            "no such data folder",
        ),
        (["evaluate", "gsm9k"], 'did you mean "gsm8k"'),
        (["evaluate", "wordproblems"], "no finished run under runs/"),
        (["evaluate", "wordproblems", "--adapter", "nowhere"], "nowhere: no such run or adapter"),
        (["evaluate", "wordproblems", "--model", "llama9"], 'did you mean "llama'),
        (["evaluate", "wordproblems", "--model", "smollm2-135m", "--with-base"], "--with-base compares"),
        (["params", "gpt2"], "shapes of this model are not built in"),
        (["params", "llama3-8b", "--method", "doro"], "unknown method"),
        (["params", "llama3-8b", "--r", "600"], "from 1 to 512"),
        (["params", "llama3-8b", "--target-modules", "XYZ"], "letters are Q (q_proj)"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["evaluate", "gsm8k", "--limit", "0"], ["evaluate", "gsm8k", "--decoding", "x"]]
)
def test_usage_mistakes_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "with --resume"),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 2, "no space left on the disk while writing x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x: Permission denied"),
    ],
)
def test_the_world_failing_is_told_plainly(error, status, message, capsys, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_params", fail)
    assert main(["params", "llama3-8b"]) == status
    assert message in capsys.readouterr().err


def test_faults_of_ours_keep_their_traceback(monkeypatch):
    def fail(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_params", fail)
    with pytest.raises(ZeroDivisionError):
        main(["params", "llama3-8b"])


def test_output_folders_may_have_any_name(tmp_path, monkeypatch, tiny_model, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "train",
                DEMO,
                "--set",
                f"model.name={tiny_model}",
                "--set",
                "training.max_steps=1",
                "--fraction",
                "0.02",
                "--set",
                "data.max_length=320",
                "--output",
                "runs/größe 😀",
                "--quiet",
            ]
        )
        == 0
    )
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["größe 😀"]


def test_train_then_evaluate_as_typed(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "train",
                DEMO,
                "--set",
                f"model.name={tiny_model}",
                "--set",
                "training.max_steps=2",
                "--set",
                "training.warmup_steps=1",
                "--set",
                "data.max_length=320",
                "--fraction",
                "0.1",
                "--output",
                "runs/a",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "step 2/2" in printed
    assert "adapter in runs/a/adapter" in printed
    assert main(["train", DEMO, "--output", "runs/a"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (
        main(["evaluate", "wordproblems", "--decoding", "greedy", "--limit", "3", "--max-new-tokens", "4", "--json"])
        == 0
    )
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert 0 <= summary["tasks"]["wordproblems"]["paper"]["accuracy"] <= 1
    assert "scoring the newest finished run, runs/a" in printed.err
