"""Text made safe to show. Names, cards, data and messages come from others: they must not control the terminal or reveal a
secret."""

from __future__ import annotations

import os
import re

_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY")
_SHORTEST_SECRET = 8  # local servers use "x" as a key, which is part of many words
_IN_ADDRESSES = (
    (re.compile(r"//[^/\s\"'@]+@"), "//***@"),  # user and password
    (re.compile(r"[^/\s\"'@:]+:[^/\s\"'@]+@"), "***@"),  # the same without a scheme
    (re.compile(r"([?&][\w-]*(?:key|token|secret|password|signature)[\w-]*=)[^&\s\"']+", re.IGNORECASE), r"\1***"),
)


def clean(text: str) -> str:
    """Text safe to draw: control characters, which could control the terminal, become visible."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 256 else "�" for c in text)


def without_secrets(text: str) -> str:
    """The text without the user's keys, and without passwords and keys in addresses."""
    for variable in _SECRET_VARIABLES:
        value = os.environ.get(variable, "").strip()
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    for pattern, masked in _IN_ADDRESSES:
        text = pattern.sub(masked, text)
    return text


def printable(text: str) -> str:
    """A message of several lines, ready for the terminal."""
    return "\n".join(map(clean, without_secrets(text).split("\n")))
