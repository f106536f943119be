"""The events of a running job, as plain data. The job emits them, `ui` draws them and `training/metrics.py` writes them."""

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
    """Progress of a download; `total_bytes` is None if the server does not say."""

    name: str
    num_bytes: int
    total_bytes: int | None


@dataclass(frozen=True)
class TrainingStarted:
    """Training starts; `facts` are (label, value) pairs to show."""

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
        memory_bytes: the peak so far.
        seconds: of training so far, without pauses between resumed parts.
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
    """Validation loss after a step: the mean over all loss tokens."""

    step: int
    loss: float
    is_best: bool


@dataclass(frozen=True)
class Sampled:
    """What the model answers to one of training.sample_prompts after a step."""

    step: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class CheckpointSaved:
    step: int
    path: str


@dataclass(frozen=True)
class TrainingDone:
    """The adapter is saved; `kept_step` is the step that it comes from. The predicted memory is the plan's."""

    adapter_dir: str
    num_steps: int
    kept_step: int
    seconds: float
    peak_memory_bytes: int
    predicted_memory_bytes: int


@dataclass(frozen=True)
class EvaluationStarted:
    """`columns` are the models to score, in order ("base", "adapter"). All `tasks` may be a person's own (`are_own`): then the
    paper's way to read answers is of no interest."""

    title: str
    facts: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    are_own: bool = False


@dataclass(frozen=True)
class EvaluationProgress:
    """Items of one task that one model has completed, and how many of them each rule counts as right."""

    task: str
    column: str
    num_done: int
    num_items: int
    num_correct: dict[str, int] = field(default_factory=dict)
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class EvaluationDone:
    """The contents of summary.json."""

    summary: dict[str, Any]


@dataclass(frozen=True)
class CellChanged:
    """A cell of a sweep: a run, and its evaluation, at one learning rate with one seed.

    Attributes:
        key: tells cells apart.
        arm: what is trained; for a bare model, its name.
        stage: "search", "final" or "base".
        state: "training", "evaluating", "waiting" for another process that trains it, or how it ended: "trained", "evaluated",
            "stopped", "diverged", "failed".
        loss: the newest validation loss.
        text: why it failed.
    """

    key: str
    arm: str
    stage: str
    learning_rate: float | str
    seed: int
    state: str
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    text: str = ""


@dataclass(frozen=True)
class SweepProgress:
    """What is done and left of a sweep. `seconds_left` is None until a cell has ended."""

    num_done: int
    num_left: int
    num_failed: int
    seconds_left: float | None


Emit = Callable[[Any], None]


def ignore(event: Any) -> None:
    """An Emit that does nothing."""
