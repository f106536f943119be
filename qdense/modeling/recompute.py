"""What a training step keeps of each decoder layer until its backward pass, and what it computes again there.

A recomputed layer keeps only its input, which may wait in host memory. Its MLP may run in tiles of the sequence, so that
its wide activations exist for one tile at a time, in forward and in backward. Losses and gradients do not
change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qdense.compat.torch import checkpointed_inputs
from qdense.compat.transformers import (
    checkpoint_function,
    is_recomputable,
    replace_checkpoint_function,
    set_recomputed,
)


@dataclass(frozen=True)
class Recompute:
    """Which decoder layers are recomputed in the backward pass, and how.

    Attributes:
        num_layers: how many are, from the first. The last ones keep their activations, which backward frees first, so
            they never coexist with those of a recomputed layer.
        offload: the inputs of recomputed layers wait in host memory. On CUDA the copies overlap the computation, and the
            host gives each such layer a pinned buffer of its input's size, rounded up to a power of two (as torch does),
            which later steps reuse.
        mlp_tile_tokens: how many tokens at a time the MLP of recomputed layers runs on; None: all at once.
    """

    num_layers: int
    offload: bool = False
    mlp_tile_tokens: int | None = None


def apply_recompute(model: Any, recompute: Recompute, host: HostMemory | None = None) -> None:
    """Make the model's training steps follow `recompute`. Replaces an earlier call.

    Call it between steps, with the adapter in place. Unlike in Transformers, the embeddings' output does not
    require a gradient: non-reentrant checkpoints do not need it, and it would cost a hidden state and its
    gradient.

    A tiled MLP accumulates the gradients of its parameters itself during backward. They are in `.grad` after
    `loss.backward()`, but `torch.autograd.grad` does not see them, and DDP, whose hooks run once for each tile,
    would be wrong.

    Args:
        model: a LLaMA-like model of Transformers, bare or in a PeftModel, on one device.
        host: where offloaded inputs wait; None creates new host memory.

    Raises:
        ValueError: the model has no decoder layers that Transformers can recompute, or a setting is out of range.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = _decoder_layers(core)
    num_layers, tile_tokens = recompute.num_layers, recompute.mlp_tile_tokens
    if not 0 <= num_layers <= len(layers):
        raise ValueError(
            f"Recompute.num_layers = {num_layers}: this model has {len(layers)} layers; give 0 to {len(layers)}."
        )
    if tile_tokens is not None and tile_tokens < 1:
        raise ValueError(f"Recompute.mlp_tile_tokens = {tile_tokens}: must be a positive integer, or None.")
    if tile_tokens is not None and not all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers):
        raise ValueError(f"Recompute.mlp_tile_tokens = {tile_tokens}: {type(layers[0]).__name__} has no module `mlp`.")

    # Either call also restores Transformers' own checkpoint function.
    if num_layers:
        core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        core.gradient_checkpointing_disable()
    core.disable_input_require_grads()
    host = host or HostMemory()
    for index, layer in enumerate(layers):
        is_recomputed = index < num_layers
        set_recomputed(layer, is_recomputed)
        if is_recomputed and recompute.offload:
            replace_checkpoint_function(layer, _Offloaded(checkpoint_function(layer), host, index))
        _untile(layer)
        if is_recomputed and tile_tokens is not None:
            layer.mlp.forward = _TiledForward(layer.mlp, tile_tokens)


def _decoder_layers(core: nn.Module) -> list[Any]:
    """The model's list of decoder layers. Raises ValueError if there is none that Transformers can recompute."""
    for module in core.modules():
        layers = list(module) if isinstance(module, nn.ModuleList) else []
        if layers and all(map(is_recomputable, layers)):
            return layers
    raise ValueError(f"{type(core).__name__} has no list of decoder layers that Transformers can recompute.")


# --- inputs that wait in host memory ----------------------------------------------------------------------------------


