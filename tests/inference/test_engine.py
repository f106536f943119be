"""The engine that clients share: the same tokens as `generate`, whoever else is in the batch; parts, cancelling, limits."""

import queue
import threading
from dataclasses import replace

import pytest
import torch

from qdense.data.rows import Message
from qdense.errors import DataError, EvaluationError
from qdense.events import ignore
from qdense.inference import engine as engine_module
from qdense.inference.engine import BusyError, Engine, Part, Request, StoppedError
from qdense.inference.generation import DECODINGS, Generation
from qdense.inference.loaded import load_model
from qdense.inference.recording import Recorder
from tests.helpers.adapters import alone, make_run

GREEDY = DECODINGS["greedy"]


@pytest.fixture(scope="module")
def loaded(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    runs = {name: make_run(tiny_model, folder / name, seed=seed) for seed, name in enumerate(("first", "second"))}
    return load_model({name: run / "adapter" for name, run in runs.items()}, ignore)


@pytest.fixture
def engine(loaded):
    engine = Engine(loaded, most_running=4)
    yield engine
    engine.close()


class Client:
    """A request, and the parts that arrived."""

    def __init__(self, engine, text, model=None, *, decoding=GREEDY, max_new_tokens=12, **settings):
        self.parts = queue.Queue()
        ids = engine.loaded.base.tokenizer(text)["input_ids"]
        self.request = Request(ids, model, decoding, max_new_tokens, self.parts.put, **settings)

    def all_parts(self):
        parts = []
        while not parts or (parts[-1].finish is None and parts[-1].error is None):
            parts.append(self.parts.get(timeout=120))
        return parts

    def text(self):
        return "".join(part.text for part in self.all_parts())


SAMPLED = replace(DECODINGS["sample"], num_samples=1, temperature=1.5, top_p=0.95, seed=3)


def test_many_clients_get_what_each_would_get_alone(loaded, engine):
    wanted = [
        (f"{'x' * (number % 5)} question {number}", model, decoding)
        for number in range(8)
        for model in (None, "first", "second")
        for decoding in (GREEDY, SAMPLED)
    ]
    expected = [alone(loaded, *each).completion for each in wanted]
    clients = [Client(engine, text, model, decoding=decoding) for text, model, decoding in wanted]
    threads = [threading.Thread(target=engine.submit, args=(client.request,)) for client in clients]
    for thread in threads:
        thread.start()
    answers = [client.text() for client in clients]
    assert answers == expected
    assert len(set(answers)) > 20  # bases and adapters differ
    assert engine.load() == (0, 0)


def test_parts_come_one_by_one_and_say_how_it_ended(loaded, engine):
    whole = alone(loaded, "abc", "first")
    client = Client(engine, "abc", "first", num_logprobs=2)
    engine.submit(client.request)
    parts = client.all_parts()
    assert [part.num_tokens for part in parts] == list(range(1, whole.num_tokens + 1))
    assert "".join(part.text for part in parts) == whole.completion
    assert parts[-1].finish == whole.finish
    for part in parts:
        ((token, logprob, best),) = part.logprobs
        assert (token, logprob) == best[0]  # greedy takes the likeliest
        assert best[0][1] >= best[1][1]


def test_a_stop_text_is_never_sent_in_part(loaded, engine):
    whole = alone(loaded, "stop here", None, max_new_tokens=30).completion
    marker = whole[7:10]
    client = Client(engine, "stop here", None, max_new_tokens=30, stop=(marker,))
    engine.submit(client.request)
    parts = client.all_parts()
    assert parts[-1].finish == "stop"
    assert "".join(part.text for part in parts) == whole[: whole.index(marker)]


def test_a_character_of_several_tokens_arrives_whole(loaded, engine, monkeypatch):
    smile = loaded.base.tokenizer("héé☺")["input_ids"]  # bytes
    written = iter(smile)

    def choose(search, logits):
        return torch.full((len(logits),), next(written))

    monkeypatch.setattr("qdense.inference.generation.Tokens._choose", choose)
    client = Client(engine, "x", None, max_new_tokens=len(smile))
    engine.submit(client.request)
    texts = [part.text for part in client.all_parts()]
    assert "".join(texts) == "héé☺"
    assert not any("\ufffd" in text for text in texts)


def test_a_cancelled_request_leaves_and_the_others_go_on(loaded, engine):
    expected = alone(loaded, "one more", "second").completion  # before the engine uses the model
    clients = [Client(engine, f"question {number}", None, max_new_tokens=200) for number in range(4)]
    for client in clients:
        engine.submit(client.request)
    clients[1].parts.get(timeout=60)
    engine.cancel(clients[1].request)
    waiting = Client(engine, "one more", "second")
    engine.submit(waiting.request)
    assert waiting.text() == expected
    for client in (clients[0], clients[2], clients[3]):
        assert client.all_parts()[-1].finish
    assert clients[1].parts.qsize() < 200
    assert engine.load() == (0, 0)


def test_memory_that_runs_out_costs_no_answer(loaded, monkeypatch):
    engine = Engine(loaded, most_running=4)
    wanted = [(f"question {number}", "first") for number in range(6)]
    expected = [alone(loaded, *each).completion for each in wanted]
    original, refused = Generation.forward, []

    def forward(self):
        if len(self.search.sequences) > 2:
            refused.append(len(self.search.sequences))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        original(self)

    monkeypatch.setattr(Generation, "forward", forward)
    clients = [Client(engine, *each) for each in wanted]
    for client in clients:
        engine.submit(client.request)
    assert [client.text() for client in clients] == expected
    assert refused
    assert engine.most_running == 2
    engine.close()


def test_recorded_steps_serve_one_batch_after_another(loaded, monkeypatch):
    """As on CUDA, where each adapter's recordings stay for its next requests."""
    recorders = []

    def unrecorded(base, model):
        recorders.append(Recorder(model, is_captured=False))
        return recorders[-1]

    monkeypatch.setattr(engine_module, "recorder_for", unrecorded)
    engine = Engine(loaded, most_running=4)
    for turn in range(3):
        wanted = [(f"{'x' * number} question {turn}", model) for number in range(turn + 2) for model in ("first", None)]
        expected = [alone(loaded, *each).completion for each in wanted]
        clients = [Client(engine, *each) for each in wanted]
        for client in clients:
            engine.submit(client.request)
        assert [client.text() for client in clients] == expected
    assert len(recorders) == 2
    engine.close()


def test_a_model_that_fails_a_request_answers_the_next(loaded, monkeypatch):
    engine = Engine(loaded, most_running=4)
    original, calls = Generation.choose, []

    def choose(self):
        calls.append(1)
        if len(calls) == 2:
            raise EvaluationError("the model's logits are not finite")
        return original(self)

    monkeypatch.setattr(Generation, "choose", choose)
    first, second = Client(engine, "a question", "first"), Client(engine, "a question", "first")
    engine.submit(first.request)
    assert "not finite" in first.all_parts()[-1].error
    engine.submit(second.request)
    assert second.text() == alone(loaded, "a question", "first").completion
    engine.close()


def test_limits_are_told(loaded):
    engine = Engine(loaded, most_running=1, most_waiting=1, max_length=40)
    with pytest.raises(DataError, match="the prompt has 30 tokens and the answer up to 12; together at most 40"):
        engine.submit(Client(engine, "x" * 30).request)
    with pytest.raises(DataError, match="the prompt is empty"):
        engine.submit(Client(engine, "").request)
    blocked = threading.Event()
    slow = Client(engine, "x")
    slow.request.on_part = lambda part: blocked.wait(60)
    engine.submit(slow.request)
    while engine.load() != (1, 0):
        pass
    engine.submit(Client(engine, "y").request)
    with pytest.raises(BusyError, match="1 requests are waiting"):
        engine.submit(Client(engine, "z").request)
    blocked.set()
    engine.close()
    with pytest.raises(StoppedError, match="stopping"):
        engine.submit(Client(engine, "x").request)


def test_a_failure_reaches_every_client(loaded, monkeypatch):
    engine = Engine(loaded, most_running=1)

    def broken(self, prompts):
        raise KeyError("a bug")

    monkeypatch.setattr(Generation, "read", broken)
    clients = [Client(engine, "x"), Client(engine, "y")]
    for client in clients:
        engine.submit(client.request)
    for client in clients:
        part = client.all_parts()[-1]
        assert isinstance(part, Part)
        assert "KeyError: 'a bug'" in part.error
    with pytest.raises(StoppedError, match="a bug"):
        engine.submit(clients[0].request)
    engine.close()


def test_a_template_of_single_questions_refuses_a_conversation(engine):
    ids = engine.conversation_ids("first", [Message("user", "hello")])
    assert "### Instruction:\nhello" in engine.loaded.base.tokenizer.decode(ids)
    with pytest.raises(DataError, match="single questions"):
        engine.conversation_ids("first", [Message("system", "be brief"), Message("user", "hello")])
    with pytest.raises(DataError, match="the last message must be the user's"):
        engine.conversation_ids("first", [Message("user", "hello"), Message("assistant", "hi")])
