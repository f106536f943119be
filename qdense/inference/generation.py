"""Completions for prompts: greedy, with 4 beams like the authors', or sampled; always full batches, sorted by length.

Sequences that end leave their batch at once and the next prompts take their places (continuous batching on one padded
cache), so no step is spent on finished ones. Padding is on the left and masked. A sequence depends on the others only
through rounding: beams compete within their item only, and every sample has its own generator.
"""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from transformers.cache_utils import Cache, DynamicLayer

from qdense.device import free_cache
from qdense.errors import EvaluationError
from qdense.inference.recording import Recorder, why_not_recorded
from qdense.modeling.load import BaseModel


@dataclass(frozen=True)
class Decoding:
    """How the next tokens are chosen.

    The authors also pass temperature, top_p and top_k, which do nothing without do_sample: theirs is a deterministic
    search with 4 beams.

    Attributes:
        num_samples: completions of each item, sampled at `temperature` from the most likely tokens with `top_p` of the
            probability; `seed` fixes them. A temperature of 0 takes the most likely token.
        batch_size_cpu, batch_size_cuda: sequences (with beams: items) at a time, where memory allows (planning/generation.py).
    """

    name: str
    num_beams: int = 1
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size_cpu: int = 64
    batch_size_cuda: int = 128

    def record(self) -> dict[str, Any]:
        """The settings that can change a completion."""
        settings = asdict(self)
        for key in ("batch_size_cpu", "batch_size_cuda"):
            del settings[key]
        if not self.temperature:
            del settings["seed"], settings["top_p"]
        return settings


DECODINGS = {
    decoding.name: decoding
    for decoding in (
        Decoding("beam4", num_beams=4, batch_size_cpu=8, batch_size_cuda=32),
        Decoding("greedy"),
        Decoding("sample", num_samples=8, temperature=0.7),
    )
}


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete: the item's number in the test set, which of its samples, and the token ids."""

    index: int
    sample: int
    input_ids: list[int]


@dataclass(frozen=True)
class Completion:
    """What a model wrote for one prompt.

    Attributes:
        index: the item's number in the test set.
        completion: the text, without the marker that ended it.
        finish: "eos"; "stop" at one of the template's headings; "length" at the token limit.
        num_tokens: generated, including those that ended it.
        sample: which of the item's samples it is.
    """

    index: int
    completion: str
    num_prompt_tokens: int
    num_tokens: int
    finish: str
    sample: int = 0


