"""Bad input: mutated recipes, data files, completion files and adapters, each of which must be refused well, or read right.

    .venv/bin/python tools/fuzz.py --seed 1
    .venv/bin/python tools/fuzz.py data --cases 500 --seed 3

Refused well: a QDenseError whose text names the file. Read right: what was accepted holds together (rows are text, a recipe says
the same when written and read again, an adapter's logits are finite numbers). Anything else is a fault: another exception, more
than ten seconds, more than 1 GiB above the process before the case. The input of a fault is kept, with how to repeat it.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
import tomli_w
import torch
from safetensors.torch import load_file, save_file

from qdense.benchmarks.results import read_completions, score_task
from qdense.benchmarks.tasks import TASKS
from qdense.cli import _quiet_libraries
from qdense.data.rows import read_rows
from qdense.errors import QDenseError
from qdense.modeling.adapter import AdapterCard, attach_adapter, load_adapter, read_card, save_adapter
from qdense.modeling.base import load_base
from qdense.recipe import AdapterRecipe, ModelRecipe, load_recipe

_SECONDS, _BYTES = 10, 2**30
_REAL_ROWS = _ROOT.parent / "shared" / "data" / "ft-training_set" / "math_10k_genuine_1824.json"
# What has broken readers before, put anywhere.
_PIECES: list[bytes] = [
    b"\xef\xbb\xbf", b"\x00", b"\r\n", b"\r", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b'"', b"'", b"{", b"}",
    b"[", b"]", b",", b":", b"=", b"#", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 20000,
    b'{"a":' * 20000, b"x" * 200_000, b"\xe2\x80\xa8", b"\x1b[2J", b"../../etc/passwd", b"1979-05-27T07:32:00Z", b'"""',
    b"0x", b"\n\n", b"-0", b"1_000",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, -1, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", " ", "x" * 100_000, "\x00", "\ud800",
    [], {}, [[]], {"a": 1}, ["q_proj"], "../..", "/etc/passwd", "\x1b]0;x\x07",
]  # fmt: skip


class Mutator:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self, content: bytes) -> bytes:
        """Some of its bytes changed, lost, doubled, or replaced."""
        for _ in range(self.random.choice([1, 1, 1, 2, 4, 16])):
            at, to = sorted(self.random.randrange(len(content) + 1) for _ in range(2))
            to = min(to, at + self.random.choice([1, 8, 64, 4096]))
            piece = self.random.choice(_PIECES) if self.random.random() < 0.5 else self.random.randbytes(1)
            content = self.random.choice(
                [
                    content[:at] + piece + content[at:],
                    content[:at] + piece + content[at + len(piece) :],
                    content[:at] + content[to:],
                    content[:at] + content[at:to] * 3 + content[to:],
                    content[:at],
                    content.replace(b"\n", b"\r\n"),
                    piece + content,
                ]
            )
        return content

    def value(self, value: Any) -> Any:
        """A tree of values with one of them replaced, lost or renamed."""
        value = copy.deepcopy(value)
        holders: list[tuple[Any, Any]] = []

        def walk(node: Any) -> None:
            for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                holders.append((node, key))
                walk(node[key])

        walk(value)
        if not holders:
            return self.random.choice(_VALUES)
        for node, key in self.random.sample(holders, min(len(holders), self.random.choice([1, 1, 2]))):
            if key not in node if isinstance(node, dict) else key >= len(node):
                continue
            what = self.random.randrange(4)
            if what == 0:
                del node[key]
            elif what == 1 and isinstance(node, dict):
                node[self.random.choice(["", "extra", f"{key} ", "\x1b[2J"])] = node.pop(key)
            else:
                node[key] = self.random.choice(_VALUES)
        return value

    def json(self, value: Any) -> bytes:
        if self.random.random() < 0.5:
            return self.text(json.dumps(value).encode())
        content = json.dumps(self.value(value))
        return content.encode("utf-8", "surrogatepass")


class Recipes:
    """mutated recipes, and values given by --set"""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "recipe.toml"
        self.sources = [path.read_bytes() for path in sorted((_ROOT / "recipes").glob("*.toml"))]
        self.tables = [load_recipe(path).resolved() for path in sorted((_ROOT / "recipes").glob("*.toml"))]

    def make(self, mutator: Mutator) -> Callable[[], None]:
        overrides: list[str] = []
        if mutator.random.random() < 0.5:
            self.path.write_bytes(mutator.text(mutator.random.choice(self.sources)))
        else:
            try:
                self.path.write_text(tomli_w.dumps(mutator.value(mutator.random.choice(self.tables))), encoding="utf-8")
            except (TypeError, ValueError):  # TOML cannot say it
                self.path.write_bytes(mutator.random.choice(self.sources))
                table = mutator.random.choice(self.tables)
                name = mutator.random.choice(list(table))
                key = mutator.random.choice(list(table[name]))
                overrides = [f"{name}.{key}={mutator.random.choice(_VALUES)!r}"]

        def check() -> None:
            recipe = load_recipe(self.path, overrides)
            self.path.write_text(tomli_w.dumps(recipe.resolved()), encoding="utf-8")
            assert load_recipe(self.path).resolved() == recipe.resolved()

        return check


