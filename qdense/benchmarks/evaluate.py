"""Score a base model, an adapter, both, or a model behind an endpoint; keep every completion; go on where a killed run was.

Results lie beside what they are about: RUN/eval/<digest>/ for an adapter, runs/base-<model>/eval/<digest>/ for a bare base,
runs/endpoint-<model>/eval/<digest>/ for an endpoint's model. In each:

    settings.json    all that could change a completion (decoding, template, dtype, base, adapter, data, versions, ...); the
                     digest is of these, so results never mix
    <task>.jsonl     every completion, a line each
    sessions.json    each start that completed something: when, by which commit, with which batch sizes, by which server
    items.json       which items are right by which rule: what `qdense compare` pairs runs by
    summary.json     accuracies with their intervals; written last
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from qdense.benchmarks.endpoint import Endpoint, EndpointModel
from qdense.benchmarks.generation import DECODINGS, Completion, Decoding, Prompt, generate
from qdense.benchmarks.results import average, parse_completion, score_task
from qdense.benchmarks.scoring import RULES
from qdense.benchmarks.tasks import Task, load_items
from qdense.cache import locked, require_free_space, write_atomically
from qdense.data.contamination import overlaps
from qdense.data.rows import Row
from qdense.data.sources import DataSet, load_named_or_file, load_training_set
from qdense.data.templates import Template, template_named
from qdense.device import memory_total
from qdense.errors import AdapterError, DataError, EvaluationError
from qdense.events import Emit, EvaluationDone, EvaluationProgress, EvaluationStarted, Notice
from qdense.modeling.adapter_files import CARD_FILE, AdapterCard, find_adapter, load_adapter, read_card
from qdense.modeling.load import BaseModel, load_base
from qdense.planning.generation import sequences_that_fit
from qdense.planning.shapes import shape_of_config
from qdense.provenance import git_hash, package_versions
from qdense.recipe import ModelRecipe, load_recipe, recipe_from_tables


@dataclass(frozen=True)
class EvaluationRequest:
    """What `qdense evaluate` is asked for.

    Attributes:
        adapter: a run or an adapter's folder; None scores the bare base, or the endpoint's model.
        model: `name`, `quantization` and `dtype` of the base, where they are not to be what the adapter recorded; for a bare
            base, at least its name.
        with_base: score the base too, before the adapter.
        limit: the first N items of each task; None is all.
        max_new_tokens: None is each task's own limit.
        batch_size: sequences (with beams: items) at a time; None for the decoding's own, or as many as fit the device.
        template: None is the adapter's, and for a bare base each task's own.
        clean: score the items that the training set does not hold by themselves as well.
        trained_on: that training set, a known name or a file; None is the run's own.
        endpoint: the model to ask instead of one that is loaded here.
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


class Respondent(Protocol):
    """What completes prompts: a model that is loaded here, or one behind an endpoint.

    Attributes:
        column: what a table calls it: "base", "adapter" or the endpoint's model.
        owner: the folder that its results lie in.
        settings: all about it that could change a completion, and that makes its folder's digest.
        session: what else is told of this start, as it stands: batch sizes, the server's own name of its model, retries.
    """

    column: str
    owner: Path
    settings: dict[str, Any]
    session: dict[str, Any]

    def complete(self, task: Task, rows: Sequence[Row], wanted: Sequence[tuple[int, int]]) -> Iterator[Completion]:
        """The completions of the (index, sample) pairs, in any order."""
        ...


def newest_run(runs_dir: Path) -> Path:
    """The run below `runs_dir` whose adapter was finished last. Raises AdapterError."""
    patterns = (f"*/adapter/{CARD_FILE}", f"*/*/adapter/{CARD_FILE}")
    finished = [path for pattern in patterns for path in runs_dir.glob(pattern)]
    if not finished:
        raise AdapterError(
            f"no finished run under {runs_dir}/: name one by --adapter RUN, or score a bare base by --model NAME"
        )
    return max(finished, key=lambda path: path.stat().st_mtime_ns).parent.parent


