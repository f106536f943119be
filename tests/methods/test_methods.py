"""Every method through a whole run: it learns, resumes exactly, is saved, loaded, scored; and is refused where it cannot work."""

import ast
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

import qdense
from qdense.benchmarks.evaluate import EvaluationRequest, evaluate
from qdense.benchmarks.tasks import TASKS
from qdense.cli import main
from qdense.errors import EvaluationError, QDenseError, RecipeError
from qdense.events import CheckpointSaved, Notice, StepDone
from qdense.inference.generation import DECODINGS
from qdense.methods import METHODS, PEFT_TYPES, Method, method_of, sizes_in
from qdense.methods.adalora import final_ranks
from qdense.methods.costs import Costs, ModuleCosts, WeightCosts
from qdense.modeling import merge as merge_module
from qdense.modeling.adapter_files import load_adapter, read_card
from qdense.modeling.attach import adapter_tensors, attach_adapter, trainable_parameters
from qdense.modeling.load import load_base
from qdense.recipe import AdapterRecipe, ModelRecipe
from qdense.training import run as run_module
from qdense.training.metrics import read_metrics
from tests.helpers.methods import TRAINED, bases_of, method_recipe
from tests.helpers.runs import recipe_for, run

IDS = torch.arange(40).reshape(2, 20)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def trained_model(monkeypatch):
    """The model that a run trained, as it was when the run ended."""
    kept = []
    save = run_module.save_adapter
    monkeypatch.setattr(run_module, "save_adapter", lambda model, *rest: (kept.append(model), save(model, *rest)))
    return kept


@pytest.mark.parametrize(
    ("method", "quantization"), [(method, base) for method in TRAINED for base in bases_of(method)]
)
def test_trained_saved_and_loaded_it_gives_the_same_logits(tiny_model, tmp_path, method, quantization, trained_model):
    recipe = method_recipe(tiny_model, tmp_path / "run", method, quantization)
    start = logits_of(load_base(recipe.model).model)
    events = run(recipe)
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert all(math.isfinite(loss) for loss in losses)
    wanted = logits_of(trained_model[0])
    assert not torch.equal(wanted, start)  # it has learnt something
    loaded = load_adapter(
        load_base(recipe.model), tmp_path / "run" / "adapter", read_card(tmp_path / "run" / "adapter")
    )
    assert torch.equal(logits_of(loaded), wanted)


@pytest.mark.parametrize("method", TRAINED)
def test_it_starts_as_the_base(tiny_model, method, tmp_path):
    recipe = method_recipe(tiny_model, tmp_path, method, bases_of(method)[0], adapter__dropout=0.0)
    base = load_base(recipe.model)
    wanted = logits_of(base.model)
    torch.manual_seed(0)
    assert torch.allclose(logits_of(attach_adapter(base, recipe.adapter, 10)), wanted, atol=1e-2)


