"""The server, asked by the real openai client: answers, streams, refusals, clients that leave, 64 at a time."""

import asyncio
import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from qdense.events import ignore
from qdense.inference.engine import Engine
from qdense.inference.generation import Generation
from qdense.inference.loaded import load_model
from qdense.inference.server import make_app
from tests.helpers.adapters import alone, make_run
from tests.helpers.servers import serving as serving_app

KEY = "a-key-of-clients"
QUESTION = [{"role": "user", "content": "question 1"}]


@pytest.fixture(scope="module")
def loaded(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    runs = {
        "plain": make_run(tiny_model, folder / "plain", seed=0),
        "talk": make_run(tiny_model, folder / "talk", seed=1, template="chatml"),
    }
    return load_model({name: run / "adapter" for name, run in runs.items()}, ignore)


@contextlib.contextmanager
def serving(loaded, key=KEY, **settings):
    """The address of a server, and its engine."""
    engine = Engine(loaded, **({"most_running": 16} | settings))
    try:
        with serving_app(make_app(engine, "tiny", key)) as address:
            yield address, engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def server(loaded):
    with serving(loaded) as (address, engine):
        yield address, engine


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0)


def test_the_base_and_its_adapters_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny", "plain", "talk"]


def test_each_model_answers_as_it_does_alone(client, loaded):
    names = {"tiny": None, "plain": "plain", "talk": "talk"}
    alike = {name: alone(loaded, "question 1", model) for name, model in names.items()}
    for name, expected in alike.items():
        answer = client.completions.create(model=name, prompt="question 1", max_tokens=12, temperature=0)
        assert answer.choices[0].text == expected.completion
        assert answer.usage.prompt_tokens == expected.num_prompt_tokens
        assert answer.usage.completion_tokens == expected.num_tokens


