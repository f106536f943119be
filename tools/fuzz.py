"""Bad input: mutated recipes, experiments, data files, completion files and adapters, each to be refused well or read right.

    .venv/bin/python tools/fuzz.py --seed 1
    .venv/bin/python tools/fuzz.py --kind data --cases 500 --seed 3
    .venv/bin/python tools/fuzz.py --kind data --seed 3 --case 412      one case again

Refused well: a QDenseError whose text names the file. Read right: what was accepted holds together (rows are those that the
standard library reads, a recipe says the same when written and read again, an adapter's logits are finite numbers). Anything else
is a fault: another exception, more than ten seconds, more than 1 GiB above the process before the case. The input of a fault is
kept, with how to repeat it.

Memory is the peak that the kernel has seen (Linux: it can be reset), not a limit alone: beneath a limit, a reader that
asks for too much gets a MemoryError, makes a polite refusal of it, and on a larger machine takes it all.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

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
from qdense.data.rows import STANDARD_COLUMNS, read_rows
from qdense.errors import DataError, QDenseError
from qdense.events import ignore
from qdense.experiments.experiment import builtin_experiments, load_experiment
from qdense.inference import loaded as loaded_models
from qdense.libraries import quiet_libraries
from qdense.methods import METHODS
from qdense.modeling.adapter_files import AdapterCard, save_adapter
from qdense.modeling.attach import attach_adapter
from qdense.modeling.load import BaseModel, load_base
from qdense.recipe import AdapterRecipe, ModelRecipe, load_recipe
from qdense.runs import CARD_FILE, PEFT_CONFIG_FILE

SECONDS, _BYTES = 10, 2**30
_LIMIT_BYTES = 6 * 2**30  # no case gets more, whatever it asks for: the machine is shared
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
    200_000, 2**40, [], {}, [[]], {"a": 1}, ["q_proj"], "../..", "/etc/passwd", "\x1b]0;x\x07",
    2**31, 2**32 - 1, 2**32, -(2**63), 1e308, -1e308, 1e30, 5e-324, 1e-7, 10**6, 10**6 + 1, "olora", "pissa_niter_4", "loftq",
]  # fmt: skip
# Regular expressions that never end on some text, that end, and that are invalid.
_EXPRESSIONS = [
    r"((\w+\.?)+)+!", r"(a|a)*b", r"(.*)*x", r"(?:[a-z_]+\.?)+\d{30}", r"(?=(\w+))\1!", r".*\.(q|k|v)_proj$",
    "[a-z.]*" * 40 + "!",
    "(" * 30, "*", "(?P<n>x)(?P=n)", r"model\.layers\.(0|1)\..*", "x{1,65000}", "(x{1,9999}){1,9999}", "all-linear", "",
]  # fmt: skip
_EXPRESSION_KEYS = [
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
]
# Pieces of completions, repeated into long ones: on some, the search for an answer was quadratic or worse.
_LONG_PIECES = [
    " ", "\n", "\t \n", "1", "1,", "1,111", "9/", "-", "$", "answer ", "answer is ", "the answer to ", "not ", "(",
    "option ", "A ",
    "true ", "solution ", "\\frac{", "### ", "### Response:", "\u00a0", "\u2028", "1e", ".5", "10^", "x",
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

    def doubled(self, content: bytes) -> bytes:
        """JSON in which one key appears twice."""
        key = self.random.choice(re.findall(rb'"\w+": ', content) or [b""])
        return content.replace(key, key + b'"twice", ' + key, 1)


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


class Experiments:
    """mutated experiments, and values given by --set"""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "experiment.toml"
        files = builtin_experiments().values()
        self.sources = [path.read_bytes() for path in files]
        self.tables = [tomllib.loads(path.read_text(encoding="utf-8")) for path in files]

    def make(self, mutator: Mutator) -> Callable[[], None]:
        overrides: list[str] = []
        if mutator.random.random() < 0.4:
            self.path.write_bytes(mutator.text(mutator.random.choice(self.sources)))
        else:
            tables = mutator.random.choice(self.tables)
            try:
                self.path.write_text(tomli_w.dumps(mutator.value(tables)), encoding="utf-8")
            except (TypeError, ValueError):  # TOML cannot say it
                self.path.write_text(tomli_w.dumps(tables), encoding="utf-8")
                key = mutator.random.choice(
                    ["seeds", "search.learning_rate", "evaluate.limit", "adapter.r", "variants"]
                )
                overrides = [f"{key}={mutator.random.choice(_VALUES)!r}"]

        def check() -> None:
            experiment = load_experiment(self.path, overrides)
            finals = {arm.cell("final", seed).digest for arm in experiment.arms for seed in experiment.seeds}
            assert len(finals) == len(experiment.arms) * len(experiment.seeds)

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
            self.rows += [{key: row.get(key, "") for key in keys} for row in json.loads(_REAL_ROWS.read_text())[:12]]
        lines = [json.dumps(row) for row in self.rows]
        header = ",".join(self.rows[0])
        quoted = (",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in self.rows)
        csv = "\n".join([header, *quoted])
        table = pyarrow.Table.from_pylist(self.rows)

        def parquet(table: Any) -> bytes:
            pyarrow.parquet.write_table(table, folder / "rows.parquet")
            return (folder / "rows.parquet").read_bytes()

        day = pyarrow.array([0] * len(self.rows), pyarrow.timestamp("ns", "Europe/Berlin"))
        self.contents = {
            ".json": [json.dumps(self.rows).encode()],
            ".jsonl": ["\n".join(lines).encode()],
            ".csv": [csv.encode()],
            ".parquet": [parquet(table), parquet(table.append_column("when", day))],
        }

    def bomb(self, mutator: Mutator, suffix: str) -> bytes:
        """A small file that unpacks to far more than is accepted, or to just as much as is."""
        if suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            size, num_rows = mutator.random.choice([(1, 2_000_000), (1000, 300_000), (2**22, 300)])
            texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * num_rows, "int32"), ["x" * size])
            table = pyarrow.table({"instruction": texts, "output": texts})
            pyarrow.parquet.write_table(table, self.folder / "rows.parquet", store_schema=False)
            return (self.folder / "rows.parquet").read_bytes()
        start, piece = mutator.random.choice(
            {
                ".json.gz": [(b"[", b"{},"), (b"[", b"[],"), (b"[", b"0,"), (b"", b" ")],
                ".jsonl.gz": [(b"", b"\n"), (b"", b"{}\n")],
                ".csv.gz": [(b"instruction,output\n", b"\n"), (b"", b'"'), (b"instruction,output\n", b"a,b,c\n")],
            }[suffix]
        )
        num_bytes = mutator.random.choice([4, 15, 250]) * 2**20
        return gzip.compress(start + piece * (num_bytes // len(piece)), 1)

    def make(self, mutator: Mutator) -> Callable[[], None]:
        suffix = mutator.random.choice([".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz"])
        kind = suffix.removesuffix(".gz")
        how = mutator.random.random()
        if how < 0.5 and kind in (".json", ".jsonl"):
            changed = mutator.value(self.rows)
            many = changed if isinstance(changed, list) else [changed]
            text = json.dumps(changed) if kind == ".json" else "\n".join(map(json.dumps, many))
            content = text.encode("utf-8", "surrogatepass")
            if how < 0.03:
                content = mutator.doubled(content)
        else:
            content = mutator.text(mutator.random.choice(self.contents[kind]))
        if suffix.endswith(".gz"):
            content = gzip.compress(content, 1)
            if mutator.random.random() < 0.3:
                content = mutator.text(content)
        if suffix not in (".json", ".jsonl", ".csv") and mutator.random.random() < 0.01:
            content = self.bomb(mutator, suffix)
        path = self.folder / f"case{suffix}"
        path.write_bytes(content)
        for_test = mutator.random.random() < 0.3

        def check() -> None:
            rows = read_rows(path, STANDARD_COLUMNS, gold="answer" if for_test else "output").rows
            assert rows
            assert all(isinstance(value, str) for row in rows for value in row[:4])
            assert not any(row.messages for row in rows)
            assert all(row.instruction.strip() for row in rows)
            if kind in (".json", ".jsonl") and path.stat().st_size < 2**20:
                text = (gzip.decompress(content) if suffix.endswith(".gz") else content).decode("utf-8-sig")
                texts = [text] if kind == ".json" else [line for line in text.split("\n") if line.strip()]
                read = list(map(json.loads, texts))
                for row, record in zip(rows, read[0] if kind == ".json" else read, strict=True):
                    # Numbers are text.
                    record = {key: str(x) if type(x) in (int, float) else x for key, x in record.items()}
                    assert (row.instruction, row.input) == (record["instruction"], record.get("input") or "")
                    assert (row.answer == record["answer"]) if for_test else (row.output == record["output"])

        return check


class Conversations:
    """mutated conversations, prompts and completions as messages, and whole texts, as training reads and cuts them"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        turns: list[dict[str, Any]] = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 2 + 2? Täter, 数"},
            {"role": "assistant", "content": "4."},
            {"role": "user", "content": [{"type": "text", "text": "And 3 + 3?"}]},
            {"role": "assistant", "content": "<|im_end|> 6."},
        ]
        shared = [{"from": turn["role"].replace("user", "human"), "value": str(turn["content"])} for turn in turns]
        self.files: list[list[dict[str, Any]]] = [
            [{"messages": turns}, {"messages": turns[1:3]}],
            [{"conversations": shared, "id": 7}, {"conversations": shared[1:3]}],
            [{"prompt": turns[:4], "completion": turns[4:]}, {"prompt": turns[1:2], "completion": turns[2:3]}],
            [{"text": "One. </s> Two."}, {"text": " 3 "}],
            [{"input": "2 + 2 =", "output": "4"}, {"input": "3", "output": "6"}],
        ]
        self.tokenizer = importlib.import_module("tests.helpers.models").make_tokenizer()
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})

    def make(self, mutator: Mutator) -> Callable[[], None]:
        from qdense.data.examples import encode_rows
        from qdense.ops.cross_entropy import IGNORED
        from qdense.recipe import DataRecipe

        rows = mutator.random.choice(self.files)
        if mutator.random.random() < 0.1:
            rows = [rows[0], mutator.random.choice(self.files)[0]]
        if mutator.random.random() < 0.7:
            changed = mutator.value(rows)
            content = "\n".join(map(json.dumps, changed if isinstance(changed, list) else [changed])).encode()
        else:
            content = mutator.text("\n".join(map(json.dumps, rows)).encode())
        path = self.folder / "case.jsonl"
        path.write_bytes(content)
        skip_bad, max_length = mutator.random.random() < 0.3, mutator.random.choice([8, 40, 4096])
        train_on = mutator.random.choice(["auto", "all", "response", "last"])

        def check() -> None:
            read = read_rows(path, skip_bad=skip_bad).rows
            assert len({row.kind for row in read}) == 1
            assert all(row.output.strip() for row in read)
            template = "chatml" if read[0].kind == "conversation" else "auto"
            settings = {"path": str(path), "template": template, "max_length": max_length, "train_on": train_on}
            data = DataRecipe.model_validate(settings)
            if sum(len(row.output) + sum(len(turn.content) for turn in row.messages) for row in read) > 20_000:
                return
            try:
                encoded = encode_rows(read, range(len(read)), self.tokenizer, data)
            except DataError:  # of the recipe: nothing fits data.max_length, or the template refuses these turns
                return
            for example in encoded.examples:
                row, text = read[example.row], self.tokenizer.decode(example.input_ids)
                counted = [label for label in example.labels if label != IGNORED]
                assert len(example.input_ids) == len(example.labels) <= max_length
                assert counted
                if encoded.lengths[example.row] <= max_length:  # nothing was cut off
                    assert (row.messages[-1].content if row.messages else row.output.strip()) in text
                if row.num_given and train_on in ("auto", "response"):
                    learnt = self.tokenizer.decode(counted)
                    assert not any(turn.role == "user" and f"user\n{turn.content}<" in learnt for turn in row.messages)

        return check


