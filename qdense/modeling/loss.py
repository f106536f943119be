"""The language-model loss without the logits of all tokens; qdense/ops/cross_entropy.py says how and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qdense.catalogs.families import FAMILIES
from qdense.compat.transformers import loss_computed_by
from qdense.ops.cross_entropy import linear_cross_entropy


@contextmanager
def without_logits(model: Any) -> Iterator[None]:
    """Within it, a call of the model with labels returns its loss without computing all logits; its `logits` are meaningless.

    The forward passes of the model and of PEFT run unchanged, except that the output layer returns its input, and the loss
    function, which Transformers allows to be set, does that layer's work. A model whose logits are not one linear
    map of the last hidden states (soft-capped ones, an output layer with a bias or in 4 bits), or whose family is unknown,
    keeps its own loss.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = core.get_output_embeddings()
    is_linear = (
        type(head) is nn.Linear
        and head.bias is None
        and core.config.model_type in FAMILIES
        and getattr(core.config, "final_logit_softcapping", None) is None
    )
    if not is_linear:
        yield
        return

    def loss_function(
        logits: Tensor, labels: Tensor, vocab_size: Any = None, num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        hidden = logits[:, :-1]  # each token predicts the next
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, labels[:, 1:].flatten(), num_items_in_batch)

    head.forward = _hand_through
    try:
        with loss_computed_by(core, loss_function):
            yield
    finally:
        del head.forward


def _hand_through(hidden: Tensor) -> Tensor:
    return hidden