class Data:
    """mutated JSON, JSONL, CSV, Parquet, and these as .gz"""

    def __init__(self, folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self.folder = folder
        self.rows = [
            {
                "instruction": f"What is {n} + {n}? Täter, 数",
                "input": "",
                "output": f"It is\n{2 * n}.",
                "answer": str(2 * n),
            }
            for n in range(12)
        ]
        if _REAL_ROWS.is_file():
            keys = ("instruction", "input", "output", "answer")
            self.rows = [{key: row.get(key, "") for key in keys} for row in json.loads(_REAL_ROWS.read_text())[:12]]
        lines = [json.dumps(row) for row in self.rows]
        header = ",".join(self.rows[0])
        quoted = (",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in self.rows)
        csv = "\n".join([header, *quoted])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self.rows), folder / "rows.parquet")
        self.bomb = gzip.compress(b"[" + b" " * 2**31, 1)
        self.contents = {
            ".json": json.dumps(self.rows).encode(),
            ".jsonl": "\n".join(lines).encode(),
            ".csv": csv.encode(),
            ".parquet": (folder / "rows.parquet").read_bytes(),
        }

    def make(self, mutator: Mutator) -> Callable[[], None]:
        suffix = mutator.random.choice([".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz"])
        kind = suffix.removesuffix(".gz")
        if mutator.random.random() < 0.5 and kind in (".json", ".jsonl"):
            changed = mutator.value(self.rows)
            many = changed if isinstance(changed, list) else [changed]
            text = json.dumps(changed) if kind == ".json" else "\n".join(map(json.dumps, many))
            content = text.encode("utf-8", "surrogatepass")
        else:
            content = mutator.text(self.contents[kind])
        if suffix.endswith(".gz"):
            content = gzip.compress(content, 1)
            if mutator.random.random() < 0.3:
                content = mutator.text(content)
            if mutator.random.random() < 0.01:
                content = self.bomb
        path = self.folder / f"case{suffix}"
        path.write_bytes(content)
        for_test = mutator.random.random() < 0.3

        def check() -> None:
            rows = read_rows(path, for_test=for_test)
            assert rows
            assert all(isinstance(value, str) for row in rows for value in row)
            assert all(row.instruction.strip() for row in rows)

        return check


class CompletionFiles:
    """mutated completion files, as `qdense score` reads them"""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "completions.jsonl"
        self.lines = [{"index": n, "completion": f"So it is {n}.\nThe answer is {n}.00"} for n in range(20)]

    def make(self, mutator: Mutator) -> Callable[[], None]:
        lines = mutator.value(self.lines) if mutator.random.random() < 0.5 else self.lines
        content = "\n".join(map(json.dumps, lines)).encode("utf-8", "surrogatepass")
        self.path.write_bytes(mutator.text(content) if lines is self.lines else content)
        task = TASKS[mutator.random.choice(["gsm8k", "aqua", "boolq", "svamp"])]

        def check() -> None:
            labels = (
                ["7"] * 20 if task.name in ("gsm8k", "svamp") else ["A"] * 20 if task.name == "aqua" else ["true"] * 20
            )
            result, _ = score_task(task, labels, read_completions(self.path, 20))
            json.dumps(result, allow_nan=False)

        return check


