"""Types of arguments: what they read, and what they refuse."""

import argparse
import tomllib

import pytest

from qdense.cli.arguments import as_toml, columns, layer_numbers, memory_size, positive, probability, temperature


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (positive, "3", 3),
        (memory_size, "24GiB", 24 * 2**30),
        (memory_size, " 1.5 gb ", 3 * 2**29),
        (memory_size, "512m", 2**29),
        (layer_numbers, "0,15,31", [0, 15, 31]),
        (columns, "instruction=a, output=the answer", {"instruction": "a", "output": "the answer"}),
        (temperature, "0.7", 0.7),
        (temperature, "100", 100.0),
        (probability, "1", 1.0),
    ],
)
def test_read(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (positive, "0", "'0' is not a positive whole number"),
        (positive, "1.5", "not a positive whole number"),
        (memory_size, "24", "for instance 24GiB"),
        (memory_size, "0GiB", "for instance 24GiB"),
        (memory_size, "-1GiB", "for instance 24GiB"),
        (layer_numbers, "0;1", "for instance 0,15,31"),
        (columns, "instruction", "is not KEY=COLUMN, for instance instruction=question,output=answer"),
        (columns, "text=a,output=b", "text holds whole texts: give it alone"),
        (columns, "prompt=a,instruction=b", '"instruction" is given twice'),
        (columns, "instuction=a", 'did you mean "instruction"'),
        (columns, "output=a,output=b", "given twice"),
        (columns, "messages=a,output=b", "give it alone"),
        (temperature, "0", "use --decoding greedy"),
        (temperature, "nan", "temperature"),
        (probability, "1.01", "above 0 and at most 1"),
        (probability, "half", "above 0 and at most 1"),
    ],
)
def test_refused(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)


@pytest.mark.parametrize("value", ["größe 😀", 'a "b" \\ c', "x\x1b", 32])
def test_values_reach_a_recipe_as_they_are(value):
    assert tomllib.loads(f"key = {as_toml(value)}") == {"key": value}
