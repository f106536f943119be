"""Plans of training runs: what they predict and choose, what runs make of them, what a user sees."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
import torch

from qdense.catalogs.models import CATALOG
from qdense.cli import main
from qdense.events import Notice, TrainingDone, TrainingStarted
from qdense.methods import METHODS
from qdense.planning import machine as machine_module
from qdense.planning.generation import generation_bytes, sequences_that_fit
from qdense.planning.memory import NF4_BYTES, Kernels, StepLayout, memory_of
from qdense.planning.plan import Machine, longest_context, make_plan, needed_bytes
from qdense.planning.shapes import model_shape
from qdense.planning.speed import CARDS, flops_per_token, tokens_per_second
from qdense.recipe import ModelRecipe, load_recipe
from qdense.training import run as run_module
from tests.helpers import ROOT
from tests.helpers.recipes import recipe_of
from tests.helpers.runs import adapter_bytes, killed_run, recipe_for, run

MATH10K = str(ROOT / "recipes" / "math10k.toml")
LLAMA3 = CATALOG["llama3-8b"]
GIB = 2**30
ON_CUDA = Kernels(is_cuda=True, is_fused=True, has_liger=True)
UNSLOTH = {24: 78_475, 16: 40_724, 12: 21_848, 8: 2_972}  # tokens of context by GiB, published


def card(gib):
    return Machine.card_of(int(gib * GIB))


# --- facts about LLaMA-3-8B --------------------------------------------------------------------------------------------


def test_flops_of_a_token():
    """The published formula: 6 N_lin + 4 N_head + 9 s d L with all layers recomputed."""
    assert flops_per_token(LLAMA3, 2048, 32) == pytest.approx(46.4e9, rel=1e-3)
    assert flops_per_token(LLAMA3, 2048, 0) == pytest.approx(31.9e9, rel=1e-3)


def test_bytes_of_the_base_and_its_checkpoints():
    recipe = recipe_of(data__max_length=1024)
    breakdown = memory_of(recipe, LLAMA3, ON_CUDA, StepLayout(1, 32)).breakdown
    assert breakdown["weights"] / GIB == pytest.approx(3.35, abs=0.01)
    assert breakdown["embeddings_and_head"] / GIB == pytest.approx(1.96, abs=0.01)
    assert breakdown["checkpoints"] == 1024 * 256 * 1024  # 256 KiB a token
    offloaded = memory_of(recipe, LLAMA3, ON_CUDA, StepLayout(1, 32, offload=True)).breakdown
    assert offloaded["checkpoints"] == breakdown["checkpoints"] / 16  # two of 32
    linears = 32 * sum(a * b for a, b in LLAMA3.linear_shapes().values())
    assert linears * (NF4_BYTES + 2) == pytest.approx(17.6e9, rel=5e-3)  # what unpacking moves in a pass


def test_math10k_takes_less_than_8_gb_where_all_is_recomputed():
    memory = memory_of(load_recipe(MATH10K), LLAMA3, ON_CUDA, StepLayout(16, 32))
    assert 6e9 < memory.peak_bytes < 8e9


def test_what_a_run_needs_beside_its_tensors():
    """On a card 3% that the allocator cannot use, and 600 MiB of CUDA's context."""
    plan = make_plan(recipe_of(), LLAMA3, card(24), StepLayout(1, 32))
    assert plan.needed_bytes == int(1.03 * plan.predicted_peak_bytes) + 600 * 2**20
    assert plan.predicted_memory_bytes == int(1.03 * plan.predicted_peak_bytes)  # torch does not count the context
    exact = replace(plan, machine=card(plan.needed_bytes / GIB))
    assert exact.fits
    assert not replace(plan, machine=card((plan.needed_bytes - 1) / GIB)).fits


def test_host_memory_is_pinned_in_powers_of_two():
    """As torch's allocator of pinned memory rounds: a layer's 3000 x 8 KiB = 23.4 MiB take 32."""
    recipe = recipe_of(data__max_length=3000)
    assert make_plan(recipe, LLAMA3, card(24), StepLayout(1, 20, offload=True)).host_bytes == 20 * 32 * 2**20
    assert make_plan(recipe, LLAMA3, card(24), StepLayout(1, 20)).host_bytes == 0
    exact = recipe_of(data__max_length=4096)  # a power of two already
    assert make_plan(exact, LLAMA3, card(24), StepLayout(1, 20, offload=True)).host_bytes == 20 * 32 * 2**20
    wide = recipe_of(data__max_length=3000, model__dtype="float32")
    assert make_plan(wide, LLAMA3, card(80), StepLayout(2, 20, offload=True)).host_bytes == 20 * 128 * 2**20


