"""What the paper's rule for numbers needs beyond the filters of lm-evaluation-harness, which has neither.

`qdense tasks --export lm-eval` copies this file beside the tasks, which call it by `!function`. It must import nothing of
qdense: the harness is to be an opinion of its own. A filter gets, for each item, the list of its responses.
"""

TOLERANCE = 0.001


def delete_commas(responses: list[list[str]], docs: list[dict[str, str]]) -> list[list[str]]:
    """1,234 becomes 1234, before a number is looked for."""
    return [[text.replace(",", "") for text in of_one_item] for of_one_item in responses]


def to_label(responses: list[list[str]], docs: list[dict[str, str]]) -> list[list[str]]:
    """A number within the tolerance of the label is written as the label is, so that exact_match counts it."""
    return [
        [doc["answer"] if _is_near(text, doc["answer"]) else text for text in of_one_item]
        for of_one_item, doc in zip(responses, docs, strict=True)
    ]


def _is_near(text: str, label: str) -> bool:
    try:
        return abs(float(label) - float(text)) <= TOLERANCE
    except ValueError:  # the harness's "[invalid]", where no number was found
        return False
