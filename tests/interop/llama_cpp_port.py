"""llama.cpp as a candidate of parity.check: a .gguf with the cache and the weights that a user has, declared or not."""

from collections.abc import Callable

import llama_cpp

from parity.peers import llamacpp_port

F16, F32 = llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_F32


class Port(llamacpp_port.Port):
    """What it rounds, declared."""

    def __init__(self, path: str, cache: int, **conditions: str) -> None:
        super().__init__(path, cache)
        for name, value in conditions.items():
            setattr(self, name, value)


def loader(cache: int, weights: str = "fp32", **conditions: str) -> Callable[..., Port]:
    """NAME.fp32.gguf, or its neighbour with other weights."""
    return lambda path, dtype, device: Port(path.replace(".fp32.", f".{weights}."), cache, **conditions)


Q8 = {"integers": "int8/32", "activations": "int8/32"}
default = loader(F16)
default_declared = loader(F16, kv="fp16", attention_dtype="fp16")
q8_0 = loader(F32, "q8_0")
q8_0_declared = loader(F32, "q8_0", **Q8)
q8_0_default_declared = loader(F16, "q8_0", **Q8, kv="fp16", attention_dtype="fp16")
q4_0_said_to_be_q8_0 = loader(F32, "q4_0", **Q8)
