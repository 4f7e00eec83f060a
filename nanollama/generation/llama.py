"""Text from a model: a checkpoint opened with its tokenizer, and its answers as one iterator of events.

from nanollama.generation.llama import Llama, Sampling
llama = Llama.load("Meta-Llama-3.1-8B")
for event in llama.generate(["Once upon a time"], Sampling(max_new_tokens=64, temperature=0.8)):
    print(event.text, end="", flush=True)
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from nanollama.checkpoint import open_checkpoint
from nanollama.checkpoint.adapter import merged, read_adapter
from nanollama.checkpoint.weights import DTYPES
from nanollama.generation.decode import Event, Row, Sampling, decode
from nanollama.generation.speculative import Drafter, decode_speculative
from nanollama.model import ModelConfig, Transformer
from nanollama.speed.quantize import load_quantized
from nanollama.speed.step import StepChooser
from nanollama.tokenizer import Tokenizer, open_tokenizer
from nanollama.vocabulary.write import fitting

__all__ = ["Event", "Llama", "Sampling"]


class Llama:
    """A model with its tokenizer; `tokenizer` may be None where prompts are token ids.

    compile, say: see nanollama.speed.step.StepChooser.
    drafter: guesses tokens that the model then checks, see nanollama.generation.speculative.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        compile: Literal["auto", "on", "off"] = "off",
        say: Callable[[str], None] | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.model, self.tokenizer, self.drafter = model, tokenizer, drafter
        self.steps = StepChooser(model, compile, say)
        if tokenizer is not None:
            fitting(tokenizer.vocabulary, model.config.vocab_size)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        adapter: str | Path | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        quantize: str | None = None,
        compile: Literal["auto", "on", "off"] = "auto",
        say: Callable[[str], None] | None = None,
        drafter: Drafter | None = None,
    ) -> "Llama":
        """Open a checkpoint of any format. Weights that keep their dtype (the default) on CPU stay memory-mapped.

        tokenizer: a file, where the checkpoint has none beside it. adapter: a LoRA adapter's folder, added to the
        weights as they are read. dtype: "fp32", "bf16", "fp16". quantize: "int8" or "int4" (see
        nanollama.speed.quantize), which computes in bf16 on a CPU where no dtype is given. compile, say, drafter: as
        for the class.
        Raises ValueError (CheckpointError, TokenizerError) with one line.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
        if not _is_available(device):
            raise ValueError(f"device {device!r} is not available to this torch: use cpu")
        checkpoint = open_checkpoint(path)
        tokenizer = tokenizer or checkpoint.tokenizer
        opened = open_tokenizer(tokenizer, rows=checkpoint.config.vocab_size) if tokenizer else None
        wanted, config, weights = DTYPES[dtype] if dtype else None, checkpoint.config, checkpoint.weights
        if adapter is not None:
            weights = merged(weights, read_adapter(adapter, config))
        if quantize is None:
            # In one dtype: a GGUF may keep norms as fp32 beside bf16 matrices.
            model = Transformer.from_weights(config, weights, dtype=wanted or weights.dtype, device=device)
        else:
            kept = torch.bfloat16 if quantize == "int4" and device == "cpu" else weights.dtype  # the kernel's
            model = load_quantized(config, weights, quantize, dtype=wanted or kept, device=device)
        return cls(model.eval(), opened, compile=compile, say=say, drafter=drafter)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def encode(self, prompt: str) -> list[int]:
        """The prompt's ids with BOS. Raises ValueError where there is no tokenizer."""
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer beside it: name one with --tokenizer, or give token ids")
        return self.tokenizer.encode(prompt, bos=True)

    def generate(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None) -> Iterator[Event]:
        """Answers to all prompts at once, as events in the order in which tokens are decided.

        prompts: texts (encoded with BOS) or token ids (taken as they are). Raises ValueError, before the first event,
        for a prompt that is empty, outside of the vocabulary or longer than the context.
        """
        sampling = sampling or Sampling()
        ids = [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        for i, prompt in enumerate(ids):
            self._check_prompt(i, prompt)
        rows = [
            Row(i, answer, prompt, sampling, self.tokenizer, self.config.max_seq_len)
            for i, prompt in enumerate(ids)
            for answer in range(sampling.n)
        ]
        if not rows:
            return iter(())
        if self.drafter is not None:
            return decode_speculative(self.model, rows, sampling, self.drafter)
        tokens = max(row.tokens_left for row in rows) - 1  # the last one is decided, but never read
        return decode(self.model, rows, sampling, self.steps.choose(len(rows), tokens))

    def _check_prompt(self, index: int, ids: list[int]) -> None:
        if not ids:
            raise ValueError(f"prompt {index} is empty: give at least one token")
        if len(ids) > self.config.max_seq_len:
            raise ValueError(
                f"prompt {index} has {len(ids):,} tokens and the context holds {self.config.max_seq_len:,}: shorten it"
            )
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise ValueError(f"prompt {index} has a token id outside of the model's 0..{self.config.vocab_size - 1}")


def _is_available(device: str) -> bool:
    kind = device.partition(":")[0]
    return kind == "cpu" or (kind in ("cuda", "mps") and torch.get_device_module(kind).is_available())
