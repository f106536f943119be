"""Rows, templates, splits, tokens: real files, and every fault with its place."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qdense.catalogs.datasets import TRAINING_SETS
from qdense.data import wordproblems
from qdense.data.examples import Example, collate, encode_rows, split_rows
from qdense.data.rows import Columns, Row, detect_columns, read_rows
from qdense.data.sources import DataSet, load_named_or_file, load_training_set
from qdense.data.templates import TEMPLATES
from qdense.errors import DataError
from qdense.ops.cross_entropy import IGNORED
from qdense.recipe import DataRecipe
from tests.helpers.models import make_tokenizer

ROW = {"instruction": "How many?", "input": "", "output": "Seven.", "answer": "7"}


# --- rows -------------------------------------------------------------------------------------------------------------------


def test_all_formats_read_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [ROW, ROW | {"instruction": 'Grüße, "quoted"\nand more', "input": "x,y"}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\r\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        import csv

        writer = csv.DictWriter(stream, list(ROW))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [Row(row["instruction"], row["input"], row["output"]) for row in rows]
    for name in ("a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"):
        assert read_rows(tmp_path / name).rows == expected, name
    assert DataSet(expected, "here").checksum == DataSet(list(expected), "there").checksum
    assert DataSet(expected, "x").checksum != DataSet(expected[::-1], "x").checksum


def test_columns_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "Q?", "reply": "A."}\n')
    assert read_rows(tmp_path / "a.jsonl", Columns("question", "context", "reply")).rows == [Row("Q?", "", "A.")]


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["instruction", "input", "output", "answer"], Columns()),
        (["prompt", "completion"], Columns("prompt", "input", "completion")),
        (["question", "answer"], Columns("question", "input", "answer")),
        (["instruction", "context", "response", "category"], Columns("instruction", "context", "response")),
        (["input", "output"], Columns("input", "input", "output")),
        (["prompt", "completion", "answer"], None),
        (["prompt", "question", "answer"], None),
        (["text"], Columns(text="text")),
        (["words"], None),
    ],
)
def test_columns_are_recognised_by_their_names(tmp_path, names, columns):
    assert detect_columns(names) == columns
    (tmp_path / "a.jsonl").write_text(json.dumps({name: f"the {name}" for name in names}))
    if columns is None:
        with pytest.raises(DataError, match=f"Its columns: {', '.join(names)}\\. Rename them"):
            read_rows(tmp_path / "a.jsonl")
        return
    read = read_rows(tmp_path / "a.jsonl")
    assert (read.columns, read.skipped) == (columns, [])
    expected = ("", "the text") if columns.text else (f"the {columns.instruction}", f"the {columns.output}")
    assert (read.rows[0].instruction, read.rows[0].output) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[\n{"prompt": "a", "completion": "b"}]',
            r"begins with \[, so it seems to be a list of rows: name it \.json$",
        ),
        ('[{"prompt": "a", "completion": "b"}]', r"is a list of rows in one line: name it \.json$"),
        ("prompt,completion\na,b", r"line 1: has commas and no object, so it seems to be a table: name it \.csv$"),
    ],
)
def test_a_file_of_another_format_is_told_its_name(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "a.jsonl", skip_bad=True)


def test_a_lone_input_is_the_instruction_and_not_both(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input": "2 + 2 =", "output": "4"}')
    assert read_rows(tmp_path / "a.jsonl").rows == [Row("2 + 2 =", "", "4")]


def test_of_files_with_one_stem_the_one_with_the_asked_ending_is_offered(tmp_path):
    for name in ("units.jsonl", "units.csv", "units.json"):
        (tmp_path / name).write_text("")
    for name in ("unit.jsonl", "unit.csv", "unit.json"):
        with pytest.raises(DataError, match=rf'did you mean ".*/units{Path(name).suffix}"\?'):
            read_rows(tmp_path / name)


def test_a_number_too_large_for_a_float_is_read_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "How many?", "completion": 1' + 400 * "0" + "}")
    assert read_rows(tmp_path / "a.jsonl").rows == [Row("How many?", "", "1" + 400 * "0")]


def test_numbers_are_read_as_text(tmp_path):
    row = {"instruction": 6, "input": 0.5, "output": 42, "answer": 10**20}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read_rows(tmp_path / "a.json", gold="answer").rows == [Row("6", "0.5", "42", "1" + 20 * "0")]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_named_column_that_no_row_has_is_no_fault_of_the_rows(tmp_path, skip_bad):
    (tmp_path / "a.jsonl").write_text('{"date": "1 May", "day": "Monday"}\n' * 2)
    message = r'no row has a column "datum"; the columns are: date, day; did you mean "date"\?'
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / "a.jsonl", Columns("datum", "input", "day"), skip_bad=skip_bad)
    assert type(caught.value) is DataError  # not a RowError, which bad_rows = "skip" would skip
    (tmp_path / "b.jsonl").write_text('{"date": "1 May"}\n{"date": "2 May", "day": "Monday"}\n')
    with pytest.raises(DataError, match=r'b\.jsonl, line 1: no column "day"'):
        read_rows(tmp_path / "b.jsonl", Columns("date", "input", "day"))


def test_a_folder_or_a_misspelt_file_of_rows(tmp_path):
    (tmp_path / "my-rows.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(DataError, match="is a folder; name a file"):
        read_rows(tmp_path)
    for name in ("my-rowz.jsonl", "my-rows.json"):
        with pytest.raises(DataError, match=r'no such file; did you mean ".*/my-rows\.jsonl"\?'):
            read_rows(tmp_path / name)
    with pytest.raises(DataError, match=r"no such file$"):
        read_rows(tmp_path / "other.jsonl")


def test_bad_rows_are_skipped_and_each_is_reported(tmp_path):
    lines = [
        json.dumps(ROW),
        "{oops}",
        json.dumps(ROW | {"output": " "}),
        "[1]",
        json.dumps(ROW | {"input": [3]}),
        json.dumps(ROW),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    read = read_rows(tmp_path / "a.jsonl", skip_bad=True)
    assert len(read.rows) == 2
    assert [fault.partition(", line ")[2][0] for fault in read.skipped] == ["2", "3", "4", "5"]
    assert 'column "output" is blank' in read.skipped[1]
    (tmp_path / "b.csv").write_text("prompt,completion\na,b,c\nd,e\n,f\n")
    read = read_rows(tmp_path / "b.csv", skip_bad=True)
    assert read.rows == [Row("d", "", "e")]
    assert len(read.skipped) == 2
    (tmp_path / "c.jsonl").write_text(json.dumps(ROW | {"output": ""}))
    with pytest.raises(DataError, match=r"c\.jsonl: its only row cannot be used: .*line 1: .* blank"):
        read_rows(tmp_path / "c.jsonl", skip_bad=True)


def test_a_bad_row_stops_a_training_set_and_says_how_to_skip_it(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"output": ""}))
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 2: .* blank\. To train without such rows, add --set data\.bad_rows=skip"
    ):
        load_training_set(DataRecipe(path=str(tmp_path / "a.jsonl")), None)
    loaded = load_training_set(DataRecipe(path=str(tmp_path / "a.jsonl"), bad_rows="skip"), None)
    assert (len(loaded.rows), len(loaded.skipped)) == (1, 1)
    asked = load_named_or_file(str(tmp_path / "a.jsonl"), None)  # for `qdense data check`: an output is not needed
    assert (len(asked.rows), len(asked.skipped)) == (2, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{]", "line 1, column 3: not valid JSON"),
        ("a.json", "{}", "must hold a list of rows, not an object"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", json.dumps([ROW, 3]), "row 1: must be an object with named columns, not a number"),
        (
            "a.json",
            json.dumps([{"instruct": "x", "output": "y"}]),
            "row 0: cannot tell which column holds the instruction and which the output. Its columns: instruct, output.",
        ),
        ("a.json", json.dumps([ROW | {"output": True}]), 'row 0: column "output" must be text, not true or false'),
        ("a.json", json.dumps([ROW | {"output": float("nan")}]), "must be text, not a number (nan)"),
        ("a.json", f"{json.dumps(ROW)}\n{json.dumps(ROW)}", "Extra data. One object per line? Then name it .jsonl"),
        ("a.txt", json.dumps(ROW), "If it has one JSON object a line, name it .jsonl"),
        ("a.csv", "prompt;completion\na;b\n", 'separated by ";": save it with commas'),
        ("a.csv", "prompt\tcompletion\na\tb\n", "separated by tabs: save it with commas"),
        ("a.json", json.dumps([ROW | {"output": None}]), 'row 0: column "output" is empty'),
        ("a.json", json.dumps([ROW, ROW | {"output": " "}]), 'row 1: column "output" is blank'),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", json.dumps(ROW) + "\n\n{oops}\n", "line 3, column 2: not valid JSON"),
        ("a.jsonl", json.dumps(ROW) + '\n["x"]\n', "line 2: must be an object"),
        ("a.csv", "instruction,output\na,b,c\n", "line 2: more fields than the header"),
        ("a.csv", 'instruction,output\n"a,b\n', "not valid CSV"),
        ("a.csv", "instruction,output\na\n", 'line 2: column "output" is empty'),
        ("a.parquet", "PAR1", "not a readable Parquet file"),
        ("a.json.gz", "not gzip", "cannot be read"),
        (
            "a.jsonl",
            '{"instruction": "a\\ud800", "output": "b"}',
            'line 1: column "instruction" holds half a surrogate pair',
        ),
        ("a.txt", "x", "unknown data format"),
    ],
)
def test_faults_are_named_with_their_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    assert name in str(caught.value)
    assert message in str(caught.value)


def test_a_damaged_gzip_body_is_named(tmp_path):
    content = bytearray(gzip.compress(json.dumps([ROW] * 50).encode()))
    content[20:30] = b"\xff" * 10
    (tmp_path / "a.json.gz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "a.json.gz")


def test_devices_and_folders_are_not_read(tmp_path):
    (tmp_path / "a.json").symlink_to("/dev/zero")
    (tmp_path / "b.csv").mkdir()
    for name in ("a.json", "b.csv"):
        with pytest.raises(DataError, match="is a folder or a device"):
            read_rows(tmp_path / name)


def test_text_that_is_not_utf8_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n{"instruction": "\xff"}')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_rows(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "none.json")


def test_real_files_read(shared_data):
    rows = read_rows(shared_data / "ft-training_set" / "math_10k_genuine_1824.json").rows
    assert len(rows) == 1824
    assert rows[0].instruction.endswith("\n ")
    assert len(read_rows(shared_data / "dataset" / "AQuA" / "test.json", gold="answer").rows) == 254
    assert len(read_rows(shared_data / "ft-training_set" / "commonsense_SUBSTITUTE_148k.jsonl.gz").rows) == 147_744


def test_a_known_name_that_is_nowhere_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qdense.data.sources.UPSTREAM_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("qdense.data.download.time.sleep", lambda seconds: None)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError) as caught:
        load_training_set(DataRecipe(name="math10k"), tmp_path / "data")
    for part in ("math_10k.json", f"not in {tmp_path / 'data'}", "not in the cache", "--data-dir"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="no such data folder"):
        load_training_set(DataRecipe(name="math10k"), tmp_path / "nowhere")


def test_a_data_folder_comes_first(tmp_path):
    path = tmp_path / TRAINING_SETS["math10k"].path
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([ROW]))
    loaded = load_training_set(DataRecipe(name="math10k"), tmp_path)
    assert (loaded.rows, loaded.origin) == ([Row("How many?", "", "Seven.")], str(path))


def test_a_hub_data_set_comes_through_datasets(tmp_path, monkeypatch):
    """`datasets` itself, on a repository on disk with a name like the hub's."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(json.dumps({"question": "Q?", "reply": "A."}) + "\n")
    columns = {"instruction": "question", "output": "reply"}
    loaded = load_training_set(DataRecipe(name="owner/set", columns=columns), None)
    assert (loaded.rows, loaded.origin) == ([Row("Q?", "", "A.")], "hub: owner/set (train)")
    with pytest.raises(DataError, match=r"row 0: cannot tell which column .* Its columns: question, reply\."):
        load_training_set(DataRecipe(name="owner/set"), None)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_training_set(DataRecipe(name="owner/set", split="nope"), None)