class CompletionFiles:
    """mutated completion files, as `qdense score` reads them"""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "completions.jsonl"
        texts = [
            "So it is {n}.\nThe answer is {n}.00",
            "1e{n} is 3/{n}",
            "The answer is (A), not true",
            "solution1 = {n}",
        ]
        self.lines = [
            {"index": n, "completion": text.format(n=n), "sample": sample}
            for n in range(10)
            for sample, text in enumerate(texts)
        ]

    def make(self, mutator: Mutator) -> Callable[[], None]:
        lines = [line for line in self.lines if line["sample"] == 0] if mutator.random.random() < 0.5 else self.lines
        if (how := mutator.random.random()) < 0.5:
            changed = mutator.value(lines)
            content = "\n".join(map(json.dumps, changed if isinstance(changed, list) else [changed])).encode()
            if how < 0.03:
                content = mutator.doubled(content)
        else:
            content = mutator.text("\n".join(map(json.dumps, lines)).encode())
        if mutator.random.random() < 0.2:
            pieces = mutator.random.choices(_LONG_PIECES, k=3)
            lengths = mutator.random.choices([1, 1, 1000, 60_000], k=3)
            text = "".join(piece * length for piece, length in zip(pieces, lengths, strict=True))
            changed = [{"index": n, "completion": text if n == 3 else "7"} for n in range(10)]
            content = "\n".join(map(json.dumps, changed)).encode()
        self.path.write_bytes(content)
        task = TASKS[mutator.random.choice(sorted(TASKS))]
        label = next(
            label
            for label in ("7", "A", "true", "solution1", "answer1", "ending1", "option1")
            if task.answers.is_label(label)
        )

        def check() -> None:
            completions = read_completions(self.path, 10)
            result, _ = score_task(task, [label] * 10, completions)
            json.dumps(result, allow_nan=False)
            text = self.path.read_text(encoding="utf-8-sig")
            read = [json.loads(line) for line in text.split("\n") if line.strip()]
            assert sorted((line["index"], line["completion"]) for line in read) == sorted(
                (index, text) for index, texts in completions.items() for text in texts
            )

        return check


