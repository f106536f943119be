"""Where each byte of a training run goes, from shapes alone.

An optimizer step runs micro-batch by micro-batch; memory peaks at one of four moments:

    forward    the checkpoints of recomputed layers, everything that the others keep, and the last module's working memory
    loss       the same, with a slice of logits in place of that working memory
    recompute  the checkpoints, one recomputed layer's activations, and the gradients that run through it
    backward   as in loss, with the gradients that run through the last kept layer in place of the logits

The last layers keep their activations and the first are recomputed, so that kept activations are gone when the first
recomputation needs room. Coefficients are counts of the tensors that autograd keeps, layer by layer: the base's as written
below, an adapter's as its method states them (`qdense.methods.costs`);
tests/planning/test_memory.py compares them with the tensors of real steps. Memory inside one operation is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qdense.catalogs.families import MLP_GROUPS, SAME_INPUT, why_not_packed
from qdense.catalogs.models import CatalogModel
from qdense.methods import METHODS
from qdense.methods.costs import Computation, WeightCosts
from qdense.ops.slices import logits_slice_tokens
from qdense.planning.parameters import count_frozen, count_parameters
from qdense.recipe import ModelRecipe, Recipe

# NF4 with double quantization: 4 bits, a byte for each 64 elements, and a float for each 256 of these bytes.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_INT8_BYTES = 1.0  # and a scale for each row, which is negligible
# Two moments of a parameter, in 8 bits with a scale for each 256, or in fp32.
_OPTIMIZER_BYTES = {
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_32bit": 8.0,
    "adamw_torch": 8.0,
}


@dataclass(frozen=True)
class StepLayout:
    """What the planner chooses: how a step is divided, and what is recomputed or offloaded.

    Attributes:
        micro_batch_size: rows of maximum length in one forward pass.
        recompute_layers: number of layers, from the first, that are recomputed in the backward pass.
        offload: whether the inputs of these layers wait in host memory.
        mlp_tile_tokens: tokens of a tile in which their MLP runs; None for all at once.
    """

    micro_batch_size: int
    recompute_layers: int
    offload: bool = False
    mlp_tile_tokens: int | None = None


@dataclass(frozen=True)
class Kernels:
    """The kernels in use: on CUDA or not, fused or plain PyTorch for the adapter, Liger's or Transformers' for the rest."""

    is_cuda: bool
    is_fused: bool
    has_liger: bool


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by purpose; `moment` is one of forward, loss, recompute, backward."""

    moment: str
    breakdown: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return sum(self.breakdown.values())


