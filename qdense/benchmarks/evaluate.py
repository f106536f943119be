"""Score a base model, an adapter, or both with the same decoding; keep every completion; go on where a killed run was.

Results lie beside what they are about: RUN/eval/<digest>/ for an adapter, runs/base-<model>/eval/<digest>/ for a bare base,
with <task>.jsonl (a line for each item), settings.json and summary.json. The digest covers all that could change a
completion (decoding, template, dtype, quantization, base, adapter, data, batch plan), so results never mix.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdense.benchmarks.generation import DECODINGS, Decoding, batches_left, generate, plan_batches
from qdense.benchmarks.results import average, score_task
from qdense.benchmarks.scoring import RULES
from qdense.benchmarks.tasks import Task, load_items
from qdense.cache import require_free_space, write_atomically
from qdense.data.sources import DataSet
from qdense.data.templates import template_named
from qdense.errors import AdapterError, EvaluationError
from qdense.events import Emit, EvaluationDone, EvaluationProgress, EvaluationStarted, Notice
from qdense.modeling.adapter import AdapterCard, find_adapter, load_adapter, read_card
from qdense.modeling.base import BaseModel, load_base
from qdense.provenance import package_versions
from qdense.recipe import ModelRecipe, recipe_from_tables


@dataclass(frozen=True)
class EvaluationRequest:
    """What `qdense evaluate` is asked for.

    Attributes:
        adapter: a run or an adapter's folder; None scores the bare base.
        model: `name`, `quantization` and `dtype` of the base, where they are not to be what the adapter recorded; for a bare
            base, at least its name.
        with_base: score the base too, before the adapter.
        limit: the first N items of each task; None is all.
        max_new_tokens: None is each task's own limit.
        batch_size: prompts at a time; None is the decoding's own.
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


def newest_run(runs_dir: Path) -> Path:
    """The run below `runs_dir` whose adapter was finished last. Raises AdapterError."""
    patterns = ("*/adapter/adapter_config.json", "*/*/adapter/adapter_config.json")
    finished = [path for pattern in patterns for path in runs_dir.glob(pattern)]
    if not finished:
        raise AdapterError(
            f"no finished run under {runs_dir}/: name one by --adapter RUN, or score a bare base by --model NAME"
        )
    return max(finished, key=lambda path: path.stat().st_mtime_ns).parent.parent


def evaluate(request: EvaluationRequest, emit: Emit) -> dict[str, Any]:
    """Run the evaluation; returns the summary of the adapter (or of the base, where it alone is scored).

    With `with_base`, the base's summary is its "base".

    Raises:
        QDenseError: whatever keeps it from starting.
    """
    data = {task.name: load_items(task, request.data_dir, emit) for task in request.tasks}
    folder = find_adapter(request.adapter) if request.adapter is not None else None
    card = read_card(folder) if folder is not None else None
    recipe = _model_recipe(request.model, card)
    base = load_base(recipe, lambda text: emit(Notice(text)), for_training=False)
    model: Any = base.model
    if folder is not None and card is not None:
        if card.fingerprint is None:
            emit(Notice(f"{folder}: has no qdense.json, so nothing tells whether {base.name} is its base", "warning"))
        model = load_adapter(base, folder, card)
    model.eval()
    columns = ("base", "adapter") if request.with_base and folder else (("adapter",) if folder else ("base",))
    template_name = card.template if card else "alpaca"
    emit(
        EvaluationStarted(
            title=str(request.adapter) if folder else f"base {base.name}",
            facts=(
                ("base", f"{base.name} ({recipe.quantization}, {recipe.dtype})"),
                ("decoding", f"{request.decoding.name}, template {template_name}"),
            ),
            tasks=tuple(data),
            columns=columns,
        )
    )
    summaries = {}
    for column in columns:
        is_bare = folder is not None and column == "base"
        with model.disable_adapter() if is_bare else contextlib.nullcontext():
            scored = _Evaluation(request, recipe, base, model, template_name, data, column,
                                 folder if column == "adapter" else None)  # fmt: skip
            summaries[column] = scored.run(emit)
    summary = dict(summaries[columns[-1]])
    if len(columns) > 1:
        summary["base"] = summaries["base"]
    emit(EvaluationDone(summary))
    return summary


def _model_recipe(asked: dict[str, str], card: AdapterCard | None) -> ModelRecipe:
    """How to load the base: what is asked for, on top of what the adapter recorded."""
    recorded = dict(card.model) if card else {}
    if "name" in asked:
        recorded.pop("revision", None)  # another place, another history
    tables = {"model": {**recorded, **asked}, "data": {"name": "wordproblems"}}
    return recipe_from_tables(tables, source="the model to evaluate").model


