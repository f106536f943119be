"""Tables of a TOML file with checked keys: how they are read, overridden and validated, and how their problems are reported.

Recipes and experiments are such files. Each field's description says what is accepted; errors show it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from qdense.errors import RecipeError, did_you_mean, shortened

_T = TypeVar("_T", bound="Table")
Problem = tuple[str, str]  # the text to show ("adapter.r = 0"), what is wrong


class RefusedError(ValueError):
    """A value that is refused for a reason that its field's description does not give."""


class Table(BaseModel):
    """A table whose keys are all known and whose values have the right type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def checked(function: Any) -> Any:
    """Pass texts through `function` before anything else looks at them."""
    return BeforeValidator(lambda value: function(value) if isinstance(value, str) else value)


AS_TUPLE = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a file; `what` names it ("recipe") in the error if it does not exist. Raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    try:
        return tomllib.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # also for a number with thousands of digits, which is not a TOMLDecodeError
        if str(path).endswith((".yml", ".yaml")):
            raise RecipeError(
                f"{path}: is YAML; a recipe is TOML. `qdense init DATA` writes one for your data"
            ) from None
        raise RecipeError(f"{path}: not valid TOML: {error}{_shown_line(text, str(error))}") from None


def _shown_line(text: str, fault: str) -> str:
    """The line that a fault of tomllib names, and what is most often wrong with it."""
    number = re.search(r"at line (\d+)", fault)
    lines = text.splitlines()
    if number is None or not 0 < int(number[1]) <= len(lines):
        return ""
    line = lines[int(number[1]) - 1].strip()
    value = line.partition("=")[2].strip()
    hint = f'; text needs quotes: "{shortened(value)}"' if re.fullmatch(r"[A-Za-z_./~][^\"'=]*", value) else ""
    return f": {shortened(line)}{hint}"


def apply_override(tables: dict[str, Any], override: str, *, least_parts: int = 2) -> None:
    """Set what a `--set key=value` says; the value is TOML, a bare word is a string. Raises RecipeError."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < least_parts or not all(parts):
        raise RecipeError(f"--set {override}: write it as table.key=value, for instance --set adapter.r=64")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    try:
        put(tables, parts, value)
    except KeyError as error:
        raise RecipeError(f"--set {override}: {error.args[0]} is a value and not a table") from None


def put(tables: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set the value that these keys lead to, in tables that are made if they are missing. Raises KeyError for a key that leads to
    a value and not a table."""
    table: Any = tables
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise KeyError(key)
    table[keys[-1]] = value


def validated(
    root: type[_T], tables: Mapping[str, Any], renamed: Mapping[str, str] | None = None
) -> tuple[_T | None, dict[str, Problem]]:
    """The validated tables, or None, and the problems by key.

    Args:
        renamed: key -> what to say where a user gives this key, which other programs have.
    """
    try:
        return root.model_validate(tables), {}
    except ValidationError as error:
        problems: dict[str, Problem] = {}
        for details in error.errors():
            location = _location(root, details)
            problems.setdefault(".".join(location), _explain(root, location, details, renamed or {}))
        return None, problems


def refusal(source: str, problems: Iterable[Problem]) -> RecipeError:
    """An error that lists all problems of a file."""
    problems = list(problems)
    width = max(len(shown) for shown, _ in problems)
    lines = [f"  {shown:<{width}}   {message}" for shown, message in problems]
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return RecipeError("\n".join([f"{source}: {count}", *lines]))


def flattened(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key: {"adapter": {"r": 16}} as {"adapter.r": 16}."""
    values: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            values |= {f"{key}.{inner}": found for inner, found in flattened(value).items()}
        else:
            values[key] = value
    return values


def table_at(root: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    """The type of the table that these keys lead to."""
    table = root
    for part in location:
        inner = _table_type(table.model_fields[part].annotation)
        assert inner is not None
        table = inner
    return table


def _location(root: type[BaseModel], details: Any) -> list[str]:
    """The keys that lead to a problem's value, without the names that pydantic adds for alternatives and validators."""
    location: list[str] = []
    table: Any = root
    for part in details["loc"]:
        if isinstance(part, str) and part in table.model_fields:
            location.append(part)
            inner = _table_type(table.model_fields[part].annotation)
            if inner is None:
                break
            table = inner
        elif details["type"] == "extra_forbidden":
            location.append(shortened(str(part)))
            break
    return location


def _table_type(annotation: Any) -> type[BaseModel] | None:
    """The table that a field's annotation stands for, alone or as `Table | None`."""
    found = [
        each for each in (annotation, *get_args(annotation)) if isinstance(each, type) and issubclass(each, BaseModel)
    ]
    return found[0] if found else None


def _explain(root: type[BaseModel], location: Sequence[str], details: Any, renamed: Mapping[str, str]) -> Problem:
    """One of pydantic's problems as (the text to show, what is wrong)."""
    cause = details.get("ctx", {}).get("error")
    key = ".".join(location)
    if details["type"] == "missing":
        return key, f"is missing: {_description(root, location)}"
    if key in renamed:
        return key, renamed[key]
    if details["type"] == "extra_forbidden":
        return key, f"unknown key{did_you_mean(location[-1], table_at(root, location[:-1]).model_fields)}"
    reason = str(cause) if isinstance(cause, RefusedError) else f"must be {_description(root, location)}"
    return f"{key} = {_shown(details['input'])}", reason


def _description(root: type[BaseModel], location: Sequence[str]) -> str:
    return table_at(root, location[:-1]).model_fields[location[-1]].description or "something else"


def _shown(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return shortened(text)
