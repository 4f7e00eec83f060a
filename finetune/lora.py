"""LoRA from outside the model: each targeted linear layer keeps its frozen weight and learns a low-rank change of it.

    add_lora_(model, 8, 16, ("wq", "wv"), 0.0, torch.Generator().manual_seed(0))
    lora_parameters(model)       # the only ones to train
    merged_weights(model)        # plain matrices again

A base may be anything with `weight` (outputs, inputs) and a forward: an nn.Linear, or a 4-bit layer. Chat tokens whose
rows are untrained get a small table of their own (`add_rows_`). Source: LoRA (arXiv 2106.09685); initialised as PEFT
does, A uniform within 1/sqrt(inputs) and B zero, so training starts from the base. DoRA (arXiv 2402.09353) gives each
row of the sum a length of its own, which is trained: at first that of the base's row.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import UserError
from nanollama.checkpoint.adapter import (
    EMBEDDING,
    LINEARS,
    ROW_MATRICES,
    TINY,
    Adapter,
    add_low_rank,
    merged,
    row_lengths,
    target_names,
)
from nanollama.checkpoint.weights import Lazy, Weights
from nanollama.model import Transformer

LORA_SUFFIXES = (".lora_A", ".lora_B", ".lora_magnitude", ".token_rows")  # of the parameters that --method lora trains


class LoraLinear(nn.Module):
    """x (..., inputs) -> base(x) + scale * B A dropout(x), (..., outputs); of DoRA times what makes the rows as long as
    lora_magnitude (outputs,) says.
    """

    base: Any  # a module with weight (outputs, inputs)

    def __init__(
        self, base: Any, rank: int, alpha: float, dropout: float, generator: torch.Generator, *, dora: bool
    ) -> None:
        super().__init__()
        outputs, inputs = base.weight.shape
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, dropout
        device, bound = base.weight.device, 1 / math.sqrt(inputs)
        device = torch.device("cpu") if device.type == "meta" else device  # the base is read when it has been sharded
        drawn = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(device))  # fp32, whatever the base is
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=device))
        self.lora_magnitude = nn.Parameter(row_lengths(base.weight.detach())) if dora else None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The whole matrix, for losses that take the head itself (no dropout), with gradients."""
        base = self.base.weight
        if self.lora_magnitude is None:
            return add_low_rank(base, self.lora_A, self.lora_B, self.scale)
        whole = add_low_rank(base.float(), self.lora_A, self.lora_B, self.scale)
        return (whole * self.stretch().unsqueeze(1)).to(base.dtype)

    def stretch(self) -> Tensor:
        """Of DoRA: the wanted length of each row over the sum's own, (outputs,) fp32. The latter is a constant in the
        backward pass, as section 4.3 of the paper has it, so that no gradient of a whole matrix is made.
        """
        assert self.lora_magnitude is not None
        base = self.base.weight
        with torch.no_grad(), torch.autocast(base.device.type, enabled=False):
            lengths = row_lengths(add_low_rank(base.float(), self.lora_A, self.lora_B, self.scale))
        return self.lora_magnitude / lengths.clamp(min=TINY)

    @torch.no_grad()
    def is_idle(self) -> bool:
        """Whether the layer computes what its base does."""
        fresh = not bool(self.lora_B.any())
        return fresh and (self.lora_magnitude is None or bool((self.stretch() == 1).all()))

    def forward(self, x: Tensor) -> Tensor:
        down = F.linear(F.dropout(x, self.dropout, training=self.training), self.lora_A.to(x.dtype))  # (..., rank)
        # In place: no product keeps its own output for the backward pass.
        y = self.base(x).add_(F.linear(down, self.lora_B.to(x.dtype)), alpha=self.scale)
        return y if self.lora_magnitude is None else (y * self.stretch()).to(y.dtype)