def longest_first(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts in the order of generation: neighbours have nearly equal length, and the longest come first, so memory runs
    out early or never."""
    return sorted(prompts, key=lambda prompt: (-len(prompt.input_ids), prompt.index, prompt.sample))


def generate(
    base: BaseModel,
    model: Any,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
    end_token: str | None = None,
    smaller_batch: Callable[[int], None] = lambda batch_size: None,
    is_recorded: bool | None = None,
) -> Iterator[Completion]:
    """Complete the prompts; yields completions as they end.

    If memory runs out, unfinished sequences start again in batches of half the size.

    Args:
        model: the base's model, or the PeftModel on it.
        stop: texts that end a completion.
        end_token: a token that ends one too, besides the tokenizer's and the model's own EOS.
        batch_size: sequences (with beams: items) at a time.
        smaller_batch: is called with each new batch size.
        is_recorded: see `recorder_for`.

    Raises:
        EvaluationError: not even one sequence fits in memory.
    """
    queue = longest_first(prompts)[::-1]
    endings = Endings(base, stop, max_new_tokens, end_token)
    search: Tokens | _Beams
    while queue:
        search = _Beams(decoding, endings) if decoding.num_beams > 1 else Tokens()
        generation = Generation(base, model, search, recorder_for(base, model, is_recorded))
        try:
            while queue or search.prompts:
                free = batch_size - len(search.prompts)
                # A prefill pauses all others, so wait until half the places are free (tools/results/generation.md).
                if queue and free >= (batch_size + 1) // 2:
                    new = [queue.pop() for _ in range(min(free, len(queue)))]
                    if isinstance(search, Tokens):
                        search.take(Running(prompt, decoding, endings) for prompt in new)
                    else:
                        search.take(new)
                    generation.read(new)
                yield from generation.choose()
                generation.forward()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            queue += longest_first(search.prompts)[::-1]
            longest = max(len(prompt.input_ids) for prompt in queue)
            if batch_size == 1:
                raise EvaluationError(
                    f"out of memory with one sequence at a time (a prompt of {longest:,} tokens and up to "
                    f"{max_new_tokens:,} new ones, {decoding.name}). Lower --max-new-tokens, use --decoding greedy, or free "
                    "memory; finished completions are kept."
                ) from None
        batch_size //= 2
        if queue:
            gc.collect()
            free_cache(base.device)
            smaller_batch(batch_size)


def recorder_for(base: BaseModel, model: Any, is_recorded: bool | None = None) -> Recorder | None:
    """What replays recorded steps of `model`, with the adapter that is now active; None where they run one by one.

    Args:
        is_recorded: None records on CUDA, if the model allows it. On a CPU, True runs the same steps without a recording.
    """
    is_cuda = base.device.type == "cuda"
    if is_recorded is None:
        is_recorded = is_cuda and why_not_recorded(base.model) is None
    return Recorder(model, is_captured=is_cuda) if is_recorded else None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the card's, or the machine's, memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


class Generation:
    """A batch in progress: `read` adds prompts to it, `choose` and `forward` in turn advance all of it by one token.

    Args:
        search: decides on the next tokens. Its `prompts` are always those taken and not finished, also if memory runs out.
        recorder: of `recorder_for`; a later batch of the same model may use it again.
    """

    def __init__(self, base: BaseModel, model: Any, search: Tokens | _Beams, recorder: Recorder | None = None) -> None:
        self.base, self.model, self.search, self.recorder = base, model, search, recorder
        self._batch: _Batch | None = None
        self._logits = self._chosen = torch.empty(0)
        self._rows: list[int] = []

    @torch.no_grad()
    def read(self, prompts: Iterable[Prompt]) -> None:
        """Add prompts that the search has just taken, in the same order."""
        added, logits = _prefill(self.base, self.model, list(prompts), self.search.width)
        self._batch = added if self._batch is None else _joined(self._batch, added)
        self._logits = torch.cat([self._logits.to(logits), logits])

    @torch.no_grad()
    def choose(self) -> list[Completion]:
        """Choose each sequence's next token; returns those that it ends, which leave the batch.

        Raises:
            EvaluationError: the model's logits are not finite.
        """
        if not torch.isfinite(self._logits).all():
            row = int((~torch.isfinite(self._logits)).any(dim=-1).nonzero()[0])
            raise EvaluationError(
                f"item {self.search.prompts[row // self.search.width].index}: the model's logits are not finite. "
                "Its adapter has absurd values (see alpha in its adapter_config.json), or its training diverged."
            )
        self._rows, self._chosen, completions = self.search.advance(self._logits)
        return completions

    @torch.no_grad()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop the other sequences; between `forward` and `choose`, and for one token at a time only."""
        assert isinstance(self.search, Tokens)
        self.search.keep(rows)
        if rows and self._batch is not None:
            self._batch.select(list(rows))
            self._logits = self._logits[list(rows)]
        else:
            self._batch, self._logits = None, torch.empty(0)

    @torch.no_grad()
    def forward(self) -> None:
        """Read the chosen tokens."""
        assert self._batch is not None
        if not self._rows:
            self._batch, self._logits = None, torch.empty(0)
            return
        self._batch.select(self._rows)
        self._logits = self._batch.forward(self.model, self._chosen, self.recorder)


# --- the batch: one padded cache --------------------------------------------------------------------------------------------


class _Layer(DynamicLayer):
    """Keys and values of one layer in buffers with room to grow; transformers' own copies all of them at every token."""

    room_tokens = 64
    keys: torch.Tensor  # (rows, heads, columns, size): a view of the buffer's filled part
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, size = key_states.shape
            self.place(
                key_states.new_empty(rows, heads, 0, size),
                value_states.new_empty(rows, heads, 0, value_states.shape[-1]),
            )
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self.place(self.keys, self.values, room_tokens=end - start + self.room_tokens)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def place(self, keys: torch.Tensor, values: torch.Tensor, *, room_tokens: int = room_tokens) -> None:
        """Store keys and values, with room to grow."""
        keys_buffer, values_buffer = (torch.nn.functional.pad(each, (0, 0, 0, room_tokens)) for each in (keys, values))
        self.put(keys_buffer, values_buffer, keys.shape[2])

    def put(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Use these as buffers, of which `length` columns are filled."""
        self._buffers = (keys, values)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def is_in(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        return self._buffers[0] is keys and self._buffers[1] is values

    def select(self, rows: torch.Tensor, first: int) -> None:
        """Keep these rows, and the columns from `first` on."""
        keys, values = (buffer[:, :, first:].index_select(0, rows) for buffer in self._buffers)
        self.put(keys, values, self.keys.shape[2] - first)


class _Batch:
    """The sequences in progress: their cache, its mask, and each row's next position."""

    def __init__(self, cache: Cache, mask: torch.Tensor) -> None:
        self.cache, self.mask = cache, mask  # mask: (rows, columns), 1 where a token is
        self.positions = mask.sum(dim=1)
        self._recorded: list[tuple[torch.Tensor, torch.Tensor]] = []  # where a recorder holds keys and values

    @property
    def layers(self) -> list[_Layer]:
        return cast(list[_Layer], self.cache.layers)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order, and drop leading columns in which none of them has a token."""
        if rows == list(range(len(self.mask))):
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.mask, self.positions = self.mask[index], self.positions[index]
        first = int(self.mask.any(dim=0).int().argmax())
        self.mask = self.mask[:, first:]
        for layer in self.layers:
            layer.select(index, first)

    def forward(self, model: Any, tokens: torch.Tensor, recorder: Recorder | None) -> torch.Tensor:
        """Append the next token of each row; returns the logits after it: (rows, vocabulary), fp32."""
        if recorder is not None:
            return self._replay(recorder, tokens)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        output = model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.positions = self.positions + 1
        return output.logits[:, -1].float()

    def _replay(self, recorder: Recorder, tokens: torch.Tensor) -> torch.Tensor:
        columns = self.mask.shape[1]
        is_in_place = self._recorded and all(
            layer.is_in(*places) for layer, places in zip(self.layers, self._recorded, strict=True)
        )
        if not is_in_place or columns == self._recorded[0][0].shape[2]:
            self._recorded = recorder.take(self.layers, self.mask, self.positions)
        logits = recorder.forward(tokens)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions + 1
        for layer, places in zip(self.layers, self._recorded, strict=True):
            layer.put(*places, columns + 1)
        return logits


def _prefill(base: BaseModel, model: Any, prompts: Sequence[Prompt], width: int) -> tuple[_Batch, torch.Tensor]:
    """Read the prompts, each text once; `width` rows for each, in the order given."""
    distinct = list({prompt.index: prompt for prompt in prompts}.values())
    longest = max(len(prompt.input_ids) for prompt in distinct)
    input_ids = torch.full((len(distinct), longest), base.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(distinct):
        input_ids[i, longest - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        mask[i, longest - len(prompt.input_ids) :] = 1
    input_ids, mask = input_ids.to(base.device), mask.to(base.device)
    cache = Cache(layer_class_to_replicate=_Layer)
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        # Not 1, whose slice is strided: on a CPU torch.matmul would then copy the whole output layer for each row.
        logits_to_keep=torch.tensor([longest - 1], device=base.device),
    )
    batch = _Batch(cache, mask)
    place = {prompt.index: i for i, prompt in enumerate(distinct)}
    rows = [place[prompt.index] for prompt in prompts for _ in range(width)]
    batch.select(rows)
    return batch, output.logits[rows, -1].float()


def _joined(first: _Batch, second: _Batch) -> _Batch:
    """The rows of both, the shorter ones padded on the left. (Keys carry their rotary position: they may be moved.)"""
    columns = max(first.mask.shape[1], second.mask.shape[1])

    def padded(tensor: torch.Tensor, before: int, dim: int) -> torch.Tensor:
        later_dims = (0, 0) * (tensor.dim() - 1 - dim)
        return torch.nn.functional.pad(tensor, (*later_dims, before, 0))

    mask = torch.cat([padded(batch.mask, columns - batch.mask.shape[1], 1) for batch in (first, second)])
    for own, other in zip(first.layers, second.layers, strict=True):
        keys, values = (
            torch.cat([padded(states, columns - states.shape[2], 2) for states in pair])
            for pair in ((own.keys, other.keys), (own.values, other.values))
        )
        own.place(keys, values)
    return _Batch(first.cache, mask)


# --- when a sequence ends -----------------------------------------------------------------------------------------------------


class Endings:
    """Decides whether a sequence has ended, and turns it into a completion.

    Args:
        stop: texts that end it.
        end_token: a token that ends it, besides the tokenizer's and the model's own EOS.
    """

    def __init__(self, base: BaseModel, stop: Sequence[str], max_new_tokens: int, end_token: str | None) -> None:
        self.tokenizer, self.stop, self.max_new_tokens = base.tokenizer, tuple(stop), max_new_tokens
        own = base.model.generation_config.eos_token_id  # a chat model may have a list of them
        listed = own if isinstance(own, list) else [own]
        if end_token is not None:
            listed = [*listed, base.tokenizer.convert_tokens_to_ids(end_token)]
        self.eos = {token for token in (base.tokenizer.eos_token_id, *listed) if token is not None}
        # Only a token with a marker's last character can complete the marker.
        self.closing = _tokens_with(base.tokenizer, frozenset(text[-1] for text in self.stop))
        self.tail = max((len(text) for text in self.stop), default=0) + 2

    def finish(self, tokens: Sequence[int]) -> str | None:
        """Why the sequence ends with its last token; None if it continues."""
        if tokens[-1] in self.eos:
            return "eos"
        if tokens[-1] in self.closing:
            text = self.tokenizer.decode(tokens[-self.tail :], skip_special_tokens=True)
            if any(marker in text for marker in self.stop):
                return "stop"
        return "length" if len(tokens) >= self.max_new_tokens else None

    def completion(self, prompt: Prompt, tokens: Sequence[int], finish: str) -> Completion:
        text = self.tokenizer.decode(tokens[:-1] if finish == "eos" else tokens, skip_special_tokens=True)
        if finish == "stop":
            text = text[: min(text.find(marker) for marker in self.stop if marker in text)]
        return Completion(prompt.index, text, len(prompt.input_ids), len(tokens), finish, prompt.sample)


@functools.lru_cache(maxsize=64)  # a server has new endings for each request, and a vocabulary has 100,000 tokens
def _tokens_with(tokenizer: Any, characters: frozenset[str]) -> frozenset[int]:
    """The tokens that contain one of the characters; "<0x3A>" is how SentencePiece spells a byte."""
    if not characters:
        return frozenset()
    spelt = characters | {f"<0x{ord(character):02X}>" for character in characters}
    return frozenset(i for token, i in tokenizer.get_vocab().items() if any(part in token for part in spelt))


# --- the searches -----------------------------------------------------------------------------------------------------------

# What a search decides from logits (rows, vocabulary): the rows that continue, with their next tokens, and what has ended.
Advance = tuple[list[int], torch.Tensor, list[Completion]]


@dataclass(eq=False)
class Running:
    """A prompt and what has been written after it, one token at a time.

    Attributes:
        num_logprobs: how many of the likeliest tokens to record at each place, besides the chosen one; None records nothing.
        logprobs: for each token its log probability, and the likeliest tokens with theirs, at temperature 1.
    """

    prompt: Prompt
    decoding: Decoding
    endings: Endings
    num_logprobs: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # A generator for each sequence, so that its samples do not depend on the batch or on earlier work.
        self.generator = random.Random(f"{self.decoding.seed}:{self.prompt.index}:{self.prompt.sample}")

    def record(self, logits: torch.Tensor) -> None:
        """The log probability of the newest token, from logits (vocabulary,)."""
        assert self.num_logprobs is not None
        logprobs = torch.log_softmax(logits, dim=-1)
        values, tokens = logprobs.topk(self.num_logprobs)
        best = list(zip(tokens.tolist(), values.tolist(), strict=True))
        self.logprobs.append((float(logprobs[self.tokens[-1]]), best))


class Tokens:
    """One token at a time for each sequence: the most likely one, or a sampled one."""

    width = 1

    def __init__(self) -> None:
        self.sequences: list[Running] = []

    @property
    def prompts(self) -> list[Prompt]:
        return [sequence.prompt for sequence in self.sequences]

    def take(self, sequences: Iterable[Running]) -> None:
        self.sequences += sequences

    def keep(self, rows: Sequence[int]) -> None:
        self.sequences = [self.sequences[row] for row in rows]

    def advance(self, logits: torch.Tensor) -> Advance:
        chosen = self._choose(logits)
        rows, completions = [], []
        for row, (sequence, token) in enumerate(zip(self.sequences, chosen.tolist(), strict=True)):
            sequence.tokens.append(token)
            if sequence.num_logprobs is not None:
                sequence.record(logits[row])
            finish = sequence.endings.finish(sequence.tokens)
            if finish is None:
                rows.append(row)
            else:
                completions.append(sequence.endings.completion(sequence.prompt, sequence.tokens, finish))
        if completions:
            chosen = chosen[rows]  # before any sequence is removed, because this may run out of memory
            self.sequences = [self.sequences[row] for row in rows]
        return rows, chosen, completions

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        chosen = logits.argmax(dim=-1)
        sampled = [row for row, sequence in enumerate(self.sequences) if sequence.decoding.temperature]
        if sampled:
            chosen[sampled] = _sample(logits[sampled], [self.sequences[row] for row in sampled])
        return chosen


def _sample(logits: torch.Tensor, sequences: Collection[Running]) -> torch.Tensor:
    """A token for each of the sequences, drawn at its temperature from its likeliest tokens."""

    def column(values: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(values), device=logits.device)[:, None]

    probabilities = torch.softmax(logits / column(sequence.decoding.temperature for sequence in sequences), dim=-1)
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    reached = probabilities.cumsum(dim=-1)
    # A token is kept while those before it sum to less than top_p; the first always is.
    is_kept = reached - probabilities < column(sequence.decoding.top_p for sequence in sequences)
    kept = torch.where(is_kept, probabilities, 0.0).cumsum(dim=-1)
    drawn = column(sequence.generator.random() for sequence in sequences)
    place = torch.searchsorted(kept, drawn * kept[:, -1:], right=True)
    # In float32 a draw may round to 1, beyond all kept tokens.
    return order.gather(1, place.minimum(is_kept.sum(dim=-1, keepdim=True) - 1))[:, 0]


class _Beams:
    """Beam search, step by step as in transformers (`GenerationMixin._beam_search`, early_stopping False, length penalty
    1), like the authors', except that each item ends independently.

    An item has `width` running beams and as many places for finished ones. It ends when all places are taken and the
    score per token of its best running beam is no better than that of the worst finished one.
    """

    def __init__(self, decoding: Decoding, endings: Endings) -> None:
        self.width, self.endings = decoding.num_beams, endings
        # Enough candidates for `width` to continue even if all others end.
        self.num_candidates = max(2, 1 + len(endings.eos)) * self.width
        self.prompts: list[Prompt] = []
        self.tokens: list[list[list[int]]] = []  # of each item's running beams
        self.scores = torch.empty(0, self.width)  # sums of log probabilities: (items, width)
        self.finished: list[list[tuple[float, list[int], str]]] = []  # (score, tokens, finish), the best first

    def take(self, prompts: Sequence[Prompt]) -> None:
        self.prompts += prompts
        self.tokens += [[[] for _ in range(self.width)] for _ in prompts]
        self.finished += [[] for _ in prompts]
        # All beams of an item start equal, so only the first may propose.
        fresh = torch.full((len(prompts), self.width), -1e9)
        fresh[:, 0] = 0.0
        self.scores = torch.cat([self.scores, fresh.to(self.scores)])

    def advance(self, logits: torch.Tensor) -> Advance:
        num_items, vocabulary = len(self.prompts), logits.shape[-1]
        scores = torch.log_softmax(logits, dim=-1).reshape(num_items, self.width, vocabulary)
        scores = scores + self.scores.to(logits.device)[:, :, None]
        best, place = scores.reshape(num_items, -1).topk(self.num_candidates)
        candidates = zip(best.tolist(), (place // vocabulary).tolist(), (place % vocabulary).tolist(), strict=True)
        rows: list[int] = []
        tokens: list[int] = []
        completions: list[Completion] = []
        kept: list[int] = []
        kept_scores: list[list[float]] = []
        for item, (item_scores, beams, item_tokens) in enumerate(candidates):
            running = self._advance_item(item, item_scores, beams, item_tokens)
            if self._is_done(item, running):
                _, sequence, finish = self.finished[item][0]
                completions.append(self.endings.completion(self.prompts[item], sequence, finish))
                continue
            kept.append(item)
            kept_scores.append([score for score, _, _ in running])
            self.tokens[item] = [sequence for _, _, sequence in running]
            rows += [item * self.width + beam for _, beam, _ in running]
            tokens += [sequence[-1] for _, _, sequence in running]
        chosen = torch.tensor(
            tokens, device=logits.device
        )  # before any item is removed, because this may run out of memory
        self.prompts = [self.prompts[item] for item in kept]
        self.tokens = [self.tokens[item] for item in kept]
        self.finished = [self.finished[item] for item in kept]
        self.scores = torch.tensor(kept_scores).reshape(-1, self.width)
        return rows, chosen, completions

    def _advance_item(
        self, item: int, scores: list[float], beams: list[int], tokens: list[int]
    ) -> list[tuple[float, int, list[int]]]:
        """Record the candidates that have ended; returns (score, beam, tokens) of those that continue, best first."""
        running: list[tuple[float, int, list[int]]] = []
        for rank, (score, beam, token) in enumerate(zip(scores, beams, tokens, strict=True)):
            sequence = [*self.tokens[item][beam], token]
            finish = self.endings.finish(sequence)
            if finish is None:
                if len(running) < self.width:
                    running.append((score, beam, sequence))
            elif rank < self.width:  # the others only keep the search going
                self.finished[item].append((score / len(sequence), sequence, finish))
        while 0 < len(running) < self.width:  # so many ended that a place stays free: a copy that proposes nothing
            running.append((-1e9, *running[-1][1:]))
        # Stable: of equal scores the earlier is kept, as by topk over (finished, new).
        self.finished[item].sort(key=lambda ended: -ended[0])
        del self.finished[item][self.width :]
        return running

    def _is_done(self, item: int, running: list[tuple[float, int, list[int]]]) -> bool:
        if not running:  # at the token limit all candidates end
            return True
        if len(self.finished[item]) < self.width:
            return False
        score, _, sequence = running[0]
        return score / len(sequence) <= self.finished[item][-1][0]
