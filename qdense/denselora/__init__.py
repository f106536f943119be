"""DenseLoRA as a PEFT method. Importing this package registers it, so that PEFT can create and load such adapters."""

from qdense.denselora.config import DENSELORA, DenseLoraConfig
from qdense.denselora.layer import DenseLoraLinear, SharedPair
from qdense.denselora.model import DenseLoraModel, register_denselora

register_denselora()

__all__ = ["DENSELORA", "DenseLoraConfig", "DenseLoraLinear", "DenseLoraModel", "SharedPair"]
