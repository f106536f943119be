"""An adapter_config.json from anyone, checked before PEFT acts on it.

PEFT trusts this file: it makes tensors of the sizes in it, runs the regular expressions in it on every module's name, and
for some initialisations rewrites the base's weights.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qdense.errors import AdapterError, shortened
from qdense.methods import PEFT_TYPES, sizes_in
from qdense.runs import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE

# The values of init_lora_weights that leave the base as it is. PEFT's others ("pissa", "olora", "corda", "loftq", ...) subtract
# from the base's weights what they put into the adapter.
_INERT_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_LARGEST_NUMBER = 1e6  # of alpha and the like: beyond it, logits overflow
_LONGEST_PATTERN = 1000  # characters
_PATTERN_SECONDS = 3
_PLAIN = re.compile(r"[\w.-]*")
# Runs what PEFT would run; a search that does not end is ended with its process.
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.match(pattern, name)
"""


def checked_configuration(folder: Path, base_name: str, module_names: Iterable[str]) -> dict[str, Any]:
    """The adapter_config.json in `folder`.

    Args:
        module_names: of the base, on which PEFT will run the file's regular expressions.

    Raises:
        AdapterError: PEFT would read other files for this type (X-LoRA, prompts), or does not know it; no tensor has the rank,
            for which PEFT would create tensors of any size before it compares them with the file's; a number is not finite
            or absurd; a regular expression is wrong or takes too long; the base would be changed.
    """
    path = folder / PEFT_CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path}: not a readable adapter configuration: {error!r}") from None
    if not isinstance(found, str) or found not in PEFT_TYPES:
        raise AdapterError(f"{path}: peft_type = {shortened(repr(found))}: known: {', '.join(sorted(PEFT_TYPES))}")
    start = config.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _INERT_STARTS:
        raise AdapterError(
            f"{path}: init_lora_weights = {shortened(repr(start))}: PEFT would change the base's weights to load it. Where the "
            "adapter was trained, convert it to a plain LoRA: save it with path_initial_model_for_weight_conversion "
            "(PEFT's documentation of the initialisation says how)."
        )
    _check_sizes(path, config, folder, base_name)
    for key, value in config.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= _LARGEST_NUMBER:
            raise AdapterError(
                f"{path}: {shortened(key)} = {value}: must be a finite number, at most {_LARGEST_NUMBER:g}"
            )
    _check_patterns(path, list(_patterns(config)), list(module_names))
    return config


def _check_sizes(path: Path, config: Mapping[str, Any], folder: Path, base_name: str) -> None:
    try:
        with safe_open(folder / PEFT_WEIGHTS_FILE, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: the adapter does not fit {base_name}: {error}") from error
    largest = max((size for shape in shapes for size in shape), default=0)
    keys, patterns = sizes_in(config), config.get("rank_pattern")
    sizes = {key: config.get(key) for key in keys} | (patterns if keys and isinstance(patterns, dict) else {})
    for key, size in sizes.items():
        if isinstance(size, int) and size > largest:
            raise AdapterError(f"{path}: {shortened(key)} = {size}: no tensor in its {PEFT_WEIGHTS_FILE} is that large")


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """The regular expressions in a configuration, as PEFT completes them (peft 0.21), without plain names."""
    templates = {
        "target_modules": "(?:{})$",  # a text is an expression, a list holds names
        "exclude_modules": "(?:{})$",
        "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
        "modules_to_save": r"(^|.*\.){}($|\..*)",
        "rank_pattern": r"(.*\.)?({})$",
        "alpha_pattern": r"(.*\.)?({})$",
    }
    for key, template in templates.items():
        value = config.get(key)
        values = [value] if isinstance(value, str) else value
        if not values or (not isinstance(value, str) and key in ("target_modules", "exclude_modules")):
            continue
        if isinstance(values, list | dict):
            yield from (
                template.replace("{}", each) for each in values if isinstance(each, str) and not _PLAIN.fullmatch(each)
            )


def _check_patterns(path: Path, patterns: list[str], names: list[str]) -> None:
    """Raise AdapterError for expressions that are wrong, or that would keep PEFT busy for ever."""
    for pattern in patterns:
        if len(pattern) > _LONGEST_PATTERN:
            raise AdapterError(
                f"{path}: a regular expression of {len(pattern):,} characters; at most {_LONGEST_PATTERN:,}"
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(f"{path}: {shortened(pattern)}: not a regular expression: {error}") from None
    if not patterns:
        return
    command = [sys.executable, "-I", "-c", _MATCH]
    try:
        subprocess.run(command, input=json.dumps([patterns, names]), text=True, timeout=_PATTERN_SECONDS, check=True)
    except subprocess.TimeoutExpired:
        raise AdapterError(
            f"{path}: its regular expressions take longer than {_PATTERN_SECONDS} s on the base's {len(names):,} module names, "
            f"the first being {shortened(patterns[0])}. Name the modules in a list instead."
        ) from None
