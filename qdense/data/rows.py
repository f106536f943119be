"""Rows of training and test data, read from any file a user may have. Every fault is named with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qdense.catalogs.choices import RowKind
from qdense.errors import DataError, closest, did_you_mean, listed, near_file, shortened

# How much text a compressed file may hold. A few kilobytes can unpack to gigabytes, and a byte of "{}" takes 24 in memory.
_ALWAYS_UNPACKED = 16 * 2**20  # bytes
_MOST_TIMES = {".gz": 30, ".parquet": 100}  # its own size; text written by people shrinks to a tenth
FORMATS = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")


class Message(NamedTuple):
    """One turn of a conversation. `role` is system, user or assistant."""

    role: str
    content: str


class Row(NamedTuple):
    """One example. `answer` is the gold answer of a test row; training rows need none.

    Of a conversation, `messages` has all turns, of which the first `num_given` are not learnt; `instruction` is its first
    question and `output` the last answer. A whole text is an `output` without an instruction.
    """

    instruction: str
    input: str
    output: str
    answer: str = ""
    messages: tuple[Message, ...] = ()
    num_given: int = 0

    @property
    def kind(self) -> RowKind:
        return "conversation" if self.messages else "pair" if self.instruction else "text"


class Columns(NamedTuple):
    """Which column of a file holds what. With `messages` (each row is a conversation) or `text` (each is a whole text), the
    others are not read. Instruction and output may also be lists of messages: a conversation so far, and how it goes on."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    messages: str | None = None
    text: str | None = None


STANDARD_COLUMNS = Columns()
_NAME_THEM = (
    'Rename them, or name them in the recipe, under [data]: columns = { instruction = "prompt", output = "completion" }; '
    '`qdense init` takes --columns instruction=prompt,output=completion. A column of whole texts is text = "..."'
)

# Names by which columns are recognised if a recipe names none. `input` is the instruction only if there is no other.
_INSTRUCTION_NAMES = ("instruction", "prompt", "question", "query", "problem")
_INPUT_NAMES = ("input", "context")
_CONVERSATION_NAMES = ("messages", "conversations", "conversation")
_TEXT_NAME = "text"
# The roles of OpenAI's messages, and those of ShareGPT's conversations.
_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
_OUTPUT_NAMES = ("output", "completion", "response", "answer", "solution")


_A_KIND: dict[RowKind, str] = {
    "pair": "a prompt and its completion",
    "conversation": "a conversation",
    "text": "a whole text",
}


class RowError(DataError):
    """A fault of one row; the rest of the file may be used."""


class UnknownColumnsError(DataError):
    """No column is recognised by its name. `found` says so, without what to do about it."""

    def __init__(self, found: str) -> None:
        super().__init__(f"{found}. {_NAME_THEM}")
        self.found = found


class _NoColumnError(RowError):
    """A row lacks `column`."""

    def __init__(self, text: str, column: str) -> None:
        super().__init__(text)
        self.column = column


class Rows(NamedTuple):
    """What was read.

    Attributes:
        columns: the given ones, or those recognised by their names.
        skipped: what was wrong with each dropped row, and where it is.
        names: all columns that a row has.
    """

    rows: list[Row]
    columns: Columns
    skipped: list[str]
    names: Collection[str] = ()


def detect_columns(names: Collection[str], *, needs_output: bool = True) -> Columns | None:
    """Recognise the columns by their names: messages, or instruction, input and output, or for instance prompt and completion,
    question and answer, or text as the only one. None if no name is known, or if several could be meant."""
    if conversations := [name for name in _CONVERSATION_NAMES if name in names]:
        return Columns(messages=conversations[0]) if len(conversations) == 1 else None
    if {"instruction", "output"} <= set(names):
        return Columns(input=next((name for name in _INPUT_NAMES if name in names), "input"))
    instructions = [name for name in _INSTRUCTION_NAMES if name in names]
    outputs = [name for name in _OUTPUT_NAMES if name in names]
    inputs = [name for name in _INPUT_NAMES if name in names]
    if set(names) == {_TEXT_NAME}:  # beside a label, for instance, it is not all that is to be learnt
        return Columns(text=_TEXT_NAME)
    if not instructions and "input" in inputs:
        instructions, inputs = ["input"], inputs[1:]
    if not outputs and not needs_output:
        outputs = ["output"]
    if len(instructions) != 1 or len(outputs) != 1 or len(inputs) > 1:
        return None
    return Columns(instructions[0], inputs[0] if inputs else "input", outputs[0])


