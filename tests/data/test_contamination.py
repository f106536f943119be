"""Test items in a training set: hand-made cases, a slow reference, counts on real data, the command, the warning."""

import json
import random
from collections import Counter

import pytest

from qdense.benchmarks.tasks import TASKS
from qdense.cache import cache_dir
from qdense.catalogs.datasets import TEST_SETS, TRAINING_SETS, UpstreamFile
from qdense.cli import main
from qdense.data import contamination, sources, wordproblems
from qdense.data.contamination import EXACT, OTHER_NUMBERS, SAME_NUMBERS, check, local_overlaps, overlaps, words
from qdense.data.download import git_blob_id
from qdense.data.rows import Row, read_rows
from qdense.data.sources import DataSet, local_test_set
from qdense.errors import RunError
from qdense.events import Notice
from qdense.recipe import recipe_from_tables
from qdense.training import run as run_module

STORY = "Ann had {} red kites and gave {} of them to her brother Tom on Sunday. How many red kites does Ann have left?"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(sources, "download", refuse)


def rows(*texts):
    return [Row(text, "", "output") for text in texts]


def kinds(training, test):
    return {match.item: match.kind for match in check(rows(*training), rows(*test)).matches}


# --- words ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How many are left?\n ", "how  many are\tleft"),
        ("\u201cTom\u2019s\u201d café", '"tom\'s" cafe\u0301'),
        ("He has 1,000 kites, or 1,234,567.", "he has 1000 kites or 1234567"),
        ("$5.00 and .50", "5 and 0.5"),
        ("\uff21\uff22\uff23 \uff11\uff12", "abc 12"),
        ("Answer1: red", "answer 1 red"),
        ("7 \u2212 3", "7 - 3"),
        ("a well-known either/or", "a well known either or"),
    ],
)
def test_the_same_words(one, other):
    assert words(one) == words(other) != []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1.5", "1 5"),
        ("1.5", "15"),
        ("1,000", "1 000"),
        ("1,5", "15"),
        ("10²", "102"),
        ("1½", "11/2"),
        ("3 + 4", "3 - 4"),
        ("3.10.2020", "3.1.2020"),
        ("5.01", "5.1"),
        ("100", "1"),
    ],
)
def test_other_words(one, other):
    assert words(one) != words(other)


# --- cases ------------------------------------------------------------------------------------------------------------------


def test_exact_despite_case_punctuation_and_space():
    item = STORY.format(1000, "7.0")
    assert kinds([item.upper().replace("?", "") + "\n ", "something else"], [item]) == {0: EXACT}
    assert kinds([STORY.format("1,000", 7)], [item]) == {0: EXACT}
    assert kinds([STORY.format("1.5", 7)], [STORY.format("15", 7)]) == {0: OTHER_NUMBERS}


def test_input_belongs_to_the_text_and_output_does_not():
    whole = Row("Add the numbers.", "3 and 4", "7")
    assert check([whole], [Row("Add the numbers. 3 and 4", "", "")]).num_exact == 1
    assert check([whole], [Row("Add the numbers.", "three and four", "7")]).matches == ()
    assert check([Row("Nothing.", "", STORY.format(3, 4))], rows(STORY.format(3, 4))).matches == ()


def test_near_with_the_same_numbers_and_with_others():
    item = STORY.format(12, 5)
    same, other = item.replace("left?", "left over now?"), STORY.format(40, 8)
    assert kinds([same], [item]) == {0: SAME_NUMBERS}
    assert kinds([other], [item]) == {0: OTHER_NUMBERS}
    # A row with the item's numbers is named rather than one that is nearer otherwise, and an exact one before both.
    reworded = item.replace("on Sunday", "that day")
    match = check(rows(other, reworded), rows(item)).matches[0]
    assert (match.row, match.kind) == (1, SAME_NUMBERS)
    match = check(rows(other, same, item, item), rows(item)).matches[0]
    assert (match.row, match.kind, match.share) == (2, EXACT, 1.0)
    assert kinds([STORY.format(12, 12)], [STORY.format(12, 5)]) == {0: OTHER_NUMBERS}
    assert kinds([STORY.format(12, 5)], [STORY.format(12, 12)]) == {0: OTHER_NUMBERS}, "12 occurs only once"


