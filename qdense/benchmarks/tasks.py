"""The benchmarks, one readable definition each, headed by a sample problem.

A test file's `output` is an old model's answer (or empty, or the label in words); the gold is `answer`. Files are those
of LLM-Adapters at a fixed commit (`qdense.catalogs.datasets`). Raise `version` whenever a change could change a score.

The prompt uses the template that the adapter was trained with, or for a bare base the task's own. A response ends at EOS,
at one of the template's headings, or at `max_new_tokens`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdense.benchmarks.scoring import LETTER, NUMBER, TEXT, AnswerKind, numbered, options
from qdense.catalogs.datasets import TEST_SETS, UpstreamFile
from qdense.data.rows import FORMATS, STANDARD_COLUMNS, Columns, UnknownColumnsError, read_rows
from qdense.data.sources import DataSet, load_test_set
from qdense.errors import DataError, EvaluationError, did_you_mean
from qdense.events import Emit, ignore


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as typed; upstream's spelling ("social_i_qa", "ARC-Easy") is accepted too, whatever its case.
        sample: a problem as the model reads it (between the template's headings), and its label.
        num_items: in the test set.
        file: the test file: upstream's, or a user's own; None for problems that qdense generates.
        answers: how an answer is read from a completion and compared with the label.
        max_new_tokens: the longest completion, as the authors' code sets it: 256 for arithmetic, 32 for commonsense.
        source: where the problems come from.
        template: the prompt template for a model that was not trained with one.
        columns: of a user's own file.
    """

    name: str
    sample: tuple[str, str]
    num_items: int
    file: UpstreamFile | Path | None
    answers: AnswerKind
    max_new_tokens: int
    source: str
    template: str = "alpaca"
    version: int = 1
    columns: Columns = STANDARD_COLUMNS

    @property
    def upstream_name(self) -> str:
        """The name of its folder upstream ("AQuA"), or its own."""
        return self.file.path.split("/")[1] if isinstance(self.file, UpstreamFile) else self.name


# --- arithmetic: the paper's Table 2, then LLM-Adapters' other sets -------------------------------------------------------

GSM8K = Task(
    name="gsm8k",
    sample=(
        "Mr Boarden is remodeling his bathroom. For every square foot, he needs 24 mosaic tiles. How many mosaic tiles would "
        "Mr Boarden need to cover two thirds of his 36 sq ft bathroom?",
        "576.0",
    ),
    num_items=1319,
    file=TEST_SETS["gsm8k"],
    answers=NUMBER,
    max_new_tokens=256,
    source="Cobbe et al. 2021, arXiv:2110.14168, test split: problems of several steps",
)

AQUA = Task(
    name="aqua",
    sample=(
        "In a bag of coins, three of every five are silver. What percentage of the coins is not silver? "
        "Answer Choices: (A) 20 (B) 30 (C) 40 (D) 50 (E) 60",
        "C",
    ),
    num_items=254,
    file=TEST_SETS["aqua"],
    answers=LETTER,
    max_new_tokens=256,
    source="Ling et al. 2017, arXiv:1705.04146, test split: algebra with five choices",
)

ADDSUB = Task(
    name="addsub",
    sample=(
        "There are 7 crayons in the drawer . Mary took 3 crayons out of the drawer . How many crayons are there now ?",
        "4",
    ),
    num_items=395,
    file=TEST_SETS["addsub"],
    answers=NUMBER,
    max_new_tokens=256,
    source="Hosseini et al. 2014 (EMNLP): addition and subtraction, 126 answers that are not whole",
)

SVAMP = Task(
    name="svamp",
    sample=(
        "Matthew gave equal numbers of crackers and cakes to his 4 friends. If he had 32 crackers and 98 cakes initially. "
        "How many crackers did each person eat?",
        "8.0",
    ),
    num_items=1000,
    file=TEST_SETS["svamp"],
    answers=NUMBER,
    max_new_tokens=256,
    source="Patel et al. 2021, arXiv:2103.07191: one step, many with numbers that do not matter",
)

MULTIARITH = Task(
    name="multiarith",
    sample=(
        "A florist tied 6 bunches of 8 tulips each, then 3 of the tulips broke. How many tulips were still whole?",
        "45.0",
    ),
    num_items=600,
    file=TEST_SETS["multiarith"],
    answers=NUMBER,
    max_new_tokens=256,
    source="Roy and Roth 2015 (EMNLP): problems of two steps",
)

SINGLEEQ = Task(
    name="singleeq",
    sample=("Nina has 12 stickers. She buys some more and has 21. How many did she buy?", "9.0"),
    num_items=508,
    file=TEST_SETS["singleeq"],
    answers=NUMBER,
    max_new_tokens=256,
    source="Koncel-Kedziorski et al. 2015 (TACL): problems of one equation",
)

