"""Recipes from a few changed values."""

from __future__ import annotations

from qdense.recipe import recipe_from_tables


def recipe_of(model="llama3-8b", **changes):
    """A recipe with defaults but for `table__key=value`."""
    tables = {"model": {"name": str(model)}, "data": {"name": "wordproblems"}}
    for key, value in changes.items():
        table, _, name = key.partition("__")
        tables[table] = {**tables.get(table, {}), name: value}
    return recipe_from_tables(tables, source="test")
