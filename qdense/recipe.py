"""The recipe: everything that decides a training run, read from TOML and fully validated before anything loads.

Precedence: `--set` and other command-line options, then the file, then the defaults below. Each field's description says
what is accepted; errors show it. A run's own `recipe.toml` has a further table, [provenance], which is ignored on
reading, so that the file of a finished run can be trained again unchanged.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import Field, create_model

from qdense.catalogs.choices import Activation, Init, RowKind, Sharing, ZeroInit
from qdense.catalogs.datasets import TRAINING_SETS
from qdense.catalogs.families import FAMILIES, MODULE_LETTERS, PAPER_TARGET_MODULES
from qdense.catalogs.models import CATALOG
from qdense.errors import DataError, RecipeError, did_you_mean, near_file, shortened
from qdense.methods import METHODS
from qdense.schema import (
    AS_TUPLE,
    RefusedError,
    Table,
    apply_override,
    checked,
    flattened,
    read_toml,
    refusal,
    table_at,
    validated,
)

Optimizer = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch"]
NamedTemplate = Literal["alpaca", "llm-adapters", "plain", "chat", "chatml", "llama3"]
TemplateName = Literal["auto"] | NamedTemplate
Quantization = Literal["nf4", "int8", "none"]
BaseDType = Literal["auto", "bfloat16", "float16", "float32"]
AdapterDType = Literal["auto", "bfloat16", "float32"]
_MOST = 10**6  # of what is counted or scaled: far beyond use, and nothing that is computed from it overflows
_DTYPE_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
Device = Literal["auto", "cuda", "cpu"]
_DATA_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".gz")
# What other trainers (Transformers, PEFT, TRL, Unsloth, Axolotl) call it.
_RENAMED = {
    "training.gradient_checkpointing": 'is called training.recompute here: "auto", "all" (for true), "none" (for false) or a '
    "number of layers",
    "training.gradient_accumulation_steps": "is not needed: training.batch_size is the rows of one step, and the plan divides "
    "them as the memory allows",
    "training.warmup_ratio": "is called training.warmup_steps here, a number of steps; omitted, a share of the run",
    "model.load_in_4bit": 'is called model.quantization = "nf4" here, which is the default',
    "model.load_in_8bit": 'is called model.quantization = "int8" here',
    "training.per_device_train_batch_size": "is training.micro_batch_size here (rows at a time; omitted, as many as "
    "fit); training.batch_size is the rows of a whole step",
    **{
        key: f"is called {here} here"
        for here, keys in {
            "model.name": ("model.base_model", "model.path", "model.model_name_or_path"),
            "adapter.r": ("adapter.lora_r", "adapter.rank"),
            "adapter.alpha": ("adapter.lora_alpha",),
            "adapter.dropout": ("adapter.lora_dropout",),
            "adapter.target_modules": ("adapter.lora_target_modules",),
            "data.max_length": ("data.max_seq_length", "data.cutoff_len", "data.sequence_len"),
            "training.learning_rate": ("training.lr",),
            "training.epochs": ("training.num_train_epochs", "training.num_epochs"),
            "training.schedule": ("training.lr_scheduler", "training.lr_scheduler_type"),
            "training.optimizer": ("training.optim",),
        }.items()
        for key in keys
    },
}
# Those that accelerate supports.
Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]


def _known_model(name: str) -> str:
    if name.startswith("~"):
        name = os.path.expanduser(name)
    if name in CATALOG or os.path.isdir(name):
        return name
    if name.startswith((".", "/")):
        raise RefusedError("no such folder")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    raise RefusedError(
        f"unknown model{did_you_mean(name, CATALOG)}; or a hub id, such as Qwen/Qwen3-8B (`qdense models` lists families), or a "
        "local folder with config.json"
    )


def _known_training_set(name: str | None) -> str | None:
    if name is None or name in TRAINING_SETS or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    raise RefusedError(f"unknown data set{did_you_mean(name, TRAINING_SETS)}; or a hub data set (owner/name)")


def _known_method(name: str) -> str:
    if name.lower() == "qlora":
        raise RefusedError(
            'QLoRA is a LoRA on a 4-bit base: adapter.method = "lora" with model.quantization = "nf4", the default'
        )
    if name not in METHODS:
        raise RefusedError(f"unknown method{did_you_mean(name, METHODS)}")
    return name


def _module_names(value: Any) -> Any:
    """The paper's letters ("QKVUD") become the names of the modules."""
    if isinstance(value, str):
        letters = [MODULE_LETTERS.get(letter) for letter in value]
        if not value or None in letters or len(set(value)) < len(value):
            raise RefusedError(
                f"the letters are {', '.join(f'{k} ({v})' for k, v in MODULE_LETTERS.items())}, each once, so all linear modules "
                'are "QKVOGUD"; other modules are given as a list of names'
            )
        return letters
    return value


