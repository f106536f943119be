"""What qdense must know about an adaptation method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from qdense.methods.costs import AdapterSettings, Costs, LinearShapes

if TYPE_CHECKING:  # importing the methods imports no torch
    from torch import Tensor


_MEASURED_HIDDEN_SIZE = 576  # SmolLM2-135M's
_WIDTH_EXPONENT = 0.781  # https://thinkingmachines.ai/blog/lora/, and get_lora_lr of its cookbook


class MethodSettings(BaseModel):
    """Settings of one method alone: the table [adapter.<method>] of a recipe. Each field's description says what is accepted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RankSchedule(Protocol):
    """What a method does to its weights after each optimizer step; its state makes resumes bit-exact."""

    def auxiliary_loss(self, model: Any, share: float) -> AbstractContextManager[None]:
        """Within it, the model adds this share of the method's own loss term to the text's loss: 1 / n for each of a step's
        n micro-batches, whose losses are summed; 0 in validation."""

    def step(self, model: Any, step: int) -> None:
        """Called after optimizer step `step` (1, 2, ...), before gradients are cleared."""

    def state(self, model: Any) -> tuple[dict[str, Tensor], Any]:
        """What a resumed run needs besides the weights: tensors by name, and any JSON value."""

    def restore(self, model: Any, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Restore the state."""

    def has_settled(self, model: Any, step: int) -> bool:
        """Whether the ranks are final; only then may weights be kept as the best."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """An adaptation method: everything that the rest of qdense knows about it.

    Fields that planning, loading and analysis use have no default, so that a method cannot forget one.

    Attributes:
        name: the value of `adapter.method`.
        summary: what it is, in one line.
        adapter_keys: the keys of [adapter] that it reads; others are noted, not refused, so that one recipe serves all methods.
        build_config: ([adapter] table, number of optimizer steps) -> PEFT configuration; None if PEFT is not used.
        count_parameters: ([adapter] table, shapes of one layer's target modules, number of layers) -> trainable parameters by
            module kind.
        costs: what it adds to a training step.
        quantizations: of the bases that it works on.
        peft_type: the `peft_type` of its adapter_config.json; None if PEFT is not used.
        size_keys: the keys of that file that are sizes of tensors: one larger than every saved tensor is refused on loading.
        reads_base_weights: whether its forward reads the base's weights, which must then stay in memory as they were loaded.
        factors: the last part of a trained tensor's name (but for PEFT's adapter name and ".weight") -> what analysis calls it.
        identifying_config: entries of its configuration that tell it from other methods of the same PEFT type.
        learning_rate: ([adapter] table) -> the best of a grid of half decades on SmolLM2-135M; see `default_learning_rate`.
        has_gradient_at_start: whether the parameter of this name must have a gradient at step 1. The others come before a
            matrix that starts at zero and get a gradient once it has moved: by step 3, since linear warm-up makes the first
            update's learning rate 0.
        targets: the module kinds that it adapts.
        settings: the type of its table [adapter.<name>], if it has one.
        why_not_quantized: the reason for missing quantizations.
        num_calibration_rows, calibrate: how many training rows it reads first, and what it does with them: ([adapter] table,
            PEFT configuration, base's model, batches of `input_ids` and `attention_mask`).
        prepare: mends what PEFT leaves broken in a new or loaded PeftModel.
        schedule: see `RankSchedule`.
        comparable_initial: (adapter_config.json, saved tensor's name, its initial value) -> the part of the initial value that
            the saved tensor can be compared with, for a method that drops ranks.
    """

    name: str
    summary: str
    adapter_keys: frozenset[str]
    build_config: Callable[[AdapterSettings, int], Any] | None
    count_parameters: Callable[[AdapterSettings, LinearShapes, int], dict[str, int]]
    costs: Costs
    quantizations: tuple[str, ...]
    peft_type: str | None
    size_keys: tuple[str, ...]
    reads_base_weights: bool
    factors: Mapping[str, str]
    learning_rate: Callable[[AdapterSettings], float]
    identifying_config: Mapping[str, Any] = field(default_factory=dict)
    has_gradient_at_start: Callable[[str], bool] = lambda name: True
    targets: Callable[[AdapterSettings], Sequence[str]] = lambda adapter: adapter.target_modules
    settings: type[MethodSettings] | None = None
    why_not_quantized: str = ""
    num_calibration_rows: Callable[[AdapterSettings], int] = lambda adapter: 0
    calibrate: Callable[[AdapterSettings, Any, Any, Sequence[Any]], None] = lambda adapter, config, model, batches: None
    prepare: Callable[[Any], None] = lambda model: None
    schedule: RankSchedule | None = None
    comparable_initial: Callable[[Mapping[str, Any], str, Any], Any] = lambda config, name, initial: initial

    def __post_init__(self) -> None:
        if not self.why_not_quantized and set(self.quantizations) != {"nf4", "int8", "none"}:
            raise TypeError(f"method {self.name}: why_not_quantized must say why it does not work on every base")
        if (self.build_config is None) != (self.peft_type is None):
            raise TypeError(f"method {self.name}: build_config and peft_type are both PEFT's, or both None")

    def default_learning_rate(self, adapter: AdapterSettings, hidden_size: int) -> float:
        """The learning rate if a recipe names none, to two digits.

        Measured on a model of hidden size 576 (tools/results/methods.md says how). A wider model needs a lower rate, so it is
        scaled as "LoRA Without Regret" (Thinking Machines, 2025) found for LoRA on Llama models. Not measured here on wider ones.
        """
        rate = self.learning_rate(adapter) * (_MEASURED_HIDDEN_SIZE / hidden_size) ** _WIDTH_EXPONENT
        return float(f"{rate:.1e}")

    def factor_of(self, name: str) -> str:
        """What a trained tensor is called: `factors` by the last part of its name, "...q_proj.lora_A.default.weight" being A."""
        parts = name.removesuffix(".weight").split(".") if self.is_adapter else name.split(".")
        return next((self.factors[part] for part in reversed(parts[-2:]) if part in self.factors), parts[-1])

    @property
    def is_adapter(self) -> bool:
        """Whether it adds tensors by PEFT, rather than training the base's."""
        return self.build_config is not None
