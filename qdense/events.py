"""What a running job tells: the job emits these, `ui` draws them and `training/metrics.py` writes them. Plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Notice:
    """Something a person should read. `level` is "info" or "warning"."""

    text: str
    level: str = "info"


@dataclass(frozen=True)
class Download:
    """Bytes of a file that has come so far; `total_bytes` is None where the server does not say."""

    name: str
    num_bytes: int
    total_bytes: int | None


@dataclass(frozen=True)
class TrainingStarted:
    """What is about to be trained: `facts` are (label, value) pairs for a person."""

    title: str
    facts: tuple[tuple[str, str], ...]
    num_steps: int
    first_step: int
    memory_total_bytes: int
    memory_name: str  # "GPU" or "process"


@dataclass(frozen=True)
class StepDone:
    """One optimizer step.

    Attributes:
        memory_bytes: the most that was in use so far.
        seconds: trained so far, pauses between resumed parts left out.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    tokens_per_second: float
    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class ValidationProgress:
    """Validation batches done, of how many."""

    num_done: int
    num_batches: int


@dataclass(frozen=True)
class Validated:
    """Validation loss after a step: mean over all its loss tokens."""

    step: int
    loss: float
    is_best: bool


@dataclass(frozen=True)
class CheckpointSaved:
    step: int
    path: str


@dataclass(frozen=True)
class TrainingDone:
    """The adapter is saved. `kept_step` is the step it is from; the memory predicted is that of the plan."""

    adapter_dir: str
    num_steps: int
    kept_step: int
    seconds: float
    peak_memory_bytes: int
    predicted_memory_bytes: int


@dataclass(frozen=True)
class EvaluationStarted:
    """`columns` are the models that are scored, in order ("base", "adapter")."""

    title: str
    facts: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationProgress:
    """Items of one task done by one model so far, and how many of them count as right by each rule."""

    task: str
    column: str
    num_done: int
    num_items: int
    num_correct: dict[str, int] = field(default_factory=dict)
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class EvaluationDone:
    """The summary as it stands in summary.json."""

    summary: dict[str, Any]


Emit = Callable[[Any], None]


def ignore(event: Any) -> None:
    """Nobody is listening."""
