"""The methods that PEFT does not have, as PEFT tuners. Importing this package makes them known to PEFT."""

from qdense.tuners.denselora import DenseLoraConfig, DenseLoraModel

__all__ = ["DenseLoraConfig", "DenseLoraModel"]
