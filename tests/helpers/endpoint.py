"""Starts tests/helpers/endpoint_server.py."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

from tests.helpers import ROOT


@contextmanager
def server(log):
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "endpoint_server.py"), str(log)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
