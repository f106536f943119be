"""Adapters as LoRAs: exact where they are a matrix, fitted else; read by PEFT without qdense."""

import json
import subprocess
import sys

import pytest
import torch
from peft import convert_to_lora

from qdense.cli import main
from qdense.data.templates import template_named
from qdense.data.wordproblems import training_rows
from qdense.errors import AdapterError, DataError
from qdense.modeling.adapter_files import load_adapter, read_card
from qdense.modeling.export import export_lora
from qdense.modeling.load import load_base
from qdense.recipe import ModelRecipe
from tests.helpers.adapters import make_run

IDS = torch.arange(3, 60).reshape(1, -1)


def alpaca(row):
    return template_named("alpaca").evaluation_prompt(row) + row.output


def logits(tiny_model, folder, quantization="none", text=None):
    recipe = ModelRecipe(name=str(tiny_model), quantization=quantization, dtype="float32", device="cpu")
    base = load_base(recipe, for_training=False)
    model = base.model if folder is None else load_adapter(base, folder, read_card(folder))
    with torch.no_grad():
        return model(IDS if text is None else torch.tensor([base.tokenizer(text)["input_ids"]])).logits


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"instruction": row.instruction, "output": row.output} for row in training_rows()[:60]]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("method", ["denselora-only-matrix", "nora"])
def test_an_adapter_that_is_a_matrix_is_the_same_as_a_lora(tiny_model, tmp_path, method, quantization):
    run = make_run(tiny_model, tmp_path / "run", seed=1, method=method, std=0.1, quantization=quantization)
    report = export_lora(run, tmp_path / "lora")
    assert (report.is_exact, report.losses) == (True, {})
    assert report.lost_worst < 1e-6
    before = logits(tiny_model, None, quantization)
    ours, lora = logits(tiny_model, run / "adapter", quantization), logits(tiny_model, tmp_path / "lora", quantization)
    assert (ours - before).abs().max() > 0.01
    torch.testing.assert_close(lora, ours, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["denselora-only-matrix", "nora"])
def test_pefts_own_conversion_finds_the_same(tiny_model, tmp_path, method):
    run = make_run(tiny_model, tmp_path / "run", seed=1, method=method, std=0.1)
    report = export_lora(run, tmp_path / "lora")
    base = load_base(ModelRecipe(name=str(tiny_model), quantization="none", dtype="float32", device="cpu"))
    model = load_adapter(base, run / "adapter", read_card(run / "adapter"))
    _, tensors = convert_to_lora(model, report.rank)
    lora = load_adapter(
        load_base(ModelRecipe(name=str(tiny_model), quantization="none", dtype="float32", device="cpu")),
        tmp_path / "lora",
        read_card(tmp_path / "lora"),
    )
    ours = {
        name: module.get_delta_weight("default") for name, module in lora.named_modules() if hasattr(module, "lora_A")
    }
    for name, delta in ours.items():
        theirs = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(theirs, delta, atol=1e-5, rtol=1e-4)
    assert len(ours) == report.num_layers


