"""The oracle: the model in float64, written apart from both references. `python -m reference.oracle` runs a case."""
