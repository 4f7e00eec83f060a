"""nanollama as a candidate: its exact path (bitwise Meta on CPU) and its fast path, whole or layer by layer."""

import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nanollama.chat as chat_module
import nanollama.model as model_module
from nanollama.checkpoint import Checkpoint, open_checkpoint
from nanollama.model import KVCache, ModelConfig, Transformer, TransformerBlock
from parity.candidates.nano.taps import at_taps, keep_in, put_from, taps_of

if TYPE_CHECKING:
    from parity.candidates.nano.training import NanoTrainer

SMALL_BYTES = 2 * 2**30
HEAD_BLOCK_ROWS = 8192


def config_echo(config: ModelConfig) -> dict[str, Any]:
    """The keys that every implementation reports, see docs/parity.md."""
    names = (
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "hidden_dim",
        "vocab_size",
        "norm_eps",
        "rope_theta",
    )
    scaling = asdict(config.rope_scaling) if config.rope_scaling else None
    return {name: getattr(config, name) for name in names} | {"rope_scaling": scaling, "tied": config.tied}


class Nano:
    """A loaded nanollama with the whole candidate interface."""

    def __init__(
        self, checkpoint: str, dtype: torch.dtype, device: str, attention: str, *, model: Transformer | None = None
    ) -> None:
        """model: one that is there already, in place of the checkpoint's."""
        self.opened: Checkpoint = open_checkpoint(checkpoint)
        self.cfg, self.dtype, self.device, self.attention = self.opened.config, dtype, device, attention
        self.notices = self.opened.notices
        self.tokenizer = self.opened.tokenizer
        self.streamed = model is None and not self._fits_whole()
        self.model: Any = None if self.streamed else model or self._whole()
        self.cache: KVCache | None = None

    def _bytes(self) -> int:
        return sum(torch.Size(s).numel() for s in self.opened.weights.shapes.values()) * self.dtype.itemsize

    def _fits_whole(self) -> bool:
        if self._bytes() <= SMALL_BYTES or self.device != "cpu":
            return True
        one_file = self.opened.format == "hf" or not (self.opened.path / "consolidated.01.pth").exists()
        return one_file and self.opened.weights.dtype == self.dtype and self._bytes() <= 0.8 * memory_bytes()

    def _whole(self) -> Transformer:
        weights: Any = self.opened.weights
        if self._bytes() <= SMALL_BYTES:
            # Fresh, aligned memory: kernels may pick another order of summation on an unaligned view of a file.
            weights = {name: weights[name].to(self.dtype).clone() for name in weights}
        model = Transformer.from_weights(
            self.cfg, weights, dtype=self.dtype, device=self.device, attention=self.attention
        )
        return model.eval()

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def packed(self, tokens: Tensor, doc_ids: Tensor) -> Tensor:
        """Documents packed in a row: positions restart with each."""
        starts = torch.ones_like(doc_ids, dtype=torch.bool)
        starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
        index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
        return self.model(tokens, positions=index - torch.where(starts, index, 0).cummax(1).values, doc_ids=doc_ids)

    def prefill(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        self.cache = KVCache(self.cfg, B, T + 512, dtype=self.dtype, device=self.device)
        return self.model(tokens, cache=self.cache)

    def decode(self, token: Tensor) -> Tensor:
        assert self.cache is not None
        if self.cache.length + token.shape[1] > self.cache.max_len:
            self.cache = longer(self.cache, self.cfg)
        return self.model(token, cache=self.cache)

    def taps(self, tokens: Tensor) -> dict[str, Tensor]:
        return taps_of(self.model, tokens)

    def ops(self, name: str, inputs: dict[str, Tensor]) -> Tensor:
        """The tap `name` (B, T, ...) from the given taps alone, by the block's own code; see docs/parity.md."""
        if name == "final_norm":
            return self.model.norm(*inputs.values())
        if name == "logits":
            return F.linear(inputs["final_norm"], self.model.head()).float()
        layer = int(name.split(".")[1])
        if layer >= len(self.model.layers):
            raise NotImplementedError(f"there is no layer {layer}")
        before = [n for n in inputs if n == "embed" or n.endswith(".out")]
        B, T = next(iter(inputs.values())).shape[:2]
        x = inputs[before[0]] if before else torch.zeros(B, T, self.cfg.dim, dtype=self.dtype, device=self.device)
        block, found = self.model.layers[layer], dict[str, Tensor]()
        ctx = self.model.context(torch.zeros(B, T, dtype=torch.long, device=self.device))
        put = put_from({n: x for n, x in inputs.items() if n not in before})
        with at_taps(block, put), at_taps(block, keep_in(found, f"layers.{layer}.", self.cfg.head_dim)):
            block(x, ctx)
        return found[name]

    def compiled(self, tokens: Tensor) -> Tensor:
        """The same blocks under torch.compile. Raises NotImplementedError where there is no compiler."""
        if self.attention != "fast" or self.dtype != torch.float32:
            raise NotImplementedError("compiled against eager is checked on the fast path in fp32")
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
            raise NotImplementedError("torch.compile needs a C++ compiler: none was found")
        ctx, h = self.model.context(tokens), self.model.tok_embeddings(tokens)
        block = torch.compile(lambda layer, h: layer(h, ctx), dynamic=False)
        for layer in self.model.layers:
            h = block(layer, h)
        return F.linear(self.model.norm(h), self.model.head()).float()

    def loss_and_grads(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        from parity.candidates.nano import training  # finetune and all that it needs: a second more to import

        return training.loss_and_grads(self, tokens, targets)

    def trainer(self) -> "NanoTrainer":
        from parity.candidates.nano import training

        return training.NanoTrainer(self)

    def stream(
        self, sequences: list[list[int]], positions: list[list[int]] | None
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The forward pass with one layer in memory: yields (part, {"sequence/tap": (T, ...)})."""
        weights, cfg = self.opened.weights, self.cfg
        rows = [slice(None)] * len(sequences) if positions is None else positions
        tokens = [torch.tensor([ids]) for ids in sequences]
        with torch.device("meta"):
            skeleton = Transformer(cfg, attention=self.attention)
        contexts = [skeleton.context(t) for t in tokens]
        used = torch.unique(torch.cat([t[0] for t in tokens]))
        table = torch.cat([weights.rows("tok_embeddings.weight", int(u), int(u) + 1) for u in used]).to(self.dtype)
        hidden = [F.embedding(torch.searchsorted(used, t), table) for t in tokens]  # (1, T, C) each
        yield "embed", {f"{i}/embed": h[0][rows[i]] for i, h in enumerate(hidden)}
        for n in range(cfg.n_layers):
            block = self._block(n)
            found: dict[str, Tensor] = {}
            for i, h in enumerate(hidden):
                taps: dict[str, Tensor] = {}
                with at_taps(block, keep_in(taps, f"layers.{n}.", cfg.head_dim)):
                    hidden[i] = block(h, contexts[i])
                found |= {f"{i}/{name}": x[0][rows[i]].clone() for name, x in taps.items()}
            del block
            yield f"layers.{n}", found
        yield "head", self._head(hidden, rows)

    def _block(self, n: int) -> TransformerBlock:
        with torch.device("meta"):
            block = TransformerBlock(self.cfg, n, self.attention)
        state = {name: self.opened.weights[f"layers.{n}.{name}"].to(self.dtype) for name in block.state_dict()}
        block.load_state_dict(state, assign=True)
        return block

    def _head(self, hidden: list[Tensor], rows: list[Any]) -> dict[str, Tensor]:
        norm = model_module.RMSNorm(self.cfg.dim, self.cfg.norm_eps)
        norm.load_state_dict({"weight": self.opened.weights["norm.weight"].to(self.dtype)}, assign=True)
        normed = [norm(h)[0] for h in hidden]  # (T, C) each
        found = {f"{i}/final_norm": h[rows[i]] for i, h in enumerate(normed)}
        name, V = "tok_embeddings.weight" if self.cfg.tied else "output.weight", self.cfg.vocab_size
        logits = [torch.empty(h.shape[0], V) for h in normed]
        for start in range(0, V, HEAD_BLOCK_ROWS):
            block = self.opened.weights.rows(name, start, min(start + HEAD_BLOCK_ROWS, V)).to(self.dtype)
            for out, h in zip(logits, normed, strict=True):
                out[:, start : start + HEAD_BLOCK_ROWS] = F.linear(h.unsqueeze(0), block)[0].float()
        return found | {f"{i}/logits": x for i, x in enumerate(logits)}

    def config(self) -> dict[str, Any]:
        return config_echo(self.cfg)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return model_module.rope_table(self.cfg, positions)

    def weights(self) -> dict[str, dict[str, Any]]:
        """Shape and CRC-32 of every tensor's bytes as stored, in Meta's layout."""
        stored = self.opened.weights
        return {name: {"shape": list(stored.shapes[name]), "crc32": checksum(stored, name)} for name in stored.shapes}

    def use_tokenizer(self, path: str) -> None:
        """The file that the user named, in place of the one beside the checkpoint."""
        self.tokenizer = Path(path)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer().encode(text, bos=True)

    def encode_plain(self, text: str) -> list[int]:
        return self._tokenizer().encode(text, bos=False)

    def encode_chat(self, dialog: list[dict[str, Any]]) -> list[int] | None:
        """Ids of a dialog, ready for the assistant's answer; none of one that cannot be rendered."""
        try:
            return chat_module.encode_chat(dialog, self._tokenizer(), add_generation_prompt=True).ids
        except ValueError:
            return []

    def _tokenizer(self) -> Any:
        assert self.tokenizer is not None
        return load_tokenizer(self.tokenizer)


@cache
def load_tokenizer(path: Path) -> Any:
    from nanollama.tokenizer import open_tokenizer

    return open_tokenizer(path)


def longer(cache: KVCache, cfg: ModelConfig) -> KVCache:
    """The same keys and values with twice the room, for long texts that come in many chunks."""
    old = cache.k[0]  # (B, S, K, D)
    grown = KVCache(cfg, old.shape[0], 2 * cache.max_len, dtype=old.dtype, device=old.device)
    for new, full in zip(grown.k + grown.v, cache.k + cache.v, strict=True):
        new[:, : cache.max_len] = full
    grown.length = cache.length
    return grown


def checksum(weights: Any, name: str) -> int:
    """CRC-32 over row blocks of about 64 MB."""
    rows, crc = weights.shapes[name][0], 0
    width = torch.Size(weights.shapes[name][1:]).numel() * weights.dtype.itemsize
    step = max(1, (64 << 20) // width)
    for start in range(0, rows, step):
        block = weights.rows(name, start, min(rows, start + step)).contiguous()
        crc = zlib.crc32(block.view(-1).view(torch.uint8).numpy(), crc)
    return crc


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def exact(checkpoint: str, dtype: torch.dtype, device: str) -> Nano:
    return Nano(checkpoint, dtype, device, "exact")


def fast(checkpoint: str, dtype: torch.dtype, device: str) -> Nano:
    return Nano(checkpoint, dtype, device, "fast")


exact.streams = fast.streams = True  # type: ignore[attr-defined]

PATHS = {"exact": exact, "fast": fast}
