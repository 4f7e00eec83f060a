"""Seeded checkpoints: shapes, and their files. `python -m parity.synth` writes one."""
