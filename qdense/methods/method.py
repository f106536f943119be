"""What qdense must know of an adaptation method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# Module kind -> (d_in, d_out), of the modules that are adapted.
LinearShapes = Mapping[str, tuple[int, int]]


class AdapterSettings(Protocol):
    """What a method may read of a recipe's [adapter] table."""

    @property
    def r(self) -> int: ...
    @property
    def scaling_alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def activation(self) -> str: ...
    @property
    def target_modules(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Method:
    """An adaptation method.

    Attributes:
        name: the value of `adapter.method`.
        build_config: [adapter] table -> PEFT configuration.
        count_parameters: (shapes of one layer, number of layers, r) -> trainable parameters by module kind.
        awake_at_start: whether the parameter of this name must have a gradient at step 1. The others are behind a
            matrix that starts at zero: they get theirs once it has moved, at step 3 at the latest, since linear warm-up
            makes the first update's learning rate 0.
    """

    name: str
    build_config: Callable[[AdapterSettings], Any]
    count_parameters: Callable[[LinearShapes, int, int], dict[str, int]]
    awake_at_start: Callable[[str], bool]
