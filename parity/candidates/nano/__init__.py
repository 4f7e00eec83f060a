"""nanollama as a candidate, and its reading of checkpoints: beside mutants, the one place of parity that imports it."""
