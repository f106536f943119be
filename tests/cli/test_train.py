"""`qdense train` as a user types it."""

from qdense.cli import main
from tests.helpers import ROOT

DEMO = str(ROOT / "recipes" / "demo.toml")


def settings(**values):
    return [option for key, value in values.items() for option in ("--set", f"{key.replace('__', '.')}={value}")]


def test_a_run_in_a_pipe(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = settings(model__name=tiny_model, training__max_steps=2, training__warmup_steps=1, data__max_length=320)
    assert main(["train", DEMO, *changes, "--fraction", "0.1", "--output", "runs/a"]) == 0
    printed = capsys.readouterr().out
    assert "step 2/2" in printed
    assert "adapter in runs/a/adapter" in printed
    assert main(["train", DEMO, "--output", "runs/a"]) == 2
    assert "--resume" in capsys.readouterr().err


def test_output_folders_may_have_any_name(tmp_path, monkeypatch, tiny_model, capsys):
    monkeypatch.chdir(tmp_path)
    changes = settings(model__name=tiny_model, training__max_steps=1, data__max_length=320)
    output = ["--output", "runs/größe 😀", "--quiet"]
    assert main(["train", DEMO, *changes, "--fraction", "0.02", *output]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["größe 😀"]