def test_peft_loads_and_merges_it_without_qdense(tiny_model, tmp_path):
    run = make_run(tiny_model, tmp_path / "run", seed=1, method="denselora-only-matrix", std=0.1)
    export_lora(run, tmp_path / "lora")
    script = f"""
import sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "lora")!r}, dtype=torch.float32).merge_and_unload()
with torch.no_grad():
    torch.save(model(torch.arange(3, 60).reshape(1, -1)).logits, {str(tmp_path / "logits.pt")!r})
assert not any(name.startswith("qdense") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=300)
    expected = logits(tiny_model, run / "adapter")
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=5e-5, rtol=1e-4)


def test_a_lower_rank_keeps_what_matters_most(tiny_model, tmp_path):
    run = make_run(tiny_model, tmp_path / "run", seed=1, method="denselora-only-matrix", std=0.1)
    reports = [export_lora(run, tmp_path / f"lora{rank}", rank=rank) for rank in (1, 2, 4)]
    assert [report.rank for report in reports] == [1, 2, 4]
    assert reports[0].lost_median > reports[1].lost_median > reports[2].lost_median
    base = load_base(ModelRecipe(name=str(tiny_model), quantization="none", dtype="float32", device="cpu"))
    model = load_adapter(base, run / "adapter", read_card(run / "adapter"))
    deltas = {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "denselora_m")
    }
    values = torch.linalg.svdvals(deltas[reports[1].worst_layer].double()).square()
    assert reports[1].lost_worst == pytest.approx(float(1 - values[:2].sum() / values.sum()), abs=1e-5)


def test_a_fit_is_far_better_than_none_and_says_what_it_lost(tiny_model, tmp_path, rows):
    run = make_run(tiny_model, tmp_path / "run", seed=1, std=0.25)
    report = export_lora(run, tmp_path / "lora", fit=rows, max_length=200)
    assert (report.is_exact, report.num_held_out, report.rank) == (False, 12, 4)
    assert 0 < report.lost_median < 0.7
    assert len(set(report.losses.values())) == 3
    cut = export_lora(run, tmp_path / "cut", fit=rows, max_length=200, rank=1)
    assert cut.lost_median > report.lost_median
    # What is written does what was measured, on a row that was held out.
    held_out = training_rows()[:60:5]
    text = alpaca(held_out[0])
    ours, lora, before = (
        logits(tiny_model, folder, text=text) for folder in (run / "adapter", tmp_path / "lora", None)
    )
    assert (lora - ours).norm() < 0.8 * (before - ours).norm()


def test_a_fit_of_a_matrix_would_be_exact(tiny_model, tmp_path, rows, monkeypatch):
    from qdense.tuners.denselora.layer import DenseLoraLinear

    run = make_run(tiny_model, tmp_path / "run", seed=1, method="denselora-only-matrix", std=0.1)
    monkeypatch.setattr(DenseLoraLinear, "supports_lora_conversion", lambda self, name="default": False)
    report = export_lora(run, tmp_path / "lora", fit=rows, max_length=200)
    assert report.lost_worst < 1e-4
    assert report.losses["fitted"] == pytest.approx(report.losses["adapter"], abs=1e-4)


def test_what_cannot_be_exported_is_refused(tiny_model, tmp_path, rows, capsys):
    dense, lora, red, vera = (
        make_run(tiny_model, tmp_path / method, seed=0, method=method)
        for method in ("denselora", "lora", "red", "vera")
    )
    matrix = make_run(tiny_model, tmp_path / "matrix", seed=0, method="denselora-only-matrix")
    (tmp_path / "few.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    for run, settings, message in (
        (dense, {}, r"written as a matrix, because of the activation \(gelu\)"),
        (dense, {"fit": rows, "rank": 5}, "--rank 5: .* at most the adapter's rank, 4"),
        (dense, {"fit": tmp_path / "few.jsonl"}, "has 1 rows; a fit needs at least 10"),
        (dense, {"fit": tmp_path / "none.jsonl"}, "none.jsonl"),
        (lora, {}, "is a LoRA already"),
        (red, {}, "scales and shifts"),
        (vera, {}, "PEFT's own type VERA"),
        (matrix, {"fit": rows}, "--fit: .* is a matrix"),
        (matrix, {"rank": 5}, "--rank 5: the adapter has rank 4"),
    ):
        with pytest.raises((AdapterError, DataError), match=message):
            export_lora(run, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="not an empty folder"):
        export_lora(matrix, dense)
    assert main(["export", str(matrix), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_exact"]
    assert main(["export", str(dense), str(tmp_path / "fit"), "--fit", str(rows), "--max-length", "150"]) == 0
    assert "next tokens on 12 rows that the fit did not use: base model" in capsys.readouterr().out
