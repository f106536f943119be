"""Completions from a model that is loaded here: a base, with or without an adapter."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdense.inference.generation import Completion, Prompt, generate
from qdense.benchmarks.request import EvaluationRequest
from qdense.benchmarks.tasks import Task
from qdense.data.rows import Row
from qdense.data.templates import Template, check_template, prompt_ids, template_named
from qdense.device import device_name, memory_total
from qdense.errors import AdapterError, DataError, EvaluationError
from qdense.events import Emit, Notice
from qdense.modeling.adapter_files import AdapterCard, load_adapter, read_card
from qdense.modeling.load import BaseModel, load_base
from qdense.planning.generation import sequences_that_fit
from qdense.planning.shapes import shape_of_config
from qdense.recipe import ModelRecipe, recipe_from_tables
from qdense.runs import CARD_FILE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, RunFolder


@dataclass(frozen=True)
class LoadedModel:
    """A base in memory, and the adapter on it.

    Attributes:
        recipe: how the base was loaded.
        model: the PeftModel; the base's own without an adapter, or for a fully fine-tuned model.
        adapter: the adapter's folder; None for a bare base.
        template: the one that the adapter was trained with; None for a bare base.
    """

    recipe: ModelRecipe
    base: BaseModel
    model: Any
    adapter: Path | None
    template: str | None


def load_model(request: EvaluationRequest, adapter: Path | None, emit: Emit) -> LoadedModel:
    """Load the base that `request` names, or that the adapter in this folder was made for, and the adapter.

    Raises:
        QDenseError: one of them cannot be loaded, they do not belong together, or `with_base` is impossible.
    """
    card = read_card(adapter) if adapter is not None else None
    if card is not None and request.template is None:
        try:  # before anything large is loaded
            check_template(card.template)
        except DataError as error:
            raise AdapterError(f"{adapter}: {error}; choose another with --template") from None
    recipe = _model_recipe(request.model, card, f"{adapter}, its base" if card else "the model to evaluate")
    base = load_base(recipe, lambda text: emit(Notice(text)), for_training=False)
    model: Any = base.model
    if adapter is not None and card is not None:
        if card.fingerprint is None:
            emit(
                Notice(f"{adapter}: has no {CARD_FILE}, so it is not known whether {base.name} is its base", "warning")
            )
        model = load_adapter(base, adapter, card)
        if request.with_base and not hasattr(model, "disable_adapter"):
            raise EvaluationError(
                f"--with-base: {adapter} is a whole model ({card.method}), which is not separate from its base. Score the base "
                f"separately: qdense evaluate TASKS --model {base.name}"
            )
    model.eval()
    return LoadedModel(recipe, base, model, adapter, card.template if card else None)


def _model_recipe(asked: dict[str, str], card: AdapterCard | None, source: str) -> ModelRecipe:
    """How to load the base: as requested, else as the adapter recorded; `source` names it in errors."""
    recorded = dict(card.model) if card else {}
    if "name" in asked:
        recorded.pop("revision", None)  # a different folder may have a different history
    tables = {"model": {**recorded, **asked}, "data": {"name": "wordproblems"}}
    return recipe_from_tables(tables, source=source).model


class LocalModel:
    """A loaded model, with its adapter or as the bare base. See `qdense.benchmarks.completions.CompletionSource`."""

    def __init__(self, loaded: LoadedModel, request: EvaluationRequest, emit: Emit, *, with_adapter: bool) -> None:
        self.base, self.model, self.emit = loaded.base, loaded.model, emit
        base, recipe, decoding = loaded.base, loaded.recipe, request.decoding
        self.decoding = decoding
        self.hides_adapter = loaded.adapter is not None and not with_adapter
        adapter = loaded.adapter if with_adapter else None
        template = request.template or loaded.template
        self.templates = {
            task.name: template_named(template or task.template, base.tokenizer) for task in request.tasks
        }
        self.max_new_tokens = {task.name: request.max_new_tokens or task.max_new_tokens for task in request.tasks}
        self.batch_size = request.batch_size or self._planned_batch_size(recipe)
        if adapter is None:
            self.title, self.column, self.run = f"base {base.name}", "base", RunFolder.of_base(base.name)
        else:
            self.title, self.column, self.run = str(request.adapter), "adapter", RunFolder.of_adapter(adapter)
        self.settings = {
            "model": base.name,
            "base_fingerprint": base.fingerprint,
            "adapter_sha256": _weights_digest(adapter) if adapter else None,
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
        with self.model.disable_adapter() if self.hides_adapter else contextlib.nullcontext():
            yield from generate(
                self.base,
                self.model,
                prompts,
                self.decoding,
                max_new_tokens=self.max_new_tokens[task.name],
                stop=template.stop,
                end_token=template.end_token,
                batch_size=self.batch_size,
                smaller_batch=self._smaller_batch,
            )

    def _planned_batch_size(self, recipe: ModelRecipe) -> int:
        """As many as the decoding processes at a time, or as fit this device."""
        is_cuda = self.base.device.type == "cuda"
        most = self.decoding.batch_size_cuda if is_cuda else self.decoding.batch_size_cpu
        sequences = sequences_that_fit(
            recipe,
            shape_of_config(self.base.name, self.base.model.config.to_dict()),
            new_tokens=max(self.max_new_tokens.values()),
            is_cuda=is_cuda,
            memory_bytes=memory_total(self.base.device),
            most=most * self.decoding.num_beams,
        )
        return max(1, sequences // self.decoding.num_beams)

    def _smaller_batch(self, batch_size: int) -> None:
        self.emit(
            Notice(f"out of memory: continuing with {batch_size} at a time; finished completions are kept", "warning")
        )
        self.batch_size = batch_size
        self.session["batch_sizes"].append(batch_size)


def _weights_digest(adapter: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(adapter.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{adapter}: has no {PEFT_WEIGHTS_FILE}")
    for path in (*adapter.glob(PEFT_CONFIG_FILE), *files):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
