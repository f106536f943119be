"""Reading an answer from a completion, by two rules side by side.

`paper` is the authors' rule to the letter, faults included, so that a number can stand beside a published one. `strict` is a
sound reading. They differ, for instance, in:

    completion                               paper        strict
    "10-3=7"                                 7.0          7.0       (the authors read 10, -3, 7: the last is right)
    "so she has 3/4 of it left"              4.0          0.75
    "about .5 litres"                        5.0          0.5
    "1e-3"                                   -3.0         0.001
    "Assume x = 4. The answer is (B)."       "A"          "B"       (AQuA: the A of "Assume")

Both read the response only: a model that runs on and writes the template's next "### Response:" has ended its response
there (the authors split at it); `strict` takes any such heading ("### Instruction:") for the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RULES = ("paper", "strict")
# The authors count a number as right within this distance (LLM-Adapters, evaluate.py: `miss`).
TOLERANCE = 0.001


@dataclass(frozen=True)
class AnswerKind:
    """How the answers of a task are read and compared.

    Attributes:
        extract: rule name -> (completion -> answer, or None where there is none).
        matches: (label, answer) -> whether it is right.
        is_label: whether a text of a test file can be a label at all.
    """

    extract: dict[str, Callable[[str], Any]]
    matches: Callable[[str, Any], bool]
    is_label: Callable[[str], bool]

    def score(self, completion: str, label: str) -> dict[str, dict[str, Any]]:
        """By each rule: `answer` (None if there is none) and `is_correct`. No answer is wrong."""
        responses = {"paper": completion.split("### Response:")[0], "strict": re.split(r"###\s+\w+:", completion)[0]}
        answers = {rule: self.extract[rule](responses[rule].strip()) for rule in RULES}
        return {
            rule: {"answer": answer, "is_correct": answer is not None and self.matches(label, answer)}
            for rule, answer in answers.items()
        }


# --- numbers --------------------------------------------------------------------------------------------------------------


def paper_number(completion: str) -> float | None:
    """Commas deleted, then the last match of `-?\\d+\\.?\\d*`."""
    found = re.findall(r"-?\d+\.?\d*", completion.replace(",", ""))
    return float(found[-1]) if found else None


_NUMBER = r"""
    (?<![\w.])                                  # not inside a word or another number
    (?P<sign>(?<![\d)])[-\u2212]|)              # a minus sign; after a digit or bracket it is a subtraction
    \$?
    (?P<value>\d{1,3}(?:,\d{3})+(?:\.\d+)?      # 1,234.5
      | \d+(?:\.\d+)?                           # 12, 12.5
      | \.\d+)                                  # .5
    (?P<exponent>[eE][-+]?\d+)?
    (?:\s?/\s?(?P<denominator>\d+(?:\.\d+)?))?  # 3/4
    (?![\d])
"""
_STRICT_NUMBER = re.compile(_NUMBER, re.VERBOSE)


def strict_number(completion: str) -> float | None:
    """The last well-formed number: thousands separators, a leading decimal point, fractions and exponents understood.

    A minus directly behind a digit or a bracket is a subtraction, not a sign. A fraction behind which the result stands
    ("3/4 = 0.75") is not the last number.
    """
    last = None
    for last in _STRICT_NUMBER.finditer(completion):  # noqa: B007
        pass
    if last is None:
        return None
    value = float(last["value"].replace(",", "") + (last["exponent"] or ""))
    if last["denominator"]:
        denominator = float(last["denominator"])
        if denominator == 0:
            return None
        value /= denominator
    return -value if last["sign"] else value


def _number_matches(label: str, answer: float) -> bool:
    return math.isfinite(answer) and abs(float(label) - answer) <= TOLERANCE


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


# --- choices ----------------------------------------------------------------------------------------------------------------


def paper_letter(completion: str) -> str | None:
    """The first of A to E anywhere, inside words too: the authors' rule. (Always "A" scores 24.8% on AQuA.)"""
    found = re.search(r"A|B|C|D|E", completion)
    return found[0] if found else None


_ANSWER_IS = re.compile(
    r"\b(?:answer|option|choice)\b\s*(?:choice|option)?\s*(?:is|would be|:|=)?\s*:?\s*[\"'*]*\(?([A-E])\b(?!')",
    re.IGNORECASE,
)
_LONE_LETTER = re.compile(r"(?<![\w'])\(?([B-E]|A(?=[).:,*\"']|\s*$|\s*\n))(?![\w'])")


def strict_letter(completion: str) -> str | None:
    """The letter of the last "answer is X" (or "option X"), else the last letter that stands alone.

    A letter is a capital; "A" before a word is taken for the article, not for a choice.
    """
    stated = [letter for letter in _ANSWER_IS.findall(completion) if letter.isupper()]
    if stated:
        return str(stated[-1])
    alone = _LONE_LETTER.findall(completion)
    return str(alone[-1]) if alone else None


NUMBER = AnswerKind({"paper": paper_number, "strict": strict_number}, _number_matches, _is_number)
LETTERS = AnswerKind(
    {"paper": paper_letter, "strict": strict_letter},
    lambda label, answer: label == answer,
    lambda label: label in ("A", "B", "C", "D", "E"),
)
