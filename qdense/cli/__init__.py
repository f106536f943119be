"""The command line: one module for each command. Heavy imports wait until a command runs, so that --help and typing mistakes are
answered at once.

Exit status: 0 success; 1 `qdense doctor` found a problem, or a cell of `qdense sweep` failed; 2 a user's mistake, explained in
one message; 3 training diverged; 130 stopped by Ctrl-C, 143 by SIGTERM. Anything else is a bug in qdense.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

from qdense import __version__
from qdense.cli import (
    analyze,
    chat,
    compare,
    data,
    doctor,
    evaluate,
    export,
    generate,
    init,
    merge,
    models,
    params,
    plan,
    push,
    report,
    score,
    serve,
    sweep,
    tasks,
    train,
)
from qdense.errors import DivergedError, QDenseError, RunStopped, ToldElsewhereError, closest
from qdense.processes import is_first
from qdense.text import printable

# Each has HELP, DESCRIPTION, EXAMPLES, add_arguments(parser) and run(arguments), which returns the exit status (None is 0).
COMMANDS: dict[str, ModuleType] = {
    "init": init,
    "plan": plan,
    "train": train,
    "evaluate": evaluate,
    "chat": chat,
    "generate": generate,
    "serve": serve,
    "merge": merge,
    "export": export,
    "push": push,
    "score": score,
    "compare": compare,
    "sweep": sweep,
    "report": report,
    "analyze": analyze,
    "models": models,
    "tasks": tasks,
    "data": data,
    "params": params,
    "doctor": doctor,
}

_EXAMPLES = """\
examples:
  qdense train demo                                    a first run, on any machine, in minutes
  qdense init questions.jsonl                          a recipe for your own data and card
  qdense plan questions.toml                           will it fit, and how fast will it be
  qdense train questions.toml                          train; --resume continues after whatever ended it
  qdense evaluate gsm8k,svamp --adapter runs/questions --with-base
  qdense chat runs/questions                           talk with it; `qdense serve` is for OpenAI clients
  qdense compare runs/lora runs/dense

`qdense COMMAND --help` has more of each.
"""

# Possible faults of a path that a user names.
_PATH_FAULTS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENODEV, errno.ENXIO, errno.EINVAL,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
}  # fmt: skip
_WRONG_CHOICE = re.compile(r"invalid choice: '(?P<given>.*?)' \(choose from (?P<choices>.*)\)")
_RAISE_LIMIT = "Raise the limit, or choose another folder, and run the same command again."
_RUN_AGAIN = "run the same command again (train: with --resume, to continue from the last checkpoint)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # Spinning idle OpenMP threads starve each other: on a busy machine, CPU steps take 10 to 50 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = _parsed(sys.argv[1:] if argv is None else list(argv))
    try:
        with _ended_by_signals():
            return arguments.command(arguments) or 0
    except RunStopped as stop:
        if is_first():  # of several processes, which all stop
            print(printable(str(stop)), file=sys.stderr)
        return 128 + stop.signal_number
    except DivergedError as error:
        return _fail(str(error), status=3)
    except ToldElsewhereError:
        return 2
    except QDenseError as error:
        return _fail(str(error))
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        print(f"\nstopped; to continue, {_RUN_AGAIN}", file=sys.stderr)
        return 128 + int(number)
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(
                f"no space left on the disk while writing {error.filename or 'a file'}. Free some space, then {_RUN_AGAIN}."
            )
        if error.errno == errno.EFBIG:
            return _fail(
                f"{error.filename or 'a file'} has reached the size limit of this shell (ulimit -f) or disk. {_RAISE_LIMIT}"
            )
        if error.errno in _PATH_FAULTS:
            return _fail(f"{error.filename}: {error.strerror}. Check the path and its permissions.")
        raise
    except ValueError as error:
        if "null byte" in str(error) or "null character" in str(error):
            return _fail("a path contains a NUL character, which no path can")
        raise
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(
                f"out of GPU memory: {str(error).splitlines()[0]}\nTraining has already tried micro-batches of a single row: "
                '`qdense plan RECIPE` shows what takes the memory; set training.recompute = "auto" or lower '
                f"data.max_length. For an evaluation, lower --batch-size. Then {_RUN_AGAIN}."
            )
        raise


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end a command like Ctrl-C, with clean-up and the cursor restored."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str, status: int = 2) -> int:
    print(printable(f"error: {message}"), file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Guesses what a misspelt command, choice or option was to be. A parsed namespace names its innermost parser."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        wrong = _WRONG_CHOICE.search(message)
        close = closest(wrong["given"], re.findall(r"[^\s,']+", wrong["choices"])) if wrong else None
        super().error(f'{message}; did you mean "{close}"?' if close else message)

    def refuse(self, unknown: Sequence[str], argv: Sequence[str]) -> NoReturn:
        """End with what is said of arguments that no parser knows."""
        name, _, value = next((each for each in unknown if each.startswith("--")), "").partition("=")
        usage = self.format_usage()
        hint = ""
        if name and "[--set " in usage:
            from qdense.recipe import keys_named

            if not value:  # the next word may have been taken for another argument
                following = list(argv[argv.index(name) + 1 :][:1])
                value = following[0] if following and not following[0].startswith("-") else "VALUE"
            keys = keys_named(name.removeprefix("--").replace("-", "_"))
            if keys:
                hint = "; values of a recipe are given as " + " or ".join(f"--set {key}={value}" for key in keys)
        if not name and "--set" in argv and unknown and "[--set " in usage:
            key = argv[argv.index("--set") + 1]
            hint = f"; a value of a recipe is given as one word: --set {key.partition('=')[0]}={unknown[0]}"
        if name and not hint and (close := closest(name, re.findall(r"--[\w-]+", usage))):
            hint = f"; did you mean {close}?"
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if argv[0] == "help":
        argv = [*argv[1:], "--help"]
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        arguments.parser.refuse(unknown, argv)
    arguments.argv = argv
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qdense",
        description="Fine-tune 4-bit language models on one consumer GPU or several, with DenseLoRA, LoRA and other methods.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qdense {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=module.HELP,
            # The formatter keeps line breaks, for the examples.
            description=textwrap.fill(module.DESCRIPTION, 79, break_on_hyphens=False),
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(command=module.run)
    return parser
