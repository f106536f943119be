"""An adapter on the hub: its files, its recipe and a model card that is written from its run.

Nothing of this machine goes along: paths are replaced by the base's hub id or by a file's name.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from qdense.catalogs.datasets import TRAINING_SETS
from qdense.catalogs.models import CATALOG, is_hub_id
from qdense.errors import QDenseError
from qdense.methods import METHODS
from qdense.modeling.adapter_files import AdapterCard, read_card
from qdense.recipe import load_recipe
from qdense.runs import CARD_FILE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, RunFolder, find_adapter
from qdense.schema import read_toml
from qdense.text import clean, markdown_escaped, markdown_table
from qdense.training.metrics import read_metrics
from qdense.version import __version__

_MOST_POINTS = 12  # of the validation curve
_EQUATION = """\
    y = W x + (alpha / r) * gelu(D M gelu(E x))      (dropout omitted)

E and D are shared by all layers of one kind of module; M is each layer's own (arXiv:2505.23808, eq. 3-5).
"""


def push(run: Path, repository: str, *, base: str | None, is_public: bool) -> str:
    """Upload the adapter of a run; returns its address.

    Args:
        repository: OWNER/NAME.
        base: the base's hub id, where the run does not know it.

    Raises:
        QDenseError: there is no adapter, the base has no hub id, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not is_hub_id(repository):
        raise QDenseError(f'"{clean(repository)}": name the repository as OWNER/NAME')
    api = HfApi()
    with _files(run, repository, base) as folder:
        try:
            created = api.create_repo(repository, private=not is_public, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"Trained with qdense {__version__}"
            )
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            advice = " Log in with `hf auth login`, with a token that may write." if status in (401, 403) else ""
            raise QDenseError(f"the hub refused {repository}: {str(error).splitlines()[0]}.{advice}") from None
        except Exception as error:  # the hub's client passes on errors of its HTTP library, which differs by version
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if get_token() is None:
                raise QDenseError(
                    f"{repository}: you are not logged in. Run `hf auth login`, or set HF_TOKEN."
                ) from None
            raise QDenseError(f"{repository} cannot be uploaded: {reason}. Check the connection.") from None
    return str(created)


