"""Adapters on the hub: uploaded to a server that speaks its protocol, loaded back by qdense and by PEFT; nothing private."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from qdense.cli import main
from qdense.errors import QDenseError
from qdense.publish import model_card, push
from qdense.recipe import recipe_from_tables
from tests.helpers.adapters import make_run
from tests.helpers.hub import Hub
from tests.helpers.runs import recipe_for
from tests.helpers.runs import run as train_run
from tests.helpers.servers import serving


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "questions"
    rows = folder.parent / "secret-folder" / "rows.jsonl"
    rows.parent.mkdir()
    lines = [{"prompt": f"What is {n}?", "completion": f"It is {n}|."} for n in range(40)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    tables = recipe_for(tiny_model, folder).resolved()
    tables["data"] = {"path": str(rows), "validation_rows": 8, "max_length": 320}
    train_run(recipe_from_tables(tables, source="test"))
    return folder


@pytest.fixture
def hub(tiny_model, tmp_path):
    hub = Hub()
    with serving(hub.app) as address:
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        hub.private["someone/tiny"] = False
        hub.files["someone/tiny"] = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()}
        yield hub, os.environ | environment


def qdense(environment, *arguments, cwd):
    """The command, in a process of its own: the hub's client reads its settings when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "qdense", *map(str, arguments)],
        env=environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_an_adapter_goes_to_the_hub_and_comes_back(hub, trained, tiny_model, tmp_path):
    server, environment = hub
    run = make_run(tiny_model, tmp_path / "run", seed=3)
    done = qdense(environment, "push", run, "me/answers", "--base", "someone/tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/answers")
    files = server.files["me/answers"]
    assert set(files) >= {"README.md", "adapter_config.json", "adapter_model.safetensors", "qdense.json"}
    assert server.private["me/answers"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "someone/tiny"
    again = qdense(environment, "push", run, "me/answers", "--base", "someone/tiny", cwd=tmp_path)
    assert again.returncode == 0, again.stderr

    here = qdense(environment, "generate", run, "hello", "--max-new-tokens", "8", cwd=tmp_path)
    there = qdense(environment, "generate", "me/answers", "hello", "--max-new-tokens", "8", cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    assert here.stdout == there.stdout != ""
    script = (
        "import torch; from peft import AutoPeftModelForCausalLM; from qdense import DenseLoraConfig\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("me/answers", dtype=torch.float32)\n'
        'torch.save(model(torch.arange(40)[None]).logits.detach(), "logits.pt")'
    )
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True, timeout=300)
    from qdense.modeling.adapter_files import load_adapter, read_card
    from qdense.modeling.load import load_base
    from qdense.recipe import ModelRecipe

    base = load_base(ModelRecipe(name=str(tiny_model), quantization="none", dtype="float32", device="cpu"))
    model = load_adapter(base, run / "adapter", read_card(run / "adapter"))
    with torch.no_grad():
        expected = model(torch.arange(40)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=2e-5, rtol=1e-4)


def test_what_the_hub_refuses_is_said_with_what_to_do(hub, tiny_model, tmp_path):
    server, environment = hub
    run = make_run(tiny_model, tmp_path / "run", seed=3)
    wrong = qdense(environment | {"HF_TOKEN": "hf_wrong"}, "push", run, "me/a", "--base", "someone/tiny", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "the hub refused me/a" in wrong.stderr
    assert "hf auth login" in wrong.stderr
    missing = qdense(environment, "generate", "me/nothing", "x", cwd=tmp_path)
    assert missing.returncode == 2
    assert "me/nothing: no such model on the hub" in missing.stderr
    away = qdense(
        environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}, "push", run, "me/a", "--base", "a/b", cwd=tmp_path
    )
    assert away.returncode == 2
    assert "me/a cannot be uploaded: " in away.stderr
    assert "Traceback" not in away.stderr
    assert list(server.files) == ["someone/tiny"]


def test_the_card_tells_of_the_run_and_nothing_of_the_machine(trained):
    card = model_card(trained, "me/questions", base="someone/tiny")
    assert 'base_model: "someone/tiny"' in card
    assert "gelu(D M gelu(E x))" in card
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/questions")' in card
    assert "| steps | 6 |" in card
    assert "rows.jsonl (SHA-256 " in card
    for step in (2, 4, 6):
        assert f"| {step} | " in card
    for private in ("secret-folder", str(trained), str(trained.parent), "/tmp"):
        assert private not in card
    assert main(["push", str(trained), "me/questions", "--base", "someone/tiny", "--dry-run"]) == 0


def test_nothing_private_is_uploaded(trained, monkeypatch):
    seen = {}

    class Api:
        def create_repo(self, repository, *, private, exist_ok):
            seen["private"] = private
            return f"https://hub/{repository}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            seen["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push(trained, "me/questions", base="someone/tiny", is_public=True) == "https://hub/me/questions"
    assert seen["private"] is False
    for name, content in seen["files"].items():
        for private in (b"secret-folder", str(trained.parent).encode(), os.uname().nodename.encode() + b"/"):
            assert private not in content, name
    recipe = tomllib.loads(seen["files"]["recipe.toml"].decode())
    assert recipe["data"]["path"] == "rows.jsonl"
    assert recipe["model"]["name"] == "someone/tiny"
    assert set(recipe["provenance"]) == {"versions"}


def test_what_cannot_be_pushed_is_refused(trained, tiny_model, tmp_path):
    for run, repository, base, message in (
        (trained, "questions", "a/b", "name the repository as OWNER/NAME"),
        (trained, "me/questions", None, "the base is a folder of this machine .* --base OWNER/NAME"),
        (trained, "me/questions", str(tiny_model), "the base is a folder of this machine"),
        (tmp_path / "none", "me/questions", "a/b", "no such run or adapter"),
    ):
        with pytest.raises(QDenseError, match=message):
            push(run, repository, base=base, is_public=False)
