"""What stops a run, what is only reported, and what passes: with numbers made up for each."""

import math

import pytest
import torch
from torch import nn

from qdense.errors import RunError
from qdense.events import Notice
from qdense.training.watch import Watch

ROWS = [[4, 2], [7]]


class Run:
    """A watch over a few parameters, whose gradients the test sets."""

    def __init__(self, *names, skips=False, awake=lambda name: True):
        self.parameters = {name: nn.Parameter(torch.ones(2)) for name in names or ("a", "b")}
        self.events = []
        self.watch = Watch(
            self.parameters, awake, skips=skips, emit=self.events.append, last_good=lambda: "The last good one is 8."
        )

    def step(self, number=2, losses=(0.5, 0.5), **gradients):
        for name, parameter in self.parameters.items():
            value = gradients.get(name, 1.0)
            parameter.grad = None if value is None else torch.tensor([value, 0.0])
        return self.watch.allows(number, [torch.tensor(loss) for loss in losses], ROWS)

    def told(self):
        assert all(isinstance(event, Notice) and event.level == "warning" for event in self.events)
        return [event.text for event in self.events]


def test_ordinary_steps_pass_without_a_word():
    run = Run()
    assert all(run.step(number) for number in range(1, 6))
    assert run.told() == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_rows_of_its_micro_batch(bad):
    with pytest.raises(
        RunError, match=r"step 2: the loss is not finite; data rows \[7\] .*learning_rate.*last good one is 8"
    ):
        Run().step(losses=(0.5, bad))
    with pytest.raises(RunError, match=r"data rows \[4, 2\] "):
        Run().step(losses=(bad, 0.5))
    with pytest.raises(RunError, match=r"data rows \[4, 2, 7\] "):
        Run().step(losses=(bad, bad))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_all_rows(bad):
    with pytest.raises(RunError, match=r"step 5: a gradient is not finite; data rows \[4, 2, 7\]"):
        Run().step(5, b=bad)


def test_ten_steps_in_a_row_may_be_skipped_and_no_more():
    run = Run(skips=True)
    assert [run.step(step, a=math.nan) for step in range(2, 12)] == [False] * 10
    assert len(run.told()) == 10
    assert "step 11: a gradient is not finite" in run.told()[-1]
    with pytest.raises(RunError, match=r"step 12: .* makes 11 skipped steps in a row .*last good one is 8"):
        run.step(12, a=math.nan)


def test_a_good_step_ends_the_row_of_skipped_ones():
    run = Run(skips=True)
    for _ in range(3):
        assert not any(run.step(a=math.nan) for _ in range(10))
        assert run.step()
    assert not any(run.step(a=math.nan) for _ in range(10))
    with pytest.raises(RunError, match="makes 11 skipped steps in a row"):
        run.step(a=math.nan)


def test_at_step_1_only_what_is_awake_at_the_start_must_have_a_gradient():
    run = Run("encoder", "decoder", awake=lambda name: name == "decoder")
    assert run.step(1, encoder=0.0)
    with pytest.raises(RunError, match=r"step 1: 1 of 2 trainable tensors have no gradient.*: decoder\. "):
        run.step(1, encoder=0.0, decoder=0.0)


def test_at_step_3_all_must_have_one_and_at_no_other():
    run = Run(awake=lambda name: False)
    for step in (1, 2, 4, 5):
        assert run.step(step, a=0.0, b=None)
    with pytest.raises(RunError, match=r"step 3: 2 of 2 trainable tensors have no gradient.*: a, b\. "):
        run.step(3, losses=(0.5,), a=0.0, b=None)


def test_three_dead_tensors_are_named_and_more_are_hinted_at():
    with pytest.raises(RunError, match=r": a, b, c\. "):
        Run("a", "b", "c", "d").step(1, a=0.0, b=0.0, c=0.0)
    with pytest.raises(RunError, match=r"4 of 4 .*: a, b, c, \.\.\.\. "):
        Run("a", "b", "c", "d").step(1, a=0.0, b=0.0, c=0.0, d=0.0)


def test_the_running_mean_explodes_above_twice_the_lowest_and_a_half():
    run = Run()
    run.step(losses=(0.5, 0.5))  # the mean begins at the first loss: 1
    assert run.watch.mean_loss == 1
    run.step(losses=(0.25, 0.25))
    assert run.watch.mean_loss == pytest.approx(0.95)  # 0.9 * 1 + 0.1 * 0.5
    run.step(losses=(15.0, 0.4))
    assert run.watch.mean_loss == pytest.approx(2.395)  # 2 * 0.95 + 0.5 is 2.4
    assert run.told() == []
    run.step(4, losses=(2.0, 0.5))
    assert run.watch.mean_loss == pytest.approx(2.4055)
    (told,) = run.told()
    assert told.startswith("step 4: the loss has exploded: its running mean was 0.95 and is now 2.41.")


def test_at_twice_the_lowest_and_a_half_nothing_has_exploded():
    run = Run()
    for loss in (0.0, 5.0):  # the mean goes from 0 to 0.5
        run.step(losses=(loss,))
    assert run.watch.mean_loss == 0.5
    assert run.told() == []


def test_an_explosion_is_reported_once():
    run = Run()
    for loss in (1.0, 100.0, 1000.0, 10.0):
        run.step(losses=(loss,) * 2)
    assert len(run.told()) == 1
