"""How long a micro-batch takes on a card, from shapes alone: compute, memory traffic, and launches by the host.

The products are counted exactly; the rest (share of the ceiling that a product reaches, passes over activations) is an
estimate that is good enough to choose between plans. The host's share is measured on one machine: an H200,
LLaMA-3-8B's shape, NF4, the fused adapter on five modules a layer. There a pass of 2,048 tokens without recomputation takes
0.18 s for the bare base and 0.39 s with the adapter, however idle the GPU; of 1,024 tokens with all layers recomputed, 0.39
and 0.63 s. On other hosts, and for other methods, it is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdense.catalogs.families import MLP_MODULES
from qdense.catalogs.models import CatalogModel
from qdense.methods import METHODS
from qdense.methods.costs import ModuleCosts
from qdense.planning.memory import NF4_BYTES, Kernels, StepLayout, computation_of, gathered_bytes
from qdense.recipe import Recipe


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        flops: measured bf16 FLOP/s of large matrix products.
        bandwidth: bytes per second of its memory.
        link: bytes per second to and from the host, each way.
        layer_seconds: host time to launch a layer of the base in forward; backward takes as long.
        module_seconds: host time to launch an adapted module's adapter, forward and backward.
    """

    name: str
    memory_bytes: int
    flops: float
    bandwidth: float
    link: float
    layer_seconds: float = 2.8e-3
    module_seconds: float = 1.3e-3


CARDS = {
    card.name: card
    for card in (
        Card("RTX 3090", 24 * 2**30, 71e12, 936e9, 20e9),
        Card("RTX 4090", 24 * 2**30, 165e12, 1008e9, 20e9),
        Card("H100", 80 * 2**30, 800e12, 3350e9, 50e9),
        Card("H200", 141 * 2**30, 800e12, 4800e9, 50e9),
    )
}
_REACHED = 0.9  # share of `flops` that products of this size reach
_ATTENTION_REACHED = 0.5
_BANDWIDTH_REACHED = 0.85


def card_named(device_name: str) -> Card | None:
    """The known card in a device's name ("NVIDIA GeForce RTX 4090")."""
    return next((card for card in CARDS.values() if card.name in device_name), None)


def forward_flops(shape: CatalogModel) -> tuple[float, float, float]:
    """FLOPs for a token in one forward pass: linear layers, output layer, attention for each token of context (causal)."""
    return 2.0 * shape.token_products, 2.0 * shape.vocab_size * shape.hidden_size, 2.0 * shape.q_size * shape.num_layers


def flops_per_token(shape: CatalogModel, context: float, recompute_layers: int, *, with_adapter: float = 0.0) -> float:
    """FLOPs for a token of a training step on a frozen base, whose weights need no gradient.

    With all layers recomputed: 6 N_linear + 4 N_head + 9 context hidden layers.

    Args:
        context: tokens of a row.
        with_adapter: its active parameters in all layers.
    """
    linear, head, attention = forward_flops(shape)
    again = recompute_layers / shape.num_layers
    # flash attention's backward is 2.5 times its forward
    return (2 + again) * linear + 2 * head + (3.5 + again) * attention * context + (6 + 2 * again) * with_adapter


