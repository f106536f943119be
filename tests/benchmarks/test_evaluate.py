"""Evaluation on a tiny LLaMA: its files, resuming a killed one, and which adapters it accepts."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qdense.benchmarks import completions as completions_module
from qdense.benchmarks import local_model as local_model_module
from qdense.benchmarks.evaluate import EvaluationRequest, evaluate
from qdense.benchmarks.tasks import TASKS, load_items, tasks_named
from qdense.cli import main
from qdense.data.rows import Columns
from qdense.errors import AdapterError, DataError, EvaluationError, QDenseError
from qdense.events import EvaluationProgress, Notice
from qdense.inference import loaded as loaded_module
from qdense.inference.generation import DECODINGS, generate
from qdense.modeling.adapter_files import AdapterCard, load_adapter, save_adapter
from qdense.modeling.attach import attach_adapter, trainable_parameters
from qdense.modeling.load import load_base
from qdense.recipe import AdapterRecipe, ModelRecipe
from tests.helpers.memory import refuse_memory
from tests.helpers.runs import recipe_for
from tests.helpers.runs import run as train_run


@pytest.fixture(scope="module")
def finished_run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_run(recipe_for(tiny_model, folder, training__max_steps=4))
    return folder


def request_for(adapter, **changes):
    settings = {
        "tasks": [TASKS["wordproblems"]],
        "adapter": adapter,
        "model": {},
        "with_base": False,
        "decoding": DECODINGS["greedy"],
        "limit": 10,
        "max_new_tokens": 5,
        "batch_size": 4,
    }
    return EvaluationRequest(**(settings | changes))


def ignore(event):
    pass


def files(summary):
    return {path.name: path.read_text() for path in sorted(Path(summary["folder"]).glob("[!.]*"))}


def test_summary_and_completions(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events = []
    summary = evaluate(request_for(finished_run, with_base=True), events.append)
    for scored in (summary, summary["base"]):
        task = scored["tasks"]["wordproblems"]
        assert (task["num_items"], task["num_scored"]) == (10, 10)
        for rule in ("paper", "strict"):
            assert 0 <= task[rule]["interval"][0] <= task[rule]["accuracy"] <= task[rule]["interval"][1] <= 1
        assert scored["average"]["paper"] == task["paper"]["accuracy"]
    assert str(finished_run / "eval") in summary["folder"]
    assert "runs/base-tiny/eval" in summary["base"]["folder"]
    written = files(summary)
    assert set(written) == {"items.json", "sessions.json", "settings.json", "summary.json", "wordproblems.jsonl"}
    lines = [json.loads(line) for line in written["wordproblems.jsonl"].splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(10))
    assert all(line["num_tokens"] <= 5 and line["finish"] in ("eos", "length") for line in lines)
    assert task["num_truncated"] == task["finish"]["length"] == sum(line["finish"] == "length" for line in lines)
    items = json.loads(written["items.json"])["wordproblems"]
    assert items["index"] == list(range(10))
    assert sum(items["strict"]) == task["strict"]["num_correct"]
    for key in ("dtype", "batch_size", "device", "versions", "template", "stop"):
        assert summary[key], key
    (session,) = summary["sessions"]
    assert session == json.loads(written["sessions.json"])[0]
    for key in ("stored_as", "batch_sizes", "git_hash", "started"):
        assert session[key], key
    progress = [event for event in events if isinstance(event, EvaluationProgress)]
    assert [event.num_done for event in progress if event.column == "adapter"] == list(range(11))
    assert [event.column for event in progress] == ["base"] * 11 + ["adapter"] * 11


def test_a_bare_base_equals_the_base_under_an_adapter(finished_run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    under = evaluate(request_for(finished_run, with_base=True), ignore)["base"]
    first = files(under)["wordproblems.jsonl"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    bare = evaluate(request_for(None, model={"name": str(tiny_model)}), ignore)
    assert files(bare)["wordproblems.jsonl"] == first
    assert bare["folder"] == under["folder"]


def lines_of(summary):
    """Completions by item, whatever order they came in."""
    lines = [json.loads(line) for line in files(summary)["wordproblems.jsonl"].split("\n")[:-1]]
    return {(line["index"], line["sample"]): line for line in lines}


@pytest.mark.parametrize("decoding", ["greedy", "beam4", "sample"])
def test_a_killed_evaluation_goes_on_and_generates_nothing_twice(tiny_model, tmp_path, monkeypatch, decoding):
    monkeypatch.chdir(tmp_path)
    model = {"name": str(tiny_model), "quantization": "none", "dtype": "float32"}
    request = request_for(
        None, model=model, decoding=replace(DECODINGS[decoding], num_samples=1 + (decoding == "sample"))
    )
    summary = evaluate(request, ignore)
    whole, results = lines_of(summary), summary["tasks"]
    shutil.rmtree(tmp_path / "runs")
    asked = []

    def dying(base, model, prompts, *args, **kwargs):
        asked.append([(prompt.index, prompt.sample) for prompt in prompts])
        for number, completion in enumerate(generate(base, model, prompts, *args, **kwargs)):
            if number == 6 and len(asked) == 1:
                raise KeyboardInterrupt
            yield completion

    monkeypatch.setattr(local_model_module, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(request, ignore)
    path = next((tmp_path / "runs").glob("*/eval/*/wordproblems.jsonl"))
    on_file = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(on_file) == 6
    with path.open("a") as stream:
        stream.write('{"index": 9, "compl')  # cut short by the kill
    resumed = evaluate(request, ignore)
    assert set(asked[1]) == set(whole) - {(line["index"], line["sample"]) for line in on_file}
    assert lines_of(resumed) == whole
    assert resumed["tasks"] == results
    assert lines_of(evaluate(request, ignore)) == whole
    assert len(asked) == 2  # nothing was left to ask


def test_any_character_in_a_completion_survives_a_resume(finished_run, monkeypatch):
    shutil.rmtree(finished_run / "eval", ignore_errors=True)

    def odd(*args, **kwargs):
        return [replace(completion, completion="a\u2028b\u0085c\n7") for completion in generate(*args, **kwargs)]

    monkeypatch.setattr(local_model_module, "generate", odd)
    first = lines_of(evaluate(request_for(finished_run), ignore))
    assert lines_of(evaluate(request_for(finished_run), ignore)) == first
    shutil.rmtree(finished_run / "eval")


def test_other_settings_go_elsewhere(finished_run):
    sample = replace(DECODINGS["sample"], num_samples=1)
    decodings = [
        DECODINGS["greedy"], DECODINGS["beam4"], sample, replace(sample, num_samples=2), replace(sample, seed=1),
        replace(sample, temperature=0.6), replace(sample, top_p=0.9),
    ]  # fmt: skip
    changes = [
        *({"decoding": decoding} for decoding in decodings),
        {"max_new_tokens": 4},
        {"limit": 5},
        {"batch_size": 2},
        {"template": "llm-adapters"},
    ]
    folders = [evaluate(request_for(finished_run, **changed), ignore)["folder"] for changed in changes]
    assert len(set(folders)) == len(changes)
    assert evaluate(request_for(finished_run), ignore)["folder"] == folders[0]


def test_another_adapter_or_other_data_in_the_same_place_go_elsewhere(finished_run, tmp_path, fixtures):
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    shutil.copytree(fixtures, tmp_path / "data")
    request = request_for(tmp_path / "run", tasks=tasks_named("multiarith"), data_dir=tmp_path / "data", limit=2)
    folders = [evaluate(request, ignore)["folder"]]
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    state = load_file(weights)
    name = next(name for name in state if name.endswith("decoder"))
    state[name] = state[name].clone()
    state[name][0, 0] += 0.25
    save_file(state, weights)
    folders.append(evaluate(request, ignore)["folder"])
    test_file = tmp_path / "data" / TASKS["multiarith"].file.path
    rows = json.loads(test_file.read_text())
    rows[0]["instruction"] += " Now."
    test_file.write_text(json.dumps(rows))
    folders.append(evaluate(request, ignore)["folder"])
    assert len(set(folders)) == 3


def test_each_session_is_recorded_separately(finished_run, tmp_path, monkeypatch):
    """Two commits of qdense, two batch sizes, weights stored in two ways: all are recorded, and the mix is reported."""
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    request = request_for(tmp_path / "run")
    monkeypatch.setattr(completions_module, "git_hash", lambda: "first")
    first = evaluate(request, ignore)
    path = Path(first["folder"]) / "wordproblems.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    monkeypatch.setattr(completions_module, "git_hash", lambda: "second")
    scarce = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: scarce)  # so the weights stay packed
    events = []
    second = evaluate(request, events.append)
    assert second["folder"] == first["folder"]
    assert [session["git_hash"] for session in second["sessions"]] == ["first", "second"]
    assert [session["stored_as"] for session in second["sessions"]] == ["bfloat16, with NF4's values", "nf4"]
    assert (
        sum("completions made by qdense at first; continuing at second" in getattr(e, "text", "") for e in events) == 1
    )
    assert lines_of(second) == lines_of(first)  # bit for bit the same, held in either way
    events.clear()
    assert evaluate(request, events.append)["sessions"] == second["sessions"]  # nothing was left to complete
    assert not any("continuing at" in getattr(event, "text", "") for event in events)


def test_a_corrupted_completion_file_is_named(finished_run):
    folder = evaluate(request_for(finished_run, limit=3), ignore)["folder"]
    with open(f"{folder}/wordproblems.jsonl", "a") as stream:
        stream.write("oops\n")
    with pytest.raises(EvaluationError, match="line 4: not a completion as qdense writes them"):
        evaluate(request_for(finished_run, limit=3), ignore)


def test_completions_of_items_that_were_not_asked_for_are_named(finished_run):
    folder = evaluate(request_for(finished_run, limit=2), ignore)["folder"]
    path = Path(folder) / "wordproblems.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps(line | {"index": 1_000_000}) + "\n")
    with pytest.raises(EvaluationError, match=r"wordproblems\.jsonl: holds index 1000000, sample 0, which"):
        evaluate(request_for(finished_run, limit=2), ignore)


def test_an_adapter_of_another_base_is_refused(finished_run, other_tiny_model):
    with pytest.raises(AdapterError, match=r"made for another base .* differs from it in: weights"):
        evaluate(request_for(finished_run, model={"name": str(other_tiny_model)}), ignore)


def test_the_same_base_elsewhere_is_accepted(finished_run, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "moved")
    summary = evaluate(request_for(finished_run, model={"name": str(tmp_path / "moved")}), ignore)
    assert summary["tasks"]["wordproblems"]["num_scored"] == 10


def test_an_adapter_made_by_peft_alone_is_scored_with_a_warning(tiny_model, tmp_path):
    base = load_base(ModelRecipe(name=str(tiny_model), device="cpu"))
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base.model, config).save_pretrained(tmp_path / "lora")
    events = []
    summary = evaluate(request_for(tmp_path / "lora", model={"name": str(tiny_model)}), events.append)
    assert any(isinstance(event, Notice) and "no qdense.json" in event.text for event in events)
    assert summary["folder"].startswith(str(tmp_path / "lora" / "eval"))


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("nf4", torch.float32), ("int8", torch.bfloat16), ("none", torch.float32)]
)
def test_an_adapter_is_loaded_in_the_dtype_it_was_saved_in(tiny_model, tmp_path, quantization, dtype):
    recipe = ModelRecipe(name=str(tiny_model), quantization=quantization, device="cpu")
    torch.manual_seed(0)
    base = load_base(recipe)
    model = attach_adapter(base, AdapterRecipe(r=4, dtype=str(dtype).removeprefix("torch.")), 1)
    for _, parameter in trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.02)
    card = AdapterCard(model={}, fingerprint=base.fingerprint, template="alpaca", method="denselora")
    save_adapter(model, tmp_path, card)
    loaded = load_adapter(load_base(recipe), tmp_path, card)
    wanted = dict(trainable_parameters(model))
    found = {name: parameter for name, parameter in loaded.named_parameters() if name in wanted}
    assert {parameter.dtype for parameter in found.values()} == {dtype}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


def test_adapters_that_cannot_be_read(finished_run, tmp_path):
    with pytest.raises(AdapterError, match="no such run or adapter"):
        evaluate(request_for(tmp_path / "none"), ignore)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(AdapterError, match="not finished"):
        evaluate(request_for(tmp_path / "empty"), ignore)
    shutil.copytree(finished_run, tmp_path / "broken")
    (tmp_path / "broken" / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(QDenseError, match="does not fit"):
        evaluate(request_for(tmp_path / "broken"), ignore)
    saved = load_file(finished_run / "adapter" / "adapter_model.safetensors")
    saved.pop("base_model.denselora_shared.v_proj.decoder")
    save_file(saved, tmp_path / "broken" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"1 missing .*v_proj.decoder.*, 0 unexpected"):
        evaluate(request_for(tmp_path / "broken"), ignore)
    (tmp_path / "broken" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model.safetensors"):
        evaluate(request_for(tmp_path / "broken"), ignore)
    (tmp_path / "broken" / "adapter" / "qdense.json").write_text("{")
    with pytest.raises(AdapterError, match="not a readable adapter card"):
        evaluate(request_for(tmp_path / "broken"), ignore)


def test_labels_that_are_not_answers_are_named(tmp_path):
    path = tmp_path / "dataset" / "AQuA" / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{"instruction": "x", "answer": "A"}, {"instruction": "y", "answer": "F"}]))
    with pytest.raises(QDenseError, match=r'row 1: "F" cannot be an answer of aqua'):
        evaluate(request_for(None, tasks=[TASKS["aqua"]], data_dir=tmp_path), ignore)


def test_the_seven_tasks_without_real_data_here(tiny_model, fixtures, tmp_path, monkeypatch):
    """From file to score, on our own fixtures: untested on the real files."""
    monkeypatch.chdir(tmp_path)
    tasks = tasks_named("MultiArith,SingleEq,mathqa,social_i_qa,hellaswag,ARC-Easy,openbookqa")
    model = {"name": str(tiny_model), "quantization": "none"}
    summary = evaluate(request_for(None, tasks=tasks, model=model, data_dir=fixtures), ignore)
    assert list(summary["tasks"]) == ["multiarith", "singleeq", "mathqa", "siqa", "hellaswag", "arc-e", "obqa"]
    for name, result in summary["tasks"].items():
        assert (result["num_items"], result["num_scored"]) == (4, 4), name
        lines = (Path(summary["folder"]) / f"{name}.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["index"] for line in lines) == [0, 1, 2, 3]


def test_clean_items_are_scored_by_themselves(finished_run, tmp_path):
    """The run was trained on wordproblems, whose test set shares no sentence with it; of this file, two rows do."""
    rows = load_items(TASKS["wordproblems"], None).rows
    leaky = [{"instruction": rows[i].instruction.upper() + "\n ", "output": "x"} for i in (3, 7)]
    (tmp_path / "leaky.json").write_text(json.dumps(leaky))
    summary = evaluate(request_for(finished_run, clean=True, trained_on=str(tmp_path / "leaky.json")), ignore)
    items = json.loads(files(summary)["items.json"])["wordproblems"]
    clean = summary["tasks"]["wordproblems"]["clean"]
    assert clean["num_items"] == 8
    assert clean["paper"]["num_correct"] == sum(items["paper"][i] for i in range(10) if i not in (3, 7))
    own = evaluate(request_for(finished_run, clean=True), ignore)["tasks"]["wordproblems"]["clean"]
    assert own["num_items"] == 10


def test_clean_needs_to_know_what_the_model_was_trained_on(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match="name the training set with --trained-on"):
        evaluate(request_for(None, model={"name": str(tiny_model)}, clean=True), ignore)


def test_out_of_memory_halves_the_batch_and_loses_nothing(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"name": str(tiny_model), "quantization": "none", "dtype": "float32"}
    whole = lines_of(evaluate(request_for(None, model=model), ignore))
    shutil.rmtree(tmp_path / "runs")
    refused = refuse_memory(monkeypatch, lambda model, input_ids: input_ids.shape[1] == 1 and len(input_ids) > 2)
    events = []
    summary = evaluate(request_for(None, model=model, batch_size=8), events.append)
    assert lines_of(summary) == whole
    assert refused == [8, 4]
    assert summary["sessions"][0]["batch_sizes"] == [8, 4, 2]
    assert [e.text for e in events if isinstance(e, Notice) and e.level == "warning"] == [
        "out of memory: continuing with 4 at a time; finished completions are kept",
        "out of memory: continuing with 2 at a time; finished completions are kept",
    ]


def test_the_batch_is_as_large_as_the_memory_allows(finished_run, monkeypatch):
    def settings_with(memory_bytes):
        monkeypatch.setattr(loaded_module, "memory_total", lambda device: memory_bytes)
        summary = evaluate(request_for(finished_run, batch_size=None, limit=2), ignore)
        return json.loads(files(summary)["settings.json"])["batch_size"]

    assert settings_with(64 * 2**30) == DECODINGS["greedy"].batch_size_cpu
    assert 1 < settings_with(1_250_000_000) < DECODINGS["greedy"].batch_size_cpu
    assert settings_with(2**20) == 1


# --- a user's own rows ------------------------------------------------------------------------------------------------------


def write_own(path, rows, names=("prompt", "completion")):
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_own_rows_are_scored_like_a_benchmark(tiny_model, tmp_path, monkeypatch):
    """The expected answer is what the model writes: then all are right, whatever their case; and two files pair by their rows."""
    monkeypatch.chdir(tmp_path)
    # drawn, and the same each time: the likeliest token of this model is always a line break
    options = {
        "decoding": replace(DECODINGS["sample"], num_samples=1, temperature=5.0),
        "limit": None,
        "max_new_tokens": 6,
    }
    questions = [f"How many are {i} and {i}?" for i in range(6)]
    own = write_own(tmp_path / "held out.jsonl", [(question, "?") for question in questions])
    first = evaluate(
        request_for(
            None,
            model={"name": str(tiny_model)},
            tasks=tasks_named(f"{own},wordproblems"),
            **options,
        ),
        ignore,
    )
    assert list(first["tasks"]) == ["held-out.jsonl", "wordproblems"]
    result = first["tasks"]["held-out.jsonl"]
    assert (result["num_items"], result["strict"]["num_correct"]) == (6, 0)
    lines = (Path(first["folder"]) / "held-out.jsonl.jsonl").read_text().splitlines()
    written = {line["index"]: line["completion"] for line in map(json.loads, lines)}
    assert len(written) == 6
    said = [(question, written[i].upper()) for i, question in enumerate(questions) if written[i].strip()]
    assert said, lines
    own = write_own(own, said)
    second = evaluate(
        request_for(None, model={"name": str(tiny_model)}, tasks=tasks_named(str(own)), **options),
        ignore,
    )
    assert second["folder"] != first["folder"]
    assert second["tasks"]["held-out.jsonl"]["strict"]["num_correct"] == len(said)


def test_own_numbers_are_read_as_numbers(tmp_path):
    (task,) = tasks_named(str(write_own(tmp_path / "a.jsonl", [("1 and 2?", "3"), ("2 and 2?", " 4.0 ")])))
    assert (task.answers.name, task.num_items) == ("number", 2)
    assert [row.answer for row in load_items(task, None).rows] == ["3", "4.0"]
    assert task.answers.is_correct("4.0", task.answers.answers("2 + 2 = 4.")["strict"])
    (task,) = tasks_named(str(write_own(tmp_path / "b.jsonl", [("1 and 2?", "3"), ("Who?", "Ann")])))
    assert task.answers.name == "text"


def test_columns_of_own_rows_come_from_their_names_or_from_the_run(tmp_path):
    odd = write_own(tmp_path / "a.csv", [])
    odd.write_text("ask,tell\nWho?,Ann\n")
    with pytest.raises(
        DataError, match=r'cannot tell which column .* Rename them "prompt" and "completion", or name a run'
    ):
        tasks_named(str(odd))
    (task,) = tasks_named(str(odd), Columns("ask", "input", "tell"))
    assert task.sample == ("Who?", "Ann")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none.jsonl", "none.jsonl: no such file"),
        ("gsm9k", 'unknown task "gsm9k"; did you mean "gsm8k"?'),
        ("a/x.jsonl,b/x.jsonl", "two files of one name"),
    ],
)
def test_own_files_that_cannot_be_used_are_reported(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_own(tmp_path / folder / "x.jsonl", [("q", folder)])
    with pytest.raises(QDenseError) as caught:
        tasks_named(text)
    assert message in str(caught.value)


def test_items_are_shown_with_what_the_model_answered_wrong_ones_first(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(finished_run / "eval", ignore_errors=True)
    rows = tmp_path / "rows.jsonl"
    arguments = ["evaluate", str(rows), "--adapter", str(finished_run), "--decoding", "greedy", "--max-new-tokens", "5"]

    def shown(expected, count):
        lines = [{"prompt": f"question {n}", "completion": text} for n, text in enumerate(expected)]
        rows.write_text("\n".join(map(json.dumps, lines)))
        assert main([*arguments, "--batch-size", "4", "--show", str(count), "--quiet"]) == 0
        return re.findall(
            r"item (\d): (\w+)\n  question (.*)\n  expected (.*)\n  answer   (.*)", capsys.readouterr().out
        )

    first = shown(["none of these", "none of these", "none of these"], 3)
    assert [(item[0], item[1], item[2], item[3]) for item in first] == [
        (str(n), "wrong", f"question {n}", "none of these") for n in range(3)
    ]
    assert main([*arguments, "--batch-size", "4", "--show", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert "question 0" in captured.err
    assert json.loads(captured.out)["tasks"]
    (kept,) = (finished_run / "eval").glob("*/*.jsonl")
    answers = {line["index"]: line["completion"] for line in map(json.loads, kept.read_text().splitlines())}
    assert [item[4].strip() for item in first] == [answers[n].strip() for n in range(3)]
    shutil.rmtree(finished_run / "eval")
