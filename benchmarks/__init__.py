"""Measurements whose figures are kept in benchmarks/results/, and what must not change, in benchmarks/frozen/."""
