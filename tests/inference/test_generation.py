"""The search engine: held to transformers' own, whatever the batch; endings; samples; memory that runs out."""

import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace as Namespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig

from qdense.errors import EvaluationError
from qdense.inference import recording
from qdense.inference.generation import DECODINGS, Prompt, generate, longest_first
from qdense.modeling.load import load_base
from qdense.recipe import ModelRecipe
from tests.helpers.models import make_tiny_model

# A random model hardly ever ends: several tokens count as an end.
EOS = [256, *range(0, 256, 6)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "fp32")
    base = load_base(
        ModelRecipe(name=str(folder), quantization="none", dtype="float32", device="cpu"), for_training=False
    )
    torch.manual_seed(0)
    for name, parameter in base.model.named_parameters():  # so large that what is read decides what comes next
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4 if "embed" in name else 0.3)
    base.model.generation_config.eos_token_id = EOS
    return replace(base, tokenizer=Bytes(base.tokenizer))


class Bytes:
    """The tiny model's tokenizer, but decoding loses nothing: a character for each token."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos_token_id, self.get_vocab = tokenizer, tokenizer.eos_token_id, tokenizer.get_vocab
        alone = [tokenizer.decode([token]) for token in range(258)]
        self.texts = [
            text if len(text) == 1 and text.isascii() else chr(0x100 + token) for token, text in enumerate(alone)
        ]

    def __call__(self, text):
        return self.tokenizer(text)

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return "".join(self.texts[token] for token in tokens if token != 256)


def prompts(count, *, seed=0, num_samples=1):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 40, (count,), generator=generator).tolist()
    texts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(index, sample, ids) for index, ids in enumerate(texts) for sample in range(num_samples)]


def complete(base, wanted, decoding, batch_size, **changes):
    settings = {"max_new_tokens": 16, "stop": (), "batch_size": batch_size} | changes
    completions = list(generate(base, base.model, wanted, decoding, **settings))
    assert len(completions) == len(wanted)
    return {(completion.index, completion.sample): completion for completion in completions}


def by_transformers(base, prompt, num_beams):
    settings = GenerationConfig(
        do_sample=False, num_beams=num_beams, max_new_tokens=16, length_penalty=1.0, early_stopping=False,
        eos_token_id=base.model.generation_config.eos_token_id, pad_token_id=257, use_cache=True,
    )  # fmt: skip
    ids = torch.tensor([prompt.input_ids])
    output = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    tokens = output[0, len(prompt.input_ids) :].tolist()
    end = next((place for place, token in enumerate(tokens) if token in settings.eos_token_id), None)
    text = base.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    assert len(text) == len(tokens[:end])
    return text, len(tokens[:end]) + (end is not None), "length" if end is None else "eos"


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize(("name", "eos"), [("greedy", EOS), ("beam4", EOS), ("beam4", [256, *range(0, 256, 3)])])
def test_tokens_are_those_of_transformers_one_prompt_at_a_time(base, name, eos, is_recorded, monkeypatch):
    """As the steps are, and as a CUDA graph would record them."""
    monkeypatch.setattr(recording, "_COLUMNS", 16)  # so that places run out
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", eos)
    wanted = prompts(60)
    expected = {(p.index, 0): by_transformers(base, p, DECODINGS[name].num_beams) for p in wanted}
    if eos is EOS:
        assert {finish for _, _, finish in expected.values()} == {"eos", "length"}  # both ways to end are seen
    assert len({num_tokens for _, num_tokens, _ in expected.values()}) > 8  # and ends at all lengths
    assert sum(len(set(text)) > 2 for text, _, _ in expected.values()) > 20  # and texts of several tokens
    passes = []  # (rows, tokens of each) of every forward pass
    handle = base.model.register_forward_pre_hook(
        lambda _, arguments, named: passes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    for batch_size in (1, 3, 7, 16, 64):
        found = complete(base, wanted, DECODINGS[name], batch_size, is_recorded=is_recorded)
        assert {key: (c.completion, c.num_tokens, c.finish) for key, c in found.items()} == expected
    handle.remove()
    joined = [
        read
        for (read, length), (rows, _) in itertools.pairwise(passes)
        if length > 1 and rows > read * DECODINGS[name].num_beams
    ]
    assert len(joined) > 5  # places were filled while others went on


def test_samples_depend_on_nothing_but_seed_item_and_number(base):
    decoding = replace(DECODINGS["sample"], temperature=1.0, top_p=0.9, seed=3)
    wanted = prompts(12, num_samples=3)
    together = complete(base, wanted, decoding, 16)
    for batch_size in (1, 5):
        assert complete(base, wanted, decoding, batch_size) == together
    assert complete(base, wanted[5:6], decoding, 8)[1, 2] == together[1, 2]
    assert len({completion.completion for completion in together.values()}) > 12
    other = complete(base, wanted, replace(decoding, seed=4), 16)
    assert sum(other[key].completion != together[key].completion for key in other) > 12


def tokens_drawn(base, model, wanted, decoding):
    """One token for each prompt."""
    token_of = {text: token for token, text in enumerate(base.tokenizer.texts)} | {"": 256}
    found = generate(base, model, wanted, decoding, max_new_tokens=1, stop=(), batch_size=len(wanted))
    return torch.tensor([token_of[completion.completion] for completion in found])


def test_samples_follow_the_models_probabilities(base, monkeypatch):
    """One token, drawn 4,000 times, against the softmax of transformers' logits, cut off at top_p."""
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", 256)
    ids = prompts(1)[0].input_ids
    decoding = replace(DECODINGS["sample"], temperature=8.0, top_p=0.5)
    drawn = tokens_drawn(base, base.model, [Prompt(0, sample, ids) for sample in range(4000)], decoding)
    counts = drawn.bincount(minlength=258)
    with torch.no_grad():
        logits = base.model(torch.tensor([ids])).logits[0, -1]
    probabilities = torch.softmax(logits / decoding.temperature, dim=-1)
    order = probabilities.argsort(descending=True)
    kept = order[: int((probabilities[order].cumsum(0) < 0.5).sum()) + 1]
    assert set(counts.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    expected = probabilities[kept] / probabilities[kept].sum() * 4000
    chi_squared = float((((counts[kept] - expected) ** 2) / expected).sum())
    degrees = len(kept) - 1
    assert degrees > 5
    assert chi_squared < degrees + 4 * math.sqrt(2 * degrees)


def test_a_draw_that_rounds_to_one_stays_within_top_p(base, monkeypatch):
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", 256)
    monkeypatch.setattr(random, "Random", lambda seed: Namespace(random=lambda: 1 - 2**-53))
    logits = torch.zeros(1, 1, 258)
    logits[..., 100:200] = 5.0
    decoding = replace(DECODINGS["sample"], temperature=1.0, top_p=0.5)
    (token,) = tokens_drawn(base, lambda **_: Namespace(logits=logits), [Prompt(0, 0, [1, 2])], decoding)
    assert 100 <= token < 200


class Scripted:
    """Stands in for a model: token number n of a prompt is the n-th of its script, which its first token selects."""

    def __init__(self, scripts, vocabulary=258):
        self.scripts, self.vocabulary = scripts, vocabulary

    def __call__(self, *, input_ids, attention_mask, position_ids, past_key_values, **_):
        rows, columns = input_ids.shape
        # The script's number is what is cached, so that it moves with its row.
        is_prefill = past_key_values.get_seq_length() == 0
        which = input_ids[:, -1].float() if is_prefill else past_key_values.layers[0].keys[:, 0, -1, 0]
        states = which[:, None, None, None].expand(rows, 1, columns, 1)
        past_key_values.update(states, states, 0)
        logits = torch.zeros(rows, 1, self.vocabulary)
        for row in range(rows):
            script = self.scripts[int(which[row])]
            # prompts are two tokens long: after position p comes token number p - 1
            logits[row, 0, script[min(int(position_ids[row, -1]) - 1, len(script) - 1)]] = 9.0
        return type("Output", (), {"logits": logits})


def tokens_of(base, text):
    return base.tokenizer(text)["input_ids"]


def test_a_completion_ends_at_eos_at_a_marker_and_at_the_limit(base, monkeypatch):
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", 256)
    scripts = [
        [*tokens_of(base, "Yes."), 256],
        tokens_of(base, "7: so\n\n### Response:\nmore"),
        tokens_of(base, "on and on and on and on"),
        tokens_of(base, "### Response"),  # no marker without its colon
    ]
    wanted = [Prompt(index, 0, [1, index]) for index in range(4)]
    for name, batch_size in itertools.product(("greedy", "beam4"), (1, 2, 4)):
        found = generate(
            base, Scripted(scripts), wanted, DECODINGS[name],
            max_new_tokens=20, stop=("### Instruction:", "### Response:"), batch_size=batch_size,
        )  # fmt: skip
        shown = {c.index: (c.completion, c.finish, c.num_tokens) for c in found}
        assert shown[0] == ("Yes.", "eos", 5)
        assert shown[1] == ("7: so\n\n", "stop", 20)
        assert shown[2] == ("on and on and on and"[:20], "length", 20)
        assert shown[3][1] == "length"


@pytest.mark.parametrize(
    ("vocabulary", "spelt"),
    [
        ({"### ": 0, "Response": 1, ":\n": 2, "7": 3}, [3, 0, 1, 2]),  # a marker ends within a token
        ({"\u2581###": 0, "\u2581Response": 1, "<0x3A>": 2, "7": 3}, [3, 0, 1, 2]),  # ... or in SentencePiece's byte
        ({"### Response:": 0, " more": 1, "7": 2}, [2, 0]),  # ... or is a token
    ],
)
def test_markers_end_in_any_kind_of_token(base, vocabulary, spelt):
    class Pieces:
        eos_token_id = 99

        def get_vocab(self):
            return vocabulary

        def decode(self, tokens, **_):
            pieces = {i: text for text, i in vocabulary.items()}
            return "".join(pieces[i] for i in tokens).replace("\u2581", " ").replace("<0x3A>", ":")

    model = Namespace(generation_config=Namespace(eos_token_id=None))
    (found,) = generate(
        replace(base, tokenizer=Pieces(), model=model), Scripted([[*spelt, *spelt]]), [Prompt(0, 0, [1, 0])],
        DECODINGS["greedy"], max_new_tokens=9, stop=("### Response:",), batch_size=1,
    )  # fmt: skip
    assert (found.completion.strip(), found.finish, found.num_tokens) == ("7", "stop", len(spelt))


class RefusedMemory(TorchFunctionMode):
    """Within it, memory runs out at one call of a function of torch: the call of that number whose arguments fit."""

    def __init__(self, function, number=1, fits=lambda *arguments, **named: True):
        super().__init__()
        self.function, self.number, self.fits = function, number, fits
        self.num_calls = 0

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function is self.function and self.fits(*arguments, **named):
            self.num_calls += 1
            if self.num_calls == self.number:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*arguments, **named)


