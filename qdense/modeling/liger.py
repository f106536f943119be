"""Liger's kernels for what of the base is not a linear layer: norms, rotary embeddings, SwiGLU."""

from __future__ import annotations

import importlib.util
from typing import Any

# Those whose training on Liger's kernels is tested here; the loss stays ours (qdense/modeling/loss.py).
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def why_no_liger(model_type: str) -> str | None:
    """The reason that a model of this type cannot have Liger's kernels; None if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return 'liger-kernel is not installed (pip install "qdense[cuda]")'
    if model_type not in _MODEL_TYPES:
        return f"Liger's kernels are known to be right for {', '.join(_MODEL_TYPES)}, not for {model_type}"
    return None


def use_liger(model: Any) -> None:
    """Give a loaded model (on CUDA, before its adapter) Liger's kernels.

    Liger's rotary embedding replaces Transformers' for all models of this type in this process.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True, model=model)
