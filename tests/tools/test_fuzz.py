"""Bad input: the quick part of tools/fuzz.py, and every fault that it has found."""

import gzip
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdense.benchmarks.evaluate import EvaluationRequest, evaluate
from qdense.benchmarks.results import read_completions
from qdense.benchmarks.tasks import TASKS
from qdense.data.rows import read_rows
from qdense.errors import AdapterError, DataError, EvaluationError, RecipeError
from qdense.events import ignore
from qdense.inference.generation import DECODINGS
from qdense.modeling.adapter_files import AdapterCard, load_adapter, read_card, save_adapter
from qdense.modeling.attach import attach_adapter
from qdense.modeling.load import load_base
from qdense.recipe import AdapterRecipe, ModelRecipe, load_recipe
from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import fuzz

CASES = {"recipes": 150, "experiments": 100, "data": 150, "conversations": 100, "completions": 150, "adapters": 80}


@pytest.mark.parametrize("kind", CASES)
def test_mutated_files_are_refused_well_or_read_right(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path / "cache"))
    found, _ = fuzz.fuzz(kind, range(CASES[kind]), seed=11, keep=tmp_path / "kept")
    faults = [path.read_text() for path in tmp_path.glob("kept/*/outcome.txt")]
    assert not faults, faults[0]
    assert found[fuzz.REFUSED] > 0
    assert found[fuzz.ACCEPTED] > 0
    assert found.total() == found[fuzz.REFUSED] + found[fuzz.ACCEPTED]


def test_the_fuzzer_sees_faults(tmp_path, monkeypatch):
    """It can fail: an exception of another kind, a message without a place, a hang, memory, also memory refused politely."""

    def outcome(check):
        return fuzz.outcome_of(check, tmp_path)[0]

    def misplaced():
        raise DataError("something is wrong somewhere")

    def greedy():
        return len(b"x" * (3 * 2**29))

    def greedy_and_polite():
        try:
            bytes(2**40)
        except MemoryError:
            raise DataError(f"{tmp_path}: cannot be read") from None

    assert outcome(lambda: None) == fuzz.ACCEPTED
    assert outcome(lambda: 1 // 0) == fuzz.TRACEBACK
    assert outcome(misplaced) == fuzz.NO_PLACE
    assert outcome(greedy) == fuzz.MEMORY
    assert outcome(greedy_and_polite) == fuzz.MEMORY
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert outcome(lambda: time.sleep(3)) == fuzz.HANG


# --- faults that it has found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_numbers_of_thousands_of_digits(tmp_path, suffix):
    (tmp_path / f"rows{suffix}").write_text('[{"instruction": ' + "9" * 5000 + "}]")
    with pytest.raises(DataError, match=r"rows\.json.*not readable JSON: Exceeds the limit"):
        read_rows(tmp_path / f"rows{suffix}")


@pytest.mark.parametrize(
    ("suffix", "content", "place"),
    [
        (".json", '[{"instruction": "a", "output": "b", "output": "c"}]', "rows.json: .*key"),
        (".jsonl", '\n{"instruction": "a", "output": "b", "output": "c"}', "rows.jsonl, line 2: .*key"),
        (".csv", "instruction,output,output\na,b,c", "rows.csv, line 1: the column"),
    ],
)
def test_what_appears_twice(tmp_path, suffix, content, place):
    (tmp_path / f"rows{suffix}").write_text(content)
    with pytest.raises(DataError, match=rf'{place} "output" appears twice'):
        read_rows(tmp_path / f"rows{suffix}")


def test_numbers_of_thousands_of_digits_in_a_recipe(tmp_path):
    (tmp_path / "r.toml").write_text("[training]\nseed = " + "9" * 5000)
    with pytest.raises(RecipeError, match=r"r\.toml: not valid TOML: Exceeds the limit"):
        load_recipe(tmp_path / "r.toml")
    demo = ROOT / "recipes" / "demo.toml"
    with pytest.raises(RecipeError, match=r"training\.seed = "):
        load_recipe(demo, ["training.seed=" + "9" * 5000])


def test_bombs_are_not_unpacked(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name, content in (("spaces", b" " * 2**29), ("objects", b"[" + b"{}," * 2**24)):
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(content, 1))
        with pytest.raises(DataError, match=rf"{name}\.json\.gz: unpacks to more than \d+ MiB"):
            read_rows(tmp_path / f"{name}.json.gz")
    for num_rows in (1_000, 40_000):  # of one value, which the file holds once
        table = pyarrow.Table.from_pylist([{"instruction": "x" * 1000, "output": "y"}] * num_rows)
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        if num_rows == 1_000:
            assert len(read_rows(tmp_path / "rows.parquet").rows) == num_rows
        else:
            with pytest.raises(DataError, match=r"rows\.parquet: unpacks to more than 16 MiB"):
                read_rows(tmp_path / "rows.parquet")


def test_packed_text_is_read(tmp_path):
    """Rows as people write them are packed to a tenth at best."""
    rows = [{"instruction": f"Please answer with true or false, question: is {n} more than {n // 3}?", "output": "the correct "
             f"answer is {n % 2 == 0}"} for n in range(60_000)]  # fmt: skip
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert len(read_rows(tmp_path / "rows.jsonl.gz").rows) == 60_000


def test_large_values_that_parquet_holds_once(tmp_path):
    """380 KB that took 4 GiB of memory before their size was checked."""
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, "int32"), ["x" * 2**22])
    table = pyarrow.table({"instruction": texts, "output": texts})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", store_schema=False)

    def check():
        with pytest.raises(DataError, match=r"rows\.parquet: unpacks to more than"):
            read_rows(tmp_path / "rows.parquet")

    assert fuzz.outcome_of(check, tmp_path) == (fuzz.ACCEPTED, "")


