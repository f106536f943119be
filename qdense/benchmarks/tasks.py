"""The benchmarks, one readable definition each, with a sample problem.

A test file's `output` is an old model's answer and no gold; `answer` is. Files are those of LLM-Adapters at a fixed commit
(`qdense.data.catalog`). Raise `version` whenever a change could change a score.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdense.benchmarks.scoring import LETTERS, NUMBER, AnswerKind
from qdense.data.catalog import UpstreamFile
from qdense.errors import EvaluationError, did_you_mean


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as typed; upstream's spelling is accepted too, whatever its case.
        file: the test file; None for the problems that qdense makes itself.
        answers: how an answer is read from a completion and compared with the label.
        max_new_tokens: the longest completion, as the authors' code sets it (256 for arithmetic).
        source: where the problems come from.
    """

    name: str
    file: UpstreamFile | None
    answers: AnswerKind
    max_new_tokens: int
    source: str
    version: int = 1


# Mr Boarden is remodeling his bathroom. For every square foot, he needs 24 mosaic tiles. How many mosaic tiles would
# Mr Boarden need to cover two thirds of his 36 sq ft bathroom?                                             -> "576.0"
GSM8K = Task(
    name="gsm8k",
    file=UpstreamFile("dataset/gsm8k/test.json", "57a7a08e10e12e975e1f972d2b8125c0d4c722b1"),
    answers=NUMBER,
    max_new_tokens=256,
    source="Cobbe et al. 2021, arXiv:2110.14168, test split: 1,319 problems of several steps",
)

# Roberts has a property worth of $1023.65. But in a record his property worth is written as greatest positive even
# integer less than or equal to his property worth and it is divisible by 100. Find the difference between actual property
# and recorded property worth? Answer Choices: (A) 23.65 (B) 1000 (C) 35.62 (D) 2.65 (E) 1023.65              -> "A"
AQUA = Task(
    name="aqua",
    file=UpstreamFile("dataset/AQuA/test.json", "731fbb456f7a93bb4121125de09c4adcf42e5dab"),
    answers=LETTERS,
    max_new_tokens=256,
    source="Ling et al. 2017, arXiv:1705.04146, test split: 254 algebra problems with five choices",
)

# There are 7 crayons in the drawer . Mary took 3 crayons out of the drawer . How many crayons are there now ?  -> "4"
ADDSUB = Task(
    name="addsub",
    file=UpstreamFile("dataset/AddSub/test.json", "f3996cdf4159b4e1e4b6768865a4db72105f4e2f"),
    answers=NUMBER,
    max_new_tokens=256,
    source="Hosseini et al. 2014 (EMNLP): 395 problems of addition and subtraction, 126 with answers that are not whole",
)

# Matthew gave equal numbers of crackers and cakes to his 4 friends. If he had 32 crackers and 98 cakes initially. How
# many crackers did each person eat?                                                                          -> "8.0"
SVAMP = Task(
    name="svamp",
    file=UpstreamFile("dataset/SVAMP/test.json", "98b8f1872db596f8aaff2c95d1d698a9fa13b94f"),
    answers=NUMBER,
    max_new_tokens=256,
    source="Patel et al. 2021, arXiv:2103.07191: 1,000 one-step problems, many with numbers that do not matter",
)

# Carla and Lena put their balloons together. Carla had 13 and Lena had 9. How many balloons do they have altogether? -> "22"
WORDPROBLEMS = Task(
    name="wordproblems",
    file=None,
    answers=NUMBER,
    max_new_tokens=48,
    source="qdense/data/wordproblems.py: 200 made problems of one addition or subtraction",
)

TASKS: dict[str, Task] = {task.name: task for task in (GSM8K, AQUA, ADDSUB, SVAMP, WORDPROBLEMS)}
# The paper's arithmetic benchmarks, in its order (Table 2).
GROUPS: dict[str, tuple[str, ...]] = {"math": ("gsm8k", "aqua", "addsub", "svamp")}


def tasks_named(text: str) -> list[Task]:
    """The tasks of a comma-separated list of task and group names, each once, in the order given.

    Raises EvaluationError naming every unknown one.
    """
    found: dict[str, Task] = {}
    unknown = []
    for name in (part.strip().lower() for part in text.split(",") if part.strip()):
        members = GROUPS.get(name, (name,))
        if members[0] not in TASKS:
            unknown.append(f'"{name}"{did_you_mean(name, [*TASKS, *GROUPS])}')
            continue
        found.update({member: TASKS[member] for member in members})
    if unknown:
        raise EvaluationError("unknown task " + "\n  and ".join(unknown))
    if not found:
        raise EvaluationError(f"no task named; known: {', '.join([*TASKS, *GROUPS])}")
    return list(found.values())