def clean(training, test):
    return overlaps(training, {"test": test})["test"].clean_indices


def test_counts_and_clean_indices():
    test = [STORY.format(1, 2), "What is the capital of the smallest country?", STORY.format(5, 6), STORY.format(1, 3)]
    overlap = check(rows(STORY.format(1, 2), STORY.format(5, 6) + " Say."), rows(*test))
    assert (overlap.num_items, overlap.num_exact, overlap.num_near) == (4, 1, 2)
    assert (overlap.num_of(SAME_NUMBERS), overlap.num_of(OTHER_NUMBERS)) == (1, 1)
    assert overlap.clean_indices == [1]


def test_words_must_lie_in_one_row_and_in_runs():
    item = STORY.format(12, 5)
    first, second = item[:60], item[50:]
    assert kinds([first, second], [item]) == {}
    assert kinds([f"{first} ... {item[56:]}"], [item]) == {0: SAME_NUMBERS}
    shuffled = item.split()
    random.Random(0).shuffle(shuffled)
    assert kinds([" ".join(shuffled)], [item]) == {}


def test_the_share_is_of_the_words_that_runs_cover():
    item = " ".join(f"w{chr(97 + i)}" for i in range(20))  # 20 different words
    broken = item.split()
    for place, share in ((0, 0.95), (1, 0.9), (2, 0.85), (3, 0.8)):  # the words before it are too few for a run
        row = " ".join([*broken[:place], "x", *broken[place + 1 :]])
        assert check(rows(row), rows(item)).matches == ((0, 0, pytest.approx(share), SAME_NUMBERS),)
    assert check(rows(" ".join([*broken[:4], "x", *broken[5:]])), rows(item)).matches == ()


def test_short_items_must_be_covered_wholly():
    short = "is corn starch the same as corn flower"
    assert kinds([short.replace("flower", "syrup")], [short]) == {}
    assert kinds([short + " in Britain"], [short]) == {0: SAME_NUMBERS}
    assert kinds(["who are we"], ["who are we"]) == {0: EXACT}
    assert kinds(["who are we today"], ["who are we"]) == {}, "too short for anything but exact"
    eleven = "one two three four five six seven eight nine ten eleven"
    assert kinds([eleven.replace("eleven", "x")], [eleven]) == {}
    assert kinds([eleven + " x"], [eleven + " twelve"]) == {0: SAME_NUMBERS}


def test_boilerplate_does_not_count():
    frame = "Please answer the following question with true or false, question: {}?\n\nAnswer format: true/false"
    asked = ["is a tomato a fruit in botany", "do cats see well at night", "do cats hear", "was rome built in one day"]
    items = [frame.format(question) for question in [*asked, "are rivers clean", "is ice lighter than oil"]]
    assert kinds([frame.format("do dogs hear")], items) == {}
    assert kinds([frame.format("do dogs hear")], items[1:]) == {}
    assert kinds([frame.format("do dogs hear")], items[2:]) == {0: SAME_NUMBERS}, "four items are too few to tell"
    assert kinds([frame.format("is a tomato a fruit in botany or not")], items) == {0: SAME_NUMBERS}
    assert kinds(["Tell me, do cats see well at night"], items) == {1: SAME_NUMBERS}


def test_numbered_boilerplate():
    frame = "Exercise {0} chapter {0} page {0} line {0} column {0} part {0}: {1}"
    items = [frame.format(i, f"do {animal} hear") for i, animal in enumerate(["cats", "bats", "ants", "owls", "eels"])]
    assert kinds([frame.format(77, "do dogs hear")], items) == {}
    assert set(kinds([frame.format(77, "do dogs hear")], items[:4])) == {0, 1, 2, 3}


def test_what_many_training_rows_hold_does_not_count():
    frame = "Once upon a time in a far away country there lived a king who had a {}"
    animals = [f"{a}{b}" for a in "bcdfghklmn" for b in ("at", "og", "en", "ow", "ig", "up", "ish")]
    assert kinds([frame.format(animal) for animal in animals[:50]], [frame.format("unicorn")]) == {0: SAME_NUMBERS}
    many = [frame.format(animal) for animal in animals[:51]]
    assert kinds(many, [frame.format("unicorn")]) == {}
    assert kinds([*many, "this king who had a unicorn"], [frame.format("unicorn")]) == {}, "one word is left, too few"


