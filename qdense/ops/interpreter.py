"""Triton's interpreter, in which kernels run without a GPU, slowly: for tests."""

from __future__ import annotations

import os


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels in this process. It must be so before the first kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"