class Adapters:
    """adapters: card, configuration, tensors and file mutated, loaded on a tiny LLaMA"""

    def __init__(self, folder: Path) -> None:
        os.environ["QDENSE_CACHE"] = str(folder / "cache")
        importlib.import_module("tests.helpers.models").make_tiny_model(folder / "tiny")
        self.folder, self.sound = folder / "adapter", []
        self.bases = {
            name: load_base(ModelRecipe(name=str(folder / "tiny"), quantization=name, device="cpu"))
            for name in ("nf4", "none")
        }
        for name, method in METHODS.items():
            if name == "none":
                continue
            quantization = "nf4" if "nf4" in method.quantizations else "none"
            base = self._base(quantization)
            card = AdapterCard({"name": base.name, "quantization": quantization}, base.fingerprint, "alpaca", name)
            model = attach_adapter(base, AdapterRecipe(method=name, r=4), 10)
            for parameter in model.parameters():
                if parameter.requires_grad:  # or most methods' adapters would add nothing
                    torch.nn.init.normal_(parameter, std=0.02)
            save_adapter(model, folder / name, card)
            self.sound.append(folder / name)

    def _base(self, quantization: str) -> BaseModel:
        base = self.bases.get(quantization, self.bases["nf4"])
        return replace(base, model=copy.deepcopy(base.model))

    def make(self, mutator: Mutator) -> Callable[[], None]:
        shutil.rmtree(self.folder, ignore_errors=True)
        sound = mutator.random.choice(self.sound)
        shutil.copytree(sound, self.folder)
        weights = next(self.folder.glob("*.safetensors")).name
        name = mutator.random.choice([CARD_FILE, PEFT_CONFIG_FILE, weights, "tensors"])
        if name == "tensors" or not (self.folder / name).exists():
            self._change_tensors(mutator)
        else:
            path = self.folder / name
            content = path.read_bytes()
            path.write_bytes(
                mutator.json(json.loads(content)) if name.endswith(".json") else self._file(mutator, content)
            )
            if name == PEFT_CONFIG_FILE and mutator.random.random() < 0.4:
                path.write_text(json.dumps(json.loads(content) | self._expression(mutator)))

        def check() -> None:
            # `qdense evaluate` gets the base that is at hand, whatever a mutated card names.
            with mock.patch.object(
                loaded_models, "load_base", lambda recipe, *_, **__: self._base(recipe.quantization)
            ):
                loaded = loaded_models.load_model({"adapter": self.folder}, ignore)
            with torch.no_grad():
                logits = loaded.model(torch.arange(5).reshape(1, 5)).logits
            assert torch.isfinite(logits).all(), "logits that are no numbers"
            for file in self.folder.glob("*.safetensors"):
                assert all(tensor.isfinite().all() for tensor in load_file(file).values()), (
                    "tensors that are no numbers"
                )

        return check

    def _expression(self, mutator: Mutator) -> dict[str, Any]:
        """A setting that PEFT takes for a regular expression."""
        key, expression = mutator.random.choice(_EXPRESSION_KEYS), mutator.random.choice(_EXPRESSIONS)
        if key.endswith("_pattern"):
            return {key: mutator.random.choice([{expression: 2}, [expression], expression]), "layers_to_transform": [0]}
        return {key: mutator.random.choice([expression, [expression]])}

    def _file(self, mutator: Mutator, content: bytes) -> bytes:
        if mutator.random.random() < 0.3:  # the header's length
            return mutator.random.choice([2**63, 2**40, len(content), 0, 3]).to_bytes(8, "little") + content[8:]
        if mutator.random.random() < 0.3:  # the header
            size = int.from_bytes(content[:8], "little")
            header = mutator.json(json.loads(content[8 : 8 + size]))
            return len(header).to_bytes(8, "little") + header + content[8 + size :]
        return mutator.text(content)

    def _change_tensors(self, mutator: Mutator) -> None:
        path = next(self.folder.glob("*.safetensors"))
        tensors = load_file(path)
        name = mutator.random.choice(sorted(tensors))
        tensor = tensors[name]
        odd = [
            tensor[:1], tensor.T.contiguous(), tensor.flatten(), tensor.to(torch.int32), tensor.to(torch.float64),
    tensor.bool(),
            tensor.to(torch.float8_e4m3fn), tensor.to(torch.complex64), torch.full_like(tensor, float("nan")),
            torch.full_like(tensor, float("inf")),
            torch.cat([tensor, tensor]), tensor.new_zeros(0), tensor.new_zeros([1] * 8), tensor.sum(),
        ]  # fmt: skip
        what = mutator.random.randrange(4)
        if what == 0:
            del tensors[name]
        elif what == 1:
            tensors[f"{name}.more"] = tensor.clone()
        else:
            tensors[name] = mutator.random.choice(odd)
        save_file(tensors, path, metadata={"format": "pt"})


