"""Speed of training steps, side by side on the same rows: the bare frozen base, PEFT's LoRA as QLoRA scripts run it, DenseLoRA.

    .venv/bin/python tools/bench_train.py ../shared/data/ft-training_set/math_10k_genuine_1824.json

Every way makes the same optimizer steps on the same rows, in turns, all in one process; what counts are tokens that are not
padding. "base alone" has no adapter: its backward runs to the input embeddings, as an adapter in the first layer would have it
do. Figures are medians with quartiles over the steps; ratios are taken step by step, so that other work on the machine meets
both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdense.data.examples import Example, collate, encode_rows, join, pack
from qdense.data.sources import load_training_set
from qdense.modeling.adapter import attach_adapter, trainable_parameters
from qdense.modeling.base import load_base
from qdense.modeling.loss import without_logits
from qdense.modeling.packing import packed_attention
from qdense.ops.cross_entropy import IGNORED
from qdense.provenance import git_hash, package_versions
from qdense.recipe import Recipe, recipe_from_tables
from qdense.training.optimizer import build_optimizer

REFERENCE = "lora r 16, padded"


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        method: of the adapter; None for the bare base.
        rows: padded micro-batches of so many rows; packed ones of as many tokens as so many rows of the greatest length have.
        is_ours: whether the loss goes without all logits; else it is Transformers' own.
    """

    name: str
    method: str | None
    r: int
    is_packed: bool
    rows: int
    is_ours: bool = True


def ways(batch_size: int, micro_batch_size: int) -> list[Way]:
    return [
        Way(REFERENCE, "lora", 16, is_packed=False, rows=micro_batch_size, is_ours=False),
        Way("denselora r 32, padded", "denselora", 32, is_packed=False, rows=micro_batch_size),
        Way("denselora r 32, packed", "denselora", 32, is_packed=True, rows=micro_batch_size),
        Way("denselora r 32, packed, one pass", "denselora", 32, is_packed=True, rows=batch_size),
        Way("base alone, padded", None, 32, is_packed=False, rows=micro_batch_size),
        Way("base alone, packed, one pass", None, 32, is_packed=True, rows=batch_size),
    ]


def stepper(way: Way, recipe: Recipe, examples: Sequence[Example]) -> Iterator[int]:
    """Trains one optimizer step each time it is advanced, and gives the number of its forward passes."""
    base = load_base(recipe.model)
    torch.manual_seed(1)
    model: Any = base.model
    optimizer = None
    if way.method is None:
        model.requires_grad_(False)
        model.enable_input_require_grads()
    else:
        model = attach_adapter(base, recipe.adapter.model_copy(update={"method": way.method, "r": way.r}), 1)
        parameters = [parameter for _, parameter in trainable_parameters(model)]
        optimizer = build_optimizer(
            recipe.training.optimizer, parameters, learning_rate=1e-6, weight_decay=0.0, master_weights=True
        )
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    size = recipe.training.batch_size
    for start in range(0, len(examples), size):
        batches = split(way, examples[start : start + size], recipe.data.max_length, base.pad_token_id)
        num_labels = torch.tensor(sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches))
        for batch in batches:
            arguments = {
                key: value.to(base.device) if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()
                if key not in ("rows", "num_tokens")
            }
            with passes(way, model):
                model(**arguments, use_cache=False, num_items_in_batch=num_labels.to(base.device)).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        yield len(batches)


def split(way: Way, examples: Sequence[Example], max_length: int, pad_token_id: int) -> list[dict[str, Any]]:
    if way.is_packed:
        return [join(group) for group in pack(examples, way.rows * max_length)]
    return [collate(examples[i : i + way.rows], pad_token_id) for i in range(0, len(examples), way.rows)]


@contextmanager
def passes(way: Way, model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        if way.is_ours:
            stack.enter_context(without_logits(model))
        if way.is_packed:
            stack.enter_context(packed_attention(model))
        yield


def measure(chosen: Sequence[Way], make: Callable[[Way], Iterator[int]], num_steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each way; a first step of each, not counted, warms up."""
    steppers = {way.name: make(way) for way in chosen}
    seconds: dict[str, list[float]] = {way.name: [] for way in chosen}
    for number in range(num_steps + 1):
        for name, steps in steppers.items():
            start = time.perf_counter()
            next(steps)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="training rows, a JSON file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    arguments = parser.parse_args()
    recipe = recipe_from_tables(
        {
            "model": {"name": arguments.model},
            "data": {"path": str(arguments.data), "max_length": arguments.max_length},
            "training": {"batch_size": arguments.batch_size, "micro_batch_size": arguments.micro_batch_size},
        },
        source="tools/bench_train.py",
    )
    rows = load_training_set(recipe.data, None).rows
    num_rows = arguments.batch_size * (arguments.steps + 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()[:num_rows]
    base = load_base(recipe.model)
    examples = encode_rows(rows, order, base.tokenizer, recipe.data).examples
    device = torch.cuda.get_device_name() if base.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    del base
    chosen = ways(arguments.batch_size, arguments.micro_batch_size)
    seconds = measure(chosen, lambda way: stepper(way, recipe, examples), arguments.steps)
    batches = [examples[i : i + arguments.batch_size] for i in range(0, len(examples), arguments.batch_size)]
    tokens = [sum(len(e.input_ids) for e in batch) for batch in batches[1:]]
    print(
        f"{arguments.model} (nf4) on {device}; {arguments.data.name}, {arguments.steps} steps of {arguments.batch_size} rows of "
        f"at most {arguments.max_length} tokens, {statistics.mean(tokens):.0f} tokens a step; activations recomputed; "
        f"commit {git_hash()}, {package_versions()}\n"
    )
    print("| way | passes a step | padding | tokens/s | times as fast |\n|---|---|---|---|---|")
    figures = {}
    for way in chosen:
        parts = [split(way, batch, arguments.max_length, 0) for batch in batches[1:]]
        places = sum(part["input_ids"].numel() for step in parts for part in step)
        speeds = [count / took for count, took in zip(tokens, seconds[way.name], strict=True)]
        ratios = [old / new for old, new in zip(seconds[REFERENCE], seconds[way.name], strict=True)]
        passes_a_step, padding = statistics.mean(len(step) for step in parts), 1 - sum(tokens) / places
        print(f"| {way.name} | {passes_a_step:.1f} | {padding:.0%} | {spread(speeds, 0)} | {spread(ratios, 2)} |")
        figures[way.name] = {"seconds": seconds[way.name], "tokens": tokens, "places": places}
    overhead = [
        ours / bare
        for ours, bare in zip(
            seconds["denselora r 32, packed, one pass"], seconds["base alone, packed, one pass"], strict=True
        )
    ]
    print(f"\nA DenseLoRA step takes {spread(overhead, 2)} times as long as the bare base's.")
    if arguments.output:
        arguments.output.write_text(json.dumps({"device": device, "commit": git_hash(), "ways": figures}, indent=1))


if __name__ == "__main__":
    main()
