"""Experiments: many runs that answer one question, from a file (`experiment.py`) to trained cells (`sweep.py`) to a page
(`report.py`)."""
