"""What a method adds to a training step: the planner's interface, and what LoRA-like methods share.

Each figure counts what the method's code does, and is written beside its configuration in the method's file.
tests/planning/test_memory.py compares memory with the tensors of real steps; time is an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# Module kind -> (d_in, d_out) of one decoder layer's linear modules.
LinearShapes = Mapping[str, tuple[int, int]]


class AdapterSettings(Protocol):
    """The part of a recipe's [adapter] table that a method may read; `method_settings` is its own table."""

    @property
    def r(self) -> int: ...
    @property
    def scaling_alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def activation(self) -> str: ...
    @property
    def sharing(self) -> str: ...
    @property
    def layer_groups(self) -> int: ...
    @property
    def init(self) -> str: ...
    @property
    def zero_init(self) -> str: ...
    @property
    def target_modules(self) -> Sequence[str]: ...
    @property
    def method_settings(self) -> Any: ...


@dataclass(frozen=True)
class Computation:
    """How a step computes: what costs depend on besides a module's shape.

    Attributes:
        adapter: the recipe's [adapter] table.
        shapes: of one layer's adapted modules.
        width: bytes of an element of the adapter.
        base_width: of the base's activations, and of its weights once unpacked.
        mask_width: of an element of PyTorch's dropout masks; 0 where nothing is dropped.
        quantization: of the base: nf4, int8 or none.
        is_fused: whether the method's own fused kernels compute it.
    """

    adapter: AdapterSettings
    shapes: LinearShapes
    width: int
    base_width: int
    mask_width: int
    quantization: str
    is_cuda: bool
    is_fused: bool

    @property
    def is_input_copied(self) -> bool:
        """Whether each adapter reads its own copy of the input: cast to its dtype, or with dropout."""
        return self.mask_width > 0 or self.width != self.base_width

    @property
    def unpacked_width(self) -> int:
        """Bytes of an element of a weight that a method reads: a copy of a quantized weight; 0 for the base's own."""
        return self.base_width if self.quantization != "none" else 0


@dataclass(frozen=True, kw_only=True)
class WeightCosts:
    """Costs of an adapted module that do not depend on tokens: copies of its weight, and matrices as large.

    Attributes:
        kept: bytes that autograd keeps until the backward pass.
        in_forward, in_backward: further bytes that exist only while the module computes; in backward they replace the peak
            of a layer's gradients.
        products: multiplications in forward; twice that in backward.
        moved: bytes read and written in forward; about twice that in backward.
    """

    kept: float
    in_forward: float
    in_backward: float
    products: float
    moved: float


NO_COPIES = WeightCosts(kept=0, in_forward=0, in_backward=0, products=0, moved=0)


@dataclass(frozen=True, kw_only=True)
class ModuleCosts:
    """Costs of a token in one adapted module (d_in to d_out), in addition to the frozen module's.

    Attributes:
        kept: bytes that autograd keeps until the backward pass, besides the module's input.
        in_backward: bytes that exist only while backward runs through the module, beyond a gradient for each output and input.
        products, backward_products: weights that the token is multiplied by.
        moved: bytes read and written besides the products' operands, in forward; about twice that in backward.
        weights: costs that do not depend on tokens; `NO_COPIES` for a method that makes no matrix as large as a weight.
    """

    kept: float
    in_backward: float
    products: float
    backward_products: float
    moved: float
    weights: WeightCosts


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a method must tell the planner. Nothing that a step keeps or computes has a default.

    Attributes:
        of_input: (how it computes, d_in, number of adapted modules that read it) -> bytes of a token that autograd keeps of
            an input and its dropout masks.
        of_module: (how it computes, d_in, d_out) -> the rest.
        frozen_parameters: ([adapter] table, shapes of one layer's target modules, number of layers) -> elements that the
            adapter holds and does not train.
        has_fused_kernels: whether it has Triton kernels of its own, which keep no masks.
        stops_before_last_product: whether a recomputed layer ends before its last frozen product, as the bare base's does.
        has_weight_penalty: whether a term of the loss depends on the trained tensors alone; its gradients wait for the others.
    """

    of_input: Callable[[Computation, int, int], float]
    of_module: Callable[[Computation, int, int], ModuleCosts]
    frozen_parameters: Callable[[AdapterSettings, LinearShapes, int], int]
    has_fused_kernels: bool = False
    stops_before_last_product: bool = False
    has_weight_penalty: bool = False


def no_frozen_parameters(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> int:
    return 0


def input_bytes_if_trained(at: Computation, d_in: int, num_modules: int) -> float:
    """For trained matrices that read the input: the input is kept, or its cast or dropped copy for each, and the masks."""
    return d_in * (at.width + at.mask_width) * (num_modules if at.is_input_copied else 1)


def input_bytes_if_frozen(at: Computation, d_in: int, num_modules: int) -> float:
    """For frozen matrices that read the input: only the masks are kept."""
    return d_in * at.mask_width * num_modules


def count_low_rank(adapter: AdapterSettings, shapes: LinearShapes, num_layers: int) -> dict[str, int]:
    """(d_in + d_out) r for each layer: A (r, d_in) and B (d_out, r), trained parameters by module kind."""
    return {kind: (d_in + d_out) * adapter.r * num_layers for kind, (d_in, d_out) in shapes.items()}


def low_rank(at: Computation, d_in: int, d_out: int, *, r: int) -> ModuleCosts:
    """LoRA's output, scaling * B A drop(x), added to the base's: A (r, d_in) and B (d_out, r) are trained."""
    products = r * (d_in + d_out)
    return ModuleCosts(
        kept=at.width * r,
        in_backward=0,
        products=products,
        backward_products=2 * products,
        moved=added_output(at, d_out) + dropped_input(at, d_in),
        weights=NO_COPIES,
    )


def added_output(at: Computation, d_out: int) -> float:
    """Bytes moved to scale an output and add it to the base's, which PEFT first clones where the base is in 4 bits."""
    return at.width * d_out * (5 + (2 if at.quantization == "nf4" else 0))


def dropped_input(at: Computation, d_in: int) -> float:
    """Bytes moved by dropout of an input: the input is read; the result and the mask are written."""
    return d_in * (2 * at.width + at.mask_width) if at.mask_width else 0
