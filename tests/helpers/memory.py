"""The bytes of a process's own tensors, and host memory as offloaded inputs see it on CUDA, simulated on a CPU."""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager
from functools import wraps

import torch
from transformers import LlamaForCausalLM

from qdense.compat.torch import watched_operations
from qdense.modeling.recompute import HostMemory

_hidden = 0  # depth of `unseen`


@contextmanager
def unseen():
    """Within it, TensorMemory does not look: for what must not count, such as host buffers beside a device's memory."""
    global _hidden
    _hidden += 1
    try:
        yield
    finally:
        _hidden -= 1


class TensorMemory(ExitStack):
    """Within it, `live_bytes` are the tensors that operations have made and that are still alive, `peak_bytes` their maximum.

    Memory inside an operation (a kernel's workspace) is not seen; on CUDA, the allocator's own figures are better.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known: set[int] = set()  # storages by identity: torch keeps the Python object as long as the memory

    def __enter__(self) -> TensorMemory:
        self.enter_context(watched_operations(self._watch))
        return self

    def _watch(self, operation: object, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
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


def refuse_memory(monkeypatch, condition):
    """Have LLaMA's forward run out of memory, with part of it done, where `condition(model, input_ids)` holds.

    Returns a list that gets the rows of each pass that was refused.
    """
    forward, refused = LlamaForCausalLM.forward, []

    @wraps(forward)
    def starved(self, *arguments, input_ids, **named):
        if condition(self, input_ids):
            refused.append(len(input_ids))
            torch.rand(3)  # dropout masks were drawn
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *arguments, input_ids=input_ids, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", starved)
    return refused


class UncountedHostMemory(HostMemory):
    """Buffers that `TensorMemory` does not count: on CUDA they are not on the device."""

    def take(self, num_bytes, *, is_pinned):
        with unseen():
            return super().take(num_bytes, is_pinned=is_pinned)


class LateHostMemory(HostMemory):
    """Makes copies as late as a separate stream may: when the computation waits for one, in order.

    Attributes:
        waiting: (target, source) of copies that were started and not waited for.
        events: what happened, in order; a test may append its own.
    """

    def __init__(self):
        super().__init__()
        self.waiting, self.events = [], []

    def start_copy(self, target, source, device):
        target.fill_(float("nan"))
        entry = (target, source)
        self.waiting.append(entry)
        self.events.append("copy")

        def wait():
            while any(other is entry for other in self.waiting):
                done, origin = self.waiting.pop(0)
                with torch.no_grad():
                    done.copy_(origin)

        return wait