def memory_of(
    recipe: Recipe, shape: CatalogModel, kernels: Kernels, layout: StepLayout, *, num_shards: int = 1
) -> Memory:
    """The peak of a run as `recipe` and `layout` describe it.

    Args:
        num_shards: the processes among which the base is divided (training.shard).

    Raises:
        ModelError: the model lacks target modules.
    """
    tokens = layout.micro_batch_size * recipe.data.max_length
    layer = _Layer(recipe, shape, kernels)
    num_kept = shape.num_layers - layout.recompute_layers
    width = layer.width
    checkpoint = tokens * shape.hidden_size * width
    # Offloaded: one on its way out or in, one in use.
    num_checkpoints = min(2, layout.recompute_layers) if layout.offload else layout.recompute_layers
    checkpoints = num_checkpoints * checkpoint
    held = int(tokens * ((shape.num_layers - 1) * layer.held() + layer.held(is_first=True)))
    weights = layer.saved_weights()
    kept = num_kept * int(tokens * layer.saved() + weights)
    if num_kept == shape.num_layers:
        kept -= int(tokens * (layer.saved() - layer.saved(is_first=True)))
    # The last hidden states, and the final norm's input.
    tail = tokens * shape.hidden_size * (width + layer.norm_width)

    slice_tokens = min(tokens, logits_slice_tokens(shape.vocab_size, kernels.is_cuda))
    # Logits in fp32 twice, or fused, in the base's dtype once; the hidden states and their gradient.
    per_logit = width if kernels.is_fused else 8
    if not shape.has_sliced_loss:  # Transformers' own loss, of all tokens at once; measured
        slice_tokens, per_logit = tokens, 8 + 3 * width
    logits = slice_tokens * shape.vocab_size * per_logit + tokens * shape.hidden_size * 2 * width
    is_tiled = layout.mlp_tile_tokens is not None
    in_mlp = shape.hidden_size * width if is_tiled else layer.saved_in_mlp(is_recomputed=True)
    again = tokens * layer.saved(is_recomputed=True, has_tiled_mlp=is_tiled)
    # Backward through the MLP; or, tiled, through a tile and then the norm before it; and last through attention.
    passing, at_product = tokens * layer.passing(), tokens * layer.passing_product()
    if layout.mlp_tile_tokens is not None:
        largest = max(layer.passing(), layer.passing_product())
        tile = min(tokens, layout.mlp_tile_tokens) * (layer.saved_in_mlp(is_recomputed=True) + largest)
        passing, at_product = max(tile, tokens * layer.passing_norm()), 0
    after_mlp = again - tokens * (in_mlp + shape.hidden_size * layer.norm_width)
    in_forward, in_backward = (int(size) for size in layer.passing_weights())
    unpacked, hidden = layer.unpacked_in_backward, tokens * shape.hidden_size * width
    recomputing = max(
        (again, 0, in_forward),
        (again, hidden, in_backward),
        (again, passing, unpacked),
        (again, at_product, 0),
        (after_mlp, tokens * layer.passing_attention(), unpacked),
        key=sum,
    )
    # Activations, passing gradients, logits, copies of weights.
    moments = {"loss": (kept + tail, 0, logits, 0), "forward": (kept, 0, 0, in_forward)}
    if layout.recompute_layers:
        activations, gradients, copies = recomputing
        moments["recompute"] = (int(activations + weights), int(gradients), 0, int(copies))
    if num_kept:
        # What the last layer keeps after the MLP's product is free by the time most gradients exist.
        gradients = max(0.0, tokens * (layer.passing() - layer.freed_at_product()))
        passed = max((gradients, unpacked), (tokens * layer.passing_product(), 0), (hidden, in_backward), key=sum)
        moments["backward"] = (kept, int(passed[0]), 0, int(passed[1]))
    moment = max(moments, key=lambda name: sum(moments[name]))
    activations, passing, logits, copies = moments[moment]
    return Memory(
        moment,
        {
            **_static(recipe, shape, num_shards),
            "checkpoints": checkpoints,
            "activations": activations + held,
            "passing_gradients": int(passing),
            "logits": logits,
            "copies_of_weights": copies,
        },
    )


def base_bytes(model: ModelRecipe, shape: CatalogModel, *, unpacked: bool = False) -> tuple[int, int]:
    """The base's layers, and its embeddings with the output layer; `unpacked` counts NF4 weights in the compute dtype."""
    width = model.dtype_bytes
    per_element = {"nf4": NF4_BYTES, "int8": _INT8_BYTES, "none": float(width)}[model.quantization]
    if unpacked and model.quantization == "nf4":
        per_element = float(width)
    others = (shape.norm_parameters + shape.other_parameters) * width
    tables = shape.vocab_size * shape.hidden_size * (1 if shape.has_tied_embeddings else 2) * width
    return int(shape.linear_parameters * per_element) + others, tables


def _divided_bytes(model: ModelRecipe, shape: CatalogModel) -> int:
    """The part of the base that `training.shard` divides: its layers, without the scales of 4-bit weights."""
    layers, _ = base_bytes(model, shape)
    if model.quantization != "nf4":
        return layers
    return layers - int(shape.linear_parameters * (NF4_BYTES - 0.5))


def gathered_bytes(model: ModelRecipe, shape: CatalogModel, num_shards: int) -> int:
    """What a process receives from the others to compute all layers once."""
    return _divided_bytes(model, shape) * (num_shards - 1) // num_shards


def _static(recipe: Recipe, shape: CatalogModel, num_shards: int) -> dict[str, int]:
    """Memory in use from the first step to the last."""
    width = recipe.model.dtype_bytes
    weights, tables = base_bytes(recipe.model, shape)
    elsewhere = gathered_bytes(recipe.model, shape, num_shards)
    adapter = recipe.adapter
    method = METHODS[adapter.method]
    trained, frozen = count_parameters(shape, adapter).trainable_parameters, count_frozen(shape, adapter)
    adapter_width = adapter.dtype_bytes if method.is_adapter else width
    gradient = 4 if recipe.has_masters else adapter_width
    moments = _OPTIMIZER_BYTES[recipe.training.optimizer]
    return {
        "weights": weights - elsewhere,
        # Two whole layers: the one that computes, and the next.
        "gathered_layers": 2 * _divided_bytes(recipe.model, shape) // shape.num_layers if num_shards > 1 else 0,
        "embeddings_and_head": tables,
        "adapter": (trained + frozen) * adapter_width if method.is_adapter else 0,
        "gradients": trained * gradient * (2 if method.costs.has_weight_penalty else 1),
        "optimizer": int(trained * (moments + (4 if recipe.has_masters else 0))),
    }


