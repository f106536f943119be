"""Greedy completions by vLLM and by qdense's own search: the same adapter, items and token limit, in turns.

    .venv-vllm/bin/python tools/bench_vllm.py RUN --limit 128 --output tools/results/vllm.md

RUN is one on an unquantized base. It runs where vLLM is installed (`make test-vllm` makes that environment). The time to load
the model and to start the engine is not counted: a first round of four items warms each up. Before each round vLLM forgets the
prompts that it has kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from qdense.benchmarks.completions import CompletionSource
from qdense.benchmarks.local_model import LocalModel
from qdense.benchmarks.request import EvaluationRequest
from qdense.benchmarks.tasks import load_items, task_named
from qdense.benchmarks.vllm_model import VllmModel
from qdense.events import ignore
from qdense.inference.generation import DECODINGS, Completion
from qdense.inference.loaded import load_model
from qdense.libraries import quiet_libraries
from qdense.modeling.locate import locate_adapter
from qdense.provenance import git_hash


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--task", default="wordproblems")
    parser.add_argument("--limit", type=int, default=128, help="items (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each (default: 5)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    task, adapter = task_named(arguments.task), locate_adapter(arguments.run)
    rows = load_items(task, None, ignore).rows[: arguments.limit]
    request = EvaluationRequest([task], adapter, {}, with_base=False, decoding=DECODINGS["greedy"])
    in_vllm = VllmModel(request, adapter, {task.name: rows}, ignore)
    sources: dict[str, CompletionSource] = {
        "qdense": LocalModel(load_model({"adapter": adapter}, ignore), request, ignore, with_adapter=True),
        "vLLM": in_vllm,
    }
    wanted = [(index, 0) for index in range(len(rows))]
    speeds: dict[str, list[float]] = {name: [] for name in sources}
    written: dict[str, dict[int, Completion]] = {}
    for source in sources.values():
        list(source.complete(task, rows, wanted[:4]))
    for _ in range(arguments.rounds):
        for name, source in sources.items():
            in_vllm.engine.reset_prefix_cache()
            started = time.perf_counter()
            completions = list(source.complete(task, rows, wanted))
            seconds = time.perf_counter() - started
            speeds[name].append(sum(completion.num_tokens for completion in completions) / seconds)
            written[name] = {completion.index: completion for completion in completions}
    num_equal = sum(written["qdense"][index] == written["vLLM"][index] for index in range(len(rows)))
    ratios = [theirs / ours for ours, theirs in zip(speeds["qdense"], speeds["vLLM"], strict=True)]
    engine, dtype = sources["vLLM"].settings["engine"], sources["vLLM"].settings["dtype"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    table = [
        f"{len(rows)} items of {task.name}, greedy, {dtype}, {device}; {engine}, torch {torch.__version__}, commit {git_hash()}; "
        f"medians of {arguments.rounds} rounds in turns, with their range. {num_equal} of {len(rows)} completions are equal.",
        "",
        "| engine | tokens a second |",
        "|---|---|",
        *(f"| {name} | {_with_range(each)} |" for name, each in speeds.items()),
        "",
        f"vLLM over qdense: {_with_range(ratios)}",
    ]
    print("\n".join(table))
    if arguments.output is not None:
        command = f"python tools/bench_vllm.py RUN --limit {arguments.limit} --rounds {arguments.rounds}"
        arguments.output.write_text(
            "\n".join(["# Completions by vLLM and by qdense", "", f"`{command}`", "", *table]) + "\n"
        )


def _with_range(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