class ModelRecipe(Table):
    name: Annotated[
        str, checked(_known_model), Field(description="a built-in name, a hub id (owner/name) or a local folder")
    ]
    revision: str | None = Field(None, description="a branch, tag or commit of the hub repository")
    quantization: Quantization = Field("nf4", description="nf4, int8 or none")
    dtype: BaseDType = Field(
        "auto",
        description="bfloat16, float16 or float32: the base's computation; auto: bfloat16, or float16 on a card without it",
    )
    device: Device = Field("auto", description="auto, cuda or cpu")

    @property
    def dtype_bytes(self) -> int:
        """Bytes of an element of `dtype`."""
        return _DTYPE_BYTES[self.dtype]

    def settled(self, *, has_bfloat16: bool) -> Self:
        """With the dtype that "auto" stands for on a device."""
        return self.model_copy(
            update={"dtype": "bfloat16" if has_bfloat16 else "float16"} if self.dtype == "auto" else {}
        )


class _AdapterRecipe(Table):
    method: Annotated[str, checked(_known_method)] = Field("denselora", description="a method's name")
    r: int = Field(32, ge=1, le=512, description="a whole number from 1 to 512")
    alpha: float | None = Field(None, gt=0, le=_MOST, description="a number above 0, at most a million; omitted, 2 r")
    dropout: float = Field(0.05, ge=0, lt=1, description="a number from 0 up to, but not including, 1")
    activation: Activation = Field("gelu", description="gelu, silu, tanh, relu or none")
    sharing: Sharing = Field(
        "kind",
        description="kind (all layers of one module name share encoder and decoder), shape (all of one size) or none",
    )
    layer_groups: int = Field(
        1,
        ge=1,
        le=1000,
        description="a whole number of groups of neighbouring layers; each group has its own encoders and decoders",
    )
    init: Init = Field(
        "paper",
        description="paper (M as the authors draw it) or balanced (M wider, so that the decoder starts as fast as LoRA's B)",
    )
    zero_init: ZeroInit = Field(
        "decoder",
        description="decoder, m or none: which factor starts at zero, so that the adapter adds nothing at first",
    )
    target_modules: Annotated[tuple[str, ...], AS_TUPLE, checked(_module_names)] = Field(
        PAPER_TARGET_MODULES, min_length=1, description='module names, or the paper\'s letters such as "QKVUD"'
    )  # fmt: skip
    dtype: AdapterDType = Field(
        "auto",
        description="bfloat16 or float32: the adapter's storage and computation; auto: bfloat16, or float32 on a float16 base",
    )
    master_weights: bool = Field(
        True, description="true or false: whether the optimizer keeps fp32 copies of bf16 weights"
    )

    @property
    def scaling_alpha(self) -> float:
        """alpha, or the authors' 2 r if the recipe omits it."""
        return self.alpha if self.alpha is not None else 2.0 * self.r

    @property
    def dtype_bytes(self) -> int:
        """Bytes of an element of `dtype`."""
        return _DTYPE_BYTES[self.dtype]

    def dtype_on(self, base_dtype: str) -> str:
        """`dtype`, or what "auto" stands for on a base that computes in `base_dtype`."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if base_dtype == "float16" else "bfloat16"

    @property
    def method_settings(self) -> Any:
        """The method's own table, [adapter.<method>]; None if it has none."""
        return getattr(self, self.method, None)

    def on(self, model_type: str) -> Self:
        """The same for a base of this type, whose layers may hold several target modules as one (qkv_proj)."""
        family = FAMILIES.get(model_type)
        names = tuple(dict.fromkeys(map(family.module_of, self.target_modules))) if family else self.target_modules
        return self if names == self.target_modules else self.model_copy(update={"target_modules": names})

    @property
    def unused(self) -> list[str]:
        """Keys that the recipe gives and the method does not read."""
        always = {"method", "dtype", "master_weights", self.method}
        return sorted(self.model_fields_set - METHODS[self.method].adapter_keys - always - _OWN_TABLES.keys())