class TokenRows(nn.Module):
    """An embedding or head whose rows `ids` are trained apart from the frozen others."""

    ids: Tensor
    place: Tensor

    base: Any  # a module with weight (outputs, inputs)

    def __init__(self, base: Any, ids: tuple[int, ...]) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        place = torch.full((base.weight.shape[0],), -1, dtype=torch.int64, device=device)  # of a token among the rows
        place[list(ids)] = torch.arange(len(ids), device=device)
        self.register_buffer("ids", torch.tensor(ids, device=device), persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.token_rows = nn.Parameter(base.weight.detach()[list(ids)].float().clone())  # (n, C)

    @property
    def weight(self) -> Tensor:
        """The whole matrix (V, C), with gradients to the rows."""
        weight = self.base.weight
        return weight.index_copy(0, self.ids, self.token_rows.to(weight.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        place = self.place[tokens].unsqueeze(-1)  # (B, T, 1)
        own = F.embedding(place.squeeze(-1).clamp(min=0), self.token_rows)  # (B, T, C)
        plain = self.base(tokens)  # (B, T, C)
        return torch.where(place >= 0, own.to(plain.dtype), plain)


def add_lora_(
    model: Transformer,
    rank: int,
    alpha: float,
    targets: tuple[str, ...],
    dropout: float,
    generator: torch.Generator,
    *,
    dora: bool = False,
) -> None:
    """Put a LoraLinear around every layer that `targets` (see nanollama/checkpoint/adapter.py) name; freeze all else.

    Raises UserError for an unknown target, a tied head, or a layer that has an adapter already.
    """
    weights = target_names(model.config, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        _wrap_(model, weight, rank, alpha, dropout, generator, dora=dora)


def _wrap_(
    model: Transformer,
    weight: str,
    rank: int,
    alpha: float,
    dropout: float,
    generator: torch.Generator,
    *,
    dora: bool,
) -> LoraLinear:
    name = weight.removesuffix(".weight")
    base = model.get_submodule(name)
    if isinstance(base, (LoraLinear, TokenRows)):
        raise UserError(f"{name} is wrapped already: leave {name.rpartition('.')[2]} out of the lora targets")
    layer = LoraLinear(base, rank, alpha, dropout, generator, dora=dora)
    _replace_(model, name, layer)
    return layer


def add_rows_(model: Transformer, ids: tuple[int, ...], matrices: tuple[str, ...] = ROW_MATRICES) -> None:
    """Let the rows `ids` of the embedding, and of a head of its own, be trained apart. Call it after `add_lora_`."""
    for name in [name.removesuffix(".weight") for name in matrices]:
        base = getattr(model, name)
        if isinstance(base, LoraLinear):
            raise UserError("lora target output together with chat rows in the head: leave output out of the targets")
        if base is not None:
            _replace_(model, name, TokenRows(base, ids))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What --method lora trains, by name."""
    return {name: p for name, p in model.named_parameters() if name.endswith(LORA_SUFFIXES)}


def merged_weights(model: Transformer) -> dict[str, Tensor]:
    """Meta's names -> plain tensors, adapters summed in; a model without adapters gives its own tensors."""
    return dict(merged_when_read(model))


def merged_when_read(model: Transformer, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> Weights:
    """The same, each made when it is read. whole: gives a parameter in one piece, where it is sharded."""
    bases = {}
    for name, module in model.named_modules():
        base = module.base if isinstance(module, (LoraLinear, TokenRows)) else module
        if ".base" not in f".{name}" and isinstance(getattr(base, "weight", None), Tensor):
            bases[f"{name}.weight"] = _weight_of(base, whole)
    return merged(Weights(bases), adapter_of(model, whole))


def _weight_of(module: Any, whole: Callable[[Tensor], Tensor]) -> Lazy:
    """Read when it is asked for: a 4-bit layer makes its whole matrix anew each time, and all at once would not fit."""
    weight = module.weight
    return Lazy(tuple(weight.shape), weight.dtype, lambda start, stop: whole(module.weight)[start:stop])


def merged_model(model: Transformer, attention: str = "fast") -> Transformer:
    """A model of plain layers with the adapters in them; what no adapter changes is shared."""
    return Transformer.from_weights(
        model.config, merged_weights(model), device=model.tok_embeddings.weight.device, attention=attention
    )


def adapter_of(model: Transformer, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> Adapter:
    """The adapter that the model wears, as nanollama.checkpoint.adapter writes it; an empty one where it wears none.

    whole: gives a parameter in one piece, where it is sharded.
    """
    loras = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    tables = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, TokenRows)}
    return Adapter(
        pairs={name: (whole(m.lora_A), whole(m.lora_B)) for name, m in loras.items()},
        alphas={name: m.alpha for name, m in loras.items()},
        rows={name: (tuple(m.ids.tolist()), whole(m.token_rows)) for name, m in tables.items()},
        dropout=max((m.dropout for m in loras.values()), default=0.0),  # the same of all
        magnitudes={name: whole(m.lora_magnitude) for name, m in loras.items() if m.lora_magnitude is not None},
    )


@torch.no_grad()
def wear_(model: Transformer, adapter: Adapter, dropout: float, generator: torch.Generator) -> None:
    """Go on from a saved adapter: the layers that it changes are wrapped and get its numbers; all else is frozen.

    Raises UserError for an adapter that changes more than the linear layers and rows that are trained here.
    """
    if adapter.whole or EMBEDDING in adapter.pairs:
        name = min(adapter.whole, default=EMBEDDING)
        raise UserError(f"the adapter changes {name} as a whole: convert --adapter merges it into a base to go on from")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, (a, b) in adapter.pairs.items():
        dora = name in adapter.magnitudes
        layer = _wrap_(model, name, len(a), adapter.alphas[name], dropout, generator, dora=dora)
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
        if layer.lora_magnitude is not None:
            layer.lora_magnitude.copy_(adapter.magnitudes[name])
    for name, (ids, rows) in adapter.rows.items():
        add_rows_(model, ids, (name,))
        model.get_submodule(name.removesuffix(".weight")).token_rows.copy_(rows)  # type: ignore[operator]


def _replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# --- QLoRA: a 4-bit base ---------------------------------------------------------------------------------------------


BLOCK, SCALER_BLOCK = 64, 256  # weights that share a scale, and scales that share one: QLoRA's
PATHS = ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor")  # newest first
EXTRA = "--method qlora needs the package torchao: pip install 'llama-parity[lean]'"


class NF4Linear(nn.Module):
    """A frozen linear layer without bias in 4-bit NormalFloat (arXiv 2305.14314) through torchao, where it is
    installed; gradients flow through it to its input.
    """

    nf4: Any  # torchao's NF4Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        to_nf4, self._multiply = _torchao()
        if weight.numel() % (BLOCK * SCALER_BLOCK):
            raise UserError(
                f"--method qlora: a matrix of {tuple(weight.shape)} is no multiple of {BLOCK * SCALER_BLOCK} numbers, "
                "which share their scales: use --method lora"
            )
        self.register_buffer("nf4", to_nf4(weight.detach(), BLOCK, SCALER_BLOCK), persistent=False)

    @property
    def weight(self) -> Tensor:
        """What the 4 bits stand for, (outputs, inputs) in the dtype that was quantised."""
        return self.nf4.get_original_weight()

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.nf4)


def quantize_base_(model: Transformer, weights: Mapping[str, Tensor] | None = None) -> None:
    """Every linear layer of the blocks in 4 bits; embedding, norms and head stay as they are. Raises UserError.

    weights: their matrices by Meta's names, read one at a time, so that the whole base is never there; None: the
    model's own.
    """
    stored = model.state_dict() if weights is None else weights
    for weight in target_names(model.config, LINEARS):
        _replace_(model, weight.removesuffix(".weight"), NF4Linear(stored[weight]))


def _torchao() -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """(to_nf4, linear_nf4), from where this release of torchao has them. Raises UserError that names the extra."""
    for path in PATHS:
        with suppress(ImportError):
            module = import_module(path)
            return module.to_nf4, module.linear_nf4
    raise UserError(EXTRA)