def test_numbers_tell_problems_of_one_wording_apart():
    frame = "What is {} plus {} minus {} times {} plus {} minus {}?"
    training = [frame.format(*range(i, i + 6)) for i in range(60)] + ["Tell me. " + frame.format(9, 4, 2, 7, 1, 3)]
    assert kinds(training, [frame.format(9, 4, 2, 7, 1, 3), frame.format(9, 4, 2, 8, 1, 3)]) == {0: SAME_NUMBERS}


def test_odd_texts():
    assert kinds(["???", "!"], ["???", "...", " ??? "]) == {0: EXACT, 2: EXACT}
    assert check([], rows("some item")).clean_indices == [0]
    assert check(rows("some row"), []).clean_indices == []


# --- against a slow reference -------------------------------------------------------------------------------------------------


def slow_check(training, test):
    """The module's docstring, word for word, without an index."""

    def masked(text):
        return ["#" if word[0].isdigit() else word for word in text]

    def grams(text, length):
        return [tuple(text[i : i + length]) for i in range(len(text) - length + 1)]

    training, test = [words(row.instruction) for row in training], [words(row.instruction) for row in test]
    held = Counter(gram for text in test for gram in set(grams(masked(text), 3)))
    matches = []
    for item, text in enumerate(test):
        if text in training:
            matches.append((item, training.index(text), 1.0, EXACT))
            continue
        boilerplate = set()
        for i, gram in enumerate(grams(masked(text), 3)):
            if held[gram] > len(test) / 2 and held[gram] >= 5:
                boilerplate |= {i, i + 1, i + 2}
        candidates = []
        for view in (list, masked):
            usable = {i: g for i, g in enumerate(grams(view(text), 5)) if not boilerplate & set(range(i, i + 5))}
            row_grams = [set(grams(view(row), 5)) for row in training]
            common = {
                i for i, g in usable.items() if sum(g in of_row for of_row in row_grams) > max(50, len(training) // 100)
            }
            counted = {i + k for i in usable for k in range(5)} - {i + k for i in common for k in range(5)}
            for number, of_row in enumerate(row_grams):
                runs = {i for i, g in usable.items() if i not in common and g in of_row}
                covered = counted & {i + k for i in runs for k in range(5)}
                needed = len(counted) if len(counted) < 12 else 0.8 * len(counted)
                if len(counted) >= 5 and len(covered) >= needed - 1e-9:
                    numbers = [Counter(w for w in t if w[0].isdigit()) for t in (text, training[number])]
                    kind = SAME_NUMBERS if numbers[0] <= numbers[1] else OTHER_NUMBERS
                    candidates.append((kind == OTHER_NUMBERS, -len(covered) / len(counted), number, kind))
        if candidates:
            _, share, number, kind = min(candidates)
            matches.append((item, number, -share, kind))
    return matches


@pytest.mark.parametrize("seed", range(12))
def test_against_the_slow_reference(seed, monkeypatch):
    monkeypatch.setattr(contamination, "MAX_JOINED", 300)  # many parts
    generator = random.Random(seed)
    vocabulary = [*"abcdefgh", "3", "4", "5.5", "12"][: 6 + seed % 7]
    frame = "please tell me now" if seed % 2 else ""

    def text(length):
        return " ".join(generator.choices(vocabulary, k=length))

    habit = "and so it went on"  # in more rows than 50, in fewer items than half
    training = [f"{frame} {generator.choice((habit, ''))} {text(generator.randint(1, 40))}" for _ in range(120)]
    test = []
    for _ in range(60):
        copied = generator.choice(training).split()
        for _ in range(generator.choice((0, 1, 1, 2, 4))):
            copied[generator.randrange(len(copied))] = generator.choice(vocabulary)
        test.append(generator.choice((" ".join(copied), f"{frame} {text(generator.randint(1, 15))}")))
    found = check(rows(*training), rows(*test)).matches
    assert [tuple(match) for match in found] == [
        (item, row, pytest.approx(share), kind) for item, row, share, kind in slow_check(rows(*training), rows(*test))
    ]
    assert {match.kind for match in found} >= {EXACT, SAME_NUMBERS}, "the comparison has something to compare"


# --- real data --------------------------------------------------------------------------------------------------------------

# (exact, near with the same numbers, near with other numbers) as the method gave them when its samples were read.
REAL = {
    "math_10k_genuine_1824.json": {
        "gsm8k": (0, 0, 0), "addsub": (124, 8, 18), "svamp": (0, 0, 5), "mawps": (31, 6, 34), "aqua": (0, 0, 0),
    },
    "math_SUBSTITUTE_clean.json": {
        "gsm8k": (0, 0, 2), "addsub": (0, 0, 0), "svamp": (0, 0, 13), "mawps": (0, 4, 11), "aqua": (0, 0, 0),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_counts_on_real_data(shared_data, name):
    index = contamination.TrainingIndex(read_rows(shared_data / "ft-training_set" / name).rows)
    found = {}
    for task in REAL[name]:
        overlap = index.check(read_rows(shared_data / TASKS[task].file.path, gold="answer").rows)
        found[task] = tuple(overlap.num_of(kind) for kind in contamination.KINDS)
        assert len(overlap.clean_indices) == TASKS[task].num_items - sum(found[task])
    assert found == REAL[name]


def test_the_generators_test_problems_are_not_in_its_training_set():
    assert check(wordproblems.training_rows(), wordproblems.test_rows()).matches == ()


# --- the cache --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sets():
    return DataSet(rows(STORY.format(1, 2)), "train"), DataSet(rows(STORY.format(1, 2), "Who?"), "test")


def test_results_are_remembered_by_content(sets, monkeypatch):
    training, test = sets
    assert clean(training, test) == [1]
    built = []
    index_of = contamination.TrainingIndex
    monkeypatch.setattr(contamination, "TrainingIndex", lambda rows: built.append(rows) or index_of(rows))
    assert clean(DataSet(list(training.rows), "elsewhere"), test) == [1]
    assert built == []
    assert clean(DataSet(rows("Who?"), "train"), test) == [0]
    assert clean(training, DataSet(rows("Why?", "Who?"), "test")) == [0, 1]
    assert len(built) == 2
    monkeypatch.setattr(contamination, "VERSION", contamination.VERSION + 1)
    assert clean(training, test) == [1]
    assert len(built) == 3


@pytest.mark.parametrize(
    "damage",
    [
        "", "{", "[]", '"x"', "{}", '{"num_items": 2, "matches": 3}', '{"num_items": 2, "matches": [3]}',
        '{"num_items": 3, "matches": []}', '{"num_items": 2, "matches": [[5, 0, 1.0, "exact"]]}',
        '{"num_items": 2, "matches": [[0, 7, 1.0, "exact"]]}', '{"num_items": 2, "matches": [[0, 0, 1.0, "maybe"]]}',
        '{"num_items": 2, "matches": [["0", 0, 1.0, "exact"]]}', '{"num_items": 2, "matches": [[0, 0, "x", "exact"]]}',
        '{"num_items": 2, "matches": [[0, 0, 1.0, ["exact"]]]}', '{"num_items": 2, "matches": [[1, 0, 1.0]]}',
        '{"num_items": 2, "matches": [[0, 0, 1.0, "exact"], [0, 0, 1.0, "exact"]]}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_a_damaged_cache_file_is_computed_anew(sets, damage):
    clean(*sets)
    (stored,) = cache_dir("contamination").iterdir()
    whole = stored.read_bytes()
    stored.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert clean(*sets) == [1]
    assert stored.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(sets, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path / "file"))
    assert clean(*sets) == [1]


# --- the command ------------------------------------------------------------------------------------------------------------


def write(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"instruction": i, "input": "", "output": "x", "answer": "3"} for i in items]))
    return path


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    write(folder / TASKS["addsub"].file.path, [STORY.format(1, 2), STORY.format(5, 6), "How many are 3 kites?"])
    write(
        folder / TASKS["svamp"].file.path, ["How many wheels have 3 carts, if each of them has as many as a bicycle?"]
    )
    write(folder / TRAINING_SETS["math10k"].path, [STORY.format(1, 2) + "\n "])
    return folder


@pytest.mark.parametrize("by", ["name", "path"])
def test_data_check_as_json(data_dir, by, capsys, no_download):
    train = "math10k" if by == "name" else str(data_dir / TRAINING_SETS["math10k"].path)
    assert main(["data", "check", train, "AddSub,svamp", "--json", "--data-dir", str(data_dir)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["addsub", "svamp"]
    assert found["svamp"] == {
        "num_items": 1, "num_exact": 0, "num_near": 0, "num_near_same_numbers": 0, "num_near_other_numbers": 0,
        "clean_indices": [0], "matches": [], "examples": [],
    }  # fmt: skip
    addsub = found["addsub"]
    counts = {key: value for key, value in addsub.items() if key.startswith("num_")}
    assert counts == {
        "num_items": 3, "num_exact": 1, "num_near": 1, "num_near_same_numbers": 0, "num_near_other_numbers": 1,
    }  # fmt: skip
    assert addsub["clean_indices"] == [2]
    assert addsub["matches"] == [
        {"item": 0, "row": 0, "share": 1.0, "kind": "exact"},
        {"item": 1, "row": 0, "share": 1.0, "kind": "other numbers"},
    ]
    assert [example["test_text"] for example in addsub["examples"]] == [STORY.format(1, 2), STORY.format(5, 6)]
    assert {example["training_text"] for example in addsub["examples"]} == {STORY.format(1, 2)}


def test_data_check_of_what_a_recipe_trains_on(data_dir, tmp_path, capsys):
    """The way for a file with columns of other names, which the command line has no option for."""
    rows = [{"question": STORY.format(1, 2), "reply": "3"}]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    (tmp_path / "own.toml").write_text(
        f"""[model]
name = "smollm2-135m"
[data]
path = "{tmp_path}/own.json"
columns = {{ instruction = "question", output = "reply" }}
"""
    )
    assert main(["data", "check", str(tmp_path / "own.toml"), "addsub", "--json", "--data-dir", str(data_dir)]) == 0
    assert json.loads(capsys.readouterr().out)["addsub"]["num_exact"] == 1
    rows = [
        {"question": STORY.format(1, 2), "reply": ""},
        {"question": ""},
        ["no row"],
    ]  # the answers are not looked at
    (tmp_path / "own.json").write_text(json.dumps(rows))
    assert main(["data", "check", str(tmp_path / "own.json"), "addsub", "--json", "--data-dir", str(data_dir)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["addsub"]["num_exact"] == 1
    assert "2 rows could not be read and are left out; the first:" in err
    assert 'row 1: column "question" is blank' in " ".join(err.split())
    (tmp_path / "own.json").write_text(json.dumps([{"words": "x"}]))
    assert main(["data", "check", str(tmp_path / "own.json"), "addsub", "--data-dir", str(data_dir)]) == 2
    assert "Rename them, or name them in the recipe, under [data]" in capsys.readouterr().err


def test_data_check_for_a_person(data_dir, capsys):
    escape = STORY.replace("Ann", "A\x1b[31mnn")
    write(data_dir / TRAINING_SETS["math10k"].path, [escape.format(1, 2)])
    write(data_dir / TASKS["addsub"].file.path, [escape.format(1, 2), escape.format(5, 6), "How many are 3 kites?"])
    assert main(["data", "check", "math10k", "addsub", "--data-dir", str(data_dir)]) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("addsub  "))
    assert line.split() == ["addsub", "3", "1", "1", "0", "1", "1"]
    assert "addsub item 1, training row 0: 100% of its words, other numbers" in printed
    assert "gave 6 of them" in " ".join(printed.split())
    assert "\x1b" not in printed
    assert "\\x1b[31m" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["math10", "gsm8k"], 'unknown training set; did you mean "math10k"'),
        (["nowhere.json", "gsm8k"], '"nowhere.json": no such file'),
        (["math10k", "gsm9k"], 'did you mean "gsm8k"'),
        (["wordproblems", "gsm8k", "--data-dir", "nowhere"], "no such data folder"),
        ([".", "wordproblems"], "is a folder; name a file in it"),
        (["nowhere.toml", "wordproblems"], "nowhere.toml: no such"),
    ],
)
def test_mistakes_end_with_status_2(arguments, message, capsys):
    assert main(["data", "check", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


# --- against all test sets that are here -----------------------------------------------------------------------------------


def test_all_local_test_sets_are_looked_through(data_dir, no_download):
    training = DataSet(read_rows(data_dir / TRAINING_SETS["math10k"].path).rows, "train")
    found, faults = local_overlaps(training, data_dir)
    assert faults == []
    assert {name: (overlap.num_exact, overlap.num_near, overlap.num_items) for name, overlap in found.items()} == {
        "addsub": (1, 1, 3),
        "svamp": (0, 0, 1),
        "wordproblems": (0, 0, TASKS["wordproblems"].num_items),
    }


def test_test_sets_that_cannot_be_read_are_reported_once_each(data_dir, tmp_path, no_download):
    training = DataSet(rows(STORY.format(1, 2)), "train")
    (data_dir / TASKS["svamp"].file.path).write_text("[{")
    found, (fault,) = local_overlaps(training, data_dir)
    assert "SVAMP" in fault
    assert "not valid JSON" in fault
    assert set(found) == {"addsub", "wordproblems"}
    found, faults = local_overlaps(training, tmp_path / "nowhere")
    assert faults == [f"{tmp_path / 'nowhere'}: no such data folder (given by --data-dir or QDENSE_DATA)"]
    assert set(found) == {"wordproblems"}


def test_every_benchmark_has_its_test_set_and_no_other():
    assert {name: task.file for name, task in TASKS.items()} == TEST_SETS


# --- at the start of training -----------------------------------------------------------------------------------------------


def warnings_of_training(monkeypatch, tmp_path, data_dir, **data):
    """What `train` says before it would load the base."""

    def stop(*arguments, **options):
        raise RunError("far enough")

    monkeypatch.setattr(run_module, "load_base", stop)
    tables = {
        "model": {"name": "smollm2-135m"},
        "data": {"validation_rows": 0, **data},
        "training": {"keep": "last"},
        "output": {"dir": str(tmp_path / "run")},
    }
    events = []
    with pytest.raises(RunError, match="far enough"):
        run_module.train(recipe_from_tables(tables, source="test"), resume=False, data_dir=data_dir, emit=events.append)
    return [event.text for event in events if isinstance(event, Notice) and event.level == "warning"]


def test_training_on_a_known_set_warns(data_dir, tmp_path, monkeypatch, no_download):
    (warning,) = warnings_of_training(monkeypatch, tmp_path, data_dir, name="math10k")
    assert "math10k contains test items of addsub (1 exact, 1 near of 3)" in warning
    assert "qdense evaluate --clean" in warning
    assert "svamp" not in warning, "it is clean"


def test_training_says_nothing_of_a_clean_set_or_a_file(data_dir, tmp_path, monkeypatch, no_download):
    path = data_dir / TRAINING_SETS["math10k"].path
    assert warnings_of_training(monkeypatch, tmp_path, data_dir, path=str(path)) == []
    write(path, ["Nothing of the kind."])
    assert warnings_of_training(monkeypatch, tmp_path, data_dir, name="math10k") == []
    assert warnings_of_training(monkeypatch, tmp_path, None, name="wordproblems") == []


def test_a_faulty_test_file_does_not_stop_training(data_dir, tmp_path, monkeypatch, no_download):
    (data_dir / TASKS["svamp"].file.path).write_text("[{")
    held, fault = warnings_of_training(monkeypatch, tmp_path, data_dir, name="math10k")
    assert "addsub (1 exact" in held
    assert "SVAMP" in fault
    assert "not valid JSON" in fault
    (fault,) = warnings_of_training(monkeypatch, tmp_path, tmp_path / "nowhere", name="wordproblems")
    assert "no such data folder" in fault


def test_a_cached_test_file_is_used_only_if_whole(no_download):
    cached = write(cache_dir("data", "dataset", "X", "test.json"), ["A question"])
    whole = UpstreamFile("dataset/X/test.json", git_blob_id(cached))
    assert local_test_set(whole, None).rows[0].instruction == "A question"
    cached.write_text("[]")
    assert local_test_set(whole, None) is None
    assert cached.exists()
    assert local_test_set(UpstreamFile("dataset/Y/test.json", whole.blob_id), None) is None


def test_several_tests_at_once(sets):
    training, test = sets
    found = overlaps(training, {"a": test, "b": DataSet(rows("Who?"), "other")})
    assert {name: overlap.clean_indices for name, overlap in found.items()} == {"a": [1], "b": [0]}
