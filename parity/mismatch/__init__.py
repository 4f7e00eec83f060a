"""Trainer against engine: two columns of log-probabilities of the same tokens, and which of them is off."""