@pytest.mark.parametrize("name", ["greedy", "beam4"])
@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        (torch.nn.functional.embedding, (1, 2, 30)),  # reading prompts, or one token more
        (torch.cat, (2, 100)),  # prompts join those under way
        (torch.nn.functional.pad, (1, 100)),  # the cache, or the mask, grows
        (torch.Tensor.index_select, (1, 20)),  # sequences have ended: the others are kept
    ],
)
def test_memory_that_runs_out_anywhere_loses_nothing(base, name, function, numbers):
    wanted = prompts(30)
    whole = complete(base, wanted, DECODINGS[name], 4)
    for number in numbers:
        sizes = []
        with RefusedMemory(function, number):
            assert complete(base, wanted, DECODINGS[name], 4, smaller_batch=sizes.append) == whole
        assert sizes == [2]


@pytest.mark.parametrize(
    ("name", "function", "fits"),
    [
        # of a beam search: the tokens of continuing beams cannot be put on the device
        ("beam4", torch.tensor, lambda values, device=None, **_: device is not None and 4 <= len(values) < 8 * 4),
        # of a greedy search: those of continuing rows cannot be copied
        (
            "greedy",
            torch.Tensor.__getitem__,
            lambda values, rows: isinstance(rows, list) and values.dtype == torch.int64,
        ),
    ],
)
def test_memory_that_runs_out_when_a_sequence_ends_does_not_lose_it(base, name, function, fits):
    wanted = prompts(12)
    whole = complete(base, wanted, DECODINGS[name], 8)
    sizes = []
    with RefusedMemory(function, fits=fits) as refused:
        assert complete(base, wanted, DECODINGS[name], 8, smaller_batch=sizes.append) == whole
    assert refused.num_calls > 1
    assert sizes == [4]


