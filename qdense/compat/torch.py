"""What qdense uses of torch beyond its documented interface. Written for 2.11 to 2.13.

Used elsewhere, without a private name, and tested by tests/compat/test_torch.py:

- A non-reentrant checkpoint runs no further than the last saved tensor when it recomputes, and a custom function can read
  what another one saved, by its `grad_fn`: qdense/modeling/recompute.py, or a tiled MLP runs once more for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks


def is_seen_by_others(gradient: Tensor) -> bool:
    """Whether a gradient that a custom function receives, or the tensor of which it is a view, is referenced elsewhere.

    The counts are torch's; no documented function returns them. Without them, a gradient of the input could be
    overwritten while other code still reads it, or would always have to be copied: a hidden state for each
    adapted block.
    """
    base = gradient._base  # of a 3-D product: referenced by its view and by this variable
    unseen = _use_count_of_an_unseen_gradient()
    return gradient._use_count() > unseen or (base is not None and base._use_count() > 2)  # type: ignore[attr-defined]


@cache
def _use_count_of_an_unseen_gradient() -> int:
    """1 with torch 2.13; 2 with torch 2.11, which counts the Python object as well (seen on a GPU: each gradient was copied)."""
    counts: list[int] = []

    class Probe(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            counts.append(gradient._use_count())  # type: ignore[attr-defined]
            return gradient

    with torch.enable_grad():
        (2 * Probe.apply(torch.ones(1, requires_grad=True))).sum().backward()
    return counts[0]


def is_view(tensor: Tensor) -> bool:
    """Whether autograd tracks the tensor as a view of another.

    Without this, an adapter would write its output into a view in place, and autograd would copy gradients.
    """
    return tensor._is_view()


def checkpointed_inputs(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Any]) -> saved_tensors_hooks:
    """Within it, a non-reentrant checkpoint keeps its positional inputs as `pack` returns them until its backward.

    That the checkpoint saves them through the innermost hooks around it is not documented. Without it, the inputs of
    recomputed layers could not wait in host memory.
    """
    return saved_tensors_hooks(pack, unpack)


@contextmanager
def watched_operations(watch: Callable[[Any, list[Tensor], list[Tensor]], None]) -> Iterator[None]:
    """Within it, `watch` receives each operation (an OpOverload), its input tensors and its output tensors, in the backward
    pass too.

    torch's documented mode for function calls does not see the backward pass. Without this, no test on a CPU could compare
    a step's memory with its prediction.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            watch(func, tensors((args, kwargs)), tensors(result))
            return result

    with Watched():
        yield
