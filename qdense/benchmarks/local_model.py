"""Completions from a model that is loaded here: a base, with or without an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qdense.benchmarks.request import EvaluationRequest
from qdense.benchmarks.tasks import Task
from qdense.data.rows import Row
from qdense.data.templates import Template, prompt_ids, template_named
from qdense.device import device_name
from qdense.events import Emit, Notice
from qdense.inference.generation import Completion, Prompt, generate
from qdense.inference.loaded import LoadedModel
from qdense.modeling.adapter_files import weights_digest
from qdense.runs import RunFolder


class LocalModel:
    """A loaded model, with its adapter or as the bare base. See `qdense.benchmarks.completions.CompletionSource`."""

    def __init__(self, loaded: LoadedModel, request: EvaluationRequest, emit: Emit, *, with_adapter: bool) -> None:
        self.loaded, self.base, self.emit = loaded, loaded.base, emit
        base, recipe, decoding = loaded.base, loaded.recipe, request.decoding
        self.decoding = decoding
        asked = loaded.adapters.get("adapter")
        template = asked.template if asked else request.template
        adapter = asked.folder if asked and with_adapter else None
        self.adapter_name = "adapter" if adapter is not None else None
        self.templates = {
            task.name: template_named(template or task.template, base.tokenizer) for task in request.tasks
        }
        self.max_new_tokens = {task.name: request.max_new_tokens or task.max_new_tokens for task in request.tasks}
        self.batch_size = request.batch_size or self._planned_batch_size()
        if adapter is None:
            self.title, self.column, self.run = f"base {base.name}", "base", RunFolder.of_base(base.name)
        else:
            self.title, self.column, self.run = str(request.adapter), "adapter", RunFolder.of_adapter(adapter)
        self.settings = {
            "model": base.name,
            "base_fingerprint": base.fingerprint,
            "adapter_sha256": weights_digest(adapter) if adapter else None,
            "quantization": recipe.quantization,
            "dtype": recipe.dtype,
            "template": ", ".join(sorted({template.name for template in self.templates.values()})),
            "stop": sorted({marker for template in self.templates.values() for marker in template.stop}),
            "decoding": decoding.record(),
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "device": device_name(base.device),
        }
        # How the weights are stored depends on free memory and does not change results.
        self.session: dict[str, Any] = {
            "adapter": str(adapter) if adapter else None,
            "stored_as": base.stored_as,
            "batch_sizes": [self.batch_size],
        }
        self.facts: tuple[tuple[str, str], ...] = (
            ("base", f"{base.name} ({recipe.quantization}, {recipe.dtype})"),
            ("decoding", f"{decoding.name}, template {self.settings['template']}, {self.batch_size} at a time"),
        )

    def complete(self, task: Task, rows: Sequence[Row], wanted: Sequence[tuple[int, int]]) -> Iterator[Completion]:
        template: Template = self.templates[task.name]
        prompts = [
            Prompt(index, sample, prompt_ids(template, rows[index], self.base.tokenizer)) for index, sample in wanted
        ]
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
