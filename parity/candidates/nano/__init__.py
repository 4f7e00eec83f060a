"""nanollama as a candidate, and its reading of checkpoints: the one place of `candidates` that imports it."""
