"""One model over the processes of torchrun, each with a part of every layer (nanollama/tensor_parallel.py).

    torchrun --nproc_per_node 2 -m nanollama generate --ckpt Llama-3.3-70B --tp 2 --prompt "Once upon a time"

All processes decode the same tokens: they have the same logits and draw the same random numbers. The first one speaks.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from nanollama.checkpoint import open_checkpoint
from nanollama.checkpoint.adapter import merged, read_adapter
from nanollama.checkpoint.weights import DTYPES
from nanollama.generation.llama import Llama
from nanollama.model import Transformer
from nanollama.tensor_parallel import decode_by_parts_, fill_, plan, refuse_uncuttable
from nanollama.tokenizer import open_tokenizer


def load_parallel(
    path: str | Path,
    tp: int,
    *,
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> Llama:
    """This process's part of a model, read from its part of the file. Arguments as for `Llama.load`.

    Raises ValueError, one line, before any weight is read.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != tp:
        raise ValueError(
            f"--tp {tp} needs {tp} processes, and there are {started}: start torchrun --nproc_per_node {tp} -m "
            "nanollama ..."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available to this torch: use cpu")
    checkpoint = open_checkpoint(path)
    config, weights = checkpoint.config, checkpoint.weights
    refuse_uncuttable(config, tp)
    tokenizer = tokenizer or checkpoint.tokenizer
    opened = open_tokenizer(tokenizer, rows=config.vocab_size) if tokenizer else None
    if adapter is not None:
        weights = merged(weights, read_adapter(adapter, config))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    mesh = init_device_mesh(device, (tp,), mesh_dim_names=("tp",))
    with torch.device("meta"):
        model = Transformer(config)
    parallelize_module(model, mesh, plan(model), src_data_rank=None)
    fill_(model, weights, DTYPES[dtype] if dtype else weights.dtype, device)
    decode_by_parts_(model, mesh)
    return Llama(model.eval(), opened)
