"""How fast completions are made: qdense's search against transformers' own ways, same model, items and token limit.

    QDENSE_DATA=... .venv/bin/python tools/bench_generate.py --output tools/results/generation.md

Two comparisons, each side by side in one process, repeated, medians with their range:

    beams    the authors' loop (one prompt at a time, 4 beams, no KV cache: LLM-Adapters' evaluate.py) against beam4
    greedy   plain `generate` on batches in the order of the file; transformers' continuous batching (`generate_batch`);
             qdense's search on sorted batches that only shrink as sequences end; and as it is, free places filled again.
             All on the same weights in memory, so that the search alone is compared

Texts are compared too: in float32 all ways write the same. In bfloat16 a share of the completions differs with the batch, and
with them the number of tokens: there "times as fast" is of tokens per second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from qdense.benchmarks.tasks import load_items, task_named
from qdense.data.templates import template_named
from qdense.inference.generation import DECODINGS, Prompt, generate, longest_first
from qdense.libraries import quiet_libraries
from qdense.modeling.adapter_files import load_adapter, read_card
from qdense.modeling.load import BaseModel, load_base
from qdense.provenance import git_hash, package_versions
from qdense.recipe import ModelRecipe
from qdense.runs import find_adapter

# What one way of completing gives: item -> number of tokens that it generated (EOS is one), and the text.
Texts = dict[int, tuple[int, str]]


def by_generate(
    base: BaseModel, model: Any, prompts: Sequence[Prompt], limit: int, batch_size: int, **how: Any
) -> Texts:
    """`generate` on fixed batches, padded on the left, in the order given."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=base.tokenizer.eos_token_id,
        pad_token_id=base.pad_token_id,
        **{"use_cache": True, "num_beams": 1, **how},
    )
    found: Texts = {}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(len(prompt.input_ids) for prompt in batch)
        input_ids = torch.full((len(batch), longest), base.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(batch):
            input_ids[row, longest - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
            mask[row, longest - len(prompt.input_ids) :] = 1
        with torch.no_grad():
            output = model.generate(
                input_ids=input_ids.to(base.device), attention_mask=mask.to(base.device), generation_config=settings
            )
        for prompt, row_tokens in zip(batch, output[:, longest:].tolist(), strict=True):
            found[prompt.index] = _until_eos(base, row_tokens)
    return found


def by_generate_batch(base: BaseModel, model: Any, prompts: Sequence[Prompt], limit: int) -> Texts:
    """transformers' continuous batching, with its own choice of batch."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=base.tokenizer.eos_token_id,
        pad_token_id=base.pad_token_id,
    )
    outputs = model.generate_batch(
        inputs=[prompt.input_ids for prompt in prompts], generation_config=settings, progress_bar=False
    )
    found = sorted(outputs.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
    return {
        prompt.index: _until_eos(base, list(output.generated_tokens))
        for prompt, output in zip(prompts, found, strict=True)
    }


def by_qdense(
    base: BaseModel,
    model: Any,
    prompts: Sequence[Prompt],
    limit: int,
    batch_size: int,
    decoding: str,
    *,
    refill: bool = True,
) -> Texts:
    """The search of qdense/inference/generation.py."""
    parts = [prompts]
    if not refill:
        ordered = longest_first(prompts)
        parts = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return {
        completion.index: (completion.num_tokens, completion.completion)
        for part in parts
        for completion in generate(
            base, model, part, DECODINGS[decoding], max_new_tokens=limit, stop=(), batch_size=batch_size
        )
    }


def _until_eos(base: BaseModel, tokens: list[int]) -> tuple[int, str]:
    eos = base.tokenizer.eos_token_id
    end = tokens.index(eos) + 1 if eos in tokens else len(tokens)
    return end, base.tokenizer.decode(tokens[:end], skip_special_tokens=True)


def measure(ways: dict[str, Callable[[], Texts]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Texts]]:
    """Seconds of each way, taken in turns, so that a busy neighbour disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, Texts] = {}
    for repeat in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            texts[name] = way()
            seconds[name].append(time.perf_counter() - started)
            print(f"  {repeat + 1}/{repeats} {name}: {seconds[name][-1]:.1f} s", flush=True)
    return seconds, texts


def table(title: str, seconds: dict[str, list[float]], texts: dict[str, Texts]) -> str:
    first = next(iter(seconds))
    num_tokens = {name: sum(number for number, _ in found.values()) for name, found in texts.items()}
    lines = [
        f"### {title}",
        "",
        "| way | seconds, median [range] | tokens | tokens/s | times as fast | same texts |",
        "|---|---|---|---|---|---|",
    ]
    for name, taken in seconds.items():
        more = num_tokens[name] / num_tokens[first]
        ratios = [more * a / b for a, b in zip(seconds[first], taken, strict=True)]
        same = sum(texts[name][i][1] == text for i, (_, text) in texts[first].items())
        lines.append(
            f"| {name} | {statistics.median(taken):.1f} [{min(taken):.1f}, {max(taken):.1f}] "
            f"| {num_tokens[name]:,} | {num_tokens[name] / statistics.median(taken):.0f} "
            f"| {statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}] | {same} of {len(texts[first])} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", type=Path, help="a run; its base is used")
    parser.add_argument("--task", default="svamp")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--greedy-items", type=int, default=128)
    parser.add_argument("--greedy-tokens", type=int, default=256)
    parser.add_argument("--beam-items", type=int, default=8)
    parser.add_argument("--beam-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16, help="of plain `generate`; measured beside qdense's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("QDENSE_DATA"))
    parser.add_argument("--output", type=Path, help="append the tables to this file")
    arguments = parser.parse_args()
    quiet_libraries()

    folder = find_adapter(arguments.adapter) if arguments.adapter else None
    card = read_card(folder) if folder else None
    recipe = ModelRecipe(**({"name": arguments.model} if card is None else card.model) | {"dtype": arguments.dtype})

    base = load_base(recipe, for_training=False)
    model = load_adapter(base, folder, card) if folder and card else base.model
    model.eval()
    template = template_named(card.template if card else "alpaca")
    rows = load_items(task_named(arguments.task), arguments.data_dir).rows
    prompts = [
        Prompt(i, 0, base.tokenizer(template.evaluation_prompt(row))["input_ids"])
        for i, row in enumerate(rows[: max(arguments.greedy_items, arguments.beam_items)])
    ]
    greedy, beams = prompts[: arguments.greedy_items], prompts[: arguments.beam_items]
    size, limit = arguments.batch_size, arguments.greedy_tokens
    own_size = DECODINGS["greedy"].batch_size_cuda if base.device.type == "cuda" else DECODINGS["greedy"].batch_size_cpu
    device = (
        torch.cuda.get_device_name(base.device)
        if base.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    subject = f"{recipe.name}{f' with {arguments.adapter}' if arguments.adapter else ''}, {arguments.task}"
    parts = [
        f"## {subject}, {recipe.quantization} computed in {arguments.dtype}\n\n{device}; "
        + ", ".join(f"{name} {version}" for name, version in package_versions().items())
        + f"; commit {git_hash()}; stored in memory as: {base.stored_as}"
    ]
    if beams:
        ways = {
            "the authors' loop: batch 1, 4 beams, no cache": lambda: by_generate(
                base, model, beams, arguments.beam_tokens, 1, num_beams=4, use_cache=False
            ),
            "qdense beam4": lambda: by_qdense(
                base, model, beams, arguments.beam_tokens, DECODINGS["beam4"].batch_size_cpu, "beam4"
            ),
        }
        title = f"4 beams: {len(beams)} items, at most {arguments.beam_tokens} new tokens"
        parts.append(table(title, *measure(ways, arguments.repeats)))
    if greedy:
        ways = {
            f"plain generate, batches of {size}": lambda: by_generate(base, model, greedy, limit, size),
            f"plain generate, batches of {own_size}": lambda: by_generate(base, model, greedy, limit, own_size),
            "transformers' generate_batch": lambda: by_generate_batch(base, model, greedy, limit),
            f"qdense, {size} at a time": lambda: by_qdense(base, model, greedy, limit, size, "greedy"),
            f"qdense, {own_size} at a time, only shrinking": lambda: by_qdense(
                base, model, greedy, limit, own_size, "greedy", refill=False
            ),
            f"qdense, {own_size} at a time (its default)": lambda: by_qdense(
                base, model, greedy, limit, own_size, "greedy"
            ),
        }
        title = f"greedy: {len(greedy)} items, at most {limit} new tokens"
        parts.append(table(title, *measure(ways, arguments.repeats)))
    text = "\n\n".join(parts) + "\n"
    print("\n" + text)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as stream:
            stream.write("\n" + text)


if __name__ == "__main__":
    main()
