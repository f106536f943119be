"""Where each byte of a training run goes, from shapes alone.

An optimizer step runs micro-batch by micro-batch; memory is highest in one of three moments of one:

    loss       the checkpoints of recomputed layers, everything that the others keep, and a slice of logits
    recompute  the checkpoints, one recomputed layer's activations, and the gradients that run through it
    backward   as for the loss, but for the logits: the gradients that run through the last kept layer

The last layers keep their activations and the first are recomputed, so that kept activations are gone when the first
recomputation needs room. Coefficients are counts of the tensors that autograd keeps, layer by layer, as written below;
tests/test_planning.py holds them to the tensors of real steps. Memory inside one operation is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qdense.catalogs.models import CatalogModel
from qdense.methods import METHODS
from qdense.ops.slices import logits_slice_tokens
from qdense.planning.parameters import count_parameters
from qdense.recipe import ModelRecipe, Recipe

# NF4 with double quantization: 4 bits, a byte for each 64 elements, and a float for each 256 of these bytes.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_INT8_BYTES = 1.0  # and a scale for each row, which is little
_OPTIMIZER_BYTES = {"paged_adamw_8bit": 2 * (1 + 4 / 256), "adamw_8bit": 2 * (1 + 4 / 256)}  # others: two fp32 moments
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_IN_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class Choice:
    """What the planner chooses: how a step is cut up, and what of it is computed twice or moved away.

    Attributes:
        micro_batch_size: rows of the greatest length that a forward pass may hold.
        recompute_layers: the first so many layers are computed again in the backward pass.
        offload: whether their inputs wait in host memory.
        mlp_tile_tokens: their MLP runs in tiles of so many tokens; None for all at once.
    """

    micro_batch_size: int
    recompute_layers: int
    offload: bool = False
    mlp_tile_tokens: int | None = None


@dataclass(frozen=True)
class Kernels:
    """What computes: on CUDA or not, the adapter by fused kernels or plain PyTorch, the rest by Liger's or Transformers'."""

    is_cuda: bool
    is_fused: bool
    has_liger: bool


@dataclass(frozen=True)
class Memory:
    """Bytes at the highest moment, by what they are for; `moment` is one of loss, recompute, backward."""

    moment: str
    breakdown: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return sum(self.breakdown.values())


def memory_of(recipe: Recipe, shape: CatalogModel, kernels: Kernels, choice: Choice) -> Memory:
    """The peak of a run as `recipe` and `choice` describe it. Raises ModelError for target modules that the model lacks."""
    tokens = choice.micro_batch_size * recipe.data.max_length
    layer = _Layer(recipe, shape, kernels)
    num_kept = shape.num_layers - choice.recompute_layers
    width = layer.width
    checkpoint = tokens * shape.hidden_size * width
    # Offloaded: one on its way out or in, one in use.
    num_checkpoints = min(2, choice.recompute_layers) if choice.offload else choice.recompute_layers
    checkpoints = num_checkpoints * checkpoint
    kept = num_kept * int(tokens * layer.saved())
    # The last hidden states, and the final norm's input.
    tail = tokens * shape.hidden_size * (width + layer.norm_width)

    slice_tokens = min(tokens, logits_slice_tokens(shape.vocab_size, kernels.is_cuda))
    # Logits in fp32 twice; the hidden states and their gradient.
    logits = slice_tokens * shape.vocab_size * 8 + tokens * shape.hidden_size * 2 * width
    is_tiled = choice.mlp_tile_tokens is not None
    in_mlp = shape.hidden_size * width if is_tiled else layer.saved_in_mlp()
    again = tokens * layer.saved(is_recomputed=True, has_tiled_mlp=is_tiled)
    # Backward through the MLP; or, tiled, through a tile and then the norm before it; and last through attention.
    passing = tokens * layer.passing()
    if choice.mlp_tile_tokens is not None:
        tile = min(tokens, choice.mlp_tile_tokens) * (layer.saved_in_mlp() + layer.passing())
        passing = max(tile, tokens * layer.passing_norm())
    after_mlp = again - tokens * (in_mlp + shape.hidden_size * layer.norm_width)
    recomputing = max((again, passing), (after_mlp, tokens * layer.passing_attention()), key=sum)
    unpacked = layer.dequantization_bytes
    moments = {"loss": (kept + tail, 0, logits, 0)}
    if choice.recompute_layers:
        moments["recompute"] = (int(recomputing[0]), int(recomputing[1]), 0, unpacked)
    if num_kept:
        # Of the last layer, what lies behind the MLP's product is free by the time that most gradients are there.
        freed = tokens * layer.freed_at_product()
        gradients = max(0.0, tokens * layer.passing() - freed)
        moments["backward"] = (kept, int(gradients), 0, unpacked)
    moment = max(moments, key=lambda name: sum(moments[name]))
    activations, passing, logits, unpacked = moments[moment]
    return Memory(
        moment,
        {
            **_static(recipe, shape),
            "checkpoints": checkpoints,
            "activations": activations,
            "passing_gradients": int(passing),
            "logits": logits,
            "dequantization": unpacked,
        },
    )


def base_bytes(model: ModelRecipe, shape: CatalogModel, *, unpacked: bool = False) -> tuple[int, int]:
    """The base's layers, and its embeddings with the output layer; `unpacked` counts NF4 weights in the compute dtype."""
    width = _width(model.dtype)
    linears = shape.num_layers * sum(d_in * d_out for d_in, d_out in shape.linear_shapes().values())
    per_element = {"nf4": NF4_BYTES, "int8": _INT8_BYTES, "none": float(width)}[model.quantization]
    if unpacked and model.quantization == "nf4":
        per_element = float(width)
    norms = (2 * shape.num_layers + 1) * shape.hidden_size * width
    tables = shape.vocab_size * shape.hidden_size * (1 if shape.has_tied_embeddings else 2) * width
    return int(linears * per_element) + norms, tables


