"""`qdense analyze`: statistics by hand-computed cases, updates of every method's runs, pictures that can be opened."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qdense.analysis import analyze
from qdense.analysis.updates import RunUpdates, Slice, Update, common_side, load_updates, summarize
from qdense.cli import main
from qdense.errors import QDenseError
from qdense.modeling.load import load_base
from qdense.recipe import ModelRecipe
from tests.helpers.methods import TRAINED, bases_of, method_recipe
from tests.helpers.runs import run


def of(change, initial=None):
    initial = torch.zeros_like(change) if initial is None else initial
    return Slice(initial, initial + change)


def update(change, layer=0, module="q_proj", factor="M", initial=None):
    part = of(change, initial)
    return Update(layer, module, factor, part.initial, part.final)


# --- statistics of a slice ----------------------------------------------------------------------------------------------


def test_effective_rank():
    torch.manual_seed(0)
    assert of(torch.outer(torch.randn(8), torch.randn(8))).effective_rank == pytest.approx(1, abs=1e-5)
    assert of(3 * torch.eye(8)).effective_rank == pytest.approx(8)
    assert of(torch.zeros(8, 8)).effective_rank == 0
    values = torch.tensor([0.5, 0.25, 0.25])
    assert of(torch.diag(values)).effective_rank == pytest.approx(2**1.5)  # entropy of 1.5 bits
    assert math.isnan(of(torch.ones(8)).effective_rank)


def test_shares_near_zero_and_unmoved():
    change = torch.tensor([[1.0, -1.0], [0.01, 0.0]])  # RMS 0.707
    assert of(change).rms == pytest.approx(math.sqrt(2.0001 / 4))
    assert of(change).near_zero == 0.5
    assert of(change).unmoved == 0.25
    assert of(1e-9 * change).near_zero == 0.5  # whatever the scale
    assert of(torch.zeros(2, 2)).near_zero == 1


def test_relative_change():
    change = torch.tensor([[1.0, -2.0]])
    assert of(change, initial=torch.tensor([[3.0, 4.0]])).relative.tolist() == [
        [pytest.approx(1 / math.sqrt(12.5)), pytest.approx(2 / math.sqrt(12.5))]
    ]
    assert of(change).relative.tolist() == [[pytest.approx(1 / math.sqrt(2.5)), pytest.approx(2 / math.sqrt(2.5))]]


def test_slices_are_drawn_by_the_seed_from_rows_and_columns():
    whole = torch.arange(600.0).reshape(20, 30)
    part = update(whole).slice(5, seed=1).change
    assert part.shape == (5, 5)
    rows, columns = part[:, 0] // 30, part[0] % 30
    assert torch.equal(part, 30 * rows[:, None] + columns)  # whole rows and columns, in their order
    assert rows.tolist() == sorted(rows.tolist())
    assert torch.equal(update(whole).slice(5, seed=1).change, part)
    assert not torch.equal(update(whole).slice(5, seed=2).change, part)
    assert torch.equal(update(whole[:, :20]).slice(20, seed=1).change, whole[:, :20])  # all of it
    assert len(update(torch.arange(9.0)).slice(5, seed=1).change) == 5


def test_the_last_line_is_noise_for_scale():
    (noise,) = summarize([], side=32, seed=0)
    assert noise.near_zero == pytest.approx(math.erf(0.1 / math.sqrt(2)), abs=0.01)  # 8.0%
    assert 24 < noise.effective_rank < 27


def test_a_summary_is_the_median_over_tensors():
    changes = [torch.eye(4), torch.eye(4), torch.outer(torch.ones(4), torch.ones(4))]
    updates = [update(change, i) for i, change in enumerate([*changes, torch.ones(2, 8)])]  # the last is too small
    line, _ = summarize([RunUpdates("a", "lora", updates)], side=4, seed=0)
    assert (line.run, line.factor, line.num_tensors, line.num_elements, line.num_slices) == ("a", "M", 4, 64, 3)
    assert line.effective_rank == pytest.approx(4)
    assert line.unmoved == 0.75


def test_the_side_is_one_that_most_matrices_of_each_kind_have():
    def run_of(*sides):
        return RunUpdates("a", "lora", [update(torch.ones(side, 40)) for side in sides])

    assert common_side([run_of(32, 32, 32)]) == 32
    assert common_side([run_of(1, 2, 20, 32, 32)]) == 20  # AdaLoRA has cut some
    assert common_side([run_of(32), run_of(8)]) == 8
    assert common_side([RunUpdates("a", "red", [update(torch.ones(64))])]) == 64


# --- from real runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """A short run of each method, made when asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def finished(method):
        if method not in made:
            own = {"adapter__adalora": {"cut_every": 1}, "training__keep": "last"}
            recipe = method_recipe(
                tiny_model, folder / method, method, bases_of(method)[0], training__max_steps=6, **own
            )
            run(recipe)
            made[method] = folder / method
        return made[method]

    return finished


