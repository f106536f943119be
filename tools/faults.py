"""Faults of an overnight run, injected for real: kill -9, signals, damaged checkpoints, full disks, two processes.

    .venv/bin/python tools/faults.py                     all of them, minutes on 2 cores
    .venv/bin/python tools/faults.py kill --times 50

Each trains (or evaluates) a tiny LLaMA by the command a user types, in a process of its own, injects the fault, continues with
`--resume`, and compares the outcome with that of an undisturbed run: the adapter byte by byte, the metrics in step, epoch,
loss, learning rate, gradient norm and tokens. It prints one table; the exit status is 1 if anything was lost. `disk` needs root,
for a small tmpfs. Commands are forked from this process, which has imported everything and computed nothing: they start fast.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

from qdense.cli import main as qdense
from qdense.runs import PEFT_WEIGHTS_FILE, RunFolder
from qdense.training.checkpoint import checkpoint_step, checkpoints, fault_of
from qdense.training.metrics import read_metrics

_SAME = ("event", "step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "is_best")
_RECIPE = """
[model]
name = "{model}"
device = "cpu"
[adapter]
r = 8
dropout = 0.1
[data]
name = "wordproblems"
validation_rows = 8
fraction = 0.05
[training]
max_steps = 12
batch_size = 4
micro_batch_size = 2
learning_rate = 1e-2
warmup_steps = 1
eval_steps = 3
save_steps = 1
"""


class Child:
    """A command in a forked process with its own terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.started = time.monotonic()
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            status = 70
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            try:
                os.chdir(folder)
                status = qdense(list(arguments))
            except SystemExit as error:
                status = int(error.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.set_blocking(self._terminal, False)
        self.output = b""
        self._status: int | None = None

    def is_running(self) -> bool:
        self._read()
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is None

    def wait(self, seconds: float = 300.0) -> int:
        """The exit status; minus the signal's number if one ended it."""
        while self.is_running():
            if time.monotonic() - self.started > seconds:
                self.kill(signal.SIGKILL)
            time.sleep(0.002)
        self._read()
        os.close(self._terminal)
        assert self._status is not None
        return os.waitstatus_to_exitcode(self._status)

    def kill(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace").replace("\r\n", "\n")

    def _read(self) -> None:
        with suppress(OSError):  # nothing there, or the other end is closed
            while block := os.read(self._terminal, 1 << 16):
                self.output += block


class Faults:
    """Each method does one kind of fault `times` times and returns (tried, lost, what was found)."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.num_runs = 0
        os.environ["QDENSE_CACHE"] = str(folder / "cache")
        maker = os.fork()
        if maker == 0:
            importlib.import_module("tests.helpers.models").make_tiny_model(folder / "tiny")
            os._exit(0)
        os.waitpid(maker, 0)
        (folder / "recipe.toml").write_text(_RECIPE.format(model=folder / "tiny"))
        self.whole = self.folder / "whole"
        started = time.monotonic()
        assert self.train(self.whole).wait() == 0
        self.seconds = time.monotonic() - started  # of a whole run

    def train(self, run_dir: Path, *more: str) -> Child:
        return Child(self.folder, "train", "recipe.toml", "--output", str(run_dir), *more)

    def new_run(self) -> Path:
        self.num_runs += 1
        return self.folder / f"run-{self.num_runs}"

    def differs(self, run_dir: Path) -> str:
        """What differs between a finished run and the undisturbed one; empty if nothing."""
        run, whole = RunFolder(run_dir), RunFolder(self.whole)
        if not (run.adapter / PEFT_WEIGHTS_FILE).is_file():
            return "no adapter"
        if (run.adapter / PEFT_WEIGHTS_FILE).read_bytes() != (whole.adapter / PEFT_WEIGHTS_FILE).read_bytes():
            return "another adapter"
        ours, theirs = (
            [{key: line.get(key) for key in _SAME} for line in read_metrics(folder.metrics)] for folder in (run, whole)
        )
        return "" if ours == theirs else "other metrics"

    def finish(self, run_dir: Path) -> str:
        child = self.train(run_dir, "--resume")
        status = child.wait()
        return self.differs(run_dir) if status == 0 else f"status {status}: {child.text[-300:]}"

    # --- kinds --------------------------------------------------------------------------------------------------------------

    def kill(self, times: int) -> tuple[int, list[str], str]:
        """kill -9 of training, at random moments, every second one while a checkpoint is being written."""
        tried, lost, in_checkpoints, in_runs = 0, [], 0, 0
        while tried < times:
            run_dir, in_runs = self.new_run(), in_runs + 1
            for number in range(min(5, times - tried)):
                child = self.train(run_dir, *(["--resume"] if number else []))
                moment = self.random.uniform(0, self.seconds)
                waits_for_checkpoint = self.random.random() < 0.5
                skipped = self.random.randrange(6)  # checkpoints
                unfinished = RunFolder(run_dir).checkpoints / ".unfinished"
                was_there = False
                while child.is_running():
                    is_there = unfinished.exists()
                    skipped -= is_there and not was_there
                    was_there = is_there
                    if waits_for_checkpoint and skipped < 0:
                        time.sleep(self.random.uniform(0, 0.02))
                        break
                    if not waits_for_checkpoint and time.monotonic() - child.started > moment:
                        break
                    time.sleep(0.0005)
                else:
                    break  # it was done before
                in_checkpoints += unfinished.exists()
                child.kill(signal.SIGKILL)
                child.wait()
                tried += 1
            fault = "" if not self.differs(run_dir) else self.finish(run_dir)
            lost += [f"{run_dir.name}: {fault}"] if fault else []
        return tried, lost, f"{in_runs} runs; {in_checkpoints} of the kills inside checkpoint writing"

    def signals(self, times: int) -> tuple[int, list[str], str]:
        """Ctrl-C, SIGTERM, SIGHUP: a checkpoint, the status, the cursor shown again; a second Ctrl-C at once."""
        lost, longest = [], 0.0
        for number in range(times):
            name, status = [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT twice", 130)][number % 4]
            run_dir = self.new_run()
            child = self.train(run_dir)
            steps = self.random.randrange(1, 10)
            while child.is_running() and _steps(run_dir) < steps:
                time.sleep(0.002)
            before = _steps(run_dir)
            child.kill(getattr(signal, name.split()[0]))
            if name.endswith("twice"):
                time.sleep(0.001)
                sent = time.monotonic()
                child.kill(signal.SIGINT)
            found = child.wait()
            if name.endswith("twice"):
                longest = max(longest, time.monotonic() - sent)
            fault = "" if found == status else f"status {found}"
            if not child.text.rstrip().endswith("continue from it with --resume.") and not name.endswith("twice"):
                fault = fault or f"said {child.text[-200:]!r}"
            if child.text.count("\x1b[?25l") > child.text.count("\x1b[?25h"):
                fault = fault or "the cursor stays hidden"
            newest = [checkpoint_step(path) for path in checkpoints(RunFolder(run_dir).checkpoints)[:1]]
            if newest < [before] and not name.endswith("twice"):
                fault = fault or f"checkpoint of {newest}, not {before}"
            fault = fault or self.finish(run_dir)
            lost += [f"{name}: {fault}"] if fault else []
        return times, lost, f"the second Ctrl-C took {longest:.1f} s at most"

    def damage(self, times: int) -> tuple[int, list[str], str]:
        """A file of the newest checkpoint cut short, one bit flipped, removed: named, and the one before is taken."""
        lost = []
        start = self.new_run()
        child = self.train(start)
        while child.is_running() and _steps(start) < 7:
            time.sleep(0.002)
        child.kill(signal.SIGKILL)
        child.wait()
        names = sorted(path.name for path in checkpoints(RunFolder(start).checkpoints)[0].iterdir())
        cases = [(name, how) for name in names for how in ("truncate", "flip", "remove")]
        self.random.shuffle(cases)
        for name, how in cases[:times]:
            run_dir = self.new_run()
            shutil.copytree(start, run_dir)
            newest = checkpoints(RunFolder(run_dir).checkpoints)[0]
            path = newest / name
            content = bytearray(path.read_bytes())
            if how == "flip":
                content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            path.write_bytes(content[: self.random.randrange(len(content))] if how == "truncate" else content)
            if how == "remove":
                path.unlink()
            child = self.train(run_dir, "--resume")
            status = child.wait()
            said = " ".join(child.text.split())
            fault = self.differs(run_dir) if status == 0 else f"status {status}: {said[-300:]}"
            if newest.name not in said or "passed over" not in said:
                fault = fault or "not told"
            lost += [f"{name}, {how}: {fault}"] if fault else []
        return len(cases[:times]), lost, f"{len(names)} files"

    def disk(self, times: int) -> tuple[int, list[str], str]:
        """A full disk: the message says how much is needed, and the last good checkpoint stays intact; with space again, it
        continues."""
        lost, told = [], 0
        for number in range(times):
            with _small_disk(self.folder / "disk", 96) as disk:
                run_dir, filler = disk / "run", disk / "filler"
                if number % 4 == 0:  # before the start
                    _fill(filler, disk, leaving=int(self.random.uniform(0, 60e6)))
                child = self.train(run_dir)
                steps = self.random.randrange(1, 11)
                while child.is_running() and number % 4 and _steps(run_dir) < steps:
                    time.sleep(0.001)
                if number % 4 == 1:  # between checkpoints
                    _fill(filler, disk, leaving=int(10 ** self.random.uniform(0, 6)))
                if number % 4 > 1:  # while one is being written: there is room for it when it begins
                    _fill(filler, disk, leaving=3_000_000)
                    while child.is_running() and not (RunFolder(run_dir).checkpoints / ".unfinished").exists():
                        time.sleep(0.0002)
                    _fill(disk / "more", disk, leaving=int(10 ** self.random.uniform(0, 5)))
                status = child.wait()
                said = " ".join(child.text.split())
                fault = "" if status in (0, 2) else f"status {status}: {said[-400:]}"
                if status == 2:
                    told += 1
                    if "space" not in said.lower():
                        fault = fault or f"not reported: {said[-200:]}"
                bad = [str(path) for path in checkpoints(RunFolder(run_dir).checkpoints) if fault_of(path)]
                fault = fault or ", ".join(bad)
                for path in (filler, disk / "more"):
                    path.unlink(missing_ok=True)
                if status != 0:
                    fault = fault or self.finish(run_dir)
                lost += [f"{number}: {fault}"] if fault else []
        return times, lost, f"{told} runs stopped by it"

    def two(self, times: int) -> tuple[int, list[str], str]:
        """Two processes on one folder: one is refused, the other undisturbed."""
        lost = []
        for _ in range(times):
            run_dir = self.new_run()
            children = [self.train(run_dir)]
            time.sleep(self.random.uniform(0, 0.7 * self.seconds))
            children.append(self.train(run_dir, "--resume"))
            statuses = [child.wait() for child in children]
            refused = [child for child, status in zip(children, statuses, strict=True) if status == 2]
            fault = self.differs(run_dir)
            if len(refused) != 1 or not any(
                text in " ".join(refused[0].text.split()) for text in ("another process", "this run is finished")
            ):
                fault = fault or f"statuses {statuses}: {children[1].text[-300:]}"
            lost += [fault] if fault else []
        return times, lost, ""

    def evaluation(self, times: int) -> tuple[int, list[str], str]:
        """kill -9 of an evaluation: what is on file stays, nothing is asked twice, a half-written line is repaired."""
        arguments = ["evaluate", "wordproblems", "--adapter", str(self.whole), "--decoding", "greedy", "--limit", "120",
                     "--max-new-tokens", "24", "--batch-size", "4"]  # fmt: skip

        def lines() -> list[str]:
            files = [evaluation.completions("wordproblems") for evaluation in RunFolder(self.whole).evaluations()]
            return [line for path in files if path.exists() for line in path.read_text().split("\n") if line]

        def start_over() -> None:
            for evaluation in RunFolder(self.whole).evaluations():
                shutil.rmtree(evaluation.path)

        started = time.monotonic()
        assert Child(self.folder, *arguments).wait() == 0
        seconds, expected = time.monotonic() - started, lines()
        start_over()
        lost, times_with_lines = [], 0
        on_file: list[str] = []
        for _ in range(times):
            child = Child(self.folder, *arguments)
            moment = self.random.uniform(0.3 * seconds, 1.1 * seconds / (1 + len(on_file) / len(expected)))
            while child.is_running() and time.monotonic() - child.started < moment and len(lines()) < len(expected):
                time.sleep(0.002)
            child.kill(signal.SIGKILL)
            child.wait()
            now = [line for line in lines() if _is_json(line)]
            lost += ["a finished item is gone"] if now[: len(on_file)] != on_file else []
            times_with_lines += len(now) > len(on_file)
            on_file = now
            if len(on_file) == len(expected):
                start_over()
                on_file = []
        status = Child(self.folder, *arguments).wait()
        indices = [json.loads(line)["index"] for line in lines()]
        lost += [f"status {status}"] if status else []
        lost += ["an item was done twice"] if len(indices) != len(set(indices)) else []
        lost += ["other completions"] if sorted(map(_completion, lines())) != sorted(map(_completion, expected)) else []
        return times, lost, f"{times_with_lines} of them with new items on file"


def _completion(line: str) -> tuple[int, str]:
    return json.loads(line)["index"], json.loads(line)["completion"]


def _is_json(line: str) -> bool:
    with suppress(ValueError):
        json.loads(line)
        return True
    return False


def _steps(run_dir: Path) -> int:
    path = RunFolder(run_dir).metrics
    return (
        sum('"step"' in line for line in path.read_text().splitlines() if '"event": "step"' in line)
        if path.exists()
        else 0
    )


@contextmanager
def _small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def _fill(filler: Path, disk: Path, leaving: int) -> None:
    with filler.open("wb") as stream, suppress(OSError):
        for size in (1 << 16, 1 << 12):
            while shutil.disk_usage(disk).free > leaving + size:
                stream.write(bytes(size))
                stream.flush()


def main() -> int:
    kinds = {"kill": 50, "signals": 20, "damage": 30, "disk": 20, "two": 10, "evaluation": 20}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*kinds, []], help="default: all")
    parser.add_argument("--times", type=int, help=f"how often (default: {kinds})")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for name in (
        "qdense.training.run",
        "qdense.benchmarks.evaluate",
        "qdense.ui.training",
        "qdense.ui.evaluation",
        "tests.helpers.models",
    ):  # here, so that children need not
        importlib.import_module(name)
    rows, num_lost = [], 0
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), arguments.seed)
        for kind in arguments.kinds or kinds:
            method: Callable[[int], tuple[int, list[str], str]] = getattr(faults, kind)
            started = time.monotonic()
            tried, lost, found = method(arguments.times or kinds[kind])
            num_lost += len(lost)
            text = (method.__doc__ or "").rstrip(".")
            rows.append(f"| {text} | {tried} | {tried - len(lost)} | {len(lost)} | {found} |")
            print(f"{kind}: {tried} in {time.monotonic() - started:.0f} s, lost: {lost}", file=sys.stderr, flush=True)
    print("| fault | tried | survived | lost | |\n|---|---|---|---|---|\n" + "\n".join(rows))
    return 1 if num_lost else 0


if __name__ == "__main__":
    sys.exit(main())