@pytest.mark.parametrize("gib", UNSLOTH)
def test_longest_context_beats_the_published_one(gib):
    recipe = load_recipe(MATH10K)
    longest = longest_context(recipe, LLAMA3, card(gib))
    assert longest > UNSLOTH[gib]
    fitting, too_long = (
        make_plan(recipe_of(data__max_length=length), LLAMA3, card(gib)) for length in (longest, longest + 128)
    )
    assert fitting.fits
    assert fitting.layout.offload
    assert not too_long.fits


def test_predicted_speeds_stay_below_the_ceiling_and_near_what_others_reach():
    recipe = recipe_of(data__max_length=2048)
    for name, known in CARDS.items():
        speed = tokens_per_second(recipe, LLAMA3, ON_CUDA, StepLayout(8, 32), known)  # enough for any card's host
        assert 0.6 < speed * flops_per_token(LLAMA3, 2048, 32) / known.flops < 1, name
    # torchtune: 2,413 tokens/s on a 4090, 2 x 2048, everything recomputed
    assert tokens_per_second(recipe, LLAMA3, ON_CUDA, StepLayout(2, 32), CARDS["RTX 4090"]) == pytest.approx(
        2413, rel=0.15
    )


@pytest.mark.parametrize(
    ("max_length", "layout", "with_adapter", "without"),
    [(2048, StepLayout(1, 0), 0.39, 0.18), (256, StepLayout(4, 32), 0.63, 0.386)],
)
def test_seconds_of_a_pass_that_waits_for_the_host(max_length, layout, with_adapter, without):
    """Measured on an H200."""
    for method, measured in (("denselora", with_adapter), ("none", without)):
        recipe = recipe_of(data__max_length=max_length, adapter__method=method)
        speed = tokens_per_second(recipe, LLAMA3, ON_CUDA, layout, CARDS["H200"])
        assert layout.micro_batch_size * max_length / speed == pytest.approx(measured, rel=0.1)


def test_a_fast_card_is_given_fewer_and_larger_passes():
    """Measured on an H200 with 24 GiB: 4 x 2048 tokens, recomputed, train 1.9 times as fast as 1 x 2048."""
    recipe = recipe_of(data__max_length=2048)
    fast, slow = (
        make_plan(recipe, LLAMA3, Machine.card_of(24 * GIB, card=CARDS[name])).layout for name in ("H200", "RTX 4090")
    )
    assert fast.micro_batch_size >= 4
    assert slow.micro_batch_size <= 2  # its GPU is the slower part


def test_methods_are_not_taken_for_the_fused_one():
    """A matrix as large as the weight, made anew or met by every token, takes time; so do plain PyTorch's passes."""

    def speed(method, kernels=ON_CUDA):
        recipe = recipe_of(data__max_length=2048, adapter__method=method)
        return tokens_per_second(recipe, LLAMA3, kernels, StepLayout(4, 32), CARDS["RTX 4090"])

    plain = Kernels(is_cuda=True, is_fused=False, has_liger=True)
    assert speed("denselora") > speed("denselora", plain)
    assert speed("lora") == pytest.approx(
        speed("lora", plain), rel=0.03
    )  # it has no kernels of its own; only the loss has
    assert all(speed("lora") > 1.2 * speed(method) for method in ("dora", "hira", "lokr", "randlora"))


def test_what_costs_time_is_predicted_to_cost_time():
    def speed(layout, kernels=ON_CUDA, **changes):
        recipe = recipe_of(data__max_length=512, **changes)
        return tokens_per_second(recipe, LLAMA3, kernels, layout, CARDS["RTX 3090"])

    assert speed(StepLayout(4, 0)) > speed(StepLayout(4, 16)) > speed(StepLayout(4, 32))
    assert (
        speed(StepLayout(16, 32)) > speed(StepLayout(4, 32)) > speed(StepLayout(1, 32))
    )  # weights are unpacked once a pass
    assert speed(StepLayout(4, 32)) > speed(StepLayout(4, 32), Kernels(True, False, False))
    assert speed(StepLayout(32, 32)) > speed(StepLayout(32, 32, mlp_tile_tokens=4096))
    assert speed(StepLayout(4, 32), adapter__r=16) > speed(StepLayout(4, 32), adapter__r=256)


