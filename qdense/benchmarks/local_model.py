"""Completions from a model that is loaded here: a base, with or without an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qdense.benchmarks.completions import OwnModel
from qdense.benchmarks.request import EvaluationRequest
from qdense.benchmarks.tasks import Task
from qdense.data.rows import Row
from qdense.device import device_name
from qdense.events import Emit, Notice
from qdense.inference.generation import Completion, generate
from qdense.inference.loaded import LoadedModel
from qdense.processes import place


class LocalModel(OwnModel):
    """A loaded model, with its adapter or as the bare base. See `qdense.benchmarks.completions.CompletionSource`."""

    def __init__(self, loaded: LoadedModel, request: EvaluationRequest, emit: Emit, *, with_adapter: bool) -> None:
        asked = loaded.adapters.get("adapter")
        adapter = asked.folder if asked and with_adapter else None
        template = asked.template if asked else request.template
        super().__init__(request, loaded.base, loaded.recipe, adapter, template)
        self.loaded, self.emit = loaded, emit
        self.adapter_name = "adapter" if adapter is not None else None
        self.batch_size = request.batch_size or self._planned_batch_size()
        self.settings |= {"batch_size": self.batch_size, "device": device_name(self.base.device)}
        if (num_processes := place()[1]) > 1:
            self.session["num_processes"] = num_processes
        # How the weights are stored depends on free memory and does not change results.
        self.session |= {"stored_as": self.base.stored_as, "batch_sizes": [self.batch_size]}
        name, templates, recipe = self.base.name, self.settings["template"], loaded.recipe
        self.facts: tuple[tuple[str, str], ...] = (
            ("base", f"{name} ({recipe.quantization}, {recipe.dtype})"),
            ("decoding", f"{self.decoding.name}, template {templates}, {self.batch_size} at a time"),
        )

    def complete(self, task: Task, rows: Sequence[Row], wanted: Sequence[tuple[int, int]]) -> Iterator[Completion]:
        template, prompts = self.templates[task.name], self.prompts(task, rows, wanted)
        with self.loaded.answering(self.adapter_name):
            yield from generate(
                self.base,
                self.loaded.model,
                prompts,
                self.decoding,
                max_new_tokens=self.max_new_tokens[task.name],
                stop=template.stop,
                end_token=template.end_token,
                batch_size=self.batch_size,
                smaller_batch=self._smaller_batch,
            )

    def _planned_batch_size(self) -> int:
        """As many as the decoding processes at a time, or as fit this device."""
        is_cuda = self.base.device.type == "cuda"
        most = self.decoding.batch_size_cuda if is_cuda else self.decoding.batch_size_cpu
        sequences = self.loaded.sequences_that_fit(
            new_tokens=max(self.max_new_tokens.values()), most=most * self.decoding.num_beams
        )
        return max(1, sequences // self.decoding.num_beams)

    def _smaller_batch(self, batch_size: int) -> None:
        self.emit(
            Notice(f"out of memory: continuing with {batch_size} at a time; finished completions are kept", "warning")
        )
        self.batch_size = batch_size
        self.session["batch_sizes"].append(batch_size)
