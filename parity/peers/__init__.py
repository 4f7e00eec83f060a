"""Public implementations of Llama as candidates, a wrapper each; `python -m parity.peers` judges them (docs/peers.md).

To add one, write its wrapper (a candidate of at most 60 lines, see docs/parity.md) and its rows in registry.py.
"""
