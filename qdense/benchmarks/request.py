"""The request for an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qdense.benchmarks.endpoint import Endpoint
from qdense.benchmarks.tasks import Task
from qdense.inference.generation import DECODINGS, Decoding


@dataclass(frozen=True)
class EvaluationRequest:
    """What `qdense evaluate` should do.

    Attributes:
        adapter: a run or an adapter's folder; None scores the bare base, or the endpoint's model.
        model: `name`, `quantization` and `dtype` of the base, if they should differ from what the adapter recorded; for a
            bare base, at least its name.
        with_base: score the base too, before the adapter.
        limit: the first N items of each task; None is all.
        max_new_tokens: None is each task's own limit.
        batch_size: sequences (with beams: items) at a time; None for the decoding's own, or as many as fit the device.
        template: None is the adapter's, and for a bare base each task's own.
        clean: also score, separately, the items that are not in the training set.
        trained_on: that training set, a known name or a file; None is the run's own.
        endpoint: the model to ask instead of one that is loaded here.
        engine: what runs a model that is loaded here.
    """

    tasks: Sequence[Task]
    adapter: Path | None
    model: dict[str, str]
    with_base: bool
    decoding: Decoding = DECODINGS["beam4"]
    limit: int | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    data_dir: Path | None = None
    template: str | None = None
    clean: bool = False
    trained_on: str | None = None
    endpoint: Endpoint | None = None
    engine: Literal["qdense", "vllm"] = "qdense"
