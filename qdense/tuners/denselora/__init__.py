"""DenseLoRA as a PEFT method."""

from qdense.compat.peft import register
from qdense.tuners.denselora.config import DENSELORA, DenseLoraConfig
from qdense.tuners.denselora.layer import DenseLoraLinear, SharedPair
from qdense.tuners.denselora.model import DenseLoraModel

register(DENSELORA, DenseLoraConfig, DenseLoraModel)

__all__ = ["DENSELORA", "DenseLoraConfig", "DenseLoraLinear", "DenseLoraModel", "SharedPair"]