def test_a_parquet_file_with_an_unknown_time_zone(tmp_path):
    import pyarrow
    import pyarrow.parquet

    when = pyarrow.array([0], pyarrow.timestamp("s", "Foo/Bar"))
    pyarrow.parquet.write_table(
        pyarrow.table({"instruction": ["a"], "output": ["b"], "when": when}), tmp_path / "r.parquet"
    )
    with pytest.raises(DataError, match=r"r\.parquet: not a readable Parquet file: .*Foo/Bar"):
        read_rows(tmp_path / "r.parquet")


def test_a_folder_in_place_of_completions(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read: Is a directory"):
        read_completions(tmp_path, 3)


@pytest.fixture(scope="module")
def bare_evaluation(tiny_model, tmp_path_factory):
    """(request, folder) of a short evaluation of the base."""
    request = EvaluationRequest(
        [TASKS["wordproblems"]], None, {"name": str(tiny_model), "device": "cpu"}, with_base=False,
        decoding=DECODINGS["greedy"], limit=1, max_new_tokens=1, batch_size=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("evaluation"))
        yield request, Path(evaluate(request, ignore)["folder"]).absolute()


@pytest.mark.parametrize(
    ("key", "value"), [("finish", []), ("finish", None), ("num_tokens", "x"), ("num_prompt_tokens", None)]
)
def test_completions_of_an_earlier_start_of_wrong_types(bare_evaluation, key, value):
    request, folder = bare_evaluation
    path = folder / "wordproblems.jsonl"
    whole = path.read_text()
    path.write_text(whole + json.dumps(json.loads(whole) | {"index": 1, key: value}) + "\n")
    try:
        with pytest.raises(
            EvaluationError,
            match=rf"wordproblems\.jsonl, line 2: not a completion as qdense writes them \({key} must be",
        ):
            evaluate(request, ignore)
    finally:
        path.write_text(whole)
    evaluate(request, ignore)


def test_damaged_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"instruction": "a", "output": "b"}] * 9), tmp_path / "r.parquet"
    )
    content = (tmp_path / "r.parquet").read_bytes()
    assert len(read_rows(tmp_path / "r.parquet").rows) == 9
    read, refusals = [], []
    for at in range(4, len(content) - 8, 7):
        (tmp_path / "r.parquet").write_bytes(content[:at] + b"\xff\xff\xff" + content[at + 3 :])
        try:
            read.append(read_rows(tmp_path / "r.parquet").rows)
        except DataError as error:  # anything else fails the test
            refusals.append(str(error))
    assert all(f"{tmp_path / 'r.parquet'}: " in refusal for refusal in refusals)
    assert len(refusals) > 4 * len(read)  # where nothing is checked, text is other text
    assert refusals
    assert all(len(rows) == 9 for rows in read)


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """(fresh base, folder of a sound adapter)"""

    def base():
        return load_base(ModelRecipe(name=str(tiny_model), device="cpu", quantization="none"))

    folder = tmp_path_factory.mktemp("adapters") / "sound"
    fresh = base()
    card = AdapterCard({"name": str(tiny_model)}, fresh.fingerprint, "alpaca", "lora")
    save_adapter(attach_adapter(fresh, AdapterRecipe(method="lora", r=4), 1), folder, card)
    return base, folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: torch.full_like(tensor, float("nan")), "holds NaN or infinite"),
        (lambda tensor: torch.full_like(tensor, float("inf")), "holds NaN or infinite"),
        (lambda tensor: torch.full_like(tensor, 1e38), r"holds values up to .*e\+3\d, .*damaged"),
        (lambda tensor: tensor.to(torch.int32), r"holds torch\.int32; .*float32, bfloat16 or float16"),
        (lambda tensor: tensor.double(), r"holds torch\.float64"),
        (lambda tensor: tensor.float(), r"several dtypes: torch\.bfloat16, torch\.float32"),
        (lambda tensor: tensor[:1], "does not fit"),
    ],
)
def test_tensors_that_no_adapter_has(saved, tmp_path, change, message):
    base, sound = saved
    shutil.copytree(sound, tmp_path / "a")
    tensors = load_file(sound / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: change(tensors[name]).contiguous()}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message):
        load_adapter(base(), tmp_path / "a", read_card(tmp_path / "a"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: torch.full_like(tensor, float("nan")), "holds NaN or infinite"),
        (lambda tensor: tensor.to(torch.int32), r"holds torch\.int32"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), r"holds torch\.float8_e4m3fn"),
    ],
)
def test_tensors_that_no_whole_model_has(saved, tmp_path, change, message):
    """A fully fine-tuned model: its weights replaced the base's, whatever they were."""
    base, _ = saved
    fresh = base()
    card = AdapterCard({"name": fresh.name, "quantization": "none"}, fresh.fingerprint, "alpaca", "full")
    save_adapter(fresh.model, tmp_path / "a", card)
    load_adapter(base(), tmp_path / "a", card)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    name = sorted(tensors)[-1]
    save_file(tensors | {name: change(tensors[name])}, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=rf"{name} {message}"):
        load_adapter(base(), tmp_path / "a", card)