def read_rows(
    path: str | Path,
    columns: Columns | None = None,
    *,
    gold: Literal["output", "answer"] | None = "output",
    skip_bad: bool = False,
) -> Rows:
    """Read the rows of a JSON (a list of objects), JSONL, CSV or Parquet file; the first three also as .gz.

    Args:
        path: the file; its ending tells the format.
        columns: the names of the columns; None recognises them (`detect_columns`). `input` may be missing, or null in a row:
            then it is empty.
        gold: what each row must have besides its instruction; None requires nothing more.
        skip_bad: drop and list rows with a fault instead of stopping at the first.

    Raises:
        DataError: no such file, an unknown format, no row that can be used, or (unless `skip_bad`) a fault in a row, named by
            its line or number.
    """
    path = Path(path)
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffix.lower() not in FORMATS:
        if path.is_dir():
            raise DataError(f"{path}: is a folder; name a file in it")
        hint = ". If it has one JSON object a line, name it .jsonl" if suffix.lower() == ".txt" else ""
        raise DataError(f"{path}: unknown data format {suffix!r}. Known: {', '.join(FORMATS)}{hint}")
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is a folder or a device, not a file of rows; name a file")
    try:
        with path.open("rb") as stream:
            content = stream.read()
        if path.suffix == ".gz":
            most = _most_unpacked(path, content)
            with gzip.open(io.BytesIO(content)) as unpacked:
                content = unpacked.read(most + 1)
            if len(content) > most:
                raise _too_large(path, most)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{near_file(path, FORMATS)}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    kind = suffix.lower().removesuffix(".gz")
    if kind == ".parquet":
        records = _parquet_records(path, content)
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None
        parse = {".json": _json_records, ".jsonl": _jsonl_records, ".csv": _csv_records}[kind]
        records = parse(path, text)
    return rows_from_records(str(path), records, columns, gold=gold, skip_bad=skip_bad)


def _most_unpacked(path: Path, content: bytes) -> int:
    return max(_ALWAYS_UNPACKED, _MOST_TIMES[path.suffix.lower()] * len(content))


def _too_large(path: Path, most: int) -> DataError:
    return DataError(
        f"{path}: unpacks to more than {most // 2**20} MiB, far more than text does. If that is intended, "
        "unpack it to JSONL yourself and use that file"
    )


def rows_from_records(
    origin: str,
    records: Iterable[tuple[str, Any]],
    columns: Columns | None,
    *,
    gold: Literal["output", "answer"] | None = "output",
    skip_bad: bool = False,
) -> Rows:
    """Make rows of (place, record) pairs; a record may also be the RowError that reading it gave. See `read_rows`."""
    rows: list[Row] = []
    skipped: list[str] = []
    names: set[str] = set()
    lacking: _NoColumnError | None = None  # while no row could be read
    for place, record in records:
        if isinstance(record, Mapping):
            if columns is None:
                columns = _detected(place, record, needs_output=gold == "output")
            names.update(str(name) for name in record if name is not None)
        if lacking is not None and not skip_bad:  # the rest is read only to see whether any row has the column
            continue
        try:
            row = _row(place, record, columns or STANDARD_COLUMNS, gold)
            if rows and row.kind != rows[0].kind:
                raise RowError(
                    f"{place}: is {_A_KIND[row.kind]}, and the rows before it are not; a file holds rows of one kind"
                )
            rows.append(row)
        except RowError as fault:
            if isinstance(fault, _NoColumnError) and not rows:
                lacking = lacking or fault
            elif not skip_bad:
                raise
            skipped.append(str(fault))
    if lacking is not None and lacking.column not in names:
        raise DataError(f"{origin}: {_no_row_has(lacking.column, names)}")
    if lacking is not None and not skip_bad:
        raise lacking
    if not rows:
        found = "holds no rows"
        if skipped:
            none = (
                "its only row cannot be used: "
                if len(skipped) == 1
                else f"none of its {len(skipped):,} rows can be used. The first: "
            )
            found = none + skipped[0]
        raise DataError(f"{origin}: {found}")
    return Rows(rows, columns or STANDARD_COLUMNS, skipped, names)


def _no_row_has(column: str, names: Collection[str]) -> str:
    guess = closest(column, names)
    return (
        f'no row has a column "{shortened(column)}"; the columns are: {listed(names)}'
        + (f'; did you mean "{shortened(guess)}"?' if guess else ".")
        + f" {_NAME_THEM}"
    )


