"""Any torch module as a candidate, with no class to write: `torch:FILE.py:Class` and `hf:FOLDER`.

fields.py fills the constructor, matching.py finds the parameters, calling.py asks for logits, hooked.py records taps.
"""
