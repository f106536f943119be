"""A model behind an OpenAI-compatible server, with zero-shot chain of thought, as in the paper's ChatGPT row.

Each item is one chat message: the problem as in the test file, then "Let's think step by step." (Kojima et al. 2022,
arXiv:2205.11916). The answer is read from the reply by the same two rules as from any completion; for reasoning, look at
`strict`, since `paper` takes the first option mentioned. The prompts of the published row are not known.

The key comes from OPENAI_API_KEY, is sent to the server, and is not written anywhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qdense.benchmarks.tasks import Task
from qdense.data.rows import Row
from qdense.errors import EvaluationError
from qdense.inference.generation import Completion, Decoding
from qdense.runs import RunFolder

KEY_VARIABLE = "OPENAI_API_KEY"
CHAIN_OF_THOUGHT = "Let's think step by step."
# Reasoning is longer than the answers that a fine-tuned model writes.
MAX_NEW_TOKENS = 512
TIMEOUT_SECONDS = 120.0  # for one request
NUM_RETRIES = 6  # after 0.5, 1, 2, 4, 8, 8 seconds, or as the server's Retry-After says


@dataclass(frozen=True)
class Endpoint:
    """A server and one of its models.

    Attributes:
        url: of its API, for instance http://localhost:8000/v1; a bare host gets /v1.
        model: the model's name there.
        concurrency: simultaneous requests.
    """

    url: str
    model: str
    concurrency: int = 8


class EndpointModel:
    """The model of an endpoint. See `qdense.benchmarks.completions.CompletionSource`.

    Raises:
        EvaluationError: the address is invalid, or these servers do not support the decoding.
    """

    def __init__(
        self, endpoint: Endpoint, decoding: Decoding, tasks: Sequence[Task], max_new_tokens: int | None
    ) -> None:
        if decoding.num_beams > 1:
            raise EvaluationError("--endpoint: these servers have no beam search; use --decoding greedy or sample")
        self.endpoint, self.decoding = endpoint, decoding
        self.max_new_tokens = max_new_tokens or MAX_NEW_TOKENS
        self.column = endpoint.model.rstrip("/").rpartition("/")[2] or endpoint.model  # the name in "owner/name"
        self.run = RunFolder.of_endpoint(endpoint.model)
        self._key = _checked_key(os.environ.get(KEY_VARIABLE, ""))
        url = _checked_url(endpoint.url)
        self.settings: dict[str, Any] = {
            "model": endpoint.model,
            "endpoint": url,
            "prompt": f"{{instruction}}\n\n{CHAIN_OF_THOUGHT}",
            "template": "chat, zero-shot chain of thought",
            "decoding": decoding.record(),
            "base_fingerprint": None,
            "adapter_sha256": None,
            "max_new_tokens": {task.name: self.max_new_tokens for task in tasks},
        }
        self.title = f"{endpoint.model} at {url}"
        self.facts: tuple[tuple[str, str], ...] = (
            ("endpoint", url),
            ("key", f"from {KEY_VARIABLE}" if self._key else f"none ({KEY_VARIABLE} is not set)"),
            ("decoding", f"{decoding.name}, {self.settings['template']}, {endpoint.concurrency} requests at a time"),
        )
        self.session: dict[str, Any] = {"served_models": [], "num_retries": 0}
        self._limit_name = "max_tokens"

    def complete(self, task: Task, rows: Sequence[Row], wanted: Sequence[tuple[int, int]]) -> Iterator[Completion]:
        """The completions of the (index, sample) pairs, as they arrive.

        Raises:
            EvaluationError: a request failed permanently. Completions in progress are awaited and yielded first.
        """
        import httpx2 as httpx
        from openai import AsyncOpenAI

        from qdense.benchmarks.limited_http import LimitedTransport

        left = iter(wanted)
        failure: BaseException | None = None
        # Leaving the runner, also by Ctrl-C, cancels requests in progress.
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            try:
                client = AsyncOpenAI(
                    api_key=self._key or "none",
                    base_url=self.settings["endpoint"],
                    timeout=TIMEOUT_SECONDS,
                    max_retries=NUM_RETRIES,
                    http_client=httpx.AsyncClient(transport=LimitedTransport(TIMEOUT_SECONDS), timeout=TIMEOUT_SECONDS),
                )
            except (httpx.InvalidURL, ValueError) as fault:
                raise EvaluationError(f"--endpoint: not a usable address: {fault}") from None
            under_way: set[asyncio.Task[Completion]] = set()
            while True:
                while failure is None and len(under_way) < self.endpoint.concurrency:
                    key = next(left, None)
                    if key is None:
                        break
                    under_way.add(loop.create_task(self._ask(client, rows[key[0]], *key)))
                if not under_way:
                    break
                ended, under_way = runner.run(_first_of(under_way))
                for task_ended in ended:
                    error = task_ended.exception()
                    if error is None:
                        yield task_ended.result()
                    else:
                        failure = failure or error
            runner.run(client.close())
        if failure is not None:
            raise self._explained(failure)

    async def _ask(self, client: Any, row: Row, index: int, sample: int) -> Completion:
        problem = "\n\n".join(part for part in (row.instruction.strip(), row.input.strip()) if part)
        request: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": f"{problem}\n\n{CHAIN_OF_THOUGHT}"}],
            "temperature": self.decoding.temperature,
        }
        if self.decoding.temperature:
            request |= {"top_p": self.decoding.top_p, "seed": _seed_of(self.decoding.seed, index, sample)}
        raw = await self._create(client.chat.completions.with_raw_response.create, request)
        try:
            reply = raw.http_response.json()
        except RecursionError:
            raise EvaluationError(f"the reply to item {index} is nested too deeply to be a chat completion") from None
        completion, served_model = _read_reply(reply, index, sample)
        self.session["num_retries"] += raw.retries_taken
        if served_model is not None and served_model not in self.session["served_models"]:
            self.session["served_models"].append(served_model)
        return completion

    async def _create(self, create: Any, request: dict[str, Any]) -> Any:
        """Send a request. Servers differ in the name of the token limit; the old name is tried first, since more know it."""
        from openai import BadRequestError

        name = self._limit_name
        try:
            return await create(**request, **{name: self.max_new_tokens})
        except BadRequestError as error:
            if name != "max_tokens" or "max_completion_tokens" not in str(error):
                raise
            self._limit_name = "max_completion_tokens"
        return await create(**request, **{self._limit_name: self.max_new_tokens})

    def _explained(self, error: BaseException) -> BaseException:
        """An error that says what the user can do. Other exceptions are returned unchanged."""
        import httpx2 as httpx
        import openai

        text = self._without_key(error)
        place = f"{self.settings['endpoint']}, model {self.endpoint.model}"
        again = "What has arrived is kept; run the same command again to continue."
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return EvaluationError(f"{place}: the key is refused ({text}). Set {KEY_VARIABLE}. {again}")
        if isinstance(error, openai.NotFoundError):
            return EvaluationError(f"{place}: not found ({text}). Check --endpoint (with its /v1) and --model. {again}")
        if isinstance(error, openai.APITimeoutError):
            return EvaluationError(f"{place}: no answer within {TIMEOUT_SECONDS:g} s, {NUM_RETRIES + 1} times. {again}")
        if isinstance(error, openai.APIConnectionError):
            cause = self._without_key(error.__cause__ or error)
            return EvaluationError(f"{place}: cannot be reached ({cause}). Is the server up? {again}")
        if isinstance(
            error, (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL, ValueError)
        ):  # not JSON: ValueError
            return EvaluationError(f"{place}: {text}. {again}")
        if isinstance(error, EvaluationError):
            return EvaluationError(f"{place}: {text}. {again}")
        return error

    def _without_key(self, error: BaseException) -> str:
        text = str(error)
        return (text.replace(self._key, "***") if self._key else text)[:500]


def _read_reply(reply: Any, index: int, sample: int) -> tuple[Completion, str | None]:
    """The completion in a server's reply, and the server's name for the model. Replies may have any form."""
    try:
        choice = reply["choices"][0]
        content, reason = choice["message"].get("content"), choice.get("finish_reason")
        if isinstance(content, list):  # parts of several kinds
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        text = "" if content is None else str.encode(content, errors="replace").decode()  # half a surrogate pair, too
        usage = reply.get("usage") or {}
        counts = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
        model = reply.get("model") or None
        if not all(
            isinstance(value, kind)
            for value, kind in [(reason, str | None), (model, str | None), *((n, int) for n in counts)]
        ):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise EvaluationError(
            f"the reply to item {index} is not a chat completion: {json.dumps(reply)[:200]}"
        ) from None
    finish = {"stop": "eos", "length": "length"}.get(reason, reason or "eos")
    return Completion(index, text, counts[0], counts[1], finish, sample), model


def _seed_of(seed: int, index: int, sample: int) -> int:
    """A different seed for each completion, so that two seeds of an evaluation are independent."""
    digest = hashlib.sha256(f"{seed}:{index}:{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # 31 bits, which all servers accept


def _checked_key(key: str) -> str:
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise EvaluationError(
            f"{KEY_VARIABLE}: holds a line break or another character that keys do not have; set it to the key alone"
        )
    return key


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        named = "" if set(url) & set("@?#") else f' "{url}"'  # do not repeat what may contain a key
        raise EvaluationError(f"--endpoint{named}: must be an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise EvaluationError(
            f"--endpoint: the address of {parts.hostname} must not contain a user, password or query; a key belongs in "
            f"the environment, as {KEY_VARIABLE}"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


async def _first_of(
    tasks: set[asyncio.Task[Completion]],
) -> tuple[set[asyncio.Task[Completion]], set[asyncio.Task[Completion]]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