def evaluate(request: EvaluationRequest, emit: Emit) -> dict[str, Any]:
    """Run the evaluation; returns the summary of the adapter (or of the base or endpoint, where it alone is scored).

    With `with_base`, the base's summary is its "base".

    Raises:
        QDenseError: whatever keeps it from starting.
    """
    data = {task.name: load_items(task, request.data_dir, emit) for task in request.tasks}
    folder = find_adapter(request.adapter) if request.adapter is not None else None
    clean = _clean_items(request, folder, data, emit) if request.clean else None
    respondents: list[Respondent]
    facts: tuple[tuple[str, str], ...]
    if request.endpoint is not None:
        endpoint_model = EndpointModel(request.endpoint, request.decoding, request.tasks, request.max_new_tokens)
        respondents = [endpoint_model]
        title, facts = f"{request.endpoint.model} at {endpoint_model.settings['endpoint']}", endpoint_model.facts
    else:
        respondents, title, facts = load_models(request, folder, emit)
    emit(EvaluationStarted(title, facts, tuple(data), tuple(respondent.column for respondent in respondents)))
    summaries = [_evaluate_one(request, respondent, data, clean, emit) for respondent in respondents]
    summary = dict(summaries[-1])
    if len(summaries) > 1:
        summary["base"] = summaries[0]
    emit(EvaluationDone(summary))
    return summary


def _clean_items(
    request: EvaluationRequest, folder: Path | None, data: dict[str, DataSet], emit: Emit
) -> dict[str, list[int]]:
    """Of each task, the items that the training set does not hold."""
    recipe_file = folder.parent / "recipe.toml" if folder is not None else None
    if request.trained_on is not None:
        training = load_named_or_file(request.trained_on, request.data_dir, emit)
    elif recipe_file is not None and recipe_file.is_file():
        training = load_training_set(load_recipe(recipe_file).data, request.data_dir, emit)
    else:
        raise EvaluationError(
            "--clean: nothing tells what this model was trained on; name the training set by --trained-on, for instance "
            "--trained-on math10k"
        )
    emit(Notice(f"looking for test items in {training.origin}"))
    return {name: overlap.clean_indices for name, overlap in overlaps(training, data).items()}


def load_models(
    request: EvaluationRequest, folder: Path | None, emit: Emit
) -> tuple[list[Respondent], str, tuple[tuple[str, str], ...]]:
    """The base, the adapter in `folder`, or both, as the request asks; with a title and facts for a person.

    Raises QDenseError.
    """
    card = read_card(folder) if folder is not None else None
    if card is not None and request.template is None:
        try:  # before anything large is loaded
            template_named(card.template)
        except DataError as error:
            raise AdapterError(f"{folder}: {error}; --template names another") from None
    recipe = _model_recipe(request.model, card, f"{folder}, its base" if card else "the model to evaluate")
    base = load_base(recipe, lambda text: emit(Notice(text)), for_training=False)
    model: Any = base.model
    if folder is not None and card is not None:
        if card.fingerprint is None:
            emit(Notice(f"{folder}: has no qdense.json, so nothing tells whether {base.name} is its base", "warning"))
        model = load_adapter(base, folder, card)
        if request.with_base and not hasattr(model, "disable_adapter"):
            raise EvaluationError(
                f"--with-base: {folder} is a whole model ({card.method}), which cannot be taken off its base. Score the base "
                f"by itself: qdense evaluate TASKS --model {base.name}"
            )
    model.eval()

    def local(adapter: Path | None) -> LocalModel:
        template = request.template or (card.template if card else None)
        bare = model.disable_adapter if folder is not None and adapter is None else contextlib.nullcontext
        return LocalModel(request, recipe, base, model, template, adapter, bare, emit)

    respondents: list[Respondent] = [local(folder)]
    if request.with_base and folder is not None:
        respondents.insert(0, local(None))
    asked = respondents[-1].settings
    facts = (
        ("base", f"{base.name} ({recipe.quantization}, {recipe.dtype})"),
        ("decoding", f"{request.decoding.name}, template {asked['template']}, {asked['batch_size']} at a time"),
    )
    return respondents, str(request.adapter) if folder else f"base {base.name}", facts


def _model_recipe(asked: dict[str, str], card: AdapterCard | None, source: str) -> ModelRecipe:
    """How to load the base: what is asked for, on top of what the adapter recorded; `source` names it in errors."""
    recorded = dict(card.model) if card else {}
    if "name" in asked:
        recorded.pop("revision", None)  # another place, another history
    tables = {"model": {**recorded, **asked}, "data": {"name": "wordproblems"}}
    return recipe_from_tables(tables, source=source).model


