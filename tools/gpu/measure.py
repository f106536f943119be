"""Every GPU check and measurement of the project, in one go, on one GPU, within ten minutes.

    python tools/gpu/measure.py --lengths .gpu/lengths.json --output RESULTS.md

Stage after stage; after each the results file is written anew, so that what was measured is kept whatever happens next. A
stage that fails says so in the file and the next one begins. What no stage has measured is listed at the end, with the
command that will. `--list` writes that list alone: it needs no GPU.

LLaMA-3-8B's shape with random NF4 weights (tools/random_base.py): nothing is downloaded. Smaller cards are imitated by a limit
on what the process may allocate; 0.6 GiB of each are left to CUDA's context, which that limit does not count.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_TOOLS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_TOOLS), str(_TOOLS.parent)]

import torch
from bench_train import Bench, Figures, Way, matmul_flops, random_examples, spread, table, ways
from random_base import random_base

from qdense.catalogs.models import CATALOG
from qdense.libraries import quiet_libraries
from qdense.modeling.load import BaseModel
from qdense.planning.memory import Kernels, StepLayout
from qdense.planning.plan import CUDA_CONTEXT_BYTES, Machine, longest_context, make_plan
from qdense.planning.speed import card_named, tokens_per_second
from qdense.provenance import git_hash, package_versions
from qdense.recipe import Recipe, recipe_from_tables

_GIB = 2**30
_SHAPE = CATALOG["llama3-8b"]
_UNSLOTH = {24: 78_475, 16: 40_724, 12: 21_848, 8: 2_972}  # longest context, batch 1: Unsloth's published figures
_COMMAND = "python tools/gpu/measure.py --lengths .gpu/lengths.json --output tools/gpu/RESULTS.md --only"

# What is claimed about a GPU, and the stage that measures it.
GOALS = {
    "kernels, offload and packing are right on a GPU": "checks",
    "a step over the bare base's, same recomputation: at most 1.05": "full",
    "tokens/s over LoRA r 16, equal full batches of 4 x 2048: at least 1.3": "full",
    "share of the matmul ceiling at 2,048 tokens: at least 60%": "full",
    "tokens/s over LoRA r 16, padded, real Math10K lengths: at least 2.5": "rows",
    "Math10K training peak, 16 x 256: under 8 GB": "rows",
    "predicted peak within 10% of the measured one, eight configurations": "plan",
    "longest context on 24 / 16 / 12 / 8 GB: above 78,475 / 40,724 / 21,848 / 2,972": "context",
    "evaluation in 4 bits: tokens/s": "generate",
    "fused adapter against plain PyTorch, operation by operation": "adapter",
    "kernels on the device beside the wall clock: what waits for Python": "profile",
}


@dataclass
class Report:
    """Sections by stage, those of earlier calls kept; written after each."""

    path: Path
    commit: str
    sections: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        earlier = self.path.with_suffix(".json")
        if earlier.is_file():
            self.record = json.loads(earlier.read_text())
            self.sections = self.record.pop("sections")

    def add(self, stage: str, section: str) -> None:
        """A stage's section, with what it was measured on under its heading: an earlier call may have had another card."""
        versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
        made = (
            f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {datetime.now(UTC):%Y-%m-%d}, commit {self.commit}, "
            f"{versions}: `{_COMMAND} {stage}`"
        )
        heading, _, rest = section.partition("\n\n")
        self.sections[stage] = f"{heading}\n\n{made}\n\n{rest}"

    def write(self) -> None:
        lines = ["# Measured on a GPU", ""]
        if not self.sections:
            lines += ["Nothing is measured yet.", ""]
        for section in self.sections.values():
            lines += [section, ""]
        missing = [(goal, stage) for goal, stage in GOALS.items() if stage not in self.sections]
        if missing:
            lines += ["## Not yet measured on a GPU", "", "| what | command |", "|---|---|"]
            lines += [f"| {goal} | `{_COMMAND} {stage}` |" for goal, stage in missing]
            lines += [
                "",
                "Without `--only`, one call measures all of it. tools/gpu/prepare.py writes the lengths, which travel along.",
            ]
        self.path.write_text("\n".join(lines).rstrip() + "\n")
        if self.sections:
            record = {**self.record, "sections": self.sections}
            self.path.with_suffix(".json").write_text(json.dumps(record, indent=1, default=str))


