"""One process of Meta's own model-parallel code on one shard, as its `Llama.build` does it: for test_meta_code.py.

python tests/interop/meta_rank.py FOLDER RANK SHARDS STORE OUT     # writes the logits of tokens 1..40 to OUT
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
from fairscale.nn.model_parallel.initialize import initialize_model_parallel
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer

TOKENS = torch.arange(1, 41).unsqueeze(0)


def main(folder: str, rank: str, shards: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", next(n for _, n in socket.if_nameindex() if n.startswith("lo")))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, int(shards)), rank=int(rank), world_size=int(shards)
    )
    initialize_model_parallel(int(shards))
    params = json.loads((Path(folder) / "params.json").read_text())
    model = Transformer(ModelArgs(**params, max_batch_size=1, max_seq_len=64))
    state = torch.load(Path(folder) / f"consolidated.{int(rank):02d}.pth", map_location="cpu", weights_only=True)
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        logits = model(TOKENS, 0)[0]
    if rank == "0":
        torch.save(logits, out)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
