"""What qdense uses of bitsandbytes beyond its documented interface. Written for 0.50."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor


def never_repack(model: Any) -> None:
    """Keep the weights of 4-bit layers in `model` (or of `model` itself) as they were loaded. Call it before the first forward.

    On CPUs with AVX512-BF16 an eval forward repacks 4-bit weights in place, for a kernel without autograd. Without this, a
    training step after a validation would have wrong gradients, with only a warning; saving would lose bits; and a method
    that unpacks the base's weights itself would read wrong values.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def unpacked_weight(layer: Any) -> Tensor:
    """The values of a 4-bit layer's weight: (d_out, d_in).

    Their scales are in `weight.quant_state`, which no documented function returns. Without it, `qdense doctor` could not
    check a 4-bit layer against the product with its own weight.
    """
    from bitsandbytes.functional import dequantize_4bit

    unpacked: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return unpacked


def native_library() -> str | None:
    """The path of bitsandbytes' native library for this machine; None if none fits: then only its first call fails.

    The loaded library is `cextension.lib._lib`; where loading failed, `lib` is an object that raises when it is called.
    Without this, `qdense doctor` could not tell a missing library from one that computes wrongly.
    """
    from bitsandbytes import cextension

    library = getattr(cextension.lib, "_lib", None)
    return library._name if isinstance(library, ctypes.CDLL) else None
