"""Log-probabilities of logits: the whole distribution, and its most probable tokens. Needs only torch.

table = log_probabilities(logits, exact=True)     # (B, V) nats
most_probable(table, 2)                           # [((791, -0.31), (32, -2.06)), ...]
"""

from torch import Tensor

Top = tuple[tuple[int, float], ...]  # token ids and their log-probabilities in nats, the most probable first


def log_probabilities(logits: Tensor, *, exact: bool) -> Tensor:
    """log softmax of logits (B, V); exact: in float64, so that what is said has the error of the logits alone."""
    if not exact:
        return logits.log_softmax(-1)
    wide = logits.cpu() if logits.device.type == "mps" else logits  # MPS has no float64
    return wide.double().log_softmax(-1)


def most_probable(table: Tensor, n: int) -> list[Top]:
    """The n most probable tokens of each row of log-probabilities (B, V)."""
    if not n:
        return [()] * table.shape[0]
    best = table.topk(min(n, table.shape[1]), dim=-1)  # (B, n)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple(zip(ids, values, strict=True)) for ids, values in rows]