def test_a_card_that_names_another_method(tiny_model, tmp_path):
    """PEFT's LoKr fails on NF4 unless it is mended, which depended on the card: it loaded, and broke at first use."""

    def base():
        return load_base(ModelRecipe(name=str(tiny_model), device="cpu"))

    fresh = base()
    card = AdapterCard({"name": fresh.name}, fresh.fingerprint, "alpaca", "lora")
    save_adapter(attach_adapter(fresh, AdapterRecipe(method="lokr", r=4), 1), tmp_path, card)
    with torch.no_grad():
        assert load_adapter(base(), tmp_path, card)(torch.arange(5)[None]).logits.isfinite().all()


def test_an_unknown_template_is_named_with_its_adapter(saved, tmp_path):
    _, sound = saved
    shutil.copytree(sound, tmp_path / "a")
    path = tmp_path / "a" / "qdense.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"template": "alpacca"}))
    request = EvaluationRequest([TASKS["wordproblems"]], tmp_path / "a", {}, with_base=False)
    with pytest.raises(AdapterError, match=r'/a: unknown template "alpacca".*--template'):
        evaluate(request, ignore)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 200_000, r"adapter_config\.json: r = 200000: no tensor"),
        ("rank_pattern", {"q_proj": 200_000}, r"adapter_config\.json: q_proj = 200000: no tensor"),
        ("lora_alpha", float("inf"), r"lora_alpha = inf: must be a finite number"),
        ("alora_invocation_tokens", "/etc/passwd", "an activated LoRA"),
        ("peft_type", ["LORA"], "known: ADALORA"),
        ("target_modules", {"a": {}}, "does not fit"),
    ],
)
def test_configurations_of_wrong_types(saved, tmp_path, key, value, message):
    base, sound = saved
    shutil.copytree(sound, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(AdapterError, match=message):
        load_adapter(base(), tmp_path / "a", read_card(tmp_path / "a"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a":' * 100_000, "not a readable adapter card"),
        ('{"model": "llama", "fingerprint": null, "template": "alpaca", "method": "lora"}', "model must be an object"),
        (
            '{"model": {}, "fingerprint": 3, "template": "alpaca", "method": []}',
            "fingerprint must be .*; method must be",
        ),
    ],
)
def test_cards_of_wrong_types(saved, tmp_path, content, message):
    _, sound = saved
    shutil.copytree(sound, tmp_path / "a")
    (tmp_path / "a" / "qdense.json").write_text(content)
    with pytest.raises(AdapterError, match=rf"qdense\.json: .*{message}"):
        read_card(tmp_path / "a")


def test_sessions_that_are_no_list(bare_evaluation):
    request, folder = bare_evaluation
    whole = (folder / "sessions.json").read_text()
    (folder / "sessions.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"sessions\.json: damaged"):
        evaluate(request, ignore)
    (folder / "sessions.json").write_text(whole)