@pytest.mark.parametrize("method", TRAINED)
def test_a_resumed_run_is_the_uninterrupted_one(tiny_model, tmp_path, method, monkeypatch):
    """Killed after step 4: for AdaLoRA, between two cuts."""
    own = {"adapter__adalora": {"cut_every": 1}, "training__keep": "last"}
    base = bases_of(method)[0]

    def recipe(name):
        return method_recipe(tiny_model, tmp_path / name, method, base, training__max_steps=8, **own)

    class KilledError(Exception):
        pass

    def killed(event):
        if isinstance(event, CheckpointSaved) and event.step == 4:
            raise KilledError

    run(recipe("whole"))
    with pytest.raises(KilledError):
        run_module.train(recipe("resumed"), resume=False, data_dir=None, emit=killed)
    run(recipe("resumed"), resume=True)
    for file in (tmp_path / "whole" / "adapter").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "resumed" / "adapter" / file.name).read_bytes(), file.name
    timeless = [
        [
            {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second", "memory_bytes")}
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "resumed")
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("method", ["adalora", "full", "lokr", "denselora-freeze", "hira", "randlora"])
def test_it_is_scored(tiny_model, tmp_path, method, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(method_recipe(tiny_model, tmp_path / "run", method, bases_of(method)[0], training__max_steps=3))
    request = EvaluationRequest(
        [TASKS["wordproblems"]],
        tmp_path / "run",
        {},
        with_base=False,
        decoding=DECODINGS["greedy"],
        limit=4,
        max_new_tokens=4,
    )
    assert evaluate(request, lambda event: None)["tasks"]["wordproblems"]["num_scored"] == 4
    if method == "full":
        with pytest.raises(EvaluationError, match=r"--with-base: .* is a whole model \(full\)"):
            evaluate(replace(request, with_base=True), lambda event: None)


# --- what a method must say about itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["costs", "quantizations", "peft_type", "size_keys", "reads_base_weights", "factors"])
def test_a_method_that_omits_a_field_is_refused(name):
    """Nothing is assumed to be as LoRA's."""
    stated = {field.name: getattr(METHODS["lora"], field.name) for field in fields(Method)}
    Method(**stated)
    del stated[name]
    with pytest.raises(TypeError, match=f"missing .*'{name}'"):
        Method(**stated)


@pytest.mark.parametrize("costs", [Costs, ModuleCosts, WeightCosts])
def test_costs_that_omit_a_field_are_refused(costs):
    optional = {"has_fused_kernels", "stops_before_last_product", "has_weight_penalty"}
    for field in fields(costs):
        stated = {other.name: 0 for other in fields(costs) if other is not field}
        if field.name not in optional:
            with pytest.raises(TypeError, match=f"missing .*'{field.name}'"):
                costs(**stated)


@pytest.mark.parametrize("package", ["planning", "modeling", "analysis", "comparison"])
def test_nothing_is_decided_by_a_method_s_name(package):
    """No text in their code is a method's name; but "none" is a quantization too."""
    files = list((Path(qdense.__file__).parent / package).rglob("*.py"))
    assert files
    for file in files:
        texts = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        assert not texts & (METHODS.keys() - {"none"}), file


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].is_adapter])
def test_what_peft_is_told_is_recognized(tiny_model, tmp_path, method):
    """By its configuration as it is saved, whatever a card says; and analysis has a name for each trained tensor."""
    recipe = method_recipe(tiny_model, tmp_path, method, "none")
    model = attach_adapter(load_base(recipe.model), recipe.adapter, 10)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert method_of(config) is METHODS[method]
    assert config["peft_type"] in PEFT_TYPES
    assert all(isinstance(config[key], int) for key in METHODS[method].size_keys)
    names = {name.removesuffix(".weight").removesuffix(".default") for name, _ in trainable_parameters(model)}
    assert {name.rpartition(".")[2] for name in names} <= METHODS[method].factors.keys()


def test_adapters_of_no_method_here_are_taken_with_care():
    assert method_of({"peft_type": "LOHA"}) is None
    assert "LOHA" in PEFT_TYPES
    assert "r" in sizes_in({"peft_type": "LOHA"})


@pytest.mark.parametrize(
    "method", [name for name in METHODS if "nf4" in METHODS[name].quantizations and name != "none"]
)
def test_scored_on_a_packed_base_it_says_what_it_said_in_training(tiny_model, tmp_path, method, monkeypatch):
    """Where memory is short, an evaluation leaves NF4 packed; a CPU with AVX512-BF16 then repacks what nobody reads."""
    recipe = method_recipe(tiny_model, tmp_path / "run", method, "nf4", training__learning_rate=0.05)
    run(recipe)
    folder = tmp_path / "run" / "adapter"
    wanted = logits_of(load_adapter(load_base(recipe.model), folder, read_card(folder)))
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    base = load_base(recipe.model, for_training=False)
    assert base.stored_as == "nf4"
    linear = base.model.model.layers[0].mlp.up_proj
    could_repack = linear.support_avx512bf16_for_cpu
    linear.support_avx512bf16_for_cpu = True  # on any CPU: the switch is inspected, not used
    loaded = load_adapter(base, folder, read_card(folder))
    reads_weights = method in ("dora", "hira")
    assert linear.support_avx512bf16_for_cpu is not reads_weights
    linear.support_avx512bf16_for_cpu &= could_repack
    found = logits_of(loaded)
    assert torch.equal(found, wanted) if reads_weights else (found - wanted).norm() < 0.05 * wanted.norm()