def test_a_conversation_is_asked_in_the_template_of_its_adapter(client, loaded):
    turns = [{"role": "system", "content": "s"}, *QUESTION, {"role": "assistant", "content": "a"}]
    turns.append({"role": "user", "content": [{"type": "text", "text": "more"}]})
    text = "".join(
        f"<|im_start|>{role}\n{content}<|im_end|>\n"
        for role, content in (("system", "s"), ("user", "question 1"), ("assistant", "a"), ("user", "more"))
    )
    expected = alone(loaded, f"{text}<|im_start|>assistant\n", "talk").completion
    answer = client.chat.completions.create(model="talk", messages=turns, max_completion_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected
    with pytest.raises(openai.BadRequestError, match="single questions"):
        client.chat.completions.create(model="plain", messages=turns)


def test_a_stream_has_the_same_answer_in_pieces(client):
    settings = {"model": "talk", "messages": QUESTION, "max_tokens": 12, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(top_logprobs=2, **settings)
    chunks = list(
        client.chat.completions.create(stream=True, stream_options={"include_usage": True}, top_logprobs=2, **settings)
    )
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert pieces[0].delta.role == "assistant"
    assert "".join(piece.delta.content for piece in pieces) == whole.choices[0].message.content
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    logprobs = [entry for piece in pieces for entry in piece.logprobs.content]
    assert [entry.token for entry in logprobs] == [entry.token for entry in whole.choices[0].logprobs.content]
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in logprobs)


def test_several_prompts_and_answers_of_one_request(client):
    settings = {"model": "plain", "prompt": ["x", "yz"], "max_tokens": 6, "temperature": 1.5, "seed": 4, "n": 2}
    answer = client.completions.create(logprobs=1, **settings)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) > 2
    assert [choice.text for choice in client.completions.create(**settings).choices] == [
        choice.text for choice in answer.choices
    ]  # the seed decides
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) > 0
    pieces = {}
    for chunk in client.completions.create(stream=True, **settings):
        pieces.setdefault(chunk.choices[0].index, []).append(chunk.choices[0].text)
    assert ["".join(pieces[index]) for index in range(4)] == [choice.text for choice in answer.choices]
    ids = client.completions.create(model="plain", prompt=[1, 2, 3], max_tokens=2)
    assert ids.usage.prompt_tokens == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tinny"}, 'no model "tinny"; did you mean "tiny"?'),
        ({"max_tokens": 10**6}, "together at most 2,048"),
        ({"max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
        ({"temperature": 9}, "temperature: input should be less than or equal to 2"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: "),
        ({"frequency_penalty": 1}, "frequency_penalty: "),
        ({"extra_body": {"guided_json": {}}}, "guided_json: is not supported"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
        ({"messages": []}, "messages: "),
        ({"n": 65}, "n: "),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, changes, message):
    settings = {"model": "talk", "messages": QUESTION} | changes
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        client.chat.completions.create(**settings)
    assert message in refused.value.body["message"]


def test_a_key_is_needed_and_a_strange_name_of_this_machine_is_not_enough(server, loaded):
    address, _ = server
    for key in ("wrong", "ä"):
        answer = httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert answer.status_code == 401
        assert "wrong or missing key" in answer.json()["error"]["message"]
    assert httpx.get(f"{address}/v1/models").status_code == 401
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    with serving(loaded, key=None) as (open_address, _):
        assert httpx.get(f"{open_address}/v1/models").status_code == 200
        # a page at evil.example whose name leads to this machine
        assert httpx.get(f"{open_address}/v1/models", headers={"Host": "evil.example"}).status_code == 400
        plain = httpx.post(f"{open_address}/v1/completions", content=json.dumps({"model": "tiny", "prompt": "x"}))
        assert plain.status_code == 400  # what a form can send without asking the browser


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "' + b"x" * 5 * 2**20 + b'"}', 413),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": [1, 99999999]}', 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": []}', 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "\\ud800"}', 400),
    ],
)
def test_malformed_requests_get_an_error_in_openais_form(server, method, path, content, status):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.request(method, server[0] + path, content=content, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_place(loaded, monkeypatch):
    original = Generation.forward
    monkeypatch.setattr(Generation, "forward", lambda self: (time.sleep(0.01), original(self))[1])
    with serving(loaded, most_running=1) as (address, engine):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        settings = {"model": "tiny", "prompt": "x", "temperature": 2, "max_tokens": 2000, "seed": 1}
        stream = client.completions.create(stream=True, **settings)
        next(iter(stream))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).completions.create(**settings)
        answer = client.completions.create(model="talk", prompt="x", max_tokens=3)
        assert answer.choices[0].finish_reason
        assert engine.load() == (0, 0)


def test_a_full_queue_says_so(loaded, monkeypatch):
    may_go_on = threading.Event()
    original = Generation.forward
    monkeypatch.setattr(Generation, "forward", lambda self: (may_go_on.wait(60), original(self))[1])
    with serving(loaded, most_running=1, most_waiting=1) as (address, engine):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        answers = []

        def ask():
            answers.append(client.completions.create(model="tiny", prompt="x", max_tokens=3))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for number, thread in enumerate(threads):
            thread.start()
            while sum(engine.load()) <= number:
                time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting"):
            client.completions.create(model="tiny", prompt="x", max_tokens=3)
        may_go_on.set()
        for thread in threads:
            thread.join()
        assert len(answers) == 2


def test_64_clients_at_a_time_and_none_is_lost(client, loaded):
    models = [("tiny", "plain", "talk")[number % 3] for number in range(64)]
    expected = [
        alone(loaded, f"question {number}", None if model == "tiny" else model).completion
        for number, model in enumerate(models)
    ]

    async def ask_all():
        several = openai.AsyncOpenAI(base_url=client.base_url, api_key=KEY, max_retries=0)
        return await asyncio.gather(
            *(
                several.completions.create(model=model, prompt=f"question {number}", max_tokens=12, temperature=0)
                for number, model in enumerate(models)
            )
        )

    with ThreadPoolExecutor(1) as thread:  # where no other test's event loop runs
        answers = thread.submit(asyncio.run, ask_all()).result()
    assert [answer.choices[0].text for answer in answers] == expected