def computation_of(recipe: Recipe, shape: CatalogModel, kernels: Kernels) -> Computation:
    """What the costs of the recipe's method depend on, besides shapes."""
    adapter, method = recipe.adapter.on(shape.model_type), METHODS[recipe.adapter.method]
    width = adapter.dtype_bytes if method.is_adapter else recipe.model.dtype_bytes
    has_dropout = "dropout" in method.adapter_keys and adapter.dropout > 0
    shapes = shape.linear_shapes()
    return Computation(
        adapter=adapter,
        shapes={kind: shapes[kind] for kind in method.targets(adapter) if kind in shapes},
        width=width,
        base_width=recipe.model.dtype_bytes,
        # PyTorch's dropout masks are bytes on CUDA; on a CPU they have the dtype of their input.
        mask_width=0 if not has_dropout else 1 if kernels.is_cuda else width,
        quantization=recipe.model.quantization,
        is_cuda=kernels.is_cuda,
        is_fused=kernels.is_fused and method.costs.has_fused_kernels,
    )


class _Layer:
    """Bytes of one decoder layer, for each token and independent of tokens."""

    def __init__(self, recipe: Recipe, shape: CatalogModel, kernels: Kernels) -> None:
        self.shape, self.kernels, self.recipe = shape, kernels, recipe
        self.width = recipe.model.dtype_bytes
        self.norm_width = self.width if kernels.has_liger else 4  # Transformers' norm keeps an fp32 copy of its input
        self.costs, self.computation = METHODS[recipe.adapter.method].costs, computation_of(recipe, shape, kernels)
        adapted = [self.computation.shapes.keys() & group for group in SAME_INPUT]
        self._first_group = next((index for index, kinds in enumerate(adapted) if kinds), 0)
        copy = self.width * max(d_in * d_out for d_in, d_out in shape.linear_shapes().values())
        quantization = recipe.model.quantization
        # bitsandbytes unpacks a quantized weight in backward; on a CPU an 8-bit one in forward too.
        self.unpacked_in_backward = 0 if quantization == "none" else copy
        self._unpacked_in_forward = copy if quantization == "int8" and not kernels.is_cuda else 0
        self._holds_inputs = quantization == "int8"

    def saved(self, *, is_recomputed: bool = False, has_tiled_mlp: bool = False, is_first: bool = False) -> float:
        """Bytes for each token that autograd keeps of one layer until its backward pass.

        Args:
            is_first: for the first layer, which keeps nothing before its first adapted modules: nothing earlier is trained.
        """
        before = self._before_groups()
        if is_recomputed and self.kernels.has_liger:
            before[0] -= self.shape.hidden_size * self.width  # its input is the checkpoint
        saved = sum(before[self._first_group + 1 :] if is_first else before)
        saved += sum(self._group(group, is_recomputed=is_recomputed) for group in SAME_INPUT)
        if has_tiled_mlp:
            saved += self.width * self.shape.hidden_size - self.saved_in_mlp(is_recomputed=True)
        return saved

    def _before_groups(self) -> list[float]:
        """What the operations before each group of modules keep: a norm, attention, a norm, the MLP's product."""
        shape, width, family = self.shape, self.width, self.shape.family
        norm = shape.hidden_size * self.norm_width * (family.num_norms if family else 2) / 2
        # Without a mask, q, k, v and the output; sdpa with one (padded rows) has k and v repeated for each head.
        is_packed = self.recipe.training.packing and why_not_packed(shape.model_type) is None
        repeated = shape.kv_size if is_packed else shape.q_size
        attention: float = width * (2 * shape.q_size + 2 * repeated) + 4 * shape.num_heads
        if family and family.norms_queries:
            attention += self.norm_width * (shape.q_size + shape.kv_size)
        if family and family.keeps_scores:
            # softmax in fp32, its copy in the base's dtype, and a soft cap's tanh
            attention += shape.num_heads * self.recipe.data.max_length * (4 + 2 * width)
        # silu's input, its output, and what that is multiplied by; Liger computes the output again
        product = width * shape.intermediate_size * (2 if self.kernels.has_liger else 3)
        product += 2 * width * shape.hidden_size * shape.experts_per_token  # a token's copies, sent out and coming back
        return [norm, attention, norm, product]

    def saved_in_mlp(self, *, is_recomputed: bool = False) -> float:
        return self._before_groups()[-1] + sum(self._group(group, is_recomputed=is_recomputed) for group in MLP_GROUPS)

    def _group(self, group: tuple[str, ...], *, is_recomputed: bool = False) -> float:
        """For modules that read the same input: what is kept of the input, and of what the adapted ones compute from it."""
        adapted = [self.computation.shapes[kind] for kind in group if kind in self.computation.shapes]
        if not adapted:
            return 0.0
        kept = self.costs.of_input(self.computation, adapted[0][0], len(adapted))
        if self._holds_inputs and not is_recomputed and not self.computation.is_input_copied:
            kept = 0.0  # the base holds it
        return kept + sum(self.costs.of_module(self.computation, *shape).kept for shape in adapted)

    def held(self, *, is_first: bool = False) -> float:
        """Bytes for each token that the frozen modules of one layer hold until the step's backward pass ends.

        bitsandbytes' 8-bit product keeps its input outside autograd, even in a recomputed layer (0.50).
        """
        shapes = self.shape.linear_shapes()
        groups = SAME_INPUT[self._first_group :] if is_first else SAME_INPUT
        inputs = (next((shapes[kind][0] for kind in group if kind in shapes), 0) for group in groups)
        return self.width * sum(inputs) if self._holds_inputs else 0.0

    def _weight_costs(self) -> list[WeightCosts]:
        return [self.costs.of_module(self.computation, *shape).weights for shape in self.computation.shapes.values()]

    def saved_weights(self) -> float:
        """Bytes that autograd keeps of one layer, independent of the number of tokens."""
        return sum(weights.kept for weights in self._weight_costs())

    def passing_weights(self) -> tuple[float, float]:
        """The most bytes of weight size that exist while one module computes: in forward, and in backward."""
        of_modules = self._weight_costs()
        forward = max((weights.in_forward for weights in of_modules), default=0)
        return max(self._unpacked_in_forward, forward), max((weights.in_backward for weights in of_modules), default=0)

    def freed_at_product(self) -> float:
        """Bytes of a layer that are free once backward has reached the MLP's product: down_proj's."""
        return self._group(MLP_GROUPS[1])

    def passing(self) -> float:
        """The most bytes of gradients and temporaries while backward runs through an MLP; measured, not derived."""
        hidden, wide = self.width * self.shape.hidden_size, self.width * self.shape.intermediate_size
        of_modules = [self.costs.of_module(self.computation, *shape) for shape in self.computation.shapes.values()]
        beside = max((module.in_backward for module in of_modules), default=0)
        if self.computation.is_fused or not self.computation.mask_width:
            return 2.0 * wide + (hidden if self.computation.is_fused else 0) + beside
        return max(2.0 * wide, 1.25 * wide + 4.0 * hidden) + beside

    def passing_product(self) -> float:
        """The same, through the MLP's product: its gradient and those of its factors."""
        hidden, wide = self.width * self.shape.hidden_size, self.width * self.shape.intermediate_size
        return max(0.0, 3.0 * wide + hidden - self.freed_at_product())

    def passing_norm(self) -> float:
        """The same, through a norm: Transformers' computes in fp32, one operation after the other."""
        return self.shape.hidden_size * (2.5 * self.width if self.kernels.has_liger else 4.5 * 4)

    def passing_attention(self) -> float:
        """The same, through attention: gradients of the residual, its output, q, k and v.

        On CUDA, flash attention sums the gradient of q in fp32 and, where heads share k and v, has theirs for each head
        (mha_varlen_bwd in the flash_api.cpp that torch builds in).
        """
        shape, width = self.shape, self.width
        gradients = width * (shape.hidden_size + 2.0 * shape.q_size + 2.0 * shape.kv_size)
        if not self.kernels.is_cuda:
            return gradients
        return gradients + 4 * shape.q_size + (0 if shape.kv_size == shape.q_size else 2 * width * shape.q_size)
