"""Liger's kernels for the parts of the base that are not linear layers: norms, rotary embeddings, SwiGLU."""

from __future__ import annotations

from typing import Any


def use_liger(model: Any) -> None:
    """Give a loaded model (on CUDA, before its adapter) Liger's kernels, if `qdense.ops.kernels.why_no_liger` allows it.

    Liger's rotary embedding replaces Transformers' for all models of this type in this process. The loss stays ours
    (qdense/modeling/loss.py).
    """
    import liger_kernel.transformers as liger

    apply = getattr(liger, f"apply_liger_kernel_to_{model.config.model_type}")
    apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True, model=model)