def _static(recipe: Recipe, shape: CatalogModel) -> dict[str, int]:
    """What is there from the first step to the last."""
    width = _width(recipe.model.dtype)
    weights, tables = base_bytes(recipe.model, shape)
    adapter = recipe.adapter
    method = METHODS[adapter.method]
    trained = count_parameters(shape, adapter).trainable_parameters
    adapter_width = _width(adapter.dtype) if method.is_adapter else width
    has_masters = adapter.master_weights and adapter_width == 2
    gradient = 4 if has_masters else adapter_width
    moments = _OPTIMIZER_BYTES.get(recipe.training.optimizer, 8.0)
    return {
        "weights": weights,
        "embeddings_and_head": tables,
        "adapter": trained * adapter_width if method.is_adapter else 0,
        "gradients": trained * gradient,
        "optimizer": int(trained * (moments + (4 if has_masters else 0))),
    }


class _Layer:
    """Bytes for each token of one decoder layer."""

    def __init__(self, recipe: Recipe, shape: CatalogModel, kernels: Kernels) -> None:
        self.shape, self.kernels, self.recipe = shape, kernels, recipe
        adapter = recipe.adapter
        self.width = _width(recipe.model.dtype)
        self.norm_width = self.width if kernels.has_liger else 4  # Transformers' norm keeps an fp32 copy of its input
        self.targets = set(METHODS[adapter.method].targets(adapter))
        self.is_denselora = adapter.method.startswith("denselora")
        self.is_fused = kernels.is_fused and self.is_denselora
        has_dropout = "dropout" in METHODS[adapter.method].uses and adapter.dropout > 0
        # On CUDA a mask of PyTorch's is of bytes; on a CPU it is in the dtype of what it drops. The fused kernels keep none.
        self.adapter_width = _width(adapter.dtype) if METHODS[adapter.method].is_adapter else self.width
        self.mask = 0 if self.is_fused or not has_dropout else 1 if kernels.is_cuda else self.adapter_width
        largest = max(d_in * d_out for d_in, d_out in shape.linear_shapes().values())
        self.dequantization_bytes = largest * self.width if recipe.model.quantization == "nf4" else 0

    def saved(self, *, is_recomputed: bool = False, has_tiled_mlp: bool = False) -> float:
        """What autograd keeps of one layer until its backward pass."""
        shape, width = self.shape, self.width
        norms = 2 * shape.hidden_size * self.norm_width
        if is_recomputed and self.kernels.has_liger:
            norms -= shape.hidden_size * width  # the first one's input is the checkpoint
        # Without a mask, q, k, v and the output; sdpa with one (padded rows) has k and v repeated for each head.
        repeated = shape.kv_size if self.recipe.training.packing else shape.q_size
        attention = width * (2 * shape.q_size + 2 * repeated) + 4 * shape.num_heads
        adapters = self._adapters(self.targets - _IN_MLP)
        mlp = width * shape.hidden_size if has_tiled_mlp else self.saved_in_mlp()
        return norms + attention + adapters + mlp

    def saved_in_mlp(self) -> float:
        shape, width = self.shape, self.width
        # silu's input, its output, and what that is multiplied by; Liger computes the output again
        product = width * shape.intermediate_size * (2 if self.kernels.has_liger else 3)
        return product + self._adapters(self.targets & _IN_MLP)

    def _adapters(self, targets: set[str]) -> float:
        shapes, total = self.shape.linear_shapes(), 0.0
        for group in _SAME_INPUT:
            adapted = [kind for kind in group if kind in targets]
            if not adapted:
                continue
            total += self._input(shapes[adapted[0]][0], len(adapted))
            total += sum(self._output(shapes[kind][1]) for kind in adapted)
        return total

    def _input(self, d_in: int, num_readers: int) -> float:
        """Of the input that one or more adapters read: itself, or what dropout has left of it, and the mask."""
        method, width = self.recipe.adapter.method, self.adapter_width
        if method == "red":
            return 0.0
        copies = num_readers if self.mask and not self.is_denselora else 1  # DenseLoRA's share one
        kept = 0 if method in ("vera", "nora") else width  # what reads it is frozen
        return d_in * (kept + self.mask) * copies

    def _output(self, d_out: int) -> float:
        adapter, width = self.recipe.adapter, self.adapter_width
        if self.is_denselora:
            encodings = adapter.r * (3 * width + self.mask)  # before s, after it, mixed by M
            has_activation = adapter.method != "denselora-only-matrix" and adapter.activation != "none"
            return encodings + (0 if self.is_fused else d_out * ((width if has_activation else 0) + self.mask))
        # DoRA scales the sum of base and adapter, VeRA and RED what they add or change, output by output.
        outputs = {"dora": 2, "vera": 2, "red": 1}.get(adapter.method, 0)
        return width * (d_out * outputs + (0 if adapter.method in ("red", "full") else adapter.r))

    def freed_at_product(self) -> float:
        """What of a layer is free by the time that backward has reached the product in the MLP: down_proj's."""
        return self._adapters(self.targets & {"down_proj"})

    def passing(self) -> float:
        """Gradients and what is computed beside them while backward runs through an MLP, at most; measured, not derived."""
        hidden, wide = self.width * self.shape.hidden_size, self.width * self.shape.intermediate_size
        if self.is_fused or not self.mask:
            return 2.0 * wide + (hidden if self.is_fused else 0)
        return max(2.0 * wide, 1.25 * wide + 4.0 * hidden)

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


def _width(dtype: str) -> int:
    """Bytes of an element."""
    return 4 if dtype == "float32" else 2
