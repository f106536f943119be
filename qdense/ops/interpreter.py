"""Triton's interpreter, which runs kernels without a GPU, slowly: for tests."""

from __future__ import annotations

import os


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels in this process. This must be set before the first kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"