# --- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gib", [7, 8, 10, 12, 16, 24, 40, 80])
@pytest.mark.parametrize("max_length", [256, 2048])
def test_the_choice_fits_and_nothing_that_fits_is_faster(gib, max_length):
    recipe, machine = recipe_of(data__max_length=max_length), card(gib)
    plan = make_plan(recipe, LLAMA3, machine)
    if plan.needed_bytes > 0.95 * machine.memory_bytes:  # the reserve
        assert gib == 7
        assert plan.layout.offload
        return

    def speed(layout):
        return tokens_per_second(recipe, LLAMA3, ON_CUDA, layout, CARDS["RTX 4090"])

    for rows in range(1, 17):
        for layers in range(33):
            other = StepLayout(rows, layers)
            if needed_bytes(memory_of(recipe, LLAMA3, ON_CUDA, other), machine) <= 0.95 * machine.memory_bytes:
                assert speed(plan.layout) >= 0.999 * speed(other), other


def test_more_memory_is_never_slower_and_less_never_larger():
    recipe = recipe_of(data__max_length=1024)
    plans = [make_plan(recipe, LLAMA3, card(gib)) for gib in (8, 12, 16, 24, 48, 80)]
    speeds = [plan.speeds["RTX 4090"] for plan in plans]
    assert speeds == sorted(speeds)
    assert all(plan.fits for plan in plans)


def test_padded_rows_are_cut_into_passes_of_equal_size():
    """Nine of sixteen rows at a time would take two passes like eight, and more memory."""
    for gib in range(8, 40, 2):
        rows = make_plan(recipe_of(training__packing=False), LLAMA3, card(gib)).layout.micro_batch_size
        assert rows in (16, 8, 6, 4, 3, 2, 1)


def test_what_the_recipe_fixes_is_kept():
    fixed = recipe_of(training__micro_batch_size=3, training__recompute=7)
    assert make_plan(fixed, LLAMA3, card(80)).layout == StepLayout(3, 7)
    some = recipe_of(training__recompute="all")
    layout = make_plan(some, LLAMA3, card(80)).layout
    assert (layout.recompute_layers, layout.micro_batch_size) == (32, 16)
    rows = recipe_of(training__micro_batch_size=2)
    assert make_plan(rows, LLAMA3, card(24)).layout == StepLayout(2, 0)
    none = recipe_of(training__recompute="none", training__micro_batch_size=16, data__max_length=1024)
    plan = make_plan(none, LLAMA3, card(24))
    assert (plan.layout, plan.fits) == (StepLayout(16, 0), False)
    assert any('"auto"' in remedy and "would fit" in remedy for remedy in plan.remedies)


def test_measures_for_long_rows_are_taken_one_after_the_other():
    def layout(max_length):
        return make_plan(recipe_of(data__max_length=max_length), LLAMA3, card(24)).layout

    assert layout(2048).recompute_layers < 16
    assert 16 < layout(8192).recompute_layers < 32
    lengths = range(20_000, 170_000, 10_000)
    measures = [(layout(length).offload, layout(length).mlp_tile_tokens is not None) for length in lengths]
    assert measures == sorted(measures)
    assert measures[0] == (False, False)
    assert measures[-1] == (True, True)
    assert (True, False) in measures


def test_remedies_do_what_they_say():
    recipe = recipe_of(data__max_length=400_000)
    plan = make_plan(recipe, LLAMA3, card(24))
    assert not plan.fits
    (remedy,) = plan.remedies
    length = int(remedy.split(" = ")[1].split()[0])
    assert make_plan(recipe_of(data__max_length=length), LLAMA3, card(24)).fits
    (remedy,) = make_plan(recipe_of(), LLAMA3, card(4)).remedies
    assert "the model itself needs 5." in remedy
    remedies = make_plan(recipe_of(model__quantization="none"), LLAMA3, card(12)).remedies
    assert 'model.quantization = "nf4" would fit' in remedies


@pytest.mark.parametrize(
    ("method", "quantization"), [(name, base) for name, method in METHODS.items() for base in method.quantizations]
)
def test_every_method_has_a_plan(method, quantization):
    plan = make_plan(recipe_of(adapter__method=method, model__quantization=quantization), LLAMA3, card(80))
    assert plan.fits
    assert all(number >= 0 for number in plan.memory.breakdown.values())
    assert plan.predicted_peak_bytes == sum(plan.memory.breakdown.values())


