"""What our PEFT configurations take, up to the last value that they take, and what they refuse."""

import math

import pytest
import torch
from peft import get_peft_model

from qdense import DenseLoraConfig, NoraConfig
from tests.helpers.tuners import fresh_base

DENSELORA_ACCEPTED = [
    {"r": 1},
    {"alpha": 0.1},
    {"dropout": 0.0},
    {"dropout": 0.99},
    {"use_rslora": True},
    *({"activation": name} for name in ("gelu", "silu", "tanh", "none")),
    {"activation": "relu", "zero_init": "none"},
    {"activation": "relu", "init_weights": False},
    {"activation": "tanh", "zero_init": "m"},
    {"freeze_shared": True, "zero_init": "m"},
    {"freeze_shared": True, "zero_init": "none"},
    {"freeze_shared": True, "init_weights": False},
]
DENSELORA_REFUSED = [
    ({"r": 0}, "DenseLoraConfig.r = 0: must be a positive"),
    ({"r": 2.0}, "DenseLoraConfig.r = 2.0: must be a positive"),
    ({"alpha": 0.0}, "DenseLoraConfig.alpha = 0.0: must be positive"),
    ({"alpha": -1.0}, "DenseLoraConfig.alpha = -1.0: must be positive"),
    ({"dropout": -0.1}, "DenseLoraConfig.dropout = -0.1: must be at least 0 and below 1"),
    ({"dropout": 1.0}, "DenseLoraConfig.dropout = 1.0: must be at least 0 and below 1"),
    ({"dropout": 1.5}, "DenseLoraConfig.dropout = 1.5: must be at least 0 and below 1"),
    ({"activation": "swish"}, "DenseLoraConfig.activation = 'swish': must be one of gelu"),
    ({"sharing": "layer"}, "DenseLoraConfig.sharing = 'layer': must be one of kind"),
    ({"zero_init": "encoder"}, "DenseLoraConfig.zero_init = 'encoder': must be one of decoder"),
    ({"activation": "relu"}, "ReLU has zero slope at 0"),
    ({"activation": "relu", "zero_init": "m"}, "ReLU has zero slope at 0"),
    ({"freeze_shared": True}, "DenseLoraConfig.freeze_shared = True: needs"),
    (
        {"rank_pattern": {"q_proj": 8}},
        "DenseLoraConfig has no rank_pattern: layers that share factors have one rank",
    ),
    (
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        "DenseLoraConfig.layers_to_transform: needs target_modules as a list of names",
    ),
    ({"use_dora": True}, "DenseLoraConfig has no use_dora: that is LoRA's own variant"),
]
NORA_ACCEPTED = [
    {"r": 4, "r_inner": 4},
    {"r": 1, "r_inner": 1},
    {"alpha": 0.1},
    {"dropout": 0.0},
    {"dropout": 0.99},
    {"exponent": 0.1},
    *({"split": name} for name in ("both", "left", "right")),
]
NORA_REFUSED = [
    ({"r": 0}, "NoraConfig.r = 0: must be a positive"),
    ({"r_inner": 0}, "NoraConfig.r_inner = 0: must be a positive"),
    ({"r": 4, "r_inner": 5}, "NoraConfig.r_inner = 5: must be at most r = 4"),
    ({"alpha": 0.0}, "NoraConfig.alpha = 0.0: must be positive"),
    ({"alpha": -1.0}, "NoraConfig.alpha = -1.0: must be positive"),
    ({"dropout": -0.1}, "NoraConfig.dropout = -0.1: must be at least 0"),
    ({"dropout": 1.0}, "NoraConfig.dropout = 1.0: must be at least 0"),
    ({"dropout": 1.5}, "NoraConfig.dropout = 1.5: must be at least 0"),
    ({"split": "middle"}, "NoraConfig.split = 'middle': must be one of both"),
    ({"exponent": 0.0}, "NoraConfig.exponent = 0.0: must be positive"),
    ({"exponent": -1.0}, "NoraConfig.exponent = -1.0: must be positive"),
]


@pytest.mark.parametrize(
    ("config", "settings"),
    [*((DenseLoraConfig, each) for each in DENSELORA_ACCEPTED), *((NoraConfig, each) for each in NORA_ACCEPTED)],
)
def test_a_setting_in_its_range_is_taken(config, settings):
    made = config(**settings)
    assert {key: getattr(made, key) for key in settings} == settings


@pytest.mark.parametrize(
    ("config", "settings", "told"),
    [*((DenseLoraConfig, *each) for each in DENSELORA_REFUSED), *((NoraConfig, *each) for each in NORA_REFUSED)],
)
def test_a_setting_out_of_its_range_is_refused(config, settings, told):
    with pytest.raises(ValueError, match=told):
        config(**settings)


def test_what_is_left_out_is_the_authors():
    assert (DenseLoraConfig().r, DenseLoraConfig().alpha, DenseLoraConfig().dropout) == (32, 64.0, 0.0)
    assert (DenseLoraConfig().zero_init, DenseLoraConfig(init_weights=False).zero_init) == ("decoder", "none")
    assert not DenseLoraConfig().freeze_shared
    nora = NoraConfig()
    assert (nora.r, nora.r_inner, nora.alpha, nora.dropout, nora.exponent) == (64, 32, 64.0, 0.0, 0.5)
    assert (NoraConfig(r_inner=8).alpha, DenseLoraConfig(r=8).alpha) == (16.0, 16.0)


@pytest.mark.parametrize("safe_merge", [True, False])
def test_a_safe_merge_refuses_what_is_not_finite(tiny_model, safe_merge):
    for value, is_refused in ((1.0, False), (math.inf, safe_merge)):
        model = get_peft_model(fresh_base(tiny_model), NoraConfig(r=4, r_inner=2, target_modules=["q_proj"]))
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        before = layer.weight.clone()
        with torch.no_grad():
            layer.nora_inner_b["default"].fill_(value)
        if is_refused:
            with pytest.raises(ValueError, match="NaN or infinity; no layer has been merged"):
                model.merge_adapter(safe_merge=safe_merge)
            assert torch.equal(layer.weight, before)
        else:
            model.merge_adapter(safe_merge=safe_merge)
            assert not torch.equal(layer.weight, before)
