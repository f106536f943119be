"""A base in memory with its adapters, and the conversation that each of them was trained on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdense.data.templates import check_template
from qdense.device import memory_total
from qdense.errors import AdapterError, DataError
from qdense.events import Emit, Notice
from qdense.modeling.adapter_files import AdapterCard, load_adapter, read_card
from qdense.modeling.load import BaseModel, load_base, on_device
from qdense.planning.generation import sequences_that_fit
from qdense.planning.shapes import shape_of_decoder
from qdense.recipe import ModelRecipe, model_recipe
from qdense.runs import CARD_FILE


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on the base.

    Attributes:
        peft_name: its name in the PeftModel. (PEFT allows no dots in one.)
        template: the prompt template it was trained with, or the one asked for.
        is_separate: whether the base can still answer without it; not so for a fully fine-tuned model.
    """

    folder: Path
    card: AdapterCard
    peft_name: str
    template: str
    is_separate: bool


@dataclass(frozen=True)
class LoadedModel:
    """A base in memory, and the adapters on it.

    Attributes:
        recipe: how the base was loaded.
        model: the PeftModel; the base's own without an adapter, or for a fully fine-tuned model.
        adapters: by the names they were given.
        lock: held by the thread for which the model answers, because which adapter is active is part of the model.
    """

    recipe: ModelRecipe
    base: BaseModel
    model: Any
    adapters: Mapping[str, LoadedAdapter]
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    @contextlib.contextmanager
    def answering(self, name: str | None) -> Iterator[None]:
        """While this is entered the model answers with the adapter of this name, or as the bare base (None), for this thread."""
        with self.lock, self._activated(name):
            yield

    @contextlib.contextmanager
    def _activated(self, name: str | None) -> Iterator[None]:
        if not any(adapter.is_separate for adapter in self.adapters.values()):
            assert name is not None or not self.adapters
            yield
        elif name is None:
            with self.model.disable_adapter():
                yield
        else:
            if self.model.active_adapter != (peft_name := self.adapters[name].peft_name):
                self.model.set_adapter(peft_name, inference_mode=True)
            yield

    def sequences_that_fit(self, *, new_tokens: int, most: int) -> int:
        """How many sequences, each with this many new tokens, fit this device's memory at a time, by the plan."""
        return sequences_that_fit(
            self.recipe,
            shape_of_decoder(self.base.name, self.base.model.config),
            new_tokens=new_tokens,
            is_cuda=self.base.device.type == "cuda",
            memory_bytes=memory_total(self.base.device),
            most=most,
        )


def load_model(
    adapters: Mapping[str, Path],
    emit: Emit,
    *,
    model: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> LoadedModel:
    """Load the base that `model` names, or that the adapters were made for, and the adapters.

    Args:
        adapters: their folders, by the names they are to have.
        model: `name`, `quantization`, `dtype` of the base, where they should differ from what the adapters recorded.
        template: used in place of the adapters' own.

    Raises:
        QDenseError: one of them cannot be loaded, or they do not belong together.
    """
    cards = {name: read_card(folder) for name, folder in adapters.items()}
    for name, card in cards.items():
        if template is None:
            try:  # before anything large is loaded
                check_template(card.template)
            except DataError as error:
                raise AdapterError(f"{adapters[name]}: {error}; choose another with --template") from None
    recipe = recipe_of_base(model or {}, [(folder, cards[name]) for name, folder in adapters.items()])
    base = load_base(recipe, lambda text: emit(Notice(text)), for_training=False)
    whole: Any = base.model
    peft_names = ["default", *(f"adapter{number}" for number in range(1, len(adapters)))]
    for (name, folder), peft_name in zip(adapters.items(), peft_names, strict=False):
        if cards[name].fingerprint is None:
            emit(Notice(f"{folder}: has no {CARD_FILE}, so it is not known whether {base.name} is its base", "warning"))
        beside = whole if peft_name != "default" else None
        whole = load_adapter(base, folder, cards[name], name=peft_name, beside=beside)
    whole.eval()
    is_separate = hasattr(whole, "disable_adapter")
    loaded = {
        name: LoadedAdapter(folder, cards[name], peft_name, template or cards[name].template, is_separate)
        for (name, folder), peft_name in zip(adapters.items(), peft_names, strict=False)
    }
    return LoadedModel(recipe, base, whole, loaded)


def recipe_of_base(asked: Mapping[str, Any], adapters: Sequence[tuple[Path, AdapterCard]]) -> ModelRecipe:
    """How to load the base: as requested, else as the adapters recorded. Raises QDenseError if these differ."""
    if not adapters:
        return on_device(model_recipe(asked, "the model to load"))
    recipes: list[tuple[Path, ModelRecipe]] = []
    for folder, card in adapters:
        recorded = dict(card.model)
        if "name" in asked:
            recorded.pop("revision", None)  # a different folder may have a different history
        recipes.append((folder, on_device(model_recipe({**recorded, **asked}, f"{folder}, its base"))))
    (first, recipe), *others = recipes
    for folder, other in others:
        differing = [key for key, value in recipe if getattr(other, key) != value]
        if differing:
            key = differing[0]
            raise AdapterError(
                f"{folder}: model.{key} = {getattr(other, key)!r}, but {getattr(recipe, key)!r} for {first}. "
                "Adapters that share a base must load it in the same way: use --model, --quantization or --dtype for all, or a "
                "server for each."
            )
    return recipe
