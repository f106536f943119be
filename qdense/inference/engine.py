"""A loaded model that many clients share: requests enter and leave one batch at any token (continuous batching).

One thread runs the model. Requests for the same adapter share a batch; batches of several adapters take turns, a token each.
A prompt that is read pauses the others for the time it takes.
"""

from __future__ import annotations

import gc
import itertools
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qdense.data.rows import Message, refuse_half_characters
from qdense.data.templates import Template, chat_template_for, prompt_ids, template_named
from qdense.device import free_cache
from qdense.errors import DataError, EvaluationError, QDenseError
from qdense.inference.generation import (
    Completion,
    Decoding,
    Endings,
    Generation,
    Prompt,
    Running,
    Tokens,
    is_out_of_memory,
    recorder_for,
)
from qdense.inference.loaded import LoadedModel

_log = logging.getLogger(__name__)
Logprob = tuple[
    int, float, list[tuple[int, float]]
]  # a token, its log probability, and the likeliest tokens with theirs


class BusyError(QDenseError):
    """The queue of requests is full."""


class StoppedError(QDenseError):
    """The engine is stopping, or its thread has failed."""


@dataclass(frozen=True)
class Part:
    """The next piece of an answer. The last one has `finish`, as `Completion` does, or `error`.

    Attributes:
        text: what is new and cannot change any more; the parts' texts together are the completion.
        num_tokens: generated so far.
        logprobs: of the new tokens, if they were asked for.
    """

    text: str
    num_tokens: int
    finish: str | None = None
    error: str | None = None
    logprobs: tuple[Logprob, ...] = ()


@dataclass(eq=False)
class Request:
    """A prompt to complete.

    Attributes:
        model: an adapter's name; None is the bare base.
        template: decides what ends an answer; None: only EOS and `stop`.
        on_part: receives the parts, in the engine's thread: it must return at once.
    """

    input_ids: list[int]
    model: str | None
    decoding: Decoding
    max_new_tokens: int
    on_part: Callable[[Part], None]
    template: Template | None = None
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    is_cancelled: bool = field(default=False, init=False)


