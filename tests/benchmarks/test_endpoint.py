"""`evaluate --endpoint` against a real server process: answers, faults, what is sent and what is never written."""

import json
import os
import subprocess
import sys

import pytest

from qdense.benchmarks import endpoint
from qdense.benchmarks.tasks import TASKS, load_items
from qdense.cli import main
from tests.helpers.endpoint import server

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def evaluate(url, model, *options, tasks="wordproblems"):
    return main(["evaluate", tasks, "--endpoint", url, "--model", model, "--json", "--quiet", *options])


def sent(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def written(folder):
    return "".join(path.read_text() for path in folder.rglob("*") if path.is_file() and path.name != "log")


def test_a_model_behind_a_server_is_asked_step_by_step_and_scored(workplace, capsys):
    log = workplace / "log"
    with server(log) as url:
        assert evaluate(url, "gpt", "--limit", "40", "--concurrency", "5", "--max-new-tokens", "77") == 0
    summary = json.loads(capsys.readouterr().out)
    rows = load_items(TASKS["wordproblems"], None).rows[:40]
    requests = sent(log)
    assert len(requests) == 40
    questions = {request["body"]["messages"][0]["content"] for request in requests}
    assert questions == {f"{row.instruction}\n\nLet's think step by step." for row in rows}
    for request in requests:
        assert request["path"] == "/v1/chat/completions"  # a bare host gets /v1
        assert request["key"] == f"Bearer {KEY}"
        body = request["body"]
        assert (body["model"], body["temperature"], body["max_tokens"], len(body["messages"])) == ("gpt", 0, 77, 1)
        assert "seed" not in body
    assert 2 <= max(request["under_way"] for request in requests) <= 5
    # the server adds all numbers up: right for the additions
    task = summary["tasks"]["wordproblems"]
    assert task["strict"]["num_correct"] == sum(row.output.split(" = ")[0].count("+") for row in rows)
    assert 0 < task["strict"]["num_correct"] < 40
    assert task["num_truncated"] == task["finish"].get("length", 0)
    (session,) = summary["sessions"]
    assert (session["served_models"], session["num_retries"]) == (["gpt-0613"], 0)
    assert summary["folder"].startswith("runs/endpoint-gpt/eval/")
    assert summary["prompt"] == "{instruction}\n\nLet's think step by step."
    assert KEY not in written(workplace)
    # again: everything is on file, nothing is asked
    assert evaluate(url, "gpt", "--limit", "40", "--max-new-tokens", "77") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["tasks"], again["sessions"]) == (summary["tasks"], summary["sessions"])
    assert len(sent(log)) == 40


def test_runs_of_an_endpoint_can_be_compared(workplace, capsys):
    with server(workplace / "log") as url:
        for model in ("org/one:latest", "two"):
            assert evaluate(url, model, "--limit", "5") == 0
    capsys.readouterr()
    assert main(["compare", "runs/endpoint-org-one-latest", "runs/endpoint-two", "--format", "json"]) == 0
    assert [group["model"] for group in json.loads(capsys.readouterr().out)["groups"]] == ["org/one:latest", "two"]


def test_passing_faults_are_retried(workplace, capsys):
    with server(workplace / "log") as url:
        assert evaluate(url, "flaky", "--limit", "12") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["tasks"]["wordproblems"]["num_scored"] == 12
    assert summary["sessions"][0]["num_retries"] == 12
    assert len(sent(workplace / "log")) == 24


def test_samples_differ_by_their_seed(workplace, capsys):
    with server(workplace / "log") as url:
        options = ("--decoding", "sample", "--samples", "3", "--seed", "10", "--temperature", "0.5", "--top-p", "0.9")
        assert evaluate(url, "gpt", "--limit", "2", *options) == 0
    bodies = [request["body"] for request in sent(workplace / "log")]
    seeds = {body["seed"] for body in bodies}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert {(body["temperature"], body["top_p"]) for body in bodies} == {(0.5, 0.9)}
    assert json.loads(capsys.readouterr().out)["tasks"]["wordproblems"]["num_samples"] == 3
    with server(workplace / "log2") as url:
        assert evaluate(url, "gpt", "--limit", "2", *options[:4], "--seed", "11") == 0
    assert not seeds & {request["body"]["seed"] for request in sent(workplace / "log2")}


def test_a_server_that_wants_the_new_name_of_the_limit_gets_it(workplace, capsys):
    with server(workplace / "log") as url:
        assert evaluate(url, "modern", "--limit", "3", "--concurrency", "1", "--max-new-tokens", "9") == 0
    bodies = [request["body"] for request in sent(workplace / "log")]
    assert [body.get("max_completion_tokens") for body in bodies] == [None, 9, 9, 9]


