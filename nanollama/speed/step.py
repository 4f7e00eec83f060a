"""What decodes one token of each row: the model as it is, compiled blocks (CPU) or a CUDA graph.

chooser = StepChooser(model, "auto")
step = chooser.choose(rows=1, tokens=100)
logits = step(ids, positions, cache)         # (B,), (B,) -> (B, V) float32
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from nanollama.model import KVCache, Transformer
from nanollama.speed.package import CompileError, compile_step, worth_compiling
from nanollama.speed.static import StaticStep

Step = Callable[[Tensor, Tensor, KVCache], Tensor]  # ids (B,), positions (B,), cache -> logits (B, V) float32
GRAPH_TOKENS = 32  # capturing a CUDA graph takes as long as these tokens win by it


class StepChooser:
    """The steps of one model, each made when it is first needed.

    mode: "off" is always eager; "on" raises CompileError where it cannot compile; "auto" compiles where the code is on
    disk already or the tokens asked for win back the time. On CUDA "auto" replays the model's own kernels as a graph,
    and "on" compiled ones. say: gets a line when compiling takes time or goes wrong.
    """

    def __init__(
        self,
        model: Transformer,
        mode: Literal["auto", "on", "off"] = "off",
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.mode, self.say = model, mode, say
        self.eager = eager_step(model)
        self.compiled: dict[int, Step] = {}  # by rows
        self.graph: Step | None = None  # for any rows

    def choose(self, rows: int, tokens: int) -> Step:
        """The step for so many rows, which are to take up to so many tokens each."""
        if self.mode == "off" or not tokens:
            return self.eager
        if self.model.tok_embeddings.weight.is_cuda:
            return self._graph_step(tokens)
        return self._compiled_step(rows, tokens)

    def _graph_step(self, tokens: int) -> Step:
        if self.mode == "auto" and tokens < GRAPH_TOKENS:
            return self.eager
        if self.graph is None:
            self.graph = StaticStep(self.model, compile=self.mode == "on")
        return self.graph

    def _compiled_step(self, rows: int, tokens: int) -> Step:
        if rows not in self.compiled:
            if self.mode == "auto" and not worth_compiling(self.model, rows, tokens):
                return self.eager
            self.compiled[rows] = self._compile(rows)
        return self.compiled[rows]

    def _compile(self, rows: int) -> Step:
        try:
            return compile_step(self.model, rows, say=self.say)
        except CompileError as error:
            if self.mode == "on":
                raise
            if self.say:
                self.say(str(error))
            return self.eager


def eager_step(model: Transformer) -> Step:
    """The model itself as a step."""
    return lambda ids, positions, cache: last_logits(model, ids.unsqueeze(1), positions.unsqueeze(1), cache)


def last_logits(model: Transformer, tokens: Tensor, positions: Tensor | None, cache: KVCache) -> Tensor:
    """Logits after the last of tokens (B, T), in float32: (B, V). The head is not applied to the others."""
    return model.logits(model.hidden(tokens, positions, cache=cache)[:, -1])