class Engine:
    """Completes requests until it is closed.

    Args:
        most_running: sequences in progress at a time; None is as many as fit this device.
        most_waiting: requests in the queue.
        max_length: tokens of a prompt and its answer; None is the model's own limit, at most 4,096.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        most_running: int | None = None,
        most_waiting: int = 256,
        max_length: int | None = None,
    ) -> None:
        self.loaded, self.most_waiting = loaded, most_waiting
        own = int(getattr(loaded.base.model.config, "max_position_embeddings", None) or 4096)
        self.max_length = min(own, max_length or 4096)
        self.most_running = most_running or loaded.sequences_that_fit(new_tokens=self.max_length, most=64)
        self._templates = {
            name: template_named(a.template, loaded.base.tokenizer) for name, a in loaded.adapters.items()
        }
        self._base_template = template_named(chat_template_for(loaded.base.tokenizer), loaded.base.tokenizer)
        self._numbers = itertools.count()
        self._waiting: deque[Request] = deque()
        self._batches: dict[str | None, _Batch] = {}
        self._change, self._tokenizing = threading.Condition(), threading.Lock()
        self._is_closing, self.failure = False, ""
        self._thread = threading.Thread(target=self._run, name="qdense-engine", daemon=True)
        self._thread.start()

    # --- what clients call -----------------------------------------------------------------------------------------------

    def template(self, model: str | None) -> Template:
        """The template of conversations with this adapter, or with the bare base (None)."""
        return self._base_template if model is None else self._templates[model]

    def conversation_ids(self, model: str | None, messages: Sequence[Message]) -> list[int]:
        """The prompt's tokens. Raises DataError if the model's template cannot express this conversation."""
        for message in messages:
            refuse_half_characters("a message", message.content)
        with self._tokenizing:
            return prompt_ids(self.template(model), messages, self.loaded.base.tokenizer)

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a text without a template. Raises DataError for half a character."""
        refuse_half_characters("the text", text)
        with self._tokenizing:
            return list(self.loaded.base.tokenizer(text)["input_ids"])

    def token_text(self, token: int) -> str:
        """A token's own text, a special one's too."""
        return str(self.loaded.base.tokenizer.decode([token]))

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            DataError: prompt and answer together are longer than `max_length`.
            BusyError: the queue is full.
            StoppedError: the engine takes no more requests.
        """
        length = len(request.input_ids)
        if not length:
            raise DataError("the prompt is empty")
        if length + request.max_new_tokens > self.max_length:
            raise DataError(
                f"the prompt has {length:,} tokens and the answer up to {request.max_new_tokens:,}; together at most "
                f"{self.max_length:,} are allowed"
            )
        with self._change:
            if self._is_closing or self.failure:
                raise StoppedError(self.failure or "the server is stopping")
            if len(self._waiting) >= self.most_waiting:
                raise BusyError(f"{self.most_waiting} requests are waiting already; try again later")
            self._waiting.append(request)
            self._change.notify_all()

    def cancel(self, request: Request) -> None:
        """Drop a request, of which no more parts are wanted. Its place is free after the next token."""
        request.is_cancelled = True

    def load(self) -> tuple[int, int]:
        """Sequences in progress, and requests waiting."""
        with self._change:
            return sum(len(batch.requests) for batch in self._batches.values()), len(self._waiting)

    def close(self) -> None:
        """Take no more requests, finish those there are, and end the thread."""
        with self._change:
            self._is_closing = True
            self._change.notify_all()
        self._thread.join()

    # --- the thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._waiting or self._is_busy() or self._is_closing)
                    if not self._waiting and not self._is_busy():
                        return
                    admitted = self._admit()
                self._round(admitted)
        except Exception as error:  # a bug: every client must hear of it
            _log.exception("the engine has failed")
            with self._change:
                self.failure = f"the server has failed: {type(error).__name__}: {error}"
                left = [*self._waiting, *(request for batch in self._batches.values() for request in batch.requests)]
                self._waiting.clear()
            for request in left:
                request.on_part(Part("", 0, error=self.failure))

    def _is_busy(self) -> bool:
        return any(batch.requests for batch in self._batches.values())

    def _admit(self) -> dict[str | None, list[Request]]:
        """Requests from the queue, as many as there are places, by model."""
        admitted: dict[str | None, list[Request]] = {}
        free = self.most_running - sum(len(batch.requests) for batch in self._batches.values())
        while self._waiting and free > 0:
            request = self._waiting.popleft()
            if not request.is_cancelled:
                admitted.setdefault(request.model, []).append(request)
                if request.model not in self._batches:
                    self._batches[request.model] = _Batch(self.loaded)
                free -= 1
        return admitted

    def _round(self, admitted: dict[str | None, list[Request]]) -> None:
        """One token for every sequence, after reading the prompts of those that are new."""
        for model, batch in self._batches.items():
            if not batch.requests and model not in admitted:
                continue  # it stays for its recorded steps
            with self.loaded.answering(model):
                try:
                    batch.take(admitted.get(model, ()), self._numbers)
                    batch.advance(self.most_running)
                except EvaluationError as error:
                    batch.fail(str(error))
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    self._retreat(batch)

    def _retreat(self, batch: _Batch) -> None:
        """After running out of memory: half as many sequences from now on. Those of this batch go on where they are."""
        if self.most_running == 1:
            batch.fail("out of memory with one sequence at a time")
        else:
            self.most_running = max(1, self.most_running // 2)
            _log.warning("out of memory: from now on %d sequences at a time", self.most_running)
        batch.restart()
        gc.collect()
        free_cache(self.loaded.base.device)


class _Batch:
    """The sequences in progress with one adapter, and whose they are."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.requests: dict[Request, tuple[Running, _Text]] = {}
        self.restart()

    def restart(self) -> None:
        """Begin again: every prompt is still to be read, with what has been written after it."""
        self.search = Tokens()
        base, model = self.loaded.base, self.loaded.model
        self.generation = Generation(base, model, self.search, recorder_for(base, model))
        for request, (running, text) in list(self.requests.items()):
            finish = running.endings.finish(running.tokens) if running.tokens else None
            if finish is not None:  # it ended just before memory ran out
                del self.requests[request]
                completion = running.endings.completion(running.prompt, running.tokens, finish)
                request.on_part(text.part(running, completion))
        self.unread = list(self.requests)

    def take(self, requests: Sequence[Request], numbers: Iterator[int]) -> None:
        """Add requests. Samples are drawn by the decoding's seed alone, so a repeated request has the same answer."""
        base = self.loaded.base
        for request in requests:
            stop, end_token = request.stop, None
            if request.template is not None:
                stop, end_token = (*request.template.stop, *stop), request.template.end_token
            endings = Endings(base, stop, request.max_new_tokens, end_token)
            running = Running(
                Prompt(next(numbers), 0, request.input_ids), request.decoding, endings, request.num_logprobs
            )
            running.generator = random.Random(f"{request.decoding.seed}:0:0")
            self.requests[request] = running, _Text(base.tokenizer, stop)
            self.unread.append(request)

    def advance(self, most_running: int) -> None:
        """One token for each sequence. Raises EvaluationError, or RuntimeError if memory runs out."""
        self._drop_cancelled()
        if new := self.unread[: max(0, most_running - len(self.search.sequences))]:
            begun = [self.requests[request][0] for request in new]
            self.search.take(begun)
            self.generation.read(
                [replace(each.prompt, input_ids=each.prompt.input_ids + each.tokens) for each in begun]
            )
            self.unread = self.unread[len(new) :]
        if not self.search.sequences:
            return
        completions = {completion.index: completion for completion in self.generation.choose()}
        for request, (running, text) in list(self.requests.items()):
            if len(running.tokens) == text.num_tokens:  # not read yet
                continue
            completion = completions.get(running.prompt.index)
            if completion is not None:
                del self.requests[request]
            request.on_part(text.part(running, completion))
        self.generation.forward()

    def fail(self, reason: str) -> None:
        """Answer all requests with an error."""
        for request, (running, _) in self.requests.items():
            request.on_part(Part("", len(running.tokens), error=reason))
        self.requests.clear()
        self.restart()

    def _drop_cancelled(self) -> None:
        gone = {self.requests.pop(request)[0] for request in list(self.requests) if request.is_cancelled}
        self.unread = [request for request in self.unread if request in self.requests]
        if gone:
            self.generation.keep([row for row, each in enumerate(self.search.sequences) if each not in gone])


