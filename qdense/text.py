"""Text made safe to show. Names, cards, data and messages come from others: they must not control the terminal or reveal a
secret."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY")
_SHORTEST_SECRET = 8  # local servers use "x" as a key, which is part of many words
# Each is linear in the length of the text: what is shown may be a stranger's.
_USER = re.compile(r"//[^/\s\"'@]+@")
_WORD = re.compile(r"[^/\s\"']+")
_PARAMETER = re.compile(r"([?&])([\w-]+)=([^&\s\"']+)")
_SECRET_PARAMETER = re.compile("key|token|secret|password|signature", re.IGNORECASE)


def clean(text: str) -> str:
    """Text safe to draw: control characters, which could control the terminal, become visible."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 256 else "�" for c in text)


def without_secrets(text: str) -> str:
    """The text without the user's keys, and without passwords and keys in addresses."""
    for variable in _SECRET_VARIABLES:
        value = os.environ.get(variable, "").strip()
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    text = _WORD.sub(_without_password, _USER.sub("//***@", text))
    return _PARAMETER.sub(_without_value, text)


def _without_password(word: re.Match[str]) -> str:
    """ "user:password@host" as "***@host"."""
    *heads, tail = word[0].split("@")
    masked = ["***" if all(head.partition(":")[::2]) else head for head in heads]
    return "@".join([*masked, tail])


def _without_value(parameter: re.Match[str]) -> str:
    start, name, value = parameter.groups()
    return f"{start}{name}={'***' if _SECRET_PARAMETER.search(name) else value}"


def clean_lines(text: str) -> str:
    """Text of several lines, safe to draw."""
    return "\n".join(map(clean, text.split("\n")))


def printable(text: str) -> str:
    """A message of several lines, ready for the terminal."""
    return clean_lines(without_secrets(text))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are Markdown; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_escaped(text: str) -> str:
    """Text escaped so that it neither ends a cell nor begins markup."""
    for mark in "\\|*`<[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split("\n"))
