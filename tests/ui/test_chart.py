"""The loss chart: where its dots and marks are."""

from qdense.ui.chart import loss_chart


def drawn(training, validation=(), *, width=40, height=5, last_step=100):
    return [line.plain for line in loss_chart(training, validation, width=width, height=height, last_step=last_step)]


def rows_with_dots(lines):
    """For each column of the canvas, the topmost line with a dot."""
    return [
        next((row for row, line in enumerate(lines[:-1]) if line[column] not in " \u2800"), None)
        for column in range(8, len(lines[0]))
    ]


def test_a_falling_loss_falls_from_the_left_to_the_right():
    lines = drawn([(step, 100.0 - step) for step in range(1, 101)])
    assert len(lines) == 6
    tops = rows_with_dots(lines)
    assert tops[0] == 0
    assert tops[-1] == 4
    assert tops == sorted(tops)
    assert lines[0].lstrip().startswith("97.5 ")  # the few above are at the edge
    assert lines[4].lstrip().startswith("0 ")
    assert lines[5].rstrip().endswith("step 100")
    assert len({len(line) for line in lines}) == 1


def test_half_a_run_takes_half_the_width():
    tops = rows_with_dots(drawn([(step, 1.0 + step % 2) for step in range(1, 51)]))
    assert all(top is not None for top in tops[:14])
    assert all(top is None for top in tops[18:])


def test_a_few_points_are_joined():
    tops = rows_with_dots(drawn([(0, 4.0), (100, 0.0)]))
    assert tops == sorted(tops)
    assert set(tops) == {0, 1, 2, 3, 4}


def test_validations_are_marked_where_they_belong():
    lines = drawn([(step, 100.0 - step) for step in range(1, 101)], [(50, 0.0), (100, 98.0)])
    assert lines[4][8 + 15] == "●"
    assert lines[0][8 + 30] == "●"
    assert sum(line.count("●") for line in lines) == 2


def test_where_there_is_no_room_or_no_loss_there_is_no_chart():
    losses = [(1, 1.0)]
    assert drawn([]) == drawn(losses, height=2) == drawn(losses, width=15) == []
    assert drawn(losses)
    assert drawn([(1, 2.0), (2, 2.0)])
