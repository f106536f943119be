"""Methods of our own, made known to PEFT."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


class PeftTypeName(str):
    """A PEFT type that is not in PEFT's own enum: PEFT asks for `.value`, hashes and compares it as the string."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


def register(peft_type: PeftTypeName, config: type[PeftConfig], tuner: Any) -> None:
    """Let PEFT create, save and load adapters of this type. Safe to call twice.

    Not `peft.utils.register_peft_method`: it refuses names that are missing from PEFT's own enum. A name of type str with
    `.value` in the same dictionaries is all that the rest of PEFT asks for.
    """
    registries: tuple[tuple[Any, Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    )
    for registry, entry in registries:
        registry[peft_type] = entry