# --- completions -------------------------------------------------------------------------------------------------------


def test_sequences_at_a_time():
    model = ModelRecipe(name="llama3-8b")

    def fitting(gib, **changes):
        options = {"new_tokens": 256, "is_cuda": True, "memory_bytes": int(gib * GIB), "most": 128} | changes
        return sequences_that_fit(model, LLAMA3, **options)

    assert fitting(80) == 128
    assert [fitting(gib) for gib in (24, 16, 12, 8)] == sorted((fitting(gib) for gib in (24, 16, 12, 8)), reverse=True)
    assert 16 <= fitting(24) < 128
    assert fitting(2) == 1
    assert fitting(24, new_tokens=4096) < fitting(24)
    number = fitting(24)
    needed = [
        sum(generation_bytes(model, LLAMA3, num_sequences=n, new_tokens=256, is_cuda=True).values())
        for n in (number, 2 * number)
    ]
    assert needed[0] <= 0.9 * 24 * GIB < needed[1]


# --- runs ----------------------------------------------------------------------------------------------------------------

AUTO = {"training__micro_batch_size": "auto", "training__recompute": "auto"}


def plan_of(folder):
    return tomllib.loads((folder / "recipe.toml").read_text())["provenance"]["plan"]


def test_a_run_keeps_to_its_plan_and_compares_it(tiny_model, tmp_path):
    events = run(recipe_for(tiny_model, tmp_path / "run", **AUTO))
    assert plan_of(tmp_path / "run")["layout"] == {"micro_batch_size": 4, "recompute_layers": 0, "offload": False}
    started = next(event for event in events if isinstance(event, TrainingStarted))
    assert "4 rows (1,280 tokens) at a time, no layer recomputed" in dict(started.facts)["plan"]
    done = events[-1]
    assert isinstance(done, TrainingDone)
    assert done.predicted_memory_bytes > plan_of(tmp_path / "run")["predicted_peak_bytes"]
    assert not [event for event in events if isinstance(event, Notice) and "predicted to need" in event.text]


def test_a_resumed_run_keeps_the_choice_on_a_machine_with_less_memory(tiny_model, tmp_path, monkeypatch):
    """Micro-batches decide the sums' rounding, so the layout must not follow the memory that happens to be free."""
    run(recipe_for(tiny_model, tmp_path / "whole", **AUTO))
    cut = recipe_for(tiny_model, tmp_path / "cut", **AUTO)
    killed_run(cut, step=3)
    before = plan_of(tmp_path / "cut")
    monkeypatch.setattr(
        run_module, "this_machine", lambda recipe, shape: Machine("a small one", Kernels(False, False, False), 1000, 0)
    )
    events = run(cut, resume=True)
    told = [event.text for event in events if isinstance(event, Notice) and event.level == "warning"]
    assert any("predicted to need" in text and "a small one" in text for text in told)
    assert plan_of(tmp_path / "cut")["layout"] == before["layout"]
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


def test_a_run_that_will_not_fit_is_reported_before_the_model_is_loaded(tiny_model, tmp_path, monkeypatch):
    small = Machine("a small card", Kernels(True, True, True), 2**20, 0)
    monkeypatch.setattr(run_module, "this_machine", lambda recipe, shape: small)

    def not_yet(*arguments, **options):
        raise InterruptedError

    monkeypatch.setattr(run_module, "load_base", not_yet)
    told = []
    with pytest.raises(InterruptedError):
        run_module.train(recipe_for(tiny_model, tmp_path / "run"), resume=False, data_dir=None, emit=told.append)
    (warning,) = [event.text for event in told if isinstance(event, Notice) and event.level == "warning"]
    assert "a small card has 0.0 GiB" in warning
    assert "qdense plan" in warning


def test_kernels_that_are_missing_on_cuda_are_named(monkeypatch):
    card = Machine("a card", Kernels(True, True, False), 24 * GIB, 0)

    def reasons(machine=card, **changes):
        return list(machine_module.slow_kernels(recipe_of(**changes), LLAMA3, machine))

    monkeypatch.setattr(machine_module, "why_no_liger", lambda model_type: f"no Liger for {model_type}")
    assert reasons() == ["no Liger for llama"]
    assert reasons(training__kernels="torch") == []
    assert reasons(Machine("here", Kernels(False, False, False), 24 * GIB, 0)) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (reason,) = reasons()
    assert "Triton is not installed" in reason