# --- one recipe for all -----------------------------------------------------------------------------------------------


def test_keys_that_a_method_does_not_read_are_noted(tiny_model, tmp_path):
    events = run(method_recipe(tiny_model, tmp_path / "run", "vera", "nf4", training__max_steps=1))
    (note,) = [event.text for event in events if isinstance(event, Notice) and "not read" in event.text]
    assert note == "not read by method vera: adapter.r"
    recipe = AdapterRecipe(method="lora", alpha=8.0, activation="silu", lokr={"decompose_both": True})
    assert recipe.unused == ["activation"]


def test_settings_of_a_method_are_checked_like_all_else(tiny_model, tmp_path):
    with pytest.raises(RecipeError) as caught:
        recipe_for(
            tiny_model,
            tmp_path,
            adapter__adalora={"initial_r": 0.5, "cut_evry": 2},
            adapter__lokr={"decompose_factor": 0},
            adapter__vera={"r": "many"},
        )
    text = str(caught.value)
    assert "adapter.adalora.initial_r = 0.5" in text
    assert "must be a number from 1 to 8" in text
    assert 'unknown key; did you mean "cut_every"' in text
    assert "adapter.lokr.decompose_factor = 0" in text
    assert "must be a whole number, 2 or more" in text
    assert 'adapter.vera.r = "many"' in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter__method": "full"}, r'model.quantization = "nf4" .*method full needs "none": weights of 4 or 8 bits'),
        ({"quantization": "int8", "adapter__method": "hira"}, r'method hira needs "nf4" or "none": PEFT\'s HiRA'),
        ({"quantization": "int8", "adapter__method": "dora"}, r'method dora needs "nf4" or "none": PEFT\'s DoRA'),
        (
            {"quantization": "int8", "adapter__method": "adalora"},
            r'method adalora needs "nf4" or "none": PEFT\'s AdaLoRA',
        ),
        ({"adapter__activation": "relu"}, r'needs adapter.zero_init = "none": ReLU has zero slope at 0'),
        ({"adapter__method": "densloRA"}, "unknown method"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tiny_model, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe_for(tiny_model, tmp_path, **changes)


def test_the_base_alone_is_not_trained(tiny_model, tmp_path):
    with pytest.raises(
        QDenseError, match=r'adapter.method = "none": trains nothing\. Score the base with `qdense evaluate'
    ):
        run(method_recipe(tiny_model, tmp_path / "run", "none", "none"))


def test_a_schedule_without_a_step_to_cut_in_is_refused(tiny_model, tmp_path):
    own = {"warmup_share": 0.6, "final_share": 0.6}
    with pytest.raises(QDenseError, match="AdaLoRA has no step in which to cut ranks"):
        run(method_recipe(tiny_model, tmp_path / "run", "adalora", "none", adapter__adalora=own))


# --- what single methods promise --------------------------------------------------------------------------------------


def test_adalora_ends_with_the_ranks_that_were_asked_for(tiny_model, tmp_path, trained_model):
    recipe = method_recipe(
        tiny_model, tmp_path / "run", "adalora", "nf4", adapter__adalora={"cut_every": 1}, training__max_steps=10
    )
    run(recipe)
    ranks = final_ranks(trained_model[0])
    assert sum(ranks) == 8 * len(ranks)  # from 12 each; the budget is of the average
    assert len(set(ranks)) > 1
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert sorted(sum(kept) for kept in config["rank_pattern"].values()) == sorted(ranks)
    saved = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sorted(len(t) for name, t in saved.items() if "lora_E" in name) == sorted(ranks)


def test_adalora_keeps_only_weights_of_settled_ranks_as_the_best(tiny_model, tmp_path, monkeypatch):
    events = run(method_recipe(tiny_model, tmp_path / "run", "adalora", "nf4", training__max_steps=10))
    best = [event.step for event in events if getattr(event, "is_best", False)]
    assert best
    assert min(best) >= 10 - int(0.3 * 10)


def test_adaloras_penalty_is_added_once_a_step_and_not_in_validation(tiny_model, tmp_path):
    """The same loss whatever the micro-batches; validation as for a model without the penalty."""
    losses = {}
    for name, size, weight in (("small", 1, 0.5), ("large", 4, 0.5), ("none", 4, 0.0)):
        own = {"orthogonality": weight}
        recipe = method_recipe(
            tiny_model, tmp_path / name, "adalora", "none", adapter__adalora=own, training__micro_batch_size=size,
            training__max_steps=2, adapter__dropout=0.0, training__warmup_steps=2,
        )  # fmt: skip
        lines = read_metrics_of(recipe)
        losses[name] = [line["loss"] for line in lines]
    assert losses["small"][0] == pytest.approx(losses["large"][0], rel=1e-3)
    assert losses["large"][0] > losses["none"][0] + 0.1
    assert losses["large"][-1] == pytest.approx(losses["none"][-1], rel=1e-2)  # validation


def read_metrics_of(recipe):
    run(recipe)
    return read_metrics(Path(recipe.output.dir) / "metrics.jsonl")


@pytest.mark.parametrize("zero_init", ["decoder", "m", "none"])
def test_freezing_trains_m_alone_and_needs_another_start(tiny_model, tmp_path, zero_init):
    recipe = method_recipe(tiny_model, tmp_path, "denselora-freeze", "none", adapter__zero_init=zero_init)
    model = attach_adapter(load_base(recipe.model), recipe.adapter, 1)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".denselora_m." in name for name in trainable)
    is_zero = [not parameter.any() for name, parameter in model.named_parameters() if name in trainable]
    assert set(is_zero) == {zero_init != "none"}
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.norm() > 0 for name, parameter in model.named_parameters() if name in trainable)
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