# Tables of other methods are accepted too, so that one recipe serves all methods.
_OWN_TABLES = {method.name: method.settings for method in METHODS.values() if method.settings is not None}
if TYPE_CHECKING:
    AdapterRecipe = _AdapterRecipe
else:
    AdapterRecipe = create_model(
        "AdapterRecipe",
        __base__=_AdapterRecipe,
        **{
            name: (settings, Field(default_factory=settings, description=f"a table of the settings of {name}"))
            for name, settings in _OWN_TABLES.items()
        },
    )


class ColumnsRecipe(Table):
    instruction: str = Field("instruction", min_length=1, description="the name of a column")
    input: str = Field("input", min_length=1, description="the name of a column, which the data may lack")
    output: str = Field("output", min_length=1, description="the name of a column")
    messages: str | None = Field(
        None, min_length=1, description="the name of a column of conversations, in place of the others"
    )
    text: str | None = Field(
        None, min_length=1, description="the name of a column of whole texts, in place of the others"
    )


class DataRecipe(Table):
    name: Annotated[str | None, checked(_known_training_set)] = Field(
        None, description="a known data set, or a hub data set (owner/name)"
    )
    path: str | None = Field(None, min_length=1, description="a JSON, JSONL, CSV or Parquet file")
    config: str | None = Field(None, min_length=1, description="the configuration of a hub data set that has several")
    split: str = Field("train", min_length=1, description="the split of a hub data set")
    revision: str | None = Field(None, min_length=1, description="a branch, tag or commit of a hub data set")
    columns: ColumnsRecipe | None = Field(
        None, description="a table of column names; omitted, the columns are recognised by their names"
    )
    bad_rows: Literal["stop", "skip"] = Field(
        "stop",
        description="stop or skip: whether a blank or broken row is an error, or is dropped, counted and listed",
    )
    template: TemplateName = Field(
        "auto",
        description="alpaca, llm-adapters, plain (prompt and completion joined as they are), chat (the tokenizer's own), chatml "
        "or llama3; auto: chat for conversations, plain for whole texts, else alpaca",
    )
    max_length: int = Field(256, ge=8, le=2**22, description="a whole number of tokens from 8 to 4194304")
    train_on: Literal["auto", "all", "response", "last"] = Field(
        "auto",
        description="all, response (of a conversation: all answers) or last (its last answer): which tokens count in the loss; "
        "auto: response with a chat template or plain, else all",
    )
    fraction: float = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    seed: int = Field(42, ge=0, lt=2**32, description="a whole number from 0 to 4294967295")
    validation_rows: int = Field(
        120, ge=0, le=10**9, description="a whole number of rows, 0 or more, at most a billion"
    )

    def settled(self, kind: RowKind) -> DataRecipe:
        """With what "auto" stands for, for rows of this kind. Raises DataError for a template that cannot express them."""
        defaults = {"pair": "alpaca", "conversation": "chat", "text": "plain"}
        template = self.template if self.template != "auto" else defaults[kind]
        if kind == "text" and template != "plain":
            raise DataError(
                f'data.template = "{template}": the rows are whole texts, which no template divides into prompt and completion. '
                'Use "plain", or name the columns in [data.columns] (instruction, output)'
            )
        is_chat = template not in ("alpaca", "llm-adapters")
        train_on = self.train_on if self.train_on != "auto" else "response" if is_chat else "all"
        return self.model_copy(update={"template": template, "train_on": train_on})


