"""Counts against the published table (PAPER.md) and against real modules."""

import pytest
from conftest import tiny_config
from peft import get_peft_model

from qdense import DenseLoraConfig
from qdense.catalog import CATALOG, PAPER_TARGET_MODULES
from qdense.errors import ModelError
from qdense.methods import METHODS
from qdense.planning.parameters import count_parameters

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
    count = count_parameters(model, "denselora", r, PAPER_TARGET_MODULES)
    assert count.trainable_parameters == trainable == sum(count.by_module.values())
    digits = len(str(percent).partition(".")[2])
    assert round(count.percent, digits) == percent


def test_lora_counts_are_the_published_ones():
    assert count_parameters("llama2-7b", "lora", 16, PAPER_TARGET_MODULES).trainable_parameters == 28_049_408
    count = count_parameters("llama3-8b", "lora", 32, PAPER_TARGET_MODULES)
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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_counts_agree_with_real_modules(method):
    from transformers import LlamaForCausalLM

    from qdense.recipe import AdapterRecipe

    config = tiny_config()
    recipe = AdapterRecipe(method=method, r=8)
    model = get_peft_model(LlamaForCausalLM(config), METHODS[method].build_config(recipe))
    shapes = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "up_proj": (64, 128), "down_proj": (128, 64)}
    counted = METHODS[method].count_parameters(shapes, config.num_hidden_layers, 8)
    assert sum(counted.values()) == model.get_nb_trainable_parameters()[0]
    assert DenseLoraConfig(r=8).alpha == recipe.scaling_alpha


def test_unknown_models_and_modules_are_named():
    with pytest.raises(ModelError, match='did you mean "llama3-8b"'):
        count_parameters("llama3-8", "denselora", 16, PAPER_TARGET_MODULES)
    with pytest.raises(ModelError, match="has no module w_proj"):
        count_parameters("llama3-8b", "denselora", 16, ["w_proj"])


def test_hub_ids_count_like_names():
    by_name = count_parameters("llama3-8b", "denselora", 16, PAPER_TARGET_MODULES)
    by_id = count_parameters("meta-llama/Meta-Llama-3-8B", "denselora", 16, PAPER_TARGET_MODULES)
    assert by_id.by_module == by_name.by_module
