"""What produced a result: package versions and the commit of qdense."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

from qdense.version import __version__

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")


def package_versions() -> dict[str, str]:
    """Package -> installed version."""
    return {"qdense": __version__, **{package: importlib.metadata.version(package) for package in _PACKAGES}}


def git_hash() -> str:
    """Commit of the checkout that qdense runs from, "-dirty" if it has changes; "unknown" outside its own checkout."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An environment may be inside another repository, whose commit is not ours.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent.resolve():
            return "unknown"
        return git("describe", "--always", "--abbrev=40", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
