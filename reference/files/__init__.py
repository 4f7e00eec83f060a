"""The references' own reader of Meta and Hugging Face folders, apart from every other reader of these formats.

from reference.files import open_folder
checkpoint = open_folder("Meta-Llama-3.1-8B")
checkpoint.config["rope_scaling"]    # {'factor': 8.0, 'low_freq_factor': 1.0, ...}
"""

from reference.files.checkpoint import Checkpoint, Config, read_json
from reference.files.opening import open_folder

__all__ = ["Checkpoint", "Config", "open_folder", "read_json"]