class LocalModel:
    """A base that is loaded here, with its adapter or without. See `Respondent`."""

    def __init__(
        self,
        request: EvaluationRequest,
        recipe: ModelRecipe,
        base: BaseModel,
        model: Any,
        template: str | None,
        adapter: Path | None,
        bare: Callable[[], contextlib.AbstractContextManager[Any]],
        emit: Emit,
    ) -> None:
        self.base, self.model, self.bare, self.emit = base, model, bare, emit
        self.decoding = decoding = request.decoding
        on_gpu = base.device.type == "cuda"
        self.templates = {task.name: template_named(template or task.template) for task in request.tasks}
        self.max_new_tokens = {task.name: request.max_new_tokens or task.max_new_tokens for task in request.tasks}
        self.batch_size = request.batch_size or self._planned_batch_size(recipe)
        if adapter is None:
            self.column, self.owner = "base", Path("runs", f"base-{Path(base.name).name}")
        else:
            self.column, self.owner = "adapter", adapter.parent if adapter.name == "adapter" else adapter
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
            "device": torch.cuda.get_device_name(base.device) if on_gpu else "CPU",
        }
        # How the weights are held changes no bit of a result, and depends on the memory that is free.
        self.session: dict[str, Any] = {
            "adapter": str(adapter) if adapter else None,
            "held_in": base.held_in,
            "batch_sizes": [self.batch_size],
        }

    def complete(self, task: Task, rows: Sequence[Row], wanted: Sequence[tuple[int, int]]) -> Iterator[Completion]:
        template: Template = self.templates[task.name]
        prompts = [
            Prompt(index, sample, self.base.tokenizer(template.evaluation_prompt(rows[index]))["input_ids"])
            for index, sample in wanted
        ]
        with self.bare():
            yield from generate(
                self.base,
                self.model,
                prompts,
                self.decoding,
                max_new_tokens=self.max_new_tokens[task.name],
                stop=template.stop,
                batch_size=self.batch_size,
                smaller_batch=self._smaller_batch,
            )

    def _planned_batch_size(self, recipe: ModelRecipe) -> int:
        """As many as the decoding takes at a time, or as fit this device."""
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
        self.emit(Notice(f"out of memory: going on with {batch_size} at a time; nothing finished is lost", "warning"))
        self.batch_size = batch_size
        self.session["batch_sizes"].append(batch_size)


