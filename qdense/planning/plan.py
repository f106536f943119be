"""The plan of a training run: whether it fits the memory, where each byte goes, and how a step is divided to be fast.

What the recipe fixes stays; what it leaves "auto" is chosen for the highest predicted speed that fits. Long contexts need
further measures, only where nothing fits without them: checkpoints wait in host memory, then the MLP runs in tiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from qdense.catalogs.families import FUSED_MODULES, why_not_packed
from qdense.catalogs.models import CatalogModel
from qdense.methods import METHODS
from qdense.planning.memory import Kernels, Memory, StepLayout, gathered_bytes, memory_of
from qdense.planning.speed import CARDS, Card, tokens_per_second
from qdense.recipe import Recipe

# Share of the peak that the allocator cannot use. On a CPU it is glibc's: SmolLM2 took 6.8 GiB for 5.0 of tensors and 0.6 before.
_CUDA_FRAGMENTATION, _CPU_FRAGMENTATION = 0.03, 0.25
CUDA_CONTEXT_BYTES = 600 * 2**20  # driver, kernels and cuBLAS workspaces; not measured
_TILE_TOKENS = 4096
_CHOSEN_SHARE = 0.95  # of the memory, for "auto": a prediction may be low, and a desktop uses some


@dataclass(frozen=True)
class Machine:
    """The machine that a plan is for.

    Attributes:
        name: for a person.
        memory_bytes: memory that the run may use.
        base_bytes: of these, in use before the first tensor: CUDA's context, or the process with its libraries.
        card: its speed, if it is a known card.
        num_processes: how many such machines share a step's rows; all else is of one of them.
        has_bfloat16: whether it computes in bfloat16; see model.dtype.
    """

    name: str
    kernels: Kernels
    memory_bytes: int
    base_bytes: int
    card: Card | None = None
    has_bfloat16: bool = True
    num_processes: int = 1

    @classmethod
    def card_of(
        cls, memory_bytes: int, name: str = "a card", card: Card | None = None, *, plain: bool = False
    ) -> Machine:
        """A CUDA card, with the fused kernels and Liger's unless `plain`."""
        kernels = Kernels(is_cuda=True, is_fused=not plain, has_liger=not plain)
        return cls(name, kernels, memory_bytes, CUDA_CONTEXT_BYTES, card)


@dataclass(frozen=True)
class Plan:
    """A layout with its predicted memory and speed.

    Attributes:
        checkpoint_width: bytes of a token's hidden state.
        speeds: tokens per second by known card, of all processes together.
        summed_bytes: of gradients, which processes sum after each step.
        gathered_bytes: of a divided base, which each card receives from the others in a forward pass, and again in a backward.
        notes: what a person should know about this model: modules that are adapted as one, what the plan cannot know.
        why_padded: why rows are padded although the recipe packs them; "" otherwise.
        remedies: what to change if it does not fit: a key of the recipe, a value and its effect, in words.
    """

    machine: Machine
    layout: StepLayout
    memory: Memory
    max_length: int
    num_layers: int
    checkpoint_width: int
    speeds: dict[str, float]
    summed_bytes: int = 0
    gathered_bytes: int = 0
    notes: tuple[str, ...] = ()
    why_padded: str = ""
    remedies: tuple[str, ...] = ()

    @property
    def predicted_peak_bytes(self) -> int:
        """The peak of the tensors, as torch.cuda.max_memory_allocated reports it."""
        return self.memory.peak_bytes

    @property
    def needed_bytes(self) -> int:
        """Tensors, what the allocator cannot use, and memory in use before."""
        return needed_bytes(self.memory, self.machine)

    @property
    def predicted_memory_bytes(self) -> int:
        """The peak that the run's display will show: memory reserved by torch on CUDA, else the whole process."""
        return self.needed_bytes - (self.machine.base_bytes if self.machine.kernels.is_cuda else 0)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.machine.memory_bytes

    def as_json(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "needed_bytes": self.needed_bytes,
            "memory_bytes": self.machine.memory_bytes,
            "machine": self.machine.name,
            "kernels": asdict(self.machine.kernels),
            "tokens_per_second": {name: round(speed) for name, speed in self.speeds.items()},
            "breakdown": self.memory.breakdown,
            "moment": self.memory.moment,
            "layout": asdict(self.layout),
            "host_bytes": self.host_bytes,
            "num_processes": self.machine.num_processes,
            "summed_bytes": self.summed_bytes,
            "gathered_bytes": self.gathered_bytes,
            "notes": list(self.notes),
            "why_padded": self.why_padded,
            "remedies": list(self.remedies),
        }

    def record(self) -> dict[str, Any]:
        """What a run records: the layout, which a resumed run keeps, and the prediction."""
        return {
            "layout": {key: value for key, value in asdict(self.layout).items() if value is not None},
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "memory_bytes": self.machine.memory_bytes,
            "kernels": asdict(self.machine.kernels),
        }

    @property
    def host_bytes(self) -> int:
        """Pinned host memory for offloaded checkpoints: a buffer for each layer, rounded up to a power of two."""
        checkpoint = self.layout.micro_batch_size * self.max_length * self.checkpoint_width
        return self.layout.recompute_layers * (1 << (checkpoint - 1).bit_length()) if self.layout.offload else 0

    @property
    def summary(self) -> str:
        """The layout in a line."""
        layout = self.layout
        tokens = layout.micro_batch_size * self.max_length
        rows = "1 row" if layout.micro_batch_size == 1 else f"{layout.micro_batch_size} rows"
        parts = [f"{rows} ({tokens:,} tokens) at a time"]
        again = layout.recompute_layers
        parts.append(
            "all layers recomputed"
            if again == self.num_layers
            else "no layer recomputed" if not again else f"{again} of {self.num_layers} layers recomputed"
        )  # fmt: skip
        if layout.offload:
            parts.append("checkpoints in host memory")
        if layout.mlp_tile_tokens:
            parts.append(f"MLP in tiles of {layout.mlp_tile_tokens:,} tokens")
        return ", ".join(parts)


