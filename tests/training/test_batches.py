"""Which rows a step has and what is random in it: by its number alone."""

import pytest
import torch

from qdense.ops.cross_entropy import IGNORED
from qdense.training.batches import Batches, micro_batches, seed_step
from tests.helpers.packed import example, examples_of


def rows_of(batches, step):
    return [each.row for each in batches.of_step(step)]


def test_each_epoch_takes_all_rows_once_and_its_last_step_the_rest():
    batches = Batches(examples_of(*[4] * 10), batch_size=4, seed=0)
    epochs = [[rows_of(batches, step) for step in steps] for steps in ((1, 2, 3), (4, 5, 6))]
    for epoch in epochs:
        assert [len(rows) for rows in epoch] == [4, 4, 2]
        assert sorted(row for rows in epoch for row in rows) == list(range(10))
    assert epochs[0] != epochs[1]
    assert [batches.epochs_after(step) for step in (1, 3, 6)] == [pytest.approx(1 / 3), 1, 2]


def test_a_step_s_rows_depend_on_seed_and_number_alone():
    examples = examples_of(*[4] * 11)
    whole, resumed = Batches(examples, 4, seed=7), Batches(examples, 4, seed=7)
    for step in range(1, 8):
        whole.of_step(step)
    assert rows_of(resumed, 8) == rows_of(whole, 8)
    assert rows_of(resumed, 2) == rows_of(whole, 2)
    assert rows_of(Batches(examples, 4, seed=8), 1) != rows_of(resumed, 1)


def test_the_order_is_that_of_every_release():
    """A run that another release resumes must not see rows twice, or others."""
    batches = Batches(examples_of(*[4] * 6), batch_size=4, seed=42)
    orders = [torch.randperm(6, generator=torch.Generator().manual_seed(42 + epoch)).tolist() for epoch in (0, 1)]
    assert [rows_of(batches, step) for step in (1, 2, 3, 4)] == [
        orders[0][:4], orders[0][4:], orders[1][:4], orders[1][4:],
    ]  # fmt: skip


def test_a_step_s_dropout_is_that_of_every_release():
    seeds = []
    for seed, step in ((0, 1), (0, 2), (1, 1), (3, 41)):
        seed_step(seed, step)
        seeds.append(torch.initial_seed())
    # printf "0 1" | b2sum -l 64, without its lowest bit
    assert seeds == [4414527679803055650, 3618122668196878631, 7284697825631664609, 966973198506251501]


def test_padded_micro_batches():
    batches = micro_batches(examples_of(6, 3, 4, 9, 5), 2, max_length=None, pad_token_id=99)
    assert [batch["rows"] for batch in batches] == [[0, 1], [2, 3], [4]]
    assert batches[0]["input_ids"].shape == (2, 6)
    assert batches[0]["input_ids"][1, 3:].tolist() == [99] * 3
    # A third of each row, and never its first token, is without a loss: 4 + 2, 3 + 6, 4 tokens.
    assert [batch["num_labels"] for batch in batches] == [6, 9, 4]
    assert [batch["num_tokens"] for batch in batches] == [9, 13, 5]


def test_the_first_token_of_a_row_is_no_label():
    whole = example(5)
    whole.labels[:] = whole.input_ids
    for max_length in (None, 5):
        (batch,) = micro_batches([whole], 1, max_length=max_length, pad_token_id=0)
        assert batch["num_labels"] == 4


def test_packed_micro_batches_hold_size_times_the_greatest_length():
    examples = examples_of(6, 3, 4, 9, 5)  # 27 tokens
    batches = micro_batches(examples, 2, max_length=9, pad_token_id=99)
    assert sorted(row for batch in batches for row in batch["rows"]) == [0, 1, 2, 3, 4]
    assert [batch["lengths"] for batch in batches] == [[9, 6, 3], [5, 4]]
    assert [batch["num_labels"] for batch in batches] == [
        sum(int((each.labels[1:] != IGNORED).sum()) for each in examples if each.row in batch["rows"])
        for batch in batches
    ]
