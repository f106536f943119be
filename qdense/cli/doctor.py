"""`qdense doctor`"""

from __future__ import annotations

import argparse
import json

from qdense.cli.arguments import add_json

HELP = "find what is wrong with this machine or installation"
DESCRIPTION = (
    "Check Python, packages, CUDA, kernels, a 4-bit layer, memory, disk and cache, and say how to fix what is bad. Its output "
    "suits bug reports: it shows no secrets and no home folder's name. The exit status is 0 if nothing is bad, else 1."
)
EXAMPLES = """\
  qdense doctor
  qdense doctor --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from qdense.doctor import BAD, diagnose, versions

    checks = diagnose()
    status = int(any(check.state == BAD for check in checks))
    if arguments.json:
        from dataclasses import asdict

        print(json.dumps({"checks": [asdict(check) for check in checks], "versions": versions()}, indent=2))
        return status
    try:
        from qdense.ui.console import make_console
        from qdense.ui.tables import show_doctor
    except Exception:  # the drawing library itself may be broken
        for check in checks:
            print("\n  ".join(filter(None, (f"{check.state}: {check.name}: {check.detail}", check.remedy))))
    else:
        show_doctor(make_console(), checks)
    return status
