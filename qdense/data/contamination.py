"""Which items of a test set are in a training set, exactly or nearly.

Texts are compared as words. Case, punctuation, white space and Unicode's variant forms do not count; a number is one word
however it is written (1,000 = 1000, 5.0 = 5), and an operator before a number is a word too. The instruction
and the input are compared, not the answer.

- Exact: a training row has the same words.
- Near: at least 80% of the item's words are in runs of 5 words that ONE training row also has, with numbers as they are
  or all numbers taken as equal. The row found decides the kind: "same numbers" if it has all the item's
  numbers, else
  "other numbers": the same problem with other values. An item of fewer than 12 words must be covered entirely, because one
  word makes it a new question ("is corn starch the same as corn flower", "... corn syrup").
- Boilerplate does not count: any 3 words that more than half of a test set's items have, and at least 5 of them
  ("Answer format: true/false"); any 5 words that more than 1% of the training rows have, and more than 50 of them.

The run length and the share were chosen by reading matches in real data just above and below them. Math10K (1,824 genuine rows)
holds 124 items of AddSub exactly and 26 nearly, of mawps 31 and 40: what was read at 80-85% is the same problem, mostly with
other names and numbers, and so is much at 70-80%. The commonsense rows decide: of ARC-Challenge all 4 near items are right,
of BoolQ 20 of 22 (2 differ in a place), of PIQA some 36 of 47 (the rest: the same few words about another object, "can cut a
shirt"); at 70-80%, or with runs of 4 words, different questions with similar answers come in.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qdense.cache import cache_dir, write_atomically
from qdense.catalogs.datasets import TEST_SETS
from qdense.data.rows import Row
from qdense.data.sources import DataSet, local_test_set
from qdense.errors import QDenseError

VERSION = 1  # of the method: raise it with any change that could change a result, because results are cached
NGRAM_WORDS = 5
NEAR_PERCENT = 80
SHORT_ITEM_WORDS = 12
BOILERPLATE_WORDS = 3
BOILERPLATE_MIN_ITEMS = 5  # in a test set of three items, half means nothing
COMMON_MIN_ROWS = 50  # nor does 1% of a small training set

EXACT, SAME_NUMBERS, OTHER_NUMBERS = "exact", "same numbers", "other numbers"
KINDS = (EXACT, SAME_NUMBERS, OTHER_NUMBERS)


class Match(NamedTuple):
    """A test item that is in the training set.

    Attributes:
        item: its number in the test set, from 0.
        row: number of a training row that contains it, from 0: the first exact one, else the nearest.
        share: how much of the item's words that row covers; 1.0 if exact.
        kind: one of KINDS.
    """

    item: int
    row: int
    share: float
    kind: str


@dataclass(frozen=True)
class Overlap:
    """The items of one test set in a training set: `matches` are ordered by item, one for each item found."""

    num_items: int
    matches: tuple[Match, ...]

    def num_of(self, *kinds: str) -> int:
        return sum(match.kind in kinds for match in self.matches)

    @property
    def num_exact(self) -> int:
        return self.num_of(EXACT)

    @property
    def num_near(self) -> int:
        """Near ones of both kinds, without the exact ones."""
        return self.num_of(SAME_NUMBERS, OTHER_NUMBERS)

    @property
    def clean_indices(self) -> list[int]:
        """The items that were not found, in order."""
        found = {match.item for match in self.matches}
        return [index for index in range(self.num_items) if index not in found]


def check(training: Sequence[Row], test: Sequence[Row]) -> Overlap:
    """Look for every item of `test` in `training`. For several test sets, build `TrainingIndex` once."""
    return TrainingIndex(training).check(test)


def overlaps(training: DataSet, tests: Mapping[str, DataSet]) -> dict[str, Overlap]:
    """`check` for each of `tests`, by name, cached by the checksums of both and the method's VERSION.

    The training set is prepared only if some result is not in the cache; a damaged cache file is recomputed, and a cache
    that cannot be written is ignored.
    """
    found: dict[str, Overlap] = {}
    index: TrainingIndex | None = None
    for name, test in tests.items():
        path = cache_dir("contamination", f"v{VERSION}-{training.checksum[:32]}-{test.checksum[:32]}.json")
        overlap = None
        with suppress(OSError, ValueError, TypeError, KeyError):
            overlap = _overlap_from_json(json.loads(path.read_text(encoding="utf-8")), training, test)
        if overlap is None:
            index = index or TrainingIndex(training.rows)
            overlap = index.check(test.rows)
            with suppress(OSError):
                write_atomically(path, json.dumps({"num_items": overlap.num_items, "matches": overlap.matches}))
        found[name] = overlap
    return found


def local_overlaps(training: DataSet, data_dir: Path | None) -> tuple[dict[str, Overlap], list[str]]:
    """`overlaps` with every test set whose file is below `data_dir` or in the cache; nothing is downloaded.

    Returns:
        The overlaps by the name of the benchmark, and why test sets could not be read, each fault once.
    """
    tests, faults = {}, []
    for name, upstream in TEST_SETS.items():
        try:
            test = local_test_set(upstream, data_dir)
        except (QDenseError, OSError) as error:
            faults.append(str(error))
            continue
        if test is not None:
            tests[name] = test
    return overlaps(training, tests), list(dict.fromkeys(faults))


def describe(overlap: Overlap, training: DataSet, test: DataSet) -> dict[str, Any]:
    """An overlap as plain data, for `qdense data check --json`, with the first match of each kind in words."""
    first = {match.kind: match for match in reversed(overlap.matches)}
    return {
        "num_items": overlap.num_items,
        "num_exact": overlap.num_exact,
        "num_near": overlap.num_near,
        "num_near_same_numbers": overlap.num_of(SAME_NUMBERS),
        "num_near_other_numbers": overlap.num_of(OTHER_NUMBERS),
        "clean_indices": overlap.clean_indices,
        "matches": [match._asdict() for match in overlap.matches],
        "examples": [
            {
                **first[kind]._asdict(),
                "test_text": _text(test.rows[first[kind].item]),
                "training_text": _text(training.rows[first[kind].row]),
            }
            for kind in KINDS
            if kind in first
        ],
    }


def _overlap_from_json(stored: Any, training: DataSet, test: DataSet) -> Overlap:
    """Raises ValueError, TypeError or KeyError for what cannot be a result for these two sets."""
    matches = tuple(Match(*values) for values in stored["matches"])
    indices = [match.item for match in matches]
    whole_numbers = all(type(value) is int for match in matches for value in match[:2])
    if not (
        whole_numbers
        and stored["num_items"] == len(test.rows)
        and indices == sorted(set(indices))
        and all(0 <= match.item < len(test.rows) and 0 <= match.row < len(training.rows) for match in matches)
        and all(0 < match.share <= 1 and match.kind in KINDS for match in matches)
    ):
        raise ValueError("not a stored overlap of these sets")
    return Overlap(len(test.rows), matches)


# --- words ------------------------------------------------------------------------------------------------------------------

# Digits that NFKC would join to their neighbours: 10² must not become 102, nor 1½ 11/2.
_RAISED_OR_FRACTION = re.compile("(?=[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u218f])")
_SIGNS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-") | {"\u2044": "/", "\u00d7": "*", "\u00f7": "/"}
)
_HAS_PUNCTUATED_NUMBER = re.compile(r"[.,]\d")
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_TRAILING_ZEROS = re.compile(r"(?<![\d.])(\d+)(?:\.0+|(\.\d*[1-9])0+)(?!\.?\d)")
# A number, a run of letters, or an operator before a number; elsewhere the same sign is a hyphen or a slash.
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/^=<>](?=\s*\d)")


def words(text: str) -> list[str]:
    """The words of `text`, in the form in which they are compared."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _RAISED_OR_FRACTION.sub(" ", text)).translate(_SIGNS)
    text = text.casefold()
    if _HAS_PUNCTUATED_NUMBER.search(text):
        text = _BARE_POINT.sub("0.", _THOUSANDS_COMMA.sub("", text))
        text = _TRAILING_ZEROS.sub(r"\1\2", text)
    return _WORD.findall(text)


