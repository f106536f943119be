"""Score a base model, an adapter, both, or a model behind an endpoint; keep every completion, and continue where a killed
evaluation stopped.

Results are stored in the adapter's run, or in runs/base-MODEL/ or runs/endpoint-MODEL/. `qdense.runs` lists
the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdense.benchmarks.completions import CompletionSource, CompletionStore
from qdense.benchmarks.endpoint import EndpointModel
from qdense.benchmarks.local_model import LocalModel
from qdense.benchmarks.request import EvaluationRequest
from qdense.benchmarks.results import Outcomes, average, read_completions, score_task
from qdense.benchmarks.scoring import RULES
from qdense.benchmarks.tasks import Task, load_items
from qdense.benchmarks.vllm_model import VllmModel
from qdense.cache import require_free_space, write_atomically
from qdense.data.contamination import overlaps
from qdense.data.rows import Row
from qdense.data.sources import DataSet, load_named_or_file, load_training_set
from qdense.errors import EvaluationError, QDenseError, counted
from qdense.events import Emit, EvaluationDone, EvaluationStarted, Notice, ignore
from qdense.inference.generation import Completion
from qdense.inference.loaded import load_model
from qdense.modeling.locate import locate_adapter
from qdense.processes import first_alone, is_first, join
from qdense.provenance import package_versions
from qdense.recipe import load_recipe
from qdense.runs import EvaluationFolder, RunFolder

__all__ = ["EvaluationRequest", "evaluate"]


def evaluate(request: EvaluationRequest, emit: Emit) -> dict[str, Any]:
    """Run the evaluation; returns the summary of the adapter, or of the base or endpoint if only that is scored.

    With `with_base`, the base's summary is its "base".

    Raises:
        QDenseError: it cannot start or finish.
    """
    join()
    if not is_first():  # of several processes, the first reports, scores and writes
        emit = ignore
    data = {task.name: load_items(task, request.data_dir, emit) for task in request.tasks}
    adapter = locate_adapter(request.adapter, lambda text: emit(Notice(text))) if request.adapter is not None else None
    if adapter is not None and is_first():
        _warn_of_trained_rows(request, adapter, data, emit)
    clean = _clean_items(request, adapter, data, emit) if request.clean else {}
    sources = first_alone(lambda: _completion_sources(request, adapter, data, emit))
    asked = sources[-1]
    columns = tuple(source.column for source in sources)
    are_own = all(isinstance(task.file, Path) for task in request.tasks)
    emit(EvaluationStarted(asked.title, asked.facts, tuple(data), columns, are_own))
    summaries = [_evaluate_one(request, source, data, clean, emit) for source in sources]
    summary = dict(summaries[-1])
    if len(summaries) > 1 and is_first():
        summary["base"] = summaries[0]
    emit(EvaluationDone(summary))
    return summary


@dataclass(frozen=True)
class ShownItem:
    """An item of a task and what the model answered; of several samples, the first."""

    index: int
    question: str
    expected: str
    completion: str
    is_right: bool


def shown_items(summary: Mapping[str, Any], task: Task, data_dir: Path | None, count: int) -> list[ShownItem]:
    """The first `count` items that the evaluation of this summary found wrong, then right ones. Raises QDenseError."""
    folder = EvaluationFolder(Path(summary["folder"]))
    rows = load_items(task, data_dir, ignore).rows
    outcomes = json.loads(folder.items.read_text(encoding="utf-8"))[task.name]
    is_right = dict(zip(outcomes["index"], outcomes["paper"], strict=True))
    completions = read_completions(folder.completions(task.name), len(is_right))
    order = sorted(is_right, key=lambda index: (is_right[index], index))[:count]
    return [
        ShownItem(index, rows[index].instruction, rows[index].answer, completions[index][0], bool(is_right[index]))
        for index in order
    ]


def _completion_sources(
    request: EvaluationRequest, adapter: Path | None, data: Mapping[str, DataSet], emit: Emit
) -> list[CompletionSource]:
    """The models to score, in order; the requested one is last."""
    if request.endpoint is not None:
        return [EndpointModel(request.endpoint, request.decoding, request.tasks, request.max_new_tokens)]
    if request.engine == "vllm":
        return [VllmModel(request, adapter, {name: each.rows for name, each in data.items()}, emit)]
    adapters = {} if adapter is None else {"adapter": adapter}
    loaded = load_model(adapters, emit, model=request.model, template=request.template)
    if request.with_base and adapter is not None and not loaded.adapters["adapter"].is_separate:
        raise EvaluationError(
            f"--with-base: {adapter} is a whole model ({loaded.adapters['adapter'].card.method}), which is not separate from its "
            f"base. Score the base separately: qdense evaluate TASKS --model {loaded.base.name}"
        )
    asked = LocalModel(loaded, request, emit, with_adapter=adapter is not None)
    if request.with_base and adapter is not None:
        return [LocalModel(loaded, request, emit, with_adapter=False), asked]
    return [asked]


def _warn_of_trained_rows(request: EvaluationRequest, adapter: Path, data: Mapping[str, DataSet], emit: Emit) -> None:
    """Report items of a person's own files on which the adapter was trained. (For benchmarks, training reports them.)"""
    own = [task.name for task in request.tasks if isinstance(task.file, Path)]
    recipe_file = RunFolder.of_adapter(adapter).recipe
    if not own or not recipe_file.is_file():
        return
    try:
        training = load_training_set(load_recipe(recipe_file).data, request.data_dir)
    except QDenseError:  # its data is no longer there
        return
    seen = {(row.instruction, row.input, row.messages) for row in training.rows}
    for name in own:
        rows = data[name].rows[: request.limit]
        if known := sum((row.instruction, row.input, row.messages) in seen for row in rows):
            emit(
                Notice(
                    f"{name}: of {counted(len(rows), 'item')}, {known:,} also in its training data: the score "
                    "says little about new questions. Keep a test file apart",
                    "warning",
                )
            )