def test_places_are_filled_as_they_come_free(base, monkeypatch):
    """16 sequences of 2 or 32 tokens on 4 places take fewer steps than the sum of each four's longest."""
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", 256)
    lengths = [2, 32] * 8
    scripts = [[65] * (length - 1) + [256] for length in lengths]
    model, rows = Scripted(scripts), []
    scripted = model.__call__

    def counting(**inputs):
        rows.append(len(inputs["input_ids"]))
        return scripted(**inputs)

    wanted = [Prompt(index, 0, [1, index]) for index in range(16)]
    found = list(generate(base, counting, wanted, DECODINGS["greedy"], max_new_tokens=40, stop=(), batch_size=4))
    assert sorted((c.index, c.num_tokens) for c in found) == list(enumerate(lengths))
    assert max(rows) == 4
    assert len(rows) < 4 * 32  # what batches that only shrink take


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_too_little_memory_for_one_sequence_is_reported(base, error):
    def fail(**inputs):
        raise error

    sizes = []
    with pytest.raises(EvaluationError, match=r"out of memory with one sequence .* prompt of \d+ tokens"):
        list(generate(base, fail, prompts(5), DECODINGS["greedy"], max_new_tokens=4, stop=(), batch_size=5,
                      smaller_batch=sizes.append))  # fmt: skip
    assert sizes == [2, 1]


