"""nanollama: Llama 2 / 3 / 3.1 / 3.2 / 3.3 in one readable file, proved against the reference implementations."""

__version__ = "0.1.0"