MAWPS = Task(
    name="mawps",
    sample=(
        "A red ribbon was 3 feet long and a blue ribbon was 1.5 feet long . How much longer was the red ribbon ?",
        "1.5",
    ),
    num_items=238,
    file=TEST_SETS["mawps"],
    answers=NUMBER,
    max_new_tokens=256,
    source="Koncel-Kedziorski et al. 2016 (NAACL), test split: one to several steps",
)

MATHQA = Task(
    name="mathqa",
    sample=(
        "a train runs 60 km in 40 minutes . what is its speed in km per hour ? "
        "Answer Choices: (A) 75 (B) 80 (C) 85 (D) 90 (E) 95",
        "D",
    ),
    num_items=2985,
    file=TEST_SETS["mathqa"],
    answers=LETTER,
    max_new_tokens=256,
    source="Amini et al. 2019, arXiv:1905.13319, test split: five choices",
)

# --- commonsense: the paper's Table 1, in its order -----------------------------------------------------------------------

BOOLQ = Task(
    name="boolq",
    sample=(
        "Please answer the following question with true or false, question: is a tomato a fruit in botany?\n\n"
        "Answer format: true/false",
        "true",
    ),
    num_items=3270,
    file=TEST_SETS["boolq"],
    answers=options("true", "false"),
    max_new_tokens=32,
    source="Clark et al. 2019, arXiv:1905.10044, validation split; without the passage",
)