# --- the generator ----------------------------------------------------------------------------------------------------------


def test_word_problems_are_true_and_test_is_disjoint_from_training():
    import re

    training, test = wordproblems.training_rows(), wordproblems.test_rows()
    assert (len(training), len(test)) == (1200, 200)
    assert training == wordproblems.training_rows()
    pairs, skeletons = {}, {}
    for name, rows in (("training", training), ("test", test)):
        assert len({row.instruction for row in rows}) == len(rows)
        for row in rows:
            numbers = [int(n) for n in re.findall(r"\d+", row.instruction)]
            a, operation, b, result = re.match(r"(\d+) ([-+]) (\d+) = (\d+)\n", row.output).groups()
            assert sorted(numbers) == sorted((int(a), int(b)))
            assert int(result) == (int(a) + int(b) if operation == "+" else int(a) - int(b)) == int(row.answer)
            assert int(result) >= 0
            pairs.setdefault(name, set()).add(tuple(sorted(numbers)))
            skeleton = re.sub(r"\d+", "#", row.instruction)
            for word in (*wordproblems.NAMES, *wordproblems.THINGS):
                skeleton = re.sub(rf"\b{word}\b", "@", skeleton)
            skeletons.setdefault(name, set()).add(skeleton)
    assert not pairs["training"] & pairs["test"]
    assert not skeletons["training"] & skeletons["test"]


