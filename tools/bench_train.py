"""Speed and memory of training steps, side by side: the bare frozen base, PEFT's LoRA as QLoRA is usually run, DenseLoRA.

    .venv/bin/python tools/bench_train.py --data ../shared/data/ft-training_set/math_10k_genuine_1824.json
    .venv/bin/python tools/bench_train.py --model llama3-8b --random-weights --full-batches 4x2048 --memory 24GiB

Every way makes the same optimizer steps on the same rows in one process. What counts are tokens that are not padding. "base
alone" has no adapter; its backward runs down to the input embeddings, as an adapter in the first layer would have it do.

On a CPU the ways take turns, step by step, so that other work on the machine meets all of them. On CUDA each runs alone, so
that its memory is its own; `--memory` limits what the process may use, to imitate a smaller card, and the plan is made for it.
Figures are medians with quartiles; ratios are taken step by step.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import numpy as np
import torch
from random_base import random_base

from qdense.cli.arguments import memory_size
from qdense.data.examples import Example, collate, encode_rows, join, pack
from qdense.data.sources import load_training_set
from qdense.libraries import quiet_libraries
from qdense.modeling.attach import attach_adapter, trainable_parameters
from qdense.modeling.liger import use_liger
from qdense.modeling.load import BaseModel, load_base
from qdense.modeling.loss import without_logits
from qdense.modeling.packing import packed_attention
from qdense.modeling.recompute import Recompute, apply_recompute
from qdense.ops.cross_entropy import IGNORED
from qdense.ops.kernels import use_kernels
from qdense.planning.machine import this_machine
from qdense.planning.memory import Kernels, StepLayout, memory_of
from qdense.planning.plan import longest_context, make_plan
from qdense.planning.shapes import model_shape
from qdense.planning.speed import flops_per_token
from qdense.provenance import git_hash, package_versions
from qdense.recipe import Recipe, recipe_from_tables
from qdense.training.optimizer import build_optimizer


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        method: of the adapter; None for the bare base.
        layout: how a step is divided; without packing, micro_batch_size counts padded rows.
        padding: "longest" row of the micro-batch, "max_length", or None for packed rows.
        is_fused: Triton for the adapter and Liger for the rest; else plain PyTorch.
        is_ours: whether the loss goes without all logits; else it is Transformers' own.
    """

    name: str
    method: str | None
    r: int
    layout: StepLayout
    padding: str | None = None
    is_fused: bool = False
    is_ours: bool = True


@dataclass
class Figures:
    """What a way did: seconds of each counted step and of the first, which is not counted; forward passes and places (padding
    included) of all steps; peaks in bytes; what went wrong."""

    seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0
    passes: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    predicted_bytes: int = 0
    fault: str = ""


def ways(recipe: Recipe, layout: StepLayout, num_layers: int, is_cuda: bool) -> list[Way]:
    """The first is the reference, the last the bare base with the same layout as the way before it."""
    everything = StepLayout(4, num_layers)
    chosen = [
        Way("lora r 16, padded, 4 rows, all recomputed", "lora", 16, everything, "longest", is_ours=False),
        Way("denselora r 32, padded, 4 rows, all recomputed", "denselora", 32, everything, "longest"),
        Way("denselora r 32, packed, 4 rows, all recomputed", "denselora", 32, everything),
    ]
    if is_cuda:
        chosen += [
            Way("denselora r 32, fused, 4 rows, all recomputed", "denselora", 32, everything, is_fused=True),
            Way("base alone, 4 rows, all recomputed", None, 32, everything, is_fused=True),
        ]
    else:
        at_once = StepLayout(recipe.training.batch_size, 0)
        chosen += [
            Way("denselora r 32, padded to the longest, as planned", "denselora", 32, at_once, "longest"),
            Way("denselora r 32, padded to max_length, as planned", "denselora", 32, at_once, "max_length"),
        ]
    chosen += [
        Way("denselora r 32, packed, as planned", "denselora", 32, layout, is_fused=is_cuda),
        Way("base alone, packed, as planned", None, 32, layout, is_fused=is_cuda),
    ]
    return chosen