class Adapters:
    """adapters: card, configuration, tensors and file mutated, loaded on a tiny LLaMA"""

    def __init__(self, folder: Path) -> None:
        os.environ["QDENSE_CACHE"] = str(folder / "cache")
        importlib.import_module("tests.conftest").make_tiny_model(folder / "tiny")
        self.base = load_base(ModelRecipe(name=str(folder / "tiny"), device="cpu"))
        self.folder, self.sound = folder / "adapter", []
        for method in ("denselora", "lora"):
            base = copy.deepcopy(self.base)
            recipe = AdapterRecipe(method=method, r=4)
            card = AdapterCard(
                model={"name": str(folder / "tiny"), "quantization": "nf4"}, fingerprint=base.fingerprint, template="alpaca",
                method=method,
            )  # fmt: skip
            save_adapter(attach_adapter(base, recipe, 1), folder / method, card)
            self.sound.append(folder / method)

    def make(self, mutator: Mutator) -> Callable[[], None]:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(mutator.random.choice(self.sound), self.folder)
        names = ["qdense.json", "adapter_config.json", "adapter_model.safetensors", "tensors"]
        name = mutator.random.choice(names)
        if name == "tensors":
            self._change_tensors(mutator)
        else:
            path = self.folder / name
            content = path.read_bytes()
            path.write_bytes(
                mutator.json(json.loads(content)) if name.endswith(".json") else self._file(mutator, content)
            )

        def check() -> None:
            card = read_card(self.folder)
            base = copy.deepcopy(self.base)
            model = load_adapter(base, self.folder, card)
            with torch.no_grad():
                logits = model(torch.arange(5).reshape(1, 5)).logits
            assert torch.isfinite(logits).all(), "logits that are no numbers"

        return check

    def _file(self, mutator: Mutator, content: bytes) -> bytes:
        if mutator.random.random() < 0.3:  # the header's length
            return mutator.random.choice([2**63, 2**40, len(content), 0, 3]).to_bytes(8, "little") + content[8:]
        if mutator.random.random() < 0.3:  # the header
            size = int.from_bytes(content[:8], "little")
            header = mutator.json(json.loads(content[8 : 8 + size]))
            return len(header).to_bytes(8, "little") + header + content[8 + size :]
        return mutator.text(content)

    def _change_tensors(self, mutator: Mutator) -> None:
        path = self.folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = mutator.random.choice(sorted(tensors))
        tensor = tensors[name]
        odd = [
            tensor[:1], tensor.T.contiguous(), tensor.flatten(), tensor.to(torch.int32), tensor.to(torch.float64), tensor.bool(),
            tensor.to(torch.complex64), torch.full_like(tensor, float("nan")), torch.full_like(tensor, float("inf")),
            torch.cat([tensor, tensor]), tensor.new_zeros(0),
        ]  # fmt: skip
        what = mutator.random.randrange(4)
        if what == 0:
            del tensors[name]
        elif what == 1:
            tensors[f"{name}.more"] = tensor.clone()
        else:
            tensors[name] = mutator.random.choice(odd)
        save_file(tensors, path)


KINDS: dict[str, tuple[type[Recipes] | type[Data] | type[CompletionFiles] | type[Adapters], int]] = {
    "recipes": (Recipes, 8000),
    "data": (Data, 8000),
    "completions": (CompletionFiles, 5000),
    "adapters": (Adapters, 2000),
}


class TooLong(BaseException):
    pass


@contextmanager
def limits() -> Iterator[None]:
    """Ten seconds, and 1 GiB of memory more than there is now."""

    def ring(number: int, frame: Any) -> None:
        raise TooLong

    before = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + _BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)


def outcome_of(check: Callable[[], None], folder: Path) -> str:
    """refused, accepted, or a fault with its traceback."""
    try:
        with limits():
            check()
    except QDenseError as error:
        return "refused" if str(folder) in str(error) or "--set" in str(error) else f"no place is named: {error}"
    except TooLong:
        return f"took more than {_SECONDS} s"
    except MemoryError:
        return f"more than 1 GiB: {traceback.format_exc()}"
    except Exception:
        return traceback.format_exc()
    return "accepted"


def fuzz(kind: str, num_cases: int, seed: int, keep: Path) -> tuple[Counter[str], float]:
    """How many cases came out how; inputs of faults are copied to `keep`."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = KINDS[kind][0](folder)
        started = time.monotonic()
        for number in range(num_cases):
            mutator = Mutator(hash((seed, number)))
            check = cases.make(mutator)
            outcome = outcome_of(check, folder)
            if outcome not in ("refused", "accepted"):
                target = keep / f"{kind}-{seed}-{number}"
                shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tiny", "cache"))
                (target / "outcome.txt").write_text(outcome)
                print(
                    f"{kind}, case {number} of seed {seed}: {outcome[-700:]}\nkept in {target}",
                    file=sys.stderr,
                    flush=True,
                )
                outcome = "fault"
            found[outcome] += 1
    return found, time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; all where left out")
    parser.add_argument("--cases", type=int, help="of each kind (default: 23,000 in all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("/tmp/qdense-fuzz"), help="where inputs of faults go")
    arguments = parser.parse_args()
    _quiet_libraries()
    lines, num_faults = (
        ["| input | cases | refused, the place named | accepted, and right | faults | |", "|---|---|---|---|---|---|"],
        0,
    )
    for kind in arguments.kinds or KINDS:
        cases, default = KINDS[kind]
        found, seconds = fuzz(kind, arguments.cases or default, arguments.seed, arguments.keep)
        num_faults += found["fault"]
        counts = [found.total(), found["refused"], found["accepted"], found["fault"]]
        lines.append(f"| {cases.__doc__} | {' | '.join(f'{count:,}' for count in counts)} | {seconds:.0f} s |")
    print("\n".join(lines))
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
