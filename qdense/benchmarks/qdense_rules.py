"""The parts of the paper's rule for numbers that lm-evaluation-harness has no filters for.

`qdense tasks --export lm-eval` copies this file beside the tasks, which call it by `!function`. It must not import qdense,
so that the harness stays independent. A filter receives, for each item, the list of its responses.
"""

TOLERANCE = 0.001


def delete_commas(responses: list[list[str]], docs: list[dict[str, str]]) -> list[list[str]]:
    """1,234 becomes 1234 before a number is searched."""
    return [[text.replace(",", "") for text in of_one_item] for of_one_item in responses]


def to_label(responses: list[list[str]], docs: list[dict[str, str]]) -> list[list[str]]:
    """A number within the tolerance of the label is replaced by the label, so that exact_match counts it."""
    return [
        [doc["answer"] if _is_near(text, doc["answer"]) else text for text in of_one_item]
        for of_one_item, doc in zip(responses, docs, strict=True)
    ]


def _is_near(text: str, label: str) -> bool:
    try:
        return abs(float(label) - float(text)) <= TOLERANCE
    except ValueError:  # the harness's "[invalid]", where no number was found
        return False