def test_what_came_before_a_fault_is_kept(workplace, capsys, monkeypatch):
    monkeypatch.setattr(endpoint, "NUM_RETRIES", 1)
    with server(workplace / "log") as url:
        assert evaluate(url, "mortal", "--limit", "12", "--concurrency", "1") == 2
    error = capsys.readouterr().err
    assert "cannot be reached" in error
    assert "run the same command again to continue" in error
    on_file = next(workplace.glob("runs/*/eval/*/wordproblems.jsonl")).read_text().splitlines()
    assert [json.loads(line)["index"] for line in on_file] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("locked", "the key is refused"),
        ("unknown", "not found"),
        ("garbage", "model garbage: "),
        ("hollow", "the reply to item 0 is not a chat completion"),
        ("odd", "the reply to item 0 is not a chat completion"),
        ("silent", "no answer within 0.3 s, 2 times"),
        ("dripping", "no answer within 0.3 s, 2 times"),
        ("gzip", "the reply is compressed (gzip)"),
        ("endless", "the reply is longer than 16 MiB"),
        ("nested", "the reply to item 0 is nested too deeply"),
    ],
)
def test_lasting_faults_are_reported_and_never_show_the_key(workplace, capsys, monkeypatch, model, message):
    monkeypatch.setattr(endpoint, "NUM_RETRIES", 1)
    monkeypatch.setattr(endpoint, "TIMEOUT_SECONDS", 0.3)
    with server(workplace / "log") as url:
        assert evaluate(url, model, "--limit", "2", "--concurrency", "1") == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert KEY not in printed.err + printed.out + written(workplace)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--endpoint", "localhost:8000", "--model", "m"], "must be an address such as http"),
        (["--endpoint", "ftp://host", "--model", "m"], "must be an address such as http"),
        (["--endpoint", "http://host:99999", "--model", "m"], "must be an address such as http"),
        (["--endpoint", "http://me:secret@host/v1", "--model", "m"], "must not contain a user, password or query"),
        (["--endpoint", "http://host/v1?key=secret", "--model", "m"], "must not contain a user, password or query"),
        (["--endpoint", "http://host/v1"], "name the server's model with --model"),
        (["--endpoint", "http://host", "--model", "m", "--decoding", "beam4"], "no beam search"),
        (
            ["--endpoint", "http://host", "--model", "m", "--adapter", "x", "--dtype", "float32"],
            "--adapter, --dtype: cannot be used with --endpoint",
        ),
        (["--endpoint", "http://host", "--model", "m", "--clean"], "name the training set with --trained-on"),
        (["--model", "m", "--concurrency", "3"], "--concurrency: only with --endpoint URL"),
        (["--model", "m", "--samples", "3"], "--samples: only with --decoding sample"),
        (["--model", "m", "--trained-on", "math10k"], "add --clean"),
        (["--model", "m", "--template", "alpacca"], 'unknown template "alpacca"'),
    ],
)
def test_contradictions_are_refused(workplace, capsys, arguments, message):
    assert main(["evaluate", "wordproblems", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "secret" not in error
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".com", "x" * 300, "exa mple", "[::1", "\u2603" * 70, "999.1.1.1"])
def test_impossible_hosts_are_explained(workplace, capsys, monkeypatch, host):
    monkeypatch.setattr(endpoint, "NUM_RETRIES", 0)
    assert evaluate(f"http://{host}/v1", "m", "--limit", "1") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_replies_in_parts_and_broken_characters_are_kept(workplace, capsys):
    with server(workplace / "log") as url:
        for _ in range(2):  # the second time from the file
            assert evaluate(url, "parts", "--limit", "2") == 0
            assert json.loads(capsys.readouterr().out)["tasks"]["wordproblems"]["num_scored"] == 2
    (path,) = workplace.glob("runs/*/eval/*/wordproblems.jsonl")
    line = json.loads(path.read_text().splitlines()[0])
    assert (line["completion"], line["num_tokens"]) == ("The answer ? is 7.", 0)


@pytest.mark.parametrize("key", ["sk-first\nsk-second", "sk-\u201cquoted\u201d"])
def test_a_key_that_cannot_be_sent_is_refused_unshown(workplace, capsys, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert evaluate("http://127.0.0.1:9", "m", "--limit", "1") == 2
    error = capsys.readouterr().err
    assert "OPENAI_API_KEY: holds a line break or another character" in error
    assert "sk-" not in error


def test_without_a_key_none_is_sent(workplace, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    with server(workplace / "log") as url:
        assert main(["evaluate", "wordproblems", "--endpoint", url, "--model", "m", "--limit", "1"]) == 0
    assert "none (OPENAI_API_KEY is not set)" in capsys.readouterr().out
    assert sent(workplace / "log")[0]["key"] == "Bearer none"


def test_ctrl_c_leaves_no_request_behind(workplace):
    """The real command: it stops at once, and what arrived is on file."""
    import signal
    import time

    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    with server(workplace / "log") as url:
        command = [sys.executable, "-m", "qdense", "evaluate", "wordproblems", "--endpoint", url, "--model", "silent"]
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, cwd=workplace,
            # a suite that a shell runs in the background ignores the signal, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not (workplace / "log").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped" in error
    assert "Traceback" not in error