def _detected(place: str, record: Mapping[Any, Any], *, needs_output: bool) -> Columns:
    names = [str(name) for name in record if name is not None]
    columns = detect_columns(names, needs_output=needs_output)
    if columns is None:
        shown = ", ".join(map(shortened, names[:12])) + (", ..." if len(names) > 12 else "")
        raise UnknownColumnsError(
            f"{place}: cannot tell which column holds the instruction and which the output. Its columns: {shown}"
        )
    return columns


def _row(place: str, record: Any, columns: Columns, gold: str | None) -> Row:
    if isinstance(record, RowError):
        raise record
    if not isinstance(record, Mapping):
        raise RowError(f"{place}: must be an object with named columns, not {_kind(record)}")

    def text(column: str, *, required: bool) -> str:
        value = record.get(column)
        if value is None:
            if not required:
                return ""
            if column in record:
                raise RowError(f'{place}: column "{column}" is empty')
            names = [str(name) for name in record if name is not None]
            raise _NoColumnError(
                f'{place}: no column "{column}"{did_you_mean(column, names)}. Name the columns in a recipe: '
                "[data.columns] instruction, input, output",
                column,
            )
        # An integer may be too large for a float.
        if (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and math.isfinite(value)
        ):
            return str(value)
        if not isinstance(value, str):
            raise RowError(f'{place}: column "{column}" must be text, not {_kind(value)}')
        refuse_half_characters(f'{place}: column "{column}"', value)
        return value

    if columns.messages is not None:
        return _conversation(place, _messages(place, record, columns.messages), needs_answer=gold == "output")
    if columns.text is not None:
        row = Row("", "", text(columns.text, required=True))
        if not row.output.strip():
            raise RowError(f'{place}: column "{columns.text}" is blank')
        return row
    if isinstance(record.get(columns.instruction), list) or isinstance(record.get(columns.output), list):
        return _continued_conversation(place, record, columns, gold)
    row = Row(
        instruction=text(columns.instruction, required=True),
        input="" if columns.input == columns.instruction else text(columns.input, required=False),
        output=text(columns.output, required=gold == "output"),
        answer=text("answer", required=True) if gold == "answer" else "",
    )
    if not row.instruction.strip():
        raise RowError(f'{place}: column "{columns.instruction}" is blank')
    if gold == "output" and not row.output.strip():
        raise RowError(f'{place}: column "{columns.output}" is blank')
    return row


def refuse_half_characters(what: str, text: str) -> None:
    """JSON can spell half a character, "\\ud800", and no tokenizer takes it."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{what} holds half a surrogate pair, which is not a character") from None


def _messages(place: str, record: Mapping[Any, Any], column: str) -> tuple[Message, ...]:
    """A column with a list of turns: {"role", "content"} as OpenAI's, or {"from", "value"} as ShareGPT's."""
    turns = record.get(column)
    if not isinstance(turns, list) or not turns:
        if column not in record:
            names = [str(name) for name in record if name is not None]
            raise _NoColumnError(f'{place}: no column "{column}"{did_you_mean(column, names)}', column)
        found = "an empty one" if turns == [] else _kind(turns)
        raise RowError(f'{place}: column "{column}" must be a list of messages, not {found}')
    where = f'{place}, column "{column}"' if column not in _CONVERSATION_NAMES else place
    return tuple(_message(f"{where}, message {number}", turn) for number, turn in enumerate(turns, start=1))


def _conversation(place: str, messages: tuple[Message, ...], *, needs_answer: bool, num_given: int = 0) -> Row:
    questions = [message.content for message in messages if message.role == "user"]
    answers = [message.content for message in messages[num_given:] if message.role == "assistant"]
    if not questions:
        raise RowError(f"{place}: has no message from the user")
    if needs_answer and not answers:
        raise RowError(f"{place}: has no message from the assistant, so there is nothing to learn")
    return Row(questions[0], "", answers[-1] if answers else "", messages=messages, num_given=num_given)


def _continued_conversation(place: str, record: Mapping[Any, Any], columns: Columns, gold: str | None) -> Row:
    """A conversation in two columns, as TRL's prompt and completion: only the second is learnt."""
    if record.get(columns.input):
        raise RowError(
            f'{place}: column "{columns.input}" cannot be added to the list of messages in "{columns.instruction}". If it is no '
            "part of the prompt, name the other two in [data.columns], and for input a column that the file lacks"
        )
    given = _messages(place, record, columns.instruction)
    if gold != "output" and columns.output not in record:
        return _conversation(place, given, needs_answer=False, num_given=len(given))
    messages = given + _messages(place, record, columns.output)
    return _conversation(place, messages, needs_answer=gold == "output", num_given=len(given))


