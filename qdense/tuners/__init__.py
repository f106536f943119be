"""The methods that PEFT does not have, as PEFT tuners. Importing this package makes them known to PEFT."""

from qdense.tuners.denselora import DenseLoraConfig, DenseLoraModel
from qdense.tuners.nora import NoraConfig, NoraModel
from qdense.tuners.red import RedConfig, RedModel

__all__ = ["DenseLoraConfig", "DenseLoraModel", "NoraConfig", "NoraModel", "RedConfig", "RedModel"]
