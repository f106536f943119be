"""From a name or a path to rows: upstream's files, a user's own, the hub's, or the generator's.

A known name is looked for in `--data-dir` (LLM-Adapters' layout), then in the cache, then downloaded. A name found in none of
these is an error: no other data set takes its place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdense.cache import cache_dir
from qdense.catalogs.choices import RowKind
from qdense.catalogs.datasets import TRAINING_SETS, UPSTREAM_URL, UpstreamFile
from qdense.data import wordproblems
from qdense.data.download import download, git_blob_id
from qdense.data.rows import FORMATS, STANDARD_COLUMNS, Columns, Row, RowError, Rows, read_rows, rows_from_records
from qdense.errors import DataError, did_you_mean, near_file
from qdense.events import Download, Emit, ignore

if TYPE_CHECKING:
    from qdense.recipe import DataRecipe


@dataclass(frozen=True)
class DataSet:
    """Rows and their origin.

    Attributes:
        origin: a path, a hub id, or the generator, to show.
        columns: the columns they were read from.
        skipped: what was wrong with each dropped row, and where it is.
        checksum: SHA-256 of the rows' content, in order, so equal rows have equal checksums wherever they are stored.
    """

    rows: list[Row]
    origin: str
    columns: Columns = STANDARD_COLUMNS
    skipped: Sequence[str] = ()

    @property
    def kind(self) -> RowKind:
        """What all its rows are."""
        return self.rows[0].kind

    @cached_property
    def checksum(self) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            # Equal to what it was before there were conversations, and rows of a conversation so far.
            content = row[: 6 if row.num_given else 5 if row.messages else 4]
            digest.update(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()


def load_training_set(
    data: DataRecipe, data_dir: Path | None, emit: Emit = ignore, *, needs_output: bool = True
) -> DataSet:
    """The training rows that the recipe names. Rows with a fault are treated as `data.bad_rows` says. Raises DataError.

    Args:
        needs_output: False also accepts rows without an output, for comparing questions.
    """
    columns = Columns(**data.columns.model_dump()) if data.columns is not None else None
    options: dict[str, Any] = {"gold": "output" if needs_output else None, "skip_bad": data.bad_rows == "skip"}
    try:
        if data.path is not None:
            if not Path(data.path).exists() and not Path(data.path).is_absolute():
                near = near_file(data.path, FORMATS)
                raise DataError(
                    f'data.path = "{data.path}": no such file in {Path.cwd()}, from where paths count{near}'
                )
            return _data_set(read_rows(data.path, columns, **options), data.path)
        assert data.name is not None  # a recipe has one of the two
        if data.name == "wordproblems":
            return DataSet(wordproblems.training_rows(), origin="qdense.data.wordproblems")
        upstream = TRAINING_SETS.get(data.name)
        if upstream is None:
            return _load_hub_set(data.name, data, columns, options)
        path = locate(upstream, data_dir, emit)
        return _data_set(read_rows(path, STANDARD_COLUMNS, **options), str(path))
    except RowError as error:
        raise DataError(
            f"{error}. To train without such rows, add --set data.bad_rows=skip: it drops and lists them"
        ) from None


def _data_set(read: Rows, origin: str) -> DataSet:
    return DataSet(read.rows, origin, read.columns, read.skipped)


def load_named_or_file(name: str, data_dir: Path | None, emit: Emit = ignore) -> DataSet:
    """The questions of a training set that is given on the command line: a known name, the path of a file, or a recipe, for
    its data. Rows without an output are kept, and rows that cannot be read are skipped. Raises DataError or RecipeError.
    """
    from qdense.recipe import DataRecipe, load_recipe

    if name.endswith(".toml"):
        data = load_recipe(name).data.model_copy(update={"bad_rows": "skip"})
        return load_training_set(data, data_dir, emit, needs_output=False)
    if name in TRAINING_SETS:
        return load_training_set(DataRecipe(name=name, bad_rows="skip"), data_dir, emit, needs_output=False)
    if not os.path.exists(name) and not name.endswith(FORMATS):
        raise DataError(
            f'"{name}": unknown training set{did_you_mean(name, TRAINING_SETS)}; or give the path of a file '
            f"({', '.join(FORMATS)}), or of a recipe (.toml)"
        )
    return load_training_set(DataRecipe(path=name, bad_rows="skip"), data_dir, emit, needs_output=False)


def load_test_set(upstream: UpstreamFile | None, data_dir: Path | None, emit: Emit = ignore) -> DataSet:
    """The rows of a test file; None stands for the generator's. Raises DataError."""
    if upstream is None:
        return DataSet(wordproblems.test_rows(), origin="qdense.data.wordproblems")
    path = locate(upstream, data_dir, emit)
    return DataSet(read_rows(path, STANDARD_COLUMNS, gold="answer").rows, origin=str(path))


def local_test_set(upstream: UpstreamFile | None, data_dir: Path | None) -> DataSet | None:
    """Like `load_test_set`, but None where the file would have to be downloaded."""
    if upstream is None:
        return load_test_set(None, data_dir)
    path = find(upstream, data_dir)
    return DataSet(read_rows(path, STANDARD_COLUMNS, gold="answer").rows, origin=str(path)) if path else None


def find(upstream: UpstreamFile, data_dir: Path | None) -> Path | None:
    """The local path of an upstream file, in `data_dir` or in the cache; None if it is in neither.

    A file in `data_dir` is the user's own and is used as it is. One in the cache is verified by its blob id.
    """
    if data_dir is not None:
        if not data_dir.is_dir():
            raise DataError(f"{data_dir}: no such data folder (given by --data-dir or QDENSE_DATA)")
        if (data_dir / upstream.path).is_file():
            return data_dir / upstream.path
    cached = cache_dir("data", upstream.path)
    return cached if cached.is_file() and git_blob_id(cached) == upstream.blob_id else None


def locate(upstream: UpstreamFile, data_dir: Path | None, emit: Emit = ignore) -> Path:
    """Like `find`, but downloads into the cache what is not there."""
    found = find(upstream, data_dir)
    if found is not None:
        return found
    cached = cache_dir("data", upstream.path)
    cached.unlink(missing_ok=True)  # damaged
    try:
        download(
            f"{UPSTREAM_URL}/{upstream.path}",
            cached,
            upstream.blob_id,
            progress=lambda num_bytes, total_bytes: emit(Download(upstream.path, num_bytes, total_bytes)),
        )
    except DataError as error:
        looked = f"not in {data_dir}, " if data_dir else ""
        raise DataError(
            f"{upstream.path}: {looked}not in the cache ({cached.parent}), and {error} "
            "Or point --data-dir or QDENSE_DATA at a copy of LLM-Adapters."
        ) from None
    return cached


def _load_hub_set(name: str, data: DataRecipe, columns: Columns | None, options: dict[str, Any]) -> DataSet:
    import datasets

    place = f"{name}{f', {data.config}' if data.config else ''} ({data.split}{f' at {data.revision}' if data.revision else ''})"
    try:
        loaded = datasets.load_dataset(name, data.config, split=data.split, revision=data.revision)
    except Exception as error:  # `datasets` raises anything that its readers and the network raise
        raise DataError(
            f'data.name = "{name}": the hub data set cannot be loaded: {type(error).__name__}: {error}. Check the name, '
            "data.config and data.split, log in with `hf auth login` if it is private, or download it and give data.path."
        ) from None
    records = ((f"{place}, row {number}", record) for number, record in enumerate(loaded))
    return _data_set(rows_from_records(place, records, columns, **options), f"hub: {place}")
