"""A recipe becomes a run: the loop, its optimizer, checkpoints, metrics, trackers."""
