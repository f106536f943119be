"""The processes of one job, started together by `--gpus`, `accelerate launch`, `torchrun` or Slurm: which one this is, what
all of them computed, and the launcher.

The first process decides, reports and writes. A fault in one of them ends all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from qdense.errors import QDenseError, RunError, ToldElsewhereError

T = TypeVar("T")

# How long a process waits for another: the first may have a base to download and quantize.
PATIENCE = timedelta(hours=3)


def is_first() -> bool:
    """Whether this process reports and writes. The only process of a job is its first."""
    return os.environ.get("RANK", "0") == "0"


def is_launched() -> bool:
    """Whether a launcher has started this process."""
    return "RANK" in os.environ


def place() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Connect with the other processes, if there are any; training's Accelerator does it itself."""
    if is_launched():
        import torch
        from accelerate import PartialState

        require_ranks()
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def require_ranks() -> None:
    """Raise RunError for variables of a launcher that are no numbers; accelerate would fail on them."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise RunError(f'{name} = "{value}": must be a whole number. torchrun sets it; without torchrun, unset it.')


def of_all(compute: Callable[[], T], *, is_joint: bool = False) -> list[T]:
    """What each process computes, in their order. Called by all of them, or by a process that is alone.

    Args:
        is_joint: whether `compute` itself waits for the other processes, so that a fault of one cannot be told to them; then
            it ends this process, and the launcher the others.

    Raises:
        Exception: `compute` failed here, or in another process; then no process returns. The first one's error names the
            process; the others raise ToldElsewhereError.
    """
    if not is_launched():
        return [compute()]
    mine, fault = (compute(), None) if is_joint else _attempt(compute)
    return _agreed(mine, fault)


def first_alone(compute: Callable[[], T]) -> T:
    """What this process computes, once the first one on its machine has done so: that one fills caches for the others.

    Raises as `of_all`.
    """
    if not is_launched():
        return compute()
    from accelerate import PartialState

    with PartialState().local_main_process_first():
        mine, fault = _attempt(compute)
    _agreed(None, fault)
    assert mine is not None
    return mine


def _attempt(compute: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return compute(), None
    except Exception as error:
        return None, error


def _agreed(mine: Any, fault: Exception | None) -> list[Any]:
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    assert state.num_processes == place()[1], "the processes are not connected"
    gathered: list[tuple[Any, str | None]] = gather_object([(mine, None if fault is None else _described(fault))])
    faults = {number: text for number, (_, text) in enumerate(gathered) if text is not None}
    if not faults:
        return [value for value, _ in gathered]
    if fault is not None and (state.is_main_process or not isinstance(fault, QDenseError)):
        raise fault
    if not state.is_main_process:
        raise ToldElsewhereError
    number, text = min(faults.items())
    raise RunError(f"process {number + 1} of {state.num_processes}: {text}")


def _described(fault: Exception) -> str:
    return (
        str(fault) if isinstance(fault, QDenseError) else f"{type(fault).__name__}: {str(fault).partition(chr(10))[0]}"
    )


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `qdense ARGUMENTS` in several processes of this machine, by accelerate's launcher; returns the exit status of the
    first process that failed, else 0."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # in this process, which only waits; the others say what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--num_processes", str(num_processes), "--main_process_port", "0"]
    try:
        launch_command(launch_command_parser().parse_args([*options, "-m", "qdense", *arguments]))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        code = next((code for code in codes if code > 0), codes[0])
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
