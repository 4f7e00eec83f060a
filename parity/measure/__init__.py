"""Errors in units of the references' own rounding: metrics, evidence, tolerances."""
