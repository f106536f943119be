"""Scoring a model: tasks, rules for reading answers, generation, intervals."""