class TrainingRecipe(Table):
    epochs: float = Field(3.0, gt=0, le=_MOST, description="a number above 0, at most a million")
    max_steps: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="a positive whole number of steps, at most a billion; omitted, `epochs` decides",
    )
    batch_size: int = Field(
        16, ge=1, le=_MOST, description="a positive whole number of examples per optimizer step, at most a million"
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=_MOST)] | Literal["auto"] = Field(
        "auto",
        description='a positive whole number of examples per forward pass, or "auto": as many as the memory allows',
    )
    packing: bool = Field(
        True,
        description="true or false: whether rows are joined end to end instead of padded, as many in a forward pass as fit into "
        "micro_batch_size rows of data.max_length tokens",
    )
    learning_rate: Annotated[float, Field(ge=1e-12, lt=1)] | Literal["auto"] = Field(
        "auto",
        description='a number from 1e-12 to below 1, or "auto": the method\'s own default, lower for a wider model',
    )
    rates: dict[str, Annotated[float, Field(gt=0, le=1000)]] = Field(
        default_factory=dict,
        description="a table of factors on the learning rate, one for each kind of trained tensor, such as { decoder = 4.0 }",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="linear, cosine or constant")
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] | Literal["auto"] = Field(
        "auto", description='a whole number of steps, 0 or more, or "auto": 5% of the run'
    )
    weight_decay: float = Field(0.0, ge=0, le=1000, description="a number from 0 to 1000")
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=_MOST)] | Literal[0] = Field(
        1.0, description="a number from 1e-6 to a million: gradients are clipped to this norm; or 0, for no clipping"
    )
    optimizer: Optimizer = Field("paged_adamw_8bit", description=", ".join(get_args(Optimizer)))
    recompute: Annotated[int, Field(ge=0, le=10_000)] | Literal["auto", "all", "none"] = Field(
        "auto",
        description='"all", "none" or a whole number of layers whose activations are recomputed in the backward pass '
        '(gradient checkpointing), or "auto": as few as the memory allows',
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="stop or skip: whether a loss or gradient that is not finite ends the run, or its step is skipped",
    )
    patience: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="a positive whole number of validations: the run ends early if as many in a row have not lowered the "
        "validation loss; omitted, it never does",
    )
    shard: bool = Field(
        False,
        description="true or false: whether the base's layers are divided among the processes of --gpus, which then each hold a "
        "part of them; slower, for a base that fits no single card",
    )
    neftune: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="a number above 0: noise on the embeddings while training (NEFTune's alpha, often 5); omitted, none",
    )
    kernels: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="auto (triton on CUDA, else torch), torch or triton: the adapter's kernels; triton also uses Liger's",
    )
    sample_prompts: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=10_000)], ...], AS_TUPLE] = Field(
        (),
        max_length=8,
        description="a list of at most 8 prompts, which the model answers at each validation (64 tokens)",
    )
    trackers: Annotated[tuple[Tracker, ...], AS_TUPLE] = Field(
        (), description=f"a list of experiment trackers: {', '.join(get_args(Tracker))}"
    )
    save_steps: int = Field(80, ge=1, le=10**9, description="a positive whole number of steps, at most a billion")
    eval_steps: int = Field(80, ge=1, le=10**9, description="a positive whole number of steps, at most a billion")
    keep: Literal["best", "last"] = Field(
        "best",
        description="best (lowest validation loss) or last: which weights become the adapter; omitted, best where there are "
        "validation rows, else last",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="a whole number from 0 to 4294967295")

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps of a run on this many rows; the last step of an epoch may have fewer than `batch_size`."""
        return self.max_steps or math.ceil(self.epochs * math.ceil(num_rows / self.batch_size))


class OutputRecipe(Table):
    dir: Annotated[str, checked(os.path.expanduser)] = Field("runs/run", min_length=1, description="a folder")


class Recipe(Table):
    """A validated recipe. `resolved()` returns it as plain tables with defaults filled in."""

    model: ModelRecipe = Field(description="a table with at least `name`")
    adapter: AdapterRecipe = Field(default_factory=AdapterRecipe, description="a table")
    data: DataRecipe = Field(description="a table with at least `name` or `path`")
    training: TrainingRecipe = Field(default_factory=TrainingRecipe, description="a table")
    output: OutputRecipe = Field(default_factory=OutputRecipe, description="a table")

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer keeps fp32 masters: if the recipe wants them and parameters are bf16."""
        trained = self.adapter.dtype if METHODS[self.adapter.method].is_adapter else self.model.dtype
        return self.adapter.master_weights and trained in ("auto", "bfloat16")

    def settled(self, *, has_bfloat16: bool) -> Self:
        """With the dtypes that "auto" stands for on a device."""
        model = self.model.settled(has_bfloat16=has_bfloat16)
        adapter = self.adapter.model_copy(update={"dtype": self.adapter.dtype_on(model.dtype)})
        return self.model_copy(update={"model": model, "adapter": adapter})

    def resolved(self) -> dict[str, Any]:
        """Plain tables for TOML: every value that is set or has a default."""
        tables = self.model_dump(mode="json", exclude_none=True)
        tables["adapter"]["alpha"] = self.adapter.scaling_alpha
        for name in _OWN_TABLES.keys() - {self.adapter.method}:
            del tables["adapter"][name]
        if not self.training.rates:
            del tables["training"]["rates"]
        return tables

    def choices(self) -> dict[str, Any]:
        """The values that differ from the defaults: what remains the same when a later version of qdense has more keys."""
        tables = self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        for name in ("model", "adapter"):  # on most devices, what the default stands for
            if tables.get(name, {}).get("dtype") == "bfloat16":
                del tables[name]["dtype"]
        if self.adapter.alpha == 2.0 * self.adapter.r:
            del tables["adapter"]["alpha"]
        for name in _OWN_TABLES.keys() - {self.adapter.method}:
            tables.get("adapter", {}).pop(name, None)
        return {name: table for name, table in tables.items() if table}

    def flattened(self) -> dict[str, Any]:
        """The resolved recipe as {"table.key": value}."""
        return flattened(self.resolved())


