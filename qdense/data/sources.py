"""From a name or a path to rows: upstream's files, a user's own, the hub's, or the generator's.

A known name is looked for in `--data-dir` (LLM-Adapters' layout), then in the cache, then downloaded. A name that is in
none of these is an error: one data set is never taken for another.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qdense.cache import cache_dir
from qdense.catalogs.datasets import TRAINING_SETS, UPSTREAM_URL, UpstreamFile
from qdense.data import wordproblems
from qdense.data.download import download, git_blob_id
from qdense.data.rows import FORMATS, Columns, Row, read_rows, rows_from_records
from qdense.errors import DataError, did_you_mean
from qdense.events import Download, Emit, ignore

if TYPE_CHECKING:
    from qdense.recipe import DataRecipe


@dataclass(frozen=True)
class DataSet:
    """Rows with where they come from.

    Attributes:
        origin: a path, a hub id, or what made them: for a person to read.
        checksum: SHA-256 of the rows' content, in order: equal rows have equal checksums wherever they lie.
    """

    rows: list[Row]
    origin: str

    @cached_property
    def checksum(self) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()


def load_training_set(data: DataRecipe, data_dir: Path | None, emit: Emit = ignore) -> DataSet:
    """The training rows that the recipe names. Raises DataError."""
    columns = Columns(**data.columns.model_dump())
    if data.path is not None:
        return DataSet(read_rows(data.path, columns), origin=data.path)
    assert data.name is not None  # the recipe has one of the two
    if data.name == "wordproblems":
        return DataSet(wordproblems.training_rows(), origin="qdense.data.wordproblems")
    upstream = TRAINING_SETS.get(data.name)
    if upstream is None:
        return _load_hub_set(data.name, data, columns)
    path = locate(upstream, data_dir, emit)
    return DataSet(read_rows(path), origin=str(path))


def load_named_or_file(name: str, data_dir: Path | None, emit: Emit = ignore) -> DataSet:
    """The rows of a training set that is given on the command line: a known name, the path of a file, or a recipe whose
    data is meant. Raises DataError, or RecipeError."""
    from qdense.recipe import DataRecipe, load_recipe

    if name.endswith(".toml"):
        return load_training_set(load_recipe(name).data, data_dir, emit)
    if name in TRAINING_SETS:
        return load_training_set(DataRecipe(name=name), data_dir, emit)
    if not os.path.exists(name) and not name.endswith(FORMATS):
        raise DataError(
            f'"{name}": unknown training set{did_you_mean(name, TRAINING_SETS)}; or give the path of a file '
            f"({', '.join(FORMATS)}), or of a recipe (.toml)"
        )
    return load_training_set(DataRecipe(path=name), data_dir, emit)


def load_test_set(upstream: UpstreamFile | None, data_dir: Path | None, emit: Emit = ignore) -> DataSet:
    """The rows of a test file; None stands for the generator's. Raises DataError."""
    if upstream is None:
        return DataSet(wordproblems.test_rows(), origin="qdense.data.wordproblems")
    path = locate(upstream, data_dir, emit)
    return DataSet(read_rows(path, for_test=True), origin=str(path))


def local_test_set(upstream: UpstreamFile | None, data_dir: Path | None) -> DataSet | None:
    """Like `load_test_set`, but None where the file would have to be downloaded."""
    if upstream is None:
        return load_test_set(None, data_dir)
    path = find(upstream, data_dir)
    return DataSet(read_rows(path, for_test=True), origin=str(path)) if path else None


def find(upstream: UpstreamFile, data_dir: Path | None) -> Path | None:
    """The local path of an upstream file: below `data_dir`, or in the cache; None if it is in neither.

    A file in `data_dir` is the user's own and is taken as it is; one in the cache is verified by its blob id.
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
            "Or point --data-dir or QDENSE_DATA to a copy of LLM-Adapters."
        ) from None
    return cached


def _load_hub_set(name: str, data: DataRecipe, columns: Columns) -> DataSet:
    import datasets

    place = f"{name}{f', {data.config}' if data.config else ''} ({data.split}{f' at {data.revision}' if data.revision else ''})"
    try:
        loaded = datasets.load_dataset(name, data.config, split=data.split, revision=data.revision)
    except Exception as error:  # `datasets` raises whatever its many readers and the network raise
        raise DataError(
            f'data.name = "{name}": the hub data set cannot be loaded: {type(error).__name__}: {error}. Check the name, '
            "data.config and data.split, log in with `hf auth login` if it is private, or download it and give data.path."
        ) from None
    rows = rows_from_records(((f"{place}, row {number}", record) for number, record in enumerate(loaded)), columns)
    if not rows:
        raise DataError(f"{place}: holds no rows")
    return DataSet(rows, origin=f"hub: {place}")