@pytest.mark.parametrize("method", TRAINED)
def test_updates_of_every_method(runs, method):
    found = load_updates(runs(method))
    assert found.method == method
    assert all(update.layer in (0, 1, None) for update in found.updates)
    assert {update.module for update in found.updates} <= {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert any(float(update.slice(4, 0).rms) > 0 for update in found.updates)
    factors = {
        "denselora": ["M", "encoder", "decoder"],
        "denselora-only-matrix": ["M", "encoder", "decoder"],
        "denselora-freeze": ["M"],
        "lora": ["A", "B"],
        "dora": ["A", "B", "magnitude"],
        "adalora": ["A", "B", "E"],
        "hira": ["A", "B"],
        "randlora": ["gamma", "lambda"],
        "full": ["W"],
    }
    if method in factors:
        assert sorted(found.factors()) == sorted(factors[method])


def test_updates_are_final_minus_initial(runs):
    initial = load_file(runs("lora") / "initial.safetensors")
    final = load_file(runs("lora") / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B"
    (found,) = [
        update for update in load_updates(runs("lora")).of("B") if (update.layer, update.module) == (1, "up_proj")
    ]
    wanted = final[f"{name}.weight"].float() - initial[f"{name}.default.weight"].float()
    assert torch.equal(found.final - found.initial, wanted)
    assert not found.initial.any()  # B starts at zero


def test_adalora_is_compared_rank_by_rank(runs):
    """Its saved A lacks the ranks that were cut: each of the others is measured from its own start."""
    cut = 0
    for update in load_updates(runs("adalora")).of("A"):
        assert update.initial.shape == update.final.shape
        if update.final.dim() == 2 and len(update.final):
            cut += 1
            # 6 steps move a rank little: it stays nearest to its own start
            distances = torch.cdist(update.final, update.initial)
            assert torch.equal(distances.argmin(1), torch.arange(len(update.final)))
    assert cut


def test_full_fine_tuning_is_measured_from_the_base(runs, tiny_model):
    base = load_base(ModelRecipe(name=str(tiny_model), quantization="none", device="cpu")).model
    trained = load_file(runs("full") / "adapter" / "model.safetensors")
    updates = load_updates(runs("full")).updates
    kinds = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert {(update.layer, update.module) for update in updates} == {
        (layer, kind) for layer in (0, 1) for kind in kinds
    }
    assert len(updates) == 2 * len(kinds)
    for update in updates:
        part = "mlp" if update.module in ("up_proj", "down_proj") else "self_attn"
        name = f"model.layers.{update.layer}.{part}.{update.module}.weight"
        assert torch.equal(update.initial, base.get_parameter(name).detach().float())
        assert torch.equal(update.final, trained[name].float())
        assert not torch.equal(update.initial, update.final)


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_writes_pictures_and_figures(runs, tmp_path, capsys):
    assert main(["analyze", str(runs("denselora")), str(runs("lora")), "--output", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "independent normal" in shown
    assert "denselora" in shown
    assert "lora" in shown
    for name in ("heatmaps.png", "layers.png", "histograms.png"):
        with Image.open(tmp_path / "a" / name) as image:
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(10**7)) > 20  # something is drawn
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert [(line["run"], line["factor"]) for line in summary["summaries"]] == [
        ("denselora", "M"), ("denselora", "decoder"), ("denselora", "encoder"), ("lora", "A"), ("lora", "B"),
        ("independent normal numbers", ""),
    ]  # fmt: skip


def test_json_is_alone_on_stdout_and_files_go_into_the_first_run(runs, capsys):
    assert main(["analyze", str(runs("lora")), "--json", "--side", "4", "--layers", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["side"] == 4
    assert (runs("lora") / "analysis" / "summary.json").is_file()


def test_an_adapter_s_folder_stands_for_its_run(runs):
    found = analyze([runs("lora") / "adapter"], None, layers=None, side=4, seed=0)
    assert found.folder == str(runs("lora") / "analysis")
    assert found.summaries[0].run == "lora"


def test_runs_that_trained_vectors_alone_have_a_table_and_no_pictures(runs, tmp_path):
    found = analyze([runs("red")], tmp_path, layers=None, side=None, seed=0)
    assert found.files == ["summary.json"]
    assert {line.effective_rank for line in found.summaries if line.factor} == {None}


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    found = analyze([runs("lora"), runs("lora")], tmp_path, layers=None, side=None, seed=0)
    assert found.summaries[0].run == str(runs("lora"))


def test_a_run_that_learnt_nothing_is_drawn_too(runs, tmp_path):
    folder = tmp_path / "same"
    shutil.copytree(runs("denselora-freeze"), folder)
    tensors = load_file(folder / "initial.safetensors")
    final = load_file(folder / "adapter" / "adapter_model.safetensors")
    same = {name: tensors.get(name.replace("denselora_m", "denselora_m.default"), end) for name, end in final.items()}
    save_file(same, folder / "adapter" / "adapter_model.safetensors")
    found = analyze([folder], tmp_path / "a", layers=None, side=None, seed=0)
    assert found.summaries[0].unmoved == 1


def test_mistakes_are_explained(runs, tmp_path, capsys):
    assert main(["analyze", str(tmp_path / "nothing")]) == 2
    assert "no such run" in capsys.readouterr().err
    assert main(["analyze", str(runs("lora") / "adapter" / "nothing")]) == 2
    capsys.readouterr()
    with pytest.raises(QDenseError, match=r"--layers 7: these runs have the layers 0 to 1"):
        analyze([runs("lora")], tmp_path, layers=[7], side=None, seed=0)
    with pytest.raises(QDenseError, match=r"--side 999: matrices of these runs have 8 rows"):
        analyze([runs("lora")], tmp_path, layers=None, side=999, seed=0)
    shutil.copytree(runs("lora") / "adapter", tmp_path / "alone" / "adapter")
    assert main(["analyze", str(tmp_path / "alone")]) == 2
    assert "has no initial.safetensors" in capsys.readouterr().err
    shutil.copytree(runs("lora"), tmp_path / "mixed")
    shutil.copy(runs("denselora") / "initial.safetensors", tmp_path / "mixed")
    assert main(["analyze", str(tmp_path / "mixed")]) == 2
    assert "belong to different runs" in capsys.readouterr().err
    (tmp_path / "mixed" / "initial.safetensors").write_bytes(b"half")
    assert main(["analyze", str(tmp_path / "mixed")]) == 2
    assert "cannot be read" in capsys.readouterr().err
