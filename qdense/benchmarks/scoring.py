r"""Reading an answer from a completion, by two rules side by side.

`paper` is exactly the authors' rule, faults included, so that a number can be compared with a published one: commas
deleted from numbers, one regular expression, the last match for numbers and the first for choices, wherever it occurs.
`strict` is a reliable reading:

    numbers   the last well-formed number; thousands separators, .5, 1e-3, 5*10^3, 3/4, 1 1/2 and \frac{3}{4} understood; a
              minus after a digit subtracts
    letters   the letter of the last "answer is X", else of the last "option X", else the last capital on its own ("A"
              before a word is the article); one after "not" is skipped
    options   whole words in any case, "solution 1" for "solution1"; the last "answer (to ...) is X" (not "X or Y"), else the
              only one that is named, else the one the response begins with; one after "not" does not count

They differ, for instance, in:

    completion                                                     paper       strict
    real ones: the stored completions of the test files (GSM8K 193 and 1235, AQuA 5), and SmolLM2's on BoolQ
    "... so the total is 29/3 liters. The answer is 29/3."         3           9.667
    "... $90 - $200 = -$110. The answer is -$110."                 110         -110
    "Rationale: Bill's average speed is ... The answer is (D)."    B           D           (the B of "Bill")
    'The answer to the question "..." is "true/false"'             true        no answer
    invented ones
    "about .5 litres", "1e-3", "7=10-3"                            5, -3, -3   0.5, 0.001, 3
    "1 1/2", "\frac{3}{4}", "5*10^3"                               2, 4, 3     1.5, 0.75, 5000
    "solution1 is wrong; the correct answer is solution2"          solution1   solution2
    "It is untrue"                                                 true        no answer
    "The correct answer is True"                                   no answer   true

Both read the response only. A model that continues with the template's next "### Response:" has ended its response
there (the authors split at it, and use the text after the first heading in arithmetic, the last in
commonsense); for `strict` any such heading ("### Instruction:") ends it. A response without an answer is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RULES = ("paper", "strict")
# The authors count a number as right within this distance (LLM-Adapters, evaluate.py: `miss`).
TOLERANCE = 0.001

Answer = float | str


@dataclass(frozen=True)
class AnswerKind:
    """How the answers of a task are read and compared.

    Attributes:
        name: "number", "letter", "option" or "text".
        pattern: the authors' regular expression; a match is an answer.
        takes_last: whether the authors take the last match (numbers) or the first.
        reads_last_response: whether the authors read what follows the last "### Response:" or the first.
        strict: response -> answer by the strict rule, or None.
        is_label: whether a text of a test file can be a label.
    """

    name: str
    pattern: str
    takes_last: bool
    reads_last_response: bool
    strict: Callable[[str], Answer | None]
    is_label: Callable[[str], bool]

    def paper(self, response: str) -> Answer | None:
        """The authors' reading of a response."""
        found = re.findall(self.pattern, response.replace(",", "") if self.name == "number" else response)
        if not found:
            return None
        answer = str(found[-1 if self.takes_last else 0])
        return float(answer) if self.name == "number" else answer

    def answers(self, completion: str) -> dict[str, Answer | None]:
        """The answer by each rule, or None."""
        responses = completion.split("### Response:")
        paper = responses[-1 if self.reads_last_response else 0].strip()
        strict = _single_spaced(re.split(r"###\s+\w+:", completion)[0].strip())
        return {"paper": self.paper(paper), "strict": self.strict(strict)}

    def is_correct(self, label: str, answer: Answer | None) -> bool:
        if self.name == "number":
            return isinstance(answer, float) and math.isfinite(answer) and abs(float(label) - answer) <= TOLERANCE
        if self.name == "text":
            return isinstance(answer, str) and normalised(answer) == normalised(label)
        return answer == label

    def majority(self, answers: Sequence[Answer | None]) -> Answer | None:
        """The answer that most samples give. Numbers within the tolerance count as equal; ties go to the first; None only if
        all are."""
        votes: dict[Answer, int] = {}
        for answer in answers:
            if answer is None:
                continue
            key = answer
            if isinstance(answer, float):
                key = next((k for k in votes if isinstance(k, float) and abs(k - answer) <= TOLERANCE), answer)
            votes[key] = votes.get(key, 0) + 1
        return max(votes, key=lambda key: votes[key]) if votes else None


def _single_spaced(text: str) -> str:
    """Each run of white space as one character, a line break if it contains one. The patterns below have several optional
    white spaces in a row, and on a long run they would take its length to the third power."""
    return re.sub(r"\s{2,}", lambda run: "\n" if "\n" in run[0] else " ", text)


# --- numbers --------------------------------------------------------------------------------------------------------------

