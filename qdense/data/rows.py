"""Rows of training and test data, read from any file a user may have, with the place of every fault named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qdense.errors import DataError, did_you_mean

# How much text a packed file may hold: a few kilobytes can hold gigabytes, and a byte of "{}" is 24 in memory.
_ALWAYS_UNPACKED = 16 * 2**20  # bytes
_MOST_TIMES = {".gz": 30, ".parquet": 100}  # its own size; text that people wrote is packed to a tenth
FORMATS = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")


class Row(NamedTuple):
    """One example. `answer` is the gold answer of a test row; training rows need none."""

    instruction: str
    input: str
    output: str
    answer: str = ""


class Columns(NamedTuple):
    """Which column of a file holds what."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


DEFAULT_COLUMNS = Columns()


def read_rows(path: str | Path, columns: Columns = DEFAULT_COLUMNS, *, for_test: bool = False) -> list[Row]:
    """Read the rows of a JSON (a list of objects), JSONL, CSV or Parquet file; the first two and CSV also as .gz.

    Args:
        path: the file; its ending tells the format.
        columns: the names of the columns. `input` may be absent, or null in a row: then it is empty.
        for_test: rows need an `answer` instead of an output.

    Raises:
        DataError: no such file, an unknown format, or a fault in a row, named by its line or number.
    """
    path = Path(path)
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffix.lower() not in FORMATS:
        raise DataError(f"{path}: unknown data format {suffix!r}. Known: {', '.join(FORMATS)}")
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
        raise DataError(f"{path}: no such file") from None
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
    rows = rows_from_records(records, columns, for_test=for_test)
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _most_unpacked(path: Path, content: bytes) -> int:
    return max(_ALWAYS_UNPACKED, _MOST_TIMES[path.suffix.lower()] * len(content))


def _too_large(path: Path, most: int) -> DataError:
    return DataError(
        f"{path}: unpacks to more than {most // 2**20} MiB, far more than text does. If that is right, unpack it "
        "to JSONL and name that file"
    )


def rows_from_records(records: Iterable[tuple[str, Any]], columns: Columns, *, for_test: bool = False) -> list[Row]:
    """Check (place, record) pairs and make rows of them; the place is named in a DataError."""
    return [_row(place, record, columns, for_test) for place, record in records]


def _row(place: str, record: Any, columns: Columns, for_test: bool) -> Row:
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: must be an object with named columns, not {_kind(record)}")

    def text(column: str, *, required: bool) -> str:
        value = record.get(column)
        if value is None:
            if not required:
                return ""
            if column in record:
                raise DataError(f'{place}: column "{column}" is empty')
            names = [str(name) for name in record if name is not None]
            raise DataError(
                f'{place}: no column "{column}"{did_you_mean(column, names)}. Name the columns in a recipe: '
                "[data.columns] instruction, input, output"
            )
        if not isinstance(value, str):
            raise DataError(f'{place}: column "{column}" must be text, not {_kind(value)}')
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:  # JSON can spell half a character, "\\ud800"; no tokenizer takes it
                raise DataError(
                    f'{place}: column "{column}" holds half a surrogate pair, which is no character'
                ) from None
        return value

    row = Row(
        instruction=text(columns.instruction, required=True),
        input=text(columns.input, required=False),
        output=text(columns.output, required=not for_test),
        answer=text("answer", required=for_test) if for_test else "",
    )
    if not row.instruction.strip():
        raise DataError(f'{place}: column "{columns.instruction}" is blank')
    if not for_test and not row.output.strip():
        raise DataError(f'{place}: column "{columns.output}" is blank')
    return row


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), f"a number ({value})" if isinstance(value, int | float) else type(value).__name__)


def _json_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(text, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{path}: JSON nested too deeply to be a list of rows") from None
    except ValueError as error:  # a number of thousands of digits, a key that stands twice
        raise DataError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: must hold a list of rows, not {_kind(records)} (one object a line is .jsonl)")
    return ((f"{path}, row {number}", record) for number, record in enumerate(records))


def _jsonl_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line, object_pairs_hook=_without_doubles)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}, column {error.colno}: not valid JSON: {error.msg}") from None
        except RecursionError:
            raise DataError(f"{path}, line {number}: JSON nested too deeply to be a row") from None
        except ValueError as error:  # a number of thousands of digits, a key that stands twice
            raise DataError(f"{path}, line {number}: not readable JSON: {error}") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no key stands twice: Python would take the last, silently."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f'the key "{next(name for name in names if names.count(name) > 1)}" stands twice in one object'
        )
    return record


def _csv_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = list(reader.fieldnames or ())
        if twice := [name for name in header if header.count(name) > 1]:
            raise DataError(f'{path}, line 1: the column "{twice[0]}" stands twice in the header')
        for record in reader:
            place = f"{path}, line {reader.line_num}"
            if None in record:
                raise DataError(f"{place}: more fields than the header has columns")
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
        # Piece by piece: equal values are packed to nothing, and no number in the file tells what they come to. One row of a
        # piece can be as large as all that is stored.
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
