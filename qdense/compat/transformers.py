"""What qdense uses of Transformers beyond its documented interface. Written for 5.17 to 5.23.

Used elsewhere, without a private name, and tested by tests/compat/test_transformers.py:

- A cache is a list `layers`, made by `layer_class_to_replicate`, on which a model only calls `update`, and whose length is
  that of `keys`: qdense/inference/generation.py, or every token of a batch copies its whole cache.
- A registered attention function gets further arguments of the model's call, and no mask unless one is registered for it:
  qdense/modeling/packing.py, or packed rows see each other.
- A model computes its logits by its output layer's `forward`, once, and passes them to its loss: qdense/modeling/loss.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def attention_set_to(model: Any, name: str) -> Iterator[None]:
    """Within it, `model` attends by the registered implementation `name`.

    `set_attn_implementation` is documented, but the previous setting is private. Without it, a model would keep the
    attention for packed rows where rows are not packed.
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

    `loss_function` is a property that can be set, which is not documented. Without it, the loss would need the logits of
    all tokens.
    """
    previous = core.loss_function
    core.loss_function = loss_function
    try:
        yield
    finally:
        core.loss_function = previous


def is_recomputable(layer: Any) -> bool:
    """Whether Transformers can recompute this module in the backward pass, which only depends on its class."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(layer, GradientCheckpointingLayer)


def set_recomputed(layer: Any, is_recomputed: bool) -> None:
    """Set whether one layer, in a model with checkpointing enabled, is recomputed.

    Transformers documents all layers, or every n-th. Without this, `training.recompute` could not be a number of layers.
    """
    layer.gradient_checkpointing = is_recomputed


def checkpoint_function(layer: Any) -> Callable[..., Any]:
    """The function that calls a recomputed layer: `function(forward, hidden, *others)`, with the rest bound in `forward`."""
    function: Callable[..., Any] = layer._gradient_checkpointing_func
    return function


def replace_checkpoint_function(layer: Any, function: Callable[..., Any]) -> None:
    """Call the layer through `function` until checkpointing is next enabled or disabled.

    Transformers only documents keyword arguments for a model's checkpoint, the same for all layers. Without this, the
    inputs of recomputed layers could not wait in host memory.
    """
    layer._gradient_checkpointing_func = function
