"""Generated word problems of one addition or subtraction: the demo's data, which need no network.

Training and test problems share neither a sentence pattern nor a pair of numbers, so a model that scores on the test set
has learnt to read such problems and not to repeat them. Both use the same names and things.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from qdense.data.rows import Row

NUM_TRAINING_ROWS = 1200
NUM_TEST_ROWS = 200
_SEED = 20250523  # the paper's date on arXiv
_LARGEST = 60

NAMES = (
    "Ada", "Ben", "Carla", "Dmitri", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Marco", "Nadia",
    "Omar", "Priya", "Quinn", "Rosa", "Samir", "Tara", "Ulrich", "Vera", "Wanda", "Yusuf",
)  # fmt: skip
THINGS = (
    "apples", "balloons", "books", "buttons", "cards", "coins", "cookies", "crayons", "eggs", "flowers", "kites", "lemons",
    "marbles", "oranges", "peaches", "pencils", "seashells", "stamps", "stickers", "tickets",
)  # fmt: skip

# (problem, operation): the first number is {a}, the second {b}. A subtraction is a - b, and a is the larger.
_TRAINING_PATTERNS = (
    ("{name} has {a} {things}. {other} gives {name} {b} more {things}. How many {things} does {name} have now?", "+"),
    ("{name} had {a} {things} and gave {b} of them to {other}. How many {things} does {name} have left?", "-"),
    (
        "There are {a} {things} on the table. {name} puts {b} more {things} there. How many {things} are on the table?",
        "+",
    ),
    ("There were {a} {things} in the box. {name} took {b} {things} out. How many {things} are still in the box?", "-"),
    ("{name} found {a} {things} and {other} found {b} {things}. How many {things} did they find together?", "+"),
    ("{name} picked {a} {things} and lost {b} of them. How many {things} are left?", "-"),
    ("{name} bought {a} {things} on Monday and {b} {things} on Tuesday. How many {things} did {name} buy in all?", "+"),
    ("{name} needs {a} {things} and already has {b}. How many more {things} does {name} need?", "-"),
    ("A shop had {a} {things}. It sold {b} of them today. How many {things} does the shop have now?", "-"),
    ("{name} counted {a} red {things} and {b} blue {things}. How many {things} are there altogether?", "+"),
    ("{name} has {a} {things}. {other} has {b} {things}. How many more {things} does {name} have than {other}?", "-"),
    ("A basket holds {a} {things}. {name} adds {b} {things}. What is the total number of {things} in the basket?", "+"),
    ("{other} had {b} {things} fewer than {name}, who had {a}. How many {things} did {other} have?", "-"),
    ("{name} baked {a} {things} in the morning and {b} {things} at night. How many {things} is that in total?", "+"),
    ("{name} started with {a} {things}. After the game {b} {things} were gone. How many {things} remained?", "-"),
    ("After getting {b} {things} from {other}, how many {things} does {name} have, who had {a} {things} before?", "+"),
)
_TEST_PATTERNS = (
    ("{name} owns {a} {things}. For a birthday, {other} brings {b} {things} as a present. "
     "How many {things} does {name} own after that?", "+"),
    ("{a} {things} were in the drawer. {other} removed {b} {things} from the drawer. "
     "How many {things} does the drawer hold now?", "-"),
    ("{name} saw {a} {things} at the park and {b} {things} at school. How many {things} did {name} see in total?", "+"),
    ("{name} collected {a} {things}. {b} of the {things} were broken. How many {things} were not broken?", "-"),
    ("{name} and {other} put their {things} together. {name} had {a} and {other} had {b}. "
     "How many {things} do they have altogether?", "+"),
    ("{name} wants {a} {things} for a party, but only {b} {things} are ready. How many {things} are missing?", "-"),
)  # fmt: skip


def training_rows() -> list[Row]:
    """The 1,200 training problems, always the same."""
    return list(_problems(_TRAINING_PATTERNS, NUM_TRAINING_ROWS, for_test=False))


def test_rows() -> list[Row]:
    """The 200 test problems, always the same; `answer` is the number."""
    return list(_problems(_TEST_PATTERNS, NUM_TEST_ROWS, for_test=True))


def _problems(patterns: tuple[tuple[str, str], ...], count: int, *, for_test: bool) -> Iterator[Row]:
    generator = random.Random(f"{_SEED}:{for_test}")
    seen: set[str] = set()
    while len(seen) < count:
        pattern, operation = generator.choice(patterns)
        a, b = generator.randint(2, _LARGEST), generator.randint(2, _LARGEST)
        if operation == "-" and a <= b:
            continue
        if _is_test_pair(a, b) != for_test:
            continue
        name, other = generator.sample(NAMES, 2)
        problem = pattern.format(name=name, other=other, things=generator.choice(THINGS), a=a, b=b)
        if problem in seen:
            continue
        seen.add(problem)
        answer = a + b if operation == "+" else a - b
        output = f"{a} {operation} {b} = {answer}\nThe answer is {answer}."
        yield Row(instruction=problem, input="", output=output, answer=str(answer))


def _is_test_pair(a: int, b: int) -> bool:
    """One pair of numbers in five, in either order, belongs to the test problems alone."""
    low, high = sorted((a, b))
    return (3 * low + high) % 5 == 0