# --- templates --------------------------------------------------------------------------------------------------------------

_I = " " * 16
_HEAD = "Below is an instruction that describes a task"
_HEAD_IN = f"{_HEAD}, paired with an input that provides further context"
_WRITE = "Write a response that appropriately completes the request."


def test_llm_adapters_template_to_the_byte():
    template, row, full = TEMPLATES["llm-adapters"], Row("Add 1. \n ", "", "It is 2."), Row("Add.", "1 1", "2")
    assert template.training_prompt(row) == (
        f"{_HEAD}. {_WRITE}  \n\n{_I}### Instruction:\n{_I}Add 1. \n \n{_I}\n{_I}### Response:\n{_I}"
    )
    assert template.evaluation_prompt(row) == (
        f"{_HEAD}. {_WRITE} \n\n{_I}### Instruction:\n{_I}Add 1. \n \n\n{_I}### Response:\n{_I}"
    )
    assert template.training_prompt(full) == (
        f"{_HEAD_IN}. {_WRITE} \n\n{_I}### Instruction:\n{_I}Add.\n{_I}\n{_I}### Input:\n{_I}1 1\n{_I}\n{_I}### Response:\n{_I}"
    )
    assert template.evaluation_prompt(full) == (
        f"{_HEAD_IN}. {_WRITE}\n\n{_I}### Instruction:\n{_I}Add.\n\n{_I}### Input:\n{_I}1 1\n\n{_I}### Response:\n{_I}"
    )
    assert template.response(row) == "It is 2."