def _weights_digest(adapter: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(adapter.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{adapter}: has no adapter_model.safetensors")
    for path in (*adapter.glob("adapter_config.json"), *files):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


# --- one respondent on all tasks --------------------------------------------------------------------------------------------


def _evaluate_one(
    request: EvaluationRequest,
    respondent: Respondent,
    data: dict[str, DataSet],
    clean: dict[str, list[int]] | None,
    emit: Emit,
) -> dict[str, Any]:
    settings = {
        **respondent.settings,
        "limit": request.limit,
        "data_sha256": {name: rows.checksum for name, rows in data.items()},
        "task_versions": {task.name: task.version for task in request.tasks},
        "versions": package_versions(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = respondent.owner / "eval" / digest
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, lambda: EvaluationError(f"{folder}: another process is at this evaluation. Wait for its end.")):
        require_free_space(folder, 64 * 2**20, "the completions")
        write_atomically(folder / "settings.json", json.dumps(settings, indent=2) + "\n")
        results, items = {}, {}
        sessions = _Sessions(folder / "sessions.json", respondent, emit)
        for task in request.tasks:
            rows = data[task.name].rows[: request.limit]
            done = _complete(task, rows, respondent, sessions, folder, request.decoding.num_samples, emit)
            texts = {
                index: [done[index, sample].completion for sample in range(request.decoding.num_samples)]
                for index in range(len(rows))
            }
            result, outcomes = score_task(
                task, [row.answer for row in rows], texts, clean=clean[task.name] if clean is not None else None
            )
            finishes = [completion.finish for completion in done.values()]
            result["finish"] = {finish: finishes.count(finish) for finish in sorted(set(finishes))}
            result["num_truncated"] = finishes.count("length")
            results[task.name] = result
            items[task.name] = {"index": list(outcomes["paper"])} | {
                rule: [int(is_correct) for is_correct in outcomes[rule].values()] for rule in RULES
            }
        write_atomically(folder / "items.json", json.dumps(items) + "\n")
        summary = {
            **settings,
            "sessions": sessions.listed,
            "column": respondent.column,
            "folder": str(folder),
            "tasks": results,
            "average": average(results),
        }
        write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


class _Sessions:
    """sessions.json: what is true of one start and not of another. A start that completes nothing is not listed."""

    def __init__(self, path: Path, respondent: Respondent, emit: Emit) -> None:
        self.path, self.respondent, self.emit = path, respondent, emit
        self.commit, self.started = git_hash(), datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self.listed: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(self.listed, list):
                raise TypeError("not a list")
            commits = {session["git_hash"] for session in self.listed}
        except FileNotFoundError:
            self.listed, commits = [], set()
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path}: damaged ({error!r}). Remove {path.parent} to start over.") from None
        self.others = sorted(commits - {self.commit})
        self.number = len(self.listed)

    def update(self) -> None:
        """Have the file say what is true now; called before a completion is filed."""
        now = {"started": self.started, "git_hash": self.commit, **copy.deepcopy(self.respondent.session)}
        if self.listed[self.number :] == [now]:
            return
        if self.others and len(self.listed) == self.number:
            self.emit(
                Notice(
                    f"{self.path.parent}: holds completions by qdense at {', '.join(map(str, self.others))}; going on at "
                    f"{self.commit}. Remove the folder to have all by one",
                    "warning",
                )
            )
        self.listed[self.number :] = [now]
        write_atomically(self.path, json.dumps(self.listed, indent=2) + "\n")


def _complete(
    task: Task,
    rows: Sequence[Row],
    respondent: Respondent,
    sessions: _Sessions,
    folder: Path,
    num_samples: int,
    emit: Emit,
) -> dict[tuple[int, int], Completion]:
    """All completions of a task, those on file first; each new one is on file before the next is counted."""
    path = folder / f"{task.name}.jsonl"
    done = stored_completions(path)
    wanted = [(index, sample) for index in range(len(rows)) for sample in range(num_samples)]
    num_generated, started = 0, time.monotonic()
    num_correct = dict.fromkeys(RULES, 0)

    def count(completion: Completion) -> None:
        for rule, answer in task.answers.answers(completion.completion).items():
            num_correct[rule] += task.answers.is_correct(rows[completion.index].answer, answer)

    def progress() -> None:
        took = time.monotonic() - started
        emit(
            EvaluationProgress(
                task=task.name,
                column=respondent.column,
                num_done=len(done),
                num_items=len(wanted),
                num_correct=dict(num_correct),
                tokens_per_second=num_generated / took if num_generated else 0.0,
            )
        )

    for completion in done.values():
        count(completion)
    progress()
    left = [key for key in wanted if key not in done]
    if left:
        with path.open("a", encoding="utf-8") as stream:
            for completion in respondent.complete(task, rows, left):
                sessions.update()
                done[completion.index, completion.sample] = completion
                stream.write(json.dumps(asdict(completion), ensure_ascii=False) + "\n")
                stream.flush()
                num_generated += completion.num_tokens
                count(completion)
                progress()
    return done


def stored_completions(path: Path) -> dict[tuple[int, int], Completion]:
    """Completions of an earlier start. A last line that a kill cut short is removed from the file; any other fault is an
    error."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole, newline, rest = content.rpartition(b"\n")
    if rest:
        os.truncate(path, len(whole + newline))
    done = {}
    # Split at line feeds alone: str.splitlines would also split at U+2028, which JSON leaves as it is.
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        place = f"{path}, line {number}"
        try:
            parse_completion(place, line.decode("utf-8"))
            completion = Completion(**json.loads(line))
            for key, kind in (("num_prompt_tokens", int), ("num_tokens", int), ("finish", str)):
                if not isinstance(getattr(completion, key), kind):
                    raise TypeError(f"{key} must be {'text' if kind is str else 'a whole number'}")
        except (EvaluationError, UnicodeDecodeError, TypeError) as error:
            raise EvaluationError(
                f"{place}: not a completion of ours ({error}). Remove the file to start over."
            ) from None
        done[completion.index, completion.sample] = completion
    return done