class _Evaluation:
    """One model (base or adapter) on all tasks of a request."""

    def __init__(
        self,
        request: EvaluationRequest,
        recipe: ModelRecipe,
        base: BaseModel,
        model: Any,
        template_name: str,
        data: dict[str, DataSet],
        column: str,
        adapter: Path | None,
    ) -> None:
        self.request, self.base, self.model, self.data, self.column = request, base, model, data, column
        self.template = template_named(template_name)
        on_gpu = base.device.type == "cuda"
        decoding = request.decoding
        self.batch_size = request.batch_size or (decoding.batch_size_cuda if on_gpu else decoding.batch_size_cpu)
        self.settings = {
            "model": base.name,
            "base_fingerprint": base.fingerprint,
            "adapter_sha256": _weights_digest(adapter) if adapter else None,
            "quantization": recipe.quantization,
            "dtype": recipe.dtype,
            "template": template_name,
            "decoding": {"name": decoding.name, "num_beams": decoding.num_beams, "do_sample": False},
            "max_new_tokens": {task.name: self._max_new_tokens(task) for task in request.tasks},
            "batch_size": self.batch_size,
            "limit": request.limit,
            "data_sha256": {name: rows.checksum for name, rows in data.items()},
            "task_versions": {task.name: task.version for task in request.tasks},
            "device": torch.cuda.get_device_name(base.device) if on_gpu else "CPU",
            "versions": package_versions(),
        }
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]
        if adapter is None:
            owner = Path("runs", f"base-{Path(base.name).name}")
        else:
            owner = adapter.parent if adapter.name == "adapter" else adapter
        self.adapter = adapter
        self.folder = owner / "eval" / digest

    def _max_new_tokens(self, task: Task) -> int:
        return self.request.max_new_tokens or task.max_new_tokens

    def run(self, emit: Emit) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        require_free_space(self.folder, 64 * 2**20, "the completions")
        write_atomically(self.folder / "settings.json", json.dumps(self.settings, indent=2) + "\n")
        scores = {task.name: self._run_task(task, emit) for task in self.request.tasks}
        summary = {
            **{
                key: self.settings[key]
                for key in (
                    "model",
                    "quantization",
                    "dtype",
                    "template",
                    "decoding",
                    "batch_size",
                    "limit",
                    "device",
                    "versions",
                )
            },
            "adapter": str(self.adapter) if self.adapter else None,
            "folder": str(self.folder),
            "tasks": scores,
            "average": average(scores),
        }
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _run_task(self, task: Task, emit: Emit) -> dict[str, Any]:
        rows = self.data[task.name].rows[: self.request.limit]
        path = self.folder / f"{task.name}.jsonl"
        done = _read_completions(path)
        prompts = [self.base.tokenizer(self.template.evaluation_prompt(row))["input_ids"] for row in rows]
        batches = plan_batches([len(ids) for ids in prompts], self.batch_size)
        num_generated, started = 0, time.monotonic()
        num_correct = dict.fromkeys(RULES, 0)

        def count(index: int) -> None:
            answers = task.answers.answers(done[index]["completion"])
            for rule in RULES:
                num_correct[rule] += task.answers.is_correct(rows[index].answer, answers[rule])

        def progress() -> None:
            took = time.monotonic() - started
            emit(
                EvaluationProgress(
                    task=task.name,
                    column=self.column,
                    num_done=len(done),
                    num_items=len(rows),
                    num_correct=dict(num_correct),
                    tokens_per_second=num_generated / took if num_generated else 0.0,
                )
            )

        for index in done:
            count(index)
        progress()
        with path.open("a", encoding="utf-8") as stream:
            for batch in batches_left(batches, set(done)):
                completions = generate(
                    self.base,
                    self.model,
                    [(i, prompts[i]) for i in batch],
                    self.request.decoding,
                    self._max_new_tokens(task),
                )
                for completion in completions:
                    num_generated += completion.num_tokens
                    if completion.index not in done:
                        done[completion.index] = completion.record()
                        count(completion.index)
                        stream.write(json.dumps(done[completion.index], ensure_ascii=False) + "\n")
                stream.flush()
                progress()
        texts = {index: [record["completion"]] for index, record in done.items()}
        result, _ = score_task(task, [row.answer for row in rows], texts)
        return result | {"num_truncated": sum(record["finish"] == "length" for record in done.values())}


def _read_completions(path: Path) -> dict[int, dict[str, Any]]:
    """Completions by index. A last line that a kill cut short is removed from the file; any other fault is an error."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole, newline, rest = content.rpartition(b"\n")
    if rest:
        path.write_bytes(whole + newline)
    records = {}
    # Split at line feeds alone: str.splitlines would also split at U+2028, which JSON leaves as it is.
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            record = json.loads(line)
            records[int(record["index"])] = {key: record[key] for key in ("index", "completion", "finish")}
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path}, line {number}: not a completion ({error!r}). Remove the file to start over."
            ) from None
    return records


def _weights_digest(adapter: Path) -> str:
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = adapter / name
        if not path.is_file():
            raise AdapterError(f"{adapter}: has no {name}")
        digest.update(path.read_bytes())
    return digest.hexdigest()
