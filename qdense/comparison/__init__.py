"""Evaluated runs side by side: paired tests, tables, published rows."""
