"""In a module of its own, so that the lowest layers can ask without importing the whole package."""

__version__ = "0.1.0"
