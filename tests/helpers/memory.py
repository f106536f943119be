"""Counts the bytes of a process's own tensors: each storage from the operation that makes it until it is freed."""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager

import torch

from qdense.compat.torch import watched_operations

_hidden = 0  # depth of `unseen`


@contextmanager
def unseen():
    """Within it, TensorMemory does not look: for what is not to count, as host buffers beside a device's memory."""
    global _hidden
    _hidden += 1
    try:
        yield
    finally:
        _hidden -= 1


class TensorMemory(ExitStack):
    """Within it, `live_bytes` are the tensors that operations have made and that still live, `peak_bytes` their maximum.

    Memory inside an operation (a kernel's workspace) is not seen; on CUDA, the allocator's own figures are better.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known: set[int] = set()  # storages by identity: torch keeps the Python object as long as the memory

    def __enter__(self) -> TensorMemory:
        self.enter_context(watched_operations(self._watch))
        return self

    def _watch(self, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        storages = {id(tensor.untyped_storage()) for tensor in given}
        for storage in (tensor.untyped_storage() for tensor in made if not _hidden):
            if id(storage) not in self._known and id(storage) not in storages:
                self._add(storage)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        self._known.add(key)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes
