"""What `python -m parity.peers` judges, a row each, and what is known of those that fail."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """One implementation on one checkpoint."""

    name: str  # of the row: what --only takes
    of: str  # whose it is, and which part of it
    candidate: str  # {clone} in it is the folder of the clone
    checkpoint: str  # of CHECKPOINTS in run.py
    versioned_by: str  # the distribution whose version names it, or the clone's folder
    dtypes: str = "fp32,bf16"
    packages: tuple[
        str, ...
    ] = ()  # of an environment of its own, each without what it asks for: what clashes is left out
    clone: str = ""  # the public repository, whose last part names its folder in --clones
    conditions: str = ""
    finding: str = ""  # what is wrong, read in its source
    repeat: str = ""  # the same outside the harness


KERAS = ("keras", "keras-hub", "absl-py", "namex", "h5py", "optree", "ml-dtypes", "kagglehub", "kagglesdk")
JAX = ("jax", "jaxlib", "opt-einsum", "ml-dtypes", "scipy", "einops")
LIT = ("litgpt", "lightning", "lightning-utilities", "torchmetrics")
TUNE = ("torchtune", "torchao==0.15.0", "omegaconf", "antlr4-python3-runtime")
MLX = ("mlx-lm", "mlx", "mlx-cpu")
PORTS = "parity.peers"

PEERS: tuple[Peer, ...] = (
    Peer("nanollama", "nanollama, its exact and its fast path", "nanollama", "3.1-meta", "nanollama"),
    Peer("nanollama-int8", "nanollama, weights as int8", "parity.candidates.quantized:int8", "3.1-meta", "nanollama",
         conditions='`integers = "int8"`'),
    Peer("transformers-sdpa", "transformers, sdpa", f"{PORTS}.transformers_port:sdpa", "3.1-hf", "transformers"),
    Peer("transformers-eager", "transformers, eager", f"{PORTS}.transformers_port:eager", "3.1-hf", "transformers"),
    Peer("llama.cpp-f32", "llama.cpp, F32 file", f"{PORTS}.llamacpp_port:f32", "3.1-gguf-fp32", "llama-cpp-python",
         "fp32", conditions="cache in float32"),
    Peer("llama.cpp-f16", "llama.cpp, F16 file", f"{PORTS}.llamacpp_port:f32", "3.1-gguf-fp16", "llama-cpp-python",
         "fp32", conditions="cache in float32; the reference has the file's weights"),
    Peer("llama.cpp-default", "llama.cpp, its default cache", f"{PORTS}.llamacpp_port:load", "3.1-gguf-fp32",
         "llama-cpp-python", "fp32", conditions="cache in float16",
         finding="A real deviation, by design: keys and values are rounded to float16, attention computes with them",
         repeat="""
import llama_cpp, numpy as np
ids = list(range(3, 63))
def last(kind):
    llama = llama_cpp.Llama("x.gguf", n_ctx=512, logits_all=True, verbose=False, type_k=kind, type_v=kind)
    llama.eval(ids)
    return llama.scores[len(ids) - 1]
print(np.abs(last(llama_cpp.GGML_TYPE_F16) - last(llama_cpp.GGML_TYPE_F32)).max())
"""),
    Peer("llama.cpp-q8_0", "llama.cpp, Q8_0 file", f"{PORTS}.llamacpp_port:f32", "3.1-gguf-q8_0", "llama-cpp-python",
         "fp32", conditions="cache in float32; the reference has the file's weights, in float32",
         finding="A real deviation, by design: before a product with Q8_0 weights ggml rounds the inputs to int8, too",
         repeat="""
# ggml-cpu/ggml-cpu.c, type_traits_cpu[GGML_TYPE_Q8_0]: vec_dot_type = GGML_TYPE_Q8_0 is what inputs are rounded to
import gguf, numpy as np
x = np.random.default_rng(0).standard_normal((1, 128)).astype(np.float32)
rounded = gguf.dequantize(gguf.quantize(x, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
print(np.abs(x - rounded).max())
"""),
    Peer("llama.cpp-default-declared", "llama.cpp, its default cache, declared", f"{PORTS}.llamacpp_port:declared",
         "3.1-gguf-fp32", "llama-cpp-python", "fp32", conditions='`kv = attention_dtype = "fp16"`'),
    Peer("llama.cpp-q8_0-declared", "llama.cpp, Q8_0 file, declared", f"{PORTS}.llamacpp_port:q8_0", "3.1-gguf-q8_0",
         "llama-cpp-python", "fp32", conditions='`integers = activations = "int8/32"`, cache in float32'),
    Peer("keras-hub", "KerasHub, torch backend", f"{PORTS}.keras_hub_port:load", "3.1-hf", "keras-hub", packages=KERAS,
         finding="**A bug**: its converter of Hugging Face folders drops `rms_norm_eps`; every model gets 1e-6",
         repeat="""
import json, os
os.environ["KERAS_BACKEND"] = "torch"
import keras_hub
model = keras_hub.models.Llama3Backbone.from_preset("x-hf")
print(json.load(open("x-hf/config.json"))["rms_norm_eps"], model.layer_norm_epsilon)
"""),
    Peer("keras-hub-eps", "KerasHub, its eps put right", f"{PORTS}.keras_hub_port:eps", "3.1-hf", "keras-hub",
         packages=KERAS, conditions="`epsilon` of each layer set to the checkpoint's"),
    Peer("tinygrad-3", "tinygrad.llm on Llama 3", f"{PORTS}.tinygrad_port:load", "3-gguf-fp32", "tinygrad", "fp32",
         packages=("tinygrad",), conditions="clang installed; weights and cache in float32 for its float16; "
         "tinygrad.llm.kernels, which its wheel lacks, replaced"),
    Peer("tinygrad-3.1", "tinygrad.llm on Llama 3.1", f"{PORTS}.tinygrad_port:load", "3.1-gguf-fp32", "tinygrad",
         "fp32", packages=("tinygrad",), conditions="as above",
         finding="**A bug**: no RoPE scaling; rope_freqs.weight, which holds it, is loaded by name and unused",
         repeat="""
import os
os.environ["HALF"] = "0"
from tinygrad.llm import gguf
print(gguf.gguf_load("x.gguf")[1]["rope_freqs.weight"].numpy())  # not all 1: the scaling of Llama 3.1
source = open(gguf.__file__.replace("gguf.py", "model.py")).read()
print([line for line in source.splitlines() if "rope_freqs" in line])  # "NOTE: rope_freqs.weight (32,) is unused"
"""),
    Peer("llama-2-jax-mha", "llama-2-jax, a kv head a query head", f"{PORTS}.llama2_jax_port:load", "2-mha-hf",
         "llama-2-jax", "fp32", packages=JAX, clone="ayaka14732/llama-2-jax"),
    Peer("llama-2-jax-gqa", "llama-2-jax, grouped heads as in Llama 2 70B", f"{PORTS}.llama2_jax_port:load", "2-gqa-hf",
         "llama-2-jax", "fp32", packages=JAX, clone="ayaka14732/llama-2-jax",
         finding="**A bug**: query heads are mapped to kv heads round robin (query head h reads kv head h mod K)",
         repeat="""
import jax, torch
from types import SimpleNamespace
jax.tree_map = jax.tree.map
from lib.llama_params.convert_params import convert_q_proj
sizes = SimpleNamespace(d_model=8, n_rep_kv=4, n_heads_kv=2, d_k=1)  # 8 query heads on 2 kv heads
rows = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
rows.weight[:] = torch.arange(8.0)[:, None]  # row h belongs to query head h
print(convert_q_proj(rows, model_config=sizes)[0, :, 0, 0])  # those of kv head 0: 0, 2, 4, 6; repeat_kv has 0, 1, 2, 3
"""),
    Peer("nano-llama31", "nano-llama31 on Llama 3.1", f"{PORTS}.nano_llama31_port:load", "3.1-meta", "nano-llama31",
         clone="karpathy/nano-llama31"),
    Peer("nano-llama31-3.2", "nano-llama31 on Llama 3.2's scaling", f"{PORTS}.nano_llama31_port:load", "3.2-meta",
         "nano-llama31", clone="karpathy/nano-llama31",
         finding="**A bug**: `apply_scaling` hard-codes a factor of 8, which params.json's 32 does not reach",
         repeat="""
# In the folder of the clone, with fire and tiktoken installed.
import llama31, torch
plain = 1 / 500000.0 ** (torch.arange(0, 16, 2)[:8].float() / 16)
print((plain / llama31.apply_scaling(plain)).max())  # 8, whatever the checkpoint says
"""),
    Peer("litgpt", "LitGPT, its GPT and its converter", f"{PORTS}.litgpt_port:load", "3.1-hf", "litgpt", packages=LIT),
    Peer("torchtune", "torchtune, llama3_1 and its converter", f"{PORTS}.torchtune_port:load", "3.1-hf", "torchtune",
         packages=TUNE),
    Peer("mlx-lm", "mlx-lm on MLX's CPU build", f"{PORTS}.mlx_lm_port:load", "3.1-hf", "mlx-lm", packages=MLX),
    Peer("llama3.np", "llama3.np, NumPy, a kv head a query head", f"{PORTS}.llama3_np_port:load", "2-mha-meta",
         "llama3.np", "fp32", clone="likejazz/llama3.np"),
    Peer("gpt-fast", "gpt-fast, no wrapper", "torch:{clone}/model.py:Transformer", "3.1-meta", "gpt-fast",
         clone="pytorch-labs/gpt-fast"),
    Peer("llm.c", "llm.c, train_llama3.py, no wrapper", "torch:{clone}/train_llama3.py:LLaMA", "3.1-meta", "llm.c",
         clone="karpathy/llm.c"),
    Peer("nano-llama31-torch", "nano-llama31, no wrapper", "torch:{clone}/llama31.py:Transformer", "3.1-meta",
         "nano-llama31", packages=("fire",), clone="karpathy/nano-llama31"),
    Peer("llama2.c", "llama2.c, model.py, no wrapper", "torch:{clone}/model.py:Transformer", "2-gqa-meta", "llama2.c",
         clone="karpathy/llama2.c"),
    Peer("llama2.c-3", "llama2.c, model.py, on Llama 3, no wrapper", "torch:{clone}/model.py:Transformer", "3-meta",
         "llama2.c", clone="karpathy/llama2.c",
         finding="A limit that it does not say: RoPE's base is 10,000 always, `ModelArgs` has none",
         repeat="""
# In the folder of the clone.
import inspect, model
print(inspect.signature(model.ModelArgs))  # no base
print(inspect.signature(model.precompute_freqs_cis), "freqs_cis(" in inspect.getsource(model.Transformer))
"""),
    Peer("pytorch-llama", "pytorch-llama, no wrapper", "torch:{clone}/model.py:Transformer", "2-gqa-meta",
         "pytorch-llama", clone="hkproj/pytorch-llama"),
    Peer("lit-llama", "lit-llama, no wrapper", "torch:{clone}/lit_llama/model.py:LLaMA", "2-lit-meta", "lit-llama",
         packages=LIT, clone="Lightning-AI/lit-llama",
         conditions="a checkpoint of its eps, 1e-5, and its hidden size, a multiple of 256"),
    Peer("llms-from-scratch", "LLMs-from-scratch, no wrapper",
         "torch:{clone}/pkg/llms_from_scratch/llama3.py:Llama3Model", "3.1-eps-meta", "LLMs-from-scratch",
         clone="rasbt/LLMs-from-scratch", conditions="a checkpoint of its eps, 1e-5"),
)  # fmt: skip
