"""What tests share: models, recipes, runs, evaluated folders, a server."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