_NUMBER = r"""
    (?<![\w.])                                  # not inside a word or another number
    (?P<sign>(?<![\d)])[-\u2212]|)              # a minus sign; after a digit or bracket it is a subtraction
    \$?
    (?:(?P<whole>\d{1,3})\ (?=\d+/\d))?         # the 1 of 1 1/2
    (?P<value>\d{1,3}(?:,\d{3}){1,20}(?:\.\d+)? # 1,234.5; no longer, so that a search stays linear
      | \d+(?:\.\d+)?                           # 12, 12.5
      | \.\d+)                                  # .5
    (?:[eE](?P<exponent>[-+]?\d+)
      | \s?(?:[*x\u00d7]|\\times)\s?10\^\{?(?P<power>[-+]?\d+)\}?)?  # 1e-3, 5*10^3
    (?:\s?/\s?(?P<denominator>\d+(?:\.\d+)?))?  # 3/4
    (?![\d])
"""
_STRICT_NUMBER = re.compile(_NUMBER, re.VERBOSE)
_TEX_FRACTION = re.compile(r"\\[dt]?frac\s?\{(\d+)\}\s?\{(\d+)\}")


def strict_number(response: str) -> float | None:
    """The last well-formed number: thousands separators, a leading decimal point, fractions, mixed numbers ("1 1/2") and
    powers of ten understood.

    A minus directly after a digit or a bracket is a subtraction, not a sign. A fraction that is followed by its result
    ("3/4 = 0.75") is not the last number.
    """
    found = list(_STRICT_NUMBER.finditer(_TEX_FRACTION.sub(r" \1/\2", response)))
    if not found:
        return None
    last = found[-1]
    value = float(f"{last['value'].replace(',', '')}e{last['exponent'] or last['power'] or 0}")
    if last["denominator"]:
        denominator = float(last["denominator"])
        if denominator == 0:
            return None
        value = value / denominator + float(last["whole"] or 0)
    return -value if last["sign"] else value


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


NUMBER = AnswerKind("number", r"-?\d+\.?\d*", True, False, strict_number, _is_number)


# --- letters ----------------------------------------------------------------------------------------------------------------

_IS = r"\s*(?:(?:is|would be|should be|must be)(?:\s+(?:\w+ly|therefore|thus|then|hence))?,?|:|=)?\s*:?\s*"
_LETTER = r"[\"'*$]*\(?((?-i:[A-E]))\b(?!')"
_LETTERS = [
    re.compile(rf"\banswer(?:\s+(?:choice|option))?{_IS}(?:(?:choice|option)\s+)?{_LETTER}", re.IGNORECASE),
    re.compile(rf"(?<!not )(?<!n't )\b(?:option|choice){_IS}{_LETTER}", re.IGNORECASE),
    re.compile(r"(?<!not )(?<!not \()(?<![\w'(])\(?([B-E]|A(?=[).:,*\"']|\s*$|\s*\n))(?![\w'])"),
]


def strict_letter(response: str) -> str | None:
    """The letter of the last "answer is X", else of the last "option X", else the last letter on its own.

    A letter is a capital; "A" before a word is the article and not a choice. A letter after "not" does not count.
    """
    for pattern in _LETTERS:
        if found := pattern.findall(response):
            return str(found[-1])
    return None


# The authors' first match may be inside a word: the A of "Assume". Always answering "A" scores 24.8% on AQuA.
LETTER = AnswerKind("letter", "A|B|C|D|E", False, False, strict_letter, lambda label: label in tuple("ABCDE"))


# --- free text --------------------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """The text without differences that do not matter: case, amounts of white space, a final full stop."""
    return " ".join(text.casefold().split()).removesuffix(".")


# For a user's own rows; upstream has no such task, so both rules read the whole response.
TEXT = AnswerKind(
    "text", r"(?s)\A.+\Z", False, False, lambda response: response or None, lambda label: bool(label.strip())
)


# --- options ----------------------------------------------------------------------------------------------------------------


def options(*labels: str) -> AnswerKind:
    """Answers that are one of `labels`, for instance "solution1" and "solution2"."""
    named = "|".join(re.sub(r"(\d)$", r"\\s?\1", label) for label in labels)  # "solution 1" is solution1
    whole_word = re.compile(rf"(?<!\w)(?<!not )(?<!n't )({named})(?!\w)", re.IGNORECASE)
    stated = re.compile(
        rf"\banswer\b(?:\s+to\b[^\n]{{0,200}}?)?\s*(?:option\s*)?(?:(?:is|would be|should be|=)[ \t]*:?[ \t]*|:\s*)"
        rf"[\"'*(`]*({named})(?!\w)"
        rf"(?!\s*(?:/|or\b)\s*(?:{named}))",
        re.IGNORECASE,
    )

    def strict(response: str) -> str | None:
        found = stated.findall(response)
        if found:
            return _label(found[-1])
        mentions = [_label(mention) for mention in whole_word.findall(response)]
        if len(set(mentions)) == 1:
            return mentions[0]
        first = whole_word.match(response)
        return _label(first[1]) if first and not re.match(r"\s*(?:/|or\b)", response[first.end() :]) else None

    return AnswerKind("option", "|".join(labels), False, True, strict, lambda label: label in labels)


def _label(mention: str) -> str:
    return re.sub(r"\s", "", mention).lower()


def numbered(word: str, count: int) -> AnswerKind:
    """word1, word2, ... as options."""
    return options(*(f"{word}{number}" for number in range(1, count + 1)))