@contextmanager
def _files(run: Path, repository: str, base: str | None) -> Iterator[Path]:
    """A folder with what is uploaded."""
    adapter = find_adapter(run)
    card = read_card(adapter)
    hub_id = _base_id(card, base)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if (adapter / PEFT_CONFIG_FILE).is_file():
            config = json.loads((adapter / PEFT_CONFIG_FILE).read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = hub_id
            (folder / PEFT_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            shutil.copyfile(adapter / PEFT_WEIGHTS_FILE, folder / PEFT_WEIGHTS_FILE)
        else:
            raise QDenseError(f"{adapter}: holds a whole model, no adapter; push it with Transformers' push_to_hub")
        if (adapter / CARD_FILE).is_file():
            record = json.loads((adapter / CARD_FILE).read_text(encoding="utf-8"))
            record["model"]["name"] = _name_anywhere(card, hub_id)
            (folder / CARD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        recipe = RunFolder.of_adapter(adapter).recipe
        if recipe.is_file():
            tables = _public_recipe(recipe, card, hub_id)
            (folder / "recipe.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
        (folder / "README.md").write_text(_card_text(adapter, card, hub_id, repository), encoding="utf-8")
        yield folder


def _base_id(card: AdapterCard, base: str | None) -> str:
    """The base's hub id. Raises QDenseError if it is not known."""
    name = base or str(card.model.get("name", ""))
    if name in CATALOG:
        return CATALOG[name].hub_id
    if not is_hub_id(name) or (base is None and Path(name).exists()):
        raise QDenseError(
            f"the base is a folder of this machine ({clean(name)}); name it as others can load it: --base OWNER/NAME"
        )
    return name


def _name_anywhere(card: AdapterCard, hub_id: str) -> str:
    """A name for model.name: the recipe's own if it is known everywhere, else the hub id."""
    name = str(card.model.get("name", ""))
    return name if name in CATALOG else hub_id


def _public_recipe(path: Path, card: AdapterCard, hub_id: str) -> dict[str, Any]:
    """The recipe's tables, without this machine's paths and without [provenance] beyond versions."""
    tables = read_toml(path, "recipe")
    tables["model"]["name"] = _name_anywhere(card, hub_id)
    if "path" in tables["data"]:
        tables["data"]["path"] = Path(tables["data"]["path"]).name
    tables.pop("output", None)
    versions = tables.pop("provenance", {}).get("versions", {})
    return tables | {"provenance": {"versions": versions}}


# --- the card ------------------------------------------------------------------------------------------------------------------


def model_card(run: Path, repository: str, *, base: str | None = None) -> str:
    """The README of the repository. Raises QDenseError."""
    adapter = find_adapter(run)
    card = read_card(adapter)
    return _card_text(adapter, card, _base_id(card, base), repository)


def _card_text(adapter: Path, card: AdapterCard, hub_id: str, repository: str) -> str:
    folder = RunFolder.of_adapter(adapter)
    method = METHODS.get(card.method)
    head = {
        "base_model": hub_id,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["qdense", card.method],
    }
    sections = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()) + "---",
        f"# {repository.partition('/')[2]}",
        f"An adapter for [{hub_id}](https://huggingface.co/{hub_id}), trained with qdense {__version__}. "
        f"Method: {method.summary if method else card.method}.",
    ]
    if card.method == "denselora":
        sections.append(_EQUATION)
    sections += [
        "## Use it",
        "```sh\nqdense chat " + repository + "\n```",
        "```python\nfrom peft import AutoPeftModelForCausalLM\nfrom qdense import DenseLoraConfig  # makes qdense's methods "
        f'known to PEFT\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("{repository}")\n```',
        f"Prompts have the template `{card.template}`.",
    ]
    if folder.recipe.is_file():
        sections += list(_training(folder))
    if results := list(_results(folder)):
        sections += ["## Results", *results]
    return "\n\n".join(section.rstrip("\n") for section in sections) + "\n"


def _training(folder: RunFolder) -> Iterator[str]:
    recipe, provenance = load_recipe(folder.recipe), folder.provenance()
    data = provenance["data"]
    name = recipe.data.name or Path(str(recipe.data.path)).name
    source = ", of LLM-Adapters (ODC-By 1.0)" if TRAINING_SETS.get(str(recipe.data.name)) else ""
    checksum = f" (SHA-256 {data['sha256']})" if "sha256" in data else ""
    rows = provenance.get("num_training_rows")
    yield "## Training"
    yield f"Data: {rows or data.get('num_rows', '?')} rows of {markdown_escaped(clean(name))}{source}{checksum}."
    shown: Mapping[str, Any] = {
        "method": recipe.adapter.method,
        "rank": recipe.adapter.r,
        "alpha": recipe.adapter.scaling_alpha,
        "base in": f"{recipe.model.quantization}, {recipe.model.dtype}",
        "steps": provenance.get("num_steps", "?"),
        "batch": recipe.training.batch_size,
        "learning rate": recipe.training.learning_rate,
        "seed": recipe.training.seed,
    }
    yield markdown_table(["", "value"], [(key, markdown_escaped(clean(str(value)))) for key, value in shown.items()])
    yield "All of it is in `recipe.toml`."
    points = (
        [line for line in read_metrics(folder.metrics) if line["event"] == "validation"]
        if folder.metrics.is_file()
        else []
    )
    if points:
        every = -(-len(points) // _MOST_POINTS)
        kept = [*points[:-1:every], points[-1]]
        yield "Loss on rows that were held out for validation:"
        yield markdown_table(["step", "loss"], [(str(point["step"]), f"{point['loss']:.4f}") for point in kept])
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    yield clean(f"Versions: {versions}.")


def _results(folder: RunFolder) -> Iterator[str]:
    for evaluation in folder.evaluations():
        if not evaluation.is_finished:
            continue
        summary = json.loads(evaluation.summary.read_text(encoding="utf-8"))
        rows = []
        for task, result in summary["tasks"].items():
            low, high = (100 * bound for bound in result["paper"]["interval"])
            rows.append(
                (
                    markdown_escaped(clean(task)),
                    str(result.get("num_items", "")),
                    f"{100 * result['paper']['accuracy']:.1f} [{low:.1f}, {high:.1f}]",
                )
            )
        decoding = summary["decoding"]["name"]
        limit = f", the first {summary['limit']} items of each" if summary.get("limit") else ""
        yield f"Accuracy in percent, with 95% confidence intervals; decoding {decoding}{limit}:"
        yield markdown_table(["task", "items", "accuracy"], rows)