def test_nora_looks_at_training_rows_first(tiny_model, tmp_path):
    """The frozen pair of a calibrated run differs from the plain SVD's."""
    frozen = []
    for rows in (0, 4):
        own = {"calibration_rows": rows}
        run(method_recipe(tiny_model, tmp_path / str(rows), "nora", "nf4", adapter__nora=own, training__max_steps=1))
        saved = safetensors.torch.load_file(tmp_path / str(rows) / "adapter" / "adapter_model.safetensors")
        frozen.append(next(tensor for name, tensor in sorted(saved.items()) if "nora_outer_a" in name))
    assert frozen[0].shape == frozen[1].shape
    assert not torch.equal(*frozen)


def test_relu_learns_where_no_factor_starts_at_zero(tiny_model, tmp_path):
    recipe = method_recipe(
        tiny_model, tmp_path / "run", "denselora", "none", adapter__activation="relu", adapter__zero_init="none"
    )
    assert sum(isinstance(event, StepDone) for event in run(recipe)) == 6


@pytest.mark.parametrize(("sharing", "num_pairs"), [("kind", 5), ("shape", 4), ("none", 10)])
def test_what_is_shared(tiny_model, tmp_path, sharing, num_pairs):
    """q (64 to 64), k and v (64 to 32), up, down, of two layers."""
    recipe = method_recipe(tiny_model, tmp_path, "denselora", "none", adapter__sharing=sharing)
    model = attach_adapter(load_base(recipe.model), recipe.adapter, 1)
    assert sum(name.endswith(".encoder") for name, _ in model.named_parameters()) == num_pairs
    layers = model.base_model.model.model.layers
    pair = [layers[i].self_attn.k_proj.shared["default"] for i in (0, 1)] + [
        layers[0].self_attn.v_proj.shared["default"]
    ]
    assert (pair[0] is pair[1], pair[0] is pair[2]) == (sharing != "none", sharing == "shape")


# --- merging ----------------------------------------------------------------------------------------------------------


MERGEABLE = ["denselora-only-matrix", "lora", "dora", "adalora", "hira", "vera", "randlora", "lokr", "nora"]


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    for method in [*MERGEABLE, "denselora", "red", "full"]:
        base = METHODS[method].quantizations[0]
        changes = {"training__learning_rate": 0.05, "training__max_steps": 8}
        run(method_recipe(tiny_model, folder / method, method, base, adapter__dropout=0.0, **changes))
    return folder


