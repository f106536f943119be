"""The libraries that qdense builds on: keeping them quiet, and checking for optional ones."""

from __future__ import annotations

import importlib.util
import logging
import warnings

from qdense.errors import QDenseError


def quiet_libraries() -> None:
    """Import the heavy libraries and keep their notices off the display. Errors still come through."""
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "peft", "accelerate", "liger_kernel"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def require_library(name: str, *, extra: str, purpose: str) -> None:
    """Raise QDenseError unless the library `name`, part of the extra `extra`, is installed. Imports nothing."""
    if importlib.util.find_spec(name) is None:
        raise QDenseError(f'{purpose} needs {name}, which is not installed: pip install "qdense[{extra}]"')
