"""The step of a batch by one token, recorded once as a CUDA graph and replayed: else the card waits for Python.

A layer in 4 bits with an adapter launches some 40 kernels, each for a few microseconds of work, and the host needs longer to
launch them than the card to run them. A recording always reads and writes the same memory. So keys and values have places for
more columns and rows than are filled, and a mask says which count; the attention reads all of them.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from qdense.compat.transformers import attention_set_to
from qdense.modeling.packing import why_not_packed

_NAME = "qdense_recorded"
_COLUMNS = 256  # places are added by so many columns at a time
_ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128)  # recordings are for so many rows; above, for multiples of 64


def why_not_recorded(model: Any) -> str | None:
    """Why this model's steps cannot be recorded; None if they can."""
    return why_not_packed(model)  # both replace the attention by a plain one


class Recorder:
    """Holds the cache of one batch at a time, and the recordings of its steps.

    Args:
        model: the base's model, or the PeftModel on it. Recordings are made with the adapter that is active then.
        is_captured: False runs the same step without a graph, as a CPU can.
    """

    def __init__(self, model: Any, *, is_captured: bool = True) -> None:
        self.model, self.is_captured = model, is_captured
        self.places: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer: (rows, heads, columns, size)
        # By number of rows: the graph and the logits that it writes; None after the first step, which is not recorded.
        self._recordings: dict[int, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}

    def take(self, layers: list[Any], mask: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Copy a batch in; returns where its keys and values are now: (rows, heads, places, size) of each layer.

        Args:
            layers: with `keys` and `values`, (rows, heads, columns, size). Each is let go before the next is copied.
            mask: (rows, columns), 1 where a token is.
            positions: (rows,), of the next tokens.
        """
        (rows, columns), keys = mask.shape, layers[0].keys
        places = _rounded(rows), -(-(columns + 1) // _COLUMNS) * _COLUMNS
        if not self.places or any(has < needed for has, needed in zip(self._size, places, strict=True)):
            self._make_places(layers, max(places[0], self._size[0]), max(places[1], self._size[1]))
        new = []
        for layer, place in zip(layers, self.places, strict=True):
            for name, target in zip(("keys", "values"), place, strict=True):
                # What is masked still counts as 0 times itself, so it must be finite.
                target[:rows, :, columns:].zero_()
                target[rows:].zero_()
                target[:rows, :, :columns] = getattr(layer, name)
            new.append((place[0][:rows], place[1][:rows]))
            layer.put(*new[-1], columns)
        self.mask.fill_(-torch.inf)
        self.mask[:rows, 0, 0, :columns].masked_fill_(mask.to(keys.device, torch.bool), 0.0)
        self.tokens.zero_()
        self.positions.zero_()
        self.positions[:rows, 0] = positions
        self.column.fill_(columns)
        return new

    def forward(self, tokens: Tensor) -> Tensor:
        """Append the next token of each row of the batch; returns the logits after it: (rows, vocabulary), fp32.

        The next call overwrites them.
        """
        self.tokens[: len(tokens), 0] = tokens
        size = _rounded(len(tokens))
        if size not in self._recordings:
            self._recordings[size] = None
            return self._compute(size)[: len(tokens)]  # compiles what is to be compiled
        recording = self._recordings[size]
        if recording is None and self.is_captured:
            recording = self._recordings[size] = self._record(size)
        if recording is None:
            return self._compute(size)[: len(tokens)]
        graph, logits = recording
        graph.replay()
        return logits[: len(tokens)]

    def _record(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        was_enabled = gc.isenabled()
        gc.disable()  # freeing another graph's memory would spoil the recording
        try:
            # Other threads may use the card meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._compute(rows)
        finally:
            if was_enabled:
                gc.enable()
        return graph, logits

    def _compute(self, rows: int) -> Tensor:
        """One token for each of the first `rows` rows."""
        self.mask[:rows].index_fill_(3, self.column, 0.0)
        cache = Cache(layers=[_Places(keys[:rows], values[:rows], self.column) for keys, values in self.places])
        with attention_set_to(self.model, _NAME):
            output = self.model(
                input_ids=self.tokens[:rows],
                attention_mask=self.mask[:rows],
                position_ids=self.positions[:rows],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                newest_column=self.column,
            )
        self.positions += 1
        self.column += 1
        logits: Tensor = output.logits[:, -1].float()
        return logits

    @property
    def _size(self) -> tuple[int, int]:
        return (self.places[0][0].shape[0], self.places[0][0].shape[2]) if self.places else (0, 0)

    def _make_places(self, layers: list[Any], rows: int, columns: int) -> None:
        self._recordings.clear()
        self.places.clear()
        for layer in layers:
            self.places.append(
                tuple(
                    states.new_empty(rows, states.shape[1], columns, states.shape[3])
                    for states in (layer.keys, layer.values)
                )
            )
        keys = layers[0].keys
        self.mask = keys.new_empty(rows, 1, 1, columns)
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=keys.device)
        self.positions = torch.zeros_like(self.tokens)
        self.column = torch.zeros(1, dtype=torch.int64, device=keys.device)
        self._pool = torch.cuda.graph_pool_handle() if self.is_captured else None


class _Places(DynamicLayer):
    """One layer's keys and values, (rows, heads, columns, size), of which `column` (1,) is written."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.column = keys, values, column
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values


def _rounded(rows: int) -> int:
    return next((size for size in _ROWS if size >= rows), -(-rows // 64) * 64)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    newest_column: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface, for one query a row: the heads that share keys take their place among the queries.

    A row's tokens are in neighbouring columns, so a window is one of columns.

    query (rows, heads, 1, d), key and value (rows, kv heads, columns, d), mask (rows, 1, 1, columns) -> (rows, 1, heads, d).
    """
    rows, heads, head_size = query.shape[0], query.shape[1], query.shape[3]
    if sliding_window is not None:
        columns = torch.arange(key.shape[2], device=key.device)
        attention_mask = attention_mask.masked_fill(columns <= newest_column - sliding_window, -torch.inf)
    grouped = query.view(rows, key.shape[1], -1, head_size)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, head_size), None


AttentionInterface.register(_NAME, _attend)
