"""What each method says about itself, checked against its own layers."""

import pytest
import torch

from qdense.methods import METHODS, method_of
from qdense.modeling.attach import attach_adapter, trainable_parameters
from qdense.modeling.load import load_base
from qdense.recipe import AdapterRecipe
from tests.helpers.methods import TRAINED, method_recipe

IDS = torch.arange(40).reshape(2, 20)


@pytest.mark.parametrize("method", TRAINED)
def test_what_must_have_a_gradient_from_the_first_step_on_has_one(tiny_model, tmp_path, method):
    """And what need not have one, has none: before a factor that is zero (AdaLoRA's penalty still moves its factors)."""
    recipe = method_recipe(
        tiny_model, tmp_path, method, "none", adapter__dtype="float32", model__dtype="float32", adapter__dropout=0.0
    )
    model = attach_adapter(load_base(recipe.model), recipe.adapter, 10).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    awake = {name for name, p in trainable_parameters(model) if p.grad is not None and p.grad.any()}
    expected = {name for name, _ in trainable_parameters(model) if METHODS[method].has_gradient_at_start(name)}
    assert expected
    assert expected <= awake if method == "adalora" else expected == awake


def test_what_is_particular_to_single_methods():
    def of_those_that(holds):
        return {name for name, method in METHODS.items() if holds(method)}

    assert of_those_that(lambda method: method.reads_base_weights) == {"dora", "hira"}
    assert of_those_that(lambda method: method.costs.has_weight_penalty) == {"adalora"}
    fused = {"denselora", "denselora-freeze", "denselora-only-matrix"}
    assert of_those_that(lambda method: method.costs.has_fused_kernels) == fused
    assert of_those_that(lambda method: not method.is_adapter) == {"full", "none"}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *(({"peft_type": "DENSELORA", "activation": name}, "denselora") for name in ("gelu", "relu", "silu", "tanh")),
        ({"peft_type": "DENSELORA", "activation": "none"}, "denselora-only-matrix"),
        ({"peft_type": "DENSELORA", "activation": "gelu", "freeze_shared": True}, "denselora-freeze"),
        ({"peft_type": "LORA", "use_dora": True}, "dora"),
        ({"peft_type": "LORA", "use_dora": False}, "lora"),
        ({"peft_type": "LORA"}, "lora"),
    ],
)
def test_a_method_and_its_variants_are_told_apart(config, name):
    assert method_of(config).name == name


def test_only_noras_start_looks_at_training_rows():
    recipe = AdapterRecipe(nora={"calibration_rows": 5})
    rows = {
        name: method.num_calibration_rows(recipe.model_copy(update={"method": name}))
        for name, method in METHODS.items()
    }
    assert {name for name, number in rows.items() if number} == {"nora"}
    assert rows["nora"] == 5


def test_adaloras_schedule_is_in_shares_of_the_run():
    recipe = AdapterRecipe(method="adalora", r=8, alpha=24.0, dropout=0.25, target_modules=["q_proj"])
    config = METHODS["adalora"].build_config(recipe, 200)
    assert (config.init_r, config.target_r, config.lora_alpha, config.lora_dropout) == (12, 8, 24.0, 0.25)
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (20, 60, 10, 200)
    assert config.orth_reg_weight == 0.5
    recipe = AdapterRecipe(method="adalora", adalora={"warmup_share": 0.5, "final_share": 0.49})
    assert METHODS["adalora"].build_config(recipe, 100).tinit == 50
    recipe = AdapterRecipe(method="adalora", adalora={"warmup_share": 0.5, "final_share": 0.5})
    with pytest.raises(ValueError, match="no step in which to cut ranks"):
        METHODS["adalora"].build_config(recipe, 100)