def test_layouts_that_a_run_can_be_given_all_train_alike(tiny_model, tmp_path):
    """Recomputation changes no bit; only the cut into micro-batches may, by rounding."""
    adapters = []
    for name, layers in (("none", 0), ("one", 1), ("all", 2)):
        run(recipe_for(tiny_model, tmp_path / name, training__recompute=layers, training__max_steps=2))
        adapters.append(adapter_bytes(tmp_path / name))
    assert adapters[0] == adapters[1] == adapters[2]


# --- the command -------------------------------------------------------------------------------------------------------


def test_json_of_the_command(capsys):
    assert main(["plan", MATH10K, "--memory", "24GiB", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"fits", "predicted_peak_bytes", "tokens_per_second", "breakdown", "layout"} <= set(printed)
    assert printed["fits"] is True
    assert printed["memory_bytes"] == 24 * GIB
    assert sum(printed["breakdown"].values()) == printed["predicted_peak_bytes"]
    assert set(printed["tokens_per_second"]) == set(CARDS)
    plan = make_plan(load_recipe(MATH10K), LLAMA3, card(24))
    assert StepLayout(**printed["layout"]) == plan.layout


def test_the_moment_of_the_peak_is_shown(capsys):
    """Few tokens, and matrices as large as a weight: the peak is in a module's own forward."""
    small = ["--set", "adapter.method=dora", "--set", "data.max_length=64", "--set", "training.batch_size=1"]
    assert main(["plan", MATH10K, "--memory", "40GiB", *small, "--set", "training.recompute=none"]) == 0
    assert "predicted peak, in forward" in capsys.readouterr().out


def test_what_does_not_fit_is_no_error(capsys):
    assert main(["plan", MATH10K, "--memory", "4GiB", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"] is False
    assert printed["remedies"]
    assert main(["plan", MATH10K, "--memory", "4GiB"]) == 0
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "the model itself needs" in " ".join(shown.split())


def test_table_of_the_command(capsys):
    assert main(["plan", MATH10K, "--memory", "24GiB", "--set", "data.max_length=100000"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("all layers recomputed", "checkpoints in host memory", "3.4 GiB", "fits: ", "RTX 4090", "pinned"):
        assert part in shown


def test_the_command_loads_no_torch():
    script = (
        f"import sys\nfrom qdense.cli import main\nassert main(['plan', {MATH10K!r}, '--memory', '24GiB']) == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_a_folder_s_own_shape(tiny_model, tmp_path, capsys):
    shape = model_shape(str(tiny_model))
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (2, 64, 258)
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[model]\nname = "{tiny_model}"\n[data]\nname = "wordproblems"\n')
    assert main(["plan", str(recipe), "--memory", "1GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MATH10K, "--memory", "plenty"], "24GiB"),
        ([MATH10K, "--memory=-3GiB"], "24GiB"),
        ([MATH10K, "--memory", "0GiB"], "24GiB"),
        (["nowhere.toml"], "no such file, and no built-in recipe"),
        ([MATH10K, "--set", "model.name=nobody/nothing", "--memory", "24GiB"], "nobody/nothing"),
        ([MATH10K, "--set", "training.recompute=some", "--memory", "24GiB"], 'training.recompute = "some"'),
        ([MATH10K, "--set", "training.micro_batch_size=0", "--memory", "24GiB"], "training.micro_batch_size = 0"),
    ],
)
def test_mistakes(arguments, message, capsys):
    try:
        status = main(["plan", *arguments])
    except SystemExit as stopped:  # argparse
        status = stopped.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("change", [{"num_hidden_layers": "many"}, {"hidden_size": -4}, {"vocab_size": 1e400}])
def test_configurations_that_are_invalid(change, tmp_path, capsys):
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert main(["plan", MATH10K, "--set", f"model.name={tmp_path}", "--memory", "8GiB"]) == 2
    error = capsys.readouterr().err
    assert "config.json: not the configuration of a decoder that Transformers can build" in error


def test_a_plan_on_this_machine_counts_the_process(tiny_model):
    from qdense.planning.machine import this_machine

    recipe = recipe_for(tiny_model, "unused")
    machine = this_machine(recipe, model_shape(str(tiny_model)))
    assert machine.kernels.is_cuda == torch.cuda.is_available() or recipe.model.device == "cpu"
    assert 0 < machine.base_bytes < machine.memory_bytes
