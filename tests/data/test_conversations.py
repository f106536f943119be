"""Conversations: which files are recognised, what the model reads of them, and which tokens count in the loss."""

import copy
import hashlib
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from qdense.cli import main
from qdense.data.examples import encode_rows
from qdense.data.rows import Columns, Message, Row, read_rows
from qdense.data.sources import DataSet
from qdense.data.templates import CHAT_TEMPLATES, chat_template_for, prompt_ids, template_named
from qdense.errors import DataError
from qdense.events import Notice
from qdense.modeling.adapter_files import read_card
from qdense.ops.cross_entropy import IGNORED
from qdense.recipe import DataRecipe, recipe_from_tables
from qdense.training.run import train
from tests.helpers.models import make_tokenizer

OPENAI = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6."},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
    for turn in OPENAI
]
MESSAGES = tuple(Message(turn["role"], turn["content"]) for turn in OPENAI)
ROW = Row("What is 2 + 2?", "", "6.", messages=MESSAGES)


def written(folder, *records):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def chatting():
    """A byte tokenizer with ChatML's tokens and its template."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    return tokenizer


@pytest.mark.parametrize(
    ("record", "column"),
    [
        ({"messages": OPENAI}, "messages"),
        ({"conversations": SHAREGPT, "id": "7"}, "conversations"),
        (
            {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in OPENAI]},
            "messages",
        ),
    ],
)
def test_formats_are_recognised(tmp_path, record, column):
    read = read_rows(written(tmp_path, record))
    assert read.columns == Columns(messages=column)
    assert read.rows == [ROW]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, 'line 2: column "messages" must be a list of messages, not an empty one'),
        ({"messages": "hello"}, "must be a list of messages, not text"),
        ({"instruction": "a", "output": "b"}, 'line 2: no column "messages"'),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            "has no message from the assistant, so there is nothing to learn",
        ),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "has no message from the user"),
        ({"messages": ["hi"]}, "line 2, message 1: must be an object with role and content, not text"),
        ({"messages": [{"role": "usr", "content": "hi"}]}, 'message 1: role "usr" is not known; known: system, user'),
        ({"messages": [{"role": "tool", "content": "hi"}]}, 'role "tool" is not known'),
        ({"messages": [{"role": 3, "content": "hi"}]}, "is not known"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "is not known"),
        ({"messages": [{"role": "user", "content": None}]}, "content must be text, not null"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1: content is blank"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part that is not text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "has tool_calls"),
        ({"messages": [{"from": "narrator", "value": "x"}]}, 'from "narrator" is not known'),
    ],
)
def test_a_bad_row_is_named(tmp_path, record, message):
    file = written(tmp_path, {"messages": OPENAI}, record)
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert message in str(caught.value)
    skipped = read_rows(file, skip_bad=True)
    assert (len(skipped.rows), len(skipped.skipped)) == (1, 1)


CONTINUED = {"prompt": OPENAI[:4], "completion": OPENAI[4:]}


def test_prompt_and_completion_may_be_messages_of_which_the_completion_is_learnt(tmp_path, chatting):
    read = read_rows(written(tmp_path, CONTINUED, CONTINUED))
    assert read.columns == Columns(instruction="prompt", output="completion")
    assert read.rows[0] == ROW._replace(num_given=4)
    assert read.rows[0].kind == "conversation"
    encoded = encode_rows(read.rows, [0], chatting, DataRecipe(path="x", max_length=1000)).examples[0]
    whole = encode_rows([ROW], [0], chatting, DataRecipe(path="x", max_length=1000)).examples[0]
    assert list(encoded.input_ids) == list(whole.input_ids)
    assert counted(encoded, chatting) == ["6.<|im_end|>"]
    assert counted(whole, chatting) == ["4.<|im_end|>", "6.<|im_end|>"]
    # A run of such rows may not be resumed on rows of which all answers are learnt.
    assert DataSet(read.rows[:1], "x").checksum != DataSet([ROW], "x").checksum


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": OPENAI[:2], "completion": "4."}, 'column "completion" must be a list of messages, not text'),
        ({"prompt": "Hello", "completion": OPENAI[2:3]}, 'column "prompt" must be a list of messages, not text'),
        ({"prompt": OPENAI[:2], "completion": OPENAI[3:4]}, "has no message from the assistant"),
        (
            {"prompt": OPENAI[:2], "completion": [{"role": "usr", "content": "x"}]},
            'column "completion", message 1: role "usr"',
        ),
        ({"prompt": OPENAI[:2]}, 'no column "completion"'),
        ({**CONTINUED, "input": "more"}, 'column "input" cannot be added to the list of messages'),
        (
            {"prompt": "What is 2 + 2?", "completion": "4."},
            "is a prompt and its completion, and the rows before it are not",
        ),
    ],
)
def test_a_half_recognised_row_is_named(tmp_path, record, message):
    file = written(tmp_path, CONTINUED, record)
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert f"line 2: {message}" in str(caught.value) or f"line 2, {message}" in str(caught.value)


def test_whole_texts_are_learnt_as_they_are(tmp_path, chatting):
    chatting.add_bos_token = False
    read = read_rows(written(tmp_path, {"text": " One. "}, {"text": "Two."}))
    assert read.columns == Columns(text="text")
    assert [row.kind for row in read.rows] == ["text", "text"]
    data = DataRecipe(path="x", max_length=100)
    assert data.settled("text").template == "plain"
    first, second = encode_rows(read.rows, [0, 1], chatting, data).examples
    assert chatting.decode(first.input_ids) == " One. " + chatting.eos_token
    assert counted(second, chatting) == ["Two." + chatting.eos_token]
    with pytest.raises(DataError, match=r'data\.template = "alpaca": the rows are whole texts'):
        encode_rows(read.rows, [0], chatting, DataRecipe(path="x", template="alpaca"))
    with pytest.raises(DataError, match=r'column "text" is blank'):
        read_rows(written(tmp_path, {"text": "One."}, {"text": " "}))
    # What has other columns too is recognised by them, or not at all.
    assert read_rows(written(tmp_path, {"instruction": "a", "output": "b", "text": "a b"})).columns.text is None
    with pytest.raises(DataError, match="cannot tell which column"):
        read_rows(written(tmp_path, {"label": "a", "text": "a b"}))
    assert len(read_rows(written(tmp_path, {"label": "a", "text": "a b"}), Columns(text="text")).rows) == 1


def test_a_text_that_brings_its_bos_gets_no_second_one(chatting):
    tokenizer = copy.deepcopy(chatting)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    rows = [Row("<s>2 + 2 =", "", " 4"), Row("2 + 2 =", "", " 4"), Row("<s>" + "2" * 50, "", " 4")]
    data = DataRecipe(path="x", template="plain", max_length=20)
    encoded = encode_rows(rows, [0, 1, 2], tokenizer, data)
    brought, added = encoded.examples  # of the third row nothing of the answer is left
    assert list(brought.input_ids) == list(added.input_ids)
    assert list(brought.labels) == list(added.labels)
    assert tokenizer.decode(brought.input_ids) == "<s>2 + 2 = 4" + tokenizer.eos_token
    assert (encoded.num_without_answer, encoded.num_dropped) == (1, 1)
    plain = template_named("plain")
    assert prompt_ids(plain, rows[0], tokenizer) == prompt_ids(plain, rows[1], tokenizer)
    assert prompt_ids(plain, rows[1], tokenizer).count(tokenizer.bos_token_id) == 1


def test_plain_joins_prompt_and_completion(chatting):
    row = Row("2 + 2 =", "", " 4")
    example = encode_rows([row], [0], chatting, DataRecipe(path="x", template="plain", max_length=100)).examples[0]
    assert chatting.decode(example.input_ids) == "2 + 2 = 4" + chatting.eos_token
    assert counted(example, chatting) == [" 4" + chatting.eos_token]


def test_a_template_of_single_questions_refuses_a_conversation(chatting):
    with pytest.raises(DataError, match=r'data\.template = "alpaca" has single questions'):
        encode_rows([ROW], [0], chatting, DataRecipe(path="x", template="alpaca"))


def test_a_checksum_knows_all_turns_and_rows_without_turns_keep_theirs():
    other = ROW._replace(messages=(*MESSAGES[:2], Message("assistant", "5."), *MESSAGES[3:]))
    assert DataSet([ROW], "x").checksum != DataSet([other], "x").checksum
    # Runs from before conversations existed must be resumable.
    expected = hashlib.sha256(b'["Add 1 and 1.", "", "2", "2"]\n').hexdigest()
    assert DataSet([Row("Add 1 and 1.", "", "2", "2")], "x").checksum == expected


def counted(example, tokenizer):
    """The tokens that count in the loss, as texts of neighbours."""
    texts, run = [], []
    for token, label in zip([*example.input_ids, None], [*example.labels, IGNORED], strict=True):
        if label != IGNORED:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def encoded(tokenizer, rows=(ROW,), **settings):
    data = DataRecipe(path="x.jsonl", **({"template": "chat", "max_length": 4096} | settings))
    return encode_rows(list(rows), range(len(rows)), tokenizer, data)


def test_the_loss_is_on_the_answers_and_the_tokens_that_end_them(chatting):
    (example,) = encoded(chatting).examples
    assert chatting.decode(example.input_ids) == chatting.apply_chat_template(OPENAI, tokenize=False)
    assert list(example.input_ids) == list(
        chatting.apply_chat_template(OPENAI)["input_ids"]
    )  # no BOS twice, no second EOS
    assert counted(example, chatting) == ["4.<|im_end|>", "6.<|im_end|>"]
    (example,) = encoded(chatting, train_on="last").examples
    assert counted(example, chatting) == ["6.<|im_end|>"]
    (example,) = encoded(chatting, train_on="all").examples
    assert np.array_equal(example.labels, example.input_ids)


def test_a_long_conversation_is_cut_after_an_answer(chatting):
    whole = encoded(chatting).examples[0].input_ids
    first_answer = len(chatting.apply_chat_template(OPENAI[:3])["input_ids"]) - 1  # without the newline after it
    for max_length in (first_answer, first_answer + 5, len(whole) - 3):
        result = encoded(chatting, max_length=max_length)
        (example,) = result.examples
        assert len(example.input_ids) == first_answer
        assert counted(example, chatting) == ["4.<|im_end|>"]
        assert (result.num_truncated, result.num_without_answer) == (1, 0)
    with pytest.raises(DataError, match="no row has any of its response left"):
        encoded(chatting, max_length=20)


def test_what_is_evaluated_is_what_was_trained(chatting):
    """The prompt of a question is the beginning of its training text, token for token."""
    template = template_named("chat", chatting)
    row = Row("Add 1 and 1.", "Use digits.", "2")
    (example,) = encoded(chatting, [row]).examples
    prompt = prompt_ids(template, row._replace(output=""), chatting)
    assert list(example.input_ids[: len(prompt)]) == prompt
    assert counted(example, chatting) == ["2<|im_end|>"]
    assert template.end_token == "<|im_end|>"
    assert prompt_ids(template, ROW, chatting) == list(
        chatting.apply_chat_template(OPENAI[:4], add_generation_prompt=True)["input_ids"]
    )


def test_a_tokenizer_without_a_template_gets_one_by_its_tokens():
    plain = make_tokenizer()
    assert chat_template_for(plain) == "chatml"
    with pytest.raises(DataError, match=r'template "chat": the tokenizer has none\. Use one of chatml, llama3'):
        template_named("chat", plain)
    assert template_named("chatml", plain).end_token is None  # its marks are plain text here
    plain.add_special_tokens(
        {
            "additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            "bos_token": "<|bos|>",
        }
    )
    assert chat_template_for(plain) == "llama3"
    template = template_named("llama3", plain)
    assert template.end_token == "<|eot_id|>"
    text = "".join(piece.text for piece in template.pieces(ROW))
    assert text.startswith("<|bos|><|start_header_id|>system<|end_header_id|>\n\nYou are brief.<|eot_id|>")
    assert [piece.text for piece in template.pieces(ROW) if piece.is_response] == ["4.<|eot_id|>", "6.<|eot_id|>"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only users here') }}", "refuses a conversation of user, assistant: only users here"),
        ("{{ ''.__class__.__mro__ }}", "refuses a conversation"),
        ("{% for %}", "refuses a conversation"),
        # Like some templates, which drop the thoughts of earlier answers.
        (
            "{% for m in messages %}[{{ m.role }}]{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
            "rewrites earlier turns",
        ),
    ],
)
def test_a_strangers_template_is_refused_well(chatting, source, message):
    stranger = make_tokenizer()
    stranger.chat_template = source
    with pytest.raises(DataError, match=message):
        encoded(stranger)


def test_train_and_evaluate_conversations(tmp_path, tiny_model, monkeypatch):
    """From a file of messages to scores: nothing in the recipe names their form, and what was chosen is recorded and reused."""
    monkeypatch.chdir(tmp_path)
    talks = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(24)
    ]
    recipe = recipe_from_tables(
        {
            "model": {"name": str(tiny_model), "device": "cpu"},
            "data": {"path": str(written(tmp_path, *talks)), "validation_rows": 4, "max_length": 320},
            "training": {"max_steps": 2, "batch_size": 4, "recompute": "none", "seed": 1},
            "output": {"dir": "run"},
        },
        source="test",
    )
    events = []
    train(recipe, resume=False, data_dir=None, emit=events.append)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert "columns: conversations in messages; template chat, loss on all answers" in notices
    assert any('has no chat template: conversations are written as "chatml"' in text for text in notices)
    assert any("ends an answer with no special token" in text for text in notices)  # the byte tokenizer has none
    recorded = tomllib.loads((tmp_path / "run/recipe.toml").read_text())["data"]
    assert (recorded["template"], recorded["train_on"], recorded["columns"]["messages"]) == (
        "chatml",
        "response",
        "messages",
    )
    assert read_card(tmp_path / "run/adapter").template == "chatml"
    assert main(["evaluate", "rows.jsonl,wordproblems", "--adapter", "run", "--decoding", "greedy", "--limit", "2",
                 "--max-new-tokens", "4", "--quiet"]) == 0  # fmt: skip
    (summary,) = Path("run/eval").glob("*/summary.json")
    assert json.loads(summary.read_text())["template"] == "chatml"
    # A resumed run keeps what it began with.
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 3})})
    (tmp_path / "run/adapter/qdense.json").unlink()
    train(longer, resume=True, data_dir=None, emit=events.append, accept_changes=True)
    assert tomllib.loads((tmp_path / "run/recipe.toml").read_text())["data"] == recorded


def test_a_real_chat_model_reads_its_own_form(smollm2):
    """SmolLM2's own tokenizer and template: its system prompt, its tokens, its end of turn."""
    tokenizer = smollm2().tokenizer
    (example,) = encoded(tokenizer, [ROW, ROW._replace(messages=MESSAGES[1:])][1:]).examples
    assert tokenizer.decode(example.input_ids).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    assert counted(example, tokenizer) == ["4.<|im_end|>", "6.<|im_end|>"]
    assert template_named("chat", tokenizer).end_token == tokenizer.eos_token == "<|im_end|>"


