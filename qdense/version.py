"""In a module of its own, so that the lowest layers can ask without importing the package's whole face."""

__version__ = "0.1.0"