class _Offloaded:
    """A layer's checkpoint function whose saved input waits in host memory.

    torch's non-reentrant checkpoint saves the positional arguments, of which there is one, through the innermost hooks
    around it. Inputs that layers share (position embeddings, masks, bounds of packed rows) are keyword arguments and are not
    saved.
    """

    def __init__(self, checkpoint: Callable[..., Any], host: HostMemory, index: int) -> None:
        self.checkpoint, self.host, self.index = checkpoint, host, index

    def __call__(self, function: Callable[..., Any], hidden: Tensor, *others: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.checkpoint(function, hidden, *others)
        # autograd keeps `pack` as long as what it packed, so it must not hold `hidden`.
        source, parked = weakref.ref(hidden), list[weakref.ref[_Parked]]()

        def pack(saved: Tensor) -> Any:
            if saved is not source():
                return saved
            waiting = self.host.park(saved, self.index)
            parked.append(weakref.ref(waiting))
            return waiting

        try:
            with checkpointed_inputs(pack, _fetch):
                output = self.checkpoint(function, hidden, *others)
        finally:
            # The copy finished during the layer's computation. Its source may be freed and overwritten from here on.
            for reference in parked:
                if (waiting := reference()) is not None:
                    waiting.wait_until_copied()
        assert parked, "torch's checkpoint no longer saves its inputs through the hooks around it"
        return output


def _fetch(packed: Any) -> Any:
    return packed.fetch() if isinstance(packed, _Parked) else packed


class HostMemory:
    """Buffers for tensors that leave the device for a while, pinned for CUDA and reused.

    Attributes:
        free: the unused buffers: uint8, (capacity,) each.
    """

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self._latest: Callable[[], _Parked | None] = lambda: None
        self._stream: torch.cuda.Stream | None = None

    def park(self, source: Tensor, index: int) -> _Parked:
        """Start copying layer `index`'s input (any shape and dtype) to the host."""
        num_bytes = source.numel() * source.element_size()
        parked = _Parked(self, self.take(num_bytes, is_pinned=source.is_cuda), num_bytes, source, index)
        latest = self._latest()
        if latest is not None and latest.index == index - 1:
            parked.previous = latest
        self._latest = weakref.ref(parked)
        return parked

    def take(self, num_bytes: int, *, is_pinned: bool) -> Tensor:
        """A buffer of at least `num_bytes`, no longer free: the smallest that fits, or a new one."""
        fitting = [position for position, buffer in enumerate(self.free) if len(buffer) >= num_bytes]
        if fitting:
            return self.free.pop(min(fitting, key=lambda position: len(self.free[position])))
        if self.free:
            self.free.pop()  # outgrown: the new one takes its place
        capacity = 1 << max(num_bytes - 1, 0).bit_length()
        return torch.empty(capacity, dtype=torch.uint8, pin_memory=is_pinned)

    def start_copy(self, target: Tensor, source: Tensor, device: torch.device) -> Callable[[], None]:
        """Copy between the host and `device`; calling the result makes computation there wait for the copy.

        On CUDA all copies use one separate stream in order, so a buffer is never written before it was read.
        """
        if device.type != "cuda":
            target.copy_(source)
            return lambda: None
        computing = torch.cuda.current_stream(device)
        self._stream = self._stream or torch.cuda.Stream(device)
        # By then the source is computed, and earlier uses of the target's memory have finished.
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return partial(computing.wait_event, self._stream.record_event())


class _Parked:
    """One layer's input in host memory. In backward its copy to the device starts one layer before it is needed."""

    def __init__(self, host: HostMemory, buffer: Tensor, num_bytes: int, source: Tensor, index: int) -> None:
        self.host, self.buffer, self.device, self.index = host, buffer, source.device, index
        self.previous: _Parked | None = None  # the layer before, whose backward comes next
        self.returning: tuple[Tensor, Callable[[], None]] | None = None
        self.content = buffer[:num_bytes].view(source.dtype).view(source.shape)
        self.wait_until_copied = host.start_copy(self.content, source, self.device)

    def start_return(self) -> tuple[Tensor, Callable[[], None]]:
        if self.returning is None:
            target = torch.empty_like(self.content, device=self.device)
            self.returning = target, self.host.start_copy(target, self.content, self.device)
        return self.returning

    def fetch(self) -> Tensor:
        """The tensor, back on its device."""
        target, wait = self.start_return()
        self.returning = None
        wait()
        if self.previous is not None:
            self.previous.start_return()
        return target

    def __del__(self) -> None:
        if (
            self.returning is not None
        ):  # backward was interrupted: the memory must not be reused while it is being written
            self.returning[1]()
        self.host.free.append(self.buffer)


# --- the MLP in tiles -------------------------------------------------------------------------------------------------


class _TiledForward:
    """Replaces an MLP's forward: (batch, tokens, d) -> (batch, tokens, d), a tile of tokens at a time."""

    def __init__(self, mlp: nn.Module, tile_tokens: int) -> None:
        self.forward, self.tile_tokens = mlp.forward, tile_tokens
        self.replaced = mlp.__dict__.get("forward")

    def __call__(self, hidden: Tensor) -> Tensor:
        tiles = list(_tiles(hidden.shape[1], self.tile_tokens))
        if len(tiles) == 1:
            return self.forward(hidden)
        if not torch.is_grad_enabled():
            return _in_tiles(self.forward, hidden, tiles)
        # What makes the output require a gradient: the parameters are no arguments, and `hidden` may require none.
        kept = _Keep.apply(hidden, hidden.new_empty(0, requires_grad=True))
        output: Tensor = _Tiled.apply(kept, kept.grad_fn, hidden.requires_grad, self.forward, tiles)
        return output


def _untile(layer: Any) -> None:
    mlp: Any = getattr(layer, "mlp", None)
    tiled = mlp.__dict__.get("forward") if isinstance(mlp, nn.Module) else None
    if isinstance(tiled, _TiledForward):
        if tiled.replaced is None:
            del mlp.forward
        else:
            mlp.forward = tiled.replaced


def _tiles(num_tokens: int, tile_tokens: int) -> Iterator[slice]:
    for start in range(0, max(num_tokens, 1), tile_tokens):
        yield slice(start, min(start + tile_tokens, num_tokens))


def _in_tiles(
    forward: Callable[[Tensor], Tensor],
    hidden: Tensor,
    tiles: list[slice],
    before_each: Callable[[], None] = lambda: None,
) -> Tensor:
    """`forward` of each tile, in one tensor. Without autograd."""
    output: Tensor | None = None
    for tile in tiles:
        before_each()
        part = forward(hidden[:, tile])
        if output is None:
            output = part.new_empty(*hidden.shape[:2], part.shape[2])
        output[:, tile] = part
    assert output is not None
    return output


class _Keep(torch.autograd.Function):
    """Hands the MLP's input through, and saves it for `_Tiled`.

    `_Tiled` itself does not, because a checkpoint ends its recomputation where the last saved tensor is saved again. That is
    here, before the MLP runs: so in all it runs once in forward and once, tile by tile, in backward. (With
    `set_checkpoint_early_stop(False)` the recomputation runs it once more, in vain.)
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, always: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return gradients[0], None


class _Tiled(torch.autograd.Function):
    """The MLP tile by tile; backward reruns each tile with forward's dropout masks, and goes back through it at once."""

    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, keeper: Any, needs_gradient: bool, forward: Callable[..., Tensor], tiles: list[slice]
    ) -> Tensor:
        kind = kept.device.type
        ctx.keeper, ctx.needs_gradient, ctx.mlp, ctx.tiles = keeper, needs_gradient, forward, tiles
        ctx.random_states = []
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return _in_tiles(forward, kept, tiles, lambda: ctx.random_states.append(_random_state(kept.device)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (hidden,) = ctx.keeper.saved_tensors  # under a checkpoint, this recomputes the layer up to here
        gradient = torch.empty_like(hidden) if ctx.needs_gradient else None
        with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []), torch.enable_grad():
            for tile, state in zip(ctx.tiles, ctx.random_states, strict=True):
                _restore_random_state(state, hidden.device)
                source = hidden[:, tile].detach().requires_grad_(ctx.needs_gradient)
                _backward_through(ctx, source, gradients[0][:, tile])
                if gradient is not None:
                    gradient[:, tile] = source.grad
        return gradient, None, None, None, None


def _backward_through(ctx: Any, source: Tensor, gradient: Tensor) -> None:
    """In a function of its own, so that nothing of a tile outlives it."""
    with ctx.autocast:
        output = ctx.mlp(source)
    if output.requires_grad:  # not if source requires none and the MLP is frozen
        torch.autograd.backward(output, gradient)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