def needed_bytes(memory: Memory, machine: Machine) -> int:
    fragmentation = _CUDA_FRAGMENTATION if machine.kernels.is_cuda else _CPU_FRAGMENTATION
    return int(memory.peak_bytes * (1 + fragmentation)) + machine.base_bytes


def make_plan(recipe: Recipe, shape: CatalogModel, machine: Machine, layout: StepLayout | None = None) -> Plan:
    """Choose a layout, or use the given one of a resumed run, and predict. Raises ModelError for modules the model lacks."""
    num_processes = machine.num_processes
    recipe = recipe.settled(has_bfloat16=machine.has_bfloat16)
    rows = -(-recipe.training.batch_size // num_processes)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": rows})})
    if layout is None:
        layout = _choose(recipe, shape, machine)
    memory = _memory(recipe, shape, machine, layout)
    cards = CARDS if machine.card is None else {machine.card.name: machine.card}
    # On a CPU the speed is not predicted. A plan for no particular card lists the known ones.
    speeds = {
        name: num_processes * _speed(recipe, shape, machine, layout, card)
        for name, card in cards.items()
        if machine.kernels.is_cuda
    }
    checkpoint_width = shape.hidden_size * recipe.model.dtype_bytes
    plan = Plan(
        machine=machine,
        layout=layout,
        memory=memory,
        max_length=recipe.data.max_length,
        num_layers=shape.num_layers,
        checkpoint_width=checkpoint_width,
        speeds=speeds,
        summed_bytes=memory.breakdown["gradients"] if num_processes > 1 else 0,
        gathered_bytes=gathered_bytes(recipe.model, shape, _num_shards(recipe, machine)),
        notes=(*_fused(recipe, shape), *shape.unknowns),
        why_padded=(recipe.training.packing and why_not_packed(shape.model_type)) or "",
    )
    return plan if plan.fits else replace(plan, remedies=tuple(_remedies(recipe, shape, machine)))


def _num_shards(recipe: Recipe, machine: Machine) -> int:
    return machine.num_processes if recipe.training.shard else 1


def _memory(recipe: Recipe, shape: CatalogModel, machine: Machine, layout: StepLayout) -> Memory:
    return memory_of(recipe, shape, machine.kernels, layout, num_shards=_num_shards(recipe, machine))


def _speed(recipe: Recipe, shape: CatalogModel, machine: Machine, layout: StepLayout, card: Card) -> float:
    return tokens_per_second(recipe, shape, machine.kernels, layout, card, num_shards=_num_shards(recipe, machine))


def _fused(recipe: Recipe, shape: CatalogModel) -> Iterator[str]:
    """Which target modules this model holds as one."""
    given, found = recipe.adapter.target_modules, recipe.adapter.on(shape.model_type).target_modules
    for name in found:
        if name not in given:
            parts = ", ".join(FUSED_MODULES[name])
            yield f"{shape.model_type} holds {parts} as one module, {name}: it is adapted as one"


def longest_context(recipe: Recipe, shape: CatalogModel, machine: Machine) -> int:
    """The longest row in tokens that fits one at a time; 0 if none does. Found by bisection, to 64 tokens."""
    recipe = recipe.settled(has_bfloat16=machine.has_bfloat16)
    low, high = 0, 2**22
    while high - low > 64:
        middle = (low + high) // 2
        fits = any(
            needed_bytes(_memory(_with_length(recipe, middle), shape, machine, layout), machine) <= machine.memory_bytes
            for layout in _measures(1, middle, shape.num_layers, can_offload=machine.kernels.is_cuda)
        )
        low, high = (middle, high) if fits else (low, middle)
    return low


def _with_length(recipe: Recipe, max_length: int) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": max_length})})


def _measures(rows: int, max_length: int, num_layers: int, *, can_offload: bool) -> Iterator[StepLayout]:
    """Layouts with everything recomputed, in order of falling memory."""
    yield StepLayout(rows, num_layers)
    if can_offload:
        yield StepLayout(rows, num_layers, offload=True)
    if rows * max_length > _TILE_TOKENS:
        yield StepLayout(rows, num_layers, offload=can_offload, mlp_tile_tokens=_TILE_TOKENS)


def _choose(recipe: Recipe, shape: CatalogModel, machine: Machine) -> StepLayout:
    settings = recipe.training
    batch, layers = settings.batch_size, shape.num_layers
    if settings.micro_batch_size == "auto" and settings.packing:
        sizes = list(range(batch, 0, -1))  # most rows are shorter than the maximum: each further token may save a pass
    elif settings.micro_batch_size == "auto":
        # Sizes that divide the batch into 1, 2, 3, ... passes; others need as many passes and more memory.
        sizes = sorted({-(-batch // passes) for passes in range(1, batch + 1)}, reverse=True)
    else:
        sizes = [min(settings.micro_batch_size, batch)]
    if settings.recompute == "auto":
        depths = list(range(layers + 1))
    elif settings.recompute == "none":
        depths = [0]
    else:
        depths = [layers if settings.recompute == "all" else settings.recompute]
    depths = [min(depth, layers) for depth in depths]

    def needed(layout: StepLayout) -> int:
        return needed_bytes(_memory(recipe, shape, machine, layout), machine)

    def fits(layout: StepLayout) -> bool:
        return needed(layout) <= _CHOSEN_SHARE * machine.memory_bytes

    card = machine.card or CARDS["RTX 4090"]  # for choosing a layout, only the balance of compute and bandwidth matters
    # For each size, recomputing as few layers as fit is fastest.
    found = [
        next((StepLayout(size, depth) for depth in depths if fits(StepLayout(size, depth))), None) for size in sizes
    ]
    fitting = [layout for layout in found if layout is not None]
    if fitting:
        return max(fitting, key=lambda layout: _speed(recipe, shape, machine, layout, card))
    if layers in depths:
        can_offload = machine.kernels.is_cuda
        measures = list(_measures(sizes[-1], recipe.data.max_length, layers, can_offload=can_offload))
        # If none fits, the one that needs least; it may fit without the reserve.
        return next(filter(fits, measures), min(measures, key=needed))
    return StepLayout(sizes[-1], depths[-1])


def _remedies(recipe: Recipe, shape: CatalogModel, machine: Machine) -> list[str]:
    """Changes that would make it fit, each tested; else the least memory it would need."""

    def trial(**changes: dict[str, Any]) -> list[str]:
        """The changes, by table as in a recipe; none if they do not suffice."""
        tables = {table: getattr(recipe, table).model_copy(update=values) for table, values in changes.items()}
        changed = recipe.model_copy(update=tables)
        layout = _choose(changed, shape, machine)
        if needed_bytes(_memory(changed, shape, machine, layout), machine) > machine.memory_bytes:
            return []
        named = [(f"{table}.{key}", value) for table, values in changes.items() for key, value in values.items()]
        return [" and ".join(f"{key} = {json.dumps(value)}" for key, value in named) + " would fit"]

    settings = recipe.training
    is_fixed = settings.micro_batch_size != "auto" or settings.recompute != "auto"
    free = {"micro_batch_size": "auto", "recompute": "auto"} if is_fixed else {}
    remedies = trial(training=free) if is_fixed else []
    if machine.num_processes > 1 and not settings.shard:
        remedies += trial(training=free | {"shard": True})
    if recipe.model.quantization != "nf4" and "nf4" in METHODS[recipe.adapter.method].quantizations:
        remedies += trial(model={"quantization": "nf4"}, training=free)
    longest = longest_context(recipe, shape, machine)
    if 8 <= longest < recipe.data.max_length:
        remedies += trial(data={"max_length": longest}, training=free)
    if not remedies:
        least = _memory(_with_length(recipe, 8), shape, machine, StepLayout(1, shape.num_layers))
        remedies.append(
            f"the model itself needs {least.peak_bytes / 2**30:.1f} GiB: use a smaller model or a larger card"
        )
    return remedies
