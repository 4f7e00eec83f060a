"""Checkpoints in and out: Meta folders, Hugging Face folders and hub ids, llama2.c `.bin` and `.pt`, GGUF.

`open_checkpoint` looks at a path, finds out which format it is, and returns the config and lazy, memory-mapped weights
under Meta's names; never a model. Everything is strict: what does not fit raises CheckpointError, one line that names
the file, the weight or key, and what to do.

    python -c "from nanollama.checkpoint import open_checkpoint; print(open_checkpoint('Meta-Llama-3.1-8B').config)"
"""

from nanollama.checkpoint.convert import convert
from nanollama.checkpoint.gguf import write_gguf
from nanollama.checkpoint.hf import write_hf
from nanollama.checkpoint.integrity import verify
from nanollama.checkpoint.llama2c import write_bin
from nanollama.checkpoint.meta import write_meta
from nanollama.checkpoint.opening import find_tokenizer, open_checkpoint, sniff
from nanollama.checkpoint.weights import Checkpoint, CheckpointError, Lazy, Weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Lazy",
    "Weights",
    "convert",
    "find_tokenizer",
    "open_checkpoint",
    "sniff",
    "verify",
    "write_bin",
    "write_gguf",
    "write_hf",
    "write_meta",
]