def test_alpaca_template_is_the_same_in_training_and_evaluation():
    template, row = TEMPLATES["alpaca"], Row(" Add 1. \n ", "", "\nIt is 2. ")
    expected = f"{_HEAD}. {_WRITE}\n\n### Instruction:\nAdd 1.\n\n### Response:\n"
    assert template.training_prompt(row) == template.evaluation_prompt(row) == expected
    assert template.response(row) == "It is 2."
    with_input = f"{_HEAD_IN}. {_WRITE}\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"
    assert template.training_prompt(Row("Add.", "1 1", "2")) == with_input


# --- splits -----------------------------------------------------------------------------------------------------------------


def test_fractions_are_nested_and_validation_is_always_the_same():
    splits = {f: split_rows(1000, validation_rows=120, fraction=f, seed=42) for f in (0.1, 0.2, 0.4, 1.0)}
    assert [len(split.training) for split in splits.values()] == [88, 176, 352, 880]
    assert set(splits[0.1].training) < set(splits[0.2].training) < set(splits[0.4].training) < set(splits[1.0].training)
    assert len({tuple(split.validation) for split in splits.values()}) == 1
    assert not set(splits[1.0].training) & set(splits[1.0].validation)
    assert set(splits[1.0].training) | set(splits[1.0].validation) == set(range(1000))
    other = split_rows(1000, validation_rows=120, fraction=0.1, seed=43)
    assert len(set(other.training) & set(splits[0.1].training)) < 40