def model_recipe(table: Mapping[str, Any], source: str) -> ModelRecipe:
    """How to load a base, from a [model] table alone; `source` names it in errors. Raises RecipeError."""
    return recipe_from_tables({"model": table, "data": {"name": "wordproblems"}}, source=source).model


def keys_named(name: str) -> list[str]:
    """The keys with this name, each with its table: "max_steps" is "training.max_steps"."""
    return [f"{table}.{name}" for table in Recipe.model_fields if name in table_at(Recipe, [table]).model_fields]


def recipes_folder() -> Path:
    """What comes with qdense: in the wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with qdense, by name. The folders below hold experiments (`qdense.experiments`)."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.toml"))}


def named_file(name: str | Path, known: Mapping[str, Path]) -> Path | None:
    """A file that is given by its path or, where there is no such file, by the name of a known one; None if it is neither."""
    path = Path(name)
    return path if os.path.isfile(path) else known.get(str(name).removeprefix("recipes/").removesuffix(".toml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe that is given by its path or, where there is no such file, by the name of a built-in one.

    Raises:
        RecipeError: neither.
    """
    path, known = Path(name), builtin_recipes()
    found = named_file(name, known)
    if found is not None:
        return found
    if os.path.isdir(path):  # unlike Path's, it takes a name of any length
        raise RecipeError(f"{path}: is a folder; name a recipe, a TOML file")
    if path.suffix in _DATA_ENDINGS:
        hint = near_file(path, _DATA_ENDINGS)
        raise RecipeError(
            f"{path}: no such file"
            + (hint or f". To train on data of your own, write a recipe for it: qdense init {path}")
        )
    hint = near_file(path, (".toml",))
    nor = f"{hint} And" if hint else ", and"
    raise RecipeError(
        f"{shortened(str(path))}: no such file{nor} no built-in recipe{did_you_mean(str(name), known)}. For your own data, "
        "write one with `qdense init DATA`"
    )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a TOML file, or the name of a built-in recipe.
        overrides: `key=value` texts as given to `--set`, e.g. "adapter.r=64"; values are TOML, bare words are strings.

    Raises:
        RecipeError: the file cannot be read or has problems; the message lists them all, each with its key, value and remedy.
    """
    path = find_recipe(path)
    if path.suffix in _DATA_ENDINGS:
        raise RecipeError(f"{path}: is data, not a recipe. Write a recipe for it: qdense init {path}")
    tables = read_toml(path, "recipe")
    tables.pop("provenance", None)
    for override in overrides:
        key, _, value = override.partition("=")
        if value and (known := keys_named(key.strip())):
            meant = " or ".join(f"--set {each}={value}" for each in known)
            raise RecipeError(f"--set {override}: the key lacks its table; did you mean {meant}?")
        apply_override(tables, override)
    return recipe_from_tables(tables, source=str(path))


def recipe_from_tables(tables: Mapping[str, Any], source: str) -> Recipe:
    """Validate tables as read from TOML; `source` names them in errors. Raises RecipeError as `load_recipe` does."""
    recipe, problems = validated(Recipe, _with_keep(tables), _RENAMED)
    for key, shown, message in _conflicts(tables, set(problems)):
        problems.setdefault(key, (shown, message))
    if recipe is not None and not problems:
        return recipe
    raise refusal(source, problems.values())


def _with_keep(tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without validation rows there is no best step, so training.keep, where it is omitted, is then "last"."""
    data, training = tables.get("data"), tables.get("training", {})
    if not isinstance(data, Mapping) or not isinstance(training, Mapping):
        return tables
    if data.get("validation_rows") != 0 or "keep" in training:
        return tables
    return {**tables, "training": {**training, "keep": "last"}}


