"""Evaluation on a tiny LLaMA: what it writes, that a killed one goes on, whose adapter it accepts."""

import json

import pytest
import torch
from conftest import make_tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_training import recipe_for
from test_training import run as train_run

from qdense.benchmarks import evaluate as evaluate_module
from qdense.benchmarks.evaluate import EvaluationRequest, evaluate, newest_run
from qdense.benchmarks.generation import DECODINGS, generate, plan_batches
from qdense.benchmarks.tasks import TASKS
from qdense.errors import AdapterError, EvaluationError, QDenseError
from qdense.events import EvaluationProgress, Notice
from qdense.modeling.adapter import AdapterCard, attach_adapter, load_adapter, save_adapter, trainable_parameters
from qdense.modeling.base import load_base
from qdense.recipe import AdapterRecipe, ModelRecipe


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
    from pathlib import Path

    return {path.name: path.read_text() for path in sorted(Path(summary["folder"]).iterdir())}


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
    assert set(written) == {"settings.json", "summary.json", "wordproblems.jsonl"}
    lines = [json.loads(line) for line in written["wordproblems.jsonl"].splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(10))
    assert all(line["num_tokens"] <= 5 and line["finish"] in ("eos", "length") for line in lines)
    assert task["num_truncated"] == sum(line["finish"] == "length" for line in lines)
    columns = [event.column for event in events if isinstance(event, EvaluationProgress)]
    assert columns == ["base"] * 4 + ["adapter"] * 4


def test_a_bare_base_equals_the_base_under_an_adapter(finished_run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    under = evaluate(request_for(finished_run, with_base=True), ignore)["base"]
    first = files(under)["wordproblems.jsonl"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    bare = evaluate(request_for(None, model={"name": str(tiny_model)}), ignore)
    assert files(bare)["wordproblems.jsonl"] == first
    assert bare["folder"] == under["folder"]


@pytest.mark.parametrize("decoding", ["greedy", "beam4"])
def test_a_killed_evaluation_goes_on_and_ends_the_same(finished_run, monkeypatch, decoding):
    import shutil

    request = request_for(finished_run, decoding=DECODINGS[decoding])
    shutil.rmtree(finished_run / "eval", ignore_errors=True)
    whole = files(evaluate(request, ignore))
    shutil.rmtree(finished_run / "eval")

    calls = []

    def dying(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr(evaluate_module, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(request, ignore)
    path = next((finished_run / "eval").glob("*/wordproblems.jsonl"))
    assert len(path.read_text().splitlines()) == 8
    with path.open("a") as stream:
        stream.write('{"index": 9, "compl')  # cut short by the kill
    calls.clear()
    calls.append(1)  # one more batch is all that may be generated
    monkeypatch.setattr(evaluate_module, "generate", lambda *a, **k: (calls.append(1), generate(*a, **k))[1])
    resumed = files(evaluate(request, ignore))
    assert len(calls) == 2
    assert resumed == whole


def test_any_character_in_a_completion_survives_a_resume(finished_run, monkeypatch):
    import shutil
    from dataclasses import replace

    shutil.rmtree(finished_run / "eval", ignore_errors=True)

    def odd(*args, **kwargs):
        return [replace(completion, completion="a\u2028b\u0085c\n7") for completion in generate(*args, **kwargs)]

    monkeypatch.setattr(evaluate_module, "generate", odd)
    first = files(evaluate(request_for(finished_run), ignore))
    assert files(evaluate(request_for(finished_run), ignore)) == first
    shutil.rmtree(finished_run / "eval")


def test_other_settings_go_elsewhere(finished_run):
    folders = {
        evaluate(request_for(finished_run, **changes), ignore)["folder"]
        for changes in ({}, {"max_new_tokens": 4}, {"decoding": DECODINGS["beam4"]}, {"limit": 5}, {"batch_size": 2})
    }
    assert len(folders) == 5


def test_a_corrupted_completion_file_is_named(finished_run):
    folder = evaluate(request_for(finished_run, limit=3), ignore)["folder"]
    with open(f"{folder}/wordproblems.jsonl", "a") as stream:
        stream.write("oops\n")
    with pytest.raises(EvaluationError, match="line 4: not a completion"):
        evaluate(request_for(finished_run, limit=3), ignore)


def test_an_adapter_of_another_base_is_refused(finished_run, other_tiny_model):
    with pytest.raises(AdapterError, match=r"made for another base .* differs from it in: weights"):
        evaluate(request_for(finished_run, model={"name": str(other_tiny_model)}), ignore)


def test_the_same_base_elsewhere_is_accepted(finished_run, tiny_model, tmp_path):
    import shutil

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
    model = attach_adapter(base, AdapterRecipe(r=4, dtype=str(dtype).removeprefix("torch.")))
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
    import shutil

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


def test_the_newest_finished_run(finished_run, tmp_path):
    import os
    import shutil

    with pytest.raises(AdapterError, match="no finished run"):
        newest_run(tmp_path)
    for name, age in (("old", 100), ("deeper/new", 0), ("older", 200)):
        shutil.copytree(finished_run, tmp_path / name)
        stamp = 2_000_000_000 - age
        os.utime(tmp_path / name / "adapter" / "adapter_config.json", (stamp, stamp))
    assert newest_run(tmp_path) == tmp_path / "deeper" / "new"


def test_labels_that_are_no_answers_are_named(tmp_path):
    path = tmp_path / "dataset" / "AQuA" / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{"instruction": "x", "answer": "A"}, {"instruction": "y", "answer": "F"}]))
    with pytest.raises(QDenseError, match=r'row 1: "F" cannot be an answer of aqua'):
        evaluate(request_for(None, tasks=[TASKS["aqua"]], data_dir=tmp_path), ignore)


@pytest.mark.parametrize("decoding", ["greedy", "beam4"])
def test_batched_and_single_decoding_give_the_same_tokens(tmp_path, decoding):
    base = load_base(
        ModelRecipe(name=str(make_tiny_model(tmp_path / "m")), quantization="none", dtype="float32", device="cpu")
    )
    torch.manual_seed(0)
    prompts = [(i, torch.randint(0, 256, (length,)).tolist()) for i, length in enumerate((3, 17, 40, 8))]
    together = generate(base, base.model, prompts, DECODINGS[decoding], 12)
    alone = [generate(base, base.model, [prompt], DECODINGS[decoding], 12)[0] for prompt in prompts]
    assert together == alone


def test_batches_are_of_nearly_equal_length_longest_first():
    assert plan_batches([3, 9, 5, 9, 1], 2) == [[1, 3], [2, 0], [4]]
