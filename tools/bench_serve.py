"""What `qdense serve` gains from answering many clients at a time: the same requests by 1, 8 and 64 openai clients.

    .venv/bin/python tools/bench_serve.py [RUN] --output FILE.md

All numbers of clients in turn in one process, repeated; medians with their range. Each client sends its next request when it has
the answer to its last. Greedy, at most 32 new tokens; how many of the texts equal those that one client gets is counted too (in
bfloat16 the size of the batch rounds differently).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import openai
import torch
import uvicorn

from qdense.data.wordproblems import test_rows
from qdense.events import ignore
from qdense.inference.engine import Engine
from qdense.inference.loaded import load_model
from qdense.inference.server import make_app
from qdense.libraries import quiet_libraries
from qdense.modeling.locate import locate_adapter
from qdense.provenance import git_hash, package_versions

_KEY = "bench"


async def ask(address: str, model: str, questions: list[str], num_clients: int) -> tuple[float, list[str], int]:
    """Seconds, texts and tokens of all questions, asked by so many clients."""
    client = openai.AsyncOpenAI(base_url=address, api_key=_KEY, max_retries=0, timeout=3600)
    texts, num_tokens = [""] * len(questions), 0
    numbers = iter(range(len(questions)))

    async def work() -> None:
        nonlocal num_tokens
        for number in numbers:
            answer = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": questions[number]}],
                temperature=0,
                max_tokens=32,
            )
            texts[number] = answer.choices[0].message.content or ""
            assert answer.usage is not None
            num_tokens += answer.usage.completion_tokens

    started = time.monotonic()
    await asyncio.gather(*(work() for _ in range(num_clients)))
    return time.monotonic() - started, texts, num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run whose adapter is asked (default: the bare SmolLM2-135M)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    adapters = {"adapter": locate_adapter(arguments.run)} if arguments.run else {}
    loaded = load_model(adapters, ignore, model={} if adapters else {"name": "smollm2-135m"})
    engine = Engine(loaded)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(engine, "base", _KEY), port=port, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    address, model = f"http://127.0.0.1:{port}/v1", "adapter" if adapters else "base"
    questions = [row.instruction for row in test_rows()][: arguments.requests]
    asyncio.run(ask(address, model, questions[:4], 4))  # warm
    counts = [count for count in (1, 8, 64) if count <= len(questions)]
    runs: dict[int, list[tuple[float, list[str], int]]] = {count: [] for count in counts}
    for _ in range(arguments.rounds):
        for count in counts:
            runs[count].append(asyncio.run(ask(address, model, questions, count)))
    alone = runs[1][0][1]
    first = statistics.median(num_tokens / seconds for seconds, _, num_tokens in runs[1])
    lines = [
        f"{len(questions)} word problems, at most 32 new tokens, greedy, {loaded.recipe.quantization} in {loaded.recipe.dtype}, "
        f"{'an adapter' if adapters else 'the bare base'}, {torch.get_num_threads()} threads; {arguments.rounds} rounds in turn; "
        f"commit {git_hash()}; torch {package_versions()['torch']}.",
        "",
        "| clients at a time | seconds | tokens/s | times as fast | same texts as one client |",
        "|---|---|---|---|---|",
    ]
    for count in counts:
        seconds = [each[0] for each in runs[count]]
        speeds = [num_tokens / took for took, _, num_tokens in runs[count]]
        same = sum(text == expected for text, expected in zip(runs[count][0][1], alone, strict=True))
        lines.append(
            f"| {count} | {statistics.median(seconds):.1f} [{min(seconds):.1f}, {max(seconds):.1f}] | "
            f"{statistics.median(speeds):.0f} | {statistics.median(speeds) / first:.1f} | {same} of {len(questions)} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    server.should_exit = True
    engine.close()


if __name__ == "__main__":
    main()
