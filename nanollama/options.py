"""The flags that `generate` and `chat` share, each declared once; torch is imported when the model is loaded.

ModelOptions(quantize="int8").load("Meta-Llama-3.1-8B")
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanollama.printable import LINE_CHARACTERS, printable

if TYPE_CHECKING:
    from nanollama.generation.llama import Llama
    from nanollama.model import Transformer


@dataclass(frozen=True)
class Drawing:
    """The flags of how tokens are drawn, those of nanollama.generation.llama.Sampling."""

    max_new_tokens: int = 128  # per answer
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # draw from the k most probable tokens; 0 is off
    top_p: float = 1.0  # draw from the most probable tokens that together reach p; 1 is off
    min_p: float = 0.0  # draw from tokens at least p times as probable as the first; 0 is off
    repetition_penalty: float = 1.0  # above 1 makes tokens that were there less likely
    seed: int = 0  # same seed, same answers


@dataclass(frozen=True)
class ModelOptions:
    """The flags of the model that answers."""

    tokenizer: Path | None = None  # a tokenizer file, where there is none beside the checkpoint
    adapter: Path | None = None  # folder of a LoRA adapter (PEFT's format) to add to the checkpoint
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # of weights and computation; default: as stored
    device: Literal["cpu", "cuda", "mps"] = "cpu"  # where the model runs
    quantize: Literal["int8", "int4"] | None = None  # weights as integers; int4 computes in bf16 without --dtype
    compile: Literal["auto", "on", "off"] = "auto"  # the decode step; auto: where it wins back its time
    draft: str | None = None  # a smaller checkpoint with the same vocabulary, which guesses tokens ahead
    tp: int = 1  # parts of each layer, one a process: torchrun --nproc_per_node TP -m nanollama ...
    lookup: bool = False  # guess tokens ahead from what was said before (speculative decoding, same answers)

    def load(self, ckpt: str) -> "Llama":
        """The model with its drafter. Raises ValueError, one line."""
        from nanollama.generation.llama import Llama

        if self.draft and self.lookup:
            raise ValueError("--draft and --lookup are two ways to guess tokens: give one")
        if self.tp != 1:
            return self._load_part(ckpt)
        options = {name: value for name, value in vars(self).items() if name not in ("draft", "lookup", "tp")}
        llama = Llama.load(ckpt, **options, say=say)
        if self.draft or self.lookup:
            from nanollama.generation.speculative import DraftModel, Lookup

            llama.drafter = Lookup() if self.lookup else DraftModel(self._draft_model(llama))
        return llama

    def _load_part(self, ckpt: str) -> "Llama":
        """This process's part of the model; all but the first of them stay silent from here on."""
        refused = {
            "quantize": self.quantize,
            "draft": self.draft,
            "lookup": self.lookup,
            "compile": self.compile == "on",
        }
        for name, given in refused.items():
            if given:
                raise ValueError(f"--{name} does not work over parts of layers: leave it out, or --tp")
        from nanollama.generation.parallel import load_parallel

        llama = load_parallel(
            ckpt, self.tp, tokenizer=self.tokenizer, adapter=self.adapter, dtype=self.dtype, device=self.device
        )
        if os.environ["RANK"] != "0":
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
        return llama

    def _draft_model(self, llama: "Llama") -> "Transformer":
        model = type(llama).load(str(self.draft), dtype=self.dtype, device=self.device).model
        if model.config.vocab_size != llama.config.vocab_size:
            raise ValueError(
                f"the draft model has {model.config.vocab_size:,} tokens and the model {llama.config.vocab_size:,}: "
                "give one with the same vocabulary"
            )
        return model


def say(line: str) -> None:
    """A line for the user beside the answer."""
    print(printable(line, LINE_CHARACTERS), file=sys.stderr, flush=True)
