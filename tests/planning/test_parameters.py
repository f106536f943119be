"""Counts against the published table (PAPER.md) and against real modules."""

import pytest

from qdense import DenseLoraConfig
from qdense.catalogs.models import CATALOG
from qdense.errors import ModelError
from qdense.methods import METHODS
from qdense.modeling.attach import attach_adapter
from qdense.modeling.load import load_base
from qdense.planning.parameters import count_parameters
from qdense.recipe import AdapterRecipe, ModelRecipe

PUBLISHED = {
    ("llama3-8b", 16): (925_696, 0.0115),
    ("llama3-8b", 32): (1_933_312, 0.024),
    ("llama3-8b", 64): (4_194_304, 0.052),
    ("llama3-8b", 128): (9_699_328, 0.121),
    ("llama3-8b", 256): (24_641_536, 0.306),
    ("llama3-8b", 512): (70_254_592, 0.867),
    ("llama2-7b", 16): (917_504, 0.0136),
    ("llama2-7b", 32): (1_916_928, 0.028),
    ("llama2-7b", 64): (4_161_536, 0.062),
    ("llama2-7b", 128): (9_633_792, 0.143),
    ("llama2-7b", 256): (24_510_464, 0.362),
    ("llama2-7b", 512): (69_992_448, 1.03),
}


@pytest.mark.parametrize(("model", "r"), PUBLISHED)
def test_denselora_counts_are_the_published_ones(model, r):
    trainable, percent = PUBLISHED[model, r]
    count = count_parameters(model, AdapterRecipe(r=r))
    assert count.trainable_parameters == trainable == sum(count.by_module.values())
    digits = len(str(percent).partition(".")[2])
    assert round(count.percent, digits) == percent


def test_lora_counts_are_the_published_ones():
    assert count_parameters("llama2-7b", AdapterRecipe(method="lora", r=16)).trainable_parameters == 28_049_408
    count = count_parameters("llama3-8b", AdapterRecipe(method="lora", r=32))
    assert count.trainable_parameters == 56_623_104
    assert round(count.percent, 2) == 0.70


@pytest.mark.parametrize(
    ("model", "num_parameters"),  # as the model cards and config.json files have them
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_base_sizes(model, num_parameters):
    assert CATALOG[model].num_parameters == num_parameters


VARIANTS = [
    *({"method": method} for method in METHODS if method != "none"),
    {"sharing": "shape"},
    {"sharing": "none"},
    {"layer_groups": 2},
    {"layer_groups": 2, "sharing": "shape"},
    {"method": "denselora-freeze", "layer_groups": 2},
    {"method": "denselora-freeze", "sharing": "shape"},
    {"method": "lokr", "r": 1},
    {"method": "lokr", "r": 1, "lokr": {"decompose_both": True}},
    {"method": "lokr", "r": 2, "lokr": {"decompose_factor": 16}},
    *(
        {"method": "lokr", "r": 2, "lokr": {"decompose_factor": factor}} for factor in (3, 5, 48)
    ),  # these divide nothing
    *({"method": "lokr", "r": r, "lokr": {"decompose_both": True}} for r in (3, 4, 5)),  # 64 = 8 * 8: low rank below 4
    {"method": "adalora", "adalora": {"initial_r": 2.0}},
    {"method": "vera", "vera": {"r": 24}},
    {"method": "nora", "nora": {"r_inner": 3}},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_counts_agree_with_real_modules(tiny_model, variant):
    recipe = AdapterRecipe(**{"r": 8} | variant)
    quantization = METHODS[recipe.method].quantizations[0]
    base = load_base(ModelRecipe(name=str(tiny_model), quantization=quantization, device="cpu"))
    config = base.model.config
    model = attach_adapter(base, recipe, num_steps=100)
    shapes = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "up_proj": (64, 128), "down_proj": (128, 64)}
    method = METHODS[recipe.method]
    chosen = {kind: shapes[kind] for kind in method.targets(recipe)}
    counted = method.count_parameters(recipe, chosen, config.num_hidden_layers)
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert DenseLoraConfig(r=8).alpha == AdapterRecipe(r=8).scaling_alpha


def test_red_counts_are_the_published_ones():
    for model in ("llama2-7b", "llama3-8b"):
        assert (
            count_parameters(model, AdapterRecipe(method="red", target_modules="QKV")).trainable_parameters == 262_144
        )


def test_the_base_alone_trains_nothing():
    count = count_parameters("llama3-8b", AdapterRecipe(method="none"))
    assert (count.trainable_parameters, count.percent) == (0, 0)
    assert count_parameters("smollm2-135m", AdapterRecipe(method="full", target_modules="QKVOGUD")).percent < 100


def test_unknown_models_and_modules_are_named():
    with pytest.raises(ModelError, match='did you mean "llama3-8b"'):
        count_parameters("llama3-8", AdapterRecipe(r=16))
    with pytest.raises(ModelError, match="has no linear module w_proj"):
        count_parameters("llama3-8b", AdapterRecipe(r=16, target_modules=["w_proj"]))


def test_hub_ids_count_like_names():
    by_name = count_parameters("llama3-8b", AdapterRecipe(r=16))
    by_id = count_parameters("meta-llama/Meta-Llama-3-8B", AdapterRecipe(r=16))
    assert by_id.by_module == by_name.by_module
