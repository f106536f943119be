"""qdense: DenseLoRA (arXiv:2505.23808) on 4-bit LLaMA models, on one consumer GPU.

    from qdense import DenseLoraConfig          # this also makes our methods known to PEFT
    model = get_peft_model(model, DenseLoraConfig(r=32, target_modules=["q_proj", "v_proj"]))

Heavy imports wait until they are needed, so that `qdense --help` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qdense.version import __version__

__all__ = [
    "DenseLoraConfig",
    "DenseLoraModel",
    "NoraConfig",
    "NoraModel",
    "QDenseError",
    "RedConfig",
    "RedModel",
    "__version__",
]

if TYPE_CHECKING:
    from qdense.errors import QDenseError
    from qdense.tuners import DenseLoraConfig, DenseLoraModel, NoraConfig, NoraModel, RedConfig, RedModel


def __getattr__(name: str) -> Any:
    if name == "QDenseError":
        from qdense.errors import QDenseError

        return QDenseError
    if name in __all__:
        import qdense.tuners

        return getattr(qdense.tuners, name)
    raise AttributeError(f"module 'qdense' has no attribute {name!r}")
