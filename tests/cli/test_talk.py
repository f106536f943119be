"""`qdense generate`, `chat` and `serve`, as a user types them."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import openai
import pytest
import torch

from qdense.cli import main
from tests.helpers.adapters import make_run


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_run(tiny_model, folder / "plain", seed=0)
    make_run(tiny_model, folder / "talk", seed=1, template="chatml")
    make_run(tiny_model, folder / "lora", seed=2, method="lora")
    make_run(tiny_model, folder / "bf16", seed=2, dtype="bfloat16")
    return folder


def test_generate_prints_answers_in_the_order_of_the_prompts(runs, capsys, monkeypatch):
    run = str(runs / "plain")
    assert main(["generate", run, "one", "two", "--max-new-tokens", "8"]) == 0
    alone = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert main(["generate", run, "-", "--json", "--max-new-tokens", "8", "--batch-size", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two"]
    assert "".join(line["completion"] + "\n" for line in lines) == alone
    assert all(line["finish"] in ("eos", "stop", "length") and line["num_tokens"] <= 8 for line in lines)
    assert main(["generate", run, "one", "two", "--max-new-tokens", "8", "--base"]) == 0
    assert capsys.readouterr().out != alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "x"], "nowhere: no such run or adapter"),
        (["generate", "{plain}", "x", "--system", "s"], 'the template "alpaca" has single questions'),
        (["generate", "{plain}", "x", "--template", "nope"], 'unknown template "nope"'),
        (["chat", "{plain}", "--system", "s"], "--system: {plain} was trained on single questions"),
        (["serve", "{plain}", "--no-key", "--host", "0.0.0.0"], "--no-key: everyone who reaches 0.0.0.0 could use this"),
        (["serve", "{plain}", "{plain}"], 'two runs would be called "plain"'),
        (["serve", "{plain}", "{lora}"], "Adapters on one base must be of one type"),
        (["serve", "{plain}", "{bf16}"], "model.dtype = 'bfloat16', but 'float32' for"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(runs, capsys, arguments, message):
    names = {name: str(runs / name) for name in ("plain", "lora", "bf16")}
    assert main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.format(**names) in error


def test_chat_answers_commands_and_remembers_the_conversation(runs, capsys, monkeypatch):
    def chat(lines, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        assert main(["chat", str(runs / "talk"), "--max-new-tokens", "8", *options]) == 0
        return capsys.readouterr().out.split("\n")[1:]

    once = chat(["hello"])
    again = chat(["hello", "hello"])
    assert again[0] == once[0]
    assert again[1] != once[0]  # it reads the first turn
    assert chat(["hello", "/reset", "hello"])[:3] == [once[0], "The conversation begins anew.", once[0]]
    system = chat(["/system be brief", "hello", "/exit", "never asked"])
    assert system == [
        "The system prompt is set; the conversation begins anew.",
        *chat(["hello"], "--system", "be brief"),
    ]
    compared = "\n".join(chat(["/compare", "hello", "/nonsense"]))
    assert "The base answers too." in compared
    assert re.search("base .* adapter", compared)
    assert "no command /nonsense" in compared
    long = chat(["x" * 3000])
    assert "together at most 2,048 are allowed. /reset begins anew." in long[0]


def test_chat_in_a_terminal_draws_nothing_that_a_model_wrote_as_a_command(runs, monkeypatch, capsys):
    written = iter(b"\x1b[2Jx")

    def choose(search, logits):
        base = search.sequences[0].endings.tokenizer
        return torch.tensor(base(chr(next(written)))["input_ids"])

    monkeypatch.setattr("qdense.inference.generation.Tokens._choose", choose)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main(["chat", str(runs / "talk"), "--max-new-tokens", "5"]) == 0
    assert "\\x1b[2Jx" in capsys.readouterr().out


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(runs):
    """In a real terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command = [sys.executable, "-m", "qdense", "chat", str(runs / "talk"), "--max-new-tokens", "1900"]
        os.execv(sys.executable, [*command, "--temperature", "2"])
    shown = b""

    def until(wanted, seconds=120):
        nonlocal shown
        end = time.monotonic() + seconds
        while wanted not in shown:
            assert time.monotonic() < end, shown[-500:]
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096)

    until(b"> ")
    shown = b""
    os.write(terminal, b"hello\n")
    until(b"hello\r\n")
    time.sleep(0.1)
    os.write(terminal, b"\x03")  # while it answers; if it has ended already, at the prompt
    os.write(terminal, b"/help\n")
    until(b"/system TEXT")
    os.write(terminal, b"/exit\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def test_serve_serves_until_it_is_told_to_stop_and_finishes_answers(runs, tmp_path):
    port = 8000 + os.getpid() % 20_000
    command = [sys.executable, "-m", "qdense", "serve", str(runs / "plain"), f"second={runs / 'talk'}"]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "QDENSE_API_KEY"},
    )
    try:
        announced = process.stdout.readline()
        assert "plain, second at http://127.0.0.1" in announced
        key = process.stdout.readline().split()[-1]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
        assert [model.id for model in client.models.list()][1:] == ["plain", "second"]
        busy = subprocess.run([*command, "--port", str(port)], capture_output=True, text=True, check=False, timeout=120)
        assert busy.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port}" in busy.stderr
        stream = client.completions.create(
            model="second", prompt="x", max_tokens=300, temperature=2, seed=1, stream=True
        )
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason
        assert process.wait(timeout=60) == 0
        assert process.stderr.read().endswith("stopped\n")
    finally:
        process.kill()
        process.wait()