_Kind = type[Recipes] | type[Experiments] | type[Data] | type[Conversations] | type[CompletionFiles] | type[Adapters]
KINDS: dict[str, tuple[_Kind, int]] = {
    "recipes": (Recipes, 8000),
    "experiments": (Experiments, 3000),
    "data": (Data, 8000),
    "conversations": (Conversations, 4000),
    "completions": (CompletionFiles, 5000),
    "adapters": (Adapters, 2000),
}


REFUSED, ACCEPTED, NO_PLACE, TRACEBACK, HANG, MEMORY = OUTCOMES = (
    "refused with a message", "accepted, and right", "no place named", "tracebacks", "hangs", "too much memory",
)  # fmt: skip


class TooLong(BaseException):
    pass


@contextmanager
def limits() -> Iterator[None]:
    """Ten seconds; and memory that cannot take the machine down, `_LIMIT_BYTES` more than there is now."""

    def ring(number: int, frame: Any) -> None:
        raise TooLong

    before = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + _LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _lacked_memory(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, is memory that was refused."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def outcome_of(check: Callable[[], None], folder: Path) -> tuple[str, str]:
    """One of OUTCOMES, and what there is to say about it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, started = _memory("VmRSS"), time.monotonic()
    outcome, text = ACCEPTED, ""
    try:
        with limits():
            check()
    except QDenseError as error:
        text = str(error)
        outcome = REFUSED if str(folder) in text or "--set" in text else NO_PLACE
        if _lacked_memory(error):
            outcome = MEMORY
    except TooLong:
        outcome, text = HANG, traceback.format_exc()
    except Exception as error:
        outcome, text = MEMORY if _lacked_memory(error) else TRACEBACK, traceback.format_exc()
    took, peak = time.monotonic() - started, _memory("VmHWM") - before
    if outcome in (REFUSED, ACCEPTED) and took > SECONDS:
        outcome, text = HANG, f"{took:.0f} s. {text}"
    if outcome in (REFUSED, ACCEPTED) and peak > _BYTES:
        outcome, text = MEMORY, f"{peak / 2**20:.0f} MiB. {text}"
    return outcome, text


def fuzz(kind: str, numbers: Iterable[int], seed: int, keep: Path) -> tuple[Counter[str], float]:
    """How many of the cases came out how, and the seconds it took; inputs of faults are copied to `keep`."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = KINDS[kind][0](folder)
        started = time.monotonic()
        for number in numbers:
            check = cases.make(Mutator(hash((seed, number))))
            outcome, text = outcome_of(check, folder)
            found[outcome] += 1
            if outcome in (REFUSED, ACCEPTED):
                continue
            target = keep / f"{kind}-{seed}-{number}"
            shutil.copytree(
                folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tiny", "cache", *METHODS)
            )
            (target / "outcome.txt").write_text(f"{outcome}\n{text}", errors="backslashreplace")
            print(
                f"{outcome}: {text[-700:]!a}\n  kept in {target}; again: tools/fuzz.py --kind {kind} --seed {seed} "
                f"--case {number}",
                file=sys.stderr,
                flush=True,
            )
    return found, time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append", help="may be repeated; default: all")
    parser.add_argument(
        "--cases", type=int, help=f"of each kind (default: {sum(n for _, n in KINDS.values()):,} in all)"
    )
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("/tmp/qdense-fuzz"), help="where inputs of faults go")
    arguments = parser.parse_args()
    quiet_libraries()
    lines = [f"| input | cases | {' | '.join(OUTCOMES)} | |", f"|{'---|' * (len(OUTCOMES) + 3)}"]
    num_faults = 0
    for kind in arguments.kind or KINDS:
        cases, default = KINDS[kind]
        numbers = range(arguments.cases or default) if arguments.case is None else [arguments.case]
        found, seconds = fuzz(kind, numbers, arguments.seed, arguments.keep)
        num_faults += found.total() - found[REFUSED] - found[ACCEPTED]
        counts = [found.total(), *(found[outcome] for outcome in OUTCOMES)]
        lines.append(f"| {cases.__doc__} | {' | '.join(f'{count:,}' for count in counts)} | {seconds:.0f} s |")
    print("\n".join(lines))
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