def _text(row: Row) -> str:
    return f"{row.instruction}\n{row.input}".strip() or row.output  # a whole text may hold any question


_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_ANY_NUMBER = np.uint64(0xD1B54A32D192ED03)


class _Texts:
    """Words of many rows, end to end, as 64-bit hashes.

    10^7 training n-grams meet 10^6 of the tests: the chance that any two share a hash is one in a million, and one item's
    share would then be about a word too high.

    Attributes:
        keys: the words of each row, joined; for a row without words, its text.
        offsets: (num_rows + 1,) int64, where each row's words begin and end.
        row: (num_words,) int32, the row of each word.
        plain, masked: (num_words,) uint64; in `masked` all numbers are equal.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.keys: list[str] = []
        hashes, lengths, is_number = array("q"), array("q"), bytearray()
        for row in rows:
            text = _text(row)
            found = words(text)
            self.keys.append(" ".join(found) or text)
            hashes.extend(map(hash, found))
            lengths.append(len(found))
            is_number.extend(word[0].isdigit() for word in found)
        self.offsets = np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])
        self.row = np.repeat(np.arange(len(rows), dtype=np.int32), np.diff(self.offsets))
        self.plain = np.array(hashes, dtype=np.int64).view(np.uint64)
        self.masked = np.where(np.array(is_number, dtype=bool), _ANY_NUMBER, self.plain)

    def __len__(self) -> int:
        return len(self.keys)

    def ngrams(self, masked: bool, length: int = NGRAM_WORDS) -> tuple[np.ndarray, np.ndarray]:
        """All n-grams within a row: their hashes, uint64, and the positions of their first words, int64; both (num_ngrams,)."""
        source = self.masked if masked else self.plain
        num = max(0, len(source) - length + 1)
        hashes = np.zeros(num, dtype=np.uint64)
        for i in range(length):  # polynomial modulo 2^64
            hashes *= _MULTIPLIER
            hashes += source[i : i + num]
        hashes ^= hashes >> np.uint64(31)
        positions = np.flatnonzero(self.row[:num] == self.row[length - 1 : length - 1 + num])
        return hashes[positions], positions

    @cached_property
    def is_boilerplate(self) -> np.ndarray:
        """(num_words,) bool: in 3 words that more than half of the rows hold, whatever their numbers."""
        marks = np.zeros(len(self.row), dtype=bool)
        hashes, positions = self.ngrams(masked=True, length=BOILERPLATE_WORDS)
        _, which = np.unique(hashes, return_inverse=True)
        num_rows = _num_distinct(which, self.row[positions], len(self))
        num_holding = num_rows[which]
        _mark(
            marks, positions[(2 * num_holding > len(self)) & (num_holding >= BOILERPLATE_MIN_ITEMS)], BOILERPLATE_WORDS
        )
        return marks


def _num_distinct(which: np.ndarray, row: np.ndarray, num_rows: int) -> np.ndarray:
    """The number of different rows in which each n-gram (a number from 0) occurs."""
    return np.bincount(np.unique(which.astype(np.int64) * num_rows + row) // num_rows)


def _mark(marks: np.ndarray, positions: np.ndarray, length: int, value: bool = True) -> None:
    for i in range(length):
        marks[positions + i] = value


# --- the search -------------------------------------------------------------------------------------------------------------

_FILTER_BITS = 24  # a table of 16 MiB rules out n-grams that no item has, ten times as fast as a search
MAX_JOINED = 4_000_000  # (n-gram of an item, row) pairs at a time: about 300 MB


class TrainingIndex:
    """Training rows, prepared for `check` against any number of test sets.

    170,420 rows against all sixteen tests, by the command: 1.0 GB at the peak, rows and test sets included.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._texts = _Texts(rows)
        self._row_of: dict[str, int] = {}
        for number, key in enumerate(self._texts.keys):
            self._row_of.setdefault(key, number)
        self._hashes = {}
        for masked in (False, True):
            self._hashes[masked], positions = self._texts.ngrams(masked)
        self._ngram_row = self._texts.row[positions]  # the same for both

    def check(self, test: Sequence[Row]) -> Overlap:
        """Look for every item of `test`: the method is in the module's docstring."""
        items = _Texts(test)
        best: dict[int, Match] = {}
        for index, key in enumerate(items.keys):
            if key in self._row_of:
                best[index] = Match(index, self._row_of[key], 1.0, EXACT)
        exact = frozenset(best)
        for masked in (False, True):
            for index, row, share in self._near(items, masked):
                if index in exact:
                    continue
                kind = SAME_NUMBERS if _holds_numbers(items.keys[index], self._texts.keys[row]) else OTHER_NUMBERS
                match, before = Match(index, row, share, kind), best.get(index)
                if before is None or _rank(match) < _rank(before):
                    best[index] = match
        return Overlap(len(test), tuple(best[index] for index in sorted(best)))

    def _near(self, items: _Texts, masked: bool) -> Iterator[tuple[int, int, float]]:
        """(item, row, share) for every pair that is near, exact ones among them."""
        hashes, positions = items.ngrams(masked)
        before = np.concatenate([[0], np.cumsum(items.is_boilerplate)])
        is_content = before[positions + NGRAM_WORDS] == before[positions]
        hashes, positions = hashes[is_content], positions[is_content]
        distinct, which = np.unique(hashes, return_inverse=True)
        holders, first = self._rows_holding(distinct, masked)  # of n-gram k: holders[first[k] : first[k + 1]]
        num_holders = np.diff(first)[which]

        is_common = num_holders > max(COMMON_MIN_ROWS, len(self._texts) // 100)
        counts = np.zeros(len(items.row), dtype=bool)
        _mark(counts, positions, NGRAM_WORDS)
        _mark(counts, positions[is_common], NGRAM_WORDS, False)
        counted_before = np.concatenate([[0], np.cumsum(counts)])
        num_counted = counted_before[items.offsets[1:]] - counted_before[items.offsets[:-1]]

        use = np.flatnonzero(~is_common & (num_holders > 0))
        which, positions, num_holders = which[use], positions[use], num_holders[use]
        for part in _parts(items.row[positions], num_holders):
            repeats = num_holders[part]
            # Join: every n-gram of an item with every row that holds it; then one group for each item and row.
            offset = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
            row = holders[np.repeat(first[which[part]], repeats) + offset]
            start = np.repeat(positions[part], repeats)
            pair = items.row[start].astype(np.int64) * len(self._texts) + row
            order = np.lexsort((start, pair))
            pair, start = pair[order], start[order]
            is_first = np.concatenate([[True], pair[1:] != pair[:-1]])
            # Runs overlap: each adds the words after the end of the one before it.
            end_before = np.concatenate([[0], start[:-1] + NGRAM_WORDS])
            begin = np.where(is_first, start, np.maximum(start, end_before))
            gained = counted_before[start + NGRAM_WORDS] - counted_before[begin]
            groups = np.flatnonzero(is_first)
            covered = np.add.reduceat(gained, groups)
            item, row = np.divmod(pair[groups], len(self._texts))
            total = num_counted[item]
            percent = np.where(total < SHORT_ITEM_WORDS, 100, NEAR_PERCENT)
            near = (total >= NGRAM_WORDS) & (100 * covered >= percent * total)
            yield from zip(item[near].tolist(), row[near].tolist(), (covered[near] / total[near]).tolist(), strict=True)

    def _rows_holding(self, distinct: np.ndarray, masked: bool) -> tuple[np.ndarray, np.ndarray]:
        """Which rows hold each of the n-grams `distinct`, which is sorted.

        Returns:
            Row numbers, int64, grouped by n-gram, and (len(distinct) + 1,) int64, where each group begins.
        """
        hashes = self._hashes[masked]
        shift = np.uint64(64 - _FILTER_BITS)
        table = np.zeros(1 << _FILTER_BITS, dtype=bool)
        table[distinct >> shift] = True
        candidates = np.flatnonzero(table[hashes >> shift])
        which = np.searchsorted(distinct, hashes[candidates])
        which[which == len(distinct)] = 0
        is_hit = distinct[which] == hashes[candidates] if len(distinct) else np.zeros(0, dtype=bool)
        num_rows = len(self._texts)
        pairs = np.unique(which[is_hit].astype(np.int64) * num_rows + self._ngram_row[candidates[is_hit]])
        first = np.searchsorted(pairs, np.arange(len(distinct) + 1) * num_rows)
        return pairs % max(num_rows, 1), first


def _parts(item: np.ndarray, num_joined: np.ndarray) -> Iterator[slice]:
    """Divide n-grams, which are ordered by item, between items into parts of at most `MAX_JOINED` pairs or one item."""
    total = np.cumsum(num_joined)
    begin = 0
    while begin < len(item):
        done = total[begin - 1] if begin else 0
        end = int(np.searchsorted(total, done + MAX_JOINED, side="right"))
        if end < len(item):
            end = int(np.searchsorted(item, item[end], side="left"))
            if end <= begin:
                end = int(np.searchsorted(item, item[begin], side="right"))
        yield slice(begin, end)
        begin = end


def _rank(match: Match) -> tuple[bool, float, int]:
    """Of several near rows prefer one with the item's numbers, then the nearest, then the first."""
    return match.kind == OTHER_NUMBERS, -match.share, match.row


def _holds_numbers(item: str, row: str) -> bool:
    return not _numbers(item) - _numbers(row)


def _numbers(key: str) -> Counter[str]:
    return Counter(word for word in key.split(" ") if word[:1].isdigit())
