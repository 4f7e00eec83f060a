"""Does the harness notice every known way of being wrong? `python -m parity.mutants` asks."""