class _Text:
    """The text of a sequence as it grows, without what may still change: half a character, or the beginning of a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(filter(None, stop))
        self._decoded = ""  # all of it
        self._start, self._read = 0, 0  # tokens from which decoding starts again, and those whose text is in `_decoded`
        self._num_sent = 0  # characters
        self.num_tokens = 0

    def part(self, running: Running, completion: Completion | None) -> Part:
        """What is new since the last call; all that is left, with a completion."""
        tokens, before, self.num_tokens = running.tokens, self.num_tokens, len(running.tokens)
        logprobs = tuple(
            (token, *recorded) for token, recorded in zip(tokens[before:], running.logprobs[before:], strict=False)
        )
        if completion is not None:
            text = completion.completion[self._num_sent :]
            return Part(text, len(tokens), completion.finish, logprobs=logprobs)
        # A token's text depends on its neighbours: decode a few tokens before the new ones with and without these.
        old = self._decode(tokens[self._start : self._read])
        new = self._decode(tokens[self._start :])
        if len(new) > len(old) and not new.endswith("\ufffd"):
            self._decoded += new[len(old) :]
            self._start, self._read = self._read, len(tokens)
        end = len(self._decoded) - self._num_held()
        text = self._decoded[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return Part(text, len(tokens), logprobs=logprobs)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _num_held(self) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        return next(
            (
                length
                for length in range(min(longest, len(self._decoded)), 0, -1)
                if any(stop.startswith(self._decoded[-length:]) for stop in self._stop)
            ),
            0,
        )
