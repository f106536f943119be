"""A second opinion: lm-evaluation-harness runs the exported tasks and must come to our scores, text for text."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qdense.benchmarks.evaluate import EvaluationRequest, evaluate
from qdense.benchmarks.harness import export
from qdense.benchmarks.tasks import GROUPS, TASKS, load_items, tasks_named
from qdense.cli import main
from qdense.data.rows import Row
from qdense.data.templates import TEMPLATES
from qdense.events import ignore
from qdense.inference.generation import DECODINGS
from qdense.modeling.adapter_files import AdapterCard, save_adapter
from qdense.modeling.attach import attach_adapter
from qdense.modeling.load import load_base
from qdense.modeling.smollm2 import prepare_smollm2
from qdense.recipe import AdapterRecipe, ModelRecipe
from tests.helpers.completions import LETTERS, NUMBERS, OPTIONS, STORED, TRUTHS

FIXTURES = ("multiarith", "singleeq", "mathqa", "siqa", "hellaswag", "arc-e", "obqa")


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """The harness reads JSON through `datasets`, which would leave Arrow files in the user's ~/.cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def exported(names, folder, data_dir, template="alpaca", decoding="greedy"):
    return export(tasks_named(names), folder, data_dir, TEMPLATES[template], DECODINGS[decoding])


def manager(folder):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def score(task, docs, completions):
    """What the harness makes of completions: whether each is right."""
    from lm_eval.api.instance import Instance

    instances = [
        Instance(request_type="generate_until", doc=doc, arguments=("", {}), idx=0, resps=[completion])
        for doc, completion in zip(docs, completions, strict=True)
    ]
    for ensemble in task._filters:
        ensemble.apply(instances)
    return [
        bool(task.process_results(instance.doc, [instance.filtered_resps["paper"]])["exact_match"])
        for instance in instances
    ]


def paper(name, labels, completions):
    answers = TASKS[name].answers
    return [
        answers.is_correct(label, answers.answers(text)["paper"])
        for label, text in zip(labels, completions, strict=True)
    ]