def _conflicts(tables: Mapping[str, Any], wrong: set[str]) -> Iterator[tuple[str, str, str]]:
    """(key, the text to show, what is wrong) of values that are valid alone and do not fit together.

    Works on the tables as read, so that these are reported together with invalid values (`wrong`).
    """

    def value(table: str, field: str) -> Any:
        given = tables.get(table, {})
        if table in wrong or f"{table}.{field}" in wrong or not isinstance(given, Mapping):
            return None
        return given.get(field, table_at(Recipe, [table]).model_fields[field].default)

    if value("adapter", "activation") == "relu" and value("adapter", "zero_init") != "none":
        message = (
            'needs adapter.zero_init = "none": ReLU has zero slope at 0, so nothing could learn after a '
            "factor that starts at zero"
        )
        yield "adapter.activation", 'adapter.activation = "relu"', message
    if value("adapter", "init") == "balanced" and value("adapter", "zero_init") != "decoder":
        message = 'needs adapter.zero_init = "decoder": it sets the size of the decoder\'s first gradient'
        yield "adapter.init", 'adapter.init = "balanced"', message
    if value("model", "dtype") == "float16":
        if value("adapter", "dtype") == "bfloat16":
            message = 'must be "float32" (or "auto") with model.dtype = "float16": a float16 base has float32 adapters'
            yield "adapter.dtype", 'adapter.dtype = "bfloat16"', message
        if (method := METHODS.get(str(value("adapter", "method")))) and not method.is_adapter:
            message = f'cannot be trained by {method.name}, whose weights would be float16. Use "bfloat16" or "float32"'
            yield "model.dtype", 'model.dtype = "float16"', message
    if value("training", "shard"):
        if value("model", "quantization") == "int8":
            yield "training.shard", "training.shard = true", 'needs model.quantization = "nf4" or "none"'
        if value("training", "sample_prompts"):
            message = (
                "cannot be combined with training.sample_prompts: all processes would have to answer them together"
            )
            yield "training.shard", "training.shard = true", message
        method = METHODS.get(str(value("adapter", "method")))
        if method is not None and (method.reads_base_weights or not method.is_adapter):
            message = f"cannot be used with {method.name}, which reads or trains the base's own weights"
            yield "training.shard", "training.shard = true", message
    if value("adapter", "sharing") == "none" and (value("adapter", "layer_groups") or 1) > 1:
        message = 'must be 1 with adapter.sharing = "none", where no layers share an encoder and decoder'
        yield "adapter.layer_groups", f"adapter.layer_groups = {value('adapter', 'layer_groups')}", message
    method = METHODS.get(str(value("adapter", "method")))
    rates = value("training", "rates")
    if method is not None and isinstance(rates, Mapping):
        known = sorted(set(method.factors.values()))
        for name in sorted(rates.keys() - set(known)):
            message = f"{method.name} trains no such tensors{did_you_mean(name, known)}"
            yield f"training.rates.{name}", f"training.rates.{shortened(name)}", message
    quantization = value("model", "quantization")
    if method is not None and quantization and quantization not in method.quantizations:
        accepted = " or ".join(f'"{name}"' for name in method.quantizations)
        message = f"method {method.name} needs {accepted}: {method.why_not_quantized}"
        yield "model.quantization", f'model.quantization = "{quantization}"', message
    training = tables.get("training")
    asks_for_best = isinstance(training, Mapping) and training.get("keep") == "best"
    for key in ("patience", "sample_prompts"):  # what happens at a validation
        if value("training", key) and value("data", "validation_rows") == 0:
            message = "needs validation rows: set data.validation_rows above 0, or omit it"
            yield f"training.{key}", f"training.{key}", message
    if asks_for_best and value("data", "validation_rows") == 0:
        message = 'needs validation rows: set data.validation_rows above 0, or training.keep = "last"'
        yield "training.keep", 'training.keep = "best"', message
    is_data_readable = not wrong & {"data", "data.name", "data.path"} and isinstance(tables.get("data"), Mapping)
    if is_data_readable and value("data", "name") is None and value("data", "path") is None:
        yield "data.name", "data.name", "is missing: name a data set, or set data.path to a file of your own"
