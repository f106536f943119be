"""What a recipe's [adapter] table says reaches the adapter: each key that a method reads, and no other."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import linear

from qdense.methods import METHODS
from qdense.modeling.attach import attach_adapter
from qdense.modeling.load import load_base
from qdense.recipe import AdapterRecipe, ModelRecipe
from qdense.tuners.nora import NoraLinear
from tests.helpers.methods import TRAINED
from tests.helpers.tuners import TOKENS

# LoKr's right factor is of rank r only where r < 4 here (64 = 8 * 8), NoRA's inner pair is of rank r / 2.
BASELINE = {"r": 2, "alpha": 3.0, "dropout": 0.1, "activation": "gelu", "sharing": "kind", "zero_init": "decoder"} | {
    "target_modules": ("q_proj", "v_proj", "down_proj")
}
CHANGED = {"r": 3, "alpha": 5.0, "dropout": 0.3, "activation": "silu", "sharing": "none", "zero_init": "none"} | {
    "target_modules": ("q_proj", "up_proj"),
    "layer_groups": 2,
    "init": "balanced",
}
OWN = {
    "adalora": {"initial_r": 3.0, "warmup_share": 0.3, "final_share": 0.1, "cut_every": 2, "orthogonality": 0.1},
    "vera": {"r": 16, "initial_d": 0.3},
    "lokr": {"decompose_factor": 4, "decompose_both": True},
    "randlora": {"scaling": 5.0},
    "nora": {"r_inner": 2, "split": "left"},  # calibration_rows: tests/methods/test_methods.py
}


@pytest.fixture(scope="module")
def base(tiny_model):
    """A fresh fp32 (or NF4) base, loaded once."""
    loaded = {}

    def fresh(quantization="none"):
        if quantization not in loaded:
            dtype = "float32" if quantization == "none" else "bfloat16"
            recipe = ModelRecipe(name=str(tiny_model), quantization=quantization, dtype=dtype, device="cpu")
            loaded[quantization] = load_base(recipe)
        return copy.deepcopy(loaded[quantization])

    return fresh


def awakened(base, method, **settings):
    """A fresh adapter, seeded, whose trained factors are all moved away from zero."""
    torch.manual_seed(5)
    model = attach_adapter(base, AdapterRecipe(method=method, dtype="float32", **BASELINE | settings), num_steps=20)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def training_logits(model):
    torch.manual_seed(7)
    with torch.no_grad():
        return model.train()(TOKENS).logits


@pytest.mark.parametrize("method", TRAINED)
def test_a_key_changes_the_model_if_the_method_reads_it_and_only_then(base, method):
    expected = training_logits(awakened(base(), method))
    assert torch.equal(training_logits(awakened(base(), method)), expected)
    changes = {
        key
        for key, value in CHANGED.items()
        if not torch.equal(training_logits(awakened(base(), method, **{key: value})), expected)
    }
    assert changes == METHODS[method].adapter_keys


@pytest.mark.parametrize("method", OWN)
def test_a_methods_own_keys_reach_its_configuration(base, method):
    """Some of AdaLoRA's are a schedule's: no single forward pass shows them."""

    def config(**own):
        adapter = AdapterRecipe(method=method, **BASELINE, **{method: own})
        return METHODS[method].build_config(adapter, 20).to_dict()

    assert config() == config()
    assert [key for key, value in OWN[method].items() if config(**{key: value}) == config()] == []


def test_every_own_key_has_a_test():
    named = {(method, key) for method, own in OWN.items() for key in own} | {("nora", "calibration_rows")}
    own = {name: method.settings.model_fields for name, method in METHODS.items() if method.settings is not None}
    assert named == {(method, key) for method, fields in own.items() for key in fields}


@pytest.mark.parametrize(
    ("method", "key", "accepted", "refused"),
    [
        ("adalora", "initial_r", (1, 8), (0.99, 8.01, "2", True)),
        ("adalora", "warmup_share", (0, 0.99), (-0.01, 1, 1.5)),
        ("adalora", "final_share", (0, 0.99), (-0.01, 1, 1.5)),
        ("adalora", "cut_every", (1, 100), (0, 1.5)),
        ("adalora", "orthogonality", (0, 3), (-0.01, math.inf, math.nan)),
        ("vera", "r", (1, 4096), (0, 4097)),
        ("vera", "initial_d", (0.01, 5), (0, -1)),
        ("lokr", "decompose_factor", (-1, 2, 64), (-2, 0, 1)),
        ("nora", "r_inner", (1, 512), (0, 513)),
        ("nora", "calibration_rows", (0, 100), (-1,)),
        ("randlora", "scaling", (0.01, 50), (0, -1)),
    ],
)
def test_a_methods_own_keys_have_their_ranges(method, key, accepted, refused):
    for value in accepted:
        assert getattr(METHODS[method].settings(**{key: value}), key) == value
    for value in refused:
        with pytest.raises(ValidationError):
            METHODS[method].settings(**{key: value})


def test_what_a_recipe_leaves_out_of_a_methods_own_keys_is_as_documented():
    defaults = {name: method.settings().model_dump() for name, method in METHODS.items() if method.settings is not None}
    assert defaults == {
        "adalora": {"initial_r": 1.5, "warmup_share": 0.1, "final_share": 0.3, "cut_every": 10, "orthogonality": 0.5},
        "vera": {"r": 256, "initial_d": 0.1},
        "lokr": {"decompose_factor": -1, "decompose_both": False},
        "nora": {"r_inner": None, "split": "both", "calibration_rows": 32},
        "randlora": {"scaling": 20.0},
    }


def test_dropout_is_on_in_training_and_off_outside_it(base):
    for method in TRAINED:
        if "dropout" in METHODS[method].adapter_keys:
            model = awakened(base(), method, dropout=0.5)
            with torch.no_grad():
                assert not torch.equal(model.train()(TOKENS).logits, model(TOKENS).logits), method
                assert torch.equal(model.eval()(TOKENS).logits, model(TOKENS).logits), method


@pytest.mark.parametrize("r_inner", [1, 3, 8])
def test_noras_output_is_scaled_by_alpha_over_r(base, r_inner):
    """By the recipe's r, which is the outer pair's: so alpha means the same whatever the inner rank."""
    model = awakened(base(), "nora", r=8, alpha=24.0, nora={"r_inner": r_inner}).eval()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    assert isinstance(layer, NoraLinear)
    x = torch.randn(3, 128)
    factors = (layer.nora_outer_a, layer.nora_inner_a, layer.nora_inner_b, layer.nora_outer_b)
    expected = x
    for factor in factors:
        expected = linear(expected, factor["default"])
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 24.0 / 8 * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [2, 8], ids=["a factor of low rank", "whole factors"])
def test_lokr_on_nf4_adds_what_it_adds_on_a_float_base(base, r):
    """There PEFT itself computes the update."""
    models = {name: awakened(base(name), "lokr", r=r, alpha=5.0) for name in ("nf4", "none")}
    trained = {name: p for name, p in models["nf4"].named_parameters() if p.requires_grad}
    assert any("lokr_w2_a" in name for name in trained) == (r == 2)
    missing, unexpected = models["none"].load_state_dict(trained, strict=False)
    assert unexpected == []
    assert not any("lokr" in name for name in missing)
    updates = {
        name: {
            key: layer.get_delta_weight("default") for key, layer in model.named_modules() if hasattr(layer, "lokr_w1")
        }
        for name, model in models.items()
    }
    assert len(updates["nf4"]) == 6
    torch.testing.assert_close(updates["nf4"], updates["none"])
    layer = models["nf4"].get_submodule("base_model.model.model.layers.0.mlp.down_proj").eval()
    x, update = torch.randn(3, 128).bfloat16(), updates["none"]["base_model.model.model.layers.0.mlp.down_proj"]
    with torch.no_grad():
        found, wanted = (layer(x) - layer.base_layer(x)).float(), x.float() @ update.T
        assert (found - wanted).norm() < 0.02 * wanted.norm()
