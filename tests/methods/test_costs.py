"""What each method tells the planner, counted in the method's layers."""

import dataclasses
import math
import weakref
from contextlib import ExitStack

import pytest
import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode

from qdense.compat.torch import watched_operations
from qdense.methods import METHODS
from qdense.methods.costs import WeightCosts
from qdense.modeling.attach import attach_adapter
from qdense.modeling.load import load_base
from qdense.planning.memory import Kernels, computation_of
from qdense.planning.shapes import model_shape
from tests.helpers.methods import TRAINED
from tests.helpers.recipes import recipe_of

aten = torch.ops.aten
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


def layer_of(model, path):
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    return model.get_submodule(f"{prefix}model.layers.1.{path}")


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
@pytest.mark.parametrize("method", TRAINED)
def test_products_are_those_of_the_methods_own_layers(tiny_model, method, dropout):
    recipe = recipe_for(tiny_model, method, adapter__dropout=dropout)
    model = adapted(recipe)
    at = computation_of(recipe, model_shape(str(tiny_model)), ON_CPU)
    for path, shape in MODULES.items():
        layer = layer_of(model, path)
        few, many = (multiplications(layer, num_tokens, *shape) for num_tokens in (8, 24))
        costs = METHODS[method].costs.of_module(at, *shape)
        of_a_token = [(b - a) / 16 for a, b in zip(few, many, strict=True)]
        assert of_a_token == [costs.products, costs.backward_products], path
        # Of weights: matrix products are counted here, element by element ones by hand.
        weight, scaled = math.prod(shape), math.ceil(min(shape) / 6) * 6 * min(shape)
        by_element = {"hira": weight, "lokr": weight, "randlora": 2 * scaled}.get(method, 0)
        counted = few[0] - 8 * costs.products + by_element
        slack = 0.1 if method == "lokr" else 0  # a small factor may itself be a product
        assert costs.weights.products == pytest.approx(counted, rel=slack, abs=0), path


def kept_bytes(layer, num_tokens, d_in, dtype):
    """Of what autograd holds once the layer has run, but for what is there anyway: parameters, buffers, shared factors."""
    modules = [*layer.modules(), *(m for part in layer.modules() for m in getattr(part, "shared", {}).values())]
    held = [value for module in modules for value in vars(module).values() if isinstance(value, dict)]
    tensors = [tensor for table in held for tensor in table.values() if isinstance(tensor, torch.Tensor)]
    tensors += [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    before, saved = {tensor.untyped_storage().data_ptr() for tensor in tensors}, []

    def pack(tensor):
        saved.append(weakref.ref(tensor))
        return tensor

    x = torch.randn(1, num_tokens, d_in, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    storages = {reference().untyped_storage() for reference in saved if reference() is not None}
    del y
    return sum(each.nbytes() for each in {s.data_ptr(): s for s in storages}.values() if each.data_ptr() not in before)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("method", TRAINED)
def test_bytes_that_are_kept_are_those_that_autograd_holds(tiny_model, method, dropout, dtypes):
    base_dtype, dtype = dtypes
    if method == "dora" and base_dtype != dtype and not dropout:
        pytest.skip("the plan counts the base's output in the adapter's dtype: 2 bytes too many for an element")
    changes = {"model__dtype": base_dtype, "adapter__dtype": dtype, "adapter__dropout": dropout}
    recipe = recipe_for(tiny_model, method, **changes)
    model = adapted(recipe)
    at = computation_of(recipe, model_shape(str(tiny_model)), ON_CPU)
    costs = METHODS[method].costs
    for path, (d_in, d_out) in MODULES.items():
        if path.rpartition(".")[2] not in METHODS[method].targets(recipe.adapter):
            continue
        layer = layer_of(model, path)
        few, many = (kept_bytes(layer, num_tokens, d_in, getattr(torch, base_dtype)) for num_tokens in (8, 24))
        of_module = costs.of_module(at, d_in, d_out)
        of_a_token = (many - few) / 16
        assert of_a_token == costs.of_input(at, d_in, 1) + of_module.kept, path
        if method != "dora":  # PEFT's holds the graph of a norm that it detaches, until it is collected
            fixed = few - 8 * of_a_token
            assert of_module.weights.kept <= fixed <= 1.05 * of_module.weights.kept + 512, path  # and a few numbers


class MovedBytes(ExitStack):
    """Bytes that operations read and write, but for matrix products and views."""

    def __enter__(self):
        self.num_bytes = 0
        self.enter_context(watched_operations(self._count))
        return self

    def _count(self, operation, read, written):
        before = {tensor.data_ptr() for tensor in read}
        changes = operation.overloadpacket.__name__.endswith("_")  # in place, by torch's convention
        is_view = not changes and all(tensor.data_ptr() in before for tensor in written)
        if operation.overloadpacket not in (aten.mm, aten.addmm, aten.bmm) and not is_view:
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))


@pytest.mark.parametrize("method", [name for name in TRAINED if METHODS[name].is_adapter])
def test_bytes_that_are_moved_are_estimated_within_a_factor(tiny_model, method):
    """On a CPU dropout is several operations where CUDA has one, and other passes are one where an estimate has two."""
    recipe = recipe_for(tiny_model, method, adapter__dropout=0.2)
    model = adapted(recipe)
    at = computation_of(recipe, model_shape(str(tiny_model)), ON_CPU)
    for path, (d_in, d_out) in MODULES.items():
        if path.rpartition(".")[2] not in METHODS[method].targets(recipe.adapter):
            continue
        counts = []
        for num_tokens in (8, 24):
            x = torch.randn(1, num_tokens, d_in, requires_grad=True)
            with MovedBytes() as moved:
                layer_of(model, path)(x)
            counts.append(moved.num_bytes)
        of_a_token = (counts[1] - counts[0]) / 16
        costs = METHODS[method].costs.of_module(at, d_in, d_out)
        assert costs.moved / 2.5 <= of_a_token <= 2.5 * costs.moved, path
        if costs.weights.moved:
            assert costs.weights.moved / 2 <= counts[0] - 8 * of_a_token <= costs.weights.moved, path


@pytest.mark.parametrize("method", [name for name in TRAINED if METHODS[name].is_adapter])
def test_only_methods_that_make_matrices_as_large_as_a_weight_have_their_costs(tiny_model, method):
    at = computation_of(recipe_for(tiny_model, method), model_shape(str(tiny_model)), ON_CPU)
    costs = METHODS[method].costs.of_module(at, 64, 128)
    none = WeightCosts(kept=0, in_forward=0, in_backward=0, products=0, moved=0)
    assert costs.in_backward == 0
    if method == "adalora":
        assert dataclasses.replace(costs.weights, kept=0) == none
    elif method not in ("dora", "hira", "lokr", "randlora"):
        assert costs.weights == none


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_weights_gradient_is_made_in_its_dtype_and_cast(tiny_model, dtype):
    """Two pieces of memory as large as the weight, one of them in fp32."""
    recipe = recipe_for(tiny_model, "full", model__dtype=dtype, adapter__dtype=dtype)
    at = computation_of(recipe, model_shape(str(tiny_model)), ON_CPU)
    costs = METHODS["full"].costs.of_module(at, 64, 128)
    element = {"float32": 4, "bfloat16": 2}[dtype]
    assert costs.weights == WeightCosts(kept=0, in_forward=0, in_backward=(element + 4) * 8192, products=0, moved=0)
    assert (costs.kept, costs.in_backward, costs.moved) == (0, 0, 0)


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