PIQA = Task(
    name="piqa",
    sample=(
        "Please choose the correct solution to the question: How do I keep a door from slamming?\n\n"
        "Solution1: Put a wedge under it.\n\nSolution2: Put a wedge on the wall.\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    num_items=1838,
    file=TEST_SETS["piqa"],
    answers=numbered("solution", 2),
    max_new_tokens=32,
    source="Bisk et al. 2019, arXiv:1911.11641, validation split",
)

SIQA = Task(
    name="siqa",
    sample=(
        "Please choose the correct answer to the question: Robin lent Kim an umbrella because it rained. How would Kim feel?"
        "\n\nAnswer1: thankful Answer2: hungry Answer3: jealous\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    num_items=1954,
    file=TEST_SETS["siqa"],
    # The authors look for answer1 to answer5 in this set and in ARC and OpenBookQA alike.
    answers=numbered("answer", 5),
    max_new_tokens=32,
    source="Sap et al. 2019, arXiv:1904.09728, validation split",
)

HELLASWAG = Task(
    name="hellaswag",
    sample=(
        "Please choose the correct ending to complete the given sentence: Baking: A cook cracks two eggs into a bowl. she\n\n"
        "Ending1: beats them with a fork. Ending2: paints the bowl red. Ending3: throws the oven away. "
        "Ending4: rides a horse.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending1",
    ),
    num_items=10042,
    file=TEST_SETS["hellaswag"],
    answers=numbered("ending", 4),
    max_new_tokens=32,
    source="Zellers et al. 2019, arXiv:1905.07830, validation split",
)

WINOGRANDE = Task(
    name="winogrande",
    sample=(
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup did not fit in the box "
        "because the _ was too small.\n\nOption1: cup Option2: box Answer format: option1/option2",
        "option2",
    ),
    num_items=1267,
    file=TEST_SETS["winogrande"],
    answers=numbered("option", 2),
    max_new_tokens=32,
    source="Sakaguchi et al. 2019, arXiv:1907.10641, validation split",
)

ARC_E = Task(
    name="arc-e",
    sample=(
        "Please choose the correct answer to the question: Which of these keeps a house warm?\n\nAnswer1: a window "
        "Answer2: insulation Answer3: a fan Answer4: a fence\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer2",
    ),
    num_items=2376,
    file=TEST_SETS["arc-e"],
    answers=numbered("answer", 5),
    max_new_tokens=32,
    source="Clark et al. 2018, arXiv:1803.05457, easy test split",
)

ARC_C = Task(
    name="arc-c",
    sample=(
        "Please choose the correct answer to the question: What would make the days on a planet shorter?\n\nAnswer1: a faster "
        "rotation. Answer2: a longer year. Answer3: a stronger gravity. Answer4: a larger moon.\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
    num_items=1172,
    file=TEST_SETS["arc-c"],
    answers=numbered("answer", 5),
    max_new_tokens=32,
    source="Clark et al. 2018, arXiv:1803.05457, challenge test split",
)

OBQA = Task(
    name="obqa",
    sample=(
        "Please choose the correct answer to the question: A plant leans towards\n\nAnswer1: noise Answer2: wind "
        "Answer3: light Answer4: dust\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer3",
    ),
    num_items=500,
    file=TEST_SETS["obqa"],
    answers=numbered("answer", 5),
    max_new_tokens=32,
    source="Mihaylov et al. 2018, arXiv:1809.02789, test split",
)

# --- qdense's own -----------------------------------------------------------------------------------------------------------

WORDPROBLEMS = Task(
    name="wordproblems",
    sample=(
        "Carla and Lena put their balloons together. Carla had 13 and Lena had 9. How many balloons do they have altogether?",
        "22",
    ),
    num_items=200,
    file=TEST_SETS["wordproblems"],
    answers=NUMBER,
    max_new_tokens=48,
    source="qdense/data/wordproblems.py: generated problems of one addition or subtraction",
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(GSM8K, AQUA, ADDSUB, SVAMP, MULTIARITH, SINGLEEQ, MAWPS, MATHQA),
        *(BOOLQ, PIQA, SIQA, HELLASWAG, WINOGRANDE, ARC_E, ARC_C, OBQA),
        WORDPROBLEMS,
    )
}
GROUPS: dict[str, tuple[str, ...]] = {
    "math": ("gsm8k", "aqua", "addsub", "svamp"),  # the paper's Table 2
    "commonsense": ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa"),  # its Table 1
    "all": tuple(name for name, task in TASKS.items() if task.file is not None),
}


def own_task(path: Path, columns: Columns | None = None) -> Task:
    """A user's own rows as a task: each prompt is an item, its output the label.

    If all outputs are numbers, answers are read as numbers; otherwise the whole response is compared (`scoring.TEXT`).

    Args:
        columns: used if the file's columns are not recognised by their names.

    Raises:
        DataError: the file cannot be read, a row is broken, or its columns are not known.
    """
    try:
        read = read_rows(path)
    except UnknownColumnsError as error:
        if columns is None:
            raise DataError(
                f'{error.found}. Rename them "prompt" and "completion", or name a run with --adapter: then the columns of its '
                "data are used"
            ) from None
        read = read_rows(path, columns)
    if read.rows[0].kind == "text":
        raise DataError(
            f"{path}: holds whole texts, without a question and its answer to score. Name a file of prompts and completions"
        )
    are_numbers = all(NUMBER.is_label(row.output.strip()) for row in read.rows)
    return Task(
        name=re.sub(r"[^\w.-]", "-", path.name),
        sample=(read.rows[0].instruction, read.rows[0].output),
        num_items=len(read.rows),
        file=path,
        answers=NUMBER if are_numbers else TEXT,
        max_new_tokens=256,
        source=str(path),
        columns=read.columns,
    )


def tasks_named(text: str, columns: Columns | None = None) -> list[Task]:
    """The tasks of a comma-separated list of task names, group names and files, each once, in the given order.

    Raises EvaluationError naming every unknown one; DataError for a file that cannot be read (see `own_task`).
    """
    by_name = {task.upstream_name.lower(): task for task in TASKS.values()} | TASKS
    found: dict[str, Task] = {}
    unknown = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name = part.lower()
        if name.endswith(FORMATS):
            task = own_task(Path(part), columns)
            if found.setdefault(task.name, task) != task:
                raise EvaluationError(f"{part} and {found[task.name].file}: two files of one name; rename one of them")
            continue
        members = GROUPS.get(name, (name,))
        if members[0] not in by_name:
            unknown.append(
                f'"{name}"{did_you_mean(name, [*TASKS, *GROUPS])}, or a file of your own ({", ".join(FORMATS[:4])})'
            )
            continue
        found.update({by_name[member].name: by_name[member] for member in members})
    if unknown:
        raise EvaluationError("unknown task " + "\n  and ".join(unknown))
    if not found:
        raise EvaluationError(f"no task named; known: {', '.join([*TASKS, *GROUPS])}")
    return list(found.values())


def task_named(name: str) -> Task:
    """The one task of this name. Raises EvaluationError, also for a group."""
    tasks = tasks_named(name)
    if len(tasks) > 1:
        raise EvaluationError(f'"{name}" stands for {len(tasks)} tasks; name one of {", ".join(t.name for t in tasks)}')
    return tasks[0]


def load_items(task: Task, data_dir: Path | None, emit: Emit = ignore) -> DataSet:
    """The task's test set, every label checked. Raises DataError."""
    if isinstance(task.file, Path):
        read = read_rows(task.file, task.columns)
        rows = [row._replace(output="", answer=row.output.strip()) for row in read.rows]
        return DataSet(rows, str(task.file), read.columns)
    data = load_test_set(task.file, data_dir, emit)
    for number, row in enumerate(data.rows):
        if not task.answers.is_label(row.answer):
            raise DataError(f'{data.origin}, row {number}: "{row.answer}" cannot be an answer of {task.name}')
    return data


def describe(task: Task) -> dict[str, Any]:
    """A task as plain data, for `qdense tasks --json`."""
    return {
        "name": task.name,
        "upstream_name": task.upstream_name,
        "version": task.version,
        "num_items": task.num_items,
        "sample": {"instruction": task.sample[0], "answer": task.sample[1]},
        "file": task.file.path if isinstance(task.file, UpstreamFile) else None,
        "answers": task.answers.name,
        "paper_pattern": task.answers.pattern,
        "max_new_tokens": task.max_new_tokens,
        "source": task.source,
    }
