"""PEFT's own tests, with our tuners in the place of its methods.

    .venv/bin/python tools/peft_conformance.py --output tools/results/peft.md

It fetches PEFT's source distribution for the installed version (by pip), replaces the cases of its tests by our configurations,
and in `test_decoder_models.py` its models on the hub by tiny local ones of the same architectures, and runs what then needs no
hub. The table lists each test that fails, with the reason if we know one; the exit status is 1 if there is a failure without
a reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qdense.provenance import git_hash

# Written beside PEFT's tests. Each list has one case for every way in which our tuners differ.
_CASES = """
from qdense.tuners import DenseLoraConfig, NoraConfig, RedConfig

_TUNERS = [
    ("DenseLoRA", DenseLoraConfig, {"r": 4}),
    ("DenseLoRA only-matrix", DenseLoraConfig, {"r": 4, "activation": "none"}),
    ("NoRA", NoraConfig, {"r": 2, "r_inner": 1}),
    ("RED", RedConfig, {}),
]
_TARGETS = [
    {"target_modules": "lin0"},
    {"target_modules": ["lin1"]},
    {"target_modules": ["lin0", "lin1"]},
    {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    {"target_modules": ["lin0"], "exclude_modules": ["lin1"]},
]
CUSTOM = [
    (f"{name} {number}", "MLP", config, {**settings, **targets})
    for name, config, settings in _TUNERS
    for number, targets in enumerate(_TARGETS, start=1)
]
_BOTH = [("Same", ["lin0"], ["lin0"]), ("Different", ["lin0"], ["lin1"])]
SEVERAL_ACTIVE = [
    (
        f"{name} {which}", config.__name__.removesuffix("Config").lower(), config,
        {**settings, "target_modules": first, "init_weights": False},
        {**settings, "target_modules": second, "init_weights": False},
    )
    for name, config, settings in _TUNERS
    for which, first, second in _BOTH
]
_LAST_OF_MLP = ["down_proj", "fc2", "fc_out", "dense_4h_to_h"]
DECODER = [
    # RED chooses by LLaMA's names of modules; elsewhere they must be given.
    (config, {"task_type": "CAUSAL_LM", "target_modules": _LAST_OF_MLP if config is RedConfig else None, **settings})
    for _, config, settings in _TUNERS
]
OURS = (DenseLoraConfig, NoraConfig, RedConfig)
"""
_CONFTEST = '''
import pytest
from .our_cases import OURS

def pytest_collection_modifyitems(config, items):
    """Keep the tests of our cases, without those of merging for what cannot be merged: such a method PEFT skips by its name."""
    kept = []
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        if values.get("config_cls") not in OURS:
            continue
        settings = [value for key, value in values.items() if key.startswith("config_kwargs")]
        bends = values["config_cls"].__name__ == "RedConfig" or any(
            values["config_cls"].__name__ == "DenseLoraConfig" and each.get("activation") != "none" for each in settings
        )
        if bends and "merg" in item.name.split("[")[0]:
            item.add_marker(pytest.mark.skip(reason="the adapter is no matrix and does not merge"))
        kept.append(item)
    items[:] = kept
'''
# The lists of PEFT's that are replaced, by file: name -> what takes its place.
_REPLACED = {
    "test_custom_models.py": {"TEST_CASES": "CUSTOM", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": "SEVERAL_ACTIVE"},
    "test_decoder_models.py": {"ALL_CONFIGS": "DECODER", "PEFT_DECODER_MODELS_TO_TEST": "LOCAL_MODELS"},
}
# Failures that we know, by a part of the test's name: why.
KNOWN = {
    "cannot be merged: ": "the test of a dtype ends in a merge, which an adapter with activations refuses",
    "A RED adapter is not merged": "the test of a dtype ends in a merge, which RED refuses",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the table")
    parser.add_argument("--only", metavar="EXPRESSION", default="", help="pytest's -k: run the tests that match")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    arguments = parser.parse_args()
    version = importlib.metadata.version("peft")
    with tempfile.TemporaryDirectory() as temporary:
        tests = prepared(Path(temporary), version)
        report = tests.parent / "report.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
            "-o", "addopts=", "-o", "filterwarnings=", "-n", str(arguments.workers), f"--junitxml={report}",
            "--rootdir", str(tests.parent),
            *(["-k", arguments.only] if arguments.only else []), *(str(tests / name) for name in _REPLACED),
        ]  # fmt: skip
        # Not what a pytest that runs this has set for its own workers.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        subprocess.run(command, cwd=tests.parent, env=environment, check=False, stdout=subprocess.DEVNULL)
        outcomes = list(_outcomes(report))
    lines, num_unknown = _table(outcomes, version)
    print("\n".join(lines))
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if num_unknown or not outcomes else 0


def prepared(folder: Path, version: str) -> Path:
    """PEFT's tests with our cases, in `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), f"peft=={version}"], check=True, stderr=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = folder / f"peft-{version}" / "tests"
    models = local_models(folder / "models")
    (tests / "our_cases.py").write_text(f"{_CASES}\nLOCAL_MODELS = {[str(model) for model in models]!r}\n")
    (tests / "conftest.py").write_text(_CONFTEST)
    (tests / "__init__.py").touch()
    # A helper of theirs imports it for tests of images, which do not run here.
    (tests.parent / "diffusers.py").write_text("class StableDiffusionPipeline: ...\n")
    for name, lists in _REPLACED.items():
        text = (tests / name).read_text()
        for theirs, ours in lists.items():
            text, count = re.subn(
                rf"(^{theirs} = \[\n.*?^\]\n)",
                rf"\1from .our_cases import {ours} as {theirs}\n",
                text,
                flags=re.M | re.S,
            )
            if count != 1:
                raise SystemExit(
                    f"{name} of peft {version} has no list {theirs}; tools/peft_conformance.py must follow it"
                )
        (tests / name).write_text(text)
    return tests


def local_models(folder: Path) -> list[Path]:
    """Tiny random decoders of the architectures in PEFT's list whose layers are linear, and of others that people use."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = {**small, "intermediate_size": 64, "num_key_value_heads": 2}
    shapes = {
        "llama": llama,
        "mistral": llama,
        "qwen2": llama,
        "qwen3": {**llama, "head_dim": 8},
        "gemma3_text": {**llama, "head_dim": 8},
        "phi3": {**llama, "pad_token_id": 0},
        "opt": {**small, "ffn_dim": 64, "word_embed_proj_dim": 32},
        "gptj": {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        "gpt_neox": {**small, "intermediate_size": 64},
    }
    folders = []
    for kind, shape in shapes.items():
        torch.manual_seed(0)
        special = {} if "pad_token_id" in shape else {"pad_token_id": 0}
        config = AutoConfig.for_model(kind, **shape, **special, bos_token_id=1, eos_token_id=2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"tiny-{kind}")
        folders.append(folder / f"tiny-{kind}")
    return folders


def _outcomes(report: Path) -> Iterator[tuple[str, str, str, str]]:
    """(file, test, outcome, the first line of what went wrong) of each test."""
    for case in ET.parse(report).getroot().iter("testcase"):
        file = next((name for name in case.get("classname", "").split(".") if name.startswith("test_")), "collection")
        failure = next((each for each in case if each.tag in ("failure", "error")), None)
        outcome = "failed" if failure is not None else "skipped" if case.find("skipped") is not None else "passed"
        said = (failure.get("message") or "").splitlines()[0] if failure is not None and failure.get("message") else ""
        yield file, re.sub(r"/\S*/models/", "", case.get("name", "")), outcome, said


def _table(outcomes: list[tuple[str, str, str, str]], version: str) -> tuple[list[str], int]:
    """The lines of the report, and how many failures have no known reason."""
    counts = Counter((file, outcome) for file, _, outcome, _ in outcomes)
    kinds = ("passed", "failed", "skipped")
    rows = [
        f"| {file} | {' | '.join(f'{counts[file, kind]:,}' for kind in kinds)} |"
        for file in sorted({file for file, *_ in outcomes})
    ]
    groups: dict[str, list[str]] = {}
    num_unknown = 0
    for _, test, outcome, said in outcomes:
        if outcome == "failed":
            why = next((why for part, why in KNOWN.items() if part in f"{test} {said}"), "")
            num_unknown += not why
            groups.setdefault(why or f"not explained: {said}", []).append(test)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    lines = [
        "# PEFT's own tests with our tuners",
        "",
        f"PEFT {version}, {versions}, qdense {git_hash()}: `python tools/peft_conformance.py`.",
        "Configurations: DenseLoRA with and without activations, NoRA and RED; tiny local models take the place of the hub's.",
        "Skipped are tests that PEFT skips for its own methods too, and merging for adapters that are no matrix.",
        "",
        f"| file | {' | '.join(kinds)} |",
        "|---|---|---|---|",
        *rows,
    ]
    for why, tests in groups.items():
        lines += ["", f"**{len(tests)} failed: {why}**", "", *(f"- `{test}`" for test in tests[:6])]
        lines += [f"- and {len(tests) - 6} more like these"] if len(tests) > 6 else []
    return lines, num_unknown


if __name__ == "__main__":
    sys.exit(main())
