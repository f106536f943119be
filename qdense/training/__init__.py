"""A recipe becomes a run: optimizer, Trainer, checkpoints, metrics."""