def tokens_per_second(
    recipe: Recipe, shape: CatalogModel, kernels: Kernels, layout: StepLayout, card: Card, *, num_shards: int = 1
) -> float:
    """Predicted tokens per second of training, for full micro-batches. For `num_shards` see `memory_of`."""
    tokens = layout.micro_batch_size * recipe.data.max_length
    again = layout.recompute_layers / shape.num_layers
    modules = _module_costs(recipe, shape, kernels)
    linear, head, attention = forward_flops(shape)
    context = recipe.data.max_length
    products = (2 + again) * linear + 2 * head - again * 2 * shape.num_layers * _not_recomputed(recipe, shape)
    products += 2 * shape.num_layers * sum((1 + again) * each.products + each.backward_products for each in modules)
    of_weights = 2 * (3 + again) * shape.num_layers * sum(each.weights.products for each in modules)
    seconds = (tokens * products + of_weights) / (_REACHED * card.flops)
    seconds += tokens * (3.5 + again) * attention * context / (_ATTENTION_REACHED * card.flops)
    seconds += _moved(recipe, shape, kernels, layout, tokens) / (_BANDWIDTH_REACHED * card.bandwidth)
    if layout.offload:
        # Copies overlap with computation; only the excess costs time.
        copied = 2 * layout.recompute_layers * tokens * shape.hidden_size * recipe.model.dtype_bytes
        seconds = max(seconds, copied / card.link)
    if num_shards > 1:  # layers come from the other cards, by way of the host
        seconds = max(seconds, 2 * gathered_bytes(recipe.model, shape, num_shards) / card.link)
    # The host launches ahead of the device, so the slower of the two decides.
    return tokens / max(seconds, shape.num_layers * _launching(card, len(modules), again))


def _not_recomputed(recipe: Recipe, shape: CatalogModel) -> int:
    """Elements of a layer's last weight, if a recomputed layer ends before its product (4-bit products save nothing); else 0."""
    method, last = METHODS[recipe.adapter.method], MLP_MODULES[-1]
    is_left_out = method.costs.stops_before_last_product or last not in recipe.adapter.target_modules
    d_in, d_out = shape.linear_shapes().get(last, (0, 0))
    return d_in * d_out if is_left_out and recipe.model.quantization == "nf4" else 0


def _launching(card: Card, num_modules: int, again: float) -> float:
    """Host seconds for one layer, independent of the number of tokens.

    Recomputing a layer takes as long as forward and backward together, because autograd's hooks intercept every saved tensor.
    """
    return card.layer_seconds * (2 + 2 * again) + card.module_seconds * num_modules * (1 + again / 4)


def _module_costs(recipe: Recipe, shape: CatalogModel, kernels: Kernels) -> list[ModuleCosts]:
    """Of the adapted modules of one layer."""
    method, computation = METHODS[recipe.adapter.method], computation_of(recipe, shape, kernels)
    return [method.costs.of_module(computation, *module) for module in computation.shapes.values()]


def _moved(recipe: Recipe, shape: CatalogModel, kernels: Kernels, layout: StepLayout, tokens: int) -> float:
    """Bytes read and written besides the products' operands."""
    width, again = recipe.model.dtype_bytes, layout.recompute_layers / shape.num_layers
    shapes = shape.linear_shapes()
    passes = 2 + again
    moved = 0.0
    if recipe.model.quantization == "nf4":  # each pass unpacks each weight once, the tiled MLP for each tile
        tiles = -(-tokens // layout.mlp_tile_tokens) if layout.mlp_tile_tokens else 1
        elements = {kind: d_in * d_out for kind, (d_in, d_out) in shapes.items()}
        mlp = sum(elements.get(kind, 0) for kind in MLP_MODULES)
        unpacked = passes * (sum(elements.values()) + (tiles - 1) * mlp) - again * _not_recomputed(recipe, shape)
        moved += shape.num_layers * unpacked * (NF4_BYTES + width)
    # norms, rotary embeddings, silu and product, additions: reads and writes of one forward pass; backward about twice
    plain = 1 if kernels.has_liger else 3
    layer: float = width * plain * (10 * shape.hidden_size + 2 * shape.q_size + 3 * shape.intermediate_size)
    modules = _module_costs(recipe, shape, kernels)
    layer += sum(each.moved for each in modules)
    moved += shape.num_layers * (tokens * layer + sum(each.weights.moved for each in modules)) * (3 + again)
    # The slices of logits: fused, written once, read twice and overwritten once; else many times in fp32.
    moved += tokens * shape.vocab_size * (4 * width if kernels.is_fused else 60)
    return moved