# --- qdense data show -----------------------------------------------------------------------------------------------------


@pytest.fixture
def talks(tmp_path, tiny_model, monkeypatch):
    """A recipe of conversations of two lengths, for the byte tokenizer."""
    monkeypatch.chdir(tmp_path)
    records = [
        {
            "messages": [
                {"role": "user", "content": "?" * (5 + 100 * (i % 3 == 0))},
                {"role": "assistant", "content": f"[{i}]"},
            ]
        }
        for i in range(30)
    ]
    written(tmp_path, *records)
    Path("talks.toml").write_text(
        f'[model]\nname = "{tiny_model}"\n[data]\npath = "rows.jsonl"\nvalidation_rows = 3\nmax_length = 120\n'
    )
    return "talks.toml"


def test_rows_are_shown_as_the_model_reads_them(talks, capsys):
    assert main(["data", "show", talks, "--json", "-n", "27"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["template"], shown["train_on"], shown["columns"]) == ("chatml", "response", "messages")
    assert (shown["num_training"], shown["num_validation"], shown["num_measured"]) == (27, 3, 27)
    long_rows = [row for row in shown["rows"] if row["number"] % 3 == 0]
    assert shown["num_cut"] == 27 - len([row for row in shown["rows"] if not row["is_cut"] and row["number"] % 3])
    assert long_rows == []  # their answers are cut off, so they are dropped
    assert shown["num_cut"] == shown["num_dropped"] == shown["num_without_answer"]
    row = shown["rows"][0]
    assert "".join(span["text"] for span in row["spans"]).endswith(
        f"<|im_start|>assistant\n[{row['number']}]<|im_end|>\n"
    )
    assert [span["text"] for span in row["spans"] if span["counts"]] == [f"[{row['number']}]<|im_end|>"]
    assert row["num_counted"] == len(f"[{row['number']}]<|im_end|>")  # a token is a byte
    assert sum(count for _, _, count in shown["bins"]) == 27
    assert shown["bins"][0][0] > 1
    assert shown["num_ended"] == 0
    assert [text for text in shown["warnings"] if "do not teach the model to end its answer" in text]
    assert [text for text in shown["warnings"] if f"Raise it to {shown['longest_tokens']}" in text]


def test_what_a_person_sees(talks, capsys):
    assert main(["data", "show", talks, "-n", "1", "--set", "data.max_length=400"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "<|im_start|>user",
        "counts in the loss",
        "27 to train on, 3 for validation",
        "template",
        "chatml",
        "█",
    ):
        assert text in printed
    assert "longer than data.max_length" not in printed


def test_mistakes_of_data_show(talks, capsys):
    for arguments, message in (
        (["data", "show", "nothing.toml"], "nothing.toml: no such file"),
        (["data", "show", talks, "--set", "data.path=none.jsonl"], '"none.jsonl": no such file'),
        (["data", "show", talks, "--set", "data.max_length=8"], "no row has any of its response left"),
        (["data", "show", talks, "--set", "model.name=./nowhere"], "no such folder"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
