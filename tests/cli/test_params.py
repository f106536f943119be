"""`qdense params` as a user types it."""

import json

from qdense.cli import main
from qdense.methods import METHODS
from tests.helpers import ROOT

DEMO = str(ROOT / "recipes" / "demo.toml")


def test_as_json(capsys):
    assert main(["params", "llama3-8b", "--r", "16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"method", "model", "r", "trainable_parameters", "base_parameters", "percent", "by_module"}
    assert (printed["trainable_parameters"], printed["r"], printed["method"]) == (925_696, 16, "denselora")
    assert sum(printed["by_module"].values()) == 925_696


def test_of_all_methods(capsys):
    assert main(["params", "llama3-8b", "--r", "32", "--method", "all", "--json"]) == 0
    counts = {count["method"]: count["trainable_parameters"] for count in json.loads(capsys.readouterr().out)}
    assert list(counts) == list(METHODS)
    assert (counts["denselora"], counts["lora"], counts["red"], counts["none"]) == (1_933_312, 56_623_104, 262_144, 0)
    assert main(["params", DEMO, "--method", "all"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)


def test_of_a_recipe_with_changes(capsys):
    assert main(["params", DEMO, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == 374_784
    assert main(["params", DEMO, "--method", "lora", "--r", "8", "--target-modules", "QKVOGUD", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["method"], printed["r"], len(printed["by_module"])) == ("lora", 8, 7)
    assert main(["params", "llama3-8b"]) == 0
    assert "1,933,312" in capsys.readouterr().out
