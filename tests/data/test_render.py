"""Chat templates of strangers: the text is Transformers' own, and none can keep qdense busy or fill the memory."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qdense.data import render as module
from qdense.data.render import RenderError, render
from tests.helpers.models import make_tokenizer

TURNS = [{"role": "user", "content": "hé </s> {{ 1 + 1 }}"}, {"role": "assistant", "content": "line\nline"}]
TEMPLATE = (
    "{{ eos_token }}{% for m in messages %}{{ loop.index }} {{ m.role | upper }}: {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}> {% endif %}"
)


@pytest.mark.parametrize("is_open", [True, False])
def test_the_text_is_that_of_the_tokenizers_own_method(is_open):
    tokenizer = make_tokenizer()
    expected = tokenizer.apply_chat_template(
        TURNS, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=is_open
    )
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    assert render(TEMPLATE, TURNS, special, is_open=is_open) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it takes longer than 1 s"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 10**11 }}", "it needs more than 2 GiB"),
        ("{{ 'a' * (2**24 + 1) }}", "it writes 16,777,217 characters"),
        ("{{ raise_exception('only two turns,\nplease') }}", "only two turns,"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for", "unexpected"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_hostile_template_is_refused_with_the_reason_and_the_next_is_rendered(monkeypatch, template, reason):
    monkeypatch.setattr(module, "_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(RenderError, match=reason):
        render(template, TURNS, {}, is_open=False)
    assert time.monotonic() - started < 60
    monkeypatch.setattr(module, "_SECONDS", 60.0)
    assert render("{{ messages | length }}", TURNS, {}, is_open=False) == "2"


def test_the_process_ends_with_its_parent():
    script = (
        "from qdense.data.render import _worker, render\n"
        "render('x', [], {}, is_open=False)\n"
        "print(_worker._process.pid, flush=True)\n"
        "import os; os._exit(1)"
    )
    pid = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout)
    for _ in range(200):
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            return
        if status.rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the process is still there")
