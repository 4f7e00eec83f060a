"""A report as check, kit and mutants fill it and every printer reads it; `as_json` is the schema nanollama.parity/1.

What a run cannot have stays None and is no key of the JSON: a kit's report has no twin, no cache and no curves.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from parity.contract import Result
from parity.explain.explained import Explained
from parity.measure.rope_table import TableGrade
from parity.run.training import DTYPE

SCHEMA = "nanollama.parity/1"
OF_BOTH = ("schema", "candidate", "references", "results")  # that a twin's report does not repeat
UNSEEN = "unseen without it: mistakes that large trained states drown, as the epsilon of a norm"


def present(**fields: Any) -> dict[str, Any]:
    """Those that there are."""
    return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Divergence:
    """Where an implementation first departs. `value` and `expected` are those of the worst element of the tap."""

    tap: str
    reference: str
    dtype: str
    probable_cause: str
    path: str | None = None
    sequence: int | None = None
    position: int | None = None
    rho: float | None = None
    value: float | None = None
    expected: float | None = None
    operations: list[str] | None = None  # that are wrong on the reference's own inputs; None: not measured
    named: bool | None = None  # whether the table of mistakes has nothing to add; None: there is none to ask
    explained: Explained | None = None
    checkpoint: str | None = None  # "given" or "twin", where there are two

    @property
    def layer(self) -> int | None:
        return int(self.tap.split(".")[1]) if self.tap.startswith("layers.") else None

    def as_json(self) -> dict[str, Any]:
        mistakes = {"named": self.named, "explained": self.explained and self.explained.as_json()}
        return {
            "tap": self.tap,
            "layer": self.layer,
            "position": self.position,
            "probable_cause": self.probable_cause,
            **(mistakes if self.named is not None else {}),
            "sequence": self.sequence,
            "rho": self.rho,
            "value": self.value,
            "expected": self.expected,
            "reference": self.reference,
            "dtype": self.dtype,
            "path": self.path,
            "operations": self.operations,
            **present(checkpoint=self.checkpoint),
        }


@dataclass(frozen=True)
class CheckpointEntry:
    """What was checked. `verified`: files whose checksum was checked; None in a kit."""

    path: str
    format: str
    config: dict[str, Any]
    parameters: int
    verified: list[str] | None = None

    def as_json(self) -> dict[str, Any]:
        head = {"path": self.path, "format": self.format, **present(verified=self.verified)}
        return {**head, "config": self.config, "parameters": self.parameters}


@dataclass(frozen=True)
class Tokens:
    """What was run. A position is decided where rounding cannot overturn the oracle's choice."""

    prompts: int
    positions: int
    longest: int
    decided_fraction_by_dtype: dict[str, float]
    new_tokens: int | None = None

    def as_json(self) -> dict[str, Any]:
        decided = self.decided_fraction_by_dtype
        return {
            "prompts": self.prompts,
            "positions": self.positions,
            "longest": self.longest,
            **present(new_tokens=self.new_tokens),
            "decided_fraction": min(decided.values(), default=0.0),
            "decided_fraction_by_dtype": decided,
        }


@dataclass(frozen=True)
class NoiseFloor:
    """One reference judged against another: error ratios of the logits and of the worst other tap."""

    of: str
    against: str
    dtype: str
    logits: float | None
    tap: str | None
    taps: float | None
    rms_logits: float
    gradients: tuple[float, str] | None = None  # the worst ratio and its parameter; None: nothing was trained

    def as_json(self) -> dict[str, Any]:
        entry = asdict(self)
        return entry if self.dtype == DTYPE else {key: value for key, value in entry.items() if key != "gradients"}

    @classmethod
    def of_json(cls, entry: dict[str, Any]) -> "NoiseFloor":
        """From a kit's table."""
        gradients = entry.get("gradients")
        return cls(**entry | {"gradients": tuple(gradients) if gradients else None})


@dataclass(frozen=True)
class Curve:
    """The error ratio at every tap that both sides have, in order of computation."""

    reference: str
    dtype: str
    path: str | None
    ratios: dict[str, float]

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.path, self.dtype, "vs", self.reference) if part)

    def as_json(self) -> dict[str, float]:
        return self.ratios


@dataclass(frozen=True)
class Distance:
    """How far logits are from the oracle's: KL in nats over `positions`, and tokens that flip.

    `flip_margin`: how far ahead the oracle's best token was, at most, where another is preferred.
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    positions: int
    flips: int
    flip_margin: float | None


@dataclass(frozen=True)
class Rounded:
    """What declared rounding costs: the candidate's distance from the model, and that of the oracle that rounds so."""

    scheme: str
    dtype: str
    path: str | None
    candidate: Distance | None  # None: it has no logits
    rounding: Distance | None

    def as_json(self) -> dict[str, Any]:
        own, alone = (asdict(distance) if distance else {} for distance in (self.candidate, self.rounding))
        return {"scheme": self.scheme, "dtype": self.dtype, "path": self.path, **own, "rounding": alone}


@dataclass(frozen=True)
class Absent:
    """Why a check has no twin. `status`: "off"; "none" where there can be none; "error" where it came to no end."""

    status: str
    why: str
    needed: bool = True  # whether something goes unseen

    @property
    def note(self) -> str:
        return f"{'--twin off' if self.status == 'off' else 'no twin'}: {self.why}; {UNSEEN}"

    def as_json(self) -> dict[str, Any]:
        return {"status": self.status, "why": self.why}


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run. Printers: terminal.py, junit.py, html.py."""

    verdict: str
    why: str
    candidate: str
    references: list[str]
    checkpoint: CheckpointEntry
    environment: dict[str, Any]
    results: list[Result]
    first_divergence: Divergence | None = None
    errata: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    cached: list[str] | None = None  # jobs whose traces came from the cache
    rope_tables: list[TableGrade] | None = None
    noise_floor: list[NoiseFloor] = field(default_factory=list)
    rho: dict[str, Curve] | None = None  # by label
    training: dict[str, list[float]] = field(default_factory=dict)  # losses by implementation
    quantized: list[Rounded] = field(default_factory=list)
    streamed: dict[str, bool | None] | None = None  # by dtype: whether the candidate ran layer by layer
    tokens: Tokens
    seconds: float = 0.0
    seconds_in_forward: float = 0.0
    peak_anonymous_bytes: int = 0
    twin: "Report | Absent | None" = None

    @property
    def on_twin(self) -> "Report | None":
        """The second half of a check, where it was made."""
        return self.twin if isinstance(self.twin, Report) else None

    def as_json(self) -> dict[str, Any]:
        entries = {f.name: to_json(getattr(self, f.name)) for f in fields(self)}
        if self.on_twin:
            entries["twin"] = {"status": "run"} | {k: x for k, x in entries["twin"].items() if k not in OF_BOTH}
        held = {key: x for key, x in entries.items() if x is not None or key == "first_divergence"}
        return {"schema": SCHEMA, **held}


def to_json(value: Any) -> Any:
    if isinstance(value, list):
        return [to_json(entry) for entry in value]
    if isinstance(value, dict):
        return {key: to_json(entry) for key, entry in value.items()}
    return value.as_json() if hasattr(value, "as_json") else value