# --- the files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_data(fixtures, shared_data, tmp_path_factory):
    """A data folder with all sixteen sets, the real ones and our small ones."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "dataset").mkdir()
    for source in (fixtures, shared_data):
        for found in (source / "dataset").iterdir():
            (folder / "dataset" / found.name).symlink_to(found)
    return folder


def test_every_task_loads_in_the_harness(all_data, tmp_path):
    names = exported(",".join(TASKS), tmp_path, all_data, decoding="beam4")
    assert names == ["qdense_all", "qdense_wordproblems"]
    assert manager(tmp_path).all_groups == sorted(f"qdense_{group}" for group in GROUPS)
    for group, members in GROUPS.items():
        found = manager(tmp_path).load(f"qdense_{group}")["group_map"]
        assert found == {f"qdense_{group}": [f"qdense_{name}" for name in members]}
    loaded = manager(tmp_path).load(names)
    assert loaded["tasks"].keys() == {f"qdense_{name}" for name in TASKS}
    for name, task in TASKS.items():
        theirs = loaded["tasks"][f"qdense_{name}"]
        rows = load_items(task, all_data).rows
        assert len(rows) == (4 if name in FIXTURES else task.num_items)
        docs = list(theirs.eval_docs)
        assert [theirs.doc_to_target(doc) for doc in docs] == [row.answer for row in rows]
        alpaca = TEMPLATES["alpaca"]
        for doc, row in list(zip(docs, rows, strict=True))[:200]:
            assert theirs.doc_to_text(doc) == alpaca.evaluation_prompt(row)
        assert task.version == theirs.VERSION
        assert theirs.config.generation_kwargs["max_gen_toks"] == task.max_new_tokens
        assert theirs.config.generation_kwargs["num_beams"] == 4
        assert theirs.config.generation_kwargs["until"] == list(alpaca.stop)


def test_nothing_in_the_folder_needs_qdense(fixtures, tmp_path):
    exported("siqa,wordproblems", tmp_path, fixtures)
    assert {path.suffix for path in tmp_path.iterdir()} == {".yaml", ".py", ".json"}
    for path in tmp_path.glob("*.py"):
        assert not re.search(r"^\s*(import|from) ", path.read_text(), re.MULTILINE)
    # The task files are plain YAML but for !function; a file in the folder is named by its absolute path.
    content = yaml.safe_load((tmp_path / "qdense_siqa.yaml").read_text())
    assert content["dataset_kwargs"]["data_files"]["test"] == str(fixtures / "dataset/social_i_qa/test.json")


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_the_same_to_the_character(template, tmp_path):
    rows = [
        Row("plain", "", "", "1"),
        Row("  spaces and a newline \n", "", "", "1"),
        Row("\u2028 {{ instruction }} {% if %} {# c #} \"q\" 'q' \\n \\ %s {0} $x\r\n\ttab", "", "", "1"),
        Row("é 中文 😀 \u00a0", "{{ context }}", "", "1"),
        Row("with input", " \n a, b \n", "", "1"),
        Row("blank input", "  \n", "", "1"),
        Row("12", "", "", "1"),
    ]
    path = tmp_path / "dataset" / "MultiArith" / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([row._asdict() for row in rows]))
    exported("multiarith", tmp_path / "out", tmp_path, template)
    task = manager(tmp_path / "out").load("qdense_multiarith")["tasks"]["qdense_multiarith"]
    prompts = [task.fewshot_context(doc, 0) for doc in task.eval_docs]
    assert prompts == [
        TEMPLATES[template].evaluation_prompt(row) for row in load_items(TASKS["multiarith"], tmp_path).rows
    ]
    assert prompts == [TEMPLATES[template].evaluation_prompt(row) for row in rows]
    # without the column, and with a null in it
    path.write_text(json.dumps([{"instruction": "x", "answer": "1"}]))
    task = manager(tmp_path / "out").load("qdense_multiarith")["tasks"]["qdense_multiarith"]
    assert task.fewshot_context(task.eval_docs[0], 0) == TEMPLATES[template].evaluation_prompt(Row("x", "", ""))
    assert task.doc_to_text({"instruction": "x", "input": None}) == TEMPLATES[template].evaluation_prompt(
        Row("x", "", "")
    )


def test_the_command(fixtures, tmp_path, capsys):
    command = ["tasks", "obqa,siqa", "--export", "lm-eval", str(tmp_path / "out"), "--data-dir", str(fixtures)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "wrote 2 tasks" in printed
    assert f"--include_path {tmp_path / 'out'} --tasks qdense_obqa,qdense_siqa" in printed
    for arguments, message in (
        (["--template", "alpaca"], "--template: only for exported tasks"),
        (["--decoding", "greedy"], "--decoding: only for exported tasks"),
        (["--export", "lm-eval", ""], "name the folder"),
    ):
        assert main(["tasks", "obqa", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["tasks", "obqa", "--export", "helm", str(tmp_path / "out")]) == 2
    assert '"helm": unknown format; known: lm-eval' in capsys.readouterr().err
    assert main([*command, "--template", "x"]) == 2
    assert "known: alpaca, llm-adapters" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["tasks", "obqa", "--export", "lm-eval", str(tmp_path / "file"), "--data-dir", str(fixtures)]) == 2
    assert "is a file" in capsys.readouterr().err


# --- the rule, without a model ------------------------------------------------------------------------------------------------


def texts_of(table):
    return [completion for completion, _, _ in table]


AWKWARD = {
    "gsm8k": (texts_of(NUMBERS), [str(n) for n in (576, 12, 0.75, 4, -3, 7, 110, 5, 13, 79, 1234.5)]),
    "aqua": (texts_of(LETTERS), list("ABCDE")),
    "piqa": (texts_of(OPTIONS), ["solution1", "solution2"]),
    "boolq": (texts_of(TRUTHS), ["true", "false"]),
}
EDGES = [
    "8",
    "8.001",
    "8.0011",
    "7.999",
    "1,000,000",
    "1.833",
    "9" * 400,
    "-",
    "a\n### Response:\n5\n### Response:\n 6",
    "12.",
]


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_completions(shared_data, tmp_path, name):
    exported(name, tmp_path, shared_data)
    task = manager(tmp_path).load(f"qdense_{name}")["tasks"][f"qdense_{name}"]
    texts, labels = AWKWARD[name]
    if name == "gsm8k":
        texts, labels = texts + EDGES, [*labels, "8.0", "1000000.0", "1.8333333333333335", "6", "5"]
    pairs = [(label, text) for text in texts for label in labels]
    found = score(task, [{"answer": label} for label, _ in pairs], [text for _, text in pairs])
    assert found == paper(name, *zip(*pairs, strict=True))
    assert {True, False} == set(found)


@pytest.mark.parametrize("name", STORED)
def test_stored_completions_item_by_item(shared_data, tmp_path, name):
    exported(name, tmp_path, shared_data)
    task = manager(tmp_path).load(f"qdense_{name}")["tasks"][f"qdense_{name}"]
    rows = json.loads((shared_data / TASKS[name].file.path).read_text())
    # shifted by one as well, so that the commonsense sets, whose `output` is always right, have wrong answers too
    for shift in (0, 1):
        texts = [rows[(i + shift) % len(rows)]["output"] for i in range(len(rows))]
        found = score(task, list(task.eval_docs), texts)
        assert found == paper(name, [row["answer"] for row in rows], texts)
        if shift == 0:
            assert sum(found) == STORED[name][0]
        elif name != "mawps":  # its `output` is empty
            assert 0 < sum(found) < len(found)


def test_a_group_is_the_plain_mean_of_its_tasks(shared_data, tmp_path):
    """The whole harness on the paper's Table 2, with a model that "writes" each row's `output`."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    class Stored(LM):
        def generate_until(self, requests):
            return [request.doc["output"] for request in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    (name,) = exported("math", tmp_path, shared_data)
    results = simple_evaluate(Stored(), tasks=[name], task_manager=manager(tmp_path), bootstrap_iters=0)
    accuracies = {}
    for task in GROUPS["math"]:
        num_correct, _, num_items = STORED[task]
        accuracies[task] = results["results"][f"qdense_{task}"]["exact_match,paper"]
        assert accuracies[task] == pytest.approx(num_correct / num_items)
    group = results["groups"]["qdense_math"]["exact_match,paper"]
    assert group == pytest.approx(sum(accuracies.values()) / len(accuracies))


# --- the same model, the same adapter, the same score ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A DenseLoRA adapter on SmolLM2 that changes what it writes without making it nonsense."""
    model = {"name": "smollm2-135m", "quantization": "none", "dtype": "float32", "device": "cpu"}
    base = load_base(ModelRecipe(**model))
    torch.manual_seed(0)
    attached = attach_adapter(base, AdapterRecipe(r=8, dropout=0.0), 1)
    for name, parameter in attached.named_parameters():
        if name.endswith("decoder"):
            torch.nn.init.normal_(parameter, std=0.15)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(attached, folder, AdapterCard(model, base.fingerprint, template="alpaca", method="denselora"))
    return folder


@pytest.mark.slow
@pytest.mark.slow
def test_the_harness_gets_the_same_completions_and_scores(adapter, shared_data, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate

    monkeypatch.chdir(tmp_path)
    names, limit, max_new_tokens = ("wordproblems", "aqua", "boolq"), 20, 16
    settings = {
        "with_base": False,
        "decoding": DECODINGS["greedy"],
        "max_new_tokens": max_new_tokens,
        "batch_size": 10,
        "data_dir": shared_data,
    }
    tasks = [TASKS[name] for name in names]
    summary = evaluate(EvaluationRequest(tasks=tasks, adapter=adapter, model={}, limit=limit, **settings), ignore)
    exported(",".join(names), tmp_path / "tasks", shared_data)
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(prepare_smollm2(ignore)), "peft": str(adapter), "dtype": "float32"},
        tasks=[f"qdense_{name}" for name in names],
        task_manager=manager(tmp_path / "tasks"),
        gen_kwargs={"max_gen_toks": max_new_tokens},
        limit=limit,
        batch_size=10,
        device="cpu",
        bootstrap_iters=0,
    )
    accuracies = []
    for name in names:
        samples = results["samples"][f"qdense_{name}"]
        theirs = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
        ours = completions(summary, name)
        assert len(ours) == limit
        assert ours == theirs
        right = paper(name, [sample["target"] for sample in samples], [ours[sample["doc_id"]] for sample in samples])
        assert right == [bool(sample["exact_match"]) for sample in samples]
        accuracy = summary["tasks"][name]["paper"]["accuracy"]
        assert accuracy == results["results"][f"qdense_{name}"]["exact_match,paper"]
        accuracies.append(accuracy)
    # Were all wrong, any two scorers would agree; and were the adapter not applied, any two models.
    assert sum(0 < accuracy < 1 for accuracy in accuracies) >= 2
    bare = {"name": "smollm2-135m", "quantization": "none", "dtype": "float32"}
    base = evaluate(EvaluationRequest(tasks=tasks[:1], adapter=None, model=bare, limit=10, **settings), ignore)
    assert any(text != completions(summary, names[0])[i] for i, text in completions(base, names[0]).items())


def completions(summary, name):
    lines = Path(summary["folder"], f"{name}.jsonl").read_text().splitlines()
    return {record["index"]: record["completion"] for record in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.slow
def test_the_harness_command_loads_a_denselora_adapter(adapter, tmp_path):
    """What `qdense tasks --export` tells a user to type. By itself the harness ends in KeyError: 'DENSELORA'."""
    exported("wordproblems", tmp_path / "tasks", None)
    arguments = ["lm_eval", "--model", "hf", "--tasks", "qdense_wordproblems", "--include_path", str(tmp_path / "tasks"),
                 "--model_args", f"pretrained={prepare_smollm2(ignore)},peft={adapter},dtype=float32", "--device", "cpu",
                 "--limit", "2", "--gen_kwargs", "max_gen_toks=4", "--output_path", str(tmp_path / "out.json")]  # fmt: skip
    command = [sys.executable, "-m", "qdense.tuners", *arguments]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    (written,) = tmp_path.glob("out*.json")
    assert json.loads(written.read_text())["results"]["qdense_wordproblems"]["sample_len"] == 2
