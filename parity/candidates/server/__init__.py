"""Candidates behind HTTP: completions and log-probabilities."""
