"""The checks, registered by name. To add one: write a function Evidence -> Iterator[Result] and put it in CHECKS.

Their order is that of diagnosis: the first check that fails is the one that kills a mutant (greedy counts as the last).
"""

from collections.abc import Callable, Iterator

from parity.checks import decoding, forward, identity, ops, training
from parity.contract import Result
from parity.measure.evidence import Evidence

CHECKS: dict[str, Callable[[Evidence], Iterator[Result]]] = {
    "tokens": identity.tokens,
    "chat": identity.chat,
    "config": identity.config,
    "weights": identity.weights,
    "rope": identity.rope,
    "ops": ops.ops,
    "taps": forward.taps,
    "logits": forward.logits,
    "bitwise": forward.bitwise,
    "kl": forward.kl,
    "argmax": forward.argmax,
    "greedy": decoding.greedy,
    "cache": decoding.cache,
    "metamorphic": decoding.metamorphic,
    "training": training.training,
}
