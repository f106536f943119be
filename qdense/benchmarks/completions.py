"""Completions of an evaluation: their source, and how they are stored.

Each completion is written before the next is counted, so an evaluation that was killed continues where it stopped and
completes nothing twice.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from qdense.benchmarks.request import EvaluationRequest
from qdense.benchmarks.results import parse_completion
from qdense.benchmarks.scoring import RULES
from qdense.benchmarks.tasks import Task
from qdense.cache import write_atomically
from qdense.data.rows import Row
from qdense.data.templates import prompt_ids, template_named
from qdense.errors import EvaluationError
from qdense.events import Emit, EvaluationProgress, Notice
from qdense.inference.generation import Completion, Prompt
from qdense.modeling.adapter_files import weights_digest
from qdense.modeling.load import BaseModel
from qdense.processes import first_alone, is_first, of_all, place
from qdense.provenance import git_hash
from qdense.recipe import ModelRecipe
from qdense.runs import EvaluationFolder, RunFolder


class CompletionSource(Protocol):
    """A model that completes prompts: loaded here (`LocalModel`) or behind an endpoint (`EndpointModel`).

    Attributes:
        title, facts: a description to show; facts are (label, value).
        column: its name in a table: "base", "adapter" or the endpoint's model.
        run: the folder for its evaluations.
        settings: everything about it that could change a completion; decides the evaluation's folder.
        session: facts of this session, which may change during it: batch sizes, retries, the server's name for its model.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    column: str
    run: RunFolder
    settings: dict[str, Any]
    session: dict[str, Any]

    def complete(self, task: Task, rows: Sequence[Row], wanted: Sequence[tuple[int, int]]) -> Iterator[Completion]:
        """The completions of the (index, sample) pairs, in any order."""
        ...


class OwnModel:
    """What the sources have in common whose model is loaded here: their names, prompts, and settings.

    Args:
        adapter: its folder; None for the bare base.
        template: None is each task's own.
    """

    def __init__(
        self,
        request: EvaluationRequest,
        base: BaseModel,
        recipe: ModelRecipe,
        adapter: Path | None,
        template: str | None,
    ) -> None:
        self.base, self.decoding = base, request.decoding
        self.templates = {
            task.name: template_named(template or task.template, base.tokenizer) for task in request.tasks
        }
        self.max_new_tokens = {task.name: request.max_new_tokens or task.max_new_tokens for task in request.tasks}
        if adapter is None:
            self.title, self.column, self.run = f"base {base.name}", "base", RunFolder.of_base(base.name)
        else:
            self.title, self.column, self.run = str(request.adapter), "adapter", RunFolder.of_adapter(adapter)
        self.settings: dict[str, Any] = {
            "model": base.name,
            "base_fingerprint": base.fingerprint,
            "adapter_sha256": weights_digest(adapter) if adapter else None,
            "quantization": recipe.quantization,
            "dtype": recipe.dtype,
            "template": ", ".join(sorted({template.name for template in self.templates.values()})),
            "stop": sorted({marker for template in self.templates.values() for marker in template.stop}),
            "decoding": request.decoding.record(),
            "max_new_tokens": self.max_new_tokens,
        }
        self.session: dict[str, Any] = {"adapter": str(adapter) if adapter else None}

    def prompts(self, task: Task, rows: Sequence[Row], wanted: Sequence[tuple[int, int]]) -> list[Prompt]:
        """The prompts of the (index, sample) pairs."""
        template = self.templates[task.name]
        return [
            Prompt(index, sample, prompt_ids(template, rows[index], self.base.tokenizer)) for index, sample in wanted
        ]


class CompletionStore:
    """The completions of one source in an evaluation's folder."""

    def __init__(self, folder: EvaluationFolder, source: CompletionSource, emit: Emit) -> None:
        self.folder, self.source, self.emit = folder, source, emit
        self.sessions = SessionLog(folder.sessions, source, emit)

    def complete(self, task: Task, rows: Sequence[Row], num_samples: int) -> dict[tuple[int, int], Completion]:
        """All completions of a task, by (index, sample): those on file, then the missing ones as they arrive.

        Raises:
            EvaluationError: the file is damaged, or the source fails; what is on file stays there.
        """
        path = self.folder.completions(task.name)
        done = first_alone(lambda: gathered_on_file(path))
        wanted = [(index, sample) for index in range(len(rows)) for sample in range(num_samples)]
        if foreign := sorted(done.keys() - set(wanted)):
            index, sample = foreign[0]
            raise EvaluationError(
                f"{path}: holds index {index}, sample {sample}, which was not asked for here. Remove the file to start over."
            )
        tally = _Tally(task, rows, self.source.column, len(wanted), self.emit)
        for completion in done.values():
            tally.count(completion)
        tally.tell()
        missing = [key for key in wanted if key not in done]
        if not missing:
            return done
        number, num_processes = place()
        share = _share_file(path, number) if number else path
        of_all(lambda: self._complete(task, rows, missing[number::num_processes], share, tally))
        return first_alone(lambda: gathered_on_file(path))

    def _complete(
        self, task: Task, rows: Sequence[Row], wanted: Sequence[tuple[int, int]], path: Path, tally: _Tally
    ) -> None:
        with path.open("a", encoding="utf-8") as stream:
            for completion in self.source.complete(task, rows, wanted):
                if is_first():
                    self.sessions.update()
                stream.write(_line(completion))
                stream.flush()
                tally.count(completion)
                tally.num_new_tokens += completion.num_tokens
                tally.tell()