@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_it_is_a_model_that_says_the_same(runs, tiny_model, tmp_path, method, capsys):
    from transformers import AutoModelForCausalLM

    assert main(["merge", str(runs / method), str(tmp_path / "merged"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    base = load_base(ModelRecipe(name=str(tiny_model), quantization="none", device="cpu"))
    card = read_card(runs / method / "adapter")
    beside = load_adapter(base, runs / method / "adapter", card)
    linears = {
        name.removeprefix("base_model.model."): layer
        for name, layer in beside.named_modules()
        if hasattr(layer, "base_layer")
    }
    for _, tensor in adapter_tensors(beside):
        tensor.data = tensor.data.float()
    before = {name: layer.get_base_layer().weight.data.float() for name, layer in linears.items()}
    for layer in linears.values():
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.float()
        layer.merge()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    lost = []
    for name, layer in linears.items():
        exact = layer.get_base_layer().weight.data
        found = merged.get_submodule(name).weight
        assert torch.equal(found, exact.bfloat16())  # rounded once
        lost.append(float((exact.bfloat16().float() - exact).norm() / (exact - before[name]).norm()))
    assert report["num_layers"] == len(linears) == 10
    assert report["lost_worst"] == pytest.approx(max(lost), rel=1e-3)
    assert 0 < report["lost_median"] < report["lost_worst"] < 1
    assert 0 <= report["divergence"] < 1e-3
    assert report["num_same"] > 0.9 * report["num_tokens"]
    config = json.loads((tmp_path / "merged" / "qdense-merge.json").read_text())
    assert config["adapter"] == str(runs / method / "adapter")


def test_merged_into_nf4_the_loss_is_reported(runs, tiny_model, tmp_path, capsys):
    command = ["merge", str(runs / "lora"), str(tmp_path / "nf4"), "--onto", "nf4", "--into-nf4-with-loss", "--json"]
    assert main(command) == 0
    packed = json.loads(capsys.readouterr().out)
    assert main([*command[:2], str(tmp_path / "bf16"), "--onto", "nf4", "--json"]) == 0
    rounded = json.loads(capsys.readouterr().out)
    assert packed["lost_median"] > 10 * rounded["lost_median"]
    assert packed["divergence"] > rounded["divergence"]
    again = load_base(ModelRecipe(name=str(tmp_path / "nf4"), device="cpu"))
    assert again.stored_as == "nf4"
    whole = load_base(ModelRecipe(name=str(tmp_path / "bf16"), quantization="none", device="cpu"))
    layer = "model.layers.0.mlp.up_proj"
    unpacked = load_base(ModelRecipe(name=str(tmp_path / "nf4"), device="cpu"), for_training=False)
    error = unpacked.model.get_submodule(layer).weight - whole.model.get_submodule(layer).weight
    assert 0 < error.abs().max() < 0.05


def test_merging_onto_a_base_that_is_stored_in_4_bits(runs, tmp_path, monkeypatch):
    """As on a GPU: a CPU's base has its NF4 values unpacked already."""
    assert main(["merge", str(runs / "lora"), str(tmp_path / "unpacked"), "--onto", "nf4", "--json"]) == 0
    monkeypatch.setattr(merge_module, "load_base", lambda recipe, *rest, for_training: load_base(recipe))
    assert main(["merge", str(runs / "lora"), str(tmp_path / "packed"), "--onto", "nf4", "--json"]) == 0
    files = [folder / "model.safetensors" for folder in (tmp_path / "unpacked", tmp_path / "packed")]
    unpacked, packed = map(safetensors.torch.load_file, files)
    assert unpacked.keys() == packed.keys()
    assert all(torch.equal(unpacked[name], packed[name]) for name in packed)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("denselora", "DenseLoRA with an activation is no matrix, so it cannot be merged; qdense export --fit ROWS"),
        ("red", "cannot be merged"),
        ("full", "is already a whole model"),
    ],
)
def test_what_cannot_be_merged(runs, tmp_path, capsys, method, message):
    assert main(["merge", str(runs / method), str(tmp_path / "merged")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_an_activation_is_refused_before_the_base_is_loaded(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "load_base", None)
    assert main(["merge", str(runs / "denselora"), str(tmp_path / "merged")]) == 2


def test_a_folder_in_use_is_not_written_into(runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file"):
        assert main(["merge", str(runs / "lora"), str(place)]) == 2
        assert "already exists and is not an empty folder" in capsys.readouterr().err
