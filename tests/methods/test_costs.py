"""What the planner is told of each method, counted in the method's own layers."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qdense.methods import METHODS
from qdense.modeling.attach import attach_adapter
from qdense.modeling.load import load_base
from qdense.planning.memory import Kernels, computation_of
from qdense.planning.shapes import model_shape
from tests.helpers.methods import TRAINED
from tests.helpers.recipes import recipe_of

# One of each shape, and none that reads another's input: square, wider, narrower.
MODULES = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (64, 128), "mlp.down_proj": (128, 64)}
TARGETS = [path.rpartition(".")[2] for path in MODULES]
ON_CPU = Kernels(is_cuda=False, is_fused=False, has_liger=False)


def recipe_for(tiny_model, method, **changes):
    tables = {"model__quantization": "none", "model__dtype": "float32", "adapter__dtype": "float32"}
    tables |= {"adapter__r": 6, "adapter__target_modules": TARGETS}  # 6: RandLoRA's bases are no whole number
    return recipe_of(tiny_model, model__device="cpu", adapter__method=method, **tables | changes)


def adapted(recipe):
    torch.manual_seed(0)
    return attach_adapter(load_base(recipe.model), recipe.adapter, num_steps=10).train()


def multiplications(layer, num_tokens, d_in, d_out):
    """Of the adapter's forward and backward pass: what the frozen module itself takes is subtracted."""
    x, counts = torch.randn(1, num_tokens, d_in, requires_grad=True), []
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    for counter in (forward, backward):
        counts.append(counter.get_total_flops() // 2 - num_tokens * d_in * d_out)
    return counts


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("method", [name for name in TRAINED if METHODS[name].is_adapter])
def test_products_are_those_of_the_methods_own_layers(tiny_model, method, dropout):
    recipe = recipe_for(tiny_model, method, adapter__dropout=dropout)
    model = adapted(recipe)
    at = computation_of(recipe, model_shape(str(tiny_model)), ON_CPU)
    for path, shape in MODULES.items():
        layer = model.get_submodule(f"base_model.model.model.layers.1.{path}")
        few, many = (multiplications(layer, num_tokens, *shape) for num_tokens in (8, 24))
        costs = METHODS[method].costs.of_module(at, *shape)
        of_a_token = [(b - a) / 16 for a, b in zip(few, many, strict=True)]
        assert of_a_token == [costs.products, costs.backward_products], path
        if method == "dora":  # of the others, products with an element for each are in it
            assert few[0] - 8 * costs.products == costs.weights.products


def num_elements(model):
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("sharing", ["kind", "shape", "none"])
@pytest.mark.parametrize("method", [name for name in TRAINED if METHODS[name].is_adapter])
def test_frozen_elements_are_those_that_the_adapter_holds(tiny_model, method, sharing):
    recipe = recipe_for(tiny_model, method, adapter__sharing=sharing)
    base = load_base(recipe.model)
    before, num_layers = num_elements(base.model), base.model.config.num_hidden_layers
    model = attach_adapter(base, recipe.adapter, num_steps=10)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counters = sum(tensor.numel() for name, tensor in model.named_parameters() if ".ranknum." in name)
    found = num_elements(model) - before - trained - counters
    shapes = {path.rpartition(".")[2]: shape for path, shape in MODULES.items()}
    assert METHODS[method].costs.frozen_parameters(recipe.adapter, shapes, num_layers) == found