def _message(place: str, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{place}: must be an object with role and content, not {_kind(turn)}")
    role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
    role, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(role, str) or role not in _ROLES:
        shown = shortened(role) if isinstance(role, str) else _kind(role)
        raise RowError(f'{place}: {role_key} "{shown}" is not known; known: {", ".join(_ROLES)}')
    if isinstance(content, list):  # OpenAI's parts
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise RowError(f"{place}: {content_key} has a part that is not text, which is not supported")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise RowError(f"{place}: {content_key} must be text, not {_kind(content)}")
    if turn.get("tool_calls"):
        raise RowError(f"{place}: has tool_calls, which are not supported")
    if not content.strip() and _ROLES[role] != "system":
        raise RowError(f"{place}: {content_key} is blank")
    refuse_half_characters(f"{place}: {content_key}", content)
    return Message(_ROLES[role], content)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), f"a number ({value})" if isinstance(value, int | float) else type(value).__name__)


def _json_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(text, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        hint = ". One object per line? Then name it .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}{hint}"
        ) from None
    except RecursionError:
        raise DataError(f"{path}: JSON nested too deeply to be a list of rows") from None
    except ValueError as error:  # a number of thousands of digits, or a key that appears twice
        raise DataError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: must hold a list of rows, not {_kind(records)} (one object a line is .jsonl)")
    return ((f"{path}, row {number}", record) for number, record in enumerate(records))


def _jsonl_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip()[0] not in "{":
            _refuse_other_format(path, line)
        try:
            yield f"{path}, line {number}", json.loads(line, object_pairs_hook=_without_doubles)
        except json.JSONDecodeError as error:
            fault = RowError(f"{path}, line {number}, column {error.colno}: not valid JSON: {error.msg}")
            yield f"{path}, line {number}", fault
        except RecursionError:
            yield f"{path}, line {number}", RowError(f"{path}, line {number}: JSON nested too deeply to be a row")
        except ValueError as error:  # a number of thousands of digits, or a key that appears twice
            yield f"{path}, line {number}", RowError(f"{path}, line {number}: not readable JSON: {error}")


def _refuse_other_format(path: Path, first: str) -> None:
    """Raise DataError if the first line of what is called JSONL begins a list of JSON, or a table."""
    if first.lstrip().startswith("[") and not first.rstrip().endswith("]"):
        raise DataError(f"{path}: begins with [, so it seems to be a list of rows: name it .json")
    try:
        json.loads(first)
    except ValueError:
        if "," in first and "{" not in first:
            raise DataError(
                f"{path}, line 1: has commas and no object, so it seems to be a table: name it .csv"
            ) from None
    except RecursionError:
        pass
    else:
        if first.lstrip().startswith("[{"):
            raise DataError(f"{path}: is a list of rows in one line: name it .json")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key appears twice. Python would silently take the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'the key "{shortened(_repeated(names)[0])}" appears twice in one object')
    return record


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _csv_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = list(reader.fieldnames or ())
        if twice := _repeated(header):
            raise DataError(f'{path}, line 1: the column "{shortened(twice[0])}" appears twice in the header')
        for separator, name in ((";", '";"'), ("\t", "tabs")):
            if len(header) == 1 and separator in header[0]:
                raise DataError(f"{path}: the file seems to be separated by {name}: save it with commas")
        for record in reader:
            place = f"{path}, line {reader.line_num}"
            if None in record:
                yield place, RowError(f"{place}: more fields than the header has columns")
                continue
            yield place, record
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None


def _parquet_records(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    most, found = _most_unpacked(path, content), 0
    records: list[Any] = []
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        stored = max(
            (file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)), default=0
        )
        # In pieces: equal values compress to nothing, and no number in the file tells how large they get. One row of a piece
        # can be as large as everything that is stored.
        for batch in file.iter_batches(min(256, max(1, most // max(1, stored)))):
            found += batch.nbytes
            if found > most:
                raise _too_large(path, most)
            records += batch.to_pylist()
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        KeyError,
    ) as error:  # KeyError: no such time zone
        raise DataError(f"{path}: not a readable Parquet file: {str(error).strip()}") from None
    return ((f"{path}, row {number}", record) for number, record in enumerate(records))