def test_other_runtime_errors_come_through(base):
    def fail(**inputs):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(generate(base, fail, prompts(2), DECODINGS["greedy"], max_new_tokens=4, stop=(), batch_size=2))


def test_the_longest_prompt_comes_first():
    order = longest_first([Prompt(0, 0, [1]), Prompt(1, 1, [1, 2]), Prompt(1, 0, [1, 2]), Prompt(2, 0, [1, 2, 3])])
    assert [(prompt.index, prompt.sample) for prompt in order] == [(2, 0), (1, 0), (1, 1), (0, 0)]


def test_unpacked_weights_give_the_very_logits_of_nf4(tiny_model):
    """What an evaluation on a CPU does: the values of NF4, unpacked once instead of at each use."""
    recipe = ModelRecipe(name=str(tiny_model), device="cpu")
    packed, unpacked = load_base(recipe), load_base(recipe, for_training=False)
    assert (packed.stored_as, unpacked.stored_as) == ("nf4", "bfloat16, with NF4's values")
    assert type(unpacked.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(packed.model.eval()(ids).logits, unpacked.model.eval()(ids).logits)


def test_without_the_memory_to_unpack_the_weights_stay_packed(tiny_model, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    told = []
    base = load_base(ModelRecipe(name=str(tiny_model), device="cpu"), told.append, for_training=False)
    assert base.stored_as == "nf4"
    assert any("too little memory to unpack" in text for text in told)
