"""What is relied on in Transformers beyond its documented interface. Written against 5.17 to 5.23.

Relied on elsewhere, without a private name, and held by tests/compat/test_transformers.py:

- A cache is a list `layers`, made by `layer_class_to_replicate`, whose `update` is all that a model calls, and whose length
  is that of `keys`: qdense/benchmarks/generation.py, or every token of a batch copies its whole cache.
- A registered attention function gets what else the model is called with, and no mask where none is registered for it:
  qdense/modeling/packing.py, or packed rows see each other.
- A model computes its logits by its output layer's `forward`, once, and hands them to its loss: qdense/modeling/loss.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def attention_set_to(model: Any, name: str) -> Iterator[None]:
    """Within it, `model` attends by the registered implementation `name`.

    `set_attn_implementation` is documented; what was set before can only be read in private. Without this, a model would
    keep the attention for packed rows, in its validation too, which is not packed.
    """
    previous = model.config._attn_implementation
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name, f"Transformers did not take {name} as its attention"
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


@contextmanager
def loss_computed_by(core: Any, loss_function: Callable[..., Any]) -> Iterator[None]:
    """Within it, a call of `core` with labels takes its loss from `loss_function(logits=, labels=, num_items_in_batch=, ...)`.

    `loss_function` is a property that may be set, which is documented nowhere. Without it, the loss would need the logits
    of all tokens.
    """
    previous = core.loss_function
    core.loss_function = loss_function
    try:
        yield
    finally:
        core.loss_function = previous


def is_recomputable(layer: Any) -> bool:
    """Whether Transformers can recompute this module in the backward pass: it asks for nothing but the class."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(layer, GradientCheckpointingLayer)


def set_recomputed(layer: Any, is_recomputed: bool) -> None:
    """Say of one layer, in a model with checkpointing enabled, whether it is recomputed.

    Transformers documents all layers, or every n-th. Without this, `training.recompute` could not be a number of layers.
    """
    layer.gradient_checkpointing = is_recomputed


def checkpoint_function(layer: Any) -> Callable[..., Any]:
    """What a recomputed layer is called through: `function(forward, hidden, *others)`, the rest bound in `forward`."""
    function: Callable[..., Any] = layer._gradient_checkpointing_func
    return function


def replace_checkpoint_function(layer: Any, function: Callable[..., Any]) -> None:
    """Have the layer called through `function`, until checkpointing is next enabled or disabled.

    Transformers documents only that a model's checkpoint takes keyword arguments, the same for all layers. Without this, the
    inputs of recomputed layers could not wait in host memory.
    """
    layer._gradient_checkpointing_func = function