def test_the_subset_does_not_depend_on_versions():
    assert split_rows(20, validation_rows=3, fraction=0.3, seed=42) == ([0, 4, 6, 14, 17], [1, 11, 13])


def test_too_few_rows_say_so():
    with pytest.raises(DataError, match=r"validation_rows = 120: the data set has 120 rows"):
        split_rows(120, validation_rows=120, fraction=1.0, seed=0)
    with pytest.raises(
        DataError, match=r"fraction = 0.001: less than one of 100 rows. The smallest fraction here is 0.01"
    ):
        split_rows(100, validation_rows=0, fraction=0.001, seed=0)


# --- tokens -----------------------------------------------------------------------------------------------------------------


def encoded(rows, tokenizer=None, **settings):
    settings = {"template": "alpaca", "max_length": 512, "train_on": "all"} | settings
    return encode_rows(rows, range(len(rows)), tokenizer or make_tokenizer(), DataRecipe(path="rows.json", **settings))


def test_whole_rows_end_in_eos_and_count_in_full():
    row = Row("Add 1 and 1.", "", "It is 2.")
    result = encoded([row])
    text = TEMPLATES["alpaca"].training_prompt(row) + "It is 2."
    ids = result.examples[0].input_ids
    assert make_tokenizer().decode(ids[:-1]) == text
    assert ids[-1] == 256
    assert np.array_equal(result.examples[0].labels, ids)
    assert (result.num_truncated, result.num_without_answer, result.num_dropped) == (0, 0, 0)


def test_a_tokenizer_that_appends_eos_itself_gives_one():
    from tokenizers.processors import TemplateProcessing

    own = make_tokenizer()
    own.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 256)])
    assert own("a")["input_ids"][-1] == 256
    row = Row("Add 1 and 1.", "", "It is 2.")
    for train_on in ("all", "response"):
        (found,), (expected,) = (encoded([row], t, train_on=train_on).examples for t in (own, None))
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        assert found.labels.tolist() == expected.labels.tolist()


def test_loss_on_the_response_leaves_the_prompt_out_to_the_token():
    row = Row("Add 1 and 1.", "", "It is 2.")
    example = encoded([row], train_on="response").examples[0]
    prompt_length = len(TEMPLATES["alpaca"].training_prompt(row))  # a token is a byte here
    assert (example.labels[:prompt_length] == IGNORED).all()
    assert make_tokenizer().decode(example.labels[prompt_length:-1]) == "It is 2."
    assert example.labels[-1] == 256


def test_truncation_cuts_on_the_right_without_eos_and_is_counted():
    row = Row("Add 1 and 1.", "", "It is 2.")
    length = len(TEMPLATES["alpaca"].training_prompt(row))
    cut = encoded([row, Row("Hi", "", "Yo")], max_length=length + 3)
    assert len(cut.examples[0].input_ids) == length + 3
    assert cut.examples[0].input_ids[-1] != 256
    assert (cut.num_truncated, cut.num_without_answer) == (1, 0)
    gone = encoded([row, Row("Hi", "", "Yo")], max_length=length)
    assert (gone.num_truncated, gone.num_without_answer, gone.num_dropped) == (1, 1, 0)
    dropped = encoded([row, Row("Hi", "", "Yo")], max_length=length, train_on="response")
    assert (dropped.num_dropped, [example.row for example in dropped.examples]) == (1, [1])
    with pytest.raises(DataError, match="raise it"):
        encoded([row], max_length=length, train_on="response")
    full = encoded([row], max_length=length + len("It is 2."))  # fits exactly: no room for EOS, nothing lost
    assert (len(full.examples[0].input_ids), full.num_truncated) == (length + 8, 0)


def test_padding_is_masked_by_position_so_that_eos_counts():
    batch = collate(
        [Example(4, np.array([5, 6, 2]), np.array([IGNORED, 6, 2])), Example(9, np.array([7]), np.array([7]))],
        pad_token_id=2,
    )
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 2], [7, 2, 2]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 6, 2], [7, -100, -100]]))
    assert (batch["rows"], batch["num_tokens"]) == ([4, 9], 4)
