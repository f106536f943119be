"""`qdense chat` in the terminal: questions are typed, answers appear as they are written."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from qdense.data.rows import Message
from qdense.errors import QDenseError
from qdense.inference.engine import Engine, Part, Request
from qdense.inference.generation import Decoding
from qdense.text import clean, clean_lines
from qdense.ui.console import make_console

_HELP = """\
/reset           forget the conversation
/system TEXT     set the system prompt, and forget the conversation; without TEXT, remove it
/compare         show the base's answer beside the adapter's, or stop doing so
/help            this list
/exit            leave (also Ctrl-D)
Ctrl-C           end an answer that is too long"""


@dataclass
class Chat:
    """A conversation with an adapter.

    Attributes:
        name: the adapter's, in the engine.
        compares: whether the base answers too.
        has_turns: whether the template has conversations; without them each question is asked alone.
    """

    engine: Engine
    name: str
    decoding: Decoding
    max_new_tokens: int
    system: str
    compares: bool

    def __post_init__(self) -> None:
        self.console = make_console()
        self.turns: list[Message] = []
        self.has_turns = self.engine.template(self.name).conversation is not None

    def run(self) -> None:
        """Until the input ends, or /exit."""
        adapter, base = self.engine.loaded.adapters[self.name], self.engine.loaded.base
        print(f"{clean(self.name)} on {clean(base.name)}, template {adapter.template}. /help lists the commands.")
        if not self.has_turns:
            print(
                "This adapter was trained on single questions: it sees each question alone, without what came before."
            )
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            import readline  # noqa: F401  (gives input() editing and history)
        while True:
            try:
                line = input("> " if is_terminal else "").strip()
            except EOFError:
                if is_terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                print("\n/exit, or Ctrl-D, leaves.")
                continue
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line:
                self._ask(line)

    def _command(self, line: str) -> bool:
        """Do what a line with a slash says; returns False to leave."""
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/reset":
            self.turns = []
            print("The conversation begins anew.")
        elif command == "/system" and not self.has_turns:
            print("This adapter's template has no system prompt.")
        elif command == "/system":
            self.system, self.turns = rest.strip(), []
            print("The system prompt is set; the conversation begins anew." if self.system else "No system prompt.")
        elif command == "/compare" and not self.engine.loaded.adapters[self.name].is_separate:
            print("This is a whole model, which is not separate from its base.")
        elif command == "/compare":
            self.compares = not self.compares
            print("The base answers too." if self.compares else "Only the adapter answers.")
        else:
            print(_HELP if command == "/help" else f"no command {clean(command)}; there are:\n{_HELP}")
        return True

    def _ask(self, question: str) -> None:
        system = [Message("system", self.system)] if self.system else []
        turns = [*self.turns, Message("user", question)] if self.has_turns else [Message("user", question)]
        try:
            ids = self.engine.conversation_ids(self.name, [*system, *turns])
            answer = self._side_by_side(ids) if self.compares else self._streamed(ids)
        except QDenseError as error:  # too long, or refused by the template: the conversation is still there
            print(f"{clean(str(error))}. /reset begins anew.")
            return
        if self.has_turns:
            self.turns = [*turns, Message("assistant", answer)]

    def _parts(self, ids: list[int], model: str | None) -> tuple[Request, Iterator[Part]]:
        """A request, and its parts as they come. Raises DataError if the conversation is too long."""
        parts: queue.SimpleQueue[Part] = queue.SimpleQueue()
        room = self.engine.max_length - len(ids)
        request = Request(
            ids,
            model,
            self.decoding,
            max(1, min(self.max_new_tokens, room)),
            parts.put,
            self.engine.template(self.name),
        )
        self.engine.submit(request)

        def arriving() -> Iterator[Part]:
            while True:
                part = parts.get()
                if part.error is not None:
                    raise QDenseError(part.error)
                yield part
                if part.finish is not None:
                    return

        return request, arriving()

    def _streamed(self, ids: list[int]) -> str:
        request, parts = self._parts(ids, self.name)
        answer = ""
        try:
            for part in parts:
                text = part.text if answer else part.text.lstrip()
                answer += text
                print(clean_lines(text), end="", flush=True)
                if part.finish == "length":
                    print(" [cut off: --max-new-tokens]", end="")
        except KeyboardInterrupt:
            self.engine.cancel(request)
        print()
        return answer.rstrip()

    def _side_by_side(self, ids: list[int]) -> str:
        streams = {"base": self._parts(ids, None), "adapter": self._parts(ids, self.name)}
        answers = dict.fromkeys(streams, "")
        width = max(20, self.console.width // 2 - 1)

        def panels() -> Columns:
            return Columns(
                [Panel(Text(clean_lines(text.strip())), title=name, width=width) for name, text in answers.items()]
            )

        running = dict(streams)
        try:
            with Live(panels(), console=self.console, auto_refresh=False, transient=False) as live:
                while running:
                    for name, (_, parts) in list(running.items()):
                        part = next(parts, None)
                        if part is None:
                            del running[name]
                        else:
                            answers[name] += part.text
                    live.update(panels(), refresh=self.console.is_terminal)
                live.update(panels(), refresh=True)
        except KeyboardInterrupt:
            for request, _ in streams.values():
                self.engine.cancel(request)
        print()
        return answers["adapter"].strip()