def _clean_items(
    request: EvaluationRequest, adapter: Path | None, data: Mapping[str, DataSet], emit: Emit
) -> dict[str, list[int]]:
    """For each task, the items that are not in the training set."""
    recipe_file = RunFolder.of_adapter(adapter).recipe if adapter is not None else None
    if request.trained_on is not None:
        training = load_named_or_file(request.trained_on, request.data_dir, emit)
    elif recipe_file is not None and recipe_file.is_file():
        training = load_training_set(load_recipe(recipe_file).data, request.data_dir, emit)
    else:
        raise EvaluationError(
            "--clean: it is not known what this model was trained on; name the training set with --trained-on, for instance "
            "--trained-on math10k"
        )
    emit(Notice(f"looking for test items in {training.origin}"))
    return {name: overlap.clean_indices for name, overlap in overlaps(training, data).items()}


def _evaluate_one(
    request: EvaluationRequest,
    source: CompletionSource,
    data: Mapping[str, DataSet],
    clean: Mapping[str, Collection[int]],
    emit: Emit,
) -> dict[str, Any]:
    """Complete and score all tasks with one model; returns its summary. `clean` is empty if not requested."""
    settings = {
        **source.settings,
        "limit": request.limit,
        "data_sha256": {name: rows.checksum for name, rows in data.items()},
        "task_versions": {task.name: task.version for task in request.tasks},
        "versions": package_versions(),
    }
    folder = source.run.evaluation(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12])
    with folder.sole_writer():
        if is_first():
            require_free_space(folder.path, 64 * 2**20, "the completions")
            write_atomically(folder.settings, json.dumps(settings, indent=2) + "\n")
        store = CompletionStore(folder, source, emit)
        results, items = {}, {}
        for task in request.tasks:
            rows = data[task.name].rows[: request.limit]
            completions = store.complete(task, rows, request.decoding.num_samples)
            if not is_first():
                continue
            results[task.name], outcomes = _score(task, rows, completions, clean.get(task.name))
            items[task.name] = {"index": list(outcomes["paper"])} | {
                rule: [int(is_correct) for is_correct in outcomes[rule].values()] for rule in RULES
            }
        if not is_first():
            return {}
        write_atomically(folder.items, json.dumps(items) + "\n")
        summary = {
            **settings,
            "sessions": store.sessions.sessions,
            "column": source.column,
            "folder": str(folder.path),
            "tasks": results,
            "average": average(results),
        }
        write_atomically(folder.summary, json.dumps(summary, indent=2) + "\n")
        return summary


def _score(
    task: Task, rows: Sequence[Row], completions: Mapping[tuple[int, int], Completion], clean: Collection[int] | None
) -> tuple[dict[str, Any], Outcomes]:
    """As `score_task`, with how the completions ended."""
    texts: dict[int, list[str]] = {}
    for (index, _), completion in sorted(completions.items()):
        texts.setdefault(index, []).append(completion.completion)
    result, outcomes = score_task(task, [row.answer for row in rows], texts, clean=clean)
    endings = [completion.finish for completion in completions.values()]
    result["finish"] = {ending: endings.count(ending) for ending in sorted(set(endings))}
    result["num_truncated"] = endings.count("length")
    return result, outcomes
