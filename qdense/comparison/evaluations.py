"""Evaluations from the files of `qdense evaluate`, read and checked."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdense.benchmarks.scoring import RULES
from qdense.errors import EvaluationError
from qdense.runs import EvaluationFolder, RunFolder, find_evaluation
from qdense.schema import flattened

# Settings that say which model and items were scored. The others say how, which must be the same within a group.
_NOT_HOW = {"model", "base_fingerprint", "adapter_sha256", "limit", "data_sha256", "task_versions", "versions"}
_BY_TASK = ("max_new_tokens", "data_sha256", "task_versions")


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation.

    Attributes:
        run: the folder as given.
        folder: of the evaluation's files.
        recipe: the run's recipe.toml; None for a bare base, or an adapter that was not trained here.
        outcomes: task -> rule -> index of an item -> 1 if it was right, else 0.
    """

    run: str
    folder: Path
    settings: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    outcomes: Mapping[str, Mapping[str, Mapping[int, int]]]

    @property
    def seed(self) -> int | None:
        return self.recipe["training"]["seed"] if self.recipe is not None else None

    @property
    def is_base(self) -> bool:
        return self.settings["adapter_sha256"] is None

    def how(self, tasks: Sequence[str]) -> dict[str, Any]:
        """The settings that decide the completions on `tasks`, apart from base, adapter and data."""
        how = {key: value for key, value in self.settings.items() if key not in _NOT_HOW}
        return how | {"max_new_tokens": {task: self.settings["max_new_tokens"][task] for task in tasks}}

    def recipe_without_seed(self) -> dict[str, Any] | None:
        """Everything that decided the adapter except its seed, training rows included, by key ("adapter.r"); None if unknown."""
        if self.recipe is None or self.is_base:
            return None
        tables = {key: value for key, value in self.recipe.items() if key not in ("output", "provenance")}
        values = {key: value for key, value in flattened(tables).items() if key != "training.seed"}
        rows = self.recipe.get("provenance", {}).get("data", {}).get("sha256")
        return values | {"data.sha256": rows}


def load_evaluation(path: Path) -> Evaluation:
    """Read an evaluation.

    Args:
        path: a run (for its newest finished evaluation), an adapter's folder, runs/base-MODEL, or the evaluation's own
            folder, RUN/eval/DIGEST.

    Raises:
        EvaluationError: there is none, or it is unfinished, from an older version of qdense, or damaged.
    """
    folder = find_evaluation(path)
    for file, why in (
        (folder.settings, f"has no {folder.settings.name}, so it is not known what was scored"),
        (folder.summary, "was not finished"),
        (folder.items, f"was made by an older version of qdense and has no {folder.items.name}"),
    ):
        if not file.is_file():
            raise EvaluationError(f"{folder.path}: this evaluation {why}. {_again(folder)}")
    settings = _read(folder, folder.settings, _checked_settings)
    outcomes = _read(folder, folder.items, _checked_items)
    missing = [task for task in outcomes if any(task not in settings[key] for key in _BY_TASK)]
    if missing:
        raise EvaluationError(
            f"{folder.path}: {folder.settings.name} does not mention {missing[0]} of {folder.items.name}. {_again(folder)}"
        )
    run = folder.run or RunFolder(folder.path)
    return Evaluation(str(path), folder.path, settings, _read_recipe(run.recipe), outcomes)


def _again(folder: EvaluationFolder) -> str:
    """How to redo the evaluation in this folder."""
    subject = f"--adapter {folder.run.path if folder.run else 'RUN'}"
    try:
        settings = json.loads(folder.settings.read_text(encoding="utf-8"))
        if settings["adapter_sha256"] is None:
            endpoint = f"--endpoint {settings['endpoint']} " if "endpoint" in settings else ""
            subject = f"{endpoint}--model {settings['model']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return f"Run `qdense evaluate TASKS {subject}` again, with the same options; the completions that exist are kept."


def _read(folder: EvaluationFolder, file: Path, checked: Callable[[Any], Any]) -> Any:
    try:
        return checked(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"{file}: damaged ({error!r}). {_again(folder)}") from None


def _checked_settings(settings: Any) -> Any:
    for key in ("model", "base_fingerprint", "adapter_sha256", *_BY_TASK):
        settings[key]
    for key in _BY_TASK:
        settings[key].items()
    return settings


def _checked_items(items: Any) -> dict[str, dict[str, dict[int, int]]]:
    if not items:
        raise ValueError("no task")
    outcomes: dict[str, dict[str, dict[int, int]]] = {}
    for task, columns in items.items():
        indices = columns["index"]
        if len(set(indices)) < len(indices) or not all(type(index) is int for index in indices):
            raise ValueError(f"{task}: an index appears twice, or is not a whole number")
        outcomes[task] = {rule: dict(zip(indices, columns[rule], strict=True)) for rule in RULES}
        if not all(set(by_index.values()) <= {0, 1} for by_index in outcomes[task].values()):
            raise ValueError(f"{task}: an outcome is neither 0 nor 1")
    return outcomes


def _read_recipe(path: Path) -> dict[str, Any] | None:
    # Not load_recipe, because what the recipe names (a model's folder, a method of another version) may no longer exist.
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
        recipe["adapter"]["method"], recipe["adapter"]["r"], recipe["training"]["seed"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvaluationError(f"{path}: not a run's recipe ({error!r}). Restore it, or remove it.") from None
    return recipe
