"""A check for any language: a folder of inputs and expected numbers. `python -m parity.kit` makes and checks one."""