class _Tally:
    """Progress of a task, correct answers so far, and the speed of new completions."""

    def __init__(self, task: Task, rows: Sequence[Row], column: str, num_items: int, emit: Emit) -> None:
        self.task, self.rows, self.column, self.num_items, self.emit = task, rows, column, num_items, emit
        self.started = time.monotonic()
        self.num_done = self.num_new_tokens = 0
        self.num_correct = dict.fromkeys(RULES, 0)

    def count(self, completion: Completion) -> None:
        self.num_done += 1
        answers, label = self.task.answers, self.rows[completion.index].answer
        for rule, answer in answers.answers(completion.completion).items():
            self.num_correct[rule] += answers.is_correct(label, answer)

    def tell(self) -> None:
        seconds = time.monotonic() - self.started
        self.emit(
            EvaluationProgress(
                task=self.task.name,
                column=self.column,
                num_done=self.num_done,
                num_items=self.num_items,
                num_correct=dict(self.num_correct),
                tokens_per_second=self.num_new_tokens / seconds if self.num_new_tokens else 0.0,
            )
        )


class SessionLog:
    """A file that lists each session of an evaluation that completed something, with the facts of that session.

    Attributes:
        sessions: with this one last, once it is listed.

    Raises:
        EvaluationError: the file is damaged.
    """

    def __init__(self, path: Path, source: CompletionSource, emit: Emit) -> None:
        self.path, self.source, self.emit = path, source, emit
        self.commit, self.started = git_hash(), datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self.sessions: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(self.sessions, list):
                raise TypeError("not a list")
            commits = {session["git_hash"] for session in self.sessions}
        except FileNotFoundError:
            self.sessions, commits = [], set()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EvaluationError(f"{path}: damaged ({error!r}). Remove {path.parent} to start over.") from None
        self.other_commits = sorted(map(str, commits - {self.commit}))
        self.num_earlier = len(self.sessions)

    def update(self) -> None:
        """Update the file. Call it before a completion is written."""
        now = {"started": self.started, "git_hash": self.commit, **copy.deepcopy(self.source.session)}
        if self.sessions[self.num_earlier :] == [now]:
            return
        if self.other_commits and len(self.sessions) == self.num_earlier:
            self.emit(
                Notice(
                    f"{self.path.parent}: holds completions made by qdense at {', '.join(self.other_commits)}; continuing at "
                    f"{self.commit}. Remove the folder to make all of them with one version",
                    "warning",
                )
            )
        self.sessions[self.num_earlier :] = [now]
        write_atomically(self.path, json.dumps(self.sessions, indent=2) + "\n")


def gathered_on_file(path: Path) -> dict[tuple[int, int], Completion]:
    """As `completions_on_file`, with those that other processes have written beside it. The first process makes one file of
    them, in the order of the items, so that the file does not depend on who completed what, and when."""
    shares = sorted(path.parent.glob(_share_file(path, "*").name))
    if not is_first():
        return completions_on_file(path)
    done = completions_on_file(path)
    for share in shares:
        done |= completions_on_file(share)
    in_order = dict(sorted(done.items()))
    if list(in_order) != list(done) or shares:
        write_atomically(path, "".join(map(_line, in_order.values())))
    for share in shares:
        share.unlink()
    return in_order


def _share_file(path: Path, number: int | str) -> Path:
    return path.with_name(f"{path.name}.process-{number}")


def _line(completion: Completion) -> str:
    return json.dumps(asdict(completion), ensure_ascii=False) + "\n"


def completions_on_file(path: Path) -> dict[tuple[int, int], Completion]:
    """The completions of earlier sessions, by (index, sample).

    A last line that was cut short when the process was killed is removed from the file.

    Raises:
        EvaluationError: the file is damaged otherwise.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole, newline, rest = content.rpartition(b"\n")
    if rest:
        os.truncate(path, len(whole + newline))
    done = {}
    # Split only at line feeds: str.splitlines also splits at U+2028, which JSON does not escape.
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
                f"{place}: not a completion as qdense writes them ({error}). Remove the file to start over."
            ) from None
        done[completion.index, completion.sample] = completion
    return done
