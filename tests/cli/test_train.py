"""`qdense train` as a user types it."""

from pathlib import Path

from qdense.cli import main
from qdense.runs import RunFolder, refuse_misspelt
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


def test_a_misspelt_run_is_not_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("typo-name", "seed-1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.toml").touch()
    assert main(["train", DEMO, "--output", "runs/typo-nme", "--resume"]) == 2
    assert (
        'error: runs/typo-nme: there is nothing to resume; did you mean "runs/typo-name"? Runs here: seed-1, typo-name. Omit'
        in capsys.readouterr().err
    )
    for new in ("runs/seed-2", "runs/other", "elsewhere/typo-nme"):
        assert refuse_misspelt(RunFolder(Path(new))) is None


def test_output_folders_may_have_any_name(tmp_path, monkeypatch, tiny_model, capsys):
    monkeypatch.chdir(tmp_path)
    changes = settings(model__name=tiny_model, training__max_steps=1, data__max_length=320)
    output = ["--output", "runs/größe 😀", "--quiet"]
    assert main(["train", DEMO, *changes, "--fraction", "0.02", *output]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["größe 😀"]
