"""nanollama with integer weights, under the names that candidates of their own go by.

python -m parity.check --candidate parity.candidates.quantized:int8 --max_new_tokens 16
"""

from parity.candidates.nano.quantized import Quantized, int4, int8

__all__ = ["Quantized", "int4", "int8"]