class Bench:
    """A base, its rows, and what every way is given."""

    def __init__(self, recipe: Recipe, base: BaseModel, examples: Sequence[Example]) -> None:
        self.recipe, self.base, self.examples = recipe, base, examples
        self.shape = model_shape(recipe.model.name)
        self.is_cuda = base.device.type == "cuda"

    def kernels(self, way: Way) -> Kernels:
        return Kernels(self.is_cuda, way.is_fused, way.is_fused)

    def recipe_of(self, way: Way) -> Recipe:
        adapter = self.recipe.adapter.model_copy(update={"method": way.method or "none", "r": way.r})
        training = self.recipe.training.model_copy(update={"packing": way.padding is None})
        return self.recipe.model_copy(update={"adapter": adapter, "training": training})

    def fresh_base(self) -> BaseModel:
        """The base as separate modules around the same weights."""
        model = self.base.model
        shared = [*model.parameters(), *model.buffers()]
        shared += [module.quant_state for module in model.modules() if getattr(module, "quant_state", None) is not None]
        shared += [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
        return replace(self.base, model=copy.deepcopy(model, {id(thing): thing for thing in shared}))

    def split(self, way: Way, examples: Sequence[Example]) -> list[dict[str, Any]]:
        rows, longest = way.layout.micro_batch_size, self.recipe.data.max_length
        if way.padding is None:
            return [join(group) for group in pack(examples, rows * longest)]
        groups = [examples[i : i + rows] for i in range(0, len(examples), rows)]
        batches = [collate(group, self.base.pad_token_id) for group in groups]
        return [_widened(batch, longest) for batch in batches] if way.padding == "max_length" else batches

    def stepper(self, way: Way, figures: Figures) -> Iterator[None]:
        """Trains one optimizer step each time it is advanced."""
        use_kernels("triton" if way.is_fused else "torch")
        base = self.fresh_base()
        torch.manual_seed(1)
        if way.is_fused:
            use_liger(base.model)
        model: Any = base.model
        optimizer = None
        if way.method is not None:
            recipe = self.recipe_of(way)
            model = attach_adapter(base, recipe.adapter, 1)
            optimizer = build_optimizer(
                recipe.training.optimizer,
                [parameter for _, parameter in trainable_parameters(model)],
                learning_rate=1e-6,
                weight_decay=0.0,
                master_weights=recipe.has_masters,
            )
        layout = way.layout
        apply_recompute(model, Recompute(layout.recompute_layers, layout.offload, layout.mlp_tile_tokens))
        if way.method is None:
            base.model.get_input_embeddings().register_forward_hook(
                lambda module, args, output: output.requires_grad_()
            )
        model.train()
        size = self.recipe.training.batch_size
        for start in range(0, len(self.examples), size):
            use_kernels("triton" if way.is_fused else "torch")
            batches = self.split(way, self.examples[start : start + size])
            figures.passes.append(len(batches))
            figures.places.append(sum(batch["input_ids"].numel() for batch in batches))
            num_labels = torch.tensor(sum(example.num_labels for example in self.examples[start : start + size]))
            for batch in batches:
                arguments = {
                    key: value.to(base.device) if isinstance(value, torch.Tensor) else value
                    for key, value in batch.items()
                    if key not in ("rows", "num_tokens")
                }
                with _passes(way, model):
                    loss = model(**arguments, use_cache=False, num_items_in_batch=num_labels.to(base.device)).loss
                    loss.backward()
                    del loss
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            if self.is_cuda:
                torch.cuda.synchronize()
            yield

    def run(self, chosen: Sequence[Way], num_steps: int) -> dict[str, Figures]:
        """Each way's figures; the first step of each is not counted."""
        found = {way.name: Figures() for way in chosen}
        for way in chosen:
            if way.method is not None:
                memory = memory_of(self.recipe_of(way), self.shape, self.kernels(way), way.layout)
                found[way.name].predicted_bytes = memory.peak_bytes
        if self.is_cuda:
            for way in chosen:
                self._run_alone(way, found[way.name], num_steps)
            return found
        steppers = {way.name: self.stepper(way, found[way.name]) for way in chosen}
        for number in range(num_steps + 1):
            for name, steps in steppers.items():
                start = time.perf_counter()
                next(steps)
                if number:
                    found[name].seconds.append(time.perf_counter() - start)
                    print(f"step {number}, {name}: {found[name].seconds[-1]:.1f} s", file=sys.stderr, flush=True)
        return found

    def _run_alone(self, way: Way, figures: Figures, num_steps: int) -> None:
        from transformers.models.llama import modeling_llama

        replaced = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")  # by Liger, for the whole process
        own = {name: getattr(modeling_llama, name) for name in replaced}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        steps = self.stepper(way, figures)
        try:
            for number in range(num_steps + 1):
                start = time.perf_counter()
                next(steps)
                took = time.perf_counter() - start
                if number:
                    figures.seconds.append(took)
                else:
                    figures.first_seconds = took
            figures.allocated_bytes = torch.cuda.max_memory_allocated()
            figures.reserved_bytes = torch.cuda.max_memory_reserved()
        except torch.OutOfMemoryError as error:
            figures.fault = f"out of memory: {str(error).splitlines()[0][:120]}"
        finally:
            steps.close()  # type: ignore[attr-defined]  # a generator
            del steps
            for name, value in own.items():
                setattr(modeling_llama, name, value)
            gc.collect()
            torch.cuda.empty_cache()


def _widened(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """The batch padded on to `length`."""
    more = length - batch["input_ids"].shape[1]
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return batch | {key: torch.nn.functional.pad(batch[key], (0, more), value=value) for key, value in fill.items()}


@contextmanager
def _passes(way: Way, model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        if way.is_ours:
            stack.enter_context(without_logits(model))
        if way.padding is None:
            stack.enter_context(packed_attention(model))
        yield


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large product here: the ceiling of everything else."""
    rows, inner, columns = (8192, 8192, 8192) if device.type == "cuda" else (1024, 1024, 1024)
    a, b = (torch.randn(size, dtype=dtype, device=device) for size in ((rows, inner), (inner, columns)))
    times = []
    for _ in range(20 if device.type == "cuda" else 7):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2.0 * rows * inner * columns / statistics.median(times)


def spread(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(bench: Bench, chosen: Sequence[Way], found: dict[str, Figures], tokens: Sequence[int], ceiling: float) -> str:
    """A line for each way; "of the ceiling" counts the FLOPs that the way's own recomputation has."""
    reference = found[chosen[0].name].seconds
    context = sum(tokens) / (len(tokens) * bench.recipe.training.batch_size)
    lines = [
        "| way | passes a step | padding | tokens/s | times as fast | of the ceiling | allocated | predicted | reserved |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in chosen:
        figures = found[way.name]
        if not figures.seconds:
            lines.append(f"| {way.name} | | | {figures.fault or 'not run'} | | | | | |")
            continue
        speeds = [count / took for count, took in zip(tokens, figures.seconds, strict=True)]
        ratios = [old / new for old, new in zip(reference, figures.seconds, strict=True)] if reference else []
        flops = flops_per_token(bench.shape, context, way.layout.recompute_layers)
        sizes = [figures.allocated_bytes, figures.predicted_bytes, figures.reserved_bytes]
        lines.append(
            f"| {way.name} | {statistics.mean(figures.passes[1:]):.1f} | {1 - sum(tokens) / sum(figures.places[1:]):.0%} | "
            f"{spread(speeds, 0)} | {spread(ratios, 2)} | {100 * statistics.median(speeds) * flops / ceiling:.0f}% | "
            + " | ".join(f"{size / 2**30:.2f} GiB" if size else "" for size in sizes)
            + " |"
        )
    ours, bare = found[chosen[-2].name].seconds, found[chosen[-1].name].seconds
    if ours and bare:
        overhead = [a / b for a, b in zip(ours, bare, strict=True)]
        lines += ["", f"A step of `{chosen[-2].name}` takes {spread(overhead, 2)} times as long as the bare base's."]
    return "\n".join(lines)


def random_examples(lengths: Sequence[int], vocabulary: int) -> list[Example]:
    """Rows of random tokens."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, vocabulary, length).astype(np.int32) for length in lengths]
    return [Example(number, ids, ids) for number, ids in enumerate(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="training rows, a JSON file (needs the model's tokenizer)")
    what.add_argument(
        "--lengths", type=Path, help="a JSON list of rows' lengths: random tokens, for machines without a tokenizer"
    )
    what.add_argument("--full-batches", metavar="4x2048", help="full rows of random tokens")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--random-weights", action="store_true", help="a catalog model with random NF4 weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of base and adapter")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--memory", type=memory_size, help="what the process may use")
    parser.add_argument("--only", help="ways whose names hold this text, beside the reference and the last two")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    arguments = parser.parse_args()
    quiet_libraries()
    shape = model_shape(arguments.model)
    examples, batch_size, max_length = None, arguments.batch_size, arguments.max_length
    if arguments.full_batches:
        batch_size, max_length = (int(part) for part in arguments.full_batches.lower().split("x"))
        examples = random_examples([max_length] * (batch_size * (arguments.steps + 1)), shape.vocab_size)
    elif arguments.lengths:
        lengths = json.loads(arguments.lengths.read_text())[: batch_size * (arguments.steps + 1)]
        examples = random_examples([min(length, max_length) for length in lengths], shape.vocab_size)
    recipe = recipe_from_tables(
        {
            "model": {"name": arguments.model, "dtype": arguments.dtype},
            "adapter": {"dtype": arguments.dtype},
            "data": {"path": str(arguments.data)} | {"max_length": max_length},
            "training": {"batch_size": batch_size},
        },
        source="tools/bench_train.py",
    )
    is_cuda = torch.cuda.is_available()
    if is_cuda and arguments.memory:
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.memory / total_bytes))
    machine = this_machine(recipe, shape)
    if arguments.memory:
        machine = replace(machine, memory_bytes=arguments.memory)
    layout = make_plan(recipe, shape, machine).layout
    device = torch.device("cuda" if is_cuda else "cpu")
    dtype = getattr(torch, arguments.dtype)
    base = random_base(shape, device, dtype) if arguments.random_weights else load_base(recipe.model)
    if examples is None:
        rows = load_training_set(recipe.data, None).rows
        num_rows = batch_size * (arguments.steps + 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()[:num_rows]
        examples = encode_rows(rows, order, base.tokenizer, recipe.data).examples
    bench = Bench(recipe, base, examples)
    chosen = ways(recipe, layout, shape.num_layers, is_cuda)
    if arguments.only:
        chosen = [
            w for i, w in enumerate(chosen) if i in (0, len(chosen) - 2, len(chosen) - 1) or arguments.only in w.name
        ]
    found = bench.run(chosen, arguments.steps)
    ceiling = matmul_flops(device, dtype)
    tokens = [sum(len(e.input_ids) for e in examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)][
        1:
    ]
    name = torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads"
    source = (
        arguments.full_batches or f"{(arguments.data or arguments.lengths).name}, rows of at most {max_length} tokens"
    )
    print(
        f"{arguments.model} (nf4{', random' if arguments.random_weights else ''}, {arguments.dtype}) on {name}, "
        f"{ceiling / 1e12:.3g} TFLOP/s; {source}; {arguments.steps} steps of {batch_size} rows, "
        f"{statistics.mean(tokens):.0f} tokens a step; planned: {asdict(layout)}; commit {git_hash()}, {package_versions()}\n"
    )
    longest = longest_context(recipe, shape, machine)
    print(table(bench, chosen, found, tokens, ceiling))
    print(f"\nLongest row that would fit here, one at a time, as predicted: {longest:,} tokens.")
    if arguments.output:
        record = {"device": name, "ceiling_flops": ceiling, "commit": git_hash(), "versions": package_versions(),
                  "command": sys.argv, "layout": asdict(layout), "longest_context_tokens": longest, "tokens": tokens,
                  "ways": {way: asdict(figures) for way, figures in found.items()}}  # fmt: skip
        arguments.output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
