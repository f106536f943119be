"""`qdense evaluate` as a user types it."""

import json
import os
import shutil
import sys

import pytest

from qdense.cli import main
from tests.helpers.runs import recipe_for, run

SHORT = ["--decoding", "greedy", "--limit", "3", "--max-new-tokens", "4", "--json"]


@pytest.fixture
def runs(tiny_model, tmp_path, monkeypatch):
    """Two finished runs below runs/, of which `newer` was finished last."""
    monkeypatch.chdir(tmp_path)
    run(recipe_for(tiny_model, "runs/older"))
    shutil.copytree("runs/older", "runs/newer")
    for age, name in enumerate(("newer", "older")):
        os.utime(f"runs/{name}/adapter/qdense.json", (2_000_000_000 - age, 2_000_000_000 - age))
    return tmp_path / "runs"


def test_without_names_the_newest_run_is_scored(runs, capsys):
    assert main(["evaluate", "wordproblems", *SHORT]) == 0
    printed = capsys.readouterr()
    assert "scoring the newest finished run, runs/newer" in printed.err
    summary = json.loads(printed.out)  # and nothing else is on stdout
    assert summary["tasks"]["wordproblems"]["num_scored"] == 3
    folder = runs / "newer" / "eval"
    assert [str(path) for path in folder.iterdir()] == [str(runs.parent / summary["folder"])]
    assert not (runs / "older" / "eval").exists()
    completions = (runs.parent / summary["folder"] / "wordproblems.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in completions) == [0, 1, 2]


@pytest.mark.parametrize("arguments", [["--endpoint", "http://localhost:9/v1", "--model", "m"]])
def test_a_missing_client_is_named_before_anything_is_loaded(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "openai", None)
    assert main(["evaluate", "wordproblems", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err == 'error: --endpoint needs openai, which is not installed: pip install "qdense[endpoint]"\n'
    assert printed.out == ""


def test_the_runs_columns_serve_rows_of_ones_own_and_benchmarks_do_not_need_its_recipe(runs, capsys):
    (runs.parent / "odd.jsonl").write_text('{"ask": "1 and 1?", "tell": "2"}\n')
    assert main(["evaluate", "odd.jsonl", *SHORT]) == 2
    assert "Its columns: ask, tell." in capsys.readouterr().err
    recipe = runs / "newer" / "recipe.toml"
    text = recipe.read_text().replace("[data]\n", '[data]\ncolumns = { instruction = "ask", output = "tell" }\n')
    recipe.write_text(text)
    for named in ([], ["--adapter", "runs/newer"]):
        assert main(["evaluate", "odd.jsonl", *named, *SHORT]) == 0
        assert json.loads(capsys.readouterr().out)["tasks"]["odd.jsonl"]["num_items"] == 1
    recipe.write_text(text + "\n[another_version]\nkey = 1\n")
    assert main(["evaluate", "wordproblems", *SHORT]) == 0
