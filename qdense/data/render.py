"""Chat templates, rendered in a process of their own.

A chat template is a program that comes with a stranger's model. Transformers runs it in Jinja's sandbox, where it reaches no file
and no network, but may loop for ever or fill the memory. The process has limits on both, and is replaced when it hits one.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

_SECONDS = 10.0  # for one conversation
_START_SECONDS = 120.0  # for the process to begin, on a busy machine
_MEMORY_BYTES = 2 * 2**30
_MOST_CHARACTERS = 2**24


class RenderError(Exception):
    """A template refuses a conversation, or takes too much time or memory."""


class _Worker:
    """The process, started when it is first needed. One conversation at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, request: Mapping[str, Any]) -> str:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
                answer = json.loads(self._line(_SECONDS))
            except TimeoutError:
                self.stop()
                raise RenderError(f"it takes longer than {_SECONDS:g} s") from None
            except (OSError, ValueError, EOFError):  # it has died
                self.stop()
                raise RenderError(f"it needs more than {_MEMORY_BYTES // 2**30} GiB of memory") from None
            except BaseException:  # Ctrl-C: an answer that nobody reads would be taken for the next one's
                self.stop()
                raise
        if "error" in answer:
            raise RenderError(answer["error"])
        return str(answer["text"])

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qdense.data.render"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the command
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            self._line(_START_SECONDS)
        except (TimeoutError, EOFError):
            self.stop()
            raise RenderError("the process that renders it cannot start") from None

    def _line(self, seconds: float) -> bytes:
        """The next line that the process writes. Raises TimeoutError, or EOFError if it has died."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, end, line = self._process.stdout.fileno(), time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError
            read = os.read(descriptor, 2**16)
            if not read:
                raise EOFError
            line += read
        return line


_worker = _Worker()


def render(
    template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, Any], *, is_open: bool
) -> str:
    """The text of a conversation.

    Args:
        template: its Jinja source.
        messages: `role` and `content` of each turn.
        special_tokens: what the template knows as `bos_token` and the like.
        is_open: whether the text ends where the assistant's next answer begins.

    Raises:
        RenderError: with the reason.
    """
    return _worker.render(
        {"template": template, "messages": list(messages), "special_tokens": dict(special_tokens), "is_open": is_open}
    )


def _main() -> None:
    """The process: a line of JSON in, a line of JSON out, until the input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    output = os.fdopen(os.dup(1), "wb")
    output.write(b"{}\n")
    output.flush()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer: dict[str, str]
        try:
            rendered: Any = render_jinja_template(
                conversations=[request["messages"]],
                chat_template=request["template"],
                add_generation_prompt=request["is_open"],
                **request["special_tokens"],
            )
            text = str(rendered[0][0])
            answer = {"text": text}
            if len(text) > _MOST_CHARACTERS:
                answer = {"error": f"it writes {len(text):,} characters"}
        except MemoryError:
            answer = {"error": f"it needs more than {_MEMORY_BYTES // 2**30} GiB of memory"}
        except Exception as error:  # a template raises what it likes
            answer = {"error": next(iter(str(error).splitlines()), type(error).__name__)[:500]}
        output.write(json.dumps(answer).encode() + b"\n")
        output.flush()


if __name__ == "__main__":
    _main()