class Stages:
    """What is measured, each a method that returns its section of the report."""

    def __init__(self, arguments: argparse.Namespace, report: Report) -> None:
        self.arguments, self.report = arguments, report
        self.device = torch.device("cuda")
        self._base: BaseModel | None = None
        self._ceiling = 0.0

    @property
    def base(self) -> BaseModel:
        if self._base is None:
            self._base = random_base(_SHAPE, self.device)
        return self._base

    @property
    def ceiling(self) -> float:
        self._ceiling = self._ceiling or matmul_flops(self.device, torch.bfloat16)
        return self._ceiling

    # --- stages -------------------------------------------------------------------------------------------------------------

    def checks(self) -> str:
        """The tests that need a GPU, and the kernels' tests compiled instead of interpreted."""
        tests = [
            "tests/ops/test_denselora_triton.py",
            "tests/modeling/test_recompute.py",
            "tests/modeling/test_packing.py",
            "tests/test_gpu.py",
        ]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "8",  # most of the time goes to compiling kernels, on the host
            "--no-header",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:warnings",
            *tests,
        ]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        outcome = subprocess.run(
            command, cwd=_TOOLS.parent, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        self.report.record["checks"] = outcome.stdout[-6000:] + outcome.stderr[-2000:]
        if outcome.returncode:
            print(self.report.record["checks"], flush=True)
        last = [line for line in outcome.stdout.splitlines() if line.strip()][-1:]
        return (
            f"## Checks\n\n`pytest {' '.join(tests)}` (status {outcome.returncode}): {last[0] if last else 'no output'}"
        )

    def full(self) -> str:
        """Equal full batches of 4 x 2048 tokens."""
        recipe = _recipe(batch_size=4, max_length=2048)
        bench = Bench(recipe, self.base, random_examples([2048] * 4 * (self.steps + 1), _SHAPE.vocab_size))
        return "## Full batches of 4 x 2048 tokens\n\n" + self._bench("full", bench)

    def rows(self) -> str:
        """Batches of 16 rows as long as real Math10K rows, cut at 256 tokens."""
        if self.arguments.lengths is None:
            raise ValueError("--lengths is missing: tools/gpu/prepare.py writes the file")
        lengths = json.loads(self.arguments.lengths.read_text())[: 16 * (self.steps + 1)]
        recipe = _recipe(batch_size=16, max_length=256)
        bench = Bench(recipe, self.base, random_examples([min(n, 256) for n in lengths], _SHAPE.vocab_size))
        way = Way("16 x 256, all recomputed", "denselora", 32, StepLayout(16, _SHAPE.num_layers), is_fused=True)
        peak = bench.run([way], 1)[way.name]
        small = f"Peak of 16 x 256 with all layers recomputed: {_sizes(peak)} (reserved: {peak.reserved_bytes / 1e9:.2f} GB)."
        return f"## Real Math10K lengths, 16 rows of at most 256 tokens\n\n{self._bench('rows', bench)}\n\n{small}"

    def plan(self) -> str:
        """Predicted peaks against measured ones."""
        layers = _SHAPE.num_layers
        configurations: list[tuple[str, int, StepLayout, dict[str, Any], bool]] = [
            ("all recomputed", 256, StepLayout(16, layers), {}, True),
            ("none recomputed", 256, StepLayout(4, 0), {}, True),
            ("half recomputed", 256, StepLayout(8, layers // 2), {}, True),
            ("2 x 2048", 2048, StepLayout(2, layers), {}, True),
            ("8 x 2048", 2048, StepLayout(8, layers), {}, True),
            ("8 x 2048, offload", 2048, StepLayout(8, layers, offload=True), {}, True),
            ("1 x 32k, offload, tiles", 32768, StepLayout(1, layers, offload=True, mlp_tile_tokens=4096), {}, True),
            ("r 128, all modules", 1024, StepLayout(4, layers), {"r": 128, "target_modules": "QKVOGUD"}, True),
            ("plain PyTorch", 1024, StepLayout(4, layers), {}, False),
            ("plain PyTorch, none recomputed", 256, StepLayout(4, 0), {}, False),
            ("LoRA r 16, plain", 1024, StepLayout(4, layers), {"method": "lora", "r": 16}, False),
        ]
        lines = ["| configuration | measured (allocated) | predicted | | reserved |", "|---|---|---|---|---|"]
        for name, length, layout, adapter, is_fused in configurations:
            recipe = _recipe(batch_size=layout.micro_batch_size, max_length=length, **adapter)
            examples = random_examples([length] * layout.micro_batch_size * 2, _SHAPE.vocab_size)
            bench = Bench(recipe, self.base, examples)
            way = Way(name, recipe.adapter.method, recipe.adapter.r, layout, is_fused=is_fused)
            figures = bench.run([way], 1)[name]
            self.report.record.setdefault("plan", {})[name] = vars(figures)
            if figures.fault:
                lines.append(f"| {name} | {figures.fault} | {figures.predicted_bytes / _GIB:.2f} GiB | | |")
                continue
            off = figures.predicted_bytes / figures.allocated_bytes - 1
            lines.append(
                f"| {name} | {figures.allocated_bytes / _GIB:.2f} GiB | {figures.predicted_bytes / _GIB:.2f} GiB | {off:+.1%} | "
                f"{figures.reserved_bytes / _GIB:.2f} GiB |"
            )
        return "## Predicted and measured memory\n\n" + "\n".join(lines)

    def profile(self) -> str:
        """One step each: the wall clock, and how long the device computes within it."""
        lines = ["| step | wall, ms | kernels, ms | launches | longest kernels, ms |", "|---|---|---|---|---|"]
        layers = _SHAPE.num_layers
        for rows, length, depth in ((4, 2048, layers), (1, 2048, 0), (4, 256, layers)):
            for method in ("denselora", None):
                recipe = _recipe(batch_size=rows, max_length=length)
                bench = Bench(recipe, self.base, random_examples([length] * rows * 6, _SHAPE.vocab_size))
                way = Way("one", method, 32, StepLayout(rows, depth), is_fused=True)
                steps = bench.stepper(way, Figures())
                for _ in range(3):
                    next(steps)
                start = time.perf_counter()
                next(steps)
                wall = time.perf_counter() - start
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                    next(steps)
                steps.close()  # type: ignore[attr-defined]  # a generator
                kernels = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
                total = sum(event.self_device_time_total for event in kernels) / 1e3
                top = "; ".join(f"{event.key[:40]} {event.self_device_time_total / 1e3:.0f}" for event in kernels[:6])
                count = sum(event.count for event in kernels if event.self_device_time_total)
                what = f"{method or 'base alone'}, {rows} x {length}, {depth} layers recomputed"
                lines.append(f"| {what} | {1e3 * wall:.0f} | {total:.0f} | {count:,} | {top} |")
        return "## Kernels and the wall clock\n\n" + "\n".join(lines)

    def context(self) -> str:
        """The longest row on imitated cards: a step of Unsloth's length plus 5%, then of 90% of what the plan predicts."""
        lines = [
            "| card | Unsloth's (published) | predicted | steps that ran | seconds | reserved |",
            "|---|---|---|---|---|---|",
        ]
        total_bytes = torch.cuda.get_device_properties(self.device).total_memory
        for gigabytes, published in sorted(_UNSLOTH.items()):  # the longest rows take minutes: last
            memory_bytes = gigabytes * _GIB
            machine = Machine.card_of(memory_bytes)
            predicted = longest_context(_recipe(batch_size=1, max_length=2048), _SHAPE, machine)
            torch.cuda.set_per_process_memory_fraction((memory_bytes - CUDA_CONTEXT_BYTES) / total_bytes)
            ran, took, reserved = [], [], []
            try:
                for length in sorted({int(1.05 * published), int(0.9 * predicted)}):
                    if self.seconds_left < 20 + length / 1200:
                        ran.append(f"{length:,} not tried")
                        continue
                    recipe = _recipe(batch_size=1, max_length=length)
                    layout = make_plan(recipe, _SHAPE, machine).layout
                    bench = Bench(recipe, self.base, random_examples([length] * 2, _SHAPE.vocab_size))
                    # One step alone: warming up would cost as much.
                    figures = bench.run([Way("one", "denselora", 32, layout, is_fused=True)], 0)["one"]
                    ran.append(figures.fault or f"{length:,}")
                    took.append(f"{figures.first_seconds:.0f}")
                    reserved.append(f"{figures.reserved_bytes / _GIB:.1f} GiB")
                    # Pinned buffers of the last length would stay beside those of the next, and fill the host.
                    torch._C._host_emptyCache()
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            cells = (
                f"{gigabytes} GB",
                f"{published:,}",
                f"{predicted:,}",
                *("; ".join(part) for part in (ran, took, reserved)),
            )
            lines.append("| " + " | ".join(cells) + " |")
        return "## Longest context, batch 1\n\n" + "\n".join(lines)

    def generate(self) -> str:
        """Completion with an adapter, prompts of 200 tokens: steps one by one, and recorded."""
        from qdense.inference.generation import DECODINGS, Prompt, generate
        from qdense.modeling.attach import attach_adapter
        from qdense.planning.generation import sequences_that_fit

        recipe = _recipe(batch_size=1, max_length=256)
        tokenizer = importlib.import_module("tests.helpers.models").make_tokenizer()
        base = Bench(recipe, replace(self.base, tokenizer=tokenizer), []).fresh_base()
        model = attach_adapter(base, recipe.adapter, 1).eval()
        size = sequences_that_fit(
            recipe.model,
            _SHAPE,
            new_tokens=128,
            is_cuda=True,
            memory_bytes=24 * _GIB,
            most=DECODINGS["greedy"].batch_size_cuda,
        )
        lines = [
            "| decoding | prompts | at a time | new tokens | one by one, tokens/s | recorded, tokens/s | times "
            "| equal completions | reserved, recorded |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, count, at_once, new_tokens in (("greedy", size, size, 40), ("greedy", 1, 1, 40), ("beam4", 8, 8, 24)):
            examples = random_examples([200] * count, 256)
            prompts = [Prompt(i, 0, example.input_ids.tolist()) for i, example in enumerate(examples)]
            speeds, texts = [], []
            for is_recorded in (False, True, True):  # the second time, nothing is compiled any more
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                settings: dict[str, Any] = {"max_new_tokens": new_tokens, "stop": (), "batch_size": at_once}
                done = list(generate(base, model, prompts, DECODINGS[name], **settings, is_recorded=is_recorded))
                torch.cuda.synchronize()
                speeds.append(sum(completion.num_tokens for completion in done) / (time.perf_counter() - start))
                texts.append({completion.index: completion.completion for completion in done})
            equal = sum(texts[0][number] == texts[2][number] for number in texts[0])
            lines.append(
                f"| {name} | {count} | {at_once} | {new_tokens} | {speeds[0]:,.0f} | {speeds[2]:,.0f} | "
                f"{speeds[2] / speeds[0]:.1f} | {equal} of {count} | {torch.cuda.max_memory_reserved() / _GIB:.1f} GiB |"
            )
        return "## Completion in 4 bits\n\n" + "\n".join(lines)

    def adapter(self) -> str:
        """encode and decode, forward and backward, on 8,192 tokens, beside the bytes that they must move."""
        from qdense.ops import denselora, denselora_triton

        lines = [
            "| operation | plain, ms | fused, ms | times | GB/s of the fused, counting x, output and gradients |",
            "|---|---|---|---|---|",
        ]
        for name, d_in, d_out, readers in (
            ("q, k, v", 4096, 4096, 3),
            ("up", 4096, 14336, 1),
            ("down", 14336, 4096, 1),
        ):
            for r in (16, 32, 64):
                times = [_time_adapter(ops, d_in, d_out, readers, r) for ops in (denselora, denselora_triton)]
                moved = 8192 * 2 * (4 * d_in + 3 * d_out)
                lines.append(
                    f"| {name}, r {r} | {spread(times[0], 2)} | {spread(times[1], 2)} | "
                    f"{statistics.median(times[0]) / statistics.median(times[1]):.2f} | "
                    f"{moved / statistics.median(times[1]) / 1e6:,.0f} |"
                )
        return "## The adapter alone, forward and backward\n\n" + "\n".join(lines)

    # --- parts --------------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        return int(self.arguments.steps)

    @property
    def seconds_left(self) -> float:
        return float(self.arguments.started + 60 * self.arguments.minutes - time.monotonic())

    def _bench(self, name: str, bench: Bench) -> str:
        card = card_named(torch.cuda.get_device_name())
        layout = make_plan(bench.recipe, _SHAPE, Machine.card_of(24 * _GIB, card=card)).layout
        chosen = ways(bench.recipe, layout, _SHAPE.num_layers, is_cuda=True)
        found = bench.run(chosen, self.steps)
        size = bench.recipe.training.batch_size
        counts = [len(example.input_ids) for example in bench.examples]
        tokens = [sum(counts[i : i + size]) for i in range(0, len(counts), size)][1:]
        self.report.record[name] = {"tokens": tokens, "ways": {way: vars(figures) for way, figures in found.items()}}
        fused, bare = (found[way].seconds for way in (chosen[3].name, chosen[4].name))
        more = [f"Ceiling: {self.ceiling / 1e12:.0f} TFLOP/s. Planned for 24 GiB: {layout}."]
        if fused and bare:
            more.append(
                f"Same recomputation, 4 rows: {spread([a / b for a, b in zip(fused, bare, strict=True)], 3)} of the bare base."
            )
        if card is not None:
            predicted = tokens_per_second(bench.recipe, _SHAPE, Kernels(True, True, True), layout, card)
            more.append(f"Predicted for this card: {predicted:,.0f} tokens/s as planned.")
        return table(bench, chosen, found, tokens, self.ceiling) + "\n\n" + " ".join(more)


def _recipe(*, batch_size: int, max_length: int, **adapter: Any) -> Recipe:
    return recipe_from_tables(
        {
            "model": {"name": "llama3-8b"},
            "adapter": {"r": 32} | adapter,
            "data": {"path": "random", "max_length": max_length},
            "training": {"batch_size": batch_size},
        },
        source="tools/gpu/measure.py",
    )


def _sizes(figures: Figures) -> str:
    return figures.fault or (
        f"{figures.allocated_bytes / _GIB:.2f} GiB allocated ({figures.predicted_bytes / _GIB:.2f} predicted), "
        f"{figures.reserved_bytes / _GIB:.2f} GiB reserved"
    )


def _time_adapter(ops: Any, d_in: int, d_out: int, readers: int, r: int) -> list[float]:
    """Milliseconds of forward and backward, gradients of everything, dropout 0.05; replayed, so that no time goes to Python."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(8192, d_in, **options, requires_grad=True)
    encoders = [torch.randn(r, d_in, **options, requires_grad=True) for _ in range(readers)]
    m = torch.randn(r, r, **options, requires_grad=True)
    decoder = torch.randn(d_out, r, **options, requires_grad=True)
    projection = torch.randn(8192, d_out, **options)
    given = projection.clone().requires_grad_()

    def step() -> None:
        output = given * 1
        again, encoded = ops.encode(x, encoders, dropout=0.05)
        delta = ops.decode(torch.nn.functional.linear(encoded[0], m), decoder, scaling=2.0, dropout=0.05)
        decoded = ops.add(output, delta)
        torch.autograd.grad(
            [decoded, again, *encoded[1:]],
            [x, *encoders, m, decoder, given],
            [projection, x.detach(), *(e.detach() for e in encoded[1:])],
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    times = []
    for number in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= 2:
            times.append(start.elapsed_time(end))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages: Sequence[str] = list(dict.fromkeys(GOALS.values()))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("RESULTS.md"))
    parser.add_argument("--lengths", type=Path, help="of real rows, by tools/gpu/prepare.py")
    parser.add_argument("--only", nargs="*", choices=stages, default=stages, help="these stages")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.5, help="no stage begins after these")
    parser.add_argument("--commit", help="of this copy, where git does not know it")
    parser.add_argument("--list", action="store_true", help="write what remains to be measured; needs no GPU")
    arguments = parser.parse_args()
    arguments.started = time.monotonic()
    quiet_libraries()
    report = Report(arguments.output, arguments.commit or git_hash())
    if arguments.list:
        report.write()
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; --list writes what remains to be measured")
    measured = Stages(arguments, report)
    for place, name in enumerate(arguments.only):
        if measured.seconds_left < 0:
            print(f"{name}: no time left", flush=True)
            continue
        stage: Callable[[], str] = getattr(measured, name)
        start = time.monotonic()
        fault = ""
        try:
            report.add(name, stage())
        except Exception:
            fault = report.record[f"{name}: fault"] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - start:.0f} s\n{fault or report.sections[name]}\n", flush=True)
        report.write()
        if fault:  # the others still count, in a process that this one's fault has not touched
            later = arguments.only[place + 1 :]
            if later:
                options = ["--output", arguments.output, "--steps", arguments.steps, "--commit", report.commit]
                options += ["--lengths", arguments.lengths] if arguments.lengths else []
                options += ["--minutes", measured.seconds_left / 60, "--only", *later]
                del measured  # the base's memory
                torch.cuda.empty_cache()
                subprocess.run([sys.executable, __file__, *map(str, options)], check=False)
            sys.exit(1)


if __name__ == "__main__":
    main()
