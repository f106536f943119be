"""Run another program with our methods known to PEFT: python -m qdense.tuners lm_eval --model hf ...

A program that loads adapters through PEFT only knows methods that are registered in its process. This registers ours
by importing the package, then runs the given module as `python -m` does.
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m qdense.tuners MODULE [ARGUMENTS], for instance MODULE = lm_eval")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
